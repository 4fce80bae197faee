"""Where a setting comes from: call argument, then flag, then environment, then default. There is no config file.

Holds the two directories and nothing else. Knows nothing of what is stored in them.
"""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

_APP = "nanogpt-buckets"
CACHE_DIR_VARIABLE = "NANOGPT_BUCKETS_CACHE_DIR"
LOCAL_DIR_VARIABLE = "NANOGPT_BUCKETS_LOCAL_DIR"


def cache_dir(argument: str | os.PathLike[str] | None = None) -> Path:
    """Return the directory of compiled buckets, which many machines may share. It need not exist.

    Args:
        argument: the caller's choice; None asks NANOGPT_BUCKETS_CACHE_DIR, then the user's cache directory.
    """
    if argument is not None:
        return Path(argument).expanduser().absolute()
    from_environment = os.environ.get(CACHE_DIR_VARIABLE)
    return Path(from_environment or _user_cache() / "cache").expanduser().absolute()


def local_dir() -> Path:
    """Return this node's own directory (prepared weights, canary results). It need not exist."""
    from_environment = os.environ.get(LOCAL_DIR_VARIABLE)
    return Path(from_environment or _user_cache() / "local").expanduser().absolute()


def _user_cache() -> Path:
    return Path(platformdirs.user_cache_dir(_APP, appauthor=False))
