"""What steps share that run whole contexts: right-padded ids with the index of each row's last, and what that costs.

This file is hashed into the keys of these steps' buckets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from nanogpt_buckets.model.architecture import Architecture
from nanogpt_buckets.plan.bucket import Bucket
from nanogpt_buckets.steps.step import Step

if TYPE_CHECKING:
    from torch import Tensor


class WholeStep(Step):
    """A step that takes input_ids int32 (B, S) and last_index int32 (B,); see `Step`.

    `nobody` is the last_index of a row that is padding.
    """

    nobody = 0

    def pack(
        self, contexts: Sequence[Sequence[int]], bucket: Bucket, filler: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Right-pad contexts; rows without one, or with an empty one, are padding."""
        import torch

        blank = torch.zeros(bucket.batch_size, bucket.seq_len, dtype=torch.int32, device="cpu")
        input_ids = blank if filler is None else filler.clone()  # (B, S)
        last_index = torch.full((bucket.batch_size,), self.nobody, dtype=torch.int32, device="cpu")  # (B)
        for row, context in enumerate(contexts):
            if context:
                input_ids[row, : len(context)] = torch.tensor(context, dtype=torch.int32, device="cpu")
                last_index[row] = len(context) - 1
        return input_ids, last_index

    def macs(self, arch: Architecture, bucket: Bucket) -> int:
        """Return multiply-adds of B rows of S positions, and of the logits that are asked for."""
        C, S = arch.n_embd, bucket.seq_len
        per_token = 4 * C * C + 2 * C * arch.n_inner + 2 * S * C  # qkv and output, MLP, scores and weighted sum
        return bucket.batch_size * arch.n_layer * S * per_token + self.tokens(bucket) * C * arch.vocab_size
