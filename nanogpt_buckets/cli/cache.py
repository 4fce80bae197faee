"""`nanogpt-buckets cache`: dir, ls, verify. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from nanogpt_buckets import settings
from nanogpt_buckets.cli import output
from nanogpt_buckets.cli.options import cache_dir_option, json_option
from nanogpt_buckets.errors import CorruptEntry
from nanogpt_buckets.plan.bucket import Bucket
from nanogpt_buckets.store.answer import Answer
from nanogpt_buckets.store.local import LocalStore
from nanogpt_buckets.store.verify import verify as verify_store


@click.group()
def cache() -> None:
    """Look at the cache."""


@cache.command("dir")
@cache_dir_option
def dir_(cache_dir: Path | None) -> None:
    """Print the cache directory and nothing else.

    Example: du -sh "$(nanogpt-buckets cache dir)"
    """
    output.data(str(settings.cache_dir(cache_dir)))


@cache.command()
@cache_dir_option
@json_option
def ls(cache_dir: Path | None, as_json: bool) -> None:
    """List every entry.

    Example: nanogpt-buckets cache ls --json
    """
    store = LocalStore(settings.cache_dir(cache_dir))
    rows = [_row(answer) for _, answer in store.entries()]
    if as_json:
        output.document(rows)
        return
    headers = ("KEY", "STATE", "BUCKET", "BACKEND", "TARGET", "DTYPE", "MODEL", "SIZE")
    output.table(headers, [[row[name.lower()] for name in headers[:-1]] + [output.size(row["bytes"])] for row in rows])
    output.say(f"{len(rows)} entries, {output.size(sum(row['bytes'] for row in rows))}, in {store.root}")


def _row(answer: Answer) -> dict[str, Any]:
    row: dict[str, Any] = {"key": answer.key, "state": answer.status.value, "why": answer.why, "bytes": 0}
    blank = dict.fromkeys(("bucket", "backend", "target", "dtype", "model", "torch"), "")
    if answer.manifest is None:
        return row | blank
    parts = answer.manifest.parts
    family, arch = parts["family"], parts["family"]["architecture"]
    return row | {
        "bucket": str(Bucket(**parts["bucket"])),
        "backend": family["backend"],
        "target": parts["target"],
        "dtype": family["dtype"],
        "model": f"{arch['n_layer']}L {arch['n_head']}H {arch['n_embd']}C {arch['vocab_size']}V",
        "torch": family["runtime"].get("torch", ""),
        "bytes": sum(blob.size for blob in answer.manifest.blobs),
        "contains_weights": answer.manifest.contains_weights,
    }


@cache.command()
@cache_dir_option
@json_option
def verify(cache_dir: Path | None, as_json: bool) -> int:
    """Read every manifest and blob and compare them with their digests. Exit 4 if anything is damaged.

    Example: nanogpt-buckets cache verify
    """
    store = LocalStore(settings.cache_dir(cache_dir))
    result = verify_store(store)
    if as_json:
        problems = [{"path": problem.path, "what": problem.what} for problem in result.problems]
        counts = {"entries": result.entries, "blobs": result.blobs, "bytes": result.bytes}
        output.document({**counts, "problems": problems})
    else:
        for problem in result.problems:
            output.data(f"{problem.path}: {problem.what}")
        found = f"{len(result.problems)} damaged" if result.problems else "all intact"
        output.say(f"{result.entries} entries, {result.blobs} blobs, {output.size(result.bytes)}: {found}")
    return CorruptEntry.exit_code if result.problems else 0
