"""What a model *is*, apart from its weights: the sizes and switches that change the maths.

Everything here reaches the cache key, so it is plain data and imports no torch. Knows nothing of files or checkpoints.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from nanogpt_buckets.errors import UnsupportedModel

# fmt: off
ACTIVATIONS = (
    "gelu", "gelu_tanh", "relu", "silu", "tanh", "sigmoid", "quick_gelu", "gelu_10", "relu2", "relu6", "leaky_relu",
    "hardswish", "mish", "laplace", "sqrtsoftplus", "linear",
)
# fmt: on
# Twenty times the deepest that OpenAI published; what is larger was not meant, and costs time before it fails.
_MAX_LAYERS, _MAX_PARAMETERS = 1024, 2**40


@dataclass(frozen=True)
class Architecture:
    """Sizes and switches of one GPT-2-class model.

    Args:
        n_layer: number of blocks (L).
        n_head: attention heads (nh); divides n_embd.
        n_embd: width (C).
        n_inner: width of the MLP; GPT-2 and nanoGPT use 4 * n_embd.
        block_size: longest context in tokens; the number of learned positions.
        vocab_size: rows of the embedding (V), padding rows included.
        bias: whether Linear and LayerNorm have biases.
        activation: "gelu" (erf, nanoGPT), "gelu_tanh" (OpenAI's), or another of `ACTIVATIONS`.
        layer_norm_epsilon: added to the variance.
        tied: whether the output matrix is the token embedding.
        scale_by_head_size: divide attention scores by sqrt(n_embd / n_head).
        scale_by_layer: divide them by (layer + 1) as well.
        upcast_attention: compute attention scores and softmax in float32 whatever the dtype.

    Raises:
        UnsupportedModel: a size is impossible, n_head does not divide n_embd, or the activation is unknown.
    """

    n_layer: int
    n_head: int
    n_embd: int
    n_inner: int
    block_size: int
    vocab_size: int
    bias: bool = True
    activation: str = "gelu_tanh"
    layer_norm_epsilon: float = 1e-5
    tied: bool = True
    scale_by_head_size: bool = True
    scale_by_layer: bool = False
    upcast_attention: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise UnsupportedModel(f"the model's {field.name} is {value!r:.80}; it must be a positive whole number")
            if field.type == "bool" and not isinstance(value, bool):
                raise UnsupportedModel(f"the model's {field.name} is {value!r:.80}; it must be true or false")
        if self.n_layer > _MAX_LAYERS or self.n_params > _MAX_PARAMETERS:
            raise UnsupportedModel("the model's sizes make more layers or parameters than any model has")
        if self.n_embd % self.n_head:
            raise UnsupportedModel(f"the model's n_embd {self.n_embd} is not a multiple of its n_head {self.n_head}")
        if self.activation not in ACTIVATIONS:
            raise UnsupportedModel(
                f"activation {self.activation!r} is not supported", hint=f"supported: {', '.join(ACTIVATIONS)}"
            )
        if not isinstance(self.layer_norm_epsilon, float) or not 0 < self.layer_norm_epsilon < 1:
            raise UnsupportedModel(
                f"the model's layer_norm_epsilon is {self.layer_norm_epsilon!r:.80}; it must be a small positive number"
            )

    @property
    def n_params(self) -> int:
        """Number of parameters, a tied head counted once."""
        C, inner = self.n_embd, self.n_inner
        biases = 3 * C + C + inner + C + 2 * C if self.bias else 0
        block = 3 * C * C + C * C + 2 * C * inner + 2 * C + biases
        head = 0 if self.tied else self.vocab_size * C
        ln_f = 2 * C if self.bias else C
        return (self.vocab_size + self.block_size) * C + self.n_layer * block + ln_f + head

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON; the one float is written as its exact hexadecimal text, so that keys hold no floats."""
        return asdict(self) | {"layer_norm_epsilon": self.layer_norm_epsilon.hex()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Architecture:
        """Rebuild from `to_json`'s output.

        Raises:
            UnsupportedModel: a field is unknown, missing or has an impossible value.
        """
        if set(data) != {field.name for field in fields(cls)}:
            odd = sorted(set(data) ^ {field.name for field in fields(cls)})
            raise UnsupportedModel(f"the architecture has unknown or missing fields: {', '.join(odd)}")
        return cls(**(data | {"layer_norm_epsilon": float.fromhex(data["layer_norm_epsilon"])}))


def _gpt2(n_layer: int, n_head: int, n_embd: int) -> Architecture:
    return Architecture(n_layer, n_head, n_embd, 4 * n_embd, block_size=1024, vocab_size=50257)


# OpenAI's four sizes: known here so that buckets can be built with neither weights nor network.
GPT2_SIZES = {
    "gpt2": _gpt2(12, 12, 768),
    "gpt2-medium": _gpt2(24, 16, 1024),
    "gpt2-large": _gpt2(36, 20, 1280),
    "gpt2-xl": _gpt2(48, 25, 1600),
}
