"""Prompt optimization: better instructions and demonstrations, and its composition with mmGRPO.

    candidates   per module: instructions (the task's, the user's, or written by an LM), sets of
                 demonstrations (cut from good runs)
    search       tries them, all modules together, on minibatches of dev; what it tries next follows
                 what was good so far (TPE)
    compose      "p -> w": search prompts, then train weights under them; every stage starts from
                 what the one before left

The search is in the manner of MIPROv2 (arXiv 2406.11695), the composition in that of BetterTogether
(arXiv 2407.10930).
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
from typing import Any, Callable

from tqdm import tqdm

from lm.endpoint import Endpoint, Remote
from lm.lora import lora_layers, merged
from lm.tokenizer import Tokenizer, read_json
from mmgrpo import Config, Sampler, check_sampling, evaluate, play, train
from model import Transformer, save_pretrained
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

# Steps below zero give random numbers of their own to what is no step of training. Minibatches
# count down from theirs.
DEV_STEP = -1
BOOTSTRAP_STEP = -2
PROPOSE_STEP = -3
MINIBATCH_STEP = -4

# tokens of a proposed instruction, and characters of one that can be used
PROPOSAL_TOKENS = 256
LONGEST_INSTRUCTION = 2000


# ----------------------------------------------------------------------------------- demonstrations
def _is_good(run: Trajectory, score: float) -> bool:
    return run.status == "completed" and run.reward >= score


def cut_demos(runs: list[Trajectory], score: float) -> dict[str, list[list[dict]]]:
    """Module -> for each good run that called it, its calls as demonstrations.

    Good is what completed with at least this reward. A demonstration is inputs and outputs, its
    reasoning included. What JSON cannot hold is left out.
    """
    demos: dict[str, list[list[dict]]] = {}
    for run in runs:
        if not _is_good(run, score):
            continue
        of_modules: dict[str, list[dict]] = {}
        for call in run.calls:
            if call.outputs is None:
                continue
            demo = call.inputs | call.outputs
            if is_json(demo):
                of_modules.setdefault(call.module, []).append(demo)
        for name, of_module in of_modules.items():
            demos.setdefault(name, []).append(of_module)
    return demos


def demo_sets(
    module: Module, runs: list[list[dict]], labelled: list[dict], config: Config, name: str
) -> list[list[dict]]:
    """Up to `demo_sets` different sets of 1 to `demos` demonstrations.

    Those of a set are calls from as many runs; the last set is labelled.
    """
    sets: list[list[dict]] = []
    for i in range(config.demo_sets if config.demos else 0):
        rng = random.Random(repr(("demos", config.seed, name, i)))
        size = 1 + i % config.demos
        is_last = i == config.demo_sets - 1
        if labelled and is_last:
            chosen = rng.sample(labelled, min(size, len(labelled)))
        else:
            chosen = [rng.choice(run) for run in rng.sample(runs, min(size, len(runs)))]
        if chosen and chosen not in sets:
            sets.append(chosen)
    return sets


# ------------------------------------------------------------------------------------- instructions
TIPS = (
    "Be short and exact.",
    "Say what a good answer must contain.",
    "Say what mistake to avoid.",
    "Describe how to reason first.",
    "Write for someone who has never seen the task.",
    "",
)


class Propose(Program):
    """An LM program that writes an instruction for a module of another.

    It first says what the data are like.
    """

    def __init__(self):
        self.describe = Module(
            "examples: list[str] -> description",
            "Say in two sentences what these data are about.",
        )
        self.propose = Module(
            "data_description, module_inputs, module_outputs, traces: list[str], "
            "current_instruction, tip -> proposed_instruction",
            "A module of a language model program gets the inputs and gives the outputs named "
            "here. Write a better instruction for it.",
        )

    async def forward(self, examples: list[str], given: dict) -> Prediction:
        description = (await self.describe(examples=examples)).description
        answer = await self.propose(data_description=description, **given)
        return Prediction(text=answer.proposed_instruction)


def flaw(text: str, known: list[str]) -> str:
    """Why an instruction cannot be used; "" where it can."""
    if not text:
        return "empty"
    if len(text) > LONGEST_INSTRUCTION:
        return "over-long"
    if re.search(r"</?\w+\s*/?>|<\|", text):
        return "has tags"
    # halves of a character
    if re.search("[\ud800-\udfff]", text):
        return "no text"
    if text in known:
        return "known"
    return ""


def _shortened(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)[:400]


def _question(task: Task, name: str, runs: list[list[dict]], config: Config, i: int) -> dict:
    """What Propose is asked for the i-th new instruction of a module, given its good runs."""
    module = task.program.modules()[name]
    rng = random.Random(repr(("propose", config.seed, name, i)))
    traced = rng.sample(runs, min(2, len(runs)))
    given = {
        "module_inputs": ", ".join(f.name for f in module.signature.inputs),
        "module_outputs": ", ".join(f.name for f in module.signature.outputs),
        "traces": [_shortened(rng.choice(run)) for run in traced],
        "current_instruction": module.instruction,
        "tip": TIPS[i % len(TIPS)],
    }
    examples = rng.sample(task.train, min(3, len(task.train)))
    return {"module": name, "given": given, "examples": [_shortened(e) for e in examples]}


def propose(
    task: Task, demos: dict[str, list[list[dict]]], config: Config, sampler: Any
) -> tuple[dict[str, list[str]], dict[str, int], list[Trajectory]]:
    """`proposals` instructions per module from the LM behind the sampler.

    They are grounded in the module's signature, training examples, calls of good runs, the present
    instruction and a tip. Returns those that can be used, how many cannot and why, and the runs of
    Propose.
    """
    modules = task.program.modules()
    questions = []
    for name in modules:
        for i in range(config.proposals):
            questions.append(_question(task, name, demos.get(name, []), config, i))
    runs = run_programs(
        Propose(),
        questions,
        lambda example, prediction: 0.0,
        sampler,
        seed=config.seed,
        step=PROPOSE_STEP,
    )
    written: dict[str, list[str]] = {name: [] for name in modules}
    dropped: Counter[str] = Counter()
    for question, run in zip(questions, runs):
        name = question["module"]
        text = ""
        wrong = run.status
        if run.status == "completed":
            text = run.prediction["text"].strip()
            wrong = flaw(text, [modules[name].instruction, *written[name]])
        if wrong:
            dropped[wrong] += 1
        else:
            written[name].append(text)
    return written, dict(dropped), runs


def given_instructions(task: Task, config: Config) -> dict[str, list[str]]:
    """Module -> instructions to choose from: those of the user's file, else the task's.

    Raises CheckpointError or InputError naming the file and the module.
    """
    given = task.instructions
    source = f"--task {config.task}: its instructions"
    if config.instructions:
        given = read_json(Path(config.instructions))
        source = config.instructions
    modules = task.program.modules()
    for name, texts in given.items():
        if name not in modules:
            raise InputError(f"{source}: {name}: no such module (there are {', '.join(modules)})")
        if not isinstance(texts, (list, tuple)) or not all(map(_is_instruction, texts)):
            raise InputError(
                f"{source}: {name}: expected a list of instructions (text, not empty, without "
                "tags, up to 2,000 characters)"
            )
    return given


def _is_instruction(text: Any) -> bool:
    return isinstance(text, str) and not flaw(text.strip(), [])


# --------------------------------------------------------------------------------------- candidates
def _bootstraps(config: Config) -> bool:
    """Whether training examples are run, for demonstrations or to ground proposals."""
    return bool(config.demos and config.demo_sets or config.proposals)


def candidates(task: Task, model: Transformer, tokenizer: Tokenizer, config: Config) -> dict:
    """Per module the instructions and demo sets to choose from, the present ones first.

    Returns {"modules": {name: {"instructions", "demos"}}, …, and what it cost to get them}.
    """
    began = time.perf_counter()
    given = given_instructions(task, config)
    sample = task.train[: config.bootstrap] if _bootstraps(config) else []
    runs: list[Trajectory] = []
    if sample:
        runs, _ = play(model, tokenizer, task, sample, config, config.temperature, BOOTSTRAP_STEP)
    demos = cut_demos(runs, config.demo_score)

    written: dict[str, list[str]] = {}
    dropped: dict[str, int] = {}
    asked: list[Trajectory] = []
    if config.proposals:
        sampler = _proposer(model, tokenizer, config)
        written, dropped, asked = propose(task, demos, config, sampler)

    shown = [demonstrations(task, example) for example in sample]
    found = {}
    for name, module in task.program.modules().items():
        labelled = [demo for of_modules in shown for demo in of_modules.get(name, [])]
        sets = demo_sets(module, demos.get(name, []), labelled, config, name)
        texts = [module.instruction, *given.get(name, ()), *written.get(name, ())]
        # each instruction once
        found[name] = {
            "instructions": list(dict.fromkeys(texts)),
            "demos": [module.demos, *sets],
        }
    everything = runs + asked
    tokens = sum(len(call.completion.token_ids) for run in everything for call in run.calls)
    return {
        "modules": found,
        "good_runs": sum(_is_good(run, config.demo_score) for run in runs),
        "dropped": dropped,
        "rollouts": len(everything),
        "tokens": tokens,
        "seconds": time.perf_counter() - began,
    }


def _proposer(model: Transformer, tokenizer: Tokenizer, config: Config) -> Sampler | Remote:
    """The LM that writes instructions: the one that MMGRPO_PROPOSER names, else the one at hand."""
    endpoint = Endpoint.named("MMGRPO_PROPOSER", temperature=1.0)
    if endpoint:
        return Remote(endpoint)
    return Sampler(
        model,
        tokenizer,
        slots=config.slots,
        max_tokens=PROPOSAL_TOKENS,
        temperature=config.temperature,
    )


def _is_demos(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(demo, dict) for demo in value)


def check_candidates(kept: dict, program: Program) -> None:
    """Raises LookupError, TypeError or AttributeError where it is not of this program's search."""
    start = kept["start"]
    modules = kept["modules"]
    texts = []
    demos = []
    for entry in start.values():
        texts.append(entry["instruction"])
        demos.append(entry["demos"])
    for found in modules.values():
        texts += found["instructions"]
        demos += found["demos"]
    cost = [type(kept[key]) for key in ("good_runs", "rollouts", "tokens", "seconds")]
    good = (
        start.keys() == modules.keys() == program.modules().keys()
        and all(isinstance(text, str) for text in texts)
        and all(map(_is_demos, demos))
        and all(isinstance(entry["descriptions"], dict) for entry in start.values())
        and isinstance(kept["dropped"], dict)
        and cost == [int, int, int, float]
    )
    if not good:
        raise TypeError


