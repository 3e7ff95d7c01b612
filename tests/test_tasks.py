"""The tasks: their worlds, metrics and files, and what the pretraining text may not have."""

import csv
import functools
import hashlib
import http.server
import json
import random
import re
import threading
from pathlib import Path

import pytest
from conftest import ROOT
from strategies import ScriptedSampler

from program import InputError, Module, Prediction, Program, parse, render_outputs, run_programs
from prompts.start import labelled_demos
from studies import pretrain, pretrain_banking77, pretrain_hotpotqa
from studies.download import download
from tasks import banking77, hover, papillon
from tasks.data.world import WORDS, Names, half_of

TASKS = {"hover": hover, "banking77": banking77, "papillon": papillon}


def words(texts) -> set[str]:
    return {word for text in texts for word in re.findall(r"[A-Za-z_]+", text)}


def names(texts) -> set[str]:
    return {name for text in texts for name in pretrain.NAME.findall(text)}


def without_names(text) -> str:
    return pretrain.NAME.sub("X", text)


def texts_of(task) -> list[str]:
    """Everything that a program of the task reads from outside."""
    examples = task.train + task.dev + task.test
    given = [str(e.get("claim") or e.get("text") or e.get("user_query")) for e in examples]
    if hasattr(task.program, "search"):
        given += task.program.search.articles.values()
    return given


def splits_of(task) -> tuple[list[dict], ...]:
    return task.train, task.dev, task.test


def play(task, reply, example):
    """One run of the task's program: reply(messages, key) is what the LM says."""
    return run_programs(task.program, [example], task.metric, ScriptedSampler(reply))[0]


def answering(task, **values):
    """An LM that fills in the fields of whatever module calls it."""

    def reply(messages, key):
        return render_outputs(task.program.modules()[key[4]].signature, values)

    return reply


@pytest.fixture(scope="module")
def pretraining_text():
    """Prompts and completions of 60 small worlds' worth of scripted runs."""
    writer = pretrain.Writer(random.Random(5))
    texts = []
    for _ in range(60):
        for messages, completions in writer.calls():
            texts += [m["content"] for m in messages]
            texts += completions
    return texts


# ----------------------------------------------------------------------------------- the two halves
@pytest.mark.parametrize("name", TASKS)
def test_splits_are_disjoint_and_the_same_every_time(name):
    task = TASKS[name].load()
    distinct = [{json.dumps(e, sort_keys=True) for e in split} for split in splits_of(task)]
    assert [len(split) for split in distinct] == [240, 120, 140]
    assert len(set.union(*distinct)) == 500
    assert splits_of(task) == splits_of(TASKS[name].load())


def test_no_name_of_the_tasks_is_in_the_pretraining_text(pretraining_text):
    in_tasks = set().union(*(names(texts_of(task.load())) for task in TASKS.values()))
    whole = {name for name in in_tasks if half_of(name) == "task"}
    titles = set(hover.load().program.search.articles)
    for example in papillon.load().test + papillon.load().dev:
        titles.update(example["pii"])

    assert titles <= whole
    assert len(titles) > 2000
    assert not whole & names(pretraining_text) & titles


@pytest.mark.parametrize("name", TASKS)
def test_no_sentence_of_the_tasks_is_in_the_pretraining_text(pretraining_text, name):
    """Neither as it stands nor with other names: the templates differ."""
    pretraining = set()
    for text in pretraining_text:
        pretraining.update(without_names(piece) for piece in re.split(r"[\n\"]+", text))
    sentences = {without_names(text) for text in texts_of(TASKS[name].load())}
    assert not sentences & pretraining


@pytest.mark.parametrize("name", TASKS)
def test_every_word_of_the_tasks_is_in_the_pretraining_text(pretraining_text, name):
    known = words(pretraining_text) | set(WORDS)
    assert words(texts_of(TASKS[name].load())) <= known


def test_names_are_given_once_and_belong_to_one_half():
    for half in ("task", "pretrain"):
        new_name = Names(random.Random(1), half)
        given = [new_name() for _ in range(2000)]
        assert len(set(given)) == 2000
        assert {half_of(name) for name in given} == {half}
    assert len(WORDS) == len(set(WORDS)) == 500


