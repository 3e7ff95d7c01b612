"""What is told of runs: a readable trace, the figures of a step, what is wrong with a run and which
option would help, the parity gate, the curve of a run, several runs side by side.

    python report.py runs/hover runs/hover-2 runs/hover-3      # dev scores before and after, means with intervals

Nothing in here changes what is trained.
"""
from __future__ import annotations

import hashlib
import inspect
import json
import logging
import math
import os
import re
import sys
import textwrap
import traceback
from collections import Counter, defaultdict
from pathlib import Path
from typing import Callable

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from program import STATUSES, Call, InputError, Program, Trajectory, log


def statuses(trajectories: list[Trajectory]) -> dict[str, int]:
    """How many runs ended in each way."""
    counts = Counter(t.status for t in trajectories)
    return {s: counts[s] for s in STATUSES}


def counted(counts: dict[str, int]) -> str:
    """Example: counted({"completed": 30, "length": 2, "max_calls": 0}) is "30 completed, 2 length"."""
    return ", ".join(f"{n:,} {name}" for name, n in counts.items() if n)


def shorten(value, longest: int = 0) -> str:
    """A value in one line: text as it is, else as JSON, or as Python writes it where JSON cannot; cut to
    `longest` characters (0: whole)."""
    try:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    except (TypeError, ValueError, RecursionError):         # keys that are no text, or a list in itself
        text = repr(value)
    text = " ".join(text.split())
    return text[:longest] + "…" if 0 < longest < len(text) else text


def printable(text: str) -> str:
    """With control characters written out: what an LM or a tool says never steers a terminal.
    Example: printable("\x1b[2J") is "\\x1b[2J"."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: f"\\x{ord(found[0]):02x}", text)


def expected_of(program: Program, example: dict) -> dict:
    """What an example holds beside the inputs of `forward`: what the metric compares a run with."""
    inputs = inspect.signature(program.forward).parameters
    return {name: value for name, value in example.items() if name not in inputs}


def show(trajectory: Trajectory, width: int = 100, expected: dict | None = None,
         decode: Callable[[list[int]], str] | None = None, longest: int = 0) -> str:
    """A readable trace of one run: LM calls and tools in the order they were asked for, then its end.

    Of each its inputs (<) and outputs (>); then the prediction (=) and what was `expected`. Prompts are
    shown where `decode` turns their ids into text. Values are cut to `longest` characters (0: none are).
    """
    lines = []
    def entry(mark: str, text: str):
        first, further = f"    {mark} ", " " * 8
        lines.extend(textwrap.wrap(text, width, initial_indent=first, subsequent_indent=further))
    def entries(mark: str, values: dict):
        for name, value in values.items():
            entry(mark, f"{name}: {shorten(value, longest)}")
    def tools(after: int):
        for t in trajectory.tools:
            if t.after == after:
                lines.append(f"   tool {t.name}")
                entry("<", ", ".join(shorten(x, longest) for x in t.arguments))
                entry(">", f"failed: {t.error}" if t.error else shorten(t.result, longest))
    for i, call in enumerate(trajectory.calls, 1):
        tools(after=i - 1)
        c = call.completion
        lines.append(f"{i}. {call.module} [{call.invocation}]   {len(c.prompt_ids)} prompt + {len(c.token_ids)} sampled "
                     f"tokens, {c.finish_reason}")
        if decode:
            lines.extend(f"    | {line}" for line in decode(c.prompt_ids).splitlines())
        entries("<", call.inputs)
        if call.outputs is not None:
            entries(">", call.outputs)
        else:
            entry(">", f"not readable: {call.error}; sampled: {shorten(c.text, longest)!r}")
    tools(after=len(trajectory.calls))
    entries("=", trajectory.prediction if isinstance(trajectory.prediction, dict) else {})
    entries("expected", expected or {})
    reward = "no reward" if trajectory.reward is None else f"reward {trajectory.reward:.3f}"
    ending = f"{trajectory.status}, {reward}" + f" ({trajectory.error})" * bool(trajectory.error)
    return printable("\n".join([*lines, ending]))


def measure(trajectories: list, groups: list, advantages: list[list[float]]) -> dict:
    """A step's rollouts and groups in figures, for metrics.jsonl.

    Calls: made = trained + zero_advantage + excluded, the last being those of runs that do not vote and those that
    `short_groups` or `group_size` left out.
    Entropy: `surprise` is the mean −log p of the sampled tokens, an unbiased estimate of the entropy that the
    LM had where it sampled, in nats a token; each module's `entropy` is that of its own tokens (None: it has none).
    Of each module also: calls and tokens, the share of voting runs that reached its k-th call (`survival`), the share
    of its groups whose advantages are all 0 (`zero_variance`), and the mean size of its advantages.
    `reward_completed` is the mean of completed runs (None: there are none). `errors` counts the excluded runs by
    kind of failure. `digest` tells the sampled tokens of two steps apart.
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
        surprises = [-x for c in own for x in c.completion.logprobs]
        modules[name] = {"calls": len(own), "tokens": len(surprises),
                         "entropy": np.mean(surprises) if surprises else None,
                         "survival": [np.mean([n > k for n in reached]) for k in range(max(reached, default=0))],
                         "zero_variance": np.mean([not any(group) for group in values]) if values else None,
                         "advantage_scale": np.mean(sizes) if sizes else None}
    logprobs = [x for c in calls for x in c.completion.logprobs]
    digest = hashlib.blake2b(repr([c.completion.token_ids for c in calls]).encode(), digest_size=16).hexdigest()
    completed = [t.reward for t in voting if t.status == "completed"]
    return {"reward": np.mean([t.reward for t in voting]), "reward_std": np.std([t.reward for t in voting]),
            "reward_completed": np.mean(completed) if completed else None,
            "errors": Counter(kind_of(t.error) for t in trajectories if not t.votes),
            "digest": digest, "statuses": statuses(trajectories), "surprise": -np.mean(logprobs) if logprobs else 0.0,
            "calls": {"made": len(calls), "trained": trained, "zero_advantage": len(grouped) - trained,
                      "excluded": len(calls) - len(grouped)}, "modules": modules}


