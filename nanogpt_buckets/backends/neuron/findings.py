"""What `doctor` finds of Neuron on this machine: device, driver, packages and which SDK they are of.

Knows nothing of compiling or loading. Not hashed into any key.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from nanogpt_buckets.backends.neuron import device, sdk
from nanogpt_buckets.errors import BucketsError
from nanogpt_buckets.findings import Finding, Verdict
from nanogpt_buckets.versions import installed


def findings() -> Iterator[Finding]:
    """Say what is here of Neuron; without a device a lack is a fact, with one it is a problem."""
    found = device.find()
    yield _neuron_device(found)
    if found is not None and not device.has_driver():
        hint = "install aws-neuronx-dkms, then reboot"
        yield Finding("neuron", "driver", "the kernel has none loaded", Verdict.PROBLEM, hint)
    yield _neuron_packages(wanted=found is not None)
    for name in ("NEURON_CC_FLAGS", "NEURON_COMPILE_CACHE_URL"):
        if name in os.environ:
            yield Finding(
                "neuron", name, "set, and not used here", Verdict.WARNING, "flags are given by --compiler-args"
            )
    yield Finding("neuron", "proof", "N1: passes a test double of torch_neuronx; it has never run on a device")


def _neuron_device(found: device.Device | None) -> Finding:
    if found is None:
        return Finding("neuron", "device", "none")
    chips = f"{found.chips} chip{'s' if found.chips > 1 else ''}"
    text = f"{found.instance or 'of unknown kind'}, {chips}, {found.cores} cores"
    memory = device.core_bytes(found.target)
    text += f" with {memory / 1e9:.1f} GB for buckets each" if memory else ""
    if not found.readable:
        return Finding(
            "neuron", "device", text, Verdict.PROBLEM, "it cannot be opened; in a container: --device /dev/neuron0"
        )
    return Finding("neuron", "device", text)


def _neuron_packages(*, wanted: bool) -> Finding:
    try:
        version = sdk.require()
    except BucketsError as error:
        verdict = Verdict.PROBLEM if wanted else Verdict.OK
        return Finding("neuron", "packages", error.message, verdict, error.hint or "")
    compiler = installed("neuronx-cc")
    row = sdk.pairing(version, compiler)
    text = f"torch-neuronx {version}, neuronx-cc {compiler or 'not installed'}"
    if row is None:
        return Finding("neuron", "packages", f"{text}: of no SDK known here", Verdict.WARNING, sdk.INSTALL)
    text += f"; SDK {row.sdk}, Python {row.python}"
    if compiler is not None and not compiler.startswith(row.neuronx_cc):
        hint = (
            f"SDK {row.sdk} has neuronx-cc {row.neuronx_cc[-1]}: pip install --extra-index-url {sdk.INDEX} neuronx-cc=="
        )
        return Finding("neuron", "packages", text, Verdict.WARNING, hint + row.neuronx_cc[-1])
    return Finding("neuron", "packages", text)
