"""Text -> token ids -> bytes -> text: GPT-2's byte pairs, a Hugging Face folder's own, or nanoGPT's characters.

Every id stands for bytes, so that text can be decoded as it grows. Nothing here uses the network, writes a file or runs
what a file holds. Knows nothing of models or weights, nor of which tokenizer goes with one (vocabulary.py).

Source: GPT-2's byte order and splitting pattern, openai/gpt-2 (MIT); nanoGPT's meta.pkl (MIT).
"""

from __future__ import annotations

import codecs
import functools
import hashlib
import io
import json
import os
import pickle
import pickletools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from nanogpt_buckets.errors import TokenizerError, UnknownCharacter

if TYPE_CHECKING:
    import tiktoken
    import tokenizers

_END_OF_TEXT = "<|endoftext|>"
_MERGES = Path(__file__).parent / "gpt2" / "vocab.bpe"
_MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
# OpenAI's own; \s++$ only keeps long runs of spaces from backtracking.
_PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s++$|\s+(?!\S)|\s+"""

_META_LIMIT_BYTES = 64 * 2**20
_IDS_HINT = "pass prompts as lists of token ids"
_UNDECODABLE = "\N{REPLACEMENT CHARACTER}".encode()


class Tokenizer(Protocol):
    """Turns text into ids and each id into bytes; safe to share between threads."""

    @property
    def n_vocab(self) -> int:
        """Ids from here on cannot be decoded."""

    @property
    def start_token(self) -> int | None:
        """What an empty prompt becomes."""

    def encode(self, text: str, *, plain_text: bool = False) -> list[int]:
        """Return the ids of a text; a lone surrogate counts as U+FFFD.

        Args:
            text: any text.
            plain_text: a special token spelled out, such as <|endoftext|>, is ordinary text.
        """

    def token_bytes(self, id: int) -> bytes:
        """Return the bytes an id stands for, which may be part of a character; U+FFFD where it is not decodable."""

    def decodable(self, id: int) -> bool:
        """Say whether an id stands for anything."""


def decode(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    """Return the text of ids, with U+FFFD for what is no UTF-8."""
    return b"".join(map(tokenizer.token_bytes, ids)).decode("utf-8", "replace")


class StreamDecoder:
    """Decodes ids as they come; all pieces joined are exactly what `decode` makes of the same ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, id: int) -> str:
        """Return the characters that this id completes."""
        return self._decoder.decode(self._tokenizer.token_bytes(id))

    def flush(self) -> str:
        """Return what is left of a character that never ended."""
        return self._decoder.decode(b"", final=True)


class _Table:
    """What all tokenizers share: a table of bytes."""

    def __init__(self, table: dict[int, bytes], start_token: int | None) -> None:
        self._table = table
        self.n_vocab = max(table, default=-1) + 1
        self.start_token = start_token

    def token_bytes(self, id: int) -> bytes:
        return self._table.get(id, _UNDECODABLE)

    def decodable(self, id: int) -> bool:
        return id in self._table


