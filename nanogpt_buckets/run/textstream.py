"""New tokens -> text that can be shown at once: whole characters only, and nothing of a stop string.

Knows nothing of models or sampling.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence

from nanogpt_buckets.errors import UsageError
from nanogpt_buckets.model.tokenization.base import StreamDecoder, Tokenizer, well_formed

_MAX_STOPS = 100_000
_MAX_STOP_CHARACTERS = 1_000_000


def stop_strings(stop: str | Iterable[str] | None) -> tuple[str, ...]:
    """Return stop strings as a tuple.

    Raises:
        UsageError: one is empty or not a string, or they are too many or too long.
    """
    if not isinstance(stop, str | Iterable | None) or isinstance(stop, bytes | bytearray):
        raise UsageError(
            f"stop is {stop!r:.80}; it must be a string or a list of strings", hint='for example stop="\\n\\n"'
        )
    stops = () if stop is None else (stop,) if isinstance(stop, str) else tuple(itertools.islice(stop, _MAX_STOPS + 1))
    for text in stops:
        if not isinstance(text, str) or not text or text != well_formed(text):
            raise UsageError(f"stop string {text!r:.80} cannot be matched", hint="use one or more non-empty strings")
    if len(stops) > _MAX_STOPS or sum(map(len, stops)) > _MAX_STOP_CHARACTERS:
        raise UsageError(
            f"there are more than {_MAX_STOPS} stop strings, or more than {_MAX_STOP_CHARACTERS} characters in them"
        )
    return stops


class _Matcher:
    """Where text stands among several stop strings, one character at a time (Aho and Corasick's automaton).

    A state is the longest beginning of a stop string that the text ends with; state 0 is none.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._next: dict[tuple[int, str], int] = {}
        self.depth = [0]  # by state: how many characters of a stop string it is,
        self.matched = [0]  # how long a stop string the text ends with is, the longest of them,
        self._shorter = [0]  # and the state of the next shorter beginning
        for stop in stops:
            state = 0
            for character in stop:
                after = self._next.setdefault((state, character), len(self.depth))
                if after == len(self.depth):
                    self.depth.append(self.depth[state] + 1)
                    self.matched.append(0)
                    self._shorter.append(0)
                state = after
            self.matched[state] = len(stop)
        self._link()

    def _link(self) -> None:
        # a state's parent is nearer the root, so by depth all that `step` needs is there
        for (parent, character), state in sorted(self._next.items(), key=lambda edge: self.depth[edge[1]]):
            if parent:
                self._shorter[state] = self.step(self._shorter[parent], character)
            self.matched[state] = self.matched[state] or self.matched[self._shorter[state]]

    def step(self, state: int, character: str) -> int:
        """Return the state after one more character."""
        while state and (state, character) not in self._next:
            state = self._shorter[state]
        return self._next.get((state, character), 0)


_matcher = functools.lru_cache(maxsize=4)(_Matcher)  # one for all rows of a call


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
        self._matcher = _matcher(stops)
        self._state = 0
        self._held = ""
        self.text = ""
        self.stopped = False

    def feed(self, token: int, *, last: bool) -> str:
        """Take one token and return the text that is now certain.

        Args:
            token: the new id.
            last: no token follows, so nothing is held back any more.
        """
        new = self._decoder.feed(token) + (self._decoder.flush() if last else "")
        found = []
        for end, character in enumerate(new, len(self._held) + 1):
            self._state = self._matcher.step(self._state, character)
            if self._matcher.matched[self._state]:
                found.append(end - self._matcher.matched[self._state])
        self._held += new
        self.stopped = bool(found)
        if found:
            return self._release(min(found))
        return self._release(len(self._held) - (0 if last else self._matcher.depth[self._state]))

    def _release(self, count: int) -> str:
        piece, self._held = self._held[:count], self._held[count:]
        self.text += piece
        return piece
