"""The virtual environment that the contestants run in: public wheels beside this checkout's package."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PINS = [ROOT / "scripts" / name for name in ("constraints.txt", "constraints-bench.txt")]
WHEELS = "https://download.pytorch.org/whl/cpu"  # PyPI's torch brings CUDA's libraries, gigabytes of them


def digest() -> str:
    """Return what an environment must have been made from."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in [*PINS, ROOT / "pyproject.toml"])).hexdigest()


def interpreter(venv: Path) -> Path:
    """Return the environment's Python; makes the environment if it is not there, incomplete, or out of date."""
    with venv.with_name(f"{venv.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second run waits for the first one's installation
        stamp = venv / "complete"
        if not stamp.is_file() or stamp.read_text().strip() != digest():
            _install(venv)
            stamp.write_text(digest() + "\n")
    return venv / "bin" / "python"


def _install(venv: Path) -> None:
    print(f"installing the contestants in {venv}: 3 GB, a few minutes", file=sys.stderr)
    shutil.rmtree(venv, ignore_errors=True)
    pins = [argument for path in PINS for argument in ("--constraint", str(path))]
    pip = [str(venv / "bin" / "python"), "-m", "pip", "install", "--quiet", *pins]
    index = os.environ | {"PIP_EXTRA_INDEX_URL": os.environ.get("PIP_EXTRA_INDEX_URL", WHEELS)}
    for command in ([sys.executable, "-m", "venv", str(venv)], [*pip, "--editable", f"{ROOT}[bench]"]):
        if subprocess.run(command, env=index, stdout=sys.stderr).returncode:
            sys.exit(f"bench_peers could not make its environment: {' '.join(command)} failed, see above")
