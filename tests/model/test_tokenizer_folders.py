"""Folders' own tokenizers against transformers' AutoTokenizer, over generated folders of many kinds."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import sys
import warnings
from pathlib import Path

import pytest
import tokenizers as hf
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from nanogpt_buckets.errors import TokenizerError
from nanogpt_buckets.model.tokenization.base import StreamDecoder, decode
from nanogpt_buckets.model.tokenization.folder import from_folder
from nanogpt_buckets.model.tokenization.gpt2 import byte_symbols

TEXTS = [
    "",
    " ",
    "the king and the queen of the kings",
    " <extra>the <extra> king<extra>s",
    "a<|endoftext|> the[PAD]<s> b </s>",
    "THE King\u00e9 e\u0301 漢字 🙂\n\n\t x ",
    "xx <w> xx<w>xx  <w>",
    "你好世界 hello, world.",
    "a\ufffdb\ufffd \x00\x7f\u2028",
]
CORPUS = ["the king and the queen of the kings, hello world; a castle 你好世界 漢字 é"] * 20
CONFIG = {"model_type": "gpt2"}
END = "<|endoftext|>"


def token(content: str, **flags: bool) -> dict[str, object]:
    usual = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {"content": content} | usual | flags


def byte_level(**parts: object) -> dict[str, object]:
    made = hf.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = list(byte_symbols())
    trainer = trainers.BpeTrainer(vocab_size=290, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(CORPUS, trainer)
    for name, part in parts.items():
        setattr(made, name, part)
    return json.loads(made.to_str())


WHOLE = byte_level()
VOCAB, MERGES = WHOLE["model"]["vocab"], "\n".join(["#version: 0.2", *map(" ".join, WHOLE["model"]["merges"])])
SIZE = len(VOCAB)
FORMS = {
    "old": {"vocab.json": VOCAB, "merges.txt": MERGES},
    "whole": {"tokenizer.json": WHOLE},
    "both": {"vocab.json": VOCAB, "merges.txt": MERGES, "tokenizer.json": WHOLE},
}
BEGINS = processors.TemplateProcessing(single=f"{END} $A {END}", special_tokens=[(END, VOCAB[END])])
EXTRAS: dict[str, dict[str, object]] = {
    "nothing": {},
    "added_tokens.json": {"added_tokens.json": {"<extra>": SIZE, "<w>": SIZE + 1}},
    "decoder": {"tokenizer_config.json": {"added_tokens_decoder": {str(SIZE): token("<extra>", lstrip=True)}}},
    "flags": {
        "tokenizer_config.json": {
            "added_tokens_decoder": {
                str(SIZE): token("<extra>", rstrip=True, normalized=True, special=False),
                str(SIZE + 1): token("<w>", single_word=True),
            }
        }
    },
    "special map": {"special_tokens_map.json": {"bos_token": "<s>", "eos_token": END, "pad_token": "[PAD]"}},
    "special map flags": {"special_tokens_map.json": {"bos_token": token("<extra>", lstrip=True, rstrip=True)}},
    "additional": {"special_tokens_map.json": {"additional_special_tokens": ["<extra>", "<w>"]}},
    "bos": {"tokenizer_config.json": {"add_bos_token": True}},
    "bos eos": {"tokenizer_config.json": {"add_bos_token": True, "add_eos_token": True, "eos_token": "</s>"}},
    "no bos": {"tokenizer_config.json": {"add_bos_token": False}},
    "prefix": {"tokenizer_config.json": {"add_prefix_space": True}},
    "split": {"tokenizer_config.json": {"split_special_tokens": True}},
    "short": {"tokenizer_config.json": {"model_max_length": 3, "clean_up_tokenization_spaces": True}},
    "class": {"tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer", "unk_token": "[PAD]", "errors": "ignore"}},
    "fast class": {"tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}},
}
PARTS: dict[str, dict[str, object]] = {
    "template": {"post_processor": BEGINS},
    "lower": {"normalizer": normalizers.Lowercase()},
    "nfc": {"normalizer": normalizers.NFC()},
    "prefix": {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)},
    "digits": {
        "pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(use_regex=False)])
    },
}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"你好世界漢字hello", "##s", "king", "the", ",", "."]


def trained(model: object, trainer: object, **parts: object) -> dict[str, object]:
    made = hf.Tokenizer(model)
    for name, part in parts.items():
        if name != "decoder":
            setattr(made, name, part)
    made.train_from_iterator(CORPUS, trainer)
    made.decoder = parts.get("decoder")
    return json.loads(made.to_str())


def other_kinds() -> dict[str, dict[str, object]]:
    space = pre_tokenizers.Metaspace()
    quiet = {"show_progress": False}
    unigram = trainers.UnigramTrainer(vocab_size=90, special_tokens=["<unk>", "</s>"], unk_token="<unk>", **quiet)
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    llama = trainers.BpeTrainer(vocab_size=330, special_tokens=["<unk>", "<s>", "</s>", *byte_tokens], **quiet)
    for_llama = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    suffix = trainers.BpeTrainer(vocab_size=120, special_tokens=["<unk>"], end_of_word_suffix="</w>", **quiet)
    word_pieces = trainers.WordPieceTrainer(vocab_size=100, special_tokens=WORDS[:5], **quiet)
    blanks = pre_tokenizers.BertPreTokenizer()
    fast = {"tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"}}
    whole = {
        "unigram": trained(models.Unigram(), unigram, pre_tokenizer=space, decoder=decoders.Metaspace()),
        "llama": trained(
            models.BPE(byte_fallback=True, unk_token="<unk>"), llama, pre_tokenizer=space, decoder=for_llama
        ),
        "suffix": trained(
            models.BPE(end_of_word_suffix="</w>", unk_token="<unk>"), suffix, pre_tokenizer=blanks,
            decoder=decoders.BPEDecoder(),
        ),
        "word pieces": trained(
            models.WordPiece(unk_token="[UNK]"), word_pieces, pre_tokenizer=blanks, decoder=decoders.WordPiece()
        ),
        "words": trained(
            models.WordLevel(unk_token="[UNK]"), trainers.WordLevelTrainer(special_tokens=["[UNK]"], **quiet),
            pre_tokenizer=blanks,
        ),
    }  # fmt: skip
    t5 = {"config.json": CONFIG | {"tokenizer_class": "T5Tokenizer"}, "tokenizer.json": whole["unigram"]}
    return {name: fast | {"tokenizer.json": content} for name, content in whole.items()} | {
        "bert by config": {"config.json": CONFIG | {"tokenizer_class": "BertTokenizer"}, "vocab.txt": "\n".join(WORDS)},
        "bert": {"tokenizer_config.json": {"tokenizer_class": "BertTokenizer"}, "vocab.txt": "\n".join(WORDS)},
        "bert cased": {
            "tokenizer_config.json": {"tokenizer_class": "BertTokenizerFast", "do_lower_case": False},
            "vocab.txt": "\n".join(WORDS),
        },
        "t5": t5,
        "bytes": {"tokenizer_config.json": {"tokenizer_class": "ByT5Tokenizer"}},
    }


def all_folders() -> dict[str, dict[str, object]]:
    made = {f"{f} {e}": FORMS[f] | EXTRAS[e] for f, e in itertools.product(FORMS, EXTRAS)}
    for name, parts in PARTS.items():
        for extra in ("nothing", "bos", "class", "fast class", "decoder"):
            made[f"{name} {extra}"] = {"tokenizer.json": byte_level(**parts)} | EXTRAS[extra]
    cut = byte_level()
    cut["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    cut["padding"] = {
        "strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": END,
    }  # fmt: skip
    made["cut and padded"] = {"tokenizer.json": cut} | EXTRAS["fast class"]
    return made | other_kinds()


FOLDERS = all_folders()


def write(folder: Path, contents: dict[str, object]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in ({"config.json": CONFIG} | contents).items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def auto(folder: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def stream_of(tokenizer, ids: list[int]) -> str:
    stream = StreamDecoder(tokenizer)
    return "".join(map(stream.feed, ids)) + stream.flush()


@pytest.mark.parametrize("name", FOLDERS)
def test_ids_and_text_are_auto_tokenizers_and_streams_join(name, tmp_path):
    folder = write(tmp_path / "model", FOLDERS[name])
    if name == "old fast class":  # transformers cannot read this one either
        with pytest.raises(TokenizerError, match="cannot be read: Couldn't instantiate the backend tokenizer"):
            from_folder(folder)
        return
    ours = from_folder(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        oracle = auto(folder)
        for text in TEXTS:
            assert ours.encode(text) == oracle(text).input_ids
            assert ours.encode(text, plain_text=True) == oracle(text, split_special_tokens=True).input_ids
    chance = random.Random(name)
    for _ in range(40):
        ids = [chance.randrange(ours.n_vocab) for _ in range(chance.randrange(12))]
        text = oracle.decode(ids, clean_up_tokenization_spaces=False)
        assert (decode(ours, ids), stream_of(ours, ids)) == (text, text)


@pytest.mark.parametrize("name", other_kinds())
def test_long_streams_are_what_auto_tokenizer_decodes_at_once(name, tmp_path):
    folder = write(tmp_path / "model", FOLDERS[name])
    ours, oracle = from_folder(folder), auto(folder)
    chance = random.Random(name)
    for ids in [chance.randrange(ours.n_vocab) for _ in range(700)], oracle(TEXTS[5]).input_ids * 50:
        text = oracle.decode(ids, clean_up_tokenization_spaces=False)
        assert (decode(ours, ids), stream_of(ours, ids)) == (text, text)


# --- what is refused ----------------------------------------------------------------------------------------------

FAST = EXTRAS["fast class"]
LATE = {"type": "CTC", "pad_token": "a", "word_delimiter_token": "|", "cleanup": True}
DIRECTION = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 5}
BAD_MAP = {"type": "Precompiled", "precompiled_charsmap": "////"}
DROPPING = {"tokenizer.json": WHOLE | {"model": WHOLE["model"] | {"dropout": 0.5}}}
T5 = {"tokenizer_config.json": {"tokenizer_class": "T5Tokenizer"}}
REFUSED = {
    "dropout": (FAST | DROPPING, "by chance"),
    "dropout of a class that drops it": (DROPPING, "by chance"),
    "later tokens": (FAST | {"tokenizer.json": WHOLE | {"decoder": LATE}}, "CTC"),
    "a panic": (FAST | {"tokenizer.json": WHOLE | {"normalizer": BAD_MAP}}, "cannot be read: Precompiled"),
    "a stride": (FAST | {"tokenizer.json": WHOLE | {"truncation": DIRECTION}}, "stride"),
    "escapes": ({"vocab.json": "{", "merges.txt": "\x1b[31m \x1b]0;x\x07 y\n"}, "cannot be read"),
    "no vocabulary": ({"tokenizer_config.json": {}}, "holds no vocabulary"),
    "another package": (
        {"vocab.txt": "a", "tokenizer_config.json": {"tokenizer_class": "XLMTokenizer"}}, "sacremoses",
    ),
    "sentencepiece": (T5 | {"spiece.model": "x"}, "sentencepiece and protobuf"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_used_is_refused_by_name(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)  # as if it were not installed, wherever this runs
    monkeypatch.setitem(sys.modules, "sacremoses", None)
    contents, said = REFUSED[name]

    with pytest.raises(TokenizerError, match=said) as refusal:
        from_folder(write(tmp_path / "model", contents))
    assert "token ids" in refusal.value.hint or "training" in refusal.value.hint
    assert str(refusal.value).isprintable()


def test_a_panic_while_encoding_is_a_typed_error(tmp_path):
    cut = WHOLE | {"pre_tokenizer": {"type": "FixedLength", "length": 0}}
    ours = from_folder(write(tmp_path / "model", FAST | {"tokenizer.json": cut}))

    with pytest.raises(TokenizerError, match="chunk size must be non-zero"):
        ours.encode("a")


@pytest.mark.parametrize("config", ["config.json", "tokenizer_config.json"])
def test_no_code_of_the_folder_is_run(config, tmp_path):
    contents = CONFIG | {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    evil = {"evil.py": f"open({str(tmp_path / 'ran')!r}, 'w')", config: contents, "tokenizer.json": WHOLE}
    with contextlib.suppress(TokenizerError):  # or its ids are those of tokenizer.json; releases of transformers differ
        assert from_folder(write(tmp_path / "model", evil)).encode("the") == [VOCAB["the"]]
    assert not (tmp_path / "ran").exists()


def test_only_files_that_are_opened_have_a_limit(tmp_path):
    folder = write(tmp_path / "model", FORMS["old"])
    for name in ("train.txt", "vocab.txt"):
        (folder / name).touch()
        os.truncate(folder / name, 1 << 30)
        if name == "train.txt":
            assert from_folder(folder).encode("the") == [VOCAB["the"]]
    with pytest.raises(TokenizerError, match=r"vocab\.txt .* longer than"):
        from_folder(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.txt", "spiece.model", "chat_template.jinja"])
def test_pipes_and_devices_are_refused_before_anything_is_opened(name, tmp_path):
    folder = write(tmp_path / "model", FORMS["old"])
    os.mkfifo(folder / name)
    with pytest.raises(TokenizerError, match=f"{name} .* no regular file"):
        from_folder(folder)

    (folder / name).unlink()
    (folder / name).symlink_to("/dev/zero")
    with pytest.raises(TokenizerError, match=f"{name} .* no regular file"):
        from_folder(folder)


def test_added_tokens_the_model_has_no_row_for_are_no_ids(tmp_path):
    ours = from_folder(write(tmp_path / "model", FORMS["whole"] | EXTRAS["added_tokens.json"]), SIZE + 1)

    assert ours.n_vocab == SIZE + 1
    assert ours.encode("<extra>") == [SIZE]
    with pytest.raises(TokenizerError, match=f"'<w>' is token {SIZE + 1} .* only {SIZE + 1}"):
        ours.encode("<w>")
