"""The paper's comparison in one command: prompts, weights, and both, on three programs, over seeds.

    make reproduce                  # the miniature edition; MODEL= and DATA= for real ones
    make reproduce QUICK=1          # a trial run

Every training, search and evaluation is a command of mmgrpo.py in a process of its own, with a
folder of its own in runs/reproduce: what is done is skipped, what was interrupted goes on. Weights
and prompts are chosen on dev; the test split is read when all of them are there. Then
results/LEDGER.md and the figures are written; what stands in the ledger below the line
"## Analysis" is kept.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from lm.tokenizer import CheckpointError, read_json
from mmgrpo import play
from program import InputError
from prompts.files import write_json, write_whole
from prompts.search import affordable, rollouts
from run.compare import half_width, interval
from run.config import flag_of
from run.loading import load_model, load_task
from run.records import read_lines
from run.state import same_options
from run.terminal import lenient_output

ROOT = Path(__file__).resolve().parent.parent
TASKS = ("banking77", "papillon", "hover")

# the folders that `make data` makes
DATA = {"banking77": "banking77", "papillon": "pupa", "hover": "hotpotqa"}

ARMS = {
    "vanilla": "vanilla",
    "p": "prompts",
    "w": "weights",
    "pw": "prompts, then weights",
    "w-equal": "weights, as many rollouts as both",
}

# The paper's (v2) percentages for Llama-3.1-8B-Instruct and Qwen3-8B, in the order of ARMS
PAPER = {
    "banking77": ((58.4, 64.6), (59.4, 65.9), (63.7, 64.9), (63.7, 69.1)),
    "papillon": ((76.2, 78.3), (83.9, 78.1), (83.9, 83.3), (86.5, 81.1)),
    "hover": ((59.5, 60.6), (63.4, 69.3), (60.2, 71.0), (68.3, 71.5)),
}

DIFFERENCES = (
    ("p", "vanilla"),
    ("w", "vanilla"),
    ("pw", "vanilla"),
    ("pw", "p"),
    ("pw", "w"),
    ("pw", "w-equal"),
)

ABLATIONS = {
    "truncate": {"short_groups": "truncate"},
    "fill": {"short_groups": "fill"},
    "k-diverse": {"group_size": 4},
    "trajectory": {"level": "trajectory"},
    "no-std": {"scale_rewards": "none"},
    "warm-start": {"warm_start": 4},
}

# what the ledger calls them, beside the run that they are compared with
ABLATION_LABELS = {
    "w": "keep (the default)",
    "truncate": "truncate",
    "fill": "fill (the paper)",
    "k-diverse": "4 diverse members of 8",
    "trajectory": "trajectory level (Eq. 9)",
    "no-std": "advantages not divided by the std",
    "warm-start": "four steps on readable calls first",
}

QUICK = {
    "steps": 2,
    "trials": 3,
    "minibatch": 8,
    "eval_examples": 16,
    "bootstrap": 24,
    "eval_every": 2,
    "demo_sets": 1,
}


# ------------------------------------------------------------------------------------- the commands
@dataclass
class Job:
    """A command of mmgrpo.py; it is done when `leaves` is there."""

    leaves: Path
    command: list[str]

    def run(self) -> None:
        """Raises InputError with the last words of a command that fails."""
        if self.leaves.exists():
            return
        self.leaves.parent.mkdir(parents=True, exist_ok=True)
        log = self.leaves.with_suffix(".log")
        command = [sys.executable, str(ROOT / "mmgrpo.py"), *self.command]
        # on CPU jobs run beside each other, a thread each
        env = None if torch.cuda.is_available() else os.environ | {"OMP_NUM_THREADS": "1"}
        with log.open("a") as file:
            done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=env)
        if done.returncode or not self.leaves.exists():
            raise InputError(
                f"{' '.join(self.command)}: ended with {done.returncode}; {log} ends with: "
                f"{log.read_text()[-300:]}"
            )


class Study:
    """All of it: which jobs there are, what they left, what it says."""

    def __init__(self, out: Path, tasks: list[str], seeds: int, options: dict, data: str):
        self.out = out
        self.tasks = tasks
        self.seeds = range(seeds)
        self.given = {}  # of each task, the options of all its commands
        self.task = {}
        self.config = {}
        for t in tasks:
            self.given[t] = dict(options)
            if data:
                self.given[t]["data"] = str(Path(data) / DATA[t])
            self.task[t], self.config[t] = load_task({"task": t} | self.given[t])

    def folder(self, task: str, seed: int, arm: str) -> Path:
        return self.out / f"{task}-{seed}" / arm

    def job(self, leaves: Path, verb: str, task: str, seed: int, **more) -> Job:
        """`verb` with the options of the task, and `more`."""
        command = [verb]
        options = {"task": task, "seed": seed, "patience": 0} | self.given[task] | more
        for name, value in options.items():
            command += [flag_of(name), str(value)]
        return Job(leaves, command)

    def training(self, task: str, seed: int, arm: str, **more) -> Job:
        folder = self.folder(task, seed, arm)
        return self.job(folder / "result.json", "train", task, seed, out=folder, **more)

    def trainings(self) -> list[Job]:
        jobs = []
        for s in self.seeds:
            for t in self.tasks:
                jobs.append(self.training(t, s, "pw", strategy="p -> w"))
                jobs.append(self.training(t, s, "w"))
            if "hover" in self.tasks:
                for name, more in ABLATIONS.items():
                    jobs.append(self.training("hover", s, name, **more))
        return jobs

    def equal_steps(self, task: str) -> int:
        """Steps on weights alone with as many rollouts as a search and the training after it."""
        c = self.config[task]
        of_search = rollouts("p", c.trials, self.task[task], c)
        of_training = rollouts("w", c.steps, self.task[task], c)
        return max(c.steps + 1, affordable("w", self.task[task], c, of_search + of_training))

    def longer(self) -> list[Job]:
        """The runs on weights alone, copied and gone on with."""
        jobs = []
        for s in self.seeds:
            for t in self.tasks:
                folder = self.folder(t, s, "w-equal")
                if not folder.exists():
                    # a copy that was cut short has this name still
                    copy = folder.with_suffix(".new")
                    shutil.rmtree(copy, ignore_errors=True)
                    result = shutil.ignore_patterns("result.*")
                    shutil.copytree(self.folder(t, s, "w"), copy, ignore=result)
                    copy.rename(folder)
                jobs.append(self.training(t, s, "w-equal", steps=self.equal_steps(t)))
        return jobs

    def evaluations(self) -> list[Job]:
        """Every arm on test; on dev each candidate of the first seed's prompt search by itself."""
        jobs = []
        for s in self.seeds:
            for t in self.tasks:
                for arm, program in self.programs(t, s).items():
                    leaves = self.out / f"{t}-{s}" / f"test-{arm}.json"
                    more = {"eval_examples": 0} | self.given[t] | program
                    jobs.append(self.job(leaves, "eval", t, s, **more, split="test", out=leaves))
        for t in self.tasks:
            for name, prompts in self.candidates(t).items():
                path = self.out / f"{t}-spread" / f"{name}.json"
                path.parent.mkdir(exist_ok=True)
                if not path.exists():
                    write_json(path, prompts)
                leaves = path.with_suffix(".score")
                jobs.append(self.job(leaves, "eval", t, 0, prompts=path, out=leaves))
        return jobs

    def programs(self, task: str, seed: int) -> dict[str, dict]:
        """What each arm came to: arm -> the options "model" and "prompts", where it has its own."""
        search = self.folder(task, seed, "pw") / "1-p/prompts.json"
        weights = self.folder(task, seed, "pw") / "2-w/best"
        found = {
            "vanilla": {},
            "p": {"prompts": search},
            "pw": {"model": weights, "prompts": search},
        }
        for arm in ("w", "w-equal", *(ABLATIONS if task == "hover" else ())):
            folder = self.folder(task, seed, arm)
            found[arm] = {"model": folder / "best"}
            # under the demonstrations that it began with, if any
            if (folder / "prompts.json").exists():
                found[arm]["prompts"] = folder / "prompts.json"
        return found

    def candidates(self, task: str) -> dict[str, dict]:
        """Each instruction and each demo set of the first seed's search, the rest as it was.

        Returns name -> the prompts, "start" being those that the search began with.
        """
        kept = read_json(self.folder(task, 0, "pw") / "1-p/candidates.json")
        start = kept["start"]
        found = {"start": start}
        for module, places in kept["modules"].items():
            for kind, key in (("instructions", "instruction"), ("demos", "demos")):
                for k, value in enumerate(places[kind][1:], 1):
                    exchanged = {module: start[module] | {key: value}}
                    found[f"{module}-{kind}-{k}"] = start | exchanged
        return found

    def estimate(self, jobs: int) -> str:
        """Rollouts in all, and the time they take here, from a few of each task."""
        total = 0
        seconds = 0
        for t in self.tasks:
            task = self.task[t]
            config = self.config[t]
            model, tokenizer = load_model(config)
            few = task.train[:32]
            began = time.perf_counter()
            play(model, tokenizer, task, few, config, config.temperature, -1)
            each = (time.perf_counter() - began) / len(few)

            of_search = rollouts("p", config.trials, task, config)
            of_training = rollouts("w", config.steps, task, config)
            ablations = len(ABLATIONS) if t == "hover" else 0
            # w-equal is w, then as many rollouts more as p takes
            arms = 2 * (of_search + of_training) + of_training * ablations
            tests = 2 * len(task.test) * (len(ARMS) + ablations)
            total += len(self.seeds) * (arms + tests)
            # an update takes about as long as its rollouts
            seconds += len(self.seeds) * (arms * 1.7 + tests) * each
        minutes = seconds / min(jobs, 2) / 60
        return f"{total:,} rollouts, about {minutes:.0f} minutes (an estimate from a few rollouts)"

    def score(self, task: str, arm: str, how: str = "sampled") -> list[float]:
        """Test scores, one a seed."""
        scores = []
        for s in self.seeds:
            evaluation = read_json(self.out / f"{task}-{s}" / f"test-{arm}.json")
            scores.append(evaluation[how]["score"])
        return scores

    def mean_score(self, arm: str, how: str = "sampled") -> list[float]:
        """Mean test scores over the tasks, one a seed."""
        return list(np.mean([self.score(t, arm, how) for t in self.tasks], axis=0))

    def cost(self, task: str, arm: str) -> dict:
        """Mean rollouts, sampled tokens and seconds of an arm."""
        if arm == "vanilla":
            return {"rollouts": 0, "tokens": 0, "seconds": 0.0}
        runs = []
        for s in self.seeds:
            # prompts alone are the first stage of both
            folder = self.folder(task, s, "pw" if arm == "p" else arm)
            stages = read_json(folder / "result.json")["stages"]
            runs.append(stages[:1] if arm == "p" else stages)
        mean = {}
        for name in ("rollouts", "tokens", "seconds"):
            mean[name] = np.mean([sum(stage[name] for stage in stages) for stages in runs])
        return mean


