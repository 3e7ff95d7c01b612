"""The laws of a run's start: labelled demonstrations, which are chosen, and the warm start."""

import dataclasses
import json
import random
from types import SimpleNamespace

import pytest
import torch
from conftest import make_model
from hypothesis import given
from hypothesis import strategies as st
from programs import Loose, Two
from strategies import trajectory

import mmgrpo as G
import model as M
from lm.tokenizer import CheckpointError
from program import Completion, InputError, Prediction, Task, parse, render_outputs
from prompts import search as P
from prompts import start as S
from prompts.files import load_prompts, prompts_of
from run import cli
from run.records import cost, read_metrics
from tasks import banking77, hover, papillon


def shown(example):
    """An example shows one call of `ask` and two of `note`."""
    x = example["x"]
    asked = {"x": x, "y": f"yes {x}"}
    return {"ask": [asked], "note": [asked | {"z": f"{i} of {x}"} for i in range(2)]}


def shows_nothing(example):
    return {}


def always_one(example, prediction):
    return 1.0


def random_score(example, prediction):
    """Another one for every run."""
    return random.Random(repr((example, id(prediction)))).random()


def score_of_word(example, prediction):
    """Random, and the same one for all runs on an example."""
    return random.Random(example["x"]).random()


def make_task(train=40, demonstrate=shown, program=Two, metric=always_one):
    examples = [{"x": f"word {i}"} for i in range(train)]
    dev, test = [{"x": "dev"}] * 3, [{"x": "test"}] * 3
    return Task(program(), metric, examples, dev, test, demonstrate=demonstrate)


def loose(train=40, metric=random_score):
    return make_task(train, program=Loose, metric=metric)


CONFIG = G.Config(
    examples=3,
    rollouts=3,
    max_tokens=4,
    max_calls=2,
    slots=8,
    steps=3,
    eval_every=3,
    trials=2,
    minibatch=2,
    demos=0,
    model="start",
)


def count_demos(messages):
    return sum(m["role"] == "assistant" for m in messages)


class Reads:
    """A sampler whose answers can be read where the prompt has at least `needed` demonstrations.

    By chance, a share of `luck` of the others can be read too.
    """

    needed, luck, seen = 4, 0.0, []

    def __init__(self, *_, **__):
        self.waiting, self.seconds = [], 0.0

    def submit(self, messages, key):
        demos = count_demos(messages)
        good = demos >= self.needed or random.Random(repr(key)).random() < self.luck
        text = f"<y>yes</y><z>{demos}</z>" if good else "What?"
        self.seen.append((key, messages))
        ticket = len(self.waiting)
        self.waiting.append((ticket, text))
        return ticket

    def advance(self):
        done = []
        for ticket, text in self.waiting:
            if text:
                done.append((ticket, Completion([1], [2], [-0.1], "stop", text)))
        self.waiting = [(ticket, None) for ticket, _ in self.waiting]
        return done


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


def no_model(max_positions):
    """In the place of an LM that is not asked anything: the length of its context."""
    return SimpleNamespace(config=SimpleNamespace(max_positions=max_positions))


WIDE = no_model(10**6)


def kept_start(out):
    return json.loads((out / "start.json").read_text())


def begun(task, tokenizer, out, model=WIDE, config=CONFIG):
    """start.json of a run that begins."""
    begins = S.begin(task, model, tokenizer, config, out)
    assert begins == any(m.demos for m in task.program.modules().values())
    return kept_start(out)


def candidates_of(kept, figure="demos"):
    return [probe[figure] for probe in kept["probes"]]


def digests(folder):
    """Of the rollouts of each step."""
    return [m["digest"] for m in read_metrics(folder)[0]]


def same_weights(state, other):
    return all(torch.equal(state[name], other[name]) for name in state)


# ---------------------------------------------------------------------------- which start is chosen
def test_where_the_program_as_given_is_readable_it_is_the_start(reads, tokenizer, tmp_path, capsys):
    reads.needed = 0
    task = make_task()
    before = prompts_of(task.program)

    kept = begun(task, tokenizer, tmp_path)

    assert prompts_of(task.program) == before
    assert not any(kept["demos"].values())
    assert kept["rollouts"] == S.PROBE
    assert candidates_of(kept) == [0]
    said = (
        "the start is the program as given: 100% of its LM calls on training examples can be read"
    )
    assert said in capsys.readouterr().out


