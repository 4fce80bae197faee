"""What vouches for an entry: the place it is in, or a lock file that names its manifest, which vouches for its blobs.

Knows nothing of directories, nor of what an entry is for.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from nanogpt_buckets.errors import UntrustedStore
from nanogpt_buckets.store.lockfile import LockFile
from nanogpt_buckets.store.manifest import Manifest


@dataclass(frozen=True)
class Trust:
    """What is believed of a store besides what only this user, or root, can have written there.

    Args:
        lock: what it names is believed wherever it is.
        only: nothing else is.
        looks: whoever uses the store only looks or deletes, and loads nothing, so it may be as it is.
    """

    lock: LockFile | None = None
    only: bool = False
    looks: bool = False

    @property
    def shared(self) -> bool:
        """Whether the store may be where others write."""
        return self.looks or self.lock is not None

    @property
    def locked(self) -> LockFile | None:
        """The lock file, if nothing else is believed."""
        return self.lock if self.only else None

    def judge(self, manifest: Manifest, doubt: UntrustedStore | None) -> None:
        """Judge an entry by its manifest and by what speaks against the place it is in.

        Raises:
            UntrustedStore: nothing vouches for it, or it is not the one that is locked.
        """
        named = None if self.lock is None else self.lock.find(manifest.key)
        if self.lock is not None and named is not None and named.manifest == manifest.digest:
            if doubt is not None:
                self.lock.vouch()
            return
        if self.lock is not None and self.only:
            why = "names another build of it" if named else "does not name it"
            path = shlex.quote(str(self.lock.path))
            hint = f"get the one it names, or lock this one: nanogpt-buckets build --lock {path}"
            raise UntrustedStore(f"{self.lock.path} {why}", hint=hint)
        if doubt is not None and not self.looks:
            raise doubt


PLACE = Trust()
