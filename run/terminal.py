"""What is printed: a run of a program as a readable trace, a step or a trial in a line."""

from __future__ import annotations

import inspect
import json
import re
import sys
import textwrap
from collections import Counter
from typing import Callable

from program import STATUSES, Call, Program, ToolCall, Trajectory


# -------------------------------------------------------------------- values and failures in a line
def statuses(trajectories: list[Trajectory]) -> dict[str, int]:
    """How many runs ended in each way."""
    counts = Counter(t.status for t in trajectories)
    return {s: counts[s] for s in STATUSES}


def counted(counts: dict[str, int]) -> str:
    """The counts that are not 0, in a line.

    Example: counted({"completed": 30, "length": 2, "max_calls": 0}) is "30 completed, 2 length".
    """
    return ", ".join(f"{n:,} {name}" for name, n in counts.items() if n)


def shorten(value, longest: int = 0) -> str:
    """A value in one line, cut to `longest` characters (0: whole).

    Text stays as it is; else it is written as JSON, or as Python writes it where JSON cannot.
    """
    if isinstance(value, str):
        text = value
    else:
        try:
            text = json.dumps(value, ensure_ascii=False, default=str)
        # keys that are no text, a list in itself, or a number of more digits than Python writes
        except (TypeError, ValueError, RecursionError):
            try:
                text = repr(value)
            except Exception as e:
                text = f"a {type(value).__name__} that cannot be written ({type(e).__name__})"
    text = " ".join(text.split())
    return text[:longest] + "…" if 0 < longest < len(text) else text


def printable(text: str) -> str:
    """With control characters written out: what an LM or a tool says never steers a terminal.

    Example: printable("\\x1b[2J") is "\\\\x1b[2J".
    """
    control = r"[\x00-\x08\x0b-\x1f\x7f-\x9f]"
    return re.sub(control, lambda found: f"\\x{ord(found[0]):02x}", text)


def kind_of(failure: str) -> str:
    """What is the same in failures that differ in numbers and quoted texts alone.

    Example: kind_of("search: KeyError: 'Rome'") is "search: KeyError: …".
    """
    quoted_or_number = r"'[^']*'|\"[^\"]*\"|\d+(\.\d+)?"
    return re.sub(quoted_or_number, "…", shorten(failure, 1000))[:200]


# -------------------------------------------------------------------------------------------- a run
def expected_of(program: Program, example: dict) -> dict:
    """What the metric compares a run with: of the example all but the inputs of `forward`."""
    inputs = inspect.signature(program.forward).parameters
    return {name: value for name, value in example.items() if name not in inputs}


def show(
    trajectory: Trajectory,
    width: int = 100,
    expected: dict | None = None,
    decode: Callable[[list[int]], str] | None = None,
    longest: int = 0,
) -> str:
    """A readable trace of one run: LM calls and tools in the order they were asked for, its end.

    Of each its inputs (<) and outputs (>); then the prediction (=) and what was `expected`. Prompts
    are shown where `decode` turns their ids into text. Lines are broken at `width`, values are cut
    to `longest` characters (0: none are).
    """

    def entry(mark: str, text: str) -> list[str]:
        first = f"    {mark} "
        return textwrap.wrap(text, width, initial_indent=first, subsequent_indent=" " * 8)

    def entries(mark: str, values: dict) -> list[str]:
        lines = []
        for name, value in values.items():
            lines += entry(mark, f"{name}: {shorten(value, longest)}")
        return lines

    def of_tool(tool: ToolCall) -> list[str]:
        arguments = ", ".join(shorten(x, longest) for x in tool.arguments)
        result = f"failed: {tool.error}" if tool.error else shorten(tool.result, longest)
        return [f"   tool {tool.name}", *entry("<", arguments), *entry(">", result)]

    def of_call(number: int, call: Call) -> list[str]:
        c = call.completion
        lines = [
            f"{number}. {call.module} [{call.invocation}]   {len(c.prompt_ids)} prompt + "
            f"{len(c.token_ids)} sampled tokens, {c.finish_reason}"
        ]
        if decode:
            lines += [f"    | {line}" for line in decode(c.prompt_ids).splitlines()]
        lines += entries("<", call.inputs)
        if call.outputs is not None:
            return lines + entries(">", call.outputs)
        sampled = shorten(c.text, longest)
        return lines + entry(">", f"not readable: {call.error}; sampled: {sampled!r}")

    lines = []
    for number in range(len(trajectory.calls) + 1):
        if number > 0:
            lines += of_call(number, trajectory.calls[number - 1])
        for tool in trajectory.tools:
            if tool.after == number:
                lines += of_tool(tool)
    if isinstance(trajectory.prediction, dict):
        lines += entries("=", trajectory.prediction)
    lines += entries("expected", expected or {})

    reward = "no reward" if trajectory.reward is None else f"reward {trajectory.reward:.3f}"
    error = f" ({trajectory.error})" if trajectory.error else ""
    lines.append(f"{trajectory.status}, {reward}{error}")
    return printable("\n".join(lines))


# ---------------------------------------------------------------------------------- a step, a trial
def step_line(metrics: dict) -> str:
    """A step in a line, for where there is no terminal to draw a bar on."""
    seconds = metrics["seconds"]
    sampling = seconds["sampling"] + seconds["tools"]
    parts = [
        f"step {metrics['step']:4d}",
        f"reward {metrics['reward']:.3f}",
        counted(metrics["statuses"]),
        f"entropy {metrics['surprise']:.3f}",
        f"sampling {sampling:.1f} s, update {seconds['update']:.1f} s",
        f"{metrics['tokens_forwarded']:,} tokens forwarded of {metrics['tokens_unshared']:,}",
    ]
    if "skipped" in metrics:
        parts.append("skipped, for the gradient is not finite")
    return "  ".join(parts)


def trial_line(trial: dict, best: float) -> str:
    """A trial of a prompt search in a line."""
    examples = f"{trial['examples']} examples" + (", all of dev" if trial["full"] else "")
    parts = [
        f"trial {trial['trial']:3d}",
        f"score {trial['score']:.3f} ({examples})",
        f"best {best:.3f}",
        counted(trial["statuses"]),
        f"{trial['seconds']:.1f} s",
    ]
    return "  ".join(parts)


def lenient_output() -> None:
    """Print as ? what the terminal's encoding lacks: no run shall end for want of a character.

    A file gets the output line by line, in order with what goes to stderr.
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace", line_buffering=True)
