"""`cache` on the command line: what is shown is what is there; nothing is deleted before somebody agreed."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from farm import found_in

from nanogpt_buckets import Engine, build, builder
from nanogpt_buckets import key as names
from nanogpt_buckets.choice import choose
from nanogpt_buckets.cli import main, output
from nanogpt_buckets.errors import CacheMiss, CorruptEntry
from nanogpt_buckets.plan.bucket import Bucket
from nanogpt_buckets.selection import Selection
from nanogpt_buckets.steps import gate
from nanogpt_buckets.store.entry import Status


@pytest.fixture
def cache(demo_cache, tmp_path, monkeypatch):
    """Return a copy of the demo's cache, without a plan, which commands in this process use."""
    copy = tmp_path / "copy"
    shutil.copytree(demo_cache, copy)
    shutil.rmtree(copy / "v1" / "plans")
    monkeypatch.setenv("NANOGPT_BUCKETS_CACHE_DIR", str(copy))
    return copy


@pytest.fixture
def run(capsys):
    """Return a function that runs a command and returns its exit code, stdout and stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main(["cache", *arguments])
        return (end.value.code, *capsys.readouterr())

    return run


def keys(cache) -> list[str]:
    return sorted(path.stem for path in (cache / "v1" / "entries").glob("*/*.json"))


def size_of(cache, key: str) -> str:
    """Return what deleting an entry frees, for people."""
    manifest = next((cache / "v1" / "entries").glob(f"*/{key}.json"))
    blobs = json.loads(manifest.read_bytes())["body"]["blobs"]
    return output.size(manifest.stat().st_size + sum(blob["size"] for blob in blobs))


def test_ls_tells_what_each_entry_is_and_when_it_was_last_used(cache, run):
    first = next((cache / "v1" / "entries").glob("*/*.json"))
    os.utime(first, (time.time() - 3 * 86400,) * 2)

    code, out, err = run("ls")
    rows = json.loads(run("ls", "--json")[1])

    lines = out.splitlines()
    header = ["KEY", "STATE", "BUCKET", "BACKEND", "TORCH", "TARGET", "DTYPE", "MODEL", "SIZE", "UNUSED"]
    assert (code, lines[0].split()) == (0, header)
    assert "3 d" in next(line for line in lines if line.startswith(first.stem[:12]))
    assert "2 entries" in err
    assert sorted(row["key"] for row in rows) == keys(cache)
    assert {row["contains_weights"] for row in rows} == {False}


def test_show_takes_the_beginning_of_a_key_and_tells_everything(cache, run):
    key = keys(cache)[0]

    code, out, _ = run("show", key[:10])
    shown = json.loads(run("show", key[:10], "--json")[1])

    assert code == 0
    assert (shown["key"], shown["state"], shown["runs_here"], shown["plans"]) == (key, "stored", True, [])
    assert shown["parts"]["family"]["architecture"]["n_layer"] == 4
    assert os.path.getsize(shown["blobs"][0]["path"]) == shown["bytes"] == shown["blobs"][0]["bytes"]
    assert json.loads(Path(shown["path"]).read_bytes())["body"]["key"] == key
    lines = dict(line.split(maxsplit=1) for line in out.splitlines() if len(line.split()) > 1)
    assert lines["key"] == key
    assert lines["parts.family.architecture.n_layer"] == "4"
    assert lines["requires.machine"] == shown["requires"]["machine"]


def test_show_names_the_plan_that_keeps_an_entry(demo_cache, run, monkeypatch):
    monkeypatch.setenv("NANOGPT_BUCKETS_CACHE_DIR", str(demo_cache))

    shown = json.loads(run("show", keys(demo_cache)[0], "--json")[1])

    assert shown["plans"] == ["demo"]
    assert any(line.split()[7:8] == ["demo"] for line in run("ls")[1].splitlines()), "ls calls an entry by its plan"


def test_show_says_of_a_damaged_entry_what_is_wrong(cache, run):
    path = next((cache / "v1" / "entries").glob("*/*.json"))
    path.write_bytes(b"{}")

    code, out, _ = run("show", path.stem)

    assert code == 0
    assert "corrupt" in out
    assert "does not match its own digest" in out


@pytest.mark.parametrize(("damage", "seen_by_ls"), [("missing", True), ("cut", True), ("flipped", False)])
def test_damage_to_a_library_is_seen_by_show_and_verify_and_unless_it_hides_by_ls(cache, run, damage, seen_by_ls):
    blob = next((cache / "v1" / "blobs").glob("*/*"))
    blob.chmod(0o600)
    content = blob.read_bytes()
    blob.write_bytes({"missing": content, "cut": content[:-1], "flipped": content[:-1] + b"?"}[damage])
    if damage == "missing":
        blob.unlink()

    states = [row["state"] for row in json.loads(run("ls", "--json")[1])]
    assert sorted(states) == (["corrupt", "stored"] if seen_by_ls else ["stored", "stored"])
    assert sorted(json.loads(run("show", key, "--json")[1])["state"] for key in keys(cache)) == ["corrupt", "stored"]
    assert run("verify")[0] == 4
    assert json.loads(run("prune", "--dry-run", "--json")[1])["files"][0]["why"].startswith("damaged")


@pytest.fixture
def damaged(cache) -> dict[Path, bytes]:
    """What the files of the cache were before one library was damaged."""
    before = content(cache)
    blob = min((cache / "v1" / "blobs").glob("*/*"))
    blob.chmod(0o600)
    blob.write_bytes(b"damaged")
    return before


def content(cache: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in cache.rglob("*") if path.is_file()}


def test_repair_mends_from_layers_and_says_so_by_its_exit_code(cache, damaged, demo_cache, run, monkeypatch):
    code, out, err = run("verify", "--repair", "--yes", "--layer", str(demo_cache))

    assert (code, content(cache)) == (0, damaged)
    assert "written anew from a layer" in out
    assert "done: mend 1 entry, delete 0 entries, 0 files, 0 B" in err
    assert err.splitlines()[-1].endswith(": all intact")
    monkeypatch.setenv("NANOGPT_BUCKETS_LAYERS", str(demo_cache))
    assert run("verify", "--repair")[0] == 0, "nothing is to be asked"


def test_repair_without_layers_takes_away_what_is_damaged_for_build_to_make(cache, damaged, run):
    before = content(cache)
    code, out, err = run("verify", "--repair", "--dry-run")
    assert (code, content(cache)) == (4, before)
    assert "damaged: library" in out
    assert "nothing was changed; this would be done: mend 0 entries, delete 1 entry, 2 files" in err
    assert run("verify", "--repair")[0] == 2, "nobody can be asked"
    assert content(cache) == before

    document = json.loads(run("verify", "--repair", "--yes", "--json")[1])

    assert (document["entries"], document["problems"]) == (1, [])
    assert (document["repair"]["done"], document["repair"]["mended"]) == (True, [])
    assert [file["what"] for file in document["repair"]["files"]] == ["entry", "blob"]
    assert document["repair"]["freed"] == sum(len(data) for data in before.values()) - sum(
        map(len, content(cache).values())
    )
    assert run("verify")[0] == 0


def test_what_cannot_be_repaired_leaves_exit_code_4(cache, run):
    path = next((cache / "v1" / "blobs").glob("*/*"))
    path.chmod(0o666)

    code, _, err = run("verify", "--repair", "--yes")

    assert (code, path.exists()) == (4, True)
    assert "nothing of this can be repaired" in err


@pytest.mark.parametrize("option", ["--yes", "--dry-run", "--layer=."])
def test_what_is_about_repair_needs_it(cache, run, option):
    code, _, err = run("verify", option)
    assert (code, "add --repair" in err) == (2, True)


def test_a_place_that_is_no_cache_is_not_called_intact(run, tmp_path):
    code, _, err = run("verify", "--cache-dir", str(tmp_path / "nowhere"))
    assert (code, err.split(":")[0]) == (1, "error")
    (tmp_path / "file").touch()
    for command in (["verify"], ["ls"], ["prune"], ["show", "a"], ["rm", "a", "-y"]):
        code, _, err = run(*command, "--cache-dir", str(tmp_path / "file"))
        assert code == 1
        assert "file is not a directory" in err


def test_hints_keep_the_cache_directory(cache, run, tmp_path):
    elsewhere = tmp_path / "else where"

    assert f"cache ls --cache-dir '{elsewhere}'" in run("show", "abc", "--cache-dir", str(elsewhere))[2]
    with pytest.raises(CacheMiss) as missed:
        Engine.load("demo", cache_dir=elsewhere)
    assert missed.value.hint == f"nanogpt-buckets build --model demo --cache-dir '{elsewhere}'"


def test_a_dry_run_deletes_nothing_and_says_how_much_would_go(cache, run):
    before = keys(cache)

    code, out, err = run("rm", before[0][:12], "--dry-run")

    assert (code, keys(cache)) == (0, before)
    assert [line.split()[0] for line in out.splitlines()] == ["WHAT", "entry", "blob"]
    assert f"nothing was deleted; 1 entry, 2 files, {size_of(cache, before[0])} would go" in err


def test_without_a_terminal_deleting_needs_yes(cache, run, monkeypatch):
    before = keys(cache)

    code, _, err = run("rm", before[0])

    assert (code, keys(cache)) == (2, before)
    assert err.endswith(
        "error: nobody can be asked here, so deleting needs --yes\nhint: --dry-run shows what would go\n"
    )


def test_rm_deletes_exactly_what_was_named_and_its_bytes(cache, run):
    gone, kept = keys(cache)
    size = size_of(cache, gone)

    code, _, err = run("rm", gone, "--yes")

    assert (code, keys(cache)) == (0, [kept])
    assert f"deleted 1 entry, {size} freed" in err
    assert run("verify")[0] == 0
    assert run("rm", gone, "--yes")[0] == 1


def test_prune_as_json_says_what_was_freed(cache, run):
    document = json.loads(run("prune", "--older-than", "0s", "--yes", "--json")[1])

    assert (document["deleted"], document["freed"]) == (True, document["bytes"])
    assert [file["what"] for file in document["files"]] == ["entry", "entry", "blob", "blob"]
    assert keys(cache) == []
    assert json.loads(run("prune", "--json")[1]) == {"bytes": 0, "deleted": False, "freed": 0, "files": []}


@pytest.mark.parametrize(
    ("size", "entries_left"),
    [("0", 0), ("{0:.3f}MB", 1), ("{1:.6f} GB", 1), ("{2:.6f}MiB", 1), ("5gb", 2), ("1TB", 2)],
)
def test_sizes_are_written_with_units(cache, run, size, entries_left):
    one_and_a_bit = 1.2 * max(path.stat().st_size for path in (cache / "v1" / "blobs").glob("*/*"))
    size = size.format(one_and_a_bit / 1e6, one_and_a_bit / 1e9, one_and_a_bit / 2**20)
    assert run("prune", "--max-size", size, "-y")[0] == 0
    assert len(keys(cache)) == entries_left


@pytest.mark.parametrize(("span", "entries_left"), [("2d", 2), ("20h", 0), ("1w", 2), ("90min", 0), ("3600s", 0)])
def test_ages_are_written_with_units(cache, run, span, entries_left):
    for path in (cache / "v1" / "entries").glob("*/*.json"):
        os.utime(path, (time.time() - 86400,) * 2)

    assert run("prune", "--older-than", span, "-y")[0] == 0
    assert len(keys(cache)) == entries_left


@pytest.mark.parametrize(
    "option", ["--older-than=-1d", "--older-than=1 year", "--max-size=x", "--max-size=-1", "--max-size=1e9"]
)
def test_an_amount_that_is_none_is_refused_with_an_example(cache, run, option):
    code, _, err = run("prune", option, "-y")

    assert code == 2
    assert "write for example" in err
    assert len(keys(cache)) == 2


@pytest.mark.parametrize(("answer", "code", "entries_left"), [("y", 0, 1), ("n", 1, 2)])
def test_on_a_terminal_the_plan_is_shown_and_then_asked_for(cache, answer, code, entries_left):
    master, terminal = pty.openpty()
    command = [sys.executable, "-m", "nanogpt_buckets", "cache", "rm", keys(cache)[0]]
    child = subprocess.Popen(command, stdin=terminal, stderr=terminal, stdout=subprocess.PIPE, env=os.environ)
    os.close(terminal)
    os.write(master, f"{answer}\n".encode())
    out = child.communicate(timeout=60)[0]
    os.close(master)

    assert (child.returncode, len(keys(cache))) == (code, entries_left)
    assert b"asked for" in out


# --- what cannot be believed ------------------------------------------------------------------------------------------


def test_what_fails_its_check_when_it_is_loaded_is_no_hit_again(cache, demo_cache, run, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(gate, "FLOAT32_TOLERANCE", -1.0)
        patch.setattr(gate, "NOISE_FACTOR", -1.0)
        with pytest.raises(CorruptEntry, match="differs from the eager model") as caught:
            Engine.load("demo")
    assert caught.value.hint.startswith("nanogpt-buckets build --model demo --seq ")

    assert {row["state"] for row in json.loads(run("ls", "--json")[1])} == {"corrupt"}
    assert "rejected: bucket 1x" in run("show", keys(cache)[0])[1]
    code, out, _ = run("verify")
    assert (code, out.count("rejected: bucket 1x")) == (4, 2)
    assert [Selection(choose("demo")).own(Bucket(1, n)).status for n in (16, 32)] == [Status.CORRUPT] * 2
    with pytest.raises(CorruptEntry, match="rejected: bucket 1x"):
        Engine.load("demo")
    with pytest.raises(SystemExit) as end:
        main(["status", "--model=demo", "--strategy=recompute", "--seq=16"])
    assert end.value.code == 1

    monkeypatch.setattr(builder, "compile_bucket", found_in(demo_cache))
    assert build([Bucket(1, 16)], model="demo").compiled == 1
    with Engine.load("demo") as engine:
        assert engine.generate([1, 2], max_new_tokens=1, seed=1)
    assert run("prune", "--yes")[0] == 0
    assert run("verify")[0] == 0


@pytest.mark.parametrize("how", ["group", "owner", "link", "file"])
def test_every_command_says_what_is_wrong_with_a_directory_others_could_have_written(cache, run, how, tmp_path):
    path = cache / "v1" / "tmp"
    if how == "group":
        path.chmod(0o770)
    elif how == "owner":
        os.chown(path, 4321, 4321)
    else:
        path.rmdir()
        path.symlink_to(tmp_path) if how == "link" else path.touch()
    before = sorted(cache.rglob("*")), sorted(tmp_path.glob("*"))

    for command in (["ls"], ["show", "a"], ["verify"], ["rm", "a", "-y"], ["prune", "-y"]):
        code, out, err = run(*command)
        assert (code, out) == (1 if how == "file" else 6, ""), command
        assert f"error: {path} " in err
        assert f"hint: delete it and build again: rm -r {cache}" in err
    assert (sorted(cache.rglob("*")), sorted(tmp_path.glob("*"))) == before


def test_status_and_build_say_the_same_of_an_empty_directory_that_others_can_write(tmp_path, capsys, monkeypatch):
    empty = tmp_path / "empty"
    empty.mkdir()
    empty.chmod(0o770)
    monkeypatch.setenv("NANOGPT_BUCKETS_CACHE_DIR", str(empty))
    why = f"{empty} can be written by its group, who could have written the native code in it"
    for command, code in (
        ("status --strategy=recompute --seq=16 --json", 1),
        ("status --strategy=recompute --seq=16", 1),
        ("status", 6),
        ("build --strategy=recompute --seq=16", 6),
    ):
        with pytest.raises(SystemExit) as end:
            main([*command.split(), "--model=demo"])
        out, err = capsys.readouterr()
        assert end.value.code == code
        assert why in out + err
        assert "json" in command or f"delete it and build again: rm -r {empty}" in err
        assert "missing" not in out
    assert list(empty.iterdir()) == []


def test_a_damaged_plan_is_damage_and_a_newer_one_is_not(cache, run):
    plan = cache / "v1" / "plans" / "demo.json"
    plan.parent.mkdir(mode=0o700)
    plan.write_bytes(b'{"format":1,"buckets":[')
    code, out, _ = run("verify")
    assert (code, out.split(":")[0]) == (4, "v1/plans/demo.json")
    assert f"plan demo in {cache} is damaged" in out
    assert "it keeps nothing" in run("prune", "-n")[2]

    plan.write_bytes(b'{"format":2,"buckets":[]}')
    assert run("verify")[0] == 0
    assert run("prune", "--older-than=0s", "--yes")[0] == 0
    assert (len(keys(cache)), plan.read_bytes()) == (2, b'{"format":2,"buckets":[]}')


def seal(cache: Path, body: dict) -> Path:
    """Write a manifest in which every digest holds, under the names that belong to it."""
    parts = body["parts"]
    if isinstance(parts, dict) and isinstance(parts.get("family"), dict):
        body |= {"family": names.digest(parts["family"]), "key": names.digest(parts)}
    digest = hashlib.sha256(names.canonical_json(body)).hexdigest()
    path = cache / "v1" / "entries" / str(body["family"]) / f"{body['key']}.json"
    path.parent.mkdir(mode=0o700, exist_ok=True)
    path.write_bytes(names.canonical_json({"sha256": digest, "body": body}) + b"\n")
    return path


def places(value, inside=()):
    """Yield the way to everything in a document."""
    for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield (*inside, name)
        if isinstance(inner, dict | list):
            yield from places(inner, (*inside, name))


ODD = (
    None,
    True,
    -1,
    5,
    10**400,
    "",
    "x",
    "9" * 5000,
    "\x1b[2J",
    "../..",
    [],
    [None],
    [5],
    [["x"]],
    {},
    {"": 1},
    {"a": {}},
)


def test_manifests_of_any_kinds_under_right_digests_stop_no_command_and_no_family(cache, run, capsys):
    """Everything in a manifest is once of another kind, in an order of chance; its neighbour stays of use."""
    files = sorted((cache / "v1" / "entries").glob("*/*.json"), key=lambda path: b'"seq_len":16' in path.read_bytes())
    victim, original = files[0], files[0].read_bytes()
    chance = random.Random(20)
    ways = [way for way in places(json.loads(original)["body"]) if way not in (("family",), ("key",), ("format",))]
    for way in chance.sample(ways, 40):
        body = json.loads(original)["body"]
        within = body
        for name in way[:-1]:
            within = within[name]
        within[way[-1]] = odd = chance.choice(ODD)
        victim.unlink(missing_ok=True)
        planted = seal(cache, body)
        case = f"{way} {odd!r:.60}"
        for command in (
            "ls",
            "ls --json",
            f"show {planted.stem}",
            "verify",
            "prune -n --old-toolchains --older-than=1d",
        ):
            code, out, err = run(*command.split())
            assert code in (0, 4, 7), f"{case}: {command}: {err}"
            assert "\x1b" not in out + err, case
            assert "bug" not in err, case
        for lengths, fine in (("16", (0,)), ("16,32", (0, 1))):
            with pytest.raises(SystemExit) as end:
                main(["status", "--model=demo", "--strategy=recompute", f"--seq={lengths}"])
            assert end.value.code in fine, f"{case}: {capsys.readouterr()}"
        capsys.readouterr()
        planted.unlink(missing_ok=True)
