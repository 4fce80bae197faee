"""The child process that compiles one bucket: request in, artifact files and contracts out.

The gate runs here too, on the very bytes that will be published, so that code that crashes takes nothing along.
Knows nothing of the store. Run as `python -m nanogpt_buckets.backends.worker`.
"""

from __future__ import annotations

import platform
import re
import resource
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from nanogpt_buckets import child, key
from nanogpt_buckets.backends import backend_of
from nanogpt_buckets.backends.base import Artifact, Backend, BuildRequest
from nanogpt_buckets.contract import DEFERRED, Contract
from nanogpt_buckets.errors import BackendUnavailable, CompileFailed
from nanogpt_buckets.steps import step_named


def source_of(backend: Backend, step: str) -> str:
    """Return the digest of every file that shapes what this backend compiles of a step."""
    return key.source_digest(*key.GRAPH_SOURCES, *backend.sources, *step_named(step).sources)


def handle(request: dict[str, Any], emit: Callable[..., None]) -> dict[str, Any]:
    """Compile and gate what `BuildRequest.to_json` says in the working directory, and `emit` each phase.

    Returns:
        What `artifact_from_json` reads; the blobs are files in the working directory.

    Raises:
        BucketsError: the bucket cannot be compiled, or failed the gate.
        CompileFailed: what is compiled here would not be what the asker's key names.
    """
    build = BuildRequest.from_json(request)
    backend = backend_of(build)
    _require_same(backend, build)
    emit("phase", phase="compiling")
    artifact = backend.compile(build, Path.cwd())
    emit("phase", phase="checking")
    gate = _gate(backend, build, artifact)
    artifact = replace(artifact, gate=gate, stats={**artifact.stats, "peak_bytes": _peak_bytes()})
    files = {}
    for role, content in artifact.blobs.items():
        files[role] = f"{role}.blob"
        Path(files[role]).write_bytes(content)
    return {"facts": asdict(replace(artifact, blobs={})), "files": files}


def artifact_from_json(result: dict[str, Any], workdir: Path) -> Artifact:
    """Read back, in the parent, what `handle` returned."""
    facts = dict(result["facts"])
    facts["blobs"] = {role: (workdir / Path(name).name).read_bytes() for role, name in result["files"].items()}
    for name in ("inputs", "outputs", "weights"):
        facts[name] = tuple(Contract(row["name"], row["dtype"], tuple(row["shape"])) for row in facts[name])
    return Artifact(**facts)


def _require_same(backend: Backend, build: BuildRequest) -> None:
    """Refuse to compile what the asker, perhaps on another machine, would publish under a name that is not its own."""
    if source_of(backend, build.bucket.step) != build.source:
        raise CompileFailed(
            f"the compiling process has imported another copy of nanogpt_buckets, {Path(key.__file__).parent}",
            hint="see what PYTHONPATH names, there and here",
        )
    own = backend.versions()
    for name in sorted(own.keys() | build.versions.keys()):
        if own.get(name) != build.versions.get(name):
            here, there = (versions.get(name) or "none" for versions in (own, build.versions))
            raise CompileFailed(
                f"the compiling process on {platform.node()} has {name} {here}, and who asks for the bucket {there}",
                hint="whoever compiles needs what the asker has: one image, or one environment, for all",
            )
    try:
        target = backend.target(build.target)
    except BackendUnavailable as error:
        raise BackendUnavailable(f"on {platform.node()}: {error.message}", hint=error.hint) from error
    if target != build.target:
        raise CompileFailed(f"nothing on {platform.node()} can compile for {build.target}")


def _peak_bytes() -> int:
    """Return the most memory that this process, or the largest of those it has started, ever held."""
    # not ru_maxrss of this process, which begins with that of whoever started it
    own = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8", errors="replace"))
    started = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return 1024 * max(started, int(own[1]) if own else 0)


def _gate(backend: Backend, build: BuildRequest, artifact: Artifact) -> dict[str, Any]:
    """Check the very bytes that will be published, or say why that must wait until they are loaded."""
    import safetensors.torch
    import torch

    from nanogpt_buckets.steps import gate

    if backend.unmet(artifact.requires) is not None:
        return {DEFERRED: "no device where it was built"}
    arch, bucket = build.architecture, build.bucket
    if build.weights_path is None:
        weights = gate.seeded_weights(arch, getattr(torch, build.dtype), fused=backend.fuses)
    else:
        weights = safetensors.torch.load_file(build.weights_path)
    try:
        executable = backend.load(artifact, step_named(bucket.step).interface(arch, bucket, build.dtype), weights)
    except BackendUnavailable as error:
        return {DEFERRED: error.message}
    with closing(executable):
        how = {"rounds": backend.rounds(), "fused": backend.fuses}
        return gate.check(executable, arch, bucket, weights, **how, place=executable.placed)


if __name__ == "__main__":
    child.serve(handle)
