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
from run.terminal import counted, kind_of, printable, shorten, statuses


class StoppedError(RuntimeError):
    """A training that would not get anywhere as it is. Its state is saved, and it can go on."""


# -------------------------------------------------------------- failures of tools and of the metric
class FirstFailures(logging.Handler):
    """Prints the first failure of each kind, of a tool or of the metric, as it happens.

    In `with FirstFailures(OUT / "errors.log"):` it also keeps it in that file with its traceback.
    """

    MOST_KINDS = 20

    def __init__(self, path: Path | None = None):
        super().__init__()
        self.path = path
        self.kinds: set[str] = set()

    def __enter__(self) -> FirstFailures:
        log.addHandler(self)
        return self

    def __exit__(self, *_) -> None:
        log.removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        failure = getattr(record, "failure", None)
        kind = kind_of(str(failure))
        if failure is None or kind in self.kinds or len(self.kinds) == self.MOST_KINDS:
            return
        self.kinds.add(kind)
        kept = ""
        if self.path:
            with self.path.open("a", encoding="utf-8", errors="replace") as file:
                print(record.getMessage(), file=file)
                traceback.print_exception(failure.__cause__ or failure, file=file)
                print(file=file)
            kept = f"; its traceback is in {self.path}"
        told = printable(record.getMessage())
        tqdm.write(f"{told} (the first of its kind{kept})", file=sys.stderr)


# ----------------------------------------------------------------------------------------- one step
def too_many_excluded(trajectories: list[Trajectory]) -> str:
    """Why a step cannot be trained on, where more than half of its runs are excluded; else ""."""
    excluded = [t for t in trajectories if not t.votes]
    if 2 * len(excluded) <= len(trajectories):
        return ""
    return (
        f"{len(excluded)} of {len(trajectories)} runs were excluded, for a tool or the metric "
        "failed; what is left is no fair sample to train on; the first: "
        f"{excluded[0].error}"
    )


def nothing_to_learn(trajectories: list[Trajectory], config) -> str:
    """Why a step whose advantages are all 0 taught nothing, and which option would help."""
    runs = [t for t in trajectories if t.votes]
    rewards = {t.reward for t in runs}
    earned = f", reward {rewards.pop():.3f}" if len(rewards) == 1 else ""
    sentence = (
        "no run earned more or less than the others of its example "
        f"({counted(statuses(runs))}{earned})"
    )
    if config.rollouts == 1:
        return f"{sentence}, for it has no others; --rollouts gives it some"

    # an answer that could not be read, of the runs that ended as most did
    most = Counter(t.status for t in runs).most_common(1)[0][0]
    ended_so = [t for t in runs if t.status == most]
    failed = next((t.calls[-1] for t in ended_so if t.calls and t.calls[-1].error), None)
    if failed:
        text = shorten(failed.completion.text, 150)
        why = shorten(failed.error, 150)
        sentence += f"; {failed.module} answered {text!r} ({why})"
    return f"{sentence}: {_advice(most, failed, config)}"


def _advice(most: str, failed: Call | None, config) -> str:
    """What would help a step most of whose runs ended in this way.

    `failed` is an unreadable call of one of them, if they have any.
    """
    show_format = "--labelled-demos and --warm-start show the LM its format"
    if most == "max_calls":
        return f"more --max-calls (now {config.max_calls}) let the program end"
    if most == "length" and failed and not failed.completion.token_ids:
        return (
            "the prompts leave no room in the LM's context; shorter inputs or fewer "
            "demonstrations do"
        )
    if most == "length":
        return f"more --max-tokens (now {config.max_tokens}) let answers end; {show_format}"
    if most == "format_error" and config.format_failure_score == config.failure_score:
        return (
            f"{show_format}; a --format-failure-score below --failure-score tells answers that "
            "are nearly readable from others"
        )
    if most == "format_error":
        return show_format
    return (
        "where nothing better can be earned, these examples are learned; else a higher "
        "--temperature, more --rollouts or more --examples find runs that differ"
    )


# --------------------------------------------------------------------------------- the steps so far
# In what follows `history` has the steps' lines of metrics.jsonl, the oldest first.
def collapsed(history: list[dict]) -> str:
    """A sentence, once in a run, where its entropy is gone and brought nothing; else ""."""
    if len(history) < 6 or any("collapse" in m for m in history):
        return ""
    # gone: a tenth is left, from the first three steps to the last three
    surprise = [m["surprise"] for m in history]
    before = np.mean(surprise[:3])
    now = np.mean(surprise[-3:])
    if not 0 < before >= 10 * now:
        return ""

    # brought nothing: between the first and the last half of the steps that have completed runs,
    # at most ten of each, their mean reward has not risen by two standard errors of its scatter
    rewards = [m["reward_completed"] for m in history if m.get("reward_completed") is not None]
    half = min(len(rewards) // 2, 10)
    if half >= 3:
        first = rewards[:half]
        last = rewards[-half:]
        error = math.sqrt((np.var(first, ddof=1) + np.var(last, ddof=1)) / half)
        if np.mean(last) - np.mean(first) > 2 * error:
            return ""
        brought = (
            "the reward of completed runs stands still "
            f"({np.mean(first):.3f}, then {np.mean(last):.3f})"
        )
    elif any(m.get("reward_completed") is not None for m in history[-3:]):
        # too few to judge by
        return ""
    else:
        brought = "no run completes"
    return (
        f"the entropy of what is sampled fell from {before:.3f} to {now:.3f} nats a token, and "
        f"{brought}: the runs of an example become the same, and soon there is nothing to learn "
        "from; --beta, a smaller --lr, a larger --clip-high, --entropy-target or more --examples "
        "keep them apart"
    )


def all_completed(metrics: dict) -> bool:
    """Whether every run of a step that votes completed."""
    counts = metrics["statuses"]
    return counts["completed"] == sum(counts.values()) - counts["tool_error"]


def idle_steps(history: list[dict]) -> int:
    """How many steps in a row, up to the last, taught nothing; if they are many a run is stopped.

    No such step is one whose runs all completed, in a run that did learn and has not collapsed: its
    examples are learned, or too hard today, and others follow.
    """
    idle = 0
    taught = False
    collapse = False
    for m in history:
        taught = taught or m["calls"]["trained"] > 0
        collapse = collapse or "collapse" in m
        healthy = taught and not collapse and all_completed(m)
        idle = 0 if m["calls"]["trained"] or healthy else idle + 1
    return idle


def remarks(history: list[dict]) -> list[str]:
    """What is to be said after the last step.

    That it taught nothing, if it is the first in a row (where its runs just were alike, the first
    in the run); that the run collapsed; that micro-batches forward much twice, once in a run.
    """
    *before, last = history
    step = f"step {last['step']}"
    said = []
    if "idle" in last:
        known = any("idle" in m and all_completed(m) for m in before)
        in_a_row = idle_steps(history)
        if in_a_row == 1 or in_a_row == 0 and not known:
            said.append(f"{step}: nothing to learn: {last['idle']}")
    if "collapse" in last:
        said.append(f"{step}: {last['collapse']}")
    if unshared(last) and not any(unshared(m) for m in before):
        said.append(
            f"{step}: {last['tokens_forwarded']:,} tokens were forwarded in the update where "
            f"{last['tokens_distinct']:,} are distinct: micro-batches part calls that begin alike; "
            "a larger --batch-tokens shares more, and takes more memory"
        )
    return said


def unshared(metrics: dict) -> bool:
    """Whether sharing prefixes would have saved more than a quarter of the update, and did not."""
    return metrics.get("tokens_forwarded", 0) > 1.3 * metrics.get("tokens_distinct", math.inf)
