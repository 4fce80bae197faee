"""Logits -> next token, on the host: temperature, top-k, top-p, softmax, then one draw.

The compiled graph ends at logits, so every bucket shares this one sampler. Knows nothing of buckets, text or models.
"""

from __future__ import annotations

import bisect
import hashlib
import math
from typing import Any

import numpy
import torch
from torch import Tensor

from nanogpt_buckets.run.options import Sampling

# Logits whose largest is looked at first in search of the k-th largest.
_CHUNK = 32


def mask_undecodable(logits: Tensor, n_vocab: int) -> Tensor:
    """Return logits (..., V) in which ids from n_vocab on cannot be drawn."""
    if n_vocab >= logits.shape[-1]:
        return logits
    masked = logits.clone()
    masked[..., n_vocab:] = -math.inf
    return masked


def draw_per_row(logits: Tensor, sampling: Sampling, prompt: int, sample: int, step: int) -> int:
    """Draw token number `step` of a prompt's sample from logits float32 (V), by inverse CDF; -inf cannot be drawn.

    Depends on nothing but its arguments.
    """
    if sampling.temperature == 0:
        return greedy(logits)
    values, ids = candidates(logits, sampling)  # (n), (n)
    cdf = torch.exp(values).cumsum(0)  # (n), not divided by its last
    position = bisect.bisect_right(cdf.tolist(), uniform(sampling.seed, prompt, sample, step) * float(cdf[-1]))
    return int(ids[min(position, len(ids) - 1)])


def greedy(logits: Tensor) -> int:
    """Return the likeliest id of logits (V), the lowest among equals."""
    return int(logits.numpy().argmax())  # the first; ten times as fast as torch's


def candidates(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Return what may be drawn from logits float32 (V), likeliest first and by id among equals, and the ids int64 (n).

    What is returned is float64 (n): logits less the largest, divided by a temperature above 0.
    """
    k = sampling.top_k or len(logits)
    ids = likeliest(logits, k) if k < len(logits) else torch.arange(len(logits))  # (n)
    values, order = torch.sort(logits[ids].double(), descending=True, stable=True)
    if values[-1] == -math.inf:  # asked once, because what follows costs more than all of them are worth
        kept = values > -math.inf
        values, order = values[kept], order[kept]
    # from the likeliest down, so that no temperature, however small, overflows
    values, ids = (values - values[0]) / sampling.temperature, ids[order]
    if sampling.top_p is not None and sampling.top_p < 1:
        probabilities = torch.softmax(values, dim=0)
        keep = probabilities.cumsum(0) - probabilities < sampling.top_p  # the mass before a token is short of p
        values, ids = values[keep], ids[keep]
    return values, ids


def likeliest(logits: Tensor, k: int) -> Tensor:
    """Return the ids int64 (n) of the k largest logits (V) and of what equals the k-th, in order of id; k is below V.

    The k-th largest of the maxima of chunks is a lower bound of the k-th largest logit, for each of k chunks has one
    that reaches it. What is below cannot be among the k largest, and that leaves few to sort.
    """
    values = logits.numpy()  # whose loops wait for no other thread
    chunks = len(values) // _CHUNK
    if chunks < k:
        return torch.from_numpy(numpy.flatnonzero(values >= _kth_largest(values, k)))
    # a chunk is a column of this table, for numpy finds the maxima of many columns at a time
    maxima = values[: chunks * _CHUNK].reshape(_CHUNK, chunks).max(axis=0)  # (chunks)
    ids = numpy.flatnonzero(values >= _kth_largest(maxima, k))  # (m), m at least k
    few = values[ids]
    return torch.from_numpy(ids[few >= _kth_largest(few, k)])


def _kth_largest(values: numpy.ndarray[Any, Any], k: int) -> Any:
    return numpy.partition(values, -k)[-k]


def uniform(seed: int, prompt: int, sample: int, step: int) -> float:
    """Return a number in [0, 1) that only these four decide."""
    digest = hashlib.sha256(f"{seed}/{prompt}/{sample}/{step}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def draw_nanogpt(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Draw one token from logits float32 (V) as nanoGPT's GPT.generate does, advancing the generator as it would.

    top_p, which nanoGPT lacks, is applied after top_k.
    """
    if sampling.temperature == 0:
        return greedy(logits)
    scaled = logits / sampling.temperature  # (V)
    if not torch.isfinite(scaled.max()):
        return greedy(logits)  # so cold that float32 overflows; nanoGPT itself would fail
    if sampling.top_k:
        threshold = scaled.topk(min(sampling.top_k, len(scaled))).values[-1]
        scaled = scaled.masked_fill(scaled < threshold, -math.inf)
    if sampling.top_p is not None and sampling.top_p < 1:
        _, ids = candidates(logits, sampling)
        scaled = torch.full_like(scaled, -math.inf).index_copy(0, ids, scaled[ids])
    probabilities = torch.softmax(scaled, dim=-1).unsqueeze(0)  # (1, V)
    return int(torch.multinomial(probabilities, num_samples=1, generator=generator))
