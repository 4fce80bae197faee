"""A path at which verified library bytes can be opened by the loader, and by nobody else's leave changed.

The bytes that were hashed are the bytes that run: they go into a sealed anonymous file, never to a shared directory.
The C library answers a path it has seen with the library it loaded first, so a path must mean one content for ever:
each distinct content keeps its own file until the process ends. Knows nothing of what the library does.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import threading
import uuid

from nanogpt_buckets import settings

_paths: dict[str, str] = {}
_lock = threading.Lock()


def in_memory() -> bool:
    """Whether this system has sealed anonymous files; without, private copies on disk take their place."""
    return hasattr(os, "memfd_create")


def library_path(content: bytes) -> str:
    """Return a path that holds exactly `content` until this process ends.

    Args:
        content: a shared library's verified bytes.
    """
    digest = hashlib.sha256(content).hexdigest()
    with _lock:
        if digest not in _paths:
            make = _sealed_memory if in_memory() else _private_file
            _paths[digest] = make(content, digest)
        return _paths[digest]


def _sealed_memory(content: bytes, digest: str) -> str:
    descriptor = os.memfd_create(digest[:16], os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with open(descriptor, "wb", closefd=False) as file:
        file.write(content)
    seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return f"/proc/self/fd/{descriptor}"


def _private_file(content: bytes, digest: str) -> str:
    directory = settings.local_dir() / "libraries"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = directory / f"{digest}.so"
    temporary = directory / f"{uuid.uuid4().hex}.tmp"
    descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o400)
    with open(descriptor, "wb") as file:
        file.write(content)
    temporary.replace(path)
    return str(path)
