"""The lines of a run as they come: to metrics.jsonl, and with --log to a library that draws them."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any, Callable

from program import InputError

# of --log: what is imported
LIBRARIES = {
    "tensorboard": "torch.utils.tensorboard",
    "trackio": "trackio",
    "wandb": "wandb",
}


class Journal:
    """metrics.jsonl of a run's folder, open for more lines.

    `log` names a library that gets their numbers too. Raises InputError where it is not installed.
    """

    def __init__(self, out: Path, append: bool, log: str = "none", options: dict | None = None):
        self.draw, self.end = drawing(log, out, options or {})
        self.file = (out / "metrics.jsonl").open("a" if append else "w")

    def write(self, line: dict) -> None:
        print(json.dumps(line), file=self.file, flush=True)
        self.draw(line["step"], numbers_of(line))

    def close(self) -> None:
        self.file.close()
        self.end()


def numbers_of(line: dict, prefix: str = "") -> dict[str, float]:
    """The numbers of a line under the paths of their names; texts, lists and None are left out.

    Example: numbers_of({"loss": 0.5, "modules": {"ask": {"calls": 3}}}) is
    {"loss": 0.5, "modules/ask/calls": 3}.
    """
    found: dict[str, float] = {}
    for name, value in line.items():
        if isinstance(value, dict):
            found |= numbers_of(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)):
            found[prefix + name] = value
    return found


def drawing(
    log: str, out: Path, options: dict
) -> tuple[Callable[[int, dict[str, float]], None], Callable[[], Any]]:
    """What draws the numbers of a step, and what ends the drawing."""
    if log == "none":
        return (lambda step, numbers: None), (lambda: None)
    try:
        library = importlib.import_module(LIBRARIES[log])
    except ImportError as e:
        raise InputError(f"--log {log}: cannot be imported ({e}); pip install {log}") from None

    if log == "tensorboard":
        writer = library.SummaryWriter(str(out))

        def add(step: int, numbers: dict[str, float]) -> None:
            for name, value in numbers.items():
                writer.add_scalar(name, value, step)

        return add, writer.close

    library.init(project="mmgrpo", name=out.name, config=options)
    return (lambda step, numbers: library.log(numbers, step=step)), library.finish
