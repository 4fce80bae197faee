"""Text <-> token ids: GPT-2's BPE, a Hugging Face folder's own byte-level BPE, or single characters.

Nothing here uses the network or writes a file. Knows nothing of models, sampling or which tokenizer goes with which
model.
"""

from __future__ import annotations

import codecs
import functools
import hashlib
import json
import os
import pickle
import pickletools
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from nanogpt_buckets.errors import TokenizerError, UnknownCharacter

_VOCAB_BPE = Path(__file__).parent / "gpt2" / "vocab.bpe"
_VOCAB_BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
_END_OF_TEXT = "<|endoftext|>"
# How GPT-2 cuts text before merging: contractions, words, numbers, other signs, white space. \s++$ is ours: it cuts
# the same, and keeps a million spaces from exhausting the stack.
_GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s++$|\s+(?!\S)|\s+"""
_META_MAX_BYTES = 64 * 1024 * 1024
_UNDECODABLE = "\N{REPLACEMENT CHARACTER}".encode()


class Tokenizer(Protocol):
    """Text <-> ids.

    `n_vocab`: ids from here on cannot be decoded. `start_token`: what an empty prompt becomes, or None.
    """

    n_vocab: int
    start_token: int | None

    def encode(self, text: str, *, plain_text: bool = False) -> list[int]:
        """Return the ids of a text; plain_text makes special tokens' names ordinary text."""

    def token_bytes(self, token: int) -> bytes:
        """Return the UTF-8 bytes one id stands for, which may be part of a character; U+FFFD where there are none."""


