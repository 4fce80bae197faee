"""What a store knows of one key: a `Manifest` in order, `Verified` when every byte is, or a `Miss` that says why not.

Knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from nanogpt_buckets.errors import (
    CacheError,
    CacheMiss,
    CorruptEntry,
    IncompatibleEntry,
    TransientError,
    UntrustedStore,
)
from nanogpt_buckets.store.manifest import Manifest

# The tiers of a store.
CACHE, LAYER, REMOTE = "cache", "layer", "remote"
ELSEWHERE = "choose another directory with --cache-dir or NANOGPT_BUCKETS_CACHE_DIR"


class Status(StrEnum):
    """Why there is nothing to run. Only CORRUPT is ever replaced; TRANSIENT says nothing at all."""

    ABSENT = "missing"
    TRANSIENT = "transient"
    CORRUPT = "corrupt"
    INCOMPATIBLE = "incompatible"
    UNTRUSTED = "untrusted"

    @property
    def error(self) -> type[CacheError]:
        """The error that it is where it cannot be helped."""
        return _ERRORS[self]


_ERRORS: dict[Status, type[CacheError]] = {
    Status.ABSENT: CacheMiss,
    Status.CORRUPT: CorruptEntry,
    Status.INCOMPATIBLE: IncompatibleEntry,
    Status.UNTRUSTED: UntrustedStore,
    Status.TRANSIENT: TransientError,
}


@dataclass(frozen=True)
class Verified:
    """An entry whose every byte was read once and is what its digest says; these bytes are what is loaded.

    `signature` is what was beside it, where it is on the way to another place; `tier` is where its bytes came from.
    """

    manifest: Manifest
    blobs: Mapping[str, bytes]
    signature: bytes | None = None
    tier: str = CACHE


@dataclass(frozen=True)
class Miss:
    """Why an entry cannot be used; `manifest` where it could be read all the same."""

    status: Status
    family: str = ""
    key: str = ""
    why: str = ""
    hint: str | None = None
    manifest: Manifest | None = None

    @classmethod
    def of(cls, error: Exception, family: str = "", key: str = "") -> Miss:
        """Return what an exception amounts to."""
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            return cls(Status.ABSENT, family, key)
        known = (status for status, kind in _ERRORS.items() if isinstance(error, kind))
        status, hint = next(known, Status.TRANSIENT), getattr(error, "hint", None)
        return cls(status, family, key, str(error), hint or (ELSEWHERE if status is Status.TRANSIENT else None))


Found = Manifest | Miss


def manifest_of(found: Found) -> Manifest | None:
    """Return what could be read of an entry, whether or not it can be used."""
    return found.manifest if isinstance(found, Miss) else found
