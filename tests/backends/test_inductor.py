"""What compiled code takes on trust is checked before it reaches it, and what it needs is said truly."""

from __future__ import annotations

import dataclasses
import fcntl
import subprocess
import sys

import pytest
import torch

from nanogpt_buckets import Bucket, build, key
from nanogpt_buckets.backends import backend_for, host
from nanogpt_buckets.backends.inductor.backend import InductorBackend
from nanogpt_buckets.backends.memfile import library_path
from nanogpt_buckets.choice import choose
from nanogpt_buckets.errors import (
    BackendUnavailable,
    ChildFailed,
    CorruptEntry,
    GateFailed,
    IncompatibleEntry,
    UsageError,
)
from nanogpt_buckets.model.architecture import Architecture
from nanogpt_buckets.run.loader import artifact_of
from nanogpt_buckets.selection import Selection
from nanogpt_buckets.steps import gate, step_named

ODD = Architecture(n_layer=2, n_head=3, n_embd=48, n_inner=192, block_size=100, vocab_size=211)


@pytest.fixture(scope="module")
def selection(odd_folder, odd_cache):
    return Selection(choose(odd_folder, cache_dir=odd_cache))


@pytest.fixture(scope="module")
def artifact(selection):
    return artifact_of(selection.best(Bucket(3, 33)))


@pytest.fixture
def weights(selection):
    return dict(selection.choice.model.weights("float32").tensors)


def loaded(artifact, weights):
    """Load a bucket 3x33 and return what gives its logits."""
    executable = InductorBackend().load(
        artifact, step_named("recompute").interface(ODD, Bucket(3, 33), "float32"), weights
    )
    return lambda *tensors: executable(*tensors)[0]


IDS, LAST = torch.zeros(3, 33, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)


def test_no_weights_are_inside_and_the_gate_is_on_record(selection, artifact):
    manifest = selection.best(Bucket(3, 33)).manifest
    assert manifest.contains_weights is False
    assert manifest.gate["lengths"] == [1, 16, 17, 32, 33]
    assert 0 <= manifest.gate["relative_error_e9"] <= manifest.gate["tolerance_e9"] == 20_000
    assert manifest.stats["compile_ms"] > 0
    assert len(artifact.blobs["library"]) < 600_000


def test_code_is_generated_for_the_named_level_and_nothing_beyond(artifact):
    level = InductorBackend().target(None)

    if level == host.native():
        assert set(artifact.requires["cpu_flags"]) == host.code_flags()
    else:
        assert set(artifact.requires["cpu_flags"]) == host.LEVELS[level]
    assert artifact.requires["glibc"] <= host.own_versions()["glibc"]


def test_threads_are_not_compiled_out(artifact):
    assert b"GOMP_parallel" in artifact.blobs["library"]


@pytest.mark.parametrize("spoil", ["missing", "extra", "dtype", "shape", "transposed"])
def test_weights_that_differ_from_the_contract_are_refused(artifact, weights, spoil):
    name = "transformer.h.0.attn.c_proj.weight"
    if spoil == "missing":
        del weights[name]
    elif spoil == "extra":
        weights["lm_head.weight"] = weights["transformer.wte.weight"]
    else:
        weights[name] = {
            "dtype": weights[name].double(),
            "shape": weights[name][:, :-1].contiguous(),
            "transposed": weights[name].t(),
        }[spoil]

    with pytest.raises(CorruptEntry, match=r"the weights do not fit"):
        loaded(artifact, weights)


WRONG_INPUTS = [
    (IDS.long(), LAST, "int64"),
    (IDS[:, :20], LAST, "shape"),
    (IDS[:2], LAST[:2], "shape"),
    (torch.zeros(33, 3, dtype=torch.int32).t(), LAST, "not contiguous"),
    (IDS + 211, LAST, "input_ids 211"),
    (IDS - 1, LAST, "input_ids -1"),
    (IDS, LAST + 33, "last_index 33"),
    (IDS, LAST - 1, "last_index -1"),
]


@pytest.mark.parametrize(("ids", "last", "said"), WRONG_INPUTS, ids=range(len(WRONG_INPUTS)))
def test_inputs_the_code_would_misread_are_refused(artifact, weights, ids, last, said):
    step = loaded(artifact, weights)

    with pytest.raises(UsageError, match=said):
        step(ids, last)


