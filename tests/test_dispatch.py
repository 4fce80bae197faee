"""Grouping is compared with trying every partition; padding and cropping with their definitions."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt_buckets.errors import NonFiniteLogits
from nanogpt_buckets.plan.bucket import Bucket
from nanogpt_buckets.run.coverage import cheapest, group
from nanogpt_buckets.run.dispatch import Dispatcher
from nanogpt_buckets.run.report import Report
from nanogpt_buckets.steps import step_named


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


def test_padding_is_on_the_right_and_padding_rows_are_valid():
    input_ids, last_index = step_named("recompute").pack([[5, 6, 7], [8]], Bucket(3, 4))

    assert input_ids.tolist() == [[5, 6, 7, 0], [8, 0, 0, 0], [0, 0, 0, 0]]
    assert last_index.tolist() == [2, 0, 0]
    assert input_ids.dtype == last_index.dtype == torch.int32


def echo(input_ids, last_index):
    """Return the last real token and the row's first token as two 'logits' of one output."""
    last = input_ids[torch.arange(len(input_ids)), last_index]
    return (torch.stack([last, input_ids[:, 0]], dim=1).float(),)


def test_order_is_restored_and_padding_rows_are_dropped():
    report = Report("eager", "m")
    dispatcher = Dispatcher(lambda bucket: echo, area, 8, report)

    logits = dispatcher.run([[1, 2, 3, 4, 5], [6], [7, 8]], [Bucket(2, 4), Bucket(1, 8)])

    assert logits.tolist() == [[5, 1], [6, 6], [8, 7]]
    assert report.real_tokens == 8
    assert report.padded_tokens == 8 + 8 - 8


def test_long_contexts_are_cropped_to_their_last_block_size_tokens():
    report = Report("eager", "m")

    logits = Dispatcher(lambda bucket: echo, area, 3, report).run([[1, 2, 3, 4, 5]], [Bucket(1, 3)])

    assert logits.tolist() == [[5, 3]]
    assert report.crops == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_logits_that_are_not_finite_name_the_bucket(value):
    dispatcher = Dispatcher(lambda b: lambda i, n: (torch.full((1, 2), value),), area, 8, Report("eager", "m"))

    with pytest.raises(NonFiniteLogits, match="bucket 1x8"):
        dispatcher.run([[1]], [Bucket(1, 8)])


def test_switches_count_changes_of_bucket():
    report = Report("eager", "m")
    dispatcher = Dispatcher(lambda bucket: echo, area, 8, report)
    for n in (3, 4, 5, 6, 4):
        dispatcher.run([[1] * n], [Bucket(1, 4), Bucket(1, 8)])

    assert report.switches == 2
    assert 0 < report.waste < 1
