"""This node's directory: who may write it, what a record may be, and what of it is of no use."""

from __future__ import annotations

import json
import os
from dataclasses import fields
from pathlib import Path

import pytest

from nanogpt_buckets import Engine, Report, node
from nanogpt_buckets.cli import main
from nanogpt_buckets.errors import (
    BucketsError,
    CacheError,
    CompileFailed,
    CorruptEntry,
    IncompatibleEntry,
    UntrustedStore,
)
from nanogpt_buckets.files import remove
from nanogpt_buckets.model.architecture import Architecture
from nanogpt_buckets.node import failures, prune, records, sources
from nanogpt_buckets.node.records import COSTS, FAILURES, LAST_RUN, MARKS, REVOKED, SOURCES, TRAFFIC, VERIFIED, Kind
from nanogpt_buckets.run.report import load_last_run, save_last_run
from nanogpt_buckets.steps import gate

DIGEST = "ab" * 32
USES = [
    lambda: node.folder(),
    lambda: MARKS.find(DIGEST),
    lambda: MARKS.write(DIGEST, {}),
    sources.needed,
    load_last_run,
    prune.plan,
]


@pytest.fixture
def root() -> Path:
    return node.folder(make=True)


def refused(kind: type[BucketsError] = UntrustedStore) -> None:
    for use in USES:
        with pytest.raises(kind) as caught:
            use()
        assert "NANOGPT_BUCKETS_LOCAL_DIR" in caught.value.hint
        assert "\n" not in caught.value.message


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702, 0o1777])
def test_a_directory_that_others_can_write_is_refused(root, mode):
    root.chmod(mode)
    refused()


def test_a_directory_of_somebody_else_is_refused(root):
    os.chown(root, 4321, -1)
    refused()


def test_a_directory_below_one_that_others_can_write_is_refused_unless_that_is_sticky(root):
    root.parent.chmod(0o777)
    refused()
    root.parent.chmod(0o1777)
    assert node.folder() == root


def test_a_symbolic_link_of_somebody_else_is_refused(root, monkeypatch):
    link = root.with_name("link")
    link.symlink_to(root)
    monkeypatch.setenv("NANOGPT_BUCKETS_LOCAL_DIR", str(link))
    assert node.folder() == link
    os.chown(link, 4321, -1, follow_symlinks=False)
    refused()


def test_a_folder_that_is_open_or_leads_elsewhere_is_refused(root, tmp_path):
    node.folder("canary", make=True).chmod(0o777)
    with pytest.raises(UntrustedStore):
        MARKS.find(DIGEST)
    (root / "weights").symlink_to(tmp_path)
    with pytest.raises(CacheError, match="symbolic link"):
        prune.plan()


def test_a_folder_that_cannot_be_examined_is_said(root, monkeypatch):
    def fail(path):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "is_symlink", fail)
    with pytest.raises(CacheError, match="canary cannot be examined: Input/output error"):
        MARKS.find(DIGEST)


def test_a_file_in_its_place_is_said(root):
    root.rmdir()
    root.write_text("")
    refused(CacheError)


