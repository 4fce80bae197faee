"""The store in a directory, damaged, raced, interrupted and shared in the ways that shared caches are."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import subprocess
import time
from dataclasses import replace

import filelock
import pytest
from store_kit import (
    as_nobody,
    blob_path,
    files,
    finish,
    healed,
    look,
    make,
    manifest_path,
    raise_,
    save,
    spoil,
    start,
    word,
)

from nanogpt_buckets import key as keys
from nanogpt_buckets.errors import (
    CacheError,
    CacheMiss,
    CorruptEntry,
    IncompatibleEntry,
    TransientError,
    UntrustedStore,
)
from nanogpt_buckets.store.entry import Miss, Status
from nanogpt_buckets.store.manifest import Blob, encode
from nanogpt_buckets.store.plans import Plans
from nanogpt_buckets.store.store import Store
from nanogpt_buckets.store.verify import Problem, verify

# the ordinary life of an entry


def test_publish_then_look(store):
    manifest, blobs = make("one")
    assert look(store, manifest).status is Status.ABSENT
    assert list(store.entries()) == []
    assert store.family(manifest.family) == []
    assert not store.root.exists()
    assert store.publish(manifest, blobs) == manifest
    assert look(store, manifest).manifest == manifest
    assert {blob.role: store.read_blob(blob) for blob in manifest.blobs} == blobs
    assert look(store, manifest).manifest == manifest


def test_layout(store, entry):
    assert set(files(store)) == {
        "CACHEDIR.TAG",
        f"v1/entries/{entry.family}/{entry.key}.json",
        *(f"v1/blobs/{blob.sha256[:2]}/{blob.sha256}" for blob in entry.blobs),
    }
    assert (store.root / "CACHEDIR.TAG").read_bytes().startswith(b"Signature: 8a477f597d28d172789f06886806bc55\n")
    assert os.listdir(store.root / "v1/tmp") == []


def test_the_first_publication_is_adopted(store, entry):
    manifest, blobs = make("two")
    before = files(store)
    assert store.publish(manifest, blobs) == entry
    assert files(store) == before


def test_families_are_listed_in_order_and_strangers_are_skipped(store):
    made = [make("x", name=str(number), family=f"f{number % 2}") for number in range(6)]
    for manifest, blobs in made:
        store.publish(manifest, blobs)
    family = made[0][0].family
    for name in (".nfs0001", "readme.json", "0" * 64, "A" * 64 + ".json"):
        (store.root / "v1/entries" / family / name).write_text("x")
    (store.root / "v1/entries/junk").mkdir()
    expected = sorted(manifest.key for manifest, _ in made if manifest.family == family)
    assert [answer.key for answer in store.family(family)] == expected
    assert sorted(answer.key for answer in store.entries()) == sorted(manifest.key for manifest, _ in made)


def test_blobs_are_shared_between_entries(store, entry):
    manifest, blobs = make("one", name="other")
    path = blob_path(store, entry.blobs[0])
    inode = path.stat().st_ino
    store.publish(manifest, blobs)
    assert path.stat().st_ino == inode


def test_other_parts_under_the_same_key_are_corrupt_and_said_in_words(store, entry):
    wanted = entry.parts | {"bucket": {"name": "b"}}
    answer = store.look(entry.family, entry.key, wanted)
    assert answer.status is Status.CORRUPT
    assert answer.why == "bucket.name: a, not b"


@pytest.mark.parametrize("name", ["../x", "a" * 63, "A" * 64, "", "a" * 64 + "\n"])
def test_only_digests_become_paths(store, name):
    good = "a" * 64
    for call in (
        lambda: store.look(good, name),
        lambda: store.look(name, good),
        lambda: store.family(name),
        lambda: store.read_blob(Blob("x", name, 1)),
    ):
        with pytest.raises(ValueError, match="64 lowercase hex"):
            call()


def test_publish_refuses_blobs_that_are_not_the_manifests(store):
    manifest, blobs = make("one")
    for wrong in ({}, blobs | {"extra": b""}, blobs | {"code.so": b"other"}, {"code.so": blobs["code.so"]}):
        with pytest.raises(ValueError, match="manifest names"):
            store.publish(manifest, wrong)
    with pytest.raises(ValueError, match="read back"):
        store.publish(replace(manifest, key="0" * 64), blobs)
    assert not store.root.exists()


# damage


def test_every_flipped_manifest_byte_is_corrupt_and_healed(store, entry):
    path = manifest_path(store, entry)
    data = path.read_bytes()
    for position in range(len(data)):
        flipped = bytearray(data)
        flipped[position] ^= 1
        path.write_bytes(flipped)
        assert store.look(entry.family, entry.key).status is Status.CORRUPT
    healed(store, *make("two"))
    assert store.look(entry.family, entry.key) == make("two")[0]


def test_every_truncated_manifest_is_corrupt(store, entry):
    path = manifest_path(store, entry)
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        assert store.look(entry.family, entry.key).status is Status.CORRUPT
    healed(store, *make("one"))


@pytest.mark.parametrize("name", ["flipped", "truncated", "empty", "longer", "swapped", "missing", "link", "fifo"])
def test_damaged_blobs_are_corrupt_and_replaced(store, entry, name, tmp_path):
    path = blob_path(store, entry.blobs[0])
    good = path.read_bytes()
    inode = path.stat().st_ino
    if name in ("missing", "link", "fifo"):
        path.unlink()
    if name == "link":
        (tmp_path / "elsewhere").write_bytes(good)
        path.symlink_to(tmp_path / "elsewhere")
    elif name == "fifo":
        os.mkfifo(path)
    elif name != "missing":
        other = make("one")[1]["data.bin"]
        bad = {"flipped": b"\0" + good[1:], "truncated": good[:-1], "empty": b"", "longer": good + b"x"}
        spoil(path, bad.get(name, other))
    assert word(store.look(entry.family, entry.key)) == "listed"
    answer = look(store, entry)
    assert answer.status is Status.CORRUPT
    with pytest.raises(CorruptEntry):
        store.read_blob(entry.blobs[0])
    with pytest.raises(CorruptEntry):
        raise_(store, answer)
    assert verify(store).problems
    healed(store, *make("one"))
    assert path.is_file()
    assert not path.is_symlink()
    assert path.stat().st_ino != inode or name in ("missing", "link", "fifo")


def test_bytes_are_never_changed_in_place(store, entry):
    path = blob_path(store, entry.blobs[0])
    spoil(path, b"damaged")
    with path.open("rb") as reader:
        healed(store, *make("one"))
        assert reader.read() == b"damaged"


@pytest.mark.parametrize("where", ["key", "family"])
def test_a_valid_manifest_under_another_name_is_corrupt(store, entry, where):
    other = make("x", name="b")[0] if where == "key" else make("x", family="g")[0]
    path = manifest_path(store, other)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(manifest_path(store, entry).read_bytes())
    assert store.look(other.family, other.key).status is Status.CORRUPT
    assert word(store.look(entry.family, entry.key)) == "listed"
    assert [problem.what for problem in verify(store).problems] == ["the manifest belongs under another name"]


@pytest.mark.parametrize("kind", ["link", "directory", "fifo", "huge"])
def test_a_manifest_that_is_not_a_small_file_is_corrupt(store, entry, kind, tmp_path):
    path = manifest_path(store, entry)
    kept = path.rename(tmp_path / "kept")
    {
        "link": lambda: path.symlink_to(kept),
        "directory": path.mkdir,
        "fifo": lambda: os.mkfifo(path),
        "huge": lambda: path.write_bytes(b" " * 300_000),
    }[kind]()
    assert store.look(entry.family, entry.key).status is Status.CORRUPT
    if kind == "directory":
        with pytest.raises(CacheError):
            store.publish(*make("one"))
    else:
        healed(store, *make("one"))
    assert kept.exists()


def test_a_newer_manifest_is_left_alone(store, entry):
    path = manifest_path(store, entry)
    body = {"format": 2, "anything": []}
    digest = hashlib.sha256(keys.canonical_json(body)).hexdigest()
    path.write_bytes(keys.canonical_json({"sha256": digest, "body": body}) + b"\n")
    before = files(store)
    answer = store.look(entry.family, entry.key)
    assert answer.status is Status.INCOMPATIBLE
    assert answer.hint
    with pytest.raises(IncompatibleEntry):
        store.publish(*make("two"))
    assert files(store) == before
    assert verify(store).problems == ()


@pytest.mark.parametrize("status", Status)
def test_an_error_names_each_status(store, entry, status):
    said = str(store.error(Miss(status, entry.family, entry.key, "why it is so", "what to do")))
    assert said.startswith("why" if status in (Status.UNTRUSTED, Status.TRANSIENT) else f"entry {entry.key[:12]} in ")
    assert "why it is so" in said
    with pytest.raises(CacheMiss, match="is missing: it is missing"):
        raise_(store, store.look(entry.family, "0" * 64))


# errors of the machine


class Fault:
    """Makes one os function fail, for paths that hold `part`, the first `times` calls."""

    def __init__(self, monkeypatch, name: str, code: int, part: str = "", times: int = 10**9) -> None:
        self.real, self.code, self.part, self.left = getattr(os, name), code, part, times
        self.calls = 0
        monkeypatch.setattr(os, name, self)

    def __call__(self, *arguments, **options):
        if self.left and self.part in str(arguments[0]):
            self.left -= 1
            self.calls += 1
            raise OSError(self.code, os.strerror(self.code))
        return self.real(*arguments, **options)


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EACCES, errno.ETIMEDOUT, errno.EMFILE])
@pytest.mark.parametrize("function", ["open", "read"])
def test_a_read_error_is_transient_and_changes_nothing(store, entry, monkeypatch, code, function):
    before = files(store)
    with monkeypatch.context() as patch:
        Fault(patch, function, code)
        assert store.look(entry.family, entry.key).status is Status.TRANSIENT
        assert [answer.status for answer in store.entries()] == [Status.TRANSIENT]
        with pytest.raises(TransientError):
            store.read_blob(entry.blobs[0])
        with pytest.raises(TransientError) as caught:
            store.publish(*make("two"))
        assert os.strerror(code) in caught.value.message
        with pytest.raises(TransientError):
            raise_(store, store.look(entry.family, entry.key))
    assert files(store) == before
    assert word(look(store, entry)) == "verified"


def test_a_descriptor_that_cannot_be_closed_is_no_reason_not_to_list(store, entry, monkeypatch):
    store.publish(*make("two", name="b"))
    real, whole = os.close, store.family(entry.family)

    def close(descriptor):
        failing = os.readlink(f"/proc/self/fd/{descriptor}").endswith(entry.family)
        real(descriptor)
        if failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "close", close)
    assert store.family(entry.family) == whole


def test_a_blob_read_error_is_transient(store, entry, monkeypatch):
    answer = store.look(entry.family, entry.key)
    Fault(monkeypatch, "open", errno.EIO, "blobs")
    assert store.check(answer).status is Status.TRANSIENT


@pytest.mark.parametrize("function", ["open", "read"])
def test_a_stale_handle_is_reopened_at_once_and_after_a_pause(store, entry, monkeypatch, function):
    monkeypatch.setattr("nanogpt_buckets.files.STALE_PAUSES_S", (0.0, 0.01))
    fault = Fault(monkeypatch, function, errno.ESTALE, times=2)
    assert word(store.look(entry.family, entry.key)) == "listed"
    assert fault.calls == 2
    fault.left = 3
    assert store.look(entry.family, entry.key).status is Status.TRANSIENT


def test_a_directory_that_cannot_be_listed_is_transient(store, entry, monkeypatch):
    Fault(monkeypatch, "listdir", errno.EIO)
    for call in (
        lambda: store.family(entry.family),
        lambda: list(store.entries()),
        Plans(store).names,
        lambda: verify(store),
    ):
        with pytest.raises(TransientError):
            call()


def test_a_file_in_place_of_the_root_is_said_to_be_one(tmp_path):
    (tmp_path / "cache").write_text("x")
    store = Store(tmp_path / "cache")
    manifest, blobs = make("one")
    assert look(store, manifest).status is Status.TRANSIENT
    assert look(store, manifest).why.endswith("is not a directory")
    with pytest.raises(CacheError) as caught:
        store.publish(manifest, blobs)
    assert str(store.root) in caught.value.message
    assert "--cache-dir" in caught.value.hint


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("function", ["write", "fsync"])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(store, monkeypatch, code, function):
    manifest, blobs = make("one")
    with monkeypatch.context() as patch:
        Fault(patch, function, code)
        with pytest.raises(TransientError) as caught:
            store.publish(manifest, blobs)
    assert str(store.root) in caught.value.message
    assert os.strerror(code) in caught.value.message
    assert "NANOGPT_BUCKETS_CACHE_DIR" in caught.value.hint
    assert files(store) == {}
    assert look(store, manifest).status is Status.ABSENT
    healed(store, manifest, blobs)


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_read_only_file_system_is_not_transient(store, monkeypatch, code):
    store.root.mkdir(0o700)
    Fault(monkeypatch, "mkdir", code)
    with pytest.raises(CacheError) as caught:
        store.publish(*make("one"))
    assert type(caught.value) is CacheError


@pytest.mark.parametrize("code", [errno.EBUSY, errno.EPERM])
def test_cleaning_up_never_fails(store, monkeypatch, code):
    with monkeypatch.context() as patch:
        Fault(patch, "unlink", code)
        store.publish(*make("one"))
    assert os.listdir(store.root / "v1/tmp")
    assert verify(store).problems == ()
    healed(store, *make("one"))


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK])
def test_without_hard_links(store, monkeypatch, code):
    Fault(monkeypatch, "link", code)
    manifest, blobs = make("one")
    healed(store, manifest, blobs)
    assert store.publish(*make("two")) == manifest
    spoil(manifest_path(store, manifest), b"")
    healed(store, *make("two"))
    assert os.listdir(store.root / "v1/tmp") == []


@pytest.mark.parametrize("links", [True, False])
def test_the_loser_of_a_race_adopts(store, monkeypatch, links):
    """Another process publishes between our look and our link."""
    winner, winner_blobs = make("winner")
    loser, loser_blobs = make("loser")
    if not links:
        Fault(monkeypatch, "link", errno.EPERM)
    real = Store._put_blob

    def late(self, blob, data):
        monkeypatch.setattr(Store, "_put_blob", real)
        Store(store.root).publish(winner, winner_blobs)
        real(self, blob, data)

    monkeypatch.setattr(Store, "_put_blob", late)
    assert store.publish(loser, loser_blobs) == winner
    assert look(store, loser).manifest == winner


def test_the_loser_replaces_a_winner_that_is_damaged(store, monkeypatch):
    winner, winner_blobs = make("winner")
    real = Store._put_blob

    def late(self, blob, data):
        monkeypatch.setattr(Store, "_put_blob", real)
        Store(store.root).publish(winner, winner_blobs)
        blob_path(store, winner.blobs[0]).unlink()
        real(self, blob, data)

    monkeypatch.setattr(Store, "_put_blob", late)
    loser, loser_blobs = make("loser")
    assert store.publish(loser, loser_blobs) == loser
    assert look(store, loser).manifest == loser


def test_of_two_who_replace_a_damaged_entry_the_last_is_whole(store, entry, monkeypatch):
    """One has mended a library that the other found damaged, and comes last."""
    spoil(blob_path(store, entry.blobs[0]), b"damaged")
    last, other = Store(store.root), Store(store.root)
    really, late = other.directory.put, []

    def postponed(name, data, **how):
        return late.append((name, data)) if name.startswith("entries/") else really(name, data, **how)

    def meanwhile(name, data, **how):
        if name.startswith("entries/"):
            last.publish(*make("one"))
        return really(name, data, **how)

    with monkeypatch.context() as patch:
        patch.setattr(last.directory, "put", postponed)
        patch.setattr(other.directory, "put", meanwhile)
        other.publish(*make("two"))
    for name, data in late:
        really(name, data, replace=True)

    assert look(store, entry).manifest == entry


def test_old_staged_files_are_swept_and_young_ones_are_not(store, entry):
    tmp = store.root / "v1/tmp"
    for name, hours in (("old", 25), ("young", 23), ("future", -48)):
        (tmp / name).write_text("x")
        os.utime(tmp / name, (time.time() - hours * 3600,) * 2)
    assert verify(store).problems == ()
    store.publish(*make("x", name="b"))
    assert sorted(os.listdir(tmp)) == ["future", "young"]


# locks


def test_compiling_excludes_another_process(store, entry):
    code = """
