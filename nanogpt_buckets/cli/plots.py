"""Plots of plans, as files. Needs matplotlib, which the extra "plot" brings. Knows nothing of how plans are made."""

from __future__ import annotations

from pathlib import Path

from nanogpt_buckets.errors import UsageError
from nanogpt_buckets.planning import Proposal

_INSTALL = "pip install 'nanogpt-buckets[plot]'"
_BINS = 128


def draw_plan(found: Proposal, title: str, path: Path) -> None:
    """Draw cost against the number of buckets, and for each step its lengths with the ladder.

    Raises:
        UsageError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError("a plot needs matplotlib, which is not installed", hint=_INSTALL) from error
    steps = [step for step, weights in found.demand.weights.items() if sum(map(bool, weights)) > 1]
    figure = Figure(figsize=(8, 3 + 2.5 * len(steps)), layout="constrained")
    figure.suptitle(title)
    costs, *lengths = figure.subplots(1 + len(steps), 1, squeeze=False)[:, 0]
    counts = [len(size.plan) for size in found.sizes]
    costs.plot(counts, [size.planned.ratio for size in found.sizes], "o-", ms=4, label="best ladder")
    chosen = len(found.chosen.plan)
    costs.plot([chosen], [found.chosen.planned.ratio], "o", ms=10, mfc="none", label="proposed")
    for style, (name, ratio) in zip((":", "--", "-."), found.baselines.items(), strict=False):
        if ratio < 2 * found.sizes[0].planned.ratio:
            costs.axhline(ratio, ls=style, lw=1, color="grey", label=f"{name}: {ratio:.2f}")
    costs.set(xlabel="buckets", ylabel="cost / unpadded", ylim=(1, None))
    costs.legend(frameon=False)
    for axes, step in zip(lengths, steps, strict=True):
        weights = found.demand.weights[step]
        width = max(1, len(weights) // _BINS)
        bars = [sum(weights[n : n + width]) for n in range(0, len(weights), width)]
        axes.bar(range(0, len(weights), width), bars, width=width, align="edge", color="tab:blue", alpha=0.6)
        for rung in found.chosen.planned.ladders[step]:
            axes.axvline(rung, color="tab:red", lw=1)
        axes.set(xlabel=f"{step}: tokens of a row; the ladder in red", ylabel="steps", xlim=(0, len(weights)))
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(
            f"{path} is no kind of plot: {error}", hint="a name that ends in .png, .svg or .pdf"
        ) from error
