"""Entries need five verbs of a tier and nothing else: the same store over a tier that is no directory."""

from __future__ import annotations

import pytest
from store_kit import healed_entry, look, make, word

from nanogpt_buckets.store.entry import Status
from nanogpt_buckets.store.store import Store
from nanogpt_buckets.store.tier import Gathered


class Memory:
    """A tier in a dictionary, as an object store would be one."""

    def __init__(self) -> None:
        self.held: dict[str, bytes] = {}

    def get(self, name: str, *, size: int | None = None, limit: int | None = None, anyone: bool = False) -> bytes:
        if name not in self.held:
            raise FileNotFoundError(name)
        return self.held[name]

    def size(self, name: str) -> int | None:
        return len(self.held[name]) if name in self.held else None

    def names(self, folder: str) -> list[str]:
        start = f"{folder}/"
        return sorted({name.removeprefix(start).split("/")[0] for name in self.held if name.startswith(start)})

    remembers_s = 0.0

    def gather(self, folder: str, *, limit: int, listed: bool = True) -> Gathered:
        return Gathered(names=self.names(folder))

    def put(self, name: str, data: bytes, *, replace: bool = False) -> bool:
        if name in self.held and not replace:
            return False
        self.held[name] = data
        return True

    def delete(self, name: str) -> None:
        self.held.pop(name, None)

    def touch(self, name: str, every_s: float = 0.0) -> None:
        pass


@pytest.fixture
def tier(store) -> Memory:
    store.tier = Memory()
    return store.tier


def test_what_is_published_is_found_read_and_adopted(store, tier):
    manifest, blobs = make("one")
    assert word(look(store, manifest)) == Status.ABSENT
    assert store.publish(manifest, blobs) == manifest
    assert store.publish(*make("two")) == manifest
    assert list(store.entries()) == [manifest] == [store.glance(manifest)]
    assert look(store, manifest).blobs == blobs
    assert not store.root.exists()


@pytest.mark.parametrize("which", ["manifest", "blob"])
@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: bytes([data[0] ^ 1]) + data[1:]])
def test_nothing_is_believed(store, tier, which, damage):
    manifest, blobs = make("one")
    store.publish(manifest, blobs)
    name = next(name for name in tier.held if name.startswith("entries" if which == "manifest" else "blobs"))
    tier.held[name] = damage(tier.held[name])
    assert word(look(store, manifest)) == Status.CORRUPT
    healed_entry(store, manifest, blobs)


def test_a_rejection_stays_in_the_tier_until_it_is_built_anew(store, tier):
    manifest, blobs = make("one")
    store.publish(manifest, blobs)
    store.reject(manifest, "logits differ")
    other = Store(store.root)
    other.tier = tier
    assert look(other, manifest).why == "rejected: logits differ"
    healed_entry(other, manifest, blobs)
    assert not [name for name in tier.held if name.endswith(".rejected")]
