"""The store in a directory: manifests under the names of what was compiled, blobs under the digest of their content.

    CACHEDIR.TAG
    v1/entries/<family>/<key>.json    manifest: written last; the only commit point
    v1/blobs/cd/<sha256>              immutable
    v1/plans/<name>.json              named plans
    v1/locks/  v1/tmp/                never needed for correctness

A file is staged in v1/tmp and linked to its final name, so that a process killed anywhere leaves nothing half written,
and bytes that have a name are never changed. Knows nothing of compiling or loading, nor of what a plan means.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from nanogpt_buckets import key as keys
from nanogpt_buckets import settings
from nanogpt_buckets.errors import CacheError, CacheMiss, CorruptEntry, TransientError, UsageError
from nanogpt_buckets.files import list_names, read_file, read_verified, sweep, unlink
from nanogpt_buckets.store.answer import ERRORS, Answer, Status, answer_for
from nanogpt_buckets.store.lock import held
from nanogpt_buckets.store.manifest import (
    MAX_BYTES,
    Blob,
    Manifest,
    decode,
    encode_entry,
    is_digest,
    require_digest,
)
from nanogpt_buckets.store.tree import Tree
from nanogpt_buckets.store.trust import check_location

_STALE_SECONDS = 24 * 3600
_USED_EVERY_S = 60


class LocalStore:
    """A store in one directory, which other processes may read and write at the same time.

    Args:
        root: the cache directory; made, private, when something is first published.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.tree = Tree(root)

    def look(self, family: str, key: str, parts: Mapping[str, Any] | None = None) -> Answer:
        """Read one manifest, and no blob.

        Args:
            family: 64 hex digits.
            key: 64 hex digits.
            parts: the key parts wanted; a manifest with others is corrupt.
        """
        path = self.entry_path(family, key)
        try:
            check_location(self.root, path.parent)
            manifest = decode(read_file(path, limit=MAX_BYTES))
            if (manifest.family, manifest.key) != (family, key):
                raise CorruptEntry("the manifest belongs under another name")
            if parts is not None and (lines := keys.difference(parts, manifest.parts)):
                raise CorruptEntry(lines[0])
        except (OSError, CacheError) as error:
            return answer_for(key, error)
        return Answer(Status.WARM, key, manifest)

    def family(self, family: str) -> list[Answer]:
        """Look at every entry of one family, by key.

        Raises:
            TransientError: the directory cannot be listed this time.
        """
        names = list_names(self._family_path(family))
        found = (name.removesuffix(".json") for name in names if name.endswith(".json"))
        answers = [self.look(family, key) for key in found if is_digest(key)]
        return [answer for answer in answers if answer.status is not Status.ABSENT]

    def entries(self) -> Iterator[tuple[str, Answer]]:
        """Look at every entry; yields its family and what was found."""
        for family in filter(is_digest, list_names(self.tree.v1 / "entries")):
            for answer in self.family(family):
                yield family, answer

    def find(self, prefix: str) -> tuple[str, Answer]:
        """Return the family and what is known of the one entry whose key begins so.

        Raises:
            UsageError: the beginning is no hex digits, or several keys begin so.
            CacheError: none does.
        """
        if re.fullmatch(r"[0-9a-f]{1,64}", prefix) is None:
            raise UsageError(f"{prefix!r} is not the beginning of a key", hint="nanogpt-buckets cache ls")
        found = [(family, answer) for family, answer in self.entries() if answer.key.startswith(prefix)]
        if not found:
            place = settings.cache_dir_option(self.root)
            raise CacheError(f"no entry of {self.root} begins with {prefix}", hint=f"nanogpt-buckets cache ls{place}")
        if len(found) > 1:
            keys = ", ".join(answer.key[: len(prefix) + 8] for _, answer in found)
            raise UsageError(f"{len(found)} entries begin with {prefix}", hint=f"give more of one of: {keys}")
        return found[0]

    def mark_used(self, family: str, key: str) -> None:
        """Note on the manifest that it was loaded, at most once a minute, if the store can be written; never fails."""
        path = self.entry_path(family, key)
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _USED_EVERY_S:
                os.utime(path)

    def read_blob(self, blob: Blob) -> bytes:
        """Read a blob once and return exactly the bytes that were hashed.

        Raises:
            CorruptEntry: it is missing, or is not what its name says.
            TransientError: it cannot be read this time.
            UntrustedStore: others could have written the store.
        """
        path = self.blob_path(blob.sha256)
        check_location(self.root, path.parent)
        try:
            return read_verified(path, blob.sha256, blob.size)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise CorruptEntry(f"{blob.role} ({blob.sha256[:12]}) is missing from the cache") from error
        except OSError as error:
            raise TransientError(f"{path} cannot be read: {error.strerror or error}") from error

    def glance(self, answer: Answer) -> Answer:
        """Look whether the blobs of a WARM answer are there and have the right size; no byte of them is read."""
        for blob in answer.manifest.blobs if answer.manifest else ():
            size: int | None = None
            with contextlib.suppress(OSError):
                size = self.blob_path(blob.sha256).stat().st_size
            if size != blob.size:
                what = "is missing" if size is None else f"has {size} bytes, not {blob.size}"
                return Answer(Status.CORRUPT, answer.key, why=f"{blob.role} ({blob.sha256[:12]}) {what}")
        return answer

    def check(self, answer: Answer) -> Answer:
        """Read and verify every blob of a WARM answer; return it, or one that says what is wrong."""
        if answer.status is not Status.WARM or answer.manifest is None:
            return answer
        try:
            for blob in answer.manifest.blobs:
                self.read_blob(blob)
        except CacheError as error:
            return answer_for(answer.key, error)
        return answer

    def require(self, answer: Answer) -> Manifest:
        """Return the manifest of a WARM answer, and raise what any other says.

        Raises:
            CacheMiss: there is none.
            CacheError: the subclass that belongs to its status.
        """
        if answer.status is Status.WARM and answer.manifest is not None:
            return answer.manifest
        kind = ERRORS.get(answer.status, CacheMiss)
        why = answer.why or "it is missing"
        raise kind(f"entry {answer.key[:12]} in {self.root} is {answer.status}: {why}", hint=answer.hint)

    def publish(self, manifest: Manifest, blobs: Mapping[str, bytes]) -> Manifest:
        """Store an entry, or adopt the one that another process stored first.

        Args:
            manifest: names and digests.
            blobs: the content of each role.

        Returns:
            The manifest that is in the store now.

        Raises:
            ValueError: the blobs are not those of the manifest, or the manifest could not be read back.
            IncompatibleEntry: a newer release has stored something under this key; it is left alone.
            UntrustedStore: others could have written the store.
            CacheError: it cannot be written; a TransientError if trying again may help.
        """
        data = encode_entry(manifest, blobs)
        check_location(self.root)
        stored = self._settled(manifest)
        if stored.manifest is not None:
            return stored.manifest
        path = self.entry_path(manifest.family, manifest.key)
        with self.tree.writing():
            self.tree.prepare(path.parent)
            sweep(self.tree.v1 / "tmp", older_than_s=_STALE_SECONDS)
            for blob in manifest.blobs:
                self._put_blob(blob, blobs[blob.role])
            damaged = self._damaged_blobs(manifest) if stored.status is Status.CORRUPT else []
            if self.tree.put(path, data, 0o666, replace=stored.status is Status.CORRUPT):
                for left in damaged:
                    unlink(left)
                return manifest
            # Another process was first. If what it left is damaged already, ours replaces it.
            stored = self._settled(manifest)
            if stored.manifest is None:
                self.tree.put(path, data, 0o666, replace=True)
            return stored.manifest or manifest

    def _settled(self, manifest: Manifest) -> Answer:
        """Return what is under this key: a complete WARM answer, ABSENT or CORRUPT; raise for all others."""
        answer = self.check(self.look(manifest.family, manifest.key, manifest.parts))
        if answer.status not in (Status.WARM, Status.ABSENT, Status.CORRUPT):
            self.require(answer)
        return answer

    def _damaged_blobs(self, manifest: Manifest) -> list[Path]:
        """Return the blobs of the entry about to be replaced that are not what their name says: of use to nobody."""
        before = self.look(manifest.family, manifest.key).manifest
        return [self.blob_path(blob.sha256) for blob in before.blobs if self._is_damaged(blob)] if before else []

    def _is_damaged(self, blob: Blob) -> bool:
        try:
            self.read_blob(blob)
        except CacheError as error:
            return isinstance(error, CorruptEntry)
        return False

    def _put_blob(self, blob: Blob, data: bytes) -> None:
        path = self.blob_path(blob.sha256)
        self.tree.make_directory(path.parent)
        damaged = False
        try:
            read_verified(path, blob.sha256, blob.size)
            with contextlib.suppress(OSError):
                os.utime(path)  # young again: whoever is pruning will leave it
            return
        except FileNotFoundError:
            pass
        except CorruptEntry:
            damaged = True
        self.tree.put(path, data, 0o444, replace=damaged)

    def prepare(self) -> None:
        """Make the directories that writing needs, to find out early whether it is possible.

        Raises:
            UntrustedStore: others could have written the store.
            CacheError: it cannot be written.
        """
        check_location(self.root)
        with self.tree.writing():
            self.tree.prepare()
            if not os.access(self.tree.v1 / "tmp", os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    @contextlib.contextmanager
    def compiling(self, key: str, timeout_s: float, cancelled: Callable[[], bool] = lambda: False) -> Iterator[bool]:
        """Keep others from compiling the same key meanwhile; yields whether that worked, and never fails for it.

        Args:
            key: 64 hex digits.
            timeout_s: how long to wait for another process.
            cancelled: asked while waiting; True ends it.
        """
        with self.locked(require_digest(key), timeout_s, cancelled) as worked:
            yield worked

    @contextlib.contextmanager
    def locked(self, name: str, timeout_s: float, cancelled: Callable[[], bool] = lambda: False) -> Iterator[bool]:
        """Hold one of the store's locks; yields whether that worked, and never fails for it."""
        path = self.tree.v1 / "locks" / f"{name}.lock"
        try:
            check_location(self.root, path.parent)
            self.tree.prepare()
        except (OSError, CacheError):
            yield False
            return
        with held(path, mode=0o600 | self.tree.mode() & 0o666, timeout_s=timeout_s, cancelled=cancelled) as worked:
            yield worked

    def leftovers(self) -> list[Path]:
        """Return files that only a running process needs: staged ones and locks."""
        return [self.tree.v1 / name / file for name in ("tmp", "locks") for file in list_names(self.tree.v1 / name)]

    def blob_paths(self) -> list[Path]:
        """Return the path of every blob, whether or not a manifest names it."""
        blobs = self.tree.v1 / "blobs"
        found = ((prefix, name) for prefix in list_names(blobs) for name in list_names(blobs / prefix))
        return [self.blob_path(name) for prefix, name in found if is_digest(name) and name.startswith(prefix)]

    def _family_path(self, family: str) -> Path:
        return self.tree.v1 / "entries" / require_digest(family)

    def entry_path(self, family: str, key: str) -> Path:
        """Return where a key's manifest is."""
        return self._family_path(family) / f"{require_digest(key)}.json"

    def blob_path(self, sha256: str) -> Path:
        """Return where a blob is."""
        return self.tree.v1 / "blobs" / require_digest(sha256)[:2] / sha256
