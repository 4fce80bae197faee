"""Family 4: readers and builders beside `cache prune` and `cache rm` of everything.

Readers never load anything that was not published, and read what a plan keeps each time. What is deleted is gone or
said to be, and comes back when it is built again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from store_kit import manifest_path

from chaos.kit import (
    Build,
    LostEntry,
    Tally,
    Task,
    build,
    carried_out,
    load,
    mended,
    plan,
    publish,
    sound,
    started,
    whole,
)
from nanogpt_buckets.errors import CacheError
from nanogpt_buckets.store.entry import Miss, Status, Verified
from nanogpt_buckets.store.prune import delete, plan_prune, plan_removal
from nanogpt_buckets.store.store import Store

READERS = 4
# Shares no library with others, and each of the rest shares one with a planned entry of another family.
KEPT = [build("kept", length) for length in (8, 16)]
FREE = [build("free", length) for length in (24, 32)] + [build("kept", length, family="g") for length in (8, 16)]


def run(task: Task) -> Iterator[Tally]:
    seconds = 0.4 if task.quick else 6.0
    for name, remove, kept in (("prune", _prune, True), ("rm of everything", _remove, False)):
        tally = Tally(4, f"reads beside {name}")
        _beside(task, tally, remove, kept, seconds)
        yield tally


def _beside(task: Task, tally: Tally, remove: Callable[[Store], None], kept: bool, seconds: float) -> None:
    """Let readers, a builder and who deletes go on side by side; each read is a case."""
    root = task.room("cache")
    store = Store(root)
    publish(store, *KEPT, *FREE)
    plan(store, *KEPT)
    reports = [task.where / f"reader{number}" for number in range(READERS)]
    until = time.time() + seconds
    workers = [started(lambda: _delete(store, remove, until)), started(lambda: _build(store, until))]
    readers = [started(lambda path=path: _read(Store(root), path, until, kept)) for path in reports]
    for child in (*workers, *readers):
        with tally.case("a process that goes on to its end"):
            carried_out(child)
    for path in reports:
        reads, lost, wrong, *said = path.read_text().splitlines()
        failed = int(lost) + int(wrong)
        tally.injected += int(reads)
        tally.survived += int(reads) - failed
        tally.lost += int(lost)
        tally.wrong += int(wrong)
        tally.said += said
    with tally.case("all built again"):
        for each in (*KEPT, *FREE):
            mended(store, each)
        whole(store, *KEPT, *FREE)
        sound(store)


def _read(store: Store, path: Path, until: float, kept: bool) -> None:
    reads = lost = wrong = 0
    said: list[str] = []
    seen: set[str] = set()
    while time.time() < until:
        for each in (*KEPT, *FREE):
            reads += 1
            try:
                found = load(store, each.manifest, each)
                seen.add("hit" if isinstance(found, Verified) else found.status)
                _allowed(found, each, kept)
            except LostEntry as error:
                lost += 1
                said.append(f"lost: {error}")
            except AssertionError as error:
                wrong += 1
                said.append(f"wrong: {error}")
    assert seen >= {"hit"}, seen
    path.write_text("\n".join(map(str, (reads, lost, wrong, *said[:5]))))


def _allowed(found: Verified | Miss, each: Build, kept: bool) -> None:
    if isinstance(found, Verified):
        return
    if kept and each in KEPT:
        raise LostEntry(f"what a plan keeps is {found.status}: {found.why}")
    # deleted between its manifest and its libraries, it is one that lacks them
    gone = found.status is Status.ABSENT or (found.status is Status.CORRUPT and found.why.endswith("from the cache"))
    assert gone, found


def _build(store: Store, until: float) -> None:
    while time.time() < until:
        for each in FREE:
            publish(store, each)


def _delete(store: Store, remove: Callable[[Store], None], until: float) -> None:
    while time.time() < until:
        remove(store)


def _prune(store: Store) -> None:
    for each in FREE:
        try:
            os.utime(manifest_path(store, each.manifest), (1, 1))
        except FileNotFoundError:
            continue
    delete(store, plan_prune(store, older_than_s=3600))


def _remove(store: Store) -> None:
    keys = [entry.key for entry in store.entries()]
    for key in keys:
        try:
            delete(store, plan_removal(store, [key]))
        except CacheError:
            continue  # somebody else's rm was quicker
