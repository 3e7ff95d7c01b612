"""The training loop and the command line, end to end with small models."""
import dataclasses
import io
import json
import math
import os
import random
import re
import subprocess
import sys
import textwrap
from pathlib import Path

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
    """Two calls, whatever comes back: a random LM cannot follow a format."""
    def __init__(self):
        self.first, self.second = Module("x -> y", "First."), Module("x -> y", "Second.")

    async def forward(self, x):
        for module in (self.first, self.second, self.second):
            try:
                await module(x=x)
            except ValueError:
                pass
        return Prediction(x=x)


def parity(example, prediction):
    return random.Random(repr((example, id(prediction)))).random()


TASK = Task(Pair(), parity, [{"x": str(i)} for i in range(5)], [{"x": "dev"}], [{"x": "test"}])
CONFIG = G.Config(examples=3, rollouts=4, max_tokens=4, max_calls=3, slots=8, steps=2, batch_tokens=2000)


def one_step(model, tokenizer, config=CONFIG, task=TASK, step=0, reference=None):
    return G.train_step(model, tokenizer, G.prepare(model, config)[0], reference, task, config, step)


# ---------------------------------------------------------------------------------------------------- one step

def test_a_step_moves_the_weights_and_reports_itself(model, tokenizer):
    before = [p.clone() for p in model.parameters()]
    m = one_step(model, tokenizer)
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters()))
    assert set(m) == {"step", "reward", "reward_std", "statuses", "surprise", "calls", "modules", "loss", "kl", "clipped", "halved",
                      "tokens_distinct", "tokens_forwarded", "tokens_unshared", "grad_norm", "lr", "seconds", "parity", "digest", "reward_completed",
                      "errors"}
    assert set(m["modules"]["second"]) == {"calls", "tokens", "entropy", "survival", "zero_variance", "advantage_scale", "grad_share"}
    assert m["statuses"]["completed"] == 12 and m["calls"]["made"] == 36 and m["modules"]["second"]["survival"] == [1, 1]
    assert set(m["seconds"]) == {"sampling", "tools", "update"} and json.dumps(m)


@pytest.mark.parametrize("options", [{}, {"short_groups": "truncate"}, {"short_groups": "fill"}, {"group_size": 2}, {"level": "trajectory"},
                                     {"normalize": "token"}, {"normalize": "constant"}, {"baseline": "example", "leave_one_out": True},
                                     {"scale_rewards": "none"}, {"scale_rewards": "batch"}, {"inner_epochs": 2},
                                     {"correction": "tis", "inner_epochs": 2}, {"entropy_target": 10.0, "entropy_coef": 1.0}])
def test_made_calls_are_trained_or_of_zero_advantage_or_excluded(model, tokenizer, options):
    config = dataclasses.replace(CONFIG, interrupt=0.3, **options)
    m = one_step(model, tokenizer, config)
    calls = m["calls"]
    assert calls["made"] == calls["trained"] + calls["zero_advantage"] + calls["excluded"] > 0 and calls["trained"] > 0
    assert math.isfinite(m["grad_norm"]) and sum(p["calls"] for p in m["modules"].values()) == calls["made"]


def test_interrupted_runs_train_on_exactly_the_surviving_calls(model, tokenizer, monkeypatch):
    seen = {}
    original = G.step_gradient
    monkeypatch.setattr(G, "step_gradient", lambda model, rows, *a, **o: (seen.update(rows=rows), original(model, rows, *a, **o))[1])
    play = G.play
    def watched(*args, **options):
        seen["trajectories"], seconds = play(*args, **options)
        return seen["trajectories"], seconds
    monkeypatch.setattr(G, "play", watched)
    m = one_step(model, tokenizer, dataclasses.replace(CONFIG, examples=5, rollouts=6, interrupt=0.3))
    cut = [t for t in seen["trajectories"] if t.status == "max_calls"]
    assert 0 < len(cut) < 30 and all(len(t.calls) < 3 for t in cut)
    groups = G.group_calls(seen["trajectories"])
    live = [(member, a) for g, values in zip(groups, G.advantages(groups, seen["trajectories"])) for member, a in zip(g.members, values) if a]
    completions = {id(seen["trajectories"][member.trajectory].calls[member.calls[0]].completion) for member, _ in live}
    assert {id(r.completion) for r in seen["rows"]} == completions and len(seen["rows"]) == len(completions) == m["calls"]["trained"]


def test_runs_whose_tool_failed_are_excluded_and_counted(model, tokenizer):
    class Flaky(Pair):
        async def forward(self, x):
            await super().forward(x)
            await tool(lambda: 1 / (self.turn.pop() if self.turn else 1))
            return Prediction()
    program = Flaky()
    program.turn = [0, 0, 1, 0]
    m = one_step(model, tokenizer, task=dataclasses.replace(TASK, program=program))
    assert m["statuses"]["tool_error"] == 3 and m["calls"]["excluded"] == 9
    assert m["errors"] == {"<lambda>: ZeroDivisionError: division by zero": 3}


@pytest.mark.parametrize("metric, says", [(lambda e, p: math.nan, "the metric gave nan"), (lambda e, p: 1 / 0, "ZeroDivisionError")])
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
    assert m["statuses"]["format_error"] + m["statuses"]["length"] == 12 and m["reward"] == -1.0
    assert m["calls"] == {"made": 12, "trained": 0, "zero_advantage": 12, "excluded": 0} and m["grad_norm"] == 0


