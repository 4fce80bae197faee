"""Which tokenizer goes with a model, and whether it may.

Knows nothing of how text becomes ids nor of weights.
"""

from __future__ import annotations

import os
from pathlib import Path

from nanogpt_buckets.errors import TokenizerError, UsageError
from nanogpt_buckets.model.checkpoint import Model
from nanogpt_buckets.model.tokenization.base import Tokenizer
from nanogpt_buckets.model.tokenization.characters import CharacterTokenizer, find_meta, from_meta
from nanogpt_buckets.model.tokenization.folder import from_folder
from nanogpt_buckets.model.tokenization.gpt2 import gpt2
from nanogpt_buckets.values import shown

# GPT-2's vocabulary, and the same padded to a multiple of 64 as nanoGPT trains it.
_GPT2_VOCAB_SIZES = (50257, 50304)

TokenizerChoice = str | os.PathLike[str] | Tokenizer | None


def tokenizer_for(model: Model, choice: TokenizerChoice = None) -> Tokenizer:
    """Return the model's tokenizer.

    Args:
        model: the model.
        choice: a tokenizer; "gpt2"; the path of a meta.pkl or of a folder with tokenizer files; None looks beside the
            model, and for a nanoGPT checkpoint in data/<dataset>/ under the working directory too.

    Raises:
        TokenizerError: none was found, it cannot be read, or its size is not the model's.
    """
    rows = model.architecture.vocab_size
    tokenizer, name = _read(_found(model) if choice is None else choice, rows)
    if not _fits(tokenizer.n_vocab, rows, model.kind):
        raise TokenizerError(f"{name} has {tokenizer.n_vocab} tokens and the model {rows}: they do not belong together")
    return tokenizer


def _fits(tokens: int, rows: int, kind: str) -> bool:
    """Return whether rows the tokenizer has no token for are only there to round their number up."""
    unit = min(rows & -rows, 128)  # the largest power of two that divides rows: nanoGPT rounds up to 64
    # what was saved with a folder's model is its own, and some have rows for tokens to come
    return 0 <= rows - tokens < (max(unit, 8, rows // 50) if kind == "huggingface" else unit if unit >= 64 else 1)


def _read(choice: str | os.PathLike[str] | Tokenizer, rows: int) -> tuple[Tokenizer, str]:
    if choice == "gpt2":
        return gpt2(), "GPT-2's tokenizer"
    if isinstance(choice, Tokenizer):
        return choice, "the tokenizer"
    if not isinstance(choice, str | os.PathLike):
        raise UsageError(
            f"{shown(choice)} is no tokenizer", hint="give a path, gpt2 or what has encode and token_bytes"
        )
    path = Path(os.path.expanduser(choice))
    if not os.path.isdir(path):
        return from_meta(path), str(path)
    return from_folder(path, rows), f"the tokenizer in {path}"


def _found(model: Model) -> str | Path | Tokenizer:
    """Return the choice that goes with a model."""
    if model.kind == "gpt2":
        return "gpt2"
    if model.characters is not None:
        return CharacterTokenizer(dict(enumerate(model.characters)))
    assert model.path is not None
    if model.kind == "huggingface":
        return model.path
    if meta := find_meta(model.path.parent, model.dataset):
        return meta
    rows = model.architecture.vocab_size
    if rows in _GPT2_VOCAB_SIZES:
        return "gpt2"
    raise TokenizerError(
        f"the checkpoint has {rows} tokens, which is not GPT-2's vocabulary, and no meta.pkl was found beside it or in "
        "its dataset's folder",
        hint="pass the dataset's meta.pkl: --meta data/<dataset>/meta.pkl (tokenizer= in Python)",
    )
