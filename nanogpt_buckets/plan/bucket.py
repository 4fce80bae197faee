"""Bucket: one static shape. Plan: the set of them a model is built for. Plain data, no torch.

Knows nothing of what is built already, of cost, or of files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nanogpt_buckets.errors import IncompatibleEntry, PlanError
from nanogpt_buckets.values import shown, whole_number

STEPS = ("recompute", "prefill", "decode", "score", "chunk")
# What a plan holds for each way to generate: the whole context for every token, or a prompt once and then its tokens.
STRATEGIES = {"recompute": ("recompute",), "kv": ("prefill", "decode")}
# What a plan can be for: ways to generate, or to score texts.
PURPOSES = STRATEGIES | {"score": ("score",)}
# The same, and what "kv" stands for where compiled code writes none of what it is given.
WAYS = PURPOSES | {"chunk": ("chunk",)}
# A text of one token has none that another precedes.
SHORTEST = {"score": 2}
# So that ids, and what is counted in tokens, fit in 32 bits.
_MOST_TOKENS = 2**31 - 1


@dataclass(frozen=True, order=True)
class Bucket:
    """One static shape that a step is compiled for: batch_size rows (B) of seq_len tokens (S).

    Raises:
        PlanError: a size is not a positive whole number, the bucket holds too many tokens, or the step is unknown.
    """

    batch_size: int
    seq_len: int
    step: str = "recompute"

    def __post_init__(self) -> None:
        for name in ("batch_size", "seq_len"):
            value = whole_number(getattr(self, name))
            if value is None or value < 1:
                raise PlanError(f"{name} is {shown(getattr(self, name))}; it must be a positive whole number")
            object.__setattr__(self, name, value)
        if self.batch_size * self.seq_len > _MOST_TOKENS:
            raise PlanError(
                f"a bucket of batch_size {shown(self.batch_size)} and seq_len {shown(self.seq_len)} is too large",
                hint=f"batch_size times seq_len may be {_MOST_TOKENS} at most",
            )
        if self.step not in STEPS:
            raise PlanError(f"step {shown(self.step)} is unknown", hint=f"steps: {', '.join(STEPS)}")
        if self.seq_len < SHORTEST.get(self.step, 1):
            raise PlanError(
                f"a {self.step} bucket of seq_len {self.seq_len} is of no use: no token comes before another in it",
                hint=f"{self.step} buckets hold {SHORTEST[self.step]} tokens or more",
            )

    def holds(self, batch_size: int, length: int) -> bool:
        """Whether `batch_size` rows of up to `length` tokens fit; a length of exactly seq_len does."""
        return batch_size <= self.batch_size and length <= self.seq_len

    def to_json(self) -> dict[str, Any]:
        """Return the bucket as plain JSON."""
        return {"step": self.step, "batch_size": self.batch_size, "seq_len": self.seq_len}

    def __str__(self) -> str:
        shape = f"{self.batch_size}x{self.seq_len}"
        return shape if self.step == STEPS[0] else f"{shape} {self.step}"


@dataclass(frozen=True, init=False)
class Plan(Sequence[Bucket]):
    """Buckets to build, sorted and each once, whatever order they were given in.

    Raises:
        PlanError: no bucket at all, or something that is none.
    """

    buckets: tuple[Bucket, ...]

    def __init__(self, buckets: Iterable[Bucket]) -> None:
        given = list(buckets) if isinstance(buckets, Iterable) else [buckets]
        if odd := [item for item in given if not isinstance(item, Bucket)]:
            hint = "Plan.grid(batch=[1], seq=[32, 64]) makes a plan of sizes"
            raise PlanError(f"{shown(odd[0])} is not a Bucket", hint=hint)
        ordered = tuple(sorted(set(given)))
        if not ordered:
            raise PlanError("a plan needs at least one bucket", hint="for example --seq 32,64,128")
        object.__setattr__(self, "buckets", ordered)

    @classmethod
    def grid(cls, *, batch: Iterable[int] = (1,), seq: Iterable[int], strategy: str = "recompute") -> Plan:
        """Return every pair of a batch size and a sequence length, for each step of a strategy, or for "score"."""
        if strategy not in WAYS:
            raise PlanError(f"strategy {shown(strategy)} is unknown", hint=f"strategies: {', '.join(PURPOSES)}")
        for name, sizes in (("batch", batch), ("seq", seq)):
            if not isinstance(sizes, Iterable):
                hint = "for example seq=[32, 64]"
                raise PlanError(f"{name} is {shown(sizes)}; it must be a list of whole numbers", hint=hint)
        lengths = list(seq)
        shapes = [(batch_size, seq_len) for batch_size in batch for seq_len in lengths]
        return cls(Bucket(*shape, step) for shape in shapes for step in WAYS[strategy])

    def completed(self, block_size: int) -> Plan:
        """Return a plan that also recomputes past block_size, where every position moves, if it remembers up to it."""
        ends = {b.batch_size for b in self.buckets if b.step in ("decode", "chunk") and b.seq_len == block_size}
        return self | [Bucket(batch_size, block_size) for batch_size in ends]

    def within(self, block_size: int) -> Plan:
        """Return the plan for a model whose positions end at block_size: a longer bucket becomes one of that length."""
        return Plan(Bucket(b.batch_size, min(b.seq_len, block_size), b.step) for b in self.buckets)

    def check(self, block_size: int) -> Plan:
        """Return self; a PlanError if a bucket is longer than the positions of a model with this block_size reach."""
        longest = max(bucket.seq_len for bucket in self.buckets)
        if longest > block_size:
            hint = "the longest bucket that can be of use is block_size; contexts are cropped to it"
            raise PlanError(f"seq_len {longest} is longer than the model's block_size {block_size}", hint=hint)
        return self

    def __or__(self, other: Iterable[Bucket]) -> Plan:
        return Plan((*self.buckets, *other))

    def __len__(self) -> int:
        return len(self.buckets)

    def __getitem__(self, index: Any) -> Any:
        return self.buckets[index]

    def to_json(self, *, model: str, source: str, families: Iterable[str] = ()) -> dict[str, Any]:
        """Return the content of a plan file: for which model, and what made it, such as "build".

        Entries that these families have of the buckets are in use, and so are not to be pruned.
        """
        buckets = [bucket.to_json() for bucket in self.buckets]
        return {"format": 1, "model": model, "buckets": buckets, "source": source, "families": sorted(families)}

    @classmethod
    def from_json(cls, data: Any) -> Plan:
        """Read the content of a plan file.

        Raises:
            PlanError: it is not a plan.
            IncompatibleEntry: a newer release wrote it: its format, a field or a step is unknown here.
        """
        if not isinstance(data, Mapping) or type(data.get("format")) is not int:
            raise PlanError("this is not a plan file: it names no format")
        if data["format"] != 1:
            raise _newer(f"it is of format {data['format']}, and this release knows format 1")
        if unknown := sorted(set(data) - {"format", "model", "buckets", "source", "families"}):
            raise _newer(f"it has a field {shown(unknown[0])}")
        rows = data.get("buckets")
        if not isinstance(rows, list):
            raise PlanError("the plan file has no list of buckets")
        families = data.get("families", [])
        if not isinstance(families, list) or not all(re.fullmatch("[0-9a-f]{64}", str(family)) for family in families):
            raise PlanError("the plan file names families that are no digests")
        return cls(_bucket_from_json(row) for row in rows)


def _bucket_from_json(row: Any) -> Bucket:
    if not isinstance(row, Mapping) or not {"batch_size", "seq_len"} <= set(row):
        raise PlanError(f"{row!r:.200} is not a bucket", hint='a bucket is {"step", "batch_size", "seq_len"}')
    if unknown := sorted(set(row) - {"step", "batch_size", "seq_len"}):
        raise _newer(f"a bucket of it has a field {shown(unknown[0])}")
    step = row.get("step", STEPS[0])
    if isinstance(step, str) and step not in STEPS:
        raise _newer(f"it has a step {shown(step)}")
    return Bucket(row["batch_size"], row["seq_len"], step)


def _newer(what: str) -> IncompatibleEntry:
    return IncompatibleEntry(
        f"the plan was written by a newer release: {what:.200}", hint="update nanogpt-buckets; the file is left alone"
    )
