"""mmGRPO (arXiv 2508.04660) in one file: sample, group, compare, weigh, update.

An LM program calls one language model through several modules. For each example it is run R times; the k-th calls of
module m over those runs form a group; each call's advantage is its run's reward relative to its group; the weights
follow the clipped policy gradient of the sampled tokens.

    python mmgrpo.py train --task hover            # or: make train
    python mmgrpo.py eval --task hover --model runs/hover/last
    python mmgrpo.py show --task hover             # one run on one example, as a readable trace
    python mmgrpo.py group trajectories.json       # the groups and advantages of trajectories made elsewhere

Map, in the order the data flows: Sampler; group_calls, advantages, weigh; head_gradient, policy_loss; pack, step_gradient;
train. Programs and trajectories are in program.py, the transformer in model.py; options, command line and files of a run in
run/. Left out on purpose: critics, reward models, more than one machine.
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

from lm.lora import WithoutLoRA, add_lora, lora_layers, save_adapter
from model import (
    KVCache,
    Tokenizer,
    Transformer,
    TreeAttention,
    activation_bytes,
    fp32_head,
    fp32_logits,
    memory_of,
    nodes_for,
    round_up,
    save_pretrained,
    slots_for,
    trainable,
)
from program import Completion, InputError, ProgramError, Task, Trajectory, run_programs
from prompts.files import kept_options
from run.compare import plot
from run.config import Config
from run.figures import Tally, measure
from run.health import (
    StoppedError,
    collapsed,
    idle_steps,
    nothing_to_learn,
    remarks,
    too_many_excluded,
)
from run.records import first_evaluation, read_metrics
from run.state import load_state, save_state, states, step_of
from run.terminal import expected_of, show, statuses, step_line


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

    # first a block of 128 tokens by the blocks' sums, then a token within it: one pass over the vocabulary, in fp32
    p = logits.softmax(-1)
    blocks = F.pad(p, (0, -p.shape[1] % 128)).unflatten(1, (-1, 128))                  # (S, V / 128, 128)
    sums = blocks.sum(-1)
    block, rest = first_above(sums, uniform.double() * sums.sum(-1, dtype=torch.double))
    inside, _ = first_above(blocks[torch.arange(len(block), device=p.device), block], rest)
    token = (block * 128 + inside).clamp(max=p.shape[1] - 1)
    return token, p.gather(1, token[:, None])[:, 0].log()


def first_above(x: Tensor, bound: Tensor) -> tuple[Tensor, Tensor]:
    """x (S, n) >= 0, bound (S,) -> the first place in each row where the sum up to it exceeds `bound`, which is never one of
    value 0, and how much of `bound` the places before it leave. A bound that is no less than the total counts as just below it."""
    sums = x.cumsum(-1, dtype=torch.double)
    bound = torch.minimum(bound, sums[:, -1].nextafter(sums.new_zeros(())))
    place = torch.searchsorted(sums, bound[:, None], right=True).clamp(max=x.shape[1] - 1)
    before = (sums.gather(1, place) - x.gather(1, place))[:, 0]
    return place[:, 0], (bound - before).clamp(min=0)      # rounding makes it negative, and place 0 would be drawn


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
    """Continuous batching over the slots of a KV cache: waiting -> live -> done.

    Live sequences are in slots 0..n-1. Each `advance` refills free slots from the waiting prompts and decodes a token for every
    live one; the last moves into a finished one's slot. Token t of a request is drawn with the t-th number of a Philox stream
    seeded by its key, whatever its mates.

    A prefix that two prompts share is kept in the cache's pool (keys and values, a forest of nodes) from the second one on, while
    the weights stay as they are. Long prefixes are attended to there by all sequences that have them, of short ones every slot
    gets a copy."""
    SHARE = 16          # new tokens from which a prefix is kept in the pool
    PREFILL = 8192      # new tokens in one pass of the model, to bound its memory

    def __init__(self, model: Transformer, tokenizer: Tokenizer, *, slots: int = 0, max_tokens: int = 128,
                 temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0):
        self.model, self.tokenizer, self.context = model, tokenizer, model.config.max_positions
        self.temperature, self.top_k, self.top_p, self.device = temperature, top_k, top_p, model.head.device
        self.max_tokens = min(max_tokens, self.context)
        self.slots = slots or slots_for(model.config, model.head)
        self.pool_limit = nodes_for(model.config, model.head)
        self.seconds = 0.0

        # requests
        self.waiting: deque[tuple[int, list[int], np.ndarray]] = deque()    # ticket, prompt, uniform numbers
        self.live: list[tuple[int, list[int]]] = []                         # slot -> ticket, prompt
        self.done: list[tuple[int, Completion]] = []
        self.tickets = 0

        # memory: what is cached is of the weights of `version`
        self.version = None
        self.cache = KVCache(model.config, self.slots, self.device, model.head.dtype)
        self.prompts: list[list[int]] = []                                  # all prompts of these weights, in lexical order
        self.prefixes: list[tuple[list[int], list[int]]] = []               # in the pool: tokens, nodes; in lexical order
        self.pool_end = 0                                                   # where the next nodes go
        self.longest = 0                                                    # own tokens of a live sequence, at the most
        self.shared: list | None = None                                     # ranges in place; None: live sequences changed

        # the state of each slot, on the device
        new = lambda dtype, *shape: torch.zeros(self.slots, *shape, dtype=dtype, device=self.device)
        self.tokens, self.logprobs = new(torch.long, self.max_tokens), new(torch.float, self.max_tokens)
        self.uniforms, self.count, self.limit = new(torch.double, self.max_tokens), new(torch.long), new(torch.long)
        self.running = new(torch.bool)                                      # it has not ended
        self.ends = torch.zeros(tokenizer.size, dtype=torch.bool, device=self.device)
        self.ends[list(tokenizer.end_ids)] = True
        self.graphs: dict | None = {} if self.device.type == "cuda" else None
        self.sees = torch.zeros(0, self.slots, dtype=torch.bool, device=self.device)       # of graphs: range x slot

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
        self._renew()
        while self.waiting and len(self.live) < self.slots:
            self._admit()
        if self.live:
            self._decode(len(self.live), self.longest + 1)
            self._collect()
        self.seconds += time.perf_counter() - began
        done, self.done = self.done, []
        return done

    def _renew(self):
        """Forget what is cached where the weights have changed."""
        version = [p._version for p in self.model.parameters()]
        if version == self.version:
            return
        if self.live:
            raise RuntimeError("the weights changed while the sampler had live sequences")
        self.version = version
        self.prompts, self.prefixes, self.pool_end = sorted(p for _, p, _ in self.waiting), [], 0
        self.head = fp32_head(self.model.head[:self.tokenizer.size])        # ids that the tokenizer lacks cannot be drawn

    def _share(self, prompt: list[int]) -> tuple[int, list[int], int]:
        """Find, or reserve, a prompt's nodes in the pool -> (n, path): its first n tokens are there already; `path` has the nodes
        of its first len(path) >= n tokens, the caller is to prefill those from n on (a prefix that another prompt shares). The
        last token is never among them: its state gives the sample."""
        i, j = bisect_left(self.prompts, prompt), bisect_left(self.prefixes, (prompt,))       # what shares most is a neighbour
        near = self.prompts[max(i - 1, 0):i] + self.prompts[i + 1:i + 2]
        keep = max((common(prompt[:-1], p) for p in near), default=0)
        there = self.prefixes[max(j - 1, 0):j + 1]
        n, path = max(((common(prompt[:-1], tokens), nodes) for tokens, nodes in there), default=(0, []))
        path = path[:n]
        more = keep - n
        if more >= self.SHARE and self.pool_end + more <= self.pool_limit:
            path = path + list(range(self.pool_end, self.pool_end + more))
            self.pool_end += more
            insort(self.prefixes, (prompt[:keep], path))
        return n, path

    def _admit(self):
        """Prefill waiting prompts, every distinct prefix once, and sample the first token of each."""
        taken, budget, known_end = [], self.PREFILL, self.pool_end          # taken: nodes, prompt, slot
        while self.waiting and len(self.live) < self.slots and budget > 0:
            ticket, prompt, uniforms = self.waiting.popleft()
            slot = len(self.live)
            self.live.append((ticket, prompt))
            self.uniforms[slot, :len(uniforms)] = torch.from_numpy(uniforms)
            self.count[slot], self.limit[slot], self.running[slot] = 0, len(uniforms), True
            there, path = self._share(prompt)
            taken.append((path, prompt, slot))
            budget -= len(prompt) - there

        # what no other prompt has goes behind the pool, only to be copied from there
        end = self.pool_end
        for i, (path, prompt, slot) in enumerate(taken):
            own = len(prompt) - len(path)
            taken[i] = (path + list(range(end, end + own)), prompt, slot)
            end += own
        taken.sort(key=lambda row: row[0])                  # paths that begin alike become neighbours

        # of the paths that have a new node in common the first prefills it
        paths, ids, positions, last, made = [], [], [], [], set()
        for path, prompt, _ in taken:
            known = next(i for i, node in enumerate(path) if node >= known_end and node not in made)
            made.update(path[known:])
            paths.append((known, path))
            ids += prompt[known:]
            positions += range(known, len(prompt))
            last.append(len(ids) - 1)

        tensor = lambda x: torch.tensor(x, device=self.device)
        slots = [slot for _, _, slot in taken]
        self.cache.reserve(end)
        hidden = self.model(tensor([ids]), tensor([positions]), TreeAttention(paths, self.device, self.cache.pool))
        own = self.cache.place(slots, [path for path, _, _ in taken], self.pool_end, self.max_tokens)
        if self.cache.replaced and self.graphs is not None:
            self.graphs.clear()                             # they are of the old buffers
        self.cache.replaced = False
        self.longest = max(self.longest, own)
        self.shared = None
        self._sample(hidden[0, last], tensor(slots))

    def _decode(self, n: int, longest: int):
        """One token for each of the first n slots. On CUDA in shapes that recur, each captured as a graph the second time."""
        if self.shared is None:
            self._find_shared(n)
        if self.graphs is None:
            self._step(n, longest)
            return
        rows = min(1 << (n - 1).bit_length(), self.slots)
        own = min(round_up(longest, 64), self.cache.kv.shape[4])
        key = rows, own, tuple((nodes.start, nodes.stop) for nodes, _ in self.shared)
        if key not in self.graphs:
            self.graphs[key] = None                         # seen once: not worth capturing yet
            self._step(rows, own)
            return
        if self.graphs[key] is None:
            self.graphs[key] = capture(lambda: self._step(rows, own))
        self.graphs[key]()

    def _find_shared(self, n: int):
        """Which ranges of the pool the live sequences attend to in place. Slots as indices; for graphs, whose shapes must
        recur, as a mask over all slots."""
        found = self.cache.shared(n)
        if self.graphs is None:
            everyone = list(range(n))
            self.shared = [(nodes, slice(n) if slots == everyone else torch.tensor(slots)) for nodes, slots in found]
            return
        self.shared = [(nodes, None) for nodes, _ in found]
        if len(found) > len(self.sees):
            self.sees = torch.zeros(2 * len(found), self.slots, dtype=torch.bool, device=self.device)
            self.graphs.clear()
        self.sees.zero_()
        for i, (_, slots) in enumerate(found):
            self.sees[i, slots] = True

    def _step(self, n: int, longest: int):
        slots, cache = torch.arange(n, device=self.device), self.cache
        last = self.tokens[slots, (self.count[:n] - 1).clamp(min=0)]
        attend = cache.decode(n, longest, self.shared, self.sees)
        hidden = self.model(last[None], cache.positions[None, :n], attend)              # (1, n, D)
        cache.lengths[:n] += self.running[:n]               # ended and free slots stay as they are
        cache.positions[:n] += self.running[:n]
        self._sample(hidden[0], slots)

    def _sample(self, hidden: Tensor, slots: Tensor):
        """Draw one token from hidden (n, D) for each of `slots` that has not ended."""
        at = self.count[slots].clamp(max=self.max_tokens - 1)
        running = self.running[slots]
        logits = fp32_logits(hidden, self.head)
        token, logprob = sample_tokens(logits, self.uniforms[slots, at], self.temperature, self.top_k, self.top_p)
        self.tokens[slots, at] = torch.where(running, token, self.tokens[slots, at])
        self.logprobs[slots, at] = torch.where(running, logprob, self.logprobs[slots, at])
        count = self.count[slots] + running
        self.count[slots] = count
        self.running[slots] = running & ~self.ends[token] & (count < self.limit[slots])

    def _collect(self):
        """Take finished sequences out; the last live one moves into each gap."""
        n = len(self.live)
        state = torch.stack((self.running[:n].long(), self.count[:n], self.cache.lengths[:n]))
        running, counts, lengths = state.tolist()           # the one time in a step that the host waits for the device
        for i in reversed([i for i in range(n) if not running[i]]):    # from behind: the last live one is then never finished
            (ticket, prompt), count = self.live[i], counts[i]
            ids, logprobs = self.tokens[i, :count].tolist(), self.logprobs[i, :count].tolist()
            if not math.isfinite(sum(logprobs)):
                raise FloatingPointError("the LM's logits are not finite: broken weights, a diverged run (--lr) or a tiny --temperature")
            stop = ids[-1] in self.tokenizer.end_ids
            text = self.tokenizer.decode(ids[:count - stop])
            self.done.append((ticket, Completion(prompt, ids, logprobs, "stop" if stop else "length", text)))
            last = self.live.pop()
            lengths[i] = 0
            if i < len(self.live):
                self.live[i] = last
                self.cache.move(len(self.live), i)
                for state in (self.tokens, self.logprobs, self.uniforms, self.count, self.limit, self.running):
                    state[i] = state[len(self.live)]
                lengths[i] = lengths[len(self.live)]
                lengths[len(self.live)] = 0
            self.cache.free(len(self.live))
            for state in (self.limit, self.count, self.running):
                state[len(self.live)] = 0
            self.shared = None
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
    equal, or there is but one, every advantage is exactly 0.

    scale_rewards="batch" (REINFORCE++ with baseline, arXiv 2501.03262): one standard deviation for
    the whole step, of all members of all groups around their own baselines,
        sqrt(sum (r - mean)^2 / (members - 1)).
    A group of tiny differences is then not blown up by its own."""
    result = []
    squares: list[float] = []                               # of the members' distances to their means
    for g in groups:
        pool = rewards = np.array([m.reward for m in g.members])
        if baseline == "example":
            pool = np.array([t.reward for t in trajectories if t.votes and t.example == g.example])
        a = np.zeros(len(rewards))
        if (pool != pool[0]).any():
            a = rewards - pool.mean()
            squares.extend(a**2)
            if leave_one_out:
                a *= len(pool) / (len(pool) - 1)            # r - mean of the others
            if scale_rewards == "std":
                a /= pool.std(ddof=1) + 1e-4
        result.append(a)
    if scale_rewards == "batch":
        members = sum(len(a) for a in result)
        # fsum: the same to the last bit in whatever order the groups come
        spread = math.sqrt(math.fsum(squares) / max(members - 1, 1))
        result = [a / (spread + 1e-4) for a in result]
    return [a.tolist() for a in result]