def test_at_the_first_update_the_ratio_is_one_and_at_the_second_it_is_not(model, tokenizer, monkeypatch):
    ratios = []
    original = G.policy_loss
    monkeypatch.setattr(G, "policy_loss", lambda new, old, *rest: (ratios.append((new - old).detach().exp()), original(new, old, *rest))[1])
    one_step(model, tokenizer, dataclasses.replace(CONFIG, inner_epochs=2, temperature=0.7, warmup=0, lr=0.01, batch_tokens=10**6))
    first, second = torch.cat(ratios[:2]), torch.cat(ratios[2:])
    assert torch.allclose(first, torch.ones_like(first), atol=1e-4) and (second - 1).abs().max() > 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_a_correction_the_first_ratio_is_exactly_one(tokenizer, monkeypatch, dtype):
    ratios, original = [], G.policy_loss
    monkeypatch.setattr(G, "policy_loss", lambda new, old, *rest: (ratios.append((new - old).detach().exp()), original(new, old, *rest))[1])
    m = one_step(make_model(vocab_size=tokenizer.size).to(dtype), tokenizer, dataclasses.replace(
        CONFIG, inner_epochs=2, warmup=0, lr=0.01, batch_tokens=10**6, correction="tis"))
    first, second = torch.cat(ratios[:4]), torch.cat(ratios[4:])            # two modules, each for its gradient and for its figures
    assert torch.equal(first, torch.ones_like(first)) and (second - 1).abs().max() > 0.05
    apart = {torch.float32: 1e-4, torch.bfloat16: 0.5}[dtype]
    assert m["correction"]["mean"] == pytest.approx(1, abs=apart / 10) and m["correction"]["max"] - m["correction"]["min"] < 2 * apart


def test_the_entropy_bonus_holds_where_sampling_is_below_the_target_and_nowhere_else(tokenizer):
    """All advantages are 0: below its target the entropy is all there is to train."""
    steps = {}
    for target in (0.0, 0.01, 100.0):
        model = make_model(vocab_size=tokenizer.size)
        config = dataclasses.replace(CONFIG, entropy_target=target, entropy_coef=0.5)
        m = one_step(model, tokenizer, config, dataclasses.replace(TASK, metric=lambda example, prediction: 0.5))
        steps[target] = m, [p.detach() for p in model.parameters()]
    (off, same), (above, still), (below, moved) = steps.values()
    assert "entropy_alpha" not in off and off["grad_norm"] == 0.0
    assert above["entropy_alpha"] == 0.0 and "entropy" not in above and all(map(torch.equal, same, still))
    assert below["entropy_alpha"] == pytest.approx(0.5 * (1 - below["entropy_sampled"] / 100)) and below["grad_norm"] > 0
    assert below["entropy"] == pytest.approx(below["entropy_sampled"], rel=0.3) and not torch.equal(moved[0], same[0])


def test_the_reference_of_the_kl_is_the_frozen_start(model, tokenizer):
    config = dataclasses.replace(CONFIG, beta=0.5)
    reference = make_model(vocab_size=tokenizer.size)
    m = one_step(model, tokenizer, config, reference=reference)
    assert m["kl"] == pytest.approx(0, abs=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(reference.parameters(), make_model(vocab_size=tokenizer.size).parameters()))
    assert one_step(model, tokenizer, config, step=1, reference=reference)["kl"] > 1e-6


def test_with_bf16_weights_a_tiny_step_is_not_rounded_away(model, tokenizer):
    model = model.bfloat16()
    config = dataclasses.replace(CONFIG, lr=1e-6, warmup=0, dtype="bfloat16")
    optimizer, _ = G.prepare(model, config)
    masters = optimizer.param_groups[0]["params"]
    before = [p.clone() for p in masters]
    G.train_step(model, tokenizer, optimizer, None, TASK, config, 0)
    moved = [(a != b).float().mean() for a, b in zip(before, masters)]
    assert min(moved) > 0 and all(torch.equal(p, m.bfloat16()) for p, m in zip(model.parameters(), masters))


# ------------------------------------------------------------------------------------------------------ data order

@given(st.integers(1, 12), st.integers(1, 9), st.integers(0, 3), st.integers(1, 12))
def test_every_example_is_seen_once_an_epoch_and_no_more(count, size, seed, steps):
    order = [i for step in range(steps) for i in G.batch_of(step, size, count, seed)]
    assert len(order) == steps * size
    for epoch in range(0, len(order), count):
        part = order[epoch:epoch + count]
        assert len(set(part)) == len(part) and set(part) <= set(range(count))


def test_the_entropy_of_a_step_is_an_estimate_of_the_exact_one(model, tokenizer):
    class Word(Program):
        def __init__(self):
            self.say = Module("x -> y")
        async def forward(self, x):
            return await self.say(x=x)
    task = dataclasses.replace(TASK, program=(program := Word()), train=[{"x": "one"}])
    m = one_step(model, tokenizer, dataclasses.replace(CONFIG, examples=1, rollouts=400, max_tokens=1, temperature=0.7), task)
    with torch.no_grad():
        hidden = model(torch.tensor([tokenizer.encode_chat(program.say.messages({"x": "one"}))]))[0, -1:]
        p = (model.logits(hidden)[0, :tokenizer.size] / 0.7).softmax(-1)
    exact, spread = -(p * p.log()).sum().item(), ((p * p.log().square()).sum() - (p * p.log()).sum().square()).sqrt().item()
    assert exact > 0.5 and abs(m["modules"]["say"]["entropy"] - exact) < 4 * spread / 20


