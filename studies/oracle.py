"""The exact gradient, and what each estimator makes of it: `make oracle`.

A program so small that every run can be written down: module `ask` answers with up to two of three tokens, module `note`
is called after it once, twice or not at all, and an answer without its end token fails. The policy is a softmax table. So
the policy gradient is a finite sum, and so is the expectation of an estimator: over every R-tuple of runs, through the
very functions that train (group_calls, advantages, weigh). What remains is bias, exactly.

A second table is of a sampler whose probabilities are not quite those of the policy that is trained, as with bf16: what
that does to the one unbiased estimator, and what --correction takes back.

    python -m studies.oracle [R]          # default 3
"""
import itertools
import math
import random
import sys
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import torch

import mmgrpo as G
from program import Call, Completion, Trajectory

END, TOKENS, LIMIT = 2, 3, 2
CONTEXTS = ("ask", "note after 0", "note after 1", "note again")        # prompts; ask's answer and the invocation tell them


def completions() -> list[tuple[int, ...]]:
    """Every completion: ends with END, or is cut at LIMIT tokens."""
    return [c for n in range(1, LIMIT + 1) for c in itertools.product(range(TOKENS), repeat=n)
            if END not in c[:-1] and (c[-1] == END or n == LIMIT)]


@dataclass
class Run:
    """One possible run: its probability, reward, and its calls with the gradient of each one's log-probability (P,);
    how often it is sampled, and its calls token by token."""
    probability: float
    reward: float
    failed: bool
    calls: list[tuple[str, tuple[int, ...], np.ndarray]]
    sampled: float
    tokens: list["Tokens"]


@dataclass
class Tokens:
    """The T tokens of a completion: their log-probs (T,) under the policy and under the sampler, and the gradient of the
    former (T, P)."""
    trained: np.ndarray
    sampled: np.ndarray
    gradient: np.ndarray


def softmax(logits: np.ndarray) -> np.ndarray:
    p = np.exp(logits - logits.max())
    return p / p.sum()


class World:
    """The program under a random policy with logits (contexts, first token or none, tokens).

    `sampler(logits, rng)` gives the logits of what the runs are sampled from; default: the policy itself."""
    def __init__(self, seed: int = 0, sampler=lambda logits, rng: logits):
        rng = np.random.default_rng(seed)
        self.logits = rng.normal(0, 0.7, (len(CONTEXTS), TOKENS, TOKENS))       # [., END, .]: nothing was sampled yet
        self.sampler_logits = sampler(self.logits, rng)
        self.rewards = random.Random(seed)
        self.runs = self._runs()
        self.gradient = sum(r.probability * r.reward * sum(g for _, _, g in r.calls) for r in self.runs)

    def _call(self, context: str, completion: tuple[int, ...]) -> Tokens:
        c, before = CONTEXTS.index(context), END
        trained, sampled = np.zeros((2, len(completion)))
        gradient = np.zeros((len(completion), *self.logits.shape))
        for t, token in enumerate(completion):
            p, of_sampler = (softmax(logits[c, before]) for logits in (self.logits, self.sampler_logits))
            trained[t], sampled[t] = math.log(p[token]), math.log(of_sampler[token])
            gradient[t, c, before] -= p
            gradient[t, c, before, token] += 1
            before = token
        return Tokens(trained, sampled, gradient.reshape(len(completion), -1))

    def _runs(self) -> list[Run]:
        finished = []

        def go(calls: list, tokens: list[Tokens], context: str):
            for completion in completions():
                known = tokens + [self._call(context, completion)]
                made = calls + [(context.split()[0], completion, known[-1].gradient.sum(0))]
                readable = completion[-1] == END
                again = {"ask": {0: "note after 0", 1: "note after 1"}, "note after 1": {0: "note again", 1: "note again"}}
                after = again.get(context, {}).get(completion[0]) if readable else None
                if after:
                    go(made, known, after)
                else:
                    reward = round(self.rewards.random(), 2) if readable else -0.5 if len(made) == 1 else 0.0
                    trained, sampled = (math.exp(sum(getattr(call, name).sum() for call in known)) for name in ("trained", "sampled"))
                    finished.append(Run(trained, reward, not readable, made, sampled, known))
        go([], [], "ask")
        return finished

    def trajectory(self, run: int, rollout: int) -> Trajectory:
        made, calls = Counter(), []
        for module, completion, _ in self.runs[run].calls:
            calls.append(Call(module, made[module], {}, Completion([run], list(completion), [0.0] * len(completion), "stop")))
            made[module] += 1
        r = self.runs[run]
        return Trajectory("e", rollout, tuple(calls), None, r.reward, "format_error" if r.failed else "completed")


