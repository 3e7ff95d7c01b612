"""The exact gradient, and what each estimator makes of it: `make oracle`.

A program so small that every run can be written down: module `ask` answers with up to two of three
tokens, module `note` is called after it once, twice or not at all, and an answer without its end
token fails. The policy is a softmax table. So the policy gradient is a finite sum, and so is the
expectation of an estimator: over every R-tuple of runs, through the very functions that train
(group_calls, advantages, weigh). What remains is bias, exactly.

A second table is of a sampler whose probabilities are not quite those of the policy that is
trained, as with bf16: what that does to the one unbiased estimator, and what --correction takes
back.

    python -m studies.oracle [R]          # default 3

Letters: T tokens of a completion; P logits of the policy; R runs of the example.
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

# the last of the TOKENS ends a completion; one of LIMIT tokens is cut
END, TOKENS, LIMIT = 2, 3, 2

# prompts: ask's answer and the invocation tell them
CONTEXTS = ("ask", "note after 0", "note after 1", "note again")

# context -> first token of a readable answer -> the context of the next call; else the run ends
NEXT = {
    "ask": {0: "note after 0", 1: "note after 1"},
    "note after 1": {0: "note again", 1: "note again"},
}


# ---------------------------------------------------------------------------------------- every run
def completions() -> list[tuple[int, ...]]:
    """Every completion: ends with END, or is cut at LIMIT tokens."""
    found = []
    for n in range(1, LIMIT + 1):
        for c in itertools.product(range(TOKENS), repeat=n):
            if END not in c[:-1] and (c[-1] == END or n == LIMIT):
                found.append(c)
    return found


@dataclass
class Tokens:
    """The tokens of a completion: log-probs under policy and sampler, gradient of the former."""

    trained: np.ndarray  # (T,)
    sampled: np.ndarray  # (T,)
    gradient: np.ndarray  # (T, P)


@dataclass
class Run:
    """One possible run: its probability, and how often it is `sampled`; its reward; its calls."""

    probability: float
    reward: float
    failed: bool
    # module, completion, gradient (P,) of its log-prob
    calls: list[tuple[str, tuple[int, ...], np.ndarray]]
    sampled: float
    # the calls token by token
    tokens: list[Tokens]


def score(run: Run) -> np.ndarray:
    """The gradient (P,) of the run's log-probability."""
    return sum(gradient for _, _, gradient in run.calls)


def softmax(logits: np.ndarray) -> np.ndarray:
    p = np.exp(logits - logits.max())
    return p / p.sum()


class World:
    """The program under a random policy with logits (contexts, first token or none, tokens).

    `sampler(logits, rng)` gives the logits of what the runs are sampled from; default: the policy
    itself.
    """

    def __init__(self, seed: int = 0, sampler=lambda logits, rng: logits):
        rng = np.random.default_rng(seed)
        # [., END, .]: nothing was sampled yet
        self.logits = rng.normal(0, 0.7, (len(CONTEXTS), TOKENS, TOKENS))
        self.sampler_logits = sampler(self.logits, rng)
        self.rewards = random.Random(seed)
        self.runs = self._runs()
        # (P,) of the expected reward
        self.gradient = sum(run.probability * run.reward * score(run) for run in self.runs)

    def _call(self, context: str, completion: tuple[int, ...]) -> Tokens:
        c = CONTEXTS.index(context)
        before = END
        trained, sampled = np.zeros((2, len(completion)))
        gradient = np.zeros((len(completion), *self.logits.shape))
        for t, token in enumerate(completion):
            p = softmax(self.logits[c, before])
            trained[t] = math.log(p[token])
            sampled[t] = math.log(softmax(self.sampler_logits[c, before])[token])
            gradient[t, c, before] -= p
            gradient[t, c, before, token] += 1
            before = token
        return Tokens(trained, sampled, gradient.reshape(len(completion), -1))

    def _runs(self) -> list[Run]:
        finished = []

        def go(calls: list, tokens: list[Tokens], context: str):
            """From these calls on, every way to go on."""
            for completion in completions():
                call = self._call(context, completion)
                module = context.split()[0]
                more_calls = calls + [(module, completion, call.gradient.sum(0))]
                more_tokens = tokens + [call]
                readable = completion[-1] == END
                after = NEXT.get(context, {}).get(completion[0]) if readable else None
                if after:
                    go(more_calls, more_tokens, after)
                else:
                    finished.append(self._finished(more_calls, more_tokens, readable))

        go([], [], "ask")
        return finished

    def _finished(self, calls: list, tokens: list[Tokens], readable: bool) -> Run:
        if readable:
            reward = round(self.rewards.random(), 2)
        else:
            reward = -0.5 if len(calls) == 1 else 0.0
        probability = math.exp(sum(call.trained.sum() for call in tokens))
        sampled = math.exp(sum(call.sampled.sum() for call in tokens))
        return Run(probability, reward, not readable, calls, sampled, tokens)

    def trajectory(self, run: int, rollout: int) -> Trajectory:
        r = self.runs[run]
        made = Counter()
        calls = []
        for module, completion, _ in r.calls:
            record = Completion([run], list(completion), [0.0] * len(completion), "stop")
            calls.append(Call(module, made[module], {}, record))
            made[module] += 1
        status = "format_error" if r.failed else "completed"
        return Trajectory("e", rollout, tuple(calls), None, r.reward, status)


