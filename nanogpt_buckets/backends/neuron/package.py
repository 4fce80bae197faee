"""Neuron's packages: which are installed, whether they go together, and torch_neuronx itself - import, noise, errors.

What is installed is read from metadata only: importing torch_neuronx is left to the processes that compile or load.
Knows nothing of compiling or loading. Not hashed into any key.

Source: AWS Neuron documentation, release manifests up to SDK 2.33 (October 2026). Proof level of these N0: none was
installed; of the errors N1: a test double says these words, which are those of documentation and issue threads.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from nanogpt_buckets.backends.neuron import device
from nanogpt_buckets.errors import BackendUnavailable, CompileFailed
from nanogpt_buckets.versions import installed, version_tuple

INDEX = "https://pip.repos.neuron.amazonaws.com"
INSTALL = f"pip install --extra-index-url {INDEX} 'torch-neuronx>=2.9,<2.10' neuronx-cc"
_REINSTALL = INSTALL.replace("pip install", "pip install --force-reinstall")
# The first release whose trace can compile without a device, and the first that no longer has trace.
_OLDEST, _NATIVE = (2, 5), (2, 10)
# After torch's three numbers: SDK 2.28's, the first whose documentation has tensors on cores.
_TENSORS = (2, 12)
# All that the runtime says of any cause, be it the driver or another process.
UNAVAILABLE = "could not be initialized"
# The compiler's own error, which at times is a passing one (aws-neuron-sdk issue 1369).
COMPILER_ERROR = 70
_KILLED = -9


@dataclass(frozen=True)
class Pairing:
    """One SDK release: beginnings of the versions that AWS publishes and tests together, and Pythons with wheels."""

    sdk: str
    torch_neuronx: tuple[str, ...]
    neuronx_cc: tuple[str, ...]
    python: str


PAIRINGS = (
    Pairing("2.33", ("2.9.0.2.15.32035",), ("2.28.7631.0",), "3.11 to 3.13"),
    Pairing("2.32", ("2.9.0.2.15.32035",), ("2.27.5334.0",), "3.11 to 3.13"),
    Pairing("2.31", ("2.9.0.2.15.32035",), ("2.26.6360.0",), "3.11 to 3.13"),
    Pairing("2.30", ("2.9.0.2.14.27725",), ("2.25.3371.0",), "3.11 to 3.13"),
    Pairing("2.29", ("2.9.0.2.13.24727", "2.9.0.2.13.26312"), ("2.24.5133.0", "2.24.8799.0"), "3.10 to 3.12"),
    Pairing("2.28", ("2.9.0.2.12.22436", "2.8.0.2.12.22436", "2.7.0.2.12.22436"), ("2.23.6484.0",), "3.10 to 3.12"),
    Pairing("2.27", ("2.9.0.2.11.19912", "2.8.0.2.11.19912", "2.7.0.2.11.19912"), ("2.22.12471.0",), "3.10 to 3.12"),
    Pairing("2.26", ("2.8.0.2.10.", "2.7.0.2.10.", "2.6.0.2.10."), ("2.21.18209", "2.21.33363"), "3.9 to 3.11"),
    Pairing("2.25", ("2.7.0.2.9.9357", "2.6.0.2.9.9357"), ("2.20.9961.0",), "3.9 to 3.11"),
    Pairing("2.24", ("2.7.0.2.8.6734", "2.6.0.2.8.6734", "2.5.1.2.8.6734"), ("2.19.8089.0",), "3.9 to 3.11"),
    Pairing("2.23", ("2.6.0.2.7.5413", "2.5.1.2.7.5413"), ("2.18.121.0",), "3.9 to 3.11"),
    Pairing("2.22", ("2.5.1.2.6.0",), ("2.17.194.0",), "3.9 to 3.11"),
)


def pairing(torch_neuronx: str, neuronx_cc: str | None) -> Pairing | None:
    """Return the SDK release that has both versions, or, without such, the newest that has this torch-neuronx."""
    known = [row for row in PAIRINGS if torch_neuronx.startswith(row.torch_neuronx)]
    exact = [row for row in known if neuronx_cc and neuronx_cc.startswith(row.neuronx_cc)]
    return next(iter(exact or known), None)


def require(*, tensors: bool = False) -> str:
    """Return the version of torch-neuronx.

    Args:
        tensors: on cores, that is; they are needed, too.

    Raises:
        BackendUnavailable: it is not here, cannot work with what else is installed, or has no such tensors.
    """
    version = installed("torch-neuronx")
    if version is None:
        raise BackendUnavailable("the Neuron backend needs torch-neuronx, which is not installed", hint=INSTALL)
    name, numbers, torch = f"torch-neuronx {version}", version_tuple(version), installed("torch") or "0"
    if numbers < (1, 13):
        fault = f"{name} is a placeholder of the public index, not AWS's package"
    elif numbers >= _NATIVE:
        fault = f"{name} is the native package, which has no trace to compile ahead of time with"
    elif numbers < _OLDEST:
        fault = f"{name} is older than this release supports"
    elif version_tuple(torch)[:2] != numbers[:2]:
        fault = f"torch {torch} does not go with {name}, which is for torch {numbers[0]}.{numbers[1]}"
    elif tensors and numbers[3:5] < _TENSORS:
        fault = f"{name} has no tensors on the device, which --strategy kv needs and SDK 2.28 brought"
    else:
        return version
    raise BackendUnavailable(fault, hint=_REINSTALL)


def package() -> Any:
    """Import torch_neuronx, the one with trace; a BackendUnavailable if that is not what is here."""
    try:
        import torch_neuronx
    except ImportError as error:
        raise BackendUnavailable(f"torch_neuronx cannot be imported: {last_line(error)}", hint=INSTALL) from error
    if not hasattr(torch_neuronx, "trace"):
        raise BackendUnavailable(
            "the torch_neuronx that is installed is the native package, which has no trace", hint=INSTALL
        )
    return torch_neuronx


def not_initialised() -> BackendUnavailable:
    """Say why the runtime did not start; it says the same words in every case."""
    if device.find() is None:
        return BackendUnavailable("this machine has no Neuron device", hint="run on a trn1 or inf2 instance")
    if not device.has_driver():
        return BackendUnavailable("the Neuron driver is not loaded", hint="install aws-neuronx-dkms, then reboot")
    return BackendUnavailable(
        "no NeuronCore is free for this process, or the driver is older than the runtime",
        hint="neuron-ls shows who holds the cores; NEURON_RT_VISIBLE_CORES chooses others; doctor shows the versions",
    )


def compiler_status(error: RuntimeError) -> int | None:
    """Return the compiler's exit status, which trace tells in words; None if something else failed."""
    found = re.search(r"neuronx-cc failed with (-?\d+)", str(error))
    return int(found[1]) if found else None


def compile_failed(error: RuntimeError) -> CompileFailed:
    """Say in one sentence why trace failed."""
    status = compiler_status(error)
    if status == _KILLED:
        return CompileFailed("neuronx-cc was killed, most likely for want of memory", hint="try fewer --jobs")
    if status is not None:
        what = "twice with its error" if status == COMPILER_ERROR else "with"
        return CompileFailed(f"neuronx-cc ended {what} {status}", hint="-v shows what it said last")
    return CompileFailed(f"torch_neuronx.trace failed: {last_line(error)}", hint="-v shows what it said last")


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the deprecation of TorchScript to ourselves: the trace interface knows nothing else."""
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning, UserWarning):
            warnings.simplefilter("ignore", category)
        yield


def last_line(error: BaseException) -> str:
    """Return the last line of what an error says that is not blank."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
