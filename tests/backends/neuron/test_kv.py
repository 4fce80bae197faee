"""Remembering on a device: one copy of the weights, state that stays there, and buckets that hold neither."""

from __future__ import annotations

import shutil

import pytest
import torch

from nanogpt_buckets import Bucket, Engine, Plan, errors
from nanogpt_buckets.backends.neuron import load
from nanogpt_buckets.choice import choose
from nanogpt_buckets.measure import measure
from nanogpt_buckets.steps import step_named

KV = Plan([Bucket(2, 16, "chunk"), Bucket(2, 256, "chunk"), Bucket(2, 256)])
# of several calls each, together and one after another; the last is cropped in the end
PROMPTS = [[1, 2, 3], [5] * 100, [7, 8], [9] * 250]
WEIGHTS_BYTES = 4 * 830_976


@pytest.fixture
def built(host, once, tmp_path):
    """The demo's chunk buckets, built on a device and checked there, once for all."""

    def fill(directory):
        report = host.build(KV, strategy="kv", cache_dir=directory / "cache")
        assert [row.why for row in report.rows] == [""] * 3

    host("trn1.2xlarge")
    shutil.copytree(once("neuron-kv", fill) / "cache", tmp_path / "cache")
    return host


def texts(**options):
    with Engine.load("demo", cached_only=True, **options) as engine:
        return [made.token_ids for made in engine.generate(PROMPTS, max_new_tokens=12, seed=4)]


def memory():
    """Return the bytes in use on each of this process's cores."""
    from torch_neuronx._runtime import RUNTIME

    return [core.used for core in RUNTIME.cores]


def test_what_is_built_holds_no_weights_and_serves_any(built):
    manifests = built.manifests(strategy="kv")
    assert [m.contains_weights for m in manifests] == [False] * 3
    assert {m.parts["family"]["weights"] for m in manifests} == {None}
    assert all(len(m.weights) == 27 and m.unchecked is None for m in manifests)
    assert max(m.size for m in manifests) < WEIGHTS_BYTES / 10
    chunks = [m for m in manifests if m.bucket.step == "chunk"]
    assert {tuple(m.gate["bit_tests"]) for m in chunks} == {("repeat", "padding", "future", "requests", "neighbours")}
    plain = choose("demo", backend="neuron", target="trn1")
    assert plain.plan_names != choose("demo", backend="neuron", target="trn1", strategy="kv").plan_names


def test_whoever_chooses_to_remember_is_told_how_far_that_is_proved(host, caplog):
    choose("demo", backend="neuron", target="trn1")
    assert not caplog.messages
    choose("demo", backend="neuron", target="trn1", strategy="kv")
    assert ["has never run on a device" in message for message in caplog.messages] == [True]


def test_float32_that_is_cast_in_every_call_is_refused(host):
    options = {"backend": "neuron", "target": "trn1", "compiler_args": "--auto-cast matmult"}

    with pytest.raises(errors.UsageError, match="cast anew in every call") as caught:
        choose("demo", strategy="kv", **options)
    assert "--dtype bfloat16" in caught.value.hint
    choose("demo", strategy="kv", dtype="bfloat16", **options)
    choose("demo", **options)


def test_a_bucket_longer_than_what_is_remembered_is_refused(host):
    with pytest.raises(errors.UsageError, match="block_size"):
        host.build(Plan([Bucket(1, 512, "chunk")]), strategy="kv", target="trn1")


@pytest.mark.parametrize("cores", [1, 2])
def test_the_text_is_that_of_recomputing(built, cores):
    found = texts(strategy="kv", cores=cores)

    assert found == texts(backend="eager", strategy="recompute")
    assert len(built.double.executions()) == cores


def test_prompts_that_are_all_cropped_remember_nothing(built):
    made = []
    for options in ({"strategy": "kv"}, {"backend": "eager", "strategy": "recompute"}):
        with Engine.load("demo", cached_only=True, **options) as engine:
            made += [[g.token_ids for g in engine.generate([[9] * 300, [8] * 257], max_new_tokens=3, seed=1)]]
    assert made[0] == made[1]


def test_all_buckets_share_one_copy_of_the_weights_and_let_go_of_it(built):
    with Engine.load("demo", cached_only=True, strategy="kv") as engine:
        modules = sum(loaded.nbytes for loaded in built.double.loaded())
        weights = engine._buckets._loader.weights.tensors.values()
        assert memory()[0] - modules == sum(tensor.numel() * tensor.element_size() for tensor in weights)
        engine.generate(PROMPTS[:2], max_new_tokens=2)
        state = 2 * 4 * 2 * 4 * 256 * 32 * 4  # rows, layers, k and v, heads, positions, head size, bytes
        assert engine.report().kv_bytes == state
        assert memory()[0] - modules < WEIGHTS_BYTES * 1.1, "what was remembered is gone with its rows"
    assert memory()[0] < WEIGHTS_BYTES / 10