# ----------------------------------------------------------------------------------- the estimators
AXES = {
    "short_groups": ("keep", "truncate", "fill"),
    "baseline": ("group", "example"),
    "leave_one_out": (False, True),
    "scale_rewards": ("std", "batch", "none"),
    "normalize": ("sequence", "token", "constant"),
    "failing": ("trained", "dropped"),
}
VARIANTS = [dict(zip(AXES, values)) for values in itertools.product(*AXES.values())]


def unbiased(o: dict) -> bool:
    """What theory says of a variant.

    Neither advantage nor weight may depend on the run's own sampling, and no call may be lost.
    """
    return (
        o["short_groups"] == "keep"
        and o["baseline"] == "example"
        and o["leave_one_out"]
        and o["scale_rewards"] == "none"
        and o["normalize"] == "constant"
        and o["failing"] == "trained"
    )


def without_failing_call(t: Trajectory) -> Trajectory:
    return replace(t, calls=t.calls[:-1]) if t.status == "format_error" else t


def estimate(
    world: World, runs: tuple[int, ...], variants: list[dict], seeds: int = 4
) -> np.ndarray:
    """The gradient that each variant takes from these runs, (variants, P).

    At the first update every ratio is 1, and the gradient of policy_loss with respect to a token's
    log-prob is -weight x advantage.
    """
    trajectories = [world.trajectory(run, i) for i, run in enumerate(runs)]
    result = np.zeros((len(variants), len(world.gradient)))
    grouped = {}  # what variants have in common
    for v, o in enumerate(variants):
        # fill draws: it is averaged over seeds
        draws = seeds if o["short_groups"] == "fill" else 1
        drop = o["failing"] == "dropped"
        for seed in range(draws):
            key = (o["short_groups"], seed, drop)
            if key not in grouped:
                shown = [without_failing_call(t) if drop else t for t in trajectories]
                grouped[key] = shown, G.group_calls(shown, o["short_groups"], seed=seed)
            shown, groups = grouped[key]
            values = G.advantages(
                groups, shown, o["baseline"], o["leave_one_out"], o["scale_rewards"]
            )
            rows = iter(G.weigh(groups, values, shown, o["normalize"]))
            for g in groups:
                for m in g.members:
                    row = next(rows)
                    _, _, gradient = world.runs[runs[m.trajectory]].calls[m.calls[0]]
                    result[v] += row.weight * row.advantage * gradient / draws
    return result


CORRECTIONS = ("ignored", "none", "tis", "icepop", "whole run")


def estimate_from_sampler(
    world: World, runs: tuple[int, ...], corrections: tuple[str, ...]
) -> np.ndarray:
    """The gradient (corrections, P) of the unbiased estimator from runs that the sampler drew.

    It is that of policy_loss at the first update, with its clip. `none`, `tis` and `icepop` are
    --correction. `ignored` takes the tokens for the policy's own. `whole run` multiplies each
    token's term by the run's probability over that with which it was sampled: exact, and of a
    variance that grows with length.
    """
    trajectories = [world.trajectory(run, i) for i, run in enumerate(runs)]
    groups = G.group_calls(trajectories)
    values = G.advantages(groups, trajectories, "example", True, "none")
    rows = iter(G.weigh(groups, values, trajectories, "constant"))
    calls = []  # the tokens of each call
    of_token = []  # advantage, weight, ratio of the whole run
    for g in groups:
        for m in g.members:
            row = next(rows)
            run = world.runs[runs[m.trajectory]]
            call = run.tokens[m.calls[0]]
            calls.append(call)
            figures = (row.advantage, row.weight, run.probability / run.sampled)
            of_token += [figures] * len(call.trained)
    advantage, weight, of_run = torch.tensor(of_token, dtype=torch.double).unbind(1)
    trained = torch.from_numpy(np.concatenate([call.trained for call in calls]))
    sampled = torch.from_numpy(np.concatenate([call.sampled for call in calls]))
    gradient = np.concatenate([call.gradient for call in calls])
    result = []
    for correction in corrections:
        old = sampled if correction == "none" else trained
        factors = G.correction_factors(trained, sampled, correction)
        if correction == "whole run":
            factors = of_run
        new = trained.clone().requires_grad_()
        loss = G.policy_loss(new, old, advantage, weight, factors=factors)
        result.append(-torch.autograd.grad(loss, new)[0].numpy() @ gradient)
    return np.array(result)


def expectation(world: World, R: int, variants, estimate=estimate) -> tuple[np.ndarray, np.ndarray]:
    """Mean (variants, P) and total variance (variants,) over all R-tuples of the sampler's runs.

    An estimate does not depend on the order of the runs (fill: but for its seed), so multisets are
    enough.
    """
    mean = 0.0
    square = 0.0
    for runs in itertools.combinations_with_replacement(range(len(world.runs)), R):
        orders = math.factorial(R) / math.prod(map(math.factorial, Counter(runs).values()))
        p = orders * math.prod(world.runs[i].sampled for i in runs)
        g = estimate(world, runs, variants)
        mean = mean + p * g
        square = square + p * (g**2).sum(1)
    return mean, square - (mean**2).sum(1)


