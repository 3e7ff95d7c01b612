"""From groups to the gradient: weights, the fused log-probs and entropies, the clipped loss, the correction, micro-batches."""
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

import mmgrpo as G
from lm.lora import add_lora
from model import forest_parts, trainable
from program import STATUSES, Completion

VOTING = tuple(s for s in STATUSES if s != "tool_error")
V = 40


# ---------------------------------------------------------------------------------------------------------- weights

@given(trajectory_sets(statuses=VOTING), st.sampled_from(["sequence", "token"]), st.sampled_from(["call", "trajectory"]))
def test_the_weights_of_all_tokens_sum_to_at_most_one(ts, normalize, level):
    groups = G.group_calls(ts, level=level)
    rows = G.weigh(groups, G.advantages(groups, ts), ts, normalize)
    total = sum(r.weight * len(r.completion.token_ids) for r in rows)
    empty = any(not sum(len(ts[m.trajectory].calls[c].completion.token_ids) for c in m.calls) for g in groups for m in g.members)
    assert total <= 1 + 1e-9 and (empty or not groups or total == pytest.approx(1))


# --------------------------------------------------------------------------------------------------- fused log-probs

def plain_gradient(hidden, weight, targets, temperature, up):
    """Log-probs and both gradients of sum(up x log-prob), by autograd through the whole (N, V) matrix, in float64."""
    h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    logprobs = F.log_softmax(h @ w.t() / temperature, -1).gather(1, targets[:, None])[:, 0]
    return logprobs.detach(), *torch.autograd.grad((logprobs * up).sum(), (h, w))


