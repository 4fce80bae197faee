"""Builds by several machines: shards that share a cache directory, and the workers of a Dask scheduler.

What is run in processes of their own here has a pretended compiler (farm.py), but for one bucket.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from test_builder import Pretend

from nanogpt_buckets.backends import host, worker
from nanogpt_buckets.backends.base import BuildRequest
from nanogpt_buckets.backends.inductor.backend import InductorBackend
from nanogpt_buckets.builder import build
from nanogpt_buckets.choice import choose, default_plan
from nanogpt_buckets.cli.cluster import workers_of
from nanogpt_buckets.errors import BackendUnavailable, CompileFailed, PlanError, UsageError
from nanogpt_buckets.model.architecture import GPT2_SIZES
from nanogpt_buckets.plan.bucket import Bucket, Plan
from nanogpt_buckets.plan.shard import part

TESTS = Path(__file__).parent
PLAN = Plan.grid(batch=[1, 3], seq=[16, 32, 64, 128])


def cost(bucket: Bucket) -> int:
    return bucket.batch_size * bucket.seq_len


# --- shards ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 20])
def test_each_bucket_is_in_exactly_one_shard_and_none_has_more_than_one_more(count):
    shards = [part(PLAN, (index, count), cost) for index in range(1, count + 1)]

    assert Counter(bucket for shard in shards for bucket in shard) == Counter(PLAN)
    assert max(map(len, shards)) - min(map(len, shards)) <= 1
    assert [part(reversed(PLAN), (index, count), cost) for index in range(1, count + 1)] == shards


def test_the_expensive_buckets_are_spread():
    assert [part(PLAN, (index, 4), cost)[-1] for index in (1, 2, 3, 4)] == [
        Bucket(3, 128), Bucket(3, 64), Bucket(1, 128), Bucket(3, 32)
    ]  # fmt: skip


@pytest.mark.parametrize("shard", [(0, 3), (4, 3), (-1, 3), (1, 0), (1.5, 3), (True, "x"), "1/3", (1,), (1, 2, 3), 2])
def test_a_shard_that_does_not_exist_is_refused_before_anything_is_written(shard, tmp_path):
    with pytest.raises(UsageError, match="shard"):
        build(PLAN, model="demo", executor=Pretend(), shard=shard)
    assert not (tmp_path / "cache").exists()


def test_shards_build_their_own_and_the_plan_in_the_end_is_the_whole():
    reports = [build(PLAN, model="demo", executor=Pretend(), shard=(index, 3)) for index in (1, 2, 3)]
    again = [build(PLAN, model="demo", executor=Pretend(), shard=(index, 3)) for index in (1, 2, 3)]

    assert [report.compiled for report in reports] == [3, 3, 2]
    assert [(report.hits, report.compiled) for report in again] == [(3, 0), (3, 0), (2, 0)]
    assert sorted(row.bucket for report in reports for row in report.rows) == list(PLAN)
    assert default_plan(choose("demo")) == PLAN


def test_an_empty_shard_builds_nothing_and_a_plan_that_cannot_be_fails_in_each(tmp_path):
    report = build([Bucket(1, 16)], model="demo", executor=Pretend(), shard=(2, 2))

    assert (report.rows, report.compiled, report.model) == ((), 0, "demo")
    assert not (tmp_path / "cache").exists()
    with pytest.raises(PlanError):
        build([Bucket(1, 16), Bucket(1, 512)], model="demo", executor=Pretend(), shard=(2, 2))


# --- processes ------------------------------------------------------------------------------------------------------


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Return a function that starts `python -m ...`, which ends with the test at the latest."""
    started: list[subprocess.Popen[str]] = []
    variables = {"PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}", "FARM_LOG": str(tmp_path / "log")}

    def start(*arguments: str, **extra: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", *arguments]
        pipe = subprocess.PIPE
        environment = os.environ | variables | extra
        process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment, cwd=tmp_path)
        started.append(process)
        return process

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.communicate()


def begun(tmp_path: Path) -> list[str]:
    """Return who has begun to compile what: lines of a process's id and a bucket."""
    log = tmp_path / "log"
    lines = log.read_text().splitlines() if log.exists() else []
    return [line.replace(" begin", "") for line in lines if " begin " in line]


