"""A plan for traffic: the best ladder that limits allow, what it will cost beside others, and why a step runs where.

Ties the planner to a choice of model and backend: what calls cost, what a bucket takes to compile and to keep, as the
buckets that are built already say, or as is usual where none is. Imports no torch. Knows nothing of terminals.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from nanogpt_buckets.choice import Choice
from nanogpt_buckets.costs import costs_of, dispatch_cost
from nanogpt_buckets.errors import BucketsError, PlanError
from nanogpt_buckets.plan.bucket import WAYS, Bucket, Plan
from nanogpt_buckets.plan.planner import WORTH, Planned, Planner, knee, usual_ladders
from nanogpt_buckets.plan.traffic import Demand, Request, demand
from nanogpt_buckets.steps import step_named
from nanogpt_buckets.store.entry import manifest_of


@dataclass(frozen=True)
class Limits:
    """What a plan may take at most: buckets, padding (0 to 1), compiling, and memory of the device that runs it.

    Raises:
        PlanError: one of them cannot be meant.
    """

    max_buckets: int | None = None
    max_waste: float | None = None
    max_compile_seconds: float | None = None
    max_device_gb: float | None = None

    def __post_init__(self) -> None:
        if self.max_buckets is not None and self.max_buckets < 1:
            raise PlanError(f"a plan of {self.max_buckets} buckets runs nothing", hint="--max-buckets 1 or more")
        if self.max_waste is not None and not 0 <= self.max_waste < 1:
            raise PlanError(f"waste is a share from 0 to 1, not {self.max_waste:g}", hint="for example --max-waste 20%")
        for name in ("max_compile_seconds", "max_device_gb"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise PlanError(f"{name} is {value:g}; it must be more than nothing")


@dataclass(frozen=True)
class Estimate:
    """What a plan takes: seconds of compiling, one after another, bytes on disk and on the device."""

    compile_s: float
    disk_bytes: int
    device_bytes: int


@dataclass(frozen=True)
class Size:
    """One row of the knee table: the best plan of so many buckets."""

    plan: Plan
    planned: Planned
    estimate: Estimate


@dataclass(frozen=True)
class Proposal:
    """The plan that is proposed, and all that was weighed.

    Args:
        chosen: what is proposed.
        bound: which limit, or what else, decided its size.
        baselines: other ladders by name.
        held_out: its cost on the half of the requests that it was not fitted to; None without requests.
        sizes: the best plan of each size.
        break_even: steps after which one more bucket has saved what compiling it takes; None if none is left.
        demand: what was planned for.
        assumptions: what costs rest on, a line each.
    """

    chosen: Size
    bound: str
    baselines: dict[str, Planned]
    held_out: float | None
    sizes: Sequence[Size]
    break_even: float | None
    demand: Demand
    assumptions: Sequence[str]

    def to_json(self) -> dict[str, Any]:
        """Return the proposal as plain JSON."""
        planned, estimate = self.chosen.planned, self.chosen.estimate
        return {
            "ladders": {step: list(ladder) for step, ladder in planned.ladders.items()},
            "bound": self.bound,
            "cost": planned.ratio,
            "waste": planned.waste,
            "baselines": {
                name: {"rungs": other.buckets, "cost": other.ratio, "waste": other.waste}
                for name, other in self.baselines.items()
            },
            "held_out": self.held_out,
            "compile_s": estimate.compile_s,
            "disk_bytes": estimate.disk_bytes,
            "device_bytes": estimate.device_bytes,
            "break_even_steps": self.break_even,
            "steps": self.demand.steps,
            "crops": self.demand.crops,
            "knee": [
                {"buckets": len(size.plan), "cost": size.planned.ratio, "waste": size.planned.waste}
                for size in self.sizes
            ],
            "assumptions": list(self.assumptions),
        }


def demand_of(choice: Choice, requests: Iterable[Request], strategy: str) -> Demand:
    """Return what requests ask of a model, whichever way a strategy generates."""
    M, way = choice.model.architecture.block_size, choice.strategy(strategy)
    piece = step_named("chunk").positions(Bucket(1, M, "chunk")) if way == "chunk" else 1
    return demand(requests, M, way, piece)


def propose(
    choice: Choice,
    asked: Demand,
    limits: Limits,
    *,
    strategy: str = "auto",
    batch: Iterable[int] = (1,),
    halves: tuple[Demand, Demand] | None = None,
) -> Proposal:
    """Return the best plan within limits.

    Args:
        choice: for which model and backend.
        asked: how often each step is asked for each length.
        limits: what it may take.
        strategy: how it generates.
        batch: batch sizes; each rung is built for all of them.
        halves: of the same demand, one to fit a ladder of the same size to and one to price it by.

    Raises:
        PlanError: not even the smallest plan is within the limits, or none has so little waste.
    """
    arch, backend, costs = choice.model.architecture, choice.compiler, costs_of(choice)
    way, sizes_of_batch = choice.strategy(strategy), sorted(set(batch))

    @functools.cache
    def cost(step: str, length: int) -> float:
        return costs(Bucket(1, length, step))

    lengths = backend.rungs(arch.block_size)
    planner = Planner(asked, cost, lengths)
    history = _History.of(choice)

    def size(planned: Planned) -> Size:
        buckets = [
            Bucket(B, n, step) for step, ladder in planned.ladders.items() for n in ladder for B in sizes_of_batch
        ]
        buckets += [Bucket(B, arch.block_size, step) for step in WAYS[way] for B in sizes_of_batch]
        plan = Plan(buckets).completed(arch.block_size)
        return Size(plan, planned, history.estimate(choice, plan))

    sizes = [size(planned) for planned in planner.plans()]
    chosen, bound = _within(sizes, limits)
    at, break_even = sizes.index(chosen), None
    if at + 1 < len(sizes):
        more = sizes[at + 1]
        saved = (chosen.planned.cost - more.planned.cost) / asked.steps
        seconds = more.estimate.compile_s - chosen.estimate.compile_s
        break_even = 1000 * seconds / saved if saved > 0 else None
    held_out = None
    if halves is not None:
        fitted = [p for p in Planner(halves[0], cost, lengths).plans() if p.buckets <= chosen.planned.buckets]
        if fitted and set(halves[1].weights) <= set(fitted[-1].ladders):
            held_out = Planner(halves[1], cost, lengths).of(fitted[-1].ladders).ratio
    assumptions = [*costs.said, history.said]
    usual = usual_ladders(asked, arch.block_size, chosen.planned.ladders)
    baselines = {name: planner.of(ladders) for name, ladders in usual.items()}
    return Proposal(chosen, bound, baselines, held_out, sizes, break_even, asked, assumptions)


def _within(sizes: Sequence[Size], limits: Limits) -> tuple[Size, str]:
    """Return the plan that limits allow, and which of them decided."""
    hard: list[tuple[str, float | None, list[float], str]] = [
        ("max-buckets", limits.max_buckets, [len(size.plan) for size in sizes], "{:.0f} buckets"),
        ("max-compile-seconds", limits.max_compile_seconds, [size.estimate.compile_s for size in sizes], "{:.0f} s"),
        ("max-device-gb", limits.max_device_gb, [size.estimate.device_bytes / 1e9 for size in sizes], "{:.3g} GB"),
    ]
    allowed, bound = len(sizes), "no further bucket saves anything"
    for name, most, takes, words in hard:
        if most is None:
            continue
        fitting = sum(take <= most for take in takes)
        if not fitting:
            raise PlanError(
                f"the smallest plan takes {words.format(takes[0])}, and --{name} allows {words.format(most)}",
                hint="raise the limit, or see --strategy and --batch",
            )
        if fitting < allowed:
            allowed, bound = fitting, name
    if limits.max_waste is not None:
        enough = next((n for n, size in enumerate(sizes) if size.planned.waste <= limits.max_waste), None)
        if enough is None:
            least = min(size.planned.waste for size in sizes)
            raise PlanError(f"no plan wastes {100 * limits.max_waste:.3g}% or less: the least is {least:.1%}")
        return (sizes[enough], "max-waste") if enough < allowed else (sizes[allowed - 1], bound)
    if all(most is None for _, most, _, _ in hard):
        return sizes[knee([size.planned for size in sizes])], f"a further bucket saves less than {WORTH:.0%}"
    return sizes[allowed - 1], bound


@dataclass(frozen=True)
class _History:
    """What a bucket of each step took where it was built, seconds and bytes: of the family's entries, or as usual."""

    taken: dict[str, tuple[float, float]]
    usual: tuple[float, float]
    built: int

    @classmethod
    def of(cls, choice: Choice) -> _History:
        backend, found = choice.compiler, dict[str, list[tuple[float, float]]]()
        manifests = []
        if not backend.inlines_weights:  # else the family is named by weights, which no plan should fetch
            with contextlib.suppress(BucketsError):  # nothing can be looked up where nothing could be built
                manifests = [m for m in map(manifest_of, choice.store.family(choice.family)) if m is not None]
        for manifest in manifests:
            seconds = manifest.stats.get("compile_ms", 1000 * backend.compile_s) / 1000
            found.setdefault(manifest.bucket.step if manifest.bucket else "", []).append((seconds, manifest.size))
        weights = choice.weights_bytes if backend.inlines_weights else 0
        medians = {
            step: (statistics.median(seconds for seconds, _ in each), statistics.median(size for _, size in each))
            for step, each in found.items()
        }
        return cls(medians, (backend.compile_s, backend.module_bytes + weights), len(manifests))

    def estimate(self, choice: Choice, plan: Plan) -> Estimate:
        seconds, sizes = zip(*(self.taken.get(bucket.step, self.usual) for bucket in plan), strict=True)
        return Estimate(sum(seconds), int(sum(sizes)), choice.device_bytes(plan))

    @property
    def said(self) -> str:
        if self.built:
            return f"compiling and sizes: medians of the {self.built} buckets of this family that are built"
        return f"compiling and sizes: {self.usual[0]:.0f} s and {self.usual[1] / 1e6:.1f} MB a bucket, as is usual"


