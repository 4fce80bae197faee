"""GPT-2 as transformers saves it: config.json -> Architecture and end tokens, weight files -> canonical tensors.

Whatever in a config changes the maths is honoured or refused by name, see the tables below; a test knows all fields.
Knows nothing of where prepared weights are kept, nor of nanoGPT's own checkpoints.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanogpt_buckets.errors import CheckpointDamaged, CorruptEntry, ModelError, UnsupportedModel
from nanogpt_buckets.files import read_file
from nanogpt_buckets.model.architecture import ACTIVATIONS, Architecture
from nanogpt_buckets.model.prepared import HEAD, TOKENS, Reader, Shape, check_shapes, check_size

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

Read = Callable[[], "torch.Tensor"]
Entry = tuple[str, Shape, Read]

CONFIG, GENERATION = "config.json", "generation_config.json"
SINGLE = "model.safetensors"
# What weights may be called, the first that is there counts: one file, or an index of several.
WEIGHTS = (SINGLE, f"{SINGLE}.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
PICKLED = ".bin"

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
# transformers' names for ours; its ways to write one function differ by rounding only.
_TANH_GELUS = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_python_tanh", "gelu_accurate")
_ACTIVATIONS = dict.fromkeys(_TANH_GELUS, "gelu_tanh") | {"gelu_python": "gelu", "swish": "silu"}
_ACTIVATIONS |= {name: name for name in ACTIVATIONS if name != "gelu_tanh"}
# All hold the same network; what the heads of other tasks add is left out.
_CLASSES = (
    "GPT2LMHeadModel", "GPT2Model", "GPT2DoubleHeadsModel", "GPT2ForSequenceClassification",
    "GPT2ForTokenClassification", "GPT2ForQuestionAnswering",
)  # fmt: skip
# The causal masks that GPT-2 implementations store among the weights.
BUFFERS = (".attn.bias", ".attn.masked_bias")
_PREFIX = "transformer."
_NETWORK = ("wte", "wpe", "h", "ln_f", "lm_head")
_TRANSPOSED = (".attn.c_attn.weight", ".attn.c_proj.weight", ".mlp.c_fc.weight", ".mlp.c_proj.weight")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,200}\.(?:safetensors|bin)")
_MAX_JSON_BYTES = 16 * 2**20
_DEFAULT_END = 50256
_NOT_GPT2 = "only GPT-2 models are computed exactly"


def architecture(folder: Path) -> Architecture:
    """Return what a folder's config.json says; UnsupportedModel for what would not be computed exactly."""
    config = read_json(folder / CONFIG)
    if config.get("model_type") != "gpt2":
        raise UnsupportedModel(f"{folder} is a {config.get('model_type')!r:.80} model, not 'gpt2'", hint=_NOT_GPT2)
    classes = config.get("architectures") or []
    for name in classes if isinstance(classes, list) else [classes]:
        if name not in _CLASSES:
            raise UnsupportedModel(f"{folder} is a {name!r:.80}, not a language model of class GPT2LMHeadModel")
    for name in REFUSED:
        if config.get(name):
            raise UnsupportedModel(f"{folder / CONFIG} sets {name}, which is not supported", hint=_NOT_GPT2)
    arch = _from_config(config, folder)
    files = _weight_files(folder)
    if files and all(file.is_file() for file in files):
        check_size(arch, sum(file.stat().st_size for file in files), files[0] if len(files) == 1 else folder)
    return arch


def end_tokens(folder: Path) -> tuple[int, ...]:
    """Return the ids after which a folder's model has no more to say, as transformers finds them."""
    own = folder / GENERATION
    path = own if own.is_file() else folder / CONFIG
    ends = read_json(path).get("eos_token_id", None if path == own else _DEFAULT_END)
    listed = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if any(not isinstance(token, int) or isinstance(token, bool) for token in listed):
        raise UnsupportedModel(f"{path} has eos_token_id {ends!r:.80}; it must be a token id, or a list of them")
    return tuple(listed)


