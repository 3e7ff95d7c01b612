"""What the README tells a reader to write and to run works as it says."""
import io
import json
import re
import sys

import pytest
from conftest import ROOT

from run import cli

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_program_of_the_readme_trains(tmp_path, capsys):
    source, = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(source.splitlines()) <= 30
    (tmp_path / "second_opinion.py").write_text(source)
    code = cli.main(["train", "--task", str(tmp_path / "second_opinion.py"), "--model", str(ROOT / "tasks/tiny"), "--out", str(tmp_path / "run"),
                     "--steps", "1", "--examples", "2", "--rollouts", "4", "--eval-examples", "4"])
    assert code == 0 and "dev score: " in capsys.readouterr().out.splitlines()[-1]
    calls = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[1])["calls"]
    assert calls["made"] >= 8


def test_the_python_of_the_programs_page_runs(tmp_path, monkeypatch, capsys):
    modules, by_hand = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "programs.md").read_text(), re.S)
    exec(modules, {})
    exec(by_hand.replace('"runs/by-hand"', repr(str(tmp_path))), {})
    assert "classify [0]" in capsys.readouterr().out and (tmp_path / "last").is_dir()


def test_the_group_command_prints_what_the_page_shows(monkeypatch, capsys):
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    pattern = r"echo '(\{.*?\})' \| python mmgrpo.py group -\n(.*?)\n```"
    given, shown = re.search(pattern, page, re.S).groups()
    monkeypatch.setattr(sys, "stdin", io.StringIO(given))
    assert cli.main(["group", "-"]) == 0 and json.loads(capsys.readouterr().out) == json.loads(shown)


def test_the_four_runs_of_the_readme_have_the_numbers_of_its_table(capsys):
    assert cli.main(["group", str(ROOT / "docs" / "four_runs.json")]) == 0
    wanted = []
    for group in json.loads(capsys.readouterr().out)["groups"]:
        for member in group["members"]:
            advantage, weight = round(member["advantage"], 4), round(member["weight"], 4)
            wanted.append((f"{group['module']}[{group['invocation']}]", member["rollout"], advantage, weight))
    shown, name = [], ""
    for line in README[README.index("| group | run |"):].split("\n\n")[0].splitlines()[2:]:
        cells = [cell.strip().replace("−", "-") for cell in line.strip("|").split("|")]
        name = cells[0] or name
        shown.append((name, int(cells[1]), float(cells[4]), float(cells[5].split()[-1])))
    assert len(shown) == 9 and sorted(shown) == sorted(wanted)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_options_links_and_targets_of_a_page_exist(page):
    text = page.read_text(encoding="utf-8")
    for path in re.findall(r"(?<![\w/])(?:tests|tasks|results|docs|run|prompts|lm|studies)/[\w./-]+\w", text):
        assert (ROOT / path).exists(), path
    for link in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (page.parent / link).exists(), link
    fields = {"--help"} | {f"--{f.replace('_', '-')}" for f in cli.Config.__dataclass_fields__}
    for flag in set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)):
        assert flag in fields, flag
    targets = re.findall(r"^([a-z0-9 -]+):", (ROOT / "Makefile").read_text(), re.M)
    for target in set(re.findall(r"(?:`|^)make ([a-z0-9-]+)", text, re.M)):
        assert any(target in t.split() for t in targets), target


@pytest.mark.parametrize("name", re.findall(r"`(\w+)[`(]", README[README.index("| In the paper"):README.index("Not from the paper")]))
def test_functions_that_the_readme_names_exist(name):
    assert hasattr(cli.mmgrpo, name) or name in ("truncate", "fill", "keep", "format_error")


def test_the_table_of_speeds_is_that_of_the_stored_figures():
    from studies import bench, bench_real
    figures = json.loads((ROOT / "results" / "bench.json").read_text())["figures"]
    page = (ROOT / "docs" / "speed.md").read_text()
    assert bench.table(figures) in page and bench_real.table(figures) in page
