"""What is remembered stays with its row: ragged batches, samples, rows that end, several calls at once."""

from __future__ import annotations

import resource
import struct
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt_buckets import Bucket, Engine, Plan, Request
from nanogpt_buckets.errors import CacheMiss, NonFiniteLogits, UsageError
from nanogpt_buckets.model.architecture import GPT2_SIZES, Architecture
from nanogpt_buckets.run.dispatch import needed, reach
from nanogpt_buckets.run.kvcache import KVCache, most_rows
from nanogpt_buckets.run.report import BucketCount

ARCH = Architecture(2, 2, 8, 16, 16, 11)
KV = Plan.grid(batch=[1, 2, 4], seq=[16, 33, 100], strategy="kv").completed(100)
RECOMPUTE = Plan.grid(seq=[16, 33, 100])


@pytest.fixture(scope="module")
def engines(odd_folder):
    with (
        Engine.load(odd_folder, plan=KV, backend="eager") as kv,
        Engine.load(odd_folder, plan=RECOMPUTE, backend="eager") as recompute,
    ):
        yield kv, recompute


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 210), min_size=1, max_size=110), min_size=1, max_size=5),
    st.integers(1, 3),
    st.integers(1, 25),
    st.integers(0, 2**32),
)
def test_what_is_remembered_is_what_would_be_computed_again(engines, prompts, samples, new, seed):
    kv, recompute = engines
    how = {"num_samples": samples, "max_new_tokens": new, "seed": seed, "temperature": 1.5}
    assert kv.generate(prompts, **how) == recompute.generate(prompts, **how)


def test_rows_that_end_leave_their_neighbours_alone(engines, monkeypatch):
    """Most rows end at once and others take their slots."""
    kv, recompute = engines
    prompts = [[n] * (n % 40 + 1) for n in range(12)]
    free = recompute.generate(prompts, max_new_tokens=20, seed=3)
    ends = {row.token_ids[row.prompt_tokens] for row in free[:3] + free[5:9]}
    for engine in engines:
        monkeypatch.setattr(engine, "_end_tokens", tuple(ends))
    found = kv.generate(prompts, max_new_tokens=20, seed=3)
    assert found == recompute.generate(prompts, max_new_tokens=20, seed=3)
    assert {row.new_tokens for row in found} > {1}


def test_the_last_rows_move_together(engines, monkeypatch):
    """The second and third of four end soon; the fourth moves into the gap, and a bucket of two does for both."""
    requests = [Request([n] * n, max_new_tokens=new, seed=n) for n, new in ((3, 20), (4, 2), (5, 2), (6, 19))]
    moved = []
    copy = KVCache.copy
    monkeypatch.setattr(KVCache, "copy", lambda self, *what: (copy(self, *what), moved.append(what)))
    before = engines[0].report().buckets.get(Bucket(2, 33, "decode"), BucketCount()).steps
    assert list(engines[0].generate_each(requests)) == list(engines[1].generate_each(requests))
    assert moved == [(3, 1, 7)]
    assert engines[0].report().buckets[Bucket(2, 33, "decode")].steps > before


def test_a_prompt_is_run_once_however_many_samples_take_turns(engines, monkeypatch):
    kv, recompute = engines
    before = kv.report().buckets
    how = {"num_samples": 11, "max_new_tokens": 6, "seed": 8}
    assert kv.generate([[7, 8, 9]], **how) == recompute.generate([[7, 8, 9]], **how)
    rows = sum(count.rows for bucket, count in kv.report().buckets.items() if bucket.step == "prefill")
    assert rows == 1 + sum(count.rows for bucket, count in before.items() if bucket.step == "prefill")


def test_a_prompt_of_several_samples_is_run_once(odd_folder):
    with Engine.load(odd_folder, plan=KV, backend="eager") as engine:
        engine.generate([[1, 2, 3]], num_samples=4, max_new_tokens=3, ignore_eos=True)
        steps = {bucket: count.rows for bucket, count in engine.report().buckets.items()}
    assert sum(rows for bucket, rows in steps.items() if bucket.step == "prefill") == 1
    assert steps[Bucket(4, 16, "decode")] == 8


