"""Prompts -> text, and texts -> scores: load a model's buckets, settle coverage, then step, sample and stream.

The loop runs on the host. Rows that recompute are regrouped into the cheapest buckets at each step; what others
remember stays in their slots (`run/batch.py`). Knows nothing of compilers, files or shapes beyond buckets.
"""

from __future__ import annotations

import copy
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Unpack

import torch
from torch import Tensor

from nanogpt_buckets.builder import Listener
from nanogpt_buckets.choice import Choice, Options, choose
from nanogpt_buckets.contract import refuse_forked
from nanogpt_buckets.errors import TokenizerError, UsageError
from nanogpt_buckets.model.tokenization.base import Tokenizer
from nanogpt_buckets.model.tokenization.choice import TokenizerChoice, tokenizer_for
from nanogpt_buckets.plan.bucket import Bucket, Plan
from nanogpt_buckets.run.batch import Batch
from nanogpt_buckets.run.dispatch import RECOMPUTE, SCORE, Call, Dispatcher
from nanogpt_buckets.run.generation import Generation, Prompt, Row, Token, as_prompts, stop_strings, token_ids
from nanogpt_buckets.run.loader import Compiled, Uncompiled
from nanogpt_buckets.run.misses import Buckets
from nanogpt_buckets.run.options import Sampling, SamplingOptions
from nanogpt_buckets.run.report import Report, save_last_run
from nanogpt_buckets.run.sampling import draw_nanogpt, draw_per_row, mask_undecodable
from nanogpt_buckets.run.score import Score, check_stride, score_windows, windows
from nanogpt_buckets.steps import step_named
from nanogpt_buckets.values import shown, whole_number


