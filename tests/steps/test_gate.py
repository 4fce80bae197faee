"""The gate must pass the right step and fail every planted fault."""

import dataclasses
import gc
import weakref

import pytest
import torch
from torch import nn

from nanogpt_buckets.errors import GateFailed, NonFiniteLogits
from nanogpt_buckets.model.architecture import ACTIVATIONS, Architecture
from nanogpt_buckets.model.gpt import Lowering, from_weights
from nanogpt_buckets.plan.bucket import Bucket
from nanogpt_buckets.steps import gate, step_named

ARCH = Architecture(
    n_layer=4, n_head=3, n_embd=96, n_inner=384, block_size=64, vocab_size=211, activation="gelu_tanh", tied=False
)
WEIGHTS = gate.seeded_weights(ARCH, torch.float32)
BUCKETS = [Bucket(1, 32), Bucket(3, 32)]


def run_gate(step, bucket, weights=WEIGHTS):
    with torch.inference_mode():
        return gate.check(called(step), ARCH, bucket, weights)


def called(step):
    """Give a step's graph, or a function that returns logits, the shape of an executable."""
    return lambda *tensors: (step(*tensors),)


def graph(gpt):
    return step_named("recompute").graph(gpt)


def fresh(weights=WEIGHTS, **architecture) -> nn.Module:
    return graph(from_weights(dataclasses.replace(ARCH, **architecture), {k: v.clone() for k, v in weights.items()}))


@pytest.mark.parametrize("bucket", [Bucket(1, 1), Bucket(1, 2), Bucket(1, 3), *BUCKETS, Bucket(2, 64)], ids=str)
@pytest.mark.parametrize("attention", ["sdpa", "explicit"])
def test_the_right_step_passes(bucket, attention):
    record = run_gate(graph(from_weights(ARCH, WEIGHTS, Lowering(attention))), bucket)

    assert record["relative_error_e9"] < record["tolerance_e9"]


def gelu_swapped():
    return fresh(activation="gelu")


def wrong_epsilon():
    return fresh(layer_norm_epsilon=1e-6)


def wrong_scale():
    return fresh(scale_by_head_size=False)


def last_index_off_by_one():
    step = fresh()
    return lambda ids, last: step(ids, (last - 1).clamp(min=0))


def one_layer_without_mask():
    return without_a_mask_in_one_layer(fresh())


def bias_dropped():
    return fresh(WEIGHTS | {"transformer.h.1.mlp.c_fc.bias": torch.zeros(384)})


def layers_exchanged():
    step = fresh()
    h = step.gpt.transformer["h"]
    h[1], h[2] = h[2], h[1]
    return step


def q_and_k_swapped():
    name = "transformer.h.0.attn.c_attn.weight"
    q, k, v = WEIGHTS[name].chunk(3)
    return fresh(WEIGHTS | {name: torch.cat([k, q, v])})


def position_shifted():
    name = "transformer.wpe.weight"
    return fresh(WEIGHTS | {name: WEIGHTS[name].roll(-1, dims=0)})


def nan_logits():
    step = fresh()
    return lambda ids, last: step(ids, last) * float("nan")


def leaks_padding():
    step = fresh()
    return lambda ids, last: step(ids, last) + 1e-7 * ids[:, -1:].float()


def leaks_neighbours():
    step = fresh()
    return lambda ids, last: step(ids, last) + 1e-7 * ids.float().mean()


FAULTS = [
    gelu_swapped,
    wrong_epsilon,
    wrong_scale,
    last_index_off_by_one,
    one_layer_without_mask,
    bias_dropped,
    layers_exchanged,
    q_and_k_swapped,
    position_shifted,
    nan_logits,
    leaks_padding,
    leaks_neighbours,
]


@pytest.mark.parametrize("bucket", BUCKETS, ids=str)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_fails(fault, bucket):
    with pytest.raises(GateFailed, match=str(bucket)):
        run_gate(fault(), bucket)


def test_a_step_that_is_not_repeatable_fails():
    step, calls = fresh(), iter(range(1000))

    with pytest.raises(GateFailed, match="second run"):
        run_gate(lambda ids, last: step(ids, last) + 1e-6 * next(calls), Bucket(1, 32))