def test_of_equally_readable_and_good_candidates_the_fewest_demos_win(
    reads, tokenizer, tmp_path, capsys
):
    task = make_task()
    kept = begun(task, tokenizer, tmp_path)

    assert candidates_of(kept) == [0, 2, 4, 8]
    assert candidates_of(kept, "readable") == [0, 0, 1, 1]
    assert {name: len(m.demos) for name, m in task.program.modules().items()} == {
        "ask": 4,
        "note": 4,
    }
    assert kept["rollouts"] == 4 * S.PROBE
    # of two calls, where the first is readable
    assert kept["tokens"] == 6 * S.PROBE
    said = capsys.readouterr().out
    assert "the start is 4 labelled demonstrations per module: 100% of its LM calls" in said
    assert "(as given 0%, with 2 0%, with 8 100%)" in said


def test_of_equally_readable_candidates_the_best_score_wins(reads, tokenizer, tmp_path):
    def likes_eight(example, prediction):
        return float(prediction.z == "8")

    kept = begun(make_task(metric=likes_eight), tokenizer, tmp_path)
    assert len(kept["demos"]["ask"]) == 8


def test_a_readable_candidate_beats_one_of_better_score(reads, tokenizer, tmp_path):
    def likes_none(example, prediction):
        return 9.1 if prediction.z == "0" else 0.1

    # a fourth of all runs is readable without
    reads.needed, reads.luck = 8, 0.5
    kept = begun(make_task(metric=likes_none), tokenizer, tmp_path)

    scores = dict(zip(candidates_of(kept), candidates_of(kept, "score")))
    assert scores[0] > scores[8] > 0
    assert 0 < kept["probes"][0]["readable"] < S.READABLE
    assert len(kept["demos"]["ask"]) == 8


def test_where_all_runs_break_off_the_calls_before_tell_candidates_apart(
    reads, tokenizer, tmp_path, monkeypatch
):
    class Long(Two):
        async def forward(self, x):
            for _ in range(20):
                await super().forward(x)

    task, original = make_task(program=Long), reads.submit

    def submit(self, messages, key):
        reads.needed, reads.luck = 99, 0.1 * len(task.program.ask.demos)
        return original(self, messages, key)

    monkeypatch.setattr(reads, "submit", submit)
    config = dataclasses.replace(CONFIG, max_calls=40)
    kept = begun(task, tokenizer, tmp_path, config=config)

    assert candidates_of(kept) == [0, 2, 4, 8]
    assert candidates_of(kept, "readable") == [0, 0, 0, 0]
    none, two, four, eight = candidates_of(kept, "readable_calls")
    assert none < two < four < eight
    assert len(kept["demos"]["ask"]) == 8


def test_demonstrations_that_do_not_help_are_left_out(reads, tokenizer, tmp_path, capsys):
    reads.needed = 99
    task = make_task()

    assert len(begun(task, tokenizer, tmp_path)["probes"]) == 4
    assert not task.program.ask.demos
    assert "the program as given: 0% of its LM calls" in capsys.readouterr().out


def longest_prompt(tokenizer, demos):
    """Tokens of the longest prompt with so many demonstrations and empty inputs."""
    task, lengths = make_task(), []
    S.add_demos(task.program, S.labelled_demos(task, demos, 0))
    for module in task.program.modules().values():
        messages = module.messages({f.name: "" for f in module.signature.inputs})
        lengths.append(len(tokenizer.encode_chat(messages)))
    return max(lengths)


def test_prompts_that_would_fill_the_context_are_not_tried(reads, tokenizer, tmp_path):
    four, eight = longest_prompt(tokenizer, 4), longest_prompt(tokenizer, 8)
    assert four < eight

    narrow = no_model(2 * eight - 1)
    kept = begun(make_task(), tokenizer, tmp_path, narrow)
    assert candidates_of(kept) == [0, 2, 4]


