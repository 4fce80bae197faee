"""Compilers and loaders behind one protocol."""

from __future__ import annotations

from nanogpt_buckets.backends.base import Backend
from nanogpt_buckets.errors import BackendUnavailable, UsageError

BACKENDS = ("inductor", "eager")
_NEURON_TARGETS = ("trn1", "trn1n", "trn2", "inf2")


def choose(backend: str = "auto", target: str | None = None) -> Backend:
    """Return the backend asked for; "auto" lets the target decide, and is inductor where nothing else is said.

    Raises:
        UsageError: no such backend.
        BackendUnavailable: the target needs a backend this release does not have.
    """
    from nanogpt_buckets.backends.eager import EagerBackend
    from nanogpt_buckets.backends.inductor import InductorBackend

    if backend == "neuron" or (target or "").startswith(_NEURON_TARGETS):
        raise BackendUnavailable(
            "this release has no Neuron backend yet",
            hint="build for this machine's CPU instead: leave --target and --backend out",
        )
    if backend in ("auto", "inductor"):
        return InductorBackend()
    if backend == "eager":
        return EagerBackend()
    raise UsageError(f"backend {backend!r} is unknown", hint=f"backends: auto, {', '.join(BACKENDS)}")