def decode(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    """Return the text of ids; bytes that are no UTF-8 become U+FFFD."""
    return b"".join(tokenizer.token_bytes(token) for token in ids).decode("utf-8", "replace")


class _Table:
    """What the tokenizers share: the bytes of each id."""

    def __init__(self, table: dict[int, bytes], start_token: int | None) -> None:
        self._table = table
        self.n_vocab = max(table, default=-1) + 1
        self.start_token: int | None = start_token

    def token_bytes(self, token: int) -> bytes:
        return self._table.get(token, _UNDECODABLE)


class StreamDecoder:
    """Decodes one id at a time; the pieces, joined, equal `decode` of all ids exactly."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        """Return the characters this id completes."""
        return self._utf8.decode(self._tokenizer.token_bytes(token))

    def flush(self) -> str:
        """Return what an unfinished character becomes."""
        return self._utf8.decode(b"", final=True)


def well_formed(text: str) -> str:
    """Return text without lone surrogates, which have no UTF-8: each becomes U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


# --- GPT-2 --------------------------------------------------------------------------------------------------------


@functools.cache
def byte_symbols() -> dict[str, int]:
    """Return GPT-2's printable stand-in for each byte, in the order in which byte tokens are numbered.

    Bytes that print in Latin-1 stand for themselves; the others take the code points from 256 on.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _symbols_to_bytes(symbols: str) -> bytes:
    table = byte_symbols()
    if not table.keys() >= set(symbols):
        return symbols.encode("utf-8", "replace")  # no spelling of bytes: meant as it stands, as Hugging Face does
    return bytes(table[symbol] for symbol in symbols)


@functools.cache
def gpt2() -> Tokenizer:
    """Return GPT-2's tokenizer, built from the bundled merge list.

    Raises:
        TokenizerError: the bundled file is not OpenAI's.
    """
    try:
        content = _VOCAB_BPE.read_bytes()
    except OSError as error:
        message = f"{_VOCAB_BPE} cannot be read: {error.strerror}"
        raise TokenizerError(message, hint="install nanogpt-buckets again") from None
    if hashlib.sha256(content).hexdigest() != _VOCAB_BPE_SHA256:
        raise TokenizerError(f"{_VOCAB_BPE} is not OpenAI's vocab.bpe", hint="install nanogpt-buckets again")
    tokens = [bytes([byte]) for byte in byte_symbols().values()]
    for line in content.decode("utf-8").splitlines()[1:]:  # the first line names a version
        first, second = line.split(" ")
        tokens.append(_symbols_to_bytes(first) + _symbols_to_bytes(second))
    return _Gpt2Tokenizer(tokens)


class _Gpt2Tokenizer(_Table):
    def __init__(self, tokens: list[bytes]) -> None:
        import tiktoken

        ranks = {token: n for n, token in enumerate(tokens)}
        special = {_END_OF_TEXT: len(tokens)}
        self._encoding = tiktoken.Encoding(
            "nanogpt-buckets-gpt2", pat_str=_GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=special
        )
        super().__init__(dict(enumerate([*tokens, _END_OF_TEXT.encode()])), special[_END_OF_TEXT])

    def encode(self, text: str, *, plain_text: bool = False) -> list[int]:
        text = well_formed(text)
        if plain_text:
            return self._encoding.encode_ordinary(text)
        return self._encoding.encode(text, allowed_special={_END_OF_TEXT})


# --- a Hugging Face folder ------------------------------------------------------------------------------------------


def from_folder(path: Path) -> Tokenizer | None:
    """Return a folder's own byte-level BPE tokenizer, or None if it has none.

    Args:
        path: a folder with tokenizer.json, or with vocab.json and merges.txt.

    Raises:
        TokenizerError: the files are incomplete, malformed, or not a byte-level BPE.
    """
    vocab, merges, whole = path / "vocab.json", path / "merges.txt", path / "tokenizer.json"
    if whole.is_file():
        return _FolderTokenizer(path, whole.name)
    if vocab.is_file() != merges.is_file():
        missing = merges if vocab.is_file() else vocab
        raise TokenizerError(f"the tokenizer in {path} is incomplete: {missing.name} is missing")
    return _FolderTokenizer(path, None) if vocab.is_file() else None


class _FolderTokenizer(_Table):
    def __init__(self, path: Path, whole: str | None) -> None:
        try:
            # two, because whether special tokens are recognised is a property of the object, not of a call
            self._special, self._plain = (_load_folder(path, whole) for _ in range(2))
            self._plain.encode_special_tokens = True
            description = json.loads(self._special.to_str())
        except TokenizerError:
            raise
        except Exception as error:  # the library raises bare Exception for malformed files
            reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
            raise TokenizerError(f"the tokenizer in {path} cannot be read: {reason}") from None
        decoder = description.get("decoder") or {"type": "none"}
        kinds = [part["type"] for part in decoder.get("decoders", [decoder])]
        if "ByteLevel" not in kinds or not {"ByteLevel", "Fuse"}.issuperset(kinds):
            raise TokenizerError(
                f"the tokenizer in {path} is not a byte-level BPE: its decoder is {' + '.join(kinds)}, not ByteLevel",
                hint="pass prompts as lists of token ids",
            )
        table = {token: _symbols_to_bytes(symbol) for symbol, token in self._special.get_vocab().items()}
        added = {token: added.content.encode() for token, added in self._special.get_added_tokens_decoder().items()}
        ids = (self._special.token_to_id(name) for name in (_END_OF_TEXT, "<s>", "</s>"))
        super().__init__(table | added, next((token for token in ids if token is not None), None))

    def encode(self, text: str, *, plain_text: bool = False) -> list[int]:
        tokenizer = self._plain if plain_text else self._special
        ids: list[int] = tokenizer.encode(well_formed(text)).ids
        return ids


def _load_folder(path: Path, whole: str | None) -> Any:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    if whole is not None:
        made = tokenizers.Tokenizer.from_file(str(path / whole))
        made.no_truncation()  # either may be saved in the file; both would change prompts
        made.no_padding()
        return made
    config = _json_object(path / "tokenizer_config.json")
    made = tokenizers.Tokenizer(models.BPE.from_file(str(path / "vocab.json"), str(path / "merges.txt")))
    prefix = bool(config.get("add_prefix_space", False))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    made.decoder = decoders.ByteLevel()
    named = [row.get("content") for row in config.get("added_tokens_decoder", {}).values() if isinstance(row, dict)]
    special = {_END_OF_TEXT, *named, *_json_object(path / "added_tokens.json")}
    known = sorted(name for name in special if isinstance(name, str) and made.token_to_id(name) is not None)
    made.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in known])
    return made


def _json_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    return content if isinstance(content, dict) else {}


# --- characters -----------------------------------------------------------------------------------------------------


def characters(symbols: Mapping[int, str]) -> Tokenizer:
    """Return a tokenizer whose tokens are single characters.

    Args:
        symbols: id -> character.
    """
    return _CharacterTokenizer(symbols)


class _CharacterTokenizer(_Table):
    def __init__(self, symbols: Mapping[int, str]) -> None:
        self._ids = {character: token for token, character in symbols.items()}
        start = self._ids.get("\n", min(symbols, default=None))
        super().__init__({token: well_formed(text).encode() for token, text in symbols.items()}, start)

    def encode(self, text: str, *, plain_text: bool = False) -> list[int]:
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
    """Return the meta.pkl beside a checkpoint, else the one in data/<dataset>/ under the working directory.

    Args:
        folder: where the checkpoint is.
        dataset: the name the checkpoint was trained with; anything but a plain relative name is ignored.
    """
    places = [folder / "meta.pkl"]
    name = PurePosixPath(dataset or "")
    if dataset and not name.is_absolute() and ".." not in name.parts:
        places.append(Path("data", dataset, "meta.pkl"))
    return next((place for place in places if os.path.isfile(place)), None)  # Path.is_file raises on odd names


def from_meta(path: Path) -> Tokenizer:
    """Return the character tokenizer of a nanoGPT meta.pkl, read without running anything it may contain.

    Args:
        path: a pickle of {"vocab_size", "stoi", "itos"}.

    Raises:
        TokenizerError: missing, no such pickle, or it asks for any Python object.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_META_MAX_BYTES + 1)
    except OSError as error:
        raise TokenizerError(f"the tokenizer {path} cannot be read: {error.strerror}") from None
    if len(content) > _META_MAX_BYTES:
        raise TokenizerError(f"{path} is too large to be a meta.pkl")
    try:
        _refuse_wide_memo(content)
        meta = _PlainUnpickler(content).load()
    except TokenizerError as error:
        raise TokenizerError(f"{path} {error.message}", hint=error.hint) from None
    except Exception:  # a damaged pickle may raise nearly anything
        raise TokenizerError(f"{path} is not a meta.pkl: it is truncated or something else") from None
    return characters(_checked_symbols(path, meta))


class _PlainUnpickler(pickle.Unpickler):
    """Reads numbers, strings, lists and dicts; refuses every global, so nothing can run."""

    def __init__(self, content: bytes) -> None:
        import io

        super().__init__(io.BytesIO(content))

    def find_class(self, module: str, name: str) -> Any:
        raise TokenizerError(f"asks for the Python object {module}.{name}, which no meta.pkl needs")

    def persistent_load(self, pid: Any) -> Any:
        raise TokenizerError("asks for an outside object, which no meta.pkl needs")


def _refuse_wide_memo(content: bytes) -> None:
    # ten bytes of pickle could otherwise make the unpickler claim 64 GiB for its memo
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name in ("PUT", "LONG_BINPUT") and int(argument or 0) > len(content):
            raise TokenizerError("numbers more objects than it can hold")


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
        raise TokenizerError(f"the tables of {path} are empty or do not fit its vocab_size {size}")
    return itos
