"""From groups to the gradient: weights, head, loss, correction, entropy bonus and micro-batches."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_model
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import trajectory, trajectory_sets
from test_tree import pairs_seen
from torch.utils._python_dispatch import TorchDispatchMode

import mmgrpo as G
from lm.lora import add_lora
from model import forest_parts, trainable
from program import STATUSES, Completion

VOTING = tuple(status for status in STATUSES if status != "tool_error")
V = 40


def row(prompt, tokens, logprobs, advantage=1.0, weight=1.0, module="m") -> G.Row:
    return G.Row(module, Completion(prompt, tokens, logprobs, "stop"), advantage, weight)


def gradient(model, rows, reference=None, **options):
    return G.step_gradient(model, rows, G.Config(**options), V, reference, fresh=False)


def is_zero(gradients) -> bool:
    return not any(g.any() for g in gradients)


def assert_all_close(got, want, atol=2e-5, rtol=1e-3):
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, atol=atol, rtol=rtol)


def gradient_of(loss, model) -> list:
    """Of a loss that is a plain 0 where there are no tokens."""
    parameters = list(model.parameters())
    if not isinstance(loss, torch.Tensor):
        return [torch.zeros_like(p) for p in parameters]
    return list(torch.autograd.grad(loss, parameters))


def value_of(loss) -> float:
    return float(torch.as_tensor(loss).detach())


# ------------------------------------------------------------------------------------------ weights
def has_tokens(member, trajectories) -> bool:
    """Whether a member of a group sampled any."""
    calls = trajectories[member.trajectory].calls
    return any(calls[c].completion.token_ids for c in member.calls)


@given(
    trajectory_sets(statuses=VOTING),
    st.sampled_from(["sequence", "token"]),
    st.sampled_from(["call", "trajectory"]),
)
def test_the_weights_of_all_tokens_sum_to_at_most_one(ts, normalize, level):
    """And to one where every member of a group has tokens."""
    groups = G.group_calls(ts, level=level)

    rows = G.weigh(groups, G.advantages(groups, ts), ts, normalize)

    total = sum(r.weight * len(r.completion.token_ids) for r in rows)
    assert total <= 1 + 1e-9
    members = [member for group in groups for member in group.members]
    if groups and all(has_tokens(member, ts) for member in members):
        assert total == pytest.approx(1)


# ----------------------------------------------------------------------------------- the fused head
row_counts = st.integers(1, 9) | st.just(600)
vocabularies = st.integers(2, 50)
temperatures = st.sampled_from([0.5, 1.0, 2.0])
seeds = st.integers(0, 10**6)


def random_head(n, vocabulary, seed):
    """hidden (n, 8), weight (vocabulary, 8), targets (n,), and the generator that drew them."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, 8, generator=g)
    weight = torch.randn(vocabulary, 8, generator=g)
    targets = torch.randint(0, vocabulary, (n,), generator=g)
    return hidden, weight, targets, g


def in_double(*tensors) -> list:
    """Leaves of the same values in float64."""
    return [x.detach().double().requires_grad_() for x in tensors]


def plain_gradient(hidden, weight, targets, temperature, up):
    """Log-probs and both gradients of sum(up x log-prob), by autograd through the whole (N, V).

    In float64.
    """
    h, w = in_double(hidden, weight)
    logprobs = F.log_softmax(h @ w.t() / temperature, -1).gather(1, targets[:, None])[:, 0]
    return logprobs.detach(), *torch.autograd.grad((logprobs * up).sum(), (h, w))


def total_of(logprobs, rows, entropies=None):
    """The loss that is the sum of the log-probs; entropies take part, without weight."""
    return logprobs.sum() if entropies is None else logprobs.sum() + 0 * entropies.sum()


