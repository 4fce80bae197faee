"""`nanogpt-buckets report`. Imports no torch."""

from __future__ import annotations

import time

import click

from nanogpt_buckets.cli import output
from nanogpt_buckets.cli.options import output_options
from nanogpt_buckets.plan.bucket import Bucket
from nanogpt_buckets.run.report import load_last_run


@click.command()
@output_options
def report(as_json: bool) -> None:
    """Say what the last run on this machine did: buckets, padding, switches, speed.

    A run is one generate or score command, or one Engine from load to close.

    Example: nanogpt-buckets report
    """
    run = load_last_run()
    if as_json:
        output.document(run)
        return
    summary = [
        ("model", run["model"]),
        ("backend", run["backend"]),
        ("ended", f"{output.age(time.time() - run['ended'])} ago"),
        ("buckets loaded", f"{run['hits']} that were built already, {run['compiled']} compiled for this run"),
        ("new tokens", run["new_tokens"]),
        ("scored tokens", run.get("scored_tokens", 0)),
        ("speed", f"{run['tokens_per_s']:.1f} tokens/s"),
        ("steps", f"{run['steps']}, each with {1000 * run['overhead_s']:.2f} ms outside its bucket (sampling, text)"),
        ("real tokens", run["real_tokens"]),
        ("padded tokens", f"{run['padded_tokens']} ({100 * run['waste']:.0f} % waste)"),
        ("switches", f"{run['switches']} (steps in another bucket than the step before)"),
        ("crops", f"{run['crops']} (contexts cut to block_size)"),
        ("promotions", f"{run['promotions']} (calls that ran longer buckets, for want of the right one)"),
        ("remembered", f"{output.size(run['kv_bytes'])} of keys and values at most"),
        ("seed", run["seed"]),
    ]
    output.table(("FIELD", "VALUE"), summary)
    output.data("")
    # where a bucket holds far fewer tokens per row than its length, a shorter one would pay
    rows = [
        (
            str(Bucket(r["batch_size"], r["seq_len"], r["step"])),
            r["steps"],
            f"{r['real_tokens'] / r['rows']:.0f} of {r['positions'] // r['batch_size']}",
            r["real_tokens"],
            r["steps"] * r["positions"] - r["real_tokens"],
            f"{1000 * r['seconds'] / r['steps']:.2f} ms",
        )
        for r in run["buckets"]
    ]
    output.table(("BUCKET", "STEPS", "TOKENS PER ROW", "REAL TOKENS", "PADDED TOKENS", "TIME PER STEP"), rows)
