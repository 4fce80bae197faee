"""Family 7: who can write where entries are puts other things there: policy x location x attack, on the load path.

A policy says what is believed, a location who can have written what, an attack what was done. A row of the product is
survived if nothing is loaded but the entry that its builder published, in bounded time. Each policy and location has a
control, in which nothing is done and the entry, which its builder signed, is loaded or is refused, as it must be.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from store_kit import blob_path, manifest_path

from chaos.kit import Build, Tally, Task, WrongLoad, build, carried_out, load, plan, publish, started
from nanogpt_buckets import key as keys
from nanogpt_buckets.errors import BucketsError, UntrustedStore
from nanogpt_buckets.plan.bucket import Bucket
from nanogpt_buckets.store.directory import Directory
from nanogpt_buckets.store.entries import Entries, mark_name
from nanogpt_buckets.store.entry import Miss, Status, Verified
from nanogpt_buckets.store.lockfile import LockFile, read_lock, write_lock
from nanogpt_buckets.store.manifest import encode
from nanogpt_buckets.store.plans import Plans
from nanogpt_buckets.store.signature import PublicKey, Signer, signed, try_out
from nanogpt_buckets.store.signers import Policy, Signers, revoke_in
from nanogpt_buckets.store.store import Store
from nanogpt_buckets.store.vouch import PLACE, Trust

MINE, EVIL, OTHER, REVOKED = build("mine"), build("evil"), build("other", 16), build("revoked")
# The same bucket, built before: valid, and not the one that is wanted.
OLDER = Build(replace(build("older").manifest, stats={"compile_ms": 1}), build("older").blobs)
STRANGER = 4321


def _signer(seed: bytes) -> Signer:
    """Return what signs with a key of a builder's, or of an attacker's."""
    private = Ed25519PrivateKey.from_private_bytes(seed * 32)
    public = PublicKey(private.public_key().public_bytes_raw())
    return lambda data: (public, private.sign(data))


OURS, THEIRS = _signer(b"\1"), _signer(b"\2")
TRUSTED = {key.id: key for key in [try_out(OURS)]}


class Memory:
    """A tier that others may always have written, as object stores are."""

    def __init__(self, source: Directory) -> None:
        self.source = source

    def get(self, name: str, *, size: int | None = None, limit: int | None = None, anyone: bool = False) -> bytes:
        if not anyone:
            raise UntrustedStore("others may have written it")
        return self.source.get(name, size=size, limit=limit, anyone=True)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)


@dataclass(frozen=True)
class Place:
    """Where the entry is: whether it is believed without more, what opens it to others, and how it is looked at."""

    believed: bool
    open: Callable[[Path], None]
    seen: Callable[[Path, Trust], Entries]


def _closed(root: Path) -> None:
    """Leave the directories closed; what the attacker has put there is his."""


def _open_to_all(root: Path) -> None:
    for path in (root, *root.rglob("*")):
        if not path.is_symlink() and path.exists():
            path.chmod(0o2777 if path.is_dir() else 0o666)


def _directory(root: Path, trust: Trust) -> Entries:
    return Store(root, trust)


def _layer(root: Path, trust: Trust) -> Entries:
    own = root.with_name("own")
    own.mkdir(mode=0o700, exist_ok=True)
    return Store(own, trust, layers=[root])


def _remote(root: Path, trust: Trust) -> Entries:
    return Entries(Memory(Directory(root, shared=True)), trust)


PLACES = {
    "own directory": Place(True, _closed, _directory),
    "shared directory": Place(False, _open_to_all, _directory),
    "own layer": Place(True, _closed, _layer),
    "shared layer": Place(False, _open_to_all, _layer),
    "object store": Place(False, _open_to_all, _remote),
}
# What is believed besides the place: the name, and whether the entry is then believed anywhere.
POLICIES: Mapping[str, tuple[Callable[[LockFile], Trust], bool]] = {
    "place": (lambda lock: PLACE, False),
    "lock file": (lambda lock: Trust(lock), True),
    "locked": (lambda lock: Trust(lock, only=True), True),
    "signed": (lambda lock: Trust(signers=Signers(TRUSTED)), True),
    "signature required": (lambda lock: Trust(signers=Signers(TRUSTED, Policy.REQUIRE)), True),
    "locked, signature required": (lambda lock: Trust(lock, True, signers=Signers(TRUSTED, Policy.REQUIRE)), True),
    "another's key": (lambda lock: Trust(signers=Signers({k.id: k for k in [try_out(THEIRS)]})), False),
}


# --- attacks: what is done to a cache directory that holds MINE and OTHER --------------------------------------------


def _write(path: Path, data: bytes) -> None:
    """Put the attacker's file somewhere."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_symlink() or path.exists():
        path.unlink()
    path.write_bytes(data)
    os.chown(path, STRANGER, STRANGER)


