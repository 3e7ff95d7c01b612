"""What the README tells a reader to write and to run works as it says."""
import io
import json
import re
import sys

import pytest
from conftest import ROOT

from run import cli

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_program_of_the_readme_trains(tmp_path, capsys):
    source, = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(source.splitlines()) <= 30
    (tmp_path / "second_opinion.py").write_text(source)
    code = cli.main(["train", "--task", str(tmp_path / "second_opinion.py"), "--model", str(ROOT / "tasks/tiny"), "--out", str(tmp_path / "run"),
                     "--steps", "1", "--examples", "2", "--rollouts", "4", "--eval-examples", "4"])
    assert code == 0 and "dev score: " in capsys.readouterr().out.splitlines()[-1]
    calls = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[1])["calls"]
    assert calls["made"] >= 8


def test_the_group_command_prints_what_the_readme_shows(monkeypatch, capsys):
    given, shown = re.search(r"echo '(\{.*?\})' \| python mmgrpo.py group -\n(.*?)\n```", README, re.S).groups()
    monkeypatch.setattr(sys, "stdin", io.StringIO(given))
    assert cli.main(["group", "-"]) == 0 and json.loads(capsys.readouterr().out) == json.loads(shown)


def test_files_options_and_names_of_the_readme_exist():
    for path in re.findall(r"\b(?:tests|tasks|results)/[\w./]+\w", README):
        assert (ROOT / path).exists(), path
    fields = {"--help"} | {f"--{f.replace('_', '-')}" for f in cli.Config.__dataclass_fields__}
    for flag in set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)):
        assert flag in fields, flag
    targets = re.findall(r"^([a-z0-9 -]+):", (ROOT / "Makefile").read_text(), re.M)
    for target in set(re.findall(r"(?:`|^)make ([a-z0-9-]+)", README, re.M)):
        assert any(target in t.split() for t in targets), target


@pytest.mark.parametrize("name", re.findall(r"`(\w+)[`(]", README[README.index("| In the paper"):README.index("Not from the paper")]))
def test_functions_that_the_readme_names_exist(name):
    assert hasattr(cli.mmgrpo, name) or name in ("truncate", "fill", "keep", "format_error")


def test_the_table_of_speeds_is_that_of_the_stored_figures():
    from studies import bench
    stored = json.loads((ROOT / "results" / "bench.json").read_text())
    assert bench.table(stored["figures"]) in README
