"""The language model: transformer, attention over a prefix tree, KV cache and checkpoints.

One class, a decoder-only transformer, covers Qwen3, Qwen2/2.5 and Llama-3.x: they differ in biases,
q/k norms, the tie of the head and the RoPE scaling, all read from config.json. Parameters are named
as on disk (but for the leading `model.`), so that loading is a comparison of names and shapes. Left
out, and refused by name: other architectures, sliding windows, quantised weights.

    model, tokenizer = load_pretrained("tasks/tiny")
    ids = tokenizer.encode_chat([{"role": "user", "content": "Hello"}])
    hidden = model(torch.tensor([ids]))                  # (B, T, D)
    logits = model.logits(hidden)                        # (B, T, V)

Letters: B batch, T time (of a tree: its nodes, one after the other), L keys that queries may see,
D model width, H query heads, K key/value heads, d width of a head, V vocabulary.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import shutil
from bisect import bisect_left
from collections.abc import Callable
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

# ------------------------------------------------------------------------------------ configuration

# what config.json may name in `model_type`, for those that lack `architectures`
ARCHITECTURES = {
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM",
}


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a transformer.

    Example: ModelConfig.from_hf({"architectures": ["Qwen3ForCausalLM"], "vocab_size": 2048,
    "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
    "head_dim": 32, "max_position_embeddings": 4096})
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    # independent of hidden_size / heads
    head_dim: int
    max_positions: int
    norm_eps: float
    # the head is the embedding matrix
    tied: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    # RMSNorm of every query and key head
    qk_norm: bool
    rope_theta: float
    # factor, low_freq_factor, high_freq_factor, original length
    rope_llama3: tuple[float, ...] | None
    # config.json as read, written back on save
    raw: dict = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def from_hf(cls, raw: dict, where: str = "config.json") -> ModelConfig:
        """Read a Hugging Face configuration, old style (`rope_theta`) or new (`rope_parameters`).

        Raises CheckpointError naming the field that is missing, malformed or not supported; `where`
        is what the message calls the file.
        """
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        if not isinstance(rope, dict):
            rope = {"rope_type": rope}
        scaling = rope.get("rope_type", rope.get("type", "default"))
        family = _supported_architecture(raw, rope, scaling, where)

        integer = functools.partial(_number, where, int)
        real = functools.partial(_number, where, float)
        flag = functools.partial(_flag, where)
        width = integer(raw, "hidden_size")
        heads = integer(raw, "num_attention_heads")
        usual_head_dim = 128 if family == "qwen3" else width // heads
        attention_bias = flag(raw, "attention_bias")
        config = cls(
            vocab_size=integer(raw, "vocab_size"),
            hidden_size=width,
            intermediate_size=integer(raw, "intermediate_size"),
            layers=integer(raw, "num_hidden_layers"),
            heads=heads,
            kv_heads=integer(raw, "num_key_value_heads", default=heads),
            head_dim=integer(raw, "head_dim", default=usual_head_dim),
            max_positions=integer(raw, "max_position_embeddings"),
            norm_eps=real(raw, "rms_norm_eps", default=1e-6, low=0),
            tied=flag(raw, "tie_word_embeddings"),
            # Qwen2 always has biases of q, k and v, never one of o, and does not say so
            qkv_bias=attention_bias or family == "qwen2",
            o_bias=attention_bias and family != "qwen2",
            mlp_bias=family == "llama" and flag(raw, "mlp_bias"),
            qk_norm=family == "qwen3",
            # new style among the fields of RoPE, old style beside them
            rope_theta=real(rope, "rope_theta", default=real(raw, "rope_theta", default=1e4)),
            rope_llama3=_llama3_scaling(rope, where) if scaling == "llama3" else None,
            raw=raw,
        )
        if config.heads % config.kv_heads or config.head_dim % 2:
            raise CheckpointError(
                f"{where}: num_attention_heads {config.heads} must be a multiple of "
                f"num_key_value_heads {config.kv_heads}, and head_dim {config.head_dim} even"
            )
        return config


def _supported_architecture(raw: dict, rope: dict, scaling: object, where: str) -> str:
    """One of the keys of ARCHITECTURES.

    Raises CheckpointError naming the first field that asks for what is not implemented.
    """

    def require(supported: bool, key: str, value: object) -> None:
        if not supported:
            raise CheckpointError(f"{where}: {key} {value!r} is not supported")

    named = raw.get("architectures") or [ARCHITECTURES.get(str(raw.get("model_type")))]
    families = [family for family, name in ARCHITECTURES.items() if named == [name]]
    require(len(families) == 1, "architectures", named)

    activation = raw.get("hidden_act", "silu")
    require(activation == "silu", "hidden_act", activation)

    # a list with one kind for each layer; read as text, so that any other value is refused as well
    layer_types = raw.get("layer_types")
    kinds = set(re.findall(r"\w+", str(layer_types or [])))
    require(kinds <= {"full_attention"}, "layer_types", layer_types)

    require(scaling in ("default", "llama3"), "rope_type", scaling)
    rotated = rope.get("partial_rotary_factor", 1)
    require(rotated == 1, "partial_rotary_factor", rotated)
    for key in ("quantization_config", "use_sliding_window"):
        require(not raw.get(key), key, raw.get(key))
    return families[0]


def _number(where: str, kind: type, source: dict, key: str, default=None, low: float = 1):
    """The field `key`, an int or float of at least `low`; where absent or null, `default`."""
    value = default if source.get(key) is None else source[key]
    # type() because True is an int to Python; the comparisons refuse NaN and infinities, which
    # Python's JSON has, and the last one 32.5 for an int
    is_number = type(value) in (int, float)
    if not is_number or not low <= value < 2**31 or kind(value) != value:
        expected = f"{kind.__name__} of at least {low}"
        raise CheckpointError(f"{where}: {key}: expected {expected}, found {value!r}")
    return kind(value)


def _flag(where: str, source: dict, key: str) -> bool:
    """The field `key`; where it is absent or null, False."""
    value = False if source.get(key) is None else source[key]
    if type(value) is not bool:
        raise CheckpointError(f"{where}: {key}: expected true or false, found {value!r}")
    return value


def _llama3_scaling(rope: dict, where: str) -> tuple[float, ...]:
    """factor, low_freq_factor, high_freq_factor, original length"""
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    return tuple(_number(where, float, rope, key, low=1e-6) for key in keys)


# ----------------------------------------------------------------------- rotary position embeddings
@functools.lru_cache
def inverse_frequencies(config: ModelConfig, device: torch.device) -> Tensor:
    """(d/2,) angular step per position of each rotated pair, always fp32.

    RoFormer, arXiv 2104.09864. With `llama3` scaling, wavelengths longer than original/low are
    stretched by `factor`, shorter than original/high are kept, and those between are interpolated.
    """
    d = config.head_dim
    exponents = torch.arange(0, d, 2, device=device, dtype=torch.float32) / d  # (d/2,)
    inverse = 1.0 / config.rope_theta**exponents
    if config.rope_llama3:
        factor, low, high, original = config.rope_llama3
        # rotations within the original context
        turns = original * inverse / (2 * math.pi)
        # 0: stretch, 1: keep
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        inverse = (1 - keep) * inverse / factor + keep * inverse
    return inverse


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x_i, x_{i+d/2}) of x (B, heads, T, d).

    cos and sin (B, 1, T, d) are of the angles; the first half of the sines is negated.
    """
    partners = x.roll(x.shape[-1] // 2, -1)  # (B, heads, T, d)
    return torch.addcmul(x * cos, partners, sin)


# -------------------------------------------------------------------------------------- transformer

# attend(layer, q (B, H, T, d), k (B, K, T, d), v (B, K, T, d)) -> (B, H, T, d) decides which tokens
# see which: `attention` here, else a TreeAttention or what KVCache.decode returns
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


def attention(layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention of q (B, H, T, d) over k, v (B, K, L, d), the default `attend`.

    It is causal unless `mask` says what is seen.
    """
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1]
    )


class Attention(nn.Module):
    """Projections and rotation around `attend`."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.d = c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, c.heads * self.d, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.hidden_size, c.kv_heads * self.d, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.hidden_size, c.kv_heads * self.d, bias=c.qkv_bias)
        self.o_proj = nn.Linear(c.heads * self.d, c.hidden_size, bias=c.o_bias)
        if c.qk_norm:
            self.q_norm = nn.RMSNorm(self.d, c.norm_eps)
            self.k_norm = nn.RMSNorm(self.d, c.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layer: int, attend: Attend) -> Tensor:
        q = self.q_proj(x).unflatten(-1, (-1, self.d)).transpose(1, 2)  # (B, H, T, d)
        k = self.k_proj(x).unflatten(-1, (-1, self.d)).transpose(1, 2)  # (B, K, T, d)
        v = self.v_proj(x).unflatten(-1, (-1, self.d)).transpose(1, 2)  # (B, K, T, d)
        if hasattr(self, "q_norm"):
            q = self.q_norm(q)
            k = self.k_norm(k)
        y = attend(layer, rotate(q, cos, sin), rotate(k, cos, sin), v)  # (B, H, T, d)
        return self.o_proj(y.transpose(1, 2).flatten(2))  # (B, T, D)


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
    """One layer: attention, then the MLP, each on normalised states and added to the stream."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.self_attn = Attention(c)
        self.mlp = MLP(c)
        self.input_layernorm = nn.RMSNorm(c.hidden_size, c.norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(c.hidden_size, c.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layer: int, attend: Attend) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, layer, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    """A decoder-only transformer.

    It has no train mode: sampling and scoring are the same function (but for LoRA's dropout). Where
    `checkpointing` is on, layers are computed again in the backward pass instead of kept.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.checkpointing = False
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        if not config.tied:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head(self) -> Tensor:
        """(V, D) the vocabulary projection."""
        return self.embed_tokens.weight if self.config.tied else self.lm_head.weight

    def forward(
        self, ids: Tensor, positions: Tensor | None = None, attend: Attend = attention
    ) -> Tensor:
        """ids (B, T) -> hidden states (B, T, D) after the final norm, causal within each row.

        Rows may be padded on the right with any id: what follows a token never changes it.
        `positions` (B, T) default to 0..T-1, `attend` to causal attention.
        """
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device)[None]  # (1, T)
        x = self.embed_tokens(ids)  # (B, T, D)

        # angles in fp32 whatever the weights: bf16 cannot tell far positions apart
        frequencies = inverse_frequencies(self.config, ids.device)
        angles = positions[..., None].float() * frequencies  # (B, T, d/2)
        cos = angles.cos()
        sin = angles.sin()
        cos = torch.cat((cos, cos), -1)[:, None].to(x.dtype)  # (B, 1, T, d)
        sin = torch.cat((-sin, sin), -1)[:, None].to(x.dtype)  # (B, 1, T, d)

        for i, block in enumerate(self.layers):
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, i, attend, use_reentrant=False)
            else:
                x = block(x, cos, sin, i, attend)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, V)"""
        return F.linear(hidden, self.head)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that training moves: all, or with LoRA only its own."""
    return [p for p in model.parameters() if p.requires_grad]


