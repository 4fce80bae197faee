"""`nanogpt-buckets plan`. Imports no torch."""

from __future__ import annotations

import functools
import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nanogpt_buckets.choice import Choice, Options, choose, default_plan
from nanogpt_buckets.cli import output
from nanogpt_buckets.cli.options import LimitOptions, WholeNumbers, limit_options, model_options, output_options
from nanogpt_buckets.costs import costs_of
from nanogpt_buckets.errors import BucketsError, UsageError
from nanogpt_buckets.files import replacing
from nanogpt_buckets.plan.bucket import STRATEGIES, Plan
from nanogpt_buckets.plan.ladder import default_ladder
from nanogpt_buckets.plan.planner import Planned
from nanogpt_buckets.plan.requests import read_requests
from nanogpt_buckets.plan.traffic import WORKLOADS, Request, workload
from nanogpt_buckets.planning import Calls, Limits, Proposal, demand_of, explain, propose
from nanogpt_buckets.run.traffic import demand_recorded, traffic_of

if TYPE_CHECKING:
    from nanogpt_buckets.model.tokenization.base import Tokenizer


@click.command()
@click.option("--lengths", type=click.Path(path_type=Path), metavar="FILE", help="Requests, as JSON lines or .csv.")
@click.option("--workload", type=click.Choice(list(WORKLOADS)), help="Requests of a usual kind instead.")
@click.option("--from-report", is_flag=True, help="What runs on this machine asked for, as `report` has counted it.")
@click.option(
    "--strategy",
    type=click.Choice(["auto", *STRATEGIES]),
    default="auto",
    show_default=True,
    help="Whether prompts are run once and remembered, or the whole context for each token.",
)
@click.option("--batch", type=WholeNumbers(), default="1", show_default=True, help="Batch sizes of every length.")
@limit_options
@click.option(
    "--plot", type=click.Path(path_type=Path), metavar="FILE", help="Draw costs and lengths, as .png or .svg."
)
@click.option("--save", type=click.Path(path_type=Path), metavar="FILE", help="Write the plan, for --plan elsewhere.")
@click.option("--explain", type=click.IntRange(min=1), metavar="LEN", help="Say where a step of LEN tokens runs now.")
@model_options
@output_options
def plan(
    lengths: Path | None,
    workload: str | None,
    from_report: bool,
    batch: tuple[int, ...],
    limits: LimitOptions,
    plot: Path | None,
    save: Path | None,
    explain: int | None,
    model: str,
    options: Options,
    as_json: bool,
) -> None:
    """Choose the buckets that cost the requests to come the least, before anything is compiled.

    The ladder is the best there is for its size. Costs are against a bucket for every length, so 1.00 is no padding at
    all. Without a limit, buckets are added while each saves 2 % or more. Files hold prompt_tokens, or a prompt, and
    generated_tokens on each line. With --explain: where a step runs in the plan that is saved, and what comes next.

    Example: nanogpt-buckets plan --workload chat --max-buckets 5 --save plan.json
    """
    strategy = options.get("strategy", "auto")
    choice = choose(model, able=False, **options)
    if explain is not None:
        _explain(choice, strategy, explain, max(batch), as_json)
        return
    if (lengths is not None) + (workload is not None) + from_report != 1:
        raise UsageError("say which requests come", hint="--lengths FILE, --workload chat, or --from-report")
    most = Limits(**limits)
    requests, halves = list[Request](), None
    if from_report:
        record = traffic_of(choice)
        asked, source = demand_recorded(record), output.count(record["runs"], "recorded run", "recorded runs")
        steps = set(asked.weights)
        strategy = next((way for way in ("score", "recompute") if steps == {way}), "kv")
    else:
        requests, source = _requests(choice, lengths, workload)
        asked = demand_of(choice, requests, strategy)
    if len(requests) > 1:
        halves = demand_of(choice, requests[::2], strategy), demand_of(choice, requests[1::2], strategy)
    found = propose(choice, asked, most, strategy=strategy, batch=batch, halves=halves)
    document = found.chosen.plan.to_json(model=choice.model.name, source=f"plan {source}")
    if save is not None:
        _write(save, document)
    if plot is not None:
        from nanogpt_buckets.cli.plots import draw_plan

        draw_plan(found, f"{choice.model.name}, {source}", plot)
    if as_json:
        output.document(document | found.to_json() | {"requests": len(requests)})
    else:
        _show(choice, found, source, len(requests))
    if most.max_buckets is not None and most.max_buckets > len(found.sizes[-1].plan):
        output.say(f"of {most.max_buckets} buckets only {len(found.sizes[-1].plan)} are of use")
    for path, what in ((save, "the plan"), (plot, "the plot")):
        if path is not None:
            output.say(f"{what} is in {path}")


