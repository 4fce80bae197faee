"""Traffic: which requests come, and so how often each step is asked for each length.

A request of p tokens that gains g is g steps at p, p+1, ..., p+g-1 tokens where each recomputes the context; where
keys and values are kept it is one prefill at p and g-1 decodes at p+1, ...; chunk does both, up to so many tokens a
call. Planning on prompts alone would be badly wrong. Knows nothing of costs, ladders, or files.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from nanogpt_buckets.errors import PlanError, UsageError
from nanogpt_buckets.plan.bucket import WAYS
from nanogpt_buckets.values import shown, whole_number

# A count of tokens that is larger is a mistake.
MOST_TOKENS = 10**9
# Prompt and generated tokens of a median request at block_size 1024, and the share of such requests.
WORKLOADS = {
    "short": ((60, 100, 1.0),),
    "chat": ((200, 150, 1.0),),
    "long": ((500, 60, 1.0),),
    "bimodal": ((30, 100, 0.5), (620, 100, 0.5)),
}
_SCALE_OF_WORKLOADS = 1024
_SPREAD = 0.6  # of the logarithm of a prompt's length
_REQUESTS = 4000
# Share of a smoothed histogram that comes from every length, so that no rung is chosen for one sample's sake.
_PRIOR = 0.05


@dataclass(frozen=True)
class Request:
    """One request: tokens of its prompt, and tokens that are generated.

    Raises:
        UsageError: a count is no whole number, negative, or beyond a thousand million.
    """

    prompt_tokens: int
    generated_tokens: int

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "generated_tokens"):
            value = whole_number(getattr(self, name))
            if value is None or not 0 <= value <= MOST_TOKENS:
                raise UsageError(f"{name} is {shown(getattr(self, name))}; it must be a whole number, 0 to 10^9")


# How often a step is asked for a row of each length: weights[step][length], from 0 to block_size.
Weights = dict[str, list[float]]


@dataclass(frozen=True)
class Demand:
    """What traffic asks of a model in one way: weights by step and length, and how many contexts were cropped."""

    weights: Mapping[str, Sequence[float]]
    crops: int = 0

    @property
    def steps(self) -> float:
        """How many rows of steps that is."""
        return sum(map(sum, self.weights.values()))


def workload(name: str, block_size: int) -> list[Request]:
    """Return some thousand requests of a kind, the same ones each time, scaled to a model's block_size.

    Prompts are log-normal, what is generated exponential.
    """
    draw, scale = random.Random(name), block_size / _SCALE_OF_WORKLOADS
    made = []
    for prompt, generated, share in WORKLOADS[name]:
        for _ in range(int(share * _REQUESTS)):
            p = prompt * scale * math.exp(draw.gauss(0, _SPREAD))
            made.append(Request(max(1, round(p)), max(1, round(draw.expovariate(1 / (generated * scale))))))
    draw.shuffle(made)
    return made


def demand(requests: Iterable[Request], block_size: int, way: str, piece: int = 1) -> Demand:
    """Count the steps of requests.

    Args:
        requests: what comes.
        block_size: positions of the model; longer contexts are cropped to it, and counted.
        way: "recompute", "kv" or "chunk", as in `WAYS`.
        piece: how many tokens a chunk takes.

    Raises:
        PlanError: no request generates anything.
    """
    M = block_size
    marks: dict[str, list[float]] = {step: [0.0] * (M + 2) for step in ("recompute", *WAYS[way])}
    crops = 0

    def count(step: str, first: int, last: int, times: float = 1) -> None:
        if first <= last:
            marks[step][first] += times
            marks[step][last + 1] -= times

    for request in requests:
        first, steps = max(1, request.prompt_tokens), request.generated_tokens
        if not steps:
            continue
        last = first + steps - 1
        beyond = max(0, last - max(M, first - 1))
        crops += beyond
        count("recompute", M, M, beyond)
        last = min(last, M)
        if way == "recompute":
            count(way, first, last)
        elif first <= M and way == "kv":
            count("prefill", first, first)
            count("decode", first + 1, last)
        elif first <= M:
            for end in range(piece, first, piece):
                count(way, end, end)
            count(way, first, last)
    weights = {step: list(accumulate(each))[: M + 1] for step, each in marks.items() if any(each)}
    if not weights:
        raise PlanError("no request generates a token, so there is nothing to plan for")
    return Demand(weights, crops)


def smoothed(weights: Sequence[float], width: int) -> list[float]:
    """Return weights smeared over `width` lengths on either side, with a little of every length, shorter ones more.

    Without this a rung lies exactly on the longest sample, and the next request, one token longer, pays for a whole
    further rung.
    """
    M, total = len(weights) - 1, sum(weights)
    kernel = [width + 1 - abs(d) for d in range(-width, width + 1)]
    every = sum(1 / n for n in range(1, M + 1))
    made = [0.0] * (M + 1)
    for n, weight in enumerate(weights):
        if weight:
            for d, part in zip(range(-width, width + 1), kernel, strict=True):
                made[min(max(n + d, 1), M)] += weight * part / sum(kernel)
    return [0.0] + [(1 - _PRIOR) * made[n] + _PRIOR * total / (n * every) for n in range(1, M + 1)]
