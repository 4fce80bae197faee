"""Tensors on a core, `tensor.to("neuron:0")`: a device type of its own, whose memory counts.

"Direct HBM Tensor Allocation with Neuron" of the AWS Neuron documentation. What a core holds is a tensor of the host,
out of reach: it can be made, copied there, copied back and given to a compiled module; any other operator is refused,
for what the real device would do with it is not documented.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, library

from torch_neuronx import _settings
from torch_neuronx._runtime import RUNTIME

_library: library.Library | None = None
aten = torch.ops.aten
_MOVES = {aten._to_copy.default, aten.to.dtype_layout, aten.to.device}  # the latter two under inference_mode
_FILLS = {aten.zero_.default, aten.fill_.Scalar, aten.uniform_.default, aten.normal_.default}


class DeviceTensor(Tensor):
    """A tensor on one core of this process."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor, core: int) -> DeviceTensor:
        made = Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), dtype=held.dtype, device=torch.device("neuron", core)
        )
        made.held = held
        RUNTIME.allocate(core, id(made), held.numel() * held.element_size())
        weakref.finalize(made, RUNTIME.free, core, id(made))
        return made

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, kinds: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func in _MOVES:
            where = torch.device(given.get("device") or next((a for a in args if isinstance(a, torch.device)), "meta"))
            if where == args[0].device and given.get("dtype") in (None, args[0].dtype):
                return args[0]
            if where.type == "cpu":
                return args[0].held.to(given.get("dtype") or args[0].dtype, copy=True)
        if func is aten.detach.default:
            return args[0]
        if func is aten.copy_.default and type(args[1]) is Tensor:  # from the host
            args[0].held.copy_(args[1])
            return args[0]
        if func is aten.copy_.default and type(args[0]) is Tensor:  # to the host
            return args[0].copy_(args[1].held)
        if func in _FILLS:
            func(args[0].held, *args[1:], **given)
            return args[0]
        if func.name() == "neuron::forward_v2":  # by name: a process may have installed it several times
            from torch_neuronx import _ops

            return _ops._forward(*args)
        raise NotImplementedError(f"<double> {func} is not modelled for tensors on a core")

    def __repr__(self, **options: Any) -> str:
        return f"DeviceTensor({tuple(self.shape)}, {self.dtype}, {self.device})"


def on_core(tensor: Tensor) -> int | None:
    """Return the core that a tensor is on, None for the host."""
    return tensor.device.index if isinstance(tensor, DeviceTensor) else None


def on_host(tensor: Tensor) -> Tensor:
    """Return what a program computes with."""
    return tensor.held if isinstance(tensor, DeviceTensor) else tensor


def install() -> None:
    """Name the device and let tensors be made there, as importing the real package does."""
    global _library
    if not hasattr(torch, "neuron"):  # a process can name it once
        torch.utils.rename_privateuse1_backend("neuron")
        torch._register_device_module("neuron", _module())
    _library = library.Library("aten", "IMPL", "PrivateUse1")
    _library.impl("empty.memory_format", _empty)
    _library.impl("empty_strided", _empty_strided)


def uninstall() -> None:
    """Undo install, but for the name."""
    if _library is not None:
        _library._destroy()


def _module() -> types.ModuleType:
    module = types.ModuleType("torch.neuron")
    module.is_available = lambda: bool(_settings.core_count())
    module.device_count = _settings.core_count
    module.current_device = lambda: 0
    module._is_in_bad_fork = lambda: False
    module.manual_seed_all = lambda seed: None
    return module


def _empty(size: Sequence[int], *, dtype: Any = None, device: Any = None, **_: Any) -> Tensor:
    return _made(torch.empty(size, dtype=dtype, device="cpu"), device)


def _empty_strided(
    size: Sequence[int], stride: Sequence[int], *, dtype: Any = None, device: Any = None, **_: Any
) -> Tensor:
    return _made(torch.empty_strided(size, stride, dtype=dtype, device="cpu"), device)


def _made(tensor: Tensor, device: Any) -> Tensor:
    return DeviceTensor(tensor, torch.device(device).index or 0)
