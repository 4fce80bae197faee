"""A path at which verified library bytes can be opened by the loader, and by nobody else's leave changed.

The bytes that were hashed are the bytes that run: they go into a sealed anonymous file, never to a shared directory;
where the system has or allows none, into a file of this node's own directory.
The C library answers a path it has seen with the library it loaded first, so a path must mean one content for ever:
each distinct content keeps its own file until the process ends. Knows nothing of what the library does.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import threading

from nanogpt_buckets import node
from nanogpt_buckets.node.prune import LIBRARIES

_paths: dict[str, str] = {}
_lock = threading.Lock()


def in_memory() -> bool:
    """Whether this system has sealed anonymous files and allows them; without, private copies take their place."""
    path = _sealed_memory(b"", "nothing")
    if path is not None:
        os.close(int(path.rpartition("/")[2]))
    return path is not None


def library_path(content: bytes) -> str:
    """Return a path that holds exactly `content` until this process ends."""
    digest = hashlib.sha256(content).hexdigest()
    with _lock:
        if digest not in _paths or not os.path.exists(_paths[digest]):
            _paths[digest] = _sealed_memory(content, digest) or _private_file(content, digest)
        return _paths[digest]


def _sealed_memory(content: bytes, digest: str) -> str | None:
    try:
        descriptor = os.memfd_create(digest[:16], os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        path = f"/proc/self/fd/{descriptor}"
        with contextlib.ExitStack() as undo:
            undo.callback(os.close, descriptor)
            with open(descriptor, "wb", closefd=False) as file:
                file.write(content)
            seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
            os.stat(path)  # there may be no /proc
            undo.pop_all()
        return path
    except (AttributeError, OSError):  # no such call, forbidden, or no memory left
        return None


def _private_file(content: bytes, digest: str) -> str:
    path = node.folder(LIBRARIES, make=True) / f"{digest}.so"
    node.put(path, content, 0o400)
    return str(path)
