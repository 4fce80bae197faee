"""What a model's name means, and that prepared weights are exactly the model's: nothing lost, guessed or run."""

import json
import os
import pickle
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import safetensors
import torch
from networks import random_network
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig

from nanogpt_buckets import child
from nanogpt_buckets.errors import (
    BucketsError,
    CacheError,
    CheckpointDamaged,
    ChildFailed,
    ModelError,
    ModelNotFound,
    UnsupportedModel,
    UsageError,
)
from nanogpt_buckets.model import checkpoint, gpt, huggingface, pickled, prepared
from nanogpt_buckets.model.architecture import GPT2_SIZES, Architecture
from nanogpt_buckets.model.checkpoint import open_model

TINY = Architecture(n_layer=2, n_head=3, n_embd=48, n_inner=192, block_size=100, vocab_size=211)
NANO_ARGS = {
    "n_layer": 2,
    "n_head": 3,
    "n_embd": 48,
    "block_size": 100,
    "bias": True,
    "vocab_size": 211,
    "dropout": 0.0,
}


@pytest.fixture
def local(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOGPT_BUCKETS_LOCAL_DIR", str(tmp_path / "local"))
    return tmp_path / "local"


@pytest.fixture
def folder(tmp_path, odd_folder):
    """A copy of a folder that transformers saved, to be spoilt."""
    return Path(shutil.copytree(odd_folder, tmp_path / "odd"))


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def weights_refused(folder: Path, kind: type[BucketsError]) -> str:
    with pytest.raises(kind) as caught:
        open_model(folder).weights("float32")
    assert type(caught.value) is kind
    return one_sentence(caught.value)


def one_sentence(error: BucketsError) -> str:
    assert "\n" not in error.message
    assert not error.message.endswith(".")
    return error.message


def no_reading(monkeypatch: pytest.MonkeyPatch, *, allow: Path) -> None:
    """Let nothing but prepared files be opened, and no child be started."""
    opened = safetensors.safe_open

    def guarded(path, *args, **kwargs):
        assert Path(path).is_relative_to(allow), f"{path} was opened"
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(safetensors, "safe_open", guarded)
    monkeypatch.setattr(child, "run", lambda *a, **k: pytest.fail("a child was started"))


# names


def test_fixed_names_need_neither_torch_nor_network():
    code = (
        "import sys; from nanogpt_buckets.model.checkpoint import open_model\n"
        "for name in ('gpt2', 'openai-community/gpt2-xl', 'demo'): print(open_model(name).name)\n"
        "assert not {'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert run.stdout.split() == ["gpt2", "gpt2-xl", "demo"]


def test_a_folder_needs_no_torch(odd_folder):
    code = (
        "import sys; from nanogpt_buckets.model.checkpoint import open_model\n"
        "open_model(sys.argv[1]); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(odd_folder)], check=True)


@pytest.mark.parametrize("size", GPT2_SIZES)
def test_gpt2_by_either_name(size):
    model = open_model(size)

    assert open_model(f"openai-community/{size}") == model
    assert (model.name, model.kind, model.path, model.architecture) == (size, "gpt2", None, GPT2_SIZES[size])
    assert (model.dataset, model.characters) == (None, None)


def test_fixed_names_win_over_folders_unless_written_as_a_path(folder, tmp_path, monkeypatch):
    folder.rename(tmp_path / "gpt2")
    monkeypatch.chdir(tmp_path)

    assert open_model("gpt2").kind == "gpt2"
    assert open_model("./gpt2").kind == "huggingface"
    assert open_model(Path("gpt2")).kind == "huggingface"
    assert open_model("./gpt2").path == tmp_path / "gpt2"


@pytest.mark.parametrize("name", ["nope", "gpt3", "openai-community/nope", "", "a\0b", "demo2", "~nobody-here/x"])
def test_an_unknown_name_is_told_what_is_accepted(name):
    with pytest.raises(ModelNotFound) as caught:
        open_model(name)

    assert all(word in caught.value.hint for word in ("gpt2-xl", "demo", "config.json", "ckpt.pt"))
    one_sentence(caught.value)


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(ModelNotFound, match=r"neither config\.json nor ckpt\.pt"):
        open_model(tmp_path)


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        ("out", "out"),
        ("my model (2)", "my-model-2-"),
        (".hidden", "hidden"),
        ("дом", "-"),
        ("...", "model"),
        ("x" * 200, "x" * 80),
    ],
)
def test_a_folder_is_called_by_its_name_and_architecture(folder, tmp_path, base, expected):
    (tmp_path / "in").mkdir()
    moved = folder.rename(tmp_path / "in" / base)

    model = open_model(f"{moved}{os.sep}")

    start, digits = model.name.rsplit("-", 1)
    assert start == expected
    assert len(digits) == 8
    assert model.path == moved
    edit_config(moved, layer_norm_epsilon=1e-4)
    assert open_model(moved).name != model.name


# the demo


def test_the_demo_is_complete():
    model = open_model("demo")
    weights = model.weights("float32")

    assert (model.name, model.kind, model.path) == ("demo", "demo", None)
    assert model.architecture.vocab_size == len(model.characters) == len(set(model.characters))
    stored = load_file(Path(checkpoint.__file__).parent / "demo" / "model.safetensors")
    assert weights.tensors.keys() == stored.keys()
    assert all(torch.equal(weights.tensors[name], tensor.float()) for name, tensor in stored.items())
    assert gpt.from_weights(model.architecture, weights.tensors)(torch.zeros(1, 4, dtype=torch.int)).isfinite().all()


# prepared weights


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_prepared_weights_are_mapped_contiguous_and_exact(folder, local, dtype):
    model = open_model(folder)
    weights = model.weights(dtype)
    oracle = GPT2LMHeadModel.from_pretrained(folder).transformer.state_dict()

    assert weights.path == local / "weights" / f"{weights.digest}.safetensors"
    assert "lm_head.weight" not in weights.tensors
    for name, tensor in weights.tensors.items():
        theirs = oracle[name.removeprefix("transformer.")]
        theirs = theirs.t() if "c_" in name and name.endswith("weight") else theirs
        assert torch.equal(tensor, theirs.to(getattr(torch, dtype)))
        assert tensor.is_contiguous()
        assert not weights.path.stat().st_mode & 0o077
    assert stat.S_IMODE((local / "weights").stat().st_mode) == stat.S_IMODE(local.stat().st_mode) == 0o700
    assert [path.name for path in (local / "weights").iterdir()] == [weights.path.name]
    network = gpt.from_weights(model.architecture, weights.tensors)
    assert all(p.data_ptr() == weights.tensors[n].data_ptr() for n, p in network.named_parameters())


def test_tensors_are_views_of_the_file(folder, local):
    weights = open_model(folder).weights("float32")
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    ranges = [[int(end, 16) for end in line[0].split("-")] for line in maps if line[-1] == str(weights.path)]

    assert ranges
    for tensor in weights.tensors.values():
        assert any(start <= tensor.data_ptr() < end for start, end in ranges)


def test_the_digest_is_of_canonical_tensors_and_nothing_else(folder, local):
    import hashlib

    weights = open_model(folder).weights("float32")

    expected = hashlib.sha256()
    for name, tensor in sorted(weights.tensors.items()):
        line = {"dtype": "float32", "name": name, "shape": list(tensor.shape)}
        expected.update(
            json.dumps(line, separators=(",", ":")).encode() + b"\n" + tensor.numpy().astype("<f4").tobytes()
        )
    assert weights.digest == expected.hexdigest()


def test_the_digest_does_not_depend_on_how_weights_are_stored(folder, local, tmp_path):
    whole = open_model(folder).weights("float32")
    network = GPT2LMHeadModel.from_pretrained(folder)
    network.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    network.transformer.save_pretrained(tmp_path / "bare")  # GPT2Model: names without a prefix
    masks = {"h.0.attn.bias": torch.ones(1, 1, 9, 9), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    edit_tensors(tmp_path / "bare", lambda tensors: tensors.update(masks))

    assert open_model(tmp_path / "shards").weights("float32").digest == whole.digest
    assert open_model(tmp_path / "bare").weights("float32").digest == whole.digest
    assert open_model(folder).weights("bfloat16").digest != whole.digest
    assert len(list((local / "weights").iterdir())) == 2


def test_one_changed_element_changes_the_digest(folder, local):
    before = open_model(folder).weights("float32").digest
    edit_tensors(folder, lambda tensors: tensors["transformer.h.1.mlp.c_fc.weight"][3, 5].add_(1e-3))

    assert open_model(folder).weights("float32").digest != before


def test_the_second_time_nothing_is_read(folder, local, monkeypatch):
    first = {dtype: open_model(folder).weights(dtype).digest for dtype in ("float32", "bfloat16")}
    no_reading(monkeypatch, allow=local)

    for dtype, digest in first.items():
        assert open_model(folder).weights(dtype).digest == digest


def test_a_touched_source_is_read_again(folder, local, monkeypatch):
    digest = open_model(folder).weights("float32").digest
    os.utime(folder / "model.safetensors", ns=(1, 1))
    assert open_model(folder).weights("float32").digest == digest
    no_reading(monkeypatch, allow=local)
    assert open_model(folder).weights("float32").digest == digest

    os.utime(folder / "model.safetensors", ns=(2, 2))
    with pytest.raises(AssertionError, match="was opened"):
        open_model(folder).weights("float32")


def test_an_unsharded_file_that_appears_beside_shards_is_noticed(folder, local, tmp_path):
    network = GPT2LMHeadModel.from_pretrained(folder)
    network.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    before = open_model(tmp_path / "shards").weights("float32").digest
    edit_tensors(folder, lambda tensors: tensors["transformer.wpe.weight"].add_(1))
    shutil.copy(folder / "model.safetensors", tmp_path / "shards")

    assert open_model(tmp_path / "shards").weights("float32").digest != before


@pytest.mark.parametrize("left", [None, b"", b"\x08\x00\x00\x00\x00\x00\x00\x00{}", "half"])
def test_a_missing_or_damaged_prepared_file_is_made_again(folder, local, left):
    weights = open_model(folder).weights("float32")
    content, digest = weights.path.read_bytes(), weights.digest
    del weights
    path = local / "weights" / f"{digest}.safetensors"
    path.unlink()
    if left is not None:
        path.write_bytes(content[: len(content) // 2] if left == "half" else left)

    again = open_model(folder).weights("float32")

    assert again.digest == digest
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    "note", [b"", b"[]", b"{}", b"nul", b"[" * 100_000, b"\xff", b'{"files": 3}', b'{"files": [[1]]}']
)
def test_a_malformed_sidecar_is_ignored(folder, local, note):
    digest = open_model(folder).weights("float32").digest
    (sidecar,) = (local / "sources").iterdir()
    good = json.loads(sidecar.read_bytes())
    sidecar.write_bytes(note)

    assert open_model(folder).weights("float32").digest == digest
    assert json.loads(sidecar.read_bytes()) == good


@pytest.mark.parametrize(
    "change",
    [
        {"digest": "../../etc/passwd"},
        {"digest": 3},
        {"architecture": {}},
        {"architecture": {"n_layer": 1}},
        {"dataset": 3},
        {"format": 1},
        {"source": "/elsewhere"},
        {"files": []},
    ],
)
def test_a_sidecar_with_impossible_values_is_ignored(folder, local, change):
    digest = open_model(folder).weights("float32").digest
    (sidecar,) = (local / "sources").iterdir()
    good = json.loads(sidecar.read_bytes())
    sidecar.write_text(json.dumps(good | change))

    assert open_model(folder).weights("float32").digest == digest
    assert json.loads(sidecar.read_bytes()) == good


def test_what_killed_processes_left_is_swept_when_old(folder, local):
    for name, age in (("tmp-old", 1), ("tmp-new", 2**33)):
        (local / "weights" / name).mkdir(parents=True)
        (local / "weights" / name / "prepared.safetensors").write_bytes(b"x")
        os.utime(local / "weights" / name, (age, age))

    open_model(folder).weights("float32")

    assert not (local / "weights" / "tmp-old").exists()
    assert (local / "weights" / "tmp-new").exists()


@pytest.mark.parametrize("kind", ["a file", "full"])
def test_a_local_directory_that_cannot_be_written(folder, local, kind, monkeypatch):
    if kind == "a file":
        local.write_bytes(b"")
    else:
        monkeypatch.setattr(
            os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        )
    with pytest.raises(CacheError, match="cannot be written") as caught:
        open_model(folder).weights("float32")

    assert "NANOGPT_BUCKETS_LOCAL_DIR" in caught.value.hint
    assert str(local) in one_sentence(caught.value)
    assert kind == "a file" or list((local / "weights").iterdir()) == []


def test_an_unknown_dtype():
    with pytest.raises(UsageError, match="'float16' is not one of float32, bfloat16"):
        open_model("demo").weights("float16")


# Hugging Face folders


# Bookkeeping, training, generation and the heads of other tasks.
IRRELEVANT = (
    "transformers_version", "output_hidden_states", "output_attentions", "return_dict", "dtype", "torch_dtype",
    "chunk_size_feed_forward", "id2label", "label2id", "problem_type", "resid_pdrop", "embd_pdrop", "attn_pdrop",
    "initializer_range", "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels",
    "summary_first_dropout", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id",
    "_name_or_path", "n_ctx", "gradient_checkpointing", "task_specific_params",
)  # fmt: skip


def test_every_field_of_the_config_is_accounted_for():
    tables = {*huggingface.HONOURED, *huggingface.REFUSED, "model_type", "architectures", *IRRELEVANT}

    assert set(GPT2Config().to_dict()) - tables == set()
    assert huggingface.ALIASES.items() == GPT2Config.attribute_map.items()
    defaults = GPT2Config().to_dict()
    assert {name: default for name, (_, default) in huggingface.HONOURED.items()} == {
        name: defaults[name] for name in huggingface.HONOURED
    }


def test_an_empty_config_has_the_defaults_of_transformers(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')

    assert open_model(tmp_path).architecture == GPT2_SIZES["gpt2"]


def test_second_names_of_fields(tmp_path):
    config = {"model_type": "gpt2", "hidden_size": 48, "num_attention_heads": 3, "num_hidden_layers": 2,
              "max_position_embeddings": 100, "vocab_size": 211}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert open_model(tmp_path).architecture == TINY

    (tmp_path / "config.json").write_text(json.dumps(config | {"n_embd": 96}))
    with pytest.raises(UnsupportedModel, match="both n_embd and hidden_size"):
        open_model(tmp_path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"add_cross_attention": True}, "add_cross_attention"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder"),
        ({"activation_function": "prelu"}, "'prelu'"),
        ({"activation_function": ["gelu"]}, "activation_function"),
        ({"model_type": "llama"}, "'llama'"),
        ({"model_type": None}, "None"),
        ({"architectures": ["GPT2ForAnything"]}, "GPT2ForAnything"),
        ({"architectures": 3}, "3"),
        ({"n_head": 5}, "n_head"),
        ({"n_layer": -1}, "n_layer"),
        ({"n_embd": "48"}, "n_embd"),
        ({"n_inner": 1.5}, "n_inner"),
        ({"layer_norm_epsilon": 0}, "layer_norm_epsilon"),
        ({"tie_word_embeddings": "yes"}, "tied"),
    ],
)
def test_what_would_not_be_exact_is_refused_by_name(folder, change, named):
    edit_config(folder, **change)
    with pytest.raises(UnsupportedModel) as caught:
        open_model(folder)

    assert named in one_sentence(caught.value)


def test_a_llama_folder_is_refused_by_name(tmp_path):
    LlamaConfig(hidden_size=48, num_attention_heads=3).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match="'llama'"):
        open_model(tmp_path)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", b"[" * 100_000])
def test_a_config_that_is_not_json(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointDamaged, match=r"config\.json is not"):
        open_model(tmp_path)


def test_a_head_of_its_own_contradicts_a_tied_config(folder):
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"].clone()}))
    digest = open_model(folder).weights("float32").digest

    edit_tensors(folder, lambda t: t["lm_head.weight"][0, 0].add_(1))
    assert "lm_head.weight" in weights_refused(folder, UnsupportedModel)

    edit_config(folder, tie_word_embeddings=False)
    assert open_model(folder).weights("float32").digest != digest


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop("transformer.h.1.ln_2.bias"), "lacks the tensor transformer.h.1.ln_2.bias"),
        (lambda t: t.pop("transformer.wte.weight"), "lacks the tensor transformer.wte.weight"),
        (lambda t: t.update({"transformer.h.2.ln_1.bias": torch.ones(48)}), "'transformer.h.2.ln_1.bias'"),
        (lambda t: t.update({"h.0.crossattention.c_attn.weight": torch.ones(2)}), "crossattention"),
        (lambda t: t.update({"lm_head.bias": torch.ones(211)}), "lm_head.bias"),
        (lambda t: t.update({"wpe.weight": torch.ones(2)}), "twice"),
        (lambda t: t.update({"transformer.wpe.weight": torch.ones(101, 48)}), "shape [101, 48]"),
        (lambda t: t.update({"transformer.h.0.mlp.c_fc.weight": torch.ones(192, 48)}), "shape [48, 192]"),
        (lambda t: t.update({"transformer.h.0.mlp.c_fc.weight": torch.ones(1, 48, 192)}), "shape [192, 48, 1]"),
    ],
)
def test_wrong_tensors_are_named(folder, local, change, named):
    edit_tensors(folder, change)

    assert named in weights_refused(folder, CheckpointDamaged)
    assert not (local / "weights").exists()


