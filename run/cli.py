"""The command line of mmgrpo.py: options, folders and files. The method itself is in mmgrpo.py."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import json
import math
import re
import signal
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Callable, TextIO

import safetensors
import torch
from tqdm import tqdm

import mmgrpo
from lm.lora import lora_layers, merged
from lm.tokenizer import read_json
from mmgrpo import Config, advantages, evaluate, group_calls, play, policy_loss, weigh
from model import CheckpointError, save_new
from program import (
    STATUSES,
    Call,
    Completion,
    InputError,
    ProgramError,
    Task,
    ToolError,
    Trajectory,
)
from prompts.files import load_prompts, write_json
from prompts.imitate import imitate
from prompts.search import compose, plan
from prompts.start import add_demos, labelled_demos, without_shown
from run.config import CHOICES, flag_of, help_texts
from run.figures import ParityError, measure
from run.health import FirstFailures, StoppedError
from run.loading import decoder, load_model, load_task, split_of
from run.page import check_file, write_page
from run.records import read_metrics
from run.state import FREE, read_state, same_options, states, step_of
from run.terminal import expected_of, lenient_output, printable, show


# ----------------------------------------------------------------------------------------- training
def folder_of(config: Config) -> Path:
    """Where the run goes: --out, else a new folder in runs/, with --resume the last one there.

    Those in runs/ are called runs/hover, runs/hover-2, … Raises InputError where a run that is
    there would be written over.
    """
    numbered = [Path("runs") / (Path(config.task).stem + f"-{i}" * (i > 1)) for i in range(1, 1000)]
    used = [path for path in numbered if (path / "config.json").exists()]
    if config.out:
        out = Path(config.out)
    elif not config.resume:
        out = next(path for path in numbered if path not in used)
    elif used:
        out = used[-1]
    else:
        raise InputError(f"--resume: there is no run of {config.task} in runs/")

    done = step_of(states(out)[-1]) if states(out) else -1
    metrics = out / "metrics.jsonl"
    if done < 0 and metrics.exists() and metrics.read_bytes().count(b"\n") > 1:
        raise InputError(
            f"{out}: holds the metrics of a run whose states are gone; choose another --out"
        )
    if done >= config.steps and (out / "result.json").exists():
        raise InputError(
            f"{out}: holds a run already, finished at step {done}; more --steps go on with it, "
            "another --out begins anew"
        )
    return out


def check_folder(out: Path) -> None:
    """Raise InputError where a folder holds what no run has left: it would be written over."""
    config = out / "config.json"
    is_run = config.exists() and "task" in read_json(config)
    own = ("config.json", "model.safetensors")
    if not is_run and any((out / name).exists() for name in own):
        raise InputError(f"{out}: holds files that are not a run's; give another --out")


def locked(out: Path) -> TextIO:
    """OUT/.lock, locked while it is open. Raises InputError where another process has locked it."""
    lock = (out / ".lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise InputError(f"{out}: another process trains there") from None
    return lock


def run_train(task: Task, config: Config) -> str:
    """Go through the stages of --strategy.

    Ctrl-C stops it after the step or trial at hand, with its state saved; a second one at once.
    Returns what it took; the last line has the dev score before and after, and the seconds.
    """
    # errors come before there is a folder
    for split in ("train", "dev"):
        split_of(task, split, config)
    stages = plan(task, config)
    loaded = [load_model(config)]
    single = len(stages) == 1
    if single:
        config = stages[0][1]
    out = folder_of(config)
    check_folder(out)
    out.mkdir(parents=True, exist_ok=True)
    lock = locked(out)

    options = dataclasses.asdict(config)
    if (out / "config.json").exists():
        begun = read_json(out / "config.json")
        if config.strategy == "w":
            # the other options are checked with the state, if there is one
            begun = {"strategy": begun.get("strategy", "w")}
        # what the first stages trained and tried is what later ones build on
        free = FREE if single else tuple({*FREE} - {"steps", "trials"})
        same_options(out, begun, options, free)
    if not states(out):
        write_json(out / "config.json", options)

    interrupts = 0

    def on_interrupt(*_):
        nonlocal interrupts
        interrupts += 1
        if interrupts > 1:
            raise KeyboardInterrupt
        print("\nstopping after this step or trial; Ctrl-C again stops at once", file=sys.stderr)

    def load(stage: Config):
        # the first stage gets the model that is loaded already
        return loaded.pop() if loaded else load_model(stage)

    handler_before = signal.signal(signal.SIGINT, on_interrupt)
    began = time.perf_counter()
    try:
        with FirstFailures(out / "errors.log"):
            result = compose(task, config, out, load, lambda: interrupts > 0)
    except (StoppedError, ProgramError) as e:
        e.add_note(f"the same command with OUT={out} goes on from here")
        raise
    finally:
        signal.signal(signal.SIGINT, handler_before)
        lock.close()

    # --steps or --trials may have changed
    write_json(out / "config.json", options)
    if not result:
        return f"stopped; the same command with OUT={out} goes on"
    return summary(config, out, result["stages"], time.perf_counter() - began)


def summary(config: Config, out: Path, stages: list[dict], seconds: float) -> str:
    """What a training came to: a line for each stage of a strategy, then the dev score."""
    lines = []
    folders = [out, *out.glob("*-w")]
    skipped = sum("skipped" in m for folder in folders for m in read_metrics(folder)[0])
    if skipped:
        lines.append(f"{skipped} steps were skipped, for their gradient was not finite")

    # of weights alone the score of the last ones counts; of a strategy the best of its last stage
    if config.strategy == "w":
        score = stages[-1]["dev"][-1]
        spent = f"{config.steps} steps, {seconds:.0f} s"
    else:
        score = max(stages[-1]["dev"])
        spent = f"{seconds:.0f} s of this command"
        for stage in stages:
            lines.append(
                f"{stage['stage']}: dev score {stage['dev'][0]:.3f} -> {max(stage['dev']):.3f}, "
                f"{stage['rollouts']:,} rollouts, {stage['tokens']:,} sampled tokens, "
                f"{stage['seconds']:.0f} s"
            )
    lines.append(f"what it left is in {out}")
    first = stages[0]["dev"][0]
    lines.append(f"{config.task} dev score: {first:.3f} -> {score:.3f} ({spent})")
    return "\n".join(lines)


# ------------------------------------------------------------------------ a step of a run once more
def read_run(folder: str, config: Config) -> tuple[Task, Config, dict[int, str]]:
    """A run's folder -> its task, its options, and step -> digest of what the step sampled.

    A run's folder is data, which people share: a task file that it names is not run unless --task
    gives it on the command line, but for those of tasks/. Raises InputError naming it.
    """
    run = Path(folder)
    try:
        options = json.loads((run / "config.json").read_text())
        if not config.task and not re.fullmatch(r"\w+", options["task"]):
            raise InputError(
                f"{folder}: was trained on {options['task']}, whose code is not run unless "
                f"you give it: --task {options['task']}"
            )
        task, trained = load_task(options | {"task": config.task or options["task"]})
        # with the demonstrations that the run began with
        if (run / "prompts.json").exists():
            load_prompts(task.program, run / "prompts.json")
        task = without_shown(task)
        steps, evaluations = read_metrics(run)
        digests = {m["step"]: m["digest"] for m in steps}
        if evaluations:
            trained = mmgrpo.settled(trained, evaluations[0]["dev"]["sampled"])
    except InputError:
        raise
    except (OSError, ValueError, TypeError, KeyError) as e:
        raise InputError(f"{folder}: holds no run ({type(e).__name__}: {e})") from None
    return task, trained, digests


def run_replay(folder: str, step: str, config: Config) -> str:
    """Sample the rollouts of a step of a run once more.

    The run goes on from its newest state before the step, or from the start. Returns whether they
    are token for token those of the run, below the traces of those of example --index of the step.
    With --html the whole step is made again, and its page written.
    Raises InputError where the folder holds no such step.
    """
    step = int(step)
    if config.html:
        check_file(config.html)
    task, trained, digests = read_run(folder, config)
    if not digests:
        others = "".join(f"; {stage} does" for stage in sorted(Path(folder).glob("*-w")))
        raise InputError(f"{folder}: holds no steps of a training{others}")
    if step not in digests or not 0 <= config.index < trained.examples:
        raise InputError(
            f"{folder}: there is no example {config.index} of step {step}: the run has steps 1 to "
            f"{max(digests, default=0)} of {trained.examples} examples each"
        )

    model, tokenizer = load_model(trained)
    optimizer, reference = mmgrpo.prepare(model, trained)
    start = 0
    for state in reversed([s for s in states(Path(folder)) if step_of(s) < step]):
        # instead of a damaged state the one before it is taken, or the start
        with contextlib.suppress(ValueError):
            start = read_state(state, model, optimizer)["step"]
            break
    for i in range(start, step - 1):
        mmgrpo.train_step(model, tokenizer, optimizer, reference, task, trained, i)
    if config.html:
        run = (model, tokenizer, optimizer, reference, task, trained)
        return write_page(config.html, folder, digests[step], *run, step - 1)
    trajectories, _ = mmgrpo.sample_step(model, tokenizer, task, trained, step - 1)

    same = measure(trajectories, [], [])["digest"] == digests[step]
    batch = mmgrpo.batch_of(step - 1, trained.examples, len(task.train), trained.seed)
    expected = expected_of(task.program, task.train[batch[config.index]])
    decode = decoder(tokenizer, config)
    of_example = [t for t in trajectories if t.example == config.index]
    traces = [show(t, expected=expected, decode=decode) for t in of_example]
    calls = sum(len(t.calls) for t in trajectories)
    verdict = (
        f"step {step}: {len(trajectories)} runs, {calls} calls: "
        f"{'token for token' if same else 'NOT'} those of the run"
    )
    return "\n\n".join([*traces, verdict])


# ----------------------------------------------------------------------- a checkpoint that is there
def run_eval(task: Task, config: Config) -> str:
    """Score a checkpoint on a split, sampled and greedily, with how the runs ended."""
    if config.out:
        check_scores(config.out)
    remind(config)
    demonstrate(task, config)
    model, tokenizer = load_model(config)
    examples = split_of(task, config.split, config)[: config.eval_examples or None]
    sampled = f"sampled at {config.temperature}"
    lines = []
    results = {}
    for how, name, temperature in (
        ("sampled", sampled, config.temperature),
        ("greedy", "greedy", 0.0),
    ):
        with FirstFailures():
            result = evaluate(model, tokenizer, task, examples, config, temperature)
        results[how] = result
        ended = ", ".join(f"{n} {status}" for status, n in result["statuses"].items() if n)
        lines.append(
            f"{config.task} {config.split} score, {name}: {result['score']:.3f} ± "
            f"{result['stderr']:.3f} ({len(examples)} examples: {ended})"
        )
        lines.extend(f"  {figure} {mean:.3f}" for figure, mean in result["measures"].items())
    if config.out:
        write_json(config.out, results)
    return "\n".join(lines)


def check_scores(out: str) -> None:
    """Raise InputError where `eval` cannot write to --out, or what is there would be lost."""
    file = Path(out)
    if file.is_dir() or not file.parent.is_dir():
        raise InputError(f"--out {out}: expected the name of a file, in a folder that is there")
    if not file.exists():
        return
    # neither a device nor a file that `eval` has not written
    if not file.is_file() or read_json(file).keys() != {"sampled", "greedy"}:
        raise InputError(f"--out {out}: is there already, and has no scores of `eval`")


def run_show(task: Task, config: Config) -> str:
    """Run the program on one example and return the trace."""
    remind(config)
    demonstrate(task, config)
    model, tokenizer = load_model(config)
    examples = split_of(task, config.split, config)
    if config.index >= len(examples):
        raise InputError(
            f"--index {config.index}: the {config.split} split has {len(examples)} examples"
        )
    example = examples[config.index]
    with FirstFailures():
        runs, _ = play(model, tokenizer, task, [example], config, config.temperature, step=-1)
    expected = expected_of(task.program, example)
    return show(runs[0], expected=expected, decode=decoder(tokenizer, config))


def demonstrate(task: Task, config: Config) -> None:
    """Put the demonstrations of --labelled-demos into the program, for a model that is not trained.

    Where the option says none, or leaves the number open, the prompts stay as they are.
    """
    if config.labelled_demos > 0:
        add_demos(task.program, labelled_demos(task, config.labelled_demos, config.seed))


def remind(config: Config) -> None:
    """Print a note where a run's weights are used for a task, or under prompts, of another run."""
    run = Path(config.model).parent
    with contextlib.suppress(CheckpointError):
        begun = read_json(run / "config.json")
        # with the demonstrations that the run began with
        if (run / "prompts.json").exists():
            begun |= {"prompts": str(run / "prompts.json")}
        for name in ("task", "prompts"):
            was = begun.get(name)
            now = getattr(config, name)
            if type(was) is str and not same_path(was, now):
                note = (
                    f"note: {config.model} was trained with --{name} {was or 'none'}, "
                    f"and is used with {now or 'none'}"
                )
                print(printable(note), file=sys.stderr)


