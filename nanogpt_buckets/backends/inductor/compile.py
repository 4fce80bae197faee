"""One step, one shape -> one bare shared library that holds no weights. This file is hashed into every family.

Weights are given at load, so one compiled bucket serves every fine-tune. Code generation is pinned to a named
instruction-set level instead of inherited from the building machine.

Knows nothing of the store, of plans, of loading or of the gate. torch is imported inside functions: naming a key needs
none.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nanogpt_buckets.errors import CompileFailed
from nanogpt_buckets.model.architecture import Architecture
from nanogpt_buckets.plan.bucket import Bucket
from nanogpt_buckets.steps import step_named

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from nanogpt_buckets.steps.graph import Graph

# Vector width in bits that goes with each level (1 is scalar code), and what Inductor may believe the CPU has.
_SIMDLEN = {"x86-64-v4": 512, "x86-64-v3": 256, "x86-64-v2": 1}
_ISA_NAMES = {"x86-64-v4": ["avx2", "avx512"], "x86-64-v3": ["avx2"], "x86-64-v2": []}


def weightless_graph(
    arch: Architecture, bucket: Bucket, dtype: str, lowering: Mapping[str, str]
) -> tuple[Graph, tuple[Tensor, ...]]:
    """Return the step with uninitialised storage, for shapes are all the compiler needs, and inputs of zeros."""
    import torch

    from nanogpt_buckets.model.gpt import GPT, Lowering

    step = step_named(bucket.step)
    with torch.device("meta"):
        graph = step.graph(GPT(arch, Lowering(**lowering)))
    graph = graph.to(getattr(torch, dtype)).to_empty(device="cpu").eval().requires_grad_(False)
    return graph, step.pack([], bucket)


def compile_library(graph: Graph, inputs: tuple[Tensor, ...], target: str, workdir: Path) -> Path:
    """Export and compile; the sources, with the compiler's command lines, are left in `workdir`.

    Raises:
        CompileFailed: the compiler made no library, or not the weightless kind.
    """
    import torch
    from torch import _inductor

    _pin_instruction_set(target)
    output = workdir / "library.so"
    options = {
        "aot_inductor.output_path": str(output),
        "aot_inductor.package_constants_in_so": False,
        "cpp.dynamic_threads": True,  # a one-thread child otherwise compiles OpenMP out for ever
        "freezing": False,  # frozen weights would be baked in
        # a header compiled for one bucket is used once, and making it needs an openssl program
        "aot_inductor.precompile_headers": False,
        **({"cpp.march": target, "cpp.simdlen": _SIMDLEN[target]} if target in _SIMDLEN else {}),
    }
    with torch.no_grad():
        program = torch.export.export(graph, inputs, strict=False)
        made = _inductor.aot_compile(program.module(), inputs, options=options)  # type: ignore[arg-type,unused-ignore]
    if made != str(output) or not output.is_file():
        raise CompileFailed(f"the compiler made {made!r}, not one library")
    return output


def _pin_instruction_set(target: str) -> None:
    """Let Inductor see exactly the level's vector units, not this host's: it adds options for any other it finds.

    Its trial compilations (2 s each) are left out: the host was asked for the level, and the gate runs the result.
    """
    if target not in _ISA_NAMES:
        return
    import torch
    from torch._inductor import cpu_vec_isa

    cpu_vec_isa.x86_isa_checker = lambda: _ISA_NAMES[target]
    cpu_vec_isa.VecISA.check_build = lambda self, code: True  # type: ignore[method-assign,unused-ignore]
    torch.cpu._is_avx512_bf16_supported = lambda: False
