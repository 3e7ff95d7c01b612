"""How fast, against the libraries a user would otherwise pick: the same model, prompts and work in the same run, alternating.

    python -m studies.bench [FIGURE …]        # `make bench`; prints a table and writes results/bench.json
    (a second table, of a real LM at real work, is made by bench_real.py: `make bench REAL=1 DATA=…`)

The LM is the one in tasks/tiny (1.1M parameters, Qwen3, width 128, 4 layers, vocabulary 2,048), in fp32. Unless said otherwise: 4
prompts of 175 to 182 tokens with one instruction, 8 rollouts each, 64 tokens sampled, end tokens ignored. Every figure is a median.
`ratio` says how many times faster (or smaller) than the peer ours is; of update_half_dead, modules_8_vs_1, rollouts_16_vs_8 and
the loss rows it is our cost relative to the reference. Every figure's `what` says what `ours` and `peer` are, and in which unit.
"""
from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
os.environ |= {"TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

import numpy as np
import torch
import torch.nn.functional as F

import mmgrpo as G
from model import load_pretrained
from program import Completion, FormatError, Module, Prediction, Program, Task
from run.loading import load_task
from tasks import banking77

TINY, OUT = ROOT / "tasks" / "tiny", ROOT / "results" / "bench.json"
PROMPTS, ROLLOUTS, LENGTH = 4, 8, 64
ASK = Module("text -> intent", "Name the intent of the customer: what they want from the bank, as one of the labels of the list that "
             "the bank works with, in one word.", {"text": "what the customer wrote to the bank"})
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
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()


def prompt_ids(tokenizer) -> list[list[int]]:
    return [tokenizer.encode_chat(ASK.messages({"text": t})) for t in TEXTS[:PROMPTS]]


FOUND: dict[str, dict] = {}         # figures that come of another one's runs


def seconds(run) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def race(times: int, **cases: str) -> dict[str, tuple[float, float]]:
    """Each case by turns, `times` times after a first round that does not count -> median seconds of each, and the GB that its
    process held at the peak."""
    found = rounds(times + 1, cases)
    return {name: (statistics.median(a["seconds"] for a in answers[1:]), answers[-1]["peak"]) for name, answers in found.items()}


def rounds(times: int, cases: dict[str, str], module: str = "studies.bench") -> dict[str, list[dict]]:
    """Each case, an expression of `script` that gives a function, in a process of its own; they run by turns, `times` times ->
    what each answered (see `work`) every time. However it ends, no process is left, nor a temporary file of theirs."""
    workers: dict[str, subprocess.Popen] = {}
    def ask(worker) -> dict:
        try:
            print("go", file=worker.stdin, flush=True)
            return json.loads(worker.stdout.readline())
        except (OSError, ValueError):
            raise RuntimeError(f"{worker.args[-1]} ended") from None
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as ends:
        for name, case in cases.items():
            w = workers[name] = subprocess.Popen([sys.executable, "-m", module, f"--worker={case}"], stdin=subprocess.PIPE,
                                                 stdout=subprocess.PIPE, text=True, env=os.environ | {"TMPDIR": folder})
            ends.callback(w.communicate)                    # the last first: killed, then waited for
            ends.callback(w.kill)
        answers = [[ask(w) for w in workers.values()] for _ in range(times)]
        return {name: list(of_one) for name, of_one in zip(workers, zip(*answers))}


def work(case: str, names: dict) -> None:
    """A worker of `rounds`: whenever it is asked, run once; answer with the `seconds`, the GB held at the `peak` so far, and
    what the function `said`, if that is a dict. `names` are those of the script."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)                                           # what libraries print is no answer
    run = eval(case, names)                                 # the expression comes from the script alone
    for _ in sys.stdin:
        began = time.perf_counter()
        said = run()
        taken = time.perf_counter() - began
        peak = next(int(line.split()[1]) * 1024 / 1e9 for line in open("/proc/self/status") if line.startswith("VmHWM"))
        answer = {"seconds": taken, "peak": peak} | ({"said": said} if isinstance(said, dict) else {})
        print(json.dumps(answer), file=answers, flush=True)


def alternate(*runs, times: int) -> list[float]:
    """Median seconds of each, one after the other `times` times, after a first round that does not count."""
    taken = [[seconds(run) for run in runs] for _ in range(times + 1)][1:]
    return [statistics.median(t) for t in zip(*taken)]


# ------------------------------------------------------------------------------------------------------------ a whole step

def our_step(examples: int = PROMPTS, rollouts: int = ROLLOUTS):
    """A function that makes one step of mmGRPO: sampling, groups, update."""
    model, tokenizer = ours()
    task = Task(One(), lambda example, prediction: random.random(), [{"text": t} for t in TEXTS], [], [])
    config = G.Config(examples=examples, rollouts=rollouts, max_tokens=LENGTH, slots=examples * rollouts, max_calls=1, lr=1e-4)
    optimizer, _ = G.prepare(model, config)
    steps = iter(range(10**6))
    return lambda: G.train_step(model, tokenizer, optimizer, None, task, config, next(steps))


def trl_trainer(model, tokenizer, prompts, reward, folder, steps, lr=1e-4, length=LENGTH, batch=PROMPTS * ROLLOUTS, callbacks=(), **options):
    import datasets
    from trl import GRPOConfig, GRPOTrainer
    args = GRPOConfig(output_dir=folder, per_device_train_batch_size=batch, num_generations=ROLLOUTS, max_completion_length=length,
                      beta=0.0, max_steps=steps, learning_rate=lr, report_to=[], save_strategy="no", logging_strategy="no", bf16=False,
                      use_cpu=not torch.cuda.is_available(), gradient_checkpointing=False, disable_tqdm=True, temperature=1.0,
                      loss_type="grpo", max_grad_norm=1.0, **options)
    return GRPOTrainer(model, reward, args=args, train_dataset=datasets.Dataset.from_list(prompts), processing_class=tokenizer,
                       callbacks=list(callbacks))


def step_by_step(trainer):
    """A function that makes one step of TRL's trainer, which runs in a thread of its own that waits between steps."""
    import threading

    from transformers import TrainerCallback
    go, done, failed = threading.Semaphore(0), threading.Semaphore(0), []
    class Wait(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            done.release()
            go.acquire()
    def train():
        try:
            trainer.train()
        except BaseException as e:
            failed.append(e)
        done.release()                                      # who waits for a step is not left waiting
    def reach():
        done.acquire()
        if failed:
            raise failed[0]
    trainer.add_callback(Wait())
    threading.Thread(target=train, daemon=True).start()
    reach()
    def step():
        go.release()
        reach()
    return step


def their_step():
    from transformers import AutoTokenizer
    prompts = [{"prompt": ASK.messages({"text": t})} for t in TEXTS]
    trainer = trl_trainer(theirs(), AutoTokenizer.from_pretrained(TINY), prompts, lambda completions, **_: [random.random() for _ in completions],
                          tempfile.mkdtemp(), 10**6, generation_kwargs={"min_new_tokens": LENGTH})
    return step_by_step(trainer)


def grpo_step() -> dict:
    found = race(9, ours="our_step()", peer="their_step()")
    a, b = found["ours"], found["peer"]
    FOUND["peak_memory"] = {"ours": a[1], "peer": b[1], "ratio": b[1] / a[1], "what": "GB resident at the peak of the process that makes "
                            "these GRPO steps, its libraries included; peer: TRL"}
    return {"ours": a[0], "peer": b[0], "ratio": b[0] / a[0], "what": "seconds of a GRPO step, sampling included; peer: TRL"}


def peak_memory() -> dict:
    """Of the processes of grpo_step."""
    if "peak_memory" not in FOUND:
        grpo_step()
    return FOUND["peak_memory"]


# ------------------------------------------------------------------------------------------------------------ decoding

def sample(model, tokenizer, prompts: list[list[int]], lengths: list[int], slots: int = PROMPTS * ROLLOUTS) -> None:
    """Sample so many tokens for each prompt."""
    ids_only = copy.copy(tokenizer)
    ids_only.encode_chat, ids_only.decode = (lambda prompt: prompt), (lambda ids: "")
    sampler, left = G.Sampler(model, ids_only, slots=slots, max_tokens=max(lengths)), len(prompts)
    for i, (prompt, length) in enumerate(zip(prompts, lengths)):
        sampler.submit(prompt, (i,))
        ticket, prompt, uniforms = sampler.waiting.pop()
        sampler.waiting.append((ticket, prompt, uniforms[:length]))
    while left:
        left -= len(sampler.advance())


def generate(model, prompts: list[list[int]], lengths: list[int], ticks: list[float] | None = None) -> None:
    """The same with transformers: left-padded batches of 32 in the order of the requests, each row done at its own length.
    `ticks` gets the time at which each token of a batch was there."""
    from transformers import StoppingCriteria, StoppingCriteriaList
    for i in range(0, len(prompts), PROMPTS * ROLLOUTS):
        batch, wanted = prompts[i:i + PROMPTS * ROLLOUTS], torch.tensor(lengths[i:i + PROMPTS * ROLLOUTS])
        width = max(map(len, batch))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in batch])
        class Done(StoppingCriteria):
            def __call__(self, input_ids, scores, **_):
                if ticks is not None:
                    ticks.append(time.perf_counter())
                return input_ids.shape[1] - width >= wanted
        with torch.no_grad():
            model.generate(ids, attention_mask=(torch.arange(width) >= torch.tensor([[width - len(p)] for p in batch])).long(),
                           max_new_tokens=int(wanted.max()), min_new_tokens=1, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                           pad_token_id=0, eos_token_id=None, stopping_criteria=StoppingCriteriaList([Done()]))


