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

texts_of_prompts = ["a", "hello", "a longer prompt than the others", "Tarel Moro", ""]
prompts = st.lists(st.sampled_from(texts_of_prompts), min_size=1, max_size=7)


@pytest.fixture(autouse=True)
def sharing(monkeypatch):
    """Tests may change what the sampler shares."""
    for owner, name in ((G.Sampler, "SHARE"), (KVCache, "LONG"), (TreeAttention, "LONG")):
        monkeypatch.setattr(owner, name, getattr(owner, name))


@pytest.fixture
def abrupt(tokenizer):
    """The tokenizer, with every third id an end token: completions of all lengths."""
    return ending_every(3, tokenizer)


def ending_every(n, tokenizer):
    """A copy of the tokenizer, with every n-th id an end token."""
    other = copy.copy(tokenizer)
    other.end_ids = frozenset(range(0, tokenizer.size, n))
    return other


def chat(text) -> list[dict]:
    return [{"role": "user", "content": text}]


def run(sampler, texts, keys=None) -> list:
    """Run the requests to the end -> completions in the order of the requests."""
    tickets = []
    for i, text in enumerate(texts):
        tickets.append(sampler.submit(chat(text), (i,) if keys is None else keys[i]))
    done = {}
    while len(done) < len(texts):
        done.update(sampler.advance())
    return [done[ticket] for ticket in tickets]


def sample(model, tokenizer, texts, keys=None, **options) -> list:
    """What a new sampler makes of the requests; nothing stays behind in it."""
    sampler = G.Sampler(model, tokenizer, **{"max_tokens": 6, "slots": 3} | options)
    completions = run(sampler, texts, keys)
    assert not sampler.live
    assert not sampler.waiting
    assert sampler.advance() == []
    return completions


def ids_of(completions) -> list[list[int]]:
    return [c.token_ids for c in completions]


def slow_sample(model, tokenizer, text, key, max_tokens=6, temperature=1.0):
    """One request alone, the whole sequence anew for every token: what the sampler must equal."""
    ids = tokenizer.encode_chat(chat(text))
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    seed = int.from_bytes(digest, "little")

    tokens, logprobs = [], []
    for u in np.random.Generator(np.random.Philox(key=seed)).random(max_tokens):
        with torch.no_grad():
            logits = model.logits(model(torch.tensor([ids + tokens])))[0, -1, : tokenizer.size]
        logp = torch.log_softmax(logits.double() / temperature, -1)
        cdf = logp.exp().cumsum(0)
        token = int((cdf <= u * cdf[-1]).sum())
        tokens.append(token)
        logprobs.append(float(logp[token]))
        if token in tokenizer.end_ids:
            break
    return tokens, logprobs


def scored(model, completions, temperature, tokenizer) -> tuple[list[float], list[float]]:
    """The log-probs of all sampled tokens, as sampled and as the trainer finds them."""
    (tree,) = G.pack([G.Row("m", c, 1.0, 1.0) for c in completions], 10**6)
    with torch.no_grad():
        again = G.batch_logprobs(model, tree, temperature, tokenizer.size)
    sampled = [x for r in tree.rows for x in r.completion.logprobs]
    return sampled, again.tolist()


# -------------------------------------------------------------------------- company does not matter
@settings(max_examples=40)
@given(
    prompts,
    st.integers(1, 5),
    st.sampled_from([0.5, 1.0, 1.7]),
    st.sampled_from([1, 4, 16]),
    st.sampled_from([1, 5, 64]),
    st.sampled_from([0, 10, 40, 10_000]),
)
def test_batched_sampling_equals_one_request_alone(
    model, abrupt, texts, slots, temperature, share, long, pool
):
    """Same tokens, log-probs to 1e-5, whatever the mates, slots, arrival and shared prefixes."""
    G.Sampler.SHARE = share
    KVCache.LONG = TreeAttention.LONG = long
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(G, "nodes_for", lambda config, like: pool)
        completions = sample(model, abrupt, texts, slots=slots, temperature=temperature)

    for i, (text, c) in enumerate(zip(texts, completions)):
        tokens, logprobs = slow_sample(model, abrupt, text, (i,), temperature=temperature)
        assert c.token_ids == tokens
        assert c.prompt_ids == abrupt.encode_chat(chat(text))
        assert c.logprobs == pytest.approx(logprobs, abs=1e-5, rel=3e-6)


