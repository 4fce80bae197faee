"""The executable as a user meets it: real output, one-sentence errors with a hint, documented exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

DEMO = ["--model", "demo"]


def cli(*arguments: str, cache: Path | None = None, stdin: str = "", cwd: Path | None = None, **environment: str):
    extra = environment | ({"NANOGPT_BUCKETS_CACHE_DIR": str(cache)} if cache else {})
    return subprocess.run(
        [sys.executable, "-m", "nanogpt_buckets", *arguments],
        env=os.environ | extra,
        cwd=cwd,
        input=stdin.encode("utf-8", "surrogateescape"),
        capture_output=True,
    )


def test_generate_prints_prompt_and_text_on_stdout_and_the_rest_on_stderr(demo_cache):
    arguments = ("generate", "ROMEO:", *DEMO, "--max-new-tokens", "20", "--seed", "1337")
    first, second = cli(*arguments, cache=demo_cache), cli(*arguments, cache=demo_cache)

    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith(b"ROMEO:")
    assert len(first.stdout) == len("ROMEO:") + 20 + 1
    assert first.stdout == second.stdout
    assert b"20 tokens" in first.stderr
    assert b"tokens/s on inductor" in first.stderr
    assert b"1x16 x11, 1x32 x9" in first.stderr


def test_sample_pys_flags_work_in_both_spellings(demo_cache):
    dashes = cli("generate", *DEMO, "--start=KING", "--max-new-tokens=5", "--top-k=3", "--seed=2", cache=demo_cache)
    same = cli("generate", *DEMO, "--start=KING", "--max_new_tokens=5", "--top_k=3", "--seed=2", cache=demo_cache)

    assert dashes.returncode == 0, dashes.stderr
    assert dashes.stdout == same.stdout
    many = cli("generate", "a", *DEMO, "--num_samples=2", "--max_new_tokens=3", cache=demo_cache)
    assert many.stdout.count(b"---------------\n") == 2


@pytest.mark.parametrize("way", ["argument", "file", "stdin"])
def test_the_prompt_may_be_text_a_file_or_standard_input(demo_cache, tmp_path, way):
    (tmp_path / "prompt.txt").write_text("ROMEO:")
    prompt = {"argument": "ROMEO:", "file": f"FILE:{tmp_path / 'prompt.txt'}", "stdin": "-"}[way]

    run = cli("generate", prompt, *DEMO, "--max-new-tokens=4", "--seed=1", cache=demo_cache, stdin="ROMEO:")

    assert run.stdout.startswith(b"ROMEO:")
    assert len(run.stdout) == len("ROMEO:") + 4 + 1


def test_odd_prompts_and_odd_terminals_stop_nothing(demo_cache):
    eager = ("--backend=eager", "--max-new-tokens=1")
    run = cli("generate", "caf\udce9", *DEMO, *eager, cache=demo_cache)
    assert run.returncode == 1
    assert b"position 3 is not among the 83" in run.stderr

    run = cli("generate", "\u6f22", *DEMO, *eager, cache=demo_cache, PYTHONIOENCODING="latin-1", PYTHONUTF8="0")
    assert run.returncode == 1
    assert b"character '?' (U+6F22)" in run.stderr


def test_generate_json_is_one_document(demo_cache):
    run = cli("generate", "ROMEO:", *DEMO, "--max-new-tokens=4", "--json", "--seed=1", cache=demo_cache)
    document = json.loads(run.stdout)

    assert document["generations"][0]["new_tokens"] == 4
    assert document["generations"][0]["text"].startswith("ROMEO:")
    assert document["report"]["backend"] == "inductor"


def test_the_eager_backend_is_one_flag_away(demo_cache):
    arguments = ("generate", "ROMEO:", *DEMO, "--max-new-tokens=9", "--seed=1")

    compiled = cli(*arguments, cache=demo_cache)
    eager = cli(*arguments, "--backend", "eager", cache=demo_cache)
    like_nanogpt = cli(*arguments, "--compile=False", cache=demo_cache)

    assert compiled.stdout == eager.stdout == like_nanogpt.stdout
    assert b"on eager" in like_nanogpt.stderr


def test_status_says_what_is_warm_by_its_exit_code(demo_cache):
    warm = cli("status", *DEMO, "--seq", "16,32", cache=demo_cache)
    some = cli("status", *DEMO, "--seq", "16,64", "--json", cache=demo_cache)
    plan = cli("status", *DEMO, cache=demo_cache)

    assert (warm.returncode, some.returncode, plan.returncode) == (0, 1, 0)
    assert [row["state"] for row in json.loads(some.stdout)["buckets"]] == ["warm", "missing"]
    assert b"2 of 2 buckets warm" in plan.stderr


def test_build_again_is_all_hits_as_json(demo_cache):
    run = cli("build", *DEMO, "--seq", "32,16,16", "--json", cache=demo_cache)

    document = json.loads(run.stdout)
    assert (document["hits"], document["compiled"], document["failed"]) == (2, 0, 0)
    assert [row["bucket"]["seq_len"] for row in document["buckets"]] == [16, 32]


def test_cache_ls_and_verify(demo_cache):
    rows = json.loads(cli("cache", "ls", "--json", cache=demo_cache).stdout)
    verify = cli("cache", "verify", "--json", cache=demo_cache)

    assert sorted(row["bucket"] for row in rows) == ["1x16", "1x32"]
    assert all(len(row["key"]) == 64 and row["state"] == "warm" for row in rows)
    assert (verify.returncode, json.loads(verify.stdout)["problems"]) == (0, [])
    assert cli("cache", "dir", cache=demo_cache).stdout.decode() == f"{demo_cache}\n"


def test_damage_is_told_by_verify_and_status_and_refused_by_cached_only(demo_cache, tmp_path):
    import shutil

    cache = tmp_path / "damaged"
    shutil.copytree(demo_cache, cache)
    for blob in (cache / "v1" / "blobs").glob("*/*"):
        blob.chmod(0o600)
        blob.write_bytes(blob.read_bytes()[:-1] + b"x")

    verify = cli("cache", "verify", cache=cache)
    status = cli("status", *DEMO, "--seq=16", "--json", cache=cache)
    generate = cli("generate", "a", *DEMO, "--max-new-tokens=2", "--cached-only", cache=cache)

    assert verify.returncode == 4
    assert b"not what its name says" in verify.stdout
    assert json.loads(status.stdout)["buckets"][0]["state"] == "corrupt"
    assert generate.returncode == 4
    assert b"Traceback" not in generate.stderr


def test_a_cache_without_room_for_others_works_read_only_for_another_user(demo_cache, tmp_path):
    import shutil

    shared = tmp_path / "shared"
    shutil.copytree(demo_cache, shared)
    for directory in (tmp_path, *[d for d in shared.rglob("*") if d.is_dir()], shared):
        directory.chmod(0o755)
    for file in shared.rglob("*.*"):
        file.chmod(0o644)
    for blob in (shared / "v1" / "blobs").glob("*/*"):
        blob.chmod(0o444)
    for parent in tmp_path.parents:
        if parent != Path("/tmp") and str(parent).startswith("/tmp"):
            parent.chmod(0o755)
    home = tmp_path / "nobody"
    home.mkdir()
    os.chown(home, 65534, 65534)
    # once as root, for the other user may not be able to read this interpreter's own files
    code = (
        "import os\nfrom nanogpt_buckets.cli import main\n"
        "def run(local):\n"
        "    os.environ['NANOGPT_BUCKETS_LOCAL_DIR'] = local\n"
        "    try:\n        main(['generate', 'a', '--model=demo', '--max-new-tokens=2', '--cached-only', '--seed=1'])\n"
        "    except SystemExit as end:\n        assert end.code == 0, end.code\n"
        f"run({str(tmp_path / 'roots')!r})\n"
        "os.setgid(65534)\nos.setuid(65534)\n"
        f"run({str(home / 'local')!r})\n"
    )
    environment = {"NANOGPT_BUCKETS_CACHE_DIR": str(shared), "HOME": str(home)}
    if os.geteuid() != 0:
        pytest.fail("this test needs root, as CI has, to become another user")
    run = subprocess.run([sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True)

    assert run.returncode == 0, run.stderr
    first, second = run.stdout[:4], run.stdout[4:]
    assert first == second
    assert (home / "local" / "weights").stat().st_uid == 65534


# --- what can go wrong ----------------------------------------------------------------------------------------------


def llama(tmp_path: Path) -> str:
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text('{"model_type": "llama"}')
    return str(tmp_path / "llama")


def truncated(tmp_path: Path) -> str:
    (tmp_path / "ckpt.pt").write_bytes(b"PK\x03\x04 and no more")
    return str(tmp_path / "ckpt.pt")


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/nanogpt-buckets-evil-checkpoint",)


def evil(tmp_path: Path) -> str:
    import torch

    torch.save({"model": Evil(), "model_args": {}}, tmp_path / "ckpt.pt")
    return str(tmp_path / "ckpt.pt")


def no_plan(tmp_path: Path) -> str:
    (tmp_path / "plan.json").write_text("[]")
    return str(tmp_path / "plan.json")


GENERATE = ["generate", "a", *DEMO, "--cached-only"]
WRONG = [
    (["build", "--model", "gpt5", "--seq", "32"], 1, "there is no model 'gpt5'"),
    (["build", "--model", "/no/such/ckpt.pt", "--seq", "32"], 1, "/no/such/ckpt.pt"),
    (["build", "--model", llama, "--seq", "32"], 1, "'llama'"),
    (["build", "--model", truncated, "--seq", "32"], 1, "not a nanoGPT checkpoint"),
    (["build", "--model", evil, "--seq", "32"], 1, "refused"),
    (["build", *DEMO, "--seq", "0"], 2, "'0' is not a positive whole number"),
    (["build", *DEMO, "--seq", "-5"], 2, "'-5' is not a positive whole number"),
    (["build", *DEMO, "--seq", "x"], 2, "'x' is not a positive whole number"),
    (["build", *DEMO, "--seq", "32,,64"], 2, "'' is not a positive whole number"),
    (["build", *DEMO, "--seq", "512"], 2, "block_size 256"),
    (["build", *DEMO, "--seq", "32", "--batch", "0"], 2, "'0' is not a positive whole number"),
    (["build", *DEMO, "--seq", "32", "--plan", "p.json"], 2, "twice"),
    (["build", *DEMO, "--plan", "/no/such/plan.json"], 2, "cannot be read"),
    (["build", *DEMO, "--plan", no_plan], 2, "not a plan"),
    (["build", *DEMO, "--seq", "32", "--target", "trn1"], 1, "no Neuron backend"),
    (["build", *DEMO, "--seq", "32", "--target", "x86-64-v7"], 1, "x86-64-v7"),
    (["build", *DEMO, "--seq", "32", "--backend", "eager"], 2, "compiles nothing"),
    (["build", *DEMO, "--seq", "32", "--jobs", "0"], 2, "jobs"),
    (["build", *DEMO, "--seq", "32", "--cache-dir", "/proc/nowhere"], 1, "/proc"),
    (["status", *DEMO], 2, "no default plan"),
    (["status", *DEMO, "--seq", "300"], 2, "block_size 256"),
    ([*GENERATE], 3, "no bucket is built"),
    ([*GENERATE, "--max-new-tokens", "-1"], 3, "no bucket is built"),
    (["generate", "a", *DEMO, "--backend=eager", "--max-new-tokens", "-1"], 2, "max_new_tokens"),
    (["generate", "a", *DEMO, "--backend=eager", "--temperature", "nan"], 2, "temperature"),
    (["generate", "a", *DEMO, "--backend=eager", "--temperature", "-1"], 2, "temperature"),
    (["generate", "a", *DEMO, "--backend=eager", "--top-k", "-1"], 2, "top_k"),
    (["generate", "a", *DEMO, "--backend=eager", "--top-p", "0"], 2, "top_p"),
    (["generate", "a", *DEMO, "--backend=eager", "--num-samples", "0"], 2, "num_samples"),
    (["generate", "\u6f22", *DEMO, "--backend=eager"], 1, "U+6F22"),
    (["generate", "FILE:/no/such", *DEMO, "--backend=eager"], 2, "cannot be read"),
    (["generate", "a", "--start", "b", *DEMO], 2, "twice"),
    (["generate", "a", *DEMO, "--backend=eager", "--meta", "/no/meta.pkl"], 1, "meta.pkl"),
    (["generate", "a", "--init-from", "resume", "--out-dir", "/no/out"], 1, "/no/out"),
    (["generate", "a", "--device", "cuda", *DEMO], 2, "cuda"),
    (["frobnicate"], 2, "frobnicate"),
    (["cache", "verify", "--cache-dir", "/no/such/dir", "--frob"], 2, "--frob"),
]


@pytest.mark.parametrize(("arguments", "code", "said"), WRONG, ids=range(len(WRONG)))
def test_a_mistake_is_one_sentence_and_a_documented_code(arguments, code, said, tmp_path):
    run = cli(*[a if isinstance(a, str) else a(tmp_path) for a in arguments])
    stderr = run.stderr.decode()

    assert run.returncode == code, stderr
    assert said in stderr
    assert "Traceback" not in stderr
    assert run.stdout == b""
    assert not Path("/tmp/nanogpt-buckets-evil-checkpoint").exists()
    assert list((tmp_path / "cache").rglob("*.json")) == [], "nothing half-written"


def test_gpt2_weights_without_a_network_name_the_way_out(tmp_path):
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    run = cli("generate", "a", "--backend=eager", "--max-new-tokens=1", **offline)

    assert run.returncode == 1
    assert b"weights of gpt2" in run.stderr
    assert b"hint: without a network, use demo" in run.stderr


def test_help_names_every_command_and_the_exit_codes():
    text = cli("--help").stdout.decode()

    assert all(name in text for name in ("build", "generate", "status", "cache", "Exit codes", "130"))
    for command in ("build", "generate", "status", "cache ls", "cache verify", "cache dir"):
        assert "Example: " in cli(*command.split(), "--help").stdout.decode()


# --- scripts without a guard ------------------------------------------------------------------------------------------

SCRIPT = "from nanogpt_buckets import generate\nprint(generate('ROMEO:', model='demo', max_new_tokens={n}, seed=1))\n"


@pytest.mark.parametrize("way", ["file", "-c", "stdin"])
def test_generate_compiles_in_a_cold_cache_from_any_script(way, tmp_path):
    script = SCRIPT.format(n=20)  # 25 tokens: the shortest rung of the demo's ladder, 32, is compiled
    (tmp_path / "script.py").write_text(script)
    command = {"file": [str(tmp_path / "script.py")], "-c": ["-c", script], "stdin": ["-"]}[way]
    source = str(Path(__file__).parents[1])
    run = subprocess.run(
        [sys.executable, *command],
        input=script if way == "stdin" else "",
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": source},
    )

    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("ROMEO:")
    assert run.stdout.count("ROMEO:") == 1, "the script ran once"
    assert "compiling 1 missing bucket(s) of demo first: 1x32" in run.stderr
