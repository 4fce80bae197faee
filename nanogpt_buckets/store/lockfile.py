"""The lock file: exactly which entries may be loaded, named by the digests of their manifests and blobs.

`build --lock` writes it, its user keeps it beside the code that runs, and who is `--locked` to it loads nothing else,
wherever the bytes come from: a place that others write will do. Knows nothing of where entries are.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nanogpt_buckets import key as keys
from nanogpt_buckets.errors import CacheError, CorruptEntry, PlanError, UsageError
from nanogpt_buckets.files import read_file, replacing
from nanogpt_buckets.owners import doubted
from nanogpt_buckets.plan.bucket import Bucket
from nanogpt_buckets.store.document import check, parse, require_format
from nanogpt_buckets.store.manifest import BLOB, Blob, Manifest, bucket_of, is_digest

FORMAT = 1
_MAX_BYTES = 16 << 20
_OWN = "keep it where nobody else can write, for example in a checkout of your own"
_AGAIN = "take it from where it is kept, or write it anew: build --lock"


@dataclass(frozen=True)
class Locked:
    """One entry that may be loaded.

    Args:
        family: its family's digest.
        key: its key.
        manifest: sha256 of its manifest file.
        target: what it was compiled for.
        named: its bucket, as a key's parts name it.
        blobs: its files.
    """

    family: str
    key: str
    manifest: str
    target: str
    named: Mapping[str, Any]
    blobs: tuple[Blob, ...]

    @property
    def bucket(self) -> Bucket | None:
        """The bucket; None if only a newer release has such buckets."""
        return bucket_of(self.named)

    @property
    def size(self) -> int:
        """Of all blobs together, in bytes."""
        return sum(blob.size for blob in self.blobs)


@dataclass(frozen=True)
class LockFile:
    """What a lock file says, as it was when it was read.

    Args:
        path: where it was.
        families: the parts of each family, by its digest.
        entries: what may be loaded, in order.
        doubt: who else could have written it, if anybody could.
    """

    path: Path
    families: Mapping[str, Mapping[str, Any]]
    entries: tuple[Locked, ...]
    doubt: CacheError | None = None

    def of(self, family: str) -> list[Locked]:
        """Return the entries of one family."""
        return [entry for entry in self.entries if entry.family == family]

    def find(self, key: str) -> Locked | None:
        """Return the entry of this key, if there is one."""
        return next((entry for entry in self.entries if entry.key == key), None)

    def buckets(self, family: str, target: str | None = None) -> list[Bucket]:
        """Return the buckets of one family, for one target or any, that this release knows."""
        entries = [entry for entry in self.of(family) if target in (None, entry.target)]
        return sorted({entry.bucket for entry in entries if entry.bucket is not None})

    def vouch(self) -> None:
        """Raise an UntrustedStore if others could have written this file: then it vouches for nothing."""
        if self.doubt is not None:
            raise self.doubt

    def why_not(self, family: Mapping[str, Any]) -> str:
        """Say how the most alike of its families differs from another."""
        differences = (keys.difference(family, theirs) for theirs in self.families.values())
        nearest = min(differences, key=len, default=["it is empty"])
        return f"{self.path} locks nothing of this model, on this backend: {', '.join(nearest)}"


def read_lock(path: Path) -> LockFile:
    """Read a lock file.

    Raises:
        UsageError: there is none, or it cannot be read.
        CorruptEntry: it is not what `build --lock` writes.
        IncompatibleEntry: a newer release wrote it.
    """
    try:
        doubt = doubted(path, _OWN)
        return _parsed(path, read_file(path.resolve(), limit=_MAX_BYTES), doubt)
    except OSError as error:
        raise UsageError(f"the lock file {path} cannot be read: {error.strerror or error}") from error
    except CacheError as error:
        hint = _AGAIN if isinstance(error, CorruptEntry) else error.hint
        raise type(error)(f"the lock file {path} cannot be used: {error.message}", hint=hint) from error


def open_lock(path: Path) -> LockFile:
    """Return what a lock file that is to be written says now: nothing, if there is none.

    Raises:
        UsageError: there is no place for it.
        CacheError: it is something else, which is not replaced; see `read_lock`.
    """
    place = path.resolve().parent
    if not os.access(place, os.W_OK | os.X_OK):
        why = "cannot be written" if place.is_dir() else "is no directory"
        raise UsageError(f"the lock file {path} cannot be written: {place} {why}")
    return read_lock(path) if os.path.exists(path) else LockFile(path, {}, ())


def write_lock(path: Path, manifests: Sequence[Manifest], replaced: Callable[[Mapping[str, Any]], bool]) -> LockFile:
    """Write entries into a lock file, beside what it names, and return what it says then.

    Args:
        path: the file; made if there is none.
        manifests: of one family and target.
        replaced: whether a family of some parts has gone out of use with these entries, and goes out of the file.

    Raises:
        CacheError: the file cannot be written, or is none.
    """
    before = open_lock(path)
    added = [_locked(manifest) for manifest in manifests]
    families = {manifest.family: manifest.parts["family"] for manifest in manifests}
    targets, buckets = {entry.target for entry in added}, [entry.named for entry in added]

    def stays(entry: Locked) -> bool:
        if entry.target not in targets:
            return True
        return entry.named not in buckets if entry.family in families else not replaced(before.families[entry.family])

    entries = [*filter(stays, before.entries), *added]
    entries.sort(key=lambda entry: (entry.family, entry.target, entry.bucket or Bucket(1, 1), entry.key))
    named = {entry.family for entry in entries}
    known = {family: parts for family, parts in {**before.families, **families}.items() if family in named}
    after = replace(before, families=known, entries=tuple(entries))
    _write(path, after)
    return after


def _write(path: Path, content: LockFile) -> None:
    rows = [
        {"bucket": dict(entry.named), "family": entry.family, "key": entry.key, "manifest": entry.manifest,
         "target": entry.target, "bytes": entry.size,
         "blobs": [{"role": b.role, "sha256": b.sha256, "size": b.size} for b in entry.blobs]}
        for entry in content.entries
    ]  # fmt: skip
    document = {"format": FORMAT, "families": content.families, "entries": rows}
    text = json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    try:
        with replacing(path) as file:
            file.write(text.encode("utf-8"))
    except OSError as error:
        hint = "name another with --lock; what was built is kept"
        raise CacheError(f"the lock file {path} cannot be written: {error.strerror or error}", hint=hint) from error


def _parsed(path: Path, data: bytes, doubt: CacheError | None) -> LockFile:
    document = parse(data, "it", _MAX_BYTES)
    require_format(document, FORMAT, _LOCK, "it")
    check(document, _LOCK, "it")
    entries = tuple(_entry(row) for row in document["entries"])
    if any(keys.digest(parts) != family for family, parts in document["families"].items()):
        raise CorruptEntry("it names a family that is not the digest of its parts")
    if {entry.family for entry in entries} - document["families"].keys():
        raise CorruptEntry("it names an entry of no family")
    if len({entry.key for entry in entries}) < len(entries):
        raise CorruptEntry("it names a key twice")
    return LockFile(path, document["families"], entries, doubt)


def _locked(manifest: Manifest) -> Locked:
    parts = manifest.parts
    return Locked(manifest.family, manifest.key, manifest.digest, parts["target"], parts["bucket"], manifest.blobs)


def _entry(row: Mapping[str, Any]) -> Locked:
    blobs = tuple(Blob(**blob) for blob in row["blobs"])
    entry = Locked(row["family"], row["key"], row["manifest"], row["target"], row["bucket"], blobs)
    if row["bytes"] != entry.size:
        raise CorruptEntry(f"the sizes of {entry.key[:12]} are not those of its blobs")
    return entry


def _is_bucket(value: Any) -> bool:
    try:
        bucket_of(value)
    except (TypeError, AttributeError, PlanError):
        return False
    return True


_LOCK = {
    "format": int, "families": {str: dict},
    "entries": [
        {"bucket": _is_bucket, "family": is_digest, "key": is_digest, "manifest": is_digest, "target": str,
         "bytes": int, "blobs": [BLOB]}
    ],
}  # fmt: skip
