"""The equivalence gate: a compiled bucket is published only if it computes what the eager model computes.

One eager float32 forward of a full row gives, by causality, the reference for every length. The bucket is fed the same
row cut and padded at awkward lengths, a different one in each row. Then padding, future tokens and neighbouring rows
are changed, and not one bit may move.

Knows nothing of compilers, of files or of any one step: how to feed one, it asks the step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nanogpt_buckets.errors import GateFailed, NonFiniteLogits
from nanogpt_buckets.model.architecture import Architecture
from nanogpt_buckets.model.gpt import GPT, from_weights
from nanogpt_buckets.plan.bucket import Bucket
from nanogpt_buckets.steps import step_named

Run = Callable[..., Sequence[Tensor]]
Ask = Callable[..., Tensor]  # a loaded bucket, by contexts and a filler; see `_logits`

# Of what is checked and how strictly; kept in manifests. What an older gate let pass is checked again at first load.
VERSION = 2
# Measured: float32 noise is 5e-7..1e-6 of the largest logit, the mildest planted fault (erf for tanh GELU) 2e-4.
FLOAT32_TOLERANCE = 2e-5
# bfloat16 is judged by its own noise: eager bfloat16 against float32.
BFLOAT16_FACTOR = 2.0


def seeded_weights(arch: Architecture, dtype: torch.dtype, seed: int = 20240229) -> dict[str, Tensor]:
    """Return weights under which every part of the network matters: N(0, 0.05), LayerNorm gains around 1.

    At the usual initialisation biases are 0 and gains 1, so a dropped bias or a swapped gain would not show.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in GPT(arch).named_parameters()}
    weights = {}
    for name, shape in sorted(shapes.items()):
        values = torch.empty(shape).normal_(0.0, 0.05, generator=generator)
        if name.split(".")[-2].startswith("ln_") and name.endswith("weight"):
            values += 1.0
        weights[name] = values.to(dtype)
    return weights


def _logits(run: Run, bucket: Bucket, contexts: Sequence[Sequence[int]], filler: Tensor | None = None) -> Tensor:
    """Ask a loaded bucket for the logits (n, V) that follow each of n contexts."""
    step = step_named(bucket.step)
    return step.logits(run(*step.pack(contexts, bucket, filler)), len(contexts))


def check(
    run: Run, arch: Architecture, bucket: Bucket, weights: Mapping[str, Tensor], *, rounds: bool = False
) -> dict[str, Any]:
    """Compare a loaded bucket with the eager model and return what was measured, in whole numbers.

    `run` was loaded with `weights`: canonical tensors, all of one dtype, whose rounding the reference shares. If it
    `rounds`, float32 is computed in less precision, as asked for, and so judged as bfloat16 is.

    Raises:
        GateFailed: logits differ by more than the tolerance, or a bit moved that must not.
    """
    generator = torch.Generator().manual_seed(bucket.batch_size * 100_003 + bucket.seq_len)
    rows = torch.randint(arch.vocab_size, (bucket.batch_size, bucket.seq_len), generator=generator, dtype=torch.int32)
    lengths = awkward_lengths(bucket.seq_len)
    ask = partial(_logits, run, bucket)
    with torch.inference_mode():
        error, tolerance = _worst_error(ask, arch, weights, rows, lengths, rounds)
        if not error <= tolerance:  # NaN fails too
            raise GateFailed(f"bucket {bucket} differs from the eager model by {error:.1e} of the largest logit")
        if cause := _moved_by(ask, arch.vocab_size, rows, lengths):
            raise GateFailed(f"bucket {bucket} returns other logits after {cause}")
    return {
        "version": VERSION,
        "lengths": lengths,
        "relative_error_e9": math.ceil(error * 1e9),
        "tolerance_e9": math.ceil(tolerance * 1e9),
        "bit_tests": ["repeat", "padding", "future", *(["neighbours"] if bucket.batch_size > 1 else [])],
    }


