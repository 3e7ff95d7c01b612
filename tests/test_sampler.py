"""The sampler: what is drawn, with which log-prob, and that company does not matter."""
import copy
import hashlib
import math

import numpy as np
import pytest
import torch
from conftest import make_model
from hypothesis import given, settings
from hypothesis import strategies as st

import mmgrpo as G
from model import KVCache, TreeAttention

chat = lambda text: [{"role": "user", "content": text}]
prompts = st.lists(st.sampled_from(["a", "hello", "a longer prompt than the others", "Tarel Moro", ""]), min_size=1, max_size=7)


@pytest.fixture(autouse=True)
def sharing(monkeypatch):
    """Tests may change what the sampler shares."""
    for owner, name in ((G.Sampler, "SHARE"), (KVCache, "LONG"), (TreeAttention, "LONG")):
        monkeypatch.setattr(owner, name, getattr(owner, name))


def sample(model, tokenizer, texts, keys=None, **options):
    """Run the requests to the end -> completions in the order of the requests."""
    sampler = G.Sampler(model, tokenizer, **{"max_tokens": 6, "slots": 3} | options)
    tickets = [sampler.submit(chat(t), (i,) if keys is None else keys[i]) for i, t in enumerate(texts)]
    done = {}
    while len(done) < len(texts):
        done.update(sampler.advance())
    assert not sampler.live and not sampler.waiting and sampler.advance() == []
    return [done[t] for t in tickets]


def slow_sample(model, tokenizer, text, key, max_tokens=6, temperature=1.0):
    """One request alone, the whole sequence anew for every token: what the sampler must equal."""
    ids, tokens, logprobs = tokenizer.encode_chat(chat(text)), [], []
    seed = int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=16).digest(), "little")
    uniforms = np.random.Generator(np.random.Philox(key=seed)).random(max_tokens)
    for u in uniforms:
        with torch.no_grad():
            logits = model.logits(model(torch.tensor([ids + tokens])))[0, -1, :tokenizer.size]
        logp = torch.log_softmax(logits.double() / temperature, -1)
        cdf = logp.exp().cumsum(0)
        tokens.append(int((cdf <= u * cdf[-1]).sum()))
        logprobs.append(float(logp[tokens[-1]]))
        if tokens[-1] in tokenizer.end_ids:
            break
    return tokens, logprobs


@pytest.fixture
def abrupt(tokenizer):
    """The tokenizer, with every third id an end token: completions of all lengths."""
    abrupt = copy.copy(tokenizer)
    abrupt.end_ids = frozenset(range(0, tokenizer.size, 3))
    return abrupt


@settings(max_examples=40)
@given(prompts, st.integers(1, 5), st.sampled_from([0.5, 1.0, 1.7]), st.sampled_from([1, 4, 16]),
       st.sampled_from([1, 5, 64]), st.sampled_from([0, 10, 40, 10_000]))
def test_batched_sampling_equals_one_request_alone(model, abrupt, texts, slots, temperature, share, long, pool):
    """Same tokens, log-probs to 1e-5, whatever the batch-mates, the slots, the order of arrival and the prefixes in the pool."""
    tokenizer, G.Sampler.SHARE, KVCache.LONG, TreeAttention.LONG = abrupt, share, long, long
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(G, "nodes_for", lambda config, like: pool)
        completions = sample(model, tokenizer, texts, slots=slots, temperature=temperature)
    for i, c in enumerate(completions):
        tokens, logprobs = slow_sample(model, tokenizer, texts[i], (i,), temperature=temperature)
        assert c.token_ids == tokens and c.prompt_ids == tokenizer.encode_chat(chat(texts[i]))
        assert c.logprobs == pytest.approx(logprobs, abs=1e-5, rel=3e-6)


@settings(max_examples=20)
@given(prompts, st.integers(1, 8), st.sampled_from([1, 8]))
def test_decoding_in_the_shapes_of_cuda_graphs_equals_decoding_as_it_comes(model, abrupt, texts, slots, times):
    """What a CUDA machine runs, without the graphs: free slots in a rounded shape touch nothing."""
    G.Sampler.SHARE, KVCache.LONG, init = 8, 8, G.Sampler.__init__
    abrupt.end_ids = frozenset(range(0, 2048, 3 if times == 1 else 15))
    texts, steps = texts * times, []
    want = sample(model, abrupt, texts, slots=slots, max_tokens=12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(G.Sampler, "__init__", lambda self, *a, **k: (init(self, *a, **k), setattr(self, "graphs", {}))[0])
        patch.setattr(G, "capture", lambda step: lambda: (steps.append(1), step()))
        got = sample(model, abrupt, texts, slots=slots, max_tokens=12)
    assert [c.token_ids for c in got] == [c.token_ids for c in want]
    for a, b in zip(got, want):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)
    assert steps or max(len(c.token_ids) for c in want) < 4


