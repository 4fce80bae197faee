"""The store in a directory: manifests under the names of what was compiled, blobs under the digest of their content.

    CACHEDIR.TAG
    v1/entries/<family>/<key>.json    manifest: written last; the only commit point
    v1/entries/<family>/<key>.rejected    that this entry did not compute what it should where it was loaded
    v1/blobs/cd/<sha256>              immutable
    v1/plans/<name>.json              named plans
    v1/locks/  v1/tmp/                never needed for correctness

A file is staged in v1/tmp and linked to its final name, so that a process killed anywhere leaves nothing half written,
and bytes that have a name are never changed. Knows nothing of compiling or loading, nor of what a plan means.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from nanogpt_buckets import key as keys
from nanogpt_buckets import settings
from nanogpt_buckets.errors import CacheError, CacheMiss, CorruptEntry, UntrustedStore, UsageError
from nanogpt_buckets.files import list_names, sweep, unlink
from nanogpt_buckets.store.answer import ERRORS, Answer, Status, answer_for
from nanogpt_buckets.store.lock import held
from nanogpt_buckets.store.manifest import (
    MAX_BYTES,
    Blob,
    Manifest,
    decode,
    encode,
    encode_entry,
    encode_mark,
    is_digest,
    require_digest,
    why_rejected,
)
from nanogpt_buckets.store.tree import Tree
from nanogpt_buckets.store.trust import check_file, check_location, read

_STALE_SECONDS = 24 * 3600
_USED_EVERY_S = 60
_MARK = ".rejected"


class LocalStore:
    """A store in one directory, which other processes may read and write at the same time.

    Args:
        root: the cache directory; made, private, when something is first published.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.tree = Tree(root)
        self._rejected: dict[str, str] = {}  # digest of a manifest -> why, where the store could not be told

    def look(self, family: str, key: str, parts: Mapping[str, Any] | None = None) -> Answer:
        """Read one manifest, and no blob; one with other key parts than those that are given is corrupt."""
        try:
            data = read(self.root, self.entry_path(family, key), limit=MAX_BYTES)
            manifest = decode(data)
            if (manifest.family, manifest.key) != (family, key):
                raise CorruptEntry("the manifest belongs under another name")
            if parts is not None and (lines := keys.difference(parts, manifest.parts)):
                raise CorruptEntry(lines[0])
            why = self._why_rejected(family, key, hashlib.sha256(data).hexdigest())
        except (OSError, CacheError) as error:
            return answer_for(key, error)
        return Answer(Status.CORRUPT, key, manifest, f"rejected: {why}") if why else Answer(Status.WARM, key, manifest)

    def _why_rejected(self, family: str, key: str, manifest: str) -> str | None:
        why = None
        with contextlib.suppress(FileNotFoundError):
            why = why_rejected(read(self.root, self.mark_path(family, key), limit=MAX_BYTES), manifest)
        return why or self._rejected.get(manifest)

    def reject(self, manifest: Manifest, why: str) -> None:
        """Record that an entry as it is now does not compute what it should, here if not in the store; never fails."""
        name = hashlib.sha256(encode(manifest)).hexdigest()
        self._rejected[name] = why
        path = self.mark_path(manifest.family, manifest.key)
        with contextlib.suppress(OSError, CacheError):
            check_location(self.root, path.parent)
            self.tree.prepare()
            self.tree.put(path, encode_mark(name, why), 0o666, replace=True)

    def family(self, family: str) -> list[Answer]:
        """Look at every entry of one family, by key; one answer without a key if the store cannot be believed.

        Raises:
            TransientError: the directory cannot be listed this time.
        """
        try:
            return self._look_at_all(family)
        except UntrustedStore as error:
            return [answer_for("", error)]

    def _look_at_all(self, family: str) -> list[Answer]:
        names = self._names(self._family_path(family))
        found = (name.removesuffix(".json") for name in names if name.endswith(".json"))
        answers = [self.look(family, key) for key in found if is_digest(key)]
        return [answer for answer in answers if answer.status is not Status.ABSENT]

    def entries(self) -> Iterator[tuple[str, Answer]]:
        """Look at every entry; yields its family and what was found."""
        for family in filter(is_digest, self._names(self.tree.v1 / "entries")):
            for answer in self._look_at_all(family):
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
        try:
            data = read(self.root, self.blob_path(blob.sha256), size=blob.size)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise CorruptEntry(f"{blob.role} ({blob.sha256[:12]}) is missing from the cache") from error
        if hashlib.sha256(data).hexdigest() != blob.sha256:
            raise CorruptEntry(f"{blob.role} ({blob.sha256[:12]}) is not what its name says")
        return data

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
        entry = f"entry {answer.key[:12]} in {self.root} is {answer.status}: {answer.why or 'it is missing'}"
        at_fault = answer.why if answer.status in (Status.UNTRUSTED, Status.TRANSIENT) else entry  # it names the place
        raise ERRORS.get(answer.status, CacheMiss)(at_fault, hint=answer.hint)

    def publish(self, manifest: Manifest, blobs: Mapping[str, bytes]) -> Manifest:
        """Store an entry, or adopt the one that another process stored first; return what is in the store now.

        Raises:
            ValueError: the blobs by role are not the manifest's, or it could not be read back.
            IncompatibleEntry: a newer release has stored something under this key; it is left alone.
            UntrustedStore: others could have written the store.
            CacheError: it cannot be written; a TransientError if trying again may help.
        """
        data = encode_entry(manifest, blobs)
        stored = self._settled(manifest)
        if stored.status is Status.WARM and stored.manifest is not None:
            return stored.manifest
        path = self.entry_path(manifest.family, manifest.key)
        folders = {path.parent, *(self.blob_path(blob.sha256).parent for blob in manifest.blobs)}
        check_location(self.root, *folders)
        with self.tree.writing():
            self.tree.prepare(*folders)
            sweep(self.tree.v1 / "tmp", older_than_s=_STALE_SECONDS)
            for blob in manifest.blobs:
                self._put_blob(blob, blobs[blob.role])
            replaced = self._damaged_blobs(manifest) if stored.status is Status.CORRUPT else []
            if not self.tree.put(path, data, 0o666, replace=stored.status is Status.CORRUPT):
                # Another process was first. If what it left is damaged already, ours replaces it.
                stored = self._settled(manifest)
                if stored.status is Status.WARM and stored.manifest is not None:
                    return stored.manifest
                self.tree.put(path, data, 0o666, replace=True)
            for left in (*replaced, self.mark_path(manifest.family, manifest.key)):
                unlink(left)
            self._rejected.pop(hashlib.sha256(data).hexdigest(), None)
            return manifest

    def _settled(self, manifest: Manifest) -> Answer:
        """Return what is under this key: a complete WARM answer, ABSENT or CORRUPT; raise for all others."""
        answer = self.check(self.look(manifest.family, manifest.key, manifest.parts))
        if answer.status not in (Status.WARM, Status.ABSENT, Status.CORRUPT):
            self.require(answer)
        return answer

    def _damaged_blobs(self, manifest: Manifest) -> list[Path]:
        """Return the blobs of the entry about to be replaced that are not what their name says: of use to nobody."""
        before = self.look(manifest.family, manifest.key).manifest
        damaged = []
        for blob in before.blobs if before else ():
            try:
                self.read_blob(blob)
            except CorruptEntry:
                damaged.append(self.blob_path(blob.sha256))
        return damaged

    def _put_blob(self, blob: Blob, data: bytes) -> None:
        path = self.blob_path(blob.sha256)
        try:
            self.read_blob(blob)
            with contextlib.suppress(OSError):
                os.utime(path)  # young again: whoever is pruning will leave it
        except CorruptEntry:
            self.tree.put(path, data, 0o444, replace=os.path.lexists(path))

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
    def locked(self, name: str, timeout_s: float, cancelled: Callable[[], bool] = lambda: False) -> Iterator[bool]:
        """Keep others from what bears a name meanwhile; yields whether that worked, and never fails for it.

        `cancelled` is asked while waiting for another process; True ends it.
        """
        path = self.tree.v1 / "locks" / f"{name}.lock"
        try:
            check_location(self.root)
            self.tree.prepare()
            check_file(self.root, path)
        except (OSError, CacheError):
            yield False
            return
        with held(path, mode=0o600 | self.tree.mode() & 0o666, timeout_s=timeout_s, cancelled=cancelled) as worked:
            yield worked

    def leftovers(self) -> list[Path]:
        """Return files that only a running process needs: staged ones and locks."""
        places = (self.tree.v1 / "tmp", self.tree.v1 / "locks")
        return [place / file for place in places for file in self._names(place)]

    def blob_paths(self) -> list[Path]:
        """Return the path of every blob, whether or not a manifest names it."""
        blobs = self.tree.v1 / "blobs"
        found = ((prefix, name) for prefix in self._names(blobs) for name in self._names(blobs / prefix))
        return [self.blob_path(name) for prefix, name in found if is_digest(name) and name.startswith(prefix)]

    def _names(self, directory: Path) -> list[str]:
        check_location(self.root, directory)
        return list_names(directory)

    def _family_path(self, family: str) -> Path:
        return self.tree.v1 / "entries" / require_digest(family)

    def entry_path(self, family: str, key: str) -> Path:
        """Return where a key's manifest is."""
        return self._family_path(family) / f"{require_digest(key)}.json"

    def mark_path(self, family: str, key: str) -> Path:
        """Return where the mark of a key's rejected entry is, if there is one."""
        return self.entry_path(family, key).with_suffix(_MARK)

    def blob_path(self, sha256: str) -> Path:
        """Return where a blob is."""
        return self.tree.v1 / "blobs" / require_digest(sha256)[:2] / sha256
