"""Where a model's own end token ends a text: as transformers does, by ids; not where nobody named one."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from transformers.utils import logging

from nanogpt_buckets import Engine
from nanogpt_buckets.cli import main
from nanogpt_buckets.errors import CheckpointDamaged, UnsupportedModel, UsageError
from nanogpt_buckets.model.checkpoint import open_model
from nanogpt_buckets.run.generation import Request, Row

SIZES = {"n_layer": 2, "n_head": 3, "n_embd": 48, "n_positions": 100, "vocab_size": 211, "initializer_range": 0.2}
PROMPT = [5, 3, 200]
GONE = object()


def folder(path: Path, config: object, generation: object) -> Path:
    """A random model whose two files name these end tokens, or nothing, or are not there."""
    torch.manual_seed(3)
    model = GPT2LMHeadModel(GPT2Config(**SIZES, bos_token_id=None, eos_token_id=None)).eval()
    model.save_pretrained(path)
    (path / "generation_config.json").unlink(missing_ok=True)
    fields = json.loads((path / "config.json").read_text())
    fields.pop("eos_token_id", None)
    (path / "config.json").write_text(json.dumps(fields if config is GONE else fields | {"eos_token_id": config}))
    if generation is not GONE:
        named = {} if generation == "no field" else {"eos_token_id": generation}
        (path / "generation_config.json").write_text(json.dumps(named))
    return path


def ours(path: Path, **options):
    with Engine.load(path, backend="eager") as engine:
        return engine.generate([PROMPT], max_new_tokens=24, temperature=0, **options)[0]


def theirs(path: Path) -> list[int]:
    logging.set_verbosity_error()
    model = AutoModelForCausalLM.from_pretrained(path)
    return model.generate(torch.tensor([PROMPT]), do_sample=False, max_new_tokens=24, pad_token_id=0)[0].tolist()


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> list[int]:
    """What the model writes where nothing ends it."""
    return ours(folder(tmp_path_factory.mktemp("m"), None, GONE)).token_ids[len(PROMPT) :]


@pytest.mark.parametrize(
    ("config", "generation"),
    [
        (None, GONE), (GONE, GONE), (4, GONE), ([4, 9], GONE), (None, 4), (4, None), (4, "no field"),
        (None, "no field"), (4, 9), (9, 4), (4, [200, 7]), (None, []), ([], GONE), (210, 210),
        (5000, GONE), ([4, 5000], GONE), (-1, GONE),
    ],
)  # fmt: skip
def test_ids_end_where_transformers_ends_them(tmp_path, config, generation, written):
    def ids(place):  # 4 means the id that is written fifth
        listed = [written[n] if 0 < n < 20 else n for n in place] if isinstance(place, list) else place
        return written[place] if isinstance(place, int) and 0 < place < 20 else listed

    path = folder(tmp_path, ids(config), ids(generation))

    assert ours(path).token_ids == theirs(path)


def test_a_text_that_ended_says_stop_and_may_go_on(tmp_path, written):
    path = folder(tmp_path, None, written[6])
    ended, on = ours(path), ours(path, ignore_eos=True)

    new = written.index(written[6]) + 1
    assert (ended.token_ids, ended.new_tokens, ended.finish_reason) == (PROMPT + written[:new], new, "stop")
    assert (on.token_ids, on.finish_reason) == (PROMPT + written, "length")
    with Engine.load(path, backend="eager") as engine:
        assert [token.id for token in engine.stream(PROMPT, max_new_tokens=24, temperature=0)] == written[:new]
        rows = engine.generate([PROMPT, [*PROMPT, written[0]], written[6:7]], max_new_tokens=24, temperature=0)
        assert [row.finish_reason for row in rows[:2]] == ["stop", "stop"]
        assert rows[2].new_tokens >= 1  # one in the prompt ends nothing


@pytest.mark.parametrize("odd", [True, "50256", 1.5, {"a": 1}, [1, None], [[1]]])
def test_end_tokens_that_are_none(tmp_path, odd):
    with pytest.raises(UnsupportedModel, match="eos_token_id"):
        open_model(folder(tmp_path, None, odd))


def test_a_generation_config_that_is_not_json(tmp_path):
    (folder(tmp_path, None, GONE) / "generation_config.json").write_bytes(b"{")
    with pytest.raises(CheckpointDamaged, match=r"generation_config\.json is not plain JSON"):
        open_model(tmp_path)


def test_names_and_the_demo_go_on_as_before():
    assert open_model("gpt2").end_tokens == open_model("demo").end_tokens == ()


def test_an_end_token_makes_no_text_and_lets_go_of_what_was_held():
    class Letters:
        n_vocab, start_token = 256, None

        def encode(self, text, *, plain_text=False):
            return list(text.encode())

        def token_bytes(self, token):
            return bytes([token])

    row = Row(list(b"a"), Request("a", stop="xyz"), Letters(), (ord("E"),))
    pieces = [row.accept(token) for token in b"bxyE"]

    assert pieces == ["b", "", "", "xy"]
    assert (row.done, row.generation().new_text, row.generation().finish_reason) == (True, "bxy", "stop")
    assert row.generation().token_ids == list(b"abxyE")


def test_ignore_eos_on_the_command_line(capsys):
    arguments = ["generate", "a", "--model", "demo", "--backend", "eager", "-n", "3", "--ignore-eos", "--seed", "1"]
    with pytest.raises(SystemExit) as caught:
        main(arguments)

    assert caught.value.code == 0
    with Engine.load("demo", backend="eager") as engine, pytest.raises(UsageError, match="ignore_eos is 'yes'"):
        engine.generate("a", ignore_eos="yes")
