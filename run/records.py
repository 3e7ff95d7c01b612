"""What a run left on disk, read back: its steps, its evaluations, what it cost."""
from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

from program import STATUSES, InputError


def read_lines(path: Path, cut: bool = False) -> list[dict]:
    """The values in a jsonl file, none if it is not there. Raises InputError naming file and line. `cut`: a last line that was not written to its end is cut off."""
    data = path.read_bytes() if path.exists() else b""
    if cut and not data.endswith(b"\n"):
        data = data[:data.rfind(b"\n") + 1]
        os.truncate(path, len(data)) if path.exists() else None
    lines = data.splitlines()
    for i, line in enumerate(lines):
        try:
            lines[i] = json.loads(line)
        except (ValueError, RecursionError) as e:
            raise InputError(f"{path}, line {i + 1}: is no JSON ({e})") from None
    return lines


def read_metrics(out: Path) -> tuple[list[dict], list[dict]]:
    """metrics.jsonl of a run's folder -> (its training steps, its dev evaluations). Raises InputError naming file and line."""
    lines = read_lines(out / "metrics.jsonl")
    for i, line in enumerate(lines, 1):
        if not (isinstance(line, dict) and (is_step(line) or "dev" in line)):
            raise InputError(f"{out / 'metrics.jsonl'}, line {i}: is neither a step nor an evaluation")
    return [m for m in lines if "reward" in m], [m for m in lines if "dev" in m]


def is_step(line: dict) -> bool:
    """Whether a line of metrics.jsonl holds what later steps judge a run by."""
    numbers = [line.get(name) for name in ("step", "reward", "surprise")]
    counts = [line.get(name) for name in ("calls", "statuses")]
    if not all(type(n) in (int, float) for n in numbers) or not all(isinstance(c, dict) for c in counts):
        return False
    calls, ended = counts
    return type(calls.get("trained")) is int and {*STATUSES} <= ended.keys() and all(
        type(n) is int for n in ended.values())


def first_evaluation(out: Path) -> dict:
    """What a run's first dev evaluation, sampled, came to. Raises InputError where metrics.jsonl does not begin with one."""
    path = out / "metrics.jsonl"
    try:
        first = read_lines(path)[0]["dev"]["sampled"]
        counts = [*first["statuses"].values(), first["rollouts"]]
        if {*STATUSES} <= first["statuses"].keys() and all(type(n) is int for n in counts):
            return first
    except (LookupError, TypeError, AttributeError):
        pass
    raise InputError(f"{path}, line 1: is no dev evaluation, with which a run begins")


def cost(out: Path) -> dict:
    """What a run or a prompt search took: runs of the program, sampled tokens, seconds; evaluations and the choice of the
    start included."""
    total = Counter(rollouts=0, tokens=0, seconds=0.0)
    steps, dev = read_metrics(out)
    for m in steps:
        total.update(rollouts=sum(m["statuses"].values()), tokens=sum(x["tokens"] for x in m["modules"].values()),
                     seconds=sum(m["seconds"].values()))
    found = [json.loads(path.read_text()) for name in ("start.json", "candidates.json") if (path := out / name).exists()]
    for m in [x for d in dev for x in d["dev"].values()] + read_lines(out / "trials.jsonl") + found:
        total.update(rollouts=m.get("rollouts", sum(m.get("statuses", {}).values())), tokens=m.get("tokens", 0), seconds=m["seconds"])
    return dict(total)
