"""Context managers of the real `torch_neuronx.contexts`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch_neuronx import _models


@contextmanager
def disable_nrt_load() -> Iterator[None]:
    """Let compiled modules be loaded from files, wrapped and saved on a host without a runtime."""
    _models.disable(1)
    try:
        yield
    finally:
        _models.disable(-1)
