"""What a run says of itself: why nothing was learned, that it collapses, what was excluded, how it goes on."""
import dataclasses
import io
import json
import random
import re
import sys

import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from strategies import trajectory, trajectory_sets

import mmgrpo as G
from program import Call, Completion
from run.figures import measure
from run.health import collapsed, idle_steps, nothing_to_learn, remarks, too_many_excluded
from run.terminal import lenient_output, shorten, show, step_line, trial_line

CONFIG = G.Config(max_tokens=48, max_calls=3)


# --------------------------------------------------------------------------------------- nothing to learn

def ended(status: str, text: str = "", error: str = "", tokens: int = 5, reward: float = -1.0, example: str = "e0"):
    """A run of one call that ended like this."""
    completion = Completion([1] * 9, [3] * tokens, [-1.0] * tokens, "stop", text)
    call = Call("classify", 0, completion=completion, error=error)
    return dataclasses.replace(trajectory(example, 0, [], reward, status), calls=(call,))


UNREADABLE = ended("format_error", "The customer asks\nfor a refund. " * 20, "intent is missing")


@pytest.mark.parametrize("runs, options, says", [
    ([UNREADABLE] * 3, {}, ["3 format_error", "classify answered 'The customer asks for a refund.", "(intent is missing)",
                            "--labelled-demos", "--warm-start"]),
    ([UNREADABLE] * 3, {"format_failure_score": 0.0}, ["--format-failure-score", "--failure-score"]),
    ([ended("length", "<reasoning>The", "intent is missing")] * 3, {}, ["3 length", "--max-tokens (now 48)"]),
    ([ended("length", "", "intent is missing", tokens=0)] * 3, {}, ["leave no room in the LM's context"]),
    ([ended("max_calls", reward=0.0)] * 3, {}, ["3 max_calls", "--max-calls (now 3)"]),
    ([ended("completed", reward=0.5)] * 3, {}, ["3 completed, reward 0.500", "--temperature", "--rollouts", "--examples"]),
    ([ended("completed", reward=0.5), ended("completed", reward=1.0, example="e1")], {}, ["(2 completed)"]),
    ([UNREADABLE] * 3 + [ended("tool_error")], {}, ["(3 format_error, reward -1.000)"]),
    ([ended("completed", reward=0.5)], {"rollouts": 1}, ["it has no others; --rollouts"])])
def test_a_step_that_taught_nothing_says_why_and_which_option_would_help(runs, options, says):
    sentence = nothing_to_learn(runs, dataclasses.replace(CONFIG, **options))
    assert all(part in sentence for part in says), sentence
    assert "\n" not in sentence and len(sentence) < 500


def test_advice_names_options_that_there_are():
    named = set(re.findall(r"--[a-z][a-z-]+", (ROOT / "run" / "health.py").read_text(encoding="utf-8")))
    there = {f"--{f.name.replace('_', '-')}" for f in dataclasses.fields(G.Config)}
    assert len(named) > 10 and named <= there


def test_what_an_lm_says_does_not_steer_the_terminal():
    run = ended("completed", reward=1.0)
    steering = "\x1b[2J\x07\x9b1mfine\x7f"
    call = dataclasses.replace(run.calls[0], inputs={"x": steering}, outputs={"y": steering})
    shown = show(dataclasses.replace(run, calls=(call,), prediction={"y": steering}))
    assert shown.count("\\x1b[2J\\x07\\x9b1mfine\\x7f") == 3
    assert all(c == "\n" or c.isprintable() for c in shown)


def test_what_is_shown_of_a_long_answer_is_cut():
    assert shorten("a\n b" * 99, 10) == "a ba ba ba…" and shorten("a\n b", 10) == "a b" and shorten(["é"]) == '["é"]'


@pytest.mark.parametrize("excluded, stops", [(0, False), (5, False), (6, True), (10, True)])
def test_a_step_is_not_trained_on_where_most_of_its_runs_are_excluded(excluded, stops):
    failed = dataclasses.replace(ended("tool_error", reward=None), error="judge: OSError: no route")
    sentence = too_many_excluded([failed] * excluded + [ended("completed")] * (10 - excluded))
    assert bool(sentence) == stops
    if stops:
        assert f"{excluded} of 10 runs were excluded" in sentence and sentence.endswith("judge: OSError: no route")


