"""A lock that saves work and decides nothing: where locking does not function, the work is done twice.

Knows nothing of what is locked.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import filelock

# A waiting thread hears of Ctrl-C this often.
_SLICE_S = 0.25


@contextlib.contextmanager
def held(path: Path, *, mode: int, timeout_s: float, cancelled: Callable[[], bool]) -> Iterator[bool]:
    """Hold a lock file, if that can be had in time; yields whether it is held, and never fails for it.

    It is made with `mode` if need be, and left behind. `cancelled` is asked while waiting; True ends it.
    """
    lock = _acquired(path, mode, timeout_s, cancelled)
    try:
        yield lock is not None
    finally:
        if lock is not None:
            with contextlib.suppress(OSError, NotImplementedError):
                lock.release()


def _acquired(path: Path, mode: int, timeout_s: float, cancelled: Callable[[], bool]) -> filelock.BaseFileLock | None:
    lock = filelock.FileLock(path, mode=mode)
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            lock.acquire(timeout=max(0.0, min(_SLICE_S, deadline - time.monotonic())))
            return lock
        except filelock.Timeout:
            if cancelled() or time.monotonic() >= deadline:
                return None
        except (OSError, NotImplementedError):
            return None
