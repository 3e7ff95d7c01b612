"""Where a run starts: labelled demonstrations, how many of them are chosen, and steps on readable calls first."""
import dataclasses
import json
import random
from types import SimpleNamespace

import pytest
import torch
from conftest import make_model
from hypothesis import given
from hypothesis import strategies as st
from strategies import trajectory

import mmgrpo as G
import model as M
from lm.tokenizer import CheckpointError
from program import Completion, InputError, Module, Prediction, Program, Task, parse, render_outputs
from prompts import search as P
from prompts import start as S
from prompts.files import load_prompts, prompts_of
from run import cli
from run.records import cost, read_metrics
from tasks import banking77, hover, papillon


class Two(Program):
    def __init__(self):
        self.ask, self.note = Module("x -> y", "Ask."), Module("x, y -> z", "Note.")

    async def forward(self, x):
        y = (await self.ask(x=x)).y
        return Prediction(z=(await self.note(x=x, y=y)).z)


def shown(example):
    """An example shows one call of `ask` and two of `note`."""
    x = example["x"]
    return {"ask": [{"x": x, "y": f"yes {x}"}], "note": [{"x": x, "y": f"yes {x}", "z": f"{i} of {x}"} for i in range(2)]}


def make_task(train=40, demonstrate=shown, program=Two, metric=lambda e, p: 1.0):
    examples = [{"x": f"word {i}"} for i in range(train)]
    return Task(program(), metric, examples, [{"x": "dev"}] * 3, [{"x": "test"}] * 3, demonstrate=demonstrate)


CONFIG = G.Config(examples=3, rollouts=3, max_tokens=4, max_calls=2, slots=8, steps=3, eval_every=3, trials=2, minibatch=2,
                  demos=0, model="start")


class Reads:
    """In the place of a sampler: readable answers where the prompt has at least `needed` demonstrations, and, by chance, a
    share of `luck` of the others."""
    needed, luck, seen = 4, 0.0, []

    def __init__(self, *_, **__):
        self.waiting, self.seconds = [], 0.0

    def submit(self, messages, key):
        demos = sum(m["role"] == "assistant" for m in messages)
        good = demos >= self.needed or random.Random(repr(key)).random() < self.luck
        self.seen.append((key, messages))
        self.waiting.append((len(self.waiting), f"<y>yes</y><z>{demos}</z>" if good else "What?"))
        return self.waiting[-1][0]

    def advance(self):
        done, self.waiting = [w for w in self.waiting if w[1]], [(ticket, None) for ticket, _ in self.waiting]
        return [(ticket, Completion([1], [2], [-0.1], "stop", text)) for ticket, text in done]


@pytest.fixture
def reads(monkeypatch):
    monkeypatch.setattr(G, "Sampler", Reads)
    monkeypatch.setattr(Reads, "needed", 4)
    monkeypatch.setattr(Reads, "luck", 0.0)
    monkeypatch.setattr(Reads, "seen", [])
    return Reads


def wide_model(tokenizer):
    """A random LM whose context has room for eight demonstrations."""
    return make_model(vocab_size=tokenizer.size, max_position_embeddings=4096)


WIDE = SimpleNamespace(config=SimpleNamespace(max_positions=10**6))


def begun(task, tokenizer, out, model=WIDE, config=CONFIG):
    """start.json of a run that begins."""
    assert S.begin(task, model, tokenizer, config, out) == any(m.demos for m in task.program.modules().values())
    return json.loads((out / "start.json").read_text())


# ------------------------------------------------------------------------------------------------ which start is chosen

def test_where_the_program_as_given_is_readable_it_is_the_start(reads, tokenizer, tmp_path, capsys):
    reads.needed = 0
    task = make_task()
    before = prompts_of(task.program)
    kept = begun(task, tokenizer, tmp_path)
    assert prompts_of(task.program) == before and not any(kept["demos"].values())
    assert kept["rollouts"] == S.PROBE and [p["demos"] for p in kept["probes"]] == [0]
    assert "the start is the program as given: 100% of its LM calls on training examples can be read" in capsys.readouterr().out