def test_a_name_is_the_same_tokens_wherever_it_stands(tokenizer):
    assert all(len(tokenizer.encode(word)) == 1 for word in WORDS)
    first, second = WORDS[3], WORDS[77]
    (first_id,), (second_id,) = tokenizer.encode(first), tokenizer.encode(second)
    places = (
        "{}",
        "<query>\n{}\n</query>",
        'x "{}, y',
        '["{} | {} is a film."]',
        "by {}.\n",
        "({}, {})",
    )
    for place in places:
        ids = tokenizer.encode(place.replace("{}", f"{first} {second}"))
        assert ids.count(first_id) == ids.count(second_id) == place.count("{}")


# -------------------------------------------------------------------------------------------- hover
def oracle_search(search, example, found):
    """Three more searches, each for a title that what was found gives away."""
    found = list(found)
    for _ in range(3):
        known = example["claim"] + " ".join(search.articles[title] for title in found)
        missing = [title for title in example["titles"] if title not in found and title in known]
        if missing:
            found += [title for title, _ in search(missing[0])]
    return found


def test_searching_for_the_claim_finds_a_third_and_an_oracle_finds_all():
    task = hover.load()
    search = task.program.search
    by_claim, by_oracle = [], []
    for example in task.dev:
        found = [title for title, _ in search(example["claim"])]
        by_claim.append(hover.recall(example, Prediction(found=found)))
        found = oracle_search(search, example, found)
        by_oracle.append(hover.recall(example, Prediction(found=found)))
    assert 0.25 < sum(by_claim) / len(by_claim) < 0.5
    assert sum(by_oracle) / len(by_oracle) > 0.95


def has_a_hidden_second_title(example):
    """Four titles, the second of which only the first article tells."""
    titles, named = example["titles"], example["named"]
    return len(titles) == 4 and len(named) == 2 and titles[1] not in named


def test_hover_calls_its_modules_a_varying_number_of_times():
    task = hover.load()
    example = next(e for e in task.dev if has_a_hidden_second_title(e))
    queries = iter(example["titles"][1:] + ["never"])

    def oracle(messages, key):
        values = {"reasoning": "r", "new_key_fact": "f"}
        if key[4] == "generate_query":
            values = {"reasoning": "r", "query": next(queries)}
        return answering(task, **values)(messages, key)

    t = play(task, oracle, example)
    assert t.status == "completed"
    assert t.reward == 1.0
    pair = ["append_notes", "generate_query"]
    assert [c.module for c in t.calls] == pair * 3 or len(t.calls) < 6

    # the query was asked before: the run ends early
    repeat = answering(task, reasoning="r", query=example["claim"], new_key_fact="f")
    t = play(task, repeat, example)
    assert [c.module for c in t.calls] == pair


@pytest.mark.parametrize("query", ["", "the of and", "nothing-matches-this", "🙂", "a" * 10_000])
def test_a_search_that_matches_nothing_finds_nothing(query):
    assert hover.load().program.search(query) == []


def test_an_index_that_was_kept_finds_what_a_fresh_one_does(tmp_path, monkeypatch):
    contents = "river town bread song lamp river".split()
    articles = {f"title {i}": f"text of {word}" for i, word in enumerate(contents)}
    folder = tmp_path / "a"

    def search():
        return hover.Search(articles, kept=folder / "index")

    # those of other stop words or another bm25s are other indices
    for name, value in (("tasks.hover.STOPWORDS", ["river"]), ("bm25s.__version__", "0")):
        monkeypatch.setattr(name, value)
        search()
        monkeypatch.undo()
    fresh, kept, again = hover.Search(articles), search(), search()
    # and no half of one
    assert len([*folder.iterdir()]) == len([*folder.glob("index-*")]) == 3

    # as for two that begin at once: the second is late
    monkeypatch.setattr(Path, "is_dir", lambda path: path == folder)
    late = search()
    monkeypatch.undo()
    assert len([*folder.iterdir()]) == 3

    for query in ("river", "bread and song", "title 3", "nothing"):
        assert fresh(query) == kept(query) == again(query) == late(query)


# ------------------------------------------------------------------------------ banking77, papillon
def test_exact_match_is_exact():
    example = {"intent": "card_fee"}
    assert banking77.exact_match(example, Prediction(intent="card_fee")) == 1.0
    assert banking77.exact_match(example, Prediction(intent="card_wrong")) == 0.0


