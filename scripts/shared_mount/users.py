"""Processes that share a cache, each with a home of its own, driven one request at a time.

Knows nothing of mounts, nor of what is proved.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Json = dict[str, Any]
ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("worker.py")
PATIENCE_S = 120.0


class Died(Exception):
    """A process ended, or did not answer."""


def variables(home: Path, further: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment of a process of its own: this checkout's package, and a home that nobody else has."""
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    own = {"HOME": str(home), "NANOGPT_BUCKETS_LOCAL_DIR": str(home / "local"), "PYTHONPATH": str(ROOT)}
    rest = {name: value for name, value in os.environ.items() if not name.startswith(("NANOGPT_BUCKETS", "AZ", "AWS"))}
    return rest | own | dict(further or {})


class User:
    """One process that uses a cache directory; see `worker.Worker` for what can be asked of it."""

    def __init__(self, home: Path, root: Path, lock: str = "", further: Mapping[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(WORKER), str(root), lock],
            env=variables(home, further), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        self.hear()

    def __enter__(self) -> User:
        return self

    def __exit__(self, *raised: object) -> None:
        self.kill()

    def say(self, do: str, **request: Any) -> None:
        """Ask, and do not wait."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, **request}).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError as error:
            raise Died(self._last_words()) from error

    def hear(self) -> Json:
        """Wait for the answer."""
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], PATIENCE_S)
        line = self.process.stdout.readline() if ready else b""
        if not line:
            raise Died(self._last_words())
        reply: Json = json.loads(line)
        return reply

    def ask(self, do: str, **request: Any) -> Json:
        """Ask and wait."""
        self.say(do, **request)
        return self.hear()

    def kill(self) -> None:
        """End it as the kernel would, whatever it is doing."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def _last_words(self) -> str:
        self.process.kill()
        _, said = self.process.communicate()
        return said.decode(errors="replace").strip().splitlines()[-1] if said.strip() else "a process did not answer"
