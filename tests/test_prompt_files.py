"""Prompts as files of DSPy: what it writes is read, what is written for it is what it would have written (against DSPy itself:
tests/peers/test_peers.py)."""
import copy
import json

import pytest

from program import ChainOfThought, InputError, Module, Program
from prompts.files import load_prompts, save_dspy, save_prompts


class Nested(Program):
    def __init__(self):
        self.ask = ChainOfThought("question, notes: list[str] -> answer", "Answer.", {"answer": "a short phrase"})
        self.steps = [Module("a -> b"), {"x": Module("a -> b")}]


def entry(instruction: str, *fields: tuple[str, str], demos=()) -> dict:
    """DSPy's state of a predictor."""
    return {"traces": [], "train": [], "demos": [*demos], "lm": None,
            "signature": {"instructions": instruction, "fields": [{"prefix": p, "description": d} for p, d in fields]}}


STATE = {               # as dspy.Module.save wrote it of the same program (DSPy 3.4.1), but for the versions
    "ask.predict": entry("Answer well.", ("Question:", "${question}"), ("Notes:", "from before"), ("Reasoning:", "${reasoning}"),
                         ("Answer:", "${answer}"), demos=[{"question": "p", "answer": "y"}, {
                             "augmented": True, "question": "q", "notes": ["n"], "reasoning": "r", "answer": "x"}]),
    "steps[0]": entry("Given the fields `a`, produce the fields `b`.", ("A:", "${a}"), ("B:", "${b}")),
    "steps[1]['x']": entry("Other.", ("A:", "${a}"), ("B:", "${b}")),
    "metadata": {"dependency_versions": {"dspy": "3.4.1"}},
}


def prompts(program: Program) -> list:
    return [m.messages({f.name: "input" for f in m.signature.inputs}) for m in program.modules().values()]


def test_a_state_of_dspy_is_read_and_written_back_as_it_was(tmp_path):
    program, again, here = Nested(), Nested(), Nested()
    (tmp_path / "dspy.json").write_text(json.dumps(STATE))
    load_prompts(program, tmp_path / "dspy.json")
    assert program.ask.instruction == "Answer well." and program.steps[1]["x"].instruction == "Other."
    assert [m["role"] for m in prompts(program)[0]] == ["system", *["user", "assistant"] * 2, "user"]
    assert "`notes` (list[str]): from before" in str(prompts(program)[0]) and "a short phrase" not in str(prompts(program)[0])
    save_dspy(program, tmp_path / "back.json")
    assert json.loads((tmp_path / "back.json").read_text()) == STATE
    save_prompts(program, tmp_path / "own.json")            # and our own file keeps all of it
    load_prompts(here, tmp_path / "own.json")
    load_prompts(again, tmp_path / "back.json")
    assert prompts(here) == prompts(again) == prompts(program) != prompts(Nested())


def edited(edit) -> str:
    state = copy.deepcopy(STATE)
    edit(state, state["steps[0]"], state["steps[0]"]["signature"])
    return json.dumps(state)


@pytest.mark.parametrize("edit, culprit", [
    (lambda s, p, g: s.pop("steps[0]"), r"steps\[0\] is missing"),
    (lambda s, p, g: s.update(more=p), "more is unknown"),
    (lambda s, p, g: s.update({"steps[0]": 3}), r"steps\[0\]: expected an object"),
    (lambda s, p, g: p.pop("signature"), r"steps\[0\]: signature"),
    (lambda s, p, g: p.update(demos=["d"]), r"steps\[0\]: demos"),
    (lambda s, p, g: p.update(demos=[{"aa": "x"}]), r"steps\[0\]: demos: one has none of the fields a, b"),
    (lambda s, p, g: g.update(instructions="Half \ud83d."), "cannot be read"),
    (lambda s, p, g: g.update(instructions=None), r"steps\[0\]: signature: instructions"),
    (lambda s, p, g: g["fields"].pop(), r"steps\[0\]: signature: 1 fields; expected a, b"),
    (lambda s, p, g: g["fields"][1].update(description=1), r"steps\[0\]: field b: description"),
    (lambda s, p, g: g["fields"].reverse(), r"steps\[0\]: field a: is \$\{b\} there")], ids=range(11))
def test_a_state_of_another_program_is_refused_and_changes_nothing(tmp_path, edit, culprit):
    (tmp_path / "s.json").write_text(edited(edit))
    program = Nested()
    with pytest.raises(InputError, match=f"s.json: {culprit}"):
        load_prompts(program, tmp_path / "s.json")
    assert prompts(program) == prompts(Nested())
