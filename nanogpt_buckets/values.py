"""What callers hand in as numbers - Python's, numpy's, a tensor of one - and how any value is shown in a sentence.

Knows nothing of what a number is for. Imports no torch.
"""

from __future__ import annotations

import operator
from typing import SupportsFloat, SupportsIndex, cast

_MOST_CHARACTERS = 80


def whole_number(value: object) -> int | None:
    """Return a whole number as int, or None if it is none; True and False are none."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(cast(SupportsIndex, value))
    except Exception:  # whatever a foreign __index__ raises: it is no number for us
        return None


def real_number(value: object) -> float | None:
    """Return a number as float, or None if it is none or beyond floats; strings and truth values are none."""
    if isinstance(value, bool | str | bytes | bytearray):
        return None
    try:
        return float(cast(SupportsFloat, value))
    except Exception:
        return None


def shown(value: object) -> str:
    """Return a value as it appears in a sentence: its repr, shortened; its type where it has no usable one."""
    try:
        text = repr(value)
    except Exception:  # an int of more digits than Python writes out, a foreign __repr__
        return f"a {type(value).__name__} that cannot be written out"
    text = " ".join(text.split())
    return text if len(text) <= _MOST_CHARACTERS else f"{text[: _MOST_CHARACTERS - 3]}..."