@settings(max_examples=30)
@given(st.integers(1, 9) | st.just(600), st.integers(2, 50), st.sampled_from([0.5, 1.0, 2.0]), st.integers(0, 10**6))
def test_fused_log_probs_and_gradients_equal_the_plain_ones(n, vocabulary, temperature, seed):
    """600 rows are three chunks."""
    g = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(n, 8, generator=g), torch.randn(vocabulary, 8, generator=g)
    targets, up = torch.randint(0, vocabulary, (n,), generator=g), torch.randn(n, generator=g)
    d_weight = torch.ones(vocabulary, 8)                    # what is there already stays
    logprobs, d_hidden = G.head_gradient(hidden, weight, targets, temperature, lambda x, rows: (x * up[rows]).sum(), d_weight)
    want = plain_gradient(hidden, weight, targets, temperature, up)
    for got, w in zip((logprobs, d_hidden, d_weight - 1), want):
        torch.testing.assert_close(got.double(), w, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(G.token_logprobs(hidden, weight, targets, temperature).double(), want[0], atol=1e-5, rtol=1e-5)
    frozen = G.head_gradient(hidden, weight, targets, temperature, lambda x, rows: (x * up[rows]).sum())
    assert torch.equal(frozen[0], logprobs) and torch.equal(frozen[1], d_hidden)


@settings(max_examples=30)
@given(st.integers(1, 9) | st.just(600), st.integers(2, 50), st.sampled_from([0.5, 1.0, 2.0]), st.integers(0, 10**6))
def test_entropies_and_their_gradients_equal_the_plain_ones(n, vocabulary, temperature, seed):
    """Of a loss of log-probs and entropies, by autograd through the whole (N, V) matrix in float64."""
    g = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(n, 8, generator=g), torch.randn(vocabulary, 8, generator=g)
    targets, (up, of_entropy) = torch.randint(0, vocabulary, (n,), generator=g), torch.randn(2, n, generator=g)
    h, w = (x.double().requires_grad_() for x in (hidden, weight))
    logp = F.log_softmax(h @ w.t() / temperature, -1)
    entropy = -(logp.exp() * logp).sum(-1)
    want = torch.autograd.grad((logp.gather(1, targets[:, None])[:, 0] * up + of_entropy * entropy.square()).sum(), (h, w))

    entropies, d_weight = torch.full((n,), math.nan), torch.zeros(vocabulary, 8)
    loss = lambda x, rows, entropy: (up[rows] * x + of_entropy[rows] * entropy.square()).sum()
    logprobs, d_hidden = G.head_gradient(hidden, weight, targets, temperature, loss, d_weight, entropies)
    for got, expected in zip((entropies, d_hidden, d_weight), (entropy.detach(), *want)):
        torch.testing.assert_close(got.double(), expected, atol=1e-3, rtol=2e-4)
    plain = G.head_gradient(hidden, weight, targets, temperature, lambda x, rows: x.sum())
    assert torch.equal(plain[0], logprobs)


@pytest.mark.parametrize("frozen, bonus", [(True, False), (False, False), (False, True)])
def test_nothing_of_tokens_times_vocabulary_is_held_and_nothing_of_the_vocabulary_if_the_head_is_frozen(frozen, bonus):
    """3,000 tokens of a 2,048-word vocabulary: never a tensor of more than a chunk's 256 x 2,048 numbers, and but one (V, D)."""
    hidden, weight, targets = torch.randn(3000, 4), torch.randn(2048, 4), torch.randint(0, 2048, (3000,))
    made, d_weight = [], None if frozen else torch.zeros(2048, 4)
    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            made.extend(t for t in (out if isinstance(out, (tuple, list)) else [out]) if torch.is_tensor(t))
            return out
    with Watch():
        loss = lambda x, rows, entropy=None: x.sum() if entropy is None else x.sum() + 0 * entropy.sum()
        logprobs, d_hidden = G.head_gradient(hidden, weight, targets, 1.0, loss, d_weight, torch.zeros(3000) if bonus else None)
    assert max(t.numel() for t in made) == 256 * 2048
    own = weight.untyped_storage().data_ptr()               # views of the weight itself are none
    assert {t.data_ptr() for t in made if t.shape == (2048, 4)} <= ({own} if frozen else {own, d_weight.data_ptr()})
    want = plain_gradient(hidden, weight, targets, 1.0, torch.ones(3000))
    torch.testing.assert_close(d_hidden.double(), want[1], atol=1e-4, rtol=1e-4)


def test_the_chunked_head_accumulates_in_fp32():
    """bf16 weights, 20,000 tokens in 79 chunks: the head's gradient is that of fp32 weights to a part in a thousand."""
    hidden, weight = torch.randn(20_000, 8).bfloat16(), torch.randn(2048, 8).bfloat16()
    targets, gradients = torch.randint(0, 64, (20_000,)), []
    for h, w in ((hidden, weight), (hidden.float(), weight.float())):
        gradients.append(torch.zeros(2048, 8))
        G.head_gradient(h, w, targets, 1.0, lambda x, rows: x.sum(), gradients[-1])
    assert (gradients[0] - gradients[1]).norm() / gradients[1].norm() < 1e-3


# ---------------------------------------------------------------------------------------------------------- the loss

floats = st.floats(-3, 3)


@given(st.lists(st.tuples(floats, floats, floats, st.floats(0, 2), floats, st.floats(0, 2), st.floats(0, 3)), min_size=1, max_size=8),
       st.floats(0, 0.9), st.floats(0, 2), st.sampled_from([0.0, 0.1, 1.0]), st.sampled_from([0.0, 0.3]))
def test_the_loss_equals_the_formula_token_by_token(tokens, low, high, beta, alpha):
    new, old, a, w, ref, c, h = torch.tensor(tokens, dtype=torch.double).unbind(1)
    want = plain = 0.0
    for x, y, adv, weight, r, factor, entropy in tokens:
        rho = math.exp(x - y)
        k3 = math.exp(r - x) - (r - x) - 1
        gain = min(rho * adv, min(max(rho, 1 - low), 1 + high) * adv)
        plain -= weight * (gain - beta * k3)
        want -= weight * (factor * gain - beta * k3 + alpha * entropy)
    assert float(G.policy_loss(new, old, a, w, low, high, beta, ref)) == pytest.approx(plain, rel=1e-9, abs=1e-9)
    assert float(G.policy_loss(new, old, a, w, low, high, beta, ref, c, alpha, h)) == pytest.approx(want, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("ratio, advantage, moves", [(1.3, 1.0, False), (1.3, -1.0, True), (0.7, 1.0, True), (0.7, -1.0, False),
                                                     (1.1, 1.0, True), (0.9, -1.0, True), (1.0, 0.0, False)])
def test_the_clipped_branch_has_exactly_zero_gradient(ratio, advantage, moves):
    new = torch.tensor([math.log(ratio)], requires_grad=True)
    G.policy_loss(new, torch.zeros(1), torch.tensor([advantage]), torch.ones(1), 0.2, 0.2).backward()
    assert (new.grad.item() != 0) == moves and torch.isfinite(new.grad).all()


def test_low_and_high_clip_bounds_are_separate():
    loss = lambda ratio, a: float(G.policy_loss(torch.tensor([math.log(ratio)]), torch.zeros(1), torch.tensor([a]), torch.ones(1), 0.1, 0.3))
    assert loss(2.0, 1.0) == pytest.approx(-1.3) and loss(0.5, -1.0) == pytest.approx(0.9)


def test_kl_is_the_k3_estimator_whose_value_is_unbiased_on_an_enumerated_vocabulary():
    p, q = torch.softmax(torch.randn(6, dtype=torch.double), 0), torch.softmax(torch.randn(6, dtype=torch.double), 0)
    tokens = lambda w: G.policy_loss(p.log(), p.log(), torch.zeros(6), w, beta=1.0, ref_logprobs=q.log())
    assert float(tokens(p)) == pytest.approx(float((p * (p / q).log()).sum()))        # sum over tokens of pi(t) k3(t) = KL
    each = [float(tokens(F.one_hot(torch.tensor(i), 6).double())) for i in range(6)]
    assert min(each) >= 0


def test_the_mean_gradient_of_k3_is_that_of_the_other_divergence():
    """What the docstring claims, on an enumerated vocabulary: sampled from pi, it is the gradient of KL(pi_ref || pi)."""
    theta, q = torch.randn(6, dtype=torch.double, requires_grad=True), torch.softmax(torch.randn(6, dtype=torch.double), 0)
    p = torch.softmax(theta, 0)
    loss = G.policy_loss(p.log(), p.log().detach(), torch.zeros(6), p.detach(), beta=1.0, ref_logprobs=q.log())
    gradient = lambda value: torch.autograd.grad(value, theta, retain_graph=True)[0]
    torch.testing.assert_close(gradient(loss), gradient((q * (q / p).log()).sum()))
    assert not torch.allclose(gradient(loss), gradient((p * (p / q).log()).sum()))


# ------------------------------------------------------------------------- the correction, the entropy bonus

@given(st.lists(st.floats(-200, 200) | st.floats(-2, 2), min_size=1, max_size=9))
def test_the_factors_of_a_correction_are_the_published_ones(apart):
    """However far the two are apart: exp(200) is infinite in fp32."""
    trained = torch.tensor(apart)
    factors = {c: G.correction_factors(trained, torch.zeros(len(apart)), c) for c in ("none", "tis", "icepop")}
    for i, m in enumerate(trained.exp().tolist()):
        assert factors["none"][i] == 1
        assert factors["tis"][i] == pytest.approx(min(m, 2.0))
        assert factors["icepop"][i] == pytest.approx(m if 0.5 <= m <= 5 else 0.0)


@given(st.floats(0, 5), st.floats(0.01, 2), st.floats(0, 1))
def test_the_entropy_bonus_acts_below_its_target_alone_and_the_more_the_further_below(entropy, target, coefficient):
    alpha = G.entropy_coefficient(entropy, target, coefficient)
    assert alpha == pytest.approx(coefficient * (target - entropy) / target if entropy < target else 0.0)
    assert G.entropy_coefficient(entropy, 0.0, coefficient) == 0.0


def test_the_sampled_entropy_is_the_mean_over_tokens_and_its_own_mean_the_entropy():
    rows = [G.Row("m", Completion([1], [2] * len(own), own, "stop"), 0.0, 1.0) for own in ([-1.0, -2.0], [], [-6.0])]
    assert G.sampled_entropy(rows) == pytest.approx(3.0) and G.sampled_entropy([]) == 0.0
    p = torch.softmax(torch.randn(6, dtype=torch.double), 0)
    each = [G.sampled_entropy([G.Row("m", Completion([1], [i], [p[i].log().item()], "stop"), 0.0, 1.0)]) for i in range(6)]
    assert float((p * torch.tensor(each)).sum()) == pytest.approx(float(-(p * p.log()).sum()))


# ------------------------------------------------------------------------------------------------- micro-batches

few = st.integers(0, 1) | st.integers(0, V - 1)         # so that prompts and completions often share a prefix
completions = st.builds(lambda p, c: Completion(p, c, [-math.log(V)] * len(c), "stop"), st.lists(few, min_size=1, max_size=9),
                        st.lists(few, max_size=6))
row_lists = st.lists(st.builds(G.Row, st.sampled_from(["ask", "note"]), completions, st.floats(-2, 2), st.floats(0.01, 1)), min_size=1, max_size=6)


def gradient(model, rows, reference=None, **options):
    return G.step_gradient(model, rows, G.Config(**options), V, reference, fresh=False)


FACTORS = {"none": lambda m: 1.0, "tis": lambda m: min(m, 2.0), "icepop": lambda m: m if 0.5 <= m <= 5.0 else 0.0}


def slow_loss(model, rows, config, reference=None, start=None, alpha=0.0):
    """The loss by a loop over rows and sampled tokens, each from the whole sequence up to it.

    `start` has the weights that sampled: with a correction, pi_old is its."""
    total = 0.0
    for r in rows:
        ids = r.completion.prompt_ids + r.completion.token_ids
        for t, (token, old) in enumerate(zip(r.completion.token_ids, r.completion.logprobs)):
            at = len(r.completion.prompt_ids) + t
            scores = lambda m: torch.log_softmax(m.logits(m(torch.tensor([ids[:at]])))[0, -1] / config.temperature, -1)
            score = lambda m: scores(m)[token]
            before = old if start is None else score(start).item()
            x, rho = score(model), torch.exp(score(model) - before)
            gain = torch.minimum(rho * r.advantage, rho.clamp(1 - config.clip_low, 1 + config.clip_high) * r.advantage)
            gain = FACTORS.get(config.correction, FACTORS["none"])(math.exp(before - old)) * gain
            if alpha:
                gain = gain - alpha * (scores(model).exp() * scores(model)).sum()
            if reference is not None:
                d = score(reference).detach() - x
                gain = gain - config.beta * (d.exp() - d - 1)
            total = total - r.weight * gain
    return total


@settings(max_examples=20)
@given(row_lists, st.sampled_from([1, 12, 10_000]), st.sampled_from([1.0, 0.6]), st.booleans())
def test_the_gradient_equals_a_loop_over_the_sampled_tokens(rows, batch_tokens, temperature, kl):
    """So prompts carry none, first and last sampled tokens do, and neither shared prefixes nor micro-batches change anything."""
    model, reference = make_model(vocab_size=V, std=0.15), make_model(1, vocab_size=V, std=0.15) if kl else None
    config = G.Config(temperature=temperature, batch_tokens=batch_tokens, beta=0.3 if kl else 0.0)
    g, figures = G.step_gradient(model, rows, config, V, reference, fresh=False)
    loss = slow_loss(model, rows, config, reference)
    want = torch.autograd.grad(loss, list(model.parameters())) if isinstance(loss, torch.Tensor) else [torch.zeros_like(x) for x in g]
    for a, b in zip(g, want):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-3)
    assert figures["loss"] == pytest.approx(float(torch.as_tensor(loss).detach()), abs=1e-4)
    inputs = [(r.module, r.completion.prompt_ids + r.completion.token_ids[:-1]) for r in rows if r.completion.token_ids]
    prefixes = {(module, *ids[:n]) for module, ids in inputs for n in range(1, len(ids) + 1)}
    assert figures["tokens_unshared"] == sum(len(ids) for _, ids in inputs)
    assert figures["tokens_distinct"] == len(prefixes)
    assert figures["tokens_forwarded"] == {1: figures["tokens_unshared"], 10_000: len(prefixes)}.get(batch_tokens, figures["tokens_forwarded"])


@settings(max_examples=12)
@given(row_lists, st.sampled_from(["tis", "icepop"]), st.sampled_from([12, 10_000]), st.sampled_from([0.0, 0.5]), st.sampled_from([1.0, 0.6]))
def test_corrected_gradients_equal_the_loop_in_every_pass(rows, correction, batch_tokens, alpha, temperature):
    """pi_old stays what the weights that sampled gave, in a second pass with other weights too."""
    model = make_model(vocab_size=V, std=0.15)
    start, moved = copy.deepcopy(model), make_model(1, vocab_size=V, std=0.15)
    config = G.Config(correction=correction, batch_tokens=batch_tokens, temperature=temperature, parity=1e9)
    for fresh in (True, False):
        g, figures = G.step_gradient(model, rows, config, V, fresh=fresh, alpha=alpha)
        loss = slow_loss(model, rows, config, start=start, alpha=alpha)
        want = torch.autograd.grad(loss, list(model.parameters())) if isinstance(loss, torch.Tensor) else [torch.zeros_like(x) for x in g]
        for a, b in zip(g, want):
            torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-3)
        assert figures["loss"] == pytest.approx(float(torch.as_tensor(loss).detach()), abs=1e-4)
        assert ("entropy" in figures) == (alpha > 0 and any(r.completion.token_ids for r in rows))
        model.load_state_dict(moved.state_dict())


