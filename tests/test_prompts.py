"""Prompt search and its composition with training: candidates, the search, resuming, budgets."""
import dataclasses
import json
import random

import pytest
import torch
from conftest import make_model
from hypothesis import given
from hypothesis import strategies as st

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
    Prediction,
    Program,
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


class Two(Program):
    def __init__(self):
        self.ask, self.note = Module("x -> y", "Ask."), Module("x, y -> z", "Note.")

    async def forward(self, x):
        y = (await self.ask(x=x)).y
        return Prediction(z=(await self.note(x=x, y=y)).z)


def make_task(**more):
    examples = [{"x": f"word {i}", "z": "gold"} for i in range(12)]
    return Task(Two(), lambda e, p: 1.0, examples[:4], examples[4:8], examples[8:], instructions={
        "ask": ("Ask.", "Ask well.", "Ask badly."), "note": ("Note well.",)}, **more)


CONFIG = G.Config(trials=7, full_every=3, minibatch=2, demo_sets=2, demos=1, max_tokens=4, max_calls=2, bootstrap=4)


class Scripted:
    """In the place of a sampler: answers by module."""
    def __init__(self, *_, answers=None, **__):
        self.answers, self.waiting, self.seconds = answers or {"ask": "<y>yes</y>", "note": "<z>no</z>"}, [], 0.0

    def submit(self, messages, key):
        self.waiting.append((len(self.waiting), key[4], messages))
        return self.waiting[-1][0]

    def advance(self):
        done, self.waiting = [w for w in self.waiting if w[2]], [(t, m, None) for t, m, _ in self.waiting]
        return [(t, Completion([1], [2], [-0.1], "stop", self.answers[m])) for t, m, _ in done]


@pytest.fixture
def scripted(monkeypatch):
    """Runs are scripted; what is scored depends on the prompts, the seed and the step: a search without an LM."""
    monkeypatch.setattr(G, "Sampler", Scripted)

    def evaluate(model, tokenizer, task, examples, config, temperature, step=-1):
        rng = random.Random(repr((prompts_of(task.program), step, examples)))
        return {"score": rng.random(), "stderr": 0.0, "statuses": {}, "measures": {}, "rollouts": len(examples), "tokens": 3, "seconds": 0.5}
    monkeypatch.setattr(P, "evaluate", evaluate)


