"""The user's compiler flags: read in any spelling, refused if they are none, and named for the family.

`--flag value`, `--flag=value` and aliases are one flag; the last of two wins; the order says nothing. What only says
where to log names nothing, nor does what every bucket is compiled with anyway. A flag this file does not know is passed
on under its own name; one cut short is refused, for the compiler may take it for one that has another.

Not hashed into any key: what is read here is named there. Proof level N1: read back by a test double.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Sequence

from nanogpt_buckets.backends.neuron.flags import ALWAYS, spelled
from nanogpt_buckets.errors import UsageError

_ALIASES = {"-O": "--optlevel", "-lnc": "--logical-nc-config", "--lnc": "--logical-nc-config"}
_OPPOSITES = {
    "--disable-mixed-precision-accumulation": "--enable-mixed-precision-accumulation",
    "--enable-mixed-precision-accumulation": "--disable-mixed-precision-accumulation",
}
_ALONE = frozenset(
    (*_OPPOSITES, "--enable-saturate-infinity", "--enable-fast-context-switch", "--enable-fast-loading-neuron-binaries")
)
_LOGGING = frozenset(("--logfile", "--verbose"))
_WITH_VALUE = _LOGGING | {
    "--auto-cast", "--auto-cast-type", "--model-type", "--optlevel", "--logical-nc-config", "--native-int64",
    "--implicit-integer-downcast", "--distribution-strategy",
}  # fmt: skip
# Ours to say, by other options.
_RESERVED = {"--target": "use --target instead", "--framework": "leave it out", "--output": "leave it out"}
_KNOWN = sorted({*_ALIASES, *_ALONE, *_WITH_VALUE, *_RESERVED})
# What besides torch-xla's own variables, which all begin with XLA_, changes the graph or its numbers.
HLO_VARIABLES = ("NEURON_CUSTOM_SILU", "NEURON_FUSE_SOFTMAX", "NEURON_RT_STOCHASTIC_ROUNDING_EN")


def parse(arguments: str | Sequence[str]) -> dict[str, str]:
    """Read a shell line or a list; return flags by canonical name, with "" for the value of one that takes none.

    Raises:
        UsageError: no flag, one cut short, one with a value too few or too many, or one that this program sets itself.
    """
    words = _words(arguments)
    flags: dict[str, str] = {}
    while words:
        name, equals, value = words.pop(0).partition("=")
        if name[:2] == "-O" and name[2:].isdigit() and not equals:
            name, equals, value = "-O", "=", name[2:]
        name = _ALIASES.get(name, name)
        _refuse(name)
        if not equals and name not in _ALONE and words and not words[0].startswith("-"):
            value = words.pop(0)
        if equals and name in _ALONE:
            raise UsageError(f"compiler argument {name} takes no value", hint=f"write {name} alone")
        if not value and (equals or name in _WITH_VALUE):  # the compiler would take the next flag for it
            raise UsageError(f"compiler argument {name} has no value", hint=f"write {name}=VALUE, or leave it out")
        flags.pop(_OPPOSITES.get(name, ""), None)
        flags[name] = value
    return flags


def named(arguments: str | Sequence[str]) -> list[str]:
    """Return what of the user's flags and environment belongs in a family: all that can change what is compiled."""
    chosen = {name: value for name, value in parse(arguments).items() if name not in _LOGGING}
    flags = [spelled(name, value) for name, value in chosen.items() if ALWAYS.get(name) != value]
    variables = [f"{n}={v}" for n, v in os.environ.items() if n.startswith("XLA_") or n in HLO_VARIABLES]
    return [one.encode(errors="backslashreplace").decode() for one in (*sorted(flags), *sorted(variables))]


def _refuse(name: str) -> None:
    if not name.startswith("--") or name == "--":
        raise UsageError(f"compiler argument {name!r} is no flag", hint="write for example --auto-cast=matmult")
    if name in _RESERVED:
        raise UsageError(f"compiler argument {name} is set by this program", hint=_RESERVED[name])
    whole = [known for known in _KNOWN if known.startswith(name)]
    if whole and name not in whole:
        raise UsageError(f"compiler argument {name} is cut short", hint=f"write {' or '.join(whole)}")


def _words(arguments: str | Sequence[str]) -> list[str]:
    try:
        parts: Iterable[str] = [arguments] if isinstance(arguments, str) else arguments
        return [word for part in parts for word in shlex.split(str.strip(part))]  # of None, shlex would read stdin
    except (TypeError, ValueError) as error:
        raise UsageError(f"the compiler arguments cannot be read: {error}", hint="see to the quotation marks") from None
