"""The store: the entries of a cache directory, of layers below it and of a remote, and where their files are.

Knows nothing of compiling or loading, nor of what a plan means.
"""

from __future__ import annotations

import contextlib
import logging
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nanogpt_buckets import settings
from nanogpt_buckets.errors import CacheError, UntrustedStore, UsageError
from nanogpt_buckets.store.directory import Directory
from nanogpt_buckets.store.entries import Entries, blob_name, entry_name, mark_name, signature_name
from nanogpt_buckets.store.entry import CACHE, LAYER, REMOTE, Found, Miss, Status, Verified
from nanogpt_buckets.store.manifest import Blob, Manifest, is_digest
from nanogpt_buckets.store.tier import Gathered
from nanogpt_buckets.store.vouch import PLACE, Trust

log = logging.getLogger(__name__)

_USED_EVERY_S = 60.0
# Any other name is a newer release's.
_SIGNATURE = re.compile(r"entries/[0-9a-f]{64}/[0-9a-f]{64}[.][0-9a-f]{16}[.]sig")
# What a remote lacks is not asked for again at once; where it does not answer, each time costs ten seconds.
_SILENT_S = 60.0


class Store(Entries):
    """The entries in a cache directory, and in layers below it, where nothing is written.

    What is in order counts before what is not, and a directory before the layers, in their order.

    Args:
        root: the cache directory; made, private, when something is first published.
        trust: what vouches for an entry.
        layers: further cache directories to look in.
        remote: where to ask, once told to, for what is in none of these; what is read there is then kept here.
        writes: whether what is published here is published there too.
    """

    def __init__(
        self,
        root: Path,
        trust: Trust = PLACE,
        layers: Iterable[Path] = (),
        remote: Entries | None = None,
        writes: bool = False,
    ) -> None:
        self.root = root
        self.remote = remote
        self._writes = writes
        self._asks = False
        self._far: dict[str, dict[str, Manifest]] = {}  # family -> key -> what the remote has
        self._silent_until = 0.0
        self.layers = tuple(Store(layer, trust) for layer in layers)
        self.directory = Directory(root, shared=trust.shared)
        super().__init__(self.directory, trust)

    # --- reading ------------------------------------------------------------------------------------------------------

    def look(self, family: str, key: str, parts: Mapping[str, Any] | None = None) -> Found:
        """Read one manifest, and no blob; one with other key parts than those that are given is corrupt."""
        found = self._look_here(family, key, parts)
        for layer in self.layers:
            if isinstance(found, Manifest):
                break
            found = self._better(found, layer.look(family, key, parts))
        if not isinstance(found, Manifest) and (there := self._remote_family(family).get(key)) is not None:
            found = self._better(found, there)
        return found

    def family(self, family: str) -> list[Found]:
        """Look at every entry of one family, by key; one miss without a key if the store cannot be believed."""
        try:
            found = self._look_at_all(family)
        except CacheError as error:
            if not (self.layers or self._asks or isinstance(error, UntrustedStore)):
                raise
            found = [Miss.of(error, family)]
        for layer in self.layers:
            found = self._merged(found, self._layer_family(layer, family))
        there = self._remote_family(family)
        here = {entry.key for entry in found if isinstance(entry, Manifest)}
        return found if there.keys() <= here else self._merged(found, list(there.values()))

    def ask(self) -> bool:
        """Let the remote be asked, once more if it was before; False if there is none, or that was a moment ago."""
        if self.remote is None or time.monotonic() < self._silent_until:
            return False
        self._asks, self._silent_until = True, time.monotonic() + _SILENT_S
        self._far.clear()
        return True

    def entries(self) -> Iterator[Found]:
        """Look at every entry, also at those of layers, which may be the same once more."""
        yield from super().entries()
        for layer in self.layers:
            with contextlib.suppress(CacheError):
                yield from layer.entries()

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

    def read_blob(self, blob: Blob) -> bytes:
        """Read a blob once and return exactly the bytes that were hashed.

        Raises:
            CorruptEntry: it is missing, or is not what its name says.
            TransientError: it cannot be read this time.
            UntrustedStore: others could have written the store.
        """
        return self._fetch(blob)[0]

    def read(self, manifest: Manifest) -> Verified:
        """Read every blob of an entry; what had to be asked for is kept here, if it can be. Raises as `read_blob`."""
        fetched = {blob.role: self._fetch(blob) for blob in manifest.blobs}
        blobs, tiers = {role: data for role, (data, _) in fetched.items()}, {tier for _, tier in fetched.values()}
        entry = Verified(manifest, blobs, tier=next((t for t in (REMOTE, LAYER) if t in tiers), CACHE))
        if self.remote is not None and entry.tier == REMOTE:
            try:
                Entries(self.directory, self.trust).publish(manifest, blobs, self.remote.signature(manifest))
            except (CacheError, ValueError) as error:
                log.warning("entry %s of %s is used and not kept: %s", manifest.key[:12], self.remote.tier, error)
        return entry

    def _fetch(self, blob: Blob) -> tuple[bytes, str]:
        """Return a blob, and the tier that had it; what the first of them said if none had."""
        try:
            return self._read_blob_here(blob), CACHE
        except CacheError:
            for tier, below in (*((LAYER, layer) for layer in self.layers), (REMOTE, self.remote)):
                if below is not None:
                    with contextlib.suppress(CacheError):
                        return below.read_blob(blob), tier
            if not self.tier.remembers_s:
                raise
        return super().read_blob(blob), CACHE

    # --- writing ------------------------------------------------------------------------------------------------------

    def publish(self, manifest: Manifest, blobs: Mapping[str, bytes], signature: bytes | None = None) -> Manifest:
        """Store an entry here, and in the remote where that is written; raises as `Entries.publish` of what is here.

        Without weights inside: to have those elsewhere, they are pushed.
        """
        stored = super().publish(manifest, blobs, signature)
        if self._writes and self.remote is not None and stored == manifest and not manifest.contains_weights:
            try:
                self.remote.publish(manifest, blobs, self.signature(manifest))
            except CacheError as error:
                log.warning("entry %s was not published: %s", manifest.key[:12], error.message)
        return stored

    def mark_used(self, manifest: Manifest) -> None:
        """Note on an entry that it was loaded, at most once a minute, if the store can be written; never fails."""
        self.directory.touch(entry_name(manifest.family, manifest.key), _USED_EVERY_S)

    # --- files --------------------------------------------------------------------------------------------------------

    def signature_path(self, manifest: Manifest) -> Path:
        """Return where the signature on a manifest is, if there is one."""
        return self.directory.path(signature_name(manifest.family, manifest.key, manifest.digest))

    def signature_paths(self) -> list[Path]:
        """Return the path of every signature, whether or not there is such a manifest."""
        families = (f"entries/{family}" for family in self.directory.names("entries") if is_digest(family))
        found = (f"{folder}/{name}" for folder in families for name in self.directory.names(folder))
        return [self.directory.path(name) for name in found if _SIGNATURE.fullmatch(name)]

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

    def _remote_family(self, family: str) -> dict[str, Manifest]:
        """Return what the remote has of a family, by key, if it is asked; trouble there is said, and is no trouble."""
        if self.remote is None or not self._asks:
            return {}
        if family not in self._far:
            try:
                found = self.remote.family(family)
            except CacheError as error:
                log.warning("%s; going on without", error.message)
                self._asks = False
                return {}
            for why in sorted({entry.why for entry in found if isinstance(entry, Miss)}):
                log.warning("in %s: %s", self.remote.tier, why)
            self._far[family] = {entry.key: entry for entry in found if isinstance(entry, Manifest)}
        return self._far[family]

    def _layer_family(self, layer: Store, family: str) -> list[Found]:
        try:
            return layer.family(family)
        except CacheError as error:
            return [Miss.of(error, family)]

    def _merged(self, found: list[Found], below: Sequence[Found]) -> list[Found]:
        """Return the entries of a family with those from below, by key, after the misses that have none."""
        best = {entry.key: entry for entry in found if entry.key}
        for entry in below:
            if entry.key:
                best[entry.key] = self._better(best.get(entry.key, Miss(Status.ABSENT)), entry)
        return [*(entry for entry in (*found, *below) if not entry.key), *(best[key] for key in sorted(best))]

    def _better(self, found: Found, below: Found) -> Found:
        """Return what is of more use, what was found or what a layer below has; rejected here is rejected there."""
        if isinstance(below, Manifest) and not isinstance(found, Manifest):
            with contextlib.suppress(OSError, CacheError):
                if why := self._why_rejected(below, Gathered()):
                    return Miss(Status.CORRUPT, below.family, below.key, f"rejected: {why}", manifest=below)
            return below
        return below if isinstance(found, Miss) and found.status is Status.ABSENT else found
