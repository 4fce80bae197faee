"""Breadcrumbs: which compiled buckets this node is loading for the first time.

One that ends its process leaves its crumb behind, on disk and held by nobody, and is not tried again: not since this
machine was started, nor within a day, for whoever was killed just then left one, too. Knows nothing of what is loaded.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import time
from collections.abc import Iterator
from pathlib import Path

from nanogpt_buckets import node
from nanogpt_buckets.errors import BucketsError, CorruptEntry
from nanogpt_buckets.files import sync_directory

FOLDER = "loading"
_FORMAT = 1
_DAY_S = 24 * 3600.0
_BOOT = Path("/proc/sys/kernel/random/boot_id")


class EndedBefore(CorruptEntry):
    """What was to be loaded ended the process that loaded it before, or was being loaded when that was killed."""


@contextlib.contextmanager
def first_load(name: str) -> Iterator[None]:
    """Leave a crumb on disk while something is loaded, for whoever starts next should this process not survive it.

    Raises:
        EndedBefore: the process that loaded it last ended meanwhile, without a word.
    """
    path, held = None, None
    with contextlib.suppress(OSError, ImportError, BucketsError):
        path = node.folder(FOLDER, make=True) / f"{name}.json"
        held = _held(path)
    if path is None or held is None:  # it cannot be kept, or another process is at it right now
        yield
        return
    try:
        if _ended(held):
            hint = f"to try it once more: rm {shlex.quote(str(path))}"
            raise EndedBefore("the process that loaded it first on this machine ended while it did", hint=hint)
        with contextlib.suppress(OSError):
            _write(held, path)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                path.unlink()
    finally:
        os.close(held)


def expired(path: Path) -> bool:
    """Whether a crumb counts for nothing any more."""
    with contextlib.suppress(OSError):
        return path.lstat().st_mtime < time.time() - _DAY_S
    return False


def _held(path: Path) -> int | None:
    """Open a crumb and keep others from it, until this process ends at the latest; None if another has it."""
    import fcntl

    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _ended(descriptor: int) -> bool:
    """Whether somebody left this crumb and is gone."""
    try:
        crumb = json.loads(os.pread(descriptor, 1000, 0) or b"{}")
        recent = abs(time.time() - int(crumb["time"])) < _DAY_S
        return bool(crumb["format"] == _FORMAT and crumb["boot"] == _boot() and recent)
    except (ValueError, KeyError, TypeError, OSError):
        return False  # none, or cut off: then nothing was loaded yet


def _write(descriptor: int, path: Path) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps({"format": _FORMAT, "boot": _boot(), "time": int(time.time())}).encode(), 0)
    os.fsync(descriptor)
    sync_directory(path.parent)


def _boot() -> str:
    with contextlib.suppress(OSError):
        return _BOOT.read_text(encoding="ascii").strip()
    return ""
