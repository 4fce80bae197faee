"""What to delete from a store, as a value: planned, shown, and only then done.

Entries go before the blobs that they alone name, so that wherever deleting stops no entry lacks a blob. What somebody
touched after the plan was made stays, and so does a blob that an entry names by then. Ages are by the file system's own
time. Whatever a newer release wrote is left alone, and so are the blobs it may need. Knows nothing of terminals, nor of
how an age or a size is written.
"""

from __future__ import annotations

import contextlib
import functools
import os
import stat
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nanogpt_buckets.errors import CacheError
from nanogpt_buckets.files import Doomed, doom, list_names, move_to_absent, remove, time_in, unlink
from nanogpt_buckets.plan.bucket import Bucket
from nanogpt_buckets.store.entry import Found, Miss, Status, manifest_of
from nanogpt_buckets.store.lockfile import LockFile
from nanogpt_buckets.store.manifest import Manifest
from nanogpt_buckets.store.plans import Plans, without
from nanogpt_buckets.store.store import Store
from nanogpt_buckets.versions import installed, version_tuple

# A blob that no entry names may be one whose manifest is about to be written.
_YOUNG_S = 3600.0
# Longer than any compilation: what a running process staged or locked is younger.
_STALE_S = 24 * 3600.0
# Stamps of files are coarser than clocks.
_TICK_S = 1.0


@dataclass(frozen=True)
class Deletion:
    """What would be deleted, in that order; `notes` are what a person should know.

    `unplanned` are (plan, bucket) pairs: buckets that go out of plans, since they were deleted by name.
    """

    files: tuple[Doomed, ...]
    notes: tuple[str, ...] = ()
    unplanned: tuple[tuple[str, Bucket], ...] = ()

    @property
    def bytes(self) -> int:
        """What deleting it frees."""
        return sum(file.bytes for file in self.files)

    @property
    def entries(self) -> int:
        """How many entries go."""
        return sum(file.what == "entry" for file in self.files)


def plan_removal(store: Store, prefixes: Iterable[str]) -> Deletion:
    """Plan to delete the entries whose keys begin so, as `Store.find` takes them, and the blobs they alone name."""
    store.directory.check()
    found = [store.find(prefix) for prefix in prefixes]
    pins = Plans(store).pins()
    unplanned = [(name, pin[1]) for entry in found if (pin := _pin(entry)) for name in pins.buckets.get(pin, ())]
    notes = [f"bucket {bucket} goes out of plan {name}" for name, bucket in unplanned]
    chosen = {entry.key: "asked for" for entry in found}
    return replace(deletion_of(store, list(store.entries()), chosen, notes), unplanned=tuple(unplanned))


def plan_prune(
    store: Store,
    *,
    older_than_s: float | None = None,
    max_bytes: int | None = None,
    old_toolchains: bool = False,
    planned: bool = False,
    locks: Sequence[LockFile] = (),
    on_entry: Callable[[], None] = lambda: None,
) -> Deletion:
    """Plan to delete what is damaged or of no use, and more if asked.

    Damaged entries, blobs that no entry names, and what killed processes left always go; every byte is read to find
    them. Entries of a saved plan stay whatever their age and size, unless they are damaged or an old toolchain's.

    Args:
        store: the store.
        older_than_s: delete entries that were neither built nor loaded for so long.
        max_bytes: delete the longest unused entries until no more than this is left.
        old_toolchains: delete entries made for older versions of the libraries that are installed here.
        planned: age and size count for entries of plans too; the plans still name them.
        locks: what these files name stays whatever its age, size and toolchain, unless it is damaged.
        on_entry: called when an entry has been read.
    """
    store.directory.check()
    now = time_in(store.directory.path("tmp"))
    notes: list[str] = []
    entries = list(store.entries())
    pins = Plans(store).pins()
    notes += pins.notes
    chosen = {}
    for entry in entries:
        checked = store.check(entry)
        if isinstance(checked, Miss) and checked.status is Status.CORRUPT:
            chosen[entry.key] = f"damaged: {checked.why}"
        on_entry()
    readable = [manifest for entry in entries if (manifest := manifest_of(entry)) is not None]
    locked = {entry.manifest for lock in locks for entry in lock.entries}
    loose = [manifest for manifest in readable if manifest.digest not in locked]
    if old_toolchains:
        chosen |= {manifest.key: why for manifest in loose if (why := _outdated(manifest))}
    if planned:
        pins.buckets.clear()  # what a newer release planned stays all the same
    # a bucket that is unknown here is a newer release's
    free = [m for m in loose if m.bucket is not None and not pins.keep(m.family, m.bucket)]
    used = {manifest.key: store.entry_path(manifest).stat().st_mtime for manifest in free}
    if older_than_s is not None:
        limit = now + _TICK_S - older_than_s
        chosen |= {key: "not used for too long" for key, when in used.items() if when < limit and key not in chosen}
    if max_bytes is not None:
        candidates = sorted((key for key in used if key not in chosen), key=lambda key: (used[key], key))
        left = _shrink(readable, candidates, chosen, max_bytes)
        if left > max_bytes:
            what = "cannot be judged" if planned else "are in plans (--planned deletes those too) or cannot be judged"
            what = f"are locked, {what}" if locked else what
            notes.append(f"{left / 1e6:.1f} MB {what}, and stay; asked for at most {max_bytes / 1e6:.1f} MB")
    return deletion_of(store, entries, chosen, notes, unused_at=now)


