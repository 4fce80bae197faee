"""The fake `neuronx-cc`: checks its command line, packs the program into a NEFF, and fails in the ways asked for.

Environment (what is not the compiler's is ignored here):
    NEURON_DOUBLE_FAULT: comma list; this program knows
        compile-70: refuse to compile;
        compile-70-once: refuse the first time only, as remembered in NEURON_DOUBLE_STATE_DIR;
        compile-oom: leave half an output file and die by SIGKILL, as under the kernel's OOM killer;
        compile-abort: the same by SIGABRT;
        compile-hang: sleep for an hour.
    NEURON_DOUBLE_SECONDS: how long every compile takes.
    NEURON_DOUBLE_CC_VERSION: the compiler's version.
    NEURON_DOUBLE_STATE_DIR: where each compile is written down (compiles.jsonl).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from neuronxcc import __version__
from neuronxcc.flags import ARCHITECTURES, BadArguments, parse

COMPILE_ERROR = 70
OPERATORS = (
    "Add AllReduce Broadcast Compare Concatenate Constant Convert Divide Dot Exp Gather Iota Log Maximum Minimum"
)
OPERATORS += " Multiply Negate Power Reduce Reshape Rsqrt Select Slice Sqrt Subtract Tanh Transpose Tuple"


def main(arguments: list[str]) -> int:
    """Run one command line and return the exit status."""
    if arguments == ["--version"]:
        print(f"NeuronX Compiler version {__version__}\n\nPython version {sys.version.split()[0]}")
        return 0
    if arguments[:1] == ["list-operators"] and "XLA" in " ".join(arguments[1:]):
        print("\n".join(OPERATORS.split()))
        return 0
    if arguments[:1] != ["compile"]:
        print("usage: neuronx-cc {compile,list-operators} ...", file=sys.stderr)
        return COMPILE_ERROR
    try:
        positional, flags = parse(arguments[1:])
        if len(positional) != 1 or not Path(positional[0], "metadata.json").is_file():
            raise BadArguments(f"model files not found: {positional}")
    except BadArguments as error:
        print(f"neuronx-cc: error: {error}", file=sys.stderr)
        return COMPILE_ERROR
    return _compile(Path(positional[0]), flags)


def _compile(model: Path, flags: dict[str, str]) -> int:
    first = _write_down(flags)
    log = Path(flags.get("--logfile", "log-neuron-cc.txt"))  # by default in the working directory
    log.write_text(f"NeuronX Compiler version {__version__}\n{' '.join(sys.argv)}\n")
    time.sleep(float(os.environ.get("NEURON_DOUBLE_SECONDS", "0")))
    faults = set(os.environ.get("NEURON_DOUBLE_FAULT", "").split(","))
    neff = _neff(model, flags)
    output = Path(flags["--output"])
    if "compile-hang" in faults:
        time.sleep(3600)
    if "compile-70" in faults or ("compile-70-once" in faults and first):
        print("ERROR: [NCC_EDBL001] the double was asked to fail", file=sys.stderr)
        return COMPILE_ERROR
    for fault, number in [("compile-oom", signal.SIGKILL), ("compile-abort", signal.SIGABRT)]:
        if fault in faults:
            output.write_bytes(neff[: len(neff) // 2])
            os.kill(os.getpid(), number)
    output.write_bytes(neff)
    print("..Completed run_backend_driver.\n\nCompiler status PASS", flush=True)
    return 0


def _neff(model: Path, flags: dict[str, str]) -> bytes:
    """Return b"NEFF", the length of the JSON header in four bytes, the header, the program."""
    metadata = json.loads((model / "metadata.json").read_text())
    shown = {name: value for name, value in flags.items() if name not in ("--output", "--logfile", "--verbose")}
    header = {
        "arch": ARCHITECTURES[flags["--target"]],
        "target": flags["--target"],
        "compiler": __version__,
        "flags": shown,
        "lnc": int(flags.get("--logical-nc-config", "1" if ARCHITECTURES[flags["--target"]] == "v2" else "2")),
        "metaneff": metadata["metaneff"],
    }
    encoded = json.dumps(header, sort_keys=True).encode()
    return b"NEFF" + len(encoded).to_bytes(4, "little") + encoded + (model / metadata["model_files"]).read_bytes()


def _write_down(flags: dict[str, str]) -> bool:
    """Record this compile in the state directory and return whether it is the first one there."""
    state = os.environ.get("NEURON_DOUBLE_STATE_DIR")
    if not state:
        return True
    Path(state).mkdir(parents=True, exist_ok=True)
    with Path(state, "compiles.jsonl").open("a", encoding="utf-8") as journal:
        first = journal.tell() == 0
        journal.write(json.dumps({"pid": os.getpid(), "flags": flags}) + "\n")
    return first