def estimate(world: World, runs: tuple[int, ...], variants: list[dict], seeds: int = 4) -> np.ndarray:
    """The gradient that each variant takes from these runs, (variants, P): at the first update every ratio is 1, and the
    gradient of policy_loss with respect to a token's log-prob is -weight x advantage."""
    ts = [world.trajectory(run, i) for i, run in enumerate(runs)]
    result, cache = np.zeros((len(variants), len(world.gradient))), {}
    for v, o in enumerate(variants):
        for seed in range(seeds if o["short_groups"] == "fill" else 1):         # fill draws: averaged over seeds
            drop = o["failing"] == "dropped"
            key = o["short_groups"], seed, drop
            if key not in cache:
                shown = [replace(t, calls=t.calls[:-1]) if drop and t.status == "format_error" else t for t in ts]
                cache[key] = shown, G.group_calls(shown, o["short_groups"], seed=seed)
            shown, groups = cache[key]
            values = G.advantages(groups, shown, o["baseline"], o["leave_one_out"], o["scale_rewards"])
            rows = iter(G.weigh(groups, values, shown, o["normalize"]))
            for g in groups:
                for m in g.members:
                    row = next(rows)
                    result[v] += row.weight * row.advantage * world.runs[runs[m.trajectory]].calls[m.calls[0]][2] / (
                        seeds if o["short_groups"] == "fill" else 1)
    return result


CORRECTIONS = ("ignored", "none", "tis", "icepop", "whole run")


def estimate_from_sampler(world: World, runs: tuple[int, ...], corrections: tuple[str, ...]) -> np.ndarray:
    """The gradient (corrections, P) of the unbiased estimator from these runs, if it was the sampler that drew them: that of
    policy_loss at the first update, with its clip.

    `none`, `tis` and `icepop` are --correction. `ignored` takes the tokens for the policy's own. `whole run` multiplies each
    token's term by the run's probability over that with which it was sampled: exact, and of a variance that grows with length."""
    ts = [world.trajectory(run, i) for i, run in enumerate(runs)]
    groups = G.group_calls(ts)
    rows = iter(G.weigh(groups, G.advantages(groups, ts, "example", True, "none"), ts, "constant"))
    members = [(world.runs[runs[m.trajectory]], m.calls[0], next(rows)) for g in groups for m in g.members]
    spread = lambda value: torch.tensor([value(run, row) for run, c, row in members for _ in run.tokens[c].trained],
                                        dtype=torch.double)
    advantage, weight = spread(lambda run, row: row.advantage), spread(lambda run, row: row.weight)
    trained, sampled = (torch.from_numpy(np.concatenate([getattr(run.tokens[c], name) for run, c, _ in members]))
                        for name in ("trained", "sampled"))
    gradient, result = np.concatenate([run.tokens[c].gradient for run, c, _ in members]), []
    for correction in corrections:
        old = sampled if correction == "none" else trained
        factors = G.correction_factors(trained, sampled, correction)
        if correction == "whole run":
            factors = spread(lambda run, row: run.probability / run.sampled)
        new = trained.clone().requires_grad_()
        loss = G.policy_loss(new, old, advantage, weight, factors=factors)
        result.append(-torch.autograd.grad(loss, new)[0].numpy() @ gradient)
    return np.array(result)


def expectation(world: World, R: int, variants, estimate=estimate) -> tuple[np.ndarray, np.ndarray]:
    """(mean (variants, P), total variance (variants,)) of each variant over all R-tuples of runs of the sampler.

    An estimate does not depend on the order of the runs (fill: but for its seed), so multisets are enough."""
    mean, square = 0.0, 0.0
    for runs in itertools.combinations_with_replacement(range(len(world.runs)), R):
        orders = math.factorial(R) / math.prod(map(math.factorial, Counter(runs).values()))
        p = orders * math.prod(world.runs[i].sampled for i in runs)
        g = estimate(world, runs, variants)
        mean, square = mean + p * g, square + p * (g**2).sum(1)
    return mean, square - (mean**2).sum(1)


AXES = {"short_groups": ("keep", "truncate", "fill"), "baseline": ("group", "example"), "leave_one_out": (False, True),
        "scale_rewards": ("std", "batch", "none"), "normalize": ("sequence", "token", "constant"), "failing": ("trained", "dropped")}
VARIANTS = [dict(zip(AXES, values)) for values in itertools.product(*AXES.values())]


