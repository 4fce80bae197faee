"""Entries from one place to another: each read whole and verified, then published as if it had been built there.

Knows nothing of terminals, nor of models.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from nanogpt_buckets import settings
from nanogpt_buckets.errors import CacheError, UsageError
from nanogpt_buckets.store.archive import Archive, pack
from nanogpt_buckets.store.directory import Directory
from nanogpt_buckets.store.entries import Entries
from nanogpt_buckets.store.entry import Found, Miss, Status, Verified, manifest_of
from nanogpt_buckets.store.manifest import Manifest
from nanogpt_buckets.store.objects import Objects
from nanogpt_buckets.store.plans import Plans
from nanogpt_buckets.store.store import Store
from nanogpt_buckets.store.tier import Tier
from nanogpt_buckets.store.vouch import Trust

# What became of an entry.
COPIED, THERE, OTHER = "copied", "there", "another build is there"


@dataclass(frozen=True)
class Moved:
    """What became of one entry: COPIED, already THERE, or left alone since OTHER."""

    manifest: Manifest
    state: str


def is_archive(place: str) -> bool:
    """Whether a place is a tar file."""
    return place.endswith(".tar") and "://" not in place


def is_directory(place: str) -> bool:
    """Whether a place is a cache directory, there or not."""
    return "://" not in place and not is_archive(place)


def place_of(place: str, trust: Trust) -> Entries:
    """Return the entries in a cache directory, in an object store by its URL, or in a file that ends in .tar.

    Raises:
        UsageError: it can be none of these.
        CacheError: the file cannot be read.
    """
    if "://" in place:
        return Entries(Objects(place), trust)
    path = settings.expanded(place, "TARGET or SOURCE")
    tier: Tier = Archive(path) if is_archive(place) else Directory(path, shared=trust.shared)
    return Entries(tier, trust)


def planned(store: Store) -> list[Found]:
    """Return the entries that a lock file names, if the store has one, or that a saved plan does."""
    if store.trust.locked is not None:
        return list(store.entries())
    pins = Plans(store).pins()
    known = ((entry, manifest_of(entry)) for entry in store.entries())
    return [entry for entry, manifest in known if manifest and pins.keep(manifest.family, manifest.bucket)]


def require_all(found: Iterable[Found], source: Entries) -> list[Manifest]:
    """Return entries that can be moved; a CacheError says why one cannot be, or that one which is locked is missing."""
    manifests: list[Manifest] = []
    for entry in found:
        if isinstance(entry, Miss):
            raise source.error(entry)
        manifests.append(entry)
    have = {manifest.key for manifest in manifests}
    lock = source.trust.locked
    missing = [] if lock is None else [entry for entry in lock.entries if entry.key not in have]
    if lock is not None and missing:
        hint = f"build it, or lock what is there: nanogpt-buckets build --lock {shlex.quote(str(lock.path))}"
        raise CacheError(
            f"{len(missing)} of {len(lock.entries)} entries that {lock.path} names are not in {source.tier}", hint=hint
        )
    return manifests


def refuse_weights(manifests: Iterable[Manifest]) -> None:
    """Raise a UsageError if an entry has a model's weights compiled in."""
    holding = [manifest for manifest in manifests if manifest.contains_weights]
    if holding:
        names = ", ".join(manifest.key[:12] for manifest in holding[:4])
        raise UsageError(
            f"{len(holding)} entries contain the model's weights: {names}",
            hint="to push them all the same: --with-weights",
        )


def move(
    source: Entries, manifests: Iterable[Manifest], target: Entries, on_entry: Callable[[Manifest], None]
) -> Iterator[Moved]:
    """Copy entries, each once it was read whole; what is there already, in order, stays as it is.

    Raises:
        CacheError: one cannot be read or written; those before it are there.
    """
    manifests = list(manifests)
    for manifest in manifests:
        before = target.check(target.look(manifest.family, manifest.key, manifest.parts))
        if isinstance(before, Verified):
            if before.manifest == manifest:
                target.add_signature(manifest, source.signature(manifest))
            yield Moved(manifest, THERE if before.manifest == manifest else OTHER)
        elif before.status is Status.UNTRUSTED and before.manifest is not None:  # the lock file means ours
            yield Moved(manifest, OTHER)
        else:
            stored = target.publish(manifest, source.read(manifest).blobs, source.signature(manifest))
            yield Moved(manifest, COPIED if stored == manifest else OTHER)
        on_entry(manifest)
    if isinstance(target.tier, Objects):
        for family in sorted({manifest.family for manifest in manifests}):
            target.tier.mend(f"entries/{family}")


def move_to_archive(
    source: Entries, manifests: Iterable[Manifest], path: Path, on_entry: Callable[[Manifest], None]
) -> list[Moved]:
    """Write entries into a tar file, in the place of what it held."""
    moved: list[Moved] = []

    def read() -> Iterator[Verified]:
        for manifest in manifests:
            yield replace(source.read(manifest), signature=source.signature(manifest))
            moved.append(Moved(manifest, COPIED))
            on_entry(manifest)

    pack(path, read())
    return moved
