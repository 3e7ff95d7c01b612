"""How fast, against the libraries a user would otherwise pick: the same model, prompts and work.

    python -m studies.bench [FIGURE …]        # `make bench`; writes results/bench.json

The two sides alternate in one run. A second table, of a real LM at real work, is made by
bench_real.py: `make bench REAL=1 DATA=…`.

The LM is the one in tasks/tiny (1.1M parameters, Qwen3, width 128, 4 layers, vocabulary 2,048), in
fp32. Unless said otherwise: 4 prompts of 175 to 182 tokens with one instruction, 8 rollouts each,
64 tokens sampled, end tokens ignored. Every figure is a median. `ratio` says how many times faster
(or smaller) than the peer ours is; of update_half_dead, modules_8_vs_1, rollouts_16_vs_8 and the
loss rows it is our cost relative to the reference. A figure's `what` says what `ours` and `peer`
are, and in which unit.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import itertools
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from datetime import date
from functools import partial
from pathlib import Path
from typing import Callable

ROOT = Path(__file__).resolve().parent.parent

# before the libraries that read them are imported
os.environ |= {
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}

import numpy as np
import torch
import torch.nn.functional as F

import mmgrpo as G
from model import load_pretrained
from program import Completion, FormatError, Module, Prediction, Program, Task, parse
from run.loading import load_task
from tasks import banking77

TINY = ROOT / "tasks" / "tiny"
OUT = ROOT / "results" / "bench.json"

PROMPTS, ROLLOUTS, LENGTH = 4, 8, 64
SLOTS = PROMPTS * ROLLOUTS  # rows that are sampled at once

ASK = Module(
    "text -> intent",
    "Name the intent of the customer: what they want from the bank, as one of the labels of the "
    "list that the bank works with, in one word.",
    {"text": "what the customer wrote to the bank"},
)
TEXTS = [e["text"] for e in banking77.load().train]


class One(Program):
    """One call; whatever it samples is a completed run."""

    def __init__(self):
        self.ask = ASK

    async def forward(self, text):
        with contextlib.suppress(FormatError):
            await self.ask(text=text)
        return Prediction(text=text)


def ours():
    """The LM; its tokenizer, without an end token that could be sampled early."""
    model, tokenizer = load_pretrained(TINY)
    tokenizer = copy.copy(tokenizer)
    tokenizer.end_ids = frozenset()
    return model, tokenizer


def theirs():
    """The same LM in transformers."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()


def prompt_ids(tokenizer) -> list[list[int]]:
    return [tokenizer.encode_chat(ASK.messages({"text": t})) for t in TEXTS[:PROMPTS]]


# ---------------------------------------------------------------------------------------- measuring
def seconds(run: Callable) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def alternate(*runs: Callable, times: int) -> list[float]:
    """Median seconds of each, by turns `times` times; a first round does not count."""
    taken = [[seconds(run) for run in runs] for _ in range(times + 1)][1:]
    return [statistics.median(t) for t in zip(*taken)]


def race(times: int, **cases: str) -> dict[str, tuple[float, float]]:
    """Each case by turns, `times` times after a first round that does not count.

    Returns the median seconds of each, and the GB that its process held at the peak.
    """
    found = {}
    for name, answers in rounds(times + 1, cases).items():
        median = statistics.median(a["seconds"] for a in answers[1:])
        found[name] = (median, answers[-1]["peak"])
    return found


