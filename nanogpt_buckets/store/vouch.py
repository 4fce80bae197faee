"""What vouches for an entry: the place it is in, a lock file that names its manifest, or a signature on that.

The manifest vouches for its blobs. Knows nothing of directories, nor of what an entry is for.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from nanogpt_buckets.errors import CacheError, TransientError, UntrustedStore
from nanogpt_buckets.store.lockfile import LockFile
from nanogpt_buckets.store.manifest import Manifest
from nanogpt_buckets.store.signature import Signer, claimed, require_signed, signed
from nanogpt_buckets.store.signers import Policy, Signers
from nanogpt_buckets.store.tier import Tier

log = logging.getLogger(__name__)

_SIGN = "sign it: nanogpt-buckets build --sign-key FILE, where its key is trusted"


@dataclass(frozen=True)
class Trust:
    """What is believed of a store besides what only this user, or root, can have written there.

    Args:
        lock: what it names is believed wherever it is.
        only: nothing else is.
        looks: whoever uses the store only looks or deletes, and loads nothing, so it may be as it is.
        signers: whose signatures count.
        signer: signs what is published.
    """

    lock: LockFile | None = None
    only: bool = False
    looks: bool = False
    signers: Signers = field(default_factory=Signers)
    signer: Signer | None = None

    @property
    def shared(self) -> bool:
        """Whether the store may be where others write."""
        return self.looks or self.lock is not None or bool(self.signers.keys)

    @property
    def locked(self) -> LockFile | None:
        """The lock file, if nothing else is believed."""
        return self.lock if self.only else None

    def judge(self, manifest: Manifest, doubt: CacheError | None, signature: Callable[[], bytes | None]) -> None:
        """Judge an entry by its manifest and by what speaks against the place it is in.

        `signature` is asked for the file beside it only where that matters.

        Raises:
            UntrustedStore: nothing vouches for it, or it is not the one that is locked.
        """
        named = None if self.lock is None else self.lock.find(manifest.key)
        right = named is not None and named.manifest == manifest.digest
        if self.lock is not None and self.only and not right:
            why = "names another build of it" if named else "does not name it"
            path = shlex.quote(str(self.lock.path))
            hint = f"get the one it names, or lock this one: nanogpt-buckets build --lock {path}"
            raise UntrustedStore(f"{self.lock.path} {why}", hint=hint)
        if right and doubt is not None and self.lock is not None:
            doubt = self.lock.doubt
        if self.looks or (doubt is None and self.signers.policy is Policy.OFF):
            return
        why = self.why_unsigned(manifest, signature) if self.signers.asked else ""
        if doubt is not None and (why or not self.signers.asked):
            raise doubt if not why else type(doubt)(f"{doubt.message}; and {why}", hint=doubt.hint)
        if why and self.signers.policy is Policy.REQUIRE:
            raise UntrustedStore(f"{why}, and the policy is to require one", hint=_SIGN)
        if why:
            log.warning("entry %s: %s", manifest.key[:12], why)

    def why_unsigned(self, manifest: Manifest, signature: Callable[[], bytes | None]) -> str:
        """Say why no trusted key signed a manifest; "" if one did. A TransientError if it cannot be read this time."""
        try:
            data = signature()
            if data is None:
                return f"entry {manifest.key[:12]} has no signature"
            require_signed(data, manifest, self.signers.valid)
        except TransientError:
            raise
        except CacheError as error:
            return error.message
        return ""

    def sign(self, manifest: Manifest) -> bytes | None:
        """Return the signature to publish with a manifest; None if nothing is signed."""
        return None if self.signer is None else signed(manifest, self.signer)

    def why_revoked(self, manifest: Manifest, signature: Callable[[], bytes | None]) -> str | None:
        """Say why an entry was revoked, or the key that signed it, if one was: whatever else vouches for it."""
        why = self.signers.why_revoked(manifest.digest)
        if why is None and (revoked := self.signers.revoked_keys):
            signer = claimed(signature() or b"")
            why = f"the key that signed it was revoked: {revoked[signer]}" if signer in revoked else None
        return why

    def informed(self, tier: Tier) -> Trust:
        """Return the same with what a list in a store revokes."""
        return replace(self, signers=self.signers.informed(tier)) if self.signers.asked else self


PLACE = Trust()
"""What may be believed for its place: files and directories that nobody else can have written."""
