"""Prepared weights are verified and healed, and follow their source."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanogpt_buckets import node
from nanogpt_buckets.errors import ModelError
from nanogpt_buckets.files import remove
from nanogpt_buckets.model import prepared
from nanogpt_buckets.model.checkpoint import open_model
from nanogpt_buckets.node import prune


@pytest.fixture
def folder(tmp_path, odd_folder):
    return Path(shutil.copytree(odd_folder, tmp_path / "odd"))


def flip(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-100, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-100, os.SEEK_END)
        file.write(bytes([byte ^ 1]))


def retype(path: Path) -> None:
    save_file({name: tensor.half() for name, tensor in load_file(path).items()}, path)


def lose(path: Path) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    del tensors["transformer.wpe.weight"]
    save_file(tensors, path)


def give_away(path: Path) -> None:
    os.chown(path, 4321, -1)


def make_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGE = [flip, retype, lose, give_away, make_directory]


@pytest.mark.parametrize("keep_times", [False, True])
@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_damage_is_found_said_and_healed(folder, damage, keep_times, caplog):
    weights = open_model(folder).weights("float32")
    path, digest, content = weights.path, weights.digest, weights.path.read_bytes()
    del weights
    before = path.stat()
    damage(path)
    if keep_times:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    with caplog.at_level(logging.WARNING):
        again = open_model(folder).weights("float32")

    assert again.digest == digest
    assert path.read_bytes() == content
    assert "are damaged" in caplog.text


def test_a_file_is_read_whole_once_and_again_when_it_is_another(folder, monkeypatch):
    path = open_model(folder).weights("float32").path
    read = []
    whole = prepared.digest_of
    monkeypatch.setattr(prepared, "digest_of", lambda *a: read.append(1) or whole(*a))

    open_model(folder).weights("float32")
    assert read == []
    os.utime(path)
    open_model(folder).weights("float32")
    open_model(folder).weights("float32")
    assert read == [1]


def test_weights_that_another_process_prepares_meanwhile_are_no_damage(folder, monkeypatch, caplog):
    """Several processes of a cold node prepare the same weights, and each puts its file in the others' place."""
    digest = prepared.digest_of

    def replaced(arch, dtype, read, write=lambda data: None):
        path = next(iter(node.listed("weights", "*.safetensors")), None)
        if path is not None:
            shutil.copy(path, twin := path.with_name("twin"))
            os.replace(twin, path)
        return digest(arch, dtype, read, write)

    monkeypatch.setattr(prepared, "digest_of", replaced)
    weights = open_model(folder).weights("float32")
    assert digest(open_model(folder).architecture, "float32", weights.tensors.__getitem__) == weights.digest
    assert not caplog.records
    assert open_model(folder).weights("float32").digest == weights.digest


def test_damaged_weights_whose_source_is_gone_are_an_error_that_says_so(folder):
    model = open_model(folder)
    flip(model.weights("float32").path)
    shutil.rmtree(folder)

    with pytest.raises(ModelError, match="is gone"):
        model.weights("float32")


def test_a_source_of_the_same_size_and_time_is_not_taken_for_the_one_before(folder):
    first = open_model(folder).weights("float32").digest
    file = folder / "model.safetensors"
    before = file.stat()
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    tensors["transformer.wpe.weight"].add_(1)
    save_file(tensors, file, metadata={"format": "pt"})
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)

    assert open_model(folder).weights("float32").digest != first


def test_weights_that_were_replaced_are_deleted_and_those_mapped_go_on(folder):
    file = folder / "model.safetensors"
    kept = []
    for step in range(4):
        tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
        tensors["transformer.wpe.weight"].add_(step)
        save_file(tensors, file, metadata={"format": "pt"})
        kept.append(open_model(folder).weights("float32"))

    assert {path.stem for path in (node.directory() / "weights").iterdir()} == {kept[-1].digest}
    assert torch.isfinite(kept[0].tensors["transformer.wpe.weight"]).all()
    shutil.rmtree(folder)
    del kept
    for row in prune.plan():
        remove(row.path)
    assert [path for path in node.directory().rglob("*") if path.is_file()] == []


def test_records_carry_their_format(folder):
    open_model(folder).weights("float32")

    found = [json.loads(path.read_text())["format"] for path in sorted(node.directory().rglob("*.json"))]
    assert found == [2, 1]  # sources, verified
