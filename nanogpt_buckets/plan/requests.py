"""Files of requests: JSON lines or CSV, one request a line.

A request has `prompt_tokens`, or a `prompt` whose tokens are counted, and `generated_tokens`. Knows nothing of what
requests cost, nor of any tokenizer: who counts is given.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from nanogpt_buckets.errors import UsageError
from nanogpt_buckets.plan.traffic import Request
from nanogpt_buckets.values import shown

_MOST_CHARACTERS = 10_000_000
_FIELDS = "prompt_tokens (or prompt) and generated_tokens"


def read_requests(path: Path, count: Callable[[str], int]) -> list[Request]:
    """Read a file of requests; CSV if its name ends in .csv, else JSON lines.

    Args:
        path: the file; in UTF-8. Blank lines are skipped, other fields are ignored.
        count: how many tokens a prompt has.

    Raises:
        UsageError: it cannot be read, holds no request, or a line is malformed, which is named by its number.
    """
    rows = _csv if path.suffix.lower() == ".csv" else _json_lines
    found = []
    try:
        with path.open(encoding="utf-8", newline="") as lines:
            for number, row in rows(lines):
                try:
                    found.append(_request(row, count))
                except UsageError as error:
                    raise UsageError(f"line {number} of {path}: {error.message}", hint=error.hint) from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not in UTF-8") from error
    except csv.Error as error:
        raise UsageError(f"{path} is not CSV: {error}") from error
    if not found:
        raise UsageError(f"{path} holds no request", hint=f"a line of it is a JSON object with {_FIELDS}")
    return found


def _json_lines(lines: Iterable[str]) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line) if len(line) <= _MOST_CHARACTERS else None
        except (ValueError, RecursionError):
            yield number, None


def _csv(lines: Iterable[str]) -> Iterator[tuple[int, Any]]:
    reader = csv.DictReader(lines)
    for row in reader:
        yield reader.line_num, {name: _number(value) if name != "prompt" else value for name, value in row.items()}


def _number(text: Any) -> Any:
    """Return the number that a cell of a table holds, or the cell."""
    try:
        return int(text)
    except (TypeError, ValueError):
        return text


def _request(row: Any, count: Callable[[str], int]) -> Request:
    if not isinstance(row, Mapping):
        raise UsageError("it is no JSON object", hint=f"a request is an object with {_FIELDS}")
    prompt = row.get("prompt")
    if "prompt_tokens" in row:
        tokens = row["prompt_tokens"]
    elif isinstance(prompt, str):
        tokens = count(prompt)
    else:
        raise UsageError("it has neither prompt_tokens nor a prompt", hint=f"a request has {_FIELDS}")
    if "generated_tokens" not in row:
        raise UsageError("it does not say generated_tokens", hint="if unknown, give what is asked for at most")
    for value in (tokens, row["generated_tokens"]):
        if isinstance(value, str):
            raise UsageError(f"{shown(value)} is no whole number", hint=f"a request has {_FIELDS}")
    return Request(tokens, row["generated_tokens"])
