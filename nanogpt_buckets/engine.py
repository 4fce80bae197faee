"""Prompts -> text: load a model's buckets, settle coverage, then step, sample and stream.

The loop runs on the host and recomputes the whole context at every step, so rows are stateless: they are regrouped
into the cheapest buckets at each step. Knows nothing of compilers, files or shapes beyond buckets.
"""

from __future__ import annotations

import copy
import os
import secrets
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import cast

import torch
from torch import Tensor

from nanogpt_buckets import last_run
from nanogpt_buckets.builder import Listener
from nanogpt_buckets.catalog import open_catalog
from nanogpt_buckets.dispatch import Dispatcher
from nanogpt_buckets.errors import TokenizerError, UsageError
from nanogpt_buckets.generation import Generation, Prompt, Row, Token, as_prompts, token_ids
from nanogpt_buckets.model.vocabulary import TokenizerChoice, tokenizer_for
from nanogpt_buckets.plan.bucket import Bucket, Plan
from nanogpt_buckets.report import Report
from nanogpt_buckets.sampling import Sampling, draw_nanogpt, draw_per_row, mask_undecodable
from nanogpt_buckets.shelf import Shelf
from nanogpt_buckets.textstream import TextStream, stop_strings


class Engine:
    """A model with its loaded buckets. Use `Engine.load`; close it, or use it in a `with` statement.

    One engine may be shared by threads; steps are serialised.
    """

    def __init__(self, shelf: Shelf, tokenizer: TokenizerChoice = None) -> None:
        self._shelf = shelf
        self._arch = shelf.catalog.model.architecture
        self.tokenizer = tokenizer_for(shelf.catalog.model, tokenizer)
        self._report = shelf.report
        self._dispatcher = Dispatcher(
            shelf.executable, shelf.cost, self._arch.block_size, self._report, at_once=shelf.catalog.backend.cores
        )
        self._lock = threading.RLock()

    @classmethod
    def load(
        cls,
        model: str | os.PathLike[str],
        *,
        plan: Plan | Iterable[Bucket] | None = None,
        backend: str = "auto",
        target: str | None = None,
        dtype: str = "float32",
        tokenizer: TokenizerChoice = None,
        on_miss: str = "promote",
        cached_only: bool = False,
        lazy: bool = False,
        compiler_args: str | Sequence[str] = (),
        cores: int = 1,
        cache_dir: str | os.PathLike[str] | None = None,
        on_progress: Listener | None = None,
    ) -> Engine:
        """Open a model and load its compiled buckets.

        Args:
            model: a name or path; see `open_model`.
            plan: buckets to use; None for the plan that `build` saved under the model's name.
            backend: "auto" or a backend's name.
            target: what to build for if something is built.
            dtype: "float32" or "bfloat16".
            tokenizer: see `tokenizer_for`.
            on_miss: "promote" runs the cheapest bucket at hand that fits and never compiles; "build" compiles what a
                call needs before its first step.
            cached_only: never compile, whatever else is said.
            lazy: load each bucket when it is first needed.
            compiler_args: flags for neuronx-cc, which are part of what names a bucket.
            cores: NeuronCores to run on; each holds every bucket.
            cache_dir: the store; None for the default.
            on_progress: told what becomes of each bucket that is compiled; see `build`.

        Raises:
            CacheMiss: no bucket is built and none may be compiled.
            BucketsError: the model, its tokenizer or the cache cannot be used.
        """
        catalog = open_catalog(
            model, backend=backend, target=target, dtype=dtype, compiler_args=compiler_args, cores=cores,
            cache_dir=cache_dir,
        )  # fmt: skip
        on_miss = "promote" if cached_only and on_miss == "build" else on_miss
        shelf = Shelf(catalog, plan, on_miss=on_miss, on_progress=on_progress)
        engine = cls(shelf, tokenizer)
        if not lazy:
            shelf.load_all()
        return engine

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        max_new_tokens: int = 100,
        temperature: float = 0.8,
        top_k: int | None = 200,
        top_p: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        num_samples: int = 1,
        rng: str = "per-row",
        plain_text: bool = False,
    ) -> list[Generation]:
        """Continue each prompt.

        Args:
            prompts: strings or lists of token ids, several or one; an empty one starts from the model's start token.
            max_new_tokens: at most so many new tokens each; 0 gives the prompts back.
            temperature: see `Sampling`, as for top_k, top_p and rng.
            top_k: keep the k likeliest; 0 or None keeps all.
            top_p: keep the likeliest up to this probability.
            seed: of all draws; None chooses one, which the report names.
            stop: end before any of these strings appears in the new text.
            num_samples: continuations of each prompt.
            rng: "per-row" or "nanogpt".
            plain_text: `<|endoftext|>` in a prompt is ordinary text.

        Returns:
            Prompt by prompt, its samples in order.

        Raises:
            UsageError: an argument is out of range.
            CacheMiss: no bucket that is built reaches the longest context, and none may be compiled.
        """
        sampling = self._sampling(temperature, top_k, top_p, seed, rng)
        _check_count("num_samples", num_samples, 1)
        many = as_prompts(prompts)
        stops = stop_strings(stop)
        rows = [
            self._row(prompt, index, sample, stops, plain_text)
            for index, prompt in enumerate(many)
            for sample in range(num_samples)
        ]
        # nanoGPT draws sample after sample from one generator
        batches = [[row] for row in rows] if rng == "nanogpt" else [rows]
        buckets = self._cover(batches, max_new_tokens)
        for _ in self._steps(batches, sampling, max_new_tokens, buckets):
            pass
        return [row.generation() for row in rows]

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 100,
        temperature: float = 0.8,
        top_k: int | None = 200,
        top_p: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        rng: str = "per-row",
        plain_text: bool = False,
    ) -> Iterator[Token]:
        """Continue one prompt, token by token; see `generate` for the arguments.

        Arguments are checked and coverage is settled before this returns.
        """
        sampling = self._sampling(temperature, top_k, top_p, seed, rng)
        row = self._row(prompt, 0, 0, stop_strings(stop), plain_text)
        buckets = self._cover([[row]], max_new_tokens)
        return (
            Token(row.ids[-1], piece, row.new_tokens - 1)
            for row, piece in self._steps([[row]], sampling, max_new_tokens, buckets)
        )

    def logits(self, prompts: str | Sequence[Prompt]) -> Tensor:
        """Return the logits that follow each prompt; one string, or one list of token ids, is one prompt.

        Returns:
            float32 (N, V); an empty list gives (0, V).
        """
        rows = [self._row(prompt, index, 0, (), False) for index, prompt in enumerate(as_prompts(prompts))]
        if not rows:
            return torch.empty(0, self._arch.vocab_size)
        buckets = self._cover([rows], 1)
        with self._timed():
            return self._dispatcher.run([row.ids for row in rows], buckets)

    def warmup(self) -> None:
        """Load every bucket of the plan and run each once, so that the first request pays for nothing."""
        with self._lock:
            for bucket in self._shelf.load_all():
                ids = torch.zeros(bucket.batch_size, bucket.seq_len, dtype=torch.int32)
                self._shelf.executable(bucket)(ids, torch.zeros(bucket.batch_size, dtype=torch.int32))

    def report(self) -> Report:
        """Return a copy of the counters since load."""
        with self._lock:
            return copy.deepcopy(self._report)

    def close(self) -> None:
        """Let go of buckets and weights and keep the counters as this node's last run; the engine is then of no use."""
        with self._lock:
            if self._report.steps and not self._shelf.closed:
                last_run.save(self._report)
            self._shelf.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # --- one call -------------------------------------------------------------------------------------------------

    def _sampling(
        self, temperature: float, top_k: int | None, top_p: float | None, seed: int | None, rng: str
    ) -> Sampling:
        chosen = secrets.randbits(63) if seed is None else seed
        sampling = Sampling(temperature, top_k, top_p, chosen, rng)
        self._report.seed = chosen
        return sampling

    def _row(self, prompt: Prompt, index: int, sample: int, stops: tuple[str, ...], plain_text: bool) -> Row:
        ids = self._encode(prompt, plain_text)
        if stops and self.tokenizer is None:
            raise TokenizerError("stop strings need a tokenizer, and this model has none")
        text = None if self.tokenizer is None else TextStream(self.tokenizer, ids, stops)
        if not ids:
            start = self.tokenizer.start_token if self.tokenizer is not None else None
            if start is None:
                raise UsageError("the prompt is empty and this model has no start token", hint="give a prompt")
            ids = [start]
        return Row(ids, index, sample, text)

    def _encode(self, prompt: Prompt, plain_text: bool) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise TokenizerError(
                    "this model has no tokenizer, so prompts must be lists of token ids",
                    hint="give --meta or tokenizer= what it was trained with; Engine.generate takes token ids",
                )
            return self.tokenizer.encode(prompt, plain_text=plain_text)
        return token_ids(prompt, self._arch.vocab_size)

    def _cover(self, batches: list[list[Row]], max_new_tokens: int) -> list[Bucket]:
        """Settle, before the first step, which buckets will run; the last step sees one token less than the result."""
        _check_count("max_new_tokens", max_new_tokens, 0)
        lengths = [[len(row.ids) for row in batch] for batch in batches if batch]
        if not lengths or max_new_tokens == 0:
            return []
        with self._lock:
            return self._shelf.cover(lengths, max_new_tokens - 1)

    def _steps(
        self, batches: list[list[Row]], sampling: Sampling, max_new_tokens: int, buckets: list[Bucket]
    ) -> Iterator[tuple[Row, str | None]]:
        """Yield each row as it gains a token; the rows of one batch go together, the batches one after another."""
        if max_new_tokens == 0:
            return
        generator = torch.Generator().manual_seed(sampling.seed % 2**64)
        for batch in batches:
            active = batch
            while active:
                with self._timed():
                    logits = self._dispatcher.run([row.ids for row in active], buckets)  # (N, V)
                    tokens = self._draw(logits, active, sampling, generator)
                    pieces = [row.accept(t, max_new_tokens) for row, t in zip(active, tokens, strict=True)]
                    self._report.new_tokens += len(active)
                yield from zip(active, pieces, strict=True)
                active = [row for row in active if not row.done]

    def _draw(self, logits: Tensor, rows: list[Row], sampling: Sampling, generator: torch.Generator) -> list[int]:
        if self.tokenizer is not None:
            logits = mask_undecodable(logits, self.tokenizer.n_vocab)
        if sampling.rng == "nanogpt":
            return [draw_nanogpt(logits[0], sampling, generator)]
        return [
            draw_per_row(row_logits, sampling, row.prompt, row.sample, row.new_tokens)
            for row, row_logits in zip(rows, logits, strict=True)
        ]

    def _timed(self) -> AbstractContextManager[None]:
        return self._report.timed(self._lock)


