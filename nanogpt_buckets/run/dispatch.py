"""Contexts -> the cheapest buckets that hold them -> logits: group, pack, call, drop the padding.

The cheapest bucket that fits is chosen by cost, never by sorting sizes. Knows nothing of sampling, of text, of what is
built, or of how an executable came to be.
"""

from __future__ import annotations

import bisect
import functools
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from nanogpt_buckets.contract import Executable
from nanogpt_buckets.errors import NonFiniteLogits
from nanogpt_buckets.model.architecture import Architecture
from nanogpt_buckets.plan.bucket import Bucket
from nanogpt_buckets.run.kvcache import KVCache, most_rows
from nanogpt_buckets.run.report import Report
from nanogpt_buckets.steps import step_named

Cost = Callable[[Bucket], int]
RECOMPUTE, KV, SCORE = "recompute", "kv", "score"
R = TypeVar("R")


def cheapest(buckets: Iterable[Bucket], batch_size: int, length: int, cost: Cost) -> Bucket | None:
    """Return the cheapest bucket that holds `batch_size` rows of `length` tokens, or None.

    Equal costs go to the shorter bucket, then to the smaller batch.
    """
    fitting = [bucket for bucket in buckets if bucket.holds(batch_size, length)]
    return min(fitting, key=lambda b: (cost(b), b.seq_len, b.batch_size), default=None)


def group(
    lengths: Sequence[int], buckets: Sequence[Bucket], cost: Cost, slots: Sequence[int] | None = None
) -> list[tuple[Bucket, list[int]]]:
    """Cut rows of these lengths into groups that each fill one bucket, (bucket, rows), at the least total cost.

    Where rows are bound to `slots`, which rise with lengths, a group takes all from its first row's to its last's.

    For costs that never fall with length, contiguous groups of the sorted lengths are optimal; a dynamic programme
    over where they end finds the best: F[j] = min over i < j of F[i] + c(bucket for rows i..j-1).

    Raises:
        ValueError: some row fits no bucket; callers settle coverage first.
    """
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    places = range(len(order)) if slots is None else [slots[row] for row in order]
    widest = max((bucket.batch_size for bucket in buckets), default=0)
    best: list[tuple[float, int, Bucket | None]] = [(0, 0, None)]  # cost so far, start of last group, its bucket
    for end in range(1, len(order) + 1):
        longest = lengths[order[end - 1]]
        options = [
            (best[start][0] + cost(bucket), start, bucket)
            for start in range(max(0, end - widest), end)
            if (bucket := cheapest(buckets, places[end - 1] - places[start] + 1, longest, cost))
        ]
        if not options:
            raise ValueError(f"no bucket holds {longest} tokens")
        best.append(min(options, key=lambda option: option[:2]))
    groups, end = [], len(order)
    while end:
        _, start, bucket = best[end]
        assert bucket is not None
        groups.append((bucket, order[start:end]))
        end = start
    return groups[::-1]


def needed(batches: Iterable[Sequence[int]], more_tokens: int, block_size: int, strategy: str) -> dict[str, int]:
    """Return the longest row each step of a strategy has to hold in batches as `buckets_used` takes them."""
    lengths = [length for batch in batches for length in batch]
    last = max(lengths) + more_tokens
    if strategy != KV:
        return {strategy: min(last, block_size)}
    remembered = [length for length in lengths if length <= block_size]
    need = {"prefill": max(remembered)} if remembered else {}
    if more_tokens and remembered and min(remembered) < block_size:
        need["decode"] = min(last, block_size)
    return need | ({RECOMPUTE: block_size} if last > block_size else {})


def reach(buckets: Iterable[Bucket], need: Mapping[str, int]) -> bool:
    """Whether for every step some bucket holds a row of that length."""
    held = list(buckets)
    return all(any(b.step == step and b.holds(1, length) for b in held) for step, length in need.items())


def buckets_used(
    batches: Iterable[Sequence[int]],
    more_tokens: int,
    buckets: Sequence[Bucket],
    cost: Cost,
    block_size: int,
    strategy: str,
) -> set[Bucket]:
    """Return the buckets used by batches of rows that have these lengths at their first step and go together.

    Each row gains `more_tokens` before its last step, one a step. Recomputed contexts do not grow beyond `block_size`.
    A ValueError if some row outgrows every bucket.
    """
    rungs = sorted({bucket.seq_len for bucket in buckets})
    used: set[Bucket] = set()
    for lengths in batches:
        before: list[tuple[str, int]] = []
        for grown in range(more_tokens + 1):
            now = [(step_for(strategy, length + grown, grown == 0, block_size), length + grown) for length in lengths]
            now = [(step, min(length, block_size)) for step, length in now]
            places = [(step, bisect.bisect_left(rungs, length)) for step, length in now]
            if places != before:  # grouped anew whenever one of them outgrows a rung
                for step in {step for step, _ in now}:
                    mine = [length for other, length in now if other == step]
                    used |= {bucket for bucket, _ in group(mine, of_step(buckets, step), cost)}
            before = places
            if min(lengths) + grown > block_size:
                break
    return used


def step_for(strategy: str, length: int, first: bool, block_size: int) -> str:
    """Return the step that runs a row of this length: past block_size the crop moves every position, so it is anew."""
    if strategy != KV:
        return strategy
    if length > block_size:
        return RECOMPUTE
    return "prefill" if first else "decode"


