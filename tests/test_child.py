"""A child gets nothing that steers it, names what went wrong, and leaves nothing behind, however its parent ends."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from nanogpt_buckets import child
from nanogpt_buckets.errors import ChildFailed

# --- what steers a compiler does not reach a child --------------------------------------------------------------------

# Read by torch's compiler, and shaping no code for a CPU: programs and libraries, other devices, somebody's clusters.
HARMLESS = {
    "PATH", "LD_LIBRARY_PATH", "CC", "CXX", "CONDA_EXE", "CONDA_PREFIX", "ProgramFiles", "CI", "KMP_DUPLICATE_LIB_OK",
    "CUDACXX", "WINDOWS_CUDA_HOME", "ONEAPI_ROOT", "LEVEL_ZERO_V1_SDK_PATH", "MAST_HPC_JOB_NAME", "ROLE_RANK",
}  # fmt: skip

# From "Environment Variables Affecting GCC", the manuals of Clang and GNU ld, and Python's.
DOCUMENTED = """
CPATH C_INCLUDE_PATH CPLUS_INCLUDE_PATH OBJC_INCLUDE_PATH LIBRARY_PATH COMPILER_PATH GCC_EXEC_PREFIX GCC_COMPARE_DEBUG
DEPENDENCIES_OUTPUT SUNPRO_DEPENDENCIES SOURCE_DATE_EPOCH GCC_COLORS GCC_URLS LANG LANGUAGE LC_ALL LC_CTYPE LC_MESSAGES
CCC_OVERRIDE_OPTIONS CCC_ADD_ARGS SDKROOT MACOSX_DEPLOYMENT_TARGET CL _CL_ LD_RUN_PATH GNUTARGET LDEMULATION
COLLECT_NO_DEMANGLE CFLAGS CXXFLAGS CPPFLAGS LDFLAGS ATEN_CPU_CAPABILITY NEURON_CC_FLAGS
PYTHONWARNINGS PYTHONOPTIMIZE PYTHONINSPECT PYTHONSTARTUP PYTHONIOENCODING PYTHONUTF8 PYTHONHASHSEED PYTHONDEVMODE
PYTHONDEBUG PYTHONVERBOSE PYTHONMALLOC PYTHONBREAKPOINT PYTHONCOERCECLOCALE PYTHONWARNDEFAULTENCODING
"""


def read_by_torch() -> set[str]:
    import torch

    folder = Path(torch.__file__).parent
    places = [f for name in ("_inductor", "_dynamo", "_functorch", "_export") for f in (folder / name).rglob("*.py")]
    call = r"(?:environ(?:\.get)?[\[(]|getenv\(|get_tristate_env\(|env_name_(?:force|default)=\[?)\s*\"(\w+)\""
    return {name for place in places for name in re.findall(call, place.read_text(encoding="utf-8"))}


def test_nothing_that_steers_a_compiler_reaches_a_child(monkeypatch):
    found = read_by_torch()
    assert len(found) > 100
    for name in (found - HARMLESS) | set(DOCUMENTED.split()):
        monkeypatch.setenv(name, "steering")

    assert [name for name, value in child.clean_environment().items() if value == "steering"] == []


def test_what_a_child_needs_does(monkeypatch):
    needed = {"HOME": "/h", "PATH": "/p", "LD_LIBRARY_PATH": "/l", "LD_PRELOAD": "", "CXX": "c++", "CCACHE_DIR": "/c"}
    needed |= {"OMP_NUM_THREADS": "3", "NEURON_RT_NUM_CORES": "1", "PYTHONHOME": "/ph", "PYTHONUSERBASE": "/pu"}
    for name, value in needed.items():
        monkeypatch.setenv(name, value)

    assert child.clean_environment({"OWN": "x"}).items() >= (needed | {"OWN": "x"}).items()


def test_a_relative_pythonpath_means_the_parents_directory(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"one:{tmp_path}/two:")

    assert child.clean_environment()["PYTHONPATH"].split(":")[-2:] == [f"{tmp_path}/one", f"{tmp_path}/two"]


# --- children of the tests' own ---------------------------------------------------------------------------------------


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A function that makes a module whose handler has this body."""
    (tmp_path / "modules").mkdir()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))

    def module(body: str) -> str:
        text = f"import os, time\nfrom nanogpt_buckets import child\n\ndef handle(request, emit):\n    {body}\n"
        text += "if __name__ == '__main__':\n    child.serve(handle)\n"
        (tmp_path / "modules" / "handler.py").write_text(text, encoding="utf-8")
        return "handler"

    return module


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """The temporary directory, for this process and those it starts."""
    (tmp_path / "a temporary directory").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "a temporary directory"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    yield tmp_path / "a temporary directory"
    tempfile.tempdir = None


NO_ROOM = [
    f"raise OSError({errno.ENOSPC}, os.strerror({errno.ENOSPC}))",
    f"raise OSError({errno.EDQUOT}, os.strerror({errno.EDQUOT}))",
    "raise RuntimeError('C++ compile error\\n\\nOutput:\\n/x/cc1.s: No space left on device')",
]


