"""GPT-2 as transformers saves it: config.json -> Architecture, safetensors -> canonical tensors.

Whatever in a config changes the maths is honoured or refused by name; the tables below are complete for GPT2Config,
and a test keeps them so. Knows nothing of where prepared weights are kept, nor of nanoGPT's own checkpoints.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanogpt_buckets.errors import CheckpointDamaged, ModelError, UnsupportedModel
from nanogpt_buckets.model.architecture import Architecture
from nanogpt_buckets.model.convert import BUFFERS, Reader, Shape, check_shapes

if TYPE_CHECKING:
    import torch

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

# GPT2Config's field -> ours and its default; n_inner, activation and epsilon need a word more, see `_from_config`.
HONOURED: Mapping[str, tuple[str, Any]] = {
    "n_layer": ("n_layer", 12),
    "n_head": ("n_head", 12),
    "n_embd": ("n_embd", 768),
    "n_inner": ("n_inner", None),
    "n_positions": ("block_size", 1024),
    "vocab_size": ("vocab_size", 50257),
    "activation_function": ("activation", "gelu_new"),
    "layer_norm_epsilon": ("layer_norm_epsilon", 1e-5),
    "scale_attn_weights": ("scale_by_head_size", True),
    "scale_attn_by_inverse_layer_idx": ("scale_by_layer", False),
    "reorder_and_upcast_attn": ("upcast_attention", False),
    "tie_word_embeddings": ("tied", True),
}
# What transformers reads under a second name.
ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
# Refused unless empty, false or absent.
REFUSED = ("add_cross_attention", "pruned_heads", "quantization_config", "auto_map", "is_encoder_decoder")
# Checked on their own.
CHECKED = ("model_type", "architectures")
# Bookkeeping, training, generation and the heads of other tasks.
# fmt: off
IRRELEVANT = (
    "transformers_version", "output_hidden_states", "output_attentions", "return_dict", "dtype", "torch_dtype",
    "chunk_size_feed_forward", "id2label", "label2id", "problem_type", "resid_pdrop", "embd_pdrop", "attn_pdrop",
    "initializer_range", "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels",
    "summary_first_dropout", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id",
    "_name_or_path", "n_ctx", "gradient_checkpointing", "task_specific_params",
)
# fmt: on

_ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
_CLASSES = ("GPT2LMHeadModel", "GPT2Model")
_TRANSPOSED = (".attn.c_attn.weight", ".attn.c_proj.weight", ".mlp.c_fc.weight", ".mlp.c_proj.weight")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,200}\.safetensors")
_TOKENS, _HEAD = "transformer.wte.weight", "lm_head.weight"
_NOT_GPT2 = "only GPT-2 models are computed exactly"


def architecture(folder: Path) -> Architecture:
    """Read a folder's config.json.

    Raises:
        UnsupportedModel: not GPT-2, or with something that we do not compute exactly.
        CheckpointDamaged: it is not a JSON object.
    """
    config = read_json(folder / CONFIG)
    if config.get("model_type") != "gpt2":
        raise UnsupportedModel(f"{folder} is a {config.get('model_type')!r} model, not 'gpt2'", hint=_NOT_GPT2)
    classes = config.get("architectures") or []
    for name in classes if isinstance(classes, list) else [classes]:
        if name not in _CLASSES:
            raise UnsupportedModel(f"{folder} is a {name!r}, not a language model of class GPT2LMHeadModel")
    for name in REFUSED:
        if config.get(name):
            raise UnsupportedModel(f"{folder / CONFIG} sets {name}, which is not supported", hint=_NOT_GPT2)
    return _from_config(config, folder)


def _from_config(config: Mapping[str, Any], folder: Path) -> Architecture:
    values = {ours: _value(config, theirs, default, folder) for theirs, (ours, default) in HONOURED.items()}
    if values["n_inner"] is None and isinstance(values["n_embd"], int):
        values["n_inner"] = 4 * values["n_embd"]
    activation = values["activation"]
    if not isinstance(activation, str) or activation not in _ACTIVATIONS:
        raise UnsupportedModel(
            f"{folder / CONFIG} has activation_function {activation!r}, which is not supported",
            hint=f"supported: {', '.join(_ACTIVATIONS)}",
        )
    return Architecture(**(values | {"activation": _ACTIVATIONS[activation]}))


def _value(config: Mapping[str, Any], name: str, default: Any, folder: Path) -> Any:
    given = [name, *(alias for alias, meant in ALIASES.items() if meant == name)]
    found = [config[spelling] for spelling in given if spelling in config]
    if any(value != found[0] for value in found):
        raise UnsupportedModel(f"{folder / CONFIG} has both {' and '.join(given)}, and they differ")
    return found[0] if found else default


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that must hold one JSON object.

    Raises:
        CheckpointDamaged: it holds something else.
        ModelError: it cannot be read.
    """
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointDamaged(f"{path} is not JSON") from error
    if not isinstance(value, dict):
        raise CheckpointDamaged(f"{path} is not a JSON object")
    return value


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a folder, all shards of them; they need not exist.

    Raises:
        UnsupportedModel: the weights are in another format.
        CheckpointDamaged: there are none, or the index names something that is no file of this folder.
    """
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        if any(folder.glob("pytorch_model*.bin*")):
            raise UnsupportedModel(
                f"{folder} has its weights in pytorch_model.bin only, which is a pickle and is not opened",
                hint="save it again with model.save_pretrained(folder, safe_serialization=True)",
            )
        raise CheckpointDamaged(f"{folder} has no {SINGLE}")
    shards = read_json(folder / INDEX).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise CheckpointDamaged(f"{folder / INDEX} has no weight_map")
    for name in shards.values():
        if not isinstance(name, str) or _PLAIN_NAME.fullmatch(name) is None:
            raise CheckpointDamaged(f"{folder / INDEX} names {name!r}, which is not a plain file name")
    return [folder / name for name in sorted(set(shards.values()))]


def open_tensors(files: Sequence[Path], arch: Architecture, *, conv1d: bool = True) -> Reader:
    """Map safetensors files and check that they are exactly one model; nothing is copied before it is asked for.

    Args:
        files: all shards.
        arch: what the tensors must be.
        conv1d: whether matrices are stored as transformers' Conv1D does, inputs first.

    Returns:
        Canonical name -> tensor; a transposed one is contiguous.

    Raises:
        CheckpointDamaged: truncated, or a tensor is missing, unexpected or of another shape.
        UnsupportedModel: tied by its config, yet with an output matrix of its own.
    """
    where = files[0] if len(files) == 1 else files[0].parent
    stored = _Stored(conv1d)
    for file in files:
        stored.add(file)
    if arch.tied and _HEAD in stored.shapes:
        _check_tied(stored, where)
    check_shapes(arch, stored.shapes, where)
    return stored.read


def _check_tied(stored: _Stored, where: Path) -> None:
    import torch

    if _TOKENS in stored.shapes and not torch.equal(stored.read(_HEAD), stored.read(_TOKENS)):
        raise UnsupportedModel(
            f"{where} holds an lm_head.weight of its own, yet its config says tie_word_embeddings",
            hint='if the output matrix is meant to be separate, set "tie_word_embeddings": false in config.json',
        )
    del stored.shapes[_HEAD]


class _Stored:
    """The tensors of several safetensors files, by canonical name."""

    def __init__(self, conv1d: bool) -> None:
        self.shapes: dict[str, Shape] = {}
        self._where: dict[str, tuple[Any, str]] = {}
        self._conv1d = conv1d

    def add(self, file: Path) -> None:
        for handle, name, shape in _entries(file):
            if name.endswith(BUFFERS):
                continue
            canonical = name if name.startswith("transformer.") or name == _HEAD else f"transformer.{name}"
            if canonical in self.shapes:
                raise CheckpointDamaged(f"{file.parent} holds the tensor {name!r} twice")
            self.shapes[canonical] = shape[::-1] if self._is_transposed(canonical) else shape
            self._where[canonical] = handle, name

    def read(self, name: str) -> torch.Tensor:
        handle, stored_name = self._where[name]
        tensor: torch.Tensor = handle.get_tensor(stored_name)
        return tensor.t().contiguous() if self._is_transposed(name) else tensor

    def _is_transposed(self, name: str) -> bool:
        return self._conv1d and name.endswith(_TRANSPOSED)


def _entries(file: Path) -> Iterator[tuple[Any, str, Shape]]:
    import safetensors

    try:
        # never closed by hand: whoever reads a tensor keeps the mapping alive
        handle: Any = safetensors.safe_open(file, framework="pt", device="cpu")
        entries = [(handle, name, tuple(handle.get_slice(name).get_shape())) for name in handle.keys()]  # noqa: SIM118
    except FileNotFoundError as error:
        raise CheckpointDamaged(f"{file} is missing") from error
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror or error}") from error
    except safetensors.SafetensorError as error:
        raise CheckpointDamaged(f"{file} is truncated or is not a safetensors file") from error
    yield from entries
