"""A step of a training as one HTML file, to be read in a browser: `mmgrpo.py show RUN STEP --html FILE`.

The runs of each example stand side by side, their calls in the rows of their groups. The file loads
nothing: texts, style and script are in it.

What an LM, a tool or an example says stays text, in three ways that do not depend on its content:
every string of the page goes through `plain`, which writes out what cannot be seen; all of them reach
the file as one block of JSON that holds no `<`; and the script puts them on the page as text alone.

Map, in the order the data flows: written_out, plain, beginning, pieces; slots_of, nothing_learned,
Description; page; scores, write_page; then the style and the script.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
import unicodedata
import warnings
from collections import defaultdict
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Callable

import torch

import mmgrpo
from program import Call, InputError, ProgramError, Task, ToolCall, Trajectory
from prompts.files import write_whole
from run.config import Config
from run.figures import ParityError, measure
from run.health import StoppedError
from run.terminal import counted, shorten, statuses

# tokens that the completions of a group must begin with alike for them to be folded
LEAST_FOLDED = 8


# ------------------------------------------------------------------------------------------- texts
@lru_cache(maxsize=10_000)
def written_out(character: str) -> str:
    r"""A character as it is where it can be seen, else its code.

    Not to be seen are control and format characters (bidirectional marks and zero widths are such),
    halves of surrogate pairs, and separators of lines and paragraphs.
    Example: written_out("\u202e") is the six characters \u202e."""
    if unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp"):
        return character
    code = ord(character)
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def plain(value: Any) -> Any:
    """What JSON can hold of a value, all of whose text can be seen; what JSON cannot hold as text."""
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, dict):
        return {plain(str(name)): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return re.sub(r"[^\x20-\x7e\n\t]", lambda found: written_out(found[0]), str(value))


def beginning(texts: list[str]) -> str:
    """What texts begin with alike, in whole lines; all of it where they are equal."""
    shared = os.path.commonprefix(texts)
    if all(text == shared for text in texts):
        return shared
    return shared[: shared.rfind("\n") + 1]


def pieces(ids: list[int], decode: Callable[[list[int]], str]) -> list[str]:
    """The text of each token. A character that is spread over several is with the last of them."""
    result = []
    begin, said = 0, ""  # decoding starts at token `begin`, of which `said` is told already
    for end in range(1, len(ids) + 1):
        text = decode(ids[begin:end])
        # half a character, unless it is none at all: the longest has four bytes
        if text.endswith("\ufffd") and end < len(ids) and end - begin <= 4:
            result.append("")
            continue
        result.append(text[len(said) :])
        # a token's text depends on the one before it: some tokenizers drop a first blank
        begin, said = end - 1, decode(ids[end - 1 : end])
    return result


# ---------------------------------------------------------------------------------- what is to be seen
@dataclass(frozen=True)
class Step:
    """A step as it was trained on. Lists are in the order of `mmgrpo.group_calls` and `weigh`."""

    trajectories: list[Trajectory]
    groups: list[mmgrpo.Group]
    advantages: list[list[float]]
    rows: list[mmgrpo.Row]
    config: Config
    warm_start: bool = False
    # id(completion) -> probability of each of its tokens after the step's update, over that before
    ratios: dict[int, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Place:
    """A run's place in a group. Example: Place(Group(…), call=2, advantage=0.5, weight=0.04)"""

    group: mmgrpo.Group
    call: int  # which of the run's calls stands there
    advantage: float
    weight: float  # of each of its tokens in the step's loss


Slot = tuple[str, int]  # module and invocation: what the calls of a group have in common


