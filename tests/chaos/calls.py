"""Every file-system call of this process in one place, counted, where it can be made to fail or to be the last one.

What Python code calls is replaced in the modules `os`, `fcntl` and `io`, and not caught below, in the C library or the
kernel, so that it needs neither a compiler nor the right to trace. Nothing goes past: descriptors come from `os.open`
alone, so `write`, `fsync` and `close` are those of `os`; files that `io.open` makes count what they write; and `unseen`
proves it with an audit hook, which CPython calls for every path that is opened, made, linked, moved or deleted, whoever
asked. Only what `DirEntry.stat` asks is left out, which changes nothing.

Knows nothing of stores.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from nanogpt_buckets import files

NAMES = (
    "access", "chdir", "chmod", "chown", "close", "fchmod", "fchown", "fdatasync", "fstat", "fstatvfs", "fsync",
    "ftruncate", "lchown", "link", "listdir", "lseek", "lstat", "mkdir", "mkfifo", "mknod", "open", "pread", "pwrite",
    "read", "readlink", "readv", "remove", "rename", "replace", "rmdir", "scandir", "sendfile", "stat", "statvfs",
    "symlink", "truncate", "unlink", "utime", "write", "writev",
)  # fmt: skip
_SETS = ("supports_dir_fd", "supports_fd", "supports_follow_symlinks", "supports_effective_ids")
_EVENTS = ("open", "os.", "fcntl.", "shutil.", "tempfile.")
# Events of what is no call on files.
_OTHER = ("os.putenv", "os.unsetenv", "os.fork", "os.kill", "os.walk")

_inside = 0


@dataclass(frozen=True)
class Call:
    """The `number`-th call, counted from 1, which is about to be made."""

    number: int
    name: str
    real: Callable[..., Any]
    arguments: tuple[Any, ...]


@contextlib.contextmanager
def watched(act: Callable[[Call], None]) -> Iterator[None]:
    """Call `act` before each file-system call that is made inside; what it raises is raised in the call's place."""
    count = 0

    def wrapped(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            global _inside
            nonlocal count
            if _inside:  # a call that `act` makes, or another one
                return real(*arguments, **options)
            count += 1
            _inside += 1
            try:
                act(Call(count, name, real, arguments))
                return real(*arguments, **options)
            finally:
                _inside -= 1

        return call

    class File(io.FileIO):
        """A file of `io.open`, whose calls are counted, too."""

        write = wrapped("write", io.FileIO.write)
        read = wrapped("read", io.FileIO.read)
        readall = wrapped("read", io.FileIO.readall)
        readinto = wrapped("read", io.FileIO.readinto)
        truncate = wrapped("truncate", io.FileIO.truncate)

    really = io.open

    def opened(path: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if "b" not in mode or isinstance(path, int):
            return wrapped("open", really)(path, mode, *arguments, **options)
        raw = wrapped("open", File)(path, mode)
        return io.BufferedWriter(raw) if raw.writable() else io.BufferedReader(raw)

    replaced = [(os, name, getattr(os, name)) for name in NAMES if hasattr(os, name)]
    replaced += [(fcntl, name, getattr(fcntl, name)) for name in ("flock", "lockf", "fcntl")]
    sets = {name: set(getattr(os, name)) for name in _SETS}
    defaults = files.read_file.__kwdefaults__  # where `os.open` is kept under another name
    try:
        for module, name, real in replaced:
            function = wrapped(name, real)
            setattr(module, name, function)
            for kind, members in sets.items():
                if real in members:  # else code that asks would take a detour
                    getattr(os, kind).add(function)
        io.open = opened
        defaults["opener"] = os.open
        yield
    finally:
        io.open = really
        for module, name, real in replaced:
            setattr(module, name, real)
        for kind, members in sets.items():
            getattr(os, kind).clear()
            getattr(os, kind).update(members)
        defaults["opener"] = os.open


def names_of(function: Callable[[], None]) -> list[str]:
    """Return the calls that a function makes, in order."""
    names: list[str] = []
    with watched(lambda call: names.append(call.name)):
        function()
    return names


def unseen(function: Callable[[], None]) -> list[str]:
    """Return what a function does to paths outside the calls that are watched; for a child, since hooks stay."""
    missed: list[str] = []

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        imported = str(arguments[:1]).endswith((".py',)", ".pyc',)"))
        if not _inside and event.startswith(_EVENTS) and event not in _OTHER and not imported:
            missed.append(f"{event} {arguments!r:.80}")

    with watched(lambda call: None):
        sys.addaudithook(hook)
        function()
        return list(missed)