def kept_candidates(
    task: Task, model: Transformer, tokenizer: Tokenizer, config: Config, out: Path
) -> dict:
    """What OUT/candidates.json keeps; it is made where it is not there.

    Raises InputError naming the file, or the option that is not as it was.
    """
    path = out / "candidates.json"
    options = kept_options(config, task.program)
    if not path.exists():
        begun = {"config": options, "start": prompts_of(task.program)}
        write_json(path, begun | candidates(task, model, tokenizer, config))
    kept = read_json(path)
    try:
        same_options(out, kept["config"], options)
        check_candidates(kept, task.program)
    except (LookupError, TypeError, AttributeError):
        raise InputError(f"{path}: is not as a search of this program writes it") from None
    return kept


# ------------------------------------------------------------------------------------------- search
# The candidate in each place, 0 being what was there.
# Example: (2, 0), ask's instruction 2, its demos as they were
Choice = tuple[int, ...]


def _shares(sizes: list[int], choices: list[Choice]) -> list[list[float]]:
    """Place -> candidate -> its share of these choices, each place by itself.

    Every candidate counts one more than it was chosen (Laplace's smoothing).
    """
    shares = []
    for place, size in enumerate(sizes):
        counts = Counter(choice[place] for choice in choices)
        shares.append([(1 + counts[k]) / (size + len(choices)) for k in range(size)])
    return shares


