"""Try what publishing needs in the very place a cache is in, a directory or an object store, and say how it went there.

What is tried is what the tiers do, in a directory or under a name of its own that is gone afterwards. Also the child
that is the second process: run as `python -m nanogpt_buckets.store.probe`. Knows nothing of terminals, nor of entries.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import shutil
import statistics
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from nanogpt_buckets import child
from nanogpt_buckets.errors import BucketsError, CacheError
from nanogpt_buckets.files import write_new
from nanogpt_buckets.findings import Finding, Verdict
from nanogpt_buckets.mounts import mount_of
from nanogpt_buckets.store.directory import Directory
from nanogpt_buckets.store.document import MAX_BYTES
from nanogpt_buckets.store.entry import ELSEWHERE
from nanogpt_buckets.store.objects import Objects
from nanogpt_buckets.store.trust import check_location, why_shared

Result = TypeVar("Result")

_NOT_OURS = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
# When an entry was last used is noted, and shown, to the minute; no smaller difference changes what anybody sees.
_SKEW_S = 60.0
# The kernel stamps files with the time of its last tick.
_TICK_S = 0.02
_WAIT_S = 1.0
_POLL_S = 0.002


# --- a directory ------------------------------------------------------------------------------------------------------


def probe_directory(root: Path) -> Iterator[Finding]:
    """Try a cache directory, or the place where it would be made; nothing is left there.

    Only where nobody but this user decides what is written where: a cache that can be believed, or is meant to be
    shared, or the nearest directory above one that does not exist yet, if it is this user's.
    """
    try:
        place = _place(root)
        folder = place / (uuid.uuid4().hex if place.name == "tmp" else f".nanogpt-buckets-doctor-{uuid.uuid4().hex}")
        folder.mkdir(0o700)
    except CacheError as error:
        yield Finding("cache", "publishing", f"not tried: {error.message}")
        return
    except OSError as error:
        text = f"not tried: {place} cannot be written: {error.strerror or error}"
        lasting = error.errno in _NOT_OURS  # which is fine for who only reads
        yield Finding("cache", "publishing", text) if lasting else _problem("publishing", text, ELSEWHERE)
        return
    try:
        yield from _tried(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _place(root: Path) -> Path:
    """Return where a cache stages its files, or would; a CacheError says why nothing may be tried there."""
    check_location(root, anyone=bool(why_shared(root)))
    staged = root / "v1" / "tmp"
    place = next(place for place in (staged, *staged.parents) if os.path.lexists(place))
    if place in root.parents and place.stat().st_uid != os.geteuid():
        raise CacheError(f"there is no cache yet, and {place} is not yours")
    return place


def _tried(folder: Path) -> Iterator[Finding]:
    """Try everything in a directory of our own, which is a cache for the time being."""
    tier = Directory(folder, shared=True)
    for name, attempt in (("exclusive", _exclusive), ("publishing", _publishing), ("clock", _clock)):
        try:
            yield attempt(tier)
        except (OSError, BucketsError) as error:
            yield _problem(name, f"failed: {getattr(error, 'strerror', None) or error}", ELSEWHERE)
    yield from _two_processes(tier)


def _exclusive(tier: Directory) -> Finding:
    """Create a file that must not exist, twice."""
    for _ in range(2):
        try:
            write_new(tier.root / "new", b"", 0o600)
        except FileExistsError:
            return Finding("cache", "exclusive", "a file is created once")
    return _problem("exclusive", "a file that is there is created once more", ELSEWHERE)


def _publishing(tier: Directory) -> Finding:
    """Publish under one name twice, as entries are, and see whose bytes stay and by which way they came there."""
    published = [tier.put("plans/name", data) for data in (b"first", b"second")]
    if published != [True, False] or tier.get("plans/name", anyone=True) != b"first":
        return _problem("publishing", "what is published is replaced by who comes later", ELSEWHERE)
    try:
        os.link(tier.path("plans/name"), tier.path("plans/link"))
    except OSError as error:
        how = "staged, then renamed, where two builders at once may replace each other's equal entry"
        return Finding("cache", "publishing", f"{how}: hard links: {error.strerror}")
    return Finding("cache", "publishing", "staged, then linked to its name: hard links work")


def _clock(tier: Directory) -> Finding:
    """Compare when a file says that it was written with when it was."""
    before = time.time()
    tier.put("plans/clock", b"", replace=True)
    found, after = tier.path("plans/clock").stat().st_mtime, time.time()
    skew = min(found - (before - _TICK_S), 0.0) + max(found - (after + _TICK_S), 0.0)
    way = f"{abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} this machine's"
    if abs(skew) > _SKEW_S:
        hint = "set the clocks by NTP, here or on the file server: last used is wrong by so much"
        return Finding("cache", "clock", f"files are written {way}", Verdict.WARNING, hint)
    return Finding("cache", "clock", f"files are written {way}" if abs(skew) >= 1 else "files bear this machine's time")


def _two_processes(tier: Directory) -> Iterator[Finding]:
    """Hold a lock, and create a name, while another process looks."""
    made: list[float] = []

    def on_event(event: child.Event) -> None:
        if event["event"] == "looked":
            release.close()
            tier.put("plans/late", b"")
            made.append(time.monotonic())  # one clock for all processes of a machine

    try:
        with contextlib.ExitStack() as release:
            held = release.enter_context(tier.locked("probe", 0.0))
            request = {"root": str(tier.root), "name": "plans/late"}
            seen = child.run(__name__, request, workdir=tier.root, on_event=on_event, timeout_s=60.0)
    except (OSError, BucketsError) as error:
        hint = "what two processes see of each other there is not known"
        yield Finding("cache", "locks", f"not tried: {error}", Verdict.WARNING, hint)
        return
    if held and not seen["locked"] and seen["then"]:
        yield Finding("cache", "locks", "one process of this machine keeps another out")
    else:
        hint = "two builders at once both compile, and what one of them built is kept"
        yield Finding("cache", "locks", "they do not keep another process out", Verdict.WARNING, hint)
    yield _new_names(tier.root, None if seen["at"] is None else max(0.0, seen["at"] - made[0]))


def _new_names(root: Path, delay_s: float | None) -> Finding:
    """Say when others see a name that they looked for before it was there: here as tried, elsewhere as mounted."""
    mount, text = mount_of(root), "another process sees them at once"
    if delay_s is None or delay_s > _POLL_S * 5:
        when = f"after {delay_s:.2f} s" if delay_s is not None else f"not within {_WAIT_S:.0f} s"
        text = f"another process sees them {when}"
    if mount.names_kept_s:
        text += f", another machine after up to {mount.names_kept_s} s: meanwhile it may compile what is there"
    return Finding("cache", "new names", text)


def _see(request: dict[str, Any], emit: Callable[..., None]) -> dict[str, Any]:
    """Be the second process: try the lock, look for a name, wait for it to appear, try the lock again."""
    tier = Directory(Path(request["root"]), shared=True)
    with tier.locked("probe", 0.0) as locked:
        pass
    path = tier.path(request["name"])
    os.path.lexists(path)
    emit("looked")
    deadline = time.monotonic() + _WAIT_S
    while not (found := os.path.lexists(path)) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    at = time.monotonic() if found else None
    with tier.locked("probe", _WAIT_S) as then:
        return {"locked": locked, "then": then, "at": at}


# --- an object store --------------------------------------------------------------------------------------------------


def probe_objects(tier: Objects) -> list[Finding]:
    """Ask an object store for what pulling and pushing ask it for; the object that is written is deleted again."""
    waited: list[float] = []

    def ask(call: Callable[[], Result]) -> Result:
        start = time.perf_counter()
        try:
            return call()
        finally:
            waited.append((time.perf_counter() - start) * 1000)

    try:
        families = ask(lambda: tier.names("entries"))
        manifests = []
        for folder in (f"entries/{family}" for family in families):
            names = ask(functools.partial(tier.names, folder))
            manifests += [f"{folder}/{name}" for name in names if name.endswith(".json")]
        found = [Finding("cache", "reached", "bucket and credentials are accepted, and so is this machine's clock")]
        found.append(Finding("cache", "content", f"{len(manifests)} entries"))
        if manifests:
            ask(lambda: tier.get(manifests[0], limit=MAX_BYTES, anyone=True))
            found.append(Finding("cache", "readable", "yes"))
    except (FileNotFoundError, CacheError) as error:
        return [_problem("reached", str(error), getattr(error, "hint", None) or "try again")]
    found += _written_objects(tier, ask)
    text = f"{statistics.median(waited):.0f} ms, {max(waited):.0f} ms at most, of {len(waited)}"
    return [*found, Finding("cache", "requests", text)]


def _written_objects(tier: Objects, ask: Callable[[Callable[[], Any]], Any]) -> list[Finding]:
    """Write an object on the condition that there is none, twice, read it back, and delete it."""
    name = f"tmp/doctor-{uuid.uuid4().hex}"
    try:
        first = ask(lambda: tier.put(name, b"first"))
    except CacheError as error:
        hint = "what is there can be pulled; pushing needs credentials that may write"
        return [Finding("cache", "writable", f"no: {error.message}", Verdict.WARNING, hint)]
    found = [Finding("cache", "writable", "yes")]
    try:
        second = ask(lambda: tier.put(name, b"second"))
        if (first, second, ask(lambda: tier.get(name, limit=MAX_BYTES, anyone=True))) == (True, False, b"first"):
            found.append(Finding("cache", "publishing", "on the condition that there is none: who is first stays"))
        else:
            hint = "push from one process at a time, or use a service that has conditional writes"
            found.append(_problem("publishing", "what is published is replaced by who comes later", hint))
    except (FileNotFoundError, CacheError) as error:
        found.append(_problem("publishing", f"failed: {error}", getattr(error, "hint", None) or "try again"))
    finally:
        try:
            ask(lambda: tier.delete(name))
        except CacheError as error:
            text = f"{tier.url}/v1/{name} cannot be deleted: {error.message}"
            found.append(Finding("cache", "leftover", text, Verdict.WARNING, "delete it; nothing ever reads it"))
    return found


def _problem(name: str, value: str, hint: str) -> Finding:
    return Finding("cache", name, value, Verdict.PROBLEM, hint)


if __name__ == "__main__":
    child.serve(_see)
