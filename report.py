"""What is told of a run: the figures of a step, and the curve. Nothing in here is needed to train."""
from __future__ import annotations

import json
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


def plot(out: Path) -> None:
    """Reward and dev scores against steps: metrics.jsonl of the folder -> curve.png."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps, dev = [m for m in lines if "reward" in m], [m for m in lines if "dev" in m]
    figure, axes = pyplot.subplots(figsize=(6, 4))
    axes.plot([m["step"] for m in steps], [m["reward"] for m in steps], color="gray", alpha=0.5, label="training reward")
    for name in ("sampled", "greedy"):
        axes.errorbar([m["step"] for m in dev], [m["dev"][name]["score"] for m in dev],
                      [m["dev"][name]["stderr"] for m in dev], fmt="o-", capsize=3, label=f"dev score, {name}")
    axes.set(xlabel="step", title=out.name)
    axes.legend()
    figure.savefig(out / "curve.png", dpi=120)
    pyplot.close(figure)
