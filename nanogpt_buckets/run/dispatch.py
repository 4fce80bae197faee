"""Contexts -> the cheapest buckets that hold them -> logits: group, pack, call, drop the padding.

The cheapest bucket that fits is chosen by cost, never by sorting sizes. Knows nothing of sampling, of text, of what is
built, or of how an executable came to be.
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from torch import Tensor

from nanogpt_buckets.contract import Executable
from nanogpt_buckets.errors import NonFiniteLogits
from nanogpt_buckets.model.architecture import Architecture
from nanogpt_buckets.plan.bucket import Bucket
from nanogpt_buckets.run.kvcache import KVCache, most_rows
from nanogpt_buckets.run.report import Report
from nanogpt_buckets.steps import step_named

Cost = Callable[[Bucket], float]
RECOMPUTE, KV, CHUNK, SCORE = "recompute", "kv", "chunk", "score"
# How long a row is at its first step and at its last.
Span = tuple[int, int]


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

    A group is a span of the rows by length; where rows are bound to `slots`, a span of these, whatever the lengths, and
    those in it that are nobody's take room as well.

    A dynamic programme over where spans end finds the best: F[j] = min over i < j of F[i] + c(bucket for rows i..j-1).
    For costs that never fall with length, no groups are better than spans of the sorted lengths.

    Raises:
        ValueError: some row fits no bucket; callers settle coverage first.
    """
    order = sorted(range(len(lengths)), key=(lengths if slots is None else slots).__getitem__)
    places = range(len(order)) if slots is None else [slots[row] for row in order]
    fitting = functools.cache(lambda width, length: cheapest(buckets, width, length, cost))
    best: list[tuple[float, int, Bucket | None]] = [(0, 0, None)]  # cost so far, start of last group, its bucket
    for end, row in enumerate(order, 1):
        options, longest = [], lengths[row]
        for start in range(end - 1, -1, -1):
            longest = max(longest, lengths[order[start]])
            bucket = fitting(places[end - 1] - places[start] + 1, longest)
            if bucket is None:
                break  # nor does any hold a longer span
            options.append((best[start][0] + cost(bucket), start, bucket))
        if not options:
            raise ValueError(f"no bucket holds {longest} tokens")
        best.append(min(options, key=lambda option: option[:2]))
    groups, end = [], len(order)
    while end:
        _, start, last = best[end]
        assert last is not None
        groups.append((last, order[start:end]))
        end = start
    return groups[::-1]


def _lengths(spans: Iterable[Span], block_size: int, strategy: str) -> dict[str, set[Span]]:
    """Return by step from which to which length it runs rows; recomputed contexts do not grow beyond `block_size`."""
    if strategy not in (KV, CHUNK):
        return {strategy: {(min(first, block_size), min(last, block_size)) for first, last in spans}}
    found: dict[str, set[Span]] = {"prefill": set(), "decode": set(), CHUNK: set(), RECOMPUTE: set()}
    for first, last in set(spans):
        if strategy == CHUNK:
            piece = step_named(CHUNK).positions(Bucket(1, block_size, CHUNK))
            if first <= block_size:
                found[CHUNK].add((min(first, piece), min(last, block_size)))
        elif first <= block_size:
            found["prefill"].add((first, first))
        if strategy == KV and first < min(last, block_size):
            found["decode"].add((first + 1, min(last, block_size)))
        if last > block_size:  # the crop moves every position, so nothing that is remembered holds
            found[RECOMPUTE].add((block_size, block_size))
    return {step: lengths for step, lengths in found.items() if lengths}


def needed(spans: Iterable[Span], block_size: int, strategy: str) -> dict[str, int]:
    """Return the longest row that each step of a strategy has to hold."""
    lengths = _lengths(spans, block_size, strategy)
    return {step: max(last for _, last in found) for step, found in lengths.items()}


def reach(buckets: Iterable[Bucket], need: Mapping[str, int]) -> bool:
    """Whether for every step some bucket holds a row of that length."""
    held = list(buckets)
    return all(any(b.step == step and b.holds(1, length) for b in held) for step, length in need.items())


