"""The figures of a training step, for metrics.jsonl, and the parity gate.

The gate compares the log-probs that the sampler gave its tokens with those of the training forward,
and stops a run in which they are too far apart: then one of the two is wrong.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from run.terminal import kind_of, statuses

if TYPE_CHECKING:
    from mmgrpo import Row, Scored, Tree


# ------------------------------------------------------------------------ what a step has sampled
def _of_module(name: str, calls: list, voting: list, advantages: list[list[float]]) -> dict:
    """The figures of one module; `advantages` are those of its groups.

    Its calls and tokens; `entropy`, the surprise of its own tokens (None: it has none); `survival`,
    the share of voting runs that reached its k-th call; `zero_variance`, the share of its groups
    whose advantages are all 0; `advantage_scale`, the mean size of its advantages.
    """
    own = [c for c in calls if c.module == name]
    surprises = [-x for c in own for x in c.completion.logprobs]
    # of each voting run, how often it called the module
    reached = [sum(c.module == name for c in t.calls) for t in voting]
    depth = max(reached, default=0)
    idle = [not any(group) for group in advantages]
    sizes = [abs(a) for group in advantages for a in group]
    survival = []
    for k in range(depth):
        survival.append(np.mean([n > k for n in reached]))
    return {
        "calls": len(own),
        "tokens": len(surprises),
        "entropy": np.mean(surprises) if surprises else None,
        "survival": survival,
        "zero_variance": np.mean(idle) if idle else None,
        "advantage_scale": np.mean(sizes) if sizes else None,
    }


def measure(trajectories: list, groups: list, advantages: list[list[float]]) -> dict:
    """A step's rollouts and groups in figures, for metrics.jsonl.

    Calls: made = trained + zero_advantage + excluded, the last being those of runs that do not vote
    and those that `short_groups` or `group_size` left out. `surprise` is the mean −log p of the
    sampled tokens, an unbiased estimate of the entropy that the LM had where it sampled, in nats a
    token. `reward_completed` is the mean of completed runs (None: there are none). `errors` counts
    the excluded runs by kind of failure. `digest` tells the sampled tokens of two steps apart.
    `modules` has the figures of each module (_of_module).
    """
    calls = [c for t in trajectories for c in t.calls]
    voting = [t for t in trajectories if t.votes]
    rewards = [t.reward for t in voting]
    completed = [t.reward for t in voting if t.status == "completed"]

    # of each grouped call, by its run and its place there, the size of its advantages
    grouped: dict[tuple[int, int], float] = defaultdict(float)
    # of each module, the advantages of its groups
    advantages_of: dict[str, list[list[float]]] = defaultdict(list)
    for g, values in zip(groups, advantages):
        advantages_of[g.module].append(values)
        for m, a in zip(g.members, values):
            for c in m.calls:
                grouped[m.trajectory, c] += abs(a)
    trained = sum(size > 0 for size in grouped.values())

    modules = {}
    for name in sorted({c.module for c in calls}):
        modules[name] = _of_module(name, calls, voting, advantages_of[name])
    logprobs = [x for c in calls for x in c.completion.logprobs]
    sampled = repr([c.completion.token_ids for c in calls]).encode()
    return {
        "reward": np.mean(rewards),
        "reward_std": np.std(rewards),
        "reward_completed": np.mean(completed) if completed else None,
        "errors": Counter(kind_of(t.error) for t in trajectories if not t.votes),
        "digest": hashlib.blake2b(sampled, digest_size=16).hexdigest(),
        "statuses": statuses(trajectories),
        "surprise": -np.mean(logprobs) if logprobs else 0.0,
        "calls": {
            "made": len(calls),
            "trained": trained,
            "zero_advantage": len(grouped) - trained,
            "excluded": len(calls) - len(grouped),
        },
        "modules": modules,
    }


# ------------------------------------------------------------------- what a pass over it has found
class ParityError(RuntimeError):
    """The sampler and the training forward disagree about the log-prob of a sampled token.

    One of them is wrong.
    """


def _nth_token(rows: list[Row], n: int) -> tuple[Row, int]:
    """The row that the n-th of all sampled tokens is of, and its place there."""
    for row in rows:
        if n < len(row.completion.token_ids):
            return row, n
        n -= len(row.completion.token_ids)
    raise IndexError(n)


class Tally:
    """The figures of one pass over a step's rows, and the parity gate.

    Loss, mean KL (k3), share of clipped tokens; tokens forwarded, and how many that were without
    sharing prefixes; micro-batches halved for want of memory; each module's share of the gradient
    norms. At the first pass (`fresh`) also how far the log-probs are from the sampler's (`parity`:
    median, 99% quantile, maximum; with dropout, which is in the update alone, those of one
    micro-batch scored without it).

    With a correction: `correction` has the mean of its factors, the smallest and the largest ratio
    of trained to sampled probability, and the share of tokens whose ratio was truncated or dropped.
    With an entropy bonus: `entropy`, nats per token of the whole distributions, which `surprise`
    estimates.
    """

    def __init__(self, config, dtype: torch.dtype, fresh: bool):
        self.config = config
        self.fresh = fresh
        # what is added up over the micro-batches
        self.sums: Counter = Counter()
        # module -> the norm of its gradient
        self.norms: dict[str, float] = {}
        # of each micro-batch the extremes of trained to sampled probability, with a correction
        self.ratios: list[float] = []
        self.has_entropy = False

        # of each micro-batch how far apart its log-probs are, where it was compared
        self.apart: list[Tensor] = []
        # the largest of these, and which token of which call it is
        self.worst = (-1.0, "")
        most = config.parity or (1e-3 if dtype == torch.float32 else 2.0)
        self.bounds = {"median": most / 40, "q99": most / 4, "max": most}

    @torch.no_grad()
    def batch(self, tree: Tree, scored: Scored) -> None:
        """Count a micro-batch."""
        ratio = torch.exp(scored.logprobs - scored.old)
        too_low = (ratio < 1 - self.config.clip_low) & (scored.advantages < 0)
        too_high = (ratio > 1 + self.config.clip_high) & (scored.advantages > 0)
        kl = 0.0
        if scored.ref is not None:
            log_r = scored.ref - scored.logprobs
            kl = (torch.exp(log_r) - log_r - 1).sum().item()
        self.sums.update(
            loss=scored.loss,
            tokens=len(scored.old),
            clipped=(too_low | too_high).sum().item(),
            kl=kl,
            forwarded=len(tree.ids),
            unshared=sum(len(path) for _, path in tree.paths),
        )
        if scored.entropies is not None:
            self.has_entropy = True
            self.sums["entropy"] += scored.entropies.sum().item()

    def correct(self, apart: Tensor, factors: Tensor) -> None:
        """Count the factors (N,) of a correction; `apart` (N,): log pi_trained - log pi_sampled."""
        ratio = apart.exp()
        self.ratios += [ratio.min().item(), ratio.max().item()]
        changed = (factors != ratio).sum().item()
        self.sums.update(factors=factors.sum().item(), changed=changed)

    def compare(self, tree: Tree, logprobs: Tensor, sampled: Tensor) -> None:
        """Note how far a micro-batch's log-probs (N,) are from the sampler's, and where most."""
        # NaN is too far
        apart = (logprobs - sampled).abs().cpu().nan_to_num(math.inf)
        self.apart.append(apart)
        if apart.max() > self.worst[0]:
            n = int(apart.argmax())
            row, token = _nth_token(tree.rows, n)
            self.worst = (
                float(apart[n]),
                f"{row.where}: token {token} (id {row.completion.token_ids[token]}): log-prob "
                f"{sampled[n]:.4f} when sampled, {logprobs[n]:.4f} in training",
            )

    def parity(self) -> dict[str, float]:
        """How far sampled and trained log-probs are apart: median, 99% quantile, maximum.

        Rounding moves all three little by little, a fault moves one of them far: the bounds are
        some four times what healthy steps show (measured in bf16 on a 135M LM: median 0.013, 99%
        0.16, maximum 0.5). Raises ParityError naming the worst token where one of them is passed.
        """
        apart = torch.cat(self.apart) if self.apart else torch.zeros(1)
        found = apart.quantile(torch.tensor([0.5, 0.99, 1.0])).tolist()
        parity = dict(zip(self.bounds, found))
        for name, bound in self.bounds.items():
            # not >: NaN passes no bound
            if not parity[name] <= bound:
                raise ParityError(
                    f"{self.worst[1]}; the {name} of the step is {parity[name]:.4g}, at most "
                    f"{bound:.4g} is tolerated (--parity)"
                )
        return parity

    def figures(self) -> dict:
        """What goes into metrics.jsonl. Raises ParityError (see `parity`)."""
        sums = self.sums
        tokens = max(sums["tokens"], 1)
        norm = sum(self.norms.values()) or 1
        figures = {
            "loss": sums["loss"],
            "kl": sums["kl"] / tokens,
            "clipped": sums["clipped"] / tokens,
            "tokens_distinct": sums["distinct"],
            "tokens_forwarded": sums["forwarded"],
            "tokens_unshared": sums["unshared"],
            "halved": sums["halved"],
            "grad_share": {module: x / norm for module, x in self.norms.items()},
        }
        if self.fresh:
            figures["parity"] = self.parity()
        if self.ratios:
            figures["correction"] = {
                "mean": sums["factors"] / tokens,
                "min": min(self.ratios),
                "max": max(self.ratios),
                "share": sums["changed"] / tokens,
            }
        if self.has_entropy:
            figures["entropy"] = sums["entropy"] / tokens
        return figures
