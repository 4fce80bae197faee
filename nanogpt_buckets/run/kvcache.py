"""Keys and values of the rows of a batch, in slots: allocated once, never reset, copied from slot to slot.

What steps find and write is views of it. Knows nothing of which bucket is chosen, nor of what a row is for.
"""

from __future__ import annotations

import math
import mmap

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
        slots: how many rows it is for, at least as many as the widest bucket has.
    """

    def __init__(self, arch: Architecture, dtype: str, slots: int) -> None:
        self.slots = slots
        shape = (2 * arch.n_layer, slots, arch.n_head, arch.block_size, arch.n_embd // arch.n_head)
        kind: torch.dtype = getattr(torch, dtype)
        # What is masked must be finite all the same. Fresh pages are zeros that cost nothing until they are written;
        # torch.zeros writes them as soon as malloc hands out memory that was in use before.
        pages = mmap.mmap(-1, math.prod(shape) * kind.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._tensors = torch.frombuffer(pages, dtype=kind).view(shape).unbind()
        self._views: dict[tuple[int, Bucket], list[Tensor]] = {}

    @property
    def bytes(self) -> int:
        """How much memory it takes at most."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._tensors)

    def views(self, slot: int, bucket: Bucket) -> tuple[int, list[Tensor]]:
        """Return what a call of a bucket finds, 2L of (B, nh, S, hs), and the slot of its first row.

        That is the one asked for, or one before where there are too few after it.
        """
        first = min(slot, self.slots - bucket.batch_size)
        if (first, bucket) not in self._views:
            cut = slice(first, first + bucket.batch_size)
            self._views[first, bucket] = [tensor[cut, :, : bucket.seq_len] for tensor in self._tensors]
        return first, self._views[first, bucket]

    def copy(self, slot: int, to: int, length: int) -> None:
        """Copy the first `length` positions of a slot to another."""
        for tensor in self._tensors:
            tensor[to, :, :length] = tensor[slot, :, :length]
