"""The figures of a training step, for metrics.jsonl, and the parity gate.

The gate compares the log-probs that the sampler gave its tokens with those of the training forward,
and stops a run in which they are too far apart: then one of the two is wrong.
"""
from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict

import numpy as np
import torch
from torch import Tensor

from run.terminal import kind_of, statuses


def measure(trajectories: list, groups: list, advantages: list[list[float]]) -> dict:
    """A step's rollouts and groups in figures, for metrics.jsonl.

    Calls: made = trained + zero_advantage + excluded, the last being those of runs that do not vote and those that
    `short_groups` or `group_size` left out.
    Entropy: `surprise` is the mean −log p of the sampled tokens, an unbiased estimate of the entropy that the
    LM had where it sampled, in nats a token; each module's `entropy` is that of its own tokens (None: it has none).
    Of each module also: calls and tokens, the share of voting runs that reached its k-th call (`survival`), the share
    of its groups whose advantages are all 0 (`zero_variance`), and the mean size of its advantages.
    `reward_completed` is the mean of completed runs (None: there are none). `errors` counts the excluded runs by
    kind of failure. `digest` tells the sampled tokens of two steps apart.
    """
    grouped, of_module = defaultdict(float), defaultdict(list)
    for g, values in zip(groups, advantages):
        of_module[g.module].append(values)
        for m, a in zip(g.members, values):
            for c in m.calls:
                grouped[m.trajectory, c] += abs(a)
    calls = [c for t in trajectories for c in t.calls]
    voting = [t for t in trajectories if t.votes]
    trained = sum(size > 0 for size in grouped.values())
    modules = {}
    for name in sorted({c.module for c in calls}):
        own, values = [c for c in calls if c.module == name], of_module[name]
        reached = [sum(c.module == name for c in t.calls) for t in voting]
        sizes = [abs(a) for group in values for a in group]
        surprises = [-x for c in own for x in c.completion.logprobs]
        modules[name] = {"calls": len(own), "tokens": len(surprises),
                         "entropy": np.mean(surprises) if surprises else None,
                         "survival": [np.mean([n > k for n in reached]) for k in range(max(reached, default=0))],
                         "zero_variance": np.mean([not any(group) for group in values]) if values else None,
                         "advantage_scale": np.mean(sizes) if sizes else None}
    logprobs = [x for c in calls for x in c.completion.logprobs]
    digest = hashlib.blake2b(repr([c.completion.token_ids for c in calls]).encode(), digest_size=16).hexdigest()
    completed = [t.reward for t in voting if t.status == "completed"]
    return {"reward": np.mean([t.reward for t in voting]), "reward_std": np.std([t.reward for t in voting]),
            "reward_completed": np.mean(completed) if completed else None,
            "errors": Counter(kind_of(t.error) for t in trajectories if not t.votes),
            "digest": digest, "statuses": statuses(trajectories), "surprise": -np.mean(logprobs) if logprobs else 0.0,
            "calls": {"made": len(calls), "trained": trained, "zero_advantage": len(grouped) - trained,
                      "excluded": len(calls) - len(grouped)}, "modules": modules}


class ParityError(RuntimeError):
    """The sampler and the training forward disagree about the log-prob of a sampled token; one of them is wrong."""