def next_choice(
    sizes: list[int],
    scored: dict[Choice, float],
    rng: random.Random,
    startup: int = 8,
    gamma: float = 0.25,
    draws: int = 24,
) -> Choice:
    """A tree-structured Parzen estimator over categories (Bergstra et al., 2011).

    The best quarter (`gamma`) of what was tried is good, the rest bad. Of `draws` choices drawn as
    the good ones are, it takes the one with the largest ratio of good to bad probability that is
    new, if any is. Until `startup` different ones were tried, draws are uniform.
    """
    if len(scored) < startup:
        uniform = [tuple(rng.randrange(size) for size in sizes) for _ in range(draws)]
        new = [choice for choice in uniform if choice not in scored]
        return new[0] if new else uniform[0]
    ranked = sorted(scored, key=lambda choice: -scored[choice])
    cut = math.ceil(gamma * len(ranked))
    good = _shares(sizes, ranked[:cut])
    bad = _shares(sizes, ranked[cut:])
    drawn = []
    for _ in range(draws):
        picks = [rng.choices(range(size), share)[0] for size, share in zip(sizes, good)]
        drawn.append(tuple(picks))

    def promise(choice: Choice) -> tuple[bool, float]:
        ratio = sum(math.log(good[d][k] / bad[d][k]) for d, k in enumerate(choice))
        return choice not in scored, ratio

    return max(drawn, key=promise)


