"""What looking at a machine finds: facts, each with a verdict. Plain data; knows nothing of who looks at what."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Verdict(StrEnum):
    """OK, something that will limit you, or something that will fail."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True)
class Finding:
    """One fact: what it is about ("cache"), which one ("owner"), its value in words, what that means or what to do."""

    topic: str
    name: str
    value: str
    verdict: Verdict = Verdict.OK
    hint: str = ""
