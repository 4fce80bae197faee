"""The one place that prints. Data goes to stdout, everything else to stderr; --json makes the data one document.

rich is imported only where a person watches a terminal.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from nanogpt_buckets.errors import BucketsError, printable
from nanogpt_buckets.plan.bucket import Bucket

QUIET, NORMAL, VERBOSE = -1, 0, 1
_LAYOUT = "\n\t"

_verbosity = NORMAL


def set_verbosity(verbosity: int) -> None:
    """Say everything that is worth it (VERBOSE), the usual (NORMAL), or only errors (QUIET)."""
    global _verbosity
    _verbosity = verbosity
    library = logging.getLogger("nanogpt_buckets")
    library.setLevel(logging.INFO if verbosity == VERBOSE else logging.NOTSET)
    library.addHandler(_LOG_LINES)  # adding it again changes nothing
    _LOG_LINES.setLevel(logging.ERROR if verbosity == QUIET else logging.NOTSET)


class _LogLines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        complain(record.getMessage())


_LOG_LINES = _LogLines()


def data(text: str) -> None:
    """Print data for people; whatever names and texts of files are in it, a terminal only shows it."""
    put(f"{printable(text, _LAYOUT)}\n")


def document(value: Any) -> None:
    """Print data for programs: one JSON document on one line."""
    put(f"{json.dumps(value, ensure_ascii=True, default=str)}\n")


def put(text: str) -> None:
    """Write text on stdout, at once: as it is, but for a terminal's eyes without what would command it.

    Raises:
        BrokenPipeError: the reader has gone.
        BucketsError: it cannot be written for another reason.
    """
    try:
        sys.stdout.write(printable(text, _LAYOUT) if sys.stdout.isatty() else text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as problem:
        forget_stdout()
        why = f"standard output cannot be written: {problem.strerror}"
        raise BucketsError(why, hint="see whether its disk is full") from None


def open_closed_streams() -> None:
    """Give a standard stream that was closed its number back, before a file of the cache gets it.

    Then nothing can be read or written there, except that what goes to stderr vanishes, as asked.
    """
    kinds = (("stdin", os.O_WRONLY, "r"), ("stdout", os.O_RDONLY, "w"), ("stderr", os.O_WRONLY, "w"))
    for number, (name, flags, mode) in enumerate(kinds):
        if getattr(sys, name) is None:
            opened = os.open(os.devnull, flags)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            setattr(sys, name, os.fdopen(number, mode, errors="replace", closefd=False))


def flush_or_forget() -> None:
    """Write what stdout still holds, if it can be."""
    try:
        sys.stdout.flush()
    except OSError:
        forget_stdout()


def forget_stdout() -> None:
    """Keep the interpreter from trying at exit to write what could not be written."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say(text: str, least: int = NORMAL) -> None:
    """Tell something that is not data, unless told to say less than this."""
    if _verbosity >= least:
        complain(text)


def complain(text: str) -> None:
    """Tell something that even those who want quiet must know; where stderr is full or gone nobody can be told."""
    with contextlib.suppress(OSError):
        print(printable(text, _LAYOUT), file=sys.stderr, flush=True)


def error(problem: BucketsError) -> None:
    """Show an error in one sentence, with its hint."""
    complain(f"error: {problem.message}")
    if problem.hint:
        complain(f"hint: {problem.hint}")


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


def count(number: int, one: str, many: str) -> str:
    """Return a number with its noun."""
    return f"{number} {one if number == 1 else many}"


def age(seconds: float) -> str:
    """Return a time span for people: 3 h."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


@contextlib.contextmanager
def ending_at_once() -> Iterator[None]:
    """Let Ctrl-C end the process here and now, for the time of an import that has nothing open.

    Importing torch swallows a KeyboardInterrupt at some moments (seen with torch 2.9), and the command would go on.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: Any) -> None:
        complain("interrupted")
        os._exit(130)

    before = signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _watched() -> bool:
    """Whether a person watches stderr and wants to see things move."""
    return _verbosity > QUIET and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


@contextlib.contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[float], None]]:
    """Show on a terminal how much of something is done; yields a function to call with each amount.

    Nothing is live before its first call, so that whatever comes before may show its own progress.
    """
    if not _watched():
        yield lambda amount: None
        return
    from rich.console import Console
    from rich.progress import Progress

    # data that goes elsewhere goes there
    bars = Progress(console=Console(stderr=True), transient=True, redirect_stdout=sys.stdout.isatty())
    task = bars.add_task(what, total=total)

    def advance(amount: float) -> None:
        bars.start()  # once more changes nothing
        bars.advance(task, amount)

    try:
        yield advance
    finally:
        bars.stop()


class BuildProgress:
    """Shows what becomes of each bucket: a live line each on a terminal, one line when it is done elsewhere.

    `with BuildProgress() as update` gives the function to pass to `build`. Nothing is live before its first call, nor
    after all buckets are done, so that other output is not disturbed.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._started: dict[Bucket, float] = {}
        self._tasks: dict[Bucket, Any] = {}
        self._bars: Any = None

    def __enter__(self) -> Callable[[Bucket, str], None]:
        return self._update

    def __exit__(self, *failure: object) -> None:
        with self._lock:
            self._stop()

    def _update(self, bucket: Bucket, phase: str) -> None:
        """Show a bucket's new phase; called from several threads."""
        with self._lock:
            if phase == "compiling":
                self._started[bucket] = time.monotonic()
            if _watched():
                self._show(bucket, phase)
            elif phase != "waiting":
                start = self._started.get(bucket, time.monotonic())
                elapsed = f" after {time.monotonic() - start:.0f} s" if phase in ("compiled", "failed") else ""
                say(f"bucket {bucket}: {phase}{elapsed}")

    def _show(self, bucket: Bucket, phase: str) -> None:
        from rich.console import Console
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        if self._bars is None:
            columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
            self._bars = Progress(*columns, console=Console(stderr=True))
            self._bars.start()
        description = f"bucket {bucket!s:>8}  {phase}"
        if bucket not in self._tasks:
            self._tasks[bucket] = self._bars.add_task(description, total=1)
        ended = phase in ("hit", "compiled", "failed")
        self._bars.update(self._tasks[bucket], description=description, completed=int(ended))
        if self._bars.finished:
            self._stop()

    def _stop(self) -> None:
        if self._bars is not None:
            self._bars.stop()
        self._bars, self._tasks = None, {}
