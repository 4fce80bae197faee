"""What a user can get wrong on the command line: one sentence, a hint, a documented exit code, nothing written."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nanogpt_buckets import Engine, errors, generate
from nanogpt_buckets.cli import main

Argument = str | Callable[[Path], str]


@dataclass(frozen=True)
class Wrong:
    """A command, the code it ends with, and a piece of its sentence and of its hint."""

    arguments: tuple[Argument, ...]
    code: int
    said: str
    hint: str


def wrong(*arguments: Argument, code: int, said: str, hint: str) -> Wrong:
    return Wrong(arguments, code, said, hint)


# --- models that are not ----------------------------------------------------------------------------------------------


def in_file(name: str, content: bytes) -> Callable[[Path], str]:
    def make(directory: Path) -> str:
        (directory / name).write_bytes(content)
        return str(directory / name)

    return make


def prompts(content: bytes) -> Callable[[Path], str]:
    return lambda directory: "--prompts=" + in_file("prompts", content)(directory)


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def evil_checkpoint(directory: Path) -> str:
    import torch

    torch.save({"model": Evil(directory / "executed"), "model_args": {}}, directory / "ckpt.pt")
    return str(directory / "ckpt.pt")


def evil_meta(directory: Path) -> str:
    (directory / "meta.pkl").write_bytes(pickle.dumps(Evil(directory / "executed")))
    return str(directory / "meta.pkl")


def any_zip(directory: Path) -> str:
    with zipfile.ZipFile(directory / "ckpt.pt", "w") as archive:
        archive.writestr("letter.txt", "dear reader")
    return str(directory / "ckpt.pt")


def not_a_nanogpt(directory: Path) -> str:
    import torch

    torch.save({"epoch": 3}, directory / "ckpt.pt")
    return str(directory / "ckpt.pt")


def folder(**config: Any) -> Callable[[Path], str]:
    def make(directory: Path) -> str:
        (directory / "folder").mkdir()
        (directory / "folder" / "config.json").write_text(json.dumps(config))
        return str(directory / "folder")

    return make


def empty_folder(directory: Path) -> str:
    (directory / "empty").mkdir()
    return str(directory / "empty")


GPT2 = {"model_type": "gpt2", "n_layer": 1, "n_head": 2, "n_embd": 8, "n_positions": 64, "vocab_size": 50}

MODELS = {
    "unknown name": wrong("gpt5", code=1, said="there is no model 'gpt5'", hint="demo"),
    "missing checkpoint": wrong("/no/such/ckpt.pt", code=1, said="/no/such/ckpt.pt", hint="demo"),
    "truncated checkpoint": wrong(
        in_file("ckpt.pt", b"PK\x03\x04 and no more"), code=1, said="not a nanoGPT checkpoint", hint="nothing of it was"
    ),
    "empty checkpoint": wrong(in_file("ckpt.pt", b""), code=1, said="not a nanoGPT checkpoint", hint="nothing of it"),
    "wrong pickle": wrong(evil_checkpoint, code=1, said="refused", hint="tensors"),
    "any zip": wrong(any_zip, code=1, said="not a nanoGPT checkpoint", hint="nothing of it was used"),
    "another program's": wrong(not_a_nanogpt, code=1, said="it has no model", hint="nothing of it was used"),
    "Llama": wrong(folder(model_type="llama"), code=1, said="'llama'", hint="only GPT-2"),
    "field not supported": wrong(
        folder(**GPT2, activation_function="prelu"), code=1, said="activation_function", hint="gelu_new"
    ),
    "half a head": wrong(folder(**{**GPT2, "n_head": 3}), code=1, said="not a multiple of its n_head 3", hint="gpt2"),
    "folder without config": wrong(empty_folder, code=1, said="empty", hint="config.json"),
    "config no JSON": wrong(
        lambda d: str(Path(in_file("config.json", b"{")(d)).parent), code=1, said="not plain JSON", hint="nothing of it"
    ),
}


def a_plan(**fields: Any) -> Callable[[Path], str]:
    bucket = {"step": "recompute", "batch_size": 1, "seq_len": 8} | fields
    return in_file("p.json", json.dumps({"format": 1, "buckets": [bucket]}).encode())


# --- commands ---------------------------------------------------------------------------------------------------------

BUILD = ("build", "--model=demo")
STATUS = ("status", "--model=demo")
GENERATE = ("generate", "a", "--model=demo", "--backend=eager")
MANY = ("generate", "--model=demo", "--backend=eager")
SCORE = ("score", "--model=demo", "--backend=eager")
NAN, TEN30 = "nan", str(10**30)

WRONG = {
    **{f"model: {name}": wrong("build", "--seq=32", "-m", *row.arguments, code=row.code, said=row.said, hint=row.hint)
       for name, row in MODELS.items()},
    "no such command": wrong("frobnicate", code=2, said="frobnicate", hint="nanogpt-buckets --help"),
    "no such option": wrong("cache", "verify", "--frob", code=2, said="--frob", hint="cache verify --help"),
    "no such cache command": wrong("cache", "frob", code=2, said="frob", hint="nanogpt-buckets cache --help"),
    # buckets
    **{f"seq {text!r}": wrong(*BUILD, f"--seq={text}", code=2, said="not a positive whole number", hint="build --help")
       for text in ("0", "-5", "x", "nan", "1.5", "32,,64", "", "\u0663")},
    "seq > block_size": wrong(*BUILD, "--seq=512", code=2, said="block_size 256", hint="cropped to it"),
    "seq huge": wrong(*BUILD, f"--seq={TEN30}", code=2, said="too large", hint="at most"),
    "status of seq > block_size": wrong(*STATUS, "--seq=300", code=2, said="block_size 256", hint="cropped to it"),
    "batch 0": wrong(*BUILD, "--seq=32", "--batch=0", code=2, said="not a positive whole number", hint="build --help"),
    "batch nan": wrong(*BUILD, "--seq=32", "--batch=nan", code=2, said="positive whole number", hint="build --help"),
    "batch huge": wrong(*BUILD, "--seq=32", f"--batch={TEN30}", code=2, said="too large", hint="at most"),
    "seq and plan": wrong(*BUILD, "--seq=32", "--plan=p.json", code=2, said="twice", hint="one of them"),
    "plan missing": wrong(*BUILD, "--plan=/no/plan.json", code=2, said="cannot be read", hint="build --help"),
    "plan no JSON": wrong(
        *BUILD, "--plan", in_file("p.json", b"{"), code=2, said="is not plain JSON", hint="build --help"
    ),
    "plan no text": wrong(
        *BUILD, "--plan", in_file("p.json", b"\xff"), code=2, said="not plain JSON", hint="build --help"
    ),
    "plan no plan": wrong(
        *BUILD, "--plan", in_file("p.json", b"[]"), code=2, said="not a JSON object", hint="build --help"
    ),
    "plan with bucket 0": wrong(
        *BUILD, "--plan", a_plan(seq_len=0),
        code=2, said="seq_len is 0", hint="build --help",
    ),
    "plan with another step": wrong(
        *BUILD, "--plan", a_plan(step="verify"),
        code=7, said="has a step 'verify'", hint="update nanogpt-buckets",
    ),
    "nothing to have a status": wrong(*STATUS, code=1, said="nothing is built or planned", hint="--seq"),
    "status of no buckets": wrong(*STATUS, "--backend=eager", code=2, said="compiles nothing", hint="--backend"),
    "misspelt command": wrong("genrate", code=2, said="Did you mean 'generate'", hint="--help"),
    "cache directory without a name": wrong(*STATUS, "--cache-dir=", code=2, said="name is empty", hint="--help"),
    "no file of that name": wrong(
        "generate", "a", "--model=out/ckpt.pt", code=1, said="no file or folder 'out/ckpt.pt'", hint="nanoGPT ckpt.pt"
    ),
    "out-dir means resume": wrong("generate", "a", "--out-dir=/no/out", code=1, said="/no/out/ckpt.pt", hint="demo"),
    # where and what for
    **{f"neuron: {' '.join(options)}": wrong(
        "build", "--model=gpt2", "--seq=32", *options, code=1, said="torch-neuronx, which is not installed",
        hint="pip install --extra-index-url https://pip.repos.neuron.amazonaws.com 'torch-neuronx>=2.9,<2.10'")
       for options in (["--target=trn1"], ["--backend=neuron"], ["--backend=neuron", "--target=inf2"])},
    "neuron, weights missing too": wrong(
        "build", "--model=/no/such", "--seq=32", "--target=trn1", code=1, said="not installed", hint="pip install"
    ),
    "neuron target elsewhere": wrong(
        *BUILD, "--seq=32", "--backend=inductor", "--target=trn1", code=2, said="trn1", hint="leave --backend"
    ),
    "compiler arguments elsewhere": wrong(
        *BUILD, "--seq=32", "--compiler-args=-O1", code=2, said="compiler arguments", hint="--backend neuron"
    ),
    "compiler argument that is none": wrong(
        *BUILD, "--seq=32", "--target=trn1", "--compiler-args=fast", code=2, said="'fast'", hint="--auto-cast"
    ),
    "cores elsewhere": wrong(*GENERATE, "--cores=2", code=2, said="one device", hint="--backend neuron"),
    "unknown level": wrong(*BUILD, "--seq=32", "--target=x86-64-v7", code=1, said="x86-64-v7", hint="x86-64-v3"),
    "backend that compiles nothing": wrong(
        *BUILD, "--seq=32", "--backend=eager", code=2, said="compiles nothing", hint="leave --backend out"
    ),
    "unknown backend": wrong(*BUILD, "--backend=tpu", code=2, said="'tpu'", hint="build --help"),
    "unknown dtype": wrong(*BUILD, "--dtype=int4", code=2, said="'int4'", hint="build --help"),
    **{f"jobs {text}": wrong(*BUILD, f"--jobs={text}", code=2, said="--jobs", hint="build --help")
       for text in ("0", "-1", NAN)},
    **{f"shard {text!r}": wrong(
        *BUILD, "--seq=32", f"--shard={text}", code=2, said="no part of a whole", hint="build --help")
       for text in ("", "1", "x/3", "1/3/3", "-1/3", "1.5/3", "\u0661/3", f"1/{TEN30}")},
    **{f"shard {text!r}": wrong(*BUILD, "--seq=32", f"--shard={text}", code=2, said="does not exist", hint="from 1")
       for text in ("0/3", "4/3", "1/0", "0/0")},
    **{f"scheduler {text!r}": wrong(
        *BUILD, "--seq=32", f"--scheduler={text}", code=2, said="no scheduler's address", hint="tcp://host:8786")
       for text in ("", "host", "host:8786", "tcp://host", "tcp://:8786", "ftp://host:1", "tcp://host:123456")},
    "scheduler nobody is": wrong(
        *BUILD, "--seq=32", "--scheduler=tcp://127.0.0.1:1", code=1, said="no Dask scheduler answers", hint="starts one"
    ),
    "cache directory that cannot be": wrong(
        *BUILD, "--seq=32", "--cache-dir=/proc/nowhere", code=1, said="/proc/nowhere", hint="--cache-dir"
    ),
    "cache directory that is a file": wrong(
        *BUILD, "--seq=32", "--cache-dir", in_file("file", b""), code=1, said="file", hint="--cache-dir"
    ),
    # prompts
    "nothing built": wrong(
        "generate", "a", "--model=demo", "--cached-only",
        code=3, said="no bucket is built", hint="nanogpt-buckets build",
    ),
    "prompt and --start": wrong(*GENERATE, "--start=b", code=2, said="twice", hint="one of them"),
    "unknown character": wrong(
        "generate", "\u6f22", "--model=demo", "--backend=eager", code=1, said="U+6F22", hint="vocabulary"
    ),
    "prompt file missing": wrong("generate", "FILE:/no/such", code=2, said="cannot be read", hint="generate --help"),
    "prompt file no text": wrong(
        "generate", lambda d: "FILE:" + in_file("p", b"\xff")(d), code=2, said="not UTF-8", hint="generate --help"
    ),
    "no end to find": wrong(*GENERATE, "--stop=", code=2, said="stop", hint="non-empty"),
    "meta.pkl missing": wrong(*GENERATE, "--meta=/no/meta.pkl", code=1, said="meta.pkl", hint="--tokenizer"),
    "meta.pkl evil": wrong(*GENERATE, "--meta", evil_meta, code=1, said="meta.pkl", hint="--tokenizer"),
    "no checkpoint in --out-dir": wrong(
        "generate", "a", "--init-from=resume", "--out-dir=/no/out", code=1, said="/no/out", hint="demo"
    ),
    "prompts missing": wrong(*MANY, "--prompts=/no/such", code=2, said="cannot be read", hint="generate --help"),
    "prompts empty": wrong(*MANY, prompts(b" \n"), code=2, said="is empty", hint="one text a line"),
    "prompts malformed": wrong(*MANY, prompts(b'{"prompt": "a"}\n{"prompt"\n'), code=2, said="line 2", hint="--help"),
    "prompts without one": wrong(*MANY, prompts(b'{"text": "a"}'), code=2, said="no 'prompt'", hint="generate --help"),
    "prompts unknown setting": wrong(
        *MANY, prompts(b'\n{"prompt": "a", "topk": 2}'), code=2, said="line 2", hint="top_k"
    ),
    **{f"prompts setting {text}": wrong(
        *MANY, prompts(b'{"prompt": "a"}\n{"prompt": "a", %s}' % text.encode()), code=2, said="line 2: ", hint="--help")
       for text in ('"max_new_tokens": -1', '"max_new_tokens": null', '"temperature": "hot"', '"top_k": true',
                    '"top_p": 0', '"seed": 1.5')},
    "prompts stop": wrong(
        *MANY, prompts(b'{"prompt": "a", "stop": [""]}'), code=2, said="line 1: stop", hint="non-empty"
    ),
    "prompts and a prompt": wrong(*GENERATE, prompts(b"a"), code=2, said="cannot both", hint="into the file"),
    "prompts and start": wrong(*MANY, "--start=a", prompts(b"a"), code=2, said="cannot both", hint="into the file"),
    "prompts and samples": wrong(*MANY, prompts(b"a"), "--num-samples=2", code=2, said="--num-samples", hint="several"),
    "prompts and json": wrong(*MANY, prompts(b"a"), "--json", code=2, said="--json", hint="leave it out"),
    "prompts and a setting": wrong(*MANY, prompts(b"a"), "--top-p=2", code=2, said="top_p is 2.0;", hint="--help"),
    "output alone": wrong(*GENERATE, "--output=/no/such", code=2, said="--prompts", hint="redirect"),
    "output in no directory": wrong(
        *MANY, prompts(b"a"), "--output=/no/such/file", code=2, said="its directory is not there", hint="--output"
    ),
    "output a directory": wrong(*MANY, prompts(b"a"), "--output=/", code=2, said="not a regular file", hint="--output"),
    "device": wrong(*GENERATE, "--device=cuda", code=2, said="cuda", hint="generate --help"),
    # texts
    "file to score missing": wrong("score", "/no/such", code=2, said="cannot be read", hint="score --help"),
    "file to score empty": wrong(*SCORE, in_file("t", b""), code=2, said="is empty", hint="one text a line"),
    "file of blank lines": wrong(*SCORE, in_file("t", b"\n \n"), code=2, said="is empty", hint="one text a line"),
    "file to score no text": wrong(*SCORE, in_file("t", b"\xff"), code=2, said="not UTF-8", hint="score --help"),
    **{f"JSONL {line!r}": wrong(*SCORE, in_file("t", b'{"text": "a"}\n' + line), code=2, said="line 2: ", hint="")
       for line in (b"{", b"text", b"[]", b"{}", b'{"text": 1}', b'{"text": "a", "prompt": "b"}', b'{"text": "a"} x')},
    **{f"stride {text}": wrong(
        *SCORE, f"--stride={text}", in_file("t", b"ab"), code=2, said="stride", hint="score --help")
       for text in ("0", "-1", "256", "1.5", NAN, TEN30)},
    "unknown character to score": wrong(
        *SCORE, in_file("t", "\u6f22".encode()), code=1, said="U+6F22", hint="vocabulary"
    ),
    "nothing built to score with": wrong(
        "score", "--model=demo", "--cached-only", in_file("t", b"ROMEO:"),
        code=3, said="no bucket is built", hint="nanogpt-buckets build --model demo --seq 32 --score",
    ),
    "score buckets of one token": wrong(
        *BUILD, "--score", "--seq=1,8", code=2, said="no token comes before another", hint="2 tokens or more"
    ),
    # numbers
    **{f"max_new_tokens {text}": wrong(
        *GENERATE, f"--max-new-tokens={text}", code=2, said="max", hint="generate --help")
       for text in ("-1", NAN, "1.5")},
    **{f"num_samples {text}": wrong(*GENERATE, f"--num-samples={text}", code=2, said="samples", hint="generate --help")
       for text in ("0", "-1", NAN)},
    **{f"temperature {text}": wrong(
        *GENERATE, f"--temperature={text}", code=2, said="temperature", hint="generate --help")
       for text in ("-1", NAN, "inf", "warm")},
    **{f"top_k {text}": wrong(*GENERATE, f"--top-k={text}", code=2, said="top", hint="generate --help")
       for text in ("-1", NAN, "2.5")},
    **{f"top_p {text}": wrong(*GENERATE, f"--top-p={text}", code=2, said="top_p", hint="generate --help")
       for text in ("0", "-0.5", NAN, "1.01", "inf")},
    "seed nan": wrong(*GENERATE, "--seed=nan", code=2, said="--seed", hint="generate --help"),
    "rng": wrong(*GENERATE, "--rng=mt19937", code=2, said="mt19937", hint="generate --help"),
    # what is not there yet
    "bench before build": wrong("bench", "--model=demo", code=3, said="no bucket", hint="nanogpt-buckets build"),
    "report before a run": wrong("report", code=1, said="no run", hint="nanogpt-buckets generate"),
    "entry that is not": wrong("cache", "show", "abc", code=1, said="abc", hint="cache ls"),
    "deleting an entry that is not": wrong("cache", "rm", "-y", "abc", code=1, said="abc", hint="cache ls"),
    **{f"age {text!r}": wrong(
        "cache", "prune", f"--older-than={text}", code=2, said=f"{text!r} is no amount", hint="cache prune --help")
       for text in ("soon", "-1d", "nan", "1y", "")},
    "larger than nothing": wrong("cache", "prune", "--max-size=big", code=2, said="no amount", hint="prune --help"),
    "quiet and verbose": wrong("status", "-q", "-v", code=2, said="contradict", hint="one of them"),
}  # fmt: skip


@pytest.mark.parametrize("row", WRONG.values(), ids=WRONG)
def test_a_mistake_is_one_sentence_a_hint_and_a_documented_code(row, tmp_path, capsys):
    arguments = [a if isinstance(a, str) else a(tmp_path) for a in row.arguments]
    there = set(tmp_path.rglob("*"))

    with pytest.raises(SystemExit) as end:
        main(arguments)
    out, err = capsys.readouterr()

    assert end.value.code == row.code, err
    assert out == ""
    sentence, hint = err.splitlines()
    assert sentence.startswith("error: "), err
    assert row.said in sentence
    assert not sentence.endswith(".")
    assert hint.startswith("hint: "), err
    assert row.hint in hint
    made = {path for path in set(tmp_path.rglob("*")) - there if path.is_file()}
    assert {path.name for path in made} <= {"CACHEDIR.TAG"}, "nothing half-written, nothing executed"


ACCEPTED = {
    "no new token": ("--max-new-tokens=0",),
    "coldest": ("--temperature=0",),
    "hottest": ("--temperature=1e308",),
    "every token": ("--top-k=0",),
    "more than every token": (f"--top-k={TEN30}",),
    "almost no token": ("--top-p=1e-300",),
    "all probability": ("--top-p=1",),
    "huge seed": (f"--seed={TEN30}",),
    "negative seed": ("--seed=-7",),
    "huge seed, nanoGPT's generator": (f"--seed={TEN30}", "--rng=nanogpt"),
    "negative seed, nanoGPT's generator": ("--seed=-7", "--rng=nanogpt"),
    "an end that comes before a huge number of tokens": (f"--max-new-tokens={TEN30}", "--stop=e"),
}


@pytest.mark.parametrize("arguments", ACCEPTED.values(), ids=ACCEPTED)
def test_extremes_that_mean_something_are_done(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        main([*GENERATE, "--max-new-tokens=5", *arguments])
    out, err = capsys.readouterr()

    assert end.value.code == 0, err
    assert out.startswith("a")


def test_duplicates_and_disorder_are_accepted(demo_cache, capsys):
    with pytest.raises(SystemExit) as end:
        main(
            [*STATUS, "--strategy=recompute", "--seq=32,16,32", "--batch=1,1", "--json", "--cache-dir", str(demo_cache)]
        )

    assert end.value.code == 0
    assert [row["bucket"]["seq_len"] for row in json.loads(capsys.readouterr().out)["buckets"]] == [16, 32]


@pytest.mark.parametrize("ids", [[65], [-1], [2**40], [1.5], [True], ["a"], []])
def test_ids_out_of_range_are_refused_before_anything_runs(ids):
    with pytest.raises(errors.UsageError):
        generate([ids], model="demo", backend="eager", max_new_tokens=1)


def test_an_engine_refuses_to_run_once_it_is_closed():
    with Engine.load("demo", backend="eager") as engine:
        pass

    with pytest.raises(errors.UsageError, match="closed"):
        engine.generate(["a"])


def test_debug_shows_where_an_error_comes_from(monkeypatch):
    monkeypatch.setenv("NANOGPT_BUCKETS_DEBUG", "1")

    with pytest.raises(errors.ModelNotFound):
        main(["build", "--model=gpt5"])


def test_no_error_is_without_a_way_out():
    """Kinds without a usual hint are those whose every place gives its own."""
    kinds = {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.BucketsError)}

    assert {kind.__name__ for kind in kinds if kind.usual_hint is None} == {
        "BucketsError", "UsageError", "PlanError", "BackendUnavailable", "NonFiniteLogits",
    }  # fmt: skip
