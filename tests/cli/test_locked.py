"""`build --lock`, and `--locked` on all that loads: the entries it names, from wherever they are, and no others."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
from farm import found_in

from nanogpt_buckets import Engine, build, builder
from nanogpt_buckets.backends.base import Artifact
from nanogpt_buckets.errors import IncompatibleEntry, UntrustedStore, UsageError
from nanogpt_buckets.plan.bucket import Bucket, Plan
from nanogpt_buckets.store.lockfile import read_lock

PLAN = ["--model=demo", "--strategy=recompute"]


@pytest.fixture
def lock(cache, run, tmp_path):
    """Return a lock file of the demo's bucket 1x16."""
    path = tmp_path / "buckets.lock"
    assert run("build", *PLAN, "--seq=16", "--lock", path)[0] == 0
    return path


def generate(lock, *more: str) -> list[str]:
    return ["generate", "ROMEO:", "--model=demo", "-n", "4", "--seed=1", "--json", "--locked", str(lock), *more]


def test_what_a_build_locks_is_what_is_loaded(lock, run):
    code, out, err = run(*generate(lock))
    assert code == 0, err
    assert [b["seq_len"] for b in json.loads(out)["report"]["buckets"]] == [16]

    code, out, _ = run("status", "--model=demo", "--locked", lock, "--json")
    assert (code, [row["bucket"]["seq_len"] for row in json.loads(out)["buckets"]]) == (0, [16])
    code, out, err = run("status", *PLAN, "--seq=16,32", "--locked", lock)
    assert (code, out.count("warm"), out.count("missing")) == (1, 1, 1)
    assert f"{lock} does not name it" in out
    assert f"hint: nanogpt-buckets build --model demo --seq 32 --strategy recompute --lock {lock}" in err


def test_no_longer_bucket_runs_and_nothing_is_compiled(lock, run, monkeypatch):
    monkeypatch.setattr(builder, "compile_bucket", lambda *a: pytest.fail("compiled"))

    code, _, err = run("generate", "x" * 20, "--model=demo", "-n", "4", "--locked", lock)

    assert code == 3
    assert "no bucket that is built holds" in err
    assert f"--lock {lock}" in err
    assert "Traceback" not in err


def test_what_is_locked_is_loaded_from_a_place_that_others_write(lock, cache, run):
    for path in (cache, *cache.rglob("*")):
        path.chmod(0o777 if path.is_dir() else 0o666)

    code, _, err = run(*[argument for argument in generate(lock) if "lock" not in argument], "--cached-only")
    assert (code, "--locked FILE" in err) == (6, True)
    code, out, err = run(*generate(lock))
    assert code == 0, err
    code, out, err = run("cache", "ls", "--json")
    assert (code, {row["state"] for row in json.loads(out)}) == (0, {"stored"})
    assert f"note: {cache} can be written by everyone" in err


def test_a_build_with_a_lock_file_builds_into_such_a_place(lock, cache, run, demo_cache, monkeypatch, tmp_path):
    monkeypatch.setattr(builder, "compile_bucket", found_in(demo_cache))
    team = tmp_path / "team"
    team.mkdir()
    team.chmod(0o2777)
    shared = ["build", *PLAN, "--seq=16,32", "--cache-dir", team]
    code, _, err = run(*shared)
    assert (code, err.count("\n")) == (6, 2)
    assert "build --lock FILE" in err

    again = tmp_path / "again.lock"
    assert run(*shared, "--lock", again)[0] == 0
    assert {path.stat().st_mode & 0o7777 for path in team.rglob("*") if path.is_dir()} == {0o2777}
    report = build(Plan.grid(seq=[16, 32]), model="demo", cache_dir=team, lock=again)
    assert (report.hits, report.compiled) == (2, 0)
    with Engine.load("demo", cache_dir=team, locked=again) as engine:
        assert engine.generate([1, 2], max_new_tokens=1, seed=1)
    # who has another lock file does not know them
    code, _, err = run(*shared, "--lock", lock)
    assert (code, f"{team} can be written by everyone" in err) == (6, True)


