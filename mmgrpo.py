"""mmGRPO (arXiv 2508.04660) in one file: sample, group, compare, weigh, update.

An LM program calls one language model through several modules. For each example it is run R times; the k-th calls of
module m over those runs form a group; each call's advantage is its run's reward relative to its group; the weights
follow the clipped policy gradient of the sampled tokens.

    python mmgrpo.py train --task hover            # or: make train
    python mmgrpo.py eval --task hover --model runs/hover/last
    python mmgrpo.py show --task hover             # one run on one example, as a readable trace
    python mmgrpo.py group trajectories.json       # the groups and advantages of trajectories made elsewhere

Map, in the order the data flows: Sampler; group_calls, advantages, weigh; head_gradient, policy_loss; pack, step_gradient;
train. Programs and trajectories are in program.py, the transformer in model.py, the options in config.py, the command line in
cli.py. Left out on purpose: critics, reward models, more than one machine.
Letters: N sampled tokens, which alone bear loss; S sequences that are sampled at once; the others as in model.py."""
from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
import random
import sys
import time
from bisect import bisect_left, insort
from collections import defaultdict, deque
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from checkpoint import load_state, save_state, states, step_of
from config import Config
from lora import WithoutLoRA, add_lora, lora_layers, save_adapter
from model import KVCache, Tokenizer, Transformer, TreeAttention, save_pretrained, trainable
from prompt_files import kept_options
from program import Completion, InputError, ProgramError, Task, Trajectory, run_programs
from report import (StoppedError, Tally, collapsed, expected_of, idle_steps, measure, nothing_to_learn, plot,
                    read_metrics, remarks, show, statuses, step_line, too_many_excluded)

# ------------------------------------------------------------------------------------------------------- sampler
def sample_tokens(logits: Tensor, uniform: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0):
    """logits (S, V), uniform (S,) in [0, 1) -> one token a row and its exact log-prob under the distribution sampled.

    Inverse CDF: the first token whose cumulative probability exceeds uniform x total, so a token of probability 0 is
    never drawn. Temperature 0 takes the most likely token, with log-prob 0. Where logits are not finite, so is the log-prob."""
    if temperature == 0:
        best, token = logits.max(-1)
        return token, best.float() * 0
    logits = logits.float() / temperature
    if top_k or top_p < 1:
        p, order = logits.softmax(-1).sort(-1, descending=True)
        outside = (p.cumsum(-1) - p >= top_p) | (torch.arange(p.shape[1], device=p.device) >= (top_k or p.shape[1]))
        outside[:, 0] = False
        logits = logits.masked_fill(outside.scatter(1, order, outside), -math.inf)
    p = logits.softmax(-1)
    cdf = p.cumsum(-1, dtype=torch.double)
    token = torch.searchsorted(cdf, uniform.double()[:, None] * cdf[:, -1:], right=True).clamp(max=p.shape[1] - 1)
    return token[:, 0], p.gather(1, token)[:, 0].log()


def common(a: list[int], b: list[int]) -> int:
    """How many tokens two sequences begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def capture(step: Callable[[], None]) -> Callable[[], None]:
    """A CUDA graph of the kernels that `step` launches; calling the result launches them again, on the same buffers."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):        # tools run in threads of their own
        step()
    return graph.replay


