"""A file of format GGUF in, the contents of a Hugging Face checkpoint out.

Read are LMs of the architectures llama, qwen2 and qwen3 with a byte-level BPE tokenizer whose
pre-tokenizer is known, in any type that the library `gguf` dequantises. Everything else is refused
by name: other architectures and tokenizers, RoPE scalings other than that of Llama 3, experts,
sliding windows, files in several parts or of the other byte order.

    model, tokenizer = load_pretrained("LM.gguf")   # of model.py, which calls `read_gguf`
    convert("LM.gguf", "models/LM")                 # the same LM as a folder, in bf16

Source of the format: github.com/ggml-org/ggml, docs/gguf.md.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from lm.tokenizer import CheckpointError
from model import (
    ModelConfig,
    Transformer,
    disk_name,
    inverse_frequencies,
    load_pretrained,
    save_new,
)

try:
    import gguf
except ImportError:
    raise CheckpointError(
        "files of format GGUF are read with the library gguf, which is not "
        "installed here: .venv/bin/pip install gguf"
    ) from None

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}

# Our name of a module -> the file's. In layers, "layers.N." and "blk.N." come before.
NAMES = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


# ----------------------------------------------------------------------------------------- the file
class BoundedReader(gguf.GGUFReader):
    """The library's reader, which on its own counts as far as a damaged file tells it to.

    This one ends where the file ends, and after more values than any vocabulary has.
    """

    # Llama 3 takes a million: 2 a token, 2 a merge, 1 a type
    MOST_READS = 2_500_000

    def __init__(self, path: Path):
        self.reads = 0
        super().__init__(path)

    def _get(self, offset, dtype, count=1, *rest, **options):
        self.reads += 1
        if self.reads > self.MOST_READS:
            raise ValueError(f"it lists more than {self.MOST_READS} values")
        size = np.dtype(dtype).itemsize * int(count)
        if int(offset) + size > len(self.data):
            raise ValueError("it ends too early")
        return super()._get(offset, dtype, count, *rest, **options)


def open_gguf(path: Path) -> BoundedReader:
    """The file's metadata and table of tensors; their data stay on disk."""
    try:
        # sizes in a damaged file overflow
        with np.errstate(over="ignore"):
            reader = BoundedReader(path)
    # whatever the library stumbles over
    except Exception as e:
        raise CheckpointError(f"{path}: cannot be read as GGUF ({type(e).__name__}: {e})") from None
    if reader.byte_order != "I":
        raise CheckpointError(f"{path}: is of the other byte order, which is not supported")
    return reader


def _shortened(value: object) -> str:
    """Text for a message: a list of a file may be a whole vocabulary."""
    return str(value)[:60]


class Metadata:
    """The values of a file, checked as they are asked for: get("llama.block_count", int) -> 30."""

    REQUIRED = object()

    def __init__(self, path: Path, reader: gguf.GGUFReader):
        self.path = path
        self.fields = reader.fields

    def refuse(self, key: str, problem: str) -> NoReturn:
        """Raise CheckpointError naming the file and `key`."""
        raise CheckpointError(f"{self.path}: {key}: {problem}")

    def get(self, key: str, kind: type, default: Any = REQUIRED) -> Any:
        """The value of `key`, of type `kind`; where the file has none, `default` or an error."""
        if key not in self.fields:
            if default is self.REQUIRED:
                self.refuse(key, "missing")
            return default
        try:
            value = self.fields[key].contents()
        # text that is not UTF-8
        except ValueError as e:
            self.refuse(key, f"cannot be read ({e})")
        if type(value) is not kind:
            self.refuse(key, f"expected {kind.__name__}, found {_shortened(value)!r}")
        return value

    def all(self, key: str, kind: type) -> list:
        """The list `key`, whose items are of type `kind`."""
        values = self.get(key, list)
        for value in values:
            if type(value) is not kind:
                expected = f"a list of {kind.__name__}"
                self.refuse(key, f"expected {expected}, found {_shortened(value)!r}")
        return values

    def real(self, key: str, default: Any = REQUIRED) -> float:
        """A float as it was before it became fp32: 1e-05, not 9.999999747378752e-06."""
        return float(str(np.float32(self.get(key, float, default))))


