"""The scripts for those who have what we have not."""

from __future__ import annotations

import json
import os
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


def test_check_on_device_gates_times_and_generates(host):
    host("inf2.xlarge")
    run = script("check-on-device", "--seq", "8,16", "--runs", "2")

    assert run.returncode == 0, run.stderr
    document = json.loads(run.stdout)
    assert (document["proof"], document["passed"], document["device"]["instance"]) == ("N4", 2, "inf2.xlarge")
    assert document["gate"]["1x16"]["bit_tests"]
    assert all(row["step_ms"]["median"] > 0 and row["max_difference"] < 1e-3 for row in document["buckets"])
    assert document["text"].startswith("ROMEO:")


def test_check_on_device_passes_nothing_that_the_gate_does_not(host):
    host("inf2.xlarge", NEURON_DOUBLE_FAULT="scale-logits")
    run = script("check-on-device", "--seq", "8", "--runs", "1")

    assert run.returncode == 1
    document = json.loads(run.stdout)
    assert (document["passed"], document["buckets"]) == (0, [])
    assert "eager model" in document["failed"][0]["why"]


@pytest.mark.parametrize("name", ["check-neuron-compile", "check-on-device"])
def test_without_what_they_need_the_scripts_say_so(name, monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    run = script(name)

    assert run.returncode == 1
    assert run.stdout == ""
    assert "Traceback" not in run.stderr
    assert "hint: " in run.stderr
