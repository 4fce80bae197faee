"""What is built first is worth the most: everything runs after the first, and each further one saves the most left."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanogpt_buckets.plan.bucket import STEPS, Bucket
from nanogpt_buckets.plan.order import build_order


def cost(bucket):
    return 1.0 + bucket.batch_size * bucket.seq_len


def lengths(*args):
    return [bucket.seq_len for bucket in build_order(*args, cost)]


def plan(*rungs):
    return [Bucket(1, n) for n in rungs]


def served(asked, built):
    """What all the plan's own traffic costs with what is built."""
    return sum(
        min(
            (-(-a.batch_size // b.batch_size) * cost(b) for b in built if b.step == a.step and b.seq_len >= a.seq_len),
            default=math.inf,
        )
        for a in asked
    )


def test_the_longest_comes_first_then_what_saves_most():
    assert lengths(plan(16, 32, 64, 128), []) == [128, 64, 32, 16]
    assert lengths(plan(4, 8, 16, 120, 128), []) == [128, 16, 8, 120, 4], "120 saves little over 128"
    assert lengths(plan(16, 32, 64, 128), plan(128, 32)) == [64, 16]
    assert lengths(plan(16, 32), plan(128)) == [32, 16], "what is built elsewhere reaches them already"


def test_every_step_is_covered_before_anything_is_made_faster():
    wanted = [Bucket(B, n, step) for B in (1, 8) for n in (32, 64) for step in ("prefill", "decode")]
    order = build_order(wanted, [], cost)
    assert set(order[:2]) == {Bucket(8, 64, "prefill"), Bucket(8, 64, "decode")}
    assert build_order([], [], cost) == []


buckets = st.builds(Bucket, st.sampled_from([1, 2, 8]), st.integers(2, 12), st.sampled_from(STEPS[:3]))


@given(st.sets(buckets, max_size=12), st.sets(buckets, max_size=3))
def test_each_is_built_once_and_none_that_is_left_would_have_saved_more(wanted, built):
    order = build_order(wanted, built, cost)

    assert sorted(order) == sorted(wanted - built)
    assert order == build_order(sorted(wanted, reverse=True), list(built), cost), "whatever order they are given in"
    reached = {step: max(b.seq_len for b in wanted if b.step == step) for step in {b.step for b in wanted}}
    have = set(built)
    for n, bucket in enumerate(order):
        lacking = [s for s, most in reached.items() if not any(b.step == s and b.seq_len >= most for b in have)]
        if lacking:
            assert bucket.step in lacking
            assert bucket.seq_len == reached[bucket.step]
        elif served(wanted, have) < math.inf:
            best = min(served(wanted, have | {other}) for other in order[n:])
            assert served(wanted, have | {bucket}) == pytest.approx(best)
        have.add(bucket)
