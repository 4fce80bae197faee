"""Order: which bucket of a plan to build next, so that a build that ends early has built what is worth the most.

First the longest of each step, in which everything can run; then whichever saves most, as if each bucket of the plan
were asked for equally often, for a plan has most buckets where most of its traffic is. Knows nothing of how a bucket
is built.

Source: greedy choice is within 1 - 1/e of the best saving, and gains only fall, so that old ones are bounds: Nemhauser,
Wolsey and Fisher, 1978; Minoux, 1978.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable

from nanogpt_buckets.plan.bucket import Bucket


def build_order(plan: Iterable[Bucket], built: Iterable[Bucket], cost: Callable[[Bucket], float]) -> list[Bucket]:
    """Return the buckets of a plan that are not built, the most useful first.

    Args:
        plan: all its buckets.
        built: those that are there already; they save nothing any more.
        cost: what a call of a bucket takes, in whatever unit, the same for all steps.
    """
    wanted, have = set(plan), set(built)
    price = {bucket: cost(bucket) for bucket in wanted | have}
    # what each bucket's own traffic costs with what is built so far
    now = dict.fromkeys(wanted, math.inf)

    def serve(bucket: Bucket, asked: Bucket) -> float:
        calls = -(-asked.batch_size // bucket.batch_size)
        fits = bucket.step == asked.step and bucket.seq_len >= asked.seq_len
        return calls * price[bucket] if fits else math.inf

    def build(bucket: Bucket) -> None:
        for asked in wanted:
            now[asked] = min(now[asked], serve(bucket, asked))

    for bucket in have:
        build(bucket)
    longest = [max(_of(wanted, step), key=_size) for step in {bucket.step for bucket in wanted}]
    unreached = [b for b in longest if all(other.seq_len < b.seq_len for other in _of(have, b.step))]
    order = sorted(unreached, key=lambda b: (-price[b], b))
    for bucket in order:
        build(bucket)

    def gain(bucket: Bucket) -> float:
        return sum(max(0.0, now[asked] - serve(bucket, asked)) for asked in wanted)

    heap = [(-gain(b), [-n for n in _size(b)], b) for b in wanted - have - set(order)]
    heapq.heapify(heap)
    while heap:
        _, size, bucket = heapq.heappop(heap)
        saved = gain(bucket)
        if heap and (-saved, size, bucket) > heap[0]:
            heapq.heappush(heap, (-saved, size, bucket))
            continue
        build(bucket)
        order.append(bucket)
    return order


def _of(buckets: Iterable[Bucket], step: str) -> Iterable[Bucket]:
    return (bucket for bucket in buckets if bucket.step == step)


def _size(bucket: Bucket) -> tuple[int, int]:
    return bucket.seq_len, bucket.batch_size
