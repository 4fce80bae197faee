"""Decode: one more token of each row, over the keys and values that earlier calls have kept; return the next logits.

The token's own keys and values are written at its position first; whatever stands in later slots is not seen. A row
whose position is -1 is padding: its slot is somebody else's, and not a bit of it changes.

Knows nothing of sampling or of the compiler. This file is hashed into the key of every bucket of this step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from nanogpt_buckets.contract import Contract, Interface
from nanogpt_buckets.model.architecture import Architecture
from nanogpt_buckets.plan.bucket import Bucket
from nanogpt_buckets.steps.kv import KVStep

if TYPE_CHECKING:
    from torch import Tensor

    from nanogpt_buckets.model.gpt import GPT


class Decode(KVStep):
    """See `Step`."""

    name = "decode"
    sources = ("steps/kv.py", "steps/decode.py")

    def interface(self, arch: Architecture, bucket: Bucket, dtype: str) -> Interface:
        """Return input_ids int32 (B, 1), position int32 (B,) and k, v of every layer -> logits float32 (B, V)."""
        B, S = bucket.batch_size, bucket.seq_len
        return Interface(
            inputs=(Contract("input_ids", "int32", (B, 1)), Contract("position", "int32", (B,))),
            outputs=(Contract("logits", "float32", (B, arch.vocab_size)),),
            state=self.state(arch, bucket, dtype),
            limits={"input_ids": range(arch.vocab_size), "position": range(-1, S)},
        )

    def forward(self, gpt: GPT, *tensors: Tensor) -> Tensor:
        """Return the logits float32 (B, V) that follow each row's token; write at its position."""
        import torch

        input_ids, position, *state = tensors
        B, nh, S, _ = state[0].shape
        real = (position >= 0).view(B, 1, 1)  # (B, 1, 1)
        at = position.clamp(min=0)  # (B)
        # index_put and not scatter: what Inductor makes of the latter copies the whole state, there and back
        row = torch.arange(B, dtype=at.dtype, device=at.device).unsqueeze(1)  # (B, 1)
        head = torch.arange(nh, dtype=at.dtype, device=at.device).unsqueeze(0)  # (1, nh)
        slot = (row, head, at.unsqueeze(1))  # together (B, nh)
        seen = torch.arange(S, dtype=at.dtype, device=at.device) <= at.view(B, 1, 1, 1)  # (B, 1, 1, S)

        def remember(layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            for held, new in zip(state[2 * layer : 2 * layer + 2], (k, v), strict=True):  # (B, nh, S, hs)
                held.index_put_(slot, torch.where(real, new[:, :, 0], held[slot]))  # (B, nh, hs)
            return state[2 * layer], state[2 * layer + 1], seen

        x = gpt.hidden(input_ids, at.unsqueeze(1), remember)  # (B, 1, C)
        return gpt.head(x[:, 0])  # (B, V)

    def pack(
        self, contexts: Sequence[Sequence[int]], bucket: Bucket, filler: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Take the last token of each context; rows without one, or with an empty one, are padding."""
        import torch

        rows = [*contexts, *[[]] * (bucket.batch_size - len(contexts))]
        last = [row[-1] if row else 0 for row in rows]
        input_ids = torch.tensor(last, dtype=torch.int32, device="cpu").unsqueeze(1)  # (B, 1)
        position = torch.tensor([len(row) - 1 for row in rows], dtype=torch.int32, device="cpu")  # (B)
        return input_ids, position

    def positions(self, bucket: Bucket) -> int:
        """Return B: one position a row."""
        return bucket.batch_size

    def macs(self, arch: Architecture, bucket: Bucket) -> int:
        """Return multiply-adds of B rows of one position, each of which looks back at up to S."""
        C, S = arch.n_embd, bucket.seq_len
        per_token = 4 * C * C + 2 * C * arch.n_inner + 2 * S * C  # qkv and output, MLP, scores and weighted sum
        return bucket.batch_size * (arch.n_layer * per_token + C * arch.vocab_size)