def _whole(text: str) -> str:
    """Return text that has a UTF-8 form: surrogate pairs become their character, lone surrogates U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


# --- GPT-2 ------------------------------------------------------------------------------------------------------------


class _Gpt2(_Table):
    def __init__(self, encoding: tiktoken.Encoding, table: dict[int, bytes]) -> None:
        super().__init__(table, encoding.eot_token)
        self._encoding = encoding

    def encode(self, text: str, *, plain_text: bool = False) -> list[int]:
        special = set() if plain_text else {_END_OF_TEXT}
        try:
            return self._encoding.encode(_whole(text), allowed_special=special, disallowed_special=())
        except ValueError as error:  # the pattern ran out of stack: about a million spaces in a row
            raise TokenizerError(f"a text of {len(text)} characters cannot be split: {_reason(error)}") from error


@functools.cache
def gpt2() -> Tokenizer:
    """Return GPT-2's tokenizer, made from the merges that come with the package.

    Raises:
        TokenizerError: the bundled file is missing or was changed.
    """
    import tiktoken

    ranks = {bytes([byte]): rank for rank, byte in enumerate(_byte_symbols().values())}
    for merge in _bundled_merges():
        ranks[_symbol_bytes(merge.replace(" ", ""))] = len(ranks)
    encoding = tiktoken.Encoding(
        "gpt2",
        pat_str=_PATTERN,
        mergeable_ranks=ranks,
        special_tokens={_END_OF_TEXT: len(ranks)},
        explicit_n_vocab=len(ranks) + 1,
    )
    table = {rank: token for token, rank in ranks.items()}
    return _Gpt2(encoding, table | {len(ranks): _END_OF_TEXT.encode()})


def _bundled_merges() -> list[str]:
    try:
        content = _MERGES.read_bytes()
    except OSError as error:
        raise TokenizerError(f"{_MERGES} cannot be read: {error.strerror}", hint="reinstall nanogpt-buckets") from error
    if hashlib.sha256(content).hexdigest() != _MERGES_SHA256:
        raise TokenizerError(f"{_MERGES} is not GPT-2's file of merges", hint="reinstall nanogpt-buckets")
    return content.decode("utf-8").split("\n")[1:-1]  # less the version and what follows the last line's end


@functools.cache
def _byte_symbols() -> dict[str, int]:
    """Return the character that GPT-2's files write for each byte, in the order of the byte's id.

    Bytes that Latin-1 shows as a visible character come first, as that character; the others follow from U+0100 on.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(0x100) if byte not in visible]
    symbols = {chr(byte): byte for byte in visible}
    return symbols | {chr(0x100 + n): byte for n, byte in enumerate(hidden)}


def _symbol_bytes(token: str) -> bytes:
    """Undo the spelling of bytes as characters; a token with any other character is meant literally."""
    symbols = _byte_symbols()
    if all(character in symbols for character in token):
        return bytes(symbols[character] for character in token)
    return token.encode("utf-8", "replace")


# --- a Hugging Face folder --------------------------------------------------------------------------------------------


class _HuggingFace(_Table):
    def __init__(self, tokenizer: tokenizers.Tokenizer, start_names: list[str]) -> None:
        table = {id: _symbol_bytes(token) for token, id in tokenizer.get_vocab().items()}
        added = {id: token.content.encode() for id, token in tokenizer.get_added_tokens_decoder().items()}
        starts = [tokenizer.token_to_id(name) for name in start_names]
        super().__init__(table | added, next((id for id in starts if id is not None), None))
        self._tokenizer = tokenizer

    def encode(self, text: str, *, plain_text: bool = False) -> list[int]:
        tokenizer = self._plain if plain_text else self._tokenizer
        return list(tokenizer.encode(_whole(text)).ids)

    @functools.cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        # an object of its own: the switch would also change what other threads are encoding
        plain = type(self._tokenizer).from_str(self._tokenizer.to_str())
        plain.encode_special_tokens = True
        return plain


def from_folder(path: Path) -> Tokenizer | None:
    """Return a Hugging Face folder's own byte-level tokenizer, or None if it has none.

    Raises:
        TokenizerError: it is damaged, incomplete, or not byte-level.
    """
    config = _json_object(path / "tokenizer_config.json")
    named = list(_named_tokens(config)) + list(_named_tokens(_json_object(path / "special_tokens_map.json")))
    present = [name for name in ("vocab.json", "merges.txt") if (path / name).exists()]
    if (path / "tokenizer.json").exists():
        tokenizer = _from_tokenizer_json(path / "tokenizer.json")
    elif len(present) == 2:
        tokenizer = _from_merges(path, config, [_END_OF_TEXT, *(token for _, token in named)])
    elif present:
        missing = "merges.txt" if present == ["vocab.json"] else "vocab.json"
        raise TokenizerError(f"{path} has {present[0]} but no {missing}", hint=f"add {missing}, or {_IDS_HINT}")
    else:
        return None
    starts = [token for role in ("bos_token", "eos_token") for name, token in named if name == role]
    return _HuggingFace(tokenizer, [_END_OF_TEXT, *starts])