def test_rows_of_one_prompt_and_streams_and_logits_are_those_of_recomputing(built):
    with (
        Engine.load("demo", cached_only=True, strategy="kv") as kv,
        Engine.load("demo", backend="eager", strategy="recompute") as plain,
    ):
        for engine in (kv, plain):
            assert len(engine.generate([PROMPTS[1]], num_samples=3, max_new_tokens=1)) == 3
        asked = {"num_samples": 3, "max_new_tokens": 5, "seed": 2}
        both = [[made.token_ids for made in engine.generate(PROMPTS[:2], **asked)] for engine in (kv, plain)]
        assert both[0] == both[1]
        streams = [[token.id for token in e.stream(PROMPTS[1], max_new_tokens=5, seed=2)] for e in (kv, plain)]
        assert streams[0] == streams[1]
        logits = [engine.logits(PROMPTS) for engine in (kv, plain)]
        assert torch.allclose(*logits, atol=1e-4)


@pytest.mark.parametrize("fault", ["sticky-state", "stale-handles"])
def test_a_device_that_mixes_requests_up_does_not_pass(host, fault):
    host("trn1.2xlarge", NEURON_DOUBLE_FAULT=fault)
    (row,) = host.build(Plan([Bucket(2, 256, "chunk")]), strategy="kv").rows

    assert row.state == "failed"
    assert "bucket 2x256 chunk" in row.why


@pytest.mark.parametrize("fault", ["wrong-gelu", "drop-mask", "scale-logits"])
def test_a_wrong_result_does_not_pass(host, fault):
    host("trn1.2xlarge", NEURON_DOUBLE_FAULT=fault)
    (row,) = host.build(Plan([Bucket(2, 16, "chunk")]), strategy="kv").rows

    assert "differs from the eager model" in row.why


def test_results_that_come_back_to_the_host_are_said_to(built, monkeypatch):
    with Engine.load("demo", cached_only=True, strategy="kv") as engine:
        monkeypatch.setenv("NEURON_DOUBLE_FAULT", "outputs-on-host")
        with pytest.raises(errors.DeviceError, match="though all that it was given is on the device"):
            engine.generate([[1]], max_new_tokens=1)
        monkeypatch.delenv("NEURON_DOUBLE_FAULT")
        real = load._moved
        monkeypatch.setattr(
            load, "_moved", lambda tensor, core: tensor if tensor.dtype == torch.int32 else real(tensor, core)
        )
        with pytest.raises(errors.DeviceError, match="since input_ids was on the host"):
            engine.generate([[1]], max_new_tokens=1)


def test_two_replicas_on_one_core_are_an_error(built, monkeypatch):
    monkeypatch.setenv("NEURON_DOUBLE_FAULT", "one-core")
    with (
        Engine.load("demo", cached_only=True, strategy="kv", cores=2) as engine,
        pytest.raises(errors.DeviceError, match="did not run the step"),
    ):
        engine.generate([[1], [2], [3]], max_new_tokens=2)


def test_a_core_without_room_for_the_weights_is_said_to_have_none(built, monkeypatch):
    monkeypatch.setenv("NEURON_DOUBLE_CORE_BYTES", "2e6")
    with pytest.raises(errors.DeviceError, match=r"NeuronCore 0 has no room for \d+\.\d MB more") as caught:
        Engine.load("demo", cached_only=True, strategy="kv")
    assert "--batch" in caught.value.hint


def test_a_graph_that_reads_not_all_it_is_given_is_refused(host, monkeypatch):
    chunk = type(step_named("chunk"))
    real = chunk.forward
    monkeypatch.setattr(
        chunk, "forward", lambda self, gpt, ids, start, *rest: real(self, gpt, ids, torch.zeros_like(start), *rest)
    )
    (row,) = host.build(Plan([Bucket(1, 8, "chunk")]), strategy="kv", target="trn1").rows
    assert row.why == "bucket 1x8 chunk would not read start, and the compiler would leave it out"


def test_what_is_built_without_a_device_is_checked_when_one_first_loads_it(host):
    assert host.build(KV, strategy="kv", target="trn1").compiled == 3
    assert all(m.unchecked for m in host.manifests(strategy="kv"))
    host("trn1.2xlarge")
    assert texts(strategy="kv") == texts(backend="eager", strategy="recompute")


def test_bench_times_what_remembers_beside_the_eager_step(built):
    selection = built.selection(target=None, strategy="kv")
    weights = selection.choice.model.weights("float32").tensors
    figures = [measure(selection, bucket, weights, runs=1) for bucket in KV]
    assert [f.max_difference < 1e-3 for f in figures] == [True] * 3


def test_bfloat16_is_remembered_as_such(host):
    host("trn1.2xlarge")
    report = host.build(Plan([Bucket(1, 256, "chunk")]), strategy="kv", dtype="bfloat16")
    assert [row.why for row in report.rows] == [""]
    with Engine.load("demo", cached_only=True, strategy="kv", dtype="bfloat16") as engine:
        assert engine.generate([[1, 2]], max_new_tokens=3, seed=1)[0].new_tokens == 3
        assert engine.report().kv_bytes == 4 * 2 * 4 * 256 * 32 * 2
