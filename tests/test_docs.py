"""Every command in the documentation runs: those of console blocks in a shell, other mentions through the parser."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import click
import pytest

from nanogpt_buckets.cli import cli
from nanogpt_buckets.versions import version_tuple

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob(".github/*.md"), *ROOT.glob("nanogpt_buckets/**/README.md")])
# A console block runs on this machine, or on one that the double of torch_neuronx plays, with or without a device.
BLOCK = re.compile(r"```console(?: (neuron|neuron-packages))?\n(.*?)```", re.DOTALL)
DOUBLE = ROOT / "tests" / "neuron_double"
# Commands that make the very environment these tests run in; what is in those scripts is tested below.
RUN_BY_CI = ("scripts/quickstart", "scripts/test")
# Run with other directories by a test of its own.
RUN_ELSEWHERE = ("scripts/bench_peers --quick", "scripts/check-neuron-compile", "scripts/check-on-device")
# What these tests cannot reach: AWS's package index.
NEVER_RUN = ("pip install --extra-index-url",)
# Places of other machines -> places of this test; some are one, so that what one recipe built the next one finds.
ELSEWHERE = {
    "$PWD/.buckets": ".cache/nanogpt-buckets/cache", "/opt/buckets": "opt", "/run/nanogpt-buckets": "run",
    "/mnt/buckets": "opt", "/mnt/team": ".cache/nanogpt-buckets/cache",
}  # fmt: skip


def commands(block: str) -> Iterator[str]:
    """Yield what a reader would type: `$` lines, with the lines of a here-document that follow."""
    typed: list[str] = []
    end = None
    for line in block.splitlines():
        if line.startswith("$ "):
            typed.append(line[2:])
            found = re.search(r"<<'(\w+)'", line)
            end = found[1] if found else None
        elif end is not None:
            typed[-1] += f"\n{line}"
            end = None if line == end else end
    yield from typed


@pytest.fixture(scope="module")
def machine(kv_cache: Path, plug_in: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with a copy of this tree, as a clone of it would be; what one document built, the next one finds."""
    home = tmp_path_factory.mktemp("docs")
    ignored = shutil.ignore_patterns(".git", ".venv", ".*_cache", "__pycache__")
    shutil.copytree(ROOT, home / "clone", ignore=ignored)
    shutil.copytree(kv_cache, home / ".cache" / "nanogpt-buckets" / "cache")
    git = ["git", "-c", "init.defaultBranch=main"]
    subprocess.run([*git, "init", "-q", home / "clone"], check=True)
    subprocess.run(["git", "-C", home / "clone", "add", "--all"], check=True)
    (home / "clone" / ".venv").symlink_to(Path(sys.prefix))
    plug_in(home / "root", "trn1.2xlarge")
    return home


def neuron(kind: str, home: Path) -> dict[str, str]:
    """Return the environment of a machine with the Neuron packages, and with a device unless it is to have none."""
    paths = [str(DOUBLE / "sdk"), str(DOUBLE / "machine")]
    variables = {"PYTHONPATH": os.pathsep.join(paths), "NEURON_DOUBLE_STATE_DIR": str(home / "state")}
    variables["NANOGPT_BUCKETS_CACHE_DIR"] = str(home / "neuron-cache")
    if kind == "neuron":
        variables |= {"NEURON_DOUBLE_ROOT": str(home / "root"), "NEURON_DOUBLE_CORES": "2"}
    return variables


def shell(script: str, home: Path, kind: str) -> subprocess.CompletedProcess[str]:
    for there, here in ELSEWHERE.items():
        script = script.replace(there, str(home / here))
    names = ("PATH", "LANG", "PIP_CONFIG_FILE")
    variables = {name: os.environ[name] for name in names if name in os.environ}
    variables |= {"HOME": str(home), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{variables['PATH']}"}
    if version_tuple(metadata.version("torch"))[:2] < (2, 10):
        script = script.replace(" --target x86-64-v3", "")  # which torch 2.9 cannot be told
    variables |= neuron(kind, home) if kind else {}
    command = ["bash", "-euo", "pipefail", "-c", script]
    return subprocess.run(command, cwd=home / "clone", env=variables, capture_output=True, text=True)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_runs(document, machine):
    for kind, block in BLOCK.findall(document.read_text(encoding="utf-8")):
        typed = [line for line in commands(block) if not line.startswith(RUN_BY_CI + RUN_ELSEWHERE + NEVER_RUN)]
        run = shell("\n".join(typed), machine, kind)

        assert run.returncode == 0, f"{block}\n{run.stdout}\n{run.stderr}"
        assert "Traceback" not in run.stderr


def test_the_scripts_install_alike_and_run_what_the_readme_shows():
    quickstart, test = ((ROOT / name).read_text(encoding="utf-8") for name in RUN_BY_CI)
    installing = re.compile(r"^.* -m venv .*$|^.*/pip install .*$", re.MULTILINE)

    assert installing.findall(quickstart) == [
        line.replace("--editable '.[dev]'", ".") for line in installing.findall(test)
    ]
    shown = re.findall(r"^\.venv/bin/(nanogpt-buckets .*)$", quickstart, re.MULTILINE)
    first_screen = BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8"))[0][1]
    assert shown == list(commands(first_screen))[2:]


def mentions() -> Iterator[tuple[Path, str]]:
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        for command in re.findall(r"`(nanogpt-buckets [^`]+)`", text):
            yield document, " ".join(command.split())
    for source in sorted((ROOT / "nanogpt_buckets" / "cli").glob("*.py")):
        for command in re.findall(
            r"^ +Example: (nanogpt-buckets .*)$", source.read_text(encoding="utf-8"), re.MULTILINE
        ):
            yield source, command


@pytest.mark.parametrize(("document", "command"), list(mentions()), ids=str)
def test_every_other_mention_is_a_command_that_exists(document, command):
    arguments = shlex.split(command)[1:]
    context = cli.make_context("nanogpt-buckets", arguments)
    while isinstance(context.command, click.Group):
        name, found, rest = context.command.resolve_command(context, [*context._protected_args, *context.args])
        assert found is not None
        context = found.make_context(name, rest, parent=context)


def test_there_are_commands_to_test():
    for document in DOCUMENTS:
        if document.name not in ("CHANGELOG.md",):
            blocks = BLOCK.findall(document.read_text(encoding="utf-8"))
            assert any(list(commands(block)) for _, block in blocks), document
    assert len(list(mentions())) >= 10


def test_links_lead_somewhere():
    for document in DOCUMENTS:
        for link in re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8")):
            assert link.startswith("https://") or (document.parent / link).exists(), f"{document}: {link}"


def test_what_is_promised_is_shown_by_tests_that_exist():
    text = (ROOT / "nanogpt_buckets/store/README.md").read_text(encoding="utf-8")
    named = re.findall(r"\[(test_\w+)\]\(../../(tests/[\w/]+[.]py)\)", text)

    tests = [(name, path) for name, path in named if name != Path(path).stem]
    assert len(tests) > 20
    for name, path in tests:
        assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), name


def test_contributing_fits_on_a_screen_or_two_and_the_workflow_calls_the_test_script():
    assert (ROOT / ".github" / "CONTRIBUTING.md").read_text().count("\n") <= 80
    import yaml

    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert any(step.get("run", "").endswith(" scripts/test") for step in workflow["jobs"]["test"]["steps"])
