"""What scripts/check-xla lowers: buckets that must pass, and steps with one known fault that must be caught.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

CHECKS = ("trace", "shapes", "operators", "inputs", "indices", "gate")


@dataclass(frozen=True)
class Case:
    """One bucket of one architecture; a control also has a fault and the checks that must find it."""

    name: str
    arch: Mapping[str, Any]
    batch_size: int
    seq_len: int
    step: str = "recompute"
    dtype: str = "float32"
    fault: str = ""
    caught_by: tuple[str, ...] = ()
    functionalized: tuple[bool, ...] = (False, True)
    environment: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        kind = "" if self.dtype == "float32" else f" {self.dtype}"
        return f"{self.name} {self.batch_size}x{self.seq_len} {self.step}{kind}"


# Odd on purpose: no size is a power of two, no two are equal.
OPENAI = {"n_layer": 2, "n_head": 3, "n_embd": 48, "n_inner": 192, "block_size": 100, "vocab_size": 211}
NANOGPT = OPENAI | {"bias": False, "activation": "gelu"}
SCALED = OPENAI | {"scale_by_layer": True, "upcast_attention": True, "tied": False}
GPT2 = {"n_layer": 12, "n_head": 12, "n_embd": 768, "n_inner": 3072, "block_size": 1024, "vocab_size": 50257}
ROWS = (
    *(Case("openai", OPENAI, batch, seq) for batch, seq in ((1, 1), (1, 16), (1, 100), (2, 33), (4, 33), (4, 100))),
    *(Case("nanogpt", NANOGPT, batch, seq) for batch, seq in ((1, 100), (2, 33), (4, 16))),
    Case("untied head", OPENAI | {"tied": False}, 2, 33),
    Case("scaled, upcast", SCALED, 2, 33),
    Case("relu", OPENAI | {"activation": "relu"}, 2, 33),
    Case("silu", OPENAI | {"activation": "silu"}, 2, 33),
    Case("openai", OPENAI, 2, 33, dtype="bfloat16"),
    Case("gpt2", GPT2, 1, 128),
    # chunks of 1, 16, 33 and 64 tokens, in buckets up to block_size
    *(Case("openai", OPENAI, batch, seq, "chunk") for batch, seq in ((1, 1), (1, 64), (2, 16), (2, 100), (4, 100))),
    Case("nanogpt", NANOGPT, 4, 33, "chunk"),
    Case("scaled, upcast", SCALED, 2, 100, "chunk"),
    Case("openai", OPENAI, 2, 100, "chunk", "bfloat16"),
    Case("gpt2", GPT2, 1, 128, "chunk"),
)  # fmt: skip


def _control(fault: str, *caught_by: str, on: bool = False, chunk: bool = False, **environment: str) -> Case:
    batch_size, seq_len, step = (2, 100, "chunk") if chunk else (2, 33, "recompute")
    return Case(fault, OPENAI, batch_size, seq_len, step, "float32", fault, caught_by, (on,), environment)


CONTROLS = (
    _control("list-form split", "gate"),
    _control("list-form split", on=True),  # right once functionalized: shows that the fault is torch-xla's
    _control("left padding", "gate"),
    _control("mask dropped", "gate"),
    _control("last_index ignored", "inputs", "gate"),
    _control("sort", "operators"),
    _control("int64 ids", "inputs"),
    _control("value read in trace", "trace"),
    _control("dynamic shape", "shapes", XLA_EXPERIMENTAL="nonzero"),
    _control("write skipped in one layer", "gate", chunk=True),
    _control("mask off by one", "gate", chunk=True),
    _control("position not clamped", "indices", chunk=True),
    _control("k and v exchanged", "gate", chunk=True),
    _control("old state ignored", "inputs", "gate", chunk=True),
)
