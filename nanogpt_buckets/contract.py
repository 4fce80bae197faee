"""What one tensor must be, and the checks that compiled code does not make: of weights at load, of inputs at calls.

Compiled code takes everything on trust: a wrong stride is silently wrong, a missing tensor ends the process. Knows
nothing of steps or compilers. Imports torch only for type checkers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nanogpt_buckets.errors import CorruptEntry, UsageError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Contract:
    """What one tensor must be; it must be contiguous as well.

    Args:
        name: "input_ids", or a weight's canonical name.
        dtype: "int32", "float32", ...
        shape: sizes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]


def canonical_name(parameter: str) -> str:
    """Return a step parameter's name as checkpoints know it: the step's own prefix removed."""
    return parameter.removeprefix("gpt.")


def dtype_name(tensor: Tensor) -> str:
    """Return "float32" for torch.float32, and so on."""
    return str(tensor.dtype).removeprefix("torch.")


def check_weights(contracts: tuple[Contract, ...], weights: Mapping[str, Tensor]) -> None:
    """Refuse any set of weights that is not exactly what the artifact was compiled for.

    Compiled code checks nothing: a wrong stride is silently wrong, a missing tensor ends the process.

    Raises:
        CorruptEntry: a name, dtype, shape or memory layout differs.
    """
    wanted = {contract.name: contract for contract in contracts}
    if wanted.keys() != weights.keys():
        odd = sorted(wanted.keys() ^ weights.keys())
        raise CorruptEntry(f"the weights do not fit the compiled bucket: {odd[0]} is missing on one side")
    for name, contract in wanted.items():
        fault = _fault(contract, weights[name])
        if fault:
            raise CorruptEntry(f"the weights do not fit the compiled bucket: {fault}")


def check_inputs(contracts: tuple[Contract, ...], input_ids: Tensor, last_index: Tensor, vocab_size: int) -> None:
    """Check, on the host, what compiled code takes on trust.

    Raises:
        UsageError: dtype, shape, layout, a token id or a last index is out of range.
    """
    for contract, tensor in zip(contracts, (input_ids, last_index), strict=True):
        fault = _fault(contract, tensor)
        if fault:
            raise UsageError(f"the bucket cannot take this input: {fault}")
    for name, tensor, limit in (("token id", input_ids, vocab_size), ("last index", last_index, input_ids.shape[1])):
        low, high = (int(bound) for bound in tensor.aminmax())
        if low < 0 or high >= limit:
            raise UsageError(f"{name} {low if low < 0 else high} is out of range: it must be 0 to {limit - 1}")


def _fault(contract: Contract, tensor: Tensor) -> str | None:
    if dtype_name(tensor) != contract.dtype:
        return f"{contract.name} is {dtype_name(tensor)}, not {contract.dtype}"
    if tuple(tensor.shape) != tuple(contract.shape):
        return f"{contract.name} has shape {tuple(tensor.shape)}, not {tuple(contract.shape)}"
    return None if tensor.is_contiguous() else f"{contract.name} is not contiguous"