def readable(groups: list[Group], trajectories: list[Trajectory]) -> list[list[float]]:
    """In the place of advantages, for a warm start: 1 for each member all of whose calls could be read, else 0.

    The step is then supervised training on the LM's own readable calls (rejection sampling fine-tuning, as in arXiv 2308.01825,
    with readability in the place of a right answer): where the ratio is 1, the loss's gradient is that of -sum_t w_t log pi_t."""
    was_read = lambda m: all(trajectories[m.trajectory].calls[c].outputs is not None for c in m.calls)
    return [[float(was_read(m)) for m in g.members] for g in groups]


def readable_share(trajectories: list[Trajectory]) -> float:
    """Share of the LM calls whose outputs could be read."""
    calls = [call for t in trajectories for call in t.calls]
    return sum(call.outputs is not None for call in calls) / max(len(calls), 1)


READABLE = 0.5          # share of the runs that can be read from which on an LM needs no help with the format
WARM_ENOUGH = 0.25      # share of a step's calls that can be read from which on a warm start is over


# ---------------------------------------------------------------------------------------------- loss (Eq. 7, Eq. 9)
@dataclass(frozen=True)
class Row:
    """A call in the loss: its completion, its advantage, and the weight of each of its tokens in the step's loss."""
    module: str
    completion: Completion
    advantage: float
    weight: float
    where: str = ""                 # which call of which run
    # [T] log-probs by the training forward at the weights that sampled; with a correction,
    # the first pass over the row leaves them here for the later ones
    trained: list[float] = field(default_factory=list, compare=False, repr=False)


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
    weight = fp32_head(weight)
    for i in range(0, len(hidden), 256):
        logits = fp32_logits(hidden[i:i + 256], weight).div_(temperature)
        yield slice(i, i + 256), logits.sub_(logits.logsumexp(-1, keepdim=True)), targets[i:i + 256, None]


