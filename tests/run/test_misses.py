"""What a call may run, with a fake backend: promotion, building first, and what runs where nothing can be built."""

from __future__ import annotations

import logging
import re
from dataclasses import replace

import pytest
from fake import choice_of, compiled, damage, publish

from nanogpt_buckets import builder as building
from nanogpt_buckets import key
from nanogpt_buckets.backends.base import BuildRequest
from nanogpt_buckets.built import BuildReport, BuildRow
from nanogpt_buckets.choice import default_plan, remember_plan
from nanogpt_buckets.errors import (
    BackendUnavailable,
    CacheError,
    CacheMiss,
    CompileFailed,
    CorruptEntry,
    GateFailed,
    PlanError,
    TransientError,
    UntrustedStore,
    UsageError,
)
from nanogpt_buckets.node import failures
from nanogpt_buckets.plan.bucket import Bucket, Plan
from nanogpt_buckets.run import misses
from nanogpt_buckets.run.dispatch import reach
from nanogpt_buckets.run.loader import Compiled, Uncompiled
from nanogpt_buckets.run.misses import Buckets
from nanogpt_buckets.run.report import Report
from nanogpt_buckets.store.plans import Plans
from nanogpt_buckets.store.store import Store

B8, B16, B32, B100 = (Bucket(1, n) for n in (8, 16, 32, 100))


@pytest.fixture
def choice(odd_folder, tmp_path):
    return choice_of(odd_folder, tmp_path / "store")


@pytest.fixture
def report():
    return Report("fake", "odd")


@pytest.fixture
def buckets(choice, report):
    def buckets(plan=None, *, built=(), on_miss="promote"):
        for bucket in built:
            publish(choice, bucket)
        return Buckets(Compiled(choice), plan, report, on_miss, None)

    return buckets


@pytest.fixture
def builder(choice, monkeypatch):
    """Stands where `build_missing` is: publishes at once, or raises what it was told to; keeps what it was asked."""
    asked, failing = [], []

    def build_missing(choice, plan, **_):
        asked.append(sorted(plan))
        if failing:
            raise failing[0]
        rows = [BuildRow(bucket, "compiled", publish(choice, bucket).key) for bucket in plan]
        return BuildReport(choice.model.name, "fake", choice.build_target, choice.store.root, tuple(rows))

    monkeypatch.setattr(misses, "build_missing", build_missing)
    build_missing.asked, build_missing.failing = asked, failing
    return build_missing


# --- promote ----------------------------------------------------------------------------------------------------------


def test_without_a_plan_whatever_is_built_runs(buckets):
    assert buckets(built=[B8, B32]).cover([(5, 15)])[1] == [B8, B32]


def test_only_what_a_call_uses_is_loaded(buckets, choice, report):
    buckets(built=[B8, B32]).cover([(9, 12)])

    assert (choice.backend.opened, report.hits) == (["code"], 1)


def test_a_planned_bucket_that_is_not_built_is_promoted_counted_and_said_once(buckets, report, caplog):
    one = buckets([B8, B32], built=[B32])

    assert one.cover([(5, 5)])[1] == [B32]
    assert one.cover([(6, 6)])[1] == [B32]
    assert report.promotions == 2
    assert len([r for r in caplog.records if "1x8 is not built" in r.message]) == 1


def test_a_damaged_bucket_is_promoted_and_said_to_be_damaged(buckets, choice, report, caplog):
    publish(choice, B32)
    damage(choice, publish(choice, B8, "other"))

    assert buckets([B8, B32]).cover([(5, 5)])[1] == [B32]
    assert "1x8 is damaged" in caplog.text
    assert report.replaced[B8].startswith("damaged: ")


