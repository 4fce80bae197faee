"""What this node failed to compile lately, so that a run need not wait minutes to fail the same way again.

Records are this node's, never shared: a failure says as much about the machine as about the bucket. They expire, and
an explicit build does not ask for them. Only what will happen again is recorded: a compiler's own error and a failed
check, never a killed child or a full disk. Knows nothing of compiling.
"""

from __future__ import annotations

import contextlib
import json
import time
import uuid
from pathlib import Path

from nanogpt_buckets import settings
from nanogpt_buckets.errors import BucketsError, CompileFailed
from nanogpt_buckets.files import unlink

_EXPIRE_S = 3600.0


def remember(key: str, error: BucketsError) -> None:
    """Record that a key could not be compiled, if the error is one that lasts; never fails."""
    if not isinstance(error, CompileFailed):
        return
    with contextlib.suppress(OSError, BucketsError):
        path = _path(key)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        staged = path.with_name(f"tmp-{uuid.uuid4().hex}")
        staged.write_text(json.dumps({"why": error.message, "when": int(time.time())}), encoding="ascii")
        staged.replace(path)


def recall(key: str) -> str | None:
    """Return why a key could not be compiled within the last hour, or None."""
    try:
        record = json.loads(_path(key).read_bytes())
        age_s = time.time() - record["when"]
        if 0 <= age_s < _EXPIRE_S:
            return f"{record['why']} ({age_s / 60:.0f} min ago on this machine)"
    except (OSError, ValueError, TypeError, KeyError, BucketsError):
        pass
    return None


def forget(key: str) -> None:
    """Drop a record: the key has been compiled since."""
    with contextlib.suppress(BucketsError):
        unlink(_path(key))


def _path(key: str) -> Path:
    return settings.local_dir() / "failures" / f"{key}.json"
