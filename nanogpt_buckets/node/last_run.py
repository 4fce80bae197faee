"""The counters of the last run on this node, kept in one small file for `nanogpt-buckets report`.

Knows nothing of what a counter means. Never fails a run for want of a place to write.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from nanogpt_buckets import node
from nanogpt_buckets.errors import BucketsError
from nanogpt_buckets.node.records import LAST_RUN

_NAME = "last-run"


def save(report: Mapping[str, Any]) -> None:
    """Keep a report's JSON in place of the one before, if this node's directory can be written."""
    LAST_RUN.keep(_NAME, {**report, "ended": int(time.time())})


def load() -> dict[str, Any]:
    """Return what `save` kept: `Report.to_json()` and "ended", in seconds since 1970.

    Raises:
        IncompatibleEntry: a newer release wrote it.
        UntrustedStore: others could have written it.
        CorruptEntry: the file is damaged; the next run replaces it.
        BucketsError: no run has ended on this node yet.
    """
    try:
        return LAST_RUN.read(_NAME)
    except FileNotFoundError:
        hint = 'nanogpt-buckets generate "ROMEO:" --model demo'
        raise BucketsError(f"no run has been recorded in {node.directory()}", hint=hint) from None
