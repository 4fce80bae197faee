"""Option types and groups of options that several commands share."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypedDict, TypeVar

import click

from nanogpt_buckets.backends import BACKENDS
from nanogpt_buckets.backends.base import DTYPES
from nanogpt_buckets.choice import EAGER, Choice, Options
from nanogpt_buckets.cli import output
from nanogpt_buckets.errors import CorruptEntry, PlanError, UsageError
from nanogpt_buckets.files import read_file
from nanogpt_buckets.plan.bucket import PURPOSES, Plan
from nanogpt_buckets.run.options import RNGS, SamplingOptions
from nanogpt_buckets.settings import expanded
from nanogpt_buckets.store.document import MAX_BYTES, parse
from nanogpt_buckets.store.opening import MODES
from nanogpt_buckets.store.signers import Policy
from nanogpt_buckets.values import shown

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
            if re.fullmatch(r"\s*0*[1-9][0-9]{0,999}\s*", text) is None:
                self.fail(
                    f"{shown(text.strip())} is not a positive whole number; write for example 32,64,128", param, ctx
                )
            numbers.append(int(text))
        return tuple(numbers)


class Shard(click.ParamType[tuple[int, int]]):
    """One of several parts: 2/3. That there is such a part, whoever divides says."""

    name = "I/N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """Return both numbers."""
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", str(value), re.ASCII)
        if match is None:
            self.fail(f"{shown(value)} is no part of a whole; write for example 1/3", param, ctx)
        return int(match[1]), int(match[2])


class Amount(click.ParamType[float]):
    """A number with a unit, for example 30d; its value is in the smallest one."""

    def __init__(self, name: str, example: str, units: Mapping[str, float]) -> None:
        self.name, self._example, self._units = name, example, units

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the amount in the smallest unit."""
        if not isinstance(value, str):
            return float(value)
        match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)\s*([A-Za-z%]*)", value.strip(), re.ASCII)
        unit = self._units.get(match[2].lower()) if match else None
        if match is None or unit is None:
            self.fail(f"{shown(value)} is no amount; write for example {self._example}", param, ctx)
        return float(match[1]) * unit


TIME_SPAN = Amount("AGE", "30d or 12h", {"s": 1, "min": 60, "h": 3600, "d": 86400, "w": 7 * 86400})
SIZE = Amount("SIZE", "5GB or 500MB", {
    "": 1, "b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
})  # fmt: skip


class _Directory(click.Path):
    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("the name is empty; leave it out for the default directory", param, ctx)
        return super().convert(value, param, ctx)


_SHARE = Amount("W", "0.2 or 20%", {"": 1, "%": 0.01})

# A directory, which need not exist nor be readable; an empty name, as of an unset variable, is a mistake.
DIRECTORY = _Directory(path_type=Path, readable=False)


def added(*options: Callable[[Any], Any]) -> Callable[[Command], Command]:
    """Return a decorator that adds options to a command, in this order."""
    return lambda command: functools.reduce(lambda made, option: option(made), reversed(options), command)