def test_of_candidates_that_are_as_readable_and_as_good_the_one_with_fewest_demonstrations_is_the_start(reads, tokenizer, tmp_path, capsys):
    task = make_task()
    kept = begun(task, tokenizer, tmp_path)
    assert [(p["demos"], p["readable"]) for p in kept["probes"]] == [(0, 0), (2, 0), (4, 1), (8, 1)]
    assert {name: len(m.demos) for name, m in task.program.modules().items()} == {"ask": 4, "note": 4}
    assert kept["rollouts"] == 4 * S.PROBE and kept["tokens"] == 6 * S.PROBE         # of two calls, where the first is readable
    said = capsys.readouterr().out
    assert "the start is 4 labelled demonstrations per module: 100% of its LM calls" in said
    assert "(as given 0%, with 2 0%, with 8 100%)" in said


def test_of_candidates_that_are_as_readable_the_one_with_the_best_score_is_the_start(reads, tokenizer, tmp_path):
    task = make_task(metric=lambda e, p: float(p.z == "8"))
    assert len(begun(task, tokenizer, tmp_path)["demos"]["ask"]) == 8


def test_a_readable_candidate_beats_one_of_better_score(reads, tokenizer, tmp_path):
    reads.needed, reads.luck = 8, 0.5                       # a fourth of all runs is readable without
    kept = begun(make_task(metric=lambda e, p: float(p.z == "0") * 9 + 0.1), tokenizer, tmp_path)
    scores = {p["demos"]: p["score"] for p in kept["probes"]}
    assert scores[0] > scores[8] > 0 and 0 < kept["probes"][0]["readable"] < S.READABLE and len(kept["demos"]["ask"]) == 8


def test_of_runs_that_all_break_off_the_calls_before_tell_the_candidates_apart(reads, tokenizer, tmp_path, monkeypatch):
    class Long(Two):
        async def forward(self, x):
            for _ in range(20):
                await super().forward(x)
    task, original = make_task(program=Long), reads.submit

    def submit(self, messages, key):
        reads.needed, reads.luck = 99, 0.1 * len(task.program.ask.demos)
        return original(self, messages, key)
    monkeypatch.setattr(reads, "submit", submit)
    kept = begun(task, tokenizer, tmp_path, config=dataclasses.replace(CONFIG, max_calls=40))
    calls = {p["demos"]: p["readable_calls"] for p in kept["probes"]}
    assert all(p["readable"] == 0 for p in kept["probes"]) and calls[0] < calls[2] < calls[4] < calls[8]
    assert len(kept["demos"]["ask"]) == 8


def test_demonstrations_that_do_not_help_are_left_out(reads, tokenizer, tmp_path, capsys):
    reads.needed = 99
    task = make_task()
    assert len(begun(task, tokenizer, tmp_path)["probes"]) == 4
    assert not task.program.ask.demos and "the program as given: 0% of its LM calls" in capsys.readouterr().out


def test_prompts_that_would_fill_the_context_are_not_tried(reads, tokenizer, tmp_path):
    task, lengths = make_task(), {}
    for n in (4, 8):
        trial = make_task()
        S.add_demos(trial.program, S.labelled_demos(trial, n, 0))
        lengths[n] = max(len(tokenizer.encode_chat(m.messages({f.name: "" for f in m.signature.inputs})))
                         for m in trial.program.modules().values())
    assert lengths[4] < lengths[8]
    narrow = SimpleNamespace(config=SimpleNamespace(max_positions=2 * lengths[8] - 1))
    assert [p["demos"] for p in begun(task, tokenizer, tmp_path, narrow)["probes"]] == [0, 2, 4]


@pytest.mark.parametrize("task, tried", [(make_task(6), [0, 2, 4]), (make_task(5), [0, 2]), (make_task(1), [0]),
                                         (make_task(demonstrate=lambda e: {}), [0]), (make_task(demonstrate=None), [0])])
