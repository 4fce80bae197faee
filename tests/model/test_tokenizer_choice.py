"""Which tokenizer a model gets, what happens where it has none, and how prompts reach it."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest

from nanogpt_buckets import Engine, Plan
from nanogpt_buckets.cli.generate import _prompt
from nanogpt_buckets.errors import TokenizerError, UsageError
from nanogpt_buckets.model.architecture import Architecture
from nanogpt_buckets.model.checkpoint import Model
from nanogpt_buckets.model.tokenization.characters import CharacterTokenizer
from nanogpt_buckets.model.tokenization.choice import tokenizer_for

PLAN = Plan.grid(batch=[1, 2], seq=[16])


def model(kind: str, rows: int, path=None) -> Model:
    return Model("m", kind, path, Architecture(1, 1, 8, 32, 16, rows))


def alphabet(size: int):
    return CharacterTokenizer({n: chr(0x4E00 + n) for n in range(size)})


@pytest.mark.parametrize(
    ("kind", "tokens", "rows", "fits"),
    [
        ("nanogpt", 86, 50304, False),
        ("nanogpt", 65, 65, True),
        ("nanogpt", 65, 128, True),
        ("nanogpt", 65, 70, False),
        ("nanogpt", 65, 96, False),
        ("nanogpt", 66, 65, False),
        ("huggingface", 205, 211, True),
        ("huggingface", 86, 211, False),
        ("huggingface", 21128, 50257, False),
        ("huggingface", 50258, 50304, True),
        ("huggingface", 51000, 51200, True),
        ("huggingface", 32000, 50304, False),
        ("huggingface", 32001, 32128, True),
        ("huggingface", 212, 211, False),
    ],
)
def test_only_a_small_surplus_of_rows_is_padding(kind, tokens, rows, fits):
    tokenizer = alphabet(tokens)
    if fits:
        assert tokenizer_for(model(kind, rows), tokenizer) is tokenizer
        return
    with pytest.raises(TokenizerError, match=f"has {tokens} tokens and the model {rows}: they do not belong together"):
        tokenizer_for(model(kind, rows), tokenizer)


def test_a_meta_beside_a_checkpoint_of_another_size_is_refused_naming_both(tmp_path):
    letters = {n: chr(97 + n) for n in range(20)}
    meta = {"vocab_size": 20, "itos": letters, "stoi": {text: n for n, text in letters.items()}}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    (tmp_path / "ckpt.pt").touch()

    with pytest.raises(TokenizerError, match=r"meta\.pkl has 20 tokens and the model 50304"):
        tokenizer_for(model("nanogpt", 50304, tmp_path / "ckpt.pt"))
    assert tokenizer_for(model("nanogpt", 20, tmp_path / "ckpt.pt")).n_vocab == 20


@pytest.mark.parametrize("rows", [50257, 50304])
def test_gpt2s_tokenizer_fits_gpt2s_rows_and_their_padding(rows, tmp_path):
    assert tokenizer_for(model("nanogpt", rows, tmp_path / "ckpt.pt")).n_vocab == 50257


@pytest.mark.parametrize("choice", [3, b"gpt2", object()])
def test_what_is_no_tokenizer_is_one_sentence(choice):
    with pytest.raises(UsageError, match="is no tokenizer"):
        tokenizer_for(model("nanogpt", 65), choice)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("nothing", "", "has no tokenizer"),
        ("tokenizer.json", "{", "cannot be read"),
        ("spiece.model", "x", "needs sentencepiece"),
        ("vocab.txt", "[UNK]\n[CLS]\n[SEP]\na\nb", "has 7 tokens and the model 211"),
    ],
)
def test_a_tokenizer_that_fails_leaves_token_ids_working(odd_folder, tmp_path, monkeypatch, name, content, said):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    folder = shutil.copytree(odd_folder, tmp_path / "odd")
    (folder / name).write_text(content)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    if name == "nothing":
        (folder / "tokenizer_config.json").unlink()

    with Engine.load(folder, plan=PLAN, backend="eager") as engine:
        [whole] = engine.generate([[1, 2, 3]], max_new_tokens=3, seed=1)
        assert whole.new_tokens == 3
        assert whole.text is None
        assert [token.id for token in engine.stream([1, 2, 3], max_new_tokens=3, seed=1)] == whole.token_ids[3:]
        for call in (engine.stream, engine.generate, engine.logits):
            with pytest.raises(TokenizerError, match=said) as refusal:
                call("text")
            assert "token" in refusal.value.hint
        with pytest.raises(TokenizerError, match=f"stop strings need a tokenizer: .*{said}"):
            engine.generate([[1]], stop="x")


def test_a_folder_with_a_bert_vocabulary_runs_and_streams(odd_folder, tmp_path):
    folder = shutil.copytree(odd_folder, tmp_path / "odd")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(chr, range(0x4E00, 0x4E00 + 206))]
    (folder / "vocab.txt").write_text("\n".join(words))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))

    with Engine.load(folder, plan=PLAN, backend="eager") as engine:
        [whole] = engine.generate(["一丁 丂"], max_new_tokens=8, seed=1)
        pieces = [token.text for token in engine.stream("一丁 丂", max_new_tokens=8, seed=1)]

    assert whole.token_ids[:5] == [2, 5, 6, 7, 3]
    assert "".join(pieces) == whole.new_text
    assert whole.text == "[CLS] 一 丁 丂 [SEP]" + whole.new_text


# --- prompts on the command line ----------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["file", "stdin"])
@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"a\r\nb\rc\nd", "a\nb\nc\nd"),
        (b"\xef\xbb\xbfROMEO:\r\n", "ROMEO:\n"),
        (b"", ""),
        ("漢\ufeff".encode(), "漢\ufeff"),
    ],
)
def test_prompts_are_read_as_text(way, content, text, tmp_path, monkeypatch):
    (tmp_path / "prompt.txt").write_bytes(content)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content)))

    assert _prompt("-" if way == "stdin" else f"FILE:{tmp_path / 'prompt.txt'}", None) == text


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("FILE:missing", "cannot be read: No such file"),
        ("FILE:.", "cannot be read: Is a directory"),
        ("FILE:", "cannot be read: No such file"),
        ("FILE:~nosuchuser/x", "cannot be read: No such file"),
        ("FILE:a\0b", "cannot be read: embedded null byte"),
        ("FILE:latin", "'latin' is not UTF-8 text"),
        ("-", "standard input cannot be read: it is closed"),
    ],
)
def test_a_prompt_that_cannot_be_read_is_one_sentence(prompt, said, tmp_path, monkeypatch):
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", None)

    with pytest.raises(UsageError, match=said):
        _prompt(prompt, None)


def test_a_generate_without_a_folder_does_not_load_transformers():
    code = (
        "import sys\nfrom nanogpt_buckets.cli import main\n"
        "try:\n    main(['generate', 'ROMEO:', '--model=demo', '--backend=eager', '--max-new-tokens=1'])\n"
        "except SystemExit as e:\n    assert not e.code, e.code\n"
        "assert not {'transformers', 'tokenizers', 'tiktoken'} & set(sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert run.returncode == 0, run.stderr
