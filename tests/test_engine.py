"""Text and logits against Hugging Face's GPT-2, whatever the ladder; breadth on eager, the same promises compiled."""

from __future__ import annotations

import shutil
import threading

import pytest
import torch
from farm import found_in

from nanogpt_buckets import Bucket, Engine, Plan, build, builder, generate
from nanogpt_buckets.backends.inductor.backend import InductorBackend
from nanogpt_buckets.choice import choose
from nanogpt_buckets.errors import CacheMiss, CorruptEntry, TokenizerError, UsageError
from nanogpt_buckets.model.tokenization.characters import CharacterTokenizer
from nanogpt_buckets.plan.bucket import Bucket as B
from nanogpt_buckets.run.sampling import Sampling, candidates, uniform
from nanogpt_buckets.selection import Selection
from nanogpt_buckets.steps import gate
from nanogpt_buckets.store.store import Store
from nanogpt_buckets.store.verify import verify

LADDER = Plan.grid(batch=[1, 3], seq=[16, 33, 100])
COMPILED = Plan([B(1, 16), B(1, 33), B(1, 100), B(3, 33)])
KV_LADDER = Plan.grid(batch=[1, 3], seq=[16, 33, 100], strategy="kv").completed(100)
KV_COMPILED = Plan([B(1, 100, "prefill"), B(3, 33, "decode"), B(1, 100, "decode"), B(1, 100)])
EDGES = [1, 2, 15, 16, 17, 32, 33, 34, 99, 100]


@pytest.fixture(scope="session")
def oracle(odd_folder):
    from transformers import GPT2LMHeadModel

    return GPT2LMHeadModel.from_pretrained(odd_folder).eval()


@pytest.fixture(params=["eager", "inductor", "eager-kv", "inductor-kv"])
def engine(request, odd_folder, monkeypatch):
    kv = request.param.endswith("-kv")
    if request.param.startswith("eager"):
        made = Engine.load(odd_folder, plan=KV_LADDER if kv else LADDER, backend="eager")
    else:
        cache = request.getfixturevalue("odd_cache")
        made = Engine.load(odd_folder, plan=KV_COMPILED if kv else COMPILED, cache_dir=cache)
    with made:
        yield made


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(211, (length,), generator=torch.Generator().manual_seed(1000 * seed + length)).tolist()


@torch.no_grad()
def oracle_logits(oracle, ids: list[int]) -> torch.Tensor:
    return oracle(torch.tensor([ids[-100:]])).logits[0, -1]


def oracle_greedy(oracle, ids: list[int], n: int) -> tuple[list[int], float]:
    """Continue as nanoGPT does, cropping to the last 100 tokens; also return the smallest top-2 margin met."""
    ids, margin = list(ids), float("inf")
    for _ in range(n):
        top = oracle_logits(oracle, ids).topk(2)
        margin = min(margin, (top.values[0] - top.values[1]).item())
        ids.append(int(top.indices[0]))
    return ids, margin


def test_logits_equal_the_oracle_at_every_length(engine, oracle):
    for length in range(1, 101):
        expected = oracle_logits(oracle, prompt(length))
        found = engine.logits([prompt(length)])[0]

        assert (found - expected).abs().max() <= gate.FLOAT32_TOLERANCE * expected.abs().max(), length
    assert found.dtype == torch.float32


def test_ragged_batches_equal_the_oracle_in_the_order_given(engine, oracle):
    prompts = [prompt(n, seed=3) for n in (33, 1, 100, 17, 16, 2, 34, 120, 5)]
    expected = torch.stack([oracle_logits(oracle, ids) for ids in prompts])

    found = engine.logits(prompts)

    assert found.shape == (9, 211)
    assert (found - expected).abs().max() <= gate.FLOAT32_TOLERANCE * expected.abs().max()
    assert engine.logits([]).shape == (0, 211)


@pytest.mark.parametrize("length", EDGES)
def test_greedy_text_equals_the_oracle_around_every_edge(engine, oracle, length):
    expected, margin = oracle_greedy(oracle, prompt(length, seed=5), 30)
    assert margin > 1e-3, "the prompt proves nothing: two tokens are equally likely"

    found = engine.generate([prompt(length, seed=5)], max_new_tokens=30, temperature=0)[0]

    assert found.token_ids == expected
    assert (found.prompt_tokens, found.new_tokens, found.finish_reason) == (length, 30, "length")
    assert len(set(expected[length:])) >= 5


