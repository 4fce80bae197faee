"""The store: entries under the names of what was compiled, their blobs under the digest of their content.

Whatever a tier gives back is judged here, once: format, names, digests, whether it was rejected. Published is what has
a manifest, so blobs come first and the manifest last. Knows nothing of compiling or loading, nor of what a plan means.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from nanogpt_buckets import key as keys
from nanogpt_buckets import settings
from nanogpt_buckets.errors import CacheError, CorruptEntry, UntrustedStore, UsageError
from nanogpt_buckets.store.directory import Directory
from nanogpt_buckets.store.entry import Found, Miss, Status, Verified, manifest_of
from nanogpt_buckets.store.manifest import (
    MAX_BYTES,
    Blob,
    Manifest,
    decode,
    encode_entry,
    encode_mark,
    is_digest,
    require_digest,
    why_rejected,
)
from nanogpt_buckets.store.tier import Tier
from nanogpt_buckets.store.vouch import PLACE, Trust

_USED_EVERY_S = 60.0


class Store:
    """The entries in a cache directory, and in layers below it, where nothing is written.

    What is in order counts before what is not, and a directory before the layers, in their order.

    Args:
        root: the cache directory; made, private, when something is first published.
        trust: what vouches for an entry.
        layers: further cache directories to look in.
    """

    def __init__(self, root: Path, trust: Trust = PLACE, layers: Iterable[Path] = ()) -> None:
        self.root = root
        self.trust = trust
        self.layers = tuple(Store(layer, trust) for layer in layers)
        self.directory = Directory(root, shared=trust.shared)
        self.tier: Tier = self.directory
        self._rejected: dict[str, str] = {}  # digest of a manifest -> why, where the store could not be told

    # --- reading ------------------------------------------------------------------------------------------------------

    def look(self, family: str, key: str, parts: Mapping[str, Any] | None = None) -> Found:
        """Read one manifest, and no blob; one with other key parts than those that are given is corrupt."""
        found = self._look_here(family, key, parts)
        for layer in self.layers:
            if isinstance(found, Manifest):
                break
            found = self._better(found, layer.look(family, key, parts))
        return found

    def _look_here(self, family: str, key: str, parts: Mapping[str, Any] | None = None) -> Found:
        try:
            data, doubt = self._manifest(entry_name(family, key))
            manifest = decode(data)
            if (manifest.family, manifest.key) != (family, key):
                raise CorruptEntry("the manifest belongs under another name")
            if parts is not None and (lines := keys.difference(parts, manifest.parts)):
                raise CorruptEntry(lines[0])
            why = self._why_rejected(manifest)
        except (OSError, CacheError) as error:
            return Miss.of(error, family, key)
        try:
            self.trust.judge(manifest, doubt)
        except CacheError as error:
            return replace(Miss.of(error, family, key), manifest=manifest)
        return Miss(Status.CORRUPT, family, key, f"rejected: {why}", manifest=manifest) if why else manifest

    def family(self, family: str) -> list[Found]:
        """Look at every entry of one family, by key; one miss without a key if the store cannot be believed."""
        try:
            found = self._look_at_all(family)
        except CacheError as error:
            if not (self.layers or isinstance(error, UntrustedStore)):
                raise
            found = [Miss.of(error, family)]
        for layer in self.layers:
            found = self._merged(found, layer, family)
        return found

    def entries(self) -> Iterator[Found]:
        """Look at every entry, also at those of layers, which may be the same once more."""
        yield from self._entries_here()
        for layer in self.layers:
            with contextlib.suppress(CacheError):
                yield from layer.entries()

    def _entries_here(self) -> Iterator[Found]:
        locked = self.trust.locked
        families = self.tier.names("entries") if locked is None else sorted(locked.families)
        for family in filter(is_digest, families):
            yield from self._look_at_all(family)

    def find(self, prefix: str) -> Found:
        """Return what is known of the one entry whose key begins so; a UsageError if several do, or none can."""
        if re.fullmatch(r"[0-9a-f]{1,64}", prefix) is None:
            raise UsageError(f"{prefix!r} is not the beginning of a key", hint="nanogpt-buckets cache ls")
        found = [entry for entry in self.entries() if entry.key.startswith(prefix)]
        if not found:
            place = settings.cache_dir_option(self.root)
            raise CacheError(f"no entry of {self.root} begins with {prefix}", hint=f"nanogpt-buckets cache ls{place}")
        if len(found) > 1:
            longer = ", ".join(entry.key[: len(prefix) + 8] for entry in found)
            raise UsageError(f"{len(found)} entries begin with {prefix}", hint=f"give more of one of: {longer}")
        return found[0]

    def glance(self, found: Found) -> Found:
        """Look whether the blobs of an entry are there and have the right size; no byte of them is read."""
        for blob in found.blobs if isinstance(found, Manifest) else ():
            size = self.tier.size(blob_name(blob.sha256))
            if size != blob.size:
                what = "is missing" if size is None else f"has {size} bytes, not {blob.size}"
                return Miss(Status.CORRUPT, found.family, found.key, f"{blob.role} ({blob.sha256[:12]}) {what}")
        return found

    def check(self, found: Found) -> Verified | Miss:
        """Read and verify every blob of an entry."""
        if isinstance(found, Miss):
            return found
        try:
            return self.read(found)
        except CacheError as error:
            return Miss.of(error, found.family, found.key)

    def read(self, manifest: Manifest) -> Verified:
        """Read every blob of an entry; raises as `read_blob`."""
        return Verified(manifest, {blob.role: self.read_blob(blob) for blob in manifest.blobs})

    def read_blob(self, blob: Blob) -> bytes:
        """Read a blob once and return exactly the bytes that were hashed.

        Raises:
            CorruptEntry: it is missing, or is not what its name says.
            TransientError: it cannot be read this time.
            UntrustedStore: others could have written the store.
        """
        try:
            return self._read_blob_here(blob)
        except CacheError:
            for layer in self.layers:
                with contextlib.suppress(CacheError):
                    return layer.read_blob(blob)
            raise

    def _read_blob_here(self, blob: Blob) -> bytes:
        try:
            # where others write, it is the digest that is believed
            data = self.tier.get(blob_name(blob.sha256), size=blob.size, anyone=self.trust.shared)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise CorruptEntry(f"{blob.role} ({blob.sha256[:12]}) is missing from the cache") from error
        if hashlib.sha256(data).hexdigest() != blob.sha256:
            raise CorruptEntry(f"{blob.role} ({blob.sha256[:12]}) is not what its name says")
        return data

    def error(self, miss: Miss) -> CacheError:
        """Return a miss as the error that it is."""
        entry = f"entry {miss.key[:12]} in {self.root} is {miss.status}: {miss.why or 'it is missing'}"
        names_the_place = miss.status in (Status.UNTRUSTED, Status.TRANSIENT)
        return miss.status.error(miss.why if names_the_place else entry, hint=miss.hint)

    # --- writing ------------------------------------------------------------------------------------------------------

    def publish(self, manifest: Manifest, blobs: Mapping[str, bytes]) -> Manifest:
        """Store an entry, or adopt the one that another process stored first; return what is in the store now.

        Raises:
            ValueError: the blobs by role are not the manifest's, or it could not be read back.
            IncompatibleEntry: a newer release has stored something under this key; it is left alone.
            UntrustedStore: others could have written the store.
            CacheError: it cannot be written; a TransientError if trying again may help.
        """
        data = encode_entry(manifest, blobs)
        stored = self._stored(manifest)
        if isinstance(stored, Verified):
            return stored.manifest
        for blob in manifest.blobs:
            self._put_blob(blob, blobs[blob.role])
        corrupt = stored.status is Status.CORRUPT
        replaced = self._damaged_blobs(manifest) if corrupt else []
        name = entry_name(manifest.family, manifest.key)
        if not self.tier.put(name, data, replace=corrupt):
            # Another process was first. If what it left is damaged already, ours replaces it.
            stored = self._stored(manifest)
            if isinstance(stored, Verified):
                return stored.manifest
            self.tier.put(name, data, replace=True)
        for left in (*replaced, mark_name(manifest.family, manifest.key)):
            with contextlib.suppress(CacheError):
                self.tier.delete(left)
        self._rejected.pop(manifest.digest, None)
        return manifest

    def reject(self, manifest: Manifest, why: str) -> None:
        """Record that an entry as it is now does not compute what it should, here if not in the store; never fails."""
        self._rejected[manifest.digest] = why
        with contextlib.suppress(OSError, CacheError):
            self.tier.put(mark_name(manifest.family, manifest.key), encode_mark(manifest.digest, why), replace=True)

    def mark_used(self, manifest: Manifest) -> None:
        """Note on an entry that it was loaded, at most once a minute, if the store can be written; never fails."""
        self.directory.touch(entry_name(manifest.family, manifest.key), _USED_EVERY_S)

    # --- files --------------------------------------------------------------------------------------------------------

    def entry_path(self, found: Found) -> Path:
        """Return where an entry's manifest is."""
        return self.directory.path(entry_name(found.family, found.key))

    def mark_path(self, found: Found) -> Path:
        """Return where the mark of a rejected entry is, if there is one."""
        return self.directory.path(mark_name(found.family, found.key))

    def blob_path(self, sha256: str) -> Path:
        """Return where a blob is."""
        return self.directory.path(blob_name(sha256))

    def blob_paths(self) -> list[Path]:
        """Return the path of every blob, whether or not a manifest names it."""
        found = ((p, name) for p in self.directory.names("blobs") for name in self.directory.names(f"blobs/{p}"))
        return [self.blob_path(name) for prefix, name in found if is_digest(name) and name.startswith(prefix)]

    # ------------------------------------------------------------------------------------------------------------------

    def _merged(self, found: list[Found], layer: Store, family: str) -> list[Found]:
        """Return the entries of a family with those of a layer below, by key, after the misses that have none."""
        try:
            below = layer.family(family)
        except CacheError as error:
            below = [Miss.of(error, family)]
        best = {entry.key: entry for entry in found if entry.key}
        for entry in below:
            if entry.key:
                best[entry.key] = self._better(best.get(entry.key, Miss(Status.ABSENT)), entry)
        return [*(entry for entry in (*found, *below) if not entry.key), *(best[key] for key in sorted(best))]

    def _better(self, found: Found, below: Found) -> Found:
        """Return what is of more use, what was found or what a layer below has; rejected here is rejected there."""
        if isinstance(below, Manifest) and not isinstance(found, Manifest):
            with contextlib.suppress(OSError, CacheError):
                if why := self._why_rejected(below):
                    return Miss(Status.CORRUPT, below.family, below.key, f"rejected: {why}", manifest=below)
            return below
        return below if isinstance(found, Miss) and found.status is Status.ABSENT else found

    def _manifest(self, name: str) -> tuple[bytes, UntrustedStore | None]:
        """Return the bytes of a manifest, and what speaks against believing them for where they are."""
        try:
            return self.tier.get(name, limit=MAX_BYTES), None
        except UntrustedStore as doubt:
            if not self.trust.shared:
                raise
            return self.tier.get(name, limit=MAX_BYTES, anyone=True), doubt

    def _look_at_all(self, family: str) -> list[Found]:
        if self.trust.locked is not None:  # nothing else counts, so nobody need list it
            found = [entry.key for entry in self.trust.locked.of(family)]
        else:
            names = self.tier.names(f"entries/{require_digest(family)}")
            found = [name.removesuffix(".json") for name in names if name.endswith(".json")]
        entries = [self._look_here(family, key) for key in found if is_digest(key)]
        return [entry for entry in entries if isinstance(entry, Manifest) or entry.status is not Status.ABSENT]

    def _why_rejected(self, manifest: Manifest) -> str | None:
        why = None
        with contextlib.suppress(FileNotFoundError):
            mark = self.tier.get(mark_name(manifest.family, manifest.key), limit=MAX_BYTES, anyone=self.trust.shared)
            why = why_rejected(mark, manifest.digest)
        return why or self._rejected.get(manifest.digest)

    def _stored(self, manifest: Manifest) -> Verified | Miss:
        """Return what is under this key: complete, ABSENT or CORRUPT; raise for all others."""
        found = self.check(self.look(manifest.family, manifest.key, manifest.parts))
        if isinstance(found, Miss) and found.status not in (Status.ABSENT, Status.CORRUPT):
            raise self.error(found)
        return found

    def _damaged_blobs(self, manifest: Manifest) -> list[str]:
        """Return the blobs of the entry about to be replaced that are not what their name says: of use to nobody."""
        before = manifest_of(self._look_here(manifest.family, manifest.key))
        damaged = []
        for blob in before.blobs if before else ():
            try:
                self._read_blob_here(blob)
            except CorruptEntry:
                damaged.append(blob_name(blob.sha256))
        return damaged

    def _put_blob(self, blob: Blob, data: bytes) -> None:
        name = blob_name(blob.sha256)
        try:
            self._read_blob_here(blob)
            self.directory.touch(name)  # young again: whoever is pruning will leave it
        except CorruptEntry:
            self.tier.put(name, data, replace=True)


def entry_name(family: str, key: str) -> str:
    """Return the name of a key's manifest."""
    return f"entries/{require_digest(family)}/{require_digest(key)}.json"


def mark_name(family: str, key: str) -> str:
    """Return the name of the mark that a key's entry was rejected."""
    return f"entries/{require_digest(family)}/{require_digest(key)}.rejected"


def blob_name(sha256: str) -> str:
    """Return the name of a blob."""
    return f"blobs/{require_digest(sha256)[:2]}/{sha256}"
