"""Entries pushed and pulled: whole or not at all, through directories, tar files and an object store over HTTP."""

from __future__ import annotations

import io
import os
import tarfile
from dataclasses import replace
from types import SimpleNamespace

import pytest
from store_kit import blob_path, look, make, manifest_path, spoil

from nanogpt_buckets.errors import CacheError, CorruptEntry, TransientError, UntrustedStore, UsageError
from nanogpt_buckets.store import objects
from nanogpt_buckets.store.entries import Entries
from nanogpt_buckets.store.entry import Status, Verified
from nanogpt_buckets.store.lockfile import LockFile, read_lock, write_lock
from nanogpt_buckets.store.objects import Objects
from nanogpt_buckets.store.store import Store
from nanogpt_buckets.store.transfer import (
    COPIED,
    OTHER,
    THERE,
    move,
    move_to_archive,
    place_of,
    planned,
    refuse_weights,
    require_all,
)
from nanogpt_buckets.store.verify import verify
from nanogpt_buckets.store.vouch import PLACE, Trust


def nothing(manifest: object) -> None:
    pass


@pytest.fixture
def lock(tmp_path, entry) -> LockFile:
    write_lock(tmp_path / "buckets.lock", [entry], lambda parts: False)
    return read_lock(tmp_path / "buckets.lock")


def locked(lock: LockFile) -> Trust:
    return Trust(lock, only=True)


def push(source: Store, place: str, *manifests) -> list[str]:
    return [moved.state for moved in move(source, manifests, place_of(place, Trust(looks=True)), nothing)]


def pull(place: str, target: Store, trust: Trust) -> list[str]:
    source = place_of(place, trust)
    return [moved.state for moved in move(source, require_all(source.entries(), source), target, nothing)]


# --- there and back ---------------------------------------------------------------------------------------------------


@pytest.fixture(params=["directory", "object store", "tar"])
def pushed(request, store, entry, tmp_path) -> str:
    """A place that has the entry."""
    if request.param == "tar":
        assert [m.state for m in move_to_archive(store, [entry], tmp_path / "x.tar", nothing)] == [COPIED]
        return str(tmp_path / "x.tar")
    place = str(tmp_path / "there") if request.param == "directory" else request.getfixturevalue("s3")
    assert push(store, place, entry) == [COPIED]
    assert push(store, place, entry) == [THERE]
    return place


def test_what_was_pushed_is_pulled_whole(pushed, store, entry, lock, tmp_path):
    fresh = Store(tmp_path / "fresh")

    assert pull(pushed, fresh, locked(lock)) == [COPIED]
    assert pull(pushed, fresh, locked(lock)) == [THERE]
    assert look(fresh, entry).blobs == store.read(entry).blobs
    assert verify(fresh).problems == ()


def test_without_a_lock_file_only_what_is_ones_own_is_pulled(pushed, entry, tmp_path):
    fresh = Store(tmp_path / "fresh")
    if pushed.startswith("s3://"):
        with pytest.raises(UntrustedStore, match="may be written by others") as caught:
            pull(pushed, fresh, PLACE)
        assert "--locked FILE" in caught.value.hint
        return
    assert pull(pushed, fresh, PLACE) == [COPIED]
    os.chmod(pushed, 0o777)
    with pytest.raises(UntrustedStore, match="can be written by everyone"):
        pull(pushed, Store(tmp_path / "other"), PLACE)


def test_another_build_is_left_alone_wherever_it_is(store, entry, s3, lock, tmp_path):
    first = Store(tmp_path / "first")
    another = replace(entry, stats={"compile_ms": 1})
    first.publish(another, store.read(entry).blobs)
    push(first, s3, another)

    assert push(store, s3, entry) == [OTHER], "who was first stays"
    with pytest.raises(UntrustedStore, match="names another build"):
        pull(s3, Store(tmp_path / "fresh"), locked(lock))
    assert [m.state for m in move(store, [entry], first, nothing)] == [OTHER]
    assert [m.state for m in move(store, [entry], Store(first.root, locked(lock)), nothing)] == [OTHER]


