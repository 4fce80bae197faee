"""What prefill and decode share: keys and values of every layer, alive between calls, and who goes with whom.

Two tensors a layer, k then v, each (slots, nh, block_size, hs): whatever the bucket, a row keeps its slot, and nothing
is copied when it outgrows one. A call gets views of them, [first:first+B, :, :S], whose strides depend on neither.
This file is hashed into the keys of both steps' buckets.
"""

from __future__ import annotations

from nanogpt_buckets.contract import View
from nanogpt_buckets.model.architecture import Architecture
from nanogpt_buckets.plan.bucket import Bucket
from nanogpt_buckets.steps.step import Step


class KVStep(Step):
    """A step that finds what earlier calls have written, and writes more; see `Step`."""

    @property
    def opened_by(self) -> str:
        """Return prefill."""
        return "prefill"

    @property
    def continued_by(self) -> str:
        """Return decode."""
        return "decode"

    def state(self, arch: Architecture, bucket: Bucket, dtype: str) -> tuple[View, ...]:
        """Return k and v of each layer, (B, nh, S, hs) within (B, nh, block_size, hs)."""
        nh, hs = arch.n_head, arch.n_embd // arch.n_head
        shape = (bucket.batch_size, nh, bucket.seq_len, hs)
        strides = (nh * arch.block_size * hs, arch.block_size * hs, hs, 1)
        return tuple(View(f"{name}{layer}", dtype, shape, strides) for layer in range(arch.n_layer) for name in "kv")
