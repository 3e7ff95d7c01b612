"""Many-hop search (HoVer): find every article that a claim rests on.

Two modules: generate_query writes the next query from the claim and the facts so far; append_notes
takes one new fact from what the search found. The reward is the recall of the claim's articles
among all those found (HoVer's recall@k with k = searches x documents). A run makes 1 to 6 LM
calls: it stops early when a query was asked before, and takes no note when a search found nothing
new.

The miniature edition is a fictional wiki with real BM25 retrieval. The real one (`load(folder)`)
reads corpus.jsonl (lines of title and text) with HotpotQA's questions.jsonl (question, titles) or
HoVer's hover_*.json (claim, supporting_facts).
"""

import contextlib
import hashlib
import random
import re
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, Callable

import bm25s

from program import ChainOfThought, InputError, Prediction, Program, Task
from tasks.data.rows import REAL_DEFAULTS, is_text, read_rows, splits
from tasks.data.wiki import Wiki


class ResearchHop(Program):
    """claim -> titles of every article found in `hops` searches."""

    def __init__(self, search: Callable[[str], list[tuple[str, str]]], hops: int = 4):
        self.search = search
        self.hops = hops
        self.generate_query = ChainOfThought(
            "claim, key_facts: list[str] -> query", QUERY_INSTRUCTIONS[0]
        )
        self.append_notes = ChainOfThought(
            "claim, key_facts: list[str], search_results: list[str] -> new_key_fact",
            NOTE_INSTRUCTIONS[0],
        )

    async def forward(self, claim: str) -> Prediction:
        facts: list[str] = []
        found: list[str] = []
        asked: list[str] = []
        for hop in range(self.hops):
            query = claim
            if hop > 0:
                query = (await self.generate_query(claim=claim, key_facts=facts)).query
            if query in asked:
                break
            asked.append(query)

            new = {title: text for title, text in self.search(query) if title not in found}
            found += new
            is_last = hop == self.hops - 1
            if new and not is_last:
                passages = [f"{title} | {text}" for title, text in new.items()]
                note = await self.append_notes(
                    claim=claim, key_facts=facts, search_results=passages
                )
                facts = facts + [note.new_key_fact]
        return Prediction(found=found)


def recall(example: dict, prediction: Prediction) -> float:
    """Share of the claim's articles that were found."""
    hits = sum(title in prediction.found for title in example["titles"])
    return hits / len(example["titles"])


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


# ------------------------------------------------------------------------------------------- search
STOPWORDS = (
    "a an the of in on at is was are were by that which who and to from it its also both same"
).split()


def _tokens(texts: list[str], show_progress: bool = False) -> Any:
    return bm25s.tokenize(texts, stopwords=STOPWORDS, return_ids=False, show_progress=show_progress)


