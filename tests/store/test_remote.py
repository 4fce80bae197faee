"""A remote: what is not here is asked for there, once, with few requests, and kept; trouble there is no trouble."""

from __future__ import annotations

import multiprocessing
import os
import threading
from dataclasses import replace

import pytest
from store_kit import blob_path, files, look, make, manifest_path

from nanogpt_buckets.errors import CacheError, UsageError
from nanogpt_buckets.store import store as stores
from nanogpt_buckets.store.document import MAX_BYTES
from nanogpt_buckets.store.entries import Entries, entry_name
from nanogpt_buckets.store.entry import Status, Verified
from nanogpt_buckets.store.lockfile import write_lock
from nanogpt_buckets.store.manifest import encode
from nanogpt_buckets.store.objects import Objects, _encoded
from nanogpt_buckets.store.opening import open_store
from nanogpt_buckets.store.store import Store
from nanogpt_buckets.store.transfer import move, place_of
from nanogpt_buckets.store.vouch import Trust

ENTRIES = 4


@pytest.fixture
def entries():
    """Four entries of one family, with two blobs each."""
    return [make(f"tag {name}", name=name) for name in "abcd"]


@pytest.fixture
def filled(request, s3, entries, tmp_path):
    """A place with these entries: an object store."""
    source = Store(tmp_path / "source")
    manifests = [source.publish(*entry) for entry in entries]
    assert [m.state for m in move(source, manifests, place_of(s3, Trust(looks=True)), lambda manifest: None)]
    return s3


@pytest.fixture
def lock(tmp_path, entries):
    write_lock(tmp_path / "buckets.lock", [manifest for manifest, _ in entries], lambda parts: False)
    return tmp_path / "buckets.lock"


def cold(tmp_path, place, lock, name="node", **more) -> Store:
    return open_store(cache_dir=tmp_path / name, remote=place, locked=lock, **more)


def fetch(store: Store, family: str) -> list[Verified]:
    """Do what an engine does that finds nothing here."""
    assert store.ask()
    return [store.read(manifest) for manifest in store.family(family)]


# --- how often it is asked --------------------------------------------------------------------------------------------


def test_a_cold_node_asks_once_for_all_manifests_and_once_for_each_blob(filled, entries, lock, tmp_path, service):
    family = entries[0][0].family
    service.asked.clear()

    found = fetch(cold(tmp_path, filled, lock), family)

    assert [entry.blobs for entry in found] == [blobs for _, blobs in sorted(entries, key=lambda e: e[0].key)]
    blobs = [blob for manifest, _ in entries for blob in manifest.blobs]
    assert len(service.asked) == 1 + len(blobs), service.asked
    assert all(request.startswith("GET") for request in service.asked)


def test_with_trusted_keys_it_asks_for_what_is_revoked_too(filled, entries, lock, tmp_path, service):
    service.asked.clear()
    store = cold(tmp_path, filled, lock, trusted=["ed25519:" + "A" * 43 + "="])

    fetch(store, entries[0][0].family)

    assert len(service.asked) == 2 + sum(len(manifest.blobs) for manifest, _ in entries), service.asked


def test_a_warm_node_asks_nothing(filled, entries, lock, tmp_path, service):
    fetch(cold(tmp_path, filled, lock), entries[0][0].family)
    service.asked.clear()
    store = cold(tmp_path, filled, lock)

    assert all(isinstance(look(store, manifest), Verified) for manifest, _ in entries)
    assert len(store.family(entries[0][0].family)) == ENTRIES
    assert service.asked == []


def test_nothing_is_asked_unless_somebody_says_so(filled, entries, lock, tmp_path, service):
    service.asked.clear()
    store = cold(tmp_path, filled, lock)

    assert store.family(entries[0][0].family) == []
    assert look(store, entries[0][0]).status is Status.ABSENT
    assert service.asked == []


def test_fifty_nodes_that_start_cold_at_once_do_not_list_the_store(filled, entries, lock, tmp_path, service):
    family = entries[0][0].family
    service.asked.clear()
    wrong: list[object] = []

    def node(number: int) -> None:
        found = fetch(cold(tmp_path, filled, lock, name=f"node{number}"), family)
        if [entry.blobs for entry in found] != [blobs for _, blobs in sorted(entries, key=lambda e: e[0].key)]:
            wrong.append(number)

    nodes = [threading.Thread(target=node, args=(number,)) for number in range(50)]
    for thread in nodes:
        thread.start()
    for thread in nodes:
        thread.join()

    assert wrong == []
    blobs = sum(len(manifest.blobs) for manifest, _ in entries)
    assert len(service.asked) <= 50 * (2 + blobs)
    assert not [request for request in service.asked if "list-type" in request]


