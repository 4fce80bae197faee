"""The key: same and different pairs for each part, a golden digest, and stability across everything irrelevant."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanogpt_buckets import key
from nanogpt_buckets.backends.inductor import InductorBackend
from nanogpt_buckets.model.architecture import GPT2_SIZES, Architecture

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
    "target": "x86-64-v4",
    "compiler": {"torch": "2.13.0+cpu", "cxx": "g++ (Debian 14.2.0-1) 14.2.0"},
}


def family(**changes: object) -> dict:
    return key.family_parts(**(FAMILY | changes))


def entry(**changes: object) -> dict:
    return key.key_parts(family(), **(ENTRY | changes))


def test_golden_family_and_key():
    assert key.digest(family()) == "636e2ca752c664aadeb67978a70adac23db8efaa3febf651d1c143545b6a7624"
    assert key.digest(entry()) == "60941980e78f0c1da0c524376037461a29de7d8bd9bb76edc761a3a1f28546f8"


@pytest.mark.parametrize("part", FAMILY)
def test_each_family_part_moves_the_family_and_the_key(part):
    changed = family(**{part: OTHER_FAMILY[part]})

    assert key.digest(family()) != key.digest(changed)
    assert key.digest(entry()) != key.digest(key.key_parts(changed, **ENTRY))
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
from nanogpt_buckets.backends.inductor import InductorBackend
from nanogpt_buckets.model.architecture import GPT2_SIZES
b = InductorBackend()
parts = key.family_parts(architecture=GPT2_SIZES["gpt2"].to_json(), dtype="float32", backend=b.name,
    runtime=b.runtime(), source=key.source_digest(*b.sources), lowering=b.lowering(), flags=[], weights=None)
print(key.digest(parts), key.digest(key.key_parts(parts, bucket={"batch_size": 1, "seq_len": 64, "step": "recompute"},
    target=b.target(None), compiler=b.compiler())))
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


def test_the_source_digest_covers_graph_and_backend():
    plain, inductor = key.source_digest(), key.source_digest(*InductorBackend().sources)

    assert plain != inductor
    assert len(plain) == 64
