"""Step: all that anybody asks of what is compiled - its interface, its graph, how it is fed, judged and priced.

Backends, gate, dispatch and measurements know no step by name; they ask this. Knows nothing of compilers, of the store
or of which bucket was chosen. Imports no torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nanogpt_buckets.contract import Executable, Interface, dtype_name
from nanogpt_buckets.model.architecture import Architecture
from nanogpt_buckets.plan.bucket import Bucket

if TYPE_CHECKING:
    from torch import Tensor

    from nanogpt_buckets.model.gpt import GPT, Lowering
    from nanogpt_buckets.steps.graph import Graph


class Step(ABC):
    """One kind of step. `name` is what buckets call it; `sources` are the files that define its graph, in every key.

    One that keeps something between calls is `opened_by` one step and `continued_by` another, for as long as its rows
    grow by a token a call; one that keeps nothing, or takes any number of tokens, is both. What is kept is written in
    place, or, where the step is `pure`, returned after the answers.
    """

    name: str
    sources: tuple[str, ...]
    pure = False

    @property
    def opened_by(self) -> str:
        """The step that runs a prompt."""
        return self.name

    @property
    def continued_by(self) -> str:
        """The step that runs each further token."""
        return self.name

    @abstractmethod
    def interface(self, arch: Architecture, bucket: Bucket, dtype: str) -> Interface:
        """Return what a call takes and returns, and what stays alive between calls, which is of the weights' dtype."""

    @abstractmethod
    def forward(self, gpt: GPT, *tensors: Tensor) -> Any:
        """Compute the outputs from the inputs, in the interface's order: the graph that is compiled."""

    @abstractmethod
    def pack(self, contexts: Sequence[Sequence[int]], bucket: Bucket, filler: Tensor | None = None) -> tuple[Any, ...]:
        """Return the inputs that make one call compute what follows each context: at most B rows of at most S ids.

        `filler`, int32 (B, S), is what stands where no real token does; None for id 0.
        """

    def pack_after(
        self, kept: Sequence[int], contexts: Sequence[Sequence[int]], bucket: Bucket, filler: Tensor | None = None
    ) -> tuple[Any, ...]:
        """Do the same where so many tokens of each context are remembered; for a step that asks for that."""
        return self.pack(contexts, bucket, filler)

    def answers(self, outputs: Sequence[Tensor], rows: int) -> Tensor:
        """Return what a call has found out about each of its first rows, (rows, ...): the others are padding."""
        return outputs[0][:rows]

    def reference(self, gpt: GPT, bucket: Bucket, rows: Tensor, lengths: Sequence[int]) -> Tensor:
        """Return what the answers must be, (B, n, ...): for each of B rows of ids (B, T), cut to each of n lengths.

        Here the logits (B, n, V) that follow. The gate asks it of an eager network; one forward of the full rows is
        enough, by causality.
        """
        return gpt.head(gpt.hidden(rows)[:, [length - 1 for length in lengths]])  # (B, T, C) -> (B, n, V)

    def lengths(self, seq_len: int) -> list[int]:
        """Return the lengths of contexts that the gate asks about, a bucket's edges and its middle.

        Bits are compared with row 0 at the first of them, row 1 at the second, and so on.
        """
        return sorted({max(1, n) for n in (1, seq_len // 2, seq_len // 2 + 1, seq_len - 1, seq_len) if n <= seq_len})

    @abstractmethod
    def macs(self, arch: Architecture, bucket: Bucket) -> int:
        """Return the multiply-adds of one call: only the order of two buckets' costs matters to dispatch."""

    def tokens(self, bucket: Bucket) -> int:
        """Return how many tokens one call chooses, or scores, if every row is full."""
        return bucket.batch_size

    def positions(self, bucket: Bucket) -> int:
        """Return for how many positions one call computes something."""
        return bucket.batch_size * bucket.seq_len

    def within(self, bucket: Bucket) -> Step:
        """Return the step as it is in one bucket: itself, where the inputs' shapes tell all."""
        return self

    def graph(self, gpt: GPT) -> Graph:
        """Return this step as a module over a network, ready to be compiled or run."""
        from nanogpt_buckets.steps.graph import Graph

        return Graph(self, gpt)

    def eager(
        self, arch: Architecture, bucket: Bucket, weights: Mapping[str, Tensor], lowering: Lowering | None = None
    ) -> Executable:
        """Return this step uncompiled, with the checks of a compiled one: the baseline and the oracle."""
        from nanogpt_buckets.model.gpt import from_weights

        dtype = dtype_name(next(iter(weights.values())))
        graph = self.within(bucket).graph(from_weights(arch, weights, lowering))
        return Executable(graph.run, self.interface(arch, bucket, dtype))
