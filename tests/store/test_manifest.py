"""Manifests: what is written is read back, and nothing else is believed."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from nanogpt_buckets import key as keys
from nanogpt_buckets.errors import CorruptEntry, IncompatibleEntry
from nanogpt_buckets.store.document import MAX_BYTES, parse
from nanogpt_buckets.store.manifest import Blob, Contract, Manifest, _weights, decode, encode

# Bytes that a released version has written. They must be readable for as long as format 1 is.
GOLDEN = (
    b'{"body":{"blobs":[{"role":"code.so","sha256":"51f92d3ac859d2c5a45ad79886cfdeb647bdd00420acbc2408ffd6'
    b'c082c26e4b","size":11}],"contains_weights":false,"family":"779bca842033464ef0b6cb06a1205dc1707eb7795'
    b'1c0fd181f895232a05b0866","format":1,"gate":{"canary":"passed"},"inputs":[{"dtype":"int64","name":"to'
    b'kens","shape":[1,8]}],"key":"8cf672ecf5f3d99662e76e05604f5e13819bda22af1c48803657798acbbf4e60","outp'
    b'uts":[{"dtype":"float32","name":"logits","shape":[1,65]}],"parts":{"bucket":{"batch_size":1,"seq_len'
    b'":8},"compiler":{},"family":{"architecture":{"n_layer":2,"name":"t\xc3\xafny"},"backend":"inductor","dtype'
    b'":"float32"},"target":"x86-64-v3"},"requires":{"isa":["avx2"]},"stats":{"compile_ms":12},"weights":['
    b'{"dtype":"float32","name":"wte","shape":[65,16]},{"dtype":"float32","name":"scalar","shape":[]}]},"s'
    b'ha256":"108bba5a42c769fc4b6450b570b8dc53608a47aec71b517418a008e5eb0f185f"}\n'
)


def example() -> Manifest:
    family = {"backend": "inductor", "dtype": "float32", "architecture": {"n_layer": 2, "name": "tïny"}}
    parts = {"family": family, "bucket": {"batch_size": 1, "seq_len": 8}, "target": "x86-64-v3", "compiler": {}}
    content = b"native code"
    return Manifest(
        family=keys.digest(family),
        key=keys.digest(parts),
        parts=parts,
        blobs=(Blob("code.so", hashlib.sha256(content).hexdigest(), len(content)),),
        inputs=(Contract("tokens", "int64", (1, 8)),),
        outputs=(Contract("logits", "float32", (1, 65)),),
        weights=(Contract("wte", "float32", (65, 16)), Contract("scalar", "float32", ())),
        requires={"isa": ["avx2"]},
        contains_weights=False,
        stats={"compile_ms": 12},
        gate={"canary": "passed"},
    )


def sealed(body: dict, **envelope: object) -> bytes:
    """A document whose digest holds, whatever is in it."""
    digest = hashlib.sha256(keys.canonical_json(body)).hexdigest()
    return keys.canonical_json({"sha256": digest, "body": body, **envelope}) + b"\n"


def body_of(manifest: Manifest) -> dict:
    return json.loads(encode(manifest))["body"]


def test_round_trip():
    assert decode(encode(example())) == example()


def test_golden_bytes_are_still_written_and_read():
    assert encode(example()) == GOLDEN
    assert decode(GOLDEN) == example()


def test_every_flipped_byte_is_corrupt():
    data = encode(example())
    for position in range(len(data)):
        for mask in (0x01, 0x20, 0x80):
            flipped = bytearray(data)
            flipped[position] ^= mask
            with pytest.raises(CorruptEntry):
                decode(bytes(flipped))


def test_every_truncation_is_corrupt():
    data = encode(example())
    for length in range(len(data)):
        with pytest.raises(CorruptEntry):
            decode(data[:length])


@pytest.mark.parametrize("extra", [b"\n", b" ", b"\0", b"{}"])
def test_anything_after_the_end_is_corrupt(extra):
    with pytest.raises(CorruptEntry):
        decode(encode(example()) + extra)


def change(**fields: object) -> dict:
    return body_of(example()) | fields


BLOB = {"role": "code.so", "sha256": "0" * 64, "size": 1}
BAD_BODIES = {
    "bool as format": change(format=True),
    "format zero": change(format=0),
    "format in words": change(format="2"),
    "path as digest": change(blobs=[BLOB | {"sha256": "../../../../etc/passwd"}]),
    "absolute path as digest": change(blobs=[BLOB | {"sha256": "/" + "a" * 63}]),
    "digest in capitals": change(blobs=[BLOB | {"sha256": "A" * 64}]),
    "digest with a newline": change(blobs=[BLOB | {"sha256": "a" * 64 + "\n"}]),
    "digest in other digits": change(blobs=[BLOB | {"sha256": "٣" * 64}]),
    "path as role": change(blobs=[BLOB | {"role": "../code.so"}]),
    "hidden role": change(blobs=[BLOB | {"role": ".bashrc"}]),
    "empty role": change(blobs=[BLOB | {"role": ""}]),
    "role twice": change(blobs=[BLOB, BLOB]),
    "negative size": change(blobs=[BLOB | {"size": -1}]),
    "bool as size": change(blobs=[BLOB | {"size": True}]),
    "extra blob field": change(blobs=[BLOB | {"path": "/tmp/x"}]),
    "blobs is an object": change(blobs={}),
    "blob is a list": change(blobs=[[]]),
    "contract without dtype": change(inputs=[{"name": "x", "shape": []}]),
    "shape in words": change(inputs=[{"name": "x", "dtype": "int64", "shape": ["8"]}]),
    "null shape": change(outputs=[{"name": "x", "dtype": "int64", "shape": None}]),
    "contains_weights as int": change(contains_weights=0),
    "stats in words": change(stats={"compile_ms": "12"}),
    "requires is a list": change(requires=[]),
    "gate is null": change(gate=None),
    "key of other parts": change(key="0" * 64),
    "family of other parts": change(family="0" * 64),
    "parts edited": change(parts=example().parts | {"target": "x86-64-v4"}),
    "parts without family": change(parts={}),
    "escape sequence": change(gate={"why": "\x1b]0;x\x07"}),
    "escape sequence as a name": change(gate={"\x9b2J": [["x"]]}),
    "escape sequence in a list": change(gate={"why": [["\x1b[2J"]]}),
    "size beyond all numbers": change(blobs=[BLOB | {"size": 10**400}]),
    "shape beyond all numbers": change(inputs=[{"name": "x", "dtype": "int64", "shape": [10**30]}]),
    "nested requirements": change(requires={"os": {"a": 1}}),
    "deferred is no text": change(gate={"deferred": ["x"]}),
    "family is not an object": change(parts={"family": "x"}),
}


@pytest.mark.parametrize("body", BAD_BODIES.values(), ids=BAD_BODIES)
def test_malicious_bodies_with_a_right_digest_are_corrupt(body):
    with pytest.raises(CorruptEntry):
        decode(sealed(body))


@pytest.mark.parametrize("name", sorted(body_of(example())))
def test_every_missing_field_is_corrupt(name):
    body = body_of(example())
    del body[name]
    with pytest.raises(CorruptEntry):
        decode(sealed(body))


GOOD = encode(example())
BAD_BYTES = {
    "empty": b"",
    "not json": b"ELF",
    "null": b"null\n",
    "list": b"[]\n",
    "string": b'"x"\n',
    "bad utf-8": GOOD.replace("ï".encode(), b"\xff\xff"),
    "utf-16": GOOD.decode().encode("utf-16"),
    "byte order mark": b"\xef\xbb\xbf" + GOOD,
    "deep lists": b"[" * 200_000,
    "deep objects": b'{"a":' * 40_000,
    "deep after a string of brackets": b'{"a":"]]]]]]\\"]]]]","b":' + b"[" * 100_000,
    "nine levels": b'{"a":' * 9 + b"0" + b"}" * 9,
    "unending strings": b'{"' + b'\\"' * 120_000,
    "too long": b" " * (MAX_BYTES + 1),
    "much too long": GOOD[:-1] + b" " * MAX_BYTES,
    "name twice": GOOD.replace(b'{"body":', b'{"body":{},"body":', 1),
    "inner name twice": GOOD.replace(b'"format":1', b'"format":1,"format":1', 1),
    "float": GOOD.replace(b'"compile_ms":12', b'"compile_ms":12.0', 1),
    "exponent": GOOD.replace(b'"compile_ms":12', b'"compile_ms":12e0', 1),
    "NaN": GOOD.replace(b'"compile_ms":12', b'"compile_ms":NaN', 1),
    "infinity": GOOD.replace(b'"compile_ms":12', b'"compile_ms":-Infinity', 1),
    "huge number": b'{"sha256":' + b"9" * 10_000 + b"}",
    "half a surrogate pair": b'{"body":{"a":"\\ud800"},"sha256":"x"}\n',
    "spaces": json.dumps(json.loads(GOOD)).encode() + b"\n",
    "no newline": GOOD[:-1],
    "digest is a number": b'{"body":{},"sha256":1}\n',
}


@pytest.mark.parametrize("data", BAD_BYTES.values(), ids=BAD_BYTES)
def test_malicious_bytes_are_corrupt(data):
    with pytest.raises(CorruptEntry):
        decode(data)


def test_eight_levels_are_fine():
    manifest = replace(example(), gate={"a": {"b": {"c": {"d": {"e": []}}}}})
    assert decode(encode(manifest)) == manifest
    too_deep = replace(example(), gate={"a": {"b": {"c": {"d": {"e": [[]]}}}}})
    with pytest.raises(CorruptEntry, match="deeper"):
        decode(encode(too_deep))


@pytest.mark.parametrize(
    "body", [{"format": 2}, change(format=3, signature="x"), change(format=10**20), change(signature="x")]
)
def test_a_newer_format_is_incompatible_and_never_corrupt(body):
    with pytest.raises(IncompatibleEntry) as caught:
        decode(sealed(body))
    assert caught.value.hint
    with pytest.raises(IncompatibleEntry):
        decode(sealed(body, signatures=["x"]))


@pytest.mark.parametrize(
    "wrong",
    [
        {"target": 5}, {"target": None}, {"compiler": None}, {"compiler": []}, {"compiler": {"gxx": 13}},
        {"bucket": None}, {"bucket": []}, {"bucket": {}}, {"bucket": {"batch_size": 1}},
        {"bucket": {"batch_size": "1", "seq_len": 8}}, {"bucket": {"batch_size": 1, "seq_len": -8}},
        {"bucket": {"batch_size": 1, "seq_len": [8]}},
        {"bucket": {"batch_size": {}, "seq_len": 8}}, {"bucket": {"batch_size": 2**31, "seq_len": 2**31}},
        {"family": {"backend": []}}, {"family": {"backend": None}}, {"family": {"dtype": 1}},
        {"family": {"architecture": []}}, {"family": {"architecture": {"n_layer": {"a": 1}}}},
        {"family": {"runtime": []}}, {"family": {"runtime": {"torch": 2}}}, {"family": {"runtime": {"torch": None}}},
    ],
    ids=str,
)  # fmt: skip
def test_parts_of_another_kind_under_right_digests_are_corrupt(wrong):
    parts = example().parts | wrong
    manifest = replace(example(), parts=parts, family=keys.digest(parts["family"]), key=keys.digest(parts))
    with pytest.raises(CorruptEntry):
        decode(encode(manifest))


@pytest.mark.parametrize("bucket", [{"positions": 8}, {"batch_size": 1, "seq_len": 8, "step": "verify"}])
def test_a_bucket_of_a_kind_unknown_here_is_no_damage_and_no_bucket(bucket):
    parts = example().parts | {"bucket": bucket, "further": [{"a": [1]}]}
    manifest = replace(example(), parts=parts, key=keys.digest(parts))
    assert decode(encode(manifest)).bucket is None


def test_a_newer_format_with_a_wrong_digest_is_corrupt():
    with pytest.raises(CorruptEntry):
        decode(sealed({"format": 2, "a": 1}).replace(b'"a":1', b'"a":2'))


def test_floats_are_not_written():
    with pytest.raises(TypeError):
        encode(replace(example(), gate={"error": 0.5}))


@given(st.binary(max_size=200))
def test_noise_is_corrupt(data):
    with pytest.raises(CorruptEntry):
        decode(data)


def depth(value: object) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(depth, inner), default=0)


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('ab[{"\\é', max_size=4), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text("xy", max_size=3), plain, max_size=3))
def test_any_plain_json_survives(gate):
    assume(depth(gate) <= 6)
    manifest = replace(example(), gate=gate)
    assert decode(encode(manifest)) == manifest


def with_its_digest(data: bytes) -> bytes:
    """A file whose digest holds for its body, whatever the body is."""
    body, named, end = data[len(b'{"body":') :].rpartition(b',"sha256":"')
    return b'{"body":' + body + named + hashlib.sha256(body).hexdigest().encode() + end[64:]


PIECES = [b',"weights":', b'"weights":[]', b"[]", b"[", b"]", b"{", b"}", b",", b'"', b"\\", b" ", b"0", b"-1", b"1e3",
          b"true", b'{"dtype":"a","name":"b","shape":[2]}', b'},"sha256":"', b'"zebra":1', b'"format":2,']  # fmt: skip


@given(st.data())
def test_the_list_of_weights_is_read_apart_and_never_otherwise(data):
    changed, taken = bytearray(encode(example())), _weights.__wrapped__
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(changed)) | st.integers(len(changed) - 210, len(changed) - 70))
        piece = data.draw(st.sampled_from(PIECES))
        changed[at : at + data.draw(st.sampled_from([0, len(piece), 37]))] = piece
    document = with_its_digest(bytes(changed))

    def outcome() -> Manifest | type:
        try:
            return decode(document)
        except (CorruptEntry, IncompatibleEntry):
            return CorruptEntry

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("nanogpt_buckets.store.manifest._weights", lambda text: None)
        whole = outcome()
        patched.setattr("nanogpt_buckets.store.manifest._weights", taken)
        assert outcome() == whole


@pytest.mark.parametrize(
    "row",
    [
        b'{"dtype": "a","name":"b","shape":[2]}', b'{"name":"b","dtype":"a","shape":[2]}',
        b'{"dtype":"x","dtype":"a","name":"b","shape":[2]}', b'{"dtype":"a","name":"b","shape":[2.0]}',
        b'{"dtype":"a","name":"b","shape":[true]}', b'{"dtype":"a","name":"b","shape":[-1]}',
        b'{"dtype":"a","name":"b"}', b'{"dtype":"a","name":"\\u0061","shape":[2]}', b'"a"',
    ],
)  # fmt: skip
def test_a_list_of_weights_that_is_not_written_so_is_corrupt(row):
    right = b'{"dtype":"a","name":"b","shape":[2]}'
    good = encode(replace(example(), weights=(Contract("b", "a", (2,)),)))
    assert decode(good).weights == (Contract("b", "a", (2,)),)
    with pytest.raises(CorruptEntry):
        decode(with_its_digest(good.replace(right, row)))


def test_a_list_of_weights_is_read_once():
    _weights.cache_clear()
    for n in range(5):
        decode(encode(replace(example(), stats={"n": n})))
    assert _weights.cache_info().misses == 1


def test_parse_names_what_it_read():
    with pytest.raises(CorruptEntry, match="the plan is not plain JSON"):
        parse(b"{", "the plan")


def test_the_store_imports_no_torch():
    code = "import sys, nanogpt_buckets.store.store; sys.exit('torch' in sys.modules)"
    root = Path(keys.__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
