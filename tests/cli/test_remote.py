"""A fleet: one machine builds, all others fetch what they run, from a directory or an object store."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from service import BUCKET
from service import service as running_service

from nanogpt_buckets import builder

PLAN = ["--model=demo", "--strategy=recompute"]
GENERATE = ["generate", "ROMEO:", "--model=demo", "-n", "4", "--seed=1", "--json"]


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A machine that has nothing yet, and no compiler."""
    monkeypatch.setenv("NANOGPT_BUCKETS_CACHE_DIR", str(tmp_path / "home"))
    monkeypatch.setattr(builder, "compile_bucket", lambda *a: pytest.fail("compiled"))
    return tmp_path / "home"


def seq_lens(out: str) -> list[int]:
    return [row["seq_len"] for row in json.loads(out)["report"]["buckets"]]


def test_what_a_call_needs_is_fetched_and_kept(demo_cache, home, run):
    code, out, err = run(*GENERATE, "--strategy=recompute", "--remote", demo_cache)
    assert code == 0, err
    assert seq_lens(out) == [16]
    assert len(list(home.rglob("v1/entries/*/*.json"))) == 1, "what is not needed is not fetched"

    code, out, err = run(*GENERATE, "--strategy=recompute")
    assert (code, seq_lens(out)) == (0, [16]), err


def test_a_build_fetches_rather_than_compiles(demo_cache, home, run, monkeypatch):
    monkeypatch.setenv("NANOGPT_BUCKETS_REMOTE", str(demo_cache))

    code, out, err = run("build", *PLAN, "--seq=16,32", "--json")

    assert code == 0, err
    assert [row["state"] for row in json.loads(out)["buckets"]] == ["hit", "hit"]
    assert run("status", *PLAN, "--seq=16,32", "--remote-mode=off")[0] == 0


def test_cached_only_asks_no_remote_but_one_that_is_named(demo_cache, home, run, monkeypatch):
    monkeypatch.setenv("NANOGPT_BUCKETS_REMOTE", str(demo_cache))
    code, _, err = run(*GENERATE, "--cached-only")
    assert (code, "no bucket is built" in err) == (3, True)

    code, _, err = run(*GENERATE, "--cached-only", "--remote", demo_cache)
    assert code == 0, err


def test_status_says_what_is_here_and_changes_nothing(demo_cache, home, run):
    code, _, _ = run("status", *PLAN, "--seq=16", "--remote", demo_cache)

    assert code == 1
    assert not home.exists()


def test_a_remote_that_is_down_stops_nothing(cache, run, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "y")
    monkeypatch.setattr(builder, "compile_bucket", lambda *a: pytest.fail("compiled"))

    code, _, err = run("generate", "x" * 8, "--model=demo", "-n", "4", "--remote", "s3://nowhere/x", "--cached-only")

    assert code == 0, err


def test_ci_builds_and_pushes_and_a_clean_home_pulls_and_runs(cache, signing_key, run, tmp_path, monkeypatch):
    """The whole way, over HTTP: the policy is to require a signature, and nothing but what is locked is loaded."""
    lock, public = tmp_path / "buckets.lock", signing_key.with_suffix(".pub")
    with running_service() as service:
        for name, value in service.environment.items():
            monkeypatch.setenv(name, value)
        place = f"s3://{BUCKET}/team"
        assert run("build", *PLAN, "--seq=16,32", "--lock", lock, "--sign-key", signing_key)[0] == 0
        assert run("cache", "push", place, "--locked", lock)[0] == 0

        monkeypatch.setenv("NANOGPT_BUCKETS_CACHE_DIR", str(tmp_path / "home"))
        monkeypatch.setenv("NANOGPT_BUCKETS_TRUSTED", str(public))
        monkeypatch.setenv("NANOGPT_BUCKETS_POLICY", "require")
        monkeypatch.setattr(builder, "compile_bucket", lambda *a: pytest.fail("compiled"))
        strict = ["--locked", lock, "--cached-only"]
        code, _, err = run(*GENERATE, *strict)
        assert (code, "nanogpt-buckets cache pull SOURCE" in err) == (3, True)
        assert run("cache", "pull", place, "--locked", lock)[0] == 0
        service.asked.clear()
        code, out, err = run(*GENERATE, *strict)
        assert (code, seq_lens(out)) == (0, [16]), err
        assert service.asked == []

        monkeypatch.setenv("NANOGPT_BUCKETS_CACHE_DIR", str(tmp_path / "other"))
        code, out, err = run(*GENERATE, *strict, "--remote", place)
        assert (code, seq_lens(out)) == (0, [16]), err
        assert len(service.asked) == 2 + len(list((tmp_path / "other").rglob("v1/blobs/*/*"))), service.asked
