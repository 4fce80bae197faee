"""`nanogpt-buckets cache`: dir, ls, show, rm, prune; others are in transfer.py and verify.py. Imports no torch."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from nanogpt_buckets import child, settings
from nanogpt_buckets.backends import BACKENDS, backend_for
from nanogpt_buckets.cli import output
from nanogpt_buckets.cli.deletion import carry_out, deletion_options, open_store
from nanogpt_buckets.cli.options import SIZE, TIME_SPAN, cache_dir_option, output_options
from nanogpt_buckets.cli.transfer import pull, push
from nanogpt_buckets.cli.verify import verify
from nanogpt_buckets.errors import BucketsError
from nanogpt_buckets.key import leaves
from nanogpt_buckets.node import prune as node_prune
from nanogpt_buckets.plan.bucket import Bucket
from nanogpt_buckets.store.entry import Found, Miss, Verified, manifest_of
from nanogpt_buckets.store.lockfile import read_lock
from nanogpt_buckets.store.manifest import Manifest
from nanogpt_buckets.store.plans import Plans
from nanogpt_buckets.store.prune import plan_prune, plan_removal
from nanogpt_buckets.store.signature import require_signed
from nanogpt_buckets.store.signers import Policy, signers
from nanogpt_buckets.store.store import Store

# What an entry is called that is in order as far as was looked.
_STORED = "stored"
_SHAPE = {"n_layer": "L", "n_head": "H", "n_embd": "C", "vocab_size": "V"}


@click.group()
def cache() -> None:
    """Look at the cache, copy it, clear it."""


cache.add_command(push)
cache.add_command(pull)
cache.add_command(verify)


@cache.command("dir")
@cache_dir_option
def dir_(cache_dir: Path | None) -> None:
    """Print the cache directory and nothing else.

    Example: du -sh "$(nanogpt-buckets cache dir)"
    """
    output.data(str(settings.cache_dir(cache_dir)))


@cache.command()
@cache_dir_option
@output_options
def ls(cache_dir: Path | None, as_json: bool) -> None:
    """List every entry. "stored" says that manifest and sizes are in order; cache verify reads every byte.

    Example: nanogpt-buckets cache ls --json
    """
    store = open_store(cache_dir)
    pins = Plans(store).pins().buckets
    rows = [_row(store, entry, store.glance(entry), pins) for entry in store.entries()]
    if as_json:
        output.document(rows)
        return
    names = ["key", "state", "bucket", "backend", "torch", "target", "dtype", "model", "size", "unused"]
    names += ["note"] if any(row["note"] for row in rows) else []
    for row in rows:
        row |= {"key": row["key"][:12], "model": " ".join(row["plans"]) or row["model"]}
        row |= {"size": output.size(row["bytes"]), "unused": output.age(time.time() - row["last_used"])}
    output.table([name.upper() for name in names], [[row[name] for name in names] for row in rows])
    total = output.size(sum(row["bytes"] for row in rows))
    output.say(f"{output.count(len(rows), 'entry', 'entries')}, {total}, in {store.root}")


@cache.command()
@click.argument("key")
@cache_dir_option
@output_options
def show(key: str, cache_dir: Path | None, as_json: bool) -> None:
    """Show all that is known of one entry: what it was made of, needs, measured, and which plan keeps it.

    KEY may be the beginning of a key, as cache ls shows it.

    Example: nanogpt-buckets cache show 02e44f249430
    """
    store = open_store(cache_dir)
    described = _described(store, store.find(key))
    if as_json:
        output.document(described)
    else:
        plain = leaves(described).items()
        lines = [(name, " ".join(map(str, leaf)) if isinstance(leaf, list) else leaf) for name, leaf in plain]
        output.table(("FIELD", "VALUE"), lines)


def _described(store: Store, entry: Found) -> dict[str, Any]:
    manifest = manifest_of(entry)
    known = _row(store, entry, store.check(entry), Plans(store).pins().buckets)
    known |= {"family": entry.family, "path": str(store.entry_path(entry))}
    if manifest is None:
        return known
    blobs = [{"role": b.role, "bytes": b.size, "path": str(store.blob_path(b.sha256))} for b in manifest.blobs]
    backend = manifest.parts["family"].get("backend", "")
    lack = backend_for(backend).unmet(manifest.requires) if backend in BACKENDS else f"backend {backend} is unknown"
    return known | {
        "manifest": manifest.digest,
        "signed": _signed(store, manifest),
        "runs_here": lack is None,
        "lacks": lack or "",
        "requires": manifest.requires,
        "stats": manifest.stats,
        "gate": manifest.gate,
        "parts": manifest.parts,
        "blobs": blobs,
    }


def _signed(store: Store, manifest: Manifest) -> str:
    """Say which trusted key signed an entry, or why none that is there counts; "" if there is no signature."""
    try:
        data = store.signature(manifest)
        return "" if data is None else f"by {require_signed(data, manifest, signers(policy=Policy.OFF).valid)}"
    except BucketsError as error:
        return error.message


def _row(
    store: Store, entry: Found, looked: Found | Verified, pins: Mapping[tuple[str, Bucket], list[str]]
) -> dict[str, Any]:
    """Describe an entry: what looking at its blobs gave, and what its manifest says."""
    state, why = (looked.status.value, looked.why) if isinstance(looked, Miss) else (_STORED, "")
    row: dict[str, Any] = {"key": entry.key, "state": state, "why": why, "bytes": 0, "plans": []}
    blank = dict.fromkeys(("bucket", "backend", "target", "dtype", "model", "torch", "note", "unchecked"), "")
    row |= blank | {"contains_weights": False, "last_used": _last_used(store.entry_path(entry))}
    manifest = manifest_of(entry)
    if manifest is None:
        return row
    named = manifest.parts["family"]
    arch = named.get("architecture", {})
    notes = ["weights inside"] if manifest.contains_weights else []
    notes += ["not checked on a device yet"] if manifest.unchecked else []
    return row | {
        "plans": [] if manifest.bucket is None else pins.get((entry.family, manifest.bucket), []),
        "note": "; ".join(notes),
        "unchecked": manifest.unchecked or "",
        "bucket": str(manifest.bucket or "unknown"),
        "backend": named.get("backend", ""),
        "target": manifest.parts.get("target", ""),
        "dtype": named.get("dtype", ""),
        "model": " ".join(f"{arch.get(name, '?')}{unit}" for name, unit in _SHAPE.items()),
        "torch": named.get("runtime", {}).get("torch", ""),
        "bytes": manifest.size,
        "contains_weights": manifest.contains_weights,
    }


def _last_used(path: Path) -> int:
    """Return when an entry was built or last loaded, to the minute, in seconds since 1970."""
    try:
        return int(path.stat().st_mtime)
    except OSError:
        return 0


@cache.command()
@click.argument("keys", nargs=-1, required=True, metavar="KEY...")
@deletion_options
@cache_dir_option
@output_options
def rm(keys: tuple[str, ...], dry_run: bool, yes: bool, cache_dir: Path | None, as_json: bool) -> int:
    """Delete entries, and the compiled libraries that no other entry uses; plans that name their buckets lose them.

    KEY may be the beginning of a key, as cache ls shows it.

    Example: nanogpt-buckets cache rm 02e44f249430 --dry-run
    """
    store = open_store(cache_dir)
    return carry_out(store, plan_removal(store, keys), dry_run, yes, as_json)


@cache.command()
@click.option(
    "--older-than", type=TIME_SPAN, help="Entries neither built nor loaded for so long: 30d (s, min, h, d, w)."
)
@click.option(
    "--max-size", type=SIZE, help="The longest unused entries, until no more than this is left: 5GB (kB, MB)."
)
@click.option("--planned", is_flag=True, help="Age and size count for entries that a plan names, too.")
@click.option("--old-toolchains", is_flag=True, help="Entries made for library versions older than those installed.")
@click.option(
    "--locked", multiple=True, type=click.Path(path_type=Path), metavar="FILE",
    help="What this lock file names stays, unless it is damaged; may be repeated.",
)  # fmt: skip
@deletion_options
@cache_dir_option
@output_options
def prune(
    older_than: float | None, max_size: float | None, planned: bool, old_toolchains: bool, locked: tuple[Path, ...],
    dry_run: bool, yes: bool, cache_dir: Path | None, as_json: bool,
) -> int:  # fmt: skip
    """Delete what is damaged or of no use and, if asked, what is old.

    Damaged entries, libraries that no entry names, what killed processes left and, in this node's own directory,
    prepared weights that no model needs any more always go. What a saved plan names stays whatever its age and the
    cache's size, unless --planned is given, it is damaged or an old toolchain's. Plans are of this cache, lock files
    elsewhere: name with --locked those that are in use.

    Example: nanogpt-buckets cache prune --older-than 30d --old-toolchains --dry-run
    """
    store = open_store(cache_dir)
    locks = [read_lock(settings.expanded(path, "--locked")) for path in locked]
    size = None if max_size is None else int(max_size)
    with output.progress("reading", sum(1 for _ in store.entries())) as advance:
        deletion = plan_prune(
            store, older_than_s=older_than, max_bytes=size, old_toolchains=old_toolchains, planned=planned,
            locks=locks, on_entry=lambda: advance(1),
        )  # fmt: skip
    try:
        deletion = replace(deletion, files=deletion.files + node_prune.plan())
    except BucketsError as error:
        deletion = replace(deletion, notes=(*deletion.notes, f"this node's directory is left alone: {error.message}"))
    if not dry_run:
        child.sweep_folders()  # what killed builds left in the temporary directory
    return carry_out(store, deletion, dry_run, yes, as_json)
