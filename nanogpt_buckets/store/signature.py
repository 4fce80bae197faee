"""Signatures: Ed25519, detached, over a small statement in canonical JSON; who signs, and how one is checked.

A signed file is canonical JSON {"signature", "signer", "statement"} and a newline. What is signed are the bytes of the
statement, whose "kind" keeps one from passing as another. Knows nothing of which keys are trusted, nor of where files
are.
"""

from __future__ import annotations

import base64
import getpass
import hashlib
import importlib
import os
import platform
import re
import shlex
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanogpt_buckets import key as keys
from nanogpt_buckets.errors import CacheError, CorruptEntry, UntrustedStore, UsageError
from nanogpt_buckets.files import read_file
from nanogpt_buckets.owners import doubted
from nanogpt_buckets.store.document import MAX_BYTES, check, parse, require_format
from nanogpt_buckets.store.manifest import Manifest, is_digest

FORMAT = 1
ENTRY = "nanogpt-buckets entry"
# Of a statement about an entry; a KMS signs no more than 4 KB at once.
_MAX_STATEMENT = 1024
_MAX_KEY = 16 * 1024
_COMMAND_S = 60.0
_EXTRA = "pip install 'nanogpt-buckets[signing]'"
_ID = re.compile(r"[0-9a-f]{16}")
_MAKE_KEY = "to make one: openssl genpkey -algorithm ed25519 -out FILE, and chmod 600 FILE"
_MAKE_PUBLIC = "the public half of a key: openssl pkey -in FILE -pubout"


@dataclass(frozen=True)
class PublicKey:
    """The half of a key that verifies; 32 bytes."""

    raw: bytes

    @property
    def id(self) -> str:
        """What it is called: the beginning of its sha256, 16 hex digits."""
        return hashlib.sha256(self.raw).hexdigest()[:16]

    def __str__(self) -> str:
        return f"ed25519:{base64.b64encode(self.raw).decode('ascii')}"

    def verifies(self, signature: bytes, data: bytes) -> bool:
        """Whether the holder of the other half signed these bytes."""
        found = _package("hazmat.primitives.asymmetric.ed25519").Ed25519PublicKey.from_public_bytes(self.raw)
        try:
            found.verify(signature, data)
        except _package("exceptions").InvalidSignature:
            return False
        return True


# Signs bytes: returns the key that verifies, and the signature.
Signer = Callable[[bytes], tuple[PublicKey, bytes]]


def public_key(text: str) -> PublicKey:
    """Read a public key, as `ed25519:` and base64 or as PEM.

    Raises:
        UsageError: it is none, or it is the private half.
    """
    if "PRIVATE KEY" in text:
        raise UsageError("this is a private key, which is nobody's to know", hint=_MAKE_PUBLIC)
    try:
        if text.startswith("ed25519:"):
            raw = base64.b64decode(text.removeprefix("ed25519:").strip(), validate=True)
            if len(raw) == 32:
                return PublicKey(raw)
        elif "BEGIN PUBLIC KEY" in text:
            found = _package("hazmat.primitives.serialization").load_pem_public_key(text.encode("ascii"))
            if isinstance(found, _package("hazmat.primitives.asymmetric.ed25519").Ed25519PublicKey):
                return PublicKey(found.public_bytes_raw())
    except UsageError:
        raise
    except (ValueError, TypeError):
        pass
    raise UsageError(f"{text.strip()[:60]!r} is no Ed25519 public key", hint=_MAKE_PUBLIC)


def key_file(path: Path) -> Signer:
    """Return what signs with an Ed25519 private key in PEM, as openssl and ssh-keygen -m PKCS8 write it.

    Raises:
        UsageError: it cannot be read, is no such key, or has a passphrase.
        UntrustedStore: others may read or write it.
    """
    hint = f"chmod 600 {shlex.quote(str(path))}, and another key if others have read it"
    ed25519 = _package("hazmat.primitives.asymmetric.ed25519")
    serialization = _package("hazmat.primitives.serialization")
    unsupported = _package("exceptions").UnsupportedAlgorithm
    try:
        if hasattr(os, "geteuid") and (mode := path.stat().st_mode & 0o077):
            raise UntrustedStore(f"the key file {path} is open to others (mode {mode:03o} beyond its owner)", hint=hint)
        if (doubt := doubted(path, hint)) is not None:
            raise doubt
        data = read_file(path.resolve(), limit=_MAX_KEY)
        key = serialization.load_pem_private_key(data, None)
    except TypeError as error:
        raise UsageError(f"the key file {path} has a passphrase", hint="use --sign-command for it") from error
    except OSError as error:
        raise UsageError(f"the key file {path} cannot be read: {error.strerror or error}", hint=_MAKE_KEY) from error
    except (ValueError, CorruptEntry, unsupported) as error:
        raise UsageError(f"the key file {path} holds no private key in PEM", hint=_MAKE_KEY) from error
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise UsageError(f"the key file {path} holds a key of another kind than Ed25519", hint=_MAKE_KEY)
    public = PublicKey(key.public_key().public_bytes_raw())
    return lambda data: (public, key.sign(data))


