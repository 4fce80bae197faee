"""nanogpt-buckets: static-shape compilation that feels dynamic.

    from nanogpt_buckets import Plan, build, generate

    build(Plan.grid(seq=[32, 64, 128]), model="demo")
    print(generate("ROMEO:", model="demo"))

Names are resolved on first use, so importing the package costs nothing and needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from nanogpt_buckets.builder import build
    from nanogpt_buckets.built import BuildReport
    from nanogpt_buckets.errors import BucketsError
    from nanogpt_buckets.plan.bucket import Bucket, Plan
    from nanogpt_buckets.run.engine import Engine
    from nanogpt_buckets.run.generate import generate
    from nanogpt_buckets.run.generation import Generation, Request, Token
    from nanogpt_buckets.run.report import Report
    from nanogpt_buckets.run.score import Score

_HOME = {
    "Bucket": "plan.bucket",
    "BucketsError": "errors",
    "BuildReport": "built",
    "Engine": "run.engine",
    "Generation": "run.generation",
    "Plan": "plan.bucket",
    "Report": "run.report",
    "Request": "run.generation",
    "Score": "run.score",
    "Token": "run.generation",
    "build": "builder",
    "generate": "run.generate",
}

__all__ = [
    "Bucket",
    "BucketsError",
    "BuildReport",
    "Engine",
    "Generation",
    "Plan",
    "Report",
    "Request",
    "Score",
    "Token",
    "__version__",
    "build",
    "generate",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
