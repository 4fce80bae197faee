"""The step that takes some tokens and what is remembered, and returns both logits and what is remembered then."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from nanogpt_buckets.errors import GateFailed, UsageError
from nanogpt_buckets.model.architecture import Architecture
from nanogpt_buckets.model.gpt import Lowering, from_weights
from nanogpt_buckets.plan.bucket import Bucket
from nanogpt_buckets.steps import gate, step_named

ARCH = Architecture(
    n_layer=4, n_head=3, n_embd=96, n_inner=384, block_size=150, vocab_size=211, activation="gelu_tanh", tied=False
)
WEIGHTS = gate.seeded_weights(ARCH, torch.float32)
ONE, THREE = Bucket(1, 100, "chunk"), Bucket(3, 100, "chunk")
CHUNK = step_named("chunk")


def running(bucket, gpt=None, change=None):
    """Return the step over a network as an executable would run it; `change` may alter what goes in or comes out."""
    step = CHUNK.within(bucket).graph(gpt or from_weights(ARCH, WEIGHTS, Lowering("explicit")))

    def run(*tensors):
        with torch.inference_mode():
            return step(*tensors) if change is None else change(step, *tensors)

    return run


def test_it_takes_64_tokens_or_as_many_as_fit_and_returns_what_it_was_given():
    for bucket, width in ((Bucket(2, 9, "chunk"), 9), (THREE, 64)):
        interface, B = CHUNK.interface(ARCH, bucket, "bfloat16"), bucket.batch_size
        assert [each.shape for each in interface.inputs] == [(B, width), (B,), (B,)]
        assert {(each.dtype, each.shape) for each in interface.state} == {("bfloat16", (B, 3, 150, 32))}
        assert [e.name for e in interface.outputs] == ["logits", *(e.name for e in interface.state)]
        assert len(interface.state) == 8
        assert CHUNK.positions(bucket) == B * width


@pytest.mark.parametrize("seq_len", [1, 2, 3, 33, 64, 65, 150])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_right_step_passes(seq_len, batch_size):
    bucket = Bucket(batch_size, seq_len, "chunk")
    record = gate.check(running(bucket), ARCH, bucket, WEIGHTS)
    assert record["relative_error_e9"] < record["tolerance_e9"]


def test_the_right_step_in_bfloat16_passes():
    weights = gate.seeded_weights(ARCH, torch.bfloat16)
    gate.check(CHUNK.eager(ARCH, THREE, weights), ARCH, THREE, weights)


def start_off_by_one(step, ids, start, last_index, *state):
    return step(ids, (start - 1).clamp(min=0), last_index, *state)


def last_token_off_by_one(step, ids, start, last_index, *state):
    return step(ids, start, last_index - 1, *state)


def write_skipped_in_one_layer(step, ids, start, last_index, *state):
    logits, *made = step(ids, start, last_index, *state)
    return (logits, *made[:2], *state[2:4], *made[4:])


def k_and_v_exchanged_in_one_layer(step, ids, start, last_index, *state):
    logits, k, v, *made = step(ids, start, last_index, state[1], state[0], *state[2:])
    return logits, v, k, *made


def layers_exchanged_in_state(step, ids, start, last_index, *state):
    logits, *made = step(ids, start, last_index, *state)
    return (logits, *made[2:4], *made[:2], *made[4:])


def rows_exchanged_in_state(step, ids, start, last_index, *state):
    logits, *made = step(ids, start, last_index, *(tensor.roll(1, 0) for tensor in state))
    return (logits, *made)


def padding_rows_are_written(step, ids, start, last_index, *state):
    return step(ids, start, last_index.clamp(min=0), *state)


def what_is_behind_the_bucket_is_lost(step, ids, start, last_index, *state):
    logits, *made = step(ids, start, last_index, *state)
    for tensor in made:
        tensor[:, :, 100:] = 0
    return (logits, *made)


def _looking(by):
    """Have every token look at slots as if it stood elsewhere: before itself, or behind."""

    def change(step, ids, start, last_index, *state):
        attend = [block.attn._attend_explicitly for block in step.gpt.transformer["h"]]

        def shifted(real):
            def attend(q, k, v, seen):
                seen = seen.roll(by, -1)
                seen[..., 0] = True
                return real(q, k, v, seen)

            return attend

        for block, real in zip(step.gpt.transformer["h"], attend, strict=True):
            block.attn._attend_explicitly = shifted(real)
        try:
            return step(ids, start, last_index, *state)
        finally:
            for block, real in zip(step.gpt.transformer["h"], attend, strict=True):
                block.attn._attend_explicitly = real

    return change


stale_slot_visible, own_slot_hidden = _looking(1), _looking(-1)


@pytest.mark.parametrize(
    "fault",
    [
        start_off_by_one, last_token_off_by_one, write_skipped_in_one_layer, k_and_v_exchanged_in_one_layer,
        layers_exchanged_in_state, what_is_behind_the_bucket_is_lost, stale_slot_visible, own_slot_hidden,
    ],
    ids=["start", "last token", "write skipped", "k and v", "layers", "behind", "stale slot", "own slot"],
)  # fmt: skip
@pytest.mark.parametrize("bucket", [ONE, THREE], ids=str)
def test_a_planted_fault_fails(bucket, fault):
    with pytest.raises(GateFailed, match=str(bucket)):
        gate.check(running(bucket, change=fault), ARCH, bucket, WEIGHTS)


@pytest.mark.parametrize("fault", [rows_exchanged_in_state, padding_rows_are_written])
def test_a_planted_fault_of_rows_fails(fault):
    with pytest.raises(GateFailed, match=str(THREE)):
        gate.check(running(THREE, change=fault), ARCH, THREE, WEIGHTS)


@pytest.mark.parametrize(
    "changes", [{"activation": "gelu"}, {"layer_norm_epsilon": 1e-6}, {"scale_by_head_size": False}], ids=str
)
def test_a_planted_fault_of_the_network_fails(changes):
    gpt = from_weights(dataclasses.replace(ARCH, **changes), WEIGHTS, Lowering("explicit"))
    with pytest.raises(GateFailed, match=str(ONE)):
        gate.check(running(ONE, gpt), ARCH, ONE, WEIGHTS)


def test_the_canary_knows_other_weights():
    other = {name: tensor + 0.01 for name, tensor in WEIGHTS.items()}
    gate.canary(running(THREE), ARCH, THREE, WEIGHTS)
    with pytest.raises(GateFailed, match="these weights"):
        gate.canary(running(THREE), ARCH, THREE, other)


def test_what_is_no_place_is_refused_before_anything_runs():
    executable = CHUNK.eager(ARCH, ONE, WEIGHTS)
    state = [view.blank() for view in executable.interface.state]
    ids, start, last_index = CHUNK.pack([[1, 2, 3]], ONE)
    executable(ids, start, last_index, *state)
    for inputs in ((ids, start + 100, last_index), (ids, start, last_index + 62), (ids - 2, start, last_index)):
        with pytest.raises(UsageError, match="out of range"):
            executable(*inputs, *state)
    with pytest.raises(UsageError, match="k1 has shape"):
        executable(ids, start, last_index, *state[:2], state[2][:, :, :100], *state[3:])


@pytest.fixture(scope="module")
def other():
    """transformers' own GPT-2, and its weights by our names."""
    torch.manual_seed(3)
    config = GPT2Config(
        n_layer=3,
        n_head=3,
        n_embd=48,
        n_positions=100,
        vocab_size=211,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config).eval()
    arch = Architecture(n_layer=3, n_head=3, n_embd=48, n_inner=192, block_size=100, vocab_size=211)
    taken = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    weights = {
        name: tensor.detach().T.contiguous() if name.endswith(taken) else tensor.detach()
        for name, tensor in model.named_parameters()
    }
    return model, arch, weights


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.large_base_example])
@given(st.data())
def test_whatever_the_pieces_and_buckets_the_logits_are_transformers(other, data):
    model, arch, weights = other
    B = data.draw(st.integers(1, 3))
    lengths = data.draw(st.lists(st.integers(1, 100), min_size=B, max_size=B))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    rows = [torch.randint(211, (n,), generator=generator).tolist() for n in lengths]
    dirt = data.draw(st.sampled_from([0.0, 100.0, -100.0]))
    state = [torch.full((B, 3, 100, 16), dirt) for _ in range(6)]
    kept, found = [0] * B, {}

    while any(have < len(row) for have, row in zip(kept, rows, strict=True)):
        size = [data.draw(st.integers(0, min(64, len(row) - have))) for have, row in zip(kept, rows, strict=True)]
        until = [have + new for have, new in zip(kept, size, strict=True)]
        shortest = max(*until, *size, 1)
        bucket = Bucket(B, data.draw(st.sampled_from([s for s in (16, 33, 64, 90, 100) if s >= shortest])), "chunk")
        inputs = CHUNK.pack_after(kept, [row[:end] for row, end in zip(rows, until, strict=True)], bucket)
        logits, *state = CHUNK.eager(arch, bucket, weights, Lowering("explicit"))(*inputs, *state)
        found |= {row: logits[row] for row in range(B) if size[row]}
        kept = until

    for row, ids in enumerate(rows):
        with torch.inference_mode():
            expected = model(torch.tensor([ids])).logits[0, -1]
        assert (found[row] - expected).abs().max() < 2e-5 * expected.abs().max()
