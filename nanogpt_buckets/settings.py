"""Where a setting comes from: call argument, then flag, then environment, then default. There is no config file.

Holds the two directories and nothing else. Knows nothing of what is stored in them.
"""

from __future__ import annotations

import os
import shlex
import stat
import tempfile
from pathlib import Path

import platformdirs

from nanogpt_buckets.errors import UntrustedStore, UsageError
from nanogpt_buckets.mounts import mount_of

_APP = "nanogpt-buckets"
CACHE_DIR_VARIABLE = "NANOGPT_BUCKETS_CACHE_DIR"
LOCAL_DIR_VARIABLE = "NANOGPT_BUCKETS_LOCAL_DIR"


def cache_dir(argument: str | os.PathLike[str] | None = None) -> Path:
    """Return the directory of compiled buckets, which many machines may share. It need not exist.

    Args:
        argument: the caller's choice; None asks NANOGPT_BUCKETS_CACHE_DIR, then the user's cache directory.

    Raises:
        UsageError: the caller's choice is empty.
    """
    if argument is not None:
        if not os.fspath(argument):
            raise UsageError("the cache directory's name is empty", hint="leave --cache-dir out for the default")
        return Path(argument).expanduser().absolute()
    from_environment = os.environ.get(CACHE_DIR_VARIABLE)
    return Path(from_environment or _user_cache() / "cache").expanduser().absolute()


def cache_dir_option(directory: Path) -> str:
    """Return what to add to a command so that it uses this directory, with a blank before it; "" if it does anyway."""
    return "" if directory == cache_dir() else f" --cache-dir {shlex.quote(str(directory))}"


def local_dir() -> Path:
    """Return this node's own directory (prepared weights, canary results, the last run). It need not exist.

    NANOGPT_BUCKETS_LOCAL_DIR, else the user's cache directory, else, where that is on a network file system, a private
    directory of this user's under the temporary directory.

    Raises:
        UntrustedStore: that private directory is somebody else's.
    """
    from_environment = os.environ.get(LOCAL_DIR_VARIABLE)
    chosen = Path(from_environment or _user_cache() / "local").expanduser().absolute()
    if from_environment or not mount_of(chosen).network:
        return chosen
    return _private_temporary()


def _private_temporary() -> Path:
    path = Path(tempfile.gettempdir()) / f"{_APP}-{os.getuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise UntrustedStore(
            f"{path} is not a private directory of this user's",
            hint=f"name another one in {LOCAL_DIR_VARIABLE}",
        )
    return path


def _user_cache() -> Path:
    return Path(platformdirs.user_cache_dir(_APP, appauthor=False))
