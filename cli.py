"""The command line of mmgrpo.py: options, folders and files. The method itself is in mmgrpo.py."""
from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import math
import re
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

import torch

import mmgrpo
from mmgrpo import Config, advantages, evaluate, group_calls, play, policy_loss, weigh
from model import CheckpointError, Tokenizer, Transformer, load_pretrained
from program import STATUSES, Call, Completion, InputError, ProgramError, Task, Trajectory, show


def load_task(config: Config) -> Task:
    """The task that config.task names: a file of tasks/, or any Python file with a function load(data)."""
    path = Path(config.task if config.task.endswith(".py") else Path(__file__).parent / "tasks" / f"{config.task}.py")
    if not path.is_file():
        raise InputError(f"--task {config.task}: no such task ({path}; hover, banking77 and papillon are in tasks/)")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    task = module.load(config.data)
    if config.prompts:
        task.program.load(config.prompts)
    return task


def load_model(config: Config) -> tuple[Transformer, Tokenizer]:
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return load_pretrained(config.model, device, getattr(torch, config.dtype))


def split_of(task: Task, split: str, config: Config) -> list[dict]:
    """The examples of a split."""
    if not getattr(task, split):
        raise InputError(f"--task {config.task}: its {split} split is empty")
    return getattr(task, split)


def new_folder(config: Config) -> Path:
    """A folder for the run, never one that holds a run already: runs/hover, runs/hover-2, …"""
    out = Path(config.out or f"runs/{Path(config.task).stem}")
    if config.out and (out / "metrics.jsonl").exists():
        raise InputError(f"--out {out}: holds a run already")
    for i in range(2, 10**6):
        if not (out / "metrics.jsonl").exists():
            out.mkdir(parents=True, exist_ok=True)
            return out
        out = out.with_name(f"{Path(config.task).stem}-{i}")


def run_train(config: Config) -> str:
    """Train; the last line has the dev score before and after, and the seconds of the training part."""
    task, (model, tokenizer) = load_task(config), load_model(config)
    for split in ("train", "dev"):
        split_of(task, split, config)
    out = new_folder(config)
    (out / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")
    began = time.perf_counter()
    before, after = mmgrpo.train(task, model, tokenizer, config, out)
    return (f"metrics, checkpoints and the curve are in {out}\n{config.task} dev score: {before:.3f} -> {after:.3f} "
            f"({config.steps} steps, {time.perf_counter() - began:.0f} s)")


def run_eval(config: Config) -> str:
    """Score a checkpoint on a split, sampled and greedily, with how the runs ended."""
    task, (model, tokenizer) = load_task(config), load_model(config)
    examples, lines = split_of(task, config.split, config)[:config.eval_examples or None], []
    for name, temperature in ((f"sampled at {config.temperature}", config.temperature), ("greedy", 0.0)):
        result = evaluate(model, tokenizer, task, examples, config, temperature)
        lines.append(f"{config.task} {config.split} score, {name}: {result['score']:.3f} ± {result['stderr']:.3f} "
                     f"({len(examples)} examples: {', '.join(f'{n} {s}' for s, n in result['statuses'].items() if n)})")
    return "\n".join(lines)


def run_show(config: Config) -> str:
    """Run the program on one example and return the trace."""
    task, (model, tokenizer) = load_task(config), load_model(config)
    examples = split_of(task, config.split, config)
    if config.index >= len(examples):
        raise InputError(f"--index {config.index}: the {config.split} split has {len(examples)} examples")
    return show(play(model, tokenizer, task, [examples[config.index]], config, config.temperature, step=-1)[0][0])


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
        need(type(t.get("reward")) in (int, float) or t["status"] == "tool_error", f"{at}.reward", "a number")
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


LOGPROBS = ["logprobs", "old_logprobs", "ref_logprobs"]


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


def parse_arguments(argv: list[str]) -> tuple[str, str, Config]:
    """argv -> (command, FILE of `group`, Config). A flag overrides the task's own default, which overrides Config's."""
    parser = argparse.ArgumentParser(prog="mmgrpo.py", description=mmgrpo.__doc__.split("\n\n")[1])
    parser.add_argument("command", choices=("train", "eval", "show", "group"))
    parser.add_argument("file", nargs="?", help="of group: a JSON file of trajectories, or - for standard input")
    source = Path(mmgrpo.__file__).read_text(encoding="utf-8").split("class Config:")[1]
    comments = dict(re.findall(r"^    (\w+): .*?# (.*)$", source, re.M))     # each field's comment is its help
    for f in dataclasses.fields(Config):
        kind = {"action": argparse.BooleanOptionalAction} if f.type == "bool" else {
            "type": {"int": int, "float": float, "str": str}[f.type], "metavar": f.type.upper()}
        parser.add_argument(f"--{f.name.replace('_', '-')}", default=argparse.SUPPRESS, **kind,
                            help=f"{comments[f.name].replace('%', '%%')} [{f.default}]")
    given = vars(parser.parse_args(argv))
    command, file = given.pop("command"), given.pop("file")
    if (command == "group") != (file is not None):
        parser.error("group takes one FILE" if command == "group" else f"{command} takes no FILE")
    config = Config(**given)
    return command, file, config if command == "group" else Config(**(load_task(config).defaults | given))


def main(argv: list[str]) -> int:
    try:
        command, file, config = parse_arguments(argv)
        print(run_group(file, config) if command == "group" else
              {"train": run_train, "eval": run_eval, "show": run_show}[command](config))
        return 0
    except (InputError, CheckpointError, ProgramError) as e:
        if e.__cause__ is not None:                                 # a bug in the user's program: with its traceback
            traceback.print_exception(e.__cause__)
        print(f"error: {e}", file=sys.stderr)
        return 2
