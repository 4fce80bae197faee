"""Whoever could have written a file, a directory or the way to it: what others could have written is never used."""

from __future__ import annotations

import os
import shlex
import stat
import subprocess
from pathlib import Path

import pytest
from store_kit import as_nobody, blob_path, files, healed, look, make, manifest_path, save, word

from nanogpt_buckets.errors import CacheError, TransientError, UntrustedStore
from nanogpt_buckets.plan.bucket import Bucket
from nanogpt_buckets.store.document import MAX_BYTES
from nanogpt_buckets.store.entry import Miss, Status
from nanogpt_buckets.store.plans import Plans
from nanogpt_buckets.store.prune import delete, plan_prune
from nanogpt_buckets.store.store import Store
from nanogpt_buckets.store.trust import check_all, check_location
from nanogpt_buckets.store.verify import verify
from nanogpt_buckets.store.vouch import Trust

STRANGER = 4321
FOLDERS = ("", "v1", "v1/entries", "v1/blobs", "v1/plans", "v1/locks", "v1/tmp")


@pytest.fixture
def entry(store):
    manifest, blobs = make("one")
    store.publish(manifest, blobs)
    save(store)
    with store.directory.locked(manifest.key, 0):
        return manifest


def spoil(path: Path, how: str) -> None:
    """Make a file or directory one that others could have written."""
    if how == "owner":
        os.chown(path, STRANGER, STRANGER)
    else:
        path.chmod(path.stat().st_mode | {"group": stat.S_IWGRP, "everyone": stat.S_IWOTH}[how])


@pytest.mark.parametrize("how", ["owner", "group", "everyone"])
@pytest.mark.parametrize("what", ["manifest", "blob", "plan", "mark"])
def test_a_planted_file_is_refused_though_every_directory_is_closed(store, entry, what, how):
    if what == "mark":
        store.reject(entry, "wrong")
    paths = {
        "manifest": manifest_path(store, entry),
        "blob": blob_path(store, entry.blobs[0]),
        "plan": store.root / "v1/plans/p.json",
        "mark": store.mark_path(entry),
    }
    spoil(paths[what], how)
    before = files(store)

    call = {"plan": lambda: Plans(store).load("p")}.get(what, lambda: store.publish(*make("two")))
    with pytest.raises(UntrustedStore) as caught:
        call()
    assert str(paths[what]) in caught.value.message
    assert caught.value.hint == f"delete it and build again: rm -r {store.root}"
    assert (word(look(store, entry)) == Status.UNTRUSTED) == (what != "plan")
    assert [p.path for p in verify(store).problems if Path(p.path).name == paths[what].name] or what == "mark"
    with pytest.raises(UntrustedStore, match=paths[what].name):
        check_all(store.root)
    delete(store, plan_prune(store, older_than_s=0))
    assert files(store).keys() >= before.keys() - {"v1/plans/p.json"} or what == "plan"


def test_a_plan_that_others_could_have_written_keeps_everything(store, entry):
    spoil(store.root / "v1/plans/p.json", "owner")

    pins = Plans(store).pins()

    assert pins.keep(entry.family, Bucket(1, 1))
    assert "belongs to user 4321" in pins.notes[0]
    assert plan_prune(store, older_than_s=0).entries == 0


@pytest.mark.parametrize("how", ["owner", "group", "everyone", "link"])
@pytest.mark.parametrize("where", FOLDERS[1:])
def test_each_directory_is_refused_by_whoever_reads_or_writes(store, entry, where, how, tmp_path):
    folder = store.root / where
    if how == "link":
        folder.rename(tmp_path / "elsewhere")
        folder.symlink_to(tmp_path / "elsewhere")
    else:
        spoil(folder, how)

    assert look(store, entry).status is Status.UNTRUSTED
    assert [answer.status for answer in store.family(entry.family)] == [Status.UNTRUSTED]
    calls = [
        lambda: store.publish(*make("two")),
        lambda: store.publish(*make("two", name="other")),
        store.directory.prepare,
        lambda: list(store.entries()),
        lambda: store.read_blob(entry.blobs[0]),
        lambda: Plans(store).load("p"),
        lambda: save(store),
        lambda: plan_prune(store),
        lambda: verify(store),
        lambda: check_all(store.root),
    ]
    for call in calls:
        with pytest.raises(UntrustedStore, match=f"{folder} ") as caught:
            call()
        assert caught.value.hint.startswith("delete it and build again: rm -r ")
    with store.directory.locked(entry.key, 0) as held:
        assert not held
    subprocess.run(caught.value.hint.partition(": ")[2], shell=True, check=True)
    healed(store, *make("two"))


@pytest.mark.parametrize("where", ["entries", "blobs"])
def test_a_family_or_a_folder_of_blobs_that_leads_elsewhere_is_refused(store, entry, where, tmp_path):
    path = manifest_path(store, entry) if where == "entries" else blob_path(store, entry.blobs[0])
    path.parent.rename(tmp_path / "elsewhere")
    path.parent.symlink_to(tmp_path / "elsewhere")
    before = sorted(os.listdir(tmp_path / "elsewhere"))

    assert look(store, entry).status is Status.UNTRUSTED
    with pytest.raises(UntrustedStore):
        store.publish(*make("two"))
    with pytest.raises(UntrustedStore):
        plan_prune(store, older_than_s=0)
    assert sorted(os.listdir(tmp_path / "elsewhere")) == before


