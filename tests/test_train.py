"""The laws of training: one step, the order of the data, the commands, going on, and faults."""

import dataclasses
import fcntl
import io
import itertools
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import ROOT, make_model
from hypothesis import given
from hypothesis import strategies as st

import mmgrpo as G
import model as M
from lm.lora import add_lora
from program import InputError, Module, Prediction, Program, ProgramError, Task, tool
from run import cli, loading
from run.figures import ParityError
from run.health import StoppedError


class Pair(Program):
    """Three calls of two modules, whatever comes back: a random LM cannot follow a format."""

    def __init__(self):
        self.first = Module("x -> y", "First.")
        self.second = Module("x -> y", "Second.")

    async def forward(self, x):
        for module in (self.first, self.second, self.second):
            try:
                await module(x=x)
            except ValueError:
                pass
        return Prediction(x=x)


def parity(example, prediction):
    """Random, and another one for every run."""
    return random.Random(repr((example, id(prediction)))).random()


def score_of_fact(example, prediction):
    """Random, and the same one for all runs on an example."""
    return random.Random(example["x"]).random()


TASK = Task(
    Pair(),
    parity,
    train=[{"x": str(i)} for i in range(5)],
    dev=[{"x": "dev"}],
    test=[{"x": "test"}],
)
TASK_OF_FACTS = dataclasses.replace(TASK, metric=score_of_fact)
CONFIG = G.Config(
    examples=3,
    rollouts=4,
    max_tokens=4,
    max_calls=3,
    slots=8,
    steps=2,
    batch_tokens=2000,
)


def one_step(model, tokenizer, config=CONFIG, task=TASK, step=0, reference=None):
    """A training step with a new optimizer -> its metrics."""
    optimizer, _ = G.prepare(model, config)
    return G.train_step(model, tokenizer, optimizer, reference, task, config, step)


def weights_of(model):
    return [p.detach().clone() for p in model.parameters()]


def same(tensors, others):
    return all(torch.equal(a, b) for a, b in zip(tensors, others, strict=True))


def comparable(path):
    """The steps and evaluations of a metrics file, without what no two runs share."""
    lines = []
    for line in path.read_text().splitlines():
        figures = json.loads(line)
        lines.append({k: v for k, v in figures.items() if k not in ("seconds", "dev")})
    return lines


@pytest.fixture
def step_seen(monkeypatch):
    """What a step hands on: the `trajectories` it played and the `rows` of its gradient."""
    seen = SimpleNamespace(trajectories=None, rows=None)
    play, step_gradient = G.play, G.step_gradient

    def watched_play(*args, **options):
        seen.trajectories, seconds = play(*args, **options)
        return seen.trajectories, seconds

    def watched_gradient(model, rows, *args, **options):
        seen.rows = rows
        return step_gradient(model, rows, *args, **options)

    monkeypatch.setattr(G, "play", watched_play)
    monkeypatch.setattr(G, "step_gradient", watched_gradient)
    return seen


@pytest.fixture
def ratios(monkeypatch):
    """The ratios of new to old probabilities, one tensor a call of the loss."""
    seen, policy_loss = [], G.policy_loss

    def watched(new, old, *rest):
        seen.append((new - old).detach().exp())
        return policy_loss(new, old, *rest)

    monkeypatch.setattr(G, "policy_loss", watched)
    return seen


@pytest.fixture
def noisy(monkeypatch):
    """Rewards that differ between runs, as a function of what was sampled."""
    run_programs = G.run_programs

    def reward_of(trajectory):
        ids = itertools.chain(*(call.completion.token_ids for call in trajectory.calls))
        return sum(ids) % 7 / 7

    def noisy(*args, **options):
        runs = run_programs(*args, **options)
        return [dataclasses.replace(t, reward=reward_of(t)) for t in runs]

    monkeypatch.setattr(G, "run_programs", noisy)


# --------------------------------------------------------------------------------------- one step
STEP_FIGURES = {
    "step", "reward", "reward_std", "reward_completed", "statuses", "errors", "surprise", "calls",
    "modules", "loss", "kl", "clipped", "halved", "tokens_distinct", "tokens_forwarded",
    "tokens_unshared", "grad_norm", "lr", "seconds", "parity", "digest",
}  # fmt: skip
MODULE_FIGURES = {
    "calls", "tokens", "entropy", "survival", "zero_variance", "advantage_scale", "grad_share",
}  # fmt: skip


def test_a_step_moves_the_weights_and_reports_itself(model, tokenizer):
    before = weights_of(model)
    m = one_step(model, tokenizer)

    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters()))
    assert set(m) == STEP_FIGURES
    assert set(m["modules"]["second"]) == MODULE_FIGURES
    assert set(m["seconds"]) == {"sampling", "tools", "update"}
    assert m["statuses"]["completed"] == 12
    assert m["calls"]["made"] == 36
    assert m["modules"]["second"]["survival"] == [1, 1]
    assert json.dumps(m)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"short_groups": "truncate"},
        {"short_groups": "fill"},
        {"group_size": 2},
        {"level": "trajectory"},
        {"normalize": "token"},
        {"normalize": "constant"},
        {"baseline": "example", "leave_one_out": True},
        {"scale_rewards": "none"},
        {"scale_rewards": "batch"},
        {"inner_epochs": 2},
        {"correction": "tis", "inner_epochs": 2},
        {"entropy_target": 10.0, "entropy_coef": 1.0},
    ],
)
def test_calls_are_trained_or_of_zero_advantage_or_excluded(model, tokenizer, options):
    config = dataclasses.replace(CONFIG, interrupt=0.3, **options)
    m = one_step(model, tokenizer, config)

    calls = m["calls"]
    assert calls["made"] == calls["trained"] + calls["zero_advantage"] + calls["excluded"]
    assert calls["made"] > 0
    assert calls["trained"] > 0
    assert sum(module["calls"] for module in m["modules"].values()) == calls["made"]
    assert math.isfinite(m["grad_norm"])


def test_interrupted_runs_train_on_exactly_the_surviving_calls(model, tokenizer, step_seen):
    config = dataclasses.replace(CONFIG, examples=5, rollouts=6, interrupt=0.3)
    m = one_step(model, tokenizer, config)

    trajectories, rows = step_seen.trajectories, step_seen.rows
    cut = [t for t in trajectories if t.status == "max_calls"]
    assert 0 < len(cut) < 30
    assert all(len(t.calls) < 3 for t in cut)

    surviving = set()
    groups = G.group_calls(trajectories)
    for group, values in zip(groups, G.advantages(groups, trajectories)):
        for member, advantage in zip(group.members, values):
            if advantage:
                call = trajectories[member.trajectory].calls[member.calls[0]]
                surviving.add(id(call.completion))
    assert {id(row.completion) for row in rows} == surviving
    assert len(rows) == len(surviving) == m["calls"]["trained"]


