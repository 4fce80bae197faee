"""Checkpoints as they exist, against the libraries that wrote them; and as somebody malicious writes them."""

import argparse
import collections
import datetime
import enum
import json
import os
import pathlib
import pickle
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import random_network
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2DoubleHeadsModel,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
)
from transformers.activations import ACT2FN

from nanogpt_buckets import Engine, child, errors
from nanogpt_buckets.errors import BucketsError, CheckpointDamaged, ModelError, UnsupportedModel
from nanogpt_buckets.model import gpt
from nanogpt_buckets.model import pickled as pickled_module
from nanogpt_buckets.model.architecture import Architecture
from nanogpt_buckets.model.checkpoint import open_model
from nanogpt_buckets.model.pickled import read_checkpoint

SIZES = {"n_layer": 2, "n_head": 3, "n_embd": 48, "n_positions": 100, "vocab_size": 211, "initializer_range": 0.2}
IDS = [[5, 3, 200, 17, 42]]
NANO_ARGS = {
    "n_layer": 2, "n_head": 3, "n_embd": 48, "block_size": 100, "bias": True, "vocab_size": 211, "dropout": 0.0
}  # fmt: skip


def nano_state() -> dict[str, torch.Tensor]:
    state = dict(random_network(Architecture(2, 3, 48, 192, 100, 211, activation="gelu")).state_dict())
    return state | {"lm_head.weight": state["transformer.wte.weight"]}


def nano(path: Path, state: dict | None = None, args=NANO_ARGS, **more) -> Path:
    """Write what train.py writes."""
    path.parent.mkdir(exist_ok=True)
    torch.save({"model": nano_state() if state is None else state, "model_args": args} | more, path)
    return path


@pytest.fixture
def in_process(monkeypatch):
    """What a child does is done here, for its start takes seconds; that it is a child which does it, others test."""

    def run(module, request, *, on_event, **more):
        return pickled_module._handle(request, lambda event, **fields: on_event({"event": event, **fields}))

    monkeypatch.setattr(child, "run", run)
    monkeypatch.setattr(pickled_module, "_bound_memory", lambda size: None)


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def hf(folder: Path, kind=GPT2LMHeadModel, **fields):
    """A random model that transformers saved."""
    torch.manual_seed(3)
    model = kind(GPT2Config(**(SIZES | {"bos_token_id": 0, "eos_token_id": None} | fields))).eval()
    model.save_pretrained(folder)
    return model


def pickled(folder: Path, change=lambda tensors: tensors, *, shards: int = 1, zipped: bool = True) -> Path:
    """Rewrite a folder's weights as pytorch_model.bin, tied tensors stored twice as torch.save does."""
    tensors = dict(load_file(folder / "model.safetensors"))
    if "lm_head.weight" not in tensors:
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    (folder / "model.safetensors").unlink()
    names = [
        f"pytorch_model-{n + 1:05}-of-{shards:05}.bin" if shards > 1 else "pytorch_model.bin" for n in range(shards)
    ]
    tensors = change(tensors)
    places = {name: names[index % shards] for index, name in enumerate(tensors)}
    for file in names:
        held = {name: tensor for name, tensor in tensors.items() if places[name] == file}
        torch.save(held, folder / file, _use_new_zipfile_serialization=zipped)
    if shards > 1:
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def agrees(folder: Path) -> None:
    """The eager step's logits are those of AutoModelForCausalLM on the same folder."""
    with Engine.load(folder, backend="eager") as engine, torch.no_grad():
        ours, theirs = engine.logits(IDS), AutoModelForCausalLM.from_pretrained(folder)(torch.tensor(IDS)).logits[:, -1]
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def refused(path: Path, kind: type[BucketsError]) -> str:
    with pytest.raises(kind) as caught:
        open_model(path).weights("float32")
    assert caught.value.message.isprintable()
    return caught.value.message


# Hugging Face folders


@pytest.mark.parametrize("activation", sorted(set(ACT2FN) - {"prelu", "xielu"}))
def test_activations_are_those_of_transformers(tmp_path, activation):
    hf(tmp_path / "m", activation_function=activation)

    agrees(tmp_path / "m")


