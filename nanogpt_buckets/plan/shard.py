"""Shard: the part of a plan that one of several machines builds, told apart without a word between them.

Knows nothing of what a bucket costs - it is told - nor of what is built already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from nanogpt_buckets.errors import UsageError
from nanogpt_buckets.plan.bucket import Bucket
from nanogpt_buckets.values import shown, whole_number


def part(buckets: Iterable[Bucket], shard: tuple[int, int], cost: Callable[[Bucket], int]) -> list[Bucket]:
    """Return shard I of N: each bucket is in exactly one, whoever asks and wherever.

    The buckets are dealt out from the most expensive on, as cards are, so that no shard has more than one more than
    another: compiling takes nearly as long for a small bucket as for a large one.

    Args:
        buckets: those of the whole plan; may be fewer than N, and then some shards are empty.
        shard: I, from 1 to N, and N.
        cost: what a bucket costs; those that cost the same are dealt in their own order.

    Raises:
        UsageError: I and N are no whole numbers, or I is not from 1 to N.
    """
    try:
        index, count = shard
    except (TypeError, ValueError):
        raise UsageError(f"shard is {shown(shard)}; it must be a pair of numbers", hint="for example (1, 3)") from None
    first, last = whole_number(index), whole_number(count)
    if first is None or last is None or not 1 <= first <= last:
        said = f"shard {shown(index)} of {shown(count)} does not exist"
        raise UsageError(said, hint="shards are counted from 1: 1/3, 2/3 and 3/3 make a whole")
    return sorted(sorted(buckets, key=lambda bucket: (-cost(bucket), bucket))[first - 1 :: last])
