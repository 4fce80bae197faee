"""Keys and values of the rows of one batch, in slots: allocated once, never reset, moved only to close gaps.

What steps find and write is views of it. Knows nothing of which bucket is chosen, nor of what a row is for.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nanogpt_buckets.model.architecture import Architecture
from nanogpt_buckets.plan.bucket import Bucket

# 28 rows of GPT-2 124M in float32.
_MOST_BYTES = 2**31


def most_rows(arch: Architecture, dtype: str) -> int:
    """Return how many rows may be remembered at a time."""
    kind: torch.dtype = getattr(torch, dtype)
    row = 2 * arch.n_layer * arch.n_embd * arch.block_size * kind.itemsize
    return max(1, _MOST_BYTES // row)


class KVCache:
    """Two tensors a layer, (slots, nh, block_size, hs), for as long as a batch runs.

    Args:
        arch: the network's.
        dtype: the weights', "float32" or "bfloat16".
        slots: rows of the batch; row i begins in slot i.
        widest: the largest batch size of a bucket, whose padding may hang over the last slot.
    """

    def __init__(self, arch: Architecture, dtype: str, slots: int, widest: int) -> None:
        shape = (slots + widest - 1, arch.n_head, arch.block_size, arch.n_embd // arch.n_head)
        # zeros cost nothing until they are written, and what is masked must be finite all the same
        kind = getattr(torch, dtype)
        self._tensors = [torch.zeros(shape, dtype=kind, device="cpu") for _ in range(2 * arch.n_layer)]
        self._slots = list(range(slots))

    @property
    def bytes(self) -> int:
        """How much memory it takes at most."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._tensors)

    def slot(self, row: int) -> int:
        """Return where a row is."""
        return self._slots[row]

    def views(self, first: int, bucket: Bucket) -> list[Tensor]:
        """Return what a call of a bucket finds whose first row is in this slot: 2L of (B, nh, S, hs)."""
        end = first + bucket.batch_size
        return [tensor[first:end, :, : bucket.seq_len] for tensor in self._tensors]

    def copy(self, row: int, to: int, length: int) -> None:
        """Copy the first `length` positions of a row to another, which then goes on from there."""
        source, target = self._slots[row], self._slots[to]
        for tensor in self._tensors:
            tensor[target, :, :length] = tensor[source, :, :length]

    def close_gaps(self, rows: Sequence[int], lengths: Sequence[int]) -> None:
        """Move the rows that are left, in the order of their slots, to the first ones, once half of a span is idle."""
        places = [self._slots[row] for row in rows]
        if 2 * len(rows) > places[-1] - places[0] + 1:
            return
        for place, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            for tensor in self._tensors:
                tensor[place, :, :length] = tensor[self._slots[row], :, :length]
            self._slots[row] = place
