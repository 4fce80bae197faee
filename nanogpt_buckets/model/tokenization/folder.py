"""A Hugging Face folder's own tokenizer, of whatever kind, as transformers' AutoTokenizer reads it.

That library decides what ids a text has; here its errors become ours, and its ids text one at a time. No code of the
folder is run. Knows nothing of models or which of them a tokenizer belongs to.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import os
import re
import stat
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nanogpt_buckets.errors import BucketsError, TokenizerError
from nanogpt_buckets.model.tokenization.base import ByteTable, Tokenizer, well_formed
from nanogpt_buckets.model.tokenization.gpt2 import symbols_to_bytes

# The largest that are published have 35 MB.
_MAX_BYTES = 128 * 1024 * 1024
_OPENED = ("added_tokens", "config", "merges", "sentencepiece", "special_tokens", "spiece", "tokenizer", "vocab")
_READ = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".vocab", ".bpe")
_PARTS = {"tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "vocab.txt"}
# Decoders under which more ids leave the text of the ones before as it is.
_STEADY = {"ByteLevel", "ByteFallback", "BPEDecoder", "Fuse", "Metaspace", "Replace", "Strip", "WordPiece"}
_BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")
# How much transformers logs and whether it recognises special tokens are states of the library, not of one call.
_LOCK = threading.Lock()
_HINT = "prompts may be lists of token ids in Python, or give another tokenizer with --tokenizer"


def from_folder(path: Path, rows: int | None = None) -> Tokenizer:
    """Return a folder's own tokenizer, less added tokens that a model of so many rows does not know."""
    names = _checked_names(path)
    pieces = any(name.endswith(".model") for name in names)
    if not names & _PARTS and not pieces:
        raise TokenizerError(f"{path} has no tokenizer", hint=_HINT)
    if "tokenizer.json" not in names and ("vocab.json" in names) != ("merges.txt" in names):
        missing = "merges.txt" if "vocab.json" in names else "vocab.json"
        raise TokenizerError(f"the tokenizer in {path} is incomplete: {missing} is missing", hint=_HINT)
    if pieces and "tokenizer.json" not in names and not importlib.util.find_spec("sentencepiece"):
        # transformers would try something else, and complain of that
        needs = f"the tokenizer in {path} needs sentencepiece and protobuf, which are not installed"
        raise TokenizerError(needs, hint=f"pip install sentencepiece protobuf; without, {_HINT}")
    with _using(path):
        from transformers import AutoTokenizer, GPT2Config

        # vocab.json and merges.txt alone do not say what they are of
        bare = not names & {"config.json", "tokenizer_config.json", "tokenizer.json"}
        loaded = AutoTokenizer.from_pretrained(
            str(path.absolute()), local_files_only=True, trust_remote_code=False, config=GPT2Config() if bare else None
        )
        _refuse_chance(path, loaded)
        byte_level = {"ByteLevel"} <= _decoders(path, loaded) <= {"ByteLevel", "Fuse"}
        return (_ByteLevelTokenizer if byte_level else _ContextualTokenizer)(path, loaded, rows)


def _checked_names(path: Path) -> set[str]:
    """Return what is in a folder; nothing that transformers might open hangs or has no end."""
    try:
        with os.scandir(path) as found:
            about = {entry.name: entry.stat() for entry in found if entry.name.endswith(_READ)}
    except OSError as error:
        raise TokenizerError(f"the tokenizer in {path} cannot be read: {error.strerror}", hint=_HINT) from None
    for name, status in about.items():
        long = status.st_size > _MAX_BYTES and name.startswith(_OPENED)  # there may be a text it was trained on
        if long or not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
            what = f"longer than {_MAX_BYTES} bytes" if long else "no regular file"
            raise TokenizerError(f"{name} in {path} is {what}", hint=_HINT)
    return set(about)


@contextlib.contextmanager
def _using(path: Path) -> Iterator[None]:
    """One at a time, and silent; whatever transformers and the libraries under it raise is a TokenizerError."""
    from transformers.utils import logging

    with _LOCK:
        level = logging.get_verbosity()
        logging.set_verbosity(50)  # nothing but what is critical
        try:
            yield
        except BucketsError:
            raise
        except BaseException as error:
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # of Rust; no Exception
                raise
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300].rstrip(".:,")
            raise TokenizerError(f"the tokenizer in {path} cannot be read: {reason}", hint=_HINT) from None
        finally:
            logging.set_verbosity(level)


