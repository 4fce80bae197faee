"""Costs of calls: measured ones are kept on the node, and what was not measured follows from them."""

from __future__ import annotations

import json

import pytest

from nanogpt_buckets import Bucket, Engine, node
from nanogpt_buckets.choice import choose
from nanogpt_buckets.costs import costs_of, save_costs
from nanogpt_buckets.plan.traffic import demand, workload
from nanogpt_buckets.planning import Limits, explain, propose

LENGTHS = (32, 64, 128, 256)


@pytest.fixture
def demo(tmp_path):
    return choose("demo", cache_dir=tmp_path / "cache")


def assumed(choice, bucket):
    return choice.compiler.call_ms(choice.model.architecture, choice.dtype, choice.target, bucket)


def test_without_measurements_the_backend_says(demo):
    costs = costs_of(demo)
    assert costs(Bucket(1, 64)) == assumed(demo, Bucket(1, 64))
    assert costs.said == demo.compiler.assumptions("float32", None)


def test_what_was_measured_is_kept_and_others_lie_on_a_line_through_it(demo):
    slow = {Bucket(1, n): 0.5 + 3 * assumed(demo, Bucket(1, n)) for n in LENGTHS[:3]}
    save_costs(demo, slow.items())

    costs = costs_of(demo)
    assert all(costs(bucket) == pytest.approx(ms) for bucket, ms in slow.items())
    assert costs(Bucket(1, 256)) == pytest.approx(0.5 + 3 * assumed(demo, Bucket(1, 256)))
    assert costs(Bucket(2, 256)) == pytest.approx(0.5 + 3 * assumed(demo, Bucket(2, 256)))
    assert costs(Bucket(1, 64, "decode")) == assumed(demo, Bucket(1, 64, "decode")), "nothing of decode was measured"
    assert "recompute: 3 buckets" in costs.said[0]
    assert costs_of(choose("demo", dtype="bfloat16")).measured == {}, "another dtype is measured for itself"


def test_two_buckets_say_too_little(demo):
    save_costs(demo, [(Bucket(1, 32), 7.0), (Bucket(1, 64), 9.0)])
    assert costs_of(demo)(Bucket(1, 32)) == assumed(demo, Bucket(1, 32))
    assert costs_of(demo).too_few == {"recompute": 2}
    save_costs(demo, [(Bucket(1, 128), 11.0)])
    assert costs_of(demo)(Bucket(1, 32)) == 7.0, "they are added to what was measured before"


def test_buckets_within_5_percent_of_a_longer_one_are_one_with_it(demo):
    times = {16: 3.0, 32: 4.79, 64: 4.9, 128: 5.0, 256: 9.0}
    kept = save_costs(demo, [(Bucket(1, n, "decode"), ms) for n, ms in times.items()])

    assert kept.merged == {Bucket(1, n, "decode"): Bucket(1, 128, "decode") for n in (32, 64)}
    assert [kept(Bucket(1, n, "decode")) for n in (16, 32, 48, 64, 100, 128, 256)] == [3, 5, 5, 5, 5, 5, 9]
    assert kept(Bucket(2, 64, "decode")) != 5, "of another batch size nothing was measured"


def test_a_bucket_that_takes_longer_than_a_longer_one_stays_what_it_is(demo):
    """So that steps go to the longer one, which is cheaper."""
    kept = save_costs(demo, [(Bucket(1, n), ms) for n, ms in {32: 9.0, 64: 5.1, 128: 5.0}.items()])
    assert kept.merged == {Bucket(1, 64): Bucket(1, 128)}
    assert kept(Bucket(1, 32)) == 9
    kept = save_costs(demo, [(Bucket(1, n), ms) for n, ms in {32: 5.0, 64: 9.0, 128: 5.0}.items()])
    assert kept.merged == {Bucket(1, 32): Bucket(1, 128)}
    assert [kept(Bucket(1, n)) for n in (32, 63, 64, 65, 128)] == [5, 5, 9, 5, 5]


@pytest.mark.parametrize("times", [(9.0, 8.0, 7.0), (1.0, 1.0, 1.0), (1e-3, 5.0, 900.0)])
def test_whatever_was_measured_no_cost_is_negative_or_falls_with_length(demo, times):
    save_costs(demo, zip([Bucket(1, n) for n in LENGTHS[:3]], times, strict=True))
    costs = costs_of(demo)
    line = [costs(Bucket(1, n)) for n in range(129, 257)]
    assert line == sorted(line)
    assert line[0] > 0


