"""The world against the command line: damage, odd file systems, other users, no compiler, no network, Ctrl-C."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nanogpt_buckets.key import canonical_json

CACHED = ("generate", "ROMEO:", "--model=demo", "--max-new-tokens=4", "--seed=1", "--cached-only")
BUILD = ("build", "--model=demo", "--strategy=recompute")


@pytest.fixture
def cache(demo_cache, tmp_path) -> Path:
    """A copy of the demo's cache, to be spoiled."""
    return shutil.copytree(demo_cache, tmp_path / "copy")


def said(run: subprocess.CompletedProcess[bytes], code: int, sentence: str, hint: str) -> None:
    """Assert that a run ended with this code, and with one sentence and one hint."""
    lines = run.stderr.decode().splitlines()

    assert run.returncode == code, lines
    assert run.stdout == b""
    assert sum(line.startswith("error: ") for line in lines) == 1, lines
    assert lines[-2].startswith("error: "), lines
    assert sentence in lines[-2]
    assert lines[-1].startswith("hint: "), lines
    assert hint in lines[-1]


def files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


# --- damage -----------------------------------------------------------------------------------------------------------


def entry(cache: Path, seq_len: int) -> tuple[Path, Path]:
    """Return a bucket's manifest and blob."""
    for manifest in cache.glob("v1/entries/*/*.json"):
        body = json.loads(manifest.read_bytes())["body"]
        if body["parts"]["bucket"]["seq_len"] == seq_len:
            name = body["blobs"][0]["sha256"]
            return manifest, cache / "v1" / "blobs" / name[:2] / name
    raise AssertionError


