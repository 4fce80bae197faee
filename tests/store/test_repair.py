"""What is damaged is mended from layers or taken away, so that all is in order; nothing else is touched."""

from __future__ import annotations

import errno
import hashlib
import os
from dataclasses import replace

import pytest
from store_kit import blob_path, files, healed, look, make, manifest_path, save, spoil

from nanogpt_buckets import key as keys
from nanogpt_buckets.errors import CacheError
from nanogpt_buckets.store import prune
from nanogpt_buckets.store.entry import Miss, Status, Verified
from nanogpt_buckets.store.plans import Plans
from nanogpt_buckets.store.repair import Repair, plan_repair, repair
from nanogpt_buckets.store.store import Store
from nanogpt_buckets.store.verify import verify


@pytest.fixture
def layer(tmp_path, entry) -> Store:
    """A layer that has the entry, in order."""
    layer = Store(tmp_path / "layer")
    layer.publish(*make("one"))
    return layer


def planned(store: Store, *layers: Store) -> tuple[Store, Repair]:
    below = Store(store.root, layers=[layer.root for layer in layers])
    return below, plan_repair(store, below, verify(store))


def mend(store: Store, *layers: Store) -> Repair:
    below, plan = planned(store, *layers)
    repair(store, below, plan)
    return plan


DAMAGE = {
    "manifest cut": lambda store, entry: spoil(manifest_path(store, entry), b"{"),
    "manifest of another": lambda store, entry: spoil(
        manifest_path(store, entry), keys.canonical_json({"sha256": "x"})
    ),
    "blob gone": lambda store, entry: blob_path(store, entry.blobs[0]).unlink(),
    "blob cut": lambda store, entry: spoil(blob_path(store, entry.blobs[0]), b"x"),
    "blob flipped": lambda store, entry: spoil(blob_path(store, entry.blobs[1]), b"x" * entry.blobs[1].size),
    "both blobs": lambda store, entry: [spoil(blob_path(store, blob), b"x") for blob in entry.blobs],
    "all of it": lambda store, entry: [
        spoil(path, b"x") for path in (manifest_path(store, entry), *(blob_path(store, b) for b in entry.blobs))
    ],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_a_layer_has_in_order_is_written_anew(store, entry, layer, damage):
    store.publish(*make("two", name="b"))
    before, below = files(store), files(layer)
    DAMAGE[damage](store, entry)

    plan = mend(store, layer)

    assert (plan.mended, plan.deletion.files) == ((entry,), ())
    assert files(store) == before
    assert files(layer) == below
    assert not planned(store, layer)[1]


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("below", ["nothing", "the same damage", "open to others"])
def test_what_no_layer_has_is_taken_away_and_built_again(store, entry, layer, damage, below):
    sound = make("two", name="b")
    store.publish(*sound)
    DAMAGE[damage](store, entry)
    if below == "the same damage":
        DAMAGE[damage](layer, entry)
    elif below == "open to others":
        layer.root.chmod(0o777)

    plan = mend(store, *([] if below == "nothing" else [layer]))

    assert (plan.mended, plan.deletion.entries) == ((), 1)
    assert plan.deletion.files[0].why.startswith("damaged: ")
    assert list(store.entries()) == [sound[0]]
    assert verify(store).problems == ()
    healed(store, *make("one"))


def test_one_damaged_blob_takes_or_mends_every_entry_that_names_it(store, entry, layer):
    other = replace(make("one", name="b")[0], blobs=entry.blobs)
    store.publish(other, make("one")[1])
    layer.publish(other, make("one")[1])
    spoil(blob_path(store, entry.blobs[0]), b"x")

    assert {mended.key for mended in planned(store, layer)[1].mended} == {entry.key, other.key}
    assert {file.name for file in planned(store)[1].deletion.files if file.what == "entry"} == {entry.key, other.key}
    mend(store, layer)
    assert verify(store).problems == ()


def test_a_damaged_blob_that_no_entry_names_is_taken_away_and_a_sound_one_is_left(store, entry):
    lost = [b"sound" * 9, b"damaged"]
    for data in lost:
        path = store.blob_path(hashlib.sha256(data).hexdigest())
        path.parent.mkdir(exist_ok=True, mode=0o700)
        path.write_bytes(data)
    spoil(path, b"x")

    plan = mend(store)

    assert [(file.what, file.path) for file in plan.deletion.files] == [("blob", path)]
    assert verify(store).problems == ()
    assert len(store.blob_paths()) == len(entry.blobs) + 1


def test_a_damaged_plan_is_taken_away_and_a_newer_one_is_not(store, entry):
    save(store)
    path = store.root / "v1/plans/p.json"
    spoil(path, b"{")
    newer = path.with_name("newer.json")
    newer.write_bytes(b'{"format":2}')

    plan = mend(store)

    assert [(file.what, file.name) for file in plan.deletion.files] == [("plan", "p")]
    assert Plans(store).names() == ["newer"]
    assert verify(store).problems == ()


def test_what_a_newer_release_wrote_stays_and_so_does_every_blob(store, entry):
    theirs = store.entry_path(Miss(Status.ABSENT, entry.family, "e" * 64))
    body = keys.canonical_json({"format": 2, "anything": "new"})
    theirs.write_bytes(b'{"body":%b,"sha256":"%b"}\n' % (body, hashlib.sha256(body).hexdigest().encode()))
    spoil(blob_path(store, entry.blobs[0]), b"x")

    plan = mend(store)

    assert [file.what for file in plan.deletion.files] == ["entry"]
    assert plan.deletion.notes[0].startswith("all blobs stay: 1 of the entries cannot be read by this release")
    assert theirs.exists()
    assert len(store.blob_paths()) == 2
    assert [problem.path for problem in verify(store).problems] == [
        blob_path(store, entry.blobs[0]).relative_to(store.root).as_posix()
    ]


@pytest.mark.parametrize("what", ["manifest", "blob"])
@pytest.mark.parametrize("how", ["cannot be read", "others can write"])
def test_what_is_not_damage_stays_as_it_is(store, entry, layer, monkeypatch, what, how):
    path = manifest_path(store, entry) if what == "manifest" else blob_path(store, entry.blobs[0])
    before = files(store)
    if how == "others can write":
        path.chmod(0o666)
    else:
        inode, read = path.stat().st_ino, os.read

        def fail(descriptor: int, length: int) -> bytes:
            if os.fstat(descriptor).st_ino == inode:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return read(descriptor, length)

        monkeypatch.setattr(os, "read", fail)

    result = verify(store)
    plan = mend(store, layer)
    monkeypatch.undo()

    assert result.problems
    assert {problem.status for problem in result.problems} == {
        Status.UNTRUSTED if how == "others can write" else Status.TRANSIENT
    }
    assert not plan
    assert files(store) == before


def test_what_was_rejected_here_is_not_taken_from_a_layer_unless_that_has_another_build(store, entry, layer, tmp_path):
    store.reject(entry, "it computes something else")
    assert planned(store, layer)[1].deletion.entries == 1

    another = Store(tmp_path / "another")
    other = replace(entry, stats={"compile_ms": 2})
    another.publish(other, make("one")[1])

    assert mend(store, layer, another).mended == (other,)
    assert isinstance(look(store, entry), Verified)
    assert verify(store).problems == ()


@pytest.mark.parametrize("layered", [True, False])
def test_what_was_built_again_after_the_plan_was_made_stays(store, entry, layer, layered):
    spoil(blob_path(store, entry.blobs[0]), b"x")
    below, plan = planned(store, *([layer] if layered else []))
    store.publish(*make("one"))
    before = files(store)

    repair(store, below, plan)

    assert files(store) == before


def test_a_failure_stops_nothing_else_and_is_said(store, entry, layer, monkeypatch):
    store.publish(*make("two", name="b"))
    for path in store.blob_paths():
        spoil(path, b"x")
    below, plan = planned(store, layer)
    steps = []
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
        with pytest.raises(CacheError, match="No space left"):
            repair(store, below, plan, on_step=lambda: steps.append(1))

    assert len(steps) == len(plan.mended) + len(plan.deletion.files)
    assert [found.key for found in store.entries()] == [entry.key]
    mend(store, layer)
    assert list(store.entries()) == [entry]
    assert verify(store).problems == ()


def test_what_was_taken_away_by_another_meanwhile_is_no_error(store, entry):
    spoil(manifest_path(store, entry), b"{")
    below, plan = planned(store)
    prune.delete(store, prune.plan_prune(store))

    repair(store, below, plan)

    assert list(store.entries()) == []
