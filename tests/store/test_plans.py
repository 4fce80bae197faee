"""Plans: nobody's buckets are lost, a newer release's file is left alone, a damaged one is named."""

from __future__ import annotations

import errno
import os
import time

import filelock
import pytest
from store_kit import finish, make, start

from nanogpt_buckets.errors import CorruptEntry, IncompatibleEntry, TransientError, UsageError
from nanogpt_buckets.plan.bucket import Bucket, Plan
from nanogpt_buckets.store.plans import Plans, SavedPlan, without
from nanogpt_buckets.store.verify import verify

FAMILY = "f" * 64
ONE = SavedPlan(Plan([Bucket(1, 8)]), frozenset({FAMILY}))
# Bytes that a released version has written. They must be readable for as long as format 1 is.
GOLDEN = (
    b'{"buckets":[{"batch_size":1,"seq_len":8,"step":"recompute"}],"families":["' + FAMILY.encode() + b'"],'
    b'"format":1,"model":"p","source":"build"}\n'
)
NEWER = {
    "format": GOLDEN.replace(b'"format":1', b'"format":2'),
    "another shape": b'{"format":2,"wanted":{"' + FAMILY.encode() + b'":{}}}',
    "field": GOLDEN.replace(b'"model"', b'"ladder":[1],"model"'),
    "field of a bucket": GOLDEN.replace(b'"step"', b'"slots":4,"step"'),
    "step": GOLDEN.replace(b"recompute", b"verify"),
}
DAMAGED = {
    "empty": b"",
    "list": b"[]",
    "cut": GOLDEN[:-20],
    "float": b'{"format":1.5}',
    "deep": b"[" * 100_000,
    "name twice": b'{"format":1,"format":1}',
    "long": b" " * 300_000,
    "no format": b'{"buckets":[]}',
    "no buckets": b'{"format":1}',
    "empty plan": b'{"format":1,"buckets":[]}',
    "bucket 0": GOLDEN.replace(b'"seq_len":8', b'"seq_len":0'),
    "bucket is a list": b'{"format":1,"buckets":[[1,8]]}',
    "step is a number": GOLDEN.replace(b'"recompute"', b"5"),
    "families no digests": GOLDEN.replace(b"ffff", b"x"),
    "families numbers": GOLDEN.replace(b'"' + FAMILY.encode() + b'"', b"5"),
    "escape sequence": GOLDEN.replace(b'"p"', b'"\\u001b[2J"'),
}


@pytest.fixture
def plans(store) -> Plans:
    return Plans(store)


@pytest.fixture
def path(store, plans):
    plans.change("p", lambda before: ONE)
    return store.root / "v1/plans/p.json"


def test_plans_are_saved_changed_listed_and_deleted(store, plans):
    assert plans.names() == []
    assert plans.load("gpt2") is None
    assert not store.root.exists()
    plans.change("gpt2", lambda before: ONE)
    plans.change("gpt2", lambda before: SavedPlan(before.buckets | [Bucket(3, 5)], before.families))
    plans.change("a-B_c.1", lambda before: ONE)
    (store.root / "v1/plans/.hidden.json").write_text("{}")
    (store.root / "v1/plans/notes.txt").write_text("x")
    assert plans.load("gpt2") == SavedPlan(Plan([Bucket(1, 8), Bucket(3, 5)]), frozenset({FAMILY}))
    assert plans.names() == ["a-B_c.1", "gpt2"]
    plans.change("gpt2", lambda before: without(before, [Bucket(1, 8)]))
    assert list(plans.load("gpt2").buckets) == [Bucket(3, 5)]
    plans.change("gpt2", lambda before: without(before, [Bucket(3, 5)]))
    assert plans.names() == ["a-B_c.1"]
    assert os.listdir(store.root / "v1/tmp") == []


def test_golden_bytes_are_still_written_and_read(plans, path):
    assert path.read_bytes() == GOLDEN
    path.write_bytes(GOLDEN)
    assert plans.load("p") == ONE


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "../x", "a b", "é", "a\n", "x" * 151])
def test_plan_names_are_plain_words(plans, name):
    with pytest.raises(UsageError):
        plans.change(name, lambda before: ONE)
    with pytest.raises(UsageError):
        plans.load(name)


@pytest.mark.parametrize("data", NEWER.values(), ids=NEWER)
def test_a_newer_releases_plan_is_named_left_alone_and_still_keeps_its_entries(store, plans, path, data):
    path.write_bytes(data)

    for call in (lambda: plans.load("p"), lambda: plans.change("p", lambda before: ONE)):
        with pytest.raises(IncompatibleEntry, match=r"plan p in .* newer release") as caught:
            call()
        assert caught.value.exit_code == 7
    assert path.read_bytes() == data
    pins = plans.pins()
    assert pins.keep(FAMILY, Bucket(1, 99))
    assert pins.keep(FAMILY, None)
    assert not pins.keep("e" * 64, Bucket(1, 8))
    assert "plan p" in pins.notes[0]
    assert "newer release" in pins.notes[0]
    assert verify(store).problems == ()


