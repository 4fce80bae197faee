"""Selection: one family of one store, read once - which entry of each bucket runs here, or why none does.

Two questions are kept apart. A builder asks for *its own key*: exactly this compiler and target. A loader asks for
*anything that runs here*: the best entry of the family whose bucket matches and whose requirements this host meets.

Knows nothing of compiling or running. Imports no torch.
"""

from __future__ import annotations

import functools
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from nanogpt_buckets import key, settings
from nanogpt_buckets.choice import Choice
from nanogpt_buckets.errors import CacheError, CacheMiss
from nanogpt_buckets.node import failures
from nanogpt_buckets.plan.bucket import Bucket
from nanogpt_buckets.plan.ladder import rung_for
from nanogpt_buckets.store.entry import Found, Miss, Status, Verified, manifest_of
from nanogpt_buckets.store.manifest import Manifest
from nanogpt_buckets.store.store import Store
from nanogpt_buckets.versions import version_tuple

# Why a bucket is absent, unless one for another toolchain is here.
NOT_BUILT = "not built"


@dataclass(frozen=True)
class Selection:
    """What a store holds of a choice's family, as it was when this was made.

    Args:
        choice: model, backend, target, dtype and store.
    """

    choice: Choice

    @property
    def store(self) -> Store:
        """Where entries are."""
        return self.choice.store

    @functools.cached_property
    def _entries(self) -> list[Found]:
        lock = self.store.trust.locked
        if lock is not None and self.choice.family not in lock.families:
            why, hint = lock.why_not(self.choice.family_parts), self.choice.build_command()
            return [Miss(Status.INCOMPATIBLE, self.choice.family, why=why, hint=hint)]
        return self.store.family(self.choice.family)

    @functools.cached_property
    def ranked(self) -> Mapping[Bucket, list[Found]]:
        """Every readable entry of each bucket, best first; those that do not run here say why."""
        found: dict[Bucket, list[Found]] = {}
        for entry in self._entries:
            manifest = manifest_of(entry)
            if manifest is None or manifest.parts["family"] != self.choice.family_parts or manifest.bucket is None:
                continue
            if self.choice.only_target not in (None, manifest.parts["target"]):
                continue
            found.setdefault(manifest.bucket, []).append(self._fit(manifest) if entry is manifest else entry)
        return {bucket: sorted(entries, key=self._preference) for bucket, entries in found.items()}

    @functools.cached_property
    def usable(self) -> Mapping[Bucket, list[Manifest]]:
        """For each bucket the entries that say they run here, best first. Blobs are not read yet."""
        listed = {b: [entry for entry in found if isinstance(entry, Manifest)] for b, found in self.ranked.items()}
        return {bucket: manifests for bucket, manifests in listed.items() if manifests}

    @functools.cached_property
    def unreadable(self) -> list[Miss]:
        """Entries of the family of which nobody knows what bucket they are."""
        return [replace(m, key="") for m in self._entries if isinstance(m, Miss) and m.manifest is None]

    def best(self, bucket: Bucket) -> Verified | Miss:
        """Answer a loader: the best intact entry of this bucket that runs here, or why there is none."""
        refused: list[Miss] = []
        for entry in self.ranked.get(bucket, []):
            checked = self.store.check(entry)  # reads every byte, so no more of them than need be
            if isinstance(checked, Verified):
                return checked
            refused.append(checked)
        refused += self.unreadable
        return refused[0] if refused else Miss(Status.ABSENT, why=self._why_absent(bucket))

    def own(self, bucket: Bucket) -> Verified | Miss:
        """Answer a builder: is this bucket here under its own key, every byte in order, whether or not it runs here?

        Without a compiler no key can be named; then any entry that runs here counts. Reads the store anew.
        """
        parts = self.choice.key_parts(bucket)
        if parts is None:
            return self.best(bucket)
        return self.store.check(self.store.look(self.choice.family, key.digest(parts), parts))

    def not_built(self, bucket: Bucket) -> str:
        """Say that a bucket is not built, and why, if this machine failed at that within the last hour."""
        parts = self.choice.key_parts(bucket)
        failed = None if parts is None else failures.recall(key.digest(parts))
        return NOT_BUILT if failed is None else f"{NOT_BUILT}: {failed}"

    def reasons(self) -> list[Miss]:
        """Return every entry of the family that cannot be used, whatever its bucket, then what others differ in."""
        lacking = [entry for found in self.ranked.values() for entry in found if isinstance(entry, Miss)]
        lock = self.store.trust.locked
        known = self._alike if lock is None else lock.buckets(self.choice.family, self.choice.only_target)
        others = [Miss(Status.ABSENT, why=self._why_absent(bucket)) for bucket in sorted(known)]
        return [*lacking, *self.unreadable, *others]

    def nearest(self, bucket: Bucket) -> tuple[Manifest, list[str]] | None:
        """Return the entry whose key parts are most like those that a bucket needs here, and each that differs.

        None where there are no entries. A machine without a compiler cannot tell which one it would need.
        """
        choice = self.choice
        rest = {"family": choice.family_parts, "bucket": bucket.to_json(), "target": choice.build_target}
        wanted = choice.key_parts(bucket) or rest
        found = [
            (manifest, key.difference(wanted, {name: manifest.parts.get(name) for name in wanted}))
            for manifest in filter(None, map(manifest_of, self.store.entries()))
        ]
        return min(found, key=lambda f: (len(f[1]), f[0].bucket != bucket, f[0].key), default=None)

    def _fit(self, manifest: Manifest) -> Found:
        lack = self.choice.compiler.unmet(manifest.requires)
        if lack is None:
            return manifest
        # building it once more for the target that was named would be a hit
        hint = "run it where that is, or leave --target out" if self.choice.only_target else None
        return Miss(Status.INCOMPATIBLE, manifest.family, manifest.key, lack, hint, manifest)

    def _preference(self, entry: Found) -> tuple[Any, ...]:
        """Order entries: runs here, own compiler, most specialised target, newest compiler, then key."""
        manifest = manifest_of(entry)
        assert manifest is not None
        parts, backend = manifest.parts, self.choice.compiler
        own_compiler = parts["compiler"] == self._own_compiler
        newest = [tuple(-n for n in version_tuple(text)) for text in sorted(parts["compiler"].values())]
        return (isinstance(entry, Miss), not own_compiler, backend.rank(parts["target"]), newest, manifest.key)

    @functools.cached_property
    def _own_compiler(self) -> dict[str, str] | None:
        return self.choice.compiler.compiler()

    def _why_absent(self, bucket: Bucket) -> str:
        """Say that a bucket is not built, and why, or how the most alike one of this architecture differs from it."""
        lock = self.store.trust.locked
        if lock is not None:
            named = bucket in lock.buckets(self.choice.family, self.choice.only_target)
            return f"{lock.path} names it, and it is not here" if named else f"{lock.path} does not name it"
        why, differences = self.not_built(bucket), self._alike.get(bucket)
        if why != NOT_BUILT or not differences:
            return why
        lines = ["another release's source" if x.startswith("source:") else x for x in min(differences, key=len)]
        return f"{NOT_BUILT}; there is one with {', '.join(lines)}"

    @functools.cached_property
    def _alike(self) -> Mapping[Bucket, list[list[str]]]:
        """How entries of other families or targets, of the same architecture, differ from what is wanted."""
        found: dict[Bucket, list[list[str]]] = {}
        wanted = self.choice.only_target
        for manifest in map(manifest_of, self.store.entries()):
            if manifest is None or manifest.bucket is None:
                continue
            theirs = manifest.parts["family"]
            if theirs.get("architecture") == self.choice.family_parts["architecture"]:
                target = manifest.parts["target"] if wanted else None
                difference = key.difference(
                    {**self.choice.family_parts, "target": wanted}, {**theirs, "target": target}
                )
                found.setdefault(manifest.bucket, []).append(difference)
        return found


