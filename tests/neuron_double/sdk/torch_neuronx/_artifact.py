"""The tensor that holds an artifact inside a ScriptModule: 8 bytes of magic, 8 bytes of options, the NEFF.

It stands for the real `torch.classes.neuron.Model` object, whose state in a saved file is the NEFF's bytes.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

MAGIC = b"NEURONDB"
# Offsets of the options that are saved with the module (lazy_load, async_load and dynamic_batch documentation).
LAZY, ASYNC, DYNAMIC_BATCH = 8, 9, 10
_NEFF_AT = 16


def pack(neff: bytes) -> Tensor:
    return torch.frombuffer(bytearray(MAGIC + bytes(8) + neff), dtype=torch.uint8)


def unpack(blob: Tensor) -> tuple[dict[str, Any], bytes]:
    """Return the NEFF's header and its program."""
    neff = ctypes.string_at(blob.data_ptr(), blob.numel())[_NEFF_AT:]
    length = int.from_bytes(neff[4:8], "little")
    return json.loads(neff[8 : 8 + length]), neff[8 + length :]


def is_artifact(value: object) -> bool:
    return (
        isinstance(value, Tensor)
        and (value.device.type, value.dtype, value.dim()) == ("cpu", torch.uint8, 1)
        and value.numel() > _NEFF_AT
        and ctypes.string_at(value.data_ptr(), len(MAGIC)) == MAGIC
    )


def find(module: object) -> Iterator[Tensor]:
    """Yield the artifact of every compiled module inside `module`, which may be any nn.Module."""
    if isinstance(module, torch.nn.Module):
        for part in module.modules():
            blob = getattr(part, "model", None)
            if is_artifact(blob):
                yield blob
