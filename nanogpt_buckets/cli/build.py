"""`nanogpt-buckets build`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import Executor
from pathlib import Path

import click

from nanogpt_buckets.backends.base import TUNINGS
from nanogpt_buckets.builder import build_missing
from nanogpt_buckets.built import BuildReport
from nanogpt_buckets.choice import Options, choose, default_plan
from nanogpt_buckets.cli import output
from nanogpt_buckets.cli.options import (
    PlanOptions,
    Shard,
    fitted,
    grid,
    model_options,
    output_options,
    plan_options,
    read_plan,
    sign_options,
)
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
@click.option(
    "--shard", type=Shard(), help="Build only part I of N of the plan, counted from 1, as other machines do the rest."
)
@click.option("--scheduler", metavar="ADDRESS", help="Compile on the workers of this Dask scheduler: tcp://HOST:PORT.")
@click.option(
    "--lock", type=click.Path(path_type=Path), metavar="FILE",
    help="Write keys and digests of these buckets into this file, for --locked; added to what it names.",
)  # fmt: skip
@sign_options
@output_options
def build(
    wanted: PlanOptions,
    model: str,
    options: Options,
    jobs: int | None,
    tune: str,
    shard: tuple[int, int] | None,
    scheduler: str | None,
    lock: Path | None,
    sign_key: Path | None,
    sign_command: str | None,
    as_json: bool,
) -> int:
    """Compile the buckets that are not built yet.

    Without --seq or --plan: the saved plan, which earlier builds made, or block_size/8, /4, /2 and block_size where
    there is none, in each batch size of --batch. Needs neither weights nor network. The buckets are added to the
    model's default plan, which generate and score use.

    With --shard I/N what is saved is not looked at: name the plan, the same one for every shard.

    Example: nanogpt-buckets build --model demo --seq 32,64,128
    """
    plan = read_plan(wanted)
    options["strategy"] = wanted["strategy"]
    choice = choose(model, lock=lock, sign_key=sign_key, sign_command=sign_command, **options)
    plan = fitted(plan, choice) or grid(wanted, choice)
    if plan is None:
        # what is saved here may not be what is saved where the other shards are built
        saved = default_plan(choice) if shard is None else None
        strategy = choice.strategy(wanted["strategy"])
        shortest = SHORTEST.get(strategy, 1)
        lengths = sorted({b.seq_len for b in saved or () if b.seq_len >= shortest})
        lengths = lengths or default_ladder(choice.model.architecture.block_size, shortest)
        ladder = Plan.grid(batch=wanted["batch"], seq=lengths, strategy=strategy)
        plan = saved if saved and (wanted["batch"], wanted["strategy"]) == ((1,), "auto") else ladder
    plan = plan.completed(choice.model.architecture.block_size)
    try:
        with _workers(scheduler) as executor, output.BuildProgress() as update:
            report = build_missing(
                choice, plan, jobs=jobs, executor=executor, tune=tune, shard=shard, on_progress=update
            )
    except KeyboardInterrupt:
        output.say("finished buckets are kept; the same command goes on from there")
        raise
    if shard is not None:
        output.say(f"shard {shard[0]}/{shard[1]} of the plan: {len(report.rows)} of {len(plan)} buckets")
    if lock is not None:
        output.say(f"{lock} is left as it was" if report.failed else f"locked in {lock}")
    if as_json:
        output.document(report.to_json())
    else:
        _show(report)
    _say_failures(report)
    return CompileFailed.exit_code if report.failed else 0


def _say_failures(report: BuildReport) -> None:
    for row in report.rows:
        if row.state == "failed":
            output.error(CompileFailed(f"bucket {row.bucket} was not built: {row.why}", hint=row.hint))
            if (instead := report.instead(row)) is not None:
                output.say(f"until it is, steps that would run in it run in a longer one, such as {instead}")
        if row.log:
            output.say(f"bucket {row.bucket}: end of the compiler's log:\n{row.log.rstrip()}", output.VERBOSE)


@contextlib.contextmanager
def _workers(scheduler: str | None) -> Iterator[Executor | None]:
    """Yield the workers of a scheduler, or None if this machine is to compile."""
    if scheduler is None:
        yield None
        return
    from nanogpt_buckets.cli.cluster import workers_of

    with workers_of(scheduler) as executor:
        yield executor


def _show(report: BuildReport) -> None:
    rows = [
        (
            row.bucket,
            row.state,
            "" if row.state == "hit" else f"{row.seconds:.1f} s",
            output.size(row.peak_bytes) if row.peak_bytes else "",
            output.size(row.size_bytes),
            row.key[:12],
        )
        for row in report.rows
    ]
    output.table(("BUCKET", "STATE", "TIME", "PEAK", "SIZE", "KEY"), rows)
    counts = f"{output.count(report.hits, 'hit', 'hits')}, {report.compiled} compiled, {report.failed} failed"
    output.say(f"{report.model} on {report.backend} ({report.target}): {counts}, in {report.cache_dir}")
