"""Our tokenizers against Hugging Face's, from OpenAI's own files."""

from __future__ import annotations

import gzip
import os
import pickle
import socket
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt_buckets.errors import TokenizerError, UnknownCharacter
from nanogpt_buckets.model.tokenization import gpt2 as gpt2_module
from nanogpt_buckets.model.tokenization.base import StreamDecoder, decode
from nanogpt_buckets.model.tokenization.characters import CharacterTokenizer, find_meta, from_meta
from nanogpt_buckets.model.tokenization.folder import from_folder
from nanogpt_buckets.model.tokenization.gpt2 import gpt2

ENCODER = Path(__file__).parents[1] / "data" / "gpt2_encoder.json.gz"
MERGES = Path(gpt2_module.__file__).parents[1] / "gpt2" / "vocab.bpe"

NASTY = [
    "",
    " ",
    "   a   b    ",
    "\n\n\t \r\n x",
    "it's they'll we've I'm you'd can't IT'S",
    "漢字かな交じり文 한국어",
    "👩‍👩‍👧‍👦🏳️‍🌈🙂",
    "e\u0301\u0301\u0301 Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A̴̵̜̰͔ͫ͗͢L",
    "שלום مرحبا ‮abc‬",
    "\x00\x01\x7f\x80\xff",
    "a" * 5000,
    "1234567890 3.14159 1e10 ½ Ⅻ ٣",
    "<|endoftext|>",
    "a<|endoftext|>b <|endoftext|><|endoftext|>",
    "<|endof text|> <|endof",
    "\ufffd\ufeff\u2028\u00a0\u3000",
    "def f(x):\n    return x**2  # comment\n",
]


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gpt2")
    (folder / "vocab.json").write_bytes(gzip.decompress(ENCODER.read_bytes()))
    (folder / "merges.txt").write_bytes(MERGES.read_bytes())
    return folder


@pytest.fixture(scope="session")
def oracle(gpt2_folder):
    from transformers import GPT2TokenizerFast

    return GPT2TokenizerFast(vocab=str(gpt2_folder / "vocab.json"), merges=str(gpt2_folder / "merges.txt"))


@pytest.fixture(scope="session")
def whole_folder(oracle, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    oracle.save_pretrained(folder)
    assert (folder / "tokenizer.json").is_file()
    return folder


@pytest.fixture(params=["bundled", "vocab and merges", "tokenizer.json"], scope="session")
def tokenizer(request, gpt2_folder, whole_folder):
    if request.param == "bundled":
        return gpt2()
    return from_folder(gpt2_folder if request.param == "vocab and merges" else whole_folder)


@pytest.mark.parametrize("text", NASTY, ids=range(len(NASTY)))
def test_ids_are_hugging_faces(tokenizer, oracle, text):
    ids = tokenizer.encode(text)

    assert ids == oracle(text)["input_ids"]
    assert decode(tokenizer, ids) == text


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=40))
def test_ids_are_hugging_faces_on_any_text(oracle, text):
    ids = gpt2().encode(text)

    assert ids == oracle(text)["input_ids"]
    assert decode(gpt2(), ids) == text


@settings(max_examples=300, deadline=None)
@given(st.text(" \n\t\u3000ab1.'", max_size=12), st.sampled_from([0, 1, 999, 1000, 1001, 2001]))
def test_blanks_are_cut_as_hugging_face_cuts_them(oracle, text, length):
    text = text.replace("\t", " " * length)

    assert gpt2().encode(text) == oracle(text)["input_ids"]


def test_a_million_blanks_before_a_letter_are_text_like_any_other(oracle):
    text = f"x{' ' * 1_000_000}y<|endoftext|>"

    assert gpt2().encode(text) == oracle(text)["input_ids"]
    assert decode(gpt2(), gpt2().encode(text, plain_text=True)) == text


def test_the_vocabulary_is_gpt2s(tokenizer):
    assert tokenizer.n_vocab == 50257
    assert tokenizer.start_token == 50256
    assert tokenizer.token_bytes(50256) == b"<|endoftext|>"


def test_plain_text_has_no_special_tokens(tokenizer):
    text = "a<|endoftext|>b"

    assert 50256 in tokenizer.encode(text)
    assert 50256 not in tokenizer.encode(text, plain_text=True)
    assert decode(tokenizer, tokenizer.encode(text, plain_text=True)) == text


@pytest.mark.parametrize(("text", "expected"), [("a\ud800b", "a\ufffdb"), ("\udfff", "\ufffd"), ("\ud83d\ude42", "🙂")])
def test_lone_surrogates_become_the_replacement_character(tokenizer, text, expected):
    assert decode(tokenizer, tokenizer.encode(text)) == expected


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 50256), max_size=12))
def test_a_stream_joins_to_the_text_whatever_the_ids(ids):
    stream = StreamDecoder(gpt2())
    pieces = [stream.feed(token) for token in ids]

    assert "".join(pieces) + stream.flush() == decode(gpt2(), ids)


def test_nothing_is_fetched_or_written(monkeypatch, tmp_path):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "tiktoken"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(socket, "socket", None)
    gpt2.cache_clear()

    assert gpt2().encode("hello world") == [31373, 995]
    assert os.listdir(tmp_path) == []


