"""bench_plan's own logic: what it samples, which ladders it sets side by side, and that they run; no timings."""

from __future__ import annotations

import argparse
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

import pytest

from nanogpt_buckets.choice import choose
from nanogpt_buckets.plan.bucket import Plan
from nanogpt_buckets.plan.planner import MAX_ONLY, PERCENTILES, POWERS_OF_TWO
from nanogpt_buckets.plan.traffic import Request
from nanogpt_buckets.planning import demand_of

SCRIPT = Path(__file__).parents[1] / "scripts" / "bench_plan"


@pytest.fixture(scope="module")
def script():
    loader = SourceFileLoader("bench_plan", str(SCRIPT))
    spec = spec_from_loader("bench_plan", loader)
    module = module_from_spec(spec)
    sys.modules["bench_plan"] = module  # dataclasses look there
    loader.exec_module(module)
    return module


def part(script, strategy, work, **options):
    return script.Part("demo", strategy, work, argparse.Namespace(**({"quick": False, "runs": 2} | options)))


@pytest.mark.parametrize("kind", ["short", "chat"])
@pytest.mark.parametrize("strategy", ["recompute", "kv"])
def test_ladders_are_set_beside_others_of_as_many_rungs(script, tmp_path, strategy, kind):
    mine = part(script, strategy, tmp_path)
    sample = mine.sample(kind)

    by_name = {}
    for ladder in sample.ladders:
        assert all(rungs[-1] == 256 for rungs in ladder.rungs.values())
        assert ladder.whole >= 1
        by_name.setdefault(ladder.name, {})[ladder.count] = ladder
    assert set(by_name) == {script.OURS, MAX_ONLY, POWERS_OF_TWO, PERCENTILES}
    for others in (POWERS_OF_TWO, PERCENTILES):
        for count, ladder in by_name[others].items():
            assert by_name[script.OURS][count].whole <= ladder.whole
    counts = script.RUNGS[strategy] | (script.CHAT_RUNGS[strategy] if kind == "chat" else set())
    assert counts <= set(by_name[script.OURS]), "and as many as percentiles have"
    assert len(sample.requests) == script.SAMPLES["demo", strategy]
    asked = demand_of(mine.choice, sample.requests, strategy)
    assert sum(asked.weights["recompute" if strategy == "recompute" else "prefill"]) >= len(sample.requests)


def test_single_steps_are_those_in_the_middle_of_equal_parts(script):
    assert list(script.middles([0, 4, 0, 4, 2, 2], 3)) == [1, 3, 4]
    assert list(script.middles([0, 1, 1, 1, 1], 4)) == [1, 2, 3, 4]
    assert list(script.middles([0.0, 0.0, 5.0], 3)) == [2, 2, 2]


def test_every_ladder_runs_the_same_requests_as_often(script, tmp_path, demo_cache, capsys):
    mine = part(script, "recompute", tmp_path)
    mine.cache, requests = demo_cache, [Request(20, 3), Request(3, 2)]
    ladders = [
        script.Ladder(name, {"recompute": rungs}, 1.0) for name, rungs in (("planned", (16, 32)), ("max", (32,)))
    ]
    mine.choice, mine.M = choose("demo", cache_dir=demo_cache), 32
    mine.reference = Plan.grid(seq=[16, 32])
    sample = script.Sample("chat", requests, ladders)
    mine.execute(sample)

    assert [len(ladder.took) for ladder in ladders] == [2, 2]
    assert min(ladders[0].took + ladders[1].took) > 0
    assert all(planned <= most for planned, most in zip(ladders[0].predicted, ladders[1].predicted, strict=True))
    rows = [vars(ladder) | {"rungs_in_all": 2} for ladder in ladders]
    document = {"model": "demo", "strategy": "recompute"}
    document["samples"] = [{"workload": "chat", "unpadded_s": sample.unpadded, "ladders": rows}]
    script.show(document)
    script.reached([document])
    out = capsys.readouterr().out
    assert "planned" in out
    assert "of 2 ladders within 15 %" in out


@pytest.mark.parametrize("arguments", [["--only", "nonsense"], ["--runs", "0"], ["--json", "nowhere/x.json"]])
def test_what_cannot_be_meant_is_refused_at_once(script, arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["bench_plan", *arguments])
    with pytest.raises(SystemExit) as end:
        script.arguments()
    assert end.value.code == 2
    assert "bench_plan: error: " in capsys.readouterr().err
