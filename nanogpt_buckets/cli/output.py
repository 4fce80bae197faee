"""The one place that prints. Data goes to stdout, everything else to stderr; --json makes the data one document.

rich is imported only where a person watches a terminal.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from nanogpt_buckets.errors import BucketsError
from nanogpt_buckets.plan.bucket import Bucket


def data(text: str) -> None:
    """Print data for people."""
    print(text, flush=True)


def document(value: Any) -> None:
    """Print data for programs: one JSON document on one line."""
    print(json.dumps(value, ensure_ascii=True, default=str), flush=True)


def say(text: str) -> None:
    """Tell something that is not data."""
    print(text, file=sys.stderr, flush=True)


def error(problem: BucketsError) -> None:
    """Show an error in one sentence, with its hint."""
    say(f"error: {problem.message}")
    if problem.hint:
        say(f"hint: {problem.hint}")


def table(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print an aligned table for people; numbers to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(text) for text in column) for column in zip(headers, *cells, strict=True)]
    right = [all(isinstance(row[i], int | float) for row in rows) and bool(rows) for i in range(len(headers))]
    for line in [list(headers), *cells]:
        parts = [text.rjust(w) if r else text.ljust(w) for text, w, r in zip(line, widths, right, strict=True)]
        data("  ".join(parts).rstrip())


def size(n_bytes: int) -> str:
    """Return a size for people: 2.2 MB."""
    amount = float(n_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} TB"


class BuildProgress:
    """Shows what becomes of each bucket: a live line each on a terminal, one line when it is done elsewhere.

    Use it in a `with` statement and pass `update` to `build`.
    """

    def __init__(self) -> None:
        self._live = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._started: dict[Bucket, float] = {}
        self._tasks: dict[Bucket, Any] = {}
        self._bars: Any = None

    def __enter__(self) -> Callable[[Bucket, str], None]:
        if self._live:
            from rich.console import Console
            from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

            columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
            self._bars = Progress(*columns, console=Console(stderr=True))
            self._bars.start()
        return self.update

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def update(self, bucket: Bucket, phase: str) -> None:
        """Show a bucket's new phase; called from several threads."""
        ended = phase in ("hit", "compiled", "failed")
        if phase == "compiling":
            self._started[bucket] = time.monotonic()
        start = self._started.get(bucket, time.monotonic())
        if self._bars is None:
            if phase != "waiting":
                elapsed = f" after {time.monotonic() - start:.0f} s" if phase in ("compiled", "failed") else ""
                say(f"bucket {bucket}: {phase}{elapsed}")
            return
        description = f"bucket {bucket!s:>8}  {phase}"
        if bucket not in self._tasks:
            self._tasks[bucket] = self._bars.add_task(description, total=1)
        self._bars.update(self._tasks[bucket], description=description, completed=1 if ended else 0)