# --------------------------------------------------------------------------------------- the tables
def report(world: World, mean: np.ndarray, variance: np.ndarray) -> list[dict]:
    """Of each variant: scale, angle and remaining bias against the exact gradient, and noise.

    `bias` is the relative distance to the exact gradient; `bias at best scale` that after one
    factor for all (a learning rate can undo it); `cosine`; `by prompt`: the factor on each prompt's
    part of the gradient (equal: no distortion).
    """
    exact = world.gradient
    size = np.linalg.norm(exact)
    parts = np.split(np.arange(len(exact)), len(CONTEXTS))
    rows = []
    for g, var in zip(mean, variance):
        cosine = g @ exact / max(np.linalg.norm(g) * size, 1e-300)
        by_prompt = [g[p] @ exact[p] / (exact[p] @ exact[p]) for p in parts]
        rows.append(
            {
                "bias": np.linalg.norm(g - exact) / size,
                "cosine": cosine,
                "bias at best scale": math.sqrt(max(0.0, 1 - cosine**2)),
                "scale": g @ exact / (exact @ exact),
                "by prompt": by_prompt,
                "noise": math.sqrt(var) / max(np.linalg.norm(g), 1e-300),
            }
        )
    return rows


def noisy(size: float):
    return lambda logits, rng: logits + rng.normal(0, size, logits.shape)


def in_bf16(logits: np.ndarray, rng) -> np.ndarray:
    return torch.from_numpy(logits).bfloat16().double().numpy()


SAMPLERS = {
    "logits in bf16": in_bf16,
    "logits ± 0.03": noisy(0.03),
    "logits ± 0.1": noisy(0.1),
    "logits ± 0.3": noisy(0.3),
    "logits ± 1": noisy(1.0),
}


def mismatch_table(R: int, worlds: int) -> None:
    """Print the bias and noise of the unbiased estimator when its runs are not quite the policy's.

    Each is relative, and the mean over several worlds.
    """
    print(
        f"\nThe exact estimator on {R} runs of a sampler that is not quite the policy, mean over "
        f"{worlds} worlds: relative bias and noise with --correction\n"
    )
    names = "".join(f"{c:>15}" for c in CORRECTIONS)
    print(f"{'sampler':16}{'log-probs apart':>16} |{names}")
    below = f"{'bias':>9}{'noise':>6}" * len(CORRECTIONS)
    print(f"{'':16}{'mean':>8}{'most':>8} |{below}")
    for name, sampler in SAMPLERS.items():
        apart = []  # of each token
        how_often = []
        figures = []
        for world in (World(seed, sampler) for seed in range(worlds)):
            for run in world.runs:
                for call in run.tokens:
                    apart += abs(call.trained - call.sampled).tolist()
                    how_often += [run.sampled] * len(call.trained)
            moments = expectation(world, R, CORRECTIONS, estimate_from_sampler)
            figures.append([(r["bias"], r["noise"]) for r in report(world, *moments)])
        mean = np.average(apart, weights=how_often)
        row = "".join(f"{bias:9.1e}{noise:6.2f}" for bias, noise in np.mean(figures, 0))
        print(f"{name:16}{mean:8.4f}{max(apart):8.4f} |{row}")


def main(R: int) -> None:
    world = World()
    assert abs(sum(r.probability for r in world.runs) - 1) < 1e-12
    outcome = report(world, *expectation(world, R, VARIANTS))
    multisets = math.comb(len(world.runs) + R - 1, R)
    print(
        f"{len(world.runs)} runs, {multisets} multisets of {R}; |exact gradient| "
        f"{np.linalg.norm(world.gradient):.4f}; by prompt: {', '.join(CONTEXTS)}\n"
    )
    print(
        f"{'short':9}{'baseline':9}{'l-o-o':6}{'scale':6}{'normalize':10}{'failing':9}|"
        f"{'bias':>9}{'cosine':>9}{'best':>7}{'noise':>7}  factor by prompt"
    )
    for o, r in sorted(zip(VARIANTS, outcome), key=lambda pair: pair[1]["bias at best scale"]):
        leave_one_out = "yes" if o["leave_one_out"] else "no"
        by_prompt = " ".join(f"{x:6.3f}" for x in r["by prompt"])
        exact = "  exact" if r["bias"] < 1e-10 else ""
        print(
            f"{o['short_groups']:9}{o['baseline']:9}{leave_one_out:6}{o['scale_rewards']:6}"
            f"{o['normalize']:10}{o['failing']:9}|{r['bias']:9.1e}{r['cosine']:9.4f}"
            f"{r['bias at best scale']:7.3f}{r['noise']:7.2f}  {by_prompt}{exact}"
        )
    mismatch_table(2, 4)


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 3)