def rounds(
    times: int, cases: dict[str, str], module: str = "studies.bench"
) -> dict[str, list[dict]]:
    """Each case in a process of its own; they run by turns, `times` times.

    A case is an expression of `module` that gives a function. Returns what each answered every time
    (see `work`). However it ends, no process is left, nor a temporary file of theirs.
    """
    workers: dict[str, subprocess.Popen] = {}

    def ask(worker) -> dict:
        try:
            print("go", file=worker.stdin, flush=True)
            return json.loads(worker.stdout.readline())
        except (OSError, ValueError):
            raise RuntimeError(f"{worker.args[-1]} ended") from None

    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as ends:
        for name, case in cases.items():
            worker = subprocess.Popen(
                [sys.executable, "-m", module, f"--worker={case}"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | {"TMPDIR": folder},
            )
            workers[name] = worker
            # the last is called first: killed, then waited for
            ends.callback(worker.communicate)
            ends.callback(worker.kill)
        answers = [[ask(worker) for worker in workers.values()] for _ in range(times)]
        return {name: list(of_one) for name, of_one in zip(workers, zip(*answers))}


def work(case: str, names: dict) -> None:
    """A worker of `rounds`: whenever it is asked, it runs the case once and answers.

    The answer has the `seconds`, the GB held at the `peak` so far, and what the function `said`, if
    that is a dict. `names` are those of the script.
    """
    # what libraries print is no answer: it goes to stderr
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # the expression comes from the script alone
    run = eval(case, names)
    for _ in sys.stdin:
        began = time.perf_counter()
        said = run()
        answer = {"seconds": time.perf_counter() - began, "peak": peak_gb()}
        if isinstance(said, dict):
            answer["said"] = said
        print(json.dumps(answer), file=answers, flush=True)


def peak_gb() -> float:
    """The most that this process has had in memory."""
    with open("/proc/self/status") as status:
        peak = next(line for line in status if line.startswith("VmHWM"))
    return int(peak.split()[1]) * 1024 / 1e9


# ------------------------------------------------------------------------------------- a whole step
def our_step(examples: int = PROMPTS, rollouts: int = ROLLOUTS):
    """A function that makes one step of mmGRPO: sampling, groups, update."""
    model, tokenizer = ours()
    examples_of_task = [{"text": t} for t in TEXTS]
    task = Task(One(), lambda example, prediction: random.random(), examples_of_task, [], [])
    config = G.Config(
        examples=examples,
        rollouts=rollouts,
        max_tokens=LENGTH,
        slots=examples * rollouts,
        max_calls=1,
        lr=1e-4,
    )
    optimizer, _ = G.prepare(model, config)
    steps = itertools.count()
    return lambda: G.train_step(model, tokenizer, optimizer, None, task, config, next(steps))


def trl_trainer(
    model,
    tokenizer,
    prompts,
    reward,
    folder,
    steps,
    lr=1e-4,
    length=LENGTH,
    batch=SLOTS,
    callbacks=(),
    **options,
):
    """TRL's trainer, with our defaults."""
    import datasets
    from trl import GRPOConfig, GRPOTrainer

    args = GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=batch,
        num_generations=ROLLOUTS,
        max_completion_length=length,
        beta=0.0,
        max_steps=steps,
        learning_rate=lr,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False,
        disable_tqdm=True,
        temperature=1.0,
        loss_type="grpo",
        max_grad_norm=1.0,
        **options,
    )
    return GRPOTrainer(
        model,
        reward,
        args=args,
        train_dataset=datasets.Dataset.from_list(prompts),
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )


def step_by_step(trainer):
    """A function that makes one step of TRL's trainer.

    The trainer runs in a thread of its own, which waits between steps.
    """
    from transformers import TrainerCallback

    go = threading.Semaphore(0)
    done = threading.Semaphore(0)
    failed = []

    class Wait(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            done.release()
            go.acquire()

    def train():
        try:
            trainer.train()
        except BaseException as e:
            failed.append(e)
        # who waits for a step is not left waiting
        done.release()

    def reach():
        done.acquire()
        if failed:
            raise failed[0]

    def step():
        go.release()
        reach()

    trainer.add_callback(Wait())
    threading.Thread(target=train, daemon=True).start()
    reach()
    return step


def random_rewards(completions, **_) -> list[float]:
    return [random.random() for _ in completions]


def their_step():
    from transformers import AutoTokenizer

    trainer = trl_trainer(
        theirs(),
        AutoTokenizer.from_pretrained(TINY),
        [{"prompt": ASK.messages({"text": t})} for t in TEXTS],
        random_rewards,
        tempfile.mkdtemp(),
        10**6,
        generation_kwargs={"min_new_tokens": LENGTH},
    )
    return step_by_step(trainer)


FOUND: dict[str, dict] = {}  # figures that come of another one's runs


def grpo_step() -> dict:
    found = race(9, ours="our_step()", peer="their_step()")
    our_seconds, our_peak = found["ours"]
    peer_seconds, peer_peak = found["peer"]
    FOUND["peak_memory"] = {
        "ours": our_peak,
        "peer": peer_peak,
        "ratio": peer_peak / our_peak,
        "what": "GB resident at the peak of the process that makes these GRPO steps, its libraries "
        "included; peer: TRL",
    }
    return {
        "ours": our_seconds,
        "peer": peer_seconds,
        "ratio": peer_seconds / our_seconds,
        "what": "seconds of a GRPO step, sampling included; peer: TRL",
    }


def peak_memory() -> dict:
    """Of the processes of grpo_step."""
    if "peak_memory" not in FOUND:
        grpo_step()
    return FOUND["peak_memory"]


# ----------------------------------------------------------------------------------------- decoding
def sample(
    model, tokenizer, prompts: list[list[int]], lengths: list[int], slots: int = SLOTS
) -> None:
    """Sample so many tokens for each prompt."""
    ids_only = copy.copy(tokenizer)
    ids_only.encode_chat = lambda prompt: prompt
    ids_only.decode = lambda ids: ""
    sampler = G.Sampler(model, ids_only, slots=slots, max_tokens=max(lengths))
    for i, (prompt, length) in enumerate(zip(prompts, lengths)):
        sampler.submit(prompt, (i,))
        # a request ends with its random numbers
        ticket, prompt, uniforms = sampler.waiting.pop()
        sampler.waiting.append((ticket, prompt, uniforms[:length]))
    left = len(prompts)
    while left:
        left -= len(sampler.advance())


def generate(
    model, prompts: list[list[int]], lengths: list[int], ticks: list[float] | None = None
) -> None:
    """The same with transformers: left-padded batches of 32 in the order of the requests.

    Each row is done at its own length. `ticks` gets the time at which each token of a batch was
    there.
    """
    from transformers import StoppingCriteria, StoppingCriteriaList

    class Done(StoppingCriteria):
        """Of each row: whether it has the tokens it `wanted` behind the prompts' `width`."""

        def __init__(self, width: int, wanted: torch.Tensor):
            self.width = width
            self.wanted = wanted

        def __call__(self, input_ids, scores, **_):
            if ticks is not None:
                ticks.append(time.perf_counter())
            return input_ids.shape[1] - self.width >= self.wanted

    for i in range(0, len(prompts), SLOTS):
        batch = prompts[i : i + SLOTS]
        wanted = torch.tensor(lengths[i : i + SLOTS])
        width = max(map(len, batch))
        padding = [width - len(p) for p in batch]
        ids = torch.tensor([[0] * n + p for n, p in zip(padding, batch)])
        mask = (torch.arange(width) >= torch.tensor(padding)[:, None]).long()
        with torch.no_grad():
            model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=int(wanted.max()),
                min_new_tokens=1,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                pad_token_id=0,
                eos_token_id=None,
                stopping_criteria=StoppingCriteriaList([Done(width, wanted)]),
            )