import sys
from pathlib import Path
from nanogpt_buckets.store.store import Store
with Store(Path(sys.argv[1])).directory.locked(sys.argv[2], 0) as held:
    print(held)
"""
    with store.directory.locked(entry.key, 1) as held:
        assert held
        assert finish(start(code, store.root, entry.key)) == "False\n"
    assert finish(start(code, store.root, entry.key)) == "True\n"


def test_waiting_is_bounded(store, entry):
    with store.directory.locked(entry.key, 0):
        for timeout in (-1, 0, 0.2):
            began = time.monotonic()
            with Store(store.root).directory.locked(entry.key, timeout) as held:
                assert not held
            assert time.monotonic() - began < 2


@pytest.mark.parametrize(
    "error", [filelock.Timeout("x"), OSError(errno.ENOLCK, "x"), NotImplementedError("x"), PermissionError("x")]
)
def test_a_lock_that_fails_is_gone_without(store, monkeypatch, error):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(filelock.FileLock, "acquire", fail)
    with store.directory.locked("0" * 64, 5) as held:
        assert not held


def test_what_is_raised_inside_a_lock_gets_out_and_releases_it(store):
    for error in (ZeroDivisionError(), OSError("x"), CacheError("x")):
        with pytest.raises(type(error)), store.directory.locked("0" * 64, 0):
            raise error
    with store.directory.locked("0" * 64, 0) as held:
        assert held


def test_lock_files_of_others_stay(store, entry):
    other = store.root / "v1/locks" / f"{'1' * 64}.lock"
    other.write_text("theirs")
    with store.directory.locked(entry.key, 0):
        pass
    assert other.read_text() == "theirs"


# whose files, and who may read them


@pytest.mark.parametrize("umask", [0o077, 0o022, 0o002, 0o000])
@pytest.mark.parametrize("mode", [None, 0o700, 0o755, 0o2750])
def test_modes_follow_the_root_and_not_the_umask(tmp_path, umask, mode):
    store = Store(tmp_path / "grandparent" / "parent" / "cache")
    if mode is not None:
        store.root.mkdir(parents=True)
        store.root.chmod(mode)
    old = os.umask(umask)
    try:
        manifest, blobs = make("one")
        store.publish(manifest, blobs)
        save(store)
    finally:
        os.umask(old)
    root_mode = mode or 0o700
    for path in (store.root, *store.root.rglob("*")):
        wanted = root_mode if path.is_dir() else root_mode & (0o444 if "blobs" in path.parts else 0o666)
        assert oct(stat.S_IMODE(path.stat().st_mode)) == oct(wanted), path
    if mode is None:
        modes = {oct(stat.S_IMODE(place.stat().st_mode)) for place in list(store.root.parents)[:2]}
        assert modes == {oct(0o755 & ~umask)}, "nobody else may replace what is below"


REPORT = """
store = Store(Path(sys.argv[1]))
manifest, blobs = make(sys.argv[2], name=sys.argv[3])
answer = store.check(store.look(manifest.family, manifest.key))
try:
    store.publish(manifest, blobs)
    said = "published"