def slots_of(runs: list[Trajectory]) -> list[Slot]:
    """The slots of an example's runs, each behind those that come before it in any run.

    Where runs disagree on that, the one that is earlier on average comes first."""
    places = defaultdict(list)
    before = defaultdict(set)
    for t in runs:
        made = [(call.module, call.invocation) for call in t.calls]
        for place, slot in enumerate(made):
            places[slot].append(place)
            before[slot].update(made[:place])
    left = sorted(places, key=lambda slot: (sum(places[slot]) / len(places[slot]), slot))
    ordered = []
    while left:
        waiting = set(left)
        free = (slot for slot in left if before[slot].isdisjoint(waiting))
        ordered.append(next(free, left[0]))
        left.remove(ordered[-1])
    return ordered


def places_of(step: Step) -> dict[tuple[int, Slot], Place]:
    """(which trajectory, slot) -> its place in the group of that slot, for all that have one."""
    found = {}
    rows = iter(step.rows)
    for group, values in zip(step.groups, step.advantages):
        for member, advantage in zip(group.members, values):
            for c in member.calls:
                call = step.trajectories[member.trajectory].calls[c]
                # a group of whole runs has no slot of its own
                whole = step.config.level == "trajectory"
                slot = (call.module, call.invocation) if whole else (group.module, group.invocation)
                place = Place(group, c, advantage, next(rows).weight)
                found[member.trajectory, slot] = place
    return found


def nothing_learned(t: Trajectory, c: int, place: Place | None, grouped: bool, step: Step) -> str:
    """Why nothing is learned from call `c` of a run, "" where something is.

    `place` is where it stands in its group, None where it is in none; `grouped`: the slot has one."""
    config = step.config
    if t.status == "tool_error":
        return "excluded: a tool or the metric failed, which says nothing about the LM"
    if not t.votes:
        return f"excluded: the run's reward is {t.reward}"
    if place is None:
        if config.short_groups == "truncate" and config.level == "call" and not grouped:
            return "excluded: not every run made this call (--short-groups truncate)"
        return f"excluded: not among the {config.group_size} members that --group-size keeps"
    if not t.calls[c].completion.token_ids:
        return "no token was sampled"
    if place.advantage != 0:
        return ""
    if step.warm_start:
        return "warm start: it could not be read"
    rewards = [member.reward for member in place.group.members]
    whose = "the group"
    if config.baseline == "example":
        runs = (r for r in step.trajectories if r.votes and r.example == place.group.example)
        rewards = [r.reward for r in runs]
        whose = "the example"
    if len(rewards) == 1:
        return f"{whose} has one run, and nothing to compare it with"
    if len(set(rewards)) == 1:
        return f"all {len(rewards)} rewards of {whose} are equal"
    return f"its reward is the mean of {whose}"


def told_of_tools(tools: list[ToolCall]) -> list[str]:
    """Uses of tools, a text each."""
    texts = []
    for used in tools:
        arguments = ", ".join(shorten(x) for x in used.arguments)
        result = f"failed: {used.error}" if used.error else shorten(used.result)
        texts.append(f"{used.name}({arguments})\n→ {result}")
    return texts


