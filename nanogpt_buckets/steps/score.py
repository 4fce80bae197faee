"""Score: run a whole right-padded text and return the log-probability of each of its tokens but the first. Stateless.

Entry t is log p(id[t+1] | ids[..t]), and 0 from last_index on, where nothing real follows. Logits of all positions at
once would be the largest tensor there is (206 MB for GPT-2 at 1024), so positions go through the output projection in
pieces.

Knows nothing of the compiler. This file is hashed into the key of every bucket of this step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from nanogpt_buckets.contract import Contract, Interface
from nanogpt_buckets.model.architecture import Architecture
from nanogpt_buckets.plan.bucket import Bucket
from nanogpt_buckets.steps.whole import WholeStep

if TYPE_CHECKING:
    from torch import Tensor

    from nanogpt_buckets.model.gpt import GPT

# Logits that exist at a time: 67 MB of them.
_MOST_LOGITS = 2**24


class Score(WholeStep):
    """See `Step`."""

    name = "score"
    sources = ("steps/whole.py", "steps/score.py")

    def interface(self, arch: Architecture, bucket: Bucket, dtype: str) -> Interface:
        """Return input_ids int32 (B, S) and last_index int32 (B,) -> log-probabilities float32 (B, S-1)."""
        B, S = bucket.batch_size, bucket.seq_len
        return Interface(
            inputs=(Contract("input_ids", "int32", (B, S)), Contract("last_index", "int32", (B,))),
            outputs=(Contract("logprobs", "float32", (B, S - 1)),),
            limits={"input_ids": range(arch.vocab_size), "last_index": range(S)},
        )

    def forward(self, gpt: GPT, *tensors: Tensor) -> Tensor:
        """Return the log-probabilities float32 (B, S-1) of what stands one place further on."""
        import torch

        input_ids, last_index = tensors
        B, S = input_ids.shape
        x = gpt.hidden(input_ids)[:, :-1].flatten(0, 1)  # (B, S, C) -> (B * (S - 1), C)
        following = input_ids[:, 1:].flatten().long()  # (B * (S - 1))
        pieces = -(-x.shape[0] * gpt.arch.vocab_size // _MOST_LOGITS)
        found = [
            gpt.head(rows).log_softmax(-1).gather(1, ids.unsqueeze(1))  # (n, V) -> (n, 1)
            for rows, ids in zip(x.tensor_split(pieces), following.tensor_split(pieces), strict=True)
        ]
        real = torch.arange(S - 1, dtype=last_index.dtype, device=input_ids.device) < last_index.unsqueeze(1)
        return torch.where(real, torch.cat(found).view(B, S - 1), 0.0)

    def reference(self, gpt: GPT, bucket: Bucket, rows: Tensor, lengths: Sequence[int]) -> Tensor:
        """Return log-probabilities (B, n, S-1) of each row's first tokens, for each length; causality lets one do."""
        import torch

        logprobs = torch.zeros(len(rows), len(lengths), bucket.seq_len - 1, dtype=torch.float32, device="cpu")
        for row, ids in enumerate(rows.tolist()):
            every = torch.log_softmax(gpt(rows[row : row + 1])[0], dim=1)  # (T, V): one row's are large enough
            found = torch.stack([every[t, following] for t, following in enumerate(ids[1:])])  # (T - 1)
            for n, length in enumerate(lengths):
                logprobs[row, n, : length - 1] = found[: length - 1]
        return logprobs

    def lengths(self, seq_len: int) -> list[int]:
        """Return the middle first, where much is real and much is not: one token alone has nothing to compare."""
        usual = super().lengths(seq_len)
        return usual[len(usual) // 2 :] + usual[: len(usual) // 2]

    def tokens(self, bucket: Bucket) -> int:
        """Return B * (S - 1): every token but the first of each row."""
        return bucket.batch_size * (bucket.seq_len - 1)