@torch.no_grad()
def token_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """hidden (N, D), weight (V, D), targets (N,) -> fp32 log-probs (N,) of the targets at the sampling temperature."""
    return torch.cat([logp.gather(1, y)[:, 0] for _, logp, y in _log_softmax(hidden, weight, targets, temperature)])


@torch.no_grad()
def head_gradient(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, loss: Callable[..., Tensor],
                  d_weight: Tensor | None = None, entropies: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """hidden (N, D), weight (V, D), targets (N,) -> their log-probs (N,) and d loss / d hidden (N, D); d loss / d weight is added to
    d_weight, fp32 (V, D), if given. `loss(log-probs of a chunk, its slice)` must be a sum over tokens: then a chunk's gradient is
    known as soon as its logits are, which are never kept, nor computed a second time.

    `entropies` (N,), if given, is filled with each token's H = -sum_v p_v log p_v, in nats, of the
    whole distribution. The loss then takes a chunk's as its third argument, and has a gradient with
    respect to them as well: dH / dlogit_v = -p_v (log p_v + H) / temperature."""
    logprobs, d_hidden = [], torch.empty_like(hidden)
    for rows, logp, y in _log_softmax(hidden, weight, targets, temperature):
        logprobs.append(logp.gather(1, y)[:, 0])
        known = [logprobs[-1]]                              # what the loss is a function of
        if entropies is not None:
            entropies[rows] = -logp.exp().mul_(logp).sum(-1)
            known.append(entropies[rows].clone())
        with torch.enable_grad():
            log_p, *entropy = (x.requires_grad_() for x in known)
            g, *h = torch.autograd.grad(loss(log_p, rows, *entropy), known)
        g = g[:, None] / temperature
        pull = -g                                           # on each logit, per unit of its probability
        if entropies is not None:
            h = h[0][:, None] / temperature                                                 # (rows, 1)
            pull = pull - h * (logp + entropies[rows, None])                                # (rows, V)
        d_logits = logp.exp_().mul_(pull).scatter_add_(1, y, g)         # (rows, V): (one-hot - softmax) dloss/dlogp / temperature
        d_hidden[rows] = d_logits.to(weight.dtype) @ weight
        if d_weight is not None:
            d_weight.addmm_(d_logits.t(), hidden[rows].float())
    return torch.cat(logprobs).detach(), d_hidden


TIS_CAP = 2.0                       # C of truncated importance sampling
ICEPOP_LOW, ICEPOP_HIGH = 0.5, 5.0  # C_min and C_max of IcePop, as in its paper


def correction_factors(trained: Tensor, sampled: Tensor, correction: str) -> Tensor:
    """Sampled tokens' log-probs (N,) by the training forward and by the sampler, at the same weights
    -> the constant c (N,) that each token's term of the loss is multiplied by.

    The two differ where they round differently (bf16): tokens are drawn from the sampler's
    distribution, and the gradient is of the trainer's. With m = pi_trained / pi_sampled,

        tis     c = min(m, C)               truncated importance sampling, fengyao.notion.site/off-policy-rl
        icepop  c = m 1[C_min <= m <= C_max]                                 IcePop, arXiv 2510.18855
        none    c = 1; pi_old is then the sampler's, and the clip sees the difference

    This undoes the mismatch of the token itself, not that of what came before and comes after it."""
    m = torch.exp(trained - sampled)
    if correction == "tis":
        return m.clamp(max=TIS_CAP)
    if correction == "icepop":
        inside = (m >= ICEPOP_LOW) & (m <= ICEPOP_HIGH)
        return torch.where(inside, m, 0.0)                  # not a product: infinity x 0 is no number
    return torch.ones_like(m)


def sampled_entropy(rows: list[Row]) -> float:
    """Mean -log p of the rows' sampled tokens, in nats: an estimate of the policy's entropy per token."""
    logprobs = [p for r in rows for p in r.completion.logprobs]
    return -sum(logprobs) / max(len(logprobs), 1)


def entropy_coefficient(entropy: float, target: float, coefficient: float) -> float:
    """alpha = coefficient x max(0, 1 - entropy / target), the weight of the entropy bonus; 0 without a target.

    After Skywork-OR1 (arXiv 2505.22312), whose bonus too acts only below a target entropy. Theirs adds
    0.005 to the weight at every step below the target and takes it away above: an integral controller,
    which ends at the target, and whose weight is one more thing to save. This one is proportional, a
    function of the step's own tokens, so that a step needs no history; it settles somewhat below the
    target, where what the bonus gives balances what the rewards take."""
    return coefficient * max(0.0, 1 - entropy / target) if target else 0.0


def policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, weights: Tensor, clip_low: float = 0.2,
                clip_high: float = 0.2, beta: float = 0.0, ref_logprobs: Tensor | None = None,
                factors: Tensor | None = None, alpha: float = 0.0, entropies: Tensor | None = None) -> Tensor:
    """The mmGRPO loss of N tokens, all tensors (N,): with rho = pi / pi_old,

        L = - sum_t w_t [ c_t min(rho_t A, clip(rho_t, 1 - clip_low, 1 + clip_high) A)
                          - beta KL_t + alpha H_t ]                                                       (Eq. 7)
    KL is the k3 estimator r - log r - 1 with r = pi_ref / pi (http://joschu.net/blog/kl-approx.html): never negative; over
    tokens sampled from pi its mean is KL(pi || pi_ref), but its gradient's mean is that of KL(pi_ref || pi).
    Not the paper's: the factors c (see correction_factors; without, 1) and the bonus for the entropy H
    of the token's distribution, which ignores that the token decides what comes after it."""
    ratio = torch.exp(logprobs - old_logprobs)      # 1 on fresh rollouts (but for dropout), its gradient that of log pi
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
    if factors is not None:
        gain = factors * gain
    if beta:
        log_r = ref_logprobs - logprobs
        gain = gain - beta * (log_r.exp() - log_r - 1)
    if alpha:
        gain = gain + alpha * entropies
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
    # not hidden[at]: on the CPU the gradients of a state that predicts several tokens, as the end of
    # a shared prompt does, would be added in the order in which threads come to them
    states = hidden.index_select(0, tensor(tree.at))
    return tensor([i for r in tree.rows for i in r.completion.token_ids]), states


