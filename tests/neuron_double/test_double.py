"""The test double does what the AWS Neuron documentation and issue threads say of the real packages."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

HERE = Path(__file__).parent
SDK = HERE / "sdk"
TRN1 = ["--target", "trn1"]
UNAVAILABLE = "The PyTorch Neuron Runtime could not be initialized"


@pytest.fixture(scope="module", autouse=True)
def _on_the_path():
    sys.path.insert(0, str(SDK))
    yield
    if "torch_neuronx" in sys.modules:
        sys.modules["torch_neuronx"]._double.uninstall()
    sys.path.remove(str(SDK))


@pytest.fixture
def host(monkeypatch, tmp_path):
    """A host without a Neuron device, in an empty working directory; call it to change its environment."""
    for name in [name for name in os.environ if name.startswith("NEURON_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NEURON_DOUBLE_STATE_DIR", str(tmp_path / "state"))

    def change(**variables: object) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))

    return change


@pytest.fixture
def neuron(host):
    """The package, imported anew only if a test has uninstalled it."""
    module = importlib.import_module("torch_neuronx")
    module._double.reset()
    yield module
    module._double.reset()


class Step(nn.Module):
    """Every row on its own; in the middle a fused projection, taken apart by `split`."""

    def __init__(self, split=lambda x: torch.tensor_split(x, 3, dim=2)):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.table = nn.Parameter(torch.randn(11, 4, generator=generator))
        self.fused = nn.Parameter(torch.randn(4, 12, generator=generator))
        self.split = split

    def forward(self, ids, last):
        q, k, v = self.split(F.embedding(ids, self.table) @ self.fused)
        y = q * k + v
        return y[torch.arange(ids.shape[0]), last]


IDS = torch.tensor([[5, 6, 7], [8, 9, 10]], dtype=torch.int32)
LAST = torch.tensor([2, 1], dtype=torch.int32)
INPUTS = (IDS, LAST)


def cross_compile(neuron, func=None, inputs=INPUTS, **options):
    options = {"compiler_args": TRN1} | options
    return neuron.trace(func or Step(), inputs, cpu_backend=True, **options)


def save(module, path="model.pt") -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(module, path)
    return path


def load(path="model.pt"):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.load(path)


def python(script: str, *path: Path, **variables: object) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, path)),
        **{k: str(v) for k, v in variables.items()},
    }
    command = [sys.executable, "-W", "ignore", "-c", script]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def neuronx_cc(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SDK / "bin" / "neuronx-cc"), *arguments]
    return subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)


# 1, 2: the signature and the inputs of trace


def test_trace_has_the_documented_signature(neuron):
    parameters = inspect.signature(neuron.trace).parameters

    assert {name: p.default for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY} == {
        "input_output_aliases": {},
        "compiler_workdir": None,
        "compiler_args": None,
        "partitioner_config": None,
        "inline_weights_to_neff": True,
        "cpu_backend": False,
    }
    assert [name for name, p in parameters.items() if p.kind is not p.KEYWORD_ONLY] == ["func", "example_inputs", "_"]


def test_a_third_positional_argument_is_deprecated_and_taken(neuron):
    with pytest.warns(DeprecationWarning, match="Received 4 positional arguments but expected 2. Use of positional"):
        neuron.trace(Step(), INPUTS, None, "work", compiler_args=TRN1, cpu_backend=True)

    assert Path("work/graph.neff").exists()


def test_more_than_seven_positional_arguments_are_refused(neuron):
    with pytest.raises(RuntimeError, match="Received 8 positional arguments but expected 2"):
        neuron.trace(Step(), INPUTS, *[None] * 6)


def test_aliases_may_be_none(neuron):
    assert isinstance(cross_compile(neuron, input_output_aliases=None), torch.jit.ScriptModule)


@pytest.mark.parametrize(
    ("func", "inputs"),
    [
        (lambda x: x + 1, torch.ones(2)),
        (lambda x: {"one": x + 1, "two": x * 2}, (torch.ones(2),)),
        (lambda x, pair: (x + pair[0], [pair[1]]), (torch.ones(2), [torch.ones(2), torch.zeros(3)])),
    ],
    ids=["tensor", "dictionary", "nested"],
)
def test_structures_of_tensors_are_restored(neuron, host, func, inputs):
    traced = cross_compile(neuron, func, inputs)
    host(NEURON_DOUBLE_CORES=1)

    arguments = inputs if isinstance(inputs, tuple) else (inputs,)
    torch.testing.assert_close(traced(*arguments), func(*arguments), rtol=0, atol=0)


@pytest.mark.parametrize("leaf", ["text", 3, None])
def test_other_leaves_are_refused(neuron, leaf):
    with pytest.raises(TypeError, match="<double>"):
        cross_compile(neuron, lambda x, y: x, (torch.ones(1), leaf))


# 3: saved and loaded by torch.jit


def test_a_new_process_needs_the_import_before_it_can_load(neuron, host):
    step = Step()
    save(cross_compile(neuron, step))
    script = """