# --------------------------------------------------------------------------------------- the ledger
def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def signed(values: list[float]) -> str:
    """The mean of differences, with its sign and interval."""
    return ("+" if np.mean(values) >= 0 else "") + interval(values)


def git(*args: str) -> str:
    """What git says of this checkout, nothing where there is none."""
    with contextlib.suppress(OSError):
        done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip()
    return ""


def device_name() -> str:
    """The GPU; else how many cores of which CPU."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line for line in cpuinfo.read_text().splitlines() if "model name" in line]
        cpu = models[0].split(":")[1].strip() if models else ""
    else:
        cpu = platform.processor()
    return f"{os.cpu_count()} cores of {cpu}"


def difference(a: list[float], b: list[float]) -> str:
    """a - b, paired by seed."""
    return signed(list(np.subtract(a, b)))


def ledger(study: Study, command: str, commit: str, spent: float) -> str:
    """The results as Markdown. `spent`: seconds in all."""
    date = time.strftime("%-d %B %Y")
    about = (
        f"Written by `{command}` on {date}, begun at commit {commit}, torch {torch.__version__}, "
        f"{device_name()}; {spent / 60:.0f} minutes. Test scores: mean over seeds 0 to "
        f"{len(study.seeds) - 1} with a 95% interval (Student's t) between seeds: the start, the "
        "tasks and their test examples stay the same. Differences are paired by seed, and none is "
        "corrected for there being several. Weights and prompts were chosen on dev; test was read "
        "once, at the end. Seconds are of jobs that run beside each other. The paper's numbers are "
        "its percentages for Llama-3.1-8B-Instruct / Qwen3-8B.\n"
    )
    parts = ["# Ledger\n", about]
    parts += ["## Four arms\n", arms_table(study)]
    parts += ["## Differences\n", differences_table(study), verdict(study.mean_score)]
    if "hover" in study.tasks:
        parts += ["## Ablations: weights alone, on hover\n", ablations_table(study)]
    about_spread = (
        "Dev scores, sampled, of the untrained LM when one instruction or one set of "
        "demonstrations is exchanged (candidates of seed 0), all else as it was; a score has the "
        "standard error in brackets. On the right the same, greedily.\n"
    )
    parts += ["## How much prompts matter to the start\n", about_spread, spread_table(study)]
    return "\n".join(parts)


def arms_table(study: Study) -> str:
    header = [
        "task",
        "arm",
        "test, sampled",
        "test, greedy",
        "the paper",
        "rollouts",
        "sampled tokens",
        "seconds",
    ]
    rows = []
    for t in study.tasks:
        for i, arm in enumerate(ARMS):
            sampled = interval(study.score(t, arm))
            greedy = interval(study.score(t, arm, "greedy"))
            # the last arm is not in the paper
            paper = " / ".join(map(str, PAPER[t][i])) if i < 4 else ""
            costs = [f"{x:,.0f}" for x in study.cost(t, arm).values()]
            rows.append([t, ARMS[arm], sampled, greedy, paper, *costs])
    for i, arm in enumerate(ARMS):
        sampled = interval(study.mean_score(arm))
        greedy = interval(study.mean_score(arm, "greedy"))
        paper = f"{np.mean([PAPER[t][i] for t in study.tasks]):.1f}" if i < 4 else ""
        rows.append(["mean", ARMS[arm], sampled, greedy, paper, "", "", ""])
    return table(header, rows)


def differences_table(study: Study) -> str:
    tasks = study.tasks
    header = ["", *tasks, "mean over tasks", "the paper's mean", "greedy, mean over tasks"]
    rows = []
    for a, b in DIFFERENCES:
        of_tasks = []
        for t in tasks:
            of_tasks.append(difference(study.score(t, a), study.score(t, b)))
        paper = ""
        if b != "w-equal":
            i = list(ARMS).index(a)
            j = list(ARMS).index(b)
            paper = f"{np.mean([np.subtract(PAPER[t][i], PAPER[t][j]) for t in tasks]):+.1f}"
        sampled = difference(study.mean_score(a), study.mean_score(b))
        greedy = difference(study.mean_score(a, "greedy"), study.mean_score(b, "greedy"))
        rows.append([f"{ARMS[a]} − {ARMS[b]}", *of_tasks, sampled, paper, greedy])
    return table(header, rows)


def verdict(mean) -> str:
    """Whether the paper's order came out, by `mean(arm)`: of each seed the mean over tasks."""
    said = []
    for a, b in (("p", "vanilla"), ("w", "vanilla"), ("pw", "p"), ("pw", "w")):
        values = np.subtract(mean(a), mean(b))
        if not abs(np.mean(values)) > half_width(values):
            relation = "not told apart from"
        else:
            relation = "above" if np.mean(values) > 0 else "below"
        said.append(f"{ARMS[a]} {relation} {ARMS[b]}")
    return (
        "The paper's order on the mean over tasks, vanilla < prompts, weights < both, by the 95% "
        f"intervals: {'; '.join(said)}.\n"
    )


