"""The comparison runs on a tiny model and uncompiled steps: its document, tables and refusals; no timings."""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"
ASKED = ("--here", "--tiny", "--backend", "eager", "--runs", "2", "--only", "hf fp32,ours fp32,ct2 fp32,ours-rec")


def bench(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, [str(SCRIPTS.parent), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, str(SCRIPTS / "bench_peers"), *arguments]
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=cwd)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("peers")


@pytest.fixture(scope="module")
def run(work: Path) -> subprocess.CompletedProcess[str]:
    measures = "limits,ttft,decode,batch,throughput,score,overhead"
    done = bench(*ASKED, "--measures", measures, "--work", str(work), cwd=work)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def document(run: subprocess.CompletedProcess[str], work: Path) -> dict[str, Any]:
    return json.loads((work / "bench_peers.json").read_text())


def rows(document: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    found = [measure["rows"] for measure in document["measures"].values() if measure["kind"] == kind]
    assert found
    return found


def test_every_phase_is_said_on_stderr_and_every_measure_has_a_table(run, document):
    for title in document["measures"]:
        assert title in run.stdout
    for word in ("time to first token after 8", "decode at 40", "9 prompts", "scoring 3 texts", "host's work"):
        assert word in run.stderr
    assert "Traceback" not in run.stderr


def test_every_figure_is_the_median_and_spread_of_its_runs(document):
    found = [row for measure in document["measures"].values() for row in measure["rows"].values() if "runs" in row]

    assert len(found) > 15
    for row in found:
        assert len(row["runs"]) == document["runs"] == 2
        assert (row["min"], row["max"]) == (min(row["runs"]), max(row["runs"]))
        assert row["median"] == statistics.median(row["runs"])
        assert row["min"] > 0


@pytest.mark.parametrize(("kind", "higher"), [("ttft", False), ("decode", True), ("throughput", True), ("score", True)])
def test_a_ratio_says_how_many_times_as_fast_as_hugging_face(document, kind, higher):
    for found in rows(document, kind):
        base = found["hf fp32"]["median"]
        own = found["ours fp32"]
        assert found["hf fp32"]["ratio"] == 1
        assert own["ratio"] == pytest.approx(own["median"] / base if higher else base / own["median"])


def test_the_best_is_named_whoever_it_is(document):
    for measure in document["measures"].values():
        medians = {name: row["median"] for name, row in measure["rows"].items() if "median" in row}
        best = (max if measure["better"] == "higher" else min)(medians, key=medians.__getitem__)
        assert measure["best"] == best


def test_ours_gives_hugging_faces_ids_and_probabilities(document):
    for kind in ("ttft", "decode", "batch", "throughput"):
        for found in rows(document, kind):
            assert found["ours fp32"]["same"] == 1
    for found in rows(document, "score"):
        assert found["ours fp32"]["apart"] < 1e-5


def test_a_contestant_that_cannot_run_is_a_row_that_says_why(document, run):
    if importlib.util.find_spec("ctranslate2"):
        return  # there it runs, which the document's other tests look at
    for found in rows(document, "decode"):
        assert found["ct2 fp32"] == {"why": "No module named 'ctranslate2'"}
    assert "No module named 'ctranslate2'" in run.stdout


def test_shares_of_the_machines_limits_follow_from_the_figures(document):
    weights = 211 * 48 + 128 * 48 + 2 * (12 * 48 * 48 + 13 * 48) + 2 * 48
    for found in rows(document, "decode"):
        row = found["ours fp32"]
        assert row["mbu"] == pytest.approx(4e-9 * weights * row["median"] / document["limits"]["read_gb_s"])
        assert "mbu" not in found["ours-recompute fp32"]  # it recomputes


def test_the_plot_is_a_file_or_a_sentence(run, work):
    if importlib.util.find_spec("matplotlib"):
        assert (work / "bench_peers.png").read_bytes().startswith(b"\x89PNG")
        assert "written: bench_peers.json, bench_peers.png\n" in run.stderr
    else:
        assert "nothing is drawn: this Python lacks matplotlib; without --here it is installed\n" in run.stderr
        assert "written: bench_peers.json\n" in run.stderr


def test_files_that_could_not_be_written_are_refused_first(tmp_path):
    done = bench(*ASKED, "--json", str(tmp_path / "nowhere" / "out.json"))

    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.endswith("out.json cannot be written: there is no such directory\n")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--measures", "speed"), "measure speed is unknown"),
        (("--only", "nobody"), "no contestant's name begins with nobody"),
        (("--runs", "0"), "--runs is 0; it must be at least 1"),
    ],
)
def test_what_cannot_be_asked_is_one_sentence(arguments, sentence):
    done = bench("--here", *arguments)

    assert done.returncode == 2
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
