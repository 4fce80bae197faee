"""Prepared weights of this node: staged, settled, mapped, and read whole whenever the file is not the one known.

Knows nothing of the formats they were converted from, nor what a model's name means.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanogpt_buckets import node
from nanogpt_buckets.errors import ModelError
from nanogpt_buckets.files import remove, sync_directory
from nanogpt_buckets.model import convert
from nanogpt_buckets.model.architecture import Architecture
from nanogpt_buckets.node import sources
from nanogpt_buckets.node.records import SOURCES, VERIFIED
from nanogpt_buckets.owners import others

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Weights:
    """Prepared weights: memory-mapped, in canonical names and orientation, a tied head absent.

    Args:
        digest: names exactly these tensors in this dtype.
        path: the prepared file.
        tensors: canonical name -> tensor.
    """

    digest: str
    path: Path
    tensors: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Known:
    """What a source became.

    Args:
        digest: of its prepared weights.
        architecture: what it is.
        dataset: what a nanoGPT checkpoint was trained on, if it says so.
    """

    digest: str
    architecture: Architecture
    dataset: str | None = None


def recall(source: Path, dtype: str) -> Known | None:
    """Return what this source became, unless it has changed since; a CacheError if others could have said so."""
    note = SOURCES.find(_name(source, dtype))
    if note is None or not sources.holds(note):
        return None
    return Known(note["digest"], Architecture.from_json(note["architecture"]), note["dataset"])


def remember(source: Path, dtype: str, stamps: list[list[Any]], known: Known) -> None:
    """Note what a source became; weights that it was before, and no source is any more, are deleted."""
    facts = {"digest": known.digest, "architecture": known.architecture.to_json(), "dataset": known.dataset}
    sources.remember(_name(source, dtype), {"source": os.fspath(source), "files": stamps, **facts})


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
    """Map a prepared file that is these weights; None if it is gone or damaged, and so must be prepared again.

    It is read whole the first time it is met, and whenever it is no longer the file that was read.
    """
    import safetensors

    path = sources.weights_path(digest)
    try:
        found = path.lstat()
        if why := others(found) or ("" if stat.S_ISREG(found.st_mode) else "is no plain file"):
            raise ValueError(f"the file {why}")
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        convert.check_shapes(arch, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, path)
        if {str(tensor.dtype) for tensor in tensors.values()} != {f"torch.{dtype}"}:
            raise ValueError(f"not all of it is {dtype}")
        stamp = sources.stamp(found)
        if VERIFIED.find(digest) != {"file": stamp}:
            if convert.digest_of(arch, dtype, tensors.__getitem__) != digest or sources.stamp(path.lstat()) != stamp:
                raise ValueError("its numbers are not those its name says")
            VERIFIED.keep(digest, {"file": stamp})
        return Weights(digest, path, tensors)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, safetensors.SafetensorError, ModelError) as error:
        log.warning("prepared weights %s are damaged (%s); they are prepared again", digest[:12], error)
    return None
