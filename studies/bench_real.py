"""How fast at real work: SmolLM2-135M-Instruct on Banking77 and HotpotQA, beside other libraries.

    make smollm2                  # the LM, to models/
    make bench REAL=1 DATA=data   # python -m studies.bench_real --data data [FIGURE …]

DATA is a folder with banking77/ (train.csv, categories.json) and, for real_step_hover, hotpotqa/
(corpus.jsonl, questions.jsonl). The others are TRL and transformers, with the same LM. The figures
stand beside those of bench.py in results/bench.json, with the same fields.

The step: 4 queries x 8 rollouts of banking77's program with 4 labelled demonstrations, 48 tokens
sampled at the most, all weights. The learning rate is 3e-5; every other option is the project's
default, dtype and micro-batches included. It is the same step every time, but for what an update
changes. Rewards of readable runs are random: a lucky step, in which all runs of an example earn the
same and need no update, would be no measure of one.

Each side runs in a process of its own. TRL holds almost all of the machine's memory and takes ten
minutes or more a step: it runs alone, after ours, once, and with 24 tokens.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import itertools
import json
import random
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch

import mmgrpo as G
from lm.smollm2 import FOLDER
from model import ModelConfig, Tokenizer
from program import InputError, Task
from prompts.start import add_demos, labelled_demos, without_shown
from run.config import Config
from run.loading import load_model, load_task
from studies import bench
from studies.bench import ROOT

EXAMPLES, ROLLOUTS, DEMOS = 4, 8, 4
TOKENS = {"banking77": 48, "hover": 96}  # sampled at the most a call
STEPS = 3  # steps of ours that count; one before them does not
TRL_TOKENS, TRL_BATCH = 24, 8
DECODED = 32  # tokens of each row, from whose times a decode step's is the median
EVERYTHING = 2**62  # tokens of a micro-batch that holds all rows


@dataclass(frozen=True)
class Place:
    """Where the LM and the data are. Example: Place("models/SmolLM2-135M-Instruct", "data")"""

    model: str
    data: str  # empty: the tasks' miniature editions

    def folder(self, name: str) -> str:
        return str(Path(self.data) / name) if self.data else ""


# ----------------------------------------------------------------------------------------- our side
def real_task(place: Place, task: str, folder: str, **options) -> tuple[Task, Config]:
    """The task with its demonstrations and random rewards; the defaults but for `options`."""
    given = {
        "model": place.model,
        "task": task,
        "data": place.folder(folder),
        "examples": EXAMPLES,
        "rollouts": ROLLOUTS,
        "labelled_demos": DEMOS,
        "max_tokens": TOKENS[task],
        "lr": 3e-5,
    }
    task, config = load_task(given | options)
    add_demos(task.program, labelled_demos(task, config.labelled_demos, config.seed))
    task = without_shown(task)
    task = dataclasses.replace(task, metric=lambda example, prediction: random.random())
    return task, config


def our_step(
    place: Place, task: str = "banking77", folder: str = "banking77", **options
) -> Callable[[], dict]:
    """A function that makes the first step of a training and says what it took and what it did."""
    task, config = real_task(place, task, folder, **options)
    model, tokenizer = load_model(config)
    optimizer, reference = G.prepare(model, config)

    def step() -> dict:
        trajectories = []
        keep = trajectories.extend
        metrics = G.train_step(model, tokenizer, optimizer, reference, task, config, 0, keep)
        rows = trained_rows(trajectories, config)
        if not rows:
            raise RuntimeError(
                "all runs of an example earned the same: nothing was trained, so nothing is "
                "measured"
            )
        (tree,) = G.pack(rows, EVERYTHING)
        sampled = len(tree.at)
        taken = metrics["seconds"]
        return {
            "sampling": taken["sampling"] + taken["tools"],
            "update": taken["update"],
            "rows": len(rows),
            "sampled": sampled,
            "distinct": len(tree.ids),
            "forwarded": metrics["tokens_forwarded"],
            "unshared": metrics["tokens_unshared"],
            "flops": necessary_flops(model.config, tree.positions, sampled),
            "dtype": str(model.head.dtype).removeprefix("torch."),
        }

    return step


def trained_rows(trajectories: list, config: Config) -> list[G.Row]:
    """The rows that the step's update passed over: those with an advantage."""
    # of the first step of the seed
    key = (config.seed, 0)
    groups = G.group_calls(trajectories, config.short_groups, config.group_size, config.level, key)
    values = G.advantages(
        groups, trajectories, config.baseline, config.leave_one_out, config.scale_rewards
    )
    rows = G.weigh(groups, values, trajectories, config.normalize, config.max_tokens)
    return [r for r in rows if r.advantage and r.completion.token_ids]


