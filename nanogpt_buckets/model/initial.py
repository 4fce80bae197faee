"""Weights to start training from. Only the demo's training and tests need them. Knows nothing of compiled things."""

from __future__ import annotations

import math

import torch
from torch import nn

from nanogpt_buckets.model.gpt import GPT


def init_weights(gpt: GPT, generator: torch.Generator | None = None) -> None:
    """Initialise in place for training: N(0, 0.02), residual projections scaled by depth.

    Source: GPT-2 paper by way of nanoGPT model.py (MIT).
    """
    residual_std = 0.02 / math.sqrt(2 * gpt.arch.n_layer)
    for name, parameter in gpt.named_parameters():
        if parameter.dim() >= 2:
            std = residual_std if name.endswith("c_proj.weight") else 0.02
            nn.init.normal_(parameter, std=std, generator=generator)
