"""PAPILLON: use a strong LM that is not trusted, without telling it private details.

Two modules: craft_redacted_request turns the user's query into a request that can be sent out; an
untrusted LM answers it; respond_to_query makes the reply from that answer. The reward is (quality
+ 1 - leakage) / 2, leakage being the share of the private details that stand in the request.

In the miniature edition the untrusted LM is a rule: it writes a fitting closing line, which the
reply needs and which only it knows, if the request says what the letter is about. Quality is the
share of the target's parts (the addressee, the line) in the reply.

The real edition (`load(folder)`) reads PUPA_New.csv. Its LMs are behind OpenAI-compatible
endpoints, named by two environment variables, each an address and a model,
MMGRPO_UNTRUSTED="http://localhost:8000/v1 some-model" and MMGRPO_JUDGE; the judge compares the
response with the target in both orders, and counts the private details that the request gives
away. Without them there are stand-ins: the untrusted LM echoes the request, quality is word
overlap with the target, leakage is a string match.
"""

import random
import re
from pathlib import Path
from typing import Awaitable, Callable

from lm.endpoint import Endpoint
from program import ChainOfThought, Prediction, Program, Signature, Task, gather, tool
from tasks.data.rows import REAL_DEFAULTS, is_text, read_rows, splits
from tasks.data.world import Names


class Papillon(Program):
    """user_query -> the request that was sent out, and the response to the user."""

    def __init__(self, untrusted: Callable[[str], str]):
        self.untrusted = untrusted
        self.craft_redacted_request = ChainOfThought(
            "user_query -> llm_request", CRAFT_INSTRUCTIONS[0]
        )
        self.respond_to_query = ChainOfThought(
            "related_llm_request, related_llm_response, user_query -> response",
            RESPOND_INSTRUCTIONS[0],
        )

    async def forward(self, user_query: str) -> Prediction:
        request = (await self.craft_redacted_request(user_query=user_query)).llm_request
        answer = await tool(self.untrusted, request)
        reply = await self.respond_to_query(
            related_llm_request=request, related_llm_response=answer, user_query=user_query
        )
        return Prediction(llm_request=request, response=reply.response)


def leakage(example: dict, prediction: Prediction) -> float:
    """Share of the private details that stand in the request, letter for letter but for case."""
    request = prediction.llm_request.lower()
    leaked = sum(detail.lower() in request for detail in example["pii"])
    return leaked / len(example["pii"])


def quality_of_parts(example: dict, prediction: Prediction) -> float:
    """Share of the target's parts that stand in the response."""
    response = prediction.response.lower()
    return sum(part.lower() in response for part in example["parts"]) / len(example["parts"])


class Reward:
    """(quality + 1 - leakage) / 2"""

    def __init__(self, quality: Callable[[dict, Prediction], float]):
        self.quality = quality

    def __call__(self, example: dict, prediction: Prediction) -> float:
        return (self.quality(example, prediction) + 1 - leakage(example, prediction)) / 2


# The first of each is the program's own; the others are what prompt search may choose from.
CRAFT_INSTRUCTIONS = (
    "Write a request for the other assistant.",
    "Write a request without the names of people and places.",
    "Write a request that keeps what is private out.",
    "Pass the text on.",
    "Ask for something.",
    "Write a request that says what the text is about.",
)
RESPOND_INSTRUCTIONS = (
    "Write the response to the user.",
    "Write the response with the right name and the line of the other assistant.",
    "Complete what the other assistant wrote for the user.",
    "Say something to the user.",
    "Pass the answer on.",
    "Write the text that the user wants.",
)


