"""One step, one shape -> one bare shared library that holds no weights. This file is hashed into every family.

Weights are given at load, so one compiled bucket serves every fine-tune. Code generation is pinned to a named
instruction-set level instead of inherited from the building machine.

Knows nothing of the store, of plans, of loading or of the gate. torch is imported inside functions: naming a key needs
none.
"""

from __future__ import annotations

import functools
import os
import shlex
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

from nanogpt_buckets.errors import CompileFailed
from nanogpt_buckets.model.architecture import Architecture
from nanogpt_buckets.plan.bucket import Bucket
from nanogpt_buckets.steps import step_named

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor, nn

    from nanogpt_buckets.steps.graph import Graph

# Vector width in bits that goes with each level (1 is scalar code), and what Inductor may believe the CPU has.
_SIMDLEN = {"x86-64-v4": 512, "x86-64-v3": 256, "x86-64-v2": 1}
_ISA_NAMES = {"x86-64-v4": ["avx2", "avx512"], "x86-64-v3": ["avx2"], "x86-64-v2": []}
# Rows up to which a fused loop was fastest: 1 to 4 of 1, 2, 4 and 8, for GPT-2 124M's matrices.
_FEW_ROWS = 4


def settle() -> Path:
    """Return a name of this process's directory that any command can carry, and give torch's paths such names, too.

    torch joins its commands with blanks and splits them again; few of the paths in them are quoted. Comes before torch
    is imported, which finds its own place then.
    """
    here = Path(f"/proc/{os.getpid()}/cwd")
    here = here if here.is_dir() else Path.cwd()
    os.environ |= {"TMPDIR": str(here), "TORCHINDUCTOR_CACHE_DIR": str(here / "cache")}
    sys.path[:] = [_plain(entry, here) for entry in sys.path]
    places = sysconfig.get_config_vars()
    places |= {name: _plain(places[name], here) for name in ("LIBDIR", "installed_base") if places.get(name)}
    return here


def _plain(path: str, here: Path) -> str:
    """Return a path, or a link to it in this directory if it needs quotes, or a prefix map could not hold it."""
    if not path or (shlex.quote(path) == path and "=" not in path):
        return path
    link = here / f"link{len(list(here.glob('link*')))}"
    link.symlink_to(path)
    return str(link)


def kernel_for(rows: int, dtype: str) -> str:
    """Return how a product of so many rows with a weight matrix is written, unless it was measured (`tune`).

    Few rows are bound by reading the weights once, which a fused loop comes near to and no GEMM does. Of many, oneDNN
    is the faster in float32 on the AMD CPUs where this was measured; in bfloat16 aten calls it where it can be used.
    """
    if rows <= _FEW_ROWS:
        return "rows"
    return "onednn" if dtype == "float32" else "aten"


def weightless_graph(
    arch: Architecture, bucket: Bucket, dtype: str, lowering: Mapping[str, str], kernels: Callable[[int], str]
) -> tuple[Graph, tuple[Tensor, ...]]:
    """Return the step with uninitialised storage, for shapes are all the compiler needs, and inputs of zeros."""
    import torch

    from nanogpt_buckets.model.gpt import GPT, Lowering

    step = step_named(bucket.step)
    with torch.device("meta"):
        graph = step.graph(GPT(arch, Lowering(lowering["attention"], kernels)))
    graph = graph.to(getattr(torch, dtype)).to_empty(device="cpu").eval().requires_grad_(False)
    state = (view.blank() for view in step.interface(arch, bucket, dtype).state)
    return graph, (*step.pack([], bucket), *state)


def compile_library(
    graph: nn.Module,
    inputs: tuple[Tensor, ...],
    target: str,
    workdir: Path,
    compiler: Sequence[str],
    is_clang: bool,
    name: str = "bucket",
) -> tuple[bytes, str]:
    """Export and compile; return the library and the compiler's command lines.

    The same bytes wherever it is done: no path, symbol table or line table is kept, and no number of processors counts.
    `compiler` are the words that begin its commands, `workdir` is what `settle` returned. `name` is that of generated
    files, which torch does not write anew where they are; by default it would follow from where they are.

    Raises:
        CompileFailed: the compiler made no library, or this torch runs it in a way of its own.
    """
    import torch
    from torch import _inductor

    _pin_instruction_set(target)
    commands = _pin_commands(compiler, "clang++" if is_clang else "g++", workdir, name)
    output = workdir / f"{name}.so"
    options = {
        "aot_inductor.output_path": str(output),
        "aot_inductor.package_constants_in_so": False,
        "aot_inductor.model_name_for_generated_files": name,
        "cpp.threads": 16,  # what loops are laid out for; how many run them is found when they run
        "cpp.dynamic_threads": True,  # a one-thread child otherwise compiles OpenMP out for ever
        "cpp.enable_floating_point_contract_flag": "fast",  # multiply and add in one instruction
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
    if not commands:
        raise CompileFailed("this torch does not say how it runs the compiler, so what the bucket requires is unknown")
    return output.read_bytes(), "\n".join(commands)


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


def _pin_commands(compiler: Sequence[str], kind: str, workdir: Path, name: str) -> list[str]:
    """Have torch choose options for this kind of compiler, begin its commands with these words, and list them here."""
    import torch
    from torch._inductor import cpp_builder

    places = (workdir, Path(torch.__file__).parents[1])  # the last that fits counts
    begin = shlex.join([*compiler, *(f"-ffile-prefix-map={place}=." for place in places)])
    composed = cpp_builder.CppBuilder.get_command_line
    composed = getattr(composed, "__wrapped__", composed)  # torch's own, however often this is called
    commands = []

    @functools.wraps(composed)
    def get_command_line(self: cpp_builder.CppBuilder) -> str:
        command = f"{begin}{composed(self).removeprefix(kind)} -g0"
        command += " -Wl,-s,--build-id=none" if " -shared " in command else ""
        if f"/{name}." in command:  # and not a trial of what the compiler can do
            commands.append(command)
        return command

    cpp_builder.get_cpp_compiler = lambda: kind
    cpp_builder.CppBuilder.get_command_line = get_command_line  # type: ignore[method-assign]
    return commands
