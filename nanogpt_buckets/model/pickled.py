"""The child that opens pickles: a nanoGPT checkpoint, or a folder's pytorch_model.bin, becomes prepared weights.

`python -m nanogpt_buckets.model.pickled` is the only place where one is opened: with weights_only, which builds tensors
and plain values, and with as much memory as the files' size explains. What else a file names is not imported: data
stands as an empty object, and the file is refused for any function of Python's own. Everything after it reads
safetensors. Knows nothing of where prepared weights are kept.
"""

from __future__ import annotations

import _compat_pickle
import contextlib
import errno
import functools
import re
import resource
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanogpt_buckets import node
from nanogpt_buckets.child import serve
from nanogpt_buckets.errors import CheckpointDamaged, ModelError, UnsupportedModel
from nanogpt_buckets.model import huggingface, prepared
from nanogpt_buckets.model.architecture import Architecture
from nanogpt_buckets.model.prepared import HEAD, TOKENS, Known

if TYPE_CHECKING:
    import torch

# What nanoGPT's GPTConfig has where model_args says nothing; vocab_size is then what the tensors say.
_DEFAULTS = {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "bias": True, "vocab_size": None}
_NO_EFFECT = ("dropout",)
# What torch.compile, DistributedDataParallel and FSDP put before the names of what they wrap.
_WRAPPERS = re.compile(r"(?<![^.])(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# What is mapped, what of it is read, and its largest tensor in float32; and what torch needs for itself.
_MEMORY_PER_BYTE, _SPARE_BYTES = 6, 256 * 2**20
_MAX_CLASSES = 100
# What of Python's own library may be named: classes of plain data.
_DATA = re.compile(
    r"(argparse\.Namespace|types\.SimpleNamespace|builtins\.(bool|int|float|complex|str|bytes|bytearray|list|tuple|set"
    r"|frozenset|dict|range|slice|object)|(pathlib|datetime|zoneinfo|decimal|fractions|uuid|enum|collections|copyreg)\..*)"
)


class _Unread:
    """An object whose class was not imported: what it would have been made of, and its attributes if they are named."""

    args: tuple[Any, ...]
    fields: dict[Any, Any]

    def __new__(cls, *args: Any) -> _Unread:
        made = super().__new__(cls)
        made.args, made.fields = args, {}
        return made

    def __setstate__(self, state: Any) -> None:
        self.fields = state if isinstance(state, dict) else {}


def _numpy_scalar(kind: Any, content: Any = None) -> Any:
    code = kind.args[0] if isinstance(kind, _Unread) and kind.args else ""
    if not isinstance(content, bytes) or code[:1] not in ("i", "u", "b"):
        return content
    number = int.from_bytes(content, "little", signed=code[0] == "i")
    return bool(number) if code[0] == "b" else number


# What is made in the place of these, so that it can be filled or used.
_STAND_INS: dict[str, Callable[..., Any]] = {
    "collections.defaultdict": lambda *args: {},
    "collections.deque": lambda *args: [],
    "numpy.core.multiarray.scalar": _numpy_scalar,
    "numpy._core.multiarray.scalar": _numpy_scalar,
}


def _load(path: Path) -> Any:
    """Return what torch.save wrote: tensors, mapped if the format allows, plain values and `_Unread` objects."""
    import torch

    mapped = _is_archive(path)  # the format before torch 1.6 is no zip file and cannot be mapped
    known: dict[str, Callable[..., Any]] = {}
    while True:
        try:
            with torch.serialization.safe_globals([(made, name) for name, made in known.items()]):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except Exception as error:
            # whatever bytes can make an unpickler raise: there is no common base
            found = re.search(r"GLOBAL (\S+)|but got <class '\.([^']+)'>", str(error))
            name = found[1] or found[2] if found else ""
            name = f"builtins.{name}" if name and "." not in name else name
            if not _is_harmless(name) or name in known or len(known) == _MAX_CLASSES:
                raise _failure(path, error, name) from error
            known[name] = _STAND_INS.get(name) or type(name, (_Unread,), {"__module__": ""})


def _is_archive(path: Path) -> bool:
    """Whether it is a zip file; one whose parts are larger than itself is refused, for torch writes none."""
    if not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
    except (zipfile.BadZipFile, ValueError) as error:
        raise CheckpointDamaged(f"{path} is truncated or is not a nanoGPT checkpoint") from error
    if any(part.compress_type for part in parts) or sum(part.file_size for part in parts) > path.stat().st_size:
        raise CheckpointDamaged(f"{path} is compressed, as torch.save writes no checkpoint")
    return True


def _is_harmless(name: str) -> bool:
    module, _, rest = name.partition(".")
    module = _compat_pickle.IMPORT_MAPPING.get(module, module)  # pickles use the names of Python 2
    return bool(name) and (module not in sys.stdlib_module_names or _DATA.fullmatch(f"{module}.{rest}") is not None)


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "allocate memory" in str(error))


