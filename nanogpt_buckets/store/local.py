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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import filelock

from nanogpt_buckets import key as keys
from nanogpt_buckets.errors import (
    CacheError,
    CacheMiss,
    CorruptEntry,
    IncompatibleEntry,
    TransientError,
    UntrustedStore,
    UsageError,
)
from nanogpt_buckets.store.manifest import MAX_BYTES, Blob, Manifest, decode, encode, is_digest, parse
from nanogpt_buckets.store.trust import check_location, read_file, read_verified

_SIGNATURE = b"Signature: 8a477f597d28d172789f06886806bc55\n# This directory holds what nanogpt-buckets compiled.\n"
_STALE_SECONDS = 24 * 3600
_PLAN_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")
_HINT = "choose another directory with --cache-dir or NANOGPT_BUCKETS_CACHE_DIR"

_NO_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})
# Trying again will not help; anything else may pass.
_LASTING = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR})
_NEW_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)


class Status(StrEnum):
    """What a look into the store can answer. Only CORRUPT is ever replaced; TRANSIENT says nothing at all."""

    WARM = "warm"
    ABSENT = "missing"
    TRANSIENT = "transient"
    CORRUPT = "corrupt"
    INCOMPATIBLE = "incompatible"
    UNTRUSTED = "untrusted"


_ERRORS: dict[Status, type[CacheError]] = {
    Status.CORRUPT: CorruptEntry,
    Status.INCOMPATIBLE: IncompatibleEntry,
    Status.UNTRUSTED: UntrustedStore,
    Status.TRANSIENT: TransientError,
}


@dataclass(frozen=True)
class Answer:
    """What is known of one key; `manifest` only when WARM, `why` and perhaps `hint` when neither WARM nor ABSENT."""

    status: Status
    key: str
    manifest: Manifest | None = None
    why: str = ""
    hint: str | None = None


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
            manifest = decode(read_file(path, limit=MAX_BYTES))
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
            return read_verified(path, blob.sha256, blob.size)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise CorruptEntry(f"{blob.role} ({blob.sha256[:12]}) is missing from the cache") from error
        except OSError as error:
            raise TransientError(f"{path} cannot be read: {error.strerror or error}") from error

    def check(self, answer: Answer) -> Answer:
        """Read and verify every blob of a WARM answer; return it, or one that says what is wrong."""
        if answer.status is not Status.WARM or answer.manifest is None:
            return answer
        try:
            for blob in answer.manifest.blobs:
                self.read_blob(blob)
        except CacheError as error:
            return _answer(answer.key, error)
        return answer

    def require(self, answer: Answer) -> Manifest:
        """Return the manifest of a WARM answer, and raise what any other says.

        Raises:
            CacheMiss: there is none.
            CacheError: the subclass that belongs to its status.
        """
        if answer.status is Status.WARM and answer.manifest is not None:
            return answer.manifest
        kind = _ERRORS.get(answer.status, CacheMiss)
        why = answer.why or "it is missing"
        raise kind(f"entry {answer.key[:12]} in {self.root} is {answer.status}: {why}", hint=answer.hint)

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
        stored = self._settled(manifest)
        if stored.manifest is not None:
            return stored.manifest
        path = self._entry_path(manifest.family, manifest.key)
        with self._writing():
            self._prepare(path.parent)
            self._sweep()
            for blob in manifest.blobs:
                self._put_blob(blob, blobs[blob.role])
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
        if answer.status not in (Status.WARM, Status.ABSENT, Status.CORRUPT):
            self.require(answer)
        return answer

    def _put_blob(self, blob: Blob, data: bytes) -> None:
        path = self._blob_path(blob.sha256)
        self._make_directory(path.parent)
        damaged = False
        try:
            read_verified(path, blob.sha256, blob.size)
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
            _write_new(staged, data, mode & self._mode())
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
        if stat.S_IMODE(directory.stat().st_mode) != self._mode():
            with contextlib.suppress(OSError):
                directory.chmod(self._mode())

    def _mode(self) -> int:
        return stat.S_IMODE(self.root.stat().st_mode)

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
            return parse(read_file(path, limit=MAX_BYTES), f"plan {name!r}")
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
        lock = self._lock(self._v1 / "locks" / f"{_digest(key)}.lock", timeout_s)
        try:
            yield lock is not None
        finally:
            if lock is not None:
                with contextlib.suppress(OSError, NotImplementedError):
                    lock.release()

    def _lock(self, path: Path, timeout_s: float) -> filelock.BaseFileLock | None:
        try:
            check_location(self.root, path.parent)
            self._prepare()
            mode = 0o600 | self._mode() & 0o666
            lock = filelock.FileLock(path, mode=mode)
            lock.acquire(timeout=max(0.0, timeout_s))
        except (OSError, NotImplementedError, CacheError):
            return None
        return lock

    # the whole store

    def verify(self, on_file: Callable[[int], None] | None = None) -> Verification:
        """Read everything: each manifest with its blobs, and each blob whether or not a manifest names it.

        Args:
            on_file: called with the size of each blob once it is read.

        Raises:
            UntrustedStore: others could have written the store.
            TransientError: a directory cannot be listed this time.
        """
        check_location(self.root)
        # before the blobs: what a manifest names was stored before it
        entries = list(self._entries())
        paths = self._blob_paths()
        sizes: dict[str, int] = {}
        problems = []
        for path in paths:
            what, size = _examine(path)
            if what:
                problems.append(Problem(path.relative_to(self.root).as_posix(), what))
            else:
                sizes[path.name] = size
            if on_file is not None:
                on_file(size)
        for family, answer in entries:
            path = self._entry_path(family, answer.key).relative_to(self.root)
            problems += [Problem(path.as_posix(), what) for what in _damage(answer, sizes)]
        return Verification(len(entries), len(paths), sum(sizes.values()), tuple(problems))

    def _blob_paths(self) -> list[Path]:
        directory = self._v1 / "blobs"
        names = [name for prefix in _names(directory) for name in _names(directory / prefix) if name[:2] == prefix]
        return [self._blob_path(name) for name in names if is_digest(name)]

    def _family_path(self, family: str) -> Path:
        return self._v1 / "entries" / _digest(family)

    def _entry_path(self, family: str, key: str) -> Path:
        return self._family_path(family) / f"{_digest(key)}.json"

    def _blob_path(self, sha256: str) -> Path:
        return self._v1 / "blobs" / _digest(sha256)[:2] / sha256

    def _plan_path(self, name: str) -> Path:
        if _PLAN_NAME.fullmatch(name) is None:
            raise UsageError(
                f"plan name {name!r} is not a plain word", hint="use letters, digits, dots, dashes and underscores"
            )
        return self._v1 / "plans" / f"{name}.json"


