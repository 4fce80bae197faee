"""Small JSON objects that anyone may have written, read so that nothing in them can surprise whoever reads on.

Bounded in size and depth, without floats, control characters or a name given twice; of a format that is known, to the
type of each part. Knows nothing of what the objects mean.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

from nanogpt_buckets.errors import CorruptEntry, IncompatibleEntry

MAX_BYTES = 256 * 1024
MAX_DEPTH = 8

# Neither shown on a terminal, nor written by any release.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
# A JSON text without any of these holds no such thing in its strings, where line ends and tabs would be escaped, and
# every quote in it begins or ends a string.
_MAY_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\\]")
_BRACKETS, _NO_BRACKETS = bytes.maketrans(b"{}", b"[]"), bytes(set(range(256)) - set(b"[]{}"))
_TOO_DEEP = f"{{}} is nested deeper than {MAX_DEPTH} levels"


def parse(data: bytes, what: str, limit: int = MAX_BYTES, *, canonical: bool = False) -> dict[str, Any]:
    """Read a small JSON object that anyone may have written, `what` in errors: bounded, no floats, no name twice.

    Who compares the bytes with their `canonical` form has no name twice, and need not ask here.

    Raises:
        CorruptEntry: it is anything else.
    """
    if len(data) > limit:
        corrupt(f"{what} is longer than {limit} bytes")
    try:
        text = data.decode("utf-8")
        value = (_CANONICAL if canonical else _ANY).decode(text)
    except (ValueError, RecursionError) as error:
        raise CorruptEntry(f"{what} is not plain JSON: {error}") from error
    if not isinstance(value, dict):
        corrupt(f"{what} is not a JSON object")
    if _MAY_CONTROL.search(text):
        _examine(value, what, MAX_DEPTH)
    elif _is_deep(data):
        corrupt(_TOO_DEEP.format(what))
    return value


def _examine(value: Any, what: str, depth: int) -> None:
    kind = type(value)  # exactly that: it is what json.loads makes
    if kind is str:
        if _CONTROL.search(value):
            corrupt(f"{what} holds control characters")
    elif kind is dict or kind is list:
        if depth == 0:
            corrupt(_TOO_DEEP.format(what))
        for inner in value if kind is list else (*value, *value.values()):
            _examine(inner, what, depth - 1)


def _is_deep(data: bytes) -> bool:
    """Whether JSON that has no backslash in it is nested deeper than MAX_DEPTH levels."""
    outside = b"".join(data.split(b'"')[::2])
    brackets = outside.translate(_BRACKETS, _NO_BRACKETS)
    for _ in range(MAX_DEPTH):
        brackets = brackets.replace(b"[]", b"")  # the innermost level
    return bool(brackets)


def _no_float(text: str) -> NoReturn:
    raise ValueError(f"{text[:40]} is not a whole number")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a name is given twice")
    return value


_CANONICAL = json.JSONDecoder(parse_float=_no_float, parse_constant=_no_float)
_ANY = json.JSONDecoder(parse_float=_no_float, parse_constant=_no_float, object_pairs_hook=_once)


def require_format(document: Mapping[str, Any], known: int, names: Iterable[str], what: str) -> None:
    """Refuse a document whose "format" is not the one this release knows, or which has not exactly these fields.

    Raises:
        IncompatibleEntry: a newer release wrote it.
        CorruptEntry: nobody did.
    """
    version = document.get("format")
    if type(version) is not int or version < 1:
        corrupt(f"{what} names no format")
    unknown = sorted(set(document) - set(names))
    if version > known or (version == known and unknown):
        why = f"format {str(version)[:20]}" if version > known else f"a field {unknown[0][:80]!r}"
        hint = "pip install --upgrade nanogpt-buckets"
        raise IncompatibleEntry(f"{what} is a newer release's: it has {why}", hint=hint)
    if set(document) != set(names):
        corrupt(f"{what} lacks fields")


def check(value: Any, wanted: Any, what: str) -> None:
    """Refuse a value that is not of this type, or this list or object of them, or that a function does not like.

    Raises:
        CorruptEntry: it is not.
    """
    checker(wanted)(value, what)


def checker(wanted: Any) -> Callable[[Any, str], None]:
    """Return the function that checks as `check` does; it is made once for many values."""
    if isinstance(wanted, list):
        item = checker(wanted[0])

        def check_list(value: Any, what: str) -> None:
            if type(value) is not list:
                _refuse(value, what)
            for each in value:
                item(each, what)

        return check_list
    if isinstance(wanted, dict):
        named = {name: checker(kind) for name, kind in wanted.items()}
        rest = named.pop(str, None)

        def check_object(value: Any, what: str) -> None:
            if type(value) is not dict or not (rest or value.keys() == named.keys()):
                _refuse(value, what)
            for name, each in value.items():
                (named.get(name) or rest)(each, name)  # type: ignore[misc]

        return check_object
    is_type = isinstance(wanted, type)

    def check_leaf(value: Any, what: str) -> None:
        if not (type(value) is wanted if is_type else wanted(value)):
            _refuse(value, what)

    return check_leaf


def _refuse(value: Any, what: str) -> NoReturn:
    corrupt(f"{what[:40]} is not what it should be, but {value!r:.80}")


def corrupt(message: str) -> NoReturn:
    """Raise a CorruptEntry."""
    raise CorruptEntry(message)