@settings(max_examples=20)
@given(prompts, st.integers(1, 8), st.sampled_from([1, 8]))
def test_decoding_in_the_shapes_of_cuda_graphs_equals_decoding_as_it_comes(
    model, tokenizer, texts, slots, times
):
    """What a CUDA machine runs, without the graphs: free slots in a rounded shape touch nothing."""
    G.Sampler.SHARE = KVCache.LONG = 8
    ending = ending_every(3 if times == 1 else 15, tokenizer)
    texts = texts * times
    want = sample(model, ending, texts, slots=slots, max_tokens=12)
    replayed = []
    plain_init = G.Sampler.__init__

    def init_with_graphs(self, *args, **options):
        plain_init(self, *args, **options)
        self.graphs = {}

    def capture(step):
        def replay():
            replayed.append(step)
            step()

        return replay

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(G.Sampler, "__init__", init_with_graphs)
        patch.setattr(G, "capture", capture)
        got = sample(model, ending, texts, slots=slots, max_tokens=12)

    assert ids_of(got) == ids_of(want)
    for a, b in zip(got, want):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)
    assert replayed or max(map(len, ids_of(want))) < 4


def test_free_slots_are_as_new_whatever_the_shape(model, tokenizer, monkeypatch):
    """Five to seven live sequences decode in a shape of eight: nothing else moves."""
    monkeypatch.setattr(G, "capture", lambda step: step)
    ending = ending_every(15, tokenizer)
    rounded = 0
    for n in (5, 6, 7):
        sampler = G.Sampler(model, ending, slots=8, max_tokens=40)
        sampler.graphs = {}
        for i in range(n):
            sampler.submit(chat("hello"), (n, i))
        done = []
        while len(done) < n:
            done += sampler.advance()
            live = len(sampler.live)
            rounded += live in (3, 5, 6, 7)
            for state in (sampler.count, sampler.limit, sampler.cache.lengths):
                assert not state[live:].any()
    # the steps of which this was a test
    assert rounded > 10


@settings(max_examples=15)
@given(prompts, st.integers(1, 4), st.sampled_from([0.7, 1.0]))
def test_the_trainer_finds_the_samplers_log_probs(model, tokenizer, texts, slots, temperature):
    """The ratio of the first update is 1: scoring the sampled tokens anew gives the same."""
    completions = sample(model, tokenizer, texts, slots=slots, temperature=temperature)

    sampled, again = scored(model, completions, temperature, tokenizer)

    assert again == pytest.approx(sampled, abs=1e-5)


# ------------------------------------------------------------------------------------ what is drawn
def test_frequencies_follow_the_exact_softmax():
    """Chi-squared of 20,000 draws at two temperatures; tokens of probability 0 never come."""
    n = 20_000
    logits = torch.tensor([2.0, -math.inf, 0.0, 1.0, -1.0, -math.inf, 0.5, -math.inf])
    uniform = torch.from_numpy(np.random.Generator(np.random.Philox(key=3)).random(n))
    for temperature in (1.0, 0.5):
        p = torch.softmax(logits / temperature, 0)

        token, logp = G.sample_tokens(logits.expand(n, -1), uniform, temperature)

        counts = torch.bincount(token, minlength=8)
        assert counts[p == 0].sum() == 0
        live = p > 0
        chi2 = ((counts - n * p)[live] ** 2 / (n * p)[live]).sum()
        # 99.9th percentile, 4 degrees of freedom
        assert chi2 < 18.5
        torch.testing.assert_close(logp, torch.log(p)[token])


@given(
    st.lists(st.floats(-20, 20), min_size=1, max_size=9),
    st.sampled_from([0.0, 2**-53, 0.5, 1 - 2**-53]) | st.floats(0, 1, exclude_max=True),
    st.sets(st.integers(0, 8)),
)
def test_whatever_the_uniform_number_a_possible_token_is_drawn(values, u, impossible):
    if len(impossible) < len(values):
        values = [-math.inf if i in impossible else v for i, v in enumerate(values)]
    logits = torch.tensor([values])
    if not torch.isfinite(logits).any():
        return

    token, logp = G.sample_tokens(logits, torch.tensor([u], dtype=torch.double), 1.0)

    assert torch.isfinite(logits[0, token])
    assert logp <= 0


def test_a_bound_between_two_tokens_never_draws_one_of_probability_zero():
    """Where sums round, what is left of the bound must not fall below 0.

    The first place is as impossible as any.
    """
    random = torch.Generator().manual_seed(0)
    x = torch.rand(2000, 20, generator=random) ** 8
    x[:, ::3] = 0
    sums = x.cumsum(-1, dtype=torch.double)
    for column in range(19):
        place, rest = G.first_above(x, sums[:, column])
        assert (rest >= 0).all()
        assert (x.gather(1, place[:, None]) > 0).all()


def test_temperature_zero_is_greedy(model, tokenizer):
    (c,) = sample(model, tokenizer, ["hello"], temperature=0.0)

    ids = list(c.prompt_ids)
    for token in c.token_ids:
        with torch.no_grad():
            logits = model.logits(model(torch.tensor([ids])))[0, -1]
        assert int(logits.argmax()) == token
        ids.append(token)
    assert c.logprobs == [0.0] * len(c.token_ids)


