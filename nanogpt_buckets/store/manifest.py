"""Manifest: what one compiled entry is, and the only bytes on disk that say so. `encode` and `decode` side by side.

On disk it is `{"sha256": digest of the canonical bytes of "body", "body": {...}}` in canonical JSON and a newline.
Whatever is not exactly that is corrupt, to the type of every part that anybody reads; a newer format, or an unknown
field, whose digest holds is incompatible and is left alone. Knows nothing of directories, nor of what a blob holds.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from nanogpt_buckets import key as keys
from nanogpt_buckets.contract import DEFERRED, Contract
from nanogpt_buckets.errors import CorruptEntry, PlanError
from nanogpt_buckets.plan.bucket import STEPS, Bucket
from nanogpt_buckets.store.document import MAX_BYTES, check, checker, corrupt, parse, require_format

FORMAT = 1
MARK_FORMAT = 1

_HEX = re.compile(r"[0-9a-f]{64}")
_START = b'{"body":'
_AFTER_BODY = len(',"sha256":""}\n') + 64
_NESTED = {dict, list}  # what json.loads makes that holds more
_MARK = "the mark that it was rejected"
_ROLE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class Blob:
    """A file of an entry, named by its content; its role is what the backend calls it, a plain word and no path."""

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

    @functools.cached_property
    def digest(self) -> str:
        """The sha256 of its file."""
        return hashlib.sha256(encode(self)).hexdigest()

    @property
    def size(self) -> int:
        """Of all blobs together, in bytes."""
        return sum(blob.size for blob in self.blobs)

    @property
    def unchecked(self) -> str | None:
        """Why it was published without a check, if it was; it is checked when a device first loads it."""
        return self.gate.get(DEFERRED)

    @functools.cached_property
    def bucket(self) -> Bucket | None:
        """The bucket it was compiled for; None if only a newer release has such buckets."""
        return bucket_of(self.parts["bucket"])


def bucket_of(named: Mapping[str, Any]) -> Bucket | None:
    """Return the bucket that a key's parts name; None if only a newer release has such buckets.

    Raises:
        PlanError: it is none.
        TypeError: it is none.
    """
    known = named.keys() <= {"step", "batch_size", "seq_len"} and named.get("step", STEPS[0]) in STEPS
    return Bucket(**named) if known else None


def is_digest(text: object) -> bool:
    """Whether this is a sha256 as we write it: 64 lowercase hex digits. Nothing else becomes part of a path."""
    return isinstance(text, str) and _HEX.fullmatch(text) is not None


def require_digest(text: str) -> str:
    """Return a digest that is about to become part of a path; raise ValueError if it is none."""
    if not is_digest(text):
        raise ValueError(f"{text!r} is not 64 lowercase hex digits")
    return text


def encode(manifest: Manifest) -> bytes:
    """Return the bytes of a manifest file; a TypeError if it holds a float, or anything that is not plain JSON."""
    body = keys.canonical_json({"format": FORMAT, **asdict(manifest)})
    return _file(body, hashlib.sha256(body).hexdigest())


def encode_entry(manifest: Manifest, blobs: Mapping[str, bytes]) -> bytes:
    """Return the bytes of a manifest that can be read back and has exactly these blobs."""
    data = encode(manifest)
    try:
        decode(data)
    except CorruptEntry as error:
        raise ValueError(f"this manifest could not be read back: {error}") from error
    if {Blob(role, hashlib.sha256(c).hexdigest(), len(c)) for role, c in blobs.items()} != set(manifest.blobs):
        raise ValueError("the blobs are not those that the manifest names")
    return data


def decode(data: bytes) -> Manifest:
    """Read the bytes of a manifest file.

    Raises:
        CorruptEntry: they are not, to the last byte, what `encode` could have written.
        IncompatibleEntry: intact, but written by a newer release.
    """
    short, weights = _without_weights(data)
    document = parse(short, "the manifest", canonical=True)
    body = document.get("body")
    content = keys.plain_json(body)
    digest = hashlib.sha256(content if weights is None else data[len(_START) : -_AFTER_BODY]).hexdigest()
    if not isinstance(body, dict) or document.get("sha256") != digest:
        corrupt("the manifest does not match its own digest")
    require_format(body, FORMAT, _BODY, "the manifest")
    require_format(document | {"format": 1}, 1, {"format", "sha256", "body"}, "the manifest")
    if _file(content, digest) != short:
        corrupt("the manifest is not written as format 1 is")
    _check_body(body, "the manifest")
    _check_names(body)
    fields = body | {"blobs": tuple(Blob(**row) for row in body["blobs"])}
    fields |= {name: _contracts(body[name]) for name in ("inputs", "outputs")}
    fields["weights"] = _contracts(body["weights"]) if weights is None else weights
    del fields["format"]
    manifest = Manifest(**fields)
    _check_parts(manifest)
    vars(manifest)["digest"] = hashlib.sha256(data).hexdigest()  # known, so that nobody need encode it once more
    return manifest


def _file(body: bytes, digest: str) -> bytes:
    """Return the bytes of a manifest file, which are the canonical JSON of body and digest, and a newline."""
    return b'%b%b,"sha256":"%b"}\n' % (_START, body, digest.encode("ascii"))


def _without_weights(data: bytes) -> tuple[bytes, tuple[Contract, ...] | None]:
    """Return a manifest's file without its list of weights, and the list; all of it and None if that cannot be.

    The list is most of a manifest, comes last, and is the same in all that a model's shape has: it is read once.
    """
    before, name, rest = data.rpartition(b',"weights":')
    split = len(rest) - _AFTER_BODY - 1  # body's own bracket
    weights = _weights(rest[:split]) if name and split > 0 and len(data) <= MAX_BYTES else None
    return (data, None) if weights is None else (before + name + b"[]" + rest[split:], weights)


@functools.lru_cache(maxsize=16)
def _weights(text: bytes) -> tuple[Contract, ...] | None:
    """Read a list of contracts that is written as `encode` would; None if it is anything else."""
    named = b'{"weights":%b}' % text
    try:
        document = parse(named, "the list of weights", canonical=True)
        check(document, {"weights": _CONTRACTS}, "the list of weights")
    except CorruptEntry:
        return None
    return _contracts(document["weights"]) if keys.plain_json(document) == named else None


def _contracts(rows: list[dict[str, Any]]) -> tuple[Contract, ...]:
    return tuple(Contract(row["name"], row["dtype"], tuple(row["shape"])) for row in rows)


def encode_mark(manifest: str, why: str) -> bytes:
    """Return the bytes of a mark that the entry with this manifest, the sha256 of its file, was rejected."""
    plain = "".join(letter if letter.isprintable() else " " for letter in why[:500])
    return keys.canonical_json({"format": MARK_FORMAT, "manifest": manifest, "why": plain or "failed"}) + b"\n"


def why_rejected(data: bytes, manifest: str) -> str | None:
    """Read a mark: why it rejects this manifest, or None if it is another one's, replaced since."""
    mark = parse(data, _MARK)
    require_format(mark, MARK_FORMAT, ("format", "manifest", "why"), _MARK)
    check(mark, {str: _is_plain}, _MARK)
    return str(mark["why"]) if mark["manifest"] == manifest else None


