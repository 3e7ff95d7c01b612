"""mmGRPO (arXiv 2508.04660) in one file: reinforcement learning for programs that call an LM.

An LM program calls one language model through several modules. For each example it is run R times;
the k-th calls of module m over those runs form a group; each call's advantage is its run's reward
relative to its group; the weights follow the clipped policy gradient of the sampled tokens.

The method, step by step, and what does it here:

    1. Run the program R times on each of B examples; every run ends in a reward.  Sampler, play
    2. Group the calls: the k-th call of module m, over the R runs (Eq. 1).        group_calls
    3. Compare: a call's advantage is A = (r - mean) / std of its group (Eq. 2).   advantages
    4. Weigh: the mean over groups, over members, over tokens (Eq. 7).             weigh
    5. Take the gradient of the clipped loss over the sampled tokens (Eq. 7).      step_gradient
    6. Step the optimizer.                                                         train_step
    7. Repeat with fresh rollouts.                                                 train

What differs from plain GRPO:

  - A group is no set of answers to one prompt. Its members are calls of one module at one place of
    the program, whose prompts may differ: each holds what its own run did before.
  - Groups are ragged: a run that ended early is absent from the groups of later calls.
  - There is one reward a run, and every call of the run gets it, the one that failed included.
  - A run that failed for the LM's sake has a low reward and votes; one that failed for the sake of
    a tool has none, and is in no group.
  - Calls of a module begin alike: a micro-batch passes over a common prefix once (Tree).

Left out on purpose: a critic (the mean of the group is the baseline), reward models (the program's
metric gives the reward), and more than one machine (the method is the same on one).

    python mmgrpo.py train --task hover            # or: make train
    python mmgrpo.py eval --task hover --model runs/hover/last
    python mmgrpo.py show --task hover             # one run on one example, as a readable trace
    python mmgrpo.py group trajectories.json       # groups and advantages of runs made elsewhere

Map, in the order the data flows:

    sampling a token         first_above, sample_tokens
    sampler                  PrefixPool, Sampler
    groups and advantages    group_calls, advantages, readable
    loss                     weigh, token_logprobs, head_gradient, policy_loss
    update                   pack, predicting_states, batch_gradient, step_gradient
    training loop            play, evaluate, train_step, train

Programs and trajectories are in program.py, the transformer in model.py; options, command line and
files of a run in run/.

Letters: N sampled tokens, which alone bear loss; S sequences that are sampled at once; the others
as in model.py.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import math
import random
import sys
import time
from bisect import bisect_left, insort
from collections import defaultdict, deque
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Callable, Iterator

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
from run.journal import Journal
from run.records import first_evaluation, read_metrics
from run.state import load_state, save_state, states, step_of
from run.terminal import expected_of, show, statuses, step_line

# --------------------------------------------------------------------------------- sampling a token
VOCABULARY_BLOCK = 128  # tokens whose probabilities are summed first, to find the one that is drawn


def first_above(x: Tensor, bound: Tensor) -> tuple[Tensor, Tensor]:
    """The first place in each row where the sum up to it exceeds `bound`.

    x (S, n) >= 0, bound (S,). Returns the places (S,), never one of value 0, and how much of
    `bound` the places before each leave (S,). A bound that is no less than the total counts as
    just below it.
    """
    sums = x.cumsum(-1, dtype=torch.double)  # (S, n)
    just_below_total = sums[:, -1].nextafter(sums.new_zeros(()))
    bound = torch.minimum(bound, just_below_total)
    place = torch.searchsorted(sums, bound[:, None], right=True).clamp(max=x.shape[1] - 1)  # (S, 1)
    before = (sums.gather(1, place) - x.gather(1, place))[:, 0]  # (S,)
    # clamped: rounding can make the rest negative, for which no later place would be drawn
    return place[:, 0], (bound - before).clamp(min=0)


def among_likeliest(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits (S, V) with -inf outside the top_k likeliest tokens (0: all) and the top_p mass."""
    vocabulary = logits.shape[1]
    probs, order = logits.softmax(-1).sort(-1, descending=True)
    mass_before = probs.cumsum(-1) - probs
    rank = torch.arange(vocabulary, device=logits.device)
    outside = (mass_before >= top_p) | (rank >= (top_k or vocabulary))
    outside[:, 0] = False
    return logits.masked_fill(outside.scatter(1, order, outside), -math.inf)


