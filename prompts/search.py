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
import sys
import time
from bisect import bisect_right
from collections import Counter
from pathlib import Path
from typing import Callable

from tqdm import tqdm

from lm.endpoint import Endpoint, Remote
from lm.lora import lora_layers, merged
from lm.tokenizer import read_json
from mmgrpo import Config, Sampler, check_sampling, evaluate, play, train
from model import save_pretrained
from program import InputError, Module, Prediction, Program, Task, Trajectory, run_programs
from prompts.files import (
    difference,
    kept_options,
    prompts_of,
    save_dspy,
    save_prompts,
    set_prompts,
    write_json,
)
from prompts.start import begin, demonstrations, is_json, most_rollouts, without_shown
from run.records import cost, read_lines
from run.state import same_options, states, step_of
from run.terminal import trial_line


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
            else "no text" if re.search("[\ud800-\udfff]", text) else "known" if text in known else "")


# ----------------------------------------------------------------------------------------------------------- search
Choice = tuple[int, ...]    # the candidate in each place, 0 being what was there. Example: (2, 0), ask's instruction 2, its demos as they were


def next_choice(sizes: list[int], scored: dict[Choice, float], rng: random.Random, startup: int = 8, gamma: float = 0.25,
                draws: int = 24) -> Choice:
    """A tree-structured Parzen estimator over categories (Bergstra et al., 2011). The best quarter of what was tried is good, the
    rest bad; each place is counted by itself, with one count more for every candidate (Laplace's smoothing); of `draws` choices drawn as the good ones
    are, the one with the largest ratio of good to bad probability that is new, if any is. Until `startup` different ones were tried, draws are uniform."""
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
    after every `full_every` of them, and at the end, all of dev for the best on average that has not had it. It ends after
    `trials` minibatches, or where every choice there is has had all of dev."""
    if not trials:
        return (0,) * len(sizes), True
    sums: dict[Choice, list[float]] = {}
    for t in trials:
        total = sums.setdefault(tuple(t["choice"]), [0.0, 0])
        total[0], total[1] = total[0] + t["score"] * t["examples"], total[1] + t["examples"]
    mean = {c: total / n for c, (total, n) in sums.items()}
    whole = {tuple(t["choice"]) for t in trials if t["full"]}
    small = sum(not t["full"] for t in trials)
    if small and not trials[-1]["full"] and (small % config.full_every == 0 or small >= config.trials) and mean.keys() - whole:
        return max((c for c in mean if c not in whole), key=mean.get), True
    if small >= config.trials or len(whole) == math.prod(sizes):
        return None
    return next_choice(sizes, mean, random.Random(repr(("trial", config.seed, small)))), False


def candidates(task: Task, model, tokenizer, config: Config) -> dict:
    """Per module the instructions and demo sets to choose from, the present ones first, and what it cost to get them."""
    began, modules, given = time.perf_counter(), task.program.modules(), given_instructions(task, config)
    sample = task.train[:config.bootstrap] if config.demos and config.demo_sets or config.proposals else []
    runs = play(model, tokenizer, task, sample, config, config.temperature, -2)[0] if sample else []
    demos, written, dropped, asked = cut_demos(runs, config.demo_score), {}, {}, []
    if config.proposals:
        endpoint = Endpoint.named("MMGRPO_PROPOSER", temperature=1.0)
        sampler = Remote(endpoint) if endpoint else Sampler(model, tokenizer, slots=config.slots, max_tokens=256,
                                                            temperature=config.temperature)
        written, dropped, asked = propose(task, demos, config, sampler)
    found, shown = {}, [demonstrations(task, e) for e in sample]
    for name, m in modules.items():
        labelled = [demo for of_example in shown for demo in of_example.get(name, [])]
        instructions = list(dict.fromkeys([m.instruction, *given.get(name, ()), *written.get(name, ())]))
        found[name] = {"instructions": instructions, "demos": [m.demos, *demo_sets(m, demos.get(name, []), labelled, config, name)]}
    return {"modules": found, "good_runs": sum(t.status == "completed" and t.reward >= config.demo_score for t in runs),
            "dropped": dropped, "rollouts": len(runs + asked), "tokens": sum(len(c.completion.token_ids) for t in runs + asked for c in t.calls),
            "seconds": time.perf_counter() - began}


def given_instructions(task: Task, config: Config) -> dict[str, list[str]]:
    """Module -> instructions to choose from: those of the user's file, else the task's. Raises CheckpointError or InputError naming
    the file and the module."""
    given, modules = read_json(Path(config.instructions)) if config.instructions else task.instructions, task.program.modules()
    for name, texts in given.items():
        where = f"{config.instructions or f'--task {config.task}: its instructions'}: {name}"
        if name not in modules:
            raise InputError(f"{where}: no such module (there are {', '.join(modules)})")
        if not (isinstance(texts, (list, tuple)) and all(isinstance(t, str) and not flaw(t.strip(), []) for t in texts)):
            raise InputError(f"{where}: expected a list of instructions (text, not empty, without tags, up to 2,000 characters)")
    return given


def check_candidates(kept: dict, program: Program) -> None:
    """Raises LookupError, TypeError or AttributeError where it is not what `candidates` gave for this program."""
    start, modules = kept["start"], kept["modules"]
    demos = [*(p["demos"] for p in start.values()), *(d for m in modules.values() for d in m["demos"])]
    texts = [*(p["instruction"] for p in start.values()), *(t for m in modules.values() for t in m["instructions"])]
    if not (start.keys() == modules.keys() == program.modules().keys() and all(isinstance(t, str) for t in texts)
            and all(isinstance(d, list) and all(isinstance(x, dict) for x in d) for d in demos)
            and all(isinstance(p["descriptions"], dict) for p in start.values()) and isinstance(kept["dropped"], dict)
            and [type(kept[key]) for key in ("good_runs", "rollouts", "tokens", "seconds")] == [int, int, int, float]):
        raise TypeError


def read_trials(path: Path, sizes: list[int]) -> list[dict]:
    """The trials so far. Raises InputError naming file and line; half a line at the end, of a search that was killed, is cut off."""
    trials = read_lines(path, cut=True)
    for i, t in enumerate(trials, 1):
        t = t if isinstance(t, dict) else {}
        choice, score, n, counts = t.get("choice"), t.get("score"), t.get("examples"), (t.get("trial"), t.get("rollouts"), t.get("tokens"))
        if not (t.get("trial") == i - 1 and all(type(k) is int for k in counts) and type(t.get("seconds")) is float and isinstance(choice, list) and len(choice) == len(sizes) and all(type(k) is int and 0 <= k < n for k, n in zip(choice, sizes))
                and type(score) in (int, float) and math.isfinite(score) and type(n) is int and n > 0 and type(t.get("full")) is bool):
            raise InputError(f"{path}, line {i}: is no trial of this search")
    return trials


def search(task: Task, model, tokenizer, config: Config, out: Path, stop: Callable[[], bool] = lambda: False) -> list[float]:
    """Search the prompts of the task's program; leave the best in it and, when it ends, in OUT/prompts.json (for DSPy: dspy.json);
    return the dev scores of what was scored on all of dev, the start first: the best is never below it. Candidates and trials are
    kept (candidates.json, trials.jsonl): a search that was killed goes on with the trial at hand and ends as if it had not been."""
    out.mkdir(parents=True, exist_ok=True)
    options = kept_options(config, task.program)
    if not (out / "candidates.json").exists():
        write_json(out / "candidates.json", {"config": options, "start": prompts_of(task.program)}
                   | candidates(task, model, tokenizer, config))
    kept = read_json(out / "candidates.json")
    try:
        same_options(out, kept["config"], options)
        check_candidates(kept, task.program)
        places = [(name, kind) for name in kept["start"] for kind in ("instructions", "demos") if len(kept["modules"][name][kind]) > 1]
        print(f"{kept['good_runs']} of {kept['rollouts']} runs were good enough for demonstrations (--demo-score {config.demo_score})"
              + f"; proposals dropped: {kept['dropped']}" * bool(kept["dropped"]))
    except (LookupError, TypeError, AttributeError):
        raise InputError(f"{out / 'candidates.json'}: is not as a search of this program writes it") from None
    sizes = [len(kept["modules"][name][kind]) for name, kind in places]
    dev, trials = task.dev[:config.eval_examples or None], read_trials(out / "trials.jsonl", sizes)

    def put(choice: Choice) -> None:
        prompts = {name: dict(p) for name, p in kept["start"].items()}
        for (name, kind), k in zip(places, choice):
            prompts[name]["instruction" if kind == "instructions" else kind] = kept["modules"][name][kind][k]
        set_prompts(task.program, prompts)

    bar = tqdm(desc=f"{config.task}: prompts", unit="trial", disable=None, initial=len(trials), total=len(trials))
    with (out / "trials.jsonl").open("a", encoding="utf-8") as log:
        while (trial := next_trial(sizes, trials, config)) and not stop():
            choice, full = trial
            put(choice)
            rng = random.Random(repr(("minibatch", config.seed, len(trials))))
            examples = dev if full else rng.sample(dev, min(config.minibatch, len(dev)))
            result = evaluate(model, tokenizer, task, examples, config, config.temperature, -1 if full else -4 - len(trials))
            trials.append({"trial": len(trials), "choice": choice, "full": full, "examples": len(examples), **result})
            print(json.dumps(trials[-1]), file=log, flush=True)
            best = max(t["score"] for t in trials if t["full"])
            bar.update()
            bar.set_postfix(best=f"{best:.3f}", refresh=False)
            if bar.disable:                                 # no terminal
                print(trial_line(trials[-1], best), file=sys.stderr, flush=True)
    bar.close()
    whole = [t for t in trials if t["full"]]
    put(max(whole, key=lambda t: t["score"])["choice"] if whole else ())
    (out / "prompts.json").unlink(missing_ok=True)
    if not trial:
        if "metadata" not in kept["start"]:                 # the one name that DSPy cannot save
            save_dspy(task.program, out / "dspy.json")
        save_prompts(task.program, out / "prompts.json")
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
    sample = min(config.bootstrap, len(task.train)) if config.demos and config.demo_sets or config.proposals else 0
    return (sample + config.proposals * len(task.program.modules()) + dev * (1 + math.ceil(n / config.full_every))
            + n * min(config.minibatch, dev))


def affordable(kind: str, task: Task, config: Config, budget: int) -> int:
    """How many steps or trials `budget` runs allow. Raises InputError where it is not one."""
    if rollouts(kind, 1, task, config) > budget:
        raise InputError(f"--budget {config.budget}: leaves {budget} rollouts for each stage; one {'step' if kind == 'w' else 'trial'} "
                         f"with its evaluations takes {rollouts(kind, 1, task, config)}")
    return bisect_right(range(budget), budget, lo=1, key=lambda n: rollouts(kind, n, task, config)) - 1        # one takes one at least


def plan(task: Task, config: Config) -> list[tuple[str, Config]]:
    """The stages of config.strategy with their settings: a second round draws anew, but is scored with the same random numbers; a
    budget says how many steps and trials there are. Raises InputError for what could not be begun, or afforded, later on."""
    kinds, todo = stages(config.strategy), []
    for i, kind in enumerate(kinds):
        again, dev_seed = kinds[:i].count(kind), config.seed if config.dev_seed < 0 else config.dev_seed
        stage = dataclasses.replace(config, seed=config.seed + 1000 * again, dev_seed=dev_seed) if again else config
        if config.budget:
            n = affordable(kind, task, stage, config.budget // len(kinds) - (most_rollouts(task, config) if i == 0 else 0))
            stage = dataclasses.replace(stage, **{"steps" if kind == "w" else "trials": n})
        todo.append((kind, stage))
    if "w" in kinds:
        check_sampling(config)
    if "p" in kinds:
        given_instructions(task, config), Endpoint.named("MMGRPO_PROPOSER")
    return todo


def compose(task: Task, config: Config, out: Path, load: Callable, stop: Callable[[], bool] = lambda: False) -> dict | None:
    """The stages of config.strategy one after another, each from the weights and prompts that the one before found best on dev;
    where it starts is a candidate of every stage. The task's program comes with its present prompts, `load(config)` gives model
    and tokenizer. Several stages have a folder each in `out`. Returns, and writes to OUT/result.json, where the best weights and
    prompts are, the dev scores of each stage and what it took; None where it was stopped before the end."""
    todo, at, told = plan(task, config), {"model": config.model, "prompts": config.prompts}, []
    for i, (kind, stage) in enumerate(todo):
        folder = (out / f"{i + 1}-{kind}" if len(todo) > 1 else out).resolve()
        stage = dataclasses.replace(stage, **at)
        model, tokenizer = load(stage)
        if i and kind == "w" and lora_layers(model):        # it is merged, and a new one trained on top
            stage = dataclasses.replace(stage, model=str(folder / "base"))
            if not (folder / "base" / "model.safetensors").exists():        # the file that is written last
                save_pretrained(merged(model), tokenizer, folder / "base")
            model, tokenizer = load(stage)
        folder.mkdir(parents=True, exist_ok=True)
        if len(todo) > 1:
            write_json(folder / "config.json", dataclasses.asdict(stage) | {"strategy": kind})
        if i == 0:
            began_with_demos = begin(task, model, tokenizer, stage, folder)
            if began_with_demos and kind == "w":            # a search writes its own
                save_prompts(task.program, folder / "prompts.json")
        before = prompts_of(task.program)
        scores = (train if kind == "w" else search)(without_shown(task), model, tokenizer, stage, folder, stop)
        ended = (folder / "prompts.json").exists() if kind == "p" else step_of(states(folder)[-1]) >= stage.steps
        if not ended:
            return None
        if kind == "p":
            print(difference(before, prompts_of(task.program)))
        if kind == "w":
            at["model"] = str(folder / "best")
        if (folder / "prompts.json").exists():
            at["prompts"] = str(folder / "prompts.json")
        told.append({"stage": folder.name, "dev": scores, **cost(folder)})
    write_json(out / "result.json", at | {"stages": told})
    return at | {"stages": told}
