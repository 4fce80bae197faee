"""Which kernel is the fastest for products with a network's weight matrices: measured here, in the compiling child.

What is chosen is an output: it is in the manifest, and never part of a key. Hashed into every family all the same, for
it shapes code. Knows nothing of steps, of loading buckets or of the gate.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from nanogpt_buckets.backends.inductor.compile import kernel_for
from nanogpt_buckets.model.architecture import Architecture

if TYPE_CHECKING:
    from torch import Tensor, nn

# Past so many rows a loop over the weights has more sums than a CPU has registers.
_MOST_ROWS = 16
# What takes the place of the kernel that is usually best must be faster by more than the clock's noise.
_WORTH_IT = 0.9
_RUNS = 9
# Compiles a module for its inputs and returns what runs it.
Compile = Callable[["nn.Module", tuple["Tensor", ...]], Callable[..., object]]


def tuned(
    arch: Architecture, dtype: str, rows: Iterable[int], compiled: Compile
) -> tuple[Callable[[int], str], dict[str, int]]:
    """Return the kernel for each of some numbers of rows, and what was measured.

    That is microseconds for the matrices of one layer and the output matrix, by names such as "rows_4_onednn_us", with
    "chosen_" before that of the kernel that is to be used.
    """
    choices, measured = {}, {}
    for count in sorted(set(rows)):
        usual = kernel_for(count, dtype)
        times = _times(arch, dtype, count, compiled)
        best = min(times, key=times.__getitem__)
        choices[count] = best if times[best] < _WORTH_IT * times[usual] else usual
        for kernel, microseconds in times.items():
            chosen = "chosen_" if kernel == choices[count] else ""
            measured[f"{chosen}rows_{count}_{kernel}_us"] = microseconds
    return lambda count: choices.get(count) or kernel_for(count, dtype), measured


def _times(arch: Architecture, dtype: str, rows: int, compiled: Compile) -> Mapping[str, int]:
    import torch

    runs: dict[str, Callable[..., object]] = {}
    shapes = [(3 * arch.n_embd, arch.n_embd), (arch.n_embd, arch.n_embd), (arch.n_inner, arch.n_embd)]
    shapes += [(arch.n_embd, arch.n_inner), (arch.vocab_size, arch.n_embd)]
    kind = getattr(torch, dtype)
    inputs = tuple(torch.randn(rows, width).to(kind) for _, width in shapes)
    for kernel in ("aten", "onednn", "rows") if rows <= _MOST_ROWS else ("aten", "onednn"):
        products = _products(shapes, kind, kernel)
        runs[kernel] = compiled(products, inputs) if kernel == "rows" else products
    least = dict.fromkeys(runs, float("inf"))
    with torch.inference_mode():
        for _ in range(_RUNS):
            for kernel, run in runs.items():
                start = time.perf_counter()
                run(*inputs)
                least[kernel] = min(least[kernel], time.perf_counter() - start)
    return {kernel: max(1, int(1e6 * seconds)) for kernel, seconds in least.items()}


def _products(shapes: Iterable[tuple[int, int]], dtype: object, kernel: str) -> nn.Module:
    import torch

    from nanogpt_buckets.model.gpt import Linear

    class Products(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            made = [Linear(width, to, bias=True, kernels=lambda rows: kernel) for to, width in shapes]
            self.linears = torch.nn.ModuleList(made)

        def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
            return tuple(linear(x) for linear, x in zip(self.linears, inputs, strict=True))

    return Products().to(dtype).eval().requires_grad_(False)  # type: ignore[call-overload,no-any-return]
