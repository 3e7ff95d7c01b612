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

import functools
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tokenizer import CheckpointError, Tokenizer, read_files, read_json

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


class TreeAttention:
    """`attend` for a forest of prefixes: T nodes as one sequence (1, T), in which each sees its ancestors and itself.

    `paths` are pairs (known, path), a path being nodes from a root on: path[:known] are there already, path[known:] are new, and
    those of all paths, one after the other, are the T inputs. Two rows that share their first two tokens:
    TreeAttention([(0, [0, 1, 2]), (2, [0, 1, 3])]), T = 4, node 3 sees 0, 1 and itself. Keys and values are in `pool` (2, layers,
    nodes, K, d); without one, node i is the i-th of the T. Queries go in blocks, each with the keys of its path (padded to the
    longest): the cost is that of T x longest path, not of T x T."""
    def __init__(self, paths: list[tuple[int, list[int]]], device=None, pool: Tensor | None = None):
        longest, size = max(len(path) for _, path in paths), max(len(path) - known for known, path in paths)
        size, blocks, new = min(size, max(64, longest // 8)), [], []            # so a long path is gathered 8 times at the most
        for i, (known, path) in enumerate(paths):
            blocks += [(i, depth, len(new) + depth - known, len(path) - depth)  # a block: its path, the depth of its first query,
                       for depth in range(known, len(path), size)]              # that one's place in the T, how many follow
            new += path[known:]
        which, depth, first, left = torch.tensor(blocks, device=device).unbind(1)
        offset = torch.arange(size, device=device)
        self.pool, self.new = pool, torch.tensor(new, device=device)                    # (T,) pool node of each input
        keys = nn.utils.rnn.pad_sequence([torch.tensor(path) for _, path in paths], batch_first=True).to(device)
        self.keys = keys[which]                                                         # (blocks, longest) nodes
        self.seen = (torch.arange(longest, device=device) <= (depth[:, None] + offset)[..., None])[:, None]
        inside = offset < left[:, None]
        self.queries = (first[:, None] + offset) * inside                               # (blocks, size) of the T
        self.where = inside.flatten().nonzero()[:, 0]                                   # (T,) each node's place in the blocks

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))                             # (T, heads, d)
        if self.pool is not None:
            self.pool[0, layer, self.new], self.pool[1, layer, self.new] = k, v
            k, v = self.pool[:, layer]
        q, k, v = (x.index_select(0, at.flatten()).unflatten(0, at.shape).transpose(1, 2)   # (blocks, heads, …, d)
                   for x, at in ((q, self.queries), (k, self.keys), (v, self.keys)))
        y = attention(layer, q, k, v, self.seen).transpose(1, 2).flatten(0, 1)
        return y.index_select(0, self.where).transpose(0, 1)[None]


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that training moves: all, or with LoRA only its own."""
    return [p for p in model.parameters() if p.requires_grad]


class KVCache:
    """Keys and values of prefixes and of `slots` sequences. `pool` (2, layers, nodes, K, d) holds prefixes, as nodes of a forest. The
    first `trunk` of them are attended to where they are: sees[s, i] says whether slot s does to node i, `shared` (slots,) to how many.
    The rest of a sequence is its own: `kv` (2, layers, slots, K, size, d), `lengths` (slots,)."""
    def __init__(self, config: ModelConfig, slots: int, trunk: int, device=None, dtype=None):
        new = lambda *shape, dtype=torch.long: torch.zeros(shape, device=device, dtype=dtype)
        self.kv = new(2, config.layers, slots, config.kv_heads, 0, config.head_dim, dtype=dtype)
        self.pool = new(2, config.layers, 0, config.kv_heads, config.head_dim, dtype=dtype)
        self.lengths, self.shared, self.sees = new(slots), new(slots), new(slots, trunk, dtype=torch.bool)

    def grow(self, size: int, nodes: int) -> bool:
        """Make room for `size` tokens a slot and `nodes` nodes in the pool, in steps of 64 tokens and of half as much again; say
        whether there was need to."""
        if (tokens := size - self.kv.shape[4]) > 0:
            self.kv = F.pad(self.kv, (0, 0, 0, -(-tokens // 64) * 64))
        if (more := nodes - self.pool.shape[2]) > 0:
            self.pool = F.pad(self.pool, (0, 0, 0, 0, 0, max(more, nodes // 2)))
        return max(tokens, more) > 0

    def place(self, slots: list[int], paths: list[tuple[int, list[int]]]):
        """Give sequences their slots. `paths` are pairs (in_trunk, path): path[:in_trunk] lie in the trunk and are seen there,
        the others are copied to be the slot's own."""
        self.sees[slots] = False
        for slot, (in_trunk, path) in zip(slots, paths):
            self.sees[slot, path[:in_trunk]] = True
        counts = torch.tensor([(in_trunk, len(path) - in_trunk) for in_trunk, path in paths], device=self.lengths.device)
        self.shared[slots], self.lengths[slots] = counts.unbind(1)
        own = [(slot, i, node) for slot, (in_trunk, path) in zip(slots, paths) for i, node in enumerate(path[in_trunk:])]
        slot, i, node = torch.tensor(own, device=self.lengths.device).unbind(1)
        self.kv[:, :, slot, :, i] = self.pool[:, :, node].permute(2, 0, 1, 3, 4)

    def decode(self, n: int, longest: int, nodes: int):
        """Append one token to each of the first n slots, at most `longest` of its own afterwards; attend over `nodes` of the trunk,
        as one product for all slots, and over each slot's own. attend(layer, q (n, H, 1, d), k, v (n, K, 1, d)) -> (n, H, 1, d)"""
        row, end = torch.arange(n, device=self.lengths.device), self.lengths[:n]
        seen = torch.cat((self.sees[:n, :nodes], torch.arange(longest, device=end.device) <= end[:, None]), 1)
        bias = torch.zeros(seen.shape, device=end.device).masked_fill_(~seen, -math.inf)[:, None, None]     # (n, 1, 1, all)
        once = lambda x, y: (x.transpose(0, 1).flatten(1, 2) @ y).unflatten(1, (n, -1)).transpose(0, 1)     # for all slots
        def attend(layer, q, k, v):
            own, pool = self.kv[:, layer, :n, :, :longest], self.pool[:, layer, :nodes]     # (2, n, K, longest, d), (2, nodes, K, d)
            self.kv[0, layer, row, :, end], self.kv[1, layer, row, :, end] = k[:, :, 0], v[:, :, 0]
            q = q.view(n, k.shape[1], -1, q.shape[-1])                                                      # (n, K, H/K, d)
            scores = torch.cat((once(q, pool[0].permute(1, 2, 0)), q @ own[0].transpose(2, 3)), -1)
            p = torch.add(bias, scores, alpha=q.shape[-1] ** -0.5).softmax(-1).to(q.dtype)
            return (once(p[..., :nodes], pool[1].transpose(0, 1)) + p[..., nodes:] @ own[1]).flatten(1, 2)[:, :, None]
        return attend

    def move(self, source: int, target: int):
        self.kv[:, :, target] = self.kv[:, :, source]
        for state in (self.lengths, self.shared, self.sees):
            state[target] = state[source]


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


def load_pretrained(path: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Transformer, Tokenizer]:
    """A checkpoint folder in Hugging Face layout, or a file FILE.gguf -> (Transformer, Tokenizer).

    Raises CheckpointError where a file is missing or corrupt, or a tensor is missing, unknown or of a wrong shape."""
    folder = Path(path)
    if folder.is_dir():
        files = read_files(folder)
        tensors = read_tensors(folder)
    elif folder.suffix == ".gguf":
        from lm.gguf import read_gguf                          # here, for its library is an extra
        files, tensors = read_gguf(folder, dtype)
    else:
        raise CheckpointError(f"{folder}: no such checkpoint folder")
    tokenizer = Tokenizer(folder, files)
    raw = read_json(folder / "config.json", files.get("config.json"))
    config = ModelConfig.from_hf(raw, str(folder / "config.json"))
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
