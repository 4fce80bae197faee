"""The whole of it in one call: load an engine, continue a prompt, close it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any, Unpack

from nanogpt_buckets.choice import Options
from nanogpt_buckets.model.tokenization.choice import TokenizerChoice
from nanogpt_buckets.plan.bucket import Bucket, Plan
from nanogpt_buckets.run.engine import Engine
from nanogpt_buckets.run.generation import Prompt
from nanogpt_buckets.run.options import SamplingOptions


class GenerateOptions(Options, SamplingOptions):
    """What `generate` takes besides its own arguments: how to choose tokens, and what to run on."""


def generate(
    prompt: Prompt | list[str],
    *,
    model: str | os.PathLike[str] = "gpt2",
    max_new_tokens: int = 100,
    stop: str | Sequence[str] | None = None,
    plain_text: bool = False,
    plan: Plan | Iterable[Bucket] | None = None,
    tokenizer: TokenizerChoice = None,
    cached_only: bool = False,
    **options: Unpack[GenerateOptions],
) -> str | list[str]:
    """Continue a prompt and return prompt and continuation as text; a list of strings gives a list.

    Buckets this needs and that are not built are compiled first; see `Engine.load` and `Engine.generate` for the
    arguments, the `options` of both included. Load an `Engine` to generate many times.

    Raises:
        TokenizerError: the model has no tokenizer, so there is no text to return.
    """
    what: dict[str, Any] = {**options}
    how = {name: what.pop(name) for name in SamplingOptions.__annotations__ if name in what}
    with Engine.load(
        model,
        plan=plan,
        tokenizer=tokenizer,
        on_miss="build",
        cached_only=cached_only,
        lazy=True,
        **what,
    ) as engine:
        if engine.tokenizer is None:
            raise engine.no_tokenizer.with_traceback(None)
        many = isinstance(prompt, list) and all(isinstance(item, str) for item in prompt)
        prompts: Any = prompt if many else [prompt]
        generations = engine.generate(prompts, max_new_tokens=max_new_tokens, stop=stop, plain_text=plain_text, **how)
    texts = [generation.text or "" for generation in generations]
    return texts if many else texts[0]