@torch.no_grad()
def batch_logprobs(model: Transformer, tree: Tree, temperature: float, vocabulary: int) -> Tensor:
    """Log-probs (N,) of a micro-batch's sampled tokens."""
    targets, hidden = predicting_states(model, tree)
    return token_logprobs(hidden, model.head[:vocabulary], targets, temperature)


def proximal_logprobs(model: Transformer, tree: Tree, sampled: Tensor, config: Config, vocabulary: int,
                      fresh: bool) -> Tensor | None:
    """log pi_old (N,) of a micro-batch's sampled tokens: the sampler's, or with a correction the training
    forward's at the weights that sampled. None: those that the first pass is about to compute anyway."""
    if config.correction == "none":
        return sampled
    if not fresh:
        return torch.tensor([p for r in tree.rows for p in r.trained], device=sampled.device)
    if config.lora_dropout:                                 # which is in the update alone, and no part of pi_old
        return batch_logprobs(model, tree, config.temperature, vocabulary)
    return None


def keep_proximal(tree: Tree, old: Tensor) -> None:
    """Leave log pi_old (N,) with the micro-batch's rows, for the passes to come."""
    lengths = [len(row.completion.token_ids) for row in tree.rows]
    for row, logprobs in zip(tree.rows, old.split(lengths)):
        row.trained[:] = logprobs.tolist()


