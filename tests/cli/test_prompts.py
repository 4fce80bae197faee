"""generate --prompts: rows in order, each to be had alone; a file of them goes on where it stopped, byte for byte."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nanogpt_buckets import Engine
from nanogpt_buckets.cli import main, prompts

BASE = ("generate", "--model=demo", "--backend=eager", "-n", "6")
LINES = [
    {"prompt": "ROMEO:"},
    {"prompt": "JULIET:\nO", "max_new_tokens": 3, "seed": 7, "stop": ["e", "th"]},
    {"prompt": "", "temperature": 0},
    {"prompt": "KING", "max_new_tokens": 0},
    {"prompt": "ROMEO:", "top_k": None, "top_p": 0.9, "seed": None},
]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, LINES)) + "\n")
    return path


@pytest.fixture
def run(capsys, source):
    """Return a function that runs the command and gives back its exit code, stdout and stderr."""

    def run(*arguments: str, prompts: Path | str = source) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main([*BASE, f"--prompts={prompts}", *arguments])
        return end.value.code, *capsys.readouterr()

    return run


def child(*arguments: str, **streams) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "nanogpt_buckets", *BASE, *arguments], **streams)


def rows(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def test_each_prompt_gives_one_row_in_order_and_each_row_can_be_had_alone(run):
    code, out, err = run("--seed=40")
    found = rows(out)
    assert (code, [row["index"] for row in found]) == (0, list(range(5)))
    assert [row["prompt"] for row in found] == [line["prompt"] for line in LINES]
    assert [row["seed"] for row in found] == [40, 7, 42, 43, 44]
    assert found[0]["new_text"] != found[4]["new_text"]
    assert "tokens/s on eager" in err
    with Engine.load("demo", backend="eager") as engine:
        for line, row in zip(LINES, found, strict=True):
            how = {"max_new_tokens": 6} | line | {"seed": row["seed"]}
            (alone,) = engine.generate([how.pop("prompt")], **how)
            assert {name: row[name] for name in ("new_text", "finish_reason", "new_tokens")} == {
                name: getattr(alone, name) for name in ("new_text", "finish_reason", "new_tokens")
            }


def test_plain_lines_are_prompts_and_a_dash_is_standard_input_and_a_person_sees_it_move(run, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("ROMEO:\n\nKING \n")
    _, out, _ = run("--seed=1", prompts=path)
    assert [row["prompt"] for row in rows(out)] == ["ROMEO:", "KING "]
    leader, follower = pty.openpty()
    with path.open() as stdin:
        process = child("--seed=1", "--prompts=-", stdin=stdin, stdout=subprocess.PIPE, stderr=follower)
        assert process.communicate()[0].decode() == out
    assert b"prompts" in os.read(leader, 100_000)
    os.close(leader)
    os.close(follower)


@pytest.mark.parametrize("rng", ["per-row", "nanogpt"])
def test_wherever_it_was_cut_the_same_command_makes_the_same_file(run, tmp_path, rng):
    target = tmp_path / "out.jsonl"
    same = ("--seed=3", f"--rng={rng}", f"--output={target}")
    code, out, _ = run(*same)
    assert (code, out) == (0, "")
    whole = target.read_bytes()
    ends = [n + 1 for n, byte in enumerate(whole) if byte == ord("\n")]
    for cut in (0, 1, 20, *(end + shift for end in ends for shift in (-1, 0, 5)), len(whole) - 30):
        target.write_bytes(whole[:cut])
        code, _, err = run(*same)
        assert (code, target.read_bytes()) == (0, whole), err


def test_a_chosen_seed_is_found_again(run, tmp_path):
    target = tmp_path / "out.jsonl"
    run(f"--output={target}")
    whole = target.read_bytes()
    for cut in (whole.index(b"\n") + 1, len(whole) - 1):
        target.write_bytes(whole[:cut])
        assert run(f"--output={target}")[0] == 0
        assert target.read_bytes() == whole
    # stopped within its first row, it has no seed to keep
    target.write_bytes(whole[:-1].split(b"\n")[0][:-3])
    assert run(f"--output={target}")[0] == 0
    assert len(rows(target.read_text())) == 5


def test_what_is_finished_is_left_alone_and_more_prompts_go_on(run, tmp_path, source):
    target = tmp_path / "out.jsonl"
    run("--seed=3", f"--output={target}")
    before = target.read_bytes(), target.stat().st_mtime_ns
    code, out, err = run("--seed=3", f"--output={target}")
    assert (code, out) == (0, "")
    assert "nothing to do: the 5 rows" in err
    assert (target.read_bytes(), target.stat().st_mtime_ns) == before
    with source.open("a") as file:
        file.write('{"prompt": "and"}\n')
    assert run("--seed=3", f"--output={target}")[0] == 0
    assert target.read_bytes().startswith(before[0])
    assert rows(target.read_text())[5]["prompt"] == "and"


@pytest.mark.parametrize(
    "change",
    [
        lambda lines, arguments: lines.pop(),
        lambda lines, arguments: lines.reverse(),
        lambda lines, arguments: lines[1].update(prompt="other"),
        lambda lines, arguments: lines[1].update(temperature=0.1),
        lambda lines, arguments: lines[1].update(seed=8),
        lambda lines, arguments: arguments.append("--seed=4"),
        lambda lines, arguments: arguments.append("--max-new-tokens=7"),
        lambda lines, arguments: arguments.append("--stop=x"),
        lambda lines, arguments: arguments.append("--plain-text"),
        lambda lines, arguments: arguments.append("--ignore-eos"),
        lambda lines, arguments: arguments.append("--dtype=bfloat16"),
    ],
)
@pytest.mark.parametrize("cut", [0, 9])
def test_a_file_of_other_prompts_settings_or_model_is_refused_and_untouched(run, tmp_path, source, change, cut):
    target = tmp_path / "out.jsonl"
    run("--seed=3", f"--output={target}")
    content = target.read_bytes()
    content = content[: len(content) - cut]
    target.write_bytes(content)
    lines, arguments = [dict(line) for line in LINES], ["--seed=3"]
    change(lines, arguments)
    source.write_text("\n".join(map(json.dumps, lines)))
    code, out, err = run(*arguments, f"--output={target}")
    assert (code, out) == (2, "")
    assert "belongs to other prompts, settings or another model" in err
    assert target.read_bytes() == content


@pytest.mark.parametrize(
    "content", [b"hello", b"hello\n", b"{}\n", b"\n", b"\0\xff", b'{"index": 1', b'{"index": 0, "prompt": "ROMEO:"}\n']
)
def test_whatever_is_not_a_beginning_of_these_rows_is_untouched(run, tmp_path, content):
    for seed in ((), ("--seed=3",)):
        target = tmp_path / "precious"
        target.write_bytes(content)
        assert run(*seed, f"--output={target}")[0] == 2
        assert target.read_bytes() == content


def test_the_prompts_are_no_output(run, source):
    before = source.read_bytes()
    assert run(f"--output={source}")[0] == 2
    assert source.read_bytes() == before


@pytest.mark.parametrize("line", ['{"prompt"', '{"prompt": "a", "temperature": -1}', '{"prompt": "\\u6f22"}'])
def test_a_line_that_is_wrong_writes_nothing(run, tmp_path, source, line):
    with source.open("a") as file:
        file.write(line)
    target = tmp_path / "out.jsonl"
    code, out, err = run(f"--output={target}")
    assert (code, out) == (1 if "u6f22" in line else 2, "")
    assert "line 6" in err
    assert not target.exists()


def test_two_do_not_write_one_file(run, tmp_path):
    target = tmp_path / "out.jsonl"
    with target.open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        code, _, err = run("--seed=1", f"--output={target}")
    assert (code, target.read_bytes()) == (2, b"")
    assert "another process is writing" in err


def test_a_full_disk_is_one_sentence_and_the_rest_follows_later(run, tmp_path, monkeypatch):
    target = tmp_path / "out.jsonl"
    run("--seed=3", f"--output={target}")
    whole = target.read_bytes()
    target.unlink()
    write, left = os.write, [400]

    def full(descriptor: int, data: memoryview) -> int:
        if not left[0]:
            raise OSError(28, "No space left on device")
        count = write(descriptor, data[: left[0]])
        left[0] -= count
        return count

    monkeypatch.setattr(prompts.os, "write", full)
    code, _, err = run("--seed=3", f"--output={target}")
    assert (code, target.read_bytes()) == (1, whole[:400])
    assert "cannot be written: No space left on device" in err
    monkeypatch.undo()


def test_interrupted_and_killed_it_makes_the_same_file(tmp_path, run):
    prompts = tmp_path / "long.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": "ROMEO:" * (1 + n % 5)}) + "\n" for n in range(70)))
    target, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    same = ("--seed=5", "--strategy=kv")

    def stopped(by: signal.Signals, rows: int) -> tuple[int, str]:
        process = child(*same, f"--prompts={prompts}", f"--output={target}", stderr=subprocess.PIPE)
        while process.poll() is None and not (target.exists() and target.read_bytes().count(b"\n") >= rows):
            time.sleep(0.005)
        process.send_signal(by)
        said = process.communicate()[1].decode()
        return process.returncode, said

    code, said = stopped(signal.SIGINT, 1)
    assert (code, said.splitlines()[-1]) == (130, "interrupted")
    assert "the same command goes on after them" in said
    assert 0 < target.read_bytes().count(b"\n") < 70
    assert stopped(signal.SIGKILL, 35)[0] == -signal.SIGKILL
    assert run(*same, f"--output={target}", prompts=prompts)[0] == 0
    assert run(*same, f"--output={whole}", prompts=prompts)[0] == 0
    assert target.read_bytes() == whole.read_bytes()
    assert len(rows(target.read_text())) == 70
