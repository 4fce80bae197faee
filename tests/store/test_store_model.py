"""Any order of publishing, damaging and looking agrees with a dict: what is warm is exactly what was published."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from store_kit import word

from nanogpt_buckets import key as keys
from nanogpt_buckets.store.entry import Status, Verified
from nanogpt_buckets.store.manifest import Blob, Manifest
from nanogpt_buckets.store.repair import plan_repair, repair
from nanogpt_buckets.store.store import Store
from nanogpt_buckets.store.verify import verify

NAMES = st.sampled_from(["a", "b", "c"])
# few contents, so that entries share blobs
CONTENTS = st.lists(st.sampled_from([b"", b"one", b"two"]), min_size=0, max_size=2)


def make(name: str, contents: list[bytes]) -> tuple[Manifest, dict[str, bytes]]:
    family = {"backend": "x"}
    parts = {"family": family, "name": name, "bucket": {"name": "x"}, "target": "t", "compiler": {}}
    blobs = {f"blob{number}": content for number, content in enumerate(contents)}
    named = tuple(Blob(role, hashlib.sha256(data).hexdigest(), len(data)) for role, data in blobs.items())
    return (
        Manifest(keys.digest(family), keys.digest(parts), parts, named, (), (), (), {}, False, {}, {}),
        blobs,
    )


class StoreMachine(RuleBasedStateMachine):
    """The model: what each key holds, which manifests are damaged, and which blobs are."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp())
        self.store = Store(self.directory / "cache")
        self.held: dict[str, Manifest] = {}
        self.damaged: set[str] = set()
        self.bad_blobs: set[str] = set()

    def teardown(self) -> None:
        shutil.rmtree(self.directory)

    def word(self, name: str) -> str:
        if name not in self.held:
            return Status.ABSENT
        blobs = {blob.sha256 for blob in self.held[name].blobs}
        return Status.CORRUPT if name in self.damaged or blobs & self.bad_blobs else "verified"

    def entry_path(self, name: str) -> Path:
        manifest = make(name, [])[0]
        return self.store.root / "v1/entries" / manifest.family / f"{manifest.key}.json"

    @rule(name=NAMES, contents=CONTENTS)
    def publish(self, name: str, contents: list[bytes]) -> None:
        manifest, blobs = make(name, contents)
        winner = self.store.publish(manifest, blobs)
        if self.word(name) == "verified":
            assert winner == self.held[name]
            return
        assert winner == manifest
        self.held[name] = manifest
        self.damaged.discard(name)
        self.bad_blobs -= {blob.sha256 for blob in manifest.blobs}

    @rule(name=NAMES)
    def look(self, name: str) -> None:
        manifest = make(name, [])[0]
        answer = self.store.check(self.store.look(manifest.family, manifest.key, manifest.parts))
        assert word(answer) == self.word(name)
        assert answer.manifest == (self.held[name] if isinstance(answer, Verified) else None)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), position=st.integers(0, 10**6), cut=st.booleans())
    def corrupt_manifest(self, data: st.DataObject, position: int, cut: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.held)))
        if name in self.damaged:
            return
        path = self.entry_path(name)
        content = bytearray(path.read_bytes())
        position %= len(content)
        content[position] ^= 4
        path.write_bytes(content[:position] if cut else content)
        self.damaged.add(name)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def delete_manifest(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.held)))
        self.entry_path(name).unlink()
        del self.held[name]
        self.damaged.discard(name)

    @rule()
    def repair(self) -> None:
        repair(self.store, self.store, plan_repair(self.store, self.store, verify(self.store)))
        self.held = {name: manifest for name, manifest in self.held.items() if self.word(name) == "verified"}
        self.damaged.clear()
        self.bad_blobs.clear()
        assert verify(self.store).problems == ()

    @rule(data=st.data(), how=st.sampled_from(["delete", "empty", "longer", "other"]))
    def damage_blob(self, data: st.DataObject, how: str) -> None:
        paths = sorted((self.store.root / "v1/blobs").glob("*/*"))
        if not paths:
            return
        path = data.draw(st.sampled_from(paths))
        content = path.read_bytes()
        path.chmod(0o600)
        if how == "delete":
            path.unlink()
        else:
            new = {"empty": b"", "longer": content + b"x", "other": b"333"}[how]
            path.write_bytes(new)
            if hashlib.sha256(new).hexdigest() == path.name:  # repaired by chance
                self.bad_blobs.discard(path.name)
                return
        self.bad_blobs.add(path.name)

    @invariant()
    def the_listing_is_the_model(self) -> None:
        found = {entry.key: word(self.store.check(entry)) for entry in self.store.entries()}
        assert found == {make(name, [])[0].key: self.word(name) for name in self.held}

    @invariant()
    def verify_finds_exactly_the_damage(self) -> None:
        result = verify(self.store)
        assert result.entries == len(self.held)
        on_disk = {path.name: path.read_bytes() for path in (self.store.root / "v1/blobs").glob("*/*")}
        wrong_bytes = {name for name, data in on_disk.items() if hashlib.sha256(data).hexdigest() != name}
        broken = {make(name, [])[0].key for name in self.held if self.word(name) == Status.CORRUPT}
        assert {Path(problem.path).stem for problem in result.problems} == wrong_bytes | broken

    @invariant()
    def nothing_is_left_staged(self) -> None:
        assert not list((self.store.root / "v1/tmp").glob("*"))


TestStore = StoreMachine.TestCase
TestStore.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
