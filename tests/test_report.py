"""What a run says of itself: why it learns nothing, that it collapses, what it left out, lines."""

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


# --------------------------------------------------------------------------------- nothing to learn
def ended(status, text="", error="", tokens=5, reward=-1.0, example="e0"):
    """A run of one call that ended like this."""
    completion = Completion([1] * 9, [3] * tokens, [-1.0] * tokens, "stop", text)
    call = Call("classify", 0, completion=completion, error=error)
    return dataclasses.replace(trajectory(example, 0, [], reward, status), calls=(call,))


def failing(error):
    """A run that a tool's error ended."""
    return dataclasses.replace(ended("tool_error", reward=None), error=error)


UNREADABLE = ended("format_error", "The customer asks\nfor a refund. " * 20, "intent is missing")
CUT = ended("length", "<reasoning>The", "intent is missing")
NO_ROOM = ended("length", "", "intent is missing", tokens=0)
ENDLESS = ended("max_calls", reward=0.0)
HALF = ended("completed", reward=0.5)
FULL_OF_ANOTHER = ended("completed", reward=1.0, example="e1")

UNREADABLE_SAYS = [
    "3 format_error",
    "classify answered 'The customer asks for a refund.",
    "(intent is missing)",
    "--labelled-demos",
    "--warm-start",
]
ALIKE_SAYS = ["3 completed, reward 0.500", "--temperature", "--rollouts", "--examples"]
FAILING_SCORES_BEST = {"format_failure_score": 0.0}


@pytest.mark.parametrize(
    "runs, options, says",
    [
        ([UNREADABLE] * 3, {}, UNREADABLE_SAYS),
        ([UNREADABLE] * 3, FAILING_SCORES_BEST, ["--format-failure-score", "--failure-score"]),
        ([CUT] * 3, {}, ["3 length", "--max-tokens (now 48)"]),
        ([NO_ROOM] * 3, {}, ["leave no room in the LM's context"]),
        ([ENDLESS] * 3, {}, ["3 max_calls", "--max-calls (now 3)"]),
        ([HALF] * 3, {}, ALIKE_SAYS),
        ([HALF, FULL_OF_ANOTHER], {}, ["(2 completed)"]),
        ([UNREADABLE] * 3 + [ended("tool_error")], {}, ["(3 format_error, reward -1.000)"]),
        ([HALF], {"rollouts": 1}, ["it has no others; --rollouts"]),
    ],
)
def test_a_step_that_taught_nothing_says_why_and_which_option_would_help(runs, options, says):
    sentence = nothing_to_learn(runs, dataclasses.replace(CONFIG, **options))
    assert all(part in sentence for part in says), sentence
    assert "\n" not in sentence
    assert len(sentence) < 500


def test_advice_names_options_that_there_are():
    source = (ROOT / "run" / "health.py").read_text(encoding="utf-8")
    named = set(re.findall(r"--[a-z][a-z-]+", source))
    there = {f"--{f.name.replace('_', '-')}" for f in dataclasses.fields(G.Config)}
    assert len(named) > 10
    assert named <= there


def test_what_python_cannot_write_is_named_by_its_kind():
    """JSON and repr refuse a number of more than 4,300 digits."""
    assert shorten({"x": 10**5000}) == "a dict that cannot be written (ValueError)"


def test_what_an_lm_says_does_not_steer_the_terminal():
    run = ended("completed", reward=1.0)
    steering = "\x1b[2J\x07\x9b1mfine\x7f"
    call = dataclasses.replace(run.calls[0], inputs={"x": steering}, outputs={"y": steering})
    shown = show(dataclasses.replace(run, calls=(call,), prediction={"y": steering}))
    assert shown.count("\\x1b[2J\\x07\\x9b1mfine\\x7f") == 3
    assert all(c == "\n" or c.isprintable() for c in shown)


def test_what_is_shown_of_a_long_answer_is_cut():
    assert shorten("a\n b" * 99, 10) == "a ba ba ba…"
    assert shorten("a\n b", 10) == "a b"
    assert shorten(["é"]) == '["é"]'


@pytest.mark.parametrize("excluded, stops", [(0, False), (5, False), (6, True), (10, True)])
def test_a_step_is_not_trained_on_where_most_of_its_runs_are_excluded(excluded, stops):
    failed = failing("judge: OSError: no route")
    sentence = too_many_excluded([failed] * excluded + [ended("completed")] * (10 - excluded))
    assert bool(sentence) == stops
    if stops:
        assert f"{excluded} of 10 runs were excluded" in sentence
        assert sentence.endswith("judge: OSError: no route")


