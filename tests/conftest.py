"""Shared fixtures: directories of the test's own, small models, and buckets compiled once for the whole run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import filelock
import pytest

from nanogpt_buckets.model.architecture import Architecture

# Odd on purpose: no size is a power of two, no two are equal.
ODD = Architecture(n_layer=2, n_head=3, n_embd=48, n_inner=192, block_size=100, vocab_size=211)


# Files whose tests take minutes: begun first, so that no process is left alone with one.
LONG = ("test_docs.py", "test_engine.py", "test_inductor_surroundings.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files that take longest first; the order is kept by --no-loadscope-reorder."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture(autouse=True)
def _own_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's cache."""
    for name in [name for name in os.environ if name.startswith("NANOGPT_BUCKETS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NANOGPT_BUCKETS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("NANOGPT_BUCKETS_LOCAL_DIR", str(tmp_path / "local"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Callable[[str, Callable[[Path], None]], Path]:
    """A function that has a directory of some name filled once, whichever of the processes that run tests is first."""
    base = tmp_path_factory.getbasetemp() if worker_id == "master" else tmp_path_factory.getbasetemp().parent

    def once(name: str, fill: Callable[[Path], None]) -> Path:
        directory = base / f"shared-{name}"
        with filelock.FileLock(base / f"shared-{name}.lock"):
            if not (base / f"shared-{name}.done").exists():
                directory.mkdir()
                fill(directory)
                (base / f"shared-{name}.done").touch()
        return directory

    return once


@pytest.fixture(scope="session")
def odd_folder(once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """A Hugging Face GPT-2 in odd shapes, saved by transformers; initialised so that it does not repeat one token."""

    def save(folder: Path) -> None:
        import torch
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(20)
        config = GPT2Config(
            n_layer=ODD.n_layer,
            n_head=ODD.n_head,
            n_embd=ODD.n_embd,
            n_positions=ODD.block_size,
            vocab_size=ODD.vocab_size,
            initializer_range=0.2,
            bos_token_id=0,
            eos_token_id=0,
        )
        GPT2LMHeadModel(config).eval().save_pretrained(folder / "odd")

    return once("models", save) / "odd"


@pytest.fixture(scope="session")
def odd_cache(odd_folder: Path, once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """A cache directory in which the odd model's buckets are compiled.

    1x16, 1x33, 1x100 and 3x33; prefill 1x100, decode 3x33 and decode 1x100; and score 3x33.
    """

    def fill(directory: Path) -> None:
        from nanogpt_buckets.builder import build
        from nanogpt_buckets.plan.bucket import Bucket

        plan = [Bucket(1, 16), Bucket(1, 33), Bucket(1, 100), Bucket(3, 33)]
        kv = [Bucket(1, 100, "prefill"), Bucket(3, 33, "decode"), Bucket(1, 100, "decode")]
        report = build([*plan, *kv, Bucket(3, 33, "score")], model=odd_folder, cache_dir=directory / "cache")
        assert (report.compiled, report.failed) == (8, 0), report
        # the default plan recomputes
        shutil.rmtree(directory / "cache" / "v1" / "plans")
        assert build(plan, model=odd_folder, cache_dir=directory / "cache").hits == 4

    return once("odd", fill) / "cache"


@pytest.fixture(scope="session")
def demo_cache(once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """The demo's buckets 1x16 and 1x32, compiled."""

    def fill(directory: Path) -> None:
        from nanogpt_buckets.builder import build
        from nanogpt_buckets.plan.bucket import Plan

        report = build(Plan.grid(seq=[16, 32]), model="demo", cache_dir=directory / "cache")
        assert report.compiled == 2, report

    return once("demo", fill) / "cache"


@pytest.fixture(scope="session")
def kv_cache(demo_cache: Path, once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """The same, and prefill and decode 1x32."""

    def fill(directory: Path) -> None:
        from nanogpt_buckets.builder import build
        from nanogpt_buckets.plan.bucket import Plan

        shutil.copytree(demo_cache, directory / "cache")
        report = build(Plan.grid(seq=[32], strategy="kv"), model="demo", cache_dir=directory / "cache")
        assert report.compiled == 2, report

    return once("demo-kv", fill) / "cache"


@pytest.fixture(scope="session")
def plug_in() -> Callable[..., None]:
    """A function that makes, under a directory that is taken for /, the files by which a Neuron device is known."""

    def plug_in(root: Path, instance: str, chips: int = 1) -> None:
        (root / "dev").mkdir(parents=True, exist_ok=True)
        for chip in range(chips):
            (root / "dev" / f"neuron{chip}").touch()
        (root / "proc").mkdir(exist_ok=True)
        (root / "proc" / "devices").write_text("Character devices:\n  1 mem\n235 neuron\n")
        names = root / "sys" / "devices" / "virtual" / "dmi" / "id"
        names.mkdir(parents=True, exist_ok=True)
        (names / "product_name").write_text(f"{instance}\n")

    return plug_in
