"""What calls of buckets cost on this machine: as `bench --save` measured them, else as a backend assumes.

Of each step three buckets or more are measured; others follow from the backend's own estimate, scaled and shifted to go
through those, since what a machine reaches of its peak depends on the machine and hardly on the length. A bucket within
5 % of a longer one is taken to cost what that one does, as is all between: so near, a shorter bucket saves nothing that
could be measured again. Kept in this node's directory, for one architecture, backend, dtype and target each. Imports no
torch.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from nanogpt_buckets import key
from nanogpt_buckets.backends.base import Backend
from nanogpt_buckets.choice import Choice
from nanogpt_buckets.errors import BucketsError
from nanogpt_buckets.model.architecture import Architecture
from nanogpt_buckets.node.records import COSTS
from nanogpt_buckets.plan.bucket import Bucket

# A line needs two points, and one more to be worth anything.
LEAST = 3
# Costs that are so near are one.
_SAME = 0.05


@dataclass(frozen=True)
class Costs:
    """Costs of calls, in ms; `measured` are those of buckets as they were measured, of however few."""

    backend: Backend
    architecture: Architecture
    dtype: str
    target: str | None
    measured: dict[Bucket, float]

    def __call__(self, bucket: Bucket) -> float:
        """Return what a call of a bucket takes, in ms."""
        if bucket.step not in self.lines:
            return self._assumed(bucket)
        if bucket in self.measured and bucket not in self.merged:
            return self.measured[bucket]
        kind = (bucket.step, bucket.batch_size)
        for short, stands in self.merged.items():
            if kind == (stands.step, stands.batch_size) and short.seq_len <= bucket.seq_len < stands.seq_len:
                return self.measured[stands]
        shift, scale = self.lines[bucket.step]
        return shift + scale * self._assumed(bucket)

    @functools.cached_property
    def lines(self) -> dict[str, tuple[float, float]]:
        """(shift, scale) of the backend's estimate, by step, where enough is measured."""
        points: dict[str, list[tuple[float, float]]] = {}
        for bucket, ms in self.measured.items():
            points.setdefault(bucket.step, []).append((self._assumed(bucket), ms))
        return {step: _line(own) for step, own in points.items() if len(own) >= LEAST}

    @functools.cached_property
    def merged(self) -> dict[Bucket, Bucket]:
        """Measured buckets that cost what a longer one does, and the longest such, which stands for them."""
        found: dict[Bucket, Bucket] = {}
        stands: dict[tuple[str, int], Bucket] = {}
        for bucket in sorted((b for b in self.measured if b.step in self.lines), key=lambda each: -each.seq_len):
            longer = stands.setdefault((bucket.step, bucket.batch_size), bucket)
            if bucket != longer and abs(self.measured[bucket] / self.measured[longer] - 1) <= _SAME:
                found[bucket] = longer
            elif self.measured[bucket] < self.measured[longer]:
                stands[bucket.step, bucket.batch_size] = bucket
        return found

    @property
    def too_few(self) -> dict[str, int]:
        """How many buckets are measured of a step, where that is too few to go by."""
        return dict(Counter(bucket.step for bucket in self.measured if bucket.step not in self.lines))

    @property
    def said(self) -> list[str]:
        """What costs rest on, a line each."""
        if not self.lines:
            return self.backend.assumptions(self.dtype, self.target)
        steps = ", ".join(sorted(self.lines))
        count = sum(bucket.step in self.lines for bucket in self.measured)
        said = (
            f"calls of {steps}: {count} buckets as bench --save measured them here, others along a line through these"
        )
        rest = self.backend.assumptions(self.dtype, self.target)
        return [said, *(f"of other steps: {line}" for line in rest)]

    def _assumed(self, bucket: Bucket) -> float:
        return self.backend.call_ms(self.architecture, self.dtype, self.target, bucket)


def _line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return shift and scale, neither negative, of the least squared relative error."""
    weights = [1 / y**2 for _, y in points]
    total = sum(weights)
    x_mean = sum(w * x for w, (x, _) in zip(weights, points, strict=True)) / total
    y_mean = sum(w * y for w, (_, y) in zip(weights, points, strict=True)) / total
    spread = sum(w * (x - x_mean) ** 2 for w, (x, _) in zip(weights, points, strict=True))
    along = sum(w * (x - x_mean) * (y - y_mean) for w, (x, y) in zip(weights, points, strict=True))
    scale = along / spread if spread else 0.0
    if scale <= 0:
        return y_mean, 0.0
    if (shift := y_mean - scale * x_mean) >= 0:
        return shift, scale
    through = sum(w * x * y for w, (x, y) in zip(weights, points, strict=True))
    return 0.0, through / sum(w * x * x for w, (x, _) in zip(weights, points, strict=True))


def costs_for(backend: Backend, architecture: Architecture, dtype: str, target: str | None) -> Costs:
    """Return costs as far as they were measured on this node, and nothing was wrong with what was kept of that."""
    measured = _measured(_name(backend, architecture, dtype, target))
    return Costs(backend, architecture, dtype, target, measured)


def _measured(name: str) -> dict[Bucket, float]:
    """Return what was measured, in ms; nothing if that cannot be understood."""
    try:
        calls = (COSTS.find(name) or {"calls": []})["calls"]
        return {Bucket(B, S, step): float(ms) for step, B, S, ms in calls if 0 < ms < math.inf}
    except (BucketsError, ValueError, TypeError, KeyError):
        return {}


def costs_of(choice: Choice) -> Costs:
    """Return costs of a choice's buckets; see `costs_for`."""
    return costs_for(choice.compiler, choice.model.architecture, choice.dtype, choice.target)


def dispatch_cost(choice: Choice) -> Callable[[Bucket], float]:
    """Return what steps go to the cheapest bucket by: what was measured of a step, else its arithmetic and reading.

    Only costs of one step are ever compared.
    """
    if choice.backend is None:
        return choice.cost
    costs = costs_of(choice)
    # asked for every bucket at every step
    return functools.cache(lambda bucket: costs(bucket) if bucket.step in costs.lines else choice.cost(bucket))


def save_costs(choice: Choice, measured: Iterable[tuple[Bucket, float]]) -> Costs:
    """Keep what was measured, in ms, beside what was before, and return the costs that follow.

    Raises:
        CacheError: it cannot be written.
    """
    backend, arch = choice.compiler, choice.model.architecture
    name = _name(backend, arch, choice.dtype, choice.target)
    calls = _measured(name) | dict(measured)
    COSTS.write(name, {"calls": [[b.step, b.batch_size, b.seq_len, ms] for b, ms in sorted(calls.items())]})
    return costs_of(choice)


def _name(backend: Backend, architecture: Architecture, dtype: str, target: str | None) -> str:
    of = {"architecture": architecture.to_json(), "backend": backend.name, "dtype": dtype, "target": target}
    return key.digest({**of, "inlines_weights": backend.inlines_weights})
