"""torch_neuronx itself: importing it, keeping it quiet, and what its errors mean.

Knows nothing of compiling or loading. Not hashed into any key. Proof level N1: a test double says these words, which
are those of documentation and issue threads.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from nanogpt_buckets.backends.neuron import device, sdk
from nanogpt_buckets.errors import BackendUnavailable, CompileFailed

# All that the runtime says of any cause, be it the driver or another process.
UNAVAILABLE = "could not be initialized"
# The compiler's own error, which at times is a passing one (aws-neuron-sdk issue 1369).
COMPILER_ERROR = 70
_KILLED = -9


def package() -> Any:
    """Import torch_neuronx, the one with trace.

    Raises:
        BackendUnavailable: it cannot be imported, or is the native package.
    """
    try:
        import torch_neuronx
    except ImportError as error:
        raise BackendUnavailable(f"torch_neuronx cannot be imported: {last_line(error)}", hint=sdk.INSTALL) from error
    if not hasattr(torch_neuronx, "trace"):
        raise BackendUnavailable(
            "the torch_neuronx that is installed is the native package, which has no trace", hint=sdk.INSTALL
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
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=UserWarning)
        yield


def last_line(error: BaseException) -> str:
    """Return the last line of what an error says that is not blank."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
