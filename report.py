"""What is told of runs: a readable trace, the figures of a step, the parity gate, the curve of a run, several runs side by side.

    python report.py runs/hover runs/hover-2 runs/hover-3      # dev scores before and after, means with intervals

Nothing in here changes what is trained.
"""
from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import textwrap
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from program import STATUSES, InputError, Trajectory


def statuses(trajectories: list[Trajectory]) -> dict[str, int]:
    """How many runs ended in each way."""
    counts = Counter(t.status for t in trajectories)
    return {s: counts[s] for s in STATUSES}


def show(trajectory: Trajectory, width: int = 100) -> str:
    """A readable trace of one run: each call's inputs, outputs and lengths, then how the run ended."""
    lines = []
    def entries(mark: str, values: dict):
        for name, value in values.items():
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
            lines.extend(textwrap.wrap(f"{name}: {' '.join(text.split())}", width, initial_indent=f"    {mark} ",
                                       subsequent_indent=" " * 8))
    for i, call in enumerate(trajectory.calls, 1):
        c = call.completion
        lines.append(f"{i}. {call.module} [{call.invocation}]   {len(c.prompt_ids)} prompt + {len(c.token_ids)} sampled "
                     f"tokens, {c.finish_reason}")
        entries("<", call.inputs)
        entries(">", call.outputs if call.outputs is not None else {"not readable": f"{call.error}; sampled: {c.text!r}"})
    entries("=", trajectory.prediction if isinstance(trajectory.prediction, dict) else {})
    reward = "no reward" if trajectory.reward is None else f"reward {trajectory.reward:.3f}"
    return "\n".join([*lines, f"{trajectory.status}, {reward}" + f" ({trajectory.error})" * bool(trajectory.error)])


