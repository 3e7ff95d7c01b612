"""`make reproduce`: which commands it gives, in what order, and what the ledger makes of what they leave."""
import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from lm.tokenizer import CheckpointError
from program import InputError
from studies import reproduce as R

GAIN = {"vanilla": 0.3, "p": 0.4, "w": 0.5, "pw": 0.6, "w-equal": 0.55, "truncate": 0.41, "fill": 0.42, "k-diverse": 0.43, "trajectory": 0.44,
        "no-std": 0.45, "warm-start": 0.46}


@pytest.fixture
def commands(monkeypatch, tmp_path):
    """The commands given, in order; each leaves files as mmgrpo.py does, with scores of the arm, the task and the seed."""
    given, real = [], subprocess.run

    def run(command, **options):
        if command[0] != sys.executable:
            return real(command, **options)
        verb, flags = command[2], dict(zip(command[3::2], command[4::2]))
        given.append((verb, flags))
        out = Path(flags["--out"])
        if verb == "train":
            for folder in [out / "1-p", out / "2-w"] if "--strategy" in flags else [out]:
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "metrics.jsonl").write_text(json.dumps({"dev": {"sampled": {"statuses": {"completed": 5}, "score": 0.5}}}) + "\n")
            if "--strategy" in flags:
                module = {"instructions": ["a", "b"], "demos": [[], [{"x": 1}]]}
                start = {"m": {"instruction": "a", "demos": []}}
                (out / "1-p/candidates.json").write_text(json.dumps({"modules": {"m": module}, "start": start, "rollouts": 7}))
            if "banking77-1/w" in str(out):                 # the one that began with demonstrations
                (out / "prompts.json").write_text("{}")
                (out / "start.json").write_text('{"rollouts": 64}')
            stages = [{"rollouts": 10, "tokens": 100, "seconds": 1.0}] * (1 + ("--strategy" in flags))
            (out / "result.json").write_text(json.dumps({"stages": stages}))
        else:
            arm = out.stem.removeprefix("test-")
            score = GAIN.get(arm, 0.2) + 0.01 * int(flags["--seed"]) * (arm == "pw")
            out.write_text(json.dumps({how: {"score": score + (how == "greedy"), "stderr": 0.02} for how in ("sampled", "greedy")}))
        return SimpleNamespace(returncode=0)
    monkeypatch.setattr(R.subprocess, "run", run)
    monkeypatch.setattr(R.Study, "estimate", lambda self, jobs: "no time")
    monkeypatch.chdir(tmp_path)
    return given


def reproduce(monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *options])
    R.main()
    return Path("results/LEDGER.md").read_text()


def row(text, *starts):
    cells, = ([c.strip() for c in line.strip("|").split("|")] for line in text.splitlines()
              if [c.strip() for c in line.strip("|").split("|")][:len(starts)] == list(starts))
    return cells[len(starts):]


def test_the_ledger_has_means_and_paired_differences(monkeypatch, commands, capsys):
    text = reproduce(monkeypatch, "--seeds", "3")
    assert row(text, "hover", "vanilla")[:2] == ["0.300 ± 0.000", "1.300 ± 0.000"]
    half = 4.30 * np.std([0, 0.01, 0.02], ddof=1) / 3**0.5
    assert row(text, "banking77", "prompts, then weights")[0] == f"0.610 ± {half:.3f}"
    assert row(text, "prompts, then weights − weights")[0] == f"+0.110 ± {half:.3f}" and row(text, "weights − vanilla")[3] == "+0.200 ± 0.000"
    assert row(text, "hover", "prompts")[3:] == ["10", "100", "1"] and row(text, "hover", "prompts, then weights")[3:] == ["20", "200", "2"]
    assert row(text, "hover", "weights")[2] == "60.2 / 71.0" and row(text, "mean", "prompts, then weights")[2] == "73.4"
    assert row(text, "fill (the paper)")[2] == "-0.080 ± 0.000"
    assert row(text, "papillon", "m", "instructions") == ["0.200 (0.020)", "1", *["0.200"] * 3, *["1.200"] * 4]
    assert "prompts above vanilla; weights above vanilla; prompts, then weights above prompts; prompts, then weights above weights" in text
    assert all((Path("results") / f).stat().st_size for f in ("arms.png", "rollouts.png", "ablations.png"))


def test_test_is_read_when_all_trainings_are_done_and_nothing_is_chosen_on_it(monkeypatch, commands):
    reproduce(monkeypatch, "--seeds", "2", "--jobs", "2")
    tests = [i for i, (_, flags) in enumerate(commands) if flags.get("--split") == "test"]
    assert min(tests) > max(i for i, (verb, _) in enumerate(commands) if verb == "train")
    assert len(tests) == 2 * (3 * 5 + 6) and all(commands[i][1]["--eval-examples"] == "0" for i in tests)
    both = next(flags for _, flags in commands if flags["--out"].endswith("hover-1/test-pw.json"))
    assert both["--model"].endswith("hover-1/pw/2-w/best") and both["--prompts"].endswith("hover-1/pw/1-p/prompts.json")
    began = {Path(flags["--out"]).stem: flags["--prompts"] for _, flags in commands if "--prompts" in flags and "banking77-1/" in flags["--out"]}
    assert {arm: Path(at).parts[-2] for arm, at in began.items()} == {"test-p": "1-p", "test-pw": "1-p", "test-w": "w", "test-w-equal": "w-equal"}
    assert "--model" not in next(flags for _, flags in commands if flags["--out"].endswith("test-vanilla.json"))


