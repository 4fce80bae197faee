"""One sequence on its way from a prompt to text: its ids, the text they make, and when it is done.

Text is shown at once, in whole characters, and nothing of a stop string. Knows nothing of buckets, logits or how tokens
are chosen.
"""

from __future__ import annotations

import functools
import itertools
from array import array
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Unpack

from nanogpt_buckets.errors import UsageError
from nanogpt_buckets.model.tokenization.base import StreamDecoder, Tokenizer, well_formed
from nanogpt_buckets.run.options import Sampling, SamplingOptions
from nanogpt_buckets.values import shown, whole_number

if TYPE_CHECKING:
    from torch import Generator

Prompt = str | Iterable[int]
_MAX_STOPS = 1000


def as_prompts(prompts: Prompt | Iterable[Prompt]) -> list[Prompt]:
    """Return a list of prompts; one string, or token ids in any iterable, is one prompt. Iterators are read once."""
    if isinstance(prompts, str):
        return [prompts]
    several = _listed(prompts)
    if not several or isinstance(several[0], str) or whole_number(several[0]) is None:
        return [item if isinstance(item, str) else _listed(item) for item in several]
    return [several]


def _listed(items: object) -> list[Any]:
    """Return the items of a list, an iterator, a tensor or an array; bytes, mappings and sets are none of them."""
    if isinstance(items, bytes | bytearray | memoryview | Mapping | Set) or not isinstance(items, Iterable):
        hint = "give a string, a list of token ids, or a list of these; decode bytes"
        raise UsageError(f"{shown(items)} is no prompt", hint=hint)
    listed = items.tolist() if hasattr(items, "tolist") else list(items)
    if not isinstance(listed, list):
        raise UsageError(f"{shown(items)} is no prompt", hint="token ids come in a list")
    return listed


def token_ids(prompt: Iterable[int], vocab_size: int) -> list[int]:
    """Return token ids as plain numbers; a UsageError if one is no whole number, or out of range."""
    ids = []
    for token in _listed(prompt):
        number = whole_number(token)
        if number is None or not 0 <= number < vocab_size:
            raise UsageError(f"token id {shown(token)} is not a whole number from 0 to {vocab_size - 1}")
        ids.append(number)
    return ids


def stop_strings(stop: str | Iterable[str] | None) -> tuple[str, ...]:
    """Return stop strings as a tuple; a UsageError if one is empty or no text, or they are more than a thousand."""
    if not isinstance(stop, str | Iterable | None) or isinstance(stop, bytes | bytearray):
        hint = 'for example stop="\\n\\n"'
        raise UsageError(f"stop is {shown(stop)}; it must be a string or a list of strings", hint=hint)
    stops = () if stop is None else (stop,) if isinstance(stop, str) else tuple(itertools.islice(stop, _MAX_STOPS + 1))
    if len(stops) > _MAX_STOPS:
        raise UsageError(f"there are more than {_MAX_STOPS} stop strings")
    for text in stops:
        if not isinstance(text, str) or not text or text != well_formed(text):
            raise UsageError(f"stop string {shown(text)} cannot be matched", hint="use one or more non-empty strings")
    return stops


def check_count(name: str, value: object, least: int) -> int:
    """Return a whole number; a UsageError if it is none, or less than the least."""
    number = whole_number(value)
    if number is None or number < least:
        raise UsageError(f"{name} is {shown(value)}; it must be a whole number, {least} or more")
    return number


class Request:
    """A prompt and how it is continued, for `Engine.generate_each`.

    Args:
        prompt: a string or token ids; an empty one starts from the model's start token.
        max_new_tokens: at most so many new tokens; 0 gives the prompt back.
        stop: end before any of these strings appears in the new text.
        plain_text: `<|endoftext|>` in the prompt is ordinary text.
        sampling: temperature, top_k, top_p, seed, ignore_eos; see `Sampling`. A seed is chosen if none is given.

    Raises:
        UsageError: an argument is out of range.
    """

    __slots__ = ("max_new_tokens", "plain_text", "prompt", "sampling", "stops")

    def __init__(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 100,
        stop: str | Iterable[str] | None = None,
        plain_text: bool = False,
        **sampling: Unpack[SamplingOptions],
    ) -> None:
        given: dict[str, Any] = {name: value for name, value in sampling.items() if (name, value) != ("seed", None)}
        self.prompt = prompt
        self.max_new_tokens = check_count("max_new_tokens", max_new_tokens, 0)
        self.stops = stop_strings(stop)
        self.plain_text = plain_text
        self.sampling = Sampling(**given)


