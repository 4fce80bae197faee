"""A backend of thirty lines: its "code" is a word, its executables are the steps uncompiled."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import ClassVar

from nanogpt_buckets import key
from nanogpt_buckets.backends.base import Artifact, Backend, Opened
from nanogpt_buckets.choice import Choice
from nanogpt_buckets.contract import Contract, dtype_name
from nanogpt_buckets.errors import IncompatibleEntry, TransientError
from nanogpt_buckets.model.checkpoint import open_model
from nanogpt_buckets.plan.bucket import Bucket
from nanogpt_buckets.steps import step_named
from nanogpt_buckets.store.manifest import Blob, Manifest
from nanogpt_buckets.store.store import Store


class Fake(Backend):
    name = "fake"
    steps = ("recompute", "prefill", "decode", "score")
    sources = ()
    lowering: ClassVar = {}

    def __init__(self, arch, compiler="1.0"):
        self._arch, self._compiler = arch, compiler
        self.opened, self.closed, self.full = [], [], False

    def runtime(self):
        return {"fake": "1"}

    def target(self, requested):
        return requested or "best"

    def compiler(self):
        return self._compiler and {"fakec": self._compiler}

    def compile(self, request, workdir):
        raise AssertionError("entries are published directly")

    def unmet(self, requires):
        return requires.get("lacks")

    def rank(self, target):
        return ["best", "good", "any"].index(target)

    def open(self, artifact, weights):
        word, (batch_size, seq_len) = artifact.blobs["code"].decode(), artifact.inputs[0].shape
        if self.full:
            raise TransientError("the device is full")
        if word == "refuses":
            raise IncompatibleEntry("cannot be opened")
        self.opened.append(word)
        step = step_named("recompute").eager(self._arch, Bucket(batch_size, seq_len), weights)
        wrong: Callable = lambda *tensors: (step(*tensors)[0] + 1,)  # noqa: E731
        return Opened(wrong if word == "wrong" else step, lambda: self.closed.append(word))


def choice_of(model, root, *, compiler="1.0", target=None, dtype="float32") -> Choice:
    opened = open_model(model)
    return Choice(opened, Fake(opened.architecture, compiler), dtype, Store(Path(root)), target)


def compiled(choice: Choice, bucket: Bucket, word: str = "code", *, gate=None, **requires) -> Artifact:
    """Return what the compiler would have made of a bucket."""
    interface = step_named(bucket.step).interface(choice.model.architecture, bucket, choice.dtype)
    tensors = choice.model.weights(choice.dtype).tensors
    weights = tuple(Contract(name, dtype_name(t), tuple(t.shape)) for name, t in sorted(tensors.items()))
    code = {"code": word.encode()}
    return Artifact(code, interface.inputs, interface.outputs, weights, requires, {}, gate or {"version": 2})


def publish(choice: Choice, bucket: Bucket, word: str = "code", *, gate=None, **requires) -> Manifest:
    """Put an entry into the choice's store, under the key it would build under."""
    artifact, parts = compiled(choice, bucket, word, gate=gate, **requires), choice.key_parts(bucket)
    code = artifact.blobs["code"]
    blobs = (Blob("code", sha256(code).hexdigest(), len(code)),)
    manifest = Manifest(
        family=choice.family,
        key=key.digest(parts),
        parts=parts,
        blobs=blobs,
        contains_weights=False,
        **artifact.facts(),
    )
    return choice.store.publish(manifest, artifact.blobs)


def damage(choice: Choice, manifest: Manifest) -> None:
    """Change one byte of an entry's code."""
    path = choice.store.blob_path(manifest.blobs[0].sha256)
    path.chmod(0o644)
    path.write_bytes(b"X" + path.read_bytes()[1:])