def test_free_slots_are_as_new_whatever_the_shape(model, abrupt, monkeypatch):
    """Five to seven live sequences decode in a shape of eight: nothing of the others moves, nor of those that end."""
    monkeypatch.setattr(G, "capture", lambda step: step)
    rounded, abrupt.end_ids = 0, frozenset(range(0, 2048, 15))
    for n in (5, 6, 7):
        sampler, done = G.Sampler(model, abrupt, slots=8, max_tokens=40), []
        sampler.graphs = {}
        for i in range(n):
            sampler.submit(chat("hello"), (n, i))
        while len(done) < n:
            done += sampler.advance()
            rounded += len(sampler.live) in (3, 5, 6, 7)
            for state in (sampler.count, sampler.limit, sampler.cache.lengths):
                assert not state[len(sampler.live):].any()
    assert rounded > 10                                     # the steps of which this was a test


def scored(model, completions, temperature, tokenizer) -> tuple[list[float], list[float]]:
    """The log-probs of all sampled tokens, as sampled and as the trainer finds them."""
    tree, = G.pack([G.Row("m", c, 1.0, 1.0) for c in completions], 10**6)
    with torch.no_grad():
        again = G.batch_logprobs(model, tree, temperature, tokenizer.size)
    return [x for r in tree.rows for x in r.completion.logprobs], again.tolist()


@settings(max_examples=15)
@given(prompts, st.integers(1, 4), st.sampled_from([0.7, 1.0]))
def test_the_trainer_finds_the_samplers_log_probs(model, tokenizer, texts, slots, temperature):
    """The ratio of the first update is 1: scoring the sampled tokens anew gives the same numbers."""
    completions = sample(model, tokenizer, texts, slots=slots, temperature=temperature)
    sampled, again = scored(model, completions, temperature, tokenizer)
    assert again == pytest.approx(sampled, abs=1e-5)


def test_frequencies_follow_the_exact_softmax():
    """Chi-squared of 20,000 draws at two temperatures; tokens of probability 0 are never drawn."""
    logits = torch.tensor([2.0, -math.inf, 0.0, 1.0, -1.0, -math.inf, 0.5, -math.inf])
    uniform = torch.from_numpy(np.random.Generator(np.random.Philox(key=3)).random(20_000))
    for temperature in (1.0, 0.5):
        p = torch.softmax(logits / temperature, 0)
        token, logp = G.sample_tokens(logits.expand(20_000, -1), uniform, temperature)
        counts = torch.bincount(token, minlength=8)
        assert counts[p == 0].sum() == 0
        live = p > 0
        chi2 = ((counts - 20_000 * p)[live] ** 2 / (20_000 * p)[live]).sum()
        assert chi2 < 18.5                                   # 99.9th percentile, 4 degrees of freedom
        torch.testing.assert_close(logp, torch.log(p)[token])


@given(st.lists(st.floats(-20, 20), min_size=1, max_size=9), st.sampled_from([0.0, 2**-53, 0.5, 1 - 2**-53]) | st.floats(0, 1, exclude_max=True),
       st.sets(st.integers(0, 8)))
def test_whatever_the_uniform_number_a_possible_token_is_drawn(values, u, impossible):
    logits = torch.tensor([[-math.inf if i in impossible and len(impossible) < len(values) else v for i, v in enumerate(values)]])
    if not torch.isfinite(logits).any():
        return
    token, logp = G.sample_tokens(logits, torch.tensor([u], dtype=torch.double), 1.0)
    assert torch.isfinite(logits[0, token]) and logp <= 0


def test_a_bound_between_two_tokens_never_draws_one_of_probability_zero():
    """Where the sums round, what is left of the bound must not fall below 0: the first place is as impossible as any."""
    random = torch.Generator().manual_seed(0)
    x = torch.rand(2000, 20, generator=random) ** 8
    x[:, ::3] = 0
    sums = x.cumsum(-1, dtype=torch.double)
    for column in range(19):
        place, rest = G.first_above(x, sums[:, column])
        assert (rest >= 0).all() and (x.gather(1, place[:, None]) > 0).all()


def test_temperature_zero_is_greedy(model, tokenizer):
    c, = sample(model, tokenizer, ["hello"], temperature=0.0)
    ids = list(c.prompt_ids)
    for token in c.token_ids:
        with torch.no_grad():
            assert int(model.logits(model(torch.tensor([ids])))[0, -1].argmax()) == token
        ids.append(token)
    assert c.logprobs == [0.0] * len(c.token_ids)


