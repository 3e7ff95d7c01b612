"""`make reproduce`: which commands it gives, in what order, and what the ledger makes of them."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from lm.tokenizer import CheckpointError
from program import InputError
from studies import reproduce as R

LEDGER = Path("results/LEDGER.md")
# one short study
ONE_TASK = ("--seeds", "1", "--tasks", "banking77")

# the score on test of each arm; 0.2 where it is not here
SCORES = {
    "vanilla": 0.3,
    "p": 0.4,
    "w": 0.5,
    "pw": 0.6,
    "w-equal": 0.55,
    "truncate": 0.41,
    "fill": 0.42,
    "k-diverse": 0.43,
    "trajectory": 0.44,
    "no-std": 0.45,
    "warm-start": 0.46,
}


# ------------------------------------------------------------------------- commands that do not run
def write_json(path, value):
    path.write_text(json.dumps(value))


def leave_training(out, flags):
    """What `train` leaves; with a strategy, of two stages."""
    staged = "--strategy" in flags
    for folder in [out / "1-p", out / "2-w"] if staged else [out]:
        folder.mkdir(parents=True, exist_ok=True)
        evaluation = {"sampled": {"statuses": {"completed": 5}, "score": 0.5}}
        (folder / "metrics.jsonl").write_text(json.dumps({"dev": evaluation}) + "\n")
    if staged:
        module = {"instructions": ["a", "b"], "demos": [[], [{"x": 1}]]}
        start = {"m": {"instruction": "a", "demos": []}}
        candidates = {"modules": {"m": module}, "start": start, "rollouts": 7}
        write_json(out / "1-p" / "candidates.json", candidates)
    # the one that began with demonstrations
    if "banking77-1/w" in str(out):
        write_json(out / "prompts.json", {})
        write_json(out / "start.json", {"rollouts": 64})
    stage = {"rollouts": 10, "tokens": 100, "seconds": 1.0}
    write_json(out / "result.json", {"stages": [stage] * (2 if staged else 1)})


def leave_scores(out, flags):
    """What `eval` leaves: scores of the arm, of "pw" by the seed as well."""
    arm = out.stem.removeprefix("test-")
    score = SCORES.get(arm, 0.2)
    if arm == "pw":
        score += 0.01 * int(flags["--seed"])
    sampled = {"score": score, "stderr": 0.02}
    greedy = {"score": score + 1, "stderr": 0.02}
    write_json(out, {"sampled": sampled, "greedy": greedy})


@pytest.fixture
def commands(monkeypatch, tmp_path):
    """The commands given, (verb, flags) in order; each leaves files as mmgrpo.py does."""
    given = []
    real = subprocess.run

    def run(command, **options):
        if command[0] != sys.executable:
            return real(command, **options)
        verb = command[2]
        flags = dict(zip(command[3::2], command[4::2]))
        given.append((verb, flags))
        leave = leave_training if verb == "train" else leave_scores
        leave(Path(flags["--out"]), flags)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(R.subprocess, "run", run)
    monkeypatch.setattr(R.Study, "estimate", lambda self, jobs: "no time")
    monkeypatch.chdir(tmp_path)
    return given


@pytest.fixture
def reproduce(monkeypatch):
    """reproduce(*options) -> the ledger."""

    def run(*options):
        monkeypatch.setattr(sys, "argv", ["reproduce.py", *options])
        R.main()
        return LEDGER.read_text()

    return run


def row(ledger, *starts):
    """The cells behind those that begin the only such row of the ledger's tables."""
    found = []
    for line in ledger.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[: len(starts)] == list(starts):
            found.append(cells[len(starts) :])
    (cells,) = found
    return cells


# --------------------------------------------------------------------------------------- the ledger
def test_the_ledger_has_means_and_paired_differences(reproduce, commands, capsys):
    text = reproduce("--seeds", "3")

    # of three seeds, 4.30 standard errors are 95%
    half = 4.30 * np.std([0, 0.01, 0.02], ddof=1) / 3**0.5
    assert row(text, "hover", "vanilla")[:2] == ["0.300 ± 0.000", "1.300 ± 0.000"]
    assert row(text, "banking77", "prompts, then weights")[0] == f"0.610 ± {half:.3f}"
    assert row(text, "prompts, then weights − weights")[0] == f"+0.110 ± {half:.3f}"
    assert row(text, "weights − vanilla")[3] == "+0.200 ± 0.000"

    # rollouts, tokens, seconds
    assert row(text, "hover", "prompts")[3:] == ["10", "100", "1"]
    assert row(text, "hover", "prompts, then weights")[3:] == ["20", "200", "2"]

    # the paper's
    assert row(text, "hover", "weights")[2] == "60.2 / 71.0"
    assert row(text, "mean", "prompts, then weights")[2] == "73.4"

    assert row(text, "fill (the paper)")[2] == "-0.080 ± 0.000"
    instructions = ["0.200 (0.020)", "1", *["0.200"] * 3, *["1.200"] * 4]
    assert row(text, "papillon", "m", "instructions") == instructions
    order = (
        "prompts above vanilla; weights above vanilla; prompts, then weights above prompts; "
        "prompts, then weights above weights"
    )
    assert order in text
    for figure in ("arms.png", "rollouts.png", "ablations.png"):
        assert (Path("results") / figure).stat().st_size


