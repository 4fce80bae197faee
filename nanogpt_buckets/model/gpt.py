"""The transformer: nanoGPT / GPT-2 as one readable module, ready to be traced at a fixed shape.

Parameter names are nanoGPT's and are the names used everywhere else: in prepared weights, in contracts, in digests.
Knows nothing of buckets, padding, sampling, checkpoints or compilers.

Source: structure and names after nanoGPT model.py (MIT, Andrej Karpathy).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogpt_buckets.model.architecture import Architecture


@dataclass(frozen=True)
class Lowering:
    """How the graph is written for one compiler; never changes what is computed.

    Args:
        attention: "sdpa" calls the fused kernel; "explicit" spells out matmul, finite mask and softmax (for XLA);
            "sums" is "sdpa" but for a single query, which looks back by multiply and sum.
        linear: by how many rows a product with a weight matrix has, how it is written: "aten"; "rows", which spells
            out multiply and sum for each, and all fuse into one loop over the weights; "onednn", which calls that.
    """

    attention: str = "sdpa"
    linear: Callable[[int], str] = lambda rows: "aten"


class Memory(Protocol):
    """Where keys and values of earlier calls are, and those of this one go."""

    def __call__(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Take in new keys and values (B, nh, T, hs) of a layer and return all to attend to, and which are seen.

        That is k and v (B, nh, S, hs), and bool (B, 1, T, S), True where seen; None if position t sees 0..t.
        """


# Sums of one loop over weights; twice as many are slower for want of registers.
_SUMS = 8

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


def _project(x: Tensor, weight: Tensor, bias: Tensor | None, kernels: Callable[[int], str]) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])  # (..., C) -> (N, C)
    kernel = kernels(rows.shape[0])
    if kernel == "aten":
        return F.linear(x, weight, bias)
    if kernel == "onednn":
        y = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")  # (N, D)
    else:
        # sums that advance in several places of the weights at once come nearer to what memory can deliver
        places = max(1, _SUMS // rows.shape[0])
        parts = torch.split(weight, max(1, weight.shape[0] // places))
        y = torch.stack([torch.cat([(row * part).sum(-1) for part in parts]) for row in rows])  # N x (C) -> (N, D)
        y = y if bias is None else y + bias
    return cast(Tensor, y.view(*x.shape[:-1], -1))


class Linear(nn.Linear):
    """nn.Linear, written as the lowering says."""

    def __init__(self, width: int, to: int, *, bias: bool, kernels: Callable[[int], str]) -> None:
        super().__init__(width, to, bias=bias)
        self.kernels = kernels

    def forward(self, x: Tensor) -> Tensor:
        return _project(x, self.weight, self.bias, self.kernels)


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
        self.c_attn = Linear(arch.n_embd, 3 * arch.n_embd, bias=arch.bias, kernels=lowering.linear)
        self.c_proj = Linear(arch.n_embd, arch.n_embd, bias=arch.bias, kernels=lowering.linear)
        self.layer = layer
        self.n_head = arch.n_head
        self.scale = _attention_scale(arch, layer)
        self.upcast = arch.upcast_attention
        self.attention = lowering.attention

    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:
        B, T, C = x.shape
        hs = C // self.n_head
        # tensor_split, never list-form split: the latter returns wrong data on torch-xla 2.9 without functionalization
        q, k, v = torch.tensor_split(self.c_attn(x), 3, dim=2)  # 3 x (B, T, C)
        q = q.view(B, T, self.n_head, hs).transpose(1, 2)  # (B, nh, T, hs)
        k = k.view(B, T, self.n_head, hs).transpose(1, 2)  # (B, nh, T, hs)
        v = v.view(B, T, self.n_head, hs).transpose(1, 2)  # (B, nh, T, hs)
        seen = None
        if memory is not None:
            k, v, seen = memory(self.layer, k, v)  # 2 x (B, nh, S, hs), (B, 1, T, S)
        if self.upcast:
            q, k = q.float(), k.float()
        if self.attention == "explicit" or self.upcast:
            y = self._attend_explicitly(q, k, v, seen)
        elif self.attention == "sums" and T == 1:
            y = self._attend_by_sums(q, k, v, seen)
        else:
            y = F.scaled_dot_product_attention(q, k, v, seen, is_causal=seen is None, scale=self.scale)
        y = y.transpose(1, 2).reshape(B, T, C)  # (B, nh, T, hs) -> (B, T, C)
        return cast(Tensor, self.c_proj(y))

    def _attend_explicitly(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
        scores = (q @ k.transpose(-2, -1)) * self.scale  # (B, nh, T, S)
        if seen is None:
            position = torch.arange(q.shape[2], dtype=torch.int32, device=q.device)
            seen = position.unsqueeze(0) <= position.unsqueeze(1)  # (S, S): False where key comes after query
        scores = torch.where(seen, scores, _MASK_FILL)
        return F.softmax(scores, dim=-1).to(v.dtype) @ v  # (B, nh, T, hs)

    def _attend_by_sums(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
        # fused, it reads k and v once; the fused kernel takes twice as long over 1024 positions in bfloat16
        scores = (q.float() * k.float()).sum(-1) * self.scale  # (B, nh, S)
        if seen is not None:
            scores = torch.where(seen[:, :, 0], scores, _MASK_FILL)
        weights = F.softmax(scores, dim=-1).unsqueeze(-1)  # (B, nh, S, 1)
        return (weights * v.float()).sum(2, keepdim=True).to(v.dtype)  # (B, nh, 1, hs)


class MLP(nn.Module):
    """Position-wise feed-forward: widen, activate, project back."""

    def __init__(self, arch: Architecture, lowering: Lowering) -> None:
        super().__init__()
        self.c_fc = Linear(arch.n_embd, arch.n_inner, bias=arch.bias, kernels=lowering.linear)
        self.c_proj = Linear(arch.n_inner, arch.n_embd, bias=arch.bias, kernels=lowering.linear)
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
        self.mlp = MLP(arch, lowering)

    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), memory)
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
        self.lowering = lowering = lowering or Lowering()
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

    def hidden(self, input_ids: Tensor, position: Tensor | None = None, memory: Memory | None = None) -> Tensor:
        """Run the layers on right-padded ids.

        Args:
            input_ids: int32 or int64 (B, T).
            position: where each id is in its context, integers (B, T); None for 0..T-1.
            memory: of what came before, if anything did.

        Returns:
            The last layer's output (B, T, C), before the final LayerNorm.
        """
        if position is None:
            position = torch.arange(input_ids.shape[1], dtype=input_ids.dtype, device=input_ids.device)  # (T)
        x = self.transformer["wte"](input_ids) + self.transformer["wpe"](position)  # (B, T, C)
        for block in cast(nn.ModuleList, self.transformer["h"]):
            x = block(x, memory)
        return cast(Tensor, x)

    def head(self, x: Tensor) -> Tensor:
        """Project hidden states (..., C) to float32 logits (..., V)."""
        x = self.transformer["ln_f"](x)
        matrix = self.transformer["wte"].weight if self.lm_head is None else self.lm_head.weight
        return _project(x, cast(Tensor, matrix), None, self.lowering.linear).float()

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