def ablations_table(study: Study) -> str:
    header = ["", "test, sampled", "test, greedy", "sampled, minus keep", "seconds"]
    keep = study.score("hover", "w")
    rows = []
    for arm, label in ABLATION_LABELS.items():
        sampled = study.score("hover", arm)
        greedy = study.score("hover", arm, "greedy")
        minus_keep = "" if arm == "w" else difference(sampled, keep)
        seconds = f"{study.cost('hover', arm)['seconds']:.0f}"
        rows.append([label, interval(sampled), interval(greedy), minus_keep, seconds])
    return table(header, rows)


def spread_table(study: Study) -> str:
    """How the start's dev scores spread over the candidates of each module."""
    spread = ["lowest", "median", "highest"]
    header = ["task", "module", "exchanged", "start", "candidates", *spread, "greedy: start"]
    rows = []
    for t in study.tasks:
        folder = study.out / f"{t}-spread"
        names = list(study.candidates(t))
        start = read_json(folder / "start.score")
        modules = dict.fromkeys(name.split("-")[0] for name in names if name != "start")
        for module in modules:
            for kind in ("instructions", "demos"):
                chosen = [name for name in names if name.startswith(f"{module}-{kind}-")]
                if not chosen:
                    continue
                found = [read_json(folder / f"{name}.score") for name in chosen]
                sampled = [f["sampled"]["score"] for f in found]
                greedy = [f["greedy"]["score"] for f in found]
                row = [t, module, kind]
                row.append(f"{start['sampled']['score']:.3f} ({start['sampled']['stderr']:.3f})")
                row.append(str(len(sampled)))
                row += [f"{of(sampled):.3f}" for of in (min, np.median, max)]
                row.append(f"{start['greedy']['score']:.3f}")
                row += [f"{of(greedy):.3f}" for of in (min, np.median, max)]
                rows.append(row)
    return table([*header, *spread], rows)