@pytest.mark.parametrize(
    "task, tried",
    [
        (make_task(6), [0, 2, 4]),
        (make_task(5), [0, 2]),
        (make_task(1), [0]),
        (make_task(demonstrate=shows_nothing), [0]),
        (make_task(demonstrate=None), [0]),
    ],
)
def test_there_are_no_more_candidates_than_examples_show(
    reads, tokenizer, tmp_path, capsys, task, tried
):
    reads.needed = 99
    assert candidates_of(begun(task, tokenizer, tmp_path)) == tried
    none_shown = "they show no demonstrations" in capsys.readouterr().out
    assert none_shown == (tried == [0])


def test_all_candidates_get_the_same_examples_but_no_demonstrated_one(reads, tokenizer, tmp_path):
    task = make_task()
    kept = begun(task, tokenizer, tmp_path)

    asked = [(key, m[-1]["content"]) for key, m in reads.seen if key[4] == "ask"]
    probes = [asked[i : i + S.PROBE] for i in range(0, len(asked), S.PROBE)]
    assert len(probes) == 4
    assert all(probe == probes[0] for probe in probes)

    words = {demo["x"] for demos in kept["demos"].values() for demo in demos}
    assert len(words) == 4
    assert words < {e["x"] for e in task.train}
    for _, content in asked:
        assert not any(f"\n{word}\n" in content for word in words)


def test_demonstrations_are_of_different_examples_and_take_turns():
    """Of several calls of a module, each is shown in turn."""
    demos = S.labelled_demos(make_task(), 4, 0)

    words = [d["x"] for d in demos["ask"]]
    assert len(set(words)) == 4
    assert words == [d["x"] for d in demos["note"]]
    assert [d["z"].split()[0] for d in demos["note"]] == ["0", "1", "0", "1"]

    fewer, of_another_seed = (
        S.labelled_demos(make_task(), 2, 0),
        S.labelled_demos(make_task(), 2, 1),
    )
    assert fewer["ask"] == demos["ask"][:2] != of_another_seed["ask"]


# ---------------------------------------------------------------------------- what an example shows
def test_by_default_fields_with_the_modules_names_are_demonstrations():
    task = make_task(demonstrate=None)

    def show(**example):
        return S.demonstrations(task, example)

    assert show(x="a", y="b", other=1) == {"ask": [{"x": "a", "y": "b"}]}
    assert show(x="a", y="b", z="c")["note"] == [{"x": "a", "y": "b", "z": "c"}]
    assert show(x="a") == show(y="b") == show(x="a", y={1}) == {}


def always(shows):
    """A `demonstrate` that shows this of every example."""
    return lambda example: shows


def of_gold(example):
    return example["gold"]


@pytest.mark.parametrize(
    "demonstrate, says",
    [
        (always({"asks": []}), "some of the modules ask, note"),
        (always([]), "some of the modules"),
        (always({"ask": [{"w": 1}]}), "ask: expected a list of dicts with some of x, y"),
        (always({"ask": [{}]}), "ask: expected"),
        (always({"note": ({"x": 1},)}), "note: expected"),
        (of_gold, "failed on a training example: KeyError: 'gold'"),
    ],
)
def test_what_a_task_cannot_show_is_named(demonstrate, says):
    assert S.demonstrations(make_task(), {"x": "a"})
    with pytest.raises(InputError, match=says):
        S.demonstrations(make_task(demonstrate=demonstrate), {"x": "a"})


def test_what_json_cannot_hold_is_no_demonstration():
    with_a_tuple, plain = {"x": "a", "y": ("b",)}, {"x": "c", "y": "d"}
    task = make_task(demonstrate=always({"ask": [with_a_tuple, plain]}))
    assert S.demonstrations(task, {"x": "a"}) == {"ask": [plain]}


@pytest.mark.parametrize(
    "task",
    [banking77.load(), hover.load(), papillon.load()],
    ids=["banking77", "hover", "papillon"],
)
def test_the_demonstrations_of_the_tasks_are_whole_calls_of_examples(task):
    modules, names = task.program.modules(), set()
    for example in task.train:
        for name, demos in S.demonstrations(task, example).items():
            signature = modules[name].signature
            for demo in demos:
                names.add(name)
                assert demo.keys() == {f.name for f in signature.inputs + signature.outputs}
                outputs = {f.name: demo[f.name] for f in signature.outputs}
                assert parse(signature, render_outputs(signature, demo)) == outputs
                assert len(demo["reasoning"].split()) < 12
                given = demo.get("text", demo.get("claim", demo.get("user_query")))
                assert given in example.values()
    assert names == modules.keys()