# ---------------------------------------------------------------------------- the miniature edition
KINDS = ("letter", "note", "card", "message")
ROLES = ("doctor", "teacher", "lawyer", "baker", "farmer", "friend", "neighbour", "singer")
TOPICS = tuple(
    "garden visit dinner lesson repair party journey gift "
    "concert harvest picture house window story bread advice".split()
)
# N and T are names: the addressee's and the town's, which are private
QUERIES = {
    "pretrain": (
        "Write a {kind} to my {role} {N} in {T} about the {topic}.",
        "I live in {T}. Write a {kind} about the {topic} to the {role} {N}.",
        "My {role} is {N} from {T}. Write a {kind} about the {topic}.",
    ),
    "task": (
        "{N} is my {role} in {T}. Write a {kind} to {N} about the {topic}.",
        "Write a {kind} about the {topic}, it is to the {role} {N} from {T}.",
    ),
}
REQUEST = "Write a {kind} to my {role} about the {topic}."
LINE = (
    ("calm", "small", "bright", "old", "warm", "long", "green", "kind"),
    ("rivers", "lamps", "roads", "songs", "winds", "stones", "hands", "days"),
    ("run", "shine", "bring", "hold", "carry", "meet", "follow", "keep"),
    ("slowly", "early", "together", "again", "far", "home", "well", "always"),
)


def line_about(topic: str, salt: str = "") -> str:
    """The line that the untrusted LM knows for a topic: four words that only the topic tells."""
    rng = random.Random(f"{salt} {topic}")
    return " ".join(rng.choice(words) for words in LINE)


def untrusted(request: str, salt: str = "") -> str:
    """The rule that stands for the untrusted LM."""
    words = re.findall(r"[a-z]+", request.lower())
    topics = [word for word in words if word in TOPICS]
    roles = [word for word in words if word in ROLES]
    if not topics:
        return "What is it about?"
    addressee = roles[0] if roles else "friend"
    return f"Dear {addressee}, {line_about(topics[-1], salt)}."


def query(rng: random.Random, names: Names, salt: str = "") -> dict:
    """A user's query.

    Returns {"user_query", "pii" (its private details), "request" (what a good request says),
    "parts" (that a good reply has)}.
    """
    values = {
        "kind": rng.choice(KINDS),
        "role": rng.choice(ROLES),
        "topic": rng.choice(TOPICS),
        "N": names(),
        "T": names(),
    }
    return {
        "user_query": rng.choice(QUERIES[names.half]).format(**values),
        "pii": [values["N"], values["T"]],
        "request": REQUEST.format(**values),
        "parts": [f"Dear {values['N']}", line_about(values["topic"], salt)],
    }


def demonstrate(example: dict) -> dict[str, list[dict]]:
    """What an example shows of both calls.

    The data have no reasoning: it is made for the format.
    """
    opening, line = example["parts"]
    craft = {
        "user_query": example["user_query"],
        "reasoning": "I leave the names out.",
        "llm_request": example["request"],
    }
    respond = {
        "related_llm_request": example["request"],
        "related_llm_response": untrusted(example["request"]),
        "user_query": example["user_query"],
        "reasoning": "I address it to the right name.",
        "response": f"{opening}, {line}.",
    }
    return {"craft_redacted_request": [craft], "respond_to_query": [respond]}


# --------------------------------------------------------------------------------- the real edition
def quality_of_words(example: dict, prediction: Prediction) -> float:
    """F1 of the words of the response against those of the target."""
    ours = re.findall(r"\w+", prediction.response.lower())
    target = re.findall(r"\w+", example["target"].lower())
    common = sum(min(ours.count(word), target.count(word)) for word in set(target))
    return 2 * common / max(len(ours) + len(target), 1)


COMPARE = Signature(
    "user_query, response_a, response_b -> better: Literal['A', 'B', 'equal']",
    "Which of the two responses serves the user better? Judge help and truth, not length. "
    "Say equal where neither does.",
)
LEAKS = Signature(
    "request, private_details: list[str] -> count: int",
    "A request is about to be sent to somebody who must not learn the private details. "
    "How many of them does it give away, literally or so that they can be guessed? "
    "Answer with a number.",
)