def necessary_flops(c: ModelConfig, positions: list[int], sampled: int) -> float:
    """What an update of all weights cannot do without.

    `positions` (T,) are the depths of the distinct tokens in their tree; `sampled` is how many
    tokens bear loss.
    """
    attention = c.hidden_size * c.head_dim * (2 * c.heads + 2 * c.kv_heads)
    mlp = 3 * c.hidden_size * c.intermediate_size
    # A product with a matrix takes 2 flops per weight and token forward, and twice that backward:
    # 6. The layers' matrices are multiplied with each distinct token, the head's with each sampled
    # one.
    in_layers = 6 * c.layers * (attention + mlp) * len(positions)
    in_head = 6 * c.vocab_size * c.hidden_size * sampled
    # A query and a key that it sees take 4 d flops per head forward (q k, and p v) and 10 d
    # backward (q k again, d_out v, and the gradients of q, k and v). A node sees its ancestors and
    # itself.
    pairs = sum(depth + 1 for depth in positions)
    return in_layers + in_head + (4 + 10) * c.layers * c.heads * c.head_dim * pairs


def matrix_peak(sizes: tuple[int, ...] = (1024, 2048, 4096), times: int = 4):
    """A function that finds the most flops a second of bf16 products (n, n) x (n, n).

    The second matrix is taken as it is and transposed.
    """

    def run() -> dict:
        best = 0.0
        for n, transposed, _ in itertools.product(sizes, (False, True), range(times)):
            a, b = torch.randn(2, n, n).bfloat16()
            b = b.t() if transposed else b
            taken = bench.seconds(functools.partial(torch.matmul, a, b))
            best = max(best, 2 * n**3 / taken)
        return {"flops_per_second": best}

    return run


# --------------------------------------------------------------------------------------- the others
def first_messages(task: Task, config: Config) -> list[list[dict]]:
    """The chat of each example of the step."""
    (module,) = task.program.modules().values()
    chosen = G.batch_of(0, config.examples, len(task.train), config.seed)
    return [module.messages({"text": task.train[i]["text"]}) for i in chosen]


def their_model(place: Place):
    from transformers import AutoModelForCausalLM

    path = ROOT / place.model
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()


def trl_step(place: Place, length: int = TRL_TOKENS, batch: int = TRL_BATCH):
    """A function that makes the same step with TRL, on the same prompts, all in bf16."""
    from transformers import AutoTokenizer

    task, config = real_task(place, "banking77", "banking77")
    chats = first_messages(task, config)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / place.model)
    same_prompts(chats, tokenizer, Tokenizer(ROOT / place.model))
    trainer = bench.trl_trainer(
        their_model(place),
        tokenizer,
        [{"prompt": chat} for chat in chats],
        bench.random_rewards,
        tempfile.mkdtemp(),
        10**6,
        lr=config.lr,
        length=length,
        batch=batch,
        gradient_accumulation_steps=EXAMPLES * ROLLOUTS // batch,
    )
    return bench.step_by_step(trainer)


def same_prompts(chats: list[list[dict]], theirs, ours: Tokenizer) -> None:
    """Raises RuntimeError unless the peer's tokenizer gives the token ids that ours does."""
    for chat in chats:
        ids = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        if ids != ours.encode_chat(chat):
            raise RuntimeError(
                "transformers' tokenizer gives other token ids for a prompt than ours"
            )


# ----------------------------------------------------------------------------------------- decoding
def our_decoding(place: Place, length: int = DECODED) -> Callable[[], dict]:
    """A function that samples for the rows of the step, and says the median ms of a decode step.

    Each row gets `length` tokens.
    """
    task, config = real_task(place, "banking77", "banking77")
    model, tokenizer = load_model(config)
    # no row ends early
    tokenizer = copy.copy(tokenizer)
    tokenizer.end_ids = frozenset()
    chats = bench.repeated(first_messages(task, config), EXAMPLES * ROLLOUTS)

    def run() -> dict:
        sampler = G.Sampler(model, tokenizer, slots=len(chats), max_tokens=length)
        for row, chat in enumerate(chats):
            sampler.submit(chat, (row,))
        # the prompts, and two tokens
        sampler.advance()
        taken = [bench.seconds(sampler.advance) for _ in range(length - 2)]
        return {"ms": 1e3 * statistics.median(taken)}

    return run


def their_decoding(place: Place, length: int = DECODED) -> Callable[[], dict]:
    """The same with transformers' generate, with a cache of its own for each row."""
    task, config = real_task(place, "banking77", "banking77")
    tokenizer = Tokenizer(ROOT / place.model)
    prompts = [tokenizer.encode_chat(chat) for chat in first_messages(task, config)]
    prompts = bench.repeated(prompts, EXAMPLES * ROLLOUTS)
    model = their_model(place)

    def run() -> dict:
        ticks: list[float] = []
        bench.generate(model, prompts, [length] * len(prompts), ticks)
        steps = [after - before for before, after in itertools.pairwise(ticks)]
        return {"ms": 1e3 * statistics.median(steps)}

    return run


