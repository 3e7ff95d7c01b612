"""Many-hop search (HoVer): find every article that a claim rests on, by searching, noting, and searching again.

Two modules: generate_query writes the next query from the claim and the facts so far; append_notes takes one new fact
from what the search found. The reward is the recall of the claim's articles among all those found (HoVer's
recall@k with k = searches x documents). A run makes 1 to 6 LM calls: it stops early when a query was asked before, and
takes no note when a search found nothing new.

The miniature edition is a fictional wiki with real BM25 retrieval. The real one (`load(folder)`) reads corpus.jsonl
(lines of title and text) with HotpotQA's questions.jsonl (question, titles) or HoVer's hover_*.json (claim,
supporting_facts).
"""
import contextlib
import hashlib
import random
import re
import tempfile
from functools import partial
from pathlib import Path

import bm25s

from program import ChainOfThought, InputError, Prediction, Program, Task
from tasks.data.rows import REAL, read_rows, splits, text
from tasks.data.world import Names


class ResearchHop(Program):
    """claim -> titles of every article found in `hops` searches."""
    def __init__(self, search, hops: int = 4):
        self.search, self.hops = search, hops
        self.generate_query = ChainOfThought("claim, key_facts: list[str] -> query", QUERY_INSTRUCTIONS[0])
        self.append_notes = ChainOfThought("claim, key_facts: list[str], search_results: list[str] -> new_key_fact",
                                           NOTE_INSTRUCTIONS[0])

    async def forward(self, claim: str) -> Prediction:
        facts, found, asked = [], [], []
        for hop in range(self.hops):
            query = (await self.generate_query(claim=claim, key_facts=facts)).query if hop else claim
            if query in asked:
                break
            asked.append(query)
            new = {title: text for title, text in self.search(query) if title not in found}
            found += new
            if new and hop < self.hops - 1:
                passages = [f"{title} | {text}" for title, text in new.items()]
                note = await self.append_notes(claim=claim, key_facts=facts, search_results=passages)
                facts = facts + [note.new_key_fact]
        return Prediction(found=found)


# The first is the program's own; the others are what prompt search may choose from.
QUERY_INSTRUCTIONS = (
    "Write a search query for the next article.",
    "Name the one article that the claim still needs.",
    "Search for the name that the last fact leads to.",
    "Search for something.",
    "Ask about the claim.",
    "Look up what is missing.",
)
NOTE_INSTRUCTIONS = (
    "Note a result and the name it leads to.",
    "Note the result that leads on from the claim, and the name it leads to.",
    "Which result tells of the next article? Note both.",
    "Say something about the results.",
    "Take a note.",
    "Note what the claim is about.",
)


def recall(example: dict, prediction: Prediction) -> float:
    """Share of the claim's articles that were found."""
    return sum(title in prediction.found for title in example["titles"]) / len(example["titles"])


STOPWORDS = "a an the of in on at is was are were by that which who and to from it its also both same".split()


class Search:
    """BM25 (k1 0.9, b 0.4) over articles {title: text}; the title counts once more, in front of the text. With `kept`, a folder
    for these articles, the index is built once, saved there and mapped into memory from then on; its name goes on with a digest of
    the stop words and bm25s' version, whose index it is."""
    def __init__(self, articles: dict[str, str], documents: int = 3, kept: Path | None = None):
        self.articles, self.titles, self.documents = articles, list(articles), min(documents, len(articles))
        if kept:
            of = hashlib.blake2b(repr((bm25s.__version__, STOPWORDS)).encode(), digest_size=4)
            kept = kept.with_name(f"{kept.name}-{of.hexdigest()}")
        if kept and kept.is_dir():
            self.index = bm25s.BM25.load(kept, mmap=True)
            return
        self.index = bm25s.BM25(k1=0.9, b=0.4)
        self.index.index(self._tokens([f"{t} {t} {text}" for t, text in articles.items()], bool(kept)), show_progress=bool(kept))
        if kept:
            kept.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=kept.parent) as part:
                self.index.save(Path(part) / "index")
                with contextlib.suppress(OSError):          # another process was first
                    (Path(part) / "index").rename(kept)     # whole, or not there

    def _tokens(self, texts: list[str], progress: bool = False):
        return bm25s.tokenize(texts, stopwords=STOPWORDS, return_ids=False, show_progress=progress)

    def __call__(self, query: str) -> list[tuple[str, str]]:
        """The best `documents` articles as (title, text), best first; those that share no word with it are left out."""
        places, scores = self.index.retrieve(self._tokens([query]), k=self.documents, show_progress=False)
        return [(self.titles[i], self.articles[self.titles[i]]) for i, s in zip(places[0], scores[0]) if s > 0]


