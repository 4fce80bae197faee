"""From a plan to published buckets, with and without a device."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from nanogpt_buckets import Bucket, Engine, Plan, build, errors
from nanogpt_buckets.backends import backend_for
from nanogpt_buckets.backends.neuron import load
from nanogpt_buckets.builder import default_jobs
from nanogpt_buckets.choice import choose
from nanogpt_buckets.cli import main
from nanogpt_buckets.model.architecture import GPT2_SIZES
from nanogpt_buckets.selection import Selection

PLAN = Plan([Bucket(1, 16), Bucket(2, 16)])
PROMPTS = ["ROMEO:", "KING"]


def test_built_in_children_without_a_device_then_checked_and_run_on_one(host, caplog):
    """The whole way: cross-compiled for inf2, carried to a trn1, checked there once, and equal to the eager model."""
    built = build(PLAN, model="demo", backend="neuron", target="inf2")
    assert (built.compiled, built.failed, built.target) == (2, 0, "trn1"), built
    again = build(PLAN, model="demo", target="trn1")
    assert (again.hits, again.compiled) == (2, 0)

    entry = host.selection().own(Bucket(1, 16)).manifest
    assert entry.contains_weights
    assert entry.unchecked == "no device where it was built"
    assert entry.requires == {"neuron_core": "v2"}
    assert [contract.dtype for contract in entry.inputs] == ["int32", "int32"]
    assert entry.parts["compiler"] == {"neuronx-cc": "2.26.6360.0"}
    assert entry.parts["family"]["runtime"] == {"torch": "2.9.0", "torch-neuronx": "2.9.0.2.15.32035"}
    assert entry.parts["family"]["weights"] == host.selection().choice.model.weights("float32").digest
    best = host.selection().best(Bucket(1, 16))
    assert (best.status.value, best.why) == ("incompatible", "needs a NeuronCore-v2, this machine has no Neuron device")

    host("trn1.2xlarge")
    caplog.set_level(logging.WARNING)
    with Engine.load("demo") as engine, Engine.load("demo", backend="eager") as eager:
        assert engine.report().backend == "neuron"
        texts = [g.text for g in engine.generate(PROMPTS, max_new_tokens=10, seed=1)]
        assert texts == [g.text for g in eager.generate(PROMPTS, max_new_tokens=10, seed=1)]
        assert {model.core for model in host.double.loaded()} == {0}, "all buckets of a replica on one core"
        assert host.double.reserved() == [0], "and no core beyond it"
    assert sum("was built unchecked" in record.message for record in caplog.records) == 2

    caplog.clear()
    with Engine.load("demo"):
        pass
    assert not [record for record in caplog.records if "unchecked" in record.message], "once is enough"


def test_bfloat16_is_another_family_and_passes_its_gate(host):
    host("trn1.2xlarge")
    built = host.build(Plan([Bucket(1, 16)]), dtype="bfloat16")

    assert (built.compiled, built.failed) == (1, 0), built
    entry = Selection(choose("demo", backend="neuron", dtype="bfloat16")).own(Bucket(1, 16))
    assert entry.manifest.unchecked is None
    assert entry.manifest.gate["relative_error_e9"] <= entry.manifest.gate["tolerance_e9"]


def test_precision_that_was_given_away_is_judged_by_bfloat16s_noise(host):
    host("trn1.2xlarge")
    one = Plan([Bucket(1, 16)])

    assert host.build(one, compiler_args="--auto-cast matmult").compiled == 1
    cast = host.selection(target=None, compiler_args="--auto-cast=matmult").own(Bucket(1, 16)).manifest
    assert host.build(one).compiled == 1
    plain = host.selection(target=None).own(Bucket(1, 16)).manifest
    assert plain.gate["tolerance_e9"] == 20_000
    assert plain.gate["tolerance_e9"] < cast.gate["relative_error_e9"] <= cast.gate["tolerance_e9"]
    with Engine.load("demo", compiler_args=["--auto-cast", "matmult"]) as engine:
        assert engine.logits(["ROMEO:"]).isfinite().all()


@pytest.mark.parametrize("fault", ["wrong-gelu", "drop-mask", "scale-logits", "row-mix"])
def test_a_wrong_result_is_caught_before_it_is_published_on_a_device(host, fault):
    host("trn1.2xlarge", NEURON_DOUBLE_FAULT=fault)

    built = host.build(Plan([Bucket(2, 16)]))

    assert built.failed == 1
    assert "eager model" in built.rows[0].why or "something else" in built.rows[0].why
    assert host.manifests(target=None) == []


def test_a_failed_compile_is_not_tried_again_by_a_run_but_by_a_build(host, monkeypatch):
    host("trn1.2xlarge", NEURON_DOUBLE_FAULT="compile-70")
    one = Plan([Bucket(1, 8)])
    failed = build(one, model="demo")
    assert failed.failed == 1
    attempts = len(host.compiles())

    with Engine.load("demo", plan=one, on_miss="build", lazy=True) as engine:
        with pytest.raises(errors.CompileFailed, match="min ago on this machine") as caught:
            engine.generate("ROM", max_new_tokens=2)
        assert "nanogpt-buckets build" in caught.value.hint
        assert len(host.compiles()) == attempts

        monkeypatch.delenv("NEURON_DOUBLE_FAULT")
        assert host.build(one).compiled == 1


def test_a_core_that_is_taken_between_compiling_and_checking_puts_the_check_off(host, monkeypatch):
    host("trn1.2xlarge")

    def taken(*arguments: Any) -> Any:
        raise errors.BackendUnavailable("no NeuronCore is free")

    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(load, "_load", taken)
        assert host.build(Plan([Bucket(1, 8)])).compiled == 1
    assert host.selection(target=None).own(Bucket(1, 8)).manifest.unchecked == "no NeuronCore is free"
    with Engine.load("demo") as engine:
        assert engine.logits(["ROMEO:"]).shape == (1, 83)


def test_a_ladder_that_does_not_fit_the_cores_memory_is_refused_with_the_one_that_does(host):
    ladder = Plan.grid(seq=[32, 64, 128, 256, 512, 1024])
    xl = choose("gpt2-xl", backend="neuron", target="trn1")

    with pytest.raises(errors.PlanError, match=r"6 buckets of gpt2-xl hold 37\.4 GB of weights") as caught:
        xl.check_memory(ladder)
    assert "15.9 GB" in str(caught.value)
    assert "build --model gpt2-xl --seq 512,1024 --target trn1" in caught.value.hint
    with pytest.raises(errors.PlanError):
        build(ladder, model="gpt2-xl", target="trn1")
    xl.check_memory(Plan.grid(seq=[512, 1024]))
    half = choose("gpt2-xl", backend="neuron", target="trn1", dtype="bfloat16")
    half.check_memory(Plan.grid(seq=[128, 256, 512, 1024]))
    assert choose("gpt2-xl", backend="inductor").fits(ladder)


def test_what_is_remembered_counts_twice_and_weights_once(host):
    xl = choose("gpt2-xl", backend="neuron", target="trn1", strategy="kv")
    row = 2 * 48 * 1600 * 1024 * 4  # k and v of every layer and position

    room = (15_904_000_000 - 4 * xl.model.architecture.n_params) // (2 * row)
    assert room == 7
    ladder = Plan.grid(seq=[128, 256, 512, 1024], batch=[1, room], strategy="chunk")
    xl.check_memory(ladder)
    with pytest.raises(errors.PlanError) as caught:
        xl.check_memory(Plan.grid(seq=[512, 1024], batch=[1, room + 1], strategy="chunk").completed(1024))
    said = "the weights of gpt2-xl take 6.2 GB, what 8 rows remember 10.1 GB, and a trn1 core has room for 15.9 GB"
    assert caught.value.message == said
    assert "--seq 512,1024 --strategy kv --target trn1" in caught.value.hint
    assert "--batch" not in caught.value.hint.split("&&")[0]


@pytest.mark.parametrize(("strategy", "step"), [("kv", "decode"), ("score", "score")])
def test_a_step_the_backend_has_not_is_refused(host, strategy, step):
    with pytest.raises(errors.UsageError, match=f"the neuron backend has no {step} step") as caught:
        host.build(Plan.grid(seq=[8], strategy=strategy), target="trn1")
    assert caught.value.hint == "what it has: recompute"


def test_as_many_compilations_run_at_once_as_host_memory_allows(monkeypatch):
    from nanogpt_buckets.backends import host as machine

    monkeypatch.setattr(machine, "cpu_count", lambda: 64)
    monkeypatch.setattr(machine, "available_memory_bytes", lambda: 128_000_000_000)

    many = Plan.grid(seq=range(1, 101))
    assert default_jobs(backend_for("neuron"), GPT2_SIZES["gpt2"], many) == 6
    assert default_jobs(backend_for("neuron"), GPT2_SIZES["gpt2-xl"], many) == 2


def test_cache_ls_says_what_is_inside_and_what_was_not_checked(host, capsys):

    host.build(Plan([Bucket(1, 16)]), target="trn1")
    with pytest.raises(SystemExit):
        main(["cache", "ls"])

    out = capsys.readouterr().out
    assert "weights inside; not checked on a device yet" in out