def sample_tokens(
    logits: Tensor, uniform: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Draw one token a row, by the inverse of the cumulative distribution.

    logits (S, V), uniform (S,) in [0, 1). Returns the tokens (S,) and their exact log-probs (S,)
    under the distribution sampled. The first token whose cumulative probability exceeds uniform x
    total is drawn, so one of probability 0 never is. Temperature 0 takes the most likely token,
    with log-prob 0. Where logits are not finite, the log-prob is not finite either.
    """
    if temperature == 0:
        best, token = logits.max(-1)
        return token, best.float() * 0
    logits = logits.float() / temperature
    if top_k or top_p < 1:
        logits = among_likeliest(logits, top_k, top_p)

    # first a block by the blocks' sums, then a token within it: one pass over V, in fp32
    probs = logits.softmax(-1)  # (S, V)
    padding = -probs.shape[1] % VOCABULARY_BLOCK
    blocks = F.pad(probs, (0, padding)).unflatten(1, (-1, VOCABULARY_BLOCK))  # (S, blocks, 128)
    sums = blocks.sum(-1)  # (S, blocks)
    block, rest = first_above(sums, uniform.double() * sums.sum(-1, dtype=torch.double))
    rows = torch.arange(len(block), device=probs.device)
    inside, _ = first_above(blocks[rows, block], rest)
    token = (block * VOCABULARY_BLOCK + inside).clamp(max=probs.shape[1] - 1)
    return token, probs.gather(1, token[:, None])[:, 0].log()


def uniform_numbers(key: tuple, count: int) -> np.ndarray:
    """The first `count` numbers in [0, 1) of the Philox stream that `key` seeds."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    seed = int.from_bytes(digest, "little")
    return np.random.Generator(np.random.Philox(key=seed)).random(count)


# ------------------------------------------------------------------------------------------ sampler
def common(a: list[int], b: list[int]) -> int:
    """How many tokens two sequences begin with alike."""
    for i, (x, y) in enumerate(zip(a, b)):
        if x != y:
            return i
    return min(len(a), len(b))


def next_power_of_two(n: int) -> int:
    """The smallest power of two that is no less than n >= 1."""
    return 1 << (n - 1).bit_length()


def capture(step: Callable[[], None]) -> Callable[[], None]:
    """Record the kernels that `step` launches as a CUDA graph.

    Calling the result launches them again, on the same buffers.
    """
    graph = torch.cuda.CUDAGraph()
    # thread_local, for tools run in threads of their own
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step()
    return graph.replay


class PrefixPool:
    """Which prefix lies where in the cache's pool, a forest with one node a token.

    What two prompts share is kept from the second one on, until the weights change. Both lists are
    in lexical order, so that what shares most with a prompt is a neighbour of it.
    """

    def __init__(self, limit: int):
        # nodes at the most
        self.limit = limit
        self.clear([])

    def clear(self, prompts: list[list[int]]) -> None:
        """Forget all nodes; `prompts` are those that still wait."""
        # all prompts of these weights
        self.prompts = sorted(prompts)
        # what is kept, (tokens, nodes)
        self.kept: list[tuple[list[int], list[int]]] = []
        # where the next nodes go
        self.end = 0

    def announce(self, prompt: list[int]) -> None:
        """Take note of a prompt, so that those before it know what it shares with them."""
        insort(self.prompts, prompt)

    def find_or_reserve(self, prompt: list[int], fewest: int) -> tuple[int, list[int]]:
        """Find a prompt's nodes, or reserve them where at least `fewest` new ones are shared.

        Returns (known, path): the first `known` tokens are in the pool already; `path` has the
        nodes of the first len(path) >= known tokens. The caller is to prefill those from `known`
        on. Example, fewest = 2: of the prompts "abcx", "abcy" and "abz" the first gets (0, [0, 1,
        2]), the second (3, [0, 1, 2]), the third (2, [0, 1]).
        """
        # the last token is never shared, for its state gives the sample
        shareable = prompt[:-1]
        known, path = self._in_the_pool(shareable)
        more = min(self._shared_with_others(prompt), len(shareable)) - known
        if more >= fewest and self.end + more <= self.limit:
            path = path + list(range(self.end, self.end + more))
            self.end += more
            insort(self.kept, (prompt[: len(path)], path))
        return known, path

    def _in_the_pool(self, shareable: list[int]) -> tuple[int, list[int]]:
        """How many first tokens are kept already, and their nodes."""
        place = bisect_left(self.kept, (shareable,))
        neighbours = self.kept[max(place - 1, 0) : place + 1]
        found = ((common(shareable, tokens), nodes) for tokens, nodes in neighbours)
        known, path = max(found, default=(0, []))
        return known, path[:known]

    def _shared_with_others(self, prompt: list[int]) -> int:
        """How many first tokens another prompt of these weights has as well."""
        place = bisect_left(self.prompts, prompt)
        neighbours = self.prompts[max(place - 1, 0) : place] + self.prompts[place + 1 : place + 2]
        return max((common(prompt, other) for other in neighbours), default=0)


class Sampler:
    """Continuous batching over the slots of a KV cache.

    Three things are apart:
      - the requests: waiting -> live -> done. Live sequences are in slots 0..n-1. Each `advance`
        refills free slots from the waiting prompts and decodes a token for every live one; the last
        live sequence moves into the slot of one that is done.
      - the memory: a prefix that two prompts share is kept in the cache's pool from the second one
        on, while the weights stay as they are. A long one is attended to there by all sequences
        that have it, of a short one every slot gets a copy.
      - a decode step: one token for every live sequence. Token t of a request is drawn with the
        t-th number of a Philox stream seeded by its key, whatever its mates.
    """

    SHARE = 16  # new tokens from which a prefix is kept in the pool
    PREFILL = 8192  # new tokens in one pass of the model, to bound its memory
    OWN = 64  # a sequence's own tokens are rounded up to a multiple of this in a graph's shape

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        slots: int = 0,
        max_tokens: int = 128,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.device = model.head.device
        self.context = model.config.max_positions
        self.slots = slots or slots_for(model.config, model.head)
        self.max_tokens = min(max_tokens, self.context)
        self.temperature = temperature
        self.top_k = top_k
        self.top_p = top_p
        self.seconds = 0.0

        # requests
        self.tickets = 0
        # ticket, prompt, uniform numbers
        self.waiting: deque[tuple[int, list[int], np.ndarray]] = deque()
        # slot -> ticket, prompt
        self.live: list[tuple[int, list[int]]] = []
        self.done: list[tuple[int, Completion]] = []

        # memory: what is cached is of the weights of `version`
        self.version: list[int] | None = None
        self.prefixes = PrefixPool(nodes_for(model.config, model.head))
        self.cache = KVCache(model.config, self.slots, self.device, model.head.dtype)
        # tokens that a live sequence has of its own, at the most
        self.longest = 0
        # ranges of the pool attended to in place, to be found anew where live sequences changed
        self.shared: list = []
        self.changed = True

        # of each slot: what it sampled, how much of it, how much it may, whether it has not ended
        self.tokens = self._per_slot(torch.long, self.max_tokens)  # (S, max_tokens)
        self.logprobs = self._per_slot(torch.float, self.max_tokens)  # (S, max_tokens)
        self.uniforms = self._per_slot(torch.double, self.max_tokens)  # (S, max_tokens)
        self.count = self._per_slot(torch.long)  # (S,)
        self.limit = self._per_slot(torch.long)  # (S,)
        self.running = self._per_slot(torch.bool)  # (S,)
        self.ends = torch.zeros(tokenizer.size, dtype=torch.bool, device=self.device)  # (V,)
        self.ends[list(tokenizer.end_ids)] = True

        # shape -> its CUDA graph, or None where it was seen once
        self.graphs: dict | None = {} if self.device.type == "cuda" else None
        # in graphs: which slots see which range of `shared`
        self.sees = torch.zeros(0, self.slots, dtype=torch.bool, device=self.device)

    def _per_slot(self, dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.zeros(self.slots, *shape, dtype=dtype, device=self.device)

    # ------------------------------------------------------------------------------------- requests
    def submit(self, messages: list[dict], key: tuple) -> int:
        """Take a prompt and return its ticket; `key` seeds its random numbers.

        A prompt that leaves no room in the context is done at once, with no token.
        """
        prompt = self.tokenizer.encode_chat(messages)
        limit = min(self.max_tokens, self.context - len(prompt))
        self.tickets += 1
        if limit > 0:
            self.waiting.append((self.tickets, prompt, uniform_numbers(key, limit)))
            self.prefixes.announce(prompt)
        else:
            self.done.append((self.tickets, Completion(prompt, [], [], "length")))
        return self.tickets

    @torch.no_grad()
    def advance(self) -> list[tuple[int, Completion]]:
        """Refill the slots, decode a token; return the requests that are done, by ticket."""
        began = time.perf_counter()
        self._renew()
        while self.waiting and len(self.live) < self.slots:
            self._admit()
        if self.live:
            self._decode(len(self.live), self.longest + 1)
            self._collect()
        self.seconds += time.perf_counter() - began
        done = self.done
        self.done = []
        return done

    def _admit(self) -> None:
        """Prefill waiting prompts, a kept prefix not again; sample the first token of each."""
        kept_before = self.prefixes.end
        taken = self._take()
        kept = self.prefixes.end

        # what no other prompt has goes behind the pool, only to be copied from there
        end = kept
        for i, (path, prompt, slot) in enumerate(taken):
            own = len(prompt) - len(path)
            taken[i] = (path + list(range(end, end + own)), prompt, slot)
            end += own
        # paths that begin alike become neighbours
        taken.sort(key=lambda row: row[0])

        # a path's new nodes are those that neither an earlier pass nor an earlier path prefills:
        # of the new prompts "abx" (path 0 1 2) and "aby" (path 0 1 3) the tokens a b x y pass
        paths: list[tuple[int, list[int]]] = []
        ids: list[int] = []
        positions: list[int] = []
        # where in `ids` each prompt ends
        last: list[int] = []
        prefilled: set[int] = set()
        for path, prompt, _ in taken:
            is_new = (node >= kept_before and node not in prefilled for node in path)
            known = next(i for i, new in enumerate(is_new) if new)
            prefilled.update(path[known:])
            paths.append((known, path))
            ids += prompt[known:]
            positions += range(known, len(prompt))
            last.append(len(ids) - 1)

        tensor = partial(torch.tensor, device=self.device)
        self.cache.reserve(end)
        attend = TreeAttention(paths, self.device, self.cache.pool)
        hidden = self.model(tensor([ids]), tensor([positions]), attend)  # (1, T, D)
        slots = [slot for _, _, slot in taken]
        nodes = [path for path, _, _ in taken]
        longest = self.cache.place(slots, nodes, kept, self.max_tokens)
        if self.cache.replaced and self.graphs is not None:
            # they are of the old buffers
            self.graphs.clear()
        self.cache.replaced = False
        self.longest = max(self.longest, longest)
        self.changed = True
        self._sample(hidden[0, last], tensor(slots))

    def _take(self) -> list[tuple[list[int], list[int], int]]:
        """Move waiting requests into free slots -> of each (path in the pool, prompt, slot)."""
        taken = []
        budget = self.PREFILL
        while self.waiting and len(self.live) < self.slots and budget > 0:
            ticket, prompt, uniforms = self.waiting.popleft()
            slot = len(self.live)
            self.live.append((ticket, prompt))
            self.uniforms[slot, : len(uniforms)] = torch.from_numpy(uniforms)
            self.count[slot] = 0
            self.limit[slot] = len(uniforms)
            self.running[slot] = True
            known, path = self.prefixes.find_or_reserve(prompt, self.SHARE)
            taken.append((path, prompt, slot))
            budget -= len(prompt) - known
        return taken

    def _collect(self) -> None:
        """Take finished sequences out of their slots."""
        n = len(self.live)
        state = torch.stack((self.running[:n].long(), self.count[:n], self.cache.lengths[:n]))
        # here the host waits for the device, once a step; then twice for each sequence that ended
        running, counts, lengths = state.tolist()

        # from behind: the last live sequence, which fills the gap, is then never a finished one
        for slot in reversed([slot for slot in range(n) if not running[slot]]):
            ticket, prompt = self.live[slot]
            self.done.append((ticket, self._completion(slot, prompt, counts[slot])))
            self._vacate(slot)
            lengths[slot] = lengths[-1]
            lengths.pop()
        self.longest = max(lengths, default=0)

    def _completion(self, slot: int, prompt: list[int], count: int) -> Completion:
        """What a slot sampled. Raises FloatingPointError where its log-probs are not finite."""
        ids = self.tokens[slot, :count].tolist()
        logprobs = self.logprobs[slot, :count].tolist()
        if not math.isfinite(sum(logprobs)):
            raise FloatingPointError(
                "the LM's logits are not finite: broken weights, a diverged run (--lr) or a tiny "
                "--temperature"
            )
        # an end token that was sampled is kept, and trained, but is no part of the text
        ended = ids[-1] in self.tokenizer.end_ids
        text = self.tokenizer.decode(ids[: count - ended])
        return Completion(prompt, ids, logprobs, "stop" if ended else "length", text)

    # --------------------------------------------------------------------------------------- memory
    def _renew(self) -> None:
        """Forget what is cached where the weights have changed."""
        version = [p._version for p in self.model.parameters()]
        if version == self.version:
            return
        if self.live:
            raise RuntimeError("the weights changed while the sampler had live sequences")
        self.version = version
        self.prefixes.clear([prompt for _, prompt, _ in self.waiting])
        # ids that the tokenizer lacks cannot be drawn
        self.head = fp32_head(self.model.head[: self.tokenizer.size])

    def _vacate(self, slot: int) -> None:
        """Free a slot; the last live sequence, with all its state, moves into it."""
        moved = self.live.pop()
        last = len(self.live)
        if slot < last:
            self.live[slot] = moved
            self.cache.move(last, slot)
            of_slots = (self.tokens, self.logprobs, self.uniforms)
            for state in (*of_slots, self.count, self.limit, self.running):
                state[slot] = state[last]
        self.cache.free(last)
        for state in (self.count, self.limit, self.running):
            state[last] = 0
        self.changed = True

    def _shared_ranges(self, live: int) -> list:
        """The ranges of the pool that live sequences attend to in place, for `cache.decode`.

        Each has its slots as indices; in graphs, whose shapes must recur, None, and `sees` is a
        mask over all slots.
        """
        found = self.cache.shared(live)
        if self.graphs is None:
            everyone = list(range(live))
            ranges = []
            for nodes, slots in found:
                ranges.append((nodes, slice(live) if slots == everyone else torch.tensor(slots)))
            return ranges
        if len(found) > len(self.sees):
            shape = (2 * len(found), self.slots)
            self.sees = torch.zeros(shape, dtype=torch.bool, device=self.device)
            # they are of the old mask
            self.graphs.clear()
        self.sees.zero_()
        for i, (_, slots) in enumerate(found):
            self.sees[i, slots] = True
        return [(nodes, None) for nodes, _ in found]

    # -------------------------------------------------------------------------------- a decode step
    def _decode(self, live: int, longest: int) -> None:
        """One token for each of the first `live` slots, with at most `longest` tokens of its own.

        On the CPU in just that shape. On CUDA in a rounded one, so that shapes recur: the second
        time that one comes up it is captured as a graph, then replayed.
        """
        if self.changed:
            self.shared = self._shared_ranges(live)
            self.changed = False
        if self.graphs is None:
            self._step(live, longest)
            return
        rows = min(next_power_of_two(live), self.slots)
        room = self.cache.kv.shape[4]
        own = min(round_up(longest, self.OWN), room)
        ranges = tuple((nodes.start, nodes.stop) for nodes, _ in self.shared)
        shape = (rows, own, ranges)
        if shape not in self.graphs:
            # seen once, not worth capturing yet
            self.graphs[shape] = None
            self._step(rows, own)
            return
        if self.graphs[shape] is None:
            self.graphs[shape] = capture(lambda: self._step(rows, own))
        self.graphs[shape]()

    def _step(self, rows: int, longest: int) -> None:
        """Forward the last token of each of the first `rows` slots, and sample the next."""
        slots = torch.arange(rows, device=self.device)
        last = (self.count[:rows] - 1).clamp(min=0)
        tokens = self.tokens[slots, last]  # (rows,)
        cache = self.cache
        attend = cache.decode(rows, longest, self.shared, self.sees)
        hidden = self.model(tokens[None], cache.positions[None, :rows], attend)  # (1, rows, D)
        # ended and free slots stay as they are
        cache.lengths[:rows] += self.running[:rows]
        cache.positions[:rows] += self.running[:rows]
        self._sample(hidden[0], slots)

    def _sample(self, hidden: Tensor, slots: Tensor) -> None:
        """Draw one token from hidden (n, D) for each of `slots` (n,) that has not ended."""
        # which of its tokens is each slot's next
        turn = self.count[slots].clamp(max=self.max_tokens - 1)
        running = self.running[slots]
        uniforms = self.uniforms[slots, turn]
        logits = fp32_logits(hidden, self.head)  # (n, V)
        token, logprob = sample_tokens(logits, uniforms, self.temperature, self.top_k, self.top_p)
        self.tokens[slots, turn] = torch.where(running, token, self.tokens[slots, turn])
        kept = self.logprobs[slots, turn]
        self.logprobs[slots, turn] = torch.where(running, logprob, kept)
        count = self.count[slots] + running
        self.count[slots] = count
        self.running[slots] = running & ~self.ends[token] & (count < self.limit[slots])


# ----------------------------------------------------------------- groups and advantages (Eq. 1, 2)
@dataclass(frozen=True)
class Member:
    """One run in a group. Example: Member(trajectory=5, calls=(2,), reward=0.5)"""

    # its place among the trajectories
    trajectory: int
    # which of its calls, as indices: one, or with level="trajectory" all
    calls: tuple[int, ...]
    reward: float


@dataclass(frozen=True)
class Group:
    """The k-th calls of a module over the runs of one example.

    Example: Group(3, "append_notes", 1, (Member(…), …))
    """

    example: int | str
    # "" with level="trajectory"
    module: str
    invocation: int
    members: tuple[Member, ...]


# (module, invocation) -> run -> the indices of the calls that it has there
Places = dict[tuple[str, int], dict[int, tuple[int, ...]]]


def _whole_runs(trajectories: list[Trajectory], indices: list[int]) -> Places:
    """One place for all calls of each run, of those that have any."""
    calls_of = {}
    for i in indices:
        if trajectories[i].calls:
            calls_of[i] = tuple(range(len(trajectories[i].calls)))
    return {("", 0): calls_of} if calls_of else {}


def _places(
    trajectories: list[Trajectory], indices: list[int], short_groups: str, seed: int | tuple
) -> Places:
    """The places of the calls of one example's runs."""
    # run -> module -> its calls, in order
    made: dict[int, dict[str, list[int]]] = {i: defaultdict(list) for i in indices}
    for i in indices:
        for c, call in enumerate(trajectories[i].calls):
            made[i][call.module].append(c)

    modules: set[str] = set().union(*made.values())
    places: Places = defaultdict(dict)
    for module in sorted(modules):
        depth = max(len(made[i][module]) for i in indices)
        for i in indices:
            calls = made[i][module]
            if calls and short_groups == "fill":
                t = trajectories[i]
                draw = random.Random(repr((seed, t.example, t.rollout, module)))
                calls = calls + [draw.choice(calls) for _ in range(depth - len(calls))]
            for k, c in enumerate(calls):
                places[module, k][i] = (c,)
    if short_groups == "truncate":
        return {place: runs for place, runs in places.items() if len(runs) == len(indices)}
    return places


def _diverse(members: list[Member], k: int) -> list[Member]:
    """k members evenly spaced in the order of reward; all for k = 0.

    k = 1 keeps the worst, which leaves nothing to compare with.
    """
    if not 0 < k < len(members):
        return members
    # stable: ties stay in the order of rollouts
    ranked = sorted(members, key=lambda m: m.reward)
    return [ranked[round(j * (len(members) - 1) / max(k - 1, 1))] for j in range(k)]


def group_calls(
    trajectories: list[Trajectory],
    short_groups: str = "keep",
    group_size: int = 0,
    level: str = "call",
    seed: int | tuple = 0,
) -> list[Group]:
    """Group the calls of voting runs by (example, module, invocation), the paper's relative
    invocation (Eq. 1).

    Runs may be ragged. `keep`: the members are the runs that reached the call. `truncate`: only
    calls that every voting run of the example reached. `fill`: a run with at least one call of the
    module is padded to the longest by drawing among its own (App. A, PadGroups). `group_size` k
    keeps k members evenly spaced in the order of reward (App. A, SelectKDiverseElements).
    level="trajectory" makes one group an example, of whole runs.
    """
    # example -> its voting runs
    runs: dict[int | str, list[int]] = defaultdict(list)
    for i, t in enumerate(trajectories):
        if t.votes:
            runs[t.example].append(i)

    groups = []
    for example, indices in runs.items():
        indices.sort(key=lambda i: trajectories[i].rollout)
        if level == "trajectory":
            places = _whole_runs(trajectories, indices)
        else:
            places = _places(trajectories, indices, short_groups, seed)
        for (module, invocation), calls_of in places.items():
            members = []
            for i, calls in calls_of.items():
                reward = trajectories[i].reward
                assert reward is not None, "a run that votes has a reward"
                members.append(Member(i, calls, reward))
            chosen = _diverse(members, group_size)
            groups.append(Group(example, module, invocation, tuple(chosen)))
    return groups


EPSILON = 1e-4  # added to standard deviations, as TRL does


def advantages(
    groups: list[Group],
    trajectories: list[Trajectory],
    baseline: str = "group",
    leave_one_out: bool = False,
    scale_rewards: str = "std",
) -> list[list[float]]:
    """A = (r - baseline) / (std + 1e-4) for each member of each group (Eq. 2).

    The baseline is the mean reward of the group, or of all voting runs of its example;
    `leave_one_out` takes the member's own out of it. The standard deviation (ddof 1) is that of the
    same rewards, the member's included. Where these are equal, or there is but one, every advantage
    is exactly 0.

    scale_rewards="batch" (REINFORCE++ with baseline, arXiv 2501.03262): one standard deviation for
    the whole step, of all members of all groups around their own baselines,
        sqrt(sum (r - mean)^2 / (members - 1)).
    A group of tiny differences is then not blown up by its own.
    """
    result = []
    # of the members' distances to their means
    squares: list[float] = []
    for g in groups:
        rewards = np.array([m.reward for m in g.members])
        # the rewards that a member's is compared with
        peers = rewards
        if baseline == "example":
            voting = [t for t in trajectories if t.votes and t.example == g.example]
            peers = np.array([t.reward for t in voting])
        a = np.zeros(len(rewards))
        if (peers != peers[0]).any():
            a = rewards - peers.mean()
            squares.extend(a**2)
            if leave_one_out:
                # r - mean of the others
                a *= len(peers) / (len(peers) - 1)
            if scale_rewards == "std":
                a /= peers.std(ddof=1) + EPSILON
        result.append(a)
    if scale_rewards == "batch":
        members = sum(len(a) for a in result)
        # fsum: the same to the last bit in whatever order the groups come
        spread = math.sqrt(math.fsum(squares) / max(members - 1, 1))
        result = [a / (spread + EPSILON) for a in result]
    return [a.tolist() for a in result]


# What of an LM can be read decides whether training must begin with the format.
READABLE = 0.5  # share of the runs that can be read from which on an LM needs no help with it
WARM_ENOUGH = 0.25  # share of a step's calls that can be read from which on a warm start is over
WARM_STEPS = 12  # of a warm start that the program decides upon


def readable(groups: list[Group], trajectories: list[Trajectory]) -> list[list[float]]:
    """In the place of advantages, for a warm start: 1 for each member all of whose calls could be
    read, else 0.

    The step is then supervised training on the LM's own readable calls (rejection sampling
    fine-tuning, as in arXiv 2308.01825, with readability in the place of a right answer): where the
    ratio is 1, the loss's gradient is that of -sum_t w_t log pi_t.
    """

    def was_read(m: Member) -> bool:
        calls = trajectories[m.trajectory].calls
        return all(calls[c].outputs is not None for c in m.calls)

    result = []
    for g in groups:
        result.append([float(was_read(m)) for m in g.members])
    return result


def readable_share(trajectories: list[Trajectory]) -> float:
    """Share of the LM calls whose outputs could be read."""
    calls = [call for t in trajectories for call in t.calls]
    return sum(call.outputs is not None for call in calls) / max(len(calls), 1)


# ---------------------------------------------------------------------------------- loss (Eq. 7, 9)
@dataclass(frozen=True)
class Row:
    """A call in the loss.

    Example: Row("append_notes", Completion(…), advantage=-0.5, weight=0.01)
    """

    module: str
    completion: Completion
    advantage: float
    # of each of its tokens in the step's loss
    weight: float
    # which call of which run, for messages
    where: str = ""
    # [T] log-probs by the training forward at the weights that sampled; with a correction, the
    # first pass over the row leaves them here for the later ones
    trained: list[float] = field(default_factory=list, compare=False, repr=False)


def _count_sampled(calls):
    """How many tokens the LM sampled in these calls."""
    return sum(len(call.completion.token_ids) for call in calls)


def weigh(
    groups: list[Group],
    advantages: list[list[float]],
    trajectories: list[Trajectory],
    normalize: str = "sequence",
    constant: int = 1,
) -> list[Row]:
    """Groups -> rows of the loss, each with its share of the step's mean.

    The weights belong to the whole optimizer step, so no micro-batch split changes them.
    `sequence` (Eq. 7): the mean over groups, over members, over the member's tokens; with
    level="trajectory" the tokens are those of the whole run (Eq. 9). `token` (DAPO, arXiv
    2503.14476): the mean over all tokens of the step. `constant` (Dr. GRPO, arXiv 2503.20783): the
    sum over all tokens, divided by voting runs x `constant`.
    """

    def tokens(m: Member) -> int:
        calls = trajectories[m.trajectory].calls
        return _count_sampled(calls[c] for c in m.calls)

    total = sum(tokens(m) for g in groups for m in g.members)
    runs = sum(t.votes for t in trajectories)
    rows = []
    for g, of_group in zip(groups, advantages):
        for m, a in zip(g.members, of_group):
            weights = {
                "sequence": 1 / (len(groups) * len(g.members) * max(tokens(m), 1)),
                "token": 1 / max(total, 1),
                "constant": 1 / (runs * constant),
            }
            t = trajectories[m.trajectory]
            for c in m.calls:
                call = t.calls[c]
                assert call.completion is not None, "a run that has ended left no call without one"
                place = f"{call.module}[{call.invocation}]"
                where = f"example {t.example}, rollout {t.rollout}, {place}"
                rows.append(Row(call.module, call.completion, a, weights[normalize], where))
    return rows


HEAD_ROWS = 256  # tokens whose logits are held at a time


def _log_softmax(
    hidden: Tensor, head: Tensor, targets: Tensor, temperature: float
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Chunk by chunk, so that nothing of N x V is held.

    Of each chunk: its place among the N, all its log-probs (rows, V), its targets (rows, 1).
    """
    head = fp32_head(head)
    for start in range(0, len(hidden), HEAD_ROWS):
        rows = slice(start, start + HEAD_ROWS)
        logits = fp32_logits(hidden[rows], head).div_(temperature)  # (rows, V)
        yield rows, logits.sub_(logits.logsumexp(-1, keepdim=True)), targets[rows, None]


@torch.no_grad()
def token_logprobs(
    hidden: Tensor, head: Tensor, targets: Tensor, temperature: float = 1.0
) -> Tensor:
    """Log-probs of the targets at the sampling temperature.

    hidden (N, D), head (V, D), targets (N,). Returns (N,) in fp32.
    """
    logprobs = []
    for _, logp, target in _log_softmax(hidden, head, targets, temperature):
        logprobs.append(logp.gather(1, target)[:, 0])
    return torch.cat(logprobs)


@torch.no_grad()
def head_gradient(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    temperature: float,
    loss: Callable[..., Tensor],
    d_head: Tensor | None = None,
    entropies: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probs of the targets, and the gradient of a loss of them, without N x V numbers.

    hidden (N, D), head (V, D), targets (N,). Returns the log-probs (N,) and d loss / d hidden
    (N, D); d loss / d head is added to d_head, fp32 (V, D), if given. `loss(log-probs of a chunk,
    its slice)` must be a sum over tokens: then a chunk's gradient is known as soon as its logits
    are, which are never kept, nor computed a second time.

    `entropies` (N,), if given, is filled with each token's H = -sum_v p_v log p_v, in nats, of the
    whole distribution. The loss then takes a chunk's as its third argument, and has a gradient with
    respect to them as well: dH / dlogit_v = -p_v (log p_v + H) / temperature.
    """
    logprobs = []
    d_hidden = torch.empty_like(hidden)
    for rows, logp, target in _log_softmax(hidden, head, targets, temperature):
        # the loss is a function of these, (rows,) each
        known = [logp.gather(1, target)[:, 0]]
        logprobs.append(known[0])
        if entropies is not None:
            entropies[rows] = -logp.exp().mul_(logp).sum(-1)
            known.append(entropies[rows].clone())
        with torch.enable_grad():
            log_p, *entropy = (x.requires_grad_() for x in known)
            d_log_p, *d_entropy = torch.autograd.grad(loss(log_p, rows, *entropy), known)

        # d loss / d logits = (one-hot - softmax) x d loss / d log-prob / temperature; `pull` is
        # what acts on each logit, per unit of its probability
        d_target = d_log_p[:, None] / temperature  # (rows, 1)
        pull = -d_target
        if entropies is not None:
            d_entropies = d_entropy[0][:, None] / temperature  # (rows, 1)
            pull = pull - d_entropies * (logp + entropies[rows, None])  # (rows, V)
        d_logits = logp.exp_().mul_(pull).scatter_add_(1, target, d_target)  # (rows, V)
        d_hidden[rows] = d_logits.to(head.dtype) @ head
        if d_head is not None:
            d_head.addmm_(d_logits.t(), hidden[rows].float())
    return torch.cat(logprobs).detach(), d_hidden


TIS_CAP = 2.0  # C of truncated importance sampling
ICEPOP_LOW = 0.5  # C_min of IcePop, as in its paper
ICEPOP_HIGH = 5.0  # C_max


def correction_factors(trained: Tensor, sampled: Tensor, correction: str) -> Tensor:
    """The constant c that each token's term of the loss is multiplied by.

    Sampled tokens' log-probs (N,) by the training forward and by the sampler, at the same weights.
    Returns (N,). The two differ where they round differently (bf16): tokens are drawn from the
    sampler's distribution, and the gradient is of the trainer's. With m = pi_trained / pi_sampled,

        tis     c = min(m, C)    truncated importance sampling, fengyao.notion.site/off-policy-rl
        icepop  c = m 1[C_min <= m <= C_max]                            IcePop, arXiv 2510.18855
        none    c = 1; pi_old is then the sampler's, and the clip sees the difference

    This undoes the mismatch of the token itself, not that of what came before and comes after it.
    """
    m = torch.exp(trained - sampled)
    if correction == "tis":
        return m.clamp(max=TIS_CAP)
    if correction == "icepop":
        inside = (m >= ICEPOP_LOW) & (m <= ICEPOP_HIGH)
        # not a product: infinity x 0 is no number
        return torch.where(inside, m, 0.0)
    return torch.ones_like(m)


def sampled_entropy(rows: list[Row]) -> float:
    """Mean -log p of the rows' sampled tokens, in nats: an estimate of the policy's entropy."""
    logprobs = [p for row in rows for p in row.completion.logprobs]
    return -sum(logprobs) / max(len(logprobs), 1)


def entropy_coefficient(entropy: float, target: float, coefficient: float) -> float:
    """The weight of the entropy bonus, alpha = coefficient x max(0, 1 - entropy / target).

    It is 0 without a target. After Skywork-OR1 (arXiv 2505.22312), whose bonus too acts only below
    a target entropy. Theirs adds 0.005 to the weight at every step below the target and takes it
    away above: an integral controller, which ends at the target, and whose weight is one more
    thing to save. This one is proportional, a function of the step's own tokens, so that a step
    needs no history; it settles somewhat below the target, where what the bonus gives balances
    what the rewards take.
    """
    return coefficient * max(0.0, 1 - entropy / target) if target else 0.0


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    beta: float = 0.0,
    ref_logprobs: Tensor | None = None,
    factors: Tensor | None = None,
    alpha: float = 0.0,
    entropies: Tensor | None = None,
) -> Tensor:
    """The mmGRPO loss of N tokens, all tensors (N,): with rho = pi / pi_old,

        L = - sum_t w_t [ c_t min(rho_t A, clip(rho_t, 1 - clip_low, 1 + clip_high) A)
                          - beta KL_t + alpha H_t ]                                         (Eq. 7)

    KL is the k3 estimator r - log r - 1 with r = pi_ref / pi
    (http://joschu.net/blog/kl-approx.html): never negative; over tokens sampled from pi its mean
    is KL(pi || pi_ref), but its gradient's mean is that of KL(pi_ref || pi). Not the paper's: the
    factors c (see correction_factors; without, 1) and the bonus for the entropy H of the token's
    distribution, which ignores that the token decides what comes after it.
    """
    # on fresh rollouts 1, but for dropout and an uncorrected sampler that rounds otherwise;
    # its gradient is then that of log pi
    ratio = torch.exp(logprobs - old_logprobs)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    gain = torch.minimum(ratio * advantages, clipped * advantages)
    if factors is not None:
        gain = factors * gain
    if beta:
        assert ref_logprobs is not None, "a KL needs the log-probs of the reference"
        log_r = ref_logprobs - logprobs
        gain = gain - beta * (log_r.exp() - log_r - 1)
    if alpha:
        assert entropies is not None, "an entropy bonus needs the entropies"
        gain = gain + alpha * entropies
    return -(weights * gain).sum()


# ------------------------------------------------------------------------------------------- update
@dataclass
class Tree:
    """Rows as one sequence of T nodes in which every distinct prefix stands once.

    A node sees its ancestors and itself. Calls of one module begin alike, and often have the same
    prompt: the transformer passes over it once, forward and backward.
    """

    # [T] the nodes' tokens
    ids: list[int] = field(default_factory=list)
    # [T] their depth in the tree
    positions: list[int] = field(default_factory=list)
    # of each row (known, nodes): rows before made so many of its nodes
    paths: list[tuple[int, list[int]]] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    # [N] the nodes whose states predict the rows' sampled tokens
    at: list[int] = field(default_factory=list)


def pack(rows: list[Row], batch_tokens: int) -> list[Tree]:
    """Micro-batches: trees of at most `batch_tokens` nodes, unless one row alone is longer.

    Rows without tokens are left out.
    """
    # the last sampled token predicts nothing
    inputs = []
    for row in rows:
        if row.completion.token_ids:
            ids = row.completion.prompt_ids + row.completion.token_ids[:-1]
            inputs.append((ids, row))
    # in lexical order, rows that share a prefix are neighbours
    inputs.sort(key=lambda pair: pair[0])

    trees: list[Tree] = []
    path: list[int] = []
    before: list[int] = []
    for ids, row in inputs:
        shared = common(ids, before)
        if not trees or len(trees[-1].ids) + len(ids) - shared > batch_tokens:
            trees.append(Tree())
            shared = 0
        tree = trees[-1]
        first = len(tree.ids)
        path = path[:shared] + list(range(first, first + len(ids) - shared))
        tree.ids += ids[shared:]
        tree.positions += range(shared, len(ids))
        tree.paths.append((shared, path))
        tree.rows.append(row)
        tree.at += path[len(row.completion.prompt_ids) - 1 :]
        before = ids
    return trees


def distinct_tokens(rows: list[Row]) -> int:
    """How many nodes the rows have in one tree, where no prefix stands twice."""
    return sum(len(tree.ids) for tree in pack(rows, sys.maxsize))


LEAST_BATCH = 1536  # distinct tokens of a micro-batch, however short its rows are


def tokens_per_batch(model: Transformer, rows: list[Row], config: Config) -> int:
    """Distinct tokens of a micro-batch, where --batch-tokens says nothing: as many as four of the
    longest row.

    Rows that share a prefix are then seldom parted. It is no more than a quarter of the device's
    memory holds.
    """
    if config.batch_tokens:
        return config.batch_tokens
    lengths = [len(r.completion.prompt_ids) + len(r.completion.token_ids) for r in rows]
    wanted = max(LEAST_BATCH, 4 * max(lengths, default=1))
    room = memory_of(model.head.device) // 4 // activation_bytes(model)
    return min(wanted, room)


def predicting_states(model: Transformer | WithoutLoRA, tree: Tree) -> tuple[Tensor, Tensor]:
    """A micro-batch's sampled tokens (N,), row after row, and the states (N, D) that predict them.

    Token t of a completion is predicted at position len(prompt) - 1 + t of its row. Only these
    states reach the vocabulary projection.
    """
    device = model.head.device
    tensor = partial(torch.tensor, device=device)
    attend = TreeAttention(tree.paths, device)
    hidden = model(tensor([tree.ids]), tensor([tree.positions]), attend)[0]  # (T, D)
    # not hidden[at]: on the CPU the gradients of a state that predicts several tokens, as the end
    # of a shared prompt does, would be added in the order in which threads come to them
    states = hidden.index_select(0, tensor(tree.at))  # (N, D)
    targets = tensor([i for row in tree.rows for i in row.completion.token_ids])  # (N,)
    return targets, states


@torch.no_grad()
def batch_logprobs(
    model: Transformer | WithoutLoRA, tree: Tree, temperature: float, vocabulary: int
) -> Tensor:
    """Log-probs (N,) of a micro-batch's sampled tokens."""
    targets, states = predicting_states(model, tree)
    return token_logprobs(states, model.head[:vocabulary], targets, temperature)


def proximal_logprobs(
    model: Transformer,
    tree: Tree,
    sampled: Tensor,
    config: Config,
    vocabulary: int,
    fresh: bool,
) -> Tensor | None:
    """log pi_old (N,) of a micro-batch's sampled tokens.

    The sampler's, or with a correction the training forward's at the weights that sampled. None:
    those that the first pass is about to compute anyway.
    """
    if config.correction == "none":
        return sampled
    if not fresh:
        trained = [p for row in tree.rows for p in row.trained]
        return torch.tensor(trained, device=sampled.device)
    # dropout is in the update alone, and no part of pi_old
    if config.lora_dropout:
        return batch_logprobs(model, tree, config.temperature, vocabulary)
    return None


def keep_proximal(tree: Tree, old: Tensor) -> None:
    """Leave log pi_old (N,) with the micro-batch's rows, for the passes to come."""
    lengths = [len(row.completion.token_ids) for row in tree.rows]
    for row, logprobs in zip(tree.rows, old.split(lengths)):
        row.trained[:] = logprobs.tolist()


@dataclass
class Scored:
    """What a pass over a micro-batch found of its N sampled tokens; tensors are (N,)."""

    # the micro-batch's part of the step's
    loss: float
    advantages: Tensor
    # log-probs: pi, pi_old, the sampler's, and the reference's where the loss has a KL
    logprobs: Tensor
    old: Tensor
    sampled: Tensor
    ref: Tensor | None
    # of the whole distributions, in nats, where the loss has an entropy bonus
    entropies: Tensor | None


def batch_gradient(
    model: Transformer,
    tree: Tree,
    config: Config,
    vocabulary: int,
    reference: Transformer | WithoutLoRA | None,
    fresh: bool,
    alpha: float,
) -> tuple[list[Tensor], Scored]:
    """A micro-batch's part of the step's gradient, one fp32 tensor per parameter (Eq. 7)."""
    # what is known of the tokens: pi_sampled, A, w, and the log-probs of pi_ref and pi_old
    known = []
    for row in tree.rows:
        known += [(p, row.advantage, row.weight) for p in row.completion.logprobs]
    sampled, advantage, weight = torch.tensor(known, device=model.head.device).unbind(1)  # (N,)
    ref = None
    if reference is not None:
        ref = batch_logprobs(reference, tree, config.temperature, vocabulary)
    old = proximal_logprobs(model, tree, sampled, config, vocabulary, fresh)

    def loss(logprobs: Tensor, chunk: slice, entropy: Tensor | None = None) -> Tensor:
        """Eq. 7 over a chunk of the tokens."""
        # before a corrected first pass pi_old is not known: it is pi, without a gradient
        before = logprobs.detach() if old is None else old[chunk]
        return policy_loss(
            logprobs,
            before,
            advantage[chunk],
            weight[chunk],
            config.clip_low,
            config.clip_high,
            config.beta,
            None if ref is None else ref[chunk],
            correction_factors(before, sampled[chunk], config.correction),
            alpha,
            entropy,
        )

    # forward to the states, then back from the loss to the states and the head, chunk by chunk
    targets, states = predicting_states(model, tree)
    head = model.head[:vocabulary]
    # a frozen head needs no gradient
    d_head = None
    if model.head.requires_grad:
        d_head = torch.zeros_like(head, dtype=torch.float)  # (V, D)
    entropies = torch.zeros_like(sampled) if alpha else None
    logprobs, d_states = head_gradient(
        states.detach(), head, targets, config.temperature, loss, d_head, entropies
    )

    # from the states to the weights; a head that is not tied is no part of their graph
    parameters = trainable(model)
    through_states = torch.autograd.grad(states, parameters, d_states, allow_unused=True)
    gradient = []
    for p, g in zip(parameters, through_states):
        g = torch.zeros_like(p, dtype=torch.float) if g is None else g.float()
        if p is model.head and d_head is not None:
            g[:vocabulary] += d_head
        gradient.append(g)

    value = loss(logprobs, slice(None), entropies).item()
    proximal = logprobs if old is None else old
    return gradient, Scored(value, advantage, logprobs, proximal, sampled, ref, entropies)


def add_gradients(total: list[Tensor] | None, more: list[Tensor]) -> list[Tensor]:
    """total + more, in place; None is 0, of which no tensors need to be held."""
    if total is None:
        return more
    torch._foreach_add_(total, more)
    return total


def _take_figures(
    tally: Tally, model: Transformer, tree: Tree, scored: Scored, config: Config, vocabulary: int
) -> None:
    """Count a micro-batch and, on a fresh pass, compare its log-probs with the sampler's."""
    if config.correction != "none":
        factors = correction_factors(scored.old, scored.sampled, config.correction)
        tally.correct(scored.old - scored.sampled, factors)
    tally.batch(tree, scored)
    # under dropout, which was not there when sampling, one micro-batch is scored without it
    if tally.fresh and not (config.lora_dropout and tally.apart):
        logprobs = scored.logprobs
        if config.lora_dropout:
            logprobs = batch_logprobs(model, tree, config.temperature, vocabulary)
        tally.compare(tree, logprobs, scored.sampled)


def step_gradient(
    model: Transformer,
    rows: list[Row],
    config: Config,
    vocabulary: int,
    reference: Transformer | WithoutLoRA | None = None,
    fresh: bool = True,
    alpha: float = 0.0,
) -> tuple[list[Tensor], dict]:
    """The gradient of the step's loss, one fp32 tensor per parameter, and its figures (Tally).

    `fresh`: the weights are still those that sampled; ParityError where the log-probs disagree.
    With a correction the first pass must be a fresh one. `alpha`: the weight of the entropy bonus.
    """
    if config.correction == "auto":
        # fp32 leaves nothing to correct
        low = model.head.dtype != torch.float
        config = dataclasses.replace(config, correction="tis" if low else "none")
    tally = Tally(config, model.head.dtype, fresh)
    batch_tokens = tokens_per_batch(model, rows, config)

    # module by module, to see what each contributes
    total: list[Tensor] | None = None
    for module in sorted({row.module for row in rows}):
        of_module = [row for row in rows if row.module == module]
        tally.sums["distinct"] += distinct_tokens(of_module)
        gradient: list[Tensor] | None = None
        trees = pack(of_module, batch_tokens)
        while trees:
            tree = trees.pop()
            try:
                more, scored = batch_gradient(
                    model, tree, config, vocabulary, reference, fresh, alpha
                )
            except RuntimeError as e:
                # out of memory, for which torch has no one class on all devices
                if "memory" not in str(e) or len(tree.rows) == 1:
                    raise
                trees += pack(tree.rows, len(tree.ids) // 2)
                tally.sums["halved"] += 1
                continue
            gradient = add_gradients(gradient, more)
            if config.correction != "none":
                keep_proximal(tree, scored.old)
            _take_figures(tally, model, tree, scored, config, vocabulary)
        if gradient is not None:
            tally.norms[module] = torch.stack(torch._foreach_norm(gradient)).norm().item()
            total = add_gradients(total, gradient)
    if total is None:
        total = [torch.zeros_like(p, dtype=torch.float) for p in trainable(model)]
    return total, tally.figures()


# -------------------------------------------------------------------------------- the training loop
def epoch_order(epoch: int, count: int, seed: int) -> list[int]:
    """The order in which an epoch takes `count` examples."""
    return random.Random(repr(("order", seed, epoch))).sample(range(count), count)


def batch_of(step: int, size: int, count: int, seed: int) -> list[int]:
    """Which of `count` examples step `step` (from 0) trains on.

    The epochs, each of which has every example once, in an order of its own, are one endless
    stream: a step takes the next `size` of it.
    """
    first = step * size
    last = first + size - 1
    stream: list[int] = []
    for epoch in range(first // count, last // count + 1):
        stream += epoch_order(epoch, count, seed)
    return stream[first % count :][:size]


def play(
    model: Transformer,
    tokenizer: Tokenizer,
    task: Task,
    examples: list[dict],
    config: Config,
    temperature: float,
    step: int,
    **options,
) -> tuple[list[Trajectory], dict]:
    """Run the task's program on the examples under the current weights.

    Returns the trajectories and what they took, in seconds: "sampling", and "tools", which is all
    else (tools that decoding waited for, the program's own Python, prompts made and tokenised).
    """
    began = time.perf_counter()
    sampler = Sampler(
        model,
        tokenizer,
        slots=config.slots,
        max_tokens=config.max_tokens,
        temperature=temperature,
        top_k=config.top_k,
        top_p=config.top_p,
    )
    runs = run_programs(
        task.program,
        examples,
        task.metric,
        sampler,
        seed=config.seed,
        step=step,
        max_calls=config.max_calls,
        failure_score=config.failure_score,
        format_failure_score=config.format_failure_score,
        **options,
    )
    tools = time.perf_counter() - began - sampler.seconds
    return runs, {"sampling": sampler.seconds, "tools": tools}


def evaluate(
    model: Transformer,
    tokenizer: Tokenizer,
    task: Task,
    examples: list[dict],
    config: Config,
    temperature: float,
    step: int = -1,
) -> dict:
    """Mean score of one run per example, its standard error, and how the runs ended.

    A run that did not complete scores failure_score. The random numbers are the same at every
    evaluation of a `step`.
    """
    seed = config.dev_seed if config.dev_seed >= 0 else config.seed
    config = dataclasses.replace(config, seed=seed)
    runs, seconds = play(model, tokenizer, task, examples, config, temperature, step)
    scores = np.array([t.reward if t.status == "completed" else config.failure_score for t in runs])
    spread = scores.std(ddof=1 if len(scores) > 1 else 0)
    measures = {}
    for name in sorted({name for t in runs for name in t.measures}):
        measures[name] = np.mean([t.measures[name] for t in runs if name in t.measures])
    return {
        "score": scores.mean(),
        "stderr": spread / math.sqrt(len(scores)),
        "statuses": statuses(runs),
        "measures": measures,
        "rollouts": len(runs),
        "tokens": sum(_count_sampled(t.calls) for t in runs),
        "seconds": sum(seconds.values()),
    }


def prepare(
    model: Transformer, config: Config
) -> tuple[torch.optim.Optimizer, Transformer | WithoutLoRA | None]:
    """Put LoRA on where the options ask for it, and make what the training needs beside the LM.

    Returns the optimizer, of fp32 masters (a small step must not be rounded away), and the frozen
    start where the loss has a KL.
    """
    if config.lora_rank:
        targets = tuple(config.lora_targets.split(","))
        add_lora(
            model, config.lora_rank, config.lora_alpha, config.lora_dropout, targets, config.seed
        )
    masters = [p.detach().float().clone().requires_grad_() for p in trainable(model)]
    reference: Transformer | WithoutLoRA | None = None
    if config.beta and config.lora_rank:
        reference = WithoutLoRA(model)
    elif config.beta:
        reference = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(masters, weight_decay=config.weight_decay, fused=True)
    return optimizer, reference


def learning_rate(model: Transformer, config: Config) -> float:
    """--lr, or what suits the LM.

    5e-4 for one of width 128, 2.5e-5 of 576, 5e-7 of 4,096; with LoRA ten times that.
    """
    if config.lr:
        return config.lr
    lr = 5e-4 * min(1, 128 / model.config.hidden_size) ** 2
    return 10 * lr if config.lora_rank else lr


def sample_step(
    model: Transformer, tokenizer: Tokenizer, task: Task, config: Config, step: int
) -> tuple[list[Trajectory], dict]:
    """The rollouts of a step, as `play` gives them.

    They are a function of the weights, the task, the options and the step.
    """
    batch = batch_of(step, config.examples, len(task.train), config.seed)
    examples = [task.train[i] for i in batch]
    return play(
        model,
        tokenizer,
        task,
        examples,
        config,
        config.temperature,
        step,
        rollouts=config.rollouts,
        interrupt=config.interrupt,
    )


def _check_rollouts(trajectories: list[Trajectory], step: int) -> None:
    """Raises StoppedError or ProgramError where a step's rollouts cannot be trained on."""
    if unfit := too_many_excluded(trajectories):
        raise StoppedError(f"step {step + 1}: {unfit}")
    if not any(t.votes and t.calls for t in trajectories):
        ends = ", ".join(f"{n} {status}" for status, n in statuses(trajectories).items() if n)
        raise ProgramError(
            f"step {step + 1}: there is nothing to train: no run gave both LM calls and a reward "
            f"({ends}; the first: {trajectories[0].error or 'no LM calls'})"
        )


def train_step(
    model: Transformer,
    tokenizer: Tokenizer,
    optimizer: torch.optim.Optimizer,
    reference: Transformer | WithoutLoRA | None,
    task: Task,
    config: Config,
    step: int,
    watch: Callable[[list[Trajectory]], None] = lambda trajectories: None,
) -> dict:
    """One step of mmGRPO: sample, group, compare, weigh, update. Returns what is to be known of it.

    `watch` sees the rollouts. Raises StoppedError, with nothing changed, where most are excluded.
    """
    # 1. sample: R runs of the program on each of B examples
    trajectories, seconds = sample_step(model, tokenizer, task, config, step)
    watch(trajectories)
    _check_rollouts(trajectories, step)
    began = time.perf_counter()

    # 2. group: the k-th calls of module m over the runs of an example (Eq. 1)
    seed = (config.seed, step)
    groups = group_calls(trajectories, config.short_groups, config.group_size, config.level, seed)

    # 3. compare: A = (r - mean) / std of the group (Eq. 2)
    values = advantages(
        groups, trajectories, config.baseline, config.leave_one_out, config.scale_rewards
    )
    # not the paper's: an LM that can hardly follow the format learns it first
    warm = step < config.warm_start and 0 < readable_share(trajectories) < WARM_ENOUGH
    if warm:
        values = readable(groups, trajectories)

    # 4. weigh: each call's share of the step's mean (Eq. 7)
    rows = weigh(groups, values, trajectories, config.normalize, config.max_tokens)
    # not the paper's: a bonus for entropy, while there is less of it than the target
    entropy = sampled_entropy(rows)
    alpha = entropy_coefficient(entropy, config.entropy_target, config.entropy_coef)
    # the gradient of the others is exactly 0
    rows = [row for row in rows if row.advantage or config.beta or alpha]

    # figures of what was sampled
    metrics: dict = {"step": step + 1}
    if warm:
        metrics["warm_start"] = True
    metrics |= measure(trajectories, groups, values)
    if config.entropy_target:
        metrics |= {"entropy_sampled": entropy, "entropy_alpha": alpha}
    if not metrics["calls"]["trained"]:
        metrics["idle"] = nothing_to_learn(trajectories, config)

    # 5., 6. update: inner_epochs times, on the same rollouts
    [param_group] = optimizer.param_groups
    masters = param_group["params"]
    warmed_up = min(1.0, (step + 1) / max(config.warmup, 1))
    param_group["lr"] = learning_rate(model, config) * warmed_up
    # for LoRA's dropout; all else has seeds of its own
    torch.manual_seed((config.seed * 1_000_003 + step) % 2**63)
    for epoch in range(config.inner_epochs):
        gradient, figures = step_gradient(
            model, rows, config, tokenizer.size, reference, fresh=epoch == 0, alpha=alpha
        )
        metrics |= figures
        for p, g in zip(masters, gradient):
            p.grad = g
        norm = torch.nn.utils.clip_grad_norm_(masters, config.clip_norm)
        metrics["grad_norm"] = norm.item()
        if not math.isfinite(metrics["grad_norm"]):
            metrics["skipped"] = True
            break
        # without rows momentum alone would go on where the last steps led
        if rows:
            optimizer.step()
        # a gradient is as large as the weights: free it
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_copy_(tuple(trainable(model)), masters)

    for module, share in metrics.pop("grad_share").items():
        metrics["modules"][module]["grad_share"] = share
    seconds = seconds | {"update": time.perf_counter() - began}
    return metrics | {"lr": param_group["lr"], "seconds": seconds}


def settled(config: Config, first: dict) -> Config:
    """The options, with what depends on how the LM starts.

    `first` is the first dev evaluation, sampled.
    """
    if config.warm_start >= 0:
        return config
    unread = first["statuses"]["format_error"] + first["statuses"]["length"]
    few = unread > (1 - READABLE) * first["rollouts"]
    return dataclasses.replace(config, warm_start=WARM_STEPS if few else 0)


def check_sampling(config: Config) -> None:
    """Raises InputError where the distribution sampled would not be the one trained."""
    options = (
        ("top_k", config.top_k),
        ("top_p", config.top_p < 1),
        ("temperature", config.temperature == 0),
    )
    for name, wrong in options:
        if wrong:
            flag = f"--{name.replace('_', '-')}"
            raise InputError(
                f"{flag} {getattr(config, name)}: for evaluation only; what is sampled is trained"
            )


def _check_no_adapter(model: Transformer, config: Config) -> None:
    """Raises InputError where the LM to train has LoRA already."""
    if lora_layers(model):
        raise InputError(
            f"--model {config.model}: is a LoRA adapter; merge it first (`merge ADAPTER OUT`), "
            "then train what came of it"
        )


def _tell_dev(bar: tqdm, step: int, sampled: dict, greedy: dict) -> None:
    """Print the scores of the dev split after `step` steps."""
    ends = ", ".join(f"{n} {status}" for status, n in sampled["statuses"].items() if n)
    bar.write(
        f"step {step:4d}  dev {sampled['score']:.3f} ± {sampled['stderr']:.3f}  "
        f"greedy {greedy['score']:.3f}  {ends}"
    )


def _tell_warm_start(bar: tqdm, steps: int) -> None:
    """Print what the first steps may train on instead of rewards."""
    bar.write(
        f"warm start: of the first {steps} steps those less than a quarter of "
        "whose calls can be read train on the calls that could be, whatever they earned"
    )


def _show_first(
    bar: tqdm, task: Task, config: Config, step: int, trajectories: list[Trajectory]
) -> None:
    """Print, now and then, the first run of the step's first example."""
    if config.show_every and step % config.show_every == 0:
        first = batch_of(step, config.examples, len(task.train), config.seed)[0]
        expected = expected_of(task.program, task.train[first])
        trace = show(trajectories[0], expected=expected, longest=300)
        bar.write(f"step {step + 1:4d}, the first of its runs:\n{trace}")


def _tell_step(bar: tqdm, journal: Journal, history: list[dict]) -> None:
    """Write the last step of the history down, and show on the terminal how it went."""
    metrics = history[-1]
    if sentence := collapsed(history):
        metrics["collapse"] = sentence
    journal.write(metrics)
    reward = f"{metrics['reward']:.3f}"
    entropy = f"{metrics['surprise']:.3f}"
    bar.set_postfix(reward=reward, entropy=entropy, refresh=False)
    # there is no terminal to draw it on
    if bar.disable:
        print(step_line(metrics), file=sys.stderr, flush=True)
    for remark in remarks(history):
        bar.write(remark, file=sys.stderr)


def train(
    task: Task,
    model: Transformer,
    tokenizer: Tokenizer,
    config: Config,
    out: Path,
    stop: Callable[[], bool] = lambda: False,
) -> list[float]:
    """Train model's weights in place; return the dev scores, the first before any step.

    What it leaves in the folder `out` is in docs/training.md ("What a run leaves"), but for the
    options, which the command line writes. A run that was interrupted there goes on; it ends early
    once stop() is true.

    Raises StoppedError where it would get nowhere, and ProgramError for a bug in the program or the
    metric, both with the state saved; ParityError and FloatingPointError where sampled and trained
    log-probs are too far apart or not finite, to be gone on with from the last evaluation.
    """
    check_sampling(config)
    _check_no_adapter(model, config)
    save = partial(save_adapter, base=config.model) if config.lora_rank else save_pretrained
    # before load_state: the reference is the start, always
    optimizer, reference = prepare(model, config)
    options = kept_options(config, task.program)
    dev = task.dev[: config.eval_examples or None]

    # from the start, or from where an earlier run in this folder was interrupted
    out.mkdir(parents=True, exist_ok=True)
    start, scores = load_state(out, model, optimizer, options)
    # the lines of all steps so far
    history, evaluations = read_metrics(out) if scores else ([], [])
    journal = Journal(out, append=bool(scores), log=config.log, options=options)
    bar = tqdm(
        range(start, config.steps),
        desc=config.task,
        unit="step",
        disable=None,
        initial=start,
        total=config.steps,
    )

    def keep(step: int):
        """Save the state for a training that is about to stop, unless it just was."""
        if step_of(states(out)[-1]) < step:
            save_state(out, step, optimizer, scores, options)

    def due(step: int) -> bool:
        return step % config.eval_every == 0 or step == config.steps

    def check(step: int):
        """Score the dev split as trained (sampled) and greedily; keep the weights and the state.

        The weights are kept as `last`, the best as `best`.
        """
        try:
            sampled = evaluate(model, tokenizer, task, dev, config, config.temperature)
            greedy = evaluate(model, tokenizer, task, dev, config, 0.0)
        except ProgramError:
            # the steps since the last state
            if scores:
                keep(step)
            raise
        journal.write({"step": step, "dev": {"sampled": sampled, "greedy": greedy}})
        save(model, tokenizer, out / "last")
        if sampled["score"] > max(scores, default=-math.inf):
            save(model, tokenizer, out / "best")
        scores.append(sampled["score"])
        save_state(out, step, optimizer, scores, options)
        _tell_dev(bar, step, sampled, greedy)

    if not scores:
        check(0)
    # the last evaluation of an earlier run failed
    elif due(start) and evaluations[-1]["step"] < start:
        check(start)
    config = settled(config, first_evaluation(out))
    if config.warm_start > start:
        _tell_warm_start(bar, config.warm_start)
    for step in bar:
        watch = partial(_show_first, bar, task, config, step)
        try:
            metrics = train_step(model, tokenizer, optimizer, reference, task, config, step, watch)
        except (StoppedError, ProgramError):
            # the weights are as they were before the step
            keep(step)
            raise
        history.append(metrics)
        _tell_step(bar, journal, history)
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
            raise StoppedError(
                f"{idle} steps in a row taught nothing (--patience {config.patience}): "
                f"{metrics['idle']}"
            )
    journal.close()
    plot(out)
    return scores


if __name__ == "__main__":
    # the command line imports this very file
    sys.modules["mmgrpo"] = sys.modules["__main__"]
    from run.cli import main

    sys.exit(main(sys.argv[1:]))