def first_sentence(text: str, words: int, least: int = 40) -> str:
    """The text up to the first full stop after `least` characters, so that one after an initial does not end it; at most so many
    words."""
    end = re.search(r"[.!?](?=\s|$)", text[least:])
    sentence = text[:least + end.end()] if end else text
    return " ".join(sentence.split()[:words])


def demonstrate(articles: dict[str, str], example: dict) -> dict[str, list[dict]]:
    """What a claim and its articles {title: text} show of a run that finds these one after another, those first whose titles stand in
    the claim. A note is the beginning of an article's first sentence: an LM that copies whole ones runs into its token limit. The data
    have no reasoning: these are made from the titles, and show the format."""
    claim = example["claim"]
    titles = sorted(example["titles"], key=lambda title: title not in claim)        # stable: the others stay in their order
    passages = [first_sentence(articles[t], words=25) for t in titles]
    facts = [first_sentence(articles[t], words=15) for t in titles]
    queries, notes = [], []
    for i, title in enumerate(titles):
        known = {"claim": claim, "key_facts": facts[:i]}
        if i > 0:
            queries.append(known | {"reasoning": f"I still need the article about {title}.", "query": title})
        notes.append(known | {"search_results": [f"{title} | {passages[i]}"], "reasoning": f"The result about {title} helps.",
                              "new_key_fact": facts[i]})
    return {"generate_query": queries, "append_notes": notes}


# ------------------------------------------------------------------------------------------- the miniature edition

KINDS = {"film": ("directed", "director"), "novel": ("written", "author"), "album": ("recorded", "singer"),
         "company": ("founded", "founder")}
JOBS = ("painter", "teacher", "farmer", "lawyer", "sailor", "singer", "baker", "doctor")
GOODS = ("salt", "wool", "wine", "glass", "paper", "honey", "iron", "tea")

