"""Character-level tokenizers, as nanoGPT's prepare.py leaves them in a meta.pkl.

Reads the pickle without running anything it may contain. Knows nothing of models or which of them it belongs to.
"""

from __future__ import annotations

import io
import os
import pickle
import pickletools
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from nanogpt_buckets import files
from nanogpt_buckets.errors import CorruptEntry, TokenizerError, UnknownCharacter
from nanogpt_buckets.model.tokenization.base import ByteTable, Tokenizer, well_formed

# All of Unicode takes 20 MB, the largest alphabet of a data set a hundredth of that.
_META_MAX_BYTES = 8 * 1024 * 1024


class CharacterTokenizer(ByteTable):
    """A tokenizer whose tokens are single characters."""

    def __init__(self, symbols: Mapping[int, str]) -> None:
        self._ids = {character: token for token, character in symbols.items()}
        start = self._ids.get("\n", min(symbols, default=None))
        super().__init__({token: well_formed(text).encode() for token, text in symbols.items()}, start)

    def encode(self, text: str, *, plain_text: bool = False) -> list[int]:
        """See `Tokenizer`."""
        text = well_formed(text)
        for position, character in enumerate(text):
            if character not in self._ids:
                raise UnknownCharacter(
                    f"character {character!r} (U+{ord(character):04X}) at position {position} is not among the "
                    f"{len(self._ids)} characters of this model",
                    hint="remove it, or use a model with a GPT-2 vocabulary",
                )
        return [self._ids[character] for character in text]


def find_meta(folder: Path, dataset: str | None) -> Path | None:
    """Return the meta.pkl beside a checkpoint, else in data/<dataset>/ here; only a plain relative name counts."""
    places = [folder / "meta.pkl"]
    name = PurePosixPath(dataset or "")
    if dataset and not name.is_absolute() and ".." not in name.parts:
        places.append(Path("data", dataset, "meta.pkl"))
    return next((place for place in places if os.path.lexists(place)), None)  # the functions of Path raise on odd names


def from_meta(path: Path) -> Tokenizer:
    """Return the tokenizer of a meta.pkl, a pickle of {"vocab_size", "stoi", "itos"}; TokenizerError if it is not."""
    try:
        content = files.read_file(Path(os.path.realpath(path)), limit=_META_MAX_BYTES)  # it may be a symbolic link
    except (OSError, ValueError, CorruptEntry) as error:
        reason = getattr(error, "strerror", None) or error
        raise TokenizerError(f"the tokenizer {str(path)!r} cannot be read: {reason}") from None
    try:
        _refuse_large_numbers(content)
        meta = _PlainUnpickler(io.BytesIO(content)).load()
    except TokenizerError as error:
        raise TokenizerError(f"{path} {error.message}", hint=error.hint) from None
    except Exception:  # a damaged pickle may raise nearly anything
        raise TokenizerError(f"{path} is not a meta.pkl: it is truncated or something else") from None
    return CharacterTokenizer(_checked_symbols(path, meta))


class _PlainUnpickler(pickle.Unpickler):
    """Reads numbers, strings, lists and dicts; refuses every global, so nothing can run."""

    def find_class(self, module: str, name: str) -> Any:
        raise TokenizerError(f"asks for the Python object {module:.99}.{name:.99}, which no meta.pkl needs")

    def persistent_load(self, pid: Any) -> Any:
        raise TokenizerError("asks for an outside object, which no meta.pkl needs")


def _refuse_large_numbers(content: bytes) -> None:
    # ten bytes of pickle could otherwise make the unpickler claim 64 GiB for its memo, and large numbers can be
    # chosen so that a table of them takes hours
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name in ("PUT", "LONG_BINPUT") and int(argument or 0) > len(content):
            raise TokenizerError("numbers more objects than it can hold")
        if isinstance(argument, int) and abs(argument) > 2**32:
            raise TokenizerError("holds numbers that no token has")


def _checked_symbols(path: Path, meta: Any) -> dict[int, str]:
    stoi, itos = (meta.get(name) if isinstance(meta, dict) else None for name in ("stoi", "itos"))
    if not isinstance(stoi, dict) or not isinstance(itos, dict):
        raise TokenizerError(f"{path} has no stoi and itos tables")
    if any(type(token) is not int or not isinstance(text, str) or len(text) != 1 for token, text in itos.items()):
        raise TokenizerError(f"the tables of {path} do not map numbers to single characters")
    if stoi != {text: token for token, text in itos.items()} or len(stoi) != len(itos):
        raise TokenizerError(f"the stoi and itos tables of {path} disagree")
    size = meta.get("vocab_size")
    if type(size) is not int or not itos or min(itos) < 0 or max(itos) >= size:
        raise TokenizerError(f"the tables of {path} are empty or do not fit its vocab_size")
    return itos
