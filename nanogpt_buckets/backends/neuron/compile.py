"""torch_neuronx.trace: one step with its weights, one shape -> one TorchScript file. Hashed into every family.

Knows nothing of the store, of plans, of loading or of the gate. torch and torch_neuronx are imported inside functions.
Proof level N1: trace, by a test double. N2: the graph, lowered by the real torch-xla. Not N3: by no real compiler.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from nanogpt_buckets.backends.neuron.package import package, quiet
from nanogpt_buckets.model.architecture import Architecture
from nanogpt_buckets.plan.bucket import Bucket
from nanogpt_buckets.steps import step_named

if TYPE_CHECKING:
    from torch import Tensor, nn

    from nanogpt_buckets.steps.graph import Graph


def graph_with_weights(
    arch: Architecture, bucket: Bucket, lowering: Mapping[str, str], path: str
) -> tuple[Graph, tuple[Tensor, ...]]:
    """Return the step over the weights of a prepared file, and inputs of zeros."""
    import safetensors.torch

    from nanogpt_buckets.model.gpt import Lowering, from_weights

    step = step_named(bucket.step)
    weights = safetensors.torch.load_file(path)
    return step.graph(from_weights(arch, weights, Lowering(lowering["attention"]))).eval(), step.pack([], bucket)


def trace(
    graph: nn.Module, inputs: tuple[Tensor, ...], arguments: Sequence[str], workdir: Path, *, on_device: bool
) -> bytes:
    """Trace once and return the bytes of the module's file; without `on_device` no core is needed.

    Raises:
        BackendUnavailable: torch_neuronx cannot be imported, or has no trace.
        RuntimeError: whatever goes wrong, as torch_neuronx says it.
    """
    import torch

    torch_neuronx = package()
    # what is traced need not take a core here: the gate loads what was saved
    idle = getattr(torch_neuronx.contexts, "disable_nrt_load", nullcontext)
    buffer = io.BytesIO()
    with torch.no_grad(), quiet(), idle():
        module = torch_neuronx.trace(
            graph,
            inputs,
            compiler_workdir=str(workdir),
            compiler_args=list(arguments),
            cpu_backend=not on_device,
        )
        torch.jit.save(module, buffer)
    return buffer.getvalue()