class Description:
    """A step in the form that the page shows: examples, of each its slots and its runs.

    `decode` turns ids into text, control tokens included."""

    def __init__(self, step: Step, decode: Callable[[list[int]], str]):
        self.step, self.decode = step, decode
        self.places = places_of(step)
        self.prompts: dict[tuple, str] = {}  # ids -> text
        of_module = defaultdict(set)
        for t in step.trajectories:
            for call in t.calls:
                of_module[call.module].add(self.prompt(call))
        # module -> what all its prompts begin with
        self.openings = {module: beginning([*texts]) for module, texts in of_module.items()}

    def prompt(self, call: Call) -> str:
        ids = tuple(call.completion.prompt_ids)
        if ids not in self.prompts:
            self.prompts[ids] = self.decode(list(ids))
        return self.prompts[ids]

    def whole(self) -> dict:
        """All of it."""
        runs = defaultdict(list)
        for i, t in enumerate(self.step.trajectories):
            runs[t.example].append(i)
        examples = []
        for indices in runs.values():
            indices.sort(key=lambda i: self.step.trajectories[i].rollout)
            examples.append(self.example(indices))
        return {"openings": self.openings, "examples": examples}

    def example(self, indices: list[int]) -> dict:
        """An example, whose runs are the trajectories `indices`."""
        runs = [self.step.trajectories[i] for i in indices]
        slots = slots_of(runs)
        heads = {slot: self.head(slot, indices) for slot in slots}
        rewards = [t.reward for t in runs if t.votes]
        mean = f"mean reward {sum(rewards) / len(rewards):.3f}" if rewards else "no rewards"
        return {
            "name": f"example {runs[0].example}",
            "told": f"{len(runs)} runs, {mean}",
            "slots": [*heads.values()],
            "runs": [self.run(i, heads, indices) for i in indices],
        }

    def head(self, slot: Slot, indices: list[int]) -> dict:
        """What the calls of a slot have in common: it stands once, at the head of their row."""
        module, invocation = slot
        calls = []
        for i in indices:
            made = self.step.trajectories[i].calls
            calls += [call for call in made if (call.module, call.invocation) == slot]
        rests = [self.prompt(call)[len(self.openings[module]) :] for call in calls]
        alike = os.path.commonprefix([call.completion.token_ids for call in calls])
        if len(calls) == 1 or len(alike) < LEAST_FOLDED:
            alike = []
        head = {
            "name": f"{module}[{invocation}]",
            "module": module,
            "prompt": beginning(rests),
            "completion": "".join(pieces(alike, self.decode)),
            "folded": len(alike),
        }
        there = [self.places[i, slot] for i in indices if (i, slot) in self.places]
        if there and self.step.config.level == "call":
            rewards = [member.reward for member in there[0].group.members]
            mean = sum(rewards) / len(rewards)
            head["group"] = f"group of {len(rewards)}, mean reward {mean:.3f}"
        return head

    def run(self, i: int, heads: dict[Slot, dict], indices: list[int]) -> dict:
        """A run: how it ended, its calls, and which of them stand in which slots."""
        t = self.step.trajectories[i]
        calls, own = [], {}
        for c, call in enumerate(t.calls):
            slot = (call.module, call.invocation)
            own[slot] = c
            tools = [used for used in t.tools if used.after == c + 1]
            calls.append(self.call(call, heads[slot]) | {"tools": told_of_tools(tools)})
        cells = []
        for at, slot in enumerate(heads):
            place = self.places.get((i, slot))
            if place is None and slot not in own:
                continue  # the run never made this call
            c = own[slot] if place is None else place.call
            grouped = any((j, slot) in self.places for j in indices)
            cell = {"slot": at, "call": c, "why": nothing_learned(t, c, place, grouped, self.step)}
            if place is not None:
                cell |= {"advantage": place.advantage, "weight": place.weight}
            if slot not in own:
                call = t.calls[c]
                cell["padded"] = f"padded with its own {call.module}[{call.invocation}]"
            cells.append(cell)
        return {
            "name": f"run {t.rollout}",
            "status": t.status,
            "reward": t.reward,
            "error": t.error,
            "prediction": "" if t.prediction is None else shorten(t.prediction),
            "tools": told_of_tools([used for used in t.tools if used.after == 0]),
            "calls": calls,
            "cells": cells,
        }

    def call(self, call: Call, head: dict) -> dict:
        """A call: of its prompt what the others of its slot lack, its tokens and their log-probs."""
        completion = call.completion
        shared = len(self.openings[call.module]) + len(head["prompt"])
        told = {
            "prompt": self.prompt(call)[shared:],
            "prompt_tokens": len(completion.prompt_ids),
            "tokens": pieces(completion.token_ids, self.decode),
            "logprobs": [round(x, 4) for x in completion.logprobs],
            "finish": completion.finish_reason,
            "error": call.error,
        }
        if id(completion) in self.step.ratios:
            told["ratios"] = [round(x, 5) for x in self.step.ratios[id(completion)]]
        return told


