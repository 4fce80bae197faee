"""The executable, run as its users run it: in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def cli() -> Callable[..., subprocess.CompletedProcess[bytes]]:
    """Return a function that runs a command in a child, with this cache directory and these variables."""

    def run(*arguments: str, cache: Path | None = None, stdin: str = "", cwd: Path | None = None, **variables: str):
        extra = variables | ({"NANOGPT_BUCKETS_CACHE_DIR": str(cache)} if cache else {})
        return subprocess.run(
            [sys.executable, "-m", "nanogpt_buckets", *arguments],
            env=os.environ | extra,
            cwd=cwd,
            input=stdin.encode("utf-8", "surrogateescape"),
            capture_output=True,
        )

    return run