# Buckets, and how many rows run in each.
Calls = Sequence[tuple[Bucket, int]]


@dataclass(frozen=True)
class Explained:
    """Where one step of some rows runs.

    Args:
        step: which.
        calls: the bucket of each call, and how many rows it runs; none where no bucket is so long.
        padded_tokens: positions computed in vain.
        cost: of all calls, ms.
        runner_up: the cheapest other calls for the same rows, which do without one of these buckets; maybe none.
        runner_up_cost: of all of those, ms.
    """

    step: str
    calls: Calls
    padded_tokens: int
    cost: float
    runner_up: Calls
    runner_up_cost: float


def explain(choice: Choice, buckets: Sequence[Bucket], length: int, rows: int) -> Iterator[Explained]:
    """Say for each step that the buckets have where rows of a length would run, and what comes next."""
    from nanogpt_buckets.run.dispatch import group

    costs, by = costs_of(choice), dispatch_cost(choice)
    length = min(length, choice.model.architecture.block_size)

    def calls_in(some: Sequence[Bucket]) -> Calls:
        if not any(bucket.holds(1, length) for bucket in some):
            return []
        return [(bucket, len(members)) for bucket, members in group([length] * rows, some, by)]

    def cost(calls: Calls) -> float:
        return sum(costs(bucket) for bucket, _ in calls)

    for step in sorted({bucket.step for bucket in buckets}):
        mine = [bucket for bucket in buckets if bucket.step == step]
        calls = calls_in(mine)
        without = [calls_in([bucket for bucket in mine if bucket != used]) for used in dict(calls)]
        second = min(filter(None, without), key=cost, default=[])
        padded = sum(bucket.batch_size * bucket.seq_len for bucket, _ in calls) - rows * length if calls else 0
        yield Explained(step, calls, padded, cost(calls), second, cost(second))
