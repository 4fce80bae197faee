"""A shared library's verified bytes and the weights -> something that can be called.

Knows nothing of how the library was made. torch is imported inside functions. Not hashed into any key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nanogpt_buckets.backends.base import Opened
from nanogpt_buckets.backends.memfile import library_path
from nanogpt_buckets.errors import IncompatibleEntry

if TYPE_CHECKING:
    from torch import Tensor


def open_library(content: bytes, weights: Mapping[str, Tensor]) -> Opened:
    """Load a library from exactly these bytes and bind weights that fit it.

    Raises:
        IncompatibleEntry: torch cannot load it.
    """
    from torch._C._aoti import AOTIModelContainerRunnerCpu  # type: ignore[import-not-found,unused-ignore]

    from nanogpt_buckets.steps.graph import canonical_name

    try:
        runner: Any = AOTIModelContainerRunnerCpu(library_path(content), 1)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise IncompatibleEntry(f"the compiled library cannot be loaded here: {reason}") from error
    names = runner.get_constant_names_to_original_fqns()
    # the library keeps pointers into these tensors, so they must live as long as it does
    held = [runner, {constant: weights[canonical_name(name)] for constant, name in names.items()}]
    runner.update_constant_buffer(held[1], False, False, True)

    def run(*tensors: Tensor) -> Sequence[Tensor]:
        outputs: list[Tensor] = held[0].run(list(tensors))
        return outputs

    return run, held.clear
