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
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nanogpt_buckets.errors import BucketsError, TokenizerError
from nanogpt_buckets.model.tokenization.base import ByteTable, Tokenizer, printable, well_formed
from nanogpt_buckets.model.tokenization.gpt2 import symbols_to_bytes

# The largest that are published have 35 MB.
_MAX_BYTES = 128 * 1024 * 1024
_READ = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".vocab", ".bpe")
_PARTS = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "vocab.txt")
# What some of transformers' tokenizers need beside it: the name of the module and of the package.
_PACKAGES = {
    "sentencepiece": "sentencepiece",
    "google.protobuf": "protobuf",
    "fugashi": "fugashi",
    "jieba": "jieba",
    "rjieba": "rjieba",
    "sacremoses": "sacremoses",
    "sudachipy": "sudachipy",
    "rhoknp": "rhoknp",
}
# Decoders under which more ids leave the text of the ones before as it is.
_STEADY = {"ByteLevel", "ByteFallback", "BPEDecoder", "Fuse", "Metaspace", "Replace", "Strip", "WordPiece"}
_BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")
# What transformers logs, what it warns of, and whether special tokens are recognised are states, not of one call.
_LOCK = threading.Lock()
_ANYHOW = "prompts may be lists of token ids in Python, or give another tokenizer with --tokenizer"


def from_folder(path: Path, rows: int | None = None) -> Tokenizer | None:
    """Return a folder's own tokenizer, or None if it has none.

    Args:
        path: a folder as `save_pretrained` writes it, or of older days.
        rows: how many ids the model knows; added tokens beyond it are no part of the tokenizer. None is no limit.

    Raises:
        TokenizerError: it is incomplete, malformed, needs a package that is not here, or cannot be used; the message
            says which.
    """
    names = {entry.name for entry in _checked(path)}
    if not names.intersection(_PARTS) and not any(name.endswith(".model") for name in names):
        return None
    if "tokenizer.json" not in names and ("vocab.json" in names) != ("merges.txt" in names):
        missing = "merges.txt" if "vocab.json" in names else "vocab.json"
        raise TokenizerError(f"the tokenizer in {path} is incomplete: {missing} is missing")
    bare = not names.intersection({"config.json", "tokenizer_config.json", "tokenizer.json"})
    with _errors_of(path):
        loaded = _load(path, bare)
        _refuse_chance(path, loaded)
        kinds = _decoders(path, loaded)
        if "ByteLevel" in kinds and kinds <= {"ByteLevel", "Fuse"}:
            return _ByteLevelTokenizer(path, loaded, rows)
        return _ContextualTokenizer(path, loaded, rows)


def _checked(path: Path) -> list[os.DirEntry[str]]:
    """Return what is in a folder; nothing that transformers might open hangs or has no end."""
    try:
        with os.scandir(path) as found:
            entries = list(found)
        for entry in entries:
            if not entry.name.endswith(_READ):
                continue
            about = entry.stat()
            if not stat.S_ISREG(about.st_mode):
                raise TokenizerError(f"{printable(entry.path)} is not a regular file", hint=_ANYHOW)
            if about.st_size > _MAX_BYTES:
                raise TokenizerError(f"{printable(entry.path)} is longer than {_MAX_BYTES} bytes", hint=_ANYHOW)
    except OSError as error:
        raise TokenizerError(f"the tokenizer in {path} cannot be read: {error.strerror}", hint=_ANYHOW) from None
    return entries


