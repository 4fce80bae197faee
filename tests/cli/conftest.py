"""The executable, run as its users run it, in a process of its own; or, where that is not the point, in this one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from farm import found_in

from nanogpt_buckets import builder
from nanogpt_buckets.cli import main

TESTS = Path(__file__).parents[1]


@pytest.fixture
def run(capfd) -> Callable[..., tuple[int, str, str]]:
    """Return a function that runs a command in this process and returns its exit code, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        return (end.value.code or 0, *capfd.readouterr())

    return run


@pytest.fixture
def cache(demo_cache, tmp_path, monkeypatch) -> Path:
    """Return a copy of the demo's cache, which commands in this process use."""
    shutil.copytree(demo_cache, tmp_path / "copy")
    monkeypatch.setenv("NANOGPT_BUCKETS_CACHE_DIR", str(tmp_path / "copy"))
    return tmp_path / "copy"


@pytest.fixture
def signing_key(tmp_path) -> Path:
    """Return the file of a new private key; its public half is in the file beside it that ends in .pub."""
    made, path = Ed25519PrivateKey.generate(), tmp_path / "ci.pem"
    private = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.write_bytes(made.private_bytes(*private))
    path.chmod(0o600)
    public = (serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    path.with_suffix(".pub").write_bytes(made.public_key().public_bytes(*public))
    path.with_suffix(".pub").chmod(0o644)
    return path


@pytest.fixture
def here(capfdbinary, monkeypatch) -> Callable[..., subprocess.CompletedProcess[bytes]]:
    """Return a function that runs a command as `cli` does, in this process, which has imported torch before."""

    def run(*arguments: str, cache: Path | None = None, compiled: Path | None = None, **variables: str):
        with monkeypatch.context() as patch:
            for name, value in (variables | ({"NANOGPT_BUCKETS_CACHE_DIR": str(cache)} if cache else {})).items():
                patch.setenv(name, value)
            if compiled is not None:
                patch.setattr(builder, "compile_bucket", found_in(compiled))
            with pytest.raises(SystemExit) as end:
                main(list(arguments))
        return subprocess.CompletedProcess(arguments, end.value.code or 0, *capfdbinary.readouterr())

    return run


@pytest.fixture
def cli() -> Callable[..., subprocess.CompletedProcess[bytes]]:
    """Return a function that runs a command in a child, with this cache directory and these variables.

    What was `compiled` before, in another cache, need not be compiled again; see farm.py.
    """

    def run(
        *arguments: str,
        cache: Path | None = None,
        compiled: Path | None = None,
        stdin: str = "",
        cwd: Path | None = None,
        **variables: str,
    ):
        extra = variables | ({"NANOGPT_BUCKETS_CACHE_DIR": str(cache)} if cache else {})
        if compiled is not None:
            extra |= {"FARM_CACHE": str(compiled), "PYTHONPATH": str(TESTS)}
        return subprocess.run(
            [sys.executable, "-m", "nanogpt_buckets" if compiled is None else "farm", *arguments],
            env=os.environ | extra,
            cwd=cwd,
            input=stdin.encode("utf-8", "surrogateescape"),
            capture_output=True,
        )

    return run
