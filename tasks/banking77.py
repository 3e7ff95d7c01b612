"""Intent classification (Banking77): name what a bank's customer wants, of a closed set of labels.

One module, classify, called once: mmGRPO is plain GRPO here. The reward is exact match.

The miniature edition has 25 intents (five things, five troubles) in generated sentences, some of
which mention a second thing in passing. The real one (`load(folder)`) reads train.csv (text,
category) and categories.json.
"""

import json
import random
from pathlib import Path

from program import ChainOfThought, InputError, Prediction, Program, Task
from tasks.data.rows import REAL_DEFAULTS, is_text, read_rows, splits


class Classify(Program):
    """text -> the customer's intent, one of `labels`."""

    def __init__(self, labels: tuple[str, ...]):
        self.classify = ChainOfThought("text -> intent", INSTRUCTIONS[0], types={"intent": labels})

    async def forward(self, text: str) -> Prediction:
        return Prediction(intent=(await self.classify(text=text)).intent)


def exact_match(example: dict, prediction: Prediction) -> float:
    return float(prediction.intent == example["intent"])


# The first is the program's own; the others are what prompt search may choose from.
INSTRUCTIONS = (
    "Name the intent of the customer.",
    "Find the trouble that the customer has, then name the intent.",
    "Name the thing that is in trouble and what the trouble is.",
    "Guess an intent.",
    "Say what the text mentions.",
    "Choose the intent that fits the text.",
)


def demonstrate(example: dict) -> dict[str, list[dict]]:
    """What an example shows of `classify`.

    The data have no reasoning: this one is made of the label, for the format's sake. Its words
    alone ("about a card that has not arrived") led a small LM to labels of its own making.
    """
    intent = example["intent"]
    reasoning = f"The intent that fits is {intent}."
    return {"classify": [{"text": example["text"], "reasoning": reasoning, "intent": intent}]}


# ---------------------------------------------------------------------------- the miniature edition
THINGS = {
    "card": ("card", "bank card", "new card"),
    "transfer": ("transfer", "transfer to a friend", "bank transfer"),
    "refund": ("refund", "refund from the shop", "money back"),
    "cash": ("cash", "cash from the machine", "cash withdrawal"),
    "account": ("account", "savings account", "bank account"),
}
# Sentences of the two halves; every word of a "task" sentence occurs in some "pretrain" sentence.
# {x} is the thing in trouble, {y} one that is mentioned in passing.
TROUBLES = {
    "pretrain": {
        "missing": (
            "my {x} has not arrived yet",
            "I still wait for my {x}",
            "there is no sign of my {x}",
            "when will my {x} arrive",
            "I have yet to get my {x}",
            "still my {x} is not here",
        ),
        "declined": (
            "my {x} was declined",
            "they do not accept my {x}",
            "my {x} did not go through",
            "the bank declined my {x} again",
            "my {x} does not work any more",
        ),
        "fee": (
            "I was charged a fee for my {x}",
            "why does my {x} cost extra",
            "there is a fee on my {x}",
            "they charged me for my {x}",
            "I see a cost on my {x}",
        ),
        "wrong": (
            "my {x} shows the wrong amount",
            "the amount of my {x} is not right",
            "there is a mistake in my {x}",
            "my {x} is not what I asked for",
            "the number on my {x} is wrong",
        ),
        "cancel": (
            "I want to cancel my {x}",
            "please stop my {x}",
            "I do not need my {x} any more",
            "how can you cancel my {x}",
            "I need to end my {x}",
            "can I send my {x} back",
        ),
    },
    "task": {
        "missing": ("still no {x} and I wait and wait", "my {x} has yet to arrive"),
        "declined": ("they declined my {x} again", "my {x} does not go through"),
        "fee": ("my {x} was charged extra", "why is there a cost for my {x}"),
        "wrong": ("the {x} is not the right amount", "I see a mistake, my {x} is wrong"),
        "cancel": ("can you stop the {x} please", "I need you to cancel the {x}"),
    },
}
FRAMES = {
    "pretrain": (
        "{trouble}.",
        "Hello, {trouble}.",
        "{trouble}, what can I do?",
        "Yesterday I saw that {trouble}.",
        "The {y} is fine, but {trouble}.",
        "I got the {y} today, now {trouble}.",
        "{trouble}. I know the {y} is fine.",
        "Today the {y} is here and right, yet {trouble}.",
    ),
    "task": (
        "Hello, what can I do now, {trouble}?",
        "I saw today that {trouble}.",
        "The {y} is here and fine, {trouble}.",
        "Yesterday I got the {y}, but {trouble}.",
        "{trouble}, but the {y} is right.",
    ),
}
LABELS = tuple(f"{thing}_{trouble}" for thing in THINGS for trouble in TROUBLES["task"])


def query(rng: random.Random, half: str) -> dict:
    """A customer's sentence: {"text", "intent", "mentioned" (in passing, a thing or None)}."""
    thing, other = rng.sample(list(THINGS), 2)
    trouble = rng.choice(list(TROUBLES[half]))
    frame = rng.choice(FRAMES[half])
    sentence = rng.choice(TROUBLES[half][trouble]).format(x=rng.choice(THINGS[thing]))
    text = frame.format(trouble=sentence, y=rng.choice(THINGS[other]))
    return {
        "text": text[0].upper() + text[1:],
        "intent": f"{thing}_{trouble}",
        "mentioned": other if "{y}" in frame else None,
    }


# --------------------------------------------------------------------------------- the real edition
# train, dev and test, as in the paper
SIZES = 250, 500, 500


def read(folder: Path) -> tuple[list[str], list[dict]]:
    """The labels, and the queries of train.csv in an order fixed by a seed.

    First come those of the three splits, then the others.
    """
    path = folder / "categories.json"
    try:
        labels = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise InputError(f"{path}: cannot be read ({e})") from None
    if not isinstance(labels, list) or not labels or not all(map(is_text, labels)):
        raise InputError(f"{path}: expected a list of labels")
    fields = {"text": is_text, "category": lambda label: label in labels}
    rows = read_rows(folder / "train.csv", fields)
    examples = [{"text": row["text"].strip(), "intent": row["category"]} for row in rows]
    random.Random("banking77").shuffle(examples)
    return labels, examples


def _load_real(folder: Path) -> Task:
    labels, examples = read(folder)
    train, dev, test = splits(folder, examples, *SIZES)
    # 48 tokens, which hold the answer of most labels, would cut those of 7 of the 77
    sizes = {"max_tokens": 64, "max_calls": 1, "steps": 100, "eval_every": 50}
    return Task(
        Classify(tuple(labels)),
        exact_match,
        train,
        dev,
        test,
        defaults=REAL_DEFAULTS | sizes,
        demonstrate=demonstrate,
    )


# ----------------------------------------------------------------------------------------- the task
def load(folder: str = "") -> Task:
    """The task: miniature where `folder` is empty, else the data in it.

    Raises InputError naming file and line.
    """
    if folder:
        return _load_real(Path(folder))
    rng = random.Random("banking77")
    texts = set()
    examples = []
    while len(examples) < 500:
        example = query(rng, "task")
        if example["text"] not in texts:
            texts.add(example["text"])
            examples.append(example)
    return Task(
        Classify(LABELS),
        exact_match,
        train=examples[:240],
        dev=examples[240:360],
        test=examples[360:],
        defaults={"max_tokens": 48, "max_calls": 1},
        instructions={"classify": INSTRUCTIONS},
        demonstrate=demonstrate,
    )
