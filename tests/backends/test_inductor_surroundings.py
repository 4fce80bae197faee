"""Wherever, in whatever environment and with whatever compiler a bucket is built: the same bytes, or a reason.

Paths that need quotes, variables that steer compilers, locales, wrappers, full disks.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from nanogpt_buckets import child
from nanogpt_buckets.backends.inductor import backend as inductor
from nanogpt_buckets.choice import choose
from nanogpt_buckets.plan.bucket import Bucket
from nanogpt_buckets.run.loader import artifact_of
from nanogpt_buckets.selection import Selection

PACKAGE_PARENT = str(Path(child.__file__).parents[1])
NASTY = "a b; $c 'd' \"e\" é=1"  # each of these ended a build, or its prefix map


def program(path: Path, text: str) -> Path:
    """Write a script of /bin/sh."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


# --- one build in every hostile surrounding at once -------------------------------------------------------------------


@pytest.fixture
def environment(tmp_path) -> Path:
    """A virtual environment in a path that needs quotes, with the packages of this one."""
    import torch

    where = tmp_path / NASTY / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(where)], check=True)
    (packages,) = where.glob("lib/python*/site-packages")
    for entry in Path(torch.__file__).parents[1].iterdir():
        if entry.suffix != ".pth":
            (packages / entry.name).symlink_to(entry)
    return where


def poison(folder: Path) -> dict[str, str]:
    """Return variables that would end a compilation, or change what it makes, if they reached the compiler."""
    for header in ("cstdint", "omp.h", "torch/csrc/inductor/cpp_prefix.h"):
        (folder / "include" / header).parent.mkdir(parents=True, exist_ok=True)
        (folder / "include" / header).write_text("#error poison\n", encoding="ascii")
    (folder / "lib").mkdir()
    (folder / "lib" / "libgomp.so").write_text("poison", encoding="ascii")
    program(folder / "bin" / "as", "exit 1")
    poisoned = {name: str(folder / "include") for name in ("CPATH", "CPLUS_INCLUDE_PATH", "C_INCLUDE_PATH")}
    poisoned |= {"LIBRARY_PATH": str(folder / "lib"), "LD_RUN_PATH": "/poison", "COMPILER_PATH": str(folder / "bin")}
    poisoned |= {"GCC_EXEC_PREFIX": f"{folder}/bin/", "DEPENDENCIES_OUTPUT": "/poison/deps"}
    poisoned |= {name: "--poison" for name in ("CFLAGS", "CXXFLAGS", "CPPFLAGS", "LDFLAGS", "CCC_OVERRIDE_OPTIONS")}
    poisoned |= {"TORCHINDUCTOR_CPP_MARCH": "poison", "AOT_INDUCTOR_COMPILE_WRAPPER_OPT_LEVEL": "O9poison"}
    poisoned |= {"PYTHONWARNINGS": "error", "PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONIOENCODING": "ascii:strict"}
    return poisoned | {"OMP_NUM_THREADS": "3", "PYTHONOPTIMIZE": "2", "PYTHONHASHSEED": "77"}