# Sentences of the two halves of the world; every word of a "task" sentence occurs in some "pretrain" sentence.
ARTICLES = {
    "pretrain": {
        "work": ("{W} is a {kind} {made} by {P}.", "{W} is a {kind}. It was {made} by {P}.", "The {kind} {W} was {made} by {P}.",
                 "The {maker} {P} has {made} the {kind} {W}.", "{P} is known as the {maker} of {W}."),
        "person": ("{P} is a {job} born in {T}.", "{P} is a {job} from the town {T}.", "{P} was born in {T} and is a {job}.",
                   "The town {T} is the birthplace of the {job} {P}.", "From {T} comes the {job} {P}."),
        "town": ("{T} is a town on the river {R} in the district {D}.", "{T} is a town in {D}. It lies on the river {R}.",
                 "The river {R} has on it the town {T}."),
        "river": ("{R} is a river that rises in the district {D}.", "The river {R} rises in {D}.", "In {D} rises the river {R}."),
        "district": ("{D} is a district known for its {goods}.", "The district {D} lives on {goods}."),
    },
    "task": {
        "work": ("{W} is the {kind} that was {made} by {P}.", "{P} is the {maker} of the {kind} {W}."),
        "person": ("The {job} {P} was born in the town {T}.", "{P}, born in {T}, is a {job}."),
        "town": ("The town {T} lies on the river {R} in {D}.", "{T} is the town on {R} in the district {D}."),
        "river": ("{R} rises in the district {D}.", "{R} is the river that rises in {D}."),
        "district": ("{D} is the district that lives on its {goods}.", "The district {D} is known for {goods}."),
    },
}
CLAIMS = {
    "pretrain": {
        3: ("The {maker} of the {kind} {W} was born in a town on the river {R}.",
            "A town on the river {R} is the birthplace of the {maker} of {W}.",
            "The {kind} {W} was {made} by someone from a town on the river {R}.",
            "Someone from a town on the river {R} is known as the {maker} of {W}."),
        4: ("The {maker} of the {kind} {W} was born in a town on a river that rises in {D}.",
            "The {kind} {W} was {made} by someone whose birthplace lies on a river that rises in {D}.",
            "A river that rises in {D} has on it the town where the {maker} of {W} was born.",
            "{W} is by someone who was born in a town on a river that rises in the district {D}."),
        2: ("The {maker} of {W} and the {maker2} of {W2} were born in the same town.",
            "The {kind} {W} and the {kind2} {W2} are both by people from the same town.",
            "One town is the birthplace of the {maker} of the {kind} {W} and of the {maker2} of {W2}.",
            "Both {W} and {W2} are by people who were born in one town."),
    },
    "task": {
        3: ("Someone born in a town on the river {R} was the {maker} of the {kind} {W}.",
            "The river {R} has on it the birthplace of the {maker} of the {kind} {W}."),
        4: ("Someone whose birthplace lies on a river that rises in the district {D} is the {maker} of {W}.",
            "The {maker} of the {kind} {W} was born where a river that rises in {D} has a town on it."),
        2: ("Both the {maker} of {W} and the {maker2} of the {kind2} {W2} are from one town.",
            "The {maker} of the {kind} {W} comes from the same town as the {maker2} of {W2}."),
    },
}


class Wiki:
    """A fictional wiki of `size` articles in one half's names and sentences, and claims about it.

    `articles` maps title to text; `claim()` gives {"claim", "titles" (in the order they can be found), "named"}.
    """
    def __init__(self, rng: random.Random, half: str, size: int = 2000):
        self.rng, self.half, names = rng, half, Names(rng, half)
        several = lambda share: [names() for _ in range(max(2, round(size * share)))]
        districts, rivers, towns, people, works = map(several, (0.03, 0.05, 0.12, 0.40, 0.40))
        pick = rng.choice
        self.rises = {R: pick(districts) for R in rivers}
        self.lies = {T: (pick(rivers), pick(districts)) for T in towns}
        self.born = {P: pick(towns) for P in people}
        self.made = {W: (pick(list(KINDS)), pick(people)) for W in works}
        self.natives = {T: [W for W in works if self.born[self.made[W][1]] == T] for T in towns}
        self.articles = {}
        for D in districts:
            self._write("district", D, D=D, goods=pick(GOODS))
        for R in rivers:
            self._write("river", R, R=R, D=self.rises[R])
        for T in towns:
            self._write("town", T, T=T, R=self.lies[T][0], D=self.lies[T][1])
        for P in people:
            self._write("person", P, P=P, T=self.born[P], job=pick(JOBS))
        for W in works:
            self._write("work", W, W=W, P=self.made[W][1], **self._kind(W))
        self.used = set()

    def _write(self, sort: str, title: str, **values):
        words = self.rng.choice(ARTICLES[self.half][sort]).split()
        if self.half == "pretrain" and self.rng.random() < 0.3:        # names are to be found in any sentence
            self.rng.shuffle(words)
        self.articles[title] = " ".join(words).format(**values)

    def _kind(self, W: str, mark: str = "") -> dict:
        kind = self.made[W][0]
        return {f"kind{mark}": kind, f"made{mark}": KINDS[kind][0], f"maker{mark}": KINDS[kind][1]}

    def claim(self) -> dict:
        """Half chains over three articles, a quarter over four, a quarter pairs of works; each work is used once."""
        while True:
            shape = self.rng.choice((3, 3, 4, 2))
            W = self.rng.choice(list(self.made))
            P = self.made[W][1]
            T = self.born[P]
            R = self.lies[T][0]
            others = [w for w in self.natives[T] if self.made[w][1] != P and w not in self.used]
            if W not in self.used and (shape != 2 or others):
                break
        values = {"W": W, "R": R, "D": self.rises[R], **self._kind(W)}
        titles, named = {3: ([W, P, T], [W, R]), 4: ([W, P, T, R], [W, values["D"]]), 2: ([W, P], [W])}[shape]
        if shape == 2:
            W2 = self.rng.choice(others)
            values |= {"W2": W2, **self._kind(W2, "2")}
            titles, named = [W, W2, P, self.made[W2][1]], [W, W2]
        self.used |= {W, values.get("W2", W)}
        return {"claim": self.rng.choice(CLAIMS[self.half][shape]).format(**values), "titles": titles, "named": named}