@pytest.mark.parametrize("activation", ["prelu", "xielu"])  # they have parameters of their own
def test_activations_with_parameters_are_refused(tmp_path, activation):
    hf(tmp_path / "m", activation_function=activation)

    assert repr(activation) in refused(tmp_path / "m", UnsupportedModel)


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(
    ("how", "tied"),
    [({}, True), ({"shards": 3}, False), ({"zipped": False}, False), ({"shards": 2, "zipped": False}, True)],
)
def test_pytorch_model_bin_alone(tmp_path, how, tied):
    hf(tmp_path / "m", tie_word_embeddings=tied)
    plain = {dtype: open_model(tmp_path / "m").weights(dtype).digest for dtype in ("float32", "bfloat16")}
    pickled(tmp_path / "m", **how)

    agrees(tmp_path / "m")
    assert {dtype: open_model(tmp_path / "m").weights(dtype).digest for dtype in plain} == plain


def test_a_safe_file_that_appears_beside_a_pickle_is_what_counts(tmp_path):
    hf(tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    pickled(tmp_path / "m")
    before = open_model(tmp_path / "m").weights("float32").digest
    tensors = {name: tensor + 1 for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})

    assert open_model(tmp_path / "m").weights("float32").digest != before


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_of_a_folder_runs_nothing(tmp_path, zipped):
    hf(tmp_path / "m")
    pickled(tmp_path / "m", lambda t: t | {"score.weight": Evil(tmp_path / "witness")}, zipped=zipped)

    assert "posix.mkdir, which is refused" in refused(tmp_path / "m", CheckpointDamaged)
    assert not (tmp_path / "witness").exists()


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("entry", [3, torch.ones(48).to_sparse(), torch.ones(2, device="meta")])
def test_a_pickle_of_a_folder_holds_plain_tensors(tmp_path, entry):
    hf(tmp_path / "m")
    pickled(tmp_path / "m", lambda t: t | {"transformer.ln_f.bias": entry})

    assert "'transformer.ln_f.bias'" in refused(tmp_path / "m", CheckpointDamaged)


@pytest.mark.usefixtures("in_process")
def test_masks_half_precision_and_bare_names_in_a_pickle(tmp_path):
    hf(tmp_path / "m")
    masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 100, 100).tril().byte() for layer in range(2)}
    pickled(
        tmp_path / "m",
        lambda t: {n.removeprefix("transformer."): x.half() for n, x in t.items() if n != "lm_head.weight"} | masks,
    )

    agrees(tmp_path / "m")


HEADS = {
    "value head of trl": {"v_head.summary.weight": (1, 48), "v_head.summary.bias": (1,)},
    "score": {"score.weight": (2, 48)},
    "of double heads": {"multiple_choice_head.summary.weight": (1, 48), "multiple_choice_head.summary.bias": (1,)},
    "hostile": {"\x1b[2Jx.weight": (3,)},
}


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_heads_of_other_tasks_are_left_out_and_said(tmp_path, head, form, caplog):
    hf(tmp_path / "m")
    plain = open_model(tmp_path / "m").weights("float32").digest
    more = {name: torch.ones(shape) for name, shape in HEADS[head].items()}
    if form == "bin":
        pickled(tmp_path / "m", lambda tensors: tensors | more)
    else:
        tensors = load_file(tmp_path / "m" / "model.safetensors")
        save_file(tensors | more, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})

    assert open_model(tmp_path / "m").weights("float32").digest == plain
    assert all(repr(name) in caplog.text for name in more)


@pytest.mark.parametrize("kind", [GPT2DoubleHeadsModel, GPT2ForSequenceClassification])
def test_classes_with_other_heads(tmp_path, kind):
    hf(tmp_path / "m", kind)

    agrees(tmp_path / "m")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_tied_folder_may_store_its_head_once_more(tmp_path, dtype):
    hf(tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    tensors = {name: tensor.half().float() for name, tensor in load_file(file).items()}
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone().to(dtype)
    save_file(tensors, file, metadata={"format": "pt"})

    agrees(tmp_path / "m")
    tensors["lm_head.weight"][210, 47] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    assert "lm_head.weight of its own" in refused(tmp_path / "m", UnsupportedModel)


def test_a_tied_folder_may_store_only_its_head(tmp_path):
    hf(tmp_path / "m")
    plain = open_model(tmp_path / "m").weights("float32").digest
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("transformer.wte.weight")
    save_file(tensors, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})

    assert open_model(tmp_path / "m").weights("float32").digest == plain


