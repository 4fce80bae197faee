"""Which packages are here, and the command that mends them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nanogpt_buckets import errors
from nanogpt_buckets.backends import neuron
from nanogpt_buckets.backends.neuron import backend, device, package

DOUBLE = Path(__file__).parents[2] / "neuron_double"


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
    monkeypatch.setattr(package, "installed", installed.get)

    with pytest.raises(errors.BackendUnavailable, match=re.escape(said)) as caught:
        package.require()
    assert caught.value.hint.startswith("pip install")
    assert package.INDEX in caught.value.hint


@pytest.mark.parametrize("version", ["2.9.0.2.11.19912", "2.7.0.2.8.6734", "2.5.1.2.6.0"])
def test_remembering_needs_a_package_with_tensors_on_cores(monkeypatch, version):
    torch = ".".join(version.split(".")[:3])
    monkeypatch.setattr(package, "installed", {"torch": torch, "torch-neuronx": version}.get)
    monkeypatch.setattr(backend, "installed", package.installed)

    assert backend.NeuronBackend().runtime()["torch-neuronx"] == version
    for needs in (backend.NeuronBackend(inlines_weights=False).runtime, lambda: package.require(tensors=True)):
        with pytest.raises(errors.BackendUnavailable, match="has no tensors on the device, which --strategy kv needs"):
            needs()


@pytest.mark.parametrize("version", ["2.9.0.2.12.22436", "2.7.0.2.12.22436", "2.9.0.2.15.32035+abc"])
def test_a_package_with_tensors_on_cores_will_do(monkeypatch, version):
    torch = ".".join(version.split(".")[:3])
    monkeypatch.setattr(package, "installed", {"torch": torch, "torch-neuronx": version}.get)

    assert package.require(tensors=True) == version


def test_the_pairing_of_installed_versions_is_found():
    assert package.pairing("2.9.0.2.15.32035", "2.26.6360.0").sdk == "2.31"
    assert package.pairing("2.9.0.2.15.32035+abc", "2.27.5334.0+def").sdk == "2.32"
    assert package.pairing("2.9.0.2.15.32035", "2.20.0.0").sdk == "2.33", "the newest that has this torch-neuronx"
    assert package.pairing("2.9.0.9.9.9", None) is None


@pytest.mark.parametrize(("variant", "said"), [("native", "has no trace"), ("placeholder", "WRONG PACKAGE")])
def test_the_wrong_package_under_the_right_name_is_found_out_at_import(variant, said):
    code = (
        "from nanogpt_buckets.backends.neuron.package import package\n"
        "from nanogpt_buckets.errors import BackendUnavailable\n"
        "try:\n    package()\nexcept BackendUnavailable as error:\n    print(error.message, '|', error.hint)\n"
    )
    path = os.pathsep.join([str(DOUBLE / variant), str(Path(neuron.__file__).parents[3])])
    run = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )

    assert said in run.stdout, run.stderr
    assert "pip install" in run.stdout


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
    monkeypatch.setattr(device, "ROOT", tmp_path)
    plug_in(tmp_path, "trn1.2xlarge")
    for module in (package, backend):
        monkeypatch.setattr(module, "installed", ({"torch": "2.9.0"} | installed).get)
    monkeypatch.setenv("NEURON_CC_FLAGS", "-O1")

    found = {finding.name: finding for finding in backend.NeuronBackend().findings()}
    assert (found["packages"].verdict, said in found["packages"].value) == (verdict, True), found["packages"]
    assert hint in found["packages"].hint
    assert "--compiler-args" in found["NEURON_CC_FLAGS"].hint
    assert "driver" not in found
    (tmp_path / "proc" / "devices").write_text("")
    found = {finding.name: finding for finding in backend.NeuronBackend().findings()}
    assert "aws-neuronx-dkms" in found["driver"].hint
