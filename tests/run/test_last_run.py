"""The counters of the last run survive the process, and never fail one."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from nanogpt_buckets import Bucket, Engine, Report, node
from nanogpt_buckets.errors import BucketsError
from nanogpt_buckets.run.report import load_last_run, save_last_run


def report(tokens: int = 1) -> Report:
    made = Report("eager", "demo", new_tokens=tokens, seconds=1.0, seed=7)
    made.count_step(Bucket(1, 4), [4], 0.25)
    return made


def test_what_was_saved_is_loaded_with_the_time_it_ended():
    save_last_run(report(1))
    save_last_run(report(2))

    run = load_last_run()

    assert run.items() >= report(2).to_json().items()
    assert abs(run["ended"] - time.time()) < 60
    assert sorted((path.name for path in node.directory().iterdir()), reverse=True) == [
        "last-run.json",
        ".last-run.lock",
    ]


def test_before_the_first_run_the_way_to_one_is_named():
    with pytest.raises(BucketsError, match="no run has been recorded") as error:
        load_last_run()

    assert "generate" in error.value.hint


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"ended": 1}', "[" * 100_000, '{"steps": NaN}'])
def test_a_damaged_file_is_said_in_one_sentence(content):
    save_last_run(report())
    (node.directory() / "last-run.json").write_text(content)

    with pytest.raises(BucketsError, match="cannot be read"):
        load_last_run()


def test_a_place_that_cannot_be_written_fails_no_run(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NANOGPT_BUCKETS_LOCAL_DIR", str(tmp_path / "file"))

    save_last_run(report())

    assert Path(tmp_path / "file").read_text() == ""


def test_an_engine_leaves_its_counters_when_it_is_closed_and_only_then(demo_cache):
    with Engine.load("demo", cache_dir=demo_cache) as engine:
        engine.generate("ROMEO:", max_new_tokens=12, seed=1)
        with pytest.raises(BucketsError):
            load_last_run()
        expected = engine.report().to_json()

    assert {name: value for name, value in load_last_run().items() if name not in ("ended", "all")} == json.loads(
        json.dumps(expected)
    )
    assert (expected["hits"], expected["compiled"], expected["steps"], expected["switches"]) == (2, 0, 12, 1)


def test_an_engine_that_ran_nothing_leaves_the_report_before(demo_cache):
    save_last_run(report())

    Engine.load("demo", cache_dir=demo_cache).close()

    assert load_last_run()["backend"] == "eager"


def test_runs_add_up():
    for n in range(3):
        made = report(n)
        made.count_hit("cache", 2.5)
        made.count_hit("remote", 1.0)
        made.count_miss("missing")
        save_last_run(made)

    run = load_last_run()
    assert (run["hits"], run["tiers"], run["misses"], run["saved_s"]) == (
        2,
        {"cache": 1, "remote": 1},
        {"missing": 1},
        3.5,
    )
    sums = run["all"]
    assert (sums["runs"], sums["hits"], sums["new_tokens"], sums["saved_s"]) == (3, 6, 3, 10.5)
    assert (sums["tiers"], sums["misses"]) == ({"cache": 3, "remote": 3}, {"missing": 3})
    assert sums["since"] <= run["ended"]


def test_runs_that_end_at_once_are_all_counted():
    """Each in a process of its own."""
    children = []
    for _ in range(8):
        if not (child := os.fork()):
            save_last_run(report())
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)

    assert load_last_run()["all"]["runs"] == 8
