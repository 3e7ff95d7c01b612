"""mmGRPO (arXiv 2508.04660) in one file: sample, group, compare, weigh, update.

An LM program calls one language model through several modules. For each example it is run R times; the k-th calls of
module m over those runs form a group; each call's advantage is its run's reward relative to its group; the weights
follow the clipped policy gradient of the sampled tokens.

    python mmgrpo.py train --task hover            # or: make train
    python mmgrpo.py eval --task hover --model runs/hover/last
    python mmgrpo.py show --task hover             # one run on one example, as a readable trace
    python mmgrpo.py group trajectories.json       # the groups and advantages of trajectories made elsewhere

Map, in the order the data flows: Config; Sampler; group_calls, advantages; token_logprobs, policy_loss; pack,
step_gradient; evaluate, train. Programs and trajectories are in program.py, the transformer in model.py, the command
line in cli.py. Left out on purpose: other policy-gradient methods, reward models, more than one machine.
Letters: N loss-bearing tokens, S slots; the others as in model.py.
"""
from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
import random
import sys
import time
from collections import Counter, defaultdict, deque
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from model import KVCache, Tokenizer, Transformer, save_pretrained
from program import Completion, InputError, ProgramError, Task, Trajectory, run_programs, statuses
from report import measure, plot

# ------------------------------------------------------------------------------------------------- configuration
@dataclass(frozen=True)
class Config:
    """Every option; each field is a flag of the command line (`--short-groups fill`) and is saved with the run.

    A task may come with defaults of its own for some of these. The paper's: --examples 4 --rollouts 12 --steps 750
    --lr 1e-5 --beta 0.01 --clip-norm 0.1 --temperature 0.6 --short-groups fill."""
    task: str = "hover"             # hover, banking77, papillon, or a Python file with a function load(data)
    model: str = "tasks/tiny"       # checkpoint folder in Hugging Face layout
    data: str = ""                  # folder with the task's real data; empty: the miniature edition
    prompts: str = ""               # JSON with instructions and demos, as Program.save writes it
    out: str = ""                   # folder of the run; empty: runs/<task>
    seed: int = 0                   # everything random follows from it
    device: str = ""                # cpu or cuda; empty: cuda where there is one
    dtype: str = "float32"          # of the weights that sample and score: float32 or bfloat16; masters are float32
    # rollouts
    examples: int = 8               # B, training examples a step
    rollouts: int = 8               # R, runs of the program per example
    temperature: float = 1.0        # of sampling, and of the distribution trained
    max_tokens: int = 128           # sampled tokens per LM call at the most
    max_calls: int = 32             # LM calls per run at the most
    slots: int = 64                 # sequences that decode together
    failure_score: float = 0.0      # score of a run that did not complete
    format_failure_score: float = -1.0      # reward of a run whose completion had no readable field
    interrupt: float = 0.0          # share of training runs cut short at a random call, to see what that does
    top_k: int = 0                  # evaluation only: sample among the k most likely tokens (0: all)
    top_p: float = 1.0              # evaluation only: sample among the most likely tokens of this total probability
    # groups and advantages
    level: str = "call"             # call: groups of (example, module, invocation); trajectory: one group an example
    short_groups: str = "keep"      # where runs differ in length: keep, truncate or fill (DSPy's PadGroups)
    group_size: int = 0             # keep this many members a group, evenly spaced by reward (0: all)
    baseline: str = "group"         # mean reward of the group, or of the example's runs
    leave_one_out: bool = False     # leave a member's own reward out of its baseline
    scale_rewards: str = "std"      # divide advantages by the standard deviation of the rewards, or none
    # loss
    normalize: str = "sequence"     # mean over each call's tokens; over all tokens of the step: token; or constant
    clip_low: float = 0.2           # the ratio is clipped to 1 - clip_low …
    clip_high: float = 0.2          # … and 1 + clip_high
    beta: float = 0.0               # weight of the KL divergence from the starting weights
    # optimizer
    steps: int = 20                 # optimizer steps are steps × inner_epochs
    inner_epochs: int = 1           # updates on the same rollouts
    lr: float = 5e-4                # of AdamW
    warmup: int = 5                 # steps of linear warm-up
    weight_decay: float = 0.0       # of AdamW
    clip_norm: float = 1.0          # the gradient's norm is clipped to this
    batch_tokens: int = 8192        # tokens per micro-batch, padding included
    # evaluation
    eval_every: int = 10            # steps between dev evaluations; before and after are always measured
    eval_examples: int = 100        # dev (or test) examples used (0: all)
    split: str = "dev"              # of `eval` and `show`: train, dev or test
    index: int = 0                  # of `show`: which example

    def __post_init__(self):
        choices = {"level": ("call", "trajectory"), "short_groups": ("keep", "truncate", "fill"), "baseline": ("group", "example"),
                   "scale_rewards": ("std", "none"), "normalize": ("sequence", "token", "constant"),
                   "dtype": ("float32", "bfloat16"), "split": ("train", "dev", "test")}
        positive = ("examples", "rollouts", "max_tokens", "max_calls", "slots", "inner_epochs", "batch_tokens", "eval_every")
        for f in dataclasses.fields(self):
            value, flag = getattr(self, f.name), f"--{f.name.replace('_', '-')}"
            if f.name in choices and value not in choices[f.name]:
                raise InputError(f"{flag}: {value!r} is none of {', '.join(choices[f.name])}")
            low = 1 if f.name in positive else -math.inf if f.name in ("failure_score", "format_failure_score") else 0
            if f.type in ("int", "float") and not low <= value < math.inf:
                raise InputError(f"{flag}: {value} is not a number of at least {low}")


