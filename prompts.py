"""Prompt optimization: better instructions and demonstrations for the modules of a program, and its composition with mmGRPO.

    candidates   per module: instructions (the task's, the user's, or written by an LM), sets of demonstrations (cut from good runs)
    search       tries them, all modules together, on minibatches of dev; what it tries next follows what was good so far (TPE)
    compose      "p -> w": search prompts, then train weights under them; every stage starts from what the one before left

The search is in the manner of MIPROv2 (arXiv 2406.11695), the composition in that of BetterTogether (arXiv 2407.10930).
"""
from __future__ import annotations

import dataclasses
import json
import math
import random
import re
import time
from collections import Counter
from pathlib import Path
from typing import Callable

from tqdm import tqdm

from checkpoint import same_options
from endpoint import Endpoint, Remote
from lora import lora_layers, merged
from mmgrpo import Config, Sampler, evaluate, play, train
from model import save_pretrained
from program import InputError, Module, Prediction, Program, Task, Trajectory, run_programs
from prompt_files import difference, prompts_of, save_dspy, save_prompts, set_prompts, write_json
from report import cost, read_lines
from tokenizer import read_json


# --------------------------------------------------------------------------------------------------- demonstrations
def cut_demos(runs: list[Trajectory], score: float) -> dict[str, list[list[dict]]]:
    """Module -> for each good run (completed, with at least this reward) that called it, its calls as demonstrations: inputs and
    outputs, its reasoning included. What JSON cannot hold is left out."""
    demos: dict[str, list[list[dict]]] = {}
    for t in runs:
        if t.status == "completed" and t.reward >= score:
            for name in dict.fromkeys(c.module for c in t.calls):
                own = [c.inputs | c.outputs for c in t.calls if c.module == name and c.outputs is not None]
                if own := [d for d in own if is_json(d)]:
                    demos.setdefault(name, []).append(own)
    return demos


def is_json(value) -> bool:
    try:
        return json.loads(json.dumps(value)) == value
    except (TypeError, ValueError, RecursionError):
        return False


def labelled_demos(module: Module, examples: list[dict]) -> list[dict]:
    """Demonstrations from examples that hold a module's inputs and some of its outputs. What they lack (a reasoning) is marked
    as not supplied in the prompt."""
    names = lambda fields: [f.name for f in fields]
    inputs, outputs = names(module.signature.inputs), names(module.signature.outputs)
    return [demo for e in examples if all(n in e for n in inputs) and any(n in e for n in outputs)
            and is_json(demo := {n: e[n] for n in inputs + outputs if n in e})]


def demo_sets(module: Module, runs: list[list[dict]], labelled: list[dict], config: Config, name: str) -> list[list[dict]]:
    """Up to `demo_sets` different sets of 1 to `demos` demonstrations: of calls from as many runs; the last one is labelled."""
    sets: list[list[dict]] = []
    for i in range(config.demo_sets if config.demos else 0):
        rng = random.Random(repr(("demos", config.seed, name, i)))
        n = 1 + i % config.demos
        last = labelled and i == config.demo_sets - 1
        chosen = rng.sample(labelled, min(n, len(labelled))) if last else [rng.choice(r) for r in rng.sample(runs, min(n, len(runs)))]
        if chosen and chosen not in sets:
            sets.append(chosen)
    return sets


# ----------------------------------------------------------------------------------------------------- instructions
TIPS = ("Be short and exact.", "Say what a good answer must contain.", "Say what mistake to avoid.", "Describe how to reason first.",
        "Write for someone who has never seen the task.", "")


class Propose(Program):
    """An LM program that writes an instruction for a module of another: it first says what the data are like."""
    def __init__(self):
        self.describe = Module("examples: list[str] -> description", "Say in two sentences what these data are about.")
        self.propose = Module(
            "data_description, module_inputs, module_outputs, traces: list[str], current_instruction, tip -> proposed_instruction",
            "A module of a language model program gets the inputs and gives the outputs named here. Write a better instruction for it.")

    async def forward(self, examples, given):
        description = (await self.describe(examples=examples)).description
        return Prediction(text=(await self.propose(data_description=description, **given)).proposed_instruction)


