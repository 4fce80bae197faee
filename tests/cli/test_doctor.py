"""`doctor` on healthy machines and on ones made ill: what is wrong is named, with the way out, by exit code too."""

from __future__ import annotations

import json
import shutil
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import pytest

from nanogpt_buckets import __version__, doctor, node, settings
from nanogpt_buckets.backends import host
from nanogpt_buckets.backends.inductor.backend import InductorBackend
from nanogpt_buckets.cli import main
from nanogpt_buckets.findings import Finding
from nanogpt_buckets.model.checkpoint import open_model
from nanogpt_buckets.mounts import Mount
from nanogpt_buckets.store import objects
from nanogpt_buckets.store.store import Store
from nanogpt_buckets.store.transfer import move_to_archive


@pytest.fixture
def run(capsys):
    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main(["doctor", *arguments])
        return (end.value.code, *capsys.readouterr())

    return run


@pytest.fixture
def facts(run):
    """Return a function that runs doctor and returns its exit code and findings by "topic name"."""

    def facts(*arguments: str) -> tuple[int, dict[str, dict]]:
        code, out, _ = run(*arguments, "--json")
        return code, {f"{row['topic']} {row['name']}": row for row in json.loads(out)["findings"]}

    return facts


_tried: list[Finding] = []


@pytest.fixture(autouse=True)
def tried_once(monkeypatch):
    """Torch is tried in a child once for all tests here, which takes seconds; one that spoils it forgets `_tried`."""
    try_it = InductorBackend.findings

    def findings(backend: InductorBackend) -> Iterator[Finding]:
        _tried[:] = _tried or try_it(backend)
        yield from _tried

    monkeypatch.setattr(InductorBackend, "findings", findings)


@pytest.fixture
def cache(demo_cache, tmp_path) -> Path:
    """A copy of the demo's cache, to be written to."""
    return shutil.copytree(demo_cache, tmp_path / "place" / "copy")


@contextmanager
def no_compiler(monkeypatch) -> Iterator[None]:
    monkeypatch.setenv("CXX", "no-such-compiler")
    yield


def test_a_healthy_machine_has_no_problem_and_every_fact(facts, demo_cache, monkeypatch):
    monkeypatch.setenv("NANOGPT_BUCKETS_CACHE_DIR", str(demo_cache))
    code, found = facts()

    assert code == 0
    assert found["versions nanogpt-buckets"]["value"] == __version__
    assert found["versions torch"]["value"] == metadata.version("torch")
    assert "inductor" in found["backend chosen"]["value"]
    assert "g++" in found["backend compiler"]["value"]
    assert found["backend loader"]["value"].startswith("torch can be imported")
    assert found["neuron device"]["value"] == "none"
    assert found["neuron packages"]["hint"].startswith("pip install")
    assert found["neuron proof"]["value"].startswith("N1")
    assert found["cache directory"]["value"] == str(demo_cache)
    assert found["cache content"]["value"].startswith("2 entries, ")
    assert found["cache owner"]["value"].endswith("mode 0700")
    assert found["cache file system"]["value"].split()[0] != "unknown"
    assert found["node directory"]["value"].startswith(str(node.directory()))
    assert found["environment NANOGPT_BUCKETS_CACHE_DIR"]["value"] == str(settings.cache_dir())


