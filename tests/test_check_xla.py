"""check-xla's own logic: what it reads in HLO, what it calls a failure, when it installs. No torch_xla, no network."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import types
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

from xla_lowering import hlo, lowered
from xla_lowering.cases import CHECKS, CONTROLS, OPENAI, ROWS

from nanogpt_buckets import Bucket, errors
from nanogpt_buckets.model.architecture import Architecture
from nanogpt_buckets.steps import gate, step_named

SCRIPT = Path(__file__).parents[1] / "scripts" / "check-xla"

GOOD = """HloModule step.30, entry_computation_layout={(s32[2]{0}, s32[2,5]{1,0}, f32[11,4]{1,0})->(f32[2,4]{1,0})}

%MaxComputation.10 (x.11: f32[], y.12: f32[]) -> f32[] {
  %x.11 = f32[] parameter(0)
  %y.12 = f32[] parameter(1)
  ROOT %maximum.13 = f32[] maximum(f32[] %x.11, f32[] %y.12)
}

ENTRY %step.30 (p0.1: s32[2], p1.2: s32[2,5], p2.3: f32[11,4]) -> (f32[2,4]) {
  %p2.3 = f32[11,4]{1,0} parameter(2)
  %p1.2 = s32[2,5]{1,0} parameter(1)
  %reshape.4 = s32[10]{0} reshape(s32[2,5]{1,0} %p1.2)
  %gather.5 = f32[10,4]{1,0} gather(f32[11,4]{1,0} %p2.3, s32[10]{0} %reshape.4), offset_dims={1}, \
collapsed_slice_dims={0}, start_index_map={0}, index_vector_dim=1, slice_sizes={1,4}
  %constant.6 = f32[] constant(3)
  %broadcast.7 = f32[10,4]{1,0} broadcast(f32[] %constant.6), dimensions={}
  %power.8 = f32[10,4]{1,0} power(f32[10,4]{1,0} %gather.5, f32[10,4]{1,0} %broadcast.7)
  %constant.9 = f32[] constant(-inf)
  %reduce.14 = f32[4]{0} reduce(f32[10,4]{1,0} %power.8, f32[] %constant.9), dimensions={0}, \
to_apply=%MaxComputation.10
  %p0.1 = s32[2]{0} parameter(0)
  %convert.15 = f32[2]{0} convert(s32[2]{0} %p0.1)
  %broadcast.16 = f32[2,4]{1,0} broadcast(f32[2]{0} %convert.15), dimensions={0}
  %broadcast.17 = f32[2,4]{1,0} broadcast(f32[4]{0} %reduce.14), dimensions={1}
  %add.18 = f32[2,4]{1,0} add(f32[2,4]{1,0} %broadcast.16, f32[2,4]{1,0} %broadcast.17)
  %tuple.19 = (f32[2,4]{1,0}, /*index=1*/f32[4]{0}) tuple(f32[2,4]{1,0} %add.18, f32[4]{0} %reduce.14)
  %get-tuple-element.20 = f32[2,4]{1,0} get-tuple-element((f32[2,4]{1,0}, f32[4]{0}) %tuple.19), index=0
  ROOT %tuple.29 = (f32[2,4]{1,0}) tuple(f32[2,4]{1,0} %get-tuple-element.20)
}
"""
INPUTS = {"input_ids": (1, "s32[2,5]"), "last_index": (0, "s32[2]")}


@pytest.fixture(scope="module")
def xla() -> types.ModuleType:
    loader = SourceFileLoader("check_xla", str(SCRIPT))
    module = module_from_spec(spec_from_loader(loader.name, loader))
    sys.modules["check_xla"] = module  # dataclasses look their module up
    written, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    loader.exec_module(module)
    sys.dont_write_bytecode = written
    return module


def edited(old: str, new: str) -> str:
    assert old in GOOD
    return GOOD.replace(old, new)


def problems(xla: Any, text: str) -> list[str]:
    program = hlo.parse(text)
    return [*hlo.dynamic_shapes(program), *hlo.undocumented(program), *hlo.unfit_inputs(program, INPUTS)]


def test_a_good_program_has_no_problem(xla):
    program = hlo.parse(GOOD)

    assert problems(xla, GOOD) == []
    assert program.parameters() == {0: "p0.1", 1: "p1.2", 2: "p2.3"}
    assert program.instructions["tuple.19"].operands == ["add.18", "reduce.14"]
    assert program.instructions["get-tuple-element.20"].operands == ["tuple.19"]
    assert hlo.int64_inside(program) == []


@pytest.mark.parametrize("shape", ["s32[<=10]", "s32[?]"])
def test_a_dynamic_dimension_is_named(xla, shape):
    assert problems(xla, edited("%reshape.4 = s32[10]", f"%reshape.4 = {shape}")) == [f"reshape.4 is {shape}{{0}}"]


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("convert(", "sort(", "sort is not documented"),
        ("convert(", "custom-call(", "custom-call is not documented"),
        ("convert(", "dynamic-slice(", "dynamic-slice is not documented"),
        ("constant(3)", "constant(2.5)", "power.8: the exponent is no constant whole number"),
        ("%broadcast.7)", "%gather.5)", "power.8: the exponent is no constant whole number"),
        ("collapsed_slice_dims={0}", "collapsed_slice_dims={}",
         "gather.5: start_index_map and remapped offset dims are not disjoint"),
        ("maximum(", "subtract(", "reduce.14: reduces by subtract"),
        ("%power.8, f32[] %constant.9", "%power.8, f32[] %p0.1", "reduce.14: an initial value is no constant"),
        ("add(f32[2,4]{1,0} %broadcast.16, f32[2,4]{1,0} %broadcast.17)",
         "dynamic-update-slice(f32[2,4]{1,0} %broadcast.16, f32[2,4]{1,0} %broadcast.17, s32[] %p0.1, s32[] %p0.1)",
         "add.18: an index is no constant"),
    ],
)  # fmt: skip
def test_an_operator_that_is_not_documented_for_this_use_is_named(xla, old, new, problem):
    assert problems(xla, edited(old, new)) == [problem]


def test_a_constant_index_is_documented_and_activations_with_a_custom_call_are_waived(xla):
    update = "dynamic-update-slice(f32[2,4]{1,0} %broadcast.16, f32[2,4]{1,0} %broadcast.17, f32[] %constant.6)"

    assert problems(xla, re.sub(r"add\(f32.*", update, GOOD)) == []
    assert problems(xla, edited("convert(", "erf(")) == []
    assert not hlo.WAIVED & hlo.DOCUMENTED
    assert not {"sort", "custom-call", "dynamic-slice", "scatter", "while"} & hlo.DOCUMENTED


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("s32[2,5]{1,0} parameter", "f32[2,5]{1,0} parameter", "input_ids is f32[2,5], not s32[2,5]"),
        ("s32[2]{0} parameter", "s32[2,1]{0} parameter", "last_index is s32[2,1], not s32[2]"),
        ("%broadcast.16, f32", "%broadcast.17, f32", "last_index was dropped: no result depends on it"),
        ("%reshape.4)", "%constant.6)", "input_ids was dropped: no result depends on it"),
        ("f32[11,4]{1,0} parameter", "s64[11,4]{1,0} parameter", "parameter 2 is s64[11,4]{1,0}"),
    ],
)
def test_an_unfit_input_is_named(xla, old, new, problem):
    assert problems(xla, edited(old, new)) == [problem]


def test_int64_ids_and_an_input_that_is_no_parameter_are_named(xla):
    assert problems(xla, GOOD.replace("s32[2,5]", "s64[2,5]")) == [
        "input_ids is s64[2,5], not s32[2,5]",
        "parameter 1 is s64[2,5]{1,0}",
    ]
    dropped = INPUTS | {"last_index": (-1, "s32[2]")}
    assert list(hlo.unfit_inputs(hlo.parse(GOOD), dropped)) == ["last_index was dropped: no result depends on it"]


def test_an_int64_scalar_is_no_problem_and_int64_inside_is_reported(xla):
    scalar = edited("f32[] constant(3)", "s64[] constant(3)")
    inside = edited("f32[2]{0} convert", "s64[2]{0} convert")

    assert (problems(xla, scalar), problems(xla, inside)) == ([], [])
    assert hlo.int64_inside(hlo.parse(scalar)) == []
    assert hlo.int64_inside(hlo.parse(inside)) == ["convert"]


@pytest.mark.parametrize(
    "text", ["", "HloModule x", GOOD.replace("ENTRY ", ""), edited(" = s32[10]{0} reshape", " ~ ")]
)
def test_what_is_no_hlo_is_refused(xla, text):
    with pytest.raises(ValueError, match="HLO"):
        hlo.parse(text)


@pytest.mark.parametrize("fault", ["", "sort", "last_index ignored", "left padding", "mask dropped"])
def test_the_step_that_is_lowered_is_the_products_and_its_faults_are_faults(fault):
    """Without torch_xla, which takes it from there."""
    arch, bucket = Architecture(**OPENAI), Bucket(2, 9)
    weights = gate.seeded_weights(arch, torch.float32, fused=False)
    graph = lowered.make_graph(fault, arch, bucket, weights)

    if fault in ("", "sort"):
        assert gate.check(graph.run, arch, bucket, weights)["relative_error_e9"] < 2_000
    else:
        with pytest.raises(errors.GateFailed):
            gate.check(graph.run, arch, bucket, weights)


@pytest.mark.parametrize("fault", ["", *(case.fault for case in CONTROLS if case.step == "chunk")])
def test_a_chunk_that_is_lowered_is_the_products_and_its_faults_are_faults(fault):
    arch, bucket = Architecture(**OPENAI), Bucket(2, 100, "chunk")
    weights = gate.seeded_weights(arch, torch.float32, fused=False)
    graph = lowered.make_graph(fault, arch, bucket, weights)

    if not fault:
        assert gate.check(graph.run, arch, bucket, weights)["relative_error_e9"] < 2_000
    else:
        with pytest.raises(IndexError if fault == "position not clamped" else errors.GateFailed):
            gate.check(graph.run, arch, bucket, weights)


def test_what_is_looked_up_where_nothing_is_is_said():
    arch, bucket = Architecture(**OPENAI), Bucket(2, 100, "chunk")
    weights = gate.seeded_weights(arch, torch.float32, fused=False)
    step = step_named("chunk")
    state = [view.blank() for view in step.interface(arch, bucket, "float32").state]
    inputs = step.pack_after([90, 0], [[1] * 95, [2]], bucket)
    for fault, said in (("", []), ("position not clamped", ["index out of range in self"])):
        graph = lowered.make_graph(fault, arch, bucket, weights)
        assert list(lowered.out_of_range(graph, [*inputs, *state])) == said


def result(**found: list[str]) -> dict[str, Any]:
    return {"problems": {name: list[str]() for name in CHECKS} | found, "ops": {"add": 1}}


def test_verdicts(xla):
    wrong = {"gate": ["differs"]}

    assert xla.verdict((), result()) == "pass"
    assert xla.verdict((), result(**wrong)) == "FAIL"
    assert xla.verdict(("gate",), result(**wrong)) == "caught"
    assert xla.verdict(("gate",), result()) == "FAIL"
    assert xla.verdict(("gate",), result(operators=["sort"])) == "FAIL"
    assert xla.verdict(("gate", "inputs"), result(**wrong)) == "FAIL"
    assert xla.verdict((), result(crash=["status 1"])) == "FAIL"
    assert xla.verdict(("gate",), result(crash=["status 1"], **wrong)) == "FAIL"
    assert xla.verdict((), result() | {"ops": {}}) == "FAIL"
    assert xla.verdict(("trace",), result(trace=["ran"]) | {"ops": {}}) == "caught"


def test_every_kind_of_check_has_a_control_that_it_must_catch(xla):
    assert {name for case in CONTROLS for name in case.caught_by} == result()["problems"].keys()
    assert all(set(case.functionalized) == {False, True} and not case.caught_by for case in ROWS)


def fake_run(xla: Any, monkeypatch: pytest.MonkeyPatch, missed: str = "", status: int = 0) -> None:
    """Children that find what they must, save one; nothing is installed."""

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        _, _, _, kind, index = command
        case = xla.KINDS[kind][int(index)]
        found = {} if case.fault == missed else {name: ["found"] for name in case.caught_by}
        whole = result(**found) | {"waived": [], "int64_inside": [], "error": 3e-7, "versions": {"torch": "2.9.0"}}
        return subprocess.CompletedProcess(command, status, f"a line of torch's\n{json.dumps(whole)}\n", "trouble")

    monkeypatch.setattr(xla, "environment", lambda folder: Path("python"))
    monkeypatch.setattr(xla.subprocess, "run", run)


def test_exit_status_0_and_a_table_when_rows_pass_and_controls_are_caught(xla, monkeypatch, capsys):
    fake_run(xla, monkeypatch)

    assert xla.main([]) == 0
    out = capsys.readouterr().out
    assert "caught by inputs, gate" in out
    assert "FAIL" not in out
    assert out.splitlines()[-1].startswith("passed in 0 s with torch 2.9.0")


def test_a_control_that_is_not_caught_is_exit_status_1(xla, monkeypatch, capsys):
    fake_run(xla, monkeypatch, missed="mask dropped")

    assert xla.main([]) == 1
    assert "FAIL mask dropped 2x33 recompute: wanted gate, got nothing" in capsys.readouterr().out


def test_a_child_that_crashes_is_exit_status_1_and_its_words_are_shown(xla, monkeypatch, capsys):
    fake_run(xla, monkeypatch, status=139)

    assert xla.main(["--json"]) == 1
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert document["ok"] is False
    assert {row["verdict"] for row in document["rows"] + document["controls"]} == {"FAIL"}
    assert "trouble" in err


def test_no_rows_or_no_controls_is_no_success(xla):
    passed = [{"verdict": "pass"}]

    assert xla.exit_status({"rows": passed, "controls": passed}) == 0
    assert xla.exit_status({"rows": [], "controls": passed}) == 1
    assert xla.exit_status({"rows": passed, "controls": []}) == 1


def test_too_little_disk_is_refused_before_anything_is_made(xla, monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=3.21e9))

    with pytest.raises(SystemExit) as caught:
        xla.main(["--dir", str(tmp_path / "env")])
    assert re.fullmatch(r"check-xla needs \d+ GB .* 3\.2 GB are free; --dir DIR moves it", str(caught.value))
    assert [path.name for path in (tmp_path / "env").iterdir()] == ["lock"]


@pytest.mark.parametrize("state", ["missing", "no stamp", "old stamp", "no python"])
def test_an_incomplete_environment_is_made_anew_and_a_complete_one_is_used(xla, monkeypatch, tmp_path, state):
    python = tmp_path / "venv" / "bin" / "python"
    installed = []

    def install(venv: Path) -> None:
        installed.append(venv)
        python.parent.mkdir(parents=True, exist_ok=True)
        python.touch()
        (venv / "complete").write_text(xla.digest() + "\n")

    monkeypatch.setattr(xla, "install", install)
    if state != "missing":
        install(tmp_path / "venv")
        installed.clear()
        assert xla.environment(tmp_path) == python
        assert installed == []
    if state == "no python":
        python.unlink()
    elif state == "no stamp":
        (tmp_path / "venv" / "complete").unlink()
    elif state == "old stamp":
        (tmp_path / "venv" / "complete").write_text("0" * 64)

    assert xla.environment(tmp_path) == python
    assert installed == [tmp_path / "venv"]


def test_a_failed_installation_leaves_no_stamp(xla, monkeypatch, tmp_path):
    monkeypatch.setattr(xla, "NEEDED_GB", 0)

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, int("import torch_xla" in command[-1]))

    monkeypatch.setattr(xla.subprocess, "run", run)
    with pytest.raises(SystemExit, match="failed, see above; it needs a Python with a shared libpython"):
        xla.environment(tmp_path)
    assert not xla.complete(tmp_path / "venv")


def test_the_pins_are_the_projects_save_torch(xla):
    def pins(name: str) -> dict[str, str]:
        lines = (SCRIPT.parent / name).read_text().splitlines()
        return dict(line.split("==") for line in lines if not line.startswith("#"))

    theirs, ours = pins("constraints-xla.txt"), pins("constraints.txt")
    assert theirs.pop("torch").startswith("2.9.")
    assert theirs.pop("torch_xla").startswith("2.9.")
    assert theirs.items() <= ours.items()


def test_help_needs_nothing_installed(tmp_path):
    environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    command = [sys.executable, "-I", "-S", str(SCRIPT), "--help"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    assert {"--json", "--suite", "--dir"} <= set(done.stdout.replace(",", " ").split())
    assert "--case" not in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_json_and_suite_together_are_refused(xla, capsys):
    with pytest.raises(SystemExit):
        xla.main(["--json", "--suite"])
    assert "--json does not go with it" in capsys.readouterr().err
