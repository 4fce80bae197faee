"""The part of the real `torch_neuronx.utils` that tells where one is."""

from __future__ import annotations

import os

from torch_neuronx import _settings

# Read once: the variable has to be set before any Neuron library is imported.
_OVERRIDE = os.environ.get("NEURON_PLATFORM_TARGET_OVERRIDE")
_GENERATIONS = {"gen2": "trn1", "gen3": "trn2", "gen4": "trn3"}


def get_platform_target() -> str:
    """Return "trn1", "inf2", "trn2" or "trn3".

    Raises:
        RuntimeError: this is no Neuron instance and NEURON_PLATFORM_TARGET_OVERRIDE was not set.
    """
    if _OVERRIDE:
        return _GENERATIONS.get(_OVERRIDE, _OVERRIDE)
    if not _settings.core_count():
        raise RuntimeError(
            "Unable to read platform target. If running on CPU, please supply compiler argument target, with one of "
            'options trn1, inf2, trn1n, or trn2. Ex: "--target trn1"'
        )
    return _settings.platform()
