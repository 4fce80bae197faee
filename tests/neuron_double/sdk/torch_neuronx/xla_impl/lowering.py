"""What compiler and device do to the numbers, and the numeric faults that a test can plant.

Always: indices out of range are clamped, for the device raises no IndexError. With `--auto-cast matmult` or `all`,
float32 operands of matmuls are rounded to bfloat16.

Faults (NEURON_DOUBLE_FAULT):
    split-miscompile: list-form torch.split along any dim but 0 ignores strides (pytorch/xla issue 8640, aws-neuron-sdk
        issue 1140). The int form and tensor_split are right, as measured with torch-xla 2.9.
    int64-corruption: 64-bit integer inputs are read as pairs of 32-bit ones (aws-neuron-sdk issues 785 and 937).
    nan-inf-mask: a softmax over scores masked with -inf gives NaN (aws-neuron-sdk issue 672), unless
        --enable-saturate-infinity is given.
    wrong-gelu: the erf and tanh forms of GELU are exchanged.
    drop-mask: where and masked_fill do not mask if the fill is a very negative constant.
    scale-logits: outputs are 1.001 times too large.
    row-mix: one millionth of each row's output leaks into the next row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from torch_neuronx import _settings

aten = torch.ops.aten
_SOFTMAX = {aten._softmax.default, aten._safe_softmax.default, aten._log_softmax.default}
_MATMUL = {aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default}
_MASKED = -1e3  # a constant below this can only be a mask


class Lowered(nn.Module):
    """A recorded graph as the Neuron device would run it.

    Args:
        graph: ATen operators as make_fx recorded them.
        compiler_args: some flags change numbers.
    """

    def __init__(self, graph: fx.GraphModule, compiler_args: Sequence[str]) -> None:
        super().__init__()
        self.graph = graph
        flags = " ".join(compiler_args).replace("=", " ")
        self.faults = _settings.faults() & _settings.NUMERIC_FAULTS
        if "--enable-saturate-infinity" in flags:
            self.faults -= {"nan-inf-mask"}
        self.auto_cast = any(f"--auto-cast {kind}" in flags for kind in ("matmult", "all"))

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        return _Interpreter(self).run(*inputs)


class _Interpreter(fx.Interpreter):
    """Runs a graph operator by operator, changing what Neuron changes."""

    def __init__(self, lowered: Lowered) -> None:
        super().__init__(lowered.graph)
        self.faults = lowered.faults
        self.auto_cast = lowered.auto_cast

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().placeholder(target, args, kwargs)
        if "int64-corruption" in self.faults and value.dtype == torch.int64:
            halves = torch.stack([value & 0xFFFFFFFF, value >> 32], dim=-1)  # little-endian
            return halves.flatten()[: value.numel()].view(value.shape)
        return value

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        args = _clamp_indices(target, args)
        if self.auto_cast and target in _MATMUL:
            args = (*args[:-2], *(_round_to_bfloat16(operand) for operand in args[-2:]))
        if "split-miscompile" in self.faults and target is aten.split_with_sizes.default:
            return _split_ignoring_strides(*args)
        if "nan-inf-mask" in self.faults and target in _SOFTMAX:
            args = (torch.where(args[0] == -torch.inf, torch.nan, args[0]), *args[1:])
        if "wrong-gelu" in self.faults and target is aten.gelu.default:
            return aten.gelu(args[0], approximate="none" if kwargs.get("approximate") == "tanh" else "tanh")
        if "drop-mask" in self.faults and (unmasked := _without_mask(target, args)) is not None:
            return unmasked
        return super().call_function(target, args, kwargs)

    def output(self, target: Any, args: Any, kwargs: Any) -> Any:
        outputs = list(super().output(target, args, kwargs))
        for n, value in enumerate(outputs):
            if not value.is_floating_point():
                continue
            if "scale-logits" in self.faults:
                outputs[n] = value * 1.001
            if "row-mix" in self.faults and value.dim():
                outputs[n] = value + 1e-6 * (value.roll(1, 0) - value)
        return outputs


def _clamp_indices(target: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the arguments with indices in range: out of bounds is NRT_EXEC_OOB, never an IndexError."""
    if target is aten.embedding.default:
        return (args[0], args[1].clamp(0, args[0].shape[0] - 1), *args[2:])
    if target in (aten.index_select.default, aten.gather.default):
        return (*args[:2], args[2].clamp(0, args[0].shape[args[1]] - 1), *args[3:])
    if target is aten.index.Tensor:
        indices = [
            index
            if index is None or index.dtype == torch.bool
            else index.clamp(-args[0].shape[n], args[0].shape[n] - 1)
            for n, index in enumerate(args[1])
        ]
        return (args[0], indices)
    return args


def _round_to_bfloat16(operand: Tensor) -> Tensor:
    return operand.bfloat16().float() if operand.dtype == torch.float32 else operand


def _split_ignoring_strides(x: Tensor, sizes: list[int], dim: int = 0) -> list[Tensor]:
    """Return pieces cut from flat storage at the right offset, then reshaped. Along dim 0 that is what split does."""
    dim %= x.dim()
    stride = x[(0,) * (dim + 1)].numel()  # elements per step along dim, in contiguous storage
    flat, pieces, offset = x.flatten(), [], 0
    for size in sizes:
        shape = [*x.shape[:dim], size, *x.shape[dim + 1 :]]
        numel = torch.Size(shape).numel()
        pieces.append(flat[offset * stride : offset * stride + numel].view(shape))
        offset += size
    return pieces


def _without_mask(target: Any, args: tuple[Any, ...]) -> Tensor | None:
    """Return what a masking operator would have masked, or None if this is none."""
    if target is aten.where.self:
        condition, first, second = args
        for fill, scores in ((first, second), (second, first)):
            if _is_fill(fill):
                return scores.expand(torch.broadcast_shapes(condition.shape, scores.shape)).clone()
    if target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor) and _is_fill(args[2]):
        return args[0].clone()
    return None


def _is_fill(value: Any) -> bool:
    value = torch.as_tensor(value)
    return value.numel() == 1 and value.item() < _MASKED
