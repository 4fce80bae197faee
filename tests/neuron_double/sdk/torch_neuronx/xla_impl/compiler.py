"""Write a traced program down and run `neuronx-cc` on it, as a process of its own."""

from __future__ import annotations

import importlib.util
import json
import logging
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from torch_neuronx import _texts
from torch_neuronx.xla_impl.capture import Program

logger = logging.getLogger("Neuron")

_KILLED = {-9: "killed, most likely for want of host memory", -6: "aborted", -11: "stopped by a segmentation fault"}


def arguments(compiler_args: str | Sequence[str] | None) -> list[str]:
    """Return compiler_args as a list. A list is passed on as it is, a string is split as a shell would."""
    if compiler_args is None:
        return []
    return shlex.split(compiler_args) if isinstance(compiler_args, str) else list(compiler_args)


def target_in(args: Sequence[str]) -> str | None:
    """Return the rightmost --target."""
    found = None
    for n, arg in enumerate(args):
        if arg.startswith("--target="):
            found = arg.partition("=")[2]
        elif arg == "--target":
            found = "".join(args[n + 1 : n + 2])
    return found


def compile_program(program: Program, workdir: Path, args: Sequence[str], target: str) -> bytes:
    """Return the NEFF.

    Raises:
        RuntimeError: there is no compiler, or it failed.
    """
    model, neff = workdir / "model", workdir / "graph.neff"
    (model / "weights").mkdir(parents=True, exist_ok=True)
    (model / "graph.hlo").write_bytes(program.serialized)
    metadata = {"model_files": "graph.hlo", "version": "1.0", "weights": {}, "metaneff": program.metaneff}
    (model / "metadata.json").write_text(json.dumps(metadata))
    command = [str(_compiler()), "compile", str(model), "--framework", "XLA", "--target", target]
    command += ["--output", str(neff), *args]
    (workdir / "command.txt").write_text(shlex.join(command))
    status = subprocess.run([sys.executable, *command], check=False).returncode
    if status:
        if status in _KILLED:
            logger.warning("neuronx-cc was %s", _KILLED[status])
        raise RuntimeError(f"neuronx-cc failed with {status}")
    return neff.read_bytes()


def _compiler() -> Path:
    spec = importlib.util.find_spec("neuronxcc")
    if spec is None or spec.origin is None:
        raise RuntimeError(_texts.NO_COMPILER)
    binary = Path(spec.origin).parents[1] / "bin" / "neuronx-cc"
    if not binary.is_file():
        raise RuntimeError(_texts.NO_COMPILER_BINARY)
    return binary