@pytest.mark.parametrize(
    "calls", [None, [["recompute"]], [["recompute", 1, 64, "x"]], [["odd", 1, 64, 1.0]], [["recompute", 1, 64, -1.0]]]
)
def test_a_record_that_makes_no_sense_counts_for_nothing(demo, calls):
    save_costs(demo, [(Bucket(1, n), 1.0) for n in LENGTHS])
    (path,) = (node.directory() / "costs").glob("*.json")
    from nanogpt_buckets.node.records import COSTS

    COSTS.write(path.stem, {"calls": calls})
    assert costs_of(demo)(Bucket(1, 64)) == assumed(demo, Bucket(1, 64))


def test_plans_go_by_what_was_measured(demo):
    """Where every bucket costs the same, one is all it takes."""
    asked = demand(workload("chat", 256), 256, "recompute")
    before = propose(demo, asked, Limits(), strategy="recompute")
    save_costs(demo, [(Bucket(1, n), 1.0) for n in LENGTHS])
    after = propose(demo, asked, Limits(), strategy="recompute")

    assert len(before.chosen.plan) > 3
    assert len(after.chosen.plan) == 1
    assert "bench --save" in after.assumptions[0]


def test_bench_keeps_its_times(demo_cache, capfd):
    from nanogpt_buckets.cli import main

    with pytest.raises(SystemExit) as end:
        main(["bench", "--model", "demo", "--runs", "1", "--save", "--json", "--cache-dir", str(demo_cache)])
    out, err = capfd.readouterr()
    assert not end.value.code, err
    rows = json.loads(out)["buckets"]
    (path,) = (node.directory() / "costs").glob("*.json")
    kept = json.loads(path.read_text())["record"]["calls"]
    assert {(row["bucket"]["step"], row["bucket"]["seq_len"]): row["step_ms"]["median"] for row in rows} == {
        (step, n): ms for step, _, n, ms in kept
    }


def test_what_comes_next_is_priced_for_all_rows(demo):
    """Three rows: four places, or two and one, or one each; whichever is not the best may be the next."""
    one, two, four = (Bucket(B, 64) for B in (1, 2, 4))

    def ways(times, *some):
        save_costs(demo, zip((one, two, four), times, strict=True))
        (found,) = explain(demo, some, 40, 3)
        return [*found.calls], found.cost, [*found.runner_up], found.runner_up_cost

    assert ways((3.0, 5.0, 7.0), one, two, four) == ([(four, 3)], 7, [(one, 1), (two, 2)], 8)
    assert ways((3.0, 3.5, 7.0), one, two, four) == ([(one, 1), (two, 2)], 6.5, [(four, 3)], 7)
    assert ways((3.0, 5.0, 7.0), one) == ([(one, 1)] * 3, 9, [], 0)
    assert ways((3.0, 5.0, 7.0), one, Bucket(1, 32)) == ([(one, 1)] * 3, 9, [], 0), "too short for a next"
    assert ways((3.0, 5.0, 7.0), Bucket(1, 32)) == ([], 0, [], 0)


def test_steps_go_where_it_was_measured_to_be_cheapest_and_the_text_is_the_same(odd_cache, odd_folder):
    """Three short rows, in one wide bucket or each alone."""
    options = {"cache_dir": odd_cache, "cached_only": True, "strategy": "recompute"}
    shapes, texts = [Bucket(1, 16), Bucket(1, 33), Bucket(1, 100), Bucket(3, 33)], []
    for times, ran in (([5.0, 6.0, 9.0, 6.0], Bucket(3, 33)), ([1.0, 2.0, 9.0, 60.0], Bucket(1, 16))):
        save_costs(choose(odd_folder, cache_dir=odd_cache), zip(shapes, times, strict=True))
        with Engine.load(odd_folder, **options) as engine:
            made = engine.generate([[1, 2], [3, 4, 5], [6]], max_new_tokens=3, seed=1)
            assert set(engine.report().buckets) == {ran}
        texts.append([each.token_ids for each in made])
        (calls,) = [e for e in explain(choose(odd_folder, cache_dir=odd_cache), shapes, 3, 3) if e.step == "recompute"]
        assert {bucket for bucket, _ in calls.calls} == {ran}
    assert texts[0] == texts[1]