def test_a_bucket_that_failed_its_gate_is_promoted_and_the_report_says_why(buckets, choice, report, caplog):
    failures.remember(key.digest(choice.key_parts(B8)), GateFailed("1x8 computes something else"))

    assert buckets([B8, B32], built=[B32]).cover([(5, 5)])[1] == [B32]

    (row,) = report.to_json()["replaced"]
    assert row.items() >= B8.to_json().items()
    assert row["why"].startswith("not built: 1x8 computes something else (0 min ago")
    assert row["why"] in caplog.text
    with pytest.raises(CacheMiss, match="1x8 computes something else"):
        buckets([B8], built=[])


def test_where_hits_came_from_and_why_others_were_missed_is_counted_once(choice, report, tmp_path):
    """A layer has one, the cache another, damaged, and the third is nowhere."""
    layer = replace(choice, store=Store(tmp_path / "layer"))
    publish(layer, B16, "other code")
    damage(choice, publish(choice, B8))
    both = replace(choice, store=Store(choice.store.root, layers=[layer.store.root]))
    buckets = Buckets(Compiled(both), [B8, B16, B32], report, "promote", None)

    for length in (6, 6, 14):
        buckets.cover([(length, length + 1)])

    assert (report.hits, report.tiers, report.misses) == (1, {"layer": 1}, {"corrupt": 1})
    with pytest.raises(CacheMiss):
        buckets.cover([(30, 31)])
    assert report.misses == {"corrupt": 1, "missing": 1}
    assert report.saved_s == 0, "nothing says how long compiling it took"


@pytest.mark.parametrize(("plan", "built"), [([B8], []), (None, []), ([B8], [B32])])
def test_nothing_of_a_plan_is_a_miss_at_once(buckets, plan, built):
    with pytest.raises(CacheMiss, match="no bucket") as error:
        buckets(plan, built=built)

    assert "nanogpt-buckets build" in error.value.hint


def test_what_reaches_no_further_is_a_miss_before_the_first_step(buckets):
    with pytest.raises(CacheMiss, match="holds 20 tokens"):
        buckets(built=[B8, B16]).cover([(5, 20)])


def test_rows_longer_than_the_model_are_cropped_and_need_no_more_than_its_length(buckets):
    assert buckets(built=[B8, B100]).cover([(5, 5 + 10**30)])[1] == [B8, B100]


def test_a_saved_plan_that_does_not_reach_gives_way_to_whatever_is_built(buckets, choice):
    remember_plan(choice, Plan([B8]))

    assert buckets(built=[B8, B32]).cover([(20, 25)])[1] == [B32]


def test_a_plan_that_was_given_does_not(buckets):
    with pytest.raises(CacheMiss, match="holds 26 tokens"):
        buckets([B8], built=[B8, B32]).cover([(20, 26)])


def test_a_damaged_saved_plan_stops_nothing(buckets, choice, caplog):
    remember_plan(choice, Plan([B8]))
    (path,) = (choice.store.root / "v1" / "plans").iterdir()
    path.write_text("{")

    assert buckets(built=[B8]).cover([(5, 5)])[1] == [B8]
    assert "is not plain JSON" in caplog.text


def test_one_reason_that_passes_is_not_final(buckets, choice):
    one = buckets(built=[B8])
    choice.backend.full = True
    with pytest.raises(TransientError, match="full"):
        one.cover([(5, 5)])
    choice.backend.full = False

    assert one.cover([(5, 5)])[1] == [B8]


# --- build ------------------------------------------------------------------------------------------------------------


def test_a_call_builds_what_it_uses_of_the_plan_and_no_more(buckets, builder, report):
    one = buckets([B8, B16, B32, B100], on_miss="build")

    assert one.cover([(5, 14)])[1] == [B8, B16]
    assert builder.asked == [[B8, B16]]
    assert (report.compiled, report.hits) == (2, 0)


def test_a_call_beyond_the_plan_builds_a_rung_that_reaches_and_the_plan_remembers_it(buckets, builder, choice):
    remember_plan(choice, Plan([B8]))
    one = buckets(built=[B8], on_miss="build")

    one.cover([(20, 25)])

    (asked,) = builder.asked
    assert [bucket.holds(1, 25) for bucket in asked] == [True]
    assert set(default_plan(choice)) == {B8, *asked}


