"""What the options name, brought into the process: the task, the model, a split."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Callable

import huggingface_hub
import torch

from lm.lora import load_adapter
from lm.tokenizer import Tokenizer
from model import Transformer, load_pretrained
from program import InputError, Task
from prompts.files import load_prompts
from prompts.start import without_shown
from run.config import Config

ROOT = Path(__file__).resolve().parent.parent


# ----------------------------------------------------------------------------------------- the task
def load_task(options: dict) -> tuple[Task, Config]:
    """The task that the options name, and every option.

    The task is a file of tasks/, or any Python file with a function load(data). An option is what
    was given, else the task's own default, else Config's. Raises InputError naming the option.
    """
    config = Config(**options)
    in_tasks = ROOT / "tasks" / f"{config.task}.py"
    path = Path(config.task) if config.task.endswith(".py") else in_tasks
    if not path.is_file():
        raise InputError(
            f"--task {config.task}: no such task ({path}; hover, banking77 and papillon are in "
            "tasks/)"
        )
    module = run_file(path)
    task = module.load(config.data) if callable(getattr(module, "load", None)) else None
    if not isinstance(task, Task):
        raise InputError(
            f"--task {config.task}: {path} has no function load(data) that returns a Task"
        )

    types = {field.name: field.type for field in dataclasses.fields(Config)}
    for name, value in task.defaults.items():
        if types.get(name) != type(value).__name__:
            raise InputError(
                f"--task {config.task}: its default for {name!r}: expected "
                f"{types.get(name, 'a field of Config')}, found {value!r}"
            )
    config = Config(**(task.defaults | options))
    if config.prompts:
        load_prompts(task.program, config.prompts)
    return task, config


def run_file(path: Path) -> ModuleType:
    """A Python file, run as a module of its own."""
    spec = importlib.util.spec_from_file_location(f"task_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    # dataclasses and pickles look their module up by name
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def split_of(task: Task, split: str, config: Config) -> list[dict]:
    """The examples of a split, without those that are demonstrations in the prompts.

    Raises InputError where the split is empty.
    """
    if not getattr(task, split):
        raise InputError(f"--task {config.task}: its {split} split is empty")
    return getattr(without_shown(task), split)


# ---------------------------------------------------------------------------------------- the model
def load_model(config: Config) -> tuple[Transformer, Tokenizer]:
    """The model and tokenizer of --model, on --device, in --dtype. Raises InputError."""
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:
        raise InputError(f"--device {device}: {e}") from None
    path = fetch(config.model)
    dtype = None if config.dtype == "auto" else getattr(torch, config.dtype)
    if (path / "adapter_config.json").is_file():
        model, tokenizer = load_adapter(path, device, dtype, fetch)
    else:
        model, tokenizer = load_pretrained(path, device, dtype)
    model.checkpointing = config.checkpointing
    return model, tokenizer


def fetch(name: str) -> Path:
    """The folder of a checkpoint, or FILE.gguf.

    It is one that is there, or a download of that name from the Hugging Face hub, which is kept.
    Raises InputError where there is neither.
    """
    for path in (Path(name), ROOT / name):
        if path.is_dir():
            return checkpoint_in(path, name)
        if path.is_file() and path.suffix == ".gguf":
            return path
    # what cannot be a name on the hub is read, and refused, as a file or folder
    if name.endswith(".gguf") or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return Path(name)
    files = ["*.json", "*.safetensors", "*.jinja"]
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=files))
    # no network, no such name, no permission: they are of many classes
    except Exception as e:
        first_line = str(e).split("\n")[0]
        raise InputError(
            f"--model {name}: is no folder here, and the hub gave none "
            f"({type(e).__name__}: {first_line}); "
            "offline, give a folder with config.json, tokenizer.json and *.safetensors"
        ) from None


def checkpoint_in(folder: Path, name: str) -> Path:
    """The folder. Raises InputError where it is that of a run, naming the checkpoint in it."""
    best = [p for p in (folder / "best", *sorted(folder.glob("*-w/best"))) if p.is_dir()]
    if best and not [*folder.glob("*.safetensors")]:
        raise InputError(f"--model {name}: is the folder of a run; its checkpoint is {best[-1]}")
    return folder


def decoder(tokenizer: Tokenizer, config: Config) -> Callable[[list[int]], str] | None:
    """What turns prompt ids into the text that the LM was given; None without --show-prompts."""
    if not config.show_prompts:
        return None
    return lambda ids: tokenizer.tokenizer.decode(ids, skip_special_tokens=False)
