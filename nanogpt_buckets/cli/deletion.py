"""What commands that delete share: the store they look in, their options, and to show what would go, ask, and do it."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from nanogpt_buckets import settings
from nanogpt_buckets.cli import output
from nanogpt_buckets.cli.options import added
from nanogpt_buckets.errors import UsageError
from nanogpt_buckets.store.prune import Deletion, delete
from nanogpt_buckets.store.store import Store
from nanogpt_buckets.store.trust import why_shared
from nanogpt_buckets.store.vouch import Trust

deletion_options = added(
    click.option("-n", "--dry-run", is_flag=True, help="Show what would be done; change nothing."),
    click.option("-y", "--yes", is_flag=True, help="Do not ask."),
)


def open_store(cache_dir: Path | None) -> Store:
    """Return a store to look at, or to delete from: nothing in it is loaded, so others may write there, too."""
    root = settings.cache_dir(cache_dir)
    shared = why_shared(root)
    if shared:
        output.say(f"note: {root} {shared}; nothing in it is loaded that no lock file names")
    return Store(root, Trust(looks=bool(shared)))


def carry_out(store: Store, deletion: Deletion, dry_run: bool, yes: bool, as_json: bool) -> int:
    """Show what would go, ask, and do it."""
    if not as_json and deletion.files:
        output.table(("WHAT", "NAME", "SIZE", "WHY"), rows_of(deletion))
    for note in deletion.notes:
        output.say(f"note: {note}")
    wanted = bool(deletion.files) and not dry_run
    agreed = wanted and (yes or agrees(f"Delete {amount(deletion)}?", "deleting"))
    freed = 0
    if agreed:
        with output.progress("deleting", len(deletion.files)) as advance:
            freed = delete(store, deletion, on_file=lambda file: advance(1))
    if as_json:
        output.document({"bytes": deletion.bytes, "deleted": agreed, "freed": freed, "files": files_of(deletion)})
    if not deletion.files:
        output.say("there is nothing to delete")
    elif agreed:
        output.say(f"deleted {output.count(deletion.entries, 'entry', 'entries')}, {output.size(freed)} freed")
    else:
        output.say(f"nothing was deleted; {amount(deletion)} would go")
    return 1 if wanted and not agreed else 0


def rows_of(deletion: Deletion) -> list[tuple[str, str, str, str]]:
    """Return what would go as rows of a table: what it is, its name, its size, and why."""
    return [(file.what, file.name[:12], output.size(file.bytes), file.why) for file in deletion.files]


def files_of(deletion: Deletion) -> list[dict[str, Any]]:
    """Return what would go as plain JSON."""
    return [asdict(file) | {"path": str(file.path)} for file in deletion.files]


def amount(deletion: Deletion) -> str:
    """Say how much would go."""
    files = output.count(len(deletion.files), "file", "files")
    return f"{output.count(deletion.entries, 'entry', 'entries')}, {files}, {output.size(deletion.bytes)}"


def agrees(question: str, doing: str) -> bool:
    """Ask a person; a UsageError if nobody can be asked."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise UsageError(f"nobody can be asked here, so {doing} needs --yes", hint="--dry-run shows what would go")
    return click.confirm(question, err=True)