def test_there_are_no_more_candidates_than_examples_show(reads, tokenizer, tmp_path, capsys, task, tried):
    reads.needed = 99
    assert [p["demos"] for p in begun(task, tokenizer, tmp_path)["probes"]] == tried
    assert ("they show no demonstrations" in capsys.readouterr().out) == (tried == [0])


def test_all_candidates_get_the_same_examples_and_none_of_their_own_demonstrations(reads, tokenizer, tmp_path):
    task = make_task()
    kept = begun(task, tokenizer, tmp_path)
    asked = [(key, m[-1]["content"]) for key, m in reads.seen if key[4] == "ask"]
    probes = [asked[i:i + S.PROBE] for i in range(0, len(asked), S.PROBE)]
    assert len(probes) == 4 and all(p == probes[0] for p in probes)
    words = {d["x"] for demos in kept["demos"].values() for d in demos}
    assert len(words) == 4 and words < {e["x"] for e in task.train}
    assert not any(f"\n{word}\n" in content for word in words for _, content in asked)


def test_demonstrations_are_of_different_examples_and_show_all_calls_in_turn():
    demos = S.labelled_demos(make_task(), 4, 0)
    assert [d["z"].split()[0] for d in demos["note"]] == ["0", "1", "0", "1"]
    assert len({d["x"] for d in demos["ask"]}) == 4 and [d["x"] for d in demos["ask"]] == [d["x"] for d in demos["note"]]
    assert S.labelled_demos(make_task(), 2, 0)["ask"] == demos["ask"][:2] != S.labelled_demos(make_task(), 2, 1)["ask"]


# ---------------------------------------------------------------------------------------------- what an example shows

def test_by_default_examples_with_fields_of_the_modules_names_are_demonstrations():
    task = make_task(demonstrate=None)
    show = lambda example: S.demonstrations(task, example)
    assert show({"x": "a", "y": "b", "other": 1}) == {"ask": [{"x": "a", "y": "b"}]}
    assert show({"x": "a", "y": "b", "z": "c"})["note"] == [{"x": "a", "y": "b", "z": "c"}]
    assert show({"x": "a"}) == show({"y": "b"}) == show({"x": "a", "y": {1}}) == {}


@pytest.mark.parametrize("demonstrate, says", [
    (lambda e: {"asks": []}, "some of the modules ask, note"), (lambda e: [], "some of the modules"),
    (lambda e: {"ask": [{"w": 1}]}, "ask: expected a list of dicts with some of x, y"), (lambda e: {"ask": [{}]}, "ask: expected"),
    (lambda e: {"note": ({"x": 1},)}, "note: expected"), (lambda e: e["gold"], "failed on a training example: KeyError: 'gold'")])
def test_what_a_task_cannot_show_is_named(demonstrate, says):
    with pytest.raises(InputError, match=says):
        S.demonstrations(make_task(), {"x": "a"}) or S.demonstrations(make_task(demonstrate=demonstrate), {"x": "a"})
        S.demonstrations(make_task(demonstrate=demonstrate), {"x": "a"})


def test_what_json_cannot_hold_is_no_demonstration():
    task = make_task(demonstrate=lambda e: {"ask": [{"x": "a", "y": ("b",)}, {"x": "c", "y": "d"}]})
    assert S.demonstrations(task, {"x": "a"}) == {"ask": [{"x": "c", "y": "d"}]}


@pytest.mark.parametrize("task", [banking77.load(), hover.load(), papillon.load()], ids=["banking77", "hover", "papillon"])
def test_the_demonstrations_of_the_tasks_are_whole_calls_of_their_training_examples(task):
    modules, names = task.program.modules(), set()
    for example in task.train:
        for name, demos in S.demonstrations(task, example).items():
            signature = modules[name].signature
            for demo in demos:
                names.add(name)
                assert demo.keys() == {f.name for f in signature.inputs + signature.outputs}
                assert parse(signature, render_outputs(signature, demo)) == {f.name: demo[f.name] for f in signature.outputs}
                assert len(demo["reasoning"].split()) < 12
                assert demo.get("text", demo.get("claim", demo.get("user_query"))) in example.values()
    assert names == modules.keys()


