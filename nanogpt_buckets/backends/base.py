"""The protocol between a plan and a compiler: what is asked, what comes back, and how a bucket is loaded.

Knows nothing of any one compiler or step, nor of where artifacts are stored. Imports torch only for type checkers.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from nanogpt_buckets.backends import host
from nanogpt_buckets.contract import Contract, Executable, Interface, check_weights
from nanogpt_buckets.errors import CorruptEntry
from nanogpt_buckets.findings import Finding
from nanogpt_buckets.model.architecture import Architecture
from nanogpt_buckets.plan.bucket import Bucket
from nanogpt_buckets.steps import step_named

if TYPE_CHECKING:
    from torch import Tensor

# Of calls that README's benchmarks timed: GPT-2 124M, prompts and decode, and the host's work beside each.
_GFLOP_PER_S, _GB_PER_S, _CALL_MS = 126.0, 29.0, 0.4
DTYPES = ("float32", "bfloat16")
# Whether kernels are the ones that are usually best, or timed first.
TUNINGS = ("off", "fast")


@dataclass(frozen=True)
class BuildRequest:
    """All a child needs to compile one bucket; plain data, so that it can cross to another process or machine.

    `source` is the digest of the files that shape the code, and `versions` names what else does, as `Backend.versions`
    does: whoever compiles must have the same. `weights_path` names the prepared weights, where they are compiled in;
    `tune` is one of `TUNINGS`.
    """

    backend: str
    architecture: Architecture
    bucket: Bucket
    dtype: str
    target: str
    lowering: dict[str, str]
    source: str
    versions: dict[str, str]
    compiler_args: tuple[str, ...] = ()
    weights_path: str | None = None
    tune: str = "off"

    def to_json(self) -> dict[str, Any]:
        """Return the request as plain JSON."""
        return asdict(self) | {"architecture": self.architecture.to_json()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> BuildRequest:
        """Rebuild from `to_json`'s output."""
        rebuilt = {
            "architecture": Architecture.from_json(data["architecture"]),
            "bucket": Bucket(**data["bucket"]),
            "compiler_args": tuple(data["compiler_args"]),
        }
        return cls(**(data | rebuilt))


@dataclass(frozen=True)
class Artifact:
    """What compiling one bucket made, or what the store kept of it.

    `blobs` are bytes by role, `weights` what must be given at load, `requires` what a host must have (see
    `Backend.unmet`), `stats` whole numbers worth keeping, `gate` what the equivalence gate measured.
    """

    blobs: Mapping[str, bytes]
    inputs: tuple[Contract, ...]
    outputs: tuple[Contract, ...]
    weights: tuple[Contract, ...]
    requires: Mapping[str, Any]
    stats: Mapping[str, int] = field(default_factory=dict)
    gate: Mapping[str, Any] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """Return every field but the blobs, by name: what a manifest keeps of an artifact."""
        return {name: getattr(self, name) for name in FACTS}


FACTS = tuple(f.name for f in fields(Artifact) if f.name != "blobs")


@dataclass(frozen=True)
class Opened:
    """What a backend makes of verified bytes: calls take the step's inputs and state; closing lets go.

    `place` puts a tensor of state where calls find it, on one of the backend's cores.
    """

    run: Callable[..., Sequence[Tensor]]
    close: Callable[[], None]
    place: Callable[[Tensor, int], Tensor] = lambda tensor, core: tensor


