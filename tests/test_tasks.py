"""The three tasks: their worlds, metrics and files, and that nothing of dev and test is in the pretraining text."""
import csv
import json
import random
import re
from itertools import chain
from pathlib import Path

import pytest
from conftest import ROOT
from strategies import ScriptedSampler

from program import InputError, Module, Prediction, Program, parse, render_outputs, run_programs
from prompts.start import labelled_demos
from studies import pretrain, pretrain_banking77, pretrain_hotpotqa
from tasks import banking77, hover, papillon
from tasks.data.world import WORDS, Names, half_of

TASKS = {"hover": hover, "banking77": banking77, "papillon": papillon}
words = lambda text: set(re.findall(r"[A-Za-z_]+", text))


@pytest.fixture(scope="module")
def pretraining_text():
    """Prompts and completions of 60 small worlds' worth of scripted runs."""
    writer = pretrain.Writer(random.Random(5))
    return [text for _ in range(60) for messages, completions in writer.calls()
            for text in chain((m["content"] for m in messages), completions)]


def texts_of(task) -> list[str]:
    """Everything that a program of the task reads from outside."""
    examples = task.train + task.dev + task.test
    given = [str(e.get("claim") or e.get("text") or e.get("user_query")) for e in examples]
    return given + (list(task.program.search.articles.values()) if hasattr(task.program, "search") else [])


# ------------------------------------------------------------------------------------------------ the two halves

@pytest.mark.parametrize("name", TASKS)
def test_splits_are_disjoint_and_the_same_every_time(name):
    task, again = TASKS[name].load(), TASKS[name].load()
    key = lambda e: json.dumps(e, sort_keys=True)
    splits = [set(map(key, s)) for s in (task.train, task.dev, task.test)]
    assert [len(s) for s in splits] == [240, 120, 140] and len(set.union(*splits)) == 500
    assert (task.train, task.dev, task.test) == (again.train, again.dev, again.test)


def test_no_name_of_the_tasks_is_in_the_pretraining_text(pretraining_text):
    found = {n for text in pretraining_text for n in pretrain.NAME.findall(text)}
    tasks = {n for m in TASKS.values() for text in texts_of(m.load()) for n in pretrain.NAME.findall(text)}
    whole = {n for n in tasks if half_of(n) == "task"}
    titles = set(hover.load().program.search.articles) | {n for e in papillon.load().test + papillon.load().dev for n in e["pii"]}
    assert titles <= whole and len(titles) > 2000 and not whole & found & titles


@pytest.mark.parametrize("name", TASKS)
def test_no_sentence_of_the_tasks_is_in_the_pretraining_text(pretraining_text, name):
    """Neither as it stands nor with other names: the templates differ."""
    shape = lambda text: pretrain.NAME.sub("X", text)
    pretraining = {shape(piece) for text in pretraining_text for piece in re.split(r"[\n\"]+", text)}
    assert not {shape(t) for t in texts_of(TASKS[name].load())} & pretraining


@pytest.mark.parametrize("name", TASKS)
def test_every_word_of_the_tasks_is_in_the_pretraining_text(pretraining_text, name):
    known = set().union(*map(words, pretraining_text)) | set(WORDS)
    assert set().union(*map(words, texts_of(TASKS[name].load()))) <= known


def test_names_are_given_once_and_belong_to_one_half():
    for half in ("task", "pretrain"):
        names = Names(random.Random(1), half)
        given = [names() for _ in range(2000)]
        assert len(set(given)) == 2000 and {half_of(n) for n in given} == {half}
    assert len(WORDS) == len(set(WORDS)) == 500


def test_a_name_is_the_same_tokens_wherever_it_stands(tokenizer):
    name = tokenizer.encode("Tarel Moro")
    for name, around in (("Bilar Dulon", "{}"), ("Bilar Dulon", "<query>\n{}\n</query>"), ("Bilar Dulon", 'x "{}, y'),
                         ("Bilar Dulon", '["{} | {} is a film."]'), ("Bilar Dulon", "by {}.\n"), ("Bilar Dulon", "({}, {})")):
        first, second = WORDS[3], WORDS[77]
        pair = [tokenizer.encode(first), tokenizer.encode(second)]
        assert [len(p) for p in pair] == [1, 1]
        ids = tokenizer.encode(around.replace("{}", f"{first} {second}"))
        assert ids.count(pair[0][0]) == ids.count(pair[1][0]) == around.count("{}")
    assert all(len(tokenizer.encode(w)) == 1 for w in WORDS)


