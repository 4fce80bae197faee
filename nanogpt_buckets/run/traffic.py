"""What runs on this node asked of each model: how often each step met which length, and which buckets ran.

Counts only, never text or tokens; summed over runs, one record for each model as it was run. For `report`, which says
what another ladder would have saved, and for `plan --from-report`. Imports no torch. Knows nothing of costs.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from typing import Any

from nanogpt_buckets import key
from nanogpt_buckets.choice import Choice
from nanogpt_buckets.errors import BucketsError, CorruptEntry
from nanogpt_buckets.model.architecture import Architecture
from nanogpt_buckets.node.records import TRAFFIC, Record, alone
from nanogpt_buckets.plan.bucket import Bucket
from nanogpt_buckets.plan.traffic import Demand
from nanogpt_buckets.run.report import Report
from nanogpt_buckets.settings import records_runs

# Lengths that are told apart; of longer models they are rounded up, so that a record stays small.
_MOST_LENGTHS = 1024


def keep_traffic(choice: Choice, report: Report) -> None:
    """Add what a run asked to what is known of this model, if that can be written and is wanted; never fails."""
    if choice.backend is None or not records_runs():
        return
    what = {
        "model": choice.model.name,
        "architecture": choice.model.architecture.to_json(),
        "backend": choice.backend.name,
        "dtype": choice.dtype,
        "target": choice.target,
    }
    name = key.digest(what)
    with alone(TRAFFIC.folder, ".lock"):
        before: Record | None = None
        with contextlib.suppress(BucketsError):  # nor can it be written then
            before = TRAFFIC.find(name)
        before = before or what | {"runs": 0, "since": int(time.time()), "crops": 0, "calls": {}, "ran": {}}
        TRAFFIC.keep(name, _added(before, report, choice.model.architecture.block_size))


def _added(before: Record, report: Report, block_size: int) -> Record:
    apart = -(-block_size // _MOST_LENGTHS)
    calls = {shape: dict(lengths) for shape, lengths in before["calls"].items()}
    for (step, batch_size), asked in report.asked.items():
        lengths = calls.setdefault(f"{step} {batch_size}", {})
        for length, times in asked.items():
            rounded = str(min(-(-length // apart) * apart, block_size))
            lengths[rounded] = lengths.get(rounded, 0) + times
    ran = dict(before["ran"])
    for bucket, count in report.buckets.items():
        name = f"{bucket.step} {bucket.batch_size} {bucket.seq_len}"
        ran[name] = ran.get(name, 0) + count.steps
    sums = {"runs": before["runs"] + 1, "crops": before["crops"] + report.crops}
    return {**before, **sums, "calls": calls, "ran": ran}


def recorded() -> list[Record]:
    """Return what is recorded of each model as it was run, the latest first."""
    found = [(path.stat().st_mtime, record) for path, record, _ in TRAFFIC.each() if record is not None]
    return [record for _, record in sorted(found, key=lambda row: row[0], reverse=True)]


def traffic_of(choice: Choice) -> Record:
    """Return what is recorded of a model as it is chosen; a BucketsError if that is nothing, or of another model."""
    mine = [r for r in recorded() if r["model"] == choice.model.name]
    if not mine:
        others = ", ".join(sorted({r["model"] for r in recorded()})) or "nothing"
        raise BucketsError(f"no run of {choice.model.name} is recorded on this node", hint=f"recorded: {others}")
    same = [r for r in mine if r["architecture"] == choice.model.architecture.to_json()]
    if not same:
        said = f"what is recorded of {choice.model.name} was asked of another model of that name"
        raise BucketsError(said, hint="run this one first, or give --lengths")
    return next((r for r in same if (r["backend"], r["dtype"]) == (choice.backend_name, choice.dtype)), same[0])


def calls_of(record: Mapping[str, Any]) -> dict[tuple[str, int], list[float]]:
    """Return how often each step met each length, from 0 to block_size, by step and batch size; a CacheError if odd."""
    try:
        block_size = Architecture.from_json(dict(record["architecture"])).block_size
        found: dict[tuple[str, int], list[float]] = {}
        for shape, lengths in record["calls"].items():
            step, batch_size = shape.split()
            weights = found.setdefault(
                (step, Bucket(int(batch_size), block_size, step).batch_size), [0.0] * (block_size + 1)
            )
            for length, times in lengths.items():
                weights[int(length)] += times
    except (BucketsError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise CorruptEntry("what is recorded of runs cannot be understood", hint="delete it, and run again") from error
    return found


def demand_recorded(record: Mapping[str, Any]) -> Demand:
    """Return the demand of all recorded runs: a call of some rows counts as often as it has rows."""
    weights: dict[str, list[float]] = {}
    for (step, batch_size), asked in calls_of(record).items():
        mine = weights.setdefault(step, [0.0] * len(asked))
        for length, times in enumerate(asked):
            mine[length] += batch_size * times
    return Demand(weights, record["crops"])
