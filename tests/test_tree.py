"""Attention over a prefix tree, and the cache that decodes behind one, equal dense attention."""

import random

import numpy as np
import pytest
import torch
from conftest import make_model
from hypothesis import given
from hypothesis import strategies as st

import model as M

long_segments = st.sampled_from([1, 2, 8, 10**9])
heads = st.sampled_from([(4, 4), (6, 2), (3, 1)])


# ----------------------------------------------------------------------------------- random forests
def common(a, b) -> int:
    """How many tokens two sequences begin with alike."""
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n


def paths_of(sequences) -> tuple[list, list]:
    """Sequences of tokens -> the tree of their prefixes.

    Paths (known, nodes), and the token of each node.
    """
    paths, tokens = [], []
    last, path = (), []
    for sequence in sorted(set(map(tuple, sequences))):
        known = common(sequence, last)
        new = range(len(tokens), len(tokens) + len(sequence) - known)
        path = path[:known] + list(new)
        tokens += sequence[known:]
        paths.append((known, path))
        last = sequence
    return paths, tokens


@st.composite
def forests(draw):
    """Paths of up to 10 sequences, most of which begin as another one; segments of 1 to 40."""
    rng = random.Random(draw(st.integers(0, 10**6)))
    sequences = [[0]]
    for _ in range(draw(st.integers(1, 10))):
        other = rng.choice(sequences) if rng.random() < 0.8 else []
        start = other[: rng.randrange(len(other) + 1)]
        segment = [rng.randrange(3) for _ in range(rng.choice((1, 3, 40)))]
        sequences.append(start + segment)
    paths, _ = paths_of(sequences)
    return paths


def size_of(paths) -> int:
    return sum(len(path) - known for known, path in paths)


def ancestors(paths) -> np.ndarray:
    """(size, size) whether a node (column) is an ancestor of a query (row), or itself."""
    size = size_of(paths)
    seen = np.zeros((size, size), dtype=bool)
    for known, path in paths:
        for depth in range(known, len(path)):
            seen[path[depth], path[: depth + 1]] = True
    return seen


def pairs_seen(parts, size: int) -> np.ndarray:
    """(size, size) how often a query (row) sees a node in all parts together."""
    seen = np.zeros((size, size), int)
    for part in parts:
        if isinstance(part.queries, slice):
            count_range(seen, part)
        else:
            count_blocks(seen, part)
    return seen


def count_range(seen, part) -> None:
    """A range of queries that sees a range of keys, all of it or causally."""
    queries = range(len(seen))[part.queries]
    keys = range(len(seen))[part.keys]
    for i, query in enumerate(queries):
        seen[query, keys[: i + 1] if part.causal else keys] += 1


def count_blocks(seen, part) -> None:
    """Padded blocks of queries and keys, with a mask."""
    places = np.stack(np.unravel_index(part.inside.numpy(), part.queries.shape), 1)
    for block, query in places:
        keys = part.keys[block][part.mask[block, 0, query] == 0]
        np.add.at(seen[part.queries[block, query]], keys, 1)


def dense(paths, q, k, v):
    """The twin: one mask for all, (T, T)."""
    return M.attention(0, q, k, v, torch.from_numpy(ancestors(paths)))


# ---------------------------------------------------------------------------------------- attention
@given(forests(), long_segments)
def test_the_parts_cover_each_node_and_its_ancestors_once(paths, long):
    new, parts = M.forest_parts(paths, long)

    size = size_of(paths)
    assert new.tolist() == list(range(size))
    assert (pairs_seen(parts, size) == ancestors(paths)).all()


@given(forests(), long_segments, heads, st.integers(0, 9))
def test_attention_over_a_forest_equals_its_dense_twin(paths, long, shape, seed):
    """Outputs and the gradients of queries, keys and values, to 1e-5 of their size."""
    H, K = shape
    size = size_of(paths)
    torch.manual_seed(seed)
    q, k, v = (torch.randn(1, n, size, 8, requires_grad=True) for n in (H, K, K))
    d_out = torch.randn_like(q)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(M.TreeAttention, "LONG", long)
        out = M.TreeAttention(paths)(0, q, k, v)

    want = dense(paths, q, k, v)
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)
    gradients = torch.autograd.grad(out, (q, k, v), d_out)
    twins = torch.autograd.grad(want, (q, k, v), d_out)
    for got, twin in zip(gradients, twins):
        assert (got - twin).abs().max() <= 1e-5 * (1 + twin.abs().max())


# blocks, queries, keys, causal, masked
KERNEL_CASES = [
    (1, 5, 5, True, False),
    (3, 4, 7, False, True),
    (1, 2, 9, False, False),
    (3, 1, 6, False, True),
]


def last_queries_mask(B, T, L):
    """The T queries are the last of L places, and see those before them: (B, 1, T, L)."""
    unseen = torch.arange(L) > torch.arange(L - T, L)[:, None]  # (T, L)
    return torch.zeros(T, L).masked_fill(unseen, -torch.inf).expand(B, 1, T, L)


@given(st.sampled_from(KERNEL_CASES), heads)
def test_the_plain_kernel_computes_what_the_fused_one_does(case, shape):
    """What runs where there is no fused kernel.

    Also with the results of a larger attention, as the merged backward has.
    """
    B, T, L, causal, masked = case
    H, _ = shape
    torch.manual_seed(0)
    q, d_out = torch.randn(2, B, H, T, 8)
    k, v = torch.randn(2, B, H, L, 8)
    mask = last_queries_mask(B, T, L) if masked else None

    fused = M._kernel(q, k, v, causal, mask)
    plain = M.plain_attention(q, k, v, causal, mask)
    for a, b in zip(fused, plain):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)

    out, lse = plain
    of_larger = (d_out, q, k, v, out * 0.5, lse + 0.7, causal, mask)
    fused = M._kernel_backward(*of_larger)
    plain = M.plain_attention_backward(*of_larger)
    for a, b in zip(fused, plain):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------------------------- the cache
