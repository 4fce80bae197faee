"""The custom op `neuron::forward_v2` and the hook on torch.jit.load.

The op exists once torch_neuronx is imported; before that torch.jit.load fails with "Unknown builtin op"
(aws-neuron-sdk issue 240).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, library

from torch_neuronx import _artifact, _device, _models, _settings
from torch_neuronx._runtime import RUNTIME

_original_load = torch.jit.load
_library: library.Library | None = None  # the op lives as long as this
_wrapping = False  # while trace wraps the compiled program, the op only has to say how many outputs there are


def install() -> None:
    """Register the op and hook torch.jit.load."""
    global _library
    _library = library.Library("neuron", "DEF")
    _library.define("forward_v2(Tensor[] inputs, Tensor model) -> Tensor[]")
    # this dispatch key, so that results never require a gradient
    _library.impl("forward_v2", _forward, "CompositeImplicitAutograd")
    _device.install()

    @functools.wraps(_original_load)
    def load(*args: Any, **kwargs: Any) -> torch.jit.ScriptModule:
        module = _original_load(*args, **kwargs)
        _models.adopt(module)
        return module

    torch.jit.load = load


def uninstall() -> None:
    """Undo install."""
    if _library is not None:
        _library._destroy()
    _device.uninstall()
    torch.jit.load = _original_load


def set_wrapping(value: bool) -> None:
    global _wrapping
    _wrapping = value


def _forward(inputs: list[Tensor], blob: Tensor) -> list[Tensor]:
    if _wrapping:
        meta = _artifact.unpack(blob)[0]["metaneff"]
        outputs = [spec for n, spec in enumerate(meta["outputs"]) if n not in meta["aliases"]]
        return [torch.zeros(spec["shape"], dtype=getattr(torch, spec["dtype"])) for spec in outputs]
    model = _models.get(blob)
    model.wait()
    meta = model.header["metaneff"]
    n_user, n_weights = len(meta["inputs"]), len(meta["weights"])
    if len(inputs) != n_user + n_weights + len(meta["aliases"]):
        raise RuntimeError(f"<double> got {len(inputs)} inputs, expected {n_user}")
    with torch.no_grad(), torch.jit.optimized_execution(False):
        core = _place(model, inputs)
        inputs = [_device.on_host(tensor) for tensor in inputs]
        user, kept = inputs[:n_user], inputs[n_user:]
        if "sticky-state" in _settings.faults() and model.returned:
            user[len(user) - len(model.returned) + 1 :] = [tensor.clone() for tensor in model.returned[1:]]
        dynamic = bool(blob[_artifact.DYNAMIC_BATCH])
        outputs = _by_batches(model, user, kept) if dynamic else _execute(model, user, kept)
        if "stale-handles" in _settings.faults() and model.returned:
            outputs = [held.copy_(output) for held, output in zip(model.returned, outputs, strict=True)]
        model.returned = outputs
        states = kept[n_weights:]
        for state, n in zip(states, meta["aliases"], strict=True):
            state.copy_(outputs[n])
    outputs = [output for n, output in enumerate(outputs) if n not in meta["aliases"]]
    return outputs if core is None else [_device.DeviceTensor(output, core) for output in outputs]


def _place(model: _models.Model, inputs: list[Tensor]) -> int | None:
    """Return the core that outputs stay on: that of all inputs; None, the host, if any of them is on the host."""
    cores = {_device.on_core(tensor) for tensor in inputs}
    if cores - {None} - {RUNTIME.cores.index(core) for core in model.cores}:
        raise RuntimeError(f"<double> an input is on another core than the model: {sorted(map(str, cores))}")
    stays = len(cores) == 1 and None not in cores and "outputs-on-host" not in _settings.faults()
    return cores.pop() if stays else None


def _execute(model: _models.Model, user: list[Tensor], kept: list[Tensor]) -> list[Tensor]:
    """Run the program once on exactly the traced shapes; anything else "will result in an error" (documentation)."""
    for given, spec in zip(user, model.header["metaneff"]["inputs"], strict=True):
        found = (list(given.shape), str(given.dtype).removeprefix("torch."), given.device.type)
        expected = (spec["shape"], spec["dtype"], "cpu")
        if found != expected:
            raise RuntimeError(f"<double> input {spec['name']} is {found}, the model was traced with {expected}")
    model.next_core().executions += 1
    return [output.detach() for output in model.program(*user, *kept)]


def _by_batches(model: _models.Model, user: list[Tensor], kept: list[Tensor]) -> list[Tensor]:
    """Split along dim 0 into the traced batch size, and pad the last piece (dynamic_batch documentation)."""
    sizes = {tensor.shape[0] for tensor in user}
    if len(sizes) != 1:
        raise RuntimeError("Inconsistent batch sizes found on inputs")  # aws-neuron-sdk issue 405
    size, step = sizes.pop(), model.header["metaneff"]["inputs"][0]["shape"][0]
    pieces = []
    for start in range(0, size, step):
        part = [tensor[start : start + step] for tensor in user]
        short = step - part[0].shape[0]
        part = [torch.cat([tensor, tensor.new_zeros(short, *tensor.shape[1:])]) for tensor in part]
        pieces.append(_execute(model, part, kept))
    return [torch.cat(outputs)[:size] for outputs in zip(*pieces, strict=True)]