def _refuse_chance(path: Path, loaded: Any) -> None:
    whole = path / "tokenizer.json"  # some of transformers' classes leave out what it says
    dropout = json.loads(whole.read_bytes())["model"].get("dropout") if whole.exists() else None
    if dropout or (getattr(loaded, "sp_model_kwargs", None) or {}).get("enable_sampling"):
        chance = f'"dropout": {dropout} in tokenizer.json' if dropout else "sp_model_kwargs in tokenizer_config.json"
        raise TokenizerError(
            f"the tokenizer in {path} cuts text by chance ({chance}), so that no seed would tell its ids",
            hint="remove that: it is meant for training",
        )


def _decoders(path: Path, loaded: Any) -> set[str]:
    """Return what makes text of tokens, by kind; nothing for a tokenizer written in Python."""
    decoder = loaded.backend_tokenizer.decoder if loaded.is_fast else None
    description = {"decoders": []} if decoder is None else json.loads(decoder.__getstate__())
    parts = description.get("decoders", [description])
    for part in parts:
        pattern = part.get("pattern", {"String": " "})
        if part["type"] not in _STEADY or part.get("stop") or len(pattern.get("String", "")) != 1:
            odd = f"the decoder {json.dumps(part):.300}, under which later tokens may change earlier text"
            raise TokenizerError(f"the tokenizer in {path} has {odd}", hint=_HINT)
    return {part["type"] for part in parts}


class _FolderTokenizer:
    """What AutoTokenizer read, with ids that are the model's."""

    def __init__(self, path: Path, loaded: Any, rows: int | None) -> None:
        self._path = path
        self._loaded = loaded
        self._rows = rows
        added = loaded.added_tokens_decoder
        self._symbols = {token: symbol for symbol, token in loaded.get_vocab().items()}
        if self._symbols.keys() <= added.keys():
            raise TokenizerError(f"the tokenizer in {path} holds no vocabulary", hint=_HINT)
        self._added = {token: text.content for token, text in added.items() if rows is None or token < rows}
        known = self._symbols.keys() - added.keys() | self._added.keys()
        self.n_vocab = max(known) + 1
        names = (loaded.bos_token_id, loaded.eos_token_id, loaded.cls_token_id)
        self.start_token: int | None = next((token for token in names if token in known), None)

    def encode(self, text: str, *, plain_text: bool = False) -> list[int]:
        """See `Tokenizer`."""
        options = {"split_special_tokens": True} if plain_text else {}
        with _using(self._path):
            ids: list[int] = self._loaded(well_formed(text), verbose=False, **options).input_ids
        largest = max(ids, default=0)
        if self._rows is not None and largest >= self._rows:
            what = f"{self._symbols.get(largest)!r} is token {largest} of the tokenizer in {self._path}"
            raise TokenizerError(f"{what}, and the model has only {self._rows}", hint="leave it out of the prompt")
        return ids


class _ByteLevelTokenizer(_FolderTokenizer, ByteTable):
    """A byte-level BPE: each id has bytes of its own."""

    def __init__(self, path: Path, loaded: Any, rows: int | None) -> None:
        _FolderTokenizer.__init__(self, path, loaded, rows)
        spelled = {token: symbols_to_bytes(symbol) for token, symbol in self._symbols.items() if token < self.n_vocab}
        self._table = spelled | {token: text.encode() for token, text in self._added.items()}


class _ContextualTokenizer(_FolderTokenizer):
    """Any other: only transformers knows what text its ids make together."""

    def text_of(self, ids: Sequence[int]) -> str:
        """See `ContextualTokenizer`."""
        known = [token for token in ids if token < self.n_vocab]
        with _using(self._path):
            if self._loaded.is_fast:
                return self._decode(known)
            # what is written in Python puts a blank before text once a special token follows it
            runs = [(name, list(run)) for name, run in itertools.groupby(known, self._added.get)]
            return "".join(self._decode(run) if name is None else name * len(run) for name, run in runs)

    def _decode(self, ids: list[int]) -> str:
        return str(self._loaded.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def is_open(self, token: int) -> bool:
        """See `ContextualTokenizer`."""
        return _BYTE_TOKEN.fullmatch(self._symbols.get(token, "")) is not None

    def token_bytes(self, token: int) -> bytes:
        """See `Tokenizer`: what the id is on its own."""
        return self.text_of([token]).encode("utf-8", "replace")
