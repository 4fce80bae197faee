"""What a run did, in counters: which buckets ran, what was padding, what was cropped or promoted.

The last run's, and the sums of all, are kept in this node's directory, for `nanogpt-buckets report`. Imports no torch.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from nanogpt_buckets import node
from nanogpt_buckets.errors import BucketsError
from nanogpt_buckets.node.records import LAST_RUN, alone
from nanogpt_buckets.plan.bucket import Bucket
from nanogpt_buckets.settings import records_runs
from nanogpt_buckets.steps import step_named

_NAME = "last-run"
# What is added up over runs: numbers, and counts by name.
SUMMED = (
    "hits", "compiled", "saved_s", "new_tokens", "scored_tokens", "seconds", "steps", "real_tokens", "padded_tokens",
    "switches", "crops", "promotions",
)  # fmt: skip
_COUNTED = ("tiers", "misses")
# Of a doubling, by which times are told apart.
_PARTS = 12


@dataclass
class BucketCount:
    """How often one bucket ran, the real rows and tokens in it, and the time inside it, its input checks included.

    `times` are how many executions took how long, in twelfths of a doubling of a microsecond: 6 % apart.
    """

    steps: int = 0
    rows: int = 0
    tokens: int = 0
    seconds: float = 0.0
    times: dict[int, int] = field(default_factory=dict, repr=False)

    def percentile_ms(self, share: float) -> float:
        """Return within how many ms that share of executions ended, 0 to 1."""
        wanted = share * self.steps
        for twelfths, count in sorted(self.times.items()):
            wanted -= count
            if wanted <= 0:
                return 2 ** (twelfths / _PARTS) / 1000
        return 0.0


@dataclass
class Report:
    """Counters of one engine since it was loaded.

    Args:
        hits: buckets loaded that had been built before.
        tiers: how many of these came from the "cache" directory, a "layer" or the "remote".
        misses: why buckets that were wanted could not be loaded: how many for each reason.
        saved_s: what compiling the hits took where they were built, in seconds.
        compiled: buckets compiled first, because they were missing.
        switches: steps that ran in another bucket than the step before.
        crops: contexts cut to their last block_size tokens.
        promotions: calls that ran longer buckets than planned because one was not built.
        replaced: which buckets these would have run, and why they could not be.
        seconds: time spent in generate, stream, logits and score.
        overlap_s: time by which steps on several cores overlapped: the buckets' own seconds count it more than once.
        kv_bytes: most memory that keys and values of one batch took.
        seed: seed of the last call, chosen here if the caller gave none.
        asked: by step and batch size of the bucket: how many executions had a longest context of each length.
    """

    backend: str
    model: str
    buckets: dict[Bucket, BucketCount] = field(default_factory=dict)
    hits: int = 0
    tiers: dict[str, int] = field(default_factory=dict)
    misses: dict[str, int] = field(default_factory=dict)
    saved_s: float = 0.0
    compiled: int = 0
    new_tokens: int = 0
    scored_tokens: int = 0
    switches: int = 0
    crops: int = 0
    promotions: int = 0
    replaced: dict[Bucket, str] = field(default_factory=dict)
    seconds: float = 0.0
    overlap_s: float = 0.0
    kv_bytes: int = 0
    seed: int | None = None
    asked: dict[tuple[str, int], dict[int, int]] = field(default_factory=dict, repr=False)
    _last: Bucket | None = field(default=None, repr=False)

    def count_step(self, bucket: Bucket, lengths: list[int], seconds: float, context: int | None = None) -> None:
        """Count one execution with these real row lengths, the time it took, and the longest `context` of its rows."""
        asked = self.asked.setdefault((bucket.step, bucket.batch_size), {})
        longest = max(lengths) if context is None else context
        asked[longest] = asked.get(longest, 0) + 1
        count = self.buckets.setdefault(bucket, BucketCount())
        count.steps += 1
        count.rows += len(lengths)
        count.tokens += sum(lengths)
        count.seconds += seconds
        took = round(_PARTS * math.log2(max(seconds * 1e6, 1)))
        count.times[took] = count.times.get(took, 0) + 1
        self.switches += self._last not in (None, bucket)
        self._last = bucket

    def count_hit(self, tier: str, saved_s: float) -> None:
        """Count a bucket that was loaded and not compiled."""
        self.hits += 1
        self.tiers[tier] = self.tiers.get(tier, 0) + 1
        self.saved_s += saved_s

    def count_miss(self, reason: str) -> None:
        """Count a bucket that was wanted and could not be loaded."""
        self.misses[reason] = self.misses.get(reason, 0) + 1

    def count_overlap(self, spans: Iterable[tuple[float, float]]) -> None:
        """Count by how much executions of one step of the run overlapped, from when to when each of them ran."""
        until = -math.inf
        for start, end in sorted(spans):
            self.overlap_s += max(0.0, min(until, end) - start)
            until = max(until, end)

    @property
    def steps(self) -> int:
        """Executions of any bucket."""
        return sum(count.steps for count in self.buckets.values())

    @property
    def overhead_s(self) -> float:
        """Seconds of host work per execution: grouping, padding, sampling, decoding; all while no bucket ran."""
        inside = sum(count.seconds for count in self.buckets.values()) - self.overlap_s
        return (self.seconds - inside) / self.steps if self.steps else 0.0

    @property
    def real_tokens(self) -> int:
        """Tokens of contexts that were computed."""
        return sum(count.tokens for count in self.buckets.values())

    @property
    def padded_tokens(self) -> int:
        """Positions computed in vain."""
        return sum(c.steps * step_named(b.step).positions(b) for b, c in self.buckets.items()) - self.real_tokens

    @property
    def waste(self) -> float:
        """Share of computed positions that was padding, 0 to 1."""
        total = self.real_tokens + self.padded_tokens
        return self.padded_tokens / total if total else 0.0

    @property
    def tokens_per_s(self) -> float:
        """New and scored tokens per second."""
        return (self.new_tokens + self.scored_tokens) / self.seconds if self.seconds else 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain JSON."""
        rows = [
            {**bucket.to_json(), "positions": step_named(bucket.step).positions(bucket), "steps": c.steps}
            | {"rows": c.rows, "real_tokens": c.tokens, "seconds": c.seconds}
            | {"p50_ms": c.percentile_ms(0.5), "p95_ms": c.percentile_ms(0.95)}
            for bucket, c in sorted(self.buckets.items())
        ]
        names = ["backend", "model", "hits", "tiers", "misses", "saved_s", "compiled", "new_tokens", "scored_tokens"]
        names += ["switches", "crops", "promotions", "seconds"]
        derived = ("steps", "real_tokens", "padded_tokens", "waste", "tokens_per_s", "overhead_s")
        replaced = [bucket.to_json() | {"why": why} for bucket, why in sorted(self.replaced.items())]
        values = {name: getattr(self, name) for name in (*names, *derived, "kv_bytes", "seed")}
        return values | {"replaced": replaced, "buckets": rows}


