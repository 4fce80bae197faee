"""The rows of one batch, from their first step to their last: recomputed at each, or remembered.

Knows nothing of sampling or text, nor of which buckets were chosen for the call.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from nanogpt_buckets.plan.bucket import Bucket
from nanogpt_buckets.run.dispatch import KV, Dispatcher
from nanogpt_buckets.run.kvcache import KVCache

Contexts = Sequence[Sequence[int]]


class Batch:
    """The rows of one batch, from their first step to their last: recomputed at each, or remembered in a `KVCache`."""

    def __init__(self, dispatcher: Dispatcher, way: str, buckets: Sequence[Bucket], contexts: Contexts) -> None:
        self._dispatcher = dispatcher
        self._buckets = buckets
        self._cache = dispatcher.remember(len(contexts), buckets) if way == KV else None
        self._first = True
        # slots rise with lengths; samples of one prompt are neighbours
        order = sorted(range(len(contexts)), key=lambda row: (len(contexts[row]), list(contexts[row])))
        self._rank = {row: place for place, row in enumerate(order)}

    def logits(self, contexts: Mapping[int, Sequence[int]]) -> Tensor:
        """Return the logits (n, V) that follow the rows that still run, by number, in that order."""
        cache, block_size = self._cache, self._dispatcher.block_size
        grown = [row for row, context in contexts.items() if len(context) > block_size]
        if cache is None or len(grown) == len(contexts):
            return self._dispatcher.run(list(contexts.values()), self._buckets)
        kept = sorted((row for row in contexts if row not in set(grown)), key=self._rank.__getitem__)
        made = dict(zip(kept, self._remembered(cache, kept, [contexts[row] for row in kept]), strict=True))
        if grown:
            made |= zip(grown, self._dispatcher.run([contexts[row] for row in grown], self._buckets), strict=True)
        self._first = False
        return torch.stack([made[row] for row in contexts])  # (n, V)

    def _remembered(self, cache: KVCache, rows: list[int], contexts: list[Sequence[int]]) -> list[Tensor]:
        """Return the logits of rows in the order of their slots."""
        places = [self._rank[row] for row in rows]
        if not self._first:
            cache.close_gaps(places, [len(context) - 1 for context in contexts])
            calls = self._dispatcher.calls("decode", [len(c) for c in contexts], self._buckets, cache, places)
            return list(self._dispatcher.run_calls(calls, contexts))
        # a prompt is run once, and what is remembered of it copied for its other samples
        heads = [i for i, context in enumerate(contexts) if i == 0 or list(context) != list(contexts[i - 1])]
        own = [contexts[i] for i in heads]
        calls = self._dispatcher.calls(
            "prefill", [len(c) for c in own], self._buckets, cache, [places[i] for i in heads]
        )
        found = list(self._dispatcher.run_calls(calls, own))
        logits = []
        for i, context in enumerate(contexts):
            head = bisect.bisect_right(heads, i) - 1
            if heads[head] != i:
                cache.copy(places[heads[head]], places[i], len(context))
            logits.append(found[head])
        return logits
