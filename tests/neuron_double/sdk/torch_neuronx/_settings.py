"""What the environment says about the machine that the double plays. Read at each use, so that a test can change it.

The double's own variables:
    NEURON_DOUBLE_CORES: how many NeuronCores the host has; absent or 0 means no Neuron device and no driver.
    NEURON_DOUBLE_INSTANCE: the EC2 instance type, "trn1.2xlarge" unless given.
    NEURON_DOUBLE_STATE_DIR: a directory shared by the processes of one imagined host: core locks, record of compiles.
        Without it cores are private to each process.
    NEURON_DOUBLE_CORE_BYTES: device memory of each core, 16e9 unless given.
    NEURON_DOUBLE_LOAD_SECONDS: how long loading a model onto a core takes, 0 unless given.
    NEURON_DOUBLE_RUNTIME_MAX_CC: the newest compiler version whose NEFFs the runtime takes; any unless given.
    NEURON_DOUBLE_FAULT: comma list of faults, see FAULTS.
"""

from __future__ import annotations

import os
from pathlib import Path

COMPILER_FAULTS = {"compile-70", "compile-70-once", "compile-oom", "compile-abort", "compile-hang"}
# Planted in what is traced while they are set; the artifact stays wrong wherever it is run.
NUMERIC_FAULTS = {
    "split-miscompile",
    "int64-corruption",
    "nan-inf-mask",
    "wrong-gelu",
    "drop-mask",
    "scale-logits",
    "row-mix",
}
RUNTIME_FAULTS = {"load-corrupt", "outputs-on-host", "stale-handles", "sticky-state", "one-core"}
FAULTS = COMPILER_FAULTS | NUMERIC_FAULTS | RUNTIME_FAULTS

_ARCHITECTURES = {"trn1": "v2", "trn1n": "v2", "inf2": "v2", "trn2": "v3", "trn3": "v4"}
# Cores of one device (chip), for the names in messages; trn2 as two physical cores per logical one.
_CORES_PER_DEVICE = {"v2": 2, "v3": 4, "v4": 4}


def core_count() -> int:
    return int(os.environ.get("NEURON_DOUBLE_CORES", "0"))


def platform() -> str:
    """Return the family of the imagined instance, such as "trn1"."""
    return os.environ.get("NEURON_DOUBLE_INSTANCE", "trn1.2xlarge").split(".")[0]


def architecture() -> str:
    return _ARCHITECTURES[platform()]


def cores_per_device() -> int:
    return _CORES_PER_DEVICE[architecture()]


def state_dir() -> Path | None:
    value = os.environ.get("NEURON_DOUBLE_STATE_DIR")
    return Path(value) if value else None


def core_bytes() -> int:
    return int(float(os.environ.get("NEURON_DOUBLE_CORE_BYTES", "16e9")))


def load_seconds() -> float:
    return float(os.environ.get("NEURON_DOUBLE_LOAD_SECONDS", "0"))


def runtime_max_cc() -> str | None:
    return os.environ.get("NEURON_DOUBLE_RUNTIME_MAX_CC")


def faults() -> set[str]:
    """Return the faults asked for; a name that does not exist is the test's mistake."""
    asked = set(filter(None, os.environ.get("NEURON_DOUBLE_FAULT", "").split(",")))
    if asked - FAULTS:
        raise ValueError(f"<double> NEURON_DOUBLE_FAULT has unknown names: {sorted(asked - FAULTS)}")
    return asked
