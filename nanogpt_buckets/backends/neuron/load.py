"""A traced module's verified bytes -> something that can be called, on one or more NeuronCores.

Knows nothing of how it was compiled. torch and torch_neuronx are imported inside functions. Not hashed into any key.
Proof level N1: run against a test double, never on a device.
"""

from __future__ import annotations

import io
import os
import queue
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nanogpt_buckets.backends.base import Opened
from nanogpt_buckets.backends.neuron.package import UNAVAILABLE, last_line, not_initialised, package, quiet
from nanogpt_buckets.errors import BackendUnavailable, DeviceError, IncompatibleEntry

if TYPE_CHECKING:
    from torch import Tensor

# Where a replica is placed is a setting of the process, not of the thread.
_placing = threading.Lock()


def open_module(content: bytes, cores: int) -> Opened:
    """Load a module on the first `cores` cores; calls from several threads then run on different ones.

    Raises:
        BackendUnavailable: the runtime cannot be initialised, or has not that many cores.
        IncompatibleEntry: it will not load this module.
    """
    idle: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for core in range(cores):
        idle.put(_load(content, core, cores))

    def run(*tensors: Tensor) -> Sequence[Tensor]:
        import torch

        replica = idle.get()
        try:
            with torch.inference_mode():
                made = replica(*tensors)
        except RuntimeError as error:
            raise DeviceError(f"the Neuron device did not run the step: {last_line(error)}") from error
        finally:
            idle.put(replica)
        return made if isinstance(made, tuple) else (made,)

    def close() -> None:
        """Let go of the modules; their cores stay with this process until it ends."""
        for _ in range(cores):
            idle.get()

    return run, close


def _load(content: bytes, core: int, cores: int) -> Any:
    """Load a saved module on one core; the runtime would deal modules out to all of them."""
    import torch

    # before the library wakes the runtime: without a word it would take every core of the machine
    if not {"NEURON_RT_VISIBLE_CORES", "NEURON_RT_NUM_CORES"} & os.environ.keys():
        os.environ["NEURON_RT_NUM_CORES"] = str(cores)
    torch_neuronx = package()
    place = getattr(torch_neuronx, "neuron_cores_context", None) or torch_neuronx.experimental.neuron_cores_context
    try:
        with _placing, place(start_nc=core, nc_count=1), quiet():
            return torch.jit.load(io.BytesIO(content))  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError) as error:
        if UNAVAILABLE in str(error):
            raise not_initialised() from error
        if isinstance(error, ValueError):
            raise BackendUnavailable(
                f"this process has no {cores} NeuronCores to run on",
                hint="it keeps those it began with; NEURON_RT_VISIBLE_CORES, if set, names all it may have",
            ) from error
        raise IncompatibleEntry(
            f"the Neuron runtime does not load the compiled module: {last_line(error)}",
            hint="update aws-neuronx-runtime-lib to that of the SDK it was compiled with, or build here",
        ) from error