@pytest.mark.parametrize(
    "request_, response, reward",
    [
        ("Write a note about the garden.", "Dear Bilar Dulon, {line}.", 1.0),
        ("Write a note to Bilar Dulon about the garden.", "Dear Bilar Dulon, {line}.", 0.75),
        ("For BILAR DULON in Kamon Refal", "Dear Bilar Dulon, {line}.", 0.5),
        ("", "", 0.5),
        ("a note", "Dear Bilar Dulon, hello.", 0.75),
        ("Bilar Dulon Kamon Refal", "", 0.0),
    ],
)
def test_the_reward_of_papillon_weighs_quality_and_leakage(request_, response, reward):
    line = papillon.line_about("garden")
    example = {"pii": ["Bilar Dulon", "Kamon Refal"], "parts": ["Dear Bilar Dulon", line]}
    prediction = Prediction(llm_request=request_, response=response.format(line=line))
    metric = papillon.Reward(papillon.quality_of_parts)
    assert metric(example, prediction) == pytest.approx(reward)


def test_the_untrusted_lm_knows_the_line_only_if_it_is_told_the_topic():
    line = papillon.line_about("garden")
    assert line in papillon.untrusted("Write a letter to my doctor about the garden.")
    assert papillon.untrusted("Write a letter to my doctor.") == "What is it about?"
    # pretraining never tells the task's lines
    assert papillon.line_about("garden", "a") != papillon.line_about("garden", "b")


class Judge:
    """One that prefers the response `first` to stand first, `second` to stand second."""

    def __init__(self, first, second, count):
        self.first, self.second, self.count = first, second, count
        self.asked = []

    def predict(self, signature, **inputs):
        self.asked.append(inputs)
        if "request" in inputs:
            return Prediction(count=self.count)
        ours_is_first = inputs["response_a"] == "ours"
        return Prediction(better=self.first if ours_is_first else self.second)


class AsksForAnn(Program):
    def __init__(self):
        self.ask = Module("x -> y")

    async def forward(self, x):
        await self.ask(x=x)
        return Prediction(llm_request="for ANN", response="ours")


@pytest.mark.parametrize(
    "first, second, count, quality, leaked",
    [
        ("A", "B", 0, 1.0, 0.0),
        ("B", "A", 1, 0.0, 0.5),
        ("equal", "equal", 2, 1.0, 1.0),
        ("A", "A", 99, 0.5, 1.0),
        ("B", "B", -1, 0.5, 0.0),
    ],
)
def test_the_judge_is_asked_in_both_orders_and_counts_what_is_given_away(
    first, second, count, quality, leaked
):
    """The response is first A, then B; a judge that always prefers one place gives one half."""
    judge = Judge(first, second, count)
    example = {"x": "1", "user_query": "q", "target": "theirs", "pii": ["Ann", "Rome"]}
    sampler = ScriptedSampler(lambda *_: "<y>\n1\n</y>")
    (run,) = run_programs(AsksForAnn(), [example], papillon.Judged(judge), sampler)

    assert run.status == "completed"
    assert run.measures == {
        "quality": quality,
        "leakage_judged": leaked,
        "leakage_string": 0.5,
    }
    assert run.reward == (quality + 1 - leaked) / 2
    orders = [(a["response_a"], a["response_b"]) for a in judge.asked if "response_a" in a]
    assert sorted(orders) == [("ours", "theirs"), ("theirs", "ours")]