def _sealed(body: Mapping[str, Any]) -> bytes:
    text = keys.canonical_json(body)
    return b'{"body":%b,"sha256":"%b"}\n' % (text, hashlib.sha256(text).hexdigest().encode())


def _body(each: Build = MINE) -> dict[str, Any]:
    return dict(json.loads(encode(each.manifest))["body"])


def _manifest(store: Store, data: bytes) -> None:
    _write(manifest_path(store, MINE.manifest), data)


def _blobs(store: Store, each: Build) -> None:
    for blob in each.manifest.blobs:
        _write(blob_path(store, blob), each.blobs[blob.role])


def _entry(store: Store, each: Build, data: bytes | None = None) -> None:
    """Put the attacker's own libraries there, and a manifest of theirs, or other bytes, in the place of MINE's."""
    _blobs(store, each)
    _manifest(store, encode(each.manifest) if data is None else data)


def _library(store: Store, data: bytes) -> None:
    _write(blob_path(store, MINE.manifest.blobs[0]), data)


def _instead(store: Store, which: str, make: Callable[[Path], object]) -> None:
    """Make something that is no file in the place of a manifest or a library."""
    path = manifest_path(store, MINE.manifest) if which == "manifest" else blob_path(store, MINE.manifest.blobs[0])
    path.unlink()
    make(path)


def _linked(store: Store, place: str) -> None:
    """Let a directory or file lead to a copy of the attacker's, of the same shape, that holds EVIL."""
    theirs = Store(store.root.with_name("theirs"))
    publish(theirs, EVIL)
    part = place.format(family=MINE.manifest.family, key=MINE.manifest.key)
    inside, behind = store.root / part, theirs.root / part
    inside.rename(store.root.with_name("moved"))
    inside.symlink_to(behind)


def _deep(store: Store) -> None:
    _manifest(store, b'{"body":' + b"[" * 100_000 + b"]" * 100_000 + b',"sha256":"' + b"0" * 64 + b'"}\n')


def _huge(store: Store) -> None:
    path = manifest_path(store, MINE.manifest)
    with path.open("r+b") as file:
        file.truncate(1 << 40)


def _huge_library(store: Store) -> None:
    path = blob_path(store, MINE.manifest.blobs[0])
    path.chmod(0o600)
    os.truncate(path, 1 << 40)


def _claims(store: Store, **fields: Any) -> None:
    _blobs(store, EVIL)
    _manifest(store, _sealed(_body(EVIL) | fields))


def _poisoned(store: Store, text: str) -> None:
    _write(store.root / "v1/plans/p.json", text.encode())
    _entry(store, EVIL)


def _hidden(store: Store) -> None:
    """Let a family hold names that are none, with what would lead out of it behind them."""
    folder = manifest_path(store, MINE.manifest).parent
    for name in ("..json", "%2e%2e.json", "A" * 64 + ".json", "x" * 200 + ".json", "\u202e.json"):
        _write(folder / name, encode(EVIL.manifest))


