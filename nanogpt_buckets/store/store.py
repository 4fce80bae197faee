"""The store: the entries of a cache directory, those of layers below it, and where their files are.

Knows nothing of compiling or loading, nor of what a plan means.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from nanogpt_buckets import settings
from nanogpt_buckets.errors import CacheError, UntrustedStore, UsageError
from nanogpt_buckets.store.directory import Directory
from nanogpt_buckets.store.entries import Entries, blob_name, entry_name, mark_name
from nanogpt_buckets.store.entry import Found, Miss, Status
from nanogpt_buckets.store.manifest import Blob, Manifest, is_digest
from nanogpt_buckets.store.vouch import PLACE, Trust

_USED_EVERY_S = 60.0


class Store(Entries):
    """The entries in a cache directory, and in layers below it, where nothing is written.

    What is in order counts before what is not, and a directory before the layers, in their order.

    Args:
        root: the cache directory; made, private, when something is first published.
        trust: what vouches for an entry.
        layers: further cache directories to look in.
    """

    def __init__(self, root: Path, trust: Trust = PLACE, layers: Iterable[Path] = ()) -> None:
        self.root = root
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
        return found

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
        try:
            return self._read_blob_here(blob)
        except CacheError:
            for layer in self.layers:
                with contextlib.suppress(CacheError):
                    return layer.read_blob(blob)
            raise

    # --- writing ------------------------------------------------------------------------------------------------------

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
