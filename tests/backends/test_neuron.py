"""The Neuron backend against the double of torch_neuronx: proof level N1. Every fault is caught or a typed error."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import pytest
import torch

from nanogpt_buckets import Bucket, Engine, Plan, build, errors
from nanogpt_buckets.backends import backend_for, neuron, worker
from nanogpt_buckets.backends.base import BuildRequest
from nanogpt_buckets.backends.neuron import backend as neuron_backend
from nanogpt_buckets.backends.neuron import device, flags, sdk
from nanogpt_buckets.builder import default_jobs
from nanogpt_buckets.choice import choose
from nanogpt_buckets.errors import GateFailed
from nanogpt_buckets.model.architecture import GPT2_SIZES
from nanogpt_buckets.selection import Selection

DOUBLE = Path(__file__).parents[1] / "neuron_double"
PLAN = Plan([Bucket(1, 16), Bucket(2, 16)])
PROMPTS = ["ROMEO:", "KING"]


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


@pytest.fixture
def host(monkeypatch, tmp_path, plug_in) -> Iterator[Callable[..., None]]:
    """A machine with the SDK and without a device; call it to give it one, or to set variables."""
    for name in [name for name in os.environ if name.startswith(("NEURON_", "XLA_"))]:
        monkeypatch.delenv(name)
    for path in (DOUBLE / "sdk", DOUBLE / "machine"):
        monkeypatch.syspath_prepend(str(path))
    inherited = os.environ.get("PYTHONPATH")
    paths = [str(DOUBLE / "sdk"), str(DOUBLE / "machine"), *([inherited] if inherited else [])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.setenv("NEURON_DOUBLE_STATE_DIR", str(tmp_path / "state"))
    root = tmp_path / "root"
    monkeypatch.setattr(device, "ROOT", root)
    monkeypatch.setenv("NEURON_DOUBLE_ROOT", str(root))

    def change(instance: str = "", *, cores: int = 2, **variables: object) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))
        if instance:
            monkeypatch.setenv("NEURON_DOUBLE_INSTANCE", instance)
            monkeypatch.setenv("NEURON_DOUBLE_CORES", str(cores))
            plug_in(root, instance)

    yield change
    if "torch_neuronx" in sys.modules:
        sys.modules["torch_neuronx"]._double.uninstall()


def double() -> Any:
    return sys.modules["torch_neuronx"]._double


def selection(target: str | None = "trn1", **options: Any):
    return Selection(choose("demo", backend="neuron", target=target, **options))


def build_here(tmp_path: Path, plan: Plan = PLAN, **options: Any):
    return build(plan, model="demo", backend="neuron", executor=InProcess(tmp_path), **options)


def manifests(**options: Any) -> list[Any]:
    return [answers[0].manifest for answers in selection(**options).usable.values()]


# --- flags ------------------------------------------------------------------------------------------------------------

SAME = [
    ("--auto-cast matmult", "--auto-cast=matmult"),
    ("-O1", "--optlevel 1"),
    ("-O 1", "--optlevel=1"),
    ("--lnc 2", "-lnc=2"),
    ("--optlevel 1 --auto-cast all", "--auto-cast=all -O1"),
    ("-O3 -O1", "-O1"),
    ("", "--auto-cast none --model-type=transformer"),
    ("", "--logfile /tmp/a --verbose 35"),
    ("--enable-saturate-infinity -O1", "-O1 --enable-saturate-infinity"),
    ("--enable-mixed-precision-accumulation --disable-mixed-precision-accumulation",
     "--disable-mixed-precision-accumulation"),
]  # fmt: skip
DIFFERENT = [
    ("", "--auto-cast matmult"),
    ("-O1", "-O3"),
    ("", "--enable-saturate-infinity"),
    ("--auto-cast-type bf16", "--auto-cast-type tf32"),
    ("", "--disable-mixed-precision-accumulation"),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_flags_that_say_the_same_name_the_same_family(one, other):
    assert flags.named(one) == flags.named(other) == flags.named(other.split())


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_flags_that_say_something_else_name_another(one, other):
    assert flags.named(one) != flags.named(other)


@pytest.mark.parametrize("name", flags.HLO_VARIABLES)
def test_variables_that_change_the_graph_are_part_of_the_family(monkeypatch, name):
    plain = flags.named("-O1")
    monkeypatch.setenv(name, "1")

    assert flags.named("-O1") == [*plain, f"{name}=1"]


@pytest.mark.parametrize("wrong", ["fast", "--target=trn2", "--output x", "-", "--", "'", "--framework=XLA"])
def test_what_is_no_flag_or_not_the_users_to_say_is_refused(wrong):
    with pytest.raises(errors.UsageError) as caught:
        flags.parse(wrong)

    assert caught.value.hint


def test_the_compiler_gets_what_it_knows_and_the_user_wins():
    old = flags.command("", "trn1", "2.26.6360.0")

    assert old[:2] == ["--target", "trn1"]
    assert {"--auto-cast=none", "--model-type=transformer", "--optlevel=2", "--enable-saturate-infinity"} == set(
        old[2:]
    )
    assert "--enable-saturate-infinity" not in flags.command("", "trn2", "2.26.6360.0")
    newer = flags.command("--auto-cast all --logfile a.txt", "trn2", "2.27.5334.0")
    assert {"--native-int64=disabled", "--implicit-integer-downcast=all", "--auto-cast=all", "--logfile=a.txt"} <= set(
        newer
    )


# --- what is here -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("instance", "target", "cores"),
    [
        ("trn1.2xlarge", "trn1", 2),
        ("trn1n.32xlarge", "trn1", 2),
        ("inf2.xlarge", "trn1", 2),
        ("trn2.48xlarge", "trn2", 4),
    ],
)
def test_a_device_is_known_by_its_files(tmp_path, monkeypatch, instance, target, cores, plug_in):
    monkeypatch.setattr(device, "ROOT", tmp_path)
    assert device.find() is None
    plug_in(tmp_path, instance)

    found = device.find()
    assert (found.instance, found.target, found.cores, found.readable) == (instance, target, cores, True)
    assert device.has_driver()
    assert device.choose_target(None) == target


@pytest.mark.parametrize(("asked", "built"), [("trn1", "trn1"), ("inf2", "trn1"), ("trn1n", "trn1"), ("trn2", "trn2")])
def test_targets_have_one_name_each(tmp_path, monkeypatch, asked, built):
    monkeypatch.setattr(device, "ROOT", tmp_path)

    assert device.choose_target(asked) == built


@pytest.mark.parametrize("asked", ["inf1", "trn9", "trn1.2xlarge", None])
def test_a_target_that_is_unknown_or_not_said_without_a_device_is_refused(tmp_path, monkeypatch, asked):
    monkeypatch.setattr(device, "ROOT", tmp_path)

    with pytest.raises(errors.BackendUnavailable) as caught:
        device.choose_target(asked)
    assert "trn1" in caught.value.hint


def test_a_device_builds_for_itself_only(tmp_path, monkeypatch, plug_in):
    monkeypatch.setattr(device, "ROOT", tmp_path)
    plug_in(tmp_path, "inf2.xlarge")

    assert device.choose_target("trn1") == "trn1"
    with pytest.raises(errors.BackendUnavailable, match=r"inf2\.xlarge"):
        device.choose_target("trn2")


@pytest.mark.parametrize(
    ("installed", "said"),
    [
        ({"torch": "2.9.0"}, "is not installed"),
        ({"torch": "2.9.0", "torch-neuronx": "0.0.1"}, "a placeholder of the public index"),
        ({"torch": "2.14.0", "torch-neuronx": "2.14.0"}, "the native package, which has no trace"),
        ({"torch": "1.13.1", "torch-neuronx": "1.13.1.1.15.0"}, "older than this release supports"),
        ({"torch": "2.13.0+cpu", "torch-neuronx": "2.9.0.2.15.32035"}, "torch 2.13.0+cpu does not go with"),
    ],
)
def test_packages_that_cannot_work_are_refused_with_the_command_that_mends_it(monkeypatch, installed, said):
    monkeypatch.setattr(sdk, "installed", installed.get)

    with pytest.raises(errors.BackendUnavailable, match=re.escape(said)) as caught:
        sdk.require()
    assert caught.value.hint.startswith("pip install")
    assert sdk.INDEX in caught.value.hint


def test_the_pairing_of_installed_versions_is_found():
    assert sdk.pairing("2.9.0.2.15.32035", "2.26.6360.0").sdk == "2.31"
    assert sdk.pairing("2.9.0.2.15.32035+abc", "2.27.5334.0+def").sdk == "2.32"
    assert sdk.pairing("2.9.0.2.15.32035", "2.20.0.0").sdk == "2.33", "the newest that has this torch-neuronx"
    assert sdk.pairing("2.9.0.9.9.9", None) is None


@pytest.mark.parametrize(("variant", "said"), [("native", "has no trace"), ("placeholder", "WRONG PACKAGE")])
def test_the_wrong_package_under_the_right_name_is_found_out_at_import(variant, said):
    code = (
        "from nanogpt_buckets.backends.neuron.backend import library\n"
        "from nanogpt_buckets.errors import BackendUnavailable\n"
        "try:\n    library()\nexcept BackendUnavailable as error:\n    print(error.message, '|', error.hint)\n"
    )
    path = os.pathsep.join([str(DOUBLE / variant), str(Path(neuron.__file__).parents[3])])
    run = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )

    assert said in run.stdout, run.stderr
    assert "pip install" in run.stdout


def test_auto_means_the_device_that_is_here_and_never_the_cpu_in_its_place(tmp_path, monkeypatch, capsys, plug_in):
    monkeypatch.setattr(device, "ROOT", tmp_path)
    assert backend_for().name == "inductor"
    assert backend_for("auto", "inf2").name == "neuron"
    plug_in(tmp_path, "trn1.2xlarge")
    assert backend_for().name == "neuron"
    assert backend_for("auto", "x86-64-v3").name == "inductor"
    assert backend_for("inductor").name == "inductor"

    with pytest.raises(errors.BackendUnavailable, match="torch-neuronx, which is not installed"):
        Engine.load("demo")


# --- built without a device -------------------------------------------------------------------------------------------


def test_built_in_children_without_a_device_then_checked_and_run_on_one(host, tmp_path, caplog):
    """The whole way: cross-compiled for inf2, carried to a trn1, checked there once, and equal to the eager model."""
    built = build(PLAN, model="demo", backend="neuron", target="inf2")
    assert (built.compiled, built.failed, built.target) == (2, 0, "trn1"), built
    again = build(PLAN, model="demo", target="trn1")
    assert (again.hits, again.compiled) == (2, 0)

    entry = selection().own(Bucket(1, 16)).manifest
    assert entry.contains_weights
    assert entry.unchecked == "no device where it was built"
    assert entry.requires == {"neuron_core": "v2"}
    assert [contract.dtype for contract in entry.inputs] == ["int32", "int32"]
    assert entry.parts["compiler"] == {"neuronx-cc": "2.26.6360.0"}
    assert entry.parts["family"]["runtime"] == {"torch": "2.9.0", "torch-neuronx": "2.9.0.2.15.32035"}
    assert entry.parts["family"]["weights"] == selection().choice.model.weights("float32").digest
    best = selection().best(Bucket(1, 16))
    assert (best.status.value, best.why) == ("incompatible", "needs a NeuronCore-v2, this machine has no Neuron device")

    host("trn1.2xlarge")
    caplog.set_level(logging.WARNING)
    with Engine.load("demo") as engine, Engine.load("demo", backend="eager") as eager:
        assert engine.report().backend == "neuron"
        texts = [g.text for g in engine.generate(PROMPTS, max_new_tokens=10, seed=1)]
        assert texts == [g.text for g in eager.generate(PROMPTS, max_new_tokens=10, seed=1)]
        assert {model.core for model in double().loaded()} == {0}, "all buckets of a replica on one core"
        assert double().reserved() == [0], "and no core beyond it"
    assert sum("was built unchecked" in record.message for record in caplog.records) == 2

    caplog.clear()
    with Engine.load("demo"):
        pass
    assert not [record for record in caplog.records if "unchecked" in record.message], "once is enough"


def test_the_flags_of_an_entry_are_in_the_file_itself(host, tmp_path):
    build_here(tmp_path, Plan([Bucket(1, 8)]), target="trn1", compiler_args="-O1 --auto-cast matmult")
    found = selection(compiler_args=["--auto-cast=matmult", "--optlevel", "1"]).own(Bucket(1, 8)).manifest
    assert found is not None, "another spelling of the same flags hits"
    assert selection().own(Bucket(1, 8)).manifest is None, "no flags do not"

    import torch_neuronx

    (tmp_path / "module.pt").write_bytes(selection().store.read_blob(found.blobs[0]))
    header = torch_neuronx._double.artifact(tmp_path / "module.pt")
    assert header["arch"] == "v2"
    assert header["flags"]["--auto-cast"] == "matmult"
    assert header["flags"]["--optlevel"] == "1"


def test_a_hint_builds_the_family_that_is_missing(host):
    flagged = selection(target="inf2", compiler_args=["-O1", "--auto-cast matmult"])

    assert flagged.choice.build_command([Bucket(1, 8)]) == (
        "nanogpt-buckets build --model demo --seq 8 --target inf2 --compiler-args='-O1 --auto-cast matmult'"
    )
    assert selection().choice.build_command() == "nanogpt-buckets build --model demo --target trn1"


def test_bfloat16_is_another_family_and_passes_its_gate(host, tmp_path):
    host("trn1.2xlarge")
    built = build_here(tmp_path, Plan([Bucket(1, 16)]), dtype="bfloat16")

    assert (built.compiled, built.failed) == (1, 0), built
    entry = Selection(choose("demo", backend="neuron", dtype="bfloat16")).own(Bucket(1, 16))
    assert entry.manifest.unchecked is None
    assert entry.manifest.gate["relative_error_e9"] <= entry.manifest.gate["tolerance_e9"]


def test_precision_that_was_given_away_is_judged_by_bfloat16s_noise(host, tmp_path):
    host("trn1.2xlarge")
    one = Plan([Bucket(1, 16)])

    assert build_here(tmp_path, one, compiler_args="--auto-cast matmult").compiled == 1
    cast = selection(target=None, compiler_args="--auto-cast=matmult").own(Bucket(1, 16)).manifest
    assert build_here(tmp_path, one).compiled == 1
    plain = selection(target=None).own(Bucket(1, 16)).manifest
    assert plain.gate["tolerance_e9"] == 20_000
    assert plain.gate["tolerance_e9"] < cast.gate["relative_error_e9"] <= cast.gate["tolerance_e9"]
    with Engine.load("demo", compiler_args=["--auto-cast", "matmult"]) as engine:
        assert engine.logits(["ROMEO:"]).isfinite().all()


def test_an_index_out_of_range_never_reaches_the_device(host, tmp_path):
    host("trn1.2xlarge")
    build_here(tmp_path, Plan([Bucket(1, 16)]))
    with Engine.load("demo") as engine:
        step = engine._shelf.executable(Bucket(1, 16))
        with pytest.raises(errors.UsageError, match="token id 83"):
            step(torch.full((1, 16), 83, dtype=torch.int32), torch.zeros(1, dtype=torch.int32))


# --- faults -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["wrong-gelu", "drop-mask", "scale-logits", "row-mix"])
def test_a_wrong_result_is_caught_before_it_is_published_on_a_device(host, tmp_path, fault):
    host("trn1.2xlarge", NEURON_DOUBLE_FAULT=fault)

    built = build_here(tmp_path, Plan([Bucket(2, 16)]))

    assert built.failed == 1
    assert "eager model" in built.rows[0].why or "other logits" in built.rows[0].why
    assert manifests(target=None) == []


@pytest.mark.parametrize("fault", ["wrong-gelu", "drop-mask", "scale-logits", "row-mix"])
def test_a_wrong_result_is_caught_at_first_load_if_it_was_built_without_one(host, tmp_path, fault, monkeypatch):
    host(NEURON_DOUBLE_FAULT=fault)
    assert build_here(tmp_path, Plan([Bucket(2, 16)]), target="trn1").compiled == 1
    monkeypatch.delenv("NEURON_DOUBLE_FAULT")
    host("trn1.2xlarge")

    for _ in range(2):  # and again: a failed check is not remembered as passed
        with pytest.raises(GateFailed):
            Engine.load("demo")


@pytest.mark.parametrize("fault", ["split-miscompile", "int64-corruption", "nan-inf-mask"])
def test_faults_that_the_way_the_step_is_written_avoids(host, tmp_path, fault):
    host("trn1.2xlarge", NEURON_DOUBLE_FAULT=fault)

    assert build_here(tmp_path, Plan([Bucket(2, 16)]), compiler_args="-O1").compiled == 1


def test_a_passing_compiler_error_is_tried_once_more(host, tmp_path):
    host(NEURON_DOUBLE_FAULT="compile-70-once")

    assert build_here(tmp_path, Plan([Bucket(1, 8)]), target="trn1").compiled == 1
    assert len(double().compiles()) == 2


@pytest.mark.parametrize(
    ("fault", "said", "hint"),
    [
        ("compile-70", "ended twice with its error 70", "-v shows"),
        ("compile-oom", "killed, most likely for want of memory", "--jobs"),
        ("compile-abort", "ended with -6", "-v shows"),
    ],
)
def test_a_compiler_that_fails_is_one_sentence(host, tmp_path, fault, said, hint):
    host(NEURON_DOUBLE_FAULT=fault)

    built = build_here(tmp_path, Plan([Bucket(1, 8)]), target="trn1")

    assert built.failed == 1
    assert said in built.rows[0].why
    assert hint in built.rows[0].hint
    assert manifests() == []


def test_a_compiler_that_hangs_is_ended_with_all_it_started(host, tmp_path, monkeypatch):
    host(NEURON_DOUBLE_FAULT="compile-hang")
    monkeypatch.setattr(neuron_backend.NeuronBackend, "timeout_s", 8.0)

    built = build(Plan([Bucket(1, 8)]), model="demo", target="trn1")

    assert built.failed == 1
    assert built.rows[0].why == "the child was ended after 8 s without a result"
    running = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not [line for line in running if b"neuronx-cc" in line and b"/nanogpt-buckets-" in line]


def test_a_failed_compile_is_not_tried_again_by_a_run_but_by_a_build(host, tmp_path, monkeypatch):
    host("trn1.2xlarge", NEURON_DOUBLE_FAULT="compile-70")
    one = Plan([Bucket(1, 8)])
    failed = build(one, model="demo")
    assert failed.failed == 1
    attempts = len(failed_compiles(tmp_path))

    with Engine.load("demo", plan=one, on_miss="build", lazy=True) as engine:
        with pytest.raises(errors.CompileFailed, match="min ago on this machine") as caught:
            engine.generate("ROM", max_new_tokens=2)
        assert "nanogpt-buckets build" in caught.value.hint
        assert len(failed_compiles(tmp_path)) == attempts

        monkeypatch.delenv("NEURON_DOUBLE_FAULT")
        assert build_here(tmp_path, one).compiled == 1


def failed_compiles(tmp_path: Path) -> list[str]:
    log = tmp_path / "state" / "compiles.jsonl"
    return log.read_text().splitlines() if log.exists() else []


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        ({"NEURON_DOUBLE_FAULT": "load-corrupt"}, errors.IncompatibleEntry, "does not load the compiled module"),
        ({"NEURON_DOUBLE_RUNTIME_MAX_CC": "2.20.0.0"}, errors.IncompatibleEntry, "does not load the compiled module"),
        ({"NEURON_DOUBLE_CORE_BYTES": "1000"}, errors.IncompatibleEntry, "does not load the compiled module"),
        ({"NEURON_RT_VISIBLE_CORES": "7"}, errors.BackendUnavailable, "no NeuronCore is free"),
    ],
)
def test_a_module_that_does_not_load_is_a_typed_error(host, tmp_path, change, kind, said):
    build_here(tmp_path, Plan([Bucket(1, 16)]), target="trn1")
    host("trn1.2xlarge", **change)

    with pytest.raises(kind, match=said) as caught:
        Engine.load("demo")
    assert caught.value.hint


def test_code_for_other_cores_is_told_before_it_is_read(host, tmp_path):
    build_here(tmp_path, Plan([Bucket(1, 16)]), target="trn2")
    host("trn1.2xlarge")

    best = selection(target=None).best(Bucket(1, 16))
    assert (best.status.value, best.why) == ("incompatible", "needs a NeuronCore-v3, this machine has v2")


def test_a_core_that_another_process_holds_is_said_to_be_so(host, tmp_path):
    build_here(tmp_path, Plan([Bucket(1, 16)]), target="trn1")
    host("trn1.2xlarge", NEURON_RT_VISIBLE_CORES="0")
    code = (
        "import sys, torch, torch_neuronx, io\n"
        "torch.jit.load(sys.argv[1])\nprint('ready', flush=True)\nsys.stdin.read()\n"
    )
    entry = selection(target=None).own(Bucket(1, 16)).manifest
    (tmp_path / "module.pt").write_bytes(selection(target=None).store.read_blob(entry.blobs[0]))
    command = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "module.pt")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"ready\n"
        with pytest.raises(errors.BackendUnavailable, match="no NeuronCore is free") as caught:
            Engine.load("demo")
        assert "neuron-ls" in caught.value.hint

        failed = build_here(tmp_path, Plan([Bucket(1, 8)])).rows[0]
        assert failed.state == "failed", "tracing on a device needs a core too"
        assert "neuron-ls" in failed.hint
        holder.stdin.close()


def test_a_core_that_is_taken_between_compiling_and_checking_puts_the_check_off(host, tmp_path, monkeypatch):
    host("trn1.2xlarge")

    def taken(*arguments: Any) -> Any:
        raise errors.BackendUnavailable("no NeuronCore is free")

    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(neuron_backend, "_load", taken)
        assert build_here(tmp_path, Plan([Bucket(1, 8)])).compiled == 1
    assert selection(target=None).own(Bucket(1, 8)).manifest.unchecked == "no NeuronCore is free"
    with Engine.load("demo") as engine:
        assert engine.logits(["ROMEO:"]).shape == (1, 83)


def test_without_a_driver_that_is_what_is_said(host, tmp_path, monkeypatch):
    build_here(tmp_path, Plan([Bucket(1, 16)]), target="trn1")
    host("trn1.2xlarge", cores=0)
    (device.ROOT / "proc" / "devices").write_text("Character devices:\n  1 mem\n")

    with pytest.raises(errors.BackendUnavailable, match="driver is not loaded"):
        Engine.load("demo")


def test_a_device_that_may_not_be_opened_is_an_error_not_a_run_on_the_cpu(host, monkeypatch):
    host("trn1.2xlarge")
    monkeypatch.setattr(device.os, "access", lambda path, mode: False)

    with pytest.raises(errors.BackendUnavailable, match="cannot be opened") as caught:
        Engine.load("demo")
    assert "--device /dev/neuron0" in caught.value.hint


# --- cores and memory -------------------------------------------------------------------------------------------------


def test_replicas_each_hold_every_bucket_on_a_core_of_their_own_and_share_the_work(host, tmp_path):
    build_here(tmp_path, Plan([Bucket(1, 16)]), target="trn1")
    host("trn1.2xlarge", cores=4)

    with Engine.load("demo", cores=2) as engine, Engine.load("demo", backend="eager") as eager:
        texts = [g.text for g in engine.generate(["A", "B", "C", "D"], max_new_tokens=5, seed=3)]
        assert texts == [g.text for g in eager.generate(["A", "B", "C", "D"], max_new_tokens=5, seed=3)]
        assert sorted(model.core for model in double().loaded()) == [0, 1]
        assert double().reserved() == [0, 1], "two cores are asked for, the other two are left alone"
        assert set(double().executions()) == {0, 1}
        assert engine.report().steps == 20


def test_cores_that_the_user_chose_are_kept(host, tmp_path):
    build_here(tmp_path, Plan([Bucket(1, 16)]), target="trn1")
    host("trn1.2xlarge", NEURON_RT_VISIBLE_CORES="1")

    with Engine.load("demo"):
        assert double().reserved() == [1]


def test_a_ladder_that_does_not_fit_the_cores_memory_is_refused_with_the_one_that_does(host):
    ladder = Plan.grid(seq=[32, 64, 128, 256, 512, 1024])
    xl = choose("gpt2-xl", backend="neuron", target="trn1")

    with pytest.raises(errors.PlanError, match=r"6 buckets of gpt2-xl hold 37\.4 GB of weights") as caught:
        xl.check_memory(ladder)
    assert "15.9 GB" in str(caught.value)
    assert "build --model gpt2-xl --seq 512,1024 --target trn1" in caught.value.hint
    with pytest.raises(errors.PlanError):
        build(ladder, model="gpt2-xl", target="trn1")
    xl.check_memory(Plan.grid(seq=[512, 1024]))
    half = choose("gpt2-xl", backend="neuron", target="trn1", dtype="bfloat16")
    half.check_memory(Plan.grid(seq=[128, 256, 512, 1024]))
    assert choose("gpt2-xl", backend="inductor").fits(ladder)


def test_buckets_that_do_not_fit_together_are_not_loaded_and_a_plan_never_grows_beyond_what_fits(
    host, tmp_path, monkeypatch, caplog
):
    host("trn1.2xlarge")
    one = selection(target=None).choice.model.architecture.n_params * 4
    monkeypatch.setitem(device._CORE_BYTES, "trn1", 2 * one + device._CORE_RESERVED_BYTES)

    build_here(tmp_path, Plan.grid(seq=[8, 16]))
    assert build_here(tmp_path, Plan.grid(seq=[24, 32])).compiled == 2
    with Engine.load("demo") as engine:
        assert [bucket.seq_len for bucket in engine._shelf.load_all()] == [24, 32], "the plan is that of the last build"
    with pytest.raises(errors.PlanError, match="3 buckets of demo") as caught:
        Engine.load("demo", plan=Plan.grid(seq=[8, 16, 24]))
    assert "--seq 16,24" in caught.value.hint


def test_as_many_compilations_run_at_once_as_host_memory_allows(monkeypatch):
    from nanogpt_buckets.backends import host as machine

    monkeypatch.setattr(machine, "cpu_count", lambda: 64)
    monkeypatch.setattr(machine, "available_memory_bytes", lambda: 128_000_000_000)

    assert default_jobs(backend_for("neuron"), GPT2_SIZES["gpt2"], 100) == 6
    assert default_jobs(backend_for("neuron"), GPT2_SIZES["gpt2-xl"], 100) == 2


def test_a_child_takes_one_core_at_most_and_knows_its_target(host):
    request = BuildRequest("neuron", GPT2_SIZES["gpt2"], Bucket(1, 8), "float32", "trn2", {})
    here = backend_for("neuron")

    assert here.child_environment(request) == {
        "NEURON_PLATFORM_TARGET_OVERRIDE": "trn2", "NEURON_RT_NUM_CORES": "1"
    }  # fmt: skip
    host("trn2.48xlarge", NEURON_RT_VISIBLE_CORES="3")
    assert here.child_environment(request) == {}


# --- the command line -------------------------------------------------------------------------------------------------


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    run = [sys.executable, "-m", "nanogpt_buckets", *arguments]
    return subprocess.run(run, env=dict(os.environ), capture_output=True, text=True)


def test_the_commands_on_a_device(host):
    host("trn1.2xlarge")

    built = command("build", "--model=demo", "--seq=16", "--json")
    assert built.returncode == 0, built.stderr
    assert json.loads(built.stdout)["backend"] == "neuron"
    generated = command("generate", "ROMEO:", "--model=demo", "--max-new-tokens=5", "--seed=1", "--cores=2")
    assert generated.returncode == 0, generated.stderr
    assert generated.stdout.startswith("ROMEO:")
    assert "tokens/s on neuron" in generated.stderr
    (row,) = json.loads(command("cache", "ls", "--json").stdout)
    assert (row["contains_weights"], row["unchecked"], row["target"]) == (True, "", "trn1")
    doctor = json.loads(command("doctor", "--json").stdout)
    found = {f"{row['topic']} {row['name']}": row for row in doctor["findings"]}
    assert found["neuron device"]["value"] == "trn1.2xlarge, 1 chip, 2 cores with 15.9 GB for buckets each"
    assert "SDK 2.31" in found["neuron packages"]["value"]
    assert found["backend chosen"]["value"] == "neuron: there is a Neuron device"


@pytest.mark.parametrize(
    ("installed", "verdict", "said", "hint"),
    [
        ({}, "problem", "torch-neuronx, which is not installed", "pip install"),
        ({"torch-neuronx": "0.0.1"}, "problem", "a placeholder", "--force-reinstall"),
        ({"torch-neuronx": "2.9.0.2.15.32035", "neuronx-cc": "2.26.6360.0"}, "ok", "SDK 2.31, Python 3.11 to 3.13", ""),
        (
            {"torch-neuronx": "2.9.0.2.13.26312", "neuronx-cc": "2.20.1.0"},
            "warning",
            "SDK 2.29",
            "neuronx-cc==2.24.8799.0",
        ),
        ({"torch-neuronx": "2.9.0.9.9", "neuronx-cc": "9.9"}, "warning", "of no SDK known here", "pip install"),
    ],
)
def test_doctor_names_the_sdk_that_is_installed_or_the_command_that_mends_it(
    tmp_path, monkeypatch, plug_in, installed, verdict, said, hint
):
    from nanogpt_buckets import doctor

    monkeypatch.setattr(device, "ROOT", tmp_path)
    plug_in(tmp_path, "trn1.2xlarge")
    monkeypatch.setattr(sdk, "installed", ({"torch": "2.9.0"} | installed).get)
    monkeypatch.setenv("NEURON_CC_FLAGS", "-O1")

    found = {finding.name: finding for finding in doctor._neuron()}
    assert (found["packages"].verdict, said in found["packages"].value) == (verdict, True), found["packages"]
    assert hint in found["packages"].hint
    assert "--compiler-args" in found["NEURON_CC_FLAGS"].hint
    assert "driver" not in found
    (tmp_path / "proc" / "devices").write_text("")
    assert "aws-neuronx-dkms" in {finding.name: finding for finding in doctor._neuron()}["driver"].hint


def test_cache_ls_says_what_is_inside_and_what_was_not_checked(host, tmp_path, capsys):
    from nanogpt_buckets.cli import main

    build_here(tmp_path, Plan([Bucket(1, 16)]), target="trn1")
    with pytest.raises(SystemExit):
        main(["cache", "ls"])

    out = capsys.readouterr().out
    assert "weights inside; not checked on a device yet" in out


def test_a_saved_module_holds_no_path_of_the_building_machine(host, tmp_path):
    build_here(tmp_path, Plan([Bucket(1, 16)]), target="trn1")
    entry = selection().own(Bucket(1, 16)).manifest
    content = selection().store.read_blob(entry.blobs[0])

    assert str(tmp_path).encode() not in content
    assert str(tmp_path) not in json.dumps(entry.parts)


# --- scripts for those who have what we have not ----------------------------------------------------------------------

SCRIPTS = Path(__file__).parents[2] / "scripts"


def script(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    package = str(SCRIPTS.parent)
    variables = os.environ | {"PYTHONPATH": os.pathsep.join([os.environ.get("PYTHONPATH", ""), package])}
    run = [sys.executable, str(SCRIPTS / name), *arguments]
    return subprocess.run(run, env=variables, capture_output=True, text=True)


def test_check_neuron_compile_tells_sizes_seconds_and_flags(host):
    run = script("check-neuron-compile", "--seq", "8,16", "--compiler-args=-O1")

    assert run.returncode == 0, run.stderr
    document = json.loads(run.stdout)
    assert (document["proof"], document["target"], document["compiled"]) == ("N3", "trn1", 2)
    assert document["versions"]["torch-neuronx"].endswith("+double"), "the package itself was asked"
    assert "--optlevel=1" in document["flags"]
    assert all(row["bytes"]["module"] > 100_000 and row["compile_ms"] > 0 for row in document["buckets"])


def test_check_neuron_compile_says_what_failed(host):
    host(NEURON_DOUBLE_FAULT="compile-70")
    run = script("check-neuron-compile", "--seq", "8")

    assert run.returncode == 1
    (row,) = json.loads(run.stdout)["buckets"]
    assert row["state"] == "failed"
    assert "error 70" in row["why"]
    assert row["log"]


def test_check_on_device_gates_times_and_generates(host):
    host("inf2.xlarge")
    run = script("check-on-device", "--seq", "8,16", "--runs", "2")

    assert run.returncode == 0, run.stderr
    document = json.loads(run.stdout)
    assert (document["proof"], document["passed"], document["device"]["instance"]) == ("N4", 2, "inf2.xlarge")
    assert document["gate"]["1x16"]["bit_tests"]
    assert all(row["step_ms"]["median"] > 0 and row["max_difference"] < 1e-3 for row in document["buckets"])
    assert document["text"].startswith("ROMEO:")


def test_check_on_device_passes_nothing_that_the_gate_does_not(host):
    host("inf2.xlarge", NEURON_DOUBLE_FAULT="scale-logits")
    run = script("check-on-device", "--seq", "8", "--runs", "1")

    assert run.returncode == 1
    document = json.loads(run.stdout)
    assert (document["passed"], document["buckets"]) == (0, [])
    assert "eager model" in document["failed"][0]["why"]


@pytest.mark.parametrize("name", ["check-neuron-compile", "check-on-device"])
def test_without_what_they_need_the_scripts_say_so(name, monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    run = script(name)

    assert run.returncode == 1
    assert run.stdout == ""
    assert "Traceback" not in run.stderr
    assert "hint: " in run.stderr