FAILURES = {
    "no compiler": BackendUnavailable("there is no compiler"),
    "one that fails": CompileFailed("g++ ended with 1"),
    "a read-only cache": CacheError("read-only file system"),
    "an untrusted cache": UntrustedStore("others can write it"),
}


@pytest.mark.parametrize("error", FAILURES.values(), ids=FAILURES)
def test_where_nothing_can_be_built_what_is_built_and_fits_runs(buckets, builder, error, caplog):
    builder.failing.append(error)

    assert buckets([B8, B32], built=[B32], on_miss="build").cover([(5, 5)])[1] == [B32]
    assert error.message in caplog.text


@pytest.mark.parametrize("error", FAILURES.values(), ids=FAILURES)
def test_where_nothing_can_be_built_and_nothing_fits_the_reason_is_raised(buckets, builder, error):
    builder.failing.append(error)

    with pytest.raises(type(error), match=re.escape(error.message)):
        buckets([B8, B32], built=[B8], on_miss="build").cover([(20, 20)])


def test_what_turns_out_damaged_is_built_again(buckets, builder, choice):
    damage(choice, publish(choice, B8, "other"))
    one = buckets([B8], on_miss="build")
    path = choice.store.entry_path(one._compiled.selection.usable[B8][0])
    path.unlink()  # as the real builder's publish replaces what is damaged

    assert one.cover([(5, 5)])[1] == [B8]
    assert builder.asked == [[B8]]


@pytest.mark.parametrize("error", [TransientError("no space left"), CacheError("read-only"), UntrustedStore("open")])
def test_what_was_compiled_and_cannot_be_kept_runs_all_the_same_and_that_is_said_once(
    buckets, choice, report, monkeypatch, caplog, error
):
    asked = []

    def compile_bucket(request, on_event):
        asked.append(BuildRequest.from_json(request).bucket)
        return compiled(choice, asked[-1])

    def refuse(*arguments, **options):
        raise error

    monkeypatch.setattr(building, "compile_bucket", compile_bucket)
    monkeypatch.setattr(Store, "publish", refuse)
    monkeypatch.setattr(Plans, "change", refuse)
    one = buckets([B8, B16], on_miss="build")

    for until in (14, 14, 25, 25):
        assert reach(one.cover([(5, until)])[1], {"recompute": until})
    assert len(asked) == len(set(asked)) == 3, "each once"
    assert (report.compiled, report.hits, report.promotions) == (3, 0, 0)
    assert choice.backend.opened == ["code"] * 3
    said = [record.message for record in caplog.records if error.message in record.message]
    assert said == [f"{error.message}; what is compiled runs all the same, this time"]


# --- both -------------------------------------------------------------------------------------------------------------


def test_uncompiled_every_bucket_is_at_hand_and_none_is_a_hit(choice, report):
    one = Buckets(Uncompiled(choice), None, report, "promote", None)

    assert one.cover([(5, 8)])
    assert (report.hits, report.promotions) == (0, 0)


def test_what_cannot_be_is_refused_at_once(buckets):
    with pytest.raises(UsageError, match="on_miss"):
        buckets(on_miss="guess")
    with pytest.raises(PlanError, match="block_size"):
        buckets([Bucket(1, 101)], on_miss="build")


def test_a_closed_engines_buckets_are_gone(buckets, choice):
    one = buckets(built=[B8])
    one.load_all()
    one.close()

    with pytest.raises(KeyError):
        one.executable(B8)
    assert choice.backend.closed == ["code"]


def test_every_bucket_that_failed_to_load_fails_the_engine(buckets, choice):
    damage(choice, publish(choice, B8))

    with pytest.raises(CorruptEntry):
        buckets().load_all()


@pytest.fixture(autouse=True)
def _heard(caplog):
    caplog.set_level(logging.INFO)