def test_what_is_locked_and_not_there_is_said(s3, lock, tmp_path):
    with pytest.raises(CacheError, match=r"1 of 1 entries that .* names are not in s3://") as caught:
        pull(s3, Store(tmp_path / "fresh"), locked(lock))
    assert "--lock" in caught.value.hint


def test_what_is_damaged_is_neither_pushed_nor_pulled(store, entry, s3, lock, tmp_path):
    there = Entries(Objects(s3), locked(lock))
    push(store, s3, entry)
    blob = entry.blobs[0]
    for damage in (b"x" * blob.size, b"x"):
        there.tier.put(f"blobs/{blob.sha256[:2]}/{blob.sha256}", damage, replace=True)
        with pytest.raises(CorruptEntry):
            pull(s3, Store(tmp_path / "fresh"), locked(lock))
    assert not manifest_path(Store(tmp_path / "fresh"), entry).exists()
    assert push(store, s3, entry) == [COPIED], "which mends it"
    assert pull(s3, Store(tmp_path / "fresh"), locked(lock)) == [COPIED]

    spoil(blob_path(store, blob), b"x")
    with pytest.raises(CorruptEntry):
        push(store, str(tmp_path / "elsewhere"), entry)
    with pytest.raises(CorruptEntry):
        move_to_archive(store, [entry], tmp_path / "x.tar", nothing)
    assert not (tmp_path / "x.tar").exists()


def test_weights_are_pushed_by_who_says_so(store):
    manifest, blobs = make("one")
    inside = replace(manifest, contains_weights=True)
    store.publish(inside, blobs)
    with pytest.raises(UsageError) as caught:
        refuse_weights([inside])
    assert "--with-weights" in caught.value.hint
    refuse_weights([manifest])


def test_what_no_plan_names_is_not_pushed_unless_it_is_locked(store, entry, lock):
    assert planned(store) == []
    assert planned(Store(store.root, locked(lock))) == [entry]


# --- the object store -------------------------------------------------------------------------------------------------


def test_an_object_is_written_once_unless_it_is_to_be_replaced(s3):
    tier = Objects(s3)
    assert tier.put("blobs/ab/x", b"one")
    assert not tier.put("blobs/ab/x", b"two")
    assert tier.get("blobs/ab/x", anyone=True) == b"one"
    assert tier.put("blobs/ab/x", b"three", replace=True)
    assert (tier.get("blobs/ab/x", size=5, anyone=True), tier.size("blobs/ab/x")) == (b"three", 5)
    for wrong in ({"size": 4}, {"limit": 4}):
        with pytest.raises(CorruptEntry):
            tier.get("blobs/ab/x", anyone=True, **wrong)
    tier.put("blobs/cd/y", b"")
    assert tier.names("blobs") == ["ab", "cd"]
    assert tier.names("blobs/ab") == ["x"]
    assert tier.names("nothing") == []
    tier.delete("blobs/ab/x")
    tier.delete("blobs/ab/x")
    assert tier.size("blobs/ab/x") is None
    with pytest.raises(FileNotFoundError):
        tier.get("blobs/ab/x", anyone=True)


USES = [
    lambda tier: tier.get("a", anyone=True),
    lambda tier: tier.names("a"),
    lambda tier: tier.put("a", b""),
    lambda tier: tier.delete("a"),
]


@pytest.mark.parametrize("use", USES)
def test_a_bucket_that_is_not_there_is_said(s3, use):
    with pytest.raises(CacheError, match="s3://nowhere-at-all/x cannot be used: there is no such bucket") as caught:
        use(Objects("s3://nowhere-at-all/x"))
    assert not isinstance(caught.value, TransientError)


