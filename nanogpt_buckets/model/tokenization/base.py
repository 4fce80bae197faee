"""What a tokenizer is, and how ids become text one at a time.

Knows nothing of any one tokenizer, of models or of sampling.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# How many ids are decoded anew with each token, at most, and how many of them are kept as context.
_WINDOW, _CONTEXT = 256, 64


@runtime_checkable
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


@runtime_checkable
class ContextualTokenizer(Tokenizer, Protocol):
    """A tokenizer whose ids mean something only beside their neighbours, as in SentencePiece and WordPiece."""

    def text_of(self, ids: Sequence[int]) -> str:
        """Return the text of ids; more ids leave what is returned as it is, but for U+FFFD and open ends."""

    def is_open(self, token: int) -> bool:
        """Return whether text that ends with this id may still change."""


class ByteTable:
    """The tokenizers whose ids each have their own bytes."""

    def __init__(self, table: dict[int, bytes], start_token: int | None) -> None:
        self._table = table
        self.n_vocab = max(table, default=-1) + 1
        self.start_token: int | None = start_token

    def token_bytes(self, token: int) -> bytes:
        """See `Tokenizer`."""
        return self._table.get(token, _REPLACEMENT.encode())


class StreamDecoder:
    """Decodes ids as they come; the pieces, joined, equal `decode` of all ids exactly."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._ids: list[int] = []  # of a contextual tokenizer: the last ones,
        self._shown = 0  # and how many characters of their text were returned

    def feed(self, *tokens: int) -> str:
        """Return the characters these ids complete."""
        if not isinstance(self._tokenizer, ContextualTokenizer):
            return self._utf8.decode(b"".join(map(self._tokenizer.token_bytes, tokens)))
        self._ids += tokens
        if not self._ids or self._tokenizer.is_open(self._ids[-1]):
            return ""
        text = self._tokenizer.text_of(self._ids)
        certain = text.rstrip(_REPLACEMENT)
        piece = self._show(certain)
        if len(self._ids) > _WINDOW and certain == text:
            context = self._tokenizer.text_of(self._ids[-_CONTEXT:])
            if context:  # else what a decoder does to the beginning of a text would be done to what follows
                self._ids, self._shown = self._ids[-_CONTEXT:], len(context)
        return piece

    def flush(self) -> str:
        """Return what an unfinished character becomes."""
        if isinstance(self._tokenizer, ContextualTokenizer):
            return self._show(self._tokenizer.text_of(self._ids))
        return self._utf8.decode(b"", final=True)

    def _show(self, text: str) -> str:
        piece = text[self._shown :]
        self._shown += len(piece)
        return piece


def decode(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    """Return the text of ids; bytes that are no UTF-8 become U+FFFD."""
    stream = StreamDecoder(tokenizer)
    return stream.feed(*ids) + stream.flush()


def well_formed(text: str) -> str:
    """Return text without lone surrogates, which have no UTF-8: each becomes U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