@settings(max_examples=30)
@given(row_counts, vocabularies, temperatures, seeds)
def test_fused_log_probs_and_gradients_equal_the_plain_ones(n, vocabulary, temperature, seed):
    """600 rows are three chunks."""
    hidden, weight, targets, g = random_head(n, vocabulary, seed)
    up = torch.randn(n, generator=g)
    # what is there already stays
    d_weight = torch.ones(vocabulary, 8)

    def loss(logprobs, rows):
        return (logprobs * up[rows]).sum()

    fused = G.head_gradient(hidden, weight, targets, temperature, loss, d_weight)
    frozen = G.head_gradient(hidden, weight, targets, temperature, loss)
    scored = G.token_logprobs(hidden, weight, targets, temperature)

    want = plain_gradient(hidden, weight, targets, temperature, up)
    for got, plain in zip((*fused, d_weight - 1), want):
        torch.testing.assert_close(got.double(), plain, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(scored.double(), want[0], atol=1e-5, rtol=1e-5)
    assert torch.equal(frozen[0], fused[0])
    assert torch.equal(frozen[1], fused[1])


@settings(max_examples=30)
@given(row_counts, vocabularies, temperatures, seeds)
def test_entropies_and_their_gradients_equal_the_plain_ones(n, vocabulary, temperature, seed):
    """Of a loss of log-probs and entropies, by autograd through the whole (N, V) in float64."""
    hidden, weight, targets, g = random_head(n, vocabulary, seed)
    up, of_entropy = torch.randn(2, n, generator=g)
    h, w = in_double(hidden, weight)
    logp = F.log_softmax(h @ w.t() / temperature, -1)
    entropy = -(logp.exp() * logp).sum(-1)

    def loss(logprobs, rows, entropies):
        return (up[rows] * logprobs + of_entropy[rows] * entropies.square()).sum()

    of_targets = logp.gather(1, targets[:, None])[:, 0]
    want = torch.autograd.grad(loss(of_targets, slice(None), entropy), (h, w))
    entropies = torch.full((n,), math.nan)
    d_weight = torch.zeros(vocabulary, 8)
    logprobs, d_hidden = G.head_gradient(
        hidden, weight, targets, temperature, loss, d_weight, entropies
    )
    without, _ = G.head_gradient(hidden, weight, targets, temperature, total_of)

    for got, plain in zip((entropies, d_hidden, d_weight), (entropy.detach(), *want)):
        torch.testing.assert_close(got.double(), plain, atol=1e-3, rtol=2e-4)
    assert torch.equal(without, logprobs)


class Watch(TorchDispatchMode):
    """Keeps every tensor that is made meanwhile."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        results = out if isinstance(out, (tuple, list)) else [out]
        self.made += [t for t in results if torch.is_tensor(t)]
        return out


@pytest.mark.parametrize("frozen, bonus", [(True, False), (False, False), (False, True)])
def test_no_tensor_of_tokens_times_vocabulary_is_held(frozen, bonus):
    """Nor, if the head is frozen, one of its size.

    3,000 tokens of a 2,048-word vocabulary: never a tensor of more than a chunk's 256 x 2,048
    numbers, and but one (V, D).
    """
    hidden, weight = torch.randn(3000, 4), torch.randn(2048, 4)
    targets = torch.randint(0, 2048, (3000,))
    d_weight = None if frozen else torch.zeros(2048, 4)
    entropies = torch.zeros(3000) if bonus else None

    with Watch() as watch:
        _, d_hidden = G.head_gradient(hidden, weight, targets, 1.0, total_of, d_weight, entropies)

    assert max(t.numel() for t in watch.made) == 256 * 2048
    # views of the weight itself are none
    allowed = {weight.untyped_storage().data_ptr()}
    if not frozen:
        allowed.add(d_weight.data_ptr())
    assert {t.data_ptr() for t in watch.made if t.shape == (2048, 4)} <= allowed
    _, want, _ = plain_gradient(hidden, weight, targets, 1.0, torch.ones(3000))
    torch.testing.assert_close(d_hidden.double(), want, atol=1e-4, rtol=1e-4)


def test_the_chunked_head_accumulates_in_fp32():
    """bf16 weights, 20,000 tokens in 79 chunks: to a part in a thousand as with fp32 weights."""
    hidden, weight = torch.randn(20_000, 8).bfloat16(), torch.randn(2048, 8).bfloat16()
    targets = torch.randint(0, 64, (20_000,))
    in_bf16, in_fp32 = torch.zeros(2048, 8), torch.zeros(2048, 8)

    G.head_gradient(hidden, weight, targets, 1.0, total_of, in_bf16)
    G.head_gradient(hidden.float(), weight.float(), targets, 1.0, total_of, in_fp32)

    assert (in_bf16 - in_fp32).norm() / in_fp32.norm() < 1e-3


# ----------------------------------------------------------------------------------------- the loss
floats = st.floats(-3, 3)
# new, old, advantage, weight, reference, factor, entropy
loss_tokens = st.tuples(
    floats, floats, floats, st.floats(0, 2), floats, st.floats(0, 2), st.floats(0, 3)
)


@given(
    st.lists(loss_tokens, min_size=1, max_size=8),
    st.floats(0, 0.9),
    st.floats(0, 2),
    st.sampled_from([0.0, 0.1, 1.0]),
    st.sampled_from([0.0, 0.3]),
)
def test_the_loss_equals_the_formula_token_by_token(tokens, low, high, beta, alpha):
    """With a correction and an entropy bonus, and without."""
    plain = corrected = 0.0
    for x, y, advantage, weight, ref, factor, entropy in tokens:
        rho = math.exp(x - y)
        clipped = min(max(rho, 1 - low), 1 + high)
        gain = min(rho * advantage, clipped * advantage)
        k3 = math.exp(ref - x) - (ref - x) - 1
        plain -= weight * (gain - beta * k3)
        corrected -= weight * (factor * gain - beta * k3 + alpha * entropy)

    new, old, a, w, ref, factors, entropies = torch.tensor(tokens, dtype=torch.double).unbind(1)
    arguments = (new, old, a, w, low, high, beta, ref)
    got_plain = G.policy_loss(*arguments)
    got_corrected = G.policy_loss(*arguments, factors, alpha, entropies)

    assert float(got_plain) == pytest.approx(plain, rel=1e-9, abs=1e-9)
    assert float(got_corrected) == pytest.approx(corrected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(
    "ratio, advantage, moves",
    [
        (1.3, 1.0, False),
        (1.3, -1.0, True),
        (0.7, 1.0, True),
        (0.7, -1.0, False),
        (1.1, 1.0, True),
        (0.9, -1.0, True),
        (1.0, 0.0, False),
    ],
)
def test_the_clipped_branch_has_exactly_zero_gradient(ratio, advantage, moves):
    new = torch.tensor([math.log(ratio)], requires_grad=True)

    G.policy_loss(
        new, torch.zeros(1), torch.tensor([advantage]), torch.ones(1), 0.2, 0.2
    ).backward()

    assert (new.grad.item() != 0) == moves
    assert torch.isfinite(new.grad).all()


def test_low_and_high_clip_bounds_are_separate():
    def loss(ratio, advantage):
        new = torch.tensor([math.log(ratio)])
        advantages = torch.tensor([advantage])
        return float(G.policy_loss(new, torch.zeros(1), advantages, torch.ones(1), 0.1, 0.3))

    assert loss(2.0, 1.0) == pytest.approx(-1.3)
    assert loss(0.5, -1.0) == pytest.approx(0.9)


def random_distribution():
    """Of a vocabulary of six tokens, enumerated."""
    return torch.softmax(torch.randn(6, dtype=torch.double), 0)


def test_kl_is_the_k3_estimator_whose_value_is_unbiased():
    """On an enumerated vocabulary: the sum over tokens of pi(t) k3(t) is the KL."""
    p, q = random_distribution(), random_distribution()

    def k3(weights):
        loss = G.policy_loss(
            p.log(), p.log(), torch.zeros(6), weights, beta=1.0, ref_logprobs=q.log()
        )
        return float(loss)

    assert k3(p) == pytest.approx(float((p * (p / q).log()).sum()))
    of_each_token = [k3(F.one_hot(torch.tensor(i), 6).double()) for i in range(6)]
    assert min(of_each_token) >= 0


def test_the_mean_gradient_of_k3_is_that_of_the_other_divergence():
    """What the docstring claims: sampled from pi, it is the gradient of KL(pi_ref || pi)."""
    theta = torch.randn(6, dtype=torch.double, requires_grad=True)
    q = random_distribution()
    p = torch.softmax(theta, 0)

    loss = G.policy_loss(
        p.log(), p.log().detach(), torch.zeros(6), p.detach(), beta=1.0, ref_logprobs=q.log()
    )

    def by_theta(value):
        return torch.autograd.grad(value, theta, retain_graph=True)[0]

    torch.testing.assert_close(by_theta(loss), by_theta((q * (q / p).log()).sum()))
    assert not torch.allclose(by_theta(loss), by_theta((p * (p / q).log()).sum()))


# ---------------------------------------------------------------- the correction, the entropy bonus
@given(st.lists(st.floats(-200, 200) | st.floats(-2, 2), min_size=1, max_size=9))
def test_the_factors_of_a_correction_are_the_published_ones(apart):
    """However far the two are apart: exp(200) is infinite in fp32."""
    trained = torch.tensor(apart)
    sampled = torch.zeros(len(apart))

    factors = {c: G.correction_factors(trained, sampled, c) for c in ("none", "tis", "icepop")}

    for i, ratio in enumerate(trained.exp().tolist()):
        assert factors["none"][i] == 1
        assert factors["tis"][i] == pytest.approx(min(ratio, 2.0))
        assert factors["icepop"][i] == pytest.approx(ratio if 0.5 <= ratio <= 5 else 0.0)


@given(st.floats(0, 5), st.floats(0.01, 2), st.floats(0, 1))
def test_the_entropy_bonus_acts_below_its_target_alone(entropy, target, coefficient):
    """And the more the further below."""
    want = coefficient * (target - entropy) / target if entropy < target else 0.0
    assert G.entropy_coefficient(entropy, target, coefficient) == pytest.approx(want)
    assert G.entropy_coefficient(entropy, 0.0, coefficient) == 0.0


def test_the_sampled_entropy_is_the_mean_over_tokens():
    """And its own mean, over all samples, is the entropy."""
    sampled = ([-1.0, -2.0], [], [-6.0])
    rows = [row([1], [2] * len(own), own, 0.0) for own in sampled]
    assert G.sampled_entropy(rows) == pytest.approx(3.0)
    assert G.sampled_entropy([]) == 0.0

    p = random_distribution()
    each = [G.sampled_entropy([row([1], [i], [p[i].log().item()], 0.0)]) for i in range(6)]
    assert float((p * torch.tensor(each)).sum()) == pytest.approx(float(-(p * p.log()).sum()))


# --------------------------------------------------------------------------------------- the update
def uniform_completion(prompt, tokens) -> Completion:
    """As a sampler that finds all V tokens equally likely would give it."""
    return Completion(prompt, tokens, [-math.log(V)] * len(tokens), "stop")


# few tokens, so that prompts and completions often share a prefix
few = st.integers(0, 1) | st.integers(0, V - 1)
completions = st.builds(
    uniform_completion, st.lists(few, min_size=1, max_size=9), st.lists(few, max_size=6)
)
random_rows = st.builds(
    G.Row, st.sampled_from(["ask", "note"]), completions, st.floats(-2, 2), st.floats(0.01, 1)
)
row_lists = st.lists(random_rows, min_size=1, max_size=6)


FACTORS = {
    "none": lambda m: 1.0,
    "tis": lambda m: min(m, 2.0),
    "icepop": lambda m: m if 0.5 <= m <= 5.0 else 0.0,
}


def slow_loss(model, rows, config, reference=None, start=None, alpha=0.0):
    """The loss by a loop over rows and sampled tokens, each from the whole sequence up to it.

    `start` has the weights that sampled: with a correction, pi_old is its.
    """
    low, high = 1 - config.clip_low, 1 + config.clip_high
    factor = FACTORS.get(config.correction, FACTORS["none"])

    def scores(m, ids):
        """The log-probs of all tokens (V,) after `ids`."""
        return torch.log_softmax(m.logits(m(torch.tensor([ids])))[0, -1] / config.temperature, -1)

    total = 0.0
    for r in rows:
        before = list(r.completion.prompt_ids)
        for token, sampled in zip(r.completion.token_ids, r.completion.logprobs):
            all_scores = scores(model, before)
            x = all_scores[token]
            old = sampled if start is None else scores(start, before)[token].item()
            rho = torch.exp(x - old)
            gain = torch.minimum(rho * r.advantage, rho.clamp(low, high) * r.advantage)
            gain = factor(math.exp(old - sampled)) * gain
            if alpha:
                gain = gain - alpha * (all_scores.exp() * all_scores).sum()
            if reference is not None:
                d = scores(reference, before)[token].detach() - x
                gain = gain - config.beta * (d.exp() - d - 1)
            total = total - r.weight * gain
            before.append(token)
    return total


def assert_tokens_are_counted(figures, rows, batch_tokens):
    """Forwarded is every token where each row is a batch, every distinct prefix where all are one.

    A prefix of two modules counts twice.
    """
    inputs = []
    prefixes = set()
    for r in rows:
        if r.completion.token_ids:
            ids = r.completion.prompt_ids + r.completion.token_ids[:-1]
            inputs.append(ids)
            prefixes |= {(r.module, *ids[:n]) for n in range(1, len(ids) + 1)}
    unshared = sum(map(len, inputs))
    assert figures["tokens_unshared"] == unshared
    assert figures["tokens_distinct"] == len(prefixes)
    if batch_tokens == 1:
        assert figures["tokens_forwarded"] == unshared
    if batch_tokens == 10_000:
        assert figures["tokens_forwarded"] == len(prefixes)


@settings(max_examples=20)
@given(row_lists, st.sampled_from([1, 12, 10_000]), st.sampled_from([1.0, 0.6]), st.booleans())
def test_the_gradient_equals_a_loop_over_the_sampled_tokens(rows, batch_tokens, temperature, kl):
    """Prompts carry no loss, first and last sampled tokens do, sharing and batching change nothing.

    The losses are alike as well, and the tokens are counted.
    """
    model = make_model(vocab_size=V, std=0.15)
    reference = make_model(1, vocab_size=V, std=0.15) if kl else None
    beta = 0.3 if kl else 0.0
    config = G.Config(temperature=temperature, batch_tokens=batch_tokens, beta=beta)

    got, figures = G.step_gradient(model, rows, config, V, reference, fresh=False)

    loss = slow_loss(model, rows, config, reference)
    assert_all_close(got, gradient_of(loss, model))
    assert figures["loss"] == pytest.approx(value_of(loss), abs=1e-4)
    assert_tokens_are_counted(figures, rows, batch_tokens)


@settings(max_examples=12)
@given(
    row_lists,
    st.sampled_from(["tis", "icepop"]),
    st.sampled_from([12, 10_000]),
    st.sampled_from([0.0, 0.5]),
    st.sampled_from([1.0, 0.6]),
)
def test_corrected_gradients_equal_the_loop_in_every_pass(
    rows, correction, batch_tokens, alpha, temperature
):
    """pi_old stays what the weights that sampled gave, in a second pass with other weights too."""
    model = make_model(vocab_size=V, std=0.15)
    start = copy.deepcopy(model)
    moved = make_model(1, vocab_size=V, std=0.15)
    config = G.Config(
        correction=correction, batch_tokens=batch_tokens, temperature=temperature, parity=1e9
    )
    any_token = any(r.completion.token_ids for r in rows)

    for fresh in (True, False):
        got, figures = G.step_gradient(model, rows, config, V, fresh=fresh, alpha=alpha)

        loss = slow_loss(model, rows, config, start=start, alpha=alpha)
        assert_all_close(got, gradient_of(loss, model))
        assert figures["loss"] == pytest.approx(value_of(loss), abs=1e-4)
        assert ("entropy" in figures) == (alpha > 0 and any_token)
        model.load_state_dict(moved.state_dict())


def test_the_figures_of_a_correction_are_those_of_its_factors():
    """The sampler gave each token 1/40; the model's own probabilities over that are the ratios."""
    model = make_model(vocab_size=V, std=0.15)
    rows = [row([i, 5], [3, i, 7], [-math.log(V)] * 3, 1.0, 0.1) for i in range(8)]

    found = {}
    for correction in ("none", "tis", "icepop"):
        config = G.Config(correction=correction, parity=1e9, batch_tokens=20)
        _, found[correction] = G.step_gradient(model, rows, config, V)

    ratios = [math.exp(p) * V for r in rows for p in r.trained]
    changed = {
        "tis": [m for m in ratios if m > 2],
        "icepop": [m for m in ratios if not 0.5 <= m <= 5],
    }
    assert "correction" not in found["none"]
    assert all(changed.values())
    for correction, outside in changed.items():
        want = {
            "mean": sum(map(FACTORS[correction], ratios)) / len(ratios),
            "min": min(ratios),
            "max": max(ratios),
            "share": len(outside) / len(ratios),
        }
        assert found[correction]["correction"] == pytest.approx(want, rel=1e-4)


UNCHANGED = {"mean": 1, "min": 1, "max": 1, "share": 0}


def sampled_by(model, rows):
    """The rows, as if the model itself had sampled them."""
    for tree in G.pack(rows, 10**6):
        lengths = [len(r.completion.token_ids) for r in tree.rows]
        own = G.batch_logprobs(model, tree, 1.0, V).split(lengths)
        for r, logprobs in zip(tree.rows, own):
            r.completion.logprobs[:] = logprobs.tolist()
    return rows


@pytest.mark.parametrize("correction", ["tis", "icepop"])
def test_in_fp32_a_correction_changes_nothing_to_1e_5(correction):
    model = make_model(vocab_size=V, std=0.15)
    rows = [row([i, 5], [3, i, 7], [0.0] * 3, (-1.0) ** i, 0.1) for i in range(8)]
    sampled_by(model, rows)
    without = G.Config(correction="none", batch_tokens=9)
    config = G.Config(correction=correction, batch_tokens=9)

    for fresh in (True, False):
        plain, _ = G.step_gradient(model, rows, without, V, fresh=fresh)
        corrected, figures = G.step_gradient(model, rows, config, V, fresh=fresh)

        assert_all_close(plain, corrected, atol=1e-5, rtol=1e-5)
        assert figures["correction"] == pytest.approx(UNCHANGED, abs=1e-5)
        with torch.no_grad():
            model.head.mul_(1.01)


def test_under_dropout_pi_old_is_scored_without_it():
    """Else the factors would answer for the dropout, which neither sampler nor later pass draws."""
    model = make_model(vocab_size=V, std=0.15)
    add_lora(model, 4, 8.0, 0.5, ("q_proj", "v_proj"), 0)
    for p in trainable(model):
        torch.nn.init.normal_(p.data, 0, 0.5)
    rows = [row([i, 5], [3, i, 7], [0.0] * 3, 1.0, 0.1) for i in range(8)]
    sampled_by(model, rows)
    config = G.Config(correction="tis", lora_rank=4, lora_dropout=0.5)

    _, figures = G.step_gradient(model, rows, config, V)

    assert figures["correction"] == pytest.approx(UNCHANGED, abs=1e-4)
    for r in rows:
        assert r.trained == pytest.approx(r.completion.logprobs, abs=1e-4)
    # of ratios that are all 1, without dropout, it would be -8 x 3 x 0.1
    assert figures["loss"] != pytest.approx(-2.4)


def test_the_entropy_bonus_reaches_rows_of_advantage_zero():
    model = make_model(vocab_size=V, std=0.15)
    rows = [row([5, 6], [3, 1], [-1.0, -1.0], 0.0, 0.5)]
    assert is_zero(gradient(model, rows)[0])

    got, figures = G.step_gradient(model, rows, G.Config(), V, fresh=False, alpha=0.3)

    assert not is_zero(got)
    assert figures["loss"] == pytest.approx(-0.3 * figures["entropy"])


@settings(max_examples=20)
@given(row_lists, st.lists(st.integers(0, 2), min_size=6, max_size=6))
def test_the_gradients_of_ranks_sum_to_the_whole_one(rows, ranks):
    """Any split of the rows over up to three machines, one without rows included."""
    model = make_model(vocab_size=V, std=0.15)

    parts = []
    for rank in range(3):
        own = [r for r, its_rank in zip(rows, ranks) if its_rank == rank]
        parts.append(gradient(model, own)[0])

    whole, _ = gradient(model, rows)
    assert_all_close(map(sum, zip(*parts)), whole)


def test_a_gradient_is_the_same_each_time_with_two_threads():
    """The gradients of 900 completions meet in the state of their prompt's last token."""
    model = make_model(vocab_size=V, hidden_size=128)
    rows = []
    for first in range(1, 31):
        for second in range(1, 31):
            advantage = 0.1 * first - 0.07 * second
            rows.append(row([1, 2], [first, second, 3], [-3.7] * 3, advantage, 0.01))

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first, *others = (gradient(model, rows, batch_tokens=10**6)[0] for _ in range(12))
    finally:
        torch.set_num_threads(threads)

    for other in others:
        assert all(map(torch.equal, first, other))


def test_the_sampled_end_token_is_trained_whatever_the_padding_id():
    """id 0 ends the completion and also pads the batch; its log-prob moves, and only once."""
    model = make_model(vocab_size=V)
    ended = row([5, 6], [0], [-1.0])
    longer = row([1, 2, 3], [4, 7, 0], [-1.0] * 3, 0.0)

    got, _ = gradient(model, [ended, longer])

    want = gradient_of(slow_loss(model, [ended], G.Config()), model)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(got, want))
    assert not is_zero(got)