def _is_plain(value: Any) -> bool:
    return type(value) not in _NESTED


def _is_flat(value: Any) -> bool:
    return _NESTED.isdisjoint(map(type, value if type(value) is list else (value,)))


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


BLOB = {"role": lambda role: type(role) is str and _ROLE.fullmatch(role), "sha256": is_digest, "size": _is_count}
_CONTRACTS = [{"name": str, "dtype": str, "shape": [_is_count]}]
# What stands where a name is `str` is so whatever its name.
_BODY = {
    "format": int, "family": is_digest, "key": is_digest, "parts": dict,
    "blobs": [BLOB],
    "inputs": _CONTRACTS, "outputs": _CONTRACTS, "weights": _CONTRACTS,
    "requires": {str: _is_flat}, "contains_weights": bool, "stats": {str: _is_count}, "gate": dict,
}  # fmt: skip
_check_body = checker(_BODY)
# What others read of the parts, which may have more.
_TEXT, _FLAT = checker(str), checker({str: _is_flat})
_PARTS = {"target": _TEXT, "compiler": checker({str: str}), "bucket": checker({str: _is_plain})}
_FAMILY = {"backend": _TEXT, "dtype": _TEXT, "source": _TEXT, "runtime": checker({str: str}), "architecture": _FLAT}


def _check_names(body: dict[str, Any]) -> None:
    """Compare the two names with the parts they are digests of, and refuse a role used twice."""
    parts, family = body["parts"], body["parts"].get("family")
    names = [keys.digest_of(keys.plain_json(named)) for named in (family, parts)]
    if not isinstance(family, dict) or names != [body["family"], body["key"]]:
        corrupt("the manifest's family and key are not the digests of its parts")
    if len({row["role"] for row in body["blobs"]}) != len(body["blobs"]):
        corrupt("the manifest names a role twice")


def _check_parts(manifest: Manifest) -> None:
    """Refuse parts that are not of the kind that whoever reads them expects."""
    for name, check_part in _PARTS.items():
        check_part(manifest.parts.get(name), name)
    family = manifest.parts["family"]
    for name, check_part in _FAMILY.items():
        if name in family:
            check_part(family[name], name)
    _TEXT(manifest.gate.get(DEFERRED, ""), DEFERRED)
    try:
        manifest.bucket  # noqa: B018
    except (TypeError, PlanError) as error:
        raise CorruptEntry(f"the manifest's bucket is none: {error}") from error