def test_generation_goes_on_past_block_size_like_nanogpt(engine, oracle):
    expected, margin = oracle_greedy(oracle, prompt(97), 10)
    assert margin > 1e-3

    assert engine.generate([prompt(97)], max_new_tokens=10, temperature=0)[0].token_ids == expected
    assert engine.report().crops == 6


def test_a_batch_is_the_single_rows(engine):
    prompts = [prompt(n, seed=5) for n in (3, 30, 16, 31, 1)]
    together = engine.generate(prompts, max_new_tokens=20, seed=7)
    # rows draw by prompt index, so each single run stands at its own index among empty work
    for index, ids in enumerate(prompts):
        greedy_alone = engine.generate([ids], max_new_tokens=20, temperature=0)[0].token_ids
        greedy_together = engine.generate(prompts, max_new_tokens=20, temperature=0)[index].token_ids

        assert greedy_together == greedy_alone
    assert together == engine.generate(prompts, max_new_tokens=20, seed=7)


@pytest.mark.parametrize("rng", ["per-row", "nanogpt"])
def test_the_same_text_whatever_the_ladder(odd_folder, oracle, rng):
    texts = []
    for ladder in ([100], [8, 16, 24, 32, 64, 100], [33, 50, 100]):
        with Engine.load(odd_folder, plan=Plan.grid(batch=[1, 2], seq=ladder), backend="eager") as engine:
            results = engine.generate([prompt(7), prompt(20)], max_new_tokens=30, seed=4, num_samples=2, rng=rng)
            texts.append([result.token_ids for result in results])

    if rng == "per-row":
        edges = [distance_to_an_edge(oracle, ids, (7, 20)[n // 2], 4, n // 2, n % 2) for n, ids in enumerate(texts[0])]
        assert min(edges) > 1e-6, "the seed proves nothing: a draw is as close to an edge as rounding"
    assert texts[0] == texts[1] == texts[2]
    assert len({tuple(ids) for ids in texts[0]}) == 4, "samples differ from each other"


def distance_to_an_edge(oracle, ids: list[int], n_prompt: int, seed: int, index: int, sample: int) -> float:
    """Return how close any draw of this text came to the edge between two tokens of the cumulative distribution."""
    closest = 1.0
    for step in range(len(ids) - n_prompt):
        values, _ = candidates(oracle_logits(oracle, ids[: n_prompt + step]), Sampling(seed=seed))
        cdf = torch.softmax(values, dim=0).cumsum(0)[:-1]
        closest = min(closest, (cdf - uniform(seed, index, sample, step)).abs().min().item())
    return closest


def test_compiled_and_eager_sample_the_same_text(odd_folder, odd_cache):
    with (
        Engine.load(odd_folder, plan=COMPILED, cache_dir=odd_cache) as compiled,
        Engine.load(odd_folder, plan=LADDER, backend="eager") as eager,
    ):
        options = {"max_new_tokens": 40, "seed": 11, "num_samples": 3}

        assert compiled.generate([prompt(9)], **options) == eager.generate([prompt(9)], **options)


def test_nanogpt_mode_is_nanogpts_own_loop(engine, oracle):
    torch.manual_seed(1337)
    ids = torch.tensor([prompt(90)])
    for _ in range(20):
        with torch.no_grad():
            logits = oracle(ids[:, -100:]).logits[:, -1, :] / 0.8
        kth = torch.topk(logits, 20).values
        logits[logits < kth[:, [-1]]] = -float("inf")
        ids = torch.cat([ids, torch.multinomial(torch.softmax(logits, dim=-1), num_samples=1)], dim=1)

    found = engine.generate([prompt(90)], max_new_tokens=20, top_k=20, seed=1337, rng="nanogpt")[0]

    assert found.token_ids == ids[0].tolist()


@pytest.mark.parametrize("engine", ["eager", "inductor"], indirect=True)
def test_within_a_bucket_pads_future_and_neighbours_change_no_bit(engine):
    engine._buckets.load_all()
    step = engine._buckets.executable(B(3, 33))
    ids = torch.randint(211, (3, 33), dtype=torch.int32, generator=torch.Generator().manual_seed(1))
    for length in (1, 2, 16, 32, 33):
        last = torch.tensor([length - 1, 20, 32], dtype=torch.int32)
        (before,) = step(ids, last)
        other = ids.clone()
        other[0, length:] = (other[0, length:] + 1) % 211
        other[1:] = (other[1:] + 5) % 211

        assert torch.equal(before[0], step(other, last)[0][0])


def test_prompts_may_be_anything_sensible(engine):
    assert engine.generate([], max_new_tokens=3) == []
    untouched = engine.generate([prompt(4)], max_new_tokens=0)[0]
    assert (untouched.token_ids, untouched.new_tokens) == (prompt(4), 0)
    with pytest.raises(UsageError, match="no start token"):
        engine.generate([[]])
    with pytest.raises(TokenizerError, match="no tokenizer"):
        engine.generate(["text"])
    with pytest.raises(TokenizerError, match="stop strings"):
        engine.generate([[1]], stop="x")


@pytest.mark.parametrize(
    "wrong",
    [{"max_new_tokens": -1}, {"max_new_tokens": 1.5}, {"num_samples": 0}, {"temperature": -1}, {"rng": "x"}],
)
def test_arguments_out_of_range_are_refused(engine, wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        engine.generate([[1]], **wrong)


@pytest.mark.parametrize("ids", [[211], [-1], [True], [1.0], ["a"]])
def test_token_ids_out_of_range_are_refused(engine, ids):
    with pytest.raises(UsageError, match="token id"):
        engine.generate([ids])


# --- text, streaming, threads: eager is enough --------------------------------------------------------------------

LETTERS = CharacterTokenizer({n: chr(0x4E00 + n) for n in range(211)})


@pytest.fixture
def lettered(odd_folder):
    with Engine.load(odd_folder, plan=LADDER, backend="eager", tokenizer=LETTERS) as engine:
        yield engine


def test_text_is_prompt_and_new_text(lettered):
    result = lettered.generate(["一丁"], max_new_tokens=5, seed=1)[0]

    assert result.text == "一丁" + result.new_text
    assert len(result.new_text) == 5
    assert [LETTERS.encode(c)[0] for c in result.text] == result.token_ids


@pytest.mark.parametrize("stop", [None, "丈"])
def test_a_stream_is_the_generation(lettered, stop):
    whole = lettered.generate(["一丁"], max_new_tokens=30, seed=2, stop=stop)[0]
    tokens = list(lettered.stream("一丁", max_new_tokens=30, seed=2, stop=stop))

    assert "".join(token.text for token in tokens) == whole.new_text
    assert [token.id for token in tokens] == whole.token_ids[whole.prompt_tokens :]
    assert [token.index for token in tokens] == list(range(len(tokens)))


def test_a_stop_string_ends_a_row_and_not_its_neighbours(lettered):
    free = lettered.generate(["一", "丁"], max_new_tokens=20, seed=3)
    stop = free[0].new_text[4:6]

    stopped = lettered.generate(["一", "丁"], max_new_tokens=20, seed=3, stop=[stop])

    assert stopped[0].finish_reason == "stop"
    assert stopped[0].new_text == free[0].new_text[: free[0].new_text.index(stop)]
    assert stopped[1].new_text == free[1].new_text.split(stop)[0]


def test_a_stream_checks_its_arguments_before_the_first_token(lettered):
    with pytest.raises(UsageError):
        lettered.stream("一", max_new_tokens=-1)


def test_an_engine_may_be_shared_by_threads(lettered):
    expected = [lettered.generate(["一丁"], max_new_tokens=15, seed=n)[0].text for n in range(4)]
    found: dict[int, str] = {}

    def work(n):
        found[n] = lettered.generate(["一丁"], max_new_tokens=15, seed=n)[0].text

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert [found[n] for n in range(4)] == expected
    assert lettered.report().new_tokens == 8 * 15


def test_ids_the_tokenizer_cannot_decode_are_never_drawn(odd_folder):
    few = CharacterTokenizer({n: chr(0x4E00 + n) for n in range(205)})
    with Engine.load(odd_folder, plan=LADDER, backend="eager", tokenizer=few) as engine:
        results = engine.generate(["一"], max_new_tokens=50, temperature=3.0, top_k=None, seed=1, num_samples=2)

    assert all(max(result.token_ids) < 205 for result in results)


def test_the_report_counts_what_ran(odd_folder):
    with Engine.load(odd_folder, plan=LADDER, backend="eager") as engine:
        engine.generate([prompt(15)], max_new_tokens=3, seed=9)
        report = engine.report()

    assert {bucket: count.steps for bucket, count in report.buckets.items()} == {B(1, 16): 2, B(1, 33): 1}
    assert (report.real_tokens, report.padded_tokens) == (15 + 16 + 17, 1 + 0 + 16)
    assert (report.new_tokens, report.switches, report.crops, report.seed) == (3, 1, 0, 9)
    assert report.seconds > 0


def test_nanogpts_generator_runs_rows_one_by_one_in_single_row_buckets(odd_folder):
    with Engine.load(odd_folder, plan=[B(1, 33), B(4, 33)], backend="eager", lazy=True) as engine:
        engine.generate([prompt(3), prompt(4)], max_new_tokens=3, seed=1, rng="nanogpt", num_samples=2)

        assert set(engine.report().buckets) == {B(1, 33)}


def test_rows_that_end_early_free_their_places(odd_folder):
    whole = {"max_new_tokens": 12, "temperature": 0}
    with Engine.load(odd_folder, plan=[B(1, 33), B(4, 33)], backend="eager", tokenizer=LETTERS) as engine:
        texts = [g.new_text for g in engine.generate(["一", "丁", "丂", "七"], **whole)]
        stops = [text[0] for text in texts[1:] if text[0] not in texts[0]]
        assert len(stops) == 3
        engine.generate(["一", "丁", "丂", "七"], stop=stops, **whole)
        counts = {bucket: count.steps for bucket, count in engine.report().buckets.items()}

    assert counts[B(1, 33)] == 11, "after the first step one row is left"


def test_token_ids_may_be_any_whole_numbers(engine):
    ids = torch.tensor(prompt(5))

    assert torch.equal(engine.logits([list(ids)]), engine.logits([ids.numpy()]))


def test_a_closed_engine_says_so(odd_folder):
    engine = Engine.load(odd_folder, plan=LADDER, backend="eager")
    engine.close()

    with pytest.raises(UsageError, match="closed"):
        engine.generate([[1]])


def test_strings_give_a_string_and_a_list_gives_a_list():
    options = {"model": "demo", "backend": "eager", "max_new_tokens": 4, "temperature": 0}

    one, many = generate("ROMEO:", **options), generate(["ROMEO:", "KING", ""], **options)

    assert isinstance(one, str)
    assert many[0] == one
    assert [len(text) for text in many] == [10, 8, 4]
    assert generate([], **options) == []


def test_warmup_runs_every_bucket_and_counts_nothing(odd_folder, odd_cache):
    with Engine.load(odd_folder, plan=COMPILED, cache_dir=odd_cache, lazy=True) as engine:
        assert engine._buckets._loader.loaded == {}
        engine.warmup()

        assert set(engine._buckets._loader.loaded) == set(COMPILED)
        assert engine.report().buckets == {}


def test_the_canary_is_remembered_on_this_node(odd_folder, odd_cache, tmp_path, monkeypatch):
    Engine.load(odd_folder, plan=COMPILED, cache_dir=odd_cache).close()
    assert len(list((tmp_path / "local" / "canary").iterdir())) == len(COMPILED)
    monkeypatch.setattr(gate, "canary", None)

    Engine.load(odd_folder, plan=COMPILED, cache_dir=odd_cache).close()


def test_damaged_entries_are_passed_over_or_built_again(odd_folder, odd_cache, tmp_path, monkeypatch):
    cache = tmp_path / "damaged"
    shutil.copytree(odd_cache, cache)
    selection = Selection(choose(odd_folder, cache_dir=cache))
    sha256 = selection.best(B(1, 16)).manifest.blobs[0].sha256
    blob = cache / "v1" / "blobs" / sha256[:2] / sha256
    blob.chmod(0o600)
    blob.write_bytes(blob.read_bytes()[:-1])

    with Engine.load(odd_folder, plan=[B(1, 16), B(1, 33)], cache_dir=cache) as engine:
        engine.generate([prompt(3)], max_new_tokens=2)
        assert set(engine.report().buckets) == {B(1, 33)}
        assert engine.report().promotions == 1
    with pytest.raises(CorruptEntry, match="bytes, not"):
        Engine.load(odd_folder, plan=[B(1, 16)], cache_dir=cache)

    monkeypatch.setattr(builder, "compile_bucket", found_in(odd_cache))
    with Engine.load(odd_folder, plan=[B(1, 16)], cache_dir=cache, on_miss="build", lazy=True) as engine:
        engine.generate([prompt(3)], max_new_tokens=2)
        assert set(engine.report().buckets) == {B(1, 16)}
    assert verify(Store(cache)).problems == ()


# --- misses -----------------------------------------------------------------------------------------------------------


def test_nothing_built_is_a_miss_with_the_command(odd_folder):
    with pytest.raises(CacheMiss, match="no bucket is built") as caught:
        Engine.load(odd_folder)

    assert "nanogpt-buckets build --model" in caught.value.hint
    assert caught.value.exit_code == 3


def test_a_missing_bucket_is_promoted_and_said_once(odd_folder, odd_cache, caplog):
    plan = Plan([B(1, 20), B(1, 33), B(1, 100)])  # 1x20 is not built
    with Engine.load(odd_folder, plan=plan, cache_dir=odd_cache) as engine:
        for _ in range(3):
            engine.generate([prompt(10)], max_new_tokens=5)
        report = engine.report()

    assert set(report.buckets) == {B(1, 33)}
    assert report.promotions == 3
    assert [r.message for r in caplog.records if "1x20 is not built" in r.message] != []
    assert sum("1x20 is not built" in r.message for r in caplog.records) == 1


def test_a_prompt_no_bucket_reaches_is_a_miss_before_the_first_step(odd_folder, odd_cache):
    with Engine.load(odd_folder, plan=[B(1, 16), B(1, 33)], cache_dir=odd_cache) as engine:
        engine.generate([prompt(30)], max_new_tokens=4, ignore_eos=True)  # the last step sees 33 tokens
        with pytest.raises(CacheMiss, match="34 tokens") as caught:
            engine.generate([prompt(30)], max_new_tokens=5)

        assert "--seq 50" in caught.value.hint
        assert engine.report().new_tokens == 4


def test_cached_only_never_compiles_whatever_else_is_said(odd_folder):
    with pytest.raises(CacheMiss):
        generate("一", model=odd_folder, cached_only=True, tokenizer=LETTERS)


def test_a_plan_that_does_not_fit_is_refused(odd_folder):
    with pytest.raises(UsageError, match="block_size 100"):
        Engine.load(odd_folder, plan=[Bucket(1, 101)], backend="eager")


# --- what is easily got wrong -----------------------------------------------------------------------------------------


def test_one_prompt_need_not_be_in_a_list(demo_cache):
    with Engine.load("demo", cache_dir=demo_cache) as engine:
        assert engine.logits("ROMEO:").shape == (1, 83)
        assert engine.logits([1, 2, 3]).equal(engine.logits([[1, 2, 3]]))
        one, same = (engine.generate(p, max_new_tokens=3, seed=1) for p in ([1, 2, 3], [[1, 2, 3]]))
        assert one == same
        assert len(engine.generate(["a", "b"], max_new_tokens=1)) == 2


@pytest.mark.parametrize(
    "mistake",
    [
        lambda engine: engine.generate(None),
        lambda engine: engine.generate([None]),
        lambda engine: engine.generate(["a", 3]),
        lambda engine: engine.generate("a", stop=3),
        lambda engine: engine.generate("a", stop=[3]),
        lambda engine: engine.generate("a", max_new_tokens="3"),
        lambda engine: Plan.grid(seq=64),
        lambda engine: Plan.grid(batch=1, seq=[64]),
        lambda engine: Plan([32, 64]),
        lambda engine: Plan(3),
        lambda engine: Engine.load("demo", plan=[32]),
        lambda engine: build([(1, 64)], model="demo"),
    ],
)
def test_mistakes_of_type_are_usage_errors(demo_cache, mistake):
    with Engine.load("demo", cache_dir=demo_cache) as engine, pytest.raises(UsageError):
        mistake(engine)


def test_a_traceback_shows_the_hint():
    with pytest.raises(UsageError) as caught:
        Plan([])

    assert caught.value.__notes__ == [f"hint: {caught.value.hint}"]


def test_without_a_plan_what_is_built_is_used(demo_cache, tmp_path):
    cache = tmp_path / "without-plan"
    shutil.copytree(demo_cache, cache)
    shutil.rmtree(cache / "v1" / "plans")

    with Engine.load("demo", cache_dir=cache, cached_only=True) as engine:
        engine.generate("ROMEO:", max_new_tokens=15, seed=1)
        assert [str(bucket) for bucket in engine.report().buckets] == ["1x16", "1x32"]
    with pytest.raises(CacheMiss, match="no bucket of the plan is built"):
        Engine.load("demo", plan=Plan.grid(seq=[48]), cache_dir=cache)


def test_a_target_that_is_named_is_the_only_one_loaded(demo_cache):
    built = InductorBackend().target(None)
    other = "x86-64-v2" if built != "x86-64-v2" else "x86-64-v3"
    with pytest.raises(CacheMiss, match=f"target: {built}, not {other}") as caught:
        Engine.load("demo", target=other, cache_dir=demo_cache)
    assert f"--target {other}" in caught.value.hint
    with Engine.load("demo", target=built, cache_dir=demo_cache) as engine:
        assert engine.logits("ROMEO:").shape == (1, 83)