# ----------------------------------------------------------------------------------------------------------- hover

def test_a_search_for_the_claim_alone_finds_a_third_and_an_oracle_finds_all():
    task = hover.load()
    search, floor, oracle = task.program.search, [], []
    for e in task.dev:
        found = [t for t, _ in search(e["claim"])]
        floor.append(hover.recall(e, Prediction(found=found)))
        for _ in range(3):
            known = e["claim"] + " ".join(search.articles[t] for t in found)
            missing = [t for t in e["titles"] if t not in found and t in known]
            found += [t for t, _ in search(missing[0])] if missing else []
        oracle.append(hover.recall(e, Prediction(found=found)))
    assert 0.25 < sum(floor) / len(floor) < 0.5 and sum(oracle) / len(oracle) > 0.95


def play(program, reply, example, metric):
    return run_programs(program, [example], metric, ScriptedSampler(reply))[0]


def test_hover_calls_its_modules_a_varying_number_of_times():
    task = hover.load()
    e = next(e for e in task.dev if len(e["titles"]) == 4 and len(e["named"]) == 2 and e["titles"][1] not in e["named"])
    queries = iter(e["titles"][1:] + ["never"])
    def oracle(messages, key):
        module = task.program.modules()[key[4]]
        values = {"reasoning": "r", "query": next(queries)} if key[4] == "generate_query" else {"reasoning": "r", "new_key_fact": "f"}
        return render_outputs(module.signature, values)
    t = play(task.program, oracle, e, hover.recall)
    assert (t.status, t.reward) == ("completed", 1.0)
    assert [c.module for c in t.calls] == ["append_notes", "generate_query"] * 3 or len(t.calls) < 6
    repeat = lambda messages, key: render_outputs(task.program.modules()[key[4]].signature, {
        "reasoning": "r", "query": e["claim"], "new_key_fact": "f"})
    t = play(task.program, repeat, e, hover.recall)            # the query was asked before: the run ends early
    assert [c.module for c in t.calls] == ["append_notes", "generate_query"]


@pytest.mark.parametrize("query", ["", "the of and", "nothing-matches-this", "🙂", "a" * 10_000])
def test_a_search_that_matches_nothing_finds_nothing(query):
    assert hover.load().program.search(query) == []


# ---------------------------------------------------------------------------------------------- banking77, papillon

def test_exact_match_is_exact():
    assert banking77.exact_match({"intent": "card_fee"}, Prediction(intent="card_fee")) == 1.0
    assert banking77.exact_match({"intent": "card_fee"}, Prediction(intent="card_wrong")) == 0.0


@pytest.mark.parametrize("request_, response, reward", [
    ("Write a note about the garden.", "Dear Bilar Dulon, {line}.", 1.0), ("Write a note to Bilar Dulon about the garden.", "Dear Bilar Dulon, {line}.", 0.75),
    ("For BILAR DULON in Kamon Refal", "Dear Bilar Dulon, {line}.", 0.5), ("", "", 0.5), ("a note", "Dear Bilar Dulon, hello.", 0.75),
    ("Bilar Dulon Kamon Refal", "", 0.0)])
def test_the_reward_of_papillon_weighs_quality_and_leakage(request_, response, reward):
    line = papillon.line_about("garden")
    example = {"pii": ["Bilar Dulon", "Kamon Refal"], "parts": ["Dear Bilar Dulon", line]}
    prediction = Prediction(llm_request=request_, response=response.format(line=line))
    assert papillon.Reward(papillon.quality_of_parts)(example, prediction) == pytest.approx(reward)