def propose(task: Task, demos: dict, config: Config, sampler) -> tuple[dict[str, list[str]], dict[str, int], list]:
    """`proposals` instructions per module from the LM behind the sampler, grounded in the module's signature, training examples,
    calls of good runs, the present instruction and a tip -> those that can be used, how many cannot and why, the runs of Propose."""
    shorten = lambda value: json.dumps(value, ensure_ascii=False, default=str)[:400]
    modules, asked = task.program.modules(), []
    for name, module in modules.items():
        for i in range(config.proposals):
            rng = random.Random(repr(("propose", config.seed, name, i)))
            traces = [shorten(rng.choice(run)) for run in rng.sample(demos.get(name, []), min(2, len(demos.get(name, []))))]
            sides = (", ".join(f.name for f in side) for side in (module.signature.inputs, module.signature.outputs))
            given = dict(zip(("module_inputs", "module_outputs"), sides), traces=traces, current_instruction=module.instruction,
                         tip=TIPS[i % len(TIPS)])
            asked.append({"module": name, "given": given,
                          "examples": [shorten(e) for e in rng.sample(task.train, min(3, len(task.train)))]})
    runs = run_programs(Propose(), asked, lambda example, prediction: 0.0, sampler, seed=config.seed, step=-3)
    written, dropped = {name: [] for name in modules}, Counter()
    for question, run in zip(asked, runs):
        name = question["module"]
        text = run.prediction["text"].strip() if run.status == "completed" else ""
        wrong = flaw(text, [modules[name].instruction, *written[name]]) if run.status == "completed" else run.status
        if wrong:
            dropped[wrong] += 1
        else:
            written[name].append(text)
    return written, dict(dropped), runs


def flaw(text: str, known: list[str]) -> str:
    """Why an instruction cannot be used; "" where it can."""
    return ("empty" if not text else "over-long" if len(text) > 2000 else "has tags" if re.search(r"</?\w+\s*/?>|<\|", text)
            else "known" if text in known else "")


# ----------------------------------------------------------------------------------------------------------- search
Choice = tuple[int, ...]                # of each place (a module's instruction or demos) the number of its candidate; 0: as it was


def next_choice(sizes: list[int], scored: dict[Choice, float], rng: random.Random, startup: int = 8, gamma: float = 0.25,
                draws: int = 24) -> Choice:
    """A tree-structured Parzen estimator over categories (Bergstra et al., 2011). The best quarter of what was tried is good, the
    rest bad; each place is counted by itself, with one count more for every candidate; of `draws` choices drawn as the good ones
    are, the one with the largest ratio of good to bad probability that is new, if any is. The first `startup` are uniform."""
    if len(scored) < startup:
        uniform = [tuple(rng.randrange(n) for n in sizes) for _ in range(draws)]
        return next((c for c in uniform if c not in scored), uniform[0])
    ranked = sorted(scored, key=lambda c: -scored[c])
    cut = math.ceil(gamma * len(ranked))
    share = lambda group: [[(1 + sum(c[d] == k for c in group)) / (n + len(group)) for k in range(n)] for d, n in enumerate(sizes)]
    good, bad = share(ranked[:cut]), share(ranked[cut:])
    drawn = [tuple(rng.choices(range(n), good[d])[0] for d, n in enumerate(sizes)) for _ in range(draws)]
    return max(drawn, key=lambda c: (c not in scored, sum(math.log(good[d][k] / bad[d][k]) for d, k in enumerate(c))))


def next_trial(sizes: list[int], trials: list[dict], config: Config) -> tuple[Choice, bool] | None:
    """What to score next, and whether on all of dev; None at the end. The start comes first, on all; then minibatches, and
    after every `full_every` of them, and at the end, all of dev for the best on average that has not had it."""
    if not trials:
        return (0,) * len(sizes), True
    sums: dict[Choice, list[float]] = {}
    for t in trials:
        total = sums.setdefault(tuple(t["choice"]), [0.0, 0])
        total[0], total[1] = total[0] + t["score"] * t["examples"], total[1] + t["examples"]
    mean = {c: total / n for c, (total, n) in sums.items()}
    whole = {tuple(t["choice"]) for t in trials if t["full"]}
    small = sum(not t["full"] for t in trials)
    if small and not trials[-1]["full"] and (small % config.full_every == 0 or small == config.trials) and mean.keys() - whole:
        return max((c for c in mean if c not in whole), key=mean.get), True
    if small == config.trials or not sizes:
        return None
    return next_choice(sizes, mean, random.Random(repr(("trial", config.seed, small)))), False