@pytest.mark.parametrize("name", ["tmp", "locks"])
def test_prune_and_publish_empty_no_directory_behind_a_link(store, entry, name, tmp_path):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "precious").write_text("x")
    os.utime(theirs / "precious", (1, 1))
    for file in (store.root / "v1" / name).iterdir():
        file.unlink()
    (store.root / "v1" / name).rmdir()
    (store.root / "v1" / name).symlink_to(theirs)

    for call in (lambda: plan_prune(store), lambda: store.publish(*make("x", name="b"))):
        with pytest.raises(UntrustedStore, match="symbolic link"):
            call()
    assert (theirs / "precious").exists()


def test_a_lock_that_is_a_link_leaves_what_it_leads_to_alone(store, entry, tmp_path):
    lock = store.root / "v1/locks" / f"{entry.key}.lock"
    lock.unlink()
    (tmp_path / "precious").write_text("x")
    lock.symlink_to(tmp_path / "precious")

    with store.directory.locked(entry.key, 0) as held:
        assert not held
    assert (tmp_path / "precious").read_text() == "x"


@pytest.mark.parametrize("where", ["v1", "v1/entries", "v1/tmp"])
def test_a_file_in_place_of_a_directory_is_said_to_be_one(store, where):
    path = store.root / where
    path.parent.mkdir(mode=0o700, parents=True)
    store.root.chmod(0o700)
    path.write_text("x")

    manifest, blobs = make("one")
    assert store.look(manifest.family, manifest.key).why == f"{path} is not a directory"
    with pytest.raises(CacheError, match=f"{path} is not a directory") as caught:
        store.publish(manifest, blobs)
    subprocess.run(caught.value.hint.partition(": ")[2], shell=True, check=True)
    healed(store, manifest, blobs)


@pytest.mark.parametrize("how", ["group", "everyone"])
def test_an_empty_directory_that_others_can_write_is_said_to_be_one_by_all(store, how):
    store.root.mkdir(0o700)
    spoil(store.root, how)
    manifest, blobs = make("one")

    said = {answer.why for answer in store.family(manifest.family)} | {store.look(manifest.family, manifest.key).why}
    with pytest.raises(UntrustedStore) as caught:
        store.publish(manifest, blobs)
    who = "its group" if how == "group" else "everyone"
    assert (
        said
        == {caught.value.message}
        == {f"{store.root} can be written by {who}, who could have written the native code in it"}
    )


def test_a_directory_that_holds_other_things_is_not_to_be_deleted(store):
    store.root.mkdir()
    (store.root / "thesis.tex").touch()
    spoil(store.root, "everyone")

    with pytest.raises(UntrustedStore) as caught:
        store.directory.prepare()
    assert "rm -r" not in caught.value.hint


# the way to the directory


def way(tmp_path: Path, mode: int, owner: int = 0) -> Store:
    (tmp_path / "above" / "between").mkdir(parents=True)
    (tmp_path / "above").chmod(mode)
    os.chown(tmp_path / "above", owner, owner)
    return Store(tmp_path / "above" / "between" / "cache")


@pytest.mark.parametrize(("mode", "owner"), [(0o777, 0), (0o770, 0), (0o757, 0), (0o755, STRANGER), (0o1777, STRANGER)])
@pytest.mark.parametrize("built", [True, False])
def test_a_way_on_which_others_can_exchange_directories_is_refused(tmp_path, mode, owner, built):
    store = way(tmp_path, 0o755)
    manifest, blobs = make("one")
    if built:
        store.publish(manifest, blobs)
    (tmp_path / "above").chmod(mode)
    os.chown(tmp_path / "above", owner, owner)

    assert look(store, manifest).status is Status.UNTRUSTED
    for call in (lambda: store.publish(*make("two")), store.directory.prepare, lambda: check_all(store.root)):
        with pytest.raises(UntrustedStore, match=f"{tmp_path / 'above'} ") as caught:
            call()
        assert "--cache-dir" in caught.value.hint
    assert store.root.exists() == built


@pytest.mark.parametrize("mode", [0o1777, 0o1775, 0o755, 0o711])
def test_a_way_like_tmp_is_fine(tmp_path, mode):
    healed(way(tmp_path, mode), *make("one"))


def test_links_on_the_way_are_followed_if_nobody_else_made_them(tmp_path):
    store = way(tmp_path, 0o1777)
    (tmp_path / "above" / "link").symlink_to("between")
    linked = Store(tmp_path / "above" / "link" / "cache")
    healed(linked, *make("one"))
    assert word(look(store, make("one")[0])) == "verified"
    (tmp_path / "direct").symlink_to(store.root)
    assert word(look(Store(tmp_path / "direct"), make("one")[0])) == "verified"

    os.chown(tmp_path / "above" / "link", STRANGER, STRANGER, follow_symlinks=False)
    assert look(linked, make("one")[0]).status is Status.UNTRUSTED


