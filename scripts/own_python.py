"""For scripts that need the package and its test dependencies: go on in the virtual environment of this tree.

It is the one that `scripts/test` makes; where there is none it is made, with the same versions. Imports nothing that
has to be installed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHON = ROOT / ".venv" / "bin" / "python"


def ensure() -> None:
    """Return if this Python has what is needed; else start the script again with one that has."""
    needed = "import boto3, cryptography, filelock, moto, obstore, platformdirs, safetensors"
    if subprocess.run([sys.executable, "-c", needed], stderr=subprocess.DEVNULL).returncode == 0:
        return
    if Path(sys.prefix) == PYTHON.parents[1]:
        sys.exit(f"{PYTHON} lacks what is needed; scripts/test makes it anew")
    if not PYTHON.exists():
        print("making .venv, which takes a minute", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(PYTHON.parents[1])], check=True)
        wanted = ["--quiet", "--constraint", "scripts/constraints.txt", "--editable", ".[dev]"]
        subprocess.run([str(PYTHON), "-m", "pip", "install", *wanted], cwd=ROOT, stdout=sys.stderr, check=True)
    os.execv(PYTHON, [str(PYTHON), *sys.argv])
