"""Ahead-of-time Inductor on the CPU: one bucket -> one bare shared library that holds no weights.

Weights are given at load, so one compiled bucket serves every fine-tune. The library checks nothing by itself; the
manifest's contracts are checked here before weights and inputs reach it. Code generation is pinned to a named
instruction-set level instead of inherited from the building machine.

Knows nothing of the store, of plans, or of the gate. torch is imported inside functions: naming a key needs none.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanogpt_buckets.backends import host
from nanogpt_buckets.backends.base import Artifact, Backend, BuildRequest, Executable, step_contract
from nanogpt_buckets.backends.memfile import library_path
from nanogpt_buckets.contract import Contract, canonical_name, check_inputs, check_weights
from nanogpt_buckets.errors import BackendUnavailable, CompileFailed, IncompatibleEntry
from nanogpt_buckets.versions import version_tuple

if TYPE_CHECKING:
    from torch import Tensor, nn

# Vector width in bits that goes with each level (1 is scalar code), and what Inductor may believe the CPU has.
_SIMDLEN = {"x86-64-v4": 512, "x86-64-v3": 256, "x86-64-v2": 1}
_ISA_NAMES = {"x86-64-v4": ["avx2", "avx512"], "x86-64-v3": ["avx2"], "x86-64-v2": []}


class InductorBackend(Backend):
    """See `Backend`."""

    name = "inductor"
    sources = ("backends/base.py", "backends/inductor.py")
    needs = "C++ compiler"
    install = "install g++, or use a cache directory in which they are built"

    def runtime(self) -> dict[str, str]:
        """Return the torch version: the library links against its C interface and calls its kernels."""
        return {"torch": version("torch")}

    def lowering(self) -> dict[str, str]:
        """Return fused attention; everything else is Inductor's choice."""
        return {"attention": "sdpa"}

    def target(self, requested: str | None) -> str:
        """Return the level to build for; torch before 2.10 can only build "native".

        Raises:
            BackendUnavailable: this machine cannot build or run that level.
        """
        if not _has_levels() and requested in (None, host.NATIVE):
            return host.NATIVE
        return host.choose_level(requested)

    def compiler(self) -> dict[str, str] | None:
        """Return the versions of torch and of the C++ compiler, or None where there is no C++ compiler."""
        cxx = _cxx_version()
        return None if cxx is None else {"torch": version("torch"), "cxx": cxx}

    def compile(self, request: BuildRequest, workdir: Path) -> Artifact:
        """Export the step and compile it to a shared library; runs in a child whose caches are in `workdir`.

        Raises:
            CompileFailed: the compiler made no library, or not the weightless kind.
        """
        step, inputs = _weightless_step(request)
        start = time.monotonic()
        library = _compile_library(step, inputs, request.target, workdir)
        compile_ms = int(1000 * (time.monotonic() - start))
        contract, weights = step_contract(step, request.bucket)
        B, V = request.bucket.batch_size, request.architecture.vocab_size
        content = library.read_bytes()
        return Artifact(
            blobs={"library": content},
            inputs=contract,
            outputs=(Contract("logits", "float32", (B, V)),),
            weights=weights,
            requires=host.requirements(content, _compile_line(workdir)),
            stats={"compile_ms": compile_ms},
        )

    def load(self, artifact: Artifact, weights: Mapping[str, Tensor]) -> Executable:
        """Load the library from exactly these bytes; see `InductorExecutable`."""
        path = library_path(artifact.blobs["library"])
        return InductorExecutable(path, artifact, weights)


class InductorExecutable:
    """A loaded library with its weights.

    Args:
        path: where the verified bytes can be opened.
        artifact: the contracts of inputs, outputs and weights.
        weights: canonical name -> tensor; kept, not copied.
    """

    def __init__(self, path: str, artifact: Artifact, weights: Mapping[str, Tensor]) -> None:
        from torch._C._aoti import AOTIModelContainerRunnerCpu  # type: ignore[import-not-found,unused-ignore]

        check_weights(artifact.weights, weights)
        self._inputs, self._vocab_size = artifact.inputs, artifact.outputs[0].shape[-1]
        try:
            self._runner: Any = AOTIModelContainerRunnerCpu(path, 1)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise IncompatibleEntry(f"the compiled library cannot be loaded here: {reason}") from error
        names = self._runner.get_constant_names_to_original_fqns()
        # the library keeps pointers into these tensors, so they must live as long as it does
        self._weights = {constant: weights[canonical_name(name)] for constant, name in names.items()}
        self._runner.update_constant_buffer(self._weights, False, False, True)

    def __call__(self, input_ids: Tensor, last_index: Tensor) -> Tensor:
        """Run the step; see `Executable`."""
        check_inputs(self._inputs, input_ids, last_index, self._vocab_size)
        logits: Tensor = self._runner.run([input_ids, last_index])[0]
        return logits

    def close(self) -> None:
        """Free the library's buffers and let go of the weights."""
        self._runner = None
        self._weights = {}


def _has_levels() -> bool:
    """Whether this torch can be told what to generate code for; before 2.10 it takes what it finds."""
    return version_tuple(version("torch"))[:2] >= (2, 10)


@functools.cache
def _cxx_version() -> str | None:
    compiler = os.environ.get("CXX") or "g++"
    path = shutil.which(compiler)
    if path is None:
        return None
    try:
        text = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return text.splitlines()[0].strip() if text else None


def _weightless_step(request: BuildRequest) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """Build the step with uninitialised storage: shapes are all the compiler needs."""
    import torch

    from nanogpt_buckets.model.gpt import GPT, Lowering
    from nanogpt_buckets.steps import NeuronStep, example_inputs

    with torch.device("meta"):
        step = NeuronStep(GPT(request.architecture, Lowering(**request.lowering)))
    step = step.to(getattr(torch, request.dtype)).to_empty(device="cpu").eval().requires_grad_(False)
    return step, example_inputs(request.bucket.batch_size, request.bucket.seq_len)


def _compile_library(step: nn.Module, inputs: tuple[Tensor, Tensor], target: str, workdir: Path) -> Path:
    import torch
    from torch import _inductor

    if _cxx_version() is None:
        raise BackendUnavailable("no C++ compiler was found", hint="install g++, or set CXX to a compiler")
    if target in _SIMDLEN and not _has_levels():
        raise BackendUnavailable(
            f"torch {version('torch')} cannot be told an instruction-set level",
            hint="leave --target out, or use torch 2.10",
        )
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
        program = torch.export.export(step, inputs, strict=False)
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


def _compile_line(workdir: Path) -> str:
    """Return the compile commands Inductor wrote at the end of each generated source file."""
    lines = [
        line
        for source in sorted(workdir.glob("*.cpp"))
        for line in source.read_text(encoding="utf-8", errors="replace").splitlines()[-5:]
        if (line.startswith("// ") and " -shared " in line) or " -c " in line
    ]
    if not lines:
        raise CompileFailed("the compiler left no record of its options, so what the bucket requires is unknown")
    return "\n".join(lines)