def test_the_untrusted_lm_knows_the_line_only_if_it_is_told_the_topic():
    assert papillon.line_about("garden") in papillon.untrusted("Write a letter to my doctor about the garden.")
    assert papillon.untrusted("Write a letter to my doctor.") == "What is it about?"
    assert papillon.line_about("garden", "a") != papillon.line_about("garden", "b")     # pretraining never tells the task's lines


# ------------------------------------------------------------------------------------------------------- real files

def write_csv(path, header, rows):
    with path.open("w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows([header, *rows])


@pytest.fixture
def folders(tmp_path):
    """Small folders in the formats of the published data."""
    for name in ("hotpotqa", "hover", "banking77", "pupa"):
        (tmp_path / name).mkdir()
    corpus = "".join(json.dumps({"title": f"T{i}", "text": f"text number {i}"}) + "\n" for i in range(20))
    for name in ("hotpotqa", "hover"):
        (tmp_path / name / "corpus.jsonl").write_text(corpus)
    (tmp_path / "hotpotqa" / "questions.jsonl").write_text("".join(
        json.dumps({"id": str(i), "question": f"which number is {i}?", "titles": [f"T{i}"]}) + "\n" for i in range(12)))
    (tmp_path / "hover" / "hover_dev_release_v1.1.json").write_text(json.dumps(
        [{"claim": f"claim {i}", "supporting_facts": [[f"T{i}", 0], [f"T{i + 1}", 2], [f"T{i}", 3]]} for i in range(12)]))
    write_csv(tmp_path / "banking77" / "train.csv", ["text", "category"], [[f"where is card {i}, please?", "a" if i % 2 else "b"] for i in range(20)])
    (tmp_path / "banking77" / "categories.json").write_text('["a", "b"]')
    write_csv(tmp_path / "pupa" / "PUPA_New.csv", ["user_query", "target_response", "pii_units"],
              [[f"write to Ann {i}\nplease", "Dear Ann", f"Ann {i}||Bob"] for i in range(12)])
    return tmp_path


@pytest.mark.parametrize("name, task", [("hotpotqa", hover), ("hover", hover), ("banking77", banking77), ("pupa", papillon)])
def test_published_formats_are_read(folders, name, task):
    t = task.load(str(folders / name))
    assert t.train and t.dev and t.test and not [e for e in t.train if e in t.dev + t.test] and not [e for e in t.dev if e in t.test]
    reply = lambda messages, key: render_outputs(t.program.modules()[key[4]].signature, {
        "reasoning": "r", "query": "number 3", "new_key_fact": "f", "intent": "a", "llm_request": "Ann 3", "response": "Dear Ann"})
    runs = [play(t.program, reply, e, t.metric) for e in t.dev]
    assert all(r.status == "completed" and 0 <= r.reward <= 1 for r in runs) and any(r.reward for r in runs)


@pytest.mark.parametrize("name, task, file, damage, culprit", [
    ("hotpotqa", hover, "corpus.jsonl", None, "corpus.jsonl"), ("hotpotqa", hover, "questions.jsonl", None, "questions.jsonl"),
    ("hotpotqa", hover, "corpus.jsonl", lambda s: s.replace('"T3"', '3'), "corpus.jsonl:4: title"),
    ("hotpotqa", hover, "questions.jsonl", lambda s: s.replace('"question"', '"q"', 1), "questions.jsonl:1: question"),
    ("hotpotqa", hover, "questions.jsonl", lambda s: s[:-20], "questions.jsonl:12"), ("hotpotqa", hover, "corpus.jsonl", lambda s: "", "corpus.jsonl"),
    ("hotpotqa", hover, "questions.jsonl", lambda s: s.replace("T", "U"), "only 0 of 12 claims"),
    ("hover", hover, "hover_dev_release_v1.1.json", lambda s: s[:-1], "hover_dev_release"),
    ("hover", hover, "hover_dev_release_v1.1.json", lambda s: s.replace('"claim 2"', 'null'), "entry 2: claim"),
    ("hover", hover, "hover_dev_release_v1.1.json", lambda s: s.replace('["T2", 0]', '3', 1), "entry 2: supporting_facts"),
    ("hover", hover, "hover_dev_release_v1.1.json", lambda s: '{"a": 1}', "hover_dev_release"),
    ("banking77", banking77, "train.csv", None, "train.csv"), ("banking77", banking77, "categories.json", lambda s: "{}", "categories.json"),
    ("banking77", banking77, "train.csv", lambda s: s.replace(",a", ",zzz", 1), "train.csv:3"),
    ("banking77", banking77, "train.csv", lambda s: s.replace("please?\",b", "please?", 1), "train.csv"),
    ("banking77", banking77, "train.csv", lambda s: "text,category\n", "train.csv"),
    ("pupa", papillon, "PUPA_New.csv", lambda s: s.replace("pii_units", "pii"), "PUPA_New.csv:3: pii_units"),
    ("pupa", papillon, "PUPA_New.csv", lambda s: s.replace("Dear Ann", "", 1), "target_response"),
    ("pupa", papillon, "PUPA_New.csv", lambda s: s + '"open', "PUPA_New.csv")])
def test_a_malformed_file_or_row_is_named(folders, name, task, file, damage, culprit):
    path = folders / name / file
    if damage is None:
        path.unlink()
    else:
        path.write_text(damage(path.read_text()))
    with pytest.raises(InputError, match=re.escape(culprit)):
        task.load(str(folders / name))


@pytest.mark.parametrize("name, task, sizes", [("hotpotqa", hover, (200, 100, 100)), ("banking77", banking77, (250, 500, 500)),
                                               ("pupa", papillon, (111, 221, 221))])
def test_the_published_data_itself_is_read(name, task, sizes):
    folder = ROOT.parent / "shared" / "data" / name
    if not folder.is_dir():
        pytest.skip(f"no published {name} data beside the project")
    t = task.load(str(folder))
    assert (len(t.train), len(t.dev), len(t.test)) == sizes
    for module, demos in labelled_demos(t, 8, 0).items():
        outputs = t.program.modules()[module].signature
        assert len(demos) == 8 and all(parse(outputs, render_outputs(outputs, d)) for d in demos)


def test_no_query_of_banking77_is_in_two_of_splits_demonstrations_and_the_rest(tmp_path):
    write_csv(tmp_path / "train.csv", ["text", "category"], [[f"query {i}", "ab"[i % 2]] for i in range(5500)])
    (tmp_path / "categories.json").write_text('["a", "b"]')
    task, (_, demonstrations, rest) = pretrain_banking77.load(str(tmp_path)), pretrain_banking77.parts(tmp_path)
    real = banking77.load(str(tmp_path))
    assert (task.train, task.dev, task.test) == (rest, real.dev, real.test)
    apart = [{e["text"] for e in part} for part in (real.train, real.dev, real.test, demonstrations, rest)]
    assert [len(p) for p in apart] == [250, 500, 500, 4000, 250] and len(set.union(*apart)) == 5500


def test_no_question_and_no_article_that_one_rests_on_is_in_the_demonstrations_of_hotpotqa(tmp_path):
    title = lambda i: f"{WORDS[i]} {WORDS[i + 100]}".title()
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(
        {"title": title(i), "text": f"{title(i)} is number {i} and a friend of {title((i + 12) % 60)} in the town."}) + "\n" for i in range(60)))
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(
        {"question": f"who asks for {i}, {title(i)}?", "titles": [title(i), title(i + 12)]}) + "\n" for i in range(12)))
    task = pretrain_hotpotqa.load(str(tmp_path))
    assert (task.train, task.dev, task.test) == (lambda t: (t.train, t.dev, t.test))(hover.load(str(tmp_path)))
    writer = pretrain_hotpotqa.Writer(random.Random(0), pretrain_hotpotqa.unasked(task))
    text = "\n".join(m["content"] + "\n".join(answers) for messages, answers in (c for _ in range(5) for c in writer.calls()) for m in messages)
    assert "is number 30 and" in text and "who asks" not in text and not re.search(r"is number ([0-9]|1\d|2[0-3]) and", text)
    assert {t for q in (writer.question() for _ in range(300)) for t in q["titles"]} <= {title(i) for i in range(24, 60)}


