"""The module that trace returns, and what can be done to it before it is saved."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torch_neuronx import _artifact, _ops
from torch_neuronx.xla_impl.capture import Program, flatten


class NeuronModule(nn.Module):
    """Flattens its inputs, calls the one op, and restores the structure of the outputs."""

    def __init__(self, program: Program, neff: bytes) -> None:
        super().__init__()
        self.register_buffer("model", _artifact.pack(neff))
        for n, weight in enumerate(program.weights.values()):
            self.register_buffer(f"weight_{n}", weight)
        for n, state in enumerate(program.states):
            self.register_buffer(f"state_{n}", state)
        self._extra = [f"weight_{n}" for n in range(len(program.weights))]
        self._extra += [f"state_{n}" for n in range(len(program.states))]
        self._used = program.used
        self._structure = program.structure

    def forward(self, *inputs: Any) -> Any:
        flat = flatten(inputs)
        tensors = [flat[n] for n in self._used] + [getattr(self, name) for name in self._extra]
        return pytree.tree_unflatten(torch.ops.neuron.forward_v2(tensors, self.model), self._structure)


def wrap(program: Program, neff: bytes, example_inputs: tuple[Any, ...]) -> torch.jit.ScriptModule:
    """Return the compiled program as a ScriptModule. Nothing is loaded onto a device."""
    _ops.set_wrapping(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit is deprecated
            return torch.jit.trace(NeuronModule(program, neff), example_inputs, strict=False, check_trace=False)
    finally:
        _ops.set_wrapping(False)


def replace_weights(neuron_model: nn.Module, weights: nn.Module | Mapping[str, Tensor]) -> None:
    """Replace, in place, weights of a model that was traced with inline_weights_to_neff=False.

    Args:
        neuron_model: a traced or loaded model. If its weights are in the NEFF, this only warns.
        weights: by their names in the original module; a name that is missing keeps its weight.
    """
    if isinstance(weights, nn.Module):
        weights = weights.state_dict()
    for blob in _artifact.find(neuron_model):
        names = _artifact.unpack(blob)[0]["metaneff"]["weights"]
        if not names:
            warnings.warn("<double> the model has no separate weights; nothing was replaced", stacklevel=2)
        with torch.no_grad():
            for n, name in enumerate(names):
                if name in weights:
                    getattr(neuron_model, f"weight_{n}").copy_(weights[name])


def dynamic_batch(neuron_script: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    """Have the module take any batch size, by splitting and padding along dim 0. Changes it in place and returns it."""
    for blob in _artifact.find(neuron_script):
        blob[_artifact.DYNAMIC_BATCH] = 1
    return neuron_script
