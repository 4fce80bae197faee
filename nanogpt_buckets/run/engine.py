"""Prompts -> text, and texts -> scores: load a model's buckets, settle coverage, then step, sample and stream.

The loop itself is `run/loop.py`. Knows nothing of compilers, files or shapes beyond buckets.
"""

from __future__ import annotations

import copy
import functools
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Unpack

import torch
from torch import Tensor

from nanogpt_buckets.builder import Listener
from nanogpt_buckets.choice import Choice, Options, choose
from nanogpt_buckets.errors import TokenizerError
from nanogpt_buckets.model.tokenization.base import Tokenizer
from nanogpt_buckets.model.tokenization.choice import TokenizerChoice, tokenizer_for
from nanogpt_buckets.plan.bucket import Bucket, Plan
from nanogpt_buckets.run.generation import (
    Generation,
    Prompt,
    Request,
    Row,
    Token,
    as_prompts,
    check_count,
    start_of,
    token_ids,
)
from nanogpt_buckets.run.loader import Compiled, Uncompiled
from nanogpt_buckets.run.loop import Loop, generator_of
from nanogpt_buckets.run.many import in_order
from nanogpt_buckets.run.misses import Buckets
from nanogpt_buckets.run.options import SamplingOptions
from nanogpt_buckets.run.report import Report, save_last_run
from nanogpt_buckets.run.score import Score, check_stride, join, windows
from nanogpt_buckets.run.traffic import keep_traffic
from nanogpt_buckets.steps import step_named