@given(st.integers(1, 8), st.floats(0.05, 1.0), st.floats(0, 1, exclude_max=True))
def test_top_k_and_top_p_draw_among_the_likeliest(k, p, u):
    logits = torch.tensor([[0.3, 2.0, 1.0, -1.0, 0.0, 1.5, -2.0, 0.7]])
    probability = torch.softmax(logits[0], 0)
    ranked = probability.argsort(descending=True).tolist()
    allowed = set()
    for i, token in enumerate(ranked):
        mass_before = float(probability[ranked[:i]].sum())
        if i == 0 or (i < k and mass_before < p):
            allowed.add(token)

    token, logp = G.sample_tokens(logits, torch.tensor([u], dtype=torch.double), 1.0, k, p)

    assert int(token) in allowed
    want = probability[token] / probability[list(allowed)].sum()
    assert float(logp.exp()) == pytest.approx(float(want), rel=1e-4)


# ---------------------------------------------------------------------------- how a completion ends
def test_any_end_token_ends_a_completion_and_is_kept(model, tokenizer):
    """Whichever of many is drawn stops, is the last token sampled, and is no truncation."""
    ending = ending_every(8, tokenizer)

    completions = sample(model, ending, ["a"] * 100, max_tokens=12, slots=50)

    last_tokens = set()
    for c in completions:
        stopped = c.finish_reason == "stop"
        *others, last = c.token_ids
        assert stopped == (last in ending.end_ids)
        assert not set(others) & ending.end_ids
        assert len(c.token_ids) == len(c.logprobs)
        assert stopped or len(c.token_ids) == 12
        assert c.text == ending.decode(others if stopped else c.token_ids)
        if stopped:
            last_tokens.add(last)
    assert len(last_tokens) > 5
    assert {c.finish_reason for c in completions} == {"stop", "length"}


def test_a_prompt_that_leaves_no_room_is_done_without_a_token(tokenizer):
    model = make_model(vocab_size=tokenizer.size, max_position_embeddings=24)
    length = len(tokenizer.encode_chat(chat("a b")))
    texts = ["a b c d e f g h i j k l m n o p q r s t", "a b", "a"]

    long, short, _ = sample(model, tokenizer, texts, max_tokens=50)

    assert (long.token_ids, long.logprobs, long.finish_reason) == ([], [], "length")
    assert len(long.prompt_ids) >= 24
    assert len(short.token_ids) <= 24 - length
    assert short.finish_reason in ("length", "stop")


def test_ids_that_the_tokenizer_lacks_cannot_be_drawn(tokenizer):
    """A vocabulary padded beyond the tokenizer, with huge logits there."""
    model = make_model(vocab_size=tokenizer.size + 64)
    with torch.no_grad():
        model.embed_tokens.weight[tokenizer.size :] = 50 * model.embed_tokens.weight[:64]

    drawn = sample(model, tokenizer, ["a"] * 20, slots=8)
    greedy = sample(model, tokenizer, ["a"], temperature=0.0)

    for c in drawn + greedy:
        assert all(i < tokenizer.size for i in c.token_ids)
    # and the trainer's distribution leaves them out too
    sampled, again = scored(model, drawn, 1.0, tokenizer)
    assert again == pytest.approx(sampled, abs=1e-5)


# ------------------------------------------------------------------------------- scheduling, memory
def test_every_distinct_prefix_is_prefilled_once(model, tokenizer):
    """All but the last token of each prompt, which every request has for itself.

    What came before serves what comes later.
    """
    G.Sampler.SHARE = 1
    texts = ["Tarel Moro lies on the river"] * 8 + ["Tarel Moro lies on the sea"] * 2 + ["another"]
    forwarded = []
    hook = model.register_forward_pre_hook(lambda m, args: forwarded.append(args[0].numel()))
    sampler = G.Sampler(model, tokenizer, slots=16, max_tokens=1)

    for again in (texts, texts[:10]):
        for i, text in enumerate(again):
            sampler.submit(chat(text), (i,))
        sampler.advance()
    hook.remove()

    prefixes = set()
    for text in texts:
        ids = tokenizer.encode_chat(chat(text))
        prefixes |= {tuple(ids[:n]) for n in range(1, len(ids))}
    # each prefill is followed by a decode step
    assert forwarded[::2] == [len(prefixes) + 11, 10]