def _load(path: Path, bare: bool) -> Any:
    from transformers import AutoTokenizer, GPT2Config

    with _quiet():
        # vocab.json and merges.txt alone do not say what they are of
        options = {"config": GPT2Config()} if bare else {}
        return AutoTokenizer.from_pretrained(
            str(path.absolute()), local_files_only=True, trust_remote_code=False, **options
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    with _LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        level = logging.get_verbosity()
        logging.set_verbosity(50)  # nothing but what is critical
        try:
            yield
        finally:
            logging.set_verbosity(level)


@contextlib.contextmanager
def _errors_of(path: Path) -> Iterator[None]:
    """Whatever transformers and the libraries under it raise is a TokenizerError."""
    try:
        yield
    except BucketsError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # of Rust; no Exception
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        missing = _missing_packages(path, error)
        if missing:
            raise TokenizerError(
                f"the tokenizer in {path} needs {' and '.join(missing)}, which cannot be imported here",
                hint=f"pip install {' '.join(missing)}; without, {_ANYHOW}",
            ) from None
        reason = printable(lines[0]).rstrip(".:")
        raise TokenizerError(f"the tokenizer in {path} cannot be read: {reason}", hint=_ANYHOW) from None


def _missing_packages(path: Path, error: BaseException) -> list[str]:
    wanted = set(re.findall("[a-z]+", str(error).lower())) if isinstance(error, ImportError) else set()
    if any(path.glob("*.model")):  # transformers tries something else then, and complains of that
        wanted |= {"sentencepiece", "protobuf"}
    return [package for module, package in _PACKAGES.items() if package in wanted and not _is_installed(module)]


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _refuse_chance(path: Path, loaded: Any) -> None:
    dropout = getattr(loaded.backend_tokenizer.model, "dropout", None) if loaded.is_fast else None
    if dropout:
        raise TokenizerError(
            f"the tokenizer in {path} merges by chance (BPE dropout {dropout}), so that no seed would tell its ids",
            hint='set "dropout": null in tokenizer.json: it is meant for training',
        )
    if getattr(loaded, "sp_model_kwargs", None) and loaded.sp_model_kwargs.get("enable_sampling"):
        raise TokenizerError(
            f"the tokenizer in {path} samples (enable_sampling), so that no seed would tell its ids",
            hint="remove sp_model_kwargs from tokenizer_config.json: it is meant for training",
        )


def _decoders(path: Path, loaded: Any) -> set[str]:
    """Return what makes text of tokens, by kind; nothing for a tokenizer written in Python."""
    decoder = loaded.backend_tokenizer.decoder if loaded.is_fast else None
    if decoder is None:
        return set()
    description = json.loads(decoder.__getstate__())
    parts = description.get("decoders", [description])
    for part in parts:
        odd = part["type"] not in _STEADY or part.get("stop") or len(part.get("pattern", {}).get("String", " ")) != 1
        if odd or "Regex" in part.get("pattern", {}):
            raise TokenizerError(
                f"the tokenizer in {path} has the decoder {printable(json.dumps(part))}, under which later tokens may "
                "change earlier text",
                hint=_ANYHOW,
            )
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
            raise TokenizerError(f"the tokenizer in {path} holds no vocabulary", hint=_ANYHOW)
        self._added = {token: text.content for token, text in added.items() if rows is None or token < rows}
        known = self._symbols.keys() - added.keys() | self._added.keys()
        self.n_vocab = max(known) + 1
        names = (loaded.bos_token_id, loaded.eos_token_id, loaded.cls_token_id)
        self.start_token: int | None = next((token for token in names if token in known), None)

    def encode(self, text: str, *, plain_text: bool = False) -> list[int]:
        """See `Tokenizer`."""
        options = {"split_special_tokens": True} if plain_text else {}
        with _errors_of(self._path), _quiet():
            ids: list[int] = self._loaded(well_formed(text), verbose=False, **options).input_ids
        largest = max(ids, default=0)
        if self._rows is not None and largest >= self._rows:
            raise TokenizerError(
                f"the tokenizer in {self._path} makes {self._symbols.get(largest)!r} token {largest}, and the model "
                f"has only {self._rows}",
                hint="leave it out of the prompt, or give a model whose embeddings were resized for it",
            )
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
        if self._loaded.is_fast:
            return self._decode(known)
        # what is written in Python puts a blank before text once a special token follows it
        runs = itertools.groupby(known, self._added.get)
        return "".join(self._decode(list(run)) if name is None else name * len(list(run)) for name, run in runs)

    def _decode(self, ids: list[int]) -> str:
        with _errors_of(self._path), _quiet():
            text: str = self._loaded.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def is_open(self, token: int) -> bool:
        """See `ContextualTokenizer`."""
        return _BYTE_TOKEN.fullmatch(self._symbols.get(token, "")) is not None

    def token_bytes(self, token: int) -> bytes:
        """See `Tokenizer`: what the id is on its own."""
        return self.text_of([token]).encode("utf-8", "replace")
