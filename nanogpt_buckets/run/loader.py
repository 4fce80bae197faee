"""From a bucket to something that runs: the best entry, verified, loaded, and compared once with the eager model.

Two sources of executables: compiled entries of a store, and steps run uncompiled. Knows nothing of prompts, nor of
what to do when a bucket is missing.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Container, Iterable

from nanogpt_buckets import settings
from nanogpt_buckets.backends.base import FACTS, Artifact
from nanogpt_buckets.choice import Choice
from nanogpt_buckets.contract import Executable
from nanogpt_buckets.errors import CacheError, CorruptEntry, GateFailed, TransientError
from nanogpt_buckets.model.prepared import Weights
from nanogpt_buckets.node import crumbs
from nanogpt_buckets.node.records import MARK_HEAD, MARKS
from nanogpt_buckets.plan.bucket import Bucket
from nanogpt_buckets.selection import Selection
from nanogpt_buckets.steps import step_named
from nanogpt_buckets.store.entry import Miss, Status, Verified
from nanogpt_buckets.store.manifest import Manifest

log = logging.getLogger(__name__)


class Loader(ABC):
    """The executables of a choice that are `loaded`, and why others were `refused`."""

    def __init__(self, choice: Choice) -> None:
        self.choice = choice
        self.loaded: dict[Bucket, Executable] = {}
        self.refused: dict[Bucket, CacheError] = {}

    @abstractmethod
    def has(self, bucket: Bucket) -> bool:
        """Whether a bucket can be tried."""

    @abstractmethod
    def open(self, bucket: Bucket) -> Executable:
        """Return what runs a bucket; a CacheError if none of its entries can be used."""

    @functools.cached_property
    def weights(self) -> Weights:
        """The model's weights, mapped when first asked for."""
        start = time.perf_counter()
        weights = self.choice.model.weights(self.choice.dtype)
        log.info("mapped weights %s, %.1f ms", weights.digest[:12], 1000 * (time.perf_counter() - start))
        return weights

    def available(self, buckets: Iterable[Bucket]) -> list[Bucket]:
        """Return those of some buckets that are loaded or may be tried."""
        return [b for b in buckets if b in self.loaded or (self.has(b) and b not in self.refused)]

    def load(self, bucket: Bucket) -> bool:
        """Load a bucket; False if it cannot be. It is not tried again, unless the reason may pass."""
        if bucket in self.loaded:
            return True
        try:
            self.loaded[bucket] = self.open(bucket)
        except CacheError as error:
            self.refused[bucket] = error
            return False
        return True

    def forgive(self, built: Container[Bucket] = ()) -> None:
        """Let buckets be tried again: those that were built anew, and all whose reason may have passed."""
        for bucket, error in list(self.refused.items()):
            if bucket in built or isinstance(error, TransientError):
                del self.refused[bucket]

    def close(self) -> None:
        """Close every executable and let go of the weights."""
        for executable in self.loaded.values():
            executable.close()
        self.loaded.clear()
        self.__dict__.pop("weights", None)


class Uncompiled(Loader):
    """Every bucket, run as the plain step."""

    def has(self, bucket: Bucket) -> bool:
        """Return True: every shape runs at once."""
        return True

    def open(self, bucket: Bucket) -> Executable:
        """Return the step uncompiled."""
        return step_named(bucket.step).eager(self.choice.model.architecture, bucket, self.weights.tensors)


