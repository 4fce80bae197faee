"""Selection with a fake backend: which entry runs, which is the builder's own, and why none is."""

from __future__ import annotations

import pytest
from fake import choice_of, damage, publish

from nanogpt_buckets.errors import CacheMiss, CorruptEntry, IncompatibleEntry, TransientError
from nanogpt_buckets.plan.bucket import Bucket
from nanogpt_buckets.selection import NOT_BUILT, Selection, explain_miss
from nanogpt_buckets.store.entry import Status, Verified, manifest_of
from nanogpt_buckets.store.store import Store

B16, B32 = Bucket(1, 16), Bucket(1, 32)


@pytest.fixture
def choose(odd_folder, tmp_path):
    return lambda **options: choice_of(odd_folder, tmp_path / "store", **options)


def test_a_loader_takes_its_own_compiler_then_the_most_specialised_target_then_the_newest_compiler(choose):
    made = [("2.0", "any"), ("2.0", "best"), ("1.0", "any"), ("1.0", "good"), ("10.0", "best")]
    for compiler, target in made:
        publish(choose(compiler=compiler, target=target), B16)

    ranked = Selection(choose()).ranked[B16]

    order = [(m.parts["compiler"]["fakec"], m.parts["target"]) for m in map(manifest_of, ranked)]
    assert order == [("1.0", "good"), ("1.0", "any"), ("10.0", "best"), ("2.0", "best"), ("2.0", "any")]


def test_what_lacks_something_here_comes_last_and_says_what(choose):
    publish(choose(target="best"), B16, lacks="needs a better machine")
    other = publish(choose(compiler="0.1", target="any"), B16)
    selection = Selection(choose())

    assert selection.best(B16).manifest == other
    assert [answer.why for answer in selection.reasons() if answer.status is Status.INCOMPATIBLE] == [
        "needs a better machine"
    ]


def test_what_a_builder_has_made_for_another_machine_is_its_own(choose):
    mine = publish(choose(target="best"), B16, lacks="needs a better machine")
    selection = Selection(choose(target="best"))

    assert selection.own(B16).manifest == mine
    assert selection.best(B16).status is Status.INCOMPATIBLE
    assert "leave --target out" in selection.best(B16).hint


def test_a_builders_own_key_is_exact_and_a_loaders_is_not(choose):
    publish(choose(compiler="2.0"), B16)

    assert Selection(choose()).own(B16).status is Status.ABSENT
    assert isinstance(Selection(choose()).best(B16), Verified)


def test_without_a_compiler_whatever_runs_is_a_builders_own(choose):
    made = publish(choose(compiler="2.0"), B16)

    assert Selection(choose(compiler=None)).own(B16).manifest == made


def test_a_target_that_is_named_is_the_only_one(choose):
    publish(choose(target="good"), B16)

    assert isinstance(Selection(choose(target="good")).best(B16), Verified)
    assert Selection(choose(target="best")).best(B16).why == f"{NOT_BUILT}; there is one with target: good, not best"


def test_what_is_alike_says_what_it_differs_in(choose):
    publish(choose(dtype="bfloat16"), B16)

    assert Selection(choose()).best(B16).why == f"{NOT_BUILT}; there is one with dtype: bfloat16, not float32"
    assert Selection(choose()).best(B32).why == NOT_BUILT


def test_the_nearest_entry_is_the_one_that_differs_in_the_fewest_parts(choose):
    assert Selection(choose()).nearest(B16) is None
    publish(choose(dtype="bfloat16", compiler="3.0"), B16)
    made = publish(choose(compiler="2.0"), B16)

    for compiler, lines in (("1.0", ["compiler.fakec: 2.0, not 1.0"]), (None, [])):
        assert Selection(choose(compiler=compiler)).nearest(B16) == (made, lines)
    # another bucket of the same make, as soon as there is one
    other = publish(choose(), B32)
    assert Selection(choose()).nearest(B16) == (made, ["compiler.fakec: 2.0, not 1.0"]), "of equals the same bucket"
    assert Selection(choose()).nearest(Bucket(1, 64)) == (other, ["bucket.seq_len: 32, not 64"])


def unreadable(choice, manifest, monkeypatch):
    def fail(*arguments: object, **how: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("nanogpt_buckets.store.trust.read_file", fail)


def scribble(choice, manifest, monkeypatch):
    path = choice.store.entry_path(manifest)
    path.chmod(0o644)
    path.write_bytes(b"{}")


KINDS = {
    "one lacking something": (None, IncompatibleEntry, "a better machine"),
    "a damaged manifest": (scribble, CorruptEntry, "digest"),
    "one that cannot be read": (unreadable, TransientError, "Input/output error"),
}


@pytest.mark.parametrize(("harm", "kind", "why"), KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("lacking", [[B16], []], ids=["with a plan", "without a plan"])
def test_a_miss_has_the_kind_of_what_is_there(choose, monkeypatch, harm, kind, why, lacking):
    choice = choose()
    manifest = publish(choice, B16, **({} if harm else {"lacks": "needs a better machine"}))
    if harm:
        harm(choice, manifest, monkeypatch)

    error = explain_miss(choice, Selection(choice), "no bucket is built", lacking)

    assert type(error) is kind
    assert why in error.message
    assert error.hint


def test_code_that_is_damaged_is_a_corrupt_miss_of_the_plan_that_names_it(choose):
    choice = choose()
    damage(choice, publish(choice, B16))

    error = explain_miss(choice, Selection(choice), "no bucket is built", [B16])

    assert type(error) is CorruptEntry


def test_a_miss_of_nothing_at_all_names_the_command(choose):
    error = explain_miss(choose(), Selection(choose()), "no bucket is built", [B16, Bucket(3, 32)])

    assert type(error) is CacheMiss
    assert error.hint.count("nanogpt-buckets build") == 2  # no grid, and no bucket that was not asked for
    assert "--seq 16" in error.hint
    assert "--batch 3 --seq 32" in error.hint


def test_a_store_is_read_once_however_many_buckets_are_asked_for(choose, monkeypatch):
    choice = choose()
    publish(choice, B16)
    calls = []
    for name in ("family", "entries"):
        real = getattr(Store, name)
        monkeypatch.setattr(Store, name, lambda self, *a, real=real: calls.append(1) or real(self, *a))
    selection = Selection(choice)

    for length in range(1, 101):
        selection.best(Bucket(1, length))

    assert len(calls) == 2  # the family, and all entries to see what is alike


def test_no_more_entries_of_a_bucket_are_read_than_until_one_is_in_order(choose, monkeypatch):
    damage(choose(), publish(choose(target="best"), B16, "first"))
    intact = publish(choose(target="good"), B16, "second")
    publish(choose(target="any"), B16, "third")
    selection, read, real = Selection(choose()), [], Store._read_blob_here
    monkeypatch.setattr(Store, "_read_blob_here", lambda self, blob: read.append(blob.sha256) or real(self, blob))

    assert selection.best(B16).manifest == intact
    assert len(read) == 2
