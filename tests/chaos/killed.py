"""Family 1: whoever writes is killed at every file-system call, before it and, where it writes, in the middle of it.

Afterwards the directory is opened anew: each entry is whole or absent, plans and lock files are the ones before or
after, what others published is whole, and later writes work.
"""

from __future__ import annotations

import os
import shutil
import signal
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from store_kit import blob_path, manifest_path, spoil

from chaos import calls
from chaos.kit import (
    Build,
    LostEntry,
    Tally,
    Task,
    build,
    heard,
    in_child,
    load,
    mended,
    plan,
    publish,
    sound,
    whole,
)
from nanogpt_buckets.errors import CorruptEntry
from nanogpt_buckets.store.entry import Miss, Status
from nanogpt_buckets.store.lockfile import read_lock, write_lock
from nanogpt_buckets.store.plans import Plans
from nanogpt_buckets.store.prune import delete, plan_prune
from nanogpt_buckets.store.store import Store

MINE, OTHER, LATER = build("mine"), build("other", 16), build("later", 32)
# Shares a blob with a neighbour, as equal libraries do.
SHARING = Build(*(lambda b: (b.manifest, b.blobs))(build("other", 24)))


@dataclass(frozen=True)
class Scene:
    """What is there before, what is killed, and what may be there then besides the entry whole or absent."""

    name: str
    before: Callable[[Path], None]
    act: Callable[[Path], None]
    damaged: bool = False


def _nothing(root: Path) -> None:
    pass


def _neighbour(root: Path) -> None:
    publish(Store(root), OTHER)
    plan(Store(root), OTHER)


def _damaged(root: Path) -> None:
    _neighbour(root)
    store = Store(root)
    publish(store, MINE)
    for blob in MINE.manifest.blobs:
        spoil(blob_path(store, blob), b"damaged")


def _half(root: Path) -> None:
    _damaged(root)
    path = manifest_path(Store(root), MINE.manifest)
    spoil(path, path.read_bytes()[:-9])


def _rejected(root: Path) -> None:
    _neighbour(root)
    publish(Store(root), MINE)
    Store(root).reject(MINE.manifest, "wrong")


def _both(root: Path) -> None:
    _neighbour(root)
    publish(Store(root), MINE)
    write_lock(root.parent / "buckets.lock", [OTHER.manifest], lambda parts: False)


def _build(root: Path) -> None:
    """Do what a builder does: publish under a lock, then remember the plan."""
    store = Store(root)
    with store.directory.locked(MINE.manifest.key, 1):
        publish(store, MINE)
    plan(store, OTHER, MINE)


def _reject(root: Path) -> None:
    Store(root).reject(MINE.manifest, "wrong")


def _lock(root: Path) -> None:
    write_lock(root.parent / "buckets.lock", [OTHER.manifest, MINE.manifest], lambda parts: False)


def _prune(root: Path) -> None:
    store = Store(root)
    os.utime(manifest_path(store, MINE.manifest), (1, 1))
    delete(store, plan_prune(store, older_than_s=3600))


SCENES = (
    Scene("a publisher into nothing", _nothing, _build),
    Scene("a publisher beside another entry", _neighbour, _build),
    Scene("a publisher of a library that is there", _neighbour, lambda root: publish(Store(root), SHARING)),
    Scene("a publisher in the place of damaged libraries", _damaged, _build, damaged=True),
    Scene("a publisher in the place of half a manifest", _half, _build, damaged=True),
    Scene("a publisher in the place of what was rejected", _rejected, _build, damaged=True),
    Scene("who rejects an entry", _both, _reject, damaged=True),
    Scene("who writes a lock file", _both, _lock),
    Scene("prune", _both, _prune),
)


def run(task: Task) -> Iterator[Tally]:
    for scene in SCENES if not task.quick else (SCENES[0], SCENES[3]):
        yield _killed(task, scene)


def _killed(task: Task, scene: Scene) -> Tally:
    tally = Tally(1, scene.name)
    template = task.room("template")
    scene.before(template / "cache")

    def copy() -> Path:
        shutil.rmtree(task.where / "copy", ignore_errors=True)
        return shutil.copytree(template, task.where / "copy", symlinks=True) / "cache"

    with tally.case("no call goes past the count"):
        root = copy()

        def see() -> None:
            missed = calls.unseen(lambda: scene.act(root))
            assert not missed, missed

        assert in_child(see) == 0
    root = copy()
    names = heard(lambda: calls.names_of(lambda: scene.act(root)))
    assert len(names) > 20, names
    points = [(number, False) for number in range(1, len(names) + 1)]
    points += [(number, True) for number, name in enumerate(names, start=1) if name == "write"]
    for number, half in task.some(sorted(points), 20):
        with tally.case(f"{'within' if half else 'before'} call {number}, {names[number - 1]}"):
            root = copy()
            assert in_child(lambda: _act_until(scene, root, number, half)) == -signal.SIGKILL  # noqa: B023
            _judge(scene, root)
    with tally.case("not killed"):
        root = copy()
        assert in_child(lambda: scene.act(root)) == 0
        _judge(scene, root)
    return tally


def _act_until(scene: Scene, root: Path, last: int, half: bool) -> None:
    def die(call: calls.Call) -> None:
        if call.number == last:
            if half:
                descriptor, data = call.arguments[:2]
                call.real(descriptor, data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)

    with calls.watched(die):
        scene.act(root)


def _judge(scene: Scene, root: Path) -> None:
    store = Store(root)
    beside = scene.before is not _nothing
    if beside:
        whole(store, OTHER)
    for each in (MINE, SHARING):
        found = load(store, each.manifest, each)
        allowed = {Status.ABSENT, Status.CORRUPT} if scene.damaged else {Status.ABSENT}
        if isinstance(found, Miss) and found.status not in allowed:
            raise LostEntry(f"it is {found.status}: {found.why}")
    try:
        saved = Plans(store).load("p")
    except CorruptEntry as error:
        raise LostEntry(f"half a plan: {error}") from error
    lengths = [bucket.seq_len for bucket in saved.buckets] if saved else []
    assert lengths in ([[16], [8, 16]] if beside else [[], [8, 16]]), lengths
    if (root.parent / "buckets.lock").exists():
        assert len(read_lock(root.parent / "buckets.lock").entries) in (1, 2)
    for each in (MINE, LATER):
        mended(store, each)
    plan(store, MINE, OTHER, LATER)
    write_lock(root.parent / "buckets.lock", [LATER.manifest], lambda parts: False)
    sound(store)
    whole(store, MINE, LATER, *([OTHER] if beside else []))
    modes = {stat.S_IMODE(path.stat().st_mode) for path in root.rglob("*") if path.is_dir()}
    assert modes == {0o700}, modes
    # what was being written stays aside, and goes in time
    staged = list((root / "v1/tmp").iterdir())
    assert len(staged) <= 1, staged
    for path in staged:
        os.utime(path, (time.time() - 9e5,) * 2)
    delete(store, plan_prune(store))
    assert not any((root / "v1/tmp").iterdir())
    beside_the_lock = {path.name for path in root.parent.iterdir()} - {"cache", "buckets.lock"}
    assert len(beside_the_lock) <= 1, beside_the_lock