def explain_miss(
    choice: Choice, selection: Selection, what: str, lacking: list[Bucket], need: int = 0, step: str = "recompute"
) -> CacheError:
    """Return the error of a miss, with the kind and the reason of what is here and cannot be used.

    Args:
        choice: what was asked for.
        selection: what there is.
        what: the beginning of the sentence.
        lacking: buckets whose absence is the miss; none if no plan names any.
        need: tokens that a bucket would have to hold.
        step: of which a bucket would have to be.
    """
    rung = [Bucket(1, rung_for(need, choice.model.architecture.block_size), step)] if need else []
    command = choice.build_command(lacking or rung)
    if (lock := selection.store.trust.locked) is not None:
        pull = f"nanogpt-buckets cache pull SOURCE{settings.cache_dir_option(selection.store.root)}"
        command = f"{pull} --locked {shlex.quote(str(lock.path))}, or build and lock others: {command}"
    message = f"{what} for model {choice.model.name} in {selection.store.root}"
    found = [selection.best(bucket) for bucket in lacking] if lacking else selection.reasons()
    misses = [miss for miss in found if isinstance(miss, Miss)]
    for miss in misses:
        if miss.status is not Status.ABSENT:
            return miss.status.error(f"{message}: {miss.why}", hint=miss.hint or command)
    alike = [miss.why for miss in misses if miss.why != NOT_BUILT]
    return CacheMiss(f"{message}: {alike[0]}" if alike else message, hint=command)
