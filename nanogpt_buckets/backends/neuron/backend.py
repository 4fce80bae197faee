"""torch_neuronx.trace: one bucket -> one TorchScript file that holds code and weights, run on one NeuronCore.

Weights are compiled in, so their digest is in the family and every bucket carries its own copy, on disk and on the
device. Without a device the compiler runs all the same; what it made is then checked when a device first loads it.

Knows nothing of the store, of plans, or of the gate. torch and torch_neuronx are imported inside functions, the latter
only in processes that compile or load. Proof level N1: run against a test double, never on a device.
"""

from __future__ import annotations

import io
import logging
import os
import queue
import re
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanogpt_buckets.backends.base import Artifact, Backend, BuildRequest, Executable, step_contract
from nanogpt_buckets.backends.neuron import device, flags, sdk
from nanogpt_buckets.contract import Contract, check_inputs
from nanogpt_buckets.errors import BackendUnavailable, CompileFailed, DeviceError, IncompatibleEntry
from nanogpt_buckets.model.architecture import Architecture

if TYPE_CHECKING:
    from torch import Tensor, nn

log = logging.getLogger(__name__)

# The compiler's own error, which at times is a passing one (aws-neuron-sdk issue 1369).
_COMPILER_ERROR = 70
_KILLED = -9
# All that the runtime says of any cause, be it the driver or another process.
_UNAVAILABLE = "could not be initialized"
# AWS's own parallel compilation runs one worker per 64 GB of host memory, for models far larger than these.
_CHILD_BYTES = 16_000_000_000
_CHILD_WEIGHT_COPIES = 6
# Where a replica is placed is a setting of the process, not of the thread.
_placing = threading.Lock()


@dataclass(frozen=True)
class NeuronBackend(Backend):
    """See `Backend`.

    Args:
        arguments: the user's compiler flags, in any spelling.
        cores: NeuronCores to put a replica of every bucket on.
    """

    arguments: tuple[str, ...] = ()
    cores: int = 1

    name = "neuron"
    sources = ("backends/base.py", "backends/neuron/backend.py", "backends/neuron/flags.py")
    inlines_weights = True
    needs = "neuronx-cc"
    install = sdk.INSTALL
    timeout_s = 4 * 3600.0

    def __post_init__(self) -> None:
        flags.parse(self.arguments)  # refuse what is no flag before anything else is done

    def runtime(self) -> dict[str, str]:
        """Return the versions of torch and torch-neuronx: the file that trace saves belongs to both.

        Raises:
            BackendUnavailable: torch-neuronx cannot be used.
        """
        return {"torch": sdk.installed("torch") or "", "torch-neuronx": sdk.require()}

    def lowering(self) -> dict[str, str]:
        """Return attention spelled out with a finite mask; -inf rows have become NaN on these devices."""
        return {"attention": "explicit"}

    def flags(self) -> list[str]:
        """Return what of the user's flags and environment can change what is compiled."""
        return flags.named(self.arguments)

    def target(self, requested: str | None) -> str:
        """Return the canonical target to build for.

        Raises:
            BackendUnavailable: torch-neuronx cannot be used, or the target cannot be built for here.
        """
        sdk.require()
        found = device.find()
        if found is not None and not found.readable:
            raise BackendUnavailable(
                "the Neuron device of this machine cannot be opened by this user",
                hint="in a container pass it on: --device /dev/neuron0",
            )
        return device.choose_target(requested)

    def compiler(self) -> dict[str, str] | None:
        """Return the version of neuronx-cc, which is released apart from torch-neuronx; None if it is not installed."""
        version = sdk.installed("neuronx-cc")
        return None if version is None else {"neuronx-cc": version}

    def capacity(self, target: str) -> int | None:
        """Return how many bytes of buckets fit on the core that runs them, or None if that is not documented."""
        return device.core_bytes(target)

    def child_bytes(self, arch: Architecture) -> int:
        """Return the host memory one compilation may need."""
        return _CHILD_BYTES + _CHILD_WEIGHT_COPIES * 4 * arch.n_params

    def child_environment(self, request: BuildRequest) -> dict[str, str]:
        """Return what a compiling child needs in its environment before it imports a Neuron library."""
        here = device.find()
        environment = {} if here else {"NEURON_PLATFORM_TARGET_OVERRIDE": request.target}
        if "NEURON_RT_VISIBLE_CORES" not in os.environ:
            environment["NEURON_RT_NUM_CORES"] = "1"  # by default a process takes every core, until it ends
        return environment

    def compile(self, request: BuildRequest, workdir: Path) -> Artifact:
        """Trace the step with its weights; runs in a child.

        Raises:
            BackendUnavailable: torch_neuronx cannot be imported or has no trace.
            CompileFailed: the compiler ended with an error, twice if the error may have been a passing one.
        """
        step, inputs = _step_with_weights(request)
        arguments = flags.command(request.arguments, request.target, self._compiler_version())
        start = time.monotonic()
        module = _trace(step, inputs, arguments, workdir)
        content = _saved(module)
        compile_ms = int(1000 * (time.monotonic() - start))
        contract, _ = step_contract(step, request.bucket)
        B, V = request.bucket.batch_size, request.architecture.vocab_size
        return Artifact(
            blobs={"module": content},
            inputs=contract,
            outputs=(Contract("logits", "float32", (B, V)),),
            weights=(),
            requires={"neuron_core": device.core_version(request.target)},
            stats={"compile_ms": compile_ms},
        )

    def rounds(self) -> bool:
        """Whether the user's flags let the compiler cast float32 to something narrower."""
        return flags.parse(self.arguments).get("--auto-cast", "none") != "none"

    def can_check(self, artifact: Artifact) -> bool:
        """Whether this machine has a device that can run it."""
        return device.unmet(str(artifact.requires.get("neuron_core"))) is None

    def load(self, artifact: Artifact, weights: Mapping[str, Tensor]) -> Executable:
        """Load the module from exactly these bytes on the first `cores` cores; `weights` are inside already."""
        replicas = [_load(artifact.blobs["module"], core, self.cores) for core in range(self.cores)]
        return NeuronExecutable(replicas, artifact)

    def _compiler_version(self) -> str:
        version = sdk.installed("neuronx-cc")
        if version is None:
            raise BackendUnavailable("neuronx-cc is not installed", hint=sdk.INSTALL)
        return version


