"""What is told of runs: the figures of a step, the curve of a run, several runs side by side.

    python report.py runs/hover runs/hover-2 runs/hover-3      # dev scores before and after, means with intervals

Nothing in here is needed to train.
"""
from __future__ import annotations

import json
import math
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

from program import statuses


def measure(trajectories: list, groups: list, advantages: list[list[float]]) -> dict:
    """A step's rollouts and groups in figures, for metrics.jsonl.

    Calls: made = trained + zero_advantage + excluded, the last being those of runs that do not vote and those that
    `short_groups` or `group_size` left out. `surprise` is the mean negative log-prob of the sampled tokens, an estimate
    of the entropy. Of each module: calls and tokens, the share of voting runs that reached its k-th call (`survival`),
    the share of its groups whose advantages are all 0 (`zero_variance`), and the mean size of its advantages.
    """
    grouped, of_module = defaultdict(float), defaultdict(list)
    for g, values in zip(groups, advantages):
        of_module[g.module].append(values)
        for m, a in zip(g.members, values):
            for c in m.calls:
                grouped[m.trajectory, c] += abs(a)
    calls = [c for t in trajectories for c in t.calls]
    voting = [t for t in trajectories if t.votes]
    trained = sum(size > 0 for size in grouped.values())
    modules = {}
    for name in sorted({c.module for c in calls}):
        own, values = [c for c in calls if c.module == name], of_module[name]
        reached = [sum(c.module == name for c in t.calls) for t in voting]
        sizes = [abs(a) for group in values for a in group]
        modules[name] = {"calls": len(own), "tokens": sum(len(c.completion.token_ids) for c in own),
                         "survival": [np.mean([n > k for n in reached]) for k in range(max(reached, default=0))],
                         "zero_variance": np.mean([not any(group) for group in values]) if values else None,
                         "advantage_scale": np.mean(sizes) if sizes else None}
    logprobs = [x for c in calls for x in c.completion.logprobs]
    return {"reward": np.mean([t.reward for t in voting]), "reward_std": np.std([t.reward for t in voting]),
            "statuses": statuses(trajectories), "surprise": -np.mean(logprobs) if logprobs else 0.0,
            "calls": {"made": len(calls), "trained": trained, "zero_advantage": len(grouped) - trained,
                      "excluded": len(calls) - len(grouped)}, "modules": modules}


def read_metrics(out: Path) -> tuple[list[dict], list[dict]]:
    """metrics.jsonl of a run's folder -> (its training steps, its dev evaluations)."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [m for m in lines if "reward" in m], [m for m in lines if "dev" in m]


def plot(outs: list[Path], file: Path, title: str = "") -> None:
    """Training reward and dev scores of runs against steps -> a picture."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(figsize=(6, 4))
    for i, (steps, dev) in enumerate(map(read_metrics, outs)):
        labelled = lambda text: {"label": text} if i == 0 else {}
        axes.plot([m["step"] for m in steps], [m["reward"] for m in steps], color="gray", alpha=0.5, **labelled("training reward"))
        for name, color in (("sampled", "C0"), ("greedy", "C1")):
            axes.errorbar([m["step"] for m in dev], [m["dev"][name]["score"] for m in dev], [m["dev"][name]["stderr"] for m in dev],
                          fmt="o-", capsize=3, color=color, **labelled(f"dev score, {name}"))
    axes.set(xlabel="step", title=title)
    axes.legend()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


T95 = (math.inf, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)      # Student's t, two-sided 95%, by degrees of freedom


def interval(values: list[float]) -> str:
    """Mean of several runs and the half-width of its 95% interval."""
    n = len(values)
    return f"{np.mean(values):.3f}" + (f" ± {T95[min(n - 1, 9)] * np.std(values, ddof=1) / math.sqrt(n):.3f}" if n > 1 else "")


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


if __name__ == "__main__":
    print(compare([Path(a) for a in sys.argv[1:]]))
