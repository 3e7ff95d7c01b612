"""Why an LM that classifies badly does: is the label unknown, or hidden behind a few others?

    python -m studies.labels --data FOLDER [--model FOLDER] [--demos 8] [--queries 32]

Of real Banking77 (`make smollm2` brings the LM): the log-prob of each of the 77 labels behind the
beginning of the reasoning, "The intent that fits is", for some dev queries. No label is sampled, so
rare ones count as well as frequent ones. Said of it:

    readable      probability that one of the labels is what follows
    right         share of queries whose likeliest label is the right one
    p(right)      probability of the right label among the labels, the mean over queries
    labels        how many labels are in use: exp of the entropy of their mean over queries
    mixed         probability that 8 runs of a query are partly right, partly wrong: only then does
                  its group teach anything
    calibrated …  the same with each label's mean over queries taken out of its log-probs: what the
                  LM knows of the queries, without its liking for some labels
"""

import argparse
import sys
from pathlib import Path
from typing import Callable

import numpy as np

from mmgrpo import Row, batch_logprobs, pack
from program import Completion, Task
from prompts.start import add_demos, labelled_demos
from run.cli import guarded
from run.loading import load_model, load_task
from tasks.banking77 import read

REASONING = "<reasoning>\nThe intent that fits is "
RUNS = 8  # of a group


def label_rows(task: Task, labels: list[str], queries: list[dict], tokenizer) -> list[list[Row]]:
    """Per query a row of each label, in which the label and the full stop are what is scored."""
    opening = tokenizer.encode(REASONING.rstrip())
    rows = []
    for query in queries:
        prompt = tokenizer.encode_chat(task.program.classify.messages({"text": query["text"]}))
        of_query = []
        for label in labels:
            text = tokenizer.encode(f"{REASONING}{label}.")
            # a label's first token begins with the space before it
            scored = text[len(opening) :]
            completion = Completion(prompt + opening, scored, [0.0] * len(scored), "stop")
            of_query.append(Row("classify", completion, advantage=0.0, weight=0.0))
        rows.append(of_query)
    return rows


def label_logprobs(model, rows: list[list[Row]], vocabulary: int) -> np.ndarray:
    """Log-probs (queries, labels) of whole labels at temperature 1."""
    found: dict[int, float] = {}
    flat = [row for of_query in rows for row in of_query]
    longest = max(len(row.completion.prompt_ids) for row in flat)
    for tree in pack(flat, 4 * longest):
        logprobs = batch_logprobs(model, tree, 1.0, vocabulary)  # (N,)
        lengths = [len(row.completion.token_ids) for row in tree.rows]
        for row, of_row in zip(tree.rows, logprobs.split(lengths)):
            found[id(row)] = of_row.sum().item()
    return np.array([[found[id(row)] for row in of_query] for of_query in rows])


def shares(logprobs: np.ndarray, right: np.ndarray) -> dict[str, float]:
    """Figures of log-probs (queries, labels) where right[q] is the index of q's label."""
    p = np.exp(logprobs - logprobs.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    of_right = p[np.arange(len(right)), right]  # (queries,)
    used = p.mean(0)
    return {
        "right": (logprobs.argmax(1) == right).mean(),
        "p(right)": of_right.mean(),
        "labels": np.exp(-(used * np.log(used)).sum()),
        "mixed": (1 - (1 - of_right) ** RUNS - of_right**RUNS).mean(),
    }


def count(least: int) -> Callable[[str], int]:
    """Reads an option: a whole number that is at least so large."""

    def whole_number(text: str) -> int:
        if int(text) < least:
            raise ValueError
        return int(text)

    return whole_number


def report(options: argparse.Namespace) -> str:
    """The figures of the LM as text. Raises what `load_task` and `load_model` raise."""
    given = {"task": "banking77", "data": options.data, "model": options.model}
    task, config = load_task(given)
    model, tokenizer = load_model(config)
    shown = labelled_demos(task, options.demos, config.seed)
    add_demos(task.program, shown)
    labels, _ = read(Path(options.data))
    queries = task.dev[: options.queries]
    right = np.array([labels.index(query["intent"]) for query in queries])

    rows = label_rows(task, labels, queries, tokenizer)
    logprobs = label_logprobs(model, rows, tokenizer.size)
    lines = [
        f"{len(shown['classify'])} demonstrations, {len(queries)} dev queries, {options.model}",
        f"  readable {np.exp(logprobs).sum(1).mean():.3f}",
    ]
    for name, of_name in {"": logprobs, "calibrated ": logprobs - logprobs.mean(0)}.items():
        figures = shares(of_name, right)
        lines.append(
            "  " + name + "  ".join(f"{key} {value:.3f}" for key, value in figures.items())
        )
    used = np.exp(logprobs - np.logaddexp.reduce(logprobs, 1)[:, None]).mean(0)  # (labels,)
    likeliest = [f"{labels[i]} {used[i]:.2f}" for i in used.argsort()[::-1][:5]]
    lines.append("  likeliest: " + ", ".join(likeliest))
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Run the command line -> its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--demos", type=count(0), default=8)
    parser.add_argument("--queries", type=count(1), default=32)
    options = parser.parse_args(argv)
    if not options.data:
        parser.error("--data: expected a folder")
    return guarded(lambda: report(options))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
