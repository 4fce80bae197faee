"""Which buckets hold which rows, at the least cost. Pure: lengths, buckets and a cost go in.

The cheapest bucket that fits is chosen by cost, never by sorting sizes. Knows nothing of what is built or loaded.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Sequence

from nanogpt_buckets.plan.bucket import Bucket

Cost = Callable[[Bucket], int]


def cheapest(buckets: Iterable[Bucket], batch_size: int, length: int, cost: Cost) -> Bucket | None:
    """Return the cheapest bucket that holds `batch_size` rows of `length` tokens, or None.

    Equal costs go to the shorter bucket, then to the smaller batch.
    """
    fitting = [bucket for bucket in buckets if bucket.holds(batch_size, length)]
    return min(fitting, key=lambda b: (cost(b), b.seq_len, b.batch_size), default=None)


def group(lengths: Sequence[int], buckets: Sequence[Bucket], cost: Cost) -> list[tuple[Bucket, list[int]]]:
    """Cut rows into groups that each fill one bucket, at the least total cost.

    For costs that never fall with length, contiguous groups of the sorted lengths are optimal; a dynamic programme
    over where they end finds the best: F[j] = min over i < j of F[i] + c(bucket for rows i..j-1).

    Args:
        lengths: tokens of each row.
        buckets: what may run.
        cost: of one step in a bucket.

    Returns:
        (bucket, row indices) pairs that cover every row once.

    Raises:
        ValueError: some row fits no bucket; callers settle coverage first.
    """
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    widest = max((bucket.batch_size for bucket in buckets), default=0)
    best: list[tuple[float, int, Bucket | None]] = [(0, 0, None)]  # cost so far, start of last group, its bucket
    for end in range(1, len(order) + 1):
        options: list[tuple[float, int, Bucket | None]] = []
        for start in range(max(0, end - widest), end):
            bucket = cheapest(buckets, end - start, lengths[order[end - 1]], cost)
            if bucket is not None:
                options.append((best[start][0] + cost(bucket), start, bucket))
        if not options:
            raise ValueError(f"no bucket holds {lengths[order[end - 1]]} tokens")
        best.append(min(options, key=lambda option: option[:2]))
    groups, end = [], len(order)
    while end:
        _, start, bucket = best[end]
        assert bucket is not None
        groups.append((bucket, order[start:end]))
        end = start
    return groups[::-1]


def buckets_used(
    lengths: Sequence[int], more_tokens: int, buckets: Sequence[Bucket], cost: Cost, block_size: int
) -> set[Bucket]:
    """Return the buckets that rows use which go together and grow by a token a step.

    Args:
        lengths: tokens of each row at its first step.
        more_tokens: how many tokens each row gains before its last step.
        buckets: what may run.
        cost: of one step in a bucket.
        block_size: contexts do not grow beyond it.

    Raises:
        ValueError: some row outgrows every bucket.
    """
    rungs = sorted({bucket.seq_len for bucket in buckets})
    used: set[Bucket] = set()
    before: list[int] = []
    for grown in range(more_tokens + 1):
        now = [min(length + grown, block_size) for length in lengths]
        places = [bisect.bisect_left(rungs, length) for length in now]
        if places != before:  # grouped anew whenever one of them outgrows a rung
            used |= {bucket for bucket, _ in group(now, buckets, cost)}
        before = places
        if min(now) == block_size:
            break
    return used
