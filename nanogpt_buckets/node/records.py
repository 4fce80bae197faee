"""Records: small JSON files of this node, each kind with a format number of its own, each with its own digest.

Read with bounds, whatever the bytes are, and believed as a whole or not at all; written aside and moved to their name.
A record of a newer format is somebody else's and stays as it is. Knows nothing of what a record says.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock

from nanogpt_buckets import node
from nanogpt_buckets.errors import BucketsError, CorruptEntry, IncompatibleEntry
from nanogpt_buckets.files import read_file, unlink
from nanogpt_buckets.owners import others

log = logging.getLogger(__name__)

_MAX_BYTES = 1 << 20
_PATIENCE_S = 2.0
Record = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """One kind of record; every method but `keep` raises a CacheError where its folder cannot be believed.

    `format` is what this release writes, and all that it reads; raise it with any change of what is in a record.
    """

    folder: str
    format: int

    def read(self, name: str) -> Record:
        """Return a record.

        Raises:
            FileNotFoundError: there is none.
            IncompatibleEntry: a newer release wrote it.
            CorruptEntry: it is not what was written, not a plain file of this user's, or cannot be read.
        """
        return self._parsed(node.folder(self.folder) / f"{name}.json")

    def find(self, name: str) -> Record | None:
        """Return a record, or None where there is none that this release can use."""
        return self._looked(node.folder(self.folder) / f"{name}.json")[0]

    def write(self, name: str, record: Mapping[str, Any]) -> None:
        """Put a record in the place of what is there, unless that is of a newer format."""
        path = node.folder(self.folder, make=True) / f"{name}.json"
        if not self._looked(path)[1]:
            node.put(path, json.dumps(self._document(record)).encode("ascii"), 0o600)

    def keep(self, name: str, record: Mapping[str, Any]) -> None:
        """Write a record if that is possible; never fails."""
        try:
            self.write(name, record)
        except BucketsError as error:
            log.info("%s %s was not kept: %s", self.folder, name, error)

    def drop(self, name: str) -> None:
        """Delete a record, unless it is of a newer format."""
        path = node.folder(self.folder) / f"{name}.json"
        if not self._looked(path)[1]:
            unlink(path)

    def each(self) -> Iterator[tuple[Path, Record | None, bool]]:
        """Yield every file of this kind with its record, None where that cannot be used, and whether it is newer."""
        for path in node.listed(self.folder, "*.json"):
            yield (path, *self._looked(path))

    def _looked(self, path: Path) -> tuple[Record | None, bool]:
        try:
            return self._parsed(path), False
        except (FileNotFoundError, CorruptEntry):
            return None, False
        except IncompatibleEntry:
            return None, True

    def _parsed(self, path: Path) -> Record:
        try:
            if why := others(path.lstat()):
                raise CorruptEntry(f"it {why}")
            document = json.loads(read_file(path, limit=_MAX_BYTES))
            form, record = document["format"], document.get("record")
            newer = type(form) is int and form > self.format
            if not newer and document != self._document(record):
                raise ValueError
        except FileNotFoundError:
            raise
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, CorruptEntry) as error:
            why = error.message if isinstance(error, CorruptEntry) else "it is not as this release wrote it"
            why = getattr(error, "strerror", None) or why
            raise CorruptEntry(f"{path} cannot be read: {why}", hint="the next one replaces it") from error
        if newer:
            hint = "update nanogpt-buckets, or delete it"
            raise IncompatibleEntry(f"{path} was written by a newer release (format {form})", hint=hint)
        return dict(record)

    def _document(self, record: Mapping[str, Any]) -> Record:
        text = json.dumps(record, sort_keys=True)
        return {"format": self.format, "sha256": hashlib.sha256(text.encode("ascii")).hexdigest(), "record": record}


@contextlib.contextmanager
def alone(folder: str, name: str) -> Iterator[None]:
    """Keep other runs that end just now from what is being added up, if locks work here; they only count."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, BucketsError, NotImplementedError):  # filelock's, where there is no flock
            path = node.folder(folder, make=True) / name
            stack.enter_context(filelock.FileLock(path, timeout=_PATIENCE_S, mode=0o600))
        yield


COSTS = Kind("costs", 1)
FAILURES = Kind("failures", 1)
LAST_RUN = Kind("", 5)
MARKS = Kind("canary", 1)
MARK_HEAD = 32  # how much of the weights' digest a mark's name begins with
REVOKED = Kind("revoked", 1)
SOURCES = Kind("sources", 2)
TRAFFIC = Kind("traffic", 1)
VERIFIED = Kind("verified", 1)
