"""A tar file of entries, for sites that nothing but files reaches: written whole, and a tier to read from.

Its members are the files of a cache directory, under their names there, and nothing else; none is ever extracted to
where its name says. Knows nothing of what the bytes mean.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterable
from pathlib import Path

from nanogpt_buckets.errors import CacheError, CorruptEntry, TransientError
from nanogpt_buckets.files import replacing
from nanogpt_buckets.owners import doubted
from nanogpt_buckets.store.entries import blob_name, entry_name, signature_name
from nanogpt_buckets.store.entry import Verified
from nanogpt_buckets.store.manifest import encode_entry
from nanogpt_buckets.store.tier import Gathered

_MEMBER = re.compile(
    r"v1/(entries/[0-9a-f]{64}/[0-9a-f]{64}(\.json|\.[0-9a-f]{16}\.sig)|blobs/[0-9a-f]{2}/[0-9a-f]{64})"
)
_WHENCE = "take it again from where it was written: nanogpt-buckets cache push FILE.tar"
_LOCK = "name the lock file that build --lock wrote, --locked FILE, or a key that signed it, --trusted KEY"


class Archive:
    """The bytes in a tar file, by name; it cannot be written.

    Raises:
        CacheError: it cannot be read; a CorruptEntry if it holds anything that is no part of a cache.
    """

    remembers_s = 0.0

    def __init__(self, path: Path) -> None:
        self.path = path
        self._doubt = doubted(path, _LOCK)
        try:
            if not path.is_file():
                raise CacheError(f"{path} is no file", hint=_WHENCE)
            with tarfile.open(path, "r:") as tar:
                self._members = {member.name: member for member in tar}
        except (OSError, tarfile.TarError, EOFError, ValueError, UnicodeError) as error:
            why = getattr(error, "strerror", None) or "it is no tar file of ours, or cut off"
            raise CorruptEntry(f"{path} cannot be read: {why}", hint=_WHENCE) from error
        for name, member in self._members.items():
            # a sparse member may claim any size, whatever the size of the file
            if not (member.isreg() and not member.issparse() and _MEMBER.fullmatch(name)):
                raise CorruptEntry(f"{path} holds {name[:120]!r}, which is no part of a cache", hint=_WHENCE)

    def __str__(self) -> str:
        return str(self.path)

    def get(self, name: str, *, size: int | None = None, limit: int | None = None, anyone: bool = False) -> bytes:
        """Read a member; see `Tier`."""
        if self._doubt is not None and not anyone:
            raise self._doubt
        member = self._members.get(f"v1/{name}")
        if member is None:
            raise FileNotFoundError(name)
        if size not in (None, member.size) or (limit is not None and member.size > limit):
            raise CorruptEntry(f"{name.rpartition('/')[2]} has {member.size} bytes")
        try:
            with self.path.open("rb") as file:
                file.seek(member.offset_data)
                return file.read(member.size)
        except OSError as error:
            raise TransientError(f"{self.path} cannot be read: {error.strerror or error}") from error

    def size(self, name: str) -> int | None:
        """Return the size of a member; see `Tier`."""
        member = self._members.get(f"v1/{name}")
        return None if member is None else member.size

    def names(self, folder: str) -> list[str]:
        """List a folder; see `Tier`."""
        start = f"v1/{folder}/"
        return sorted({name[len(start) :].split("/")[0] for name in self._members if name.startswith(start)})

    def gather(self, folder: str, *, limit: int, listed: bool = True) -> Gathered:
        """List a folder: the table of all members was read; see `Tier`."""
        return Gathered(names=self.names(folder))

    def put(self, name: str, data: bytes, *, replace: bool = False) -> bool:
        """Refuse: see `pack`."""
        raise CacheError(f"{self.path} cannot be written: it is a tar file")

    def delete(self, name: str) -> None:
        """Refuse."""
        raise CacheError(f"{self.path} cannot be written: it is a tar file")

    def touch(self, name: str, every_s: float = 0.0) -> None:
        """Do nothing."""


def pack(path: Path, entries: Iterable[Verified]) -> None:
    """Write a tar file of entries in one step, the same bytes for the same entries.

    Raises:
        CacheError: it cannot be written; nothing is left of it then.
    """
    try:
        with replacing(path) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            written: set[str] = set()
            for entry in entries:
                manifest = entry.manifest
                files = {blob_name(blob.sha256): entry.blobs[blob.role] for blob in manifest.blobs}
                files[entry_name(manifest.family, manifest.key)] = encode_entry(manifest, entry.blobs)
                if entry.signature is not None:
                    files[signature_name(manifest.family, manifest.key, manifest.digest)] = entry.signature
                for name in sorted(files.keys() - written):
                    _add(tar, f"v1/{name}", files[name])
                written |= files.keys()
    except OSError as error:
        raise CacheError(f"{path} cannot be written: {error.strerror or error}", hint="name another file") from error


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(data), 0o444
    tar.addfile(member, io.BytesIO(data))
