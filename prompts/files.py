"""The prompts of a program, as files: every module's instruction, demos and descriptions of fields; DSPy's files too."""
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

from program import ChainOfThought, Field, InputError, Module, Program


def _fields(module: Module) -> tuple[Field, ...]:
    return module.signature.inputs + module.signature.outputs


def write_whole(path: str | Path, text: str) -> None:
    """All of it, or nothing: what was there before stays until then."""
    temporary = Path(f"{path}.new")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_json(path: str | Path, value) -> None:
    """As `write_whole` does."""
    write_whole(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def prompts_of(program: Program) -> dict[str, dict]:
    """Module -> its instruction, its demos, and the descriptions that its fields have."""
    return {name: {"instruction": m.instruction, "demos": m.demos,
                   "descriptions": {f.name: f.description for f in _fields(m) if f.description}}
            for name, m in program.modules().items()}


def kept_options(config, program: Program) -> dict:
    """The options that a run is kept with: with a file of prompts, or with demonstrations, a digest of what the prompts say."""
    said = hashlib.blake2b(json.dumps(prompts_of(program)).encode(), digest_size=4).hexdigest()
    others = config.prompts or any(m.demos for m in program.modules().values())
    return dataclasses.asdict(config) | {"prompts": f"{config.prompts} (which says {said})" if others else ""}


def set_prompts(program: Program, prompts: dict[str, dict]) -> None:
    """What `prompts_of` gives, put into the program."""
    for name, m in program.modules().items():
        p, s = prompts[name], copy.copy(m.signature)
        described = lambda fields: tuple(dataclasses.replace(f, description=p["descriptions"].get(f.name, "")) for f in fields)
        s.inputs, s.outputs = described(s.inputs), described(s.outputs)
        m.instruction, m.demos, m.signature = p["instruction"], p["demos"], s


def difference(before: dict[str, dict], after: dict[str, dict]) -> str:
    """What changed in the prompts, as a unified diff of their texts."""
    lines = lambda p: [*p["instruction"].splitlines(), *(f"demo: {json.dumps(d, ensure_ascii=False)}" for d in p["demos"])]
    diffs = (difflib.unified_diff(lines(before[n]), lines(after[n]), n, n, lineterm="", n=99) for n in before)
    return "\n".join(line for diff in diffs for line in diff) or "the prompts are as they were"


def save_prompts(program: Program, path: str | Path) -> None:
    """Write `prompts_of` the program as JSON."""
    write_json(path, prompts_of(program))


def save_dspy(program: Program, path: str | Path) -> None:
    """Write the prompts as DSPy 3.4 saves the state of a program: a DSPy program whose modules have the same attributes and
    signatures loads them (`dspy_program.load(path)`). DSPy takes common indentation and blank lines at the ends out of an
    instruction. Raises InputError where a module's name is the one under which DSPy keeps its versions."""
    def state(m: Module) -> dict:
        fields = [{"prefix": f.name.replace("_", " ").title() + ":",                # no chat prompt shows it
                   "description": f.description or f"${{{f.name}}}"} for f in _fields(m)]
        return {"traces": [], "train": [], "demos": m.demos, "lm": None,
                "signature": {"instructions": m.instruction, "fields": fields}}
    modules = _dspy_modules(program)
    _need("metadata" not in modules, str(path), "metadata: no module of this name can be saved for DSPy")
    write_json(path, {name: state(m) for name, m in modules.items()} | {"metadata": {"dependency_versions": {"dspy": "3.4.1"}}})


def load_prompts(program: Program, path: str | Path) -> None:
    """Read what `save_prompts` wrote, or the state of the same program in DSPy as JSON (`dspy_program.save("x.json")`, without
    LMs and traces). Raises InputError naming file, module and field, before anything is changed."""
    try:
        prompts = json.loads(Path(path).read_text(encoding="utf-8"))
        json.dumps(prompts, ensure_ascii=False).encode()    # JSON can name halves of a character, which no text may hold
    except (OSError, ValueError, RecursionError) as e:
        raise InputError(f"{path}: cannot be read as JSON ({e})") from None
    _need(isinstance(prompts, dict), str(path), f"expected an object with the modules {', '.join(program.modules())}")
    if of_dspy := isinstance(prompts.get("metadata"), dict) and "dependency_versions" in prompts["metadata"]:
        del prompts["metadata"]
    modules = _dspy_modules(program) if of_dspy else program.modules()
    if odd := sorted(prompts.keys() ^ modules.keys()):
        verdict = "missing" if odd[0] in modules else "unknown"
        raise InputError(f"{path}: {odd[0]} is {verdict}; expected the modules {', '.join(modules)}")
    for name, m in modules.items():
        where, p, names = f"{path}: {name}", prompts[name], [f.name for f in _fields(m)]
        _need(isinstance(p, dict), where, "expected an object")
        p = prompts[name] = _from_dspy(p, names, where) if of_dspy else p
        _need(isinstance(p.get("instruction"), str), where, "instruction: expected text")
        _need(isinstance(p.get("demos"), list) and all(isinstance(d, dict) for d in p["demos"]), where,
              "demos: expected a list of objects")
        _need(all(d.keys() & set(names) for d in p["demos"]), where, f"demos: one has none of the fields {', '.join(names)}")
        told = p.setdefault("descriptions", {f.name: f.description for f in _fields(m)})
        _need(isinstance(told, dict) and told.keys() <= set(names) and all(isinstance(t, str) for t in told.values()), where,
              f"descriptions: expected texts of {', '.join(names)}")
    set_prompts(program, {own: prompts[name] for name, m in modules.items() for own, other in program.modules().items() if other is m})


def _need(good: bool, where: str, what: str) -> None:
    if not good:
        raise InputError(f"{where}: {what}")


def _dspy_modules(program: Program) -> dict[str, Module]:
    """DSPy's name of each module -> the module. Example: {"ask.predict": ChainOfThought(…), "steps[0]": Module(…)}"""
    found = {}
    def visit(value, name: str):
        if isinstance(value, Module):
            found.setdefault(value, name + ".predict" * isinstance(value, ChainOfThought))
        inside = ((f"{name}.{k}", v) for k, v in vars(value).items()) if isinstance(value, Program) else (
            (f"{name}['{k}']", v) for k, v in value.items()) if isinstance(value, dict) else (
            (f"{name}[{i}]", v) for i, v in enumerate(value)) if isinstance(value, (list, tuple)) else ()
        for key, item in inside:
            visit(item, key)
    visit(program, "")
    return {name.removeprefix("."): m for m, name in found.items()}


def _from_dspy(state: dict, names: list[str], where: str) -> dict:
    """DSPy's state of a predictor with these fields -> an entry of `save_prompts`. DSPy's fields have no names, only an order;
    but one without a description of its own is described as ${name}."""
    signature, told = state.get("signature"), {}
    _need(isinstance(signature, dict) and isinstance(signature.get("fields"), list), where,
          "signature: expected instructions and fields")
    _need(isinstance(signature.get("instructions"), str), where, "signature: instructions: expected text")
    fields = signature["fields"]
    _need(len(fields) == len(names), where, f"signature: {len(fields)} fields; expected {', '.join(names)}")
    for name, saved in zip(names, fields):
        text = saved.get("description") if isinstance(saved, dict) else None
        _need(isinstance(text, str), where, f"field {name}: description: expected text")
        default = re.fullmatch(r"\$\{(\w+)\}", text)
        _need(not default or default[1] == name, where, f"field {name}: is {text} there")
        told[name] = "" if default else text
    return {"instruction": inspect.cleandoc(signature["instructions"]), "demos": state.get("demos"), "descriptions": told}
