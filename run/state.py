"""A training run on disk: one that was killed goes on to the same weights, bit for bit.

A state has the fp32 weights that are trained (of a LoRA, the adapter), AdamW's moments, the step,
the dev scores so far and the options. With metrics.jsonl, whose lines decide on a warm start and on
patience, and the LM and the task that the options name, that is everything that the next step
depends on. Randomness and data order need nothing saved: they are functions of the seed and the
step. A state is written to a temporary folder, flushed to the disk and renamed, so that a folder
with its name is whole; the last two are kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from program import InputError

# options that may differ when a run goes on
FREE = (
    "out",
    "resume",
    "steps",
    "trials",
    "split",
    "index",
    "patience",
    "show_every",
    "show_prompts",
    "html",
    "log",
)

KEPT_STATES = 2


# ---------------------------------------------------------------------------------- which there are
def states(out: Path) -> list[Path]:
    """The saved states of a run, oldest first."""
    return sorted(p for p in out.glob("state-*") if p.name[6:].isdecimal())


def step_of(state: Path) -> int:
    """How many steps had been done when a state was saved: state-0000012 is that of step 12."""
    return int(state.name[6:])


def same_options(out: Path, begun: dict, options: dict, free: tuple[str, ...] = FREE) -> None:
    """Raises InputError naming the option where a run is not to go on as it was begun.

    Those that are `free` may differ.
    """
    for key, value in begun.items():
        if key not in free and options.get(key) != value:
            raise InputError(
                f"{out}: was begun with --{key.replace('_', '-')} {value}, not {options.get(key)}; "
                "give the same options, or another --out"
            )


# ------------------------------------------------------------------------------------------- saving
def save_state(
    out: Path, step: int, optimizer: torch.optim.Optimizer, scores: list[float], options: dict
) -> None:
    """Write OUT/state-STEP and remove all but the last two.

    Raises OSError or SafetensorError (a full disk) with the older ones untouched.
    """
    tensors = {name: t.cpu().contiguous() for name, t in tensors_of(optimizer).items()}
    folder = out / f"state-{step:07d}"
    temporary = out / ".state"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    safetensors.torch.save_file(tensors, temporary / "state.safetensors")
    metrics = out / "metrics.jsonl"
    state = {
        "step": step,
        "scores": scores,
        "metrics_bytes": metrics.stat().st_size,
        "digest": _digest(temporary / "state.safetensors"),
        "config": options,
    }
    (temporary / "state.json").write_text(json.dumps(state, indent=1))

    # whole on the disk first, then under its name
    for path in (temporary / "state.safetensors", temporary / "state.json", metrics, temporary):
        _flush(path)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)
    _flush(out)
    for old in states(out)[:-KEPT_STATES]:
        shutil.rmtree(old)


def tensors_of(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The fp32 weights and what the optimizer keeps of each: "0.weight", "0.exp_avg", …"""
    masters = optimizer.param_groups[0]["params"]
    tensors = {f"{i}.weight": p.detach() for i, p in enumerate(masters)}
    for i, p in enumerate(masters):
        for key, value in optimizer.state.get(p, {}).items():
            tensors[f"{i}.{key}"] = value
    return tensors


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk itself."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ----------------------------------------------------------------------------------------- going on
def load_state(
    out: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, options: dict
) -> tuple[int, list[float]]:
    """Go back to the newest state of the run that can be read.

    metrics.jsonl is cut back to that step. Returns (step, dev scores), (0, []) where there is no
    state. Raises InputError where the run was begun with other options.
    """
    metrics = out / "metrics.jsonl"
    for folder in reversed(states(out)):
        try:
            state = read_state(folder, model, optimizer)
        except ValueError as e:
            print(f"{folder}: cannot be used ({e}); trying the one before", file=sys.stderr)
            continue
        same_options(out, state["config"], options)
        size = state["metrics_bytes"]
        if metrics.stat().st_size < size:
            raise InputError(f"{metrics}: is shorter than when {folder.name} was saved")
        # nothing is cut where the cut would part a line
        if not metrics.read_bytes()[:size].endswith(b"\n"):
            raise InputError(f"{metrics}: is not as it was when {folder.name} was saved")
        os.truncate(metrics, size)
        print(f"{out}: going on from step {state['step']}", file=sys.stderr)
        return state["step"], state["scores"]
    if states(out):
        raise InputError(f"{out}: none of its states can be used")
    return 0, []


def read_state(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """Put a state into the model and its optimizer; return its step, scores and options.

    Raises ValueError, and changes nothing, where the files are not as they were written or are of
    another model.
    """
    masters = optimizer.param_groups[0]["params"]
    state, tensors = read_files(folder, masters)
    optimizer.state.clear()
    with torch.no_grad():
        for name, value in tensors.items():
            i, key = name.split(".")
            p = masters[int(i)]
            if key == "weight":
                p.copy_(value)
            else:
                # AdamW counts its steps on the CPU
                optimizer.state[p][key] = value if key == "step" else value.to(p.device)
        trained = [p for p in model.parameters() if p.requires_grad]
        torch._foreach_copy_(trained, masters)
    return state


def read_files(folder: Path, masters: list[Tensor]) -> tuple[dict, dict[str, Tensor]]:
    """state.json and state.safetensors of a state, checked. Raises ValueError."""
    try:
        state = json.loads((folder / "state.json").read_text())
        path = folder / "state.safetensors"
        if state["digest"] != _digest(path):
            raise ValueError(f"{path.name} is not as it was written")
        if not (
            state["step"] == step_of(folder)
            and type(state["metrics_bytes"]) is int
            and isinstance(state["config"], dict)
            and isinstance(state["scores"], list)
            and all(type(score) is float for score in state["scores"])
        ):
            raise ValueError("state.json is not as it was written")
        tensors = safetensors.torch.load_file(path)
    except (OSError, LookupError, TypeError, RecursionError, safetensors.SafetensorError) as e:
        raise ValueError(f"{type(e).__name__}: {e}") from None

    # what is left with a dot is the optimizer's, as "0.exp_avg"
    found = {}
    for name, t in tensors.items():
        index = name.removesuffix(".weight")
        if "." not in index:
            found[index] = tuple(t.shape)
    if found != {str(i): tuple(p.shape) for i, p in enumerate(masters)}:
        raise ValueError("it is the state of another model")
    return state, tensors
