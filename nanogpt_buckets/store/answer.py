"""The five answers a store can give, and WARM; each of the others is an error of its own.

Knows nothing of files.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from nanogpt_buckets.errors import CacheError, CorruptEntry, IncompatibleEntry, TransientError, UntrustedStore
from nanogpt_buckets.store.manifest import Manifest

HINT = "choose another directory with --cache-dir or NANOGPT_BUCKETS_CACHE_DIR"


class Status(StrEnum):
    """What a look into the store can answer. Only CORRUPT is ever replaced; TRANSIENT says nothing at all."""

    WARM = "warm"
    ABSENT = "missing"
    TRANSIENT = "transient"
    CORRUPT = "corrupt"
    INCOMPATIBLE = "incompatible"
    UNTRUSTED = "untrusted"


ERRORS: dict[Status, type[CacheError]] = {
    Status.CORRUPT: CorruptEntry,
    Status.INCOMPATIBLE: IncompatibleEntry,
    Status.UNTRUSTED: UntrustedStore,
    Status.TRANSIENT: TransientError,
}


@dataclass(frozen=True)
class Answer:
    """What is known of one key: `manifest` when WARM, rejected, or intact and not for this host; else `why` not."""

    status: Status
    key: str
    manifest: Manifest | None = None
    why: str = ""
    hint: str | None = None


def answer_for(key: str, error: Exception) -> Answer:
    """Return the answer that an exception amounts to."""
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return Answer(Status.ABSENT, key)
    for status, kind in ERRORS.items():
        if isinstance(error, kind):
            return Answer(status, key, why=str(error), hint=getattr(error, "hint", None))
    return Answer(Status.TRANSIENT, key, why=str(error), hint=getattr(error, "hint", None) or HINT)