def test_the_figures_of_a_correction_are_those_of_its_factors():
    """The sampler gave each token 1/40; the model's own probabilities over that are the ratios."""
    model, found = make_model(vocab_size=V, std=0.15), {}
    rows = [G.Row("m", Completion([i, 5], [3, i, 7], [-math.log(V)] * 3, "stop"), 1.0, 0.1) for i in range(8)]
    for correction in ("none", "tis", "icepop"):
        _, found[correction] = G.step_gradient(model, rows, G.Config(correction=correction, parity=1e9, batch_tokens=20), V)
    ratios = [math.exp(p) * V for r in rows for p in r.trained]
    changed = {"tis": [m for m in ratios if m > 2], "icepop": [m for m in ratios if not 0.5 <= m <= 5]}
    assert "correction" not in found["none"] and all(changed.values())
    for correction, odd in changed.items():
        mean = sum(FACTORS[correction](m) for m in ratios) / len(ratios)
        want = {"mean": mean, "min": min(ratios), "max": max(ratios), "share": len(odd) / len(ratios)}
        assert found[correction]["correction"] == pytest.approx(want, rel=1e-4)


def sampled_by(model, rows):
    """The rows, as if the model itself had sampled them."""
    for tree in G.pack(rows, 10**6):
        own = G.batch_logprobs(model, tree, 1.0, V).split([len(r.completion.token_ids) for r in tree.rows])
        for row, logprobs in zip(tree.rows, own):
            row.completion.logprobs[:] = logprobs.tolist()
    return rows