def test_a_demonstration_of_hover_leads_from_one_article_to_the_next():
    task = hover.load()
    for example in task.train:
        demos = S.demonstrations(task, example)
        path = [d["new_key_fact"] for d in demos["append_notes"]]
        assert [d["key_facts"] for d in demos["append_notes"]] == [path[:i] for i in range(len(path))]
        assert [d["key_facts"] for d in demos["generate_query"]] == [path[:i] for i in range(1, len(path))]
        assert [d["query"] for d in demos["generate_query"]] == example["titles"][1:]
        assert all(fact in task.program.search.articles[title] for fact, title in zip(path, example["titles"]))


def test_the_articles_that_the_claim_names_come_first_and_a_note_is_their_first_sentence():
    articles = {"B": "J. R. B is the second one that there is, of some length. It is not told.", "A": "A is short."}
    demos = hover.demonstrate(articles, {"claim": "What did A do?", "titles": ["B", "A"]})
    assert [d["query"] for d in demos["generate_query"]] == ["B"]
    assert [d["new_key_fact"] for d in demos["append_notes"]] == ["A is short.", "J. R. B is the second one that there is, of some length."]
    assert len(hover.first_sentence("word " * 99, words=15).split()) == 15


def test_a_demonstration_of_papillon_gives_nothing_away_and_answers_in_full():
    task = papillon.load()
    for example in task.train:
        craft, respond = (S.demonstrations(task, example)[name][0] for name in task.program.modules())
        prediction = Prediction(llm_request=craft["llm_request"], response=respond["response"])
        assert task.metric(example, prediction) == 1.0 and respond["related_llm_response"] == papillon.untrusted(craft["llm_request"])


def test_a_demonstration_of_pupa_is_short():
    row = {"user_query": "I am Ann. Write a poem.", "redacted": "I am [REDACTED]. Write a poem.", "target": "One. " * 30 + "Two " * 99}
    respond, = papillon.demonstrate_real(row)["respond_to_query"]
    assert respond["response"] == ("One. " * 30).strip() and respond["related_llm_request"] == row["redacted"]
    assert papillon.demonstrate_real(row | {"user_query": "word " * 41}) == papillon.demonstrate_real(row | {"redacted": ""}) == {}
    assert papillon.beginning("word " * 99) == " ".join(["word"] * 40)


# ------------------------------------------------------------------------------- no example stands in its own prompt

@given(train=st.lists(st.integers(0, 12), max_size=12), in_prompts=st.lists(st.tuples(st.sampled_from(["ask", "note"]), st.integers(0, 14)), max_size=6))
def test_exactly_the_examples_that_stand_in_a_prompt_are_left_out_of_training(train, in_prompts):
    task = make_task()
    task.train = [{"x": f"word {i}"} for i in train]
    for name, i in in_prompts:
        module = task.program.modules()[name]
        module.demos = module.demos + [shown({"x": f"word {i}"})[name][0]]
    expected = [e for e, i in zip(task.train, train) if i not in [k for _, k in in_prompts]]
    if train and not expected:
        with pytest.raises(InputError, match="every training example is a demonstration"):
            S.without_shown(task)
    else:
        assert S.without_shown(task).train == expected


class Loose(Two):
    """Whatever a random LM says will do."""
    async def forward(self, x):
        for module, inputs in ((self.ask, {"x": x}), (self.note, {"x": x, "y": ""})):
            try:
                await module(**inputs)
            except ValueError:
                pass
        return Prediction(x=x)


def loose(**more):
    return make_task(program=Loose, metric=lambda e, p: random.Random(repr((e, id(p)))).random(), **more)


@pytest.fixture
def unreadable(monkeypatch):
    """On the probe a random LM is readable by the number of demonstrations in the prompts; the calls of `evaluate` there."""
    original, probes = S.probe, []

    def probe(task, *rest):
        result = original(task, *rest)
        probes.append(len(task.program.ask.demos))
        return result | {"score": 0.0, "readable": 0.1, "readable_calls": 0.5 * (probes[-1] == 4)}
    monkeypatch.setattr(S, "probe", probe)
    return probes