def test_integers_are_not_weights(folder, local):
    edit_tensors(folder, lambda t: t.update({"transformer.wpe.weight": torch.ones(100, 48, dtype=torch.int8)}))

    assert "transformer.wpe.weight is stored as torch.int8" in weights_refused(folder, UnsupportedModel)
    assert list((local / "weights").iterdir()) == []


@pytest.mark.parametrize("keep", [0, 4, 100, 5000, -1])
def test_truncated_safetensors(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])

    assert "is truncated or is not " in weights_refused(folder, CheckpointDamaged)


def test_a_folder_without_weights_has_an_architecture(folder):
    (folder / "model.safetensors").unlink()

    assert open_model(folder).architecture == TINY
    assert "model.safetensors is missing" in weights_refused(folder, CheckpointDamaged)


@pytest.mark.parametrize(
    "name",
    [
        "../odd2/model.safetensors",
        "/etc/passwd",
        "..",
        "a/b.safetensors",
        "a\\b.safetensors",
        "",
        3,
        "x.bin",
        ".s.safetensors",
    ],
)
def test_an_index_names_only_files_of_its_folder(folder, name):
    (folder / "model.safetensors").rename(folder / "elsewhere.safetensors")
    index = {"weight_map": {"transformer.wte.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    assert "not a plain file name" in weights_refused(folder, CheckpointDamaged)


@pytest.mark.parametrize("index", ["{}", '{"weight_map": []}', '{"weight_map": {"a": "gone.safetensors"}}'])
def test_an_index_that_leads_nowhere(folder, index):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(index)

    weights_refused(folder, CheckpointDamaged)


# OpenAI's weights


def fake_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repository: str, source: Path) -> None:
    """Lay out Hugging Face's cache by hand, and let nothing be downloaded."""
    root = tmp_path / "hub" / f"models--{repository.replace('/', '--')}"
    snapshot, blobs = root / "snapshots" / ("0" * 40), root / "blobs"
    for directory in (snapshot, blobs, root / "refs"):
        directory.mkdir(parents=True)
    (root / "refs" / "main").write_text("0" * 40)
    shutil.copy(source, blobs / "abc")
    (snapshot / "model.safetensors").symlink_to("../../blobs/abc")
    no_network(tmp_path, monkeypatch)


def no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lookup = huggingface_hub.try_to_load_from_cache
    monkeypatch.setattr(
        huggingface_hub, "try_to_load_from_cache", lambda repo, file: lookup(repo, file, cache_dir=tmp_path / "hub")
    )

    def refuse(*args, **kwargs):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network\nat all")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)


@pytest.mark.parametrize("repository", ["openai-community/gpt2", "gpt2"])
def test_gpt2_is_found_in_the_hubs_cache(odd_folder, tmp_path, local, monkeypatch, repository):
    monkeypatch.setitem(GPT2_SIZES, "gpt2", TINY)
    fake_hub(tmp_path, monkeypatch, repository, odd_folder / "model.safetensors")

    weights = open_model("gpt2").weights("float32")

    assert weights.digest == open_model(odd_folder).weights("float32").digest
    no_reading(monkeypatch, allow=local)
    assert open_model("gpt2").weights("float32").digest == weights.digest


def test_gpt2_is_downloaded_otherwise(odd_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(GPT2_SIZES, "gpt2-medium", TINY)
    no_network(tmp_path, monkeypatch)
    asked = []

    def download(*args):
        asked.append(args)
        return str(odd_folder / "model.safetensors")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    open_model("gpt2-medium").weights("float32")

    assert asked == [("openai-community/gpt2-medium", "model.safetensors")]


def test_weights_of_another_size_are_refused(odd_folder, tmp_path, monkeypatch):
    fake_hub(tmp_path, monkeypatch, "gpt2", odd_folder / "model.safetensors")

    assert "shape [211, 48]; the model needs [50257, 768]" in weights_refused("gpt2", CheckpointDamaged)


def test_gpt2_without_network_says_what_works(tmp_path, monkeypatch):
    no_network(tmp_path, monkeypatch)
    with pytest.raises(ModelNotFound, match="weights of gpt2-large") as caught:
        open_model("gpt2-large").weights("float32")

    one_sentence(caught.value)
    assert "demo" in caught.value.hint
    assert "folder" in caught.value.hint


def test_gpt2_with_the_real_hub_offline(tmp_path):
    code = "from nanogpt_buckets.model.checkpoint import open_model; open_model('gpt2').weights('float32')"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        environment.pop(name, None)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)

    assert "nanogpt_buckets.errors.ModelNotFound: the weights of gpt2 are not in" in run.stderr


# nanoGPT checkpoints


def nano_state(*, tied: bool = True, vocab_size: int = 211, seed: int = 0) -> dict[str, torch.Tensor]:
    arch = Architecture(2, 3, 48, 192, 100, vocab_size, activation="gelu", tied=tied)
    state = dict(random_network(arch, seed=seed).state_dict())
    if tied:
        state["lm_head.weight"] = state["transformer.wte.weight"]
    return state


def nano(path: Path, state: dict | None = None, args: dict | None = None, **more) -> Path:
    """Write what train.py writes; an argument that is None leaves nothing out."""
    content = {
        "model": nano_state() if state is None else state,
        "optimizer": {
            "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(4)}},
            "param_groups": [{"lr": 0.1}],
        },
        "model_args": NANO_ARGS if args is None else args,
        "iter_num": 250,
        "best_val_loss": torch.tensor(1.5),
        "config": {"dataset": "shakespeare_char", "out_dir": "out", "eval_interval": 250, "compile": True},
    }
    path.parent.mkdir(exist_ok=True)
    torch.save(content | more, path)
    return path


def test_a_checkpoint_is_opened_by_file_or_folder(tmp_path, local, monkeypatch):
    path = nano(tmp_path / "out" / "ckpt.pt")
    model = open_model(path)

    assert open_model(tmp_path / "out") == model
    assert open_model(str(tmp_path / "out" / ".." / "out")) == model
    assert model.name.startswith("out-")
    assert (model.kind, model.path, model.dataset) == ("nanogpt", path, "shakespeare_char")
    assert model.architecture == Architecture(2, 3, 48, 192, 100, 211, activation="gelu")
    assert open_model(shutil.copy(path, tmp_path / "best model.pt")).name == model.name.replace("out", "best-model")
    float32, bfloat16 = model.weights("float32"), model.weights("bfloat16")
    assert all(torch.equal(float32.tensors[name].bfloat16(), tensor) for name, tensor in bfloat16.tensors.items())

    no_reading(monkeypatch, allow=local)
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("the checkpoint was opened"))
    assert open_model(path) == model
    assert open_model(path).weights("bfloat16").digest == bfloat16.digest


