"""The store's directories: made when needed, with the root's permissions; new bytes get their name in one step.

Knows nothing of manifests, blobs or plans.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path

from nanogpt_buckets.errors import CacheError, TransientError
from nanogpt_buckets.files import move_to_absent, sync_directory, unlink, write_new
from nanogpt_buckets.store.answer import HINT

_SIGNATURE = b"Signature: 8a477f597d28d172789f06886806bc55\n# This directory holds what nanogpt-buckets compiled.\n"
# Trying again will not help; anything else may pass.
_LASTING = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR})


class Tree:
    """The directories of one store.

    Args:
        root: the cache directory; made, private, when something is first written.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.v1 = root / "v1"

    def put(self, path: Path, data: bytes, mode: int, *, replace: bool) -> bool:
        """Give new bytes a name in one step; return False, and change nothing, if the name is taken."""
        staged = self.v1 / "tmp" / uuid.uuid4().hex
        try:
            write_new(staged, data, mode & self.mode())
            if replace:
                os.replace(staged, path)
            else:
                move_to_absent(staged, path)
        except FileExistsError:
            return False
        finally:
            unlink(staged)
        sync_directory(path.parent)
        return True

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Turn an OSError inside into a CacheError about this store."""
        try:
            yield
        except OSError as error:
            kind = CacheError if error.errno in _LASTING else TransientError
            raise kind(f"{self.root} cannot be written: {error.strerror or error}", hint=HINT) from error

    def prepare(self, *further: Path) -> None:
        """Make the directories, those given included, and the tag that keeps backups away."""
        if not self.root.is_dir():
            for place in reversed(self.root.parents):
                if not place.is_dir():
                    place.mkdir(0o755, exist_ok=True)  # whatever the umask: nobody else may replace what is below
            with contextlib.suppress(FileExistsError):
                self.root.mkdir(0o700)
        names = ("entries", "blobs", "plans", "locks", "tmp")
        for directory in (self.v1, *(self.v1 / name for name in names), *further):
            self.make_directory(directory)
        tag = self.root / "CACHEDIR.TAG"
        if not tag.exists():
            self.put(tag, _SIGNATURE, 0o666, replace=False)

    def make_directory(self, directory: Path) -> None:
        """Make a directory, unless it exists, and give it the root's mode."""
        with contextlib.suppress(FileExistsError):
            directory.mkdir(0o700)
            sync_directory(directory.parent)
        # asked again of one that exists: whoever made it may have been killed before this line
        if stat.S_IMODE(directory.stat().st_mode) != self.mode():
            with contextlib.suppress(OSError):
                directory.chmod(self.mode())

    def mode(self) -> int:
        """Return the root's permissions, which all below it follow."""
        return stat.S_IMODE(self.root.stat().st_mode)
