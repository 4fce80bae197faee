"""What is predicted of a device: from published numbers, worked out here by hand."""

from __future__ import annotations

import json

import pytest

from nanogpt_buckets import Bucket, errors
from nanogpt_buckets.backends.neuron import predict
from nanogpt_buckets.cli import main
from nanogpt_buckets.model.architecture import GPT2_SIZES

GPT2 = GPT2_SIZES["gpt2"]


def test_a_short_call_reads_all_weights_and_a_long_one_computes():
    short, long, chunk = predict.predict(
        GPT2, "bfloat16", "inf2", [Bucket(1, 64), Bucket(1, 1024), Bucket(4, 1024, "chunk")]
    )

    read_ms = 2 * 124_439_808 / 410e6
    assert short.call_ms == pytest.approx((read_ms + 0.4, read_ms + 1.0))
    assert (short.bound, long.bound, chunk.bound) == ("memory", "arithmetic", "memory")
    layers = 12 * 1024 * (4 * 768**2 + 2 * 768 * 3072 + 2 * 1024 * 768)
    assert long.call_ms[0] == pytest.approx(2 * (layers + 768 * 50257) / 95e9 + 0.4)
    state = 4 * 2 * 12 * 768 * 1024 * 2  # rows, k and v, layers, width, positions, bytes
    assert chunk.moved_bytes == 2 * 124_439_808 + 2 * state
    assert chunk.token_ms == pytest.approx([ms / 4 for ms in chunk.call_ms])


def test_other_cores_are_faster_and_float32_is_four_times_the_arithmetic():
    (old,), (new,) = (predict.predict(GPT2, "bfloat16", target, [Bucket(1, 64)]) for target in ("trn1", "trn2"))
    assert new.call_ms < old.call_ms
    (exact,) = predict.predict(GPT2, "float32", "trn1", [Bucket(1, 1024)])
    (rounded,) = predict.predict(GPT2, "bfloat16", "trn1", [Bucket(1, 1024)])
    assert exact.call_ms[0] - 0.4 == pytest.approx(4 * (rounded.call_ms[0] - 0.4))


def test_the_command_needs_neither_packages_nor_buckets(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["bench", "--predict", "--target", "trn1", "--seq", "64,256", "--json"])
    document = json.loads(capsys.readouterr().out)

    assert [(b["step"], b["seq_len"]) for b in document["buckets"]] == [
        ("chunk", 64), ("recompute", 64), ("chunk", 256), ("recompute", 256),
    ]  # fmt: skip
    assert all(0 < b["call_ms"][0] < b["call_ms"][1] for b in document["buckets"])
    assert "nothing here was measured" in document["assumptions"][-1]


@pytest.mark.parametrize(
    ("given", "said"),
    [(["--target", "x86-64-v3"], "nothing is predicted for x86-64-v3"), ([], "--predict needs a target")],
)
def test_for_what_is_no_device_nothing_is_predicted(given, said, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["bench", "--predict", *given])
    assert caught.value.code == errors.UsageError.exit_code
    assert said in capsys.readouterr().err
