"""From groups to the gradient: weights, the fused log-probs, the clipped loss, micro-batches."""
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import make_model
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import trajectory, trajectory_sets

import mmgrpo as G
from model import TreeAttention
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

@settings(max_examples=30)
@given(st.integers(0, 9), st.integers(2, 50), st.sampled_from([0.5, 1.0, 2.0]), st.integers(0, 10**6))
def test_fused_log_probs_and_gradients_equal_the_plain_ones(n, vocabulary, temperature, seed):
    g = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(n, 8, generator=g).requires_grad_(), torch.randn(vocabulary, 8, generator=g).requires_grad_()
    targets, up = torch.randint(0, vocabulary, (n,), generator=g), torch.randn(n, generator=g)
    fast = G.token_logprobs(hidden, weight, targets, temperature)
    plain = F.log_softmax((hidden.double() @ weight.double().t()) / temperature, -1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(fast.double(), plain, atol=1e-5, rtol=1e-5)
    for a, b in zip(torch.autograd.grad((fast * up).sum(), (hidden, weight)), torch.autograd.grad((plain * up).sum(), (hidden, weight))):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_fused_log_probs_work_in_chunks_and_hold_nothing_of_tokens_times_vocabulary():
    """9,000 tokens of a 2,048-word vocabulary, several chunks: no tensor of 9,000 x 2,048 numbers is ever made."""
    hidden, weight = torch.randn(9000, 4, requires_grad=True), torch.randn(2048, 4, requires_grad=True)
    targets, largest = torch.randint(0, 2048, (9000,)), 0
    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max([largest] + [t.numel() for t in (out if isinstance(out, (tuple, list)) else [out]) if torch.is_tensor(t)])
            return out
    with Watch():
        fast = G.token_logprobs(hidden, weight, targets)
        grads = torch.autograd.grad(fast.sum(), (hidden, weight))
    assert largest <= 2**22 < 9000 * 2048
    plain = F.log_softmax(hidden @ weight.t(), -1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(fast, plain, atol=1e-5, rtol=1e-5)
    for a, b in zip(grads, torch.autograd.grad(plain.sum(), (hidden, weight))):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


def test_the_chunked_head_accumulates_in_fp32():
    """bf16 weights, 20,000 tokens in ten chunks: the head's gradient is that of fp32 weights to bf16's own precision (measured
    0.0018 apart; summed in bf16, 0.0035)."""
    hidden, weight = torch.randn(20_000, 8).bfloat16(), torch.randn(2048, 8).bfloat16().requires_grad_()
    targets = torch.randint(0, 64, (20_000,))
    g, = torch.autograd.grad(G.token_logprobs(hidden, weight, targets).sum(), weight)
    w = weight.detach().float().requires_grad_()
    want, = torch.autograd.grad(G.token_logprobs(hidden.float(), w, targets).sum(), w)
    assert (g.float() - want).norm() / want.norm() < 2.5e-3


# ---------------------------------------------------------------------------------------------------------- the loss

floats = st.floats(-3, 3)


@given(st.lists(st.tuples(floats, floats, floats, st.floats(0, 2), floats), min_size=1, max_size=8), st.floats(0, 0.9),
       st.floats(0, 2), st.sampled_from([0.0, 0.1, 1.0]))
def test_the_loss_equals_the_formula_token_by_token(tokens, low, high, beta):
    new, old, a, w, ref = torch.tensor(tokens, dtype=torch.double).unbind(1)
    want = 0.0
    for x, y, adv, weight, r in tokens:
        rho = math.exp(x - y)
        k3 = math.exp(r - x) - (r - x) - 1
        want -= weight * (min(rho * adv, min(max(rho, 1 - low), 1 + high) * adv) - beta * k3)
    assert float(G.policy_loss(new, old, a, w, low, high, beta, ref)) == pytest.approx(want, rel=1e-9, abs=1e-9)


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


# ------------------------------------------------------------------------------------------------- micro-batches

few = st.integers(0, 1) | st.integers(0, V - 1)         # so that prompts and completions often share a prefix
completions = st.builds(lambda p, c: Completion(p, c, [-math.log(V)] * len(c), "stop"), st.lists(few, min_size=1, max_size=9),
                        st.lists(few, max_size=6))
row_lists = st.lists(st.builds(G.Row, st.sampled_from(["ask", "note"]), completions, st.floats(-2, 2), st.floats(0.01, 1)), min_size=1, max_size=6)


def gradient(model, rows, reference=None, **options):
    return G.step_gradient(model, rows, G.Config(**options), V, reference, fresh=False)


def slow_loss(model, rows, config, reference=None):
    """The loss by a loop over rows and sampled tokens, each from the whole sequence up to it."""
    total = 0.0
    for r in rows:
        ids = r.completion.prompt_ids + r.completion.token_ids
        for t, (token, old) in enumerate(zip(r.completion.token_ids, r.completion.logprobs)):
            at = len(r.completion.prompt_ids) + t
            score = lambda m: torch.log_softmax(m.logits(m(torch.tensor([ids[:at]])))[0, -1] / config.temperature, -1)[token]
            x, rho = score(model), torch.exp(score(model) - old)
            gain = torch.minimum(rho * r.advantage, rho.clamp(1 - config.clip_low, 1 + config.clip_high) * r.advantage)
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
    assert figures["tokens_forwarded"] == {1: figures["tokens_unshared"], 10_000: len(prefixes)}.get(batch_tokens, figures["tokens_forwarded"])


@settings(max_examples=20)
@given(row_lists, st.lists(st.integers(0, 2), min_size=6, max_size=6))
def test_the_gradients_of_ranks_sum_to_the_whole_one(rows, ranks):
    """Any split of the rows over up to three machines, one without rows included: what a sum over them would give."""
    model = make_model(vocab_size=V, std=0.15)
    parts = [gradient(model, [r for r, rank in zip(rows, ranks) if rank == i])[0] for i in range(3)]
    for whole, *of_ranks in zip(gradient(model, rows)[0], *parts):
        torch.testing.assert_close(sum(of_ranks), whole, atol=2e-5, rtol=1e-3)


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
        "loss": 0, "kl": 0, "clipped": 0, "tokens_forwarded": 0, "tokens_unshared": 0, "halved": 0, "grad_share": {"m": 0.0}}
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


@given(row_lists)
def test_every_distinct_prefix_is_one_node_that_sees_its_own_tokens_in_order(rows):
    for tree in G.pack(rows, 10_000):
        attend, prefixes = TreeAttention(tree.paths), []
        for node, (block, query) in enumerate(divmod(int(i), attend.queries.shape[1]) for i in attend.where):
            own = attend.keys[block][attend.seen[block, 0, query]].tolist()
            assert attend.new[node] == node
            assert attend.queries[block, query] == node == own[-1] and [tree.positions[i] for i in own] == list(range(len(own)))
            prefixes.append(tuple(tree.ids[i] for i in own))
        assert len(set(prefixes)) == len(prefixes)
        for row, (_, path) in zip(tree.rows, tree.paths):
            assert [tree.ids[i] for i in path] == row.completion.prompt_ids + row.completion.token_ids[:-1]


def test_modules_share_the_gradient_norm():
    model = make_model(vocab_size=V)
    row = lambda module, a: G.Row(module, Completion([1, 2], [3], [-1.0], "stop"), a, 1.0)
    _, figures = gradient(model, [row("ask", 3.0), row("note", 1.0)])
    assert figures["grad_share"] == pytest.approx({"ask": 0.75, "note": 0.25}, abs=1e-5)