def test_a_remembered_checkpoint_needs_no_torch(tmp_path):
    path = nano(tmp_path / "ckpt.pt")
    open_model(path)
    code = "import sys; from nanogpt_buckets.model.checkpoint import open_model; open_model(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code + "; assert 'torch' not in sys.modules", str(path)], check=True)


def test_a_checkpoint_that_training_overwrites(tmp_path):
    model = open_model(nano(tmp_path / "ckpt.pt"))
    before = model.weights("float32").digest
    nano(tmp_path / "ckpt.pt", nano_state(seed=1))

    assert model.weights("float32").digest != before

    nano(tmp_path / "ckpt.pt", nano_state(vocab_size=65), NANO_ARGS | {"vocab_size": 65})
    open_model(tmp_path / "ckpt.pt")  # what is remembered now is the other model's
    with pytest.raises(ModelError, match="replaced by a checkpoint of another architecture"):
        model.weights("float32")


def read(path: Path) -> tuple[Architecture, str | None, dict[str, torch.Tensor]]:
    return pickled.read_checkpoint(path)  # what the child does


def test_names_of_compiled_models_and_masks(tmp_path):
    plain = nano_state()
    state = {f"_orig_mod.{name}": tensor for name, tensor in plain.items()}
    state["_orig_mod.transformer.h.0.attn.bias"] = torch.ones(1, 1, 100, 100).tril()

    arch, _, tensors = read(nano(tmp_path / "ckpt.pt", state))

    assert tensors.keys() == prepared.canonical_shapes(arch).keys()
    assert all(torch.equal(tensor, plain[name]) for name, tensor in tensors.items())