def same_path(a: str, b: str) -> bool:
    """Whether two options name the same file; an empty one names none."""
    return a == b or bool(a and b and Path(a).resolve() == Path(b).resolve())


def run_merge(adapter: str, out: str, config: Config) -> str:
    """Add a LoRA adapter into the weights it belongs to; write them as an ordinary checkpoint."""
    model, tokenizer = load_model(dataclasses.replace(config, model=adapter))
    if not lora_layers(model):
        raise InputError(f"{adapter}: holds no adapter")
    save_new(merged(model), tokenizer, out)
    return f"{out}: {adapter} merged, in {str(model.head.dtype).removeprefix('torch.')}"


def run_imitate(task: Task, config: Config) -> str:
    """Train on labelled demonstrations; write the checkpoint --out, which a training starts from."""
    if not config.out:
        raise InputError("--out: imitate needs a folder for its checkpoint")
    out = Path(config.out)
    if out.exists():
        raise InputError(f"{out}: is there already")
    # a place that cannot be written to is found before the training, not after it
    out.mkdir(parents=True)
    out.rmdir()
    model, tokenizer = load_model(config)
    bar = tqdm(total=config.imitation_steps, desc="imitate", unit="step", disable=None)

    def watch(step: int, surprise: float) -> None:
        bar.update()
        if step % 8 == 0 or step + 1 == config.imitation_steps:
            tqdm.write(f"step {step + 1:4d}  {surprise:.3f} nats a token", file=sys.stderr)

    with bar:
        surprises, examples = imitate(task, model, tokenizer, config, watch)
    save_new(merged(model), tokenizer, out)
    return (
        f"{config.out}: {surprises[0]:.2f} -> {surprises[-1]:.2f} nats a token of the "
        f"demonstrations of {examples} training examples, "
        f"{config.imitation_steps} steps of {config.examples}"
    )


