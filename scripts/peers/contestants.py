"""What `scripts/bench_peers` lets compete: each continues token ids greedily in its own way.

A contestant is made in a process of its own. It knows nothing of clocks, nor of the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

Ids = list[int]


class Contestant:
    """One engine at one precision; `folder` is the model, `work` is where it may keep what it converts or compiles.

    Attributes:
        batches: whether `generate` takes more than one prompt.
        reach: the longest context that it can continue.
        packages: distributions whose versions are reported.
    """

    batches = True
    reach = 1024
    packages: tuple[str, ...] = ("torch", "transformers")

    def __init__(self, folder: Path, work: Path, precision: str) -> None:
        raise NotImplementedError

    def generate(self, prompts: Sequence[Ids], new: int) -> list[Ids]:
        """Return the `new` greedy token ids after each prompt."""
        raise NotImplementedError

    def score(self, texts: Sequence[Ids]) -> None:
        """Compute the log-probability of every token but the first of each text."""
        raise LookupError("scores nothing")


class HuggingFace(Contestant):
    """`generate` with its KV cache, eager; a batch is padded on the left."""

    def __init__(self, folder: Path, work: Path, precision: str) -> None:
        import torch
        from transformers import GPT2LMHeadModel

        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
        self.model: Any = GPT2LMHeadModel.from_pretrained(folder, dtype=dtype).eval()
        self.options: dict[str, Any] = {"do_sample": False, "pad_token_id": 0}

    def generate(self, prompts: Sequence[Ids], new: int) -> list[Ids]:
        """Continue one padded batch."""
        import torch

        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(ids)) + ids for ids in prompts])  # (B, S)
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts])  # (B, S)
        with torch.inference_mode():
            made = self.model.generate(ids, attention_mask=mask, max_new_tokens=new, **self.options)
        rows: list[Ids] = made[:, width:].tolist()
        return rows

    def score(self, texts: Sequence[Ids]) -> None:
        """Run forward with labels, text by text."""
        import torch

        with torch.inference_mode():
            for text in texts:
                ids = torch.tensor([text])  # (1, S)
                float(self.model(input_ids=ids, labels=ids).loss)


class HuggingFaceCompiled(HuggingFace):
    """`generate` with a static cache, which compiles the step by `torch.compile`; every prompt length compiles anew."""

    batches = False

    def __init__(self, folder: Path, work: Path, precision: str) -> None:
        super().__init__(folder, work, precision)
        import torch

        self.options["cache_implementation"] = "static"
        self.model.forward = torch.compile(self.model.forward, dynamic=False)


class Seed(Contestant):
    """One traced shape, (1, 128), whose weights are inlined; a prompt is padded on the left with the end token."""

    batches = False
    reach = 128

    def __init__(self, folder: Path, work: Path, precision: str) -> None:
        import torch
        from transformers import GPT2LMHeadModel

        model: Any = GPT2LMHeadModel.from_pretrained(folder, attn_implementation="eager").eval()
        self.pad = min(50256, model.config.vocab_size - 1)

        class Step(torch.nn.Module):
            def forward(self, ids: torch.Tensor) -> torch.Tensor:
                logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
                return logits

        step = Step()
        step.inner = model
        with torch.inference_mode():
            example = torch.full((1, 128), self.pad)
            self.step: Any = torch.jit.freeze(torch.jit.trace(step.eval(), example, check_trace=False))

    def generate(self, prompts: Sequence[Ids], new: int) -> list[Ids]:
        """Recompute the last 128 tokens for each new one."""
        import torch

        (ids,) = (list(prompt) for prompt in prompts)
        start = len(ids)
        with torch.inference_mode():
            for _ in range(new):
                window = ids[-128:]
                padded = torch.tensor([[self.pad] * (128 - len(window)) + window])  # (1, 128)
                ids.append(int(self.step(padded)[0, -1].argmax()))
        return [ids[start:]]


class Ours(Contestant):
    """Compiled buckets; the plan is the contestant's."""

    packages = ("torch", "nanogpt-buckets")
    strategy, seq, batch = "kv", (128, 512, 1024), (1, 8)

    def __init__(self, folder: Path, work: Path, precision: str) -> None:
        from nanogpt_buckets import Engine, Plan, build

        dtype = {"fp32": "float32", "bf16": "bfloat16"}[precision]
        plan = Plan.grid(batch=self.batch, seq=self.seq, strategy=self.strategy)
        report = build(plan, model=folder, cache_dir=work / "buckets", dtype=dtype)
        if report.failed:
            raise RuntimeError("; ".join(f"bucket {row.bucket}: {row.why}" for row in report.rows if row.why))
        options: Any = {"cache_dir": work / "buckets", "dtype": dtype}
        self.engine: Any = Engine.load(folder, plan=plan, cached_only=True, **options)

    def generate(self, prompts: Sequence[Ids], new: int) -> list[Ids]:
        """Ask the engine for all of them at once."""
        done = self.engine.generate([list(ids) for ids in prompts], max_new_tokens=new, temperature=0)
        return [found.token_ids[len(ids) :] for found, ids in zip(done, prompts, strict=True)]

    def score(self, texts: Sequence[Ids]) -> None:
        """Score by the engine."""
        if not hasattr(self.engine, "score"):
            raise LookupError("the engine has no score yet")
        self.engine.score([list(ids) for ids in texts])


