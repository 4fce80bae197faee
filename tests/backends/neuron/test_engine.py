"""Running on one core or several, from Python and from the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time

import pytest
import torch

from nanogpt_buckets import Bucket, Engine, Plan, Report, errors
from nanogpt_buckets.contract import Executable
from nanogpt_buckets.model.architecture import Architecture
from nanogpt_buckets.run.dispatch import Dispatcher
from nanogpt_buckets.run.score import Window
from nanogpt_buckets.steps import step_named


def test_an_index_out_of_range_never_reaches_the_device(host):
    host("trn1.2xlarge")
    host.build(Plan([Bucket(1, 16)]))
    with Engine.load("demo") as engine:
        step = engine._buckets.executable(Bucket(1, 16))
        with pytest.raises(errors.UsageError, match="input_ids 83 is out of range"):
            step(torch.full((1, 16), 83, dtype=torch.int32), torch.zeros(1, dtype=torch.int32))


def test_replicas_each_hold_every_bucket_on_a_core_of_their_own_and_share_the_work(host):
    host.build(Plan([Bucket(1, 16)]), target="trn1")
    host("trn1.2xlarge", cores=4)

    with Engine.load("demo", cores=2) as engine, Engine.load("demo", backend="eager") as eager:
        texts = [g.text for g in engine.generate(["A", "B", "C", "D"], max_new_tokens=5, seed=3)]
        assert texts == [g.text for g in eager.generate(["A", "B", "C", "D"], max_new_tokens=5, seed=3)]
        assert sorted(model.core for model in host.double.loaded()) == [0, 1]
        assert host.double.reserved() == [0, 1], "two cores are asked for, the other two are left alone"
        assert set(host.double.executions()) == {0, 1}
        assert engine.report().steps == 20


@pytest.mark.parametrize("wrong", [0, -1, 1.5, "2", True, None])
def test_a_number_of_cores_that_is_none_is_refused_and_does_not_hang(host, wrong):
    with pytest.raises(errors.UsageError, match="cores is"):
        Engine.load("demo", backend="neuron", target="trn1", cores=wrong)


def test_host_work_is_never_less_than_nothing_however_many_cores_ran_at_once():
    both = threading.Barrier(2)
    bucket, report = Bucket(1, 4), Report("neuron", "demo")

    def run(*tensors: torch.Tensor) -> list[torch.Tensor]:
        both.wait()
        time.sleep(0.05)
        return [torch.zeros(1, 11)]

    arch = Architecture(1, 1, 8, 32, 8, 11)
    executable = Executable(run, step_named(bucket.step).interface(arch, bucket, "float32"))
    dispatcher = Dispatcher(lambda bucket: executable, lambda bucket: 1, arch, "float32", report, at_once=2)
    start = time.perf_counter()
    windows = [Window(0, [1], 0), Window(1, [2, 3], 1)]
    dispatcher.run(dispatcher.stateless("recompute", windows, [bucket]))
    report.seconds = time.perf_counter() - start

    assert report.steps == 2
    assert report.overhead_s >= 0


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    run = [sys.executable, "-m", "nanogpt_buckets", *arguments]
    return subprocess.run(run, env=dict(os.environ), capture_output=True, text=True)


def test_the_commands_on_a_device(host):
    host("trn1.2xlarge")

    built = command("build", "--model=demo", "--seq=16", "--json")
    assert built.returncode == 0, built.stderr
    assert json.loads(built.stdout)["backend"] == "neuron"
    generated = command("generate", "ROMEO:", "--model=demo", "--max-new-tokens=5", "--seed=1", "--cores=2")
    assert generated.returncode == 0, generated.stderr
    assert generated.stdout.startswith("ROMEO:")
    assert "tokens/s on neuron" in generated.stderr
    (row,) = json.loads(command("cache", "ls", "--json").stdout)
    assert (row["contains_weights"], row["unchecked"], row["target"]) == (True, "", "trn1")
    doctor = json.loads(command("doctor", "--json").stdout)
    found = {f"{row['topic']} {row['name']}": row for row in doctor["findings"]}
    assert found["neuron device"]["value"] == "trn1.2xlarge, 1 chip, 2 cores with 15.9 GB for buckets each"
    assert "SDK 2.31" in found["neuron packages"]["value"]
    assert found["backend chosen"]["value"] == "neuron: there is a Neuron device"
