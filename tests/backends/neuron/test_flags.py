"""The user's compiler flags: one name for one meaning, nothing swallowed, nothing taken for something else."""

from __future__ import annotations

from random import Random

import pytest

from nanogpt_buckets import Bucket, Engine, Plan, errors, key
from nanogpt_buckets.backends.neuron import arguments, flags

SAME = [
    ("--auto-cast matmult", "--auto-cast=matmult"),
    ("-O1", "--optlevel 1"),
    ("-O 1", "--optlevel=1"),
    ("--lnc 2", "-lnc=2"),
    ("--optlevel 1 --auto-cast all", "--auto-cast=all -O1"),
    ("-O3 -O1", "-O1"),
    ("", "--auto-cast none --model-type=transformer"),
    ("", "-O2 --enable-saturate-infinity"),
    ("", "--native-int64 disabled --implicit-integer-downcast=all"),
    ("-O1", "-O 1 --enable-saturate-infinity --logfile=/tmp/a=b"),
    ("", "--logfile /tmp/a --verbose 35"),
    ("--enable-saturate-infinity -O1", "-O1 --enable-saturate-infinity"),
    ("--enable-mixed-precision-accumulation --disable-mixed-precision-accumulation",
     "--disable-mixed-precision-accumulation"),
]  # fmt: skip


DIFFERENT = [
    ("", "--auto-cast matmult"),
    ("-O1", "-O3"),
    ("", "--native-int64=enabled"),
    ("", "--flag-of-tomorrow 1"),
    ("--auto-cast-type bf16", "--auto-cast-type tf32"),
    ("", "--disable-mixed-precision-accumulation"),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_flags_that_say_the_same_name_the_same_family(one, other):
    assert arguments.named(one) == arguments.named(other) == arguments.named(other.split())


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_flags_that_say_something_else_name_another(one, other):
    assert arguments.named(one) != arguments.named(other)


@pytest.mark.parametrize(
    "name", [*arguments.HLO_VARIABLES, "XLA_FLAGS", "XLA_DISABLE_FUNCTIONALIZATION", "XLA_USE_BF16", "XLA_EXPERIMENTAL"]
)
def test_variables_that_change_the_graph_are_part_of_the_family(monkeypatch, name):
    plain = arguments.named("-O1")
    monkeypatch.setenv(name, "1")

    assert arguments.named("-O1") == [*plain, f"{name}=1"]


@pytest.mark.parametrize("wrong", [[1], [None], [b"-O1"]])
def test_arguments_that_are_no_text_are_refused(wrong):
    with pytest.raises(errors.UsageError, match="cannot be read"):
        Engine.load("demo", backend="neuron", compiler_args=wrong)


def test_a_name_can_be_made_of_bytes_that_are_no_text(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "\udcff")

    assert key.digest({"flags": arguments.named("--flag-of-tomorrow=\udcfe")})


@pytest.mark.parametrize("wrong", ["fast", "--target=trn2", "--output x", "-", "--", "'", "--framework=XLA"])
def test_what_is_no_flag_or_not_the_users_to_say_is_refused(wrong):
    with pytest.raises(errors.UsageError) as caught:
        arguments.parse(wrong)

    assert caught.value.hint


@pytest.mark.parametrize(
    "wrong",
    [
        "--logfile=", "--logfile", "--logfile -O1", "--verbose= -O1", "--auto-cast", "--optlevel= --auto-cast=all",
        "-O", "-O=", "--lnc", "--flag-of-tomorrow=", "--enable-saturate-infinity=1", "--enable-fast-context-switch yes",
    ],
)  # fmt: skip
def test_a_value_too_few_or_too_many_is_refused_and_swallows_no_other_flag(wrong):
    with pytest.raises(errors.UsageError, match=r"has no value|takes no value|is no flag") as caught:
        arguments.parse(wrong)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("short", "whole"),
    [
        ("--optl 1", "--optlevel"),
        ("--targ=trn2", "--target"),
        ("--out x", "--output"),
        ("--logf=/tmp/a", "--logfile"),
        ("--auto all", "--auto-cast or --auto-cast-type"),
        ("--ln=2", "--lnc"),
        ("--enable-sat", "--enable-saturate-infinity"),
    ],
)
def test_a_flag_cut_short_is_refused_with_the_whole_one(short, whole):
    with pytest.raises(errors.UsageError, match="is cut short") as caught:
        arguments.parse(short)
    assert caught.value.hint == f"write {whole}"


