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
import hashlib
import os
import re
import stat
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import filelock

from nanogpt_buckets import key as keys
from nanogpt_buckets.errors import (
    CacheError,
    CorruptEntry,
    IncompatibleEntry,
    TransientError,
    UntrustedStore,
    UsageError,
)
from nanogpt_buckets.store.manifest import MAX_BYTES, Blob, Manifest, decode, encode, is_digest, parse
from nanogpt_buckets.store.trust import check_location

_SIGNATURE = b"Signature: 8a477f597d28d172789f06886806bc55\n# This directory holds what nanogpt-buckets compiled.\n"
_STALE_SECONDS = 24 * 3600
_PLAN_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")
_HINT = "choose another directory with --cache-dir or NANOGPT_BUCKETS_CACHE_DIR"

_NO_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})
# Trying again will not help; anything else may pass.
_LASTING = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR})
_READ_FLAGS = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_NEW_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)


class Status(StrEnum):
    """What a look into the store can answer. Only CORRUPT is ever replaced; TRANSIENT says nothing at all."""

    WARM = "warm"
    ABSENT = "missing"
    TRANSIENT = "transient"
    CORRUPT = "corrupt"
    INCOMPATIBLE = "incompatible"
    UNTRUSTED = "untrusted"


_STATUS_OF = {IncompatibleEntry: Status.INCOMPATIBLE, UntrustedStore: Status.UNTRUSTED, CorruptEntry: Status.CORRUPT}


@dataclass(frozen=True)
class Answer:
    """What is known of one key; `manifest` only when WARM, `why` when it is neither WARM nor ABSENT."""

    status: Status
    key: str
    manifest: Manifest | None = None
    why: str = ""


@dataclass(frozen=True)
class Problem:
    """A damaged file; `path` is relative to the root."""

    path: str
    what: str


@dataclass(frozen=True)
class Verification:
    """What `verify` read; `bytes` counts blobs."""

    entries: int
    blobs: int
    bytes: int
    problems: tuple[Problem, ...]


