"""Which cores a model goes to, and when: "NeuronCore Placement" and "Lazy and Asynchronous Loading" documentation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from torch_neuronx import _artifact, _models
from torch_neuronx._runtime import RUNTIME


@contextmanager
def neuron_cores_context(start_nc: int = -1, nc_count: int = -1) -> Iterator[None]:
    """Make every torch.jit.load inside the block load onto these cores. Not thread-safe.

    Args:
        start_nc: the first core, relative to the process's visible ones; -1 is the least used one.
        nc_count: how many cores, one replica on each; -1 is exactly one.
    """
    RUNTIME.check(start_nc, nc_count)
    before, _models.placement = _models.placement, (start_nc, nc_count)
    try:
        yield
    finally:
        _models.placement = before


@contextmanager
def multicore_context() -> Iterator[None]:
    """Make every torch.jit.load inside the block load onto all visible cores."""
    RUNTIME.initialize()
    with neuron_cores_context(0, len(RUNTIME.cores)):
        yield


def set_neuron_cores(trace: nn.Module, start_nc: int = -1, nc_count: int = -1) -> None:
    """Unload a loaded model and load it onto these cores. Nothing happens to a module that is not compiled."""
    for blob in _artifact.find(trace):
        _models.get(blob).move((start_nc, nc_count))


def set_multicore(trace: nn.Module) -> None:
    """Unload a loaded model and load it onto all visible cores."""
    RUNTIME.initialize()
    set_neuron_cores(trace, 0, len(RUNTIME.cores))


def move_trace_to_device(trace: nn.Module, device_id: int) -> None:
    """Move a loaded model, with its separate weights, to one core."""
    if device_id < 0:
        raise ValueError(f"<double> device_id {device_id} is invalid")
    set_neuron_cores(trace, device_id, 1)


def lazy_load(trace: nn.Module, enable_lazy_load: bool = True) -> None:
    """Have the saved module leave the device alone until it is first run. Call before torch.jit.save."""
    for blob in _artifact.find(trace):
        blob[_artifact.LAZY] = enable_lazy_load


def async_load(trace: nn.Module, enable_async_load: bool = True) -> None:
    """Have the saved module load in the background; a call waits for it. Call before torch.jit.save."""
    for blob in _artifact.find(trace):
        blob[_artifact.ASYNC] = enable_async_load
