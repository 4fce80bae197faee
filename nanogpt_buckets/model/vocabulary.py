"""Which tokenizer goes with a model.

Knows nothing of how text becomes ids (tokenizer.py) nor of weights.
"""

from __future__ import annotations

import os
from pathlib import Path

from nanogpt_buckets.errors import TokenizerError
from nanogpt_buckets.model import tokenizer as tokenizers
from nanogpt_buckets.model.checkpoint import Model
from nanogpt_buckets.model.tokenizer import Tokenizer

# GPT-2's vocabulary, and the same padded to a multiple of 64 as nanoGPT trains it.
_GPT2_VOCAB_SIZES = (50257, 50304)

TokenizerChoice = str | os.PathLike[str] | Tokenizer | None


def tokenizer_for(model: Model, choice: TokenizerChoice = None) -> Tokenizer | None:
    """Return the model's tokenizer, or None for a folder that has none: it works with token ids.

    Args:
        model: the model.
        choice: a tokenizer; "gpt2"; the path of a meta.pkl or of a folder with tokenizer files; None looks beside the
            model, and for a nanoGPT checkpoint in data/<dataset>/ under the working directory too.

    Raises:
        TokenizerError: none was found, or it has more tokens than the model.
    """
    tokenizer = _explicit(choice) if choice is not None else _found(model)
    if tokenizer is not None and tokenizer.n_vocab > model.architecture.vocab_size:
        raise TokenizerError(
            f"the tokenizer has {tokenizer.n_vocab} tokens and the model {model.architecture.vocab_size}: "
            "they do not belong together"
        )
    return tokenizer


def _explicit(choice: str | os.PathLike[str] | Tokenizer) -> Tokenizer:
    if choice == "gpt2":
        return tokenizers.gpt2()
    if not isinstance(choice, str | os.PathLike):
        return choice
    path = Path(choice).expanduser()
    if not path.is_dir():
        return tokenizers.from_meta(path)
    found = tokenizers.from_folder(path)
    if found is None:
        raise TokenizerError(f"{path} has no tokenizer.json and no vocab.json with merges.txt")
    return found


def _found(model: Model) -> Tokenizer | None:
    if model.kind == "gpt2":
        return tokenizers.gpt2()
    if model.characters is not None:
        return tokenizers.characters(dict(enumerate(model.characters)))
    assert model.path is not None
    folder = model.path if model.path.is_dir() else model.path.parent
    if model.kind == "huggingface":
        return tokenizers.from_folder(folder)
    meta = tokenizers.find_meta(folder, model.dataset)
    if meta is not None:
        return tokenizers.from_meta(meta)
    if model.architecture.vocab_size in _GPT2_VOCAB_SIZES:
        return tokenizers.gpt2()
    raise TokenizerError(
        f"the checkpoint has {model.architecture.vocab_size} tokens, which is not GPT-2's vocabulary, and no meta.pkl "
        "was found beside it or in its dataset's folder",
        hint="pass the dataset's meta.pkl: --meta data/<dataset>/meta.pkl (tokenizer= in Python)",
    )
