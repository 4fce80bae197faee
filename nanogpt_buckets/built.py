"""What a build did, as plain data: one row for each bucket. Knows nothing of how it was done."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nanogpt_buckets.plan.bucket import Bucket


@dataclass(frozen=True)
class BuildRow:
    """What became of one bucket.

    `state` is "hit", "compiled" or "failed". `why`, `hint` and `log` say why it failed, or was compiled and could not
    be published, what to do, and what the compiler last said. `seconds` is the time this build spent on it,
    `size_bytes` what its blobs weigh, `peak_bytes` the memory of the largest process that compiled and checked it, 0
    where this build did not.
    """

    bucket: Bucket
    state: str
    key: str = ""
    seconds: float = 0.0
    size_bytes: int = 0
    peak_bytes: int = 0
    why: str = ""
    hint: str | None = None
    log: str = ""


@dataclass(frozen=True)
class BuildReport:
    """What `build` did: one row for each bucket of the plan, in the plan's order.

    `model` is the model's name, `target` what `backend` generated code for, `cache_dir` where the entries are.
    """

    model: str
    backend: str
    target: str
    cache_dir: Path
    rows: tuple[BuildRow, ...] = ()

    @property
    def hits(self) -> int:
        """Buckets that were there already."""
        return sum(row.state == "hit" for row in self.rows)

    @property
    def compiled(self) -> int:
        """Buckets compiled, checked and published by this build."""
        return sum(row.state == "compiled" for row in self.rows)

    def instead(self, row: BuildRow) -> Bucket | None:
        """Return the shortest bucket of this build that runs what a failed one would have run, or None."""
        fits = (
            each.bucket
            for each in self.rows
            if each.state != "failed" and each.bucket.step == row.bucket.step
            if each.bucket.holds(row.bucket.batch_size, row.bucket.seq_len)
        )
        return min(fits, key=lambda bucket: (bucket.seq_len, bucket.batch_size), default=None)

    @property
    def failed(self) -> int:
        """Buckets that could not be compiled or failed the gate."""
        return sum(row.state == "failed" for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain JSON."""
        rows = [asdict(row) | {"bucket": row.bucket.to_json()} for row in self.rows]
        for written, row in zip(rows, self.rows, strict=True):
            instead = self.instead(row) if row.state == "failed" else None
            written["instead"] = None if instead is None else instead.to_json()
        counts = {"hits": self.hits, "compiled": self.compiled, "failed": self.failed}
        names = {"model": self.model, "backend": self.backend, "target": self.target, "cache_dir": str(self.cache_dir)}
        return {**counts, **names, "buckets": rows}
