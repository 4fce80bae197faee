"""What mends a store, as a value: planned, shown, and only then done.

What is damaged is written anew with the bytes that a layer has in order; what no layer has is taken away, so that the
next build makes it. What could not be read this time, what others could have written, and what a newer release wrote
is left alone. Knows nothing of terminals.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nanogpt_buckets.errors import CacheError
from nanogpt_buckets.files import Doomed, doom
from nanogpt_buckets.store.entry import Status, Verified, manifest_of
from nanogpt_buckets.store.manifest import Manifest
from nanogpt_buckets.store.prune import Deletion, delete, deletion_of
from nanogpt_buckets.store.store import Store
from nanogpt_buckets.store.verify import Verification


@dataclass(frozen=True)
class Repair:
    """What would be done: these entries written anew, and then these files deleted."""

    mended: tuple[Manifest, ...]
    deletion: Deletion

    def __bool__(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.mended or self.deletion.files)


def plan_repair(store: Store, below: Store, result: Verification) -> Repair:
    """Plan to mend what `verify` found damaged in a store; `below` is the same one with its layers."""
    damaged: dict[str, list[str]] = {}
    for problem in result.problems:
        damaged.setdefault(problem.path, []).append(problem.what)
    left_alone = {problem.path for problem in result.problems if problem.status is not Status.CORRUPT}
    damaged = {path: what for path, what in damaged.items() if path not in left_alone}
    entries, mended, lost = [], [], {}
    for entry in store.entries():
        why = damaged.get(store.entry_path(entry).relative_to(store.root).as_posix())
        whole = below.check(below.look(entry.family, entry.key)) if why else None
        if isinstance(whole, Verified):
            mended.append(whole.manifest)
        elif why:
            lost[entry.key] = f"damaged: {why[0]}"
        entries.append(whole.manifest if isinstance(whole, Verified) else entry)
    deletion = deletion_of(store, entries, lost, [])
    further = list(_damaged(store, damaged, "plan"))
    if all(manifest_of(entry) or entry.key in lost for entry in entries):  # else one may need any blob
        going = {file.path for file in deletion.files}
        going |= {store.blob_path(blob.sha256) for manifest in mended for blob in manifest.blobs}
        further += [file for file in _damaged(store, damaged, "blob") if file.path not in going]
    return Repair(tuple(mended), Deletion((*deletion.files, *further), deletion.notes))


def repair(store: Store, below: Store, plan: Repair, on_step: Callable[[], None] = lambda: None) -> int:
    """Do what was planned and return the bytes freed; a CacheError if something could not be: the rest was."""
    refused: CacheError | None = None
    for manifest in plan.mended:
        try:
            store.publish(manifest, below.read(manifest).blobs)
        except CacheError as error:
            refused = refused or error
        on_step()
    freed = delete(store, plan.deletion, on_file=lambda file: on_step())
    if refused:
        raise refused
    return freed


def _damaged(store: Store, damaged: Mapping[str, Sequence[str]], what: str) -> Iterator[Doomed]:
    """Yield damaged files that are no entries: blobs, which as they are serve nobody, or plans, which keep nothing."""
    for path in (path for path in damaged if path.startswith(f"v1/{what}s/")):
        file = doom(store.root / path, what, Path(path).stem, f"damaged: {damaged[path][0]}")
        if file is not None:
            yield file
