"""The notebooks run, and their exercises tell a right answer from a wrong one."""

import ast
import importlib.util
import json
import re

import exercises_check
import numpy as np
import pytest
import solutions
from conftest import ROOT

from program import Prediction

FOLDER = ROOT / "docs" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
# a line that draws; those in a function are indented
DRAWS = re.compile(r"^(?!def |\s).*\b(?:plt\.show|draw_step|show_groups|show_advantages)\(", re.M)


# ------------------------------------------------------------------------- exercises


def test_every_solution_is_right():
    stand = {
        name: exercises_check.outcome(name, getattr(solutions, name, None))
        for name in exercises_check.CHECKS
    }
    assert set(stand.values()) == {"right"}, stand


def test_every_stub_is_unsolved_and_has_a_check(capsys):
    """Where you solved them in place: this test wants the stubs as they came."""
    functions = [
        n.name
        for n in ast.parse(exercises_check.STUBS.read_text()).body
        if isinstance(n, ast.FunctionDef)
    ]
    assert functions == list(exercises_check.CHECKS) and len(functions) >= 15
    assert exercises_check.main(exercises_check.STUBS) == 1
    *lines, last = capsys.readouterr().out.splitlines()
    assert last == f"0 right, 0 wrong, {len(functions)} unsolved"
    assert [line.split() for line in lines] == [[name, "unsolved"] for name in functions]


class LastWins(solutions.Sort):
    async def forward(self, text):
        heard = [await self.sort(text=text) for _ in range(3)]
        return Prediction(intent=heard[-1].intent)


class NeverEarly(solutions.Sort):
    async def forward(self, text):
        heard = [await self.sort(text=text) for _ in range(4)]
        return Prediction(intent=heard[-1].intent)


def only_common_calls(runs):
    return {
        place: members
        for place, members in solutions.groups_of(runs).items()
        if len(members) == len(runs)
    }


def mean_over_calls(lengths):
    members = sum(map(len, lengths))
    return [[1 / (members * n) for n in group] for group in lengths]


def causal_tree(sequences):
    ids, positions, _, last = solutions.prefix_tree(sequences)
    return ids, positions, np.tri(len(ids), dtype=bool).tolist(), last


def flat_positions(sequences):
    ids, _, mask, last = solutions.prefix_tree(sequences)
    return ids, list(range(len(ids))), mask, last


def score_of_the_token_alone(probabilities, token, advantage, weight):
    return [-weight * advantage * (v == token) for v in range(len(probabilities))]


# what one might take for right
MISTAKES = {
    "invocations": lambda modules: list(range(len(modules))),
    "groups_of": only_common_calls,
    "relative_advantages": lambda r: list((np.array(r) - np.mean(r)) / (np.std(r) + 1e-4)),
    "token_weights": mean_over_calls,
    "runs_that_truncate_ignores": lambda: solutions.runs_that_truncate_ignores()[:2],
    "draw": lambda p, u: int(np.searchsorted(np.cumsum(p), u)),
    "greedy": lambda model, prompt, ends, most: [
        t for t in solutions.greedy(model, prompt, ends, most) if t not in ends
    ],
    "distinct_tokens": lambda sequences: sum(map(len, sequences)),
    "prefix_tree": causal_tree,
    "cache_bytes": lambda c, tokens, size: 2 * c.layers * c.heads * c.head_dim * tokens * size,
    "gain": lambda ratio, a, low, high: min(max(ratio, 1 - low), 1 + high) * a,
    "still_moves": lambda ratio, a, low, high: 1 - low < ratio < 1 + high,
    "k3": lambda logprob, reference: logprob - reference,
    "logit_gradient": score_of_the_token_alone,
    "predicting_positions": lambda prompt, sampled: list(range(prompt, prompt + sampled)),
    "exact_gradient": lambda world: (
        sum(r.reward * sum(g for _, _, g in r.calls) for r in world.runs) / len(world.runs)
    ),
    "company": lambda p, runs: 1 - (1 - p) ** runs,
    "shrink": lambda runs: 1.0,
    "best_baseline": lambda world: sum(r.probability * r.reward for r in world.runs),
    "majority": LastWins,
    "until_two_agree": lambda labels, most: NeverEarly(labels),
    "partial_reward": lambda example, prediction: float(prediction.intent == example["intent"]),
    "survival": lambda ts, module: [
        len([t for t in ts if sum(c.module == module for c in t.calls) > k]) / len(ts)
        for k in range(3)
    ],
}


@pytest.mark.parametrize("name", exercises_check.CHECKS)
def test_a_likely_mistake_is_wrong(name):
    assert exercises_check.outcome(name, MISTAKES[name]).startswith("wrong: ")


def test_positions_of_a_tree_are_depths():
    assert exercises_check.outcome("prefix_tree", flat_positions).startswith("wrong: ")


# ------------------------------------------------------------------------- notebooks


def test_the_folder_has_the_notebooks_that_its_page_names():
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"\[[^]]*\]\((\d[\w-]*\.ipynb)\)", page) == [path.name for path in NOTEBOOKS]
    assert len(NOTEBOOKS) == 5


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_as_it_should_be(path):
    """With outputs, in order; without errors, warnings, and anything of the machine it ran on."""
    text = path.read_text(encoding="utf-8")
    notebook = json.loads(text)
    cells = notebook["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert all(cell["metadata"] == {} for cell in cells)
    assert [cell["id"] for cell in cells] == [
        f"{path.stem}-{i:02d}" for i in range(1, len(cells) + 1)
    ]
    outputs = [output for cell in code for output in cell["outputs"]]
    for cell in code:
        images = sum("image/png" in output.get("data", ()) for output in cell["outputs"])
        assert images == len(DRAWS.findall("".join(cell["source"]))), cell["id"]
    assert not any(
        output["output_type"] == "error" or output.get("name") == "stderr" for output in outputs
    )
    assert not re.search(r"/(home|tmp|work|usr|root|Users|opt)/|Warning", text)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_names_every_exercise_of_its_number(path):
    number = path.stem.split("-")[0]
    numbered = re.findall(
        r'^def (\w+)\(.*?"""(\d\.\d) ', exercises_check.STUBS.read_text(), re.M | re.S
    )
    own = [(name, n) for name, n in numbered if n.startswith(number)]
    text = "".join(
        "".join(cell["source"]) for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]
    )
    assert 3 <= len(own) <= 5 and all(f"**{n}** `{name}`" in text for name, n in own)


@pytest.mark.skipif(
    not importlib.util.find_spec("nbclient"), reason="nbclient is not there (make .venv/notebooks)"
)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path):
    from studies.notebooks import execute

    made, kept = execute(path), json.loads(path.read_text(encoding="utf-8"))
    kinds = lambda nb: [[o["output_type"] for o in c.get("outputs", ())] for c in nb["cells"]]
    assert kinds(made) == kinds(kept)
