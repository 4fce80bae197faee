"""Canonical tensors -> one safetensors file and its digest.

Knows nothing of where prepared weights are kept, which model they are for, nor what they are read from.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanogpt_buckets.errors import CheckpointDamaged, UnsupportedModel
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

TOKENS, HEAD = "transformer.wte.weight", "lm_head.weight"
_ALIGNMENT = 64


def canonical_shapes(arch: Architecture) -> Iterator[tuple[str, Shape]]:
    """Yield the name and shape of every parameter, in the network's order; a tied head is absent."""
    C = arch.n_embd
    yield TOKENS, (arch.vocab_size, C)
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
        yield HEAD, (arch.vocab_size, C)


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
        raise CheckpointDamaged(f"{where} holds the tensor {unexpected[0]!r:.80}, which its architecture does not have")


def check_size(arch: Architecture, size: int, where: Path) -> None:
    """Raise unless files of this size can hold all parameters: before work whose amount they do not explain.

    Raises:
        CheckpointDamaged: they cannot, even with two bytes for each.
    """
    if 2 * arch.n_params > size:
        what = f"its {size} bytes cannot hold {arch.n_params} parameters"
        raise CheckpointDamaged(f"{where} is truncated or is not what it seems: {what}")


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
