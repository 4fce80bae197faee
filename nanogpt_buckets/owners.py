"""Who else could have written a file or directory, or can put another in its place.

Knows nothing of what is kept where.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from nanogpt_buckets.errors import CacheError, TransientError, UntrustedStore

_HAS_USERS = hasattr(os, "geteuid")
_MOST_LINKS = 40


def others(found: os.stat_result) -> str:
    """Say how others could have written a file or directory; "" if only this user or root can, and on Windows."""
    if not _HAS_USERS:
        return ""
    if found.st_uid not in (os.geteuid(), 0):
        return f"belongs to user {found.st_uid}"
    if stat.S_ISLNK(found.st_mode) or not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return ""
    return f"can be written by {'everyone' if found.st_mode & stat.S_IWOTH else 'its group'}"


def doubted(path: Path, hint: str) -> UntrustedStore | None:
    """Return what speaks against believing a file that its user named: others could have written or exchanged it.

    A group that is this user's alone is nobody else. Raises as `check_way` where the file cannot be examined.
    """
    try:
        found = check_way(path, hint)
    except UntrustedStore as error:
        return error
    why = others(found) if found else ""
    if found is None or not why or (not why.startswith("belongs") and _is_own_group(found)):
        return None
    return UntrustedStore(f"{path} {why}, who could have changed it", hint=hint)


def check_way(path: Path, hint: str) -> os.stat_result | None:
    """Return what a path leads to, None if nothing, once it is known that others can exchange nothing on the way there.

    Raises:
        UntrustedStore: others can.
        CacheError: the way goes through a file, or in a circle; a TransientError if it cannot be examined this time.
    """
    *above, (_, last) = _way(path, hint)
    for place, found in above:
        if found is not None and (why := others(found)) and _is_open(place, found, why):
            raise UntrustedStore(f"{place} {why}, who could put something else in the place of {path}", hint=hint)
    return last


def _way(path: Path, hint: str) -> Iterator[tuple[str, os.stat_result | None]]:
    """Yield all that is passed on the way to a path, links too, and what it leads to last; None for what is missing."""
    path = path.absolute()
    here, names, links = path.anchor, list(reversed(path.parts[1:])), 0
    yield here, look(here, hint)
    while names:
        name = names.pop()
        place = os.path.dirname(here) if name == ".." else os.path.join(here, name)
        found = look(place, hint)
        yield place, found
        if found is None:
            return
        if not stat.S_ISLNK(found.st_mode):
            here = place
            continue
        links += 1
        if links > _MOST_LINKS:
            raise CacheError(f"{path} goes through too many symbolic links", hint=hint)
        try:
            target = Path(os.readlink(place))
        except OSError as error:
            raise _unexamined(place, error) from error
        names += reversed(target.parts[1:] if target.is_absolute() else target.parts)
        here = target.anchor if target.is_absolute() else here


def look(place: Path | str, hint: str) -> os.stat_result | None:
    """Return what is in a place, links not followed; None if nothing is. Raises as `check_way`."""
    try:
        return os.lstat(place)
    except FileNotFoundError:
        return None
    except NotADirectoryError as error:
        raise CacheError(f"{os.path.dirname(place)} is not a directory", hint=hint) from error
    except OSError as error:
        raise _unexamined(place, error) from error


def _unexamined(place: Path | str, error: OSError) -> TransientError:
    return TransientError(f"{place} cannot be examined: {error.strerror or error}")


def _is_open(place: str, found: os.stat_result, why: str) -> bool:
    """Whether others can put something else in the place of what is below a directory, or behind a link."""
    if why.startswith("belongs"):
        # root, as seen from a user namespace that has another
        top = look(Path(place).anchor, "")
        return top is None or found.st_uid != top.st_uid
    return not (found.st_mode & stat.S_ISVTX or _is_own_group(found))


def _is_own_group(found: os.stat_result) -> bool:
    """Whether a group is the one that many systems make for each user alone, and nobody has joined it."""
    with contextlib.suppress(ImportError, KeyError):
        import grp
        import pwd

        group, user = grp.getgrgid(found.st_gid), pwd.getpwuid(os.geteuid()).pw_name
        own = group.gr_name == user and set(group.gr_mem) <= {user}
        return own and os.geteuid() != 0 and not found.st_mode & stat.S_IWOTH
    return False
