"""The exercises of the notebooks. Fill in the functions, then run `make exercises`.

It says of each one whether it is unsolved, wrong (and where), or right. What an answer is compared
with is the project itself: its functions, and the vectors of tests/conformance.
To keep this file as it is, solve a copy: `make exercises ANSWERS=mine.py`.
"""

from __future__ import annotations

import numpy as np

from model import ModelConfig, Transformer
from program import Program, Trajectory
from studies.oracle import World

# ----------------------------------------------------------------- 1 from GRPO to mmGRPO


def invocations(modules: list[str]) -> list[int]:
    """1.1  The relative invocation of each call of one run.

    `modules` names the module of each call, in the order of the calls. Return for each call how
    many calls of the same module the run made before it.
    Example: invocations(["search", "note", "search"]) is [0, 0, 1].
    """
    raise NotImplementedError


def groups_of(runs: list[list[str]]) -> dict[tuple[str, int], list[int]]:
    """1.2  The groups of several runs of one example, as the default `keep` makes them.

    runs[i] names the module of each call of run i. Return a dict: (module, relative invocation) ->
    the runs that made this call, in ascending order.
    Example: groups_of([["a", "b"], ["a"]]) is {("a", 0): [0, 1], ("b", 0): [0]}.
    """
    raise NotImplementedError


def relative_advantages(rewards: list[float]) -> list[float]:
    """1.3  The advantages of a group with these rewards (Eq. 2).

    A = (r - mean) / (std + 1e-4), where std divides by n - 1. Return 0.0 for each member where all
    rewards are equal, or where there is only one.
    """
    raise NotImplementedError


def token_weights(lengths: list[list[int]]) -> list[list[float]]:
    """1.4  What one token weighs in the loss (Eq. 7).

    lengths[g][i] is how many tokens member i of group g sampled (at least one). The loss is a mean
    over groups, in each group a mean over members, and of each member a mean over tokens. Return in
    the same form the weight of a single token of each member.
    """
    raise NotImplementedError


def runs_that_truncate_ignores() -> list[Trajectory]:
    """1.5  Runs of which `truncate` keeps nothing.

    Return runs of one example, all of status "completed", such that short_groups="truncate" leaves
    no group at all, while with "keep" some member of some group has an advantage other than 0.
    """
    raise NotImplementedError


# ----------------------------------------------------------------------- 2 the sampler


def draw(probabilities: list[float], u: float) -> int:
    """2.1  The token that the uniform number u in [0, 1) draws, by inverse CDF.

    Return the first token whose cumulative probability exceeds u, so that a token of probability 0
    is never drawn. The probabilities sum to 1.
    """
    raise NotImplementedError


def greedy(model: Transformer, prompt: list[int], end_ids: set[int], max_tokens: int) -> list[int]:
    """2.2  Decode without a cache, taking the most likely token each time.

    `model(ids)` takes ids (1, T) and gives states (1, T, D); `model.logits(states)` gives logits.
    Return the ids that are sampled: at most max_tokens; an end token is the last, and is returned.
    """
    raise NotImplementedError


def distinct_tokens(sequences: list[list[int]]) -> int:
    """2.3  How many tokens have to be forwarded where every distinct prefix is forwarded once.

    Return the number of nodes in the prefix tree of the sequences.
    Example: distinct_tokens([[7, 8], [7, 9], [7, 8, 9]]) is 4.
    """
    raise NotImplementedError


def prefix_tree(
    sequences: list[list[int]],
) -> tuple[list[int], list[int], list[list[bool]], list[int]]:
    """2.4  Several sequences as one tree, to be forwarded at once.

    Return (ids, positions, mask, last): of each node its token, and its depth from 0; mask[i][j],
    whether node i sees node j (its ancestors and itself, nothing else); and of each sequence, in
    the order given, the node of its last token. Every distinct prefix is one node.
    """
    raise NotImplementedError


def cache_bytes(config: ModelConfig, tokens: int, bytes_a_number: int) -> int:
    """2.5  How many bytes the keys and values of so many tokens take.

    `config` has layers, heads, kv_heads, head_dim and hidden_size.
    """
    raise NotImplementedError


