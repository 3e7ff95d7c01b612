"""The laws of prompt search and of its composition with training: candidates, trials, budgets."""

import dataclasses
import html
import json
import random

import pytest
import torch
from conftest import make_model
from hypothesis import given
from hypothesis import strategies as st
from programs import Loose, Two

import mmgrpo as G
import model as M
from lm.endpoint import Remote
from lm.lora import merged as merge
from lm.tokenizer import CheckpointError
from program import (
    Call,
    Completion,
    InputError,
    Module,
    Task,
    ToolError,
    Trajectory,
    run_programs,
)
from prompts import search as P
from prompts import start as S
from prompts.files import difference, load_prompts, prompts_of, save_prompts
from run import cli, loading
from run.records import cost, read_metrics


def always_one(example, prediction):
    return 1.0


def make_task(**more):
    examples = [{"x": f"word {i}", "z": "gold"} for i in range(12)]
    instructions = {"ask": ("Ask.", "Ask well.", "Ask badly."), "note": ("Note well.",)}
    options = {"instructions": instructions} | more
    return Task(Two(), always_one, examples[:4], examples[4:8], examples[8:], **options)


CONFIG = G.Config(
    trials=7,
    full_every=3,
    minibatch=2,
    demo_sets=2,
    demos=1,
    max_tokens=4,
    max_calls=2,
    bootstrap=4,
)


class Scripted:
    """In the place of a sampler: answers by module, all at the next turn."""

    def __init__(self, *_, **__):
        self.waiting, self.count, self.seconds = [], 0, 0.0

    def answer(self, module, messages):
        return {"ask": "<y>yes</y>", "note": "<z>no</z>"}[module]

    def submit(self, messages, key):
        self.count += 1
        self.waiting.append((self.count, self.answer(key[4], messages)))
        return self.count

    def advance(self):
        done = []
        for ticket, text in self.waiting:
            done.append((ticket, Completion([1], [2], [-0.1], "stop", text)))
        self.waiting = []
        return done


@pytest.fixture
def scripted(monkeypatch):
    """A search without an LM: runs are scripted, scores depend on the prompts and the step."""

    def evaluate(model, tokenizer, task, examples, config, temperature, step=-1):
        rng = random.Random(repr((prompts_of(task.program), step, examples)))
        return {
            "score": rng.random(),
            "stderr": 0.0,
            "statuses": {},
            "measures": {},
            "rollouts": len(examples),
            "tokens": 3,
            "seconds": 0.5,
        }

    monkeypatch.setattr(G, "Sampler", Scripted)
    monkeypatch.setattr(P, "evaluate", evaluate)


def search(out, task=None, config=CONFIG, **options):
    """A search without an LM -> its dev scores."""
    return P.search(task or make_task(), None, None, config, out, **options)


def trials_of(folder):
    return [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]


def read(path):
    return json.loads(path.read_text())


def stop_after(turns):
    """A `stop` that says no so many times, then yes; it counts how often it is asked."""

    def stop():
        stop.asked += 1
        return stop.asked > turns

    stop.asked = 0
    return stop


def always():
    return True


# --------------------------------------------------------------------------------------- candidates
def run_of(*calls, reward=1.0, status="completed"):
    """A run of these calls: module, inputs, outputs."""
    made = []
    for module, inputs, outputs in calls:
        made.append(Call(module, 0, inputs, Completion([], [], [], "stop"), outputs))
    return Trajectory(0, 0, tuple(made), {}, reward, status)


