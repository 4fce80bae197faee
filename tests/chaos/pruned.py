"""Family 4: readers and builders beside `cache prune` and `cache rm` of everything.

Readers never load anything that was not published, and read what a plan keeps each time. What is deleted is gone or
said to be, and comes back when it is built again.
"""

from __future__ import annotations

import os
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
    rounds = 4 if task.quick else 500
    for name, remove, kept in (("prune", _prune, True), ("rm of everything", _remove, False)):
        tally = Tally(4, f"reads beside {name}")
        _beside(task, tally, remove, kept, rounds)
        yield tally


def _beside(task: Task, tally: Tally, remove: Callable[[Store], None], kept: bool, rounds: int) -> None:
    """Let a builder and who deletes go on side by side until readers have read enough; each read is a case."""
    root = task.room("cache")
    store = Store(root)
    publish(store, *KEPT, *FREE)
    plan(store, *KEPT)
    for each in KEPT:
        os.utime(manifest_path(store, each.manifest), (1, 1))  # so that nothing but the plan keeps them
    reports = [task.where / f"reader{number}" for number in range(READERS)]
    stop = task.where / "stop"
    stop.unlink(missing_ok=True)
    workers = [started(lambda: _repeat(remove, store, stop)), started(lambda: _repeat(_build, store, stop))]
    readers = [started(lambda path=path: _read(Store(root), path, rounds, kept)) for path in reports]
    for child in (*readers, *workers):
        with tally.case("a process that goes on to its end"):
            carried_out(child)
        if child == readers[-1]:
            stop.touch()
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


def _read(store: Store, path: Path, rounds: int, kept: bool) -> None:
    reads = lost = wrong = 0
    said: list[str] = []
    for _ in range(rounds):
        for each in (*KEPT, *FREE):
            reads += 1
            try:
                _allowed(load(store, each.manifest, each), each, kept)
            except LostEntry as error:
                lost += 1
                said.append(f"lost: {error}")
            except AssertionError as error:
                wrong += 1
                said.append(f"wrong: {error}")
    path.write_text("\n".join(map(str, (reads, lost, wrong, *said[:5]))))


def _allowed(found: Verified | Miss, each: Build, kept: bool) -> None:
    if isinstance(found, Verified):
        return
    if kept and each in KEPT:
        raise LostEntry(f"what a plan keeps is {found.status}: {found.why}")
    # deleted between its manifest and its libraries, it is one that lacks them
    gone = found.status is Status.ABSENT or (found.status is Status.CORRUPT and found.why.endswith("from the cache"))
    assert gone, found


def _repeat(function: Callable[[Store], None], store: Store, stop: Path) -> None:
    while not stop.exists():
        function(store)


def _build(store: Store) -> None:
    publish(store, *FREE)


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