def test_one_library_serves_two_sets_of_weights_at_once(selection, artifact, weights):
    other = {name: tensor * 1.25 for name, tensor in weights.items()}
    first, second = (loaded(artifact, w) for w in (weights, other))

    for step, own in ((first, weights), (second, other), (first, weights)):
        expected = step_named("recompute").eager(ODD, Bucket(3, 33), own)(IDS, LAST)[0]
        assert (step(IDS, LAST) - expected).abs().max() <= gate.FLOAT32_TOLERANCE * expected.abs().max()


def test_what_runs_is_a_sealed_copy_of_what_was_hashed(artifact):
    path = library_path(artifact.blobs["library"])

    with open(path, "rb") as file:
        assert file.read() == artifact.blobs["library"]
        assert fcntl.fcntl(file, fcntl.F_GET_SEALS) & fcntl.F_SEAL_WRITE
    assert library_path(bytes(artifact.blobs["library"])) == path
    assert library_path(b"another") != path


def test_bytes_that_are_no_library_are_incompatible_and_not_a_crash(artifact, weights):
    broken = dataclasses.replace(artifact, blobs={"library": b"\x7fELF and no more"})

    with pytest.raises(IncompatibleEntry, match="cannot be loaded here"):
        loaded(broken, weights)


def test_the_canary_catches_weights_that_do_not_belong(selection, artifact, weights):
    step = loaded(artifact, weights)
    other = weights | {"transformer.ln_f.bias": weights["transformer.ln_f.bias"] + 0.1}

    gate.canary(lambda *tensors: (step(*tensors),), selection.choice.model.architecture, Bucket(3, 33), weights)
    with pytest.raises(GateFailed):
        gate.canary(lambda *tensors: (step(*tensors),), selection.choice.model.architecture, Bucket(3, 33), other)


def test_a_bfloat16_bucket_passes_its_gate(odd_folder, tmp_path):
    from nanogpt_buckets import Engine

    report = build([Bucket(1, 16)], model=odd_folder, dtype="bfloat16")
    assert report.compiled == 1, report

    with Engine.load(odd_folder, dtype="bfloat16") as engine, Engine.load(odd_folder, backend="eager") as exact:
        found, expected = engine.logits([[1, 2, 3]]), exact.logits([[1, 2, 3]])
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()


# --- targets and requirements ---------------------------------------------------------------------------------------


def test_flags_of_a_compile_line():
    line = "g++ -march=x86-64-v3 -mfma -mavx512vnni -mavx512bf16 -o x"

    assert set(host.flags_of_compile_line(line)) == host.LEVELS["x86-64-v3"] | {"avx512_vnni", "avx512_bf16"}
    assert set(host.flags_of_compile_line("g++ -march=native -O3")) == host.code_flags()


def test_symbol_versions_are_the_highest_named():
    library = b"\0GLIBC_2.9\0GLIBC_2.34\0GLIBCXX_3.4.9\0GLIBCXX_3.4.30\0"

    assert host.symbol_versions(library) == {"glibc": "2.34", "glibcxx": "3.4.30"}


@pytest.mark.parametrize(
    ("requires", "why"),
    [
        ({"os": "Plan9"}, "made for Plan9"),
        ({"machine": "vax"}, "made for vax"),
        ({"cpu_flags": ["no_such_flag"]}, "lacks no_such_flag"),
        ({"glibc": "99.0"}, "needs GLIBC 99.0"),
        ({"glibcxx": "99.0"}, "needs GLIBCXX 99.0"),
        ({"neuron_cores": 2}, "unknown here: neuron_cores"),
    ],
)
def test_what_this_host_lacks_is_said_in_words(requires, why):
    assert why in host.unmet(requires)


def test_a_host_that_has_more_than_is_asked_will_do():
    assert host.unmet({"cpu_flags": sorted(host.cpu_flags())[:3], "glibc": "2.4", "glibcxx": "3.4.9"}) is None
    assert host.unmet({}) is None


def test_a_lesser_host_chooses_a_lower_level(monkeypatch):
    monkeypatch.setattr(host, "cpu_flags", lambda: host.LEVELS["x86-64-v3"])

    assert host.choose_level(None) == "x86-64-v3"
    with pytest.raises(BackendUnavailable, match="cannot run x86-64-v4"):
        host.choose_level("x86-64-v4")
    monkeypatch.setattr(host, "cpu_flags", frozenset)
    assert host.choose_level(None) == host.native()


