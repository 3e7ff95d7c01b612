"""A small LM from scratch for many-hop search in HotpotQA's articles, and the task to train it.

    python -m studies.pretrain_hotpotqa DATA OUT [--steps 1600]
    python mmgrpo.py train --task studies/pretrain_hotpotqa.py --data DATA --model OUT

The LM learns from scripted runs of hover's program on made-up questions. The articles that a
question of train, dev or test rests on are left out: they are neither searched nor asked for. A
script answers well or badly by chance, as for the tiny LM. A search gives one article, of which the
LM reads the first 60 words; all of it is indexed.
"""

import argparse
import random
import re
from pathlib import Path

import torch
import torch.nn.functional as F

from model import ModelConfig, Transformer
from program import Prediction, Task
from studies import pretrain
from tasks import hover

WORDS = 60  # that are read of an article
GOOD = 0.45  # the chance of a good answer

# words that begin a sentence with a capital, and are no names
STARTS = set(
    "what which who whose when where how are were is was do did does in on at of for it he she his "
    "her they this that the a an and or as both after by from to with since its".split()
)


# ----------------------------------------------------------------------------------------- the task
def scored(example: dict, prediction: Prediction) -> dict:
    """The recall, and how many articles the run found in all."""
    recall = hover.recall(example, prediction)
    return {"reward": recall, "documents": len(prediction.found)}


def load(folder: str = "") -> Task:
    """HotpotQA's questions, four searches of one article each."""
    task = hover.load(folder or ".")
    search = task.program.search
    search.documents = 1
    search.articles = {t: " ".join(text.split()[:WORDS]) for t, text in search.articles.items()}
    task.metric = scored
    task.defaults |= {
        "max_tokens": 64,
        "format_failure_score": 0.0,
        "steps": 25,
        "eval_every": 13,
    }
    return task


def unasked(task: Task) -> dict[str, str]:
    """The articles {title: text} that no question rests on."""
    asked = {title for e in task.train + task.dev + task.test for title in e["titles"]}
    articles = task.program.search.articles
    return {title: text for title, text in articles.items() if title not in asked}


# --------------------------------------------------------------------------------- scripted answers
def called(title: str) -> str:
    """What texts call the article: without "(film)"."""
    return title.split(" (")[0]


def names(text: str) -> list[str]:
    """Runs of capitalised words, each once."""
    found = re.findall(r"[A-Z][\w'.-]*\w(?: (?:of |the |and |de )?[A-Z0-9][\w'-]*)*", text)
    return [n for n in dict.fromkeys(found) if n.lower() not in STARTS]


def fresh(question: dict, text: str, seen: set[str]) -> list[str]:
    """What to look up of the names in the text.

    Those of the question's articles; if there are none, any that was not looked up.
    """
    wanted = [called(t) for t in question["titles"] if t not in seen and called(t) in text]
    if wanted:
        return wanted
    unseen = [n for n in names(text) if not any(n in t for t in seen)]
    return unseen or names(text) or [text[:20]]


def write_query(rng, question, good, inputs, seen) -> dict:
    """The name that comes next; or any name, or words of the question."""
    known = " ".join([question["claim"], *inputs["key_facts"]])
    words = question["claim"].split()
    start = rng.randrange(len(words))
    if good:
        query = fresh(question, known, seen)[0]
    else:
        bad = (rng.choice(names(known) or words), " ".join(words[start : start + 4]))
        query = rng.choice(bad)
    reasoning = rng.choice(("A name is next.", "I need one more."))
    return {"reasoning": reasoning, "query": query}


def write_note(rng, question, good, inputs, seen) -> dict:
    """The article that was found, and the name that it, or the question, leads to; or any name."""
    title, text = inputs["search_results"][0].split(" | ", 1)
    known = f"{text} {question['claim']}"
    link = fresh(question, known, seen)[0] if good else rng.choice(names(known) or [title])
    reasoning = rng.choice(("I note a name.", "This leads on."))
    return {"reasoning": reasoning, "new_key_fact": f"{title}: {link}"}