@given(st.integers(1, 8), st.floats(0.05, 1.0), st.floats(0, 1, exclude_max=True))
def test_top_k_and_top_p_draw_among_the_likeliest(k, p, u):
    logits = torch.tensor([[0.3, 2.0, 1.0, -1.0, 0.0, 1.5, -2.0, 0.7]])
    probability = torch.softmax(logits[0], 0)
    ranked = probability.argsort(descending=True).tolist()
    mass = [float(probability[ranked[:i]].sum()) for i in range(8)]         # of those before the i-th
    allowed = {t for i, t in enumerate(ranked) if i < k and (mass[i] < p or i == 0)}
    token, logp = G.sample_tokens(logits, torch.tensor([u], dtype=torch.double), 1.0, k, p)
    assert int(token) in allowed
    assert float(logp.exp()) == pytest.approx(float(probability[token] / probability[list(allowed)].sum()), rel=1e-4)


def test_any_end_token_ends_a_completion_and_is_kept(model, tokenizer):
    """Whichever of many end tokens is drawn stops, is the last token sampled, and is no truncation."""
    tokenizer = copy.copy(tokenizer)
    tokenizer.end_ids = frozenset(range(0, 2048, 8))
    completions = sample(model, tokenizer, ["a"] * 100, max_tokens=12, slots=50)
    for c in completions:
        assert (c.finish_reason == "stop") == (c.token_ids[-1] in tokenizer.end_ids)
        assert not set(c.token_ids[:-1]) & tokenizer.end_ids
        assert len(c.token_ids) == len(c.logprobs) and (c.finish_reason == "stop" or len(c.token_ids) == 12)
        assert c.text == tokenizer.decode(c.token_ids[:-1] if c.finish_reason == "stop" else c.token_ids)
    assert len({c.token_ids[-1] for c in completions if c.finish_reason == "stop"}) > 5
    assert {c.finish_reason for c in completions} == {"stop", "length"}


def test_a_prompt_that_leaves_no_room_is_done_without_a_token(tokenizer):
    model = make_model(vocab_size=tokenizer.size, max_position_embeddings=24)
    length = len(tokenizer.encode_chat(chat("a b")))
    long, short, tight = sample(model, tokenizer, ["a b c d e f g h i j k l m n o p q r s t", "a b", "a"], max_tokens=50)
    assert (long.token_ids, long.logprobs, long.finish_reason) == ([], [], "length") and len(long.prompt_ids) >= 24
    assert len(short.token_ids) <= 24 - length and short.finish_reason in ("length", "stop")


def test_ids_that_the_tokenizer_lacks_cannot_be_drawn(tokenizer):
    """A vocabulary padded beyond the tokenizer, with huge logits there."""
    model = make_model(vocab_size=tokenizer.size + 64)
    with torch.no_grad():
        model.embed_tokens.weight[tokenizer.size:] = 50 * model.embed_tokens.weight[:64]
    completions = sample(model, tokenizer, ["a"] * 20, slots=8) + sample(model, tokenizer, ["a"], temperature=0.0)
    assert all(i < tokenizer.size for c in completions for i in c.token_ids)
    sampled, again = scored(model, completions[:20], 1.0, tokenizer)        # and the trainer's distribution leaves them out too
    assert again == pytest.approx(sampled, abs=1e-5)


def test_every_distinct_prefix_is_prefilled_once(model, tokenizer):
    """All but the last token of each prompt, which every request has for itself; what came before serves what comes later."""
    G.Sampler.SHARE, forwarded = 1, []
    hook = model.register_forward_pre_hook(lambda m, args: forwarded.append(args[0].numel()))
    sampler = G.Sampler(model, tokenizer, slots=16, max_tokens=1)
    texts = ["Tarel Moro lies on the river"] * 8 + ["Tarel Moro lies on the sea"] * 2 + ["another"]
    ids = [tokenizer.encode_chat(chat(t)) for t in texts]
    for again in (texts, texts[:10]):
        for i, t in enumerate(again):
            sampler.submit(chat(t), (i,))
        sampler.advance()
    hook.remove()
    prefills = forwarded[::2]                               # each is followed by a decode step
    assert prefills == [len({tuple(p[:n]) for p in ids for n in range(1, len(p))}) + 11, 10]