@pytest.mark.parametrize("use", USES)
def test_a_service_that_does_not_answer_is_transient_and_soon_said(s3, use, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setitem(objects._RETRIES, "max_retries", 1)
    tier = Objects(s3)
    with pytest.raises(TransientError, match="cannot be used this time") as caught:
        use(tier)
    assert "\n" not in caught.value.message
    assert tier.size("a") is None


SAID = {
    "no credentials": "performing PUT http://169.254.169.254/latest/api/token in 1ms - HTTP error",
    "credentials are refused": "performing GET https://s3/b/x in 1ms - non-2xx status code: 403 Forbidden:",
    "clock is wrong": "status code: 403 Forbidden: <Error><Code>RequestTimeTooSkewed</Code></Error>",
}


@pytest.mark.parametrize("meaning", SAID)
def test_what_a_service_refuses_is_no_transient_error(s3, monkeypatch, meaning):
    tier = Objects(s3)

    def refuse(*arguments: object, **how: object) -> None:
        raise tier._obstore.exceptions.GenericError(f"Generic S3 error: Error {SAID[meaning]}")

    monkeypatch.setattr(tier._obstore, "get", refuse)
    with pytest.raises(CacheError, match=meaning) as caught:
        tier.get("a", anyone=True)
    assert type(caught.value) is CacheError
    assert caught.value.hint


def test_an_answer_without_its_content_is_transient_and_an_empty_object_is_empty(s3, monkeypatch):
    tier = Objects(s3)
    tier.put("a", b"content")
    tier.put("b", b"")
    really = tier._obstore.get
    assert tier.get("b", size=0, anyone=True) == b""
    with pytest.raises(CorruptEntry, match="has 0 bytes, not 7"):
        tier.get("b", size=7, anyone=True)

    monkeypatch.setattr(tier._obstore, "get", lambda store, path: really(store, "v1/b"))
    for name, how in (("a", {}), ("a", {"size": 7}), ("a", {"limit": 9}), ("nothing", {"limit": 9})):
        with pytest.raises(TransientError, match="came without its content"):
            tier.get(name, anyone=True, **how)

    monkeypatch.setattr(tier._obstore, "get", lambda store, path: SimpleNamespace(meta={"size": 0, "e_tag": None}))
    with pytest.raises(TransientError, match="came without its content"):
        tier.get("b", anyone=True)


def test_a_conflict_is_transient_unless_an_object_was_to_be_created(s3, monkeypatch):
    tier = Objects(s3)

    def conflict(*arguments: object, **how: object) -> None:
        raise tier._obstore.exceptions.AlreadyExistsError("already exists: status code: 409")

    for name in ("get", "put", "delete", "list_with_delimiter"):
        monkeypatch.setattr(tier._obstore, name, conflict)
    assert not tier.put("a", b""), "who was first stays"
    replacing = lambda tier: tier.put("a", b"", replace=True)  # noqa: E731
    for use in (USES[0], USES[1], USES[3], replacing):
        with pytest.raises(TransientError, match="cannot be used this time"):
            use(tier)


def test_numbers_in_a_url_are_no_verdict(s3, monkeypatch):
    tier = Objects(s3)

    def miss(*arguments: object, **how: object) -> None:
        raise FileNotFoundError(
            "Error performing GET http://127.0.0.1:40177/NoSuchBucket/403 in 1ms - status code: 404"
        )

    monkeypatch.setattr(tier._obstore, "get", miss)
    with pytest.raises(FileNotFoundError):
        tier.get("a", anyone=True)


@pytest.mark.parametrize("url", ["ftp://x", "s3://", "file:///tmp", "http://127.0.0.1/x", "memory:///"])
def test_a_url_of_another_kind_is_a_usage_error(url):
    with pytest.raises(UsageError, match="is no place that can be used"):
        place_of(url, PLACE)


AZURE = {
    "Account must be specified": {},
    "Invalid Access Key": {"AZURE_STORAGE_ACCOUNT_NAME": "a", "AZURE_STORAGE_ACCOUNT_KEY": "no base64"},
}


@pytest.mark.parametrize("why", AZURE)
def test_what_azure_lacks_is_said(monkeypatch, why):
    for name in [name for name in os.environ if name.startswith("AZURE")]:
        monkeypatch.delenv(name)
    for name, value in AZURE[why].items():
        monkeypatch.setenv(name, value)
    with pytest.raises(CacheError, match=f"^az://buckets/x cannot be used: {why}") as caught:
        Objects("az://buckets/x")
    assert ("AZURE_STORAGE_ACCOUNT_NAME" in caught.value.hint) == (not AZURE[why])


def test_the_first_part_of_an_azure_url_is_the_container(monkeypatch):
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "a2V5")
    store = Objects("az://container/some/prefix")._store
    assert (store.config["container_name"], store.prefix) == ("container", "some/prefix")


