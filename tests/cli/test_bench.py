"""`bench` and `report` on the command line, on the demo's two compiled buckets."""

from __future__ import annotations

import json

import pytest

from nanogpt_buckets.cli import main


@pytest.fixture
def run(demo_cache, capsys, monkeypatch):
    monkeypatch.setenv("NANOGPT_BUCKETS_CACHE_DIR", str(demo_cache))

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main(list(arguments))
        return (end.value.code, *capsys.readouterr())

    return run


def test_bench_measures_every_built_bucket_against_the_eager_model(run):
    code, out, _ = run("bench", "--model", "demo", "--runs", "3", "--json")
    document = json.loads(out)

    assert (code, document["model"], document["runs"]) == (0, "demo", 3)
    assert [row["bucket"]["seq_len"] for row in document["buckets"]] == [16, 32]
    for row in document["buckets"]:
        for name in ("load_ms", "step_ms", "eager_ms"):
            assert 0 < row[name]["min"] <= row[name]["median"] <= row[name]["max"]
        assert row["speed_up"] == row["eager_ms"]["median"] / row["step_ms"]["median"]
        assert row["tokens_per_s"] == 1000 / row["step_ms"]["median"]
        # float32 rounding, and not one and the same program
        assert 0 < row["mean_difference"] < row["max_difference"] < 1e-3
        assert row["bytes"] > 100_000


def test_bench_shows_people_a_table(run):
    code, out, err = run("bench", "--model", "demo", "--strategy=recompute", "--seq", "16", "--runs", "1")

    assert (code, err) == (0, "")
    assert out.splitlines()[0].split()[:4] == ["BUCKET", "SIZE", "LOAD", "STEP"]
    assert out.splitlines()[1].startswith("1x16")


def test_bench_of_what_is_not_built_is_a_miss_with_the_command_that_builds_it(run, monkeypatch, tmp_path):
    code, out, err = run("bench", "--model", "demo", "--strategy=recompute", "--seq", "16,64")
    assert (code, out) == (3, "")
    assert "bucket 1x64 is not built for model demo" in err
    assert err.endswith("hint: nanogpt-buckets build --model demo --seq 64 --strategy recompute\n")

    monkeypatch.setenv("NANOGPT_BUCKETS_CACHE_DIR", str(tmp_path / "empty"))
    code, out, err = run("bench", "--model", "demo")
    assert (code, out) == (3, "")
    assert err.endswith("hint: nanogpt-buckets build --model demo\n")


def test_bench_says_which_bucket_of_the_plan_it_left_out(run, demo_cache, tmp_path, monkeypatch):
    import shutil

    cache = tmp_path / "copy"
    shutil.copytree(demo_cache, cache)
    monkeypatch.setenv("NANOGPT_BUCKETS_CACHE_DIR", str(cache))
    row = next(row for row in json.loads(run("cache", "ls", "--json")[1]) if row["bucket"] == "1x16")
    next(cache.glob(f"v1/entries/*/{row['key']}.json")).unlink()

    code, out, err = run("bench", "--model", "demo", "--runs", "1", "--json")

    assert [row["bucket"]["seq_len"] for row in json.loads(out)["buckets"]] == [32]
    assert (code, err) == (0, "bucket 1x16 is in the plan and not built\n")


def test_bench_of_damaged_buckets_is_damage(run, demo_cache, tmp_path, monkeypatch):
    import shutil

    cache = tmp_path / "copy"
    shutil.copytree(demo_cache, cache)
    for blob in (cache / "v1" / "blobs").glob("*/*"):
        blob.unlink()
    monkeypatch.setenv("NANOGPT_BUCKETS_CACHE_DIR", str(cache))

    code, out, err = run("bench", "--model", "demo", "--runs", "1")

    assert (code, out) == (4, "")
    assert "missing" in err


def test_the_eager_backend_has_nothing_to_bench(run):
    code, _, err = run("bench", "--model", "demo", "--backend", "eager")

    assert code == 2
    assert "compiles nothing" in err


def test_report_tells_what_the_last_generate_did(run):
    code, _, err = run("report")
    assert code == 1
    assert "no run has been recorded" in err

    assert run("generate", "ROMEO:", "--model", "demo", "-n", "20", "--seed", "1", "-q")[0] == 0
    code, out, err = run("report")
    document = json.loads(run("report", "--json")[1])

    assert (code, document["hits"], document["new_tokens"], document["switches"]) == (0, 2, 20, 1)
    # contexts of 6 to 25 tokens: eleven steps in 16 places, nine in 32
    assert document["real_tokens"] == sum(range(6, 26))
    assert document["padded_tokens"] == 11 * 16 + 9 * 32 - sum(range(6, 26))
    lines = [line.split() for line in out.splitlines()]
    row = ["1x16", "11", "11", "of", "16", str(sum(range(6, 17))), str(11 * 16 - sum(range(6, 17)))]
    assert row in [line[:7] for line in lines]
    assert "2 that were built already, 0 compiled for this run" in out
    assert " s ago" in out
