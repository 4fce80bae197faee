"""The equivalence gate: a compiled bucket is published only if it computes what the eager model computes.

One eager float32 forward of a full row gives, by causality, the step's reference for every length. The bucket is fed
the same row cut and padded at awkward lengths, neighbours at different ones. Then padding, future tokens and
neighbouring rows are changed, and not one bit may move.

Of a step that keeps state, whole requests are asked (`asked.py`); what a padding row finds there, it leaves.

Knows nothing of compilers, of files or of any one step: how to feed one, it asks the step.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from nanogpt_buckets.errors import GateFailed, NonFiniteLogits
from nanogpt_buckets.model.architecture import Architecture
from nanogpt_buckets.model.gpt import GPT, Block, from_weights
from nanogpt_buckets.plan.bucket import Bucket
from nanogpt_buckets.steps import slips, step_named
from nanogpt_buckets.steps.asked import Asked, Run

# Of what is checked and how strictly; kept in manifests. What an older gate let pass is checked again at first load.
VERSION = 6
# Measured: float32 noise is 5e-7..1e-6 of the largest logit, the mildest planted fault (erf for tanh GELU) 2e-4.
FLOAT32_TOLERANCE = 2e-5
# bfloat16 is judged by its own noise, eager bfloat16 against float32, and by what it hides (`slips.py`).
BFLOAT16_FACTOR = 2.0
# How far a bucket may be from the eager model, in float32's own noise, on weights that magnify rounding.
NOISE_FACTOR = 4.0
# Over which the biases of activations go, and how quiet one may be to be made as loud as the others.
_WALK, _QUIETEST = (-3.5, 12.0), 0.02
# What must move no bit; of requests where they share what a program returns, of neighbours where there are any.
_BIT_TESTS = ["repeat", "padding", "future", "requests", "neighbours"]


def seeded_weights(
    arch: Architecture, dtype: torch.dtype, *, fused: bool = True, seed: int = 20240229
) -> dict[str, Tensor]:
    """Return weights under which every part of the network matters: N(0, 0.05), LayerNorm gains around 1.

    At the usual initialisation biases are 0 and gains 1, so a dropped bias or a swapped gain would not show. Biases of
    what is activated walk over where activations differ, and each is then about as loud as any; but not where
    activations are not `fused`, and so rounded within, for what is quiet is mostly rounding there.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        gpt = GPT(arch)
    shapes = {name: tuple(p.shape) for name, p in gpt.named_parameters()}
    weights = {}
    for name, shape in sorted(shapes.items()):
        values = torch.empty(shape).normal_(0.0, 0.05, generator=generator)
        if name.split(".")[-2].startswith("ln_") and name.endswith("weight"):
            values += 1.0
        weights[name] = values
    activation = cast(Block, cast(nn.ModuleList, gpt.transformer["h"])[0]).mlp.activation
    walk = torch.linspace(*_WALK, arch.n_inner)
    for name in (name for name in shapes if fused and name.endswith("mlp.c_fc.bias")):
        weights[name] = walk
        weights[name.replace("c_fc.bias", "c_proj.weight")] /= activation(walk).abs().clamp(min=_QUIETEST)
    return {name: values.to(dtype) for name, values in weights.items()}


