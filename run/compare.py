"""The curve of a run; several runs side by side, with means and 95% intervals.

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
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(figsize=(6, 4))
    steps, dev = read_metrics(out)
    axes.plot([m["step"] for m in steps], [m["reward"] for m in steps], color="gray", alpha=0.5, label="training reward")
    for name, color in (("sampled", "C0"), ("greedy", "C1")):
        axes.errorbar([m["step"] for m in dev], [m["dev"][name]["score"] for m in dev], [m["dev"][name]["stderr"] for m in dev],
                      fmt="o-", capsize=3, color=color, label=f"dev score, {name}")
    axes.set(xlabel="step", title=out.name)
    axes.legend()
    figure.savefig(out / "curve.png", dpi=120)
    pyplot.close(figure)


T95 = (math.inf, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)      # Student's t, two-sided 95%, by degrees of freedom


def half_width(values: list[float]) -> float:
    """Of the 95% interval of the mean of several runs; infinite for one run."""
    n = len(values)
    return T95[min(n - 1, 9)] * np.std(values, ddof=1) / math.sqrt(n) if n > 1 else math.inf


def interval(values: list[float]) -> str:
    """Mean of several runs and the half-width of its 95% interval."""
    return f"{np.mean(values):.3f}" + (f" ± {half_width(values):.3f}" if len(values) > 1 else "")


def compare(outs: list[Path]) -> str:
    """A Markdown table: each run's first and last dev score, sampled and greedy; below, means and 95% intervals."""
    rows = []
    for out in outs:
        dev = read_metrics(out)[1]
        rows.append([dev[i]["dev"][name]["score"] for name in ("sampled", "greedy") for i in (0, -1)])
    table = [(str(out), *(f"{x:.3f}" for x in r), f"{r[1] - r[0]:+.3f}", f"{r[3] - r[2]:+.3f}") for out, r in zip(outs, rows)]
    columns = [*zip(*rows), [r[1] - r[0] for r in rows], [r[3] - r[2] for r in rows]]
    header = ("run", "sampled before", "after", "greedy before", "after", "gain", "greedy gain")
    return "\n".join("| " + " | ".join(row) + " |" for row in
                     (header, ["---"] * len(header), *table, ("mean", *(interval(c) for c in columns))))


def main(runs: list[Path]) -> str:
    """What `python -m run.compare RUN …` prints. Raises InputError where a folder holds no run, or a damaged one."""
    if odd := [r for r in runs if not (r / "metrics.jsonl").is_file() or not read_metrics(r)[1]]:
        raise InputError(f"{odd[0]}: holds no run with a dev evaluation" + "".join(f"; {w} does" for w in sorted(odd[0].glob("*-w"))))
    return compare(runs)


if __name__ == "__main__":
    lenient_output()
    if not sys.argv[1:] or sys.argv[1].startswith("-"):
        sys.exit("usage: python -m run.compare RUN [RUN …], of one task")
    try:
        print(main([Path(a) for a in sys.argv[1:]]))
    except (InputError, OSError) as e:
        sys.exit(f"error: {e}")
