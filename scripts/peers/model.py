"""The network that every contestant runs: GPT-2 124M's shape, seeded random weights, no tokenizer and no end token.

Weights are ten times as far apart as at the start of a training, so that the likeliest token wins by a margin and
engines that compute the same give the same ids. A tiny shape shows that the script works.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, int]] = {
    "gpt2": {},  # transformers' defaults
    "tiny": {"n_layer": 2, "n_head": 3, "n_embd": 48, "n_positions": 128, "vocab_size": 211},
}


def write(folder: Path, shape: str) -> None:
    """Save a Hugging Face folder, if it is not there."""
    if (folder / "complete").exists():
        return
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, utils

    utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    torch.manual_seed(1337)
    config = GPT2Config(**SHAPES[shape], initializer_range=0.2, bos_token_id=None, eos_token_id=None)
    GPT2LMHeadModel(config).save_pretrained(folder)
    (folder / "complete").touch()


def sizes(folder: Path) -> dict[str, int]:
    """Return n_layer, n_embd, n_positions and vocab_size."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return {name: config[name] for name in ("n_layer", "n_embd", "n_positions", "vocab_size")}


def parameters(folder: Path) -> int:
    """Return how many numbers a decode step reads: all weights, the shared embedding once."""
    at = sizes(folder)
    C = at["n_embd"]
    layer = 12 * C * C + 13 * C
    return at["n_layer"] * layer + 2 * C + (at["vocab_size"] + at["n_positions"]) * C


def prefill_flops(folder: Path, length: int) -> float:
    """Return the operations that logits after a prompt need: linears, causal attention, one row of logits."""
    at = sizes(folder)
    C = at["n_embd"]
    macs = at["n_layer"] * (12 * C * C * length + C * length * length) + C * at["vocab_size"]
    return 2.0 * macs


def texts(count: int, shortest: int, longest: int, vocab_size: int, seed: str) -> list[list[int]]:
    """Return token ids by this seed; lengths are spread evenly at random, and the same for every seed.

    No two measures have a seed in common: an engine that remembers prompts would find the start of one in another.
    """
    spread, draw = random.Random(0), random.Random(seed)
    lengths = [spread.randint(shortest, longest) for _ in range(count)]
    return [[draw.randrange(vocab_size) for _ in range(length)] for length in lengths]