def test_runs_whose_tool_failed_are_excluded_and_counted(model, tokenizer):
    divisors = [0, 0, 1, 0]

    def divide():
        return 1 / (divisors.pop() if divisors else 1)

    class Flaky(Pair):
        async def forward(self, x):
            await super().forward(x)
            await tool(divide)
            return Prediction()

    m = one_step(model, tokenizer, task=dataclasses.replace(TASK, program=Flaky()))

    assert m["statuses"]["tool_error"] == 3
    assert m["calls"]["excluded"] == 9
    assert m["errors"] == {"divide: ZeroDivisionError: division by zero": 3}


def gives_nan(example, prediction):
    return math.nan


def divides_by_zero(example, prediction):
    return 1 / 0


@pytest.mark.parametrize(
    "metric, says",
    [
        (gives_nan, "the metric gave nan"),
        (divides_by_zero, "ZeroDivisionError"),
    ],
)
def test_a_step_without_any_reward_stops_and_says_why(model, tokenizer, metric, says):
    with pytest.raises(StoppedError, match=f"step 1: 12 of 12 runs were excluded.*{says}"):
        one_step(model, tokenizer, task=dataclasses.replace(TASK, metric=metric))


def test_a_program_that_calls_no_module_stops_and_says_why(model, tokenizer):
    class Idle(Pair):
        async def forward(self, x):
            return Prediction()

    with pytest.raises(ProgramError, match="nothing to train.*no LM calls"):
        one_step(model, tokenizer, task=dataclasses.replace(TASK, program=Idle()))


def test_a_module_that_never_parses_is_seen_in_the_statuses(model, tokenizer):
    class Strict(Pair):
        async def forward(self, x):
            return await self.first(x=x)

    m = one_step(model, tokenizer, task=dataclasses.replace(TASK, program=Strict()))

    assert m["statuses"]["format_error"] + m["statuses"]["length"] == 12
    assert m["reward"] == -1.0
    assert m["calls"] == {"made": 12, "trained": 0, "zero_advantage": 12, "excluded": 0}
    assert m["grad_norm"] == 0


# two updates, the first of which is large
TWO_UPDATES = dataclasses.replace(
    CONFIG,
    inner_epochs=2,
    warmup=0,
    lr=0.01,
    batch_tokens=10**6,
)


def test_the_ratio_is_one_at_the_first_update_and_not_at_the_second(model, tokenizer, ratios):
    one_step(model, tokenizer, dataclasses.replace(TWO_UPDATES, temperature=0.7))

    # one call for each of two modules
    first, second = torch.cat(ratios[:2]), torch.cat(ratios[2:])
    assert torch.allclose(first, torch.ones_like(first), atol=1e-4)
    assert (second - 1).abs().max() > 0.05


@pytest.mark.parametrize(
    "dtype, apart",
    [
        (torch.float32, 1e-4),
        (torch.bfloat16, 0.5),
    ],
)
def test_with_a_correction_the_first_ratio_is_exactly_one(tokenizer, ratios, dtype, apart):
    model = make_model(vocab_size=tokenizer.size).to(dtype)
    m = one_step(model, tokenizer, dataclasses.replace(TWO_UPDATES, correction="tis"))

    # two modules, each for its gradient and for its figures
    first, second = torch.cat(ratios[:4]), torch.cat(ratios[4:])
    assert torch.equal(first, torch.ones_like(first))
    assert (second - 1).abs().max() > 0.05

    # between the sampler and the trainer there is what the dtype rounds away
    correction = m["correction"]
    assert correction["mean"] == pytest.approx(1, abs=apart / 10)
    assert correction["max"] - correction["min"] < 2 * apart


def test_the_entropy_bonus_holds_only_below_its_target(tokenizer):
    """All advantages are 0: below its target the entropy is all there is to train."""

    def constant(example, prediction):
        return 0.5

    def step_with(target):
        model = make_model(vocab_size=tokenizer.size)
        config = dataclasses.replace(CONFIG, entropy_target=target, entropy_coef=0.5)
        m = one_step(model, tokenizer, config, dataclasses.replace(TASK, metric=constant))
        return m, weights_of(model)

    off, start = step_with(0.0)
    assert "entropy_alpha" not in off
    assert off["grad_norm"] == 0.0

    above, weights = step_with(0.01)
    assert above["entropy_alpha"] == 0.0
    assert "entropy" not in above
    assert same(weights, start)

    below, weights = step_with(100.0)
    alpha = 0.5 * (1 - below["entropy_sampled"] / 100)
    assert below["entropy_alpha"] == pytest.approx(alpha)
    assert below["grad_norm"] > 0
    assert below["entropy"] == pytest.approx(below["entropy_sampled"], rel=0.3)
    assert not torch.equal(weights[0], start[0])


def test_the_reference_of_the_kl_is_the_frozen_start(model, tokenizer):
    config = dataclasses.replace(CONFIG, beta=0.5)
    reference = make_model(vocab_size=tokenizer.size)
    start = weights_of(reference)

    m = one_step(model, tokenizer, config, reference=reference)
    assert m["kl"] == pytest.approx(0, abs=1e-6)
    assert same(weights_of(reference), start)

    m = one_step(model, tokenizer, config, step=1, reference=reference)
    assert m["kl"] > 1e-6


def test_with_bf16_weights_a_tiny_step_is_not_rounded_away(model, tokenizer):
    model = model.bfloat16()
    config = dataclasses.replace(CONFIG, lr=1e-6, warmup=0, dtype="bfloat16")
    optimizer, _ = G.prepare(model, config)
    masters = optimizer.param_groups[0]["params"]
    before = [p.clone() for p in masters]

    G.train_step(model, tokenizer, optimizer, None, TASK, config, 0)

    moved = [(a != b).float().mean() for a, b in zip(before, masters)]
    assert min(moved) > 0
    assert same(model.parameters(), [p.bfloat16() for p in masters])


class Word(Program):
    """One call."""

    def __init__(self):
        self.say = Module("x -> y")

    async def forward(self, x):
        return await self.say(x=x)


