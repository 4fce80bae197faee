"""The folder order is the data flow: nothing imports from below itself, and the light commands stay light."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import nanogpt_buckets

ROOT = Path(nanogpt_buckets.__file__).parent

# A module may import from its own place and from those before it. key.py imports nothing, and model/ hashes with it.
ORDER = [
    "errors", "values", "findings", "versions", "mounts", "files", "owners", "settings", "node", "child", "key",
    "contract", "model", "plan", "steps", "backends", "store", "choice", "costs", "selection", "built", "builder",
    "run", "planning", "regret", "measure", "doctor", "cli", "__main__",
]  # fmt: skip
NO_TORCH = (
    "errors",
    "values",
    "findings",
    "mounts",
    "settings",
    "files",
    "owners",
    "versions",
    "contract",
    "child",
    "plan",
    "key",
    "store",
    "node",
    "doctor",
    "cli",
    "choice",
    "costs",
    "selection",
    "planning",
    "regret",
    "built",
    "builder",
    "backends",
    "steps/__init__",
    "steps/step",
    "steps/recompute",
    "steps/whole",
    "steps/chunk",
    "run/loader",
    "run/misses",
    "run/options",
    "run/report",
)

MODULES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def place(module: Path) -> str:
    return module.parts[0].removesuffix(".py")


def imports(tree: ast.AST, *, top_level_only: bool) -> list[str]:
    nodes = tree.body if top_level_only else ast.walk(tree)
    found = []
    for node in nodes:
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the order"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_a_module_imports_only_from_those_above(module):
    tree = ast.parse((ROOT / module).read_text(encoding="utf-8"))
    here = ORDER.index(place(module))

    for name in imports(tree, top_level_only=False):
        if name.startswith("nanogpt_buckets.") and name.split(".")[1] != "__version__":
            assert ORDER.index(name.split(".")[1]) <= here, f"{module} imports {name}"


@pytest.mark.parametrize("module", [m for m in MODULES if str(m).startswith(NO_TORCH)], ids=str)
def test_light_modules_import_no_torch_at_module_level(module):
    tree = ast.parse((ROOT / module).read_text(encoding="utf-8"))

    heavy = [n for n in imports(tree, top_level_only=True) if n.split(".")[0] in ("torch", "transformers", "rich")]

    assert heavy == []


def test_every_script_in_python_is_checked_like_the_package():
    scripts = [path for path in (ROOT.parent / "scripts").iterdir() if path.is_file() and path.suffix == ""]
    written = {
        f"scripts/{path.name}" for path in scripts if "python" in path.read_text(encoding="utf-8").split("\n")[0]
    }
    settings = tomllib.loads((ROOT.parent / "pyproject.toml").read_text(encoding="utf-8"))
    assert written == set(settings["tool"]["ruff"]["extend-include"])


def loaded_after(*arguments: str) -> set[str]:
    code = (
        "import sys\nfrom nanogpt_buckets.cli import main\n"
        f"try:\n    main({list(arguments)!r})\nexcept SystemExit as e:\n    code = e.code\n"
        "print(' '.join(sys.modules), file=sys.stderr)\nsys.exit(code)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in run.stderr.split()}


@pytest.mark.parametrize(
    "arguments", ["--help", "cache ls", "cache dir", "cache verify", "cache prune", "doctor", "build --help"]
)
def test_light_commands_load_neither_torch_nor_transformers_nor_rich(arguments, demo_cache, monkeypatch):
    monkeypatch.setenv("NANOGPT_BUCKETS_CACHE_DIR", str(demo_cache))

    assert loaded_after(*arguments.split()) & {"torch", "transformers", "rich", "numpy"} == set()


def test_a_build_that_only_hits_and_a_status_load_no_torch(demo_cache, monkeypatch):
    monkeypatch.setenv("NANOGPT_BUCKETS_CACHE_DIR", str(demo_cache))

    for command in ("build", "status"):
        assert (
            loaded_after(command, "--model=demo", "--strategy=recompute", "--seq=16,32", "--json")
            & {"torch", "transformers", "rich"}
            == set()
        )


def test_importing_the_package_loads_nothing():
    code = "import sys, nanogpt_buckets; print(' '.join(m for m in sys.modules if 'nanogpt' in m or m == 'torch'))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert run.stdout.split() == ["nanogpt_buckets"]


def test_public_names_are_exactly_those_promised():
    assert sorted(nanogpt_buckets.__all__) == dir(nanogpt_buckets)
    assert {name for name in nanogpt_buckets.__all__ if getattr(nanogpt_buckets, name) is None} == set()
    with pytest.raises(AttributeError):
        nanogpt_buckets.nothing  # noqa: B018


def test_modules_and_functions_stay_short():
    for module in MODULES:
        text = (ROOT / module).read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 350, module
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{module}: {node.name}"
