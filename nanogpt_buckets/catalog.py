"""One model on one backend, seen through one cache: its family, the entries this machine can use, its default plan.

Two questions are kept apart. A builder asks for *its own key*: exactly this compiler and target. A loader asks for
*anything that runs here*: the best entry of the family whose bucket matches and whose requirements this host meets.

Knows nothing of compiling or running. Imports no torch.
"""

from __future__ import annotations

import functools
import logging
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from nanogpt_buckets import backends, key, settings
from nanogpt_buckets.backends import host
from nanogpt_buckets.backends.base import DTYPES, Artifact, Backend
from nanogpt_buckets.errors import CacheError, CorruptEntry, PlanError, UsageError
from nanogpt_buckets.model.checkpoint import Model, open_model
from nanogpt_buckets.plan.bucket import Bucket, Plan
from nanogpt_buckets.store.answer import Answer, Status
from nanogpt_buckets.store.local import LocalStore
from nanogpt_buckets.store.manifest import Blob, Manifest
from nanogpt_buckets.versions import version_tuple

log = logging.getLogger(__name__)

# What an upgrade, or training a model of the same name on, changes in a family.
_CHANGING = ("runtime", "source", "weights")
# Why a bucket is absent, unless one for another toolchain is here.
NOT_BUILT = "not built"


