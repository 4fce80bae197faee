"""A lock that saves work and decides nothing: where locking does not function, the work is done twice.

Knows nothing of what is locked.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import filelock


@contextlib.contextmanager
def held(path: Path, *, mode: int, timeout_s: float) -> Iterator[bool]:
    """Hold a lock file, if that can be had in time; yields whether it is held, and never fails for it.

    Args:
        path: the lock file, made if need be and left behind.
        mode: permissions of a new one.
        timeout_s: how long to wait for another process.
    """
    lock = _acquired(path, mode, timeout_s)
    try:
        yield lock is not None
    finally:
        if lock is not None:
            with contextlib.suppress(OSError, NotImplementedError):
                lock.release()


def _acquired(path: Path, mode: int, timeout_s: float) -> filelock.BaseFileLock | None:
    try:
        lock = filelock.FileLock(path, mode=mode)
        lock.acquire(timeout=max(0.0, timeout_s))
    except (OSError, NotImplementedError):  # a Timeout is an OSError
        return None
    return lock
