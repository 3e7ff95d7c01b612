"""The language model: a decoder-only transformer, its KV cache, and checkpoints in Hugging Face layout.

One class covers Qwen3, Qwen2/2.5 and Llama-3.x: they differ in biases, q/k norms, the tie of the head and the RoPE
scaling, all read from config.json. Parameters are named as on disk (but for the leading `model.`), so that loading is a
comparison of names and shapes. Left out, and refused by name: other architectures, sliding windows, quantised weights.

    model, tokenizer = load_pretrained("tasks/tiny")
    ids = tokenizer.encode_chat([{"role": "user", "content": "Hello"}])
    hidden = model(torch.tensor([ids]))                  # (B, T, D)
    logits = model.logits(hidden)                        # (B, T, V)

Letters: B batch, T time (of a tree: its nodes, one after the other), L keys that queries may see, D model width, H query heads,
K key/value heads, d width of a head, V vocabulary.
"""
from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import re
from bisect import bisect_left
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lm.tokenizer import CheckpointError, Tokenizer, read_files, read_json


# ------------------------------------------------------------------------------------------------- configuration
@dataclass(frozen=True)
class ModelConfig:
    """The shape of a transformer. Example: ModelConfig.from_hf({"architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 2048, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4, "head_dim": 32})"""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int                 # independent of hidden_size / heads
    max_positions: int
    norm_eps: float
    tied: bool                    # the head is the embedding matrix
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool                 # RMSNorm of every query and key head
    rope_theta: float
    rope_llama3: tuple[float, ...] | None       # factor, low_freq_factor, high_freq_factor, original length
    raw: dict = field(default_factory=dict, compare=False, repr=False)      # config.json as read, written back on save

    @classmethod
    def from_hf(cls, raw: dict, where: str = "config.json") -> "ModelConfig":
        """Read a Hugging Face configuration, old style (`rope_theta`) or new (`rope_parameters`). Raises CheckpointError naming
        the field that is missing, malformed or not supported."""
        def get(key: str, kind=int, default=None, low=1, source=raw):
            value = default if source.get(key) is None else source[key]
            if not (type(value) is bool if kind is bool else
                    type(value) in (int, float) and low <= value < 2**31 and kind(value) == value):
                expected = "true or false" if kind is bool else f"{kind.__name__} of at least {low}"
                raise CheckpointError(f"{where}: {key}: expected {expected}, found {value!r}")
            return kind(value)

        names = ("qwen2", "Qwen2ForCausalLM"), ("qwen3", "Qwen3ForCausalLM"), ("llama", "LlamaForCausalLM")
        architecture = raw.get("architectures") or [dict(names).get(str(raw.get("model_type")))]
        qwen2, qwen3, llama = (architecture == [name] for _, name in names)
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        rope = rope if isinstance(rope, dict) else {"rope_type": rope}
        scaling = rope.get("rope_type", rope.get("type", "default"))
        for key, value, supported in (
                ("architectures", architecture, qwen2 or qwen3 or llama),
                ("hidden_act", raw.get("hidden_act"), raw.get("hidden_act", "silu") == "silu"),
                ("layer_types", raw.get("layer_types"), {*re.findall(r"\w+", str(raw.get("layer_types") or []))} <= {"full_attention"}),
                ("rope_type", scaling, scaling in ("default", "llama3")),
                ("partial_rotary_factor", rope.get("partial_rotary_factor"), rope.get("partial_rotary_factor", 1) == 1),
                *((key, raw.get(key), not raw.get(key)) for key in ("quantization_config", "use_sliding_window"))):
            if not supported:
                raise CheckpointError(f"{where}: {key} {value!r} is not supported")
        D, heads, bias = get("hidden_size"), get("num_attention_heads"), get("attention_bias", bool, False)
        llama3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        config = cls(
            vocab_size=get("vocab_size"), hidden_size=D, intermediate_size=get("intermediate_size"),
            layers=get("num_hidden_layers"), heads=heads, kv_heads=get("num_key_value_heads", default=heads),
            head_dim=get("head_dim", default=128 if qwen3 else D // heads), max_positions=get("max_position_embeddings"),
            norm_eps=get("rms_norm_eps", float, 1e-6, low=0), tied=get("tie_word_embeddings", bool, False),
            qkv_bias=bias or qwen2, o_bias=bias and not qwen2, mlp_bias=llama and get("mlp_bias", bool, False), qk_norm=qwen3,
            rope_theta=get("rope_theta", float, get("rope_theta", float, 1e4), source=rope),
            rope_llama3=tuple(get(k, float, low=1e-6, source=rope) for k in llama3) if scaling == "llama3" else None, raw=raw)
        if config.heads % config.kv_heads or config.head_dim % 2:
            raise CheckpointError(f"{where}: num_attention_heads {config.heads} must be a multiple of num_key_value_heads "
                                  f"{config.kv_heads}, and head_dim {config.head_dim} even")
        return config


# ----------------------------------------------------------------------------------- rotary position embeddings
@functools.lru_cache
def inverse_frequencies(config: ModelConfig, device: torch.device) -> Tensor:
    """(d/2,) angular step per position of each rotated pair (RoFormer, arXiv 2104.09864), always fp32.

    With `llama3` scaling, wavelengths longer than original/low are stretched by `factor`, shorter than original/high
    are kept, and those between are interpolated."""
    d = config.head_dim
    inverse = 1.0 / config.rope_theta ** (torch.arange(0, d, 2, device=device, dtype=torch.float32) / d)
    if config.rope_llama3:
        factor, low, high, original = config.rope_llama3
        turns = original * inverse / (2 * math.pi)             # rotations within the original context
        keep = ((turns - low) / (high - low)).clamp(0, 1)      # 0: stretch, 1: keep
        inverse = (1 - keep) * inverse / factor + keep * inverse
    return inverse


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x_i, x_{i+d/2}) of x (B, heads, T, d) by angles whose cosines and sines, the first half of these negated, are
    in cos and sin (B, 1, T, d)."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


