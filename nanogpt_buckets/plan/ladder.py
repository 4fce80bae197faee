"""Ladders of sequence lengths when the user names none. Always ends at block_size.

Knows nothing of traffic or measured cost.
"""

from __future__ import annotations


def default_ladder(block_size: int, shortest: int = 1) -> list[int]:
    """Return block_size/8, /4, /2 and block_size itself: each further rung costs a compile and saves less."""
    return sorted({max(shortest, block_size // divisor) for divisor in (8, 4, 2, 1)})


def rung_for(length: int, block_size: int) -> int:
    """Return the shortest rung of the default ladder that holds `length` tokens (at most block_size)."""
    return next(rung for rung in default_ladder(block_size) if rung >= min(length, block_size))