def test_a_link_may_not_lead_through_a_place_that_others_can_write(tmp_path):
    store = way(tmp_path, 0o755)
    store.publish(*make("one"))
    (tmp_path / "open").mkdir()
    (tmp_path / "open" / "second").symlink_to(store.root)
    (tmp_path / "first").symlink_to("open/second")
    linked = Store(tmp_path / "first")
    assert word(look(linked, make("one")[0])) == "verified"

    (tmp_path / "open").chmod(0o777)
    with pytest.raises(UntrustedStore, match=f"{tmp_path / 'open'} can be written by everyone"):
        linked.publish(*make("one"))


def test_links_in_a_circle_are_one_sentence(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(CacheError, match="too many symbolic links"):
        Store(tmp_path / "a" / "cache").directory.prepare()


@pytest.mark.parametrize("name", ["lstat", "readlink"])
def test_a_way_that_cannot_be_examined_this_time_is_transient_from_its_beginning_on(tmp_path, monkeypatch, name):
    (tmp_path / "link").symlink_to(tmp_path / "cache")
    store = Store(tmp_path / "link")
    manifest, blobs = make("one")
    with monkeypatch.context() as patch:
        patch.setattr(os, name, lambda *_, **__: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        assert look(store, manifest).status is Status.TRANSIENT
        with pytest.raises(TransientError, match="cannot be examined: Input/output error"):
            store.publish(manifest, blobs)


OWN_GROUP = """
from types import SimpleNamespace as Row
from nanogpt_buckets.store.trust import check_location
root = Path(sys.argv[1])
root.parent.chmod(0o775)
for name, group, members in (("me", "me", []), ("me", "me", ["me"]), ("me", "me", ["she"]), ("me", "staff", [])):
    pwd.getpwuid = lambda uid: Row(pw_name=name)
    grp.getgrgid = lambda gid: Row(gr_name=group, gr_mem=members)
    try:
        check_location(root)
        print("believed")
    except CacheError as error:
        print("refused")
"""


def test_a_group_of_ones_own_is_nobody_else(open_path):
    """Many systems give each user a group of that name, and a umask of 002."""
    (open_path / "home").mkdir()
    os.chown(open_path / "home", 65534, 65534)

    assert as_nobody(OWN_GROUP, open_path / "home" / "cache").split() == ["believed", "believed", "refused", "refused"]


def test_roots_shared_cache_is_read_by_another_user_and_not_if_planted_in(open_path):
    root = open_path / "cache"
    root.mkdir()
    root.chmod(0o755)
    manifest, blobs = make("one")
    Store(root).publish(manifest, blobs)
    code = """
store = Store(Path(sys.argv[1]))
manifest, blobs = make("one")
answer = store.check(store.look(manifest.family, manifest.key))
print(getattr(answer, "status", "verified"), getattr(answer, "hint", None))
"""
    assert as_nobody(code, root) == "verified None\n"
    os.chown(manifest_path(Store(root), manifest), STRANGER, STRANGER)
    assert as_nobody(code, root).startswith("untrusted use a directory of your own")


def test_the_hint_can_be_pasted_whatever_the_name(tmp_path):
    store = Store(tmp_path / "my cache; touch x")
    store.publish(*make("one"))
    store.root.chmod(0o777)
    with pytest.raises(UntrustedStore) as caught:
        check_location(store.root)
    assert caught.value.hint.endswith(shlex.quote(str(store.root)))


PLANTED = {
    "nothing": lambda path: None,
    "a stranger's": lambda path: os.chown(path, STRANGER, STRANGER),
    "open to all": lambda path: path.chmod(0o666),
    "a link": lambda path: path.symlink_to(path.rename(path.with_suffix(".moved"))),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "a directory": lambda path: (path.unlink(), path.mkdir()),
    "too long": lambda path: os.truncate(path, MAX_BYTES + 1),
    "shorter": lambda path: os.truncate(path, 20),
    "unreadable": lambda path: path.chmod(0),
}


@pytest.mark.parametrize("looks", [False, True])
def test_a_family_is_what_its_entries_are_one_by_one(store, looks):
    for planted in PLANTED:
        store.publish(*make("one", name=planted))
    family = make("one")[0].family
    rejected = make("one", name="rejected")[0]
    store.publish(*make("one", name="rejected"))
    store.reject(rejected, "wrong")
    for planted, plant in PLANTED.items():
        plant(manifest_path(store, make("one", name=planted)[0]))

    fresh = Store(store.root, trust=Trust(looks=looks))
    found = fresh.family(family)

    assert {entry.key for entry in found} >= {make("one", name=planted)[0].key for planted in (*PLANTED, "rejected")}
    assert found == [Store(store.root, trust=Trust(looks=looks)).look(family, entry.key) for entry in found]
    kinds = {entry.status.value if isinstance(entry, Miss) else "listed" for entry in found}
    assert kinds == {"listed", "corrupt"} if looks else {"listed", "corrupt", "untrusted"}