# --------------------------------------------------------------------------------------------------- transformer
def attention(layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention of q (B, H, T, d) over k, v (B, K, L, d): causal unless `mask` says what is seen. The default
    `attend` of the transformer; TreeAttention and the KV cache supply others."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                          enable_gqa=q.shape[1] != k.shape[1])


class Attention(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.d = c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, c.heads * self.d, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.hidden_size, c.kv_heads * self.d, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.hidden_size, c.kv_heads * self.d, bias=c.qkv_bias)
        self.o_proj = nn.Linear(c.heads * self.d, c.hidden_size, bias=c.o_bias)
        if c.qk_norm:
            self.q_norm, self.k_norm = nn.RMSNorm(self.d, c.norm_eps), nn.RMSNorm(self.d, c.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layer: int, attend) -> Tensor:
        q, k, v = (proj(x).unflatten(-1, (-1, self.d)).transpose(1, 2)          # (B, H, T, d), (B, K, T, d) twice
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        y = attend(layer, rotate(q, cos, sin), rotate(k, cos, sin), v)          # (B, H, T, d)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.self_attn, self.mlp = Attention(c), MLP(c)
        self.input_layernorm = nn.RMSNorm(c.hidden_size, c.norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(c.hidden_size, c.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layer: int, attend) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, layer, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    """A decoder-only transformer. It has no train mode: sampling and scoring are the same function (but for LoRA's dropout)."""
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config, self.checkpointing = config, False
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        if not config.tied:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head(self) -> Tensor:
        """(V, D) the vocabulary projection."""
        return self.embed_tokens.weight if self.config.tied else self.lm_head.weight

    def forward(self, ids: Tensor, positions: Tensor | None = None, attend=attention) -> Tensor:
        """ids (B, T) -> hidden states (B, T, D) after the final norm, causal within each row.

        Rows may be padded on the right with any id: what follows a token never changes it. `positions` (B, T) default
        to 0..T-1; `attend(layer, q, k, v)` to causal attention."""
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device)[None]
        angles = positions[..., None].float() * inverse_frequencies(self.config, ids.device)       # (B, T, d/2)
        x = self.embed_tokens(ids)
        cos, sin = angles.cos(), angles.sin()
        cos, sin = (torch.cat(t, -1)[:, None].to(x.dtype) for t in ((cos, cos), (-sin, sin)))      # (B, 1, T, d)
        for i, block in enumerate(self.layers):
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, i, attend, use_reentrant=False)
            else:
                x = block(x, cos, sin, i, attend)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:             # (B, T, D) -> (B, T, V)
        return F.linear(hidden, self.head)


# -------------------------------------------------------------- attention over a prefix tree
def flash(q: Tensor, k: Tensor, v: Tensor, causal: bool = False,
          mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Attention of q (B, H, T, d) over k, v (B, K, L, d), with the log-sum-exp of its scores.

    `mask` (B, 1, T or 1, L), fp32, is added to the scores. Returns out (B, H, T, d) and lse
    (B, H, T), fp32."""
    q, k, v, restore = _align_heads(q, k, v, causal, mask)
    out, lse = _kernel(q, k, v, causal, mask)
    return restore(out), restore(lse)


def flash_backward(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
                   causal: bool = False, mask: Tensor | None = None):
    """What these keys add to the gradients (dq, dk, dv), `out` and `lse` being those of all keys.

    With P = exp(q k - lse), the scores' gradient P (d_out v - sum(d_out out)) holds for each key by
    itself (FlashAttention-2, arXiv 2307.08691, section 3.1): a kernel that is given the merged
    results of an attention returns exactly its own keys' share."""
    kv_heads = k.shape[1]
    q, k, v, restore = _align_heads(q, k, v, causal, mask)
    if q.shape[1] != d_out.shape[1]:                        # folded, as the queries are
        d_out, out, lse = (x.unflatten(1, (kv_heads, -1)).flatten(2, 3) for x in (d_out, out, lse))
    dq, dk, dv = _kernel_backward(d_out, q, k, v, out, lse, causal, mask)
    if dk.shape[1] != kv_heads:                             # of repeated keys
        dk, dv = (x.unflatten(1, (kv_heads, -1)).sum(2) for x in (dk, dv))
    return restore(dq), dk, dv


def _align_heads(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None):
    """As many heads of keys as of queries, and a function that undoes it in what comes out.

    Where the keys are many and all queries see the same, the H/K heads that share keys are folded
    into the queries, (B, K, H/K T, d); else the keys are repeated."""
    B, H, T, d = q.shape
    K, L = k.shape[1:3]
    if H == K:
        return q, k, v, lambda x: x
    if causal or H // K * T > L or mask is not None and mask.shape[2] > 1:
        k, v = (x.repeat_interleave(H // K, 1) for x in (k, v))
        return q, k, v, lambda x: x
    return q.reshape(B, K, -1, d), k, v, lambda x: x.reshape(B, H, T, *x.shape[3:])


def _kernel(q, k, v, causal, mask):
    if q.device.type != "cpu":
        return plain_attention(q, k, v, causal, mask)
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return fused(q, k, v, 0.0, causal, attn_mask=mask)


def _kernel_backward(d_out, q, k, v, out, lse, causal, mask):
    if q.device.type != "cpu":
        return plain_attention_backward(d_out, q, k, v, out, lse, causal, mask)
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return fused(d_out, q, k, v, out, lse, 0.0, causal, attn_mask=mask)


def plain_attention(q, k, v, causal, mask):
    """What the fused kernel computes, in plain products: (out, log-sum-exp)."""
    scores = _scores(q, k, causal, mask)                            # (B, H, T, L)
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp().to(v.dtype) @ v, lse


def plain_attention_backward(d_out, q, k, v, out, lse, causal, mask):
    """What the fused kernel's backward computes: (dq, dk, dv)."""
    p = (_scores(q, k, causal, mask) - lse[..., None]).exp()        # (B, H, T, L)
    d_p = (d_out @ v.transpose(2, 3)).float()
    d_scores = p * (d_p - (d_out.float() * out.float()).sum(-1, keepdim=True))
    d_scores = (d_scores * q.shape[-1] ** -0.5).to(q.dtype)
    dv = p.to(q.dtype).transpose(2, 3) @ d_out
    return d_scores @ k, d_scores.transpose(2, 3) @ q, dv


def _scores(q, k, causal, mask):
    scores = (q @ k.transpose(2, 3)).float() * q.shape[-1] ** -0.5
    if causal:
        unseen = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(unseen, -math.inf)
    return scores if mask is None else scores + mask


def merge(out: Tensor, lse: Tensor, at: slice | Tensor, part_out: Tensor, part_lse: Tensor) -> None:
    """Attention over some keys and over others -> over both: o = sum_i o_i exp(lse_i - lse).

    In place: out (H, T, d) and lse (H, T), fp32, are what there is; part_out (H, n, d) and part_lse
    (H, n) join the n queries `at`."""
    before = lse[:, at]
    both = torch.logaddexp(before, part_lse)
    old = out[:, at] * (before - both).exp()[..., None]
    out[:, at] = old + part_out * (part_lse - both).exp()[..., None]
    lse[:, at] = both


@dataclass(frozen=True)
class Part:
    """Some queries and some keys of a forest: one call of a kernel.

    Long segments are ranges; all that is short is in one part of padded blocks."""
    queries: slice | Tensor             # of the T inputs: a range, or (blocks, size)
    keys: slice | Tensor                # nodes: a range, or (blocks, longest)
    causal: bool = False                # query i sees keys 0..i; else all, or what the mask says
    mask: Tensor | None = None          # (blocks, 1, size, longest) 0 or -inf
    # (n,) places in blocks x size: a block is filled up with its last query, which counts once
    inside: Tensor | None = None

    @property
    def nodes(self) -> slice | Tensor:
        """The queries, each once: a range, or (n,)."""
        return self.queries if self.inside is None else self.queries.flatten()[self.inside]

    def take(self, at: slice | Tensor, *xs: Tensor) -> list[Tensor]:
        """Each (heads, T, …) -> (1, heads, range, …) or (blocks, heads, size, …)."""
        if isinstance(at, slice):
            return [x[None, :, at] for x in xs]
        return [x[:, at].transpose(0, 1) for x in xs]

    def results(self, x: Tensor) -> Tensor:
        """What came of the queries, shaped as `take` does -> (heads, n, …), one for each of `nodes`."""
        return x[0] if self.inside is None else x.transpose(0, 1).flatten(1, 2)[:, self.inside]

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """q (H, T, d), k and v (K, nodes, d) -> out (H, n, d), lse (H, n) of the part alone."""
        q, = self.take(self.queries, q)
        k, v = self.take(self.keys, k, v)
        out, lse = flash(q, k, v, self.causal, self.mask)
        return self.results(out), self.results(lse)

    def add_gradients(self, d_out, q, k, v, out, lse, dq, dk, dv) -> None:
        """Add the part's share to dq (H, T, d), dk and dv (K, nodes, d), fp32."""
        d_out, q, out, lse = self.take(self.queries, d_out, q, out, lse)
        k, v = self.take(self.keys, k, v)
        if self.inside is not None:
            once = torch.zeros(self.queries.numel(), dtype=d_out.dtype, device=d_out.device)
            once[self.inside] = 1
            d_out = d_out * once.view(*self.queries.shape)[:, None, :, None]
        more_q, more_k, more_v = flash_backward(d_out, q, k, v, out, lse, self.causal, self.mask)
        dq[:, self.nodes] += self.results(more_q)
        for total, more in ((dk, more_k), (dv, more_v)):
            if isinstance(self.keys, slice):
                total[:, self.keys] += more[0]
            else:                                           # a node is among the keys of many blocks
                more = more.transpose(0, 1).flatten(1, 2)
                total.index_add_(1, self.keys.flatten(), more.float())


class _Forest(torch.autograd.Function):
    """Attention over the parts of a forest, merged; its backward is each part's own kernel."""
    @staticmethod
    def forward(ctx, q, k, v, parts):                       # (H, T, d), (K, nodes, d) twice
        out = q.new_zeros(q.shape, dtype=torch.float)
        lse = q.new_full(q.shape[:2], -math.inf, dtype=torch.float)
        for part in parts:
            part_out, part_lse = part.forward(q, k, v)
            if len(parts) > 1:
                merge(out, lse, part.nodes, part_out, part_lse)
            else:                                           # nothing to merge with
                out[:, part.nodes], lse[:, part.nodes] = part_out.float(), part_lse
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.parts = parts
        return out                                          # (H, T, d)

    @staticmethod
    def backward(ctx, d_out):
        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv = (torch.zeros_like(x, dtype=torch.float) for x in (q, k, v))
        for part in ctx.parts:
            part.add_gradients(d_out, q, k, v, out, lse, dq, dk, dv)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None


class TreeAttention:
    """`attend` for a forest of prefixes: T nodes as one sequence (1, T); each sees its ancestors.

    `paths` are pairs (known, path), a path being nodes from a root on: path[:known] are there
    already, path[known:] are new, and those of all paths, one after the other, are the T inputs.
    Paths that begin alike must be neighbours. Two rows that share their first two tokens:
    TreeAttention([(0, [0, 1, 2]), (2, [0, 1, 3])]), T = 4, node 3 sees 0, 1 and itself. Keys and
    values are in `pool` (2, layers, nodes, K, d); without one, node i is the i-th of the T.

    A segment is a chain of nodes without branches. A long one is a range of keys that is neither
    copied nor masked: its own queries see it causally, and all that come below it, a range as well,
    see it whole. The short segments of each path are gathered, for blocks of its queries."""
    LONG = 128          # nodes from which a kernel of its own costs less than copies and masks

    def __init__(self, paths: list[tuple[int, list[int]]], device=None, pool: Tensor | None = None):
        new, parts = forest_parts(paths, self.LONG)
        on = lambda x: torch.as_tensor(x).to(device) if isinstance(x, np.ndarray) else x
        self.pool = pool
        self.new = on(new)                                  # (T,) pool node of each input
        self.parts = [Part(*(on(getattr(part, f.name)) for f in dataclasses.fields(Part)))
                      for part in parts]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.pool is None:
            return _Forest.apply(q[0], k[0], v[0], self.parts)[None]
        self.pool[0, layer, self.new] = k[0].transpose(0, 1)
        self.pool[1, layer, self.new] = v[0].transpose(0, 1)
        keys, values = self.pool[:, layer].transpose(1, 2)              # (K, nodes, d) each
        return _Forest.apply(q[0], keys, values, self.parts)[None]


def forest_parts(paths: list[tuple[int, list[int]]], long: int) -> tuple[np.ndarray, list[Part]]:
    """The node of each of the T inputs, and the parts, in numpy: together they have each pair of a
    query and a node that it sees once."""
    knowns = [known for known, _ in paths]
    paths = [np.asarray(path) for _, path in paths]
    starts = _segment_starts(knowns, paths)
    causal, blocks = [], []
    below: dict[int, list[slice]] = {}                      # first node of a segment -> keys, queries
    first = 0                                               # place of a path's first new node
    for known, path in zip(knowns, paths):
        place = lambda depth: first + max(depth - known, 0)
        end_of_path = place(len(path))
        cuts = np.append(np.flatnonzero(starts[path]), len(path)).tolist()
        short = []
        for begin, end in zip(cuts, cuts[1:]):              # depths of a segment in this path
            if end - begin < long:
                short.append(np.arange(begin, end))
                continue
            keys = slice(int(path[begin]), int(path[begin]) + end - begin)
            if begin >= known:
                causal.append(Part(slice(place(begin), place(end)), keys, causal=True))
            if place(end) < end_of_path:
                queries = below.get(keys.start, [keys, slice(place(end), end_of_path)])[1]
                below[keys.start] = [keys, slice(queries.start, end_of_path)]
        if short:
            depths = np.concatenate(short)
            top = max(int(depths[0]), known)                # what is above sees nothing short
            blocks.append(BlockRow(path[depths], depths, top, len(path), place(top)))
        first += len(path) - known
    new = np.concatenate([path[known:] for known, path in zip(knowns, paths)])
    parts = causal + [Part(queries, keys) for keys, queries in below.values()]
    if any(row.begin < row.end for row in blocks):
        parts.append(_blocks(blocks))
    return new, parts


def _segment_starts(knowns: list[int], paths: list[np.ndarray]) -> np.ndarray:
    """Of each node whether a segment begins there: at roots, at first new nodes, behind branches,
    and where the numbers of a path jump."""
    everything = np.concatenate(paths)
    seen_by = np.bincount(everything)                       # paths through each node
    starts = np.zeros(len(seen_by), bool)
    for known, path in zip(knowns, paths):
        starts[path[:1]] = True
        starts[path[known:known + 1]] = True
        branches = np.diff(seen_by[path]) != 0
        jumps = np.diff(path) != 1
        starts[path[1:][branches | jumps]] = True
    return starts


@dataclass(frozen=True)
class BlockRow:
    """A path's short nodes, and its queries that see some of them."""
    nodes: np.ndarray
    depths: np.ndarray                  # of the nodes
    begin: int                          # depth of the first query
    end: int
    place: int                          # of the first query among the T


def _blocks(rows: list[BlockRow]) -> Part:
    """Rows -> one part of padded blocks, a row's queries in as many blocks as they need."""
    longest = max(len(row.nodes) for row in rows)
    most = max(row.end - row.begin for row in rows)
    size = min(most, max(64, longest // 8))                 # many keys are gathered 8 times at the most

    keys = np.zeros((len(rows), longest), np.int64)
    deepest = np.iinfo(np.int64).max                        # padding is deeper than any query
    key_depths = np.full((len(rows), longest), deepest)
    blocks = []                                             # its row, first depth and place, length
    for i, row in enumerate(rows):
        keys[i, :len(row.nodes)] = row.nodes
        key_depths[i, :len(row.nodes)] = row.depths
        for depth in range(row.begin, row.end, size):
            blocks.append((i, depth, row.place + depth - row.begin, min(row.end - depth, size)))

    which, depth, place, length = np.array(blocks).T
    offset = np.minimum(np.arange(size), length[:, None] - 1)                   # (blocks, size)
    depths = depth[:, None] + offset
    seen = key_depths[which][:, None] <= depths[:, :, None]                     # (…, size, longest)
    mask = np.where(seen, np.float32(0), np.float32(-np.inf))[:, None]
    inside = np.flatnonzero(np.arange(size) < length[:, None])
    return Part(place[:, None] + offset, keys[which], False, mask, inside)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that training moves: all, or with LoRA only its own."""
    return [p for p in model.parameters() if p.requires_grad]


# ------------------------------------------------------------- what follows from the machine
def fp32_head(head: Tensor) -> Tensor:
    """The vocabulary projection (V, D) as `fp32_logits` multiplies it fastest."""
    return head.float() if head.device.type == "cpu" else head


def fp32_logits(hidden: Tensor, head: Tensor) -> Tensor:
    """hidden (N, D), head (V, D) -> logits (N, V) in fp32, never rounded to the dtype of either.

    Sampled and trained log-probs of one token would differ by that: 0.06 for a bf16 logit of 20."""
    mixed = hidden.dtype == head.dtype != torch.float and hasattr(torch.ops.aten.mm, "dtype")
    if mixed and hidden.device.type == "cuda":
        return torch.mm(hidden, head.t(), out_dtype=torch.float)
    return F.linear(hidden.float(), head.float())


def memory_of(device: torch.device) -> int:
    """All bytes of the device. Not those that are free: what follows must not change by the run."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def node_bytes(config: ModelConfig, like: Tensor) -> int:
    """What the keys and values of one token take, in the dtype of `like`."""
    return 2 * config.layers * config.kv_heads * config.head_dim * like.element_size()


def nodes_for(config: ModelConfig, like: Tensor) -> int:
    """Nodes of shared prefixes that the sampler keeps: as many as a sixteenth of the memory holds."""
    return memory_of(like.device) // 16 // node_bytes(config, like)


def slots_for(config: ModelConfig, like: Tensor) -> int:
    """Sequences that decode together: 64, or fewer where an eighth of the memory does not hold 1,024
    own tokens of each."""
    return max(1, min(64, memory_of(like.device) // 8 // (1024 * node_bytes(config, like))))


def activation_bytes(model: Transformer) -> int:
    """What a token keeps, about, from the forward to the backward pass.

    In each layer some eight states, four times its queries, keys and values, five times the MLP's;
    with checkpointing one state."""
    c = model.config
    heads = (c.heads + 2 * c.kv_heads) * c.head_dim
    layer = 8 * c.hidden_size + 4 * heads + 5 * c.intermediate_size
    kept = c.layers * c.hidden_size + layer if model.checkpointing else c.layers * layer
    return kept * model.head.element_size()


def fast_dtype(config: ModelConfig, device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it faster and the LM is so large (width 512) that products
    are what it waits for; else float32."""
    if device.type == "cuda":
        faster = torch.cuda.is_bf16_supported()
    else:
        supports = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        faster = any(getattr(torch.cpu, name, lambda: False)() for name in supports)
    return torch.bfloat16 if faster and config.hidden_size >= 512 else torch.float32


# ------------------------------------------------------------------------------ the KV cache
class KVCache:
    """Keys and values of prefixes, and of `slots` sequences that decode.

    `pool` (2, layers, nodes, K, d) holds prefixes as nodes of a forest. A sequence attends to the
    long ranges of its prefix where they lie, however many share them. What is short of it, and what
    it samples, is its own: `kv` (2, layers, slots, K, size, d), of which `lengths` (slots,) tokens
    are there. `positions` (slots,) is the place of its next token."""
    LONG = 64           # nodes in a row from which a prefix is attended to in place

    def __init__(self, config: ModelConfig, slots: int, device=None, dtype=None):
        K, d = config.kv_heads, config.head_dim
        self.kv = torch.zeros(2, config.layers, slots, K, 0, d, device=device, dtype=dtype)
        self.pool = torch.zeros(2, config.layers, 0, K, d, device=device, dtype=dtype)
        self.lengths, self.positions = torch.zeros(2, slots, device=device, dtype=torch.long)
        # of each slot the ranges of the pool that it sees in place
        self.ranges: list[list[tuple[int, int]]] = [[] for _ in range(slots)]
        self.replaced = False           # a buffer that CUDA graphs may have recorded is gone

    def reserve(self, nodes: int) -> None:
        """Make room for `nodes` nodes in the pool, and half as many again."""
        more = nodes - self.pool.shape[2]
        if more > 0:
            self.pool = F.pad(self.pool, (0, 0, 0, 0, 0, max(more, nodes // 2)))
            self.replaced = True

    def place(self, slots: list[int], paths: list[list[int]], kept: int, room: int) -> int:
        """Give sequences, the nodes of whose tokens are in the pool, their slots.

        Nodes from `kept` on will not stay where they are; each slot gets room for `room` tokens more.
        Returns how many own tokens one of the sequences has at the most."""
        own = []                        # of each sequence the nodes that are copied
        for slot, path in zip(slots, paths):
            stay = bisect_left(path, True, key=lambda node: node >= kept)
            ranges = contiguous_ranges(path[:stay])
            long = [(start, end) for start, end in ranges if end - start >= self.LONG]
            short = [node for r in ranges if r not in long for node in range(*r)]
            self.ranges[slot] = long
            own.append(short + path[stay:])

        lengths = [len(nodes) for nodes in own]
        missing = max(lengths) + room - self.kv.shape[4]
        if missing > 0:
            self.kv = F.pad(self.kv, (0, 0, 0, round_up(missing, 64)))
            self.replaced = True
        tensor = lambda x: torch.tensor(x, device=self.lengths.device)
        self.lengths[slots] = tensor(lengths)
        self.positions[slots] = tensor([len(path) for path in paths])
        copied = [(slot, i, node) for slot, nodes in zip(slots, own) for i, node in enumerate(nodes)]
        if copied:
            slot, i, node = tensor(copied).unbind(1)
            self.kv[:, :, slot, :, i] = self.pool[:, :, node].permute(2, 0, 1, 3, 4)
        return max(lengths)

    def shared(self, n: int) -> list[tuple[slice, list[int]]]:
        """What the first n slots see in place: ranges of the pool, each with the slots that see it.

        A range is cut where fewer go on; two that overlap begin at the same node."""
        ends: dict[int, dict[int, list[int]]] = {}          # start -> end -> slots
        for slot, ranges in enumerate(self.ranges[:n]):
            for start, end in ranges:
                ends.setdefault(start, {}).setdefault(end, []).append(slot)
        parts = []
        for start, slots_of in ends.items():
            for end in sorted(slots_of):
                below = [slot for e, slots in slots_of.items() if e >= end for slot in slots]
                parts.append((slice(start, end), sorted(below)))
                start = end
        return parts

    def decode(self, n: int, longest: int, shared: list[tuple[slice, slice | Tensor | None]],
               sees: Tensor | None = None):
        """Append one token to each of the first n slots, at most `longest` of its own afterwards.

        `shared` is what `shared(n)` gives, the slots as indices. In shapes that recur (CUDA graphs)
        these are None: every range is scored for all n, and sees (ranges, slots) says who sees it.
        Returns attend(layer, q (1, H, n, d), k (1, K, n, d), v) -> (1, H, n, d)."""
        row, end = torch.arange(n, device=self.lengths.device), self.lengths[:n]
        unseen = torch.arange(longest, device=end.device) > end[:, None]                # (n, longest)
        mask = torch.zeros(unseen.shape, device=end.device).masked_fill_(unseen, -math.inf)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.kv[0, layer, row, :, end] = k[0].transpose(0, 1)
            self.kv[1, layer, row, :, end] = v[0].transpose(0, 1)

            # each row's own keys
            keys, values = self.kv[:, layer, :n, :, :longest]                   # (n, K, longest, d)
            out, lse = flash(q.transpose(0, 2), keys, values, mask=mask[:, None, None])
            if not shared:
                return out.transpose(0, 2)
            out = out[:, :, 0].transpose(0, 1).float()                          # (H, n, d)
            lse = lse[:, :, 0].transpose(0, 1).contiguous()                     # (H, n)

            # what they share, where it lies
            for i, (nodes, slots) in enumerate(shared):
                at = slice(None) if slots is None else slots
                keys, values = self.pool[:, layer, nodes].transpose(1, 2)[:, None]      # (1, K, L, d)
                part_out, part_lse = flash(q[:, :, at], keys, values)
                if slots is None:
                    part_lse = part_lse.masked_fill(~sees[i, :n], -math.inf)
                merge(out, lse, at, part_out[0], part_lse[0])
            return out.to(q.dtype)[None]
        return attend

    def move(self, source: int, target: int) -> None:
        self.kv[:, :, target] = self.kv[:, :, source]
        self.ranges[target] = self.ranges[source]
        for state in (self.lengths, self.positions):
            state[target] = state[source]

    def free(self, slot: int) -> None:
        self.ranges[slot] = []
        self.lengths[slot] = self.positions[slot] = 0


def contiguous_ranges(path: list[int]) -> list[tuple[int, int]]:
    """[4, 5, 6, 9] -> [(4, 7), (9, 10)]"""
    if not path:
        return []
    nodes = np.asarray(path)
    cuts = np.flatnonzero(np.diff(nodes) != 1) + 1
    firsts = nodes[np.append(0, cuts)]
    lasts = nodes[np.append(cuts, len(nodes)) - 1]
    return [(first, last + 1) for first, last in zip(firsts.tolist(), lasts.tolist())]


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


# --------------------------------------------------------------------------------------------------- checkpoints
disk_name = lambda name: name if name.startswith("lm_head.") else f"model.{name}"


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of model.safetensors, or of the shards that model.safetensors.index.json lists."""
    files, index = ["model.safetensors"], folder / "model.safetensors.index.json"
    if index.is_file() and not (folder / files[0]).is_file():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(s, str) and Path(s).name == s for s in shards.values()):
            raise CheckpointError(f"{index}: weight_map: expected an object of tensor name -> file name")
        files = sorted(set(shards.values()))
    tensors = {}
    for name in files:
        try:
            tensors |= safetensors.torch.load_file(folder / name)
        except (OSError, safetensors.SafetensorError) as e:
            raise CheckpointError(f"{folder / name}: cannot be read ({e})") from None
    return tensors


def load_pretrained(path: str | Path, device: str = "cpu", dtype: torch.dtype | None = torch.float32) -> tuple[Transformer, Tokenizer]:
    """A checkpoint folder in Hugging Face layout, or a file FILE.gguf -> (Transformer, Tokenizer); without a dtype in `fast_dtype`.

    Raises CheckpointError where a file is missing or corrupt, or a tensor is missing, unknown or of a wrong shape."""
    folder = Path(path)
    if folder.is_dir():
        files = read_files(folder)
        tensors = read_tensors(folder)
    elif folder.suffix == ".gguf":
        from lm.gguf import read_gguf  # here, for its library is an extra
        files, tensors = read_gguf(folder, dtype or torch.float32)
    else:
        raise CheckpointError(f"{folder}: no such checkpoint folder")
    tokenizer = Tokenizer(folder, files)
    raw = read_json(folder / "config.json", files.get("config.json"))
    config = ModelConfig.from_hf(raw, str(folder / "config.json"))
    dtype = dtype or fast_dtype(config, torch.device(device))
    if config.vocab_size < tokenizer.size:
        raise CheckpointError(f"{folder}: vocab_size {config.vocab_size} is smaller than the tokenizer's {tokenizer.size}")
    found = {n: t for n, t in tensors.items() if not n.endswith("rotary_emb.inv_freq")}    # old exports
    if config.tied and "lm_head.weight" in found:              # some exporters write the tied head twice
        if not torch.equal(found.pop("lm_head.weight"), found.get("model.embed_tokens.weight", torch.empty(0))):
            raise CheckpointError(f"{folder}: lm_head.weight differs from model.embed_tokens.weight, yet "
                                  "tie_word_embeddings is true")
    if f"model.layers.{config.layers - 1}.input_layernorm.weight" not in found:        # before so many layers are built
        raise CheckpointError(f"{folder}: there is no layer {config.layers - 1} in its files")
    with torch.device("meta"):
        model = Transformer(config)
    wanted = {disk_name(n): p for n, p in model.state_dict().items()}
    for name in sorted(wanted.keys() ^ found.keys()):
        raise CheckpointError(f"{folder}: tensor {name} is {'missing' if name in wanted else 'not part of this model'}")
    for name, p in wanted.items():
        if found[name].shape != p.shape or found[name].dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise CheckpointError(f"{folder}: tensor {name}: expected floats of shape {tuple(p.shape)}, found "
                                  f"{found[name].dtype} of {tuple(found[name].shape)}")
    model.load_state_dict({n: found[disk_name(n)].to(device, dtype) for n in model.state_dict()}, assign=True)
    return model, tokenizer


def save_pretrained(model: Transformer, tokenizer: Tokenizer, path: str | Path) -> None:
    """Write a folder that `load_pretrained`, and other readers of the Hugging Face layout, load with equal logits."""
    folder, state = Path(path), model.state_dict()
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in tokenizer.files.items():
        (folder / name).write_bytes(data)
    raw = model.config.raw | {"dtype": str(model.head.dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if k != "torch_dtype"}, indent=2) + "\n")
    safetensors.torch.save_file({disk_name(n): t.contiguous().cpu() for n, t in state.items()},
                                folder / "model.safetensors.new", metadata={"format": "pt"})
    (folder / "model.safetensors.new").replace(folder / "model.safetensors")        # never half a file