def test_tied_is_decided_by_the_tensors(tmp_path):
    equal = nano_state()
    equal["lm_head.weight"] = equal["lm_head.weight"].clone()
    assert read(nano(tmp_path / "equal.pt", equal))[0].tied

    equal["lm_head.weight"][7, 7] += 1e-6
    arch, _, tensors = read(nano(tmp_path / "untied.pt", equal))
    assert not arch.tied
    assert "lm_head.weight" in tensors


def test_a_padded_vocabulary(tmp_path):
    state = nano_state(vocab_size=50304)

    assert read(nano(tmp_path / "c.pt", state, NANO_ARGS | {"vocab_size": 50304}))[0].vocab_size == 50304


@pytest.mark.parametrize(
    ("args", "kind", "named"),
    [
        (NANO_ARGS | {"n_kv_head": 1}, UnsupportedModel, "'n_kv_head'"),
        ({k: v for k, v in NANO_ARGS.items() if k != "n_embd"}, CheckpointDamaged, "bytes cannot hold"),
        (NANO_ARGS | {"n_head": 7}, UnsupportedModel, "n_head 7"),
        (NANO_ARGS | {"n_embd": "48"}, UnsupportedModel, "n_embd"),
        (NANO_ARGS | {"block_size": 101}, CheckpointDamaged, "shape"),
        (NANO_ARGS | {"n_embd": 96}, CheckpointDamaged, "bytes cannot hold"),
        (NANO_ARGS | {"n_layer": 3}, CheckpointDamaged, "transformer.h.2.ln_1.weight"),
        (NANO_ARGS | {"n_layer": 1000}, CheckpointDamaged, "bytes cannot hold"),
        (NANO_ARGS | {"n_layer": 10**9}, UnsupportedModel, "more layers or parameters"),
        (NANO_ARGS | {"n_embd": 10**400}, UnsupportedModel, "more layers or parameters"),
        (NANO_ARGS | {"n_layer": 1}, CheckpointDamaged, "transformer.h.1"),
        (NANO_ARGS | {"bias": False}, CheckpointDamaged, "bias"),
        (NANO_ARGS | {"bias": None}, UnsupportedModel, "bias"),
        (3, CheckpointDamaged, "no model_args"),
    ],
)
def test_wrong_model_arguments_are_named(tmp_path, args, kind, named):
    path = nano(tmp_path / "ckpt.pt", args=args)
    with pytest.raises(kind) as caught:
        read(path)

    assert type(caught.value) is kind
    assert named in one_sentence(caught.value)


