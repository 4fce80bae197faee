"""Compilers and loaders behind one protocol."""

from __future__ import annotations

from collections.abc import Sequence

from nanogpt_buckets.backends.base import Backend, BuildRequest
from nanogpt_buckets.backends.neuron import device
from nanogpt_buckets.errors import UsageError

BACKENDS = ("inductor", "neuron")


def backend_for(
    backend: str = "auto",
    target: str | None = None,
    *,
    compiler_args: str | Sequence[str] = (),
    cores: int = 1,
    strategy: str = "auto",
) -> Backend:
    """Return the backend asked for; for "auto" the target decides, else what devices are here.

    Neuron's buckets have the weights inside unless the strategy is "kv".

    Raises:
        UsageError: no such backend, a target that is not its own, or an argument it does not take.
    """
    from nanogpt_buckets.backends.inductor.backend import InductorBackend
    from nanogpt_buckets.backends.neuron.backend import NeuronBackend

    if backend not in ("auto", *BACKENDS):
        raise UsageError(f"backend {backend!r} is unknown", hint=f"backends: auto, {', '.join(BACKENDS)}, eager")
    if backend == "auto":
        here = target is None and device.find() is not None
        backend = "neuron" if here or device.is_neuron(target) else "inductor"
    if backend == "neuron":
        arguments = (compiler_args,) if isinstance(compiler_args, str) else tuple(compiler_args)
        return NeuronBackend(arguments, cores, inlines_weights=strategy != "kv")
    refuse_neuron_only(backend, target, compiler_args, cores)
    return InductorBackend()


def backend_of(build: BuildRequest) -> Backend:
    """Return the backend that compiles what was asked for, as whoever asked has it."""
    strategy = "kv" if build.weights_path is None else "recompute"
    return backend_for(build.backend, compiler_args=build.compiler_args, strategy=strategy)


def refuse_neuron_only(name: str, target: str | None, compiler_args: str | Sequence[str], cores: int) -> None:
    """Refuse, by a UsageError, what only neuron takes, for a backend that runs on the CPU."""
    if device.is_neuron(target):
        raise UsageError(f"the {name} backend does not build for {target}", hint="leave --backend out")
    if compiler_args:
        raise UsageError(f"the {name} backend takes no compiler arguments", hint="they are for --backend neuron")
    if cores != 1:
        raise UsageError(f"the {name} backend runs on one device", hint="cores are for --backend neuron")
