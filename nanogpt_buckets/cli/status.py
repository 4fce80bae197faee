"""`nanogpt-buckets status`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import click

from nanogpt_buckets.choice import Choice, Options, choose, default_plan
from nanogpt_buckets.cli import output
from nanogpt_buckets.cli.options import (
    PlanOptions,
    fitted,
    grid,
    locked_option,
    model_options,
    output_options,
    plan_options,
    read_plan,
)
from nanogpt_buckets.errors import CacheError
from nanogpt_buckets.plan.bucket import Bucket, Plan
from nanogpt_buckets.selection import Selection, explain_miss
from nanogpt_buckets.store.entry import Miss, Status
from nanogpt_buckets.store.manifest import Manifest

_DIGEST = re.compile(r"\b([0-9a-f]{12})[0-9a-f]{52}\b")


@click.command()
@plan_options
@locked_option
@model_options
@click.option("--why", is_flag=True, help="For each bucket that is not built, what the most similar entry differs in.")
@output_options
def status(wanted: PlanOptions, model: str, options: Options, why: bool, as_json: bool) -> int:
    """Say for each bucket whether this machine could run it now. Exit 0 if all are warm, 1 if not.

    Without --seq or --plan: the model's default plan, else what is built. Every byte is verified, nothing is changed.
    --why names each part of the key in which the most similar entry, of whatever model, is another.

    Example: nanogpt-buckets status --model demo --seq 32,64,128
    """
    plan = read_plan(wanted)
    options["strategy"] = wanted["strategy"]
    choice = choose(model, **options)
    plan = fitted(plan, choice) or grid(wanted, choice)
    selection = Selection(choice)
    plan = plan or default_plan(choice) or (Plan(selection.usable) if selection.usable else None)
    if plan is None:
        if selection.reasons():
            raise explain_miss(choice, selection, "nothing that is built can be used", [])
        raise CacheError(
            f"nothing is built or planned for model {choice.model.name} in {choice.store.root}",
            hint=f"give --seq or --plan, or {choice.build_command()}",
        )
    rows, misses = [], {}
    for bucket in plan.check(choice.model.architecture.block_size):
        found = selection.best(bucket)  # not kept: it may hold the bytes of a library
        if isinstance(found, Miss):
            misses[bucket] = found
            rows.append((bucket, found.status.value, found.key, found.why))
        else:
            rows.append((bucket, "warm", found.manifest.key, ""))
    warm = len(rows) - len(misses)
    missing = [bucket for bucket, miss in misses.items() if why and miss.status is Status.ABSENT]
    nearest = {bucket: near for bucket in missing if (near := selection.nearest(bucket))}
    if as_json:
        buckets = [{"bucket": b.to_json(), "state": state, "key": key, "why": text} for b, state, key, text in rows]
        for row, (bucket, *_) in zip(buckets, rows, strict=True):
            if bucket in nearest:
                row["nearest"] = {"key": nearest[bucket][0].key, "differs": nearest[bucket][1]}
        document = {"model": choice.model.name, "backend": choice.backend_name, "family": choice.family}
        output.document({**document, "warm": warm, "total": len(rows), "buckets": buckets})
    else:
        cells = [(str(bucket), state, key[:12], text) for bucket, state, key, text in rows]
        output.table(("BUCKET", "STATE", "KEY", "WHY"), cells)
        if nearest:
            output.table(("BUCKET", "NEAREST", "DIFFERS IN"), list(_differences(nearest)))
        output.say(f"{warm} of {len(rows)} buckets warm for {choice.model.name} on {choice.backend_name}")
        _advise(choice, misses)
    return 1 if misses else 0


def _differences(nearest: Mapping[Bucket, tuple[Manifest, list[str]]]) -> Iterator[tuple[str, str, str]]:
    """Yield a row for each part that differs, digests cut short."""
    for bucket, (manifest, lines) in nearest.items():
        for line in lines:
            yield str(bucket), manifest.key[:12], _DIGEST.sub(r"\1", line)


def _advise(choice: Choice, misses: Mapping[Bucket, Miss]) -> None:
    """Say what would mend what is not warm."""
    hints = {miss.hint for miss in misses.values() if miss.hint}
    lacking = [b for b, miss in misses.items() if miss.status in (Status.ABSENT, Status.CORRUPT)]
    for hint in sorted(hints) or ([choice.build_command(lacking)] if lacking else []):
        output.say(f"hint: {hint}")