def test_a_newer_plan_that_names_no_family_keeps_everything(plans, path):
    path.write_bytes(b'{"format":9,"buckets":"compressed"}')
    assert plans.pins().keep("e" * 64, Bucket(1, 8))


@pytest.mark.parametrize("data", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_plan_is_named_keeps_nothing_and_is_replaced(store, plans, path, data):
    path.write_bytes(data)

    with pytest.raises(CorruptEntry, match="plan p in") as caught:
        plans.load("p")
    assert caught.value.message.isprintable()
    pins = plans.pins()
    assert not pins.keep(FAMILY, Bucket(1, 8))
    assert pins.notes[0].endswith("it keeps nothing")
    assert [problem.path for problem in verify(store).problems] == ["v1/plans/p.json"]
    seen = []
    plans.change("p", lambda before: seen.append(before) or ONE)
    assert seen == [None]
    assert plans.load("p") == ONE
    assert verify(store).problems == ()


def test_a_plan_that_could_not_be_read_back_is_not_saved(plans, path):
    with pytest.raises(UsageError, match="larger"):
        plans.change("p", lambda before: SavedPlan(Plan.grid(seq=range(1, 9000))))
    assert path.read_bytes() == GOLDEN


def test_a_plan_of_thousands_of_buckets_is_saved(plans):
    many = SavedPlan(Plan.grid(seq=range(1, 4001)), frozenset({FAMILY}))
    plans.change("p", lambda before: many)
    assert plans.load("p") == many


def test_a_plan_that_cannot_be_read_is_transient_and_keeps_everything(plans, path, monkeypatch):
    real = os.open

    def fail(name, *arguments, **options):
        if "p.json" in str(name):
            raise OSError(errno.EIO, "Input/output error")
        return real(name, *arguments, **options)

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(TransientError, match=r"p\.json cannot be read: Input/output error"):
        plans.load("p")
    with pytest.raises(TransientError):
        plans.change("p", lambda before: ONE)
    assert plans.pins().keep("e" * 64, Bucket(1, 8))


def test_what_does_not_change_is_not_written(plans, path):
    before = path.stat().st_ino
    plans.change("p", lambda before: ONE)
    plans.change("q", lambda before: before)
    assert path.stat().st_ino == before
    assert plans.names() == ["p"]


WRITE = """
import sys, time
from pathlib import Path
from nanogpt_buckets.plan.bucket import Bucket, Plan
from nanogpt_buckets.store.store import Store
from nanogpt_buckets.store.plans import Plans, SavedPlan
plans, batch = Plans(Store(Path(sys.argv[1]))), int(sys.argv[2])
time.sleep(max(0, float(sys.argv[3]) - time.time()))
for length in range(1, 21):
    def added(before):
        buckets = [*(before.buckets if before else []), Bucket(batch, length)]
        return SavedPlan(Plan(buckets), frozenset({f"{batch:064x}", *(before.families if before else [])}))
    plans.change("p", added)
"""


def test_processes_that_save_at_once_lose_no_bucket(store, plans):
    begin = time.time() + 0.7
    for writer in [start(WRITE, store.root, batch, begin) for batch in range(1, 5)]:
        finish(writer)

    saved = plans.load("p")
    assert set(saved.buckets) == {Bucket(batch, length) for batch in range(1, 5) for length in range(1, 21)}
    assert saved.families == {f"{batch:064x}" for batch in range(1, 5)}


def test_without_a_lock_what_another_wrote_over_ours_is_read_back_and_merged(store, plans, path, monkeypatch):
    def fail(*arguments, **options):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(filelock.FileLock, "acquire", fail)
    put, theirs = store.directory.put, [GOLDEN.replace(b'"seq_len":8', b'"seq_len":9')]

    def overwritten(*arguments, **options):
        done = put(*arguments, **options)
        if theirs:
            path.write_bytes(theirs.pop())
        return done

    monkeypatch.setattr(store.directory, "put", overwritten)
    plans.change("p", lambda before: SavedPlan(before.buckets | [Bucket(5, 5)], before.families))
    assert list(plans.load("p").buckets) == [Bucket(1, 9), Bucket(5, 5)]


def test_an_entry_of_another_family_is_not_kept(plans, path):
    manifest, _ = make("one")
    assert not plans.pins().keep(manifest.family, Bucket(1, 8))
    assert plans.pins().keep(FAMILY, Bucket(1, 8))
    assert plans.pins().buckets == {(FAMILY, Bucket(1, 8)): ["p"]}
