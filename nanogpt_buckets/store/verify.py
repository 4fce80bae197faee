"""Read a whole store and say what is damaged. Changes nothing; knows nothing of what entries are for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from nanogpt_buckets.errors import CacheError, IncompatibleEntry
from nanogpt_buckets.store.entry import Found, Miss, Status, manifest_of
from nanogpt_buckets.store.manifest import Blob
from nanogpt_buckets.store.plans import Plans
from nanogpt_buckets.store.store import Store


@dataclass(frozen=True)
class Problem:
    """A file that is not in order; `path` is relative to the root, and only what is CORRUPT may be replaced."""

    path: str
    what: str
    status: Status = Status.CORRUPT


@dataclass(frozen=True)
class Verification:
    """What `verify` read; `bytes` counts blobs."""

    entries: int
    blobs: int
    bytes: int
    problems: tuple[Problem, ...]


def verify(store: Store, on_file: Callable[[int], None] | None = None) -> Verification:
    """Read everything: each manifest with its blobs, and each blob whether or not a manifest names it.

    `on_file` is called with the size of each blob once it is read.
    """
    store.directory.check()
    # before the blobs: what a manifest names was stored before it
    entries = list(store.entries())
    paths = store.blob_paths()
    sizes: dict[str, int] = {}
    unread: dict[str, Status] = {}
    problems = []
    for path in paths:
        try:
            size = path.lstat().st_size
            store.read_blob(Blob("blob", path.name, size))
            sizes[path.name] = size
        except (OSError, CacheError) as error:
            unread[path.name] = Miss.of(error).status
            problems.append(Problem(path.relative_to(store.root).as_posix(), str(error), unread[path.name]))
        if on_file is not None:
            on_file(sizes.get(path.name, 0))
    for entry in entries:
        problems += _damage(store.entry_path(entry).relative_to(store.root).as_posix(), entry, sizes, unread)
    problems += _damaged_plans(store)
    return Verification(len(entries), len(paths), sum(sizes.values()), tuple(problems))


def _damaged_plans(store: Store) -> Iterator[Problem]:
    plans = Plans(store)
    for name in plans.names():
        try:
            plans.load(name)
        except IncompatibleEntry:
            pass  # a newer release's; it is in order as far as this one can tell
        except CacheError as error:
            yield Problem(f"v1/plans/{name}.json", error.message, Miss.of(error).status)


def _damage(path: str, entry: Found, sizes: Mapping[str, int], unread: Mapping[str, Status]) -> Iterator[Problem]:
    if isinstance(entry, Miss) and entry.status is not Status.INCOMPATIBLE:
        yield Problem(path, entry.why, entry.status)
    manifest = manifest_of(entry)
    for blob in manifest.blobs if manifest else ():
        if sizes.get(blob.sha256) != blob.size:
            what = f"{blob.role} ({blob.sha256[:12]}) is missing or damaged"
            yield Problem(path, what, unread.get(blob.sha256, Status.CORRUPT))
