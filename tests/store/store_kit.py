"""What tests of the store share: entries that hold anything, where their files are, and children of another user."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import NoReturn

from nanogpt_buckets import key as keys
from nanogpt_buckets.plan.bucket import Bucket, Plan
from nanogpt_buckets.store.entry import Found, Miss, Verified
from nanogpt_buckets.store.manifest import Blob, Manifest
from nanogpt_buckets.store.plans import Plans, SavedPlan
from nanogpt_buckets.store.store import Store
from nanogpt_buckets.store.verify import verify

REPOSITORY = Path(keys.__file__).parents[1]

# Also run in children, which cannot import a test module.
MAKE = """
import hashlib
from nanogpt_buckets import key as keys
from nanogpt_buckets.store.manifest import Blob, Manifest

def make(tag, *, name="a", family="f", roles=("code.so", "data.bin"), bucket=None, times=50):
    family_parts = {"backend": family}
    parts = {"family": family_parts, "bucket": bucket or {"name": name}, "target": "t", "compiler": {}}
    blobs = {role: f"{tag}:{role}".encode() * times for role in roles}
    return Manifest(
        family=keys.digest(family_parts), key=keys.digest(parts), parts=parts,
        blobs=tuple(Blob(role, hashlib.sha256(data).hexdigest(), len(data)) for role, data in blobs.items()),
        inputs=(), outputs=(), weights=(), requires={}, contains_weights=False, stats={}, gate={"tag": tag},
    ), blobs
"""
_made: dict = {}
exec(MAKE, _made)
make = _made["make"]


def manifest_path(store: Store, manifest: Manifest) -> Path:
    return store.root / "v1/entries" / manifest.family / f"{manifest.key}.json"


def blob_path(store: Store, blob: Blob) -> Path:
    return store.root / "v1/blobs" / blob.sha256[:2] / blob.sha256


def save(store: Store) -> None:
    Plans(store).change("p", lambda before: SavedPlan(Plan([Bucket(1, 8)])))


def look(store: Store, manifest: Manifest):
    return store.check(store.look(manifest.family, manifest.key, manifest.parts))


def word(found: Found | Verified) -> str:
    """Return how far an entry is known to be in order, or the word for why it is not."""
    return found.status if isinstance(found, Miss) else "verified" if isinstance(found, Verified) else "listed"


def raise_(store: Store, miss: Miss) -> NoReturn:
    raise store.error(miss)


def spoil(path: Path, data: bytes) -> None:
    path.chmod(0o600)
    path.write_bytes(data)


def files(store: Store) -> dict[str, bytes]:
    return {str(p.relative_to(store.root)): p.read_bytes() for p in store.root.rglob("*") if p.is_file()}


def healed_entry(store: Store, manifest: Manifest, blobs: dict[str, bytes]) -> None:
    """A new publish makes the entry whole, whatever was there."""
    winner = store.publish(manifest, blobs)
    found = look(store, manifest)
    assert isinstance(found, Verified)
    assert found.manifest == winner


def healed(store: Store, manifest: Manifest, blobs: dict[str, bytes]) -> None:
    """So it does, and nothing else is damaged."""
    healed_entry(store, manifest, blobs)
    assert verify(store).problems == ()


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", MAKE + code, *map(str, arguments)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    return output


def as_nobody(code: str, *arguments: object) -> str:
    drop = """
import grp, os, pwd, sys
from pathlib import Path
from nanogpt_buckets.store.store import Store
from nanogpt_buckets.errors import CacheError
if os.geteuid() == 0:
    os.setgid(65534); os.setgroups([]); os.setuid(65534)
"""
    return finish(start(drop + code, *arguments))
