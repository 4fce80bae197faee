"""Mistakes so small that bfloat16's rounding hides them in every single number, and many numbers together do not.

What a bucket returns differs from the truth by rounding, which points nowhere, and by a mistake, if it makes one, which
points where a model that makes it would be. So the difference is projected on that: near 0 if the bucket is right, near
1 if it makes the mistake. How far rounding alone can carry it follows from how large it is and from how many numbers
are independent: no more in a context than the network is wide.

Measured with 16 to 24 contexts, widths 48 to 768, 2 to 12 layers. Logits x 1.001: the right model, its activations
computed as one, is 0.0 to 0.3 of the way there, the wrong one 0.8 to 1.0. As XLA's CPU client runs it, each operation
rounded to bfloat16, the right one is 0.2 to 0.35 of the way to x 0.999, so there x 1.003 is looked for. The other GELU:
with weights that magnify it 0.0 to 0.2 and 0.95 to 1.04; with ordinary ones rounding alone reaches 0.4 to 1.7 in one
standard error. But weights that magnify it also magnify what rounding within GELU does: the right one, written out in
bfloat16 as XLA lowers it, is then up to 0.8 of the way in the opposite direction and up to 3.3 times as far from the
truth as eager is, so there it cannot be told from a mistake. Nor can another epsilon of LayerNorm (1e-6 for 1e-5)
anywhere: the right model is up to 1.5 off.

Knows nothing of buckets, nor of how they are asked.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from nanogpt_buckets.model.architecture import Architecture

# The two that differ by less than bfloat16 rounds; every other pair is further apart than that.
_OTHER_GELU = {"gelu": "gelu_tanh", "gelu_tanh": "gelu", "gelu_10": "gelu_tanh"}
# By which logits are too large, where activations are computed as one, and where they are rounded within.
SCALES = {True: 1.001, False: 1.003}
# Half the way to the mistake, in standard errors five, and twice what eager bfloat16 shows (as of its largest error).
_HALF, _ERRORS, _FACTOR = 0.5, 5.0, 2.0
_WANTED = 18432


@dataclass(frozen=True)
class Weighed:
    """How far answers lie towards a mistake, from 0 to 1, its standard error, and how far they may."""

    share: float
    error: float
    limit: float

    @property
    def made(self) -> bool:
        """Whether the answers are nearer to the mistake, or its opposite, than rounding explains."""
        return abs(self.share) > self.limit

    @property
    def visible(self) -> bool:
        """Whether answers that make the mistake would have been told from those that do not."""
        return self.limit < 1 - 3 * self.error


def slips(
    arch: Architecture, weights: Mapping[str, Tensor], fused: bool
) -> Iterator[tuple[str, Architecture, dict[str, Tensor]]]:
    """Yield mistakes by name, each as a model that makes it; activations that are not `fused` round within."""
    scale = SCALES[fused]
    larger = {name: w * scale if name.startswith("transformer.ln_f.") else w for name, w in weights.items()}
    yield f"logits x {scale}", arch, larger
    if fused and (other := _OTHER_GELU.get(arch.activation)) is not None:
        yield f"{other} for {arch.activation}", replace(arch, activation=other), dict(weights)


def contexts(arch: Architecture) -> int:
    """Return how many contexts it takes to see one."""
    return max(24, _WANTED // arch.n_embd)


def weigh(found: Tensor, truth: Tensor, eager: Tensor, slip: Tensor, width: int) -> Weighed:
    """Project what a bucket returned (N, ...) on a mistake.

    Args:
        found: float32 answers for N contexts; 0 where there is nothing to answer.
        truth: what the eager float32 model answers.
        eager: what eager bfloat16 answers.
        slip: what a float32 model answers that makes the mistake.
        width: of the network.
    """
    away, towards = (found - truth).double(), (slip - truth).double()
    length = (towards * towards).sum().item()
    if not length:
        return Weighed(0.0, math.inf, math.inf)
    share = (away * towards).sum().item() / length
    own = ((eager - truth).double() * towards).sum().item() / length
    independent = (truth != 0).flatten(1).sum(1).clamp(max=width).sum().item()
    error = math.sqrt((away * away).sum().item() / length / independent)
    return Weighed(share, error, max(_HALF, _ERRORS * error, _FACTOR * abs(own)))