# ---------------------------------------------------------------------------------------- the file
def page(data: dict) -> str:
    """The HTML file of a step's data: a title, figures, and what a `Description` gives.

    The data have one place in it, and the two texts around it are the same for every step."""
    block = json.dumps(plain(data), separators=(",", ":"), allow_nan=False)
    # in a script element nothing but `<` can begin anything
    before, after = TEMPLATE.split("DATA")
    return before + block.replace("<", "\\u003c") + after


def check_file(file: str) -> None:
    """Raises InputError where there is no such file to be written."""
    if Path(file).is_dir() or not Path(file).absolute().parent.is_dir():
        raise InputError(f"--html {file}: expected the name of a file, in a folder that is there")
    is_page = Path(file).is_file() and Path(file).read_bytes().startswith(b"<!")
    # a device, too, would be replaced
    if Path(file).exists() and not is_page:
        raise InputError(f"--html {file}: is there, and no page; another name leaves it as it is")


def scores(model, trajectories: list[Trajectory], config: Config, vocabulary: int) -> dict:
    """id(completion) -> log-probs of its sampled tokens under the model's weights, of all calls."""
    rows = []
    for t in trajectories:
        rows += [mmgrpo.Row(call.module, call.completion, 0.0, 0.0) for call in t.calls]
    found = {}
    for tree in mmgrpo.pack(rows, mmgrpo.tokens_per_batch(model, rows, config)):
        logprobs = mmgrpo.batch_logprobs(model, tree, config.temperature, vocabulary)
        lengths = [len(row.completion.token_ids) for row in tree.rows]
        for row, own in zip(tree.rows, logprobs.double().split(lengths)):
            found[id(row.completion)] = own
    return found


def compared(trajectories: list[Trajectory], config: Config, index: int, warm: bool) -> Step:
    """A step's groups, advantages and weights, as `mmgrpo.train_step` has them."""
    groups = mmgrpo.group_calls(
        trajectories,
        config.short_groups,
        config.group_size,
        config.level,
        (config.seed, index),
    )
    if warm:
        values = mmgrpo.readable(groups, trajectories)
    else:
        values = mmgrpo.advantages(
            groups,
            trajectories,
            config.baseline,
            config.leave_one_out,
            config.scale_rewards,
        )
    rows = mmgrpo.weigh(groups, values, trajectories, config.normalize, config.max_tokens)
    return Step(trajectories, groups, values, rows, config, warm)


def train_again(model, tokenizer, optimizer, reference, task: Task, config: Config, index: int):
    """Make step `index` (from 0) once more -> the Step with its ratios, and its line of metrics.

    Where it ends before the update, there are no ratios; the metrics then say why."""
    rollouts, before = [], {}

    def watch(trajectories: list[Trajectory]) -> None:
        rollouts.extend(trajectories)
        before.update(scores(model, trajectories, config, tokenizer.size))

    try:
        metrics = mmgrpo.train_step(
            model, tokenizer, optimizer, reference, task, config, index, watch
        )
    except (StoppedError, ProgramError, ParityError) as e:
        if not rollouts:
            raise
        metrics = {"failed": str(e)}
    step = compared(rollouts, config, index, "warm_start" in metrics)
    if "failed" not in metrics:
        for key, after in scores(model, rollouts, config, tokenizer.size).items():
            step.ratios[key] = torch.exp(after - before[key]).tolist()
    return step, metrics


