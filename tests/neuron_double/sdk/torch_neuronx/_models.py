"""Loaded models: from the artifact in a ScriptModule to a program on cores, at load, later or in the background."""

from __future__ import annotations

import io
import os
import threading
import time
import warnings
import weakref
from typing import Any

import torch
from torch import Tensor

from torch_neuronx import _artifact, _settings, _texts
from torch_neuronx._runtime import RUNTIME, Core, Request

# Taken before the double wraps it: a program inside a NEFF is no user's torch.jit.load.
_plain_load = torch.jit.load

_models: dict[int, Model] = {}
_disabled = 0  # depth of disable_nrt_load
placement: Request | None = None  # of neuron_cores_context; process-wide, as the real one is not thread-safe


class Model:
    """One artifact in this process. It lives as long as the tensor that holds it."""

    def __init__(self, blob: Tensor) -> None:
        self.key = blob.data_ptr()
        self.lazy = bool(blob[_artifact.LAZY])
        self.background = bool(blob[_artifact.ASYNC])
        self.request = placement
        self.header, program = _artifact.unpack(blob)
        with warnings.catch_warnings():  # here and not in load, for it does not work in threads
            warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit is deprecated
            self.program = _plain_load(io.BytesIO(program))
        self.nbytes = blob.numel()
        self.cores: list[Core] = []  # none: not loaded
        self.returned: list[Tensor] = []  # by its last call, for faults
        self._guard = threading.RLock()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._turn = 0
        weakref.finalize(blob, _forget, self.key)

    def start(self) -> None:
        """Load now, or in the background, as the artifact says."""
        if not self.background:
            self.load()
            return
        RUNTIME.initialize()
        self._thread = threading.Thread(target=self._load_in_background, daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Return when it is loaded; a lazy one loads here."""
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            raise self._error
        with self._guard:
            if not self.cores:
                self.load()

    def load(self) -> None:
        """Put it on its cores.

        Raises:
            RuntimeError: no runtime, another architecture, a newer compiler, or no memory on the core.
        """
        with self._guard:
            RUNTIME.initialize()
            check_loadable(self.header)
            cores = RUNTIME.place(self.request, self.key, self.nbytes)
            time.sleep(_settings.load_seconds())
            self.cores = cores

    def move(self, request: Request) -> None:
        """Unload and load on other cores; if it was not loaded yet, only remember."""
        RUNTIME.check(*request)
        with self._guard:
            self.request = request
            if self.cores:
                RUNTIME.release(self.key)
                self.cores = []
                self.load()

    def next_core(self) -> Core:
        """Return the core of the next call: replicas take turns."""
        with self._guard:
            self._turn += 1
            return self.cores[(self._turn - 1) % len(self.cores)]

    def _load_in_background(self) -> None:
        try:
            self.load()
        except BaseException as error:
            self._error = error


def check_loadable(header: dict[str, Any]) -> None:
    """Raise RuntimeError if this host's runtime refuses the NEFF."""
    if "load-corrupt" in _settings.faults():
        raise RuntimeError("<double> NEFF is invalid; it could be broken or hacked\nNRT_FAILURE (1)")
    newest = _settings.runtime_max_cc()
    if newest and _numbers(header["compiler"]) > _numbers(newest):
        raise RuntimeError(_texts.newer_neff(header["compiler"]))
    here = _settings.architecture()
    if header["arch"] != here:
        if os.environ.get("NEURON_RT_ALLOW_LEGACY_NEFF", "").lower() not in ("1", "true"):
            raise RuntimeError(_texts.other_arch(header["arch"], here))
        return
    # "Logical NeuronCore configuration" documentation: compiler and runtime must agree; trn2's default is 2
    runtime_lnc = int(os.environ.get("NEURON_LOGICAL_NC_CONFIG", "2"))
    if here != "v2" and header["lnc"] != runtime_lnc:
        raise RuntimeError(f"<double> NEFF has lnc={header['lnc']}, runtime has {runtime_lnc}\nNRT_INVALID (2)")


def adopt(module: object) -> None:
    """Treat every compiled module inside `module` as just loaded, unless loading is disabled."""
    if _disabled:
        return
    for blob in _artifact.find(module):
        model = get(blob)
        if not model.lazy:
            model.start()


def get(blob: Tensor) -> Model:
    """Return the model of an artifact; one that was never adopted is made here and loads when it is first run."""
    if _disabled:
        raise RuntimeError("<double> the model is not loaded: this is inside disable_nrt_load")
    with RUNTIME.guard:
        if blob.data_ptr() not in _models:
            _models[blob.data_ptr()] = Model(blob)
        return _models[blob.data_ptr()]


def all_models() -> list[Model]:
    return list(_models.values())


def forget_all() -> None:
    global placement, _disabled
    placement, _disabled = None, 0
    _models.clear()


def disable(by: int) -> None:
    global _disabled
    _disabled += by


def _forget(key: int) -> None:
    _models.pop(key, None)
    RUNTIME.release(key)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("+")[0].split("."))
