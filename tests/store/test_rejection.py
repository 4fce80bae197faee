"""An entry that failed its check where it was loaded is never a hit again, and is built anew."""

from __future__ import annotations

import hashlib
import os

import pytest
from store_kit import as_nobody, files, healed, look, make, manifest_path, raise_, save, word

from nanogpt_buckets.errors import CorruptEntry, IncompatibleEntry
from nanogpt_buckets.store.entry import Status
from nanogpt_buckets.store.manifest import encode, encode_mark, why_rejected
from nanogpt_buckets.store.prune import delete, plan_prune, plan_removal
from nanogpt_buckets.store.store import Store
from nanogpt_buckets.store.verify import verify

NAME = hashlib.sha256(encode(make("one")[0])).hexdigest()
# Bytes that a released version has written. They must be readable for as long as format 1 is.
GOLDEN = b'{"format":1,"manifest":"' + NAME.encode() + b'","why":"logits differ"}\n'
NEWER = [b'{"format":2}', GOLDEN.replace(b'"why"', b'"who":[1],"why"')]


@pytest.fixture
def entry(store):
    manifest, blobs = make("one")
    store.publish(manifest, blobs)
    return manifest


def test_what_is_rejected_is_no_hit_for_anybody_until_it_is_built_anew(store, entry):
    store.reject(entry, "logits differ")

    for other in (store, Store(store.root)):
        answer = look(other, entry)
        assert (answer.status, answer.why, answer.manifest) == (Status.CORRUPT, "rejected: logits differ", entry)
        with pytest.raises(CorruptEntry, match="rejected: logits differ"):
            raise_(other, answer)
    assert [problem.what for problem in verify(store).problems] == ["rejected: logits differ"]
    assert store.mark_path(entry).read_bytes() == GOLDEN
    healed(Store(store.root), *make("two"))
    assert not store.mark_path(entry).exists()
    assert word(look(store, entry)) == "verified"


def test_even_the_same_bytes_are_judged_anew_once_they_are_built_again(store, entry):
    store.reject(entry, "logits differ")
    healed(store, *make("one"))


def test_a_mark_of_an_entry_that_was_replaced_says_nothing(store, entry):
    """A release that knows no marks deletes and builds, and leaves the mark."""
    store.reject(entry, "logits differ")
    manifest_path(store, entry).unlink()
    Store(store.root).publish(*make("two"))
    store.mark_path(entry).write_bytes(GOLDEN)

    assert word(look(store, entry)) == "verified"


READ_ONLY = """
store = Store(Path(sys.argv[1]))
manifest, blobs = make("one")
store.reject(manifest, "logits differ")
for one in (store, Store(store.root)):
    print(getattr(one.look(manifest.family, manifest.key), "why", ""))
"""


def test_where_the_store_cannot_be_written_the_process_remembers(open_path):
    store = Store(open_path / "cache")
    store.root.mkdir()
    store.root.chmod(0o755)
    store.publish(*make("one"))
    before = files(store)

    assert as_nobody(READ_ONLY, store.root) == "rejected: logits differ\n\n"
    assert files(store) == before


@pytest.mark.parametrize("why", ["\x1b[2Jred\nlines", "x" * 100_000, "\ud800", ""])
def test_any_reason_can_be_kept_and_none_reaches_a_terminal_raw(store, entry, why):
    store.reject(entry, why)

    said = look(Store(store.root), entry).why
    assert said.startswith("rejected: ")
    assert said.isprintable()
    assert len(said) < 600


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b'{"format":true,"manifest":"a","why":"b"}', GOLDEN[:-9], b"\xff"])
def test_a_damaged_mark_is_damage_and_is_healed(store, entry, data):
    store.mark_path(entry).write_bytes(data)

    assert look(store, entry).status is Status.CORRUPT
    assert len(verify(store).problems) == 1
    healed(store, *make("one"))


@pytest.mark.parametrize("data", NEWER)
def test_a_newer_releases_mark_is_left_alone_with_its_entry(store, entry, data):
    path = store.mark_path(entry)
    path.write_bytes(data)
    for file in (path, manifest_path(store, entry)):
        os.utime(file, (1, 1))
    before = files(store)

    assert look(store, entry).status is Status.INCOMPATIBLE
    with pytest.raises(IncompatibleEntry, match="the mark that it was rejected is a newer release's"):
        store.publish(*make("two"))
    assert verify(store).problems == ()
    delete(store, plan_prune(store, older_than_s=0, max_bytes=0, planned=True))
    assert files(store) == before


def test_marks_are_written_and_read_as_format_1_is():
    assert encode_mark(NAME, "logits differ") == GOLDEN
    assert why_rejected(GOLDEN, NAME) == "logits differ"
    assert why_rejected(GOLDEN, "0" * 64) is None


def test_prune_takes_what_was_rejected_with_its_mark_even_if_it_is_planned(store, entry):
    save(store)
    store.reject(entry, "logits differ")

    deletion = plan_prune(store)
    assert [(file.what, file.why) for file in deletion.files][:2] == [
        ("entry", "damaged: rejected: logits differ"),
        ("leftover", "of a deleted entry"),
    ]
    delete(store, deletion)
    assert [path for path in (store.root / "v1/entries").rglob("*") if path.is_file()] == []


def test_removal_takes_the_mark(store, entry):
    store.reject(entry, "x")
    delete(store, plan_removal(store, [entry.key]))
    assert not store.mark_path(entry).exists()
