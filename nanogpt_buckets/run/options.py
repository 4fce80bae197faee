"""How the next token is chosen, as one value that is handed on whole. A further option is one field here and one flag.

Knows nothing of logits. Imports no torch.
"""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass, field
from typing import TypedDict

from nanogpt_buckets.errors import UsageError
from nanogpt_buckets.values import real_number, shown, whole_number

RNGS = ("per-row", "nanogpt")
# Every draw writes the seed out in decimal, which Python does for so many digits only.
_SEED_BITS = 4096


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Args:
        temperature: divides the logits; 0 always takes the likeliest token, the lowest id among equals.
        top_k: keep the k likeliest tokens and whatever equals the k-th; None or 0 keeps all.
        top_p: keep the fewest likeliest tokens whose probabilities reach p; None keeps all.
        seed: of all draws; one is chosen where none is given.
        rng: "per-row" draws by (seed, prompt, sample, step) alone, whatever the batch, bucket or vocabulary padding;
            "nanogpt" uses one torch generator and gives nanoGPT's own text.
        ignore_eos: write on after the model's end token, if it has one.

    Raises:
        UsageError: a value is out of range.
    """

    temperature: float = 0.8
    top_k: int | None = 200
    top_p: float | None = None
    seed: int = field(default_factory=lambda: secrets.randbits(63))
    rng: str = "per-row"
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        temperature, seed = real_number(self.temperature), whole_number(self.seed)
        top_k = 0 if self.top_k is None else whole_number(self.top_k)
        top_p = 1.0 if self.top_p is None else real_number(self.top_p)
        if temperature is None or not 0 <= temperature < math.inf:
            raise UsageError(f"temperature is {shown(self.temperature)}; it must be 0 or a positive number")
        if top_k is None or top_k < 0:
            raise UsageError(f"top_k is {shown(self.top_k)}; it must be a whole number, 0 or None to turn it off")
        if top_p is None or not 0 < top_p <= 1:
            raise UsageError(f"top_p is {shown(self.top_p)}; it must be above 0 and at most 1")
        if seed is None:
            raise UsageError(f"seed is {shown(self.seed)}; it must be a whole number")
        if seed.bit_length() > _SEED_BITS:
            raise UsageError(f"the seed is too large; it must be below 2 to the power of {_SEED_BITS}")
        if self.rng not in RNGS:
            raise UsageError(f"rng {shown(self.rng)} is unknown", hint=f"generators: {', '.join(RNGS)}")
        if not isinstance(self.ignore_eos, bool):
            raise UsageError(f"ignore_eos is {shown(self.ignore_eos)}; it must be True or False")
        plain = {"temperature": temperature, "seed": seed, "top_k": top_k or None}
        for name, value in (plain | {"top_p": None if self.top_p is None else top_p}).items():
            object.__setattr__(self, name, value)


class SamplingOptions(TypedDict, total=False):
    """The fields of `Sampling`, as keyword arguments of everything that generates; None as seed chooses one."""

    temperature: float
    top_k: int | None
    top_p: float | None
    seed: int | None
    rng: str
    ignore_eos: bool
