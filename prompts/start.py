"""Where a run starts: with labelled demonstrations in the prompts, if the LM does not follow the program's format without.

    demonstrations      what an example shows of each module's calls, as the task says, or by the names of its fields
    labelled_demos      so many of them per module, of training examples
    without_shown       the task without the training examples that stand in its prompts: their answers stand there too
    begin               what --labelled-demos asks for; on its own it takes the best of a few candidates, on a probe

What was found is in OUT/start.json: a run that goes on does not choose anew.
"""
from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

from lm.tokenizer import read_json
from mmgrpo import READABLE, play
from program import InputError, Module, Program, Task
from prompts.files import kept_options, write_json
from run.config import Config
from run.state import same_options
from run.terminal import statuses

PROBE = 16                  # training examples that each candidate is run on once
CANDIDATES = 2, 4, 8        # demonstrations per module
ROOM = 0.5                  # share of the LM's context that prompts may take, apart from their inputs
PROBE_STEP = -10**6         # gives the probe random numbers of its own: no training step and no evaluation has this number


def demonstrations(task: Task, example: dict) -> dict[str, list[dict]]:
    """Module -> its calls that the example shows, each its inputs and outputs; what JSON cannot hold is left out. Raises
    InputError where `task.demonstrate` fails, or names no module or field of the program."""
    modules = task.program.modules()
    if task.demonstrate is None:
        return {name: [demo] for name, m in modules.items() if (demo := by_names(m, example)) and is_json(demo)}
    try:
        shown = task.demonstrate(example)
    except Exception as e:
        raise InputError(f"the task's `demonstrate` failed on a training example: {type(e).__name__}: {e}") from e
    if not isinstance(shown, dict) or shown.keys() - modules.keys():
        raise InputError(f"the task's `demonstrate`: expected a dict with some of the modules {', '.join(modules)}")
    for name, demos in shown.items():
        fields = {f.name for f in modules[name].signature.inputs + modules[name].signature.outputs}
        if not isinstance(demos, list) or not all(isinstance(d, dict) and d and d.keys() <= fields for d in demos):
            raise InputError(f"the task's `demonstrate`: {name}: expected a list of dicts with some of {', '.join(sorted(fields))}")
    return {name: [d for d in demos if is_json(d)] for name, demos in shown.items()}


def by_names(module: Module, example: dict) -> dict:
    """What an example says of a module's inputs and outputs, if it has fields of their names for all inputs and some output, else
    nothing. What it lacks (a reasoning) is marked in the prompt as not supplied, which a small LM repeats literally."""
    inputs, outputs = ([f.name for f in fields] for fields in (module.signature.inputs, module.signature.outputs))
    if not all(n in example for n in inputs) or not any(n in example for n in outputs):
        return {}
    return {n: example[n] for n in inputs + outputs if n in example}


def is_json(value) -> bool:
    """Whether a file of JSON can hold it and give it back: no tuple, no NaN, no half of a character."""
    try:
        text = json.dumps(value, ensure_ascii=False).encode()
        return json.loads(text) == value
    except (TypeError, ValueError, RecursionError):
        return False