def candidates(task: Task, model, tokenizer, config: Config) -> dict:
    """Per module the instructions and demo sets to choose from, the present ones first, and what it cost to get them."""
    began, modules = time.perf_counter(), task.program.modules()
    given = dict(task.instructions)
    if config.instructions:
        given = read_instructions(config.instructions, modules)
    sample = task.train[:config.bootstrap] if config.demos or config.proposals else []
    runs = play(model, tokenizer, task, sample, config, config.temperature, -2)[0] if sample else []
    demos, written, dropped, asked = cut_demos(runs, config.demo_score), {}, {}, []
    if config.proposals:
        endpoint = Endpoint.named("MMGRPO_PROPOSER", temperature=1.0)
        sampler = Remote(endpoint) if endpoint else Sampler(model, tokenizer, slots=config.slots, max_tokens=256,
                                                            temperature=config.temperature)
        written, dropped, asked = propose(task, demos, config, sampler)
    found = {}
    for name, m in modules.items():
        instructions = list(dict.fromkeys([m.instruction, *given.get(name, ()), *written.get(name, ())]))
        found[name] = {"instructions": instructions, "demos": [m.demos, *demo_sets(
            m, demos.get(name, []), labelled_demos(m, sample), config, name)]}
    return {"modules": found, "good_runs": sum(t.status == "completed" and t.reward >= config.demo_score for t in runs),
            "dropped": dropped, "rollouts": len(runs + asked), "tokens": sum(len(c.completion.token_ids) for t in runs + asked for c in t.calls),
            "seconds": time.perf_counter() - began}


def read_instructions(path: str, modules: dict[str, Module]) -> dict[str, list[str]]:
    """A JSON object: module -> a list of instructions. Raises CheckpointError or InputError naming file and module."""
    given = read_json(Path(path))
    for name, texts in given.items():
        if name not in modules:
            raise InputError(f"{path}: {name}: no such module (there are {', '.join(modules)})")
        if not (isinstance(texts, list) and all(isinstance(t, str) and not flaw(t.strip(), []) for t in texts)):
            raise InputError(f"{path}: {name}: expected a list of instructions (text, not empty, without tags, up to 2,000 characters)")
    return given


def search(task: Task, model, tokenizer, config: Config, out: Path, stop: Callable[[], bool] = lambda: False) -> list[float]:
    """Search the prompts of the task's program; leave the best in it and in OUT/prompts.json (for DSPy: dspy.json); return the dev scores of what was
    scored on all of dev, the start first: the best is never below it. Candidates and trials are kept (candidates.json,
    trials.jsonl): a search that was killed goes on with the trial at hand and ends as if it had not been."""
    out.mkdir(parents=True, exist_ok=True)
    options = dataclasses.asdict(config)
    if not (out / "candidates.json").exists():
        write_json(out / "candidates.json", {"config": options, "start": prompts_of(task.program)}
                   | candidates(task, model, tokenizer, config))
    kept = read_json(out / "candidates.json")
    same_options(out, kept["config"], options)
    places = [(name, kind) for name, module in kept["modules"].items() for kind in ("instructions", "demos") if len(module[kind]) > 1]
    sizes = [len(kept["modules"][name][kind]) for name, kind in places]
    dev, trials = task.dev[:config.eval_examples or None], read_lines(out / "trials.jsonl", cut=True)

    def put(choice: Choice) -> None:
        prompts = {name: dict(p) for name, p in kept["start"].items()}
        for (name, kind), k in zip(places, choice):
            prompts[name]["instruction" if kind == "instructions" else kind] = kept["modules"][name][kind][k]
        set_prompts(task.program, prompts)

    bar = tqdm(desc=f"{config.task}: prompts", unit="trial", disable=None, initial=len(trials), total=len(trials))
    with (out / "trials.jsonl").open("a", encoding="utf-8") as log:
        while not stop() and (trial := next_trial(sizes, trials, config)):
            choice, full = trial
            put(choice)
            rng = random.Random(repr(("minibatch", config.seed, len(trials))))
            examples = dev if full else rng.sample(dev, min(config.minibatch, len(dev)))
            result = evaluate(model, tokenizer, task, examples, config, config.temperature, -1 if full else -4 - len(trials))
            trials.append({"trial": len(trials), "choice": choice, "full": full, "examples": len(examples), **result})
            print(json.dumps(trials[-1]), file=log, flush=True)
            bar.update()
            bar.set_postfix(best=f"{max(t['score'] for t in trials if t['full']):.3f}", refresh=False)
    bar.close()
    whole = [t for t in trials if t["full"]]
    put(max(whole, key=lambda t: t["score"])["choice"] if whole else ())
    save_prompts(task.program, out / "prompts.json")
    save_dspy(task.program, out / "dspy.json")
    return [t["score"] for t in whole]


