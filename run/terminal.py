"""What is printed: a run of a program as a readable trace, a step or a trial in a line."""
from __future__ import annotations

import inspect
import json
import re
import sys
import textwrap
from collections import Counter
from typing import Callable

from program import STATUSES, Program, Trajectory


def statuses(trajectories: list[Trajectory]) -> dict[str, int]:
    """How many runs ended in each way."""
    counts = Counter(t.status for t in trajectories)
    return {s: counts[s] for s in STATUSES}


def counted(counts: dict[str, int]) -> str:
    """Example: counted({"completed": 30, "length": 2, "max_calls": 0}) is "30 completed, 2 length"."""
    return ", ".join(f"{n:,} {name}" for name, n in counts.items() if n)


def shorten(value, longest: int = 0) -> str:
    """A value in one line: text as it is, else as JSON, or as Python writes it where JSON cannot; cut to
    `longest` characters (0: whole)."""
    try:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    except (TypeError, ValueError, RecursionError):         # keys that are no text, or a list in itself
        text = repr(value)
    text = " ".join(text.split())
    return text[:longest] + "…" if 0 < longest < len(text) else text


def printable(text: str) -> str:
    """With control characters written out: what an LM or a tool says never steers a terminal.
    Example: printable("\x1b[2J") is "\\x1b[2J"."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: f"\\x{ord(found[0]):02x}", text)


def kind_of(failure: str) -> str:
    """What is the same in failures that differ in numbers and quoted texts alone.
    Example: kind_of("search: KeyError: 'Rome'") is "search: KeyError: …"."""
    return re.sub(r"'[^']*'|\"[^\"]*\"|\d+(\.\d+)?", "…", shorten(failure, 1000))[:200]


def expected_of(program: Program, example: dict) -> dict:
    """What an example holds beside the inputs of `forward`: what the metric compares a run with."""
    inputs = inspect.signature(program.forward).parameters
    return {name: value for name, value in example.items() if name not in inputs}


def show(trajectory: Trajectory, width: int = 100, expected: dict | None = None,
         decode: Callable[[list[int]], str] | None = None, longest: int = 0) -> str:
    """A readable trace of one run: LM calls and tools in the order they were asked for, then its end.

    Of each its inputs (<) and outputs (>); then the prediction (=) and what was `expected`. Prompts are
    shown where `decode` turns their ids into text. Values are cut to `longest` characters (0: none are).
    """
    lines = []
    def entry(mark: str, text: str):
        first, further = f"    {mark} ", " " * 8
        lines.extend(textwrap.wrap(text, width, initial_indent=first, subsequent_indent=further))
    def entries(mark: str, values: dict):
        for name, value in values.items():
            entry(mark, f"{name}: {shorten(value, longest)}")
    def tools(after: int):
        for t in trajectory.tools:
            if t.after == after:
                lines.append(f"   tool {t.name}")
                entry("<", ", ".join(shorten(x, longest) for x in t.arguments))
                entry(">", f"failed: {t.error}" if t.error else shorten(t.result, longest))
    for i, call in enumerate(trajectory.calls, 1):
        tools(after=i - 1)
        c = call.completion
        lines.append(f"{i}. {call.module} [{call.invocation}]   {len(c.prompt_ids)} prompt + {len(c.token_ids)} sampled "
                     f"tokens, {c.finish_reason}")
        if decode:
            lines.extend(f"    | {line}" for line in decode(c.prompt_ids).splitlines())
        entries("<", call.inputs)
        if call.outputs is not None:
            entries(">", call.outputs)
        else:
            entry(">", f"not readable: {call.error}; sampled: {shorten(c.text, longest)!r}")
    tools(after=len(trajectory.calls))
    entries("=", trajectory.prediction if isinstance(trajectory.prediction, dict) else {})
    entries("expected", expected or {})
    reward = "no reward" if trajectory.reward is None else f"reward {trajectory.reward:.3f}"
    ending = f"{trajectory.status}, {reward}" + f" ({trajectory.error})" * bool(trajectory.error)
    return printable("\n".join([*lines, ending]))


def step_line(metrics: dict) -> str:
    """A step in a line, for where there is no terminal to draw a bar on."""
    seconds = metrics["seconds"]
    parts = [f"step {metrics['step']:4d}", f"reward {metrics['reward']:.3f}", counted(metrics["statuses"]),
             f"entropy {metrics['surprise']:.3f}",
             f"sampling {seconds['sampling'] + seconds['tools']:.1f} s, update {seconds['update']:.1f} s",
             f"{metrics['tokens_forwarded']:,} tokens forwarded of {metrics['tokens_unshared']:,}"]
    if "skipped" in metrics:
        parts.append("skipped, for the gradient is not finite")
    return "  ".join(parts)


def trial_line(trial: dict, best: float) -> str:
    """A trial of a prompt search in a line."""
    examples = f"{trial['examples']} examples" + ", all of dev" * trial["full"]
    return "  ".join((f"trial {trial['trial']:3d}", f"score {trial['score']:.3f} ({examples})",
                      f"best {best:.3f}", counted(trial["statuses"]), f"{trial['seconds']:.1f} s"))


def lenient_output() -> None:
    """What the terminal's encoding lacks is printed as ?, for no run shall end for want of a character.
    A file gets the output line by line, in order with what goes to stderr."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace", line_buffering=True)