import torch
try:
    torch.jit.load("model.pt")
except RuntimeError as error:
    print(error)
import torch_neuronx
model = torch.jit.load("model.pt")
print(torch_neuronx._double.loaded())
print(model(torch.tensor([[5, 6, 7], [8, 9, 10]], dtype=torch.int32), torch.tensor([2, 1], dtype=torch.int32)).tolist())
"""

    done = python(script, SDK, NEURON_DOUBLE_CORES=2)

    assert "Unknown builtin op: neuron::forward_v2" in done.stdout
    lines = done.stdout.splitlines()
    assert lines[-2].startswith("[Loaded(core=0, name='Step', nbytes="), done.stderr
    assert json.loads(lines[-1]) == step(*INPUTS).tolist()


def test_uninstalling_makes_it_a_process_without_torch_neuronx_until_the_next_import(neuron, host):
    save(cross_compile(neuron))
    neuron._double.uninstall()
    with pytest.raises(RuntimeError, match="Unknown builtin op: neuron::forward_v2"):
        load()

    again = importlib.import_module("torch_neuronx")
    host(NEURON_DOUBLE_CORES=1)

    model = load()
    assert model(*INPUTS).shape == (2, 4)
    assert len(again._double.loaded()) == 1


# 4: strict at run time


@pytest.mark.parametrize(
    "inputs",
    [
        (IDS[:1], LAST[:1]),
        (IDS[:, :2], LAST),
        (IDS.long(), LAST),
        (IDS.to("meta"), LAST),
        (IDS, LAST.float()),
        (IDS,),
        (IDS, LAST, LAST),
    ],
    ids=["batch", "length", "int64", "device", "float", "too few", "too many"],
)
def test_only_the_traced_shapes_and_types_run(neuron, host, inputs):
    traced = cross_compile(neuron)
    host(NEURON_DOUBLE_CORES=1)

    with pytest.raises(RuntimeError):
        traced(*inputs)
    assert traced(*INPUTS).shape == (2, 4)


def test_results_need_no_gradient(neuron, host):
    func = torch.nn.Linear(2, 2)
    traced = cross_compile(neuron, func, torch.ones(2))
    host(NEURON_DOUBLE_CORES=1)

    result = traced(torch.ones(2, requires_grad=True))

    assert not result.requires_grad
    assert torch.equal(result, func(torch.ones(2)))


def test_an_input_of_which_only_the_shape_is_read_is_dropped(neuron, host):
    traced = cross_compile(neuron, lambda x, y: x * y.shape[0], (torch.ones(2), torch.ones(5)))
    host(NEURON_DOUBLE_CORES=1)

    assert [spec["name"] for spec in neuron._double.artifact(traced)["metaneff"]["inputs"]] == ["input0"]
    assert traced(torch.ones(2), torch.ones(9)).tolist() == [5, 5]


def test_an_index_out_of_range_raises_nothing(neuron, host):
    step = Step()
    traced = cross_compile(neuron, step)
    host(NEURON_DOUBLE_CORES=1)

    assert torch.equal(traced(IDS + 1, LAST + 9), step((IDS + 1).clamp(max=10), torch.full_like(LAST, 2)))


# 5: what tracing freezes


def test_weights_and_control_flow_are_frozen(neuron, host):
    class Switch(nn.Linear):
        on = True

        def forward(self, x):
            y = super().forward(x)
            return y * 2 if self.on and x.sum() > 1 else y

    func = Switch(2, 2)
    x = torch.ones(2)
    before = func(x).detach()
    traced = cross_compile(neuron, func, x)
    func.on = False
    func.weight.data.zero_()
    host(NEURON_DOUBLE_CORES=1)

    assert torch.equal(traced(x), before)
    # a condition on data was decided once, by the example
    assert torch.equal(traced(x * 0), 2 * func.bias)


def test_separate_weights_can_be_replaced(neuron, host):
    func, other = nn.Linear(2, 2), nn.Linear(2, 2)
    save(cross_compile(neuron, func, torch.ones(2), inline_weights_to_neff=False))
    host(NEURON_DOUBLE_CORES=1)
    loaded = load()
    before = loaded(torch.ones(2))

    neuron.replace_weights(loaded, other)

    assert torch.equal(before, func(torch.ones(2)))
    assert torch.equal(loaded(torch.ones(2)), other(torch.ones(2)))


def test_inlined_weights_cannot_be_replaced(neuron, host):
    func = nn.Linear(2, 2)
    traced = cross_compile(neuron, func, torch.ones(2))
    host(NEURON_DOUBLE_CORES=1)

    with pytest.warns(UserWarning, match="no separate weights"):
        neuron.replace_weights(traced, nn.Linear(2, 2).state_dict())
    assert torch.equal(traced(torch.ones(2)), func(torch.ones(2)))


def test_aliased_state_is_updated_and_not_returned(neuron, host):
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.tensor([10.0]))

        def forward(self, x):
            return x * 2, self.count + x

    func = Counter()
    save(cross_compile(neuron, func, torch.ones(1), input_output_aliases={func.count: 1}))
    host(NEURON_DOUBLE_CORES=1)
    loaded = load()

    assert [len(loaded(torch.ones(1))) for _ in range(3)] == [1, 1, 1]
    assert loaded.state_0.tolist() == [13]
    assert func.count.tolist() == [10]


# 6: with and without a device


def test_without_a_device_a_target_is_needed(neuron):
    with pytest.raises(RuntimeError, match=r'please supply compiler argument target.*Ex: "--target trn1"'):
        cross_compile(neuron, compiler_args=None)


def test_without_a_device_and_cpu_backend_tracing_fails(neuron):
    with pytest.raises(RuntimeError, match=r"PJRT_Client_Create: .*!\(num_devices > 0\)"):
        neuron.trace(Step(), INPUTS)


def test_without_a_device_nothing_runs(neuron, host, capfd):
    traced = cross_compile(neuron)
    save(traced)

    for attempt in (load, lambda: traced(*INPUTS), neuron.multicore_context().__enter__):
        with pytest.raises(RuntimeError, match=UNAVAILABLE):
            attempt()
        assert "ERROR NRT:nrt_init Unable to determine Neuron Driver version" in capfd.readouterr().err


def test_with_a_device_tracing_takes_its_target_and_a_core(neuron, host):
    host(NEURON_DOUBLE_CORES=2, NEURON_DOUBLE_INSTANCE="trn2.48xlarge")

    traced = neuron.trace(Step(), INPUTS)

    assert neuron._double.artifact(traced)["arch"] == "v3"
    assert neuron._double.reserved() == [0, 1]
    assert [model.core for model in neuron._double.loaded()] == [0]


def test_with_a_device_tracing_needs_its_cores_before_it_compiles(neuron, host):
    host(NEURON_DOUBLE_CORES=2, NEURON_RT_VISIBLE_CORES="2")

    with pytest.raises(RuntimeError, match=UNAVAILABLE):
        neuron.trace(Step(), INPUTS)
    assert neuron._double.compiles() == []


def test_cpu_backend_takes_no_core(neuron, host):
    host(NEURON_DOUBLE_CORES=2)

    cross_compile(neuron)

    assert neuron._double.reserved() == []


def test_the_platform_is_the_override_read_at_import_else_the_instance(neuron, host):
    with pytest.raises(RuntimeError, match="Unable to read platform target"):
        neuron.utils.get_platform_target()
    host(NEURON_DOUBLE_CORES=1, NEURON_DOUBLE_INSTANCE="inf2.xlarge", NEURON_PLATFORM_TARGET_OVERRIDE="gen3")
    assert neuron.utils.get_platform_target() == "inf2"
    neuron._double.reset()
    assert neuron.utils.get_platform_target() == "trn2"


# 7: cores


@pytest.fixture
def saved(neuron):
    return save(cross_compile(neuron))


def cores(neuron) -> list[int]:
    return [model.core for model in neuron._double.loaded()]


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, [0, 1, 2, 3, 4, 5, 6, 7]),
        ({"NEURON_RT_VISIBLE_CORES": "3"}, [3]),
        ({"NEURON_RT_VISIBLE_CORES": "3-6"}, [3, 4, 5, 6]),
        ({"NEURON_RT_VISIBLE_CORES": "3-5,7"}, [3, 4, 5, 7]),
        ({"NEURON_RT_NUM_CORES": "2"}, [0, 1]),
        ({"NEURON_RT_NUM_CORES": "0"}, [0, 1, 2, 3, 4, 5, 6, 7]),
        ({"NEURON_RT_NUM_CORES": "2", "NEURON_RT_VISIBLE_CORES": "5"}, [5]),
    ],
)
def test_the_runtime_reserves_the_visible_cores(neuron, host, saved, variables, expected):
    host(NEURON_DOUBLE_CORES=8, **variables)

    load()

    assert neuron._double.reserved() == expected


@pytest.mark.parametrize("visible", ["8", "6-8", "x"])
def test_cores_that_do_not_exist_make_the_runtime_fail(neuron, host, saved, visible):
    host(NEURON_DOUBLE_CORES=8, NEURON_RT_VISIBLE_CORES=visible)

    with pytest.raises(RuntimeError, match=UNAVAILABLE):
        load()
    assert neuron._double.reserved() == []


def test_loads_go_round_the_visible_cores(neuron, host, saved):
    host(NEURON_DOUBLE_CORES=4, NEURON_RT_VISIBLE_CORES="2-3")

    kept = [load() for _ in range(3)]

    assert sorted(cores(neuron)) == [2, 2, 3]
    assert len(kept) == 3


def test_the_context_places_what_is_loaded_inside_it(neuron, host, saved):
    host(NEURON_DOUBLE_CORES=4, NEURON_RT_VISIBLE_CORES="1-3")

    with neuron.neuron_cores_context(start_nc=2, nc_count=1):
        inside = [load(), load()]
    outside = load()

    assert sorted(cores(neuron)) == [1, 3, 3]
    assert (len(inside), outside(*INPUTS).shape) == (2, (2, 4))


def test_by_default_the_context_takes_the_least_used_core(neuron, host, saved):
    host(NEURON_DOUBLE_CORES=3)
    with neuron.neuron_cores_context(start_nc=0, nc_count=2):
        first = load()
    with neuron.neuron_cores_context():
        second = load()

    assert sorted(cores(neuron)) == [0, 1, 2]
    assert first is not second


def test_replicas_take_turns(neuron, host, saved):
    host(NEURON_DOUBLE_CORES=2)
    with neuron.multicore_context():
        model = load()

    for _ in range(4):
        model(*INPUTS)

    assert neuron._double.executions() == {0: 2, 1: 2}


@pytest.mark.parametrize("module", ["torch_neuronx", "torch_neuronx.experimental"])
def test_a_loaded_model_can_be_moved(neuron, host, saved, module):
    host(NEURON_DOUBLE_CORES=4)
    model = load()
    namespace = importlib.import_module(module)

    namespace.set_neuron_cores(model, start_nc=2, nc_count=2)
    assert cores(neuron) == [2, 3]
    namespace.set_multicore(model)
    assert cores(neuron) == [0, 1, 2, 3]
    neuron.move_trace_to_device(model, 1)
    assert cores(neuron) == [1]
    namespace.set_neuron_cores(nn.Linear(1, 1), 0, 1)
    assert cores(neuron) == [1]


@pytest.mark.parametrize(("start", "count"), [(0, 0), (0, 3), (1, 2), (2, 1), (-2, 1), (0, -2)])
def test_cores_outside_the_visible_ones_are_refused(neuron, host, start, count):
    host(NEURON_DOUBLE_CORES=2)

    with pytest.raises(ValueError, match="<double>"), neuron.neuron_cores_context(start, count):
        pass


def test_deleting_a_model_frees_memory_but_no_core(neuron, host, saved):
    host(NEURON_DOUBLE_CORES=2)
    model = load()
    assert len(neuron._double.loaded()) == 1

    del model

    assert neuron._double.loaded() == []
    assert neuron._double.reserved() == [0, 1]


def test_a_core_holds_only_so_many_bytes(neuron, host, saved):
    host(NEURON_DOUBLE_CORES=1)
    size = [load(), neuron._double.loaded()[0].nbytes][1]
    neuron._double.reset()
    host(NEURON_DOUBLE_CORE_BYTES=2 * size + 1)
    kept = [load(), load()]

    with pytest.raises(RuntimeError, match=r"Failed to allocate \d+ bytes \(usage: tensors\) on ND 0:NC 0"):
        load()
    assert len(neuron._double.loaded()) == len(kept)


def test_another_process_cannot_have_a_core_until_this_one_ends(neuron, host, saved, capfd, tmp_path):
    script = """