def test_a_demonstration_of_hover_leads_from_one_article_to_the_next():
    task = hover.load()
    articles = task.program.search.articles
    for example in task.train:
        demos = S.demonstrations(task, example)
        notes, queries = demos["append_notes"], demos["generate_query"]

        path = [d["new_key_fact"] for d in notes]
        assert [d["key_facts"] for d in notes] == [path[:i] for i in range(len(path))]
        assert [d["key_facts"] for d in queries] == [path[:i] for i in range(1, len(path))]
        assert [d["query"] for d in queries] == example["titles"][1:]
        for fact, title in zip(path, example["titles"]):
            assert fact in articles[title]


def test_articles_that_the_claim_names_come_first():
    """The note on an article is its first sentence."""
    first = "J. R. B is the second one that there is, of some length."
    articles = {"B": f"{first} It is not told.", "A": "A is short."}
    demos = hover.demonstrate(articles, {"claim": "What did A do?", "titles": ["B", "A"]})

    assert [d["query"] for d in demos["generate_query"]] == ["B"]
    assert [d["new_key_fact"] for d in demos["append_notes"]] == ["A is short.", first]
    assert len(hover.first_sentence("word " * 99, words=15).split()) == 15


def test_a_demonstration_of_papillon_is_private_and_answers_in_full():
    task = papillon.load()
    first, second = task.program.modules()
    for example in task.train:
        demos = S.demonstrations(task, example)
        craft, respond = demos[first][0], demos[second][0]

        request = craft["llm_request"]
        prediction = Prediction(llm_request=request, response=respond["response"])
        assert task.metric(example, prediction) == 1.0
        assert respond["related_llm_response"] == papillon.untrusted(request)


def test_a_demonstration_of_pupa_is_short():
    row = {
        "user_query": "I am Ann. Write a poem.",
        "redacted": "I am [REDACTED]. Write a poem.",
        "target": "One. " * 30 + "Two " * 99,
    }
    (respond,) = papillon.demonstrate_real(row)["respond_to_query"]
    assert respond["response"] == ("One. " * 30).strip()
    assert respond["related_llm_request"] == row["redacted"]

    assert papillon.demonstrate_real(row | {"user_query": "word " * 41}) == {}
    assert papillon.demonstrate_real(row | {"redacted": ""}) == {}
    assert papillon.beginning("word " * 99) == " ".join(["word"] * 40)


# ------------------------------------------------------------- no example stands in its own prompt
@given(
    train=st.lists(st.integers(0, 12), max_size=12),
    in_prompts=st.lists(
        st.tuples(st.sampled_from(["ask", "note"]), st.integers(0, 14)), max_size=6
    ),
)
def test_exactly_the_examples_that_stand_in_a_prompt_are_not_trained_on(train, in_prompts):
    task = make_task()
    task.train = [{"x": f"word {i}"} for i in train]
    for name, i in in_prompts:
        module = task.program.modules()[name]
        demo = shown({"x": f"word {i}"})[name][0]
        module.demos = module.demos + [demo]

    standing = {i for _, i in in_prompts}
    expected = [e for e, i in zip(task.train, train) if i not in standing]
    if train and not expected:
        with pytest.raises(InputError, match="every training example is a demonstration"):
            S.without_shown(task)
    else:
        assert S.without_shown(task).train == expected


@pytest.fixture
def unreadable(monkeypatch):
    """A random LM is never readable enough; on the probe, with four demonstrations in most calls.

    The numbers of demonstrations that were probed.
    """
    original, probes = S.probe, []

    def probe(task, *rest):
        result = original(task, *rest)
        demos = len(task.program.ask.demos)
        probes.append(demos)
        calls = 0.5 if demos == 4 else 0.0
        return result | {"score": 0.0, "readable": 0.1, "readable_calls": calls}

    monkeypatch.setattr(S, "probe", probe)
    return probes


