"""New tokens -> text that can be shown at once: whole characters only, and nothing of a stop string.

Knows nothing of models or sampling.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from nanogpt_buckets.errors import UsageError
from nanogpt_buckets.model.tokenizer import StreamDecoder, Tokenizer


def stop_strings(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return stop strings as a tuple.

    Raises:
        UsageError: one is empty or not a string.
    """
    if not isinstance(stop, str | Iterable | None):
        raise UsageError(
            f"stop is {stop!r}; it must be a string or a list of strings", hint='for example stop="\\n\\n"'
        )
    stops = () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)
    for text in stops:
        if not isinstance(text, str) or not text:
            raise UsageError(f"stop string {text!r} cannot be matched", hint="use one or more non-empty strings")
    return stops


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
        self.prompt_text = "".join(self._decoder.feed(token) for token in prompt_ids)
        self._stops = stops
        self._held = ""
        self.text = ""
        self.stopped = False

    def feed(self, token: int, *, last: bool) -> str:
        """Take one token and return the text that is now certain.

        Args:
            token: the new id.
            last: no token follows, so nothing is held back any more.
        """
        self._held += self._decoder.feed(token) + (self._decoder.flush() if last else "")
        found = [position for stop in self._stops if (position := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._release(min(found))
        return self._release(len(self._held) - (0 if last else self._undecided()))

    def _undecided(self) -> int:
        """Return how many characters at the end could be the beginning of a stop string."""
        sizes = (size for stop in self._stops for size in range(1, len(stop)) if self._held.endswith(stop[:size]))
        return max(sizes, default=0)

    def _release(self, count: int) -> str:
        piece, self._held = self._held[:count], self._held[count:]
        self.text += piece
        return piece
