"""Solutions of the exercises in docs/notebooks/exercises.py."""

from collections import Counter, defaultdict
from itertools import accumulate

import numpy as np
import torch

from program import Call, ChainOfThought, Completion, Prediction, Program, Trajectory, gather

# ----------------------------------------------------------------- 1 from GRPO to mmGRPO


def invocations(modules):
    return [modules[:i].count(module) for i, module in enumerate(modules)]


def groups_of(runs):
    groups = defaultdict(list)
    for i, modules in enumerate(runs):
        for place in zip(modules, invocations(modules)):
            groups[place].append(i)
    return dict(groups)


def relative_advantages(rewards):
    rewards = np.array(rewards)
    if (rewards == rewards[0]).all():
        return [0.0] * len(rewards)
    return list((rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-4))


def token_weights(lengths):
    return [[1 / (len(lengths) * len(group) * n) for n in group] for group in lengths]


def runs_that_truncate_ignores():
    def run(rollout, modules, reward):
        calls = tuple(Call(m, 0, completion=Completion([1], [2], [-1.0], "stop")) for m in modules)
        return Trajectory("e", rollout, calls, None, reward, "completed")

    return [run(0, ["ask"], 1.0), run(1, ["ask"], 0.0), run(2, ["note"], 0.5)]


# ----------------------------------------------------------------------- 2 the sampler


def draw(probabilities, u):
    return next(token for token, total in enumerate(accumulate(probabilities)) if total > u)


def greedy(model, prompt, end_ids, max_tokens):
    sampled = []
    while len(sampled) < max_tokens and not (sampled and sampled[-1] in end_ids):
        with torch.no_grad():
            logits = model.logits(model(torch.tensor([prompt + sampled])))
        sampled.append(int(logits[0, -1].argmax()))
    return sampled


def distinct_tokens(sequences):
    return len({tuple(s[:n]) for s in sequences for n in range(1, len(s) + 1)})


def prefix_tree(sequences):
    nodes = {}  # prefix -> node
    for s in sequences:
        for n in range(1, len(s) + 1):
            nodes.setdefault(tuple(s[:n]), len(nodes))
    ids = [prefix[-1] for prefix in nodes]
    positions = [len(prefix) - 1 for prefix in nodes]
    mask = [[a[: len(b)] == b for b in nodes] for a in nodes]
    return ids, positions, mask, [nodes[tuple(s)] for s in sequences]


def cache_bytes(config, tokens, bytes_a_number):
    return 2 * config.layers * config.kv_heads * config.head_dim * tokens * bytes_a_number


# ------------------------------------------------------------------------- 3 the loss


def gain(ratio, advantage, low, high):
    clipped = min(max(ratio, 1 - low), 1 + high)
    return min(ratio * advantage, clipped * advantage)


def still_moves(ratio, advantage, low, high):
    return ratio < 1 + high if advantage > 0 else ratio > 1 - low


def k3(logprob, reference):
    log_r = reference - logprob
    return np.exp(log_r) - log_r - 1


def logit_gradient(probabilities, token, advantage, weight):
    return [-weight * advantage * ((v == token) - p) for v, p in enumerate(probabilities)]


def predicting_positions(prompt_tokens, sampled_tokens):
    return list(range(prompt_tokens - 1, prompt_tokens - 1 + sampled_tokens))


# --------------------------------------------------------------- 4 bias and variance


def exact_gradient(world):
    return sum(r.probability * r.reward * sum(g for _, _, g in r.calls) for r in world.runs)


def company(p, runs):
    return 1 - (1 - p) ** (runs - 1)


def shrink(runs):
    return (runs - 1) / runs


def best_baseline(world):
    """The variance is E (r - b)^2 |g|^2 - |gradient|^2: its derivative is 0 at a weighted mean."""
    weights = [r.probability * (sum(g for _, _, g in r.calls) ** 2).sum() for r in world.runs]
    return np.average([r.reward for r in world.runs], weights=weights)


# ------------------------------------------------------- 5 your own program, trained


class Sort(Program):
    def __init__(self, labels):
        self.sort = ChainOfThought("text -> intent", types={"intent": labels})


class Majority(Sort):
    async def forward(self, text):
        heard = await gather(*(self.sort(text=text) for _ in range(3)))
        (intent, _), *_ = Counter(h.intent for h in heard).most_common()  # ties: in the order heard
        return Prediction(intent=intent)


class UntilTwoAgree(Sort):
    def __init__(self, labels, most):
        super().__init__(labels)
        self.most = most

    async def forward(self, text):
        before = None
        for _ in range(self.most):
            intent = (await self.sort(text=text)).intent
            if intent == before:
                break
            before = intent
        return Prediction(intent=intent)


def majority(labels):
    return Majority(labels)


def until_two_agree(labels, most):
    return UntilTwoAgree(labels, most)


def partial_reward(example, prediction):
    pairs = zip(prediction.intent.split("_"), example["intent"].split("_"))
    return sum(a == b for a, b in pairs) / 2


def survival(trajectories, module):
    made = [sum(c.module == module for c in t.calls) for t in trajectories if t.votes]
    return [sum(n > k for n in made) / len(made) for k in range(max(made, default=0))]
