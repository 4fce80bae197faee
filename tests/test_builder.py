"""Building: hits, failures that stay alone, adoption, plans; with a pretended compiler, and twice with the real one."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Executor, Future
from pathlib import Path

import pytest

from nanogpt_buckets import key
from nanogpt_buckets.backends import host
from nanogpt_buckets.backends.base import Artifact, BuildRequest
from nanogpt_buckets.backends.inductor.backend import InductorBackend
from nanogpt_buckets.builder import build, default_jobs
from nanogpt_buckets.choice import choose, default_plan
from nanogpt_buckets.contract import Contract
from nanogpt_buckets.errors import BackendUnavailable, CacheError, ChildFailed, PlanError, UntrustedStore, UsageError
from nanogpt_buckets.model.architecture import GPT2_SIZES
from nanogpt_buckets.plan.bucket import Bucket, Plan
from nanogpt_buckets.selection import Selection
from nanogpt_buckets.store.entry import Miss, Status
from nanogpt_buckets.store.plans import Plans


class Pretend(Executor):
    """Runs no compiler: hands back bytes that name the bucket, and remembers what it was asked for."""

    def __init__(self, failing: set[int] = frozenset(), requires: dict | None = None) -> None:
        self.asked: list[Bucket] = []
        self.failing = failing
        self.requires = requires or {}

    def submit(self, function, request):
        build_request = BuildRequest.from_json(request)
        bucket = build_request.bucket
        self.asked.append(bucket)
        future: Future = Future()
        if bucket.seq_len in self.failing:
            future.set_exception(ChildFailed(f"no luck with {bucket}"))
        else:
            inputs = (Contract("input_ids", "int32", (bucket.batch_size, bucket.seq_len)),)
            library = f"library of {bucket}".encode()
            future.set_result(Artifact({"library": library}, inputs, (), (), self.requires))
        return future


def pretend_build(seq, executor=None, **options):
    return build(Plan.grid(seq=seq), model="demo", executor=executor or Pretend(), jobs=1, **options)


def test_the_second_build_is_all_hits():
    first, second = pretend_build([32, 64]), pretend_build([32, 64])

    assert (first.hits, first.compiled, first.failed) == (0, 2, 0)
    assert (second.hits, second.compiled, second.failed) == (2, 0, 0)
    assert [row.key for row in first.rows] == [row.key for row in second.rows]


def test_the_largest_bucket_comes_first_and_rows_keep_the_plans_order():
    executor = Pretend()

    report = pretend_build([16, 128, 64], executor)

    assert [bucket.seq_len for bucket in executor.asked] == [128, 64, 16]
    assert [row.bucket.seq_len for row in report.rows] == [16, 64, 128]


def test_what_saves_most_comes_next():
    executor = Pretend()

    pretend_build([4, 8, 16, 120, 128], executor)

    assert [bucket.seq_len for bucket in executor.asked] == [128, 16, 8, 120, 4], "128 does nearly as well as 120"


def test_what_runs_in_place_of_a_failed_bucket_is_named():
    report = pretend_build([16, 32, 64], Pretend(failing={32}))

    assert report.instead(report.rows[1]) == Bucket(1, 64)
    assert [row["instead"] for row in report.to_json()["buckets"]] == [None, Bucket(1, 64).to_json(), None]
    (none,) = pretend_build([128], Pretend(failing={128})).rows
    assert report.instead(none) is None


def test_one_failed_bucket_stops_no_other():
    report = pretend_build([16, 32, 64], Pretend(failing={32}))

    assert [row.state for row in report.rows] == ["compiled", "failed", "compiled"]
    assert report.rows[1].why == "no luck with 1x32"
    assert pretend_build([16, 32, 64]).compiled == 1, "a failure is not remembered"


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest"])
def test_a_damaged_entry_is_built_again(damage, tmp_path):
    pretend_build([32, 64])
    name = "blobs/*/*" if damage != "manifest" else "entries/*/*.json"
    file = sorted((tmp_path / "cache" / "v1").glob(name))[0]
    content = file.read_bytes()
    file.chmod(0o600)
    if damage == "remove":
        file.unlink()
    else:
        file.write_bytes(content[:-1] if damage == "truncate" else bytes([content[0] ^ 1]) + content[1:])
    selection = Selection(choose("demo"))
    found = [selection.own(bucket) for bucket in Plan.grid(seq=[32, 64])]
    assert [miss.status for miss in found if isinstance(miss, Miss)] == [Status.CORRUPT]

    report = pretend_build([32, 64])

    assert (report.hits, report.compiled) == (1, 1)
    assert pretend_build([32, 64]).hits == 2


def test_whatever_an_executor_raises_is_one_buckets_failure():
    class Broken(Pretend):
        def submit(self, function, request):
            if "16" in str(request["bucket"]):
                raise ZeroDivisionError("cluster gone")
            return super().submit(function, request)

    report = pretend_build([16, 32], Broken())

    assert [row.state for row in report.rows] == ["failed", "compiled"]
    assert report.rows[0].why == "ZeroDivisionError: cluster gone"


def test_a_damaged_plan_is_replaced_and_an_unwritable_one_does_not_fail_the_build(tmp_path, monkeypatch, caplog):
    pretend_build([64])
    (tmp_path / "cache" / "v1" / "plans" / "demo.json").write_text("{")
    assert pretend_build([64]).hits == 1
    assert default_plan(choose("demo")) == Plan.grid(seq=[64])

    def refuse(*arguments):
        raise CacheError("read-only")

    monkeypatch.setattr(Plans, "change", refuse)
    assert pretend_build([32], target="x86-64-v2").compiled == 1
    assert "was not saved: read-only" in caplog.text


def test_build_adds_to_the_models_plan(monkeypatch):
    pretend_build([64])
    pretend_build([32])

    assert default_plan(choose("demo")) == Plan.grid(seq=[32, 64])


def test_another_dtype_target_or_compiler_is_another_entry(monkeypatch):
    pretend_build([32])
    assert pretend_build([32], dtype="bfloat16").compiled == 1
    assert pretend_build([32], target="x86-64-v2").compiled == 1
    monkeypatch.setattr(InductorBackend, "compiler", lambda self: {"torch": "x", "cxx": "another"})
    assert pretend_build([32]).compiled == 1
    assert pretend_build([32]).hits == 1


def test_a_loader_prefers_its_own_compiler_then_the_highest_level(monkeypatch):
    def best():
        return Selection(choose("demo")).best(Bucket(1, 32)).manifest.parts

    pretend_build([32], target="x86-64-v2")
    assert best()["target"] == "x86-64-v2"
    pretend_build([32])
    assert best()["target"] == InductorBackend().target(None)
    monkeypatch.setattr(InductorBackend, "compiler", lambda self: {"torch": "9.9", "cxx": "another"})
    pretend_build([32], target="x86-64-v2")
    assert best()["target"] == "x86-64-v2"


def test_an_entry_for_a_better_cpu_is_not_loaded_and_not_touched():
    pretend_build([32], Pretend(requires={"cpu_flags": ["a_flag_of_2040"]}))
    selection = Selection(choose("demo"))
    answer = selection.best(Bucket(1, 32))

    assert answer.status is Status.INCOMPATIBLE
    assert "a_flag_of_2040" in answer.why
    assert selection.usable == {}


def test_without_a_compiler_hits_still_work_and_a_miss_is_said_at_once(monkeypatch):
    pretend_build([32])
    monkeypatch.setattr(InductorBackend, "compiler", lambda self: None)

    assert pretend_build([32]).hits == 1
    with pytest.raises(BackendUnavailable, match=r"1 of 2 buckets .* no C\+\+ compiler"):
        pretend_build([32, 64])


def test_a_cache_others_can_write_is_refused_with_the_command(tmp_path):
    pretend_build([32])
    (tmp_path / "cache").chmod(0o777)

    with pytest.raises(UntrustedStore, match="everyone") as caught:
        pretend_build([32])
    assert caught.value.hint.endswith(f"delete it and build again: rm -r {tmp_path / 'cache'}")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"dtype": "float64"}, UsageError),
        ({"backend": "tpu"}, UsageError),
        ({"backend": "eager"}, UsageError),
        ({"backend": "neuron"}, BackendUnavailable),
        ({"target": "trn1"}, BackendUnavailable),
        ({"target": "x86-64-v9"}, BackendUnavailable),
        ({"jobs": 0}, UsageError),
    ],
)
def test_what_cannot_be_is_refused(options, error, tmp_path):
    with pytest.raises(error):
        build(Plan.grid(seq=[32]), model="demo", **options)
    assert not (tmp_path / "cache").exists()


def test_a_bucket_too_long_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(PlanError):
        pretend_build([32, 257])
    assert not (tmp_path / "cache").exists()


def test_jobs_are_bounded_by_buckets_and_memory(monkeypatch):
    monkeypatch.setattr(host, "cpu_count", lambda: 64)
    monkeypatch.setattr(host, "available_memory_bytes", lambda: 10_000_000_000)

    few, many = [Bucket(1, 32), Bucket(1, 64)], [Bucket(1, length) for length in range(1, 101)]
    assert default_jobs(InductorBackend(), GPT2_SIZES["gpt2"], few) == 2
    assert default_jobs(InductorBackend(), GPT2_SIZES["gpt2"], many) == 5
    kept = [Bucket(32, length, "decode") for length in range(1, 101)]
    assert default_jobs(InductorBackend(), GPT2_SIZES["gpt2"], kept) == 1, "the gate keeps state for 32 whole contexts"
    assert default_jobs(InductorBackend(), GPT2_SIZES["gpt2-xl"], many) == 1


def test_gpt2_needs_neither_weights_nor_network(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    report = build(Plan.grid(seq=[32]), model="gpt2-xl", executor=Pretend())

    assert report.compiled == 1


def test_the_report_is_plain_json():
    document = json.loads(json.dumps(pretend_build([32]).to_json()))

    assert (document["hits"], document["compiled"], document["failed"]) == (0, 1, 0)
    assert document["buckets"][0]["bucket"] == {"step": "recompute", "batch_size": 1, "seq_len": 32}
    assert document["buckets"][0]["state"] == "compiled"


def test_a_request_survives_its_journey():
    request = BuildRequest(
        "inductor",
        GPT2_SIZES["gpt2"],
        Bucket(2, 8),
        "float32",
        "native",
        {"attention": "sdpa"},
        "0" * 64,
        {"torch": "9"},
    )

    assert BuildRequest.from_json(request.to_json()) == request
    assert dataclasses.replace(request, dtype="bfloat16") != request


# --- in processes of their own ----------------------------------------------------------------------------------------

BUILD = [sys.executable, "-m", "nanogpt_buckets", "build", "--model", "demo", "--json", "--strategy=recompute", "--seq"]


def test_two_builders_at_once_compile_each_key_once(tmp_path):
    command = [sys.executable, "-m", "farm", *BUILD[3:], "16"]
    environment = {"PYTHONPATH": str(Path(__file__).parent), "FARM_LOG": str(tmp_path / "log"), "FARM_SECONDS": "5"}
    runs = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | environment) for _ in range(2)
    ]
    reports = [json.loads(run.communicate()[0]) for run in runs]

    assert sorted((report["hits"], report["compiled"]) for report in reports) == [(0, 1), (1, 0)]
    assert reports[0]["buckets"][0]["key"] == reports[1]["buckets"][0]["key"]
    assert list((tmp_path / "cache" / "v1" / "tmp").iterdir()) == []


def test_ctrl_c_while_waiting_for_another_builder_ends_at_once(tmp_path):
    import filelock

    choice = choose("demo")
    choice.store.directory.prepare()
    name = key.digest(choice.key_parts(Bucket(1, 24)))
    with filelock.FileLock(tmp_path / "cache" / "v1" / "locks" / f"{name}.lock"):
        run = subprocess.Popen([*BUILD, "24"], stderr=subprocess.PIPE, text=True)
        time.sleep(2)
        assert run.poll() is None, "it waits"
        run.send_signal(signal.SIGINT)
        said = run.communicate(timeout=60)[1]  # the lock itself would be waited for for ten minutes

    assert run.returncode == 130, said
    assert said.rstrip().endswith("interrupted")


def processes_naming(text: str) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if text in (entry / "cmdline").read_text() or text in os.readlink(entry / "cwd"):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_build_leaves_no_child_and_nothing_half_written(sent, tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    environment = os.environ | {"TMPDIR": str(scratch)}
    run = subprocess.Popen([*BUILD, "24"], stderr=subprocess.PIPE, text=True, env=environment)
    for line in run.stderr:
        if "compiling" in line:
            break
    deadline = time.monotonic() + 30
    while not processes_naming(str(scratch)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes_naming(str(scratch)), "the child was never seen"
    run.send_signal(sent)
    said = run.stderr.read()
    run.stderr.close()

    assert run.wait() == (130 if sent == signal.SIGINT else -signal.SIGKILL)
    deadline = time.monotonic() + 10
    while processes_naming(str(scratch)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes_naming(str(scratch)) == []
    assert list((tmp_path / "cache").rglob("*.json")) == []
    if sent == signal.SIGINT:
        assert said.rstrip().endswith("interrupted")
        assert "Traceback" not in said
        assert list(scratch.iterdir()) == []


# --- plans pin families -----------------------------------------------------------------------------------------------


def upgraded(monkeypatch, version: str) -> None:
    monkeypatch.setattr(InductorBackend, "runtime", lambda self: {"torch": version})


def demo_choice(dtype="float32"):
    return choose("demo", dtype=dtype)


def pinned_families() -> set[str]:
    plans = Plans(demo_choice().store)
    return {family for name in plans.names() for family in plans.load(name).families}


def test_a_plan_names_the_families_whose_buckets_are_in_use():
    pretend_build([32])
    assert pinned_families() == {demo_choice().family}

    pretend_build([32], dtype="bfloat16")
    assert pinned_families() == {demo_choice().family, demo_choice("bfloat16").family}


def test_building_after_an_upgrade_lets_go_of_the_family_it_replaces_and_of_no_other(monkeypatch):
    pretend_build([32])
    pretend_build([32], dtype="bfloat16")
    bfloat16 = demo_choice("bfloat16").family

    upgraded(monkeypatch, "99.0")
    pretend_build([32])

    assert pinned_families() == {demo_choice().family, bfloat16}


def test_after_an_upgrade_status_says_what_the_bucket_that_is_there_was_built_for(monkeypatch):
    from importlib.metadata import version

    pretend_build([32])
    upgraded(monkeypatch, "99.0")

    assert Selection(demo_choice()).best(Bucket(1, 32)).why == (
        f"not built; there is one with runtime.torch: {version('torch')}, not 99.0"
    )
    assert Selection(demo_choice()).best(Bucket(1, 64)).why == "not built"