def save_last_run(report: Report) -> None:
    """Keep a report in place of the one before, and add it to the sums, if it can and may be written; never fails."""
    if not records_runs():
        return
    run = {**report.to_json(), "ended": int(time.time())}
    with alone("", f".{_NAME}.lock"):
        before: dict[str, Any] = {}
        with contextlib.suppress(BucketsError, FileNotFoundError):
            before = LAST_RUN.read(_NAME)["all"]
        LAST_RUN.keep(_NAME, run | {"all": _added(before, run)})


def _added(sums: Mapping[str, Any], run: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sums over all runs with one more."""
    total = {"runs": sums.get("runs", 0) + 1, "since": sums.get("since", run["ended"])}
    total |= {name: sums.get(name, 0) + run[name] for name in SUMMED}
    for name in _COUNTED:
        counts = sums.get(name, {})
        total[name] = counts | {reason: counts.get(reason, 0) + count for reason, count in run[name].items()}
    return total


def load_last_run() -> dict[str, Any]:
    """Return the JSON of the report that was kept last, "ended", in seconds since 1970, and the sums of "all" runs.

    A BucketsError if no run has ended on this node yet; it is a CacheError if this cannot be read or believed.
    """
    try:
        return LAST_RUN.read(_NAME)
    except FileNotFoundError:
        hint = 'nanogpt-buckets generate "ROMEO:" --model demo'
        raise BucketsError(f"no run has been recorded in {node.directory()}", hint=hint) from None
