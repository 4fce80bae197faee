"""The Inductor backend: what names its buckets, what they need, the way to compiling them, and loading.

Knows nothing of the store, of plans, or of the gate. Imports torch only to load. Not hashed into any key: what it says
of a family is in the key as data.
"""

from __future__ import annotations

import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from nanogpt_buckets import child
from nanogpt_buckets.backends import host
from nanogpt_buckets.backends.base import Artifact, Backend, BuildRequest, Opened
from nanogpt_buckets.backends.memfile import library_path
from nanogpt_buckets.contract import Contract, dtype_name
from nanogpt_buckets.errors import BackendUnavailable, IncompatibleEntry
from nanogpt_buckets.findings import Finding, Verdict
from nanogpt_buckets.steps import step_named
from nanogpt_buckets.versions import version_tuple

if TYPE_CHECKING:
    from torch import Tensor, nn

# What `open` needs of torch, and how long importing it may take.
_LOADER, _CHILD_TIMEOUT_S = "from torch._C._aoti import AOTIModelContainerRunnerCpu", 120


class InductorBackend(Backend):
    """See `Backend`."""

    name = "inductor"
    steps = ("recompute", "prefill", "decode", "score")
    sources = ("backends/inductor/compile.py", "backends/inductor/tune.py")
    lowering: ClassVar = {"attention": "sums"}  # everything else is Inductor's choice
    needs = "C++ compiler"
    install = "install g++, or use a cache directory in which they are built"

    def runtime(self) -> dict[str, str]:
        """Return the torch version: the library links against its C interface and calls its kernels."""
        return {"torch": version("torch")}

    def target(self, requested: str | None) -> str:
        """Return the level to build for; torch before 2.10 can only build for the CPU it finds."""
        torch = version("torch")
        old = version_tuple(torch)[:2] < (2, 10)
        if old and requested is not None and not requested.startswith(host.NATIVE):
            said = f"torch {torch} cannot be told an instruction-set level"
            raise BackendUnavailable(said, hint="leave --target out, or use torch 2.10")
        return host.choose_level(host.NATIVE if old else requested)

    def compiler(self) -> dict[str, str] | None:
        """Return torch's version, and the C++ compiler's with its options, or None where there is no C++ compiler."""
        cxx = _cxx_identity(_cxx())
        return None if cxx is None else {"torch": version("torch"), "cxx": cxx}

    def child_environment(self, request: BuildRequest) -> dict[str, str]:
        """Return this process's compiler, an order of sets, and several threads: the gate must see them at work.

        They wait without spinning: several children share the processors, and each would hold up the others.
        """
        one = os.environ.get("OMP_NUM_THREADS") == "1" or host.visible_cpu_count() == 1
        threads = {"OMP_NUM_THREADS": "2"} if one else {}
        return {"PYTHONHASHSEED": "0", "CXX": shlex.join(_cxx()), "OMP_WAIT_POLICY": "passive"} | threads

    def compile(self, request: BuildRequest, workdir: Path) -> Artifact:
        """Export the step and compile it to a shared library; runs in a child whose directory is `workdir`."""
        from nanogpt_buckets.backends.inductor.compile import compile_library, kernel_for, settle, weightless_graph
        from nanogpt_buckets.backends.inductor.tune import tuned

        cxx = _cxx_identity(_cxx())
        if cxx is None:
            raise BackendUnavailable("no C++ compiler was found", hint="install g++, or set CXX to a compiler")
        place, arch, bucket = settle(), request.architecture, request.bucket
        from nanogpt_buckets.steps.graph import canonical_name  # imports torch, which must come after settling

        start = time.monotonic()
        compiled = functools.partial(
            compile_library, target=request.target, workdir=place, compiler=_cxx(), is_clang="clang version" in cxx
        )
        kernels: Callable[[int], str] = functools.partial(kernel_for, dtype=request.dtype)
        measured: dict[str, int] = {}
        if request.tune == "fast":
            rows = (step_named(bucket.step).positions(bucket), bucket.batch_size)
            kernels, measured = tuned(arch, request.dtype, rows, functools.partial(_opened, compiled))
        graph, inputs = weightless_graph(arch, bucket, request.dtype, request.lowering, kernels)
        content, commands = compiled(graph, inputs)
        interface = step_named(bucket.step).interface(arch, bucket, request.dtype)
        named = [(canonical_name(name), parameter) for name, parameter in sorted(graph.named_parameters())]
        return Artifact(
            blobs={"library": content},
            inputs=interface.inputs,
            outputs=interface.outputs,
            weights=tuple(Contract(name, dtype_name(p), tuple(p.shape)) for name, p in named),
            requires=host.requirements(content, commands),
            stats={"compile_ms": int(1000 * (time.monotonic() - start)), **measured},
        )

    def open(self, artifact: Artifact, weights: Mapping[str, Tensor]) -> Opened:
        """Load the library from exactly these bytes and bind the weights."""
        from nanogpt_buckets.steps.graph import canonical_name

        runner, names = _runner(artifact.blobs["library"])
        # the library keeps pointers into these tensors, so they must live as long as it does
        held = [runner, {constant: weights[canonical_name(name)] for constant, name in names.items()}]
        runner.update_constant_buffer(held[1], False, False, True)

        def run(*tensors: Tensor) -> Sequence[Tensor]:
            outputs: list[Tensor] = held[0].run(list(tensors))
            return outputs

        return Opened(run, held.clear)

    def findings(self) -> Iterator[Finding]:
        """Try, in a child, whether torch can be imported and has what loads compiled buckets."""
        command = [sys.executable, "-c", _LOADER]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_CHILD_TIMEOUT_S)
        except (OSError, subprocess.TimeoutExpired) as error:
            yield Finding("backend", "loader", str(error), Verdict.PROBLEM, "is this machine overloaded?")
            return
        if done.returncode == 0:
            yield Finding("backend", "loader", "torch can be imported and loads compiled buckets")
            return
        said = done.stderr.strip().splitlines()
        why = said[-1] if said else f"ended with code {done.returncode}"
        yield Finding("backend", "loader", f"torch cannot be used: {why}", Verdict.PROBLEM, "reinstall torch")


