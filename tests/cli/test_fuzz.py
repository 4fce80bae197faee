"""Thousands of command lines, seeded: each ends with a documented code and one sentence, and none is called a bug."""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from nanogpt_buckets import builder
from nanogpt_buckets.cli import main
from nanogpt_buckets.errors import CompileFailed, ModelNotFound
from nanogpt_buckets.model import checkpoint

CODES = {0, 1, 2, 3, 4, 5, 6, 7, 130}
CASES, CHUNKS = 3000, 6

TEXT = [
    "",
    " ",
    "a",
    "-",
    "--",
    "ROMEO:",
    "é\u200b",
    "\udcff",
    "\x1b[31mred",
    "x" * 300,
    "..",
    "~nosuchuser/x",
    "%s",
    "[/red]",
]
NUMBER = ["0", "1", "-1", "16", "1.5", "1e9", "9" * 5000, "nan", "-inf", "0x10", "９", "1_0", " 2 ", "", "1,2", "3,,4"]
SEQ = [*NUMBER, "16,32", "8,8,8", "2147483648", "257", ",", "1-4", "32,64,128"]
FEW = ["0", "1", "2", "-1", "x", "", "9" * 5000, "1.0"]


def files(folder: Path) -> list[str]:
    """Make what a path can lead to."""
    bucket = {"step": "recompute", "batch_size": 1, "seq_len": 16}
    contents = {
        "plan.json": json.dumps({"format": 1, "buckets": [bucket]}),
        "newer.json": json.dumps({"format": 2, "buckets": [bucket]}),
        "huge.json": json.dumps({"format": 1, "buckets": [bucket | {"seq_len": 1}]}).replace("1}]", "9" * 5000 + "}]"),
        "deep.json": "[" * 100_000, "bom.json": "\ufeff{}", "nan.json": '{"format": NaN}', "empty": "",
        "list.json": "[]", "types.json": '{"format": 1, "buckets": {"a": []}, "families": 3}',
        "families.json": json.dumps({"format": 1, "buckets": [bucket], "families": [3, None]}),
        "escape.json": '{"\\u001b[31m": 1}', "escape_format.json": '{"format": 1, "\\u001b[31m": 1}',
    }  # fmt: skip
    for name, text in contents.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "binary").write_bytes(bytes(range(256)) * 8)
    (folder / "directory").mkdir()
    (folder / "loop").symlink_to(folder / "loop")
    os.mkfifo(folder / "fifo")
    (folder / "cut.zip").write_bytes(b"PK\x03\x04" + b"\0" * 50)
    (folder / "v" / "v1" / "plans").mkdir(parents=True)
    (folder / "v" / "v1" / "entries").write_text("a file where a directory should be")
    (folder / "v" / "v1" / "plans" / "demo.json").mkdir()
    names = [*contents, "binary", "directory", "loop", "fifo", "cut.zip", "v", "not-there", "plan.json/below"]
    return [str(folder / name) for name in names]


def options_of(paths: list[str]) -> dict[str, list[str]]:
    """Return what each option may be given; None stands for an option without a value."""
    return {
        "--model": ["demo", "demo", "gpt2", "gpt3", *TEXT, *paths],
        "--backend": ["auto", "eager", "inductor", "neuron", "x"], "--jobs": FEW, "--init-from": ["resume", "x"],
        "--target": ["native", "x86-64-v3", "trn1", *TEXT], "--dtype": ["float32", "bfloat16", "int8", ""],
        "--compiler-args": ["--x", '"', *TEXT], "--cache-dir": [*paths, "~nosuchuser/x", ""],
        "--plan": paths, "--seq": SEQ, "--batch": SEQ,
        "-n": FEW, "-t": NUMBER, "-k": NUMBER, "-p": NUMBER, "-s": NUMBER,
        "--rng": ["per-row", "nanogpt", "x"], "--num-samples": FEW, "--stop": TEXT, "--meta": [*paths, "gpt2"],
        "--start": [*TEXT, *(f"FILE:{p}" for p in paths if not p.endswith("fifo"))],
        "--out-dir": paths, "--cores": FEW, "--device": ["cpu", "cuda"], "--compile": ["True", "False", "x"],
        "--stride": FEW,
        "--runs": FEW, "--older-than": ["1d", "0s", "-1d", *NUMBER], "--max-size": ["1GB", "0", *NUMBER],
    }  # fmt: skip


