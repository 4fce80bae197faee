"""What is locked, and only that, is loaded: from anywhere, and whatever else is there."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest
from store_kit import blob_path, files, look, make, manifest_path, spoil, word

from nanogpt_buckets.errors import BucketsError, CorruptEntry, IncompatibleEntry, UntrustedStore
from nanogpt_buckets.store.entry import Miss, Status, Verified
from nanogpt_buckets.store.lockfile import LockFile, open_lock, read_lock, write_lock
from nanogpt_buckets.store.prune import delete, plan_prune
from nanogpt_buckets.store.store import Store
from nanogpt_buckets.store.vouch import Trust


def never(parts: object) -> bool:
    return False


@pytest.fixture
def path(tmp_path):
    (tmp_path / "own").mkdir(mode=0o700)
    return tmp_path / "own" / "buckets.lock"


def lock(path, *manifests, replaced=never) -> LockFile:
    write_lock(path, manifests, replaced)
    return read_lock(path)


def locked_store(store: Store, path) -> Store:
    return Store(store.root, Trust(read_lock(path), only=True))


# --- the file ---------------------------------------------------------------------------------------------------------


def test_it_says_what_may_be_loaded_to_the_byte_and_the_same_bytes_each_time(store, entry, path):
    (named,) = lock(path, entry).entries
    first = path.read_bytes()

    assert (named.family, named.key, named.target, named.size) == (entry.family, entry.key, "t", entry.size)
    assert named.manifest == entry.digest
    assert named.blobs == entry.blobs
    lock(path, entry)
    assert path.read_bytes() == first
    assert list(path.parent.iterdir()) == [path]
    assert json.loads(first)["format"] == 1


def test_a_build_adds_to_it_and_replaces_what_stood_in_the_same_place(path):
    one, two = make("one", name="a")[0], make("two", name="b")[0]
    again, elsewhere = make("three", name="a")[0], make("four", name="a", family="other")[0]
    lock(path, one, two)
    lock(path, elsewhere)
    assert {e.manifest for e in lock(path, again).entries} == {again.digest, two.digest, elsewhere.digest}

    # a family that has gone out of use goes out of the file, with all its buckets
    after = lock(path, one, replaced=lambda parts: parts == {"backend": "other"})
    assert {entry.manifest for entry in after.entries} == {one.digest, two.digest}
    assert after.families.keys() == {one.family}


def test_what_is_for_another_target_stays(path):
    one, _ = make("one")
    lock(path, one)
    document = json.loads(path.read_text())
    document["entries"][0] |= {"target": "elsewhere", "key": "0" * 64}
    path.write_text(json.dumps(document))

    after = lock(path, one, replaced=lambda parts: True)

    assert [named.target for named in after.entries] == ["elsewhere", "t"]


def edited(change):
    def edit(data: bytes) -> bytes:
        document = json.loads(data)
        change(document)
        return json.dumps(document).encode()

    return edit


DAMAGE = {
    "empty": lambda data: b"",
    "truncated": lambda data: data[: len(data) // 2],
    "text": lambda data: b"# nothing to see",
    "a list": lambda data: b"[]",
    "deep": lambda data: b"[" * 100_000,
    "a field missing": edited(lambda d: d.pop("families")),
    "format 0": edited(lambda d: d.update(format=0)),
    "a family of other parts": edited(lambda d: d["families"].update({next(iter(d["families"])): {"backend": "x"}})),
    "an entry of no family": edited(lambda d: d.update(families={})),
    "a key twice": edited(lambda d: d["entries"].append(d["entries"][0])),
    "a path for a digest": edited(lambda d: d["entries"][0].update(key="../../etc/passwd")),
    "a role that is a path": edited(lambda d: d["entries"][0]["blobs"][0].update(role="../x")),
    "a wrong size": edited(lambda d: d["entries"][0].update(bytes=1)),
    "a bucket that is none": edited(lambda d: d["entries"][0].update(bucket={"batch_size": 0, "seq_len": 3})),
    "a bucket that is text": edited(lambda d: d["entries"][0].update(bucket="1x3")),
    "a float": edited(lambda d: d["entries"][0].update(bytes=1.5)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_one_is_one_sentence_and_is_not_replaced(entry, path, damage):
    lock(path, entry)
    path.write_bytes(data := DAMAGE[damage](path.read_bytes()))

    for use in (read_lock, open_lock, lambda path: write_lock(path, [entry], never)):
        with pytest.raises(CorruptEntry) as caught:
            use(path)
        assert str(path) in caught.value.message
        assert "\n" not in caught.value.message
        assert "--lock" in caught.value.hint
    assert path.read_bytes() == data


@pytest.mark.parametrize("newer", [{"format": 2}, {"more": 1}])
def test_a_newer_releases_is_left_alone(entry, path, newer):
    lock(path, entry)
    path.write_text(json.dumps(json.loads(path.read_text()) | newer))
    before = path.read_bytes()

    for use in (read_lock, open_lock):
        with pytest.raises(IncompatibleEntry, match="newer release"):
            use(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("what", ["missing", "directory", "fifo", "no parent", "a file as parent"])
def test_what_is_no_file_is_one_sentence(path, what):
    if what == "directory":
        path.mkdir()
    elif what == "fifo":
        os.mkfifo(path)
    elif what == "no parent":
        path = path.parent / "none" / "buckets.lock"
    elif what == "a file as parent":
        (path.parent / "file").touch()
        path = path.parent / "file" / "buckets.lock"

    with pytest.raises(BucketsError, match=str(path)):
        read_lock(path)
    if what == "missing":
        assert open_lock(path).entries == ()
    else:
        with pytest.raises(BucketsError, match=str(path)):
            open_lock(path)


def test_a_link_to_it_stays_a_link(entry, path, tmp_path):
    (tmp_path / "link").symlink_to(path)
    write_lock(tmp_path / "link", [entry], never)

    assert (tmp_path / "link").is_symlink()
    assert read_lock(path).find(entry.key)


def test_a_full_disk_leaves_what_was_there(entry, path, monkeypatch):
    lock(path, entry)
    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))

    with pytest.raises(BucketsError, match="No space left"):
        write_lock(path, [make("two", name="b")[0]], never)
    assert (path.read_bytes(), list(path.parent.iterdir())) == (before, [path])


# --- what is locked ---------------------------------------------------------------------------------------------------


def test_nothing_else_is_loaded_and_nothing_is_listed(store, entry, path, monkeypatch):
    other, blobs = make("other", name="b")
    store.publish(other, blobs)
    lock(path, entry)
    only = locked_store(store, path)
    monkeypatch.setattr(only.directory, "names", lambda folder: pytest.fail(f"{folder} was listed"))

    assert [found.key for found in only.family(entry.family)] == [entry.key]
    assert [found.key for found in only.entries()] == [entry.key]
    assert isinstance(look(only, entry), Verified)
    found = look(only, other)
    assert (found.status, found.why) == (Status.UNTRUSTED, f"{path} does not name it")


def test_another_valid_build_of_the_same_key_is_refused(store, entry, path):
    lock(path, entry)
    manifest_path(store, entry).unlink()
    replay = replace(entry, stats={"compile_ms": 1})
    store.publish(replay, make("one")[1])

    found = look(locked_store(store, path), entry)

    assert isinstance(look(store, entry), Verified), "in order, but not the one"
    assert (found.status, found.why) == (Status.UNTRUSTED, f"{path} names another build of it")
    assert "build --lock" in found.hint


def test_what_is_locked_and_missing_is_no_entry(store, path):
    entry, _ = make("one")
    lock(path, entry)

    assert locked_store(store, path).family(entry.family) == []


# --- where others write -----------------------------------------------------------------------------------------------

OPEN = {"its group": 0o2770, "everyone": 0o777}


@pytest.fixture(params=OPEN)
def shared(request, store, entry) -> Store:
    """A store that another user may write, with all that is in it."""
    for place in (store.root, *store.root.rglob("*")):
        place.chmod(OPEN[request.param] if place.is_dir() else 0o666)
    return store


def test_it_is_refused_in_one_line_that_names_the_way_out(shared, entry):
    found = look(shared, entry)

    assert found.status is Status.UNTRUSTED
    assert str(shared.root) in found.why
    assert "--locked FILE" in found.hint
    assert "\n" not in found.hint


def test_a_lock_file_vouches_for_what_it_names(shared, entry, path):
    lock(path, entry)

    assert isinstance(look(locked_store(shared, path), entry), Verified)


def test_it_vouches_for_nothing_that_was_changed(shared, entry, path):
    lock(path, entry)
    for role in entry.blobs:
        intact = blob_path(shared, role).read_bytes()
        blob_path(shared, role).write_bytes(b"x" * role.size)
        assert look(locked_store(shared, path), entry).status is Status.CORRUPT
        blob_path(shared, role).write_bytes(intact)
    manifest_path(shared, entry).write_bytes(manifest_path(shared, entry).read_bytes()[:-1])
    assert look(locked_store(shared, path), entry).status is Status.CORRUPT


def test_a_lock_file_that_others_can_write_vouches_for_nothing_there_and_restricts_all_the_same(store, entry, path):
    lock(path, entry)
    path.chmod(0o666)
    assert isinstance(look(locked_store(store, path), entry), Verified), "the place vouches for it"

    store.root.chmod(0o777)
    found = look(locked_store(store, path), entry)
    assert (found.status, found.why.split(",")[0]) == (Status.UNTRUSTED, f"{path} can be written by everyone")

    path.chmod(0o644)
    assert isinstance(look(locked_store(store, path), entry), Verified)
    path.parent.chmod(0o777)
    assert look(locked_store(store, path), entry).status is Status.UNTRUSTED


@pytest.mark.parametrize("place", ["v1", "v1/entries", "v1/entries/F", "v1/entries/F/K.json", "v1/blobs"])
def test_nothing_is_followed_out_of_it(shared, entry, path, place, tmp_path):
    lock(path, entry)
    inside = shared.root / place.replace("F", entry.family).replace("K", entry.key)
    inside.rename(tmp_path / "moved")
    inside.symlink_to(tmp_path / "moved")

    found = look(locked_store(shared, path), entry)

    assert isinstance(found, Miss)
    assert found.status in (Status.UNTRUSTED, Status.CORRUPT)
    assert "symbolic link" in found.why


def test_a_builder_with_a_lock_file_writes_there_and_adopts_nobody_elses(shared, entry, path):
    mine, blobs = make("mine", name="b")
    builder = Store(shared.root, Trust(open_lock(path)))
    assert look(builder, entry).status is Status.UNTRUSTED
    with pytest.raises(UntrustedStore, match="can be written by"):
        builder.publish(entry, make("one")[1])

    builder.directory.prepare()
    assert builder.publish(mine, blobs) == mine
    lock(path, mine)
    assert isinstance(look(locked_store(shared, path), mine), Verified)
    assert isinstance(look(Store(shared.root, Trust(open_lock(path))), mine), Verified), "the next build adopts it"


def test_who_only_looks_may_look(shared, entry):
    looking = Store(shared.root, Trust(looks=True))

    assert word(look(looking, entry)) == "verified"
    before = files(shared)
    spoil(blob_path(shared, entry.blobs[0]), b"x")
    assert [file.what for file in plan_prune(looking).files] == ["entry", "blob", "blob"]
    delete(looking, plan_prune(looking))
    assert files(shared).keys() < before.keys()
