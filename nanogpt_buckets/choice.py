"""Choice: what the user asked for, resolved once - model, backend, target, dtype, compiler flags, cache directory.

From it follow the names of compiled things (family, key), the default plan - the buckets that `build` adds up, and that
the other commands use unasked -, what a device has room for, and the command that a hint prints. A further option is
one field here and one flag in cli/options.py.

Knows nothing of what is built. Imports no torch.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Unpack

from nanogpt_buckets import backends, key, settings
from nanogpt_buckets.backends.base import DTYPES, Backend
from nanogpt_buckets.errors import CacheError, PlanError, UsageError
from nanogpt_buckets.model.checkpoint import Model, open_model
from nanogpt_buckets.plan.bucket import STRATEGIES, WAYS, Bucket, Plan
from nanogpt_buckets.steps import step_named
from nanogpt_buckets.store.entry import manifest_of
from nanogpt_buckets.store.opening import Places, Written, open_store
from nanogpt_buckets.store.plans import Plans, SavedPlan
from nanogpt_buckets.store.store import Store
from nanogpt_buckets.values import shown

log = logging.getLogger(__name__)

EAGER = "eager"
# What an upgrade, or training a model of the same name on, changes in a family.
_CHANGING = ("runtime", "source", "weights")
# What it costs to read a weight, which every call does once, in multiply-adds. By this, eight rows of a token take as
# long as two and a half calls of one.
_READING = 4


class Options(Places, total=False):
    """What can be chosen besides the model; every public function that takes these hands them on whole.

    `backend`: "auto", "inductor", "neuron", or "eager" to run steps uncompiled. `target`: what to generate code for,
    and the only one to load; None for this host's best to build, and any that runs here to load. `dtype`: "float32" or
    "bfloat16". `compiler_args`: flags for neuronx-cc, as a line or a list. `cores`: NeuronCores to run on, each holding
    every bucket. `strategy`: "kv" runs a prompt once and keeps what it remembers, "recompute" runs all of the context
    for each token; "auto" is "kv" where buckets for it are planned, and on Neuron "recompute". The rest says where
    buckets are and which are believed: see `Places`.
    """

    backend: str
    target: str | None
    dtype: str
    compiler_args: str | Sequence[str]
    cores: int
    strategy: str


@dataclass(frozen=True)
class Choice:
    """One model on one backend in one cache directory. Made by `choose`.

    Args:
        model: what is compiled and run.
        backend: what compiles and loads it; None where steps run uncompiled.
        dtype: "float32" or "bfloat16".
        store: where entries and plans are.
        target: what to build for, and the only one to load; None for the backend's choice, and any that runs here.
    """

    model: Model
    backend: Backend | None
    dtype: str
    store: Store
    target: str | None = None

    @property
    def compiler(self) -> Backend:
        """The backend, for those who need one.

        Raises:
            UsageError: steps run uncompiled, so there are no buckets to speak of.
        """
        if self.backend is None:
            raise UsageError(
                "the eager backend compiles nothing, so there are no buckets",
                hint="leave --backend out; to run uncompiled: nanogpt-buckets generate --backend eager",
            )
        return self.backend

    @property
    def backend_name(self) -> str:
        """What runs: the backend's name, or "eager"."""
        return EAGER if self.backend is None else self.backend.name

    @functools.cached_property
    def build_target(self) -> str:
        """What would be built for."""
        return self.compiler.target(self.target)

    @property
    def only_target(self) -> str | None:
        """The one target whose entries are of use, or None if any that runs here is."""
        return None if self.target is None else self.build_target

    @functools.cached_property
    def family_parts(self) -> dict[str, Any]:
        """The named parts of the family: what a machine that only loads can know."""
        backend = self.compiler
        return {
            "architecture": self.model.architecture.to_json(),
            "backend": backend.name,
            "dtype": self.dtype,
            "flags": backend.flags(),
            "lowering": dict(backend.lowering),
            "runtime": dict(backend.runtime()),  # libraries that must match to load at all
            "source": key.source_digest(*key.GRAPH_SOURCES, *backend.sources),
            "weights": self.model.weights(self.dtype).digest if backend.inlines_weights else None,
        }

    @functools.cached_property
    def family(self) -> str:
        """The family's digest, which is also its directory."""
        return key.digest(self.family_parts)

    def replaces(self, theirs: Mapping[str, Any]) -> bool:
        """Whether our family stands where one of these parts did: alike but for versions, source and weights."""
        ours = self.family_parts.items()
        return all(theirs.get(name, mine) == mine for name, mine in ours if name not in _CHANGING)

    def key_parts(self, bucket: Bucket) -> dict[str, Any] | None:
        """Return the parts of the key this machine would build under, or None if it has no compiler.

        To the family they add what only a compiling machine knows.
        """
        versions = self.compiler.compiler()
        if versions is None:
            return None
        return {
            "family": self.family_parts,
            "bucket": bucket.to_json(),
            "step": key.source_digest(*step_named(bucket.step).sources),
            "target": self.build_target,
            "compiler": dict(versions),
        }

    @functools.cached_property
    def plan_names(self) -> tuple[str, ...]:
        """The default plans that `build` adds to; the last is the one that is read.

        Whatever names another family has a plan of its own. A target asked for has one too, beside the plan without: an
        instruction-set level runs on others' machines, a Neuron target only on its own.
        """
        backend = self.compiler
        name = self.model.name if self.dtype == "float32" else f"{self.model.name}.{self.dtype}"
        if backend.plans:
            name += f".{backend.plans}.{self.build_target}" + ("" if backend.inlines_weights else ".kv")
        if flags := backend.flags():
            name += f".{key.digest({'flags': flags})[:8]}"
        return (name,) if self.target is None or backend.plans else (name, f"{name}.{self.build_target}")

    def cost(self, bucket: Bucket) -> int:
        """Return the cost of one call of a bucket, in multiply-adds; only the order of two sums of them matters."""
        arch = self.model.architecture
        return step_named(bucket.step).macs(arch, bucket) + _READING * arch.n_params

    def check_memory(self, plan: Plan) -> None:
        """Refuse a plan that does not fit the device, with all weights and what is remembered.

        Raises:
            PlanError: with the largest part of the plan that does.
        """
        if self.fits(plan):
            return
        capacity, kept = self.compiler.capacity(self.build_target) or 0, list[Bucket]()
        # the longest reach every prompt; those between save time only
        for bucket in sorted(plan, key=lambda bucket: (bucket.seq_len, bucket.batch_size), reverse=True):
            kept += [bucket] * self.fits([*kept, bucket])
        what = f"{len(plan)} buckets of {self.model.name} hold {self.device_bytes(plan) / 1e9:.1f} GB of weights"
        if not self.compiler.inlines_weights:
            rows, weights = max(bucket.batch_size for bucket in plan), self.weights_bytes / 1e9
            remembered = self.device_bytes(plan) / 1e9 - weights
            what = (
                f"the weights of {self.model.name} take {weights:.1f} GB, what {rows} rows remember {remembered:.1f} GB"
            )
        raise PlanError(
            f"{what}, and a {self.build_target} core has room for {capacity / 1e9:.1f} GB",
            hint=f"the largest part that fits: {self.build_command(kept)}" if kept else "try --dtype bfloat16",
        )

    def fits(self, plan: Collection[Bucket]) -> bool:
        """Whether the buckets of a plan fit into the memory of the device they are built for."""
        capacity = self.compiler.capacity(self.build_target)
        return capacity is None or self.device_bytes(plan) <= capacity

    @property
    def weights_bytes(self) -> int:
        """What the weights take, in this dtype."""
        return self.model.architecture.n_params * (4 if self.dtype == "float32" else 2)

    def device_bytes(self, plan: Collection[Bucket]) -> int:
        """Return what buckets take on one core: the weights in each, or once and what the widest takes and returns."""
        if self.compiler.inlines_weights:
            return len(plan) * self.weights_bytes
        arch, item = self.model.architecture, 4 if self.dtype == "float32" else 2
        states = ((step_named(b.step).interface(arch, b, self.dtype).state) for b in plan)
        return self.weights_bytes + 2 * item * max(sum(math.prod(view.shape) for view in state) for state in states)

    def strategy(self, wanted: str) -> str:
        """Return what a strategy plans, in `WAYS`; "auto" is to remember, where the backend does so unasked."""
        if wanted == "kv" and self.backend is not None:
            return self.backend.kv
        if wanted != "auto":
            return wanted
        return "kv" if self.backend is not None and set(STRATEGIES["kv"]) <= set(self.backend.steps) else "recompute"

    def _option(self, step: str) -> str:
        """Return what tells `build` to plan a step, if it would not do so anyway."""
        purpose = next(name for name, steps in WAYS.items() if step in steps)
        if purpose == "chunk":
            return " --strategy kv"
        if purpose not in STRATEGIES:
            return f" --{purpose}"
        return "" if purpose == self.strategy("auto") else f" --strategy {purpose}"

    def build_command(self, buckets: Iterable[Bucket] = ()) -> str:
        """Return the command that builds these buckets, or the default ladder if there are none, for a hint.

        Where the buckets are no grid, one command for each batch size; and one for each strategy.
        """
        lengths: dict[tuple[str, int], list[int]] = {}
        for bucket in sorted(buckets):
            lengths.setdefault((self._option(bucket.step), bucket.batch_size), []).append(bucket.seq_len)
        batches: dict[tuple[str, tuple[int, ...]], list[int]] = {}
        for (way, batch_size), own in lengths.items():
            batches.setdefault((way, tuple(dict.fromkeys(own))), []).append(batch_size)
        grids = [
            ("" if rows == [1] else f" --batch {','.join(map(str, rows))}") + f" --seq {','.join(map(str, own))}{way}"
            for (way, own), rows in batches.items()
        ]
        name = self.model.name if self.model.path is None else shlex.quote(str(self.model.path))
        options = "" if self.dtype == "float32" else f" --dtype {self.dtype}"
        options += "" if self.target is None else f" --target {self.target}"
        given = " ".join(self.backend.compiler_args if self.backend is not None else ())
        options += f" --compiler-args={shlex.quote(given)}" if given else ""
        options += settings.cache_dir_option(self.store.root)
        options += "".join(f" --layer {shlex.quote(str(layer.root))}" for layer in self.store.layers)
        lock = self.store.trust.lock
        options += "" if lock is None else f" --lock {shlex.quote(str(lock.path))}"
        return " && ".join(f"nanogpt-buckets build --model {name}{grid}{options}" for grid in grids or [""])