# ------------------------------------------------------------------------------------------------------- sampler
def sample_tokens(logits: Tensor, uniform: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0):
    """logits (S, V), uniform (S,) in [0, 1) -> one token a row and its exact log-prob under the distribution sampled.

    Inverse CDF: the first token whose cumulative probability exceeds uniform x total, so a token of probability 0 is
    never drawn. Temperature 0 takes the most likely token, with log-prob 0."""
    if temperature == 0:
        token = logits.argmax(-1)
        return token, torch.zeros(token.shape, device=logits.device)
    logp = F.log_softmax(logits.float() / temperature, dim=-1)
    if top_k or top_p < 1:
        value, order = logp.sort(-1, descending=True)
        outside = (value.exp().cumsum(-1) - value.exp() >= top_p) | (torch.arange(logp.shape[1], device=logp.device)
                                                                     >= (top_k or logp.shape[1]))
        outside[:, 0] = False
        logp = F.log_softmax(logp.masked_fill(outside.scatter(1, order, outside), -math.inf), dim=-1)
    cdf = logp.double().exp().cumsum(-1)
    token = torch.searchsorted(cdf, uniform.double()[:, None] * cdf[:, -1:], right=True)
    return token[:, 0], logp.gather(1, token)[:, 0]


class Sampler:
    """Continuous batching over S slots of a KV cache: waiting -> live -> done.

    Live sequences are in slots 0..n-1. Each `advance` refills free slots from the waiting prompts (one prefill for
    equal ones), then decodes one token for every live sequence; the last one moves into a finished one's slot. Token t
    of a request is drawn with the t-th number of a Philox stream seeded by the request's key, so its batch-mates do not
    matter. Nothing is cached beyond the live sequences, so nothing survives an update of the weights."""
    def __init__(self, model: Transformer, tokenizer: Tokenizer, *, slots: int = 64, max_tokens: int = 128,
                 temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, prefill_tokens: int = 8192):
        self.model, self.tokenizer, self.slots, self.max_tokens = model, tokenizer, slots, max_tokens
        self.temperature, self.top_k, self.top_p, self.prefill_tokens = temperature, top_k, top_p, prefill_tokens
        self.device, self.context = model.head.device, model.config.max_positions
        self.waiting: deque[tuple[int, list[int], np.ndarray]] = deque()    # ticket, prompt, uniform numbers
        self.live: list[tuple[int, list[int]]] = []                         # slot -> ticket, prompt
        self.done: list[tuple[int, Completion]] = []
        self.tickets, self.seconds = 0, 0.0
        self.cache = KVCache(model.config, slots, 0, self.device, model.head.dtype)
        new = lambda dtype, *shape: torch.zeros(slots, *shape, dtype=dtype, device=self.device)
        self.tokens, self.logprobs = new(torch.long, max_tokens), new(torch.float, max_tokens)
        self.uniforms, self.count, self.limit = new(torch.double, max_tokens), new(torch.long), new(torch.long)
        self.ends = torch.zeros(tokenizer.size, dtype=torch.bool, device=self.device)
        self.ends[list(tokenizer.end_ids)] = True

    def submit(self, messages: list[dict], key: tuple) -> int:
        """Take a prompt; a prompt that leaves no room in the context is done at once, with no token."""
        prompt = self.tokenizer.encode_chat(messages)
        limit = min(self.max_tokens, self.context - len(prompt))
        seed = int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=16).digest(), "little")
        self.tickets += 1
        if limit > 0:
            self.waiting.append((self.tickets, prompt, np.random.Generator(np.random.Philox(key=seed)).random(limit)))
        else:
            self.done.append((self.tickets, Completion(prompt, [], [], "length")))
        return self.tickets

    @torch.no_grad()
    def advance(self) -> list[tuple[int, Completion]]:
        """Refill the slots, decode a token; return the requests that are done as (ticket, Completion)."""
        began = time.perf_counter()
        if self.waiting and len(self.live) < self.slots:
            self._admit()
            self._collect()
        if self.live:
            self._decode()
            self._collect()
        self.seconds += time.perf_counter() - began
        done, self.done = self.done, []
        return done

    def _admit(self):
        """Prefill waiting prompts into the free slots, and sample the first token of each."""
        same = defaultdict(list)                                            # prompt -> slots that ask for it
        for slot in range(len(self.live), min(self.slots, len(self.live) + len(self.waiting))):
            ticket, prompt, uniforms = self.waiting.popleft()
            self.live.append((ticket, prompt))
            same[tuple(prompt)].append(slot)
            self.uniforms[slot, :len(uniforms)] = torch.from_numpy(uniforms)
            self.count[slot], self.limit[slot] = 0, len(uniforms)
        prompts = sorted(same, key=len)
        self._reserve(len(prompts[-1]) + self.max_tokens)
        while prompts:
            width = len(prompts[-1])
            batch = [prompts.pop() for _ in range(max(1, min(len(prompts), self.prefill_tokens // width)))]
            ids = torch.tensor([[*p, *[0] * (width - len(p))] for p in batch], device=self.device)
            slots, rows, ends = torch.tensor([(s, r, len(p)) for r, p in enumerate(batch) for s in same[p]],
                                             device=self.device).unbind(1)
            hidden = self.model(ids, attend=self.cache.prefill(slots, rows))
            self.cache.lengths[slots] = ends
            self._sample(hidden[rows, ends - 1], slots)

    def _reserve(self, size: int):
        """Let the cache hold sequences of `size` tokens."""
        old, size = self.cache, -(-size // 64) * 64
        if old.kv.shape[4] < size:
            self.cache = KVCache(self.model.config, self.slots, size, self.device, self.model.head.dtype)
            self.cache.kv[:, :, :, :, :old.kv.shape[4]], self.cache.lengths[:] = old.kv, old.lengths

    def _decode(self):
        n = len(self.live)
        slots, positions = torch.arange(n, device=self.device), self.cache.lengths[:n, None]
        last = self.tokens[slots, self.count[:n] - 1]
        hidden = self.model(last[:, None], positions, self.cache.decode(n, int(positions.max()) + 1))
        self.cache.lengths[:n] += 1
        self._sample(hidden[:, 0], slots)

    def _sample(self, hidden: Tensor, slots: Tensor):
        """Draw one token for each of `slots` from hidden (n, D); ids that the tokenizer lacks cannot be drawn."""
        at = self.count[slots]
        logits = F.linear(hidden, self.model.head[:self.tokenizer.size])
        self.tokens[slots, at], self.logprobs[slots, at] = sample_tokens(
            logits, self.uniforms[slots, at], self.temperature, self.top_k, self.top_p)
        self.count[slots] = at + 1

    def _collect(self):
        """Take finished sequences out; the last live one moves into each gap."""
        n = len(self.live)
        ended = self.ends[self.tokens[torch.arange(n, device=self.device), self.count[:n] - 1]]
        for i in (ended | (self.count[:n] >= self.limit[:n])).nonzero()[:, 0].tolist()[::-1]:
            (ticket, prompt), count, stop = self.live[i], int(self.count[i]), bool(ended[i])
            ids, logprobs = self.tokens[i, :count].tolist(), self.logprobs[i, :count].tolist()
            text = self.tokenizer.decode(ids[:count - stop])
            self.done.append((ticket, Completion(prompt, ids, logprobs, "stop" if stop else "length", text)))
            last = self.live.pop()
            if i < len(self.live):
                self.live[i] = last
                self.cache.move(len(self.live), i)
                for state in (self.tokens, self.logprobs, self.uniforms, self.count, self.limit):
                    state[i] = state[len(self.live)]


# ------------------------------------------------------------------------------- groups and advantages (Eq. 1, 2)
@dataclass(frozen=True)
class Member:
    """One run in a group: its place among the trajectories, and which of its calls are meant (one, or with
    level="trajectory" all). Example: Member(trajectory=5, calls=(2,), reward=0.5)"""
    trajectory: int
    calls: tuple[int, ...]
    reward: float


@dataclass(frozen=True)
class Group:
    """The k-th calls of a module over the runs of one example. Example: Group(3, "append_notes", 1, (Member(…), …))"""
    example: int | str
    module: str                     # "" with level="trajectory"
    invocation: int
    members: tuple[Member, ...]


def group_calls(trajectories: list[Trajectory], short_groups: str = "keep", group_size: int = 0, level: str = "call",
                seed: int = 0) -> list[Group]:
    """Group the calls of voting trajectories by (example, module, invocation), the paper's relative invocation.

    Runs may be ragged. `keep`: the members are the runs that reached the call. `truncate`: only calls that every
    voting run of the example reached. `fill`: a run with at least one call of the module is padded to the longest by
    drawing among its own calls (App. A, PadGroups). `group_size` k keeps k members evenly spaced in the order of
    reward (App. A, SelectKDiverseElements). level="trajectory" makes one group an example, of whole runs."""
    runs: dict = defaultdict(list)                          # example -> its voting runs
    for i, t in enumerate(trajectories):
        if t.votes:
            runs[t.example].append(i)
    groups = []
    for example, indices in runs.items():
        indices.sort(key=lambda i: trajectories[i].rollout)
        if level == "trajectory":
            whole = {i: tuple(range(len(trajectories[i].calls))) for i in indices if trajectories[i].calls}
            places = {("", 0): whole} if whole else {}
        else:
            places = _places(trajectories, indices, short_groups, seed)
        for (module, invocation), calls in places.items():
            members = [Member(i, c, trajectories[i].reward) for i, c in calls.items()]
            groups.append(Group(example, module, invocation, tuple(_diverse(members, group_size))))
    return groups


def _places(trajectories, indices, short_groups, seed) -> dict:
    """(module, invocation) -> {run: the call it has there}, over the runs of one example."""
    made = {i: defaultdict(list) for i in indices}          # run -> module -> its calls, in order
    for i in indices:
        for c, call in enumerate(trajectories[i].calls):
            made[i][call.module].append(c)
    places: dict = defaultdict(dict)
    for module in sorted({m for calls in made.values() for m in calls}):
        depth = max(len(made[i][module]) for i in indices)
        for i in indices:
            own = made[i][module]
            if own and short_groups == "fill":
                t = trajectories[i]
                draw = random.Random(repr((seed, t.example, t.rollout, module)))
                own = own + [draw.choice(own) for _ in range(depth - len(own))]
            for k, c in enumerate(own):
                places[module, k][i] = (c,)
    return {key: p for key, p in places.items() if short_groups != "truncate" or len(p) == len(indices)}


def _diverse(members: list[Member], k: int) -> list[Member]:
    if not 0 < k < len(members):
        return members
    ranked = sorted(members, key=lambda m: m.reward)        # stable: ties stay in the order of rollouts
    return [ranked[round(j * (len(members) - 1) / max(k - 1, 1))] for j in range(k)]


def advantages(groups: list[Group], trajectories: list[Trajectory], baseline: str = "group", leave_one_out: bool = False,
               scale_rewards: str = "std") -> list[list[float]]:
    """A = (r - baseline) / (std + 1e-4) for each member of each group (Eq. 2).

    The baseline is the mean reward of the group, or of all voting runs of its example; `leave_one_out` takes the
    member's own reward out of it. The standard deviation (ddof 1) is that of the same rewards, the member's included.
    Where those rewards are equal, or there is but one, every advantage is exactly 0."""
    runs: dict = defaultdict(list)
    for t in trajectories:
        if t.votes:
            runs[t.example].append(t.reward)
    result = []
    for g in groups:
        rewards = np.array([m.reward for m in g.members])
        pool = rewards if baseline == "group" else np.array(runs[g.example])
        a = np.zeros(len(rewards))
        if (pool != pool[0]).any():
            a = rewards - pool.mean()
            if leave_one_out:
                a *= len(pool) / (len(pool) - 1)            # r - mean of the others
            if scale_rewards == "std":
                a /= pool.std(ddof=1) + 1e-4
        result.append(a.tolist())
    return result


# ---------------------------------------------------------------------------------------------- loss (Eq. 7, Eq. 9)
@dataclass(frozen=True)
class Row:
    """A call in the loss: its completion, its advantage, and the weight of each of its tokens in the step's loss."""
    module: str
    completion: Completion
    advantage: float
    weight: float


def weigh(groups: list[Group], advantages: list[list[float]], trajectories: list[Trajectory],
          normalize: str = "sequence", constant: int = 1) -> list[Row]:
    """Groups -> rows of the loss. The weights belong to the whole optimizer step, so no micro-batch split changes them.

    `sequence` (Eq. 7): the mean over groups, over members, over the member's tokens; with level="trajectory" the
    tokens are those of the whole run (Eq. 9). `token` (DAPO, arXiv 2503.14476): the mean over all tokens of the step.
    `constant` (Dr. GRPO, arXiv 2503.20783): the sum over all tokens, divided by runs x `constant`."""
    tokens = lambda m: sum(len(trajectories[m.trajectory].calls[c].completion.token_ids) for c in m.calls)
    total = sum(tokens(m) for g in groups for m in g.members)
    runs = sum(t.votes for t in trajectories)
    rows = []
    for g, of_group in zip(groups, advantages):
        for m, a in zip(g.members, of_group):
            weight = {"sequence": 1 / (len(groups) * len(g.members) * max(tokens(m), 1)),
                      "token": 1 / max(total, 1), "constant": 1 / (runs * constant)}[normalize]
            for c in m.calls:
                call = trajectories[m.trajectory].calls[c]
                rows.append(Row(call.module, call.completion, a, weight))
    return rows


class _TokenLogprobs(torch.autograd.Function):
    """log softmax(h W^T / T)[target], in chunks of rows: no tensor of N x V is ever held, forward or backward."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature):
        rows = max(1, 2**22 // weight.shape[0])
        lse, picked = [], []
        for h, y in zip(hidden.split(rows), targets.split(rows)):
            logits = F.linear(h, weight).float() / temperature                  # (rows, V)
            lse.append(logits.logsumexp(-1))
            picked.append(logits.gather(1, y[:, None])[:, 0])
        lse = torch.cat(lse) if lse else hidden.new_empty(0, dtype=torch.float)
        ctx.save_for_backward(hidden, weight, targets, lse)
        ctx.temperature, ctx.rows = temperature, rows
        return (torch.cat(picked) if picked else lse) - lse

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, targets, lse = ctx.saved_tensors
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros(weight.shape, dtype=torch.float, device=weight.device) if ctx.needs_input_grad[1] else None
        for i in range(0, len(hidden), ctx.rows):
            r = slice(i, i + ctx.rows)
            g = grad[r, None] / ctx.temperature
            d = -torch.exp(F.linear(hidden[r], weight).float() / ctx.temperature - lse[r, None]) * g   # (one-hot - softmax) g
            d.scatter_add_(1, targets[r, None], g)
            d_hidden[r] = d.to(weight.dtype) @ weight
            if d_weight is not None:
                d_weight += d.t() @ hidden[r].float()
        return d_hidden, d_weight if d_weight is None else d_weight.to(weight.dtype), None, None


def token_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """hidden (N, D), weight (V, D), targets (N,) -> fp32 log-probs (N,) of the targets at the sampling temperature."""
    return _TokenLogprobs.apply(hidden, weight, targets, temperature)


def policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, weights: Tensor, clip_low: float = 0.2,
                clip_high: float = 0.2, beta: float = 0.0, ref_logprobs: Tensor | None = None) -> Tensor:
    """The mmGRPO loss of N tokens, all arguments (N,): with rho = pi / pi_old,

        L = - sum_t w_t [ min(rho_t A, clip(rho_t, 1 - clip_low, 1 + clip_high) A) - beta KL_t ]          (Eq. 7)

    KL is the k3 estimator r - log r - 1 with r = pi_ref / pi (http://joschu.net/blog/kl-approx.html), non-negative for
    every token; its value is unbiased for tokens sampled from pi."""
    ratio = torch.exp(logprobs - old_logprobs)
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
    if beta:
        log_r = ref_logprobs - logprobs
        gain = gain - beta * (log_r.exp() - log_r - 1)
    return -(weights * gain).sum()


# -------------------------------------------------------------------------------------------------------- update
def pack(rows: list[Row], batch_tokens: int) -> list[list[Row]]:
    """Micro-batches of rows of like length, at most `batch_tokens` each with padding; rows without tokens are left out."""
    size = lambda row: len(row.completion.prompt_ids) + len(row.completion.token_ids) - 1      # the last is never input
    batches: list[list[Row]] = []
    for row in sorted((r for r in rows if r.completion.token_ids), key=size, reverse=True):
        if not batches or (len(batches[-1]) + 1) * size(batches[-1][0]) > batch_tokens:
            batches.append([])
        batches[-1].append(row)
    return batches


def batch_logprobs(model: Transformer, batch: list[Row], temperature: float, vocabulary: int) -> Tensor:
    """Log-probs (N,) of the sampled tokens of a micro-batch, row after row.

    The ids are the sampler's own, padded on the right. The hidden state that predicts token t of a completion stands at
    position len(prompt) - 1 + t; only those N states reach the vocabulary projection."""
    tensor = lambda x: torch.tensor(x, device=model.head.device)
    sequences = [r.completion.prompt_ids + r.completion.token_ids for r in batch]
    width = max(map(len, sequences)) - 1
    hidden = model(tensor([s[:-1] + [0] * (width + 1 - len(s)) for s in sequences]))                   # (B, T, D)
    row, column, targets = tensor([(b, len(r.completion.prompt_ids) - 1 + t, i) for b, r in enumerate(batch)
                                   for t, i in enumerate(r.completion.token_ids)]).unbind(1)           # (N,) each
    return token_logprobs(hidden[row, column], model.head[:vocabulary], targets, temperature)


def step_gradient(model: Transformer, rows: list[Row], config: Config, vocabulary: int,
                  reference: Transformer | None = None) -> tuple[list[Tensor], dict]:
    """The gradient of the step's loss, one fp32 tensor per parameter, and its figures.

    Rows are taken module by module, to see what each contributes, in micro-batches of at most config.batch_tokens."""
    parameters, sums, norms = list(model.parameters()), Counter(), {}
    total = [torch.zeros_like(p, dtype=torch.float) for p in parameters]
    for module in sorted({r.module for r in rows}):
        gradient = [torch.zeros_like(g) for g in total]
        for batch in pack([r for r in rows if r.module == module], config.batch_tokens):
            old, advantage, weight = torch.tensor([(p, r.advantage, r.weight) for r in batch for p in r.completion.logprobs],
                                                  device=model.head.device).unbind(1)
            logprobs = batch_logprobs(model, batch, config.temperature, vocabulary)
            with torch.no_grad():
                ref = reference and batch_logprobs(reference, batch, config.temperature, vocabulary)
            loss = policy_loss(logprobs, old, advantage, weight, config.clip_low, config.clip_high, config.beta, ref)
            for g, more in zip(gradient, torch.autograd.grad(loss, parameters)):
                g += more
            with torch.no_grad():
                ratio = torch.exp(logprobs - old)
                clipped = (ratio < 1 - config.clip_low) & (advantage < 0) | (ratio > 1 + config.clip_high) & (advantage > 0)
                sums.update(loss=loss.item(), tokens=len(old), clipped=clipped.sum().item(),
                            kl=0 if ref is None else (torch.exp(ref - logprobs) - (ref - logprobs) - 1).sum().item(),
                            forwarded=sum(len(r.completion.prompt_ids) + len(r.completion.token_ids) - 1 for r in batch))
        norms[module] = torch.stack(torch._foreach_norm(gradient)).norm().item()
        torch._foreach_add_(total, gradient)
    share = {m: n / (sum(norms.values()) or 1) for m, n in norms.items()}
    mean = {k: sums[k] / max(sums["tokens"], 1) for k in ("kl", "clipped")}
    return total, {"loss": sums["loss"], **mean, "tokens_forwarded": sums["forwarded"], "grad_share": share}


# ----------------------------------------------------------------------------------------------- the training loop
def batch_of(step: int, size: int, count: int, seed: int) -> list[int]:
    """Which of `count` examples step `step` (from 0) trains on: each once an epoch, in a new order every epoch."""
    order = lambda epoch: random.Random(repr(("order", seed, epoch))).sample(range(count), count)
    first, last = step * size, (step + 1) * size
    return [i for epoch in range(first // count, (last - 1) // count + 1) for i in order(epoch)][first % count:][:size]


def play(model: Transformer, tokenizer: Tokenizer, task: Task, examples: list[dict], config: Config, temperature: float,
         step: int, **options) -> tuple[list[Trajectory], dict]:
    """Run the task's program on the examples under the current weights -> trajectories, and seconds by kind."""
    began = time.perf_counter()
    sampler = Sampler(model, tokenizer, slots=config.slots, max_tokens=config.max_tokens, temperature=temperature,
                      top_k=config.top_k, top_p=config.top_p)
    runs = run_programs(task.program, examples, task.metric, sampler, seed=config.seed, step=step, max_calls=config.max_calls,
                        failure_score=config.failure_score, format_failure_score=config.format_failure_score, **options)
    return runs, {"sampling": sampler.seconds, "tools": time.perf_counter() - began - sampler.seconds}


def evaluate(model: Transformer, tokenizer: Tokenizer, task: Task, examples: list[dict], config: Config,
             temperature: float) -> dict:
    """Mean score of one run per example, its standard error, and how the runs ended; one that did not complete scores
    failure_score. The random numbers are the same at every evaluation."""
    runs, seconds = play(model, tokenizer, task, examples, config, temperature, step=-1)
    scores = np.array([t.reward if t.status == "completed" else config.failure_score for t in runs])
    return {"score": scores.mean(), "stderr": scores.std() / math.sqrt(len(scores)), "statuses": statuses(runs),
            "seconds": sum(seconds.values())}


def train_step(model, tokenizer, optimizer, reference, task: Task, config: Config, step: int) -> dict:
    """One step of mmGRPO: sample, group, compare, weigh, update. Returns what is to be known of it."""
    examples = [task.train[i] for i in batch_of(step, config.examples, len(task.train), config.seed)]
    trajectories, seconds = play(model, tokenizer, task, examples, config, config.temperature, step,
                                 rollouts=config.rollouts, interrupt=config.interrupt)
    if not any(t.votes and t.calls for t in trajectories):
        raise ProgramError(f"step {step + 1}: there is nothing to train: no run gave both LM calls and a reward "
                           f"({', '.join(f'{n} {s}' for s, n in statuses(trajectories).items() if n)}; the first: "
                           f"{trajectories[0].error or 'no LM calls'})")
    began = time.perf_counter()
    groups = group_calls(trajectories, config.short_groups, config.group_size, config.level, config.seed)
    values = advantages(groups, trajectories, config.baseline, config.leave_one_out, config.scale_rewards)
    rows = weigh(groups, values, trajectories, config.normalize, config.max_tokens)
    rows = [r for r in rows if r.advantage or config.beta]          # the gradient of the others is exactly 0
    metrics = {"step": step + 1, **measure(trajectories, groups, values)}
    parameters, = optimizer.param_groups
    parameters["lr"] = config.lr * min(1.0, (step + 1) / max(config.warmup, 1))
    for _ in range(config.inner_epochs):
        gradient, figures = step_gradient(model, rows, config, tokenizer.size, reference)
        for p, g in zip(parameters["params"], gradient):
            p.grad = g
        figures["grad_norm"] = torch.nn.utils.clip_grad_norm_(parameters["params"], config.clip_norm).item()
        optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(list(model.parameters()), parameters["params"])
    for module, share in figures.pop("grad_share").items():
        metrics["modules"][module]["grad_share"] = share
    return metrics | figures | {"lr": parameters["lr"], "seconds": seconds | {"update": time.perf_counter() - began}}


def train(task: Task, model: Transformer, tokenizer: Tokenizer, config: Config, out: Path) -> tuple[float, float]:
    """Train model's weights in place; return the dev score before and after. What it leaves in the folder `out` is
    listed in the README ("What a run leaves")."""
    for name, wrong in (("top_k", config.top_k), ("top_p", config.top_p < 1), ("temperature", config.temperature == 0)):
        if wrong:
            raise InputError(f"--{name.replace('_', '-')} {getattr(config, name)}: is for evaluation; training samples from "
                             "the distribution it trains, at a temperature above 0")
    reference = copy.deepcopy(model) if config.beta else None
    masters = [p.detach().float().requires_grad_() for p in model.parameters()]     # fp32: a small step must not round away
    optimizer = torch.optim.AdamW(masters, weight_decay=config.weight_decay)
    dev, scores, log = task.dev[:config.eval_examples or None], [], (out / "metrics.jsonl").open("a")
    bar = tqdm(range(config.steps), desc=config.task, unit="step", disable=None)

    def record(entry: dict):
        log.write(json.dumps(entry) + "\n")
        log.flush()

    def check(step: int):
        """Score the dev split as trained (sampled) and greedily; keep the weights as `last`, and the best as `best`."""
        sampled, greedy = (evaluate(model, tokenizer, task, dev, config, t) for t in (config.temperature, 0.0))
        record({"step": step, "dev": {"sampled": sampled, "greedy": greedy}})
        for name in ("last", "best") if sampled["score"] > max(scores, default=-math.inf) else ("last",):
            save_pretrained(model, tokenizer, out / name)
        scores.append(sampled["score"])
        bar.write(f"step {step:4d}  dev {scores[-1]:.3f} ± {sampled['stderr']:.3f}  greedy {greedy['score']:.3f}  "
                  + ", ".join(f"{n} {s}" for s, n in sampled["statuses"].items() if n))

    check(0)
    for step in bar:
        record(metrics := train_step(model, tokenizer, optimizer, reference, task, config, step))
        bar.set_postfix(reward=f"{metrics['reward']:.3f}", grad=f"{metrics['grad_norm']:.2f}", refresh=False)
        if (step + 1) % config.eval_every == 0 or step + 1 == config.steps:
            check(step + 1)
    log.close()
    plot([out], out / "curve.png", out.name)
    return scores[0], scores[-1]


if __name__ == "__main__":
    from cli import main            # the command line's own names for what is in this file
    sys.exit(main(sys.argv[1:]))
