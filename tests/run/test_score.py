"""Scores against Hugging Face's loss, and against its recipe for long texts; eager is enough but for one bucket."""

from __future__ import annotations

import math
import threading

import pytest
import torch

from nanogpt_buckets import Bucket, Engine, Plan, Score
from nanogpt_buckets.errors import CacheMiss, PlanError, TokenizerError, UsageError
from nanogpt_buckets.model.architecture import Architecture
from nanogpt_buckets.model.tokenization.characters import CharacterTokenizer
from nanogpt_buckets.run.score import perplexity, to_json, windows

LADDER = Plan.grid(batch=[1, 3], seq=[16, 33, 100], strategy="score")
LETTERS = CharacterTokenizer({n: chr(0x4E00 + n) for n in range(211)})
# float32 noise of a mean of log-probabilities that are 5 on average
CLOSE = 2e-5


@pytest.fixture(scope="module")
def oracle(odd_folder):
    from transformers import GPT2LMHeadModel

    return GPT2LMHeadModel.from_pretrained(odd_folder).eval()


@pytest.fixture(scope="module")
def engine(odd_folder):
    with Engine.load(odd_folder, plan=LADDER, backend="eager", tokenizer=LETTERS) as engine:
        yield engine


def text(length: int, seed: int = 0) -> list[int]:
    return torch.randint(211, (length,), generator=torch.Generator().manual_seed(1000 * seed + length)).tolist()


@torch.no_grad()
def oracle_loss(oracle, ids: list[int]) -> float:
    return oracle(torch.tensor([ids]), labels=torch.tensor([ids])).loss.item()


@torch.no_grad()
def sliding_losses(oracle, ids: list[int], stride: int) -> list[tuple[float, int]]:
    """Return the mean loss and the number of new tokens of each window, as Hugging Face's guide to perplexity does."""
    found, before = [], 0
    for begin in range(0, len(ids), stride):
        end = min(begin + 100, len(ids))
        labels = torch.tensor([ids[begin:end]])
        labels[:, : before - begin if begin else 0] = -100
        new = end - before if begin else end - 1
        found.append((oracle(torch.tensor([ids[begin:end]]), labels=labels).loss.item(), new))
        before = end
        if end == len(ids):
            break
    return found


def test_the_loss_is_hugging_faces_at_every_length(engine, oracle):
    for length in range(2, 101):
        (score,) = engine.score([text(length)])

        assert score.loss == pytest.approx(oracle_loss(oracle, text(length)), abs=CLOSE), length
        assert (score.scored_tokens, len(score.logprobs), score.token_ids) == (length - 1, length - 1, text(length))
        assert score.perplexity == math.exp(score.loss)
        assert score.logprob == math.fsum(score.logprobs)


@torch.no_grad()
def test_each_log_probability_is_hugging_faces(engine, oracle):
    logprobs = oracle(torch.tensor([text(100)])).logits[0].log_softmax(-1)

    (score,) = engine.score([text(100)])

    expected = [logprobs[t, token].item() for t, token in enumerate(text(100)[1:])]
    assert score.logprobs == pytest.approx(expected, abs=1e-4)


def test_ragged_texts_are_scored_in_the_order_given_and_do_not_depend_on_each_other(engine, oracle):
    lengths = (33, 2, 100, 17, 16, 34, 250, 101, 5, 1, 0, 99)
    together = engine.score([text(n, seed=3) for n in lengths])

    assert [len(score.token_ids) for score in together] == list(lengths)
    for n, score in zip(lengths, together, strict=True):
        if 2 <= n <= 100:
            assert score.loss == pytest.approx(oracle_loss(oracle, text(n, seed=3)), abs=CLOSE)
    others = engine.score([text(n, seed=3 if n == 17 else 4) for n in lengths])
    assert others[3] == together[3], "not a bit"
    assert others[2] != together[2]


@pytest.mark.parametrize("length", [101, 102, 149, 150, 151, 200, 333])
@pytest.mark.parametrize("stride", [None, 1, 37, 50, 99])
def test_long_texts_slide_a_window_as_hugging_faces_guide_does(engine, oracle, length, stride):
    (score,) = engine.score([text(length, seed=7)], stride=stride)

    parts = sliding_losses(oracle, text(length, seed=7), stride or 50)
    assert sum(new for _, new in parts) == length - 1 == score.scored_tokens
    begin = 0
    for loss, new in parts:
        assert -math.fsum(score.logprobs[begin : begin + new]) / new == pytest.approx(loss, abs=5 * CLOSE)
        begin += new


@pytest.mark.parametrize(
    ("length", "stride"), [(n, stride) for n in (2, 9, 10, 11, 19, 20, 21) for stride in (1, 4, 9)]
)
def test_every_token_but_the_first_is_scored_once_with_the_context_that_is_promised(length, stride):
    ids, scored = list(range(length)), []
    for part in windows([ids], 10, stride):
        new = list(part.ids)[-part.new :]
        assert len(part.ids) <= 10
        assert len(part.ids) - part.new >= (10 - stride if part.ids[0] else 1)
        scored += new
    assert scored == ids[1:]


def test_texts_of_less_than_two_tokens_have_no_loss(engine):
    steps = engine.report().steps
    assert engine.score([[], [5]]) == [Score([], []), Score([5], [])]
    for score in engine.score(["", "一"]):
        assert (score.loss, score.perplexity, score.logprob, score.scored_tokens) == (None, None, 0.0, 0)
    assert engine.score([]) == []
    assert engine.report().steps == steps