def choose(
    model: str | os.PathLike[str],
    *,
    backend: str = "auto",
    target: str | None = None,
    dtype: str = "float32",
    compiler_args: str | Sequence[str] = (),
    cores: int = 1,
    strategy: str = "auto",
    able: bool = True,
    **places: Unpack[Written],
) -> Choice:
    """Resolve what the user asked for; see `Options` and, for what a build writes, `Written`.

    To plan only, this machine need not be `able` to build it.

    Raises:
        UsageError: an unknown dtype or backend, or an argument it does not take, or not with this dtype.
        CacheError: the lock file cannot be used.
        BackendUnavailable: the backend cannot be used, or not for this target.
        ModelError: the model cannot be used.
    """
    if dtype not in DTYPES:
        raise UsageError(f"dtype {shown(dtype)} is unknown", hint=f"dtypes: {', '.join(DTYPES)}")
    chosen = None
    if backend == EAGER:
        backends.refuse_neuron_only(EAGER, target, compiler_args, cores)
        if target is not None:
            raise UsageError("the eager backend builds for no target", hint="leave --target out")
        if places.get("locked") is not None:
            raise UsageError("the eager backend loads nothing that could be locked", hint="leave --locked out")
    else:
        chosen = backends.backend_for(backend, target, compiler_args=compiler_args, cores=cores, strategy=strategy)
        if able:
            chosen.target(target)  # refuse an impossible target before anything else is done
        if dtype == "float32" and chosen.rounds() and not chosen.inlines_weights:
            said = "float32 weights that every call is given would be cast anew in every call"
            raise UsageError(said, hint="--dtype bfloat16 moves them cast already; or leave --auto-cast out")
        if chosen.caveat:
            log.warning("%s", chosen.caveat)
    store = open_store(**places)
    return Choice(open_model(model), chosen, dtype, store, target)


