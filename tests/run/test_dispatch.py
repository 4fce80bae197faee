"""Padding and cropping are compared with their definitions."""

import pytest
import torch

from nanogpt_buckets.errors import NonFiniteLogits
from nanogpt_buckets.model.architecture import Architecture
from nanogpt_buckets.plan.bucket import Bucket
from nanogpt_buckets.run.dispatch import Dispatcher
from nanogpt_buckets.run.report import Report
from nanogpt_buckets.steps import step_named


def area(bucket: Bucket) -> int:
    return bucket.batch_size * bucket.seq_len


class Context:
    def __init__(self, ids):
        self.ids = ids


def logits_of(dispatcher, contexts, buckets):
    rows = [Context(ids) for ids in contexts]
    found = dispatcher.run(dispatcher.stateless("recompute", rows, buckets))
    return torch.stack([found[row] for row in rows])


def architecture(block_size: int) -> Architecture:
    return Architecture(1, 1, 8, 32, block_size, 11)


def test_padding_is_on_the_right_and_padding_rows_are_valid():
    input_ids, last_index = step_named("recompute").pack([[5, 6, 7], [8]], Bucket(3, 4))

    assert input_ids.tolist() == [[5, 6, 7, 0], [8, 0, 0, 0], [0, 0, 0, 0]]
    assert last_index.tolist() == [2, 0, 0]
    assert input_ids.dtype == last_index.dtype == torch.int32


def echo(input_ids, last_index):
    """Return the last real token and the row's first token as two 'logits' of one output."""
    last = input_ids[torch.arange(len(input_ids)), last_index]
    return (torch.stack([last, input_ids[:, 0]], dim=1).float(),)


def test_order_is_restored_and_padding_rows_are_dropped():
    report = Report("eager", "m")
    dispatcher = Dispatcher(lambda bucket: echo, area, architecture(8), "float32", report)

    logits = logits_of(dispatcher, [[1, 2, 3, 4, 5], [6], [7, 8]], [Bucket(2, 4), Bucket(1, 8)])

    assert logits.tolist() == [[5, 1], [6, 6], [8, 7]]
    assert report.real_tokens == 8
    assert report.padded_tokens == 8 + 8 - 8


def test_long_contexts_are_cropped_to_their_last_block_size_tokens():
    report = Report("eager", "m")

    dispatcher = Dispatcher(lambda bucket: echo, area, architecture(3), "float32", report)
    logits = logits_of(dispatcher, [[1, 2, 3, 4, 5]], [Bucket(1, 3)])

    assert logits.tolist() == [[5, 3]]
    assert report.crops == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_logits_that_are_not_finite_name_the_bucket(value):
    def run(ids, last_index):
        return (torch.full((1, 2), value),)

    dispatcher = Dispatcher(lambda bucket: run, area, architecture(8), "float32", Report("eager", "m"))

    with pytest.raises(NonFiniteLogits, match="bucket 1x8"):
        logits_of(dispatcher, [[1]], [Bucket(1, 8)])


def test_switches_count_changes_of_bucket():
    report = Report("eager", "m")
    dispatcher = Dispatcher(lambda bucket: echo, area, architecture(8), "float32", report)
    for n in (3, 4, 5, 6, 4):
        logits_of(dispatcher, [[1] * n], [Bucket(1, 4), Bucket(1, 8)])

    assert report.switches == 2
    assert 0 < report.waste < 1