# --------------------------------------------------------------------------------------- one kernel
# Attention that also returns the log-sum-exp of its scores, so that what it finds over some of the
# keys can be merged with what another call finds over others.


def _scores(q: Tensor, k: Tensor, causal: bool, mask: Tensor | None) -> Tensor:
    """(B, H, T, L), fp32."""
    scores = (q @ k.transpose(2, 3)).float() * q.shape[-1] ** -0.5
    if causal:
        unseen = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).triu(1)  # (T, L)
        scores = scores.masked_fill(unseen, -math.inf)
    return scores if mask is None else scores + mask


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What the fused kernel computes, in plain products: (out, log-sum-exp)."""
    scores = _scores(q, k, causal, mask)  # (B, H, T, L)
    lse = scores.logsumexp(-1)  # (B, H, T)
    p = (scores - lse[..., None]).exp()  # (B, H, T, L)
    return p.to(v.dtype) @ v, lse


def plain_attention_backward(d_out, q, k, v, out, lse, causal, mask):
    """What the fused kernel's backward computes: (dq, dk, dv)."""
    p = (_scores(q, k, causal, mask) - lse[..., None]).exp()  # (B, H, T, L)
    d_p = (d_out @ v.transpose(2, 3)).float()  # (B, H, T, L)
    d_scores = p * (d_p - (d_out.float() * out.float()).sum(-1, keepdim=True))
    d_scores = (d_scores * q.shape[-1] ** -0.5).to(q.dtype)
    dv = p.to(q.dtype).transpose(2, 3) @ d_out  # (B, H, L, d)
    return d_scores @ k, d_scores.transpose(2, 3) @ q, dv