def test_the_order_changes_with_the_seed_and_the_epoch():
    epochs = [tuple(G.batch_of(e, 9, 9, seed)) for seed in (0, 1) for e in (0, 1)]
    assert len(set(epochs)) == 4 and G.batch_of(1, 9, 9, 0) == list(epochs[1])


# ------------------------------------------------------------------------------------------------- the whole command

SOURCE = '''
    from program import Module, Prediction, Program, Task
    class Echo(Program):
        def __init__(self):
            self.say = Module("text -> intent", types={{"intent": ("card_fee", "card_lost")}})
        async def forward(self, text):
            return await self.say(text=text)
    def load(data):
        examples = [{{"text": f"number {{i}}"}} for i in range(6)]
        return Task(Echo(), {metric}, {train}, examples[3:5], examples[5:], defaults={{"max_tokens": 5, "eval_examples": 2}})
'''


@pytest.fixture
def run(tmp_path, tokenizer, capsys):
    """Run a command with a task file and a small random model -> (exit code, output, errors, folder of the run)."""
    M.save_pretrained(make_model(vocab_size=tokenizer.size), tokenizer, tmp_path / "model")
    def run(command, *flags, metric="lambda e, p: 1.0", train="examples[:3]"):
        (tmp_path / "echo.py").write_text(textwrap.dedent(SOURCE).format(metric=metric, train=train))
        code = cli.main([command, "--task", str(tmp_path / "echo.py"), "--model", str(tmp_path / "model"), "--examples", "2",
                       "--rollouts", "2", *(["--out", str(tmp_path / "run")] if command == "train" else []), *flags])
        return code, *capsys.readouterr(), tmp_path / "run"
    run.capture, run.task = capsys.readouterr, ("--task", str(tmp_path / "echo.py"))
    return run


def test_train_leaves_metrics_checkpoints_and_a_curve(run):
    code, out, _, folder = run("train", "--steps", "3", "--eval-every", "2")
    assert code == 0 and out.splitlines()[-1].startswith(str(folder.parent / "echo.py") + " dev score: 0.000 -> 0.000 (3 steps, ")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [("dev" if "dev" in m else "step", m["step"]) for m in lines] == [
        ("dev", 0), ("step", 1), ("step", 2), ("dev", 2), ("step", 3), ("dev", 3)]
    assert set(lines[0]["dev"]) == {"sampled", "greedy"} and set(lines[0]["dev"]["greedy"]) == {
        "score", "stderr", "statuses", "measures", "rollouts", "tokens", "seconds"}
    assert json.loads((folder / "config.json").read_text())["max_tokens"] == 5          # the task's own default
    assert (folder / "curve.png").read_bytes()[:4] == b"\x89PNG"
    for name in ("best", "last"):
        M.load_pretrained(folder / name)


def test_a_flag_overrides_the_tasks_default(run):
    _, _, _, folder = run("train", "--steps", "1", "--max-tokens", "3")
    assert json.loads((folder / "config.json").read_text())["max_tokens"] == 3


def test_a_run_is_never_written_over(run):
    run("train", "--steps", "0")
    before = (folder := run("eval")[3]) and (folder / "metrics.jsonl").read_text()
    code, _, error, _ = run("train", "--steps", "0")
    assert code == 2 and "holds a run already, finished at step 0" in error and (folder / "metrics.jsonl").read_text() == before


def test_the_same_seed_gives_the_same_weights_and_another_does_not(run, tmp_path):
    weights = []
    for i, seed in enumerate((5, 5, 6)):
        run("train", "--steps", "2", "--seed", str(seed), "--out", str(tmp_path / f"r{i}"), "--format-failure-score", "-1",
            metric="lambda e, p: 1.0")
        weights.append((tmp_path / f"r{i}" / "metrics.jsonl").read_text())
    figures = [[{k: v for k, v in json.loads(line).items() if k not in ("seconds", "dev")} for line in w.splitlines()] for w in weights]
    assert figures[0] == figures[1] != figures[2]


def test_eval_and_show_print_scores_and_a_trace(run):
    code, out, _, _ = run("eval", "--split", "test")
    assert code == 0 and "test score, sampled at 1.0: 0.000" in out and "greedy: 0.000" in out and "(1 examples: " in out
    code, out, _, _ = run("show", "--split", "train", "--index", "1")
    assert code == 0 and "1. say [0]" in out and "< text: number 1" in out


@pytest.mark.parametrize("flags, culprit", [
    (["--task", "nowhere"], "--task nowhere: no such task"), (["--task", "nowhere.py"], "--task nowhere.py"),
    (["--model", "nowhere"], "nowhere: no such checkpoint folder"), (["--rollouts", "0"], "--rollouts: 0"), (["--lr", "nan"], "--lr: nan"),
    (["--short-groups", "drop"], "--short-groups: 'drop'"), (["--temperature", "0"], "--temperature"), (["--top-k", "5"], "--top-k"),
    (["--top-p", "0.9"], "--top-p"), (["--prompts", "nowhere.json"], "nowhere.json"), (["--dtype", "int8"], "--dtype"),
    (["--data", "nowhere", "--task", "hover"], "nowhere"), (["--seed", "9" * 400], "--seed"), (["--interrupt", "7"], "--interrupt: 7.0 is above 1"),
    (["--lr=-inf"], "--lr"), (["--demo-score=-inf"], "--demo-score")])
