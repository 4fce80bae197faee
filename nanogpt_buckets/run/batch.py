"""The rows that run at a time, each from when it joins to when it leaves: recomputed at each step, or remembered.

What runs is settled anew only when somebody joins, leaves or outgrows a bucket. Knows nothing of sampling or text, nor
of which buckets were chosen for the call.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from typing import Generic

from torch import Tensor

from nanogpt_buckets.plan.bucket import Bucket
from nanogpt_buckets.run.dispatch import KV, RECOMPUTE, C, Call, Dispatcher, group, of_step

_FOREVER = 2**62


class Batch(Generic[C]):
    """A number of places for rows. Those that are remembered have a slot of a `KVCache`, until they outgrow it."""

    def __init__(self, dispatcher: Dispatcher, way: str, buckets: Sequence[Bucket], places: int) -> None:
        self._dispatcher = dispatcher
        self._buckets = buckets
        self._places = places
        self._cache = dispatcher.remember(places, buckets) if way == KV else None
        self._rows: dict[C, None] = {}  # in the order they came
        self._slots: dict[C, int] = {}
        # by slot: the last prompt that was run in it and the logits (V) that follow; both outlast the row
        self._prompts: dict[int, tuple[Sequence[int], Tensor]] = {}
        self._first: dict[C, Tensor] = {}  # logits (V) of those that have just joined
        self._calls: list[Call[C]] = []
        self._steps_left = 0  # for how many the calls are good

    @property
    def room(self) -> int:
        """How many rows may join."""
        return self._places - len(self._rows)

    def join(self, rows: Iterable[C]) -> None:
        """Let rows join, as many as there is room for; what can be remembered of them is."""
        new = list(rows)
        if not new:
            return
        self._rows.update(dict.fromkeys(new))
        self._steps_left = 0
        if self._cache is not None:
            self._open([row for row in new if len(row.ids) <= self._dispatcher.block_size])

    def leave(self, row: C) -> None:
        """Let a row go and its place be another's."""
        del self._rows[row]
        self._slots.pop(row, None)
        self._steps_left = 0

    def end(self) -> None:
        """Give back what is remembered; nobody may join any more. Not after an error: what is there may be NaN."""
        cache, self._cache = self._cache, None
        self._calls, self._places = [], 0
        if cache is not None:
            self._dispatcher.forget(cache)

    def logits(self) -> dict[C, Tensor]:
        """Return the logits float32 (V) that follow each row; before it is called again each has one more token."""
        first, self._first = self._first, {}
        if not self._steps_left:
            self._settle([row for row in self._rows if row not in first], alone=not first)
        self._steps_left = 0 if first else self._steps_left - 1
        return first | self._dispatcher.run(self._calls)

    def _open(self, rows: list[C]) -> None:
        """Give rows their slots and run their prompts: each once, and then it is copied."""
        assert self._cache is not None
        free = sorted(set(range(self._places)) - set(self._slots.values()))
        others = []
        for row in rows:
            if (slot := self._slot_of(row.ids, free)) is None:
                others.append(row)
            else:  # nobody has been there since
                free.remove(slot)
                self._slots[row] = slot
        taken = [*self._slots.values()]
        heads: dict[tuple[int, ...], C] = {}
        for row, slot in zip(others, free, strict=False):
            self._slots[row] = slot
            if self._slot_of(row.ids, taken) is None:
                heads.setdefault(tuple(row.ids), row)
                self._prompts.pop(slot, None)
        run = list(heads.values())
        slots = [self._slots[row] for row in run]
        found = self._dispatcher.run(self._dispatcher.remembered("prefill", run, slots, self._buckets, self._cache))
        for row, slot in zip(run, slots, strict=True):
            self._prompts[slot] = ([*row.ids], found[row])
        for row in others:
            slot = self._slots[row]
            if row not in found:
                source = self._slot_of(row.ids, [*taken, *slots])
                assert source is not None
                self._cache.copy(source, slot, len(row.ids))
                self._prompts[slot] = self._prompts[source]
        self._first = {row: self._prompts[self._slots[row]][1] for row in rows}

    def _slot_of(self, prompt: Sequence[int], slots: Iterable[int]) -> int | None:
        """Return the first of some slots that begins with a prompt."""
        return next((slot for slot in slots if slot in self._prompts and self._prompts[slot][0] == prompt), None)

    def _settle(self, rows: list[C], alone: bool) -> None:
        """Settle which calls run rows, and for how many steps; `alone`: there are no others."""
        block_size = self._dispatcher.block_size
        for row in rows:
            if len(row.ids) > block_size:
                self._slots.pop(row, None)
        kept = sorted((row for row in rows if row in self._slots), key=self._slots.__getitem__)
        if alone and kept:
            self._close_gaps(kept)
        self._calls = self._dispatcher.stateless(
            RECOMPUTE, [row for row in rows if row not in self._slots], self._buckets
        )
        if kept:
            assert self._cache is not None
            kept.sort(key=self._slots.__getitem__)
            slots = [self._slots[row] for row in kept]
            self._calls += self._dispatcher.remembered("decode", kept, slots, self._buckets, self._cache)
        left = [self._until_outgrown(row, "decode" if row in self._slots else RECOMPUTE) for row in rows]
        self._steps_left = min(left, default=1)

    def _until_outgrown(self, row: C, step: str) -> int:
        """Return for how many steps the shortest bucket that holds a row does."""
        rungs = sorted({bucket.seq_len for bucket in of_step(self._buckets, step)})
        length = min(len(row.ids), self._dispatcher.block_size)
        rung = rungs[bisect.bisect_left(rungs, length)]
        ends = step == "decode" or rung < self._dispatcher.block_size  # what is cropped grows no more
        return rung - length + 1 if ends else _FOREVER

    def _close_gaps(self, rows: list[C]) -> None:
        """Move the last rows, in the order of their slots, into the gaps before them, if steps then cost less."""
        assert self._cache is not None
        before = [self._slots[row] for row in rows]
        gaps = sorted(set(range(len(rows))) - set(before))
        stay = len(rows) - len(gaps)
        after = before[:stay] + gaps
        if gaps and self._cost(rows, after) < self._cost(rows, before):
            for row, slot in zip(rows[stay:], gaps, strict=True):
                self._cache.copy(self._slots[row], slot, len(row.ids) - 1)
                self._prompts[slot] = self._prompts[self._slots[row]]
                self._slots[row] = slot

    def _cost(self, rows: Sequence[C], slots: Sequence[int]) -> float:
        """Return what a step of rows costs in these slots."""
        decode, cost = of_step(self._buckets, "decode"), self._dispatcher.cost
        return sum(cost(bucket) for bucket, _ in group([len(row.ids) for row in rows], decode, cost, slots))