def _check_count(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UsageError(f"{name} is {value!r}; it must be a whole number, {least} or more")


def generate(
    prompt: Prompt | list[str],
    *,
    model: str | os.PathLike[str] = "gpt2",
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_k: int | None = 200,
    top_p: float | None = None,
    seed: int | None = None,
    stop: str | Sequence[str] | None = None,
    rng: str = "per-row",
    plain_text: bool = False,
    plan: Plan | Iterable[Bucket] | None = None,
    backend: str = "auto",
    target: str | None = None,
    dtype: str = "float32",
    tokenizer: TokenizerChoice = None,
    cached_only: bool = False,
    compiler_args: str | Sequence[str] = (),
    cores: int = 1,
    cache_dir: str | os.PathLike[str] | None = None,
) -> str | list[str]:
    """Continue a prompt and return prompt and continuation as text; a list of strings gives a list.

    Buckets this needs and that are not built are compiled first; see `Engine.load` and `Engine.generate` for the
    arguments. Load an `Engine` to generate many times.

    Raises:
        TokenizerError: the model has no tokenizer, so there is no text to return.
    """
    with Engine.load(
        model, plan=plan, backend=backend, target=target, dtype=dtype, tokenizer=tokenizer, on_miss="build",
        cached_only=cached_only, lazy=True, compiler_args=compiler_args, cores=cores, cache_dir=cache_dir,
    ) as engine:  # fmt: skip
        if engine.tokenizer is None:
            raise TokenizerError(
                "this model has no tokenizer, so there is no text to return", hint="use Engine.generate"
            )
        many = isinstance(prompt, list) and all(isinstance(item, str) for item in prompt)
        generations = engine.generate(
            cast(Sequence[Prompt], prompt) if many else [cast(Prompt, prompt)],
            max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, stop=stop,
            rng=rng, plain_text=plain_text,
        )  # fmt: skip
    texts = [generation.text or "" for generation in generations]
    return texts if many else texts[0]
