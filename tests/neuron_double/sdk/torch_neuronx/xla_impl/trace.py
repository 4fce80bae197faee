"""`torch_neuronx.trace`, after the "PyTorch NeuronX Tracing API for Inference" page of the AWS Neuron documentation."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torch_neuronx import _models, _settings, _texts
from torch_neuronx._runtime import RUNTIME
from torch_neuronx.xla_impl import capture, compiler, module

_MOST_POSITIONAL = 7
_ONCE_POSITIONAL = ("input_output_aliases", "compiler_workdir", "compiler_args", "partitioner_config")


def trace(
    func: Callable[..., Any],
    example_inputs: Any,
    *_: Any,
    input_output_aliases: Mapping[Tensor, int] | None = {},
    compiler_workdir: str | None = None,
    compiler_args: str | Sequence[str] | None = None,
    partitioner_config: object | None = None,
    inline_weights_to_neff: bool = True,
    cpu_backend: bool = False,
) -> torch.jit.ScriptModule:
    """Compile a function for fixed shapes.

    Args:
        func: a module or another callable.
        example_inputs: one tensor, or a tuple of tensors and of tuples or lists of them.
        input_output_aliases: state tensors of the module and the numbers of the outputs that replace their values.
        compiler_workdir: where graph, NEFF and command are kept; a temporary directory unless given.
        compiler_args: flags for neuronx-cc.
        partitioner_config: not modelled; only None is accepted.
        inline_weights_to_neff: make the weights constants of the NEFF; else they can be replaced later.
        cpu_backend: trace without a Neuron device. Needs --target in compiler_args.

    Returns:
        The compiled module. With a device it is loaded, and takes a core, unless cpu_backend is set.

    Raises:
        RuntimeError: no device, no compiler, no target, or neuronx-cc failed.
        TypeError: an input is no tensor.
    """
    options = {
        "input_output_aliases": input_output_aliases,
        "compiler_workdir": compiler_workdir,
        "compiler_args": compiler_args,
        "partitioner_config": partitioner_config,
    }
    if _:
        options |= _from_positions(_)
    if options["partitioner_config"] is not None:
        raise NotImplementedError("<double> partitioner_config is not modelled")
    args = compiler.arguments(options["compiler_args"])
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    target = _target(args, cpu_backend)
    program = capture.capture(
        func,
        inputs,
        aliases=options["input_output_aliases"] or {},
        inline_weights=inline_weights_to_neff,
        compiler_args=args,
    )
    with tempfile.TemporaryDirectory() as temporary:
        workdir = Path(options["compiler_workdir"] or temporary)
        neff = compiler.compile_program(program, workdir, args, target)
    traced = module.wrap(program, neff, inputs)
    if not cpu_backend:
        _models.adopt(traced)
    return traced


def _from_positions(extra: tuple[Any, ...]) -> dict[str, Any]:
    """Return deprecated positional arguments by the names they are taken for."""
    n = 2 + len(extra)
    message = f"Received {n} positional arguments but expected 2"
    if n > _MOST_POSITIONAL:
        raise RuntimeError(message)
    warnings.warn(
        f"{message}. Use of positional arguments after `func` and `example_inputs` is deprecated. Please specify "
        "keyword arguments instead.",
        DeprecationWarning,
        stacklevel=3,
    )
    return dict(zip(_ONCE_POSITIONAL, extra, strict=False))


def _target(args: list[str], cpu_backend: bool) -> str:
    """Return the target that stands before compiler_args on neuronx-cc's command line, where the rightmost wins."""
    if cpu_backend:
        if compiler.target_in(args) is None:
            raise RuntimeError(_texts.TARGET_NEEDED)
        return "trn1"
    if not _settings.core_count():
        raise RuntimeError(_texts.NO_DEVICE_AT_TRACE)
    RUNTIME.initialize()  # tracing on a device takes the process's cores
    return _settings.platform()