_EXCHANGED = [row | {"role": role} for row, role in zip(_body()["blobs"], ("data", "code"), strict=True)]
_TRAVERSAL = [{"role": "code", "sha256": "../../../../etc/passwd", "size": 1}]
ATTACKS: dict[str, Callable[[Store], object]] = {
    "another build": lambda store: _entry(store, EVIL),
    "one more entry for the bucket": lambda store: _further(store),
    "an older valid build": lambda store: _entry(store, OLDER),
    "an older signed build": lambda store: _signed(store, OLDER, signed(OLDER.manifest, OURS)),
    "a build that another signed": lambda store: _signed(store, EVIL, signed(EVIL.manifest, _UNKNOWN)),
    "a build under our signature of another": lambda store: _signed(store, EVIL, signed(MINE.manifest, OURS)),
    "a build under our key's name": lambda store: _signed(store, EVIL, _renamed(signed(EVIL.manifest, THEIRS))),
    "a build that was signed and revoked": lambda store: _revoked(store),
    "a signature of a terabyte": lambda store: _huge_signature(store),
    "no signature": lambda store: store.signature_path(MINE.manifest).unlink(),
    "an edited field": lambda store: _manifest(store, _sealed(_body() | {"requires": {"isa": ["none"]}})),
    "an edited field, not sealed": lambda store: _manifest(
        store, encode(MINE.manifest).replace(b'"contains_weights":false', b'"contains_weights":true ')
    ),
    "an edited library": lambda store: _library(store, EVIL.blobs["code"]),
    "a library in the place of another": lambda store: _library(store, MINE.blobs["data"]),
    "the libraries exchanged in the manifest": lambda store: _manifest(store, _sealed(_body() | {"blobs": _EXCHANGED})),
    "another key's entry": lambda store: _manifest(store, encode(OTHER.manifest)),
    "another key's body under this key": lambda store: _claims(store, parts=_body(OTHER)["parts"]),
    "another family's": lambda store: _claims(store, family="0" * 64),
    "a path as a library": lambda store: _claims(store, blobs=_TRAVERSAL),
    "a path as a role": lambda store: _claims(store, blobs=[_body(EVIL)["blobs"][0] | {"role": "../code"}]),
    "names that are none": _hidden,
    "a manifest that is a link": lambda store: _linked(store, "v1/entries/{family}/{key}.json"),
    "a family that is a link": lambda store: _linked(store, "v1/entries/{family}"),
    "entries that are a link": lambda store: _linked(store, "v1/entries"),
    "libraries that are a link": lambda store: _linked(store, "v1/blobs"),
    "all of it a link": lambda store: _linked(store, "v1"),
    "a manifest that is a pipe": lambda store: _instead(store, "manifest", os.mkfifo),
    "a library that is a pipe": lambda store: _instead(store, "library", os.mkfifo),
    "a manifest that is a device": lambda store: _instead(store, "manifest", _zero),
    "a library that is a device": lambda store: _instead(store, "library", _zero),
    "a manifest that is a directory": lambda store: _instead(store, "manifest", os.mkdir),
    "a library that is a link to memory": lambda store: _instead(store, "library", lambda p: p.symlink_to("/dev/zero")),
    "a manifest of a terabyte": _huge,
    "a library of a terabyte": _huge_library,
    "a manifest as deep as it is long": _deep,
    "a library said to be a terabyte": lambda store: _claims(
        store, blobs=[_body(EVIL)["blobs"][0] | {"size": 1 << 40}, _body(EVIL)["blobs"][1]]
    ),
    "a plan that leads elsewhere": lambda store: _poisoned(store, '{"format":1,"buckets":[{"seq_len":"../x"}]}'),
    "a plan of everything": lambda store: _poisoned(
        store, json.dumps({"format": 1, "families": [MINE.manifest.family], "buckets": [Bucket(1, 8).to_json()]})
    ),
    "a plan too deep to read": lambda store: _poisoned(store, "[" * 100_000),
    "its rejection deleted": lambda store: _revived(store),
    "a rejection that is none": lambda store: _write(store.directory.path(_MARK), b"[" * 5000),
}  # fmt: skip
_MARK = mark_name(MINE.manifest.family, MINE.manifest.key)


