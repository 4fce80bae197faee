"""Family 9: an older and a newer release on one directory, in both directions, for every kind of file.

The newer one is this one with a format more, or with a field or a word that this one does not know. The older one
names what it does not understand, and neither replaces nor prunes it, nor what it may need; the newer one reads what
the older one wrote.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from store_kit import manifest_path

from chaos.kit import Tally, Task, build, carried_out, contents, load, mended, plan, publish, sound, started, whole
from nanogpt_buckets import key as keys
from nanogpt_buckets import node
from nanogpt_buckets.errors import BucketsError, IncompatibleEntry
from nanogpt_buckets.node import prune as node_prune
from nanogpt_buckets.node.records import COSTS, FAILURES, LAST_RUN, MARKS, SOURCES, TRAFFIC, VERIFIED, Kind
from nanogpt_buckets.store import lockfile, manifest
from nanogpt_buckets.store.entry import Miss, Status, Verified
from nanogpt_buckets.store.lockfile import read_lock, write_lock
from nanogpt_buckets.store.manifest import decode, encode
from nanogpt_buckets.store.plans import Plans
from nanogpt_buckets.store.prune import delete, plan_prune
from nanogpt_buckets.store.store import Store
from nanogpt_buckets.store.verify import verify

MINE, OTHER, LATER, THEIRS = build("mine"), build("other", 16), build("later", 32), build("theirs")
KINDS = {"failures": FAILURES, "last run": LAST_RUN, "checks": MARKS, "sources": SOURCES, "verified": VERIFIED}
KINDS |= {"traffic": TRAFFIC, "costs": COSTS}
Change = Callable[[dict[str, Any]], object]
# How a newer release's file differs.
NEWER: dict[str, Change] = {
    "a format more": lambda document: document.update(format=document["format"] + 1),
    "a field more": lambda document: document.update(signed="by somebody"),
    "a format and a field more": lambda document: document.update(format=99, signed={"by": ["x"]}),
}


def run(task: Task) -> Iterator[Tally]:
    for what, cases in (
        ("an older release beside a newer manifest", _manifests),
        ("an older release beside a newer mark", _marks),
        ("an older release beside a newer plan", _plans),
        ("an older release beside a newer lock file", _locks),
        ("an older release beside newer records of the node", _records),
        ("an older release beside newer kinds of files", _unknown),
        ("a newer release beside older files", _older),
    ):
        tally = Tally(9, what)
        for name, case in cases(task).items():
            with tally.case(name):
                carried_out(started(case))
        yield tally


def _sealed(body: dict[str, Any]) -> bytes:
    return keys.canonical_json({"body": body, "sha256": sha256(keys.canonical_json(body)).hexdigest()}) + b"\n"


def _store(task: Task) -> Store:
    store = Store(task.room("cache"))
    publish(store, MINE, OTHER)
    return store


def _old(root: Path) -> None:
    """Make everything look as if it had not been used for long."""
    for path in root.rglob("*"):
        if path.is_file():
            os.utime(path, (1, 1))


def _all_an_older_release_does(store: Store) -> None:
    """Do whatever replaces or deletes, to everything."""
    for each in (MINE, OTHER, THEIRS):
        try:
            publish(store, each)
            store.reject(each.manifest, "wrong") if each is OTHER else None
        except IncompatibleEntry:
            continue
    publish(store, LATER)
    with contextlib.suppress(IncompatibleEntry):
        plan(store, LATER)
    _old(store.root)
    delete(store, plan_prune(store, older_than_s=1, max_bytes=0, planned=True, old_toolchains=True))


# --- newer files ------------------------------------------------------------------------------------------------------


def _manifests(task: Task) -> dict[str, Callable[[], None]]:
    def step(body: dict[str, Any]) -> None:
        body["parts"]["bucket"] = {"step": "dream", "batch_size": 1, "seq_len": 8}
        body["key"] = keys.digest(body["parts"])

    def case(change: Change) -> None:
        store = _store(task)
        body = json.loads(encode(MINE.manifest))["body"]
        change(body)
        path = store.directory.path(f"entries/{body['family']}/{body['key']}.json")
        path.write_bytes(_sealed(body))
        if body["key"] != MINE.manifest.key:
            manifest_path(store, MINE.manifest).unlink()
        kept = path.read_bytes()
        found = store.look(body["family"], body["key"])
        known = body["key"] != MINE.manifest.key  # a step that is unknown here is no reason not to list it
        assert known or (isinstance(found, Miss) and found.status is Status.INCOMPATIBLE), found
        assert known or not isinstance(load(store, MINE.manifest, MINE), Verified)
        assert verify(store).problems == ()
        _all_an_older_release_does(store)
        assert path.read_bytes() == kept, "a newer manifest was replaced"
        for blob in MINE.manifest.blobs:
            assert store.blob_path(blob.sha256).exists(), "a library that a newer manifest may need is gone"

    return {name: lambda change=change: case(change) for name, change in {**NEWER, "a step more": step}.items()}


def _marks(task: Task) -> dict[str, Callable[[], None]]:
    def case(change: Change) -> None:
        store = _store(task)
        store.reject(MINE.manifest, "wrong")
        path = store.mark_path(MINE.manifest)
        mark = json.loads(path.read_bytes())
        change(mark)
        path.write_bytes(keys.canonical_json(mark) + b"\n")
        kept = path.read_bytes(), manifest_path(store, MINE.manifest).read_bytes()
        found = load(store, MINE.manifest)  # nothing at all may be loaded
        assert isinstance(found, Miss), found
        assert found.status is Status.INCOMPATIBLE
        _all_an_older_release_does(store)
        assert (path.read_bytes(), manifest_path(store, MINE.manifest).read_bytes()) == kept

    return {name: lambda change=change: case(change) for name, change in NEWER.items()}


def _plans(task: Task) -> dict[str, Callable[[], None]]:
    def case(change: Change) -> None:
        store = _store(task)
        plan(store, MINE, OTHER)
        path = store.root / "v1/plans/p.json"
        document = json.loads(path.read_bytes())
        change(document)
        path.write_bytes(keys.canonical_json(document) + b"\n")
        kept = path.read_bytes()
        for use in (lambda: Plans(store).load("p"), lambda: plan(store, LATER)):
            with pytest.raises(IncompatibleEntry):
                use()
        assert verify(store).problems == ()
        _old(store.root)
        delete(store, plan_prune(store, older_than_s=1, max_bytes=0, planned=True))
        assert path.read_bytes() == kept
        whole(store, MINE, OTHER)  # which it may keep

    def step(document: dict[str, Any]) -> None:
        document["buckets"][0]["step"] = "dream"

    def field(document: dict[str, Any]) -> None:
        document["buckets"][0]["cores"] = 2

    more = {**NEWER, "a step more": step, "a field more of a bucket": field}
    return {name: lambda change=change: case(change) for name, change in more.items()}


def _locks(task: Task) -> dict[str, Callable[[], None]]:
    def case(change: Change) -> None:
        path = task.room("own") / "buckets.lock"
        write_lock(path, [MINE.manifest], lambda parts: False)
        document = json.loads(path.read_bytes())
        change(document)
        path.write_text(json.dumps(document))
        kept = path.read_bytes()
        for use in (lambda: read_lock(path), lambda: write_lock(path, [OTHER.manifest], lambda parts: True)):
            with pytest.raises(IncompatibleEntry):
                use()
        assert path.read_bytes() == kept

    return {name: lambda change=change: case(change) for name, change in NEWER.items()}


def _records(task: Task) -> dict[str, Callable[[], None]]:
    def case(kind: Kind) -> None:
        os.environ["NANOGPT_BUCKETS_LOCAL_DIR"] = str(task.room("local"))
        name = "ab" * 32
        Kind(kind.folder, kind.format + 1).write(name, {"when": 0, "why": "x", "of": "a newer release"})
        (path,) = node.folder(kind.folder).glob("*.json")
        _old(node.directory())
        kept = path.read_bytes()
        assert kind.find(name) is None
        kind.keep(name, {"when": 1})
        kind.drop(name)
        assert path not in [file.path for file in node_prune.plan()]
        assert path.read_bytes() == kept

    return {name: lambda kind=kind: case(kind) for name, kind in KINDS.items()}


def _unknown(task: Task) -> dict[str, Callable[[], None]]:
    """What a newer release may add beside: a directory of its own, signatures, plans and blobs of another kind."""
    names = (
        "v2/entries/f/e.cbor", "v1/signatures/x.sig", "v1/entries/{family}/{key}.sig", "v1/plans/p.toml",
        "v1/blobs/zz/compressed", "v1/index.json",
    )  # fmt: skip

    def case(name: str) -> None:
        store = _store(task)
        plan(store, MINE, OTHER)
        path = store.root / name.format(family=MINE.manifest.family, key=MINE.manifest.key)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.write_bytes(b"of a newer release")
        whole(store, MINE, OTHER)
        mended(store, LATER)
        sound(store)
        _old(store.root)
        delete(store, plan_prune(store, older_than_s=1))
        whole(store, MINE, OTHER)
        assert path.read_bytes() == b"of a newer release"

    return {name: lambda name=name: case(name) for name in names}


# --- a newer release, and what this one wrote -------------------------------------------------------------------------


def _upgrade() -> None:
    """Be a newer release: write one format more of everything, and read that and what was before."""
    manifest.FORMAT += 1
    manifest.MARK_FORMAT += 1
    lockfile.FORMAT += 1


def _older(task: Task) -> dict[str, Callable[[], None]]:
    def entries() -> None:
        store = _store(task)
        plan(store, MINE, OTHER)
        before = contents(store.root)
        _upgrade()
        whole(store, MINE, OTHER)
        publish(store, THEIRS)
        assert contents(store.root) == before, "what an older release wrote is adopted"

    def both() -> None:
        """Let the newer one publish beside, then the older one do all that it does, then the newer one again."""
        store = _store(task)
        carried_out(started(lambda: (_upgrade(), publish(store, LATER))[0]))
        kept = manifest_path(store, LATER.manifest).read_bytes()
        with pytest.raises(IncompatibleEntry):
            decode(kept)
        _refused_and_pruned(store)
        assert manifest_path(store, LATER.manifest).read_bytes() == kept
        _upgrade()
        decode(kept)
        for blob in LATER.manifest.blobs:
            assert store.read_blob(blob) == LATER.blobs[blob.role]

    def marks() -> None:
        store = _store(task)
        store.reject(MINE.manifest, "wrong")
        _upgrade()
        found = load(Store(store.root), MINE.manifest)
        assert isinstance(found, Miss), found
        assert found.status is Status.CORRUPT
        assert found.why == "rejected: wrong"

    def locks() -> None:
        path = task.room("own") / "buckets.lock"
        write_lock(path, [MINE.manifest], lambda parts: False)
        _upgrade()
        assert read_lock(path).find(MINE.manifest.key)

    def records() -> None:
        """Let a newer release find a record of an older format: it is absent, and the next one replaces it."""
        os.environ["NANOGPT_BUCKETS_LOCAL_DIR"] = str(task.room("local"))
        for kind in KINDS.values():
            kind.write("x", {"when": 0})
            newer = Kind(kind.folder, kind.format + 1)
            assert newer.find("x") is None
            newer.write("x", {"when": 1})
            assert newer.find("x") == {"when": 1}

    return {"entries": entries, "both in turns": both, "marks": marks, "lock files": locks, "records": records}


def _refused_and_pruned(store: Store) -> None:
    with contextlib.suppress(BucketsError):
        publish(store, LATER)
    _old(store.root)
    delete(store, plan_prune(store, older_than_s=1, max_bytes=0, planned=True))