def delete(store: Store, deletion: Deletion, on_file: Callable[[Doomed], None] = lambda file: None) -> int:
    """Do what was planned and return the bytes freed; a CacheError if something could not be: the rest was.

    Somebody may publish meanwhile. Blobs are put aside, manifests are listed once more, and what one of them names is
    given back; whoever publishes looks for its blobs once its manifest is there. So one of the two sees the other.
    """
    refused: list[str] = []
    freed = 0
    for file in deletion.files:
        if file.what != "blob":
            freed += file.bytes if _taken(file, lambda file: remove(file.path), refused) else 0
            on_file(file)
    blobs = [file for file in deletion.files if file.what == "blob"]
    if blobs:
        freed += _delete_blobs(store, blobs, refused, on_file)
    for name in {name for name, _ in deletion.unplanned}:
        gone = {bucket for plan, bucket in deletion.unplanned if plan == name}
        Plans(store).change(name, functools.partial(without, gone=gone))
    if refused:
        raise CacheError(refused[0], hint="the cache must be writable; what could be deleted is gone")
    return freed


def _delete_blobs(store: Store, blobs: list[Doomed], refused: list[str], on_file: Callable[[Doomed], None]) -> int:
    """Delete blobs, but for those that some entry names by then, and return the bytes freed."""
    folder = store.directory.path("tmp") / uuid.uuid4().hex
    gone: list[Doomed] = []

    def put_aside(file: Doomed) -> None:
        os.rename(file.path, folder / file.name)

    try:
        store.directory.prepare()
        folder.mkdir(0o700)
        # before and after: what is known to be named already need not be missing for a moment
        unnamed = _unnamed(store, blobs)
        aside = [file for file in unnamed if _taken(file, put_aside, refused)]
        gone = _unnamed(store, aside)
    except (OSError, CacheError) as error:
        refused.append(str(error))
    finally:
        names = {file.name for file in gone}
        for name in list_names(folder):
            if name not in names:
                with contextlib.suppress(FileExistsError):  # whoever needs it has written it again
                    move_to_absent(folder / name, store.blob_path(name))
            unlink(folder / name)
        with contextlib.suppress(OSError):
            folder.rmdir()
    for file in blobs:
        on_file(file)
    return sum(file.bytes for file in gone)


def _taken(file: Doomed, take: Callable[[Doomed], None], refused: list[str]) -> bool:
    """Take a file away, if it is as it was when that was planned; say in `refused` why it cannot be."""
    try:
        if _mtime_ns(file.path) != file.mtime_ns:
            return False
        take(file)
    except FileNotFoundError:
        return False  # somebody else's prune was quicker
    except OSError as error:
        refused.append(f"{file.path} cannot be deleted: {error.strerror or error}")
        return False
    return True


def _mtime_ns(path: Path) -> int:
    """Return when a file was last written or used: opened, for of a name a network file system may tell old times."""
    if stat.S_ISREG((found := path.lstat()).st_mode):
        with contextlib.suppress(PermissionError):
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            found = os.fstat(descriptor)
            os.close(descriptor)
    return found.st_mtime_ns


