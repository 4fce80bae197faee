"""Pruning beside publishing, at every step of either: whoever publishes has a whole entry in the end."""

from __future__ import annotations

import errno
import itertools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from store_kit import blob_path, files, look, make, manifest_path

from nanogpt_buckets import key as keys
from nanogpt_buckets.errors import CacheError
from nanogpt_buckets.files import sweep, time_in
from nanogpt_buckets.plan.bucket import Bucket
from nanogpt_buckets.store import prune
from nanogpt_buckets.store.directory import Directory
from nanogpt_buckets.store.entry import Verified
from nanogpt_buckets.store.prune import delete, plan_prune, plan_removal
from nanogpt_buckets.store.store import Store
from nanogpt_buckets.store.verify import verify

DAY = 86400
# What a process does to a directory, and how it lists it.
STEPS = ("rename", "replace", "link", "unlink", "mkdir", "utime", "listdir")


def old(store: Store, entry) -> None:
    for path in (manifest_path(store, entry), *(blob_path(store, blob) for blob in entry.blobs)):
        os.utime(path, (time.time() - 40 * DAY,) * 2)


def made(seq_len: int):
    """An entry of a bucket that this release knows; the blobs are the same for each."""
    manifest, content = make("one")
    parts = manifest.parts | {"bucket": Bucket(1, seq_len).to_json()}
    return replace(manifest, parts=parts, key=keys.digest(parts)), content


@pytest.fixture
def entry(store):
    store.publish(*made(8))
    return made(8)[0]


@pytest.fixture(params=["his own", "another user's"])
def blobs(request, monkeypatch):
    """Whose blobs are adopted: those of another user cannot be made young."""
    if request.param == "another user's":
        monkeypatch.setattr(Directory, "touch", lambda *arguments: None)


def interrupted(monkeypatch, number: int, work: Callable[[], object], other: Callable[[], object]) -> bool:
    """Do some work, and something else right before its step of this number; return whether it had that many."""
    count, busy = 0, False

    def stepping(real: Callable[..., object]) -> Callable[..., object]:
        def step(*arguments: object, **more: object) -> object:
            nonlocal count, busy
            if not busy:
                count += 1
                if count == number:
                    busy = True
                    other()
                    busy = False
            return real(*arguments, **more)

        return step

    with monkeypatch.context() as patch:
        for name in STEPS:
            patch.setattr(os, name, stepping(getattr(os, name)))
        work()
    return count >= number


def rounds(tmp_path: Path) -> Iterator[tuple[int, Store]]:
    """Yield numbers of steps, each with a store that has one entry, which a prune takes with its blobs."""
    for number in itertools.count(1):
        store = Store(tmp_path / f"cache{number}")
        store.publish(*made(8))
        old(store, made(8)[0])
        yield number, store


def prune_it(store: Store) -> None:
    delete(store, plan_prune(store, older_than_s=30 * DAY))


def publish_another(store: Store) -> None:
    store.publish(*made(16))


def is_whole(store: Store) -> bool:
    return isinstance(look(store, made(16)[0]), Verified) and verify(store).problems == ()


def test_who_publishes_while_a_prune_is_at_any_step_has_a_whole_entry(monkeypatch, tmp_path, blobs):
    for number, store in rounds(tmp_path):
        if not interrupted(monkeypatch, number, partial(prune_it, store), partial(publish_another, store)):
            break
        assert is_whole(store), f"step {number}"
    assert number > 20
    assert list(store.entries()) == []
    assert store.blob_paths() == []


@pytest.mark.parametrize("planned", ["before", "then"])
def test_a_prune_while_who_publishes_is_at_any_step_leaves_a_whole_entry(monkeypatch, tmp_path, blobs, planned):
    for number, store in rounds(tmp_path):
        plan = plan_prune(store, older_than_s=30 * DAY)
        assert len(plan.files) == 3
        other = partial(delete, store, plan) if planned == "before" else partial(prune_it, store)
        if not interrupted(monkeypatch, number, partial(publish_another, store), other):
            break
        assert is_whole(store), f"step {number}"
    assert number > 10