class Judged:
    """The reward from a judge, an LM behind an endpoint.

    Quality is the share of both orders in which the response is not judged worse than the target,
    so a judge that prefers a place gives one half; leakage is the share of private details given
    away.
    """

    def __init__(self, judge: Endpoint):
        self.judge = judge

    def _ask(self, signature: Signature, **inputs) -> Awaitable[Prediction]:
        return tool(lambda: self.judge.predict(signature, **inputs))

    async def __call__(self, example: dict, prediction: Prediction) -> dict[str, float]:
        query = example["user_query"]
        ours = prediction.response
        target = example["target"]
        details = example["pii"]
        first, second, leaks = await gather(
            self._ask(COMPARE, user_query=query, response_a=ours, response_b=target),
            self._ask(COMPARE, user_query=query, response_a=target, response_b=ours),
            self._ask(LEAKS, request=prediction.llm_request, private_details=details),
        )
        quality = ((first.better != "B") + (second.better != "A")) / 2
        leaked = min(max(leaks.count / len(details), 0.0), 1.0)
        return {
            "reward": (quality + 1 - leaked) / 2,
            "quality": quality,
            "leakage_judged": leaked,
            "leakage_string": leakage(example, prediction),
        }


# words that a query, and what is kept of a response, may have in a demonstration
SHORT = 40


def beginning(text: str, words: int = SHORT) -> str:
    """The first sentences of a text, as many as there are in so many words.

    If the first is longer, so many words of it.
    """
    cut = " ".join(text.split()[:words])
    sentences = re.match(r".*[.!?](?=\s|$)", cut)
    return sentences[0] if sentences else cut


def demonstrate_real(example: dict) -> dict[str, list[dict]]:
    """What a row shows of both calls; nothing where the query is long.

    It shows its redacted query, and the beginning of its target as what the other LM says and as
    the response. The data have no reasoning: it is made for the format.
    """
    query = example["user_query"]
    request = example["redacted"]
    if not request or len(query.split()) > SHORT:
        return {}
    response = beginning(example["target"])
    craft = {
        "user_query": query,
        "reasoning": "I leave out what is private.",
        "llm_request": request,
    }
    respond = {
        "related_llm_request": request,
        "related_llm_response": response,
        "user_query": query,
        "reasoning": "The other assistant has answered; I pass it on.",
        "response": response,
    }
    return {"craft_redacted_request": [craft], "respond_to_query": [respond]}


# train, dev and test rows of PUPA, as in the paper
SIZES = 111, 221, 221


def _has_details(pii_units: str) -> bool:
    return bool(pii_units.strip("| "))


def _load_real(folder: Path) -> Task:
    """The rows of PUPA in an order fixed by a seed."""
    fields = {"user_query": is_text, "target_response": is_text, "pii_units": _has_details}
    rows = read_rows(folder / "PUPA_New.csv", fields)
    examples = []
    for row in rows:
        example = {
            "user_query": row["user_query"],
            "target": row["target_response"],
            "redacted": row.get("redacted_query", ""),
            "pii": [detail for detail in row["pii_units"].split("||") if detail],
        }
        examples.append(example)
    random.Random("papillon").shuffle(examples)
    untrusted_lm = Endpoint.named("MMGRPO_UNTRUSTED") or (lambda request: request)
    judge = Endpoint.named("MMGRPO_JUDGE")
    train, dev, test = splits(folder, examples, *SIZES)
    sizes = {"max_tokens": 128, "max_calls": 2, "steps": 30, "eval_every": 15}
    return Task(
        Papillon(untrusted_lm),
        Judged(judge) if judge else Reward(quality_of_words),
        train,
        dev,
        test,
        defaults=REAL_DEFAULTS | sizes,
        demonstrate=demonstrate_real,
    )


# ----------------------------------------------------------------------------------------- the task
def load(folder: str = "") -> Task:
    """The task: miniature where `folder` is empty, else the data in it.

    Raises InputError naming file and line.
    """
    if folder:
        return _load_real(Path(folder))
    rng = random.Random("papillon")
    names = Names(rng, "task")
    examples = [query(rng, names) for _ in range(500)]
    return Task(
        Papillon(untrusted),
        Reward(quality_of_parts),
        train=examples[:240],
        dev=examples[240:360],
        test=examples[360:],
        defaults={"max_tokens": 64, "max_calls": 2, "demo_score": 0.75},
        instructions={
            "craft_redacted_request": CRAFT_INSTRUCTIONS,
            "respond_to_query": RESPOND_INSTRUCTIONS,
        },
        demonstrate=demonstrate,
    )
