"""`nanogpt-buckets cache push` and `pull`. Imports no torch."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from nanogpt_buckets import settings
from nanogpt_buckets.cli import output
from nanogpt_buckets.cli.options import added, cache_dir_option, output_options, trust_options
from nanogpt_buckets.errors import CacheError
from nanogpt_buckets.store.manifest import Manifest
from nanogpt_buckets.store.opening import trust_of
from nanogpt_buckets.store.store import Store
from nanogpt_buckets.store.transfer import (
    OTHER,
    Moved,
    is_archive,
    move,
    move_to_archive,
    place_of,
    planned,
    refuse_weights,
    require_all,
)
from nanogpt_buckets.store.vouch import Trust

_options = added(
    click.option(
        "--locked", type=click.Path(path_type=Path), metavar="FILE",
        help="What this lock file names, and nothing else. Default: to push, what plans name; to pull, all there is.",
    ),
    trust_options,
    cache_dir_option,
    output_options,
)  # fmt: skip


@click.command()
@click.argument("target")
@click.option("--with-weights", is_flag=True, help="Also entries that have a model's weights compiled in.")
@_options
def push(
    target: str, with_weights: bool, locked: Path | None, trusted: tuple[str, ...], policy: str | None,
    cache_dir: Path | None, as_json: bool,
) -> int:  # fmt: skip
    """Copy entries to TARGET: a directory, s3://BUCKET/PREFIX, gs://..., az://..., or a file that ends in .tar.

    What is there stays as it is; a tar file is written anew. Signatures go along. Who pulls needs the lock file or
    trusts the key, unless nobody else can write there.

    Example: nanogpt-buckets cache push buckets.tar --locked buckets.lock
    """
    source = Store(settings.cache_dir(cache_dir), trust_of(locked=locked, trusted=trusted, policy=policy))
    manifests = require_all(planned(source), source)
    if not manifests:
        hint = "nanogpt-buckets build makes and plans some"
        raise CacheError(f"no entry of {source.root} is planned, so there is nothing to push", hint=hint)
    if not with_weights:
        refuse_weights(manifests)
    with output.progress("pushing", len(manifests)) as advance:
        if is_archive(target):
            moved = move_to_archive(source, manifests, settings.expanded(target, "TARGET"), lambda manifest: advance(1))
        else:
            # what is there is compared and not loaded, whoever wrote it
            there = place_of(target, Trust(looks=True))
            moved = list(move(source, manifests, there, lambda manifest: advance(1)))
    hint = f"adopt what is there: nanogpt-buckets cache pull {shlex.quote(target)}, then build --lock"
    return _show(moved, target, as_json, hint)


@click.command()
@click.argument("source")
@_options
def pull(
    source: str, locked: Path | None, trusted: tuple[str, ...], policy: str | None, cache_dir: Path | None,
    as_json: bool,
) -> int:  # fmt: skip
    """Copy entries from SOURCE, as push takes it, into the cache directory, each once it is read whole and in order.

    Without --locked everything that is there, from a place that nobody else can write, or signed by a trusted key.

    Example: nanogpt-buckets cache pull buckets.tar --locked buckets.lock
    """
    trust = trust_of(locked=locked, trusted=trusted, policy=policy)
    store, there = Store(settings.cache_dir(cache_dir), trust), place_of(source, trust)
    manifests = require_all(there.entries(), there)
    if not manifests:
        raise CacheError(f"there are no entries in {there.tier}", hint="nanogpt-buckets cache push fills it")
    store.directory.prepare()
    with output.progress("pulling", len(manifests)) as advance:
        moved = list(move(there, manifests, store, lambda manifest: advance(1)))
    return _show(moved, str(store.root), as_json, "delete it first: nanogpt-buckets cache rm KEY")


def _show(moved: list[Moved], target: str, as_json: bool, hint: str) -> int:
    """Say what became of each entry; an error says that other builds are in the way."""
    if as_json:
        rows = [
            {"key": m.manifest.key, "bucket": _bucket(m.manifest), "state": m.state, "bytes": m.manifest.size}
            for m in moved
        ]
        output.document({"target": target, "entries": rows})
    else:
        names = ("KEY", "BUCKET", "STATE", "SIZE")
        cells = [(m.manifest.key[:12], _bucket(m.manifest), m.state, output.size(m.manifest.size)) for m in moved]
        output.table(names, cells)
    others = sum(m.state == OTHER for m in moved)
    copied = sum(m.manifest.size for m in moved)
    output.say(f"{output.count(len(moved) - others, 'entry', 'entries')}, {output.size(copied)}, in {target}")
    if others:
        raise CacheError(
            f"of {output.count(others, 'entry', 'entries')} another build is in {target}, and stays", hint=hint
        )
    return 0


def _bucket(manifest: Manifest) -> str:
    return str(manifest.bucket or "unknown")
