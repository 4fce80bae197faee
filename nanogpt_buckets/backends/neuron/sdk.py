"""Which Neuron packages are installed, whether they can be used together, and the command that mends it.

Read from package metadata only: importing torch_neuronx is left to the processes that compile or load.

Source: AWS Neuron documentation, release manifests up to SDK 2.33 (October 2026). Proof level N0: none was installed.
"""

from __future__ import annotations

from dataclasses import dataclass

from nanogpt_buckets.errors import BackendUnavailable
from nanogpt_buckets.versions import installed, version_tuple

INDEX = "https://pip.repos.neuron.amazonaws.com"
INSTALL = f"pip install --extra-index-url {INDEX} 'torch-neuronx>=2.9,<2.10' neuronx-cc"
_REINSTALL = INSTALL.replace("pip install", "pip install --force-reinstall")
# The first release whose trace can compile without a device, and the first that no longer has trace.
_OLDEST, _NATIVE = (2, 5), (2, 10)


@dataclass(frozen=True)
class Pairing:
    """One SDK release: versions that AWS publishes and tests together.

    Args:
        sdk: number of the release.
        torch_neuronx: beginnings of the torch-neuronx versions in it.
        neuronx_cc: beginnings of the compiler versions in it.
        python: Python versions it has wheels for.
    """

    sdk: str
    torch_neuronx: tuple[str, ...]
    neuronx_cc: tuple[str, ...]
    python: str


PAIRINGS = (
    Pairing("2.33", ("2.9.0.2.15.32035",), ("2.28.7631.0",), "3.11 to 3.13"),
    Pairing("2.32", ("2.9.0.2.15.32035",), ("2.27.5334.0",), "3.11 to 3.13"),
    Pairing("2.31", ("2.9.0.2.15.32035",), ("2.26.6360.0",), "3.11 to 3.13"),
    Pairing("2.30", ("2.9.0.2.14.27725",), ("2.25.3371.0",), "3.11 to 3.13"),
    Pairing("2.29", ("2.9.0.2.13.24727", "2.9.0.2.13.26312"), ("2.24.5133.0", "2.24.8799.0"), "3.10 to 3.12"),
    Pairing("2.28", ("2.9.0.2.12.22436", "2.8.0.2.12.22436", "2.7.0.2.12.22436"), ("2.23.6484.0",), "3.10 to 3.12"),
    Pairing("2.27", ("2.9.0.2.11.19912", "2.8.0.2.11.19912", "2.7.0.2.11.19912"), ("2.22.12471.0",), "3.10 to 3.12"),
    Pairing("2.26", ("2.8.0.2.10.", "2.7.0.2.10.", "2.6.0.2.10."), ("2.21.18209", "2.21.33363"), "3.9 to 3.11"),
    Pairing("2.25", ("2.7.0.2.9.9357", "2.6.0.2.9.9357"), ("2.20.9961.0",), "3.9 to 3.11"),
    Pairing("2.24", ("2.7.0.2.8.6734", "2.6.0.2.8.6734", "2.5.1.2.8.6734"), ("2.19.8089.0",), "3.9 to 3.11"),
    Pairing("2.23", ("2.6.0.2.7.5413", "2.5.1.2.7.5413"), ("2.18.121.0",), "3.9 to 3.11"),
    Pairing("2.22", ("2.5.1.2.6.0",), ("2.17.194.0",), "3.9 to 3.11"),
)


def pairing(torch_neuronx: str, neuronx_cc: str | None) -> Pairing | None:
    """Return the SDK release that has both versions, or, without such, the newest that has this torch-neuronx."""
    known = [row for row in PAIRINGS if torch_neuronx.startswith(row.torch_neuronx)]
    exact = [row for row in known if neuronx_cc and neuronx_cc.startswith(row.neuronx_cc)]
    return next(iter(exact or known), None)


def require() -> str:
    """Return the version of torch-neuronx if it can be expected to work with what else is installed.

    Raises:
        BackendUnavailable: it is not installed, is a placeholder, is the native package, or does not go with torch.
    """
    version = installed("torch-neuronx")
    if version is None:
        raise BackendUnavailable("the Neuron backend needs torch-neuronx, which is not installed", hint=INSTALL)
    numbers = version_tuple(version)
    if numbers < (1, 13):
        raise BackendUnavailable(
            f"torch-neuronx {version} is a placeholder of the public index, not AWS's package", hint=_REINSTALL
        )
    if numbers >= _NATIVE:
        raise BackendUnavailable(
            f"torch-neuronx {version} is the native package, which has no trace to compile ahead of time with",
            hint=_REINSTALL,
        )
    if numbers < _OLDEST:
        raise BackendUnavailable(f"torch-neuronx {version} is older than this release supports", hint=_REINSTALL)
    torch = installed("torch") or "0"
    if version_tuple(torch)[:2] != numbers[:2]:
        raise BackendUnavailable(
            f"torch {torch} does not go with torch-neuronx {version}, which is for torch {numbers[0]}.{numbers[1]}",
            hint=_REINSTALL,
        )
    return version