class Backend(ABC):
    """One compiler with its loader; what most have in common is here.

    `name` is part of the family, `steps` are those it can compile. `sources` are the files of this backend that shape
    generated code, relative to the package; `lowering` is how graphs are written for it. `inlines_weights` is True
    where weights are compiled in. `kv` is what `--strategy kv` plans here, in `WAYS`. `plans` names plans that are of
    no use to other backends. `needs` says what is lacking where `compiler` finds none, `install` how to get it.
    `fuses` is False where bfloat16 is rounded within activations. `caveat` is what whoever chooses it should know.
    `timeout_s` bounds one compilation; `compile_s` and `module_bytes` are what a bucket usually takes. `compiler_args`
    are the user's compiler flags. `cores` is how many steps can run at once.
    """

    name: str
    steps: tuple[str, ...]
    sources: tuple[str, ...]
    lowering: ClassVar[dict[str, str]]
    inlines_weights: bool = False
    kv: ClassVar[str] = "kv"
    plans: ClassVar[str] = ""
    needs = "compiler"
    install = ""
    caveat: str = ""
    fuses: ClassVar[bool] = True
    timeout_s = 3600.0
    compile_s: ClassVar[float] = 15.0
    module_bytes: ClassVar[int] = 600_000
    compiler_args: tuple[str, ...] = ()
    cores: int = 1

    @abstractmethod
    def runtime(self) -> dict[str, str]:
        """Return the library versions an artifact is tied to; a BackendUnavailable if one cannot be used."""

    @abstractmethod
    def target(self, requested: str | None) -> str:
        """Return what would be built for; a BackendUnavailable if this machine cannot build that."""

    @abstractmethod
    def compiler(self) -> dict[str, str] | None:
        """Return the versions of what generates code, or None if nothing here can compile."""

    @abstractmethod
    def compile(self, request: BuildRequest, workdir: Path) -> Artifact:
        """Compile one bucket, in a child; a BackendUnavailable if nothing here can, a CompileFailed if it fails."""

    @abstractmethod
    def open(self, artifact: Artifact, weights: Mapping[str, Tensor]) -> Opened:
        """Make verified bytes callable, with weights that have been checked."""

    def load(self, artifact: Artifact, interface: Interface, weights: Mapping[str, Tensor]) -> Executable:
        """Make an executable of verified bytes; weights, by canonical name, are kept and not copied.

        Raises:
            CorruptEntry: the artifact was not made for this interface or for these weights.
            IncompatibleEntry: it cannot be loaded here.
        """
        if (artifact.inputs, artifact.outputs) != (interface.inputs, interface.outputs):
            raise CorruptEntry("the compiled bucket takes or returns something else than its step")
        if artifact.weights or not self.inlines_weights:
            check_weights(artifact.weights, weights)
        opened = self.open(artifact, weights)
        return Executable(opened.run, interface, opened.close, opened.place)

    def flags(self) -> list[str]:
        """Return, in canonical order, what of the user's compiler flags can change what is compiled."""
        return []

    def versions(self) -> dict[str, str]:
        """Return all that a key says of this machine's software and settings, by name."""
        return {**self.runtime(), **(self.compiler() or {}), "flags": " ".join(self.flags())}

    def rounds(self) -> bool:
        """Whether what is compiled computes with less precision than its dtype has, because it was asked to."""
        return False

    def unmet(self, requires: Mapping[str, Any]) -> str | None:
        """Say in words what this machine lacks to run an artifact, or None if it has all."""
        return host.unmet(requires)

    def rank(self, target: str) -> int:
        """Order targets of entries that run here from most to least specialised: 0 is best."""
        order = [host.native(), *host.LEVELS]
        return order.index(target) if target in order else len(order)

    def capacity(self, target: str) -> int | None:
        """Return how many bytes of weights in buckets a device holds, or None if that bounds nothing."""
        return None

    def child_bytes(self, arch: Architecture, bucket: Bucket) -> int:
        """Return the host memory that compiling and checking one bucket may need, all processes together."""
        # Imports and C++ compiler; the gate's weights, in bfloat16 those too that they are compared with; where a step
        # keeps state, two copies of it over all positions; and what a forward of all rows holds at once.
        # Measured with torch 2.13, in GB, and what is allowed: demo 1x64 0.86 of 1.01, its decode 0.87 of 1.01;
        # gpt2 1x128 0.95 of 2.00, prefill 1x512 1.14 of 2.18, decode 8x128 2.28 of 3.51, prefill 8x1024 2.65 of 3.51.
        step = step_named(bucket.step)
        whole = Bucket(bucket.batch_size, arch.block_size, bucket.step)
        rows = bucket if step.opened_by == step.continued_by else whole
        state = sum(4 * math.prod(view.shape) for view in step.interface(arch, whole, "float32").state)
        forward = 4 * 3 * arch.n_inner * rows.batch_size * rows.seq_len
        return 1_000_000_000 + 2 * 4 * arch.n_params + 2 * state + forward

    def call_ms(self, arch: Architecture, dtype: str, target: str | None, bucket: Bucket) -> float:
        """Return what a call should take, in ms: to plan by, until it is measured."""
        item, step = 4 if dtype == "float32" else 2, step_named(bucket.step)
        state = sum(math.prod(view.shape) for view in step.interface(arch, bucket, dtype).state)
        moved = item * (arch.n_params + state)
        return _CALL_MS + 2 * step.macs(arch, bucket) / _GFLOP_PER_S / 1e6 + moved / _GB_PER_S / 1e6

    def assumptions(self, dtype: str, target: str | None) -> list[str]:
        """Say, a line each, what `call_ms` rests on."""
        return [
            f"a call computes {_GFLOP_PER_S:.0f} GFLOP/s, reads {_GB_PER_S:.0f} GB/s and costs {_CALL_MS} ms besides, "
            "as README's steps of GPT-2 do on two cores with AVX-512; a ladder depends on their ratios only"
        ]

    def rungs(self, block_size: int) -> list[int]:
        """Return the lengths that are worth considering for buckets, rising, block_size the last."""
        apart = max(1, min(8, block_size // 16), block_size // 128)
        return [*range(apart, block_size, apart), block_size]

    def findings(self) -> Iterator[Finding]:
        """Say, for `doctor`, what is here of this backend and what is wrong with it."""
        return iter(())

    def child_environment(self, request: BuildRequest) -> dict[str, str]:
        """Return what a compiling child needs in its environment from its start."""
        return {}