def next_trial(sizes: list[int], trials: list[dict], config: Config) -> tuple[Choice, bool] | None:
    """What to score next, and whether on all of dev; None at the end.

    The start comes first, on all; then minibatches, and after every `full_every` of them, and at
    the end, all of dev for the best on average that has not had it. It ends after `trials`
    minibatches, or where every choice there is has had all of dev.
    """
    if not trials:
        return (0,) * len(sizes), True
    sums: dict[Choice, float] = {}
    counts: dict[Choice, int] = {}
    for trial in trials:
        choice = tuple(trial["choice"])
        sums[choice] = sums.get(choice, 0.0) + trial["score"] * trial["examples"]
        counts[choice] = counts.get(choice, 0) + trial["examples"]
    mean = {choice: sums[choice] / counts[choice] for choice in sums}
    whole = {tuple(trial["choice"]) for trial in trials if trial["full"]}
    waiting = [choice for choice in mean if choice not in whole]

    minibatches = sum(not trial["full"] for trial in trials)
    is_over = minibatches >= config.trials
    is_due = minibatches % config.full_every == 0 or is_over
    if minibatches and not trials[-1]["full"] and is_due and waiting:
        return max(waiting, key=lambda choice: mean[choice]), True
    if is_over or len(whole) == math.prod(sizes):
        return None
    rng = random.Random(repr(("trial", config.seed, minibatches)))
    return next_choice(sizes, mean, rng), False


def _is_trial(trial: Any, number: int, sizes: list[int]) -> bool:
    """Whether a line of trials.jsonl is the trial of this number."""
    if not isinstance(trial, dict):
        return False
    counts = [trial.get(key) for key in ("trial", "rollouts", "tokens", "examples")]
    if not all(type(count) is int for count in counts):
        return False
    if trial["trial"] != number:
        return False
    if trial["examples"] <= 0:
        return False
    if type(trial.get("seconds")) is not float or type(trial.get("full")) is not bool:
        return False
    choice = trial.get("choice")
    if not isinstance(choice, list) or len(choice) != len(sizes):
        return False
    if not all(type(k) is int and 0 <= k < size for k, size in zip(choice, sizes)):
        return False
    score = trial.get("score")
    return type(score) in (int, float) and abs(score) < math.inf


def read_trials(path: Path, sizes: list[int]) -> list[dict]:
    """The trials so far.

    Half a line at the end, of a search that was killed, is cut off. Raises InputError naming file
    and line.
    """
    trials = read_lines(path, cut=True)
    for number, trial in enumerate(trials):
        if not _is_trial(trial, number, sizes):
            raise InputError(f"{path}, line {number + 1}: is no trial of this search")
    return trials


# what candidates.json calls them -> what a module's prompts do
KINDS = {"instructions": "instruction", "demos": "demos"}


def _places(kept: dict) -> list[tuple[str, str]]:
    """The module and the kind of candidates in each place of a choice: where there are several."""
    places = []
    for name in kept["start"]:
        for kind in KINDS:
            if len(kept["modules"][name][kind]) > 1:
                places.append((name, kind))
    return places


def _put(
    program: Program, kept: dict, places: list[tuple[str, str]], choice: list[int] | Choice
) -> None:
    """Put what was chosen into the program, and what it started from elsewhere."""
    prompts = {name: dict(entry) for name, entry in kept["start"].items()}
    for (name, kind), k in zip(places, choice):
        prompts[name][KINDS[kind]] = kept["modules"][name][kind][k]
    set_prompts(program, prompts)


def _scored(
    task: Task,
    model: Transformer,
    tokenizer: Tokenizer,
    config: Config,
    number: int,
    choice: Choice,
    is_full: bool,
) -> dict:
    """The trial of this number: how the program does as it is now, on dev or a minibatch of it."""
    examples = task.dev[: config.eval_examples or None]
    step = DEV_STEP
    if not is_full:
        rng = random.Random(repr(("minibatch", config.seed, number)))
        examples = rng.sample(examples, min(config.minibatch, len(examples)))
        step = MINIBATCH_STEP - number
    result = evaluate(model, tokenizer, task, examples, config, config.temperature, step)
    scope = {"full": is_full, "examples": len(examples)}
    return {"trial": number, "choice": choice, **scope, **result}


