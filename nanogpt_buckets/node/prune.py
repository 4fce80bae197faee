"""What in this node's directory is of no use; whoever asks shows it, and only then deletes it.

Records of a newer release stay, and with its notes all weights, for it may need them. Knows nothing of terminals.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from nanogpt_buckets import node
from nanogpt_buckets.files import Doomed, doom
from nanogpt_buckets.node import crumbs, failures, sources
from nanogpt_buckets.node.records import COSTS, FAILURES, MARK_HEAD, MARKS, SOURCES, TRAFFIC, VERIFIED

LIBRARIES = "libraries"


def plan() -> tuple[Doomed, ...]:
    """Return what is of no use: weights that no model's source needs, stale records, and what killed processes left."""
    kinds = {".safetensors": "weights"}
    rows = (doom(path, kinds.get(path.suffix, "leftover"), path.name, why) for path, why in _useless())
    return tuple(row for row in rows if row is not None)


def _useless() -> Iterator[tuple[Path, str]]:
    for path, record, newer in SOURCES.each():
        if not newer and not sources.holds(record):
            yield path, "the model it is about is gone or has changed"
    weights = set(node.listed(sources.WEIGHTS, "*.safetensors"))
    needed = sources.needed()
    gone = {path for path in weights if needed is not None and path.stem not in needed}
    for path in sorted(gone):
        yield path, "no model's source needs them"
    left = {path.stem for path in weights - gone}
    for kind, known, length in (VERIFIED, left, None), (MARKS, {stem[:MARK_HEAD] for stem in left}, MARK_HEAD):
        for path, _, newer in kind.each():
            if not newer and path.stem[:length] not in known:
                yield path, "its weights are gone"
    for path, record, newer in FAILURES.each():
        if not newer and failures.expired(record):
            yield path, "a failure of long ago"
    for path in filter(crumbs.expired, node.listed(crumbs.FOLDER, "*.json")):
        yield path, "a load of long ago"
    for name in (
        "",
        *(kind.folder for kind in (SOURCES, VERIFIED, MARKS, FAILURES, TRAFFIC, COSTS)),
        sources.WEIGHTS,
        LIBRARIES,
    ):
        for path in filter(node.is_stale, node.listed(name, "tmp-*") + node.listed(name, "*.so")):
            yield path, "left by a process that ended"
