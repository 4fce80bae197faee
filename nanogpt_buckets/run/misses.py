"""What a call may run, settled before its first step: what is built, what is built for it, or why nothing is.

Knows nothing of prompts or sampling, nor of how a bucket is loaded.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from nanogpt_buckets.builder import Listener, build_missing
from nanogpt_buckets.choice import default_plan, remember_plan
from nanogpt_buckets.contract import Executable
from nanogpt_buckets.costs import dispatch_cost
from nanogpt_buckets.errors import (
    BackendUnavailable,
    BucketsError,
    CacheError,
    CacheMiss,
    ChildFailed,
    CompileFailed,
    UsageError,
)
from nanogpt_buckets.plan.bucket import SHORTEST, STRATEGIES, Bucket, Plan
from nanogpt_buckets.plan.ladder import default_ladder, rung_for
from nanogpt_buckets.run.dispatch import CHUNK, KV, RECOMPUTE, Span, buckets_used, needed, reach
from nanogpt_buckets.run.loader import Compiled, Loader
from nanogpt_buckets.run.report import Report
from nanogpt_buckets.selection import NOT_BUILT, Selection, explain_miss
from nanogpt_buckets.store.entry import Verified
from nanogpt_buckets.values import shown

log = logging.getLogger(__name__)

ON_MISS = ("promote", "build")
# What leaves a bucket unbuilt although nothing is wrong with the call.
_UNBUILT = (BackendUnavailable, CompileFailed, ChildFailed, CacheError)
# Says which of some buckets a call would use.
_Call = Callable[[list[Bucket]], set[Bucket]]


class Buckets:
    """The buckets of one engine; `Engine.load` has the arguments.

    Where a saved plan does not reach, whatever else is built runs. Hits, compilations and promotions are counted.

    Raises:
        UsageError: on_miss is unknown.
        PlanError: the plan does not fit the model.
        CacheMiss: nothing is built and nothing may be.
    """

    def __init__(
        self,
        loader: Loader,
        plan: Iterable[Bucket] | None,
        report: Report,
        on_miss: str,
        on_progress: Listener | None,
        strategy: str = "auto",
        lazy: bool = False,
    ) -> None:
        for name, value, choices in (("on_miss", on_miss, ON_MISS), ("strategy", strategy, ("auto", *STRATEGIES))):
            if value not in choices:
                raise UsageError(f"{name} {shown(value)} is unknown", hint=f"choices: {', '.join(choices)}")
        self._strategy = strategy
        self._choice = loader.choice
        self.cost = dispatch_cost(loader.choice)
        self._block_size = loader.choice.model.architecture.block_size
        self._report = report
        self._loader = loader
        self._compiled = loader if isinstance(loader, Compiled) else None
        locked = self._choice.store.trust.locked is not None
        self._builds = on_miss == "build" and self._compiled is not None and not locked
        self._on_progress = on_progress
        self._missed: set[Bucket] = set()
        self._built_here: set[Bucket] = set()
        self._chosen = plan is not None
        self._plan = self._wanted(plan)
        if not lazy:
            self._ask_for(self._plan)
        self._check_start(lazy)

    def executable(self, bucket: Bucket) -> Executable:
        """Return what runs a bucket that `cover` returned."""
        return self._loader.loaded[bucket]

    @property
    def weights_digest(self) -> str:
        """The name of the weights that all buckets run with."""
        return self._loader.weights.digest

    def load_all(self) -> list[Bucket]:
        """Load what is built of the plan and return what could be loaded; a CacheError if of some not one could be."""
        self._loader.forgive()
        for bucket in self._loader.available(self._plan):
            self._load(bucket)
        if not self._loader.loaded and self._loader.refused:
            raise next(iter(self._loader.refused.values()))
        return sorted(self._loader.loaded)

    def cover(
        self, spans: Sequence[Span], together: bool = True, ways: Sequence[str] | None = None
    ) -> tuple[str, list[Bucket]]:
        """Decide how rows are run, and which buckets may: all that are loaded, as is whatever can be of use.

        Whatever rows meet, and whoever ends early, nothing else is needed. `together`: they may be grouped.

        Without `ways` they generate, as the engine's strategy says.

        Raises:
            CacheMiss: nothing that is built reaches the longest row, and nothing may be compiled.
            CompileFailed: it had to be compiled and could not be.
        """
        self._loader.forgive()
        cost, block_size, most = self.cost, self._block_size, len(spans) if together else 1
        needs = {way: needed(spans, block_size, way) for way in ways or self._ways()}

        def call(way: str) -> _Call:
            return functools.partial(buckets_used, spans, most, cost=cost, block_size=block_size, strategy=way)

        wanted = next(iter(needs))  # what a miss is about
        self._ask_for(call(wanted)(self._plan) if reach(self._plan, needs[wanted]) else ())
        if self._builds:
            self._build_for(call(wanted), needs)
        while True:
            way = next((way for way, need in needs.items() if reach(self._at_hand(need), need)), wanted)
            buckets = self._at_hand(needs[way])
            if not reach(buckets, needs[way]):
                raise self._refusal(needs[way])
            used = call(way)(buckets)
            if all([self._load(bucket) for bucket in sorted(used)]):
                self._say_promotions(call(way), used)
                return way, [bucket for bucket in buckets if bucket in self._loader.loaded]

    def _ways(self) -> tuple[str, ...]:
        """Return the strategies that may be tried, in order."""
        if self._strategy != "auto":
            return (self._choice.strategy(self._strategy),)
        steps = {bucket.step for bucket in self._plan} & {RECOMPUTE, CHUNK, *STRATEGIES[KV]}
        if CHUNK in steps:
            return (CHUNK, RECOMPUTE)
        first = self._choice.strategy("auto") if not steps else RECOMPUTE if steps == {RECOMPUTE} else KV
        return (KV, RECOMPUTE) if first == KV else (RECOMPUTE, KV)

    def _refusal(self, need: Mapping[str, int]) -> BucketsError:
        """Return why a call cannot be run."""
        for step, length in need.items():
            if not reach(self._at_hand(need), {step: length}):
                known = self._loader.refused.items()
                refused = [error for bucket, error in known if bucket.step == step and bucket.holds(1, length)]
                what = "no bucket" if step == RECOMPUTE else f"no {step} bucket"
                if self._compiled is None:
                    return CacheMiss(f"{what} of the plan holds {length} tokens", hint="name a longer one, or no plan")
                if not refused:
                    none = not self._compiled.selection.usable
                    reaches = f"{what} that is built holds {length} tokens"
                    return self._miss("no bucket is built" if none else reaches, step, length)
                return refused[0]
        raise AssertionError("everything is there")

    def close(self) -> None:
        """Close every executable and let go of the weights."""
        self._loader.close()

    # --- what is wanted and what is there -----------------------------------------------------------------------------

    def _wanted(self, plan: Iterable[Bucket] | None) -> list[Bucket]:
        if plan is None and self._compiled is not None:
            try:
                plan = default_plan(self._choice)
            except CacheError as error:  # no reason not to run what is built
                log.warning("%s; using what is built", error.message)
            if plan is None:
                return sorted(b for b in self._compiled.selection.usable if b.seq_len <= self._block_size)
        if plan is None:
            way = KV if self._strategy == KV else RECOMPUTE
            plan = Plan.grid(seq=default_ladder(self._block_size), strategy=way).completed(self._block_size)
        return list(Plan(plan).check(self._block_size))

    def _ask_for(self, buckets: Collection[Bucket]) -> None:
        """Look in the remote, if there is one, unless all of some buckets are here; none: nothing here will do."""
        if self._compiled is None or (buckets and all(map(self._compiled.has, buckets))):
            return
        if self._compiled.ask() and not self._chosen:
            self._plan = sorted({*self._plan, *self._wanted(None)})

    def _check_start(self, lazy: bool) -> None:
        """Refuse what no call could run; what is `lazy` learns at its first call what that one lacks."""
        if self._compiled is None:
            return
        ready = self._loader.available(self._plan)
        if ready:
            self._choice.check_memory(Plan(ready))
        elif not (self._builds or lazy) and (self._chosen or not self._compiled.selection.usable):
            raise self._miss("no bucket of the plan is built" if self._chosen else "no bucket is built")

    def _at_hand(self, need: Mapping[str, int]) -> list[Bucket]:
        """Return what may run: the plan's buckets, and any other that is built if those do not reach."""
        planned = self._loader.available(self._plan)
        if self._chosen or reach(planned, need):
            return planned
        if self._compiled is None:  # where every shape runs, an unplanned step has its ladder
            return [*planned, *(bucket for step in need for bucket in self._ladder(step))]
        return sorted({*planned, *self._loader.available(self._compiled.selection.usable)})

    def _ladder(self, step: str) -> list[Bucket]:
        return [Bucket(1, rung, step) for rung in default_ladder(self._block_size, SHORTEST.get(step, 1))]

    def _load(self, bucket: Bucket) -> bool:
        new = bucket not in self._loader.loaded
        done = self._loader.load(bucket)
        if new and done and self._compiled is not None and bucket not in self._built_here:
            self._report.count_hit(*self._compiled.origins[bucket])
        return done

    def _count_misses(self, buckets: Iterable[Bucket]) -> None:
        for bucket in set(buckets) - self._missed:
            self._missed.add(bucket)
            if self._compiled is not None:
                self._report.count_miss(self._compiled.why_not(bucket))

    # --- misses -------------------------------------------------------------------------------------------------------

    def _build_for(self, call: _Call, needs: Mapping[str, Mapping[str, int]]) -> None:
        """Compile the buckets this run would use, and one that reaches its end if the plan has none.

        That is for the first of the ways in `needs`. Where it cannot be done, and what is built reaches in one of
        them, what is built runs.
        """
        need = next(iter(needs.values()))
        assert self._compiled is not None
        wanted = self._plan
        lacking = [step for step, length in need.items() if not reach(wanted, {step: length})]
        if lacking:
            wanted = sorted({*wanted, *(Bucket(1, rung_for(need[step], self._block_size), step) for step in lacking)})
        missing = [b for b in sorted(call(wanted)) if not self._compiled.has(b) or not self._load(b)]
        if missing:
            self._count_misses(missing)
            try:
                self._build(self._compiled, missing)
            except _UNBUILT as error:
                if not any(reach(self._at_hand(other), other) for other in needs.values()):
                    raise
                log.warning("%s; running what is built instead", error.message)
                return
        if wanted != self._plan:
            self._plan = wanted
            if kept := [bucket for bucket in wanted if bucket not in self._compiled.unkept]:
                remember_plan(self._choice, Plan(kept))

    def _build(self, compiled: Compiled, missing: list[Bucket]) -> None:
        compiled.weights  # noqa: B018  without them there is no use in compiling
        log.warning("compiling for %s first: %s", self._choice.model.name, ", ".join(map(str, missing)))
        unkept: dict[Bucket, Verified] = {}
        built = build_missing(self._choice, missing, on_progress=self._on_progress, retry=False, unkept=unkept)
        if unkept and not compiled.unkept:
            why = next(row.why for row in built.rows if row.bucket in unkept)
            log.warning("%s; what is compiled runs all the same, this time", why)
        compiled.unkept |= unkept
        compiled.selection = Selection(self._choice)  # the store as it is now
        compiled.forgive([row.bucket for row in built.rows if row.state != "failed"])
        for row in built.rows:
            log.info("bucket %s: %s after %.0f s", row.bucket, row.state, row.seconds)
        self._built_here |= {row.bucket for row in built.rows if row.state == "compiled"}
        self._report.compiled += built.compiled
        for row in built.rows:
            if row.state == "failed":
                raise CompileFailed(f"bucket {row.bucket} could not be compiled: {row.why}", hint=row.hint)

    def _say_promotions(self, call: _Call, used: set[Bucket]) -> None:
        """Say once for each planned bucket that it would have run, had it been built."""
        lacking = {bucket for bucket in self._plan if bucket not in self._loader.loaded}
        missed = lacking & call(sorted({*self._plan, *used})) if lacking else set()
        self._report.promotions += bool(missed)
        self._count_misses(missed)
        for bucket in sorted(missed - self._report.replaced.keys()):
            why = NOT_BUILT if self._compiled is None else self._compiled.why_unbuilt(bucket)
            self._report.replaced[bucket] = why
            said = "damaged" if bucket in self._loader.refused else why  # by what, was said when it was loaded
            command = self._choice.build_command([bucket])
            log.warning("bucket %s is %s; a larger one runs in its place (%s)", bucket, said, command)

    def _miss(self, what: str, step: str = RECOMPUTE, need: int = 0) -> BucketsError:
        """Return the error of a miss; what is here and cannot be used gives it its kind and reason."""
        if self._compiled is None:
            hint = "give a plan that has one, or none: uncompiled, every shape runs"
            return CacheMiss(what.replace("that is built", "of the plan"), hint=hint)
        lacking = [
            b for b in self._plan if not self._compiled.has(b) and b.holds(1, need) and (b.step == step or not need)
        ]
        self._count_misses(lacking)
        return explain_miss(self._choice, self._compiled.selection, what, lacking, need, step)