def default_plan(choice: Choice) -> Plan | None:
    """Return what was saved for a choice, or is locked for it; None if nothing is.

    Raises:
        CacheError: it cannot be read, or a newer release wrote it.
    """
    if (locked := choice.store.trust.locked) is not None:
        buckets = locked.buckets(choice.family, choice.only_target)
        return Plan(buckets) if buckets else None
    for store in (choice.store, *choice.store.layers):
        if (saved := Plans(store).load(choice.plan_names[-1])) is not None:
            return saved.buckets
    return None


def remember_plan(choice: Choice, plan: Plan) -> None:
    """Add buckets to the default plan, if it can be written; a damaged plan is replaced, a newer one left alone."""

    def added(before: SavedPlan | None) -> SavedPlan:
        merged = before.buckets | plan if before is not None else plan
        kept = merged if choice.fits(merged) else plan
        others = (family for family in (before.families if before else ()) if not _replaced(choice, family))
        return SavedPlan(kept, frozenset({choice.family, *others}))

    for name in choice.plan_names:
        try:
            Plans(choice.store).change(name, added)
        except (CacheError, UsageError) as error:
            log.warning("the plan of %s was not saved: %s", choice.model.name, error.message)


def _replaced(choice: Choice, family: str) -> bool:
    """Whether the choice's family stands where another did before: alike but for versions, source and weights."""
    manifest = next(filter(None, map(manifest_of, choice.store.family(family))), None)
    return choice.replaces(manifest.parts["family"] if manifest else {})
