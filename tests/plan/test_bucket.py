import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanogpt_buckets.errors import IncompatibleEntry, PlanError
from nanogpt_buckets.model.architecture import GPT2_SIZES
from nanogpt_buckets.plan.bucket import Bucket, Plan
from nanogpt_buckets.plan.ladder import default_ladder, rung_for
from nanogpt_buckets.steps import step_named

macs = step_named("recompute").macs


@pytest.mark.parametrize("size", [0, -1, 1.5, "8", True, None])
def test_a_bucket_needs_positive_whole_sizes(size):
    with pytest.raises(PlanError):
        Bucket(size, 8)
    with pytest.raises(PlanError):
        Bucket(1, size)


def test_an_unknown_step_is_refused():
    with pytest.raises(PlanError, match="'train'"):
        Bucket(1, 8, "train")


def test_fit_is_inclusive():
    assert Bucket(2, 8).holds(2, 8)
    assert not Bucket(2, 8).holds(2, 9)
    assert not Bucket(2, 8).holds(3, 8)


def test_disorder_and_duplicates_make_the_same_plan():
    assert Plan.grid(seq=[64, 32, 64]) == Plan([Bucket(1, 32), Bucket(1, 64)])


def test_grid_is_every_pair_even_from_iterators():
    assert list(Plan.grid(batch=iter([1, 4]), seq=iter([8, 16]))) == [
        Bucket(1, 8),
        Bucket(1, 16),
        Bucket(4, 8),
        Bucket(4, 16),
    ]


def test_a_strategy_has_steps_of_its_own_and_recomputes_past_block_size():
    kv = Plan.grid(batch=[1, 2], seq=[8, 16], strategy="kv")
    assert len(kv) == 8
    assert {bucket.step for bucket in kv} == {"prefill", "decode"}
    assert kv.completed(32) == kv
    assert kv.completed(16) == kv | [Bucket(1, 16), Bucket(2, 16)]
    assert Plan.grid(seq=[8, 16]).completed(16) == Plan.grid(seq=[8, 16])
    assert Plan.from_json(json.loads(json.dumps(kv.to_json(model="m", source="build")))) == kv
    with pytest.raises(PlanError, match="strategy 'fast' is unknown"):
        Plan.grid(seq=[8], strategy="fast")


def test_buckets_that_score_are_a_plan_of_their_own_and_hold_two_tokens():
    plan = Plan.grid(batch=[1, 2], seq=[8, 16], strategy="score")
    assert {bucket.step for bucket in plan} == {"score"}
    assert plan.completed(16) == plan
    assert str(plan[0]) == "1x8 score"
    assert Plan.from_json(json.loads(json.dumps(plan.to_json(model="m", source="build")))) == plan
    with pytest.raises(PlanError, match="no token comes before another"):
        Plan.grid(seq=[8, 1], strategy="score")
    assert default_ladder(8, 2) == [2, 4, 8]


def test_an_empty_plan_is_refused():
    with pytest.raises(PlanError, match="at least one"):
        Plan([])


def test_a_bucket_longer_than_block_size_is_refused_at_plan_time():
    Plan.grid(seq=[100]).check(100)
    with pytest.raises(PlanError, match=r"seq_len 101 .* block_size 100"):
        Plan.grid(seq=[101]).check(100)


def test_a_plan_survives_json():
    plan = Plan.grid(batch=[1, 2], seq=[8, 16])

    assert Plan.from_json(json.loads(json.dumps(plan.to_json(model="demo", source="build")))) == plan


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        {},
        {"format": 1},
        {"format": 1, "buckets": []},
        {"format": 1, "buckets": [3]},
        {"format": 1, "buckets": [{"seq_len": 8}]},
        {"format": 1, "buckets": [{"seq_len": 0, "batch_size": 1}]},
        {"format": "2", "buckets": [{"seq_len": 8, "batch_size": 1}]},
        {"format": True, "buckets": [{"seq_len": 8, "batch_size": 1}]},
    ],
)
def test_what_is_no_plan_is_refused(data):
    with pytest.raises(PlanError):
        Plan.from_json(data)


BUCKET = {"seq_len": 8, "batch_size": 1}


@pytest.mark.parametrize(
    "data",
    [
        {"format": 2, "rungs": []},
        {"format": 1, "buckets": [BUCKET], "extra": 1},
        {"format": 1, "buckets": [BUCKET | {"extra": 1}]},
        {"format": 1, "buckets": [BUCKET | {"step": "speculate"}]},
    ],
)
def test_what_a_newer_release_wrote_is_no_users_mistake(data):
    with pytest.raises(IncompatibleEntry, match="newer release") as error:
        Plan.from_json(data)

    assert "left alone" in error.value.hint


@given(st.integers(1, 4096))
def test_the_default_ladder_ends_at_block_size(block_size):
    ladder = default_ladder(block_size)

    assert ladder[-1] == block_size
    assert ladder == sorted(set(ladder))
    assert ladder[0] >= 1


@given(st.integers(1, 3000), st.integers(1, 2048))
def test_rung_for_is_the_shortest_that_holds(length, block_size):
    rung = rung_for(length, block_size)

    assert rung >= min(length, block_size)
    assert all(other < min(length, block_size) for other in default_ladder(block_size) if other < rung)


def test_cost_grows_with_length_and_batch():
    arch = GPT2_SIZES["gpt2"]

    assert macs(arch, Bucket(1, 64)) < macs(arch, Bucket(1, 65)) < macs(arch, Bucket(2, 64))


def test_cost_is_the_number_of_weights_times_tokens_and_attention():
    arch = GPT2_SIZES["gpt2"]
    matrices = 12 * (4 * 768**2 + 2 * 768 * 3072)

    assert macs(arch, Bucket(1, 1)) == matrices + 12 * 2 * 768 + 768 * 50257
