"""Regret: what recorded runs cost, over what the ladder would have cost that `plan` proposes for just such runs.

Imports no torch. Knows nothing of terminals, nor of where records are.
"""

from __future__ import annotations

import functools
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nanogpt_buckets.backends import backend_for
from nanogpt_buckets.costs import costs_for
from nanogpt_buckets.model.architecture import Architecture
from nanogpt_buckets.plan.bucket import Bucket
from nanogpt_buckets.plan.planner import Planner, knee
from nanogpt_buckets.plan.traffic import Demand
from nanogpt_buckets.run.traffic import calls_of


@dataclass(frozen=True)
class Regret:
    """What recorded runs cost, over what the ladder would have cost that is proposed for the same lengths.

    Args:
        ratio: 1 where nothing is to be gained; below, where more buckets than are proposed have run.
        waste: which share of positions was padding, 0 to 1.
        best: that ladder, by step and batch size.
        command: what plans and builds it.
    """

    ratio: float
    waste: float
    best: dict[str, tuple[int, ...]]
    command: str

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON; `saves` is the share of the cost that the command saves."""
        best = {name: list(ladder) for name, ladder in self.best.items()}
        saves = 1 - 1 / self.ratio
        return {"ratio": self.ratio, "saves": saves, "waste": self.waste, "best": best, "command": self.command}


def regret_of(record: Mapping[str, Any]) -> Regret:
    """Return the regret of a model's recorded runs; a CacheError if the record makes no sense."""
    calls = {f"{step} {B}": ((step, B), asked) for (step, B), asked in calls_of(record).items()}
    arch = Architecture.from_json(dict(record["architecture"]))
    M, backend = arch.block_size, backend_for(record["backend"], record["target"])
    costs = costs_for(backend, arch, record["dtype"], record["target"])

    @functools.cache
    def cost(shape: str, length: int) -> float:
        step, B = calls[shape][0]
        return costs(Bucket(B, length, step))

    ran: dict[str, dict[int, int]] = {}
    for name, times in record["ran"].items():
        step, B, length = name.split()
        ran.setdefault(f"{step} {B}", {})[int(length)] = times
    spent = sum(times * cost(shape, length) for shape, own in ran.items() for length, times in own.items())
    given = sum(times * length for own in ran.values() for length, times in own.items())
    asked = Demand({shape: weights for shape, (_, weights) in calls.items()})
    real = sum(n * weight for weights in asked.weights.values() for n, weight in enumerate(weights))
    plans = list(Planner(asked, cost, backend.rungs(M)).plans(smooth=False))
    best = plans[knee(plans)]
    sizes = sorted({B for (_, B), _ in calls.values()})
    batch = "" if sizes == [1] else f" --batch {','.join(map(str, sizes))}"
    options = f"--model {shlex.quote(record['model'])}" + (
        f" --dtype {record['dtype']}" if record["dtype"] != "float32" else ""
    )
    options += "" if record["target"] is None else f" --target {record['target']}"
    command = (
        f"nanogpt-buckets plan --from-report {options}{batch} --save plan.json && "
        f"nanogpt-buckets build {options} --plan plan.json"
    )
    return Regret(spent / best.cost, 1 - real / given, dict(best.ladders), command)
