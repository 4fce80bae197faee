"""What a model's name means: its architecture, found without torch where possible, and its prepared weights.

    <local>/weights/<digest>.safetensors    canonical tensors, ready to be mapped
    <local>/sources/<sha256>.json           which prepared file a source became, so that later only `stat` is needed

Knows nothing of tokenizers, buckets or compiled things, nor of how a format is read (huggingface.py, convert.py).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanogpt_buckets import child, errors, settings
from nanogpt_buckets.errors import ModelError, ModelNotFound, UsageError
from nanogpt_buckets.key import canonical_json
from nanogpt_buckets.model import convert, huggingface
from nanogpt_buckets.model.architecture import GPT2_SIZES, Architecture

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

_DEMO = Path(__file__).parent / "demo"
_CHECKPOINT = "ckpt.pt"
_ORGANISATION = "openai-community/"
_SIDECAR_FORMAT = 1
_STALE_SECONDS = 24 * 3600
_ACCEPTED = f"{', '.join(GPT2_SIZES)}, demo, a Hugging Face folder with config.json, or a nanoGPT ckpt.pt or its folder"


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
class Model:
    """A model whose architecture is known; its weights are read when asked for.

    Args:
        name: what its default plan is called.
        kind: "gpt2", "demo", "huggingface" or "nanogpt".
        path: the folder or checkpoint file; None for gpt2 and demo.
        architecture: sizes and everything that changes the maths.
        dataset: what a nanoGPT checkpoint was trained on, if it says so.
        characters: the demo's vocabulary, by id.
    """

    name: str
    kind: str
    path: Path | None
    architecture: Architecture
    dataset: str | None = None
    characters: str | None = None

    def weights(self, dtype: str) -> Weights:
        """Return the weights, prepared on this node the first time and mapped from then on.

        Args:
            dtype: "float32" or "bfloat16".

        Raises:
            ModelNotFound: they are neither here nor to be had.
            ModelError: they are damaged, or not this architecture's.
            CacheError: the local directory cannot be written.
        """
        if dtype not in convert.DTYPES:
            raise UsageError(f"dtype {dtype!r} is not one of {', '.join(convert.DTYPES)}")
        source = self._source()
        known = _recall(source, dtype)
        if known is not None and known.architecture == self.architecture:
            weights = _mapped(known.digest)
            if weights is not None:
                return weights
        digest = self._prepare(source, dtype)
        weights = _mapped(digest)
        if weights is None:
            raise errors.CacheError(f"{_prepared_path(digest)} cannot be read back")
        return weights

    def _source(self) -> Path:
        if self.kind == "gpt2":
            return _gpt2_file(self.name)
        return self.path or _DEMO

    def _prepare(self, source: Path, dtype: str) -> str:
        if self.kind == "nanogpt" and dtype == "float32":
            known = _convert(source)
            if known.architecture != self.architecture:
                raise ModelError(f"{source} was replaced by a checkpoint of another architecture while in use")
            return known.digest
        files, shards = [source], [source]
        if self.kind in ("demo", "huggingface"):
            shards = huggingface.weight_files(source)
            files = [source / name for name in (huggingface.CONFIG, huggingface.SINGLE, huggingface.INDEX)]
            files += [shard for shard in shards if shard not in files]
        # before anything is read: a source that changes meanwhile does not match and is prepared again
        stamps = _stamps(files)
        if self.kind == "nanogpt":
            read: convert.Reader = self.weights("float32").tensors.__getitem__
        else:
            read = huggingface.open_tensors(shards, self.architecture, conv1d=self.kind != "demo")
        with _staging() as directory:
            staged = directory / convert.PREPARED
            digest = convert.write_prepared(staged, self.architecture, dtype, read)
            _settle(staged, digest)
        _remember(source, dtype, stamps, _Known(digest, self.architecture))
        return digest


def open_model(name: str | os.PathLike[str]) -> Model:
    """Find out what a name means and what the model's architecture is.

    Args:
        name: "gpt2", "gpt2-medium", "gpt2-large" or "gpt2-xl", also with "openai-community/" before it; "demo"; a
            folder as transformers saves it; a nanoGPT checkpoint, or a folder with ckpt.pt. A folder of one of the
            fixed names is meant by "./gpt2".

    Raises:
        ModelNotFound: it is none of these.
        UnsupportedModel: it would not be computed exactly.
        CheckpointDamaged: it cannot be what it looks like.
    """
    text = os.fsdecode(name)
    if isinstance(name, str):
        size = text.removeprefix(_ORGANISATION)
        if size in GPT2_SIZES:
            return Model(size, "gpt2", None, GPT2_SIZES[size])
        if text == "demo":
            return _demo()
    if not text:
        raise ModelNotFound("the model's name is empty", hint=f"accepted: {_ACCEPTED}")
    # abspath, not resolve: the name that the user knows is kept
    path = Path(os.path.abspath(os.path.expanduser(text)))
    if (path / huggingface.CONFIG).is_file():
        return _from_path("huggingface", path, huggingface.architecture(path))
    file = path / _CHECKPOINT if path.is_dir() else path
    if file.is_file():
        known = _recall(file, "float32") or _convert(file)
        return _from_path("nanogpt", file, known.architecture, known.dataset)
    if path.is_dir():
        raise ModelNotFound(f"{path} has neither config.json nor ckpt.pt", hint=f"accepted: {_ACCEPTED}")
    kind = "file or folder" if os.sep in text or text.endswith(".pt") else "model"
    raise ModelNotFound(f"there is no {kind} {text!r}", hint=f"accepted: {_ACCEPTED}")


def _from_path(kind: str, path: Path, arch: Architecture, dataset: str | None = None) -> Model:
    base = path.parent.name if path.name == _CHECKPOINT else path.stem if kind == "nanogpt" else path.name
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", base).lstrip(".")[:80] or "model"
    suffix = hashlib.sha256(canonical_json(arch.to_json())).hexdigest()[:8]
    return Model(f"{plain}-{suffix}", kind, path, arch, dataset)


def _demo() -> Model:
    config = huggingface.read_json(_DEMO / huggingface.CONFIG)
    arch = Architecture.from_json(config["architecture"])
    return Model("demo", "demo", None, arch, characters=config["characters"])


def _gpt2_file(size: str) -> Path:
    """Return OpenAI's weights from Hugging Face's cache, under either name, or download them into it."""
    import huggingface_hub

    # the second is what the repository was called until 2024
    for repository in (_ORGANISATION + size, size):
        cached = huggingface_hub.try_to_load_from_cache(repository, huggingface.SINGLE)
        if isinstance(cached, str) and Path(cached).is_file():
            return Path(cached).absolute()
    chatter = logging.getLogger("huggingface_hub")
    level = chatter.level
    chatter.setLevel(logging.CRITICAL)  # it says every retry; the outcome is said below
    log.warning("the weights of %s are not in Hugging Face's cache; downloading them", size)
    try:
        return Path(huggingface_hub.hf_hub_download(_ORGANISATION + size, huggingface.SINGLE)).absolute()
    except Exception as error:
        # offline mode, proxies, name resolution, full disks: each comes as an exception of another library
        raise ModelNotFound(
            f"the weights of {size} are not in Hugging Face's cache and could not be downloaded",
            hint="without a network, use --model demo, a local Hugging Face folder or a nanoGPT ckpt.pt",
        ) from error
    finally:
        chatter.setLevel(level)


def _convert(source: Path) -> _Known:
    """Have a child unpickle a nanoGPT checkpoint; keep its tensors in float32."""
    stamps = _stamps([source])
    with _staging() as directory:
        request = {"source": str(source), "directory": str(directory)}
        try:
            result = child.run("nanogpt_buckets.model.convert", request, workdir=directory)
        except errors.ChildFailed as error:
            raise ModelError(f"{source} could not be converted: {error.message}", hint=error.hint) from error
        _settle(directory / convert.PREPARED, result["digest"])
    known = _Known(result["digest"], Architecture.from_json(result["architecture"]), result["dataset"])
    _remember(source, "float32", stamps, known)
    return known


# prepared files


def _prepared_path(digest: str) -> Path:
    return settings.local_dir() / "weights" / f"{digest}.safetensors"


def _mapped(digest: str) -> Weights | None:
    """Map a prepared file; None if it is gone or damaged."""
    import safetensors

    path = _prepared_path(digest)
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            return Weights(digest, path, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except (OSError, safetensors.SafetensorError):
        return None


@contextlib.contextmanager
def _staging() -> Iterator[Path]:
    """Yield a new directory beside the prepared files; removed afterwards, with what killed processes left."""
    with convert.writing(settings.local_dir()):
        parent = _private_directory("weights")
        _sweep(parent)
        directory = Path(tempfile.mkdtemp(prefix="tmp-", dir=parent))
        try:
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)


def _sweep(parent: Path) -> None:
    for left in parent.glob("tmp-*"):
        with contextlib.suppress(OSError):
            if left.stat().st_mtime < time.time() - _STALE_SECONDS:
                shutil.rmtree(left)


def _private_directory(name: str) -> Path:
    local = settings.local_dir()
    local.parent.mkdir(parents=True, exist_ok=True)
    for directory in (local, local / name):
        directory.mkdir(mode=0o700, exist_ok=True)
    return local / name


def _settle(staged: Path, digest: str) -> None:
    """Give a complete file its final name; whoever did so before us wrote the same bytes."""
    path = _prepared_path(digest)
    os.replace(staged, path)
    with contextlib.suppress(OSError):
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# what is remembered of a source


@dataclass(frozen=True)
class _Known:
    digest: str
    architecture: Architecture
    dataset: str | None = None


def _stamps(files: Sequence[Path]) -> list[list[Any]]:
    """Return name, size and time of each file; an absent one is listed too, for it might come into being."""
    stamps: list[list[Any]] = []
    for file in files:
        try:
            status = file.stat()
            stamps.append([file.name, status.st_size, status.st_mtime_ns])
        except OSError:
            stamps.append([file.name, -1, -1])
    return stamps


def _sidecar_path(source: Path, dtype: str) -> Path:
    # a file name need not be UTF-8
    named = os.fsencode(source).decode("utf-8", "backslashreplace")
    digest = hashlib.sha256(canonical_json([named, dtype])).hexdigest()
    return settings.local_dir() / "sources" / f"{digest}.json"


def _recall(source: Path, dtype: str) -> _Known | None:
    """Return what this source became, unless it has changed since or the note cannot be understood."""
    try:
        note = json.loads(_sidecar_path(source, dtype).read_bytes())
        folder = source if source.is_dir() else source.parent
        unchanged = note["files"] != [] and note["files"] == _stamps([folder / name for name, _, _ in note["files"]])
        known = _Known(note["digest"], Architecture.from_json(note["architecture"]), note["dataset"])
        valid = note["format"] == _SIDECAR_FORMAT and re.fullmatch(r"[0-9a-f]{64}", known.digest)
        return known if unchanged and valid and isinstance(known.dataset, str | None) else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, ModelError):
        return None


def _remember(source: Path, dtype: str, stamps: list[list[Any]], known: _Known) -> None:
    note = {
        "format": _SIDECAR_FORMAT,
        "files": stamps,
        "digest": known.digest,
        "architecture": known.architecture.to_json(),
        "dataset": known.dataset,
    }
    path = _sidecar_path(source, dtype)
    with convert.writing(settings.local_dir()):
        staged = _private_directory("sources") / f"tmp-{os.getpid()}-{time.monotonic_ns()}"
        staged.write_text(json.dumps(note), encoding="ascii")
        os.replace(staged, path)