def command(line: str, known: Mapping[str, PublicKey]) -> Signer:
    """Return what signs with a command: the statement on its standard input, the signature on its standard output.

    The signature is 64 bytes, or their base64. One of the known keys must verify it.

    Raises:
        UsageError: the line is no command.
    """
    try:
        words = shlex.split(line)
    except ValueError as error:
        raise UsageError(f"the sign command cannot be split into words: {error}") from error
    if not words:
        raise UsageError("the sign command is empty", hint="leave it out to sign nothing")

    def sign(data: bytes) -> tuple[PublicKey, bytes]:
        try:
            done = subprocess.run(words, input=data, capture_output=True, timeout=_COMMAND_S, check=False)
        except subprocess.TimeoutExpired as error:
            raise CacheError(f"the sign command {words[0]} took longer than {_COMMAND_S:.0f} s") from error
        except OSError as error:
            raise UsageError(f"the sign command {words[0]} cannot be run: {error.strerror or error}") from error
        if done.returncode:
            said = done.stderr.decode("utf-8", "replace").strip().splitlines()
            why = f": {said[-1][:200]}" if said else ""
            raise CacheError(f"the sign command {words[0]} ended with status {done.returncode}{why}")
        signature = _signature(done.stdout)
        public = next((key for key in known.values() if signature and key.verifies(signature, data)), None)
        if public is None:
            what = "no Ed25519 signature" if signature is None else "a signature that no trusted key verifies"
            hint = "it must print 64 bytes or their base64; name the key that verifies them with --trusted"
            raise CacheError(f"the sign command {words[0]} printed {what}", hint=hint)
        return public, signature or b""

    return sign


def signed(manifest: Manifest, signer: Signer) -> bytes:
    """Return the file that says that a manifest may be believed."""
    statement = {
        "kind": ENTRY, "format": FORMAT, "key": manifest.key, "manifest": manifest.digest, "builder": _builder(),
        "time": int(time.time()),
    }  # fmt: skip
    return sealed(statement, signer)


def try_out(signer: Signer) -> PublicKey:
    """Let a signer sign a statement about no entry, to find out before minutes of compiling; return its key."""
    nothing = {"kind": ENTRY, "format": FORMAT, "key": "0" * 64, "manifest": "0" * 64, "builder": "trial", "time": 0}
    return signer(keys.canonical_json(nothing))[0]


def require_signed(data: bytes, manifest: Manifest, known: Mapping[str, PublicKey]) -> str:
    """Return who of those that are known signed a manifest.

    Raises:
        UntrustedStore: none of them did.
        CorruptEntry: the file is no signature.
        IncompatibleEntry: a newer release wrote it.
    """
    statement, signer = opened(data, known, _STATEMENT, "the signature")
    if (statement["key"], statement["manifest"]) != (manifest.key, manifest.digest):
        raise UntrustedStore("the signature is for another entry")
    return signer


def claimed(data: bytes) -> str:
    """Return the id of the key that a signature says it is by, which proves nothing; "" if it says none."""
    try:
        signer = parse(data, "the signature", 2 * _MAX_STATEMENT).get("signer")
    except CorruptEntry:
        return ""
    return str(signer) if _is_id(signer) else ""


def sealed(statement: Mapping[str, Any], signer: Signer) -> bytes:
    """Return a statement as a signed file."""
    public, signature = signer(keys.canonical_json(statement))
    text = base64.b64encode(signature).decode("ascii")
    return keys.canonical_json({"signature": text, "signer": public.id, "statement": statement}) + b"\n"


def opened(
    data: bytes, known: Mapping[str, PublicKey], kind: Mapping[str, Any], what: str, limit: int = 2 * _MAX_STATEMENT
) -> tuple[dict[str, Any], str]:
    """Return the statement of a signed file, to the type of each part, and who of those that are known signed it.

    Raises:
        UntrustedStore: none of them did.
        CorruptEntry: it is no such file.
        IncompatibleEntry: a newer release wrote it.
    """
    document = parse(data, what, min(limit, MAX_BYTES))
    check(document, {"signature": str, "signer": _is_id, "statement": dict}, what)
    statement, signer = document["statement"], document["signer"]
    if signer not in known:
        raise UntrustedStore(f"{what} is by key {signer}, which is not trusted")
    signature = _signature(document["signature"].encode("utf-8"))
    if signature is None or not known[signer].verifies(signature, keys.canonical_json(statement)):
        raise UntrustedStore(f"{what} is not what key {signer} signed")
    require_format(statement, FORMAT, kind, what)
    check(statement, kind, what)
    return statement, signer


def _signature(data: bytes) -> bytes | None:
    """Return the 64 bytes of a signature, as they are or in base64."""
    if len(data) == 64:
        return data
    try:
        raw = base64.b64decode(data.strip(), validate=True)
    except ValueError:
        return None
    return raw if len(raw) == 64 else None


def _builder() -> str:
    """Return who builds, for people; it proves nothing."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError, ImportError):
        user = str(os.getuid()) if hasattr(os, "getuid") else "unknown"
    plain = re.sub(r"[^A-Za-z0-9._@-]", "-", f"{user}@{platform.node()}")
    return plain[:200]


def _is_id(value: Any) -> bool:
    return type(value) is str and _ID.fullmatch(value) is not None


_STATEMENT = {
    "kind": lambda value: value == ENTRY, "format": int, "key": is_digest, "manifest": is_digest, "builder": str,
    "time": int,
}  # fmt: skip


def _package(name: str) -> Any:
    try:
        return importlib.import_module(f"cryptography.{name}")
    except ImportError as error:
        raise UsageError("signatures need a package that is not installed: cryptography", hint=_EXTRA) from error