def ended(tmp_path: Path) -> list[str]:
    return [line.split(" end ")[1] for line in (tmp_path / "log").read_text().splitlines() if " end " in line]


def wait_until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def report_of(process: subprocess.Popen[str]) -> dict:
    out, said = process.communicate(timeout=100)
    assert process.returncode == 0, said
    return json.loads(out)


RECOMPUTE = "--strategy=recompute"
BUILD = ("farm", "build", "--model=demo", RECOMPUTE, "--batch=1,3", "--seq=16,32,64,128", "--json")


def test_three_shards_at_once_one_of_them_killed_and_run_again_lose_and_repeat_nothing(start, tmp_path):
    victim = start(*BUILD, "--shard=2/3", "--jobs=1", FARM_SECONDS="1")
    others = [start(*BUILD, f"--shard={index}/3") for index in (1, 3)]
    wait_until(lambda: sum(line.startswith(f"{victim.pid} ") for line in begun(tmp_path)) == 2)
    victim.send_signal(signal.SIGKILL)
    reports = [report_of(other) for other in others]
    reports.append(report_of(start(*BUILD, "--shard=2/3")))

    assert [(report["hits"], report["compiled"], report["failed"]) for report in reports] == [
        (0, 3, 0), (0, 2, 0), (1, 2, 0)
    ]  # fmt: skip
    assert sorted(ended(tmp_path)) == sorted(map(str, PLAN)), "each once"
    status = report_of(start("nanogpt_buckets", "status", "--model=demo", "--json"))
    assert [row["state"] for row in status["buckets"]] == ["warm"] * len(PLAN)


@pytest.fixture
def dask(start: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> tuple[str, list[subprocess.Popen[str]]]:
    """A scheduler's address, and its three workers of one thread each."""
    where = tmp_path / "scheduler.json"
    quiet = {"DASK_LOGGING__DISTRIBUTED": "critical", "DASK_DISTRIBUTED__SCHEDULER__IDLE_TIMEOUT": "100s"}
    common = ("--no-dashboard", f"--scheduler-file={where}")
    start("distributed.cli.dask_scheduler", "--host=127.0.0.1", "--port=0", *common, **quiet)
    wait_until(where.exists)
    address = json.loads(where.read_text())["address"]
    options = ("--no-nanny", "--nthreads=1", "--host=127.0.0.1", f"--local-directory={tmp_path}")
    return address, [start("distributed.cli.dask_worker", *options, *common, **quiet) for _ in range(3)]


def test_a_killed_worker_of_three_loses_nothing(start, dask, tmp_path):
    address, workers = dask
    run = start(*BUILD, f"--scheduler={address}", FARM_SECONDS="0")
    wait_until(lambda: any(f"{w.pid} " in " ".join(begun(tmp_path)) for w in workers))
    victim = next(w for w in workers if f"{w.pid} " in " ".join(begun(tmp_path)))
    victim.send_signal(signal.SIGKILL)
    out, said = run.communicate(timeout=100)
    report = json.loads(out)

    assert (report["compiled"], report["failed"]) == (len(PLAN), 0), said
    assert {row["peak_bytes"] for row in report["buckets"]} == {1_000_000}
    assert set(ended(tmp_path)) == set(map(str, PLAN))
    assert {int(line.split()[0]) for line in begun(tmp_path)} <= {w.pid for w in workers}
    living = Counter(line for line in begun(tmp_path) if not line.startswith(f"{victim.pid} "))
    assert max(Counter(line.split(maxsplit=1)[1] for line in living).values()) == 1, "what the dead had not handed over"
    assert not [line for line in said.splitlines() if not line.startswith("bucket ")], "and nothing of connections"

    # the two that are left: a real compiler, another compiler, and Ctrl-C
    (tmp_path / "small").mkdir()
    config = {"model_type": "gpt2", "n_layer": 1, "n_head": 1, "n_embd": 16, "n_positions": 8, "vocab_size": 11}
    (tmp_path / "small" / "config.json").write_text(json.dumps(config))
    real = (
        "nanogpt_buckets",
        "build",
        "--model=small",
        "--strategy=recompute",
        "--seq=8",
        "--json",
        f"--scheduler={address}",
    )
    row = report_of(start(*real))["buckets"][0]
    assert (row["state"], row["peak_bytes"] > 100_000_000) == ("compiled", True)
    shown = report_of(start("nanogpt_buckets", "cache", "show", row["key"], "--json"))
    assert shown["stats"]["peak_bytes"] == row["peak_bytes"]

    run = start(*real, CXX="g++ -DANOTHER")
    row = json.loads(run.communicate(timeout=100)[0])["buckets"][0]
    assert (run.returncode, row["state"]) == (5, "failed")
    assert " has cxx " in row["why"]

    before = len(begun(tmp_path))
    run = start(
        "farm",
        "build",
        "--model=demo",
        "--strategy=recompute",
        f"--seq={','.join(map(str, range(200, 240)))}",
        f"--scheduler={address}",
    )
    wait_until(lambda: len(begun(tmp_path)) > before)
    run.send_signal(signal.SIGINT)
    assert run.communicate(timeout=20)[1].endswith("interrupted\n")
    assert run.returncode == 130
    time.sleep(1.5)  # what had begun ends
    assert len(begun(tmp_path)) < before + 20


# --- schedulers that are none ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "speech", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\0" * 1000], ids=["silent", "http", "zeros"]
)
def test_whatever_else_listens_is_no_scheduler_and_that_is_said_soon(speech):
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=speak, args=(server, speech), daemon=True).start()
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        start = time.monotonic()
        with pytest.raises(BackendUnavailable, match=f"no Dask scheduler answers at {address}"), workers_of(address):
            pass
        assert time.monotonic() - start < 10


