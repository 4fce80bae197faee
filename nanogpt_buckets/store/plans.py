"""Plans in a store: which buckets are wanted under a name, and which families' entries of them are kept.

A plan is read, changed and written under the store's lock; where no lock can be had it is read back and merged again. A
plan that a newer release wrote is left alone and keeps what it names. Knows nothing of models or of compiling.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from nanogpt_buckets import key
from nanogpt_buckets.errors import CacheError, CorruptEntry, IncompatibleEntry, PlanError, UsageError
from nanogpt_buckets.plan.bucket import Bucket, Plan
from nanogpt_buckets.store.document import MAX_BYTES, parse
from nanogpt_buckets.store.store import Store

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,149}")
_FAMILY = re.compile(r"[0-9a-f]{64}")
_LOCK_TIMEOUT_S = 10.0
_ATTEMPTS = 5


@dataclass(frozen=True)
class SavedPlan:
    """What a plan file says: buckets, and the families whose entries of them are in use."""

    buckets: Plan
    families: frozenset[str] = frozenset()


@dataclass
class Pins:
    """What plans keep from being pruned.

    `buckets` are (family, bucket) -> the plans that name it. A plan that this release cannot read keeps every entry of
    the `families` it names, and `everything` if it names none. `notes` are what a person should know.
    """

    buckets: dict[tuple[str, Bucket], list[str]] = field(default_factory=dict)
    families: set[str] = field(default_factory=set)
    everything: bool = False
    notes: list[str] = field(default_factory=list)

    def keep(self, family: str, bucket: Bucket | None) -> bool:
        """Whether an entry is kept; one whose bucket is unknown is, if its family is."""
        pinned = bucket is not None and (family, bucket) in self.buckets
        return self.everything or family in self.families or pinned


class Plans:
    """The plans of one store."""

    def __init__(self, store: Store) -> None:
        self._directory = store.directory
        self._anyone = store.trust.shared  # a plan says what is wanted; what is loaded is judged by itself

    def names(self) -> list[str]:
        """Return the names of all plans, sorted."""
        found = self._directory.names("plans")
        names = [name.removesuffix(".json") for name in found if name.endswith(".json")]
        return [name for name in names if _NAME.fullmatch(name)]

    def load(self, name: str) -> SavedPlan | None:
        """Return a plan, or None if there is none; a CacheError says by its kind why it is of no use."""
        where = f"plan {name} in {self._directory.root}"
        try:
            document = parse(self._directory.get(_file(name), limit=MAX_BYTES, anyone=self._anyone), "it")
            return SavedPlan(Plan.from_json(document), frozenset(document.get("families", ())))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (PlanError, CorruptEntry) as error:
            raise CorruptEntry(f"{where} is damaged: {error.message}") from error
        except IncompatibleEntry as error:
            raise IncompatibleEntry(f"{where}: {error.message}", hint=error.hint) from error

    def change(self, name: str, function: Callable[[SavedPlan | None], SavedPlan | None]) -> None:
        """Read a plan, change it and write it, so that whoever does so meanwhile loses nothing.

        `function` is given what is saved, None if there is nothing or it is damaged, and returns what to save, None for
        nothing; it may be called several times. What a newer release wrote is an IncompatibleEntry, and left alone.
        """
        taken = self._directory.path(_file(name))
        with self._directory.locked("plans", _LOCK_TIMEOUT_S) as alone:
            for _ in range(_ATTEMPTS):
                try:
                    before = self.load(name)
                except CorruptEntry:
                    before = None
                wanted = function(before)
                if wanted == before and (before is not None or not taken.exists()):
                    return
                self._write(name, wanted)
                if alone:
                    return

    def pins(self) -> Pins:
        """Return what all plans keep."""
        pins = Pins()
        for name in self.names():
            try:
                saved = self.load(name)
            except CorruptEntry as error:
                pins.notes.append(f"{error.message}; it keeps nothing")
                continue
            except CacheError as error:
                found = set(_FAMILY.findall(self._text(name)))
                pins.families |= found
                pins.everything |= not found
                kept = "the families it names stay" if found else "so every entry stays"
                pins.notes.append(f"{error.message}; {kept}")
                continue
            if saved is not None:
                for pin in ((family, bucket) for family in saved.families for bucket in saved.buckets):
                    pins.buckets.setdefault(pin, []).append(name)
        return pins

    def _text(self, name: str) -> str:
        with contextlib.suppress(OSError, CacheError):
            return self._directory.get(_file(name), limit=MAX_BYTES, anyone=self._anyone).decode("utf-8", "replace")
        return ""

    def _write(self, name: str, wanted: SavedPlan | None) -> None:
        if wanted is None:
            self._directory.delete(_file(name))
            return
        document = wanted.buckets.to_json(model=name, source="build", families=wanted.families)
        data = key.canonical_json(document) + b"\n"
        if len(data) > MAX_BYTES:
            raise UsageError(f"plan {name} would be larger than {MAX_BYTES} bytes", hint="use fewer buckets")
        self._directory.put(_file(name), data, replace=True)


def _file(name: str) -> str:
    if _NAME.fullmatch(name) is None:
        hint = "use letters, digits, dots, dashes and underscores"
        raise UsageError(f"plan name {name!r} is not a plain word", hint=hint)
    return f"plans/{name}.json"


def without(saved: SavedPlan | None, gone: Iterable[Bucket]) -> SavedPlan | None:
    """Return a plan less some buckets; None if nothing is left."""
    left = [bucket for bucket in saved.buckets if bucket not in set(gone)] if saved else []
    return SavedPlan(Plan(left), saved.families) if saved and left else None
