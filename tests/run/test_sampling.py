"""The sampler against its definition, and nanoGPT's mode against a loop written as nanoGPT's README describes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt_buckets.errors import UsageError
from nanogpt_buckets.run.sampling import (
    Sampling,
    candidates,
    draw_nanogpt,
    draw_per_row,
    greedy,
    likeliest,
    mask_undecodable,
    uniform,
)

LOGITS = torch.tensor([0.5, 2.0, -1.0, 2.0, 0.0])


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"temperature": "1"},
        {"top_k": -1},
        {"top_k": 1.5},
        {"top_k": True},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": math.nan},
        {"seed": 1.5},
        {"rng": "numpy"},
    ],
)
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        Sampling(**wrong)


def test_greedy_takes_the_lowest_id_among_equals():
    assert greedy(LOGITS) == 1
    assert draw_per_row(LOGITS, Sampling(temperature=0), 0, 0, 0) == 1


def test_top_k_keeps_ties_with_the_kth():
    _, ids = candidates(LOGITS, Sampling(temperature=1.0, top_k=1))

    assert ids.tolist() == [1, 3]


@settings(max_examples=200, deadline=None)
@given(st.integers(2, 700), st.data())
def test_the_likeliest_are_those_that_reach_the_kth(n, data):
    k = data.draw(st.integers(1, n - 1))  # few of n: by chunks; many: by sorting all
    torch.manual_seed(data.draw(st.integers(0, 99)))
    logits = (torch.randn(n) * 3).round()  # many ties
    logits[torch.rand(n) < data.draw(st.sampled_from([0.0, 0.5]))] = -math.inf

    kth = sorted(logits.tolist(), reverse=True)[k - 1]

    assert likeliest(logits, k).tolist() == [i for i, logit in enumerate(logits.tolist()) if logit >= kth]


@pytest.mark.parametrize("top_k", [None, 0, 5, 50])
def test_top_k_off_or_large_keeps_all_likeliest_first_then_by_id(top_k):
    _, ids = candidates(LOGITS, Sampling(top_k=top_k))

    assert ids.tolist() == [1, 3, 0, 4, 2]


def test_top_p_keeps_the_fewest_that_reach_p():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()

    kept = {p: candidates(logits, Sampling(temperature=1.0, top_p=p))[1].tolist() for p in (0.1, 0.5, 0.6, 0.9, 1.0)}

    assert kept == {0.1: [0], 0.5: [0], 0.6: [0, 1], 0.9: [0, 1, 2], 1.0: [0, 1, 2, 3]}


@pytest.mark.parametrize("temperature", [1e-320, 1e-300, 1e-40, 1e-9])
def test_any_cold_is_greedy_in_the_end(temperature):
    sampling = Sampling(temperature, top_k=None, top_p=0.9, seed=1)
    logits = torch.tensor([0.5, 90.0, 80.0])

    assert {draw_per_row(logits, sampling, 0, 0, step) for step in range(20)} == {1}
    assert draw_nanogpt(logits, sampling, torch.Generator().manual_seed(1)) == 1


def test_any_heat_is_even_in_the_end():
    sampling = Sampling(1e308, top_k=None, seed=1)

    drawn = [draw_per_row(torch.tensor([0.5, 90.0, -80.0]), sampling, 0, 0, step) for step in range(300)]

    assert all(60 < drawn.count(token) < 140 for token in range(3))


def test_draws_follow_the_distribution():
    probabilities = torch.tensor([0.1, 0.6, 0.3])
    sampling = Sampling(temperature=1.0, top_k=None, seed=7)
    n = 4000

    counts = torch.bincount(
        torch.tensor([draw_per_row(probabilities.log(), sampling, 0, 0, step) for step in range(n)]), minlength=3
    )

    # five standard deviations
    assert torch.all((counts / n - probabilities).abs() < 5 * (probabilities * (1 - probabilities) / n).sqrt())


@given(st.integers(0, 2**63), st.integers(0, 9), st.integers(0, 9), st.integers(0, 999))
def test_a_draw_depends_on_nothing_but_its_four_numbers(seed, prompt, sample, step):
    u = uniform(seed, prompt, sample, step)

    assert 0 <= u < 1
    assert u == uniform(seed, prompt, sample, step)
    assert u != uniform(seed + 1, prompt, sample, step)


def test_the_random_number_is_pinned():
    assert uniform(1337, 0, 0, 0) == 0.20102501804770462


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-5, 5, width=32), min_size=2, max_size=20), st.integers(0, 99))
def test_vocabulary_padding_that_cannot_be_decoded_changes_no_draw(values, step):
    logits = torch.tensor(values)
    padded = torch.cat([logits, torch.full((7,), 9.0)])
    sampling = Sampling(top_k=5, top_p=0.9, seed=3)

    plain = draw_per_row(logits, sampling, 0, 0, step)

    assert plain == draw_per_row(mask_undecodable(padded, len(values)), sampling, 0, 0, step)


def test_an_edge_of_the_distribution_never_leaves_the_candidates():
    logits = torch.tensor([0.0, -100.0])

    assert {draw_per_row(logits, Sampling(top_k=None, seed=s), 0, 0, 0) for s in range(200)} == {0}


@pytest.mark.parametrize(("temperature", "top_k"), [(0.8, 3), (1.3, None), (0.5, 200)])
def test_nanogpt_mode_draws_what_nanogpt_draws(temperature, top_k):
    torch.manual_seed(11)
    steps = torch.randn(20, 8)
    torch.manual_seed(5)
    expected = []
    for logits in steps:
        row = logits[None] / temperature
        if top_k is not None:
            kth = torch.topk(row, min(top_k, row.size(-1))).values[:, [-1]]
            row[row < kth] = -float("inf")
        expected.append(torch.multinomial(torch.softmax(row, dim=-1), num_samples=1).item())

    generator = torch.Generator().manual_seed(5)
    sampling = Sampling(temperature, top_k, rng="nanogpt")

    assert [draw_nanogpt(logits, sampling, generator) for logits in steps] == expected
