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
    """OpenVINO GenAI's LLMPipeline."""

    measures = ()
    packages = ("openvino-genai", "optimum-intel")

    def __init__(self, folder: Path, work: Path, precision: str, **options: Any) -> None:
        raise LookupError("not driven yet")


class OnnxRuntime(Contestant):
    """onnxruntime-genai, whose model builder says whether it takes GPT-2."""

    measures = ()
    packages = ("onnxruntime-genai",)

    def __init__(self, folder: Path, work: Path, precision: str, **options: Any) -> None:
        kind = ["--precision", precision, "--execution_provider", "cpu"]
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "--input", str(folder), *kind]
        done = subprocess.run([*command, "--output", str(work / "ort")], capture_output=True, text=True)
        last = (done.stderr.strip() or "it said nothing").splitlines()[-1].replace(str(folder), "GPT-2")
        if done.returncode:
            raise LookupError(f"its model builder refuses: {last}")
        raise LookupError("its model builder takes GPT-2 now, and this script does not drive it yet")


class LlamaCpp(Contestant):
    """llama.cpp by its Python package, which has no wheel."""

    measures = ()
    packages = ("llama-cpp-python",)

    def __init__(self, folder: Path, work: Path, precision: str, **options: Any) -> None:
        raise LookupError(
            "its Python package has no wheel on PyPI; building it was not done after 6 minutes of two cores"
        )