# --- what is kept -----------------------------------------------------------------------------------------------------


def test_what_was_read_there_is_kept_here_as_if_built(filled, entries, lock, tmp_path):
    store = cold(tmp_path, filled, lock)
    fetch(store, entries[0][0].family)

    alone = Store(store.root)
    assert all(isinstance(look(alone, manifest), Verified) for manifest, _ in entries)
    assert not [name for name in files(alone) if "tmp" in name]


@pytest.mark.parametrize("why", ["full", "read-only"])
def test_what_cannot_be_kept_is_used_all_the_same(filled, entries, lock, tmp_path, monkeypatch, caplog, why):
    store = cold(tmp_path, filled, lock)
    number = {"full": 28, "read-only": 30}[why]
    monkeypatch.setattr(
        "nanogpt_buckets.store.directory.write_new",
        lambda *a: (_ for _ in ()).throw(OSError(number, os.strerror(number))),
    )

    found = fetch(store, entries[0][0].family)

    assert len(found) == ENTRIES
    assert "is used and not kept" in caplog.text


def test_what_is_damaged_here_is_mended_from_there(filled, entries, lock, tmp_path):
    store = cold(tmp_path, filled, lock)
    manifest, blobs = entries[0]
    fetch(store, manifest.family)
    path = blob_path(store, manifest.blobs[0])
    path.chmod(0o600)
    path.write_bytes(b"x" * manifest.blobs[0].size)

    assert cold(tmp_path, filled, lock).read(manifest).blobs == blobs
    assert isinstance(look(Store(store.root), manifest), Verified)


def test_what_was_rejected_here_is_not_taken_from_there(filled, entries, lock, tmp_path):
    store = cold(tmp_path, filled, lock)
    manifest = entries[0][0]
    fetch(store, manifest.family)
    store.reject(manifest, "wrong logits")
    again = cold(tmp_path, filled, lock)
    again.ask()

    assert look(again, manifest).status is Status.CORRUPT


# --- trouble ----------------------------------------------------------------------------------------------------------


def test_a_remote_that_does_not_answer_is_said_once_and_not_asked_again_at_once(
    entries, tmp_path, s3, lock, monkeypatch, caplog
):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    store = cold(tmp_path, s3, lock)
    family = entries[0][0].family

    assert store.ask()
    assert store.family(family) == []
    assert look(store, entries[0][0]).status is Status.ABSENT
    assert not store.ask()
    assert caplog.text.count("cannot be used this time") == 1

    monkeypatch.setattr(stores, "_SILENT_S", 0.0)
    assert cold(tmp_path, s3, lock).ask(), "another process asks for itself"


def test_entries_that_nothing_vouches_for_are_said_and_not_used(filled, entries, tmp_path, caplog):
    store = open_store(cache_dir=tmp_path / "node", remote=filled)
    store.ask()

    assert store.family(entries[0][0].family) == []
    assert "may be written by others" in caplog.text


def test_a_truncated_blob_is_no_entry(filled, entries, lock, tmp_path):
    manifest = entries[0][0]
    tier = Objects(filled)
    blob = manifest.blobs[0]
    tier.put(f"blobs/{blob.sha256[:2]}/{blob.sha256}", b"short", replace=True)
    store = cold(tmp_path, filled, lock)
    store.ask()

    with pytest.raises(CacheError):
        store.read(manifest)
    assert not blob_path(store, blob).exists()
    assert not manifest_path(store, manifest).exists()


def test_a_remote_that_is_a_file_is_said_and_not_used(tmp_path, entries, caplog):
    (tmp_path / "file").write_text("x")
    store = open_store(cache_dir=tmp_path / "node", remote=tmp_path / "file")
    store.ask()

    assert store.family(entries[0][0].family) == []
    assert f"{tmp_path / 'file'} is not a directory" in caplog.text