def tokens_per_batch(model: Transformer, rows: list[Row], config: Config) -> int:
    """Distinct tokens of a micro-batch where --batch-tokens says nothing: as many as four of the longest row, so that rows which share
    a prefix are seldom parted, and no more than a quarter of the device's memory holds."""
    longest = max((len(r.completion.prompt_ids) + len(r.completion.token_ids) for r in rows), default=1)
    return config.batch_tokens or min(max(1536, 4 * longest), memory_of(model.head.device) // 4 // activation_bytes(model))


def step_gradient(model: Transformer, rows: list[Row], config: Config, vocabulary: int,
                  reference: Transformer | None = None, fresh: bool = True,
                  alpha: float = 0.0) -> tuple[list[Tensor], dict]:
    """The gradient of the step's loss, one fp32 tensor per parameter, and its figures (report.Tally), module by module to see
    what each contributes. `fresh`: the weights are still those that sampled; ParityError where the log-probs disagree. `alpha`:
    the weight of the entropy bonus. With a correction the first pass must be a fresh one."""
    if config.correction == "auto":                         # fp32 leaves nothing to correct
        low = model.head.dtype != torch.float
        config = dataclasses.replace(config, correction="tis" if low else "none")
    parameters, tally, batch_tokens = trainable(model), Tally(config, model.head.dtype, fresh), tokens_per_batch(model, rows, config)
    total, device = None, model.head.device
    head = next((i for i, p in enumerate(parameters) if p is model.head), None)         # None: it is frozen
    for module in sorted({r.module for r in rows}):
        gradient = None
        of_module = [r for r in rows if r.module == module]
        trees = pack(of_module, batch_tokens)
        tally.sums["distinct"] += sum(len(tree.ids) for tree in pack(of_module, sys.maxsize))     # in one tree, none stands twice
        while trees:
            tree = trees.pop()
            tokens = [(p, r.advantage, r.weight) for r in tree.rows for p in r.completion.logprobs]
            sampled, advantage, weight = torch.tensor(tokens, device=device).unbind(1)                      # (N,) each
            entropies = torch.zeros_like(sampled) if alpha else None
            d_head = None if head is None else torch.zeros_like(model.head[:vocabulary], dtype=torch.float)
            try:
                ref = batch_logprobs(reference, tree, config.temperature, vocabulary) if reference else None
                old = proximal_logprobs(model, tree, sampled, config, vocabulary, fresh)

                def loss(logprobs: Tensor, r: slice, entropy: Tensor | None = None) -> Tensor:
                    before = logprobs.detach() if old is None else old[r]
                    factors = correction_factors(before, sampled[r], config.correction)
                    return policy_loss(logprobs, before, advantage[r], weight[r], config.clip_low, config.clip_high,
                                       config.beta, None if ref is None else ref[r], factors, alpha, entropy)

                targets, hidden = predicting_states(model, tree)
                logprobs, d_hidden = head_gradient(hidden.detach(), model.head[:vocabulary], targets, config.temperature,
                                                   loss, d_head, entropies)
                more = torch.autograd.grad(hidden, parameters, d_hidden, allow_unused=True)
            except RuntimeError as e:                       # out of memory, for which torch has no one class on all devices
                if "memory" not in str(e) or len(tree.rows) == 1:
                    raise
                trees += pack(tree.rows, len(tree.ids) // 2)
                tally.sums["halved"] += 1
                hidden = d_hidden = None                    # frees the failed graph
                continue
            old = logprobs if old is None else old
            if config.correction != "none":
                keep_proximal(tree, old)
                tally.correct(old - sampled, correction_factors(old, sampled, config.correction))
            tally.batch(tree, loss(logprobs, slice(None), entropies).item(), logprobs, old, advantage, ref, entropies)
            if fresh and not (config.lora_dropout and tally.apart):
                if config.lora_dropout:                     # was not there when sampling: one micro-batch is scored without it
                    logprobs = batch_logprobs(model, tree, config.temperature, vocabulary)
                tally.compare(tree, logprobs, sampled)
            more = [torch.zeros_like(p, dtype=torch.float) if m is None else m.float() for p, m in zip(parameters, more)]
            if d_head is not None:
                more[head][:vocabulary] += d_head           # an untied head is no part of the states' graph: its m is None
            gradient = add_gradients(gradient, more)
        if gradient is not None:
            tally.norms[module] = torch.stack(torch._foreach_norm(gradient)).norm().item()
            total = add_gradients(total, gradient)
    return total or [torch.zeros_like(p, dtype=torch.float) for p in parameters], tally.figures()


def add_gradients(total: list[Tensor] | None, more: list[Tensor]) -> list[Tensor]:
    """total + more, in place; None is 0, of which no tensors need to be held."""
    if total is None:
        return more
    torch._foreach_add_(total, more)
    return total


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
    return torch.optim.AdamW(masters, weight_decay=config.weight_decay, fused=True), start


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
    if warm := step < config.warm_start and 0 < readable_share(trajectories) < WARM_ENOUGH:
        values = readable(groups, trajectories)
    rows = weigh(groups, values, trajectories, config.normalize, config.max_tokens)
    entropy = sampled_entropy(rows)
    alpha = entropy_coefficient(entropy, config.entropy_target, config.entropy_coef)
    # the gradient of the others is exactly 0
    rows = [r for r in rows if r.advantage or config.beta or alpha]
    metrics = {"step": step + 1, **({"warm_start": True} if warm else {}), **measure(trajectories, groups, values)}
    if config.entropy_target:
        metrics |= {"entropy_sampled": entropy, "entropy_alpha": alpha}
    if not metrics["calls"]["trained"]:
        metrics["idle"] = nothing_to_learn(trajectories, config)
    parameters, = optimizer.param_groups
    parameters["lr"] = learning_rate(model, config) * min(1.0, (step + 1) / max(config.warmup, 1))
    for epoch in range(config.inner_epochs):
        gradient, figures = step_gradient(model, rows, config, tokenizer.size, reference, fresh=epoch == 0, alpha=alpha)
        metrics |= figures
        for p, g in zip(parameters["params"], gradient):
            p.grad = g
        metrics["grad_norm"] = torch.nn.utils.clip_grad_norm_(parameters["params"], config.clip_norm).item()
        if not math.isfinite(metrics["grad_norm"]):
            metrics["skipped"] = True
            break
        if rows:                                            # else momentum alone would go on where the last steps led
            optimizer.step()
        optimizer.zero_grad()                               # a gradient is as large as the weights: free it
        with torch.no_grad():
            torch._foreach_copy_(trainable(model), parameters["params"])
    for module, share in metrics.pop("grad_share").items():
        metrics["modules"][module]["grad_share"] = share
    return metrics | {"lr": parameters["lr"], "seconds": seconds | {"update": time.perf_counter() - began}}


def learning_rate(model: Transformer, config: Config) -> float:
    """--lr, or what suits the LM: 5e-4 for one of width 128, 2.5e-5 of 576, 5e-7 of 4,096; with LoRA ten times that."""
    return config.lr or 5e-4 * min(1, 128 / model.config.hidden_size) ** 2 * (10 if config.lora_rank else 1)


def settled(config: Config, first: dict) -> Config:
    """The options, with what depends on how the LM starts: `first` is the first dev evaluation, sampled."""
    if config.warm_start >= 0:
        return config
    unread = first["statuses"]["format_error"] + first["statuses"]["length"]
    few = unread > (1 - READABLE) * first["rollouts"]
    return dataclasses.replace(config, warm_start=WARM_STEPS if few else 0)


WARM_STEPS = 12         # of a warm start that the program decides upon


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
    history, evaluations = read_metrics(out) if scores else ([], [])        # the lines of all steps so far
    log = (out / "metrics.jsonl").open("a" if scores else "w")
    bar = tqdm(range(start, config.steps), desc=config.task, unit="step", disable=None, initial=start, total=config.steps)

    def check(step: int):
        """Score the dev split as trained (sampled) and greedily; keep the weights as `last`, the best as `best`, the state."""
        try:
            sampled, greedy = (evaluate(model, tokenizer, task, dev, config, t)
                               for t in (config.temperature, 0.0))
        except ProgramError:
            if scores:
                keep(step)                                  # the steps since the last state
            raise
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

    due = lambda step: step % config.eval_every == 0 or step == config.steps
    if not scores:
        check(0)
    elif due(start) and evaluations[-1]["step"] < start:    # the last evaluation failed
        check(start)
    config = settled(config, first_evaluation(out))
    if config.warm_start > start:
        bar.write(f"warm start: of the first {config.warm_start} steps those less than a quarter of whose calls can be read train on "
                  "the calls that could be, whatever they earned")
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
        if due(step + 1):
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
    sys.modules["mmgrpo"] = sys.modules["__main__"]         # the command line imports this very file
    from run.cli import main
    sys.exit(main(sys.argv[1:]))
