"""New tokens -> text that can be shown at once: whole characters only, and nothing of a stop string.

Knows nothing of models or sampling.
"""

from __future__ import annotations

import functools
import itertools
from array import array
from collections.abc import Iterable, Sequence

from nanogpt_buckets.errors import UsageError
from nanogpt_buckets.model.tokenization.base import StreamDecoder, Tokenizer, well_formed
from nanogpt_buckets.values import shown

_MAX_STOPS = 1000


def stop_strings(stop: str | Iterable[str] | None) -> tuple[str, ...]:
    """Return stop strings as a tuple.

    Raises:
        UsageError: one is empty or no text, or they are more than a thousand.
    """
    if not isinstance(stop, str | Iterable | None) or isinstance(stop, bytes | bytearray):
        raise UsageError(
            f"stop is {shown(stop)}; it must be a string or a list of strings", hint='for example stop="\\n\\n"'
        )
    stops = () if stop is None else (stop,) if isinstance(stop, str) else tuple(itertools.islice(stop, _MAX_STOPS + 1))
    if len(stops) > _MAX_STOPS:
        raise UsageError(f"there are more than {_MAX_STOPS} stop strings")
    for text in stops:
        if not isinstance(text, str) or not text or text != well_formed(text):
            raise UsageError(f"stop string {shown(text)} cannot be matched", hint="use one or more non-empty strings")
    return stops


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
    """The text of one row's new tokens, as it grows.

    Text is held back while it could still become a stop string or part of a character. The pieces returned, joined,
    are exactly `text`.

    Args:
        tokenizer: decodes ids.
        prompt_ids: what came before, which may end within a character.
        stops: the text ends before the first of these.
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
        """Take one token and return the text that is now certain.

        Args:
            token: the new id; None for one that makes no text.
            last: no token follows, so nothing is held back any more.
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
