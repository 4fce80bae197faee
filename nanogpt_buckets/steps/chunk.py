"""Chunk: up to T more tokens of each row, as a pure function of them and of what earlier calls returned.

Keys and values go in and come out whole, two tensors a layer, k then v, each (B, nh, block_size, hs): where a program
may keep its inputs on a device and write none of them, one set of them serves every bucket. A bucket of length S reads
and writes slots 0..S-1 and hands on the rest, so nothing moves when a row outgrows it.

Nothing is ever reset: a token is written at its position before anything looks there, and later slots are not seen. A
row whose last_index is -1 is padding: its slots come back as they went in.

Knows nothing of sampling or of the compiler. This file is hashed into the key of every bucket of this step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from nanogpt_buckets.contract import Contract, Interface, View
from nanogpt_buckets.model.architecture import Architecture
from nanogpt_buckets.plan.bucket import Bucket
from nanogpt_buckets.steps.step import Step

if TYPE_CHECKING:
    from torch import Tensor

    from nanogpt_buckets.model.gpt import GPT

# Every call reads all weights, which on the devices this is for takes as long as multiplying them by so many rows.
_MOST = 64


class Chunk(Step):
    """See `Step`."""

    name = "chunk"
    sources = ("steps/chunk.py",)
    pure = True

    def __init__(self, seq_len: int = 0) -> None:
        self.seq_len = seq_len

    def interface(self, arch: Architecture, bucket: Bucket, dtype: str) -> Interface:
        """Return input_ids int32 (B, T), start and last_index int32 (B,), state -> logits float32 (B, V), state."""
        B, T = bucket.batch_size, self.width(bucket)
        nh, CAP, hs = arch.n_head, arch.block_size, arch.n_embd // arch.n_head
        shape, strides = (B, nh, CAP, hs), (nh * CAP * hs, CAP * hs, hs, 1)
        state = tuple(View(f"{name}{layer}", dtype, shape, strides) for layer in range(arch.n_layer) for name in "kv")
        made = (Contract(view.name, dtype, shape) for view in state)
        return Interface(
            inputs=(
                Contract("input_ids", "int32", (B, T)),
                Contract("start", "int32", (B,)),
                Contract("last_index", "int32", (B,)),
            ),
            outputs=(Contract("logits", "float32", (B, arch.vocab_size)), *made),
            state=state,
            limits={
                "input_ids": range(arch.vocab_size),
                "start": range(bucket.seq_len),
                "last_index": range(-1, T),
            },
        )

    def within(self, bucket: Bucket) -> Chunk:
        """Return the step that knows how many slots to look at."""
        return Chunk(bucket.seq_len)

    def forward(self, gpt: GPT, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return the logits float32 (B, V) that follow each row's last new token, and every k and v."""
        import torch

        input_ids, start, last_index, *state = tensors
        (B, T), S, end = input_ids.shape, self.seq_len, gpt.arch.block_size
        token = torch.arange(T, dtype=start.dtype, device=start.device)  # (T)
        slot = torch.arange(S, dtype=start.dtype, device=start.device)  # (S)
        position = start.unsqueeze(1) + token  # (B, T)
        real = token <= last_index.unsqueeze(1)  # (B, T)
        seen = (slot <= position.unsqueeze(2)).unsqueeze(1)  # (B, 1, T, S)
        into = (slot.unsqueeze(1) == position.unsqueeze(1)) & real.unsqueeze(1)  # (B, S, T)
        last = (start + last_index).unsqueeze(1)  # (B, 1)
        written = ((start.unsqueeze(1) <= slot) & (slot <= last)).view(B, 1, S, 1)  # (B, 1, S, 1)
        made: list[Tensor] = []

        def remember(layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            for held, new in zip(state[2 * layer : 2 * layer + 2], (k, v), strict=True):
                # a product with ones and zeros, and not a scatter: exact, and a shape that every compiler knows
                moved = into.unsqueeze(1).to(new.dtype) @ new  # (B, 1, S, T) @ (B, nh, T, hs) -> (B, nh, S, hs)
                kept = torch.where(written, moved, held[:, :, :S])  # (B, nh, S, hs)
                made.append(kept if end == S else torch.cat([kept, held[:, :, S:]], 2))  # (B, nh, block_size, hs)
            k, v = (whole[:, :, :S] for whole in made[-2:])
            return k, v, seen

        x = gpt.hidden(input_ids, position.clamp(max=end - 1), remember)  # (B, T, C)
        row = torch.arange(B, dtype=last_index.dtype, device=last_index.device)  # (B)
        x = x[row, last_index.clamp(min=0)]  # (B, T, C) -> (B, C)
        return gpt.head(x), *made  # (B, V)

    def width(self, bucket: Bucket) -> int:
        """Return T."""
        return min(_MOST, bucket.seq_len)

    def positions(self, bucket: Bucket) -> int:
        """Return B * T."""
        return bucket.batch_size * self.width(bucket)

    def pack(
        self, contexts: Sequence[Sequence[int]], bucket: Bucket, filler: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Take contexts of at most T tokens of which nothing is remembered yet."""
        return self.pack_after([0] * len(contexts), contexts, bucket, filler)

    def pack_after(
        self, kept: Sequence[int], contexts: Sequence[Sequence[int]], bucket: Bucket, filler: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Take what of each context is not yet `kept`; rows without anything new are padding."""
        import torch

        B, T = bucket.batch_size, self.width(bucket)
        input_ids = torch.zeros(B, T, dtype=torch.int32, device="cpu")  # (B, T)
        if filler is not None:
            input_ids.copy_(filler[:, :T])
        start = torch.zeros(B, dtype=torch.int32, device="cpu")  # (B)
        last_index = torch.full((B,), -1, dtype=torch.int32, device="cpu")  # (B)
        for row, (before, context) in enumerate(zip(kept, contexts, strict=True)):
            new = context[before:]
            if new:
                input_ids[row, : len(new)] = torch.tensor(new, dtype=torch.int32, device="cpu")
                start[row], last_index[row] = before, len(new) - 1
        return input_ids, start, last_index

    def macs(self, arch: Architecture, bucket: Bucket) -> int:
        """Return multiply-adds of B rows of T positions that look back at S, and write into S."""
        C, T, S = arch.n_embd, self.width(bucket), bucket.seq_len
        per_token = 4 * C * C + 2 * C * arch.n_inner + 4 * S * C  # qkv and output, MLP, attention and writing
        return bucket.batch_size * (arch.n_layer * T * per_token + C * arch.vocab_size)
