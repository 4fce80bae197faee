"""This node's own directory: what one user keeps on one machine, and never shares.

Its only layout:

    weights/<digest>.safetensors     prepared weights, ready to be mapped (model/prepared.py)
    verified/<digest>.json           that this file was read whole, and which file that was
    sources/<sha256>.json            which prepared file a model's source became (sources.py)
    canary/<weights>-<blobs>.json    whether a compiled bucket agreed with eager for these weights (run/loader.py)
    loading/<weights>-<manifest>.json  that one is being loaded for the first time (crumbs.py)
    failures/<key>.json              what failed to compile within the last hour (failures.py)
    revoked/<name>.json              that a manifest or a signer's key counts for nothing (store/signers.py)
    libraries/<sha256>.so            private copies of libraries, where there are no sealed anonymous files
    costs/<sha256>.json              what calls of a model's buckets take here (costs.py)
    traffic/<sha256>.json            what runs asked of a model (run/traffic.py)
    traffic/.lock                    held while that is written
    last-run.json                    counters of the last run, and of all (run/report.py)
    .last-run.lock                   held while they are written
    tmp-*, */tmp-*                   being written; a leftover after a day

Everything JSON is a record with a format number (records.py); prune.py says what of all this is of no use. Others must
not be able to write here: `folder` checks that for every reader and writer. Knows nothing of what the files mean.
"""

from __future__ import annotations

import contextlib
import fnmatch
import os
import stat
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from nanogpt_buckets.errors import BucketsError, CacheError, UntrustedStore
from nanogpt_buckets.files import list_names, remove, unlink, write_new
from nanogpt_buckets.mounts import mount_of
from nanogpt_buckets.owners import check_way, others
from nanogpt_buckets.settings import LOCAL_DIR_VARIABLE, expanded, user_cache

_ELSEWHERE = f"name a directory of your own in {LOCAL_DIR_VARIABLE}"


def directory() -> Path:
    """Return where this node's directory is. It need not exist, and is not checked.

    NANOGPT_BUCKETS_LOCAL_DIR, else the user's cache directory, else, where that is on a network file system, a
    directory of this user's under the temporary directory. A UsageError if it is below the home of nobody known.
    """
    named = os.environ.get(LOCAL_DIR_VARIABLE)
    chosen = expanded(named or user_cache() / "local", LOCAL_DIR_VARIABLE)
    network = not named and mount_of(chosen).network
    return Path(tempfile.gettempdir(), f"nanogpt-buckets-{os.getuid()}") if network else chosen


def folder(name: str = "", *, make: bool = False) -> Path:
    """Return a folder of this node's directory, or itself, made if asked, once known to be nobody else's to write.

    Raises:
        UntrustedStore: others can write it or put another in its place, or it is somebody else's.
        CacheError: it is not a directory, or cannot be made or examined.
    """
    root = directory()
    path = root / name
    if make:
        with writing():
            for place in (*reversed(path.parents), path):
                place.mkdir(mode=0o700, exist_ok=True)
    try:
        check_way(root, _ELSEWHERE)
        if name and path.is_symlink():
            raise CacheError(f"{path} is a symbolic link", hint=f"delete it, or {_ELSEWHERE}")
        for place in (root, path):
            found = place.stat()
            if not stat.S_ISDIR(found.st_mode):
                raise CacheError(f"{place} cannot be written: it is not a directory", hint=_ELSEWHERE)
            if why := others(found):
                hint = f"delete it, for all in it can be made again, or {_ELSEWHERE}"
                raise UntrustedStore(f"{place} {why}, so what is in it may be somebody else's", hint=hint)
    except (FileNotFoundError, NotADirectoryError):
        pass  # nobody has written what is not there
    except OSError as error:
        raise CacheError(f"{path} cannot be examined: {error.strerror or error}", hint=_ELSEWHERE) from error
    return path


def listed(name: str, pattern: str) -> list[Path]:
    """Return what is in a folder, as `folder` returns it, under names of some pattern; nothing if there is none."""
    place = folder(name)
    return [place / found for found in fnmatch.filter(list_names(place), pattern)]


@contextlib.contextmanager
def writing() -> Iterator[None]:
    """Turn an OSError inside into a CacheError: this node's directory cannot be written. Other errors pass."""
    try:
        yield
    except BucketsError:
        raise  # some are OSErrors as well
    except OSError as error:
        hint = f"set {LOCAL_DIR_VARIABLE} to a directory with room for the weights"
        raise CacheError(f"{directory()} cannot be written: {error.strerror or error}", hint=hint) from error


def put(path: Path, content: bytes, mode: int) -> None:
    """Write a file of some folder aside, and put it in the place of what is there."""
    staged = path.with_name(f"tmp-{uuid.uuid4().hex}")
    with writing():
        try:
            write_new(staged, content, mode)
            if path.is_dir():
                remove(path)
            staged.replace(path)
        finally:
            unlink(staged)


def is_stale(path: Path) -> bool:
    """Whether something is older than anything that is being prepared or staged."""
    with contextlib.suppress(OSError):
        return path.lstat().st_mtime < time.time() - 24 * 3600
    return False
