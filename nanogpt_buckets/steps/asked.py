"""A loaded bucket, asked for what follows whole contexts: the gate's side of a conversation.

A step that keeps state runs its part of whole requests, some of whose last tokens come one by one, and the eager steps
run the rest, past the bucket's end, so that what either writes must suit the other. One that takes any number of tokens
gets them in pieces, after some that the eager step has run in a shorter bucket. State spans all the positions that the
model has, and is dirty to begin with.

Knows nothing of compilers or files, nor of what is right. How to feed a step, it asks the step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nanogpt_buckets.contract import dtype_name
from nanogpt_buckets.model.architecture import Architecture
from nanogpt_buckets.model.gpt import GPT, from_weights
from nanogpt_buckets.plan.bucket import Bucket
from nanogpt_buckets.steps import step_named

Run = Callable[..., Sequence[Tensor]]

# How many of a context's last tokens are run one by one: after buckets that run prompts, and by those that run these.
_AFTER_PROMPTS, _OWN, _IN_PIECES = (0, 2), (1, 8), (0, 8)
_DIRT = 100.0


@dataclass(frozen=True, eq=False)
class Asked:
    """A loaded bucket, to be asked about contexts: for the logits that follow, say. Eager steps run what it does not.

    Contexts begin as some of the `rows` (B, T) do, so what the eager step keeps of a row's prompt is found once.
    """

    run: Run
    arch: Architecture
    bucket: Bucket
    weights: Mapping[str, Tensor]
    rows: Tensor
    place: Callable[[Tensor], Tensor] = lambda tensor: tensor  # where the bucket wants its state
    kept: dict[int, list[Tensor]] = field(default_factory=dict)

    @functools.cached_property
    def network(self) -> GPT:
        """The eager network."""
        return from_weights(self.arch, self.weights)

    @property
    def tails(self) -> tuple[int, ...]:
        """How many tokens may come one by one: none where nothing is kept, and one at least where that is the step."""
        step = step_named(self.bucket.step)
        if step.continued_by == step.opened_by:
            return _IN_PIECES if step.pure else (0,)
        return _AFTER_PROMPTS if self.opens else _OWN

    @property
    def opens(self) -> bool:
        """Whether the bucket is what runs prompts."""
        return step_named(self.bucket.step).opened_by == self.bucket.step

    def __call__(
        self,
        contexts: Sequence[Sequence[int]],
        tail: int | None = None,
        filler: Tensor | None = None,
        between: Callable[[], object] = lambda: None,
    ) -> Tensor:
        """Return the answers (n, ...) for each of n contexts, whose last `tail` tokens come one by one.

        Unless said otherwise that is two at most: the second finds what the first has written. `between` is done before
        the last call.
        """
        tail, state = min(2, self.tails[-1]) if tail is None else tail, self.dirty(filler)
        for left in range(tail, 0, -1):
            self.call(state, contexts, tail, left, filler)
        between()
        answers = self.call(state, contexts, tail, 0, filler)
        assert answers is not None  # a prompt is all that is kept of an eager step's
        return answers

    def dirty(self, filler: Tensor | None = None) -> list[Tensor]:
        """Return state as a stranger may have left it, over all positions; another one if there is a filler."""
        B = self.bucket.batch_size
        dirt = _DIRT if filler is None else -_DIRT / 2
        return [self.place(state.fill_(dirt)) for state in self._blank(B, self.arch.block_size)]

    def _blank(self, batch_size: int, seq_len: int) -> list[Tensor]:
        bucket, dtype = Bucket(batch_size, seq_len, self.bucket.step), dtype_name(next(iter(self.weights.values())))
        return [view.blank() for view in step_named(bucket.step).interface(self.arch, bucket, dtype).state]

    def call(
        self, state: list[Tensor], contexts: Sequence[Sequence[int]], tail: int, left: int, filler: Tensor | None = None
    ) -> Tensor | None:
        """Make one call of a request, after which `left` tokens are; its answers, unless it is a prompt's and eager."""
        step = step_named(self.bucket.step)
        if step.pure:
            return self._in_pieces(state, contexts, tail, left, filler)
        heads = [context[: max(0, len(context) - left)] for context in contexts]
        name = step.opened_by if left == tail else step.continued_by
        if name == self.bucket.step:
            views = (tensor[:, :, : self.bucket.seq_len] for tensor in state)
            return step.answers(self.run(*step.pack(heads, self.bucket, filler), *views), len(contexts))
        if name == step.opened_by:
            for row, head in enumerate(heads):
                for tensor, kept in zip(state, self._after(head), strict=True):
                    tensor[row, :, : len(head)] = kept[0, :, : len(head)]
            return None
        longest = max(1, *map(len, heads))
        return self._eagerly(name, heads, Bucket(self.bucket.batch_size, longest, name), state)

    def _in_pieces(
        self, state: list[Tensor], contexts: Sequence[Sequence[int]], tail: int, left: int, filler: Tensor | None
    ) -> Tensor | None:
        """Make the calls that bring each context to where `left` tokens are; answers if that is the end.

        Tokens come as many at a time as a call takes, or, where some come one by one, fewer; what a row begins with,
        and what is past the bucket's end, is then the eager step's.
        """
        kept = [max(0, len(context) - left - 1) * (left < tail) for context in contexts]
        ends = [max(0, len(context) - left) for context in contexts]
        found: dict[int, Tensor] = {}
        while behind := [row for row, end in enumerate(ends) if kept[row] < end]:
            where = {row: self._where(kept[row], contexts[row], tail) for row in behind}
            for bucket in sorted(set(where.values())):
                T = step_named(bucket.step).positions(bucket) // bucket.batch_size
                piece = max(1, T * 2 // 3) if tail else T
                until = [*kept]
                for row in (row for row in behind if where[row] == bucket):
                    until[row] = min(kept[row] + piece, bucket.seq_len, ends[row])
                answers = self._piece(bucket, state, kept, until, contexts, filler)
                found |= {row: answers[row] for row in behind if where[row] == bucket}
                kept = until
        return None if left else torch.stack([found[row] for row in range(len(contexts))])

    def _where(self, kept: int, context: Sequence[int], tail: int) -> Bucket:
        """Return the bucket that a row's next tokens run in; a short row, and a whole one at once, is ours alone."""
        S, early = self.bucket.seq_len, self.bucket.seq_len // 3
        length = S if kept < S else self.arch.block_size
        if tail and kept < early < len(context):
            length = early
        return Bucket(self.bucket.batch_size, length, self.bucket.step)

    def _piece(
        self,
        bucket: Bucket,
        state: list[Tensor],
        kept: Sequence[int],
        until: Sequence[int],
        contexts: Sequence[Sequence[int]],
        filler: Tensor | None,
    ) -> Tensor:
        step = step_named(bucket.step).within(bucket)
        heads = [context[:end] for context, end in zip(contexts, until, strict=True)]
        if bucket == self.bucket:
            outputs = self.run(*step.pack_after(kept, heads, bucket, filler), *state)
            state[:] = outputs[-len(state) :]
        else:
            held = (tensor.cpu() for tensor in state)
            outputs = step.graph(self.network).run(*step.pack_after(kept, heads, bucket), *held)
            state[:] = map(self.place, outputs[-len(state) :])
        return step.answers(outputs, len(contexts))

    def _after(self, head: Sequence[int]) -> list[Tensor]:
        """Return the state that a prompt leaves; all of a row that begins with it leaves that, too, by causality."""
        begins = (self.rows[:, : len(head)] == torch.tensor(head, dtype=self.rows.dtype)).all(1)  # (B)
        row = int(begins.nonzero()[0])
        if row not in self.kept:
            length = self.rows.shape[1]
            opened_by, state = step_named(self.bucket.step).opened_by, self._blank(1, length)
            self._eagerly(opened_by, self.rows[row : row + 1].tolist(), Bucket(1, length, opened_by), state)
            self.kept[row] = state
        return self.kept[row]

    def _eagerly(self, name: str, heads: Sequence[Sequence[int]], bucket: Bucket, state: list[Tensor]) -> Tensor:
        step = step_named(name)
        views = (tensor[:, :, : bucket.seq_len] for tensor in state)
        return step.answers(step.graph(self.network).run(*step.pack(heads, bucket), *views), len(heads))
