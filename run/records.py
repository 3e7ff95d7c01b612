"""What a run left on disk, read back: its steps, its evaluations, what it cost."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from pathlib import Path

from program import STATUSES, InputError


def read_lines(path: Path, cut: bool = False) -> list[dict]:
    """The values in a jsonl file, none if it is not there. Raises InputError naming file and line.

    `cut`: a last line that was not written to its end is cut off, in the file too.
    """
    data = path.read_bytes() if path.exists() else b""
    if cut and not data.endswith(b"\n"):
        data = data[: data.rfind(b"\n") + 1]
        if path.exists():
            os.truncate(path, len(data))
    values = []
    for i, line in enumerate(data.splitlines(), 1):
        try:
            values.append(json.loads(line))
        except (ValueError, RecursionError) as e:
            raise InputError(f"{path}, line {i}: is no JSON ({e})") from None
    return values


def read_metrics(out: Path) -> tuple[list[dict], list[dict]]:
    """metrics.jsonl of a run's folder -> (its training steps, its dev evaluations).

    Raises InputError naming file and line.
    """
    path = out / "metrics.jsonl"
    lines = read_lines(path)
    for i, line in enumerate(lines, 1):
        if not (isinstance(line, dict) and (is_step(line) or is_evaluation(line))):
            raise InputError(f"{path}, line {i}: is neither a step nor an evaluation")
    steps = [line for line in lines if "reward" in line]
    evaluations = [line for line in lines if "dev" in line]
    return steps, evaluations


def is_step(line: dict) -> bool:
    """Whether a line of metrics.jsonl holds what later steps judge a run by."""
    numbers = [line.get(name) for name in ("step", "reward", "surprise")]
    if not all(type(n) in (int, float) for n in numbers):
        return False
    calls = line.get("calls")
    ended = line.get("statuses")
    if not isinstance(calls, dict) or not isinstance(ended, dict):
        return False
    if type(calls.get("trained")) is not int or not are_counts(ended):
        return False
    try:
        tokens = [module["tokens"] for module in line["modules"].values()]
        seconds = [*line["seconds"].values()]
    except (LookupError, TypeError, AttributeError):
        return False
    return all(type(n) in (int, float) for n in tokens + seconds)


def is_evaluation(line: dict) -> bool:
    """Whether a line of metrics.jsonl holds the scores of an evaluation, and what it took."""
    try:
        parts = [line["dev"][how] for how in ("sampled", "greedy")]
        numbers = [part[name] for part in parts for name in ("score", "stderr", "seconds")]
    except (LookupError, TypeError):
        return False
    if type(line.get("step")) is not int:
        return False
    return all(type(n) in (int, float) and math.isfinite(n) for n in numbers)


def are_counts(statuses: dict) -> bool:
    """Whether these say of every status how many runs ended so."""
    return {*STATUSES} <= statuses.keys() and all(type(n) is int for n in statuses.values())


def first_evaluation(out: Path) -> dict:
    """What a run's first dev evaluation, sampled, came to.

    Raises InputError where metrics.jsonl does not begin with one.
    """
    path = out / "metrics.jsonl"
    try:
        first = read_lines(path)[0]["dev"]["sampled"]
        if are_counts(first["statuses"]) and type(first["rollouts"]) is int:
            return first
    except (LookupError, TypeError, AttributeError):
        pass
    raise InputError(f"{path}, line 1: is no dev evaluation, with which a run begins")


def cost(out: Path) -> dict:
    """What a run or a prompt search took: {"rollouts", "tokens", "seconds"}.

    Rollouts are runs of the program, tokens are sampled ones. Evaluations and the choice of the
    start are included.
    """
    total = Counter(rollouts=0, tokens=0, seconds=0.0)
    steps, evaluations = read_metrics(out)
    for m in steps:
        total.update(
            rollouts=sum(m["statuses"].values()),
            tokens=sum(module["tokens"] for module in m["modules"].values()),
            seconds=sum(m["seconds"].values()),
        )

    others = []
    for m in evaluations:
        others += m["dev"].values()
    others += read_lines(out / "trials.jsonl")
    for name in ("start.json", "candidates.json"):
        if (out / name).exists():
            others.append(json.loads((out / name).read_text()))
    for m in others:
        # a trial has no count of its rollouts but those of its statuses
        rollouts = m.get("rollouts", sum(m.get("statuses", {}).values()))
        total.update(rollouts=rollouts, tokens=m.get("tokens", 0), seconds=m["seconds"])
    return dict(total)