def test_dropout_may_be_missing_and_config_too(tmp_path):
    args = {name: value for name, value in NANO_ARGS.items() if name != "dropout"}

    assert read(nano(tmp_path / "ckpt.pt", args=args, config=None))[1] is None


@pytest.mark.parametrize("entry", [3, "x", torch.ones(48).to_sparse(), torch.ones(48, device="meta")])
def test_an_entry_that_is_no_plain_tensor(tmp_path, entry):
    path = nano(tmp_path / "ckpt.pt", nano_state() | {"transformer.ln_f.bias": entry})
    with pytest.raises(CheckpointDamaged, match=r"transformer\.ln_f\.bias"):
        read(path)


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ["zip", "legacy", "plain pickle"])
def test_nothing_that_a_checkpoint_names_is_run(tmp_path, form):
    path, witness = tmp_path / "ckpt.pt", tmp_path / "witness"
    content = {"model": nano_state(), "model_args": NANO_ARGS, "extra": Evil(witness)}
    if form == "plain pickle":
        path.write_bytes(pickle.dumps(content["extra"]))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")

    with pytest.raises(CheckpointDamaged) as caught:
        open_model(path)

    assert "posix.mkdir, which is refused" in one_sentence(caught.value) or form == "plain pickle"
    assert not witness.exists()


