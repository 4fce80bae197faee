"""What may be believed: directories that nobody else can write, and bytes that were hashed after they were read.

A compiled bucket is native code, so trust is by location: a directory of the current user's, or of root's, that
neither group nor others can write is believed without a question. Files are read whole, once, and never through a
symbolic link. Knows nothing of manifests nor of the layout below the directories it checks.
"""

from __future__ import annotations

import os
import shlex
import stat
from pathlib import Path

from nanogpt_buckets.errors import CacheError, TransientError, UntrustedStore

# Those whose writer decides what is found below them.
_INSIDE = ("v1", "v1/entries", "v1/blobs")
_ELSEWHERE = "use a directory of your own: --cache-dir DIR or NANOGPT_BUCKETS_CACHE_DIR"


def check_location(root: Path, *further: Path) -> None:
    """Raise unless only this user, or root, can have written what is in a store. Does nothing on Windows.

    Args:
        root: the cache directory; one that does not exist yet is fine.
        further: other directories of the store that are about to be used.

    Raises:
        CacheError: the cache directory is something else.
        UntrustedStore: somebody else owns a directory or can write to it.
        TransientError: a directory cannot be examined this time.
    """
    if root.exists() and not root.is_dir():
        raise CacheError(f"{root} is not a directory", hint=_ELSEWHERE)
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
