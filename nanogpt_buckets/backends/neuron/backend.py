"""The Neuron backend: what names its buckets, what they need, the way to compiling and loading them, doctor's findings.

Weights are compiled in, so their digest is in the family and every bucket carries its own copy, on disk and on the
device. Without a device the compiler runs all the same; what it made is then checked when a device first loads it.

Knows nothing of the store, of plans, or of the gate. Imports neither torch nor torch_neuronx. Not hashed into any key.
Proof level N1: run against a test double, never on a device.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from nanogpt_buckets.backends import host
from nanogpt_buckets.backends.base import Artifact, Backend, BuildRequest, Opened
from nanogpt_buckets.backends.neuron import arguments, device, flags, package, predict
from nanogpt_buckets.contract import Contract
from nanogpt_buckets.errors import BackendUnavailable, BucketsError, UsageError
from nanogpt_buckets.findings import Finding, Verdict
from nanogpt_buckets.model.architecture import Architecture
from nanogpt_buckets.plan.bucket import Bucket
from nanogpt_buckets.steps import step_named
from nanogpt_buckets.values import shown, whole_number
from nanogpt_buckets.versions import installed

if TYPE_CHECKING:
    from torch import Tensor, nn

# AWS's own parallel compilation runs one worker per 64 GB of host memory, for models far larger than these.
_CHILD_BYTES = 16_000_000_000
_CHILD_WEIGHT_COPIES = 6
_CORE = "neuron_core"
# Planned for where nothing is said.
_USUAL = "trn1"
_PROOF = "N1: passes a test double of torch_neuronx, --strategy kv too; neither strategy has ever run on a device"
_CAVEAT = "--strategy kv on Neuron has proof level N1: it passes a test double, and has never run on a device"


@dataclass(frozen=True)
class NeuronBackend(Backend):
    """See `Backend`; a replica of every bucket is on each of `cores` NeuronCores."""

    compiler_args: tuple[str, ...] = ()
    cores: int = 1
    inlines_weights: bool = True

    name = "neuron"
    sources = ("backends/neuron/compile.py", "backends/neuron/flags.py")
    steps = ("recompute",)
    kv = "chunk"
    plans = "neuron"
    fuses = False  # as torch-xla writes out GELU
    lowering: ClassVar = {"attention": "explicit"}  # with a finite mask: -inf rows have become NaN on these devices
    needs = "neuronx-cc"
    install = package.INSTALL
    timeout_s = 4 * 3600.0
    compile_s = 40.0  # of one GPT-2 graph, as users of NxD Inference report
    module_bytes = 1_000_000

    def __post_init__(self) -> None:
        if not self.inlines_weights:
            object.__setattr__(self, "steps", ("recompute", "chunk"))
            object.__setattr__(self, "sources", (*self.sources, "steps/separate.py"))
            object.__setattr__(self, "caveat", _CAVEAT)
        arguments.parse(self.compiler_args)  # refuse what is no flag before anything else is done
        if (whole_number(self.cores) or 0) < 1:
            raise UsageError(f"cores is {shown(self.cores)}; it must be a whole number, 1 or more")

    def runtime(self) -> dict[str, str]:
        """Return the versions of torch and torch-neuronx: the file that trace saves belongs to both."""
        return {"torch": installed("torch") or "", "torch-neuronx": package.require(tensors=not self.inlines_weights)}

    def flags(self) -> list[str]:
        """Return what of the user's flags and environment can change what is compiled."""
        return arguments.named(self.compiler_args)

    def target(self, requested: str | None) -> str:
        """Return the canonical target to build for."""
        package.require(tensors=not self.inlines_weights)
        found = device.find()
        if found is not None and not found.readable:
            raise BackendUnavailable(
                "the Neuron device of this machine cannot be opened by this user",
                hint="in a container pass it on: --device /dev/neuron0",
            )
        return device.choose_target(requested)

    def compiler(self) -> dict[str, str] | None:
        """Return the version of neuronx-cc, which is released apart from torch-neuronx; None if it is not installed."""
        version = installed("neuronx-cc")
        return None if version is None else {"neuronx-cc": version}

    def capacity(self, target: str) -> int | None:
        """Return how many bytes of buckets fit on the core that runs them, or None if that is not documented."""
        return device.core_bytes(target)

    def child_bytes(self, arch: Architecture, bucket: Bucket) -> int:
        """Return the host memory one compilation may need."""
        return _CHILD_BYTES + _CHILD_WEIGHT_COPIES * 4 * arch.n_params

    def call_ms(self, arch: Architecture, dtype: str, target: str | None, bucket: Bucket) -> float:
        """Return what published numbers make of a call, in ms, its fixed cost at the least."""
        (found,) = predict.predict(arch, dtype, target or _USUAL, [bucket])
        return found.call_ms[0]

    def assumptions(self, dtype: str, target: str | None) -> list[str]:
        """Say, a line each, what `call_ms` rests on."""
        return predict.assumptions(dtype, target or _USUAL)

    def rungs(self, block_size: int) -> list[int]:
        """Return the lengths that kernels are tiled by: 64, and multiples of 128."""
        return [*(n for n in (64, *range(128, block_size, 128)) if n < block_size), block_size]

    def findings(self) -> Iterator[Finding]:
        """Say what is here of Neuron; without a device a lack is a fact, with one it is a problem."""
        found = device.find()
        yield _device(found)
        if found is not None and not device.has_driver():
            hint = "install aws-neuronx-dkms, then reboot"
            yield Finding("neuron", "driver", "the kernel has none loaded", Verdict.PROBLEM, hint)
        yield _packages(wanted=found is not None)
        for name in ("NEURON_CC_FLAGS", "NEURON_COMPILE_CACHE_URL"):
            if name in os.environ:
                hint = "flags are given by --compiler-args"
                yield Finding("neuron", name, "set, and not used here", Verdict.WARNING, hint)
        yield Finding("neuron", "proof", _PROOF)

    def child_environment(self, request: BuildRequest) -> dict[str, str]:
        """Return what a compiling child needs in its environment before it imports a Neuron library."""
        environment = {} if device.find() else {"NEURON_PLATFORM_TARGET_OVERRIDE": request.target}
        if "NEURON_RT_VISIBLE_CORES" not in os.environ:
            environment["NEURON_RT_NUM_CORES"] = "1"  # by default a process takes every core, until it ends
        return environment

    def compile(self, request: BuildRequest, workdir: Path) -> Artifact:
        """Trace the step; a UsageError, too, where flags are given that no key names."""
        from nanogpt_buckets.backends.neuron.compile import graph_with_weights

        if os.environ.get("NEURON_CC_FLAGS"):
            raise UsageError(
                "NEURON_CC_FLAGS is set where the compiler runs, and no key names it",
                hint="unset it there; flags are given by --compiler-args",
            )
        compiler = self.compiler()
        if compiler is None:
            raise BackendUnavailable("neuronx-cc is not installed", hint=package.INSTALL)
        arch, bucket = request.architecture, request.bucket
        graph: nn.Module
        weights: tuple[Contract, ...] = ()
        if request.weights_path is not None:
            graph, inputs = graph_with_weights(arch, bucket, request.lowering, request.weights_path)
        else:
            from nanogpt_buckets.steps.separate import graph_without_weights

            graph, inputs, weights = graph_without_weights(arch, bucket, request.lowering, request.dtype)
        words = flags.command(arguments.parse(request.compiler_args), request.target, compiler["neuronx-cc"])
        start = time.monotonic()
        content = _trace(graph, inputs, words, workdir)
        interface = step_named(bucket.step).interface(arch, bucket, request.dtype)
        return Artifact(
            blobs={"module": content},
            inputs=interface.inputs,
            outputs=interface.outputs,
            weights=weights,
            requires={_CORE: device.CORE_VERSIONS[request.target]},
            stats={"compile_ms": int(1000 * (time.monotonic() - start))},
        )

    def rounds(self) -> bool:
        """Whether the user's flags let the compiler cast float32 to something narrower."""
        return arguments.parse(self.compiler_args).get("--auto-cast", "none") != "none"

    def unmet(self, requires: Mapping[str, Any]) -> str | None:
        """Say what is lacking: the generation of cores it was compiled for, or what any host must have."""
        rest = {name: value for name, value in requires.items() if name != _CORE}
        return host.unmet(rest) or device.unmet(str(requires.get(_CORE)))

    def open(self, artifact: Artifact, weights: Mapping[str, Tensor]) -> Opened:
        """Load the module from exactly these bytes on the first `cores` cores."""
        from nanogpt_buckets.backends.neuron.load import open_module, open_separate

        if artifact.weights:
            return open_separate(artifact, weights, self.cores)
        return open_module(artifact.blobs["module"], self.cores)


