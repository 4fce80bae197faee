"""What this node failed to compile lately, so that a run need not wait minutes to fail the same way again.

Never shared: a failure says as much about the machine as about the bucket. An explicit build does not ask for it. Only
what will happen again is recorded: a compiler's own error and a failed check, never a killed child or a full disk.
"""

from __future__ import annotations

import contextlib
import time

from nanogpt_buckets.errors import BucketsError, CompileFailed
from nanogpt_buckets.node.records import FAILURES, Record

_EXPIRE_S = 3600.0


def remember(key: str, error: BucketsError) -> None:
    """Record that a key could not be compiled, if the error is one that lasts; never fails."""
    if isinstance(error, CompileFailed):
        FAILURES.keep(key, {"why": error.message, "when": int(time.time())})


def recall(key: str) -> str | None:
    """Return why a key could not be compiled within the last hour, or None."""
    with contextlib.suppress(BucketsError):
        record = FAILURES.find(key)
        if record is not None and not expired(record):
            return f"{record['why']} ({(time.time() - record['when']) / 60:.0f} min ago on this machine)"
    return None


def forget(key: str) -> None:
    """Drop a record: the key has been compiled since."""
    with contextlib.suppress(BucketsError):
        FAILURES.drop(key)


def expired(record: Record | None) -> bool:
    """Whether a record counts for nothing, or no longer."""
    return record is None or not record["when"] <= time.time() < record["when"] + _EXPIRE_S