# ------------------------------------------------------------------------------------ scripted runs
class Writer(pretrain.Writer):
    """Calls of scripted runs on made-up questions over `articles` {title: text}."""

    scripts = {
        "generate_query": (hover.QUERY_INSTRUCTIONS, write_query, GOOD),
        "append_notes": (hover.NOTE_INSTRUCTIONS, write_note, GOOD),
    }

    def __init__(self, rng: random.Random, articles: dict[str, str]):
        super().__init__(rng)
        self.search = hover.Search(articles, documents=1)
        self.titles = list(articles)
        # article -> those that its text mentions; short names would be found in other words
        long = [title for title in articles if len(called(title)) > 4]
        self.links = {}
        for a in long:
            mentioned = [b for b in long if called(b) in articles[a] and called(b) not in a]
            if mentioned:
                self.links[a] = mentioned

    def prompt(self, name, module) -> float:
        """Every prompt is the program's own."""
        return GOOD

    def words(self, title: str, least: int, without: str) -> str:
        """A stretch of the article's words, without a name."""
        instead = self.rng.choice(("one", "someone", "that"))
        words = self.search.articles[title].replace(without, instead).split()
        start = self.rng.randrange(len(words))
        n = self.rng.randint(least, 2 * least)
        return " ".join(words[start : start + n]).strip(",.;")

    def question(self) -> dict:
        """{"claim", "titles"}: of two articles that are compared, or of one that mentions another.

        A third are comparisons.
        """
        choose = self.rng.choice
        a = choose(list(self.links))
        if self.rng.random() < 0.33:
            b = choose(self.titles)
            comparisons = (
                "Which is older,",
                "Are",
                "Were",
                "Who was born first,",
                "What is it that",
                "Which of them is",
            )
            start = choose(comparisons)
            both = f"{called(a)} {choose(('and', 'or'))} {called(b)}"
            claim = f"{start} {both} {self.words(a, 2, called(a))}?"
            return {"claim": claim, "titles": [a, b]}
        b = choose(self.links[a])
        parts = [self.words(b, 3, called(b)), self.words(a, 6, called(b))]
        if self.rng.random() < 0.7:
            parts.append(called(a))
        self.rng.shuffle(parts)
        starts = (
            "What",
            "Who",
            "Which",
            "When was",
            "Where is",
            "In what year",
            "How many",
            "The",
        )
        start = choose(starts)
        end = choose(("", ", who", ", what", " in which year"))
        return {"claim": f"{start} {' '.join(parts)}{end}?", "titles": [a, b]}

    async def _calls(self):
        result = []
        for _ in range(20):
            question = self.question()
            program = hover.ResearchHop(self.search)
            result += await self._run(program, {"claim": question["claim"]}, question)
        self.rng.shuffle(result)
        return result


# ------------------------------------------------------------------------------------------- the LM
def main(data: Path, out: Path, steps: int, tokens: int) -> None:
    torch.manual_seed(0)
    rng = random.Random(0)
    articles = unasked(load(str(data)))
    writer = Writer(rng, articles)
    texts = list(articles.values())
    for _ in range(10):
        for messages, completions in writer.calls():
            texts += [m["content"] for m in messages]
            texts += completions
    tokenizer = pretrain.build_tokenizer(out, texts, vocabulary=4096)
    model = Transformer(ModelConfig.from_hf(pretrain.SHAPE | {"vocab_size": tokenizer.size}))
    pretrain.initialize(model, torch.Generator().manual_seed(0))
    held_out = next(pretrain.calls(random.Random(1), writer, tokenizer, tokens, of_prompts=0))
    batches = pretrain.calls(rng, writer, tokenizer, tokens)

    def check() -> str:
        return f"answers {F.cross_entropy(held_out.logits(model), held_out.targets):.3f}"

    pretrain.fit(model, tokenizer, rng, batches, steps, tokens, out, check)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--tokens", type=int, default=4096, help="per step")
    main(**vars(parser.parse_args()))
