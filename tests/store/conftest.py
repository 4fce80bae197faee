"""Fixtures of the store's tests, and a way to import what they share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from service import BUCKET, Service
from service import service as running_service
from store_kit import make

from nanogpt_buckets.store.store import Store


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "cache")


@pytest.fixture
def entry(store):
    manifest, blobs = make("one")
    store.publish(manifest, blobs)
    return manifest


@pytest.fixture(scope="session")
def service() -> Iterator[Service]:
    """An S3 service on this machine, with a bucket."""
    with running_service() as made:
        yield made


@pytest.fixture
def s3(service, monkeypatch, tmp_path) -> str:
    """A place of this test's own in that bucket."""
    for name, value in service.environment.items():
        monkeypatch.setenv(name, value)
    service.asked.clear()
    return f"s3://{BUCKET}/{tmp_path.name}"


@pytest.fixture
def open_path(tmp_path):
    """Let another user walk down to this test's directory."""
    for directory in (tmp_path, *tmp_path.parents[:3]):
        directory.chmod(directory.stat().st_mode | 0o055)
    return tmp_path
