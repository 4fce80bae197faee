"""What may be believed for its place: files and directories that nobody else can have written; the one way to read.

A compiled bucket is native code, so trust is by place and owner. On the way to the cache directory nobody may be able
to exchange anything; all in it must be this user's or root's, and closed to others. Files are opened from the root
down, name by name, and the open descriptor is judged. What was open to others once may hold anything now: it is deleted
and built again, never closed and believed.

Where `anyone` may have written, since whoever reads compares with a digest that is believed, it must still be plain
directories and files: nothing is followed out of the root. Knows nothing of manifests.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shlex
import stat
from collections.abc import Iterable
from pathlib import Path

from nanogpt_buckets.errors import CacheError, TransientError, UntrustedStore
from nanogpt_buckets.files import read_file
from nanogpt_buckets.owners import check_way, look, others

_INSIDE = ("v1", "v1/entries", "v1/blobs", "v1/plans", "v1/locks", "v1/tmp")
_ELSEWHERE = "use a directory of your own: --cache-dir DIR or NANOGPT_BUCKETS_CACHE_DIR"
_SHARED = (
    "share it with a lock file (build --lock FILE, then --locked FILE) or with signatures (build --sign-key FILE, then "
    "--trusted KEY)"
)
# O_PATH: some may enter a directory and not list it
_FOLDER = getattr(os, "O_PATH", os.O_RDONLY) | getattr(os, "O_DIRECTORY", 0)


def check_location(root: Path, *further: Path | str, anyone: bool = False) -> None:
    """Raise unless only this user, or root, can have made a store's directories, and `further` ones in it.

    One that does not exist yet is fine, if others cannot make it. The kind of CacheError says what is wrong: others
    can, it is no directory, or it cannot be examined this time.
    """
    found = _followed(root) if anyone else check_way(root, _ELSEWHERE)
    base = os.fspath(root)
    # as text, since this is asked for every file of a large cache
    for place in (base, *(f"{base}/{name}" for name in _INSIDE), *(os.fspath(place) for place in further)):
        found = found if place == base else look(place, _ELSEWHERE)
        if found is not None:
            _refuse_others(root, place, found, anyone)
            if not stat.S_ISDIR(found.st_mode):
                raise CacheError(f"{place} is not a directory", hint=_ELSEWHERE if place == base else _remedy(root))


def why_shared(root: Path) -> str:
    """Say how others can write a cache directory as such, for its mode or owner; "" if they cannot, or it is none."""
    with contextlib.suppress(OSError):
        return others(root.stat())
    return ""


def check_file(root: Path, path: Path, *, anyone: bool = False) -> None:
    """Raise UntrustedStore if there is something that somebody else can have written, or a symbolic link."""
    if (found := look(path, _ELSEWHERE)) is not None:
        _refuse_others(root, path, found, anyone)


def check_all(root: Path) -> None:
    """Raise what using a store would, for the first of all its directories and files that cannot be believed."""
    check_location(root)
    for base, folders, files in os.walk(root / "v1"):
        for name in sorted((*folders, *files)):
            check_file(root, Path(base, name))


def read(root: Path, path: Path, *, size: int | None = None, limit: int | None = None, anyone: bool = False) -> bytes:
    """Return the content of a file below `root` that only this user, or root, can have written; see `read_file`.

    Raises:
        FileNotFoundError: it is not there.
        CacheError: it is no file of that size, or cannot be read or believed; the kind says which.
    """
    check_location(root, os.path.dirname(path), anyone=anyone)
    try:
        return read_file(path, size=size, limit=limit, opener=functools.partial(_open_below, root, anyone))
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise TransientError(f"{path} cannot be read: {error.strerror or error}") from error


def read_all(
    root: Path, folder: Path, names: Iterable[str], *, limit: int, anyone: bool = False
) -> tuple[dict[str, bytes], UntrustedStore | None]:
    """Read the files of a directory below `root`, whose location was checked, as `read` does each.

    Returns those that can be read, and what speaks against believing them, which without `anyone` leaves none: whatever
    cannot be read, or is itself to be doubted, is left out.
    """
    files: dict[str, bytes] = {}
    doubt = None
    try:
        try:
            descriptor = _open_below(root, False, folder, _FOLDER)
        except UntrustedStore as error:
            if not anyone:
                raise
            doubt, descriptor = error, _open_below(root, True, folder, _FOLDER)
    except (OSError, CacheError):
        return files, None
    try:
        for name in names:
            with contextlib.suppress(OSError, CacheError):
                opener = functools.partial(_open_in, root, doubt is not None, descriptor)
                files[name] = read_file(folder / name, limit=limit, opener=opener)
    finally:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    return files, doubt


def _open_in(root: Path, anyone: bool, folder: int, path: Path, flags: int) -> int:
    """Open a file in an open directory, and judge its descriptor."""
    descriptor = os.open(path.name, flags, dir_fd=folder)
    try:
        _refuse_others(root, path, os.fstat(descriptor), anyone)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _open_below(root: Path, anyone: bool, path: Path, flags: int) -> int:
    """Open a file by its names from the root down, and judge each descriptor."""
    if os.open not in os.supports_dir_fd:
        return os.open(path, flags)
    place, names, descriptor = os.fspath(root), path.parts[len(root.parts) :], os.open(root, _FOLDER)
    try:
        _refuse_others(root, place, os.fstat(descriptor), anyone)
        for depth, name in enumerate(names, start=1):
            place = f"{place}/{name}"
            last = depth == len(names)
            inner = os.open(name, flags if last else _FOLDER | os.O_NOFOLLOW, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = inner
            _refuse_others(root, place, os.fstat(descriptor), anyone)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _followed(root: Path) -> os.stat_result | None:
    """Return what the root leads to, whoever may change that; None if nothing."""
    try:
        return root.stat()
    except (FileNotFoundError, NotADirectoryError):
        return look(root, _ELSEWHERE)
    except OSError as error:
        raise TransientError(f"{root} cannot be examined: {error.strerror or error}") from error


def _refuse_others(root: Path, place: Path | str, found: os.stat_result, anyone: bool = False) -> None:
    if stat.S_ISLNK(found.st_mode):
        raise UntrustedStore(f"{place} is a symbolic link, and what it leads to may be anybody's", hint=_remedy(root))
    if not anyone and (why := others(found)):
        way_out = _remedy(root) if Path(place) != root else f"{_SHARED}, or {_remedy(root)}"
        raise UntrustedStore(f"{place} {why}, who could have written the native code in it", hint=way_out)


def _remedy(root: Path) -> str:
    """Say what to do about a store in which others may have written: all that is in it can be made again."""
    with contextlib.suppress(OSError):
        if os.stat(root).st_uid == os.geteuid() and set(os.listdir(root)) <= {"v1", "CACHEDIR.TAG"}:
            return f"delete it and build again: rm -r {shlex.quote(str(root))}"
    return _ELSEWHERE
