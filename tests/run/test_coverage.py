"""Grouping is compared with trying every partition, and the buckets a run uses with walking through it."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt_buckets.plan.bucket import STEPS, Bucket
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


slotted = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 3)), min_size=1, max_size=6)


@settings(max_examples=100, deadline=None)
@given(slotted, buckets_strategy, st.integers(0, 20), st.randoms(use_true_random=False))
def test_no_cut_of_the_slots_into_spans_costs_less_whatever_the_lengths(rows, buckets, overhead, random):
    buckets = [*buckets, Bucket(1, 12)]
    lengths = [length for length, _ in rows]
    slots = list(itertools.accumulate(gap for _, gap in rows))
    order = list(range(len(rows)))
    random.shuffle(order)

    def cost(bucket):
        return overhead + area(bucket)

    def fitting(span):
        width = slots[span[-1]] - slots[span[0]] + 1
        return cheapest(buckets, width, max(lengths[row] for row in span), cost)

    found = group([lengths[row] for row in order], buckets, cost, [slots[row] for row in order])
    found = [(bucket, [order[member] for member in members]) for bucket, members in found]

    cuts = itertools.chain.from_iterable(itertools.combinations(range(1, len(rows)), n) for n in range(len(rows)))
    spans = [[range(a, b) for a, b in itertools.pairwise((0, *cut, len(rows)))] for cut in cuts]
    best = min(sum(map(cost, chosen)) for parts in spans if all(chosen := [fitting(span) for span in parts]))
    assert sum(cost(bucket) for bucket, _ in found) == best
    assert [row for _, members in found for row in members] == list(range(len(rows)))
    assert all(bucket == fitting(members) for bucket, members in found)


kinds = st.lists(st.tuples(st.integers(1, 14), st.integers(0, 12)), min_size=1, max_size=4)


@settings(max_examples=100, deadline=None)
@given(kinds, buckets_strategy, st.sampled_from(["recompute", "kv"]), st.data())
def test_whichever_rows_meet_only_buckets_that_were_settled_run(rows, buckets, strategy, data):
    """Any of the rows, each at any time of its life, in any slots."""
    block_size = 12
    buckets = [Bucket(b.batch_size, b.seq_len, step) for b in [*buckets, Bucket(1, 12)] for step in STEPS[:3]]
    spans = [(first, first + more) for first, more in rows]
    used = buckets_used(spans, len(rows), buckets, area, block_size, strategy)
    now = [(first, data.draw(st.integers(first, last))) for first, last in spans]
    if strategy == "recompute":
        steps = {"recompute": [length for _, length in now]}
    else:
        steps = {"prefill": [n for first, n in now if n == first <= 12], "decode": [n for f, n in now if f < n <= 12]}
        steps["recompute"] = [length for _, length in now if length > 12]
    for step, lengths in steps.items():
        slots = None if step == "recompute" else data.draw(st.permutations(range(len(rows))))[: len(lengths)]
        mine = [bucket for bucket in buckets if bucket.step == step]
        found = group([min(length, block_size) for length in lengths], mine, area, slots)
        assert {bucket for bucket, _ in found} <= used
        # and with those alone nobody is left out
        group([min(length, block_size) for length in lengths], [b for b in used if b.step == step], area, slots)


def test_what_outgrows_every_bucket_is_not_covered_by_less():
    with pytest.raises(ValueError, match="no bucket holds 9"):
        buckets_used([(7, 9)], 1, [Bucket(1, 8)], area, 100, "recompute")


def test_what_cannot_meet_needs_no_wide_bucket():
    buckets = [Bucket(1, 8), Bucket(2, 8), Bucket(4, 8)]
    assert buckets_used([(5, 6), (5, 8), (7, 7)], 1, buckets, area, 8, "recompute") == {Bucket(1, 8)}
    assert buckets_used([(5, 6), (5, 8)], 2, buckets, area, 8, "recompute") == {Bucket(1, 8), Bucket(2, 8)}


def test_a_run_of_any_length_is_settled_at_once():
    buckets = [Bucket(1, 4), Bucket(1, 8)]
    assert buckets_used([(1, 10**30)], 1, buckets, area, 8, "recompute") == set(buckets)
    kv = [*buckets, *(Bucket(1, n, step) for n in (4, 8) for step in ("prefill", "decode"))]
    used = {Bucket(1, 8), Bucket(1, 4, "prefill"), Bucket(1, 4, "decode"), Bucket(1, 8, "decode")}
    assert buckets_used([(1, 10**30)], 1, kv, area, 8, "kv") == used