def speak(server: socket.socket, speech: bytes) -> None:
    with contextlib.suppress(OSError):
        while True:
            peer = server.accept()[0]
            peer.sendall(speech)
            peer.recv(1)
            if speech:
                peer.close()


def test_without_dask_distributed_the_command_that_installs_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)

    with pytest.raises(BackendUnavailable, match="not installed") as caught, workers_of("tcp://127.0.0.1:8786"):
        pass
    assert caught.value.hint == "pip install 'nanogpt-buckets[distributed]'"


# --- who compiles must have what the asker has ------------------------------------------------------------------------


def asked(**changes) -> dict:
    backend = InductorBackend()
    known = {
        "backend": "inductor", "architecture": GPT2_SIZES["gpt2"], "bucket": Bucket(1, 8), "dtype": "float32",
        "target": backend.target(None), "lowering": backend.lowering, "source": worker.source_of(backend, "recompute"),
        "versions": backend.versions(),
    }  # fmt: skip
    return BuildRequest(**(known | changes)).to_json()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"torch": "1.0"}, r"has torch .*, and who asks for the bucket 1\.0\b"),
        ({"cxx": "g\N{PLUS-MINUS SIGN}"}, "has cxx "),
        ({"flags": "-O9"}, r"has flags none, and who asks for the bucket -O9\b"),
        ({"something": "new"}, r"has something none, and who asks for the bucket new\b"),
    ],
)
def test_a_worker_with_other_versions_than_the_asker_refuses(changed, said):
    with pytest.raises(CompileFailed, match=said) as caught:
        worker.handle(asked(versions=InductorBackend().versions() | changed), lambda *event, **fields: None)
    assert "one image" in caught.value.hint


def test_a_worker_without_a_compiler_refuses(monkeypatch):
    request = asked()
    monkeypatch.setattr(InductorBackend, "compiler", lambda self: None)

    with pytest.raises(CompileFailed, match="has cxx none"):
        worker.handle(request, lambda *event, **fields: None)


def test_a_worker_whose_cpu_cannot_run_the_target_refuses(monkeypatch):
    request = asked(target="x86-64-v2")
    monkeypatch.setattr(host, "cpu_flags", frozenset)

    with pytest.raises(BackendUnavailable, match=r"on .*: this CPU cannot run x86-64-v2"):
        worker.handle(request, lambda *event, **fields: None)