def test_a_wrong_option_is_refused_by_name(run, flags, culprit):
    code, _, error, folder = run("train", *flags)
    assert code == 2 and error.startswith("error: ") and culprit in error and not (folder / "metrics.jsonl").exists()


def test_an_empty_split_is_refused_by_name(run):
    code, _, error, _ = run("train", train="[]")
    assert code == 2 and "its train split is empty" in error


def test_a_bug_in_a_program_is_told_with_its_traceback(run, tmp_path):
    _, _, _, folder = run("eval")
    (tmp_path / "echo.py").write_text(textwrap.dedent(SOURCE).format(metric="None", train="examples[:3]").replace(
        "return await self.say(text=text)", "return undefined_name"))
    assert cli.main(["eval", "--task", str(tmp_path / "echo.py"), "--model", str(tmp_path / "model")]) == 2


@pytest.mark.parametrize("argv", [[], ["fly"], ["train", "file"], ["group"], ["train", "--nonsense", "1"], ["train", "--lr", "fast"],
                                  ["prompts", "--strategy", "p -> w"]])
def test_a_wrong_command_line_is_refused(argv, capsys):
    with pytest.raises(SystemExit) as e:
        cli.main(argv)
    assert e.value.code == 2 and "usage: mmgrpo.py COMMAND" in capsys.readouterr().err


def test_every_option_has_a_sentence_in_the_help(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    out = capsys.readouterr().out
    assert all(f"--{f.name.replace('_', '-')}" in out for f in dataclasses.fields(G.Config))


def test_the_paper_settings_are_options():
    G.Config(examples=4, rollouts=12, steps=750, lr=1e-5, beta=0.01, clip_norm=0.1, temperature=0.6, short_groups="fill")


# --------------------------------------------------------------------------------------------------- does it learn?

def test_the_shipped_lm_learns_in_a_few_steps(tiny, tokenizer):
    """Three steps of banking77 with the tiny LM raise the reward on the examples trained on."""
    task, config = loading.load_task({"task": "banking77"})[0], G.Config(max_tokens=48, max_calls=1, examples=8, rollouts=8, warmup=0, lr=1e-3)
    model, _ = M.load_pretrained(ROOT / "tasks" / "tiny")
    task.train = task.train[:8]
    optimizer, _ = G.prepare(model, config)
    rewards = [G.train_step(model, tokenizer, optimizer, None, task, config, step)["reward"] for step in range(6)]
    assert np.mean(rewards[-2:]) > np.mean(rewards[:2]) + 0.1


# ------------------------------------------------------------------------------------------------- going on, and parity

def options_of(tmp_path, **changes):
    return dataclasses.replace(CONFIG, steps=4, eval_every=2, **changes)


def trained(tokenizer, out, config, stop_after=None):
    """Train a small model into `out` -> its weights; interrupted after some steps if asked to be."""
    out.mkdir(exist_ok=True)
    model, steps = make_model(vocab_size=tokenizer.size), []
    G.train(TASK_OF_FACTS, model, tokenizer, config, out, stop=lambda: steps.append(1) or len(steps) == stop_after)
    return model.state_dict()


TASK_OF_FACTS = dataclasses.replace(TASK, metric=lambda example, prediction: random.Random(example["x"]).random())


def equal(a, b):
    return all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def noisy(monkeypatch):
    """Rewards that differ between runs, as a function of what was sampled."""
    original = G.run_programs
    def noisy(*args, **options):
        return [dataclasses.replace(t, reward=sum(i for c in t.calls for i in c.completion.token_ids) % 7 / 7) for t in original(*args, **options)]
    monkeypatch.setattr(G, "run_programs", noisy)


@pytest.mark.parametrize("options", [{}, {"beta": 0.1, "inner_epochs": 2}, {"dtype": "bfloat16"}])
def test_an_interrupted_run_goes_on_to_the_same_weights_bit_for_bit(tmp_path, tokenizer, noisy, options):
    config = options_of(tmp_path, **options)
    whole = trained(tokenizer, tmp_path / "whole", config)
    start = make_model(vocab_size=tokenizer.size).state_dict()
    half = trained(tokenizer, tmp_path / "half", config, stop_after=1)
    with (tmp_path / "half" / "metrics.jsonl").open("a") as log:
        log.write('{"step": 2, "reward": "of a step that was lost"}\n{"st')
    assert not equal(half, whole) and not equal(half, start)
    assert equal(trained(tokenizer, tmp_path / "half", config), whole)
    lines = [[{k: v for k, v in json.loads(line).items() if k not in ("seconds", "dev")} for line in (tmp_path / name / "metrics.jsonl").open()]
             for name in ("whole", "half")]
    assert any(m.get("kl", 0) > 1e-9 for m in lines[1]) == bool(config.beta)
    assert lines[0] == lines[1] and len(list((tmp_path / "half").glob("state-*"))) == 2


@pytest.mark.parametrize("damage", [lambda p: p.write_bytes(p.read_bytes()[:-9]), lambda p: p.unlink(), lambda p: p.write_bytes(b""),
                                    lambda p: p.write_bytes(p.read_bytes()[:-1] + b"x")])
@pytest.mark.parametrize("file", ["state.safetensors", "state.json"])
def test_a_damaged_state_is_told_and_the_one_before_is_used(tmp_path, tokenizer, noisy, capsys, damage, file):
    config = options_of(tmp_path)
    whole = trained(tokenizer, tmp_path / "run", config)
    damage(sorted((tmp_path / "run").glob("state-*"))[-1] / file)
    assert equal(trained(tokenizer, tmp_path / "run", config), whole) and "state-0000004: cannot be used" in capsys.readouterr().err


def test_a_run_of_other_options_or_of_another_model_is_refused_and_left_alone(tmp_path, tokenizer, noisy):
    trained(tokenizer, tmp_path / "run", options_of(tmp_path), stop_after=1)
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    with pytest.raises(InputError, match="was begun with --lr 0.0, not 0.1"):
        trained(tokenizer, tmp_path / "run", options_of(tmp_path, lr=0.1))
    with pytest.raises(InputError, match="none of its states can be used"):
        G.train(TASK_OF_FACTS, make_model(vocab_size=tokenizer.size, hidden_size=16), tokenizer, options_of(tmp_path), tmp_path / "run")
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}