# ------------------------------------------------------------------------------------------ rows of steps

def line(step, trained=4, completed=8, failed=0, surprise=1.0, reward_completed=0.5):
    """A step's line in metrics.jsonl, as far as it is looked at."""
    return {"step": step, "reward": 0.5, "calls": {"trained": trained}, "surprise": surprise,
            "statuses": {"completed": completed, "format_error": failed, "tool_error": 1},
            "reward_completed": reward_completed} | ({} if trained else {"idle": "all alike"})


# a step that taught; one whose runs were alike and failed; one whose runs were alike and completed
KINDS = {"t": {}, "f": {"trained": 0, "completed": 0, "failed": 8}, "c": {"trained": 0}}


def told(kinds, collapse=None):
    """The lines of such steps, and what was said after each."""
    history, said = [], []
    for i, kind in enumerate(kinds, 1):
        history.append(line(i, **KINDS[kind]))
        if i == collapse:
            history[-1]["collapse"] = "entropy is gone"
        said.append(remarks(history))
    return history, said


@given(st.lists(st.sampled_from("tf"), max_size=12).map("".join))
def test_steps_that_taught_nothing_are_counted_from_the_last_one_that_taught(kinds):
    history, said = told(kinds)
    assert idle_steps(history) == len(kinds.rsplit("t")[-1])
    starts = [i for i, k in enumerate(kinds) if k == "f" and (i == 0 or kinds[i - 1] == "t")]
    assert [i for i, s in enumerate(said) if s] == starts
    assert all(said[i] == [f"step {i + 1}: nothing to learn: all alike"] for i in starts)


@pytest.mark.parametrize("kinds, collapse, counts", [
    ("tcctc", None, [0, 0, 0, 0, 0]),               # learned, or too hard today: other examples follow
    ("tcfcff", None, [0, 0, 1, 0, 1, 2]),
    ("ccc", None, [1, 2, 3]),                       # nothing was ever learned: the metric may be a constant
    ("fcc", None, [1, 2, 3]),
    ("ttcc", 2, [0, 0, 1, 2])])                     # alike because the run collapsed
def test_runs_that_complete_alike_stop_a_run_only_where_it_learns_no_more(kinds, collapse, counts):
    history, _ = told(kinds, collapse)
    assert [idle_steps(history[:i]) for i in range(1, len(kinds) + 1)] == counts


def test_that_runs_complete_alike_is_told_once():
    _, said = told("tcctcffc")
    assert [bool(s) for s in said] == [k == "1" for k in "01000100"]


# ---------------------------------------------------------------------------------------------- collapse

# as measured on SmolLM2-135M: nine steps teach it to be readable, and take its entropy
MEASURED = [.64, .57, .58, .33, .25, .06, .13, .13, .02, .10, .10, .006, .03, .02, .01, .01, .01]
FLAT = [.4, .2, .3, .35, .2, .3, .25, .4, .3, .2, .3, .35, .25, .3, .3, .2, .3]


def collapse_at(surprises, rewards):
    """(step at which each sentence comes, sentence) of a run with these figures."""
    history, found = [], []
    for i, (surprise, reward) in enumerate(zip(surprises, rewards), 1):
        history.append(line(i, surprise=surprise, reward_completed=reward))
        history = json.loads(json.dumps(history))           # as read back where a run goes on
        if sentence := collapsed(history):
            history[-1]["collapse"] = sentence
        found += [(i, s) for s in remarks(history)]
    return found


def test_a_run_that_loses_its_entropy_for_nothing_says_so_once():
    (step, sentence), = collapse_at(MEASURED, FLAT)
    assert 12 <= step <= 15 and sentence.startswith(f"step {step}: the entropy of what is sampled fell from 0.597 to 0.0")
    assert all(option in sentence for option in ("--beta", "--lr", "--clip-high", "--entropy-target", "--examples"))


@pytest.mark.parametrize("surprises, rewards", [
    (MEASURED, [i / 20 for i in range(17)]),                            # it learns
    (MEASURED, [None] * 12 + [.2, .3, .2, .3, .2]),                     # too few completed to judge by
    ([.6, .6, .6, .6, .01, .6, .6, .02, .6, .6], FLAT),                 # a dip of one step
    ([.01, .6, .6, .05, .05, .05, .05, .05], FLAT),                     # a start of one step that is not typical
    ([.6, .5, .5, .3, .2, .1, .1, .08, .08, .08], FLAT),                # not by 90%
    ([.6, .01, .01, .01, .01], FLAT), ([0.0] * 9, FLAT)])