# ------------------------------------------------------------------------------------------------------ composition
def stages(strategy: str) -> list[str]:
    """"p -> w" -> ["p", "w"]; "(p -> w) x 2", a round of each in turn, is those twice. Raises InputError."""
    rounds = re.fullmatch(r"\((.+)\) x ([1-9]\d?)", strategy.strip())
    kinds = [kind.strip() for kind in (rounds[1] if rounds else strategy).split("->")] * int(rounds[2] if rounds else 1)
    if not set(kinds) <= {"p", "w"}:
        raise InputError(f'--strategy {strategy!r}: expected p (prompts) and w (weights) joined by ->, as "p -> w" or "(p -> w) x 3"')
    return kinds


def rollouts(kind: str, n: int, task: Task, config: Config) -> int:
    """Runs that n steps ("w") or n trials ("p") take, at most: evaluations, demonstrations and proposals included."""
    dev = len(task.dev[:config.eval_examples or None])
    if kind == "w":
        return n * config.examples * config.rollouts + 2 * dev * (1 + math.ceil(n / config.eval_every))
    sample = min(config.bootstrap, len(task.train)) if config.demos or config.proposals else 0
    return (sample + config.proposals * len(task.program.modules()) + dev * (1 + math.ceil(n / config.full_every))
            + n * min(config.minibatch, dev))


def affordable(kind: str, task: Task, config: Config, budget: int) -> int:
    """How many steps or trials `budget` runs allow. Raises InputError where it is not one."""
    if rollouts(kind, 1, task, config) > budget:
        raise InputError(f"--budget {config.budget}: leaves {budget} rollouts for each stage; one {'step' if kind == 'w' else 'trial'} "
                         f"with its evaluations takes {rollouts(kind, 1, task, config)}")
    n = 1
    while rollouts(kind, n + 1, task, config) <= budget:
        n += 1
    return n


def compose(task: Task, config: Config, out: Path, load: Callable, stop: Callable[[], bool] = lambda: False) -> dict:
    """The stages of config.strategy one after another, each from the weights and prompts that the one before found best on dev
    (where it starts is a candidate of every stage, so dev never falls). The task's program comes with its present prompts,
    `load(config)` gives model and tokenizer. A strategy of several stages has a folder for each in `out`. Returns where the best
    weights and prompts are, the dev scores of each stage and what it took."""
    kinds, at, told = stages(config.strategy), {"model": config.model, "prompts": config.prompts}, []
    for i, kind in enumerate(kinds):
        folder = out / f"{i + 1}-{kind}" if len(kinds) > 1 else out
        stage = dataclasses.replace(config, **at, seed=config.seed + 1000 * kinds[:i].count(kind))      # other examples, other draws
        if config.budget:
            stage = dataclasses.replace(stage, **{{"w": "steps", "p": "trials"}[kind]: affordable(kind, task, stage, config.budget // len(kinds))})
        model, tokenizer = load(stage)
        if i and kind == "w" and lora_layers(model):        # of an earlier stage: the next one trains a new one on top
            stage = dataclasses.replace(stage, model=str(folder / "base"))
            if not (folder / "base").exists():
                save_pretrained(merged(model), tokenizer, folder / "base")
            model, tokenizer = load(stage)
        folder.mkdir(parents=True, exist_ok=True)
        before = prompts_of(task.program)
        scores = (train if kind == "w" else search)(task, model, tokenizer, stage, folder, stop)
        told.append({"stage": folder.name, "dev": scores} | cost(folder) if scores else {})
        at |= {"model": str(folder / "best")} if kind == "w" else {"prompts": str(folder / "prompts.json")}
        if kind == "p":
            print(difference(before, prompts_of(task.program)))
        if stop():
            break
    result = at | {"stages": told}
    if not stop():
        write_json(out / "result.json", result)
    return result
