"""The buckets an engine can run: which are wanted, which are built, loading them, and what to do when one is missing.

Coverage is settled before the first step of a call. Knows nothing of prompts or sampling.
"""

from __future__ import annotations

import bisect
import functools
import logging
import time
from collections.abc import Iterable
from pathlib import Path

from nanogpt_buckets import settings
from nanogpt_buckets.backends.base import Executable
from nanogpt_buckets.backends.eager import EagerBackend
from nanogpt_buckets.builder import Listener, build_missing
from nanogpt_buckets.catalog import NOT_BUILT, Catalog, built, default_plan, remember_plan
from nanogpt_buckets.dispatch import cheapest, group
from nanogpt_buckets.errors import CacheError, CacheMiss, CompileFailed, CorruptEntry, UsageError
from nanogpt_buckets.model.checkpoint import Weights
from nanogpt_buckets.plan.bucket import Bucket, Plan
from nanogpt_buckets.plan.cost import step_flops
from nanogpt_buckets.plan.ladder import default_ladder, rung_for
from nanogpt_buckets.report import Report
from nanogpt_buckets.store.answer import ERRORS, Answer
from nanogpt_buckets.store.manifest import Manifest

log = logging.getLogger(__name__)

ON_MISS = ("promote", "build")


class Shelf:
    """Loaded and loadable buckets of one model.

    Args:
        catalog: the model's entries.
        plan: buckets to use; None for the model's default plan.
        on_miss: "promote" or "build".
        on_progress: told what becomes of each bucket that is compiled; see `build`.

    Raises:
        UsageError: on_miss is unknown.
        PlanError: the plan does not fit the model.
        CacheMiss: nothing is built and nothing may be.
    """

    def __init__(
        self,
        catalog: Catalog,
        plan: Plan | Iterable[Bucket] | None,
        *,
        on_miss: str,
        on_progress: Listener | None = None,
    ) -> None:
        if on_miss not in ON_MISS:
            raise UsageError(f"on_miss {on_miss!r} is unknown", hint=f"choices: {', '.join(ON_MISS)}")
        self.catalog = catalog
        self.report = Report(catalog.backend.name, catalog.model.name)
        self._on_miss = on_miss
        self._on_progress = on_progress
        self.closed = False
        self._executables: dict[Bucket, Executable] = {}
        self._refused: dict[Bucket, CacheError] = {}
        self._said: set[Bucket] = set()
        self._compiled: set[Bucket] = set()
        self._plan = self._wanted(plan)
        self._entries: dict[Bucket, list[Answer]] = catalog.usable() if catalog.backend.compiles else {}
        if self._available():
            catalog.check_memory(Plan(self._available()))
        if on_miss == "promote" and not self._available():
            raise self._miss("no bucket is built" if plan is None else "no bucket of the plan is built")

    def cost(self, bucket: Bucket) -> int:
        """Return the cost of one step in a bucket."""
        return step_flops(self.catalog.model.architecture, bucket)

    def load_all(self) -> list[Bucket]:
        """Load every available bucket of the plan and return those that could be loaded.

        Raises:
            CacheError: some were built and not one could be loaded.
        """
        for bucket in self._available():
            self._load(bucket)
        if not self._executables and self._refused:
            raise next(iter(self._refused.values()))
        return sorted(self._executables)

    def executable(self, bucket: Bucket) -> Executable:
        """Return what runs a bucket that `cover` returned."""
        return self._executables[bucket]

    def cover(self, batches: list[list[int]], more_tokens: int) -> list[Bucket]:
        """Decide which buckets may run rows that grow by `more_tokens`; all of them are loaded.

        Args:
            batches: tokens of each row at its first step; rows of one batch go together.
            more_tokens: how many tokens each row gains before its last step.

        Raises:
            CacheMiss: nothing that is built reaches the longest row, and nothing may be compiled.
            CompileFailed: it had to be compiled and could not be.
        """
        if self.closed:
            raise UsageError("this engine is closed")
        block_size = self.catalog.model.architecture.block_size
        need = min(max(max(lengths) for lengths in batches) + more_tokens, block_size)
        if self._on_miss == "build" and self.catalog.backend.compiles:
            self._build_for(batches, more_tokens, need)
        while True:
            buckets = self._available()
            if cheapest(buckets, 1, need, self.cost) is None:
                raise self._refusal(need) or self._miss(f"no bucket that is built holds {need} tokens", need)
            used = self._used(batches, more_tokens, buckets)
            if all([self._load(bucket) for bucket in sorted(used)]):
                self._say_promotions(batches, more_tokens, used)
                return [bucket for bucket in buckets if bucket in self._executables]

    def close(self) -> None:
        """Close every executable."""
        for executable in self._executables.values():
            executable.close()
        self._executables.clear()
        self.closed = True

    # --- what is wanted and what is there --------------------------------------------------------------------------

    def _wanted(self, plan: Plan | Iterable[Bucket] | None) -> list[Bucket]:
        block_size = self.catalog.model.architecture.block_size
        if plan is not None:
            chosen = plan if isinstance(plan, Plan) else Plan(plan)
        elif self.catalog.backend.compiles:
            saved = default_plan(self.catalog) or built(self.catalog)
            if saved is None:
                return []
            chosen = saved
        else:
            chosen = Plan.grid(seq=default_ladder(block_size))
        return list(chosen.check(block_size))

    def _available(self) -> list[Bucket]:
        ready = self._entries if self.catalog.backend.compiles else self._plan
        return [bucket for bucket in self._plan if bucket in ready and bucket not in self._refused]

    def _used(self, batches: list[list[int]], more_tokens: int, buckets: list[Bucket]) -> set[Bucket]:
        """Return the buckets these batches would use."""
        return set().union(*(self._used_by(lengths, more_tokens, buckets) for lengths in batches))

    def _used_by(self, lengths: list[int], more_tokens: int, buckets: list[Bucket]) -> set[Bucket]:
        """Group a batch's rows anew whenever one of them outgrows a rung."""
        block_size = self.catalog.model.architecture.block_size
        rungs = sorted({bucket.seq_len for bucket in buckets})
        used: set[Bucket] = set()
        before: list[int] = []
        for grown in range(more_tokens + 1):
            now = [min(length + grown, block_size) for length in lengths]
            places = [bisect.bisect_left(rungs, length) for length in now]
            if places != before:
                used |= {bucket for bucket, _ in group(now, buckets, self.cost)}
            before = places
            if min(now) == block_size:
                break
        return used

    # --- loading -----------------------------------------------------------------------------------------------------

    @functools.cached_property
    def _weights(self) -> Weights:
        start = time.perf_counter()
        weights = self.catalog.model.weights(self.catalog.dtype)
        log.info("mapped weights %s, %.1f ms", weights.digest[:12], 1000 * (time.perf_counter() - start))
        return weights

    def _load(self, bucket: Bucket) -> bool:
        """Load a bucket from its best intact entry; False, and never tried again, if it has none."""
        if bucket in self._executables:
            return True
        if isinstance(self.catalog.backend, EagerBackend):
            arch = self.catalog.model.architecture
            self._executables[bucket] = self.catalog.backend.run_eagerly(arch, bucket, self._weights.tensors)
            return True
        for answer in self._entries[bucket]:
            try:
                self._executables[bucket] = self._load_entry(bucket, answer)
                self._refused.pop(bucket, None)
                self.report.hits += bucket not in self._compiled
                return True
            except CacheError as error:
                log.warning("bucket %s, entry %s: %s", bucket, answer.key[:12], error.message)
                if isinstance(error, CorruptEntry):
                    error.hint = self.catalog.build_command([bucket])
                self._refused[bucket] = error
        return False

    def _load_entry(self, bucket: Bucket, answer: Answer) -> Executable:
        assert answer.manifest is not None
        weights = self._weights  # converted on a node that meets them first, which is none of this bucket's time
        start = time.perf_counter()
        artifact = self.catalog.artifact(answer.manifest)
        executable = self.catalog.backend.load(artifact, weights.tensors)
        milliseconds = 1000 * (time.perf_counter() - start)
        size = sum(len(content) for content in artifact.blobs.values())
        log.info("loaded bucket %s, entry %s, %d bytes, %.1f ms", bucket, answer.key[:12], size, milliseconds)
        self.catalog.store.mark_used(answer.manifest.family, answer.key)
        self._check_once(executable, bucket, answer.manifest)
        return executable

    def _check_once(self, executable: Executable, bucket: Bucket, manifest: Manifest) -> None:
        """Compare with the eager model the first time these weights meet this artifact on this node.

        One short row, for the bucket was checked where it was built; all of that check, if it could not be.
        """
        from nanogpt_buckets.backends import gate

        blobs = "-".join(blob.sha256[:16] for blob in manifest.blobs)
        mark: Path = settings.local_dir() / "canary" / f"{self._weights.digest[:32]}-{blobs}"
        if mark.exists():
            return
        if manifest.unchecked:
            log.warning("bucket %s was built unchecked (%s); checking it now", bucket, manifest.unchecked)
        arch, rounds = self.catalog.model.architecture, self.catalog.backend.rounds()
        check = gate.check if manifest.unchecked else gate.canary
        check(executable, arch, bucket, self._weights.tensors, rounds=rounds)
        try:
            mark.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            mark.touch()
        except OSError as error:
            log.info("the canary's result could not be remembered: %s", error.strerror)

    # --- misses -------------------------------------------------------------------------------------------------------

    def _build_for(self, batches: list[list[int]], more_tokens: int, need: int) -> None:
        """Compile the buckets this run would use, and one that reaches its end if the plan has none."""
        wanted = self._plan
        if cheapest(wanted, 1, need, self.cost) is None:
            rung = rung_for(need, self.catalog.model.architecture.block_size)
            wanted = sorted({*wanted, Bucket(1, rung)})
        used = self._used(batches, more_tokens, wanted)
        missing = [bucket for bucket in sorted(used) if bucket not in self._entries or not self._load(bucket)]
        if missing:
            self._build(missing)
        if set(wanted) != set(self._plan):
            self._plan = wanted
            remember_plan(self.catalog, Plan(wanted))

    def _build(self, missing: list[Bucket]) -> None:
        self._weights  # noqa: B018  without them there is no use in compiling
        names = ", ".join(map(str, missing))
        log.warning("compiling for %s first: %s", self.catalog.model.name, names)
        for row in build_missing(self.catalog, missing, on_progress=self._on_progress, retry=False).rows:
            if row.state == "failed":
                raise CompileFailed(f"bucket {row.bucket} could not be compiled: {row.why}", hint=row.hint)
            if row.state == "compiled":
                self._compiled.add(row.bucket)
                self.report.compiled += 1
            log.info("bucket %s: %s after %.0f s", row.bucket, row.state, row.seconds)
        self._entries = self.catalog.usable()
        self._refused = {bucket: error for bucket, error in self._refused.items() if bucket not in missing}

    def _say_promotions(self, batches: list[list[int]], more_tokens: int, used: set[Bucket]) -> None:
        """Say once for each planned bucket that it would have run, had it been built."""
        lacking = [bucket for bucket in self._plan if bucket not in self._executables and bucket not in used]
        missed = self._used(batches, more_tokens, self._plan) & set(lacking) if lacking else set()
        self.report.promotions += bool(missed)
        for bucket in sorted(missed - self._said):
            state = "damaged" if bucket in self._refused else "not built"
            command = self.catalog.build_command([bucket])
            log.warning("bucket %s is %s; a larger one runs in its place (%s)", bucket, state, command)
        self._said |= missed

    def _refusal(self, need: int) -> CacheError | None:
        return next((error for bucket, error in self._refused.items() if bucket.holds(1, need)), None)

    def _miss(self, what: str, need: int = 0) -> CacheError:
        """Return the error of a miss; what is here and cannot be used gives it its kind and reason."""
        block_size = self.catalog.model.architecture.block_size
        lacking = [bucket for bucket in self._plan if bucket not in self._entries and bucket.holds(1, need)]
        command = self.catalog.build_command(lacking or ([Bucket(1, rung_for(need, block_size))] if need else []))
        message = f"{what} for model {self.catalog.model.name} in {self.catalog.store.root}"
        answers = [self.catalog.best(bucket) for bucket in lacking]
        for answer in answers:
            if answer.status in ERRORS:
                return ERRORS[answer.status](f"{message}: {answer.why}", hint=answer.hint or command)
        alike = [answer.why for answer in answers if answer.why != NOT_BUILT]
        return CacheMiss(f"{message}: {alike[0]}" if alike else message, hint=command)