# --------------------------------------------------------------------------------------- real files
def write_csv(path, header, rows):
    with path.open("w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows([header, *rows])


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folders(tmp_path):
    """Small folders in the formats of the published data."""
    for name in ("hotpotqa", "hover", "banking77", "pupa"):
        (tmp_path / name).mkdir()

    articles = [{"title": f"T{i}", "text": f"text number {i}"} for i in range(20)]
    questions = [
        {"id": str(i), "question": f"which number is {i}?", "titles": [f"T{i}"]} for i in range(12)
    ]
    claims = [
        {"claim": f"claim {i}", "supporting_facts": [[f"T{i}", 0], [f"T{i + 1}", 2], [f"T{i}", 3]]}
        for i in range(12)
    ]
    write_jsonl(tmp_path / "hotpotqa" / "corpus.jsonl", articles)
    write_jsonl(tmp_path / "hotpotqa" / "questions.jsonl", questions)
    write_jsonl(tmp_path / "hover" / "corpus.jsonl", articles)
    (tmp_path / "hover" / "hover_dev_release_v1.1.json").write_text(json.dumps(claims))

    queries = [[f"where is card {i}, please?", "a" if i % 2 else "b"] for i in range(20)]
    write_csv(tmp_path / "banking77" / "train.csv", ["text", "category"], queries)
    (tmp_path / "banking77" / "categories.json").write_text('["a", "b"]')

    header = ["user_query", "target_response", "pii_units"]
    rows = [[f"write to Ann {i}\nplease", "Dear Ann", f"Ann {i}||Bob"] for i in range(12)]
    write_csv(tmp_path / "pupa" / "PUPA_New.csv", header, rows)
    return tmp_path


@pytest.mark.parametrize(
    "name, task",
    [("hotpotqa", hover), ("hover", hover), ("banking77", banking77), ("pupa", papillon)],
)
def test_published_formats_are_read(folders, name, task):
    t = task.load(str(folders / name))
    assert t.train and t.dev and t.test
    assert not [e for e in t.train if e in t.dev + t.test]
    assert not [e for e in t.dev if e in t.test]

    reply = answering(
        t,
        reasoning="r",
        query="number 3",
        new_key_fact="f",
        intent="a",
        llm_request="Ann 3",
        response="Dear Ann",
    )
    runs = [play(t, reply, e) for e in t.dev]
    assert all(run.status == "completed" and 0 <= run.reward <= 1 for run in runs)
    assert any(run.reward for run in runs)


def missing(path):
    path.unlink()


def content(text):
    """The file has that instead."""
    return lambda path: path.write_text(text)


def replaced(old, new, count=-1):
    return lambda path: path.write_text(path.read_text().replace(old, new, count))


def cut(characters):
    """The file lacks its last characters."""
    return lambda path: path.write_text(path.read_text()[:-characters])


def appended(text):
    return lambda path: path.write_text(path.read_text() + text)


MODULES = {"hotpotqa": hover, "hover": hover, "banking77": banking77, "pupa": papillon}
HOVER_FILE = "hover/hover_dev_release_v1.1.json"
# the file, what is done to it, a part of the sentence that refuses it
MALFORMED = [
    ("hotpotqa/corpus.jsonl", missing, "corpus.jsonl"),
    ("hotpotqa/questions.jsonl", missing, "questions.jsonl"),
    ("hotpotqa/corpus.jsonl", replaced('"T3"', "3"), "corpus.jsonl:4: title"),
    ("hotpotqa/questions.jsonl", replaced('"question"', '"q"', 1), "questions.jsonl:1: question"),
    ("hotpotqa/questions.jsonl", cut(20), "questions.jsonl:12"),
    ("hotpotqa/corpus.jsonl", content(""), "corpus.jsonl"),
    ("hotpotqa/corpus.jsonl", content("\n\n\n{"), "corpus.jsonl:4: cannot be read"),
    ("hotpotqa/questions.jsonl", replaced("T", "U"), "only 0 of 12 claims"),
    (HOVER_FILE, cut(1), "hover_dev_release"),
    (HOVER_FILE, replaced('"claim 2"', "null"), "entry 2: claim"),
    (HOVER_FILE, replaced('["T2", 0]', "3", 1), "entry 2: supporting_facts"),
    (HOVER_FILE, content('{"a": 1}'), "hover_dev_release"),
    ("banking77/train.csv", missing, "train.csv"),
    ("banking77/categories.json", content("{}"), "categories.json"),
    ("banking77/train.csv", replaced(",a", ",zzz", 1), "train.csv:3"),
    ("banking77/train.csv", replaced('please?",b', "please?", 1), "train.csv"),
    ("banking77/train.csv", content("text,category\n"), "train.csv"),
    ("pupa/PUPA_New.csv", replaced("pii_units", "pii"), "PUPA_New.csv:3: pii_units"),
    ("pupa/PUPA_New.csv", replaced("Dear Ann", "", 1), "target_response"),
    ("pupa/PUPA_New.csv", appended('"open'), "PUPA_New.csv"),
]


@pytest.mark.parametrize("file, damage, culprit", MALFORMED)
def test_a_malformed_file_or_row_is_named(folders, file, damage, culprit):
    path = folders / file
    damage(path)
    with pytest.raises(InputError, match=re.escape(culprit)):
        MODULES[path.parent.name].load(str(path.parent))


@pytest.mark.parametrize(
    "name, task, sizes",
    [
        ("hotpotqa", hover, (200, 100, 100)),
        ("banking77", banking77, (250, 500, 500)),
        ("pupa", papillon, (111, 221, 221)),
    ],
)
def test_the_published_data_itself_is_read(name, task, sizes):
    folder = ROOT.parent / "shared" / "data" / name
    if not folder.is_dir():
        pytest.skip(f"no published {name} data beside the project")
    t = task.load(str(folder))
    assert tuple(map(len, splits_of(t))) == sizes
    for module, demos in labelled_demos(t, 8, 0).items():
        outputs = t.program.modules()[module].signature
        assert len(demos) == 8
        assert all(parse(outputs, render_outputs(outputs, demo)) for demo in demos)


# -------------------------------------------------------------------- demonstrations of pretraining
def test_the_demonstrations_and_splits_of_banking77_share_no_query(tmp_path):
    queries = [[f"query {i}", "ab"[i % 2]] for i in range(5500)]
    write_csv(tmp_path / "train.csv", ["text", "category"], queries)
    (tmp_path / "categories.json").write_text('["a", "b"]')

    real = banking77.load(str(tmp_path))
    _, demonstrations, rest = pretrain_banking77.parts(tmp_path)

    assert splits_of(pretrain_banking77.load(str(tmp_path))) == (rest, real.dev, real.test)
    parts = (real.train, real.dev, real.test, demonstrations, rest)
    distinct = [{e["text"] for e in part} for part in parts]
    assert [len(part) for part in distinct] == [250, 500, 500, 4000, 250]
    assert len(set.union(*distinct)) == 5500


def title(i):
    return f"{WORDS[i]} {WORDS[i + 100]}".title()


def article(i):
    friend = title((i + 12) % 60)
    text = f"{title(i)} is number {i} and a friend of {friend} in the town."
    return {"title": title(i), "text": text}


def question(i):
    return {"question": f"who asks for {i}, {title(i)}?", "titles": [title(i), title(i + 12)]}


def test_no_question_of_hotpotqa_nor_its_articles_are_in_demonstrations(tmp_path):
    write_jsonl(tmp_path / "corpus.jsonl", map(article, range(60)))
    write_jsonl(tmp_path / "questions.jsonl", map(question, range(12)))
    task = pretrain_hotpotqa.load(str(tmp_path))
    assert splits_of(task) == splits_of(hover.load(str(tmp_path)))

    writer = pretrain_hotpotqa.Writer(random.Random(0), pretrain_hotpotqa.unasked(task))
    pieces = []
    for _ in range(5):
        for messages, answers in writer.calls():
            pieces += [m["content"] for m in messages]
            pieces += answers
    text = "\n".join(pieces)
    used = {t for _ in range(300) for t in writer.question()["titles"]}

    assert "is number 30 and" in text
    assert "who asks" not in text
    # the questions rest on articles 0 to 23
    assert not re.search(r"is number ([0-9]|1\d|2[0-3]) and", text)
    assert used <= {title(i) for i in range(24, 60)}


# ----------------------------------------------------------------------------------------- download
@pytest.fixture
def published(tmp_path):
    """Two files on a server -> (its address, its requests)."""
    folder = tmp_path / "there"
    folder.mkdir()
    (folder / "good.csv").write_text("text,category")
    (folder / "bad.csv").write_text("something else")
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, form, *args):
            asked.append(str(args[0]))

    handler = functools.partial(Handler, directory=folder)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/", asked
    server.shutdown()


def test_published_data_is_fetched_checked_and_refused_by_name(tmp_path, published):
    """A good file, one that is not as published, one that is not there; what is whole stays."""
    url, asked = published
    digest = hashlib.sha256(b"text,category").hexdigest()
    files = {
        "d/good.csv": (f"{url}good.csv", 13, digest),
        "d/bad.csv": (f"{url}bad.csv", 13, digest),
        "d/gone.csv": (f"{url}gone.csv", 13, digest),
        "d/any.csv": (f"{url}bad.csv", None, None),
    }

    failed = download(tmp_path, files)
    assert len(failed) == 2
    assert "bad.csv: ValueError: not as published" in failed[0]
    assert "404" in failed[1]
    assert all(f"put there what is at {url}" in line for line in failed)
    assert (tmp_path / "d" / "good.csv").read_text() == "text,category"
    assert (tmp_path / "d" / "any.csv").exists()
    assert not (tmp_path / "d" / "bad.csv").exists()

    asked.clear()
    download(tmp_path, files)
    assert not any("good" in request or "any" in request for request in asked)
    nowhere = {"x.csv": ("http://127.0.0.1:9/x.csv", None, None)}
    assert "ConnectError" in download(tmp_path, nowhere)[0]
