"""Plan -> what is missing -> children -> gate -> publish.

The longest bucket first, then what saves most, so an interrupted build is of use. One failed bucket stops no other.
Knows nothing of how a bucket is compiled or checked (children do), nor of the terminal. Imports no torch.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import CancelledError, Executor, Future, ThreadPoolExecutor, as_completed
from hashlib import sha256
from typing import Any, Unpack

from nanogpt_buckets import backends, child, key
from nanogpt_buckets.backends import host, worker
from nanogpt_buckets.backends.base import TUNINGS, Artifact, Backend, BuildRequest
from nanogpt_buckets.built import BuildReport, BuildRow
from nanogpt_buckets.choice import Choice, Options, choose, remember_plan
from nanogpt_buckets.costs import costs_of
from nanogpt_buckets.errors import BackendUnavailable, BucketsError, CacheError, ChildFailed, CompileFailed, UsageError
from nanogpt_buckets.model.architecture import Architecture
from nanogpt_buckets.node import failures
from nanogpt_buckets.plan.bucket import Bucket, Plan
from nanogpt_buckets.plan.order import build_order
from nanogpt_buckets.plan.shard import part
from nanogpt_buckets.selection import Selection
from nanogpt_buckets.store.entry import Miss, Status, Verified
from nanogpt_buckets.store.lockfile import write_lock
from nanogpt_buckets.store.manifest import Blob, Manifest
from nanogpt_buckets.values import shown

log = logging.getLogger(__name__)

# How long to wait for another builder that holds the same key before compiling it as well.
_LOCK_TIMEOUT_S = 600.0
# How long to do so without a word.
_PATIENCE_S = 2.0
Listener = Callable[[Bucket, str], None]


def build(
    plan: Plan | Iterable[Bucket],
    *,
    model: str | os.PathLike[str],
    jobs: int | None = None,
    executor: Executor | None = None,
    tune: str = "off",
    shard: tuple[int, int] | None = None,
    lock: str | os.PathLike[str] | None = None,
    sign_key: str | os.PathLike[str] | None = None,
    sign_command: str | None = None,
    on_progress: Listener | None = None,
    **options: Unpack[Options],
) -> BuildReport:
    """Compile what is missing of a plan and add the plan to the model's default one.

    Neither weights nor network are needed where artifacts carry no weights, that is everywhere but on Neuron.

    Args:
        plan: the buckets.
        model: a name or path; see `open_model`.
        jobs: buckets at a time; None for as many as processors and memory allow, or all, which an executor lines up.
        executor: runs `compile_bucket(request)` instead of a child of this process; it may be on another machine, which
            for Neuron must see this one's prepared weights under the same path.
        tune: "fast" times the kernels that come into question in each child first, which takes some seconds, and keeps
            what it measured in the manifest; "off" takes what is usually best, and makes the same bytes anywhere.
        shard: (I, N), to build only the I-th of N parts of the plan, counted from 1, as others build the rest. Which
            bucket is in which part follows from the plan and the model alone.
        lock: a lock file, into which the buckets of the plan are written when all of them are built.
        sign_key: a file with an Ed25519 private key in PEM, which signs the buckets of the plan.
        sign_command: a command that does, the statement on its standard input, the signature on its standard output.
        on_progress: called from worker threads with a bucket and its phase: "waiting", "waiting for another build",
            "compiling", "checking", "hit", "compiled" or "failed".
        options: backend, target, dtype, compiler_args, cache_dir, remote, ...; see `Options`.

    Returns:
        One row per bucket, of the shard if there is one. Failed buckets are rows, not exceptions.

    Raises:
        PlanError: the plan is empty, has a bucket longer than the model's block_size, or is too large for the device.
        UsageError: an unknown dtype, backend, shard or number of jobs, or a backend that compiles nothing.
        BackendUnavailable: there is something to compile and no compiler.
    """
    return build_missing(
        choose(model, lock=lock, sign_key=sign_key, sign_command=sign_command, **options), plan, jobs=jobs,
        executor=executor, tune=tune, shard=shard, on_progress=on_progress,
    )  # fmt: skip


def build_missing(
    choice: Choice,
    plan: Plan | Iterable[Bucket],
    *,
    jobs: int | None = None,
    executor: Executor | None = None,
    tune: str = "off",
    shard: tuple[int, int] | None = None,
    on_progress: Listener | None = None,
    retry: bool = True,
    unkept: dict[Bucket, Verified] | None = None,
) -> BuildReport:
    """Do what `build` says for a choice that is made already.

    Without `retry`, what this node failed to compile within the last hour fails at once. What was compiled and could
    not be published is put into `unkept`, if that is given, and counts as compiled.
    """
    backend, target = choice.compiler, choice.build_target
    if jobs is not None and jobs < 1:
        raise UsageError(f"jobs is {jobs}; it must be at least 1")
    if tune not in TUNINGS:
        raise UsageError(f"tune {shown(tune)} is unknown", hint=f"choices: {', '.join(TUNINGS)}")
    plan = (plan if isinstance(plan, Plan) else Plan(plan)).check(choice.model.architecture.block_size)
    if odd := [bucket for bucket in plan if bucket.step not in backend.steps]:
        hint = f"what it has: {', '.join(backend.steps)}"
        raise UsageError(f"the {backend.name} backend has no {odd[0].step} step", hint=hint)
    choice.check_memory(plan)
    lock = choice.store.trust.lock
    if choice.store.trust.locked is not None:
        raise UsageError("nothing is built for a cache that is locked", hint="to write the lock file anew: --lock")
    if lock is not None and shard is not None:
        hint = "build the shards first, then lock the whole plan, which compiles nothing"
        raise UsageError("a shard is not the whole of what is to be locked", hint=hint)
    own = plan if shard is None else part(plan, shard, choice.cost)
    if not own:
        return BuildReport(choice.model.name, backend.name, target, choice.store.root)
    plan = Plan(own)
    try:
        builder = _Builder(choice, executor, tune, on_progress or (lambda bucket, phase: None), retry, unkept)
        rows = builder.run(plan, jobs)
    except KeyboardInterrupt:
        selection = Selection(choice)
        finished = [bucket for bucket in plan if isinstance(selection.own(bucket), Verified)]
        if finished:
            remember_plan(choice, Plan(finished))
        raise
    if kept := [bucket for bucket in plan if bucket not in (unkept or ())]:
        remember_plan(choice, Plan(kept))
    if lock is not None and len(builder.manifests) == len(plan):
        write_lock(lock.path, [builder.manifests[bucket] for bucket in plan], choice.replaces)
    return BuildReport(choice.model.name, backend.name, target, choice.store.root, rows)


def compile_bucket(request: dict[str, Any], on_event: Callable[[child.Event], None] | None = None) -> Artifact:
    """Compile one bucket in a child of the process this runs in; arguments and result can be pickled.

    Args:
        request: `BuildRequest.to_json()`.
        on_event: called with each of the child's events.

    Raises:
        ChildFailed: the child ended without a word.
        BucketsError: it could not compile the bucket, or the bucket failed the gate.
    """
    build = BuildRequest.from_json(request)
    backend = backends.backend_of(build)
    with child.work_folder() as workdir:
        # nothing of the compiler's may land outside this directory, which goes when the child is done
        result = child.run(
            worker.__name__,
            request,
            workdir=workdir,
            on_event=on_event,
            environment={"TMPDIR": str(workdir)} | backend.child_environment(build),
            timeout_s=backend.timeout_s,
        )
        return worker.artifact_from_json(result, workdir)


def default_jobs(backend: Backend, arch: Architecture, missing: Collection[Bucket]) -> int:
    """Return how many children may run at once: bounded by buckets, processors and memory."""
    by_memory = host.available_memory_bytes() // max(backend.child_bytes(arch, bucket) for bucket in missing)
    return max(1, min(len(missing), host.cpu_count(), by_memory))


class _Builder:
    """One run of `build`: finds what is missing, compiles it, publishes it."""

    def __init__(
        self, choice: Choice, executor: Executor | None, tune: str, on_progress: Listener, retry: bool,
        unkept: dict[Bucket, Verified] | None,
    ) -> None:  # fmt: skip
        self._choice = choice
        self._store = choice.store
        self._selection = Selection(choice)
        self._executor = executor
        self._tune = tune
        self._tell = on_progress
        self._retry = retry
        self._unkept = unkept
        self._stopped = False
        self.manifests: dict[Bucket, Manifest] = {}  # of what is built
        self._elsewhere: set[Future[Artifact]] = set()  # what the executor was asked for

    def run(self, plan: Plan, jobs: int | None) -> tuple[BuildRow, ...]:
        rows = {bucket: row for bucket in plan if (row := self._hit(bucket))}
        if len(rows) < len(plan) and self._store.ask():
            rows |= {bucket: row for bucket in plan if bucket not in rows and (row := self._hit(bucket))}
        missing = build_order(plan, rows, costs_of(self._choice)) if len(rows) < len(plan) else []
        if missing and self._choice.key_parts(missing[0]) is None:
            backend = self._choice.compiler
            raise BackendUnavailable(
                f"{len(missing)} of {len(plan)} buckets are missing and there is no {backend.needs} to build them with",
                hint=backend.install,
            )
        if missing:
            self._store.directory.prepare()  # a directory that cannot be written is said before minutes of compiling
            # how many an executor runs at once is its own affair, and a thread waits for each
            here = default_jobs(self._choice.compiler, self._choice.model.architecture, missing)
            rows |= self._build_all(missing, jobs or (len(missing) if self._executor else here))
        return tuple(rows[bucket] for bucket in plan)

    def _hit(self, bucket: Bucket, waited_s: float = 0.0) -> BuildRow | None:
        found = self._selection.own(bucket)
        if isinstance(found, Miss):
            if found.status not in (Status.ABSENT, Status.CORRUPT):
                raise self._store.error(found)
            self._tell(bucket, "waiting")
            return None
        self._store.sign(found.manifest)
        self.manifests[bucket] = found.manifest
        self._tell(bucket, "hit")
        return BuildRow(bucket, "hit", found.manifest.key, waited_s, found.manifest.size)

    def _build_all(self, missing: list[Bucket], jobs: int) -> dict[Bucket, BuildRow]:
        rows = {}
        pool = ThreadPoolExecutor(jobs, thread_name_prefix="build")
        futures: dict[Future[BuildRow], Bucket] = {}
        try:
            for bucket in missing:
                futures[pool.submit(self._build_one, bucket)] = bucket
            for future in as_completed(futures):
                rows[futures[future]] = future.result()
        except BaseException:  # Ctrl-C above all: finished buckets stay, children go
            self._stopped = True
            pool.shutdown(wait=False, cancel_futures=True)
            while not all(future.done() for future in futures):
                child.end_all()  # again, for a thread may just have been starting one
                for asked in list(self._elsewhere):
                    asked.cancel()
                time.sleep(0.02)
            raise
        pool.shutdown()
        return rows

    def _build_one(self, bucket: Bucket) -> BuildRow:
        start = time.monotonic()
        parts = self._choice.key_parts(bucket)
        assert parts is not None
        name, why = key.digest(parts), ""
        try:
            with self._store.directory.locked(name, _LOCK_TIMEOUT_S, self._waiting(bucket)):
                adopted = self._hit(bucket, time.monotonic() - start)
                if adopted is not None:
                    return adopted
                if not self._retry and (before := failures.recall(name)):
                    raise CompileFailed(before, hint=f"to try again: {self._choice.build_command([bucket])}")
                artifact = self._compile(bucket)
                manifest = self._manifest(parts, artifact)
                try:
                    manifest = self._store.publish(manifest, artifact.blobs)
                except CacheError as error:
                    if self._unkept is None:
                        raise
                    self._unkept[bucket], why = Verified(manifest, artifact.blobs), error.message
        except BucketsError as error:
            if not self._stopped:
                self._tell(bucket, "failed")
            failures.remember(name, error)
            return BuildRow(
                bucket, "failed", name, time.monotonic() - start, why=error.message, hint=error.hint, log=error.log
            )
        self.manifests[bucket] = manifest
        failures.forget(name)
        self._tell(bucket, "compiled")
        seconds, peak = time.monotonic() - start, manifest.stats.get("peak_bytes", 0)
        return BuildRow(bucket, "compiled", name, seconds, manifest.size, peak, why)

    def _waiting(self, bucket: Bucket) -> Callable[[str], bool]:
        """Return what is asked, while another process compiles the same bucket, whether to go on waiting."""
        start, said, known = time.monotonic(), False, False

        def cancelled(holder: str) -> bool:
            nonlocal said, known
            if not said and time.monotonic() - start > _PATIENCE_S:
                said = True
                self._tell(bucket, "waiting for another build")
            if said and holder and not known:
                known = True
                log.warning("bucket %s is being built by %s", bucket, holder)
            return self._stopped

        return cancelled

    def _compile(self, bucket: Bucket) -> Artifact:
        if self._stopped:
            raise ChildFailed("the build was interrupted")
        choice, backend = self._choice, self._choice.compiler
        inlined = choice.model.weights(choice.dtype).path if backend.inlines_weights else None
        request = BuildRequest(
            backend=backend.name,
            architecture=choice.model.architecture,
            bucket=bucket,
            dtype=choice.dtype,
            target=choice.build_target,
            lowering=backend.lowering,
            source=worker.source_of(backend, bucket.step),
            versions=backend.versions(),
            compiler_args=backend.compiler_args,
            weights_path=None if inlined is None else str(inlined),
            tune=self._tune,
        ).to_json()
        try:
            if self._executor is not None:
                self._tell(bucket, "compiling")
                asked = self._executor.submit(compile_bucket, request)
                self._elsewhere.add(asked)
                try:
                    return asked.result()
                finally:
                    self._elsewhere.discard(asked)  # with what it holds
            return compile_bucket(request, lambda event: self._hear(bucket, event))
        except BucketsError:
            raise
        except CancelledError as error:
            raise ChildFailed("whoever was to compile it has given it up") from error
        except Exception as error:  # somebody else's executor, a full disk: whatever it is, it is this bucket's failure
            raise ChildFailed(f"{type(error).__name__}: {error}".strip().splitlines()[0]) from error

    def _hear(self, bucket: Bucket, event: child.Event) -> None:
        if "phase" in event:
            self._tell(bucket, event["phase"])

    def _manifest(self, parts: dict[str, Any], artifact: Artifact) -> Manifest:
        """Describe a new artifact under the names its parts give it."""
        blobs = (Blob(role, sha256(data).hexdigest(), len(data)) for role, data in sorted(artifact.blobs.items()))
        return Manifest(
            family=key.digest(parts["family"]),
            key=key.digest(parts),
            parts=parts,
            blobs=tuple(blobs),
            contains_weights=self._choice.compiler.inlines_weights,
            **artifact.facts(),
        )