def test_another_models_lock_file_is_said_to_be_one(lock, odd_folder, run):
    with pytest.raises(
        IncompatibleEntry, match=r"locks nothing of this model, on this backend: architecture\."
    ) as caught:
        Engine.load(odd_folder, locked=lock)
    assert f"--lock {lock}" in caught.value.hint
    code, out, _ = run("status", "--model", odd_folder, "--locked", lock, "--seq=16", "--json")
    assert (code, {row["state"] for row in json.loads(out)["buckets"]}) == (1, {"incompatible"})


def test_a_changed_build_is_not_loaded_under_an_old_lock_file(lock, cache, demo_cache, run, monkeypatch):
    """The very same library, compiled again: its manifest says so, and the lock file means the other one."""

    def compiled(*request: object) -> Artifact:
        return replace(found_in(demo_cache)(*request), stats={"compile_ms": 77})

    monkeypatch.setattr(builder, "compile_bucket", compiled)
    (named,) = read_lock(lock).entries
    (cache / "v1" / "entries" / named.family / f"{named.key}.json").unlink()
    report = build([Bucket(1, 16)], model="demo")
    assert report.compiled == 1

    with pytest.raises(UntrustedStore, match="names another build of it"):
        Engine.load("demo", locked=lock)


@pytest.mark.parametrize("command", ["status", "generate x", "score texts.txt", "cache prune"])
@pytest.mark.parametrize(("content", "code"), [(None, 2), ("{", 4), ('{"format":2}', 7)])
def test_a_lock_file_of_no_use_is_one_sentence(cache, run, command, content, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.txt").write_text("A text.")
    path = tmp_path / "buckets.lock"
    if content is not None:
        path.write_text(content)
    model = [] if command == "cache prune" else ["--model=demo"]

    found, out, err = run(*command.split(), *model, "--locked", path)

    assert (found, out) == (code, "")
    assert str(path) in err
    assert "Traceback" not in err
    assert err.count("error: ") == 1


def test_a_file_that_is_something_else_is_not_written_over(cache, run, tmp_path, monkeypatch):
    monkeypatch.setattr(builder, "compile_bucket", lambda *a: pytest.fail("compiled"))
    (tmp_path / "README.md").write_text("# mine")

    code, _, err = run("build", *PLAN, "--seq=64", "--lock", tmp_path / "README.md")
    assert (code, (tmp_path / "README.md").read_text()) == (4, "# mine")
    code, _, err = run("build", *PLAN, "--seq=64", "--lock", tmp_path / "nowhere" / "buckets.lock")
    assert (code, "is no directory" in err) == (2, True)


def test_what_cannot_go_together_is_refused(lock, run):
    code, _, err = run("build", *PLAN, "--seq=16,32", "--shard=1/2", "--lock", lock)
    assert (code, "lock the whole plan" in err) == (2, True)
    code, _, err = run(*generate(lock, "--backend=eager"))
    assert (code, "leave --locked out" in err) == (2, True)
    with pytest.raises(UsageError, match="nothing is built for a cache that is locked"):
        build([Bucket(1, 16)], model="demo", locked=lock)


def test_where_a_bucket_fails_the_lock_file_stays_as_it_was(lock, run, monkeypatch):
    from nanogpt_buckets.errors import CompileFailed

    def fail(*arguments: object) -> None:
        raise CompileFailed("no luck")

    before = lock.read_bytes()
    monkeypatch.setattr(builder, "compile_bucket", fail)

    code, _, err = run("build", *PLAN, "--seq=16,64", "--lock", lock)

    assert (code, lock.read_bytes()) == (5, before)
    assert f"{lock} is left as it was" in err


def test_prune_keeps_what_is_locked(lock, cache, run):
    shutil.rmtree(cache / "v1" / "plans")
    code, out, _ = run("cache", "prune", "--max-size=0", "--yes", "--locked", lock, "--json")
    assert code == 0
    assert [file["what"] for file in json.loads(out)["files"]] == ["entry", "blob"]
    assert run(*generate(lock))[0] == 0


def test_status_of_a_lock_file_loads_no_torch(lock, cache):
    code = (
        "import sys\nfrom nanogpt_buckets.cli import main\n"
        f"try:\n    main(['status', '--model=demo', '--locked', {str(lock)!r}])\nexcept SystemExit as end:\n"
        "    assert not end.code\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_layer_serves_what_the_cache_lacks_and_its_plan(demo_cache, run, tmp_path, monkeypatch):
    monkeypatch.setattr(builder, "compile_bucket", lambda *a: pytest.fail("compiled"))
    command = ["generate", "ROMEO:", "--model=demo", "-n", "4", "--seed=1", "--json", "--cached-only"]
    assert run(*command)[0] == 3
    code, out, err = run(*command, "--layer", demo_cache)
    assert code == 0, err
    assert [b["seq_len"] for b in json.loads(out)["report"]["buckets"]] == [16]

    monkeypatch.setenv("NANOGPT_BUCKETS_LAYERS", str(demo_cache))
    assert run("status", "--model=demo")[1].count("warm") == 2
    assert run("build", *PLAN, "--seq=16,32")[1].count("hit") == 2
    code, _, err = run("status", "--model=demo", "--layer", tmp_path / "nowhere")
    assert (code, "the layer " in err) == (2, True)


@pytest.mark.parametrize("place", ["there", "buckets.tar"])
def test_what_is_pushed_with_a_lock_file_is_pulled_and_run_elsewhere(lock, run, tmp_path, monkeypatch, place):
    there = tmp_path / place
    code, out, err = run("cache", "push", there, "--locked", lock, "--json")
    assert code == 0, err
    (pushed,) = json.loads(out)["entries"]
    assert (pushed["bucket"], pushed["state"]) == ("1x16", "copied")

    monkeypatch.setenv("NANOGPT_BUCKETS_CACHE_DIR", str(tmp_path / "elsewhere"))
    code, _, err = run(*generate(lock))
    assert (code, f"{lock} names it, and it is not here" in err) == (3, True)
    assert f"hint: nanogpt-buckets cache pull SOURCE --locked {lock}, or build" in err
    code, out, err = run("cache", "pull", there, "--locked", lock)
    assert (code, out.count("copied")) == (0, 1), err
    assert run(*generate(lock, "--cached-only"))[0] == 0
    assert run("cache", "pull", there)[1].count("there") == 1, "which nobody else can write"


def test_a_plan_is_pushed_and_what_no_plan_names_is_not(cache, run, tmp_path):
    assert run("cache", "push", tmp_path / "there")[1].count("copied") == 2
    shutil.rmtree(cache / "v1" / "plans")
    code, _, err = run("cache", "push", tmp_path / "there")
    assert (code, "is planned, so there is nothing to push" in err) == (1, True)


@pytest.mark.parametrize("command", ["push", "pull"])
def test_a_place_of_no_use_is_one_sentence(cache, run, tmp_path, command):
    (tmp_path / "file").touch()
    places = {"ftp://x/y": 2, "s3://": 2, tmp_path / "file": 1, tmp_path / "none" / "x.tar": 1, "~nobody-here/x": 2}
    for place, expected in places.items():
        code, _, err = run("cache", command, place)
        assert code == expected or (command, code) == ("pull", 4), (place, err)
        assert err.count("error: ") == 1
        assert "Traceback" not in err


def test_entries_with_weights_are_pushed_by_who_says_so(cache, run, tmp_path, monkeypatch):
    from nanogpt_buckets.store import manifest as manifests

    decode = manifests.decode
    monkeypatch.setattr(
        "nanogpt_buckets.store.entries.decode", lambda data: replace(decode(data), contains_weights=True)
    )
    code, _, err = run("cache", "push", tmp_path / "there")
    assert (code, "--with-weights" in err) == (2, True)
    assert run("cache", "push", tmp_path / "there", "--with-weights", "-q")[0] == 0


def test_status_says_what_the_nearest_entry_differs_in(cache, run, odd_folder):
    code, out, _ = run("status", *PLAN, "--seq=16,64", "--why")
    assert (code, out.count("bucket.seq_len: ")) == (1, 1)
    assert "DIFFERS IN" not in run("status", *PLAN, "--seq=16,64")[1]
    code, out, _ = run("status", "--model", odd_folder, "--strategy=recompute", "--seq=16", "--why", "--json")
    (row,) = json.loads(out)["buckets"]
    assert row["nearest"]["key"] in {path.stem for path in cache.glob("v1/entries/*/*.json")}
    assert all(line.startswith("family.architecture.") for line in row["nearest"]["differs"])
