"""What gets compiled: one file per step, found by its name. Imports no torch."""

from __future__ import annotations

from nanogpt_buckets.steps.chunk import Chunk
from nanogpt_buckets.steps.decode import Decode
from nanogpt_buckets.steps.prefill import Prefill
from nanogpt_buckets.steps.recompute import Recompute
from nanogpt_buckets.steps.score import Score
from nanogpt_buckets.steps.step import Step

_STEPS: dict[str, Step] = {step.name: step for step in (Recompute(), Prefill(), Decode(), Score(), Chunk())}


def step_named(name: str) -> Step:
    """Return the step that buckets call so; a `Bucket` exists only for names that are here."""
    return _STEPS[name]