# ---------------------------------------------------------------------- trajectories made elsewhere
# what a call may carry, a number for each sampled token
LOGPROBS = ["logprobs", "old_logprobs", "ref_logprobs"]
# of a number in a file: further ones overflow on the way
LARGEST = 1e100


def read_trajectories(path: str) -> tuple[list[Trajectory], dict[int, dict]]:
    """The input of `group` (docs/training.md, "Grouping trajectories made elsewhere"), checked.

    Returns the trajectories, and id(completion) -> the call as given, for those with log-probs.
    Raises InputError naming file and field.
    """

    def need(good: bool, where: str, what: str):
        if not good:
            raise InputError(f"{path}: {where}: expected {what}")

    try:
        text = sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
        data = json.loads(text)
    except (OSError, ValueError, RecursionError) as e:
        raise InputError(f"{path}: cannot be read as JSON ({e})") from None
    listed = isinstance(data, dict) and isinstance(data.get("trajectories"), list)
    need(listed, "trajectories", "an object with this list")

    trajectories = []
    logprobs = {}
    seen = set()
    for i, run in enumerate(data["trajectories"]):
        where = f"trajectories[{i}]"
        check_run(run, where, need)
        example, rollout = run["example"], run["rollout"]
        again = f"each rollout once, found rollout {rollout} of example {example!r} again"
        need((example, rollout) not in seen, where, again)
        seen.add((example, rollout))

        calls = []
        made = Counter()
        for c, call in enumerate(run["calls"]):
            old = check_call(call, f"{where}.calls[{c}]", need)
            completion = Completion([], [0] * len(old), old, "stop")
            module = call["module"]
            calls.append(Call(module, made[module], {}, completion))
            made[module] += 1
            if "logprobs" in call:
                logprobs[id(completion)] = call
        trajectories.append(
            Trajectory(example, rollout, tuple(calls), None, run.get("reward"), run["status"])
        )
    return trajectories, logprobs


