"""From what a user said about places and trust to a store. Knows nothing of models, nor of how it was said."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypedDict, Unpack

from nanogpt_buckets import settings
from nanogpt_buckets.errors import UsageError
from nanogpt_buckets.store.lockfile import open_lock, read_lock
from nanogpt_buckets.store.signature import Signer, command, key_file, try_out
from nanogpt_buckets.store.signers import signers
from nanogpt_buckets.store.store import Store
from nanogpt_buckets.store.transfer import place_of
from nanogpt_buckets.store.vouch import Trust
from nanogpt_buckets.values import shown

MODES = ("rw", "ro", "off")
_PathLike = str | os.PathLike[str]


class Places(TypedDict, total=False):
    """Where entries are and which are believed.

    `cache_dir`: where buckets are; None for the default. `locked`: a lock file, written by `build`: what it does not
    name is not loaded, wherever the cache is, and nothing is compiled. `layers`: further cache directories to look in,
    where nothing is written; None for those that NANOGPT_BUCKETS_LAYERS names. `remote`: a directory or the URL of an
    object store to ask for what is in none of these; None for what NANOGPT_BUCKETS_REMOTE names. `remote_mode`: "ro";
    "rw" to publish there, too, what is built; or "off". `trusted`: public keys, or files of them, whose signatures
    count besides those in the user's own file. `policy`: "off"; "warn" or "require" to ask for signatures in a place of
    one's own, too.
    """

    cache_dir: _PathLike | None
    locked: _PathLike | None
    layers: Sequence[_PathLike] | None
    remote: _PathLike | None
    remote_mode: str | None
    trusted: Sequence[str] | str | None
    policy: str | None


class Written(Places, total=False):
    """What a build writes besides entries.

    `lock`: the lock file, whose entries it believes and adds to. `sign_key`: a file with the private key that signs
    entries. `sign_command`: a command that does, the statement on its standard input, the signature on its standard
    output.
    """

    lock: _PathLike | None
    sign_key: _PathLike | None
    sign_command: str | None


def open_store(**said: Unpack[Written]) -> Store:
    """Return the store that was asked for.

    Raises:
        UsageError: something cannot be what it is said to be.
        CacheError: a file or the remote cannot be used.
    """
    trust = trust_of(**said)
    mode, place = settings.remote_mode(said.get("remote_mode")), settings.remote(said.get("remote"))
    if mode not in MODES:
        raise UsageError(f"remote mode {shown(mode)} is unknown", hint=f"modes: {', '.join(MODES)}")
    remote = None if place is None or mode == "off" else place_of(place, trust)
    layers = settings.layers(said.get("layers"))
    return Store(settings.cache_dir(said.get("cache_dir")), trust, layers, remote, writes=mode == "rw")


def trust_of(**said: Unpack[Written]) -> Trust:
    """Return what is believed, and who signs; raises as `open_store`."""
    sign_key, sign_command = said.get("sign_key"), said.get("sign_command")
    if sign_key is not None and sign_command is not None:
        raise UsageError("--sign-key and --sign-command say the same thing twice", hint="give one of them")
    signer: Signer | None = None
    if sign_key is not None:
        signer = key_file(settings.expanded(sign_key, "--sign-key"))
    known = signers(said.get("trusted"), said.get("policy"), own=None if signer is None else try_out(signer))
    if sign_command is not None:
        signer = command(sign_command, known.valid)
        try_out(signer)
    locked, lock, file = said.get("locked"), said.get("lock"), None
    if locked is not None:
        file = read_lock(settings.expanded(locked, "--locked"))
    elif lock is not None:
        file = open_lock(settings.expanded(lock, "--lock"))
    return Trust(file, only=locked is not None, signers=known, signer=signer)