@given(st.integers(1, 5))
def test_rows_of_advantage_zero_change_no_bit_of_the_gradient(k):
    model = make_model(vocab_size=V)
    rows = [row([1, 2], [3, 4], [-1.0, -2.0], 1.0, 0.5)]
    dead = [row([5 + i], [6, 7], [-1.0, -1.0], 0.0, 0.5) for i in range(k)]

    alone, _ = gradient(model, rows, batch_tokens=1)
    among_dead, _ = gradient(model, dead + rows, batch_tokens=1)

    assert all(map(torch.equal, alone, among_dead))


def test_completions_of_no_and_of_one_token_train():
    model = make_model(vocab_size=V)
    empty = G.Row("m", Completion([1, 2], [], [], "length"), 1.0, 1.0)
    one = row([1], [3], [-1.0])

    got, figures = gradient(model, [empty, one])
    assert all(torch.isfinite(g).all() for g in got)
    assert figures["tokens_forwarded"] == 1

    got, figures = gradient(model, [empty])
    assert is_zero(got)
    assert figures == {
        "loss": 0,
        "kl": 0,
        "clipped": 0,
        "tokens_distinct": 0,
        "tokens_forwarded": 0,
        "tokens_unshared": 0,
        "halved": 0,
        "grad_share": {},
    }

    assert is_zero(gradient(model, [])[0])