def measure(trajectories: list, groups: list, advantages: list[list[float]]) -> dict:
    """A step's rollouts and groups in figures, for metrics.jsonl.

    Calls: made = trained + zero_advantage + excluded, the last being those of runs that do not vote and those that
    `short_groups` or `group_size` left out. `surprise` is the mean negative log-prob of the sampled tokens, an estimate
    of the entropy. Of each module: calls and tokens, the share of voting runs that reached its k-th call (`survival`),
    the share of its groups whose advantages are all 0 (`zero_variance`), and the mean size of its advantages. `digest`
    tells the sampled tokens of two steps apart.
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
    digest = hashlib.blake2b(repr([c.completion.token_ids for c in calls]).encode(), digest_size=16).hexdigest()
    return {"reward": np.mean([t.reward for t in voting]), "reward_std": np.std([t.reward for t in voting]),
            "digest": digest, "statuses": statuses(trajectories), "surprise": -np.mean(logprobs) if logprobs else 0.0,
            "calls": {"made": len(calls), "trained": trained, "zero_advantage": len(grouped) - trained,
                      "excluded": len(calls) - len(grouped)}, "modules": modules}


class ParityError(RuntimeError):
    """The sampler and the training forward disagree about the log-prob of a sampled token; one of them is wrong."""


class Tally:
    """The figures of one pass over a step's rows: loss, mean KL (k3), share of clipped tokens, tokens forwarded and how many that
    were without sharing prefixes, micro-batches halved for want of memory, each module's share of the gradient norms; at the
    first pass (`fresh`) also how far the log-probs are from the sampler's (`parity`: median, 99% quantile, maximum; with dropout,
    which is in the update alone, those of one micro-batch scored without it).

    With a correction: `correction` has the mean of its factors, the smallest and the largest ratio of
    trained to sampled probability, and the share of tokens whose ratio was truncated or dropped. With an
    entropy bonus: `entropy`, nats per token of the whole distributions (`surprise` estimates it)."""
    def __init__(self, config, dtype: torch.dtype, fresh: bool):
        self.config, self.fresh, self.norms, self.sums, self.apart = config, fresh, {}, Counter(), [torch.zeros(1)]
        self.ratios, self.has_entropy = [], False
        self.worst = (-1.0, "")         # how far apart, and which token of which call
        most = config.parity or (1e-3 if dtype == torch.float32 else 2.0)
        self.bounds = {"median": most / 40, "q99": most / 4, "max": most}

    @torch.no_grad()
    def batch(self, tree, loss: float, logprobs: Tensor, old: Tensor, advantage: Tensor, ref: Tensor | None,
              entropies: Tensor | None = None) -> None:
        """Count a micro-batch."""
        ratio, c = torch.exp(logprobs - old), self.config
        clipped = (ratio < 1 - c.clip_low) & (advantage < 0) | (ratio > 1 + c.clip_high) & (advantage > 0)
        kl = 0.0 if ref is None else (torch.exp(ref - logprobs) - (ref - logprobs) - 1).sum().item()
        self.sums.update(loss=loss, tokens=len(old), clipped=clipped.sum().item(), kl=kl, forwarded=len(tree.ids),
                         unshared=sum(len(path) for _, path in tree.paths))
        if entropies is not None:
            self.has_entropy = True
            self.sums["entropy"] += entropies.sum().item()

    def correct(self, apart: Tensor, factors: Tensor) -> None:
        """Count the factors (N,) of a correction; `apart` (N,): log pi_trained - log pi_sampled."""
        ratio = apart.exp()
        self.ratios += [ratio.min().item(), ratio.max().item()]
        self.sums.update(factors=factors.sum().item(), changed=(factors != ratio).sum().item())

    def compare(self, tree, logprobs: Tensor, sampled: Tensor) -> None:
        """Take down how far a micro-batch's log-probs (N,) are from the sampler's, and where most."""
        apart = (logprobs - sampled).abs().cpu().nan_to_num(math.inf)           # NaN is too far
        self.apart.append(apart)
        if apart.max() > self.worst[0]:
            at = int(apart.argmax())
            row, token = [(row, token) for row in tree.rows for token in range(len(row.completion.token_ids))][at]
            self.worst = (float(apart[at]), f"{row.where}: token {token} (id {row.completion.token_ids[token]}): log-prob "
                                            f"{sampled[at]:.4f} when sampled, {logprobs[at]:.4f} in training")

    def parity(self) -> dict[str, float]:
        """How far sampled and trained log-probs are apart over the pass: median, 99% quantile, maximum.

        Rounding moves all three little by little, a fault moves one of them far: the bounds are some four times what healthy
        steps show (docs: measured in bf16 on a 135M LM, median 0.013, 99% 0.16, maximum 0.5). Raises ParityError naming the worst
        token where one of them is passed."""
        found = torch.cat(self.apart).quantile(torch.tensor([0.5, 0.99, 1.0])).tolist()
        parity = dict(zip(self.bounds, found))
        for name, bound in self.bounds.items():
            if not parity[name] <= bound:
                raise ParityError(f"{self.worst[1]}; the {name} of the step is {parity[name]:.4g}, at most {bound:.4g} is "
                                  "tolerated (--parity)")
        return parity

    def figures(self) -> dict:
        n, norm = max(self.sums["tokens"], 1), sum(self.norms.values()) or 1
        more: dict = {}
        if self.ratios:
            more["correction"] = {"mean": self.sums["factors"] / n, "min": min(self.ratios), "max": max(self.ratios),
                                  "share": self.sums["changed"] / n}
        if self.has_entropy:
            more["entropy"] = self.sums["entropy"] / n
        return {"loss": self.sums["loss"], "kl": self.sums["kl"] / n, "clipped": self.sums["clipped"] / n,
                "tokens_forwarded": self.sums["forwarded"], "tokens_unshared": self.sums["unshared"],
                "halved": self.sums["halved"], "grad_share": {m: x / norm for m, x in self.norms.items()},
                **({"parity": self.parity()} if self.fresh else {}), **more}


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


def read_metrics(out: Path) -> tuple[list[dict], list[dict]]:
    """metrics.jsonl of a run's folder -> (its training steps, its dev evaluations)."""
    lines = read_lines(out / "metrics.jsonl")
    return [m for m in lines if "reward" in m], [m for m in lines if "dev" in m]


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
    """What `report.py RUN …` prints. Raises InputError where a folder holds no run, or a damaged one."""
    if odd := [r for r in runs if not (r / "metrics.jsonl").is_file() or not read_metrics(r)[1]]:
        raise InputError(f"{odd[0]}: holds no run with a dev evaluation" + "".join(f"; {w} does" for w in sorted(odd[0].glob("*-w"))))
    return compare(runs)


if __name__ == "__main__":
    if not sys.argv[1:] or sys.argv[1].startswith("-"):
        sys.exit("usage: report.py RUN [RUN …], of one task")
    try:
        print(main([Path(a) for a in sys.argv[1:]]))
    except (InputError, OSError) as e:
        sys.exit(f"error: {e}")