def test_demonstrations_are_the_modules_own_calls_in_good_runs():
    good = run_of(
        ("ask", {"x": "a"}, {"y": "b"}),
        ("ask", {"x": "c"}, {"y": "d"}),
        ("note", {"x": "a", "y": "b"}, {"z": "e"}),
    )
    bad = run_of(("ask", {"x": "f"}, {"y": "g"}), reward=0.4)
    failed = run_of(("ask", {"x": "h"}, {"y": "i"}), status="format_error")
    unread = run_of(("ask", {"x": "j"}, None))
    no_json = run_of(
        ("ask", {"x": {1, 2}}, {"y": "k"}),
        ("note", {"x": (1,), "y": ""}, {"z": ""}),
    )
    excluded = run_of(("ask", {"x": "l"}, {"y": "m"}), reward=None, status="tool_error")

    assert P.cut_demos([good, bad, failed, unread, no_json, excluded], 0.5) == {
        "ask": [[{"x": "a", "y": "b"}, {"x": "c", "y": "d"}]],
        "note": [[{"x": "a", "y": "b", "z": "e"}]],
    }


def numbered_demo(i):
    return {"x": str(i), "y": "y"}


demos_of_a_run = st.lists(st.integers(0, 9).map(numbered_demo), min_size=1, max_size=3)


@given(
    runs=st.lists(demos_of_a_run, max_size=6),
    labelled=st.lists(st.just({"x": "l", "y": "m"}), max_size=2),
    sets=st.integers(0, 5),
    most=st.integers(0, 3),
)
def test_demo_sets_are_different_and_of_as_many_runs(runs, labelled, sets, most):
    config = G.Config(demo_sets=sets, demos=most)
    found = P.demo_sets(Two().ask, runs, labelled, config, "ask")

    assert len(found) <= sets
    for demos in found:
        assert 1 <= len(demos) <= most
        assert found.count(demos) == 1
        for demo in demos:
            assert demo in labelled or any(demo in run for run in runs)
    if runs and sets and most:
        assert found


def test_candidates_begin_with_the_present_prompts_and_count_their_runs(scripted):
    task = make_task()
    task.program.ask.demos = [{"x": "old", "y": "demo"}]
    found = P.candidates(task, None, None, CONFIG)

    ask, note = found["modules"]["ask"], found["modules"]["note"]
    assert ask["instructions"] == ["Ask.", "Ask well.", "Ask badly."]
    assert note["instructions"] == ["Note.", "Note well."]
    assert ask["demos"][0] == [{"x": "old", "y": "demo"}]
    assert len(ask["demos"]) > 1
    assert found["rollouts"] == 4
    assert found["good_runs"] == 4
    assert found["tokens"] == 8


@pytest.mark.parametrize(
    "text, why",
    [
        ("", "empty"),
        ("x" * 2001, "over-long"),
        ("Say <y>.", "has tags"),
        ("a </answer>", "has tags"),
        ("a <|im_end|>", "has tags"),
        ("Known.", "known"),
        ("Is 1 < 2 > 0?", ""),
        ("Good.", ""),
    ],
)
def test_instructions_that_cannot_be_used_are_told_why(text, why):
    assert P.flaw(text, ["Known."]) == why


class Writer(Scripted):
    """Writes these instructions in turn (None: what cannot be read), and remembers what it saw."""

    def __init__(self, texts):
        super().__init__()
        self.texts, self.seen = iter(texts), []

    def answer(self, module, messages):
        self.seen.append((module, messages[-1]["content"]))
        if module == "describe":
            return "<description>\nsome words\n</description>"
        text = next(self.texts)
        if text is None:
            return "?"
        return f"<proposed_instruction>\n{html.escape(text)}\n</proposed_instruction>"

    def seen_by(self, module):
        return [content for name, content in self.seen if name == module]


def test_proposals_are_made_per_module_and_useless_ones_counted():
    writer = Writer(["First.", "", "First.", "<b>", None, "Second."])
    demos = {"ask": [[{"x": "a trace", "y": "b"}]]}
    config = dataclasses.replace(CONFIG, proposals=3)
    written, dropped, runs = P.propose(make_task(), demos, config, writer)

    assert written == {"ask": ["First."], "note": ["Second."]}
    assert len(runs) == 6
    assert dropped == {"empty": 1, "known": 1, "has tags": 1, "format_error": 1}
    asked = writer.seen_by("propose")
    assert len(asked) == 6
    for part in ("a trace", "Ask.", "some words"):
        assert part in asked[0]
    assert "x, y" in asked[3]
    assert "word" in writer.seen_by("describe")[0]


