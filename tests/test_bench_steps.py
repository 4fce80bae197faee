"""The bench runs, prints one JSON document, and its figures agree with each other and with the store; no timings."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nanogpt_buckets.store.store import Store

SCRIPT = Path(__file__).parents[1] / "scripts" / "bench_steps"
PEERS = {"eager", "transformers"}


def bench(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    # the child measures the package that is tested here, wherever that is
    path = {"PYTHONPATH": os.pathsep.join(filter(None, [str(SCRIPT.parents[1]), os.environ.get("PYTHONPATH")]))}
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, env=os.environ | path | environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench") / "cache"


@pytest.fixture(scope="module")
def run(cache: Path) -> subprocess.CompletedProcess[str]:
    done = bench("--quick", "--json", "--cache-dir", str(cache))
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def document(run: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    return json.loads(run.stdout)


def figures(value: Any) -> list[dict[str, Any]]:
    """Every figure anywhere in the document."""
    if isinstance(value, list):
        return [found for item in value for found in figures(item)]
    if not isinstance(value, dict):
        return []
    return [value] if "median" in value else [found for item in value.values() for found in figures(item)]


def test_every_phase_is_said_on_stderr_and_stdout_is_one_document(run, document):
    assert document["quick"] is True
    for word in ("building", "memory", "loading", "limits", "step of bucket 1x16", "generating", "overhead"):
        assert word in run.stderr
    assert "Traceback" not in run.stderr
    assert "arning" not in run.stderr


def test_every_figure_is_the_median_and_spread_of_its_runs(document):
    found = figures(document)

    assert len(found) == 2 + 4 + 2 * (1 + 3) + 5 + 2  # memory, limits, buckets, generate, overhead
    for figure in found:
        assert figure["n"] == len(figure["runs"]) == document["runs"] >= 2
        assert (figure["min"], figure["max"]) == (min(figure["runs"]), max(figure["runs"]))
        assert figure["median"] == statistics.median(figure["runs"])
        assert figure["min"] > 0


def test_the_machine_is_named(document):
    machine = document["machine"]

    assert machine["cores"] >= 1
    assert machine["threads"] >= 1
    assert {"cpu", "target", "load_average", "python", "torch", "transformers", "nanogpt-buckets"} <= machine.keys()


def test_every_bucket_is_there_with_the_bytes_that_the_store_holds(document, cache):
    stored = {}
    for manifest in Store(cache).entries():
        blobs = [cache / "v1" / "blobs" / blob.sha256[:2] / blob.sha256 for blob in manifest.blobs]
        if manifest.parts["bucket"]["step"] == "recompute":
            stored[manifest.parts["bucket"]["seq_len"]] = sum(blob.stat().st_size for blob in blobs)

    assert stored.keys() == {16, 32}
    assert {row["seq_len"]: row["bytes"] for row in document["buckets"]} == stored


def test_a_buckets_ratios_and_limits_follow_from_its_figures(document):
    limits = document["limits"]
    for row in document["buckets"]:
        own = row["step_ms"]["compiled"]["median"]
        assert row["ratios"] == {name: row["step_ms"][name]["median"] / own for name in PEERS}
        assert row["share_of_peak"] == pytest.approx(row["gflops"] / limits["gemm_gflops"])
        assert row["over_limit"] == pytest.approx(own / row["limit_ms"])
        assert row["limit_ms"] * limits["gemm_gflops"] >= row["gflops"] * own * 0.999999

    assert document["limits_hold"] is all(row["over_limit"] >= 1 for row in document["buckets"])
    first, second = document["buckets"]
    done = [row["gflops"] * row["step_ms"]["compiled"]["median"] for row in (first, second)]
    assert done[0] < done[1]


def test_the_peaks_are_the_best_medians(document):
    limits = document["limits"]
    medians = {name: figure["median"] for name, figure in limits["measured"].items()}

    assert limits["gemm_gflops"] == max(value for name, value in medians.items() if name.startswith("mm"))
    assert limits["bandwidth_gb_s"] == max(medians["sum"], medians["copy"])


def test_the_contestants_compute_the_same(document):
    for row in document["buckets"]:
        assert row["differences"].keys() == PEERS
        assert max(row["differences"].values()) <= 2e-5
    assert len(document["generate"]["same"]) == 5
    assert all(document["generate"]["same"].values())


def test_the_ratios_of_generating_and_memory_follow_from_their_figures(document):
    generate, memory = document["generate"], document["memory"]
    medians = {name: figure["median"] for name, figure in generate["tokens_per_s"].items()}
    pss = {name: figure["median"] for name, figure in memory["pss_bytes"].items()}

    assert generate["ratios"] == {name: medians["ladder"] / value for name, value in medians.items()}
    assert memory["added"] == pytest.approx(pss["all"] / pss["one"] - 1)


def test_the_reaches_judge_the_figures_reported(document):
    values = [row["value"] for row in document["reaches"]]
    buckets = document["buckets"]

    assert values == [
        max(row["bytes"] for row in buckets) / 1e6,
        max(row["load_ms"]["median"] for row in buckets),
        100 * document["memory"]["added"],
        document["generate"]["ratios"]["longest bucket only"],
        document["overhead_ms"]["sampled"]["median"],
    ]
    for row in document["reaches"]:
        assert row["met"] is (row["value"] <= row["limit"] if row["sense"] == "<=" else row["value"] >= row["limit"])


def test_a_second_run_hits_and_prints_the_readmes_tables(run, cache):
    done = bench("--quick", "--markdown", "--cache-dir", str(cache))

    assert done.returncode == 0, done.stderr
    assert done.stderr.count(": hit") == 4
    for table in done.stdout.split("\n\n")[1:]:
        assert len({line.count("|") for line in table.strip().split("\n")}) == 1
    assert "| 1x16 |" in done.stdout