def _from_config(config: Mapping[str, Any], folder: Path) -> Architecture:
    values = {ours: _value(config, theirs, default, folder) for theirs, (ours, default) in HONOURED.items()}
    if values["n_inner"] is None and isinstance(values["n_embd"], int):
        values["n_inner"] = 4 * values["n_embd"]
    activation = values["activation"]
    if not isinstance(activation, str) or activation not in _ACTIVATIONS:
        raise UnsupportedModel(
            f"{folder / CONFIG} has activation_function {activation!r:.80}, which is not supported",
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
    """Return the JSON object that a file holds; CheckpointDamaged for anything else."""
    try:
        # transformers' cache holds symbolic links
        value = json.loads(read_file(Path(os.path.realpath(path)), limit=_MAX_JSON_BYTES))
    except CorruptEntry as error:
        raise CheckpointDamaged(f"{path} cannot be used: {error.message}") from error
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointDamaged(f"{path} is not plain JSON") from error
    if not isinstance(value, dict):
        raise CheckpointDamaged(f"{path} is not a JSON object")
    return value


def weight_files(folder: Path) -> list[Path]:
    """Return the files that hold a folder's weights, all of which are there; safetensors if there are both kinds."""
    files = _weight_files(folder)
    for file in files or [folder / SINGLE]:
        if not file.is_file():
            raise CheckpointDamaged(f"{file} is {'not a regular file' if file.exists() else 'missing'}")
    return files


def _weight_files(folder: Path) -> list[Path]:
    path = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if path is None or path.suffix != ".json":
        return [] if path is None else [path]
    shards = read_json(path).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise CheckpointDamaged(f"{path} has no weight_map")
    kind = Path(path.name.removesuffix(".index.json")).suffix
    for name in shards.values():
        if not isinstance(name, str) or _PLAIN_NAME.fullmatch(name) is None or Path(name).suffix != kind:
            raise CheckpointDamaged(f"{path} names {name!r:.80}, which is not a plain file name")
    return [folder / name for name in sorted(set(shards.values()))]


def safetensors_entries(file: Path) -> Iterator[Entry]:
    """Yield what a safetensors file holds."""
    import safetensors

    try:
        # never closed by hand: whoever reads a tensor keeps the mapping alive
        handle: Any = safetensors.safe_open(file, framework="pt", device="cpu")
        shapes = {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror or error}") from error
    except safetensors.SafetensorError as error:
        raise CheckpointDamaged(f"{file} is truncated or is not a safetensors file") from error
    for name, shape in shapes.items():
        yield name, shape, functools.partial(handle.get_tensor, name)


def open_tensors(
    files: Sequence[Path],
    arch: Architecture,
    *,
    conv1d: bool = True,
    entries: Callable[[Path], Iterator[Entry]] = safetensors_entries,
    say: Callable[[str], None] = log.warning,
) -> Reader:
    """Map weight files and check that they hold this model; nothing is copied before it is asked for.

    Args:
        files: all shards.
        arch: what the tensors must be.
        conv1d: whether matrices are stored as transformers' Conv1D does, inputs first.
        entries: what yields a file's tensors.
        say: is told what is left out.
    """
    where = files[0] if len(files) == 1 else files[0].parent
    stored: dict[str, tuple[Shape, Read]] = {}
    for file in files:
        for name, shape, read in entries(file):
            if name.endswith(BUFFERS):
                continue
            canonical = name if name.startswith(_PREFIX) or name == HEAD else f"{_PREFIX}{name}"
            if canonical in stored:
                raise CheckpointDamaged(f"{file.parent} holds the tensor {name!r:.80} twice")
            turned = conv1d and canonical.endswith(_TRANSPOSED)
            stored[canonical] = (shape[::-1], functools.partial(_turned, read)) if turned else (shape, read)
    # the heads of other tasks
    unused = [name for name in sorted(stored) if name.removeprefix(_PREFIX).split(".")[0] not in _NETWORK]
    for name in unused:
        del stored[name]
    if unused:
        names = ", ".join(f"{name.removeprefix(_PREFIX)!r:.80}" for name in unused)
        say(f"{where} holds what a language model does not use; left out: {names}")
    if arch.tied and HEAD in stored:
        _take_out_head(stored, arch, where)
    check_shapes(arch, {name: shape for name, (shape, _) in stored.items()}, where)
    return lambda name: stored[name][1]()


def _turned(read: Read) -> torch.Tensor:
    return read().t().contiguous()


def _take_out_head(stored: dict[str, tuple[Shape, Read]], arch: Architecture, where: Path) -> None:
    """Take out an output matrix that is the embedding; if it is all there is of the two, it is kept as that."""
    import torch

    head = stored.pop(HEAD)
    tokens = stored.setdefault(TOKENS, head)
    same = head[0] == tokens[0] == (arch.vocab_size, arch.n_embd)
    if tokens is not head and not (same and torch.equal(head[1]().float(), tokens[1]().float())):
        raise UnsupportedModel(
            f"{where} holds an lm_head.weight of its own, yet its config says tie_word_embeddings",
            hint='if the output matrix is meant to be separate, set "tie_word_embeddings": false in config.json',
        )