def test_a_containers_quota_that_openmp_does_not_see_is_a_warning_with_the_number_to_set(facts, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(host, "visible_cpu_count", lambda: 64)
    monkeypatch.setattr(host, "cpu_count", lambda: 3)

    found = facts()[1]["machine processors"]
    assert found["verdict"] == "warning"
    assert found["hint"].startswith("OMP_NUM_THREADS=3:")

    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert facts()[1]["machine processors"]["verdict"] == "ok"


@pytest.mark.parametrize(("load", "verdict"), [(0.3, "ok"), (7.9, "warning")])
def test_a_machine_that_others_use_is_said_to_be_slow(facts, monkeypatch, load, verdict):
    monkeypatch.setattr(doctor.os, "getloadavg", lambda: (load, 0, 0))
    monkeypatch.setattr(host, "cpu_count", lambda: 2)

    found = facts()[1]["machine load"]
    assert (found["verdict"], "OMP_" in found["hint"]) == (verdict, verdict == "warning")


def test_people_get_a_table_and_the_counts(run):
    code, out, err = run()

    assert code == 0
    assert out.splitlines()[0].split() == ["TOPIC", "WHAT", "STATE", "FOUND"]
    assert err.splitlines()[-1].startswith("0 problems, ")


def all_times(cache: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in cache.rglob("*")}


def test_it_changes_nothing(run, demo_cache, monkeypatch):
    for place in (demo_cache, demo_cache.parent / "not-there"):
        monkeypatch.setenv("NANOGPT_BUCKETS_CACHE_DIR", str(place))
        before = all_times(demo_cache)

        run()

        assert all_times(demo_cache) == before
        assert not (demo_cache.parent / "not-there").exists()


def test_a_place_that_is_named_is_tried_and_left_as_it_was(facts, cache):
    before = all_times(cache)

    code, found = facts(str(cache))
    missing = facts(str(cache.parent / "not-there"))[1]

    assert code == 0
    assert found["cache publishing"]["value"].startswith("staged, then linked")
    assert missing["cache publishing"] == found["cache publishing"]
    assert found["cache locks"]["verdict"] == "ok"
    staging = cache / "v1" / "tmp"
    assert all_times(cache) == before | {staging: staging.stat().st_mtime_ns}
    assert not (cache.parent / "not-there").exists()
    assert not [path for path in cache.parent.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("place", ["ftp://x/y", "s3://", "missing.tar", "text.tar"])
def test_a_place_that_cannot_be_used_is_a_problem_with_the_way_out(facts, tmp_path, place):
    (tmp_path / "text.tar").write_text("no tar" * 200)

    code, found = facts(place if "://" in place else str(tmp_path / place))

    assert (code, found["cache place"]["verdict"]) == (1, "problem")
    assert found["cache place"]["hint"]


def test_an_object_store_that_does_not_answer_is_a_problem(facts, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "y")
    monkeypatch.setitem(objects._RETRIES, "max_retries", 0)

    code, found = facts("s3://bucket/x")

    assert (code, found["cache reached"]["verdict"]) == (1, "problem")
    assert found["cache reached"]["value"].startswith("s3://bucket/x cannot be used this time")


@pytest.mark.parametrize("how", ["sound", "cut", "open"])
def test_a_tar_file_is_said_to_hold_its_entries(facts, cache, tmp_path, how):
    path = tmp_path / "buckets.tar"
    store = Store(cache)
    entries = list(store.entries())
    move_to_archive(store, entries, path, lambda manifest: None)
    if how == "cut":
        with tarfile.open(path) as tar:
            blob = next(member for member in tar if "blobs" in member.name)
        # a tar file without its first blob, which others wrote once more
        data = path.read_bytes()
        end = blob.offset_data + -(-blob.size // 512) * 512
        path.write_bytes(data[: blob.offset] + data[end:])
    elif how == "open":
        path.chmod(0o666)

    code, found = facts(str(path))

    assert code == int(how == "cut")
    assert found["cache content"]["value"].startswith("2 entries, ")
    assert found["cache content"]["value"].endswith(", 1 damaged") == (how == "cut")
    assert found["cache trust"]["verdict"] == ("warning" if how == "open" else "ok")
    assert ("--locked FILE" in found["cache trust"]["hint"]) == (how == "open")


def test_a_cache_that_a_team_shares_is_named_with_the_way_to_share_it(facts, cache):
    for path in (cache, *cache.rglob("*")):
        path.chmod(path.stat().st_mode | 0o070)

    code, found = facts(str(cache))

    assert (code, found["cache trust"]["verdict"]) == (1, "problem")
    assert found["cache trust"]["hint"].startswith("share it with a lock file (build --lock FILE, then --locked FILE)")
    assert found["cache content"]["value"].startswith("2 entries, ")
    assert found["cache publishing"]["verdict"] == "ok"


def test_a_cache_others_can_write_is_a_problem_with_the_command_that_mends_it(run, facts, tmp_path):
    cache = tmp_path / "open"
    cache.mkdir()
    cache.chmod(0o777)

    code, found = facts(str(cache))
    err = run(str(cache))[2]

    assert (code, found["cache trust"]["verdict"]) == (1, "problem")
    assert f"delete it and build again: rm -r {cache}" in err
    assert "1 problem, " in err


def test_damaged_entries_are_a_problem(facts, demo_cache, tmp_path):
    shutil.copytree(demo_cache, tmp_path / "copy")
    next((tmp_path / "copy" / "v1" / "entries").glob("*/*.json")).write_bytes(b"{}")

    code, found = facts(str(tmp_path / "copy"))

    assert (code, found["cache content"]["verdict"]) == (1, "problem")
    assert "1 damaged" in found["cache content"]["value"]
    assert "cache verify" in found["cache content"]["hint"]


def test_no_compiler_is_a_warning_because_hits_still_work(facts, monkeypatch):
    with no_compiler(monkeypatch):
        code, found = facts()

    assert (code, found["backend compiler"]["verdict"]) == (0, "warning")


@pytest.mark.parametrize(
    ("kind", "options", "name", "verdict"),
    [
        ("tmpfs", {"ro", "noexec"}, "cache writable", "warning"),
        ("tmpfs", {"rw", "noexec"}, "cache writable", "ok"),
        ("nfs4", {"rw"}, "node place", "warning"),
    ],
)
def test_mounts_that_limit_are_said(facts, monkeypatch, kind, options, name, verdict):
    monkeypatch.setattr(doctor, "mount_of", lambda path: Mount("/somewhere", kind, frozenset(options)))

    code, found = facts()

    # a cache that cannot be written can be used; the local directory is on the same mount, and is needed
    assert (code, found[name]["verdict"]) == (int("ro" in options), verdict)
    assert found["node writable"]["verdict"] == ("problem" if "ro" in options else "ok")
    assert found["cache file system"]["value"] == f"{kind} on /somewhere ({', '.join(sorted(options))})"


def test_a_file_in_the_directorys_place_is_said(facts, tmp_path):
    (tmp_path / "file").write_text("")

    code, found = facts(str(tmp_path / "file"))

    assert (code, found["cache writable"]["verdict"]) == (1, "problem")
    assert "is a file" in found["cache writable"]["value"]


def test_little_room_is_a_warning(facts, monkeypatch):
    monkeypatch.setattr(doctor, "_LOW_BYTES", 10**18)

    _, found = facts()

    assert found["cache room"]["verdict"] == "warning"
    assert "prune" in found["cache room"]["hint"]


def test_a_missing_library_is_a_problem(facts, monkeypatch):
    monkeypatch.setattr(doctor, "_LIBRARIES", ("torch", "no-such-library"))

    code, found = facts()

    assert (code, found["versions no-such-library"]["verdict"]) == (1, "problem")


def test_a_torch_that_cannot_be_imported_is_a_problem(facts, monkeypatch, tmp_path):
    monkeypatch.setattr(sys.modules[__name__], "_tried", [])
    (tmp_path / "torch.py").write_text("raise ImportError('libgomp.so.1: cannot open shared object file')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    code, found = facts()

    assert (code, found["backend loader"]["verdict"]) == (1, "problem")
    assert "libgomp.so.1" in found["backend loader"]["value"]


def test_a_private_directory_that_is_not_private_is_a_problem(facts, monkeypatch, tmp_path):
    monkeypatch.delenv("NANOGPT_BUCKETS_LOCAL_DIR")
    monkeypatch.setattr(node, "mount_of", lambda path: Mount("/", "nfs4", frozenset()))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    node.folder(make=True).chmod(0o777)

    code, found = facts()

    assert (code, found["node trust"]["verdict"]) == (1, "problem")
    assert "can be written by everyone" in found["node trust"]["value"]


def test_prepared_weights_are_counted_and_what_is_of_no_use(facts):
    path = open_model("demo").weights("float32").path
    shutil.copy(path, path.with_stem("0" * 64))
    size = 2 * path.stat().st_size

    assert size > 3_000_000
    assert facts()[1]["node content"]["value"] == f"2 prepared models, {size / 1e6:.1f} MB"
    assert facts()[1]["node leftovers"]["value"] == f"1 of no use, {size / 2e6:.1f} MB"
