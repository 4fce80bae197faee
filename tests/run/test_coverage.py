"""Grouping is compared with trying every partition, and the buckets a run uses with walking through it."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt_buckets.plan.bucket import Bucket
from nanogpt_buckets.run.dispatch import buckets_used, cheapest, group


def area(bucket: Bucket) -> int:
    return bucket.batch_size * bucket.seq_len


@given(st.integers(1, 64))
def test_a_length_goes_to_the_shortest_rung_that_holds_it(length):
    ladder = [Bucket(1, s) for s in (16, 32, 64)]

    assert cheapest(ladder, 1, length, area) == Bucket(1, next(s for s in (16, 32, 64) if s >= length))


def test_nothing_holds_what_is_too_long():
    assert cheapest([Bucket(1, 16)], 1, 17, area) is None
    assert cheapest([Bucket(1, 16)], 2, 1, area) is None


def test_choice_is_by_cost_and_not_by_sorting_sizes():
    # the batch-first choice would compute 2048 positions for two rows of 100 tokens
    assert cheapest([Bucket(2, 1024), Bucket(4, 128)], 2, 100, area) == Bucket(4, 128)


def test_a_batch_bucket_beats_single_rows_only_when_it_is_cheaper():
    buckets = [Bucket(1, 16), Bucket(4, 16)]

    assert group([9, 9, 9], buckets, lambda b: 10 + area(b)) == [(Bucket(4, 16), [0, 1, 2])]
    assert [b for b, _ in group([9, 9, 9], buckets, area)] == [Bucket(1, 16)] * 3


def partitions(rows):
    if not rows:
        yield []
        return
    first, rest = rows[0], rows[1:]
    for size in range(len(rest) + 1):
        for others in itertools.combinations(rest, size):
            remaining = [row for row in rest if row not in others]
            for tail in partitions(remaining):
                yield [[first, *others], *tail]


buckets_strategy = st.lists(st.builds(Bucket, st.integers(1, 3), st.integers(1, 12)), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=5), buckets_strategy, st.integers(0, 20))
def test_grouping_costs_no_more_than_any_partition(lengths, buckets, overhead):
    buckets = [*buckets, Bucket(1, 12)]

    def cost(bucket):
        return overhead + area(bucket)

    found = group(lengths, buckets, cost)

    best = min(
        sum(cost(b) for b in chosen)
        for parts in partitions(list(range(len(lengths))))
        if all(chosen := [cheapest(buckets, len(p), max(lengths[r] for r in p), cost) for p in parts])
    )
    assert sum(cost(bucket) for bucket, _ in found) == best
    assert sorted(row for _, rows in found for row in rows) == list(range(len(lengths)))
    assert all(bucket.holds(len(rows), max(lengths[r] for r in rows)) for bucket, rows in found)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=4), buckets_strategy, st.integers(0, 20), st.integers(1, 12))
def test_the_buckets_used_are_those_a_run_meets_step_by_step(lengths, buckets, more, block_size):
    buckets = [*buckets, Bucket(1, 12)]
    lengths = [min(length, block_size) for length in lengths]
    met = {
        bucket
        for grown in range(more + 1)
        for bucket, _ in group([min(n + grown, block_size) for n in lengths], buckets, area)
    }

    assert buckets_used([lengths], more, buckets, area, block_size, "recompute") == met


def test_what_outgrows_every_bucket_is_not_covered_by_less():
    with pytest.raises(ValueError, match="no bucket holds 9"):
        buckets_used([[7]], 2, [Bucket(1, 8)], area, 100, "recompute")


def test_a_run_of_any_length_is_settled_at_once():
    buckets = [Bucket(1, 4), Bucket(1, 8)]
    assert buckets_used([[1]], 10**30, buckets, area, 8, "recompute") == set(buckets)
    kv = [*buckets, *(Bucket(1, n, step) for n in (4, 8) for step in ("prefill", "decode"))]
    used = {Bucket(1, 8), Bucket(1, 4, "prefill"), Bucket(1, 4, "decode"), Bucket(1, 8, "decode")}
    assert buckets_used([[1]], 10**30, kv, area, 8, "kv") == used