def test_an_index_that_was_kept_finds_what_a_fresh_one_does(tmp_path, monkeypatch):
    articles = {f"title {i}": f"text of {w}" for i, w in enumerate("river town bread song lamp river".split())}
    search, folder = lambda: hover.Search(articles, kept=tmp_path / "a" / "index"), tmp_path / "a"
    for name, value in (("tasks.hover.STOPWORDS", ["river"]), ("bm25s.__version__", "0")):      # those are other indices
        monkeypatch.setattr(name, value)
        search()
        monkeypatch.undo()
    fresh, kept, again = hover.Search(articles), search(), search()
    assert len([*folder.iterdir()]) == len([*folder.glob("index-*")]) == 3                      # and no half of one
    monkeypatch.setattr(Path, "is_dir", lambda path: path == folder)     # as for two that begin at once: the second is late
    late = search()
    monkeypatch.undo()
    assert len([*folder.iterdir()]) == 3
    for query in ("river", "bread and song", "title 3", "nothing"):
        assert fresh(query) == kept(query) == again(query) == late(query)


def test_published_data_is_fetched_checked_and_refused_by_name(tmp_path):
    """From a server in the test: a good file, one that is not as published, one that is not there; what is whole stays."""
    import functools
    import hashlib
    import http.server
    import threading

    from studies.download import download
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "good.csv").write_text("text,category")
    (tmp_path / "there" / "bad.csv").write_text("something else")
    asked = []
    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, form, *args):
            asked.append(str(args[0]))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=tmp_path / "there"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url, digest = f"http://127.0.0.1:{server.server_port}/", hashlib.sha256(b"text,category").hexdigest()
    files = {f"d/{n}.csv": (f"{url}{n}.csv", 13, digest) for n in ("good", "bad", "gone")} | {"d/any.csv": (f"{url}bad.csv", None, None)}
    failed = download(tmp_path, files)
    assert len(failed) == 2 and "bad.csv: ValueError: not as published" in failed[0] and "404" in failed[1]
    assert all(f"put there what is at {url}" in line for line in failed)
    assert (tmp_path / "d" / "good.csv").read_text() == "text,category" and (tmp_path / "d" / "any.csv").exists()
    assert not (tmp_path / "d" / "bad.csv").exists()
    asked.clear()
    download(tmp_path, files)
    assert not any("good" in a or "any" in a for a in asked)
    server.shutdown()
    assert "ConnectError" in download(tmp_path, {"x.csv": ("http://127.0.0.1:9/x.csv", None, None)})[0]