def check_run(run, where: str, need: Callable[[bool, str, str], None]) -> None:
    """Of a trajectory as given, `need` each field but the calls themselves to be as it should."""
    need(isinstance(run, dict), where, "an object")
    example = run.get("example")
    need(type(example) in (str, int), f"{where}.example", "a string or a whole number")
    need(type(run.get("rollout")) is int, f"{where}.rollout", "a whole number")
    need(run.get("status") in STATUSES, f"{where}.status", f"one of {', '.join(STATUSES)}")
    reward = run.get("reward")
    # NaN and infinity pass: their runs are excluded, as those to which a metric gives them
    is_number = type(reward) in (int, float) and not LARGEST < abs(reward) < math.inf
    need(is_number or run["status"] == "tool_error", f"{where}.reward", "a number of at most 1e100")
    need(isinstance(run.get("calls"), list), f"{where}.calls", "a list")


def check_call(call, where: str, need: Callable[[bool, str, str], None]) -> list[float]:
    """Of a call as given, `need` each field to be as it should.

    Returns the old log-probs of its tokens; where none are given it counts as one token.
    """
    named = isinstance(call, dict) and isinstance(call.get("module"), str)
    need(named, f"{where}.module", "a string")
    given = [name for name in LOGPROBS if name in call]
    for name in given:
        # all three or none, of one length
        fits = (
            given == LOGPROBS
            and isinstance(call[name], list)
            and len(call[name]) == len(call["logprobs"])
            and all(type(x) in (int, float) and abs(x) <= LARGEST for x in call[name])
        )
        what = f"{', '.join(LOGPROBS)}: a number for each sampled token"
        need(fits, f"{where}.{name}", what)
    return call["old_logprobs"] if given else [0.0]


