"""The tier in an object store, S3, Google's or Azure's, through obstore: credentials are what their own tools use.

Others may always have written there, so what is read needs a lock file. Knows nothing of what the bytes mean.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import importlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from nanogpt_buckets.errors import (
    CacheError,
    CorruptEntry,
    IncompatibleEntry,
    TransientError,
    UntrustedStore,
    UsageError,
)
from nanogpt_buckets.store.document import MAX_BYTES, check, parse, require_format
from nanogpt_buckets.store.tier import Gathered

_SCHEMES = ("s3", "gs", "az")
_EXAMPLES = "for example s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or az://CONTAINER/PREFIX"
_EXTRA = "pip install 'nanogpt-buckets[remote]'"
_LOCK = "name the lock file that build --lock wrote, --locked FILE, or a key that signed it, --trusted KEY"
_FORMAT = 1
_MAX_INDEX = 16 << 20
_ATTEMPTS = 8
_CREDENTIALS = "give this process those of the service's own tools"
_ACCOUNT = "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY; the URL begins with the container"
_SECOND = datetime.timedelta(seconds=1)
# Three attempts in about five seconds: what takes longer is not there.
_RETRIES = {
    "max_retries": 2, "retry_timeout": 10 * _SECOND,
    "backoff": {"init_backoff": _SECOND / 5, "max_backoff": 2 * _SECOND, "base": 2},
}  # fmt: skip
_CLIENT = {"connect_timeout": 5 * _SECOND, "timeout": 60 * _SECOND}
# What services say, and what it means.
_MEANINGS = (
    ("<Code>(NoSuchBucket|ContainerNotFound)</Code>|The specified bucket does not exist", "there is no such bucket"),
    ("<Code>RequestTimeTooSkewed</Code>", "this machine's clock is wrong"),
    ("performing [A-Z]+ http://(169[.]254[.]|metadata[.]google)", "no credentials were found"),
    ("status code: 40[13] ", "the credentials are refused"),
)


class Objects:
    """Bytes by name below a URL.

    Args:
        url: s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or az://CONTAINER/PREFIX.

    Raises:
        UsageError: the URL is of another kind, or the package that reads it is not installed.
        CacheError: what the environment says of the service, an account or a key, is missing or malformed.
    """

    remembers_s = 0.0

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        if url.partition("://")[0] not in _SCHEMES:
            raise UsageError(f"{url} is no place that can be used", hint=_EXAMPLES)
        try:
            self._obstore: Any = importlib.import_module("obstore.store").obs
        except ImportError as error:
            raise UsageError(f"{url} cannot be reached: obstore is not installed", hint=_EXTRA) from error
        plain = any(v.startswith("http://") for name, v in os.environ.items() if "ENDPOINT" in name)
        try:
            self._store: Any = self._obstore.store.from_url(
                self.url, retry_config=_RETRIES, client_options={**_CLIENT, "allow_http": plain}
            )
        except (self._obstore.exceptions.BaseError, ValueError) as error:
            why = _first_line(error).removeprefix("Generic MicrosoftAzure error: ")
            if "URL" in why or not isinstance(error, self._obstore.exceptions.BaseError):
                raise UsageError(f"{url} is no place that can be used", hint=_EXAMPLES) from error
            hint = _ACCOUNT if why.startswith("Account") else _CREDENTIALS
            raise CacheError(f"{url} cannot be used: {why}", hint=hint) from error

        self._doubt = UntrustedStore(
            f"{self.url} may be written by others, who could have put native code there", hint=_LOCK
        )

    def __str__(self) -> str:
        return self.url

    def get(self, name: str, *, size: int | None = None, limit: int | None = None, anyone: bool = False) -> bytes:
        """Read an object; see `Tier`."""
        if not anyone:
            raise self._doubt
        return self._get(name, size=size, limit=limit)[0]

    def size(self, name: str) -> int | None:
        """Return the size of an object; see `Tier`."""
        with contextlib.suppress(OSError, CacheError), self._reading():
            return int(self._obstore.head(self._store, _path(name))["size"])
        return None

    def names(self, folder: str) -> list[str]:
        """List what begins so; see `Tier`."""
        with self._reading():
            found = self._obstore.list_with_delimiter(self._store, _path(folder))
        paths = [*(each["path"] for each in found["objects"]), *found["common_prefixes"]]
        return sorted(path.rstrip("/").rpartition("/")[2] for path in paths)

    def gather(self, folder: str, *, limit: int, listed: bool = True) -> Gathered:
        """Read the index of a folder, which has all its files in one object, if there is one; see `Tier`."""
        try:
            files = self._index(folder)[0]
        except (FileNotFoundError, CorruptEntry, IncompatibleEntry):
            return Gathered(names=self.names(folder) if listed else None)
        return Gathered(files, self._doubt, files.keys())

    def put(self, name: str, data: bytes, *, replace: bool = False) -> bool:
        """Write an object, on the condition that there is none; see `Tier`."""
        done = self._put(name, data, "overwrite" if replace else "create")
        folder, _, last = name.rpartition("/")
        if done and folder.startswith("entries/"):
            self._amend(folder, lambda index: index.update({last: data}))
        return done

    def delete(self, name: str) -> None:
        """Delete an object; see `Tier`."""
        with contextlib.suppress(FileNotFoundError), self._reading():
            self._obstore.delete(self._store, _path(name))
        folder, _, last = name.rpartition("/")
        if folder.startswith("entries/"):
            self._amend(folder, lambda index: index.pop(last, None))

    def touch(self, name: str, every_s: float = 0.0) -> None:
        """Do nothing: an object's age is when it was written."""

    def mend(self, folder: str) -> None:
        """See that the index of a folder names all that is in it: whoever wrote may have been killed before that."""
        with contextlib.suppress(FileNotFoundError, CorruptEntry, IncompatibleEntry):
            if self._index(folder)[0].keys() == set(self.names(folder)):
                return
        self._amend(folder, None)

    def _amend(self, folder: str, change: Callable[[dict[str, bytes]], object] | None) -> None:
        """Change the index of a folder, or make it anew, whoever else does meanwhile.

        Where it would be too large, a newer release's, or others are always first, there is none in the end: then
        whoever reads lists the folder.
        """
        index: dict[str, bytes] | None
        mode: Any
        for _ in range(_ATTEMPTS):
            try:
                index, mode = self._index(folder)
            except FileNotFoundError:
                index, mode = None, "create"
            except CorruptEntry:
                index, mode = None, "overwrite"
            except IncompatibleEntry:
                break
            if index is None or change is None:
                index = self._everything(folder)
            if change is not None:
                change(index)
            data = _encoded(index)
            if len(data) > _MAX_INDEX:
                break
            if self._put(_index_name(folder), data, mode):
                return
        with contextlib.suppress(FileNotFoundError), self._reading():
            self._obstore.delete(self._store, _path(_index_name(folder)))

    def _everything(self, folder: str) -> dict[str, bytes]:
        """Read every file of a folder, one by one."""
        found = {}
        for last in self.names(folder):
            with contextlib.suppress(FileNotFoundError, CorruptEntry):
                found[last] = self._get(f"{folder}/{last}", limit=MAX_BYTES)[0]
        return found

    def _index(self, folder: str) -> tuple[dict[str, bytes], dict[str, str]]:
        """Return what an index says, and what names its version where it is to be replaced."""
        data, meta = self._get(_index_name(folder), limit=_MAX_INDEX)
        version = {name: meta[name] for name in ("e_tag", "version") if meta.get(name) is not None}
        return _decoded(data), version

    def _put(self, name: str, data: bytes, mode: Any) -> bool:
        try:
            with self._reading(conditional=mode != "overwrite"):
                self._obstore.put(self._store, _path(name), data, mode=mode, use_multipart=False)
        except FileExistsError:
            return False
        except FileNotFoundError as error:
            raise TransientError(f"{self.url} cannot be written: {_first_line(error)}") from error
        return True

    def _get(self, name: str, *, size: int | None = None, limit: int | None = None) -> tuple[bytes, dict[str, Any]]:
        with self._reading():
            found = self._obstore.get(self._store, _path(name))
            there = found.meta["size"]
            # else what is whole would be taken for damaged, and be replaced
            if not there and (found.meta["e_tag"] is None or self.size(name) != 0):
                raise TransientError(f"{self.url} cannot be used this time: {name} came without its content")
            if size is not None and there != size:
                raise CorruptEntry(f"{name.rpartition('/')[2]} has {there} bytes, not {size}")
            if limit is not None and there > limit:
                raise CorruptEntry(f"{name.rpartition('/')[2]} is longer than {limit} bytes")
            return bytes(found.bytes()), found.meta

    @contextlib.contextmanager
    def _reading(self, conditional: bool = False) -> Iterator[None]:
        """Turn what obstore raises into a CacheError about this place; a missing object is a FileNotFoundError.

        One that is there already, or another one, is a FileExistsError where that was a condition: a service may say
        409 to anything.
        """
        exceptions = self._obstore.exceptions
        try:
            yield
        except (FileNotFoundError, exceptions.BaseError) as error:
            if conditional and isinstance(error, exceptions.AlreadyExistsError | exceptions.PreconditionError):
                raise FileExistsError(str(error)) from error
            text = str(error)
            for pattern, meaning in _MEANINGS:
                if re.search(pattern, text):
                    raise CacheError(f"{self.url} cannot be used: {meaning}", hint=_hint(meaning)) from error
            if isinstance(error, FileNotFoundError):
                raise
            raise TransientError(f"{self.url} cannot be used this time: {_first_line(error)}") from error


def _path(name: str) -> str:
    return f"v1/{name}"


def _index_name(folder: str) -> str:
    return f"index/{folder.rpartition('/')[2]}.json"


def _encoded(files: Mapping[str, bytes]) -> bytes:
    texts = {name: base64.b64encode(data).decode("ascii") for name, data in files.items()}
    return json.dumps({"files": texts, "format": _FORMAT}, sort_keys=True).encode("ascii")


def _decoded(data: bytes) -> dict[str, bytes]:
    document = parse(data, "the index", _MAX_INDEX)
    require_format(document, _FORMAT, ("files", "format"), "the index")
    check(document["files"], {str: str}, "the index")
    try:
        return {name: base64.b64decode(text, validate=True) for name, text in document["files"].items()}
    except ValueError as error:
        raise CorruptEntry("the index is damaged") from error


def _hint(meaning: str) -> str:
    if "bucket" in meaning:
        return "make it first, or give another URL"
    return "set the clock" if "clock" in meaning else _CREDENTIALS


def _first_line(error: Exception) -> str:
    """Return the reason alone, without what obstore adds for its developers."""
    line = str(error).splitlines()[0] if str(error) else type(error).__name__
    return line.split(" - ", 1)[-1][:200]
