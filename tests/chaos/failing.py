"""Family 5: an error of the machine at every call: publishing, loading, noting use, plans, locks, and a build.

An error is one sentence, passes without a trace and changes nothing that was there; what cannot be read this time is
never called damaged. What a build has compiled is used whatever becomes of the cache.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from store_kit import blob_path, manifest_path, spoil

from chaos import calls
from chaos.kit import (
    Tally,
    Task,
    build,
    carried_out,
    contents,
    heard,
    load,
    mended,
    never_corrupt,
    plan,
    publish,
    sound,
    started,
    whole,
)
from nanogpt_buckets import builder
from nanogpt_buckets.backends.base import Artifact, BuildRequest
from nanogpt_buckets.choice import choose
from nanogpt_buckets.contract import Contract
from nanogpt_buckets.errors import CacheError
from nanogpt_buckets.plan.bucket import Bucket
from nanogpt_buckets.selection import Selection
from nanogpt_buckets.store import plans
from nanogpt_buckets.store.entry import Verified
from nanogpt_buckets.store.plans import Plans
from nanogpt_buckets.store.prune import delete, plan_prune
from nanogpt_buckets.store.store import Store

ERRORS = tuple(getattr(errno, name) for name in ("ENOSPC", "EROFS", "EDQUOT", "EACCES", "ESTALE", "EBUSY", "EIO"))
MINE, OTHER = build("mine"), build("other", 16)
BUCKET, LIBRARY = Bucket(1, 16), b"library of 1x16"


@dataclass(frozen=True)
class Deed:
    """What is done while a call fails; `writes`: it may add and replace files, if not take any away."""

    name: str
    do: Callable[[Store], None]
    writes: bool = True
    damaged: bool = False


def _look(store: Store) -> None:
    for each in (MINE, OTHER):
        never_corrupt(load(store, each.manifest, each))


def _locked(store: Store) -> None:
    with store.directory.locked(MINE.manifest.key, 0.0):
        pass


def _prune(store: Store) -> None:
    delete(store, plan_prune(store, older_than_s=3600))


DEEDS = (
    Deed("loading", _look, writes=False),
    Deed("publishing", lambda store: publish(store, MINE)),
    Deed("publishing in the place of damage", lambda store: publish(store, MINE), damaged=True),
    Deed("saving a plan", lambda store: plan(store, MINE, OTHER)),
    Deed("reading plans", lambda store: _pinned(store), writes=False),
    Deed("noting use", lambda store: store.mark_used(OTHER.manifest), writes=False),
    Deed("rejecting", lambda store: store.reject(MINE.manifest, "wrong")),
    Deed("locking", _locked, writes=False),
    Deed("pruning", _prune),
)


def _pinned(store: Store) -> None:
    assert Plans(store).pins().keep(OTHER.manifest.family, OTHER.manifest.bucket), "what a plan keeps is let go"


def run(task: Task) -> Iterator[Tally]:
    plans._LOCK_TIMEOUT_S = 0.01  # where no lock can be had, that is soon known
    for deed in DEEDS:
        yield _each_call(task, deed)
    yield _builds(task)


def failing(number: int, code: int, for_good: bool) -> Callable[[calls.Call], None]:
    """Return what makes the n-th call fail, or all from it on; a descriptor is closed all the same, as Linux does."""

    def act(call: calls.Call) -> None:
        if call.number == number or (for_good and call.number > number):
            if call.name == "close":
                call.real(*call.arguments)
            raise OSError(code, os.strerror(code), *call.arguments[:1])

    return act


def _each_call(task: Task, deed: Deed) -> Tally:
    tally = Tally(5, f"{deed.name}, an error at each call")
    template = task.room("template") / "cache"
    publish(Store(template), OTHER)
    plan(Store(template), OTHER)
    os.utime(manifest_path(Store(template), OTHER.manifest), (1, 1))
    if deed.damaged:
        publish(Store(template), MINE)
        spoil(blob_path(Store(template), MINE.manifest.blobs[0]), b"damaged")

    def copy() -> Store:
        shutil.rmtree(task.where / "copy", ignore_errors=True)
        return Store(shutil.copytree(template, task.where / "copy", symlinks=True))

    names = heard(lambda: calls.names_of(lambda: deed.do(copy())))
    store = copy()
    points = [(n, code, False) for n in range(1, len(names) + 1) for code in ERRORS]
    points += [(n, task.chance.choice(ERRORS), True) for n in range(1, len(names) + 1)]
    before = contents(store.root)
    for number, code, for_good in task.some(points, 10):
        where = f"{errno.errorcode[code]} at call {number}, {names[number - 1]}{' and on' * for_good}"
        with tally.case(where):
            if contents(store.root) != before:
                store = copy()
            with calls.watched(failing(number, code, for_good)), contextlib.suppress(CacheError):
                deed.do(store)
            after = contents(store.root)
            assert after.keys() >= before.keys(), before.keys() - after.keys()
            changed = {name for name, data in before.items() if after[name] != data}
            assert deed.writes or after == before, changed
            assert deed.damaged or changed <= {"v1/plans/p.json"}, changed
            whole(store, OTHER)
            if after == before:
                continue
            mended(store, MINE)
            plan(store, MINE, OTHER)
            sound(store)
    return tally


def _builds(task: Task) -> Tally:
    """Build a bucket of the demo, whose compiler is pretended; from when it is compiled on, calls fail.

    Each build is a process of its own, as it is where a lock may not be let go.
    """
    tally, root = Tally(5, "a build, an error at each call once it has compiled"), task.where / "built"
    os.environ["NANOGPT_BUCKETS_CACHE_DIR"] = str(root)

    def recorded() -> list[str]:
        names: list[str] = []
        _build(lambda call: names.append(call.name))
        return names

    names = heard(recorded)
    points = [(n, task.chance.choice(ERRORS), on) for n in range(1, len(names) + 1) for on in (False, True)]
    for number, code, on in task.some(points, 4):
        with tally.case(f"{errno.errorcode[code]} at call {number}, {names[number - 1]}{' and on' * on}"):
            shutil.rmtree(root, ignore_errors=True)
            carried_out(started(lambda: _used(failing(number, code, on))))  # noqa: B023
            carried_out(started(lambda: _used(lambda call: None)))
            sound(Store(root))
            assert isinstance(Selection(choose("demo")).own(BUCKET), Verified)
    return tally


def _used(act: Callable[[calls.Call], None]) -> None:
    """Build, and assert that what was compiled is in the store or at hand."""
    unkept = _build(act)
    found = Selection(choose("demo")).own(BUCKET)
    never_corrupt(found)
    usable = unkept.get(BUCKET, found)
    assert isinstance(usable, Verified), "what was compiled is neither kept nor at hand"
    assert dict(usable.blobs) == {"library": LIBRARY}


def _build(act: Callable[[calls.Call], None]) -> dict[Bucket, Verified]:
    """Build, with `act` before each call once it has compiled; return what could not be kept."""
    watching = contextlib.ExitStack()

    def compile_bucket(request: dict[str, Any], on_event: object = None) -> Artifact:
        inputs = (Contract("input_ids", "int32", (1, BuildRequest.from_json(request).bucket.seq_len)),)
        watching.enter_context(calls.watched(act))
        return Artifact({"library": LIBRARY}, inputs, (), (), {})

    builder.compile_bucket = compile_bucket
    unkept: dict[Bucket, Verified] = {}
    with watching:
        report = builder.build_missing(choose("demo"), [BUCKET], jobs=1, unkept=unkept)
    assert [row.state in ("compiled", "hit") for row in report.rows] == [True], report.rows
    assert bool(report.rows[0].why) == bool(unkept), report.rows
    return unkept