def test_prompts_of_later_calls_need_not_extend_earlier_ones():
    """Each call is scored behind its own prompt, whatever the run's other calls were given."""
    model = make_model(vocab_size=V)
    first = Completion([7, 8], [9], [-1.0], "stop")
    second = Completion([12, 8], [10], [-1.0], "stop")
    ts = []
    for rollout, reward in enumerate([1.0, 0.0]):
        t = trajectory("e", rollout, ["ask", "note"], reward)
        ask, note = t.calls
        calls = (
            dataclasses.replace(ask, completion=first),
            dataclasses.replace(note, completion=second),
        )
        ts.append(dataclasses.replace(t, calls=calls))
    groups = G.group_calls(ts)
    rows = G.weigh(groups, G.advantages(groups, ts), ts)
    seen = []
    hook = model.register_forward_pre_hook(lambda m, args: seen.extend(args[0].tolist()))

    gradient(model, rows)

    hook.remove()
    # one pass for the two runs
    assert sorted(seen) == [[7, 8], [12, 8]]


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(0, 9)), max_size=20), st.integers(1, 100))
def test_micro_batches_hold_every_row_once_within_the_budget(sizes, budget):
    rows = []
    for i, (prompt, sampled) in enumerate(sizes):
        # its advantage tells it from the others
        rows.append(row([1] * prompt, [2] * sampled, [0.0] * sampled, float(i)))

    trees = G.pack(rows, budget)

    packed = [r.advantage for tree in trees for r in tree.rows]
    assert sorted(packed) == [r.advantage for r in rows if r.completion.token_ids]
    for tree in trees:
        assert len(tree.rows) == 1 or len(tree.ids) <= budget
        assert len(tree.at) == sum(len(r.completion.token_ids) for r in tree.rows)
        assert len(tree.ids) == len(tree.positions)


