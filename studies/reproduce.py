"""The paper's comparison in one command: prompts, weights, and prompts then weights, on three programs, over several seeds.

    make reproduce                  # the miniature edition; MODEL= and DATA= for real ones; QUICK=1 for a trial run

Every training, search and evaluation is a command of mmgrpo.py in a process of its own, with a folder of its own in
runs/reproduce: what is done is skipped, what was interrupted goes on. Weights and prompts are chosen on dev; the test split is
read when all of them are there. Then results/LEDGER.md and the figures are written; what stands in the ledger below the line
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
from run.loading import load_model, load_task
from run.records import read_lines
from run.state import same_options
from run.terminal import lenient_output

ROOT = Path(__file__).resolve().parent.parent
TASKS = ("banking77", "papillon", "hover")
DATA = {"banking77": "banking77", "papillon": "pupa", "hover": "hotpotqa"}      # folders that `make data` makes
ARMS = {"vanilla": "vanilla", "p": "prompts", "w": "weights", "pw": "prompts, then weights", "w-equal": "weights, as many rollouts as both"}
# The paper's (v2), mean of Llama-3.1-8B-Instruct and Qwen3-8B, in the order of ARMS
PAPER = {"banking77": ((58.4, 64.6), (59.4, 65.9), (63.7, 64.9), (63.7, 69.1)), "papillon": ((76.2, 78.3), (83.9, 78.1), (83.9, 83.3), (86.5, 81.1)),
         "hover": ((59.5, 60.6), (63.4, 69.3), (60.2, 71.0), (68.3, 71.5))}
DIFFERENCES = (("p", "vanilla"), ("w", "vanilla"), ("pw", "vanilla"), ("pw", "p"), ("pw", "w"), ("pw", "w-equal"))
ABLATIONS = {"truncate": {"short_groups": "truncate"}, "fill": {"short_groups": "fill"}, "k-diverse": {"group_size": 4},
             "trajectory": {"level": "trajectory"}, "no-std": {"scale_rewards": "none"}, "warm-start": {"warm_start": 4}}
QUICK = {"steps": 2, "trials": 3, "minibatch": 8, "eval_examples": 16, "bootstrap": 24, "eval_every": 2, "demo_sets": 1}


@dataclass
class Job:
    """A command of mmgrpo.py; it is done when `leaves` is there."""
    leaves: Path
    command: list[str]

    def run(self) -> None:
        if self.leaves.exists():
            return
        self.leaves.parent.mkdir(parents=True, exist_ok=True)
        log = self.leaves.with_suffix(".log")
        with log.open("a") as file:
            done = subprocess.run([sys.executable, str(ROOT / "mmgrpo.py"), *self.command], stdout=file, stderr=subprocess.STDOUT,
                                  env=os.environ | {"OMP_NUM_THREADS": "1"} if not torch.cuda.is_available() else None)
        if done.returncode or not self.leaves.exists():
            raise InputError(f"{' '.join(self.command)}: ended with {done.returncode}; {log} ends with: {log.read_text()[-300:]}")


class Study:
    """All of it: which jobs there are, what they left, what it says."""
    def __init__(self, out: Path, tasks: list[str], seeds: int, options: dict, data: str):
        self.out, self.tasks, self.seeds = out, tasks, range(seeds)
        self.given = {t: options | ({"data": str(Path(data) / DATA[t])} if data else {}) for t in tasks}
        loaded = {t: load_task({"task": t} | self.given[t]) for t in tasks}
        self.task, self.config = {t: x[0] for t, x in loaded.items()}, {t: x[1] for t, x in loaded.items()}

    def folder(self, task: str, seed: int, arm: str) -> Path:
        return self.out / f"{task}-{seed}" / arm

    def job(self, leaves: Path, verb: str, task: str, seed: int, **more) -> Job:
        options = {"task": task, "seed": seed, "patience": 0} | self.given[task] | more
        return Job(leaves, [verb, *(x for k, v in options.items() for x in (f"--{k.replace('_', '-')}", str(v)))])

    def equal_steps(self, task: str) -> int:
        """Steps of training weights alone that take as many rollouts as a prompt search and the training after it."""
        c = self.config[task]
        both = rollouts("p", c.trials, self.task[task], c) + rollouts("w", c.steps, self.task[task], c)
        return max(c.steps + 1, affordable("w", self.task[task], c, both))

    def trainings(self) -> list[Job]:
        jobs, train = [], lambda t, s, arm, **more: self.job(self.folder(t, s, arm) / "result.json", "train", t, s,
                                                            out=self.folder(t, s, arm), **more)
        for s in self.seeds:
            for t in self.tasks:
                jobs += [train(t, s, "pw", strategy="p -> w"), train(t, s, "w")]
            if "hover" in self.tasks:
                jobs += [train("hover", s, name, **more) for name, more in ABLATIONS.items()]
        return jobs

    def longer(self) -> list[Job]:
        """The runs on weights alone, copied and gone on with."""
        jobs = []
        for s in self.seeds:
            for t in self.tasks:
                folder, steps = self.folder(t, s, "w-equal"), self.equal_steps(t)
                if not folder.exists():
                    shutil.rmtree(folder.with_suffix(".new"), ignore_errors=True)       # of a copy that was cut short
                    shutil.copytree(self.folder(t, s, "w"), folder.with_suffix(".new"), ignore=shutil.ignore_patterns("result.*"))
                    folder.with_suffix(".new").rename(folder)
                jobs.append(self.job(folder / "result.json", "train", t, s, out=folder, steps=steps))
        return jobs

    def evaluations(self) -> list[Job]:
        """Every arm on test, and on dev every candidate of the first seed's prompt search by itself."""
        jobs = []
        for s in self.seeds:
            for t in self.tasks:
                pw = self.folder(t, s, "pw")
                found = {"vanilla": {}, "p": {"prompts": pw / "1-p/prompts.json"},
                         "pw": {"model": pw / "2-w/best", "prompts": pw / "1-p/prompts.json"}}
                for arm in ("w", "w-equal", *(ABLATIONS if t == "hover" else ())):
                    folder = self.folder(t, s, arm)
                    began = {"prompts": folder / "prompts.json"} if (folder / "prompts.json").exists() else {}
                    found[arm] = {"model": folder / "best"} | began         # under the demonstrations that it began with, if any
                for arm, more in found.items():
                    leaves = self.out / f"{t}-{s}" / f"test-{arm}.json"
                    jobs.append(self.job(leaves, "eval", t, s, **{"eval_examples": 0} | self.given[t] | more, split="test", out=leaves))
        for t in self.tasks:
            for name, prompts in self.candidates(t).items():
                at = self.out / f"{t}-spread" / f"{name}.json"
                at.parent.mkdir(exist_ok=True)
                if not at.exists():
                    write_json(at, prompts)
                jobs.append(self.job(at.with_suffix(".score"), "eval", t, 0, prompts=at, out=at.with_suffix(".score")))
        return jobs

    def candidates(self, task: str) -> dict[str, dict]:
        """Each instruction and each demo set of the first seed's search, the rest as it was -> the prompts."""
        kept = read_json(self.folder(task, 0, "pw") / "1-p/candidates.json")
        found = {"start": kept["start"]}
        for module, places in kept["modules"].items():
            for kind, key in (("instructions", "instruction"), ("demos", "demos")):
                for k, value in enumerate(places[kind][1:], 1):
                    found[f"{module}-{kind}-{k}"] = kept["start"] | {module: kept["start"][module] | {key: value}}
        return found

    def estimate(self, jobs: int) -> str:
        """Rollouts in all, and the time they take here, from a few of each task."""
        total = seconds = 0
        for t in self.tasks:
            task, config = self.task[t], self.config[t]
            model, tokenizer = load_model(config)
            began, few = time.perf_counter(), task.train[:32]
            play(model, tokenizer, task, few, config, config.temperature, -1)
            each = (time.perf_counter() - began) / len(few)
            p, w = rollouts("p", config.trials, task, config), rollouts("w", config.steps, task, config)
            arms = 2 * (p + w) + w * len(ABLATIONS) * (t == "hover")        # w-equal is w, then as many rollouts more as p takes
            tests = 2 * len(task.test) * (len(ARMS) + len(ABLATIONS) * (t == "hover"))
            total += len(self.seeds) * (arms + tests)
            seconds += len(self.seeds) * (arms * 1.7 + tests) * each        # an update takes about as long as its rollouts
        return f"{total:,} rollouts, about {seconds / min(jobs, 2) / 60:.0f} minutes (an estimate from a few rollouts)"

    def score(self, task: str, arm: str, how: str = "sampled") -> list[float]:
        """Test scores, one a seed."""
        return [read_json(self.out / f"{task}-{s}" / f"test-{arm}.json")[how]["score"] for s in self.seeds]

    def cost(self, task: str, arm: str) -> dict:
        """Mean rollouts, sampled tokens and seconds of an arm."""
        if arm == "vanilla":
            return {"rollouts": 0, "tokens": 0, "seconds": 0.0}
        told = [read_json(self.folder(task, s, "pw" if arm == "p" else arm) / "result.json")["stages"] for s in self.seeds]
        told = [stages[:1] if arm == "p" else stages for stages in told]
        return {k: np.mean([sum(stage[k] for stage in stages) for stages in told]) for k in ("rollouts", "tokens", "seconds")}


