"""One process that uses a shared cache: does what it is told on stdin, one JSON object a line, and answers on stdout.

What it publishes only looks compiled: bytes made from a builder's name and the entry's, so that whoever reads knows
what they must be. Knows nothing of file systems, nor of what is proved.
"""

from __future__ import annotations

import hashlib
import json
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nanogpt_buckets import key as keys
from nanogpt_buckets.errors import BucketsError
from nanogpt_buckets.plan.bucket import STEPS
from nanogpt_buckets.store.entries import Entries
from nanogpt_buckets.store.entry import Miss, manifest_of
from nanogpt_buckets.store.lockfile import read_lock, write_lock
from nanogpt_buckets.store.manifest import Blob, Manifest
from nanogpt_buckets.store.store import Store
from nanogpt_buckets.store.transfer import move, place_of, require_all
from nanogpt_buckets.store.vouch import PLACE, Trust

Json = dict[str, Any]
FAMILY = {"backend": "pretended"}
WRONG = "WRONG"


def make(builder: str, entry: int) -> tuple[Manifest, dict[str, bytes]]:
    """Return what a builder would publish: every builder something else, of another size, under the same key."""
    parts = {
        "family": FAMILY, "target": "t", "compiler": {},
        "bucket": {"step": STEPS[0], "batch_size": 1, "seq_len": entry},
    }  # fmt: skip
    odd = zlib.crc32(builder.encode())
    blobs = {
        "library": _bytes(f"{builder} library {entry}", 100_000 + odd % 60_000),
        "data": _bytes(f"{builder} data {entry}", odd % 3000),
        "common": _bytes(f"common {entry}", 20_000),  # the same file, whoever builds
    }
    manifest = Manifest(
        family=keys.digest(FAMILY), key=keys.digest(parts), parts=parts,
        blobs=tuple(Blob(role, hashlib.sha256(data).hexdigest(), len(data)) for role, data in blobs.items()),
        inputs=(), outputs=(), weights=(), requires={}, contains_weights=False, stats={},
        gate={"builder": builder, "padding": "x" * (odd % 700)},
    )  # fmt: skip
    return manifest, blobs


def _bytes(seed: str, size: int) -> bytes:
    return hashlib.shake_256(seed.encode()).digest(size)


def answer(store: Store, entry: int) -> Json:
    """Look at an entry as a run does: every byte is read and compared with what its builder must have made."""
    wanted, _ = make("", entry)
    found = store.check(store.look(wanted.family, wanted.key, wanted.parts))
    if isinstance(found, Miss):
        return {"word": str(found.status), "why": found.why}
    builder = found.manifest.gate["builder"]
    right = (found.manifest, dict(found.blobs)) == make(builder, entry)
    return {"word": "verified" if right else WRONG, "builder": builder, "digest": found.manifest.digest}


class Worker:
    """What can be asked of the process; every method is one request, its parameters are the request's."""

    def __init__(self, root: str, lock: str = "") -> None:
        self.lock = lock
        self.store = Store(Path(root), Trust(read_lock(Path(lock)), only=True) if lock else PLACE)

    def publish(self, builder: str, entry: int, alone: bool = False) -> Json:
        """Publish an entry; `alone`: under its lock, as builders do who must not compile the same twice."""
        manifest, blobs = make(builder, entry)
        if not alone:
            return {"digest": self.store.publish(manifest, blobs).digest}
        with self.store.directory.locked(manifest.key, 20.0) as held:
            before = answer(self.store, entry)
            if before["word"] == "verified":
                return {"digest": before["digest"], "held": held, "compiled": False}
            return {"digest": self.store.publish(manifest, blobs).digest, "held": held, "compiled": True}

    def publish_on(self, builder: str, first: int, last: int) -> Json:
        """Publish many."""
        for entry in range(first, last):
            self.publish(builder, entry)
        return {}

    def look(self, entries: list[int]) -> Json:
        """Look at entries."""
        return {"answers": [answer(self.store, entry) for entry in entries]}

    def poll(self, entries: list[int], until: str) -> Json:
        """Look at entries again and again, and once more when the file is there; count the answers."""
        words: Counter[str] = Counter()
        bad: list[str] = []
        seen: set[int] = set()
        lost = 0
        while True:
            last = Path(until).exists()
            for entry in entries:
                found = answer(self.store, entry)
                words[found["word"]] += 1
                if found["word"] not in ("verified", "missing"):
                    bad.append(f"{found['word']}: {found.get('why', '')}")
                lost += found["word"] == "missing" and entry in seen
                seen |= {entry} if found["word"] == "verified" else set()
            if last:
                return {"words": dict(words), "bad": sorted(set(bad)), "lost": lost}

    def hold(self, entry: int, seconds: float) -> Json:
        """Take the lock of an entry, and keep it until `release`."""
        manifest, _ = make("", entry)
        self.holding = self.store.directory.locked(manifest.key, seconds)
        return {"held": self.holding.__enter__()}

    def release(self) -> Json:
        """Give the lock back."""
        self.holding.__exit__(None, None, None)
        return {}

    def listed(self) -> Json:
        """List the cache: how many entries it has, by what is known of each."""
        return {"count": sum(manifest_of(found) is not None for found in self.store.entries())}

    def write_lock(self, builder: str, entries: list[int], path: str) -> Json:
        """Write a lock file that names what a builder makes."""
        write_lock(Path(path), [make(builder, entry)[0] for entry in entries], lambda parts: False)
        return {}

    def push(self, builder: str, entries: list[int], place: str) -> Json:
        """Copy this cache's entries to a place."""
        target = place_of(place, Trust(looks=True))
        return self._moved(self.store, [make(builder, entry)[0] for entry in entries], target)

    def pull(self, place: str) -> Json:
        """Copy to this cache what its lock file names."""
        source = place_of(place, self.store.trust)
        return self._moved(source, require_all(source.entries(), source), self.store)

    def _moved(self, source: Entries, manifests: list[Manifest], target: Entries) -> Json:
        return {"states": [moved.state for moved in move(source, manifests, target, lambda manifest: None)]}


def serve(worker: Worker) -> None:
    """Answer every request; an error of ours is an answer, too."""
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        request: Mapping[str, Any] = json.loads(line)
        do: Callable[..., Json] = getattr(worker, request["do"])
        try:
            reply = do(**{name: value for name, value in request.items() if name != "do"})
        except BucketsError as error:
            reply = {"error": type(error).__name__, "why": error.message, "hint": error.hint}
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    serve(Worker(*sys.argv[1:]))
