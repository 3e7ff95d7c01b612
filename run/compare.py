"""The curve of a run; several runs side by side, with means and 95% intervals.

Prints a table of runs of one task:

    python -m run.compare runs/hover runs/hover-2 runs/hover-3
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np

from program import InputError
from run.records import read_metrics
from run.terminal import lenient_output


def plot(out: Path) -> None:
    """Training reward and dev scores of a run against steps -> its curve.png."""
    # not pyplot, which would take a notebook's way of showing figures from it
    from matplotlib.figure import Figure

    steps, evaluations = read_metrics(out)
    figure = Figure(figsize=(6, 4))
    axes = figure.subplots()
    rewards = [m["reward"] for m in steps]
    of_training = {"color": "gray", "alpha": 0.5, "label": "training reward"}
    axes.plot([m["step"] for m in steps], rewards, **of_training)
    evaluated = [m["step"] for m in evaluations]
    for how, color in (("sampled", "C0"), ("greedy", "C1")):
        scores = [m["dev"][how]["score"] for m in evaluations]
        errors = [m["dev"][how]["stderr"] for m in evaluations]
        style = {"fmt": "o-", "capsize": 3, "color": color, "label": f"dev score, {how}"}
        axes.errorbar(evaluated, scores, errors, **style)
    axes.set(xlabel="step", title=out.name)
    axes.legend()
    figure.savefig(out / "curve.png", dpi=120)


# Student's t, two-sided 95%, by degrees of freedom; with more than 9 it is taken as with 9
T95 = (math.inf, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)


def half_width(values: list[float]) -> float:
    """Of the 95% interval of the mean of several runs; infinite for one run."""
    n = len(values)
    if n < 2:
        return math.inf
    return T95[min(n - 1, 9)] * np.std(values, ddof=1) / math.sqrt(n)


def interval(values: list[float]) -> str:
    """Mean of several runs and the half-width of its 95% interval; of one run, its value."""
    mean = f"{np.mean(values):.3f}"
    return f"{mean} ± {half_width(values):.3f}" if len(values) > 1 else mean


def compare(outs: list[Path]) -> str:
    """A Markdown table of runs: first and last dev score, sampled and greedy, and the gains.

    Its last row has the means and their 95% intervals.
    """
    header = ("run", "sampled before", "after", "greedy before", "after", "gain", "greedy gain")
    rows = [header, ["---"] * len(header)]
    figures = []
    for out in outs:
        _, evaluations = read_metrics(out)
        first = evaluations[0]["dev"]
        last = evaluations[-1]["dev"]
        sampled = [first["sampled"]["score"], last["sampled"]["score"]]
        greedy = [first["greedy"]["score"], last["greedy"]["score"]]
        scores = sampled + greedy
        gains = [sampled[1] - sampled[0], greedy[1] - greedy[0]]
        figures.append(scores + gains)
        rows.append(
            [str(out), *(f"{score:.3f}" for score in scores), *(f"{gain:+.3f}" for gain in gains)]
        )
    rows.append(["mean", *(interval(column) for column in zip(*figures))])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main(runs: list[Path]) -> str:
    """What `python -m run.compare RUN …` prints.

    Raises InputError where a folder holds no run, or a damaged one.
    """
    for run in runs:
        if not (run / "metrics.jsonl").is_file() or not read_metrics(run)[1]:
            others = "".join(f"; {stage} does" for stage in sorted(run.glob("*-w")))
            raise InputError(f"{run}: holds no run with a dev evaluation{others}")
    return compare(runs)


if __name__ == "__main__":
    lenient_output()
    if not sys.argv[1:] or sys.argv[1].startswith("-"):
        sys.exit("usage: python -m run.compare RUN [RUN …], of one task")
    try:
        print(main([Path(a) for a in sys.argv[1:]]))
    except (InputError, OSError) as e:
        sys.exit(f"error: {e}")
