"""`nanogpt-buckets bench`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from nanogpt_buckets.choice import Options, choose, default_plan
from nanogpt_buckets.cli import output
from nanogpt_buckets.cli.options import (
    PlanOptions,
    fitted,
    grid,
    model_options,
    output_options,
    plan_options,
    read_plan,
)
from nanogpt_buckets.costs import LEAST, Costs, save_costs
from nanogpt_buckets.errors import UsageError
from nanogpt_buckets.model.checkpoint import open_model
from nanogpt_buckets.plan.bucket import Plan
from nanogpt_buckets.plan.ladder import default_ladder
from nanogpt_buckets.selection import Selection, explain_miss

if TYPE_CHECKING:
    from nanogpt_buckets.measure import Figures, Spread


# A step that takes so many times the median was interrupted.
_RESTLESS = 3


@click.command()
@plan_options
@model_options
@click.option("--runs", type=click.IntRange(min=1), default=20, show_default=True, help="Timed steps of each kind.")
@click.option(
    "--predict",
    is_flag=True,
    help="For a Neuron --target: what calls should take there, from published numbers. Nothing is built or run.",
)
@click.option("--save", is_flag=True, help="Keep the times on this machine: plan then goes by them.")
@output_options
def bench(
    wanted: PlanOptions, model: str, options: Options, runs: int, predict: bool, save: bool, as_json: bool
) -> None:
    """Time each built bucket and compare it with the eager model: speed-up and difference of what they return.

    Without --seq or --plan: what is built of the model's default plan. Compiled and eager steps take turns; figures are
    medians, with the smallest and largest in brackets. LOAD is reading, verifying and opening the library, its weights
    at hand. TOKENS/S counts steps alone, tokens chosen or scored. Differences are of logits, or log-probabilities,
    absolute; what a bucket must keep to is relative: 2e-5 of the largest in float32. Exit 3 if a bucket is not built.

    With --save: plan, report, dispatch and plan --explain go by these times, where three buckets of a step or more were
    timed; those within 5 % of a longer one count as one with it.

    With --predict: for a Neuron target, bytes moved and arithmetic of each call, and the time these take at the least.

    Example: nanogpt-buckets bench --model demo
    """
    if predict:
        _predict(wanted, model, options, as_json)
        return
    plan = read_plan(wanted)
    options["strategy"] = wanted["strategy"]
    choice = choose(model, **options)
    plan = fitted(plan, choice) or grid(wanted, choice)
    selection = Selection(choice)
    usable = selection.usable
    asked = plan or default_plan(choice) or sorted(usable)
    missing = [bucket for bucket in asked if bucket not in usable]
    built = [bucket for bucket in asked if bucket in usable]
    if not built or (plan and missing):
        lacking = f"bucket {', '.join(map(str, missing))} {'are' if len(missing) > 1 else 'is'} not built"
        raise explain_miss(choice, selection, lacking if missing else "no bucket is built", missing if plan else [])
    with output.ending_at_once():
        from nanogpt_buckets.measure import measure

    weights = choice.model.weights(choice.dtype).tensors
    with output.progress("measuring", runs * len(built)) as advance:
        figures = [measure(selection, b, weights, runs=runs, on_run=advance) for b in built]
    if save:
        _say_costs(save_costs(choice, [(figure.bucket, figure.step_ms.median) for figure in figures]))
    if as_json:
        names = {"model": choice.model.name, "backend": choice.backend_name, "dtype": choice.dtype, "runs": runs}
        output.document(names | {"buckets": [figure.to_json() for figure in figures]})
    else:
        _show(figures)
    if any(times.max > _RESTLESS * times.median for f in figures for times in (f.step_ms, f.eager_ms)):
        output.say("note: some steps took several times the median: this machine does something else as well")
    for bucket in missing:
        output.say(f"bucket {bucket} is in the plan and not built")


def _say_costs(costs: Costs) -> None:
    """Say what follows from the times that are kept."""
    output.say(f"kept; {costs.said[0]}")
    for bucket, stands in sorted(costs.merged.items()):
        output.say(f"{bucket} costs what {stands} does, within 5 %: plans see one in both")
    for step, count in sorted(costs.too_few.items()):
        output.say(
            f"of {step} {output.count(count, 'bucket is', 'buckets are')} measured; plan goes by {LEAST} or more"
        )


def _predict(wanted: PlanOptions, model: str, options: Options, as_json: bool) -> None:
    from nanogpt_buckets.backends.neuron import predict

    target, dtype = options.get("target"), options.get("dtype", "float32")
    if target is None:
        raise UsageError("--predict needs a target", hint="for example --target trn1")
    arch = open_model(model).architecture
    if (plan := read_plan(wanted)) is None:
        lengths = wanted["seq"] or default_ladder(arch.block_size)
        chosen = ["recompute", "kv"] if wanted["strategy"] == "auto" else [wanted["strategy"]]
        ways = ["chunk" if way == "kv" else way for way in chosen]
        plan = Plan(b for way in ways for b in Plan.grid(batch=wanted["batch"], seq=lengths, strategy=way))
    found = predict.predict(arch, dtype, target, plan.check(arch.block_size))
    said = predict.assumptions(dtype, target)
    if as_json:
        names = {"model": model, "target": target, "dtype": dtype, "assumptions": said}
        output.document(names | {"buckets": [each.to_json() for each in found]})
        return
    rows = []
    for each in found:
        moved, arithmetic = output.size(each.moved_bytes), f"{2 * each.macs / 1e9:.2f}"
        rows.append((each.bucket, moved, arithmetic, each.bound, _range(each.call_ms), _range(each.token_ms)))
    output.table(("BUCKET", "MOVED", "GFLOP", "BOUND BY", "CALL", "TOKEN"), rows)
    for line in said:
        output.say(line)


def _range(ms: tuple[float, float]) -> str:
    return f"{ms[0]:.2f} to {ms[1]:.2f} ms"


def _show(figures: list[Figures]) -> None:
    headers = ("BUCKET", "SIZE", "LOAD", "STEP", "TOKENS/S", "EAGER STEP", "SPEED-UP", "MAX ABS DIFF", "MEAN ABS DIFF")
    rows = [
        (
            f.bucket,
            output.size(f.bytes),
            f"{f.load_ms.median:.1f} ms",
            _spread(f.step_ms),
            f"{f.tokens_per_s:.1f}",
            _spread(f.eager_ms),
            f"{f.speed_up:.2f}x",
            f"{f.max_difference:.1e}",
            f"{f.mean_difference:.1e}",
        )
        for f in figures
    ]
    output.table(headers, rows)


def _spread(times: Spread) -> str:
    return f"{times.median:.2f} ms ({times.min:.2f}..{times.max:.2f})"
