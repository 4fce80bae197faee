"""trace and the compiler: what they get, and what becomes of their errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nanogpt_buckets import Bucket, Engine, Plan, build
from nanogpt_buckets.backends import backend_for
from nanogpt_buckets.backends.base import BuildRequest
from nanogpt_buckets.backends.neuron import backend as neuron_backend
from nanogpt_buckets.model.architecture import GPT2_SIZES


@pytest.mark.parametrize("fault", ["split-miscompile", "int64-corruption", "nan-inf-mask"])
def test_faults_that_the_way_the_step_is_written_avoids(host, fault):
    host("trn1.2xlarge", NEURON_DOUBLE_FAULT=fault)

    assert host.build(Plan([Bucket(2, 16)]), compiler_args="-O1").compiled == 1


def test_a_passing_compiler_error_is_tried_once_more(host):
    host(NEURON_DOUBLE_FAULT="compile-70-once")

    assert host.build(Plan([Bucket(1, 8)]), target="trn1").compiled == 1
    assert len(host.compiles()) == 2


@pytest.mark.parametrize(
    ("fault", "said", "hint"),
    [
        ("compile-70", "ended twice with its error 70", "-v shows"),
        ("compile-oom", "killed, most likely for want of memory", "--jobs"),
        ("compile-abort", "ended with -6", "-v shows"),
    ],
)
def test_a_compiler_that_fails_is_one_sentence(host, fault, said, hint):
    host(NEURON_DOUBLE_FAULT=fault)

    built = host.build(Plan([Bucket(1, 8)]), target="trn1")

    assert built.failed == 1
    assert said in built.rows[0].why
    assert hint in built.rows[0].hint
    assert host.manifests() == []


def test_a_compiler_that_hangs_is_ended_with_all_it_started(host, monkeypatch):
    host(NEURON_DOUBLE_FAULT="compile-hang")
    monkeypatch.setattr(neuron_backend.NeuronBackend, "timeout_s", 8.0)

    built = build(Plan([Bucket(1, 8)]), model="demo", target="trn1")

    assert built.failed == 1
    assert built.rows[0].why == "the child was ended after 8 s without a result"
    running = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not [line for line in running if b"neuronx-cc" in line and b"/nanogpt-buckets-" in line]


def test_a_child_takes_one_core_at_most_and_knows_its_target(host):
    request = BuildRequest("neuron", GPT2_SIZES["gpt2"], Bucket(1, 8), "float32", "trn2", {}, source="", versions={})
    here = backend_for("neuron")

    assert here.child_environment(request) == {
        "NEURON_PLATFORM_TARGET_OVERRIDE": "trn2", "NEURON_RT_NUM_CORES": "1"
    }  # fmt: skip
    host("trn2.48xlarge", NEURON_RT_VISIBLE_CORES="3")
    assert here.child_environment(request) == {}


def test_a_saved_module_holds_no_path_of_the_building_machine(host, tmp_path):
    host.build(Plan([Bucket(1, 16)]), target="trn1")
    entry = host.selection().own(Bucket(1, 16)).manifest
    content = host.selection().store.read_blob(entry.blobs[0])

    assert str(tmp_path).encode() not in content
    assert str(tmp_path) not in json.dumps(entry.parts)


def test_flags_in_the_environment_reach_no_compiler_unnamed(host):
    """A child's environment is clean of them; where somebody calls the compiler in a process of his own, it refuses."""
    host(NEURON_CC_FLAGS="--optlevel=3")

    failed = host.build(Plan([Bucket(1, 8)]), target="trn1").rows[0]
    assert "NEURON_CC_FLAGS" in failed.why
    assert host.compiles() == []
    assert build(Plan([Bucket(1, 8)]), model="demo", target="trn1").compiled == 1
    assert [flags["--optlevel"] for flags in host.compiles()] == ["2"]


@pytest.mark.parametrize(("cores", "visible"), [(2, {}), (1, {"NEURON_RT_VISIBLE_CORES": "0"})])
def test_a_process_that_holds_every_core_still_compiles_what_it_lacks(host, cores, visible, caplog):
    host.build(Plan([Bucket(1, 16)]), target="trn1")
    host("trn1.2xlarge", **visible)

    plan = Plan.grid(seq=[16, 32])
    with (
        Engine.load("demo", cores=cores, on_miss="build", plan=plan) as engine,
        Engine.load("demo", backend="eager") as eager,
    ):
        assert host.double.reserved() == list(range(cores)), "all that it may have"
        text = engine.generate("ROMEO:", max_new_tokens=20, seed=1)[0].text
        assert (engine.report().hits, engine.report().compiled) == (1, 1)
        assert text == eager.generate("ROMEO:", max_new_tokens=20, seed=1)[0].text
    assert "1x32 was built unchecked (no NeuronCore is free" in caplog.text, "checked by the first that has a core"
