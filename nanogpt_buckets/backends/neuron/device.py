"""Which Neuron device this machine has, found in files only: asking Neuron's own libraries would reserve its cores.

Knows nothing of installed packages, nor of compiling. Proof level N1: files laid out by tests; memory and cores are N0.

Source: AWS Neuron documentation (runtime configuration guide, device memory); the files are those that Hugging Face's
optimum-neuron reads (Apache-2.0).
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from nanogpt_buckets.errors import BackendUnavailable

# Where /dev, /proc and /sys are found; tests look elsewhere.
ROOT = Path("/")
TARGETS = ("trn1", "inf2", "trn1n", "trn2", "trn3")
# The name under which code is built and kept: inf2 and trn1n have trn1's cores, and so on.
_CANONICAL = {
    "trn1": "trn1", "inf2": "trn1", "trn1n": "trn1", "trn2": "trn2", "trn2u": "trn2", "trn3": "trn3", "trn3u": "trn3",
}  # fmt: skip
# Canonical target -> the generation of its cores, which compiled code is tied to.
CORE_VERSIONS = {"trn1": "v2", "trn2": "v3", "trn3": "v4"}
_CORES_PER_CHIP = {"trn1": 2, "trn2": 4}
_CORE_BYTES = {"trn1": 16_000_000_000, "trn2": 24_000_000_000}
# Microcode that every core holds.
_CORE_RESERVED_BYTES = 96_000_000


@dataclass(frozen=True)
class Device:
    """The Neuron device of this machine; its EC2 instance type and canonical target are "" where not known."""

    instance: str
    chips: int
    readable: bool
    target: str

    @property
    def cores(self) -> int:
        """NeuronCores, as programs count them; 0 if that is not known."""
        per_chip = _CORES_PER_CHIP.get(self.target, 0)
        if self.target == "trn2" and os.environ.get("NEURON_LOGICAL_NC_CONFIG") == "1":
            per_chip *= 2
        return self.chips * per_chip


def find() -> Device | None:
    """Return this machine's Neuron device, or None."""
    nodes = sorted(path for path in (ROOT / "dev").glob("neuron*") if re.fullmatch(r"neuron\d+", path.name))
    if not nodes:
        return None
    instance = _read("sys/devices/virtual/dmi/id/product_name").strip()
    override = os.environ.get("NEURON_PLATFORM_TARGET_OVERRIDE", "")
    target = _CANONICAL.get(instance.split(".")[0]) or _CANONICAL.get(override, "")
    readable = all(os.access(node, os.R_OK | os.W_OK) for node in nodes)
    return Device(instance, len(nodes), readable, target)


def has_driver() -> bool:
    """Whether the kernel has Neuron's driver loaded."""
    return re.search(r"^\s*\d+ neuron$", _read("proc/devices"), re.MULTILINE) is not None


def _read(name: str) -> str:
    try:
        return (ROOT / name).read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""


def is_neuron(target: str | None) -> bool:
    """Whether a target's name looks like one of Neuron's, also one this release does not know."""
    return re.match(r"(trn|inf)\d", target or "") is not None


def canonical(target: str) -> str | None:
    """Return the name under which a target's code is built and kept, or None if it is no target."""
    return _CANONICAL.get(target)


def core_bytes(target: str) -> int | None:
    """Return the memory that buckets can use on one core of a canonical target, or None if it is not documented."""
    total = _CORE_BYTES.get(target)
    return None if total is None else total - _CORE_RESERVED_BYTES


def unmet(version: str) -> str | None:
    """Say why this machine cannot run code for a generation of cores, or None if it can."""
    device = find()
    own = CORE_VERSIONS.get(device.target) if device else None
    found = own or ("an unknown device" if device else "no Neuron device")
    return None if own == version else f"needs a NeuronCore-{version}, this machine has {found}"


def choose_target(requested: str | None) -> str:
    """Return the canonical target to build for: the one asked for, or this machine's.

    Raises:
        BackendUnavailable: unknown, not this device's, or nothing was asked for and there is no device.
    """
    device = find()
    own = device.target if device else ""
    if requested is None and not own:
        lack = "the Neuron device here is unknown" if device else "this machine has no Neuron device"
        raise BackendUnavailable(f"{lack}, so say what to build for", hint="for example --target trn1 or inf2")
    target = own if requested is None else canonical(requested)
    if target is None:
        said = f"target {requested!r} is not one that torch_neuronx.trace builds for"
        raise BackendUnavailable(said, hint=f"targets: {', '.join(TARGETS)}")
    if device and own not in ("", target):
        raise BackendUnavailable(
            f"this machine is a {device.instance or own}, and builds for {own} only, not {target}",
            hint=f"build for {target} there, or on a machine without a Neuron device",
        )
    return target
