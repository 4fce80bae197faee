"""torch_neuronx.trace: one step with its weights, one shape -> one TorchScript file. Hashed into every family.

Knows nothing of the store, of plans, of loading or of the gate. torch and torch_neuronx are imported inside functions.
Proof level N1: run against a test double; N2: the step's lowering by real torch-xla; never on a device.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanogpt_buckets.backends.neuron import device
from nanogpt_buckets.backends.neuron.library import UNAVAILABLE, last_line, library, not_initialised, quiet
from nanogpt_buckets.errors import CompileFailed
from nanogpt_buckets.model.architecture import Architecture
from nanogpt_buckets.plan.bucket import Bucket
from nanogpt_buckets.steps import step_named

if TYPE_CHECKING:
    from torch import Tensor, nn

    from nanogpt_buckets.steps.graph import Graph

# The compiler's own error, which at times is a passing one (aws-neuron-sdk issue 1369).
_COMPILER_ERROR = 70
_KILLED = -9


def graph_with_weights(
    arch: Architecture, bucket: Bucket, lowering: Mapping[str, str], path: str
) -> tuple[Graph, tuple[Tensor, ...]]:
    """Return the step over the weights of a prepared file, and inputs of zeros."""
    import safetensors.torch

    from nanogpt_buckets.model.gpt import Lowering, from_weights

    step = step_named(bucket.step)
    weights = safetensors.torch.load_file(path)
    return step.graph(from_weights(arch, weights, Lowering(**lowering))).eval(), step.pack([], bucket)


def trace(graph: nn.Module, inputs: tuple[Tensor, ...], arguments: Sequence[str], workdir: Path) -> Any:
    """Trace once, and once more if the compiler's error may have been a passing one.

    Raises:
        BackendUnavailable: torch_neuronx cannot be imported, has no trace, or its runtime does not start.
        CompileFailed: the compiler ended with an error, twice if the error may have been a passing one.
    """
    for attempt in ("first", "second"):
        try:
            return _trace_once(graph, inputs, arguments, workdir / f"neuron-{attempt}")
        except RuntimeError as error:
            if UNAVAILABLE in str(error):
                raise not_initialised() from error
            status = _status(error)
            if status == _COMPILER_ERROR and attempt == "first":
                continue
            raise _compile_failed(error, status) from error
    raise AssertionError


def _trace_once(graph: nn.Module, inputs: tuple[Tensor, ...], arguments: Sequence[str], workdir: Path) -> Any:
    import torch

    torch_neuronx = library()
    # what is traced need not take a core here: the gate loads what was saved
    idle = getattr(torch_neuronx.contexts, "disable_nrt_load", nullcontext)
    with torch.no_grad(), quiet(), idle():
        return torch_neuronx.trace(
            graph,
            inputs,
            compiler_workdir=str(workdir),
            compiler_args=list(arguments),
            cpu_backend=device.find() is None,
        )


def _status(error: RuntimeError) -> int | None:
    """Return the compiler's exit status, which trace tells in words only."""
    found = re.search(r"neuronx-cc failed with (-?\d+)", str(error))
    return int(found[1]) if found else None


def _compile_failed(error: RuntimeError, status: int | None) -> CompileFailed:
    if status == _KILLED:
        return CompileFailed("neuronx-cc was killed, most likely for want of memory", hint="try fewer --jobs")
    if status is not None:
        what = "twice with its error" if status == _COMPILER_ERROR else "with"
        return CompileFailed(f"neuronx-cc ended {what} {status}", hint="-v shows what it said last")
    return CompileFailed(f"torch_neuronx.trace failed: {last_line(error)}", hint="-v shows what it said last")


def saved(module: Any) -> bytes:
    """Return the bytes of a traced module's file."""
    import torch

    buffer = io.BytesIO()
    with quiet():
        torch.jit.save(module, buffer)
    return buffer.getvalue()