def our_sampling(lengths: list[int]):
    model, tokenizer = ours()
    prompts = prompt_ids(tokenizer)
    prompts = [p for p in prompts for _ in range(len(lengths) // len(prompts))]
    return lambda: sample(model, tokenizer, prompts, lengths)


def their_sampling(lengths: list[int]):
    model, prompts = theirs(), prompt_ids(ours()[1])
    prompts = [p for p in prompts for _ in range(len(lengths) // len(prompts))]
    return lambda: generate(model, prompts, lengths)


def their_batching(lengths: list[int]):
    """transformers' continuous batching; it takes one limit for all requests."""
    from transformers import GenerationConfig
    model, prompts = theirs(), prompt_ids(ours()[1])
    prompts = [p for p in prompts for _ in range(len(lengths) // len(prompts))]
    config = GenerationConfig(max_new_tokens=max(lengths), do_sample=True, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=-1, pad_token_id=0)
    def run():
        if len(answers := model.generate_batch(prompts, generation_config=config, progress_bar=False)) < len(prompts):
            raise RuntimeError(f"only {len(answers)} of {len(prompts)} requests were answered")
    return run


def decode() -> dict:
    found = race(9, **{f"{who}{n}": f"{who}_sampling([{n}] * 32)" for who in ("our", "their") for n in (LENGTH, 1)})
    a, b = (1e3 * (found[f"{who}{LENGTH}"][0] - found[f"{who}1"][0]) / (LENGTH - 1) for who in ("our", "their"))
    return {"ours": a, "peer": b, "ratio": b / a, "what": "ms a decode step of 32 rows; peer: transformers' generate"}


def ragged() -> list[int]:
    lengths = np.minimum(1 + np.random.default_rng(0).exponential(28, 128).astype(int), 96).tolist()
    return [96, *lengths[1:]]


def decode_ragged() -> dict:
    found, lengths = race(5, ours="our_sampling(ragged())", peer="their_sampling(ragged())"), ragged()
    a, b = (sum(lengths) / found[who][0] for who in ("ours", "peer"))
    return {"ours": a, "peer": b, "ratio": a / b, "mean_over_max": sum(lengths) / len(lengths) / max(lengths),
            "what": "tokens/s of 128 requests over 32 slots, prefill included; peer: transformers' generate, 32 at a time"}


def decode_generate_batch() -> dict:
    found = race(2, ours="our_sampling([64] * 32)", peer="their_batching([64] * 32)")
    a, b = (32 * 64 / found[who][0] for who in ("ours", "peer"))
    return {"ours": a, "peer": b, "ratio": a / b, "what": "tokens/s of 32 requests of 64 tokens, prefill included; peer: generate_batch"}


# ------------------------------------------------------------------------------------------------------------ the update

def rows_of(groups: int, rollouts: int, tokenizer, dead: float = 0.0, modules: int = 1, alike: bool = True) -> list[G.Row]:
    """Rows of so many groups, the prompts with one instruction (`alike`) or with nothing in common; the last groups are dead."""
    rng, rows = np.random.default_rng(0), []
    prompts = [tokenizer.encode_chat(ASK.messages({"text": t})) if alike else rng.integers(5, 2000, 190).tolist() for t in TEXTS[:groups]]
    for g, prompt in enumerate(prompts):
        for r in range(rollouts):
            tokens = rng.integers(5, 2000, LENGTH).tolist()
            rows.append(G.Row(f"m{g % modules}", Completion(prompt, tokens, [-7.6] * LENGTH, "length"),
                              0.0 if g >= groups * (1 - dead) else (-1.0) ** r, 1 / (groups * rollouts * LENGTH)))
    return rows


def update(model, rows: list[G.Row], tokenizer) -> None:
    """What train_step does with a step's rows; rows of no advantage do not get there."""
    G.step_gradient(model, [r for r in rows if r.advantage], G.Config(), tokenizer.size, fresh=False)


def update_costs() -> dict:
    """Milliseconds of the update against the rollouts a group, the number of modules, and the share of dead groups."""
    model, tokenizer = ours()
    cases = {f"rollouts {r}": rows_of(4, r, tokenizer) for r in (4, 8, 16, 32)}
    cases |= {f"modules {m}": rows_of(8, 8, tokenizer, modules=m, alike=False) for m in (1, 2, 4, 8)}
    cases |= {f"dead {share:.0%}": rows_of(20, 4, tokenizer, dead=share) for share in (0, 0.25, 0.5, 0.75, 0.9)}
    times = alternate(*(lambda rows=rows: update(model, rows, tokenizer) for rows in cases.values()), times=5)
    return {"ours": {name: 1e3 * t for name, t in zip(cases, times)}, "peer": None, "ratio": None,
            "what": "ms of the update: 4 groups of so many rollouts; 8 groups of 8 over so many modules; 20 groups of 4, so many dead"}


def update_half_dead() -> dict:
    model, tokenizer = ours()
    half, whole = (rows_of(8, 8, tokenizer, dead=share) for share in (0.5, 0.0))
    a, b = alternate(lambda: update(model, half, tokenizer), lambda: update(model, whole, tokenizer), times=9)
    return {"ours": 1e3 * a, "peer": 1e3 * b, "ratio": a / b, "what": "ms of the update of 8 groups of 8, half of the groups without "
            "advantage; reference: none without"}


def modules_8_vs_1() -> dict:
    model, tokenizer = ours()
    eight, one = (rows_of(8, 8, tokenizer, modules=m, alike=False) for m in (8, 1))
    a, b = alternate(lambda: update(model, eight, tokenizer), lambda: update(model, one, tokenizer), times=9)
    return {"ours": 1e3 * a, "peer": 1e3 * b, "ratio": a / b, "what": "ms of the update of 8 groups of 8 whose prompts share nothing, over "
            "eight modules; reference: the same in one module"}


def rollouts_16_vs_8() -> dict:
    tokens = statistics.mean(map(len, prompt_ids(ours()[1])))
    found = race(9, ours="our_step(rollouts=16)", peer="our_step(rollouts=8)")
    a, b = found["ours"][0], found["peer"][0]
    naive = (tokens + 16 * LENGTH) / (tokens + 8 * LENGTH)
    return {"ours": a, "peer": b, "ratio": a / b, "of_distinct_tokens": naive, "relative": a / b / naive,
            "what": "seconds of a GRPO step with 16 rollouts; reference: with 8; of_distinct_tokens: (P + 16 C) / (P + 8 C)"}


# ------------------------------------------------------------------------------------------------------------ the loss

def naive_loss(hidden, weight, targets, per_token):
    """Logits of all tokens at once, autograd through them: what TRL does, whose selective_log_softmax is this for fp32."""
    h, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    logprobs = F.log_softmax(h @ w.t(), -1).gather(1, targets[:, None])[:, 0]
    return torch.autograd.grad(per_token(logprobs, slice(None)), (h, w))


def trl_loss(hidden, weight, targets, per_token):
    from trl.trainer.utils import selective_log_softmax
    h, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    logprobs = selective_log_softmax((h @ w.t())[None], targets[None])[0]
    return torch.autograd.grad(per_token(logprobs, slice(None)), (h, w))


def fused_loss(hidden, weight, targets, per_token):
    d_weight = torch.zeros_like(weight)
    return G.head_gradient(hidden, weight, targets, 1.0, per_token, d_weight)[1], d_weight


LOSSES = {"ours": fused_loss, "naive": naive_loss, "trl": trl_loss}


def loss_case(vocabulary: int, tokens: int, width: int = 128):
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(tokens, width), torch.randn(vocabulary, width).mul_(0.05), torch.randint(0, vocabulary, (tokens,))
    old, advantage = torch.randn(tokens) * 0.1 - np.log(vocabulary), torch.randn(tokens)
    per_token = lambda x, rows: G.policy_loss(x, old[rows], advantage[rows], torch.full_like(x, 1 / tokens))
    return hidden, weight, targets, per_token


def loss_time_151936() -> dict:
    case = loss_case(151_936, 2048)
    a, b, c = alternate(*(lambda f=f: f(*case) for f in LOSSES.values()), times=5)
    return {"ours": 1e3 * a, "peer": 1e3 * b, "trl": 1e3 * c, "ratio": a / b,
            "what": "ms of loss and both gradients, 2,048 tokens, width 128, vocabulary 151,936; reference: all logits at once; trl: its "
                    "selective_log_softmax"}


def loss_run(which: str, tokens: int):
    case = loss_case(151_936, tokens)
    return lambda: LOSSES[which](*case)


def loss_memory_151936() -> dict:
    cases = {"ours": "loss_run('ours', 2048)", "more": "loss_run('ours', 8192)", "peer": "loss_run('naive', 2048)"}
    idle = race(1, **{name: f"loss_case(151_936, {case.split(', ')[1]} and (lambda: None)" for name, case in cases.items()})
    busy = race(1, **cases)
    a, more, b = (1e3 * (busy[name][1] - idle[name][1]) for name in cases)
    return {"ours": a, "peer": b, "ratio": a / b, "bytes_per_token": (more - a) * 1e6 / 6144,
            "what": "MB beyond the inputs at the peak, 2,048 tokens, width 128, vocabulary 151,936, the weight's gradient (78 MB) included; "
                    "reference: all logits at once; bytes_per_token: what ours takes more for each of 6,144 tokens more"}


def loss_costs() -> dict:
    cases = [(2048, 2048), (2048, 4096), (2048, 8192), (2048, 16_384), (151_936, 2048), (151_936, 16_384)]
    table = {}
    for v, n in cases:
        case, feasible = loss_case(v, n), v * n * 16 < 12e9             # the naive one holds the logits four times over
        times = alternate(*(lambda f=f: f(*case) for k, f in LOSSES.items() if k == "ours" or feasible), times=2)
        table[f"V {v}, {n} tokens"] = dict(zip(LOSSES, [1e3 * t for t in times]))
    return {"ours": table, "peer": None, "ratio": None, "what": "ms of loss and both gradients, width 128; without a figure: did not fit"}


# ------------------------------------------------------------------------------------------------------------ time to a score

GOAL, EVERY = 0.6, 2


def time_to_score() -> dict:
    """Seconds of training, evaluations left out, until the dev score of banking77 (sampled at 1, 120 examples, the same evaluation
    for both) is GOAL; evaluated every EVERY steps. The same LM, examples a step, rollouts, learning rate, warm-up and clipping."""
    ours_at, peer_at = [], []
    for seed in (0, 1, 2):
        ours_at.append(our_time_to_score(seed))
        peer_at.append(trl_time_to_score(seed))
    a, b = statistics.median(ours_at), statistics.median(peer_at)
    return {"ours": a, "peer": b, "ratio": b / a, "ours_seeds": ours_at, "peer_seeds": peer_at,
            "what": f"seconds of training until banking77's dev score is {GOAL}, median of seeds 0, 1, 2; peer: TRL"}


def our_time_to_score(seed: int, limit: int = 40) -> float:
    task, config = load_task({"task": "banking77", "seed": seed, "model": str(TINY)})
    model, tokenizer = load_pretrained(TINY)
    optimizer, _ = G.prepare(model, config)
    spent = 0.0
    for step in range(limit):
        spent += seconds(lambda: G.train_step(model, tokenizer, optimizer, None, task, config, step))
        if (step + 1) % EVERY == 0 and G.evaluate(model, tokenizer, task, task.dev, config, 1.0)["score"] >= GOAL:
            return spent
    return float("inf")


def trl_time_to_score(seed: int, limit: int = 40) -> float:
    from transformers import AutoTokenizer, TrainerCallback

    from program import parse
    task, config = load_task({"task": "banking77", "seed": seed, "model": str(TINY)})
    (model, tokenizer), peer = load_pretrained(TINY), theirs()
    (module,) = task.program.modules().values()
    def reward(completions, intent, **_):
        scores = []
        for c, want in zip(completions, intent):
            try:
                scores.append(float(parse(module.signature, c[0]["content"])["intent"] == want))
            except FormatError as e:
                scores.append(config.format_failure_score * (1 - len(e.present) / len(e.expected)))
        return scores
    state = {"spent": 0.0, "reached": float("inf")}
    class Watch(TrainerCallback):
        def on_step_begin(self, *_, **__):
            state["began"] = time.perf_counter()
        def on_step_end(self, args, trainer, control, **_):
            state["spent"] += time.perf_counter() - state["began"]
            if trainer.global_step % EVERY == 0:
                found = {k.removeprefix("model."): v for k, v in peer.state_dict().items() if k != "lm_head.weight"}
                model.load_state_dict(found)
                if G.evaluate(model, tokenizer, task, task.dev, config, 1.0)["score"] >= GOAL:
                    state["reached"] = state["spent"]
                    control.should_training_stop = True
    prompts = [{"prompt": module.messages({"text": e["text"]}), "intent": e["intent"]} for e in task.train]
    with tempfile.TemporaryDirectory() as folder:
        trl_trainer(peer, AutoTokenizer.from_pretrained(TINY), prompts, reward, folder, limit, lr=config.lr, length=config.max_tokens,
                    batch=config.examples * config.rollouts, callbacks=[Watch()], seed=seed, weight_decay=0.0, warmup_steps=config.warmup,
                    lr_scheduler_type="constant_with_warmup").train()
    return state["reached"]


FIGURES = (grpo_step, decode, decode_ragged, decode_generate_batch, peak_memory, update_half_dead, modules_8_vs_1, rollouts_16_vs_8,
           loss_time_151936, loss_memory_151936, time_to_score, update_costs, loss_costs)


ROWS = {            # of the README's table: figure -> its name, the other side
    "grpo_step": ("a GRPO step, s", "TRL"), "time_to_score": ("banking77 to a dev score of 0.6, s of training", "TRL"),
    "peak_memory": ("peak memory of the process, GB", "TRL"), "decode": ("a decode step of 32 rows, ms", "`generate`"),
    "decode_ragged": ("128 requests of ragged length (mean/max 0.33), tokens/s", "`generate`"),
    "decode_generate_batch": ("32 requests of 64 tokens, tokens/s", "`generate_batch`"),
    "update_half_dead": ("update, half of the groups without advantage, ms", "none without"),
    "modules_8_vs_1": ("update, 8 modules, ms", "1 module"), "rollouts_16_vs_8": ("a step with 16 rollouts, s", "8 rollouts"),
    "loss_time_151936": ("loss and gradients, V = 151,936, ms", "all logits at once"), "loss_memory_151936": ("its memory, MB", "all logits at once")}


def table(figures: dict) -> str:
    """The README's table: above, how many times faster or smaller ours is; below, what ours costs relative to the other."""
    number = lambda x: f"{x:,.0f}" if x >= 100 else f"{x:.3g}"
    lines = ["| | ours | other | other is | ratio |", "|---|---|---|---|---|"]
    for name, (title, other) in ROWS.items():
        f = figures[name]
        ratio = f"{f['ratio']:.2f} of it" if name.startswith(("update", "modules", "rollouts", "loss")) else f"{f['ratio']:.1f}x"
        lines.append(f"| {title} | {number(f['ours'])} | {number(f['peer'])} | {other} | {ratio} |")
    return "\n".join(lines)


def main(names: list[str]) -> None:
    if names and names[0].startswith("--worker="):
        return work(names[0].split("=", 1)[1], globals())
    if names == ["--table"]:
        return print(table(json.loads(OUT.read_text())["figures"]))
    known = {f.__name__: f for f in FIGURES}
    measure({name: known[name] for name in chosen(names, known)})


def chosen(names: list[str], known) -> list[str]:
    """The figures to measure, in the order of `known`: those named, or all. Leaves the program where one is unknown."""
    if odd := set(names) - set(known):
        sys.exit(f"error: {min(odd)}: none of {', '.join(known)}")
    return [name for name in known if not names or name in names]


def measure(figures: dict) -> None:
    """Take each figure (name -> function), print it and put it among those of results/bench.json, of which the others stay."""
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), platform.processor()) \
        if Path("/proc/cpuinfo").exists() else platform.processor()
    machine = f"{torch.get_num_threads()} cores, {cpu}" + (f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else "")
    versions = {n: importlib.metadata.version(n) for n in ("torch", "transformers", "trl")}
    stored = json.loads(OUT.read_text())["figures"] if OUT.exists() else {}
    for name, figure in figures.items():
        try:
            stored[name] = figure() | {"date": str(date.today())}
        except Exception as e:                              # a peer that cannot do this here; said, and the others go on
            stored[name] = {"ours": None, "peer": None, "ratio": None, "failed": f"{type(e).__name__}: {str(e)[:200]}"}
        f = stored[name]
        number = lambda x: f"{x:10.4g}" if isinstance(x, (int, float)) else f"{'':10}"
        print(f"{name:30} ours {number(f['ours'])}  peer {number(f['peer'])}  ratio {number(f['ratio'])}   "
              f"{f.get('failed') or f['what']}", flush=True)
        OUT.parent.mkdir(exist_ok=True)
        OUT.write_text(json.dumps({"machine": machine, "versions": versions, "figures": stored}, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
