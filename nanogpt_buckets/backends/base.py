"""The protocol between a plan and a compiler: what is asked, what comes back, what is checked at every call.

Knows nothing of any one compiler, nor of where artifacts are stored. Imports torch only for type checkers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from nanogpt_buckets.errors import CorruptEntry, UsageError
from nanogpt_buckets.model.architecture import Architecture
from nanogpt_buckets.plan.bucket import Bucket

if TYPE_CHECKING:
    from torch import Tensor, nn

DTYPES = ("float32", "bfloat16")
# In a gate's record: why a bucket was published unchecked; whoever loads it first checks it.
DEFERRED = "deferred"


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


@dataclass(frozen=True)
class BuildRequest:
    """All a child needs to compile one bucket; plain data, so that it can cross to another process or machine.

    Args:
        backend: name of the backend.
        architecture: the model, without weights.
        bucket: the shape.
        dtype: "float32" or "bfloat16".
        target: what to generate code for.
        lowering: how the graph is written.
        arguments: the user's compiler flags.
        weights: path of the prepared weights, where they are compiled in.
    """

    backend: str
    architecture: Architecture
    bucket: Bucket
    dtype: str
    target: str
    lowering: Mapping[str, str]
    arguments: tuple[str, ...] = ()
    weights: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the request as plain JSON."""
        plain = {"architecture": self.architecture.to_json(), "bucket": self.bucket.to_json()}
        return asdict(self) | plain | {"lowering": dict(self.lowering)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> BuildRequest:
        """Rebuild from `to_json`'s output."""
        architecture = Architecture.from_json(data["architecture"])
        rebuilt = {"architecture": architecture, "bucket": Bucket(**data["bucket"])}
        return cls(**(data | rebuilt | {"arguments": tuple(data["arguments"])}))


@dataclass(frozen=True)
class Artifact:
    """What compiling one bucket made, or what the store kept of it.

    Args:
        blobs: role -> bytes, for example {"library": ...}.
        inputs: contract of each input, in order.
        outputs: contract of each output.
        weights: contract of each tensor that must be given at load, by canonical name.
        requires: what a host must have to run it; see `host.unmet`.
        stats: whole numbers worth keeping, such as compile_ms.
        gate: what the equivalence gate measured.
    """

    blobs: Mapping[str, bytes]
    inputs: tuple[Contract, ...]
    outputs: tuple[Contract, ...]
    weights: tuple[Contract, ...]
    requires: Mapping[str, Any]
    stats: Mapping[str, int] = field(default_factory=dict)
    gate: Mapping[str, Any] = field(default_factory=dict)


class Executable(Protocol):
    """One loaded bucket."""

    def __call__(self, input_ids: Tensor, last_index: Tensor) -> Tensor:
        """Run the step: int32 (B, S), int32 (B,) -> float32 (B, V)."""

    def close(self) -> None:
        """Let go of what the executable holds."""


class Backend(ABC):
    """One compiler with its loader; what most have in common is here.

    `name` is part of the family. `sources` are the files of this backend that shape generated code, relative to the
    package. `compiles` is False where every shape runs at once and nothing is cached. `inlines_weights` is True where
    weights are compiled in. `needs` says what is lacking where `compiler` finds none, and `install` how to get it.
    `timeout_s` bounds one compilation. `arguments` are the user's compiler flags. `cores` is how many steps can run at
    once.
    """

    name: str
    sources: tuple[str, ...]
    compiles = True
    inlines_weights = False
    needs = "compiler"
    install = ""
    timeout_s = 3600.0
    arguments: tuple[str, ...] = ()
    cores: int = 1

    @abstractmethod
    def runtime(self) -> dict[str, str]:
        """Return the library versions an artifact is tied to."""

    @abstractmethod
    def lowering(self) -> dict[str, str]:
        """Return how graphs are written for this backend."""

    @abstractmethod
    def target(self, requested: str | None) -> str:
        """Return what would be built for."""

    @abstractmethod
    def compiler(self) -> dict[str, str] | None:
        """Return the versions of what generates code, or None if nothing here can compile."""

    @abstractmethod
    def compile(self, request: BuildRequest, workdir: Path) -> Artifact:
        """Compile one bucket; runs in a child."""

    @abstractmethod
    def load(self, artifact: Artifact, weights: Mapping[str, Tensor]) -> Executable:
        """Make an executable of verified bytes; the weights are checked against their contract first."""

    def flags(self) -> list[str]:
        """Return, in canonical order, what of the user's compiler flags can change what is compiled."""
        return []

    def rounds(self) -> bool:
        """Whether what is compiled computes with less precision than its dtype has, because it was asked to."""
        return False

    def can_check(self, artifact: Artifact) -> bool:
        """Whether this machine can run what it has just compiled, and so check it before it is published."""
        return True

    def capacity(self, target: str) -> int | None:
        """Return how many bytes of weights in buckets a device holds, or None if that bounds nothing."""
        return None

    def child_bytes(self, arch: Architecture) -> int:
        """Return the host memory one compilation may need: imports and compiler, and the gate's copies of weights."""
        return 1_300_000_000 + 3 * 4 * arch.n_params

    def child_environment(self, request: BuildRequest) -> dict[str, str]:
        """Return what a compiling child needs in its environment from its start."""
        return {}


def step_contract(step: nn.Module, bucket: Bucket) -> tuple[tuple[Contract, ...], tuple[Contract, ...]]:
    """Return the contracts of a recompute step's inputs and of its weights."""
    B, S = bucket.batch_size, bucket.seq_len
    inputs = (Contract("input_ids", "int32", (B, S)), Contract("last_index", "int32", (B,)))
    named = sorted(step.named_parameters())
    weights = tuple(Contract(canonical_name(name), dtype_name(p), tuple(p.shape)) for name, p in named)
    return inputs, weights


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