def test_folders_are_private_whatever_the_umask(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOGPT_BUCKETS_LOCAL_DIR", str(tmp_path / "a" / "b" / "c"))
    before = os.umask(0)
    try:
        MARKS.write(DIGEST, {"gate": 1})
    finally:
        os.umask(before)
    for place in (tmp_path / "a", tmp_path / "a" / "b", node.directory(), node.directory() / "canary"):
        assert place.stat().st_mode & 0o777 == 0o700
    assert MARKS.find(DIGEST) == {"gate": 1}


# records


def spoil(path: Path, how: str) -> None:
    path.unlink(missing_ok=True)
    match how:
        case "directory":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "link":
            path.symlink_to("/dev/zero")
        case "foreign":
            path.write_text('{"format": 1}')
            os.chown(path, 4321, -1)
        case "large":
            path.write_bytes(b'{"format": 1, "x": "' + b"x" * (1 << 21) + b'"}')
        case _:
            path.write_bytes(how.encode("utf-8", "surrogateescape"))


WHOLE = json.dumps(Kind("", 1)._document({"x": 1}))
DAMAGED = [
    "", "[]", "{}", "nul", "7", "null", '"x"', "\ufeff{}", "[" * 100_000, "\udcff", WHOLE[:-1],
    WHOLE.replace('"x": 1', '"x": 2'), WHOLE.replace('"x": 1', '"x": NaN'), WHOLE.replace('"x": 1', '"y": 1'),
    WHOLE.replace('{"x": 1}', "null"), WHOLE.replace('{"x": 1}', "[" * 900 + "]" * 900), WHOLE.replace(": 1,", ": 0,"),
    WHOLE.replace(": 1,", ": 1.5,"), WHOLE.replace(": 1,", ': "1",'), WHOLE.replace(": 1,", f": {'9' * 5000},"),
    '{"format": true}', '{"format": 1}', "directory", "pipe", "link", "foreign", "large",
]  # fmt: skip


@pytest.mark.parametrize("how", DAMAGED, ids=lambda how: f"{len(how)}-{how[:12]}")
def test_a_damaged_record_is_said_is_absent_and_is_replaced(root, how):
    kind, path = Kind("", 1), root / "record.json"
    spoil(path, how)

    with pytest.raises(CorruptEntry, match="cannot be read: ") as caught:
        kind.read("record")
    assert caught.value.message.isprintable()
    assert kind.find("record") is None
    assert [(record, newer) for _, record, newer in kind.each()] == [(None, False)]
    kind.write("record", {"x": 2})
    assert kind.read("record") == {"x": 2}
    assert [file.name for file in root.iterdir()] == ["record.json"]


KINDS = [value for value in vars(records).values() if isinstance(value, Kind)]


def test_each_kind_has_a_folder_of_its_own_and_is_of_the_format_that_its_content_had(root):
    """Whoever changes what is in a record raises its format: an older release must not read it, nor this an older."""
    assert KINDS == [COSTS, FAILURES, LAST_RUN, MARKS, REVOKED, SOURCES, TRAFFIC, VERIFIED]
    assert len({kind.folder for kind in KINDS}) == 8
    report = """backend buckets compiled crops hits kv_bytes misses model new_tokens overhead_s padded_tokens promotions
        real_tokens replaced saved_s scored_tokens seconds seed steps switches tiers tokens_per_s waste"""
    arch = """n_layer n_head n_embd n_inner block_size vocab_size bias activation layer_norm_epsilon tied
        scale_by_head_size scale_by_layer upcast_attention"""
    assert (LAST_RUN.format, sorted(Report("", "").to_json())) == (5, report.split())
    assert (SOURCES.format, [field.name for field in fields(Architecture)]) == (2, arch.split())


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.folder)
def test_an_older_record_counts_for_nothing_and_a_newer_one_is_left_alone(root, kind):
    kind.write("a", {"x": 1})
    path = next(path for path, *_ in kind.each())
    older, newer = (json.dumps(Kind("", kind.format + by)._document({"x": 1})) for by in (-1, 1))
    path.write_text(older)
    assert kind.find("a") is None
    kind.write("a", {"x": 2})
    assert kind.read("a") == {"x": 2}

    path.write_text(newer)
    assert kind.find("a") is None
    with pytest.raises(IncompatibleEntry, match="newer release"):
        kind.read("a")
    kind.write("a", {"x": 3})
    kind.keep("a", {"x": 3})
    kind.drop("a")
    assert not any(row.path.suffix == ".json" for row in prune.plan())
    assert path.read_text() == newer


def test_a_record_of_another_shape_from_a_newer_release_is_left_alone_by_all_who_use_it(root):
    texts = {}
    for kind, name in (FAILURES, DIGEST), (LAST_RUN, "last-run"), (SOURCES, DIGEST):
        kind.write(name, {})
        texts[root / kind.folder / f"{name}.json"] = '{"format": 99, "other": [1]}'
    for path, text in texts.items():
        path.write_text(text)

    assert failures.recall(DIGEST) is None
    with pytest.raises(IncompatibleEntry, match="newer release"):
        load_last_run()
    failures.remember(DIGEST, CompileFailed("why"))
    failures.forget(DIGEST)
    sources.remember(DIGEST, {"source": "/x", "files": [], "digest": DIGEST})
    save_last_run(Report("", ""))

    assert {path: path.read_text() for path in texts} == texts


# prune