# ------------------------------------------------------------------------------------ configuration
def config_of(meta: Metadata, tensors: dict[str, gguf.ReaderTensor]) -> dict:
    """config.json."""
    name = meta.get("general.architecture", str)
    if name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        meta.refuse("general.architecture", f"{name!r} is not supported (supported: {known})")
    heads = meta.get(f"{name}.attention.head_count", int)
    width = meta.get(f"{name}.embedding_length", int)
    if heads < 1 or width < 1:
        meta.refuse(f"{name}.attention.head_count", f"{heads} heads for a width of {width}")
    head_dim = meta.get(f"{name}.attention.key_length", int, default=width // heads)
    config = {
        "architectures": [ARCHITECTURES[name]],
        "model_type": name,
        "vocab_size": len(meta.all("tokenizer.ggml.tokens", str)),
        "hidden_size": width,
        "intermediate_size": meta.get(f"{name}.feed_forward_length", int),
        "num_hidden_layers": meta.get(f"{name}.block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": meta.get(f"{name}.attention.head_count_kv", int, default=heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": meta.get(f"{name}.context_length", int),
        "rms_norm_eps": meta.real(f"{name}.attention.layer_norm_rms_epsilon"),
        "rope_theta": meta.real(f"{name}.rope.freq_base", default=10000.0),
        "tie_word_embeddings": "output.weight" not in tensors,
        # Qwen2 always has biases of q, k and v, and does not say so
        "attention_bias": "blk.0.attn_q.bias" in tensors and name != "qwen2",
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
        "eos_token_id": end_ids(meta),
    }
    refuse_what_changes_the_computation(meta, name, head_dim)
    if "rope_freqs.weight" in tensors:
        config["rope_scaling"] = llama3_scaling(meta, config, tensors["rope_freqs.weight"])
    return config


def refuse_what_changes_the_computation(meta: Metadata, name: str, head_dim: int) -> None:
    """Refuse a file in which one of these keys has another value than the neutral one."""
    # key, type, the values that change nothing, of which a file without the key has the first
    neutral_values: tuple[tuple[str, type, tuple], ...] = (
        ("split.count", int, (0, 1)),
        (f"{name}.expert_count", int, (0,)),
        (f"{name}.attention.sliding_window", int, (0,)),
        (f"{name}.attention.causal", bool, (True,)),
        (f"{name}.attention.value_length", int, (head_dim,)),
        (f"{name}.rope.dimension_count", int, (head_dim,)),
        (f"{name}.rope.scaling.type", str, ("none",)),
        (f"{name}.rope.scale_linear", float, (1.0,)),
    )
    for key, kind, neutral in neutral_values:
        value = meta.get(key, kind, default=neutral[0])
        if value not in neutral:
            meta.refuse(key, f"{value!r} is not supported")


# the context that Llama 3 was trained with before its RoPE was scaled
LLAMA3_CONTEXT = 8192


def llama3_scaling(meta: Metadata, config: dict, tensor: gguf.ReaderTensor) -> dict | None:
    """The RoPE scaling whose divisors of angular steps `tensor` (d/2,) holds: none, or Llama 3's.

    A file has the divisors in place of the four numbers that they come of. All but the largest
    divisor, `factor`, are the same in every Llama 3.
    """
    found = dequantised(meta.path, tensor, (config["head_dim"] // 2,), torch.float32)
    if (found == 1).all():
        return None
    scaling = {
        "rope_type": "llama3",
        "factor": found.max().item(),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": LLAMA3_CONTEXT,
    }
    plain = ModelConfig.from_hf(config, str(meta.path))
    scaled = ModelConfig.from_hf(config | {"rope_scaling": scaling}, str(meta.path))
    cpu = torch.device("cpu")
    divisors = inverse_frequencies(plain, cpu) / inverse_frequencies(scaled, cpu)  # (d/2,)
    if not torch.allclose(found, divisors, rtol=1e-4):
        problem = "holds another RoPE scaling than that of Llama 3, which is not supported"
        meta.refuse("tensor rope_freqs.weight", problem)
    return scaling


# ---------------------------------------------------------------------------------------- tokenizer

# a token's type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

# How text is cut before pairs are merged: the published pattern of Llama 3 and of Qwen, which take
# digits in different ways.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(use_regex: bool) -> dict:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


def split_at(digits: str) -> list[dict]:
    pattern = {"Regex": SPLIT.replace("DIGITS", digits)}
    cut = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    return [cut, byte_level(use_regex=False)]


# name: how text is cut, whether it is first brought to Unicode's form C, whether a piece that is a
# token stays whole
PRE_TOKENIZERS = {
    "smollm": ([{"type": "Digits", "individual_digits": True}, byte_level(True)], False, False),
    "llama-bpe": (split_at(r"\p{N}{1,3}"), False, True),
    "qwen2": (split_at(r"\p{N}"), True, False),
}


def end_ids(meta: Metadata) -> list[int]:
    """The ids that end a completion: of the text, of a turn, of a message."""
    keys = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")]
    # a file must have the first
    meta.get(keys[0], int)
    ids = {meta.get(key, int, None) for key in keys}
    return sorted(ids - {None})


def tokenizer_of(meta: Metadata) -> dict:
    """tokenizer.json."""
    kind = meta.get("tokenizer.ggml.model", str)
    if kind != "gpt2":
        problem = f"{kind!r} is not supported (supported: gpt2, which is byte-level BPE)"
        meta.refuse("tokenizer.ggml.model", problem)
    pre = meta.get("tokenizer.ggml.pre", str)
    if pre not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        meta.refuse("tokenizer.ggml.pre", f"{pre!r} is not supported (supported: {known})")
    pieces, form_c, whole = PRE_TOKENIZERS[pre]
    vocabulary, added = tokens_of(meta)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if form_c else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": pieces},
        "post_processor": None,
        "decoder": byte_level(use_regex=True),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": whole,
            "vocab": vocabulary,
            "merges": merges_of(meta, vocabulary),
        },
    }


def tokens_of(meta: Metadata) -> tuple[dict[str, int], list[dict]]:
    """The ids of all tokens, and the added tokens among them, as tokenizer.json has them."""
    tokens = meta.all("tokenizer.ggml.tokens", str)
    types = meta.all("tokenizer.ggml.token_type", int)
    if len(types) != len(tokens):
        problem = f"expected one for each of {len(tokens)} tokens, found {len(types)}"
        meta.refuse("tokenizer.ggml.token_type", problem)
    vocabulary: dict[str, int] = {}
    added = []
    for i, (token, of_type) in enumerate(zip(tokens, types)):
        if token in vocabulary:
            meta.refuse("tokenizer.ggml.tokens", f"{token!r} is there twice")
        # an unused one only fills the embedding up
        if of_type != UNUSED:
            vocabulary[token] = i
        if of_type in (CONTROL, USER_DEFINED):
            added.append(added_token(i, token, special=of_type == CONTROL))
    return vocabulary, added


def added_token(i: int, content: str, special: bool) -> dict:
    return {
        "id": i,
        "content": content,
        "special": special,
        "normalized": False,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
    }


def merges_of(meta: Metadata, vocabulary: dict[str, int]) -> list[list[str]]:
    """The pairs of tokens that are merged, in order."""
    merges = []
    for merge in meta.all("tokenizer.ggml.merges", str):
        pair = merge.split(" ")
        if len(pair) != 2 or not {*pair, "".join(pair)} <= vocabulary.keys():
            meta.refuse("tokenizer.ggml.merges", f"{merge!r} are not two tokens that make a third")
        merges.append(pair)
    return merges


def tokenizer_config_of(meta: Metadata, context: int) -> dict:
    """tokenizer_config.json: the chat template, and the tokens that it may name."""
    tokens = meta.all("tokenizer.ggml.tokens", str)
    special = {}
    # the names of the tokens there and in a GGUF file
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    for name, name_in_file in names.items():
        key = f"tokenizer.ggml.{name_in_file}_token_id"
        i = meta.get(key, int, None)
        if i is None:
            continue
        if not 0 <= i < len(tokens):
            meta.refuse(key, f"expected an id below {len(tokens)}, found {i}")
        special[f"{name}_token"] = tokens[i]
    return special | {
        "chat_template": meta.get("tokenizer.chat_template", str),
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        # tells other readers that all is in tokenizer.json
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


# ------------------------------------------------------------------------------------------ tensors
def gguf_name(name: str) -> str:
    """layers.3.self_attn.q_proj.weight -> blk.3.attn_q.weight"""
    module, _, parameter = name.rpartition(".")
    if not module.startswith("layers."):
        return f"{NAMES[module]}.{parameter}"
    _, layer, module = module.split(".", 2)
    return f"blk.{layer}.{NAMES[module]}.{parameter}"


def dequantised(
    path: Path, tensor: gguf.ReaderTensor, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """A tensor of the file, of shape `shape`, as floats.

    Raises CheckpointError where it has another shape or cannot be dequantised.
    """
    where = f"{path}: tensor {tensor.name}"
    # a file has the columns first
    found = tuple(reversed(tensor.shape.tolist()))
    if found != shape:
        raise CheckpointError(f"{where}: expected shape {shape}, found {found}")
    try:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
    except (NotImplementedError, ValueError) as e:
        raise CheckpointError(f"{where}: cannot be dequantised ({e})") from None
    return torch.from_numpy(np.array(values, np.float32).reshape(shape)).to(dtype)


def unpermuted(rows: Tensor, heads: int) -> Tensor:
    """Undo what `llama` files do to the rows of q and k, weights (H d, D) or biases (H d).

    RoPE turns pairs: there of neighbours (x_2i, x_2i+1), here (x_i, x_i+d/2).
    """
    pairs = rows.unflatten(0, (heads, -1, 2))  # (H, d/2, 2, …)
    return pairs.transpose(1, 2).flatten(0, 2)  # (H d, …)


def tensors_of(
    path: Path, raw: dict, tensors: dict[str, gguf.ReaderTensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Every tensor of the LM that `raw` (config.json) describes, under its Hugging Face name."""
    config = ModelConfig.from_hf(raw, str(path))
    # looked at before so many layers are built
    last = config.layers - 1
    if f"blk.{last}.attn_norm.weight" not in tensors:
        raise CheckpointError(f"{path}: there is no layer {last} in it")
    with torch.device("meta"):
        state = Transformer(config).state_dict()
    wanted = {gguf_name(ours): ours for ours in state}
    # RoPE's divisors are read with the configuration
    unmatched = sorted(wanted.keys() ^ (tensors.keys() - {"rope_freqs.weight"}))
    if unmatched:
        problem = "missing" if unmatched[0] in wanted else "not part of this model"
        raise CheckpointError(f"{path}: tensor {unmatched[0]} is {problem}")
    result = {}
    for name, ours in wanted.items():
        values = dequantised(path, tensors[name], tuple(state[ours].shape), dtype)
        if raw["model_type"] == "llama" and ".attn_q." in name:
            values = unpermuted(values, config.heads)
        if raw["model_type"] == "llama" and ".attn_k." in name:
            values = unpermuted(values, config.kv_heads)
        result[disk_name(ours)] = values
    return result


# --------------------------------------------------------------------------------------- in and out
def read_gguf(path: Path, dtype: torch.dtype) -> tuple[dict[str, bytes], dict[str, Tensor]]:
    """A GGUF file -> what the JSON files of a Hugging Face checkpoint hold, and its tensors.

    Raises CheckpointError naming the file, and the key or tensor that is missing, damaged or not
    supported.
    """
    reader = open_gguf(path)
    meta = Metadata(path, reader)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = config_of(meta, tensors)
    files = {
        "config.json": config,
        "generation_config.json": {"eos_token_id": config["eos_token_id"]},
        "tokenizer.json": tokenizer_of(meta),
        "tokenizer_config.json": tokenizer_config_of(meta, config["max_position_embeddings"]),
    }
    contents = {}
    for name, value in files.items():
        contents[name] = json.dumps(value, ensure_ascii=False, indent=1).encode() + b"\n"
    return contents, tensors_of(path, config, tensors, dtype)


def convert(path: str | Path, folder: str | Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write a GGUF file as a checkpoint folder in Hugging Face layout, whole or not at all.

    Raises CheckpointError where the file cannot be used, or the folder is there already or cannot
    be written.
    """
    folder = Path(folder)
    if folder.exists():
        raise CheckpointError(f"{folder}: is there already")
    model, tokenizer = load_pretrained(path, dtype=dtype)
    save_new(model, tokenizer, folder)