def awkward_lengths(seq_len: int) -> list[int]:
    """Return the lengths worth testing in a bucket: its edges and its middle."""
    return sorted({max(1, n) for n in (1, seq_len // 2, seq_len // 2 + 1, seq_len - 1, seq_len) if n <= seq_len})


def _worst_error(
    ask: Ask, arch: Architecture, weights: Mapping[str, Tensor], rows: Tensor, lengths: list[int], rounds: bool
) -> tuple[float, float]:
    """Return the largest error, relative to the largest reference logit, and what is allowed."""
    reference = _logits_at({name: w.float() for name, w in weights.items()}, arch, rows, lengths)  # (B, n, V)
    scale = reference.abs().max().item()
    worst = 0.0
    for shift in range(len(lengths)):
        own = [(row + shift) % len(lengths) for row in range(len(rows))]
        logits = ask(_cut(rows, [lengths[n] for n in own]))  # (B, V)
        expected = torch.stack([reference[row, n] for row, n in enumerate(own)])  # (B, V)
        worst = max(worst, _error(logits, expected, scale))
    if not rounds and all(w.dtype == torch.float32 for w in weights.values()):
        return worst, FLOAT32_TOLERANCE
    eager = _logits_at({name: w.bfloat16() for name, w in weights.items()}, arch, rows, lengths)
    return worst, BFLOAT16_FACTOR * _error(eager, reference, scale)


def _error(found: Tensor, expected: Tensor, scale: float) -> float:
    error = ((found - expected).abs().max() / scale).item()
    return error if math.isfinite(error) else math.inf


def _logits_at(weights: Mapping[str, Tensor], arch: Architecture, rows: Tensor, lengths: list[int]) -> Tensor:
    """Return eager logits (B, n, V) after each length, from one forward of the full rows."""
    gpt = from_weights(arch, weights)
    hidden = gpt.hidden(rows)[:, [n - 1 for n in lengths]]  # (B, S, C) -> (B, n, C)
    return gpt.head(hidden)


def _cut(rows: Tensor, lengths: Sequence[int]) -> list[list[int]]:
    """Return contexts: the first lengths[b] tokens of each row b."""
    return [row[:length].tolist() for row, length in zip(rows, lengths, strict=True)]


def _moved_by(ask: Ask, vocab_size: int, rows: Tensor, lengths: list[int]) -> str | None:
    """Change what a row's logits may not depend on; return what moved a bit of them."""
    contexts = _cut(rows, [lengths[row % len(lengths)] for row in range(len(rows))])
    before = ask(contexts)
    others = (rows + 1) % vocab_size  # (B, S)
    if not torch.equal(before, ask(contexts)):
        return "a second run"
    if not torch.equal(before, ask(contexts, torch.full_like(rows, vocab_size - 1))):
        return "other padding"
    if not torch.equal(before, ask(contexts, others)):
        return "other future tokens"
    if len(rows) > 1 and not torch.equal(before[:1], ask([contexts[0], *others[1:].tolist()])[:1]):
        return "other neighbours"
    return None


def canary(
    run: Run, arch: Architecture, bucket: Bucket, weights: Mapping[str, Tensor], *, rounds: bool = False
) -> None:
    """Run one short row on a user's weights and compare it with the eager model: the pair fits together.

    Raises:
        GateFailed: the logits are not those weights' logits.
        NonFiniteLogits: those weights give no finite logits, whoever computes them.
    """
    length = min(8, bucket.seq_len)
    generator = torch.Generator().manual_seed(length)
    rows = torch.randint(arch.vocab_size, (bucket.batch_size, length), generator=generator, dtype=torch.int32)
    with torch.inference_mode():
        gpt = from_weights(arch, weights)
        expected = gpt.head(gpt.hidden(rows)[:, -1])  # (B, V)
        if not expected.isfinite().all():
            raise NonFiniteLogits(_not_finite(weights), hint="look how the model was trained or saved")
        error = _error(_logits(run, bucket, rows.tolist()), expected, expected.abs().max().item())
    # bfloat16 rounds to 8 bits, and two shapes round differently
    exact = not rounds and all(w.dtype == torch.float32 for w in weights.values())
    tolerance = 10 * FLOAT32_TOLERANCE if exact else 0.1
    if not error <= tolerance:
        raise GateFailed(
            f"bucket {bucket} with these weights differs from the eager model by {error:.1e} of the largest logit",
            hint="run nanogpt-buckets cache verify, then build again",
        )


def _not_finite(weights: Mapping[str, Tensor]) -> str:
    names = [name for name, tensor in sorted(weights.items()) if not tensor.isfinite().all()]
    where = f": {names[0]} holds NaN or infinite values" if names else ", though every weight is"
    return f"the logits of these weights are not finite{where}"
