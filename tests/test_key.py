"""The key: same and different pairs for each part, a golden digest, and stability across everything irrelevant."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanogpt_buckets import child, key
from nanogpt_buckets.backends import BACKENDS, backend_for
from nanogpt_buckets.backends.base import BuildRequest
from nanogpt_buckets.backends.worker import source_of
from nanogpt_buckets.builder import compile_bucket
from nanogpt_buckets.errors import CompileFailed
from nanogpt_buckets.model.architecture import GPT2_SIZES, Architecture
from nanogpt_buckets.plan.bucket import STEPS, Bucket
from nanogpt_buckets.steps import step_named

PACKAGE = Path(key.__file__).parent

FAMILY = {
    "architecture": GPT2_SIZES["gpt2"].to_json(),
    "dtype": "float32",
    "backend": "inductor",
    "runtime": {"torch": "2.13.0+cpu"},
    "source": "0" * 64,
    "lowering": {"attention": "sdpa"},
    "flags": [],
    "weights": None,
}
ENTRY = {
    "bucket": {"step": "recompute", "batch_size": 1, "seq_len": 64},
    "step": "3" * 64,
    "target": "x86-64-v3",
    "compiler": {"torch": "2.13.0+cpu", "cxx": "g++ (Debian 12.2.0-14) 12.2.0"},
}

OTHER_FAMILY = {
    "architecture": GPT2_SIZES["gpt2-medium"].to_json(),
    "dtype": "bfloat16",
    "backend": "neuron",
    "runtime": {"torch": "2.13.1+cpu"},
    "source": "1" * 64,
    "lowering": {"attention": "explicit"},
    "flags": ["--optlevel=1"],
    "weights": "2" * 64,
}
OTHER_ENTRY = {
    "bucket": {"step": "recompute", "batch_size": 1, "seq_len": 65},
    "step": "4" * 64,
    "target": "x86-64-v4",
    "compiler": {"torch": "2.13.0+cpu", "cxx": "g++ (Debian 14.2.0-1) 14.2.0"},
}


def family(**changes: object) -> dict:
    return FAMILY | changes


def entry(**changes: object) -> dict:
    return {"family": family()} | ENTRY | changes


def test_golden_family_and_key():
    assert key.digest(family()) == "636e2ca752c664aadeb67978a70adac23db8efaa3febf651d1c143545b6a7624"
    assert key.digest(entry()) == "5255c346fbf38c9c6b870f5125e41379adc6c6d8c55d922d317d387565588902"


@pytest.mark.parametrize("part", FAMILY)
def test_each_family_part_moves_the_family_and_the_key(part):
    changed = family(**{part: OTHER_FAMILY[part]})

    assert key.digest(family()) != key.digest(changed)
    assert key.digest(entry()) != key.digest({"family": changed} | ENTRY)
    assert any(line.startswith(part) for line in key.difference(family(), changed))


@pytest.mark.parametrize("part", ENTRY)
def test_each_entry_part_moves_the_key_and_not_the_family(part):
    changed = entry(**{part: OTHER_ENTRY[part]})

    assert key.digest(entry()) != key.digest(changed)
    assert key.digest(changed["family"]) == key.digest(family())


@pytest.mark.parametrize("field", Architecture.__dataclass_fields__)
def test_every_architecture_field_is_in_the_key(field):
    arch = GPT2_SIZES["gpt2"].to_json()
    other = {"activation": "gelu", "layer_norm_epsilon": (1e-6).hex()}.get(field)
    changed = arch | {field: other or (not arch[field] if isinstance(arch[field], bool) else arch[field] + 1)}

    assert key.digest(family()) != key.digest(family(architecture=changed))


def test_order_of_insertion_does_not_matter():
    backwards = dict(reversed(list(FAMILY["architecture"].items())))

    assert key.digest(family()) == key.digest(family(architecture=backwards))


def test_difference_names_the_leaf_and_both_values():
    assert key.difference(entry(), entry(target="x86-64-v4")) == ["target: x86-64-v4, not x86-64-v3"]


@pytest.mark.parametrize("value", [1.0, {"a": 0.5}, {1: "a"}, b"x", {"a": object()}, float("nan")])
def test_what_has_no_canonical_form_is_refused(value):
    with pytest.raises(TypeError):
        key.canonical_json(value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc:,\"'{}", max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(JSON, JSON)
def test_distinct_values_have_distinct_encodings(a, b):
    def tagged(value):  # True == 1 in Python, not in JSON
        if isinstance(value, dict):
            return {name: tagged(item) for name, item in value.items()}
        return [tagged(item) for item in value] if isinstance(value, list) else (type(value).__name__, value)

    assert (key.canonical_json(a) == key.canonical_json(b)) == (tagged(a) == tagged(b))


SHOW = """
from nanogpt_buckets import key
from nanogpt_buckets.choice import choose
from nanogpt_buckets.plan.bucket import Bucket
choice = choose("gpt2")
print(choice.family, key.digest(choice.key_parts(Bucket(1, 64))))
"""


def show(tmp_path: Path, **environment: str) -> str:
    clean = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    source = str(Path(key.__file__).parents[1])
    run = subprocess.run(
        [sys.executable, "-c", SHOW],
        env=clean | {"PYTHONPATH": source} | environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    return run.stdout


def test_names_do_not_depend_on_process_home_directory_or_hash_seed(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    first = show(tmp_path, PYTHONHASHSEED="0", HOME="/root")

    assert first == show(elsewhere, PYTHONHASHSEED="12345", HOME=str(elsewhere), USER="someone", LANG="tr_TR.UTF-8")
    assert first == show(elsewhere, OMP_NUM_THREADS="1", TORCHINDUCTOR_FREEZING="1", NANOGPT_BUCKETS_CACHE_DIR="/x")


# --- what is hashed: all that shapes code, and only that --------------------------------------------------------------


def hashed(backend: str, steps: Sequence[str] = STEPS) -> set[str]:
    of_steps = (source for step in steps for source in step_named(step).sources)
    return {*key.GRAPH_SOURCES, *backend_for(backend).sources, *of_steps}


COPY = """
import json, sys
from nanogpt_buckets import key
from nanogpt_buckets.backends import BACKENDS, backend_for
from nanogpt_buckets.backends.worker import source_of
from nanogpt_buckets.plan.bucket import STEPS
digests = {name + step: source_of(backend_for(name), step) for name in BACKENDS for step in STEPS}
print(json.dumps(digests), key.__file__)
"""


def digests_in(copy: Path) -> dict[str, str]:
    environment = os.environ | {"PYTHONPATH": str(copy)}
    run = subprocess.run(
        [sys.executable, "-P", "-c", COPY], env=environment, capture_output=True, text=True, check=True
    )
    digests, _, place = run.stdout.strip().rpartition(" ")
    assert place.startswith(str(copy)), place
    return json.loads(digests)


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """A copy of the package that may be changed."""
    folder = tmp_path_factory.mktemp("copy")
    shutil.copytree(PACKAGE, folder / "nanogpt_buckets", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def changed(file: Path, copy: Path) -> dict[str, str]:
    """Return the digests with one byte of a file changed."""
    content = file.read_bytes()
    try:
        file.write_bytes(content + b"\n")
        return digests_in(copy)
    finally:
        file.write_bytes(content)


def test_one_byte_of_any_hashed_file_moves_the_digest_and_of_no_other(copy):
    before = digests_in(copy)
    every = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")}
    assert hashed("inductor") | hashed("neuron") <= every

    for name in sorted(hashed("inductor") | hashed("neuron")):
        after = changed(copy / "nanogpt_buckets" / name, copy)
        moved = {which for which in before if after[which] != before[which]}
        assert moved == {b + step for b in BACKENDS for step in STEPS if name in hashed(b, [step])}, name
    for name in ("errors.py", "backends/base.py", "backends/memfile.py", "steps/gate.py", "run/engine.py"):
        assert changed(copy / "nanogpt_buckets" / name, copy) == before, name


# Imported while compiling, and shaping no code: each has its reason.
SHAPES_NOTHING = {
    "__init__", "errors", "values", "versions", "mounts", "settings", "files", "owners", "child",  # not the graph
    "findings",  # what doctor says
    "key", "contract",  # names and checks
    "node/__init__", "node/crumbs", "node/failures", "node/prune", "node/records",  # where loading keeps a library
    "node/sources",
    "model/__init__", "model/architecture",  # sizes and switches, which are in the key as data
    "plan/__init__", "plan/bucket",  # the shape, which is in the key as data
    "steps/__init__", "steps/step",  # what is asked of a step
    "steps/gate", "steps/asked", "steps/slips",  # the check of what was compiled
    "backends/__init__", "backends/base", "backends/host", "backends/worker", "backends/memfile",
    "backends/inductor/__init__", "backends/inductor/backend",
    "backends/neuron/__init__", "backends/neuron/arguments", "backends/neuron/backend", "backends/neuron/device",
    "backends/neuron/flags", "backends/neuron/package", "backends/neuron/predict",  # asked whether a device is here
}  # fmt: skip

COMPILE = """
import sys, json
from nanogpt_buckets import child
from nanogpt_buckets.backends import worker
result = worker.handle(json.loads(sys.argv[1]), lambda *a, **k: None)
names = [m for m in sys.modules if m.partition(".")[0] == "nanogpt_buckets"]
print(json.dumps(names))
"""


def test_every_module_imported_while_compiling_is_hashed_or_named_here(tmp_path):
    arch = Architecture(1, 1, 16, 64, 8, 11)  # at 8 wide, Inductor gives NaN (torch 2.13): the gate refuses
    backend = backend_for("inductor")
    request = BuildRequest(
        "inductor", arch, Bucket(1, 4), "float32", backend.target(None), backend.lowering,
        source_of(backend, "recompute"), backend.versions(),
    )  # fmt: skip
    environment = child.clean_environment({"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")})
    run = subprocess.run(
        [sys.executable, "-c", COMPILE, json.dumps(request.to_json())],
        env=environment, cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    imported = set()
    for name in json.loads(run.stdout.splitlines()[-1]):
        parts = name.split(".")[1:]
        path = "/".join(parts)
        imported.add(f"{path}/__init__" if (PACKAGE / path).is_dir() and path else path or "__init__")

    sources = {name.removesuffix(".py") for name in hashed("inductor")}
    assert sources <= imported, "what is hashed is used"
    assert imported - sources <= SHAPES_NOTHING
    assert not sources & SHAPES_NOTHING


# --- a child compiles what its parent means ---------------------------------------------------------------------------


def test_a_child_imports_its_parents_copy_whatever_pythonpath_names(copy, tmp_path, monkeypatch):
    other = tmp_path / "other"
    shutil.copytree(copy, other)
    monkeypatch.setenv("PYTHONPATH", str(other))
    code = "import nanogpt_buckets, sys; print(nanogpt_buckets.__file__)"

    run = subprocess.run(
        [sys.executable, "-c", code], env=child.clean_environment(), cwd=tmp_path, capture_output=True, text=True
    )

    assert Path(run.stdout.strip()).parent == PACKAGE


def test_a_child_of_another_source_refuses(tmp_path, monkeypatch):
    backend = backend_for("inductor")
    request = BuildRequest(
        "inductor", GPT2_SIZES["gpt2"], Bucket(1, 4), "float32", backend.target(None), backend.lowering, "0" * 64, {}
    )

    with pytest.raises(CompileFailed, match="another copy of nanogpt_buckets"):
        compile_bucket(request.to_json())
