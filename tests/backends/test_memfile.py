"""Libraries are loaded from a path that nobody else can change, whatever the system allows."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from pathlib import Path

import pytest

from nanogpt_buckets import node
from nanogpt_buckets.backends import memfile
from nanogpt_buckets.errors import UntrustedStore

LIBRARY = next(Path("/lib").rglob("libutil.so.1"), None) or next(Path("/usr/lib").rglob("libz.so.1"))


def refuse(code: int):
    def call(*arguments):
        raise OSError(code, os.strerror(code))

    return call


@pytest.fixture(params=["sealed", "no call", "EACCES", "EPERM", "ENOSYS", "seals"])
def how(request, monkeypatch):
    monkeypatch.setattr(memfile, "_paths", {})
    match request.param:
        case "no call":
            monkeypatch.delattr(os, "memfd_create")
        case "seals":
            monkeypatch.setattr(memfile.fcntl, "fcntl", refuse(errno.EPERM))
        case name if name != "sealed":
            monkeypatch.setattr(os, "memfd_create", refuse(getattr(errno, name)))
    return request.param


def test_a_library_can_be_loaded_from_its_path_and_keeps_it(how):
    content = LIBRARY.read_bytes()
    descriptors = len(os.listdir("/proc/self/fd"))

    path = Path(memfile.library_path(content))

    assert memfile.in_memory() == (how == "sealed")
    assert path.is_relative_to("/proc/self/fd" if how == "sealed" else node.directory() / "libraries")
    assert len(os.listdir("/proc/self/fd")) == descriptors + (how == "sealed")
    assert path.read_bytes() == content
    ctypes.CDLL(str(path))
    assert memfile.library_path(content) == str(path)
    if how == "sealed":
        with pytest.raises(PermissionError), path.open("r+b") as file:
            file.write(b"x")
    else:
        assert stat.S_IMODE(path.stat().st_mode) == 0o400
        path.unlink()  # by somebody's prune
        assert Path(memfile.library_path(content)).read_bytes() == content
        assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("how", ["EACCES"], indirect=True)
def test_a_private_copy_goes_nowhere_that_others_can_write(how):
    node.folder(make=True).chmod(0o777)

    with pytest.raises(UntrustedStore):
        memfile.library_path(b"library")
    assert not list(node.directory().rglob("*.so"))
