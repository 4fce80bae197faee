"""Who holds a lock says so; whoever waits goes on without one that nobody speaks for any more."""

from __future__ import annotations

import json
import os
import threading
import time

import filelock
import pytest

from nanogpt_buckets.store import locks
from nanogpt_buckets.store.store import Store

NAME = "0" * 64


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    for name, value in {"_FIRST_S": 0.01, "_BEAT_S": 0.05, "_LOOK_S": 0.02, "_SLICE_S": 0.02}.items():
        monkeypatch.setattr(locks, name, value)


def said(store: Store):
    return store.root / "v1/locks" / f"{NAME}.by"


def wait_until(true) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_whoever_waits_is_told_who_holds_it_and_since_when(store):
    heard: list[str] = []
    with store.directory.locked(NAME, 0):
        wait_until(said(store).exists)
        first = said(store).read_bytes()
        wait_until(lambda: said(store).read_bytes() != first)

        def cancelled(holder: str) -> bool:
            heard.append(holder)
            return bool(holder)

        with Store(store.root).directory.locked(NAME, 60, cancelled) as held:
            assert not held

    assert f", process {os.getpid()}, since {time.strftime('%H:')}" in heard[-1]
    assert not said(store).exists()


def test_who_holds_it_briefly_writes_nothing(store, monkeypatch):
    monkeypatch.setattr(locks, "_FIRST_S", 60.0)
    with store.directory.locked(NAME, 0):
        assert os.listdir(store.root / "v1/locks") == [f"{NAME}.lock"]
    assert not said(store).exists()


def test_a_lock_that_nobody_speaks_for_any_more_is_gone_without(store, monkeypatch):
    """As after the end of a machine whose lock a file server has not freed yet."""
    monkeypatch.setattr(locks, "_GONE_S", 0.1)
    store.directory.prepare()
    said(store).write_text(json.dumps({"who": "a@gone", "process": 1, "since": 0, "count": 7}))

    with filelock.FileLock(store.root / "v1/locks" / f"{NAME}.lock"), store.directory.locked(NAME, 600) as held:
        assert not held


def test_one_that_somebody_speaks_for_is_waited_for(store, monkeypatch):
    monkeypatch.setattr(locks, "_GONE_S", 0.3)
    inside, done = threading.Event(), threading.Event()

    def hold() -> None:
        with store.directory.locked(NAME, 0):
            inside.set()
            done.wait(30)

    holder = threading.Thread(target=hold)
    holder.start()
    inside.wait(30)
    threading.Timer(1.0, done.set).start()
    with Store(store.root).directory.locked(NAME, 30) as held:
        assert held
        assert done.is_set(), "longer than it takes to be taken for gone"
    holder.join()


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b'{"who":[],"process":"x"}', b"[" * 990, b"x" * 100_000])
def test_whatever_is_said_there_harms_nobody(store, content):
    store.directory.prepare()
    said(store).write_bytes(content)
    heard: list[str] = []

    lock = filelock.FileLock(store.root / "v1/locks" / f"{NAME}.lock")
    with lock, store.directory.locked(NAME, 0.2, lambda holder: bool(heard.append(holder))) as held:
        assert not held
    assert set(heard) == {""}


def test_what_a_holder_calls_itself_cannot_speak_to_a_terminal(store):
    store.directory.prepare()
    said(store).write_text(json.dumps({"who": "a\x1b[2Jb", "process": 1, "since": 0}))
    heard: list[str] = []

    lock = filelock.FileLock(store.root / "v1/locks" / f"{NAME}.lock")
    with lock, store.directory.locked(NAME, 0.2, lambda holder: bool(heard.append(holder))):
        pass
    assert heard[-1].startswith("a\\x1b[2Jb, process 1, since")
