"""A process of one contestant: answers requests, a JSON line each, until its input ends.

    python -m peers.worker NAME FOLDER WORK OPTIONS        from scripts/; OPTIONS is a JSON object

Its stdout belongs to the protocol alone: what engines print goes to stderr. Knows nothing of rounds and tables.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

from peers import model
from peers.table import CONTESTANTS

Json = dict[str, Any]


def main(name: str, folder: Path, work: Path, options: Json) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    made: Any = None
    for line in sys.stdin:
        try:
            made = made or open_contestant(name, folder, work, options)
            answer: Json = ANSWERS[(asked := json.loads(line)).pop("do")](made, **asked)
        except Exception as error:  # a peer's failure is a result
            answer = {"why": (str(error).strip() or type(error).__name__).splitlines()[0][:300]}
            answer |= {"gone": made is None}  # opening it again would fail again
        print(json.dumps(answer), file=answers, flush=True)


def open_contestant(name: str, folder: Path, work: Path, options: Json) -> Any:
    """Make it; what does not reach as far as the model is a bound of its own."""
    at = CONTESTANTS[name]
    made = at.kind(folder, work, at.precision, **options)
    made.reach = min(made.reach, model.sizes(folder)["n_positions"])
    made.vocab_size = model.sizes(folder)["vocab_size"]
    return made


def steps(made: Any, lengths: list[int], new: int, seed: int) -> Json:
    """Return seconds to the first token and the median of those of further ones, of one call."""
    what, new = f"{lengths} then {new}, round {seed}", min(new, made.steps) if new > 1 else 1
    if max(lengths) + new > made.reach:
        raise LookupError(f"holds {made.reach} tokens")
    prompts = [model.texts(1, n, n, made.vocab_size, f"{what}, row {row}")[0] for row, n in enumerate(lengths)]
    ids, first, rest = made.step_times(prompts, new)
    if any(len(row) != new for row in ids):
        raise LookupError(f"gave {len(ids[0])} tokens of {new}")
    return {"first_s": first, "step_s": sorted(rest)[len(rest) // 2] if rest else None, "ids": ids}


def throughput(made: Any, count: int, shortest: int, longest: int, new: int, seed: int) -> Json:
    """Return the seconds that many prompts of many lengths take."""
    prompts = model.texts(count, shortest, longest, made.vocab_size, f"throughput {seed}")
    remark = made.prepare(prompts, new)
    start = time.perf_counter()
    ids = made.generate(prompts, new)
    return {"s": time.perf_counter() - start, "tokens": count * new, "ids": ids, "remark": remark}


def score(made: Any, count: int, shortest: int, longest: int, seed: int) -> Json:
    """Return the seconds that scoring many texts takes."""
    texts = model.texts(count, shortest, longest, made.vocab_size, f"score {seed}")
    start = time.perf_counter()
    found = made.score(texts)
    return {"s": time.perf_counter() - start, "tokens": sum(map(len, texts)) - count, "logprobs": found}


def overhead(made: Any, length: int, new: int, seed: int) -> Json:
    """Return the host's seconds per step, greedy and with the default sampling."""
    prompt = list(range(length))
    return {"greedy": made.overhead(prompt, new, temperature=0), "sampled": made.overhead(prompt, new)}


def memory(made: Any) -> Json:
    """Return the process's proportional set size in bytes."""
    rollup = Path("/proc/self/smaps_rollup").read_text(encoding="ascii")
    return {"pss_bytes": 1024 * int(re.findall(r"^Pss:\s+(\d+) kB", rollup, re.MULTILINE)[0])}


ANSWERS = {"steps": steps, "throughput": throughput, "score": score, "overhead": overhead, "memory": memory}

if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), json.loads(sys.argv[4]))
