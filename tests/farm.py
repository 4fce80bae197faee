"""A build whose compiler takes seconds and no processor, and says in a file whom it was asked for; see test_farm.py.

Run as `python -m farm build ...` it is the command line with this compiler. Dask's workers import `compile_bucket`.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from nanogpt_buckets import builder
from nanogpt_buckets.backends.base import Artifact, BuildRequest
from nanogpt_buckets.cli import main
from nanogpt_buckets.contract import Contract


def compile_bucket(request: dict[str, Any], on_event: object = None) -> Artifact:
    """Return bytes that name the bucket, and add a line to $FARM_LOG when it begins and when it ends."""
    bucket = BuildRequest.from_json(request).bucket
    tell(f"begin {bucket}")
    time.sleep(float(os.environ.get("FARM_SECONDS", "0.5")))
    tell(f"end {bucket}")
    inputs = (Contract("input_ids", "int32", (bucket.batch_size, bucket.seq_len)),)
    return Artifact({"library": f"library of {bucket}".encode()}, inputs, (), (), {}, {"peak_bytes": 1_000_000})


def tell(what: str) -> None:
    with Path(os.environ["FARM_LOG"]).open("a") as log:
        log.write(f"{os.getpid()} {what}\n")


if __name__ == "__main__":
    import farm  # not this module, which is called __main__ here and on no worker

    builder.compile_bucket = farm.compile_bucket
    main(sys.argv[1:])