def trials_of(folder):
    return [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------------------------- candidates
def run_of(*calls, reward=1.0, status="completed"):
    return Trajectory(0, 0, tuple(Call(m, 0, i, Completion([], [], [], "stop"), o) for m, i, o in calls), {}, reward, status)


def test_demonstrations_are_the_modules_own_calls_in_good_runs():
    good = run_of(("ask", {"x": "a"}, {"y": "b"}), ("ask", {"x": "c"}, {"y": "d"}), ("note", {"x": "a", "y": "b"}, {"z": "e"}))
    bad, failed = run_of(("ask", {"x": "f"}, {"y": "g"}), reward=0.4), run_of(("ask", {"x": "h"}, {"y": "i"}), status="format_error")
    unread, odd = run_of(("ask", {"x": "j"}, None)), run_of(("ask", {"x": {1, 2}}, {"y": "k"}), ("note", {"x": (1,), "y": ""}, {"z": ""}))
    excluded = run_of(("ask", {"x": "l"}, {"y": "m"}), reward=None, status="tool_error")
    assert P.cut_demos([good, bad, failed, unread, odd, excluded], 0.5) == {
        "ask": [[{"x": "a", "y": "b"}, {"x": "c", "y": "d"}]], "note": [[{"x": "a", "y": "b", "z": "e"}]]}


@given(runs=st.lists(st.lists(st.integers(0, 9).map(lambda i: {"x": str(i), "y": "y"}), min_size=1, max_size=3), max_size=6),
       labelled=st.lists(st.just({"x": "l", "y": "m"}), max_size=2), sets=st.integers(0, 5), most=st.integers(0, 3))
def test_demo_sets_are_different_and_of_as_many_runs(runs, labelled, sets, most):
    found = P.demo_sets(Two().ask, runs, labelled, G.Config(demo_sets=sets, demos=most), "ask")
    assert len(found) <= sets and all(1 <= len(s) <= most for s in found) and all(found.count(s) == 1 for s in found)
    assert all(d in labelled or any(d in r for r in runs) for s in found for d in s)
    if runs and sets and most:
        assert found


def test_candidates_begin_with_the_present_prompts_and_count_their_runs(scripted):
    task = make_task()
    task.program.ask.demos = [{"x": "old", "y": "demo"}]
    found = P.candidates(task, None, None, CONFIG)
    assert found["modules"]["ask"]["instructions"] == ["Ask.", "Ask well.", "Ask badly."]
    assert found["modules"]["note"]["instructions"] == ["Note.", "Note well."]
    assert found["modules"]["ask"]["demos"][0] == [{"x": "old", "y": "demo"}] and len(found["modules"]["ask"]["demos"]) > 1
    assert found["rollouts"] == 4 and found["good_runs"] == 4 and found["tokens"] == 8


@pytest.mark.parametrize("text, why", [("", "empty"), ("x" * 2001, "over-long"), ("Say <y>.", "has tags"), ("a </answer>", "has tags"),
                                       ("a <|im_end|>", "has tags"), ("Known.", "known"), ("Is 1 < 2 > 0?", ""), ("Good.", "")])
def test_instructions_that_cannot_be_used_are_told_why(text, why):
    assert P.flaw(text, ["Known."]) == why


def test_proposals_are_asked_for_per_module_and_the_useless_ones_dropped_and_counted():
    seen, texts = [], iter(["First.", "", "First.", "<b>", None, "Second."])

    class Writer(Scripted):
        def submit(self, messages, key):
            seen.append((key[4], messages[-1]["content"]))
            text = "some words" if key[4] == "describe" else next(texts)
            tag = "description" if key[4] == "describe" else "proposed_instruction"
            self.waiting.append((len(self.waiting), "?" if text is None else f"<{tag}>\n{text}\n</{tag}>".replace("<b>", "&lt;b>"), messages))
            return self.waiting[-1][0]

        def advance(self):
            done, self.waiting = [w for w in self.waiting if w[2]], [(t, x, None) for t, x, _ in self.waiting]
            return [(t, Completion([], [], [], "stop", x)) for t, x, _ in done]
    demos = {"ask": [[{"x": "a trace", "y": "b"}]]}
    written, dropped, runs = P.propose(make_task(), demos, dataclasses.replace(CONFIG, proposals=3), Writer())
    assert written == {"ask": ["First."], "note": ["Second."]} and len(runs) == 6
    assert dropped == {"empty": 1, "known": 1, "has tags": 1, "format_error": 1}
    asked = [text for module, text in seen if module == "propose"]
    assert len(asked) == 6 and "a trace" in asked[0] and "Ask." in asked[0] and "some words" in asked[0] and "x, y" in asked[3]
    assert "word" in next(text for module, text in seen if module == "describe")


@pytest.mark.parametrize("text, culprit", [("[", "cannot be read"), ("[]", "expected a JSON object"), ('{"no": []}', "no: no such module"),
                                           ('{"ask": "Ask."}', "ask: expected a list"), ('{"ask": ["", "b"]}', "ask: expected"),
                                           ('{"ask": ["a <y> b"]}', "ask: expected"), ('{"ask": ["Half \\ud83d."]}', "ask: expected")])
def test_a_list_of_instructions_that_cannot_be_used_is_refused(tmp_path, text, culprit):
    (tmp_path / "i.json").write_text(text)
    with pytest.raises((InputError, CheckpointError), match=f"i.json: .*{culprit}"):
        P.given_instructions(make_task(), dataclasses.replace(CONFIG, instructions=str(tmp_path / "i.json")))
    (tmp_path / "i.json").write_text('{"ask": ["One.", "Two."]}')
    assert P.given_instructions(make_task(), dataclasses.replace(CONFIG, instructions=str(tmp_path / "i.json"))) == {"ask": ["One.", "Two."]}
    with pytest.raises(InputError, match="--task hover: its instructions: ask: expected a list"):
        P.given_instructions(dataclasses.replace(make_task(), instructions={"ask": "Ask."}), CONFIG)


TRIAL = {"trial": 1, "choice": [0, 1, 0], "score": 0.5, "full": True, "examples": 4, "rollouts": 4, "tokens": 9, "seconds": 0.5}


@pytest.mark.parametrize("line, culprit", [(b"{", "is no JSON"), (b"\xff\xfe", "is no JSON"), (b"3", "is no trial"), *(
    (json.dumps(TRIAL | wrong).encode(), "is no trial") for wrong in (
        {"choice": [9, 0, 0]}, {"choice": [0]}, {"score": float("nan")}, {"trial": 2}, {"seconds": None}, {"rollouts": "4"}, {"tokens": 0.5}))])
def test_trials_that_are_none_are_refused_by_line(tmp_path, line, culprit):
    first, path = json.dumps(TRIAL | {"trial": 0}).encode(), tmp_path / "trials.jsonl"
    path.write_bytes(b"%s\n%s\n" % (first, json.dumps(TRIAL).encode()))
    assert len(P.read_trials(path, [3, 2, 2])) == 2
    path.write_bytes(b"%s\n%s\n%s\n" % (first, line, first))
    with pytest.raises(InputError, match=f"trials.jsonl, line 2: {culprit}"):
        P.read_trials(path, [3, 2, 2])


@pytest.mark.parametrize("text", ["{}", '{"config": {}, "start": {"ask": {}}, "modules": {}, "good_runs": 1, "rollouts": 1, "dropped": {}}',
                                  '{"config": {}, "start": 3, "modules": [], "good_runs": 1, "rollouts": 1, "dropped": {}}'])
def test_candidates_that_are_none_are_refused(scripted, tmp_path, text):
    (tmp_path / "candidates.json").write_text(text)
    with pytest.raises(InputError, match="candidates.json: is not as a search of this program writes it"):
        P.search(make_task(), None, None, CONFIG, tmp_path)


@pytest.mark.parametrize("place, value", [("start", {}), ("start/ask/descriptions", None), ("start/ask/instruction", 5), ("modules/note/instructions", ["", 5]),
                                          ("modules/note/demos", [[], "x"]), ("modules/note/demos", [[], ["x"]]), ("seconds", "1"), ("dropped", 3)])
def test_candidates_that_were_changed_are_refused(scripted, tmp_path, place, value):
    P.search(make_task(), None, None, CONFIG, tmp_path)
    kept = json.loads((tmp_path / "candidates.json").read_text())
    *outer, last = place.split("/")
    inner = kept
    for key in outer:
        inner = inner[key]
    inner[last] = value
    (tmp_path / "candidates.json").write_text(json.dumps(kept))
    with pytest.raises(InputError, match="candidates.json: is not as a search of this program writes it"):
        P.search(make_task(), None, None, CONFIG, tmp_path)


def test_candidates_of_another_program_are_refused(scripted, tmp_path):
    P.search(make_task(), None, None, CONFIG, tmp_path)
    task = make_task()
    task.program.more = Module("x -> y", "More.")
    with pytest.raises(InputError, match="candidates.json: is not as a search of this program writes it"):
        P.search(task, None, None, CONFIG, tmp_path)


def test_a_file_of_prompts_that_changed_is_another_option(scripted, tmp_path):
    task, config = make_task(), dataclasses.replace(CONFIG, prompts=str(tmp_path / "given.json"))
    P.search(task, None, None, config, tmp_path, stop=lambda: True)
    P.search(make_task(), None, None, config, tmp_path)
    task = make_task()
    task.program.ask.instruction = "Ask again."
    with pytest.raises(InputError, match=r"begun with --prompts \S*given.json \(which says \w+\), not \S*given.json \(which says"):
        P.search(task, None, None, config, tmp_path)


def test_a_program_runs_on_an_endpoint_as_on_a_sampler():
    def endpoint(messages):
        return "<y>fine</y>" if "Ask." in messages[0]["content"] else "<z>done</z>"
    runs = run_programs(Two(), [{"x": "1"}, {"x": "2"}], lambda e, p: 1.0, Remote(endpoint), rollouts=3)
    assert [t.status for t in runs] == ["completed"] * 6 and runs[0].prediction == {"z": "done"}
    def broken(messages):
        raise ToolError("no answer")
    with pytest.raises(ToolError, match="no answer"):
        run_programs(Two(), [{"x": "1"}], lambda e, p: 1.0, Remote(broken))


# ----------------------------------------------------------------------------------------------------------- search
@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4), tried=st.integers(0, 30), seed=st.integers(0, 99))
def test_choices_are_candidates_and_new_ones_first(sizes, tried, seed):
    rng = random.Random(seed)
    scored = {tuple(rng.randrange(n) for n in sizes): rng.random() for _ in range(tried)}
    choice = P.next_choice(sizes, scored, rng)
    assert len(choice) == len(sizes) and all(0 <= k < n for k, n in zip(choice, sizes))


