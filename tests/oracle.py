"""The exact gradient, and what each estimator makes of it: `make oracle`.

A program so small that every run can be written down: module `ask` answers with up to two of three tokens, module `note`
is called after it once, twice or not at all, and an answer without its end token fails. The policy is a softmax table. So
the policy gradient is a finite sum, and so is the expectation of an estimator: over every R-tuple of runs, through the
very functions that train (group_calls, advantages, weigh). What remains is bias, exactly.

    python tests/oracle.py [R]          # default 3
"""
import itertools
import math
import random
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import mmgrpo as G  # noqa: E402
from program import Call, Completion, Trajectory  # noqa: E402

END, TOKENS, LIMIT = 2, 3, 2
CONTEXTS = ("ask", "note after 0", "note after 1", "note again")        # prompts; ask's answer and the invocation tell them


def completions() -> list[tuple[int, ...]]:
    """Every completion: ends with END, or is cut at LIMIT tokens."""
    return [c for n in range(1, LIMIT + 1) for c in itertools.product(range(TOKENS), repeat=n)
            if END not in c[:-1] and (c[-1] == END or n == LIMIT)]


@dataclass
class Run:
    """One possible run: its probability, reward, and its calls with the gradient of each one's log-probability (P,)."""
    probability: float
    reward: float
    failed: bool
    calls: list[tuple[str, tuple[int, ...], np.ndarray]]


class World:
    """The program under a random policy with logits (contexts, first token or none, tokens)."""
    def __init__(self, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.logits = rng.normal(0, 0.7, (len(CONTEXTS), TOKENS, TOKENS))       # [., END, .]: nothing was sampled yet
        self.rewards = random.Random(seed)
        self.runs = self._runs()
        self.gradient = sum(r.probability * r.reward * sum(g for _, _, g in r.calls) for r in self.runs)

    def _call(self, context: str, completion: tuple[int, ...]) -> tuple[float, np.ndarray]:
        """log-probability of a completion, and its gradient."""
        logp, gradient, before, c = 0.0, np.zeros(self.logits.shape), END, CONTEXTS.index(context)
        for token in completion:
            row = self.logits[c, before]
            p = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
            logp += math.log(p[token])
            gradient[c, before] -= p
            gradient[c, before, token] += 1
            before = token
        return logp, gradient.ravel()

    def _runs(self) -> list[Run]:
        finished = []

        def go(calls: list, logp: float, context: str):
            for completion in completions():
                more, gradient = self._call(context, completion)
                made = calls + [(context.split()[0], completion, gradient)]
                readable = completion[-1] == END
                again = {"ask": {0: "note after 0", 1: "note after 1"}, "note after 1": {0: "note again", 1: "note again"}}
                after = again.get(context, {}).get(completion[0]) if readable else None
                if after:
                    go(made, logp + more, after)
                else:
                    reward = round(self.rewards.random(), 2) if readable else -0.5 if len(made) == 1 else 0.0
                    finished.append(Run(math.exp(logp + more), reward, not readable, made))
        go([], 0.0, "ask")
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


def expectation(world: World, R: int, variants: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """(mean (variants, P), total variance (variants,)) of each variant over all R-tuples of runs.

    An estimate does not depend on the order of the runs (fill: but for its seed), so multisets are enough."""
    mean, square = 0.0, 0.0
    for runs in itertools.combinations_with_replacement(range(len(world.runs)), R):
        orders = math.factorial(R) / math.prod(map(math.factorial, Counter(runs).values()))
        p = orders * math.prod(world.runs[i].probability for i in runs)
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


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 3)