@pytest.mark.parametrize("body", NO_ROOM, ids=range(3))
def test_a_full_disk_is_blamed_on_the_disk_by_name(body, module, scratch):
    with pytest.raises(ChildFailed) as caught, child.work_folder() as folder:
        child.run(module(body), {}, workdir=folder)

    assert caught.value.message == f"No space left on device in {scratch}, where the child writes"
    assert "another directory in TMPDIR" in caught.value.hint


def test_a_disk_that_is_not_the_temporary_one_has_another_way_out(module, tmp_path):
    (tmp_path / "local" / "x").mkdir(parents=True)
    with pytest.raises(ChildFailed) as caught:
        child.run(module(NO_ROOM[0]), {}, workdir=tmp_path / "local" / "x")

    assert (caught.value.message, caught.value.hint) == (
        f"No space left on device in {tmp_path / 'local'}, where the child writes", "make room"
    )  # fmt: skip


def test_the_temporary_directory_itself_is_full_or_gone(scratch, monkeypatch):
    scratch.rmdir()
    tempfile.tempdir = str(scratch)
    with pytest.raises(OSError, match="a temporary directory"), child.work_folder():
        pass


@pytest.mark.parametrize("locale", [{"LC_ALL": "C", "PYTHONUTF8": "0"}, {"PYTHONIOENCODING": "ascii"}, {}], ids=str)
def test_a_path_is_the_same_bytes_to_a_child_whatever_the_locale(locale, module, tmp_path):
    (tmp_path / "モデル é").write_text("read", encoding="ascii")
    name = module(
        "return {'text': open(request['path']).read(), 'encoding': __import__('locale').getpreferredencoding(False)}"
    )
    code = (
        "import sys\nfrom nanogpt_buckets import child\n"
        f"with child.work_folder() as folder: print(child.run({name!r}, {{'path': sys.argv[1]}}, workdir=folder))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "モデル é")],
        env=os.environ | locale, capture_output=True, text=True,
    )  # fmt: skip

    assert run.returncode == 0, run.stderr
    assert "'text': 'read', 'encoding': 'utf-8'" in run.stdout


def test_warnings_are_no_errors_to_a_child(module, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONWARNINGS", "error")

    assert child.run(module("import warnings; warnings.warn('old'); return {'a': 1}"), {}, workdir=tmp_path)["a"] == 1


# --- work folders -----------------------------------------------------------------------------------------------------

PARENT = """
import signal
from nanogpt_buckets import child
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever runs the tests may ignore these
signal.signal(signal.SIGINT, signal.default_int_handler)
with child.work_folder() as folder:
    child.run("handler", {}, workdir=folder, on_event=lambda event: print(event["pid"], flush=True))
"""


def wait_for(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL, signal.SIGINT])
def test_a_parent_that_is_killed_leaves_no_child_and_no_folder_for_long(sent, module, scratch):
    module("emit('started', pid=os.getpid()); time.sleep(600)")
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    pid = int(parent.stdout.readline())
    (folder,) = scratch.iterdir()

    with child.work_folder() as own:
        assert {own, folder} == set(scratch.iterdir()), "what is in use stays"
    parent.send_signal(sent)
    parent.communicate()
    wait_for(lambda: not Path(f"/proc/{pid}").exists())
    assert folder.exists() is (sent != signal.SIGINT)

    with child.work_folder() as own:
        assert list(scratch.iterdir()) == [own]
    assert list(scratch.iterdir()) == []


def test_only_work_folders_of_this_user_that_nobody_holds_are_swept(scratch, tmp_path):
    prefix = child._FOLDER
    for name in (f"{prefix}theirs", f"{prefix}left", f"{prefix}new", "nanogpt-buckets-0"):
        (scratch / name).mkdir()
        if name != f"{prefix}new":  # an empty one is about to be locked
            (scratch / name / "file").touch()
    os.chown(scratch / f"{prefix}theirs", 65534, 65534)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").touch()
    (scratch / f"{prefix}link").symlink_to(tmp_path / "elsewhere")
    (scratch / f"{prefix}file").touch()

    with child.work_folder():
        assert not (scratch / f"{prefix}left").exists()

    names = {path.name for path in scratch.iterdir()}
    assert names == {f"{prefix}theirs", f"{prefix}new", f"{prefix}link", f"{prefix}file", "nanogpt-buckets-0"}
    assert (tmp_path / "elsewhere" / "file").exists()


def test_prune_sweeps_too(scratch, tmp_path):
    for name in ("left", "held"):
        (scratch / f"{child._FOLDER}{name}").mkdir()
        (scratch / f"{child._FOLDER}{name}" / "file").touch()
    held = child._claim(scratch / f"{child._FOLDER}held")
    assert held is not None

    for arguments, left in ((["--dry-run"], {"left", "held"}), (["--yes"], {"held"})):
        command = [sys.executable, "-m", "nanogpt_buckets", "cache", "prune", *arguments]
        subprocess.run(command, check=True, capture_output=True)
        assert {path.name.removeprefix(child._FOLDER) for path in scratch.iterdir()} == left
    os.close(held)
