"""The README's Python runs, its plan is a plan, its table of exit codes is the code's, and its first screen is one."""

from __future__ import annotations

import inspect
import json
import re
import shutil
from pathlib import Path

from nanogpt_buckets import Plan, errors

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_python_example_runs(kv_cache, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NANOGPT_BUCKETS_CACHE_DIR", str(shutil.copytree(kv_cache, tmp_path / "copy")))
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)

    # the buckets that the tests have compiled already
    exec(example.replace("seq=[32, 64]", "seq=[32]").replace("max_new_tokens=50", "max_new_tokens=20"), {})

    assert capsys.readouterr().out.startswith("ROMEO:")


def test_the_plan_is_a_plan():
    (plan,) = re.findall(r'`(\{"format".*?\})`', README, re.DOTALL)

    assert len(Plan.from_json(json.loads(plan))) == 1


def test_every_exit_code_is_in_the_table_and_the_other_way_round():
    table = {int(code) for code in re.findall(r"^\| (\d+) \|", README, re.MULTILINE)}
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, errors.BucketsError)]

    assert table == {kind.exit_code for kind in kinds} | {0, 130}


def test_the_first_screen_is_at_most_45_lines():
    assert README.split("\n## ")[0].count("\n") <= 45


def test_the_loss_stated_is_the_loss_measured():
    config = json.loads((Path(errors.__file__).parent / "model" / "demo" / "config.json").read_text())

    assert f"validation loss {config['validation_loss']} nats" in README.replace("\n  ", " ")
