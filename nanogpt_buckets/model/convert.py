"""Canonical tensors -> one safetensors file and its digest; and the child that gets them out of a nanoGPT checkpoint.

`python -m nanogpt_buckets.model.convert` is the only place where a pickle is opened: in a process of its own, with
weights_only, which builds tensors and plain values and calls nothing that the file names. Everything after it reads
safetensors. Knows nothing of where prepared weights are kept, nor which model they are for.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanogpt_buckets import node
from nanogpt_buckets.child import serve
from nanogpt_buckets.errors import CheckpointDamaged, ModelError, UnsupportedModel
from nanogpt_buckets.key import canonical_json
from nanogpt_buckets.model.architecture import Architecture

if TYPE_CHECKING:
    import torch

Reader = Callable[[str], "torch.Tensor"]
Shape = tuple[int, ...]

# Our dtypes, as safetensors spells them.
DTYPES = {"float32": "F32", "bfloat16": "BF16"}
PREPARED = "prepared.safetensors"

# The causal masks that GPT-2 implementations store among the weights.
BUFFERS = (".attn.bias", ".attn.masked_bias")

_MODEL_ARGS = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size")
_NO_EFFECT = ("dropout",)
_COMPILED_PREFIX = "_orig_mod."
_TOKENS, _HEAD = "transformer.wte.weight", "lm_head.weight"
_ALIGNMENT = 64


def canonical_shapes(arch: Architecture) -> Iterator[tuple[str, Shape]]:
    """Yield the name and shape of every parameter, in the network's order; a tied head is absent."""
    C = arch.n_embd
    yield _TOKENS, (arch.vocab_size, C)
    yield "transformer.wpe.weight", (arch.block_size, C)
    for layer in range(arch.n_layer):
        block = f"transformer.h.{layer}"
        yield from _layer_norm(arch, f"{block}.ln_1")
        yield from _linear(arch, f"{block}.attn.c_attn", C, 3 * C)
        yield from _linear(arch, f"{block}.attn.c_proj", C, C)
        yield from _layer_norm(arch, f"{block}.ln_2")
        yield from _linear(arch, f"{block}.mlp.c_fc", C, arch.n_inner)
        yield from _linear(arch, f"{block}.mlp.c_proj", arch.n_inner, C)
    yield from _layer_norm(arch, "transformer.ln_f")
    if not arch.tied:
        yield _HEAD, (arch.vocab_size, C)


def _layer_norm(arch: Architecture, name: str) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (arch.n_embd,)
    if arch.bias:
        yield f"{name}.bias", (arch.n_embd,)


