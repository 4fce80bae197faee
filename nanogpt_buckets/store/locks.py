"""Locks that save work and decide nothing: one process at a time, on one machine or on all that share a directory.

Who holds one for longer says so in a file beside it, again and again. Where the file system frees a lock of a machine
that is gone late, or never, whoever waits sees that nobody says so any more, and goes on without. Knows nothing of what
is locked.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import filelock

from nanogpt_buckets.errors import printable

# A waiting thread hears of Ctrl-C this often.
_SLICE_S = 0.25
# Whoever holds a lock says so after a second, and then as often as this; who has said nothing for so long is gone.
_FIRST_S, _BEAT_S, _GONE_S = 1.0, 10.0, 60.0
_LOOK_S = 2.0


@dataclass(frozen=True)
class Note:
    """Where a holder says that it holds: read and written by whoever knows where that is; neither may fail."""

    read: Callable[[], bytes | None]
    write: Callable[[bytes | None], None]


@contextlib.contextmanager
def held(lock: filelock.BaseFileLock, note: Note, timeout_s: float, cancelled: Callable[[str], bool]) -> Iterator[bool]:
    """Hold a lock meanwhile; yields whether that worked, and never fails for it.

    `cancelled` is told, while waiting, what the holder says of itself; True ends the waiting.
    """
    if not _acquired(lock, note, timeout_s, cancelled):
        yield False
        return
    done = threading.Event()
    beat = threading.Thread(target=_beat, args=(note, done), name="lock", daemon=True)
    beat.start()
    try:
        yield True
    finally:
        done.set()
        beat.join()
        with contextlib.suppress(OSError, NotImplementedError):
            lock.release()


def _acquired(lock: filelock.BaseFileLock, note: Note, timeout_s: float, cancelled: Callable[[str], bool]) -> bool:
    start = looked = changed = time.monotonic()
    said, holder = None, ""
    while True:
        try:
            lock.acquire(timeout=max(0.0, min(_SLICE_S, start + timeout_s - time.monotonic())))
            return True
        except filelock.Timeout:
            now = time.monotonic()
            if now - looked > _LOOK_S:
                looked, before, said = now, said, note.read()
                changed = now if said != before else changed
                holder = _holder(said)
            gone = said is not None and now - changed > _GONE_S
            if cancelled(holder) or gone or now >= start + timeout_s:
                return False
        except (OSError, NotImplementedError):
            return False


def _beat(note: Note, done: threading.Event) -> None:
    """Say that the lock is held until it is not; at the end nothing is left of that."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError, ImportError):
        user = "somebody"
    about = {"who": f"{user}@{platform.node()}", "process": os.getpid(), "since": int(time.time())}
    count, wait_s = 0, _FIRST_S
    while not done.wait(wait_s):
        count, wait_s = count + 1, _BEAT_S
        note.write(json.dumps({**about, "count": count}).encode())
    if count:
        note.write(None)


def _holder(said: bytes | None) -> str:
    """Return who holds a lock, in words; "" if that is not known."""
    with contextlib.suppress(ValueError, KeyError, TypeError, OverflowError, OSError, RecursionError):
        about = json.loads(said or b"")
        since = time.strftime("%H:%M:%S", time.localtime(int(about["since"])))
        return f"{printable(str(about['who'])[:100])}, process {int(about['process'])}, since {since}"
    return ""
