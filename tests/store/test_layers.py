"""Layers: what a cache directory lacks, or has damaged, comes from the first directory below it that is in order."""

from __future__ import annotations

import errno
import os
from dataclasses import replace

import pytest
from store_kit import blob_path, files, look, make, manifest_path, spoil, word

from nanogpt_buckets.errors import UsageError
from nanogpt_buckets.settings import layers as layers_of
from nanogpt_buckets.store.entry import Miss, Status, Verified
from nanogpt_buckets.store.lockfile import read_lock, write_lock
from nanogpt_buckets.store.store import Store
from nanogpt_buckets.store.vouch import Trust


@pytest.fixture
def layer(tmp_path) -> Store:
    return Store(tmp_path / "layer")


@pytest.fixture
def store(tmp_path, layer) -> Store:
    layer.root.mkdir(0o755)
    return Store(tmp_path / "cache", layers=[layer.root])


def test_what_is_below_is_found_read_and_adopted_and_nothing_is_written(store, layer):
    manifest, blobs = make("one")
    layer.publish(manifest, blobs)
    before = files(layer)

    assert look(store, manifest).blobs == blobs
    assert store.family(manifest.family) == list(store.entries()) == [manifest]
    assert store.publish(*make("two")) == manifest, "which is not built again"
    store.mark_used(manifest)
    assert files(layer) == before
    assert not store.root.exists()


def test_the_directory_comes_before_its_layers_and_they_in_their_order(tmp_path):
    first, second = Store(tmp_path / "first"), Store(tmp_path / "second")
    built = {where: replace(make("one")[0], stats={"built": where}) for where in range(3)}
    second.publish(built[2], make("one")[1])
    first.publish(built[1], make("one")[1])
    store = Store(tmp_path / "cache", layers=[first.root, second.root])
    assert store.family(built[0].family) == [built[1]]

    Store(store.root).publish(built[0], make("one")[1])
    assert store.family(built[0].family) == [built[0]]
    assert look(store, built[0]).manifest == built[0]


DAMAGE = {
    "manifest gone": lambda store, entry: manifest_path(store, entry).unlink(),
    "manifest damaged": lambda store, entry: spoil(manifest_path(store, entry), b"{}"),
    "blob gone": lambda store, entry: blob_path(store, entry.blobs[0]).unlink(),
    "blob damaged": lambda store, entry: spoil(blob_path(store, entry.blobs[0]), b"x"),
    "others can write": lambda store, entry: store.root.chmod(0o777),
    "others can write a file": lambda store, entry: manifest_path(store, entry).chmod(0o666),
    "a file": lambda store, entry: (store.root.rename(store.root.with_name("away")), store.root.touch()),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("whose", ["directory", "layer"])
def test_whichever_is_damaged_the_other_serves(store, layer, damage, whose):
    manifest, blobs = make("one")
    for each in (Store(store.root), layer):
        each.publish(manifest, blobs)
    DAMAGE[damage](store if whose == "directory" else layer, manifest)

    assert isinstance(look(store, manifest), Verified)
    assert manifest in store.family(manifest.family)


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_damaged_everywhere_is_said_to_be_so(store, layer, damage):
    manifest, blobs = make("one")
    layer.publish(manifest, blobs)
    DAMAGE[damage](layer, manifest)

    found = look(store, manifest)

    assert isinstance(found, Miss)
    assert (found.status is Status.ABSENT) == (damage == "manifest gone")
    if "gone" in damage or "damaged" in damage:
        assert isinstance(Store(store.root, layers=[layer.root]).publish(manifest, blobs), type(manifest))
        assert isinstance(look(store, manifest), Verified), "built above the damaged one"


def test_a_directory_that_cannot_be_listed_does_not_hide_its_layers(store, layer, monkeypatch):
    manifest, blobs = make("one")
    layer.publish(manifest, blobs)
    store.root.mkdir()
    listdir = os.listdir

    def fail(path):
        if str(path).startswith(str(store.root)):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return listdir(path)

    monkeypatch.setattr(os, "listdir", fail)
    found = store.family(manifest.family)

    assert manifest in found
    assert [word(other) for other in found if other != manifest] == [Status.TRANSIENT]


def test_what_was_rejected_here_is_rejected_there_until_it_is_built_here(store, layer):
    manifest, blobs = make("one")
    layer.publish(manifest, blobs)
    store.reject(manifest, "it computes something else")

    for reader in (store, Store(store.root, layers=[layer.root])):
        found = look(reader, manifest)
        assert (found.status, found.why) == (Status.CORRUPT, "rejected: it computes something else")
        assert [word(entry) for entry in reader.family(manifest.family)] == [Status.CORRUPT]
    assert isinstance(look(layer, manifest), Verified), "a layer is not written"

    again = replace(manifest, stats={"compile_ms": 2})
    assert store.publish(again, blobs) == again
    assert look(Store(store.root, layers=[layer.root]), manifest).manifest == again


def test_a_built_entry_needs_no_layer(store, layer):
    shared = make("one")
    layer.publish(*shared)
    mine = replace(make("one", name="b")[0], blobs=shared[0].blobs)
    store.publish(mine, shared[1])

    assert isinstance(look(Store(store.root), mine), Verified)


def test_a_lock_file_holds_for_layers(store, layer, tmp_path):
    manifest, blobs = make("one")
    other = make("other", name="b")
    layer.publish(manifest, blobs)
    layer.publish(*other)
    layer.root.chmod(0o777)
    write_lock(tmp_path / "buckets.lock", [manifest], lambda parts: False)
    locked = Store(store.root, Trust(read_lock(tmp_path / "buckets.lock"), only=True), [layer.root])

    assert locked.family(manifest.family) == [manifest]
    assert look(locked, other[0]).status is Status.UNTRUSTED
    assert look(store, manifest).status is Status.UNTRUSTED


def test_which_layers_there_are(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    monkeypatch.setenv("NANOGPT_BUCKETS_LAYERS", f"{tmp_path / 'a'}:{tmp_path / 'b'}")
    assert layers_of() == layers_of(()) == [tmp_path / "a", tmp_path / "b"]
    assert layers_of([tmp_path / "b"]) == layers_of(tmp_path / "b") == [tmp_path / "b"]
    with pytest.raises(UsageError, match="is not a directory"):
        layers_of([tmp_path / "c"])
    monkeypatch.delenv("NANOGPT_BUCKETS_LAYERS")
    assert layers_of() == []