class OursRecompute(Ours):
    """The ladder of steps that recompute the context."""

    strategy, batch = "recompute", (1,)


class OursOneShape(OursRecompute):
    """One bucket as long as the model's context."""

    seq = (1024,)


class CTranslate2(Contestant):
    """CTranslate2, converted from the folder."""

    packages = ("ctranslate2",)

    def __init__(self, folder: Path, work: Path, precision: str) -> None:
        import ctranslate2

        kind = {"fp32": "float32", "int8": "int8"}[precision]
        place = work / f"ct2-{precision}"
        if not place.exists():
            converter = ctranslate2.converters.TransformersConverter(str(folder))
            converter.convert(str(place), quantization=kind)
        self.model = ctranslate2.Generator(str(place), device="cpu", compute_type=kind)
        self.words: list[str] = __import__("json").loads((place / "vocabulary.json").read_text(encoding="utf-8"))
        self.ids = {word: index for index, word in enumerate(self.words)}

    def _words(self, texts: Sequence[Ids]) -> list[list[str]]:
        return [[self.words[token] for token in text] for text in texts]

    def generate(self, prompts: Sequence[Ids], new: int) -> list[Ids]:
        """Continue prompts in batches of at most eight."""
        options: dict[str, Any] = {"max_length": new, "min_length": new, "sampling_topk": 1}
        found = self.model.generate_batch(
            self._words(prompts), max_batch_size=8, include_prompt_in_result=False, **options
        )
        return [list(row.sequences_ids[0]) for row in found]

    def score(self, texts: Sequence[Ids]) -> None:
        """Score in batches of at most eight."""
        self.model.score_batch(self._words(texts), max_batch_size=8)


class NotTaken(Contestant):
    """A peer that this script does not drive yet: its row says so."""

    reason = ""

    def __init__(self, folder: Path, work: Path, precision: str) -> None:
        raise LookupError(self.reason)


class OpenVino(NotTaken):
    """OpenVINO GenAI."""

    packages = ("openvino-genai", "optimum-intel")
    reason = "not driven yet: needs an export by optimum-intel with a tokenizer"


class OnnxRuntime(NotTaken):
    """onnxruntime-genai."""

    packages = ("onnxruntime-genai",)
    reason = "not driven yet: its model builder is not known to take GPT-2"


class LlamaCpp(NotTaken):
    """llama.cpp."""

    packages = ("llama-cpp-python",)
    reason = "not driven yet: its Python package has no wheel, so it would be built"


CONTESTANTS: dict[str, tuple[type[Contestant], str]] = {
    "hf fp32": (HuggingFace, "fp32"),
    "hf bf16": (HuggingFace, "bf16"),
    "hf-compile fp32": (HuggingFaceCompiled, "fp32"),
    "ours fp32": (Ours, "fp32"),
    "ours bf16": (Ours, "bf16"),
    "ours-recompute fp32": (OursRecompute, "fp32"),
    "ours-one-shape fp32": (OursOneShape, "fp32"),
    "ct2 fp32": (CTranslate2, "fp32"),
    "ct2 int8": (CTranslate2, "int8"),
    "openvino fp32": (OpenVino, "fp32"),
    "onnxruntime fp32": (OnnxRuntime, "fp32"),
    "llama.cpp fp32": (LlamaCpp, "fp32"),
    "seed fp32": (Seed, "fp32"),
}