# nanoGPT checkpoints


def without(*names: str) -> dict:
    return {name: value for name, value in NANO_ARGS.items() if name not in names}


@pytest.mark.parametrize(
    "args",
    [
        without("bias"),
        without("bias", "dropout"),
        NANO_ARGS | {"vocab_size": None},
        without("vocab_size"),
        NANO_ARGS | {name: np.int64(NANO_ARGS[name]) for name in ("n_layer", "n_embd", "vocab_size")},
        NANO_ARGS | {"n_head": np.uint8(3), "dropout": np.float32(0.5)},
        NANO_ARGS | {"bias": np.True_},
        argparse.Namespace(**NANO_ARGS),
    ],
)
def test_model_arguments_as_nanogpt_means_them(tmp_path, args):
    expected = read_checkpoint(nano(tmp_path / "plain.pt"))[0]

    assert read_checkpoint(nano(tmp_path / "ckpt.pt", args=args))[0] == expected


def test_what_model_arguments_leave_out_is_gptconfigs(tmp_path):
    network = gpt.GPT(Architecture(12, 12, 48, 192, 1024, 50304, activation="gelu"))
    state = {name: torch.zeros_like(tensor) for name, tensor in network.state_dict().items()}
    state["lm_head.weight"] = state["transformer.wte.weight"]

    arch = read_checkpoint(nano(tmp_path / "ckpt.pt", state, {"n_embd": 48}))[0]

    assert arch == network.arch


@pytest.mark.parametrize(
    "prefix",
    ["", "_orig_mod.", "module.", "module._orig_mod.", "_orig_mod._orig_mod.", "_orig_mod.module.", "module.module."],
)
def test_prefixes_of_wrapped_models(tmp_path, prefix):
    plain = nano_state()
    state = {prefix + name: tensor for name, tensor in plain.items()}
    state[f"{prefix}transformer.h.0.attn.bias"] = torch.ones(1, 1, 100, 100)
    inside = {name.replace("h.1.", "h.1._orig_mod."): tensor for name, tensor in state.items()}

    expected = read_checkpoint(nano(tmp_path / "plain.pt", plain))
    for kept in (state, inside):
        arch, _, tensors = read_checkpoint(nano(tmp_path / "ckpt.pt", kept))
        assert arch == expected[0]
        assert all(torch.equal(tensor, expected[2][name]) for name, tensor in tensors.items())


@pytest.mark.usefixtures("in_process")
def test_two_names_of_one_tensor_are_refused(tmp_path):
    state = nano_state() | {"module.transformer.ln_f.bias": torch.ones(48)}

    assert "one plain tensor under the name 'transformer.ln_f.bias'" in refused(
        nano(tmp_path / "c.pt", state), CheckpointDamaged
    )


class Colour(enum.Enum):
    RED = 1


class Mine:
    def __init__(self) -> None:
        self.dataset = "mine"