def test_a_changed_vocabulary_file_is_refused(monkeypatch, tmp_path):
    (tmp_path / "vocab.bpe").write_bytes(MERGES.read_bytes()[:-5])
    monkeypatch.setattr(gpt2_module, "_VOCAB_BPE", tmp_path / "vocab.bpe")
    gpt2.cache_clear()

    with pytest.raises(TokenizerError, match=r"not OpenAI's"):
        gpt2()


# --- folders ------------------------------------------------------------------------------------------------------


def test_a_folder_without_tokenizer_says_so(tmp_path):
    with pytest.raises(TokenizerError, match="has no tokenizer"):
        from_folder(tmp_path)


@pytest.mark.parametrize(("present", "missing"), [("vocab.json", "merges.txt"), ("merges.txt", "vocab.json")])
def test_half_a_tokenizer_names_what_is_missing(tmp_path, present, missing):
    (tmp_path / present).write_text("{}")

    with pytest.raises(TokenizerError, match=missing):
        from_folder(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": 3}'])
def test_a_malformed_tokenizer_is_one_sentence(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)

    with pytest.raises(TokenizerError, match="cannot be read"):
        from_folder(tmp_path)


# --- characters ---------------------------------------------------------------------------------------------------

LETTERS = {0: "\n", 1: "a", 2: "é", 3: "漢"}


def write_meta(path: Path, meta: object) -> Path:
    path.write_bytes(pickle.dumps(meta))
    return path


def good_meta() -> dict:
    return {"vocab_size": 4, "itos": LETTERS, "stoi": {text: token for token, text in LETTERS.items()}}


def test_meta_pickle_round_trip(tmp_path):
    tokenizer = from_meta(write_meta(tmp_path / "meta.pkl", good_meta()))

    assert tokenizer.encode("aé漢\n") == [1, 2, 3, 0]
    assert decode(tokenizer, [3, 1]) == "漢a"
    assert (tokenizer.n_vocab, tokenizer.start_token) == (4, 0)


def test_a_character_outside_is_named(tmp_path):
    with pytest.raises(UnknownCharacter, match=r"'\?' \(U\+003F\) at position 1 is not among the 4"):
        CharacterTokenizer(LETTERS).encode("a?")


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/nanogpt-buckets-evil",)


def test_a_pickle_that_asks_for_any_global_is_refused_and_not_run(tmp_path):
    path = write_meta(tmp_path / "meta.pkl", good_meta() | {"extra": Evil()})

    with pytest.raises(TokenizerError, match=r"system"):
        from_meta(path)
    assert not Path("/tmp/nanogpt-buckets-evil").exists()


@pytest.mark.parametrize("cut", [0, 1, 10, -1])
def test_a_truncated_pickle_is_one_sentence(tmp_path, cut):
    path = tmp_path / "meta.pkl"
    path.write_bytes(pickle.dumps(good_meta())[:cut])

    with pytest.raises(TokenizerError, match=r"meta\.pkl"):
        from_meta(path)


@pytest.mark.parametrize(
    "meta",
    [
        [],
        {"itos": LETTERS},
        good_meta() | {"stoi": {"a": 0}},
        good_meta() | {"itos": {"x": 1}},
        good_meta() | {"vocab_size": 3},
        {"stoi": {"a": -1}, "itos": {-1: "a"}},
    ],
)
def test_tables_that_make_no_sense_are_refused(tmp_path, meta):
    with pytest.raises(TokenizerError):
        from_meta(write_meta(tmp_path / "meta.pkl", meta))


def test_a_pipe_is_no_meta_and_nobody_waits_for_it(tmp_path):
    os.mkfifo(tmp_path / "meta.pkl")
    assert find_meta(tmp_path, None) == tmp_path / "meta.pkl"

    with pytest.raises(TokenizerError, match="not a regular file"):
        from_meta(tmp_path / "meta.pkl")


def test_numbers_chosen_to_be_slow_are_refused(tmp_path):
    with pytest.raises(TokenizerError, match="numbers that no token has"):
        from_meta(write_meta(tmp_path / "meta.pkl", good_meta() | {"x": {2**61 - 1: 0}}))


def test_a_missing_meta_says_so(tmp_path):
    with pytest.raises(TokenizerError, match="cannot be read: No such file"):
        from_meta(tmp_path / "meta.pkl")


def test_meta_is_looked_for_beside_the_checkpoint_then_in_the_dataset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "data" / "plays").mkdir(parents=True)
    assert find_meta(tmp_path / "out", "plays") is None

    in_dataset = write_meta(tmp_path / "data" / "plays" / "meta.pkl", good_meta())
    assert find_meta(tmp_path / "out", "plays").samefile(in_dataset)

    beside = write_meta(tmp_path / "out" / "meta.pkl", good_meta())
    assert find_meta(tmp_path / "out", "plays") == beside


@pytest.mark.parametrize("dataset", ["../data/plays", "/etc", None, ""])
def test_a_dataset_name_never_leads_out_of_the_data_folder(tmp_path, monkeypatch, dataset):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    write_meta(tmp_path / "data" / "meta.pkl", good_meta())

    assert find_meta(tmp_path / "out", dataset) is None