def analysis(path: Path) -> str:
    """What stands in a ledger from the line "## Analysis" on.

    Raises InputError where it is no text.
    """
    try:
        _, heading, rest = path.read_text(encoding="utf-8").partition("\n## Analysis")
    except UnicodeDecodeError as e:
        raise InputError(f"{path}: cannot be read as text ({e})") from None
    return heading + rest


# -------------------------------------------------------------------------------------- the figures
def curve(study: Study, task: str, seed: int, arm: str) -> list[tuple[float, float]]:
    """(rollouts so far, best dev score so far) of an arm."""
    points = []
    used = 0
    best = -np.inf
    folder = study.folder(task, seed, arm)
    for stage in [folder / "1-p", folder / "2-w"] if arm == "pw" else [folder]:
        for name in ("start.json", "candidates.json"):
            if (stage / name).exists():
                used += read_json(stage / name)["rollouts"]
        for line in read_lines(stage / "trials.jsonl") + read_lines(stage / "metrics.jsonl"):
            # an evaluation, else a trial or a training step
            is_evaluation = "dev" in line
            for m in line["dev"].values() if is_evaluation else [line]:
                used += sum(m["statuses"].values())
            score = None
            if is_evaluation:
                score = line["dev"]["sampled"]["score"]
            elif line.get("full"):
                score = line["score"]
            if score is not None:
                best = max(best, score)
                points.append((used, best))
    return points


