"""Prompts as files of DSPy: its states are read, and written as it would have written them.

Against DSPy itself: tests/peers/test_peers.py.
"""

import copy
import json

import pytest

from program import ChainOfThought, InputError, Module, Program
from prompts.files import load_prompts, save_dspy, save_prompts


class Nested(Program):
    """Modules as an attribute, in a list and in a dict."""

    def __init__(self):
        signature = "question, notes: list[str] -> answer"
        self.ask = ChainOfThought(signature, "Answer.", {"answer": "a short phrase"})
        self.steps = [Module("a -> b"), {"x": Module("a -> b")}]


def entry(instruction: str, fields: dict[str, str], demos=()) -> dict:
    """DSPy's state of a predictor; fields: prefix -> description."""
    described = [{"prefix": prefix, "description": text} for prefix, text in fields.items()]
    return {
        "traces": [],
        "train": [],
        "demos": [*demos],
        "lm": None,
        "signature": {"instructions": instruction, "fields": described},
    }


# as dspy.Module.save wrote it of the same program (DSPy 3.4.1), but for the versions
STATE = {
    "ask.predict": entry(
        "Answer well.",
        {
            "Question:": "${question}",
            "Notes:": "from before",
            "Reasoning:": "${reasoning}",
            "Answer:": "${answer}",
        },
        demos=[
            {"question": "p", "answer": "y"},
            {"augmented": True, "question": "q", "notes": ["n"], "reasoning": "r", "answer": "x"},
        ],
    ),
    "steps[0]": entry(
        "Given the fields `a`, produce the fields `b`.", {"A:": "${a}", "B:": "${b}"}
    ),
    "steps[1]['x']": entry("Other.", {"A:": "${a}", "B:": "${b}"}),
    "metadata": {"dependency_versions": {"dspy": "3.4.1"}},
}


def prompts(program: Program) -> list:
    """What each module asks with all its inputs given."""
    asked = []
    for module in program.modules().values():
        asked.append(module.messages({f.name: "input" for f in module.signature.inputs}))
    return asked


def test_a_state_of_dspy_is_read_and_written_back_as_it_was(tmp_path):
    program = Nested()
    (tmp_path / "dspy.json").write_text(json.dumps(STATE))
    load_prompts(program, tmp_path / "dspy.json")

    assert program.ask.instruction == "Answer well."
    assert program.steps[1]["x"].instruction == "Other."
    asked = prompts(program)[0]
    roles = [message["role"] for message in asked]
    assert roles == ["system", "user", "assistant", "user", "assistant", "user"]
    assert "`notes` (list[str]): from before" in str(asked)
    assert "a short phrase" not in str(asked)

    save_dspy(program, tmp_path / "back.json")
    assert json.loads((tmp_path / "back.json").read_text()) == STATE

    # and our own file keeps all of it
    save_prompts(program, tmp_path / "own.json")
    here, again = Nested(), Nested()
    load_prompts(here, tmp_path / "own.json")
    load_prompts(again, tmp_path / "back.json")
    assert prompts(here) == prompts(again) == prompts(program) != prompts(Nested())


def drop_a_module(state, module, signature):
    state.pop("steps[0]")


def add_a_module(state, module, signature):
    state.update(more=module)


def make_a_module_a_number(state, module, signature):
    state.update({"steps[0]": 3})


def drop_the_signature(state, module, signature):
    module.pop("signature")


def make_a_demo_a_string(state, module, signature):
    module.update(demos=["d"])


def give_a_demo_of_other_fields(state, module, signature):
    module.update(demos=[{"aa": "x"}])


def put_half_a_character(state, module, signature):
    signature.update(instructions="Half \ud83d.")


def drop_the_instructions(state, module, signature):
    signature.update(instructions=None)


def drop_a_field(state, module, signature):
    signature["fields"].pop()


def describe_with_a_number(state, module, signature):
    signature["fields"][1].update(description=1)


def swap_the_fields(state, module, signature):
    signature["fields"].reverse()


@pytest.mark.parametrize(
    "edit, culprit",
    [
        (drop_a_module, r"steps\[0\] is missing"),
        (add_a_module, "more is unknown"),
        (make_a_module_a_number, r"steps\[0\]: expected an object"),
        (drop_the_signature, r"steps\[0\]: signature"),
        (make_a_demo_a_string, r"steps\[0\]: demos"),
        (give_a_demo_of_other_fields, r"steps\[0\]: demos: one has none of the fields a, b"),
        (put_half_a_character, "cannot be read"),
        (drop_the_instructions, r"steps\[0\]: signature: instructions"),
        (drop_a_field, r"steps\[0\]: signature: 1 fields; expected a, b"),
        (describe_with_a_number, r"steps\[0\]: field b: description"),
        (swap_the_fields, r"steps\[0\]: field a: is \$\{b\} there"),
    ],
)
def test_a_state_of_another_program_is_refused_and_changes_nothing(tmp_path, edit, culprit):
    state = copy.deepcopy(STATE)
    edit(state, state["steps[0]"], state["steps[0]"]["signature"])
    (tmp_path / "s.json").write_text(json.dumps(state))
    program = Nested()

    with pytest.raises(InputError, match=f"s.json: {culprit}"):
        load_prompts(program, tmp_path / "s.json")
    assert prompts(program) == prompts(Nested())