def test_what_is_done_is_skipped_and_what_was_written_about_it_is_kept(monkeypatch, commands):
    reproduce(monkeypatch, "--seeds", "1", "--tasks", "banking77")
    ledger, made = Path("results/LEDGER.md"), len(commands)
    ledger.write_text(ledger.read_text() + "\n## Analysis\n\nWhat it means.\n")
    Path("runs/reproduce/banking77-0/test-p.json").unlink()
    text = reproduce(monkeypatch, "--seeds", "1", "--tasks", "banking77")
    assert len(commands) == made + 1 and text.endswith("\n## Analysis\n\nWhat it means.\n") and text.count("## Four arms") == 1


def test_a_command_that_fails_ends_it_with_its_last_words(monkeypatch, commands, tmp_path):
    def run(command, stdout, **options):
        stdout.write("error: out of luck\n")
        return SimpleNamespace(returncode=2)
    monkeypatch.setattr(R.subprocess, "run", run), monkeypatch.setattr(R, "git", lambda *args: "")
    with pytest.raises(InputError, match="ended with 2.*out of luck"):
        reproduce(monkeypatch, "--seeds", "1")
    with pytest.raises(InputError, match="--tasks: 'chess'"):
        reproduce(monkeypatch, "--tasks", "chess")
    with pytest.raises(InputError, match="--tasks: 'hover'.* twice"):
        reproduce(monkeypatch, "--tasks", "hover,papillon,hover")


def test_a_study_goes_on_with_its_own_options_alone(monkeypatch, commands):
    reproduce(monkeypatch, "--seeds", "1", "--tasks", "banking77")
    made = len(commands)
    with pytest.raises(InputError, match="was begun with"):
        reproduce(monkeypatch, "--seeds", "1", "--tasks", "banking77", "--model", "other/model")
    with pytest.raises(InputError, match="--seeds and --jobs"):
        reproduce(monkeypatch, "--seeds", "0")
    assert len(commands) == made
    Path("runs/reproduce/banking77-1").mkdir()
    (Path("runs/reproduce/banking77-1") / "w-equal.new").mkdir()                    # a copy that was cut short
    assert "seeds 0 to 1" in reproduce(monkeypatch, "--seeds", "2", "--tasks", "banking77")


def test_a_study_that_was_killed_goes_on_with_its_own_options_alone(monkeypatch, commands):
    if not (child := os.fork()):
        with contextlib.suppress(BaseException):
            R.run_all = lambda *_: os._exit(9)
            reproduce(monkeypatch, "--seeds", "1", "--tasks", "banking77")
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    with pytest.raises(InputError, match="was begun with"):
        reproduce(monkeypatch, "--seeds", "1", "--tasks", "banking77", "--model", "other/model")


@pytest.mark.parametrize("file, text", [("runs/reproduce/study.json", b'{"options": 3}'), ("runs/reproduce/banking77-0/test-p.json", b'{"samp'),
                                        ("results/LEDGER.md", b"\xff"), ("runs/reproduce/banking77-0/w/result.json", b"")])
def test_a_damaged_file_is_named_and_the_ledger_stays(monkeypatch, commands, file, text):
    before, made = reproduce(monkeypatch, "--seeds", "1", "--tasks", "banking77"), len(commands)
    Path(file).write_bytes(text)
    with pytest.raises((InputError, CheckpointError), match=file):
        reproduce(monkeypatch, "--seeds", "1", "--tasks", "banking77")
    assert len(commands) == made and (Path("results/LEDGER.md").read_bytes() == text or Path("results/LEDGER.md").read_text() == before)


def test_longer_training_takes_as_many_rollouts_as_prompts_and_weights_together():
    study = R.Study(Path("nowhere"), list(R.TASKS), 1, {}, "")
    for t in R.TASKS:
        c, task = study.config[t], study.task[t]
        both = R.rollouts("p", c.trials, task, c) + R.rollouts("w", c.steps, task, c)
        steps = study.equal_steps(t)
        assert c.steps < steps and R.rollouts("w", steps, task, c) <= both < R.rollouts("w", steps + 1, task, c)


def test_the_papers_numbers_average_to_what_it_reports():
    """66.3, 70.0, 71.2, 73.4 are its averages."""
    means = [np.mean([R.PAPER[t][i] for t in R.TASKS]) for i in range(4)]
    assert all(abs(a - b) < 0.05 for a, b in zip(means, (66.3, 70.0, 71.2, 73.4))), means
    assert re.search("2508.04660", (R.ROOT / "README.md").read_text())