def _kernel(q, k, v, causal, mask):
    # on the CPU the fused kernel, by its own name: F.scaled_dot_product_attention hides the lse
    if q.device.type != "cpu":
        return plain_attention(q, k, v, causal, mask)
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return fused(q, k, v, 0.0, causal, attn_mask=mask)


def _kernel_backward(d_out, q, k, v, out, lse, causal, mask):
    if q.device.type != "cpu":
        return plain_attention_backward(d_out, q, k, v, out, lse, causal, mask)
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return fused(d_out, q, k, v, out, lse, 0.0, causal, attn_mask=mask)


def _align_heads(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """As many heads of keys and values as of queries, which is what the kernels take."""
    B, H, T, d = q.shape
    K, L = k.shape[1:3]
    if H == K:
        return q, k, v

    # where keys are many, and all queries see the same, nothing is copied: the H/K heads that share
    # keys become further queries of one head
    queries = H // K * T
    all_see_the_same = not causal and (mask is None or mask.shape[2] == 1)
    if all_see_the_same and queries <= L:
        return q.reshape(B, K, queries, d), k, v  # (B, K, H/K T, d)

    k = k.repeat_interleave(H // K, 1)  # (B, H, L, d)
    v = v.repeat_interleave(H // K, 1)  # (B, H, L, d)
    return q, k, v


def flash(
    q: Tensor, k: Tensor, v: Tensor, causal: bool = False, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of q (B, H, T, d) over k, v (B, K, L, d), with the log-sum-exp of its scores.

    `mask` (B, 1, T or 1, L), fp32, is added to the scores. Returns out (B, H, T, d) and lse
    (B, H, T), fp32.
    """
    shape = q.shape
    q, k, v = _align_heads(q, k, v, causal, mask)
    out, lse = _kernel(q, k, v, causal, mask)
    return out.reshape(shape), lse.reshape(shape[:3])  # (B, H, T, d), (B, H, T)


def flash_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool = False,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What these keys add to the gradients (dq, dk, dv), `out` and `lse` being those of all keys.

    With P = exp(q k - lse), the scores' gradient P (d_out v - sum(d_out out)) holds for each key by
    itself (FlashAttention-2, arXiv 2307.08691, section 3.1): a kernel that is given the merged
    results of an attention returns exactly its own keys' share.
    """
    shape = q.shape
    kv_heads = k.shape[1]
    q, k, v = _align_heads(q, k, v, causal, mask)

    # where heads became queries, all that is of queries has the shape of these
    d_out = d_out.reshape(q.shape)
    out = out.reshape(q.shape)
    lse = lse.reshape(q.shape[:3])
    dq, dk, dv = _kernel_backward(d_out, q, k, v, out, lse, causal, mask)

    # where keys were repeated, the copies' gradients are one key's
    if dk.shape[1] != kv_heads:
        dk = dk.unflatten(1, (kv_heads, -1)).sum(2)  # (B, K, H/K, L, d) -> (B, K, L, d)
        dv = dv.unflatten(1, (kv_heads, -1)).sum(2)
    return dq.reshape(shape), dk, dv


# --------------------------------------------------------------------- attention over a prefix tree
# The rows of a batch share prefixes: together they are a forest, each distinct prefix one node that
# is computed once. A path is the nodes of one row, from a root on; a segment is a chain of nodes
# without branches. A node sees itself and its ancestors, and which pairs those are is laid out as
# parts, each one call of the kernel, whose results are merged:
#
#     a long segment      a range of keys that is neither copied nor masked. Its own queries see it
#                         causally (one part); all that come below it, a range as well, see it whole
#                         (another part).
#     short segments      of each path they are gathered, for blocks of its queries, under a mask:
#                         one part for all paths.


# queries or keys of a part: a range, or indices in padded blocks
Places = slice | Tensor
# a block holds at least so many queries of a path that has them
SMALLEST_BLOCK = 64


def take(x: Tensor, places: Places) -> Tensor:
    """(heads, T, …) -> (1, heads, range, …), or (blocks, heads, size, …)."""
    if isinstance(places, slice):
        return x[None, :, places]  # (1, heads, range, …)
    return x[:, places].transpose(0, 1)  # (blocks, heads, size, …)


def merge(out: Tensor, lse: Tensor, queries: Places, part_out: Tensor, part_lse: Tensor) -> None:
    """Attention over some keys and over others -> over both: o = sum_i o_i exp(lse_i - lse).

    In place: out (H, T, d) and lse (H, T), fp32, are what there is; part_out (H, n, d) and part_lse
    (H, n) join the n `queries`.
    """
    before = lse[:, queries]  # (H, n)
    both = torch.logaddexp(before, part_lse)  # (H, n)
    old = out[:, queries] * (before - both).exp()[..., None]  # (H, n, d)
    out[:, queries] = old + part_out * (part_lse - both).exp()[..., None]
    lse[:, queries] = both


@dataclass(frozen=True)
class Part:
    """Some queries and some keys of a forest: one call of the kernel. Ranges, or padded blocks."""

    # of the T inputs: a range, or (blocks, size)
    queries: Places
    # nodes: a range, or (blocks, longest)
    keys: Places
    # query i sees keys 0..i; else all, or what the mask says
    causal: bool = False
    # (blocks, 1, size, longest) 0 or -inf
    mask: Tensor | None = None
    # (n,) places in blocks x size: a block is filled up with its last query, which counts once
    inside: Tensor | None = None

    @property
    def nodes(self) -> Places:
        """The queries, each once: a range, or (n,)."""
        if isinstance(self.queries, slice):
            return self.queries
        return self.queries.flatten()[self.inside]  # (n,)

    def each_once(self, x: Tensor) -> Tensor:
        """Undo `take` on what came of the queries -> (heads, n, …), one for each of `nodes`."""
        if self.inside is None:
            return x[0]  # (heads, range, …)
        return x.transpose(0, 1).flatten(1, 2)[:, self.inside]  # (heads, n, …)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """q (H, T, d), k and v (K, nodes, d) -> out (H, n, d), lse (H, n) of the part alone."""
        q = take(q, self.queries)  # (blocks, H, size, d), of a range (1, H, range, d)
        k = take(k, self.keys)  # (blocks, K, longest, d)
        v = take(v, self.keys)
        out, lse = flash(q, k, v, self.causal, self.mask)
        return self.each_once(out), self.each_once(lse)

    def add_gradients(self, d_out, q, k, v, out, lse, dq, dk, dv) -> None:
        """Add the part's share to dq (H, T, d), dk and dv (K, nodes, d), fp32."""
        d_out = take(d_out, self.queries)  # (blocks, H, size, d)
        q = take(q, self.queries)
        out = take(out, self.queries)
        lse = take(lse, self.queries)  # (blocks, H, size)
        k = take(k, self.keys)  # (blocks, K, longest, d)
        v = take(v, self.keys)

        # the copies of a query that fill a block up bring no gradient
        if isinstance(self.queries, Tensor):
            blocks, size = self.queries.shape
            once = torch.zeros(blocks * size, dtype=d_out.dtype, device=d_out.device)
            once[self.inside] = 1
            d_out = d_out * once.view(blocks, size)[:, None, :, None]

        more_q, more_k, more_v = flash_backward(d_out, q, k, v, out, lse, self.causal, self.mask)
        dq[:, self.nodes] += self.each_once(more_q)  # (H, n, d)
        for total, more in ((dk, more_k), (dv, more_v)):
            if isinstance(self.keys, slice):
                total[:, self.keys] += more[0]  # (K, range, d)
            else:
                # a node is among the keys of many blocks: their gradients are summed
                more = more.transpose(0, 1).flatten(1, 2)  # (K, blocks x longest, d)
                total.index_add_(1, self.keys.flatten(), more.float())


def forest_parts(
    paths: list[tuple[int, list[int]]], long: int, device=None
) -> tuple[np.ndarray, list[Part]]:
    """Lay out the attention of a forest, whose `paths` TreeAttention describes.

    Returns the node of each of the T inputs, and the parts: together they have each pair of a query
    and a node that it sees once. A segment of `long` nodes or more is a range.
    """
    knowns = [known for known, _ in paths]
    nodes_of = [np.asarray(path) for _, path in paths]
    starts = _segment_starts(knowns, nodes_of)

    causal = []
    # first node of a long segment -> the part in which those below it see it
    below: dict[int, Part] = {}
    below_starts: dict[int, int] = {}
    rows = []
    # place, among the T inputs, of this path's first new node
    first = 0
    for known, nodes in zip(knowns, nodes_of):
        end_of_path = first + len(nodes) - known
        # depths between which the path's segments lie
        cuts = np.append(np.flatnonzero(starts[nodes]), len(nodes)).tolist()
        short = []
        for begin, end in zip(cuts, cuts[1:]):
            if end - begin < long:
                short.append(np.arange(begin, end))
                continue
            node = int(nodes[begin])
            keys = slice(node, node + end - begin)
            # place of the first query below the segment
            after = first + max(end - known, 0)
            if begin >= known:
                own = slice(first + begin - known, after)
                causal.append(Part(own, keys, causal=True))
            if after < end_of_path:
                # neighbouring paths go on with the range
                below_start = below_starts.setdefault(node, after)
                below[node] = Part(slice(below_start, end_of_path), keys)
        if short:
            depths = np.concatenate(short)
            # queries above the first short node see none of them
            top = max(int(depths[0]), known)
            place = first + top - known
            rows.append(BlockRow(nodes[depths], depths, top, len(nodes), place))
        first = end_of_path

    new = np.concatenate([nodes[known:] for known, nodes in zip(knowns, nodes_of)])  # (T,)
    parts = causal + list(below.values())
    if any(row.begin < row.end for row in rows):
        parts.append(_blocks(rows, device))
    return new, parts


def _segment_starts(knowns: list[int], nodes_of: list[np.ndarray]) -> np.ndarray:
    """(nodes,) whether a segment begins at a node.

    One does at roots, at first new nodes, behind branches, and where the numbers of a path jump.
    """
    # how many paths go through each node: where that changes along a path, another one branched off
    seen_by = np.bincount(np.concatenate(nodes_of))
    starts = np.zeros(len(seen_by), bool)
    for known, nodes in zip(knowns, nodes_of):
        starts[nodes[:1]] = True
        starts[nodes[known : known + 1]] = True
        branches = np.diff(seen_by[nodes]) != 0
        jumps = np.diff(nodes) != 1
        starts[nodes[1:][branches | jumps]] = True
    return starts


@dataclass(frozen=True)
class BlockRow:
    """A path's short nodes, and its queries that see some of them."""

    nodes: np.ndarray
    # those of the nodes
    depths: np.ndarray
    # the queries are those of depths begin..end-1
    begin: int
    end: int
    # that of the first query among the T inputs
    place: int


def _blocks(rows: list[BlockRow], device) -> Part:
    """Rows -> one part of padded blocks, a row's queries in as many blocks as they need."""
    longest = max(len(row.nodes) for row in rows)
    most = max(row.end - row.begin for row in rows)
    # a row's keys are gathered for each of its blocks: where they are many, 8 times at the most
    size = min(most, max(SMALLEST_BLOCK, longest // 8))

    keys = np.zeros((len(rows), longest), np.int64)
    # padding is deeper than any query, and so seen by none
    key_depths = np.full((len(rows), longest), np.iinfo(np.int64).max)
    # of each block: its row, the depth and place of its first query, how many queries
    blocks = []
    for i, row in enumerate(rows):
        keys[i, : len(row.nodes)] = row.nodes
        key_depths[i, : len(row.nodes)] = row.depths
        for depth in range(row.begin, row.end, size):
            place = row.place + depth - row.begin
            blocks.append((i, depth, place, min(row.end - depth, size)))

    row_of, depth, place, length = np.array(blocks).T  # (blocks,) each
    offsets = np.minimum(np.arange(size), length[:, None] - 1)  # (blocks, size)
    queries = place[:, None] + offsets  # (blocks, size)
    depths = depth[:, None] + offsets  # (blocks, size)
    seen = key_depths[row_of][:, None] <= depths[:, :, None]  # (blocks, size, longest)
    mask = np.where(seen, np.float32(0), np.float32(-np.inf))[:, None]
    inside = np.flatnonzero(np.arange(size) < length[:, None])  # (n,)
    tensor = functools.partial(torch.as_tensor, device=device)
    return Part(tensor(queries), tensor(keys[row_of]), mask=tensor(mask), inside=tensor(inside))


class _Forest(torch.autograd.Function):
    """Attention over the parts of a forest, merged; its backward is each part's own kernel."""

    @staticmethod
    def forward(ctx, q, k, v, parts):
        """q (H, T, d), k and v (K, nodes, d) -> (H, T, d)"""
        out = q.new_zeros(q.shape, dtype=torch.float)  # (H, T, d)
        lse = q.new_full(q.shape[:2], -math.inf, dtype=torch.float)  # (H, T)
        for part in parts:
            part_out, part_lse = part.forward(q, k, v)
            if len(parts) > 1:
                merge(out, lse, part.nodes, part_out, part_lse)
            else:
                # nothing to merge with
                out[:, part.nodes] = part_out.float()
                lse[:, part.nodes] = part_lse
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.parts = parts
        return out

    @staticmethod
    def backward(ctx, d_out):
        q, k, v, out, lse = ctx.saved_tensors
        dq = torch.zeros_like(q, dtype=torch.float)
        dk = torch.zeros_like(k, dtype=torch.float)
        dv = torch.zeros_like(v, dtype=torch.float)
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
    """

    # nodes of a segment from which a kernel of its own costs less than copies and masks
    LONG = 128

    def __init__(self, paths: list[tuple[int, list[int]]], device=None, pool: Tensor | None = None):
        new, self.parts = forest_parts(paths, self.LONG, device)
        self.new = torch.as_tensor(new, device=device)  # (T,) pool node of each input
        self.pool = pool

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.pool is None:
            return _Forest.apply(q[0], k[0], v[0], self.parts)[None]  # (1, H, T, d)
        self.pool[0, layer, self.new] = k[0].transpose(0, 1)  # (T, K, d)
        self.pool[1, layer, self.new] = v[0].transpose(0, 1)
        keys, values = self.pool[:, layer].transpose(1, 2)  # (K, nodes, d) each
        return _Forest.apply(q[0], keys, values, self.parts)[None]  # (1, H, T, d)


# -------------------------------------------------------------------- what follows from the machine

# the sampler's pool of shared prefixes takes a sixteenth of the memory, its slots an eighth
POOL_SHARE = 16
SLOTS_SHARE = 8
# the own tokens that a slot is reckoned to hold
SLOT_TOKENS = 1024
MOST_SLOTS = 64
# width of an LM from which products are what it waits for
WIDE = 512


def fp32_head(head: Tensor) -> Tensor:
    """The vocabulary projection (V, D) as `fp32_logits` multiplies it fastest."""
    return head.float() if head.device.type == "cpu" else head


def fp32_logits(hidden: Tensor, head: Tensor) -> Tensor:
    """hidden (N, D), head (V, D) -> logits (N, V) in fp32, never rounded to the dtype of either.

    Sampled and trained log-probs of one token would differ by that: 0.06 for a bf16 logit of 20.
    """
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
    """Nodes of shared prefixes that the sampler keeps: as many as its share of the memory holds."""
    return memory_of(like.device) // POOL_SHARE // node_bytes(config, like)


def slots_for(config: ModelConfig, like: Tensor) -> int:
    """Sequences that decode together: MOST_SLOTS, or fewer where their share of the memory does not
    hold SLOT_TOKENS own tokens of each."""
    slot_bytes = SLOT_TOKENS * node_bytes(config, like)
    fitting = memory_of(like.device) // SLOTS_SHARE // slot_bytes
    return max(1, min(MOST_SLOTS, fitting))


def activation_bytes(model: Transformer) -> int:
    """What a token keeps, about, from the forward to the backward pass.

    In each layer some eight states, four times its queries, keys and values, five times the MLP's;
    with checkpointing one state a layer, and all that of the one layer that is computed again.
    """
    c = model.config
    heads = (c.heads + 2 * c.kv_heads) * c.head_dim
    layer = 8 * c.hidden_size + 4 * heads + 5 * c.intermediate_size
    kept = c.layers * c.hidden_size + layer if model.checkpointing else c.layers * layer
    return kept * model.head.element_size()


def fast_dtype(config: ModelConfig, device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it faster and the LM is WIDE; else float32."""
    if device.type == "cuda":
        faster = torch.cuda.is_bf16_supported()
    else:
        # private names, of which a PyTorch may lack some
        supports = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        faster = any(getattr(torch.cpu, name, lambda: False)() for name in supports)
    return torch.bfloat16 if faster and config.hidden_size >= WIDE else torch.float32


# ------------------------------------------------------------------------------------- the KV cache
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


class KVCache:
    """Keys and values of prefixes, and of `slots` sequences that decode.

    `pool` (2, layers, nodes, K, d) holds prefixes as nodes of a forest. A sequence attends to the
    long ranges of its prefix where they lie, however many share them. What is short of it, and what
    it samples, is its own: `kv` (2, layers, slots, K, size, d), of which `lengths` (slots,) tokens
    are there. `positions` (slots,) is the place of its next token.
    """

    # nodes in a row from which a prefix is attended to in place
    LONG = 64
    # the room for own tokens grows in steps of so many
    STEP = 64

    def __init__(self, config: ModelConfig, slots: int, device=None, dtype=None):
        K = config.kv_heads
        d = config.head_dim
        self.pool = torch.zeros(2, config.layers, 0, K, d, device=device, dtype=dtype)
        self.kv = torch.zeros(2, config.layers, slots, K, 0, d, device=device, dtype=dtype)
        self.lengths = torch.zeros(slots, device=device, dtype=torch.long)
        self.positions = torch.zeros(slots, device=device, dtype=torch.long)
        # of each slot the ranges of the pool that it sees in place
        self.ranges: list[list[tuple[int, int]]] = [[] for _ in range(slots)]
        # a buffer that CUDA graphs may have recorded is gone
        self.replaced = False

    def reserve(self, nodes: int) -> None:
        """Make room for `nodes` nodes in the pool, and half as many again."""
        more = nodes - self.pool.shape[2]
        if more > 0:
            more = max(more, nodes // 2)
            self.pool = F.pad(self.pool, (0, 0, 0, 0, 0, more))  # (2, layers, nodes + more, K, d)
            self.replaced = True

    def place(self, slots: list[int], paths: list[list[int]], kept: int, room: int) -> int:
        """Give sequences, the nodes of whose tokens are in the pool, their slots.

        Nodes from `kept` on will not stay where they are; each slot gets room for `room` tokens
        more. Returns how many own tokens one of the sequences has at the most.
        """
        # of each sequence the nodes that are copied
        own = []
        for slot, path in zip(slots, paths):
            # how many of its nodes, from the root on, stay where they are
            stay = bisect_left(path, True, key=lambda node: node >= kept)
            in_place = []
            copied: list[int] = []
            for start, end in contiguous_ranges(path[:stay]):
                if end - start >= self.LONG:
                    in_place.append((start, end))
                else:
                    copied += range(start, end)
            self.ranges[slot] = in_place
            own.append(copied + path[stay:])
        longest = max(len(nodes) for nodes in own)

        missing = longest + room - self.kv.shape[4]
        if missing > 0:
            more = round_up(missing, self.STEP)
            self.kv = F.pad(self.kv, (0, 0, 0, more))  # (2, layers, slots, K, size + more, d)
            self.replaced = True
        self.lengths[slots] = self._tensor([len(nodes) for nodes in own])
        self.positions[slots] = self._tensor([len(path) for path in paths])
        self._copy(slots, own)
        return longest

    def _copy(self, slots: list[int], own: list[list[int]]) -> None:
        """The keys and values of these nodes of the pool, to the beginnings of these slots."""
        copies = []
        for slot, nodes in zip(slots, own):
            copies += [(slot, i, node) for i, node in enumerate(nodes)]
        if copies:
            slot_of, i, node = self._tensor(copies).unbind(1)  # (copies,) each
            values = self.pool[:, :, node]  # (2, layers, copies, K, d)
            self.kv[:, :, slot_of, :, i] = values.permute(2, 0, 1, 3, 4)

    def _tensor(self, values: list) -> Tensor:
        return torch.tensor(values, device=self.lengths.device)

    def shared(self, n: int) -> list[tuple[slice, list[int]]]:
        """What the first n slots see in place: ranges of the pool, each with the slots that see it.

        A range is cut where fewer go on; two that overlap begin at the same node.
        """
        # where ranges begin -> where each of them ends, and its slot
        beginning_at: dict[int, list[tuple[int, int]]] = {}
        for slot, ranges in enumerate(self.ranges[:n]):
            for start, end in ranges:
                beginning_at.setdefault(start, []).append((end, slot))

        parts = []
        for start, seen in beginning_at.items():
            begin = start
            for end in sorted({last for last, _ in seen}):
                slots = [slot for last, slot in seen if last >= end]
                parts.append((slice(begin, end), slots))
                begin = end
        return parts

    def decode(
        self,
        n: int,
        longest: int,
        shared: list[tuple[slice, Places | None]],
        sees: Tensor | None = None,
    ) -> Attend:
        """Append one token to each of the first n slots, at most `longest` of its own afterwards.

        `shared` is what `shared(n)` gives, the slots as indices. In shapes that recur (CUDA graphs)
        these are None: every range is scored for all n, and sees (ranges, slots) says who sees it.
        Returns attend(layer, q (1, H, n, d), k (1, K, n, d), v) -> (1, H, n, d).
        """
        row = torch.arange(n, device=self.lengths.device)  # (n,)
        end = self.lengths[:n]  # (n,)
        unseen = torch.arange(longest, device=end.device) > end[:, None]  # (n, longest)
        mask = torch.zeros(unseen.shape, device=end.device).masked_fill_(unseen, -math.inf)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            # append the new token to each row's own
            self.kv[0, layer, row, :, end] = k[0].transpose(0, 1)  # (n, K, d)
            self.kv[1, layer, row, :, end] = v[0].transpose(0, 1)

            # each row's own keys
            keys, values = self.kv[:, layer, :n, :, :longest]  # (n, K, longest, d)
            out, lse = flash(q.transpose(0, 2), keys, values, mask=mask[:, None, None])
            if not shared:
                return out.transpose(0, 2)  # (1, H, n, d)
            out = out[:, :, 0].transpose(0, 1).float()  # (H, n, d)
            lse = lse[:, :, 0].transpose(0, 1).contiguous()  # (H, n)

            # what they share, where it lies
            for i, (nodes, slots) in enumerate(shared):
                rows = slice(None) if slots is None else slots
                keys, values = self.pool[:, layer, nodes].transpose(1, 2)[:, None]  # (1, K, L, d)
                part_out, part_lse = flash(q[:, :, rows], keys, values)
                if slots is None:
                    assert sees is not None, "ranges without slots come with who sees them"
                    part_lse = part_lse.masked_fill(~sees[i, :n], -math.inf)
                merge(out, lse, rows, part_out[0], part_lse[0])
            return out.to(q.dtype)[None]  # (1, H, n, d)

        return attend

    def move(self, source: int, target: int) -> None:
        """All that is cached of the sequence in slot `source` is that of slot `target` as well."""
        self.kv[:, :, target] = self.kv[:, :, source]
        self.ranges[target] = self.ranges[source]
        self.lengths[target] = self.lengths[source]
        self.positions[target] = self.positions[source]

    def free(self, slot: int) -> None:
        self.ranges[slot] = []
        self.lengths[slot] = 0
        self.positions[slot] = 0


# -------------------------------------------------------------------------------------- checkpoints
def disk_name(name: str) -> str:
    """Our name of a parameter -> the one that Hugging Face gives it."""
    return name if name.startswith("lm_head.") else f"model.{name}"


def _is_file_name(value: object) -> bool:
    """Whether it is a bare name: an index may not point out of its folder."""
    return isinstance(value, str) and Path(value).name == value


def tensor_files(folder: Path) -> list[str]:
    """model.safetensors, or the shards that model.safetensors.index.json lists."""
    whole = "model.safetensors"
    index = folder / "model.safetensors.index.json"
    if (folder / whole).is_file() or not index.is_file():
        return [whole]
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(map(_is_file_name, shards.values())):
        raise CheckpointError(
            f"{index}: weight_map: expected an object of tensor name -> file name"
        )
    return sorted(set(shards.values()))


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint folder, by its name on disk."""
    tensors: dict[str, Tensor] = {}
    for name in tensor_files(folder):
        try:
            tensors |= safetensors.torch.load_file(folder / name)
        except (OSError, safetensors.SafetensorError) as e:
            raise CheckpointError(f"{folder / name}: cannot be read ({e})") from None
    return tensors


def load_pretrained(
    path: str | Path, device: str = "cpu", dtype: torch.dtype | None = torch.float32
) -> tuple[Transformer, Tokenizer]:
    """A checkpoint folder in Hugging Face layout, or a file FILE.gguf -> (Transformer, Tokenizer).

    Without a dtype it is in that of `fast_dtype`. Raises CheckpointError where a file is missing or
    corrupt, or a tensor is missing, unknown or of a wrong shape.
    """
    folder = Path(path)
    files, tensors = _read(folder, dtype)
    tokenizer = Tokenizer(folder, files)
    raw = read_json(folder / "config.json", files.get("config.json"))
    config = ModelConfig.from_hf(raw, str(folder / "config.json"))
    if config.vocab_size < tokenizer.size:
        raise CheckpointError(
            f"{folder}: vocab_size {config.vocab_size} is smaller than the tokenizer's "
            f"{tokenizer.size}"
        )

    tensors = _without_copies(folder, config, tensors)
    # looked at before so many layers are built
    last = config.layers - 1
    if f"model.layers.{last}.input_layernorm.weight" not in tensors:
        raise CheckpointError(f"{folder}: there is no layer {last} in its files")
    with torch.device("meta"):
        model = Transformer(config)
    _check_tensors(folder, model, tensors)

    dtype = dtype or fast_dtype(config, torch.device(device))
    state = {name: tensors[disk_name(name)].to(device, dtype) for name in model.state_dict()}
    model.load_state_dict(state, assign=True)
    return model, tokenizer


def _read(path: Path, dtype: torch.dtype | None) -> tuple[dict[str, bytes], dict[str, Tensor]]:
    """What the files of a checkpoint hold that are not tensors, by their names, and its tensors."""
    if path.is_dir():
        return read_files(path), read_tensors(path)
    if path.suffix == ".gguf":
        from lm.gguf import read_gguf  # here, for its library is an extra

        return read_gguf(path, dtype or torch.float32)
    raise CheckpointError(f"{path}: no such checkpoint folder")


def _without_copies(
    folder: Path, config: ModelConfig, tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors but for those that some exporters write although they follow from others.

    These are tables of RoPE, and a tied head, which must equal the embedding.
    """
    kept = {n: t for n, t in tensors.items() if not n.endswith("rotary_emb.inv_freq")}
    if config.tied and "lm_head.weight" in kept:
        head = kept.pop("lm_head.weight")
        embedding = kept.get("model.embed_tokens.weight", torch.empty(0))
        if not torch.equal(head, embedding):
            raise CheckpointError(
                f"{folder}: lm_head.weight differs from model.embed_tokens.weight, yet "
                "tie_word_embeddings is true"
            )
    return kept


def _check_tensors(folder: Path, model: Transformer, tensors: dict[str, Tensor]) -> None:
    """Raise CheckpointError unless these are the model's tensors: all, no others, of its shapes."""
    wanted = {disk_name(name): tensor for name, tensor in model.state_dict().items()}
    unmatched = sorted(wanted.keys() ^ tensors.keys())
    if unmatched:
        problem = "missing" if unmatched[0] in wanted else "not part of this model"
        raise CheckpointError(f"{folder}: tensor {unmatched[0]} is {problem}")

    floats = (torch.float32, torch.bfloat16, torch.float16)
    for name, like in wanted.items():
        found = tensors[name]
        if found.shape != like.shape or found.dtype not in floats:
            raise CheckpointError(
                f"{folder}: tensor {name}: expected floats of shape {tuple(like.shape)}, found "
                f"{found.dtype} of {tuple(found.shape)}"
            )


def save_new(model: Transformer, tokenizer: Tokenizer, path: str | Path) -> None:
    """Write a checkpoint folder that is not there yet, whole or not at all.

    Raises CheckpointError where it is there already or cannot be written (a full disk).
    """
    folder = Path(path)
    if folder.exists():
        raise CheckpointError(f"{folder}: is there already")
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        save_pretrained(model, tokenizer, unfinished)
        unfinished.replace(folder)
    except (OSError, safetensors.SafetensorError) as e:
        raise CheckpointError(f"{folder}: cannot be written ({e})") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def save_pretrained(model: Transformer, tokenizer: Tokenizer, path: str | Path) -> None:
    """Write a checkpoint folder in Hugging Face layout.

    `load_pretrained`, and other readers of that layout, load it with equal logits.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in tokenizer.files.items():
        (folder / name).write_bytes(data)

    raw = model.config.raw | {"dtype": str(model.head.dtype).removeprefix("torch.")}
    # the older name of `dtype`
    raw.pop("torch_dtype", None)
    (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n")

    tensors = {disk_name(n): t.contiguous().cpu() for n, t in model.state_dict().items()}
    # written beside and then put in place: never half a file
    unfinished = folder / "model.safetensors.new"
    safetensors.torch.save_file(tensors, unfinished, metadata={"format": "pt"})
    unfinished.replace(folder / "model.safetensors")