def test_test_is_read_after_all_training_and_nothing_is_chosen_on_it(reproduce, commands):
    reproduce("--seeds", "2", "--jobs", "2")

    tests = [i for i, (_, flags) in enumerate(commands) if flags.get("--split") == "test"]
    trainings = [i for i, (verb, _) in enumerate(commands) if verb == "train"]
    assert min(tests) > max(trainings)
    assert len(tests) == 2 * (3 * 5 + 6)
    assert all(commands[i][1]["--eval-examples"] == "0" for i in tests)

    def flags_of(out):
        return next(flags for _, flags in commands if flags["--out"].endswith(out))

    both = flags_of("hover-1/test-pw.json")
    assert both["--model"].endswith("hover-1/pw/2-w/best")
    assert both["--prompts"].endswith("hover-1/pw/1-p/prompts.json")
    assert "--model" not in flags_of("test-vanilla.json")

    # each arm is scored under the prompts that it began with, or found
    began = {}
    for _, flags in commands:
        if "--prompts" in flags and "banking77-1/" in flags["--out"]:
            began[Path(flags["--out"]).stem] = Path(flags["--prompts"]).parent.name
    assert began == {"test-p": "1-p", "test-pw": "1-p", "test-w": "w", "test-w-equal": "w-equal"}


def test_what_is_done_is_skipped_and_what_was_written_about_it_is_kept(reproduce, commands):
    reproduce(*ONE_TASK)
    made = len(commands)
    analysis = "\n## Analysis\n\nWhat it means.\n"
    LEDGER.write_text(LEDGER.read_text() + analysis)
    Path("runs/reproduce/banking77-0/test-p.json").unlink()

    text = reproduce(*ONE_TASK)
    assert len(commands) == made + 1
    assert text.endswith(analysis)
    assert text.count("## Four arms") == 1


# ----------------------------------------------------------------------------------------- refusals
def test_a_command_that_fails_ends_it_with_its_last_words(monkeypatch, reproduce, commands):
    def run(command, stdout, **options):
        stdout.write("error: out of luck\n")
        return SimpleNamespace(returncode=2)

    monkeypatch.setattr(R.subprocess, "run", run)
    monkeypatch.setattr(R, "git", lambda *args: "")
    with pytest.raises(InputError, match="ended with 2.*out of luck"):
        reproduce("--seeds", "1")
    with pytest.raises(InputError, match="--tasks: 'chess'"):
        reproduce("--tasks", "chess")
    with pytest.raises(InputError, match="--tasks: 'hover'.* twice"):
        reproduce("--tasks", "hover,papillon,hover")


def test_a_study_goes_on_with_its_own_options_alone(reproduce, commands):
    reproduce(*ONE_TASK)
    made = len(commands)
    with pytest.raises(InputError, match="was begun with"):
        reproduce(*ONE_TASK, "--model", "other/model")
    with pytest.raises(InputError, match="--seeds and --jobs"):
        reproduce("--seeds", "0")
    assert len(commands) == made

    # a copy that was cut short
    Path("runs/reproduce/banking77-1/w-equal.new").mkdir(parents=True)
    assert "seeds 0 to 1" in reproduce("--seeds", "2", "--tasks", "banking77")


def test_a_study_that_was_killed_goes_on_with_its_own_options_alone(reproduce, commands):
    child = os.fork()
    if not child:
        # nothing of pytest's is run in the child
        with contextlib.suppress(BaseException):
            R.run_all = lambda *_: os._exit(9)
            reproduce(*ONE_TASK)
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 9

    with pytest.raises(InputError, match="was begun with"):
        reproduce(*ONE_TASK, "--model", "other/model")


@pytest.mark.parametrize(
    "file, content",
    [
        ("runs/reproduce/study.json", b'{"options": 3}'),
        ("runs/reproduce/banking77-0/test-p.json", b'{"samp'),
        ("results/LEDGER.md", b"\xff"),
        ("runs/reproduce/banking77-0/w/result.json", b""),
    ],
)
def test_a_damaged_file_is_named_and_the_ledger_stays(reproduce, commands, file, content):
    reproduce(*ONE_TASK)
    made = len(commands)
    Path(file).write_bytes(content)
    before = LEDGER.read_bytes()

    with pytest.raises((InputError, CheckpointError), match=file):
        reproduce(*ONE_TASK)
    assert len(commands) == made
    assert LEDGER.read_bytes() == before


# ----------------------------------------------------------------------------------------- the plan
def test_longer_training_has_the_rollouts_of_prompts_and_weights():
    study = R.Study(Path("nowhere"), list(R.TASKS), 1, {}, "")
    for name in R.TASKS:
        config, task = study.config[name], study.task[name]
        prompts = R.rollouts("p", config.trials, task, config)
        both = prompts + R.rollouts("w", config.steps, task, config)

        steps = study.equal_steps(name)
        assert config.steps < steps
        assert R.rollouts("w", steps, task, config) <= both
        assert both < R.rollouts("w", steps + 1, task, config)


def test_the_papers_numbers_average_to_what_it_reports():
    for arm, reported in enumerate((66.3, 70.0, 71.2, 73.4)):
        mean = np.mean([R.PAPER[task][arm] for task in R.TASKS])
        assert abs(mean - reported) < 0.05, (arm, mean)
    assert "2508.04660" in (R.ROOT / "README.md").read_text()
