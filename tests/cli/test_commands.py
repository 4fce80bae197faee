"""The executable as a user meets it: its flags, its real output, and scripts that call the library."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

DEMO = ["--model", "demo"]
RECOMPUTE = "--strategy=recompute"


def test_generate_prints_prompt_and_text_on_stdout_and_the_rest_on_stderr(cli, demo_cache):
    arguments = ("generate", "ROMEO:", *DEMO, "--max-new-tokens", "20", "--seed", "1337")
    first, second = cli(*arguments, cache=demo_cache), cli(*arguments, cache=demo_cache)

    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith(b"ROMEO:")
    assert len(first.stdout) == len("ROMEO:") + 20 + 1
    assert first.stdout == second.stdout
    assert b"20 tokens" in first.stderr
    assert b"tokens/s on inductor" in first.stderr
    assert b"1x16 x11, 1x32 x9" in first.stderr


def test_sample_pys_flags_work_in_both_spellings(here, demo_cache):
    dashes = here("generate", *DEMO, "--start=KING", "--max-new-tokens=5", "--top-k=3", "--seed=2", cache=demo_cache)
    same = here("generate", *DEMO, "--start=KING", "--max_new_tokens=5", "--top_k=3", "--seed=2", cache=demo_cache)

    assert dashes.returncode == 0, dashes.stderr
    assert dashes.stdout == same.stdout
    many = here("generate", "a", *DEMO, "--num_samples=2", "--max_new_tokens=3", cache=demo_cache)
    assert many.stdout.count(b"---------------\n") == 2


@pytest.mark.parametrize("way", ["argument", "file", "stdin"])
def test_the_prompt_may_be_text_a_file_or_standard_input(cli, demo_cache, tmp_path, way):
    (tmp_path / "prompt.txt").write_text("ROMEO:")
    prompt = {"argument": "ROMEO:", "file": f"FILE:{tmp_path / 'prompt.txt'}", "stdin": "-"}[way]

    run = cli("generate", prompt, *DEMO, "--max-new-tokens=4", "--seed=1", cache=demo_cache, stdin="ROMEO:")

    assert run.stdout.startswith(b"ROMEO:")
    assert len(run.stdout) == len("ROMEO:") + 4 + 1


def test_odd_prompts_and_odd_terminals_stop_nothing(cli, demo_cache):
    eager = ("--backend=eager", "--max-new-tokens=1")
    run = cli("generate", "caf\udce9", *DEMO, *eager, cache=demo_cache)
    assert run.returncode == 1
    assert b"position 3 is not among the 83" in run.stderr

    run = cli("generate", "\u6f22", *DEMO, *eager, cache=demo_cache, PYTHONIOENCODING="latin-1", PYTHONUTF8="0")
    assert run.returncode == 1
    assert b"character '?' (U+6F22)" in run.stderr


def test_generate_json_is_one_document(here, demo_cache):
    run = here("generate", "ROMEO:", *DEMO, "--max-new-tokens=4", "--json", "--seed=1", cache=demo_cache)
    document = json.loads(run.stdout)

    assert document["generations"][0]["new_tokens"] == 4
    assert document["generations"][0]["text"].startswith("ROMEO:")
    assert document["report"]["backend"] == "inductor"


def test_the_eager_backend_is_one_flag_away(here, demo_cache):
    arguments = ("generate", "ROMEO:", *DEMO, "--max-new-tokens=9", "--seed=1")

    compiled = here(*arguments, cache=demo_cache)
    eager = here(*arguments, "--backend", "eager", cache=demo_cache)
    like_nanogpt = here(*arguments, "--compile=False", cache=demo_cache)

    assert compiled.stdout == eager.stdout == like_nanogpt.stdout
    assert b"on eager" in like_nanogpt.stderr


def test_status_says_what_is_warm_by_its_exit_code(here, demo_cache):
    warm = here("status", *DEMO, RECOMPUTE, "--seq", "16,32", cache=demo_cache)
    some = here("status", *DEMO, RECOMPUTE, "--seq", "16,64", "--json", cache=demo_cache)
    plan = here("status", *DEMO, cache=demo_cache)

    assert (warm.returncode, some.returncode, plan.returncode) == (0, 1, 0)
    assert [row["state"] for row in json.loads(some.stdout)["buckets"]] == ["warm", "missing"]
    assert b"2 of 2 buckets warm" in plan.stderr


def test_build_again_is_all_hits_as_json(here, demo_cache):
    run = here("build", *DEMO, RECOMPUTE, "--seq", "32,16,16", "--json", cache=demo_cache)

    document = json.loads(run.stdout)
    assert (document["hits"], document["compiled"], document["failed"]) == (2, 0, 0)
    assert [row["bucket"]["seq_len"] for row in document["buckets"]] == [16, 32]


def test_cache_ls_and_verify(here, demo_cache):
    rows = json.loads(here("cache", "ls", "--json", cache=demo_cache).stdout)
    verify = here("cache", "verify", "--json", cache=demo_cache)

    assert sorted(row["bucket"] for row in rows) == ["1x16", "1x32"]
    assert all(len(row["key"]) == 64 and row["state"] == "stored" for row in rows)
    assert (verify.returncode, json.loads(verify.stdout)["problems"]) == (0, [])
    assert here("cache", "dir", cache=demo_cache).stdout.decode() == f"{demo_cache}\n"


def test_help_names_every_command_and_the_exit_codes(here):
    text = here("--help").stdout.decode()

    assert all(name in text for name in ("build", "generate", "status", "cache", "Exit codes", "130"))
    for command in ("build", "generate", "status", "cache ls", "cache verify", "cache dir"):
        assert "Example: " in here(*command.split(), "--help").stdout.decode()


# --- scripts without a guard ------------------------------------------------------------------------------------------

SCRIPT = """from nanogpt_buckets import generate
print(generate('ROMEO:', model='demo', max_new_tokens=20, seed=1, strategy='recompute'))
"""


def test_generate_compiles_in_a_cold_cache_from_any_script(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    ran = []
    for way in ("-", str(tmp_path / "script.py")):
        done = subprocess.run(
            [sys.executable, way],
            input=SCRIPT if way == "-" else "",
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("ROMEO:")
        assert done.stdout.count("ROMEO:") == 1, "the script ran once"
        ran.append(done)

    first, second = ran
    # 25 tokens: the shortest rung of the demo's ladder, 32, is compiled
    assert "compiling for demo first: 1x32" in first.stderr
    assert (second.stdout, "compiling" in second.stderr) == (first.stdout, False)


def test_scores_are_a_row_a_text_and_one_of_all(here, tmp_path):
    (tmp_path / "texts.txt").write_text("ROMEO: what is it\n\nA\nJULIET\n" + "to be or not " * 40)
    run = here("score", str(tmp_path / "texts.txt"), *DEMO, "--backend=eager")

    assert run.returncode == 0, run.stderr
    head, *rows = [line.split() for line in run.stdout.decode().splitlines()]
    assert head == ["LINE", "TOKENS", "LOGPROB", "PERPLEXITY", "TEXT"]
    assert [row[:2] for row in rows] == [["1", "17"], ["3", "1"], ["4", "6"], ["5", "520"], ["all", "544"]]
    assert rows[1][2:4] == ["-", "-"]
    assert run.stderr.startswith(b"1 text has less than two tokens, and so no loss\n540 tokens scored")


def test_scores_as_json_are_the_librarys(cli, tmp_path):
    from nanogpt_buckets import Engine

    lines = ['{"text": "ROMEO: what is it"}', "", '{"prompt": "A", "seed": 3}', json.dumps({"text": "to be " * 60})]
    run = cli("score", "-", *DEMO, "--backend=eager", "--json", "--stride=99", stdin="\n".join(lines))
    document = json.loads(run.stdout)

    with Engine.load("demo", backend="eager") as engine:
        scores = engine.score(["ROMEO: what is it", "A", "to be " * 60], stride=99)
    assert [row["line"] for row in document["texts"]] == [1, 3, 4]
    assert [row["logprobs"] for row in document["texts"]] == [pytest.approx(s.logprobs, abs=1e-6) for s in scores]
    assert [row["perplexity"] for row in document["texts"]] == [pytest.approx(s.perplexity) for s in scores]
    assert (document["texts"][1]["loss"], document["texts"][1]["logprobs"]) == (None, [])
    total = document["total"]
    assert (total["texts"], total["tokens"], total["scored_tokens"]) == (3, 17 + 1 + 360, 16 + 359)
    assert total["loss"] == pytest.approx(-sum(s.logprob for s in scores) / 375)
    assert document["report"]["scored_tokens"] == 375
