"""The child process that compiles one bucket: request in, artifact files and contracts out.

The gate runs here too, on the very bytes that will be published, so that code that crashes takes nothing along.
Knows nothing of the store. Run as `python -m nanogpt_buckets.backends.worker`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanogpt_buckets import child
from nanogpt_buckets.backends import choose
from nanogpt_buckets.backends.base import DEFERRED, Artifact, Backend, BuildRequest
from nanogpt_buckets.contract import Contract
from nanogpt_buckets.errors import BackendUnavailable

if TYPE_CHECKING:
    from torch import Tensor


def handle(request: dict[str, Any], emit: Callable[..., None]) -> dict[str, Any]:
    """Compile and gate one bucket in the working directory.

    Args:
        request: `BuildRequest.to_json()`.
        emit: progress.

    Returns:
        The artifact as plain JSON; blobs are file names in the working directory.

    Raises:
        BucketsError: the bucket cannot be compiled, or failed the gate.
    """
    build = BuildRequest.from_json(request)
    emit("phase", phase="compiling")
    backend = choose(build.backend, arguments=build.arguments)
    artifact = backend.compile(build, Path.cwd())
    emit("phase", phase="checking")
    artifact = replace(artifact, gate=_gate(backend, build, artifact))
    files = {}
    for role, content in artifact.blobs.items():
        files[role] = f"{role}.blob"
        Path(files[role]).write_bytes(content)
    return {**_contracts(artifact), "files": files}


def _contracts(artifact: Artifact) -> dict[str, Any]:
    plain = asdict(replace(artifact, blobs={}))
    return {name: plain[name] for name in ("inputs", "outputs", "weights", "requires", "stats", "gate")}


def artifact_from_json(result: dict[str, Any], workdir: Path) -> Artifact:
    """Read back, in the parent, what `handle` returned."""

    def contracts(rows: list[dict[str, Any]]) -> tuple[Contract, ...]:
        return tuple(Contract(row["name"], row["dtype"], tuple(row["shape"])) for row in rows)

    return Artifact(
        blobs={role: (workdir / Path(name).name).read_bytes() for role, name in result["files"].items()},
        inputs=contracts(result["inputs"]),
        outputs=contracts(result["outputs"]),
        weights=contracts(result["weights"]),
        requires=result["requires"],
        stats=result["stats"],
        gate=result["gate"],
    )


def _gate(backend: Backend, build: BuildRequest, artifact: Artifact) -> dict[str, Any]:
    """Check what was compiled on the bytes that will be published, or say why that must wait until it is loaded."""
    import torch

    from nanogpt_buckets.backends import gate

    if not backend.can_check(artifact):
        return {DEFERRED: "no device where it was built"}
    dtype = getattr(torch, build.dtype)
    weights = gate.seeded_weights(build.architecture, dtype) if build.weights is None else _read(build.weights)
    try:
        step = backend.load(artifact, weights)
    except BackendUnavailable as error:
        return {DEFERRED: error.message}
    try:
        return gate.check(step, build.architecture, build.bucket, weights, rounds=backend.rounds())
    finally:
        step.close()


def _read(path: str) -> dict[str, Tensor]:
    import safetensors.torch

    return safetensors.torch.load_file(path)


if __name__ == "__main__":
    # before torch is imported: compiler caches belong to this child alone and go with its directory
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path.cwd() / "cache")
    child.serve(handle)
