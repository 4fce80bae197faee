"""The default plan of a choice: the buckets that `build` adds up, and that the other commands use unasked.

Knows nothing of compiling or running. Imports no torch.
"""

from __future__ import annotations

import logging

from nanogpt_buckets.choice import Choice
from nanogpt_buckets.errors import CacheError, UsageError
from nanogpt_buckets.plan.bucket import Plan
from nanogpt_buckets.store.entry import manifest_of
from nanogpt_buckets.store.plans import Plans, SavedPlan

log = logging.getLogger(__name__)

# What an upgrade, or training a model of the same name on, changes in a family.
_CHANGING = ("runtime", "source", "weights")


def default_plan(choice: Choice) -> Plan | None:
    """Return what was saved for a choice, or None if nothing was.

    Raises:
        CacheError: it cannot be read, or a newer release wrote it.
    """
    saved = Plans(choice.store).load(choice.plan_names[-1])
    return None if saved is None else saved.buckets


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
    theirs = manifest.parts["family"] if manifest else {}
    return all(theirs.get(name, mine) == mine for name, mine in choice.family_parts.items() if name not in _CHANGING)
