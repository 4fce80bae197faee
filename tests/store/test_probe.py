"""What is tried in a place says how it behaves, whatever is wrong with it, and leaves nothing there."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import time
from pathlib import Path

import pytest
from store_kit import files, make

from nanogpt_buckets.errors import CacheError
from nanogpt_buckets.findings import Finding, Verdict
from nanogpt_buckets.mounts import Mount
from nanogpt_buckets.store import locks, probe
from nanogpt_buckets.store.directory import Directory
from nanogpt_buckets.store.objects import Objects
from nanogpt_buckets.store.probe import probe_directory, probe_objects
from nanogpt_buckets.store.store import Store

ALL = ["exclusive", "publishing", "clock", "locks", "new names"]


def facts(found) -> dict[str, Finding]:
    return {finding.name: finding for finding in found}


@pytest.fixture
def alone(monkeypatch):
    """Leave out the second process, for tests of what one does."""
    monkeypatch.setattr(probe, "_two_processes", lambda tier: ())


@pytest.fixture(params=["filled", "empty", "missing"])
def place(request, store) -> Path:
    if request.param == "filled":
        store.publish(*make("one"))
    elif request.param == "empty":
        store.root.mkdir()
    return store.root


def test_a_sound_place_is_said_to_be_so_and_nothing_is_left(place):
    before = sorted(place.parent.rglob("*")), files(Store(place))

    found = facts(probe_directory(place))

    assert list(found) == ALL
    assert {finding.verdict for finding in found.values()} == {Verdict.OK}
    assert found["publishing"].value == "staged, then linked to its name: hard links work"
    assert found["locks"].value == "one process of this machine keeps another out"
    assert found["clock"].value == "files bear this machine's time"
    assert (sorted(place.parent.rglob("*")), files(Store(place))) == before


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP])
def test_where_there_are_no_hard_links_files_are_renamed(store, entry, monkeypatch, alone, number):
    def refuse(*names: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)
    found = facts(probe_directory(store.root))

    assert found["publishing"].verdict is Verdict.OK
    assert found["publishing"].value.startswith("staged, then renamed, where two builders at once may replace")
    assert os.strerror(number) in found["publishing"].value


def broken_create(monkeypatch) -> None:
    real = os.open
    monkeypatch.setattr(os, "open", lambda path, flags, *rest, **more: real(path, flags & ~os.O_EXCL, *rest, **more))


def broken_link(monkeypatch) -> None:
    monkeypatch.setattr(os, "link", os.replace)


def broken_disk(monkeypatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.EIO, "I/O error")))


@pytest.mark.parametrize(
    ("spoil", "wrong"),
    [
        (broken_create, ["exclusive"]),
        (broken_link, ["publishing"]),
        (broken_disk, ["exclusive", "publishing", "clock"]),
    ],
)
def test_what_does_not_hold_there_is_a_problem_and_nothing_is_left(store, entry, monkeypatch, alone, spoil, wrong):
    before = files(store)
    with monkeypatch.context() as patch:
        spoil(patch)
        found = facts(probe_directory(store.root))

    assert [name for name, finding in found.items() if finding.verdict is Verdict.PROBLEM] == wrong
    assert all(found[name].hint for name in wrong)
    assert files(store) == before


@pytest.mark.parametrize(
    ("off_s", "verdict", "said"), [(-40, "ok", "ahead of"), (40, "ok", "behind"), (3600, "warning", "behind")]
)
def test_a_file_server_with_another_time_is_said(store, monkeypatch, alone, off_s, verdict, said):
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + off_s)

    found = facts(probe_directory(store.root))["clock"]

    assert found.verdict == verdict
    # what writing takes is no difference
    assert re.fullmatch(rf"files are written \d+ s {said} this machine's", found.value)
    assert abs(int(found.value.split()[3]) - abs(off_s)) <= 30
    assert bool(found.hint) == (verdict == "warning")


@pytest.mark.parametrize("how", ["not supported", "of no effect"])
def test_locks_that_keep_nobody_out_are_a_warning(store, monkeypatch, how):
    if how == "not supported":
        monkeypatch.setattr(locks, "_acquired", lambda *arguments: False)
    else:
        monkeypatch.setattr(Directory, "locked", lambda *arguments: contextlib.nullcontext(True))

    found = facts(probe_directory(store.root))["locks"]

    assert (found.verdict, found.value) == ("warning", "they do not keep another process out")
    assert "one of them" in found.hint


def test_a_name_that_others_do_not_see_is_said(store, monkeypatch):
    put = Directory.put
    monkeypatch.setattr(
        Directory, "put", lambda tier, name, *rest, **more: name == "plans/late" or put(tier, name, *rest)
    )

    assert facts(probe_directory(store.root))["new names"].value == "another process sees them not within 1 s"


def test_a_second_process_that_ends_early_is_no_failure_of_the_place(store, entry, monkeypatch):
    before = files(store)
    monkeypatch.setattr(probe, "__name__", "nanogpt_buckets.no_such_module")

    found = facts(probe_directory(store.root))["locks"]

    assert (found.verdict, found.value) == ("warning", "not tried: the child ended with status 1 and no result")
    assert files(store) == before


@pytest.mark.parametrize(
    ("mount", "seconds"),
    [
        (Mount("/", "ext4"), 0),
        (Mount("/", "nfs4", frozenset({"rw", "vers=4.2"})), 60),
        (Mount("/", "nfs", frozenset({"rw", "acdirmin=3", "acdirmax=5"})), 5),
        (Mount("/", "nfs4", frozenset({"rw", "noac"})), 0),
        (Mount("/", "nfs4", frozenset({"rw", "lookupcache=pos"})), 0),
        (Mount("/", "nfs4", frozenset({"acdirmax=soon"})), 60),
    ],
)
def test_how_long_another_machine_may_not_see_a_name_is_as_mounted(monkeypatch, tmp_path, mount, seconds):
    monkeypatch.setattr(probe, "mount_of", lambda path: mount)

    said = probe._new_names(tmp_path, 0.0).value

    assert mount.names_kept_s == seconds
    assert (f"another machine after up to {seconds} s" in said) == bool(seconds)


@pytest.mark.parametrize(("number", "verdict"), [(errno.EROFS, "ok"), (errno.EACCES, "ok"), (errno.ENOSPC, "problem")])
def test_a_place_that_cannot_be_written_is_not_tried(store, entry, monkeypatch, number, verdict):
    def refuse(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "mkdir", refuse)
    (found,) = probe_directory(store.root)

    assert (found.verdict, found.name) == (verdict, "publishing")
    assert found.value == f"not tried: {store.root}/v1/tmp cannot be written: {os.strerror(number)}"


@pytest.mark.parametrize("how", ["a link", "a file", "open to others below", "somebody else's above", "open above"])
def test_where_somebody_else_decides_nothing_is_written(store, tmp_path, how):
    root = store.root
    if how == "a link":
        root.mkdir()
        (root / "v1").symlink_to(tmp_path)
    elif how == "a file":
        root.touch()
    elif how == "open to others below":
        store.publish(*make("one"))
        (root / "v1/tmp").chmod(0o777)
    else:
        (tmp_path / "above").mkdir()
        root = tmp_path / "above" / "cache"
        os.chown(tmp_path / "above", 4321, 4321) if "else" in how else (tmp_path / "above").chmod(0o777)
    before = sorted(tmp_path.rglob("*"))

    (found,) = probe_directory(root)

    assert found.value.startswith("not tried: ")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_cache_that_a_team_shares_is_tried(store, entry):
    for path in (store.root, *store.root.rglob("*")):
        path.chmod(path.stat().st_mode | 0o070)

    assert list(facts(probe_directory(store.root))) == ALL


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_nothing_is_left_whatever_happens(store, entry, monkeypatch, error):
    before = files(store)

    def fail(tier: Directory) -> None:
        tier.put("plans/x", b"")
        raise error

    monkeypatch.setattr(probe, "_two_processes", fail)
    with pytest.raises(error):
        list(probe_directory(store.root))
    assert files(store) == before
    assert list((store.root / "v1/tmp").iterdir()) == []


def test_what_a_killed_one_left_is_swept_by_the_next_build(store, entry):
    left = store.root / "v1/tmp/0123"
    (left / "v1").mkdir(parents=True)
    (left / "v1/file").touch()
    os.utime(left, (0, 0))

    store.publish(*make("two", name="b"))

    assert not left.exists()


# --- the object store -------------------------------------------------------------------------------------------------


def test_an_object_store_is_asked_for_all_that_pushing_needs_and_nothing_is_left(s3, entry, store):
    tier = Objects(s3)
    for name in ("entries", "blobs", "tmp"):
        assert tier.names(name) == []
    found = facts(probe_objects(tier))

    assert {finding.verdict for finding in found.values()} == {Verdict.OK}
    assert list(found) == ["reached", "content", "writable", "publishing", "requests"]
    assert found["content"].value == "0 entries"
    assert found["publishing"].value == "on the condition that there is none: who is first stays"
    assert found["requests"].value.endswith(", of 5")
    assert tier.names("tmp") == []

    tier.put(f"entries/{entry.family}/{entry.key}.json", b"{}")
    found = facts(probe_objects(tier))
    assert (found["content"].value, found["readable"].value) == ("1 entries", "yes")


def test_a_bucket_that_is_not_there_is_a_problem_with_the_way_out(s3):
    (found,) = probe_objects(Objects("s3://nowhere-at-all/x"))

    assert (found.verdict, found.name) == (Verdict.PROBLEM, "reached")
    assert found.value == "s3://nowhere-at-all/x cannot be used: there is no such bucket"
    assert found.hint == "make it first, or give another URL"


def refused(*arguments: object, **more: object) -> None:
    raise CacheError("the credentials are refused", hint="others")


@pytest.mark.parametrize(
    ("verb", "name", "verdict"),
    [
        ("names", "reached", "problem"),
        ("put", "writable", "warning"),
        ("get", "publishing", "problem"),
        ("delete", "leftover", "warning"),
    ],
)
def test_what_the_service_refuses_is_said(s3, monkeypatch, verb, name, verdict):
    with monkeypatch.context() as patch:
        patch.setattr(Objects, verb, refused)
        found = facts(probe_objects(Objects(s3)))[name]

    assert found.verdict == verdict
    assert "the credentials are refused" in found.value
    assert found.hint
    assert bool(Objects(s3).names("tmp")) == (verb == "delete")


def test_a_service_without_conditional_writes_is_a_problem(s3, monkeypatch):
    put = Objects.put
    monkeypatch.setattr(Objects, "put", lambda tier, name, data: put(tier, name, data, replace=True))

    found = facts(probe_objects(Objects(s3)))["publishing"]

    assert (found.verdict, found.value) == ("problem", "what is published is replaced by who comes later")