def shuffled(task: Task, seed: int) -> tuple[list[dict], list[dict]]:
    """The training examples in an order of the seed: those that demonstrations may be of, and those that a probe may run on."""
    order = random.Random(repr(("start", seed))).sample(task.train, len(task.train))
    return order[:len(order) // 2], order[len(order) // 2:]


def labelled_demos(task: Task, n: int, seed: int) -> dict[str, list[dict]]:
    """Up to n demonstrations per module, those for fewer are the first of those for more. An example gives one: the first
    example the first call that it shows of a module, the next one its second, so that all stages of a run are seen."""
    chosen: dict[str, list[dict]] = {name: [] for name in task.program.modules()}
    for example in shuffled(task, seed)[0]:
        if all(len(demos) == n for demos in chosen.values()):
            break
        for name, shown in demonstrations(task, example).items():
            demos = chosen[name]
            if shown and len(demos) < n and shown[len(demos) % len(shown)] not in demos:
                demos.append(shown[len(demos) % len(shown)])
    return chosen


def add_demos(program: Program, demos: dict[str, list[dict]]) -> None:
    """Put demonstrations behind those that the modules have already."""
    for name, module in program.modules().items():
        module.demos = module.demos + [d for d in demos.get(name, []) if d not in module.demos]


def without_shown(task: Task) -> Task:
    """The task without the training examples of which a demonstration stands in a prompt of its program: to train on them, or
    to score them, would be to reward copying."""
    prompts = {name: m.demos for name, m in task.program.modules().items()}
    if not any(prompts.values()):
        return task

    def is_shown(example: dict) -> bool:
        return any(demo in prompts[name] for name, demos in demonstrations(task, example).items() for demo in demos)
    train = [e for e in task.train if not is_shown(e)]
    if task.train and not train:
        raise InputError("every training example is a demonstration in the prompts: there is none left to train on")
    return dataclasses.replace(task, train=train)


# ---------------------------------------------------------------------------------------------------- the candidates
def fits(task: Task, tokenizer, context: int) -> bool:
    """Whether the prompts of all modules, without inputs, leave enough of the context to inputs and completion."""
    empty = ({f.name: "" for f in m.signature.inputs} for m in task.program.modules().values())
    prompts = (m.messages(inputs) for m, inputs in zip(task.program.modules().values(), empty))
    return all(len(tokenizer.encode_chat(p)) <= ROOM * context for p in prompts)


def most_rollouts(task: Task, config: Config) -> int:
    """Runs that the choice of the start takes at the most."""
    return len(shuffled(task, config.seed)[1][:PROBE]) * (1 + len(CANDIDATES)) if config.labelled_demos < 0 else 0


def choose(task: Task, model, tokenizer, config: Config) -> dict:
    """What start.json keeps: `demos`, per module the demonstrations to add; `probes`, how each candidate did; `found`, a sentence
    that says so; what it cost. The candidate is taken of whose LM calls most are readable: whole runs of a program with many calls
    may all break off somewhere. Of equal ones it is that with the better mean score, then that with fewer demonstrations. The
    program's own prompts are left as they were."""
    if config.labelled_demos > 0:
        demos, probes = labelled_demos(task, config.labelled_demos, config.seed), []
        if not any(demos.values()):
            raise InputError(f"--labelled-demos {config.labelled_demos}: the training examples of --task {config.task} show no "
                             "calls of its modules; Task.demonstrate can say what they show")
        counts = ", ".join(f"{name} {len(d)}" for name, d in demos.items())
        found = f"the start: labelled demonstrations in the prompts, as --labelled-demos says ({counts})"
    else:
        tried = try_candidates(task, model, tokenizer, config)
        probes = [probe for probe, _ in tried]
        best, demos = max(tried, key=lambda t: (t[0]["readable_calls"], t[0]["score"], -t[0]["demos"]))
        found = sentence(probes, best)
    cost = {key: sum(p[key] for p in probes) for key in ("rollouts", "tokens", "seconds")}
    return {"found": found, "demos": demos, "probes": probes, **cost}


def try_candidates(task: Task, model, tokenizer, config: Config) -> list[tuple[dict, dict[str, list[dict]]]]:
    """How the program does as given on the probe, and, where too few runs are readable, with labelled demonstrations: pairs of the
    figures and the demonstrations. The same examples and random numbers for all; those who are demonstrations are not among them."""
    modules = task.program.modules()
    given, examples = {name: m.demos for name, m in modules.items()}, shuffled(task, config.seed)[1][:PROBE]
    tried: list[tuple[dict, dict]] = []
    for n in (0, *CANDIDATES):
        demos = labelled_demos(task, n, config.seed)
        if n and not any(demos.values()) or any(demos == before for _, before in tried):
            break                                           # no example is left to show more
        add_demos(task.program, demos)
        if n == 0 or fits(task, tokenizer, model.config.max_positions):
            tried.append(({"demos": n, **probe(task, model, tokenizer, examples, config)}, demos))
        for name, m in modules.items():
            m.demos = given[name]
        if tried[0][0]["readable"] >= READABLE:
            break
    return tried


def probe(task: Task, model, tokenizer, examples: list[dict], config: Config) -> dict:
    """Run the program once on each example, sampled as in training -> the shares of runs and of LM calls that could be read, the
    mean score (of a run that did not complete: failure_score), how the runs ended, and what it took."""
    runs, seconds = play(model, tokenizer, task, examples, config, config.temperature, PROBE_STEP)
    calls = [c for t in runs for c in t.calls]
    unread = sum(t.status in ("format_error", "length") for t in runs)
    scores = [t.reward if t.status == "completed" else config.failure_score for t in runs]
    return {"readable": 1 - unread / len(runs), "readable_calls": sum(c.outputs is not None for c in calls) / max(len(calls), 1),
            "score": sum(scores) / len(scores), "statuses": statuses(runs), "rollouts": len(runs),
            "tokens": sum(len(c.completion.token_ids) for c in calls), "seconds": sum(seconds.values())}


def sentence(probes: list[dict], best: dict) -> str:
    """What the probe found, and what was chosen."""
    readable = lambda p: f"{p['readable_calls']:.0%}"
    name = f"{best['demos']} labelled demonstrations per module" if best["demos"] else "the program as given"
    said = f"the start is {name}: {readable(best)} of its LM calls on training examples can be read"
    others = [f"with {p['demos']} {readable(p)}" if p["demos"] else f"as given {readable(p)}" for p in probes if p is not best]
    if others:
        said += f" ({', '.join(others)})"
    elif best["readable"] < READABLE:
        said += "; they show no demonstrations that could be tried (Task.demonstrate)"
    return said


def begin(task: Task, model, tokenizer, config: Config, out: Path) -> bool:
    """Put the demonstrations that --labelled-demos asks for into the task's program -> whether there are any. What was found is
    kept in OUT/start.json; where that is there, nothing is run again. Raises InputError naming the file, or the option that is
    not as it was."""
    path, options = out / "start.json", kept_options(config, task.program)
    if config.labelled_demos == 0 and not path.exists():
        return False
    if not path.exists():
        write_json(path, {"config": options} | choose(task, model, tokenizer, config))
    kept = read_json(path)
    if not is_start(kept, task.program):
        raise InputError(f"{path}: is not as a run of this program writes it")
    same_options(out, kept["config"], options)
    add_demos(task.program, kept["demos"])
    print(kept["found"])
    return any(kept["demos"].values())


def is_start(kept: dict, program: Program) -> bool:
    """Whether it is what `begin` keeps for this program."""
    demos = kept.get("demos")
    if not is_json([demos, kept.get("found")]):             # JSON can name halves of a character, which no text may hold
        return False
    if not isinstance(demos, dict) or demos.keys() != program.modules().keys():
        return False
    if not all(isinstance(of_module, list) and all(isinstance(d, dict) for d in of_module) for of_module in demos.values()):
        return False
    cost = [type(kept.get(key)) for key in ("rollouts", "tokens", "seconds")]
    return isinstance(kept.get("config"), dict) and type(kept.get("found")) is str and cost in ([int] * 3, [int, int, float])