def prune_all() -> int:
    rows = prune.plan()
    for row in rows:
        remove(row.path)
    return sum(row.bytes for row in rows)


def weights(name: str) -> Path:
    path = node.folder("weights", make=True) / f"{name * 64}.safetensors"
    path.write_bytes(b"x" * 10)
    VERIFIED.write(name * 64, {})
    return path


def note(source: Path, name: str, dtype: str = "") -> None:
    record = {"source": str(source), "files": sources.stamps([source]), "digest": name * 64}
    sources.remember(source.name + dtype, record)


def test_prune_takes_what_no_source_needs_and_nothing_else(root, tmp_path):
    for name in "abc":
        (tmp_path / name).write_text(name)
        weights(name)
        note(tmp_path / name, name)
        MARKS.write(f"{name * 32}-{DIGEST[:16]}", {})
    (tmp_path / "b").unlink()
    (tmp_path / "c").write_text("another")
    weights("d")
    old, young = root / "weights" / "tmp-old", root / "tmp-young"
    old.mkdir()
    (old / "half").write_bytes(b"xyz")
    young.write_text("")
    os.utime(old, (1, 1))
    failures.remember("young", CompileFailed("why"))
    FAILURES.write("old", {"why": "x", "when": 1})
    spoil(root / "failures" / "bad.json", "directory")

    plan = prune.plan()

    assert sorted(row.name[0] for row in plan if row.what == "weights") == ["b", "c", "d"]
    assert [row.bytes for row in plan if row.path == old] == [3]
    prune_all()
    assert prune.plan() == ()
    left = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    assert left == {
        f"weights/{'a' * 64}.safetensors", f"verified/{'a' * 64}.json", f"canary/{'a' * 32}-{DIGEST[:16]}.json",
        "sources/a.json", "failures/young.json", "tmp-young",
    }  # fmt: skip


def test_all_weights_stay_where_a_newer_releases_note_is(root, tmp_path):
    path = weights("d")
    SOURCES.write("new", {})
    (root / "sources" / "new.json").write_text('{"format": 99}')

    assert prune.plan() == ()
    (tmp_path / "one").write_text("")
    note(tmp_path / "one", "d")
    note(tmp_path / "one", "e")
    assert path.exists()


def test_weights_that_were_replaced_go_in_every_dtype_unless_another_source_has_them(root, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).write_text(name)
        note(tmp_path / name, "a")
    note(tmp_path / "one", "c", "bfloat16")
    old, half = weights("a"), weights("c")

    (tmp_path / "one").write_text("more")
    note(tmp_path / "one", "b")
    assert (old.exists(), half.exists()) == (True, False)
    note(tmp_path / "two", "b")
    assert not old.exists()
    assert VERIFIED.find("a" * 64) is None


def test_cache_prune_shows_and_deletes_what_is_of_no_use_here_too(root, tmp_path, capsys, monkeypatch):
    def run(*arguments: str) -> tuple[int, dict, str]:
        with pytest.raises(SystemExit) as end:
            main(["cache", "prune", "--json", "--cache-dir", str(tmp_path / "cache"), *arguments])
        out, err = capsys.readouterr()
        return end.value.code, json.loads(out), err

    path = weights("d")
    code, shown, _ = run("--dry-run")
    assert (code, [row["what"] for row in shown["files"]], path.exists()) == (0, ["weights", "leftover"], True)
    code, done, _ = run("--yes")
    assert (code, done["freed"], path.exists()) == (0, shown["bytes"], False)
    root.chmod(0o777)
    code, left, err = run("--yes")
    assert (code, left["files"]) == (0, [])
    assert "left alone" in err


def test_a_bucket_is_compared_once_with_these_weights_and_again_by_another_gate(demo_cache, monkeypatch):
    calls = []
    for name in ("check", "canary"):
        real = getattr(gate, name)
        monkeypatch.setattr(gate, name, lambda *a, _real=real, _name=name, **k: calls.append(_name) or _real(*a, **k))

    def load() -> list[str]:
        calls.clear()
        with Engine.load("demo", cache_dir=demo_cache) as engine:
            engine.warmup()
        return list(calls)

    assert load() == ["canary", "canary"]
    assert load() == []
    monkeypatch.setattr(gate, "VERSION", gate.VERSION + 1)
    assert load() == ["check", "check"]
    assert load() == []