class NeuronExecutable:
    """The same module on one or more NeuronCores; calls from several threads run on different cores.

    Args:
        replicas: what torch.jit.load returned, one per core.
        artifact: the contracts of inputs and outputs.
    """

    def __init__(self, replicas: Sequence[Any], artifact: Artifact) -> None:
        self._idle: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for replica in replicas:
            self._idle.put(replica)
        self._inputs, self._outputs = artifact.inputs, artifact.outputs

    def __call__(self, input_ids: Tensor, last_index: Tensor) -> Tensor:
        """Run the step on a core that is idle; see `Executable`. The device itself would not mind a wrong id."""
        import torch

        check_inputs(self._inputs, input_ids, last_index, self._outputs[0].shape[-1])
        replica = self._idle.get()
        try:
            with torch.inference_mode():
                logits: Tensor = replica(input_ids, last_index)
        except RuntimeError as error:
            raise DeviceError(f"the Neuron device did not run the step: {_last_line(error)}") from error
        finally:
            self._idle.put(replica)
        if tuple(logits.shape) != self._outputs[0].shape or logits.dtype != torch.float32:
            raise DeviceError(f"the Neuron device returned {logits.dtype} {tuple(logits.shape)}, not float32 logits")
        return logits

    def close(self) -> None:
        """Let go of the modules; their cores stay with this process until it ends."""
        self._idle = queue.SimpleQueue()


def library() -> Any:
    """Import torch_neuronx, the one with trace.

    Raises:
        BackendUnavailable: it cannot be imported, or is the native package.
    """
    try:
        import torch_neuronx
    except ImportError as error:
        raise BackendUnavailable(f"torch_neuronx cannot be imported: {_last_line(error)}", hint=sdk.INSTALL) from error
    if not hasattr(torch_neuronx, "trace"):
        raise BackendUnavailable(
            "the torch_neuronx that is installed is the native package, which has no trace", hint=sdk.INSTALL
        )
    return torch_neuronx