@pytest.fixture
def instructions(tmp_path):
    """Reads a file of instructions with this text."""

    def given(text):
        path = tmp_path / "i.json"
        path.write_text(text)
        return P.given_instructions(
            make_task(), dataclasses.replace(CONFIG, instructions=str(path))
        )

    return given


@pytest.mark.parametrize(
    "text, culprit",
    [
        ("[", "cannot be read"),
        ("[]", "expected a JSON object"),
        ('{"no": []}', "no: no such module"),
        ('{"ask": "Ask."}', "ask: expected a list"),
        ('{"ask": ["", "b"]}', "ask: expected"),
        ('{"ask": ["a <y> b"]}', "ask: expected"),
        ('{"ask": ["Half \\ud83d."]}', "ask: expected"),
    ],
)
def test_a_list_of_instructions_that_cannot_be_used_is_refused(instructions, text, culprit):
    with pytest.raises((InputError, CheckpointError), match=f"i.json: .*{culprit}"):
        instructions(text)
    assert instructions('{"ask": ["One.", "Two."]}') == {"ask": ["One.", "Two."]}

    says = "--task hover: its instructions: ask: expected a list"
    with pytest.raises(InputError, match=says):
        P.given_instructions(make_task(instructions={"ask": "Ask."}), CONFIG)


TRIAL = {
    "trial": 1,
    "choice": [0, 1, 0],
    "score": 0.5,
    "full": True,
    "examples": 4,
    "rollouts": 4,
    "tokens": 9,
    "seconds": 0.5,
}


def trial(**changes):
    return json.dumps(TRIAL | changes).encode()


@pytest.mark.parametrize(
    "line, culprit",
    [
        (b"{", "is no JSON"),
        (b"\xff\xfe", "is no JSON"),
        (b"3", "is no trial"),
        (trial(choice=[9, 0, 0]), "is no trial"),
        (trial(choice=[0]), "is no trial"),
        (trial(score=float("nan")), "is no trial"),
        (trial(trial=2), "is no trial"),
        (trial(seconds=None), "is no trial"),
        (trial(rollouts="4"), "is no trial"),
        (trial(tokens=0.5), "is no trial"),
    ],
)
def test_trials_that_are_none_are_refused_by_line(tmp_path, line, culprit):
    path, sizes = tmp_path / "trials.jsonl", [3, 2, 2]
    first, second = trial(trial=0), trial()
    path.write_bytes(first + b"\n" + second + b"\n")
    assert len(P.read_trials(path, sizes)) == 2

    path.write_bytes(first + b"\n" + line + b"\n" + first + b"\n")
    with pytest.raises(InputError, match=f"trials.jsonl, line 2: {culprit}"):
        P.read_trials(path, sizes)


NOT_CANDIDATES = "candidates.json: is not as a search of this program writes it"


@pytest.mark.parametrize(
    "found",
    [
        {},
        {
            "config": {},
            "start": {"ask": {}},
            "modules": {},
            "good_runs": 1,
            "rollouts": 1,
            "dropped": {},
        },
        {
            "config": {},
            "start": 3,
            "modules": [],
            "good_runs": 1,
            "rollouts": 1,
            "dropped": {},
        },
    ],
)
def test_candidates_that_are_none_are_refused(scripted, tmp_path, found):
    (tmp_path / "candidates.json").write_text(json.dumps(found))
    with pytest.raises(InputError, match=NOT_CANDIDATES):
        search(tmp_path)


@pytest.mark.parametrize(
    "place, value",
    [
        ("start", {}),
        ("start/ask/descriptions", None),
        ("start/ask/instruction", 5),
        ("modules/note/instructions", ["", 5]),
        ("modules/note/demos", [[], "x"]),
        ("modules/note/demos", [[], ["x"]]),
        ("seconds", "1"),
        ("dropped", 3),
    ],
)
def test_candidates_that_were_changed_are_refused(scripted, tmp_path, place, value):
    search(tmp_path)
    path = tmp_path / "candidates.json"
    kept = inner = read(path)
    *outer, last = place.split("/")
    for key in outer:
        inner = inner[key]
    inner[last] = value
    path.write_text(json.dumps(kept))

    with pytest.raises(InputError, match=NOT_CANDIDATES):
        search(tmp_path)


