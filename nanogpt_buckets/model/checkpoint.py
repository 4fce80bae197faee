"""What a model's name means: its architecture, found without torch where possible, and its prepared weights.

Knows nothing of tokenizers, buckets or compiled things, nor of how a format is read (huggingface.py, pickled.py).
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

from nanogpt_buckets import child
from nanogpt_buckets.errors import CacheError, ChildFailed, ModelError, ModelNotFound, UsageError
from nanogpt_buckets.key import canonical_json
from nanogpt_buckets.model import huggingface, prepared
from nanogpt_buckets.model.architecture import GPT2_SIZES, Architecture
from nanogpt_buckets.model.prepared import DTYPES, PREPARED, Known, Weights
from nanogpt_buckets.node import sources

log = logging.getLogger(__name__)

_DEMO = Path(__file__).parent / "demo"
_CHECKPOINT = "ckpt.pt"
# Ample time for torch to start and for a slow network file system: whoever takes longer will never be done.
_CHILD = "nanogpt_buckets.model.pickled"
_CHILD_S, _CHILD_BYTES_PER_S = 600.0, 1e6
_ORGANISATION = "openai-community/"
_ACCEPTED = f"{', '.join(GPT2_SIZES)}, demo, a Hugging Face folder with config.json, or a nanoGPT ckpt.pt or its folder"


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
        end_tokens: ids after which it has no more to say.
    """

    name: str
    kind: str
    path: Path | None
    architecture: Architecture
    dataset: str | None = None
    characters: str | None = None
    end_tokens: tuple[int, ...] = ()

    def weights(self, dtype: str) -> Weights:
        """Return the weights, prepared on this node the first time and mapped from then on; else a ModelError says why.

        A CacheError if this node's directory cannot be written, or is not only this user's.
        """
        if dtype not in DTYPES:
            raise UsageError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
        arch = self.architecture
        source = _gpt2_file(self.name) if self.kind == "gpt2" else self.path or _DEMO
        known = prepared.recall(source, dtype)
        if known and known.architecture == arch and (weights := prepared.mapped(known.digest, arch, dtype)):
            return weights
        if not source.exists():
            raise ModelNotFound(f"{source} is gone, and with it what the weights of {self.name} are prepared from")
        known = _prepare(source, dtype, None if self.kind == "nanogpt" else arch, conv1d=self.kind != "demo")
        if known.architecture != arch:
            raise ModelError(f"{source} was replaced by a checkpoint of another architecture while in use")
        if weights := prepared.mapped(known.digest, arch, dtype):
            return weights
        raise CacheError(f"the prepared weights {known.digest} cannot be read back")


def open_model(name: str | os.PathLike[str]) -> Model:
    """Find out what a name means and what the model's architecture is.

    Args:
        name: one of `GPT2_SIZES`, also with "openai-community/" before it; "demo"; a folder as transformers saves it; a
            nanoGPT checkpoint, or a folder with ckpt.pt. A folder of one of the fixed names is meant by "./gpt2".
    """
    text = os.fsdecode(name)
    if isinstance(name, str):
        size = text.removeprefix(_ORGANISATION)
        if size in GPT2_SIZES:
            return Model(size, "gpt2", None, GPT2_SIZES[size])
        if text == "demo":
            config = huggingface.read_json(_DEMO / huggingface.CONFIG)
            arch = Architecture.from_json(config["architecture"])
            return Model(text, "demo", None, arch, characters=config["characters"])
    if not text:
        raise ModelNotFound("the model's name is empty", hint=f"accepted: {_ACCEPTED}")
    # abspath, not resolve: the name that the user knows is kept
    path = Path(os.path.abspath(os.path.expanduser(text)))
    if (path / huggingface.CONFIG).is_file():
        arch = huggingface.architecture(path)
        return replace(_from_path("huggingface", path, arch), end_tokens=huggingface.end_tokens(path))
    file = path / _CHECKPOINT if path.is_dir() else path
    if file.is_file():
        known = prepared.recall(file, "float32") or _prepare(file, "float32")
        return replace(_from_path("nanogpt", file, known.architecture), dataset=known.dataset)
    if path.is_dir():
        raise ModelNotFound(f"{path} has neither config.json nor ckpt.pt", hint=f"accepted: {_ACCEPTED}")
    kind = "file or folder" if os.sep in text or text.endswith(".pt") else "model"
    raise ModelNotFound(f"there is no {kind} {text!r}", hint=f"accepted: {_ACCEPTED}")


def _from_path(kind: str, path: Path, arch: Architecture) -> Model:
    base = path.parent.name if path.name == _CHECKPOINT else path.stem if kind == "nanogpt" else path.name
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", base).lstrip(".")[:80] or "model"
    suffix = hashlib.sha256(canonical_json(arch.to_json())).hexdigest()[:8]
    return Model(f"{plain}-{suffix}", kind, path, arch)


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


def _prepare(source: Path, dtype: str, arch: Architecture | None = None, *, conv1d: bool = True) -> Known:
    """Make and keep the prepared weights of a source; None is the architecture that a nanoGPT checkpoint says."""
    files = shards = [source]
    if source.is_dir():
        shards = huggingface.weight_files(source)
        files = [source / name for name in (huggingface.CONFIG, *huggingface.WEIGHTS)]
        files += [shard for shard in shards if shard not in files]
    # before anything is read: a source that changes meanwhile does not match and is prepared again
    stamps = sources.stamps(files)
    read = None
    if arch and shards[0].suffix != huggingface.PICKLED:
        read = huggingface.open_tensors(shards, arch, conv1d=conv1d)
    with prepared.staging() as directory:
        staged = directory / PREPARED
        if arch and read:
            known = Known(prepared.write_prepared(staged, arch, dtype, read), arch)
        else:
            known = _unpickled(source, shards, directory, dtype, arch)
        # noted first, so that no prune takes what nobody names yet
        prepared.remember(source, dtype, stamps, known)
        prepared.settle(staged, known.digest)
    return known


def _unpickled(source: Path, shards: list[Path], directory: Path, dtype: str, arch: Architecture | None) -> Known:
    """Have a child write the prepared weights of a nanoGPT checkpoint, or of shards of this architecture."""

    def listen(event: child.Event) -> None:
        if event["event"] == "said":
            log.warning("%s", event["message"])

    seconds = _CHILD_S + sum(shard.stat().st_size for shard in shards) / _CHILD_BYTES_PER_S
    request: child.Event = {"files": [str(shard) for shard in shards], "directory": str(directory), "dtype": dtype}
    request["architecture"] = arch and arch.to_json()
    try:
        return Known.from_json(child.run(_CHILD, request, workdir=directory, on_event=listen, timeout_s=seconds))
    except ChildFailed as error:
        raise ModelError(f"{source} could not be converted: {error.message}", hint=error.hint) from error
