"""What may be believed: directories that nobody else can write, and bytes that were hashed after they were read.

A compiled bucket is native code, so trust is by location: a directory of the current user's, or of root's, that
neither group nor others can write is believed without a question. Files are read whole, once, and never through a
symbolic link. Knows nothing of manifests nor of the layout below the directories it checks.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shlex
import stat
from pathlib import Path

from nanogpt_buckets.errors import CorruptEntry, TransientError, UntrustedStore

# Those whose writer decides what is found below them.
_INSIDE = ("v1", "v1/entries", "v1/blobs")
_ELSEWHERE = "use a directory of your own: --cache-dir DIR or NANOGPT_BUCKETS_CACHE_DIR"

# O_NONBLOCK: opening a planted pipe must not hang
_FLAGS = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_MAX_CHUNK = 1 << 30


def check_location(root: Path, *further: Path) -> None:
    """Raise unless only this user, or root, can have written what is in a store. Does nothing on Windows.

    Args:
        root: the cache directory; one that does not exist yet is fine.
        further: other directories of the store that are about to be used.

    Raises:
        UntrustedStore: somebody else owns a directory or can write to it.
        TransientError: a directory cannot be examined this time.
    """
    if not hasattr(os, "geteuid"):
        return
    for directory in (root, *(root / name for name in _INSIDE), *further):
        _check_directory(directory)


def _check_directory(directory: Path) -> None:
    try:
        found = directory.stat()
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise TransientError(f"{directory} cannot be examined: {error.strerror or error}") from error
    if found.st_uid not in (os.geteuid(), 0):
        raise UntrustedStore(
            f"{directory} belongs to user {found.st_uid}, who could have written the native code in it",
            hint=_ELSEWHERE,
        )
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        who = "everyone" if found.st_mode & stat.S_IWOTH else "its group"
        raise UntrustedStore(
            f"{directory} can be written by {who}, who could have written the native code in it",
            hint=f"chmod go-w {shlex.quote(str(directory))}" if found.st_uid == os.geteuid() else _ELSEWHERE,
        )


def read_file(path: Path, *, size: int | None = None, limit: int | None = None) -> bytes:
    """Return the content of a regular file, read once.

    Args:
        path: never followed if it is a symbolic link.
        size: how long the file must be; checked before a byte is read.
        limit: how long it may be.

    Raises:
        CorruptEntry: it is not a regular file, or has another size.
        OSError: it cannot be opened or read.
    """
    try:
        return _read_once(path, size, limit)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise CorruptEntry(f"{path.name} is a symbolic link") from error
        if error.errno != errno.ESTALE:
            raise
    # on a network file system the name may have been given to another file meanwhile
    return _read_once(path, size, limit)


def _read_once(path: Path, size: int | None, limit: int | None) -> bytes:
    descriptor = os.open(path, _FLAGS)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise CorruptEntry(f"{path.name} is not a regular file")
        if size is not None and found.st_size != size:
            raise CorruptEntry(f"{path.name} has {found.st_size} bytes, not {size}")
        if limit is not None and found.st_size > limit:
            raise CorruptEntry(f"{path.name} is longer than {limit} bytes")
        chunks = []
        left = found.st_size
        while left and (chunk := os.read(descriptor, min(left, _MAX_CHUNK))):
            chunks.append(chunk)
            left -= len(chunk)
        return b"".join(chunks)
    finally:
        os.close(descriptor)


def read_verified(path: Path, sha256: str, size: int) -> bytes:
    """Return the content of a file whose size and digest are known.

    Raises:
        CorruptEntry: it is something else.
        OSError: it cannot be opened or read.
    """
    data = read_file(path, size=size)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise CorruptEntry(f"{path.name} is not what its name says")
    return data
