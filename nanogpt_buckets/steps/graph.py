"""A step over a network as one module: what compilers are given. Knows nothing of any step or compiler."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nanogpt_buckets.model.gpt import GPT

if TYPE_CHECKING:
    from nanogpt_buckets.steps.step import Step

_PREFIX = "gpt."


class Graph(nn.Module):
    """A step's forward pass over one network.

    Args:
        step: what is computed.
        gpt: the network; its parameters are the module's only ones.
    """

    def __init__(self, step: Step, gpt: GPT) -> None:
        super().__init__()
        self.step = step
        self.gpt = gpt

    def forward(self, *tensors: Tensor) -> Any:
        """Return what the step returns; see its interface."""
        return self.step.forward(self.gpt, *tensors)

    def run(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run it once without gradients and return its outputs as a tuple, as a compiled step does."""
        with torch.inference_mode():
            made = self(*tensors)
        return made if isinstance(made, tuple) else (made,)


def canonical_name(parameter: str) -> str:
    """Return the name under which checkpoints know a graph's parameter: the graph's own prefix removed."""
    return parameter.removeprefix(_PREFIX)
