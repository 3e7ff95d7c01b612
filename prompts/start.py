"""Where a run starts: demonstrations in the prompts, if the LM does not follow the format without.

    demonstrations      what an example shows of each module's calls, as the task says, or by the
                        names of its fields
    labelled_demos      so many of them per module, of training examples
    without_shown       the task without the training examples that stand in its prompts: their
                        answers stand there too
    begin               what --labelled-demos asks for; on its own it takes the best of a few
                        candidates, on a probe

What was found is in OUT/start.json: a run that goes on does not choose anew.
"""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any, NamedTuple

from lm.tokenizer import Tokenizer, read_json
from mmgrpo import READABLE, play
from model import Transformer
from program import InputError, Module, Program, Task
from prompts.files import kept_options, write_json
from run.config import Config
from run.state import same_options
from run.terminal import statuses

# training examples that each candidate is run on once
PROBE = 16
# demonstrations per module
CANDIDATES = 2, 4, 8
# share of the LM's context that prompts may take, apart from their inputs
ROOM = 0.5
# gives the probe random numbers of its own: no training step and no evaluation has this number
PROBE_STEP = -(10**6)


# ---------------------------------------------------------------------- what training examples show
def is_json(value: Any) -> bool:
    """Whether a file of JSON can hold it and give it back.

    It cannot hold a tuple, NaN or half of a character.
    """
    try:
        text = json.dumps(value, ensure_ascii=False).encode()
        return json.loads(text) == value
    except (TypeError, ValueError, RecursionError):
        return False


def by_names(module: Module, example: dict) -> dict:
    """What an example says of a module's inputs and outputs, by the names of its fields.

    It must have all inputs and some output, else it says nothing. What it lacks (a reasoning) is
    marked in the prompt as not supplied, which a small LM repeats literally.
    """
    inputs = [f.name for f in module.signature.inputs]
    outputs = [f.name for f in module.signature.outputs]
    if not all(name in example for name in inputs):
        return {}
    if not any(name in example for name in outputs):
        return {}
    return {name: example[name] for name in inputs + outputs if name in example}


def demonstrations(task: Task, example: dict) -> dict[str, list[dict]]:
    """Module -> its calls that the example shows, each its inputs and outputs.

    What JSON cannot hold is left out. Raises InputError where `task.demonstrate` fails, or names no
    module or field of the program.
    """
    modules = task.program.modules()
    if task.demonstrate is None:
        found = {name: by_names(module, example) for name, module in modules.items()}
        return {name: [demo] for name, demo in found.items() if demo and is_json(demo)}
    try:
        shown = task.demonstrate(example)
    except Exception as e:
        raise InputError(
            f"the task's `demonstrate` failed on a training example: {type(e).__name__}: {e}"
        ) from e
    if not isinstance(shown, dict) or shown.keys() - modules.keys():
        raise InputError(
            "the task's `demonstrate`: expected a dict with some of the modules "
            f"{', '.join(modules)}"
        )
    for name, demos in shown.items():
        signature = modules[name].signature
        fields = {f.name for f in signature.inputs + signature.outputs}
        if not isinstance(demos, list) or not all(_is_demo(demo, fields) for demo in demos):
            raise InputError(
                f"the task's `demonstrate`: {name}: expected a list of dicts with some of "
                f"{', '.join(sorted(fields))}"
            )
    return {name: [demo for demo in demos if is_json(demo)] for name, demos in shown.items()}


def _is_demo(demo: Any, fields: set[str]) -> bool:
    return isinstance(demo, dict) and len(demo) > 0 and demo.keys() <= fields


def shuffled(task: Task, seed: int) -> tuple[list[dict], list[dict]]:
    """The training examples, in an order of the seed, in two halves.

    Demonstrations may be of the first; a probe may run on the second.
    """
    rng = random.Random(repr(("start", seed)))
    order = rng.sample(task.train, len(task.train))
    half = len(order) // 2
    return order[:half], order[half:]


