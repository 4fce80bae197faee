"""`nanogpt-buckets build`."""

from __future__ import annotations

import click

from nanogpt_buckets.backends.base import TUNINGS
from nanogpt_buckets.builder import BuildReport, build_missing
from nanogpt_buckets.choice import Options, choose, default_plan
from nanogpt_buckets.cli import output
from nanogpt_buckets.cli.options import PlanOptions, model_options, output_options, plan_options, read_plan
from nanogpt_buckets.errors import CompileFailed
from nanogpt_buckets.plan.bucket import SHORTEST, Plan
from nanogpt_buckets.plan.ladder import default_ladder


@click.command()
@plan_options
@model_options
@click.option("-j", "--jobs", type=click.IntRange(min=1), help="Compiler processes at a time. Default: what fits.")
@click.option(
    "--tune", type=click.Choice(TUNINGS), default="off", show_default=True,
    help="fast: time the kernels on this machine first, which takes some seconds a bucket, and take the fastest.",
)  # fmt: skip
@output_options
def build(wanted: PlanOptions, model: str, options: Options, jobs: int | None, tune: str, as_json: bool) -> int:
    """Compile the buckets that are not built yet.

    Without --seq or --plan: the saved plan, which earlier builds made, or block_size/8, /4, /2 and block_size where
    there is none, in each batch size of --batch. Needs neither weights nor network. The buckets are added to the
    model's default plan, which generate and score use.

    Example: nanogpt-buckets build --model demo --seq 32,64,128
    """
    choice = choose(model, **options)
    plan = read_plan(wanted, choice)
    if plan is None:
        saved = default_plan(choice)
        strategy = choice.strategy(wanted["strategy"])
        shortest = SHORTEST.get(strategy, 1)
        lengths = sorted({b.seq_len for b in saved or () if b.seq_len >= shortest})
        lengths = lengths or default_ladder(choice.model.architecture.block_size, shortest)
        grid = Plan.grid(batch=wanted["batch"], seq=lengths, strategy=strategy)
        plan = saved if saved and (wanted["batch"], wanted["strategy"]) == ((1,), "auto") else grid
    plan = plan.completed(choice.model.architecture.block_size)
    try:
        with output.BuildProgress() as update:
            report = build_missing(choice, plan, jobs=jobs, tune=tune, on_progress=update)
    except KeyboardInterrupt:
        output.say("finished buckets are kept; the same command goes on from there")
        raise
    if as_json:
        output.document(report.to_json())
    else:
        _show(report)
    for row in report.rows:
        if row.state == "failed":
            output.error(CompileFailed(f"bucket {row.bucket} was not built: {row.why}", hint=row.hint))
        if row.log:
            output.say(f"bucket {row.bucket}: end of the compiler's log:\n{row.log.rstrip()}", output.VERBOSE)
    return CompileFailed.exit_code if report.failed else 0


def _show(report: BuildReport) -> None:
    rows = [
        (r.bucket, r.state, "" if r.state == "hit" else f"{r.seconds:.1f} s", output.size(r.size_bytes), r.key[:12])
        for r in report.rows
    ]
    output.table(("BUCKET", "STATE", "TIME", "SIZE", "KEY"), rows)
    counts = f"{output.count(report.hits, 'hit', 'hits')}, {report.compiled} compiled, {report.failed} failed"
    output.say(f"{report.model} on {report.backend} ({report.target}): {counts}, in {report.cache_dir}")