@dataclass(frozen=True)
class Catalog:
    """The entries of one family.

    Args:
        model: what is compiled.
        backend: what compiles and loads it.
        dtype: "float32" or "bfloat16".
        store: where entries are.
        target: what to build for, and the only one to load; None for the backend's choice, and any that runs here.
    """

    model: Model
    backend: Backend
    dtype: str
    store: LocalStore
    target: str | None = None

    @functools.cached_property
    def family_parts(self) -> dict[str, Any]:
        """Return the named parts of the family."""
        return key.family_parts(
            architecture=self.model.architecture.to_json(),
            dtype=self.dtype,
            backend=self.backend.name,
            runtime=self.backend.runtime(),
            source=key.source_digest(*self.backend.sources),
            lowering=self.backend.lowering(),
            flags=self.backend.flags(),
            weights=self.model.weights(self.dtype).digest if self.backend.inlines_weights else None,
        )

    @functools.cached_property
    def family(self) -> str:
        """Return the family's digest, which is also its directory."""
        return key.digest(self.family_parts)

    def key_parts(self, bucket: Bucket) -> dict[str, Any] | None:
        """Return the parts of the key this machine would build under, or None if it has no compiler."""
        compiler = self.backend.compiler()
        if compiler is None:
            return None
        target = self.backend.target(self.target)
        return key.key_parts(self.family_parts, bucket=bucket.to_json(), target=target, compiler=compiler)

    def own(self, bucket: Bucket) -> Answer:
        """Answer a builder: is this bucket here under this machine's own key, every byte in order?

        Without a compiler no key can be named; then any entry that runs here counts.
        """
        parts = self.key_parts(bucket)
        if parts is None:
            return self.best(bucket)
        return self.store.check(self.store.look(self.family, key.digest(parts), parts))

    def best(self, bucket: Bucket) -> Answer:
        """Answer a loader: the best intact entry of this bucket that runs here, or why there is none."""
        answers = self._ranked().get(bucket, [])
        for answer in answers:
            checked = self.store.check(answer)
            if checked.status is Status.WARM:
                return checked
        # of which bucket an entry is that cannot be read, nobody knows
        unreadable = [Answer(a.status, "", why=a.why, hint=a.hint) for a in self._unreadable()]
        refused = [self.store.check(answer) for answer in answers] + unreadable
        return refused[0] if refused else Answer(Status.ABSENT, "", why=self._why_absent(bucket))

    def replaces(self, family: str) -> bool:
        """Whether this family stands where another did before: alike but for library versions, source and weights."""
        manifests = [answer.manifest for answer in self.store.family(family) if answer.manifest is not None]
        theirs = manifests[0].parts["family"] if manifests else {}
        return all(theirs.get(name, mine) == mine for name, mine in self.family_parts.items() if name not in _CHANGING)

    def usable(self) -> dict[Bucket, list[Answer]]:
        """Return, for each bucket, the entries that say they run here, best first. Blobs are not read yet."""
        warm = {b: [a for a in answers if a.status is Status.WARM] for b, answers in self._ranked().items()}
        return {bucket: answers for bucket, answers in warm.items() if answers}

    def artifact(self, manifest: Manifest) -> Artifact:
        """Read and verify an entry's blobs.

        Raises:
            CorruptEntry: a blob is missing or its bytes are not what its name says.
            TransientError: it could not be read this time.
        """
        return Artifact(
            blobs={blob.role: self.store.read_blob(blob) for blob in manifest.blobs},
            inputs=manifest.inputs,
            outputs=manifest.outputs,
            weights=manifest.weights,
            requires=manifest.requires,
            stats=manifest.stats,
            gate=manifest.gate,
        )

    def manifest(self, parts: dict[str, Any], artifact: Artifact) -> Manifest:
        """Describe a new artifact under the names its parts give it; `artifact` is the way back."""
        blobs = (Blob(role, sha256(data).hexdigest(), len(data)) for role, data in sorted(artifact.blobs.items()))
        return Manifest(
            family=key.digest(parts["family"]),
            key=key.digest(parts),
            parts=parts,
            blobs=tuple(blobs),
            inputs=artifact.inputs,
            outputs=artifact.outputs,
            weights=artifact.weights,
            requires=dict(artifact.requires),
            contains_weights=self.backend.inlines_weights,
            stats=dict(artifact.stats),
            gate=dict(artifact.gate),
        )

    def fits(self, plan: Plan) -> bool:
        """Whether the buckets of a plan fit into the memory of the device they are built for."""
        limit = self._most_buckets()
        return limit is None or len(plan) <= limit

    def check_memory(self, plan: Plan) -> None:
        """Refuse a plan whose buckets, each with its own copy of the weights, do not fit the device.

        Raises:
            PlanError: with the largest part of the plan that does.
        """
        limit = self._most_buckets()
        if limit is None or len(plan) <= limit:
            return
        target = self.backend.target(self.target)
        needed, capacity = len(plan) * self._bucket_bytes(), self.backend.capacity(target) or 0
        # the longest reach every prompt; those between save time only
        kept = sorted(plan, key=lambda bucket: (bucket.seq_len, bucket.batch_size))[len(plan) - limit :]
        raise PlanError(
            f"{len(plan)} buckets of {self.model.name} hold {needed / 1e9:.1f} GB of weights, "
            f"and a {target} core has room for {capacity / 1e9:.1f} GB",
            hint=f"the largest part that fits: {self.build_command(kept)}" if kept else "try --dtype bfloat16",
        )

    def _bucket_bytes(self) -> int:
        return self.model.architecture.n_params * (4 if self.dtype == "float32" else 2)

    def _most_buckets(self) -> int | None:
        """Return how many buckets fit on a device, or None where weights are not in them."""
        capacity = self.backend.capacity(self.backend.target(self.target)) if self.backend.inlines_weights else None
        return None if capacity is None else capacity // self._bucket_bytes()

    def build_command(self, buckets: Iterable[Bucket] = ()) -> str:
        """Return the command that builds these buckets, or the default ladder if there are none, for a hint."""
        wanted = list(buckets)
        batch = ",".join(map(str, sorted({bucket.batch_size for bucket in wanted})))
        seq = ",".join(map(str, sorted({bucket.seq_len for bucket in wanted})))
        name = self.model.name if self.model.path is None else shlex.quote(str(self.model.path))
        rows = f" --batch {batch}" if batch not in ("", "1") else ""
        lengths = f" --seq {seq}" if seq else ""
        dtype = "" if self.dtype == "float32" else f" --dtype {self.dtype}"
        target = "" if self.target is None else f" --target {self.target}"
        arguments = shlex.quote(" ".join(self.backend.arguments)) if any(self.backend.arguments) else ""
        flags = f" --compiler-args={arguments}" if arguments else ""
        place = settings.cache_dir_option(self.store.root)
        return f"nanogpt-buckets build --model {name}{rows}{lengths}{dtype}{target}{flags}{place}"

    def require_compiling(self) -> None:
        """Refuse a backend that has no buckets to speak of.

        Raises:
            UsageError: this one compiles nothing.
        """
        if not self.backend.compiles:
            raise UsageError(
                f"the {self.backend.name} backend compiles nothing, so there are no buckets", hint="leave --backend out"
            )

    def _why_absent(self, bucket: Bucket) -> str:
        """Say that a bucket is not built, and how the most alike one of this architecture differs from it."""
        differences: list[list[str]] = []
        for _, answer in self.store.entries():
            manifest = answer.manifest
            if manifest is not None and manifest.bucket == bucket:
                theirs = manifest.parts["family"]
                if theirs.get("architecture") == self.family_parts["architecture"]:
                    wanted = None if self.target is None else self.backend.target(self.target)
                    targets = (wanted, manifest.parts["target"]) if wanted else (None, None)
                    ours = {**self.family_parts, "target": targets[0]}
                    differences.append(key.difference(ours, {**theirs, "target": targets[1]}))
        if not differences:
            return NOT_BUILT
        lines = ["another release's source" if x.startswith("source:") else x for x in min(differences, key=len)]
        return f"{NOT_BUILT}; there is one with {', '.join(lines)}"

    def _ranked(self) -> dict[Bucket, list[Answer]]:
        found: dict[Bucket, list[Answer]] = {}
        wanted = None if self.target is None else self.backend.target(self.target)
        for answer in self.store.family(self.family):
            manifest = answer.manifest
            if manifest is None or manifest.parts["family"] != self.family_parts or manifest.bucket is None:
                continue
            if wanted not in (None, manifest.parts["target"]):
                continue
            found.setdefault(manifest.bucket, []).append(self._fit(answer))
        return {bucket: sorted(answers, key=self._preference) for bucket, answers in found.items()}

    def _fit(self, answer: Answer) -> Answer:
        assert answer.manifest is not None
        lack = host.unmet(answer.manifest.requires)
        return Answer(Status.INCOMPATIBLE, answer.key, answer.manifest, lack) if lack else answer

    def _unreadable(self) -> list[Answer]:
        return [answer for answer in self.store.family(self.family) if answer.manifest is None]

    def _preference(self, answer: Answer) -> tuple[Any, ...]:
        """Order entries: runs here, own compiler, highest level, newest compiler, then key."""
        assert answer.manifest is not None
        parts: Mapping[str, Any] = answer.manifest.parts
        own_compiler = parts["compiler"] == self.backend.compiler()
        newest = [tuple(-n for n in version_tuple(text)) for text in sorted(parts["compiler"].values())]
        runs_here = answer.status is Status.WARM
        return (not runs_here, not own_compiler, host.level_rank(parts["target"]), newest, answer.key)


