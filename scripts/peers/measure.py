"""Rounds: contestants, each in a process of its own, take turns, one at a time and every other round backwards.

Every figure is a median of rounds; the first answer of a process that stays warms it up and is dropped. One that fails
is a row that says why, one that cannot be opened is not asked again. Knows nothing of engines, nor of how figures are
shown.
"""

from __future__ import annotations

import json
import os
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Json = dict[str, Any]
SCRIPTS = Path(__file__).resolve().parents[1]
START = time.monotonic()
WARM_UP: Json = {"do": "steps", "lengths": [8], "new": 4, "seed": 99}


@dataclass(frozen=True)
class Cell:
    """One measure: what is asked of a contestant, and which numbers its answer holds, by the measure's name."""

    title: str
    request: Json
    numbers: Callable[[Json], dict[str, float]]
    contestants: tuple[str, ...]
    runs: int


@dataclass
class Hall:
    """Where contestants stand; each is opened when it is first asked.

    Args:
        folder: the model.
        work: what contestants keep.
        options: given to all, and `own` to one.
        limit_s: for a first answer, which may load, convert and compile; others may take three times as long.
    """

    folder: Path
    work: Path
    options: Json = field(default_factory=dict)
    own: dict[str, Json] = field(default_factory=dict)
    limit_s: float = 120.0
    absent: dict[str, str] = field(default_factory=dict)
    open: dict[str, subprocess.Popen[str]] = field(default_factory=dict)

    def start(self, name: str, **options: Any) -> subprocess.Popen[str]:
        """Start a process of a contestant."""
        given = json.dumps(self.options | self.own.get(name, {}) | options)
        command = [sys.executable, "-m", "peers.worker", name.split(",")[0], str(self.folder), str(self.work), given]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(SCRIPTS), os.environ.get("PYTHONPATH")]))
        log = (self.work / f"{name.replace(' ', '-')}.log").open("a")
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
        )

    def ask(self, name: str, request: Json) -> Json:
        """Ask a contestant that stays; returns its answer, or `why` there is none."""
        if name in self.absent:
            return {"why": self.absent[name]}
        if name not in self.open:
            self.open[name] = self.start(name)
            first = self._exchange(name, WARM_UP, self.limit_s)
            if "why" in first:
                self.absent[name] = first["why"]
                return first
        return self._exchange(name, request, 3 * self.limit_s)

    def _exchange(self, name: str, request: Json, limit_s: float) -> Json:
        answer = exchange(self.open[name], request, limit_s)
        if answer.pop("gone", False):
            self.absent[name] = answer["why"]
        return answer

    def close(self) -> None:
        """Let all go."""
        for process in self.open.values():
            end(process)


def exchange(process: subprocess.Popen[str], request: Json, limit_s: float) -> Json:
    """Send one request and read the answer; a process that takes longer is ended."""
    assert process.stdin
    assert process.stdout
    try:
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        if not select.select([process.stdout], [], [], limit_s)[0]:
            end(process)
            return {"why": f"gave no answer within {limit_s:.0f} s", "gone": True}
        answer: Json = json.loads(process.stdout.readline())
    except (OSError, ValueError):
        return {"why": f"its process ended with status {process.wait()}", "gone": True}
    return answer


def end(process: subprocess.Popen[str]) -> None:
    """End a process, whatever it does."""
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe:
            pipe.close()


def rounds(names: Iterable[str], runs: int, turn: Callable[[str, int], Json], drop: int = 0) -> dict[str, list[Json]]:
    """Let contestants take turns; returns the answers of all rounds but the first, or one that says why there are none.

    Args:
        names: the contestants.
        runs: rounds that count.
        turn: asks one, in the round of this number.
        drop: rounds before them.
    """
    names, taken = list(names), dict[str, list[Json]]()
    for number in range(drop + runs):
        for name in names[:: -1 if number % 2 else 1]:
            if taken.get(name) and "why" in taken[name][-1]:
                continue
            answer = turn(name, number)
            time.sleep(0.02)  # threads of the one before have stopped spinning
            if "why" in answer:
                taken[name] = [answer]
            elif number >= drop:
                taken.setdefault(name, []).append(answer)
    return {name: taken[name] for name in names}


def run(hall: Hall, cell: Cell) -> dict[str, dict[str, Json]]:
    """Run a cell; returns for each number of its answers a row for each contestant.

    Each round has prompts of its own: some engines remember those they have seen.
    """
    say(cell.title)
    taken = rounds(cell.contestants, cell.runs, lambda name, number: hall.ask(name, cell.request | {"seed": number}))
    return rows(taken, cell.numbers)


def rows(taken: dict[str, list[Json]], numbers: Callable[[Json], dict[str, float]]) -> dict[str, dict[str, Json]]:
    """Turn answers into figures, by the name of the number and the contestant."""
    found: dict[str, dict[str, Json]] = {}
    for name, answers in taken.items():
        if "why" in answers[0]:
            found.setdefault("", {})[name] = {"why": answers[0]["why"]}
            continue
        each = [numbers(answer) for answer in answers]
        last = {key: answers[-1][key] for key in ("ids", "logprobs", "remark") if key in answers[-1]}
        for what in each[0]:
            found.setdefault(what, {})[name] = figure([values[what] for values in each]) | last
    failed = found.pop("", {})
    order = list(taken)
    for what in found or {"": None}:
        found[what] = dict(sorted((found.get(what, {}) | failed).items(), key=lambda row: order.index(row[0])))
    return found


def figure(runs: list[float]) -> Json:
    """Return median and spread."""
    return {"median": statistics.median(runs), "min": min(runs), "max": max(runs), "runs": runs}


def fresh(hall: Hall, names: Iterable[str], runs: int, length: int) -> dict[str, dict[str, Json]]:
    """Start each anew: seconds from there to its first token on paper, and the memory that it then takes."""
    say("fresh processes: time to the first token, memory")

    def turn(name: str, number: int) -> Json:
        start = time.perf_counter()
        process = hall.start(name, lazy=True)
        first = exchange(process, {"do": "steps", "lengths": [length], "new": 1, "seed": 0}, hall.limit_s)
        taken = time.perf_counter() - start
        answer = first if "why" in first else exchange(process, {"do": "memory"}, hall.limit_s) | {"s": taken}
        if answer.pop("gone", False):
            hall.absent[name] = answer["why"]
        end(process)
        return answer

    taken = rounds(names, runs, turn, drop=1)  # files are in the page cache, conversions made
    return rows(taken, lambda answer: {"cold s": answer["s"], "PSS MB": answer["pss_bytes"] / 1e6})


def importing(runs: int) -> dict[str, dict[str, Json]]:
    """Return how long a fresh process takes to import torch and to say so."""

    def turn(name: str, number: int) -> Json:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import torch; print()"], check=True, stdout=subprocess.DEVNULL)
        return {"s": time.perf_counter() - start}

    return rows(rounds(["import torch alone"], runs, turn, drop=1), lambda answer: {"cold s": answer["s"]})


def say(what: str) -> None:
    """Say what is being done, on stderr."""
    print(f"[{time.monotonic() - START:4.0f} s] {what}", file=sys.stderr, flush=True)
