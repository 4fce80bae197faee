"""The scripts for those who have what we have not."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[3] / "scripts"


def script(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    package = str(SCRIPTS.parent)
    variables = os.environ | {"PYTHONPATH": os.pathsep.join([os.environ.get("PYTHONPATH", ""), package])}
    run = [sys.executable, str(SCRIPTS / name), *arguments]
    return subprocess.run(run, env=variables, capture_output=True, text=True)


def test_check_neuron_compile_tells_sizes_seconds_and_flags(host):
    run = script("check-neuron-compile", "--seq", "8,16", "--compiler-args=-O1")

    assert run.returncode == 0, run.stderr
    document = json.loads(run.stdout)
    assert (document["proof"], document["target"], document["compiled"]) == ("N3", "trn1", 2)
    assert document["versions"]["torch-neuronx"].endswith("+double"), "the package itself was asked"
    assert "--optlevel=1" in document["flags"]
    assert all(row["bytes"]["module"] > 100_000 and row["compile_ms"] > 0 for row in document["buckets"])


def test_check_neuron_compile_says_what_failed(host):
    host(NEURON_DOUBLE_FAULT="compile-70")
    run = script("check-neuron-compile", "--seq", "8")

    assert run.returncode == 1
    (row,) = json.loads(run.stdout)["buckets"]
    assert row["state"] == "failed"
    assert "error 70" in row["why"]
    assert row["log"]


def test_check_on_device_tries_both_strategies_beside_what_was_predicted(host):
    host("inf2.xlarge")
    run = script("check-on-device", "--seq", "8,16", "--runs", "2")

    assert run.returncode == 0, run.stderr
    document = json.loads(run.stdout)
    assert (document["proof"], document["passed"], document["device"]["instance"]) == ("N4", 4, "inf2.xlarge")
    assert any("core reads" in line for line in document["assumptions"])
    for strategy, step in (("recompute", "recompute"), ("kv", "chunk")):
        rows = document["strategies"][strategy]["buckets"]
        assert [(row["bucket"]["seq_len"], row["bucket"]["step"]) for row in rows] == [(8, step), (16, step)]
        for row in rows:
            least, most = row["predicted"]["call_ms"]
            assert row["gate"]["bit_tests"]
            assert row["as_predicted"] == (least <= row["step_ms"]["median"] <= most)
            assert row["max_difference"] < 1e-3
        assert len(document["token_ms"][strategy]) == 5
    assert document["texts"]["kv"] == document["texts"]["recompute"] != ""
    assert document["default"]["strategy"] in ("recompute", "kv")
    assert "ms a token" in document["default"]["why"]


def test_check_on_device_passes_nothing_that_the_gate_does_not(host):
    host("inf2.xlarge", NEURON_DOUBLE_FAULT="scale-logits")
    run = script("check-on-device", "--seq", "8", "--runs", "1")

    assert run.returncode == 1
    document = json.loads(run.stdout)
    assert document["passed"] == 0
    assert all("eager model" in tried["failed"][0]["why"] for tried in document["strategies"].values())
    assert document["default"] == {"strategy": "", "why": "nothing else passed the gate and ran"}


def test_check_on_device_says_when_only_one_strategy_runs(host):
    host("inf2.xlarge", NEURON_DOUBLE_FAULT="outputs-on-host")
    run = script("check-on-device", "--seq", "8", "--runs", "1")

    assert run.returncode == 1
    document = json.loads(run.stdout)
    assert document["default"]["strategy"] == "recompute"
    (failed,) = document["strategies"]["kv"]["failed"]
    assert "returned its results to the host" in failed["why"]


def test_the_default_is_what_is_faster_beyond_doubt():
    judged = runpy.run_path(str(SCRIPTS / "check-on-device"))["judged"]

    assert judged({"recompute": [3.0, 4.0], "kv": [1.0, 2.0]})["strategy"] == "kv"
    assert judged({"recompute": [1.0, 2.0], "kv": [3.0, 4.0]})["strategy"] == "recompute"
    assert "overlap" in judged({"recompute": [3.0, 4.0], "kv": [1.0, 3.5]})["why"]
    assert judged({"recompute": [3.0, 4.0], "kv": [1.0, 3.5]})["strategy"] == "recompute"


@pytest.mark.parametrize("name", ["check-neuron-compile", "check-on-device"])
def test_without_what_they_need_the_scripts_say_so(name, monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    run = script(name)

    assert run.returncode == 1
    assert run.stdout == ""
    assert "Traceback" not in run.stderr
    assert "hint: " in run.stderr
