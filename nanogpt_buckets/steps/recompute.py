"""Recompute: run the whole right-padded context, return the next token's logits. Stateless.

Under a causal mask a real position never sees the padding to its right, so no mask input is needed; positions are
0..S-1. The hidden state of each row's last real token is gathered before the output projection, which is then (B, V)
and not (B, S, V).

Knows nothing of sampling or of the compiler. This file is hashed into the key of every bucket of this step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nanogpt_buckets.contract import Contract, Interface
from nanogpt_buckets.model.architecture import Architecture
from nanogpt_buckets.plan.bucket import Bucket
from nanogpt_buckets.steps.whole import WholeStep

if TYPE_CHECKING:
    from torch import Tensor

    from nanogpt_buckets.model.gpt import GPT


class Recompute(WholeStep):
    """See `Step`."""

    name = "recompute"
    sources = ("steps/whole.py", "steps/recompute.py")

    def interface(self, arch: Architecture, bucket: Bucket, dtype: str) -> Interface:
        """Return input_ids int32 (B, S) and last_index int32 (B,) -> logits float32 (B, V)."""
        B, S = bucket.batch_size, bucket.seq_len
        return Interface(
            inputs=(Contract("input_ids", "int32", (B, S)), Contract("last_index", "int32", (B,))),
            outputs=(Contract("logits", "float32", (B, arch.vocab_size)),),
            limits={"input_ids": range(arch.vocab_size), "last_index": range(S)},
        )

    def forward(self, gpt: GPT, *tensors: Tensor) -> Tensor:
        """Return the logits float32 (B, V) that follow each row's last real token."""
        import torch

        input_ids, last_index = tensors
        x = gpt.hidden(input_ids)  # (B, S, C)
        row = torch.arange(input_ids.shape[0], dtype=last_index.dtype, device=input_ids.device)  # (B)
        x = x[row, last_index]  # (B, S, C) -> (B, C)
        return gpt.head(x)  # (B, V)
