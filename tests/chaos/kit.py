"""What the families share: entries, every way to load them, the tally of what became of each fault, children.

Knows nothing of any one fault.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from store_kit import make

from nanogpt_buckets.plan.bucket import Bucket, Plan
from nanogpt_buckets.run.loader import artifact_of
from nanogpt_buckets.store.entries import Entries
from nanogpt_buckets.store.entry import Found, Miss, Status, Verified
from nanogpt_buckets.store.manifest import Manifest
from nanogpt_buckets.store.plans import Plans, SavedPlan
from nanogpt_buckets.store.store import Store
from nanogpt_buckets.store.verify import verify

NOBODY = 65534
# How long a child may take before it is taken to hang.
_PATIENCE_S = 120


class LostEntry(AssertionError):
    """What was published whole cannot be read, though nothing deleted or damaged it, or cannot be mended."""


class WrongLoad(AssertionError):
    """The load path gave what no builder published under that key."""


# How a child ends that found one.
_CODES: dict[type[BaseException], int] = {LostEntry: 71, WrongLoad: 72}


@dataclass
class Tally:
    """What became of one kind of fault; `said` is what went wrong."""

    family: int
    what: str
    injected: int = 0
    survived: int = 0
    lost: int = 0
    wrong: int = 0
    said: list[str] = field(default_factory=list)

    @contextlib.contextmanager
    def case(self, name: object) -> Iterator[None]:
        """Count one fault, put in and judged inside."""
        self.injected += 1
        try:
            yield
        except Exception as error:
            self.lost += isinstance(error, LostEntry)
            self.wrong += isinstance(error, WrongLoad)
            where = traceback.extract_tb(error.__traceback__)[-1]
            said = f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}: {error}"
            self.said.append(f"{self.what}, {name}: {said}")
        else:
            self.survived += 1


@dataclass(frozen=True)
class Task:
    """How one family is run: an empty directory of its own, a source of chance, and whether a selection will do."""

    where: Path
    chance: random.Random
    quick: bool

    def some(self, cases: Iterable, most: int) -> list:
        """Return all cases or, in a quick run, at most so many of them by chance, in order."""
        listed = list(cases)
        if not self.quick or len(listed) <= most:
            return listed
        return [listed[index] for index in sorted(self.chance.sample(range(len(listed)), most))]

    def room(self, name: str) -> Path:
        """Return a directory that is empty, whatever was there before."""
        path = self.where / name
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(mode=0o700)
        return path


@dataclass(frozen=True)
class Build:
    """What one builder made for a key."""

    manifest: Manifest
    blobs: Mapping[str, bytes]


def build(tag: str, seq_len: int = 8, *, family: str = "f", times: int = 3, roles: Iterable[str] = ("code", "data")):
    """Return an entry for bucket 1xS whose every byte says who built it."""
    made = make(tag, family=family, roles=tuple(roles), bucket=Bucket(1, seq_len).to_json(), times=times)
    return Build(*made)


def publish(store: Entries, *builds: Build) -> None:
    for each in builds:
        store.publish(each.manifest, each.blobs)


def plan(store: Store, *builds: Build, name: str = "p") -> None:
    """Save a plan of some entries' buckets, which keeps them."""
    saved = SavedPlan(Plan([b.manifest.bucket for b in builds]), frozenset(b.manifest.family for b in builds))
    Plans(store).change(name, lambda before: saved)


def load(store: Entries, manifest: Manifest, *known: Build) -> Verified | Miss:
    """Load an entry in every way: by its key, as builders do, and out of its family, as loaders do.

    Returns what the first gave; a WrongLoad if either gave anything but one of the builds that are `known`.
    """
    by_key = store.check(store.look(manifest.family, manifest.key, manifest.parts))
    listed = [store.check(found) for found in store.family(manifest.family)]
    for found in (by_key, *listed):
        if isinstance(found, Verified):
            artifact = artifact_of(found)
            mine = [each for each in known if each.manifest == found.manifest]
            if not mine and found is not by_key and found.manifest.key != manifest.key:
                continue  # a neighbour, judged when it is its turn
            if not mine or dict(mine[0].blobs) != artifact.blobs:
                raise WrongLoad(f"{found.manifest.key[:12]} is {found.manifest.gate}, {artifact.blobs!r:.60}")
    return by_key


def whole(store: Entries, *builds: Build) -> None:
    """Assert that entries can be loaded and are what was published."""
    for each in builds:
        found = load(store, each.manifest, each)
        if isinstance(found, Miss):
            raise LostEntry(f"{each.manifest.gate} is {found.status}: {found.why}")


def mended(store: Store, each: Build, *known: Build) -> None:
    """Publish an entry once more; assert that it can be loaded then, as one of the builds that are known or this."""
    winner = store.publish(each.manifest, each.blobs)
    found = load(store, each.manifest, each, *known)
    if isinstance(found, Miss):
        raise LostEntry(f"{each.manifest.gate} cannot be mended: it is {found.status}: {found.why}")
    assert found.manifest == winner, "what publishing returned is not what is there"


def sound(store: Store) -> None:
    """Assert that verify finds nothing."""
    problems = verify(store).problems
    assert problems == (), problems


def never_corrupt(found: Found | Verified) -> None:
    """Assert that what was not damaged is not called so, for then it would be replaced."""
    assert not isinstance(found, Miss) or found.status is not Status.CORRUPT, found


def contents(root: Path) -> dict[str, bytes]:
    """Return every file below a directory but what is staged or locked."""
    passing = {root / "v1/tmp", root / "v1/locks"}
    return {
        str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file() and p.parent not in passing
    }


def started(function: Callable[[], None]) -> int:
    """Run a function in a child, forked since importing takes longer than most faults do; return its id.

    The child ends with 0, with another code if the function raised, which it then says, or by a signal.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            signal.alarm(_PATIENCE_S)
            function()
            code = 0
        except BaseException as error:
            code = _CODES.get(type(error), code)
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return pid


def ended(pid: int) -> int:
    """Wait for a child and return how it ended, a signal as a negative number."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def heard(function: Callable[[], list[str]]) -> list[str]:
    """Run a function in a child and return the words that it returned."""
    read, write = os.pipe()
    child = started(lambda: _tell(write, function()))
    os.close(write)
    with os.fdopen(read) as pipe:
        words = pipe.read().split()
    assert ended(child) == 0
    return words


def _tell(descriptor: int, words: list[str]) -> None:
    with os.fdopen(descriptor, "w") as pipe:
        pipe.write(" ".join(words))


def in_child(function: Callable[[], None]) -> int:
    return ended(started(function))


def carried_out(*children: int) -> None:
    """Wait for children and assert that all ended well; what one found is raised here as well."""
    codes = [ended(child) for child in children]
    for kind, found in _CODES.items():
        if found in codes:
            raise kind("in a child, which said so")
    assert not any(codes), f"a child ended with {codes}"