def test_a_finished_slot_is_refilled_at_once(model, abrupt, monkeypatch):
    """Whenever a slot is free and a request waits, the next advance takes it in.

    Beside those that go on.
    """
    admitted = []
    plain_admit = G.Sampler._admit

    def admit(self):
        plain_admit(self)
        admitted.append(len(self.live))

    monkeypatch.setattr(G.Sampler, "_admit", admit)
    sampler = G.Sampler(model, abrupt, slots=3, max_tokens=9)
    for i in range(20):
        sampler.submit(chat(str(i)), (i,))

    done, beside = [], 0
    while len(done) < 20:
        live = len(sampler.live)
        due = bool(sampler.waiting) and live < 3
        admitted.clear()
        done += sampler.advance()
        assert bool(admitted) == due
        assert all(n == 3 or not sampler.waiting for n in admitted)
        beside += due and live > 0
    assert beside > 2
    assert len({len(c.token_ids) for _, c in done}) > 3


def test_a_long_prompt_among_short_ones_is_prefilled_in_bounded_memory(tokenizer, monkeypatch):
    """A long prompt is a range of its own: no mask has its length, nor is one padded to it."""
    model = make_model(max_position_embeddings=4096)
    ids_only = copy.copy(tokenizer)
    ids_only.encode_chat = lambda ids: ids
    passes = []
    plain_attention = G.TreeAttention

    def attention(*args):
        passes.append(plain_attention(*args))
        return passes[-1]

    monkeypatch.setattr(G, "TreeAttention", attention)
    sampler = G.Sampler(model, ids_only, slots=121, max_tokens=2)
    rng = np.random.default_rng(0)
    for i, length in enumerate([20] * 60 + [2000] + [20] * 60):
        sampler.submit(rng.integers(5, 2000, length).tolist(), (i,))

    done = sampler.advance()

    assert len(done) == 121
    assert sum(len(p.new) for p in passes) == 120 * 20 + 2000
    for p in passes:
        for part in p.parts:
            assert part.causal or part.mask.shape[2:] == (20, 20)


def test_no_two_requests_of_a_step_share_their_random_numbers(model, tokenizer):
    """Eight rollouts of one prompt; keys that differ in any part give different samples."""
    rollouts = [(0, 0, 0, r, "m", 0) for r in range(8)]
    others = [
        (1, 0, 0, 0, "m", 0),
        (0, 1, 0, 0, "m", 0),
        (0, 0, 1, 0, "m", 0),
        (0, 0, 0, 0, "n", 0),
        (0, 0, 0, 0, "m", 1),
    ]
    keys = rollouts + others
    texts = ["same"] * len(keys)

    completions = sample(model, tokenizer, texts, keys, slots=4)
    again = sample(model, tokenizer, texts, keys, slots=13)

    assert len(set(map(tuple, ids_of(completions)))) == len(keys)
    assert ids_of(again) == ids_of(completions)


def test_after_an_update_nothing_cached_survives(model, tokenizer):
    """One sampler across an update of the weights samples what a fresh one does."""
    texts = ["same"] * 5
    old = G.Sampler(model, tokenizer, slots=3, max_tokens=6)
    before = run(old, texts)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.7)

    after = run(old, texts)

    assert after == run(G.Sampler(model, tokenizer, slots=3, max_tokens=6), texts)
    assert after != before


def test_weights_that_change_under_live_sequences_are_an_error(model, tokenizer):
    sampler = G.Sampler(model, tokenizer, slots=3, max_tokens=600)
    sampler.submit(chat("hello"), (0,))
    sampler.advance()
    with torch.no_grad():
        model.norm.weight.mul_(0.5)

    with pytest.raises(RuntimeError, match="the weights changed"):
        sampler.advance()


# -------------------------------------------------------------------------------- ids and precision
def test_ids_are_never_decoded_and_encoded_again(model, tokenizer):
    """A random LM samples ids that its tokenizer would never give; they are trained as sampled."""
    completions = sample(model, tokenizer, ["a"] * 12, slots=12)

    unlike = []
    for c in completions:
        if tokenizer.encode(tokenizer.decode(c.token_ids)) != c.token_ids:
            unlike.append(c)
    assert unlike
    seen = []
    hook = model.register_forward_pre_hook(lambda m, args: seen.append(args[0].tolist()))
    for c in unlike:
        seen.clear()
        scored(model, [c], 1.0, tokenizer)
        assert seen[0] == [(c.prompt_ids + c.token_ids)[:-1]]
    hook.remove()


def test_bf16_samples_and_scores_nearly_alike(model, tokenizer):
    model = model.bfloat16()
    greedy, again = sample(model, tokenizer, ["a", "a"], temperature=0.0)
    assert greedy.token_ids == again.token_ids
    assert greedy.logprobs == [0.0] * len(greedy.token_ids)

    completions = sample(model, tokenizer, ["a", "hello there"] * 4, slots=8)
    sampled, found = scored(model, completions, 1.0, tokenizer)
    error = np.abs(np.subtract(sampled, found))
    assert np.median(error) < 0.1