def figures(step: Step, metrics: dict, digest: str) -> list[tuple[str, str]]:
    """What is told of the whole step, as names and texts; `digest` is that of the run's own tokens."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a mean over no runs is NaN
        measured = measure(step.trajectories, step.groups, step.advantages)
    config = step.config
    calls = {name.replace("_", " "): n for name, n in measured["calls"].items()}
    same = measured["digest"] == digest
    told = [
        ("runs", f"{len(step.trajectories)}: {counted(statuses(step.trajectories))}"),
        ("sampled again", "token for token as in the run" if same else "NOT as in the run"),
        ("reward", f"{measured['reward']:.3f}"),
        ("calls", counted(calls)),
        ("groups", f"level {config.level}, short groups {config.short_groups}"),
        ("advantages", f"baseline {config.baseline}, scaled by {config.scale_rewards}"),
        ("weights", f"normalized by {config.normalize}"),
    ]
    if step.warm_start:
        told.append(("warm start", "the advantage is 1 where a call could be read, else 0"))
    if "failed" in metrics:
        told.append(("no update", metrics["failed"]))
    else:
        told.append(("update", f"loss {metrics['loss']:.3g}, gradient {metrics['grad_norm']:.3g}"))
    if "idle" in metrics:
        told.append(("idle", metrics["idle"]))
    return told


def write_page(
    file: str,
    run: str,
    digest: str,
    model: mmgrpo.Transformer,
    tokenizer: mmgrpo.Tokenizer,
    optimizer: torch.optim.Optimizer,
    reference: mmgrpo.Transformer | None,
    task: Task,
    config: Config,
    index: int,
) -> str:
    """Make step `index` (from 0) of a run once more, write its page to a file, and say so.

    The model is as it was before that step. `digest` is that of the tokens of the run itself."""
    step, metrics = train_again(model, tokenizer, optimizer, reference, task, config, index)
    told = Description(
        step, lambda ids: tokenizer.tokenizer.decode(ids, skip_special_tokens=False)
    ).whole()
    batch = mmgrpo.batch_of(index, config.examples, len(task.train), config.seed)
    order = dict.fromkeys(t.example for t in step.trajectories)
    for example, drawn in zip(told["examples"], order):
        entries = task.train[batch[drawn]].items()
        example["about"] = [(name, shorten(value)) for name, value in entries]
    title = f"step {index + 1} of {run}"
    summary = figures(step, metrics, digest)
    write_whole(file, page({"title": title, "figures": summary} | told))
    return f"{file}: {title}, {len(step.trajectories)} runs, {summary[1][0]} {summary[1][1]}"


# ------------------------------------------------------------------------------- its style and script
STYLE = """
body { margin: 1em; font: 14px/1.4 system-ui, sans-serif; color: #222; background: #fff; }
h1 { font-size: 1.3em; margin: 0 0 .4em; }
h2 { font-size: 1.1em; margin: .8em 0 .3em; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0 1em; margin: 0 0 .6em; }
dt { color: #777; }
dd { margin: 0; }
button { font: inherit; margin: 0 .3em .3em 0; cursor: pointer; text-align: left; }
button.chosen { background: #234; color: #fff; }
#hits button { display: block; border: 0; background: #f2f2f2; width: 100%; }
table { border-collapse: collapse; table-layout: fixed; }
th, td { border: 1px solid #ccc; padding: .4em; vertical-align: top; text-align: left; }
th { font-weight: normal; background: #f6f6f6; }
thead th { position: sticky; top: 0; z-index: 2; }
tbody th { position: sticky; left: 0; z-index: 1; }
td { border-top: 4px solid #ccc; }
td.up { border-top-color: #2a8; }
td.down { border-top-color: #d55; }
td.nothing { background: #f7f7f7; }
td.absent { color: #aaa; }
td.found, th.found { outline: 3px solid #f90; outline-offset: -3px; }
b { font-weight: 600; }
.quiet { color: #777; }
.why { color: #95500c; }
.error { color: #b00020; }
pre { margin: .3em 0; font: 12px/1.45 ui-monospace, monospace; white-space: pre-wrap;
      overflow-wrap: anywhere; overflow-x: auto; unicode-bidi: isolate; }
pre.tokens { content-visibility: auto; }
summary { color: #357; cursor: pointer; }
.wide { max-width: 70em; }
"""

SCRIPT = r"""
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const at = (name) => document.getElementById(name);
const LISTED = 100;                         // places that a search lists at the most
const WIDTH = 24;                           // of a column, in em

// An element. Text reaches the page here and nowhere else, and as text alone.
function make(tag, kind, text, ...inside) {
  const element = document.createElement(tag);
  if (kind) element.className = kind;
  if (text) element.textContent = text;
  element.append(...inside);
  return element;
}

function folded(title, ...inside) {
  return make("details", "", "", make("summary", "", title), ...inside);
}

const block = (text, kind = "") => make("pre", kind, text);
const size = (text) => `${text.length.toLocaleString("en")} characters`;

function signed(x) {
  if (typeof x !== "number") return String(x);
  const digits = x !== 0 && Math.abs(x) < 0.00005 ? x.toExponential(1) : x.toFixed(4);
  return (x > 0 ? "+" : "") + digits;
}

// ---------------------------------------------------------------------- tokens and their shading
let widest = 0.01;                          // the largest |log ratio| of the step
for (const example of data.examples)
  for (const run of example.runs)
    for (const call of run.calls)
      for (const ratio of call.ratios || [])
        if (ratio > 0) widest = Math.max(widest, Math.abs(Math.log(ratio)));

function colour(call, i) {
  if (at("shading").value === "log-prob" && typeof call.logprobs[i] === "number")
    return `rgb(255 150 40 / ${Math.min(1, -call.logprobs[i] / 4)})`;
  if (at("shading").value === "ratio" && call.ratios && call.ratios[i] > 0) {
    const moved = Math.log(call.ratios[i]) / widest;
    return moved > 0 ? `rgb(30 160 110 / ${moved})` : `rgb(220 70 70 / ${-moved})`;
  }
  return "";
}

function shade(element) {
  const { call, from, to } = element.tokens;
  const spans = [];
  for (let i = from; i < to; i++) {
    const span = make("span", "", call.tokens[i]);
    span.style.backgroundColor = colour(call, i);
    span.title = `token ${i}: log-prob ${call.logprobs[i]}`
      + (call.ratios ? `, ratio ${call.ratios[i]}` : "");
    spans.push(span);
  }
  element.replaceChildren(...spans);
  element.shaded = true;
}

// A step of many runs has more tokens than a browser lays out in a second. A completion is laid out
// where it is in view, and an element for each of its tokens is made then; before, it is text.
const inView = new IntersectionObserver((changes) => {
  for (const change of changes)
    if (change.isIntersecting && !change.target.shaded) shade(change.target);
}, { rootMargin: "200px" });

function tokensOf(call, from, to) {
  const element = block(call.tokens.slice(from, to).join(""), "tokens");
  const lines = element.textContent.split("\n").length;
  element.style.containIntrinsicSize = `auto ${WIDTH - 2}em auto ${1.45 * lines}em`;
  element.tokens = { call, from, to };
  inView.observe(element);
  return element;
}

// ------------------------------------------------------------------------------------- a table
function headOfRun(run) {
  const reward = typeof run.reward === "number" ? run.reward.toFixed(3) : run.reward ?? "none";
  const head = make("th", "", "", make("b", "", run.name), ` reward ${reward}, ${run.status}`);
  if (run.error) head.append(block(run.error, "error"));
  if (run.prediction) head.append(folded("prediction", block(run.prediction)));
  for (const tool of run.tools) head.append(folded("tool before any call", block(tool)));
  return head;
}

function headOfSlot(slot) {
  const head = make("th", "", "", make("b", "", slot.name));
  if (slot.group) head.append(make("div", "quiet", slot.group));
  const opening = data.openings[slot.module];
  if (opening)
    head.append(folded(`all prompts of ${slot.module} begin: ${size(opening)}`, block(opening)));
  if (slot.prompt)
    head.append(folded(`then the prompts of this row: ${size(slot.prompt)}`, block(slot.prompt)));
  if (slot.completion)
    head.append(make("div", "quiet", "the completions of this row begin:"), block(slot.completion));
  return head;
}

function cellOf(slot, run, cell) {
  if (!cell) return make("td", "absent", "not reached");
  const call = run.calls[cell.call];
  const sign = cell.why ? "nothing" : cell.advantage > 0 ? "up" : "down";
  const element = make("td", sign);
  if ("advantage" in cell)
    element.append(make("div", "", "", "advantage ", make("b", "", signed(cell.advantage)),
      `, weight ${Number(cell.weight).toPrecision(3)} a token`));
  if (cell.why) element.append(make("div", "why", cell.why));
  if (cell.padded) {
    element.append(make("div", "quiet", cell.padded));
    return element;
  }
  element.append(make("div", "quiet", `call ${cell.call + 1} of the run: ${call.prompt_tokens} prompt`
    + ` + ${call.tokens.length} sampled tokens, ${call.finish}`));
  if (call.prompt)
    element.append(folded(`its prompt goes on: ${size(call.prompt)}`, block(call.prompt)));
  if (slot.folded)
    element.append(folded(`${slot.folded} tokens as above`, tokensOf(call, 0, slot.folded)));
  if (slot.folded < call.tokens.length)
    element.append(tokensOf(call, slot.folded, call.tokens.length));
  if (call.error) element.append(block(`not readable: ${call.error}`, "error"));
  for (const tool of call.tools) element.append(folded("tool after it", block(tool)));
  return element;
}

let chosen = 0;                             // which example is on the page
const drawn = new Map();                    // what of it a search can lead to: place -> element

function draw() {
  const example = data.examples[chosen];
  inView.disconnect();
  drawn.clear();
  at("example").replaceChildren(make("h2", "", `${example.name}: ${example.told}`));
  const about = make("dl", "wide");
  for (const [name, value] of example.about || [])
    about.append(make("dt", "", name), make("dd", "", value));
  const first = make("tr", "", "", make("th"));
  example.runs.forEach((run, r) => {
    const head = headOfRun(run);
    drawn.set(`run ${r}`, head);
    first.append(head);
  });
  const body = make("tbody");
  example.slots.forEach((slot, s) => {
    const head = headOfSlot(slot);
    drawn.set(`slot ${s}`, head);
    const row = make("tr", "", "", head);
    example.runs.forEach((run, r) => {
      const cell = run.cells.find((cell) => cell.slot === s);
      const element = cellOf(slot, run, cell);
      if (cell && !cell.padded) drawn.set(`call ${r} ${cell.call}`, element);
      row.append(element);
    });
    body.append(row);
  });
  const table = make("table", "", "", make("thead", "", "", first), body);
  table.style.width = `${WIDTH * (example.runs.length + 1)}em`;
  at("example").append(about, table);
  [...at("examples").children].forEach((button, i) => {
    button.className = i === chosen ? "chosen" : "";
  });
  mark();
}

// ------------------------------------------------------------------------------------- a search
let texts = null;                           // all that can be searched: { example, place, where, text }

function collect() {
  texts = [];
  data.examples.forEach((example, e) => {
    const add = (place, where, text) => {
      if (text) texts.push({ example: e, place, where: `${example.name}, ${where}`, text });
    };
    for (const [name, value] of example.about || []) add("", name, value);
    const said = new Set();
    example.slots.forEach((slot, s) => {
      if (!said.has(slot.module)) add(`slot ${s}`, slot.name, data.openings[slot.module]);
      said.add(slot.module);
      add(`slot ${s}`, `${slot.name}, prompts`, slot.prompt);
    });
    example.runs.forEach((run, r) => {
      add(`run ${r}`, `${run.name}, end`, run.error);
      add(`run ${r}`, `${run.name}, prediction`, run.prediction);
      for (const tool of run.tools) add(`run ${r}`, `${run.name}, tool`, tool);
      run.calls.forEach((call, c) => {
        const where = `${run.name}, call ${c + 1}`;
        add(`call ${r} ${c}`, `${where}, prompt`, call.prompt);
        add(`call ${r} ${c}`, where, call.tokens.join(""));
        add(`call ${r} ${c}`, `${where}, error`, call.error);
        for (const tool of call.tools) add(`call ${r} ${c}`, `${where}, tool`, tool);
      });
    });
  });
  for (const entry of texts) entry.lower = entry.text.toLowerCase();
}

let hits = [];

function search() {
  const wanted = at("find").value.toLowerCase();
  if (!texts) collect();
  hits = wanted ? texts.filter((entry) => entry.lower.includes(wanted)) : [];
  at("count").textContent = !wanted ? "" : `${hits.length.toLocaleString("en")} texts`
    + (hits.length > LISTED ? `, the first ${LISTED} of them:` : "");
  at("hits").replaceChildren(...hits.slice(0, LISTED).map((hit) => {
    const begin = Math.max(0, hit.lower.indexOf(wanted) - 40);
    const around = hit.text.slice(begin, begin + 120 + wanted.length).replace(/\s+/g, " ");
    const button = make("button", "", `${hit.where}: … ${around}`);
    button.onclick = () => {
      choose(hit.example);
      drawn.get(hit.place)?.scrollIntoView({ block: "center", inline: "center" });
    };
    return button;
  }));
  mark();
}

function mark() {
  for (const element of drawn.values()) element.classList.remove("found");
  for (const hit of hits)
    if (hit.example === chosen) drawn.get(hit.place)?.classList.add("found");
}

function choose(example) {
  chosen = example;
  draw();
  remember();
}

// the example and the search stand in the address, so that a link leads to them
function remember() {
  const state = { example: chosen, find: at("find").value, shading: at("shading").value };
  location.replace("#" + new URLSearchParams(state));
}

// ------------------------------------------------------------------------------------- the start
document.title = data.title;
at("title").textContent = data.title;
for (const [name, text] of data.figures) at("figures").append(make("dt", "", name), make("dd", "", text));
data.examples.forEach((example, i) => {
  const button = make("button", "", `${example.name}: ${example.told}`);
  button.onclick = () => choose(i);
  at("examples").append(button);
});
const asked = new URLSearchParams(location.hash.slice(1));
at("find").value = asked.get("find") || "";
if (asked.has("shading")) at("shading").value = asked.get("shading");
if (data.examples[asked.get("example")]) chosen = Number(asked.get("example"));
at("widest").textContent = widest.toPrecision(2);
at("find").oninput = () => { search(); remember(); };
at("shading").onchange = () => {
  for (const element of document.querySelectorAll("pre.tokens")) if (element.shaded) shade(element);
  remember();
};
draw();
if (at("find").value) search();
"""


def hash_of(text: str) -> str:
    """The name under which a security policy lets a style or a script be used."""
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


# The policy lets this style and this script work, and nothing be loaded: should a text become markup
# after all, it could still do nothing.
TEMPLATE = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src {hash_of(STYLE)}; script-src {hash_of(SCRIPT)}">
<title>a step</title>
<style>{STYLE}</style>
</head>
<body>
<h1 id="title"></h1>
<dl id="figures"></dl>
<p>
<label>search <input id="find" type="search" size="40"></label> <span id="count"></span>
<label>shade tokens by <select id="shading">
<option>log-prob</option><option>ratio</option><option>nothing</option>
</select></label>
</p>
<p class="quiet wide">Log-prob: the stronger, the less likely the token was when it was sampled. Ratio: its
probability after the step's update over that before, green where it rose, red where it fell, in full
colour at a logarithm of <span id="widest"></span>. A token's numbers show under the pointer.</p>
<div id="hits"></div>
<nav id="examples"></nav>
<main id="example"></main>
<script type="application/json" id="data">DATA</script>
<script>{SCRIPT}</script>
</body>
</html>
"""