def repeated(prompts: list, requests: int) -> list:
    """So many requests of these prompts, those of one beside each other."""
    return [p for p in prompts for _ in range(requests // len(prompts))]


def our_sampling(lengths: list[int]):
    model, tokenizer = ours()
    prompts = repeated(prompt_ids(tokenizer), len(lengths))
    return lambda: sample(model, tokenizer, prompts, lengths)


def their_sampling(lengths: list[int]):
    model = theirs()
    prompts = repeated(prompt_ids(ours()[1]), len(lengths))
    return lambda: generate(model, prompts, lengths)


def their_batching(lengths: list[int]):
    """transformers' continuous batching; it takes one limit for all requests."""
    from transformers import GenerationConfig

    model = theirs()
    prompts = repeated(prompt_ids(ours()[1]), len(lengths))
    config = GenerationConfig(
        max_new_tokens=max(lengths),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        eos_token_id=-1,
        pad_token_id=0,
    )

    def run():
        answers = model.generate_batch(prompts, generation_config=config, progress_bar=False)
        if len(answers) < len(prompts):
            raise RuntimeError(f"only {len(answers)} of {len(prompts)} requests were answered")

    return run


def decode() -> dict:
    cases = {}
    for who in ("our", "their"):
        for n in (LENGTH, 1):
            cases[f"{who}{n}"] = f"{who}_sampling([{n}] * {SLOTS})"
    found = race(9, **cases)

    def step_ms(who: str) -> float:
        # the prompts and the first token are the same in both
        whole, _ = found[f"{who}{LENGTH}"]
        first, _ = found[f"{who}1"]
        return 1e3 * (whole - first) / (LENGTH - 1)

    a = step_ms("our")
    b = step_ms("their")
    what = "ms a decode step of 32 rows; peer: transformers' generate"
    return {"ours": a, "peer": b, "ratio": b / a, "what": what}


def ragged() -> list[int]:
    """128 lengths up to 96, of which most are short."""
    drawn = 1 + np.random.default_rng(0).exponential(28, 128).astype(int)
    return [96, *np.minimum(drawn, 96).tolist()[1:]]


def decode_ragged() -> dict:
    found = race(5, ours="our_sampling(ragged())", peer="their_sampling(ragged())")
    lengths = ragged()
    a = sum(lengths) / found["ours"][0]
    b = sum(lengths) / found["peer"][0]
    return {
        "ours": a,
        "peer": b,
        "ratio": a / b,
        "mean_over_max": sum(lengths) / len(lengths) / max(lengths),
        "what": "tokens/s of 128 requests over 32 slots, prefill included; peer: transformers' "
        "generate, 32 at a time",
    }


def decode_generate_batch() -> dict:
    found = race(2, ours="our_sampling([64] * 32)", peer="their_batching([64] * 32)")
    a = 32 * 64 / found["ours"][0]
    b = 32 * 64 / found["peer"][0]
    what = "tokens/s of 32 requests of 64 tokens, prefill included; peer: generate_batch"
    return {"ours": a, "peer": b, "ratio": a / b, "what": what}


# --------------------------------------------------------------------------------------- the update
def rows_of(
    groups: int,
    rollouts: int,
    tokenizer,
    dead: float = 0.0,
    modules: int = 1,
    alike: bool = True,
) -> list[G.Row]:
    """Rows of so many groups, the last ones of which are dead: without advantage.

    The prompts are with one instruction (`alike`) or with nothing in common.
    """
    rng = np.random.default_rng(0)
    prompts = []
    for text in TEXTS[:groups]:
        if alike:
            prompts.append(tokenizer.encode_chat(ASK.messages({"text": text})))
        else:
            prompts.append(rng.integers(5, 2000, 190).tolist())
    weight = 1 / (groups * rollouts * LENGTH)
    rows = []
    for g, prompt in enumerate(prompts):
        for r in range(rollouts):
            tokens = rng.integers(5, 2000, LENGTH).tolist()
            completion = Completion(prompt, tokens, [-7.6] * LENGTH, "length")
            advantage = 0.0 if g >= groups * (1 - dead) else (-1.0) ** r
            rows.append(G.Row(f"m{g % modules}", completion, advantage, weight))
    return rows


def update(model, rows: list[G.Row], tokenizer) -> None:
    """What train_step does with a step's rows; rows of no advantage do not get there."""
    trained = [r for r in rows if r.advantage]
    G.step_gradient(model, trained, G.Config(), tokenizer.size, fresh=False)


def update_times(model, tokenizer, cases: list[list[G.Row]], times: int) -> list[float]:
    """Median milliseconds of the update of each of these sets of rows, by turns."""
    runs = [partial(update, model, rows, tokenizer) for rows in cases]
    return [1e3 * t for t in alternate(*runs, times=times)]


def update_costs() -> dict:
    """Milliseconds of the update against rollouts a group, modules, and share of dead groups."""
    model, tokenizer = ours()
    cases = {}
    for n in (4, 8, 16, 32):
        cases[f"rollouts {n}"] = rows_of(4, n, tokenizer)
    for n in (1, 2, 4, 8):
        cases[f"modules {n}"] = rows_of(8, 8, tokenizer, modules=n, alike=False)
    for share in (0, 0.25, 0.5, 0.75, 0.9):
        cases[f"dead {share:.0%}"] = rows_of(20, 4, tokenizer, dead=share)
    found = update_times(model, tokenizer, list(cases.values()), times=5)
    return {
        "ours": dict(zip(cases, found)),
        "peer": None,
        "ratio": None,
        "what": "ms of the update: 4 groups of so many rollouts; 8 groups of 8 over so many "
        "modules; 20 groups of 4, so many dead",
    }


def update_half_dead() -> dict:
    model, tokenizer = ours()
    half = rows_of(8, 8, tokenizer, dead=0.5)
    all_alive = rows_of(8, 8, tokenizer)
    a, b = update_times(model, tokenizer, [half, all_alive], times=9)
    what = (
        "ms of the update of 8 groups of 8, half of the groups without advantage; reference: none "
        "without"
    )
    return {"ours": a, "peer": b, "ratio": a / b, "what": what}


def modules_8_vs_1() -> dict:
    model, tokenizer = ours()
    eight = rows_of(8, 8, tokenizer, modules=8, alike=False)
    one = rows_of(8, 8, tokenizer, modules=1, alike=False)
    a, b = update_times(model, tokenizer, [eight, one], times=9)
    what = (
        "ms of the update of 8 groups of 8 whose prompts share nothing, over eight modules; "
        "reference: the same in one module"
    )
    return {"ours": a, "peer": b, "ratio": a / b, "what": what}


def rollouts_16_vs_8() -> dict:
    prompt = statistics.mean(map(len, prompt_ids(ours()[1])))
    found = race(9, ours="our_step(rollouts=16)", peer="our_step(rollouts=8)")
    a = found["ours"][0]
    b = found["peer"][0]
    of_distinct_tokens = (prompt + 16 * LENGTH) / (prompt + 8 * LENGTH)
    return {
        "ours": a,
        "peer": b,
        "ratio": a / b,
        "of_distinct_tokens": of_distinct_tokens,
        "relative": a / b / of_distinct_tokens,
        "what": "seconds of a GRPO step with 16 rollouts; reference: with 8; of_distinct_tokens: "
        "(P + 16 C) / (P + 8 C)",
    }


# ----------------------------------------------------------------------------------------- the loss
def naive_loss(hidden, weight, targets, per_token):
    """Logits of all tokens at once, autograd through them.

    It is what TRL does, whose selective_log_softmax is this for fp32.
    """
    h = hidden.detach().requires_grad_()
    w = weight.detach().requires_grad_()
    logprobs = F.log_softmax(h @ w.t(), -1).gather(1, targets[:, None])[:, 0]
    return torch.autograd.grad(per_token(logprobs, slice(None)), (h, w))


def trl_loss(hidden, weight, targets, per_token):
    from trl.trainer.utils import selective_log_softmax

    h = hidden.detach().requires_grad_()
    w = weight.detach().requires_grad_()
    logprobs = selective_log_softmax((h @ w.t())[None], targets[None])[0]
    return torch.autograd.grad(per_token(logprobs, slice(None)), (h, w))


def fused_loss(hidden, weight, targets, per_token):
    d_weight = torch.zeros_like(weight)
    _, d_hidden = G.head_gradient(hidden, weight, targets, 1.0, per_token, d_weight)
    return d_hidden, d_weight


LOSSES = {"ours": fused_loss, "naive": naive_loss, "trl": trl_loss}


def loss_case(vocabulary: int, tokens: int, width: int = 128):
    """The arguments of a loss: hidden states, the head's matrix, targets, the loss per token."""
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width)
    weight = torch.randn(vocabulary, width).mul_(0.05)
    targets = torch.randint(0, vocabulary, (tokens,))
    old = torch.randn(tokens) * 0.1 - np.log(vocabulary)
    advantage = torch.randn(tokens)

    def per_token(logprobs, rows):
        token_weight = torch.full_like(logprobs, 1 / tokens)
        return G.policy_loss(logprobs, old[rows], advantage[rows], token_weight)

    return hidden, weight, targets, per_token


def loss_time_151936() -> dict:
    case = loss_case(151_936, 2048)
    runs = [partial(loss, *case) for loss in LOSSES.values()]
    a, b, c = (1e3 * t for t in alternate(*runs, times=5))
    return {
        "ours": a,
        "peer": b,
        "trl": c,
        "ratio": a / b,
        "what": "ms of loss and both gradients, 2,048 tokens, width 128, vocabulary 151,936; "
        "reference: all logits at once; trl: its selective_log_softmax",
    }


def loss_run(which: str, tokens: int):
    case = loss_case(151_936, tokens)
    return lambda: LOSSES[which](*case)


def no_loss_run(tokens: int):
    """What makes the inputs of loss_run, and does nothing with them."""
    loss_case(151_936, tokens)
    return lambda: None


def loss_memory_151936() -> dict:
    runs = {"ours": ("ours", 2048), "more": ("ours", 8192), "peer": ("naive", 2048)}
    idle = race(1, **{name: f"no_loss_run({n})" for name, (_, n) in runs.items()})
    busy = race(1, **{name: f"loss_run({loss!r}, {n})" for name, (loss, n) in runs.items()})
    a, more, b = (1e3 * (busy[name][1] - idle[name][1]) for name in runs)
    return {
        "ours": a,
        "peer": b,
        "ratio": a / b,
        "bytes_per_token": (more - a) * 1e6 / (8192 - 2048),
        "what": "MB beyond the inputs at the peak, 2,048 tokens, width 128, vocabulary 151,936, "
        "the weight's gradient (78 MB) included; reference: all logits at once; bytes_per_token: "
        "what ours takes more for each of 6,144 tokens more",
    }


def loss_costs() -> dict:
    cases = [
        (2048, 2048),
        (2048, 4096),
        (2048, 8192),
        (2048, 16_384),
        (151_936, 2048),
        (151_936, 16_384),
    ]
    costs = {}
    for vocabulary, tokens in cases:
        case = loss_case(vocabulary, tokens)
        # the others hold the logits four times over: where those are too many, ours alone
        feasible = vocabulary * tokens * 16 < 12e9
        runs = [partial(f, *case) for name, f in LOSSES.items() if name == "ours" or feasible]
        times = alternate(*runs, times=2)
        costs[f"V {vocabulary}, {tokens} tokens"] = dict(zip(LOSSES, [1e3 * t for t in times]))
    what = "ms of loss and both gradients, width 128; without a figure: did not fit"
    return {"ours": costs, "peer": None, "ratio": None, "what": what}


# ------------------------------------------------------------------------------ the time to a score
GOAL, EVERY = 0.6, 2


def time_to_score() -> dict:
    """Seconds of training, evaluations left out, until the dev score of banking77 is GOAL.

    The score is sampled at temperature 1, on 120 examples, by the same evaluation for both; it is
    taken every EVERY steps. The same LM, examples a step, rollouts, learning rate, warm-up and
    clipping.
    """
    our_times = []
    peer_times = []
    for seed in (0, 1, 2):
        our_times.append(our_time_to_score(seed))
        peer_times.append(trl_time_to_score(seed))
    a = statistics.median(our_times)
    b = statistics.median(peer_times)
    return {
        "ours": a,
        "peer": b,
        "ratio": b / a,
        "ours_seeds": our_times,
        "peer_seeds": peer_times,
        "what": f"seconds of training until banking77's dev score is {GOAL}, median of seeds 0, 1, "
        "2; peer: TRL",
    }


def our_time_to_score(seed: int, limit: int = 40) -> float:
    task, config = load_task({"task": "banking77", "seed": seed, "model": str(TINY)})
    model, tokenizer = load_pretrained(TINY)
    optimizer, _ = G.prepare(model, config)
    spent = 0.0
    for step in range(limit):
        train = partial(G.train_step, model, tokenizer, optimizer, None, task, config, step)
        spent += seconds(train)
        if (step + 1) % EVERY == 0:
            dev = G.evaluate(model, tokenizer, task, task.dev, config, 1.0)
            if dev["score"] >= GOAL:
                return spent
    return float("inf")


def trl_time_to_score(seed: int, limit: int = 40) -> float:
    from transformers import AutoTokenizer, TrainerCallback

    task, config = load_task({"task": "banking77", "seed": seed, "model": str(TINY)})
    model, tokenizer = load_pretrained(TINY)
    peer = theirs()
    (module,) = task.program.modules().values()

    def reward(completions, intent, **_):
        """That of ours: the metric, or what an answer in another format earns."""
        scores = []
        for completion, wanted in zip(completions, intent):
            try:
                answer = parse(module.signature, completion[0]["content"])
                scores.append(float(answer["intent"] == wanted))
            except FormatError as e:
                missing = 1 - len(e.present) / len(e.expected)
                scores.append(config.format_failure_score * missing)
        return scores

    state = {"spent": 0.0, "reached": float("inf")}

    class Watch(TrainerCallback):
        def on_step_begin(self, *_, **__):
            state["began"] = time.perf_counter()

        def on_step_end(self, args, trainer, control, **_):
            state["spent"] += time.perf_counter() - state["began"]
            if trainer.global_step % EVERY == 0:
                # TRL's weights under our names
                weights = peer.state_dict()
                weights.pop("lm_head.weight", None)
                model.load_state_dict({k.removeprefix("model."): v for k, v in weights.items()})
                dev = G.evaluate(model, tokenizer, task, task.dev, config, 1.0)
                if dev["score"] >= GOAL:
                    state["reached"] = state["spent"]
                    control.should_training_stop = True

    prompts = []
    for e in task.train:
        prompts.append({"prompt": module.messages({"text": e["text"]}), "intent": e["intent"]})
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl_trainer(
            peer,
            AutoTokenizer.from_pretrained(TINY),
            prompts,
            reward,
            folder,
            limit,
            lr=config.lr,
            length=config.max_tokens,
            batch=config.examples * config.rollouts,
            callbacks=[Watch()],
            seed=seed,
            weight_decay=0.0,
            warmup_steps=config.warmup,
            lr_scheduler_type="constant_with_warmup",
        )
        trainer.train()
    return state["reached"]


# -------------------------------------------------------------------------------------- all figures
FIGURES = (
    grpo_step,
    decode,
    decode_ragged,
    decode_generate_batch,
    peak_memory,
    update_half_dead,
    modules_8_vs_1,
    rollouts_16_vs_8,
    loss_time_151936,
    loss_memory_151936,
    time_to_score,
    update_costs,
    loss_costs,
)

# of docs/speed.md's table: figure -> its name, the other side
ROWS = {
    "grpo_step": ("a GRPO step, s", "TRL"),
    "time_to_score": ("banking77 to a dev score of 0.6, s of training", "TRL"),
    "peak_memory": ("peak memory of the process, GB", "TRL"),
    "decode": ("a decode step of 32 rows, ms", "`generate`"),
    "decode_ragged": ("128 requests of ragged length (mean/max 0.33), tokens/s", "`generate`"),
    "decode_generate_batch": ("32 requests of 64 tokens, tokens/s", "`generate_batch`"),
    "update_half_dead": ("update, half of the groups without advantage, ms", "none without"),
    "modules_8_vs_1": ("update, 8 modules, ms", "1 module"),
    "rollouts_16_vs_8": ("a step with 16 rollouts, s", "8 rollouts"),
    "loss_time_151936": ("loss and gradients, V = 151,936, ms", "all logits at once"),
    "loss_memory_151936": ("its memory, MB", "all logits at once"),
}


def table(figures: dict) -> str:
    """The README's table.

    Above, how many times faster or smaller ours is; below, what ours costs relative to the other.
    """

    def number(x: float) -> str:
        return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"

    lines = ["| | ours | other | other is | ratio |", "|---|---|---|---|---|"]
    for name, (title, other) in ROWS.items():
        f = figures[name]
        if name.startswith(("update", "modules", "rollouts", "loss")):
            ratio = f"{f['ratio']:.2f} of it"
        else:
            ratio = f"{f['ratio']:.1f}x"
        lines.append(f"| {title} | {number(f['ours'])} | {number(f['peer'])} | {other} | {ratio} |")
    return "\n".join(lines)


def chosen(names: list[str], known) -> list[str]:
    """The figures to measure, in the order of `known`: those named, or all.

    Leaves the program where one is unknown.
    """
    unknown = set(names) - set(known)
    if unknown:
        sys.exit(f"error: {min(unknown)}: none of {', '.join(known)}")
    return [name for name in known if not names or name in names]


def machine() -> str:
    """Cores, CPU and GPU."""
    cpu = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        models = [line for line in lines if line.startswith("model name")]
        if models:
            cpu = models[0].split(":")[1].strip()
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{os.cpu_count()} cores, {cpu}{gpu}"


def measure(figures: dict) -> None:
    """Take each figure (name -> function), print it and put it into results/bench.json.

    The figures that were there before stay.
    """
    about = {
        "machine": machine(),
        "versions": {n: importlib.metadata.version(n) for n in ("torch", "transformers", "trl")},
    }
    stored = json.loads(OUT.read_text())["figures"] if OUT.exists() else {}

    def number(x) -> str:
        return f"{x:10.4g}" if isinstance(x, (int, float)) else " " * 10

    for name, figure in figures.items():
        try:
            stored[name] = figure() | {"date": str(date.today())}
        # a peer that cannot do this here; said, and the others go on
        except Exception as e:
            failed = f"{type(e).__name__}: {str(e)[:200]}"
            stored[name] = {"ours": None, "peer": None, "ratio": None, "failed": failed}
        f = stored[name]
        print(
            f"{name:30} ours {number(f['ours'])}  peer {number(f['peer'])}  "
            f"ratio {number(f['ratio'])}   {f.get('failed') or f['what']}",
            flush=True,
        )
        OUT.parent.mkdir(exist_ok=True)
        OUT.write_text(json.dumps(about | {"figures": stored}, indent=1) + "\n")


def main(names: list[str]) -> None:
    if names and names[0].startswith("--worker="):
        return work(names[0].split("=", 1)[1], globals())
    if names == ["--table"]:
        return print(table(json.loads(OUT.read_text())["figures"]))
    known = {f.__name__: f for f in FIGURES}
    measure({name: known[name] for name in chosen(names, known)})


if __name__ == "__main__":
    main(sys.argv[1:])