def check(
    run: Run,
    arch: Architecture,
    bucket: Bucket,
    weights: Mapping[str, Tensor],
    *,
    rounds: bool = False,
    fused: bool = True,
    place: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> dict[str, Any]:
    """Compare a loaded bucket with the eager model and return what was measured, in whole numbers.

    `run` was loaded with `weights`: canonical tensors, all of one dtype, whose rounding the reference shares. If it
    `rounds`, float32 is computed in less precision, as asked for, and so judged as bfloat16 is. Activations that
    are not `fused` round bfloat16 within, as XLA's do. `place` puts state where the bucket wants that.

    Raises:
        GateFailed: answers differ by more than the tolerance, or a bit moved that must not.
    """
    generator = torch.Generator().manual_seed(bucket.batch_size * 100_003 + bucket.seq_len)
    rows = torch.randint(arch.vocab_size, (bucket.batch_size, bucket.seq_len), generator=generator, dtype=torch.int32)
    lengths = step_named(bucket.step).lengths(bucket.seq_len)
    ask = Asked(run, arch, bucket, weights, rows, place)
    with torch.inference_mode():
        error, tolerance = _worst_error(ask, rows, lengths, rounds)
        if not error <= tolerance:  # NaN fails too
            raise GateFailed(f"bucket {bucket} differs from the eager model by {error:.1e} of the largest value")
        told = [] if _is_precise(ask, rounds) else _slips_told(ask, rows, fused)
        if cause := _moved_by(ask, rows, lengths):
            raise GateFailed(f"bucket {bucket} returns something else after {cause}")
        if _writes_elsewhere(ask, rows):
            raise GateFailed(f"bucket {bucket} writes into the state of rows that are not its own")
    return {
        "version": VERSION,
        "lengths": lengths,
        "relative_error_e9": math.ceil(error * 1e9),
        "tolerance_e9": math.ceil(tolerance * 1e9),
        "told_apart": told,
        "bit_tests": _BIT_TESTS[:3] + _BIT_TESTS[3:4] * step_named(bucket.step).pure + _BIT_TESTS[4:] * (len(rows) > 1),
    }


def _worst_error(ask: Asked, rows: Tensor, lengths: list[int], rounds: bool) -> tuple[float, float]:
    """Return the largest error, relative to the largest value of the reference, and what is allowed."""
    exact = {name: w.float() for name, w in ask.weights.items()}
    precise = _is_precise(ask, rounds)
    worst = noise = 0.0
    if ask.opens:  # the prompt fills the bucket, and what follows outgrows it
        rows = torch.cat([rows, rows.flip(1)], 1)[:, : min(rows.shape[1] + ask.tails[-1], ask.arch.block_size)]
    longer = {tail: [min(n + tail * ask.opens, rows.shape[1]) for n in lengths] for tail in ask.tails}
    every = sorted({length for each in longer.values() for length in each})
    reference = _reference(exact, ask, rows, every)  # (B, n, ...)
    scale = reference.abs().max().item()
    for tail, lengths in longer.items():
        for shift in range(0, len(lengths), len(rows)):  # until every length was some row's
            own = [lengths[(row + shift) % len(lengths)] for row in range(len(rows))]
            found = ask(_cut(rows, own), tail)  # (B, ...)
            expected = torch.stack([reference[row, every.index(n)] for row, n in enumerate(own)])  # (B, ...)
            worst = max(worst, _error(found, expected, scale))
    if not precise:
        rounded = {name: w.bfloat16() for name, w in ask.weights.items()}
        noise = _error(_reference(rounded, ask, rows, every), reference, scale)
    elif not worst <= FLOAT32_TOLERANCE:  # weights that magnify rounding do so for whoever computes with them
        truth = _reference({name: w.double() for name, w in exact.items()}, ask, rows, every)
        noise = _error(reference, truth.to(reference.dtype), scale)
    if precise:
        return worst, max(FLOAT32_TOLERANCE, NOISE_FACTOR * noise)
    return worst, BFLOAT16_FACTOR * noise


def _is_precise(ask: Asked, rounds: bool) -> bool:
    return not rounds and all(w.dtype == torch.float32 for w in ask.weights.values())


def _slips_told(ask: Asked, rows: Tensor, fused: bool) -> list[str]:
    """Return the small mistakes that would have been seen; a GateFailed if the bucket makes one."""
    exact, rounded = (
        {name: w.to(dtype) for name, w in ask.weights.items()} for dtype in (torch.float32, torch.bfloat16)
    )
    lengths = list(range(1, rows.shape[1] + 1, max(1, rows.shape[1] // slips.contexts(ask.arch))))
    answers: list[Tensor] = []
    at: list[tuple[int, int]] = []
    for shift in range(0, len(lengths), len(rows)):
        own = [(shift + row) % len(lengths) for row in range(len(rows))]
        answers.append(ask(_cut(rows, [lengths[n] for n in own]), ask.tails[0]))  # (B, ...)
        at += enumerate(own)
    where = tuple(torch.tensor(at).unbind(1))  # 2 x (N)
    truth, eager = (_reference(weights, ask, rows, lengths)[where] for weights in (exact, rounded))  # 2 x (N, ...)
    told = []
    for name, arch, weights in slips.slips(ask.arch, exact, fused):
        gpt = from_weights(arch, weights)
        wrong = step_named(ask.bucket.step).reference(gpt, ask.bucket, rows, lengths)[where]  # (N, ...)
        weighed = slips.weigh(torch.cat(answers), truth, eager, wrong, arch.n_embd)
        if weighed.made:
            raise GateFailed(f"bucket {ask.bucket} returns what a model with {name} would")
        told += [name] * weighed.visible
    return told


def _error(found: Tensor, expected: Tensor, scale: float) -> float:
    error = ((found - expected).abs().max() / scale).item()
    return error if math.isfinite(error) else math.inf


def _reference(weights: Mapping[str, Tensor], ask: Asked, rows: Tensor, lengths: list[int]) -> Tensor:
    """Return what eager weights answer at each length, (B, n, ...)."""
    return step_named(ask.bucket.step).reference(from_weights(ask.arch, weights), ask.bucket, rows, lengths)


def _cut(rows: Tensor, lengths: Sequence[int]) -> list[list[int]]:
    """Return contexts: the first lengths[b] tokens of each row b."""
    return [row[:length].tolist() for row, length in zip(rows, lengths, strict=True)]


def _moved_by(ask: Asked, rows: Tensor, lengths: list[int]) -> str | None:
    """Change what a row's answer may not depend on; return what moved a bit of it."""
    contexts = _cut(rows, [lengths[row % len(lengths)] for row in range(len(rows))])
    before, vocab_size = ask(contexts), ask.arch.vocab_size
    others = (rows + 1) % vocab_size  # (B, S)
    if not torch.equal(before, ask(contexts)):
        return "a second run"
    if not torch.equal(before, ask(contexts, filler=torch.full_like(rows, vocab_size - 1))):
        return "other padding"
    if not torch.equal(before, ask(contexts, filler=others)):
        return "other future tokens"
    elsewhere = functools.partial(ask, others.tolist())
    if step_named(ask.bucket.step).pure and not torch.equal(before, ask(contexts, between=elsewhere)):
        return "another request"
    # each further row gets that of the one before
    if len(rows) > 1 and not torch.equal(before[:1], ask([contexts[0], *rows[:-1].tolist()])[:1]):
        return "other neighbours"
    return None


def _writes_elsewhere(ask: Asked, rows: Tensor) -> bool:
    """Whether a call with one real row changes what a padding row finds, or other positions than its own."""
    context, tail, state = rows[:1, : max(1, rows.shape[1] // 2)].tolist(), ask.tails[0], ask.dirty()
    for left in range(tail, 0, -1):
        ask.call(state, context, tail, left)
    before = [tensor.cpu().clone() for tensor in state]
    ask.call(state, context, tail, 0)
    # a prompt fills its bucket, if only with what nobody will look at
    end = ask.bucket.seq_len if ask.opens and not step_named(ask.bucket.step).pure else len(context[0])
    start = 0 if ask.opens else end - 1
    after = [tensor.cpu() for tensor in state]
    for old, new in zip(before, after, strict=True):
        old[:1, :, start:end] = new[:1, :, start:end]
    return not all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def canary(
    run: Run,
    arch: Architecture,
    bucket: Bucket,
    weights: Mapping[str, Tensor],
    *,
    rounds: bool = False,
    fused: bool = True,
    place: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> None:
    """Run one short row on a user's weights and compare it with the eager model: the pair fits together.

    Raises:
        GateFailed: the answers are not those of these weights.
        NonFiniteLogits: those weights give no finite logits, whoever computes them.
    """
    length = min(8, bucket.seq_len)
    generator = torch.Generator().manual_seed(length)
    rows = torch.randint(arch.vocab_size, (bucket.batch_size, length), generator=generator, dtype=torch.int32)
    with torch.inference_mode():
        ask = Asked(run, arch, bucket, weights, rows, place)
        expected = _reference(weights, ask, rows, [length])[:, 0]  # (B, ...)
        if not expected.isfinite().all():
            raise NonFiniteLogits(_not_finite(weights), hint="look how the model was trained or saved")
        found = ask(rows.tolist())
        error = _error(found, expected, expected.abs().max().item())
        # bfloat16 rounds to 8 bits, and two shapes round differently
        exact = not rounds and all(w.dtype == torch.float32 for w in weights.values())
        tolerance = 10 * FLOAT32_TOLERANCE if exact else 0.1
        if not error <= tolerance:  # weights that magnify rounding do so for whoever computes with them
            finer = {name: w.double() if exact else w.float() for name, w in weights.items()}
            truth = _reference(finer, ask, rows, [length])[:, 0].to(expected.dtype)  # (B, ...)
            scale = truth.abs().max().item()
            error = _error(found, truth, scale)
            tolerance = max(tolerance, NOISE_FACTOR * _error(expected, truth, scale))
    if not error <= tolerance:
        raise GateFailed(
            f"bucket {bucket} with these weights differs from the eager model by {error:.1e} of the largest value",
            hint="run nanogpt-buckets cache verify, then build again",
        )


def _not_finite(weights: Mapping[str, Tensor]) -> str:
    names = [name for name, tensor in sorted(weights.items()) if not tensor.isfinite().all()]
    where = f": {names[0]} holds NaN or infinite values" if names else ", though every weight is"
    return f"the logits of these weights are not finite{where}"