HARMLESS = {
    "numpy scalar": np.float64(1.5),
    "numpy array": np.arange(4),
    "path": pathlib.PurePosixPath("out/x"),
    "namespace": argparse.Namespace(dataset="x"),
    "simple namespace": types.SimpleNamespace(a=1),
    "date": datetime.datetime(2026, 1, 2, tzinfo=datetime.timezone.utc),  # noqa: UP017
    "enum": Colour.RED,
    "own class": Mine(),
    "default dictionary": collections.defaultdict(list, {"a": [1]}),
    "queue": collections.deque([1, 2]),
    "complex": 1j,
    "range": range(3),
    "dtype": torch.bfloat16,
    "all at once": [np.int32(1), pathlib.PurePosixPath("/"), Mine(), {Colour.RED: np.float32(2)}],
}


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("what", HARMLESS)
@pytest.mark.parametrize("zipped", [True, False])
def test_harmless_objects_beside_the_weights(tmp_path, what, zipped):
    content = {"model": nano_state(), "model_args": NANO_ARGS, "config": {"dataset": "x", "y": HARMLESS[what]}}
    torch.save(content | {"extra": HARMLESS[what]}, tmp_path / "c.pt", _use_new_zipfile_serialization=zipped)

    assert open_model(tmp_path / "c.pt").dataset == "x"


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("config", [argparse.Namespace(dataset="mine"), Mine()])
def test_a_configuration_object_says_the_dataset(tmp_path, config):
    assert open_model(nano(tmp_path / "c.pt", config=config)).dataset == "mine"


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(
    "entry", ["builtins.eval", "subprocess.Popen", "os.system", "runpy.run_path", "builtins.getattr", "shutil.rmtree"]
)
def test_functions_of_pythons_own_library_are_refused_by_name(tmp_path, entry):
    module, name = entry.split(".")

    class Call:
        def __reduce__(self):
            return getattr(__import__(module), name), (f"mkdir {tmp_path}/witness",)

    message = refused(nano(tmp_path / "c.pt", extra=Call()), CheckpointDamaged)
    assert f"{name}, which is refused" in message
    assert not (tmp_path / "witness").exists()


@pytest.mark.usefixtures("in_process")
def test_an_object_in_place_of_a_tensor_is_named(tmp_path):
    state = nano_state() | {"transformer.ln_f.bias": np.ones(48)}

    assert "'transformer.ln_f.bias'" in refused(nano(tmp_path / "c.pt", state), CheckpointDamaged)


# hostile files


@pytest.mark.parametrize("form", ["nanogpt", "folder"])
def test_a_few_bytes_are_no_large_model(tmp_path, form):
    shape = (1, 1)
    if form == "nanogpt":
        args = {"n_layer": 1, "n_head": 1, "n_embd": 4096, "block_size": 4096, "bias": False, "vocab_size": 40960}
        arch = Architecture(1, 1, 4096, 4 * 4096, 4096, 40960, bias=False)
    else:
        hf(tmp_path / "m")
        config = json.loads((tmp_path / "m" / "config.json").read_text()) | {"n_embd": 4096, "n_head": 1}
        (tmp_path / "m" / "config.json").write_text(json.dumps(config))
        (tmp_path / "m" / "model.safetensors").unlink()
        arch = open_model(tmp_path / "m").architecture
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in gpt.GPT(arch).state_dict().items()}
    # one number, seen as a matrix
    state = {name: torch.zeros(shape[: len(size)]).expand(size) for name, size in shapes.items()}
    if form == "nanogpt":
        path = nano(tmp_path / "c.pt", state, args)
    else:
        path = tmp_path / "m"
        torch.save(state, path / "pytorch_model.bin")

    assert "bytes cannot hold" in refused(path, CheckpointDamaged)


@pytest.mark.parametrize(
    "sizes", [{"n_layer": 10**9}, {"n_embd": 3 * 10**9}, {"vocab_size": 10**12}, {"n_inner": 10**11}]
)
def test_sizes_that_no_model_has(tmp_path, sizes):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"} | sizes))

    refused(tmp_path, UnsupportedModel)


