"""Family 8: two hosts on one directory, with other names, homes and users, and clocks a day apart.

Names and bytes are the same wherever they are made, each adopts what the other published, and neither sweeps nor prunes
what the other is about to publish.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from store_kit import manifest_path

from chaos import calls
from chaos.kit import (
    NOBODY,
    Tally,
    Task,
    build,
    carried_out,
    contents,
    heard,
    load,
    mended,
    plan,
    publish,
    sound,
    started,
    whole,
)
from nanogpt_buckets import settings
from nanogpt_buckets.errors import CacheError
from nanogpt_buckets.store.entry import Miss, Status
from nanogpt_buckets.store.plans import Plans
from nanogpt_buckets.store.prune import delete, plan_prune
from nanogpt_buckets.store.store import Store

DAY = 86400.0
_now = time.time
MINE, OTHER, LATER = build("mine"), build("other", 16), build("later", 32)


@dataclass(frozen=True)
class Host:
    """Who runs there: the clock is ahead by so many seconds."""

    name: str
    ahead: float = 0.0
    user: int = 0

    def run(self, task: Task, function: Callable[[], None]) -> None:
        carried_out(started(lambda: self._be(task, function)))

    def _be(self, task: Task, function: Callable[[], None]) -> None:
        time.time = lambda: _now() + self.ahead
        socket.gethostname = lambda: self.name
        os.uname = lambda: os.uname_result(("Linux", self.name, "1", "1", "x86_64"))
        home = task.where / ("theirs" if self.user else self.name)
        os.environ |= {"HOME": str(home), "NANOGPT_BUCKETS_LOCAL_DIR": str(home / "local"), "USER": self.name}
        if self.user:
            os.setgroups([])
            os.setgid(self.user)
            os.setuid(self.user)
        function()


HERE, AHEAD, BEHIND = Host("here"), Host("ahead", DAY), Host("behind", -DAY)
HOSTS = (HERE, AHEAD, BEHIND)


def run(task: Task) -> Iterator[Tally]:
    for directory in (task.where, *task.where.parents):
        if directory.is_relative_to("/tmp") and directory != Path("/tmp"):
            directory.chmod(0o755)  # for the other user to walk down
    tally = Tally(8, "two hosts, clocks up to two days apart")
    for one in HOSTS:
        for two in HOSTS:
            for name, meet in MEETINGS.items():
                with tally.case(f"{name}: {one.name}, {two.name}"):
                    meet(task, one, two)
    yield tally
    for one, two in ((HERE, HERE), (HERE, AHEAD), (BEHIND, AHEAD)):
        yield _meanwhile(task, one, two)
    tally = Tally(8, "two users")
    for name, meet in USERS.items():
        for host in HOSTS:
            with tally.case(f"{name}, host {host.name}"):
                meet(task, replace(host, user=NOBODY))
    yield tally


def _takes_turns(task: Task, one: Host, two: Host) -> None:
    """Let each publish and plan beside the other, and load and adopt what the other has."""
    root = task.room("cache")
    store = Store(root)
    one.run(task, lambda: (publish(store, MINE, OTHER), plan(store, MINE, OTHER)))
    first = contents(root)
    two.run(task, lambda: (whole(store, MINE, OTHER), publish(store, MINE, LATER), store.mark_used(MINE.manifest)))
    one.run(task, lambda: whole(store, MINE, OTHER, LATER))
    assert first.items() <= contents(root).items(), "the second changed what the first had written"
    assert not any(os.listdir(root / "v1/tmp"))
    text = b"".join(contents(root).values())
    assert not [word for word in (one.name, two.name, "/tmp", "root") if word.encode() in text]
    sound(store)


def _same_bytes(task: Task, one: Host, two: Host) -> None:
    """Let each publish into a directory of its own: the same names and bytes."""
    roots = [task.room("cache"), task.room("second")]
    for host, root in zip((one, two), roots, strict=True):
        host.run(task, lambda root=root: (publish(Store(root), MINE), plan(Store(root), MINE)))
    assert contents(roots[0]) == contents(roots[1])


def _meanwhile(task: Task, one: Host, two: Host) -> Tally:
    """Stop one before each call that publishing makes, and let the other sweep, publish and prune then."""
    tally = Tally(8, f"host {one.name} publishes, host {two.name} prunes before each call")
    store = Store(task.where / "cache")

    def prepared() -> None:
        task.room("cache")
        publish(store, OTHER)
        plan(store, OTHER)

    prepared()
    names = heard(lambda: calls.names_of(lambda: publish(store, MINE)))
    for stop in task.some(range(1, len(names) + 1), 3):
        with tally.case(f"before call {stop}, {names[stop - 1]}"):
            prepared()
            one.run(task, lambda: _stopped(task, store, stop, two))  # noqa: B023
            whole(store, MINE, OTHER, LATER)
            sound(store)
    return tally


def _stopped(task: Task, store: Store, stop: int, other: Host) -> None:
    """Publish, and before the n-th call let another host do all that it can."""

    def let(call: calls.Call) -> None:
        if call.number == stop:
            other.run(task, lambda: _busy(store))

    with calls.watched(let):
        publish(store, MINE)


def _busy(store: Store) -> None:
    """Publish another entry, which sweeps, and prune."""
    publish(store, LATER)
    plan(store, OTHER, LATER)
    delete(store, plan_prune(store, older_than_s=2 * DAY + 60))


def _prunes_by_age(task: Task, one: Host, two: Host) -> None:
    """Let one use an entry and the other prune by an age that clocks so far apart cannot be mistaken in."""
    root = task.room("cache")
    store = Store(root)
    publish(store, MINE, OTHER)
    os.utime(manifest_path(store, MINE.manifest), (time.time() - 9 * DAY,) * 2)
    one.run(task, lambda: store.mark_used(MINE.manifest))
    two.run(task, lambda: (delete(store, plan_prune(store, older_than_s=3 * DAY)), None)[1])
    whole(store, MINE, OTHER)


MEETINGS = {
    "they take turns": _takes_turns,
    "each makes the same": _same_bytes,
    "one prunes what the other uses": _prunes_by_age,
}


# --- other users ----------------------------------------------------------------------------------------------------


def _root_s(task: Task, other: Host) -> None:
    """Root's directory, open to read: the other user loads from it, writes nothing there, and has one of its own."""
    root = task.room("cache")
    root.chmod(0o755)
    store = Store(root)
    publish(store, MINE, OTHER)
    plan(store, MINE, OTHER)
    before = contents(root)
    home = task.room("theirs")
    os.chown(home, NOBODY, NOBODY)

    def use() -> None:
        whole(store, MINE, OTHER)
        assert Plans(store).load("p") is not None
        store.mark_used(MINE.manifest)
        store.reject(OTHER.manifest, "not here")
        assert load(store, OTHER.manifest, OTHER) != OTHER
        for write in (lambda: publish(store, LATER), lambda: plan(store, LATER)):
            with pytest.raises(CacheError, match="cannot be written"):
                write()
        own = Store(settings.user_cache() / "cache", layers=[root])
        publish(own, LATER)
        whole(own, MINE, LATER)

    other.run(task, use)
    assert contents(root) == before
    whole(Store(root), MINE, OTHER)


def _theirs(task: Task, other: Host) -> None:
    """The other user's directory: root loads nothing from it, and writes nothing there."""
    home = task.room("theirs")
    os.chown(home, NOBODY, NOBODY)
    root = home / "cache"
    other.run(task, lambda: (publish(Store(root), MINE), plan(Store(root), MINE)))
    before = contents(root)
    found = load(Store(root), MINE.manifest, MINE)
    assert isinstance(found, Miss), found
    assert found.status is Status.UNTRUSTED
    assert contents(root) == before
    other.run(task, lambda: (mended(Store(root), MINE), sound(Store(root))))


USERS = {"root's directory": _root_s, "the other's directory": _theirs}