def test_the_form_before_zip_files(tmp_path):
    path = tmp_path / "ckpt.pt"
    content = {"model": nano_state(), "model_args": NANO_ARGS}
    torch.save(content, path, _use_new_zipfile_serialization=False)

    assert read(path)[2].keys() == prepared.canonical_shapes(read(path)[0]).keys()


@pytest.mark.parametrize("keep", [0, 1, 100, 20_000, -100])
def test_a_truncated_checkpoint(tmp_path, keep):
    path = nano(tmp_path / "ckpt.pt")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointDamaged, match="is truncated or is not a nanoGPT checkpoint") as caught:
        read(path)

    one_sentence(caught.value)


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {"model": 3, "model_args": {}}, torch.ones(3)])
def test_another_file_of_torch_is_not_a_checkpoint(tmp_path, content):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(CheckpointDamaged, match="is not a nanoGPT checkpoint"):
        read(tmp_path / "x.pt")


def test_refusals_cross_the_childs_pipe_with_their_class_and_hint(tmp_path, local):
    path = nano(tmp_path / "ckpt.pt", args=NANO_ARGS | {"rope": True})
    with pytest.raises(UnsupportedModel, match="'rope'") as caught:
        open_model(path)

    assert caught.value.hint
    assert list((local / "weights").iterdir()) == []


def test_a_killed_child_is_an_error_about_the_model(tmp_path, monkeypatch):
    def killed(*args, **kwargs):
        raise ChildFailed("the child was killed by SIGKILL, most likely for want of memory")

    monkeypatch.setattr(child, "run", killed)
    with pytest.raises(ModelError, match="could not be converted: the child was killed"):
        open_model(nano(tmp_path / "ckpt.pt"))