class Engine:
    """A model with its loaded buckets. Use `Engine.load`; close it, or use it in a `with` statement.

    One engine may be shared by threads; steps are serialised.
    """

    def __init__(self, choice: Choice, buckets: Buckets, report: Report, tokenizer: TokenizerChoice = None) -> None:
        self._choice = choice
        self._arch = choice.model.architecture
        self._end_tokens = choice.model.end_tokens
        self._buckets = buckets
        self._report = report
        self.tokenizer: Tokenizer | None = None
        try:
            self.tokenizer = tokenizer_for(choice.model, tokenizer)
        except TokenizerError as error:
            if tokenizer is not None:
                raise
            self.no_tokenizer = error  # token ids work all the same
        self._loop = Loop(choice, buckets, report, None if self.tokenizer is None else self.tokenizer.n_vocab)

    @classmethod
    def load(
        cls,
        model: str | os.PathLike[str],
        *,
        plan: Plan | Iterable[Bucket] | None = None,
        tokenizer: TokenizerChoice = None,
        on_miss: str = "promote",
        cached_only: bool = False,
        lazy: bool = False,
        on_progress: Listener | None = None,
        **options: Unpack[Options],
    ) -> Engine:
        """Open a model and load its compiled buckets.

        Args:
            model: a name or path; see `open_model`.
            plan: buckets to use; None for the plan that `build` saved under the model's name.
            tokenizer: see `tokenizer_for`. Where the model's own is missing or fails, token ids work all the same.
            on_miss: "promote" runs the cheapest bucket at hand that fits and never compiles; "build" compiles what a
                call needs before its first step.
            cached_only: never compile, whatever else is said, and ask no remote but one that `remote` names.
            lazy: load each bucket when it is first needed.
            on_progress: told what becomes of each bucket that is compiled; see `build`.
            options: backend, target, dtype, strategy, compiler_args, cores, cache_dir, locked, remote, ...; see
                `Options`.

        Raises:
            CacheMiss: no bucket is built and none may be compiled.
            BucketsError: the model, its tokenizer or the cache cannot be used.
        """
        if cached_only and options.get("remote") is None:
            options["remote_mode"] = "off"
        choice = choose(model, **options)
        loader = Uncompiled(choice) if choice.backend is None else Compiled(choice)
        report = Report(choice.backend_name, choice.model.name)
        on_miss = "promote" if cached_only and on_miss == "build" else on_miss
        buckets = Buckets(loader, plan, report, on_miss, on_progress, options.get("strategy", "auto"), lazy)
        engine = cls(choice, buckets, report, tokenizer)
        if not lazy:
            with engine._loop.alone():
                buckets.load_all()
        return engine

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        *,
        max_new_tokens: int = 100,
        stop: str | Sequence[str] | None = None,
        num_samples: int = 1,
        plain_text: bool = False,
        **sampling: Unpack[SamplingOptions],
    ) -> list[Generation]:
        """Continue each prompt; returns prompt by prompt, its samples in order.

        Args:
            prompts: strings or lists of token ids, several or one; an empty one starts from the model's start token.
            max_new_tokens: at most so many new tokens each; 0 gives the prompts back.
            stop: end before any of these strings appears in the new text.
            num_samples: continuations of each prompt; each ends at the model's end token, if its folder names one.
            plain_text: `<|endoftext|>` in a prompt is ordinary text.
            sampling: temperature, top_k, top_p, seed, rng; see `Sampling`. The report names a seed that was chosen.

        Raises:
            UsageError: an argument is out of range.
            CacheMiss: no bucket that is built reaches the longest context, and none may be compiled.
        """
        num_samples = check_count("num_samples", num_samples, 1)
        how = self._how(max_new_tokens=max_new_tokens, stop=stop, plain_text=plain_text, **sampling)
        rows = self._rows(as_prompts(prompts), how, num_samples)
        for _ in self._loop.steps(rows):
            pass
        return [row.generation() for row in rows]

    def generate_each(self, requests: Iterable[Request]) -> Iterator[Generation]:
        """Continue many prompts, each in its own way; yields in the order of the requests, each as soon as it can be.

        Every request is checked, and coverage settled, before this returns. The text of one is what `generate` makes of
        it alone, whatever the others are.

        Raises:
            UsageError: a prompt or an argument is out of range.
            CacheMiss: no bucket that is built reaches the longest context, and none may be compiled.
        """
        asked = [(request, array("i", self._ids(request.prompt, request))) for request in requests]
        lengths = [len(start_of(ids, self.tokenizer)) for _, ids in asked]
        spans = [(n, n + request.max_new_tokens - 1) for n, (request, _) in zip(lengths, asked, strict=True)]
        spans = [(first, last) for first, last in spans if first <= last]
        batch = self._loop.batch(spans)

        def row_of(request: Request, ids: Iterable[int]) -> Row:
            return Row([*ids], request, self.tokenizer, self._end_tokens, generator_of(request))

        return in_order(asked, row_of, functools.partial(self._loop.run, batch), batch.room)

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 100,
        stop: str | Sequence[str] | None = None,
        plain_text: bool = False,
        **sampling: Unpack[SamplingOptions],
    ) -> Iterator[Token]:
        """Continue one prompt, token by token; see `generate` for the arguments.

        Arguments are checked and coverage is settled before this returns.
        """
        how = self._how(max_new_tokens=max_new_tokens, stop=stop, plain_text=plain_text, **sampling)
        steps = self._loop.steps(self._rows([prompt], how))
        return (Token(row.ids[-1], piece, row.new_tokens - 1) for row, piece in steps)

    def logits(self, prompts: Prompt | Iterable[Prompt]) -> Tensor:
        """Return the logits float32 (N, V) that follow N prompts; one string, or one list of token ids, is one."""
        rows = self._rows(as_prompts(prompts), Request("", max_new_tokens=1))
        if not rows:
            return torch.empty(0, self._arch.vocab_size, dtype=torch.float32, device="cpu")
        found = self._loop.logits(rows)
        return torch.stack([found[row] for row in rows])  # (N, V)

    def score(
        self,
        texts: Prompt | Iterable[Prompt],
        *,
        stride: int | None = None,
        plain_text: bool = False,
        on_progress: Callable[[float], None] = lambda amount: None,
    ) -> list[Score]:
        """Say how likely each text is, token by token; nothing is put in front, so the first token has no probability.

        A text of less than two tokens has a `Score` without log-probabilities, whose loss and perplexity are None.

        Args:
            texts: strings or lists of token ids, several or one.
            stride: a text longer than block_size slides a window of that length over itself by so many tokens, and
                each token is scored once, past the first window after block_size - stride tokens or more; None for
                half of block_size. Small strides cost more and give long texts more context.
            plain_text: `<|endoftext|>` in a text is ordinary text.
            on_progress: told after each pass how many texts it did; a part of a long one counts as part of one text.

        Raises:
            UsageError: the stride is not a whole number from 1 to block_size - 1, or a token id is none.
            CacheMiss: no score bucket that is built holds the longest text, and none may be compiled.
        """
        stride = check_stride(stride, self._arch.block_size)
        how = Request("", plain_text=plain_text)
        ids = [self._ids(text, how) for text in as_prompts(texts)]
        parts = windows(ids, self._arch.block_size, stride)
        return join(ids, parts, self._loop.scores(parts), on_progress)

    def warmup(self) -> None:
        """Load every bucket of the plan and run each once, so that the first request pays for nothing."""
        with self._loop.alone():
            for bucket in self._buckets.load_all():
                executable = self._buckets.executable(bucket)
                executable(*step_named(bucket.step).pack([], bucket), *executable.blank())

    @property
    def identity(self) -> str:
        """Say which weights, in which dtype, and what kind of tokenizer make this engine's texts."""
        with self._loop.alone():
            kind = None if self.tokenizer is None else f"{type(self.tokenizer).__name__} {self.tokenizer.n_vocab}"
            return f"{self._buckets.weights_digest} {kind}"

    def report(self) -> Report:
        """Return a copy of the counters since load."""
        with self._loop.lock:
            return copy.deepcopy(self._report)

    def close(self) -> None:
        """Let go of buckets and weights and keep the counters as this node's last run; the engine is then of no use."""
        with self._loop.lock:
            if self._report.steps and not self._loop.closed:
                save_last_run(self._report)
                keep_traffic(self._choice, self._report)
            self._loop.close()
            self._buckets.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # --- one call -------------------------------------------------------------------------------------------------

    def _how(self, **options: Any) -> Request:
        """Return how the prompts of a call are continued; the report names the seed."""
        how = Request("", **options)
        self._report.seed = how.sampling.seed
        return how

    def _ids(self, prompt: Prompt, how: Request) -> list[int]:
        if how.stops and self.tokenizer is None:
            raise TokenizerError(f"stop strings need a tokenizer: {self.no_tokenizer}")
        if not isinstance(prompt, str):
            return token_ids(prompt, self._arch.vocab_size)
        if self.tokenizer is None:
            raise self.no_tokenizer.with_traceback(None)
        return self.tokenizer.encode(prompt, plain_text=how.plain_text)

    def _rows(self, prompts: list[Prompt], how: Request, num_samples: int = 1) -> list[Row]:
        generator = generator_of(how)
        return [
            Row(ids, how, self.tokenizer, self._end_tokens, generator, index, sample)
            for index, ids in enumerate([self._ids(prompt, how) for prompt in prompts])
            for sample in range(num_samples)
        ]