def _unnamed(store: Store, blobs: list[Doomed]) -> list[Doomed]:
    """Return those blobs that no entry names now; none, if there is an entry that cannot be read and may."""
    entries = list(store.entries())
    named = _blob_names(entries)
    return [file for file in blobs if file.name not in named] if all(map(manifest_of, entries)) else []


def _pin(entry: Found) -> tuple[str, Bucket] | None:
    manifest = manifest_of(entry)
    return None if manifest is None or manifest.bucket is None else (entry.family, manifest.bucket)


def _outdated(manifest: Manifest) -> str:
    """Say which library of an entry is older than the one installed here, if any is."""
    runtime = manifest.parts["family"].get("runtime", {})
    for library, made_for in runtime.items():
        here = installed(library)
        if here is not None and version_tuple(made_for) < version_tuple(here):
            return f"made for {library} {made_for}, {here} is installed"
    return ""


def _shrink(entries: list[Manifest], candidates: list[str], chosen: dict[str, str], max_bytes: int) -> int:
    """Add candidates to those chosen until the rest is small enough; return how large the rest then is."""

    def left() -> int:
        blobs = {blob.sha256: blob.size for entry in entries if entry.key not in chosen for blob in entry.blobs}
        return sum(blobs.values())

    for key in candidates:
        if left() <= max_bytes:
            break
        chosen[key] = "longest unused"
    return left()


def deletion_of(
    store: Store,
    entries: list[Found],
    chosen: Mapping[str, str],
    notes: list[str],
    unused_at: float | None = None,
) -> Deletion:
    """Put together the chosen entries, the blobs that they alone name and, given a time, all that nothing uses then."""
    doomed = [entry for entry in entries if entry.key in chosen]
    kept = [entry for entry in entries if entry.key not in chosen]
    files = [doom(store.entry_path(entry), "entry", entry.key, chosen[entry.key]) for entry in doomed]
    files += [
        doom(path, "leftover", entry.key, "of a deleted entry")
        for entry in doomed
        for path in (store.mark_path(entry), *(store.signature_path(m) for m in filter(None, [manifest_of(entry)])))
    ]
    needed, theirs = _blob_names(kept), _blob_names(doomed)
    unreadable = [entry for entry in kept if manifest_of(entry) is None]
    if unreadable:
        notes = [
            *notes,
            f"all blobs stay: {len(unreadable)} of the entries cannot be read by this release and may need them",
        ]
    else:
        files += _blobs(store, needed, theirs, unused_at)
    if unused_at is not None:
        old = unused_at - _STALE_S
        left = (
            doom(path, "leftover", path.name, "left by a process that ended") for path in store.directory.leftovers()
        )
        files += [file for file in left if file is not None and file.mtime_ns < old * 1e9]
        files += _signatures(store, entries, unused_at)
    return Deletion(tuple(file for file in files if file is not None), tuple(notes))


def _blob_names(entries: Iterable[Found]) -> set[str]:
    manifests = filter(None, map(manifest_of, entries))
    return {blob.sha256 for manifest in manifests for blob in manifest.blobs}


def _signatures(store: Store, entries: list[Found], now: float) -> Iterator[Doomed]:
    """Yield signatures whose manifest is not there, and is not about to be written."""
    manifests = [manifest for entry in entries if (manifest := manifest_of(entry)) is not None]
    known = {store.signature_path(manifest) for manifest in manifests}
    unreadable = tuple(entry.key for entry in entries if manifest_of(entry) is None)
    for path in store.signature_paths():
        if path not in known and not path.name.startswith(unreadable):
            file = doom(path, "leftover", path.name, "there is no such entry")
            if file is not None and file.mtime_ns < (now - _YOUNG_S) * 1e9:
                yield file


def _blobs(store: Store, needed: set[str], theirs: set[str], unused_at: float | None) -> Iterator[Doomed | None]:
    for path in store.blob_paths():
        if path.name in theirs - needed:
            yield doom(path, "blob", path.name, "of a deleted entry")
        elif unused_at is not None and path.name not in needed:
            file = doom(path, "blob", path.name, "no entry names it")
            if file is not None and file.mtime_ns < (unused_at - _YOUNG_S) * 1e9:
                yield file
