"""The network against two oracles that this project did not write, or wrote only here: transformers and nanoGPT."""

import math
from pathlib import Path

import pytest
import torch
from networks import random_network
from torch import nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from nanogpt_buckets.model import gpt
from nanogpt_buckets.model.architecture import Architecture
from nanogpt_buckets.model.checkpoint import open_model

ODD = {"n_layer": 3, "n_head": 3, "n_embd": 48, "n_positions": 100, "vocab_size": 211, "initializer_range": 0.2}
LOWERINGS = [gpt.Lowering(attention) for attention in ("sdpa", "explicit", "sums")]

VARIANTS = {
    "gelu_new": {},
    "gelu": {"activation_function": "gelu"},
    "gelu_fast": {"activation_function": "gelu_fast"},
    "gelu_pytorch_tanh": {"activation_function": "gelu_pytorch_tanh"},
    "relu": {"activation_function": "relu"},
    "silu": {"activation_function": "silu"},
    "unscaled": {"scale_attn_weights": False},
    "by_layer": {"scale_attn_by_inverse_layer_idx": True},
    "upcast": {"reorder_and_upcast_attn": True, "scale_attn_by_inverse_layer_idx": True},
    "untied": {"tie_word_embeddings": False},
    "n_inner": {"n_inner": 80},
    "epsilon": {"layer_norm_epsilon": 1e-3},
}


def saved(folder: Path, *, seed: int = 0, max_shard_size: str = "5GB", **fields) -> GPT2LMHeadModel:
    """A GPT-2 whose every parameter is random, biases and gains too, saved by transformers."""
    torch.manual_seed(seed)
    config = GPT2Config(**(ODD | {"bos_token_id": 0, "eos_token_id": 0} | fields))
    config._attn_implementation = "eager"  # the only one that honours reorder_and_upcast_attn
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape
    assert ours.dtype == torch.float32
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("lowering", LOWERINGS, ids=lambda lowering: lowering.attention)
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_transformers(variant, lowering, tmp_path):
    oracle = saved(tmp_path / "hf", **VARIANTS[variant])
    model = open_model(tmp_path / "hf")
    ids = torch.randint(0, 211, (2, 37), generator=torch.Generator().manual_seed(1))

    network = gpt.from_weights(model.architecture, model.weights("float32").tensors, lowering)

    with torch.no_grad():
        assert_close(network(ids), oracle(ids).logits)
        assert_close(network(ids.int()), oracle(ids).logits)


def test_each_variant_changes_the_logits(tmp_path):
    # else the test above could pass with a switch that is ignored on both sides
    ids = torch.randint(0, 211, (1, 30), generator=torch.Generator().manual_seed(1))
    results = {}
    for name in ("gelu_new", "gelu", "relu", "silu", "unscaled", "by_layer", "untied", "n_inner", "epsilon"):
        saved(tmp_path / name, **VARIANTS[name])
        model = open_model(tmp_path / name)
        network = gpt.from_weights(model.architecture, model.weights("float32").tensors)
        results[name] = network(ids)
    for name, logits in results.items():
        others = [other for key, other in results.items() if key != name]
        # erf and tanh GELU are the closest pair: still more than ten times the tolerance apart
        assert all((logits - other).abs().max() > 1e-4 * logits.abs().max() for other in others), name


def test_the_longest_context_and_a_single_token(tmp_path):
    oracle = saved(tmp_path / "hf")
    model = open_model(tmp_path / "hf")
    network = gpt.from_weights(model.architecture, model.weights("float32").tensors)

    for length in (1, 100):
        ids = torch.randint(0, 211, (1, length), generator=torch.Generator().manual_seed(length))
        with torch.no_grad():
            assert_close(network(ids), oracle(ids).logits)


class _NanoAttention(nn.Module):
    def __init__(self, width: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width, bias), nn.Linear(width, width, bias)
        self.heads = heads

    def forward(self, x):
        batch, length, width = x.shape
        q, k, v = (
            part.reshape(batch, length, self.heads, width // self.heads).permute(0, 2, 1, 3)
            for part in self.c_attn(x).chunk(3, dim=-1)
        )
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / math.sqrt(width // self.heads)
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
        mixed = torch.einsum("bhqk,bhkd->bhqd", scores.softmax(-1), v)
        return self.c_proj(mixed.permute(0, 2, 1, 3).reshape(batch, length, width))


class _NanoNorm(nn.Module):
    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x):
        centred = x - x.mean(-1, keepdim=True)
        y = centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-5) * self.weight
        return y if self.bias is None else y + self.bias