def _failure(path: Path, error: Exception, name: str) -> Exception:
    if _is_out_of_memory(error):
        return error
    if isinstance(error, OSError) and error.errno != errno.EINVAL:  # EINVAL is a zip file cut short
        return ModelError(f"{path} cannot be read: {error.strerror or error}")
    if name:
        return CheckpointDamaged(
            f"{path} holds the pickled object {name:.80}, which is refused",
            hint="a checkpoint has tensors and plain values only; do not open this file with other tools",
        )
    kind = "transformers" if path.suffix == huggingface.PICKLED else "nanoGPT"
    return CheckpointDamaged(f"{path} is truncated or is not a {kind} checkpoint")


def _tensors(stored: Any, path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the names and tensors of a state dictionary, masks left out."""
    import torch

    if not isinstance(stored, dict):
        raise CheckpointDamaged(f"{path} is not a checkpoint: it holds no tensors by name")
    for name, tensor in stored.items():
        if str(name).endswith(huggingface.BUFFERS):
            continue
        plain = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not plain or tensor.is_quantized:
            raise CheckpointDamaged(f"{path} does not hold one plain tensor under the name {str(name)!r:.80}")
        yield str(name), tensor


def _of_folder(file: Path) -> Iterator[huggingface.Entry]:
    for name, tensor in _tensors(_load(file), file):
        yield name, tuple(tensor.shape), functools.partial(tensor.detach)


def read_checkpoint(path: Path) -> tuple[Architecture, str | None, dict[str, torch.Tensor]]:
    """Return a nanoGPT checkpoint's architecture, its dataset's name if known, and canonical name -> tensor."""
    loaded = _load(path)
    entries = loaded if isinstance(loaded, dict) else {}
    args = _fields(entries.get("model_args"))
    for name, found in (("model", entries.get("model")), ("model_args", args)):
        if not isinstance(found, dict):
            raise CheckpointDamaged(f"{path} is not a nanoGPT checkpoint: it has no {name}")
    state: dict[str, torch.Tensor] = {}
    for name, tensor in _tensors(entries["model"], path):
        short = _WRAPPERS.sub("", name)
        if short in state:
            raise CheckpointDamaged(f"{path} does not hold one plain tensor under the name {short!r:.80}")
        state[short] = tensor
    arch = _architecture(args or {}, state, path)
    prepared.check_shapes(arch, {name: tuple(tensor.shape) for name, tensor in state.items()}, path)
    dataset = (_fields(entries.get("config")) or {}).get("dataset")
    return arch, dataset if isinstance(dataset, str) else None, state


def _fields(value: Any) -> dict[Any, Any] | None:
    """Return what a dictionary, a Namespace or a configuration object holds by name."""
    return value if isinstance(value, dict) else value.fields if isinstance(value, _Unread) else None


def _architecture(args: Mapping[Any, Any], state: dict[str, torch.Tensor], path: Path) -> Architecture:
    """Return the architecture; an output matrix that is the token embedding is taken out of the tensors."""
    import torch

    for name in args:
        if name not in (*_DEFAULTS, *_NO_EFFECT):
            raise UnsupportedModel(
                f"{path} has the model argument {name!r:.80}, which nanoGPT does not have",
                hint="only checkpoints of unmodified nanoGPT are computed exactly",
            )
    fields: dict[str, Any] = {name: args.get(name, default) for name, default in _DEFAULTS.items()}
    tokens, head = state.get(TOKENS), state.get(HEAD)
    if fields["vocab_size"] is None and tokens is not None and tokens.dim():
        fields["vocab_size"] = len(tokens)
    # erf also when training started from OpenAI's weights: nanoGPT computes it whatever it loads
    fields |= {"n_inner": 4 * fields["n_embd"] if isinstance(fields["n_embd"], int) else 0, "activation": "gelu"}
    tied = Architecture(**fields)
    prepared.check_size(tied, path.stat().st_size, path)
    if tokens is not None and head is not None and tokens.shape == head.shape == (tied.vocab_size, tied.n_embd):
        same = tokens.data_ptr() == head.data_ptr() and tokens.stride() == head.stride()
        if same or torch.equal(tokens, head):
            del state[HEAD]
            return tied
    return Architecture(**fields, tied=False)


def _bound_memory(size: int) -> None:
    """Let this process allocate no more than files of this size explain, where the system can see to it."""
    import torch

    torch.set_num_threads(1)
    with contextlib.suppress(OSError):
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        taken = [int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmData:")]
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        limit = sum(taken) + _SPARE_BYTES + _MEMORY_PER_BYTE * size
        if taken and (hard == resource.RLIM_INFINITY or limit < hard):
            resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def _handle(request: dict[str, Any], emit: Callable[..., None]) -> dict[str, Any]:
    files = [Path(name) for name in request["files"]]
    size = sum(file.stat().st_size for file in files)
    _bound_memory(size)
    try:
        if request["architecture"] is None:
            arch, dataset, state = read_checkpoint(files[0])
            read: prepared.Reader = state.__getitem__
        else:
            arch, dataset = Architecture.from_json(request["architecture"]), None
            read = huggingface.open_tensors(
                files, arch, entries=_of_folder, say=lambda text: emit("said", message=text)
            )
        with node.writing():
            staged = Path(request["directory"]) / prepared.PREPARED
            digest = prepared.write_prepared(staged, arch, request["dtype"], read)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        raise CheckpointDamaged(f"{files[0]} needs more memory than its {size} bytes explain") from error
    return Known(digest, arch, dataset).to_json()


if __name__ == "__main__":
    serve(_handle)
