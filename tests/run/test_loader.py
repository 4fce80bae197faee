"""Loading with a fake backend: which entry becomes an executable, what is checked once, what is tried again."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from fake import choice_of, damage, publish

from nanogpt_buckets import node
from nanogpt_buckets.errors import CorruptEntry, IncompatibleEntry, TransientError
from nanogpt_buckets.node import crumbs
from nanogpt_buckets.plan.bucket import Bucket
from nanogpt_buckets.run.loader import Compiled, Uncompiled
from nanogpt_buckets.selection import Selection
from nanogpt_buckets.steps import gate, step_named
from nanogpt_buckets.store.entry import Status
from nanogpt_buckets.store.store import Store

B8, B16 = Bucket(1, 8), Bucket(1, 16)


@pytest.fixture
def choose(odd_folder, tmp_path):
    return lambda **options: choice_of(odd_folder, tmp_path / "store", **options)


def test_the_best_entry_that_can_be_opened_is_loaded(choose):
    publish(choose(target="best"), B8, "refuses")
    publish(choose(target="good"), B8, "runs")
    publish(choose(target="any"), B8, "never asked")
    loader = Compiled(choose())

    assert loader.load(B8)
    assert loader.choice.backend.opened == ["runs"]


def test_what_cannot_be_opened_is_refused_once_and_not_tried_again(choose):
    publish(choose(), B8, "refuses")
    loader = Compiled(choose())

    assert not loader.load(B8)
    assert type(loader.refused[B8]) is IncompatibleEntry
    assert loader.available([B8]) == []
    loader.forgive()
    assert loader.available([B8]) == []
    loader.forgive([B8])
    assert loader.available([B8]) == [B8]


def test_damaged_code_is_named_with_the_command_that_replaces_it(choose):
    choice = choose()
    damage(choice, publish(choice, B8))
    loader = Compiled(choice)

    assert not loader.load(B8)
    assert type(loader.refused[B8]) is CorruptEntry
    assert "nanogpt-buckets build" in loader.refused[B8].hint


def test_a_reason_that_may_pass_is_forgiven(choose):
    choice = choose()
    publish(choice, B8)
    loader = Compiled(choice)
    choice.backend.full = True
    assert not loader.load(B8)
    assert type(loader.refused[B8]) is TransientError

    choice.backend.full = False
    loader.forgive()

    assert loader.available([B8]) == [B8]
    assert loader.load(B8)


def test_code_that_computes_something_else_is_rejected_and_what_is_next_best_runs(choose):
    choice = choose()
    publish(choice, B8, "wrong")

    with pytest.raises(CorruptEntry, match=r"differs from the eager model by .*; the entry is rejected"):
        Compiled(choice).open(B8)

    answer = Selection(choose()).best(B8)
    assert (answer.status, answer.why[:20]) == (Status.CORRUPT, "rejected: bucket 1x8")
    assert not Compiled(choose()).has(B8)
    assert "is corrupt: rejected: bucket 1x8" in str(choice.store.error(Selection(choose()).own(B8)))


CHECKS = {
    "checked where it was built": ({"version": gate.VERSION}, "canary"),
    "checked by an older gate": ({"version": gate.VERSION - 1}, "check"),
    "from before gates had versions": ({"lengths": [1]}, "check"),
    "built without a device": ({"version": gate.VERSION, "deferred": "no device"}, "check"),
}


@pytest.mark.parametrize(("record", "wanted"), CHECKS.values(), ids=CHECKS)
def test_weights_and_code_are_compared_once_on_a_node(choose, monkeypatch, record, wanted):
    asked = []
    for name in ("check", "canary"):
        real = getattr(gate, name)
        monkeypatch.setattr(gate, name, lambda *a, n=name, real=real, **k: asked.append(n) or real(*a, **k))
    publish(choose(), B8, gate=record)

    for _ in range(2):
        Compiled(choose()).open(B8)

    assert asked == [wanted]


def test_closing_lets_go_of_code_and_weights(choose):
    choice = choose()
    publish(choice, B8)
    publish(choice, B16, "more")
    loader = Compiled(choice)
    assert [loader.load(bucket) for bucket in (B8, B16)] == [True, True]

    loader.close()

    assert choice.backend.closed == ["code", "more"]
    assert loader.loaded == {}
    assert "weights" not in vars(loader)


def test_uncompiled_steps_are_a_source_of_every_bucket(choose):
    choice = choose()
    source = Uncompiled(choice)
    publish(choice, B8)

    inputs = step_named("recompute").pack([[1, 2, 3]], B8)
    (eager,), (loaded,) = source.open(B8)(*inputs), Compiled(choice).open(B8)(*inputs)

    assert source.has(Bucket(7, 99))
    assert torch.equal(eager, loaded)


def test_what_was_rejected_is_not_loaded_again_on_this_machine_though_the_store_could_not_be_told(choose, monkeypatch):
    publish(choose(), B8, "wrong")
    monkeypatch.setattr(Store, "reject", lambda *a: None)
    assert not Compiled(choose()).load(B8)

    again = Compiled(choose())

    assert not again.load(B8)
    assert again.choice.backend.opened == []
    assert "it was rejected on this machine before" in again.refused[B8].message
    manifest = again.selection.usable[B8][0]
    again.choice.store.entry_path(manifest).unlink()
    publish(choose(), B8, "wrong", gate={"version": gate.VERSION, "lengths": [2]})
    anew = Compiled(choose())
    assert not anew.load(B8)
    assert anew.choice.backend.opened == ["wrong"], "another build of it is tried"


# --- what ends the process --------------------------------------------------------------------------------------------


def in_a_child(function) -> int:
    """Run a function in a child of this process, and return the signal that ended it."""
    child = os.fork()
    if child == 0:
        try:
            function()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture
def crashed(choose, monkeypatch):
    """A bucket that ended the process which loaded it first."""
    publish(choose(), B8)
    publish(choose(), B16, "other code")

    def load() -> None:
        loader = Compiled(choose())
        loader.choice.backend.load = lambda *a: os.kill(os.getpid(), signal.SIGKILL)
        loader.load(B8)

    assert in_a_child(load) == -signal.SIGKILL


def crumb() -> Path:
    (path,) = node.listed(crumbs.FOLDER, "*.json")
    return path


def test_what_ended_the_process_that_loaded_it_is_not_loaded_by_the_next(crashed, choose):
    loader = Compiled(choose())

    assert not loader.load(B8)
    assert loader.choice.backend.opened == []
    assert "ended while it did" in loader.refused[B8].message
    assert "cache rm" in loader.refused[B8].hint
    assert str(crumb()) in loader.refused[B8].hint
    assert loader.load(B16), "others are"
    assert choose().store.glance(loader.selection.usable[B8][0]), "and elsewhere it may run: nothing is rejected"

    crumb().unlink()
    assert Compiled(choose()).load(B8)


@pytest.mark.parametrize("why", ["it is of yesterday", "the machine was started since", "it was cut off"])
def test_it_is_tried_again_when(crashed, choose, why):
    text = json.loads(crumb().read_text())
    if why == "it is of yesterday":
        crumb().write_text(json.dumps(text | {"time": text["time"] - 90_000}))
    elif why == "the machine was started since":
        crumb().write_text(json.dumps(text | {"boot": "another"}))
    else:
        crumb().write_text("")

    assert Compiled(choose()).load(B8)
    assert node.listed(crumbs.FOLDER, "*.json") == []


def test_a_crumb_is_on_disk_before_anything_is_loaded_and_gone_after(choose, monkeypatch):
    publish(choose(), B8)
    loader, seen, synced = Compiled(choose()), [], []
    load, fsync = loader.choice.backend.load, os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (synced.append(crumb().read_bytes()), fsync(descriptor)))
    loader.choice.backend.load = lambda *a: (seen.append(list(synced)), load(*a))[1]

    assert loader.load(B8)

    assert json.loads(seen[0][0])["format"] == 1
    assert node.listed(crumbs.FOLDER, "*.json") == []
    synced.clear()
    assert Compiled(choose()).load(B8)
    assert synced == [], "what was loaded before on this machine leaves none"


def test_two_that_load_it_at_once_do_not_take_each_other_for_dead(choose):
    publish(choose(), B8)
    outer, inner = Compiled(choose()), Compiled(choose())
    load, done = outer.choice.backend.load, []

    def meanwhile(*arguments):
        done.append(inner.load(B8))
        return load(*arguments)

    outer.choice.backend.load = meanwhile
    assert outer.load(B8)
    assert done == [True]


def test_what_raises_leaves_no_crumb(choose):
    publish(choose(), B8, "refuses")

    assert not Compiled(choose()).load(B8)
    assert node.listed(crumbs.FOLDER, "*.json") == []


def test_where_none_can_be_kept_it_is_loaded_all_the_same(choose, monkeypatch):
    publish(choose(), B8)
    monkeypatch.setattr(crumbs, "_held", lambda path: (_ for _ in ()).throw(OSError(30, "Read-only file system")))

    assert Compiled(choose()).load(B8)
