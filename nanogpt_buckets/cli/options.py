"""Option types and groups of options that several commands share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from nanogpt_buckets.backends import BACKENDS
from nanogpt_buckets.backends.base import DTYPES
from nanogpt_buckets.errors import PlanError
from nanogpt_buckets.plan.bucket import Plan

Command = TypeVar("Command", bound=Callable[..., Any])


class WholeNumbers(click.ParamType[tuple[int, ...]]):
    """Positive whole numbers separated by commas: 32,64,128."""

    name = "N,N,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """Return the numbers, in the order given."""
        if isinstance(value, tuple):
            return value
        numbers = []
        for text in str(value).split(","):
            if not text.strip().isdecimal() or not text.strip().isascii() or int(text) < 1:
                self.fail(f"{text.strip()!r} is not a positive whole number; write for example 32,64,128", param, ctx)
            numbers.append(int(text))
        return tuple(numbers)


def model_options(command: Command) -> Command:
    """Add --model, --backend, --target, --dtype and --cache-dir."""
    for option in reversed(
        (
            click.option(
                "-m", "--model", default="gpt2", show_default=True, metavar="NAME|PATH",
                help="gpt2, gpt2-medium, gpt2-large, gpt2-xl, demo, a Hugging Face folder, or a nanoGPT ckpt.pt.",
            ),
            click.option(
                "--backend", default="auto", show_default=True, type=click.Choice(["auto", *BACKENDS, "neuron"])
            ),
            click.option("--target", metavar="TARGET", help="What to generate code for. Default: this CPU's level."),
            click.option("--dtype", default="float32", show_default=True, type=click.Choice(DTYPES)),
            cache_dir_option,
        )
    ):  # fmt: skip
        command = option(command)
    return command


def plan_options(command: Command) -> Command:
    """Add --seq, --batch and --plan."""
    for option in reversed(
        (
            click.option("--seq", type=WholeNumbers(), help="Sequence lengths, for example 32,64,128."),
            click.option("--batch", type=WholeNumbers(), default="1", show_default=True, help="Batch sizes."),
            click.option(
                "--plan", "plan_file", type=click.Path(path_type=Path), metavar="FILE", help="A plan.json instead."
            ),
        )
    ):
        command = option(command)
    return command


cache_dir_option = click.option(
    "--cache-dir", type=click.Path(path_type=Path), metavar="DIR",
    help="Directory of compiled buckets. Default: $NANOGPT_BUCKETS_CACHE_DIR, else the user's cache directory.",
)  # fmt: skip
json_option = click.option("--json", "as_json", is_flag=True, help="Print the data as one JSON document.")


def read_plan(seq: tuple[int, ...] | None, batch: tuple[int, ...], plan_file: Path | None) -> Plan | None:
    """Return the plan that --seq, --batch and --plan describe, or None if neither --seq nor --plan was given.

    Raises:
        PlanError: both were given, or the file is no plan.
    """
    if plan_file is None:
        return None if seq is None else Plan.grid(batch=batch, seq=seq)
    if seq is not None:
        raise PlanError("--seq and --plan say the same thing twice", hint="give one of them")
    try:
        return Plan.from_json(json.loads(plan_file.read_text(encoding="utf-8")))
    except OSError as error:
        raise PlanError(f"the plan file {plan_file} cannot be read: {error.strerror}") from None
    except ValueError as error:
        if isinstance(error, PlanError):
            raise
        raise PlanError(f"the plan file {plan_file} is not JSON") from None
