"""`nanogpt-buckets status`."""

from __future__ import annotations

import click

from nanogpt_buckets.choice import Choice, Options, choose, default_plan
from nanogpt_buckets.cli import output
from nanogpt_buckets.cli.options import PlanOptions, model_options, output_options, plan_options, read_plan
from nanogpt_buckets.errors import CacheError
from nanogpt_buckets.plan.bucket import Bucket, Plan
from nanogpt_buckets.selection import Selection, explain_miss
from nanogpt_buckets.store.answer import Answer, Status


@click.command()
@plan_options
@model_options
@output_options
def status(wanted: PlanOptions, model: str, options: Options, as_json: bool) -> int:
    """Say for each bucket whether this machine could run it now. Exit 0 if all are warm, 1 if not.

    Without --seq or --plan: the model's default plan, else what is built. Every byte is verified, nothing is changed.

    Example: nanogpt-buckets status --model demo --seq 32,64,128
    """
    plan = read_plan(wanted)
    choice = choose(model, **options)
    selection = Selection(choice)
    plan = plan or default_plan(choice) or (Plan(selection.usable) if selection.usable else None)
    if plan is None:
        if selection.reasons():
            raise explain_miss(choice, selection, "nothing that is built can be used", [])
        raise CacheError(
            f"nothing is built or planned for model {choice.model.name} in {choice.store.root}",
            hint=f"give --seq or --plan, or {choice.build_command()}",
        )
    answers = {bucket: selection.best(bucket) for bucket in plan.check(choice.model.architecture.block_size)}
    warm = sum(answer.status is Status.WARM for answer in answers.values())
    if as_json:
        rows = [
            {"bucket": bucket.to_json(), "state": answer.status.value, "key": answer.key, "why": answer.why}
            for bucket, answer in answers.items()
        ]
        document = {"model": choice.model.name, "backend": choice.backend_name, "family": choice.family}
        output.document({**document, "warm": warm, "total": len(answers), "buckets": rows})
    else:
        lines = [(bucket, a.status.value, a.key[:12], a.why) for bucket, a in answers.items()]
        output.table(("BUCKET", "STATE", "KEY", "WHY"), lines)
        output.say(f"{warm} of {len(answers)} buckets warm for {choice.model.name} on {choice.backend_name}")
        _advise(choice, answers)
    return 0 if warm == len(answers) else 1


def _advise(choice: Choice, answers: dict[Bucket, Answer]) -> None:
    """Say what would mend what is not warm."""
    hints = {answer.hint for answer in answers.values() if answer.hint}
    lacking = [b for b, answer in answers.items() if answer.status in (Status.ABSENT, Status.CORRUPT)]
    for hint in sorted(hints) or ([choice.build_command(lacking)] if lacking else []):
        output.say(f"hint: {hint}")