class LocalStore:
    """A store in one directory, which other processes may read and write at the same time.

    Args:
        root: the cache directory; made, private, when something is first published.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._v1 = root / "v1"

    # reading

    def look(self, family: str, key: str, parts: Mapping[str, Any] | None = None) -> Answer:
        """Read one manifest, and no blob.

        Args:
            family: 64 hex digits.
            key: 64 hex digits.
            parts: the key parts wanted; a manifest with others is corrupt.
        """
        path = self._entry_path(family, key)
        try:
            check_location(self.root, path.parent)
            manifest = decode(_read(path))
            if (manifest.family, manifest.key) != (family, key):
                raise CorruptEntry("the manifest belongs under another name")
            if parts is not None and (lines := keys.difference(parts, manifest.parts)):
                raise CorruptEntry(lines[0])
        except (OSError, CacheError) as error:
            return _answer(key, error)
        return Answer(Status.WARM, key, manifest)

    def family(self, family: str) -> list[Answer]:
        """Look at every entry of one family, by key.

        Raises:
            TransientError: the directory cannot be listed this time.
        """
        names = _names(self._family_path(family))
        found = (name.removesuffix(".json") for name in names if name.endswith(".json"))
        answers = [self.look(family, key) for key in found if is_digest(key)]
        return [answer for answer in answers if answer.status is not Status.ABSENT]

    def entries(self) -> Iterator[Answer]:
        """Look at every entry of every family."""
        for _, answer in self._entries():
            yield answer

    def _entries(self) -> Iterator[tuple[str, Answer]]:
        for family in filter(is_digest, _names(self._v1 / "entries")):
            for answer in self.family(family):
                yield family, answer

    def read_blob(self, blob: Blob) -> bytes:
        """Read a blob once and return exactly the bytes that were hashed.

        Raises:
            CorruptEntry: it is missing, or is not what its name says.
            TransientError: it cannot be read this time.
            UntrustedStore: others could have written the store.
        """
        path = self._blob_path(blob.sha256)
        check_location(self.root, path.parent)
        try:
            return _read_verified(path, blob)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise CorruptEntry(f"{blob.role} ({blob.sha256[:12]}) is missing from the cache") from error
        except OSError as error:
            raise TransientError(f"{path} cannot be read: {error.strerror or error}") from error

    def check(self, answer: Answer) -> Answer:
        """Read and verify every blob of a WARM answer; return it, or one that says what is wrong."""
        try:
            for blob in answer.manifest.blobs if answer.manifest else ():
                self.read_blob(blob)
        except CacheError as error:
            return _answer(answer.key, error)
        return answer

    # writing

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
        data = _checked(manifest, blobs)
        check_location(self.root)
        with self._writing():
            self._prepare(self._family_path(manifest.family))
            self._sweep()
            stored = self._settled(manifest)
            if stored.manifest is not None:
                return stored.manifest
            for blob in manifest.blobs:
                self._put_blob(blob, blobs[blob.role])
            path = self._entry_path(manifest.family, manifest.key)
            if self._put(path, data, 0o666, replace=stored.status is Status.CORRUPT):
                return manifest
            # Another process was first. If what it left is damaged already, ours replaces it.
            stored = self._settled(manifest)
            if stored.manifest is None:
                self._put(path, data, 0o666, replace=True)
            return stored.manifest or manifest

    def _settled(self, manifest: Manifest) -> Answer:
        """Return what is under this key: a complete WARM answer, ABSENT or CORRUPT; raise for all others."""
        answer = self.check(self.look(manifest.family, manifest.key, manifest.parts))
        for kind, status in _STATUS_OF.items():
            if answer.status is status is not Status.CORRUPT:
                raise kind(answer.why)
        if answer.status is Status.TRANSIENT:
            raise TransientError(f"{self.root} cannot be read: {answer.why}", hint=_HINT)
        return answer

    def _put_blob(self, blob: Blob, data: bytes) -> None:
        path = self._blob_path(blob.sha256)
        self._make_directory(path.parent)
        damaged = False
        try:
            _read_verified(path, blob)
            return
        except FileNotFoundError:
            pass
        except CorruptEntry:
            damaged = True
        self._put(path, data, 0o444, replace=damaged)

    def _put(self, path: Path, data: bytes, mode: int, *, replace: bool) -> bool:
        """Give new bytes a name in one step; return False, and change nothing, if the name is taken."""
        staged = self._v1 / "tmp" / uuid.uuid4().hex
        try:
            _write_new(staged, data, mode & stat.S_IMODE(self.root.stat().st_mode))
            if replace:
                os.replace(staged, path)
            else:
                _move_to_absent(staged, path)
        except FileExistsError:
            return False
        finally:
            _unlink(staged)
        _sync_directory(path.parent)
        return True

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            kind = CacheError if error.errno in _LASTING else TransientError
            raise kind(f"{self.root} cannot be written: {error.strerror or error}", hint=_HINT) from error

    def _prepare(self, *further: Path) -> None:
        """Make the directories, those given included, and the tag that keeps backups away."""
        if not self.root.is_dir():
            self.root.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):
                self.root.mkdir(0o700)
        names = ("entries", "blobs", "plans", "locks", "tmp")
        for directory in (self._v1, *(self._v1 / name for name in names), *further):
            self._make_directory(directory)
        tag = self.root / "CACHEDIR.TAG"
        if not tag.exists():
            self._put(tag, _SIGNATURE, 0o666, replace=False)

    def _make_directory(self, directory: Path) -> None:
        with contextlib.suppress(FileExistsError):
            directory.mkdir(0o700)
            _sync_directory(directory.parent)
        # asked again of one that exists: whoever made it may have been killed before this line
        wanted, found = self.root.stat(), directory.stat()
        if stat.S_IMODE(found.st_mode) != stat.S_IMODE(wanted.st_mode):
            with contextlib.suppress(OSError):
                directory.chmod(stat.S_IMODE(wanted.st_mode))

    def _sweep(self) -> None:
        """Remove what killed processes staged long ago."""
        oldest = time.time() - _STALE_SECONDS
        with contextlib.suppress(OSError), os.scandir(self._v1 / "tmp") as found:
            for file in found:
                with contextlib.suppress(OSError):
                    if file.stat(follow_symlinks=False).st_mtime < oldest:
                        os.unlink(file.path)

    # plans

    def save_plan(self, name: str, plan: dict[str, Any]) -> None:
        """Store a named plan (plain JSON without floats), whatever was under that name.

        Raises:
            UsageError: the name is not a plain word, or the plan is too large.
            CacheError: it cannot be written.
        """
        path = self._plan_path(name)
        data = keys.canonical_json(plan) + b"\n"
        try:
            parse(data, "the plan")
        except CorruptEntry as error:
            raise UsageError(f"plan {name!r} cannot be stored: {error}") from error
        check_location(self.root, path.parent)
        with self._writing():
            self._prepare()
            self._put(path, data, 0o666, replace=True)

    def load_plan(self, name: str) -> dict[str, Any] | None:
        """Return a named plan, or None if there is none.

        Raises:
            UsageError: the name is not a plain word.
            CorruptEntry: the file is not plain JSON.
            TransientError: it cannot be read this time.
        """
        path = self._plan_path(name)
        check_location(self.root, path.parent)
        try:
            return parse(_read(path), f"plan {name!r}")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise TransientError(f"{path} cannot be read: {error.strerror or error}") from error

    def plan_names(self) -> list[str]:
        """Return the names of all plans, sorted."""
        names = [name.removesuffix(".json") for name in _names(self._v1 / "plans") if name.endswith(".json")]
        return [name for name in names if _PLAN_NAME.fullmatch(name)]

    @contextlib.contextmanager
    def compiling(self, key: str, timeout_s: float) -> Iterator[bool]:
        """Keep others from compiling the same key meanwhile; yields whether that worked, and never fails for it.

        Args:
            key: 64 hex digits.
            timeout_s: how long to wait for another process.
        """
        path = self._v1 / "locks" / f"{_digest(key)}.lock"
        held = contextlib.ExitStack()
        try:
            check_location(self.root)
            self._prepare()
            mode = 0o600 | stat.S_IMODE(self.root.stat().st_mode) & 0o666
            # a soft lock outlives a killed holder, and correctness does not need one
            lock = filelock.FileLock(path, mode=mode, fallback_to_soft=False)
            lock.acquire(timeout=max(0.0, timeout_s))
            held.callback(_release, lock)
        except (OSError, NotImplementedError, CacheError):
            pass
        with held as stack:
            yield bool(stack._exit_callbacks)

    # the whole store

    def verify(self, on_file: Callable[[int], None] | None = None) -> Verification:
        """Read everything: each manifest with its blobs, and each blob whether or not a manifest names it.

        Args:
            on_file: called with the bytes read, file by file.
        """
        raise NotImplementedError