def run_group(path: str, config: Config) -> str:
    """Groups and advantages of trajectories made elsewhere, as JSON.

    Where every call has its log-probs, also the weight of each member's tokens and the loss.
    """
    trajectories, logprobs = read_trajectories(path)
    groups = group_calls(
        trajectories, config.short_groups, config.group_size, config.level, config.seed
    )
    values = advantages(
        groups, trajectories, config.baseline, config.leave_one_out, config.scale_rewards
    )
    rows = weigh(groups, values, trajectories, config.normalize, config.max_tokens)
    scored = all(id(c.completion) in logprobs for t in trajectories for c in t.calls)

    excluded = [t for t in trajectories if not t.votes]
    result = {
        "groups": [],
        "excluded": [
            {"example": t.example, "rollout": t.rollout, "reason": why_excluded(t)}
            for t in excluded
        ],
    }
    # rows stand in the order of groups, members and calls; those of a member weigh the same
    first_row = 0
    for g, of_group in zip(groups, values):
        members = []
        for m, advantage in zip(g.members, of_group):
            member = {"rollout": trajectories[m.trajectory].rollout}
            if config.level == "call":
                member["call"] = m.calls[0]
            else:
                member["calls"] = list(m.calls)
            member["advantage"] = advantage
            if scored:
                member["weight"] = rows[first_row].weight
            first_row += len(m.calls)
            members.append(member)
        key = {"example": g.example, "module": g.module, "invocation": g.invocation}
        result["groups"].append({**key, "members": members})
    if scored:
        result["loss"] = loss_of(rows, logprobs, config)
        if not math.isfinite(result["loss"]):
            raise InputError(f"{path}: the loss is {result['loss']}: log-probs are too far apart")
    return json.dumps(result)


def why_excluded(t: Trajectory) -> str:
    """A tool failed, or the reward is no finite number."""
    return t.status if t.status == "tool_error" else "reward"


def loss_of(rows: list, logprobs: dict[int, dict], config: Config) -> float:
    """The policy loss of the rows' tokens, in double."""
    tokens = []
    for row in rows:
        given = logprobs[id(row.completion)]
        for of_token in zip(*(given[name] for name in LOGPROBS)):
            tokens.append((*of_token, row.advantage, row.weight))
    columns = torch.tensor(tokens, dtype=torch.double).reshape(-1, 5)  # (N, 5)
    new, old, ref, advantage, weight = columns.unbind(1)
    return policy_loss(
        new, old, advantage, weight, config.clip_low, config.clip_high, config.beta, ref
    ).item()