def test_bfloat16_is_judged_by_its_own_noise():
    weights = gate.seeded_weights(ARCH, torch.bfloat16)
    record = run_gate(graph(from_weights(ARCH, weights)), Bucket(2, 32), weights)

    assert record["tolerance_e9"] > 1e9 * gate.FLOAT32_TOLERANCE
    with pytest.raises(GateFailed):
        run_gate(fresh({k: v.clone() for k, v in weights.items()}, scale_by_head_size=False), Bucket(2, 32), weights)


def test_bfloat16_noise_hides_no_mask_fault():
    weights = gate.seeded_weights(ARCH, torch.bfloat16)
    step = one_layer_without_mask().to(torch.bfloat16)

    with pytest.raises(GateFailed):
        run_gate(step, Bucket(1, 32), weights)


GELU, SCALED = "gelu for gelu_tanh", "logits x 1.001"


@pytest.mark.parametrize("bucket", [Bucket(1, 64), Bucket(3, 64), Bucket(1, 64, "prefill"), Bucket(1, 64, "decode")])
def test_bfloat16_noise_hides_no_mistake_that_is_small_everywhere(bucket):
    weights = gate.seeded_weights(ARCH, torch.bfloat16)
    right = step_named(bucket.step).eager(ARCH, bucket, weights)

    record = gate.check(right, ARCH, bucket, weights)
    assert record["told_apart"] == [SCALED, GELU]
    gelu = dataclasses.replace(ARCH, activation="gelu")
    with pytest.raises(GateFailed, match="what a model with"):
        gate.check(step_named(bucket.step).eager(gelu, bucket, weights), ARCH, bucket, weights)
    for factor in (1.001, 0.999):
        with pytest.raises(GateFailed, match=SCALED):
            gate.check(scaled(right, factor), ARCH, bucket, weights)


def test_a_gelu_that_rounds_within_is_no_mistake_where_that_is_known(monkeypatch):
    """As torch-xla writes it out; and its scale is told all the same."""
    weights, bucket = gate.seeded_weights(ARCH, torch.bfloat16, fused=False), Bucket(3, 64)
    step = step_named("recompute").eager(ARCH, bucket, weights)
    fused = torch.nn.functional.gelu

    def rounding(x, approximate="none"):
        if x.dtype != torch.bfloat16:
            return fused(x, approximate=approximate)
        return x * 0.5 * (1 + torch.tanh(0.7978845608 * (x + 0.044715 * x * x * x)))

    def run(*tensors):
        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.functional, "gelu", rounding)
            return step(*tensors)

    assert gate.check(run, ARCH, bucket, weights, fused=False)["told_apart"] == ["logits x 1.003"]
    with pytest.raises(GateFailed, match=r"logits x 1\.003"):
        gate.check(scaled(run, 1.003), ARCH, bucket, weights, fused=False)


def scaled(run, factor):
    def scaling(*tensors):
        logits, *state = run(*tensors)
        return logits * factor, *state

    return scaling


def test_a_slip_that_cannot_be_told_apart_is_not_claimed():
    weights, bucket = gate.seeded_weights(ARCH, torch.bfloat16), Bucket(1, 2)

    assert gate.check(step_named("recompute").eager(ARCH, bucket, weights), ARCH, bucket, weights)["told_apart"] == []
    bucket = Bucket(1, 32)
    assert run_gate(fresh(), bucket)["told_apart"] == [], "float32 tells by the largest error"


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_passes_in_bfloat16(activation, bias):
    arch = dataclasses.replace(ARCH, activation=activation, bias=bias)
    weights, bucket = gate.seeded_weights(arch, torch.bfloat16), Bucket(2, 64)

    gate.check(step_named("recompute").eager(arch, bucket, weights), arch, bucket, weights)


@pytest.mark.parametrize(("seq_len", "lengths"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (64, [1, 32, 33, 63, 64])])
def test_awkward_lengths(seq_len, lengths):
    assert step_named("recompute").lengths(seq_len) == lengths
    assert sorted(step_named("score").lengths(seq_len)) == lengths


def test_the_canary_passes_the_right_pair_and_fails_another():
    other = {name: tensor + 0.01 for name, tensor in WEIGHTS.items()}

    gate.canary(called(fresh()), ARCH, Bucket(2, 16), WEIGHTS)
    with pytest.raises(GateFailed, match="these weights"):
        gate.canary(called(fresh()), ARCH, Bucket(2, 16), other)