def unbiased(o: dict) -> bool:
    """What theory says: the advantage must not depend on the run's own sampling, nor the weight, and no call may be lost."""
    return (o["short_groups"] == "keep" and o["baseline"] == "example" and o["leave_one_out"] and o["scale_rewards"] == "none"
            and o["normalize"] == "constant" and o["failing"] == "trained")


def report(world: World, mean: np.ndarray, variance: np.ndarray) -> list[dict]:
    """Of each variant: scale, angle and remaining bias against the exact gradient, by call position too, and noise.

    `bias` is the relative distance to the exact gradient; `bias at best scale` that after one factor for all (a learning
    rate can undo it); `cosine`; `by prompt`: the factor on each prompt's part of the gradient (equal: no distortion)."""
    exact, rows = world.gradient, []
    parts = np.split(np.arange(len(exact)), len(CONTEXTS))
    for g, var in zip(mean, variance):
        cosine = g @ exact / max(np.linalg.norm(g) * np.linalg.norm(exact), 1e-300)
        scale = g @ exact / (exact @ exact)
        rows.append({"bias": np.linalg.norm(g - exact) / np.linalg.norm(exact), "cosine": cosine,
                     "bias at best scale": math.sqrt(max(0.0, 1 - cosine**2)), "scale": scale,
                     "by prompt": [g[p] @ exact[p] / (exact[p] @ exact[p]) for p in parts],
                     "noise": math.sqrt(var) / max(np.linalg.norm(g), 1e-300)})
    return rows


def noisy(size: float):
    return lambda logits, rng: logits + rng.normal(0, size, logits.shape)


SAMPLERS = {"logits in bf16": lambda logits, rng: torch.from_numpy(logits).bfloat16().double().numpy(),
            "logits ± 0.03": noisy(0.03), "logits ± 0.1": noisy(0.1), "logits ± 0.3": noisy(0.3), "logits ± 1": noisy(1.0)}


def mismatch_table(R: int, worlds: int) -> None:
    """Print the relative bias, and the noise, of the unbiased estimator when its runs are a sampler's that is not quite the
    policy: means over several worlds."""
    print(f"\nThe exact estimator on {R} runs of a sampler that is not quite the policy, mean over {worlds} worlds: "
          "relative bias and noise with --correction\n")
    print(f"{'sampler':16}{'log-probs apart':>16} |" + "".join(f"{c:>15}" for c in CORRECTIONS))
    print(f"{'':16}{'mean':>8}{'most':>8} |" + f"{'bias':>9}{'noise':>6}" * len(CORRECTIONS))
    for name, sampler in SAMPLERS.items():
        apart, figures = [], []
        for world in (World(seed, sampler) for seed in range(worlds)):
            apart += [(abs(x), run.sampled) for run in world.runs for call in run.tokens for x in call.trained - call.sampled]
            outcome = report(world, *expectation(world, R, CORRECTIONS, estimate_from_sampler))
            figures.append([(r["bias"], r["noise"]) for r in outcome])
        sizes, how_often = zip(*apart)
        print(f"{name:16}{np.average(sizes, weights=how_often):8.4f}{max(sizes):8.4f} |" + "".join(f"{b:9.1e}{n:6.2f}" for b, n in np.mean(figures, 0)))


def main(R: int) -> None:
    world = World()
    assert abs(sum(r.probability for r in world.runs) - 1) < 1e-12
    mean, variance = expectation(world, R, VARIANTS)
    print(f"{len(world.runs)} runs, {math.comb(len(world.runs) + R - 1, R)} multisets of {R}; |exact gradient| "
          f"{np.linalg.norm(world.gradient):.4f}; by prompt: {', '.join(CONTEXTS)}\n")
    print(f"{'short':9}{'baseline':9}{'l-o-o':6}{'scale':6}{'normalize':10}{'failing':9}|{'bias':>9}{'cosine':>9}{'best':>7}{'noise':>7}"
          "  factor by prompt")
    order = sorted(zip(VARIANTS, report(world, mean, variance)), key=lambda pair: pair[1]["bias at best scale"])
    for o, r in order:
        print(f"{o['short_groups']:9}{o['baseline']:9}{'yes' if o['leave_one_out'] else 'no':6}{o['scale_rewards']:6}{o['normalize']:10}"
              f"{o['failing']:9}|{r['bias']:9.1e}{r['cosine']:9.4f}{r['bias at best scale']:7.3f}{r['noise']:7.2f}  "
              + " ".join(f"{x:6.3f}" for x in r["by prompt"]) + ("  exact" if r["bias"] < 1e-10 else ""))
    mismatch_table(2, 4)


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 3)