def test_streams_threads_and_abandoned_iterators_keep_apart(engines):
    kv, recompute = engines
    prompts = [[n, n + 1, n + 2] * 9 for n in range(6)]
    expected = [recompute.generate([ids], max_new_tokens=15, temperature=0)[0].token_ids for ids in prompts]
    next(kv.stream(prompts[0], max_new_tokens=15, temperature=0))  # and left there
    streams = [kv.stream(ids, max_new_tokens=15, temperature=0) for ids in prompts[:3]]
    interleaved = [list(tokens) for tokens in zip(*streams, strict=True)]
    found: dict[int, list[int]] = {}

    def run(n: int) -> None:
        found[n] = kv.generate([prompts[n]], max_new_tokens=15, temperature=0)[0].token_ids

    threads = [threading.Thread(target=run, args=(n,)) for n in range(3, 6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n in range(3):
        assert prompts[n] + [step[n].id for step in interleaved] == expected[n]
    assert [found[n] for n in range(3, 6)] == expected[3:]


def test_memory_is_reported(odd_folder):
    with Engine.load(odd_folder, plan=KV, backend="eager") as engine:
        engine.generate([[1], [2]], max_new_tokens=2)
        arch = engine._arch
        slots = 4  # of which the padding of a bucket of four takes two
        assert engine.report().kv_bytes == slots * 2 * arch.n_layer * arch.n_embd * arch.block_size * 4


def test_a_strategy_decides_and_auto_follows_the_plan(odd_folder):
    both = KV | RECOMPUTE
    for strategy, plan, steps in (
        ("auto", both, {"prefill", "decode"}),
        ("recompute", both, {"recompute"}),
        ("auto", RECOMPUTE, {"recompute"}),
        ("kv", None, {"prefill", "decode"}),
    ):
        with Engine.load(odd_folder, plan=plan, backend="eager", strategy=strategy) as engine:
            engine.generate([[1, 2]], max_new_tokens=3, ignore_eos=True)
            assert {bucket.step for bucket in engine.report().buckets} == steps
    with pytest.raises(UsageError, match="strategy 'fast' is unknown"):
        Engine.load(odd_folder, backend="eager", strategy="fast")


def test_what_a_strategy_lacks_is_a_miss_that_names_the_step(odd_folder, odd_cache):
    only = [Bucket(1, 100, "prefill"), Bucket(3, 33, "decode")]
    with Engine.load(odd_folder, plan=only, cache_dir=odd_cache) as engine:
        engine.generate([[1] * 33], max_new_tokens=1)
        with pytest.raises(CacheMiss, match="no decode bucket that is built holds 34 tokens") as caught:
            engine.generate([[1] * 33], max_new_tokens=2)
        assert "--seq 50 --cache-dir" in caught.value.hint
        with pytest.raises(CacheMiss, match="no bucket that is built holds 100 tokens"):
            engine.generate([[1] * 101], max_new_tokens=1)
        command = engine._buckets._choice.build_command(
            [*only, Bucket(1, 64, "decode"), Bucket(1, 16), Bucket(1, 16, "score")]
        )
    assert "--seq 16 --strategy recompute --cache-dir" in command
    assert "--seq 64,100 --cache-dir" in command
    assert "--batch 3 --seq 33 --cache-dir" in command
    assert "--seq 16 --score --cache-dir" in command


def test_what_is_needed_of_each_step():
    assert needed([(5, 5), (9, 9)], 16, "kv") == {"prefill": 9}
    assert needed([(5, 8), (9, 12)], 16, "kv") == {"prefill": 9, "decode": 12}
    assert needed([(5, 14), (9, 9)], 16, "kv") == {"prefill": 9, "decode": 14}
    assert needed([(5, 35), (9, 39)], 16, "kv") == {"prefill": 9, "decode": 16, "recompute": 16}
    assert needed([(16, 17)], 16, "kv") == {"prefill": 16, "recompute": 16}
    assert needed([(20, 21)], 16, "kv") == {"recompute": 16}
    assert needed([(5, 35), (9, 39)], 16, "recompute") == {"recompute": 16}
    assert reach([Bucket(1, 16, "prefill")], {"prefill": 16})
    assert not reach([Bucket(1, 16)], {"prefill": 16})


def test_copying_keeps_what_was_written_and_the_last_slots_have_views_too():
    cache = KVCache(ARCH, "float32", 4)
    for slot in range(4):
        first, views = cache.views(slot, Bucket(1, 16, "decode"))
        assert first == slot
        for tensor in views:
            tensor.fill_(slot)
    cache.copy(3, 2, 5)
    for slot, start, rest in ((1, 1, 1), (2, 3, 2), (3, 3, 3)):
        for tensor in cache.views(slot, Bucket(1, 16, "decode"))[1]:
            assert torch.equal(tensor[0, 0, :, 0], torch.tensor([start] * 5 + [rest] * 11).float())
    assert [cache.views(slot, Bucket(3, 16, "decode"))[0] for slot in range(4)] == [0, 1, 1, 1]
    assert cache.views(2, Bucket(3, 16, "decode"))[1] is cache.views(3, Bucket(3, 16, "decode"))[1]


def test_room_for_state_takes_no_memory_until_it_is_written_not_even_after_another_batch():
    page = resource.getpagesize()

    def present(tensor):
        """How many pages of its memory exist: what else a process holds grows as it likes, whatever measures it."""
        with Path("/proc/self/pagemap").open("rb", buffering=0) as entries:
            entries.seek(tensor.data_ptr() // page * 8)
            held = entries.read(tensor.numel() * tensor.element_size() // page * 8)
        return sum(entry >> 63 for (entry,) in struct.iter_unpack("<Q", held))

    large = Architecture(4, 4, 256, 16, 1024, 11)  # 8 tensors of 16 MB
    for _ in range(3):
        cache = KVCache(large, "float32", 16)
        assert cache.bytes == 2**27
        for tensor in cache.views(0, Bucket(16, 1024, "decode"))[1]:
            assert present(tensor) == 0
            assert not tensor.count_nonzero()
            tensor.fill_(1)
            assert present(tensor) == 2**24 // page
        del cache, tensor


def test_the_next_batch_finds_the_memory_of_the_one_before_and_the_text_is_that_of_a_fresh_engine(odd_folder):
    def run(engine, count):
        return [each.token_ids for each in engine.generate([[7] * 30, [3, 1]][:count], max_new_tokens=20, seed=1)]

    with Engine.load(odd_folder, plan=KV, backend="eager") as engine:
        spare = engine._loop._dispatcher._spare
        engine.logits([[9] * 60] * 4)
        (kept,) = spare
        engine.generate([[8] * 90], max_new_tokens=9)
        used = [run(engine, 1), run(engine, 2)]
        assert list(spare) == [kept], "four slots do for fewer rows"
        first, second = engine.stream([1, 2], max_new_tokens=5, seed=1), engine.stream([1, 2], max_new_tokens=5, seed=1)
        pairs = list(zip(first, second, strict=True))
        assert all(a == b for a, b in pairs), "two at a time have memory of their own"
        assert len(spare) == 1
        stream = engine.stream([1, 2], max_new_tokens=5)
        next(stream)
        assert not spare
        stream.close()
        assert len(spare) == 1, "an abandoned one gives it back"
        late = engine.stream([1, 2], max_new_tokens=5)
        next(late)
        engine.close()
        late.close()
        assert not engine._loop._dispatcher._spare, "nor what comes back later"
    with Engine.load(odd_folder, plan=KV, backend="eager") as engine:
        assert [run(engine, 1), run(engine, 2)] == used


def test_memory_of_a_batch_that_failed_is_not_used_again(odd_folder, monkeypatch):
    with Engine.load(odd_folder, plan=KV, backend="eager") as engine:
        stream = engine.stream([1, 2], max_new_tokens=5)
        next(stream)
        with monkeypatch.context() as patch:
            patch.setattr(engine._loop._dispatcher, "_run_bucket", raising(NonFiniteLogits("NaN")))
            with pytest.raises(NonFiniteLogits):
                next(stream)
        assert not engine._loop._dispatcher._spare


def raising(error):
    def run(*_):
        raise error

    return run


def test_more_rows_than_may_be_remembered_take_turns(odd_folder, monkeypatch):
    prompts = [[n + 1] * (40 - 3 * n) for n in range(7)]
    with Engine.load(odd_folder, plan=KV, backend="eager") as engine:
        together = engine.generate(prompts, max_new_tokens=5, seed=1)
        assert engine._loop._dispatcher.places("kv", KV) == 4
    monkeypatch.setattr("nanogpt_buckets.run.dispatch.most_rows", lambda arch, dtype: 3)
    with Engine.load(odd_folder, plan=KV, backend="eager") as engine:
        assert engine.generate(prompts, max_new_tokens=5, seed=1) == together
        assert engine._loop._dispatcher.places("kv", KV) == 3
    assert most_rows(GPT2_SIZES["gpt2"], "float32") == 28


def test_buckets_that_score_open_no_places(odd_folder):
    with Engine.load(odd_folder, plan=[*KV, Bucket(9, 16, "score")], backend="eager") as engine:
        assert engine._loop._dispatcher.places("kv", [*KV, Bucket(9, 16, "score")]) == 4
        engine.score([[1, 2, 3]])
        engine.generate([[1, 2, 3]], max_new_tokens=2)
        whole = engine.report().kv_bytes
    with Engine.load(odd_folder, plan=KV, backend="eager") as engine:
        engine.generate([[1, 2, 3]], max_new_tokens=2)
        assert engine.report().kv_bytes == whole