def test_the_canary_blames_weights_that_are_not_finite_and_names_the_tensor():
    weights = gate.seeded_weights(ARCH, torch.float32)
    weights["transformer.h.1.mlp.c_fc.weight"][0, 0] = float("nan")
    step = graph(from_weights(ARCH, weights))

    with pytest.raises(NonFiniteLogits, match=r"transformer\.h\.1\.mlp\.c_fc\.weight holds NaN"):
        gate.canary(called(step), ARCH, Bucket(1, 16), weights)


# steps that keep state

PREFILL, DECODE = Bucket(3, 32, "prefill"), Bucket(3, 32, "decode")


def remembering(bucket, gpt=None, change=None):
    """Return a step over a network as an executable would run it; `change` may alter its inputs or its state."""
    step = step_named(bucket.step).graph(gpt or from_weights(ARCH, WEIGHTS))

    def run(*tensors):
        with torch.inference_mode():
            return (step(*tensors),) if change is None else change(step, *tensors)

    return run


@pytest.mark.parametrize("seq_len", [1, 2, 64])
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("name", ["prefill", "decode"])
@pytest.mark.parametrize("attention", ["sdpa", "explicit", "sums"])
@pytest.mark.parametrize("linear", ["aten", "rows", "onednn"])
def test_the_right_step_that_remembers_passes(name, batch_size, seq_len, attention, linear):
    bucket = Bucket(batch_size, seq_len, name)
    gpt = from_weights(ARCH, WEIGHTS, Lowering(attention, lambda rows: linear))
    record = gate.check(remembering(bucket, gpt), ARCH, bucket, WEIGHTS)
    assert record["relative_error_e9"] < record["tolerance_e9"]


@pytest.mark.parametrize("name", ["prefill", "decode"])
def test_the_right_step_in_bfloat16_passes(name):
    bucket, weights = Bucket(3, 32, name), gate.seeded_weights(ARCH, torch.bfloat16)
    gate.check(step_named(name).eager(ARCH, bucket, weights), ARCH, bucket, weights)


def position_off_by_one(step, ids, position, *state):
    return (step(ids, (position - 1).clamp(min=0), *state),)


def last_token_off_by_one(step, ids, last_index, *state):
    return (step(ids, (last_index - 1).clamp(min=0), *state),)


def write_skipped_in_one_layer(step, ids, where, *state):
    kept = [tensor.clone() for tensor in state[2:4]]
    made = step(ids, where, *state)
    for tensor, old in zip(state[2:4], kept, strict=True):
        tensor.copy_(old)
    return (made,)


def k_and_v_exchanged_in_one_layer(step, ids, where, *state):
    first, second, *others = state
    return (step(ids, where, second, first, *others),) if state[0].shape[2] == 32 else (step(ids, where, *state),)


def layers_exchanged_in_state(step, ids, where, *state):
    return (step(ids, where, *state[2:4], *state[:2], *state[4:]),)


def stale_slot_visible(step, ids, position, *state):
    """Attend to one slot more than has been written, in every layer: the slot after the token's own."""
    real = torch.arange

    def longer(end, **options):
        return real(end, **options) - 1 if end == state[0].shape[2] else real(end, **options)

    torch.arange = longer
    try:
        return (step(ids, position, *state),)
    finally:
        torch.arange = real


def padding_rows_are_written(step, ids, where, *state):
    return (step(ids, where.clamp(min=0), *state),)


def row_written_into_its_neighbour(step, ids, where, *state):
    return (step(ids, where, *(tensor.roll(1, 0) for tensor in state)),)


STATE_FAULTS = [
    (DECODE, position_off_by_one),
    (PREFILL, last_token_off_by_one),
    *((bucket, write_skipped_in_one_layer) for bucket in (PREFILL, DECODE)),
    *((bucket, k_and_v_exchanged_in_one_layer) for bucket in (PREFILL, DECODE)),
    *((bucket, layers_exchanged_in_state) for bucket in (PREFILL, DECODE)),
    (DECODE, stale_slot_visible),
    *((bucket, padding_rows_are_written) for bucket in (PREFILL, DECODE)),
    *((bucket, row_written_into_its_neighbour) for bucket in (PREFILL, DECODE)),
]


@pytest.mark.parametrize(("bucket", "fault"), STATE_FAULTS)
def test_a_planted_fault_of_state_fails(bucket, fault):
    with pytest.raises(GateFailed, match=str(bucket)):
        gate.check(remembering(bucket, change=fault), ARCH, bucket, WEIGHTS)


