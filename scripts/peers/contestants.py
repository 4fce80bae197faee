"""What `scripts/bench_peers` lets compete, ours and those on PyTorch: each continues token ids greedily in its own way.

A contestant is made in a process of its own. It knows nothing of the others, nor of what is measured.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from peers import plans

Ids = list[int]
Tick = Callable[[], object]
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


class Contestant:
    """One engine at one precision; `folder` is the model, `work` is where it keeps what it converts or compiles.

    Attributes:
        measures: what it takes part in, besides time to first token and decode.
        reach: the longest context that it can continue.
        steps: how many tokens are enough to know what one costs.
        remembers: whether a step reads every weight once and computes one token.
        packages: distributions whose versions are reported.
    """

    measures: tuple[str, ...] = ("cold", "memory", "throughput", "batch", "score")
    reach = 1024
    steps = 16
    remembers = True
    packages: tuple[str, ...] = ("torch", "transformers")

    def __init__(self, folder: Path, work: Path, precision: str, **options: Any) -> None:
        raise NotImplementedError

    def generate(self, prompts: Sequence[Ids], new: int, tick: Tick = lambda: None) -> list[Ids]:
        """Return the `new` greedy token ids after each prompt; `tick` is called after each step."""
        raise NotImplementedError

    def prepare(self, prompts: Sequence[Ids], new: int) -> str:
        """Find out how to go about many prompts; returns what was chosen."""
        return ""

    def step_times(self, prompts: Sequence[Ids], new: int) -> tuple[list[Ids], float, list[float]]:
        """Return what `generate` returns, the seconds to the first token of all, and those of each further step."""
        stamps = [time.perf_counter()]
        ids = self.generate(prompts, new, lambda: stamps.append(time.perf_counter()))
        taken = [after - before for before, after in itertools.pairwise(stamps)]
        return ids, taken[0], taken[1:]

    def score(self, texts: Sequence[Ids]) -> list[float]:
        """Return the sum of the log-probabilities of each text's tokens but the first."""
        raise LookupError("scores nothing")


class HuggingFace(Contestant):
    """`generate` with its KV cache, eager; a batch is padded on the left, many prompts go in the better of two ways."""

    def __init__(self, folder: Path, work: Path, precision: str, **options: Any) -> None:
        import torch
        from transformers import GPT2LMHeadModel

        self.model: Any = GPT2LMHeadModel.from_pretrained(folder, dtype=getattr(torch, DTYPES[precision])).eval()
        self.options: dict[str, Any] = {"do_sample": False, "pad_token_id": 0}
        self.widest = 0  # of a batch; 0 until it is known what is best

    def generate(self, prompts: Sequence[Ids], new: int, tick: Tick = lambda: None) -> list[Ids]:
        """Continue a batch, or many prompts as was found best."""
        return self._batch(prompts, new, tick) if len(prompts) <= 8 else self._batches(prompts, new, self.widest)

    def prepare(self, prompts: Sequence[Ids], new: int) -> str:
        """Find out which is faster: batches of 8 of like length, or all in one."""
        taken = {}
        for widest in () if self.widest else {8, len(prompts)}:
            start = time.perf_counter()
            self._batches(prompts, new, widest)
            taken[widest] = time.perf_counter() - start
        self.widest = self.widest or min(taken, key=taken.__getitem__)
        return f"batches of {self.widest}"

    def _batches(self, prompts: Sequence[Ids], new: int, widest: int) -> list[Ids]:
        order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
        found: dict[int, Ids] = {}
        for start in range(0, len(order), widest):
            rows = order[start : start + widest]
            found |= dict(zip(rows, self._batch([prompts[row] for row in rows], new), strict=True))
        return [found[row] for row in range(len(prompts))]

    def _batch(self, prompts: Sequence[Ids], new: int, tick: Tick = lambda: None) -> list[Ids]:
        import torch

        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(ids)) + ids for ids in prompts])  # (B, S)
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts])  # (B, S)

        def after_each_step(ids: Any, scores: Any, **rest: Any) -> Any:
            tick()
            return torch.zeros(len(ids), dtype=torch.bool)

        options = self.options | {"attention_mask": mask, "max_new_tokens": new}
        with torch.inference_mode():
            made = self.model.generate(ids, stopping_criteria=[after_each_step], **options)
        rows: list[Ids] = made[:, width:].tolist()
        return rows

    def score(self, texts: Sequence[Ids]) -> list[float]:
        """Run forward with labels, text by text, as guides have it."""
        import torch

        with torch.inference_mode():
            rows = [torch.tensor([text]) for text in texts]  # (1, S)
            return [-float(self.model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1) for ids in rows]