def test_the_entropy_of_a_step_is_an_estimate_of_the_exact_one(model, tokenizer):
    rollouts, temperature = 400, 0.7
    task = dataclasses.replace(TASK, program=Word(), train=[{"x": "one"}])
    prompt = tokenizer.encode_chat(task.program.say.messages({"x": "one"}))
    config = dataclasses.replace(
        CONFIG, examples=1, rollouts=rollouts, max_tokens=1, temperature=temperature
    )

    m = one_step(model, tokenizer, config, task)

    with torch.no_grad():
        hidden = model(torch.tensor([prompt]))[0, -1:]
        p = (model.logits(hidden)[0, : tokenizer.size] / temperature).softmax(-1)
    exact = -(p * p.log()).sum().item()
    deviation = ((p * p.log().square()).sum() - exact**2).sqrt().item()
    assert exact > 0.5
    estimate = m["modules"]["say"]["entropy"]
    assert abs(estimate - exact) < 4 * deviation / math.sqrt(rollouts)


# ------------------------------------------------------------------------------------- data order
@given(st.integers(1, 12), st.integers(1, 9), st.integers(0, 3), st.integers(1, 12))
def test_every_example_is_seen_once_an_epoch_and_no_more(count, size, seed, steps):
    order = []
    for step in range(steps):
        order += G.batch_of(step, size, count, seed)

    assert len(order) == steps * size
    for begin in range(0, len(order), count):
        epoch = order[begin : begin + count]
        assert len(set(epoch)) == len(epoch)
        assert set(epoch) <= set(range(count))


def test_the_order_changes_with_the_seed_and_the_epoch():
    epochs = []
    for seed in (0, 1):
        for epoch in (0, 1):
            epochs.append(tuple(G.batch_of(epoch, 9, 9, seed)))

    assert len(set(epochs)) == 4
    assert G.batch_of(1, 9, 9, 0) == list(epochs[1])


# -------------------------------------------------------------------------------- the whole command
SOURCE = """
    from program import Module, Prediction, Program, Task


    class Echo(Program):
        def __init__(self):
            self.say = Module("text -> intent", types={{"intent": ("card_fee", "card_lost")}})

        async def forward(self, text):
            return await self.say(text=text)


    def load(data):
        examples = [{{"text": f"number {{i}}"}} for i in range(6)]
        defaults = {{"max_tokens": 5, "eval_examples": 2}}
        return Task(
            Echo(), {metric}, {train}, examples[3:5], examples[5:], defaults=defaults
        )
"""


class Ran(NamedTuple):
    """A command that was run."""

    code: int
    out: str
    error: str
    folder: Path


class Commands:
    """Runs commands on a task file, echo.py, with a small random model."""

    def __init__(self, home, capsys):
        self.home, self.capsys = home, capsys
        self.folder = home / "run"
        self.task = ["--task", str(home / "echo.py")]
        self.model = ["--model", str(home / "model")]

    def call(self, *argv) -> Ran:
        """Any command line."""
        self.capsys.readouterr()
        code = cli.main([*argv])
        out, error = self.capsys.readouterr()
        return Ran(code, out, error, self.folder)

    def write_task(self, metric="lambda e, p: 1.0", train="examples[:3]") -> str:
        source = textwrap.dedent(SOURCE).format(metric=metric, train=train)
        (self.home / "echo.py").write_text(source)
        return source

    def __call__(self, command, *flags, **source) -> Ran:
        self.write_task(**source)
        few = ["--examples", "2", "--rollouts", "2"]
        out = ["--out", str(self.folder)] if command == "train" else []
        return self.call(command, *self.task, *self.model, *few, *out, *flags)


@pytest.fixture
def run(tmp_path, tokenizer, capsys):
    M.save_pretrained(make_model(vocab_size=tokenizer.size), tokenizer, tmp_path / "model")
    return Commands(tmp_path, capsys)


