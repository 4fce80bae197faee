"""Which buckets of ours are built and measured. Plain data: (batch_size, seq_len, step).

Each contestant of ours has a plan; the driver builds all of them and leaves them in the work folder for the others.
"""

from __future__ import annotations

import json
from pathlib import Path

Shape = tuple[int, int, str]
Name = tuple[str, str]  # a plan and a precision


def _grid(batch: tuple[int, ...], seq: tuple[int, ...], *steps: str) -> list[Shape]:
    return [(rows, length, step) for rows in batch for length in seq for step in steps]


def full() -> dict[Name, list[Shape]]:
    """Return the plans of a whole run."""
    prefill = _grid((1,), (16, 32, 64, 128, 192, 256, 320, 384, 448, 512, 768, 1024), "prefill")
    decode = _grid((1,), (64, 128, 256, 512, 1024), "decode") + _grid((8,), (256, 640), "decode")
    return {
        ("kv", "fp32"): prefill + decode + _grid((1,), (128, 256, 384, 512), "score"),
        ("kv", "bf16"): prefill + decode + _grid((1,), (128, 256, 384, 512), "score"),
        ("recompute", "fp32"): _grid((1,), (32, 128, 512, 1024), "recompute"),
        ("one shape", "fp32"): [(1, 1024, "recompute")],
    }


def quick() -> dict[Name, list[Shape]]:
    """Return fewer: what the measures of --quick need."""
    one = _grid((1,), (16, 128, 448), "prefill") + _grid((1,), (160, 448), "decode")
    return {
        ("kv", "fp32"): [*one, (8, 320, "decode"), (1, 256, "score")],
        ("kv", "bf16"): [(1, 128, "prefill"), (1, 160, "decode")],
        ("one shape", "fp32"): [(1, 1024, "recompute")],
    }


def tiny() -> dict[Name, list[Shape]]:
    """Return those of a model of 128 positions."""
    steps = _grid((1, 8), (32, 128), "prefill", "decode", "score")
    return {
        ("kv", "fp32"): steps,
        ("kv", "bf16"): steps,
        ("recompute", "fp32"): _grid((1,), (32, 128), "recompute"),
        ("one shape", "fp32"): [(1, 128, "recompute")],
    }


PLANS = {"full": full, "quick": quick, "tiny": tiny}


def save(work: Path, plans: dict[Name, list[Shape]]) -> None:
    """Leave plans for the contestants."""
    rows = [{"plan": plan, "precision": precision, "buckets": found} for (plan, precision), found in plans.items()]
    (work / "plans.json").write_text(json.dumps(rows))


def load(work: Path) -> dict[Name, list[Shape]]:
    """Return what was left."""
    rows = json.loads((work / "plans.json").read_text())
    return {(row["plan"], row["precision"]): [tuple(shape) for shape in row["buckets"]] for row in rows}