class Tally:
    """The figures of one pass over a step's rows: loss, mean KL (k3), share of clipped tokens, tokens forwarded and how many that
    were without sharing prefixes, micro-batches halved for want of memory, each module's share of the gradient norms; at the
    first pass (`fresh`) also how far the log-probs are from the sampler's (`parity`: median, 99% quantile, maximum; with dropout,
    which is in the update alone, those of one micro-batch scored without it).

    With a correction: `correction` has the mean of its factors, the smallest and the largest ratio of
    trained to sampled probability, and the share of tokens whose ratio was truncated or dropped. With an
    entropy bonus: `entropy`, nats per token of the whole distributions (`surprise` estimates it)."""
    def __init__(self, config, dtype: torch.dtype, fresh: bool):
        self.config, self.fresh, self.norms, self.sums, self.apart = config, fresh, {}, Counter(), []
        self.ratios, self.has_entropy = [], False
        self.worst = (-1.0, "")         # how far apart, and which token of which call
        most = config.parity or (1e-3 if dtype == torch.float32 else 2.0)
        self.bounds = {"median": most / 40, "q99": most / 4, "max": most}

    @torch.no_grad()
    def batch(self, tree, loss: float, logprobs: Tensor, old: Tensor, advantage: Tensor, ref: Tensor | None,
              entropies: Tensor | None = None) -> None:
        """Count a micro-batch."""
        ratio, c = torch.exp(logprobs - old), self.config
        clipped = (ratio < 1 - c.clip_low) & (advantage < 0) | (ratio > 1 + c.clip_high) & (advantage > 0)
        kl = 0.0 if ref is None else (torch.exp(ref - logprobs) - (ref - logprobs) - 1).sum().item()
        self.sums.update(loss=loss, tokens=len(old), clipped=clipped.sum().item(), kl=kl, forwarded=len(tree.ids),
                         unshared=sum(len(path) for _, path in tree.paths))
        if entropies is not None:
            self.has_entropy = True
            self.sums["entropy"] += entropies.sum().item()

    def correct(self, apart: Tensor, factors: Tensor) -> None:
        """Count the factors (N,) of a correction; `apart` (N,): log pi_trained - log pi_sampled."""
        ratio = apart.exp()
        self.ratios += [ratio.min().item(), ratio.max().item()]
        self.sums.update(factors=factors.sum().item(), changed=(factors != ratio).sum().item())

    def compare(self, tree, logprobs: Tensor, sampled: Tensor) -> None:
        """Take down how far a micro-batch's log-probs (N,) are from the sampler's, and where most."""
        apart = (logprobs - sampled).abs().cpu().nan_to_num(math.inf)           # NaN is too far
        self.apart.append(apart)
        if apart.max() > self.worst[0]:
            at = int(apart.argmax())
            row, token = [(row, token) for row in tree.rows for token in range(len(row.completion.token_ids))][at]
            self.worst = (float(apart[at]), f"{row.where}: token {token} (id {row.completion.token_ids[token]}): log-prob "
                                            f"{sampled[at]:.4f} when sampled, {logprobs[at]:.4f} in training")

    def parity(self) -> dict[str, float]:
        """How far sampled and trained log-probs are apart over the pass: median, 99% quantile, maximum.

        Rounding moves all three little by little, a fault moves one of them far: the bounds are some four times what healthy
        steps show (docs: measured in bf16 on a 135M LM, median 0.013, 99% 0.16, maximum 0.5). Raises ParityError naming the worst
        token where one of them is passed."""
        apart = torch.cat(self.apart) if self.apart else torch.zeros(1)
        found = apart.quantile(torch.tensor([0.5, 0.99, 1.0])).tolist()
        parity = dict(zip(self.bounds, found))
        for name, bound in self.bounds.items():
            if not parity[name] <= bound:
                raise ParityError(f"{self.worst[1]}; the {name} of the step is {parity[name]:.4g}, at most {bound:.4g} is "
                                  "tolerated (--parity)")
        return parity

    def figures(self) -> dict:
        n, norm = max(self.sums["tokens"], 1), sum(self.norms.values()) or 1
        more: dict = {}
        if self.ratios:
            more["correction"] = {"mean": self.sums["factors"] / n, "min": min(self.ratios), "max": max(self.ratios),
                                  "share": self.sums["changed"] / n}
        if self.has_entropy:
            more["entropy"] = self.sums["entropy"] / n
        return {"loss": self.sums["loss"], "kl": self.sums["kl"] / n, "clipped": self.sums["clipped"] / n,
                "tokens_distinct": self.sums["distinct"], "tokens_forwarded": self.sums["forwarded"],
                "tokens_unshared": self.sums["unshared"],
                "halved": self.sums["halved"], "grad_share": {m: x / norm for m, x in self.norms.items()},
                **({"parity": self.parity()} if self.fresh else {}), **more}
