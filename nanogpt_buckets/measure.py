"""How fast one built bucket is, and how far its logits are from the eager model's, on this machine and these weights.

Compiled and eager steps take turns, so that whatever else the machine does meets both. Knows nothing of terminals, nor
of which buckets to measure.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from nanogpt_buckets.choice import Choice
from nanogpt_buckets.contract import Executable
from nanogpt_buckets.errors import CacheError
from nanogpt_buckets.plan.bucket import Bucket
from nanogpt_buckets.run.loader import artifact_of
from nanogpt_buckets.selection import Selection
from nanogpt_buckets.steps import step_named
from nanogpt_buckets.store.manifest import Manifest

_LOADS = 5


@dataclass(frozen=True)
class Spread:
    """Several measurements of one thing."""

    median: float
    min: float
    max: float


@dataclass(frozen=True)
class Figures:
    """What was measured of one bucket's entry.

    Loading is reading, verifying and opening, with files in the page cache. A step has every row full; its
    tokens are those it chooses or scores. `eager_ms` is the same uncompiled, `speed_up` that of the medians.
    Differences are of logits, or of log-probabilities.
    """

    bucket: Bucket
    key: str
    bytes: int
    load_ms: Spread
    step_ms: Spread
    eager_ms: Spread
    tokens_per_s: float
    speed_up: float
    max_difference: float
    mean_difference: float

    def to_json(self) -> dict[str, Any]:
        """Return the figures as plain JSON."""
        return asdict(self) | {"bucket": self.bucket.to_json()}


def measure(
    selection: Selection,
    bucket: Bucket,
    weights: Mapping[str, Tensor],
    *,
    runs: int,
    on_run: Callable[[int], None] = lambda amount: None,
) -> Figures:
    """Measure the best intact entry of a bucket with weights of the choice's dtype.

    Of each kind `runs` steps are timed, and `on_run(1)` is called after each pair; one more of each warms up.

    Raises:
        CacheError: none of the entries can be loaded.
    """
    executable, manifest, load_ms = _load(selection, bucket, weights)
    arch, step_kind = selection.choice.model.architecture, step_named(bucket.step)
    eager = step_kind.eager(arch, bucket, weights)
    generator = torch.Generator().manual_seed(0)
    B, S = bucket.batch_size, bucket.seq_len
    ids = torch.randint(arch.vocab_size, (B, S), generator=generator)  # (B, S)
    most = step_kind.positions(bucket) // B
    inputs = step_kind.pack(ids[:, : S if most == 1 else most].tolist(), bucket)
    given = {run: (*inputs, *run.blank()) for run in (executable, eager)}
    own, expected = (step_kind.answers(run(*tensors), B) for run, tensors in given.items())  # 2 x (B, ...)
    difference = (own - expected).abs()  # (B, ...)
    step_ms: list[float] = []
    eager_ms: list[float] = []
    for _ in range(runs):
        for run, times in ((executable, step_ms), (eager, eager_ms)):
            start = time.perf_counter()
            run(*given[run])
            times.append(1000 * (time.perf_counter() - start))
        on_run(1)
    executable.close()
    step, baseline = _spread(step_ms), _spread(eager_ms)
    return Figures(
        bucket=bucket,
        key=manifest.key,
        bytes=manifest.size,
        load_ms=load_ms,
        step_ms=step,
        eager_ms=baseline,
        tokens_per_s=1000 * step_kind.tokens(bucket) / step.median,
        speed_up=baseline.median / step.median,
        max_difference=difference.max().item(),
        mean_difference=difference.mean().item(),
    )


def _load(selection: Selection, bucket: Bucket, weights: Mapping[str, Tensor]) -> tuple[Executable, Manifest, Spread]:
    """Load the first entry that can be, several times over."""
    choice: Choice = selection.choice
    interface = step_named(bucket.step).interface(choice.model.architecture, bucket, choice.dtype)
    refused: CacheError | None = None
    for manifest in selection.usable[bucket]:
        try:
            times = []
            for _ in range(_LOADS):
                start = time.perf_counter()
                artifact = artifact_of(selection.store.read(manifest))
                executable = choice.compiler.load(artifact, interface, weights)
                times.append(1000 * (time.perf_counter() - start))
            return executable, manifest, _spread(times)
        except CacheError as error:
            refused = refused or error
    assert refused is not None
    raise refused


def _spread(values: list[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values))
