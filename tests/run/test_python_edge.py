"""What Python programs hand in, and what they do around us: every kind of prompt and number, default devices, forks."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

from nanogpt_buckets import Bucket, Engine, Plan
from nanogpt_buckets.errors import PlanError, UsageError

IDS = [3, 141, 59, 26, 5]
HUGE = 10**5000  # more digits than Python writes out


@pytest.fixture(scope="module")
def engine(odd_folder):
    with Engine.load(odd_folder, backend="eager", plan=[Bucket(1, 16), Bucket(2, 16)]) as engine:
        yield engine


def ids_of(engine, prompts):
    return [g.token_ids for g in engine.generate(prompts, max_new_tokens=2, temperature=0)]


ONE = {
    "tuple": tuple(IDS), "iterator": iter(IDS), "map": map(int, IDS), "generator": (i for i in IDS),
    "numpy": np.array(IDS), "numpy numbers": [np.int64(i) for i in IDS], "tensor": torch.tensor(IDS),
    "tensors": [torch.tensor(i) for i in IDS], "range": range(4),
}  # fmt: skip


@pytest.mark.parametrize("prompt", ONE.values(), ids=ONE)
def test_one_prompt_of_token_ids_comes_in_any_iterable(engine, prompt):
    wanted = list(range(4)) if isinstance(prompt, range) else IDS

    assert ids_of(engine, prompt) == ids_of(engine, wanted)


def test_a_stream_reads_an_iterator_once(engine):
    wanted = [token.id for token in engine.stream(IDS, max_new_tokens=3, seed=1)]

    assert [token.id for token in engine.stream(iter(IDS), max_new_tokens=3, seed=1)] == wanted
    assert torch.equal(engine.logits(iter(IDS)), engine.logits([IDS]))


MANY = {
    "maps": [map(int, IDS), map(int, IDS[:2])], "iterator of lists": iter([IDS, IDS[:2]]),
    "tensors": [torch.tensor(IDS), np.array(IDS[:2])],
}  # fmt: skip


@pytest.mark.parametrize("prompts", MANY.values(), ids=MANY)
def test_several_prompts_come_in_any_iterable_of_iterables(engine, prompts):
    assert ids_of(engine, prompts) == ids_of(engine, [IDS, IDS[:2]])


def test_a_tensor_of_two_dimensions_is_several_prompts(engine):
    assert ids_of(engine, torch.tensor([IDS, IDS])) == ids_of(engine, [IDS, IDS])


WRONG = {
    "bytes": b"ROMEO:", "bytearray": bytearray(b"R"), "bytes in a list": [b"R"], "a mapping": {1: 2}, "a set": {1, 2},
    "a number": 5, "None": None, "a scalar tensor": torch.tensor(5), "floats": [1.0, 2.0], "a huge id": [HUGE],
    "truth": [True], "three dimensions": torch.zeros(1, 1, 2, dtype=torch.int64), "None in a list": [[1], None],
    "a huge id in a list": [[1, -HUGE]],
}  # fmt: skip


@pytest.mark.parametrize("prompt", WRONG.values(), ids=WRONG)
def test_what_is_no_prompt_is_one_sentence(engine, prompt):
    for call in (engine.generate, engine.logits, lambda p: list(engine.stream(p))):
        with pytest.raises(UsageError) as error:
            call(prompt)
        assert len(error.value.message) < 200


NUMBERS = {"max_new_tokens": -1, "num_samples": 0, "temperature": -HUGE, "top_k": -HUGE, "top_p": HUGE, "seed": HUGE}


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [None, "1", b"1", [1], float("nan"), torch.zeros(2), object(), True])
def test_a_number_that_is_none_is_one_sentence(engine, name, value):
    for wrong in (NUMBERS[name], *([] if value is None else [value])):
        with pytest.raises(UsageError, match=name) as error:
            engine.generate([IDS], **{name: wrong})
        assert len(error.value.message) < 200


def test_numbers_of_numpy_and_tensors_are_numbers(engine):
    plain = engine.generate([IDS], max_new_tokens=4, temperature=0.5, top_k=7, top_p=0.5, seed=3)
    numpy = engine.generate(
        [IDS], max_new_tokens=np.int32(4), temperature=np.float64(0.5), top_k=np.uint8(7), top_p=torch.tensor(0.5),
        seed=torch.tensor(3), num_samples=np.int64(1),
    )  # fmt: skip

    assert numpy == plain
    assert Bucket(np.int64(1), torch.tensor(16)) == Bucket(1, 16)


@pytest.mark.parametrize("size", [HUGE, -HUGE, "1", None, 1.0, True], ids=lambda size: type(size).__name__)
def test_a_bucket_of_no_size_is_one_sentence(size):
    for make in (lambda: Bucket(1, size), lambda: Bucket(size, 1), lambda: Plan.grid(seq=[size])):
        with pytest.raises(PlanError) as error:
            make()
        assert len(error.value.message) < 200


def test_the_host_programs_defaults_change_nothing(odd_folder, odd_cache, engine):
    wanted = engine.generate([IDS], max_new_tokens=3, seed=1), engine.logits([IDS])
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.float64)
    try:
        for backend in ("eager", "auto"):
            with Engine.load(odd_folder, backend=backend, plan=[Bucket(1, 16)], cache_dir=odd_cache) as inside:
                inside.warmup()
                assert inside.generate([IDS], max_new_tokens=3, seed=1) == wanted[0]
                inside.generate([IDS], max_new_tokens=1, seed=1, rng="nanogpt", top_p=0.5)
                assert len(list(inside.stream(IDS, max_new_tokens=2, ignore_eos=True))) == 2
                torch.testing.assert_close(inside.logits([IDS]), wanted[1])
                assert (inside.logits([]).dtype, inside.logits([]).device.type) == (torch.float32, "cpu")
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


def test_what_comes_after_close_is_one_sentence(odd_folder):
    engine = Engine.load(odd_folder, backend="eager", plan=[Bucket(1, 16)])
    stream = engine.stream(IDS, max_new_tokens=5, ignore_eos=True)
    next(stream)
    engine.close()
    engine.close()

    calls = (lambda: engine.logits(IDS), lambda: engine.generate(IDS), lambda: engine.score(IDS))
    for call in (lambda: next(stream), engine.warmup, *calls):
        with pytest.raises(UsageError, match="closed"):
            call()
    assert engine.report().new_tokens == 1


FORK = """
    import os, sys
    from nanogpt_buckets import Bucket, Engine
    from nanogpt_buckets.errors import UsageError

    engine = Engine.load(sys.argv[1], backend="eager", plan=[Bucket(1, 16)], lazy=True)
    if sys.argv[2] == "ran":
        engine.generate([[1, 2]], max_new_tokens=2)
    child = os.fork()
    if child == 0:
        try:
            engine.generate([[1, 2]], max_new_tokens=2)
        except UsageError as error:
            os._exit(7 if "forked" in str(error) and "spawn" in error.hint else 1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    engine.generate([[1, 2]], max_new_tokens=2)  # the parent goes on
    sys.exit(code)
"""


@pytest.mark.parametrize(("before", "code"), [("ran", 7), ("nothing", 0)])
def test_a_fork_of_a_process_that_ran_is_told_so_instead_of_hanging(odd_folder, before, code):
    script = textwrap.dedent(FORK)
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, odd_folder, before], capture_output=True, text=True, timeout=120
    )

    assert run.returncode == code, run.stderr
