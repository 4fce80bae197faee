"""The executable, run as its users run it: in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


@pytest.fixture
def cli() -> Callable[..., subprocess.CompletedProcess[bytes]]:
    """Return a function that runs a command in a child, with this cache directory and these variables.

    What was `compiled` before, in another cache, need not be compiled again; see farm.py.
    """

    def run(
        *arguments: str,
        cache: Path | None = None,
        compiled: Path | None = None,
        stdin: str = "",
        cwd: Path | None = None,
        **variables: str,
    ):
        extra = variables | ({"NANOGPT_BUCKETS_CACHE_DIR": str(cache)} if cache else {})
        if compiled is not None:
            extra |= {"FARM_CACHE": str(compiled), "PYTHONPATH": str(TESTS)}
        return subprocess.run(
            [sys.executable, "-m", "nanogpt_buckets" if compiled is None else "farm", *arguments],
            env=os.environ | extra,
            cwd=cwd,
            input=stdin.encode("utf-8", "surrogateescape"),
            capture_output=True,
        )

    return run