def labelled_demos(task: Task, n: int, seed: int) -> dict[str, list[dict]]:
    """Up to n demonstrations per module; those for fewer are the first of those for more.

    An example gives one: the first example the first call that it shows of a module, the next one
    its second, so that all stages of a run are seen.
    """
    chosen: dict[str, list[dict]] = {name: [] for name in task.program.modules()}
    for example in shuffled(task, seed)[0]:
        if all(len(demos) == n for demos in chosen.values()):
            break
        for name, shown in demonstrations(task, example).items():
            demos = chosen[name]
            if not shown or len(demos) == n:
                continue
            demo = shown[len(demos) % len(shown)]
            if demo not in demos:
                demos.append(demo)
    return chosen


def add_demos(program: Program, demos: dict[str, list[dict]]) -> None:
    """Put demonstrations behind those that the modules have already."""
    for name, module in program.modules().items():
        new = [demo for demo in demos.get(name, []) if demo not in module.demos]
        module.demos = module.demos + new


def without_shown(task: Task) -> Task:
    """The task without the training examples that a prompt of its program demonstrates.

    To train on them, or to score them, would be to reward copying.
    """
    prompts = {name: module.demos for name, module in task.program.modules().items()}
    if not any(prompts.values()):
        return task

    def is_shown(example: dict) -> bool:
        shown = demonstrations(task, example)
        return any(demo in prompts[name] for name, demos in shown.items() for demo in demos)

    train = [example for example in task.train if not is_shown(example)]
    if task.train and not train:
        raise InputError(
            "every training example is a demonstration in the prompts: there is none left to "
            "train on"
        )
    return dataclasses.replace(task, train=train)


# ----------------------------------------------------------------------------------- the candidates
class Candidate(NamedTuple):
    """Demonstrations to start with, and the figures of the program with them on the probe.

    Example: Candidate({"demos": 2, "readable": 0.75, …}, {"ask": [{"x": "…", "y": "…"}, …]})
    """

    figures: dict
    demos: dict[str, list[dict]]


def most_rollouts(task: Task, config: Config) -> int:
    """Runs that the choice of the start takes at the most."""
    if config.labelled_demos >= 0:
        return 0
    examples = shuffled(task, config.seed)[1][:PROBE]
    return len(examples) * (1 + len(CANDIDATES))


def fits(task: Task, tokenizer: Tokenizer, context: int) -> bool:
    """Whether the prompts of all modules, without inputs, leave enough of the context."""
    for module in task.program.modules().values():
        prompt = module.messages({f.name: "" for f in module.signature.inputs})
        if len(tokenizer.encode_chat(prompt)) > ROOM * context:
            return False
    return True


def probe(
    task: Task, model: Transformer, tokenizer: Tokenizer, examples: list[dict], config: Config
) -> dict:
    """Run the program once on each example, sampled as in training.

    Returns the shares of runs and of LM calls that could be read, the mean score (of a run that did
    not complete: failure_score), how the runs ended, and what it took.
    """
    runs, seconds = play(model, tokenizer, task, examples, config, config.temperature, PROBE_STEP)
    calls = [call for run in runs for call in run.calls]
    readable_calls = sum(call.outputs is not None for call in calls)
    unreadable = sum(run.status in ("format_error", "length") for run in runs)
    scores = []
    for run in runs:
        scores.append(run.reward if run.status == "completed" else config.failure_score)
    return {
        "readable": 1 - unreadable / len(runs),
        "readable_calls": readable_calls / max(len(calls), 1),
        "score": sum(scores) / len(scores),
        "statuses": statuses(runs),
        "rollouts": len(runs),
        "tokens": sum(len(call.completion.token_ids) for call in calls),
        "seconds": sum(seconds.values()),
    }


def try_candidates(
    task: Task, model: Transformer, tokenizer: Tokenizer, config: Config
) -> list[Candidate]:
    """The program as given, and, where too few runs are readable, with labelled demonstrations.

    The same examples and random numbers for all; those who are demonstrations are not among them.
    """
    modules = task.program.modules()
    given = {name: module.demos for name, module in modules.items()}
    examples = shuffled(task, config.seed)[1][:PROBE]
    tried: list[Candidate] = []
    for n in (0, *CANDIDATES):
        demos = labelled_demos(task, n, config.seed)
        is_empty = n > 0 and not any(demos.values())
        if is_empty or any(demos == candidate.demos for candidate in tried):
            # no example is left to show more
            break
        add_demos(task.program, demos)
        if n == 0 or fits(task, tokenizer, model.config.max_positions):
            figures = {"demos": n, **probe(task, model, tokenizer, examples, config)}
            tried.append(Candidate(figures, demos))
        for name, module in modules.items():
            module.demos = given[name]
        if tried[0].figures["readable"] >= READABLE:
            break
    return tried


