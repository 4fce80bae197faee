"""`nanogpt-buckets cache verify`. Imports no torch."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from nanogpt_buckets import settings
from nanogpt_buckets.cli import output
from nanogpt_buckets.cli.deletion import agrees, amount, deletion_options, files_of, open_store, rows_of
from nanogpt_buckets.cli.options import cache_dir_option, layer_option, output_options
from nanogpt_buckets.errors import CacheError, CorruptEntry, UsageError
from nanogpt_buckets.store.repair import Repair, plan_repair
from nanogpt_buckets.store.repair import repair as repair_store
from nanogpt_buckets.store.store import Store
from nanogpt_buckets.store.verify import Verification
from nanogpt_buckets.store.verify import verify as verify_store


@click.command()
@click.option(
    "--repair", is_flag=True, help="Mend what is damaged from layers, and delete what they have not, for build to make."
)
@layer_option
@deletion_options
@cache_dir_option
@output_options
def verify(
    repair: bool, layers: tuple[Path, ...], dry_run: bool, yes: bool, cache_dir: Path | None, as_json: bool
) -> int:
    """Read every manifest and blob and compare them with their digests. Exit 4 if anything is damaged.

    --repair shows what would be done about it, asks, does it, and verifies again. What could not be read this time,
    what others could have written, and what a newer release wrote stays as it is.

    Example: nanogpt-buckets cache verify --repair --layer /opt/buckets --dry-run
    """
    if not repair and (layers or dry_run or yes):
        raise UsageError("--layer, --dry-run and --yes are about --repair", hint="add --repair, or leave them out")
    below = settings.layers(layers) if repair else []
    store = open_store(cache_dir)
    if not store.root.exists():
        raise CacheError(f"there is no cache in {store.root}", hint="build makes it; --cache-dir names another")
    result = _verified(store, as_json)
    done: dict[str, Any] = {}
    if repair:
        done = _repaired(store, Store(store.root, store.trust, below), result, dry_run, yes, as_json)
        result = _verified(store, as_json) if done["done"] else result
    if as_json:
        output.document(asdict(result) | ({"repair": done} if repair else {}))
    elif result.problems and not repair:
        output.say(
            "hint: nanogpt-buckets build replaces what it needs; --repair mends what it can, and deletes the rest"
        )
    return CorruptEntry.exit_code if result.problems else 0


def _verified(store: Store, as_json: bool) -> Verification:
    """Verify a store and tell people what is damaged."""
    with output.progress("verifying", len(store.blob_paths())) as advance:
        result = verify_store(store, on_file=lambda size: advance(1))
    if not as_json:
        for problem in result.problems:
            output.data(f"{problem.path}: {problem.what}")
        found = f"{len(result.problems)} damaged" if result.problems else "all intact"
        counts = f"{output.count(result.entries, 'entry', 'entries')}, {output.count(result.blobs, 'blob', 'blobs')}"
        output.say(f"{counts}, {output.size(result.bytes)}: {found}")
    return result


def _repaired(
    store: Store, below: Store, result: Verification, dry_run: bool, yes: bool, as_json: bool
) -> dict[str, Any]:
    """Show what would mend a store, ask, and do it; say what was."""
    plan = plan_repair(store, below, result)
    if plan and not as_json:
        mended = [("entry", m.key[:12], output.size(m.size), "written anew from a layer") for m in plan.mended]
        output.table(("WHAT", "NAME", "SIZE", "WHY"), mended + rows_of(plan.deletion))
    for note in plan.deletion.notes:
        output.say(f"note: {note}")
    agreed = bool(plan) and not dry_run and (yes or agrees(f"{_amount(plan).capitalize()}?", "repairing"))
    freed = 0
    if agreed:
        with output.progress("repairing", len(plan.mended) + len(plan.deletion.files)) as advance:
            freed = repair_store(store, below, plan, on_step=lambda: advance(1))
        output.say(f"done: {_amount(plan)}")
    elif plan:
        output.say(f"nothing was changed; this would be done: {_amount(plan)}")
    elif result.problems:
        output.say("nothing of this can be repaired")
    mended_keys = [m.key for m in plan.mended]
    return {"done": agreed, "mended": mended_keys, "freed": freed, "files": files_of(plan.deletion)}


def _amount(plan: Repair) -> str:
    return f"mend {output.count(len(plan.mended), 'entry', 'entries')}, delete {amount(plan.deletion)}"
