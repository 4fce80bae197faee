"""Single files: read whole and once, written new and moved to a name in one step.

Nothing follows a symbolic link, and no file that has a name is ever changed. Knows nothing of what files mean.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from nanogpt_buckets.errors import CorruptEntry, TransientError

_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK  # opening a planted pipe must not hang
_NEW_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL
# What file systems without hard links answer.
_NO_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})
# Clients in user space remember a name's file for a second.
STALE_PAUSES_S = (0.0, 1.2)

Opener = Callable[[Path, int], int]


def read_file(path: Path, *, size: int | None = None, limit: int | None = None, opener: Opener = os.open) -> bytes:
    """Return the content of a regular file, read once.

    Args:
        path: never followed if it is a symbolic link.
        size: how long the file must be; checked before a byte is read.
        limit: how long it may be.
        opener: takes the path and flags and returns a descriptor.

    Raises:
        CorruptEntry: it is not a regular file, or has another size.
        OSError: it cannot be opened or read.
    """
    try:
        for pause_s in STALE_PAUSES_S:
            try:
                return _read_once(path, size, limit, opener)
            except OSError as error:
                if error.errno != errno.ESTALE:
                    raise
            time.sleep(pause_s)  # on a network file system the name has another file, of which our client may not know
        return _read_once(path, size, limit, opener)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise CorruptEntry(f"{path.name} is a symbolic link") from error
        raise


def _read_once(path: Path, size: int | None, limit: int | None, opener: Opener) -> bytes:
    descriptor = opener(path, _FLAGS)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise CorruptEntry(f"{path.name} is not a regular file")
        if size is not None and found.st_size != size:
            raise CorruptEntry(f"{path.name} has {found.st_size} bytes, not {size}")
        if limit is not None and found.st_size > limit:
            raise CorruptEntry(f"{path.name} is longer than {limit} bytes")
        chunks, left = [], found.st_size
        while left and (chunk := os.read(descriptor, left)):
            chunks.append(chunk)
            left -= len(chunk)
        return b"".join(chunks)
    finally:
        os.close(descriptor)


def list_names(directory: Path) -> list[str]:
    """Return what is in a directory, sorted; nothing if there is none.

    Raises:
        TransientError: it cannot be listed this time.
    """
    try:
        return sorted(os.listdir(directory))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise TransientError(f"{directory} cannot be listed: {error.strerror or error}") from error


def write_new(path: Path, data: bytes, mode: int) -> None:
    """Write a file that must not exist, with exactly this mode, and wait until it is on disk."""
    descriptor = os.open(path, _NEW_FLAGS, 0o600)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        os.fchmod(descriptor, mode)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Yield a file that takes the place of what a path leads to, in one step, once it is written and on disk.

    Whatever is raised meanwhile leaves what was there, and nothing beside it.
    """
    final = path.resolve()
    staged = final.with_name(f".{final.name}.{uuid.uuid4().hex}")
    try:
        with staged.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        staged.replace(final)
        sync_directory(final.parent)
    finally:
        unlink(staged)


def move_to_absent(staged: Path, path: Path) -> None:
    """Give a file a name that must be free, in one step.

    Raises:
        FileExistsError: the name is taken.
    """
    try:
        os.link(staged, path)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        # an SFTP server says EPERM of a taken name, too, which its client may not know of yet
        if os.path.lexists(path) or _can_link(staged):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from error
        os.rename(staged, path)


def _can_link(staged: Path) -> bool:
    """Whether a file can have a second name, beside the first."""
    second = staged.with_name(f"{staged.name}.link")
    try:
        os.link(staged, second)
    except OSError:
        return False
    unlink(second)
    return True


def sync_directory(directory: Path) -> None:
    """Ask for a directory's names to reach the disk; a file system that cannot is left alone."""
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def unlink(path: Path) -> None:
    """Remove a file if that is possible; cleaning up never fails."""
    with contextlib.suppress(OSError):
        os.unlink(path)


def remove(path: Path) -> None:
    """Remove a file, or a directory with all that is in it; an OSError if that cannot be."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def time_in(directory: Path) -> float:
    """Return the time that a file bears which is written there now: its server's; this machine's if none can be."""
    path = directory / uuid.uuid4().hex
    try:
        write_new(path, b"", 0o600)
        return path.stat().st_mtime
    except OSError:
        return time.time()
    finally:
        unlink(path)


def sweep(directory: Path, *, older_than_s: float) -> None:
    """Remove what killed processes staged long ago; never fails."""
    with contextlib.suppress(OSError):
        with os.scandir(directory) as found:
            times = {file.path: file.stat(follow_symlinks=False).st_mtime for file in found}
        if min(times.values(), default=time.time()) >= time.time() - older_than_s:
            return
        oldest = time_in(directory) - older_than_s
        for path, when in times.items():
            if when < oldest:
                with contextlib.suppress(OSError):
                    remove(Path(path))


@dataclass(frozen=True)
class Doomed:
    """One file to delete, or one directory with all that is in it.

    Args:
        path: the file.
        what: "entry", "blob", "plan", "weights" or "leftover".
        name: the key of an entry, else the file's name.
        why: in words.
        bytes: its size.
        mtime_ns: when it was last written or used; the file stays if that has changed.
    """

    path: Path
    what: str
    name: str
    why: str
    bytes: int
    mtime_ns: int


def doom(path: Path, what: str, name: str, why: str) -> Doomed | None:
    """Return a file as one to delete; None if it is gone."""
    try:
        found = os.lstat(path)
        inside = (Path(base, file).lstat().st_size for base, _, files in os.walk(path) for file in files)
        size = sum(inside) if stat.S_ISDIR(found.st_mode) else found.st_size
    except OSError:
        return None
    return Doomed(path, what, name, why, size, found.st_mtime_ns)
