"""Contexts -> the cheapest buckets that hold them -> logits: group, pack, call, drop the padding.

Knows nothing of sampling, of text, or of how an executable came to be.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from nanogpt_buckets.contract import Executable
from nanogpt_buckets.errors import NonFiniteLogits
from nanogpt_buckets.plan.bucket import Bucket
from nanogpt_buckets.run.coverage import Cost, group
from nanogpt_buckets.run.report import Report
from nanogpt_buckets.steps import step_named


class Dispatcher:
    """Runs any number of contexts through the buckets at hand.

    Args:
        executables: called with a bucket, returns what runs it.
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
            raise NonFiniteLogits(
                f"bucket {bucket} returned logits that are not finite",
                hint="the weights may hold NaN or infinite values; see how the model was trained or saved",
            )
        return logits, (start, end)
