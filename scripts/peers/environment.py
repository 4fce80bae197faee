"""The virtual environments of the contestants, of public wheels.

One they run in, beside this checkout's package; another only exports for OpenVINO, as optimum-intel wants an older
transformers.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RUN, EXPORT = ROOT / ".venv-bench", ROOT / ".venv-bench-openvino"
PINS = [ROOT / "scripts" / name for name in ("constraints.txt", "constraints-bench.txt")]
WHEELS = "https://download.pytorch.org/whl/cpu"  # PyPI's torch brings CUDA's libraries, gigabytes of them


def interpreter() -> Path:
    """Return the Python that contestants run in; makes what is not there, incomplete, or out of date.

    Without the one that exports, OpenVINO is a row that says so, and all else runs.
    """
    pins = [argument for path in PINS for argument in ("--constraint", str(path))]
    if failed := _ensure(RUN, ["install", *pins, "--editable", f"{ROOT}[bench]"]):
        sys.exit(f"bench_peers could not make its environment: {failed} failed, see above")
    exporter = ["install", "torch==2.13.0", "optimum-intel[openvino]==2.2.0"]
    # optimum-intel asks for it; an image model would need it, and one that does not match torch cannot be imported
    if failed := _ensure(EXPORT, exporter, ["uninstall", "--yes", "torchvision"]):
        print(f"bench_peers goes on without OpenVINO: {failed} failed, see above", file=sys.stderr)
    return RUN / "bin" / "python"


def _ensure(venv: Path, *pip: list[str]) -> str:
    """Make an environment by these calls of pip, unless that is done; returns the command that failed, or nothing."""
    sources = [*PINS, ROOT / "pyproject.toml", Path(__file__)]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    with venv.with_name(f"{venv.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second run waits for the first one's installation
        stamp = venv / "complete"
        if stamp.is_file() and stamp.read_text() == digest:
            return ""
        print(f"installing {venv.name}: 2 GB, some minutes", file=sys.stderr)
        shutil.rmtree(venv, ignore_errors=True)
        index = os.environ | {"PIP_EXTRA_INDEX_URL": os.environ.get("PIP_EXTRA_INDEX_URL", WHEELS)}
        python = [str(venv / "bin" / "python"), "-m", "pip", "--quiet"]
        for command in ([sys.executable, "-m", "venv", str(venv)], *([*python, *each] for each in pip)):
            if subprocess.run(command, env=index, stdout=sys.stderr).returncode:
                return " ".join(command)
        stamp.write_text(digest)
        return ""
