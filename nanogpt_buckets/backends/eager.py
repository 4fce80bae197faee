"""The uncompiled step: the baseline to measure against and the oracle to compare with.

Every shape runs at once, so nothing is compiled or cached. Knows nothing of buckets beyond checking their shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from nanogpt_buckets.backends.base import Artifact, Backend, BuildRequest, Executable, step_contract
from nanogpt_buckets.contract import check_inputs, check_weights
from nanogpt_buckets.errors import UsageError
from nanogpt_buckets.model.architecture import Architecture
from nanogpt_buckets.plan.bucket import Bucket

if TYPE_CHECKING:
    from torch import Tensor, nn


class EagerBackend(Backend):
    """See `Backend`."""

    name = "eager"
    compiles = False
    sources = ("backends/eager.py",)

    def runtime(self) -> dict[str, str]:
        """Return the torch version."""
        return {"torch": version("torch")}

    def lowering(self) -> dict[str, str]:
        """Return the default lowering."""
        return {"attention": "sdpa"}

    def target(self, requested: str | None) -> str:
        """Return "host"; there is nothing to choose.

        Raises:
            UsageError: a target was asked for.
        """
        if requested is not None:
            raise UsageError("the eager backend builds for no target", hint="leave --target out")
        return "host"

    def compiler(self) -> dict[str, str] | None:
        """Return None: nothing is compiled."""
        return None

    def compile(self, request: BuildRequest, workdir: Path) -> Artifact:
        """Refuse.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            "the eager backend compiles nothing, so there is nothing to build",
            hint="use it to run: nanogpt-buckets generate --backend eager",
        )

    def load(self, artifact: Artifact, weights: Mapping[str, Tensor]) -> Executable:
        """Refuse: there are no entries of this backend.

        Raises:
            UsageError: always.
        """
        raise UsageError("the eager backend has no cache entries to load")

    def run_eagerly(self, arch: Architecture, bucket: Bucket, weights: Mapping[str, Tensor]) -> Executable:
        """Return the plain step for this bucket, with the same checks as a compiled one."""
        from nanogpt_buckets.model.gpt import from_weights
        from nanogpt_buckets.steps import NeuronStep

        return EagerExecutable(NeuronStep(from_weights(arch, weights)), bucket, weights)


class EagerExecutable:
    """A plain step that accepts exactly one bucket's shape.

    Args:
        step: a step module in eval mode.
        bucket: the only shape accepted.
        weights: the tensors the step was made of, checked against its own contract.
    """

    def __init__(self, step: nn.Module, bucket: Bucket, weights: Mapping[str, Tensor]) -> None:
        self._step = step
        self._inputs, contracts = step_contract(step, bucket)
        self._vocab_size = int(weights["transformer.wte.weight"].shape[0])
        check_weights(contracts, weights)

    def __call__(self, input_ids: Tensor, last_index: Tensor) -> Tensor:
        """Run the step; see `Executable`."""
        import torch

        check_inputs(self._inputs, input_ids, last_index, self._vocab_size)
        with torch.inference_mode():
            logits: Tensor = self._step(input_ids, last_index)
        return logits

    def close(self) -> None:
        """Nothing is held."""
