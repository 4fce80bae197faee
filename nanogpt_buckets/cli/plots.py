"""Plots of plans and of what was asked, as files. Needs matplotlib, which the extra "plot" brings.

Knows nothing of how plans are made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nanogpt_buckets.cli import output
from nanogpt_buckets.errors import UsageError
from nanogpt_buckets.planning import Proposal
from nanogpt_buckets.regret import Regret
from nanogpt_buckets.run.traffic import calls_of

_INSTALL = "pip install 'nanogpt-buckets[plot]'"
_BINS = 128


def draw_plan(found: Proposal, title: str, path: Path) -> None:
    """Draw cost against the number of buckets, and for each step its lengths with the ladder.

    Raises:
        UsageError: matplotlib is not installed, or the file cannot be written.
    """
    steps = [step for step, weights in found.demand.weights.items() if sum(map(bool, weights)) > 1]
    figure = _figure(3 + 2.5 * len(steps), title)
    costs, *lengths = figure.subplots(1 + len(steps), 1, squeeze=False)[:, 0]
    counts = [size.planned.buckets for size in found.sizes]
    costs.plot(counts, [size.planned.ratio for size in found.sizes], "o-", ms=4, label="best ladder")
    chosen = found.chosen.planned
    costs.plot([chosen.buckets], [chosen.ratio], "o", ms=10, mfc="none", label="proposed")
    for marker, (name, other) in zip("xs^", found.baselines.items(), strict=False):
        costs.plot([other.buckets], [other.ratio], marker, color="grey", label=f"{name}: {other.ratio:.2f}")
    costs.set(xlabel="rungs", ylabel="cost / unpadded", ylim=(1, None))
    costs.legend(frameon=False)
    for axes, step in zip(lengths, steps, strict=True):
        _histogram(axes, step, found.demand.weights[step])
        for rung in chosen.ladders[step]:
            axes.axvline(rung, color="tab:red", lw=1)
        axes.set(xlabel=f"{step}: tokens of a row; the ladder in red")
    _save(figure, path)


def draw_report(record: Mapping[str, Any], regret: Regret, path: Path) -> None:
    """Draw for each step what lengths were asked for, the buckets that ran, and the ladder that is proposed.

    Raises:
        UsageError: matplotlib is not installed, or the file cannot be written.
    """
    shapes = {f"{step} {B}": weights for (step, B), weights in calls_of(record).items()}
    figure = _figure(
        3 * len(shapes), f"{record['model']}: {output.count(record['runs'], 'run', 'runs')}, regret {regret.ratio:.2f}"
    )
    for axes, (shape, weights) in zip(
        figure.subplots(len(shapes), 1, squeeze=False)[:, 0], shapes.items(), strict=True
    ):
        _histogram(axes, shape, weights)
        own = sorted(int(name.split()[2]) for name in record["ran"] if name.rsplit(" ", 1)[0] == shape)
        for rungs, color, style in ((own, "black", "-"), (regret.best[shape], "tab:red", "--")):
            for rung in rungs:
                axes.axvline(rung, color=color, ls=style, lw=1)
        step, B = shape.split()
        rows = output.count(int(B), "row", "rows")
        axes.set(xlabel=f"{step}, {rows}: longest context of a call; black: what ran, red: what to build")
    _save(figure, path)


def _figure(height: float, title: str) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError("a plot needs matplotlib, which is not installed", hint=_INSTALL) from error
    figure = Figure(figsize=(8, height), layout="constrained")
    figure.suptitle(title)
    return figure


def _histogram(axes: Any, step: str, weights: Sequence[float]) -> None:
    width = max(1, len(weights) // _BINS)
    bars = [sum(weights[n : n + width]) for n in range(0, len(weights), width)]
    axes.bar(range(0, len(weights), width), bars, width=width, align="edge", color="tab:blue", alpha=0.6)
    axes.set(ylabel="calls", xlim=(0, len(weights)))


def _save(figure: Any, path: Path) -> None:
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(
            f"{path} is no kind of plot: {error}", hint="a name that ends in .png, .svg or .pdf"
        ) from error
