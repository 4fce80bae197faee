"""Where a setting comes from: call argument, then flag, then environment, then default. There is no config file.

Says where the cache directory is; node/ says where this node's is. Knows nothing of what is stored in them.
"""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Iterable
from pathlib import Path

import platformdirs

from nanogpt_buckets.errors import UsageError

_APP = "nanogpt-buckets"
CACHE_DIR_VARIABLE = "NANOGPT_BUCKETS_CACHE_DIR"
LAYERS_VARIABLE = "NANOGPT_BUCKETS_LAYERS"
REMOTE_VARIABLE = "NANOGPT_BUCKETS_REMOTE"
REMOTE_MODE_VARIABLE = "NANOGPT_BUCKETS_REMOTE_MODE"
TRUSTED_VARIABLE = "NANOGPT_BUCKETS_TRUSTED"
POLICY_VARIABLE = "NANOGPT_BUCKETS_POLICY"
LOCAL_DIR_VARIABLE = "NANOGPT_BUCKETS_LOCAL_DIR"
RECORD_VARIABLE = "NANOGPT_BUCKETS_RECORD"


def cache_dir(argument: str | os.PathLike[str] | None = None) -> Path:
    """Return the directory of compiled buckets, which many machines may share. It need not exist.

    The caller's choice, else what NANOGPT_BUCKETS_CACHE_DIR says, else below the user's cache directory.

    Raises:
        UsageError: the caller's choice is empty, or below the home of nobody who is known.
    """
    if argument is not None and not os.fspath(argument):
        raise UsageError("the cache directory's name is empty", hint="leave --cache-dir out for the default")
    chosen = argument or os.environ.get(CACHE_DIR_VARIABLE) or user_cache() / "cache"
    return expanded(chosen, f"--cache-dir or {CACHE_DIR_VARIABLE}")


def layers(argument: Iterable[str | os.PathLike[str]] | None = None) -> list[Path]:
    """Return further cache directories to look in, in order, where nothing is written.

    The caller's choice, else what NANOGPT_BUCKETS_LAYERS says, separated as PATH is, else none.

    Raises:
        UsageError: one of them is no directory.
    """
    if isinstance(argument, str | os.PathLike):
        argument = [argument]
    chosen = list(argument or ()) or [name for name in os.environ.get(LAYERS_VARIABLE, "").split(os.pathsep) if name]
    said = f"--layer or {LAYERS_VARIABLE}"
    found = [expanded(path, said) for path in chosen]
    for path in found:
        if not path.is_dir():
            raise UsageError(f"the layer {path} is not a directory", hint=f"name one that build has filled in {said}")
    return found


def remote(argument: str | os.PathLike[str] | None = None) -> str | None:
    """Return where else to ask for what is not in the cache directory: a URL or a directory; None for nowhere."""
    return os.fspath(argument) if argument is not None else os.environ.get(REMOTE_VARIABLE) or None


def remote_mode(argument: str | None = None) -> str:
    """Return what is done there: "ro", unless the caller or NANOGPT_BUCKETS_REMOTE_MODE says "rw" or "off"."""
    return argument or os.environ.get(REMOTE_MODE_VARIABLE) or "ro"


def trusted(argument: Iterable[str] | str | None = None) -> list[str]:
    """Return the keys, or files of keys, whose signatures count besides the user's own file."""
    if isinstance(argument, str):
        argument = [argument]
    named = os.environ.get(TRUSTED_VARIABLE, "").split(",")
    return list(argument or ()) or [name.strip() for name in named if name.strip()]


def policy(argument: str | None = None) -> str:
    """Return how much is asked in a place of one's own: "off" unless the caller or NANOGPT_BUCKETS_POLICY says more."""
    return argument or os.environ.get(POLICY_VARIABLE) or "off"


def trust_file() -> Path:
    """Return the user's own file of trusted keys, which need not exist."""
    try:
        return Path(platformdirs.user_config_dir(_APP, appauthor=False)) / "trust.json"
    except RuntimeError:
        return Path("~/.config", _APP, "trust.json")


def cache_dir_option(directory: Path) -> str:
    """Return what to add to a command so that it uses this directory, with a blank before it; "" if it does anyway."""
    with contextlib.suppress(UsageError):  # there may be no default
        if directory == cache_dir():
            return ""
    return f" --cache-dir {shlex.quote(str(directory))}"


def expanded(path: str | os.PathLike[str], said: str) -> Path:
    """Return a path with "~" expanded, absolute; a UsageError about the option it was `said` in if that cannot be."""
    try:
        return Path(path).expanduser().absolute()
    except RuntimeError as error:
        why = "is below a home directory that cannot be found"
        raise UsageError(f"{os.fspath(path)} {why}", hint=f"give a full path in {said}") from error
    except OSError as error:
        raise UsageError(f"the current directory cannot be found: {error.strerror}", hint="cd to another") from error


def user_cache() -> Path:
    """Return where this user's programs keep what can be made again; below "~" where nobody knows the home."""
    try:
        return Path(platformdirs.user_cache_dir(_APP, appauthor=False))
    except RuntimeError:
        return Path("~/.cache", _APP)


def records_runs() -> bool:
    """Whether runs are counted on this node, for `report` and `plan`: unless NANOGPT_BUCKETS_RECORD is off."""
    return os.environ.get(RECORD_VARIABLE, "").lower() not in ("off", "0", "no", "false")