@pytest.mark.parametrize("correction", ["tis", "icepop"])
def test_in_fp32_a_correction_changes_nothing_to_1e_5(correction):
    model = make_model(vocab_size=V, std=0.15)
    rows = [G.Row("m", Completion([i, 5], [3, i, 7], [0.0] * 3, "stop"), (-1.0) ** i, 0.1) for i in range(8)]
    sampled_by(model, rows)
    for fresh in (True, False):
        plain, corrected = (G.step_gradient(model, rows, G.Config(correction=c, batch_tokens=9), V, fresh=fresh) for c in ("none", correction))
        for a, b in zip(plain[0], corrected[0]):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
        assert corrected[1]["correction"] == pytest.approx({"mean": 1, "min": 1, "max": 1, "share": 0}, abs=1e-5)
        with torch.no_grad():
            model.head.mul_(1.01)


def test_under_dropout_pi_old_is_scored_without_it():
    """Else the factors would answer for the dropout, which neither the sampler nor a later pass has drawn."""
    model = make_model(vocab_size=V, std=0.15)
    add_lora(model, 4, 8.0, 0.5, ("q_proj", "v_proj"), 0)
    for p in trainable(model):
        torch.nn.init.normal_(p.data, 0, 0.5)
    rows = sampled_by(model, [G.Row("m", Completion([i, 5], [3, i, 7], [0.0] * 3, "stop"), 1.0, 0.1) for i in range(8)])
    _, figures = G.step_gradient(model, rows, G.Config(correction="tis", lora_rank=4, lora_dropout=0.5), V)
    assert figures["correction"] == pytest.approx({"mean": 1, "min": 1, "max": 1, "share": 0}, abs=1e-4)
    assert all(r.trained == pytest.approx(r.completion.logprobs, abs=1e-4) for r in rows) and figures["loss"] != pytest.approx(-2.4)