def search(
    task: Task,
    model: Transformer,
    tokenizer: Tokenizer,
    config: Config,
    out: Path,
    stop: Callable[[], bool] = lambda: False,
) -> list[float]:
    """Search the prompts of the task's program; the best is never below the start.

    It is left in the program and, when the search ends, in OUT/prompts.json (for DSPy: dspy.json).
    Candidates and trials are kept (candidates.json, trials.jsonl): a search that was killed goes on
    with the trial at hand and ends as if it had not been.

    Returns the dev scores of what was scored on all of dev, the start first.
    """
    out.mkdir(parents=True, exist_ok=True)
    kept = kept_candidates(task, model, tokenizer, config, out)
    said = (
        f"{kept['good_runs']} of {kept['rollouts']} runs were good enough for demonstrations "
        f"(--demo-score {config.demo_score})"
    )
    if kept["dropped"]:
        said += f"; proposals dropped: {kept['dropped']}"
    print(said)
    places = _places(kept)
    sizes = [len(kept["modules"][name][kind]) for name, kind in places]
    trials = read_trials(out / "trials.jsonl", sizes)

    bar = tqdm(
        desc=f"{config.task}: prompts",
        unit="trial",
        disable=None,
        initial=len(trials),
        total=len(trials),
    )
    with (out / "trials.jsonl").open("a", encoding="utf-8") as file:
        while True:
            upcoming = next_trial(sizes, trials, config)
            if upcoming is None or stop():
                break
            choice, is_full = upcoming
            _put(task.program, kept, places, choice)
            trial = _scored(task, model, tokenizer, config, len(trials), choice, is_full)
            trials.append(trial)
            print(json.dumps(trial), file=file, flush=True)
            best_score = max(t["score"] for t in trials if t["full"])
            bar.update()
            bar.set_postfix(best=f"{best_score:.3f}", refresh=False)
            # where there is no terminal
            if bar.disable:
                print(trial_line(trial, best_score), file=sys.stderr, flush=True)
    bar.close()

    whole = [trial for trial in trials if trial["full"]]
    best: list[int] | Choice = ()
    if whole:
        best = max(whole, key=lambda trial: trial["score"])["choice"]
    _put(task.program, kept, places, best)
    (out / "prompts.json").unlink(missing_ok=True)
    has_ended = upcoming is None
    if has_ended:
        # the one name of a module that DSPy cannot save
        if "metadata" not in kept["start"]:
            save_dspy(task.program, out / "dspy.json")
        save_prompts(task.program, out / "prompts.json")
    return [trial["score"] for trial in whole]


# -------------------------------------------------------------------------------------- composition
# between the seeds of the rounds of a strategy
SEEDS_APART = 1000


def stages(strategy: str) -> list[str]:
    """The kinds of a strategy's stages, "p" (prompts) or "w" (weights).

    "p -> w" gives ["p", "w"]; "(p -> w) x 2", a round of each in turn, those twice. Raises
    InputError.
    """
    rounds = re.fullmatch(r"\((.+)\) x ([1-9]\d?)", strategy.strip())
    once = rounds[1] if rounds else strategy
    times = int(rounds[2]) if rounds else 1
    kinds = [kind.strip() for kind in once.split("->")] * times
    if not set(kinds) <= {"p", "w"}:
        raise InputError(
            f"--strategy {strategy!r}: expected p (prompts) and w (weights) joined by ->, as "
            '"p -> w" or "(p -> w) x 3"'
        )
    return kinds


def rollouts(kind: str, n: int, task: Task, config: Config) -> int:
    """Runs that n steps ("w") or n trials ("p") take, at most.

    Evaluations, demonstrations and proposals are included.
    """
    dev = len(task.dev[: config.eval_examples or None])
    if kind == "w":
        evaluations = 1 + math.ceil(n / config.eval_every)
        # each is greedy and sampled
        return n * config.examples * config.rollouts + 2 * dev * evaluations
    sample = min(config.bootstrap, len(task.train)) if _bootstraps(config) else 0
    proposals = config.proposals * len(task.program.modules())
    full = dev * (1 + math.ceil(n / config.full_every))
    minibatches = n * min(config.minibatch, dev)
    return sample + proposals + full + minibatches