# ------------------------------------------------------------------------------------------ figures
def rounds(times: int, **cases: str) -> dict[str, list[dict]]:
    return bench.rounds(times, cases, "studies.bench_real")


@functools.cache
def our_rounds(place: Place) -> dict[str, list[dict]]:
    """What our step and the machine's peak say, by turns; the first round does not count."""
    found = rounds(STEPS + 1, step=f"our_step({place!r})", peak="matrix_peak()")
    return {name: answers[1:] for name, answers in found.items()}


@functools.cache
def trl_round(place: Place) -> dict:
    """What TRL's one step took, or why there is none (`failed`): ours is worth knowing anyway."""
    try:
        return rounds(1, peer=f"trl_step({place!r})")["peer"][0]
    except RuntimeError as e:
        return {"failed": f"{e} (out of memory?)"}


def middle(answers: list[dict], *keys: str) -> float:
    """The median of the sum of what was said under these keys."""
    return statistics.median(sum(a["said"][key] for key in keys) for a in answers)


def beside(ours: float, trl: dict, key: str) -> dict:
    """The fields of a figure in which less is better."""
    if "failed" in trl:
        return {"ours": ours, "peer": None, "ratio": None, "peer_failed": trl["failed"]}
    return {"ours": ours, "peer": trl[key], "ratio": trl[key] / ours}


def real_step(place: Place) -> dict:
    steps = our_rounds(place)["step"]
    figure = beside(middle(steps, "sampling", "update"), trl_round(place), "seconds")
    return figure | {
        "sampling": middle(steps, "sampling"),
        "update": middle(steps, "update"),
        "rows": middle(steps, "rows"),
        "sampled": middle(steps, "sampled"),
        "dtype": steps[0]["said"]["dtype"],
        "what": f"seconds of a GRPO step of SmolLM2-135M on banking77, {EXAMPLES} x {ROLLOUTS} "
        f"rollouts, at most 48 tokens, all weights; peer: TRL in bf16, at most {TRL_TOKENS} "
        "tokens, one step; of ours also the seconds of sampling and of the update, the rows "
        "trained and their sampled tokens",
    }


def real_distinct(place: Place) -> dict:
    steps = our_rounds(place)["step"]
    forwarded = middle(steps, "forwarded")
    distinct = middle(steps, "distinct")
    return {
        "ours": forwarded,
        "peer": distinct,
        "ratio": forwarded / distinct,
        "unshared": middle(steps, "unshared"),
        "what": "tokens that the update of real_step forwards; reference: the distinct prefixes of "
        "its rows; unshared: the tokens of all rows",
    }


def real_step_hover(place: Place) -> dict:
    case = f"our_step({place!r}, 'hover', 'hotpotqa', examples=2)"
    said = rounds(1, step=case)["step"][0]["said"]
    figure = {
        "ours": said["sampling"] + said["update"],
        "peer": None,
        "ratio": said["forwarded"] / said["distinct"],
    }
    for key in ("sampling", "update", "rows", "sampled", "distinct", "forwarded", "unshared"):
        figure[key] = said[key]
    figure["what"] = (
        "seconds of a step of SmolLM2-135M with hover's program on HotpotQA, 2 x 8 rollouts, once "
        "(TRL has no programs of several modules); ratio: tokens that the update forwards over the "
        "distinct prefixes of its rows"
    )
    return figure


def real_memory(place: Place) -> dict:
    whole = our_rounds(place)["step"][-1]["peak"]
    return beside(whole, trl_round(place), "peak") | {
        "what": "GB resident at the peak of the process that makes real_step, all weights, its "
        "libraries included; peer: TRL"
    }


def real_memory_lora(place: Place) -> dict:
    """Its step may have more rows to train than that of all weights, or fewer."""
    found = rounds(2, lora=f"our_step({place!r}, lora_rank=16)", whole=f"our_step({place!r})")
    lora = found["lora"][-1]["peak"]
    whole = found["whole"][-1]["peak"]
    what = (
        "GB resident at the peak of the process that makes real_step with --lora-rank 16; beside "
        "it: all weights"
    )
    return {"ours": lora, "peer": whole, "ratio": whole / lora, "what": what}


def real_decode(place: Place) -> dict:
    found = rounds(STEPS, ours=f"our_decoding({place!r})", peer=f"their_decoding({place!r})")
    a = middle(found["ours"], "ms")
    b = middle(found["peer"], "ms")
    what = (
        f"ms a decode step of SmolLM2-135M, {EXAMPLES * ROLLOUTS} rows with the prompts of "
        "real_step (1,700 tokens, all but some 30 the same); peer: transformers' generate in bf16"
    )
    return {"ours": a, "peer": b, "ratio": b / a, "what": what}


