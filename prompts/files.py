"""The prompts of a program as files: instructions, demos, descriptions of fields; DSPy's too."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import hashlib
import inspect
import json
import os
import re
from pathlib import Path
from typing import Any

from program import ChainOfThought, Field, InputError, Module, Program
from run.config import Config


# ------------------------------------------------------------------------------ files, whole or not
def write_whole(path: str | Path, text: str) -> None:
    """All of it, or nothing: what was there before stays until then."""
    temporary = Path(f"{path}.new")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_json(path: str | Path, value: Any) -> None:
    """As `write_whole` does."""
    write_whole(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


# ------------------------------------------------------------------- the prompts that a program has
def _fields(module: Module) -> tuple[Field, ...]:
    return module.signature.inputs + module.signature.outputs


def prompts_of(program: Program) -> dict[str, dict]:
    """Module -> its instruction, its demos, and the descriptions that its fields have."""
    prompts = {}
    for name, m in program.modules().items():
        prompts[name] = {
            "instruction": m.instruction,
            "demos": m.demos,
            "descriptions": {f.name: f.description for f in _fields(m) if f.description},
        }
    return prompts


def _described(fields: tuple[Field, ...], descriptions: dict[str, str]) -> tuple[Field, ...]:
    return tuple(dataclasses.replace(f, description=descriptions.get(f.name, "")) for f in fields)


def set_prompts(program: Program, prompts: dict[str, dict]) -> None:
    """What `prompts_of` gives, put into the program."""
    for name, module in program.modules().items():
        entry = prompts[name]
        module.instruction = entry["instruction"]
        module.demos = entry["demos"]
        # a copy: modules may share a signature
        signature = copy.copy(module.signature)
        signature.inputs = _described(signature.inputs, entry["descriptions"])
        signature.outputs = _described(signature.outputs, entry["descriptions"])
        module.signature = signature


def _lines(entry: dict) -> list[str]:
    demos = [f"demo: {json.dumps(demo, ensure_ascii=False)}" for demo in entry["demos"]]
    return entry["instruction"].splitlines() + demos


def difference(before: dict[str, dict], after: dict[str, dict]) -> str:
    """What changed in the prompts, as a unified diff of their texts."""
    changed: list[str] = []
    for name in before:
        old = _lines(before[name])
        new = _lines(after[name])
        changed += difflib.unified_diff(old, new, name, name, lineterm="", n=99)
    return "\n".join(changed) or "the prompts are as they were"


def kept_options(config: Config, program: Program) -> dict:
    """The options that a run is kept with.

    With a file of prompts, or with demonstrations, they hold a digest of what the prompts say.
    """
    said = json.dumps(prompts_of(program)).encode()
    digest = hashlib.blake2b(said, digest_size=4).hexdigest()
    has_demos = any(m.demos for m in program.modules().values())
    prompts = ""
    if config.prompts or has_demos:
        prompts = f"{config.prompts} (which says {digest})"
    return dataclasses.asdict(config) | {"prompts": prompts}


# ------------------------------------------------------------------------------------------- saving
def save_prompts(program: Program, path: str | Path) -> None:
    """Write `prompts_of` the program as JSON."""
    write_json(path, prompts_of(program))


def _need(good: bool, where: str, what: str) -> None:
    if not good:
        raise InputError(f"{where}: {what}")


def _dspy_parts(value: Any, name: str) -> list[tuple[str, Any]]:
    """Where modules may be found inside a value of this name, as DSPy names them."""
    if isinstance(value, Program):
        return [(f"{name}.{key}", part) for key, part in vars(value).items()]
    if isinstance(value, dict):
        return [(f"{name}['{key}']", part) for key, part in value.items()]
    if isinstance(value, (list, tuple)):
        return [(f"{name}[{i}]", part) for i, part in enumerate(value)]
    return []


def _dspy_modules(program: Program) -> dict[str, Module]:
    """DSPy's name of each module -> the module.

    Example: {"ask.predict": ChainOfThought(…), "steps[0]": Module(…)}
    """
    found: dict[Module, str] = {}

    def visit(value: Any, name: str) -> None:
        if isinstance(value, Module):
            suffix = ".predict" if isinstance(value, ChainOfThought) else ""
            found.setdefault(value, name + suffix)
        for part_name, part in _dspy_parts(value, name):
            visit(part, part_name)

    visit(program, "")
    return {name.removeprefix("."): m for m, name in found.items()}


def _dspy_state(module: Module) -> dict:
    fields = []
    for f in _fields(module):
        # no chat prompt shows the prefix
        prefix = f.name.replace("_", " ").title() + ":"
        description = f.description or f"${{{f.name}}}"
        fields.append({"prefix": prefix, "description": description})
    return {
        "traces": [],
        "train": [],
        "demos": module.demos,
        "lm": None,
        "signature": {"instructions": module.instruction, "fields": fields},
    }


def save_dspy(program: Program, path: str | Path) -> None:
    """Write the prompts as DSPy 3.4 saves the state of a program.

    A DSPy program whose modules have the same attributes and signatures loads them
    (`dspy_program.load(path)`). DSPy takes common indentation and blank lines at the ends out of an
    instruction. Raises InputError where a module's name is the one under which DSPy keeps its
    versions.
    """
    modules = _dspy_modules(program)
    _need(
        "metadata" not in modules,
        str(path),
        "metadata: no module of this name can be saved for DSPy",
    )
    states = {name: _dspy_state(module) for name, module in modules.items()}
    write_json(path, states | {"metadata": {"dependency_versions": {"dspy": "3.4.1"}}})


# ------------------------------------------------------------------------------------------ loading
def _from_dspy(state: dict, names: list[str], where: str) -> dict:
    """DSPy's state of a predictor with these fields -> an entry of `save_prompts`.

    DSPy's fields have no names, only an order; but one without a description of its own is
    described as ${name}.
    """
    signature = state.get("signature")
    _need(
        isinstance(signature, dict) and isinstance(signature.get("fields"), list),
        where,
        "signature: expected instructions and fields",
    )
    instruction = signature.get("instructions")
    _need(isinstance(instruction, str), where, "signature: instructions: expected text")
    fields = signature["fields"]
    expected = ", ".join(names)
    _need(len(fields) == len(names), where, f"signature: {len(fields)} fields; expected {expected}")
    descriptions = {}
    for name, field in zip(names, fields):
        text = field.get("description") if isinstance(field, dict) else None
        _need(isinstance(text, str), where, f"field {name}: description: expected text")
        default = re.fullmatch(r"\$\{(\w+)\}", text)
        _need(not default or default[1] == name, where, f"field {name}: is {text} there")
        descriptions[name] = "" if default else text
    return {
        "instruction": inspect.cleandoc(instruction),
        "demos": state.get("demos"),
        "descriptions": descriptions,
    }


def _check_entry(entry: dict, names: list[str], where: str) -> None:
    """Raises InputError where it is no entry of `save_prompts` for a module with these fields."""
    _need(isinstance(entry.get("instruction"), str), where, "instruction: expected text")
    demos = entry.get("demos")
    is_demos = isinstance(demos, list) and all(isinstance(demo, dict) for demo in demos)
    _need(is_demos, where, "demos: expected a list of objects")
    known = set(names)
    expected = ", ".join(names)
    say_something = all(demo.keys() & known for demo in demos)
    _need(say_something, where, f"demos: one has none of the fields {expected}")
    texts = entry["descriptions"]
    is_of_fields = isinstance(texts, dict) and texts.keys() <= known
    is_texts = is_of_fields and all(isinstance(text, str) for text in texts.values())
    _need(is_texts, where, f"descriptions: expected texts of {expected}")


def _read_prompts(path: str | Path) -> Any:
    try:
        prompts = json.loads(Path(path).read_text(encoding="utf-8"))
        # JSON can name halves of a character, which no text may hold: encoding finds them
        json.dumps(prompts, ensure_ascii=False).encode()
    except (OSError, ValueError, RecursionError) as e:
        raise InputError(f"{path}: cannot be read as JSON ({e})") from None
    return prompts


def load_prompts(program: Program, path: str | Path) -> None:
    """Put prompts from a file into the program.

    The file is what `save_prompts` wrote, or the state of the same program in DSPy as JSON
    (`dspy_program.save("x.json")`, without LMs and traces). Raises InputError naming file, module
    and field, before anything is changed.
    """
    paths = {module: name for name, module in program.modules().items()}
    prompts = _read_prompts(path)
    _need(
        isinstance(prompts, dict),
        str(path),
        f"expected an object with the modules {', '.join(paths.values())}",
    )
    metadata = prompts.get("metadata")
    is_of_dspy = isinstance(metadata, dict) and "dependency_versions" in metadata
    if is_of_dspy:
        del prompts["metadata"]
    modules = _dspy_modules(program) if is_of_dspy else program.modules()
    mismatched = sorted(prompts.keys() ^ modules.keys())
    if mismatched:
        verdict = "missing" if mismatched[0] in modules else "unknown"
        raise InputError(
            f"{path}: {mismatched[0]} is {verdict}; expected the modules {', '.join(modules)}"
        )

    checked = {}
    for name, module in modules.items():
        where = f"{path}: {name}"
        entry = prompts[name]
        _need(isinstance(entry, dict), where, "expected an object")
        fields = _fields(module)
        names = [f.name for f in fields]
        if is_of_dspy:
            entry = _from_dspy(entry, names, where)
        # a file without descriptions leaves them as they are
        present = {f.name: f.description for f in fields}
        entry = {"descriptions": present} | entry
        _check_entry(entry, names, where)
        checked[paths[module]] = entry
    set_prompts(program, checked)