def test_a_compressed_checkpoint_is_refused(tmp_path):
    path = nano(tmp_path / "plain.pt")
    with zipfile.ZipFile(path) as plain, zipfile.ZipFile(tmp_path / "c.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        for part in plain.namelist():
            packed.writestr(part, plain.read(part))

    assert "is compressed" in refused(tmp_path / "c.pt", CheckpointDamaged)


@pytest.mark.parametrize("zipped", [True, False])
def test_memory_is_bounded(tmp_path, zipped):
    class Large:
        def __reduce__(self):
            return bytearray, (3_000_000_000,)

    content = {"model": nano_state(), "model_args": NANO_ARGS, "extra": Large()}
    torch.save(content, tmp_path / "c.pt", _use_new_zipfile_serialization=zipped)

    assert "more memory than its" in refused(tmp_path / "c.pt", CheckpointDamaged)


@pytest.mark.parametrize("name", ["ckpt.pt", "config.json"])
@pytest.mark.parametrize("kind", ["fifo", "device", "directory"])
def test_what_is_no_regular_file_is_never_opened(tmp_path, name, kind):
    path = tmp_path / name
    {"fifo": os.mkfifo, "device": lambda p: p.symlink_to("/dev/zero"), "directory": os.mkdir}[kind](path)

    refused(tmp_path, ModelError)
    refused(path, ModelError)


@pytest.mark.parametrize("kind", ["fifo", "device", "directory"])
@pytest.mark.parametrize(
    "name", ["model.safetensors", "pytorch_model.bin", "shard.safetensors", "shard.bin", "generation_config.json"]
)
def test_no_file_of_a_folder_is_opened_unless_it_is_regular(tmp_path, name, kind):
    hf(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    {"fifo": os.mkfifo, "device": lambda p: p.symlink_to("/dev/zero"), "directory": os.mkdir}[kind](tmp_path / name)
    if name == "generation_config.json":
        assert open_model(tmp_path).end_tokens == ()
        return
    (tmp_path / "model.safetensors").unlink(missing_ok=True) if name.endswith(".bin") else None
    if name.startswith("shard"):
        (tmp_path / "model.safetensors").unlink(missing_ok=True)
        index = "model.safetensors.index.json" if name.endswith("rs") else "pytorch_model.bin.index.json"
        (tmp_path / index).write_text(json.dumps({"weight_map": {"transformer.wte.weight": name}}))

    refused(tmp_path, CheckpointDamaged)


def test_a_config_without_end_is_not_read(tmp_path):
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(10**10)

    assert "is longer than" in refused(tmp_path, CheckpointDamaged)


ESC = "\x1b]0;owned\x07\x1b[2J\u202e"


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": ESC}, {"activation_function": ESC}, {"architectures": [ESC]}, {"n_layer": ESC},
        {"eos_token_id": ESC}, {"layer_norm_epsilon": ESC}, {"tie_word_embeddings": ESC},
    ],
)  # fmt: skip
def test_escape_sequences_of_a_config_reach_no_message(tmp_path, fields):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"} | fields))

    refused(tmp_path, ModelError)


def test_escape_sequences_of_a_checkpoint_reach_no_message(tmp_path):
    refused(nano(tmp_path / "a.pt", args=NANO_ARGS | {ESC: 1}), UnsupportedModel)
    refused(nano(tmp_path / "b.pt", nano_state() | {ESC: 1}), CheckpointDamaged)
    refused(nano(tmp_path / "c.pt", nano_state() | {ESC: torch.ones(1)}), CheckpointDamaged)
    (tmp_path / "d.pt").write_bytes(b"\x80\x02c" + ESC.encode() + b"\nx\n.")
    refused(tmp_path / "d.pt", CheckpointDamaged)
    refused(tmp_path / ESC.replace("/", ""), ModelError)


def test_every_message_is_safe_on_a_terminal():
    error = errors.CacheError(f"a {ESC}\nb", hint=ESC)

    assert str(error) == error.message == r"a \x1b]0;owned\x07\x1b[2J\u202e\nb"
    assert error.hint.isprintable()
    again = pickle.loads(pickle.dumps(error))
    assert (again.message, again.hint) == (error.message, error.hint)


def test_the_command_line_shows_escape_sequences_and_obeys_none(tmp_path):
    import pty

    model = nano(tmp_path / ESC.replace("/", "") / "ckpt.pt", args=NANO_ARGS | {ESC: 1})
    parent, child = pty.openpty()
    command = [sys.executable, "-m", "nanogpt_buckets", "generate", ESC, "--model", str(model.parent)]
    run = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=child, stderr=child, check=False)
    said = os.read(parent, 100_000)

    assert run.returncode == 1
    assert b"\x1b" not in said
    assert rb"\x1b[2J" in said