def _requests(choice: Choice, lengths: Path | None, kind: str | None) -> tuple[list[Request], str]:
    """Return the requests that were asked for, and where they are from."""
    if lengths is None:
        assert kind is not None
        return workload(kind, choice.model.architecture.block_size), f"workload {kind}"

    @functools.cache
    def tokenizer() -> Tokenizer:
        from nanogpt_buckets.model.tokenization.choice import tokenizer_for

        return tokenizer_for(choice.model)

    return read_requests(lengths, lambda prompt: len(tokenizer().encode(prompt))), str(lengths)


def _write(path: Path, document: Any) -> None:
    try:
        with replacing(path) as file:
            file.write(json.dumps(document, indent=2).encode("ascii") + b"\n")
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}") from error


def _show(choice: Choice, found: Proposal, source: str, requests: int) -> None:
    planned, estimate = found.chosen.planned, found.chosen.estimate
    asked = f"{requests} of {source}" if requests else source
    rows = [(step, len(ladder), " ".join(map(str, ladder))) for step, ladder in planned.ladders.items()]
    output.table(("STEP", "RUNGS", "LADDER"), rows)
    output.data("")
    others = ", ".join(f"{name} {other.ratio:.2f} ({_rungs(other)})" for name, other in found.baselines.items())
    more = "none left" if found.break_even is None else f"pays after {found.break_even:,.0f} steps"
    held_out = "" if found.held_out is None else f"; held-out requests {found.held_out:.2f}"
    output.table(
        ("FIELD", "VALUE"),
        [
            ("model", f"{choice.model.name} on {choice.backend_name}, {choice.dtype}"),
            ("requests", f"{asked}: {found.demand.steps:,.0f} steps, {found.demand.crops:,.0f} cropped"),
            ("buckets", f"{len(found.chosen.plan)}, for {found.bound}"),
            ("cost", f"{planned.ratio:.2f} of unpadded ({_rungs(planned)}{held_out})"),
            ("others' cost", others),
            ("waste", f"{planned.waste:.1%} of positions"),
            ("compiling", f"{estimate.compile_s:.0f} s, one by one"),
            ("disk", output.size(estimate.disk_bytes)),
            ("device", output.size(estimate.device_bytes)),
            ("one more bucket", more),
        ],
    )
    output.data("")
    cells = [
        (len(size.plan), f"{size.planned.ratio:.2f}", f"{size.planned.waste:.1%}", "<" if size is found.chosen else "")
        for size in found.sizes
    ]
    output.table(("BUCKETS", "COST", "WASTE", ""), cells)
    for line in found.assumptions:
        output.say(line)


def _rungs(planned: Planned) -> str:
    return output.count(planned.buckets, "rung", "rungs")


def _where(calls: Calls) -> str:
    times = Counter(calls)
    return ", ".join(
        (f"{times[bucket, rows]} times " if times[bucket, rows] > 1 else "") + f"{rows} in {bucket}"
        for bucket, rows in times
    )


def _explain(choice: Choice, strategy: str, length: int, rows: int, as_json: bool) -> None:
    saved = None
    try:
        saved = default_plan(choice)
    except BucketsError as error:
        output.say(f"the saved plan cannot be used: {error.message}")
    way = choice.strategy(strategy)
    M = choice.model.architecture.block_size
    buckets = saved or Plan.grid(seq=default_ladder(M), strategy=way).completed(M)
    if length > M:
        output.say(f"{length} tokens are cropped to the last {M}")
    found = list(explain(choice, buckets, length, rows))
    if as_json:
        output.document(
            [
                {
                    "step": each.step,
                    "calls": [{"bucket": bucket.to_json(), "rows": count} for bucket, count in each.calls],
                    "padded_tokens": each.padded_tokens,
                    "cost_ms": each.cost,
                    "runner_up": [{"bucket": bucket.to_json(), "rows": count} for bucket, count in each.runner_up],
                    "runner_up_cost_ms": each.runner_up_cost if each.runner_up else None,
                }
                for each in found
            ]
        )
        return
    cells = []
    for each in found:
        if each.calls:
            second = "none"
            if each.runner_up:
                second = f"{_where(each.runner_up)}: {each.runner_up_cost / each.cost:.2f} times that"
            cells.append((each.step, _where(each.calls), each.padded_tokens, f"{each.cost:.2f} ms", second))
        else:
            output.say(f"no {each.step} bucket holds {min(length, M)} tokens: {choice.build_command()} --seq {M}")
    output.table(("STEP", "ROWS IN BUCKETS", "PADDED TOKENS", "COST", "NEXT BEST"), cells)
    output.say("of the saved plan" if saved else "nothing is planned yet: of the ladder that build would take")
    for line in costs_of(choice).said:
        output.say(line)