def _digest(text: str) -> str:
    if not is_digest(text):
        raise ValueError(f"{text!r} is not 64 lowercase hex digits")
    return text


def _answer(key: str, error: Exception) -> Answer:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return Answer(Status.ABSENT, key)
    for status, kind in _ERRORS.items():
        if isinstance(error, kind):
            return Answer(status, key, why=str(error), hint=getattr(error, "hint", None))
    return Answer(Status.TRANSIENT, key, why=getattr(error, "strerror", None) or str(error), hint=_HINT)


def _checked(manifest: Manifest, blobs: Mapping[str, bytes]) -> bytes:
    """Return the bytes of a manifest that can be read back and has exactly these blobs."""
    data = encode(manifest)
    try:
        decode(data)
    except CorruptEntry as error:
        raise ValueError(f"this manifest could not be read back: {error}") from error
    if {blob.role for blob in manifest.blobs} != set(blobs):
        raise ValueError("the blobs are not those that the manifest names")
    for blob in manifest.blobs:
        content = blobs[blob.role]
        if len(content) != blob.size or hashlib.sha256(content).hexdigest() != blob.sha256:
            raise ValueError(f"{blob.role} is not the blob that the manifest names")
    return data


def _examine(path: Path) -> tuple[str, int]:
    """Return what is wrong with a blob, if anything, and its size."""
    try:
        data = read_file(path)
    except (OSError, CorruptEntry) as error:
        return str(error), 0
    right = hashlib.sha256(data).hexdigest() == path.name
    return "" if right else "its content is not what its name says", len(data)


def _damage(answer: Answer, sizes: Mapping[str, int]) -> Iterator[str]:
    if answer.status not in (Status.WARM, Status.INCOMPATIBLE):
        yield answer.why
    for blob in answer.manifest.blobs if answer.manifest else ():
        if sizes.get(blob.sha256) != blob.size:
            yield f"{blob.role} ({blob.sha256[:12]}) is missing or damaged"


def _names(directory: Path) -> list[str]:
    try:
        return sorted(os.listdir(directory))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise TransientError(f"{directory} cannot be listed: {error.strerror or error}") from error


def _write_new(path: Path, data: bytes, mode: int) -> None:
    descriptor = os.open(path, _NEW_FLAGS, 0o600)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        if hasattr(os, "fchmod"):
            os.fchmod(descriptor, mode)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _move_to_absent(staged: Path, path: Path) -> None:
    try:
        os.link(staged, path)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from error
        os.rename(staged, path)


def _sync_directory(directory: Path) -> None:
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _unlink(path: Path) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)
