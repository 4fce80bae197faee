"""The counters of the last run on this node, kept in one small file for `nanogpt-buckets report`.

Knows nothing of what a counter means. Never fails a run for want of a place to write.
"""

from __future__ import annotations

import json
import logging
import os
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanogpt_buckets import settings
from nanogpt_buckets.errors import BucketsError
from nanogpt_buckets.files import unlink

log = logging.getLogger(__name__)

_NAME = "last-run.json"


def save(report: Mapping[str, Any]) -> None:
    """Keep a report's JSON in place of the one before, if this node's directory can be written."""
    document = dict(report) | {"ended": int(time.time())}
    try:
        directory = settings.local_dir()
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        staged = directory / f"tmp-{uuid.uuid4().hex}"
        try:
            staged.write_text(json.dumps(document), encoding="ascii")
            os.replace(staged, directory / _NAME)
        finally:
            unlink(staged)
    except (OSError, BucketsError) as error:
        log.info("the report of this run was not kept: %s", error)


def load() -> dict[str, Any]:
    """Return what `save` kept: `Report.to_json()` and "ended", in seconds since 1970.

    Raises:
        BucketsError: no run has ended on this node yet, or the file is damaged.
    """
    path = settings.local_dir() / _NAME
    try:
        return _checked(path)
    except FileNotFoundError:
        raise BucketsError(
            f"no run has been recorded in {path.parent}", hint='nanogpt-buckets generate "ROMEO:" --model demo'
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise BucketsError(f"{path} cannot be read: {error}", hint="the next run replaces it") from error


def _checked(path: Path) -> dict[str, Any]:
    document = json.loads(path.read_bytes())
    if not isinstance(document, dict) or not document.keys() >= {"ended", "buckets", "steps"}:
        raise ValueError("it is not a report of this release")
    return document
