"""The protocol between a plan and a compiler: what is asked, what comes back, what is checked at every call.

Knows nothing of any one compiler, nor of where artifacts are stored. Imports torch only for type checkers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from nanogpt_buckets.contract import Contract, canonical_name, dtype_name
from nanogpt_buckets.model.architecture import Architecture
from nanogpt_buckets.plan.bucket import Bucket

if TYPE_CHECKING:
    from torch import Tensor, nn

DTYPES = ("float32", "bfloat16")
# In a gate's record: why a bucket was published unchecked; whoever loads it first checks it.
DEFERRED = "deferred"


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