def test_candidates_of_another_program_are_refused(scripted, tmp_path):
    search(tmp_path)
    task = make_task()
    task.program.more = Module("x -> y", "More.")

    with pytest.raises(InputError, match=NOT_CANDIDATES):
        search(tmp_path, task)


def test_a_file_of_prompts_that_changed_is_another_option(scripted, tmp_path):
    config = dataclasses.replace(CONFIG, prompts=str(tmp_path / "given.json"))
    search(tmp_path, config=config, stop=always)
    search(tmp_path, config=config)

    task = make_task()
    task.program.ask.instruction = "Ask again."
    file = r"\S*given.json \(which says"
    with pytest.raises(InputError, match=rf"begun with --prompts {file} \w+\), not {file}"):
        search(tmp_path, task, config)


def test_a_program_runs_on_an_endpoint_as_on_a_sampler():
    def endpoint(messages):
        asks = "Ask." in messages[0]["content"]
        return "<y>fine</y>" if asks else "<z>done</z>"

    def broken(messages):
        raise ToolError("no answer")

    examples = [{"x": "1"}, {"x": "2"}]
    runs = run_programs(Two(), examples, always_one, Remote(endpoint), rollouts=3)
    assert [t.status for t in runs] == ["completed"] * 6
    assert runs[0].prediction == {"z": "done"}

    with pytest.raises(ToolError, match="no answer"):
        run_programs(Two(), examples[:1], always_one, Remote(broken))


# ------------------------------------------------------------------------------------------- search
@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    tried=st.integers(0, 30),
    seed=st.integers(0, 99),
)
def test_choices_are_candidates(sizes, tried, seed):
    rng, scored = random.Random(seed), {}
    for _ in range(tried):
        choice = tuple(rng.randrange(n) for n in sizes)
        scored[choice] = rng.random()

    choice = P.next_choice(sizes, scored, rng)
    assert len(choice) == len(sizes)
    assert all(0 <= k < n for k, n in zip(choice, sizes))


CHOICES = [(0, 0), (0, 1), (1, 0), (1, 1)]


@pytest.mark.parametrize("startup", [0, 8])
@pytest.mark.parametrize("new", CHOICES)
def test_a_choice_that_was_not_tried_comes_first(startup, new):
    scored = {choice: float(choice == (1, 1)) for choice in CHOICES if choice != new}
    choice = P.next_choice([2, 2], scored, random.Random(0), startup=startup, draws=200)
    assert choice == new


def test_the_search_finds_what_is_good_sooner_than_chance():
    """Of four places with six candidates, whose values add up, it sees noisy scores.

    After 40 trials the best one tried is better than with uniform draws.
    """
    places, candidates = 4, 6

    def best(seed, startup):
        rng, scored = random.Random(seed), {}
        value = [[rng.random() for _ in range(candidates)] for _ in range(places)]

        def true(choice):
            return sum(values[k] for values, k in zip(value, choice))

        for _ in range(40):
            choice = P.next_choice([candidates] * places, scored, rng, startup=startup)
            scored[choice] = true(choice) + rng.gauss(0, 0.1)
        return true(max(scored, key=scored.get))

    gains = [best(seed, 8) - best(seed, 1000) for seed in range(20)]
    assert sum(gains) / 20 > 0.1
    assert sum(gain >= 0 for gain in gains) >= 14


def trials_until_the_end(sizes, config):
    """The trials of a search whose scores are random."""
    rng, done = random.Random(config.seed), []
    while planned := P.next_trial(sizes, done, config):
        choice, full = planned
        examples = 4 if full else 2
        done.append({"choice": choice, "full": full, "examples": examples, "score": rng.random()})
        assert len(done) < 40
    return done


