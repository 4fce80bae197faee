"""Family 2: every byte, every length, other files' bytes - each is found where it is loaded and by verify, and mended.

Files of an entry, its plan, the lock file that names it, and the mark that it was rejected.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from store_kit import blob_path, manifest_path

from chaos.kit import Tally, Task, build, load, mended, plan, publish, sound, whole
from nanogpt_buckets.errors import BucketsError
from nanogpt_buckets.store.entry import Miss, Status, Verified
from nanogpt_buckets.store.lockfile import read_lock, write_lock
from nanogpt_buckets.store.manifest import encode
from nanogpt_buckets.store.plans import Plans
from nanogpt_buckets.store.store import Store
from nanogpt_buckets.store.verify import verify
from nanogpt_buckets.store.vouch import Trust

MINE, OTHER, REBUILT = build("mine"), build("other", 16), build("else")
Change = tuple[str, bytes]


def flips(task: Task, data: bytes) -> Iterator[Change]:
    """Yield data with each byte changed, in one bit by chance."""
    for position in task.some(range(len(data)), 15):
        changed = bytearray(data)
        changed[position] ^= 1 << task.chance.randrange(8)
        yield f"byte {position} flipped", bytes(changed)


def prefixes(task: Task, data: bytes) -> Iterator[Change]:
    """Yield every beginning, the empty one among them, and data with something after its end."""
    for length in [0, *task.some(range(1, len(data)), 8)]:
        yield f"cut to {length} bytes", data[:length]
    yield "with a byte more", data + b"\0"


def run(task: Task) -> Iterator[Tally]:
    root = task.room("cache")
    store = Store(root)
    publish(store, MINE, OTHER)
    lock = task.where / "buckets.lock"
    write_lock(lock, [MINE.manifest], lambda parts: False)
    locked = Store(root, Trust(read_lock(lock), only=True))
    manifest, blob = manifest_path(store, MINE.manifest), blob_path(store, MINE.manifest.blobs[0])
    stranger = blob_path(store, OTHER.manifest.blobs[0])

    yield _entry(task, "each byte of a manifest", store, locked, manifest, flips)
    yield _entry(task, "each length of a manifest", store, locked, manifest, prefixes)
    yield _entry(task, "each byte of a library", store, locked, blob, flips)
    yield _entry(task, "each length of a library", store, locked, blob, prefixes)
    second = blob_path(store, MINE.manifest.blobs[1])
    others = [("for another entry's", stranger.read_bytes()), ("for its own other one", second.read_bytes())]
    others.append(("for another build's", REBUILT.blobs["code"]))
    yield _entry(task, "a library exchanged", store, locked, blob, lambda task, data: iter(others))
    yield _entry(
        task, "a manifest exchanged for another entry's", store, locked, manifest,
        lambda task, data: iter([("another key's", encode(OTHER.manifest))]),
    )  # fmt: skip
    yield _plan(task, store)
    yield _lock(task, store, lock)
    yield _mark(task, store)


def _entry(
    task: Task, what: str, store: Store, locked: Store, path: Path, changes: Callable[[Task, bytes], Iterator[Change]]
) -> Tally:
    tally, data = Tally(2, what), path.read_bytes()
    for name, changed in changes(task, data):
        with tally.case(name):
            _put(path, changed)
            for each in (store, locked):
                found = load(each, MINE.manifest, MINE)
                assert isinstance(found, Miss), "not noticed where it is loaded"
                assert found.status is Status.CORRUPT, found
            named = {problem.path.rsplit("/", 1)[1] for problem in verify(store).problems}
            assert path.name in named, f"verify names {named}"
            mended(store, MINE)
            assert path.read_bytes() == data
            sound(store)
            whole(store, OTHER)
        _put(path, data)  # for the next one, whatever became of this
    return tally


def _plan(task: Task, store: Store) -> Tally:
    """A damaged plan is found, stops nothing and is replaced."""
    tally, path = Tally(2, "each byte and length of a plan"), store.root / "v1/plans/p.json"
    plan(store, MINE, OTHER)
    data, saved = path.read_bytes(), Plans(store).load("p")
    for name, changed in (*flips(task, data), *prefixes(task, data)):
        with tally.case(name):
            _put(path, changed)
            try:
                Plans(store).load("p")
            except BucketsError as error:
                newer = "newer release" in error.message
                assert newer or [p.path for p in verify(store).problems] == ["v1/plans/p.json"]
            Plans(store).pins()
            whole(store, MINE, OTHER)
            if not _newer(store):
                plan(store, MINE, OTHER)
                assert Plans(store).load("p") == saved
        _put(path, data)
    path.unlink()
    return tally


def _newer(store: Store) -> bool:
    try:
        Plans(store).load("p")
    except BucketsError as error:
        return "newer release" in error.message
    return False


def _lock(task: Task, store: Store, path: Path) -> Tally:
    """Whatever a damaged lock file says, nothing is loaded by it that was not published under that key."""
    tally, data = Tally(2, "each byte and length of a lock file"), path.read_bytes()
    for name, changed in (*flips(task, data), *prefixes(task, data)):
        with tally.case(name):
            path.write_bytes(changed)
            try:
                lock = read_lock(path)
            except BucketsError:
                continue
            found = load(Store(store.root, Trust(lock, only=True)), MINE.manifest, MINE)
            assert isinstance(found, Verified) or found.status in (Status.UNTRUSTED, Status.ABSENT), found
        path.write_bytes(data)
    return tally


def _mark(task: Task, store: Store) -> Tally:
    """A damaged mark is damage, or says nothing: then what it rejected is compared with the model again when loaded."""
    tally, path = Tally(2, "each byte and length of a mark"), store.mark_path(MINE.manifest)
    store.reject(MINE.manifest, "wrong")
    data = path.read_bytes()
    for name, changed in (*flips(task, data), *prefixes(task, data)):
        with tally.case(name):
            path.write_bytes(changed)
            fresh = Store(store.root)
            found = load(fresh, MINE.manifest, MINE)
            about = changed[: data.index(b'"why"')] != data[: data.index(b'"why"')]
            allowed = (Status.CORRUPT, Status.INCOMPATIBLE)
            assert (about and isinstance(found, Verified)) or (isinstance(found, Miss) and found.status in allowed)
            if isinstance(found, Miss) and found.status is Status.CORRUPT:
                mended(fresh, MINE)
                sound(fresh)
        path.write_bytes(data)
    path.unlink()
    whole(Store(store.root), MINE, OTHER)
    return tally


def _put(path: Path, data: bytes) -> None:
    """Put bytes in a file's place, as a damaged disk or somebody else's tool would, with the file's own permissions."""
    mode = path.stat().st_mode if path.exists() else 0o600
    path.unlink(missing_ok=True)
    path.write_bytes(data)
    os.chmod(path, mode)