def lines_of(folder):
    """What metrics.jsonl says: steps and evaluations."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def options_kept(folder):
    return json.loads((folder / "config.json").read_text())


def states_of(folder):
    return sorted(folder.glob("state-*"))


def names(paths):
    return [path.name for path in paths]


def test_train_leaves_metrics_checkpoints_and_a_curve(run):
    ran = run("train", "--steps", "3", "--eval-every", "2")

    assert ran.code == 0
    said = f"{run.home / 'echo.py'} dev score: 0.000 -> 0.000 (3 steps, "
    assert ran.out.splitlines()[-1].startswith(said)
    lines = lines_of(ran.folder)
    kinds = [("dev" if "dev" in m else "step", m["step"]) for m in lines]
    assert kinds == [("dev", 0), ("step", 1), ("step", 2), ("dev", 2), ("step", 3), ("dev", 3)]
    dev = lines[0]["dev"]
    assert set(dev) == {"sampled", "greedy"}
    figures = {"score", "stderr", "statuses", "measures", "rollouts", "tokens", "seconds"}
    assert set(dev["greedy"]) == figures
    # the task's own default
    assert options_kept(ran.folder)["max_tokens"] == 5
    assert (ran.folder / "curve.png").read_bytes()[:4] == b"\x89PNG"
    for name in ("best", "last"):
        M.load_pretrained(ran.folder / name)


def test_a_flag_overrides_the_tasks_default(run):
    ran = run("train", "--steps", "1", "--max-tokens", "3")
    assert options_kept(ran.folder)["max_tokens"] == 3


def test_a_run_is_never_written_over(run):
    run("train", "--steps", "0")
    metrics = run.folder / "metrics.jsonl"
    before = metrics.read_text()
    assert before

    ran = run("train", "--steps", "0")
    assert ran.code == 2
    assert "holds a run already, finished at step 0" in ran.error
    assert metrics.read_text() == before


def test_the_same_seed_gives_the_same_weights_and_another_does_not(run, tmp_path):
    def figures(name, seed):
        run(
            "train",
            *("--steps", "2"),
            *("--seed", seed),
            *("--out", str(tmp_path / name)),
            *("--format-failure-score", "-1"),
        )
        return comparable(tmp_path / name / "metrics.jsonl")

    first, second, other = figures("r0", "5"), figures("r1", "5"), figures("r2", "6")
    assert first == second != other


def test_eval_and_show_print_scores_and_a_trace(run):
    ran = run("eval", "--split", "test")
    assert ran.code == 0
    assert "test score, sampled at 1.0: 0.000" in ran.out
    assert "greedy: 0.000" in ran.out
    assert "(1 examples: " in ran.out

    ran = run("show", "--split", "train", "--index", "1")
    assert ran.code == 0
    assert "1. say [0]" in ran.out
    assert "< text: number 1" in ran.out


def test_scores_are_written_over_scores_alone(run, tmp_path):
    scores, other = tmp_path / "scores.json", tmp_path / "metrics.jsonl"
    for _ in range(2):
        assert run("eval", "--out", str(scores)).code == 0
    other.write_text('{"step": 1}\n')
    # a device, by a link: a link is all that a broken check would replace
    device = tmp_path / "device"
    device.symlink_to("/dev/null")
    for path in (other, device):
        ran = run("eval", "--out", str(path))
        assert ran.code == 2
        assert f"--out {path}" in ran.error
    assert other.read_text() == '{"step": 1}\n'
    assert device.is_symlink()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_folder_that_no_run_has_left_is_not_trained_in(run, name):
    run.folder.mkdir()
    (run.folder / name).write_text('{"architectures": []}')
    ran = run("train", "--steps", "1")
    assert ran.code == 2
    assert "holds files that are not a run's" in ran.error
    assert [path.name for path in run.folder.iterdir()] == [name]


def test_the_options_of_a_foreign_run_never_steer_a_terminal(run):
    (run.home / "config.json").write_text(json.dumps({"task": "\x1b[2Jgone"}))
    ran = run("eval")
    assert ran.code == 0
    assert "was trained with --task \\x1b[2Jgone" in ran.error
    assert "\x1b[" not in ran.error.split("note:")[1]


def test_a_full_disk_is_said_in_a_sentence(run, monkeypatch):
    def full(*_, **__):
        raise M.safetensors.SafetensorError("No space left on device")

    monkeypatch.setattr("run.state.safetensors.torch.save_file", full)
    ran = run("train", "--steps", "1")
    assert ran.code == 2
    assert "error: No space left on device" in ran.error


@pytest.mark.parametrize(
    "flags, culprit",
    [
        (["--task", "nowhere"], "--task nowhere: no such task"),
        (["--task", "nowhere.py"], "--task nowhere.py"),
        (["--model", "nowhere"], "nowhere: no such checkpoint folder"),
        (["--rollouts", "0"], "--rollouts: 0"),
        (["--lr", "nan"], "--lr: nan"),
        (["--short-groups", "drop"], "--short-groups: 'drop'"),
        (["--temperature", "0"], "--temperature"),
        (["--top-k", "5"], "--top-k"),
        (["--top-p", "0.9"], "--top-p"),
        (["--prompts", "nowhere.json"], "nowhere.json"),
        (["--dtype", "int8"], "--dtype"),
        (["--data", "nowhere", "--task", "hover"], "nowhere"),
        (["--seed", "9" * 400], "--seed"),
        (["--interrupt", "7"], "--interrupt: 7.0 is above 1"),
        (["--lr=-inf"], "--lr"),
        (["--demo-score=-inf"], "--demo-score"),
    ],
)
def test_a_wrong_option_is_refused_by_name(run, flags, culprit):
    ran = run("train", *flags)
    assert ran.code == 2
    assert ran.error.startswith("error: ")
    assert culprit in ran.error
    assert not (ran.folder / "metrics.jsonl").exists()


def test_an_empty_split_is_refused_by_name(run):
    ran = run("train", train="[]")
    assert ran.code == 2
    assert "its train split is empty" in ran.error


def test_a_bug_in_a_program_is_told_with_its_traceback(run):
    source = run.write_task(metric="None")
    call = "return await self.say(text=text)"
    assert call in source
    (run.home / "echo.py").write_text(source.replace(call, "return undefined_name"))

    ran = run.call("eval", *run.task, *run.model)
    assert ran.code == 2
    assert "Traceback" in ran.error
    assert "undefined_name" in ran.error


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["fly"],
        ["train", "file"],
        ["group"],
        ["train", "--nonsense", "1"],
        ["train", "--lr", "fast"],
        ["prompts", "--strategy", "p -> w"],
    ],
)
def test_a_wrong_command_line_is_refused(argv, capsys):
    with pytest.raises(SystemExit) as e:
        cli.main(argv)
    assert e.value.code == 2
    assert "usage: mmgrpo.py COMMAND" in capsys.readouterr().err


@pytest.mark.parametrize("step", ["9" * 5000, "-1", "1.0", "٣"])
def test_a_step_is_a_number_that_a_run_could_have(step, capsys):
    with pytest.raises(SystemExit) as e:
        cli.main(["replay", "FOLDER", step])
    assert e.value.code == 2
    assert "replay takes RUN STEP" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, value",
    [("rollouts", "8"), ("task", ["hover"]), ("lora_targets", 5), ("resume", 1), ("lr", None)],
)
def test_an_option_of_another_type_is_refused_by_name(name, value):
    flag = f"--{name.replace('_', '-')}"
    with pytest.raises(InputError, match=f"^{flag}: .* is not of type"):
        G.Config(**{name: value})


def test_what_is_wrong_with_a_file_does_not_steer_the_terminal(capsys):
    assert cli.main(["group", "no\x1b[2Jfile"]) == 2
    assert "no\\x1b[2Jfile" in capsys.readouterr().err


def test_a_reader_who_goes_ends_a_command_quietly(tmp_path):
    """As in `… | head -1`: nothing is printed, and the status is that of SIGPIPE."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, str(ROOT / "mmgrpo.py"), "group", str(ROOT / "docs/four_runs.json")]
    ended = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert ended.returncode == cli.READER_GONE
    assert ended.stderr == ""


def test_every_option_has_a_sentence_in_the_help(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])

    out = capsys.readouterr().out
    for field in dataclasses.fields(G.Config):
        assert f"--{field.name.replace('_', '-')}" in out


def test_the_paper_settings_are_options():
    G.Config(
        examples=4,
        rollouts=12,
        steps=750,
        lr=1e-5,
        beta=0.01,
        clip_norm=0.1,
        temperature=0.6,
        short_groups="fill",
    )


# ---------------------------------------------------------------------------------- does it learn?
def test_the_shipped_lm_learns_in_a_few_steps(tiny, tokenizer):
    """Six steps of banking77 raise the reward on the examples trained on."""
    task, _ = loading.load_task({"task": "banking77"})
    task.train = task.train[:8]
    config = G.Config(max_tokens=48, max_calls=1, examples=8, rollouts=8, warmup=0, lr=1e-3)
    model, _ = M.load_pretrained(ROOT / "tasks" / "tiny")
    optimizer, _ = G.prepare(model, config)

    rewards = []
    for step in range(6):
        m = G.train_step(model, tokenizer, optimizer, None, task, config, step)
        rewards.append(m["reward"])
    assert np.mean(rewards[-2:]) > np.mean(rewards[:2]) + 0.1


# --------------------------------------------------------------------------- going on, and parity
def four_steps(**changes):
    return dataclasses.replace(CONFIG, steps=4, eval_every=2, **changes)


