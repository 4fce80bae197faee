"""Contexts -> the cheapest buckets that hold them -> logits: group, pad, call, drop the padding.

The cheapest bucket that fits is chosen by cost, never by sorting sizes. Knows nothing of sampling, text, or how an
executable came to be.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from nanogpt_buckets.backends.base import Executable
from nanogpt_buckets.errors import NonFiniteLogits
from nanogpt_buckets.plan.bucket import Bucket
from nanogpt_buckets.report import Report

Cost = Callable[[Bucket], int]


def cheapest(buckets: Iterable[Bucket], batch_size: int, length: int, cost: Cost) -> Bucket | None:
    """Return the cheapest bucket that holds `batch_size` rows of `length` tokens, or None.

    Equal costs go to the shorter bucket, then to the smaller batch.
    """
    fitting = [bucket for bucket in buckets if bucket.holds(batch_size, length)]
    return min(fitting, key=lambda b: (cost(b), b.seq_len, b.batch_size), default=None)


def group(lengths: Sequence[int], buckets: Sequence[Bucket], cost: Cost) -> list[tuple[Bucket, list[int]]]:
    """Cut rows into groups that each fill one bucket, at the least total cost.

    For costs that never fall with length, contiguous groups of the sorted lengths are optimal; a dynamic programme
    over where they end finds the best: F[j] = min over i < j of F[i] + c(bucket for rows i..j-1).

    Args:
        lengths: tokens of each row.
        buckets: what may run.
        cost: of one step in a bucket.

    Returns:
        (bucket, row indices) pairs that cover every row once.

    Raises:
        ValueError: some row fits no bucket; callers settle coverage first.
    """
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    widest = max((bucket.batch_size for bucket in buckets), default=0)
    best: list[tuple[float, int, Bucket | None]] = [(0, 0, None)]  # cost so far, start of last group, its bucket
    for end in range(1, len(order) + 1):
        options: list[tuple[float, int, Bucket | None]] = []
        for start in range(max(0, end - widest), end):
            bucket = cheapest(buckets, end - start, lengths[order[end - 1]], cost)
            if bucket is not None:
                options.append((best[start][0] + cost(bucket), start, bucket))
        if not options:
            raise ValueError(f"no bucket holds {lengths[order[end - 1]]} tokens")
        best.append(min(options, key=lambda option: option[:2]))
    groups, end = [], len(order)
    while end:
        _, start, bucket = best[end]
        assert bucket is not None
        groups.append((bucket, order[start:end]))
        end = start
    return groups[::-1]


class Dispatcher:
    """Runs any number of contexts through the buckets at hand.

    Args:
        executables: called with a bucket, returns what runs it; it may load on first use.
        cost: of one step in a bucket.
        block_size: contexts longer than this are cropped to their last block_size tokens, as nanoGPT does.
        report: where steps are counted.
        at_once: how many groups may run at the same time, on as many cores.
    """

    def __init__(
        self,
        executables: Callable[[Bucket], Executable],
        cost: Cost,
        block_size: int,
        report: Report,
        *,
        at_once: int = 1,
    ) -> None:
        self._executables = executables
        self._cost = cost
        self._block_size = block_size
        self._report = report
        self._pool = ThreadPoolExecutor(at_once, thread_name_prefix="core") if at_once > 1 else None

    def run(self, contexts: Sequence[Sequence[int]], buckets: Sequence[Bucket]) -> Tensor:
        """Return the logits that follow each context, in the order given.

        Args:
            contexts: token ids, at least one each, of any length.
            buckets: those that may run; the longest context, cropped, must fit.

        Returns:
            Logits float32 (N, V).

        Raises:
            NonFiniteLogits: a bucket returned NaN or infinity.
        """
        cropped = [context[-self._block_size :] for context in contexts]
        self._report.crops += sum(len(context) > self._block_size for context in contexts)
        groups = group([len(context) for context in cropped], buckets, self._cost)
        run = map if self._pool is None else self._pool.map
        contexts_of = [[cropped[row] for row in members] for _, members in groups]
        done = run(self._run_bucket, [bucket for bucket, _ in groups], contexts_of)
        rows: dict[int, Tensor] = {}
        for (bucket, members), (logits, seconds) in zip(groups, done, strict=True):
            self._report.count_step(bucket, [len(cropped[row]) for row in members], seconds)
            rows |= dict(zip(members, logits, strict=True))
        return torch.stack([rows[row] for row in range(len(contexts))])  # (N, V)

    def _run_bucket(self, bucket: Bucket, contexts: list[Sequence[int]]) -> tuple[Tensor, float]:
        """Return the logits (n, V) of n contexts, and the seconds spent inside the bucket."""
        executable, inputs = self._executables(bucket), pad(contexts, bucket)
        start = time.perf_counter()
        logits = executable(*inputs)[: len(contexts)]  # (B, V) -> (n, V)
        seconds = time.perf_counter() - start
        # NaN if any logit is; several times faster than asking each
        if not all(math.isfinite(extreme) for extreme in logits.aminmax()):
            raise NonFiniteLogits(
                f"bucket {bucket} returned logits that are not finite",
                hint="the weights may hold NaN or infinite values; see how the model was trained or saved",
            )
        return logits, seconds


def pad(contexts: Sequence[Sequence[int]], bucket: Bucket) -> tuple[Tensor, Tensor]:
    """Right-pad contexts to a bucket's shape.

    Padding is id 0, which real positions never see; padding rows have last_index 0 and are dropped by the caller.

    Returns:
        input_ids int32 (B, S) and last_index int32 (B,).
    """
    input_ids = torch.zeros(bucket.batch_size, bucket.seq_len, dtype=torch.int32)
    last_index = torch.zeros(bucket.batch_size, dtype=torch.int32)
    for row, context in enumerate(contexts):
        input_ids[row, : len(context)] = torch.tensor(context, dtype=torch.int32)
        last_index[row] = len(context) - 1
    return input_ids, last_index