class _NanoBlock(nn.Module):
    def __init__(self, width: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = _NanoNorm(width, bias), _NanoNorm(width, bias)
        self.attn = _NanoAttention(width, heads, bias)
        self.mlp = nn.ModuleDict(
            {"c_fc": nn.Linear(width, 4 * width, bias), "c_proj": nn.Linear(4 * width, width, bias)}
        )

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x))))


class NanoGPT(nn.Module):
    """What nanoGPT computes and how its state_dict is named, written a second time and differently."""

    def __init__(self, *, n_layer, n_head, n_embd, block_size, bias, vocab_size, dropout, tied=True) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocab_size, n_embd),
                "wpe": nn.Embedding(block_size, n_embd),
                "h": nn.ModuleList(_NanoBlock(n_embd, n_head, bias) for _ in range(n_layer)),
                "ln_f": _NanoNorm(n_embd, bias),
            }
        )
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        if tied:
            self.transformer["wte"].weight = self.lm_head.weight
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)

    def forward(self, ids):
        x = self.transformer["wte"](ids) + self.transformer["wpe"].weight[: ids.shape[1]]
        for block in self.transformer["h"]:
            x = block(x)
        return self.lm_head(self.transformer["ln_f"](x))


NANO_ARGS = {
    "n_layer": 3,
    "n_head": 3,
    "n_embd": 48,
    "block_size": 100,
    "bias": False,
    "vocab_size": 211,
    "dropout": 0.1,
}


def train_py_layout(model: NanoGPT, args: dict) -> dict:
    """Exactly what train.py saves, an optimizer with state included."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4)
    model(torch.zeros(1, 3, dtype=torch.long)).sum().backward()
    optimizer.step()
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "model_args": args,
        "iter_num": 2000,
        "best_val_loss": torch.tensor(1.47),
        "config": {"out_dir": "out", "dataset": "shakespeare_char", "learning_rate": 6e-4, "compile": True},
    }


@pytest.mark.parametrize(("bias", "tied"), [(True, True), (False, True), (True, False)])
def test_logits_are_those_of_nanogpt(bias, tied, tmp_path):
    torch.manual_seed(3)
    args = NANO_ARGS | {"bias": bias}
    oracle = NanoGPT(**args, tied=tied).eval()
    torch.save(train_py_layout(oracle, args), tmp_path / "ckpt.pt")
    model = open_model(tmp_path)
    ids = torch.randint(0, 211, (2, 41))

    assert model.architecture == Architecture(3, 3, 48, 192, 100, 211, bias=bias, activation="gelu", tied=tied)
    assert model.dataset == "shakespeare_char"
    for lowering in LOWERINGS:
        network = gpt.from_weights(model.architecture, model.weights("float32").tensors, lowering)
        with torch.no_grad():
            assert_close(network(ids), oracle(ids))


def test_from_weights_copies_nothing_and_misses_nothing():
    arch = Architecture(2, 3, 48, 192, 100, 211)
    state = dict(random_network(arch).state_dict())

    network = gpt.from_weights(arch, state)

    assert {name: p.data_ptr() for name, p in network.named_parameters()} == {n: t.data_ptr() for n, t in state.items()}
    assert not any(p.requires_grad for p in network.parameters())
    assert sum(p.numel() for p in network.parameters()) == arch.n_params
    with pytest.raises(RuntimeError, match="Missing key"):
        gpt.from_weights(arch, {name: t for name, t in state.items() if "ln_f" not in name})


@pytest.mark.parametrize("lowering", LOWERINGS, ids=lambda lowering: lowering.attention)
def test_no_position_sees_what_comes_after_it(lowering):
    torch.manual_seed(4)
    arch = Architecture(2, 3, 48, 192, 100, 211)
    network = random_network(arch, lowering).eval()
    ids = torch.randint(0, 211, (1, 20))
    changed = ids.clone()
    changed[:, 11:] = (changed[:, 11:] + 7) % 211

    with torch.no_grad():
        before, after = network(ids), network(changed)

    assert torch.equal(before[:, :11], after[:, :11])
    assert not torch.equal(before[:, 11:], after[:, 11:])