def buckets_used(
    spans: Iterable[Span], together: int, buckets: Sequence[Bucket], cost: Cost, block_size: int, strategy: str
) -> set[Bucket]:
    """Return all buckets that rows may run in, however up to `together` of them are grouped at each step.

    Who meets whom is not known before: rows end early, and others take their places. A ValueError if some row outgrows
    every bucket.
    """
    used: set[Bucket] = set()
    for step, lengths in _lengths(spans, block_size, strategy).items():
        mine, below = of_step(buckets, step), 0
        if step == CHUNK:
            mine = racked(buckets, together, max(last for _, last in lengths))
        widest = max((bucket.batch_size for bucket in mine), default=0)
        for rung in sorted({bucket.seq_len for bucket in mine}):
            if any(first <= rung and last > below for first, last in lengths):
                widths = range(1, min(together, widest) + 1)
                used |= {bucket for width in widths if (bucket := cheapest(mine, width, rung, cost))}
            below = rung
        if (longest := max(last for _, last in lengths)) > below:
            raise ValueError(f"no bucket holds {longest} tokens")
    return used


def racked(buckets: Iterable[Bucket], together: int, longest: int) -> list[Bucket]:
    """Return the chunk buckets that rows run in: of one batch size, since what is remembered is for so many rows.

    The smallest that holds as many rows as come together, else the largest, of those that hold the longest.
    """
    mine = of_step(buckets, CHUNK)
    sizes = sorted({bucket.batch_size for bucket in mine if bucket.seq_len >= longest})
    chosen = next((size for size in sizes if size >= together), sizes[-1] if sizes else 0)
    return [bucket for bucket in mine if bucket.batch_size == chosen]


def of_step(buckets: Iterable[Bucket], step: str) -> list[Bucket]:
    """Return the buckets of one step."""
    return [bucket for bucket in buckets if bucket.step == step]


def _widest(buckets: Iterable[Bucket]) -> int:
    """Return how many rows the widest bucket that generates has."""
    return max((bucket.batch_size for bucket in buckets if bucket.step != SCORE), default=1)


class Context(Protocol):
    """A row, as far as this is concerned: token ids, which may grow. It is itself and equals no other."""

    @property
    def ids(self) -> Sequence[int]:
        """The tokens so far."""


C = TypeVar("C", bound=Context)