def test_a_full_disk_leaves_the_older_states(tmp_path, tokenizer, noisy, monkeypatch):
    trained(tokenizer, tmp_path / "run", options_of(tmp_path), stop_after=2)
    kept = sorted((tmp_path / "run").glob("state-*"))
    def full(*_, **__):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr("run.state.safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        trained(tokenizer, tmp_path / "run", options_of(tmp_path))
    assert sorted((tmp_path / "run").glob("state-*")) == kept


def test_every_step_of_a_finished_run_can_be_replayed(run):
    _, _, _, folder = run("train", "--steps", "3", "--eval-every", "2")
    for step in (1, 2, 3):
        code, out, _, _ = (cli.main(["replay", str(folder), str(step), *run.task]), *run.capture(), folder)
        assert code == 0 and "4 runs, 4 calls: token for token those of the run" in out and "1. say [0]" in out
    assert cli.main(["replay", str(folder), "4", *run.task]) == 2 and "the run has steps 1 to 3 of" in run.capture()[1]


def test_a_step_of_a_run_with_lora_is_replayed_with_its_adapters(tmp_path, capsys):
    few = [f"--{k}={v}" for k, v in {"steps": 3, "examples": 4, "rollouts": 4, "eval-examples": 4, "warmup": 0, "lr": 0.05}.items()]
    assert cli.main(["train", "--task", "banking77", "--lora-rank", "4", *few, "--out", str(tmp_path / "run")]) == 0
    for step in (1, 3):
        capsys.readouterr()
        assert cli.main(["replay", str(tmp_path / "run"), str(step)]) == 0 and "token for token" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fault", ["position", "temperature", "stale", "nan"])
def test_a_fault_in_sampler_or_trainer_trips_the_parity_gate(model, tokenizer, monkeypatch, noisy, fault, dtype):
    model = model.to(dtype)
    place = M.KVCache.place
    if fault == "position":
        def shifted(self, slots, *args):
            longest = place(self, slots, *args)
            self.positions[slots] += 1
            return longest
        monkeypatch.setattr(M.KVCache, "place", shifted)
    if fault == "temperature":
        head = G.head_gradient
        monkeypatch.setattr(G, "head_gradient", lambda h, w, y, t, *rest: head(h, w, y, 1.0, *rest))
    if fault == "stale":
        def stale(self, *args):                             # the slots keep what they had
            kept = self.kv.clone()
            longest = place(self, *args)
            self.kv[:, :, :, :, :kept.shape[4]] = kept
            return longest
        monkeypatch.setattr(M.KVCache, "place", stale)
    if fault == "nan":
        original = G.head_gradient
        monkeypatch.setattr(G, "head_gradient", lambda *a: (original(*a)[0] * math.nan, original(*a)[1]))
    message = r"example \d, rollout \d, (first|second)\[\d\]: token \d+ \(id \d+\): log-prob .* when sampled"
    with pytest.raises(ParityError, match=message):
        one_step(model, tokenizer, dataclasses.replace(CONFIG, temperature=0.7, max_tokens=16, slots=4))
    if fault in ("position", "stale"):                      # those of the sampler are found under LoRA's dropout too
        add_lora(model, 4, 8.0, dropout=0.5)
        with pytest.raises(ParityError, match=message):
            one_step(model, tokenizer, dataclasses.replace(CONFIG, lora_dropout=0.5, max_tokens=16, slots=4))


# ---------------------------------------------------------------------------------------------------------------- faults

def test_a_micro_batch_that_does_not_fit_is_halved_and_changes_nothing(model, tokenizer, monkeypatch, noisy):
    forward, room, widths, refused = M.Transformer.forward, [10**6], [], []
    def small(self, ids, *args, **options):
        if torch.is_grad_enabled():
            widths.append(ids.shape[1])
            if ids.shape[1] > room[0]:
                refused.append(ids.shape)
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 EiB")
        return forward(self, ids, *args, **options)
    monkeypatch.setattr(M.Transformer, "forward", small)
    whole = one_step(make_model(vocab_size=tokenizer.size), tokenizer, dataclasses.replace(CONFIG, batch_tokens=10**6))
    room[0] = max(widths) - 1
    m = one_step(make_model(vocab_size=tokenizer.size), tokenizer, dataclasses.replace(CONFIG, batch_tokens=10**6))
    assert m["halved"] == len(refused) > 0 and m["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-4)


def test_a_row_that_does_not_fit_alone_is_an_error(model, tokenizer, monkeypatch, noisy):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(G, "head_gradient", full)
    with pytest.raises(torch.OutOfMemoryError):
        one_step(model, tokenizer)


def test_a_gradient_that_is_not_finite_moves_nothing_and_is_told(model, tokenizer, monkeypatch, noisy):
    before = [p.clone() for p in model.parameters()]
    monkeypatch.setattr(G, "policy_loss", lambda new, *rest: (new * math.inf).sum())
    m = one_step(model, tokenizer)
    assert m["skipped"] is True and all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_a_step_that_teaches_nothing_moves_nothing(model, tokenizer, noisy, monkeypatch):
    """The optimizer's momentum does not go on alone where no call has an advantage."""
    optimizer, _ = G.prepare(model, CONFIG)
    G.train_step(model, tokenizer, optimizer, None, TASK, CONFIG, 0)
    before = [p.clone() for p in model.parameters()]
    monkeypatch.setattr(G, "advantages", lambda groups, *rest: [[0.0] * len(g.members) for g in groups])
    metrics = G.train_step(model, tokenizer, optimizer, None, TASK, CONFIG, 1)
    assert metrics["calls"]["trained"] == 0 and optimizer.state
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_ctrl_c_saves_the_state_and_the_same_command_goes_on(run, monkeypatch):
    import signal
    original = G.train_step
    def interrupted(*args):
        if args[-2] == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return original(*args)
    monkeypatch.setattr(G, "train_step", interrupted)
    code, out, error, folder = run("train", "--steps", "3")
    assert code == 0 and "stopped; the same command with OUT=" in out and "Ctrl-C again" in error
    assert [p.name for p in sorted(folder.glob("state-*"))] == ["state-0000000", "state-0000001"]
    code, out, error, _ = run("train", "--steps", "3")
    assert code == 0 and "(3 steps, " in out and "going on from step 1" in error


def test_logits_that_are_not_finite_are_told_and_not_sampled(tokenizer, noisy):
    model = make_model(vocab_size=tokenizer.size)
    with torch.no_grad():
        model.norm.weight[0] = math.nan
    with pytest.raises(FloatingPointError, match="logits are not finite"):
        one_step(model, tokenizer)


def test_a_refused_run_leaves_the_options_of_the_first(run):
    _, _, _, folder = run("train", "--steps", "1")
    before = (folder / "config.json").read_text()
    code, _, error, _ = run("train", "--steps", "2", "--seed", "7")
    assert code == 2 and "was begun with --seed 0, not 7" in error and (folder / "config.json").read_text() == before
    code, out, _, _ = run("train", "--steps", "2")              # more steps go on
    assert code == 0 and "(2 steps, " in out and json.loads((folder / "config.json").read_text())["steps"] == 2


@pytest.mark.parametrize("metrics, goes_on", [('{"step": 0, "dev": {"sam', True), ('{"step": 0, "dev": {}}\n{"step": 1, "reward": 0.5}\n', False)])
def test_a_folder_without_states_is_begun_anew_where_nothing_is_lost(run, metrics, goes_on):
    _, _, _, folder = run("eval")
    folder.mkdir()
    (folder / "metrics.jsonl").write_text(metrics)
    code, _, error, _ = run("train", "--steps", "0")
    assert (code == 0) == goes_on and ("whose states are gone" in error) != goes_on


def test_scores_are_not_lost_on_a_name_that_no_file_can_have(run, tmp_path):
    code, out, error, _ = run("eval", "--out", str(tmp_path))
    assert code == 2 and "--out" in error and not out and not Path(f"{tmp_path}.new").exists()


def test_report_names_a_damaged_file(run):
    _, _, _, folder = run("train", "--steps", "1")
    table = lambda: subprocess.run([sys.executable, "-m", "run.compare", folder], cwd=ROOT, capture_output=True, text=True)
    assert table().stdout.count("|") > 20
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "rew')
    assert table().returncode == 1 and table().stderr.startswith("error: ") and "metrics.jsonl, line 4: is no JSON" in table().stderr


def test_two_processes_do_not_train_in_one_folder(run):
    import fcntl
    _, _, _, folder = run("train", "--steps", "1")
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, _, error, _ = run("train", "--steps", "2")
    assert code == 2 and "another process trains there" in error


def replace_first_line(path, line):
    first, _, rest = path.read_text().partition("\n")
    path.write_text(line.ljust(len(first)) + "\n" + rest)


def rename_in_lines(path, name, other):
    text = path.read_text()
    assert name in text and len(name) == len(other)
    path.write_text(text.replace(name, other))


@pytest.mark.parametrize("damage, says", [
    (lambda f: (f / "metrics.jsonl").write_text(""), "is shorter than when"),
    (lambda f: [p.rename(f / f"gone-{p.name}") for p in f.glob("state-*")], "whose states are gone"),
    (lambda f: replace_first_line(f / "metrics.jsonl", "{}"), "line 1: is neither a step nor an evaluation"),
    (lambda f: replace_first_line(f / "metrics.jsonl", '{"dev": 1}'), "line 1: is no dev evaluation, with which a run begins"),
    (lambda f: replace_first_line(f / "metrics.jsonl", '{"dev": {"sampled": {"statuses": 3}}}'), "line 1: is no dev evaluation"),
    (lambda f: replace_first_line(f / "metrics.jsonl", "3"), "line 1: is neither a step nor an evaluation"),
    (lambda f: rename_in_lines(f / "metrics.jsonl", '"surprise"', '"surprize"'), "line 2: is neither a step nor an"),
    (lambda f: rename_in_lines(f / "metrics.jsonl", '"trained"', '"trainet"'), "line 2: is neither a step nor an"),
    (lambda f: [(p / "state.json").write_text('{"step": "x"}') for p in f.glob("state-*")], "none of its states can be used")])
def test_a_damaged_run_is_refused(run, damage, says):
    _, _, _, folder = run("train", "--steps", "1")
    damage(folder)
    code, _, error, _ = run("train", "--steps", "2")
    assert code == 2 and says in error and "Traceback" not in error


def test_a_stray_folder_is_no_state_and_a_damaged_state_does_not_keep_a_step_from_being_replayed(run):
    _, _, _, folder = run("train", "--steps", "2", "--eval-every", "1")
    (folder / "state-foo").mkdir()
    state = folder / "state-0000001" / "state.safetensors"
    state.write_bytes(state.read_bytes() + b"x")
    assert cli.main(["replay", str(folder), "2", *run.task]) == 0 and "token for token" in run.capture()[0]


@pytest.mark.parametrize("source, says", [
    ("x = 1", "has no function load"), ("def load(data): return None", "has no function load(data) that returns a Task"),
    ("from program import *\ndef load(data): return Task(Program(), None, [], [], [], {'nonsense': 1})", "'nonsense': expected a field of Config"),
    ("from program import *\ndef load(data): return Task(Program(), None, [], [], [], {'max_tokens': '24'})", "'max_tokens': expected int")])
def test_a_task_file_without_a_task_is_refused(tmp_path, capsys, source, says):
    (tmp_path / "odd.py").write_text(source)
    assert cli.main(["eval", "--task", str(tmp_path / "odd.py")]) == 2
    assert says in capsys.readouterr().err


def test_a_task_file_may_have_dataclasses_with_future_annotations(run, tmp_path):
    run("eval")
    text = (tmp_path / "echo.py").read_text()
    (tmp_path / "echo2.py").write_text("from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\n" + text)
    assert cli.main(["eval", "--task", str(tmp_path / "echo2.py"), "--model", str(tmp_path / "model")]) == 0


# --------------------------------------------------------------------------------- a run that says what is wrong with it

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
        if Path(__file__).with_name("broken").exists() and len(asked) > 8:     # 4 for dev, 4 in the first step
            raise {error}
        return len(asked) * 0.7 % 1
    def load(data):
        asked.clear()
        examples = [{{"text": f"number {{i}}", "intent": f"the {{i}}th"}} for i in range(6)]
        return Task(Any(), metric, examples[:3], examples[3:5], examples[5:], defaults={{"max_tokens": 5, "eval_examples": 2}})
'''


@pytest.mark.parametrize("error, says", [
    ("OSError('no route')", "error: step 2: 4 of 4 runs were excluded"),
    ("KeyError('label')", "error: the metric failed on example 0, rollout 0: KeyError: 'label'")])
def test_a_failing_metric_stops_the_run_which_goes_on_once_it_is_mended(run, tmp_path, error, says):
    def train(out, *flags):
        (tmp_path / "judged.py").write_text(textwrap.dedent(JUDGED).format(error=error))
        code = cli.main(["train", "--task", str(tmp_path / "judged.py"), "--model", str(tmp_path / "model"), "--examples", "2", "--rollouts", "2",
                         "--steps", "3", "--labelled-demos", "0", "--out", str(tmp_path / out), *flags])
        return code, run.capture().err, [p.name for p in sorted((tmp_path / out).glob("state-*"))]
    run("eval")
    (tmp_path / "broken").touch()
    code, told, kept = train("run")
    assert code == 2 and says in told and f"the same command with OUT={tmp_path / 'run'} goes on from here" in told
    assert kept == ["state-0000000", "state-0000001"]
    if "OSError" in error:
        assert told.count("the metric raised OSError: no route (the first of its kind") == 1
        assert "in metric\n" in (tmp_path / "run" / "errors.log").read_text()
    else:
        assert "in metric\n" in told                        # the traceback
    (tmp_path / "broken").unlink()
    code, told, _ = train("run", "--show-every", "1")       # other ways to show it do not matter
    assert code == 0, told


def test_after_patience_steps_that_taught_nothing_a_run_stops_and_goes_on_with_more(run):
    def steps(*flags):
        code, _, error, folder = run("train", "--steps", "6", *flags)
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return code, error, max(m["step"] for m in lines if "reward" in m), lines
    code, error, done, lines = steps("--patience", "2")
    assert (code, done) == (2, 2) and "error: 2 steps in a row taught nothing (--patience 2): no run earned more" in error
    assert error.count("step 1: nothing to learn: ") == 1 and "step 2: nothing" not in error and "OUT=" in error
    assert "say answered '" in error and lines[-1]["idle"] in error
    assert steps("--patience", "4")[:1] + steps("--patience", "4")[2:3] == (2, 5)       # 3 and 4, then 5 at once
    assert steps("--patience", "0")[::2] [:2] == (0, 6)


def test_without_a_terminal_every_step_has_a_line_and_some_runs_are_shown(run, tmp_path):
    code, out, error, _ = run("train", "--steps", "3", "--show-every", "2", "--patience", "0")
    assert [line.split()[1] for line in error.splitlines() if re.match(r"step +\d+  reward -1.000  4 ", line)] == ["1", "2", "3"]
    assert [line.split()[1] for line in out.splitlines() if line.endswith("the first of its runs:")] == ["1,", "3,"]
    assert out.count("1. say [0]") == 2 and "entropy" in error and "tokens forwarded of" in error
    code, out, _, _ = run("train", "--steps", "1", "--show-every", "0", "--out", str(tmp_path / "silent"))
    assert code == 0 and "first of its runs" not in out


def test_show_has_tools_what_was_expected_and_on_request_the_prompt(run, tmp_path):
    run("eval")
    (tmp_path / "judged.py").write_text(textwrap.dedent(JUDGED).format(error="OSError()"))
    def shown(*flags):
        assert cli.main(["show", "--task", str(tmp_path / "judged.py"), "--model", str(tmp_path / "model"), *flags]) == 0
        return run.capture().out
    text = shown()
    assert "   tool upper\n    < number 3\n    > NUMBER 3" in text and "expected intent: the 3th" in text and "|" not in text
    text = shown("--show-prompts")
    assert "    | <|im_start|>system\n    | Your input fields are:" in text and text.count("<|im_start|>assistant") == 1


def test_nothing_ends_for_want_of_a_character(run, monkeypatch):
    run("eval")
    terminal = io.TextIOWrapper(raw := io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert run("eval")[0] == 0 and b"0.000 ? 0.000" in raw.getvalue()
    assert run("train", "--steps", "1")[0] == 0 and b"dev 0.000 ? 0.000" in raw.getvalue()


@pytest.mark.parametrize("form", ["relative", "absolute", "from tasks/"])
def test_a_task_file_that_a_runs_folder_names_is_not_run(tmp_path, capsys, form, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evil, folder = tmp_path / "evil.py", tmp_path / "run"
    evil.write_text("from pathlib import Path\nPath('was_here').touch()")
    folder.mkdir()
    named = {"relative": "evil.py", "absolute": str(evil), "from tasks/": os.path.relpath(tmp_path / "evil", ROOT / "tasks")}[form]
    (folder / "config.json").write_text(json.dumps({"task": named}))
    (folder / "metrics.jsonl").write_text('{"step": 1, "reward": 1.0, "digest": ""}\n')
    assert cli.main(["replay", str(folder), "1"]) == 2
    assert f"--task {named}" in capsys.readouterr().err and not (tmp_path / "was_here").exists()
    cli.main(["replay", str(folder), "1", "--task", named])
    assert (tmp_path / "was_here").exists()                 # given by hand, it is run


def test_a_bug_that_a_later_evaluation_finds_costs_no_step(model, tokenizer, tmp_path):
    """The steps before it are kept, and the evaluation is made up for when the bug is mended."""
    found = []

    def metric(example, prediction):
        if example["x"] == "dev" and len(found) == 2:       # sampled and greedily, before the first step
            raise KeyError("label")
        if example["x"] == "dev":
            found.append(example)
        return parity(example, prediction)
    task = dataclasses.replace(TASK, metric=metric)
    with pytest.raises(ProgramError, match="KeyError: 'label'"):
        G.train(task, model, tokenizer, CONFIG, tmp_path)
    assert [p.name for p in G.states(tmp_path)] == ["state-0000000", "state-0000002"]
    trained = [p.clone() for p in model.parameters()]
    scores = G.train(TASK, make_model(), tokenizer, CONFIG, tmp_path)
    assert len(scores) == 2
    steps, evaluations = G.read_metrics(tmp_path)
    assert [m["step"] for m in steps] == [1, 2] and [m["step"] for m in evaluations] == [0, 2]
    kept, _ = M.load_pretrained(tmp_path / "last")
    assert all(map(torch.equal, trained, kept.parameters()))


def test_the_folder_of_a_run_is_not_a_checkpoint_and_its_best_is_named(run):
    _, _, _, folder = run("train", "--steps", "1")
    code, _, error, _ = run("eval", "--model", str(folder))
    assert code == 2 and f"--model {folder}: is the folder of a run; its checkpoint is {folder / 'best'}" in error
    assert run("eval", "--model", str(folder / "best"))[0] == 0


@pytest.mark.parametrize("device", ["foo", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(run, device):
    code, _, error, _ = run("eval", "--device", device)
    assert code == 2 and f"--device {device}" in error


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
    assert {t.prediction["n"] for t in trajectories} == {2} and {len(t.calls[0].inputs["x"]) for t in trajectories} == {1}
    assert task.train[0] == {"x": []}
