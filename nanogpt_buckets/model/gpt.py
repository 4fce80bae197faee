"""The transformer: nanoGPT / GPT-2 as one readable module, ready to be traced at a fixed shape.

Parameter names are nanoGPT's and are the names used everywhere else: in prepared weights, in contracts, in digests.
Knows nothing of buckets, padding, sampling, checkpoints or compilers.

Source: structure and names after nanoGPT model.py (MIT, Andrej Karpathy).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogpt_buckets.model.architecture import Architecture


@dataclass(frozen=True)
class Lowering:
    """How the graph is written for one compiler; never changes what is computed.

    Args:
        attention: "sdpa" calls the fused kernel; "explicit" spells out matmul, finite mask and softmax (for XLA).
    """

    attention: str = "sdpa"


# Far below any attention score, yet finite: -inf rows turn into NaN on some accelerators.
_MASK_FILL = -1e9

_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "gelu_10": lambda x: F.gelu(x).clamp(-10, 10),
    "relu2": lambda x: F.relu(x).square(),
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "hardswish": F.hardswish,
    "mish": F.mish,
    "laplace": lambda x: 0.5 * (1.0 + torch.erf((x - 0.707107) / (0.282095 * 2.0**0.5))),
    "sqrtsoftplus": lambda x: F.softplus(x).sqrt(),
    "linear": lambda x: x,
}


class LayerNorm(nn.Module):
    """LayerNorm whose bias is optional, as in nanoGPT."""

    def __init__(self, width: int, *, bias: bool, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.epsilon)


def _attention_scale(arch: Architecture, layer: int) -> float:
    """Return the factor on attention scores in this layer (counted from 0)."""
    scale = (arch.n_embd // arch.n_head) ** -0.5 if arch.scale_by_head_size else 1.0
    return scale / (layer + 1) if arch.scale_by_layer else scale


class CausalSelfAttention(nn.Module):
    """Masked multi-head attention: position t sees positions 0..t, so right padding is never seen."""

    def __init__(self, arch: Architecture, layer: int, lowering: Lowering) -> None:
        super().__init__()
        self.c_attn = nn.Linear(arch.n_embd, 3 * arch.n_embd, bias=arch.bias)
        self.c_proj = nn.Linear(arch.n_embd, arch.n_embd, bias=arch.bias)
        self.n_head = arch.n_head
        self.scale = _attention_scale(arch, layer)
        self.upcast = arch.upcast_attention
        self.explicit = lowering.attention == "explicit"

    def forward(self, x: Tensor) -> Tensor:
        B, S, C = x.shape
        hs = C // self.n_head
        # tensor_split, never list-form split: the latter returns wrong data on torch-xla 2.9 without functionalization
        q, k, v = torch.tensor_split(self.c_attn(x), 3, dim=2)  # 3 x (B, S, C)
        q = q.view(B, S, self.n_head, hs).transpose(1, 2)  # (B, nh, S, hs)
        k = k.view(B, S, self.n_head, hs).transpose(1, 2)  # (B, nh, S, hs)
        v = v.view(B, S, self.n_head, hs).transpose(1, 2)  # (B, nh, S, hs)
        if self.upcast:
            q, k = q.float(), k.float()
        if self.explicit or self.upcast:
            y = self._attend_explicitly(q, k, v)
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
        y = y.transpose(1, 2).reshape(B, S, C)  # (B, nh, S, hs) -> (B, S, C)
        return cast(Tensor, self.c_proj(y))

    def _attend_explicitly(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        S = q.shape[2]
        scores = (q @ k.transpose(-2, -1)) * self.scale  # (B, nh, S, S)
        position = torch.arange(S, dtype=torch.int32, device=q.device)
        future = position.unsqueeze(0) > position.unsqueeze(1)  # (S, S): True where key comes after query
        scores = torch.where(future, _MASK_FILL, scores)
        return F.softmax(scores, dim=-1).to(v.dtype) @ v  # (B, nh, S, hs)


class MLP(nn.Module):
    """Position-wise feed-forward: widen, activate, project back."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.c_fc = nn.Linear(arch.n_embd, arch.n_inner, bias=arch.bias)
        self.c_proj = nn.Linear(arch.n_inner, arch.n_embd, bias=arch.bias)
        self.activation = _ACTIVATIONS[arch.activation]

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.c_proj(self.activation(self.c_fc(x))))