def test_a_remote_that_can_be_none_is_a_mistake(tmp_path):
    with pytest.raises(UsageError, match="ftp://x is no place that can be used"):
        open_store(cache_dir=tmp_path / "node", remote="ftp://x")
    with pytest.raises(UsageError, match="remote mode 'wr' is unknown"):
        open_store(cache_dir=tmp_path / "node", remote=tmp_path, remote_mode="wr")


# --- writing there ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["rw", "ro", "off"])
def test_what_is_built_goes_there_if_that_is_asked(tmp_path, entries, mode):
    there = tmp_path / "there"
    store = open_store(cache_dir=tmp_path / "node", remote=there, remote_mode=mode)
    manifest, blobs = entries[0]

    store.publish(manifest, blobs)

    assert isinstance(look(Store(there), manifest), Verified) == (mode == "rw")
    assert store.ask() == (mode != "off")


def test_weights_do_not_go_there(tmp_path, entries):
    manifest, blobs = replace(entries[0][0], contains_weights=True), entries[0][1]
    open_store(cache_dir=tmp_path / "node", remote=tmp_path / "there", remote_mode="rw").publish(manifest, blobs)

    assert not (tmp_path / "there").exists()


def test_a_remote_that_cannot_be_written_costs_a_word(tmp_path, entries, s3, monkeypatch, caplog):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    store = open_store(cache_dir=tmp_path / "node", remote=s3, remote_mode="rw")

    store.publish(*entries[0])

    assert "was not published" in caplog.text
    assert isinstance(look(Store(store.root), entries[0][0]), Verified)


# --- the index --------------------------------------------------------------------------------------------------------


def test_an_index_that_a_killed_writer_left_behind_is_mended_by_the_next_push(filled, entries, s3, lock, tmp_path):
    family = entries[0][0].family
    late, blobs = make("late", name="e")
    source = Store(tmp_path / "source")
    source.publish(late, blobs)
    tier = Objects(s3)
    for blob in late.blobs:
        tier.put(f"blobs/{blob.sha256[:2]}/{blob.sha256}", blobs[blob.role])
    manifest = manifest_path(source, late).read_bytes()
    tier._put(entry_name(family, late.key), manifest, "create")
    assert f"{late.key}.json" not in tier.gather(f"entries/{family}", limit=MAX_BYTES).files

    assert [m.state for m in move(source, [late], place_of(s3, Trust(looks=True)), lambda m: None)] == ["there"]

    assert f"{late.key}.json" in tier.gather(f"entries/{family}", limit=MAX_BYTES).files


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff" * 50, b'{"files":{"a":"!"},"format":1}', b'{"format":2}'])
def test_an_index_that_is_none_costs_requests_and_nothing_else(filled, entries, lock, tmp_path, content):
    family = entries[0][0].family
    tier = Objects(filled)
    tier._put(f"index/{family}.json", content, "overwrite")

    assert len(fetch(cold(tmp_path, filled, lock), family)) == ENTRIES
    tier.mend(f"entries/{family}")
    assert len(fetch(cold(tmp_path, filled, lock, name="other"), family)) == ENTRIES


def test_a_lying_index_gets_nothing_loaded(filled, entries, lock, tmp_path):
    """Whoever can write there can write an index, too."""
    family = entries[0][0].family
    evil, _ = make("evil", name="a")
    tier = Objects(filled)
    tier._put(f"index/{family}.json", _encoded({f"{evil.key}.json": encode(evil)}), "overwrite")
    store = cold(tmp_path, filled, lock)
    store.ask()

    others = sorted(manifest.key for manifest, _ in entries if manifest.key != evil.key)
    assert [found.key for found in store.family(family)] == others


def _publish(place: str, tag: str, names: str) -> None:
    there = Entries(Objects(place), Trust(looks=True))
    for name in names:
        there.publish(*make(f"{tag} {name}", name=name))


def test_builders_that_publish_at_once_are_all_in_the_index(s3):
    context = multiprocessing.get_context("spawn")
    names = ["abcd", "cdef", "efgh"]
    writers = [context.Process(target=_publish, args=(s3, str(n), part)) for n, part in enumerate(names)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    family = make("x")[0].family

    index = Objects(s3).gather(f"entries/{family}", limit=MAX_BYTES)

    listed = set(Objects(s3).names(f"entries/{family}"))
    assert len(listed) == 8
    assert index.names == listed
    assert set(index.files) in (set(), listed)