def open_catalog(
    model: str | os.PathLike[str],
    *,
    backend: str,
    target: str | None,
    dtype: str,
    cache_dir: str | os.PathLike[str] | None,
    compiler_args: str | Sequence[str] = (),
    cores: int = 1,
) -> Catalog:
    """Resolve what the user typed into one model, one backend and one store.

    Raises:
        UsageError: an unknown dtype or backend, or an argument it does not take.
        BackendUnavailable: the backend cannot be used, or not for this target.
        ModelError: the model cannot be used.
    """
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is unknown", hint=f"dtypes: {', '.join(DTYPES)}")
    chosen = backends.choose(backend, target, arguments=compiler_args, cores=cores)
    if chosen.compiles:
        chosen.target(target)  # refuse an impossible target before anything else is done
    return Catalog(open_model(model), chosen, dtype, LocalStore(settings.cache_dir(cache_dir)), target)


def default_plan(catalog: Catalog) -> Plan | None:
    """Return the plan saved under the model's name, or None; see `built`."""
    saved = catalog.store.load_plan(catalog.model.name)
    return None if saved is None else Plan.from_json(saved)


def built(catalog: Catalog) -> Plan | None:
    """Return every bucket that is built and runs here, or None if there is none: the plan where none was saved."""
    usable = catalog.usable()
    return Plan(usable) if usable else None


def remember_plan(catalog: Catalog, plan: Plan) -> None:
    """Add these buckets to the model's default plan, if the store can be written; a damaged plan is replaced."""
    name, store = catalog.model.name, catalog.store
    try:
        saved = store.load_plan(name)
        before = None if saved is None else Plan.from_json(saved)
    except (CorruptEntry, PlanError):
        saved = before = None
    merged = plan if before is None or not catalog.fits(before | plan) else before | plan
    others = (family for family in (saved or {}).get("families", ()) if not catalog.replaces(family))
    families = {catalog.family, *others}
    document = merged.to_json(model=name, source="build", families=families)
    if document == saved:
        return
    try:
        store.save_plan(name, document)
    except CacheError as error:
        log.warning("the plan of %s was not saved: %s", catalog.model.name, error.message)