def test_a_text_is_what_it_is_for_generate(engine):
    strings = engine.score(["一丁丂", "丁"])

    assert [score.token_ids for score in strings] == [[0, 1, 2], [1]]
    assert engine.score("一丁丂") == strings[:1] == engine.score([0, 1, 2]) == engine.score(torch.tensor([0, 1, 2]))


@pytest.mark.parametrize("stride", [0, -1, 100, 101, 1.5, True, "x", 10**30])
def test_a_stride_that_skips_tokens_or_stands_still_is_refused(engine, stride):
    with pytest.raises(UsageError, match="from 1 to 99"):
        engine.score([text(5)], stride=stride)


@pytest.mark.parametrize("ids", [[211], [-1, 2], [1, 2.5], [True, 1]])
def test_ids_out_of_range_are_refused(engine, ids):
    with pytest.raises(UsageError, match="token id"):
        engine.score([ids])


def test_text_without_a_tokenizer_is_refused(odd_folder):
    with Engine.load(odd_folder, backend="eager") as engine, pytest.raises(TokenizerError):
        engine.score(["text"])


def test_a_model_that_sees_one_token_at_a_time_cannot_score():
    with pytest.raises(UsageError, match="block_size is 1"):
        windows([[1, 2]], 1, 1)
    assert windows([[1], []], 1, 1) == []


def test_progress_adds_up_to_the_texts(engine):
    told: list[float] = []
    engine.score([text(n) for n in (5, 333, 20, 1, 101)], on_progress=told.append)

    assert sum(told) == pytest.approx(5)
    assert len(told) > 4


def test_scored_tokens_and_steps_are_counted(odd_folder):
    with Engine.load(odd_folder, plan=LADDER, backend="eager") as engine:
        engine.score([text(5), text(16), text(16, seed=1), text(100)])
        report = engine.report()

    assert (report.scored_tokens, report.new_tokens) == (4 + 15 + 15 + 99, 0)
    assert {bucket: count.steps for bucket, count in report.buckets.items()} == {
        Bucket(3, 16, "score"): 1,
        Bucket(1, 100, "score"): 1,
    }
    assert report.real_tokens == 5 + 16 + 16 + 100
    assert report.tokens_per_s > 0


def test_threads_share_an_engine(engine):
    expected = [engine.score([text(50, seed=n), text(120, seed=n)]) for n in range(4)]
    found: dict[int, list[Score]] = {}

    def work(n: int) -> None:
        found[n] = engine.score([text(50, seed=n), text(120, seed=n)])

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[n] for n in range(4)] == expected


def test_where_nothing_is_planned_eager_scores_and_generates(odd_folder):
    with Engine.load(odd_folder, backend="eager") as engine:
        assert engine.score([text(3)])[0].loss > 0
        assert engine.generate([text(3)], max_new_tokens=1)[0].new_tokens == 1
        assert {bucket.step for bucket in engine.report().buckets} == {"score", "recompute"}


def test_a_plan_of_other_steps_is_a_miss_that_says_so(odd_folder):
    with Engine.load(odd_folder, plan=[Bucket(1, 16)], backend="eager") as engine:
        with pytest.raises(CacheMiss, match="no score bucket of the plan holds 3 tokens"):
            engine.score([text(3)])
        with pytest.raises(CacheMiss, match="no bucket of the plan holds 50 tokens"):
            engine.generate([text(50)], max_new_tokens=1)


def test_compiled_scores_are_hugging_faces_and_what_is_not_built_is_a_miss(odd_folder, odd_cache, oracle):
    with Engine.load(odd_folder, cache_dir=odd_cache, cached_only=True, lazy=True) as engine:
        lengths = (33, 2, 32, 17, 33, 1)
        for n, score in zip(lengths, engine.score([text(n, seed=9) for n in lengths]), strict=True):
            assert score.loss == (None if n == 1 else pytest.approx(oracle_loss(oracle, text(n, seed=9)), abs=CLOSE))
        assert engine.report().buckets[Bucket(3, 33, "score")].steps == 2
        with pytest.raises(CacheMiss, match="no score bucket that is built holds 34 tokens") as caught:
            engine.score([text(34), text(4)])
        assert "--seq 50 --score" in caught.value.hint
        engine.warmup()
        assert engine.generate([text(3)], max_new_tokens=1)[0].new_tokens == 1


def test_a_bucket_of_one_token_is_refused():
    with pytest.raises(PlanError, match="no token comes before another"):
        Bucket(4, 1, "score")


def test_what_no_float_holds_is_infinite_and_null_in_json():
    assert perplexity(-1e6, 2) == math.inf
    assert to_json(Score([1, 2], [-1e6]))["perplexity"] is None
    assert to_json(Score([1, 2], [-1.0]))["perplexity"] == math.e


@pytest.mark.parametrize(
    "changes",
    [{"tied": False}, {"bias": False}, {"activation": "gelu_tanh"}, {"n_head": 1}, {"scale_by_layer": True}],
    ids=str,
)
@pytest.mark.parametrize("pieces", [1, 4, 62])
def test_the_step_computes_what_the_network_does_however_many_pieces_it_is_cut_into(changes, pieces, monkeypatch):
    from nanogpt_buckets.steps import gate, score, step_named

    arch = Architecture(
        **{"n_layer": 2, "n_head": 3, "n_embd": 48, "n_inner": 192, "block_size": 32, "vocab_size": 61} | changes
    )
    monkeypatch.setattr(score, "_MOST_LOGITS", 2 * 31 * 61 // pieces)
    bucket, weights = Bucket(2, 32, "score"), gate.seeded_weights(arch, torch.float32)

    gate.check(step_named("score").eager(arch, bucket, weights), arch, bucket, weights)
