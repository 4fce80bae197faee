"""A selection of each family of the chaos suite, and faults planted in the store, which the suite must find."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from chaos.suite import FAMILIES, LONGEST_FIRST
from store_kit import REPOSITORY

CHAOS = str(REPOSITORY / "scripts" / "chaos")


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=REPOSITORY)


def test_every_fault_is_survived_and_all_are_one_table():
    ran = run(CHAOS, "--quick")

    assert ran.returncode == 0, ran.stderr
    assert ran.stderr.startswith("seed ")
    head, *rows, total = (re.split(r"\s{2,}", line) for line in ran.stdout.splitlines())
    assert head == ["FAMILY", "WHAT", "INJECTED", "SURVIVED", "LOST", "WRONG LOADS"]
    assert [int(row[0]) for row in rows] == sorted(FAMILIES) == sorted(LONGEST_FIRST) == list(range(1, 10))
    for row in rows:
        assert int(row[2]) == int(row[3]) > 0, row
        assert row[4:] == ["0", "0"], row
    injected = str(sum(int(row[2]) for row in rows))
    assert total == ["", "all", injected, injected, "0", "0"]


def test_there_is_no_tenth_family():
    assert run(CHAOS, "--family=10").returncode == 2


PLANTED = {
    "a manifest before its libraries": (1, "lost", """
        from nanogpt_buckets.store.entries import Entries, encode_entry, entry_name
        real = Entries.publish
        def publish(self, manifest, blobs, signature=None):
            self.tier.put(entry_name(manifest.family, manifest.key), encode_entry(manifest, blobs))
            return real(self, manifest, blobs)
        Entries.publish = publish
    """),
    "bytes that nobody compares": (2, "wrong", """
        from nanogpt_buckets.store.entries import CorruptEntry, Entries, blob_name
        real = Entries._read_blob_here
        def read(self, blob):
            try:
                return real(self, blob)
            except CorruptEntry:
                if self.tier.size(blob_name(blob.sha256)) is None:
                    raise
                return self.tier.get(blob_name(blob.sha256))
        Entries._read_blob_here = read
    """),
    "plans that keep nothing": (4, "lost", """
        from nanogpt_buckets.store.plans import Pins, Plans
        Plans.pins = lambda self: Pins()
    """),
    "owners that nobody asks for": (7, "wrong", """
        from nanogpt_buckets.store import trust
        trust._refuse_others = lambda *arguments: None
    """),
    "signatures that nobody asks for": (7, "wrong", """
        from nanogpt_buckets.store.vouch import Trust
        Trust.why_unsigned = lambda *arguments: ""
    """),
    "formats that nobody compares": (9, None, """
        from nanogpt_buckets.store import manifest
        manifest.require_format = lambda *arguments: None
    """),
}  # fmt: skip


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_found(fault):
    family, counted, code = PLANTED[fault]
    plant = f"import runpy, sys, textwrap\nexec(textwrap.dedent({code!r}))\nsys.argv[0] = {CHAOS!r}\n"
    start = f"runpy.run_path({CHAOS!r}, run_name='__main__')"

    ran = run("-c", plant + start, "--quick", "--json", f"--family={family}", "--seed=1")

    assert ran.returncode == 1, ran.stderr
    rows = json.loads(ran.stdout)["rows"]
    assert sum(row["survived"] for row in rows) < sum(row["injected"] for row in rows)
    assert counted is None or sum(row[counted] for row in rows) > 0