@pytest.fixture
def prompted(monkeypatch):
    """The prompts that were sampled, with their `step`, their `module` and what is `asked`."""
    seen, original = [], G.Sampler.submit

    def submit(self, messages, key):
        asked = messages[-1]["content"]
        seen.append(
            SimpleNamespace(step=key[1], module=key[4], asked=asked, demos=count_demos(messages))
        )
        return original(self, messages, key)

    monkeypatch.setattr(G.Sampler, "submit", submit)
    return seen


def prompts_in(path):
    program = Two()
    load_prompts(program, path)
    return prompts_of(program)


@pytest.mark.parametrize("strategy", ["w", "p", "p -> w", "w -> p"])
def test_every_stage_is_run_under_the_start_and_on_none_of_its_examples(
    unreadable, prompted, tokenizer, tmp_path, strategy
):
    task = loose(train=16)
    config = dataclasses.replace(CONFIG, strategy=strategy, steps=4)
    result = P.compose(task, config, tmp_path, lambda stage: (wide_model(tokenizer), tokenizer))

    words = [d["x"] for d in task.program.ask.demos]
    assert len(words) == 4
    assert unreadable == [0, 2, 4, 8]
    after = [prompt for prompt in prompted if prompt.step != S.PROBE_STEP]
    assert after
    for prompt in after:
        assert prompt.demos == 4
        assert not any(f"\n{word}\n" in prompt.asked for word in words)
    # all the others are trained on: an epoch is 4 steps
    if strategy == "w":
        trained = {p.asked for p in after if p.step >= 0 and p.module == "ask"}
        assert len(trained) == 12
    assert prompts_in(result["prompts"]) == prompts_of(task.program)


# -------------------------------------------------------------------------------- it is chosen once
def stop_after(turns):
    """A `stop` that says no so many times, then yes."""
    asked = []

    def stop():
        asked.append(1)
        return len(asked) > turns

    return stop


def figures_of(result):
    """What a result says of its stages, but for the time and the folder."""
    stages = []
    for stage in result["stages"]:
        stages.append({k: v for k, v in stage.items() if k not in ("seconds", "stage")})
    return stages


@pytest.mark.parametrize("strategy", ["w", "p -> w"])
def test_a_run_that_goes_on_keeps_its_start_and_ends_as_one_not_stopped(
    unreadable, tokenizer, tmp_path, strategy
):
    def load(stage):
        if stage.model == "start":
            return wide_model(tokenizer), tokenizer
        return M.load_pretrained(stage.model)[0], tokenizer

    def compose(name, **options):
        task = loose(metric=score_of_word)
        return P.compose(task, config, tmp_path / name, load, **options)

    config = dataclasses.replace(CONFIG, strategy=strategy)
    whole = compose("whole")
    chosen = len(unreadable)
    for turns in (1, 3, 99):
        parts = compose("parts", stop=stop_after(turns))

    # once each
    assert len(unreadable) == 2 * chosen
    last = "" if strategy == "w" else "2-w"
    assert digests(tmp_path / "whole" / last) == digests(tmp_path / "parts" / last)
    assert figures_of(whole) == figures_of(parts)
    one, _ = M.load_pretrained(tmp_path / "whole" / last / "last")
    other, _ = M.load_pretrained(tmp_path / "parts" / last / "last")
    assert same_weights(one.state_dict(), other.state_dict())


@pytest.fixture
def compose(unreadable, tokenizer, tmp_path):
    """Run one step into the same folder, with other options if given."""

    def compose(**options):
        config = dataclasses.replace(CONFIG, **{"steps": 1} | options)
        return P.compose(
            loose(), config, tmp_path, lambda stage: (wide_model(tokenizer), tokenizer)
        )

    return compose


@pytest.mark.parametrize(
    "more, option",
    [
        ({"labelled_demos": 4}, "--labelled-demos -1, not 4"),
        ({"seed": 1}, "--seed 0, not 1"),
        ({"labelled_demos": 0}, "--labelled-demos -1, not 0"),
        ({"warm_start": 1}, "--warm-start -1, not 1"),
    ],
)
def test_a_run_of_another_start_is_refused_by_the_options_name(compose, more, option):
    compose()
    with pytest.raises(InputError, match=option):
        compose(**more)


