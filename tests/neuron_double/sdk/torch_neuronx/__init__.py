"""Test double of AWS's torch_neuronx (PyTorch/XLA), in the shape of SDK 2.31. See the README above this directory.

Importing it registers the op `neuron::forward_v2` and hooks torch.jit.load, as importing the real package does.
"""

from torch_neuronx import _double, _ops, contexts, experimental, utils
from torch_neuronx.placement import (
    async_load,
    lazy_load,
    move_trace_to_device,
    multicore_context,
    neuron_cores_context,
    set_multicore,
    set_neuron_cores,
)
from torch_neuronx.xla_impl.module import dynamic_batch, replace_weights
from torch_neuronx.xla_impl.trace import trace

__version__ = "2.9.0.2.15.32035+double"
_ops.install()

__all__ = [
    "_double",
    "async_load",
    "contexts",
    "dynamic_batch",
    "experimental",
    "lazy_load",
    "move_trace_to_device",
    "multicore_context",
    "neuron_cores_context",
    "replace_weights",
    "set_multicore",
    "set_neuron_cores",
    "trace",
    "utils",
]
