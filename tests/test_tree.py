"""Attention over a prefix tree: kernels over ranges and blocks, merged, equal one dense mask, forward and backward."""
import random

import numpy as np
import pytest
import torch
from conftest import make_model
from hypothesis import given
from hypothesis import strategies as st

import model as M

# ---------------------------------------------------------------------------------------------------- random forests


def paths_of(sequences) -> tuple[list, list]:
    """Sequences of tokens -> the tree of their prefixes: paths (known, nodes), and the token of each node."""
    paths, tokens, last, path = [], [], (), []
    for sequence in sorted(set(map(tuple, sequences))):
        known = 0
        while known < min(len(sequence), len(last)) and sequence[known] == last[known]:
            known += 1
        path = path[:known] + list(range(len(tokens), len(tokens) + len(sequence) - known))
        tokens += sequence[known:]
        paths.append((known, path))
        last = sequence
    return paths, tokens


@st.composite
def forests(draw):
    """Paths of up to 10 sequences, most of which begin as another one does; segments of 1 to 40 nodes."""
    rng = random.Random(draw(st.integers(0, 10**6)))
    sequences = [[0]]
    for _ in range(draw(st.integers(1, 10))):
        other = rng.choice(sequences) if rng.random() < 0.8 else []
        start = other[:rng.randrange(len(other) + 1)]
        sequences.append(start + [rng.randrange(3) for _ in range(rng.choice((1, 3, 40)))])
    return paths_of(sequences)[0]


def pairs_seen(parts, size: int) -> np.ndarray:
    """(size, size) how often a query (row) sees a node in all parts together."""
    seen = np.zeros((size, size), int)
    for part in parts:
        if isinstance(part.queries, slice):
            queries, keys = range(size)[part.queries], range(size)[part.keys]
            for i, query in enumerate(queries):
                seen[query, keys[:i + 1] if part.causal else keys] += 1
            continue
        places = np.stack(np.unravel_index(part.inside.numpy(), part.queries.shape), 1)
        for block, query in places:
            keys = part.keys[block][part.mask[block, 0, query] == 0]
            np.add.at(seen[part.queries[block, query]], keys, 1)
    return seen


def dense(paths, q, k, v):
    """The twin: one mask for all, (T, T)."""
    seen = torch.zeros(q.shape[2], q.shape[2], dtype=torch.bool)
    for known, path in paths:
        for depth in range(known, len(path)):
            seen[path[depth], path[:depth + 1]] = True
    return M.attention(0, q, k, v, seen)


long_segments = st.sampled_from([1, 2, 8, 10**9])
heads = st.sampled_from([(4, 4), (6, 2), (3, 1)])


@given(forests(), long_segments)
def test_the_parts_cover_each_node_and_its_ancestors_once(paths, long):
    size = sum(len(path) - known for known, path in paths)
    want = np.zeros((size, size), int)
    for _, path in paths:
        for depth in range(len(path)):
            want[path[depth], path[:depth + 1]] = 1
    new, parts = M.forest_parts(paths, long)
    assert new.tolist() == list(range(size))
    assert (pairs_seen(parts, size) == want).all()


@given(forests(), long_segments, heads, st.integers(0, 9))
def test_attention_over_a_forest_equals_its_dense_twin(paths, long, shape, seed):
    """Outputs and the gradients of queries, keys and values, to 1e-5 of their size."""
    size = sum(len(path) - known for known, path in paths)
    torch.manual_seed(seed)
    q, k, v = (torch.randn(1, n, size, 8, requires_grad=True) for n in (shape[0], shape[1], shape[1]))
    d_out = torch.randn_like(q)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(M.TreeAttention, "LONG", long)
        out = M.TreeAttention(paths)(0, q, k, v)
    want = dense(paths, q, k, v)
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)
    for got, twin in zip(torch.autograd.grad(out, (q, k, v), d_out), torch.autograd.grad(want, (q, k, v), d_out)):
        assert (got - twin).abs().max() <= 1e-5 * (1 + twin.abs().max())