@pytest.fixture
def prompted(monkeypatch):
    """The prompts that were sampled, as (step, module, what is asked, the whole prompt)."""
    seen, original = [], G.Sampler.submit

    def submit(self, messages, key):
        seen.append((key[1], key[4], messages[-1]["content"], messages))
        return original(self, messages, key)
    monkeypatch.setattr(G.Sampler, "submit", submit)
    return seen


@pytest.mark.parametrize("strategy", ["w", "p", "p -> w", "w -> p"])
def test_every_stage_is_run_under_the_start_and_on_none_of_its_examples(unreadable, prompted, tokenizer, tmp_path, strategy):
    task, config = loose(train=16), dataclasses.replace(CONFIG, strategy=strategy, steps=4)
    result = P.compose(task, config, tmp_path, lambda stage: (wide_model(tokenizer), tokenizer))
    words = [d["x"] for d in task.program.ask.demos]
    assert len(words) == 4 and unreadable == [0, 2, 4, 8]
    after = [p for p in prompted if p[0] != S.PROBE_STEP]
    assert after and all(sum(m["role"] == "assistant" for m in messages) == 4 for _, _, _, messages in after)
    assert not any(f"\n{word}\n" in asked for word in words for _, _, asked, _ in after)
    if strategy == "w":                                     # all the others are trained on: an epoch is 4 steps
        assert len({asked for step, module, asked, _ in after if step >= 0 and module == "ask"}) == 12
    assert load_after(result["prompts"]) == prompts_of(task.program)


def load_after(path):
    program = Two()
    load_prompts(program, path)
    return prompts_of(program)


# ------------------------------------------------------------------------------------------------ it is chosen once

@pytest.mark.parametrize("strategy", ["w", "p -> w"])
def test_a_run_that_goes_on_does_not_choose_anew_and_ends_as_if_it_had_not_been_stopped(unreadable, tokenizer, tmp_path, strategy):
    config = dataclasses.replace(CONFIG, strategy=strategy)
    fresh = lambda stage: (wide_model(tokenizer) if stage.model == "start" else M.load_pretrained(stage.model)[0], tokenizer)
    metric = lambda e, p: random.Random(e["x"]).random()
    task = lambda: dataclasses.replace(loose(), metric=metric)
    whole = P.compose(task(), config, tmp_path / "whole", fresh)
    chosen = len(unreadable)
    for limit in (1, 3, 99):
        turns = []
        parts = P.compose(task(), config, tmp_path / "parts", fresh, stop=lambda: len(turns.append(1) or turns) > limit)
    assert len(unreadable) == 2 * chosen                    # once each
    last = "" if strategy == "w" else "2-w"
    assert [m["digest"] for m in read_metrics(tmp_path / "whole" / last)[0]] == [m["digest"] for m in read_metrics(tmp_path / "parts" / last)[0]]
    strip = lambda result: [{k: v for k, v in s.items() if k not in ("seconds", "stage")} for s in result["stages"]]
    assert strip(whole) == strip(parts)
    a, b = (M.load_pretrained(folder / last / "last")[0].state_dict() for folder in (tmp_path / "whole", tmp_path / "parts"))
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("more, option", [({"labelled_demos": 4}, "--labelled-demos -1, not 4"), ({"seed": 1}, "--seed 0, not 1"), ({"labelled_demos": 0}, "--labelled-demos -1, not 0"),
                                          ({"warm_start": 1}, "--warm-start -1, not 1")])
def test_a_run_of_another_start_is_refused_by_the_options_name(unreadable, tokenizer, tmp_path, more, option):
    load = lambda stage: (wide_model(tokenizer), tokenizer)
    P.compose(loose(), dataclasses.replace(CONFIG, steps=1), tmp_path, load)
    with pytest.raises(InputError, match=option):
        P.compose(loose(), dataclasses.replace(CONFIG, steps=1, **more), tmp_path, load)