def _together(name: str, keys: Iterable[str], *options: Callable[[Any], Any]) -> Any:
    """Return a decorator that adds options and hands the values of these keys on as one dictionary."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def gathered(**given: Any) -> Any:
            values = {key: given.pop(key) for key in keys if key in given}
            return command(**given, **{name: values})

        return added(*options)(gathered)

    return decorate


# Whose signatures count.
trust_options = added(
    click.option(
        "--trusted", multiple=True, metavar="KEY",
        help="A public key, or a file of keys, whose signatures count; may be repeated. Default: "
        "$NANOGPT_BUCKETS_TRUSTED. What trust add keeps counts, too.",
    ),
    click.option(
        "--policy", type=click.Choice([policy.value for policy in Policy]),
        help="What is asked where nobody else can write: nothing more, a warning, or a signature. Default: "
        "$NANOGPT_BUCKETS_POLICY, else off.",
    ),
)  # fmt: skip
# Who signs.
sign_options = added(
    click.option(
        "--sign-key", type=click.Path(path_type=Path), metavar="FILE",
        help="Sign with the Ed25519 private key in this file, in PEM.",
    ),
    click.option(
        "--sign-command", metavar="CMD",
        help="Sign with this command: it reads the statement and prints the signature.",
    ),
)  # fmt: skip

cache_dir_option = click.option(
    "--cache-dir", type=DIRECTORY, metavar="DIR",
    help="Directory of compiled buckets. Default: $NANOGPT_BUCKETS_CACHE_DIR, else the user's cache directory.",
)  # fmt: skip

layer_option = click.option(
    "--layer", "layers", multiple=True, type=DIRECTORY, metavar="DIR",
    help="A further cache directory to look in, never written; may be repeated. Default: $NANOGPT_BUCKETS_LAYERS.",
)  # fmt: skip

# --model, and the fields of `Options` as one argument, `options`.
model_options: Callable[[Command], Command] = _together(
    "options",
    Options.__annotations__,
    click.option(
        "-m", "--model", default="gpt2", show_default=True, metavar="NAME|PATH",
        help="gpt2, gpt2-medium, gpt2-large, gpt2-xl, demo, a Hugging Face folder, or a nanoGPT ckpt.pt.",
    ),
    click.option("--backend", default="auto", show_default=True, type=click.Choice(["auto", *BACKENDS, EAGER])),
    click.option(
        "--target", metavar="TARGET",
        help="What to generate code for: trn1, inf2, trn2, x86-64-v3, ... Default: this machine.",
    ),
    click.option("--dtype", default="float32", show_default=True, type=click.Choice(DTYPES)),
    click.option(
        "--compiler-args", default="", metavar="FLAGS", help="For neuronx-cc; they are part of a bucket's key."
    ),
    cache_dir_option,
    layer_option,
    click.option(
        "--remote", metavar="PLACE",
        help="Where to ask for what is not here: a directory, s3://BUCKET/PREFIX, gs://... or az://... Default: "
        "$NANOGPT_BUCKETS_REMOTE.",
    ),
    click.option(
        "--remote-mode", type=click.Choice(MODES),
        help="rw: publish there what is built. Default: $NANOGPT_BUCKETS_REMOTE_MODE, else ro.",
    ),
    trust_options,
)  # fmt: skip

# Goes above `model_options`, for what it says is one of the fields of `Options`.
locked_option = click.option(
    "--locked", type=click.Path(path_type=Path), metavar="FILE",
    help="Load nothing but what this lock file names, which build --lock wrote; never compile.",
)  # fmt: skip

# The fields of `Sampling` as one argument, `sampling`.
sampling_options: Callable[[Command], Command] = _together(
    "sampling",
    SamplingOptions.__annotations__,
    click.option("-t", "--temperature", type=float, default=0.8, show_default=True, help="0: the likeliest token."),
    click.option("-k", "--top-k", type=int, default=200, show_default=True, help="0 turns it off."),
    click.option("-p", "--top-p", type=float, help="Keep the likeliest tokens up to this probability."),
    click.option("-s", "--seed", type=int, help="Default: a new one each time, told on stderr."),
    click.option("--rng", type=click.Choice(RNGS), default="per-row", show_default=True),
    click.option("--ignore-eos", is_flag=True, help="Write on after the model's end token."),
)


class PlanOptions(TypedDict):
    """What --seq, --batch, --strategy and --plan say."""

    seq: tuple[int, ...] | None
    batch: tuple[int, ...]
    strategy: str
    plan_file: Path | None


# The fields of `PlanOptions` as one argument, `wanted`.
plan_options: Callable[[Command], Command] = _together(
    "wanted",
    PlanOptions.__annotations__,
    click.option("--seq", type=WholeNumbers(), help="Sequence lengths, for example 32,64,128."),
    click.option("--batch", type=WholeNumbers(), default="1", show_default=True, help="Batch sizes."),
    click.option(
        "--strategy",
        type=click.Choice(["auto", *PURPOSES]),
        default="auto",
        show_default=True,
        help="Buckets that run a prompt once and remember it, or the whole context for each token; auto: the former "
        "where the backend can.",
    ),
    click.option("--score", "strategy", flag_value="score", help="Buckets that score texts instead."),
    click.option("--plan", "plan_file", type=click.Path(path_type=Path), metavar="FILE", help="A plan.json instead."),
)


class LimitOptions(TypedDict):
    """What --max-buckets, --max-waste, --max-compile-seconds and --max-device-gb say."""

    max_buckets: int | None
    max_waste: float | None
    max_compile_seconds: float | None
    max_device_gb: float | None


# The fields of `LimitOptions` as one argument, `limits`.
limit_options: Callable[[Command], Command] = _together(
    "limits",
    LimitOptions.__annotations__,
    click.option("--max-buckets", type=int, metavar="K", help="Plan K buckets at most, of all steps together."),
    click.option("--max-waste", type=_SHARE, help="Plan as few buckets as pad so little."),
    click.option("--max-compile-seconds", type=float, metavar="T", help="Plan what compiles in T seconds, one by one."),
    click.option("--max-device-gb", type=float, metavar="G", help="Plan what takes G GB of a device's memory at most."),
)


def _set_verbosity(ctx: click.Context, param: click.Parameter, given: bool) -> None:
    if not given:
        return
    if "verbosity" in ctx.meta:
        raise UsageError("-q and -v contradict each other", hint="give one of them")
    ctx.meta["verbosity"] = output.QUIET if param.name == "quiet" else output.VERBOSE
    output.set_verbosity(ctx.meta["verbosity"])


# --json, -q and -v; the latter two take effect at once and are not passed on.
output_options: Callable[[Command], Command] = added(
    click.option("--json", "as_json", is_flag=True, help="Print the data as one JSON document."),
    click.option(
        "-q", "--quiet", is_flag=True, expose_value=False, callback=_set_verbosity,
        help="Say nothing but data and errors.",
    ),
    click.option(
        "-v", "--verbose", is_flag=True, expose_value=False, callback=_set_verbosity,
        help="Also say what is loaded, how long it took, and what a failed compiler said.",
    ),
)  # fmt: skip


def grid(wanted: PlanOptions, choice: Choice) -> Plan | None:
    """Return the plan that --seq, --batch and --strategy describe, or None without --seq."""
    if wanted["seq"] is None:
        return None
    return Plan.grid(batch=wanted["batch"], seq=wanted["seq"], strategy=choice.strategy(wanted["strategy"]))


def fitted(plan: Plan | None, choice: Choice) -> Plan | None:
    """Return a plan, made perhaps for a model of more positions, for this one: what is longer becomes as long."""
    M = choice.model.architecture.block_size
    if plan is None or max(bucket.seq_len for bucket in plan) <= M:
        return plan
    output.say(f"the plan has buckets longer than {choice.model.name}'s {M} positions; {M} takes their place")
    return plan.within(M)


def read_plan(wanted: PlanOptions) -> Plan | None:
    """Return the plan of a file, or None if --plan was not given.

    Raises:
        PlanError: --seq was given as well, or the file is no plan.
    """
    seq, plan_file = wanted["seq"], wanted["plan_file"]
    if plan_file is None:
        return None
    if seq is not None:
        raise PlanError("--seq and --plan say the same thing twice", hint="give one of them")
    try:
        return Plan.from_json(parse(read_file(expanded(plan_file, "--plan"), limit=MAX_BYTES), "it"))
    except OSError as error:
        raise PlanError(f"the plan file {plan_file} cannot be read: {error.strerror}") from None
    except CorruptEntry as error:
        raise PlanError(f"the plan file {plan_file} cannot be used: {error.message}") from None