import torch, torch_neuronx
model = torch.jit.load("model.pt")
del model
print(torch_neuronx._double.reserved(), flush=True)
input()
"""
    environment = {**os.environ, "PYTHONPATH": str(SDK), "NEURON_DOUBLE_CORES": "3", "NEURON_RT_VISIBLE_CORES": "0-1"}
    command = [sys.executable, "-W", "ignore", "-c", script]
    with subprocess.Popen(command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == "[0, 1]\n"
        host(NEURON_DOUBLE_CORES=3, NEURON_RT_VISIBLE_CORES="1")
        with pytest.raises(RuntimeError, match=UNAVAILABLE):
            load()
        assert "NeuronCore(s) not available - Requested:nc1-nc1 Available:0" in capfd.readouterr().err
        host(NEURON_RT_VISIBLE_CORES="", NEURON_RT_NUM_CORES="1")
        load()
        assert neuron._double.reserved() == [2]
        other.stdin.close()
    neuron._double.reset()
    host(NEURON_RT_VISIBLE_CORES="1")
    load()
    assert neuron._double.reserved() == [1]


# 8: architecture and version


def test_the_artifact_names_architecture_compiler_and_flags(neuron, host):
    host(NEURON_DOUBLE_CC_VERSION="2.27.5334.0+0d0b1e00")

    traced = cross_compile(neuron, compiler_args="--target=trn2 --auto-cast none -O1 --native-int64=disabled")

    found = neuron._double.artifact(save(traced))
    assert (found["arch"], found["target"], found["lnc"]) == ("v3", "trn2", 2)
    assert found["compiler"] == "2.27.5334.0+0d0b1e00"
    assert found["flags"]["--auto-cast"] == "none"
    assert found["flags"]["--optlevel"] == "1"


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize(
    ("target", "variables", "message"),
    [
        ("trn2", {}, "different arch is not allowed, NEFF arch: v3, instance arch: v2"),
        ("trn1", {"NEURON_DOUBLE_INSTANCE": "trn2.48xlarge"}, "NEFF arch: v2, instance arch: v3"),
        ("inf2", {"NEURON_DOUBLE_RUNTIME_MAX_CC": "2.25.3371.0"}, "newer version of Neuron compiler .* err: 10"),
        ("trn1", {"NEURON_DOUBLE_FAULT": "load-corrupt"}, "NEFF is invalid"),
    ],
)
def test_a_neff_of_another_machine_is_refused_when_it_is_loaded(neuron, host, target, variables, message, lazy):
    traced = cross_compile(neuron, compiler_args=f"--target {target}")
    neuron.lazy_load(traced, lazy)
    save(traced)
    host(NEURON_DOUBLE_CORES=1, **variables)
    pattern = "(?s)" + message.replace(" .* ", ".*")

    if lazy:
        model = load()
        with pytest.raises(RuntimeError, match=pattern):
            model(*INPUTS)
    else:
        with pytest.raises(RuntimeError, match=pattern):
            load()
    assert neuron._double.loaded() == []


def test_legacy_neffs_can_be_allowed(neuron, host):
    save(cross_compile(neuron, compiler_args="--target inf2"))
    host(NEURON_DOUBLE_CORES=1, NEURON_DOUBLE_INSTANCE="trn2.48xlarge", NEURON_RT_ALLOW_LEGACY_NEFF="1")

    assert load()(*INPUTS).shape == (2, 4)


def test_compiler_and_runtime_must_agree_on_logical_cores(neuron, host):
    save(cross_compile(neuron, compiler_args="--target trn2 --lnc 1"))
    host(NEURON_DOUBLE_CORES=1, NEURON_DOUBLE_INSTANCE="trn2.48xlarge")

    with pytest.raises(RuntimeError, match="lnc=1"):
        load()
    host(NEURON_LOGICAL_NC_CONFIG=1)
    assert load()(*INPUTS).shape == (2, 4)


# 9: the compiler


def test_the_workdir_keeps_graph_neff_and_command(neuron, tmp_path, capfd):
    cross_compile(neuron, compiler_workdir="work", compiler_args=["--target=trn1", "-O1"])

    assert {"model/graph.hlo", "model/metadata.json", "model/weights", "graph.neff", "command.txt"} <= {
        str(path.relative_to("work")) for path in Path("work").rglob("*")
    }
    command = Path("work/command.txt").read_text()
    assert "neuronx-cc compile work/model --framework XLA --target trn1 --output work/graph.neff" in command
    assert command.endswith("--target=trn1 -O1")
    assert json.loads(Path("work/model/metadata.json").read_text())["model_files"] == "graph.hlo"
    assert "Compiler status PASS" in capfd.readouterr().out
    assert neuron._double.compiles()[0]["flags"]["--optlevel"] == "1"


@pytest.mark.parametrize(
    ("flags", "version", "status", "said"),
    [
        (["--auto-cast", "none", "--model-type=transformer", "-O", "2", "--optlevel=3"], "2.26.1.0", 0, ""),
        (["--enable-saturate-infinity", "--enable-fast-loading-neuron-binaries"], "2.26.1.0", 0, ""),
        (["--no-such-flag"], "2.26.1.0", 70, "unrecognized arguments: --no-such-flag"),
        (["--auto-cast none"], "2.26.1.0", 70, "unrecognized arguments: --auto-cast none"),
        (["--auto-cast", "some"], "2.26.1.0", 70, "invalid choice: 'some'"),
        (["--target", "sm_80"], "2.26.1.0", 70, "invalid choice: 'sm_80'"),
        (["--enable-saturate-infinity=true"], "2.26.1.0", 70, "takes no value"),
        (["--lnc", "2"], "2.26.1.0", 70, "NCC_EARG001"),
        (["--logical-nc-config=2"], "2.26.1.0", 70, "NCC_EARG001"),
        (["--target", "trn2", "-lnc", "2"], "2.26.1.0", 0, ""),
        (["--native-int64=disabled"], "2.26.6360.0", 70, "unrecognized arguments: --native-int64=disabled"),
        (["--implicit-integer-downcast", "all"], "2.26.6360.0", 70, "unrecognized arguments"),
        (["--native-int64", "disabled", "--implicit-integer-downcast=all"], "2.27.5334.0", 0, ""),
    ],
)
def test_the_compiler_checks_its_flags(host, flags, version, status, said):
    Path("model").mkdir()
    Path("model/metadata.json").write_text('{"model_files": "graph.hlo", "metaneff": {}}')
    Path("model/graph.hlo").write_bytes(b"program")
    common = ["compile", "model", "--framework", "XLA", "--target", "trn1", "--output", "out.neff", "--logfile", "log"]

    done = neuronx_cc(*common, *flags, NEURON_DOUBLE_CC_VERSION=version)

    assert done.returncode == status, done.stderr
    assert said in done.stderr
    assert (Path("out.neff").exists(), Path("log").exists()) == (status == 0, status == 0)


def test_the_compiler_tells_its_version_and_operators(host):
    assert neuronx_cc("--version").stdout.startswith("NeuronX Compiler version 2.26.6360.0+6f180f47\n")
    assert "Gather" in neuronx_cc("list-operators", "--framework", "XLA").stdout.splitlines()
    assert neuronx_cc("--help").returncode == 70


def test_by_default_the_compiler_logs_into_the_working_directory(neuron):
    cross_compile(neuron)
    assert Path("log-neuron-cc.txt").exists()


@pytest.mark.parametrize(
    ("missing", "message"),
    [("neuronxcc", "neuronx-cc is not installed.\n"), ("bin", "neuronx-cc compiler binary does not exist")],
)
def test_without_a_compiler_tracing_fails(neuron, host, tmp_path, monkeypatch, missing, message):
    copy = tmp_path / "sdk"
    shutil.copytree(SDK, copy, ignore=shutil.ignore_patterns("__pycache__", missing))
    monkeypatch.setattr(sys, "path", [str(copy), *[entry for entry in sys.path if entry != str(SDK)]])
    monkeypatch.delitem(sys.modules, "neuronxcc", raising=False)

    with pytest.raises(RuntimeError, match=message):
        cross_compile(neuron)


def test_versions_are_in_the_metadata_and_in_the_packages(neuron):
    found = {d.name: d.version for d in importlib.metadata.distributions(path=[str(SDK)])}

    assert found == {"torch-neuronx": "2.9.0.2.15.32035", "neuronx-cc": "2.26.6360.0", "libneuronxla": "2.2.17544.0"}
    for name, distribution in [("torch_neuronx", "torch-neuronx"), ("libneuronxla", "libneuronxla")]:
        assert importlib.import_module(name).__version__.split("+")[0] == found[distribution]
    assert importlib.import_module("neuronxcc").__version__ == "2.26.6360.0+6f180f47"


# 10: faults


@pytest.mark.parametrize(("fault", "status"), [("compile-70", 70), ("compile-oom", -9), ("compile-abort", -6)])
def test_a_failing_compiler(neuron, host, caplog, fault, status):
    host(NEURON_DOUBLE_FAULT=fault)

    with pytest.raises(RuntimeError, match=f"neuronx-cc failed with {status}$"):
        cross_compile(neuron, compiler_workdir="work")

    assert Path("work/model/graph.hlo").exists()
    # a killed compiler leaves part of a file, and trace says more about it than its status
    assert Path("work/graph.neff").exists() == (status < 0)
    assert ("neuronx-cc was" in caplog.text) == (status < 0)


def test_a_compiler_that_fails_once(neuron, host):
    host(NEURON_DOUBLE_FAULT="compile-70-once")

    with pytest.raises(RuntimeError, match="neuronx-cc failed with 70"):
        cross_compile(neuron)
    assert isinstance(cross_compile(neuron), torch.jit.ScriptModule)
    assert len(neuron._double.compiles()) == 2


def test_a_hanging_compiler(host):
    Path("model").mkdir()
    Path("model/metadata.json").write_text('{"model_files": "graph.hlo", "metaneff": {}}')
    Path("model/graph.hlo").write_bytes(b"program")
    command = [sys.executable, str(SDK / "bin" / "neuronx-cc"), "compile", "model", "--framework", "XLA"]
    command += ["--target", "trn1", "--output", "out.neff"]

    with subprocess.Popen(command, env=os.environ | {"NEURON_DOUBLE_FAULT": "compile-hang"}) as process:
        while not Path("log-neuron-cc.txt").exists() and process.poll() is None:
            time.sleep(0.02)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.3)
        process.kill()
    assert not Path("out.neff").exists()


def test_a_slow_compiler(neuron, host):
    host(NEURON_DOUBLE_SECONDS="0.5")
    start = time.monotonic()

    cross_compile(neuron)

    assert time.monotonic() - start >= 0.5


def test_a_misspelt_fault_is_an_error(neuron, host):
    host(NEURON_DOUBLE_FAULT="wrong-gelu,wrong-glue")

    with pytest.raises(ValueError, match=r"unknown names: \['wrong-glue'\]"):
        cross_compile(neuron)


def faulty(neuron, host, fault, func, inputs, compiler_args=TRN1):
    """Return what a model gives that was compiled under a fault, and what it should give."""
    host(NEURON_DOUBLE_FAULT=fault)
    traced = cross_compile(neuron, func, inputs, compiler_args=compiler_args)
    host(NEURON_DOUBLE_FAULT="", NEURON_DOUBLE_CORES=1)
    return traced(*inputs), func(*inputs)


SPLITS = {
    "list": lambda x: torch.split(x, [4, 4, 4], dim=2),
    "int": lambda x: x.split(4, dim=2),
    "tensor_split": lambda x: torch.tensor_split(x, 3, dim=2),
    "list along 0": lambda x: torch.split(x.transpose(0, 2), [4, 4, 4]),
}


@pytest.mark.parametrize("shape", [(1, 1), (1, 8), (2, 8), (4, 1)])
@pytest.mark.parametrize("form", SPLITS)
def test_list_form_split_ignores_strides(neuron, host, form, shape):
    x = torch.arange(torch.Size(shape).numel() * 12.0).view(*shape, 12)

    found, expected = faulty(neuron, host, "split-miscompile", lambda x: tuple(SPLITS[form](x * 1)), (x,))

    # as measured: wrong everywhere but for one row of one token
    assert all(map(torch.equal, found, expected)) == (form != "list" or shape == (1, 1))
    if form == "list":
        size = found[0].numel()
        formula = [x.flatten()[n * 4 : n * 4 + size].view_as(found[n]) for n in range(3)]
        assert all(map(torch.equal, found, formula))


def test_int64_inputs_are_corrupted(neuron, host):
    ids = torch.tensor([5, 6, 7, 8])

    found, _ = faulty(neuron, host, "int64-corruption", lambda ids: ids + 0, (ids,))
    right, expected = faulty(neuron, host, "int64-corruption", lambda ids: ids + 0, (ids.int(),))

    assert found.tolist() == [5, 0, 6, 0]
    assert torch.equal(right, expected)


def attention(fill):
    def attend(scores):
        future = torch.ones(3, 3, dtype=torch.bool).triu(1)
        return scores.masked_fill(future, fill).softmax(-1) + torch.where(future, fill, scores).softmax(-1)

    return attend


SCORES = torch.arange(9.0).view(3, 3)


@pytest.mark.parametrize(
    ("func", "inputs"),
    [
        (attention(-torch.inf), (SCORES,)),
        (lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True), (SCORES.view(1, 1, 3, 3),)),
    ],
    ids=["explicit", "sdpa"],
)
def test_infinite_masks_give_nan_unless_infinity_is_saturated(neuron, host, func, inputs):
    found, _ = faulty(neuron, host, "nan-inf-mask", func, inputs)
    saturated, expected = faulty(neuron, host, "nan-inf-mask", func, inputs, [*TRN1, "--enable-saturate-infinity"])

    assert found.isnan().any()
    torch.testing.assert_close(saturated, expected)


def test_finite_masks_give_no_nan(neuron, host):
    found, expected = faulty(neuron, host, "nan-inf-mask", attention(-1e9), (SCORES,))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("form", ["none", "tanh"])
def test_the_forms_of_gelu_are_exchanged(neuron, host, form):
    found, _ = faulty(neuron, host, "wrong-gelu", lambda x: F.gelu(x, approximate=form), (SCORES,))
    assert torch.equal(found, F.gelu(SCORES, approximate="tanh" if form == "none" else "none"))


@pytest.mark.parametrize("fill", [-1e9, -torch.inf])
def test_masks_are_dropped(neuron, host, fill):
    found, _ = faulty(neuron, host, "drop-mask", attention(fill), (SCORES,))
    assert torch.equal(found, 2 * SCORES.softmax(-1))


def test_an_operator_that_does_not_mask_stays(neuron, host):
    found, expected = faulty(neuron, host, "drop-mask", lambda x: torch.where(x > 3, 0.0, x), (SCORES,))
    assert torch.equal(found, expected)


def test_outputs_are_scaled(neuron, host):
    found, expected = faulty(neuron, host, "scale-logits", Step(), INPUTS)
    torch.testing.assert_close(found, expected * 1.001, rtol=1e-6, atol=0)


def test_rows_are_mixed(neuron, host):
    host(NEURON_DOUBLE_FAULT="row-mix")
    traced = cross_compile(neuron)
    host(NEURON_DOUBLE_FAULT="", NEURON_DOUBLE_CORES=1)
    other = torch.cat([IDS[:1], IDS[1:] - 5])

    assert not torch.equal(traced(*INPUTS)[0], traced(other, LAST)[0])
    torch.testing.assert_close(traced(*INPUTS), Step()(*INPUTS), rtol=1e-4, atol=1e-4)


def test_no_fault_no_change(neuron, host):
    found, expected = faulty(neuron, host, "", Step(SPLITS["list"]), INPUTS)
    assert torch.equal(found, expected)


def test_matmuls_are_cast_only_when_asked(neuron, host):
    x = torch.randn(3, 3, generator=torch.Generator().manual_seed(1))
    found, expected = faulty(neuron, host, "", lambda x: x @ x, (x,), [*TRN1, "--auto-cast=matmult"])

    assert not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


# 11: lazy, asynchronous and disabled loading, dynamic batches


def test_a_lazy_model_takes_no_core_until_it_is_run(neuron, host):
    traced = cross_compile(neuron)
    neuron.lazy_load(traced)
    save(traced)
    host(NEURON_DOUBLE_CORES=2)

    model = load()
    assert (neuron._double.loaded(), neuron._double.reserved()) == ([], [])
    model(*INPUTS)
    assert cores(neuron) == [0]


def test_a_lazy_model_goes_where_its_context_said(neuron, host):
    traced = cross_compile(neuron)
    neuron.lazy_load(traced)
    save(traced)
    host(NEURON_DOUBLE_CORES=2)
    with neuron.neuron_cores_context(1, 1):
        model = load()

    model(*INPUTS)

    assert cores(neuron) == [1]


def test_lazy_loading_can_be_taken_back(neuron, host):
    traced = cross_compile(neuron)
    neuron.lazy_load(traced)
    neuron.lazy_load(traced, False)
    save(traced)
    host(NEURON_DOUBLE_CORES=1)

    model = load()

    assert cores(neuron) == [0]
    assert model(*INPUTS).shape == (2, 4)


def test_a_call_waits_for_an_asynchronous_load(neuron, host, monkeypatch):
    traced = cross_compile(neuron)
    neuron.async_load(traced)
    save(traced)
    host(NEURON_DOUBLE_CORES=1)
    may_end, results = threading.Event(), []
    monkeypatch.setattr("torch_neuronx._settings.load_seconds", lambda: 0 if may_end.wait() else 1)

    model = load()
    call = threading.Thread(target=lambda: results.append(model(*INPUTS)))
    call.start()
    call.join(0.3)
    assert (call.is_alive(), results) == (True, [])
    may_end.set()
    call.join()

    assert torch.equal(results[0], Step()(*INPUTS))


def test_a_load_takes_time(neuron, host, saved):
    host(NEURON_DOUBLE_CORES=1, NEURON_DOUBLE_LOAD_SECONDS="0.3")
    start = time.monotonic()

    model = load()

    assert time.monotonic() - start >= 0.3
    assert model(*INPUTS).shape == (2, 4)


def test_an_asynchronous_load_fails_in_the_call(neuron, host):
    traced = cross_compile(neuron)
    neuron.async_load(traced)
    save(traced)
    host(NEURON_DOUBLE_CORES=1, NEURON_DOUBLE_CORE_BYTES=10)

    model = load()

    with pytest.raises(RuntimeError, match="Failed to allocate"):
        model(*INPUTS)


def test_loading_can_be_disabled_on_a_host_without_runtime(neuron, host, saved):
    with neuron.contexts.disable_nrt_load():
        model = load()
        with pytest.raises(RuntimeError, match="disable_nrt_load"):
            model(*INPUTS)
    save(model, "again.pt")
    host(NEURON_DOUBLE_CORES=1)

    assert torch.equal(load("again.pt")(*INPUTS), model(*INPUTS))


def test_a_dynamic_batch_is_split_and_padded(neuron, host):
    traced = cross_compile(neuron)
    assert neuron.dynamic_batch(traced) is traced
    save(traced)
    host(NEURON_DOUBLE_CORES=1)
    model = load()
    ids, last = torch.cat([IDS, IDS, IDS[:1]]), torch.cat([LAST, LAST, LAST[:1]])

    assert torch.equal(model(ids, last), Step()(ids, last))
    assert neuron._double.executions() == {0: 3}
    with pytest.raises(RuntimeError, match="Inconsistent batch sizes found on inputs"):
        model(ids, LAST)


# 12: packages of the same name


def test_the_native_package_has_no_trace():
    script = """
import importlib.metadata, os, torch_neuronx
print(hasattr(torch_neuronx, "trace"), importlib.metadata.version("torch-neuronx"), torch_neuronx.__version__)
print(os.environ["NEURON_RT_ALLOW_LEGACY_NEFF"])
"""
    assert python(script, HERE / "native").stdout.split() == ["False", "2.14.0", "2.14.0", "1"]


def test_the_placeholder_cannot_be_imported():
    done = python("import torch_neuronx", HERE / "placeholder")

    assert "ImportError: WRONG PACKAGE. Please install the package from Neuron Repository" in done.stderr
