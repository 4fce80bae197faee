"""What runs asked for is counted by model, kept on the node, and says what another ladder would have saved."""

from __future__ import annotations

import json
import threading

import pytest

from nanogpt_buckets import Bucket, Engine, Report, node
from nanogpt_buckets.choice import choose
from nanogpt_buckets.errors import BucketsError, CorruptEntry
from nanogpt_buckets.node.records import TRAFFIC
from nanogpt_buckets.plan.traffic import Request, demand
from nanogpt_buckets.regret import regret_of
from nanogpt_buckets.run.traffic import calls_of, demand_recorded, keep_traffic, recorded, traffic_of

BLOCK_SIZE = 256


@pytest.fixture
def demo(tmp_path):
    return choose("demo", cache_dir=tmp_path / "cache")


def counted(*calls) -> Report:
    """Return a report of calls, (bucket, longest context)."""
    report = Report("inductor", "demo")
    for bucket, context in calls:
        report.count_step(bucket, [1] * bucket.batch_size, 0.1, context)
    return report


def test_what_an_engine_asks_is_what_the_requests_ask(demo_cache):
    with Engine.load("demo", cache_dir=demo_cache, strategy="recompute", cached_only=True) as engine:
        engine.generate([[1] * 5], max_new_tokens=12, seed=1)
        engine.generate([[1] * 20], max_new_tokens=1, seed=1)

    (record,) = recorded()
    asked = demand_recorded(record)
    assert asked.weights == demand([Request(5, 12), Request(20, 1)], BLOCK_SIZE, "recompute").weights
    assert (record["runs"], record["crops"], asked.crops) == (1, 0, 0)
    assert "ROMEO" not in json.dumps(record)


def test_what_an_engine_that_remembers_asks_is_what_the_requests_ask(kv_cache):
    with Engine.load("demo", cache_dir=kv_cache, cached_only=True) as engine:
        engine.generate([[1] * 5], max_new_tokens=9, seed=1)

    (record,) = recorded()
    assert demand_recorded(record).weights == demand([Request(5, 9)], BLOCK_SIZE, "kv").weights


def test_runs_are_added_up(demo):
    for _ in range(2):
        keep_traffic(demo, counted((Bucket(1, 64), 40), (Bucket(1, 64), 41), (Bucket(4, 64), 40)))

    record = traffic_of(demo)
    assert record["runs"] == 2
    assert record["ran"] == {"recompute 1 64": 4, "recompute 4 64": 2}
    calls = calls_of(record)
    assert (calls["recompute", 1][40], calls["recompute", 1][41], calls["recompute", 4][40]) == (2, 2, 2)
    assert demand_recorded(record).weights["recompute"][40] == 2 + 4 * 2


def test_runs_that_end_together_lose_no_count(demo):
    threads = [threading.Thread(target=keep_traffic, args=(demo, counted((Bucket(1, 64), 40)))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert traffic_of(demo)["runs"] == 8


@pytest.mark.parametrize("word", ["off", "0", "no", "OFF"])
def test_it_can_be_turned_off(demo, monkeypatch, word):
    monkeypatch.setenv("NANOGPT_BUCKETS_RECORD", word)
    keep_traffic(demo, counted((Bucket(1, 64), 40)))
    assert recorded() == []


def test_a_place_that_cannot_be_written_fails_no_run(demo, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NANOGPT_BUCKETS_LOCAL_DIR", str(tmp_path / "file"))
    keep_traffic(demo, counted((Bucket(1, 64), 40)))


def test_nothing_recorded_and_another_model_of_the_name_are_told_apart(demo):
    with pytest.raises(BucketsError, match="no run of demo is recorded"):
        traffic_of(demo)
    keep_traffic(demo, counted((Bucket(1, 64), 40)))
    (path,) = (node.directory() / "traffic").glob("*.json")
    record = TRAFFIC.read(path.stem)
    TRAFFIC.write(path.stem, record | {"architecture": record["architecture"] | {"n_layer": 3}})
    with pytest.raises(BucketsError, match="another model of that name"):
        traffic_of(demo)


@pytest.mark.parametrize(
    "change",
    [
        {"calls": []},
        {"calls": {"recompute": {}}},
        {"calls": {"recompute 1": {"9999": 1}}},
        {"calls": {"recompute 1": {"x": 1}}},
        {"calls": {"odd 1": {}}},
        {"architecture": {}},
    ],
)
def test_a_record_that_makes_no_sense_is_said_to_be_so(demo, change):
    keep_traffic(demo, counted((Bucket(1, 64), 40)))
    with pytest.raises(CorruptEntry, match="cannot be understood"):
        calls_of(traffic_of(demo) | change)


def test_regret_is_one_where_no_ladder_is_better(demo):
    keep_traffic(demo, counted(*[(Bucket(1, 64), 64)] * 9, (Bucket(1, 256), 256)))
    found = regret_of(traffic_of(demo))
    assert found.ratio == pytest.approx(1)
    assert found.best == {"recompute 1": (64, 256)}
    assert found.waste == 0


def test_regret_says_what_another_ladder_would_have_saved(demo):
    keep_traffic(demo, counted(*[(Bucket(1, 256), 40)] * 9, (Bucket(1, 256), 250), (Bucket(1, 128), 100)))
    found = regret_of(traffic_of(demo))
    assert found.best == {"recompute 1": (40, 104, 256)}
    lengths = (40, 104, 128, 256)
    cost = {n: demo.compiler.call_ms(demo.model.architecture, "float32", None, Bucket(1, n)) for n in lengths}
    spent, least = 10 * cost[256] + cost[128], 9 * cost[40] + cost[104] + cost[256]
    assert found.ratio == pytest.approx(spent / least)
    assert found.to_json()["saves"] == pytest.approx(1 - least / spent)
    assert "plan --from-report --model demo --save plan.json" in found.command
    elsewhere = regret_of(traffic_of(demo) | {"dtype": "bfloat16", "target": "x86-64-v3"})
    assert "build --model demo --dtype bfloat16 --target x86-64-v3 --plan plan.json" in elsewhere.command