# ------------------------------------------------------------------------------------------------- the ledger, figures
def table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(r) + " |" for r in (header, ["---"] * len(header), *rows)) + "\n"


def signed(values: list[float]) -> str:
    return "+" * bool(np.mean(values) >= 0) + interval(values)


def git(*args: str) -> str:
    """What git says of this checkout, nothing where there is none."""
    with contextlib.suppress(OSError):
        return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return ""


def ledger(study: Study, command: str, commit: str, spent: float) -> str:
    """The results as Markdown."""
    seeds, tasks = len(study.seeds), study.tasks
    score = {(t, a, how): study.score(t, a, how) for t in tasks for a in ARMS for how in ("sampled", "greedy")}
    mean = lambda a, how="sampled": list(np.mean([score[t, a, how] for t in tasks], axis=0))
    diff = lambda a, b: list(np.subtract(a, b))
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "") \
        if Path("/proc/cpuinfo").exists() else platform.processor()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} cores of {cpu}"
    paper = lambda t, i: " / ".join(map(str, PAPER[t][i])) if i < 4 else ""
    parts = ["# Ledger\n", (
        f"Written by `{command}` on {time.strftime('%-d %B %Y')}, begun at commit {commit}, torch {torch.__version__}, {device}; "
        f"{spent / 60:.0f} minutes. Test scores: mean over seeds 0 to {seeds - 1} with a 95% interval (Student's t) between seeds: the start, the tasks and "
        "their test examples stay the same. Differences are paired by seed, and none is corrected for there being several. Weights and prompts "
        "were chosen on dev; test was read once, at the end. Seconds are of jobs that run beside each other. The paper's numbers are its percentages for "
        "Llama-3.1-8B-Instruct / Qwen3-8B.\n"), "## Four arms\n"]
    parts.append(table(["task", "arm", "test, sampled", "test, greedy", "the paper", "rollouts", "sampled tokens", "seconds"], [
        [t, ARMS[a], interval(score[t, a, "sampled"]), interval(score[t, a, "greedy"]), paper(t, i),
         *(f"{x:,.0f}" for x in study.cost(t, a).values())] for t in tasks for i, a in enumerate(ARMS)]
        + [["mean", ARMS[a], interval(mean(a)), interval(mean(a, "greedy")),
            f"{np.mean([PAPER[t][i] for t in tasks]):.1f}" if i < 4 else "", "", "", ""] for i, a in enumerate(ARMS)]))
    parts += ["## Differences\n", table(["", *tasks, "mean over tasks", "the paper's mean", "greedy, mean over tasks"], [
        [f"{ARMS[a]} − {ARMS[b]}", *(signed(diff(score[t, a, "sampled"], score[t, b, "sampled"])) for t in tasks), signed(diff(mean(a), mean(b))),
         f"{np.mean([np.subtract(PAPER[t][list(ARMS).index(a)], PAPER[t][list(ARMS).index(b)]) for t in tasks]):+.1f}" if b != "w-equal" else "",
         signed(diff(mean(a, "greedy"), mean(b, "greedy")))] for a, b in DIFFERENCES]), verdict(mean)]
    if "hover" in tasks:
        names = {"w": "keep (the default)", "truncate": "truncate", "fill": "fill (the paper)", "k-diverse": "4 diverse members of 8",
                 "trajectory": "trajectory level (Eq. 9)", "no-std": "advantages not divided by the std",
                 "warm-start": "four steps on readable calls first"}
        parts += ["## Ablations: weights alone, on hover\n", table(["", "test, sampled", "test, greedy", "sampled, minus keep", "seconds"], [
            [label, interval(study.score("hover", a)), interval(study.score("hover", a, "greedy")),
             "" if a == "w" else signed(diff(study.score("hover", a), study.score("hover", "w"))), f"{study.cost('hover', a)['seconds']:.0f}"]
            for a, label in names.items()])]
    parts += ["## How much prompts matter to the start\n", "Dev scores, sampled, of the untrained LM when one instruction or one set of demonstrations "
              "is exchanged (candidates of seed 0), all else as it was; a score has the standard error in brackets. On the right the same, greedily.\n"]
    rows = []
    for t in tasks:
        read = lambda name, how="sampled": read_json(study.out / f"{t}-spread" / f"{name}.score")[how]
        found = list(study.candidates(t))
        for module in dict.fromkeys(n.split("-")[0] for n in found if n != "start"):
            for kind in ("instructions", "demos"):
                values, greedy = ([read(n, how)["score"] for n in found if n.startswith(f"{module}-{kind}-")] for how in ("sampled", "greedy"))
                if values:
                    rows.append([t, module, kind, f"{read('start')['score']:.3f} ({read('start')['stderr']:.3f})", str(len(values)),
                                 *(f"{f(values):.3f}" for f in (min, np.median, max)), f"{read('start', 'greedy')['score']:.3f}",
                                 *(f"{f(greedy):.3f}" for f in (min, np.median, max))])
    parts.append(table(["task", "module", "exchanged", "start", "candidates", "lowest", "median", "highest", "greedy: start", "lowest", "median",
                        "highest"], rows))
    return "\n".join(parts)