@dataclass(frozen=True)
class Call(Generic[C]):
    """One execution of a bucket: whose contexts are in which of its rows, and the state it finds.

    It may be run again for as long as nobody outgrows the bucket. Where only `pieces` of contexts are run, from which
    to which token, the state is replaced by what comes back.
    """

    bucket: Bucket
    members: Sequence[C]
    rows: Sequence[int]
    state: list[Tensor] = field(default_factory=list)
    pieces: Sequence[tuple[int, int]] = ()


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
        self.cost = cost
        self._arch, self._dtype = arch, dtype
        self.block_size = arch.block_size
        self._report = report
        self._at_once = at_once
        self._spare: deque[KVCache] = deque(maxlen=1)
        self._pool = ThreadPoolExecutor(at_once, thread_name_prefix="core") if at_once > 1 else None

    def places(self, way: str, buckets: Iterable[Bucket]) -> int:
        """Return how many rows are worth running at a time: as many as fit into one call, if that can be remembered."""
        widest = self._at_once * _widest(of_step(buckets, CHUNK) if way == CHUNK else buckets)
        return min(widest, most_rows(self._arch, self._dtype)) if way == KV else widest

    def blank(self, bucket: Bucket, core: int) -> list[Tensor]:
        """Return, on a core, what the first call of a bucket takes for remembered."""
        state = self._executables(bucket).blank(core)
        size = sum(tensor.numel() * tensor.element_size() for tensor in state)
        self._report.kv_bytes = max(self._report.kv_bytes, (core + 1) * size)
        return state

    def remember(self, rows: int, buckets: Iterable[Bucket]) -> KVCache:
        """Return room for keys and values of some rows: that of the batch before, whose pages are there, if it does."""
        slots = max(rows, _widest(buckets))
        with contextlib.suppress(IndexError):
            if (spare := self._spare.pop()).slots >= slots:
                return spare
        cache = KVCache(self._arch, self._dtype, slots)
        self._report.kv_bytes = max(self._report.kv_bytes, cache.bytes)
        return cache

    def forget(self, cache: KVCache) -> None:
        """Take room back, all of whose values are finite, for the next who needs some."""
        self._spare.append(cache)

    def close(self) -> None:
        """Let go of room that was kept for whoever comes next, and keep none from now on."""
        self._spare = deque(maxlen=0)

    def stateless(self, step: str, rows: Sequence[C], buckets: Sequence[Bucket]) -> list[Call[C]]:
        """Return the calls of a step that keeps nothing and runs the whole contexts of rows, the shortest first."""
        groups = group([min(len(row.ids), self.block_size) for row in rows], of_step(buckets, step), self.cost)
        return [Call(bucket, [rows[m] for m in members], range(len(members))) for bucket, members in groups]

    def remembered(
        self, step: str, rows: Sequence[C], slots: Sequence[int], buckets: Sequence[Bucket], cache: KVCache
    ) -> list[Call[C]]:
        """Return the calls of a step for rows that are in these slots of a cache."""
        calls = []
        for bucket, members in group([len(row.ids) for row in rows], of_step(buckets, step), self.cost, slots):
            first, views = cache.views(slots[members[0]], bucket)
            calls.append(Call(bucket, [rows[m] for m in members], [slots[m] - first for m in members], views))
        return calls

    def run(self, calls: Sequence[Call[C]]) -> dict[C, Tensor]:
        """Return what calls answer, by row, each in one call: the logits float32 (V) that follow, or what else it is.

        Raises:
            NonFiniteLogits: a bucket returned NaN or infinity.
        """
        # what is padding in one call may be another's state, so those take turns
        shared = any(call.state and not call.pieces for call in calls)
        run = map if self._pool is None or shared else self._pool.map
        done = list(run(self._run_bucket, calls))
        self._report.count_overlap(span for _, span in done)
        found: dict[C, Tensor] = {}
        for call, (answers, (start, end)) in zip(calls, done, strict=True):
            contexts = [end for _, end in call.pieces] or [len(row.ids) for row in call.members]
            lengths = [end - start for start, end in call.pieces] or contexts
            self._report.crops += sum(length > self.block_size for length in lengths)
            most = step_named(call.bucket.step).positions(call.bucket) // call.bucket.batch_size
            longest = min(max(contexts), self.block_size)
            self._report.count_step(call.bucket, [min(length, most) for length in lengths], end - start, longest)
            found.update(zip(call.members, answers.unbind(), strict=True))
        return found

    def _run_bucket(self, call: Call[C]) -> tuple[Tensor, tuple[float, float]]:
        """Return the answers (n, ...) for the n contexts of a call, and from when to when the bucket ran."""
        executable, step = self._executables(call.bucket), step_named(call.bucket.step)
        packed: list[Sequence[int]] = [()] * (call.rows[-1] + 1)
        for row, member in zip(call.rows, call.members, strict=True):
            packed[row] = member.ids if len(member.ids) <= self.block_size else member.ids[-self.block_size :]
        kept = [0] * len(packed)
        for row, (have, until) in zip(call.rows, call.pieces, strict=False):
            packed[row], kept[row] = packed[row][:until], have
        inputs = step.pack_after(kept, packed, call.bucket)
        start = time.perf_counter()
        outputs = executable(*inputs, *call.state)
        end = time.perf_counter()
        if call.pieces:
            call.state[:] = outputs[-len(call.state) :]
        answers = step.answers(outputs, len(packed))  # (rows, ...)
        if len(call.rows) < len(packed):
            answers = answers[list(call.rows)]  # (n, ...)
        # NaN if any value is; several times faster than asking each, and numpy's loops wait for no other thread
        values = answers.numpy()
        if not (math.isfinite(values.min()) and math.isfinite(values.max())):
            hint = "the weights may hold NaN or infinite values; see how the model was trained or saved"
            raise NonFiniteLogits(f"bucket {call.bucket} returned logits that are not finite", hint=hint)
        return answers, (start, end)
