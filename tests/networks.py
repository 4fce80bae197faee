"""Networks of random weights."""

import torch

from nanogpt_buckets.model import gpt
from nanogpt_buckets.model.architecture import Architecture


def random_network(arch: Architecture, lowering: gpt.Lowering | None = None, *, seed: int = 0) -> gpt.GPT:
    network = gpt.GPT(arch, lowering)
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=0.02, generator=generator)
    return network
