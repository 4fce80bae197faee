"""Which device is here, and what may be built for."""

from __future__ import annotations

import pytest

from nanogpt_buckets import Engine, errors
from nanogpt_buckets.backends import backend_for
from nanogpt_buckets.backends.neuron import device


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


def test_a_device_that_may_not_be_opened_is_an_error_not_a_run_on_the_cpu(host, monkeypatch):
    host("trn1.2xlarge")
    monkeypatch.setattr(device.os, "access", lambda path, mode: False)

    with pytest.raises(errors.BackendUnavailable, match="cannot be opened") as caught:
        Engine.load("demo")
    assert "--device /dev/neuron0" in caught.value.hint
