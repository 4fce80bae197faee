"""From verified bytes to a module on a core, and all that may stand in the way."""

from __future__ import annotations

import subprocess
import sys

import pytest

from nanogpt_buckets import Bucket, Engine, Plan, errors
from nanogpt_buckets.backends.neuron import device


@pytest.mark.parametrize("fault", ["wrong-gelu", "drop-mask", "scale-logits", "row-mix"])
def test_a_wrong_result_is_caught_at_first_load_if_it_was_built_without_one(host, fault, monkeypatch):
    host(NEURON_DOUBLE_FAULT=fault)
    assert host.build(Plan([Bucket(2, 16)]), target="trn1").compiled == 1
    monkeypatch.delenv("NEURON_DOUBLE_FAULT")
    host("trn1.2xlarge")

    with pytest.raises(errors.CorruptEntry, match=r"eager model|something else"):
        Engine.load("demo")
    with pytest.raises(errors.CorruptEntry, match="rejected: "):  # for good, until it is built anew
        Engine.load("demo")


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        ({"NEURON_DOUBLE_FAULT": "load-corrupt"}, errors.IncompatibleEntry, "does not load the compiled module"),
        ({"NEURON_DOUBLE_RUNTIME_MAX_CC": "2.20.0.0"}, errors.IncompatibleEntry, "does not load the compiled module"),
        ({"NEURON_DOUBLE_CORE_BYTES": "1000"}, errors.IncompatibleEntry, "does not load the compiled module"),
        ({"NEURON_RT_VISIBLE_CORES": "7"}, errors.BackendUnavailable, "no NeuronCore is free"),
        ({"NEURON_RT_VISIBLE_CORES": "0"}, errors.BackendUnavailable, "this process has no 2 NeuronCores"),
    ],
)
def test_a_module_that_does_not_load_is_a_typed_error(host, change, kind, said):
    host.build(Plan([Bucket(1, 16)]), target="trn1")
    host("trn1.2xlarge", **change)

    with pytest.raises(kind, match=said) as caught:
        Engine.load("demo", cores=2)
    assert caught.value.hint


def test_code_for_other_cores_is_told_before_it_is_read(host):
    host.build(Plan([Bucket(1, 16)]), target="trn2")
    host("trn1.2xlarge")

    best = host.selection(target=None).best(Bucket(1, 16))
    assert (best.status.value, best.why) == ("incompatible", "needs a NeuronCore-v3, this machine has v2")


def test_a_core_that_another_process_holds_is_said_to_be_so(host, tmp_path):
    host.build(Plan([Bucket(1, 16)]), target="trn1")
    host("trn1.2xlarge", NEURON_RT_VISIBLE_CORES="0")
    code = (
        "import sys, torch, torch_neuronx, io\n"
        "torch.jit.load(sys.argv[1])\nprint('ready', flush=True)\nsys.stdin.read()\n"
    )
    entry = host.selection(target=None).own(Bucket(1, 16)).manifest
    (tmp_path / "module.pt").write_bytes(host.selection(target=None).store.read_blob(entry.blobs[0]))
    command = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "module.pt")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"ready\n"
        with pytest.raises(errors.BackendUnavailable, match="no NeuronCore is free") as caught:
            Engine.load("demo")
        assert "neuron-ls" in caught.value.hint

        assert host.build(Plan([Bucket(1, 8)])).compiled == 1, "compiling needs no core"
        unchecked = host.selection(target=None).own(Bucket(1, 8)).manifest.unchecked
        assert unchecked.startswith("no NeuronCore is free"), "but checking does"
        holder.stdin.close()


def test_without_a_driver_that_is_what_is_said(host, monkeypatch):
    host.build(Plan([Bucket(1, 16)]), target="trn1")
    host("trn1.2xlarge", cores=0)
    (device.ROOT / "proc" / "devices").write_text("Character devices:\n  1 mem\n")

    with pytest.raises(errors.BackendUnavailable, match="driver is not loaded"):
        Engine.load("demo")


def test_buckets_that_do_not_fit_together_are_not_loaded_and_a_plan_never_grows_beyond_what_fits(
    host, monkeypatch, caplog
):
    host("trn1.2xlarge")
    one = host.selection(target=None).choice.model.architecture.n_params * 4
    monkeypatch.setitem(device._CORE_BYTES, "trn1", 2 * one + device._CORE_RESERVED_BYTES)

    host.build(Plan.grid(seq=[8, 16]))
    report = host.build(Plan.grid(seq=[24, 32]))
    assert report.compiled == 2, [row.why for row in report.rows]
    with Engine.load("demo") as engine:
        assert [bucket.seq_len for bucket in engine._buckets.load_all()] == [24, 32], (
            "the plan is that of the last build"
        )
    with pytest.raises(errors.PlanError, match="3 buckets of demo") as caught:
        Engine.load("demo", plan=Plan.grid(seq=[8, 16, 24]))
    assert "--seq 16,24" in caught.value.hint


def test_cores_that_the_user_chose_are_kept(host):
    host.build(Plan([Bucket(1, 16)]), target="trn1")
    host("trn1.2xlarge", NEURON_RT_VISIBLE_CORES="1")

    with Engine.load("demo"):
        assert host.double.reserved() == [1]
