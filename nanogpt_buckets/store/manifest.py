"""Manifest: what one compiled entry is, and the only bytes on disk that say so. `encode` and `decode` side by side.

On disk it is `{"sha256": digest of the canonical bytes of "body", "body": {...}}` in canonical JSON and a newline.
Whatever is not exactly that is corrupt; a newer format whose digest holds is incompatible and is left alone.
Knows nothing of directories, nor of what a blob holds.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, NoReturn

from nanogpt_buckets import key as keys
from nanogpt_buckets.backends.base import DEFERRED
from nanogpt_buckets.contract import Contract
from nanogpt_buckets.errors import CorruptEntry, IncompatibleEntry, PlanError
from nanogpt_buckets.plan.bucket import Bucket

FORMAT = 1
MAX_BYTES = 256 * 1024
MAX_DEPTH = 8

_HEX = re.compile(r"[0-9a-f]{64}")
_ROLE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")
# A string is one token even when it never ends, so that no input is scanned twice.
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"?|[\[{]|[\]}]', re.DOTALL)


@dataclass(frozen=True)
class Blob:
    """A file of an entry, named by its content.

    Args:
        role: what the backend calls it; a plain word, never a path.
        sha256: 64 lowercase hex digits.
        size: in bytes.
    """

    role: str
    sha256: str
    size: int


@dataclass(frozen=True)
class Manifest:
    """One compiled entry.

    Args:
        family: digest of `parts["family"]`.
        key: digest of `parts`.
        parts: the key parts, plain JSON, compared on every hit.
        blobs: the files of the entry, each role once.
        inputs: what a call takes, in order.
        outputs: what a call returns, in order.
        weights: tensors bound once before the first call.
        requires: what a host must have to load it, plain JSON.
        contains_weights: whether weights are compiled in.
        stats: measured while compiling, for example compile_ms.
        gate: how it was checked before it was published, plain JSON without floats.
    """

    family: str
    key: str
    parts: dict[str, Any]
    blobs: tuple[Blob, ...]
    inputs: tuple[Contract, ...]
    outputs: tuple[Contract, ...]
    weights: tuple[Contract, ...]
    requires: dict[str, Any]
    contains_weights: bool
    stats: dict[str, int]
    gate: dict[str, Any]

    @property
    def unchecked(self) -> str | None:
        """Why it was published without a check, if it was; it is checked when a device first loads it."""
        return self.gate.get(DEFERRED)

    @property
    def bucket(self) -> Bucket | None:
        """The bucket it was compiled for; None if this release has no such buckets."""
        try:
            return Bucket(**self.parts["bucket"])
        except (KeyError, TypeError, PlanError):
            return None


_FIELDS = frozenset(field.name for field in fields(Manifest)) | {"format"}


def is_digest(text: object) -> bool:
    """Whether this is a sha256 as we write it: 64 lowercase hex digits. Nothing else becomes part of a path."""
    return isinstance(text, str) and _HEX.fullmatch(text) is not None


def require_digest(text: str) -> str:
    """Return a digest that is about to become part of a path.

    Raises:
        ValueError: it is no digest.
    """
    if not is_digest(text):
        raise ValueError(f"{text!r} is not 64 lowercase hex digits")
    return text


def encode(manifest: Manifest) -> bytes:
    """Return the bytes of a manifest file.

    Raises:
        TypeError: it holds a float, or something else that is not plain JSON.
    """
    body = {"format": FORMAT, **asdict(manifest)}
    digest = hashlib.sha256(keys.canonical_json(body)).hexdigest()
    return keys.canonical_json({"sha256": digest, "body": body}) + b"\n"


def encode_entry(manifest: Manifest, blobs: Mapping[str, bytes]) -> bytes:
    """Return the bytes of a manifest that can be read back and has exactly these blobs."""
    data = encode(manifest)
    try:
        decode(data)
    except CorruptEntry as error:
        raise ValueError(f"this manifest could not be read back: {error}") from error
    if {blob.role for blob in manifest.blobs} != set(blobs):
        raise ValueError("the blobs are not those that the manifest names")
    for blob in manifest.blobs:
        content = blobs[blob.role]
        if len(content) != blob.size or hashlib.sha256(content).hexdigest() != blob.sha256:
            raise ValueError(f"{blob.role} is not the blob that the manifest names")
    return data


def decode(data: bytes) -> Manifest:
    """Read the bytes of a manifest file.

    Raises:
        CorruptEntry: they are not, to the last byte, what `encode` could have written.
        IncompatibleEntry: intact, but written by a newer release.
    """
    document = parse(data, "the manifest")
    body = document.get("body")
    if not isinstance(body, dict) or document.get("sha256") != hashlib.sha256(_canonical(body)).hexdigest():
        _corrupt("the manifest does not match its own digest")
    version = body.get("format")
    if type(version) is int and version > FORMAT:
        raise IncompatibleEntry(
            f"the manifest has format {version}, and this release reads {FORMAT}",
            hint="pip install --upgrade nanogpt-buckets",
        )
    ours = type(version) is int and version == FORMAT and set(document) == {"sha256", "body"}
    if not ours or _canonical(document) + b"\n" != data:
        _corrupt("the manifest is not written as format 1 is")
    manifest = _from_body(body)
    _check_names(manifest)
    return manifest


def parse(data: bytes, what: str) -> dict[str, Any]:
    """Read a small JSON object that anyone may have written: bounded, no floats, no name twice.

    Args:
        data: the bytes of a file.
        what: what to call it in errors.

    Raises:
        CorruptEntry: it is anything else.
    """
    if len(data) > MAX_BYTES:
        _corrupt(f"{what} is longer than {MAX_BYTES} bytes")
    try:
        text = data.decode("utf-8")
        if _depth(text) > MAX_DEPTH:
            _corrupt(f"{what} is nested deeper than {MAX_DEPTH} levels")
        value = json.loads(text, parse_float=_no_float, parse_constant=_no_float, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise CorruptEntry(f"{what} is not plain JSON: {error}") from error
    if not isinstance(value, dict):
        _corrupt(f"{what} is not a JSON object")
    return value


def _depth(text: str) -> int:
    # counted before parsing, because the parser recurses
    depth = deepest = 0
    for token in _TOKEN.finditer(text):
        first = text[token.start()]
        if first in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif first in "]}":
            depth -= 1
    return deepest


def _no_float(text: str) -> NoReturn:
    raise ValueError(f"{text[:40]} is not a whole number")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a name is given twice")
    return value


def _canonical(value: dict[str, Any]) -> bytes:
    try:
        return keys.canonical_json(value)
    except UnicodeEncodeError as error:
        raise CorruptEntry("the manifest holds half a surrogate pair") from error


def _corrupt(message: str) -> NoReturn:
    raise CorruptEntry(message)


def _from_body(body: dict[str, Any]) -> Manifest:
    _need(body, _FIELDS, "the manifest")
    return Manifest(
        family=_digest(body["family"], "family"),
        key=_digest(body["key"], "key"),
        parts=_typed(body["parts"], dict, "parts"),
        blobs=tuple(_blob(row) for row in _typed(body["blobs"], list, "blobs")),
        inputs=_contracts(body["inputs"], "inputs"),
        outputs=_contracts(body["outputs"], "outputs"),
        weights=_contracts(body["weights"], "weights"),
        requires=_typed(body["requires"], dict, "requires"),
        contains_weights=_typed(body["contains_weights"], bool, "contains_weights"),
        stats={name: _count(value, name) for name, value in _typed(body["stats"], dict, "stats").items()},
        gate=_typed(body["gate"], dict, "gate"),
    )


def _check_names(manifest: Manifest) -> None:
    """Compare the two names with the parts they are digests of, and refuse a role used twice."""
    family = manifest.parts.get("family")
    if not isinstance(family, dict) or keys.digest(family) != manifest.family:
        _corrupt("the manifest's family is not the digest of its parts")
    if keys.digest(manifest.parts) != manifest.key:
        _corrupt("the manifest's key is not the digest of its parts")
    if len({blob.role for blob in manifest.blobs}) != len(manifest.blobs):
        _corrupt("the manifest names a role twice")


def _blob(row: Any) -> Blob:
    _need(row, {"role", "sha256", "size"}, "a blob")
    role = _typed(row["role"], str, "role")
    if _ROLE.fullmatch(role) is None:
        _corrupt(f"role {role[:40]!r} is not a plain word")
    return Blob(role, _digest(row["sha256"], "sha256"), _count(row["size"], "size"))


def _contracts(rows: Any, what: str) -> tuple[Contract, ...]:
    return tuple(_contract(row, what) for row in _typed(rows, list, what))


def _contract(row: Any, what: str) -> Contract:
    _need(row, {"name", "dtype", "shape"}, what)
    shape = tuple(_count(size, "shape") for size in _typed(row["shape"], list, "shape"))
    return Contract(_typed(row["name"], str, "name"), _typed(row["dtype"], str, "dtype"), shape)


def _need(value: Any, names: Iterable[str], what: str) -> None:
    if not isinstance(value, Mapping) or set(value) != set(names):
        _corrupt(f"{what} has unknown or missing fields")


def _typed(value: Any, kind: type, what: str) -> Any:
    # bool is an int, so the exact type is asked for
    if type(value) is not kind:
        _corrupt(f"{what} is {type(value).__name__}, not {kind.__name__}")
    return value


def _count(value: Any, what: str) -> int:
    if type(value) is not int or value < 0:
        _corrupt(f"{what} is not a whole number of zero or more")
    return value


def _digest(value: Any, what: str) -> str:
    if not is_digest(value):
        _corrupt(f"{what} is not 64 lowercase hex digits")
    return str(value)