def spoil(manifest: Path, blob: Path, damage: str) -> None:
    blob.chmod(0o600)
    if damage == "flipped byte":
        content = bytearray(blob.read_bytes())
        content[len(content) // 2] ^= 1
        blob.write_bytes(content)
    elif damage == "truncated":
        os.truncate(blob, 1000)
    elif damage == "missing":
        blob.unlink()
    else:
        manifest.write_bytes(manifest.read_bytes()[:-20])


@pytest.mark.parametrize("damage", ["flipped byte", "truncated", "missing", "half a manifest"])
def test_status_and_verify_tell_of_damage_and_cached_only_refuses_it(damage, here, cache):
    for manifest, blob in [entry(cache, 16), entry(cache, 32)]:
        spoil(manifest, blob, damage)
    before = files(cache)

    status = here("status", "--model=demo", "--strategy=recompute", "--seq=16,32", "--json", cache=cache)
    verify = here("cache", "verify", cache=cache)
    generate = here(*CACHED, cache=cache)

    assert status.returncode == 1
    assert [row["state"] for row in json.loads(status.stdout)["buckets"]] == ["corrupt"] * 2
    assert verify.returncode == 4
    said(generate, 4, "", "nanogpt-buckets build")
    assert files(cache) == before, "looking changes nothing"


def test_build_replaces_what_is_damaged_and_nothing_else(here, cache, demo_cache):
    sound = here(*CACHED, cache=cache).stdout
    spoil(*entry(cache, 16), "flipped byte")
    kept = [path.read_bytes() for path in entry(cache, 32)]

    promoted = here(*CACHED, cache=cache)
    build = here(*BUILD, "--seq=16,32", "--json", cache=cache, compiled=demo_cache)

    assert promoted.stdout == sound, "the next larger bucket runs in its place"
    assert b"bucket 1x16 is damaged; a larger one runs in its place" in promoted.stderr
    assert [row["state"] for row in json.loads(build.stdout)["buckets"]] == ["compiled", "hit"]
    assert [path.read_bytes() for path in entry(cache, 32)] == kept
    assert here("cache", "verify", cache=cache).returncode == 0
    assert here(*CACHED, cache=cache).stdout == sound


def test_a_newer_format_is_left_alone_inside_and_beside_this_one(here, cache):
    future = cache / "v2" / "entries" / "f" / "e.cbor"
    future.parent.mkdir(parents=True)
    future.write_bytes(b"\xa1")
    for manifest, _ in [entry(cache, 16), entry(cache, 32)]:
        body = {"format": 2, "anything": []}
        digest = hashlib.sha256(canonical_json(body)).hexdigest()
        manifest.write_bytes(canonical_json({"sha256": digest, "body": body}) + b"\n")
    before = files(cache)

    said(here(*CACHED, cache=cache), 7, "is a newer release's: it has format 2", "pip install --upgrade")
    assert here("cache", "verify", cache=cache).returncode == 0
    assert here("cache", "prune", "--older-than=0s", "-y", cache=cache).returncode == 0
    assert here("status", "--model=demo", "--strategy=recompute", "--seq=16", cache=cache).returncode == 1
    assert files(cache) == before


# --- file systems -----------------------------------------------------------------------------------------------------


@pytest.fixture
def mount(tmp_path):
    """A function that mounts a small memory file system, or changes its options, and returns where it is."""
    where = tmp_path / "mounted"

    def mount(options: str) -> Path:
        again = "remount," if where.is_mount() else ""
        where.mkdir(exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", f"{again}{options},mode=755", "tmpfs", str(where)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            pytest.fail(f"this test mounts a file system, which needs root, as CI has: {done.stderr.strip()}")
        return where

    yield mount
    if where.is_mount():
        subprocess.run(["umount", "--lazy", str(where)], check=True)


def test_a_cache_that_is_full_then_has_room_then_is_read_only_and_may_not_execute(here, mount, demo_cache):
    cache = mount("size=300k,noexec")
    full = here(*BUILD, "--seq=16", "--json", cache=cache, compiled=demo_cache)
    assert json.loads(full.stdout)["buckets"][0]["state"] == "failed"
    assert full.returncode == 5
    assert b"No space left on device" in full.stderr
    assert b"hint: " in full.stderr
    assert b"Traceback" not in full.stderr
    assert list(cache.glob("v1/entries/*/*")) == list(cache.glob("v1/blobs/*/*")) == []

    mount("size=50m,noexec")
    assert here(*BUILD, "--seq=16", cache=cache, compiled=demo_cache).returncode == 0

    mount("size=50m,noexec,ro")
    before = files(cache)
    run = here(*CACHED, cache=cache)
    assert (run.returncode, run.stdout[:6]) == (0, b"ROMEO:"), run.stderr
    assert here("status", "--model=demo", "--strategy=recompute", "--seq=16", cache=cache).returncode == 0
    assert here(*BUILD, "--seq=16", cache=cache).returncode == 0, "a hit writes nothing"
    said(here(*BUILD, "--seq=16,24", cache=cache), 1, "cannot be written", "--cache-dir")
    deleting = here("cache", "rm", "-y", entry(cache, 16)[0].stem[:12], cache=cache)
    assert deleting.returncode == 1
    assert b"Read-only file system" in deleting.stderr
    assert files(cache) == before


def test_a_local_directory_that_is_full_or_read_only(here, mount, demo_cache):
    local = mount("size=64k")
    said(here(*CACHED, cache=demo_cache, NANOGPT_BUCKETS_LOCAL_DIR=str(local)), 1, "No space left", "LOCAL_DIR")
    assert [path for path in local.rglob("*") if path.is_file() and path.stat().st_size] == []

    mount("size=64k,ro")
    said(here(*CACHED, cache=demo_cache, NANOGPT_BUCKETS_LOCAL_DIR=str(local)), 1, "Read-only", "LOCAL_DIR")


def test_a_container_with_a_read_only_home_and_a_temporary_directory_that_may_not_execute(here, mount, demo_cache):
    small = mount("size=8m,noexec,nosuid,nodev")
    places = {"HOME": "/proc/nowhere", "TMPDIR": str(small), "NANOGPT_BUCKETS_LOCAL_DIR": str(small / "local")}

    run = here(*CACHED, cache=demo_cache, **places)
    assert (run.returncode, run.stdout[:6]) == (0, b"ROMEO:"), run.stderr

    # and without that one writable directory
    said(
        here(*CACHED, cache=demo_cache, **places | {"NANOGPT_BUCKETS_LOCAL_DIR": "/proc/nowhere"}),
        1,
        "/proc",
        "LOCAL_DIR",
    )


def test_a_cache_that_is_not_there(here, tmp_path):
    nowhere = tmp_path / "no" / "where"

    said(here(*CACHED, cache=nowhere), 3, "no bucket is built", "nanogpt-buckets build --model demo")
    assert here("status", "--model=demo", "--strategy=recompute", "--seq=16", cache=nowhere).returncode == 1
    assert json.loads(here("cache", "ls", "--json", cache=nowhere).stdout) == []
    assert not nowhere.exists(), "asking makes no directory"


# --- other users ------------------------------------------------------------------------------------------------------

NOBODY = 65534
AS_NOBODY = """
import json, os, sys
from nanogpt_buckets.cli import main
commands, home = json.loads(sys.argv[1])

def run(command):
    try:
        main(command)
    except SystemExit as end:
        print(f"exit {end.code}", flush=True)

# first as root and into nothing, for the other user may not be able to read this interpreter's own modules
sys.stdout = sys.stderr = open(os.devnull, "w")
for command in (commands[0], ["status", "--model=demo"], ["build", "--model=demo", "--strategy=recompute", "--seq=16"]):
    run(command)
sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
os.environ["NANOGPT_BUCKETS_LOCAL_DIR"] = home + "/local"
os.setgid(65534)
os.setuid(65534)
for command in commands:
    run(command)
"""


def as_nobody(tmp_path: Path, cache: Path, *commands: tuple[str, ...]) -> tuple[str, str]:
    """Run commands in one process as another user; return its stdout, with a line `exit N` after each, and stderr."""
    assert os.geteuid() == 0, "these tests become another user, and so need root, as CI has"
    for parent in tmp_path.parents:
        if parent != Path("/tmp") and parent.is_relative_to("/tmp"):
            parent.chmod(0o755)
    tmp_path.chmod(0o755)
    home = tmp_path / "nobody"
    home.mkdir()
    os.chown(home, NOBODY, NOBODY)
    arguments = json.dumps([commands, str(home)])
    variables = {"NANOGPT_BUCKETS_CACHE_DIR": str(cache), "HOME": str(home)}
    command = [sys.executable, "-c", AS_NOBODY, arguments]
    run = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
    assert "Traceback" not in run.stderr
    return run.stdout, run.stderr


def open_to_all(cache: Path) -> None:
    for path in (cache, *cache.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o444)


def test_another_user_reads_what_root_built_and_writes_nothing_there(cli, cache, tmp_path):
    open_to_all(cache)
    before = files(cache)

    out, err = as_nobody(tmp_path, cache, CACHED, ("status", "--model=demo"), (*BUILD, "--seq=16,24"))

    text, rest = out.split("exit 0\n", 1)
    assert text == cli(*CACHED, cache=cache).stdout.decode()
    assert rest.splitlines()[-2:] == ["exit 0", "exit 1"], err
    assert err.splitlines()[-2].startswith("error: ")
    assert "cannot be written" in err.splitlines()[-2]
    assert files(cache) == before
    assert (tmp_path / "nobody" / "local" / "weights").stat().st_uid == NOBODY


def test_a_directory_only_its_owner_may_enter_is_one_sentence(cache, tmp_path):
    cache.chmod(0o700)

    out, err = as_nobody(tmp_path, cache, CACHED)

    assert out == "exit 1\n"
    assert "Permission denied" in err.splitlines()[-2]
    assert err.splitlines()[-1].startswith("hint: ")


@pytest.mark.parametrize("spoiled", ["owned by another user", "writable by others"])
def test_code_that_others_could_have_written_is_not_run(spoiled, here, cache):
    if spoiled == "writable by others":
        cache.chmod(0o777)
    else:
        for path in (cache, *cache.rglob("*")):
            os.chown(path, 1234, 1234)
    before = files(cache)

    for command in (CACHED, (*BUILD, "--seq=16")):
        said(here(*command, cache=cache), 6, str(cache), "")
    status = here("status", "--model=demo", "--strategy=recompute", "--seq=16", "--json", cache=cache)
    assert (status.returncode, json.loads(status.stdout)["buckets"][0]["state"]) == (1, "untrusted")
    assert files(cache) == before


# --- nothing at hand --------------------------------------------------------------------------------------------------

WITHOUT = """
import sys
sys.modules["transformers"] = None  # importing it fails
from nanogpt_buckets.cli import main
main(sys.argv[1:])
"""


def test_without_a_compiler_and_without_transformers_hits_still_work(demo_cache, tmp_path):
    def run(*arguments: str):
        variables = {"PATH": str(tmp_path), "NANOGPT_BUCKETS_CACHE_DIR": str(demo_cache)}
        command = [sys.executable, "-c", WITHOUT, *arguments]
        return subprocess.run(command, env=os.environ | variables, capture_output=True)

    assert run(*CACHED).stdout.startswith(b"ROMEO:")
    assert run("status", "--model=demo", "--strategy=recompute", "--seq=16,32").returncode == 0
    assert run(*BUILD, "--seq=16,32").returncode == 0
    said(run(*BUILD, "--seq=24"), 1, "C++ compiler", "g++")


def test_gpt2_weights_without_a_network_name_the_way_out(cli, tmp_path):
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    run = cli("generate", "a", "--backend=eager", "--max-new-tokens=1", **offline)

    said(run, 1, "weights of gpt2", "without a network, use --model demo")


def test_what_cannot_run_for_want_of_weights_is_not_compiled_first(cli, tmp_path):
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    run = cli("generate", "a", "--max-new-tokens=1", cache=tmp_path / "cache", **offline)

    said(run, 1, "weights of gpt2", "--model demo")
    assert b"compiling" not in run.stderr


# --- ends -------------------------------------------------------------------------------------------------------------


def started(cache: Path, *arguments: str) -> subprocess.Popen[bytes]:
    variables = {"NANOGPT_BUCKETS_CACHE_DIR": str(cache)}
    command = [sys.executable, "-m", "nanogpt_buckets", *arguments]
    return subprocess.Popen(command, env=os.environ | variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.parametrize("after_s", [0.5, 1.0, 1.5, 2.0, 3.0])
def test_ctrl_c_ends_generate_at_any_time_and_keeps_the_text_so_far(after_s, demo_cache):
    run = started(demo_cache, "generate", "ROMEO:", "--model=demo", "--max-new-tokens=1000000000", "--backend=eager")
    try:
        time.sleep(after_s)
        run.send_signal(signal.SIGINT)
        out, err = run.communicate(timeout=30)
    finally:
        run.kill()

    assert run.returncode == 130, err
    assert out == b"" or (out.startswith(b"ROMEO:") and out.endswith(b"\n"))
    assert err.decode().splitlines()[-1] == "interrupted"
    assert b"Traceback" not in err


def test_a_reader_that_has_gone_is_no_error_to_talk_about(demo_cache):
    run = started(demo_cache, *CACHED)
    run.stdout.close()
    err = run.stderr.read()
    run.stderr.close()

    assert run.wait() == 1
    assert b"rror" not in err


def test_output_that_cannot_be_written_is_one_sentence(demo_cache):
    variables = {"NANOGPT_BUCKETS_CACHE_DIR": str(demo_cache)}
    with open("/dev/full", "wb") as full:
        command = [sys.executable, "-m", "nanogpt_buckets", *CACHED]
        run = subprocess.run(command, env=os.environ | variables, stdout=full, stderr=subprocess.PIPE)

    assert run.returncode == 1
    assert b"error: standard output cannot be written: No space left on device" in run.stderr
    assert b"hint: " in run.stderr
    assert b"Traceback" not in run.stderr