# ---------------------------------------------------------------------------- what is wrong with a run
class StoppedError(RuntimeError):
    """A training that would not get anywhere as it is. Its state is saved, and it can go on."""


def kind_of(failure: str) -> str:
    """What is the same in failures that differ in numbers and quoted texts alone.
    Example: kind_of("search: KeyError: 'Rome'") is "search: KeyError: …"."""
    return re.sub(r"'[^']*'|\"[^\"]*\"|\d+(\.\d+)?", "…", shorten(failure, 1000))[:200]


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


def step_line(metrics: dict) -> str:
    """A step in a line, for where there is no terminal to draw a bar on."""
    seconds = metrics["seconds"]
    parts = [f"step {metrics['step']:4d}", f"reward {metrics['reward']:.3f}", counted(metrics["statuses"]),
             f"entropy {metrics['surprise']:.3f}",
             f"sampling {seconds['sampling'] + seconds['tools']:.1f} s, update {seconds['update']:.1f} s",
             f"{metrics['tokens_forwarded']:,} tokens forwarded of {metrics['tokens_unshared']:,}"]
    if "skipped" in metrics:
        parts.append("skipped, for the gradient is not finite")
    return "  ".join(parts)


def trial_line(trial: dict, best: float) -> str:
    """A trial of a prompt search in a line."""
    examples = f"{trial['examples']} examples" + ", all of dev" * trial["full"]
    return "  ".join((f"trial {trial['trial']:3d}", f"score {trial['score']:.3f} ({examples})",
                      f"best {best:.3f}", counted(trial["statuses"]), f"{trial['seconds']:.1f} s"))


def lenient_output() -> None:
    """What the terminal's encoding lacks is printed as ?, for no run shall end for want of a character.
    A file gets the output line by line, in order with what goes to stderr."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace", line_buffering=True)


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
        self.config, self.fresh, self.norms, self.sums, self.apart = config, fresh, {}, Counter(), []
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
        apart = torch.cat(self.apart) if self.apart else torch.zeros(1)
        found = apart.quantile(torch.tensor([0.5, 0.99, 1.0])).tolist()
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
                "tokens_distinct": self.sums["distinct"], "tokens_forwarded": self.sums["forwarded"],
                "tokens_unshared": self.sums["unshared"],
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
    lenient_output()
    if not sys.argv[1:] or sys.argv[1].startswith("-"):
        sys.exit("usage: report.py RUN [RUN …], of one task")
    try:
        print(main([Path(a) for a in sys.argv[1:]]))
    except (InputError, OSError) as e:
        sys.exit(f"error: {e}")
