"""Version numbers as text: which package is installed, and how two versions compare. Imports nothing heavy."""

from __future__ import annotations

import re
from importlib import metadata


def version_tuple(text: str) -> tuple[int, ...]:
    """Return a dotted version's numbers, for comparing; text that is no number counts as 0."""
    return tuple(int(part[:18]) if part.isdecimal() else 0 for part in re.split(r"[.+-]", text))


def installed(package: str) -> str | None:
    """Return the version of an installed package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