def test_the_entropy_bonus_reaches_rows_of_advantage_zero():
    model = make_model(vocab_size=V, std=0.15)
    rows = [G.Row("m", Completion([5, 6], [3, 1], [-1.0, -1.0], "stop"), 0.0, 0.5)]
    assert not any(x.any() for x in gradient(model, rows)[0])
    g, figures = G.step_gradient(model, rows, G.Config(), V, fresh=False, alpha=0.3)
    assert any(x.any() for x in g) and figures["loss"] == pytest.approx(-0.3 * figures["entropy"])


@settings(max_examples=20)
@given(row_lists, st.lists(st.integers(0, 2), min_size=6, max_size=6))
def test_the_gradients_of_ranks_sum_to_the_whole_one(rows, ranks):
    """Any split of the rows over up to three machines, one without rows included: what a sum over them would give."""
    model = make_model(vocab_size=V, std=0.15)
    parts = [gradient(model, [r for r, rank in zip(rows, ranks) if rank == i])[0] for i in range(3)]
    for whole, *of_ranks in zip(gradient(model, rows)[0], *parts):
        torch.testing.assert_close(sum(of_ranks), whole, atol=2e-5, rtol=1e-3)


def test_a_gradient_is_the_same_each_time_with_two_threads():
    """Eight completions of one prompt: eight gradients meet in the state of its last token."""
    model = make_model(vocab_size=V, hidden_size=128)
    rows = [G.Row("m", Completion([prompt, 1, 2], [token] * 30, [-3.7] * 30, "stop"), 0.1 * token, 0.01)
            for prompt in range(12) for token in range(1, 9)]
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first, *others = (gradient(model, rows, batch_tokens=10**6)[0] for _ in range(12))
    finally:
        torch.set_num_threads(threads)
    for other in others:
        assert all(map(torch.equal, first, other))


