"""What the machine can do at best: memory read at once by all cores, matrix products in float32 and bfloat16.

    python -m peers.limits MEGABYTES SIDE...        from scripts/; prints one JSON document

A decode step reads every weight, so it cannot be faster than their bytes over the bandwidth (MBU is the share reached);
a long prompt computes, so it cannot be faster than its operations over the peak (MFU).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable


def best(amount: float, call: Callable[[], object], runs: int = 7) -> float:
    """Return how much a second gets done at best, if the call does this amount; the first call warms up."""
    taken = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return amount / min(taken[1:])


def measure(megabytes: int, sides: list[int]) -> dict[str, float]:
    """Return GB/s and GFLOP/s."""
    import torch

    found: dict[str, float] = {}
    source = torch.rand(8, megabytes * 1_000_000 // 32)
    # one sum reads at one place for each core, eight at several at once, which memory may deliver faster
    found["read_gb_s"] = max(best(megabytes / 1e3, read) for read in (source.sum, lambda: source.sum(1)))
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        for side in sides:
            a, b = (torch.rand(side, side).to(dtype) for _ in range(2))
            operations = 2 * side**3 / 1e9
            ways: dict[str, Callable[[], object]] = {
                "default": lambda a=a, b=b: torch.mm(a, b),
                "oneDNN": lambda a=a, b=b: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""),
            }
            for way, call in ways.items():
                key = f"{name} {way} gflops"
                found[key] = max(found.get(key, 0.0), best(operations, call, 3))
        found[f"{name} gflops"] = max(found[f"{name} default gflops"], found[f"{name} oneDNN gflops"])
    return found


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]), [int(side) for side in sys.argv[2:]])))
