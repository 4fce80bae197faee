"""Names of compiled things: named parts -> canonical JSON -> sha256, and the difference of two keys in words.

Knows nothing of which parts there are (`Choice` does), how one is found out (backends do) or where entries are stored.

Source: named key parts after jax's cache_key.py (Apache-2.0); canonical JSON instead of its running hash.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Parts = Mapping[str, Any]

_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
_PREFIX = b"nanogpt-buckets v1\n"
_PACKAGE = Path(__file__).parent

# What defines every graph, whatever the backend and step; each of these adds its own file.
GRAPH_SOURCES = ("model/gpt.py", "steps/graph.py")


def canonical_json(value: Any) -> bytes:
    """Encode plain JSON in the one way that is hashed: sorted keys, no spaces, UTF-8.

    Raises:
        TypeError: a float, or anything else whose text could differ between machines, is inside.
    """
    _refuse_ambiguous(value)
    return plain_json(value)


def plain_json(value: Any) -> bytes:
    """Return what `canonical_json` does, for what `json.loads` made of a text without floats: nothing else is in it."""
    return _ENCODER.encode(value).encode("utf-8")


def _refuse_ambiguous(value: Any) -> None:
    if value is None or isinstance(value, str | int):
        return
    if isinstance(value, list | tuple):
        for item in value:
            _refuse_ambiguous(item)
    elif isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
        for item in value.values():
            _refuse_ambiguous(item)
    else:
        raise TypeError(f"{type(value).__name__} has no canonical form: {value!r}")


def digest(parts: Parts) -> str:
    """Return the 64 hex digits that name these parts."""
    return digest_of(canonical_json(parts))


def digest_of(canonical: bytes) -> str:
    """Return the 64 hex digits that name the parts whose canonical JSON this is."""
    return hashlib.sha256(_PREFIX + canonical).hexdigest()


def source_digest(*names: str) -> str:
    """Digest the raw bytes of files of this package, such as "model/gpt.py": those that shape generated code alone."""
    hasher = hashlib.sha256()
    for name in names:
        content = (_PACKAGE / name).read_bytes()
        hasher.update(f"{name} {len(content)}\n".encode() + content)
    return hasher.hexdigest()


def difference(wanted: Parts, found: Parts) -> list[str]:
    """Say in words how two sets of parts differ, one line per leaf: `family.dtype: bfloat16, not float32`."""
    lines = []
    ours, theirs = leaves(wanted), leaves(found)
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            lines.append(f"{name}: {theirs.get(name, 'nothing')}, not {ours.get(name, 'nothing')}")
    return lines


def leaves(value: Any, name: str = "") -> dict[str, Any]:
    """Return what is in nested mappings and lists of them, each named by its path: `blobs.0.role`."""
    if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        value = {str(index): item for index, item in enumerate(value)}
    if not isinstance(value, Mapping):
        return {name: value}
    found: dict[str, Any] = {}
    for key, item in value.items():
        found |= leaves(item, f"{name}.{key}" if name else key)
    return found
