"""What is wrong with a run, and which option would help, in a sentence; when it had better stop."""
from __future__ import annotations

import logging
import math
import sys
import traceback
from collections import Counter
from pathlib import Path

import numpy as np
from tqdm import tqdm

from program import Call, Trajectory, log
from run.terminal import counted, kind_of, shorten, statuses


class StoppedError(RuntimeError):
    """A training that would not get anywhere as it is. Its state is saved, and it can go on."""


class FirstFailures(logging.Handler):
    """`with FirstFailures(OUT / "errors.log"):` prints the first failure of each kind, of a tool or of
    the metric, as it happens, and keeps it in that file with its traceback. It ends with twenty kinds."""
    def __init__(self, path: Path | None = None):
        super().__init__()
        self.path, self.kinds = path, set()

    def __enter__(self) -> FirstFailures:
        log.addHandler(self)
        return self

    def __exit__(self, *_) -> None:
        log.removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        failure = getattr(record, "failure", None)
        kind = kind_of(str(failure))
        if failure is None or kind in self.kinds or len(self.kinds) == 20:
            return
        self.kinds.add(kind)
        told = f"{record.getMessage()} (the first of its kind"
        if self.path:
            with self.path.open("a", encoding="utf-8", errors="replace") as file:
                print(record.getMessage(), file=file)
                traceback.print_exception(failure.__cause__ or failure, file=file)
                print(file=file)
            told += f"; its traceback is in {self.path}"
        tqdm.write(f"{told})", file=sys.stderr)


def too_many_excluded(trajectories: list[Trajectory]) -> str:
    """Why a step cannot be trained on, where more than half of its runs are excluded; else ""."""
    excluded = [t for t in trajectories if not t.votes]
    if 2 * len(excluded) <= len(trajectories):
        return ""
    return (f"{len(excluded)} of {len(trajectories)} runs were excluded, for a tool or the metric failed; "
            f"what is left is no fair sample to train on; the first: {excluded[0].error}")


def nothing_to_learn(trajectories: list[Trajectory], config) -> str:
    """Why a step whose advantages are all 0 taught nothing, and which option would help: a sentence."""
    runs = [t for t in trajectories if t.votes]
    rewards = {t.reward for t in runs}
    earned = f", reward {rewards.pop():.3f}" if len(rewards) == 1 else ""
    told = ("no run earned more or less than the others of its example "
            f"({counted(statuses(runs))}{earned})")
    if config.rollouts == 1:
        return f"{told}, for it has no others; --rollouts gives it some"
    most = Counter(t.status for t in runs).most_common(1)[0][0]
    failed = next((t.calls[-1] for t in runs if t.status == most and t.calls and t.calls[-1].error), None)
    if failed:
        text, why = shorten(failed.completion.text, 150), shorten(failed.error, 150)
        told += f"; {failed.module} answered {text!r} ({why})"
    return f"{told}: {_advice(most, failed, config)}"


def _advice(most: str, failed: Call | None, config) -> str:
    """What would help a step most of whose runs ended in this way, `failed` being an unreadable call."""
    show_format = "--labelled-demos and --warm-start show the LM its format"
    if most == "max_calls":
        return f"more --max-calls (now {config.max_calls}) let the program end"
    if most == "length" and failed and not failed.completion.token_ids:
        return "the prompts leave no room in the LM's context; shorter inputs or fewer demonstrations do"
    if most == "length":
        return f"more --max-tokens (now {config.max_tokens}) let answers end; {show_format}"
    if most == "format_error" and config.format_failure_score == config.failure_score:
        return (f"{show_format}; a --format-failure-score below --failure-score tells answers that "
                "are nearly readable from others")
    if most == "format_error":
        return show_format
    return ("where nothing better can be earned, these examples are learned; else a higher --temperature, "
            "more --rollouts or more --examples find runs that differ")


def collapsed(history: list[dict]) -> str:
    """A sentence, once in a run, where its entropy is gone and brought nothing; else "".

    Gone: the last three steps' `surprise` is at most a tenth of the first three's. Brought nothing: the
    mean reward of completed runs has not risen by two standard errors, as the steps scatter, between
    the first and the last half of the steps that have one (at most ten of each).
    """
    if len(history) < 6 or any("collapse" in m for m in history):
        return ""
    surprise = [m["surprise"] for m in history]
    before, now = np.mean(surprise[:3]), np.mean(surprise[-3:])
    if not 0 < before >= 10 * now:
        return ""
    rewards = [m["reward_completed"] for m in history if m.get("reward_completed") is not None]
    k = min(len(rewards) // 2, 10)
    if k >= 3:
        first, last = rewards[:k], rewards[-k:]
        error = math.sqrt((np.var(first, ddof=1) + np.var(last, ddof=1)) / k)
        if np.mean(last) - np.mean(first) > 2 * error:
            return ""
        told = ("the reward of completed runs stands still "
                f"({np.mean(first):.3f}, then {np.mean(last):.3f})")
    elif any(m.get("reward_completed") is not None for m in history[-3:]):
        return ""                                       # too few to judge by
    else:
        told = "no run completes"
    return (f"the entropy of what is sampled fell from {before:.3f} to {now:.3f} nats a token, and {told}: "
            "the runs of an example become the same, and soon there is nothing to learn from; --beta, "
            "a smaller --lr, a larger --clip-high, --entropy-target or more --examples keep them apart")


def all_completed(metrics: dict) -> bool:
    """Whether every run of a step that votes completed."""
    counts = metrics["statuses"]
    return counts["completed"] == sum(counts.values()) - counts["tool_error"]


def idle_steps(history: list[dict]) -> int:
    """How many steps in a row, up to the last, taught nothing: a run to be stopped if there are many.

    No such step is one whose runs all completed, in a run that did learn and has not collapsed: its
    examples are learned, or too hard today, and others follow.
    """
    n, taught, collapse = 0, False, False
    for m in history:
        taught = taught or m["calls"]["trained"] > 0
        collapse = collapse or "collapse" in m
        healthy = taught and not collapse and all_completed(m)
        n = 0 if m["calls"]["trained"] or healthy else n + 1
    return n


def remarks(history: list[dict]) -> list[str]:
    """What is to be said after the last step: the first in a row that taught nothing (where runs just
    were alike, the first in the run), and that the run collapsed."""
    *before, last = history
    said = []
    if "idle" in last:
        known = any("idle" in m and all_completed(m) for m in before)
        if idle_steps(history) == 1 or idle_steps(history) == 0 and not known:
            said.append(f"step {last['step']}: nothing to learn: {last['idle']}")
    if "collapse" in last:
        said.append(f"step {last['step']}: {last['collapse']}")
    if unshared(last) and not any(unshared(m) for m in before):
        said.append(f"step {last['step']}: {last['tokens_forwarded']:,} tokens were forwarded in the update where "
                    f"{last['tokens_distinct']:,} are distinct: micro-batches part calls that begin alike; "
                    "a larger --batch-tokens shares more, and takes more memory")
    return said


def unshared(metrics: dict) -> bool:
    """Whether sharing prefixes would have saved more than a quarter of the update, and did not."""
    return metrics.get("tokens_forwarded", 0) > 1.3 * metrics.get("tokens_distinct", math.inf)
