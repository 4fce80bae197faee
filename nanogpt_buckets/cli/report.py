"""`nanogpt-buckets report`. Imports no torch."""

from __future__ import annotations

import time
from collections.abc import Mapping

import click

from nanogpt_buckets.cli import output
from nanogpt_buckets.cli.options import output_options
from nanogpt_buckets.plan.bucket import Bucket
from nanogpt_buckets.run.report import load_last_run


@click.command()
@output_options
def report(as_json: bool) -> None:
    """Say what the last run on this machine did: buckets, padding, switches, speed; and what all runs did together.

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
        ("came from", _counts(run["tiers"]) or "nowhere"),
        ("could not be loaded", _counts(run["misses"]) or "none"),
        ("saved", f"{run['saved_s']:.0f} s that compiling them took"),
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
    every = run["all"]
    output.say(
        f"{output.count(every['runs'], 'run', 'runs')} in {output.age(time.time() - every['since'])}: "
        f"{output.count(every['hits'], 'hit', 'hits')} ({_counts(every['tiers']) or 'none'}), "
        f"{every['compiled']} compiled, not loaded: {_counts(every['misses']) or 'none'}; "
        f"{every['saved_s']:.0f} s of compiling saved"
    )
    output.table(("BUCKET", "STEPS", "TOKENS PER ROW", "REAL TOKENS", "PADDED TOKENS", "TIME PER STEP"), rows)


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