# --------------------------------------------------------------------------------- the command line
COMMANDS = {
    "train": run_train,
    "prompts": run_train,
    "eval": run_eval,
    "show": run_show,
    "group": run_group,
    "replay": run_replay,
    "merge": run_merge,
    "imitate": run_imitate,
}

# the commands that work on files, which stand before the options
FILES = {"group": "FILE", "replay": "RUN STEP", "merge": "ADAPTER OUT"}


def make_parser() -> argparse.ArgumentParser:
    """The command, its files, and a flag for each field of Config."""
    parser = argparse.ArgumentParser(
        prog="mmgrpo.py",
        usage="mmgrpo.py COMMAND [FILE …] [--option VALUE …]",
        description=mmgrpo.__doc__.split("\n\n")[1]
        + " Defaults are in brackets; a task may have its own, and a flag beats both.",
    )
    parser.add_argument(
        "command",
        choices=tuple(COMMANDS),
        help="train weights; search prompts; score a checkpoint; show one run; group trajectories; "
        "sample a step of a run again; merge an adapter; train on labelled demonstrations",
    )
    parser.add_argument(
        "files",
        nargs="*",
        help="of group: a JSON file of trajectories, or - for standard input; of replay, and of "
        "show with --html: the folder of a run and one of its steps; of merge: the folder of a "
        "LoRA adapter and a new one",
    )
    helps = help_texts()
    types = {"int": int, "float": float, "str": str}
    for field in dataclasses.fields(Config):
        if field.type == "bool":
            kind = {"action": argparse.BooleanOptionalAction}
        else:
            choices = CHOICES.get(field.name)
            shown = "{" + ",".join(choices) + "}" if choices else field.type.upper()
            kind = {"type": types[field.type], "metavar": shown}
        # % would begin a format of argparse's
        text = f"{helps[field.name].replace('%', '%%')} [{field.default}]"
        parser.add_argument(flag_of(field.name), default=argparse.SUPPRESS, help=text, **kind)
    return parser


def is_step_number(text: str) -> bool:
    return re.fullmatch("[0-9]{1,9}", text) is not None


def parse_arguments(argv: list[str]) -> tuple[str, list]:
    """argv -> (command, the arguments of its function)."""
    parser = make_parser()
    given = vars(parser.parse_args(argv))
    command = given.pop("command")
    files = given.pop("files")
    if command == "prompts":
        if "strategy" in given:
            parser.error("prompts takes no --strategy; `train` does")
        given["strategy"] = "p"
    if "html" in given and command != "show":
        parser.error(f"{command} takes no --html; `show RUN STEP --html FILE` does")
    if command == "show" and (files or "html" in given):
        # a page is of a step that is made again
        if len(files) != 2 or not is_step_number(files[1]) or not given.get("html"):
            parser.error("a page of a step needs all of: show RUN STEP --html FILE")
        command = "replay"
    takes = FILES.get(command, "")
    if len(files) != len(takes.split()) or command == "replay" and not is_step_number(files[1]):
        parser.error(f"{command} takes {takes or 'options only'}")
    if command == "replay":
        # which task the command line names, and not Config's default
        given = {"task": ""} | given
    if takes:
        return command, [*files, Config(**given)]
    return command, [*load_task(given)]


# what a shell says of a program that SIGPIPE ended
READER_GONE = 141


def main(argv: list[str]) -> int:
    """Run a command line -> its exit status."""

    def command() -> str:
        name, arguments = parse_arguments(argv)
        return COMMANDS[name](*arguments)

    return guarded(command)


def guarded(command: Callable[[], str]) -> int:
    """Print what a command returns -> 0; or in a sentence why it failed -> 2.

    A bug of this project is neither: its exception goes on.
    """
    lenient_output()
    try:
        print(command())
        return 0
    except BrokenPipeError:
        # whoever read has gone
        return READER_GONE
    except (
        InputError,
        CheckpointError,
        ProgramError,
        ParityError,
        StoppedError,
        ToolError,
        FloatingPointError,
        OSError,
        # a full disk, while weights are written
        safetensors.SafetensorError,
    ) as e:
        # a bug in the user's program: with its traceback
        if e.__cause__ is not None:
            traceback.print_exception(e.__cause__)
        print(
            *map(printable, [f"error: {e}", *getattr(e, "__notes__", ())]),
            sep="\n",
            file=sys.stderr,
        )
        return 2
