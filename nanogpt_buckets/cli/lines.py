"""Files of one text a line: plain text, or JSON objects (JSONL) whose fields may say more. Imports no torch.

Knows nothing of what becomes of the texts, nor of what a setting may be.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from nanogpt_buckets.errors import UsageError
from nanogpt_buckets.model.tokenization.base import well_formed
from nanogpt_buckets.values import shown

_JSONL = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class Record:
    """One text, the line it stands in, counted from 1, and what that line says besides."""

    line: int
    text: str
    settings: Mapping[str, Any] = field(default_factory=dict)


def read_text(source: str, name: str) -> str:
    """Return the text of a file, or of standard input for "-"; `name` is what errors call it.

    Raises:
        UsageError: it cannot be read, or is not UTF-8 text.
    """
    try:
        # text mode as nanoGPT has it: every end of a line is one character; -sig leaves a byte order mark out
        return io.TextIOWrapper(io.BytesIO(_read(source)), encoding="utf-8-sig").read()
    except UnicodeDecodeError:
        raise UsageError(f"{name} is not UTF-8 text") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{name} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _read(source: str) -> bytes:
    if source == "-":
        if sys.stdin is None:
            raise ValueError("it is closed")
        return sys.stdin.buffer.read()
    with open(os.path.expanduser(source), "rb") as file:
        return file.read()


def read_records(source: str, keys: Sequence[str], settings: Collection[str] | None = None) -> list[Record]:
    """Return the texts of a file, or of standard input for "-", in order; blank lines are none.

    It is JSONL if its name ends in .jsonl or .ndjson, or its first line that is not blank begins with "{".

    Args:
        source: the file's name, or "-".
        keys: names under which an object may have its text.
        settings: names of what it may say besides; None to let anything else be.

    Raises:
        UsageError: it cannot be read, has no text at all, or a line of JSONL is not such an object; named by number.
    """
    name = "standard input" if source == "-" else f"the file {source!r}"
    text = read_text(source, name)
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise UsageError(f"{name} is empty", hint="give one text a line, or JSONL")
    if not (Path(source).suffix.lower() in _JSONL or lines[0][1].lstrip().startswith("{")):
        return [Record(number, well_formed(line)) for number, line in lines]
    return [_record(f"{name}, line {number}", number, line, keys, settings) for number, line in lines]


def _record(where: str, number: int, line: str, keys: Sequence[str], settings: Collection[str] | None) -> Record:
    found = _json_object(where, line)
    present = [key for key in keys if key in found]
    if not present:
        raise UsageError(f"{where}: it has no {' or '.join(map(repr, keys))}")
    if len(present) > 1:
        raise UsageError(f"{where}: it has both {' and '.join(map(repr, present))}", hint="give one of them")
    text = found.pop(present[0])
    if not isinstance(text, str):
        raise UsageError(f"{where}: {present[0]!r} is {shown(text)}, not a string")
    if settings is None:
        return Record(number, well_formed(text))
    if unknown := sorted(found.keys() - settings):
        hint = f"settings: {', '.join(settings)}" if settings else f"a line is {{{json.dumps(keys[0])}: ...}}"
        raise UsageError(f"{where}: it has {shown(unknown[0])}, which is no setting", hint=hint)
    return Record(number, well_formed(text), found)


def _json_object(where: str, line: str) -> dict[str, Any]:
    try:
        value = json.loads(line, object_pairs_hook=_once, parse_constant=_no_number)
    except json.JSONDecodeError as error:
        raise UsageError(f"{where}: it is not JSON: {error.msg}, column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # a number of too many digits, a name given twice
        raise UsageError(f"{where}: it cannot be used: {error}") from None
    if not isinstance(value, dict):
        raise UsageError(f"{where}: {shown(value)} is not a JSON object")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a name is given twice")
    return value


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number")
