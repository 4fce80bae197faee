"""Whose signatures count: the keys that are trusted, what was revoked, and how much is asked.

Keys come from the user's own file, a flag or the environment, never from a store or the working directory. What is
revoked comes from that file, from a list that a trusted key signed in a store, and from this node's memory of such
lists, so that nobody who can write a store can make it forgotten. Knows nothing of entries.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from nanogpt_buckets import settings
from nanogpt_buckets.errors import (
    CacheError,
    CorruptEntry,
    IncompatibleEntry,
    TransientError,
    UntrustedStore,
    UsageError,
)
from nanogpt_buckets.files import read_file, replacing
from nanogpt_buckets.node.records import REVOKED
from nanogpt_buckets.owners import doubted
from nanogpt_buckets.store.document import MAX_BYTES, check, parse, require_format
from nanogpt_buckets.store.signature import FORMAT, PublicKey, Signer, opened, public_key, sealed
from nanogpt_buckets.store.tier import Tier
from nanogpt_buckets.values import shown

log = logging.getLogger(__name__)

# Where a store's list of what is revoked is.
LIST = "revoked.json"
_LIST_KIND = "nanogpt-buckets revocations"
_ATTEMPTS = 5
_OWN = "keep it where nobody else can write"


class Policy(StrEnum):
    """What is asked of an entry besides what its place asks: nothing, a word of warning, or a signature."""

    OFF = "off"
    WARN = "warn"
    REQUIRE = "require"


@dataclass(frozen=True)
class Signers:
    """The keys whose signatures count.

    Args:
        keys: trusted public keys, by id.
        policy: what is asked where the place would do.
        revoked: digests of manifests and ids of keys that count for nothing, and why.
    """

    keys: Mapping[str, PublicKey] = field(default_factory=dict)
    policy: Policy = Policy.OFF
    revoked: Mapping[str, str] = field(default_factory=dict)

    @property
    def asked(self) -> bool:
        """Whether signatures are of any interest."""
        return bool(self.keys) or self.policy is not Policy.OFF

    @property
    def valid(self) -> Mapping[str, PublicKey]:
        """The keys that are not revoked, by id."""
        return {name: key for name, key in self.keys.items() if self.why_revoked(name) is None}

    @property
    def revoked_keys(self) -> Mapping[str, str]:
        """The keys that are revoked, by id, and why: of the trusted ones, and those that a list or the file names."""
        if not self.asked:
            return {}
        reasons = {name: self.why_revoked(name) for name in {*self.keys, *(n for n in self.revoked if len(n) == 16)}}
        return {name: why for name, why in reasons.items() if why is not None}

    def why_revoked(self, name: str) -> str | None:
        """Say why a manifest, by its digest, or a key, by its id, was revoked; None if it was not.

        A CacheError if this node knows and cannot tell: its record is damaged or a newer release's.
        """
        if name in self.revoked:
            return self.revoked[name]
        try:
            return str(REVOKED.read(name)["why"]) if self.asked else None
        except FileNotFoundError:
            return None

    def informed(self, tier: Tier) -> Signers:
        """Return these with what a list in a store revokes, which this node then remembers."""
        found = read_list(tier, self)
        for name, why in found.items():
            if REVOKED.find(name) is None:
                REVOKED.keep(name, {"why": why})
        return replace(self, revoked={**found, **self.revoked})


@dataclass(frozen=True)
class TrustFile:
    """What the user's own file says.

    Args:
        path: where it is, whether or not it is there.
        keys: trusted public keys and what they are called.
        revoked: digests of manifests and ids of keys, and why.
    """

    path: Path
    keys: Mapping[str, str] = field(default_factory=dict)
    revoked: Mapping[str, str] = field(default_factory=dict)

    def write(self) -> None:
        """Write the file, its directory too if there is none; a CacheError if that cannot be."""
        document = {"format": FORMAT, "keys": dict(self.keys), "revoked": dict(self.revoked)}
        text = json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with replacing(self.path) as file:
                os.fchmod(file.fileno(), 0o600)
                file.write(text.encode("utf-8"))
        except OSError as error:
            raise CacheError(f"{self.path} cannot be written: {error.strerror or error}", hint=_OWN) from error


def trust_file() -> TrustFile:
    """Read the user's own file; an empty one if there is none.

    Raises:
        UntrustedStore: others could have written it.
        CorruptEntry: it is something else.
        IncompatibleEntry: a newer release wrote it.
        UsageError: it cannot be read.
    """
    path = settings.trust_file()
    if not os.path.lexists(path):  # whoever could write there: what is not there says nothing
        return TrustFile(path)
    try:
        if (doubt := doubted(path, _OWN)) is not None:
            raise doubt
        document = parse(read_file(path.resolve(), limit=MAX_BYTES), "it")
        require_format(document, FORMAT, _FILE, "it")
        check(document, _FILE, "it")
    except OSError as error:
        raise UsageError(f"the trusted keys {path} cannot be read: {error.strerror or error}") from error
    except (CorruptEntry, IncompatibleEntry) as error:
        hint = error.hint if isinstance(error, IncompatibleEntry) else "mend or delete it, then trust add"
        raise type(error)(f"the trusted keys {path} cannot be used: {error.message}", hint=hint) from error
    return TrustFile(path, document["keys"], document["revoked"])


def signers(
    trusted: Iterable[str] | str | None = None, policy: str | None = None, own: PublicKey | None = None
) -> Signers:
    """Return whose signatures count: those in the user's own file, and the keys or files of keys that are named.

    Args:
        trusted: each `ed25519:...`, or a file; None for what NANOGPT_BUCKETS_TRUSTED names, separated by commas.
        policy: "off", "warn" or "require"; None for what NANOGPT_BUCKETS_POLICY says.
        own: the key that this process signs with.

    Raises:
        UsageError: a key or the policy is none.
        CacheError: a file cannot be used.
    """
    file = trust_file()
    texts = [*file.keys, *(text for name in settings.trusted(trusted) for text in _keys_in(name))]
    said = settings.policy(policy)
    if said not in list(Policy):
        raise UsageError(f"policy {shown(said)} is unknown", hint=f"policies: {', '.join(Policy)}")
    found = [public_key(text) for text in texts] + ([] if own is None else [own])
    if said != Policy.OFF and not found:
        hint = f"nanogpt-buckets trust add KEY, --trusted KEY or {settings.TRUSTED_VARIABLE}"
        raise UsageError(f"policy {said} asks for signatures, and no key is trusted", hint=hint)
    return Signers({key.id: key for key in found}, Policy(said), file.revoked)


def read_keys(name: str) -> list[PublicKey]:
    """Return the keys that a text is, or that a file holds; raises as `signers`."""
    return [public_key(text) for text in _keys_in(name)]


def read_list(tier: Tier, known: Signers) -> dict[str, str]:
    """Return what the list in a store revokes, and why; nothing, with a warning, if no trusted key signed it."""
    try:
        data = tier.get(LIST, limit=MAX_BYTES, anyone=True)
        statement, _ = opened(data, known.valid, _STATEMENT, "the list of what is revoked", MAX_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (CorruptEntry, IncompatibleEntry, UntrustedStore) as error:
        log.warning("in %s: %s; it is not used", tier, error.message)
        return {}
    return dict(statement["revoked"])


def revoke_in(tier: Tier, known: Signers, signer: Signer, names: Mapping[str, str]) -> dict[str, str]:
    """Add digests of manifests and ids of keys to the list in a store, sign it, and return all that it revokes.

    Raises:
        CacheError: the list cannot be signed or written, or others change it all the time.
    """
    for _ in range(_ATTEMPTS):
        everything = {**read_list(tier, known), **names}
        statement = {"kind": _LIST_KIND, "format": FORMAT, "revoked": everything, "time": int(time.time())}
        data = sealed(statement, signer)
        if len(data) > MAX_BYTES:
            raise CacheError(f"the list of what is revoked in {tier} would be longer than {MAX_BYTES} bytes")
        tier.put(LIST, data, replace=True)
        if everything.items() <= (after := read_list(tier, known)).items():  # nobody wrote meanwhile
            return after
    raise TransientError(f"the list of what is revoked in {tier} is not what was written; is {names} in it?")


def _keys_in(name: str) -> list[str]:
    """Return the keys in a text: itself, or one in PEM or several, one a line, in the file that it names."""
    if name.startswith("ed25519:"):
        return [name]
    path = settings.expanded(name, "--trusted")
    try:
        if (doubt := doubted(path, _OWN)) is not None:
            raise doubt
        text = read_file(path.resolve(), limit=MAX_BYTES).decode("utf-8")
    except (OSError, CorruptEntry, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise UsageError(f"no key can be read from {name}: {why}", hint="name a file, or ed25519:...") from error
    if "-----BEGIN" in text:
        return [text]
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return [line for line in lines if line]


def _is_why(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 500


_STATEMENT = {"kind": lambda value: value == _LIST_KIND, "format": int, "revoked": {str: _is_why}, "time": int}
_FILE = {"format": int, "keys": {str: str}, "revoked": {str: _is_why}}
