"""What one step in a bucket costs, modelled: only the order of two buckets' costs matters to dispatch.

Knows nothing of the machine; a measured cost may take the model's place without its callers noticing.
"""

from __future__ import annotations

from nanogpt_buckets.model.architecture import Architecture
from nanogpt_buckets.plan.bucket import Bucket


def step_flops(arch: Architecture, bucket: Bucket) -> int:
    """Return multiply-adds of one recompute step: B rows of S positions, logits at one position each."""
    C, S = arch.n_embd, bucket.seq_len
    per_token = 4 * C * C + 2 * C * arch.n_inner + 2 * S * C  # qkv and output, MLP, scores and weighted sum
    return bucket.batch_size * (arch.n_layer * S * per_token + C * arch.vocab_size)