def _linear(arch: Architecture, name: str, inputs: int, outputs: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (outputs, inputs)
    if arch.bias:
        yield f"{name}.bias", (outputs,)


def check_shapes(arch: Architecture, found: Mapping[str, Shape], where: Path) -> None:
    """Raise unless the tensors found are exactly this architecture's.

    Args:
        arch: the architecture.
        found: canonical name -> shape, as they will be after transposition.
        where: the checkpoint, for the message.

    Raises:
        CheckpointDamaged: a tensor is missing, has another shape, or is not of this architecture.
    """
    wanted: set[str] = set()
    # stops at the first that is missing: a forged layer count must not fill the memory with names
    for name, shape in canonical_shapes(arch):
        if name not in found:
            raise CheckpointDamaged(f"{where} lacks the tensor {name}")
        if tuple(found[name]) != shape:
            raise CheckpointDamaged(f"{name} in {where} has shape {list(found[name])}; the model needs {list(shape)}")
        wanted.add(name)
    if unexpected := sorted(found.keys() - wanted):
        raise CheckpointDamaged(f"{where} holds the tensor {unexpected[0]!r}, which its architecture does not have")


def write_prepared(path: Path, arch: Architecture, dtype: str, read: Reader) -> str:
    """Write all parameters to a new safetensors file, one tensor in memory at a time.

    Args:
        path: the file; must not exist.
        arch: says which tensors there are; their shapes have been checked.
        dtype: "float32" or "bfloat16".
        read: canonical name -> tensor of any floating dtype.

    Returns:
        What `digest_of` returns for these tensors.

    Raises:
        UnsupportedModel: a tensor does not hold floating-point numbers.
        OSError: the file cannot be written.
    """
    with path.open("xb") as file:
        os.chmod(path, 0o600)
        file.write(_header(dict(canonical_shapes(arch)), dtype))
        digest = digest_of(arch, dtype, read, file.write)
        file.flush()
        os.fsync(file.fileno())
    return digest


def digest_of(
    arch: Architecture, dtype: str, read: Reader, write: Callable[[memoryview], object] = lambda data: None
) -> str:
    """Return the weights digest: sha256 over the sorted tensors, each as one line of JSON and little-endian bytes."""
    digest = hashlib.sha256()
    for name, shape in sorted(canonical_shapes(arch)):
        data = _bytes(name, read(name), dtype)
        digest.update(canonical_json({"name": name, "dtype": dtype, "shape": shape}) + b"\n")
        digest.update(data)
        write(data)
    return digest.hexdigest()


def _header(shapes: Mapping[str, Shape], dtype: str) -> bytes:
    """Return what a safetensors file begins with; the data then follows without gaps, by name."""
    size = {"float32": 4, "bfloat16": 2}[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name in sorted(shapes):
        count = size
        for length in shapes[name]:
            count *= length
        header[name] = {"dtype": DTYPES[dtype], "shape": shapes[name], "data_offsets": [start, start + count]}
        start += count
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _bytes(name: str, tensor: torch.Tensor, dtype: str) -> memoryview:
    import torch

    if not tensor.is_floating_point() or tensor.element_size() < 2:
        raise UnsupportedModel(f"{name} is stored as {tensor.dtype}; only floating-point weights are read")
    tensor = tensor.detach().to(getattr(torch, dtype)).contiguous()
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def read_checkpoint(path: Path) -> tuple[Architecture, str | None, dict[str, torch.Tensor]]:
    """Unpickle a nanoGPT checkpoint without running anything it names.

    Args:
        path: a file that train.py wrote with torch.save.

    Returns:
        Architecture, the name of the dataset it was trained on if known, and canonical name -> tensor, mapped if the
        file's format allows.

    Raises:
        CheckpointDamaged: truncated, something else, or with forbidden pickles inside.
        UnsupportedModel: it has an option that we do not know.
    """
    checkpoint = _load(path)
    for name in ("model", "model_args"):
        if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get(name), dict):
            raise CheckpointDamaged(f"{path} is not a nanoGPT checkpoint: it has no {name}")
    state = _canonical_names(checkpoint["model"], path)
    arch = _architecture(checkpoint["model_args"], _is_tied(state), path)
    if arch.tied:
        state.pop(_HEAD, None)
    check_shapes(arch, {name: tuple(tensor.shape) for name, tensor in state.items()}, path)
    config = checkpoint.get("config")
    dataset = config.get("dataset") if isinstance(config, dict) else None
    return arch, dataset if isinstance(dataset, str) else None, state


def _load(path: Path) -> Any:
    import torch

    try:
        # the format before torch 1.6 is no zip file and cannot be mapped
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except MemoryError:
        raise
    except Exception as error:
        # whatever bytes can make an unpickler raise: there is no common base; EINVAL is a zip file cut short
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise ModelError(f"{path} cannot be read: {error.strerror or error}") from error
        named = re.search(r"GLOBAL (\S+)", str(error))
        if named:
            raise CheckpointDamaged(
                f"{path} holds the pickled object {named.group(1)}, which is refused",
                hint="a nanoGPT checkpoint has tensors and plain values only; do not open this file with other tools",
            ) from error
        raise CheckpointDamaged(f"{path} is truncated or is not a nanoGPT checkpoint") from error


def _canonical_names(stored: Mapping[Any, Any], path: Path) -> dict[str, torch.Tensor]:
    import torch

    state: dict[str, torch.Tensor] = {}
    for name, tensor in stored.items():
        short = str(name).removeprefix(_COMPILED_PREFIX)
        if short.endswith(BUFFERS):
            continue
        plain = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not plain or short in state:
            raise CheckpointDamaged(f"{path} does not hold one plain tensor under the name {short!r}")
        state[short] = tensor
    return state


def _is_tied(state: Mapping[str, torch.Tensor]) -> bool:
    import torch

    tokens, head = state.get(_TOKENS), state.get(_HEAD)
    if tokens is None or head is None or tokens.shape != head.shape:
        return False
    same = tokens.data_ptr() == head.data_ptr() and tokens.stride() == head.stride()
    return same or torch.equal(tokens, head)


def _architecture(args: Mapping[Any, Any], tied: bool, path: Path) -> Architecture:
    for name in args:
        if name not in (*_MODEL_ARGS, *_NO_EFFECT):
            raise UnsupportedModel(
                f"{path} has the model argument {name!r}, which nanoGPT does not have",
                hint="only checkpoints of unmodified nanoGPT are computed exactly",
            )
    for name in _MODEL_ARGS:
        if name not in args:
            raise CheckpointDamaged(f"{path} lacks the model argument {name}")
    width = args["n_embd"]
    inner = 4 * width if isinstance(width, int) else 0
    # erf also when training started from OpenAI's weights: nanoGPT computes it whatever it loads
    return Architecture(**{name: args[name] for name in _MODEL_ARGS}, n_inner=inner, activation="gelu", tied=tied)


def _handle(request: dict[str, Any], emit: Callable[..., None]) -> dict[str, Any]:
    arch, dataset, state = read_checkpoint(Path(request["source"]))
    with node.writing():
        digest = write_prepared(Path(request["directory"]) / PREPARED, arch, "float32", state.__getitem__)
    return {"digest": digest, "architecture": arch.to_json(), "dataset": dataset}


if __name__ == "__main__":
    serve(_handle)