def _trace(graph: nn.Module, inputs: tuple[Tensor, ...], words: list[str], workdir: Path) -> bytes:
    """Trace on the device, or without it where there is none or no core is free: whoever waits may hold them all."""
    from nanogpt_buckets.backends.neuron.compile import trace

    on_device, failed = device.find() is not None, False
    while True:
        place = workdir / f"neuron{'-device' * on_device}{'-again' * failed}"
        try:
            return trace(graph, inputs, words, place, on_device=on_device)
        except RuntimeError as error:
            if on_device and package.UNAVAILABLE in str(error):
                on_device = False
            elif package.UNAVAILABLE in str(error):
                raise package.not_initialised() from error
            elif failed or package.compiler_status(error) != package.COMPILER_ERROR:
                raise package.compile_failed(error) from error
            else:
                failed = True


def _device(found: device.Device | None) -> Finding:
    if found is None:
        return Finding("neuron", "device", "none")
    chips = f"{found.chips} chip{'s' if found.chips > 1 else ''}"
    text = f"{found.instance or 'of unknown kind'}, {chips}, {found.cores} cores"
    memory = device.core_bytes(found.target)
    text += f" with {memory / 1e9:.1f} GB for buckets each" if memory else ""
    if not found.readable:
        hint = "it cannot be opened; in a container: --device /dev/neuron0"
        return Finding("neuron", "device", text, Verdict.PROBLEM, hint)
    return Finding("neuron", "device", text)


def _packages(*, wanted: bool) -> Finding:
    try:
        version = package.require()
    except BucketsError as error:
        verdict = Verdict.PROBLEM if wanted else Verdict.OK
        return Finding("neuron", "packages", error.message, verdict, error.hint or "")
    compiler = installed("neuronx-cc")
    row = package.pairing(version, compiler)
    text = f"torch-neuronx {version}, neuronx-cc {compiler or 'not installed'}"
    if row is None:
        return Finding("neuron", "packages", f"{text}: of no SDK known here", Verdict.WARNING, package.INSTALL)
    text += f"; SDK {row.sdk}, Python {row.python}"
    if compiler is not None and not compiler.startswith(row.neuronx_cc):
        own = row.neuronx_cc[-1]
        hint = f"SDK {row.sdk} has neuronx-cc {own}: pip install --extra-index-url {package.INDEX} neuronx-cc=={own}"
        return Finding("neuron", "packages", text, Verdict.WARNING, hint)
    return Finding("neuron", "packages", text)