def test_a_start_that_was_chosen_with_other_options_is_refused_before_there_is_a_state(reads, tokenizer, tmp_path):
    begun(make_task(), tokenizer, tmp_path)
    with pytest.raises(InputError, match="was begun with --temperature 1.0, not 0.5"):
        S.begin(make_task(), WIDE, tokenizer, dataclasses.replace(CONFIG, temperature=0.5), tmp_path)


def test_a_run_whose_demonstrations_were_changed_or_taken_away_is_refused(unreadable, tokenizer, tmp_path):
    load = lambda stage: (wide_model(tokenizer), tokenizer)
    P.compose(loose(), dataclasses.replace(CONFIG, steps=1), tmp_path, load)
    kept = json.loads((tmp_path / "start.json").read_text())
    for fewer in (kept["demos"]["ask"][:3], []):
        (tmp_path / "start.json").write_text(json.dumps(kept | {"demos": kept["demos"] | {"ask": fewer}}))
        with pytest.raises(InputError, match=r"was begun with --prompts  \(which says"):
            P.compose(loose(), dataclasses.replace(CONFIG, steps=1), tmp_path, load)


@pytest.mark.parametrize("text", ["{}", "[]", "{", '{"demos": {"ask": []}}', '{"demos": {"ask": [], "note": [3]}}', '{"demos": {"ask": [], "note": []}}'])
def test_a_damaged_start_is_named(tokenizer, tmp_path, text):
    (tmp_path / "start.json").write_text(text)
    with pytest.raises((InputError, CheckpointError), match="start.json"):
        S.begin(make_task(), WIDE, tokenizer, CONFIG, tmp_path)


def test_half_of_a_character_is_in_no_demonstration_and_in_no_start(tokenizer, tmp_path):
    """JSON can name one, `\\ud800`; no file and no prompt can hold it."""
    task = make_task()
    for example in task.train[::2]:
        example["x"] = "\ud800"
    begun(task, tokenizer, tmp_path, config=dataclasses.replace(CONFIG, labelled_demos=8))
    text = (tmp_path / "start.json").read_text()
    assert text.count("word ") >= 8 and "ud800" not in text
    (tmp_path / "start.json").write_text(text.replace("word ", "\\ud800", 1))
    with pytest.raises(InputError, match="start.json: is not as a run of this program writes it"):
        S.begin(make_task(), WIDE, tokenizer, dataclasses.replace(CONFIG, labelled_demos=8), tmp_path)


def test_where_the_start_is_readable_training_is_bit_for_bit_what_it_is_without_a_choice(tokenizer, tmp_path):
    made = []
    for n in (-1, 0):
        torch.manual_seed(n)                                # whatever global state there is
        model = wide_model(tokenizer)
        task = dataclasses.replace(loose(), metric=lambda e, p: random.Random(e["x"]).random())
        P.compose(task, dataclasses.replace(CONFIG, labelled_demos=n), tmp_path / str(n), lambda stage: (model, tokenizer))
        made.append((model.state_dict(), [m["digest"] for m in read_metrics(tmp_path / str(n))[0]]))
    assert made[0][1] == made[1][1] and all(torch.equal(made[0][0][k], made[1][0][k]) for k in made[0][0])
    assert (tmp_path / "-1/start.json").exists() and not (tmp_path / "0/start.json").exists() and not (tmp_path / "-1/prompts.json").exists()


def test_what_the_choice_took_is_counted(unreadable, tokenizer, tmp_path):
    result = P.compose(loose(), CONFIG, tmp_path, lambda stage: (wide_model(tokenizer), tokenizer))
    kept = json.loads((tmp_path / "start.json").read_text())
    assert kept["rollouts"] == 4 * S.PROBE == S.most_rollouts(loose(), CONFIG) and kept["tokens"] > 0 < kept["seconds"]
    stage, = result["stages"]
    assert stage["rollouts"] == cost(tmp_path)["rollouts"] == 4 * S.PROBE + 3 * 3 * 3 + 4 * 3
    assert stage["tokens"] > kept["tokens"] and stage["seconds"] > kept["seconds"]
    assert S.most_rollouts(loose(), dataclasses.replace(CONFIG, labelled_demos=2)) == 0


