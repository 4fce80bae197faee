"""Recompute: run the whole right-padded context, return the next token's logits. Stateless.

Under a causal mask a real position never sees the padding to its right, so no mask input is needed; positions are
0..S-1. The hidden state of each row's last real token is gathered before the output projection, which is then (B, V)
and not (B, S, V).

Knows nothing of sampling or of the compiler. This file is hashed into the key of every bucket of this step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from nanogpt_buckets.contract import Contract, Interface
from nanogpt_buckets.model.architecture import Architecture
from nanogpt_buckets.plan.bucket import Bucket
from nanogpt_buckets.steps.step import Step

if TYPE_CHECKING:
    from torch import Tensor

    from nanogpt_buckets.model.gpt import GPT


class Recompute(Step):
    """See `Step`."""

    name = "recompute"
    sources = ("steps/recompute.py",)

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

    def pack(
        self, contexts: Sequence[Sequence[int]], bucket: Bucket, filler: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Right-pad contexts; rows without one have last_index 0."""
        import torch

        blank = torch.zeros(bucket.batch_size, bucket.seq_len, dtype=torch.int32, device="cpu")
        input_ids = blank if filler is None else filler.clone()  # (B, S)
        last_index = torch.zeros(bucket.batch_size, dtype=torch.int32, device="cpu")  # (B)
        for row, context in enumerate(contexts):
            input_ids[row, : len(context)] = torch.tensor(context, dtype=torch.int32, device="cpu")
            last_index[row] = len(context) - 1
        return input_ids, last_index

    def macs(self, arch: Architecture, bucket: Bucket) -> int:
        """Return multiply-adds of B rows of S positions, with logits at one position each."""
        C, S = arch.n_embd, bucket.seq_len
        per_token = 4 * C * C + 2 * C * arch.n_inner + 2 * S * C  # qkv and output, MLP, scores and weighted sum
        return bucket.batch_size * (arch.n_layer * S * per_token + C * arch.vocab_size)