def test_hostile_surroundings_build_the_very_same_bytes(environment, odd_folder, odd_cache, tmp_path):
    wrapper = program(tmp_path / NASTY / "my bin" / "ccache", 'exec "$@"')
    surroundings = poison(tmp_path / NASTY / "poison") | {"TMPDIR": str(tmp_path / NASTY)}
    surroundings |= {"CXX": "ccache g++", "PATH": f"{wrapper.parent}:{os.environ['PATH']}"}
    command = [str(environment / "bin" / "python"), "-m", "nanogpt_buckets", "build", "--model", str(odd_folder)]
    run = subprocess.run(
        [*command, "--strategy=recompute", "--seq=16", "--cache-dir", str(tmp_path / "made")],
        env=os.environ | {"PYTHONPATH": PACKAGE_PARENT} | surroundings, capture_output=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr.decode()

    made, plain = (Selection(choose(odd_folder, cache_dir=where)) for where in (tmp_path / "made", odd_cache))
    assert made.own(Bucket(1, 16)).manifest.key == plain.own(Bucket(1, 16)).manifest.key
    found, expected = (artifact_of(s.best(Bucket(1, 16))) for s in (made, plain))
    assert found.blobs == expected.blobs
    assert found.requires == expected.requires
    assert len(found.blobs["library"]) < 600_000, "neither line tables nor symbols are in it"
    for place in (os.fsencode(tmp_path), PACKAGE_PARENT.encode(), b"/tmp/", b"site-packages", b"/proc/", b".debug_"):
        assert place not in found.blobs["library"]
    assert sorted(path.name for path in (tmp_path / NASTY).iterdir()) == ["my bin", "poison", "venv"]


def test_pythons_own_place_needs_no_quotes_either(tmp_path):
    place = str(tmp_path / NASTY)
    code = (
        "import sysconfig\nfrom nanogpt_buckets.backends.inductor.compile import settle\n"
        f"sysconfig.get_config_vars().update(LIBDIR={place!r}, installed_base={place!r})\n"
        "settle()\nprint(sysconfig.get_path('include'), sysconfig.get_config_var('LIBDIR'))\n"
    )
    (tmp_path / NASTY / "include").mkdir(parents=True)
    run = subprocess.run(
        [sys.executable, "-c", code], env=child.clean_environment(), cwd=tmp_path, capture_output=True, text=True
    )

    assert run.returncode == 0, run.stderr
    include, library = shlex.split(run.stdout)
    assert (Path(include).parts[:2], Path(library).parts[:2]) == (("/", "proc"), ("/", "proc"))


# --- which compiler ---------------------------------------------------------------------------------------------------


def identity(monkeypatch, cxx: str | None) -> str | None:
    monkeypatch.setenv("CXX", cxx) if cxx is not None else monkeypatch.delenv("CXX", raising=False)
    compiler = inductor.InductorBackend().compiler()
    return None if compiler is None else compiler["cxx"]


WRAPPERS = [
    'exec g++ -O0 "$@"', 'exec g++ "$@" -ffast-math', 'exec g++ -DPOISON "$@"', 'exec g++ -I/opt/include "$@"',
    'exec g++ -include stdio.h "$@"',
    'exec g++ "$@" -Wl,-z,now', 'exec g++ "$@" -L/opt/lib', 'exec g++ -march=native "$@"',
    'case "$*" in *" -c "*) exec g++ "$@" -fno-inline;; *) exec g++ "$@";; esac',
]  # fmt: skip


def test_a_wrapper_that_adds_options_is_another_compiler(monkeypatch, tmp_path):
    wrapper = tmp_path / "a b" / "wrapper"
    found = {}
    for text in WRAPPERS:
        inductor._cxx_identity.cache_clear()
        found[identity(monkeypatch, shlex.quote(str(program(wrapper, text))))] = text
    inductor._cxx_identity.cache_clear()
    found[identity(monkeypatch, "g++ -fno-builtin")] = "g++ -fno-builtin"
    assert None not in found
    assert len(found) == len(WRAPPERS) + 1

    plain = identity(monkeypatch, None)
    assert plain not in found
    program(tmp_path / "a b" / "ccache", 'exec "$@"')
    monkeypatch.setenv("PATH", f"{tmp_path / 'a b'}:{os.environ['PATH']}")
    for same in ("", " ", "g++", "/usr/bin/env g++", "ccache g++", "'ccache' \"g++\"", f"{tmp_path}/a b/ccache g++"):
        assert identity(monkeypatch, same) in ((None,) if same.startswith("/tmp") else (plain,)), same
    program(wrapper, 'exec g++ "$@"')
    assert identity(monkeypatch, str(wrapper)) == plain, "a path with a blank may stand there unquoted"
    monkeypatch.chdir(wrapper.parent)
    assert identity(monkeypatch, "./wrapper") == plain
    assert shlex.split(inductor.InductorBackend().child_environment(None)["CXX"]) == [str(wrapper)]
    for name in ("CPLUS_INCLUDE_PATH", "CPATH", "TMPDIR", "LC_ALL"):
        inductor._cxx_identity.cache_clear()
        monkeypatch.setenv(name, str(tmp_path))
        assert identity(monkeypatch, "g++") == plain, name


@pytest.mark.parametrize("cxx", ["no-such-compiler", "no-such-ccache g++", "'g++", "g++ \\", "''", "true", "/"])
def test_what_is_no_compiler_is_none_and_no_traceback(monkeypatch, cxx):
    assert identity(monkeypatch, cxx) is None
    assert choose("demo").key_parts(Bucket(1, 16)) is None


@pytest.mark.parametrize(
    ("given", "processors", "told"), [("1", 8, "2"), ("3", 1, "2"), ("3", 8, None), (None, 8, None)]
)
def test_the_gate_never_runs_with_one_thread(monkeypatch, given, processors, told):
    monkeypatch.setenv("OMP_NUM_THREADS", given) if given else monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(inductor.host, "visible_cpu_count", lambda: processors)

    environment = inductor.InductorBackend().child_environment(None)
    assert (environment.get("OMP_NUM_THREADS"), environment["OMP_WAIT_POLICY"]) == (told, "passive")


# --- a full disk ------------------------------------------------------------------------------------------------------


def test_a_full_temporary_directory_is_blamed_on_the_disk(tmp_path):
    where = tmp_path / "small"
    where.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(where)], capture_output=True)
    assert done.returncode == 0, f"this test mounts a file system, which needs root, as CI has: {done.stderr.decode()}"
    try:
        run = subprocess.run(
            [sys.executable, "-m", "nanogpt_buckets", "build", "--model=demo", "--strategy=recompute",
             "--seq=24", "--json"],
            env=os.environ | {"TMPDIR": str(where)}, capture_output=True, text=True,
        )  # fmt: skip
        left = list(where.iterdir())
    finally:
        subprocess.run(["umount", "--lazy", str(where)], check=True)

    (row,) = json.loads(run.stdout)["buckets"]
    assert (run.returncode, row["state"]) == (5, "failed"), run.stderr
    assert f"No space left on device in {where}" in row["why"]
    assert "TMPDIR" in row["hint"]
    assert "Traceback" not in run.stderr
    assert left == []
    assert not list(tmp_path.glob("local/failures/*")), "it is worth trying again at once"