def test_old_torch_builds_native_only(monkeypatch):
    monkeypatch.setattr("nanogpt_buckets.backends.inductor.backend.version", lambda name: "2.9.1")
    backend = InductorBackend()

    assert backend.target(None) == backend.target("native") == host.native()
    with pytest.raises(BackendUnavailable, match=r"torch 2\.9\.1 cannot be told an instruction-set level"):
        backend.target("x86-64-v2")


def test_native_names_what_this_cpu_can_run_and_nothing_else_does(monkeypatch):
    here, flags = host.native(), host.cpu_flags()
    needed = host.flags_of_compile_line("g++ -march=native")

    monkeypatch.setattr(host, "cpu_flags", lambda: flags - {"smep"} | {"hypervisor", "ibrs_enhanced"})
    assert host.native() == here, "what generated code cannot use is not in the name"
    monkeypatch.setattr(host, "cpu_flags", lambda: flags | {"smep", "smap"})
    assert host.native() == here
    assert host.flags_of_compile_line("g++ -march=native") == needed
    monkeypatch.setattr(host, "cpu_flags", lambda: flags - {"avx2", "sse4_2", "asimd"})
    assert host.native() != here
    assert host.unmet({"cpu_flags": needed}) is not None
    with pytest.raises(BackendUnavailable, match="cannot run native-"):
        host.choose_level(here)


@pytest.mark.parametrize("target", ["trn1", "inf2", "trn2.48xlarge"])
def test_neuron_targets_are_never_a_silent_cpu_build(target):
    with pytest.raises(BackendUnavailable, match="torch-neuronx, which is not installed"):
        backend_for("auto", target).target(target)


def test_a_crash_in_the_child_takes_nothing_along(tmp_path):
    from nanogpt_buckets import child

    module = tmp_path / "crashing.py"
    module.write_text("import os, sys\nsys.stderr.write('last words')\nos.abort()\n")
    with pytest.raises(ChildFailed, match="SIGABRT") as caught:
        child.run("crashing", {}, workdir=tmp_path, environment={"PYTHONPATH": str(tmp_path)})

    assert "last words" in caught.value.log


def test_loading_needs_neither_inductor_nor_transformers_nor_a_compiler(odd_folder, odd_cache, tmp_path):
    code = (
        "import sys, shutil\nsys.modules['transformers'] = None\n"
        "from nanogpt_buckets import Engine\n"
        f"e = Engine.load({str(odd_folder)!r}, cache_dir={str(odd_cache)!r})\n"
        "assert e.generate([[1]], max_new_tokens=3, temperature=0)[0].new_tokens == 3\n"
        "assert shutil.which('g++') is None and 'torch._inductor.codecache' not in sys.modules\n"
    )
    empty = tmp_path / "bin"
    empty.mkdir()
    import os

    environment = os.environ | {"PATH": str(empty)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)

    assert run.returncode == 0, run.stderr


def test_kernels_that_are_timed_first_are_kept_in_the_manifest_and_change_no_key(odd_folder, tmp_path):
    one = Bucket(2, 8, "decode")
    plain = choose(odd_folder, cache_dir=tmp_path)
    report = build([one], model=odd_folder, cache_dir=tmp_path, tune="fast")
    assert report.compiled == 1, report

    manifest = Selection(plain).best(one).manifest
    times = {name: value for name, value in manifest.stats.items() if name.endswith("_us")}
    assert {name.removeprefix("chosen_") for name in times} == {
        "rows_2_aten_us", "rows_2_onednn_us", "rows_2_rows_us"
    }  # fmt: skip
    (chosen,) = [name for name in times if name.startswith("chosen_")]
    assert times[chosen] == min(times.values()) or times[chosen] * 0.9 <= min(times.values())
    assert manifest.key == key.digest(plain.key_parts(one))
    assert build([one], model=odd_folder, cache_dir=tmp_path).hits == 1


def test_a_way_of_tuning_nobody_knows_is_refused(odd_folder):
    with pytest.raises(UsageError, match="tune 'slow' is unknown"):
        build([Bucket(1, 8)], model=odd_folder, tune="slow")
