"""`nanogpt-buckets trust`: whose signatures count, and what is revoked. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import click

from nanogpt_buckets import settings
from nanogpt_buckets.cli import output
from nanogpt_buckets.cli.options import cache_dir_option, output_options, sign_options, trust_options
from nanogpt_buckets.errors import UsageError
from nanogpt_buckets.node.records import REVOKED
from nanogpt_buckets.store.entry import manifest_of
from nanogpt_buckets.store.manifest import is_digest
from nanogpt_buckets.store.opening import trust_of
from nanogpt_buckets.store.signers import Signers, read_keys, revoke_in, signers, trust_file
from nanogpt_buckets.store.store import Store
from nanogpt_buckets.store.transfer import place_of
from nanogpt_buckets.store.vouch import Trust


@click.group()
def trust() -> None:
    """Say whose signatures count, and revoke."""


@trust.command()
@trust_options
@output_options
def ls(trusted: tuple[str, ...], policy: str | None, as_json: bool) -> None:
    """List the keys whose signatures count, and what is revoked.

    Example: nanogpt-buckets trust ls
    """
    file, known = trust_file(), signers(trusted, policy)
    names = {key.id: name for text, name in file.keys.items() for key in read_keys(text)}
    remembered = {path.stem: str(record["why"]) for path, record, _ in REVOKED.each() if record}
    revoked = {**remembered, **file.revoked}
    keys = [
        {"id": key.id, "key": str(key), "name": names.get(key.id, ""), "revoked": revoked.pop(key.id, None)}
        for key in known.keys.values()
    ]
    if as_json:
        document = {"file": str(file.path), "policy": known.policy, "keys": keys, "revoked": revoked}
        output.document(document)
        return
    rows = [(row["id"], row["name"], row["key"], _state(row["revoked"])) for row in keys]
    rows += [(name[:12], "", "", _state(why)) for name, why in sorted(revoked.items())]
    output.table(("ID", "NAME", "KEY", "STATE"), rows)
    output.say(f"{output.count(len(keys), 'key', 'keys')}, {len(revoked)} more revoked, policy {known.policy}")


def _state(why: str | None) -> str:
    return "trusted" if why is None else f"revoked: {why}"


@trust.command()
@click.argument("key")
@click.option("--name", default="", metavar="TEXT", help="What to call it.")
@output_options
def add(key: str, name: str, as_json: bool) -> None:
    """Count signatures by KEY: a file with a public key in PEM, or keys one a line, or ed25519:BASE64.

    Keys are kept in a file of this user's, never in a cache.

    Example: nanogpt-buckets trust add ci.pub --name CI
    """
    if len(name) > 200 or not (name.isprintable() or name == ""):
        raise UsageError("--name takes a line of up to 200 characters")
    file, found = trust_file(), read_keys(key)
    if not found:
        raise UsageError(f"there is no key in {key}", hint="openssl pkey -in FILE -pubout writes a public key")
    replace(file, keys={**file.keys, **{str(public): name for public in found}}).write()
    if as_json:
        output.document({"file": str(file.path), "added": [public.id for public in found]})
    for public in found:
        output.say(f"{public.id} is trusted: {file.path}")


@trust.command()
@click.argument("what")
@click.option("--why", default="revoked", metavar="TEXT", help="For who meets it.")
@click.option(
    "--in", "place", metavar="PLACE",
    help="The cache whose list is signed: a directory, s3://BUCKET/PREFIX, gs://... or az://... Default: --cache-dir.",
)  # fmt: skip
@sign_options
@trust_options
@cache_dir_option
@output_options
def revoke(
    what: str, why: str, place: str | None, sign_key: Path | None, sign_command: str | None, trusted: tuple[str, ...],
    policy: str | None, cache_dir: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Let WHAT count for nothing: an entry, by the beginning of its key, or a trusted key, by its id.

    For this user and, with --sign-key or --sign-command, for all who trust that key and use the cache: a signed list is
    kept there, and every node remembers what it has seen of it. What is revoked is not loaded, whatever vouches for it
    and whatever was loaded before; a build replaces it.

    Example: nanogpt-buckets trust revoke 02e44f249430 --why "built on a broken host"
    """
    if not (0 < len(why) <= 200) or not why.isprintable():
        raise UsageError("--why takes a line of up to 200 characters")
    said = trust_of(trusted=trusted, policy=policy, sign_key=sign_key, sign_command=sign_command)
    root = settings.cache_dir(cache_dir)
    name = _named(what, said.signers, Store(root, Trust(looks=True)))
    file = trust_file()
    if said.signer is not None:
        there = place_of(place or str(root), Trust(looks=True))
        everything = revoke_in(there.tier, said.signers, said.signer, {name: why})
        output.say(f"{output.count(len(everything), 'revocation', 'revocations')} in {there.tier}")
    elif place is not None:
        raise UsageError("--in names a list to sign", hint="give --sign-key or --sign-command, or leave --in out")
    replace(file, revoked={**file.revoked, name: why}).write()
    if as_json:
        output.document({"file": str(file.path), "revoked": name, "why": why})
    output.say(f"{name[:16]} is revoked: {file.path}")


def _named(what: str, known: Signers, store: Store) -> str:
    """Return what is revoked: the id of a key, or the digest of a manifest."""
    if what in known.keys:
        return what
    if re.fullmatch(r"[0-9a-f]{1,64}", what) is None:
        found = read_keys(what)
        if len(found) != 1:
            raise UsageError(f"{what} is not one key", hint="nanogpt-buckets trust ls shows their ids")
        return found[0].id
    if is_digest(what) and not any(entry.key == what for entry in store.entries()):
        return what
    entry = store.find(what)
    manifest = manifest_of(entry)
    if manifest is None:
        raise UsageError(f"entry {entry.key[:12]} cannot be read, so it is not loaded anyway")
    return manifest.digest
