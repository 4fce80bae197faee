"""The best ladder for a demand: exact, by dynamic programming, and what it costs beside others.

A row of length l runs in the shortest rung that holds it. With P(j) the weight of all lengths up to candidate x_j, and
c what a call costs,

    D[k][j] = min over i < j of D[k-1][i] + (P(j) - P(i)) * c(x_j),

is the least cost of all those in k rungs of which x_j is the last. For costs that never fall it is convex in k, so
every further rung saves less than the one before; rungs of several steps are then dealt out by what each saves.

Knows nothing of models, of what a call costs, or where a demand is from.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from nanogpt_buckets.plan.traffic import Demand, smoothed

# What a row of some length costs in a step, at exactly that length: ms.
Cost = Callable[[str, int], float]
Ladders = Mapping[str, tuple[int, ...]]
# Without a limit a rung is added while it saves so much of the cost.
WORTH = 0.02
# Ladders that others take.
MAX_ONLY, POWERS_OF_TWO, PERCENTILES = "max only", "powers of two", "percentiles 25, 50, 75, 95"
# More rungs than these save next to nothing.
MOST_RUNGS = 24


def best_ladders(weights: Sequence[float], costs: Sequence[float], lengths: Sequence[int]) -> list[tuple[int, ...]]:
    """Return the cheapest ladder of one rung, of two, and so on, for as long as a further one saves anything.

    Args:
        weights: how often each length is asked for, from 0 on.
        costs: of a call at each of `lengths`, never falling.
        lengths: where rungs may be, rising; the last is in every ladder.
    """
    below = [sum(weights[: length + 1]) for length in lengths]
    used = [j for j in range(len(lengths)) if below[j] > (below[j - 1] if j else 0) or j == len(lengths) - 1]
    P = [0.0, *(below[j] for j in used)]
    c = [0.0, *(costs[j] for j in used)]
    n = len(used)
    best = [0.0, *(P[j] * c[j] for j in range(1, n + 1))]
    came: list[list[int]] = [[0] * (n + 1)]
    made: list[tuple[int, ...]] = [(lengths[-1],)]
    for k in range(2, min(n, MOST_RUNGS) + 1):
        now, origin = list(best), [0] * (n + 1)
        for j in range(k, n + 1):
            now[j], origin[j] = min((best[i] + (P[j] - P[i]) * c[j], i) for i in range(k - 1, j))
        if not now[n] < best[n]:
            break
        best = now
        came.append(origin)
        rungs, j = [], n
        for level in range(k - 1, -1, -1):
            rungs.append(lengths[used[j - 1]])
            j = came[level][j]
        made.append(tuple(reversed(rungs)))
    return made


def priced(demand: Demand, ladders: Ladders, cost: Cost) -> float:
    """Return what a demand costs in ladders, one for each step: ms."""
    total = 0.0
    for step, weights in demand.weights.items():
        price = {rung: cost(step, rung) for rung in ladders[step]}
        total += sum(w * price[rung_of(n, ladders[step])] for n, w in enumerate(weights) if w)
    return total


def unpadded(demand: Demand, cost: Cost) -> float:
    """Return what a demand would cost with a bucket for every length: ms."""
    return sum(w * cost(step, n) for step, weights in demand.weights.items() for n, w in enumerate(weights) if w)


def waste(demand: Demand, ladders: Ladders) -> float:
    """Return which share of positions would be padding, 0 to 1."""
    real = given = 0.0
    for step, weights in demand.weights.items():
        for n, w in enumerate(weights):
            real += w * n
            given += w * rung_of(n, ladders[step]) if w else 0
    return 1 - real / given


def rung_of(length: int, ladder: Sequence[int]) -> int:
    """Return the shortest rung that holds a length."""
    return ladder[bisect_left(ladder, length)]


@dataclass(frozen=True)
class Planned:
    """Ladders for all steps, and what they are predicted to cost, in ms and against no padding at all."""

    ladders: Ladders
    cost: float
    ratio: float
    waste: float

    @property
    def buckets(self) -> int:
        """How many rungs there are, of all steps together."""
        return sum(map(len, self.ladders.values()))


class Planner:
    """All the best plans for a demand, from the smallest on."""

    def __init__(self, demand: Demand, cost: Cost, lengths: Sequence[int]) -> None:
        """Prepare to plan for a demand; rungs may be at `lengths`, rising, of which the last is block_size."""
        self.demand, self._lengths = demand, lengths
        self.block_size = block_size = lengths[-1]
        # what a shorter bucket would cost more, the longer one does as well
        floors: dict[str, list[float]] = {}
        for step in demand.weights:
            each = [cost(step, n) for n in range(1, block_size + 1)]
            for n in range(block_size - 2, -1, -1):
                each[n] = min(each[n], each[n + 1])
            floors[step] = each
        self.cost: Cost = lambda step, length: floors[step][length - 1]
        self.unpadded = unpadded(demand, self.cost)

    def of(self, ladders: Ladders) -> Planned:
        """Return what given ladders cost."""
        cost = priced(self.demand, ladders, self.cost)
        return Planned(ladders, cost, cost / self.unpadded, waste(self.demand, ladders))

    def plans(self, demand: Demand | None = None, *, smooth: bool = True) -> Iterator[Planned]:
        """Yield the best plan of each size, priced by what was asked for; `demand` may be another one to fit to."""
        fitted = (demand or self.demand).weights
        curves: dict[str, list[tuple[int, ...]]] = {}
        prices: dict[str, list[float]] = {}
        for step in self.demand.weights:
            weights = fitted.get(step, [0.0] * (self.block_size + 1))
            only_last = not any(weights[: self.block_size])  # all there is to recompute is what was cropped
            weights = smoothed(weights, self._lengths[0]) if smooth and not only_last else weights
            costs = [self.cost(step, length) for length in self._lengths]
            curves[step] = best_ladders(weights, costs, self._lengths)
            prices[step] = [priced(Demand({step: weights}), {step: rungs}, self.cost) for rungs in curves[step]]
        at = dict.fromkeys(curves, 0)
        while True:
            yield self.of({step: curves[step][k] for step, k in at.items()})
            left = [step for step, k in at.items() if k + 1 < len(curves[step])]
            if not left or sum(at.values()) + len(at) >= MOST_RUNGS:
                return
            at[max(left, key=lambda step: prices[step][at[step]] - prices[step][at[step] + 1])] += 1


def knee(plans: Sequence[Planned]) -> int:
    """Return the index of the first plan to which one more rung adds less than it is worth."""
    saved = ((a.cost - b.cost) / a.cost for a, b in pairwise(plans))
    return next((n for n, share in enumerate(saved) if share < WORTH), len(plans) - 1)


def usual_ladders(demand: Demand, block_size: int, ladders: Ladders) -> dict[str, Ladders]:
    """Return what others take, by name, with as many rungs for each step as `ladders` have; percentiles are five."""
    return {
        MAX_ONLY: dict.fromkeys(ladders, (block_size,)),
        POWERS_OF_TWO: {step: powers_of_two(block_size, len(ladder)) for step, ladder in ladders.items()},
        PERCENTILES: {step: percentiles(demand.weights[step], block_size) for step in ladders},
    }


def powers_of_two(block_size: int, rungs: int) -> tuple[int, ...]:
    """Return the usual ladder of so many rungs: halves of block_size."""
    return tuple(sorted({max(1, block_size >> k) for k in range(rungs)}))


def percentiles(
    weights: Sequence[float], block_size: int, shares: Sequence[float] = (0.25, 0.5, 0.75, 0.95)
) -> tuple[int, ...]:
    """Return rungs at shares of the weight, and block_size."""
    total, so_far, rungs = sum(weights), 0.0, {block_size}
    left = list(shares)
    for n, weight in enumerate(weights):
        so_far += weight
        while left and so_far >= left[0] * total:
            rungs.add(max(1, n))
            left.pop(0)
    return tuple(sorted(rungs))
