"""A tier: bytes by name, and a few verbs. It is never believed: whoever reads compares digests.

A name is a relative path such as "blobs/cd/cd35…". Knows nothing of manifests or blobs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from nanogpt_buckets.errors import UntrustedStore


@dataclass(frozen=True)
class Gathered:
    """What is known of a folder at one time, by the last part of each name; nothing, unless something is given.

    Args:
        files: what some of its names have.
        doubt: what speaks against believing these files.
        names: all that it has, if that is known.
    """

    files: Mapping[str, bytes] = field(default_factory=dict)
    doubt: UntrustedStore | None = None
    names: Collection[str] | None = None

    def lacks(self, name: str) -> bool:
        """Whether it is known that nothing has a name."""
        return self.names is not None and name not in self.names


class Tier(Protocol):
    """Where a store's bytes are; its text names the place. A `CacheError` of a verb says by its kind what was wrong."""

    @property
    def remembers_s(self) -> float:
        """For how long a name may still be answered for with what it had, or had not, before."""

    def get(self, name: str, *, size: int | None = None, limit: int | None = None, anyone: bool = False) -> bytes:
        """Return what has a name, which must be `size` or at most `limit` bytes; FileNotFoundError if nothing has.

        An UntrustedStore if others can have written it, unless `anyone` may: whoever reads knows its digest.
        """

    def size(self, name: str) -> int | None:
        """Return how many bytes have a name, without reading them; None if that is unknown or there are none."""

    def names(self, folder: str) -> list[str]:
        """Return what is directly below a folder, sorted, each without the folder; nothing if there is none."""

    def gather(self, folder: str, *, limit: int, listed: bool = True) -> Gathered:
        """Return what is directly below a folder: all names, if they shall be `listed`, and files of at most `limit`.

        Files are those that cost less at once than one by one; whatever is not among them is got by its name.
        """

    def put(self, name: str, data: bytes, *, replace: bool = False) -> bool:
        """Give bytes a name in one step; return False, and change nothing, if it is taken and not to be replaced."""

    def delete(self, name: str) -> None:
        """Take a name away, if it is there."""

    def touch(self, name: str, every_s: float = 0.0) -> None:
        """Note that a name is in use, where that can be noted; never fails."""
