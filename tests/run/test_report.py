"""The counters of a run: what was padding, what was host work."""

from __future__ import annotations

import json

import pytest

from nanogpt_buckets import Bucket, Report


def test_padding_steps_and_overhead_add_up():
    report = Report("eager", "demo", new_tokens=3, seconds=2.0)
    report.count_step(Bucket(2, 8), [3, 8], 0.5)
    report.count_step(Bucket(1, 4), [4], 0.25)
    report.count_step(Bucket(1, 4), [2], 0.25)

    assert (report.steps, report.switches) == (3, 1)
    assert (report.real_tokens, report.padded_tokens) == (17, 7)
    assert report.waste == 7 / 24
    assert report.overhead_s == (2.0 - 1.0) / 3
    assert report.tokens_per_s == 1.5


@pytest.mark.parametrize(
    ("spans", "overlap"),
    [
        ([], 0.0),
        ([(0.0, 1.0), (1.0, 2.0)], 0.0),
        ([(0.0, 2.0), (1.0, 3.0)], 1.0),
        ([(1.0, 2.0), (0.0, 4.0), (3.0, 5.0)], 2.0),
        ([(0.0, 1.0), (0.0, 1.0), (0.0, 1.0)], 2.0),
    ],
)
def test_what_ran_at_the_same_time_on_several_cores_is_no_host_work(spans, overlap):
    report = Report("neuron", "demo", seconds=6.0)
    report.count_overlap(spans)
    for start, end in spans:
        report.count_step(Bucket(1, 4), [1], end - start)

    assert report.overlap_s == overlap
    busy = sum(end - start for start, end in spans) - overlap
    assert report.overhead_s == ((6.0 - busy) / len(spans) if spans else 0.0)


def test_a_report_of_nothing_divides_by_nothing():
    report = Report("eager", "demo")

    assert (report.waste, report.overhead_s, report.tokens_per_s) == (0.0, 0.0, 0.0)


def test_json_holds_every_bucket_and_is_plain():
    report = Report("eager", "demo", new_tokens=1, seconds=1.0, seed=7)
    report.count_step(Bucket(1, 4), [4], 0.25)

    document = json.loads(json.dumps(report.to_json()))

    assert document["buckets"] == [
        {
            "step": "recompute",
            "batch_size": 1,
            "seq_len": 4,
            "positions": 4,
            "steps": 1,
            "rows": 1,
            "real_tokens": 4,
            "seconds": 0.25,
            "p50_ms": pytest.approx(250, rel=0.06),
            "p95_ms": pytest.approx(250, rel=0.06),
        }
    ]
    assert document["seed"] == 7


def test_times_are_told_by_percentiles():
    report = Report("eager", "demo")
    for ms in [*range(1, 96), *[1000] * 5]:
        report.count_step(Bucket(1, 4), [4], ms / 1000)

    (row,) = report.to_json()["buckets"]
    assert row["p50_ms"] == pytest.approx(50, rel=0.06)
    assert row["p95_ms"] == pytest.approx(95, rel=0.06)
    assert report.buckets[Bucket(1, 4)].percentile_ms(1) == pytest.approx(1000, rel=0.06)
