"""The rows that run at a time where compiled code writes none of what it is given: what is remembered is handed on.

Rows are in racks, as many to one as a bucket has rows, for as long as they run; each rack is on a core, and what a call
of it returned is what its next call takes, whatever the bucket. A call takes some tokens of each row of a rack, of one
its prompt's next ones, of another its last. Knows nothing of sampling or text, nor of devices.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Generic

from torch import Tensor

from nanogpt_buckets.plan.bucket import Bucket
from nanogpt_buckets.run.dispatch import RECOMPUTE, C, Call, Dispatcher
from nanogpt_buckets.steps import step_named


@dataclass(eq=False)
class _Rack(Generic[C]):
    """One batch of rows, each with how many of its tokens are remembered; None where nobody is."""

    state: list[Tensor]
    rows: list[C | None]
    kept: dict[C, int] = field(default_factory=dict)


class Chunks(Generic[C]):
    """A number of places for rows, in racks.

    Args:
        dispatcher: runs calls.
        buckets: chunk buckets, all of one batch size, and others to recompute with past block_size.
        places: how many rows run at a time.
    """

    def __init__(self, dispatcher: Dispatcher, buckets: Sequence[Bucket], places: int) -> None:
        self._dispatcher = dispatcher
        self._buckets = buckets
        self._rungs = sorted(bucket for bucket in buckets if bucket.step == "chunk")
        B = self._rungs[0].batch_size
        racks = -(-places // B)
        self._racks = [_Rack[C](dispatcher.blank(self._rungs[0], core), [None] * B) for core in range(racks)]
        self._places = places
        self._rows: dict[C, _Rack[C] | None] = {}  # None: it has outgrown what can be remembered

    @property
    def room(self) -> int:
        """How many rows may join."""
        return self._places - len(self._rows)

    def join(self, rows: Iterable[C]) -> None:
        """Let rows join, as many as there is room for."""
        for row in rows:
            self._rows[row] = rack = next(rack for rack in self._racks if None in rack.rows)
            rack.rows[rack.rows.index(None)] = row
            rack.kept[row] = 0  # whatever the one before has left is written over, or not seen

    def leave(self, row: C) -> None:
        """Let a row go and its place be another's."""
        if (rack := self._rows.pop(row)) is not None:
            self._free(rack, row)

    def end(self) -> None:
        """Let go of what is remembered; nobody may join any more."""
        self._racks, self._places = [], 0

    def logits(self) -> dict[C, Tensor]:
        """Return the logits float32 (V) that follow rows; before it is called again each of them has one more token.

        Of one at least, if there is any: whose prompt takes several calls is among them after the last.
        """
        found: dict[C, Tensor] = {}
        while self._rows and not found:
            self._let_outgrown_go()
            calls = [call for rack in self._racks if (call := self._call(rack)) is not None]
            cropped = [row for row, rack in self._rows.items() if rack is None]
            done = self._dispatcher.run([*calls, *self._dispatcher.stateless(RECOMPUTE, cropped, self._buckets)])
            for rack in self._racks:
                rack.kept |= self._after(rack, calls)
            found = {row: logits for row, logits in done.items() if self._is_through(row)}
        return found

    def _call(self, rack: _Rack[C]) -> Call[C] | None:
        """Return the next call of a rack: the shortest bucket in which it is done soonest."""
        behind = {row: len(row.ids) - have for row, have in rack.kept.items()}
        if not behind:
            return None
        width = max(map(_width, self._rungs))
        need = max(rack.kept[row] + min(left, width) for row, left in behind.items())
        bucket = next((rung for rung in self._rungs if rung.seq_len >= need), self._rungs[-1])
        pieces = []
        for row, left in behind.items():
            have = rack.kept[row]
            pieces.append((have, min(have + min(left, _width(bucket)), bucket.seq_len)))
        places = [rack.rows.index(row) for row in behind]
        order = sorted(range(len(places)), key=places.__getitem__)
        members = [*behind]
        return Call(
            bucket,
            [members[n] for n in order],
            [places[n] for n in order],
            rack.state,
            [pieces[n] for n in order],
        )

    def _after(self, rack: _Rack[C], calls: Iterable[Call[C]]) -> dict[C, int]:
        """Return how much is remembered of the rows of a rack after its call."""
        return {
            row: end
            for call in calls
            if call.state is rack.state
            for row, (_, end) in zip(call.members, call.pieces, strict=True)
        }

    def _is_through(self, row: C) -> bool:
        rack = self._rows[row]
        return rack is None or rack.kept[row] == len(row.ids)

    def _let_outgrown_go(self) -> None:
        for row, rack in self._rows.items():
            if rack is not None and len(row.ids) > self._dispatcher.block_size:
                self._rows[row] = None
                self._free(rack, row)

    def _free(self, rack: _Rack[C], row: C) -> None:
        rack.rows[rack.rows.index(row)] = None
        del rack.kept[row]


def _width(bucket: Bucket) -> int:
    """Return how many tokens of a row a call takes."""
    return step_named(bucket.step).positions(bucket) // bucket.batch_size