def real_update_efficiency(place: Place) -> dict:
    found = our_rounds(place)
    said = [a["said"] for a in found["step"]]
    reached = statistics.median(s["flops"] / s["update"] for s in said)
    peak = max(a["said"]["flops_per_second"] for a in found["peak"])
    return {
        "ours": reached / 1e9,
        "peer": peak / 1e9,
        "ratio": reached / peak,
        "what": "GFLOP/s of the products that the update of real_step cannot do without; "
        "reference: the best of bf16 products of matrices of 1,024 to 4,096 squared, by turns with "
        "the steps; flops: 6 x (weights in the layers' matrices x distinct tokens + V x D x "
        "sampled tokens) + 14 x layers x H x d x (pairs of a distinct token and one it sees)",
    }


FIGURES = {
    "real_step": real_step,
    "real_distinct": real_distinct,
    "real_step_hover": real_step_hover,
    "real_memory": real_memory,
    "real_memory_lora": real_memory_lora,
    "real_decode": real_decode,
    "real_update_efficiency": real_update_efficiency,
}

# of docs/speed.md's table: figure -> its name, the other side, and how the ratio reads
ROWS = {
    "real_step": ("a GRPO step on Banking77, s", "TRL", "{:.0f}x"),
    "real_memory": ("peak memory of it, GB", "TRL", "{:.1f}x"),
    "real_memory_lora": ("the same with LoRA, GB", "all weights", "{:.1f}x"),
    "real_decode": ("a decode step of 32 rows of 1,700 tokens, ms", "`generate`", "{:.1f}x"),
    "real_distinct": ("tokens that its update forwards", "distinct ones", "{:.2f} of it"),
    "real_update_efficiency": (
        "necessary products of its update, GFLOP/s",
        "bf16 peak",
        "{:.2f} of it",
    ),
    "real_step_hover": ("a step of hover on HotpotQA, s", "", "{:.2f} of distinct tokens"),
}


def table(figures: dict) -> str:
    """The README's second table; a figure or side that is not there is left out of it."""

    def number(x: float | None) -> str:
        if x is None:
            return ""
        return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"

    lines = ["| | ours | other | other is | ratio |", "|---|---|---|---|---|"]
    for name, (title, other, reads) in ROWS.items():
        f = figures.get(name, {"ours": None})
        if f["ours"] is None:
            continue
        ratio = "" if f["ratio"] is None else reads.format(f["ratio"])
        lines.append(f"| {title} | {number(f['ours'])} | {number(f['peer'])} | {other} | {ratio} |")
    return "\n".join(lines)


# --------------------------------------------------------------------------------- the command line
def check(place: Place, names: list[str]) -> None:
    """Raises InputError where the LM, or data that these figures need, are missing."""
    if not (ROOT / place.model / "config.json").is_file():
        raise InputError(
            f"--model {place.model}: there is no checkpoint; `make smollm2` brings it to {FOLDER}"
        )
    files = {
        "banking77": ("train.csv", "categories.json"),
        "hotpotqa": ("corpus.jsonl", "questions.jsonl"),
    }
    needed = {"hotpotqa" if name == "real_step_hover" else "banking77" for name in names}
    for folder in sorted(needed):
        for file in files[folder]:
            path = Path(place.data, folder, file)
            if not path.is_file():
                raise InputError(
                    f"--data {place.data}: {path} is not there (DATA=FOLDER says where banking77/ "
                    "and hotpotqa/ are; `make data` downloads Banking77)"
                )


def main(argv: list[str]) -> None:
    if argv and argv[0].startswith("--worker="):
        return bench.work(argv[0].split("=", 1)[1], globals())
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    option = parser.add_argument
    option("figures", nargs="*", metavar="FIGURE", help=", ".join(FIGURES))
    option("--data", default="data", help="folder with banking77/ and hotpotqa/ [data]")
    option("--model", default=str(FOLDER), help=f"folder of the LM [{FOLDER}]")
    option(
        "--table",
        action="store_true",
        help="only print docs/speed.md's table of the stored figures",
    )
    given = parser.parse_args(argv)
    if given.table:
        return print(table(json.loads(bench.OUT.read_text())["figures"]))
    names = bench.chosen(given.figures, FIGURES)
    place = Place(given.model, given.data)
    try:
        check(place, names)
    except InputError as e:
        sys.exit(f"error: {e}")
    bench.measure({name: functools.partial(FIGURES[name], place) for name in names})


if __name__ == "__main__":
    main(sys.argv[1:])