def load(folder: str = "") -> Task:
    """The task: miniature where `folder` is empty, else the data in it. Raises InputError naming file and line."""
    if folder:
        return _load_real(Path(folder))
    wiki = Wiki(random.Random("hover"), "task")
    claims = [wiki.claim() for _ in range(500)]
    return Task(ResearchHop(Search(wiki.articles)), recall, train=claims[:240], dev=claims[240:360], test=claims[360:],
                defaults={"max_tokens": 64, "max_calls": 6, "steps": 24, "eval_every": 12, "lr": 1e-3, "warmup": 2,
                          "format_failure_score": 0.0, "demo_score": 0.75},
                instructions={"generate_query": QUERY_INSTRUCTIONS, "append_notes": NOTE_INSTRUCTIONS},
                demonstrate=partial(demonstrate, wiki.articles))


# ------------------------------------------------------------------------------------------------- the real edition

def _titles(value) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(t, str) for t in value)


def _facts(value) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(f, list) and f and isinstance(f[0], str) for f in value)


def _load_real(folder: Path) -> Task:
    """corpus.jsonl with questions.jsonl (HotpotQA) or hover_*.json (HoVer, only its claims over four articles if any are)."""
    articles = {r["title"]: r["text"] for r in read_rows(folder / "corpus.jsonl", {"title": text, "text": text})}
    if files := sorted(folder.glob("hover_*.json")):
        rows = read_rows(files[0], {"claim": text, "supporting_facts": _facts})
        claims = [{"claim": r["claim"], "titles": sorted({fact[0] for fact in r["supporting_facts"]})} for r in rows]
        claims = [c for c in claims if len(c["titles"]) >= 4] or claims
    else:
        rows = read_rows(folder / "questions.jsonl", {"question": text, "titles": _titles})
        claims = [{"claim": r["question"], "titles": r["titles"]} for r in rows]
    known = [c for c in claims if all(t in articles for t in c["titles"])]
    if len(known) < 4:
        raise InputError(f"{folder}: corpus.jsonl holds the articles of only {len(known)} of {len(claims)} claims")
    random.Random("hover").shuffle(known)
    kept = None
    if len(articles) > 100_000:                             # worth keeping; under the corpus' own digest
        with (folder / "corpus.jsonl").open("rb") as file:
            kept = Path(".cache") / f"bm25-{hashlib.file_digest(file, 'blake2b').hexdigest()[:16]}"
    return Task(ResearchHop(Search(articles, kept=kept)), recall, *splits(folder, known, 500, 250, 250),
                REAL | {"max_tokens": 96, "max_calls": 6, "steps": 30, "eval_every": 15}, demonstrate=partial(demonstrate, articles))
