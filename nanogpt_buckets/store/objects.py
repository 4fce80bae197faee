"""The tier in an object store, S3, Google's or Azure's, through obstore: credentials are what their own tools use.

Others may always have written there, so what is read needs a lock file. Knows nothing of what the bytes mean.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib
import os
import re
from collections.abc import Iterator
from typing import Any

from nanogpt_buckets.errors import CacheError, CorruptEntry, TransientError, UntrustedStore, UsageError

_SCHEMES = ("s3", "gs", "az")
_EXAMPLES = "for example s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or az://ACCOUNT/CONTAINER/PREFIX"
_EXTRA = "pip install 'nanogpt-buckets[remote]'"
_LOCK = "name the lock file that build --lock wrote: --locked FILE"
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
        url: s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or az://ACCOUNT/CONTAINER/PREFIX.

    Raises:
        UsageError: the URL is of another kind, or the package that reads it is not installed.
    """

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
            raise UsageError(f"{url} is no place that can be used", hint=_EXAMPLES) from error

    def __str__(self) -> str:
        return self.url

    def get(self, name: str, *, size: int | None = None, limit: int | None = None, anyone: bool = False) -> bytes:
        """Read an object; see `Tier`."""
        if not anyone:
            raise UntrustedStore(
                f"{self.url} may be written by others, who could have put native code there", hint=_LOCK
            )
        with self._reading():
            found = self._obstore.get(self._store, _path(name))
            there = found.meta["size"]
            if size is not None and there != size:
                raise CorruptEntry(f"{name.rpartition('/')[2]} has {there} bytes, not {size}")
            if limit is not None and there > limit:
                raise CorruptEntry(f"{name.rpartition('/')[2]} is longer than {limit} bytes")
            return bytes(found.bytes())

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

    def put(self, name: str, data: bytes, *, replace: bool = False) -> bool:
        """Write an object, on the condition that there is none; see `Tier`."""
        mode = "overwrite" if replace else "create"
        try:
            with self._reading():
                self._obstore.put(self._store, _path(name), data, mode=mode, use_multipart=False)
        except FileExistsError:
            return False
        except FileNotFoundError as error:
            raise TransientError(f"{self.url} cannot be written: {_first_line(error)}") from error
        return True

    def delete(self, name: str) -> None:
        """Delete an object; see `Tier`."""
        with contextlib.suppress(FileNotFoundError), self._reading():
            self._obstore.delete(self._store, _path(name))

    def touch(self, name: str, every_s: float = 0.0) -> None:
        """Do nothing: an object's age is when it was written."""

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """Turn what obstore raises into a CacheError about this place; a missing object is a FileNotFoundError."""
        exceptions = self._obstore.exceptions
        try:
            yield
        except exceptions.AlreadyExistsError as error:
            raise FileExistsError(str(error)) from error
        except (FileNotFoundError, exceptions.BaseError) as error:
            text = str(error)
            for pattern, meaning in _MEANINGS:
                if re.search(pattern, text):
                    raise CacheError(f"{self.url} cannot be used: {meaning}", hint=_hint(meaning)) from error
            if isinstance(error, FileNotFoundError):
                raise
            raise TransientError(f"{self.url} cannot be used this time: {_first_line(error)}") from error


def _path(name: str) -> str:
    return f"v1/{name}"


def _hint(meaning: str) -> str:
    if "bucket" in meaning:
        return "make it first, or give another URL"
    return "set the clock" if "clock" in meaning else "give this process those of the service's own tools"


def _first_line(error: Exception) -> str:
    """Return the reason alone, without what obstore adds for its developers."""
    line = str(error).splitlines()[0] if str(error) else type(error).__name__
    return line.split(" - ", 1)[-1][:200]
