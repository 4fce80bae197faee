"""Rows -> logits -> next tokens, for one engine: settle what may run, then step and sample, a call at a time.

As many rows run at a time as pay, and who is done leaves its place to the next (`run/batch.py`). Knows nothing of text,
nor of how buckets are found and loaded.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from nanogpt_buckets.choice import Choice
from nanogpt_buckets.contract import refuse_forked
from nanogpt_buckets.errors import UsageError
from nanogpt_buckets.plan.bucket import Bucket
from nanogpt_buckets.run.batch import Batch
from nanogpt_buckets.run.chunks import Chunks
from nanogpt_buckets.run.dispatch import CHUNK, RECOMPUTE, SCORE, Call, Dispatcher, Span, needed, of_step, racked
from nanogpt_buckets.run.generation import Request, Row
from nanogpt_buckets.run.misses import Buckets
from nanogpt_buckets.run.report import Report
from nanogpt_buckets.run.sampling import draw_nanogpt, draw_per_row, mask_undecodable
from nanogpt_buckets.run.score import Window


class Loop:
    """What runs rows in an engine's buckets; threads take turns, step by step.

    Args:
        choice: the model, its backend and dtype.
        buckets: what may run.
        report: counts what is done.
        n_vocab: ids from here on have no text and are never chosen; None if all may be.
    """

    def __init__(self, choice: Choice, buckets: Buckets, report: Report, n_vocab: int | None) -> None:
        self._buckets = buckets
        self._report = report
        self._n_vocab = n_vocab
        cores = 1 if choice.backend is None else choice.backend.cores
        arch = choice.model.architecture
        self._dispatcher = Dispatcher(buckets.executable, buckets.cost, arch, choice.dtype, report, cores)
        self.lock = threading.RLock()
        self.closed = False

    def close(self) -> None:
        """Refuse to run anything more, and let go of memory that was kept for it."""
        self.closed = True
        self._dispatcher.close()

    def steps(self, rows: list[Row]) -> Iterator[tuple[Row, str | None]]:
        """Settle what will run, then return each row as it gains a token, with the text that this makes certain."""
        rows = [row for row in rows if not row.done]
        together = not any(row.generator for row in rows)  # what draws from one generator goes one after another
        batch = self.batch(spans_of(rows), together)
        return self.run(batch, _by_length(rows) if together else rows)

    def batch(self, spans: Sequence[Span], together: bool = True) -> Batch[Row] | Chunks[Row]:
        """Settle, before the first step, which buckets may run; the last step sees one token less than the result."""
        way, buckets = RECOMPUTE, list[Bucket]()
        if spans:
            with self.alone():
                way, buckets = self._buckets.cover(spans, together)
        most = len(spans) if together else 1
        places = max(1, min(most, self._dispatcher.places(way, buckets)))
        longest = needed(spans, self._dispatcher.block_size, way).get(CHUNK) if way == CHUNK else None
        if longest is None:  # nor is there anything to remember where every prompt is cropped
            return Batch(self._dispatcher, way, buckets, places)
        racks = racked(buckets, most, longest)
        return Chunks(self._dispatcher, [*racks, *of_step(buckets, RECOMPUTE)], places)

    def run(self, batch: Batch[Row] | Chunks[Row], rows: Iterable[Row]) -> Iterator[tuple[Row, str | None]]:
        """Run rows, as many at a time as there are places; who is done leaves its own to the next."""
        waiting = iter(rows)
        try:
            while gained := self._step(batch, waiting):
                yield from gained
        except GeneratorExit:  # nobody wants the rest
            batch.end()
            raise
        batch.end()

    def _step(self, batch: Batch[Row] | Chunks[Row], waiting: Iterator[Row]) -> list[tuple[Row, str | None]]:
        """Let rows join, and return each that gains a token; nothing if none is left."""
        with self.timed():
            batch.join(itertools.islice(waiting, batch.room))
            gained = []
            for row, logits in batch.logits().items():
                gained.append((row, row.accept(self._draw(logits, row))))
                if row.done:
                    batch.leave(row)
            self._report.new_tokens += len(gained)
            return gained

    def logits(self, rows: list[Row]) -> dict[Row, Tensor]:
        """Return the logits float32 (V) that follow each row."""
        batch = self.batch(spans_of(rows))
        waiting = iter(_by_length(rows))
        found: dict[Row, Tensor] = {}
        with self.timed():
            while part := list(itertools.islice(waiting, batch.room)):
                batch.join(part)
                while lacking := [row for row in part if row not in found]:
                    found |= batch.logits()
                    for row in lacking:
                        if row in found:
                            batch.leave(row)
        batch.end()
        return found

    def scores(self, windows: Sequence[Window]) -> Iterator[dict[Window, Tensor]]:
        """Settle what will run, then return the log-probabilities float32 (S - 1) of some windows after others."""
        with self.alone():
            spans = [(len(window.ids), len(window.ids)) for window in windows]
            buckets = self._buckets.cover(spans, ways=(SCORE,))[1] if windows else []
            calls = self._dispatcher.stateless(SCORE, windows, buckets)
        return map(self._score, calls)

    def _score(self, call: Call[Window]) -> dict[Window, Tensor]:
        with self.timed():
            self._report.scored_tokens += sum(window.new for window in call.members)
            return self._dispatcher.run([call])

    def _draw(self, logits: Tensor, row: Row) -> int:
        """Choose a row's next token from the logits (V)."""
        sampling = row.request.sampling
        if self._n_vocab is not None:
            logits = mask_undecodable(logits, self._n_vocab)
        if row.generator is not None:
            return draw_nanogpt(logits, sampling, row.generator)
        return draw_per_row(logits, sampling, row.prompt, row.sample, row.new_tokens)

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Be `alone` and count the time, the wait excluded."""
        with self.alone():
            start = time.perf_counter()
            try:
                yield
            finally:
                self._report.seconds += time.perf_counter() - start

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the lock, on the CPU whatever default device the host program has set.

        Raises:
            UsageError: the engine is closed, or the process a fork of one that ran buckets, not even let near the lock.
        """
        refuse_forked()
        elsewhere = torch.get_default_device().type != "cpu"
        with self.lock, torch.device("cpu") if elsewhere else nullcontext():
            if self.closed:
                raise UsageError("this engine is closed", hint="load another with Engine.load")
            yield


def generator_of(how: Request) -> torch.Generator | None:
    """Return what nanoGPT draws from."""
    sampling = how.sampling
    return torch.Generator().manual_seed(sampling.seed % 2**64) if sampling.rng == "nanogpt" else None


def spans_of(rows: Iterable[Row]) -> list[Span]:
    """Return how long each row is at its first step and, at most, at its last."""
    return [(row.n_prompt, row.n_prompt + row.request.max_new_tokens - 1) for row in rows]


def _by_length(rows: Iterable[Row]) -> list[Row]:
    """Return rows so that those whose steps cost alike go together, and those of one prompt."""
    return sorted(rows, key=lambda row: (len(row.ids), row.ids))