def stop_at(turn):
    """A `stop` that says yes when it is asked for the `turn`-th time, and at no other."""
    turns = itertools.count(1)

    def stop():
        return next(turns) == turn

    return stop


def trained(tokenizer, out, config, stop_after=None):
    """Train a small model into `out` -> its weights; interrupted after some steps if asked to."""
    out.mkdir(exist_ok=True)
    model = make_model(vocab_size=tokenizer.size)
    G.train(TASK_OF_FACTS, model, tokenizer, config, out, stop=stop_at(stop_after))
    return weights_of(model)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beta": 0.1, "inner_epochs": 2},
        {"dtype": "bfloat16"},
    ],
)
def test_an_interrupted_run_goes_on_to_the_same_weights_bit_for_bit(
    tmp_path, tokenizer, noisy, options
):
    config = four_steps(**options)
    start = weights_of(make_model(vocab_size=tokenizer.size))
    whole = trained(tokenizer, tmp_path / "whole", config)
    half = trained(tokenizer, tmp_path / "half", config, stop_after=1)
    with (tmp_path / "half" / "metrics.jsonl").open("a") as log:
        log.write('{"step": 2, "reward": "of a step that was lost"}\n{"st')
    assert not same(half, whole)
    assert not same(half, start)

    assert same(trained(tokenizer, tmp_path / "half", config), whole)
    lines = comparable(tmp_path / "half" / "metrics.jsonl")
    assert lines == comparable(tmp_path / "whole" / "metrics.jsonl")
    assert any(m.get("kl", 0) > 1e-9 for m in lines) == bool(config.beta)
    assert len(states_of(tmp_path / "half")) == 2


def cut_its_end(path):
    path.write_bytes(path.read_bytes()[:-9])


def remove(path):
    path.unlink()


def empty(path):
    path.write_bytes(b"")


def change_its_last_byte(path):
    path.write_bytes(path.read_bytes()[:-1] + b"x")


@pytest.mark.parametrize("damage", [cut_its_end, remove, empty, change_its_last_byte])
@pytest.mark.parametrize("file", ["state.safetensors", "state.json"])
def test_a_damaged_state_is_told_and_the_one_before_is_used(
    tmp_path, tokenizer, noisy, capsys, damage, file
):
    whole = trained(tokenizer, tmp_path, four_steps())
    damage(states_of(tmp_path)[-1] / file)

    assert same(trained(tokenizer, tmp_path, four_steps()), whole)
    assert "state-0000004: cannot be used" in capsys.readouterr().err


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_of_other_options_or_another_model_is_refused_untouched(tmp_path, tokenizer, noisy):
    trained(tokenizer, tmp_path, four_steps(), stop_after=1)
    before = files_of(tmp_path)

    with pytest.raises(InputError, match="was begun with --lr 0.0, not 0.1"):
        trained(tokenizer, tmp_path, four_steps(lr=0.1))
    narrow = make_model(vocab_size=tokenizer.size, hidden_size=16)
    with pytest.raises(InputError, match="none of its states can be used"):
        G.train(TASK_OF_FACTS, narrow, tokenizer, four_steps(), tmp_path)
    assert files_of(tmp_path) == before