def _runner(library: bytes) -> tuple[Any, dict[str, str]]:
    """Return what runs a library of exactly these bytes, and its constants' names with their parameters'.

    Raises:
        IncompatibleEntry: it cannot be loaded here.
    """
    from torch._C._aoti import AOTIModelContainerRunnerCpu  # type: ignore[import-not-found,unused-ignore]

    try:
        runner: Any = AOTIModelContainerRunnerCpu(library_path(library), 1)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise IncompatibleEntry(f"the compiled library cannot be loaded here: {reason}") from error
    return runner, runner.get_constant_names_to_original_fqns()


def _opened(
    compiled: Callable[..., tuple[bytes, str]], module: nn.Module, inputs: tuple[Tensor, ...]
) -> Callable[..., object]:
    """Compile a module for a trial and return what runs it."""
    library, _ = compiled(module, inputs, name=f"trial{len(inputs[0])}")
    runner, names = _runner(library)
    parameters = dict(module.named_parameters())
    runner.update_constant_buffer({constant: parameters[name] for constant, name in names.items()}, False, False, True)
    return lambda *tensors: (runner.run(list(tensors)), parameters)[0]


def _cxx() -> tuple[str, ...]:
    """Return the words that begin the C++ compiler's command; none if there is no such program."""
    given = os.environ.get("CXX", "").strip() or "g++"
    try:
        words = [given] if shutil.which(given) else shlex.split(given)
    except ValueError:
        return ()
    program = shutil.which(words[0])
    return (os.path.abspath(program), *words[1:]) if program else ()


@functools.cache
def _cxx_identity(command: tuple[str, ...]) -> str | None:
    """Return a compiler's version with a digest of the commands it would run: a wrapper may add options to them."""
    if not command:
        return None
    environment = child.clean_environment({"CCACHE_DISABLE": "1", "TMPDIR": ""})
    nothing = ("-O3", "-fPIC", "-x", "c++", "/dev/null", "-o", "/dev/null")
    questions = [("--version",), *(("-###", way, *nothing) for way in ("-c", "-shared"))]
    try:
        answers = [
            subprocess.run([*command, *q], env=environment, cwd="/", capture_output=True, timeout=30) for q in questions
        ]
    except (OSError, subprocess.SubprocessError):
        return None
    # commands are indented, between words on how the compiler was built; names of temporary files are random
    lines = [line for answer in answers[1:] for line in answer.stderr.splitlines() if line.startswith(b" ")]
    options = re.sub(rb"([^\s\"=]*/)?\b(cc\w{6}|null-\w+)\.\w+", b"", b"\n".join(lines))
    version_lines = answers[0].stdout.decode("utf-8", "replace").strip().splitlines()
    if answers[0].returncode != 0 or not version_lines or not options:
        return None
    return f"{version_lines[0].strip()}, options {sha256(options).hexdigest()[:8]}"