class Sampler:
    """Continuous batching over the slots of a KV cache: waiting -> live -> done. Live sequences are in slots 0..n-1. Each
    `advance` refills free slots from the waiting prompts, then decodes a token for every live one; the last moves into a finished
    one's slot. Token t of a request is drawn with the t-th number of a Philox stream seeded by its key, whatever its mates.

    A prefix that two prompts share, and that is long enough, is kept in the cache's pool (keys and values, a forest of nodes)
    from the second one on, while the weights stay as they are. The pool's first 512 nodes are the trunk, attended to in place by
    all slots; of a path behind it every slot gets a copy."""
    TRUNK, POOL = (64, 512), (16, 8192)     # of each: how many new tokens a prefix needs to be kept there; where it ends

    def __init__(self, model: Transformer, tokenizer: Tokenizer, *, slots: int = 64, max_tokens: int = 128,
                 temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0):
        self.model, self.tokenizer, self.slots, self.context = model, tokenizer, slots, model.config.max_positions
        self.temperature, self.top_k, self.top_p, self.device = temperature, top_k, top_p, model.head.device
        max_tokens = min(max_tokens, self.context)
        self.max_tokens, self.version = max_tokens, None                    # version: of the weights that the cache is of
        self.waiting: deque[tuple[int, list[int], np.ndarray]] = deque()    # ticket, prompt, uniform numbers
        self.live: list[tuple[int, list[int]]] = []                         # slot -> ticket, prompt
        self.done, self.tickets, self.seconds, self.longest = [], 0, 0.0, 0
        self.cache = KVCache(model.config, slots, self.TRUNK[1], self.device, model.head.dtype)
        new = lambda dtype, *shape: torch.zeros(slots, *shape, dtype=dtype, device=self.device)
        self.tokens, self.logprobs = new(torch.long, max_tokens), new(torch.float, max_tokens)
        self.uniforms, self.count, self.limit = new(torch.double, max_tokens), new(torch.long), new(torch.long)
        self.ends = torch.zeros(tokenizer.size, dtype=torch.bool, device=self.device)
        self.ends[list(tokenizer.end_ids)] = True
        self.prompts: list[list[int]] = []                                  # all prompts of these weights, in lexical order
        self.prefixes: list[tuple[list[int], list[int], int]] = []            # in the pool: tokens, nodes, those in the trunk
        self.trunk_end = self.pool_end = 0                                  # where the next nodes of either go
        self.graphs: dict | None = {} if self.device.type == "cuda" else None

    def submit(self, messages: list[dict], key: tuple) -> int:
        """Take a prompt; a prompt that leaves no room in the context is done at once, with no token."""
        prompt = self.tokenizer.encode_chat(messages)
        limit = min(self.max_tokens, self.context - len(prompt))
        seed = int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=16).digest(), "little")
        self.tickets += 1
        if limit > 0:
            self.waiting.append((self.tickets, prompt, np.random.Generator(np.random.Philox(key=seed)).random(limit)))
            insort(self.prompts, prompt)
        else:
            self.done.append((self.tickets, Completion(prompt, [], [], "length")))
        return self.tickets

    @torch.no_grad()
    def advance(self) -> list[tuple[int, Completion]]:
        """Refill the slots, decode a token; return the requests that are done as (ticket, Completion)."""
        began = time.perf_counter()
        if (version := [p._version for p in self.model.parameters()]) != self.version:      # what is cached is of other weights
            if self.live:
                raise RuntimeError("the weights changed while the sampler had live sequences")
            self.prompts, self.prefixes, self.version = sorted(p for _, p, _ in self.waiting), [], version
            self.trunk_end, self.pool_end = 0, self.TRUNK[1]
        while self.waiting and len(self.live) < self.slots:
            self._admit()
        self._collect()
        if self.live:
            self._decode(len(self.live), self.longest + 1)
            self._collect()
        self.seconds += time.perf_counter() - began
        done, self.done = self.done, []
        return done

    def _share(self, prompt: list[int]) -> tuple[int, list[int], int]:
        """Find, or reserve, a prompt's nodes in the pool -> (n, path, in_trunk): its first n tokens are there already; `path` has
        the nodes of its first len(path) >= n tokens, the caller is to prefill those from n on (a prefix that another prompt
        shares); the first in_trunk of them lie in the trunk. The last token is never among them: its state gives the sample."""
        i, j = bisect_left(self.prompts, prompt), bisect_left(self.prefixes, (prompt,))       # what shares most is a neighbour
        near = self.prompts[max(i - 1, 0):i] + self.prompts[i + 1:i + 2]
        keep = max((common(prompt[:-1], p) for p in near), default=0)
        there = self.prefixes[max(j - 1, 0):j + 1]
        n, path, trunk = max(((common(prompt[:-1], p), *chain) for p, *chain in there), default=(0, [], 0))
        path, trunk, more = path[:n], min(n, trunk), keep - n
        if more >= self.TRUNK[0] and trunk == n and self.trunk_end + more <= self.TRUNK[1]:
            path, trunk, self.trunk_end = path + [*range(self.trunk_end, self.trunk_end + more)], keep, self.trunk_end + more
        elif more >= self.POOL[0] and self.pool_end + more <= self.POOL[1]:
            path, self.pool_end = path + [*range(self.pool_end, self.pool_end + more)], self.pool_end + more
        if len(path) > n:
            insort(self.prefixes, (prompt[:keep], path, trunk))
        return n, path, trunk

    def _admit(self):
        """Prefill waiting prompts, every distinct prefix once, and sample the first token of each."""
        chains, ids, taken, places, last, budget, longest = [], [], [], [], [], 8192, 0     # tokens a pass, to bound its memory
        while self.waiting and len(self.live) < self.slots and budget > 0:
            longest = max(longest, len(self.waiting[0][1]))
            if taken and (len(taken) + 1) * longest > 8 * 8192:     # a long prompt among short ones: all are padded to its blocks
                break
            ticket, prompt, uniforms = self.waiting.popleft()
            slot = len(self.live)
            self.uniforms[slot, :len(uniforms)] = torch.from_numpy(uniforms)
            self.count[slot], self.limit[slot] = 0, len(uniforms)
            self.live.append((ticket, prompt))
            n, path, trunk = self._share(prompt)
            if len(path) > n:
                chains.append((n, path))
                ids += prompt[n:len(path)]
            taken.append((slot, prompt, path, trunk))
            budget -= len(prompt) - n
        at = self.pool_end                                      # what no other prompt has goes behind the pool, only to be copied
        for _, prompt, path, trunk in taken:
            whole = path + [*range(at, at + len(prompt) - len(path))]
            at += len(prompt) - len(path)
            chains.append((len(path), whole))
            places.append((trunk, whole))
            ids += prompt[len(path):]
            last.append(len(ids) - 1)
        if self.cache.grow(max(len(path) - trunk for trunk, path in places) + self.max_tokens, at) and self.graphs:
            self.graphs.clear()                             # they are of the old buffers
        tensor, slots = lambda x: torch.tensor(x, device=self.device), [slot for slot, *_ in taken]
        positions = [i for n, path in chains for i in range(n, len(path))]
        hidden = self.model(tensor([ids]), tensor([positions]), TreeAttention(chains, self.device, self.cache.pool))
        self.cache.place(slots, places)
        self._sample(hidden[0, last], tensor(slots))

    def _decode(self, n: int, longest: int):
        """One token for each of the first n slots. On CUDA in shapes that recur, each captured as a graph the second time."""
        if self.graphs is None:
            return self._step(n, longest, self.trunk_end)
        key = min(1 << (n - 1).bit_length(), self.slots), min(-(-longest // 64) * 64, self.cache.kv.shape[4]), self.TRUNK[1]
        if key in self.graphs:
            self.graphs[key] = self.graphs[key] or capture(lambda: self._step(*key))
            return self.graphs[key]()
        self.graphs[key] = None
        self._step(*key)

    def _step(self, n: int, longest: int, trunk: int):
        slots, cache = torch.arange(n, device=self.device), self.cache
        last = self.tokens[slots, self.count[:n] - 1]
        positions = cache.shared[:n] + cache.lengths[:n]
        hidden = self.model(last[:, None], positions[:, None], cache.decode(n, longest, trunk))
        cache.lengths[:n] += self.limit[:n].clamp(max=1)        # free slots in a graph's shape stay as they are
        self._sample(hidden[:, 0], slots)

    def _sample(self, hidden: Tensor, slots: Tensor):
        """Draw one token for each of `slots` from hidden (n, D); ids that the tokenizer lacks cannot be drawn."""
        at = self.count[slots]
        logits = F.linear(hidden, self.model.head[:self.tokenizer.size])
        self.tokens[slots, at], self.logprobs[slots, at] = sample_tokens(
            logits, self.uniforms[slots, at], self.temperature, self.top_k, self.top_p)
        self.count[slots] = torch.minimum(at + 1, self.limit[slots])

    def _collect(self):
        """Take finished sequences out; the last live one moves into each gap."""
        n = len(self.live)
        ended = self.ends[self.tokens[torch.arange(n, device=self.device), self.count[:n] - 1]]
        over = ended | (self.count[:n] >= self.limit[:n])
        ended, over, counts, lengths = torch.stack((ended, over, self.count[:n], self.cache.lengths[:n])).tolist()
        for i in reversed([i for i in range(n) if over[i]]):       # from behind: the last live one is then never finished
            (ticket, prompt), count, stop = self.live[i], counts[i], bool(ended[i])
            ids, logprobs = self.tokens[i, :count].tolist(), self.logprobs[i, :count].tolist()
            if not math.isfinite(sum(logprobs)):
                raise FloatingPointError("the LM's logits are not finite: broken weights, a diverged run (--lr) or a tiny --temperature")
            text = self.tokenizer.decode(ids[:count - stop])
            self.done.append((ticket, Completion(prompt, ids, logprobs, "stop" if stop else "length", text)))
            last = self.live.pop()
            lengths[i] = 0
            if i < len(self.live):
                self.live[i] = last
                self.cache.move(len(self.live), i)
                for state in (self.tokens, self.logprobs, self.uniforms, self.count, self.limit):
                    state[i] = state[len(self.live)]
            for state in (self.limit, self.count, self.cache.lengths):
                state[len(self.live)] = 0
        self.longest = max(lengths, default=0)


# ------------------------------------------------------------------------------- groups and advantages (Eq. 1, 2)
@dataclass(frozen=True)
class Member:
    """One run in a group. Example: Member(trajectory=5, calls=(2,), reward=0.5)"""
    trajectory: int                 # its place among the trajectories
    calls: tuple[int, ...]          # which of its calls: one, or with level="trajectory" all
    reward: float


@dataclass(frozen=True)
class Group:
    """The k-th calls of a module over the runs of one example. Example: Group(3, "append_notes", 1, (Member(…), …))"""
    example: int | str
    module: str                     # "" with level="trajectory"
    invocation: int
    members: tuple[Member, ...]


def group_calls(trajectories: list[Trajectory], short_groups: str = "keep", group_size: int = 0, level: str = "call",
                seed: int | tuple = 0) -> list[Group]:
    """Group the calls of voting trajectories by (example, module, invocation), the paper's relative invocation.

    Runs may be ragged. `keep`: the members are the runs that reached the call. `truncate`: only calls that every voting run
    of the example reached. `fill`: a run with at least one call of the module is padded to the longest by drawing among
    its own (App. A, PadGroups). `group_size` k keeps k members evenly spaced in the order of reward (App. A,
    SelectKDiverseElements). level="trajectory" makes one group an example, of whole runs."""
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


def _diverse(members: list[Member], k: int) -> list[Member]:        # k = 1 keeps the worst: nothing to compare with
    if not 0 < k < len(members):
        return members
    ranked = sorted(members, key=lambda m: m.reward)        # stable: ties stay in the order of rollouts
    return [ranked[round(j * (len(members) - 1) / max(k - 1, 1))] for j in range(k)]


def advantages(groups: list[Group], trajectories: list[Trajectory], baseline: str = "group", leave_one_out: bool = False,
               scale_rewards: str = "std") -> list[list[float]]:
    """A = (r - baseline) / (std + 1e-4) for each member of each group (Eq. 2).

    The baseline is the mean reward of the group, or of all voting runs of its example; `leave_one_out` takes the member's
    own out of it. The standard deviation (ddof 1) is that of the same rewards, the member's included. Where these are
    equal, or there is but one, every advantage is exactly 0."""
    result = []
    for g in groups:
        pool = rewards = np.array([m.reward for m in g.members])
        if baseline == "example":
            pool = np.array([t.reward for t in trajectories if t.votes and t.example == g.example])
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
    where: str = ""                 # which call of which run


def weigh(groups: list[Group], advantages: list[list[float]], trajectories: list[Trajectory],
          normalize: str = "sequence", constant: int = 1) -> list[Row]:
    """Groups -> rows of the loss. The weights belong to the whole optimizer step, so no micro-batch split changes them.

    `sequence` (Eq. 7): the mean over groups, over members, over the member's tokens; with level="trajectory" the
    tokens are those of the whole run (Eq. 9). `token` (DAPO, arXiv 2503.14476): the mean over all tokens of the step.
    `constant` (Dr. GRPO, arXiv 2503.20783): the sum over all tokens, divided by voting runs x `constant`."""
    tokens = lambda m: sum(len(trajectories[m.trajectory].calls[c].completion.token_ids) for c in m.calls)
    total = sum(tokens(m) for g in groups for m in g.members)
    runs = sum(t.votes for t in trajectories)
    rows = []
    for g, of_group in zip(groups, advantages):
        for m, a in zip(g.members, of_group):
            weight = {"sequence": 1 / (len(groups) * len(g.members) * max(tokens(m), 1)),
                      "token": 1 / max(total, 1), "constant": 1 / (runs * constant)}[normalize]
            t = trajectories[m.trajectory]
            for call in (t.calls[c] for c in m.calls):
                where = f"example {t.example}, rollout {t.rollout}, {call.module}[{call.invocation}]"
                rows.append(Row(call.module, call.completion, a, weight, where))
    return rows


def _log_softmax(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float):
    """In chunks of 256 rows: their place, all their log-probs (rows, V) and their targets (rows, 1). Nothing of N x V is held."""
    for i in range(0, len(hidden), 256):
        logits = F.linear(hidden[i:i + 256], weight).float().div_(temperature)
        yield slice(i, i + 256), logits.sub_(logits.logsumexp(-1, keepdim=True)), targets[i:i + 256, None]


@torch.no_grad()
def token_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """hidden (N, D), weight (V, D), targets (N,) -> fp32 log-probs (N,) of the targets at the sampling temperature."""
    return torch.cat([logp.gather(1, y)[:, 0] for _, logp, y in _log_softmax(hidden, weight, targets, temperature)])


@torch.no_grad()
def head_gradient(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, loss: Callable[[Tensor, slice], Tensor],
                  d_weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """hidden (N, D), weight (V, D), targets (N,) -> their log-probs (N,) and d loss / d hidden (N, D); d loss / d weight is added to
    d_weight, fp32 (V, D), if given. `loss(log-probs of a chunk, its slice)` must be a sum over tokens: then a chunk's gradient is
    known as soon as its logits are, which are never kept, nor computed a second time."""
    logprobs, d_hidden = [], torch.empty_like(hidden)
    for rows, logp, y in _log_softmax(hidden, weight, targets, temperature):
        logprobs.append(logp.gather(1, y)[:, 0])
        with torch.enable_grad():
            g, = torch.autograd.grad(loss(logprobs[-1].requires_grad_(), rows), logprobs[-1])
        g = g[:, None] / temperature
        d_logits = logp.exp_().mul_(-g).scatter_add_(1, y, g)           # (rows, V): (one-hot - softmax) dloss/dlogp / temperature
        d_hidden[rows] = d_logits.to(weight.dtype) @ weight
        if d_weight is not None:
            d_weight.addmm_(d_logits.t(), hidden[rows].float())
    return torch.cat(logprobs).detach(), d_hidden


def policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, weights: Tensor, clip_low: float = 0.2,
                clip_high: float = 0.2, beta: float = 0.0, ref_logprobs: Tensor | None = None) -> Tensor:
    """The mmGRPO loss of N tokens, all arguments (N,): with rho = pi / pi_old,

        L = - sum_t w_t [ min(rho_t A, clip(rho_t, 1 - clip_low, 1 + clip_high) A) - beta KL_t ]          (Eq. 7)
    KL is the k3 estimator r - log r - 1 with r = pi_ref / pi (http://joschu.net/blog/kl-approx.html): never negative; over
    tokens sampled from pi its mean is KL(pi || pi_ref), but its gradient's mean is that of KL(pi_ref || pi)."""
    ratio = torch.exp(logprobs - old_logprobs)      # 1 on fresh rollouts (but for dropout), its gradient that of log pi
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
    if beta:
        log_r = ref_logprobs - logprobs
        gain = gain - beta * (log_r.exp() - log_r - 1)
    return -(weights * gain).sum()


# -------------------------------------------------------------------------------------------------------- update
@dataclass
class Tree:
    """Rows as one sequence of T nodes in which every distinct prefix stands once; a node sees its ancestors and itself. Calls
    of one module begin alike, and often have the same prompt: the transformer passes over it once, forward and backward."""
    ids: list[int] = field(default_factory=list)            # [T]
    positions: list[int] = field(default_factory=list)      # [T] depth in the tree
    paths: list[tuple[int, list[int]]] = field(default_factory=list)        # of each row (known, nodes): rows before made so many
    rows: list[Row] = field(default_factory=list)
    at: list[int] = field(default_factory=list)             # [N] the nodes whose states predict the rows' sampled tokens


def pack(rows: list[Row], batch_tokens: int) -> list[Tree]:
    """Micro-batches: trees of at most `batch_tokens` nodes, unless one row alone is longer; rows without tokens are left out."""
    trees, last, path = [], [], []
    for ids, row in sorted(((r.completion.prompt_ids + r.completion.token_ids[:-1], r) for r in rows if r.completion.token_ids),
                           key=lambda pair: pair[0]):       # in lexical order, rows that share a prefix are neighbours
        shared = common(ids, last)
        if not trees or len(trees[-1].ids) + len(ids) - shared > batch_tokens:
            trees.append(Tree())
            shared = 0
        tree, last = trees[-1], ids
        path = path[:shared] + list(range(len(tree.ids), len(tree.ids) + len(ids) - shared))
        tree.ids += ids[shared:]
        tree.positions += range(shared, len(ids))
        tree.paths.append((shared, path))
        tree.rows.append(row)
        tree.at += path[len(row.completion.prompt_ids) - 1:]
    return trees


def predicting_states(model: Transformer, tree: Tree) -> tuple[Tensor, Tensor]:
    """A micro-batch's sampled tokens (N,), row after row, and the states (N, D) that predict them: token t of a completion is
    predicted at position len(prompt) - 1 + t of its row. Only these states reach the vocabulary projection."""
    tensor = lambda x: torch.tensor(x, device=model.head.device)
    hidden = model(tensor([tree.ids]), tensor([tree.positions]), TreeAttention(tree.paths, model.head.device))[0]       # (T, D)
    return tensor([i for r in tree.rows for i in r.completion.token_ids]), hidden[tensor(tree.at)]


@torch.no_grad()
def batch_logprobs(model: Transformer, tree: Tree, temperature: float, vocabulary: int) -> Tensor:
    """Log-probs (N,) of a micro-batch's sampled tokens."""
    targets, hidden = predicting_states(model, tree)
    return token_logprobs(hidden, model.head[:vocabulary], targets, temperature)


def step_gradient(model: Transformer, rows: list[Row], config: Config, vocabulary: int,
                  reference: Transformer | None = None, fresh: bool = True) -> tuple[list[Tensor], dict]:
    """The gradient of the step's loss, one fp32 tensor per parameter, and its figures (report.Tally), module by module to see
    what each contributes. `fresh`: the weights are still those that sampled; ParityError where the log-probs disagree."""
    parameters, tally = trainable(model), Tally(config, model.head.dtype, fresh)
    total, device = [torch.zeros_like(p, dtype=torch.float) for p in parameters], model.head.device
    head = next((i for i, p in enumerate(parameters) if p is model.head), None)         # None: it is frozen
    for module in sorted({r.module for r in rows}):
        gradient = [torch.zeros_like(g) for g in total]
        trees = pack([r for r in rows if r.module == module], config.batch_tokens)
        while trees:
            tree = trees.pop()
            tokens = [(p, r.advantage, r.weight) for r in tree.rows for p in r.completion.logprobs]
            old, advantage, weight = torch.tensor(tokens, device=device).unbind(1)                          # (N,) each
            d_head = None if head is None else torch.zeros_like(total[head][:vocabulary])
            try:
                ref = batch_logprobs(reference, tree, config.temperature, vocabulary) if reference else None
                loss = lambda logprobs, r: policy_loss(logprobs, old[r], advantage[r], weight[r], config.clip_low, config.clip_high,
                                                       config.beta, None if ref is None else ref[r])
                targets, hidden = predicting_states(model, tree)
                logprobs, d_hidden = head_gradient(hidden.detach(), model.head[:vocabulary], targets, config.temperature, loss, d_head)
                more = torch.autograd.grad(hidden, parameters, d_hidden, allow_unused=True)
            except RuntimeError as e:                       # out of memory, for which torch has no one class on all devices
                if "memory" not in str(e) or len(tree.rows) == 1:
                    raise
                trees += pack(tree.rows, len(tree.ids) // 2)
                tally.sums["halved"] += 1
                hidden = d_hidden = None                    # frees the failed graph
                continue
            tally.batch(tree, loss(logprobs, slice(None)).item(), logprobs, old, advantage, ref)
            if fresh and not (config.lora_dropout and tally.apart[1:]):
                if config.lora_dropout:                     # was not there when sampling: one micro-batch is scored without it
                    logprobs = batch_logprobs(model, tree, config.temperature, vocabulary)
                tally.compare(tree, logprobs, old)
            for g, m in zip(gradient, more):
                if m is not None:                           # an untied head is no part of the states' graph
                    g += m
            if d_head is not None:
                gradient[head][:vocabulary] += d_head
        tally.norms[module] = torch.stack(torch._foreach_norm(gradient)).norm().item()
        torch._foreach_add_(total, gradient)
    return total, tally.figures()


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


def evaluate(model, tokenizer, task: Task, examples: list[dict], config: Config, temperature: float, step: int = -1) -> dict:
    """Mean score of one run per example, its standard error, and how the runs ended; one that did not complete scores
    failure_score. The random numbers are the same at every evaluation of a `step`."""
    config = dataclasses.replace(config, seed=config.dev_seed if config.dev_seed >= 0 else config.seed)
    runs, seconds = play(model, tokenizer, task, examples, config, temperature, step)
    scores = np.array([t.reward if t.status == "completed" else config.failure_score for t in runs])
    names = sorted({name for t in runs for name in t.measures})
    return {"score": scores.mean(), "stderr": scores.std(ddof=len(scores) > 1) / math.sqrt(len(scores)), "statuses": statuses(runs),
            "measures": {name: np.mean([t.measures[name] for t in runs if name in t.measures]) for name in names},
            "rollouts": len(runs), "tokens": sum(len(c.completion.token_ids) for t in runs for c in t.calls),
            "seconds": sum(seconds.values())}


def prepare(model: Transformer, config: Config) -> tuple[torch.optim.Optimizer, Transformer | None]:
    """Put LoRA on where the options ask for it -> the optimizer, of fp32 masters (a small step must not be rounded away), and the
    frozen start where the loss has a KL."""
    if config.lora_rank:
        add_lora(model, config.lora_rank, config.lora_alpha, config.lora_dropout, tuple(config.lora_targets.split(",")), config.seed)
    masters = [p.detach().float().clone().requires_grad_() for p in trainable(model)]
    start = None if not config.beta else WithoutLoRA(model) if config.lora_rank else copy.deepcopy(model)
    return torch.optim.AdamW(masters, weight_decay=config.weight_decay), start


def sample_step(model, tokenizer, task: Task, config: Config, step: int) -> tuple[list[Trajectory], dict]:
    """The rollouts of a step, as `play` gives them: a function of the weights, the task, the options and the step."""
    examples = [task.train[i] for i in batch_of(step, config.examples, len(task.train), config.seed)]
    return play(model, tokenizer, task, examples, config, config.temperature, step, rollouts=config.rollouts, interrupt=config.interrupt)


def train_step(model, tokenizer, optimizer, reference, task: Task, config: Config, step: int,
               watch: Callable[[list[Trajectory]], None] = lambda trajectories: None) -> dict:
    """One step of mmGRPO: sample, group, compare, weigh, update. Returns what is to be known of it.

    `watch` sees the rollouts. Raises StoppedError, with nothing changed, where most are excluded."""
    trajectories, seconds = sample_step(model, tokenizer, task, config, step)
    watch(trajectories)
    if unfit := too_many_excluded(trajectories):
        raise StoppedError(f"step {step + 1}: {unfit}")
    if not any(t.votes and t.calls for t in trajectories):
        raise ProgramError(f"step {step + 1}: there is nothing to train: no run gave both LM calls and a reward "
                           f"({', '.join(f'{n} {s}' for s, n in statuses(trajectories).items() if n)}; the first: "
                           f"{trajectories[0].error or 'no LM calls'})")
    began = time.perf_counter()
    torch.manual_seed((config.seed * 1_000_003 + step) % 2**63)         # for LoRA's dropout; all else has seeds of its own
    groups = group_calls(trajectories, config.short_groups, config.group_size, config.level, (config.seed, step))
    values = advantages(groups, trajectories, config.baseline, config.leave_one_out, config.scale_rewards)
    rows = weigh(groups, values, trajectories, config.normalize, config.max_tokens)
    rows = [r for r in rows if r.advantage or config.beta]      # the others' gradient is exactly 0 (AdamW's momentum goes on)
    metrics = {"step": step + 1, **measure(trajectories, groups, values)}
    if not metrics["calls"]["trained"]:
        metrics["idle"] = nothing_to_learn(trajectories, config)
    parameters, = optimizer.param_groups
    parameters["lr"] = config.lr * min(1.0, (step + 1) / max(config.warmup, 1))
    for epoch in range(config.inner_epochs):
        gradient, figures = step_gradient(model, rows, config, tokenizer.size, reference, fresh=epoch == 0)
        metrics |= figures
        for p, g in zip(parameters["params"], gradient):
            p.grad = g
        metrics["grad_norm"] = torch.nn.utils.clip_grad_norm_(parameters["params"], config.clip_norm).item()
        if not math.isfinite(metrics["grad_norm"]):
            metrics["skipped"] = True
            break
        optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(trainable(model), parameters["params"])
    for module, share in metrics.pop("grad_share").items():
        metrics["modules"][module]["grad_share"] = share
    return metrics | {"lr": parameters["lr"], "seconds": seconds | {"update": time.perf_counter() - began}}


def check_sampling(config: Config) -> None:
    """Raises InputError where the distribution sampled would not be the one trained."""
    for name, wrong in (("top_k", config.top_k), ("top_p", config.top_p < 1), ("temperature", config.temperature == 0)):
        if wrong:
            raise InputError(f"--{name.replace('_', '-')} {getattr(config, name)}: for evaluation only; what is sampled is trained")


def train(task: Task, model: Transformer, tokenizer: Tokenizer, config: Config, out: Path,
          stop: Callable[[], bool] = lambda: False) -> list[float]:
    """Train model's weights in place; return the dev scores, the first before any step. What it leaves in the folder `out`
    is in the README ("What a run leaves"). A run that was interrupted there goes on; it ends early once stop() is true.

    Raises StoppedError where it would get nowhere, and ProgramError for a bug in the program or the
    metric, both with the state saved before the step that failed."""
    check_sampling(config)
    if lora_layers(model):
        raise InputError(f"--model {config.model}: is a LoRA adapter; merge it first (`merge ADAPTER OUT`), then train what came of it")
    save = partial(save_adapter, base=config.model) if config.lora_rank else save_pretrained
    optimizer, reference = prepare(model, config)               # before load_state: the reference is the start, always
    options, dev = kept_options(config, task.program), task.dev[:config.eval_examples or None]
    out.mkdir(parents=True, exist_ok=True)
    start, scores = load_state(out, model, optimizer, options)
    history = read_metrics(out)[0] if scores else []            # the lines of all steps so far
    log = (out / "metrics.jsonl").open("a" if scores else "w")
    bar = tqdm(range(start, config.steps), desc=config.task, unit="step", disable=None, initial=start, total=config.steps)

    def check(step: int):
        """Score the dev split as trained (sampled) and greedily; keep the weights as `last`, the best as `best`, the state."""
        sampled, greedy = (evaluate(model, tokenizer, task, dev, config, t) for t in (config.temperature, 0.0))
        print(json.dumps({"step": step, "dev": {"sampled": sampled, "greedy": greedy}}), file=log, flush=True)
        for name in ("last", "best") if sampled["score"] > max(scores, default=-math.inf) else ("last",):
            save(model, tokenizer, out / name)
        scores.append(sampled["score"])
        save_state(out, step, optimizer, scores, options)
        bar.write(f"step {step:4d}  dev {scores[-1]:.3f} ± {sampled['stderr']:.3f}  greedy {greedy['score']:.3f}  "
                  + ", ".join(f"{n} {s}" for s, n in sampled["statuses"].items() if n))

    def show_one(trajectories: list[Trajectory]):
        """Print, now and then, the first run of the step's first example."""
        if config.show_every and step % config.show_every == 0:
            first = batch_of(step, config.examples, len(task.train), config.seed)[0]
            expected = expected_of(task.program, task.train[first])
            trace = show(trajectories[0], expected=expected, longest=300)
            bar.write(f"step {step + 1:4d}, the first of its runs:\n{trace}")

    def keep(step: int):
        """Save the state for a training that is about to stop, unless it just was."""
        if step_of(states(out)[-1]) < step:
            save_state(out, step, optimizer, scores, options)

    if not scores:
        check(0)
    for step in bar:
        try:
            metrics = train_step(model, tokenizer, optimizer, reference, task, config, step, show_one)
        except (StoppedError, ProgramError):
            keep(step)                                  # the weights are as they were before it
            raise
        history.append(metrics)
        if sentence := collapsed(history):
            metrics["collapse"] = sentence
        print(json.dumps(metrics), file=log, flush=True)
        bar.set_postfix(reward=f"{metrics['reward']:.3f}", entropy=f"{metrics['surprise']:.3f}",
                        refresh=False)
        if bar.disable:                                 # there is no terminal to draw it on
            print(step_line(metrics), file=sys.stderr, flush=True)
        for remark in remarks(history):
            bar.write(remark, file=sys.stderr)
        ending = stop()
        if (step + 1) % config.eval_every == 0 or step + 1 == config.steps:
            check(step + 1)
        elif ending:
            save_state(out, step + 1, optimizer, scores, options)
        if ending:
            break
        idle = idle_steps(history)
        if 0 < config.patience <= idle and step + 1 < config.steps:
            keep(step + 1)
            raise StoppedError(f"{idle} steps in a row taught nothing (--patience {config.patience}): "
                               f"{metrics['idle']}")
    log.close()
    plot(out)
    return scores


if __name__ == "__main__":
    from cli import main            # which imports this file again, as the module `mmgrpo`
    sys.exit(main(sys.argv[1:]))
