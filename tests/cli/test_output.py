"""What is said, where, how loudly, and with how much colour."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import subprocess
import sys

import click
import pytest

from nanogpt_buckets import cli
from nanogpt_buckets.cli import main, output


@pytest.fixture
def run(demo_cache, capsys, monkeypatch):
    monkeypatch.setenv("NANOGPT_BUCKETS_CACHE_DIR", str(demo_cache))

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main(list(arguments))
        return (end.value.code, *capsys.readouterr())

    return run


GENERATE = ("generate", "ROMEO:", "--model", "demo", "-n", "12", "--seed", "1")


def commands() -> dict[str, click.Command]:
    """Return every command that does something, by what a user types."""
    found: dict[str, click.Command] = {}
    context = click.Context(cli.cli)
    for name in cli.cli.list_commands(context):
        command = cli.cli.get_command(context, name)
        inner = getattr(command, "commands", None)
        found |= {f"{name} {sub}": inner[sub] for sub in inner} if inner else {name: command}
    return found


def test_quiet_leaves_data_and_errors(run):
    loud, quiet = run(*GENERATE), run(*GENERATE, "-q")
    failed = run("generate", "\N{SNOWMAN}", "--model", "demo", "-q")

    assert quiet == (0, loud[1], "")
    assert loud[2] != ""
    assert failed[0] == 1
    assert failed[2].startswith("error: ")


def test_verbose_says_one_line_per_load_with_key_bytes_and_milliseconds(run):
    keys = {row["bucket"]: row for row in json.loads(run("cache", "ls", "--json")[1])}

    code, _, err = run(*GENERATE, "-v")

    assert code == 0
    for bucket in ("1x16", "1x32"):
        entry = keys[bucket]
        line = rf"^loaded bucket {bucket}, entry {entry['key'][:12]}, {entry['bytes']} bytes, \d+\.\d ms$"
        assert len(re.findall(line, err, re.MULTILINE)) == 1
    assert "loaded bucket" not in run(*GENERATE)[2]


def test_quiet_and_verbose_together_are_refused(run):
    code, out, err = run(*GENERATE, "-q", "-v")

    assert (code, out) == (2, "")
    assert "contradict" in err


@pytest.mark.parametrize("name", [n for n in commands() if n != "cache dir"])
def test_every_command_with_data_has_json_quiet_and_verbose(name):
    options = {option for parameter in commands()[name].params for option in parameter.opts}

    assert {"--json", "-q", "--quiet", "-v", "--verbose"} <= options


@pytest.mark.parametrize("name", commands())
def test_every_help_has_one_example_which_is_the_command_itself(name):
    (example,) = re.findall(r"Example: (.*)", commands()[name].help)

    assert f"nanogpt-buckets {name}" in example


def test_no_two_commands_say_the_same_of_themselves():
    first_sentences = [command.help.split(".")[0] for command in commands().values()]

    assert len(set(first_sentences)) == len(first_sentences)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_can_complete(shell):
    def ask(**variables: str) -> str:
        command = [sys.executable, "-m", "nanogpt_buckets"]
        return subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=True).stdout

    # fish hands over the word being typed, the others its place
    word = "pr" if shell == "fish" else "2"
    asked = {"COMP_WORDS": "nanogpt-buckets cache pr", "COMP_CWORD": word}

    assert "_NANOGPT_BUCKETS_COMPLETE" in ask(_NANOGPT_BUCKETS_COMPLETE=f"{shell}_source")
    assert "prune" in ask(_NANOGPT_BUCKETS_COMPLETE=f"{shell}_complete", **asked)


def on_a_terminal(*arguments: str, **environment: str) -> str:
    """Run a command whose stderr is a terminal and return what that terminal was sent."""
    master, terminal = pty.openpty()
    command = [sys.executable, "-m", "nanogpt_buckets", *arguments]
    variables = {name: value for name, value in os.environ.items() if name != "NO_COLOR"} | environment
    child = subprocess.Popen(command, stdin=terminal, stderr=terminal, stdout=subprocess.DEVNULL, env=variables)
    os.close(terminal)
    shown = b""
    while child.poll() is None or select.select([master], [], [], 0)[0]:
        if select.select([master], [], [], 0.1)[0]:
            try:
                shown += os.read(master, 65536)
            except OSError:  # the terminal's other side is closed
                break
    os.close(master)
    child.wait(timeout=60)
    return shown.decode()


def test_no_color_is_honoured_and_quiet_shows_no_bars(demo_cache):
    arguments = ("cache", "verify", "--cache-dir", str(demo_cache))
    colour = r"\x1b\[[0-9;]*m"

    with_colour = on_a_terminal(*arguments, TERM="xterm-256color")
    without = on_a_terminal(*arguments, TERM="xterm-256color", NO_COLOR="1")
    quiet = on_a_terminal(*arguments, "-q", TERM="xterm-256color")

    assert re.search(colour + "*[34]", with_colour)
    assert "verifying" in without
    assert re.findall(r"\x1b\[[0-9;]*3[0-9](?:;[0-9;]*)?m", without) == []
    assert quiet == ""


def test_scoring_shows_how_far_it_is(tmp_path):
    (tmp_path / "texts").write_text("ROMEO:\nJULIET:\n")
    shown = on_a_terminal("score", str(tmp_path / "texts"), "--model=demo", "--backend=eager", TERM="xterm-256color")

    assert "scoring" in shown
    assert "100%" in shown


def test_sizes_ages_and_counts_for_people():
    assert [output.size(n) for n in (0, 999, 1000, 1_738_576, 5e9, 7e12)] == [
        "0 B", "999 B", "1.0 kB", "1.7 MB", "5.0 GB", "7.0 TB",
    ]  # fmt: skip
    assert [output.age(s) for s in (-1, 0, 59, 60, 7200, 86400 * 40)] == ["0 s", "0 s", "59 s", "1 min", "2 h", "40 d"]
    assert [output.count(n, "entry", "entries") for n in (0, 1, 2)] == ["0 entries", "1 entry", "2 entries"]


def test_ctrl_c_ends_an_import_that_would_swallow_it():
    code = (
        "import os, signal, time\n"
        "from nanogpt_buckets.cli import output\n"
        "with output.ending_at_once():\n"
        "    pass\n"
        "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler\n"
        "with output.ending_at_once():\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "        time.sleep(5)\n"
        "    except BaseException:\n"
        "        pass\n"
        "print('went on')\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert (run.returncode, run.stdout, run.stderr) == (130, "", "interrupted\n")
