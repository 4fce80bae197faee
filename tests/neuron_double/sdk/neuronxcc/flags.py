"""The command line of `neuronx-cc compile`, after the "Neuron Compiler CLI Reference" of the AWS Neuron documentation.

Both `--flag value` and `--flag=value` are accepted, and of two equal flags the rightmost wins.
"""

from __future__ import annotations

from collections.abc import Iterable

from neuronxcc import __version__

# inf2, trn1 and trn1n are all NeuronCore-v2, so a trn1 artifact loads on inf2.
ARCHITECTURES = {"inf2": "v2", "trn1": "v2", "trn1n": "v2", "trn2": "v3", "trn3": "v4"}

ANY = None
SWITCH: tuple[str, ...] = ()
KNOWN: dict[str, tuple[str, ...] | None] = {
    "--framework": ("XLA",),
    "--target": tuple(ARCHITECTURES),
    "--output": ANY,
    "--model-type": ("generic", "transformer", "unet-inference"),
    "--auto-cast": ("none", "matmult", "all"),
    "--auto-cast-type": ("bf16", "fp16", "tf32", "fp8_e4m3"),
    "--optlevel": ("1", "2", "3"),
    "--logical-nc-config": ("1", "2"),
    "--distribution-strategy": ("llm-training",),
    "--logfile": ANY,
    "--verbose": ANY,
    "--enable-saturate-infinity": SWITCH,
    "--enable-mixed-precision-accumulation": SWITCH,
    "--disable-mixed-precision-accumulation": SWITCH,
    "--enable-fast-context-switch": SWITCH,
    "--enable-fast-loading-neuron-binaries": SWITCH,
}
# Release notes of SDK 2.32: unknown to every older compiler.
SINCE_2_27_5: dict[str, tuple[str, ...] | None] = {
    "--native-int64": ("default", "enabled", "disabled"),
    "--implicit-integer-downcast": ANY,
}
ALIASES = {"-O": "--optlevel", "-lnc": "--logical-nc-config", "--lnc": "--logical-nc-config"}


class BadArguments(Exception):
    """The compiler refuses its command line."""


def version_numbers(version: str) -> tuple[int, ...]:
    """Return "2.26.6360.0+6f180f47" as (2, 26, 6360, 0)."""
    return tuple(int(part) for part in version.split("+")[0].split("."))


def parse(arguments: Iterable[str]) -> tuple[list[str], dict[str, str]]:
    """Return the positional arguments and the flags, or raise BadArguments."""
    known = dict(KNOWN)
    if version_numbers(__version__) >= (2, 27, 5):
        known |= SINCE_2_27_5
    positional: list[str] = []
    flags: dict[str, str] = {}
    rest = iter(arguments)
    for argument in rest:
        if not argument.startswith("-"):
            positional.append(argument)
            continue
        name, equals, value = argument.partition("=")
        if name[:2] == "-O" and name[2:].isdigit():
            name, equals, value = "-O", "=", name[2:]
        name = ALIASES.get(name, name)
        if name not in known:
            raise BadArguments(f"unrecognized arguments: {argument}")
        allowed = known[name]
        if allowed == SWITCH:
            if equals:
                raise BadArguments(f"argument {name}: takes no value")
        elif not equals:
            value = next(rest, "")
        if allowed and value not in allowed:
            raise BadArguments(f"argument {name}: invalid choice: {value!r} (choose from {', '.join(allowed)})")
        flags[name] = value
    _check_together(flags)
    return positional, flags


def _check_together(flags: dict[str, str]) -> None:
    for needed in ("--framework", "--target", "--output"):
        if needed not in flags:
            raise BadArguments(f"the following arguments are required: {needed}")
    if flags.get("--logical-nc-config") == "2" and ARCHITECTURES[flags["--target"]] == "v2":
        raise BadArguments(f"[NCC_EARG001] logical-nc-config=2 is not supported on target {flags['--target']}")
