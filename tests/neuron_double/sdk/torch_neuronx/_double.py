"""What tests ask of the double: nothing here exists in the real package."""

from __future__ import annotations

import gc
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch

from torch_neuronx import _artifact, _models, _ops, _settings, contexts, utils
from torch_neuronx._runtime import RUNTIME


class Loaded(NamedTuple):
    """One copy of a model on one core.

    Attributes:
        core: the host's number of the core.
        name: the class of the module that was traced.
        nbytes: device memory it takes: the size of the artifact.
    """

    core: int
    name: str
    nbytes: int


def loaded() -> list[Loaded]:
    """Return what is on this process's cores now."""
    names = {model.key: model.header["metaneff"]["name"] for model in _models.all_models()}
    return [Loaded(core.number, names[key], nbytes) for core in RUNTIME.cores for key, nbytes in core.models.items()]


def reserved() -> list[int]:
    """Return the cores that this process holds."""
    return [core.number for core in RUNTIME.cores]


def executions() -> dict[int, int]:
    """Return how often each core has run a model."""
    return {core.number: core.executions for core in RUNTIME.cores if core.executions}


def compiles() -> list[dict[str, Any]]:
    """Return every compile that NEURON_DOUBLE_STATE_DIR has seen, by any process: {"pid": ..., "flags": {...}}."""
    state = _settings.state_dir()
    if state is None or not (state / "compiles.jsonl").exists():
        return []
    return [json.loads(line) for line in (state / "compiles.jsonl").read_text().splitlines()]


def artifact(module: torch.nn.Module | str | Path) -> dict[str, Any]:
    """Return the NEFF header in a compiled module, or in a file, without loading it onto a core.

    Keys: arch, target, compiler, flags, lnc, metaneff (name, inputs, outputs, weights, aliases).
    """
    if isinstance(module, str | Path):
        with contexts.disable_nrt_load(), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit is deprecated
            module = torch.jit.load(str(module))
    return _artifact.unpack(next(_artifact.find(module)))[0]


def reset() -> None:
    """Be as after import: no core is held, nothing is loaded, NEURON_PLATFORM_TARGET_OVERRIDE is read again."""
    RUNTIME.end()
    _models.forget_all()
    utils._OVERRIDE = os.environ.get("NEURON_PLATFORM_TARGET_OVERRIDE")


def uninstall() -> None:
    """Undo the import, so that this process is again one without torch_neuronx."""
    reset()
    gc.collect()  # while what its tensors are made of is still there
    _ops.uninstall()
    for name in [
        name for name in sys.modules if name.partition(".")[0] in ("torch_neuronx", "neuronxcc", "libneuronxla")
    ]:
        del sys.modules[name]
