"""Prepared weights: canonical tensors in one safetensors file of this node, named by their digest, and mapped.

Staged, settled, and read whole whenever the file is not the one known. Knows nothing of the formats they come from,
nor what a model's name means.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import math
import os
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanogpt_buckets import node
from nanogpt_buckets.errors import CheckpointDamaged, ModelError, UnsupportedModel
from nanogpt_buckets.files import remove, sync_directory
from nanogpt_buckets.key import canonical_json
from nanogpt_buckets.model.architecture import Architecture
from nanogpt_buckets.node import sources
from nanogpt_buckets.node.records import SOURCES, VERIFIED
from nanogpt_buckets.owners import others

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

Reader = Callable[[str], "torch.Tensor"]
Shape = tuple[int, ...]

# Our dtypes, as safetensors spells them, and the bytes of a number.
DTYPES = {"float32": ("F32", 4), "bfloat16": ("BF16", 2)}
# What a file is called until it has its digest.
PREPARED = "prepared.safetensors"

TOKENS, HEAD = "transformer.wte.weight", "lm_head.weight"
_ALIGNMENT = 64


@dataclass(frozen=True)
class Weights:
    """A prepared file and its tensors, mapped: canonical names and orientation, a tied head absent."""

    digest: str
    path: Path
    tensors: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Known:
    """What a source became; the dataset is what a nanoGPT checkpoint was trained on, if it says so."""

    digest: str
    architecture: Architecture
    dataset: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON."""
        return {"digest": self.digest, "architecture": self.architecture.to_json(), "dataset": self.dataset}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Known:
        """Rebuild from what holds `to_json`'s output, among other things."""
        return cls(data["digest"], Architecture.from_json(data["architecture"]), data["dataset"])


@functools.lru_cache
def canonical_shapes(arch: Architecture) -> Mapping[str, Shape]:
    """Return the name and shape of every parameter, in the network's order; a tied head is absent."""
    import torch

    from nanogpt_buckets.model.gpt import GPT

    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in GPT(arch).named_parameters()}


def check_shapes(arch: Architecture, found: Mapping[str, Shape], where: Path) -> None:
    """Raise CheckpointDamaged unless the names and shapes, as after transposition, are exactly this architecture's."""
    wanted = canonical_shapes(arch)
    for name, shape in wanted.items():
        if name not in found:
            raise CheckpointDamaged(f"{where} lacks the tensor {name}")
        if found[name] != shape:
            raise CheckpointDamaged(f"{name} in {where} has shape {list(found[name])}; the model needs {list(shape)}")
    if unexpected := sorted(found.keys() - wanted.keys()):
        raise CheckpointDamaged(f"{where} holds the tensor {unexpected[0]!r:.80}, which its architecture does not have")


def check_size(arch: Architecture, size: int, where: Path) -> None:
    """Raise CheckpointDamaged if files so short hold no two bytes for each parameter: before work on that scale."""
    if 2 * arch.n_params > size:
        what = f"its {size} bytes cannot hold {arch.n_params} parameters"
        raise CheckpointDamaged(f"{where} is truncated or is not what it seems: {what}")


def write_prepared(path: Path, arch: Architecture, dtype: str, read: Reader) -> str:
    """Write tensors whose shapes are checked to a new safetensors file, one at a time, and return their digest."""
    with path.open("xb") as file:
        os.chmod(path, 0o600)
        file.write(_header(arch, dtype))
        digest = digest_of(arch, dtype, read, file.write)
        file.flush()
        os.fsync(file.fileno())
    return digest


def digest_of(
    arch: Architecture, dtype: str, read: Reader, write: Callable[[memoryview], object] = lambda data: None
) -> str:
    """Return the weights digest: sha256 over the sorted tensors, each as one line of JSON and little-endian bytes."""
    import torch

    digest = hashlib.sha256()
    for name, shape in sorted(canonical_shapes(arch).items()):
        tensor = read(name).detach()
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise UnsupportedModel(f"{name} is stored as {tensor.dtype}; only floating-point weights are read")
        data = tensor.to(getattr(torch, dtype)).contiguous().reshape(-1).view(torch.uint8).numpy().data
        digest.update(canonical_json({"name": name, "dtype": dtype, "shape": shape}) + b"\n")
        digest.update(data)
        write(data)
    return digest.hexdigest()


def _header(arch: Architecture, dtype: str) -> bytes:
    """What a safetensors file begins with; the data then follows without gaps, by name."""
    spelled, size = DTYPES[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, shape in sorted(canonical_shapes(arch).items()):
        end = start + size * math.prod(shape)
        header[name] = {"dtype": spelled, "shape": shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def recall(source: Path, dtype: str) -> Known | None:
    """Return what this source became, unless it has changed since; a CacheError if others could have said so."""
    note = SOURCES.find(_name(source, dtype))
    return Known.from_json(note) if note is not None and sources.holds(note) else None


def remember(source: Path, dtype: str, stamps: list[list[Any]], known: Known) -> None:
    """Note what a source became; weights that it was before, and no source is any more, are deleted."""
    sources.remember(_name(source, dtype), {"source": os.fspath(source), "files": stamps, **known.to_json()})


def _name(source: Path, dtype: str) -> str:
    # a file name need not be UTF-8; ASCII JSON spells what is not
    return hashlib.sha256(json.dumps([os.fspath(source), dtype]).encode("ascii")).hexdigest()


@contextlib.contextmanager
def staging() -> Iterator[Path]:
    """Yield a new directory beside the prepared files; removed afterwards, with what killed processes left."""
    parent = node.folder(sources.WEIGHTS, make=True)
    with node.writing():
        for left in filter(node.is_stale, node.listed(sources.WEIGHTS, "tmp-*")):
            with contextlib.suppress(OSError):
                remove(left)
        with tempfile.TemporaryDirectory(prefix="tmp-", dir=parent, ignore_cleanup_errors=True) as directory:
            yield Path(directory)


def settle(staged: Path, digest: str) -> None:
    """Give a complete file its final name, inside `staging`; whoever did so before us wrote the same bytes."""
    path = sources.weights_path(digest)
    if path.is_dir():
        remove(path)
    os.replace(staged, path)
    sync_directory(path.parent)


def mapped(digest: str, arch: Architecture, dtype: str) -> Weights | None:
    """Map a prepared file that is these weights; None if it is gone or damaged, and so must be prepared again."""
    import safetensors

    path = sources.weights_path(digest)
    try:
        found = path.lstat()
        if why := others(found) or ("" if stat.S_ISREG(found.st_mode) else "is no plain file"):
            raise ValueError(f"the file {why}")
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        check_shapes(arch, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, path)
        if {str(tensor.dtype) for tensor in tensors.values()} != {f"torch.{dtype}"}:
            raise ValueError(f"not all of it is {dtype}")
        stamp = sources.stamp(found)
        if VERIFIED.find(digest) != {"file": stamp}:
            if digest_of(arch, dtype, tensors.__getitem__) != digest:
                raise ValueError("its numbers are not those its name says")
            if sources.stamp(path.lstat()) == stamp:  # else somebody has put another in its place, and ours is as good
                VERIFIED.keep(digest, {"file": stamp})
        return Weights(digest, path, tensors)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, safetensors.SafetensorError, ModelError) as error:
        log.warning("prepared weights %s are damaged (%s); they are prepared again", digest[:12], error)
    return None
