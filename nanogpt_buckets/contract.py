"""What a step's tensors must be, and the checks that compiled code does not make: of weights at load, of every call.

Compiled code takes everything on trust: a wrong stride is silently wrong, a missing tensor ends the process. Knows
nothing of steps or compilers. Imports torch only for type checkers.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from nanogpt_buckets.errors import CorruptEntry, DeviceError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

# In a gate's record: why a bucket was published unchecked; whoever loads it first checks it.
DEFERRED = "deferred"


@dataclass(frozen=True)
class Contract:
    """What one tensor must be; it must be contiguous as well. Weights go by their canonical names."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    def fault(self, tensor: Tensor) -> str | None:
        """Say in words how a tensor breaks this contract, or None."""
        if dtype_name(tensor) != self.dtype:
            return f"{self.name} is {dtype_name(tensor)}, not {self.dtype}"
        if tuple(tensor.shape) != self.shape:
            return f"{self.name} has shape {tuple(tensor.shape)}, not {self.shape}"
        return None if tensor.is_contiguous() else f"{self.name} is not contiguous"


@dataclass(frozen=True)
class View(Contract):
    """What a part of a larger tensor must be: compiled code takes its strides for granted, as it does its shape."""

    strides: tuple[int, ...] = ()

    def fault(self, tensor: Tensor) -> str | None:
        """Say in words how a tensor breaks this contract, or None."""
        if dtype_name(tensor) != self.dtype:
            return f"{self.name} is {dtype_name(tensor)}, not {self.dtype}"
        if (tuple(tensor.shape), tensor.stride()) != (self.shape, self.strides):
            found = f"shape {tuple(tensor.shape)} and strides {tensor.stride()}"
            return f"{self.name} has {found}, not {self.shape} and {self.strides}"
        return None

    def blank(self) -> Tensor:
        """Return a tensor of zeros that keeps it."""
        import torch

        storage = torch.zeros(self.shape[0] * self.strides[0], dtype=getattr(torch, self.dtype), device="cpu")
        return storage.as_strided(self.shape, self.strides)


@dataclass(frozen=True)
class Interface:
    """What a step takes and returns in one bucket.

    `state` are tensors written in place and alive between calls, given after the inputs; `limits` says of whole-number
    inputs where every value must lie.
    """

    inputs: tuple[Contract, ...]
    outputs: tuple[Contract, ...]
    state: tuple[View, ...] = ()
    limits: Mapping[str, range] = field(default_factory=dict)

    def check_inputs(self, tensors: Sequence[Tensor]) -> None:
        """Check, on the host, what compiled code takes on trust; a UsageError names the first tensor that is wrong."""
        wanted = (*self.inputs, *self.state)
        if len(tensors) != len(wanted):
            raise UsageError(f"the bucket takes {len(wanted)} inputs, not {len(tensors)}")
        # the state of every layer at every step: words for what is wrong are looked for only if something is
        held = tensors[len(self.inputs) :]
        right = all(_layout(tensor) == layout for tensor, layout in zip(held, self._layouts, strict=True))
        for contract, tensor in zip(self.inputs if right else wanted, tensors, strict=False):
            if fault := contract.fault(tensor):
                raise UsageError(f"the bucket cannot take this input: {fault}")
            if (limit := self.limits.get(contract.name)) is not None:
                low, high = (int(bound) for bound in tensor.aminmax())
                if not (low in limit and high in limit):
                    value = high if low in limit else low
                    raise UsageError(f"{contract.name} {value} is out of range: it must be {limit[0]} to {limit[-1]}")

    @functools.cached_property
    def _layouts(self) -> list[object]:
        import torch

        return [(getattr(torch, view.dtype), view.shape, view.strides) for view in self.state]

    def check_outputs(self, tensors: Sequence[Tensor]) -> None:
        """Check what came back; a DeviceError says what is not what the step returns."""
        if len(tensors) != len(self.outputs):
            raise DeviceError(f"the bucket returned {len(tensors)} tensors, not {len(self.outputs)}")
        for contract, tensor in zip(self.outputs, tensors, strict=True):
            if dtype_name(tensor) != contract.dtype or tuple(tensor.shape) != contract.shape:
                found = f"{dtype_name(tensor)} {tuple(tensor.shape)}"
                raise DeviceError(f"the bucket returned {found} for {contract.name}, not {contract}")


@dataclass(frozen=True, eq=False)
class Executable:
    """One loaded bucket: a callable whose every call is checked; `run` is the bare one, compiled or eager.

    State must be where `place` puts it, given a tensor and which of the backend's cores; there it is returned, too.
    """

    run: Callable[..., Sequence[Tensor]]
    interface: Interface
    close: Callable[[], None] = lambda: None
    place: Callable[[Tensor, int], Tensor] = lambda tensor, core: tensor

    def blank(self, core: int = 0) -> list[Tensor]:
        """Return state of zeros."""
        return [self.place(view.blank(), core) for view in self.interface.state]

    def placed(self, tensor: Tensor) -> Tensor:
        """Return state where calls find it, on the first core."""
        return self.place(tensor, 0)

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run the step once."""
        refuse_forked(running=True)
        self.interface.check_inputs(tensors)
        outputs = tuple(self.run(*tensors))
        self.interface.check_outputs(outputs)
        return outputs


_ran_in: set[int] = set()  # processes that have run a step: this one, or one it was forked from


def refuse_forked(running: bool = False) -> None:
    """Refuse to run in a process forked from one that has run a step: OpenMP would wait for threads that are not here.

    Raises a UsageError; `running` says that this process is about to run one.
    """
    process = os.getpid()
    if _ran_in - {process}:
        raise UsageError(
            "this process was forked from one that has run buckets, whose threads did not come along",
            hint="start processes with multiprocessing.get_context('spawn'), or fork before the first run",
        )
    if running:
        _ran_in.add(process)


def _layout(tensor: Tensor) -> object:
    return tensor.dtype, tensor.shape, tensor.stride()


def dtype_name(tensor: Tensor) -> str:
    """Return "float32" for torch.float32, and so on."""
    return str(tensor.dtype).removeprefix("torch.")


def check_weights(contracts: Sequence[Contract], weights: Mapping[str, Tensor]) -> None:
    """Refuse, by a CorruptEntry, weights whose names, dtypes, shapes or layouts are not those compiled for."""
    odd = sorted({contract.name for contract in contracts} ^ weights.keys())
    faults = (contract.fault(weights[contract.name]) for contract in contracts)
    fault = f"{odd[0]} is missing on one side" if odd else next(filter(None, faults), None)
    if fault:
        raise CorruptEntry(f"the weights do not fit the compiled bucket: {fault}")
