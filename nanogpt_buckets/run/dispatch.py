"""Contexts -> the cheapest buckets that hold them -> logits: group, pack, call, drop the padding.

The cheapest bucket that fits is chosen by cost, never by sorting sizes. Knows nothing of sampling, of text, of what is
built, or of how an executable came to be.
"""

from __future__ import annotations

import bisect
import math
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from nanogpt_buckets.contract import Executable
from nanogpt_buckets.errors import NonFiniteLogits
from nanogpt_buckets.plan.bucket import Bucket
from nanogpt_buckets.run.report import Report
from nanogpt_buckets.steps import step_named

Cost = Callable[[Bucket], int]


def cheapest(buckets: Iterable[Bucket], batch_size: int, length: int, cost: Cost) -> Bucket | None:
    """Return the cheapest bucket that holds `batch_size` rows of `length` tokens, or None.

    Equal costs go to the shorter bucket, then to the smaller batch.
    """
    fitting = [bucket for bucket in buckets if bucket.holds(batch_size, length)]
    return min(fitting, key=lambda b: (cost(b), b.seq_len, b.batch_size), default=None)


def group(lengths: Sequence[int], buckets: Sequence[Bucket], cost: Cost) -> list[tuple[Bucket, list[int]]]:
    """Cut rows of these lengths into groups that each fill one bucket, (bucket, rows), at the least total cost.

    For costs that never fall with length, contiguous groups of the sorted lengths are optimal; a dynamic programme
    over where they end finds the best: F[j] = min over i < j of F[i] + c(bucket for rows i..j-1).

    Raises:
        ValueError: some row fits no bucket; callers settle coverage first.
    """
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    widest = max((bucket.batch_size for bucket in buckets), default=0)
    best: list[tuple[float, int, Bucket | None]] = [(0, 0, None)]  # cost so far, start of last group, its bucket
    for end in range(1, len(order) + 1):
        longest = lengths[order[end - 1]]
        options = [
            (best[start][0] + cost(bucket), start, bucket)
            for start in range(max(0, end - widest), end)
            if (bucket := cheapest(buckets, end - start, longest, cost))
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


def buckets_used(
    batches: Iterable[Sequence[int]], more_tokens: int, buckets: Sequence[Bucket], cost: Cost, block_size: int
) -> set[Bucket]:
    """Return the buckets used by batches of rows that have these lengths at their first step and go together.

    Each row gains `more_tokens` before its last step, one a step; contexts do not grow beyond `block_size`. A
    ValueError if some row outgrows every bucket.
    """
    rungs = sorted({bucket.seq_len for bucket in buckets})
    used: set[Bucket] = set()
    for lengths in batches:
        before: list[int] = []
        for grown in range(more_tokens + 1):
            now = [min(length + grown, block_size) for length in lengths]
            places = [bisect.bisect_left(rungs, length) for length in now]
            if places != before:  # grouped anew whenever one of them outgrows a rung
                used |= {bucket for bucket, _ in group(now, buckets, cost)}
            before = places
            if min(now) == block_size:
                break
    return used


class Dispatcher:
    """Runs any number of contexts through the buckets at hand, `at_once` groups at the same time on as many cores.

    Contexts longer than block_size are cropped to their last block_size tokens, as nanoGPT does.
    """

    def __init__(
        self, executables: Callable[[Bucket], Executable], cost: Cost, block_size: int, report: Report, at_once: int = 1
    ) -> None:
        self._executables = executables
        self._cost = cost
        self._block_size = block_size
        self._report = report
        self._pool = ThreadPoolExecutor(at_once, thread_name_prefix="core") if at_once > 1 else None

    def run(self, contexts: Sequence[Sequence[int]], buckets: Sequence[Bucket]) -> Tensor:
        """Return the logits float32 (N, V) that follow each context, in the order given; each is a token or longer.

        Raises:
            NonFiniteLogits: a bucket returned NaN or infinity.
        """
        cropped = [context[-self._block_size :] for context in contexts]
        self._report.crops += sum(len(context) > self._block_size for context in contexts)
        groups = group([len(context) for context in cropped], buckets, self._cost)
        run = map if self._pool is None else self._pool.map
        contexts_of = [[cropped[row] for row in members] for _, members in groups]
        done = list(run(self._run_bucket, [bucket for bucket, _ in groups], contexts_of))
        self._report.count_overlap(span for _, span in done)
        rows: dict[int, Tensor] = {}
        for (bucket, members), (logits, (start, end)) in zip(groups, done, strict=True):
            self._report.count_step(bucket, [len(cropped[row]) for row in members], end - start)
            rows |= dict(zip(members, logits, strict=True))
        return torch.stack([rows[row] for row in range(len(contexts))])  # (N, V)

    def _run_bucket(self, bucket: Bucket, contexts: list[Sequence[int]]) -> tuple[Tensor, tuple[float, float]]:
        """Return the logits (n, V) of n contexts, and from when to when the bucket ran."""
        executable, step = self._executables(bucket), step_named(bucket.step)
        inputs = step.pack(contexts, bucket)
        start = time.perf_counter()
        outputs = executable(*inputs)
        end = time.perf_counter()
        logits = step.logits(outputs, len(contexts))  # (n, V)
        # NaN if any logit is; several times faster than asking each
        if not all(math.isfinite(extreme) for extreme in logits.aminmax()):
            hint = "the weights may hold NaN or infinite values; see how the model was trained or saved"
            raise NonFiniteLogits(f"bucket {bucket} returned logits that are not finite", hint=hint)
        return logits, (start, end)
