"""`nanogpt-buckets generate`."""

from __future__ import annotations

import itertools
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nanogpt_buckets.choice import EAGER, Options
from nanogpt_buckets.cli import output
from nanogpt_buckets.cli.lines import read_text
from nanogpt_buckets.cli.options import locked_option, model_options, output_options, sampling_options
from nanogpt_buckets.cli.prompts import Job
from nanogpt_buckets.errors import UsageError
from nanogpt_buckets.model.tokenization.base import well_formed
from nanogpt_buckets.plan.bucket import STRATEGIES
from nanogpt_buckets.run.options import SamplingOptions

if TYPE_CHECKING:
    from nanogpt_buckets.run.engine import Engine

_PARTING = "---------------"


@click.command()
@click.argument("prompt", required=False)
@click.option("--prompts", metavar="FILE", help="Many prompts, one a line or JSONL; each gives one line of JSON.")
@click.option(
    "-o",
    "--output",
    "output_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Where these lines go; if some are there already, the rest are added.",
)
@click.option("--start", metavar="TEXT", help="The prompt, as nanoGPT's sample.py names it.")
@locked_option
@model_options
@click.option("--init-from", metavar="resume|gpt2...", help="sample.py's name for --model; resume takes --out-dir.")
@click.option("--out-dir", type=click.Path(path_type=Path), metavar="DIR", help="Where ckpt.pt is; means resume.")
@click.option("-n", "--max-new-tokens", type=int, default=100, show_default=True)
@sampling_options
@click.option("--num-samples", type=int, default=1, show_default=True)
@click.option("--stop", multiple=True, metavar="TEXT", help="End before this text appears; may be repeated.")
@click.option("--plain-text", is_flag=True, help="<|endoftext|> in the prompt is ordinary text.")
@click.option("--meta", "--tokenizer", "tokenizer", metavar="PATH", help="A meta.pkl, a tokenizer folder, or gpt2.")
@click.option("--cached-only", is_flag=True, help="Never compile; exit 3 if nothing that is built reaches.")
@click.option(
    "--strategy",
    type=click.Choice(["auto", *STRATEGIES]),
    default="auto",
    show_default=True,
    help="Run a prompt once and remember it, or the whole context for each token; auto: what is planned.",
)
@click.option("--cores", type=click.IntRange(min=1), default=1, help="NeuronCores to run on; each holds every bucket.")
@click.option("--device", type=click.Choice(["cpu"]), default="cpu", help="sample.py's flag; only cpu.")
@click.option("--compile", "compiled", type=bool, default=True, metavar="BOOL", help="False runs the eager backend.")
@output_options
def generate(
    prompt: str | None, start: str | None, model: str, init_from: str | None, out_dir: Path | None, options: Options,
    cached_only: bool, compiled: bool, as_json: bool, device: str, tokenizer: str | None, num_samples: int,
    max_new_tokens: int, stop: tuple[str, ...], plain_text: bool, sampling: SamplingOptions,
    prompts: str | None, output_file: Path | None,
) -> None:  # fmt: skip
    """Continue PROMPT and print both. `FILE:prompt.txt` reads a file, `-` reads standard input.

    Buckets this needs and that are not built are compiled first, unless --cached-only or --locked. sample.py's flags
    work in both spellings.

    Example: nanogpt-buckets generate "ROMEO:" --model demo --max-new-tokens 200 --seed 1337
    """
    how = {"max_new_tokens": max_new_tokens, "stop": list(stop) or None, "plain_text": plain_text, **sampling}
    job = None
    if prompts is not None or output_file is not None:
        _check_job(prompts, prompt if start is None else start, num_samples, as_json)
        job = Job(str(prompts), output_file, how)
    text = "" if job else _prompt(prompt, start)
    if not compiled:
        options["backend"] = EAGER
    if init_from == "resume" or (out_dir is not None and init_from is None):
        model = str((out_dir or Path("out")) / "ckpt.pt")
    elif init_from is not None:
        model = init_from
    with output.ending_at_once():
        from nanogpt_buckets.run.engine import Engine

    with output.BuildProgress() as update, Engine.load(
        model, tokenizer=tokenizer, on_miss="build", cached_only=cached_only, lazy=True,
        on_progress=update, **options
    ) as engine:  # fmt: skip
        if job:
            job.run(engine)
        elif num_samples == 1 and not as_json:
            _stream(engine, text, how)
        else:
            _print_all(engine, text, num_samples, how, as_json)
        if not job or engine.report().steps:
            _tell(engine)


def _check_job(prompts: str | None, prompt: str | None, num_samples: int, as_json: bool) -> None:
    if prompts is None:
        raise UsageError("--output is for the rows of --prompts", hint="redirect standard output: > FILE")
    if prompt is not None:
        raise UsageError("a prompt and --prompts cannot both be given", hint="put the prompt into the file")
    if num_samples != 1:
        hint = "give the same prompt on several lines; each has a seed of its own"
        raise UsageError("--num-samples cannot go with --prompts", hint=hint)
    if as_json:
        raise UsageError("--json cannot go with --prompts, whose rows are JSON as they are", hint="leave it out")


def _prompt(prompt: str | None, start: str | None) -> str:
    if prompt is not None and start is not None:
        raise UsageError("PROMPT and --start say the same thing twice", hint="give one of them")
    text = prompt if prompt is not None else start if start is not None else ""
    if text != "-" and not text.startswith("FILE:"):
        # bytes that are no UTF-8 arrive from the shell as lone surrogates, which cannot be printed
        return well_formed(text)
    source = text.removeprefix("FILE:")
    return read_text(source, "standard input" if source == "-" else f"the prompt file {source!r}")


def _stream(engine: Engine, text: str, sampling: dict[str, Any]) -> None:
    tokens = engine.stream(text, **sampling)
    first = next(tokens, None)  # whatever can go wrong at the start does so before anything is shown
    output.put(text)
    try:
        for token in itertools.chain([first] if first else [], tokens):
            output.put(token.text or "")
    finally:
        output.put("\n")


def _print_all(engine: Engine, text: str, num_samples: int, sampling: dict[str, Any], as_json: bool) -> None:
    generations = engine.generate([text], num_samples=num_samples, **sampling)
    if as_json:
        document = {"generations": [asdict(generation) for generation in generations]}
        output.document(document | {"report": engine.report().to_json()})
        return
    for generation in generations:
        output.put(f"{generation.text or ''}\n")
        if num_samples > 1:
            output.data(_PARTING)


def _tell(engine: Engine) -> None:
    report = engine.report()
    seed = "" if report.seed is None else f"; seed {report.seed}"
    ran = ", ".join(f"{bucket} x{count.steps}" for bucket, count in sorted(report.buckets.items())) or "none"
    output.say(
        f"{report.new_tokens} tokens, {report.tokens_per_s:.1f} tokens/s on {report.backend}; "
        f"steps per bucket: {ran}; padding {100 * report.waste:.0f} %{seed}"
    )
