"""Where the two directories come from, and what a mount table says about a path."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nanogpt_buckets import mounts, node, settings
from nanogpt_buckets.errors import UntrustedStore, UsageError

TABLE = r"""
22 1 0:21 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 22 0:30 / /home rw,relatime shared:2 - nfs4 efs:/ rw,vers=4.1
31 22 0:31 / /mnt/with\040blank ro,nosuid,noexec - tmpfs tmpfs rw,size=1024k
32 22 0:32 / /homestead rw - xfs /dev/sdb rw
33 22 0:33 / /hidden rw - xfs /dev/sdb rw
34 22 0:34 / /hidden rw - lustre fsx rw
35 22 0:35 / /proc rw - proc proc rw
"""


@pytest.fixture
def table(tmp_path, monkeypatch):
    (tmp_path / "mountinfo").write_text(TABLE.lstrip())
    monkeypatch.setattr(mounts, "_TABLE", tmp_path / "mountinfo")


@pytest.mark.parametrize(
    ("path", "kind", "network"),
    [
        ("/etc", "ext4", False),
        ("/home/me/.cache/not/there", "nfs4", True),
        ("/homestead/me", "xfs", False),
        ("/mnt/with blank/x", "tmpfs", False),
        ("/hidden/x", "lustre", True),
    ],
)
def test_the_longest_mount_point_wins_and_the_later_of_two(table, path, kind, network):
    assert (mounts.mount_of(path).kind, mounts.mount_of(path).network) == (kind, network)


def test_mount_options_are_known(table):
    assert {"ro", "noexec"} <= mounts.mount_of("/mnt/with blank").options


def test_this_machines_table_can_be_read(tmp_path):
    assert mounts.mount_of("/proc/self").kind == "proc"
    assert mounts.mount_of(tmp_path).kind != "unknown"


def test_without_a_table_nothing_is_claimed(tmp_path, monkeypatch):
    monkeypatch.setattr(mounts, "_TABLE", tmp_path / "none")

    assert mounts.mount_of("/home") == mounts.Mount("", "unknown", frozenset())


def test_arguments_before_environment_before_default(tmp_path, monkeypatch):
    assert settings.cache_dir("/x") == settings.cache_dir("/x/")
    assert str(settings.cache_dir()) == os.environ["NANOGPT_BUCKETS_CACHE_DIR"]
    monkeypatch.delenv("NANOGPT_BUCKETS_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert settings.cache_dir() == tmp_path / "nanogpt-buckets" / "cache"


def test_a_home_on_a_network_file_system_keeps_node_data_in_a_private_temporary_directory(table, tmp_path, monkeypatch):
    monkeypatch.delenv("NANOGPT_BUCKETS_LOCAL_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/home/me/.cache")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    path = node.folder(make=True)

    assert path == tmp_path / f"nanogpt-buckets-{os.getuid()}"
    assert path.stat().st_mode & 0o777 == 0o700
    path.chmod(0o775)
    with pytest.raises(UntrustedStore, match="written by its group"):
        node.folder()


def test_a_local_directory_that_was_named_is_taken_wherever_it_is(table, monkeypatch):
    monkeypatch.setenv("NANOGPT_BUCKETS_LOCAL_DIR", "/home/me/local")

    assert str(node.directory()) == "/home/me/local"


@pytest.mark.parametrize("home", ["~nosuchuser/x", None])
def test_a_home_that_nobody_knows_is_a_usage_error(home, monkeypatch):
    if home is None:
        monkeypatch.delenv("HOME")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    for variable in (settings.CACHE_DIR_VARIABLE, settings.LOCAL_DIR_VARIABLE):
        monkeypatch.setenv(variable, home) if home else monkeypatch.delenv(variable)

    for find in (settings.cache_dir, node.directory, lambda: settings.cache_dir(home or "~/x")):
        with pytest.raises(UsageError, match="home directory that cannot be found") as caught:
            find()
        assert "_DIR" in caught.value.hint
    assert settings.cache_dir_option(Path("/x y")) == " --cache-dir '/x y'"


HOMELESS = """
import os, sys
from nanogpt_buckets.cli import main
os.setreuid(54321, 0)  # still root, but whose home nobody knows
main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("cache dir", "--cache-dir"),
        ("cache prune", "--cache-dir"),
        ("status --model=demo --seq=16", "--cache-dir"),
        ("doctor", "--cache-dir"),
        ("report", "NANOGPT_BUCKETS_LOCAL_DIR"),
        ("generate a --model=demo --backend=eager --cache-dir=/nowhere", "NANOGPT_BUCKETS_LOCAL_DIR"),
        ("build --model=demo --seq=16 --cache-dir=~nosuchuser/x", "--cache-dir"),
        ("build --model=demo --plan=~nosuchuser/x", "--plan"),
    ],
)
def test_without_a_home_commands_say_in_one_sentence_what_to_name(arguments, said):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HOME", "XDG", "NANOGPT"))}
    run = subprocess.run([sys.executable, "-c", HOMELESS, *arguments.split()], env=kept, capture_output=True, text=True)

    assert (run.returncode, run.stdout) == (2, "")
    error, hint = run.stderr.splitlines()
    assert error.endswith("is below a home directory that cannot be found")
    assert hint.startswith(f"hint: give a full path in {said}")
