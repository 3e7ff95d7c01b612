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

import torch

import mmgrpo
from lm.lora import lora_layers, merged
from lm.tokenizer import read_json
from mmgrpo import Config, advantages, evaluate, group_calls, play, policy_loss, weigh
from model import CheckpointError, save_pretrained
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
from prompts.search import compose, plan
from prompts.start import add_demos, labelled_demos, without_shown
from run.figures import ParityError, measure
from run.health import FirstFailures, StoppedError
from run.loading import decoder, load_model, load_task, split_of
from run.page import check_file, write_page
from run.records import read_metrics
from run.state import FREE, read_state, same_options, states, step_of
from run.terminal import expected_of, lenient_output, show


def folder_of(config: Config) -> Path:
    """Where the run goes: --out; else a new one of runs/hover, runs/hover-2, …, or with --resume the last of these."""
    numbered = [Path("runs") / (Path(config.task).stem + f"-{i}" * (i > 1)) for i in range(1, 1000)]
    used = [p for p in numbered if (p / "config.json").exists()]
    if config.resume and not config.out and not used:
        raise InputError(f"--resume: there is no run of {config.task} in runs/")
    out = Path(config.out) if config.out else used[-1] if config.resume else next(p for p in numbered if p not in used)
    done = step_of(states(out)[-1]) if states(out) else -1
    if done < 0 and (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").read_bytes().count(b"\n") > 1:
        raise InputError(f"{out}: holds the metrics of a run whose states are gone; choose another --out")
    if done >= config.steps and (out / "result.json").exists():
        raise InputError(f"{out}: holds a run already, finished at step {done}; more --steps go on with it, another --out begins anew")
    return out


def run_train(task: Task, config: Config) -> str:
    """Go through the stages of --strategy; the last line has the dev score before and after, and the seconds.

    Ctrl-C stops it after the step or trial at hand, with its state saved; a second one at once."""
    for split in ("train", "dev"):                          # errors come before there is a folder
        split_of(task, split, config)
    todo, loaded = plan(task, config), [load_model(config)]
    single, config = len(todo) == 1, todo[0][1] if len(todo) == 1 else config
    out, interrupts = folder_of(config), 0
    out.mkdir(parents=True, exist_ok=True)
    lock = (out / ".lock").open("w")                        # held until this ends, however it does
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise InputError(f"{out}: another process trains there") from None
    options = dataclasses.asdict(config)
    if (out / "config.json").exists():
        begun = read_json(out / "config.json")
        if config.strategy == "w":                          # the other options are checked with the state, if there is one
            begun = {"strategy": begun.get("strategy", "w")}
        same_options(out, begun, options, FREE if single else tuple({*FREE} - {"steps", "trials"}))     # later stages build on them
    if not states(out):
        write_json(out / "config.json", options)

    def on_interrupt(*_):
        nonlocal interrupts
        interrupts += 1
        if interrupts > 1:
            raise KeyboardInterrupt
        print("\nstopping after this step or trial; Ctrl-C again stops at once", file=sys.stderr)
    before, began = signal.signal(signal.SIGINT, on_interrupt), time.perf_counter()
    try:
        with FirstFailures(out / "errors.log"):
            result = compose(task, config, out, lambda stage: loaded.pop() if loaded else load_model(stage),
                             lambda: interrupts > 0)
    except (StoppedError, ProgramError) as e:
        e.add_note(f"the same command with OUT={out} goes on from here")
        raise
    finally:
        signal.signal(signal.SIGINT, before)
        lock.close()
    write_json(out / "config.json", options)                # --steps or --trials may have changed
    if not result:
        return f"stopped; the same command with OUT={out} goes on"
    skipped = sum("skipped" in m for folder in [out, *out.glob("*-w")] for m in read_metrics(folder)[0])
    told, alone = result["stages"], config.strategy == "w"
    size, last = f"{config.steps} steps, " * alone, told[-1]["dev"][-1] if alone else max(told[-1]["dev"])      # of the last weights; of the best
    return (f"{skipped} steps were skipped, for their gradient was not finite\n" * bool(skipped)
            + "".join(f"{s['stage']}: dev score {s['dev'][0]:.3f} -> {max(s['dev']):.3f}, {s['rollouts']:,} rollouts, {s['tokens']:,} "
                      f"sampled tokens, {s['seconds']:.0f} s\n" for s in told if not alone)
            + f"what it left is in {out}\n{config.task} dev score: {told[0]['dev'][0]:.3f} -> {last:.3f} "
            f"({size}{time.perf_counter() - began:.0f} s{' of this command' * (not alone)})")


def run_replay(folder: str, step: str, config: Config) -> str:
    """Sample the rollouts of a step of a run once more, from the newest state before it or from the start; say whether they
    are token for token those of the run, and show those of example --index of the step. With --html (`show RUN STEP --html FILE`)
    make the whole step once more, and write its page.

    A run's folder is data, which people share: a task file that it names is not run unless --task gives
    it on the command line, but for those of tasks/. Raises InputError naming it."""
    step = int(step)
    if config.html:
        check_file(config.html)
    try:
        options = json.loads((Path(folder) / "config.json").read_text())
        if not config.task and not re.fullmatch(r"\w+", options["task"]):
            raise InputError(f"{folder}: was trained on {options['task']}, whose code is not run unless "
                             f"you give it: --task {options['task']}")
        task, done = load_task(options | {"task": config.task or options["task"]})
        if (Path(folder) / "prompts.json").exists():        # with the demonstrations that the run began with
            load_prompts(task.program, Path(folder) / "prompts.json")
        task = without_shown(task)
        steps, dev = read_metrics(Path(folder))
        digests = {m["step"]: m["digest"] for m in steps}
        done = mmgrpo.settled(done, dev[0]["dev"]["sampled"]) if dev else done
    except InputError:
        raise
    except (OSError, ValueError, TypeError, KeyError) as e:
        raise InputError(f"{folder}: holds no run ({type(e).__name__}: {e})") from None
    if not digests:
        raise InputError(f"{folder}: holds no steps of a training" + "".join(f"; {w} does" for w in sorted(Path(folder).glob("*-w"))))
    if step not in digests or not 0 <= config.index < done.examples:
        raise InputError(f"{folder}: there is no example {config.index} of step {step}: the run has steps 1 to "
                         f"{max(digests, default=0)} of {done.examples} examples each")
    model, tokenizer = load_model(done)
    optimizer, reference = mmgrpo.prepare(model, done)
    start = 0
    for state in reversed([s for s in states(Path(folder)) if step_of(s) < step]):
        with contextlib.suppress(ValueError):               # a damaged one: the one before, or the start
            start = read_state(state, model, optimizer)["step"]
            break
    for i in range(start, step - 1):
        mmgrpo.train_step(model, tokenizer, optimizer, reference, task, done, i)
    if config.html:
        return write_page(config.html, folder, digests[step], model, tokenizer, optimizer, reference, task, done, step - 1)
    trajectories, _ = mmgrpo.sample_step(model, tokenizer, task, done, step - 1)
    same = measure(trajectories, [], [])["digest"] == digests[step]
    batch = mmgrpo.batch_of(step - 1, done.examples, len(task.train), done.seed)
    expected = expected_of(task.program, task.train[batch[config.index]])
    shown = [show(t, expected=expected, decode=decoder(tokenizer, config))
             for t in trajectories if t.example == config.index]
    return "\n\n".join([*shown, f"step {step}: {len(trajectories)} runs, {sum(len(t.calls) for t in trajectories)} calls: "
                                 f"{'token for token' if same else 'NOT'} those of the run"])


def run_eval(task: Task, config: Config) -> str:
    """Score a checkpoint on a split, sampled and greedily, with how the runs ended."""
    if config.out and (Path(config.out).is_dir() or not Path(config.out).parent.is_dir()):
        raise InputError(f"--out {config.out}: expected the name of a file, in a folder that is there")
    remind(config)
    demonstrate(task, config)
    model, tokenizer = load_model(config)
    examples, lines, results = split_of(task, config.split, config)[:config.eval_examples or None], [], {}
    for name, temperature in ((f"sampled at {config.temperature}", config.temperature), ("greedy", 0.0)):
        with FirstFailures():
            result = evaluate(model, tokenizer, task, examples, config, temperature)
        results[name.split()[0]] = result
        lines.append(f"{config.task} {config.split} score, {name}: {result['score']:.3f} ± {result['stderr']:.3f} "
                     f"({len(examples)} examples: {', '.join(f'{n} {s}' for s, n in result['statuses'].items() if n)})"
                     + "".join(f"\n  {name} {mean:.3f}" for name, mean in result["measures"].items()))
    if config.out:
        write_json(config.out, results)
    return "\n".join(lines)


def demonstrate(task: Task, config: Config) -> None:
    """Put the demonstrations of --labelled-demos into the program, for a model that is not trained: where it says none, or
    leaves the number open, the prompts stay as they are."""
    if config.labelled_demos > 0:
        add_demos(task.program, labelled_demos(task, config.labelled_demos, config.seed))


def remind(config: Config) -> None:
    """A note where the weights of a run are used for another task, or under other prompts, than they were trained for."""
    with contextlib.suppress(CheckpointError):
        begun = read_json(Path(config.model).parent / "config.json")
        own = Path(config.model).parent / "prompts.json"    # with the demonstrations that the run began with
        begun |= {"prompts": str(own)} if own.exists() else {}
        for name in ("task", "prompts"):
            was, now = begun.get(name), getattr(config, name)
            if type(was) is str and was != now and (not was or not now or Path(was).resolve() != Path(now).resolve()):
                print(f"note: {config.model} was trained with --{name} {was or 'none'}, and is used with {now or 'none'}", file=sys.stderr)


def run_show(task: Task, config: Config) -> str:
    """Run the program on one example and return the trace."""
    remind(config)
    demonstrate(task, config)
    model, tokenizer = load_model(config)
    examples = split_of(task, config.split, config)
    if config.index >= len(examples):
        raise InputError(f"--index {config.index}: the {config.split} split has {len(examples)} examples")
    example = examples[config.index]
    with FirstFailures():
        (run,), _ = play(model, tokenizer, task, [example], config, config.temperature, step=-1)
    return show(run, expected=expected_of(task.program, example), decode=decoder(tokenizer, config))


LOGPROBS = ["logprobs", "old_logprobs", "ref_logprobs"]     # what a call may carry, a number for each sampled token


def run_merge(adapter: str, out: str, config: Config) -> str:
    """Add a LoRA adapter into the weights it belongs to; write them as an ordinary checkpoint."""
    model, tokenizer = load_model(dataclasses.replace(config, model=adapter))
    if not lora_layers(model):
        raise InputError(f"{adapter}: holds no adapter")
    if Path(out).exists():
        raise InputError(f"{out}: is there already")
    save_pretrained(merged(model), tokenizer, out)
    return f"{out}: {adapter} merged, in {config.dtype}"


def read_trajectories(path: str) -> tuple[list[Trajectory], dict[int, dict]]:
    """The input of `group` (README, "Grouping trajectories made elsewhere") -> trajectories, and each completion's log-probs
    by id(completion). Raises InputError naming file and field."""
    def need(good: bool, where: str, what: str):
        if not good:
            raise InputError(f"{path}: {where}: expected {what}")
    try:
        data = json.loads(sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise InputError(f"{path}: cannot be read as JSON ({e})") from None
    need(isinstance(data, dict) and isinstance(data.get("trajectories"), list), "trajectories", "an object with this list")
    number = lambda x: type(x) in (int, float) and math.isfinite(x)
    result, logprobs, seen = [], {}, set()
    for i, t in enumerate(data["trajectories"]):
        at = f"trajectories[{i}]"
        need(isinstance(t, dict), at, "an object")
        need(type(t.get("example")) in (str, int), f"{at}.example", "a string or a whole number")
        need(type(t.get("rollout")) is int, f"{at}.rollout", "a whole number")
        need(t.get("status") in STATUSES, f"{at}.status", f"one of {', '.join(STATUSES)}")
        need(type(t.get("reward")) in (int, float) and not 1e100 < abs(t["reward"]) < math.inf or t["status"] == "tool_error",
             f"{at}.reward", "a number of at most 1e100")
        need(isinstance(t.get("calls"), list), f"{at}.calls", "a list")
        need((t["example"], t["rollout"]) not in seen, at, f"each rollout once, found rollout {t['rollout']} of example "
                                                           f"{t['example']!r} again")
        seen.add((t["example"], t["rollout"]))
        calls, made = [], Counter()
        for c, call in enumerate(t["calls"]):
            here = f"{at}.calls[{c}]"
            need(isinstance(call, dict) and isinstance(call.get("module"), str), f"{here}.module", "a string")
            given = [k for k in LOGPROBS if k in call]
            for k in given:
                need(given == LOGPROBS and isinstance(call[k], list) and len(call[k]) == len(call["logprobs"])
                     and all(map(number, call[k])), f"{here}.{k}", f"{', '.join(LOGPROBS)}: a number for each sampled token")
            old = call["old_logprobs"] if given else [0.0]
            completion = Completion([], [0] * len(old), old, "stop")
            calls.append(Call(call["module"], made[call["module"]], {}, completion))
            made[call["module"]] += 1
            if given:
                logprobs[id(completion)] = call
        result.append(Trajectory(t["example"], t["rollout"], tuple(calls), None, t.get("reward"), t["status"]))
    return result, logprobs


def run_group(path: str, config: Config) -> str:
    """Groups and advantages of trajectories made elsewhere, as JSON; with log-probs also token weights and the loss."""
    trajectories, logprobs = read_trajectories(path)
    groups = group_calls(trajectories, config.short_groups, config.group_size, config.level, config.seed)
    values = advantages(groups, trajectories, config.baseline, config.leave_one_out, config.scale_rewards)
    rows = weigh(groups, values, trajectories, config.normalize, config.max_tokens)
    scored, at = all(id(c.completion) in logprobs for t in trajectories for c in t.calls), 0
    result = {"groups": [], "excluded": [{"example": t.example, "rollout": t.rollout, "reason": "tool_error"}
                                         for t in trajectories if not t.votes]}
    for g, of_group in zip(groups, values):
        members = []
        for m, a in zip(g.members, of_group):
            place = {"call": m.calls[0]} if config.level == "call" else {"calls": list(m.calls)}
            members.append({"rollout": trajectories[m.trajectory].rollout, **place, "advantage": a})
            if scored:
                members[-1]["weight"] = rows[at].weight
            at += len(m.calls)
        result["groups"].append({"example": g.example, "module": g.module, "invocation": g.invocation, "members": members})
    if scored:
        tokens = torch.tensor([(*of_token, r.advantage, r.weight) for r in rows
                               for of_token in zip(*(logprobs[id(r.completion)][k] for k in LOGPROBS))], dtype=torch.double)
        new, old, ref, advantage, weight = tokens.reshape(-1, 5).unbind(1)
        result["loss"] = policy_loss(new, old, advantage, weight, config.clip_low, config.clip_high, config.beta, ref).item()
    return json.dumps(result)


def parse_arguments(argv: list[str]) -> tuple[str, list]:
    """argv -> (command, the arguments of its function)."""
    parser = argparse.ArgumentParser(prog="mmgrpo.py", usage="mmgrpo.py COMMAND [FILE …] [--option VALUE …]", description=(
        mmgrpo.__doc__.split("\n\n")[1] + " Defaults are in brackets; a task may have its own, and a flag beats both."))
    parser.add_argument("command", choices=("train", "prompts", "eval", "show", "group", "replay", "merge"), help=(
        "train weights; search prompts; score a checkpoint; show one run; group trajectories; sample a step of a run again; merge an adapter"))
    parser.add_argument("files", nargs="*", help="of group: a JSON file of trajectories, or - for standard input; of replay, and of show "
                                                 "with --html: the folder of a run and one of its steps; of merge: the folder of a LoRA adapter and a new one")
    source = Path(sys.modules[Config.__module__].__file__).read_text(encoding="utf-8").split("class Config:")[1]
    comments = dict(re.findall(r"^    (\w+): .*?# (.*)$", source, re.M))     # each field's comment is its help
    for f in dataclasses.fields(Config):
        kind = {"action": argparse.BooleanOptionalAction} if f.type == "bool" else {
            "type": {"int": int, "float": float, "str": str}[f.type], "metavar": f.type.upper()}
        parser.add_argument(f"--{f.name.replace('_', '-')}", default=argparse.SUPPRESS, **kind,
                            help=f"{comments[f.name].replace('%', '%%')} [{f.default}]")
    given = vars(parser.parse_args(argv))
    command, files = given.pop("command"), given.pop("files")
    if command == "prompts":
        if "strategy" in given:
            parser.error("prompts takes no --strategy; `train` does")
        given["strategy"] = "p"
    if "html" in given and command != "show":
        parser.error(f"{command} takes no --html; `show RUN STEP --html FILE` does")
    if command == "show" and (files or "html" in given):    # a page is of a step that is made again
        if len(files) != 2 or not files[1].isdecimal() or not given.get("html"):
            parser.error("a page of a step needs all of: show RUN STEP --html FILE")
        command = "replay"
    takes = {"group": "FILE", "replay": "RUN STEP", "merge": "ADAPTER OUT"}.get(command, "")
    if len(files) != len(takes.split()) or command == "replay" and not files[1].isdecimal():
        parser.error(f"{command} takes {takes or 'options only'}")
    if command == "replay":
        given = {"task": ""} | given            # what the command line says, and no default
    return command, [*files, Config(**given)] if takes else [*load_task(given)]


def main(argv: list[str]) -> int:
    lenient_output()
    try:
        command, arguments = parse_arguments(argv)
        run = {"train": run_train, "prompts": run_train, "eval": run_eval, "show": run_show, "group": run_group, "replay": run_replay,
               "merge": run_merge}[command]
        print(run(*arguments))
        return 0
    except (InputError, CheckpointError, ProgramError, ParityError, StoppedError, ToolError,
            FloatingPointError, OSError) as e:
        if e.__cause__ is not None:                                 # a bug in the user's program: with its traceback
            traceback.print_exception(e.__cause__)
        print(f"error: {e}", *getattr(e, "__notes__", ()), sep="\n", file=sys.stderr)
        return 2
