"""`nanogpt-buckets score`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import click

from nanogpt_buckets.choice import Options
from nanogpt_buckets.cli import output
from nanogpt_buckets.cli.lines import Record, read_records
from nanogpt_buckets.cli.options import locked_option, model_options, output_options

if TYPE_CHECKING:
    from nanogpt_buckets.run.engine import Engine
    from nanogpt_buckets.run.score import Score

# Where a line of JSONL has its text; the second is what files of prompts call it.
_KEYS = ("text", "prompt")
_BEGINNING = 40


@click.command()
@click.argument("file")
@locked_option
@model_options
@click.option("--stride", type=int, metavar="N", help="Tokens between windows of long texts. Default: block_size / 2.")
@click.option("--plain-text", is_flag=True, help="<|endoftext|> in a text is ordinary text.")
@click.option("--meta", "--tokenizer", "tokenizer", metavar="PATH", help="A meta.pkl, a tokenizer folder, or gpt2.")
@click.option("--cached-only", is_flag=True, help="Never compile; exit 3 if nothing that is built reaches.")
@output_options
def score(
    file: str, model: str, options: Options, stride: int | None, plain_text: bool, tokenizer: str | None,
    cached_only: bool, as_json: bool,
) -> None:  # fmt: skip
    """Say how likely the texts in FILE are, one a line; `-` reads standard input.

    FILE is plain text, or JSONL, whose objects have a "text" or a "prompt": so it is read if its name ends in .jsonl or
    its first line begins with {. Logarithms are natural; the first token of a text has no probability, for nothing is
    put in front of it. A text longer than block_size is scored in windows of that length, --stride tokens apart, each
    token once. The last row is of all tokens together. --json also has each token's log-probability.

    Buckets this needs and that are not built are compiled first, unless --cached-only or --locked.

    Example: nanogpt-buckets score texts.txt --model demo
    """
    records = read_records(file, _KEYS)
    with output.ending_at_once():
        from nanogpt_buckets.run.engine import Engine

    with output.BuildProgress() as update, Engine.load(
        model, tokenizer=tokenizer, on_miss="build", cached_only=cached_only, lazy=True, on_progress=update, **options
    ) as engine:  # fmt: skip
        with output.progress("scoring", len(records)) as advance:
            texts = [record.text for record in records]
            scores = engine.score(texts, stride=stride, plain_text=plain_text, on_progress=advance)
        _print(engine, records, scores, as_json)
        _tell(engine, scores)


def _print(engine: Engine, records: list[Record], scores: list[Score], as_json: bool) -> None:
    from nanogpt_buckets.run.score import summary, to_json

    logprob, scored = math.fsum(s.logprob for s in scores), sum(s.scored_tokens for s in scores)
    total = {"texts": len(scores), "tokens": sum(len(s.token_ids) for s in scores)} | summary(logprob, scored)
    if as_json:
        found = [{"line": record.line} | to_json(score) for record, score in zip(records, scores, strict=True)]
        output.document({"texts": found, "total": total, "report": engine.report().to_json()})
        return
    rows = [
        (
            str(record.line),
            *_cells(len(score.token_ids), summary(score.logprob, score.scored_tokens)),
            _beginning(record.text),
        )
        for record, score in zip(records, scores, strict=True)
    ]
    rows.append(("all", *_cells(total["tokens"], total), ""))
    output.table(("LINE", "TOKENS", "LOGPROB", "PERPLEXITY", "TEXT"), rows)


def _cells(tokens: int, found: dict[str, Any]) -> tuple[Any, ...]:
    if not found["scored_tokens"]:
        return tokens, "-", "-"
    return tokens, round(found["logprob"], 3), round(found["perplexity"] or math.inf, 4)


def _beginning(text: str) -> str:
    line = " ".join(text[: 4 * _BEGINNING].split())
    return line if len(line) <= _BEGINNING else f"{line[: _BEGINNING - 3]}..."


def _tell(engine: Engine, scores: list[Score]) -> None:
    if short := sum(score.loss is None for score in scores):
        output.say(f"{output.count(short, 'text has', 'texts have')} less than two tokens, and so no loss")
    report = engine.report()
    output.say(
        f"{report.scored_tokens} tokens scored, {report.tokens_per_s:.1f} tokens/s on {report.backend}; "
        f"padding {100 * report.waste:.0f} %"
    )
