"""What network file systems say for a moment of what others have just done; `scripts/check-shared-mount` is real."""

from __future__ import annotations

import errno
import os

import pytest
from store_kit import blob_path, look, make, manifest_path, spoil, word

from nanogpt_buckets import files
from nanogpt_buckets.errors import TransientError
from nanogpt_buckets.store import directory
from nanogpt_buckets.store.directory import Directory
from nanogpt_buckets.store.entry import Verified
from nanogpt_buckets.store.store import Store


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    for module in (files, directory):
        monkeypatch.setattr(module, "STALE_PAUSES_S", (0.0, 0.01))


@pytest.fixture
def remembering(monkeypatch, store) -> Store:
    """A store on a file system whose client remembers what names had."""
    monkeypatch.setattr(Directory, "remembers_s", 0.01)
    return store


def failing(monkeypatch, function: str, code: int, times: int) -> None:
    real, left = getattr(os, function), [times]

    def call(*arguments, **options):
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(code, os.strerror(code))
        return real(*arguments, **options)

    monkeypatch.setattr(os, function, call)


@pytest.mark.parametrize("code", [errno.ENOENT, errno.ESTALE])
@pytest.mark.parametrize("function", ["mkdir", "link"])
def test_a_directory_that_another_machine_has_just_made_is_found_in_the_end(store, monkeypatch, function, code):
    manifest, blobs = make("one")
    failing(monkeypatch, function, code, times=2)
    store.publish(manifest, blobs)
    assert isinstance(look(store, manifest), Verified)

    failing(monkeypatch, "link", code, times=3)
    with pytest.raises(TransientError):
        store.publish(*make("two", name="b"))


@pytest.mark.parametrize("what", ["manifest", "library"])
def test_damage_that_is_gone_when_looked_at_again_was_none(remembering, entry, monkeypatch, what):
    """A client may give the size of a file that another machine has just replaced."""
    path = manifest_path(remembering, entry) if what == "manifest" else blob_path(remembering, entry.blobs[0])
    whole = path.read_bytes()
    spoil(path, whole[:-1])
    really = directory.time.sleep
    monkeypatch.setattr("nanogpt_buckets.store.entries.time.sleep", lambda s: (spoil(path, whole), really(s)))

    assert isinstance(look(remembering, entry), Verified)


def test_damage_that_stays_is_damage(remembering, entry):
    spoil(blob_path(remembering, entry.blobs[0]), b"x")

    assert word(look(remembering, entry)) == "corrupt"
    manifest, blobs = make("one")
    remembering.publish(manifest, blobs)
    assert isinstance(look(remembering, entry), Verified)


def test_a_name_that_cannot_be_linked_since_it_is_taken_is_not_replaced(store, entry, monkeypatch):
    """An SFTP server answers EPERM, and its client may not show the name yet."""
    really, other = os.link, make("two")

    def link(source, target):
        if os.path.dirname(os.fspath(target)).endswith("/tmp"):
            return really(source, target)
        if os.path.exists(target):
            raise PermissionError(errno.EPERM, "Operation not permitted")
        return really(source, target)

    monkeypatch.setattr(os, "link", link)
    monkeypatch.setattr(os.path, "lexists", lambda path: False)

    assert not store.directory.put(f"entries/{entry.family}/{entry.key}.json", b"other")
    assert store.publish(*other) == entry


def test_an_entry_that_another_stored_and_nobody_can_see_is_transient(store, monkeypatch):
    monkeypatch.setattr(Directory, "put", lambda self, name, data, **how: not name.startswith("entries/"))

    with pytest.raises(TransientError, match="was stored by another process, and cannot be seen yet"):
        store.publish(*make("one"))
