"""The best ladder is the best: of all where few are possible, and beside the usual ones where many are."""

import itertools
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt_buckets.plan.planner import (
    Planner,
    best_ladders,
    percentiles,
    powers_of_two,
    priced,
    rung_of,
    unpadded,
    waste,
)
from nanogpt_buckets.plan.traffic import WORKLOADS, Demand, demand, workload

STEP = "recompute"


def linear(step, length):
    return 1.0 + length


def brute(weights, costs, lengths, rungs):
    """The least cost of all ladders of so many rungs that end with the last length."""
    price = dict(zip(lengths, costs, strict=True))
    *below, last = lengths
    ladders = [(*some, last) for some in itertools.combinations(below, rungs - 1)]
    return min(sum(w * price[rung_of(n, ladder)] for n, w in enumerate(weights) if w) for ladder in ladders)


@given(st.data())
def test_no_ladder_is_cheaper(data):
    M = data.draw(st.integers(1, 8))
    weights = [0, *data.draw(st.lists(st.integers(0, 9), min_size=M, max_size=M).filter(any))]
    costs = sorted(data.draw(st.lists(st.integers(1, 50), min_size=M, max_size=M)))
    lengths = list(range(1, M + 1))

    found = best_ladders(weights, costs, lengths)

    price = dict(zip(lengths, costs, strict=True))
    for rungs, ladder in enumerate(found, 1):
        assert len(ladder) == rungs
        cost = sum(w * price[rung_of(n, ladder)] for n, w in enumerate(weights) if w)
        assert cost == brute(weights, costs, lengths, rungs)
    least = brute(weights, costs, lengths, len(found))
    assert all(brute(weights, costs, lengths, rungs) >= least for rungs in range(1, M + 1)), "more would have saved"


@given(st.data())
@settings(max_examples=50)
def test_what_every_plan_keeps(data):
    M = data.draw(st.integers(1, 100))
    asked = {
        step: [0.0, *data.draw(st.lists(st.integers(0, 5), min_size=M, max_size=M).filter(any))]
        for step in data.draw(st.sampled_from([(STEP,), ("prefill", "decode")]))
    }
    apart = data.draw(st.integers(1, 16))
    lengths = [*range(apart, M, apart), M]
    planner = Planner(Demand(asked), linear, lengths)
    plans = list(planner.plans(smooth=False))

    for size, planned in enumerate(plans, len(asked)):
        assert planned.buckets == size
        assert planned.ratio >= 1
        assert 0 <= planned.waste < 1
        for ladder in planned.ladders.values():
            assert ladder[-1] == M
            assert list(ladder) == sorted({*ladder})
            assert {*ladder} <= {*lengths}
            assert all(rung_of(n, ladder) == min(r for r in ladder if r >= n) for n in range(1, M + 1))
        if len(asked) == 1 and apart == 1:
            usual = [powers_of_two(M, size), tuple(range(M - size + 1, M + 1)), percentiles(asked[STEP], M)]
            for ladder in usual:
                assert len(ladder) > size or planned.cost <= planner.of({STEP: ladder}).cost + 1e-9
    savings = [a.cost - b.cost for a, b in itertools.pairwise(plans)]
    assert all(saving > -1e-9 for saving in savings)
    assert all(later <= saving + 1e-6 for saving, later in itertools.pairwise(savings)), "convex in the number of rungs"


def test_rungs_are_dealt_out_between_steps_as_one_search_over_both_would():
    few, many = [0.0] + [1.0] * 12, [0.0] + [5.0] * 6 + [1.0] * 6
    planner = Planner(Demand({"prefill": few, "decode": many}), linear, range(1, 13))
    costs = [linear("", n) for n in range(1, 13)]
    for planned in planner.plans(smooth=False):
        least = min(
            brute(few, costs, range(1, 13), k) + brute(many, costs, range(1, 13), planned.buckets - k)
            for k in range(max(1, planned.buckets - 12), min(12, planned.buckets - 1) + 1)
        )
        assert planned.cost == pytest.approx(least)


def test_a_cost_that_falls_with_length_puts_rungs_where_it_is_low():
    """A longer bucket that is cheaper runs what a shorter one could."""
    asked = Demand({STEP: [0.0] + [1.0] * 8})
    cost = {1: 1, 2: 9, 3: 9, 4: 2, 5: 9, 6: 9, 7: 9, 8: 3}
    planner = Planner(asked, lambda step, n: float(cost[n]), range(1, 9))

    assert planner.cost(STEP, 2) == 2
    (last,) = [p for p in planner.plans(smooth=False) if p.buckets == 3]
    assert last.cost == 1 + 3 * 2 + 4 * 3


def test_totals_are_sums_over_steps():
    asked = Demand({"prefill": [0, 1, 0, 2], "decode": [0, 0, 4, 1]})
    ladders = {"prefill": (1, 3), "decode": (3,)}

    assert priced(asked, ladders, linear) == 1 * 2 + 2 * 4 + 5 * 4
    assert unpadded(asked, linear) == 1 * 2 + 2 * 4 + 4 * 3 + 1 * 4
    assert waste(asked, ladders) == 1 - (1 + 6 + 8 + 3) / (1 + 6 + 15)


@pytest.mark.parametrize("kind", WORKLOADS)
def test_as_cheap_as_any_usual_ladder_of_as_many_rungs(kind):
    asked = demand(workload(kind, 1024), 1024, STEP)
    planner = Planner(asked, linear, [*range(8, 1024, 8), 1024])
    plans = {p.buckets: p for p in planner.plans()}

    for rungs in (4, 5, 7):
        assert plans[rungs].cost <= planner.of({STEP: powers_of_two(1024, rungs)}).cost
    usual = percentiles(asked.weights[STEP], 1024)
    assert plans[len(usual)].cost <= planner.of({STEP: usual}).cost


def test_a_million_steps_are_planned_at_once():
    requests = workload("chat", 1024) * 2
    start = time.process_time()
    asked = demand(requests, 1024, STEP)
    plans = list(Planner(asked, linear, [*range(8, 1024, 8), 1024]).plans())
    assert asked.steps > 1_000_000
    assert len(plans) == 24
    print(f"{time.process_time() - start:.2f} s")  # told, not asserted: see scripts/bench_plan