def test_the_sampled_end_token_is_trained_whatever_the_padding_id():
    """id 0 ends the completion and is also what pads the batch; its log-prob still moves, and only once."""
    model = make_model(vocab_size=V)
    rows = [G.Row("m", Completion([5, 6], [0], [-1.0], "stop"), 1.0, 1.0), G.Row("m", Completion([1, 2, 3], [4, 7, 0], [-1.0] * 3, "stop"), 0.0, 1.0)]
    g, _ = gradient(model, rows)
    want = torch.autograd.grad(slow_loss(model, rows[:1], G.Config()), list(model.parameters()))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(g, want)) and any(a.any() for a in g)


@given(st.integers(1, 5))
def test_rows_of_advantage_zero_change_no_bit_of_the_gradient(k):
    model = make_model(vocab_size=V)
    rows = [G.Row("m", Completion([1, 2], [3, 4], [-1.0, -2.0], "stop"), 1.0, 0.5)]
    dead = [G.Row("m", Completion([5 + i], [6, 7], [-1.0, -1.0], "stop"), 0.0, 0.5) for i in range(k)]
    a, b = (gradient(model, r, batch_tokens=1)[0] for r in (rows, dead + rows))
    assert all(torch.equal(x, y) for x, y in zip(a, b))


def test_completions_of_no_and_of_one_token_train():
    model = make_model(vocab_size=V)
    rows = [G.Row("m", Completion([1, 2], [], [], "length"), 1.0, 1.0), G.Row("m", Completion([1], [3], [-1.0], "stop"), 1.0, 1.0)]
    g, figures = gradient(model, rows)
    assert all(torch.isfinite(x).all() for x in g) and figures["tokens_forwarded"] == 1
    g, figures = gradient(model, rows[:1])
    assert not any(x.any() for x in g) and figures == {
        "loss": 0, "kl": 0, "clipped": 0, "tokens_distinct": 0, "tokens_forwarded": 0, "tokens_unshared": 0, "halved": 0, "grad_share": {}}
    assert not any(x.any() for x in gradient(model, [])[0])