def test_a_start_of_other_options_is_refused_before_there_is_a_state(reads, tokenizer, tmp_path):
    begun(make_task(), tokenizer, tmp_path)
    cooler = dataclasses.replace(CONFIG, temperature=0.5)
    with pytest.raises(InputError, match="was begun with --temperature 1.0, not 0.5"):
        S.begin(make_task(), WIDE, tokenizer, cooler, tmp_path)


def test_a_run_whose_demonstrations_were_changed_or_removed_is_refused(compose, tmp_path):
    compose()
    kept = kept_start(tmp_path)
    for fewer in (kept["demos"]["ask"][:3], []):
        changed = kept | {"demos": kept["demos"] | {"ask": fewer}}
        (tmp_path / "start.json").write_text(json.dumps(changed))
        with pytest.raises(InputError, match=r"was begun with --prompts  \(which says"):
            compose()


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "[]",
        "{",
        '{"demos": {"ask": []}}',
        '{"demos": {"ask": [], "note": [3]}}',
        '{"demos": {"ask": [], "note": []}}',
    ],
)
def test_a_damaged_start_is_named(tokenizer, tmp_path, text):
    (tmp_path / "start.json").write_text(text)
    with pytest.raises((InputError, CheckpointError), match="start.json"):
        S.begin(make_task(), WIDE, tokenizer, CONFIG, tmp_path)


def test_half_of_a_character_is_in_no_demonstration_and_in_no_start(tokenizer, tmp_path):
    """JSON can name one, `\\ud800`; no file and no prompt can hold it."""
    task, config = make_task(), dataclasses.replace(CONFIG, labelled_demos=8)
    for example in task.train[::2]:
        example["x"] = "\ud800"

    begun(task, tokenizer, tmp_path, config=config)
    text = (tmp_path / "start.json").read_text()
    assert text.count("word ") >= 8
    assert "ud800" not in text

    (tmp_path / "start.json").write_text(text.replace("word ", "\\ud800", 1))
    with pytest.raises(InputError, match="start.json: is not as a run of this program writes it"):
        S.begin(make_task(), WIDE, tokenizer, config, tmp_path)


def test_under_a_readable_start_training_is_as_without_a_choice(tokenizer, tmp_path):
    """The weights and the rollouts are the same to the last bit."""

    def trained(labelled_demos):
        # whatever global state there is
        torch.manual_seed(labelled_demos)
        model, out = wide_model(tokenizer), tmp_path / str(labelled_demos)
        config = dataclasses.replace(CONFIG, labelled_demos=labelled_demos)
        P.compose(loose(metric=score_of_word), config, out, lambda stage: (model, tokenizer))
        return model.state_dict(), digests(out)

    chosen, chosen_digests = trained(-1)
    plain, plain_digests = trained(0)
    assert chosen_digests == plain_digests
    assert same_weights(chosen, plain)
    assert (tmp_path / "-1/start.json").exists()
    assert not (tmp_path / "0/start.json").exists()
    assert not (tmp_path / "-1/prompts.json").exists()


def test_what_the_choice_took_is_counted(compose, tmp_path):
    result = compose(steps=CONFIG.steps)

    kept = kept_start(tmp_path)
    assert kept["rollouts"] == 4 * S.PROBE == S.most_rollouts(loose(), CONFIG)
    assert kept["tokens"] > 0
    assert kept["seconds"] > 0
    (stage,) = result["stages"]
    trained, evaluated = 3 * 3 * 3, 4 * 3
    assert stage["rollouts"] == 4 * S.PROBE + trained + evaluated
    assert stage["rollouts"] == cost(tmp_path)["rollouts"]
    assert stage["tokens"] > kept["tokens"]
    assert stage["seconds"] > kept["seconds"]

    asked_for = dataclasses.replace(CONFIG, labelled_demos=2)
    assert S.most_rollouts(loose(), asked_for) == 0


# --------------------------------------------------------------------------------- the command line
TASK = ["--task", "banking77"]
TWO_DEMOS = ["--labelled-demos", "2"]


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    """Runs a command that succeeds in a folder of its own -> (output, errors)."""
    monkeypatch.chdir(tmp_path)

    def run(*argv):
        capsys.readouterr()
        assert cli.main([*argv]) == 0
        return capsys.readouterr()

    return run


