"""An imagined machine with the Neuron SDK: the double of torch_neuronx in this process and in its children."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import pytest

from nanogpt_buckets import Bucket, Plan, build
from nanogpt_buckets.backends import worker
from nanogpt_buckets.backends.neuron import device
from nanogpt_buckets.choice import choose
from nanogpt_buckets.selection import Selection

DOUBLE = Path(__file__).parents[2] / "neuron_double"
PLAN = Plan([Bucket(1, 16), Bucket(2, 16)])


class InProcess(Executor):
    """Does what a child would, without one: the double is much faster than starting Python."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def submit(self, compile_bucket: Any, request: dict[str, Any]) -> Future[Any]:
        future: Future[Any] = Future()
        workdir = self._directory / f"work-{len(list(self._directory.glob('work-*')))}"
        workdir.mkdir()
        before = Path.cwd()
        os.chdir(workdir)
        try:
            result = worker.handle(json.loads(json.dumps(request)), lambda event, **fields: None)
            future.set_result(worker.artifact_from_json(result, workdir))
        except Exception as error:
            future.set_exception(error)
        finally:
            os.chdir(before)
        return future


class Host:
    """A machine with the SDK and without a device; call it to give it one, or to set variables."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch, plug_in: Any) -> None:
        self.directory = directory
        self.root = directory / "root"
        self._patch = monkeypatch
        self._plug_in = plug_in

    def __call__(self, instance: str = "", *, cores: int = 2, **variables: object) -> None:
        for name, value in variables.items():
            self._patch.setenv(name, str(value))
        if instance:
            self._patch.setenv("NEURON_DOUBLE_INSTANCE", instance)
            self._patch.setenv("NEURON_DOUBLE_CORES", str(cores))
            self._plug_in(self.root, instance)

    @property
    def double(self) -> Any:
        """What the double tells of this process."""
        return sys.modules["torch_neuronx"]._double

    def compiles(self) -> list[Any]:
        """Return the flags of every compile on this host, by any process."""
        log = self.directory / "state" / "compiles.jsonl"
        return [json.loads(line)["flags"] for line in log.read_text().splitlines()] if log.exists() else []

    def build(self, plan: Plan = PLAN, **options: Any) -> Any:
        """Build without children."""
        return build(plan, model="demo", backend="neuron", executor=InProcess(self.directory), **{"jobs": 1} | options)

    def selection(self, target: str | None = "trn1", **options: Any) -> Selection:
        return Selection(choose("demo", backend="neuron", target=target, **options))

    def manifests(self, **options: Any) -> list[Any]:
        return [manifests[0] for manifests in self.selection(**options).usable.values()]


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, plug_in: Any) -> Iterator[Host]:
    """See `Host`."""
    for name in [name for name in os.environ if name.startswith(("NEURON_", "XLA_"))]:
        monkeypatch.delenv(name)
    paths = [str(DOUBLE / "sdk"), str(DOUBLE / "machine")]
    for path in paths:
        monkeypatch.syspath_prepend(path)
    inherited = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([*paths, *([inherited] if inherited else [])]))
    monkeypatch.setenv("NEURON_DOUBLE_STATE_DIR", str(tmp_path / "state"))
    made = Host(tmp_path, monkeypatch, plug_in)
    monkeypatch.setattr(device, "ROOT", made.root)
    monkeypatch.setenv("NEURON_DOUBLE_ROOT", str(made.root))
    yield made
    if "torch_neuronx" in sys.modules:
        made.double.uninstall()
    for name in [name for name in sys.modules if name.partition(".")[0] == "neuronxcc"]:
        del sys.modules[name]
