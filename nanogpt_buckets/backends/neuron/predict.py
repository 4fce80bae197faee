"""What a call of a bucket should take on a NeuronCore, from published numbers alone: to plan by, until it is measured.

A call reads every weight once, reads and writes all that is remembered, multiplies, and has a fixed cost; the slower of
memory and arithmetic counts. Knows nothing of what is installed or built. Proof level N0: nothing here was measured.

Source: AWS Neuron documentation, Trainium, Trainium2 and Trainium3 architecture (SDK 2.28 to 2.29): bandwidth and
TFLOP/s of a chip, here of one core as programs see it, two on trn1 and inf2 and four on trn2 and trn3; 0.44 ms of host
time a call as measured by AWS (vLLM on Neuron, asynchronous execution) and about 1 ms in reports of users.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from nanogpt_buckets.backends.neuron import device
from nanogpt_buckets.errors import UsageError
from nanogpt_buckets.model.architecture import Architecture
from nanogpt_buckets.plan.bucket import Bucket
from nanogpt_buckets.steps import step_named

_ITEM_BYTES = {"float32": 4, "bfloat16": 2}
# At the least and at the most, ms.
_CALL_MS = (0.4, 1.0)


@dataclass(frozen=True)
class Core:
    """One core as programs see it, with the other half of a pair where two are one."""

    gb_per_s: float
    tflops: dict[str, float]


_CORES = {
    "trn1": Core(820 / 2, {"float32": 47.5 / 2, "bfloat16": 190 / 2}),
    "trn2": Core(2900 / 4, {"float32": 181 / 4, "bfloat16": 667 / 4}),
    "trn3": Core(4900 / 4, {"float32": 183 / 4, "bfloat16": 671 / 4}),
}


@dataclass(frozen=True)
class Prediction:
    """One bucket: bytes that a call moves, its multiply-adds, and ms, at the least and at the most."""

    bucket: Bucket
    moved_bytes: int
    macs: int
    call_ms: tuple[float, float]
    token_ms: tuple[float, float]
    bound: str

    def to_json(self) -> dict[str, Any]:
        """Return the prediction as plain JSON."""
        return self.bucket.to_json() | {name: value for name, value in asdict(self).items() if name != "bucket"}


def predict(arch: Architecture, dtype: str, target: str, buckets: Iterable[Bucket]) -> list[Prediction]:
    """Predict what calls of buckets take; a UsageError if the target's numbers are not known."""
    core = _core(target)
    return [_of(arch, dtype, core, bucket) for bucket in buckets]


def assumptions(dtype: str, target: str) -> list[str]:
    """Say, a line each, what predictions for a target rest on."""
    core = _core(target)
    return [
        f"one {target} core reads {core.gb_per_s:.0f} GB/s and computes {core.tflops[dtype]:.1f} TFLOP/s in {dtype}, "
        "as AWS publishes; no step reaches either in full",
        "a call reads every weight once; chunk also reads and writes keys and values of all positions",
        f"a call costs {_CALL_MS[0]} to {_CALL_MS[1]} ms whatever it does, as AWS and users report",
        "token: of one call all of whose rows gain one; a prompt takes one call for every 64 tokens with chunk",
        "weights that are inputs were reported to make a call 1.5 times slower than weights compiled in, which is not "
        "in these numbers (aws-neuron-sdk issue 905)",
        "nothing here was measured: scripts/check-on-device measures it",
    ]


def _core(target: str) -> Core:
    core = _CORES.get(device.canonical(target) or "")
    if core is None:
        raise UsageError(f"nothing is predicted for {target}", hint=f"targets: {', '.join(device.TARGETS)}")
    return core


def _of(arch: Architecture, dtype: str, core: Core, bucket: Bucket) -> Prediction:
    step = step_named(bucket.step)
    state = sum(math.prod(view.shape) for view in step.interface(arch, bucket, dtype).state)
    moved = _ITEM_BYTES[dtype] * (arch.n_params + 2 * state)
    macs = step.macs(arch, bucket)
    memory_ms, compute_ms = moved / core.gb_per_s / 1e6, 2 * macs / core.tflops[dtype] / 1e9
    least, most = (max(memory_ms, compute_ms) + fixed for fixed in _CALL_MS)
    B = bucket.batch_size
    bound = "memory" if memory_ms >= compute_ms else "arithmetic"
    return Prediction(bucket, moved, macs, (least, most), (least / B, most / B), bound)
