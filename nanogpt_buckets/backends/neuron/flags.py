"""What neuronx-cc is told: the flags that every bucket gets and the user's, in one spelling. Hashed into every family.

Knows nothing of how the user wrote them: see `arguments`. Proof level N1: a test double reads them; what they do is N0,
from the AWS Neuron documentation, neuronx-cc command line reference.
"""

from __future__ import annotations

from nanogpt_buckets.versions import version_tuple

# Saturating keeps an infinity from becoming NaN on trn1 and inf2, and is documented to change nothing on later cores.
ALWAYS = {
    "--auto-cast": "none", "--model-type": "transformer", "--optlevel": "2", "--enable-saturate-infinity": "",
    "--native-int64": "disabled", "--implicit-integer-downcast": "all",
}  # fmt: skip
# Compilers before this one know no such flags, and do just what these two say.
_INTEGER_FLAGS_SINCE = (2, 27)
_INTEGER_FLAGS = ("--native-int64", "--implicit-integer-downcast")


def command(chosen: dict[str, str], target: str, compiler: str) -> list[str]:
    """Return every flag the compiler gets: the target in two words, as trace looks for it, then the others, sorted.

    Args:
        chosen: the user's, by canonical name; they win.
        target: canonical.
        compiler: version of neuronx-cc.
    """
    flags = ALWAYS | chosen
    if version_tuple(compiler)[:2] < _INTEGER_FLAGS_SINCE:
        flags = {n: value for n, value in flags.items() if n not in _INTEGER_FLAGS or value != ALWAYS[n]}
    return ["--target", target, *sorted(spelled(name, value) for name, value in flags.items())]


def spelled(name: str, value: str) -> str:
    """Return a flag in the one spelling that is passed on and named."""
    return f"{name}={value}" if value else name
