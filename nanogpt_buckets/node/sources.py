"""Which prepared weights some model's source still is, by the size, times and inode of the files that were read.

Knows nothing of formats or architectures.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanogpt_buckets import node
from nanogpt_buckets.files import unlink
from nanogpt_buckets.node.records import SOURCES, VERIFIED, Record

WEIGHTS = "weights"


def stamp(found: os.stat_result) -> list[int]:
    """Return what changes whenever a file's content does: size, times and inode."""
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def stamps(files: Sequence[Path]) -> list[list[Any]]:
    """Return the name and stamp of each file; an absent one is listed too, for it might come into being."""
    found: list[list[Any]] = [[file.name] for file in files]
    for file, row in zip(files, found, strict=True):
        with contextlib.suppress(OSError):
            row += stamp(file.stat())
    return found


def holds(note: Record | None) -> bool:
    """Whether the source that a note is about is what it was."""
    if note is None:
        return False
    source = Path(note["source"])
    folder = source if source.is_dir() else source.parent
    return bool(note["files"] == stamps([folder / name for name, *_ in note["files"]]))


def remember(name: str, note: Record) -> None:
    """Write a note, and delete weights that its source was before and no source is any more."""
    before = {old["digest"] for _, old, _ in SOURCES.each() if old is not None and old["source"] == note["source"]}
    SOURCES.write(name, note)
    still = needed()
    for digest in set() if still is None else before - still:
        unlink(weights_path(digest))  # a file that is mapped somewhere lives on until it is not
        VERIFIED.drop(digest)


def needed() -> set[str] | None:
    """Return the digests of weights that some source still is; None if a newer release's notes may name any."""
    each = list(SOURCES.each())
    newer = any(newer for *_, newer in each)
    return None if newer else {note["digest"] for _, note, _ in each if note is not None and holds(note)}


def weights_path(digest: str) -> Path:
    """Return the prepared file of a digest; a CacheError if others could have written it."""
    return node.folder(WEIGHTS) / f"{digest}.safetensors"
