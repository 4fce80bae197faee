"""The entries of one tier, under the names of what was compiled; their blobs under the digest of their content.

Whatever the tier gives back is judged here, once: format, names, digests, who vouches for it, whether it was rejected.
Published is what has a manifest, so blobs come first and the manifest last. Knows nothing of compiling or loading, nor
of where a tier is.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from nanogpt_buckets import key as keys
from nanogpt_buckets.errors import CacheError, CorruptEntry, TransientError, UntrustedStore
from nanogpt_buckets.store.document import MAX_BYTES
from nanogpt_buckets.store.entry import Found, Miss, Status, Verified
from nanogpt_buckets.store.manifest import (
    Blob,
    Manifest,
    decode,
    encode_entry,
    encode_mark,
    is_digest,
    require_digest,
    why_rejected,
)
from nanogpt_buckets.store.tier import Gathered, Tier
from nanogpt_buckets.store.vouch import PLACE, Trust

T = TypeVar("T")

# How often a manifest is put before we believe that another process's is there, and hidden from us.
_ATTEMPTS = 3
_NOTHING = Gathered()


class Entries:
    """The entries of a tier.

    Args:
        tier: where they are.
        trust: what vouches for one.
    """

    def __init__(self, tier: Tier, trust: Trust = PLACE) -> None:
        self.tier = tier
        self.trust = trust
        self._rejected: dict[str, str] = {}  # digest of a manifest -> why, where the tier could not be told
        self._signatures: dict[str, bytes | None] = {}  # digest of a manifest that was gathered -> what is beside it

    @functools.cached_property
    def _trust(self) -> Trust:
        """What vouches for an entry, less what is revoked here."""
        return self.trust.informed(self.tier)

    # --- reading ------------------------------------------------------------------------------------------------------

    def look(self, family: str, key: str, parts: Mapping[str, Any] | None = None) -> Found:
        """Read one manifest, and no blob; one with other key parts than those that are given is corrupt."""
        return self._look_here(family, key, parts)

    def family(self, family: str) -> list[Found]:
        """Look at every entry of one family, by key; one miss without a key if the tier cannot be believed."""
        try:
            return self._look_at_all(family)
        except UntrustedStore as error:
            return [Miss.of(error, family)]

    def entries(self) -> Iterator[Found]:
        """Look at every entry."""
        locked = self.trust.locked
        families = self.tier.names("entries") if locked is None else sorted(locked.families)
        for family in filter(is_digest, families):
            yield from self._look_at_all(family)

    def glance(self, found: Found) -> Found:
        """Look whether the blobs of an entry are there and have the right size; no byte of them is read."""
        for blob in found.blobs if isinstance(found, Manifest) else ():
            size = self.tier.size(blob_name(blob.sha256))
            if size != blob.size:
                what = "is missing" if size is None else f"has {size} bytes, not {blob.size}"
                return Miss(Status.CORRUPT, found.family, found.key, f"{blob.role} ({blob.sha256[:12]}) {what}")
        return found

    def check(self, found: Found) -> Verified | Miss:
        """Read and verify every blob of an entry."""
        if isinstance(found, Miss):
            return found
        try:
            return self.read(found)
        except CacheError as error:
            return Miss.of(error, found.family, found.key)

    def read(self, manifest: Manifest) -> Verified:
        """Read every blob of an entry; raises as `read_blob`."""
        return Verified(manifest, {blob.role: self.read_blob(blob) for blob in manifest.blobs})

    def read_blob(self, blob: Blob) -> bytes:
        """Read a blob once and return exactly the bytes that were hashed.

        Raises:
            CorruptEntry: it is missing, or is not what its name says.
            TransientError: it cannot be read this time.
            UntrustedStore: others could have written the store.
        """
        return self._sure(lambda: self._read_blob_here(blob))

    def signature(self, manifest: Manifest) -> bytes | None:
        """Return the signature beside a manifest, whoever made it; None if there is none."""
        if manifest.digest in self._signatures:
            return self._signatures[manifest.digest]
        name = signature_name(manifest.family, manifest.key, manifest.digest)
        try:
            return self.tier.get(name, limit=MAX_BYTES, anyone=True)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def error(self, miss: Miss) -> CacheError:
        """Return a miss as the error that it is."""
        entry = f"entry {miss.key[:12]} in {self.tier} is {miss.status}: {miss.why or 'it is missing'}"
        names_the_place = miss.status in (Status.UNTRUSTED, Status.TRANSIENT)
        return miss.status.error(miss.why if names_the_place else entry, hint=miss.hint)

    # --- writing ------------------------------------------------------------------------------------------------------

    def publish(self, manifest: Manifest, blobs: Mapping[str, bytes], signature: bytes | None = None) -> Manifest:
        """Store an entry, or adopt the one that another process stored first; return what is in the store now.

        `signature` is one that it has already; where there is none and this store signs, it gets one.

        Raises:
            ValueError: the blobs by role are not the manifest's, or it could not be read back.
            IncompatibleEntry: a newer release has stored something under this key; it is left alone.
            UntrustedStore: others could have written the store.
            CacheError: it cannot be written; a TransientError if trying again may help.
        """
        data = encode_entry(manifest, blobs)
        stored = self._stored(manifest)
        if isinstance(stored, Verified):
            return stored.manifest
        signature = signature or self.trust.sign(manifest)
        for blob in manifest.blobs:
            self._put_blob(blob, blobs[blob.role])
        self._put_signature(manifest, signature)  # before the manifest, so that nobody meets that without
        corrupt = stored.status is Status.CORRUPT
        name = entry_name(manifest.family, manifest.key)
        attempts = 0
        while not self.tier.put(name, data, replace=corrupt):
            # Another process was first. If what it left is damaged already, ours replaces it; if it cannot be seen, it
            # was deleted, or a network file system remembers that it was not there: asking again makes it ask.
            stored = self._stored(manifest)
            if isinstance(stored, Verified):
                return stored.manifest
            corrupt = stored.status is Status.CORRUPT
            attempts += 1
            if attempts == _ATTEMPTS:
                why = f"entry {manifest.key[:12]} in {self.tier} was stored by another process, and cannot be seen yet"
                raise TransientError(why, hint="try again")
        for blob in manifest.blobs:
            # whoever pruned meanwhile did not know of this manifest; see `prune.delete`
            if self.tier.size(blob_name(blob.sha256)) is None:
                self.tier.put(blob_name(blob.sha256), blobs[blob.role])
        with contextlib.suppress(CacheError):
            self.tier.delete(mark_name(manifest.family, manifest.key))
        self._rejected.pop(manifest.digest, None)
        return manifest

    def sign(self, manifest: Manifest) -> None:
        """Sign an entry of this tier that is in order and that no trusted key signed yet, if this store signs.

        Raises:
            CacheError: it cannot be signed, or the signature cannot be written.
        """
        if self.trust.signer is None or self.tier.size(entry_name(manifest.family, manifest.key)) is None:
            return
        if self._trust.why_unsigned(manifest, lambda: self.signature(manifest)):
            self._put_signature(manifest, self.trust.sign(manifest))

    def add_signature(self, manifest: Manifest, signature: bytes | None) -> None:
        """Put a signature beside an entry that has none."""
        if signature is not None and self.signature(manifest) is None:
            self._put_signature(manifest, signature)

    def reject(self, manifest: Manifest, why: str) -> bool:
        """Record that an entry as it is now does not compute what it should; never fails.

        Returns whether the store could be told; if not, only this object knows.
        """
        self._rejected[manifest.digest] = why
        with contextlib.suppress(OSError, CacheError):
            return self.tier.put(
                mark_name(manifest.family, manifest.key), encode_mark(manifest.digest, why), replace=True
            )
        return False

    # ------------------------------------------------------------------------------------------------------------------

    def _look_here(
        self,
        family: str,
        key: str,
        parts: Mapping[str, Any] | None = None,
        gathered: Gathered = _NOTHING,
    ) -> Found:
        """Look at one entry of this tier; what was `gathered` of its folder is not asked for again."""
        try:
            manifest, doubt = self._sure(lambda: self._manifest_here(family, key, parts, gathered))
            why = self._why_rejected(manifest, gathered)
        except (OSError, CacheError) as error:
            return Miss.of(error, family, key)
        self._signatures.pop(manifest.digest, None)
        name = signature_name(family, key, manifest.digest).rpartition("/")[2]
        if name in gathered.files or gathered.lacks(name):
            self._signatures[manifest.digest] = gathered.files.get(name)
        try:
            signature = functools.cache(lambda: self.signature(manifest))
            why = why or self._trust.why_revoked(manifest, signature)
            self._trust.judge(manifest, doubt, signature)
        except CacheError as error:
            return replace(Miss.of(error, family, key), manifest=manifest)
        return Miss(Status.CORRUPT, family, key, f"rejected: {why}", manifest=manifest) if why else manifest

    def _sure(self, read: Callable[[], T]) -> T:
        """Read; where a client may remember what a name had before, damage is believed if it is the same twice."""
        said = None
        while True:
            try:
                return read()
            except CorruptEntry as error:
                if not self.tier.remembers_s or said == str(error):
                    raise
                said = str(error)
            time.sleep(self.tier.remembers_s)

    def _manifest_here(
        self, family: str, key: str, parts: Mapping[str, Any] | None, gathered: Gathered
    ) -> tuple[Manifest, UntrustedStore | None]:
        """Read a manifest of this tier that is in order, and what speaks against believing it for where it is."""
        if (found := gathered.files.get(f"{key}.json")) is not None:
            data, doubt = found, gathered.doubt
            if doubt is not None and not self.trust.shared:
                raise doubt
        else:
            data, doubt = self._manifest(entry_name(family, key))
        manifest = decode(data)
        if (manifest.family, manifest.key) != (family, key):
            raise CorruptEntry("the manifest belongs under another name")
        if parts is not None and (lines := keys.difference(parts, manifest.parts)):
            raise CorruptEntry(lines[0])
        return manifest, doubt

    def _read_blob_here(self, blob: Blob) -> bytes:
        try:
            # where others write, it is the digest that is believed
            data = self.tier.get(blob_name(blob.sha256), size=blob.size, anyone=self.trust.shared)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise CorruptEntry(f"{blob.role} ({blob.sha256[:12]}) is missing from the cache") from error
        if hashlib.sha256(data).hexdigest() != blob.sha256:
            raise CorruptEntry(f"{blob.role} ({blob.sha256[:12]}) is not what its name says")
        return data

    def _manifest(self, name: str) -> tuple[bytes, UntrustedStore | None]:
        """Return the bytes of a manifest, and what speaks against believing them for where they are."""
        try:
            return self.tier.get(name, limit=MAX_BYTES), None
        except UntrustedStore as doubt:
            if not self.trust.shared:
                raise
            return self.tier.get(name, limit=MAX_BYTES, anyone=True), doubt

    def _look_at_all(self, family: str) -> list[Found]:
        locked = self.trust.locked  # nothing else counts, so nobody need list it
        gathered = self.tier.gather(f"entries/{require_digest(family)}", limit=MAX_BYTES, listed=locked is None)
        if locked is not None:
            found = [entry.key for entry in locked.of(family)]
        else:
            found = sorted(name.removesuffix(".json") for name in gathered.names or () if name.endswith(".json"))
        entries = [self._look_here(family, k, gathered=gathered) for k in found if is_digest(k)]
        return [entry for entry in entries if isinstance(entry, Manifest) or entry.status is not Status.ABSENT]

    def _why_rejected(self, manifest: Manifest, gathered: Gathered) -> str | None:
        why = None
        name = mark_name(manifest.family, manifest.key)
        last = name.rpartition("/")[2]
        if last in gathered.files:
            why = why_rejected(gathered.files[last], manifest.digest)
        elif not gathered.lacks(last):
            with contextlib.suppress(FileNotFoundError):
                why = why_rejected(self.tier.get(name, limit=MAX_BYTES, anyone=self.trust.shared), manifest.digest)
        return why or self._rejected.get(manifest.digest)

    def _stored(self, manifest: Manifest) -> Verified | Miss:
        """Return what is under this key: complete, ABSENT or CORRUPT; raise for all others."""
        found = self.check(self.look(manifest.family, manifest.key, manifest.parts))
        if isinstance(found, Miss) and found.status not in (Status.ABSENT, Status.CORRUPT):
            raise self.error(found)
        return found

    def _put_signature(self, manifest: Manifest, signature: bytes | None) -> None:
        if signature is not None:
            self.tier.put(signature_name(manifest.family, manifest.key, manifest.digest), signature, replace=True)
            self._signatures.pop(manifest.digest, None)

    def _put_blob(self, blob: Blob, data: bytes) -> None:
        name = blob_name(blob.sha256)
        if self._has(blob):
            self.tier.touch(name)  # young again: whoever is pruning will leave it
        elif not (self.tier.put(name, data) or self._has(blob)):  # what another process has just put there stays
            self.tier.put(name, data, replace=True)

    def _has(self, blob: Blob) -> bool:
        """Whether a blob is there, in order."""
        try:
            self._read_blob_here(blob)
        except CorruptEntry:
            return False
        return True


def entry_name(family: str, key: str) -> str:
    """Return the name of a key's manifest."""
    return f"entries/{require_digest(family)}/{require_digest(key)}.json"


def mark_name(family: str, key: str) -> str:
    """Return the name of the mark that a key's entry was rejected."""
    return f"entries/{require_digest(family)}/{require_digest(key)}.rejected"


def signature_name(family: str, key: str, manifest: str) -> str:
    """Return the name of the signature on a key's manifest; another manifest, by its digest, has another."""
    return f"entries/{require_digest(family)}/{require_digest(key)}.{require_digest(manifest)[:16]}.sig"


def blob_name(sha256: str) -> str:
    """Return the name of a blob."""
    return f"blobs/{require_digest(sha256)[:2]}/{sha256}"