def _further(store: Store) -> None:
    """Publish for the same bucket, as one that has a newer compiler would."""
    parts = EVIL.manifest.parts | {"compiler": {"cxx": "99"}}
    further = replace(EVIL.manifest, parts=parts, key=keys.digest(parts))
    _blobs(store, EVIL)
    _write(manifest_path(store, further), encode(further))


_UNKNOWN = _signer(b"\3")


def _signed(store: Store, each: Build, signature: bytes) -> None:
    """Put an entry there, and a signature beside it under the name that it must have."""
    _entry(store, each)
    _write(store.signature_path(each.manifest), signature)


def _renamed(signature: bytes) -> bytes:
    return signature.replace(try_out(THEIRS).id.encode(), try_out(OURS).id.encode())


def _revoked(store: Store) -> None:
    _signed(store, REVOKED, signed(REVOKED.manifest, OURS))
    revoke_in(store.tier, Signers(TRUSTED), OURS, {REVOKED.manifest.digest: "bad"})


def _huge_signature(store: Store) -> None:
    _signed(store, EVIL, b"")
    os.truncate(store.signature_path(EVIL.manifest), 1 << 40)


def _zero(path: Path) -> None:
    os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 5))


def _revived(store: Store) -> None:
    """Put an entry that was rejected back as it was, and another's mark beside it."""
    store.reject(EVIL.manifest, "wrong")
    _entry(store, EVIL)
    store.directory.path(_MARK).unlink()


def run(task: Task) -> Iterator[Tally]:
    for policy, (trusted, anywhere) in POLICIES.items():
        for where, place in PLACES.items():
            tally = Tally(7, f"{policy}, {where}")
            with tally.case("control"):
                carried_out(started(lambda: _control(task, place, trusted, anywhere)))  # noqa: B023
            for name, attack in ATTACKS.items() if not task.quick else task.some(ATTACKS.items(), 2):
                with tally.case(name):
                    carried_out(started(lambda: _attacked(task, place, trusted, attack)))  # noqa: B023
            yield tally


def _prepared(task: Task) -> tuple[Store, LockFile]:
    home = task.room("home")
    store = Store(home / "cache", Trust(signer=OURS))
    publish(store, MINE, OTHER)
    plan(store, MINE, OTHER)
    write_lock(home / "buckets.lock", [MINE.manifest, OTHER.manifest], lambda parts: False)
    return store, read_lock(home / "buckets.lock")


def _control(task: Task, place: Place, trusted: Callable[[LockFile], Trust], anywhere: bool) -> None:
    store, lock = _prepared(task)
    place.open(store.root)
    found = load(place.seen(store.root, trusted(lock)), MINE.manifest, MINE)
    if place.believed or anywhere:
        assert isinstance(found, Verified), found
    else:
        assert isinstance(found, Miss), found
        assert found.status is Status.UNTRUSTED, found


def _attacked(
    task: Task, place: Place, trusted: Callable[[LockFile], Trust], attack: Callable[[Store], object]
) -> None:
    """Load what was attacked, with little memory and little time."""
    store, lock = _prepared(task)
    attack(store)
    place.open(store.root)
    signal.alarm(20)
    limit = _address_space() + (256 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    seen = place.seen(store.root, trusted(lock))
    # what a builder once signed is believed until it is revoked, unless something else is locked
    known = (MINE, OTHER) if seen.trust.only or not seen.trust.signers.keys else (MINE, OTHER, OLDER)
    load(seen, MINE.manifest, *known)
    for found in _listed(seen):
        if isinstance(found, Verified) and found.manifest not in [each.manifest for each in known]:
            raise WrongLoad(f"listed and loaded: {found.manifest.gate}")
    if isinstance(seen, Store):
        _planned(Store(store.root, trusted(lock)))


def _listed(seen: Entries) -> list[Verified | Miss]:
    try:
        return [seen.check(found) for found in seen.entries()]
    except BucketsError:
        return []


def _planned(store: Store) -> None:
    try:
        for name in Plans(store).names():
            Plans(store).load(name)
    except BucketsError:
        pass


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
