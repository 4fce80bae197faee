"""Many requests -> their generations in the order they were asked, while rows run in an order that pays.

Holds a few windows of rows and results at a time, whatever the number of requests. Knows nothing of buckets or logits.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence

from nanogpt_buckets.run.generation import Generation, Request, Row

Asked = tuple[Request, "array[int]"]
Run = Callable[[Iterable[Row]], Iterator[tuple[Row, str | None]]]
# How many rows for each place are taken together by their lengths, so that an early one waits for few others.
_WINDOW = 16


def in_order(
    asked: Sequence[Asked], row_of: Callable[[Request, Iterable[int]], Row], run: Run, places: int
) -> Iterator[Generation]:
    """Run requests, similar lengths together, and yield each as soon as it and all before it are done.

    Args:
        asked: requests and the ids of their prompts.
        row_of: makes a row of one.
        run: runs rows, which it takes when there is a place, and returns each that gained a token.
        places: how many rows run at a time.
    """
    window = _WINDOW * places if places > 1 else 1
    done: dict[int, Generation] = {}
    numbers: dict[Row, int] = {}

    def rows() -> Iterator[Row]:
        for start in range(0, len(asked), window):
            part = range(start, min(start + window, len(asked)))
            for number in sorted(part, key=lambda number: len(asked[number][1])):
                row = row_of(*asked[number])
                if row.done:
                    done[number] = row.generation()
                else:
                    numbers[row] = number
                    yield row

    told = 0
    for row in itertools.chain((row for row, _ in run(rows())), [None]):
        if row is not None and row.done:
            done[numbers.pop(row)] = row.generation()
        while told in done:
            yield done.pop(told)
            told += 1