FLAGS = [
    "--json",
    "-q",
    "-v",
    "--help",
    "--version",
    "--cached-only",
    "--plain-text",
    "--score",
    "--dry-run",
    "--yes",
    "-y",
    "--nope",
]
COMMANDS = [
    ["build"], ["generate"], ["score"], ["score", "-"],
    ["status"], ["bench"], ["report"], ["cache", "ls"], ["cache", "dir"], ["cache", "show"],
    ["cache", "verify"], ["cache", "rm"], ["cache", "prune"], ["cache"], [], ["bild"],
]  # fmt: skip


def command_line(chance: random.Random, options: dict[str, list[str]]) -> list[str]:
    line = list(chance.choice(COMMANDS))
    known = chance.random() < 0.7  # most lines get past the model
    if known and line and line[0] in ("build", "generate", "score", "status", "bench"):
        line += ["--model", "demo", *(["--backend", "eager", "-n", "1"] if line[0] == "generate" else [])]
    for _ in range(chance.choice([0, 1, 1, 2, 3])):
        if chance.random() < 0.2:
            line.append(chance.choice(FLAGS))
        elif chance.random() < 0.2:
            line.append(chance.choice([*TEXT, "0" * 64, "abc"]))
        else:
            name = chance.choice(list(options))
            line += (
                [f"{name}={chance.choice(options[name])}"] if name[1] == "-" else [name, chance.choice(options[name])]
            )
    return line


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_no_command_line_is_a_bug(chunk, tmp_path, monkeypatch, capsys):
    def compiles_nothing(*_):
        raise CompileFailed("this test compiles nothing")

    def no_network(*_):
        raise ModelNotFound("this test downloads nothing")

    monkeypatch.setattr(builder, "compile_bucket", compiles_nothing)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    monkeypatch.setattr(checkpoint, "_gpt2_file", no_network)
    monkeypatch.chdir(tmp_path)
    chance, options = random.Random(chunk), options_of(files(tmp_path))
    wrong = []

    for _ in range(CASES // CHUNKS):
        line = command_line(chance, options)
        with pytest.raises(SystemExit) as end:
            main(line)
        out, err = capsys.readouterr()
        explained = end.value.code in (0, 1, 4) or "error: " in err or err.startswith("Usage: ")
        unsaid = any(words in err for words in ("this is a bug", "Traceback")) or "\x1b" in err
        unsaid |= "\x1b" in out and line[:1] != ["generate"]  # which prints the prompt, as it is, where no terminal is
        if end.value.code not in CODES or unsaid or not explained or len(err) > 20_000:
            wrong.append((line, end.value.code, err[-500:]))

    assert wrong == [], "\n".join(map(str, wrong))


CLOSED = [">&-", "2>&-", "<&-", ">&- 2>&- <&-", ">/dev/full", "2>/dev/full"]
LINES = {"--help": 0, "cache ls": 0, "generate - --model demo --backend eager -n 1": 0, "nope": 2}


@pytest.mark.parametrize("closed", CLOSED)
def test_standard_streams_that_are_closed_or_full_change_no_verdict(closed, tmp_path):
    for line, code in LINES.items():
        reads_nothing = "<&-" in closed and line.startswith("generate")
        writes_nothing = (closed.startswith(">")) and code == 0
        run = subprocess.run(
            ["sh", "-c", f'exec "$0" -m nanogpt_buckets {line} {closed}', sys.executable],
            stdin=subprocess.DEVNULL, capture_output=True, text=True,
        )  # fmt: skip
        # "generate -" reads nothing, and the demo has a start token
        assert run.returncode == (2 if reads_nothing else 1 if writes_nothing else code), (line, run.stderr)
        assert "bug" not in run.stderr
        assert "Traceback" not in run.stderr
        assert "Exception ignored" not in run.stderr
