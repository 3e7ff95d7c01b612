"""The prompts of a program, as files: every module's instruction and demos."""
from __future__ import annotations

import json
from pathlib import Path

from program import InputError, Program


def save_prompts(program: Program, path: str | Path) -> None:
    """Write every module's instruction and demos as JSON."""
    prompts = {name: {"instruction": m.instruction, "demos": m.demos} for name, m in program.modules().items()}
    Path(path).write_text(json.dumps(prompts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load_prompts(program: Program, path: str | Path) -> None:
    """Read what `save_prompts` wrote. Raises InputError naming file and module, before anything is changed."""
    modules = program.modules()
    try:
        prompts = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise InputError(f"{path}: cannot be read as JSON ({e})") from None
    if not isinstance(prompts, dict) or prompts.keys() != modules.keys():
        raise InputError(f"{path}: expected an object with the modules {', '.join(modules)}")
    for name, p in prompts.items():
        if not (isinstance(p, dict) and isinstance(p.get("instruction"), str) and isinstance(p.get("demos"), list)
                and all(isinstance(d, dict) for d in p["demos"])):
            raise InputError(f"{path}: {name}: expected an instruction (text) and demos (a list of objects)")
    for name, p in prompts.items():
        modules[name].instruction, modules[name].demos = p["instruction"], p["demos"]