# ------------------------------------------------------------------------------------ rows of steps
def line(step, trained=4, completed=8, failed=0, surprise=1.0, reward_completed=0.5):
    """A step's line in metrics.jsonl, as far as it is looked at."""
    figures = {
        "step": step,
        "reward": 0.5,
        "calls": {"trained": trained},
        "surprise": surprise,
        "statuses": {"completed": completed, "format_error": failed, "tool_error": 1},
        "reward_completed": reward_completed,
    }
    if not trained:
        figures["idle"] = "all alike"
    return figures


# of each kind of step, what is not as usual
KINDS = {
    # it taught
    "t": {},
    # its runs were alike and failed
    "f": {"trained": 0, "completed": 0, "failed": 8},
    # its runs were alike and completed
    "c": {"trained": 0},
}


def told(kinds, collapse=None):
    """The lines of such steps, and what was said after each; the run collapsed at `collapse`."""
    history, said = [], []
    for i, kind in enumerate(kinds, 1):
        history.append(line(i, **KINDS[kind]))
        if i == collapse:
            history[-1]["collapse"] = "entropy is gone"
        said.append(remarks(history))
    return history, said


@given(st.lists(st.sampled_from("tf"), max_size=12).map("".join))
def test_idle_steps_are_counted_from_the_last_one_that_taught(kinds):
    history, said = told(kinds)
    assert idle_steps(history) == len(kinds.rsplit("t")[-1])

    # it is said where such steps begin
    for i, kind in enumerate(kinds):
        begins = kind == "f" and (i == 0 or kinds[i - 1] == "t")
        assert said[i] == ([f"step {i + 1}: nothing to learn: all alike"] if begins else [])


@pytest.mark.parametrize(
    "kinds, collapse, counts",
    [
        # learned, or too hard today: other examples follow
        ("tcctc", None, [0, 0, 0, 0, 0]),
        ("tcfcff", None, [0, 0, 1, 0, 1, 2]),
        # nothing was ever learned: the metric may be a constant
        ("ccc", None, [1, 2, 3]),
        ("fcc", None, [1, 2, 3]),
        # alike because the run collapsed
        ("ttcc", 2, [0, 0, 1, 2]),
    ],
)
def test_runs_that_complete_alike_stop_a_run_only_where_it_learns_no_more(kinds, collapse, counts):
    history, _ = told(kinds, collapse)
    assert [idle_steps(history[:i]) for i in range(1, len(kinds) + 1)] == counts


def test_that_runs_complete_alike_is_told_once():
    _, said = told("tcctcffc")
    assert [step for step, sentences in enumerate(said, 1) if sentences] == [2, 6]


# ----------------------------------------------------------------------------------------- collapse
# as measured on SmolLM2-135M: nine steps teach it to be readable, and take its entropy
# fmt: off
MEASURED = [.64, .57, .58, .33, .25, .06, .13, .13, .02, .10, .10, .006, .03, .02, .01, .01, .01]
FLAT = [.4, .2, .3, .35, .2, .3, .25, .4, .3, .2, .3, .35, .25, .3, .3, .2, .3]
# fmt: on


def collapse_at(surprises, rewards):
    """(step at which each sentence comes, sentence) of a run with these figures."""
    history, found = [], []
    for i, (surprise, reward) in enumerate(zip(surprises, rewards), 1):
        history.append(line(i, surprise=surprise, reward_completed=reward))
        # as read back where a run goes on
        history = json.loads(json.dumps(history))
        if sentence := collapsed(history):
            history[-1]["collapse"] = sentence
        found += [(i, s) for s in remarks(history)]
    return found


def test_a_run_that_loses_its_entropy_for_nothing_says_so_once():
    ((step, sentence),) = collapse_at(MEASURED, FLAT)
    assert 12 <= step <= 15
    fell = "the entropy of what is sampled fell from 0.597 to 0.0"
    assert sentence.startswith(f"step {step}: {fell}")
    for option in ("--beta", "--lr", "--clip-high", "--entropy-target", "--examples"):
        assert option in sentence


@pytest.mark.parametrize(
    "surprises, rewards",
    [
        # it learns
        (MEASURED, [i / 20 for i in range(17)]),
        # too few completed to judge by
        (MEASURED, [None] * 12 + [0.2, 0.3, 0.2, 0.3, 0.2]),
        # a dip of one step
        ([0.6, 0.6, 0.6, 0.6, 0.01, 0.6, 0.6, 0.02, 0.6, 0.6], FLAT),
        # a start of one step that is not typical
        ([0.01, 0.6, 0.6, 0.05, 0.05, 0.05, 0.05, 0.05], FLAT),
        # not by 90%
        ([0.6, 0.5, 0.5, 0.3, 0.2, 0.1, 0.1, 0.08, 0.08, 0.08], FLAT),
        ([0.6, 0.01, 0.01, 0.01, 0.01], FLAT),
        ([0.0] * 9, FLAT),
    ],
)
def test_a_run_that_learns_or_wavers_is_not_called_collapsed(surprises, rewards):
    assert collapse_at(surprises, rewards) == []