class Block(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, arch: Architecture, layer: int, lowering: Lowering) -> None:
        super().__init__()
        epsilon = arch.layer_norm_epsilon
        self.ln_1 = LayerNorm(arch.n_embd, bias=arch.bias, epsilon=epsilon)
        self.attn = CausalSelfAttention(arch, layer, lowering)
        self.ln_2 = LayerNorm(arch.n_embd, bias=arch.bias, epsilon=epsilon)
        self.mlp = MLP(arch)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + cast(Tensor, self.mlp(self.ln_2(x)))


class GPT(nn.Module):
    """The whole network, cut in two at the place where padding is dropped: `hidden`, then `head`.

    Args:
        arch: sizes and everything that changes the maths.
        lowering: how attention is written; the numbers are the same.
    """

    def __init__(self, arch: Architecture, lowering: Lowering | None = None) -> None:
        super().__init__()
        self.arch = arch
        lowering = lowering or Lowering()
        self.transformer = nn.ModuleDict(
            {
                "wte": _embedding(arch.vocab_size, arch.n_embd),
                "wpe": _embedding(arch.block_size, arch.n_embd),
                "h": nn.ModuleList([Block(arch, layer, lowering) for layer in range(arch.n_layer)]),
                "ln_f": LayerNorm(arch.n_embd, bias=arch.bias, epsilon=arch.layer_norm_epsilon),
            }
        )
        # A tied head is not a second name for wte: it does not exist, so no alias can be forgotten.
        self.lm_head = None if arch.tied else nn.Linear(arch.n_embd, arch.vocab_size, bias=False)

    def hidden(self, input_ids: Tensor) -> Tensor:
        """Run the layers on right-padded ids.

        Args:
            input_ids: int32 or int64 (B, S).

        Returns:
            The last layer's output (B, S, C), before the final LayerNorm.
        """
        S = input_ids.shape[1]
        position = torch.arange(S, dtype=input_ids.dtype, device=input_ids.device)  # (S)
        x = self.transformer["wte"](input_ids) + self.transformer["wpe"](position)  # (B, S, C)
        for block in cast(nn.ModuleList, self.transformer["h"]):
            x = block(x)
        return cast(Tensor, x)

    def head(self, x: Tensor) -> Tensor:
        """Project hidden states (..., C) to float32 logits (..., V)."""
        x = self.transformer["ln_f"](x)
        matrix = self.transformer["wte"].weight if self.lm_head is None else self.lm_head.weight
        return F.linear(x, cast(Tensor, matrix)).float()

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return float32 logits (B, S, V) at every position: the oracle and the training path."""
        return self.head(self.hidden(input_ids))


def _embedding(rows: int, width: int) -> nn.Embedding:
    # left uninitialised: drawing normal numbers for a weightless model imports a second's worth of torch
    return nn.Embedding(rows, width, _weight=torch.empty(rows, width))


def from_weights(arch: Architecture, weights: Mapping[str, Tensor], lowering: Lowering | None = None) -> GPT:
    """Build a GPT whose parameters *are* the given tensors: no copy, so memory-mapped weights stay mapped.

    Args:
        arch: the architecture the weights belong to.
        weights: canonical name -> tensor, exactly the module's names (a tied head is absent).
        lowering: see `Lowering`.
    """
    with torch.device("meta"):
        gpt = GPT(arch, lowering)
    gpt.load_state_dict(dict(weights), strict=True, assign=True)
    return gpt.eval().requires_grad_(False)