@given(st.sampled_from([(1, 5, 5, True, False), (3, 4, 7, False, True), (1, 2, 9, False, False), (3, 1, 6, False, True)]), heads)
def test_the_plain_kernel_computes_what_the_fused_one_does(case, shape):
    """What runs where there is no fused kernel; also with the results of a larger attention, as the merged backward has."""
    B, T, L, causal, masked = case
    torch.manual_seed(0)
    q, d_out = torch.randn(2, B, shape[0], T, 8)
    k, v = torch.randn(2, B, shape[0], L, 8)
    mask = torch.where(torch.arange(L) <= torch.arange(L - T, L)[:, None], 0.0, -torch.inf).expand(B, 1, T, L) if masked else None
    fused, plain = M._kernel(q, k, v, causal, mask), M.plain_attention(q, k, v, causal, mask)
    for a, b in zip(fused, plain):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    out, lse = plain[0] * 0.5, plain[1] + 0.7
    back = (d_out, q, k, v, out, lse, causal, mask)
    for a, b in zip(M._kernel_backward(*back), M.plain_attention_backward(*back)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


# --------------------------------------------------------------------------------------------------------- the cache


@given(st.lists(st.lists(st.integers(0, 49), min_size=1, max_size=9), min_size=1, max_size=4),
       st.lists(st.integers(0, 49), max_size=5), st.sampled_from([2, 4]), st.sampled_from([1, 3, 64]), st.booleans(), st.data())
def test_decoding_with_the_cache_equals_the_whole_sequence(tails, prefix, kv_heads, long, masks, data):
    """Prompts with a common prefix, kept once, are prefilled together into shuffled slots, then decoded step by step."""
    model, n, shared = make_model(vocab_size=50, num_key_value_heads=kv_heads), len(tails), len(prefix)
    rows = [prefix + tail for tail in data.draw(st.permutations(tails))]                # slot -> sequence
    cut = [data.draw(st.integers(shared + 1, len(row))) for row in rows]
    cache, ids, positions, paths = M.KVCache(model.config, n + 1), [], [], []
    for i, (row, end) in enumerate(zip(rows, cut)):
        known = shared if i else 0
        nodes = range(len(ids), len(ids) + end - known)
        paths.append((known, list(nodes) if not i else list(range(shared)) + list(nodes)))
        ids += row[known:end]
        positions += range(known, end)
    slots = data.draw(st.permutations(range(n)))
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(M.KVCache, "LONG", long)
        want = [model(torch.tensor([row]))[0] for row in rows]
        cache.reserve(len(ids))
        model(torch.tensor([ids]), torch.tensor([positions]), M.TreeAttention(paths, pool=cache.pool))
        cache.place(list(slots), [path for _, path in paths], shared, 12)
        rows, cut, want = ([x[slots.index(i)] for i in range(n)] for x in (rows, cut, want))
        found = cache.shared(n)
        sees = torch.tensor([[slot in of for slot in range(n)] for _, of in found]).reshape(len(found), n)
        ranges = [(nodes, None if masks else torch.tensor(of)) for nodes, of in found]
        for step in range(max(len(row) - end for row, end in zip(rows, cut))):
            last = torch.tensor([[row[min(end + step, len(row) - 1)] for row, end in zip(rows, cut)]])
            attend = cache.decode(n, int(cache.lengths[:n].max()) + 1, ranges, sees)
            hidden = model(last, cache.positions[None, :n], attend)[0]
            cache.lengths[:n] += 1
            cache.positions[:n] += 1
            for i, (row, end) in enumerate(zip(rows, cut)):
                if end + step < len(row):
                    torch.testing.assert_close(hidden[i], want[i][end + step], atol=2e-5, rtol=1e-4)


def small_cache(long: int = 2) -> M.KVCache:
    """Five nodes; slot 0 has the path 0 1 2, slot 2 the path 0 1 3 4, of which 0 to 3 stay in the pool."""
    model = make_model(vocab_size=50)
    cache = M.KVCache(model.config, 4)
    cache.LONG = long
    with torch.no_grad():
        cache.reserve(5)
        paths = [(0, [0, 1, 2]), (2, [0, 1, 3, 4])]
        model(torch.tensor([[1, 2, 3, 4, 5]]), torch.tensor([[0, 1, 2, 2, 3]]), M.TreeAttention(paths, pool=cache.pool))
        cache.place([0, 2], [[0, 1, 2], [0, 1, 3, 4]], 4, 2)
    return cache


def test_long_prefixes_stay_where_they_are_and_short_ones_are_copied():
    cache = small_cache()
    assert cache.ranges == [[(0, 3)], [], [(0, 2)], []]
    assert cache.lengths.tolist() == [0, 0, 2, 0] and cache.positions.tolist() == [3, 0, 4, 0]
    assert torch.equal(cache.kv[:, :, 2, :, :2], cache.pool[:, :, 3:5].transpose(2, 3)) and not cache.kv[:, :, :2].any()
    assert cache.shared(4) == [(slice(0, 2), [0, 2]), (slice(2, 3), [0])]


def test_a_sequence_moves_with_all_that_is_cached_of_it():
    cache = small_cache()
    cache.move(2, 1)
    cache.free(2)
    assert cache.ranges[1] == [(0, 2)] and cache.lengths.tolist() == [0, 2, 0, 0] and cache.positions.tolist() == [3, 4, 0, 0]
    assert torch.equal(cache.kv[:, :, 1], cache.kv[:, :, 2]) and cache.shared(2) == [(slice(0, 2), [0, 1]), (slice(2, 3), [0])]


@given(st.lists(st.integers(0, 30), unique=True, max_size=12))
def test_ranges_are_the_runs_of_a_path(path):
    ranges = M.contiguous_ranges(path)
    assert [node for start, end in ranges for node in range(start, end)] == path
    assert all(a[1] != b[0] for a, b in zip(ranges, ranges[1:]))
