"""Texts -> the log-probability of each token: cut long ones into windows, run each window in one pass, join.

A text within block_size is one window. A longer one slides a window of block_size over itself by `stride` tokens, and
each window adds the tokens that none before it has reached, as evaluators do: every token but the first is scored once,
past the first window after block_size - stride others or more. No token is put in front.

Knows nothing of tokenizers, nor of how buckets are found and loaded.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nanogpt_buckets.errors import UsageError
from nanogpt_buckets.values import shown, whole_number

Advance = Callable[[float], None]


@dataclass(frozen=True)
class Score:
    """How likely a model finds a text.

    Args:
        token_ids: the text's tokens.
        logprobs: natural logarithm of the probability of each token but the first, given those before it.
    """

    token_ids: list[int]
    logprobs: list[float]

    @property
    def logprob(self) -> float:
        """The sum of all."""
        return math.fsum(self.logprobs)

    @property
    def scored_tokens(self) -> int:
        """How many tokens have a probability: all but the first."""
        return len(self.logprobs)

    @property
    def loss(self) -> float | None:
        """The mean of -logprobs; None for a text of less than two tokens."""
        return loss(self.logprob, self.scored_tokens)

    @property
    def perplexity(self) -> float | None:
        """The exponential of the loss; infinite beyond what a float holds."""
        return perplexity(self.logprob, self.scored_tokens)


def loss(logprob: float, tokens: int) -> float | None:
    """Return the mean loss of tokens whose log-probabilities have this sum, or None if there are none."""
    return -logprob / tokens if tokens else None


def perplexity(logprob: float, tokens: int) -> float | None:
    """Return the exponential of their loss, or None if there are none."""
    mean = loss(logprob, tokens)
    try:
        return None if mean is None else math.exp(mean)
    except OverflowError:
        return math.inf


@dataclass(frozen=True, eq=False)
class Window:
    """A part of text number `text` that is run in one pass, and how many of its last tokens that scores."""

    text: int
    ids: Sequence[int]
    new: int


def check_stride(stride: object, block_size: int) -> int:
    """Return by how many tokens a window moves on; half of block_size if nothing is said.

    Raises:
        UsageError: it leaves no token before those it scores, or is no whole number.
    """
    if stride is None:
        return max(1, block_size // 2)
    number = whole_number(stride)
    if number is None or not 1 <= number < block_size:
        raise UsageError(f"stride is {shown(stride)}; it must be a whole number from 1 to {block_size - 1}")
    return number


def windows(texts: Sequence[Sequence[int]], block_size: int, stride: int) -> list[Window]:
    """Return the windows of all texts, those of one in order; a text of less than two tokens has none.

    Raises:
        UsageError: the model sees one token at a time, so that none comes before another.
    """
    found = []
    for number, ids in enumerate(texts):
        if len(ids) > 1 and block_size == 1:
            raise UsageError("a model whose block_size is 1 gives no token a probability")
        reached = 1  # the first token is not scored
        for start in range(0, len(ids) if len(ids) > 1 else 0, stride):
            end = min(start + block_size, len(ids))
            found.append(Window(number, ids[start:end], end - reached))
            reached = end
            if end == len(ids):
                break
    return found


def join(
    texts: Sequence[list[int]],
    parts: Sequence[Window],
    found: Iterable[Mapping[Window, Tensor]],
    on_progress: Advance,
) -> list[Score]:
    """Join what is found of windows, float32 (S - 1) each, a few after others, to the scores of texts.

    Each time `on_progress` is told how many texts that was; a window is its share of one.
    """
    of_text = Counter(part.text for part in parts)
    logprobs: dict[Window, list[float]] = {}
    on_progress(len(texts) - len(of_text))  # those of which nothing is run
    for some in found:
        for part, answer in some.items():
            end = len(part.ids) - 1
            logprobs[part] = answer[end - part.new : end].tolist()
        on_progress(sum(1 / of_text[part.text] for part in some))
    joined: list[list[float]] = [[] for _ in texts]
    for part in parts:
        joined[part.text] += logprobs[part]
    return [Score(ids, scores) for ids, scores in zip(texts, joined, strict=True)]


def to_json(score: Score) -> dict[str, Any]:
    """Return a score as plain JSON."""
    return {"token_ids": score.token_ids, "logprobs": score.logprobs} | summary(score.logprob, score.scored_tokens)


def summary(logprob: float, tokens: int) -> dict[str, Any]:
    """Return what follows from a sum over tokens, as plain JSON: what is none, or infinite, is null."""
    found = perplexity(logprob, tokens)
    finite = found if found is None or math.isfinite(found) else None
    return {"scored_tokens": tokens, "logprob": logprob, "loss": loss(logprob, tokens), "perplexity": finite}