def figures(study: Study, results: Path) -> None:
    """arms.png, rollouts.png, ablations.png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    def bars(ax, values: dict[str, list[float]], title: str) -> None:
        means = [np.mean(v) for v in values.values()]
        # of one seed there is no interval
        halves = [half_width(v) if len(v) > 1 else 0.0 for v in values.values()]
        colors = [f"C{i}" for i in range(len(values))]
        ax.bar(range(len(values)), means, yerr=halves, capsize=3, color=colors)
        ax.set_xticks(range(len(values)), list(values), rotation=30, ha="right", fontsize=7)
        ax.set(title=title, ylabel="test score, sampled", ylim=(0, 1))

    def save(figure, name: str) -> None:
        figure.tight_layout()
        figure.savefig(results / name, dpi=110)
        pyplot.close(figure)

    n = len(study.tasks)
    figure, axes = pyplot.subplots(1, n, figsize=(4 * n, 4), squeeze=False)
    for ax, t in zip(axes[0], study.tasks):
        bars(ax, {ARMS[arm].replace(", ", ",\n"): study.score(t, arm) for arm in ARMS}, t)
    save(figure, "arms.png")

    figure, axes = pyplot.subplots(1, n, figsize=(4 * n, 4), squeeze=False)
    labels = {"w-equal": "weights", "pw": "prompts, then weights"}
    for ax, t in zip(axes[0], study.tasks):
        for i, (arm, label) in enumerate(labels.items()):
            for s in study.seeds:
                style = {"ms": 3, "color": f"C{i}", "alpha": 0.7}
                # one entry of the legend for all seeds
                style["label"] = label if s == 0 else None
                ax.plot(*zip(*curve(study, t, s, arm)), "o-", **style)
        xlabel = "rollouts, evaluations included"
        ax.set(title=t, xlabel=xlabel, ylabel="best dev score so far, sampled")
        ax.legend()
    save(figure, "rollouts.png")

    if "hover" in study.tasks:
        figure, ax = pyplot.subplots(figsize=(6, 4))
        values = {"keep": study.score("hover", "w")}
        values |= {name: study.score("hover", name) for name in ABLATIONS}
        bars(ax, values, "hover: weights alone")
        save(figure, "ablations.png")


# --------------------------------------------------------------------------------- the command line
def run_all(what: str, jobs: list[Job], at_a_time: int) -> None:
    """Run the jobs, some beside each other.

    The first that fails ends it; those that run go on to their end.
    """
    with ThreadPoolExecutor(at_a_time) as pool:
        running = [pool.submit(job.run) for job in jobs]
        try:
            for job in tqdm(as_completed(running), desc=what, unit="job", total=len(jobs)):
                job.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def parse_arguments() -> argparse.Namespace:
    """The options, with `tasks` as a list. Raises InputError."""
    cores = 1 if torch.cuda.is_available() else os.cpu_count() or 1
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    option = parser.add_argument
    option(
        "--out",
        type=Path,
        help="where everything is kept while it runs [runs/reproduce, or runs/quick]",
    )
    option(
        "--results",
        type=Path,
        help="where the ledger and the figures go [results, or runs/quick]",
    )
    option("--tasks", default=",".join(TASKS), help="[%(default)s]")
    option("--seeds", type=int, default=3, help="how many, from 0 [%(default)s]")
    option("--model", help="another start: a folder or a hub name")
    option(
        "--data",
        default="",
        help="folder with banking77/, pupa/ and hotpotqa/, as `make data` leaves them; empty: the "
        "miniature",
    )
    option("--jobs", type=int, default=cores, help="at a time [%(default)s]")
    option(
        "--quick",
        action="store_true",
        help="a few steps of one seed, to see that all of it works; its numbers mean nothing",
    )
    args = parser.parse_args()
    args.tasks = args.tasks.split(",")
    for i, task in enumerate(args.tasks):
        if task not in TASKS or task in args.tasks[:i]:
            raise InputError(f"--tasks: {task!r} is none of {', '.join(TASKS)}, or there twice")
    if args.seeds < 1 or args.jobs < 1:
        raise InputError("--seeds and --jobs: expected at least 1")
    args.out = args.out or Path("runs/quick" if args.quick else "runs/reproduce")
    args.results = args.results or (args.out if args.quick else Path("results"))
    return args


def begin(out: Path, given: dict) -> dict:
    """{"options", "commit", "seconds"}, of a study that is there as it was begun.

    Raises InputError where the options that are given now are other ones.
    """
    commit = git("rev-parse", "--short", "HEAD") or "unknown"
    if git("status", "--porcelain", "--untracked-files=no"):
        commit += " with changes"
    begun = {"options": given, "commit": commit, "seconds": 0.0}
    path = out / "study.json"
    if path.exists():
        before = read_json(path)
        if [type(before.get(key)) for key in begun] != [dict, str, float]:
            raise InputError(f"{path}: is not as a study writes it")
        # more tasks may be added
        same_options(out, before["options"], {**before["options"], **given})
        begun["commit"] = before["commit"]
        begun["seconds"] = before["seconds"]
    return begun


def main() -> None:
    began = time.time()
    args = parse_arguments()
    options = {}
    if args.model:
        options["model"] = args.model
    if args.quick:
        options |= QUICK
    study = Study(args.out, args.tasks, 1 if args.quick else args.seeds, options, args.data)
    begun = begin(args.out, study.given)
    path = args.results / "LEDGER.md"
    kept = ""
    with contextlib.suppress(FileNotFoundError):
        kept = analysis(path)
    for folder in (args.out, args.results):
        folder.mkdir(parents=True, exist_ok=True)
    # before the first job, so that a study that is killed keeps its options
    write_json(args.out / "study.json", begun)
    estimate = study.estimate(args.jobs)
    print(
        f"{len(study.trainings())} trainings and more, {args.jobs} at a time: {estimate}",
        flush=True,
    )
    try:
        for what in ("trainings", "longer", "evaluations"):
            run_all(what, getattr(study, what)(), args.jobs)
    finally:
        begun["seconds"] += time.time() - began
        write_json(args.out / "study.json", begun)
    command = " ".join(["python", "-m", "studies.reproduce", *sys.argv[1:]])
    text = ledger(study, command, begun["commit"], begun["seconds"])
    write_whole(path, text + kept)
    figures(study, args.results)
    print(text)
    print(f"written to {args.results}")


if __name__ == "__main__":
    lenient_output()
    try:
        main()
    except (InputError, CheckpointError, OSError) as e:
        sys.exit(f"error: {e}")