def tokens_in(path):
    scores = json.loads(path.read_text())
    return [scores[how]["tokens"] for how in ("sampled", "greedy")]


def words(text):
    return " ".join(text.split())


def test_a_number_of_demonstrations_is_put_in_without_a_probe(run, tmp_path):
    """The LM that was trained under them is scored and replayed under them."""
    demos = S.labelled_demos(banking77.load(), 2, 0)["classify"]
    sizes = ["--examples", "2", "--rollouts", "2", "--eval-examples", "4", "--steps", "2"]
    out, _ = run("train", *TASK, *sizes, *TWO_DEMOS, "--out", "run")
    assert "as --labelled-demos says (classify 2)" in out
    assert kept_start(tmp_path / "run")["rollouts"] == 0
    prompts = tmp_path / "run/prompts.json"
    assert json.loads(prompts.read_text())["classify"]["demos"] == demos
    assert json.loads((tmp_path / "run/result.json").read_text())["prompts"] == str(prompts)
    for step in ("1", "2"):
        assert "token for token those" in run("replay", "run", step)[0]

    score = ["eval", *TASK, "--eval-examples", "8", "--model", "run/best", "--out"]
    _, error = run(*score, "a.json")
    said = error.replace(" run/", f" {tmp_path}/run/")
    assert f"trained with --prompts {prompts}" in said
    _, error = run(*score, "b.json", "--prompts", "run/prompts.json")
    assert "note:" not in error
    run(*score, "c.json", *TWO_DEMOS)
    a, b, c = (tokens_in(tmp_path / name) for name in ("a.json", "b.json", "c.json"))
    assert a != b == c

    for i in ("0", "1", "2"):
        out, _ = run("show", *TASK, "--split", "train", *TWO_DEMOS, "--index", i)
        assert not any(words(demo["text"]) in words(out) for demo in demos)


def test_demonstrations_that_no_example_shows_are_refused(tokenizer, tmp_path):
    task, config = make_task(demonstrate=None), dataclasses.replace(CONFIG, labelled_demos=3)
    says = "--labelled-demos 3: the training examples of --task hover show no calls"
    with pytest.raises(InputError, match=says):
        S.begin(task, WIDE, tokenizer, config, tmp_path)
    assert not (tmp_path / "start.json").exists()


# ----------------------------------------------------------------------------------- the warm start
def read(t, *which):
    """The trajectory with the outputs of these calls read, and of no others."""
    calls = []
    for i, call in enumerate(t.calls):
        calls.append(dataclasses.replace(call, outputs={"y": "a"} if i in which else None))
    return dataclasses.replace(t, calls=tuple(calls))


def test_a_warm_start_trains_the_readable_calls_of_voting_runs_alone():
    """They have the advantage 1, all other calls 0."""
    runs = [
        read(trajectory("e", 0, ["ask", "note"], 0.0), 0),
        read(trajectory("e", 1, ["ask", "note"], 1.0), 0, 1),
        read(trajectory("e", 2, ["ask"], -1.0)),
        read(trajectory("e", 3, ["ask"], 1.0, "tool_error"), 0),
    ]
    groups = G.group_calls(runs)
    rows = G.weigh(groups, G.readable(groups, runs), runs)
    assert sorted((row.where, row.advantage) for row in rows) == [
        ("example e, rollout 0, ask[0]", 1.0),
        ("example e, rollout 0, note[0]", 0.0),
        ("example e, rollout 1, ask[0]", 1.0),
        ("example e, rollout 1, note[0]", 1.0),
        ("example e, rollout 2, ask[0]", 0.0),
    ]

    whole = G.group_calls(runs, level="trajectory")
    assert G.readable(whole, runs) == [[0.0, 1.0, 0.0]]


@pytest.fixture
def some_readable(monkeypatch):
    """Runs of which some calls could be read, by chance of the tokens sampled."""
    original, seen = G.run_programs, []

    def lucky(call):
        return sum(call.completion.token_ids) % 3 == 0

    def run(*args, **options):
        for t in original(*args, **options):
            seen.append(read(t, *(i for i, call in enumerate(t.calls) if lucky(call))))
        return list(seen)

    monkeypatch.setattr(G, "run_programs", run)
    monkeypatch.setattr(G, "WARM_ENOUGH", 0.9)
    return seen


