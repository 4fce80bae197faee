"""What `scripts/bench_peers` lets compete, engines that are not on PyTorch. See `contestants.py`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from peers.contestants import Contestant, Ids, Tick
from peers.environment import EXPORT


def _once(place: Path, make: Callable[[Path], object]) -> Path:
    """Make a folder, if it is not there; a half-made one is never taken for whole."""
    if not place.exists():
        begun = place.with_name(f"{place.name}-begun")
        shutil.rmtree(begun, ignore_errors=True)
        make(begun)
        begun.rename(place)
    return place


class CTranslate2(Contestant):
    """CTranslate2, converted from the folder; a token is the string of its id."""

    packages = ("ctranslate2",)

    def __init__(self, folder: Path, work: Path, precision: str, **options: Any) -> None:
        import ctranslate2

        kind = {"fp32": "float32", "int8": "int8"}[precision]
        place = _once(work / f"ct2-{precision}", lambda begun: _convert(folder, begun, kind))
        cores = len(os.sched_getaffinity(0))
        self.model = ctranslate2.Generator(str(place), device="cpu", compute_type=kind, intra_threads=cores)

    def generate(self, prompts: Sequence[Ids], new: int, tick: Tick = lambda: None) -> list[Ids]:
        """Continue prompts in batches of at most eight."""

        def after_each_token(result: Any) -> bool:
            if result.batch_id == 0:  # a step calls once for each row
                tick()
            return False

        if len(prompts) <= 8:
            options: dict[str, Any] = {"callback": after_each_token}
        else:
            options = {"max_batch_size": 8}
        words = [list(map(str, ids)) for ids in prompts]
        found = self.model.generate_batch(
            words, max_length=new, sampling_topk=1, include_prompt_in_result=False, **options
        )
        return [list(row.sequences_ids[0]) for row in found]

    def score(self, texts: Sequence[Ids]) -> list[float]:
        """Score in batches of at most eight."""
        found = self.model.score_batch([list(map(str, ids)) for ids in texts], max_batch_size=8)
        return [sum(row.log_probs) for row in found]


def _convert(folder: Path, begun: Path, kind: str) -> None:
    from ctranslate2.converters import TransformersConverter

    vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]

    class Numbers:
        """The vocabulary: every id is its own word. The converter wants special ones; no text has them."""

        bos_token = eos_token = unk_token = str(vocab_size - 1)

        def get_vocab(self) -> dict[str, int]:
            return {str(token): token for token in range(vocab_size)}

    class Converter(TransformersConverter):
        def load_tokenizer(self, *given: Any, **options: Any) -> Numbers:
            return Numbers()

    Converter(str(folder)).convert(str(begun), quantization=kind)


class OpenVino(Contestant):
    """OpenVINO GenAI's LLMPipeline, exported by optimum-intel; bf16 is how it computes, int8 what weights are."""

    measures = ("cold", "memory", "throughput")
    packages = ("openvino-genai",)

    def __init__(self, folder: Path, work: Path, precision: str, **options: Any) -> None:
        weights = "int8" if precision == "int8" else "fp32"
        place = _once(work / f"openvino-{weights}", lambda begun: _export(folder, begun, weights))
        import openvino_genai

        self.genai: Any = openvino_genai
        hint = "bf16" if precision == "bf16" else "f32"
        self.pipeline: Any = openvino_genai.LLMPipeline(str(place), "CPU", INFERENCE_PRECISION_HINT=hint)
        self.end = json.loads((folder / "config.json").read_text())["vocab_size"] - 1  # it wants one; no text has it

    def generate(self, prompts: Sequence[Ids], new: int, tick: Tick = lambda: None) -> list[Ids]:
        """Continue one, or hand over all, padded on the left: it schedules them itself."""
        import numpy
        import openvino

        genai = self.genai

        class Streamer(genai.StreamerBase):  # type: ignore[misc]
            def write(self, token: Any) -> Any:
                tick()
                return genai.StreamingStatus.RUNNING

            def end(self) -> None:
                pass

        config = genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = new, True, False
        config.eos_token_id, config.stop_token_ids = self.end, {self.end}
        width = max(map(len, prompts))
        ids, mask = (
            openvino.Tensor(numpy.array([[0] * (width - len(row)) + made(row) for row in prompts], dtype=numpy.int64))
            for made in (list, lambda row: [1] * len(row))
        )  # (B, S)
        streamer = [Streamer()] if len(prompts) == 1 else []
        found: list[Ids] = self.pipeline.generate(genai.TokenizedInputs(ids, mask), config, *streamer).tokens
        return found


def _export(folder: Path, begun: Path, weights: str) -> None:
    tool = EXPORT / "bin" / "optimum-cli"
    if not tool.exists():
        raise LookupError(f"no export is at hand: {EXPORT.name} is made by a run without --here")
    kind = ["--task", "text-generation-with-past", "--weight-format", weights, "--disable-convert-tokenizer"]
    _call([str(tool), "export", "openvino", "--model", str(folder), *kind, str(begun)], "its export fails")


def _call(command: list[str], complaint: str) -> None:
    """Run a tool; a LookupError has its last words."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise LookupError(f"{complaint}: {(done.stderr.strip() or 'it said nothing').splitlines()[-1]}")


class OnnxRuntime(Contestant):
    """onnxruntime-genai, whose model builder says whether it takes GPT-2."""

    measures = ()
    packages = ("onnxruntime-genai",)

    def __init__(self, folder: Path, work: Path, precision: str, **options: Any) -> None:
        kind = ["--precision", precision, "--execution_provider", "cpu"]
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "--input", str(folder), *kind]
        try:
            _call([*command, "--output", str(work / "ort")], "its model builder refuses")
        except LookupError as error:
            raise LookupError(str(error).replace(str(folder), "GPT-2")) from None
        raise LookupError("its model builder takes GPT-2 now, and this script does not drive it yet")


class LlamaCpp(Contestant):
    """llama.cpp by its Python package, which has no wheel."""

    measures = ()
    packages = ("llama-cpp-python",)

    def __init__(self, folder: Path, work: Path, precision: str, **options: Any) -> None:
        raise LookupError(
            "its Python package has no wheel on PyPI; building it was not done after 6 minutes of two cores"
        )
