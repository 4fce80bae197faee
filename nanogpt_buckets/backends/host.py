"""What this machine's CPU, C libraries and devices can run, and whether an artifact's requirements are met here.

Requirements are checked as "this host has at least that", never as equality of two descriptions. Knows nothing of any
compiler. Imports no torch.

Source: the x86-64 levels are those of the System V psABI.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanogpt_buckets.errors import BackendUnavailable
from nanogpt_buckets.versions import version_tuple

_V2 = frozenset({"cx16", "lahf_lm", "popcnt", "sse4_1", "sse4_2", "ssse3"})
_V3 = _V2 | {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"}
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
LEVELS: Mapping[str, frozenset[str]] = {"x86-64-v4": _V4, "x86-64-v3": _V3, "x86-64-v2": _V2}  # highest first
NATIVE = "native"
# What g++ -march=native can turn on: vector, bit, crypto and matrix instructions of x86-64 and aarch64.
_CODE_FLAG = re.compile(
    r"mmx|sse|sse2|pni|ssse3|sse4_[12]|sse4a|avx.*|f16c|fma4?|xop|abm|bmi[12]|popcnt|movbe|lahf_lm|cx16|adx|aes|pclmulqdq"
    r"|vaes|vpclmulqdq|gfni|sha_ni|amx_.*|xsave.*|fsgsbase|rdrand|rdseed|fp|asimd.*|sve.*|sme(?!p$).*|i8mm|bf16|atomics|fphp|crc32|sha\d|pmull"
)


@functools.cache
def cpu_flags() -> frozenset[str]:
    """Return the CPU's feature names as Linux spells them; empty where that cannot be read."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return frozenset()
    match = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return frozenset(match.group(1).split()) if match else frozenset()


def code_flags() -> frozenset[str]:
    """Return those of the CPU's features that generated code can use."""
    return frozenset(flag for flag in cpu_flags() if _CODE_FLAG.fullmatch(flag))


def levels_here() -> list[str]:
    """Return the instruction-set levels this CPU has, highest first."""
    return [level for level, flags in LEVELS.items() if flags <= cpu_flags()]


def native() -> str:
    """Return the target that stands for this very CPU: what it needs is in its name."""
    features = ",".join(sorted(code_flags()))
    return f"{NATIVE}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"


def choose_level(requested: str | None) -> str:
    """Return the instruction-set level to build for: the one asked for, or the highest this host has.

    Raises:
        BackendUnavailable: unknown, or the host could not run (so not check) what would be built.
    """
    supported = levels_here()
    if requested is None:
        return supported[0] if supported else native()
    if requested in (NATIVE, native()):
        return native()
    if requested in supported:
        return requested
    if requested in LEVELS or requested.startswith(f"{NATIVE}-"):
        raise BackendUnavailable(
            f"this CPU cannot run {requested}, and a bucket is only published after it ran",
            hint=f"this CPU has: {', '.join([*supported, NATIVE])}",
        )
    known = ", ".join([*LEVELS, NATIVE])
    raise BackendUnavailable(f"target {requested!r} is unknown", hint=f"targets of this machine's backend: {known}")


def flags_of_compile_line(line: str) -> list[str]:
    """Return the CPU features that the -march and -mFEATURE options of a g++ command turn on, as Linux spells them."""
    needed: set[str] = set()
    for option in re.findall(r"\s-m([a-z0-9=_.+-]+)", line):
        if option == "arch=native":
            needed |= code_flags()
        elif option.startswith("arch="):
            needed |= LEVELS.get(option.removeprefix("arch="), frozenset())
        else:
            needed.add(re.sub(r"^avx512(vnni|bf16|fp16)$", r"avx512_\1", option.replace("-", "_")))
    return sorted(needed)


def symbol_versions(library: bytes) -> dict[str, str]:
    """Return the highest GLIBC and GLIBCXX symbol versions a shared library names."""
    found: dict[str, str] = {}
    for name, number in re.findall(r"\0(GLIBC|GLIBCXX)_(\d+(?:\.\d+)+)(?=\0)", library.decode("latin-1")):
        found[name.lower()] = max(number, found.get(name.lower(), "0"), key=version_tuple)
    return found


@functools.cache
def own_versions() -> dict[str, str]:
    """Return what this host's C and C++ libraries provide, under the names `symbol_versions` uses."""
    name, libc = platform.libc_ver()
    found = {"glibc": libc} if name == "glibc" else {}
    try:
        ctypes.CDLL("libstdc++.so.6")
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return found
    library = re.search(r"/\S*libstdc\+\+\.so\S*", maps)
    named = symbol_versions(Path(library[0]).read_bytes()) if library else {}
    return found | {name: number for name, number in named.items() if name == "glibcxx"}


def requirements(library: bytes, compile_line: str) -> dict[str, Any]:
    """Say what a machine must have to run a shared library with these bytes, compiled by these commands."""
    return {
        "os": platform.system(),
        "machine": platform.machine(),
        "cpu_flags": flags_of_compile_line(compile_line),
        **symbol_versions(library),
    }


def unmet(requires: Mapping[str, Any]) -> str | None:
    """Say in words what this host lacks of `requires`, or None if it meets all."""
    for name, own in (("os", platform.system()), ("machine", platform.machine())):
        if requires.get(name, own) != own:
            return f"made for {requires[name]}, this is {own}"
    flags = requires.get("cpu_flags", ())
    lacking = sorted(set(map(str, [flags] if isinstance(flags, str | int) else flags or ())) - cpu_flags())
    if lacking:
        return f"this CPU lacks {', '.join(lacking)}"
    for name in ("glibc", "glibcxx"):
        needed, provided = requires.get(name), own_versions().get(name)
        if needed is not None and version_tuple(provided or "0") < version_tuple(str(needed)):
            return f"needs {name.upper()} {needed}, this host has {provided or 'none'}"
    unknown = set(requires) - {"os", "machine", "cpu_flags", "glibc", "glibcxx"}
    return f"has requirements unknown here: {', '.join(sorted(unknown))}" if unknown else None


def available_memory_bytes() -> int:
    """Return the memory that could be used now, the container's limit included."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        meminfo = Path("/proc/meminfo").read_text(encoding="ascii")
        match = re.search(r"MemAvailable:\s+(\d+) kB", meminfo)
        free = int(match.group(1)) * 1024 if match else free
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii"))
        return min(free, int(limit) - used) if limit != "max" else free
    except (OSError, ValueError):
        return free


def cpu_count() -> int:
    """Return the processors this process may run on, the container's quota included."""
    count = visible_cpu_count()
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return max(1, min(count, int(quota) // int(period))) if quota != "max" else count
    except (OSError, ValueError):
        return count


def visible_cpu_count() -> int:
    """Return the processors this process may run on; OpenMP sees these, and not a container's quota."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