@pytest.mark.parametrize("startup", [0, 8])
@pytest.mark.parametrize("new", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_a_choice_that_was_not_tried_comes_first(startup, new):
    scored = {c: float(c == (1, 1)) for c in [(0, 0), (0, 1), (1, 0), (1, 1)] if c != new}
    assert P.next_choice([2, 2], scored, random.Random(0), startup=startup, draws=200) == new


def test_the_search_finds_what_is_good_sooner_than_chance():
    """Four places of six candidates, a score that adds up, noise: after 40 trials the best tried is better than with uniform draws."""
    def best(seed, startup):
        rng, sizes, scored = random.Random(seed), [6] * 4, {}
        value = [[rng.random() for _ in range(6)] for _ in sizes]
        true = lambda c: sum(v[k] for v, k in zip(value, c))
        for _ in range(40):
            choice = P.next_choice(sizes, scored, rng, startup=startup)
            scored[choice] = true(choice) + rng.gauss(0, 0.1)
        return true(max(scored, key=scored.get))
    gains = [best(seed, 8) - best(seed, 1000) for seed in range(20)]
    assert sum(gains) / 20 > 0.1 and sum(g >= 0 for g in gains) >= 14


@given(seed=st.integers(0, 999), trials=st.integers(0, 12), every=st.integers(1, 5))
def test_the_start_comes_first_and_every_search_ends(seed, trials, every):
    rng, config, done = random.Random(seed), dataclasses.replace(CONFIG, trials=trials, full_every=every, seed=seed), []
    while (trial := P.next_trial([3, 2], done, config)):
        done.append({"choice": trial[0], "full": trial[1], "examples": 4 if trial[1] else 2, "score": rng.random()})
        assert len(done) < 40
    whole = [t for t in done if t["full"]]
    assert done[0]["full"] and done[0]["choice"] == (0, 0) and sum(not t["full"] for t in done) <= trials
    assert sum(not t["full"] for t in done) == trials or len(whole) == 6
    assert len({t["choice"] for t in whole}) == len(whole) <= 1 + -(-trials // every)
    if trials and {t["choice"] for t in done} != {(0, 0)}:
        assert len(whole) > 1
    assert all(P.next_trial([3, 2], done, dataclasses.replace(config, trials=fewer)) is None or done[-1]["full"] is False
               for fewer in range(trials))                      # with fewer trials it has ended as well


def test_the_best_of_all_dev_is_kept_and_written(scripted, tmp_path):
    task = make_task()
    scores = P.search(task, None, None, CONFIG, tmp_path)
    trials = trials_of(tmp_path)
    assert scores == [t["score"] for t in trials if t["full"]] and len(scores) > 1
    best = prompts_of(task.program)
    other = make_task()
    load_prompts(other.program, tmp_path / "prompts.json")
    assert prompts_of(other.program) == best
    kept = json.loads((tmp_path / "candidates.json").read_text())
    choice = max((t for t in trials if t["full"]), key=lambda t: t["score"])["choice"]
    places = [(m, k) for m in kept["modules"] for k in ("instructions", "demos") if len(kept["modules"][m][k]) > 1]
    for (module, kind), k in zip(places, choice):
        assert best[module]["instruction" if kind == "instructions" else kind] == kept["modules"][module][kind][k]


@pytest.mark.parametrize("killed_after", [0, 1, 3, 8])
@pytest.mark.parametrize("torn", [False, True])
def test_a_search_that_was_killed_ends_as_if_it_had_not_been(scripted, tmp_path, killed_after, torn):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    first, second, calls = make_task(), make_task(), []
    P.search(first, None, None, CONFIG, whole)
    P.search(make_task(), None, None, CONFIG, resumed, stop=lambda: len(calls.append(1) or calls) > killed_after)
    assert len(trials_of(resumed)) == killed_after
    if torn:
        with (resumed / "trials.jsonl").open("a") as log:
            log.write('{"trial": 99, "cho')
    P.search(second, None, None, CONFIG, resumed)
    assert trials_of(whole) == trials_of(resumed) and prompts_of(first.program) == prompts_of(second.program)
    assert not (resumed / "prompts.json").exists() or P.search(make_task(), None, None, CONFIG, resumed)
    with pytest.raises(InputError, match="begun with --minibatch 2, not 3"):
        P.search(make_task(), None, None, dataclasses.replace(CONFIG, minibatch=3), resumed)


def test_a_program_with_nothing_to_choose_keeps_its_prompts(scripted, tmp_path):
    task = dataclasses.replace(make_task(), instructions={})
    before = prompts_of(task.program)
    assert len(P.search(task, None, None, dataclasses.replace(CONFIG, demos=0), tmp_path)) == 1
    assert prompts_of(task.program) == before == json.loads((tmp_path / "prompts.json").read_text())


def test_what_changed_in_the_prompts_is_shown_as_a_diff():
    before = prompts_of(Two())
    after = before | {"ask": {"instruction": "Ask well.", "demos": [{"x": "a"}]}}
    assert difference(before, after).splitlines() == ["--- ask", "+++ ask", "@@ -1 +1,2 @@", "-Ask.", "+Ask well.", '+demo: {"x": "a"}']
    assert difference(before, before) == "the prompts are as they were"


# ------------------------------------------------------------------------------------------------------ composition
@pytest.mark.parametrize("strategy, kinds", [("w", "w"), ("p->w", "pw"), ("w -> p", "wp"), ("p -> w -> p", "pwp"), ("(p -> w) x 3", "pwpwpw")])
def test_strategies_are_stages_in_turn(strategy, kinds):
    assert "".join(P.stages(strategy)) == kinds


@pytest.mark.parametrize("strategy", ["", "p w", "q", "p ->", "(p -> w) x 0", "p -> (w x 2)", "(p"])
def test_a_strategy_that_cannot_be_read_is_refused(strategy):
    with pytest.raises(InputError, match="--strategy"):
        P.stages(strategy)


PAIR = Task(Two(), lambda e, p: 1.0, [{"x": str(i)} for i in range(5)], [{"x": "dev"}] * 3, [], instructions={
    "ask": ("Ask well.", "Ask."), "note": tuple(f"Note {i}." for i in range(9))})
SMALL = G.Config(examples=2, rollouts=3, max_tokens=4, max_calls=2, slots=8, steps=2, trials=3, full_every=2, minibatch=2, demos=1,
                 bootstrap=2, eval_every=2, strategy="p -> w")


class Loose(Two):
    """Whatever a random LM says will do; the score is made of it, so that prompts and weights matter."""
    async def forward(self, x):
        for module, inputs in ((self.ask, {"x": x}), (self.note, {"x": x, "y": ""})):
            try:
                await module(**inputs)
            except ValueError:
                pass
        return Prediction(x=x)


def loose(metric=None):
    return dataclasses.replace(PAIR, program=Loose(), metric=metric or (lambda e, p: random.Random(repr((e, id(p)))).random()))


def test_weights_are_trained_under_the_prompts_that_were_found(model, tokenizer, tmp_path, monkeypatch):
    """What is trained is what was sampled: instruction and demos of the search stand in every prompt of the loss."""
    seen, original = [], G.step_gradient
    monkeypatch.setattr(G, "step_gradient", lambda model, rows, *a, **o: (seen.extend(rows), original(model, rows, *a, **o))[1])
    def search(task, model, tokenizer, config, out, stop):
        (out / "trials.jsonl").write_text("")
        task.program.ask.instruction, task.program.ask.demos = "Ask it so.", [{"x": "violet", "y": "crimson"}]
        save_prompts(task.program, out / "prompts.json")
        return [0.0, 0.1]
    monkeypatch.setattr(P, "search", search)
    task = loose()
    result = P.compose(task, SMALL, tmp_path, lambda config: (model, tokenizer))
    own = [tokenizer.decode(r.completion.prompt_ids) for r in seen if r.module == "ask"]
    assert own and all("Ask it so." in text and "violet" in text and "crimson" in text for text in own)
    assert result["prompts"] == str(tmp_path / "1-p" / "prompts.json") and result["model"] == str(tmp_path / "2-w" / "best")


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
    spent = [s["rollouts"] for s in result["stages"]]
    assert sum(spent) == sum(made) <= 60 and all(n <= 30 for n in spent)
    assert cost(tmp_path / "1-p")["rollouts"] == spent[0]
    probe = json.loads((tmp_path / "1-p/start.json").read_text())["rollouts"]
    for kind, taken, left in (("p", spent[0] - probe, 30 - S.most_rollouts(PAIR, config)), ("w", spent[1], 30)):
        n = P.affordable(kind, PAIR, config, left)
        assert taken <= P.rollouts(kind, n, PAIR, config) <= left < P.rollouts(kind, n + 1, PAIR, config)
    with pytest.raises(InputError, match="--budget 60"):
        P.affordable("w", PAIR, config, 5)
    assert P.affordable("w", PAIR, config, 10**15) > 10**14                 # at once


def test_stages_go_on_where_they_were_stopped(tokenizer, tmp_path):
    fresh = lambda stage: (make_model(vocab_size=tokenizer.size) if stage.model == "start" else M.load_pretrained(stage.model)[0], tokenizer)
    config = dataclasses.replace(SMALL, model="start", strategy="(p -> w) x 2", eval_every=1)
    whole = P.compose(loose(lambda e, p: 1.0), config, tmp_path / "whole", fresh)
    for limit in (2, 5, 9, 99):
        calls = []
        again = P.compose(loose(lambda e, p: 1.0), config, tmp_path / "parts", fresh, stop=lambda: len(calls.append(1) or calls) > limit)
        assert (again is not None) == (tmp_path / "parts/result.json").exists() == (len(calls) <= limit)
    strip = lambda result: [{k: v for k, v in s.items() if k != "seconds"} for s in result["stages"]]
    assert strip(whole) == strip(again) and len(whole["stages"]) == 4
    assert [m["digest"] for m in read_metrics(tmp_path / "whole" / "4-w")[0]] == [m["digest"] for m in read_metrics(tmp_path / "parts" / "4-w")[0]]
    first, third = (read_metrics(tmp_path / "whole" / f)[0] for f in ("2-w", "4-w"))
    assert first[0]["digest"] != third[0]["digest"]                 # the second round draws anew


def test_all_rounds_are_scored_with_the_same_random_numbers(model, tokenizer, monkeypatch):
    seeds, original = [], G.play
    monkeypatch.setattr(G, "play", lambda *args: (seeds.append(args[4].seed), original(*args))[1])
    stages = P.plan(PAIR, dataclasses.replace(SMALL, strategy="(p -> w) x 2", seed=7))
    for _, stage in stages:
        G.evaluate(model, tokenizer, loose(), PAIR.dev, stage, 1.0)
    assert seeds == [7] * 4 and [stage.seed for _, stage in stages] == [7, 7, 1007, 1007]


def test_a_second_training_with_lora_starts_from_the_merged_first(tokenizer, tmp_path):
    start = make_model(vocab_size=tokenizer.size)
    M.save_pretrained(start, tokenizer, tmp_path / "start")
    config = dataclasses.replace(SMALL, model=str(tmp_path / "start"), strategy="w -> p -> w", lora_rank=2, lr=0.01, warmup=0, eval_every=1)
    score = lambda e, p: float(len(scored.append(1) or scored))         # better and better: the last weights are the best
    scored = []
    result = P.compose(loose(score), config, tmp_path, loading.load_model)
    merged, base = M.load_pretrained(tmp_path / "3-w" / "base")[0], merge(loading.load_model(dataclasses.replace(config, model=str(tmp_path / "1-w/best")))[0])
    assert all(torch.equal(a, b) for a, b in zip(merged.parameters(), base.parameters()))
    assert not torch.equal(merged.layers[0].mlp.up_proj.weight, start.layers[0].mlp.up_proj.weight)
    last = json.loads((tmp_path / "3-w/best/adapter_config.json").read_text())
    assert last["base_model_name_or_path"] == str(tmp_path / "3-w" / "base") and result["model"] == str(tmp_path / "3-w" / "best")


def test_a_result_that_was_not_written_in_time_is_written_by_the_next_command(model, tokenizer, tmp_path):
    config = dataclasses.replace(SMALL, strategy="w")
    first = P.compose(loose(lambda e, p: 1.0), config, tmp_path, lambda stage: (model, tokenizer))
    (tmp_path / "result.json").unlink()                     # killed before
    again = P.compose(loose(lambda e, p: 1.0), config, tmp_path, lambda stage: (model, tokenizer), stop=lambda: True)
    assert again == first == json.loads((tmp_path / "result.json").read_text())


def test_what_cannot_be_afforded_or_read_is_refused_before_anything_is_run(tmp_path, monkeypatch):
    for more, culprit in (({"budget": 30}, "--budget 30"), ({"strategy": "w -> p", "instructions": "no.json"}, "no.json"),
                          ({"strategy": "p -> w", "temperature": 0.0}, "--temperature 0")):
        with pytest.raises((InputError, CheckpointError), match=culprit):
            P.compose(loose(), dataclasses.replace(SMALL, **more), tmp_path / "out", None)
    monkeypatch.setenv("MMGRPO_PROPOSER", "one-word")
    with pytest.raises(InputError, match="MMGRPO_PROPOSER"):
        P.compose(loose(), SMALL, tmp_path / "out", None)
    assert not (tmp_path / "out").exists()


def test_the_command_line_searches_prompts_and_then_trains(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--task", "banking77", "--trials", "2", "--full-every", "2", "--minibatch", "4", "--eval-examples", "4", "--bootstrap", "8",
               "--steps", "1", "--examples", "2", "--rollouts", "2"]
    assert cli.main(["train", *options, "--strategy", "p -> w"]) == 0
    said, told = capsys.readouterr()
    trials = (tmp_path / "runs/banking77/1-p/trials.jsonl").read_text().splitlines()
    assert [line.split()[1] for line in told.splitlines() if line.startswith("trial ")] == [str(i) for i in range(len(trials))]
    assert "1-p: dev score" in said and "2-w: dev score" in said and "banking77 dev score:" in said
    result = json.loads((tmp_path / "runs/banking77/result.json").read_text())
    assert [s["stage"] for s in result["stages"]] == ["1-p", "2-w"] and (tmp_path / result["model"] / "model.safetensors").is_file()
    assert cli.main(["train", *options, "--out", "weights"]) == 0
    (tmp_path / "weights/result.json").unlink()             # as if killed before: the same command ends it
    assert cli.main(["train", *options, "--out", "weights"]) == 0 and (tmp_path / "weights/result.json").exists()
    assert cli.main(["train", *options, "--out", "weights"]) == 2 and "finished at step 1" in capsys.readouterr().err
    assert cli.main(["prompts", *options, "--out", "mine"]) == 0 and (tmp_path / "mine" / "prompts.json").is_file()
    assert cli.main(["train", *options, "--strategy", "w -> p", "--out", "runs/banking77"]) == 2
    assert "begun with --strategy p -> w" in capsys.readouterr().err
    before = (tmp_path / "runs/banking77/config.json").read_text()
    for changed in (["--trials", "3"], ["--steps", "2"], ["--lr", "0.1"]):          # the second stage is of the first one's prompts
        assert cli.main(["train", *options, "--strategy", "p -> w", "--out", "runs/banking77", *changed]) == 2
        assert f"begun with {changed[0]}" in capsys.readouterr().err and (tmp_path / "runs/banking77/config.json").read_text() == before
    assert cli.main(["replay", "runs/banking77/2-w", "1"]) == 0 and "token for token those" in capsys.readouterr().out
    assert cli.main(["replay", "runs/banking77", "1"]) == 2 and "runs/banking77/2-w does" in capsys.readouterr().err
    score = ["eval", "--task", "banking77", "--model", "runs/banking77/2-w/best", "--eval-examples", "4"]
    assert cli.main(score) == 0 and "was trained with --prompts" in capsys.readouterr().err
    assert cli.main([*score, "--prompts", "runs/banking77/1-p/prompts.json"]) == 0 and "note:" not in capsys.readouterr().err
    assert cli.main(["train", *options, "--strategy", "x"]) == 2 and not (tmp_path / "runs/banking77-2").exists()
