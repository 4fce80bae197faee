"""Failed compilations are remembered here, for an hour, if they would happen again; nothing else is."""

from __future__ import annotations

import json
import time

import pytest

from nanogpt_buckets import node
from nanogpt_buckets.errors import BackendUnavailable, ChildFailed, CompileFailed, GateFailed, TransientError
from nanogpt_buckets.node import failures

KEY = "ab" * 32


def record() -> dict:
    return json.loads((node.directory() / "failures" / f"{KEY}.json").read_text())["record"]


@pytest.mark.parametrize("kind", [CompileFailed, GateFailed])
def test_what_lasts_is_recalled_with_its_age_until_it_is_forgotten(kind):
    assert failures.recall(KEY) is None
    failures.remember(KEY, kind("the compiler ended with 70"))

    assert failures.recall(KEY) == "the compiler ended with 70 (0 min ago on this machine)"
    assert record()["why"] == "the compiler ended with 70"
    assert failures.recall("cd" * 32) is None
    failures.forget(KEY)
    assert failures.recall(KEY) is None


@pytest.mark.parametrize("kind", [ChildFailed, TransientError, BackendUnavailable])
def test_what_may_pass_is_not_recorded(kind):
    failures.remember(KEY, kind("killed for want of memory"))

    assert not (node.directory() / "failures").exists()


@pytest.mark.parametrize("age_s", [3601, -60])
def test_a_record_expires_and_one_from_the_future_counts_for_nothing(monkeypatch, age_s):
    failures.remember(KEY, CompileFailed("why"))
    now = time.time()
    monkeypatch.setattr(failures.time, "time", lambda: now + age_s)

    assert failures.recall(KEY) is None


@pytest.mark.parametrize("content", ["", "[]", "{", '{"kind": "CompileFailed"}', '{"kind": 1, "why": 2, "when": "x"}'])
def test_a_damaged_record_counts_for_nothing(content):
    failures.remember(KEY, CompileFailed("why"))
    (node.directory() / "failures" / f"{KEY}.json").write_text(content)

    assert failures.recall(KEY) is None


def test_a_directory_that_cannot_be_written_fails_no_build(monkeypatch):
    monkeypatch.setenv("NANOGPT_BUCKETS_LOCAL_DIR", "/proc/nowhere")

    failures.remember(KEY, CompileFailed("why"))
    failures.forget(KEY)
    assert failures.recall(KEY) is None
