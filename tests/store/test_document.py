"""What is quick about reading documents refuses exactly what the plain way refuses, in the same words."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt_buckets import key as keys
from nanogpt_buckets.errors import CorruptEntry
from nanogpt_buckets.store import document
from nanogpt_buckets.store.document import MAX_DEPTH, check, parse

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def examine(value: Any, depth: int = MAX_DEPTH) -> None:
    """What `parse` refuses of JSON, by walking through all of it."""
    if isinstance(value, str):
        if CONTROL.search(value):
            raise CorruptEntry("it holds control characters")
    elif isinstance(value, dict | list):
        if depth == 0:
            raise CorruptEntry("it is nested deeper than 8 levels")
        for inner in value if isinstance(value, list) else (*value, *value.values()):
            examine(inner, depth - 1)


def check_plainly(value: Any, wanted: Any, what: str) -> None:
    """What `check` refuses, asking what is wanted of each value anew."""
    if isinstance(wanted, list):
        right = type(value) is list
        inner = [(item, wanted[0], what) for item in value] if right else []
    elif isinstance(wanted, dict):
        right = type(value) is dict and (str in wanted or value.keys() == wanted.keys())
        inner = [(item, wanted.get(name, wanted.get(str)), name) for name, item in value.items()] if right else []
    else:
        inner = []
        right = type(value) is wanted if isinstance(wanted, type) else wanted(value)
    if not right:
        raise CorruptEntry(f"{what[:40]} is not what it should be, but {value!r:.80}")
    for item in inner:
        check_plainly(*item)


def outcome(function, *arguments: Any) -> str:
    try:
        function(*arguments)
    except CorruptEntry as error:
        return error.message
    return "fine"


# characters that matter: quotes, brackets, backslashes, controls, what looks like an escape, others of several bytes
text = st.text(st.sampled_from('ab"\\[]{}:,\n\t\r\b\x00\x1b\x7f\x85\x9f é\u2028漢😀nu0'), max_size=6)
leaf = st.none() | st.booleans() | st.integers(-(10**20), 10**20) | text
values = st.recursive(
    leaf, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3), max_leaves=12
)
deep = st.builds(
    lambda inner, ways: wrapped(inner, ways), leaf | values, st.lists(text | st.none(), min_size=0, max_size=11)
)


def wrapped(value: Any, ways: list[str | None]) -> Any:
    """Nest a value once more for each way: in a list, or under a name."""
    for way in ways:
        value = [value] if way is None else {way: value, "z": "]}"}
    return value


written = st.sampled_from(
    [{}, {"ensure_ascii": False}, {"ensure_ascii": False, "separators": (",", ":")}, {"indent": 1}, {"indent": "\t"}]
)


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(text, values | deep, max_size=3), written)
def test_parse_refuses_what_walking_through_all_of_it_refuses(value, how):
    data = json.dumps(value, **how).encode("utf-8", "surrogatepass")

    found = outcome(parse, data, "it")

    walked = outcome(examine, value)
    # of a document with two faults either may be named
    assert (found == "fine") == (walked == "fine")
    assert found in ("fine", "it holds control characters", "it is nested deeper than 8 levels")
    if found == "fine":
        assert keys.plain_json(parse(data, "it")) == keys.canonical_json(value)


@pytest.mark.parametrize("bad", [chr(code) for code in (*range(0x20), *range(0x7F, 0xA0), 0xD800, 0xDFFF)])
@pytest.mark.parametrize("place", ["name", "value"])
def test_every_control_character_is_found_raw_and_escaped(bad, place):
    value = {bad: 1} if place == "name" else {"a": [bad]}
    for data in (
        json.dumps(value).encode(),
        json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass"),
        (f'{{"{bad}":1}}' if place == "name" else f'{{"a":["{bad}"]}}').encode("utf-8", "surrogatepass"),
    ):
        with pytest.raises(CorruptEntry, match=r"control character|not plain JSON"):
            parse(data, "it")


@pytest.mark.parametrize("inner", ["0", '"]]]]]]"', '"[[[[[[[["', '"\\""', '"\\"]]"', '""'])
@pytest.mark.parametrize("depth", [7, 8, 9, 200])
def test_depth_is_counted_whatever_is_in_strings(inner, depth):
    data = ('{"a":' * (depth - 1) + f"[{inner}]" + "}" * (depth - 1)).encode()

    assert outcome(parse, data, "it") == ("fine" if depth <= MAX_DEPTH else "it is nested deeper than 8 levels")


kinds = st.recursive(
    st.sampled_from([str, int, bool, dict, list, lambda value: isinstance(value, str) and len(value) < 3]),
    lambda inner: (
        st.lists(inner, min_size=1, max_size=1) | st.dictionaries(st.sampled_from(["a", "b", str]), inner, max_size=3)
    ),
    max_leaves=6,
)
near = st.recursive(
    st.sampled_from([True, 0, "a", "abcd", None, [], {}]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["a", "b", "c"]), inner, max_size=2),
    max_leaves=6,
)


@settings(max_examples=400, deadline=None)
@given(near, kinds)
def test_check_refuses_what_asking_anew_refuses_in_the_same_words(value, wanted):
    assert outcome(check, value, wanted, "it") == outcome(check_plainly, value, wanted, "it")
    assert outcome(document.checker(wanted), value, "it") == outcome(check_plainly, value, wanted, "it")
