"""`nanogpt-buckets report`. Imports no torch."""

from __future__ import annotations

import time
from typing import Any

import click

from nanogpt_buckets.cli import output
from nanogpt_buckets.cli.options import output_options
from nanogpt_buckets.run.report import load_last_run


@click.command()
@output_options
def report(as_json: bool) -> None:
    """Say what the last run on this machine did: buckets, padding, switches, speed.

    A run is one generate command, or one Engine from load to close.

    Example: nanogpt-buckets report
    """
    run = load_last_run()
    if as_json:
        output.document(run)
        return
    output.table(("FIELD", "VALUE"), _summary(run))
    output.data("")
    rows = [
        (f"{r['batch_size']}x{r['seq_len']}", r["steps"], _per_row(r), r["real_tokens"], _padded(r), _per_step(r))
        for r in run["buckets"]
    ]
    output.table(("BUCKET", "STEPS", "TOKENS PER ROW", "REAL TOKENS", "PADDED TOKENS", "TIME PER STEP"), rows)


def _summary(run: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        ("model", run["model"]),
        ("backend", run["backend"]),
        ("ended", f"{output.age(time.time() - run['ended'])} ago"),
        ("buckets loaded", f"{run['hits']} that were built already, {run['compiled']} compiled for this run"),
        ("new tokens", f"{run['new_tokens']}"),
        ("speed", f"{run['tokens_per_s']:.1f} tokens/s"),
        ("steps", f"{run['steps']}, each with {1000 * run['overhead_s']:.2f} ms outside its bucket (sampling, text)"),
        ("real tokens", f"{run['real_tokens']}"),
        ("padded tokens", f"{run['padded_tokens']} ({100 * run['waste']:.0f} % waste)"),
        ("switches", f"{run['switches']} (steps in another bucket than the step before)"),
        ("crops", f"{run['crops']} (contexts cut to block_size)"),
        ("promotions", f"{run['promotions']} (calls that ran longer buckets, for want of the right one)"),
        ("seed", f"{run['seed']}"),
    ]


def _padded(row: dict[str, Any]) -> int:
    return int(row["steps"] * row["batch_size"] * row["seq_len"] - row["real_tokens"])


def _per_row(row: dict[str, Any]) -> str:
    """Return how full the bucket was on average: where that is far below its length, a shorter one would pay."""
    return f"{row['real_tokens'] / row['rows']:.0f} of {row['seq_len']}"


def _per_step(row: dict[str, Any]) -> str:
    return f"{1000 * row['seconds'] / row['steps']:.2f} ms"