# ------------------------------------------------------------------------------------------------- the command line

FEW = ["--task", "banking77", "--examples", "2", "--rollouts", "2", "--eval-examples", "4", "--steps", "2"]


def test_a_number_of_demonstrations_is_put_in_without_a_probe_and_models_are_scored_under_them(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", *FEW, "--labelled-demos", "2", "--out", "run"]) == 0
    assert "as --labelled-demos says (classify 2)" in capsys.readouterr().out
    assert json.loads((tmp_path / "run/start.json").read_text())["rollouts"] == 0
    result, demos = json.loads((tmp_path / "run/result.json").read_text()), S.labelled_demos(banking77.load(), 2, 0)["classify"]
    assert json.loads((tmp_path / "run/prompts.json").read_text())["classify"]["demos"] == demos
    assert result["prompts"] == str(tmp_path / "run/prompts.json")
    for step in ("1", "2"):
        assert cli.main(["replay", "run", step]) == 0 and "token for token those" in capsys.readouterr().out
    score, model = ["eval", "--task", "banking77", "--eval-examples", "8", "--out"], ["--model", "run/best"]
    assert cli.main([*score, "a.json", *model]) == 0
    assert f"trained with --prompts {tmp_path / 'run/prompts.json'}" in capsys.readouterr().err.replace(" run/", f" {tmp_path}/run/")
    assert cli.main([*score, "b.json", *model, "--prompts", "run/prompts.json"]) == 0 and "note:" not in capsys.readouterr().err
    assert cli.main([*score, "c.json", *model, "--labelled-demos", "2"]) == 0
    a, b, c = ([json.loads((tmp_path / f"{name}.json").read_text())[how]["tokens"] for how in ("sampled", "greedy")] for name in "abc")
    assert a != b == c
    shown = ["show", "--task", "banking77", "--split", "train", "--labelled-demos", "2", "--index"]
    for i in range(3):
        assert cli.main([*shown, str(i)]) == 0
        text = " ".join(capsys.readouterr().out.split())
        assert not any(" ".join(d["text"].split()) in text for d in demos)


def test_demonstrations_that_no_example_shows_are_refused(tokenizer, tmp_path):
    with pytest.raises(InputError, match="--labelled-demos 3: the training examples of --task hover show no calls"):
        S.begin(make_task(demonstrate=None), WIDE, tokenizer, dataclasses.replace(CONFIG, labelled_demos=3), tmp_path)
    assert not (tmp_path / "start.json").exists()


# ----------------------------------------------------------------------------------------------------- the warm start

def read(t, *which):
    """The trajectory with the outputs of these calls read, and of no others."""
    calls = tuple(dataclasses.replace(c, outputs={"y": "a"} if i in which else None) for i, c in enumerate(t.calls))
    return dataclasses.replace(t, calls=calls)


def test_a_warm_start_gives_readable_calls_of_voting_runs_one_and_all_others_nothing():
    runs = [read(trajectory("e", 0, ["ask", "note"], 0.0), 0), read(trajectory("e", 1, ["ask", "note"], 1.0), 0, 1),
            read(trajectory("e", 2, ["ask"], -1.0)), read(trajectory("e", 3, ["ask"], 1.0, "tool_error"), 0)]
    groups = G.group_calls(runs)
    rows = G.weigh(groups, G.readable(groups, runs), runs)
    assert sorted((r.where, r.advantage) for r in rows) == [
        ("example e, rollout 0, ask[0]", 1.0), ("example e, rollout 0, note[0]", 0.0), ("example e, rollout 1, ask[0]", 1.0),
        ("example e, rollout 1, note[0]", 1.0), ("example e, rollout 2, ask[0]", 0.0)]
    whole = G.group_calls(runs, level="trajectory")
    assert G.readable(whole, runs) == [[0.0, 1.0, 0.0]]


@pytest.fixture
def some_readable(monkeypatch):
    """Runs of which some calls could be read, by chance of the tokens sampled."""
    original, seen = G.run_programs, []

    def run(*args, **options):
        for t in original(*args, **options):
            seen.append(read(t, *(i for i, c in enumerate(t.calls) if sum(c.completion.token_ids) % 3 == 0)))
        return list(seen)
    monkeypatch.setattr(G, "run_programs", run)
    monkeypatch.setattr(G, "WARM_ENOUGH", 0.9)
    return seen


@pytest.mark.parametrize("normalize", ["sequence", "token"])
def test_the_gradient_of_a_warm_start_is_that_of_the_cross_entropy_of_the_readable_calls(tokenizer, some_readable, normalize, monkeypatch):
    seen, original = [], G.step_gradient

    def watched(*args, **options):
        gradient, figures = original(*args, **options)
        seen.extend(g.clone() for g in gradient)
        return gradient, figures
    monkeypatch.setattr(G, "step_gradient", watched)
    model, start = wide_model(tokenizer), wide_model(tokenizer)
    config = dataclasses.replace(CONFIG, warm_start=1, temperature=0.7, normalize=normalize)
    metrics = G.train_step(model, tokenizer, G.prepare(model, config)[0], None, loose(), config, 0)
    calls = [c for t in some_readable for c in t.calls]
    good = [c for c in calls if c.outputs is not None]
    assert metrics["warm_start"] is True and 0 < metrics["calls"]["trained"] == len(good) < len(calls) == 18

    total, loss = sum(len(c.completion.token_ids) for c in calls), 0.0
    for c in good:
        ids = c.completion.prompt_ids + c.completion.token_ids
        logits = start.logits(start(torch.tensor([ids[:-1]])))[0, len(c.completion.prompt_ids) - 1:, :tokenizer.size] / 0.7
        entropy = torch.nn.functional.cross_entropy(logits.float(), torch.tensor(c.completion.token_ids), reduction="sum")
        groups, members = 6, 3                              # three examples with two modules, three runs each
        loss = loss + entropy / {"sequence": groups * members * len(c.completion.token_ids), "token": total}[normalize]
    loss.backward()
    assert all(torch.allclose(mine, plain.grad, rtol=1e-3, atol=1e-6) for mine, plain in zip(seen, start.parameters(), strict=True))


def test_after_the_warm_start_a_step_is_one_like_any_other(tokenizer, some_readable):
    made, task = {}, dataclasses.replace(loose(), metric=lambda e, p: random.Random(e["x"]).random())
    for n in (0, 1, 2):
        some_readable.clear()
        model = wide_model(tokenizer)
        config = dataclasses.replace(CONFIG, warm_start=n)
        metrics = G.train_step(model, tokenizer, G.prepare(model, config)[0], None, task, config, 1)
        made[n] = ("warm_start" in metrics, metrics["loss"], metrics["digest"])
    assert made[0] == made[1] and not made[0][0]
    assert made[2][0] and made[2][1] != made[0][1] and made[2][2] == made[0][2]         # the same rollouts, another update


def test_a_step_most_of_which_can_be_read_needs_no_warm_start(tokenizer, some_readable, monkeypatch):
    monkeypatch.setattr(G, "WARM_ENOUGH", 0.01)
    model, config = wide_model(tokenizer), dataclasses.replace(CONFIG, warm_start=1)
    metrics = G.train_step(model, tokenizer, G.prepare(model, config)[0], None, loose(), config, 0)
    assert "warm_start" not in metrics and metrics["calls"]["trained"] != sum(
        c.outputs is not None for t in some_readable for c in t.calls)


def test_a_step_of_the_warm_start_without_a_readable_call_follows_the_rewards(tokenizer):
    model, config = wide_model(tokenizer), dataclasses.replace(CONFIG, warm_start=1)
    metrics = G.train_step(model, tokenizer, G.prepare(model, config)[0], None, loose(), config, 0)
    assert "warm_start" not in metrics and metrics["calls"]["trained"] == metrics["calls"]["made"]
