"""Keys and signatures at the command line: what is signed where it is built is loaded where its key is trusted."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from nanogpt_buckets import builder, settings
from nanogpt_buckets.store.signers import LIST

PLAN = ["--model=demo", "--strategy=recompute", "--seq=16"]
GENERATE = ["generate", "ROMEO:", "--model=demo", "-n", "4", "--seed=1", "--cached-only"]


@pytest.fixture
def key(signing_key) -> Path:
    """Return the file of a private key."""
    return signing_key


@pytest.fixture
def team(cache, key, run) -> Path:
    """Return a signed cache that everybody can write."""
    assert run("build", *PLAN, "--sign-key", key)[0] == 0
    for path in (cache, *cache.rglob("*")):
        path.chmod(0o777 if path.is_dir() else 0o666)
    return cache


def test_a_key_is_added_and_its_signatures_count(team, key, run):
    code, _, err = run(*GENERATE)
    assert code == 6
    assert "--trusted KEY" in err

    assert run("trust", "add", key.with_suffix(".pub"), "--name", "CI")[0] == 0
    code, out, err = run(*GENERATE)
    assert (code, out.startswith("ROMEO:")) == (0, True), err
    code, out, _ = run("status", *PLAN, "--policy=require", "--json")
    assert (code, json.loads(out)["warm"]) == (0, 1)

    code, out, _ = run("trust", "ls")
    assert code == 0
    assert out.split("\n")[1].split()[1] == "CI"
    assert out.split("\n")[1].split()[-1] == "trusted"


@pytest.mark.parametrize("how", ["flag", "environment"])
def test_a_key_may_be_named_for_one_run(team, key, run, monkeypatch, how):
    more = ["--trusted", key.with_suffix(".pub")] if how == "flag" else []
    if how == "environment":
        monkeypatch.setenv("NANOGPT_BUCKETS_TRUSTED", str(key.with_suffix(".pub")))

    code, out, err = run(*GENERATE, *more)

    assert (code, out.startswith("ROMEO:")) == (0, True), err
    assert not settings.trust_file().exists()


def test_what_is_unsigned_is_refused_if_that_is_asked_and_signed_by_the_next_build(cache, key, run):
    public = key.with_suffix(".pub")
    code, _, err = run("status", *PLAN, "--trusted", public, "--policy=require")
    assert code == 1
    assert "hint: sign it: nanogpt-buckets build --sign-key FILE" in err

    code, _, err = run("build", *PLAN, "--sign-key", key)
    assert code == 0
    assert "1 hit, 0 compiled" in err
    assert run("status", *PLAN, "--trusted", public, "--policy=require")[0] == 0


def test_show_says_who_signed(team, key, run):
    name = json.loads(run("status", *PLAN, "--json", "--trusted", key.with_suffix(".pub"))[1])["buckets"][0]["key"]

    assert json.loads(run("cache", "show", name, "--json")[1])["signed"].endswith("which is not trusted")
    run("trust", "add", key.with_suffix(".pub"))
    shown = json.loads(run("cache", "show", name, "--json")[1])
    assert shown["signed"] == f"by {json.loads(run('trust', 'ls', '--json')[1])['keys'][0]['id']}"
    assert len(shown["manifest"]) == 64


def test_a_sign_command_signs(cache, key, run, tmp_path):
    script = tmp_path / "kms.py"
    script.write_text(
        "import base64, sys\n"
        "from cryptography.hazmat.primitives.serialization import load_pem_private_key\n"
        "private = load_pem_private_key(open(sys.argv[1], 'rb').read(), None)\n"
        "print(base64.b64encode(private.sign(sys.stdin.buffer.read())).decode())\n"
    )
    public = ["--trusted", key.with_suffix(".pub")]

    assert run("build", *PLAN, "--sign-command", f"{sys.executable} {script} {key}", *public)[0] == 0
    assert run("status", *PLAN, *public, "--policy=require")[0] == 0

    code, _, err = run("build", *PLAN, "--sign-command", f"{sys.executable} {script} no-such-file", *public)
    assert code == 1
    assert "ended with status 1: FileNotFoundError" in err
    assert "Traceback" not in err


def test_what_is_revoked_is_not_loaded_and_is_built_again(team, key, run, monkeypatch):
    public = ["--trusted", key.with_suffix(".pub")]
    first = json.loads(run("status", *PLAN, *public, "--json")[1])["buckets"][0]["key"]

    code, _, err = run("trust", "revoke", first[:12], "--why", "a broken host", "--sign-key", key)
    assert code == 0, err
    assert (team / "v1" / LIST).exists()
    settings.trust_file().unlink()  # as everybody else is, who has only the list

    code, out, _ = run("status", *PLAN, *public)
    assert code == 1
    assert "rejected: a broken host" in out
    monkeypatch.setattr(builder, "compile_bucket", lambda *a: pytest.fail("compiled"))
    code, _, err = run(*GENERATE, *public)
    assert code in (3, 4)
    assert "a broken host" in err
    assert first[:8] not in run("trust", "ls", *public)[1].split("\n")[1], "the list names a manifest, not a key"


def test_a_revoked_key_vouches_for_nothing(team, key, run):
    run("trust", "add", key.with_suffix(".pub"), "--name", "CI")
    name = json.loads(run("trust", "ls", "--json")[1])["keys"][0]["id"]

    assert run("trust", "revoke", name, "--why", "stolen")[0] == 0

    assert json.loads(run("trust", "ls", "--json")[1])["keys"][0]["revoked"] == "stolen"
    assert run(*GENERATE)[0] == 6


MISTAKES = {
    "a private key": (["trust", "add", "KEY"], 2, "this is a private key"),
    "no key": (["trust", "add", "no-such-file"], 2, "no key can be read from no-such-file"),
    "a name of two lines": (["trust", "add", "KEY.pub", "--name", "a\nb"], 2, "--name takes a line"),
    "an unknown entry": (["trust", "revoke", "0123456789ab"], 1, "begins with 0123456789ab"),
    "a list without a key": (["trust", "revoke", "0" * 64, "--in", "DIR"], 2, "--in names a list to sign"),
    "two ways to sign": (["build", *PLAN, "--sign-key=KEY", "--sign-command=true"], 2, "say the same thing twice"),
    "a public key to sign with": (["build", *PLAN, "--sign-key=KEY.pub"], 6, "is open to others"),
    "a policy without keys": (["status", *PLAN, "--policy=require"], 2, "no key is trusted"),
    "an unknown policy": (["status", *PLAN, "--policy=never"], 2, "'never' is not one of"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence(cache, key, run, mistake):
    arguments, status, said = MISTAKES[mistake]
    public = str(key.with_suffix(".pub"))

    code, _, err = run(*(word.replace("KEY.pub", public).replace("KEY", str(key)) for word in arguments))

    assert code == status
    assert said in err
    assert "Traceback" not in err


def test_signatures_go_along_to_wherever_entries_go(cache, key, run, tmp_path):
    run("build", *PLAN, "--sign-key", key)
    public = ["--trusted", key.with_suffix(".pub"), "--policy=require"]
    tar = tmp_path / "buckets.tar"

    assert run("cache", "push", tar, "--locked", _locked(run, tmp_path))[0] == 0
    home = tmp_path / "home"
    code, _, err = run("cache", "pull", tar, "--cache-dir", home, *public)
    assert code == 0, err
    assert run("status", *PLAN, "--cache-dir", home, *public)[0] == 0
    shutil.rmtree(home)
    tar.chmod(0o666)
    assert run("cache", "pull", tar, "--cache-dir", home)[0] == 6
    assert run("cache", "pull", tar, "--cache-dir", home, *public)[0] == 0


def _locked(run, tmp_path) -> Path:
    path = tmp_path / "buckets.lock"
    assert run("build", *PLAN, "--lock", path)[0] == 0
    return path
