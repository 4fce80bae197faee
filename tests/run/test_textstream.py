import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanogpt_buckets.errors import UsageError
from nanogpt_buckets.model.tokenization.characters import CharacterTokenizer
from nanogpt_buckets.model.tokenization.gpt2 import gpt2
from nanogpt_buckets.run.generation import TextStream, stop_strings

ABC = CharacterTokenizer(dict(enumerate("ab|")))


def run(ids, stops, tokenizer=ABC):
    stream = TextStream(tokenizer, [], stops)
    pieces = []
    for n, token in enumerate(ids):
        pieces.append(stream.feed(token, last=n == len(ids) - 1))
        if stream.stopped:
            break
    return stream, pieces


@given(st.lists(st.integers(0, 2), min_size=1), st.lists(st.text("ab|", min_size=1, max_size=4), max_size=3))
def test_text_ends_before_the_first_stop_and_pieces_join_to_it(ids, stops):
    whole = "".join("ab|"[n] for n in ids)
    cuts = [whole.find(stop) for stop in stops if stop in whole]

    stream, pieces = run(ids, tuple(stops))

    # the match that is complete first ends the text, at the earliest place any stop then begins
    ends = [whole.find(stop) + len(stop) for stop in stops if stop in whole]
    seen = whole[: min(ends)] if ends else whole
    expected = seen[: min(seen.find(s) for s in stops if s in seen)] if ends else whole
    assert stream.text == expected == "".join(pieces)
    assert stream.stopped == bool(cuts)


def test_nothing_of_a_stop_string_is_shown_before_it_is_ruled_out():
    _, pieces = run([0, 1, 1, 2], ("ab|",))

    assert pieces == ["", "", "abb", "|"]


def test_characters_of_several_tokens_come_whole():
    ids = gpt2().encode("a🙂b")
    _, pieces = run(ids, (), gpt2())

    assert "".join(pieces) == "a🙂b"
    assert not any("�" in piece for piece in pieces)


def test_a_character_that_never_ends_is_shown_as_replacement_at_the_end():
    ids = gpt2().encode("🙂")[:-1]
    stream, _ = run(ids, (), gpt2())

    assert stream.text == "�"


@pytest.mark.parametrize("stop", ["", ["a", ""], [3], b"a", 3, "\ud800"])
def test_stops_that_cannot_match_are_refused(stop):
    with pytest.raises(UsageError):
        stop_strings(stop)


@pytest.mark.parametrize("stop", ["a" * 99_999 + "|", "ab" * 50_000, ["a" * n + "|" for n in range(1, 900)]])
def test_long_and_many_stop_strings_cost_little_a_token(stop):
    stream, _ = run([0, 1] * 1000 + [0] * 1000, stop_strings(stop))  # took minutes when each token looked at all of it

    assert stream.text == "ab" * 1000 + "a" * 1000


def test_more_stop_strings_than_anyone_needs_are_refused():
    with pytest.raises(UsageError, match="more than 1000"):
        stop_strings(f"{n}" for n in itertools.count())


def test_a_token_with_several_stops_ends_at_the_earliest():
    stream, pieces = run([0], ("cd", "bcde", "e"), characters_of("abcdef"))

    assert (stream.text, pieces) == ("a", ["a"])


class characters_of:
    """One token that is several characters."""

    n_vocab, start_token = 1, None

    def __init__(self, text):
        self.text = text

    def token_bytes(self, token):
        return self.text.encode()
