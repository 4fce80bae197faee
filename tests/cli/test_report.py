"""`nanogpt-buckets report`: what ran, what another ladder would have saved, as text, plot and metrics."""

from __future__ import annotations

import json
import re
import shlex

import pytest

from nanogpt_buckets import Bucket, Report
from nanogpt_buckets.choice import choose
from nanogpt_buckets.run.report import save_last_run
from nanogpt_buckets.run.traffic import keep_traffic

# Short contexts in a long bucket.
CALLS = [(Bucket(1, 256), 40)] * 9 + [(Bucket(1, 256), 250), (Bucket(1, 128), 100)]


@pytest.fixture
def ran(tmp_path, monkeypatch):
    """Two runs of the demo have ended here."""
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        report = Report("inductor", "demo", seconds=3.0, new_tokens=11, promotions=2)
        report.replaced[Bucket(1, 64)] = "not built: it computed something else"
        for bucket, context in CALLS:
            report.count_step(bucket, [context], 0.1, context)
        save_last_run(report)
        keep_traffic(choose("demo", cache_dir=tmp_path / "cache"), report)
    return tmp_path


def test_it_says_what_another_ladder_would_have_saved_and_how_to_get_it(run, ran):
    code, out, err = run("report")
    assert code == 0
    ratio = float(re.search(r"^regret +([\d.]+) times", out, re.MULTILINE)[1])
    assert ratio > 2
    assert f"hint: {1 - 1 / ratio:.0%}"[:7] in err

    command = json.loads(run("report", "--json")[1])["regret"]["command"]
    assert command in err
    plan, build = command.split(" && ")
    code, _, said = run(*shlex.split(plan)[1:])
    assert code == 0, said
    assert "2 recorded runs" in run(*shlex.split(plan)[1:])[1]
    assert shlex.split(build)[1:] == ["build", "--model", "demo", "--plan", "plan.json"]
    lengths = [b["seq_len"] for b in json.loads((ran / "plan.json").read_text())["buckets"]]
    assert 40 <= lengths[0] < 128
    assert lengths[-1] == 256


def test_it_says_what_ran_in_place_of_what_and_what_all_runs_did(run, ran):
    _, _, err = run("report")
    assert "a longer bucket ran in place of 1x64, which is not built: it computed something else" in err
    assert "in all 22 steps" in err
    assert "4 promotions" in err
    every = json.loads(run("report", "--json")[1])["all"]
    assert every["real_tokens"] == 2 * (9 * 40 + 250 + 100)
    assert every["padded_tokens"] == 2 * (10 * 256 + 128) - every["real_tokens"]


def test_it_is_drawn(run, ran):
    code, _, err = run("report", "--plot", "report.png")
    assert code == 0, err
    assert (ran / "report.png").read_bytes().startswith(b"\x89PNG")


def test_prometheus_reads_it(run, ran):
    code, out, _ = run("report", "--prometheus")
    assert code == 0
    line = re.compile(r'# TYPE \w+ (counter|gauge)|\w+(\{(\w+="[^"]*",?)+\})? [-+\d.e]+')
    assert all(line.fullmatch(each) for each in out.splitlines())
    assert "nanogpt_buckets_runs_total 2" in out
    assert "nanogpt_buckets_promotions_total 4" in out
    assert "nanogpt_buckets_saved_seconds_total 0" in out
    bucket = 'model="demo",backend="inductor",dtype="float32",step="recompute",batch_size="1",seq_len="256"'
    assert f"nanogpt_buckets_calls_total{{{bucket}}} 20" in out


def test_a_plot_of_nothing_is_refused(run, monkeypatch):
    report = Report("eager", "demo")
    report.count_step(Bucket(1, 4), [4], 0.1)
    save_last_run(report)
    code, out, err = run("report", "--plot", "report.png")
    assert (code, out) == (1, "")
    assert "nothing is recorded of demo" in err


def test_planning_for_what_was_never_run_is_refused(run, ran):
    code, _, err = run("plan", "--from-report", "--model", "gpt2")
    assert code == 1
    assert "no run of gpt2 is recorded" in err
    assert "recorded: demo" in err
