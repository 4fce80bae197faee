"""Who competes, by name. Opening one imports its engine; this imports none."""

from __future__ import annotations

from dataclasses import dataclass

from peers import contestants, engines
from peers.contestants import Contestant


@dataclass(frozen=True)
class Entry:
    """A contestant's class and its precision."""

    kind: type[Contestant]
    precision: str


BASE = "hf fp32"  # what ratios are to
CONTESTANTS: dict[str, Entry] = {
    BASE: Entry(contestants.HuggingFace, "fp32"),
    "hf bf16": Entry(contestants.HuggingFace, "bf16"),
    "hf-padded fp32": Entry(contestants.HuggingFacePadded, "fp32"),
    "hf-compile fp32": Entry(contestants.HuggingFaceCompiled, "fp32"),
    "ours fp32": Entry(contestants.Ours, "fp32"),
    "ours bf16": Entry(contestants.Ours, "bf16"),
    "ours-recompute fp32": Entry(contestants.OursRecompute, "fp32"),
    "ours-one-shape fp32": Entry(contestants.OursOneShape, "fp32"),
    "ct2 fp32": Entry(engines.CTranslate2, "fp32"),
    "ct2 int8": Entry(engines.CTranslate2, "int8"),
    "openvino fp32": Entry(engines.OpenVino, "fp32"),
    "openvino bf16": Entry(engines.OpenVino, "bf16"),
    "openvino int8": Entry(engines.OpenVino, "int8"),
    "onnxruntime fp32": Entry(engines.OnnxRuntime, "fp32"),
    "llama.cpp fp32": Entry(engines.LlamaCpp, "fp32"),
    "seed fp32": Entry(contestants.Seed, "fp32"),
}
