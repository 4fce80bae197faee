"""Signatures: who signed vouches where the place does not; whatever else is beside an entry does not."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from store_kit import look, make, manifest_path, word

from nanogpt_buckets import key as keys
from nanogpt_buckets import settings
from nanogpt_buckets.errors import (
    BucketsError,
    CacheError,
    CorruptEntry,
    IncompatibleEntry,
    UntrustedStore,
    UsageError,
)
from nanogpt_buckets.node.records import REVOKED
from nanogpt_buckets.store import directory
from nanogpt_buckets.store.entries import signature_name
from nanogpt_buckets.store.entry import Status, Verified
from nanogpt_buckets.store.lockfile import write_lock
from nanogpt_buckets.store.opening import open_store, trust_of
from nanogpt_buckets.store.prune import delete, plan_prune, plan_removal
from nanogpt_buckets.store.signature import command, key_file, public_key, require_signed, signed, try_out
from nanogpt_buckets.store.signers import LIST, Signers, TrustFile, read_list, revoke_in, signers, trust_file
from nanogpt_buckets.store.store import Store

PRIVATE = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
PUBLIC = (serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def new_key(path: Path, key=None) -> tuple[Path, str]:
    """Write a private key, and return its file and its public half as text."""
    key = key or ed25519.Ed25519PrivateKey.generate()
    path.write_bytes(key.private_bytes(*PRIVATE))
    path.chmod(0o600)
    raw = key.public_key().public_bytes_raw() if isinstance(key, ed25519.Ed25519PrivateKey) else b""
    return path, f"ed25519:{base64.b64encode(raw).decode()}"


@pytest.fixture
def ours(tmp_path) -> tuple[Path, str]:
    return new_key(tmp_path / "ours.pem")


@pytest.fixture
def theirs(tmp_path) -> tuple[Path, str]:
    return new_key(tmp_path / "theirs.pem")


@pytest.fixture
def build(tmp_path, ours):
    """Publish as a builder does that signs."""
    root = tmp_path / "cache"

    def publish(tag: str, key: Path = ours[0], **named):
        manifest, blobs = make(tag, **named)
        return open_store(cache_dir=root, sign_key=key).publish(manifest, blobs)

    return publish


@pytest.fixture
def open_to_all(tmp_path, build):
    """A signed entry in a directory that anybody can write, with all that is in it."""
    entry = build("one")
    make_open(tmp_path / "cache")
    return entry


def make_open(root: Path) -> None:
    for place in (root, *root.rglob("*")):
        place.chmod(0o777 if place.is_dir() else 0o666)


def signature_path(root: Path, entry) -> Path:
    return root / "v1" / signature_name(entry.family, entry.key, entry.digest)


# --- who vouches ------------------------------------------------------------------------------------------------------


def test_a_signature_vouches_where_others_write(tmp_path, open_to_all, ours, theirs):
    root = tmp_path / "cache"

    assert isinstance(look(open_store(cache_dir=root, trusted=[ours[1]]), open_to_all), Verified)
    refused = look(open_store(cache_dir=root, trusted=[theirs[1]]), open_to_all)
    assert refused.status is Status.UNTRUSTED
    assert "which is not trusted" in refused.why
    nobody = look(open_store(cache_dir=root), open_to_all)
    assert nobody.status is Status.UNTRUSTED
    assert "--trusted KEY" in nobody.hint
    assert "--locked FILE" in nobody.hint


@pytest.mark.parametrize("policy", ["off", "warn", "require"])
@pytest.mark.parametrize("place", ["own", "shared"])
@pytest.mark.parametrize("state", ["signed", "unsigned", "another's", "revoked key"])
def test_what_a_policy_asks(tmp_path, build, ours, theirs, policy, place, state, caplog):
    root = tmp_path / "cache"
    entry = build("one", theirs[0] if state == "another's" else ours[0])
    if state == "unsigned":
        signature_path(root, entry).unlink()
    if state == "revoked key":
        name = public_key(ours[1]).id
        TrustFile(settings.trust_file(), revoked={name: "stolen"}).write()
    if place == "shared":
        make_open(root)

    found = look(open_store(cache_dir=root, trusted=[ours[1]], policy=policy), entry)

    good = state == "signed" or (place == "own" and policy != "require" and state != "revoked key")
    refused = Status.UNTRUSTED
    if state == "revoked key" and place == "own" and policy != "require":
        refused = Status.CORRUPT  # what a stolen key signed is not believed for its place, but built again
        assert found.why == "rejected: the key that signed it was revoked: stolen"
    assert word(found) == ("verified" if good else refused)
    assert bool(caplog.records) == (policy == "warn" and place == "own" and state != "signed")


def test_a_place_of_ones_own_is_asked_nothing(store, entry, monkeypatch):
    monkeypatch.setattr(Store, "signature", lambda *any: pytest.fail("a signature was read"))

    assert isinstance(look(store, entry), Verified)


def test_a_policy_counts_for_what_a_lock_file_names_too(tmp_path, build, ours):
    root, path = tmp_path / "cache", tmp_path / "buckets.lock"
    entry = build("one")
    write_lock(path, [entry], lambda parts: False)
    signature_path(root, entry).unlink()

    found = look(open_store(cache_dir=root, locked=path, trusted=[ours[1]], policy="require"), entry)

    assert found.status is Status.UNTRUSTED
    assert "has no signature, and the policy is to require one" in found.why


def test_a_signature_opens_no_lock(tmp_path, build, ours):
    """An older entry, validly signed, is not the one that is locked."""
    root, path = tmp_path / "cache", tmp_path / "buckets.lock"
    old = build("one")
    kept = {file: file.read_bytes() for file in (manifest_path(Store(root), old), signature_path(root, old))}
    manifest_path(Store(root), old).unlink()
    new = build("two")
    write_lock(path, [new], lambda parts: False)
    for file, data in kept.items():
        file.unlink(missing_ok=True)
        file.write_bytes(data)

    found = look(open_store(cache_dir=root, locked=path, trusted=[ours[1]]), old)

    assert (found.status, found.why) == (Status.UNTRUSTED, f"{path} names another build of it")
    assert isinstance(look(open_store(cache_dir=root, trusted=[ours[1]]), old), Verified), "without, it is believed"


def _for_another_key(root, entry, build, theirs):
    other = build("other", name="b")
    signature_path(root, entry).write_bytes(signature_path(root, other).read_bytes())


def _for_another_manifest(root, entry, build, theirs):
    again = replace(entry, stats={"compile_ms": 1})
    path = signature_path(root, entry)
    path.rename(signature_path(root, again))
    manifest_path(Store(root), entry).unlink()
    Store(root).publish(again, make("one")[1])


def _edited(field, value):
    def edit(root, entry, build, theirs):
        path = signature_path(root, entry)
        document = json.loads(path.read_bytes())
        document["statement"][field] = value
        path.write_bytes(keys.canonical_json(document) + b"\n")

    return edit


def _by_another_under_our_name(root, entry, build, theirs):
    path = signature_path(root, entry)
    document = json.loads(path.read_bytes())
    signature = json.loads(signed(entry, key_file(theirs[0])))["signature"]
    path.write_bytes(keys.canonical_json({**document, "signature": signature}) + b"\n")


def _content(data):
    return lambda root, entry, build, theirs: signature_path(root, entry).write_bytes(data)


ATTACKS = {
    "for another key": _for_another_key,
    "for another manifest": _for_another_manifest,
    "another time": _edited("time", 1),
    "another builder": _edited("builder", "root"),
    "another kind": _edited("kind", "nanogpt-buckets revocations"),
    "a newer format": _edited("format", 2),
    "a further field": _edited("more", 1),
    "another's, under our name": _by_another_under_our_name,
    "empty": _content(b""),
    "no JSON": _content(b"\x00\xff" * 40),
    "long": _content(b'{"signature":"' + b"A" * 400_000 + b'"}'),
    "deep": _content(b"[" * 3000 + b"]" * 3000),
    "other types": _content(b'{"signature":1,"signer":[],"statement":"x"}\n'),
    "no signer": _content(b'{"signature":"","signer":"0000000000000000","statement":{}}\n'),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_whatever_else_is_there_vouches_for_nothing(tmp_path, build, ours, theirs, attack):
    root = tmp_path / "cache"
    entry = build("one")
    ATTACKS[attack](root, entry, build, theirs)
    make_open(root)

    found = look(open_store(cache_dir=root, trusted=[ours[1]]), entry)

    assert word(found) == Status.UNTRUSTED


@pytest.mark.parametrize("kind", ["link", "pipe", "directory"])
def test_what_is_no_file_is_not_followed(tmp_path, build, ours, kind):
    root = tmp_path / "cache"
    entry = build("one")
    path = signature_path(root, entry)
    real = tmp_path / "elsewhere.sig"
    path.rename(real)
    make_open(root)
    {"link": lambda: path.symlink_to(real), "pipe": lambda: os.mkfifo(path), "directory": path.mkdir}[kind]()

    found = look(open_store(cache_dir=root, trusted=[ours[1]]), entry)

    assert isinstance(found, type(look(open_store(cache_dir=root), entry)))
    assert found.status is not Status.ABSENT


# --- signing ----------------------------------------------------------------------------------------------------------


def test_a_statement_is_small_and_says_what_it_should(entry, ours):
    data = signed(entry, key_file(ours[0]))

    statement = json.loads(data)["statement"]
    assert {name: statement[name] for name in ("key", "manifest")} == {"key": entry.key, "manifest": entry.digest}
    assert set(statement) == {"kind", "format", "key", "manifest", "builder", "time"}
    assert len(keys.canonical_json(statement)) <= 1024
    assert len(data) <= 1024
    assert require_signed(data, entry, {public_key(ours[1]).id: public_key(ours[1])}) == public_key(ours[1]).id


def test_openssl_verifies_what_we_sign_and_we_what_it_signs(entry, tmp_path):
    """An oracle that we did not write: keys and signatures in both directions."""
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", tmp_path / "k"], check=True)
    (tmp_path / "k").chmod(0o600)
    subprocess.run(["openssl", "pkey", "-in", tmp_path / "k", "-pubout", "-out", tmp_path / "p"], check=True)
    public = public_key((tmp_path / "p").read_text())
    document = json.loads(signed(entry, key_file(tmp_path / "k")))
    (tmp_path / "s").write_bytes(keys.canonical_json(document["statement"]))
    (tmp_path / "g").write_bytes(base64.b64decode(document["signature"]))

    check = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", "p", "-rawin", "-in", "s", "-sigfile", "g"]
    assert subprocess.run(check, cwd=tmp_path, check=False).returncode == 0
    sign = f"sh -c 'cat >{tmp_path}/in && openssl pkeyutl -sign -inkey {tmp_path}/k -rawin -in {tmp_path}/in'"
    assert try_out(command(sign, {public.id: public})) == public


def test_entries_that_are_there_are_signed_once(tmp_path, ours, theirs):
    root = tmp_path / "cache"
    manifest, blobs = make("one")
    Store(root).publish(manifest, blobs)

    open_store(cache_dir=root, sign_key=ours[0]).sign(manifest)
    first = signature_path(root, manifest).read_bytes()
    open_store(cache_dir=root, sign_key=theirs[0], trusted=[ours[1]]).sign(manifest)

    assert signature_path(root, manifest).read_bytes() == first, "a trusted key signed it before"
    open_store(cache_dir=root, sign_key=theirs[0]).sign(manifest)
    assert signature_path(root, manifest).read_bytes() != first


def test_what_is_signed_while_its_family_is_listed_is_signed(tmp_path, ours, monkeypatch):
    root = tmp_path / "cache"
    manifest, blobs = make("one")
    Store(root).publish(manifest, blobs)

    def read_all(*place, **how):
        open_store(cache_dir=root, sign_key=ours[0]).sign(manifest)
        return really(*place, **how)

    really = directory.read_all
    monkeypatch.setattr(directory, "read_all", read_all)
    assert open_store(cache_dir=root, trusted=[ours[1]], policy="require").family(manifest.family) == [manifest]


def test_a_store_that_is_open_sees_what_is_signed_meanwhile(tmp_path, ours):
    root = tmp_path / "cache"
    manifest, blobs = make("one")
    Store(root).publish(manifest, blobs)
    store = open_store(cache_dir=root, trusted=[ours[1]], policy="require")
    assert store.family(manifest.family)[0].status is Status.UNTRUSTED

    open_store(cache_dir=root, sign_key=ours[0]).sign(manifest)

    assert store.look(manifest.family, manifest.key) == manifest
    assert store.family(manifest.family) == [manifest]


def test_an_entry_is_two_files_and_its_signature(tmp_path, build):
    entry = build("one", roles=("code.so",))

    names = {str(path.relative_to(tmp_path / "cache/v1")) for path in (tmp_path / "cache/v1").rglob("*.*")}
    assert names == {f"entries/{entry.family}/{entry.key}.json", signature_name(entry.family, entry.key, entry.digest)}


def test_a_rebuilt_entry_has_a_signature_of_its_own(tmp_path, build, ours):
    root = tmp_path / "cache"
    old = build("one")
    Store(root).reject(old, "wrong")
    new = build("two")

    assert isinstance(look(open_store(cache_dir=root, trusted=[ours[1]], policy="require"), new), Verified)
    os.utime(signature_path(root, old), (1, 1))
    delete(Store(root), plan_prune(Store(root)))
    assert [path.name for path in root.rglob("*.sig")] == [signature_path(root, new).name]


def test_whoever_deletes_an_entry_deletes_its_signature(tmp_path, build):
    store = Store(tmp_path / "cache")
    entry = build("one")

    delete(store, plan_removal(store, [entry.key]))

    assert not list(store.root.rglob("*.sig"))


def test_a_signature_without_an_entry_is_pruned_once_no_builder_can_be_about_to_write_that(tmp_path, build):
    store = Store(tmp_path / "cache")
    entry = build("one")
    manifest_path(store, entry).unlink()
    path = signature_path(store.root, entry)

    assert path not in {file.path for file in plan_prune(store).files}
    os.utime(path, (1, 1))
    assert path in {file.path for file in plan_prune(store).files}
    build("one")
    assert path not in {file.path for file in plan_prune(store).files}


SCRIPTS = {
    "fails": ("raise SystemExit('no such key in the vault')", "ended with status 1: no such key in the vault"),
    "prints rubbish": ("print('hello')", "printed no Ed25519 signature"),
    "prints nothing": ("pass", "printed no Ed25519 signature"),
    "another's": (
        "import base64; print(base64.b64encode(b'x' * 64).decode())", "printed a signature that no trusted key",
    ),
}  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_sign_command_that_does_not_sign_is_said_before_anything_is_built(tmp_path, ours, script):
    text, said = SCRIPTS[script]
    (tmp_path / "sign.py").write_text(text)

    with pytest.raises(CacheError, match=said):
        trust_of(sign_command=f"{sys.executable} {tmp_path}/sign.py", trusted=[ours[1]])


@pytest.mark.parametrize(("line", "said"), [
    ("", "is empty"), ("no-such-program x", "cannot be run: No such file"), ("'", "cannot be split into words"),
])  # fmt: skip
def test_what_is_no_command(line, said):
    with pytest.raises(UsageError, match=said):
        trust_of(sign_command=line)


def _openssh(path: Path) -> None:
    key = ed25519.Ed25519PrivateKey.generate()
    secret = serialization.BestAvailableEncryption(b"secret")
    path.write_bytes(key.private_bytes(PRIVATE[0], PRIVATE[1], secret))


KEY_FILES = {
    "open to its group": (lambda path: path.chmod(0o640), UntrustedStore, "is open to others"),
    "open to all": (lambda path: path.chmod(0o604), UntrustedStore, "is open to others"),
    "gone": (lambda path: path.unlink(), UsageError, "cannot be read: No such file"),
    "a directory": (lambda path: (path.unlink(), path.mkdir(0o700)), UsageError, "holds no private key|cannot be read"),
    "empty": (lambda path: path.write_bytes(b""), UsageError, "holds no private key in PEM"),
    "cut off": (lambda path: path.write_bytes(path.read_bytes()[:60]), UsageError, "holds no private key in PEM"),
    "huge": (lambda path: path.write_bytes(b"-" * 100_000), UsageError, "holds no private key in PEM"),
    "of another kind": (
        lambda path: new_key(path, ec.generate_private_key(ec.SECP256R1())), UsageError, "another kind than Ed25519",
    ),
    "with a passphrase": (_openssh, UsageError, "has a passphrase"),
}  # fmt: skip


@pytest.mark.parametrize("how", KEY_FILES)
def test_a_key_file_that_cannot_be_used(ours, how):
    spoil, kind, said = KEY_FILES[how]
    spoil(ours[0])

    with pytest.raises(BucketsError, match=said) as caught:
        trust_of(sign_key=ours[0])
    assert type(caught.value) is kind
    assert "\n" not in caught.value.message
    assert caught.value.hint


def test_two_ways_to_sign_are_one_too_many(ours):
    with pytest.raises(UsageError, match="twice"):
        trust_of(sign_key=ours[0], sign_command="true")


# --- which keys are trusted -------------------------------------------------------------------------------------------


def test_keys_come_from_the_users_file_a_flag_and_the_environment(tmp_path, monkeypatch):
    texts = [new_key(tmp_path / str(n))[1] for n in range(4)]
    TrustFile(settings.trust_file(), {texts[0]: "CI"}).write()
    (tmp_path / "keys").write_text(f"# team\n{texts[1]}  # a\n\n{texts[2]}\n")
    ids = [public_key(text).id for text in texts]

    assert list(signers().keys) == ids[:1]
    assert list(signers([str(tmp_path / "keys")]).keys) == ids[:3]
    monkeypatch.setenv("NANOGPT_BUCKETS_TRUSTED", f"{texts[3]}, {tmp_path}/keys")
    assert set(signers().keys) == set(ids)
    assert list(signers([texts[1]]).keys) == ids[:2], "a flag stands in the place of the environment"
    assert trust_file().path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(("text", "said"), [
    ("ed25519:AAAA", "is no Ed25519 public key"), ("ed25519:", "is no Ed25519 public key"),
    ("ed25519:!!!!", "is no Ed25519 public key"), ("no-such-file", "no key can be read from no-such-file: No such"),
])  # fmt: skip
def test_what_is_no_key(text, said):
    with pytest.raises(UsageError, match=said) as caught:
        signers([text])
    assert caught.value.hint


def test_a_private_key_is_not_taken_for_a_public_one(ours):
    with pytest.raises(UsageError, match="this is a private key"):
        signers([str(ours[0])])


def test_a_file_of_keys_that_others_can_write_is_refused(tmp_path, ours):
    (tmp_path / "keys").write_text(ours[1])
    (tmp_path / "keys").chmod(0o666)
    with pytest.raises(UntrustedStore, match="can be written by everyone"):
        signers([str(tmp_path / "keys")])

    TrustFile(settings.trust_file(), {ours[1]: ""}).write()
    settings.trust_file().chmod(0o666)
    with pytest.raises(UntrustedStore, match="can be written by everyone"):
        signers()


@pytest.mark.parametrize(("content", "kind"), [
    (b"", CorruptEntry), (b"{}", CorruptEntry), (b'{"format":1,"keys":[],"revoked":{}}', CorruptEntry),
    (b'{"format":2,"keys":{},"revoked":{}}', IncompatibleEntry), (b"[" * 100_000, CorruptEntry),
])  # fmt: skip
def test_a_users_file_that_is_none(content, kind):
    TrustFile(settings.trust_file()).write()
    settings.trust_file().write_bytes(content)

    with pytest.raises(kind, match=r"trust\.json cannot be used"):
        signers()


def test_where_others_write_and_there_is_no_users_file_nothing_is_trusted_and_nothing_refused(tmp_path):
    folder = settings.trust_file().parent.parent
    folder.mkdir(parents=True)
    folder.chmod(0o777)

    assert signers().keys == {}
    settings.trust_file().parent.mkdir()
    settings.trust_file().write_text("{}")
    with pytest.raises(UntrustedStore):
        signers()


def test_a_policy_that_no_key_can_meet_is_refused(monkeypatch):
    with pytest.raises(UsageError, match="policy require asks for signatures, and no key is trusted"):
        signers(policy="require")
    monkeypatch.setenv("NANOGPT_BUCKETS_POLICY", "sometimes")
    with pytest.raises(UsageError, match="policy 'sometimes' is unknown"):
        signers()


def test_without_the_package_it_is_said_what_to_install(tmp_path, build, ours, monkeypatch):
    build("one")
    monkeypatch.setitem(sys.modules, "cryptography", None)
    for name in [name for name in sys.modules if name.startswith("cryptography.")]:
        monkeypatch.setitem(sys.modules, name, None)

    with pytest.raises(UsageError, match="not installed: cryptography") as caught:
        trust_of(sign_key=ours[0])
    assert caught.value.hint == "pip install 'nanogpt-buckets[signing]'"


# --- what is revoked --------------------------------------------------------------------------------------------------


def test_a_revoked_entry_is_not_loaded_anywhere_and_is_built_again(tmp_path, build, ours):
    root = tmp_path / "cache"
    entry = build("one")
    store = open_store(cache_dir=root, trusted=[ours[1]])
    assert isinstance(look(store, entry), Verified)

    revoke_in(store.tier, store.trust.signers, key_file(ours[0]), {entry.digest: "made on a broken host"})

    found = look(open_store(cache_dir=root, trusted=[ours[1]]), entry)
    assert (found.status, found.why) == (Status.CORRUPT, "rejected: made on a broken host")
    again = build("two")
    assert isinstance(look(open_store(cache_dir=root, trusted=[ours[1]]), again), Verified)


def test_a_revoked_key_vouches_for_nothing(tmp_path, open_to_all, ours, theirs):
    root = tmp_path / "cache"
    both = [ours[1], theirs[1]]
    store = open_store(cache_dir=root, trusted=both)
    revoke_in(store.tier, store.trust.signers, key_file(theirs[0]), {public_key(ours[1]).id: "stolen"})

    assert look(open_store(cache_dir=root, trusted=both), open_to_all).status is Status.UNTRUSTED


def test_a_node_remembers_what_was_revoked_though_the_list_is_gone(tmp_path, build, ours):
    root = tmp_path / "cache"
    entry = build("one")
    store = open_store(cache_dir=root, trusted=[ours[1]])
    revoke_in(store.tier, store.trust.signers, key_file(ours[0]), {entry.digest: "bad"})
    assert look(open_store(cache_dir=root, trusted=[ours[1]]), entry).status is Status.CORRUPT
    (root / "v1" / LIST).unlink()

    assert look(open_store(cache_dir=root, trusted=[ours[1]]), entry).status is Status.CORRUPT
    record = next(path for path, *_ in REVOKED.each())
    record.write_bytes(b"{}")
    assert look(open_store(cache_dir=root, trusted=[ours[1]]), entry).status is Status.CORRUPT, (
        "damaged is not forgotten"
    )


@pytest.mark.parametrize("how", ["another's key", "edited", "an entry's signature", "rubbish", "a link"])
def test_a_list_that_no_trusted_key_signed_revokes_nothing(tmp_path, build, ours, theirs, how, caplog):
    root = tmp_path / "cache"
    entry = build("one")
    store = open_store(cache_dir=root, trusted=[ours[1]])
    other = Signers({public_key(theirs[1]).id: public_key(theirs[1])})
    signer = (other, key_file(theirs[0])) if how == "another's key" else (store.trust.signers, key_file(ours[0]))
    revoke_in(store.tier, *signer, {"0" * 64: "bad"})
    path = root / "v1" / LIST
    if how == "edited":
        path.write_bytes(path.read_bytes().replace(b"0" * 64, entry.digest.encode()))
    elif how == "an entry's signature":
        path.write_bytes(signature_path(root, entry).read_bytes())
    elif how == "rubbish":
        path.write_bytes(b"\xff" * 100)
    elif how == "a link":
        path.rename(tmp_path / "list")
        path.symlink_to(tmp_path / "list")

    found = look(open_store(cache_dir=root, trusted=[ours[1]]), entry)

    assert isinstance(found, Verified) or (how == "a link" and found.status is Status.UNTRUSTED)
    assert caplog.records or how == "a link"


def test_revocations_add_up(store, ours, theirs):
    known = signers([ours[1], theirs[1]])
    revoke_in(store.tier, known, key_file(ours[0]), {"1" * 64: "a"})
    revoke_in(store.tier, known, key_file(theirs[0]), {"2" * 64: "b"})

    assert read_list(store.tier, known) == {"1" * 64: "a", "2" * 64: "b"}
