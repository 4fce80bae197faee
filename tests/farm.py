"""Builds without a compiler: one that takes seconds and no processor, and one that finds what was compiled before.

Run as `python -m farm ...` it is the command line with the first, or the second where $FARM_CACHE names what to find.
Dask's workers import `compile_bucket`; tests of one process put `found_in` in its place.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nanogpt_buckets import builder
from nanogpt_buckets.backends.base import Artifact, BuildRequest
from nanogpt_buckets.cli import main
from nanogpt_buckets.contract import Contract
from nanogpt_buckets.run.loader import artifact_of
from nanogpt_buckets.store.store import Store


def compile_bucket(request: dict[str, Any], on_event: object = None) -> Artifact:
    """Return bytes that name the bucket, and add a line to $FARM_LOG when it begins and when it ends."""
    bucket = BuildRequest.from_json(request).bucket
    tell(f"begin {bucket}")
    time.sleep(float(os.environ.get("FARM_SECONDS", "0.5")))
    tell(f"end {bucket}")
    inputs = (Contract("input_ids", "int32", (bucket.batch_size, bucket.seq_len)),)
    return Artifact({"library": f"library of {bucket}".encode()}, inputs, (), (), {}, {"peak_bytes": 1_000_000})


def found_in(cache: Path) -> Callable[..., Artifact]:
    """Return a compiler that has compiled everything before: whatever it is asked for is in this cache."""
    store = Store(cache)

    def find(request: dict[str, Any], on_event: object = None) -> Artifact:
        build = BuildRequest.from_json(request)
        (found,) = [
            entry
            for entry in store.entries()
            if (entry.bucket, entry.parts["target"]) == (build.bucket, build.target)
            and entry.parts["family"]["dtype"] == build.dtype
        ]
        return artifact_of(store.read(found))

    return find


def tell(what: str) -> None:
    with Path(os.environ["FARM_LOG"]).open("a") as log:
        log.write(f"{os.getpid()} {what}\n")


if __name__ == "__main__":
    import farm  # not this module, which is called __main__ here and on no worker

    before = os.environ.get("FARM_CACHE")
    builder.compile_bucket = farm.found_in(Path(before)) if before else farm.compile_bucket
    main(sys.argv[1:])