def _step_with_weights(request: BuildRequest) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    import safetensors.torch

    from nanogpt_buckets.model.gpt import Lowering, from_weights
    from nanogpt_buckets.steps import NeuronStep, example_inputs

    assert request.weights is not None, "this backend compiles weights in"
    weights = safetensors.torch.load_file(request.weights)
    step = NeuronStep(from_weights(request.architecture, weights, Lowering(**request.lowering))).eval()
    return step, example_inputs(request.bucket.batch_size, request.bucket.seq_len)


def _trace(step: nn.Module, inputs: tuple[Tensor, Tensor], arguments: Sequence[str], workdir: Path) -> Any:
    """Trace once, and once more if the compiler's error may have been a passing one."""
    for attempt in ("first", "second"):
        try:
            return _trace_once(step, inputs, arguments, workdir / f"neuron-{attempt}")
        except RuntimeError as error:
            if _UNAVAILABLE in str(error):
                raise _not_initialised() from error
            status = _status(error)
            if status == _COMPILER_ERROR and attempt == "first":
                continue
            raise _compile_failed(error, status) from error
    raise AssertionError


def _trace_once(step: nn.Module, inputs: tuple[Tensor, Tensor], arguments: Sequence[str], workdir: Path) -> Any:
    import torch

    torch_neuronx = library()
    # what is traced need not take a core here: the gate loads what was saved
    idle = getattr(torch_neuronx.contexts, "disable_nrt_load", nullcontext)
    with torch.no_grad(), _quiet(), idle():
        return torch_neuronx.trace(
            step,
            inputs,
            compiler_workdir=str(workdir),
            compiler_args=list(arguments),
            cpu_backend=device.find() is None,
        )


def _status(error: RuntimeError) -> int | None:
    """Return the compiler's exit status, which trace tells in words only."""
    found = re.search(r"neuronx-cc failed with (-?\d+)", str(error))
    return int(found[1]) if found else None


def _compile_failed(error: RuntimeError, status: int | None) -> CompileFailed:
    if status == _KILLED:
        return CompileFailed("neuronx-cc was killed, most likely for want of memory", hint="try fewer --jobs")
    if status is not None:
        what = "twice with its error" if status == _COMPILER_ERROR else "with"
        return CompileFailed(f"neuronx-cc ended {what} {status}", hint="-v shows what it said last")
    return CompileFailed(f"torch_neuronx.trace failed: {_last_line(error)}", hint="-v shows what it said last")


def _saved(module: Any) -> bytes:
    import torch

    buffer = io.BytesIO()
    with _quiet():
        torch.jit.save(module, buffer)
    return buffer.getvalue()


def _load(content: bytes, core: int, cores: int) -> Any:
    """Load a saved module on one core; the runtime would deal modules out to all of them.

    Raises:
        BackendUnavailable: the runtime cannot be initialised.
        IncompatibleEntry: it will not load this module.
    """
    import torch

    # before the library wakes the runtime: without a word it would take every core of the machine
    if not {"NEURON_RT_VISIBLE_CORES", "NEURON_RT_NUM_CORES"} & os.environ.keys():
        os.environ["NEURON_RT_NUM_CORES"] = str(cores)
    torch_neuronx = library()
    place = getattr(torch_neuronx, "neuron_cores_context", None) or torch_neuronx.experimental.neuron_cores_context
    try:
        with _placing, place(start_nc=core, nc_count=1), _quiet():
            return torch.jit.load(io.BytesIO(content))  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError) as error:
        if _UNAVAILABLE in str(error):
            raise _not_initialised() from error
        raise IncompatibleEntry(
            f"the Neuron runtime does not load the compiled module: {_last_line(error)}",
            hint="update aws-neuronx-runtime-lib to that of the SDK it was compiled with, or build here",
        ) from error


def _not_initialised() -> BackendUnavailable:
    """Say why the runtime did not start; it says the same words in every case."""
    if device.find() is None:
        return BackendUnavailable("this machine has no Neuron device", hint="run on a trn1 or inf2 instance")
    if not device.has_driver():
        return BackendUnavailable("the Neuron driver is not loaded", hint="install aws-neuronx-dkms, then reboot")
    return BackendUnavailable(
        "no NeuronCore is free for this process, or the driver is older than the runtime",
        hint="neuron-ls shows who holds the cores; NEURON_RT_VISIBLE_CORES chooses others; doctor shows the versions",
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the deprecation of TorchScript to ourselves: the trace interface knows nothing else."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=UserWarning)
        yield


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
