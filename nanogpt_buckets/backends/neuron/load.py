"""A traced module's verified bytes -> something that can be called, on one or more NeuronCores.

Where weights and state are inputs they stay on the core, and only answers come back. If but one input is on the host
the runtime returns everything there, without a word: that is looked for after every call.

Knows nothing of how it was compiled. torch and torch_neuronx are imported inside functions. Not hashed into any key.
Proof level N1: run against a test double, never on a device.
"""

from __future__ import annotations

import io
import os
import queue
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nanogpt_buckets.backends.base import Artifact, Opened
from nanogpt_buckets.backends.neuron.package import INSTALL, UNAVAILABLE, last_line, not_initialised, package, quiet
from nanogpt_buckets.errors import BackendUnavailable, DeviceError, IncompatibleEntry

if TYPE_CHECKING:
    from torch import Tensor

# Where a replica is placed is a setting of the process, not of the thread.
_placing = threading.Lock()
# Weights by core and where they are on the host.
_resident: weakref.WeakValueDictionary[tuple[object, ...], _Weight] = weakref.WeakValueDictionary()


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
        replica = idle.get()
        try:
            return _call(replica, tensors)
        finally:
            idle.put(replica)

    def close() -> None:
        """Let go of the modules; their cores stay with this process until it ends."""
        for _ in range(cores):
            idle.get()

    return Opened(run, close)


def open_separate(artifact: Artifact, weights: Mapping[str, Tensor], cores: int) -> Opened:
    """Load a module that takes weights and state as inputs, with one copy of the weights on each core.

    A call runs on the core that its state is on; one without state on any.

    Raises:
        BackendUnavailable: the runtime cannot be initialised, has not that many cores, or no tensors on them.
        IncompatibleEntry: it will not load this module.
        DeviceError: there is no room for the weights.
    """
    content, inputs = artifact.blobs["module"], len(artifact.inputs)
    replicas = [_load(content, core, cores) for core in range(cores)]
    moved = [[_shared(weights[c.name], core) for c in artifact.weights] for core in range(cores)]
    idle: queue.SimpleQueue[int] = queue.SimpleQueue()
    for core in range(cores):
        idle.put(core)

    def run(*tensors: Tensor) -> Sequence[Tensor]:
        state = tensors[inputs:]
        core = state[0].device.index if state else idle.get()
        try:
            given = [_moved(tensor, core) for tensor in tensors[:inputs]]
            given += (*(weight.there for weight in moved[core]), *state)
            made = _call(replicas[core], given)
            names = [c.name for c in (*artifact.inputs, *artifact.weights)]
            _require_there(made, [*names, *(f"state {n}" for n in range(len(state)))], given)
            return made[0].cpu(), *made[1:]
        finally:
            if not state:
                idle.put(core)

    def close() -> None:
        """Let go of the modules and the weights; their cores stay with this process until it ends."""
        replicas.clear()
        moved.clear()

    return Opened(run, close, _moved)


def _call(module: Any, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Run a module once; a DeviceError if it does not."""
    import torch

    try:
        with torch.inference_mode():
            made = module(*tensors)
    except RuntimeError as error:
        raise DeviceError(f"the Neuron device did not run the step: {last_line(error)}") from error
    return made if isinstance(made, tuple) else (made,)


def _moved(tensor: Tensor, core: int) -> Tensor:
    """Return a tensor on a core.

    Raises:
        BackendUnavailable: this torch-neuronx knows no tensors on cores.
        DeviceError: there is no room for it.
    """
    try:
        return tensor.to(f"neuron:{core}")
    except RuntimeError as error:
        if "Failed to allocate" in str(error):
            size = tensor.numel() * tensor.element_size() / 1e6
            raise DeviceError(
                f"NeuronCore {core} has no room for {size:.1f} MB more: {last_line(error)}",
                hint="a smaller --batch, --dtype bfloat16, or --strategy recompute",
            ) from error
        raise BackendUnavailable(
            "this torch-neuronx has no tensors on the device, which remembering needs",
            hint=f"--strategy recompute needs none; or {INSTALL}",
        ) from error


@dataclass(frozen=True, eq=False)
class _Weight:
    """A weight on a core. The host's is kept as well, so that no other can come to be where it is."""

    host: Tensor
    there: Tensor


def _shared(tensor: Tensor, core: int) -> _Weight:
    """Return a weight on a core: the same to every bucket that asks while one of them holds it."""
    key = (core, tensor.data_ptr(), tensor.dtype, tensor.shape)
    with _placing:
        if (held := _resident.get(key)) is None:
            _resident[key] = held = _Weight(tensor, _moved(tensor, core))
        return held


def _require_there(made: Sequence[Tensor], names: Sequence[str], given: Sequence[Tensor]) -> None:
    """Raise a DeviceError unless what a call returned is on the device, saying whose fault it is that it is not."""
    if all(map(_is_there, made)):
        return
    absent = [name for name, tensor in zip(names, given, strict=True) if not _is_there(tensor)]
    why = f"since {absent[0]} was on the host" if absent else "though all that it was given is on the device"
    raise DeviceError(
        f"the compiled bucket returned its results to the host, {why}", hint="--strategy recompute keeps nothing there"
    )


def _is_there(tensor: Tensor) -> bool:
    return tensor.device.type in ("neuron", "privateuseone")


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