class HuggingFacePadded(HuggingFace):
    """Scores in padded batches of 8 of like length; else the same."""

    measures = ("score",)

    def score(self, texts: Sequence[Ids]) -> list[float]:
        """Run forward on padded batches, and pick each token's log-probability."""
        import torch

        order, found = sorted(range(len(texts)), key=lambda row: len(texts[row])), {}
        for start in range(0, len(order), 8):
            rows = order[start : start + 8]
            width = max(len(texts[row]) for row in rows)
            ids = torch.tensor([texts[row] + [0] * (width - len(texts[row])) for row in rows])  # (B, S)
            mask = torch.tensor([[1] * len(texts[row]) + [0] * (width - len(texts[row])) for row in rows])  # (B, S)
            with torch.inference_mode():
                logits = self.model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()  # (B, S - 1, V)
                every = -torch.nn.functional.cross_entropy(logits.mT, ids[:, 1:], reduction="none")  # (B, S - 1)
                found |= dict(zip(rows, (every * mask[:, 1:]).sum(1).tolist(), strict=True))
        return [found[row] for row in range(len(texts))]


class HuggingFaceCompiled(HuggingFace):
    """`generate` with a static cache and the step of one token compiled by `torch.compile`; prompts run eagerly.

    Were prompts compiled as well, each new length would wait for the compiler.
    """

    measures = ()

    def __init__(self, folder: Path, work: Path, precision: str, **options: Any) -> None:
        super().__init__(folder, work, precision)
        import torch
        from transformers import StaticCache

        self.cache = StaticCache(config=self.model.config, max_cache_len=self.model.config.n_positions)
        eager, step = self.model.forward, torch.compile(self.model.forward, dynamic=False)

        def forward(input_ids: Any = None, **rest: Any) -> Any:
            return (step if input_ids.shape[1] == 1 else eager)(input_ids=input_ids, **rest)

        self.model.forward = forward

    def _batch(self, prompts: Sequence[Ids], new: int, tick: Tick = lambda: None) -> list[Ids]:
        import torch

        with torch.inference_mode():  # as it was written
            self.cache.reset()
        self.options["past_key_values"] = self.cache
        return super()._batch(prompts, new, tick)


class Seed(Contestant):
    """One traced shape, (1, 128), whose weights are inlined; a prompt is padded on the left with the end token."""

    measures = ()
    reach = 128
    steps = 3
    remembers = False

    def __init__(self, folder: Path, work: Path, precision: str, **options: Any) -> None:
        import torch
        from transformers import GPT2LMHeadModel

        model: Any = GPT2LMHeadModel.from_pretrained(folder, attn_implementation="eager").eval()
        self.pad = min(50256, model.config.vocab_size - 1)
        self.reach = min(128, model.config.n_positions)

        class Step(torch.nn.Module):
            def forward(self, ids: torch.Tensor) -> torch.Tensor:
                logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
                return logits

        step = Step()
        step.inner = model
        with torch.inference_mode():
            example = torch.full((1, self.reach), self.pad)
            self.step: Any = torch.jit.freeze(torch.jit.trace(step.eval(), example, check_trace=False))

    def generate(self, prompts: Sequence[Ids], new: int, tick: Tick = lambda: None) -> list[Ids]:
        """Recompute the last 128 tokens for each new one."""
        import torch

        (ids,) = (list(prompt) for prompt in prompts)
        start = len(ids)
        with torch.inference_mode():
            for _ in range(new):
                window = ids[-self.reach :]
                padded = torch.tensor([[self.pad] * (self.reach - len(window)) + window])  # (1, S)
                ids.append(int(self.step(padded)[0, -1].argmax()))
                tick()
        return [ids[start:]]