def of_step(buckets: Iterable[Bucket], step: str) -> list[Bucket]:
    """Return the buckets of one step."""
    return [bucket for bucket in buckets if bucket.step == step]


@dataclass(frozen=True)
class Call:
    """One execution of a bucket: which contexts, by index, are in which of its rows, and the state it finds."""

    bucket: Bucket
    members: Sequence[int]
    rows: Sequence[int]
    state: Sequence[Tensor] = ()


class Dispatcher:
    """Runs any number of contexts through the buckets at hand, `at_once` groups at the same time on as many cores.

    Contexts longer than block_size are cropped to their last block_size tokens, as nanoGPT does.
    """

    def __init__(
        self,
        executables: Callable[[Bucket], Executable],
        cost: Cost,
        arch: Architecture,
        dtype: str,
        report: Report,
        at_once: int = 1,
    ) -> None:
        self._executables = executables
        self._cost = cost
        self._arch, self._dtype = arch, dtype
        self.block_size = arch.block_size
        self._report = report
        self._pool = ThreadPoolExecutor(at_once, thread_name_prefix="core") if at_once > 1 else None

    def run(self, contexts: Sequence[Sequence[int]], buckets: Sequence[Bucket]) -> Tensor:
        """Return the logits float32 (N, V) that follow each context, in the order given; each is a token or longer.

        Raises:
            NonFiniteLogits: a bucket returned NaN or infinity.
        """
        cropped = [context[-self.block_size :] for context in contexts]
        self._report.crops += sum(len(context) > self.block_size for context in contexts)
        return self.run_calls(self.stateless(RECOMPUTE, cropped, buckets), cropped)

    def stateless(self, step: str, contexts: Sequence[Sequence[int]], buckets: Sequence[Bucket]) -> list[Call]:
        """Return the calls of a step that keeps nothing, each context in one of them; the shortest come first."""
        groups = group([len(context) for context in contexts], of_step(buckets, step), self._cost)
        return [Call(bucket, members, range(len(members))) for bucket, members in groups]

    def remember(self, rows: int, buckets: Iterable[Bucket]) -> KVCache:
        """Return room for the keys and values of some rows."""
        cache = KVCache(self._arch, self._dtype, rows, max(bucket.batch_size for bucket in buckets))
        self._report.kv_bytes = max(self._report.kv_bytes, cache.bytes)
        return cache

    def parts(self, rows: Sequence[R], way: str) -> list[Sequence[R]]:
        """Cut rows into as many at a time as can be remembered."""
        most = most_rows(self._arch, self._dtype) if way == KV else max(1, len(rows))
        return [rows[start : start + most] for start in range(0, len(rows), most)]

    def calls(
        self, step: str, lengths: Sequence[int], buckets: Sequence[Bucket], cache: KVCache, rows: Sequence[int]
    ) -> list[Call]:
        """Return the calls of a step that run some rows of a cache, in the order of their slots."""
        slots = [cache.slot(row) for row in rows]
        calls = []
        for bucket, members in group(lengths, of_step(buckets, step), self._cost, slots):
            first = slots[members[0]]
            calls.append(Call(bucket, members, [slots[m] - first for m in members], cache.views(first, bucket)))
        return calls

    def run_calls(self, calls: Sequence[Call], contexts: Sequence[Sequence[int]]) -> Tensor:
        """Return the logits (N, V) that follow N contexts, each of which is in one call."""
        rows = self.answers(calls, contexts)
        return torch.stack([rows[row] for row in range(len(contexts))])  # (N, V)

    def answers(self, calls: Sequence[Call], contexts: Sequence[Sequence[int]]) -> dict[int, Tensor]:
        """Return what calls answer, by the index of a context: logits (V), or what else it is."""
        run = map if self._pool is None else self._pool.map
        done = list(run(functools.partial(self._run_bucket, contexts), calls))
        self._report.count_overlap(span for _, span in done)
        rows: dict[int, Tensor] = {}
        for call, (found, (start, end)) in zip(calls, done, strict=True):
            most = step_named(call.bucket.step).positions(call.bucket) // call.bucket.batch_size
            lengths = [min(len(contexts[row]), most) for row in call.members]
            self._report.count_step(call.bucket, lengths, end - start)
            rows |= dict(zip(call.members, found, strict=True))
        return rows

    def _run_bucket(self, contexts: Sequence[Sequence[int]], call: Call) -> tuple[Tensor, tuple[float, float]]:
        """Return the answers (n, ...) for the n contexts of a call, and from when to when the bucket ran."""
        executable, step = self._executables(call.bucket), step_named(call.bucket.step)
        packed: list[Sequence[int]] = [()] * (max(call.rows) + 1)
        for row, member in zip(call.rows, call.members, strict=True):
            packed[row] = contexts[member]
        inputs = step.pack(packed, call.bucket)
        start = time.perf_counter()
        outputs = executable(*inputs, *call.state)
        end = time.perf_counter()
        answers = step.answers(outputs, len(packed))[list(call.rows)]  # (n, ...)
        # NaN if any value is; several times faster than asking each
        if not all(math.isfinite(extreme) for extreme in answers.aminmax()):
            hint = "the weights may hold NaN or infinite values; see how the model was trained or saved"
            raise NonFiniteLogits(f"bucket {call.bucket} returned logits that are not finite", hint=hint)
        return answers, (start, end)