def analysis(path: Path) -> str:
    """What stands in a ledger from the line "## Analysis" on. Raises InputError where it is no text."""
    try:
        _, heading, rest = path.read_text(encoding="utf-8").partition("\n## Analysis")
    except UnicodeDecodeError as e:
        raise InputError(f"{path}: cannot be read as text ({e})") from None
    return heading + rest


def verdict(mean) -> str:
    """Whether the paper's order came out, on the mean over tasks."""
    said = []
    for a, b in (("p", "vanilla"), ("w", "vanilla"), ("pw", "p"), ("pw", "w")):
        values = np.subtract(mean(a), mean(b))
        sure = abs(np.mean(values)) > half_width(values)
        said.append(f"{ARMS[a]} {'not told apart from' if not sure else 'above' if np.mean(values) > 0 else 'below'} {ARMS[b]}")
    return f"The paper's order on the mean over tasks, vanilla < prompts, weights < both, by the 95% intervals: {'; '.join(said)}.\n"


def curve(study: Study, task: str, seed: int, arm: str) -> list[tuple[float, float]]:
    """(rollouts so far, best dev score so far) of an arm."""
    points, used, best = [], 0, -np.inf
    folders = [study.folder(task, seed, "pw") / "1-p", study.folder(task, seed, "pw") / "2-w"] if arm == "pw" else [study.folder(task, seed, arm)]
    for folder in folders:
        for name in ("start.json", "candidates.json"):
            used += read_json(folder / name)["rollouts"] if (folder / name).exists() else 0
        for line in read_lines(folder / "trials.jsonl") + read_lines(folder / "metrics.jsonl"):
            used += sum(sum(m["statuses"].values()) for m in (line["dev"].values() if "dev" in line else [line]))
            score = line["dev"]["sampled"]["score"] if "dev" in line else line["score"] if line.get("full") else None
            if score is not None:
                best = max(best, score)
                points.append((used, best))
    return points