def affordable(kind: str, task: Task, config: Config, budget: int) -> int:
    """How many steps or trials `budget` runs allow. Raises InputError where it is not one."""

    def needed(n: int) -> int:
        return rollouts(kind, n, task, config)

    if needed(1) > budget:
        unit = "step" if kind == "w" else "trial"
        raise InputError(
            f"--budget {config.budget}: leaves {budget} rollouts for each stage; one {unit} "
            f"with its evaluations takes {needed(1)}"
        )
    # no more than `budget`, for each takes one run at least
    return bisect_right(range(budget), budget, lo=1, key=needed) - 1


def plan(task: Task, config: Config) -> list[tuple[str, Config]]:
    """The stages of config.strategy, each "p" or "w" with its settings.

    A budget says how many steps and trials there are. Raises InputError for what could not be
    begun, or afforded, later on.
    """
    kinds = stages(config.strategy)
    planned = []
    for i, kind in enumerate(kinds):
        stage = config
        rounds_before = kinds[:i].count(kind)
        if rounds_before:
            # it draws anew, but is scored with the same random numbers
            seed = config.seed + SEEDS_APART * rounds_before
            dev_seed = config.seed if config.dev_seed < 0 else config.dev_seed
            stage = dataclasses.replace(config, seed=seed, dev_seed=dev_seed)
        if config.budget:
            budget = config.budget // len(kinds)
            if i == 0:
                budget -= most_rollouts(task, config)
            n = affordable(kind, task, stage, budget)
            option = "steps" if kind == "w" else "trials"
            stage = dataclasses.replace(stage, **{option: n})
        planned.append((kind, stage))
    if "w" in kinds:
        check_sampling(config)
    if "p" in kinds:
        # each raises what it would raise when it is needed
        given_instructions(task, config)
        Endpoint.named("MMGRPO_PROPOSER")
    return planned


def compose(
    task: Task,
    config: Config,
    out: Path,
    load: Callable,
    stop: Callable[[], bool] = lambda: False,
) -> dict | None:
    """The stages of config.strategy one after another.

    Each begins with the weights and prompts that the one before found best on dev; where it starts
    is a candidate of every stage. The task's program comes with its present prompts, `load(config)`
    gives model and tokenizer. Several stages have a folder each in `out`.

    Returns, and writes to OUT/result.json, where the best weights and prompts are, the dev scores
    of each stage and what it took; None where it was stopped before the end.
    """
    planned = plan(task, config)
    best = {"model": config.model, "prompts": config.prompts}
    reports = []
    for i, (kind, stage) in enumerate(planned):
        folder = out.resolve()
        if len(planned) > 1:
            folder = (out / f"{i + 1}-{kind}").resolve()
        stage = dataclasses.replace(stage, **best)
        model, tokenizer = load(stage)
        if i > 0 and kind == "w" and lora_layers(model):
            # the adapter is merged, and a new one trained on top
            base = folder / "base"
            # the file that is written last
            if not (base / "model.safetensors").exists():
                save_pretrained(merged(model), tokenizer, base)
            stage = dataclasses.replace(stage, model=str(base))
            model, tokenizer = load(stage)
        folder.mkdir(parents=True, exist_ok=True)
        if len(planned) > 1:
            write_json(folder / "config.json", dataclasses.asdict(stage) | {"strategy": kind})

        prompts = folder / "prompts.json"
        if i == 0:
            began_with_demos = begin(task, model, tokenizer, stage, folder)
            # a search writes its own
            if began_with_demos and kind == "w":
                save_prompts(task.program, prompts)
        before = prompts_of(task.program)
        run_stage = train if kind == "w" else search
        scores = run_stage(without_shown(task), model, tokenizer, stage, folder, stop)
        if kind == "w":
            ended = step_of(states(folder)[-1]) >= stage.steps
        else:
            ended = prompts.exists()
        if not ended:
            return None

        if kind == "w":
            best["model"] = str(folder / "best")
        else:
            print(difference(before, prompts_of(task.program)))
        if prompts.exists():
            best["prompts"] = str(prompts)
        reports.append({"stage": folder.name, "dev": scores, **cost(folder)})
    result = best | {"stages": reports}
    write_json(out / "result.json", result)
    return result
