"""GPT-2's byte-level BPE, from OpenAI's merge list, which is part of this package.

Knows nothing of folders, models or which of them this belongs to.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from nanogpt_buckets.errors import TokenizerError
from nanogpt_buckets.model.tokenization.base import ByteTable, Tokenizer, well_formed

_VOCAB_BPE = Path(__file__).parents[1] / "gpt2" / "vocab.bpe"
_VOCAB_BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
_END_OF_TEXT = "<|endoftext|>"
# How GPT-2 cuts text before merging: contractions, words, numbers, other signs, white space but for the last before a
# word. GPT-2 writes \s+(?!\S)|\s+ there, which cuts the same, and which a million blanks drive out of its stack.
_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s++$|(?>\s{1,1000}(?=\s))++|\s"""


@functools.cache
def byte_symbols() -> dict[str, int]:
    """Return GPT-2's stand-in for each byte, in token order: itself where Latin-1 prints it, else from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def symbols_to_bytes(symbols: str) -> bytes:
    """Return the bytes that stand-ins mean; what spells no bytes is meant as it stands, as Hugging Face has it."""
    table = byte_symbols()
    if not table.keys() >= set(symbols):
        return symbols.encode("utf-8", "replace")
    return bytes(table[symbol] for symbol in symbols)


@functools.cache
def gpt2() -> Tokenizer:
    """Return GPT-2's tokenizer, built from the bundled merge list."""
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
        tokens.append(symbols_to_bytes(first) + symbols_to_bytes(second))
    return _Gpt2Tokenizer(tokens)


class _Gpt2Tokenizer(ByteTable):
    def __init__(self, tokens: list[bytes]) -> None:
        import tiktoken

        ranks = {token: n for n, token in enumerate(tokens)}
        special = {_END_OF_TEXT: len(tokens)}
        self._encoding = tiktoken.Encoding(
            "nanogpt-buckets-gpt2", pat_str=_PATTERN, mergeable_ranks=ranks, special_tokens=special
        )
        super().__init__(dict(enumerate([*tokens, _END_OF_TEXT.encode()])), len(tokens))

    def encode(self, text: str, *, plain_text: bool = False) -> list[int]:
        text = well_formed(text)
        if plain_text:
            return self._encoding.encode_ordinary(text)
        return self._encoding.encode(text, allowed_special={_END_OF_TEXT})
