"""One sequence on its way from a prompt to text: its ids, the text they make, and when it is done.

Knows nothing of buckets, logits or how tokens are chosen.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from typing import Any

from nanogpt_buckets.errors import UsageError
from nanogpt_buckets.run.textstream import TextStream
from nanogpt_buckets.values import shown, whole_number

Prompt = str | Iterable[int]


def as_prompts(prompts: Prompt | Iterable[Prompt]) -> list[Prompt]:
    """Return a list of prompts; one string, or token ids in any iterable, is one prompt. Iterators are read once.

    Raises:
        UsageError: it is none of these.
    """
    if isinstance(prompts, str):
        return [prompts]
    several = _listed(prompts)
    if not several or isinstance(several[0], str) or whole_number(several[0]) is None:
        return [item if isinstance(item, str) else _listed(item) for item in several]
    return [several]


def _listed(items: object) -> list[Any]:
    """Return the items of a list, an iterator, a tensor or an array; bytes, mappings and sets are none of them."""
    if isinstance(items, bytes | bytearray | memoryview | Mapping | Set) or not isinstance(items, Iterable):
        raise UsageError(
            f"{shown(items)} is no prompt", hint="give a string, a list of token ids, or a list of these; decode bytes"
        )
    listed = items.tolist() if hasattr(items, "tolist") else list(items)
    if not isinstance(listed, list):
        raise UsageError(f"{shown(items)} is no prompt", hint="token ids come in a list")
    return listed


def token_ids(prompt: Iterable[int], vocab_size: int) -> list[int]:
    """Return token ids as plain numbers.

    Raises:
        UsageError: one is no whole number, or out of range.
    """
    ids = []
    for token in _listed(prompt):
        number = whole_number(token)
        if number is None or not 0 <= number < vocab_size:
            raise UsageError(f"token id {shown(token)} is not a whole number from 0 to {vocab_size - 1}")
        ids.append(number)
    return ids


@dataclass(frozen=True)
class Generation:
    """One continuation.

    Args:
        text: prompt and new text; None without a tokenizer.
        new_text: the new text, cut before a stop string; None without a tokenizer.
        token_ids: prompt and new ids, those of a stop string and an end token included.
        prompt_tokens: how many of them are the prompt's.
        new_tokens: how many are new.
        finish_reason: "length" or "stop".
    """

    text: str | None
    new_text: str | None
    token_ids: list[int]
    prompt_tokens: int
    new_tokens: int
    finish_reason: str


@dataclass(frozen=True)
class Token:
    """One streamed token.

    Args:
        id: the token.
        text: what it makes certain of the text; may be empty, or hold characters begun before. Joined over a stream
            this is the new text exactly.
        index: 0 for the first new token.
    """

    id: int
    text: str | None
    index: int


class Row:
    """One sequence on its way.

    Args:
        ids: the prompt's; new ones are appended.
        prompt: index of the prompt.
        sample: index of the sample of that prompt.
        text: what makes text of new ids; None without a tokenizer.
    """

    def __init__(self, ids: list[int], prompt: int, sample: int, text: TextStream | None) -> None:
        self.ids = ids
        self.prompt = prompt
        self.sample = sample
        self.text = text
        self.n_prompt = len(ids)
        self.done = self.stopped = False

    @property
    def new_tokens(self) -> int:
        """How many ids are new."""
        return len(self.ids) - self.n_prompt

    def accept(self, token: int, max_new_tokens: int, ends: tuple[int, ...] = ()) -> str | None:
        """Append a token and return the text it makes certain; none is made by `ends`, after which nothing follows."""
        self.ids.append(token)
        ended = token in ends
        last = ended or self.new_tokens >= max_new_tokens
        piece = None if self.text is None else self.text.feed(None if ended else token, last=last)
        self.stopped = ended or (self.text is not None and self.text.stopped)
        self.done = last or self.stopped
        return piece

    def generation(self) -> Generation:
        """Return what has become of the sequence."""
        new_text = None if self.text is None else self.text.text
        text = None if self.text is None else self.text.prompt_text + self.text.text
        reason = "stop" if self.stopped else "length"
        return Generation(text, new_text, self.ids, self.n_prompt, self.new_tokens, reason)