@pytest.mark.parametrize("bucket", [PREFILL, DECODE], ids=str)
@pytest.mark.parametrize(
    "changes", [{"activation": "gelu"}, {"layer_norm_epsilon": 1e-6}, {"scale_by_head_size": False}], ids=str
)
def test_a_planted_fault_of_the_network_fails(bucket, changes):
    gpt = from_weights(dataclasses.replace(ARCH, **changes), WEIGHTS)
    with pytest.raises(GateFailed, match=str(bucket)):
        gate.check(remembering(bucket, gpt), ARCH, bucket, WEIGHTS)


@pytest.mark.parametrize("bucket", [PREFILL, DECODE], ids=str)
def test_the_canary_knows_a_step_that_remembers_over_other_weights(bucket):
    other = {name: tensor + 0.01 for name, tensor in WEIGHTS.items()}
    gate.canary(remembering(bucket), ARCH, bucket, WEIGHTS)
    with pytest.raises(GateFailed, match="these weights"):
        gate.canary(remembering(bucket), ARCH, bucket, other)


def test_an_eager_prompt_runs_once_for_each_row_however_often_it_is_asked_about(monkeypatch):
    real, rows = type(step_named("prefill")).forward, []
    monkeypatch.setattr(
        type(step_named("prefill")), "forward",
        lambda self, gpt, ids, *rest: (rows.append(ids.shape), real(self, gpt, ids, *rest))[1],
    )  # fmt: skip
    gate.check(remembering(DECODE), ARCH, DECODE, WEIGHTS)
    assert rows == [(1, 32)] * 3


@pytest.mark.parametrize("name", ["recompute", "prefill", "decode", "score"])
def test_a_check_keeps_nothing_alive(name):
    bucket, weights = Bucket(1, 8, name), {k: v.clone() for k, v in WEIGHTS.items()}
    gone = weakref.ref(weights["transformer.wte.weight"])
    gate.canary(step_named(name).eager(ARCH, bucket, weights), ARCH, bucket, weights)
    del weights
    gc.collect()
    assert gone() is None


# a step that answers for every position

SCORES = [Bucket(1, 32, "score"), Bucket(3, 32, "score")]


def scoring(change=None, **architecture):
    """Return the score step over a network, which `change` may alter."""
    step = step_named("score").graph(from_weights(dataclasses.replace(ARCH, **architecture), WEIGHTS))
    return step if change is None else change(step)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("seq_len", [2, 3, 4, 32, 64])
@pytest.mark.parametrize("attention", ["sdpa", "explicit"])
@pytest.mark.parametrize("linear", ["aten", "rows", "onednn"])
def test_the_right_step_that_scores_passes(batch_size, seq_len, attention, linear):
    step = step_named("score").graph(from_weights(ARCH, WEIGHTS, Lowering(attention, lambda rows: linear)))
    record = run_gate(step, Bucket(batch_size, seq_len, "score"))
    assert record["relative_error_e9"] < record["tolerance_e9"]


def scores_the_token_itself(step):
    return lambda ids, last: step(torch.cat([ids[:, :1], ids[:, :-1]], 1), last)


def scores_one_target_further(step):
    return lambda ids, last: torch.cat([step(ids, last)[:, 1:], step(ids, last)[:, :1]], 1)


def scores_one_token_too_few(step):
    return lambda ids, last: step(ids, (last - 1).clamp(min=0))


def scores_one_token_too_many(step):
    return lambda ids, last: step(ids, (last + 1).clamp(max=31))


def scores_padding(step):
    return lambda ids, last: step(ids, torch.full_like(last, 31))


def last_index_of_row_0_for_all(step):
    return lambda ids, last: step(ids, last[:1].expand_as(last))


def softmax_over_positions(step):
    def forward(ids, last):
        every = step.gpt(ids).log_softmax(1)[:, :-1].gather(2, ids[:, 1:, None].long())[..., 0]
        return torch.where(torch.arange(31) < last[:, None], every, 0.0)

    return forward


def no_softmax(step):
    def forward(ids, last):
        every = step.gpt(ids)[:, :-1].gather(2, ids[:, 1:, None].long())[..., 0]
        return torch.where(torch.arange(31) < last[:, None], every, 0.0)

    return forward


def base_two(step):
    return lambda ids, last: step(ids, last) / 0.6931472


def rows_exchanged(step):
    return lambda ids, last: step(ids.roll(1, 0), last)