@pytest.fixture
def gradients(monkeypatch):
    """The gradients of the step that is made."""
    seen, original = [], G.step_gradient

    def watched(*args, **options):
        gradient, figures = original(*args, **options)
        seen.extend(g.clone() for g in gradient)
        return gradient, figures

    monkeypatch.setattr(G, "step_gradient", watched)
    return seen


def one_step(model, tokenizer, config, task=None, step=0):
    """A training step with a new optimizer -> its metrics."""
    optimizer, _ = G.prepare(model, config)
    return G.train_step(model, tokenizer, optimizer, None, task or loose(), config, step)


def cross_entropy(model, completion, vocabulary, temperature):
    """Of the sampled tokens, their sum."""
    prompt, sampled = completion.prompt_ids, completion.token_ids
    ids = torch.tensor([(prompt + sampled)[:-1]])
    logits = model.logits(model(ids))[0, len(prompt) - 1 :, :vocabulary] / temperature
    target = torch.tensor(sampled)
    return torch.nn.functional.cross_entropy(logits.float(), target, reduction="sum")


@pytest.mark.parametrize("normalize", ["sequence", "token"])
def test_a_warm_start_descends_the_cross_entropy_of_readable_calls(
    tokenizer, some_readable, gradients, normalize
):
    """Its gradient is that of PyTorch, of one call at a time."""
    model, start = wide_model(tokenizer), wide_model(tokenizer)
    config = dataclasses.replace(CONFIG, warm_start=1, temperature=0.7, normalize=normalize)
    metrics = one_step(model, tokenizer, config)

    calls = [call for t in some_readable for call in t.calls]
    good = [call for call in calls if call.outputs is not None]
    assert metrics["warm_start"] is True
    assert 0 < metrics["calls"]["trained"] == len(good) < len(calls) == 18

    # three examples with two modules, three runs each
    groups, members = 6, 3
    tokens = sum(len(call.completion.token_ids) for call in calls)
    loss = 0.0
    for call in good:
        length = len(call.completion.token_ids)
        share = {"sequence": groups * members * length, "token": tokens}[normalize]
        loss = loss + cross_entropy(start, call.completion, tokenizer.size, 0.7) / share
    loss.backward()
    for mine, plain in zip(gradients, start.parameters(), strict=True):
        assert torch.allclose(mine, plain.grad, rtol=1e-3, atol=1e-6)


def test_after_the_warm_start_a_step_is_one_like_any_other(tokenizer, some_readable):
    def second_step(warm_start):
        some_readable.clear()
        config = dataclasses.replace(CONFIG, warm_start=warm_start)
        task = loose(metric=score_of_word)
        return one_step(wide_model(tokenizer), tokenizer, config, task, step=1)

    never, before, still = second_step(0), second_step(1), second_step(2)

    assert "warm_start" not in never
    assert "warm_start" not in before
    assert (never["loss"], never["digest"]) == (before["loss"], before["digest"])
    # the same rollouts, another update
    assert "warm_start" in still
    assert still["digest"] == never["digest"]
    assert still["loss"] != never["loss"]


def test_a_step_most_of_which_can_be_read_needs_no_warm_start(
    tokenizer, some_readable, monkeypatch
):
    monkeypatch.setattr(G, "WARM_ENOUGH", 0.01)
    config = dataclasses.replace(CONFIG, warm_start=1)
    metrics = one_step(wide_model(tokenizer), tokenizer, config)

    readable = [c for t in some_readable for c in t.calls if c.outputs is not None]
    assert "warm_start" not in metrics
    assert metrics["calls"]["trained"] != len(readable)


def test_a_warm_step_without_a_readable_call_follows_the_rewards(tokenizer):
    config = dataclasses.replace(CONFIG, warm_start=1)
    metrics = one_step(wide_model(tokenizer), tokenizer, config)

    assert "warm_start" not in metrics
    assert metrics["calls"]["trained"] == metrics["calls"]["made"]