def test_without_obstore_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "obstore.store", None)
    with pytest.raises(UsageError, match="obstore is not installed") as caught:
        Objects("s3://bucket")
    assert "nanogpt-buckets[remote]" in caught.value.hint


# --- the tar file -----------------------------------------------------------------------------------------------------


def test_a_tar_file_is_the_same_bytes_each_time_and_replaces_what_was_there(store, entry, tmp_path):
    other, blobs = make("other", name="b")
    store.publish(other, blobs)
    path = tmp_path / "x.tar"
    move_to_archive(store, [entry, other], path, nothing)
    first = path.read_bytes()
    move_to_archive(store, [entry, other], path, nothing)
    assert path.read_bytes() == first
    move_to_archive(store, [entry], path, nothing)
    assert list(place_of(str(path), PLACE).entries()) == [entry]
    assert [p.name for p in tmp_path.iterdir() if "x.tar" in p.name] == ["x.tar"]


def member(name: str, **fields) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(info, field, value)
    return info


HOSTILE = {
    "absolute": member("/etc/passwd"),
    "parent": member("v1/../../x"),
    "below a name of ours": member(f"v1/blobs/ab/{'0' * 64}/../../../../x"),
    "a plan": member("v1/plans/demo.json"),
    "a link": member(f"v1/blobs/00/{'0' * 64}", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    "a hard link": member(f"v1/blobs/00/{'0' * 64}", type=tarfile.LNKTYPE, linkname="/etc/passwd"),
    "a pipe": member(f"v1/blobs/00/{'0' * 64}", type=tarfile.FIFOTYPE),
    "a device": member(f"v1/blobs/00/{'0' * 64}", type=tarfile.CHRTYPE),
    "a sparse file": member(f"v1/blobs/00/{'0' * 64}", type=tarfile.GNUTYPE_SPARSE),
    "a directory": member("v1/blobs/00", type=tarfile.DIRTYPE),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_tar_file_with_anything_else_in_it_is_refused_as_a_whole(store, entry, tmp_path, what):
    path = tmp_path / "x.tar"
    move_to_archive(store, [entry], path, nothing)
    with tarfile.open(path, "a") as tar:
        tar.addfile(HOSTILE[what], io.BytesIO())

    with pytest.raises(CorruptEntry, match="which is no part of a cache"):
        place_of(str(path), PLACE)


def test_every_beginning_of_a_tar_file_is_refused_or_lacks_entries_and_none_is_wrong(store, entry, tmp_path):
    path = tmp_path / "x.tar"
    move_to_archive(store, [entry], path, nothing)
    data = path.read_bytes()
    for length in [*range(0, 3000, 97), *range(3000, len(data), 511)]:
        path.write_bytes(data[:length])
        try:
            source = place_of(str(path), PLACE)
            found = source.check(source.look(entry.family, entry.key))
        except CacheError:
            continue
        assert isinstance(found, Verified) or found.status in (Status.ABSENT, Status.CORRUPT, Status.TRANSIENT)


@pytest.mark.parametrize("what", ["missing", "directory", "text", "compressed"])
def test_what_is_no_tar_file_is_one_sentence(tmp_path, what):
    path = tmp_path / "x.tar"
    if what == "directory":
        path.mkdir()
    elif what == "text":
        path.write_text("no tar" * 200)
    elif what == "compressed":
        with tarfile.open(path, "w:gz") as tar:
            tar.addfile(member("x"))
    with pytest.raises(CacheError, match=str(path)) as caught:
        place_of(str(path), PLACE)
    assert "\n" not in caught.value.message


def test_a_full_disk_leaves_nothing(store, entry, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(CacheError, match="No space left"):
        move_to_archive(store, [entry], tmp_path / "x.tar", nothing)
    assert not [path for path in tmp_path.iterdir() if "x.tar" in path.name]