def test_a_finished_slot_is_refilled_at_once(model, abrupt, monkeypatch):
    """Whenever a slot is free and a request waits, the next advance takes it in, beside those that go on."""
    sampler, admitted, beside = G.Sampler(model, abrupt, slots=3, max_tokens=9), [], 0
    admit = G.Sampler._admit
    monkeypatch.setattr(G.Sampler, "_admit", lambda self: (admit(self), admitted.append(len(self.live))))
    for i in range(20):
        sampler.submit(chat(str(i)), (i,))
    done = []
    while len(done) < 20:
        live, due = len(sampler.live), bool(sampler.waiting) and len(sampler.live) < 3
        admitted.clear()
        done += sampler.advance()
        assert bool(admitted) == due and all(n == 3 or not sampler.waiting for n in admitted)
        beside += due and live > 0
    assert beside > 2 and len({len(c.token_ids) for _, c in done}) > 3


def test_a_long_prompt_among_short_ones_is_prefilled_in_bounded_memory(tokenizer, monkeypatch):
    """A long prompt is a range of its own: no mask has its length, and the short ones are not padded to it."""
    model, ids_only, passes = make_model(max_position_embeddings=4096), copy.copy(tokenizer), []
    ids_only.encode_chat = lambda ids: ids
    attention = G.TreeAttention
    monkeypatch.setattr(G, "TreeAttention", lambda *a: passes.append(attention(*a)) or passes[-1])
    sampler, rng = G.Sampler(model, ids_only, slots=121, max_tokens=2), np.random.default_rng(0)
    for i, length in enumerate([20] * 60 + [2000] + [20] * 60):
        sampler.submit(rng.integers(5, 2000, length).tolist(), (i,))
    done = sampler.advance()
    assert len(done) == 121 and sum(len(p.new) for p in passes) == 120 * 20 + 2000
    for part in [part for p in passes for part in p.parts]:
        assert part.causal or part.mask.shape[2:] == (20, 20)


def test_no_two_requests_of_a_step_share_their_random_numbers(model, tokenizer):
    """Eight rollouts of one prompt; keys that differ in any part give different samples."""
    keys = [(0, 0, 0, r, "m", 0) for r in range(8)] + [(1, 0, 0, 0, "m", 0), (0, 1, 0, 0, "m", 0), (0, 0, 1, 0, "m", 0),
                                                       (0, 0, 0, 0, "n", 0), (0, 0, 0, 0, "m", 1)]
    completions = sample(model, tokenizer, ["same"] * len(keys), keys, slots=4)
    assert len({tuple(c.token_ids) for c in completions}) == len(keys)
    again = sample(model, tokenizer, ["same"] * len(keys), keys, slots=13)
    assert [c.token_ids for c in again] == [c.token_ids for c in completions]


def test_after_an_update_nothing_cached_survives(model, tokenizer):
    """One sampler across an update of the weights samples what a fresh one does."""
    old = G.Sampler(model, tokenizer, slots=3, max_tokens=6)
    def run(sampler):
        tickets, done = [sampler.submit(chat("same"), (i,)) for i in range(5)], {}
        while len(done) < 5:
            done.update(sampler.advance())
        return [done[t] for t in tickets]
    before = run(old)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.7)
    after = run(old)
    assert after == run(G.Sampler(model, tokenizer, slots=3, max_tokens=6)) and after != before


def test_weights_that_change_under_live_sequences_are_an_error(model, tokenizer):
    sampler = G.Sampler(model, tokenizer, slots=3, max_tokens=600)
    sampler.submit(chat("hello"), (0,))
    sampler.advance()
    with torch.no_grad():
        model.norm.weight.mul_(0.5)
    with pytest.raises(RuntimeError, match="the weights changed"):
        sampler.advance()


def test_ids_are_never_decoded_and_encoded_again(model, tokenizer):
    """A random LM samples ids that its own tokenizer would never give for the text; they are trained as sampled."""
    completions = sample(model, tokenizer, ["a"] * 12, slots=12)
    odd = [c for c in completions if tokenizer.encode(tokenizer.decode(c.token_ids)) != c.token_ids]
    assert odd
    for c in odd:
        seen = []
        hook = model.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        scored(model, [c], 1.0, tokenizer)
        hook.remove()
        assert seen[0].tolist() == [(c.prompt_ids + c.token_ids)[:-1]]


def test_bf16_samples_and_scores_nearly_alike(model, tokenizer):
    model = model.bfloat16()
    greedy, again = sample(model, tokenizer, ["a", "a"], temperature=0.0)
    assert greedy.token_ids == again.token_ids and greedy.logprobs == [0.0] * len(greedy.token_ids)
    completions = sample(model, tokenizer, ["a", "hello there"] * 4, slots=8)
    error = np.abs(np.subtract(*scored(model, completions, 1.0, tokenizer)))
    assert np.median(error) < 0.1