class Engine:
    """A model with its loaded buckets. Use `Engine.load`; close it, or use it in a `with` statement.

    One engine may be shared by threads; steps are serialised.
    """

    def __init__(self, choice: Choice, buckets: Buckets, report: Report, tokenizer: TokenizerChoice = None) -> None:
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
        cores = 1 if choice.backend is None else choice.backend.cores
        self._dispatcher = Dispatcher(buckets.executable, choice.cost, self._arch, choice.dtype, report, cores)
        self._lock = threading.RLock()
        self._closed = False

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
        strategy: str = "auto",
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
            cached_only: never compile, whatever else is said.
            lazy: load each bucket when it is first needed.
            strategy: "kv" runs a prompt once and keeps what it remembers, "recompute" runs the whole context for each
                token; "auto" is "kv" where buckets for it are planned.
            on_progress: told what becomes of each bucket that is compiled; see `build`.
            options: backend, target, dtype, compiler_args, cores, cache_dir; see `Options`.

        Raises:
            CacheMiss: no bucket is built and none may be compiled.
            BucketsError: the model, its tokenizer or the cache cannot be used.
        """
        choice = choose(model, **options)
        loader = Uncompiled(choice) if choice.backend is None else Compiled(choice)
        report = Report(choice.backend_name, choice.model.name)
        on_miss = "promote" if cached_only and on_miss == "build" else on_miss
        buckets = Buckets(loader, plan, report, on_miss, on_progress, strategy, lazy)
        engine = cls(choice, buckets, report, tokenizer)
        if not lazy:
            with engine._alone():
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
        how = self._sampling(sampling)
        num_samples = _check_count("num_samples", num_samples, 1)
        max_new_tokens = _check_count("max_new_tokens", max_new_tokens, 0)
        rows = self._rows(as_prompts(prompts), num_samples, stop, plain_text)
        for _ in self._steps(rows, how, max_new_tokens):
            pass
        return [row.generation() for row in rows]

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
        how = self._sampling(sampling)
        max_new_tokens = _check_count("max_new_tokens", max_new_tokens, 0)
        steps = self._steps(self._rows([prompt], 1, stop, plain_text), how, max_new_tokens)
        return (Token(row.ids[-1], piece, row.new_tokens - 1) for row, piece in steps)

    def logits(self, prompts: Prompt | Iterable[Prompt]) -> Tensor:
        """Return the logits float32 (N, V) that follow N prompts; one string, or one list of token ids, is one."""
        rows = self._rows(as_prompts(prompts), 1, None, False)
        if not rows:
            return torch.empty(0, self._arch.vocab_size, dtype=torch.float32, device="cpu")
        way, buckets = self._cover([rows], 1)
        with self._timed():
            parts = self._dispatcher.parts(rows, way)
            return torch.cat([self._batch(part, way, buckets).logits(_numbered(part)) for part in parts])

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
        ids = [self._encode(text, plain_text) for text in as_prompts(texts)]
        parts = windows(ids, self._arch.block_size, stride)
        contexts = [part.ids for part in parts]
        with self._alone():
            lengths = [len(context) for context in contexts]
            _, buckets = self._buckets.cover([lengths], 0, (SCORE,)) if parts else (SCORE, [])
            calls = self._dispatcher.stateless(SCORE, contexts, buckets)

        def run(call: Call) -> Mapping[int, Tensor]:
            with self._timed():
                found = self._dispatcher.answers([call], contexts)
                self._report.scored_tokens += sum(parts[number].new for number in call.members)
                return found

        return score_windows(ids, parts, calls, run, on_progress)

    def warmup(self) -> None:
        """Load every bucket of the plan and run each once, so that the first request pays for nothing."""
        with self._alone():
            for bucket in self._buckets.load_all():
                executable = self._buckets.executable(bucket)
                state = (view.blank() for view in executable.interface.state)
                executable(*step_named(bucket.step).pack([], bucket), *state)

    def report(self) -> Report:
        """Return a copy of the counters since load."""
        with self._lock:
            return copy.deepcopy(self._report)

    def close(self) -> None:
        """Let go of buckets and weights and keep the counters as this node's last run; the engine is then of no use."""
        with self._lock:
            if self._report.steps and not self._closed:
                save_last_run(self._report)
            self._closed = True
            self._buckets.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # --- one call -------------------------------------------------------------------------------------------------

    def _sampling(self, options: SamplingOptions) -> Sampling:
        given: dict[str, Any] = {name: value for name, value in options.items() if (name, value) != ("seed", None)}
        sampling = Sampling(**given)
        self._report.seed = sampling.seed
        return sampling

    def _rows(
        self, prompts: list[Prompt], num_samples: int, stop: str | Sequence[str] | None, plain_text: bool
    ) -> list[Row]:
        rows: list[Row] = []
        stops = stop_strings(stop)
        for index, prompt in enumerate(prompts):
            ids = self._encode(prompt, plain_text)
            if stops and self.tokenizer is None:
                raise TokenizerError(f"stop strings need a tokenizer: {self.no_tokenizer}")
            rows += [Row(ids, index, sample, self.tokenizer, stops) for sample in range(num_samples)]
        return rows

    def _encode(self, text: Prompt, plain_text: bool) -> list[int]:
        if not isinstance(text, str):
            return token_ids(text, self._arch.vocab_size)
        if self.tokenizer is None:
            raise self.no_tokenizer.with_traceback(None)
        return self.tokenizer.encode(text, plain_text=plain_text)

    def _cover(self, batches: list[list[Row]], max_new_tokens: int) -> tuple[str, list[Bucket]]:
        """Settle, before the first step, which buckets will run; the last step sees one token less than the result."""
        lengths = [[len(row.ids) for row in batch] for batch in batches if batch]
        if not lengths or max_new_tokens == 0:
            return RECOMPUTE, []
        with self._alone():
            return self._buckets.cover(lengths, max_new_tokens - 1)

    def _steps(self, rows: list[Row], sampling: Sampling, max_new_tokens: int) -> Iterator[tuple[Row, str | None]]:
        """Settle what will run, then return each row as it gains a token, with the text that this makes certain."""
        # nanoGPT draws sample after sample from one generator
        batches = [[row] for row in rows] if sampling.rng == "nanogpt" else [rows]
        return self._run(batches, sampling, max_new_tokens, *self._cover(batches, max_new_tokens))

    def _batch(self, rows: Sequence[Row], way: str, buckets: list[Bucket]) -> Batch:
        return Batch(self._dispatcher, way, buckets, [row.ids for row in rows])

    def _run(
        self, batches: list[list[Row]], sampling: Sampling, max_new_tokens: int, way: str, buckets: list[Bucket]
    ) -> Iterator[tuple[Row, str | None]]:
        """Run the rows of one batch together, or as many as can be remembered; the batches one after another."""
        ends = () if sampling.ignore_eos else self._end_tokens
        generator = torch.Generator().manual_seed(sampling.seed % 2**64)
        ordered = (sorted(rows, key=lambda row: len(row.ids)) for rows in batches)
        parts = (part for rows in ordered for part in self._dispatcher.parts(rows, way))
        for rows in parts if max_new_tokens else ():
            batch, active = self._batch(rows, way, buckets), rows
            while active:
                with self._timed():
                    logits = batch.logits(_numbered(rows))  # (N, V)
                    tokens = self._draw(logits, active, sampling, generator)
                    pieces = [row.accept(t, max_new_tokens, ends) for row, t in zip(active, tokens, strict=True)]
                    self._report.new_tokens += len(active)
                yield from zip(active, pieces, strict=True)
                active = [row for row in rows if not row.done]

    def _draw(self, logits: Tensor, rows: Sequence[Row], sampling: Sampling, generator: torch.Generator) -> list[int]:
        if self.tokenizer is not None:
            logits = mask_undecodable(logits, self.tokenizer.n_vocab)
        if sampling.rng == "nanogpt":
            return [draw_nanogpt(logits[0], sampling, generator)]
        return [
            draw_per_row(row_logits, sampling, row.prompt, row.sample, row.new_tokens)
            for row, row_logits in zip(rows, logits, strict=True)
        ]

    @contextmanager
    def _timed(self) -> Iterator[None]:
        """Be `_alone` and count the time, the wait excluded."""
        with self._alone():
            start = time.perf_counter()
            try:
                yield
            finally:
                self._report.seconds += time.perf_counter() - start

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the lock, on the CPU whatever default device the host program has set.

        Raises:
            UsageError: the engine is closed, or the process a fork of one that ran buckets, not even let near the lock.
        """
        refuse_forked()
        elsewhere = torch.get_default_device().type != "cpu"
        with self._lock, torch.device("cpu") if elsewhere else nullcontext():
            if self._closed:
                raise UsageError("this engine is closed", hint="load another with Engine.load")
            yield


def _numbered(rows: Sequence[Row]) -> dict[int, list[int]]:
    """Return the contexts of the rows that still run, by number."""
    return {number: row.ids for number, row in enumerate(rows) if not row.done}


def _check_count(name: str, value: object, least: int) -> int:
    number = whole_number(value)
    if number is None or number < least:
        raise UsageError(f"{name} is {shown(value)}; it must be a whole number, {least} or more")
    return number