# ------------------------------------------------------------------------- 3 the loss


def gain(ratio: float, advantage: float, low: float, high: float) -> float:
    """3.1  What a token of this ratio and advantage contributes to the objective, before weights.

    Return the smaller of ratio x advantage, and the same with the ratio clipped to
    [1 - low, 1 + high].
    """
    raise NotImplementedError


def still_moves(ratio: float, advantage: float, low: float, high: float) -> bool:
    """3.2  Whether the token still has a gradient, or its term is a constant by now.

    The advantage is not 0, and the ratio stands on neither bound.
    """
    raise NotImplementedError


def k3(logprob: float, reference: float) -> float:
    """3.3  The estimate of the KL divergence to the reference from one sampled token.

    Return r - log r - 1 with r = pi_reference / pi, given both log-probabilities.
    """
    raise NotImplementedError


def logit_gradient(
    probabilities: list[float], token: int, advantage: float, weight: float
) -> list[float]:
    """3.4  The gradient of the loss with respect to the logits that gave this token.

    `probabilities` is their softmax; the ratio is 1. Return one number per logit. Mind the sign:
    the loss goes down where a token of positive advantage becomes more likely.
    """
    raise NotImplementedError


def predicting_positions(prompt_tokens: int, sampled_tokens: int) -> list[int]:
    """3.5  The positions whose states predict the sampled tokens.

    The sequence is the prompt, then what was sampled; its positions count from 0. Return one
    position per sampled token.
    """
    raise NotImplementedError


# --------------------------------------------------------------- 4 bias and variance


def exact_gradient(world: World) -> np.ndarray:
    """4.1  The exact policy gradient (P,) of a world, as a sum over world.runs.

    Each run has .probability, .reward and .calls; a call is (module, completion, gradient of its
    log-probability (P,)).
    """
    raise NotImplementedError


def company(p: float, runs: int) -> float:
    """4.2  The probability that a run which reaches a call has company there.

    Every run reaches it with probability p, independently; `runs` runs are made in all. Return the
    probability that at least one of the others reaches it as well.
    """
    raise NotImplementedError


def shrink(runs: int) -> float:
    """4.3  What is left of the mean gradient where the baseline includes the run's own reward.

    The baseline is the mean reward of all `runs` runs of the example; nothing is divided by a
    standard deviation. Return the factor.
    """
    raise NotImplementedError


def best_baseline(world: World) -> float:
    """4.4  The constant baseline with which REINFORCE is least noisy.

    From one run the estimate is (reward - b) g, where g is the sum of the gradients of its calls;
    whatever the number b, it is unbiased. Return the b for which its total variance, the sum over
    all parameters, is smallest. It is not the expected reward.
    """
    raise NotImplementedError


# ------------------------------------------------------- 5 your own program, trained


def majority(labels: tuple[str, ...]) -> Program:
    """5.1  A program that asks three times and goes with the majority.

    Its one module is the attribute `sort`, a ChainOfThought "text -> intent" whose intent is one of
    `labels`. forward(text) calls it three times at once, with the same text, and returns
    Prediction(intent=…): what at least two named, or what the first call named where all differ.
    """
    raise NotImplementedError


def until_two_agree(labels: tuple[str, ...], most: int) -> Program:
    """5.2  A program that asks until it hears the same intent twice in a row.

    The module is as in 5.1. forward(text) calls it one call after the other; it ends as soon as two
    calls in a row named the same intent, and after `most` calls at the latest. It returns
    Prediction(intent=…) with what the last call named.
    """
    raise NotImplementedError


def partial_reward(example: dict, prediction) -> float:
    """5.3  A metric that gives half the reward for half the truth.

    Intents look like "card_fee": a thing, then its trouble. Return 1.0 where prediction.intent is
    example["intent"], 0.5 where exactly one of thing and trouble is right, else 0.0.
    """
    raise NotImplementedError


def survival(trajectories: list[Trajectory], module: str) -> list[float]:
    """5.4  The share of the voting runs that reached each call of a module.

    Entry k is the share of the runs with .votes that made at least k + 1 calls of it. The list
    ends with the last call that any voting run made.
    """
    raise NotImplementedError
