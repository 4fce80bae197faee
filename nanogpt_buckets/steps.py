"""The modules that get compiled. Today one: recompute the whole context, return the next token's logits.

A step sees fixed shapes only. Knows nothing of which bucket was chosen, of real lengths beyond `last_index`, of
sampling, or of the compiler.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nanogpt_buckets.model.gpt import GPT


class NeuronStep(nn.Module):
    """Full recompute of right-padded contexts.

    Under a causal mask a real position never sees the padding to its right, so no mask input is needed; positions are
    0..S-1. The hidden state of each row's last real token is gathered before the output projection, which is then
    (B, V) and not (B, S, V).
    """

    def __init__(self, gpt: GPT) -> None:
        super().__init__()
        self.gpt = gpt

    def forward(self, input_ids: Tensor, last_index: Tensor) -> Tensor:
        """Return the logits that follow each row's last real token.

        Args:
            input_ids: int32 (B, S). Right-padded with any valid id.
            last_index: int32 (B,). Index of each row's last real token, 0 <= last_index < S; 0 for padding rows.

        Returns:
            Logits float32 (B, V).
        """
        B = input_ids.shape[0]
        x = self.gpt.hidden(input_ids)  # (B, S, C)
        row = torch.arange(B, dtype=last_index.dtype, device=input_ids.device)  # (B)
        x = x[row, last_index]  # (B, S, C) -> (B, C)
        return self.gpt.head(x)  # (B, V)


def example_inputs(batch_size: int, seq_len: int) -> tuple[Tensor, Tensor]:
    """Return inputs of a bucket's shape: input_ids int32 (B, S) and last_index int32 (B,), all zero."""
    return torch.zeros(batch_size, seq_len, dtype=torch.int32), torch.zeros(batch_size, dtype=torch.int32)
