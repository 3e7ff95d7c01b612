"""What a run writes down as it goes, and what a library that draws it is given."""

import json
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT

import mmgrpo as G
from program import InputError
from run import cli
from run.journal import Journal, numbers_of

STEP = {
    "step": 3,
    "reward": 0.5,
    "digest": "ab",
    "idle": None,
    "survival": [1.0],
    "seconds": {"update": 2.0},
}


def test_only_numbers_are_drawn_under_the_paths_of_their_names():
    assert numbers_of(STEP) == {"step": 3, "reward": 0.5, "seconds/update": 2.0}


@pytest.fixture
def library(monkeypatch):
    """A stand-in for trackio and wandb; it has what it was told."""
    told = []
    fake = SimpleNamespace(
        init=lambda **options: told.append(("init", options["name"], options["config"])),
        log=lambda numbers, step: told.append(("log", step, numbers)),
        finish=lambda: told.append(("finish",)),
    )
    monkeypatch.setitem(sys.modules, "trackio", fake)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return told


@pytest.mark.parametrize("log", ["trackio", "wandb"])
def test_a_library_is_told_of_every_line_and_of_the_end(tmp_path, library, log):
    journal = Journal(tmp_path, append=False, log=log, options={"lr": 1})
    journal.write(STEP)
    journal.close()
    assert library[0] == ("init", tmp_path.name, {"lr": 1})
    assert library[1:] == [("log", 3, numbers_of(STEP)), ("finish",)]
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == STEP


def test_lines_are_added_to_those_that_are_there_only_where_asked(tmp_path):
    for append, lines in ((False, 1), (True, 2), (False, 1)):
        journal = Journal(tmp_path, append)
        journal.write(STEP)
        journal.close()
        assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == lines


def test_tensorboard_gets_files_in_the_folder_of_the_run(tmp_path):
    pytest.importorskip("tensorboard")
    journal = Journal(tmp_path, append=False, log="tensorboard")
    journal.write(STEP)
    journal.close()
    assert list(tmp_path.glob("events.*"))


def test_a_library_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match="--log wandb: cannot be imported .*pip install wandb"):
        Journal(tmp_path, append=False, log="wandb")
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_training_tells_the_library_of_its_steps_and_scores(tmp_path, library):
    command = [
        "train",
        "--task",
        "banking77",
        "--model",
        str(ROOT / "tasks/tiny"),
        "--log",
        "wandb",
    ]
    sizes = ["--steps", "1", "--examples", "2", "--rollouts", "2", "--eval-examples", "2"]
    assert cli.main([*command, *sizes, "--out", str(tmp_path / "run")]) == 0
    steps = [entry[1] for entry in library if entry[0] == "log"]
    assert steps == [0, 1, 1] and library[-1] == ("finish",)
    assert "reward" in library[2][2] and "dev/sampled/score" in library[1][2]
    assert G.Config().log == "none"
