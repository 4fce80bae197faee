"""Family 3: eight processes build one plan at once, each with bytes of its own, whether locks work, lie or never come.

Whatever is left, and whatever any of them loads meanwhile, is one builder's whole set. In half of the races they come
upon entries that are damaged already, and one of them makes the very bytes that were there before.
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from store_kit import blob_path, spoil

from chaos.kit import Build, LostEntry, Tally, Task, build, carried_out, load, plan, publish, sound, started
from nanogpt_buckets.plan.bucket import Plan
from nanogpt_buckets.store.directory import Directory
from nanogpt_buckets.store.entry import Miss, Verified
from nanogpt_buckets.store.manifest import Manifest
from nanogpt_buckets.store.plans import Plans, SavedPlan
from nanogpt_buckets.store.prune import delete, plan_prune
from nanogpt_buckets.store.store import Store

BUILDERS = 8
LENGTHS = (8, 16, 24, 32, 40, 48)
FIRST = "first"


@contextlib.contextmanager
def _lying(self: Directory, name: str, timeout_s: float, cancelled: Callable[[], bool] = bool) -> Iterator[bool]:
    yield True


@contextlib.contextmanager
def _late(self: Directory, name: str, timeout_s: float, cancelled: Callable[[], bool] = bool) -> Iterator[bool]:
    yield False


LOCKS = {"locks work": None, "locks let everyone in": _lying, "locks always time out": _late}
STATES = ("nothing there", "damaged entries there")


def run(task: Task) -> Iterator[Tally]:
    for locks, function in LOCKS.items():
        for state in STATES:
            tally = Tally(3, f"{locks}, {state}")
            for turn in range(1 if task.quick else 25):
                with tally.case(f"race {turn}"):
                    _race(task, function, state)
            yield tally


def _race(task: Task, locked: Callable[..., object] | None, state: str) -> None:
    root = task.room("cache")
    store = Store(root)
    before = [build(FIRST, length) for length in LENGTHS]
    if state != STATES[0]:
        publish(store, *before)
        for each in before[::2]:
            spoil(blob_path(store, each.manifest.blobs[0]), b"damaged")
    # one of them makes what was there before
    tags = [FIRST if state != STATES[0] else "builder0", *(f"builder{number}" for number in range(1, BUILDERS))]
    known = {length: [build(tag, length) for tag in {*tags, FIRST}] for length in LENGTHS}
    begin = time.time() + 0.05
    first = state == STATES[0]  # then who publishes first is adopted by all
    children = [started(lambda tag=tag: _build(root, tag, begin, locked, known, first)) for tag in tags]
    carried_out(*children)

    for length, builds in known.items():
        found = load(store, builds[0].manifest, *builds)
        if isinstance(found, Miss):
            raise LostEntry(f"1x{length} is {found.status}: {found.why}")
    for path in (root / "v1/blobs").glob("*/*"):
        os.utime(path, (1, 1))
    delete(store, plan_prune(store))  # damaged libraries of entries that were replaced
    sound(store)
    assert not os.listdir(root / "v1/tmp")
    saved = Plans(store).load("p")
    assert saved is not None
    assert {bucket.seq_len for bucket in saved.buckets} <= set(LENGTHS)
    if locked is None:
        assert [bucket.seq_len for bucket in saved.buckets] == list(LENGTHS), "a builder's bucket fell out of the plan"
    plan(store, *before)


def _build(
    root: Path,
    tag: str,
    begin: float,
    locked: Callable[..., object] | None,
    known: dict[int, list[Build]],
    first: bool,
) -> None:
    """Be one of the builders: publish each bucket, load what is there then, and add it to the plan."""
    if locked is not None:
        Directory.locked = locked
    store = Store(root)
    time.sleep(max(0.0, begin - time.time()))
    for length in LENGTHS:
        mine = next(each for each in known[length] if each.manifest.gate == {"tag": tag})
        with store.directory.locked(mine.manifest.key, 5.0):
            winner = store.publish(mine.manifest, mine.blobs)
        assert winner in [each.manifest for each in known[length]]
        found = load(store, mine.manifest, *known[length])
        assert not first or (isinstance(found, Verified) and found.manifest == winner), "another than was adopted"
        Plans(store).change("p", functools.partial(_added, winner))


def _added(added: Manifest, before: SavedPlan | None) -> SavedPlan:
    return SavedPlan(Plan([*(before.buckets if before else ()), added.bucket]), frozenset({added.family}))