def without_a_mask_in_one_layer(step):
    attention = step.gpt.transformer["h"][2].attn

    def unmasked(x, memory=None):
        q, k, v = (t.view(*x.shape[:2], 3, 32).transpose(1, 2) for t in attention.c_attn(x).chunk(3, dim=2))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return attention.c_proj(y.transpose(1, 2).reshape(x.shape))

    attention.forward = unmasked
    return step


def nan_scores(step):
    return lambda ids, last: step(ids, last) * float("nan")


def scores_leak_padding(step):
    return lambda ids, last: step(ids, last) + 1e-6 * ids[:, -1:].float()


def scores_leak_the_next_token(step):
    return lambda ids, last: step(ids, last) + 1e-6 * ids.roll(-2, 1)[:, :-1].float()


def scores_leak_neighbours(step):
    return lambda ids, last: step(ids, last) + 1e-6 * ids.float().mean()


SCORE_FAULTS = [
    scores_the_token_itself,
    scores_one_target_further,
    scores_one_token_too_few,
    scores_one_token_too_many,
    scores_padding,
    softmax_over_positions,
    no_softmax,
    base_two,
    without_a_mask_in_one_layer,
    nan_scores,
    scores_leak_padding,
    scores_leak_the_next_token,
]


@pytest.mark.parametrize(
    ("fault", "bucket"),
    [
        *((fault, bucket) for fault in SCORE_FAULTS for bucket in SCORES),
        *((fault, SCORES[1]) for fault in (last_index_of_row_0_for_all, rows_exchanged, scores_leak_neighbours)),
    ],
)
def test_a_planted_fault_of_scores_fails(fault, bucket):
    with pytest.raises(GateFailed, match=str(bucket)):
        run_gate(scoring(fault), bucket)


@pytest.mark.parametrize("bucket", SCORES, ids=str)
@pytest.mark.parametrize(
    "changes", [{"activation": "gelu"}, {"layer_norm_epsilon": 1e-6}, {"scale_by_head_size": False}], ids=str
)
def test_a_planted_fault_of_the_network_shows_in_scores(bucket, changes):
    with pytest.raises(GateFailed, match=str(bucket)):
        run_gate(scoring(**changes), bucket)


def test_scores_in_bfloat16_are_judged_by_their_own_noise_which_hides_no_fault():
    weights, bucket = gate.seeded_weights(ARCH, torch.bfloat16), SCORES[1]
    step = step_named("score").graph(from_weights(ARCH, weights))
    assert run_gate(step, bucket, weights)["tolerance_e9"] > 1e9 * gate.FLOAT32_TOLERANCE
    for fault in (scores_the_token_itself, scores_one_token_too_many, without_a_mask_in_one_layer):
        changed = fault(step_named("score").graph(from_weights(ARCH, weights)))
        with pytest.raises(GateFailed, match=str(bucket)):
            run_gate(changed, bucket, weights)


def test_the_canary_knows_scores_of_other_weights_and_of_weights_that_are_not_finite():
    bucket, other = Bucket(2, 16, "score"), {name: tensor + 0.01 for name, tensor in WEIGHTS.items()}
    gate.canary(called(scoring()), ARCH, bucket, WEIGHTS)
    with pytest.raises(GateFailed, match="these weights"):
        gate.canary(called(scoring()), ARCH, bucket, other)
    broken = WEIGHTS | {"transformer.ln_f.weight": torch.full((96,), float("nan"))}
    with pytest.raises(NonFiniteLogits, match=r"transformer\.ln_f\.weight"):
        gate.canary(called(step_named("score").graph(from_weights(ARCH, broken))), ARCH, bucket, broken)


def test_weights_that_magnify_rounding_are_judged_by_how_far_the_eager_model_itself_is_off(monkeypatch):
    monkeypatch.setattr(gate, "FLOAT32_TOLERANCE", 1e-12)  # so that any rounding is too much
    bucket = Bucket(2, 32)
    other = graph(from_weights(ARCH, WEIGHTS, Lowering("explicit", lambda rows: "rows")))
    assert 0 < run_gate(other, bucket)["relative_error_e9"] <= 4 * 2000
    gate.canary(called(other), ARCH, bucket, WEIGHTS)
    wrong = graph(from_weights(ARCH, {**WEIGHTS, "transformer.ln_f.bias": WEIGHTS["transformer.ln_f.bias"].flip(0)}))
    with pytest.raises(GateFailed):
        run_gate(wrong, bucket)
    with pytest.raises(GateFailed):
        gate.canary(called(wrong), ARCH, bucket, WEIGHTS)
