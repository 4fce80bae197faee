"""How often each step is asked for each length."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanogpt_buckets.errors import PlanError, UsageError
from nanogpt_buckets.plan import requests, traffic
from nanogpt_buckets.plan.traffic import Request, demand

REQUESTS = st.lists(st.builds(Request, st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=8)


def one_by_one(asked, M, way, piece):
    """What `demand` counts, by running through every request token by token."""
    found, crops = {}, 0
    for request in asked:
        length, kept = max(1, request.prompt_tokens), 0
        for _ in range(request.generated_tokens):
            crops += length > M
            if way == "recompute" or length > M:
                calls = [("recompute", min(length, M))]
            elif way == "kv":
                calls = [("decode" if kept else "prefill", length)]
            else:
                calls = [("chunk", end) for end in range(kept + piece, length, piece)] + [("chunk", length)]
            for step, n in calls:
                found.setdefault(step, [0] * (M + 1))[n] += 1
            kept = length
            length += 1
    return found, crops


@given(REQUESTS, st.sampled_from(["recompute", "kv", "chunk"]), st.integers(1, 50), st.integers(1, 9))
def test_the_closed_form_counts_what_running_through_counts(asked, way, M, piece):
    expected, crops = one_by_one(asked, M, way, piece)
    if not expected:
        with pytest.raises(PlanError, match="nothing to plan for"):
            demand(asked, M, way, piece)
        return
    found = demand(asked, M, way, piece)
    assert (found.weights, found.crops) == (expected, crops)


def test_a_thousand_million_tokens_are_counted_without_running_through_them():
    found = demand([Request(10, 10**9)], 64, "recompute")
    assert sum(found.weights["recompute"]) == 10**9
    assert found.crops == 10**9 - 55


@given(st.lists(st.integers(0, 50), min_size=2, max_size=40).filter(any), st.integers(1, 8))
def test_smoothing_moves_weight_and_loses_none(weights, width):
    weights = [0, *weights]
    made = traffic.smoothed(weights, width)
    assert len(made) == len(weights)
    assert sum(made) == pytest.approx(sum(weights))
    assert min(made[1:]) > 0


@pytest.mark.parametrize("name", traffic.WORKLOADS)
def test_workloads_are_the_same_each_time_and_scale_with_the_model(name):
    large, small = traffic.workload(name, 1024), traffic.workload(name, 256)
    assert large == traffic.workload(name, 1024)
    mean = sum(request.prompt_tokens for request in large) / len(large)
    assert mean / 4 == pytest.approx(sum(request.prompt_tokens for request in small) / len(small), rel=0.02)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "a.jsonl",
            '{"prompt_tokens": 3, "generated_tokens": 4, "user": "x"}\n\n{"prompt": "abcde", "generated_tokens": 1}\n',
        ),
        ("a.csv", "prompt_tokens,generated_tokens\n3,4\n5,1\n"),
        ("a.csv", 'prompt,generated_tokens\nabc,4\n"a,b,c",1\n'),
    ],
)
def test_files_of_requests(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert requests.read_requests(tmp_path / name, len) == [Request(3, 4), Request(5, 1)]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.jsonl", "", "holds no request"),
        ("a.csv", "prompt_tokens,generated_tokens\n", "holds no request"),
        ("a.jsonl", '{"prompt_tokens": 1, "generated_tokens": 1}\n{"prompt_tokens": 1', "line 2 .* no JSON object"),
        ("a.jsonl", "[" * 100_000, "line 1 .* no JSON object"),
        ("a.jsonl", "3\n", "line 1 .* no JSON object"),
        ("a.jsonl", '{"generated_tokens": 1}', "line 1 .* neither prompt_tokens nor a prompt"),
        ("a.jsonl", '{"prompt_tokens": 1}', "line 1 .* does not say generated_tokens"),
        ("a.jsonl", '{"prompt_tokens": -1, "generated_tokens": 1}', "line 1 .* prompt_tokens is -1"),
        ("a.jsonl", '{"prompt_tokens": 1.5, "generated_tokens": 1}', "line 1 .* prompt_tokens is 1.5"),
        ("a.jsonl", '{"prompt_tokens": true, "generated_tokens": 1}', "line 1 .* prompt_tokens is True"),
        ("a.jsonl", '{"prompt_tokens": 1, "generated_tokens": 1e99}', "line 1 .* generated_tokens"),
        ("a.jsonl", '{"prompt_tokens": 1, "generated_tokens": 10000000000}', "line 1 .* generated_tokens"),
        ("a.csv", "prompt_tokens,generated_tokens\n3,four\n", "line 2 .*'four' is no whole number"),
        ("a.csv", "prompt_tokens,generated_tokens\n3\n", "line 2 .*generated_tokens"),
        ("a.csv", "a,b\n3,4\n", "line 2 .* neither"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_with_its_line(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=said):
        requests.read_requests(tmp_path / name, len)


def test_a_file_that_is_not_there_or_not_text(tmp_path):
    with pytest.raises(UsageError, match="cannot be read"):
        requests.read_requests(tmp_path / "none", len)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="not in UTF-8"):
        requests.read_requests(tmp_path / "bytes", len)