except CacheError as error:
    said = f"{type(error).__name__}|{error}|{error.hint}"
with store.directory.locked(manifest.key, 0) as held:
    pass
print(f"{getattr(answer, 'status', 'verified')}|{said}|{held}")
"""


def test_another_users_read_only_store_is_read_and_not_written(open_path):
    root = open_path / "cache"
    root.mkdir()
    root.chmod(0o755)
    manifest, blobs = make("one")
    Store(root).publish(manifest, blobs)
    before = files(Store(root))
    assert as_nobody(REPORT, root, "one", "a") == "verified|published|False\n"
    said = as_nobody(REPORT, root, "one", "b")
    assert said.startswith(f"missing|CacheError|{root} cannot be written: Permission denied|choose another directory")
    assert files(Store(root)) == before


def test_a_private_store_of_another_user_is_transient(open_path):
    root = open_path / "cache"
    Store(root).publish(*make("one"))
    said = as_nobody(REPORT, root, "one", "a")
    assert said.startswith(f"transient|TransientError|{root}/v1 cannot be examined: Permission denied|")


def test_a_store_of_a_foreign_owner_is_untrusted(open_path):
    root = open_path / "cache"
    root.mkdir()
    os.chown(root, 4321, 4321)
    said = as_nobody(REPORT, root, "one", "a")
    assert said.startswith(f"untrusted|UntrustedStore|{root} belongs to user 4321,")
    assert "--cache-dir" in said
    assert said.endswith("|False\n")
    manifest, blobs = make("one")
    assert Store(root).look(manifest.family, manifest.key).status is Status.UNTRUSTED
    with pytest.raises(UntrustedStore):
        Store(root).publish(manifest, blobs)


@pytest.mark.parametrize("where", ["", "v1", "v1/entries", "v1/blobs"])
@pytest.mark.parametrize("bit", [stat.S_IWGRP, stat.S_IWOTH])
def test_what_others_can_write_is_untrusted_until_the_hint_is_followed(store, entry, where, bit):
    directory = store.root / where
    directory.chmod(0o700 | bit)
    answer = store.look(entry.family, entry.key)
    assert answer.status is Status.UNTRUSTED
    assert str(directory) in answer.why
    for call in (
        lambda: store.read_blob(entry.blobs[0]),
        lambda: store.publish(*make("two")),
        lambda: save(store),
        lambda: Plans(store).load("p"),
        lambda: raise_(store, answer),
        lambda: verify(store),
    ):
        with pytest.raises(UntrustedStore) as caught:
            call()
        assert caught.value.hint.endswith(f"delete it and build again: rm -r {store.root}")
        assert ("--locked FILE" in caught.value.hint) == (where == ""), "what others write as a whole may be shared"
    subprocess.run(caught.value.hint.partition(": ")[2], shell=True, check=True)
    healed(store, *make("one"))


@pytest.mark.parametrize("where", ["entries", "blobs"])
def test_a_directory_of_entries_or_blobs_that_others_can_write_is_untrusted(store, entry, where):
    path = manifest_path(store, entry) if where == "entries" else blob_path(store, entry.blobs[0])
    path.parent.chmod(0o770)
    assert look(store, entry).status is Status.UNTRUSTED


def test_blobs_cannot_be_written_through_their_name(open_path):
    root = open_path / "cache"
    root.mkdir()
    os.chown(root, 65534, 65534)
    code = """
