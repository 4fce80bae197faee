"""The Neuron runtime of the double: which cores this process holds, and what is loaded on them.

"Neuron Runtime Configuration" of the AWS Neuron documentation: the first use reserves the visible cores, by default all
of the host, and they stay this process's until it ends.
"""

from __future__ import annotations

import fcntl
import os
import sys
import threading
from dataclasses import dataclass, field
from typing import IO

from torch_neuronx import _settings, _texts

Request = tuple[int, int]  # start_nc, nc_count, as in neuron_cores_context


@dataclass
class Core:
    """One reserved core. `number` is the host's, an index into Runtime.cores the process's own."""

    number: int
    lock: IO[str] | None
    models: dict[int, int] = field(default_factory=dict)  # artifact -> bytes
    tensors: dict[int, int] = field(default_factory=dict)  # tensor on it -> bytes
    executions: int = 0

    @property
    def used(self) -> int:
        """Bytes of memory in use."""
        return sum(self.models.values()) + sum(self.tensors.values())


class Runtime:
    """The process's one runtime."""

    def __init__(self) -> None:
        self.cores: list[Core] = []
        self.guard = threading.RLock()
        self._turn = 0

    def initialize(self) -> None:
        """Reserve the visible cores, once.

        Raises:
            RuntimeError: no device, no such core, or a core that another process holds. The text is always the same.
        """
        with self.guard:
            if self.cores:
                return
            if not _settings.core_count():
                _unavailable(
                    "nrt_init",
                    "Unable to determine Neuron Driver version. Please check aws-neuron-dkms package is installed.",
                )
            self.cores = _reserve()

    def check(self, start_nc: int, nc_count: int) -> None:
        """Initialise, and raise ValueError for cores that this process cannot have."""
        self.initialize()
        n = len(self.cores)
        if nc_count != -1 and not 1 <= nc_count <= n:
            raise ValueError(f"<double> nc_count {nc_count} is invalid, {n} NeuronCores are visible")
        if start_nc != -1 and not 0 <= start_nc <= n - max(nc_count, 1):
            raise ValueError(f"<double> start_nc {start_nc} is invalid, {n} NeuronCores are visible")

    def place(self, request: Request | None, artifact: int, nbytes: int) -> list[Core]:
        """Allocate a model's memory on each of its cores and return them.

        Raises:
            RuntimeError: a core has not that much left; nothing is allocated then.
        """
        self.initialize()
        with self.guard:
            cores = self._pick(request)
            for core in cores:
                _require_room(core, nbytes)
            for core in cores:
                core.models[artifact] = nbytes
            return cores

    def allocate(self, number: int, tensor: int, nbytes: int) -> None:
        """Make room for a tensor on one of this process's cores; a RuntimeError if there is none, or no such core."""
        self.initialize()
        with self.guard:
            if number >= len(self.cores):
                raise RuntimeError(f"<double> neuron:{number} is invalid, {len(self.cores)} NeuronCores are visible")
            _require_room(self.cores[number], nbytes)
            self.cores[number].tensors[tensor] = nbytes

    def free(self, number: int, tensor: int) -> None:
        """Free a tensor's memory."""
        with self.guard:
            for core in self.cores[number : number + 1]:
                core.tensors.pop(tensor, None)

    def _pick(self, request: Request | None) -> list[Core]:
        """Return the requested cores, else the next one in turn (torch_neuronx.trace documentation)."""
        if "one-core" in _settings.faults():
            return self.cores[:1]
        if request is None:
            self._turn += 1
            return [self.cores[(self._turn - 1) % len(self.cores)]]
        start, count = request[0], max(request[1], 1)
        if start == -1:  # the least used
            starts = range(len(self.cores) - count + 1)
            start = min(starts, key=lambda s: sum(len(core.models) for core in self.cores[s : s + count]))
        return self.cores[start : start + count]

    def release(self, artifact: int) -> None:
        """Free a model's memory. The cores stay reserved."""
        with self.guard:
            for core in self.cores:
                core.models.pop(artifact, None)

    def end(self) -> None:
        """Give the cores back, as the end of the process does."""
        with self.guard:
            for core in self.cores:
                if core.lock is not None:
                    core.lock.close()
            self.cores, self._turn = [], 0


RUNTIME = Runtime()


def _require_room(core: Core, nbytes: int) -> None:
    if core.used + nbytes > _settings.core_bytes():
        device, within = divmod(core.number, _settings.cores_per_device())
        raise RuntimeError(_texts.out_of_memory(nbytes, device, within))


def _unavailable(where: str, why: str) -> None:
    print(f"ERROR NRT:{where} {why}", file=sys.stderr, flush=True)
    raise RuntimeError(_texts.RUNTIME_UNAVAILABLE)


def _reserve() -> list[Core]:
    """Reserve what NEURON_RT_VISIBLE_CORES names, else as many as NEURON_RT_NUM_CORES says, else all."""
    total = _settings.core_count()
    visible = os.environ.get("NEURON_RT_VISIBLE_CORES")
    if visible:
        wanted = _parse_cores(visible)
        count = len(wanted)
    else:
        wanted = list(range(total))
        count = int(os.environ.get("NEURON_RT_NUM_CORES") or 0) or total
    held: list[Core] = []
    for number in wanted:
        if number < total and len(held) < count and (core := _take(number)):
            held.append(core)
    if len(held) < count:
        for core in held:
            if core.lock is not None:
                core.lock.close()
        asked = f"nc{wanted[0]}-nc{wanted[-1]}" if visible and wanted else count
        _unavailable(
            "nrt_allocate_neuron_cores", f"NeuronCore(s) not available - Requested:{asked} Available:{len(held)}"
        )
    return held


def _take(number: int) -> Core | None:
    """Return the core, locked against other processes until this one ends, or None if another one has it."""
    state = _settings.state_dir()
    if state is None:
        return Core(number, None)
    state.mkdir(parents=True, exist_ok=True)
    lock = (state / f"core-{number}.lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        return None
    return Core(number, lock)


def _parse_cores(text: str) -> list[int]:
    """Return the cores in "0", "3-6" or "3-5,6"."""
    numbers: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        try:
            numbers += range(int(first), int(last or first) + 1)
        except ValueError:
            _unavailable("nrt_init", f"Invalid NEURON_RT_VISIBLE_CORES: {text}")
    return numbers
