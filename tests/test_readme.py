"""What the README tells a reader to write and to run works as it says."""

import io
import json
import re
import sys

import pytest
from conftest import ROOT

from run import cli
from studies import bench, bench_real


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


README = read("README.md")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def python_of(page):
    """The blocks of Python of a page."""
    return re.findall(r"```python\n(.*?)```", page, re.S)


def test_the_program_of_the_readme_trains(tmp_path, capsys):
    (source,) = python_of(README)
    assert len(source.splitlines()) <= 30
    task, out = tmp_path / "second_opinion.py", tmp_path / "run"
    task.write_text(source)

    command = [
        "train",
        *("--task", str(task)),
        *("--model", str(ROOT / "tasks/tiny")),
        *("--out", str(out)),
        *("--steps", "1"),
        *("--examples", "2"),
        *("--rollouts", "4"),
        *("--eval-examples", "4"),
    ]
    assert cli.main(command) == 0

    assert "dev score: " in capsys.readouterr().out.splitlines()[-1]
    _, step, *_ = (out / "metrics.jsonl").read_text().splitlines()
    assert json.loads(step)["calls"]["made"] >= 8


def test_the_python_of_the_programs_page_runs(tmp_path, capsys):
    modules, by_hand = python_of(read("docs/programs.md"))
    exec(modules, {})
    exec(by_hand.replace('"runs/by-hand"', repr(str(tmp_path))), {})

    assert "classify [0]" in capsys.readouterr().out
    assert (tmp_path / "last").is_dir()


def test_the_group_command_prints_what_the_page_shows(monkeypatch, capsys):
    page = read("docs/training.md")
    pattern = r"echo '(\{.*?\})' \| python mmgrpo.py group -\n(.*?)\n```"
    given, shown = re.search(pattern, page, re.S).groups()
    monkeypatch.setattr(sys, "stdin", io.StringIO(given))

    assert cli.main(["group", "-"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(shown)


def printed_members(text):
    """(group, run, advantage, weight) of each member that `group` prints."""
    members = []
    for group in json.loads(text)["groups"]:
        name = f"{group['module']}[{group['invocation']}]"
        for member in group["members"]:
            advantage, weight = round(member["advantage"], 4), round(member["weight"], 4)
            members.append((name, member["rollout"], advantage, weight))
    return members


def shown_members(table):
    """The same of each row of the README's table; a group is named in its first row only."""
    members, name = [], ""
    for line in table.splitlines()[2:]:
        cells = [cell.strip().replace("−", "-") for cell in line.strip("|").split("|")]
        name = cells[0] or name
        weight = cells[5].split()[-1]
        members.append((name, int(cells[1]), float(cells[4]), float(weight)))
    return members


def test_the_four_runs_of_the_readme_have_the_numbers_of_its_table(capsys):
    assert cli.main(["group", str(ROOT / "docs" / "four_runs.json")]) == 0

    printed = printed_members(capsys.readouterr().out)
    table, *_ = README[README.index("| group | run |") :].split("\n\n")
    shown = shown_members(table)
    assert len(shown) == 9
    assert sorted(shown) == sorted(printed)


FOLDERS = "tests|tasks|results|docs|run|prompts|lm|studies"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_options_links_and_targets_of_a_page_exist(page):
    text = page.read_text(encoding="utf-8")
    options = {"--help"} | {f"--{f.replace('_', '-')}" for f in cli.Config.__dataclass_fields__}
    rules = re.findall(r"^([a-z0-9 -]+):", read("Makefile"), re.M)
    targets = {target for rule in rules for target in rule.split()}

    for path in re.findall(rf"(?<![\w/])(?:{FOLDERS})/[\w./-]+\w", text):
        assert (ROOT / path).exists(), path
    for link in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (page.parent / link).exists(), link
    for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]+", text):
        assert flag in options, flag
    for target in re.findall(r"(?:`|^)make ([a-z0-9-]+)", text, re.M):
        assert target in targets, target


TABLE_OF_NAMES = README[README.index("| In the paper") : README.index("Not from the paper")]
OPTIONS_AND_STATUSES = "truncate", "fill", "keep", "format_error"


@pytest.mark.parametrize("name", re.findall(r"`(\w+)[`(]", TABLE_OF_NAMES))
def test_functions_that_the_readme_names_exist(name):
    assert hasattr(cli.mmgrpo, name) or name in OPTIONS_AND_STATUSES


def test_the_table_of_speeds_is_that_of_the_stored_figures():
    figures = json.loads(read("results/bench.json"))["figures"]
    page = read("docs/speed.md")
    assert bench.table(figures) in page
    assert bench_real.table(figures) in page
