"""Many requests: what becomes of one is what becomes of it alone, whatever waits, runs and ends beside it."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt_buckets import Bucket, Engine, Plan, Request
from nanogpt_buckets.errors import BucketsError, CacheMiss, NonFiniteLogits, TokenizerError, UsageError
from nanogpt_buckets.model.tokenization.characters import CharacterTokenizer
from nanogpt_buckets.run import many
from nanogpt_buckets.run.batch import Batch
from nanogpt_buckets.run.loop import Loop

LETTERS = CharacterTokenizer({n: chr(0x4E00 + n) for n in range(211)})
SEQ = [16, 33, 100]
PLANS = {
    "single-kv": Plan.grid(seq=SEQ, strategy="kv").completed(100),
    "kv": Plan.grid(batch=[1, 2, 4], seq=SEQ, strategy="kv").completed(100),
    "wide-kv": Plan.grid(batch=[5], seq=SEQ, strategy="kv").completed(100),
    "single-recompute": Plan.grid(seq=SEQ),
    "recompute": Plan.grid(batch=[1, 3], seq=SEQ),
}


@pytest.fixture(scope="module", params=PLANS)
def engine(request, odd_folder):
    with Engine.load(odd_folder, plan=PLANS[request.param], backend="eager", tokenizer=LETTERS) as engine:
        yield engine


@pytest.fixture(scope="module")
def alone(odd_folder):
    with Engine.load(odd_folder, plan=PLANS["single-recompute"], backend="eager", tokenizer=LETTERS) as engine:
        yield engine


def one_by_one(engine, asked):
    return [engine.generate([ids], **how)[0] for ids, how in asked]


prompts = st.one_of(
    st.lists(st.integers(0, 210), min_size=1, max_size=110),
    st.sampled_from([[3, 5, 7], [3, 5, 7, 9], [8] * 16, [8] * 99]),  # so that some are equal
)
hows = st.fixed_dictionaries(
    {
        "max_new_tokens": st.integers(0, 20),
        "temperature": st.sampled_from([0, 0.7, 2.0]),
        "top_k": st.sampled_from([None, 1, 20]),
        "top_p": st.sampled_from([None, 0.8]),
        "seed": st.integers(0, 99),
        "stop": st.lists(st.text([chr(0x4E00 + n) for n in range(211)], min_size=1, max_size=1), max_size=60),
        "rng": st.sampled_from(["per-row", "per-row", "nanogpt"]),
    }
)


@settings(max_examples=12, deadline=None)
@given(st.lists(st.tuples(prompts, hows), max_size=14), st.integers(1, 2))
def test_a_text_does_not_depend_on_its_neighbours(engine, alone, asked, window):
    many._WINDOW, before = window, many._WINDOW
    try:
        found = list(engine.generate_each(Request(ids, **how) for ids, how in asked))
    finally:
        many._WINDOW = before
    assert found == one_by_one(alone, asked)


def test_equal_requests_give_equal_texts_in_any_order(engine):
    asked = [([n] * (1 + 13 * n % 47), {"max_new_tokens": 3 + 7 * n % 11, "seed": n}) for n in range(17)]
    found = list(engine.generate_each(Request(ids, **how) for ids, how in asked))
    back = list(engine.generate_each(Request(ids, **how) for ids, how in reversed(asked)))
    assert found == back[::-1]


def test_a_place_goes_to_the_next_at_once(odd_folder):
    """Four rows of two tokens take turns in one place, beside one of eight tokens in the other."""
    plan = Plan.grid(batch=[1, 2], seq=[33], strategy="kv")
    with Engine.load(odd_folder, plan=plan, backend="eager") as engine:
        requests = [Request([n, n + 1], max_new_tokens=2 if n else 8, temperature=0) for n in range(5)]
        assert [g.new_tokens for g in engine.generate_each(requests)] == [8, 2, 2, 2, 2]
        counts = {bucket: (count.steps, count.rows) for bucket, count in engine.report().buckets.items()}
    assert counts == {
        Bucket(2, 33, "prefill"): (1, 2),
        Bucket(1, 33, "prefill"): (3, 3),
        Bucket(2, 33, "decode"): (4, 8),
        Bucket(1, 33, "decode"): (3, 3),
    }


def test_results_come_as_soon_as_those_before_them_are_there(odd_folder):
    with Engine.load(odd_folder, plan=PLANS["kv"], backend="eager") as engine:
        results = engine.generate_each(Request([n % 211] * 9, max_new_tokens=5) for n in range(1000))
        next(results)
        assert engine.report().new_tokens < 10 * 16 * 5


def test_what_is_wrong_with_one_is_said_before_any_runs(engine):
    before = engine.report().steps
    for wrong, error in (
        (lambda: Request([1], max_new_tokens=-1), "max_new_tokens is -1"),
        (lambda: Request([1], temperature="hot"), "temperature is 'hot'"),
        (lambda: Request([211]), "token id 211"),
        (lambda: Request(7), "is no prompt"),
        (lambda: Request("x"), "'x'"),
    ):
        with pytest.raises(BucketsError, match=error):
            engine.generate_each(make() for make in (lambda: Request([1]), wrong))
    assert engine.report().steps == before
    assert list(engine.generate_each([])) == []


def test_coverage_is_settled_for_each_row_as_far_as_it_goes(odd_folder):
    """A long one of few tokens and a short one of many fit, though a long one of many would not."""
    plan = [*Plan.grid(seq=[33], strategy="kv"), *Plan.grid(seq=[33])]
    with Engine.load(odd_folder, plan=plan, backend="eager") as engine:
        how = {"seed": 1, "ignore_eos": True}
        fits = [Request([1] * 30, max_new_tokens=4, **how), Request([2] * 4, max_new_tokens=30, **how)]
        assert [g.new_tokens for g in engine.generate_each(fits)] == [4, 30]
        with pytest.raises(CacheMiss, match="no decode bucket of the plan holds 34 tokens"):
            engine.generate_each([*fits, Request([1] * 30, max_new_tokens=5)])


def test_without_a_tokenizer_there_are_ids_and_no_text(odd_folder):
    with Engine.load(odd_folder, plan=PLANS["kv"], backend="eager") as engine:
        assert [g.text for g in engine.generate_each([Request([1], max_new_tokens=2)])] == [None]
        with pytest.raises(UsageError, match="the prompt is empty"):
            engine.generate_each([Request([1]), Request([])])
        for wrong in (Request("text"), Request([1], stop="x")):
            with pytest.raises(TokenizerError):
                engine.generate_each([wrong])


def test_an_engine_goes_on_after_an_iterator_that_was_left_and_one_that_failed(engine, alone, monkeypatch):
    asked = [([n] * (1 + n % 40), {"max_new_tokens": 9, "seed": n}) for n in range(12)]
    requests = [Request(ids, **how) for ids, how in asked]
    left = engine.generate_each(requests)
    next(left)
    other = engine.generate_each(requests[::-1])
    mixed = [*zip(left, other, strict=False)]
    draw, calls = Loop._draw, itertools.count()

    def failing(self, logits, row):
        if next(calls) == 20:
            raise NonFiniteLogits("once")
        return draw(self, logits, row)

    monkeypatch.setattr(Loop, "_draw", failing)
    with pytest.raises(NonFiniteLogits):
        list(engine.generate_each(requests))
    expected = one_by_one(alone, asked)
    assert [first for first, _ in mixed] == expected[1:]
    assert [second for _, second in mixed] == expected[:0:-1]
    assert list(engine.generate_each(requests)) == expected


def test_what_runs_is_settled_anew_only_when_something_changes(odd_folder, monkeypatch):
    settled = []
    settle = Batch._settle
    monkeypatch.setattr(Batch, "_settle", lambda self, rows, alone: (settled.append(rows), settle(self, rows, alone)))
    for strategy in ("kv", "recompute"):
        settled.clear()
        plan = Plan.grid(batch=[1, 2], seq=[16, 33, 100], strategy=strategy).completed(100)
        with Engine.load(odd_folder, plan=plan, backend="eager") as engine:
            engine.generate([[1] * 5, [2] * 6], max_new_tokens=60, temperature=0)
        # at first, and when each outgrows 16 and 33
        assert len([rows for rows in settled if rows]) == 5
