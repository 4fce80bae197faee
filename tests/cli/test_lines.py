"""Files of one text a line: what is read of them, and what is refused by its line."""

from __future__ import annotations

import pytest

from nanogpt_buckets.cli.lines import Record, read_records
from nanogpt_buckets.errors import UsageError


@pytest.fixture
def read(tmp_path):
    def read(content: str | bytes, name: str = "texts", settings=("seed",)):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_records(str(path), ("text", "prompt"), settings)

    return read


def test_a_plain_file_is_one_text_a_line_and_blank_lines_are_none(read):
    found = read("\ufeffone\r\n\n \t\n  two \rthree\u2028still three\n")
    assert found == [Record(1, "one"), Record(4, "  two "), Record(5, "three\u2028still three")]


@pytest.mark.parametrize("name", ["texts", "texts.jsonl", "TEXTS.JSONL"])
def test_objects_have_a_text_and_settings(read, name):
    found = read('\n{"text": "a\\nb"}\n\n{"prompt": "", "seed": 3}', name)
    assert found == [Record(2, "a\nb"), Record(4, "", {"seed": 3})]


def test_text_with_an_object_further_down_is_text(read):
    assert read('a\n{"text": "b"}') == [Record(1, "a"), Record(2, '{"text": "b"}')]


def test_other_fields_are_let_be_where_there_are_no_settings(read):
    assert read('{"text": "a", "id": 7}', settings=None) == [Record(1, "a")]


def test_half_a_character_becomes_a_replacement(read):
    assert read('{"text": "\\ud83d"}')[0].text == "\ufffd"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "it is not JSON"),
        ('{"text": "a"', "it is not JSON"),
        ('{"text": "a"} {"text": "b"}', "it is not JSON: Extra data"),
        ('{"text": "a",}', "it is not JSON"),
        ('["a"]', "is not a JSON object"),
        ('"a"', "is not a JSON object"),
        ("{}", "it has no 'text' or 'prompt'"),
        ('{"txet": "a"}', "it has no 'text' or 'prompt'"),
        ('{"text": "a", "prompt": "b"}', "both 'text' and 'prompt'"),
        ('{"text": ["a"]}', "not a string"),
        ('{"text": null}', "not a string"),
        ('{"text": "a", "text": "b"}', "twice"),
        ('{"text": "a", "seeed": 1}', "'seeed', which is no setting"),
        ('{"text": "a", "seed": NaN}', "NaN is no number"),
        ('{"text": "a", "seed": %s}' % ("9" * 5000), "cannot be used"),
        ('{"text": %s' % ("[" * 100_000), "cannot be used"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("first", ['{"text": "good"}', ""])
def test_what_is_no_such_object_is_named_by_its_line(read, first, line, said):
    with pytest.raises(UsageError, match="line 3: ") as caught:
        read(f"{first}\n\n{line}\n", "texts.jsonl")
    assert said in caught.value.message


def test_a_file_of_objects_is_known_by_its_first_line(read):
    with pytest.raises(UsageError, match=r"line 2: .*not JSON"):
        read('{"text": "a"}\nb')


@pytest.mark.parametrize("content", ["", "\n \n", "\ufeff"])
def test_nothing_at_all_is_said(read, content):
    with pytest.raises(UsageError, match="is empty"):
        read(content)


def test_what_cannot_be_read_is_said(read, tmp_path):
    with pytest.raises(UsageError, match="not UTF-8"):
        read(b"\xff\xfe")
    for missing in (tmp_path, tmp_path / "none", "", "a\0b"):
        with pytest.raises(UsageError, match="cannot be read"):
            read_records(str(missing), ("text",))