def figures(study: Study, results: Path) -> None:
    """arms.png, rollouts.png, ablations.png."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    half = lambda v: half_width(v) if len(v) > 1 else 0.0

    def bars(ax, values: dict[str, list[float]], title: str) -> None:
        ax.bar(range(len(values)), [np.mean(v) for v in values.values()], yerr=[half(v) for v in values.values()], capsize=3,
               color=[f"C{i}" for i in range(len(values))])
        ax.set_xticks(range(len(values)), list(values), rotation=30, ha="right", fontsize=7)
        ax.set(title=title, ylabel="test score, sampled", ylim=(0, 1))

    n = len(study.tasks)
    figure, axes = pyplot.subplots(1, n, figsize=(4 * n, 4), squeeze=False)
    for ax, t in zip(axes[0], study.tasks):
        bars(ax, {ARMS[a].replace(", ", ",\n"): study.score(t, a) for a in ARMS}, t)
    figure.tight_layout(), figure.savefig(results / "arms.png", dpi=110), pyplot.close(figure)
    figure, axes = pyplot.subplots(1, n, figsize=(4 * n, 4), squeeze=False)
    for ax, t in zip(axes[0], study.tasks):
        for i, (arm, label) in enumerate((("w-equal", "weights"), ("pw", "prompts, then weights"))):
            for s in study.seeds:
                ax.plot(*zip(*curve(study, t, s, arm)), "o-", ms=3, color=f"C{i}", alpha=0.7, label=label if s == 0 else None)
        ax.set(title=t, xlabel="rollouts, evaluations included", ylabel="best dev score so far, sampled")
        ax.legend()
    figure.tight_layout(), figure.savefig(results / "rollouts.png", dpi=110), pyplot.close(figure)
    if "hover" in study.tasks:
        figure, ax = pyplot.subplots(figsize=(6, 4))
        bars(ax, {"keep": study.score("hover", "w")} | {a: study.score("hover", a) for a in ABLATIONS}, "hover: weights alone")
        figure.tight_layout(), figure.savefig(results / "ablations.png", dpi=110), pyplot.close(figure)


def run_all(what: str, jobs: list[Job], at_a_time: int) -> None:
    """Run the jobs, some beside each other. The first that fails ends it; those that run go on to their end."""
    with ThreadPoolExecutor(at_a_time) as pool:
        running = [pool.submit(job.run) for job in jobs]
        try:
            for job in tqdm(as_completed(running), desc=what, unit="job", total=len(jobs)):
                job.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, help="where everything is kept while it runs [runs/reproduce, or runs/quick]")
    parser.add_argument("--results", type=Path, help="where the ledger and the figures go [results, or runs/quick]")
    parser.add_argument("--tasks", default=",".join(TASKS), help="[%(default)s]")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0 [%(default)s]")
    parser.add_argument("--model", help="another start: a folder or a hub name")
    parser.add_argument("--data", default="", help="folder with banking77/, pupa/ and hotpotqa/, as `make data` leaves them; empty: the miniature")
    parser.add_argument("--jobs", type=int, default=1 if torch.cuda.is_available() else os.cpu_count() or 1, help="at a time [%(default)s]")
    parser.add_argument("--quick", action="store_true", help="a few steps of one seed, to see that all of it works; its numbers mean nothing")
    args = parser.parse_args()
    began, tasks = time.time(), args.tasks.split(",")
    args.out = args.out or Path("runs/quick" if args.quick else "runs/reproduce")
    args.results = args.results or (args.out if args.quick else Path("results"))
    if odd := [t for i, t in enumerate(tasks) if t not in TASKS or t in tasks[:i]]:
        raise InputError(f"--tasks: {odd[0]!r} is none of {', '.join(TASKS)}, or there twice")
    if args.seeds < 1 or args.jobs < 1:
        raise InputError("--seeds and --jobs: expected at least 1")
    options = ({"model": args.model} if args.model else {}) | (QUICK if args.quick else {})
    study = Study(args.out, tasks, 1 if args.quick else args.seeds, options, args.data)
    begun = {"options": study.given, "commit": (git("rev-parse", "--short", "HEAD") or "unknown")
             + " with changes" * bool(git("status", "--porcelain", "--untracked-files=no")), "seconds": 0.0}
    if (args.out / "study.json").exists():
        before = read_json(args.out / "study.json")
        if [type(before.get(key)) for key in begun] != [dict, str, float]:
            raise InputError(f"{args.out / 'study.json'}: is not as a study writes it")
        same_options(args.out, before["options"], {**before["options"], **study.given})
        begun |= {"commit": before["commit"], "seconds": before["seconds"]}
    path, kept = args.results / "LEDGER.md", ""
    with contextlib.suppress(FileNotFoundError):
        kept = analysis(path)
    for folder in (args.out, args.results):
        folder.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "study.json", begun)              # also where it is killed
    print(f"{len(study.trainings())} trainings and more, {args.jobs} at a time: {study.estimate(args.jobs)}", flush=True)
    try:
        for what in ("trainings", "longer", "evaluations"):
            run_all(what, getattr(study, what)(), args.jobs)
    finally:
        begun["seconds"] += time.time() - began
        write_json(args.out / "study.json", begun)
    text = ledger(study, " ".join(["python", "-m", "studies.reproduce", *sys.argv[1:]]), begun["commit"], begun["seconds"])
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