store = Store(Path(sys.argv[1]))
manifest, blobs = make("one")
store.publish(manifest, blobs)
blob = manifest.blobs[0]
try:
    open(store.root / "v1/blobs" / blob.sha256[:2] / blob.sha256, "r+b")
except PermissionError:
    print("refused")
"""
    assert as_nobody(code, root) == "refused\n"


# verify


def test_verify_counts_and_finds_nothing_in_a_sound_store(store, entry):
    store.publish(*make("one", name="b"))
    extra = b"unreferenced"
    name = hashlib.sha256(extra).hexdigest()
    path = blob_path(store, Blob("x", name, 0))
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(extra)
    read: list[int] = []
    result = verify(store, read.append)
    total = sum(blob.size for blob in entry.blobs) + len(extra)
    assert (result.entries, result.blobs, result.bytes, result.problems) == (2, 3, total, ())
    assert sorted(read) == sorted([len(extra), *(blob.size for blob in entry.blobs)])


def test_verify_works_both_ways(store, entry):
    second, blobs = make("two", name="b")
    store.publish(second, blobs)
    blob_path(store, entry.blobs[0]).unlink()
    spoil(blob_path(store, second.blobs[1]), b"other")
    third = make("three", name="c")[0]
    manifest_path(store, third).write_bytes(encode(third)[:-5])
    problems = verify(store).problems
    name = entry.blobs[0].sha256[:12]
    relative = manifest_path(store, entry).relative_to(store.root).as_posix()
    assert Problem(relative, f"code.so ({name}) is missing or damaged") in problems
    assert {problem.path for problem in problems} == {
        relative,
        manifest_path(store, second).relative_to(store.root).as_posix(),
        blob_path(store, second.blobs[1]).relative_to(store.root).as_posix(),
        manifest_path(store, third).relative_to(store.root).as_posix(),
    }


def test_verify_of_nothing(store):
    assert verify(store).entries == 0
    assert not store.root.exists()