def test_a_full_disk_leaves_the_older_states(tmp_path, tokenizer, noisy, monkeypatch):
    trained(tokenizer, tmp_path, four_steps(), stop_after=2)
    kept = states_of(tmp_path)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("run.state.safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        trained(tokenizer, tmp_path, four_steps())
    assert states_of(tmp_path) == kept


def test_every_step_of_a_finished_run_can_be_replayed(run):
    run("train", "--steps", "3", "--eval-every", "2")

    for step in ("1", "2", "3"):
        ran = run.call("replay", str(run.folder), step, *run.task)
        assert ran.code == 0
        assert "4 runs, 4 calls: token for token those of the run" in ran.out
        assert "1. say [0]" in ran.out

    ran = run.call("replay", str(run.folder), "4", *run.task)
    assert ran.code == 2
    assert "the run has steps 1 to 3 of" in ran.error


def test_a_step_of_a_run_with_lora_is_replayed_with_its_adapters(tmp_path, capsys):
    flags = [
        *("--task", "banking77"),
        *("--lora-rank", "4"),
        *("--lr", "0.05"),
        *("--warmup", "0"),
        *("--steps", "3"),
        *("--examples", "4"),
        *("--rollouts", "4"),
        *("--eval-examples", "4"),
        *("--out", str(tmp_path)),
    ]
    assert cli.main(["train", *flags]) == 0

    for step in ("1", "3"):
        capsys.readouterr()
        assert cli.main(["replay", str(tmp_path), step]) == 0
        assert "token for token" in capsys.readouterr().out


def positions_off_by_one(monkeypatch):
    place = M.KVCache.place

    def shifted(self, slots, *args):
        longest = place(self, slots, *args)
        self.positions[slots] += 1
        return longest

    monkeypatch.setattr(M.KVCache, "place", shifted)


def slots_keep_what_they_had(monkeypatch):
    place = M.KVCache.place

    def stale(self, *args):
        kept = self.kv.clone()
        longest = place(self, *args)
        self.kv[:, :, :, :, : kept.shape[4]] = kept
        return longest

    monkeypatch.setattr(M.KVCache, "place", stale)


def trainer_forgets_the_temperature(monkeypatch):
    head_gradient = G.head_gradient

    def at_one(hidden, head, targets, temperature, *rest):
        return head_gradient(hidden, head, targets, 1.0, *rest)

    monkeypatch.setattr(G, "head_gradient", at_one)


def trainer_finds_nan(monkeypatch):
    head_gradient = G.head_gradient

    def nan(*args):
        logprobs, rest = head_gradient(*args)
        return logprobs * math.nan, rest

    monkeypatch.setattr(G, "head_gradient", nan)


IN_THE_SAMPLER = positions_off_by_one, slots_keep_what_they_had
IN_THE_TRAINER = trainer_forgets_the_temperature, trainer_finds_nan


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fault", [*IN_THE_SAMPLER, *IN_THE_TRAINER])
def test_a_fault_in_sampler_or_trainer_trips_the_parity_gate(
    model, tokenizer, monkeypatch, noisy, fault, dtype
):
    model = model.to(dtype)
    config = dataclasses.replace(CONFIG, max_tokens=16, slots=4)
    where = r"example \d, rollout \d, (first|second)\[\d\]: token \d+ \(id \d+\)"
    says = rf"{where}: log-prob .* when sampled"

    fault(monkeypatch)
    with pytest.raises(ParityError, match=says):
        one_step(model, tokenizer, dataclasses.replace(config, temperature=0.7))

    # those of the sampler are found under LoRA's dropout too
    if fault in IN_THE_SAMPLER:
        add_lora(model, 4, 8.0, dropout=0.5)
        with pytest.raises(ParityError, match=says):
            one_step(model, tokenizer, dataclasses.replace(config, lora_dropout=0.5))


# ----------------------------------------------------------------------------------------- faults
@pytest.fixture
def memory(monkeypatch):
    """Memory for `room` tokens in a forward pass that is trained; what was asked of it."""
    memory = SimpleNamespace(room=10**6, widths=[], refused=0)
    forward = M.Transformer.forward

    def limited(self, ids, *args, **options):
        if torch.is_grad_enabled():
            width = ids.shape[1]
            memory.widths.append(width)
            if width > memory.room:
                memory.refused += 1
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 EiB")
        return forward(self, ids, *args, **options)

    monkeypatch.setattr(M.Transformer, "forward", limited)
    return memory


def test_a_micro_batch_that_does_not_fit_is_halved_and_changes_nothing(tokenizer, memory, noisy):
    config = dataclasses.replace(CONFIG, batch_tokens=10**6)
    whole = one_step(make_model(vocab_size=tokenizer.size), tokenizer, config)

    memory.room = max(memory.widths) - 1
    m = one_step(make_model(vocab_size=tokenizer.size), tokenizer, config)
    assert m["halved"] == memory.refused > 0
    assert m["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-4)


def test_a_row_that_does_not_fit_alone_is_an_error(model, tokenizer, monkeypatch, noisy):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(G, "head_gradient", full)
    with pytest.raises(torch.OutOfMemoryError):
        one_step(model, tokenizer)


def test_a_gradient_that_is_not_finite_moves_nothing_and_is_told(
    model, tokenizer, monkeypatch, noisy
):
    def infinite(new, *rest):
        return (new * math.inf).sum()

    before = weights_of(model)
    monkeypatch.setattr(G, "policy_loss", infinite)
    m = one_step(model, tokenizer)

    assert m["skipped"] is True
    assert same(weights_of(model), before)


def test_a_step_that_teaches_nothing_moves_nothing(model, tokenizer, noisy, monkeypatch):
    """The optimizer's momentum does not go on alone where no call has an advantage."""

    def none(groups, *rest):
        return [[0.0] * len(group.members) for group in groups]

    optimizer, _ = G.prepare(model, CONFIG)
    G.train_step(model, tokenizer, optimizer, None, TASK, CONFIG, 0)
    before = weights_of(model)

    monkeypatch.setattr(G, "advantages", none)
    m = G.train_step(model, tokenizer, optimizer, None, TASK, CONFIG, 1)
    assert m["calls"]["trained"] == 0
    assert optimizer.state
    assert same(weights_of(model), before)


def test_ctrl_c_saves_the_state_and_the_same_command_goes_on(run, monkeypatch):
    train_step = G.train_step

    def interrupted(*args):
        *_, step, _ = args
        if step == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return train_step(*args)

    monkeypatch.setattr(G, "train_step", interrupted)
    ran = run("train", "--steps", "3")
    assert ran.code == 0
    assert "stopped; the same command with OUT=" in ran.out
    assert "Ctrl-C again" in ran.error
    assert names(states_of(ran.folder)) == ["state-0000000", "state-0000001"]

    ran = run("train", "--steps", "3")
    assert ran.code == 0
    assert "(3 steps, " in ran.out
    assert "going on from step 1" in ran.error


def test_logits_that_are_not_finite_are_told_and_not_sampled(tokenizer, noisy):
    model = make_model(vocab_size=tokenizer.size)
    with torch.no_grad():
        model.norm.weight[0] = math.nan

    with pytest.raises(FloatingPointError, match="logits are not finite"):
        one_step(model, tokenizer)


def test_a_refused_run_leaves_the_options_of_the_first(run):
    run("train", "--steps", "1")
    before = options_kept(run.folder)

    ran = run("train", "--steps", "2", "--seed", "7")
    assert ran.code == 2
    assert "was begun with --seed 0, not 7" in ran.error
    assert options_kept(run.folder) == before

    # more steps go on
    ran = run("train", "--steps", "2")
    assert ran.code == 0
    assert "(2 steps, " in ran.out
    assert options_kept(run.folder)["steps"] == 2


@pytest.mark.parametrize(
    "metrics, goes_on",
    [
        ('{"step": 0, "dev": {"sam', True),
        ('{"step": 0, "dev": {}}\n{"step": 1, "reward": 0.5}\n', False),
    ],
)
def test_without_states_a_run_begins_anew_where_nothing_is_lost(run, metrics, goes_on):
    run.folder.mkdir()
    (run.folder / "metrics.jsonl").write_text(metrics)

    ran = run("train", "--steps", "0")
    assert (ran.code == 0) == goes_on
    assert ("whose states are gone" in ran.error) != goes_on


def test_scores_are_not_lost_on_a_name_that_no_file_can_have(run, tmp_path):
    ran = run("eval", "--out", str(tmp_path))
    assert ran.code == 2
    assert "--out" in ran.error
    assert not ran.out
    assert not Path(f"{tmp_path}.new").exists()


def test_report_names_a_damaged_file(run):
    def report():
        command = [sys.executable, "-m", "run.compare", run.folder]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    run("train", "--steps", "1")
    assert report().stdout.count("|") > 20

    with (run.folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "rew')
    damaged = report()
    assert damaged.returncode == 1
    assert damaged.stderr.startswith("error: ")
    assert "metrics.jsonl, line 4: is no JSON" in damaged.stderr


def test_two_processes_do_not_train_in_one_folder(run):
    run("train", "--steps", "1")
    with (run.folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ran = run("train", "--steps", "2")

    assert ran.code == 2
    assert "another process trains there" in ran.error


def no_metrics(folder):
    (folder / "metrics.jsonl").write_text("")


def no_states(folder):
    for path in states_of(folder):
        path.rename(folder / f"gone-{path.name}")


def no_step_in_the_states(folder):
    for path in states_of(folder):
        (path / "state.json").write_text('{"step": "x"}')


def changed_states(folder, change):
    for path in states_of(folder):
        state = json.loads((path / "state.json").read_text())
        (path / "state.json").write_text(json.dumps(state | change))


def another_step_in_the_states(folder):
    changed_states(folder, {"step": -3})


def no_score_in_the_states(folder):
    changed_states(folder, {"scores": ["x", None]})


def begins_with(line):
    """The metrics begin with this line, and are as long as before."""

    def damage(folder):
        path = folder / "metrics.jsonl"
        first, _, rest = path.read_text().partition("\n")
        path.write_text(line.ljust(len(first)) + "\n" + rest)

    return damage


def renamed(name, other):
    """A figure of the metrics has another name, as long as its own."""

    def damage(folder):
        path = folder / "metrics.jsonl"
        text = path.read_text()
        assert name in text
        assert len(name) == len(other)
        path.write_text(text.replace(name, other))

    return damage


NO_DEV = '{"dev": 1}'
SCORED = '{"score": 0.0, "stderr": 0.0, "seconds": 0.0}'
NO_STATUSES = f'{{"step": 0, "dev": {{"sampled": {SCORED}, "greedy": {SCORED}}}}}'


@pytest.mark.parametrize(
    "damage, says",
    [
        (no_metrics, "is shorter than when"),
        (no_states, "whose states are gone"),
        (no_step_in_the_states, "none of its states can be used"),
        (begins_with("{}"), "line 1: is neither a step nor an evaluation"),
        (begins_with("3"), "line 1: is neither a step nor an evaluation"),
        (begins_with(NO_DEV), "line 1: is neither a step nor an evaluation"),
        (begins_with(NO_STATUSES.replace("0.0", "null")), "line 1: is neither a step nor an"),
        (begins_with(NO_STATUSES.replace("0.0", "NaN")), "line 1: is neither a step nor an"),
        (begins_with(NO_STATUSES), "line 1: is no dev evaluation, with which a run begins"),
        (renamed('"modules"', '"modulez"'), "line 2: is neither a step nor an"),
        (renamed('"greedy"', '"greedx"'), "line 1: is neither a step nor an"),
        (renamed('"stderr"', '"stdfrr"'), "line 1: is neither a step nor an"),
        (another_step_in_the_states, "none of its states can be used"),
        (no_score_in_the_states, "none of its states can be used"),
        (renamed('"surprise"', '"surprize"'), "line 2: is neither a step nor an"),
        (renamed('"trained"', '"trainet"'), "line 2: is neither a step nor an"),
    ],
)
def test_a_damaged_run_is_refused(run, damage, says):
    run("train", "--steps", "1")
    damage(run.folder)

    ran = run("train", "--steps", "2")
    assert ran.code == 2
    assert says in ran.error
    assert "Traceback" not in ran.error


def test_lines_that_grew_are_not_cut_in_the_middle(run):
    run("train", "--steps", "1")
    path = run.folder / "metrics.jsonl"
    path.write_text(path.read_text().replace('"step": 1,', '"step": 1   ,', 1))
    before = path.read_text()

    ran = run("train", "--steps", "2")
    assert ran.code == 2
    assert "metrics.jsonl: is not as it was when state-" in ran.error
    assert path.read_text() == before


def test_a_step_is_replayed_past_a_stray_folder_and_a_damaged_state(run):
    """A stray folder is no state; the step is replayed from the state before the damaged one."""
    run("train", "--steps", "2", "--eval-every", "1")
    (run.folder / "state-foo").mkdir()
    state = run.folder / "state-0000001" / "state.safetensors"
    state.write_bytes(state.read_bytes() + b"x")

    ran = run.call("replay", str(run.folder), "2", *run.task)
    assert ran.code == 0
    assert "token for token" in ran.out


def task_with_defaults(defaults):
    return (
        "from program import *\n"
        f"def load(data): return Task(Program(), None, [], [], [], {defaults})"
    )


@pytest.mark.parametrize(
    "source, says",
    [
        ("x = 1", "has no function load"),
        ("def load(data): return None", "has no function load(data) that returns a Task"),
        (task_with_defaults({"nonsense": 1}), "'nonsense': expected a field of Config"),
        (task_with_defaults({"max_tokens": "24"}), "'max_tokens': expected int"),
    ],
)
def test_a_task_file_without_a_task_is_refused(tmp_path, capsys, source, says):
    (tmp_path / "odd.py").write_text(source)
    assert cli.main(["eval", "--task", str(tmp_path / "odd.py")]) == 2
    assert says in capsys.readouterr().err


def test_a_task_file_may_have_dataclasses_with_future_annotations(run):
    head = """
        from __future__ import annotations
        from dataclasses import dataclass

        @dataclass
        class A:
            x: int
    """
    path = run.home / "echo2.py"
    path.write_text(textwrap.dedent(head).lstrip() + run.write_task())

    assert run.call("eval", "--task", str(path), *run.model).code == 0


# ----------------------------------------------------------- a run that says what is wrong with it
JUDGED = '''
    from pathlib import Path
    from program import Module, Prediction, Program, Task, tool


    class Any(Program):
        """Completes, whatever comes back."""

        def __init__(self):
            self.say = Module("text -> intent")

        async def forward(self, text):
            try:
                await self.say(text=text)
            except ValueError:
                pass
            return Prediction(text=await tool(str.upper, text))


    asked = []


    def metric(example, prediction):
        asked.append(1)
        # 4 for dev, 4 in the first step
        if Path(__file__).with_name("broken").exists() and len(asked) > 8:
            raise {error}
        return len(asked) * 0.7 % 1


    def load(data):
        asked.clear()
        examples = [{{"text": f"number {{i}}", "intent": f"the {{i}}th"}} for i in range(6)]
        defaults = {{"max_tokens": 5, "eval_examples": 2}}
        return Task(
            Any(), metric, examples[:3], examples[3:5], examples[5:], defaults=defaults
        )
'''


def write_judged(home, error="OSError()"):
    path = home / "judged.py"
    path.write_text(textwrap.dedent(JUDGED).format(error=error))
    return str(path)


@pytest.mark.parametrize(
    "error, says",
    [
        ("OSError('no route')", "error: step 2: 4 of 4 runs were excluded"),
        (
            "KeyError('label')",
            "error: the metric failed on example 0, rollout 0: KeyError: 'label'",
        ),
    ],
)
def test_a_failing_metric_stops_the_run_which_goes_on_once_mended(run, error, says):
    def train(*flags):
        return run.call(
            "train",
            *("--task", write_judged(run.home, error)),
            *run.model,
            *("--examples", "2", "--rollouts", "2", "--steps", "3"),
            *("--labelled-demos", "0"),
            *("--out", str(run.folder)),
            *flags,
        )

    broken = run.home / "broken"
    broken.touch()
    ran = train()
    assert ran.code == 2
    assert says in ran.error
    assert f"the same command with OUT={run.folder} goes on from here" in ran.error
    assert names(states_of(run.folder)) == ["state-0000000", "state-0000001"]
    if "OSError" in error:
        first = "the metric raised OSError: no route (the first of its kind"
        assert ran.error.count(first) == 1
        told = (run.folder / "errors.log").read_text()
    else:
        told = ran.error
    # the traceback
    assert "in metric\n" in told

    # other ways to show a run do not matter
    broken.unlink()
    ran = train("--show-every", "1")
    assert ran.code == 0, ran.error


def test_after_steps_that_taught_nothing_a_run_stops_or_has_patience(run):
    """It stops after --patience of them in a row, and goes on with more."""

    def train(patience):
        ran = run("train", "--steps", "6", "--patience", patience)
        lines = lines_of(ran.folder)
        return ran, max(m["step"] for m in lines if "reward" in m), lines

    ran, done, lines = train("2")
    assert (ran.code, done) == (2, 2)
    said = "error: 2 steps in a row taught nothing (--patience 2): no run earned more"
    assert said in ran.error
    assert ran.error.count("step 1: nothing to learn: ") == 1
    assert "step 2: nothing" not in ran.error
    assert "OUT=" in ran.error
    assert "say answered '" in ran.error
    assert lines[-1]["idle"] in ran.error

    # 3 and 4, then 5 at once
    ran, done, _ = train("4")
    assert (ran.code, done) == (2, 4)
    ran, done, _ = train("4")
    assert (ran.code, done) == (2, 5)
    ran, done, _ = train("0")
    assert (ran.code, done) == (0, 6)


def test_without_a_terminal_steps_have_lines_and_some_runs_are_shown(run, tmp_path):
    ran = run("train", "--steps", "3", "--show-every", "2", "--patience", "0")
    assert ran.code == 0
    steps = re.findall(r"^step +(\d+)  reward -1.000  4 ", ran.error, re.M)
    assert steps == ["1", "2", "3"]
    shown = [line for line in ran.out.splitlines() if line.endswith("the first of its runs:")]
    assert [line.split()[1] for line in shown] == ["1,", "3,"]
    assert ran.out.count("1. say [0]") == 2
    assert "entropy" in ran.error
    assert "tokens forwarded of" in ran.error

    ran = run("train", "--steps", "1", "--show-every", "0", "--out", str(tmp_path / "silent"))
    assert ran.code == 0
    assert "first of its runs" not in ran.out


def test_show_has_tools_what_was_expected_and_on_request_the_prompt(run):
    show = ["show", "--task", write_judged(run.home), *run.model]

    ran = run.call(*show)
    assert ran.code == 0
    assert "   tool upper\n    < number 3\n    > NUMBER 3" in ran.out
    assert "expected intent: the 3th" in ran.out
    assert "|" not in ran.out

    ran = run.call(*show, "--show-prompts")
    assert ran.code == 0
    assert "    | <|im_start|>system\n    | Your input fields are:" in ran.out
    assert ran.out.count("<|im_start|>assistant") == 1


def test_nothing_ends_for_want_of_a_character(run, monkeypatch):
    raw = io.BytesIO()
    terminal = io.TextIOWrapper(raw, encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)

    assert run("eval").code == 0
    assert b"0.000 ? 0.000" in raw.getvalue()
    assert run("train", "--steps", "1").code == 0
    assert b"dev 0.000 ? 0.000" in raw.getvalue()


@pytest.mark.parametrize("form", ["relative", "absolute", "from tasks/"])
def test_a_task_file_that_a_runs_folder_names_is_not_run(tmp_path, capsys, form, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evil, folder, trace = tmp_path / "evil.py", tmp_path / "run", tmp_path / "was_here"
    evil.write_text("from pathlib import Path\nPath('was_here').touch()")
    named = {
        "relative": "evil.py",
        "absolute": str(evil),
        "from tasks/": os.path.relpath(tmp_path / "evil", ROOT / "tasks"),
    }[form]
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"task": named}))
    (folder / "metrics.jsonl").write_text('{"step": 1, "reward": 1.0, "digest": ""}\n')

    assert cli.main(["replay", str(folder), "1"]) == 2
    assert f"--task {named}" in capsys.readouterr().err
    assert not trace.exists()

    # given by hand, it is run
    cli.main(["replay", str(folder), "1", "--task", named])
    assert trace.exists()


def test_a_bug_that_a_later_evaluation_finds_costs_no_step(model, tokenizer, tmp_path):
    """The steps before it are kept, and the evaluation is made up for when the bug is mended."""
    evaluated = []

    def metric(example, prediction):
        if example["x"] == "dev":
            # the start was evaluated sampled and greedily
            if len(evaluated) == 2:
                raise KeyError("label")
            evaluated.append(example)
        return parity(example, prediction)

    task = dataclasses.replace(TASK, metric=metric)
    with pytest.raises(ProgramError, match="KeyError: 'label'"):
        G.train(task, model, tokenizer, CONFIG, tmp_path)
    assert names(G.states(tmp_path)) == ["state-0000000", "state-0000002"]
    trained = weights_of(model)

    scores = G.train(TASK, make_model(), tokenizer, CONFIG, tmp_path)
    assert len(scores) == 2
    steps, evaluations = G.read_metrics(tmp_path)
    assert [m["step"] for m in steps] == [1, 2]
    assert [m["step"] for m in evaluations] == [0, 2]
    kept, _ = M.load_pretrained(tmp_path / "last")
    assert same(trained, kept.parameters())


def test_the_folder_of_a_run_is_not_a_checkpoint_and_its_best_is_named(run):
    run("train", "--steps", "1")
    best = run.folder / "best"

    ran = run("eval", "--model", str(run.folder))
    assert ran.code == 2
    said = f"--model {run.folder}: is the folder of a run; its checkpoint is {best}"
    assert said in ran.error
    assert run("eval", "--model", str(best)).code == 0


@pytest.mark.parametrize("device", ["foo", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(run, device):
    ran = run("eval", "--device", device)
    assert ran.code == 2
    assert f"--device {device}" in ran.error


def test_what_a_program_does_to_its_inputs_stays_in_its_run(model, tokenizer):
    class Greedy(Pair):
        async def forward(self, x):
            x.append(1)
            try:
                await self.first(x=x)
            except ValueError:
                pass
            x.append(2)
            return Prediction(n=len(x))

    task = dataclasses.replace(TASK, program=Greedy(), train=[{"x": []}] * 5)
    trajectories, _ = G.sample_step(model, tokenizer, task, CONFIG, 0)

    for t in trajectories:
        assert t.prediction["n"] == 2
        assert len(t.calls[0].inputs["x"]) == 1
    assert trajectories
    assert task.train[0] == {"x": []}