def test_prompts_of_later_calls_need_not_extend_earlier_ones():
    """Each call is scored behind its own prompt, whatever the other calls of its run were given."""
    model = make_model(vocab_size=V)
    ts = [dataclasses.replace(t, calls=tuple(dataclasses.replace(c, completion=Completion([7 + i * 5, 8], [9 + i], [-1.0], "stop"))
                                             for i, c in enumerate(t.calls))) for t in
          (trajectory("e", 0, ["ask", "note"], 1.0), trajectory("e", 1, ["ask", "note"], 0.0))]
    groups = G.group_calls(ts)
    rows = G.weigh(groups, G.advantages(groups, ts), ts)
    seen = []
    hook = model.register_forward_pre_hook(lambda m, args: seen.extend(map(tuple, args[0].tolist())))
    gradient(model, rows)
    hook.remove()
    assert sorted(seen) == [(7, 8), (12, 8)]                # one pass for the two runs


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(0, 9)), max_size=20), st.integers(1, 100))
def test_micro_batches_hold_every_row_once_within_the_budget(sizes, budget):
    rows = [G.Row("m", Completion([1] * p, [2] * c, [0.0] * c, "stop"), float(i), 1.0) for i, (p, c) in enumerate(sizes)]
    trees = G.pack(rows, budget)
    assert sorted(r.advantage for t in trees for r in t.rows) == [r.advantage for r in rows if r.completion.token_ids]
    for t in trees:
        assert len(t.rows) == 1 or len(t.ids) <= budget
        assert len(t.at) == sum(len(r.completion.token_ids) for r in t.rows) and len(t.ids) == len(t.positions)


@given(row_lists, st.sampled_from([1, 3, 128]))
def test_every_distinct_prefix_is_one_node_that_sees_its_own_tokens(rows, long):
    for tree in G.pack(rows, 10_000):
        new, parts = forest_parts(tree.paths, long)
        assert new.tolist() == list(range(len(tree.ids)))
        prefixes = []
        for node, seen in enumerate(pairs_seen(parts, len(tree.ids))):
            own = np.flatnonzero(seen)
            assert seen.max() == 1 and own[-1] == node      # each of its ancestors and itself, once
            assert [tree.positions[i] for i in own] == list(range(len(own)))
            prefixes.append(tuple(tree.ids[i] for i in own))
        assert len(set(prefixes)) == len(prefixes)
        for row, (_, path) in zip(tree.rows, tree.paths):
            assert [tree.ids[i] for i in path] == row.completion.prompt_ids + row.completion.token_ids[:-1]


@pytest.mark.parametrize("shared, own, examples", [(30, 5, 2), (400, 30, 4), (1700, 30, 4), (6000, 50, 3), (300, 900, 8)])
def test_by_default_rows_that_begin_alike_are_not_parted(shared, own, examples):
    """Whatever the length of the prompts: at most 1.3 times the distinct tokens are forwarded."""
    rng = np.random.default_rng(0)
    draw = lambda n: rng.integers(1, 1000, n).tolist()
    trunk, rows = draw(shared), []
    for _ in range(examples):
        prompt = trunk + draw(own)
        rows += [G.Row("m", Completion(prompt, draw(40), [0.0] * 40, "stop"), 1.0, 1.0) for _ in range(8)]
    size = G.tokens_per_batch(make_model(vocab_size=V), rows, G.Config())
    forwarded, distinct = (sum(len(tree.ids) for tree in G.pack(rows, n)) for n in (size, 10**9))
    assert forwarded <= 1.3 * distinct


def test_modules_share_the_gradient_norm():
    model = make_model(vocab_size=V)
    row = lambda module, a: G.Row(module, Completion([1, 2], [3], [-1.0], "stop"), a, 1.0)
    _, figures = gradient(model, [row("ask", 3.0), row("note", 1.0)])
    assert figures["grad_share"] == pytest.approx({"ask": 0.75, "note": 0.25}, abs=1e-5)
