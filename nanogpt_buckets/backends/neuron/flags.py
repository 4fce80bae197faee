"""neuronx-cc's flags in one canonical spelling, and which of them can change what is compiled.

`--flag value`, `--flag=value` and aliases are one flag; the last of two wins; the order says nothing. What only says
where to log is passed on and names nothing.

Source: AWS Neuron documentation, neuronx-cc command line reference.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Sequence

from nanogpt_buckets.errors import UsageError
from nanogpt_buckets.versions import version_tuple

_ALIASES = {"-O": "--optlevel", "-lnc": "--logical-nc-config", "--lnc": "--logical-nc-config"}
_ALONE = frozenset(
    (
        "--enable-saturate-infinity", "--enable-mixed-precision-accumulation", "--disable-mixed-precision-accumulation",
        "--enable-fast-context-switch", "--enable-fast-loading-neuron-binaries",
    )
)  # fmt: skip
_OPPOSITES = {"--disable-mixed-precision-accumulation": "--enable-mixed-precision-accumulation"}
_LOGGING = frozenset(("--logfile", "--verbose"))
# Ours to say, by other options.
_RESERVED = {"--target": "--target", "--framework": "nothing", "--output": "nothing"}
# Variables that change the graph itself or its numbers; torch-neuronx and its custom lowerings read them.
HLO_VARIABLES = (
    "NEURON_CUSTOM_SILU", "NEURON_FUSE_SOFTMAX", "NEURON_RT_STOCHASTIC_ROUNDING_EN", "XLA_DISABLE_FUNCTIONALIZATION",
    "XLA_DOWNCAST_BF16", "XLA_USE_BF16",
)  # fmt: skip
_ALWAYS = {"--auto-cast": "none", "--model-type": "transformer", "--optlevel": "2"}
# The first compiler that knows what becomes of wide integers; its successor changes what it does unasked.
_INTEGER_FLAGS_SINCE = (2, 27)
_INTEGER_FLAGS = {"--native-int64": "disabled", "--implicit-integer-downcast": "all"}


def parse(arguments: str | Sequence[str]) -> dict[str, str]:
    """Return flags by canonical name; the value of one that takes none is "".

    Args:
        arguments: as a shell line or as a list, in any mixture of spellings.

    Raises:
        UsageError: something that is no flag, or a flag that this program sets itself.
    """
    words = _words(arguments)
    flags: dict[str, str] = {}
    while words:
        name, equals, value = words.pop(0).partition("=")
        if name[:2] == "-O" and name[2:].isdigit():
            name, equals, value = "-O", "=", name[2:]
        name = _ALIASES.get(name, name)
        if not name.startswith("--") or name == "--":
            raise UsageError(f"compiler argument {name!r} is no flag", hint="write for example --auto-cast=matmult")
        if name in _RESERVED:
            raise UsageError(f"compiler argument {name} is set by this program", hint=f"use {_RESERVED[name]} instead")
        if not equals and name not in _ALONE and words and not words[0].startswith("-"):
            value = words.pop(0)
        for one, other in (*_OPPOSITES.items(), *((b, a) for a, b in _OPPOSITES.items())):
            if name == one:
                flags.pop(other, None)
        flags[name] = value
    return flags


def named(arguments: str | Sequence[str]) -> list[str]:
    """Return what of the user's flags and environment belongs in a family: all that can change what is compiled."""
    chosen = {name: value for name, value in parse(arguments).items() if name not in _LOGGING}
    flags = [_spelled(name, value) for name, value in chosen.items() if _ALWAYS.get(name) != value]
    variables = [f"{name}={os.environ[name]}" for name in HLO_VARIABLES if name in os.environ]
    return sorted(flags) + variables


def command(arguments: str | Sequence[str], target: str, compiler: str) -> list[str]:
    """Return every flag the compiler gets: the target in two words, as trace looks for it, then the others, sorted.

    Args:
        arguments: the user's, which win.
        target: canonical.
        compiler: version of neuronx-cc.
    """
    flags = dict(_ALWAYS)
    if target == "trn1":
        flags["--enable-saturate-infinity"] = ""  # keeps an infinity from becoming NaN; later cores need no telling
    if version_tuple(compiler)[:2] >= _INTEGER_FLAGS_SINCE:
        flags |= _INTEGER_FLAGS
    flags |= parse(arguments)
    return ["--target", target, *sorted(_spelled(name, value) for name, value in flags.items())]


def _words(arguments: str | Sequence[str]) -> list[str]:
    try:
        parts: Iterable[str] = [arguments] if isinstance(arguments, str) else arguments
        return [word for part in parts for word in shlex.split(part)]
    except ValueError as error:
        raise UsageError(f"the compiler arguments cannot be read: {error}", hint="see to the quotation marks") from None


def _spelled(name: str, value: str) -> str:
    return f"{name}={value}" if value else name