@given(seed=st.integers(0, 999), trials=st.integers(0, 12), every=st.integers(1, 5))
def test_the_start_comes_first_and_every_search_ends(seed, trials, every):
    sizes = [3, 2]
    config = dataclasses.replace(CONFIG, trials=trials, full_every=every, seed=seed)
    done = trials_until_the_end(sizes, config)

    assert done[0]["full"]
    assert done[0]["choice"] == (0, 0)
    on_all = [t for t in done if t["full"]]
    on_few = len(done) - len(on_all)
    assert on_few == trials or (on_few < trials and len(on_all) == 6)

    # no choice is scored on all of dev twice
    assert len({t["choice"] for t in on_all}) == len(on_all) <= 1 + -(-trials // every)
    if trials and {t["choice"] for t in done} != {(0, 0)}:
        assert len(on_all) > 1

    # with fewer trials it has ended as well
    for fewer in range(trials):
        ended = P.next_trial(sizes, done, dataclasses.replace(config, trials=fewer)) is None
        assert ended or done[-1]["full"] is False


def test_the_best_of_all_dev_is_kept_and_written(scripted, tmp_path):
    task = make_task()
    scores = search(tmp_path, task)

    on_all = [t for t in trials_of(tmp_path) if t["full"]]
    assert scores == [t["score"] for t in on_all]
    assert len(scores) > 1
    best = prompts_of(task.program)
    other = make_task()
    load_prompts(other.program, tmp_path / "prompts.json")
    assert prompts_of(other.program) == best

    # a trial chooses where there is more than one candidate
    modules = read(tmp_path / "candidates.json")["modules"]
    places = []
    for module, found in modules.items():
        for kind, name in (("instructions", "instruction"), ("demos", "demos")):
            if len(found[kind]) > 1:
                places.append((found[kind], best[module][name]))
    choice = max(on_all, key=lambda t: t["score"])["choice"]
    for (candidates, kept), k in zip(places, choice, strict=True):
        assert kept == candidates[k]


@pytest.mark.parametrize("killed_after", [0, 1, 3, 8])
@pytest.mark.parametrize("torn", [False, True])
def test_a_search_that_was_killed_ends_as_if_it_had_not_been(
    scripted, tmp_path, killed_after, torn
):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    first, second = make_task(), make_task()
    search(whole, first)
    search(resumed, stop=stop_after(killed_after))
    assert len(trials_of(resumed)) == killed_after
    if torn:
        with (resumed / "trials.jsonl").open("a") as log:
            log.write('{"trial": 99, "cho')

    search(resumed, second)
    assert trials_of(whole) == trials_of(resumed)
    assert prompts_of(first.program) == prompts_of(second.program)
    assert not (resumed / "prompts.json").exists() or search(resumed)

    with pytest.raises(InputError, match="begun with --minibatch 2, not 3"):
        search(resumed, config=dataclasses.replace(CONFIG, minibatch=3))


def test_a_program_with_nothing_to_choose_keeps_its_prompts(scripted, tmp_path):
    task = make_task(instructions={})
    before = prompts_of(task.program)
    scores = search(tmp_path, task, dataclasses.replace(CONFIG, demos=0))

    assert len(scores) == 1
    assert prompts_of(task.program) == before == read(tmp_path / "prompts.json")


def test_what_changed_in_the_prompts_is_shown_as_a_diff():
    before = prompts_of(Two())
    after = before | {"ask": {"instruction": "Ask well.", "demos": [{"x": "a"}]}}

    assert difference(before, after).splitlines() == [
        "--- ask",
        "+++ ask",
        "@@ -1 +1,2 @@",
        "-Ask.",
        "+Ask well.",
        '+demo: {"x": "a"}',
    ]
    assert difference(before, before) == "the prompts are as they were"


# -------------------------------------------------------------------------------------- composition
@pytest.mark.parametrize(
    "strategy, kinds",
    [
        ("w", "w"),
        ("p->w", "pw"),
        ("w -> p", "wp"),
        ("p -> w -> p", "pwp"),
        ("(p -> w) x 3", "pwpwpw"),
    ],
)
def test_strategies_are_stages_in_turn(strategy, kinds):
    assert "".join(P.stages(strategy)) == kinds


@pytest.mark.parametrize("strategy", ["", "p w", "q", "p ->", "(p -> w) x 0", "p -> (w x 2)", "(p"])
def test_a_strategy_that_cannot_be_read_is_refused(strategy):
    with pytest.raises(InputError, match="--strategy"):
        P.stages(strategy)


def random_score(example, prediction):
    """Another one for every run."""
    return random.Random(repr((example, id(prediction)))).random()


PAIR = Task(
    Two(),
    always_one,
    train=[{"x": str(i)} for i in range(5)],
    dev=[{"x": "dev"}] * 3,
    test=[],
    instructions={
        "ask": ("Ask well.", "Ask."),
        "note": tuple(f"Note {i}." for i in range(9)),
    },
)
SMALL = G.Config(
    examples=2,
    rollouts=3,
    max_tokens=4,
    max_calls=2,
    slots=8,
    steps=2,
    trials=3,
    full_every=2,
    minibatch=2,
    demos=1,
    bootstrap=2,
    eval_every=2,
    strategy="p -> w",
)


def loose(metric=random_score):
    return dataclasses.replace(PAIR, program=Loose(), metric=metric)


@pytest.fixture
def rows_trained(monkeypatch):
    """The rows of all gradients."""
    seen, step_gradient = [], G.step_gradient

    def watched(model, rows, *args, **options):
        seen.extend(rows)
        return step_gradient(model, rows, *args, **options)

    monkeypatch.setattr(G, "step_gradient", watched)
    return seen


def test_weights_are_trained_under_the_prompts_that_were_found(
    model, tokenizer, tmp_path, monkeypatch, rows_trained
):
    """What is trained is what was sampled: what the search found stands in all prompts trained."""

    def search(task, model, tokenizer, config, out, stop):
        task.program.ask.instruction = "Ask it so."
        task.program.ask.demos = [{"x": "violet", "y": "crimson"}]
        (out / "trials.jsonl").write_text("")
        save_prompts(task.program, out / "prompts.json")
        return [0.0, 0.1]

    monkeypatch.setattr(P, "search", search)
    result = P.compose(loose(), SMALL, tmp_path, lambda stage: (model, tokenizer))

    asked = [row.completion.prompt_ids for row in rows_trained if row.module == "ask"]
    assert asked
    for ids in asked:
        text = tokenizer.decode(ids)
        assert all(part in text for part in ("Ask it so.", "violet", "crimson"))
    assert result["prompts"] == str(tmp_path / "1-p" / "prompts.json")
    assert result["model"] == str(tmp_path / "2-w" / "best")


def test_all_rollouts_are_counted_and_within_the_budget(model, tokenizer, tmp_path, monkeypatch):
    made, original = [], G.play

    def play(*args, **options):
        runs, seconds = original(*args, **options)
        made.append(len(runs))
        return runs, seconds

    for module in (G, P, S):
        monkeypatch.setattr(module, "play", play)
    config = dataclasses.replace(SMALL, budget=60)
    result = P.compose(loose(), config, tmp_path, lambda stage: (model, tokenizer))

    searched, trained = spent = [stage["rollouts"] for stage in result["stages"]]
    assert sum(spent) == sum(made) <= 60
    assert max(spent) <= 30
    assert cost(tmp_path / "1-p")["rollouts"] == searched

    # each stage has half of it; as many units are afforded as fit, and no more
    probe = read(tmp_path / "1-p/start.json")["rollouts"]
    left = 30 - S.most_rollouts(PAIR, config)
    for kind, taken, room in (("p", searched - probe, left), ("w", trained, 30)):
        n = P.affordable(kind, PAIR, config, room)
        most, too_many = (P.rollouts(kind, k, PAIR, config) for k in (n, n + 1))
        assert taken <= most <= room < too_many
    with pytest.raises(InputError, match="--budget 60"):
        P.affordable("w", PAIR, config, 5)
    # at once
    assert P.affordable("w", PAIR, config, 10**15) > 10**14


def figures_of(result):
    """What a result says of its stages, but for the time."""
    stages = []
    for stage in result["stages"]:
        stages.append({k: v for k, v in stage.items() if k != "seconds"})
    return stages


def digests(folder):
    """Of the rollouts of each step."""
    return [m["digest"] for m in read_metrics(folder)[0]]


def test_stages_go_on_where_they_were_stopped(tokenizer, tmp_path):
    config = dataclasses.replace(SMALL, model="start", strategy="(p -> w) x 2", eval_every=1)

    def load(stage):
        if stage.model == "start":
            return make_model(vocab_size=tokenizer.size), tokenizer
        return M.load_pretrained(stage.model)[0], tokenizer

    whole = P.compose(loose(always_one), config, tmp_path / "whole", load)
    for turns in (2, 5, 9, 99):
        stop = stop_after(turns)
        again = P.compose(loose(always_one), config, tmp_path / "parts", load, stop=stop)
        ended = stop.asked <= turns
        assert (again is not None) == ended
        assert (tmp_path / "parts/result.json").exists() == ended

    assert figures_of(whole) == figures_of(again)
    assert len(whole["stages"]) == 4
    second_round = digests(tmp_path / "whole" / "4-w")
    assert second_round == digests(tmp_path / "parts" / "4-w")
    # the second round draws anew
    assert digests(tmp_path / "whole" / "2-w")[0] != second_round[0]


def test_all_rounds_are_scored_with_the_same_random_numbers(model, tokenizer, monkeypatch):
    seeds, original = [], G.play

    def play(*args):
        seeds.append(args[4].seed)
        return original(*args)

    monkeypatch.setattr(G, "play", play)
    config = dataclasses.replace(SMALL, strategy="(p -> w) x 2", seed=7)
    stages = [stage for _, stage in P.plan(PAIR, config)]
    for stage in stages:
        G.evaluate(model, tokenizer, loose(), PAIR.dev, stage, 1.0)

    assert seeds == [7] * 4
    assert [stage.seed for stage in stages] == [7, 7, 1007, 1007]


def test_a_second_training_with_lora_starts_from_the_merged_first(tokenizer, tmp_path):
    scored = []

    def better_and_better(example, prediction):
        """So that the last weights are the best."""
        scored.append(1)
        return float(len(scored))

    start = make_model(vocab_size=tokenizer.size)
    M.save_pretrained(start, tokenizer, tmp_path / "start")
    config = dataclasses.replace(
        SMALL,
        model=str(tmp_path / "start"),
        strategy="w -> p -> w",
        lora_rank=2,
        lr=0.01,
        warmup=0,
        eval_every=1,
    )
    result = P.compose(loose(better_and_better), config, tmp_path, loading.load_model)

    base, best = tmp_path / "3-w/base", tmp_path / "3-w/best"
    first = dataclasses.replace(config, model=str(tmp_path / "1-w/best"))
    wanted = merge(loading.load_model(first)[0])
    merged, _ = M.load_pretrained(base)
    assert all(map(torch.equal, merged.parameters(), wanted.parameters()))
    moved, before = merged.layers[0].mlp.up_proj, start.layers[0].mlp.up_proj
    assert not torch.equal(moved.weight, before.weight)
    assert read(best / "adapter_config.json")["base_model_name_or_path"] == str(base)
    assert result["model"] == str(best)


def test_a_result_that_was_not_written_is_written_by_the_next_command(model, tokenizer, tmp_path):
    def compose(**options):
        config = dataclasses.replace(SMALL, strategy="w")
        return P.compose(
            loose(always_one), config, tmp_path, lambda stage: (model, tokenizer), **options
        )

    first = compose()
    # killed before
    (tmp_path / "result.json").unlink()
    again = compose(stop=always)
    assert again == first == read(tmp_path / "result.json")


def test_what_cannot_be_afforded_or_read_is_refused_before_anything_runs(tmp_path, monkeypatch):
    out = tmp_path / "out"
    for more, culprit in (
        ({"budget": 30}, "--budget 30"),
        ({"strategy": "w -> p", "instructions": "no.json"}, "no.json"),
        ({"strategy": "p -> w", "temperature": 0.0}, "--temperature 0"),
    ):
        with pytest.raises((InputError, CheckpointError), match=culprit):
            P.compose(loose(), dataclasses.replace(SMALL, **more), out, None)

    monkeypatch.setenv("MMGRPO_PROPOSER", "one-word")
    with pytest.raises(InputError, match="MMGRPO_PROPOSER"):
        P.compose(loose(), SMALL, out, None)
    assert not out.exists()


# --------------------------------------------------------------------------------- the command line
OPTIONS = [
    *("--task", "banking77"),
    *("--trials", "2"),
    *("--full-every", "2"),
    *("--minibatch", "4"),
    *("--eval-examples", "4"),
    *("--bootstrap", "8"),
    *("--steps", "1"),
    *("--examples", "2"),
    *("--rollouts", "2"),
]


def check_two_stages(folder, out, error):
    trials = [line.split()[1] for line in error.splitlines() if line.startswith("trial ")]
    assert trials == [str(i) for i in range(len(trials_of(folder / "1-p")))]
    for said in ("1-p: dev score", "2-w: dev score", "banking77 dev score:"):
        assert said in out

    result = read(folder / "result.json")
    assert [stage["stage"] for stage in result["stages"]] == ["1-p", "2-w"]
    assert (folder.parent.parent / result["model"] / "model.safetensors").is_file()


def check_other_commands(home, run):
    to_weights = ["train", *OPTIONS, "--out", "weights"]
    run(*to_weights)
    # as if killed before: the same command ends it
    result = home / "weights/result.json"
    result.unlink()
    run(*to_weights)
    assert result.exists()
    assert "finished at step 1" in run(*to_weights, code=2)[1]

    run("prompts", *OPTIONS, "--out", "mine")
    assert (home / "mine/prompts.json").is_file()


def check_what_is_refused(folder, run):
    again = ["train", *OPTIONS, "--out", "runs/banking77", "--strategy"]
    _, error = run(*again, "w -> p", code=2)
    assert "begun with --strategy p -> w" in error

    # the second stage is of the first one's prompts
    before = (folder / "config.json").read_text()
    for option, value in (("--trials", "3"), ("--steps", "2"), ("--lr", "0.1")):
        _, error = run(*again, "p -> w", option, value, code=2)
        assert f"begun with {option}" in error
        assert (folder / "config.json").read_text() == before


def check_replays_and_scores(run):
    out, _ = run("replay", "runs/banking77/2-w", "1")
    assert "token for token those" in out
    _, error = run("replay", "runs/banking77", "1", code=2)
    assert "runs/banking77/2-w does" in error

    best = ["--model", "runs/banking77/2-w/best"]
    score = ["eval", "--task", "banking77", *best, "--eval-examples", "4"]
    assert "was trained with --prompts" in run(*score)[1]
    _, error = run(*score, "--prompts", "runs/banking77/1-p/prompts.json")
    assert "note:" not in error


def test_the_command_line_searches_prompts_and_then_trains(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(*argv, code=0):
        """Run a command that ends with this code -> (output, errors)."""
        capsys.readouterr()
        assert cli.main([*argv]) == code
        return capsys.readouterr()

    out, error = run("train", *OPTIONS, "--strategy", "p -> w")
    check_two_stages(tmp_path / "runs/banking77", out, error)
    check_other_commands(tmp_path, run)
    check_what_is_refused(tmp_path / "runs/banking77", run)
    check_replays_and_scores(run)

    run("train", *OPTIONS, "--strategy", "x", code=2)
    assert not (tmp_path / "runs/banking77-2").exists()