class Search:
    """BM25 (k1 0.9, b 0.4) over articles {title: text}.

    The title counts once more, in front of the text. With `kept`, a folder for these articles, the
    index is built once, saved there and mapped into memory from then on.
    """

    def __init__(self, articles: dict[str, str], documents: int = 3, kept: Path | None = None):
        self.articles = articles
        self.titles = list(articles)
        self.documents = min(documents, len(articles))
        if kept is None:
            self.index = self._build(show_progress=False)
            return
        # another index is that of other stop words, or of another version of bm25s
        made_with = repr((bm25s.__version__, STOPWORDS)).encode()
        digest = hashlib.blake2b(made_with, digest_size=4).hexdigest()
        kept = kept.with_name(f"{kept.name}-{digest}")
        if kept.is_dir():
            self.index = bm25s.BM25.load(kept, mmap=True)
            return
        self.index = self._build(show_progress=True)
        self._save(kept)

    def __call__(self, query: str) -> list[tuple[str, str]]:
        """The best `documents` articles as (title, text), best first.

        Those that share no word with the query are left out.
        """
        places, scores = self.index.retrieve(
            _tokens([query]), k=self.documents, show_progress=False
        )
        titles = [self.titles[i] for i, score in zip(places[0], scores[0]) if score > 0]
        return [(title, self.articles[title]) for title in titles]

    def _build(self, show_progress: bool) -> bm25s.BM25:
        index = bm25s.BM25(k1=0.9, b=0.4)
        texts = [f"{title} {title} {text}" for title, text in self.articles.items()]
        index.index(_tokens(texts, show_progress), show_progress=show_progress)
        return index

    def _save(self, folder: Path) -> None:
        """Save the index whole, or not at all."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as part:
            self.index.save(Path(part) / "index")
            # suppressed: another process was first
            with contextlib.suppress(OSError):
                (Path(part) / "index").rename(folder)


# ----------------------------------------------------------------------------------- demonstrations
def first_sentence(text: str, words: int, least: int = 40) -> str:
    """The first sentence of a text, at most so many words of it.

    It ends at the first full stop after `least` characters, so that one after an initial does not
    end it.
    """
    end = re.search(r"[.!?](?=\s|$)", text[least:])
    sentence = text[: least + end.end()] if end else text
    return " ".join(sentence.split()[:words])


def demonstrate(articles: dict[str, str], example: dict) -> dict[str, list[dict]]:
    """What a claim and its articles {title: text} show of a run that finds one after another.

    Those come first whose titles stand in the claim. The data have no reasoning: it is made from
    the titles, and shows the format.
    """
    claim = example["claim"]
    # the sort is stable: the others stay in their order
    titles = sorted(example["titles"], key=lambda title: title not in claim)
    passages = [first_sentence(articles[title], words=25) for title in titles]
    # only the beginning: an LM that copies whole sentences runs into its token limit
    facts = [first_sentence(articles[title], words=15) for title in titles]
    queries = []
    notes = []
    for i, title in enumerate(titles):
        known = {"claim": claim, "key_facts": facts[:i]}
        if i > 0:
            reasoning = f"I still need the article about {title}."
            queries.append(known | {"reasoning": reasoning, "query": title})
        notes.append(
            known
            | {
                "search_results": [f"{title} | {passages[i]}"],
                "reasoning": f"The result about {title} helps.",
                "new_key_fact": facts[i],
            }
        )
    return {"generate_query": queries, "append_notes": notes}


# --------------------------------------------------------------------------------- the real edition
def _is_titles(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(t, str) for t in value)


def _is_facts(value: Any) -> bool:
    """Whether it is a list of facts, each a list that begins with a title."""
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(fact, list) and fact and isinstance(fact[0], str) for fact in value)


def _read_claims(folder: Path) -> list[dict]:
    """Claims with their titles: hover_*.json (HoVer), else questions.jsonl (HotpotQA).

    Of HoVer only the claims over four articles, if there are any.
    """
    files = sorted(folder.glob("hover_*.json"))
    if not files:
        rows = read_rows(folder / "questions.jsonl", {"question": is_text, "titles": _is_titles})
        return [{"claim": row["question"], "titles": row["titles"]} for row in rows]
    rows = read_rows(files[0], {"claim": is_text, "supporting_facts": _is_facts})
    claims = []
    for row in rows:
        titles = {fact[0] for fact in row["supporting_facts"]}
        claims.append({"claim": row["claim"], "titles": sorted(titles)})
    long = [claim for claim in claims if len(claim["titles"]) >= 4]
    return long or claims


# train, dev and test
SIZES = 500, 250, 250
# articles from which on an index is worth keeping
MANY_ARTICLES = 100_000


def _load_real(folder: Path) -> Task:
    corpus = folder / "corpus.jsonl"
    fields = {"title": is_text, "text": is_text}
    articles = {row["title"]: row["text"] for row in read_rows(corpus, fields)}
    claims = _read_claims(folder)
    known = [c for c in claims if all(title in articles for title in c["titles"])]
    if len(known) < 4:
        raise InputError(
            f"{folder}: corpus.jsonl holds the articles of only "
            f"{len(known)} of {len(claims)} claims"
        )
    random.Random("hover").shuffle(known)
    kept = None
    # under the corpus' own digest
    if len(articles) > MANY_ARTICLES:
        with corpus.open("rb") as file:
            digest = hashlib.file_digest(file, "blake2b").hexdigest()[:16]
        kept = Path(".cache") / f"bm25-{digest}"
    train, dev, test = splits(folder, known, *SIZES)
    sizes = {"max_tokens": 96, "max_calls": 6, "steps": 30, "eval_every": 15}
    return Task(
        ResearchHop(Search(articles, kept=kept)),
        recall,
        train,
        dev,
        test,
        defaults=REAL_DEFAULTS | sizes,
        demonstrate=partial(demonstrate, articles),
    )


# ----------------------------------------------------------------------------------------- the task
def load(folder: str = "") -> Task:
    """The task: miniature where `folder` is empty, else the data in it.

    Raises InputError naming file and line.
    """
    if folder:
        return _load_real(Path(folder))
    wiki = Wiki(random.Random("hover"), "task")
    claims = [wiki.claim() for _ in range(500)]
    return Task(
        ResearchHop(Search(wiki.articles)),
        recall,
        train=claims[:240],
        dev=claims[240:360],
        test=claims[360:],
        defaults={
            "max_tokens": 64,
            "max_calls": 6,
            "steps": 24,
            "eval_every": 12,
            "lr": 1e-3,
            "warmup": 2,
            "format_failure_score": 0.0,
            "demo_score": 0.75,
        },
        instructions={"generate_query": QUERY_INSTRUCTIONS, "append_notes": NOTE_INSTRUCTIONS},
        demonstrate=partial(demonstrate, wiki.articles),
    )
