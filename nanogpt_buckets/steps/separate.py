"""A step as a function of all that it computes with: a call's inputs, then the weights, then the state.

So what is compiled holds no weights, and one build serves every fine-tune. What a graph would not read is refused, for
the compiler would leave it out, and the inputs would no longer be these. Hashed into the families of such buckets.

Knows nothing of the compiler, of loading or of the store. Proof level N2: lowered by the real torch-xla.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from nanogpt_buckets.contract import Contract
from nanogpt_buckets.errors import CompileFailed
from nanogpt_buckets.model.architecture import Architecture
from nanogpt_buckets.model.gpt import GPT, Lowering
from nanogpt_buckets.plan.bucket import Bucket
from nanogpt_buckets.steps import step_named
from nanogpt_buckets.steps.graph import Graph, canonical_name

_ATEN = torch.ops.aten
# What these make depends on no value of what they are given.
_OF_SHAPE = {
    _ATEN.zeros_like.default, _ATEN.ones_like.default, _ATEN.full_like.default, _ATEN.empty_like.default,
    _ATEN.new_zeros.default, _ATEN.new_ones.default, _ATEN.new_full.default, _ATEN.new_empty.default,
}  # fmt: skip


class Separate(nn.Module):
    """A graph without parameters of its own.

    Args:
        graph: whose values do not matter, only names and shapes.
        inputs: how many a call has.
    """

    def __init__(self, graph: Graph, inputs: int) -> None:
        super().__init__()
        self._graph = [graph]  # out of the compiler's sight: it has no weights of its own
        self._inputs = inputs
        self._names = [name for name, _ in graph.named_parameters()]

    def forward(self, *tensors: Tensor) -> Any:
        """Return what the step returns."""
        state = self._inputs + len(self._names)
        weights = dict(zip(self._names, tensors[self._inputs : state], strict=True))
        return functional_call(self._graph[0], weights, (*tensors[: self._inputs], *tensors[state:]))


def graph_without_weights(
    arch: Architecture, bucket: Bucket, lowering: Mapping[str, str], dtype: str
) -> tuple[Separate, tuple[Tensor, ...], tuple[Contract, ...]]:
    """Return the step as a function of inputs, weights and state, zeros for all of these, and what weights must be.

    Raises:
        CompileFailed: it would not read one of them, and the compiler would leave that out.
    """
    step = step_named(bucket.step)
    with torch.device("meta"):
        graph = step.within(bucket).graph(GPT(arch, Lowering(lowering["attention"]))).eval()
    weights = tuple(Contract(canonical_name(n), dtype, tuple(p.shape)) for n, p in graph.named_parameters())
    interface = step.interface(arch, bucket, dtype)
    given = (*interface.inputs, *weights, *interface.state)
    separate = Separate(graph, len(interface.inputs))
    for name in _unread(separate, given):
        raise CompileFailed(f"bucket {bucket} would not read {name}, and the compiler would leave it out")
    return separate, tuple(torch.zeros(c.shape, dtype=getattr(torch, c.dtype)) for c in given), weights


def _unread(graph: nn.Module, given: Sequence[Contract]) -> list[str]:
    """Return the names of what nothing that comes out depends on."""
    tensors = [torch.zeros(c.shape, dtype=getattr(torch, c.dtype), device="meta") for c in given]
    with torch.no_grad():
        traced = make_fx(graph, tracing_mode="fake")(*tensors)
    waiting, read = [node for node in traced.graph.nodes if node.op == "output"], set[object]()
    while waiting:
        node = waiting.pop()
        if node not in read:
            read.add(node)
            waiting += () if node.target in _OF_SHAPE else node.all_input_nodes
    placeholders = [node for node in traced.graph.nodes if node.op == "placeholder"]
    return [c.name for c, node in zip(given, placeholders, strict=True) if node not in read]
