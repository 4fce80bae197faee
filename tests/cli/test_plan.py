"""`nanogpt-buckets plan`, and what `build` and `status` make of what it saves."""

from __future__ import annotations

import json

import pytest

from nanogpt_buckets import Bucket, Plan


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


CHAT = ("plan", "--workload", "chat", "--model", "demo")


def planned(run, *arguments):
    code, out, err = run(*arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def test_a_plan_for_a_workload_is_cheaper_than_usual_ladders_and_can_be_saved(run, place):
    found = planned(run, *CHAT, "--strategy", "recompute", "--max-buckets", "5", "--save", "plan.json")

    assert found["bound"] == "max-buckets"
    (ladder,) = found["ladders"].values()
    assert ladder == sorted(ladder)
    assert (len(ladder), ladder[-1]) == (5, 256)
    assert 1 < found["cost"] <= min(other["cost"] for other in found["baselines"].values())
    assert found["baselines"]["powers of two"]["rungs"] == sum(map(len, found["ladders"].values()))
    assert found["held_out"] == pytest.approx(found["cost"], rel=0.03)
    assert [row["buckets"] for row in found["knee"]] == list(range(1, len(found["knee"]) + 1))
    saved = json.loads((place / "plan.json").read_text())
    assert saved["buckets"] == found["buckets"]
    assert saved["source"] == "plan workload chat"
    assert Plan.from_json(saved) == Plan.grid(seq=ladder)
    code, out, _ = run("status", "--model", "demo", "--plan", "plan.json", "--json")
    assert code == 1
    assert [row["bucket"] for row in json.loads(out)["buckets"]] == saved["buckets"]


def test_a_plan_that_remembers_has_rungs_for_each_step_and_recomputes_past_the_end(run):
    found = planned(run, *CHAT, "--max-buckets", "6")

    assert set(found["ladders"]) == {"prefill", "decode", "recompute"}
    assert len(found["buckets"]) == 6
    assert {"step": "recompute", "batch_size": 1, "seq_len": 256} in found["buckets"]


def test_every_rung_is_planned_for_every_batch_size(run):
    found = planned(run, *CHAT, "--strategy", "recompute", "--max-buckets", "6", "--batch", "1,4")
    (ladder,) = found["ladders"].values()
    assert {(b["batch_size"], b["seq_len"]) for b in found["buckets"]} == {(B, n) for B in (1, 4) for n in ladder}
    assert len(ladder) == 3


def test_a_plan_for_a_longer_model_ends_where_a_shorter_one_does(run, place):
    planned(run, "plan", "--workload", "chat", "--max-buckets", "5", "--save", "plan.json")

    code, out, err = run("status", "--model", "demo", "--plan", "plan.json", "--json")
    assert code == 1
    assert "256 takes their place" in err
    assert max(row["bucket"]["seq_len"] for row in json.loads(out)["buckets"]) == 256


@pytest.mark.parametrize(
    ("limits", "bound", "check"),
    [
        ((), "a further bucket saves less than 2%", lambda found: found["cost"] < 1.3),
        (("--max-waste", "20%"), "max-waste", lambda found: found["waste"] <= 0.2),
        (("--max-waste", "0.2"), "max-waste", lambda found: found["waste"] <= 0.2),
        (("--max-compile-seconds", "50"), "max-compile-seconds", lambda found: found["compile_s"] <= 50),
        (("--max-waste", "10%", "--max-buckets", "3"), "max-buckets", lambda found: len(found["buckets"]) == 3),
    ],
)
def test_what_decided_the_size_is_said(run, limits, bound, check):
    found = planned(run, *CHAT, "--strategy", "recompute", *limits)
    assert found["bound"] == bound
    assert check(found)


def test_device_memory_bounds_plans_whose_buckets_hold_weights(run):
    options = ("--strategy", "recompute", "--target", "trn1", "--model", "gpt2")
    found = planned(run, "plan", "--workload", "chat", *options, "--max-device-gb", "1.6")

    assert found["bound"] == "max-device-gb"
    assert len(found["buckets"]) == 3, "each has half a gigabyte of weights"
    assert all(b["seq_len"] % 64 == 0 for b in found["buckets"])
    assert any("nothing here was measured" in line for line in found["assumptions"])


def test_planning_fetches_no_weights(run, monkeypatch):
    monkeypatch.setattr("nanogpt_buckets.model.checkpoint.Model.weights", None)
    for target in ((), ("--target", "trn1")):
        assert planned(run, *CHAT, "--strategy", "recompute", *target)["buckets"]


def test_requests_of_a_file(run, place):
    (place / "r.jsonl").write_text(
        '{"prompt": "ROMEO:", "generated_tokens": 3}\n{"prompt_tokens": 300, "generated_tokens": 2}\n'
    )
    found = planned(run, "plan", "--lengths", "r.jsonl", "--model", "demo", "--strategy", "recompute")

    assert (found["requests"], found["steps"], found["crops"]) == (2, 5, 2)
    assert found["source"] == "plan r.jsonl"


def test_it_reads_as_a_table_and_says_what_it_rests_on(run):
    code, out, err = run(*CHAT, "--max-buckets", "99")
    assert code == 0
    assert "LADDER" in out
    assert "; held-out requests " in out
    assert "GFLOP/s" in err
    assert "are of use" in err


@pytest.mark.parametrize("name", ["plan.png", "plan.svg"])
def test_a_plot_is_drawn(run, place, name):
    code, _, err = run(*CHAT, "--plot", name)
    assert code == 0, err
    head = (place / name).read_bytes()[:200]
    assert head.startswith(b"\x89PNG") or b"<?xml" in head


def test_a_step_is_explained(run):
    code, out, err = run("plan", "--model", "demo", "--explain", "129", "--json")
    assert code == 0, err
    rows = {row["step"]: row for row in json.loads(out)}
    decode = rows["decode"]
    assert decode["calls"] == [{"bucket": Bucket(1, 256, "decode").to_json(), "rows": 1}]
    assert decode["padded_tokens"] == 127
    code, out, err = run("plan", "--model", "demo", "--explain", "30", "--batch", "3", "--strategy", "recompute")
    assert code == 0
    assert "1x64" in out
    assert "nothing is planned yet" in err


def test_a_step_that_no_bucket_holds_is_said_to_have_none(run, cache):
    code, out, err = run("plan", "--model", "demo", "--explain", "129")
    assert code == 0, err
    assert "no recompute bucket holds 129 tokens: nanogpt-buckets build --model demo" in err
    assert "ms" not in out
    (row,) = json.loads(run("plan", "--model", "demo", "--explain", "129", "--json")[1])
    assert row["calls"] == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "say which requests come"),
        (("--workload", "chat", "--lengths", "x"), "say which requests come"),
        (("--lengths", "none.jsonl"), "cannot be read"),
        (("--workload", "chat", "--max-buckets", "0"), "0 buckets runs nothing"),
        (("--workload", "chat", "--max-buckets", "1"), "the smallest plan takes 3 buckets"),
        (("--workload", "chat", "--max-waste", "2"), "from 0 to 1"),
        (("--workload", "chat", "--max-waste", "0"), "the least is"),
        (("--workload", "chat", "--max-compile-seconds", "1"), "--max-compile-seconds allows 1 s"),
        (("--workload", "chat", "--max-compile-seconds", "-1"), "more than nothing"),
        (("--workload", "chat", "--max-compile-seconds", "nan"), "more than nothing"),
        (("--workload", "chat", "--max-device-gb", "0.0001"), "--max-device-gb allows"),
        (("--workload", "chat", "--plot", "a.odd"), "no kind of plot"),
        (("--workload", "chat", "--plot", "none/a.png"), "cannot be written"),
        (("--workload", "chat", "--save", "none/a.json"), "cannot be written"),
        (("--workload", "chat", "--backend", "eager"), "compiles nothing"),
    ],
)
def test_bad_input_is_one_sentence(run, place, arguments, said):
    code, out, err = run("plan", "--model", "demo", *arguments)
    assert code == 2, err
    assert out == ""
    assert said in err
    assert err.startswith("error: ")
    assert "Traceback" not in err