def _from_tokenizer_json(path: Path) -> tokenizers.Tokenizer:
    import tokenizers

    _require_byte_level(path, _json_object(path).get("decoder"))
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more precise
        raise TokenizerError(f"{path} is not a tokenizer: {_reason(error)}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _require_byte_level(path: Path, decoder: Any) -> None:
    parts = [decoder]
    if isinstance(decoder, dict) and isinstance(decoder.get("decoders"), list):
        parts = decoder["decoders"]
    kinds = [str(part.get("type")) if isinstance(part, dict) else "none" for part in parts]
    if "ByteLevel" not in kinds or not {"ByteLevel", "Fuse"}.issuperset(kinds):
        raise TokenizerError(
            f"{path} is not a byte-level tokenizer: its decoder is {' + '.join(kinds) or 'none'}, not ByteLevel",
            hint=_IDS_HINT,
        )


def _from_merges(folder: Path, config: dict[str, Any], special: list[str]) -> tokenizers.Tokenizer:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    try:
        tokenizer = Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    except Exception as error:  # the library raises nothing more precise
        raise TokenizerError(
            f"vocab.json and merges.txt in {folder} are not a tokenizer: {_reason(error)}"
        ) from error
    prefix = config.get("add_prefix_space") is True
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()
    for id, content, flags in _added_tokens(folder, config):
        tokenizer.add_tokens([AddedToken(content, **flags)])
        if tokenizer.token_to_id(content) != id:
            raise TokenizerError(f"the token {content!r} in {folder} cannot have the id {id}", hint=_IDS_HINT)
    tokenizer.add_special_tokens([token for token in special if tokenizer.token_to_id(token) is not None])
    return tokenizer


def _added_tokens(folder: Path, config: dict[str, Any]) -> list[tuple[int, str, dict[str, bool]]]:
    """Return the tokens beside the merges by id: in tokenizer_config.json, which knows more, or added_tokens.json."""
    names = ("lstrip", "rstrip", "normalized", "single_word", "special")
    try:
        added = {int(id): (str(content), {}) for content, id in _json_object(folder / "added_tokens.json").items()}
        for id, token in (config.get("added_tokens_decoder") or {}).items():
            added[int(id)] = (str(token["content"]), {name: bool(token[name]) for name in names if name in token})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise TokenizerError(f"the added tokens in {folder} are not tokens and ids") from error
    return [(id, *added[id]) for id in sorted(added)]


def _named_tokens(config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield each role and its token, such as bos_token and <|endoftext|>."""
    for role, value in config.items():
        for token in value if isinstance(value, list) else [value]:
            content = token.get("content") if isinstance(token, dict) else token
            if isinstance(content, str) and role.endswith(("_token", "_special_tokens")):
                yield role, content


def _json_object(path: Path) -> dict[str, Any]:
    """Return a file's JSON object, empty if there is no such file."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise TokenizerError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path} is not JSON: {_reason(error)}") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path} is not a JSON object")
    return value


def _reason(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")


# --- characters -------------------------------------------------------------------------------------------------------


class _Characters(_Table):
    def __init__(self, symbols: Mapping[int, str]) -> None:
        super().__init__({id: _whole(symbol).encode() for id, symbol in symbols.items()}, None)
        self._ids = {symbol: id for id, symbol in symbols.items()}
        self.start_token = self._ids.get("\n", min(symbols, default=None))

    def encode(self, text: str, *, plain_text: bool = False) -> list[int]:
        text = _whole(text)
        try:
            return [self._ids[character] for character in text]
        except KeyError:
            position, unknown = next((n, c) for n, c in enumerate(text) if c not in self._ids)
        raise UnknownCharacter(
            f"character {unknown!r} (U+{ord(unknown):04X}) at position {position} is not one of the "
            f"{len(self._ids)} characters this model knows",
            hint="a character-level model can only read characters that were in its training text",
        )


def characters(symbols: Mapping[int, str]) -> Tokenizer:
    """Return the tokenizer of a character-level model.

    Args:
        symbols: the character of each id.

    Raises:
        TokenizerError: a symbol is not one character, or two ids share one.
    """
    for id, symbol in symbols.items():
        if len(symbol) != 1:
            raise TokenizerError(f"id {id} stands for {symbol!r}, which is not one character")
    if len(set(symbols.values())) != len(symbols):
        raise TokenizerError("two ids stand for the same character")
    return _Characters(symbols)


class _PlainUnpickler(pickle.Unpickler):
    """Reads dictionaries, strings and numbers; refuses whatever would import or call something."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise TokenizerError(f"it would run {module}.{name}", hint="a meta.pkl needs only dictionaries")

    def persistent_load(self, pid: Any) -> NoReturn:
        raise TokenizerError("it refers to objects outside itself", hint="a meta.pkl needs only dictionaries")