def prefill(model, cache, rows, cut, shared):
    """Pass over the first cut[i] tokens of each row, which share the first `shared`, together.

    Returns the paths of the rows' nodes in the pool.
    """
    ids, positions, paths = [], [], []
    for i, (row, end) in enumerate(zip(rows, cut)):
        known = shared if i else 0
        nodes = list(range(len(ids), len(ids) + end - known))
        paths.append((known, list(range(known)) + nodes))
        ids += row[known:end]
        positions += range(known, end)
    cache.reserve(len(ids))
    attend = M.TreeAttention(paths, pool=cache.pool)
    model(torch.tensor([ids]), torch.tensor([positions]), attend)
    return [path for _, path in paths]


def shared_ranges(cache, n, masks):
    """Ranges for `cache.decode`, and who sees them; with `masks` the ranges have no slots."""
    found = cache.shared(n)
    sees = torch.zeros(len(found), n, dtype=torch.bool)
    ranges = []
    for i, (nodes, slots) in enumerate(found):
        sees[i, slots] = True
        ranges.append((nodes, None if masks else torch.tensor(slots)))
    return ranges, sees


tokens = st.integers(0, 49)


@given(
    st.lists(st.lists(tokens, min_size=1, max_size=9), min_size=1, max_size=4),
    st.lists(tokens, max_size=5),
    st.sampled_from([2, 4]),
    st.sampled_from([1, 3, 64]),
    st.booleans(),
    st.data(),
)
@torch.no_grad()
def test_decoding_with_the_cache_equals_the_whole_sequence(
    tails, prefix, kv_heads, long, masks, data
):
    """Prompts are prefilled together into shuffled slots, then decoded step by step.

    Their common prefix is kept once.
    """
    model = make_model(vocab_size=50, num_key_value_heads=kv_heads)
    n, shared = len(tails), len(prefix)
    rows = [prefix + tail for tail in data.draw(st.permutations(tails))]
    cut = [data.draw(st.integers(shared + 1, len(row))) for row in rows]
    slots = list(data.draw(st.permutations(range(n))))
    want = [model(torch.tensor([row]))[0] for row in rows]

    cache = M.KVCache(model.config, n + 1)
    cache.LONG = long
    paths = prefill(model, cache, rows, cut, shared)
    cache.place(slots, paths, shared, 12)
    ranges, sees = shared_ranges(cache, n, masks)

    # what is in each slot
    row_of = {slot: i for i, slot in enumerate(slots)}
    in_slots = [row_of[slot] for slot in range(n)]
    for step in range(max(len(row) - end for row, end in zip(rows, cut))):
        # a sequence that is over goes on with its last token
        last = [rows[i][min(cut[i] + step, len(rows[i]) - 1)] for i in in_slots]
        attend = cache.decode(n, int(cache.lengths[:n].max()) + 1, ranges, sees)
        hidden = model(torch.tensor([last]), cache.positions[None, :n], attend)[0]
        cache.lengths[:n] += 1
        cache.positions[:n] += 1
        for slot, i in enumerate(in_slots):
            place = cut[i] + step
            if place < len(rows[i]):
                torch.testing.assert_close(hidden[slot], want[i][place], atol=2e-5, rtol=1e-4)


@torch.no_grad()
def small_cache() -> M.KVCache:
    """Five nodes; slot 0 has the path 0 1 2, slot 2 the path 0 1 3 4; 0 to 3 stay in the pool."""
    model = make_model(vocab_size=50)
    cache = M.KVCache(model.config, 4)
    cache.LONG = 2
    cache.reserve(5)
    attend = M.TreeAttention([(0, [0, 1, 2]), (2, [0, 1, 3, 4])], pool=cache.pool)
    model(torch.tensor([[1, 2, 3, 4, 5]]), torch.tensor([[0, 1, 2, 2, 3]]), attend)
    cache.place([0, 2], [[0, 1, 2], [0, 1, 3, 4]], 4, 2)
    return cache


def test_long_prefixes_stay_where_they_are_and_short_ones_are_copied():
    cache = small_cache()

    assert cache.ranges == [[(0, 3)], [], [(0, 2)], []]
    assert cache.lengths.tolist() == [0, 0, 2, 0]
    assert cache.positions.tolist() == [3, 0, 4, 0]
    copied = cache.kv[:, :, 2, :, :2]
    assert torch.equal(copied, cache.pool[:, :, 3:5].transpose(2, 3))
    assert not cache.kv[:, :, :2].any()
    assert cache.shared(4) == [(slice(0, 2), [0, 2]), (slice(2, 3), [0])]


def test_a_sequence_moves_with_all_that_is_cached_of_it():
    cache = small_cache()

    cache.move(2, 1)
    cache.free(2)

    assert cache.ranges[1] == [(0, 2)]
    assert cache.lengths.tolist() == [0, 2, 0, 0]
    assert cache.positions.tolist() == [3, 4, 0, 0]
    assert torch.equal(cache.kv[:, :, 1], cache.kv[:, :, 2])
    assert cache.shared(2) == [(slice(0, 2), [0, 1]), (slice(2, 3), [0])]


@given(st.lists(st.integers(0, 30), unique=True, max_size=12))
def test_ranges_are_the_runs_of_a_path(path):
    ranges = M.contiguous_ranges(path)

    nodes = []
    for start, end in ranges:
        nodes += range(start, end)
    assert nodes == path
    assert all(a[1] != b[0] for a, b in zip(ranges, ranges[1:]))