def test_a_run_that_learns_or_wavers_is_not_called_collapsed(surprises, rewards):
    assert collapse_at(surprises, rewards) == []


def test_a_run_that_is_never_readable_can_collapse_too():
    (_, sentence), = collapse_at(MEASURED, [None] * 17)
    assert "no run completes" in sentence


@given(st.integers(0, 2**32), st.floats(0.01, 1000), st.floats(-100, 100))
def test_the_scale_of_the_rewards_does_not_matter(seed, scale, shift):
    rng = random.Random(seed)
    rewards = [rng.gauss(rng.choice([0, .02]) * i, 0.1) for i in range(17)]
    at = lambda values: [step for step, _ in collapse_at(MEASURED, values)]
    assert at(rewards) == at([scale * r + shift for r in rewards])


# ----------------------------------------------------------------------------------------- figures, lines

@given(trajectory_sets(), st.integers())
def test_the_entropy_of_the_modules_is_that_of_their_own_tokens(trajectories, seed):
    rng = random.Random(seed)
    def other(call):
        logprobs = [-rng.random() for _ in call.completion.logprobs]
        return dataclasses.replace(call, completion=dataclasses.replace(call.completion, logprobs=logprobs))
    trajectories = [dataclasses.replace(t, calls=tuple(map(other, t.calls))) for t in trajectories]
    if not any(t.votes for t in trajectories):
        return
    m = measure(trajectories, [], [])
    for name, figures in m["modules"].items():
        own = [-x for t in trajectories for c in t.calls if c.module == name for x in c.completion.logprobs]
        assert figures["entropy"] == (pytest.approx(sum(own) / len(own)) if own else None)
    total = sum(p["tokens"] * (p["entropy"] or 0) for p in m["modules"].values())
    tokens = sum(p["tokens"] for p in m["modules"].values())
    assert m["surprise"] == pytest.approx(total / max(tokens, 1))
    completed = [t.reward for t in trajectories if t.status == "completed"]
    assert m["reward_completed"] == (pytest.approx(sum(completed) / len(completed)) if completed else None)
    assert sum(m["errors"].values()) == m["statuses"]["tool_error"] and json.dumps(m)


def test_failures_are_counted_by_kind():
    failed = [dataclasses.replace(ended("tool_error"), error=f"search: KeyError: '{name}'") for name in ("Rome", "Paris")]
    odd = dataclasses.replace(ended("tool_error"), error="the metric gave nan")
    assert measure([*failed, odd, UNREADABLE], [], [])["errors"] == {"search: KeyError: …": 2, "the metric gave nan": 1}


def test_a_step_and_a_trial_are_told_in_a_line_each():
    m = line(3) | {"seconds": {"sampling": 1.0, "tools": 0.5, "update": 2.0}, "tokens_forwarded": 2640, "tokens_unshared": 41000}
    assert step_line(m) == ("step    3  reward 0.500  8 completed, 1 tool_error  entropy 1.000  sampling 1.5 s, update 2.0 s  "
                            "2,640 tokens forwarded of 41,000")
    assert "not finite" in step_line(m | {"skipped": True})
    trial = {"trial": 4, "full": True, "examples": 100, "score": 0.25, "statuses": {"completed": 100}, "seconds": 1.25}
    assert trial_line(trial, 0.5) == "trial   4  score 0.250 (100 examples, all of dev)  best 0.500  100 completed  1.2 s"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_what_a_terminal_cannot_show_is_replaced(monkeypatch, encoding):
    terminal = io.TextIOWrapper(raw := io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", terminal)
    lenient_output()
    print("0.5 ± 0.1 → «€» \ud800 end")
    assert raw.getvalue().endswith(b" end\n")               # line by line: nothing waits for the end


def test_what_json_cannot_hold_is_shown_as_python_writes_it():
    """A tool may give anything; a trace that is printed while training must not end it."""
    endless = []
    endless.append(endless)
    assert shorten({(1, 2): "x"}) == "{(1, 2): 'x'}" and shorten(endless) == "[[...]]"
    assert shorten({"a": b"x"}) == '{"a": "b\'x\'"}'