def test_what_is_used_after_the_plan_was_made_keeps_its_blobs(store, entry):
    old(store, entry)
    plans = plan_prune(store, older_than_s=30 * DAY), plan_removal(store, [entry.key])
    store.mark_used(entry)
    before = files(store)

    for plan in plans:
        assert delete(store, plan) == 0
    assert files(store) == before


def test_blobs_are_given_back_if_it_cannot_be_known_who_needs_them(store, entry, monkeypatch):
    old(store, entry)
    before = files(store)
    plan = plan_prune(store, older_than_s=30 * DAY)
    asked = []

    def unnamed(store, blobs):
        asked.append(len(blobs))
        if len(asked) > 1:
            raise CacheError("it cannot be listed")
        return blobs

    monkeypatch.setattr(prune, "_unnamed", unnamed)
    with pytest.raises(CacheError, match="cannot be listed"):
        delete(store, plan)

    assert asked == [2, 2]
    assert {name for name in before if "blobs" in name} < set(files(store))
    assert list((store.root / "v1/tmp").iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(errno.EROFS, "Read-only file system")])
def test_an_end_in_the_middle_gives_blobs_back(store, entry, monkeypatch, error):
    old(store, entry)
    blobs = {name for name in files(store) if "blobs" in name}
    plan = plan_prune(store, older_than_s=30 * DAY)
    rename, renamed = os.rename, []

    def fail(*arguments):
        renamed.append(arguments)
        if len(renamed) == 2:
            raise error
        rename(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", fail)
        patch.setattr(prune, "_unnamed", lambda store, blobs: blobs if len(renamed) < 2 else [])
        with pytest.raises((KeyboardInterrupt, CacheError)):
            delete(store, plan)

    assert {name for name in files(store) if "blobs" in name} == blobs
    assert list((store.root / "v1/tmp").iterdir()) == []


# --- a file server with another time ----------------------------------------------------------------------------------


@pytest.fixture(params=[-3 * DAY, -7200, 7200, 3 * DAY])
def skewed(request, monkeypatch) -> float:
    """By how much this machine's clock is ahead of the one that stamps its files."""
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + request.param)
    return request.param


def test_the_time_of_a_place_is_that_of_its_files(skewed, tmp_path):
    assert abs(time_in(tmp_path) + skewed - time.time()) < 600
    assert list(tmp_path.iterdir()) == []
    assert time_in(tmp_path / "missing") >= time.time() - 600


def test_whatever_this_machines_clock_says_what_is_young_stays_and_what_is_old_goes(skewed, store, entry):
    blob, staged = blob_path(store, entry.blobs[0]), store.root / "v1/tmp/staged"
    manifest_path(store, entry).unlink()  # as a publisher that has not come to it yet
    staged.touch()

    assert plan_prune(store, older_than_s=DAY).files == ()
    store.directory.prepare()
    assert staged.exists()

    then = staged.stat().st_mtime
    os.utime(blob, (then - 2 * 3600,) * 2)
    os.utime(staged, (then - 25 * 3600,) * 2)
    assert {file.path for file in plan_prune(store).files} == {blob, staged}
    sweep(store.root / "v1/tmp", older_than_s=DAY)
    assert staged.exists() == (skewed < -3600)


def test_age_is_by_the_time_of_the_files(skewed, store, entry):
    assert plan_prune(store, older_than_s=DAY).entries == 0
    path = manifest_path(store, entry)
    os.utime(path, (path.stat().st_mtime - 1.1 * DAY,) * 2)
    assert plan_prune(store, older_than_s=DAY).entries == 1


def test_use_is_noted_whatever_this_machines_clock_says(skewed, store, entry):
    path = manifest_path(store, entry)
    before = path.stat().st_mtime - 0.5
    os.utime(path, (before,) * 2)

    store.mark_used(entry)

    assert path.stat().st_mtime > before
