"""Deleting is planned, shown and done in an order that never leaves an entry without its blobs; plans keep theirs."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest

from nanogpt_buckets import key as keys
from nanogpt_buckets.errors import CacheError, UntrustedStore, UsageError
from nanogpt_buckets.plan.bucket import Bucket, Plan
from nanogpt_buckets.store import prune
from nanogpt_buckets.store.entry import Miss, Status
from nanogpt_buckets.store.lockfile import write_lock
from nanogpt_buckets.store.manifest import Blob, Manifest
from nanogpt_buckets.store.plans import Plans, SavedPlan
from nanogpt_buckets.store.prune import delete, plan_prune, plan_removal
from nanogpt_buckets.store.store import Store
from nanogpt_buckets.store.verify import verify

DAY = 86400


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "cache")


def publish(store, seq_len, *, torch="2.13.0", content=None, days_unused=0.0) -> Manifest:
    data = content or f"library {seq_len} {torch} ".encode() * 50
    family = {"backend": "inductor", "runtime": {"torch": torch}}
    parts = {"family": family, "bucket": Bucket(1, seq_len).to_json(), "target": "t", "compiler": {}}
    manifest = Manifest(
        family=keys.digest(family), key=keys.digest(parts), parts=parts,
        blobs=(Blob("library", hashlib.sha256(data).hexdigest(), len(data)),), inputs=(), outputs=(), weights=(),
        requires={}, contains_weights=False, stats={}, gate={},
    )  # fmt: skip
    store.publish(manifest, {"library": data})
    age(store.entry_path(manifest), days_unused)
    return manifest


def age(path: Path, days: float) -> None:
    os.utime(path, (time.time() - days * DAY,) * 2)


def keep(store, *manifests, name="demo") -> None:
    saved = SavedPlan(Plan([m.bucket for m in manifests]), frozenset(m.family for m in manifests))
    Plans(store).change(name, lambda before: saved)


def left(store) -> set[str]:
    return {answer.key for answer in store.entries()}


def names(deletion, what="entry") -> list[str]:
    return [file.name for file in deletion.files if file.what == what]


def test_a_plan_of_deletion_changes_nothing_and_says_what_it_frees(store):
    entry = publish(store, 16)
    before = sorted(p for p in store.root.rglob("*"))

    deletion = plan_removal(store, [entry.key[:8]])

    assert sorted(p for p in store.root.rglob("*")) == before
    manifest_bytes = store.entry_path(entry).stat().st_size
    assert deletion.bytes == manifest_bytes + entry.blobs[0].size
    assert deletion.entries == 1
    assert delete(store, deletion) == deletion.bytes
    assert left(store) == set()
    assert store.blob_paths() == []


def test_entries_go_before_blobs(store):
    publish(store, 16), publish(store, 32)

    kinds = [file.what for file in plan_prune(store, older_than_s=0).files]

    assert kinds == ["entry", "entry", "blob", "blob"]


def test_a_blob_that_another_entry_uses_stays(store):
    first, second = publish(store, 16, content=b"shared" * 99), publish(store, 32, content=b"shared" * 99)

    delete(store, plan_removal(store, [first.key]))

    assert left(store) == {second.key}
    assert verify(store).problems == ()


@pytest.mark.parametrize(("prefix", "kind"), [("", UsageError), ("XYZ", UsageError), ("../..", UsageError)])
def test_what_is_no_beginning_of_a_key_is_refused(store, prefix, kind):
    publish(store, 16)

    with pytest.raises(kind):
        plan_removal(store, [prefix])


def test_an_ambiguous_or_unknown_beginning_is_refused_with_the_candidates(store):
    entries = [publish(store, seq) for seq in range(1, 18)]  # more than there are first digits
    first = next(e.key[0] for e in entries if sum(o.key[0] == e.key[0] for o in entries) > 1)

    with pytest.raises(UsageError, match="entries begin with") as ambiguous:
        plan_removal(store, [first])
    assert ambiguous.value.hint.count(",") >= 1
    with pytest.raises(CacheError, match="no entry"):
        plan_removal(store, ["0" * 64])


def test_what_is_removed_by_name_goes_out_of_every_plan(store):
    entry, other = publish(store, 16), publish(store, 32)
    keep(store, entry, other)
    keep(store, entry, name="second")
    assert Plans(store).pins().buckets[entry.family, entry.bucket] == ["demo", "second"]

    deletion = plan_removal(store, [entry.key])
    assert deletion.notes == ("bucket 1x16 goes out of plan demo", "bucket 1x16 goes out of plan second")
    assert Plans(store).names() == ["demo", "second"], "planning changes nothing"
    delete(store, deletion)

    assert list(Plans(store).load("demo").buckets) == [other.bucket]
    assert Plans(store).names() == ["demo"], "an empty plan goes"
    assert (entry.family, entry.bucket) not in Plans(store).pins().buckets


def test_age_takes_what_was_neither_built_nor_loaded_and_no_plan_names(store):
    old, kept, young = publish(store, 16, days_unused=40), publish(store, 32, days_unused=40), publish(store, 64)
    keep(store, kept)

    deletion = plan_prune(store, older_than_s=30 * DAY)

    assert names(deletion) == [old.key]
    delete(store, deletion)
    assert left(store) == {kept.key, young.key}
    assert verify(store).problems == ()


def test_a_load_makes_an_entry_young(store):
    entry = publish(store, 16, days_unused=40)

    store.mark_used(entry)

    assert plan_prune(store, older_than_s=30 * DAY).files == ()


def test_size_takes_the_longest_unused_first_until_the_rest_fits(store):
    entries = [publish(store, seq, content=bytes([seq]) * 1000, days_unused=9 - seq) for seq in (1, 2, 3, 4)]
    keep(store, entries[0])

    deletion = plan_prune(store, max_bytes=2500)

    assert names(deletion) == sorted(e.key for e in entries[1:3])
    assert plan_prune(store, max_bytes=4000).files == ()


def test_size_that_plans_do_not_allow_is_said(store):
    keep(store, publish(store, 16, content=b"x" * 1000))

    deletion = plan_prune(store, max_bytes=10)

    assert deletion.files == ()
    assert deletion.notes[0].startswith("0.0 MB are in plans (--planned deletes those too) or cannot be judged")


def test_planned_entries_go_by_age_and_size_if_that_is_said(store):
    old, young = publish(store, 16, content=b"x" * 1000, days_unused=40), publish(store, 32, content=b"y" * 1000)
    keep(store, old, young)

    assert names(plan_prune(store, older_than_s=30 * DAY, planned=True)) == [old.key]
    assert names(plan_prune(store, max_bytes=1500, planned=True)) == [old.key]
    assert sorted(names(plan_prune(store, max_bytes=0, planned=True))) == sorted([old.key, young.key])
    assert Plans(store).load("demo") is not None


def test_old_toolchains_go_even_from_plans_and_newer_ones_stay(store):
    old, newer = publish(store, 16, torch="1.0"), publish(store, 16, torch="999.0")
    keep(store, old, newer)

    deletion = plan_prune(store, old_toolchains=True)

    assert names(deletion) == [old.key]
    assert deletion.files[0].why.startswith("made for torch 1.0, 2.")
    assert plan_prune(store).files == ()


@pytest.mark.parametrize("damage", ["missing blob", "short blob", "flipped byte", "manifest"])
def test_damaged_entries_always_go_and_take_nothing_sound_along(store, damage):
    broken, sound = publish(store, 16), publish(store, 32)
    keep(store, broken)
    blob, manifest = store.blob_path(broken.blobs[0].sha256), store.entry_path(broken)
    if damage == "missing blob":
        blob.unlink()
    elif damage == "short blob":
        blob.chmod(0o600)
        blob.write_bytes(b"x")
    elif damage == "flipped byte":
        blob.chmod(0o600)
        blob.write_bytes(bytes([blob.read_bytes()[0] ^ 1]) + blob.read_bytes()[1:])
    else:
        manifest.write_bytes(b"{}")

    delete(store, plan_prune(store))

    assert left(store) == {sound.key}
    assert verify(store).problems == ()


def test_what_a_newer_release_wrote_keeps_every_blob(store):
    old = publish(store, 16, days_unused=40)
    theirs = store.entry_path(Miss(Status.ABSENT, "f" * 64, "e" * 64))
    body = {"format": 2, "anything": "new"}
    theirs.parent.mkdir(mode=0o700)
    digest = hashlib.sha256(keys.canonical_json(body)).hexdigest()
    theirs.write_bytes(keys.canonical_json({"sha256": digest, "body": body}) + b"\n")

    deletion = plan_prune(store, older_than_s=30 * DAY)

    assert names(deletion) == [old.key]
    assert names(deletion, "blob") == []
    assert deletion.notes == ("all blobs stay: 1 of the entries cannot be read by this release and may need them",)


def test_blobs_without_an_entry_go_once_no_builder_can_be_about_to_name_them(store):
    entry = publish(store, 16)
    blob = store.blob_path(entry.blobs[0].sha256)
    store.entry_path(entry).unlink()

    assert plan_prune(store).files == ()
    age(blob, 0.1)
    assert [file.path for file in plan_prune(store).files] == [blob]


def test_what_killed_processes_left_goes_after_a_day(store):
    publish(store, 16)
    staged = store.root / "v1" / "tmp" / "half-written"
    staged.write_bytes(b"half")

    assert plan_prune(store).files == ()
    age(staged, 1.1)
    assert [(file.what, file.name) for file in plan_prune(store).files] == [("leftover", "half-written")]


def test_what_is_used_after_the_plan_was_made_stays(store):
    entry = publish(store, 16, days_unused=40)
    deletion = plan_prune(store, older_than_s=30 * DAY)

    store.mark_used(entry)
    delete(store, deletion)

    assert left(store) == {entry.key}


def test_two_prunes_at_once_are_no_error(store):
    publish(store, 16, days_unused=40)
    first, second = (plan_prune(store, older_than_s=DAY) for _ in range(2))

    assert delete(store, first) == first.bytes
    assert delete(store, second) == 0


def test_a_store_that_others_can_write_is_not_touched(store):
    entry = publish(store, 16)
    store.root.chmod(0o777)

    for plan in (lambda: plan_prune(store), lambda: plan_removal(store, [entry.key])):
        with pytest.raises(UntrustedStore):
            plan()


def test_a_damaged_plan_keeps_nothing_and_is_named(store):
    keep(store, publish(store, 16, days_unused=40))
    (store.root / "v1" / "plans" / "demo.json").write_bytes(b"{")

    deletion = plan_prune(store, older_than_s=DAY)

    assert deletion.entries == 1
    assert deletion.notes[0].startswith(f"plan demo in {store.root} is damaged: it is not plain JSON")
    assert deletion.notes[0].endswith("; it keeps nothing")
    assert Plans(store).pins().buckets == {}


def test_each_file_is_told_when_it_is_done(store):
    publish(store, 16)
    told = []

    delete(store, plan_prune(store, older_than_s=0), on_file=told.append)

    assert [file.what for file in told] == ["entry", "blob"]


# lock files


def test_what_a_lock_file_names_stays_whatever_else_is_asked_unless_it_is_damaged(store, tmp_path, monkeypatch):
    locked, free = publish(store, 8, torch="2.9.0", days_unused=9), publish(store, 16, torch="2.9.0", days_unused=9)
    monkeypatch.setattr(prune, "installed", lambda library: "2.13.0")
    asked = {"older_than_s": DAY, "max_bytes": 0, "old_toolchains": True, "planned": True}
    assert set(names(plan_prune(store, **asked))) == {locked.key, free.key}
    locks = [write_lock(tmp_path / "buckets.lock", [locked], lambda parts: False)]

    kept = plan_prune(store, locks=locks, **asked)
    assert names(kept) == [free.key]
    assert "are locked" in kept.notes[-1]

    path = store.blob_path(locked.blobs[0].sha256)
    path.chmod(0o600)
    path.write_bytes(b"x")
    assert set(names(plan_prune(store, locks=locks, **asked))) == {locked.key, free.key}
