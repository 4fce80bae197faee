"""One step, one shape -> one bare shared library that holds no weights. This file is hashed into every family.

Weights are given at load, so one compiled bucket serves every fine-tune. Code generation is pinned to a named
instruction-set level instead of inherited from the building machine.

Knows nothing of the store, of plans, of loading or of the gate. torch is imported inside functions: naming a key needs
none.
"""

from __future__ import annotations

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
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from nanogpt_buckets.steps.graph import Graph

# Vector width in bits that goes with each level (1 is scalar code), and what Inductor may believe the CPU has.
_SIMDLEN = {"x86-64-v4": 512, "x86-64-v3": 256, "x86-64-v2": 1}
_ISA_NAMES = {"x86-64-v4": ["avx2", "avx512"], "x86-64-v3": ["avx2"], "x86-64-v2": []}


# What loops are laid out for; the number that runs them is chosen when they run.
_THREADS = 16


def settle() -> Path:
    """Give this process's directory, and what torch's paths begin with, names that any command line can carry.

    torch joins its commands with blanks and splits them again; few of the paths in them are quoted. Must come before
    torch is imported: it reads TORCHINDUCTOR_CACHE_DIR, and finds its own place, then.

    Returns:
        The directory to compile in: the working directory.

    Raises:
        CompileFailed: without /proc, the working directory's own name must do, and will not.
    """
    here = Path(f"/proc/{os.getpid()}/cwd")
    here = here if here.is_dir() else Path.cwd()
    if not _is_plain(str(here)):
        raise CompileFailed(f"no compiler's command can name {here}", hint="name another directory in TMPDIR")
    os.environ |= {"TMPDIR": str(here), "TORCHINDUCTOR_CACHE_DIR": str(here / "cache")}
    sys.path[:] = [_plain_name(entry, here) for entry in sys.path]
    places = sysconfig.get_config_vars()
    places |= {name: _plain_name(places[name], here) for name in ("LIBDIR", "installed_base") if places.get(name)}
    return here


def _is_plain(path: str) -> bool:
    return shlex.quote(path) == path and "=" not in path  # which separates the halves of a prefix map


def _plain_name(path: str, here: Path) -> str:
    if not path or _is_plain(path):
        return path
    link = here / f"link{len(list(here.glob('link*')))}"
    link.symlink_to(path)
    return str(link)


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


def compile_library(
    graph: Graph, inputs: tuple[Tensor, ...], target: str, workdir: Path, compiler: Sequence[str], is_clang: bool
) -> Path:
    """Export and compile; the sources, with the compiler's command lines, are left in `workdir`.

    The same bytes wherever it is done: names are fixed, and neither paths nor symbols nor line tables are kept.

    Args:
        graph: the step.
        inputs: to trace it with.
        target: a level, or this machine's native code.
        workdir: as `settle` returned it.
        compiler: the words that begin its commands.
        is_clang: whether it takes Clang's options, and not GCC's.

    Raises:
        CompileFailed: the compiler made no library, or not the weightless kind.
    """
    import torch
    from torch import _inductor

    _pin_instruction_set(target)
    _pin_commands(compiler, "clang++" if is_clang else "g++", workdir)
    output = workdir / "library.so"
    options = {
        "aot_inductor.output_path": str(output),
        "aot_inductor.package_constants_in_so": False,
        "aot_inductor.model_name_for_generated_files": "bucket",
        "cpp.threads": _THREADS,
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


def _pin_commands(compiler: Sequence[str], kind: str, workdir: Path) -> None:
    """Have torch choose options for this kind of compiler, and begin its commands with these words and our options."""
    import torch
    from torch._inductor import cpp_builder

    # the last that fits counts, and torch may be in a link below workdir
    places = {workdir: ".", Path(torch.__file__).parents[1]: "."}
    begin = shlex.join([*compiler, *(f"-ffile-prefix-map={place}={name}" for place, name in places.items())])
    composed = cpp_builder.CppBuilder.get_command_line

    def get_command_line(self: cpp_builder.CppBuilder) -> str:
        command = begin + composed(self).removeprefix(kind)
        return f"{command} -Wl,-s,--build-id=none" if " -shared " in command else command

    cpp_builder.get_cpp_compiler = lambda: kind
    cpp_builder.CppBuilder.get_command_line = get_command_line