class Compiled(Loader):
    """The entries of the choice's store, as they were when it was last read, and those that it could not keep."""

    def __init__(self, choice: Choice) -> None:
        super().__init__(choice)
        self.selection = Selection(choice)
        self.unkept: dict[Bucket, Verified] = {}
        self.origins: dict[Bucket, tuple[str, float]] = {}  # the tier a bucket came from; how long compiling it took, s

    def has(self, bucket: Bucket) -> bool:
        """Whether there is an entry that says it runs here."""
        return bucket in self.unkept or bucket in self.selection.usable

    def ask(self) -> bool:
        """Look also in the store's remote, if there is one; False if that changes nothing."""
        if not self.choice.store.ask():
            return False
        self.selection = Selection(self.choice)
        self.refused.clear()
        return True

    def open(self, bucket: Bucket) -> Executable:
        """Load the first entry that can be, best first."""
        self.weights  # noqa: B018  what this node cannot prepare is no entry's fault
        refused: CacheError | None = None
        own = self.unkept.get(bucket)
        for manifest in [own.manifest] if own else self.selection.usable.get(bucket, ()):
            try:
                return self._load(bucket, own or self.choice.store.read(manifest))
            except CacheError as error:
                log.warning("bucket %s, entry %s: %s", bucket, manifest.key[:12], error.message)
                refused = error
        assert refused is not None, f"{bucket} has no entry"
        if isinstance(refused, CorruptEntry) and not isinstance(refused, crumbs.EndedBefore):
            refused.hint = self.choice.build_command([bucket])
        raise refused

    def _load(self, bucket: Bucket, entry: Verified) -> Executable:
        from nanogpt_buckets.steps import gate

        weights, manifest, artifact, start = self.weights, entry.manifest, artifact_of(entry), time.perf_counter()
        interface = step_named(bucket.step).interface(self.choice.model.architecture, bucket, self.choice.dtype)
        mark = "-".join([weights.digest[:MARK_HEAD], *(blob.sha256[:16] for blob in manifest.blobs)])
        passed, found = {"gate": gate.VERSION}, MARKS.find(mark) or {}
        if found.get("manifest") == manifest.digest and found["gate"] == gate.VERSION:
            raise CorruptEntry(f"{found['why']}; it was rejected on this machine before")
        known, executable = found == passed, None
        try:
            first = contextlib.nullcontext() if known else crumbs.first_load(f"{mark[:MARK_HEAD]}-{manifest.digest}")
            with first:
                executable = self.choice.compiler.load(artifact, interface, weights.tensors)
                milliseconds = 1000 * (time.perf_counter() - start)
                what = (bucket, manifest.key[:12], manifest.size, milliseconds)
                log.info("loaded bucket %s, entry %s, %d bytes, %.1f ms", *what)
                if not known:
                    self._check(executable, bucket, manifest)
                    MARKS.keep(mark, passed)
        except crumbs.EndedBefore as error:  # on this machine; elsewhere it may run
            place = settings.cache_dir_option(self.choice.store.root)
            error.hint = f"nanogpt-buckets cache rm {manifest.key[:12]}{place} and build again; {error.hint}"
            raise
        except (CorruptEntry, GateFailed) as error:  # though every byte is in order
            if executable is not None:
                executable.close()
            if not self.choice.store.reject(manifest, error.message):
                MARKS.keep(mark, passed | {"manifest": manifest.digest, "why": error.message})
            raise CorruptEntry(f"{error.message}; the entry is rejected") from error
        self.choice.store.mark_used(manifest)
        self.origins[bucket] = entry.tier, manifest.stats.get("compile_ms", 0) / 1000
        return executable

    def why_unbuilt(self, bucket: Bucket) -> str:
        """Say why a bucket cannot be loaded: it is damaged, could not be compiled here lately, or was never built."""
        if bucket in self.refused:
            return f"damaged: {self.refused[bucket].message}"
        return self.selection.not_built(bucket)

    def why_not(self, bucket: Bucket) -> str:
        """Say in a word why a bucket cannot be loaded."""
        if bucket in self.refused:
            return Miss.of(self.refused[bucket]).status
        found = self.selection.ranked.get(bucket, [])
        return next((entry.status for entry in found if isinstance(entry, Miss)), Status.ABSENT)

    def _check(self, executable: Executable, bucket: Bucket, manifest: Manifest) -> None:
        """Compare with the eager model: the first time these weights meet this artifact on this node.

        One short row, for the bucket was checked where it was built; all of that check, if it could not be.
        """
        from nanogpt_buckets.steps import gate

        if manifest.unchecked:
            log.warning("bucket %s was built unchecked (%s); checking it now", bucket, manifest.unchecked)
        old = manifest.gate.get("version") != gate.VERSION
        check = gate.check if manifest.unchecked or old else gate.canary
        arch, compiler = self.choice.model.architecture, self.choice.compiler
        how = {"rounds": compiler.rounds(), "fused": compiler.fuses}
        check(executable, arch, bucket, self.weights.tensors, **how, place=executable.placed)


def artifact_of(entry: Verified) -> Artifact:
    """Return what a backend loads: exactly the bytes that were verified."""
    return Artifact(blobs=dict(entry.blobs), **{name: getattr(entry.manifest, name) for name in FACTS})
