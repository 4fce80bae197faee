"""Prefill: run a right-padded prompt, keep keys and values of its positions, return the next token's logits.

What it computes is what recompute computes. A row whose last_index is -1 is padding: its slot is somebody else's, and
not a bit of it changes.

Knows nothing of sampling or of the compiler. This file is hashed into the key of every bucket of this step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nanogpt_buckets.contract import Contract, Interface
from nanogpt_buckets.model.architecture import Architecture
from nanogpt_buckets.plan.bucket import Bucket
from nanogpt_buckets.steps.kv import KVStep
from nanogpt_buckets.steps.whole import WholeStep

if TYPE_CHECKING:
    from torch import Tensor

    from nanogpt_buckets.model.gpt import GPT


class Prefill(KVStep, WholeStep):
    """See `Step`."""

    name = "prefill"
    sources = ("steps/whole.py", "steps/kv.py", "steps/prefill.py")
    nobody = -1

    def interface(self, arch: Architecture, bucket: Bucket, dtype: str) -> Interface:
        """Return input_ids int32 (B, S), last_index int32 (B,) and k, v of every layer -> logits float32 (B, V)."""
        B, S = bucket.batch_size, bucket.seq_len
        return Interface(
            inputs=(Contract("input_ids", "int32", (B, S)), Contract("last_index", "int32", (B,))),
            outputs=(Contract("logits", "float32", (B, arch.vocab_size)),),
            state=self.state(arch, bucket, dtype),
            limits={"input_ids": range(arch.vocab_size), "last_index": range(-1, S)},
        )

    def forward(self, gpt: GPT, *tensors: Tensor) -> Tensor:
        """Return the logits float32 (B, V) that follow each row's last real token; write positions 0..S-1."""
        import torch

        input_ids, last_index, *state = tensors
        real = (last_index >= 0).view(-1, 1, 1, 1)  # (B, 1, 1, 1)

        def remember(layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, None]:
            for held, new in zip(state[2 * layer : 2 * layer + 2], (k, v), strict=True):  # (B, nh, S, hs)
                held.copy_(torch.where(real, new, held))
            return k, v, None

        x = gpt.hidden(input_ids, memory=remember)  # (B, S, C)
        row = torch.arange(input_ids.shape[0], dtype=last_index.dtype, device=input_ids.device)  # (B)
        x = x[row, last_index.clamp(min=0)]  # (B, S, C) -> (B, C)
        return gpt.head(x)  # (B, V)