@dataclass(frozen=True)
class Generation:
    """One continuation.

    Args:
        text: prompt and new text; None without a tokenizer.
        new_text: the new text, cut before a stop string; None without a tokenizer.
        token_ids: prompt and new ids, those of a stop string and an end token included.
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
    """One streamed token; its index is 0 for the first new one.

    `text` is what it makes certain of the text: it may be empty, or hold characters begun before. Joined over a stream
    this is the new text exactly.
    """

    id: int
    text: str | None
    index: int


def _advance(stop: str, borders: array[int], state: int, text: str) -> int:
    """Return how long a beginning of a stop string the text now ends with: all of it, once that was seen (KMP)."""
    for character in text:
        while state and stop[state] != character:
            state = borders[state]
        state += stop[state] == character
        if state == len(stop):
            break
    return state


@functools.lru_cache(maxsize=4)  # one for all rows of a call
def _borders(stops: tuple[str, ...]) -> list[array[int]]:
    """Return, by stop string and length of its beginning, which shorter beginning that one ends with."""
    tables = [array("q", [0, 0]) for _ in stops]
    for stop, borders in zip(stops, tables, strict=True):
        for character in stop[1:-1]:
            borders.append(_advance(stop, borders, borders[-1], character))
    return tables


class TextStream:
    """The text of one row's new tokens, as it grows; it ends before the first of `stops`.

    Text is held back while it could still become a stop string or part of a character, which the prompt may have begun.
    The pieces returned, joined, are exactly `text`.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stops: tuple[str, ...]) -> None:
        self._decoder = StreamDecoder(tokenizer)
        self.prompt_text = self._decoder.feed(*prompt_ids)
        self._stops = list(zip(stops, _borders(stops), strict=True))
        self._states = [0] * len(stops)
        self._held = ""
        self.text = ""
        self.stopped = False

    def feed(self, token: int | None, *, last: bool) -> str:
        """Take one token, None for one that makes no text, and return the text that is now certain.

        Nothing is held back any more after the `last`.
        """
        new = self._decoder.feed(*([] if token is None else [token])) + (self._decoder.flush() if last else "")
        self._held += new
        self._states = [_advance(*stop, state, new) for stop, state in zip(self._stops, self._states, strict=True)]
        seen = [stop for (stop, _), state in zip(self._stops, self._states, strict=True) if state == len(stop)]
        self.stopped = bool(seen)
        if seen:
            return self._release(min(map(self._held.find, seen)))
        return self._release(len(self._held) - (0 if last else max(self._states, default=0)))

    def _release(self, count: int) -> str:
        piece, self._held = self._held[:count], self._held[count:]
        self.text += piece
        return piece


def start_of(ids: Sequence[int], tokenizer: Tokenizer | None) -> list[int]:
    """Return what a row begins with: the ids of its prompt, or the tokenizer's start token if it has none.

    Raises:
        UsageError: the prompt is empty and there is no start token.
    """
    start = None if ids or tokenizer is None else tokenizer.start_token
    if not ids and start is None:
        raise UsageError("the prompt is empty and this model has no start token", hint="give a prompt")
    return [*ids] if start is None else [start]


class Row:
    """One sequence on its way, sample number `sample` of prompt number `prompt`; without a tokenizer it has no text.

    New tokens are appended to `ids`. The text of a start token is not shown. None of the `ends` makes text, and after
    one nothing follows. Rows whose draws are one sequence share a `generator`.
    """

    def __init__(
        self,
        ids: list[int],
        request: Request,
        tokenizer: Tokenizer | None,
        ends: tuple[int, ...] = (),
        generator: Generator | None = None,
        prompt: int = 0,
        sample: int = 0,
    ) -> None:
        self.ids = start_of(ids, tokenizer)
        self.request = request
        self.generator = generator
        self.prompt = prompt
        self.sample = sample
        self.text = None if tokenizer is None else TextStream(tokenizer, ids, request.stops)
        self.n_prompt = len(self.ids)
        self._ends = () if request.sampling.ignore_eos else ends
        self.done = request.max_new_tokens == 0
        self.stopped = False

    @property
    def new_tokens(self) -> int:
        """How many ids are new."""
        return len(self.ids) - self.n_prompt

    def accept(self, token: int) -> str | None:
        """Append a token and return the text it makes certain."""
        self.ids.append(token)
        ended = token in self._ends
        last = ended or self.new_tokens >= self.request.max_new_tokens
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