class Ours(Contestant):
    """Compiled buckets, built before; `buckets` are other than the usual ones, `backend` may be "eager"."""

    measures = ("cold", "memory", "throughput", "batch", "score", "overhead")
    packages = ("torch", "nanogpt-buckets")
    plan = "kv"

    def __init__(self, folder: Path, work: Path, precision: str, **options: Any) -> None:
        from nanogpt_buckets import Bucket, Engine

        at = {"dtype": DTYPES[precision], "cache_dir": work / "buckets", "backend": options.get("backend", "auto")}
        chosen = [Bucket(*each) for each in options.get("buckets") or plans.load(work)[self.plan, precision]]
        strategy = "recompute" if {bucket.step for bucket in chosen} == {"recompute"} else "kv"
        cold = options.get("lazy", False)
        self.engine: Any = Engine.load(folder, plan=chosen, cached_only=True, lazy=cold, strategy=strategy, **at)
        self.steps = 3 if strategy == "recompute" else 16
        if options.get("warmup"):
            self.engine.warmup()

    def generate(self, prompts: Sequence[Ids], new: int, tick: Tick = lambda: None) -> list[Ids]:
        """Stream one, or ask the engine for all of them at once."""
        if len(prompts) == 1:
            found = []
            for token in self.engine.stream(list(prompts[0]), max_new_tokens=new, temperature=0):
                found.append(token.id)
                tick()
            return [found]
        done = self.engine.generate([list(ids) for ids in prompts], max_new_tokens=new, temperature=0)
        return [made.token_ids[len(ids) :] for made, ids in zip(done, prompts, strict=True)]

    def step_times(self, prompts: Sequence[Ids], new: int) -> tuple[list[Ids], float, list[float]]:
        """A batch does not stream: what a step took follows from the engine's own report, host work included."""
        if len(prompts) == 1:
            return super().step_times(prompts, new)
        before = self.engine.report()
        ids = self.generate(prompts, new)
        after = self.engine.report()
        spent = {bucket: (count.steps, count.seconds) for bucket, count in before.buckets.items()}
        inside = first = 0.0
        for bucket, count in after.buckets.items():
            seconds = count.seconds - spent.get(bucket, (0, 0.0))[1]
            first, inside = (first, inside + seconds) if bucket.step == "decode" else (first + seconds, inside)
        host = after.seconds - before.seconds - first - inside
        return ids, first + host / new, [(inside + host * (new - 1) / new) / (new - 1)]

    def score(self, texts: Sequence[Ids]) -> list[float]:
        """Score by the engine."""
        return [found.logprob for found in self.engine.score([list(ids) for ids in texts])]

    def overhead(self, prompt: Ids, new: int, **sampling: Any) -> float:
        """Return the seconds of the host's work per step: time in `generate` while no bucket ran."""
        before = self.engine.report()
        self.engine.generate([prompt], max_new_tokens=new, seed=1, **sampling)
        after = self.engine.report()
        spent = after.overhead_s * after.steps - before.overhead_s * before.steps
        return float(spent / (after.steps - before.steps))


class OursRecompute(Ours):
    """The ladder of steps that recompute the context."""

    measures = ()
    remembers = False
    plan = "recompute"


class OursOneShape(OursRecompute):
    """One bucket as long as the model's context."""

    plan = "one shape"