@pytest.mark.parametrize("first, second, count, quality, leaked", [
    ("A", "B", 0, 1.0, 0.0), ("B", "A", 1, 0.0, 0.5), ("equal", "equal", 2, 1.0, 1.0), ("A", "A", 99, 0.5, 1.0), ("B", "B", -1, 0.5, 0.0)])
def test_the_judge_is_asked_in_both_orders_and_counts_what_is_given_away(first, second, count, quality, leaked):
    """The response is first A, then B; a judge that always prefers one place gives one half."""
    asked = []
    class Judge:
        def predict(self, signature, **inputs):
            asked.append(inputs)
            if "request" in inputs:
                return Prediction(count=count)
            return Prediction(better=first if inputs["response_a"] == "ours" else second)
    class One(Program):
        def __init__(self):
            self.ask = Module("x -> y")
        async def forward(self, x):
            await self.ask(x=x)
            return Prediction(llm_request="for ANN", response="ours")
    example = {"x": "1", "user_query": "q", "target": "theirs", "pii": ["Ann", "Rome"]}
    run, = run_programs(One(), [example], papillon.Judged(Judge()), ScriptedSampler(lambda *_: "<y>\n1\n</y>"))
    assert run.measures == {"quality": quality, "leakage_judged": leaked, "leakage_string": 0.5}
    assert run.reward == (quality + 1 - leaked) / 2 and run.status == "completed"
    assert sorted((a["response_a"], a["response_b"]) for a in asked if "response_a" in a) == [("ours", "theirs"), ("theirs", "ours")]