@given(row_lists, st.sampled_from([1, 3, 128]))
def test_every_distinct_prefix_is_one_node_that_sees_its_own_tokens(rows, long):
    for tree in G.pack(rows, 10_000):
        new, parts = forest_parts(tree.paths, long)

        assert new.tolist() == list(range(len(tree.ids)))
        prefixes = []
        for node, seen in enumerate(pairs_seen(parts, len(tree.ids))):
            own = np.flatnonzero(seen)
            # each of its ancestors and itself, once
            assert seen.max() == 1
            assert own[-1] == node
            assert [tree.positions[i] for i in own] == list(range(len(own)))
            prefixes.append(tuple(tree.ids[i] for i in own))
        assert len(set(prefixes)) == len(prefixes)
        for r, (_, path) in zip(tree.rows, tree.paths):
            ids = r.completion.prompt_ids + r.completion.token_ids[:-1]
            assert [tree.ids[i] for i in path] == ids


@pytest.mark.parametrize(
    "shared, own, examples",
    [
        (30, 5, 2),
        (400, 30, 4),
        (1700, 30, 4),
        (6000, 50, 3),
        (300, 900, 8),
    ],
)
def test_by_default_rows_that_begin_alike_are_not_parted(shared, own, examples):
    """Whatever the length of the prompts: at most 1.3 times the distinct tokens are forwarded."""
    rng = np.random.default_rng(0)

    def draw(n):
        return rng.integers(1, 1000, n).tolist()

    trunk = draw(shared)
    rows = []
    for _ in range(examples):
        prompt = trunk + draw(own)
        rows += [row(prompt, draw(40), [0.0] * 40) for _ in range(8)]

    def forwarded(batch_tokens):
        return sum(len(tree.ids) for tree in G.pack(rows, batch_tokens))

    default = G.tokens_per_batch(make_model(vocab_size=V), rows, G.Config())
    assert forwarded(default) <= 1.3 * forwarded(10**9)


def test_modules_share_the_gradient_norm():
    model = make_model(vocab_size=V)
    rows = [
        row([1, 2], [3], [-1.0], 3.0, module="ask"),
        row([1, 2], [3], [-1.0], 1.0, module="note"),
    ]

    _, figures = gradient(model, rows)

    assert figures["grad_share"] == pytest.approx({"ask": 0.75, "note": 0.25}, abs=1e-5)
