"""From a callable to a program with fixed shapes, frozen control flow and named inputs: the double's "HLO".

The real package lowers through XLA. The double records ATen operators with make_fx, so that the numbers are PyTorch's.
Attention is decomposed to matmul and softmax, as it is in XLA.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from torch_neuronx.xla_impl.lowering import Lowered


@dataclass
class Program:
    """A traced function and how to call it.

    Attributes:
        serialized: a TorchScript program of (inputs + weights + states) -> outputs, all flat lists.
        metaneff: names, shapes and types, which the runtime checks and the artifact keeps.
        used: which of the flattened example inputs the program reads. The others are dropped.
        weights: separate weights by name; none if they are constants of the program.
        states: current values of the aliased tensors.
        structure: what the function returned, less its aliased outputs.
    """

    serialized: bytes
    metaneff: dict[str, Any]
    used: list[int]
    weights: dict[str, Tensor]
    states: list[Tensor]
    structure: pytree.TreeSpec


def flatten(inputs: object) -> list[Tensor]:
    """Return the tensors in nested tuples and lists; any other leaf is refused (aws-neuron-sdk issue 1101)."""
    if isinstance(inputs, Tensor):
        return [inputs]
    if not isinstance(inputs, tuple | list):
        raise TypeError(f"<double> example inputs may only be tensors, and tuples or lists of them: {type(inputs)}")
    return [leaf for item in inputs for leaf in flatten(item)]


def capture(
    func: Callable[..., Any],
    example_inputs: Sequence[Any],
    *,
    aliases: Mapping[Tensor, int],
    inline_weights: bool,
    compiler_args: Sequence[str],
) -> Program:
    """Trace `func` once."""
    lifted = _lifted(func, aliases, inline_weights)
    names = list(lifted)
    flat = flatten(example_inputs)
    shape_of_inputs = pytree.tree_structure(tuple(example_inputs))
    returned: list[pytree.TreeSpec] = []

    def call(*tensors: Tensor) -> list[Tensor]:
        arguments = pytree.tree_unflatten(list(tensors[: len(flat)]), shape_of_inputs)
        if names:
            changed = dict(zip(names, tensors[len(flat) :], strict=True))
            result = torch.func.functional_call(func, changed, arguments)
        else:
            result = func(*arguments)
        outputs, structure = pytree.tree_flatten(result)
        returned.append(structure)
        return outputs

    # a caller's inference_mode would make inference tensors, which cannot be recorded
    with torch.inference_mode(False), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        tensors = [tensor.detach().clone() for tensor in [*flat, *lifted.values()]]
        graph = make_fx(call, _error_on_data_dependent_ops=False)(*tensors)
        graph.graph.eliminate_dead_code()
        outputs = graph(*tensors)
        used = [n for n, node in enumerate(_placeholders(graph)[: len(flat)]) if node.users]
        _drop_inputs(graph, set(range(len(flat))) - set(used))
        kept = [tensors[n] for n in used] + tensors[len(flat) :]
        serialized = _serialize(Lowered(graph, compiler_args), kept)
    n_weights = len(lifted) - len(aliases)
    hidden = set(aliases.values())
    metaneff = {
        "name": type(func).__name__ if isinstance(func, nn.Module) else getattr(func, "__name__", "function"),
        "inputs": [{"name": f"input{n}", **_spec(flat[n])} for n in used],
        "outputs": [_spec(output) for output in outputs],
        "weights": names[:n_weights],
        "aliases": list(aliases.values()),
    }
    values = [value.detach().clone() for value in lifted.values()]
    return Program(
        serialized=serialized,
        metaneff=metaneff,
        used=used,
        weights=dict(zip(names[:n_weights], values, strict=False)),
        states=values[n_weights:],
        structure=_without(returned[0], hidden),
    )


def _lifted(func: object, aliases: Mapping[Tensor, int], inline_weights: bool) -> dict[str, Tensor]:
    """Return what becomes an argument of the program: separate weights, then aliased states."""
    if not isinstance(func, nn.Module):
        if aliases:
            raise ValueError("<double> input_output_aliases needs a module that owns the state tensors")
        return {}
    named = {**dict(func.named_parameters()), **dict(func.named_buffers())}
    states = {name: tensor for state in aliases for name, tensor in named.items() if tensor is state}
    if len(states) != len(aliases):
        raise ValueError("<double> input_output_aliases has a tensor that the module does not own")
    weights = {} if inline_weights else {name: value for name, value in named.items() if name not in states}
    return weights | states


def _placeholders(graph: torch.fx.GraphModule) -> list[torch.fx.Node]:
    return [node for node in graph.graph.nodes if node.op == "placeholder"]


def _drop_inputs(graph: torch.fx.GraphModule, unused: set[int]) -> None:
    for n, node in enumerate(_placeholders(graph)):
        if n in unused:
            graph.graph.erase_node(node)
    graph.recompile()


def _serialize(program: nn.Module, inputs: list[Tensor]) -> bytes:
    """Return the program as bytes: whatever happens to the module's weights later does not reach it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated; the tracer warns of constants
        script = torch.jit.trace(program, tuple(inputs), check_trace=False)
        buffer = io.BytesIO()
        torch.jit.save(script, buffer)
    return buffer.getvalue()


def _spec(tensor: Tensor) -> dict[str, Any]:
    return {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}


def _without(structure: pytree.TreeSpec, hidden: set[int]) -> pytree.TreeSpec:
    """Return the structure less its aliased outputs, which callers do not get."""
    if not hidden:
        return structure
    shown = [n for n in range(structure.num_leaves) if n not in hidden]
    return pytree.tree_structure(tuple(shown))