def test_the_compiler_reads_what_was_asked_for_and_every_word_of_it_is_named_or_only_logs(host):
    """Whatever is accepted, in whatever order, by the double's own reading of its command line."""
    from neuronxcc.flags import KNOWN, parse

    words = ["--logfile", "--logfile=", "/tmp/a", "-O1", "-O", "3", "--auto-cast", "all", "--verbose=1", "--lnc=1", "1"]
    words += ["--enable-fast-context-switch", "--disable-mixed-precision-accumulation", "--auto-cast=none"]
    random, accepted = Random(9), 0
    for _ in range(2000):
        given = random.sample(words, random.randint(0, 5))
        try:
            chosen = arguments.parse(given)
        except errors.UsageError:
            continue
        if any(value not in (KNOWN[name] or (value,)) for name, value in chosen.items()):
            continue  # a choice that the compiler refuses
        accepted += 1
        command = flags.command(chosen, "trn2", "2.26.6360.0")
        positional, read = parse(["model", "--framework", "XLA", *command, "--output", "neff"])
        passed = {name: value for name, value in (flags.ALWAYS | chosen).items() if name in KNOWN}
        assert positional == ["model"], given
        assert read == passed | {"--framework": "XLA", "--output": "neff", "--target": "trn2"}, given
        named = arguments.parse(arguments.named(given))
        logs = {name: value for name, value in chosen.items() if name in ("--logfile", "--verbose")}
        assert passed == {name: value for name, value in (flags.ALWAYS | named | logs).items() if name in KNOWN}, given
    assert accepted > 200


def test_what_an_old_compiler_does_anyway_is_not_said_to_it_and_what_it_does_not_know_is():
    assert flags.command({"--native-int64": "disabled"}, "trn1", "2.26.1") == flags.command({}, "trn1", "2.26.1")
    assert "--native-int64=enabled" in flags.command({"--native-int64": "enabled"}, "trn1", "2.26.1")


def test_the_compiler_gets_what_it_knows_and_the_user_wins():
    old = flags.command({}, "trn1", "2.26.6360.0")

    assert old[:2] == ["--target", "trn1"]
    assert {"--auto-cast=none", "--model-type=transformer", "--optlevel=2", "--enable-saturate-infinity"} == set(
        old[2:]
    )
    newer = flags.command(arguments.parse("--auto-cast all --logfile a.txt"), "trn2", "2.27.5334.0")
    assert {"--native-int64=disabled", "--implicit-integer-downcast=all", "--auto-cast=all", "--logfile=a.txt"} <= set(
        newer
    )


def test_the_flags_of_an_entry_are_in_the_file_itself(host, tmp_path):
    host.build(Plan([Bucket(1, 8)]), target="trn1", compiler_args="-O1 --auto-cast matmult")
    found = host.selection(compiler_args=["--auto-cast=matmult", "--optlevel", "1"]).own(Bucket(1, 8)).manifest
    assert found is not None, "another spelling of the same flags hits"
    assert host.selection().own(Bucket(1, 8)).manifest is None, "no flags do not"

    import torch_neuronx

    (tmp_path / "module.pt").write_bytes(host.selection().store.read_blob(found.blobs[0]))
    header = torch_neuronx._double.artifact(tmp_path / "module.pt")
    assert header["arch"] == "v2"
    assert header["flags"]["--auto-cast"] == "matmult"
    assert header["flags"]["--optlevel"] == "1"


def test_a_flag_that_is_passed_anyway_hits_what_was_built_without_it(host):
    host.build(Plan([Bucket(1, 8)]), target="trn1")

    spelled = "--optlevel 2 --enable-saturate-infinity --native-int64=disabled --logfile=/tmp/log"
    assert host.build(Plan([Bucket(1, 8)]), target="trn1", compiler_args=spelled).hits == 1
    assert host.selection(compiler_args=spelled).choice.plan_names == host.selection().choice.plan_names


def test_a_hint_builds_the_family_that_is_missing(host):
    flagged = host.selection(target="inf2", compiler_args=["-O1", "--auto-cast matmult"])

    assert flagged.choice.build_command([Bucket(1, 8)]) == (
        "nanogpt-buckets build --model demo --seq 8 --target inf2 --compiler-args='-O1 --auto-cast matmult'"
    )
    assert host.selection().choice.build_command() == "nanogpt-buckets build --model demo --target trn1"
