"""`nanogpt-buckets report`. Imports no torch."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from nanogpt_buckets.cli import output
from nanogpt_buckets.cli.options import output_options
from nanogpt_buckets.errors import BucketsError
from nanogpt_buckets.plan.bucket import Bucket
from nanogpt_buckets.regret import Regret, regret_of
from nanogpt_buckets.run.report import SUMMED, load_last_run
from nanogpt_buckets.run.traffic import recorded

# A regret below this is not worth compiling for.
_WORTH_A_WORD = 1.05


@click.command()
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE", help="Draw what was asked, as .png or .svg.")
@click.option("--prometheus", is_flag=True, help="Print sums over all runs as Prometheus reads them.")
@output_options
def report(plot: Path | None, prometheus: bool, as_json: bool) -> None:
    """Say what the last run on this machine did: buckets, padding, switches, speed; and what all runs did together.

    A run is one generate or score command, or one Engine from load to close. Regret is what all runs of the model cost,
    over what the ladder would have cost that `plan --from-report` proposes. Counts are kept, never text;
    NANOGPT_BUCKETS_RECORD=off keeps none.

    Example: nanogpt-buckets report
    """
    run = load_last_run()
    names = {"model": run["model"], "backend": run["backend"]}
    record = next((r for r in recorded() if r.items() >= names.items()), None)
    regret = regret_of(record) if record is not None else None
    if plot is not None:
        if record is None or regret is None:
            raise BucketsError(f"nothing is recorded of {run['model']}", hint="run it once more")
        from nanogpt_buckets.cli.plots import draw_report

        draw_report(record, regret, plot)
        output.say(f"the plot is in {plot}")
    if prometheus:
        output.put("".join(f"{line}\n" for line in _metrics(run["all"], recorded())))
        return
    if as_json:
        output.document(run | {"regret": regret.to_json() if regret else None})
        return
    _show(run, regret)


def _show(run: Mapping[str, Any], regret: Regret | None) -> None:
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
        (
            "regret",
            f"{regret.ratio:.2f} times what the ladder costs that plan would propose, over all runs"
            if regret
            else "not recorded",
        ),
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
            f"{r['p50_ms']:.2f} ms",
            f"{r['p95_ms']:.2f} ms",
        )
        for r in run["buckets"]
    ]
    output.table(("BUCKET", "STEPS", "TOKENS PER ROW", "REAL TOKENS", "PADDED TOKENS", "P50", "P95"), rows)
    for each in run["replaced"]:
        bucket = Bucket(each["batch_size"], each["seq_len"], each["step"])
        output.say(f"a longer bucket ran in place of {bucket}, which is {each['why']}")
    _sums(run["all"])
    if regret is not None and regret.ratio >= _WORTH_A_WORD:
        output.say(f"hint: {1 - 1 / regret.ratio:.0%} of the cost would be saved by: {regret.command}")


def _sums(every: Mapping[str, Any]) -> None:
    """Say what all runs did together."""
    positions = every["real_tokens"] + every["padded_tokens"]
    output.say(
        f"{output.count(every['runs'], 'run', 'runs')} in {output.age(time.time() - every['since'])}: "
        f"{output.count(every['hits'], 'hit', 'hits')} ({_counts(every['tiers']) or 'none'}), "
        f"{every['compiled']} compiled, not loaded: {_counts(every['misses']) or 'none'}; "
        f"{every['saved_s']:.0f} s of compiling saved"
    )
    output.say(
        f"in all {output.count(every['steps'], 'step', 'steps')}, "
        f"{100 * every['padded_tokens'] / max(positions, 1):.0f} % of {positions} positions padding, "
        f"{output.count(every['switches'], 'switch', 'switches')}, {output.count(every['crops'], 'crop', 'crops')}, "
        f"{output.count(every['promotions'], 'promotion', 'promotions')}"
    )


def _metrics(every: Mapping[str, Any], records: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Yield Prometheus's text format: counters over all runs, and calls of each bucket by model."""
    for name in ("runs", *SUMMED):
        metric = f"nanogpt_buckets_{name.removesuffix('_s') + '_seconds' if name.endswith('_s') else name}_total"
        yield f"# TYPE {metric} counter"
        yield f"{metric} {every[name]:g}"
    labelled = [
        (f'model="{_label(record["model"])}",backend="{record["backend"]}",dtype="{record["dtype"]}"', record)
        for record in records
    ]
    yield "# TYPE nanogpt_buckets_calls_total counter"
    for labels, record in labelled:
        for bucket, times in sorted(record["ran"].items()):
            step, batch_size, seq_len = bucket.split()
            own = f'step="{step}",batch_size="{batch_size}",seq_len="{seq_len}"'
            yield f"nanogpt_buckets_calls_total{{{labels},{own}}} {times}"
    yield "# TYPE nanogpt_buckets_regret_ratio gauge"
    for labels, record in labelled:
        yield f"nanogpt_buckets_regret_ratio{{{labels}}} {regret_of(record).ratio:g}"


def _label(text: str) -> str:
    """Return text as a label's value may hold it."""
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
