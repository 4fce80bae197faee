"""The tier in a directory, which other processes may read and write at the same time.

    CACHEDIR.TAG
    v1/entries/<family>/<key>.json    manifest: written last; the only commit point
    v1/entries/<family>/<key>.rejected    that this entry did not compute what it should where it was loaded
    v1/blobs/cd/<sha256>              immutable
    v1/plans/<name>.json              named plans
    v1/locks/  v1/tmp/                never needed for correctness

A file is staged in v1/tmp and linked to its final name, so that a process killed anywhere leaves nothing half written,
and bytes that have a name are never changed. Directories are made when needed, with the root's permissions. Knows
nothing of what the files mean.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import stat
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import filelock

from nanogpt_buckets.errors import CacheError, TransientError
from nanogpt_buckets.files import (
    STALE_PAUSES_S,
    list_names,
    move_to_absent,
    sweep,
    sync_directory,
    unlink,
    write_new,
)
from nanogpt_buckets.mounts import mount_of
from nanogpt_buckets.store.entry import ELSEWHERE
from nanogpt_buckets.store.locks import Note, held
from nanogpt_buckets.store.tier import Gathered
from nanogpt_buckets.store.trust import check_file, check_location, read, read_all

_SIGNATURE = b"Signature: 8a477f597d28d172789f06886806bc55\n# This directory holds what nanogpt-buckets compiled.\n"
# Trying again will not help; anything else may pass.
_LASTING = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR})
_FOLDERS = ("entries", "blobs", "plans", "locks", "tmp")
_STALE_S = 24 * 3600.0
_MOST_SAID = 1000
T = TypeVar("T")
# Clients in user space and the kernel before them remember a file's size for a second each.
_REMEMBERED_S = 2.1


class Directory:
    """Bytes by name below one directory.

    Args:
        root: the cache directory; made, private, when something is first written.
        shared: others may write here too, for what vouches for an entry is not its place.
    """

    def __init__(self, root: Path, shared: bool = False) -> None:
        self.root = root
        self.shared = shared
        self._v1 = root / "v1"
        self._base = os.fspath(self._v1)

    def __str__(self) -> str:
        return str(self.root)

    @functools.cached_property
    def remembers_s(self) -> float:
        """How long the client of a network file system may; see `Tier`."""
        mount = mount_of(self.root)
        return _REMEMBERED_S if mount.network or mount.kind.startswith("fuse") else 0.0

    def path(self, name: str) -> Path:
        """Return where a name is, or would be."""
        return self._v1 / name

    def get(self, name: str, *, size: int | None = None, limit: int | None = None, anyone: bool = False) -> bytes:
        """Read a file once, if only this user, or root, can have written it; see `Tier`."""
        return read(self.root, self.path(name), size=size, limit=limit, anyone=anyone)

    def size(self, name: str) -> int | None:
        """Return the size of a file; see `Tier`."""
        with contextlib.suppress(OSError):
            # as text, since this is asked for every blob of a large cache
            return os.stat(f"{self._base}/{name}").st_size
        return None

    def names(self, folder: str) -> list[str]:
        """List a directory; see `Tier`."""
        self.check(self.path(folder))
        return list_names(self.path(folder))

    def gather(self, folder: str, *, limit: int, listed: bool = True) -> Gathered:
        """Read a directory's files, if all are wanted and names lead to what they have now; see `Tier`."""
        if not listed:
            return Gathered()
        names = self.names(folder)
        if self.remembers_s:
            return Gathered(names=names)
        files, doubt = read_all(self.root, self.path(folder), names, limit=limit, anyone=self.shared)
        # listed once more, since a signature may have come before a manifest that was read just now
        return Gathered(files, doubt, set(list_names(self.path(folder))))

    def put(self, name: str, data: bytes, *, replace: bool = False) -> bool:
        """Write a file aside and give it its name; see `Tier`."""
        path = self.path(name)
        self.check(path.parent)
        mode = 0o444 if name.startswith("blobs/") else 0o666
        with self._writing():
            self._make(path.parent)
            return _patiently(lambda: self._put(path, data, mode, replace))

    def delete(self, name: str) -> None:
        """Remove a file; see `Tier`."""
        with self._writing():
            self.path(name).unlink(missing_ok=True)

    def touch(self, name: str, every_s: float = 0.0) -> None:
        """Note on a file that it is in use, unless that was done within `every_s`; never fails."""
        path = self.path(name)
        with contextlib.suppress(OSError):
            # a file server's clock may be ahead
            if abs(time.time() - path.stat().st_mtime) > every_s:
                os.utime(path)

    def check(self, *further: Path) -> None:
        """Raise unless this is a place where nobody else writes, or others may; see `check_location`."""
        check_location(self.root, *further, anyone=self.shared)

    def prepare(self) -> None:
        """Make what writing needs, to find out early whether it is possible.

        Raises:
            UntrustedStore: others could have written the store.
            CacheError: it cannot be written.
        """
        self.check()
        with self._writing():
            self._make()
            if not os.access(self.path("tmp"), os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    @contextlib.contextmanager
    def locked(
        self, name: str, timeout_s: float, cancelled: Callable[[str], bool] = lambda who: False
    ) -> Iterator[bool]:
        """Keep others from what bears a name meanwhile; yields whether that worked, and never fails for it.

        It saves work and decides nothing. `cancelled` is asked while waiting for another process, and told who that
        is, as far as known; True ends it.
        """
        path, said = self.path(f"locks/{name}.lock"), f"locks/{name}.by"
        lock: filelock.BaseFileLock | None = None
        with contextlib.suppress(OSError, CacheError):
            self.check()
            self._make()
            check_file(self.root, path, anyone=self.shared)
            lock = filelock.FileLock(path, mode=0o600 | self._mode() & 0o666)
        if lock is None:
            yield False
            return

        def read() -> bytes | None:
            with contextlib.suppress(OSError, CacheError):
                return self.get(said, limit=_MOST_SAID, anyone=self.shared)
            return None

        def write(data: bytes | None) -> None:
            with contextlib.suppress(OSError, CacheError):
                self.delete(said) if data is None else self.put(said, data, replace=True)

        with held(lock, Note(read, write), timeout_s, cancelled) as alone:
            yield alone

    def leftovers(self) -> list[Path]:
        """Return files that only a running process needs: staged ones and locks."""
        return [self.path(place) / file for place in ("tmp", "locks") for file in self.names(place)]

    def _put(self, path: Path, data: bytes, mode: int, replace: bool) -> bool:
        staged = self.path("tmp") / uuid.uuid4().hex
        try:
            write_new(staged, data, mode & self._mode())
            if replace:
                os.replace(staged, path)
            else:
                move_to_absent(staged, path)
        except FileExistsError:
            return False
        finally:
            unlink(staged)
        sync_directory(path.parent)
        return True

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turn an OSError inside into a CacheError about this store."""
        try:
            yield
        except OSError as error:
            kind = CacheError if error.errno in _LASTING else TransientError
            raise kind(f"{self.root} cannot be written: {error.strerror or error}", hint=ELSEWHERE) from error

    def _make(self, *further: Path) -> None:
        """Make the directories, those given included, and the tag that keeps backups away."""
        _patiently(lambda: self._make_all(*further))

    def _make_all(self, *further: Path) -> None:
        if not self.root.is_dir():
            for place in reversed(self.root.parents):
                if not place.is_dir():
                    place.mkdir(0o755, exist_ok=True)  # whatever the umask: nobody else may replace what is below
            with contextlib.suppress(FileExistsError):
                self.root.mkdir(0o700)
        for directory in (self._v1, *map(self.path, _FOLDERS), *further):
            self._make_one(directory)
        tag = self.root / "CACHEDIR.TAG"
        if not tag.exists():
            self._put(tag, _SIGNATURE, 0o666, replace=False)
        sweep(self.path("tmp"), older_than_s=_STALE_S)

    def _make_one(self, directory: Path) -> None:
        with contextlib.suppress(FileExistsError):
            directory.mkdir(0o700)
            sync_directory(directory.parent)
        # asked again of one that exists: whoever made it may have been killed before this line
        found = directory.lstat()
        if stat.S_ISDIR(found.st_mode) and stat.S_IMODE(found.st_mode) != self._mode():
            with contextlib.suppress(OSError):
                directory.chmod(self._mode())

    def _mode(self) -> int:
        """Return the root's permissions, which all below it follow."""
        return stat.S_IMODE(self.root.stat().st_mode)


def _patiently(do: Callable[[], T]) -> T:
    """Do something, again at once and after a pause where another machine has just made what our client does not know.

    For a moment it may remember that a directory was not there, or which one it was.
    """
    for pause_s in STALE_PAUSES_S:
        try:
            return do()
        except OSError as error:
            if error.errno not in (errno.ESTALE, errno.ENOENT):
                raise
        time.sleep(pause_s)
    return do()