def test_a_run_that_is_never_readable_can_collapse_too():
    ((_, sentence),) = collapse_at(MEASURED, [None] * 17)
    assert "no run completes" in sentence


@given(st.integers(0, 2**32), st.floats(0.01, 1000), st.floats(-100, 100))
def test_the_scale_of_the_rewards_does_not_matter(seed, scale, shift):
    rng = random.Random(seed)
    rewards = [rng.gauss(rng.choice([0, 0.02]) * i, 0.1) for i in range(17)]
    other_scale = [scale * r + shift for r in rewards]

    said = collapse_at(MEASURED, rewards)
    said_there = collapse_at(MEASURED, other_scale)
    assert [step for step, _ in said] == [step for step, _ in said_there]


# ----------------------------------------------------------------------------------- figures, lines
def mean(values):
    """None where there are none."""
    return pytest.approx(sum(values) / len(values)) if values else None


def with_random_logprobs(t, rng):
    calls = []
    for call in t.calls:
        logprobs = [-rng.random() for _ in call.completion.logprobs]
        completion = dataclasses.replace(call.completion, logprobs=logprobs)
        calls.append(dataclasses.replace(call, completion=completion))
    return dataclasses.replace(t, calls=tuple(calls))


@given(trajectory_sets(), st.integers())
def test_the_entropy_of_the_modules_is_that_of_their_own_tokens(trajectories, seed):
    rng = random.Random(seed)
    trajectories = [with_random_logprobs(t, rng) for t in trajectories]
    if not any(t.votes for t in trajectories):
        return
    m = measure(trajectories, [], [])

    calls = [call for t in trajectories for call in t.calls]
    for name, figures in m["modules"].items():
        own = [-x for call in calls if call.module == name for x in call.completion.logprobs]
        assert figures["entropy"] == mean(own)
    modules = m["modules"].values()
    total = sum(p["tokens"] * (p["entropy"] or 0) for p in modules)
    tokens = sum(p["tokens"] for p in modules)
    assert m["surprise"] == pytest.approx(total / max(tokens, 1))
    assert m["reward_completed"] == mean(
        [t.reward for t in trajectories if t.status == "completed"]
    )
    assert sum(m["errors"].values()) == m["statuses"]["tool_error"]
    assert json.dumps(m)


def test_failures_are_counted_by_kind():
    runs = [
        failing("search: KeyError: 'Rome'"),
        failing("search: KeyError: 'Paris'"),
        failing("the metric gave nan"),
        UNREADABLE,
    ]
    errors = measure(runs, [], [])["errors"]
    assert errors == {"search: KeyError: …": 2, "the metric gave nan": 1}


def test_a_step_and_a_trial_are_told_in_a_line_each():
    m = line(3)
    m["seconds"] = {"sampling": 1.0, "tools": 0.5, "update": 2.0}
    m["tokens_forwarded"] = 2640
    m["tokens_unshared"] = 41000
    assert step_line(m) == (
        "step    3  reward 0.500  8 completed, 1 tool_error  entropy 1.000  "
        "sampling 1.5 s, update 2.0 s  2,640 tokens forwarded of 41,000"
    )
    assert "not finite" in step_line(m | {"skipped": True})

    trial = {
        "trial": 4,
        "full": True,
        "examples": 100,
        "score": 0.25,
        "statuses": {"completed": 100},
        "seconds": 1.25,
    }
    assert trial_line(trial, 0.5) == (
        "trial   4  score 0.250 (100 examples, all of dev)  best 0.500  100 completed  1.2 s"
    )


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_what_a_terminal_cannot_show_is_replaced(monkeypatch, encoding):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    lenient_output()
    print("0.5 ± 0.1 → «€» \ud800 end")
    # line by line: nothing waits for the end
    assert raw.getvalue().endswith(b" end\n")


def test_what_json_cannot_hold_is_shown_as_python_writes_it():
    """A tool may give anything; a trace that is printed while training must not end it."""
    endless = []
    endless.append(endless)
    assert shorten({(1, 2): "x"}) == "{(1, 2): 'x'}"
    assert shorten(endless) == "[[...]]"
    assert shorten({"a": b"x"}) == '{"a": "b\'x\'"}'