def _merit(candidate: Candidate) -> tuple[float, float, int]:
    """What the best candidate has most of.

    First the share of LM calls that are readable: whole runs of a program with many calls may all
    break off somewhere. Of equal ones the better mean score, then fewer demonstrations.
    """
    figures = candidate.figures
    return figures["readable_calls"], figures["score"], -figures["demos"]


def choose(task: Task, model: Transformer, tokenizer: Tokenizer, config: Config) -> dict:
    """What start.json keeps; the program's own prompts are left as they were.

    Returns `demos`, per module the demonstrations to add; `probes`, how each candidate did;
    `found`, a sentence that says so; and what it cost.
    """
    probes: list[dict] = []
    if config.labelled_demos > 0:
        demos = labelled_demos(task, config.labelled_demos, config.seed)
        if not any(demos.values()):
            raise InputError(
                f"--labelled-demos {config.labelled_demos}: the training examples of --task "
                f"{config.task} show no calls of its modules; Task.demonstrate can say what they "
                "show"
            )
        counts = ", ".join(f"{name} {len(of_module)}" for name, of_module in demos.items())
        found = (
            "the start: labelled demonstrations in the prompts, as --labelled-demos says "
            f"({counts})"
        )
    else:
        tried = try_candidates(task, model, tokenizer, config)
        probes = [candidate.figures for candidate in tried]
        best = max(tried, key=_merit)
        demos = best.demos
        found = sentence(probes, best.figures)
    cost = {key: sum(p[key] for p in probes) for key in ("rollouts", "tokens", "seconds")}
    return {"found": found, "demos": demos, "probes": probes, **cost}


def sentence(probes: list[dict], best: dict) -> str:
    """What the probe found, and what was chosen."""

    def readable(figures: dict) -> str:
        return f"{figures['readable_calls']:.0%}"

    name = "the program as given"
    if best["demos"]:
        name = f"{best['demos']} labelled demonstrations per module"
    said = f"the start is {name}: {readable(best)} of its LM calls on training examples can be read"
    others = []
    for figures in probes:
        if figures is not best:
            which = f"with {figures['demos']}" if figures["demos"] else "as given"
            others.append(f"{which} {readable(figures)}")
    if others:
        said += f" ({', '.join(others)})"
    elif best["readable"] < READABLE:
        said += "; they show no demonstrations that could be tried (Task.demonstrate)"
    return said


# ---------------------------------------------------------------------------------------- the start
def is_start(kept: dict, program: Program) -> bool:
    """Whether it is what `begin` keeps for this program."""
    demos = kept.get("demos")
    found = kept.get("found")
    # JSON can name halves of a character, which no text may hold
    if not is_json([demos, found]):
        return False
    if not isinstance(demos, dict) or demos.keys() != program.modules().keys():
        return False
    for of_module in demos.values():
        if not isinstance(of_module, list) or not all(isinstance(d, dict) for d in of_module):
            return False
    # a start without a probe took 0 seconds, an int
    cost = [type(kept.get(key)) for key in ("rollouts", "tokens", "seconds")]
    is_cost = cost in ([int, int, int], [int, int, float])
    return is_cost and isinstance(kept.get("config"), dict) and type(found) is str


def begin(task: Task, model: Transformer, tokenizer: Tokenizer, config: Config, out: Path) -> bool:
    """Put the demonstrations that --labelled-demos asks for into the task's program.

    What was found is kept in OUT/start.json; where that is there, nothing is run again. Returns
    whether there are any demonstrations. Raises InputError naming the file, or the option that is
    not as it was.
    """
    path = out / "start.json"
    options = kept_options(config, task.program)
    if config.labelled_demos == 0 and not path.exists():
        return False
    if not path.exists():
        chosen = choose(task, model, tokenizer, config)
        write_json(path, {"config": options} | chosen)
    kept = read_json(path)
    if not is_start(kept, task.program):
        raise InputError(f"{path}: is not as a run of this program writes it")
    same_options(out, kept["config"], options)
    add_demos(task.program, kept["demos"])
    print(kept["found"])
    return any(kept["demos"].values())
