"""Remembering on a device: one copy of the weights, state that stays there, and buckets that hold neither."""

from __future__ import annotations

import pytest

from nanogpt_buckets import Bucket, Engine, Plan

KV = Plan([Bucket(2, 16, "chunk"), Bucket(2, 256, "chunk"), Bucket(2, 256)])
PROMPTS = [[1, 2, 3], [5] * 100, [7, 8]]


@pytest.fixture
def built(host):
    """The demo's chunk buckets, built on a device and checked there."""
    host("trn1.2xlarge")
    report = host.build(KV, strategy="kv")
    assert [row.why for row in report.rows] == [""] * 3
    return host


def texts(**options):
    with Engine.load("demo", cached_only=True, **options) as engine:
        return [made.token_ids for made in engine.generate(PROMPTS, max_new_tokens=12, seed=4)]


def test_what_is_built_holds_no_weights_and_serves_any(built):
    manifests = built.manifests(strategy="kv")
    assert [m.contains_weights for m in manifests] == [False] * 3
    assert {m.parts["family"]["weights"] for m in manifests} == {None}
    assert all(len(m.weights) == 27 and m.unchecked is None for m in manifests)
    assert max(m.size for m in manifests) < 500_000


def test_the_text_is_that_of_recomputing(built):
    assert texts(strategy="kv") == texts(backend="eager", strategy="recompute")
