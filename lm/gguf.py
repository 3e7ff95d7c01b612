"""A file of format GGUF in, the contents of a Hugging Face checkpoint out.

Read are LMs of the architectures llama, qwen2 and qwen3 with a byte-level BPE tokenizer whose pre-tokenizer is known, in any
type that the library `gguf` dequantises. Everything else is refused by name: other architectures and tokenizers, RoPE scalings
other than that of Llama 3, experts, sliding windows, files in several parts or of the other byte order.

    model, tokenizer = load_pretrained("SmolLM2-135M-Instruct.Q4_1.gguf")           # of model.py; it calls `read_gguf`
    convert("SmolLM2-135M-Instruct.Q4_1.gguf", "models/SmolLM2-135M-Instruct")      # the same as a folder, in bf16

Source of the format: github.com/ggml-org/ggml, docs/gguf.md.
"""
from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from torch import Tensor

from model import ModelConfig, Transformer, inverse_frequencies, load_pretrained, save_pretrained
from tokenizer import CheckpointError

try:
    import gguf
except ImportError:
    raise CheckpointError("files of format GGUF are read with the library gguf, which is not installed here: "
                          ".venv/bin/pip install gguf") from None

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}

# Our name of a module (in a layer, without "layers.N.") -> its name in the file (in a layer, without "blk.N.").
NAMES = {
    "embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}


# ------------------------------------------------------------------------------------------------------- the file
class BoundedReader(gguf.GGUFReader):
    """The library's reader, which on its own counts as far as a damaged file tells it to. This one ends where the file ends,
    and after more values than any vocabulary has."""
    MOST_READS = 2_500_000          # Llama 3 takes a million: two for each token and merge, one for each type

    def __init__(self, path: Path):
        self.reads = 0
        super().__init__(path)

    def _get(self, offset, dtype, count=1, *rest, **options):
        self.reads += 1
        if self.reads > self.MOST_READS:
            raise ValueError(f"it lists more than {self.MOST_READS} values")
        if int(offset) + np.dtype(dtype).itemsize * int(count) > len(self.data):
            raise ValueError("it ends too early")
        return super()._get(offset, dtype, count, *rest, **options)


def open_gguf(path: Path) -> BoundedReader:
    """The file's metadata and table of tensors; their data stay on disk."""
    try:
        with np.errstate(over="ignore"):                       # of sizes in a damaged file
            reader = BoundedReader(path)
    except Exception as e:                                     # the library raises whatever it stumbles over
        raise CheckpointError(f"{path}: cannot be read as GGUF ({type(e).__name__}: {e})") from None
    if reader.byte_order != "I":
        raise CheckpointError(f"{path}: was written for machines of the other byte order, which is not supported")
    return reader


class Metadata:
    """The key-value pairs of a file, checked as they are asked for: get("llama.block_count", int) -> 30."""
    REQUIRED = object()

    def __init__(self, path: Path, reader: gguf.GGUFReader):
        self.path, self.fields = path, reader.fields

    def refuse(self, key: str, problem: str):
        raise CheckpointError(f"{self.path}: {key}: {problem}")

    def get(self, key: str, kind: type, default: Any = REQUIRED) -> Any:
        """The value of `key`, which is of type `kind`; `default` where the file has none, or an error without one."""
        if key not in self.fields:
            if default is self.REQUIRED:
                self.refuse(key, "missing")
            return default
        try:
            value = self.fields[key].contents()
        except ValueError as e:                                # text that is not UTF-8
            self.refuse(key, f"cannot be read ({e})")
        if type(value) is not kind:
            self.refuse(key, f"expected {kind.__name__}, found {str(value)[:60]!r}")
        return value

    def all(self, key: str, kind: type) -> list:
        """The list `key`, whose items are of type `kind`."""
        values = self.get(key, list)
        for value in values:
            if type(value) is not kind:
                self.refuse(key, f"expected a list of {kind.__name__}, found {str(value)[:60]!r} in it")
        return values

    def number(self, key: str, kind: type = int, default: Any = REQUIRED) -> Any:
        """A number, floats as they were before they became fp32: 1e-05, not 9.999999747378752e-06."""
        value = self.get(key, kind, default)
        return float(str(np.float32(value))) if kind is float else value


# ------------------------------------------------------------------------------------------------- configuration
def config_of(meta: Metadata, tensors: dict[str, gguf.ReaderTensor]) -> dict:
    """config.json."""
    name = meta.get("general.architecture", str)
    if name not in ARCHITECTURES:
        meta.refuse("general.architecture", f"{name!r} is not supported (supported: {', '.join(ARCHITECTURES)})")
    heads, width = meta.number(f"{name}.attention.head_count"), meta.number(f"{name}.embedding_length")
    if heads < 1 or width < 1:
        meta.refuse(f"{name}.attention.head_count", f"{heads} heads for a width of {width}")
    head_dim = meta.number(f"{name}.attention.key_length", default=width // heads)
    config = {
        "architectures": [ARCHITECTURES[name]],
        "model_type": name,
        "vocab_size": len(meta.all("tokenizer.ggml.tokens", str)),
        "hidden_size": width,
        "intermediate_size": meta.number(f"{name}.feed_forward_length"),
        "num_hidden_layers": meta.number(f"{name}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": meta.number(f"{name}.attention.head_count_kv", default=heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": meta.number(f"{name}.context_length"),
        "rms_norm_eps": meta.number(f"{name}.attention.layer_norm_rms_epsilon", float),
        "rope_theta": meta.number(f"{name}.rope.freq_base", float, default=10000.0),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors and name != "qwen2",           # Qwen2 has them without a word
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
        "eos_token_id": end_ids(meta),
    }
    refuse_what_changes_the_computation(meta, name, head_dim)
    if "rope_freqs.weight" in tensors:
        config["rope_scaling"] = llama3_scaling(meta, config, tensors["rope_freqs.weight"])
    return config


def refuse_what_changes_the_computation(meta: Metadata, name: str, head_dim: int) -> None:
    """Refuse a file in which one of these keys has a value other than the one under which it means nothing."""
    for key, kind, neutral in (
            ("split.count", int, (0, 1)),
            (f"{name}.expert_count", int, (0,)),
            (f"{name}.attention.sliding_window", int, (0,)),
            (f"{name}.attention.causal", bool, (True,)),
            (f"{name}.attention.value_length", int, (head_dim,)),
            (f"{name}.rope.dimension_count", int, (head_dim,)),
            (f"{name}.rope.scaling.type", str, ("none",)),
            (f"{name}.rope.scale_linear", float, (1.0,))):
        value = meta.get(key, kind, default=neutral[0])
        if value not in neutral:
            meta.refuse(key, f"{value!r} is not supported")


def llama3_scaling(meta: Metadata, config: dict, tensor: gguf.ReaderTensor) -> dict | None:
    """The RoPE scaling whose divisors of the angular steps are in `tensor` (d/2,): none, or that of Llama 3.

    A file has the divisors in place of the four numbers that they come of. Of these, every Llama 3 has the same three."""
    found = dequantised(meta.path, tensor, (config["head_dim"] // 2,), torch.float32)
    scaling = {"rope_type": "llama3", "factor": found.max().item(), "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192}
    if (found == 1).all():
        return None
    cpu = torch.device("cpu")
    plain = inverse_frequencies(ModelConfig.from_hf(config, str(meta.path)), cpu)
    scaled = inverse_frequencies(ModelConfig.from_hf(config | {"rope_scaling": scaling}, str(meta.path)), cpu)
    if not torch.allclose(found, plain / scaled, rtol=1e-4):
        meta.refuse("tensor rope_freqs.weight", "holds another RoPE scaling than that of Llama 3, which is not supported")
    return scaling


# ------------------------------------------------------------------------------------------------------ tokenizer
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)           # a token's type

# How text is cut before pairs are merged. These are the published patterns of the LMs, which differ in how they take digits.
SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def byte_level(use_regex: bool) -> dict:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def split_at(digits: str) -> list[dict]:
    pattern = {"Regex": SPLIT.replace("DIGITS", digits)}
    return [{"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}, byte_level(use_regex=False)]


# name: the pieces of text, whether it is first brought to Unicode's form C, whether a piece that is a token is left whole
PRE_TOKENIZERS = {
    "smollm": ([{"type": "Digits", "individual_digits": True}, byte_level(use_regex=True)], False, False),
    "llama-bpe": (split_at(r"\p{N}{1,3}"), False, True),
    "qwen2": (split_at(r"\p{N}"), True, False),
}


def end_ids(meta: Metadata) -> list[int]:
    """The ids that end a completion: of the text, of a turn, of a message."""
    keys = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")]
    ids = [meta.get(keys[0], int), *(meta.get(key, int, None) for key in keys[1:])]
    return sorted({i for i in ids if i is not None})


def tokenizer_of(meta: Metadata) -> dict:
    """tokenizer.json."""
    kind = meta.get("tokenizer.ggml.model", str)
    if kind != "gpt2":
        meta.refuse("tokenizer.ggml.model", f"{kind!r} is not supported (supported: gpt2, which is byte-level BPE)")
    pre = meta.get("tokenizer.ggml.pre", str)
    if pre not in PRE_TOKENIZERS:
        meta.refuse("tokenizer.ggml.pre", f"{pre!r} is not supported (supported: {', '.join(PRE_TOKENIZERS)})")
    pieces, form_c, whole = PRE_TOKENIZERS[pre]

    tokens, types = meta.all("tokenizer.ggml.tokens", str), meta.all("tokenizer.ggml.token_type", int)
    if len(types) != len(tokens):
        meta.refuse("tokenizer.ggml.token_type", f"expected one for each of {len(tokens)} tokens, found {len(types)}")
    vocabulary, added = {}, []
    for i, (token, of_type) in enumerate(zip(tokens, types)):
        if token in vocabulary:
            meta.refuse("tokenizer.ggml.tokens", f"{token!r} is there twice")
        if of_type != UNUSED:                                  # such only fill the embedding up
            vocabulary[token] = i
        if of_type in (CONTROL, USER_DEFINED):
            added.append({"id": i, "content": token, "special": of_type == CONTROL, "single_word": False, "lstrip": False,
                          "rstrip": False, "normalized": False})
    merges = [merge.split(" ") for merge in meta.all("tokenizer.ggml.merges", str)]
    for pair in merges:
        if len(pair) != 2 or not {*pair, "".join(pair)} <= vocabulary.keys():
            meta.refuse("tokenizer.ggml.merges", f"{' '.join(pair)!r} are not two tokens that make a third")
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if form_c else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": pieces},
        "post_processor": None,
        "decoder": byte_level(use_regex=True),
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "fuse_unk": False, "byte_fallback": False, "ignore_merges": whole, "vocab": vocabulary, "merges": merges},
    }


def tokenizer_config_of(meta: Metadata, context: int) -> dict:
    """tokenizer_config.json: the chat template, and the tokens that it may name."""
    tokens, special = meta.all("tokenizer.ggml.tokens", str), {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        i = meta.get(f"tokenizer.ggml.{key}_token_id", int, None)
        if i is not None and not 0 <= i < len(tokens):
            meta.refuse(f"tokenizer.ggml.{key}_token_id", f"expected an id below {len(tokens)}, found {i}")
        if i is not None:
            special[f"{name}_token"] = tokens[i]
    return special | {
        "chat_template": meta.get("tokenizer.chat_template", str),
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast",          # to others: all is in tokenizer.json
    }


# -------------------------------------------------------------------------------------------------------- tensors
def gguf_name(name: str) -> str:
    """layers.3.self_attn.q_proj.weight -> blk.3.attn_q.weight"""
    module, _, parameter = name.rpartition(".")
    if not module.startswith("layers."):
        return f"{NAMES[module]}.{parameter}"
    _, layer, module = module.split(".", 2)
    return f"blk.{layer}.{NAMES[module]}.{parameter}"


def dequantised(path: Path, tensor: gguf.ReaderTensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of the file as floats. Raises CheckpointError where it has another shape or cannot be dequantised."""
    found = tuple(reversed(tensor.shape.tolist()))             # a file lists the dimension that varies fastest first
    if found != shape:
        raise CheckpointError(f"{path}: tensor {tensor.name}: expected shape {shape}, found {found}")
    try:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
    except (NotImplementedError, ValueError) as e:
        raise CheckpointError(f"{path}: tensor {tensor.name}: cannot be dequantised ({e})") from None
    return torch.from_numpy(np.array(values, np.float32).reshape(shape)).to(dtype)


def unpermuted(rows: Tensor, heads: int) -> Tensor:
    """Undo what `llama` files do to the rows of q and k, weights (H d, D) or biases (H d): theirs turn pairs of neighbours
    (x_2i, x_2i+1), ours turn the pairs (x_i, x_i+d/2)."""
    pairs = rows.unflatten(0, (heads, -1, 2))                  # (H, d/2, 2, …)
    return pairs.transpose(1, 2).flatten(0, 2)


def tensors_of(path: Path, raw: dict, tensors: dict[str, gguf.ReaderTensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Every tensor of the LM that `raw` (config.json) describes, under its Hugging Face name."""
    config = ModelConfig.from_hf(raw, str(path))
    if f"blk.{config.layers - 1}.attn_norm.weight" not in tensors:         # before so many layers are built
        raise CheckpointError(f"{path}: there is no layer {config.layers - 1} in it, of {config.layers}")
    with torch.device("meta"):
        wanted = {gguf_name(name): (name, tuple(p.shape)) for name, p in Transformer(config).state_dict().items()}
    for name in sorted(wanted.keys() ^ tensors.keys() - {"rope_freqs.weight"}):
        raise CheckpointError(f"{path}: tensor {name} is {'missing' if name in wanted else 'not part of this model'}")
    result = {}
    for name, (ours, shape) in wanted.items():
        values = dequantised(path, tensors[name], shape, dtype)
        if raw["model_type"] == "llama" and ".attn_q." in name:
            values = unpermuted(values, config.heads)
        if raw["model_type"] == "llama" and ".attn_k." in name:
            values = unpermuted(values, config.kv_heads)
        result[ours if ours.startswith("lm_head.") else f"model.{ours}"] = values
    return result


# ---------------------------------------------------------------------------------------------------- in and out
def read_gguf(path: str | Path, dtype: torch.dtype = torch.float32) -> tuple[dict[str, bytes], dict[str, Tensor]]:
    """A file of format GGUF -> the contents of the JSON files of a Hugging Face checkpoint, and its tensors by name.

    Raises CheckpointError naming the file and the key or tensor that is missing, damaged or not supported."""
    path = Path(path)
    reader = open_gguf(path)
    meta, tensors = Metadata(path, reader), {tensor.name: tensor for tensor in reader.tensors}
    config = config_of(meta, tensors)
    files = {
        "config.json": config,
        "generation_config.json": {"eos_token_id": config["eos_token_id"]},
        "tokenizer.json": tokenizer_of(meta),
        "tokenizer_config.json": tokenizer_config_of(meta, config["max_position_embeddings"]),
    }
    contents = {name: json.dumps(value, ensure_ascii=False, indent=1).encode() + b"\n" for name, value in files.items()}
    return contents, tensors_of(path, config, tensors, dtype)


def convert(path: str | Path, folder: str | Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write a file of format GGUF as a checkpoint folder in Hugging Face layout, whole or not at all.

    Raises CheckpointError where the file cannot be used, the folder is there already, or it cannot be written."""
    folder = Path(folder)
    if folder.exists():
        raise CheckpointError(f"{folder}: is there already")
    model, tokenizer = load_pretrained(path, dtype=dtype)
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        save_pretrained(model, tokenizer, unfinished)
        unfinished.replace(folder)
    except (OSError, safetensors.SafetensorError) as e:        # a full disk, say
        raise CheckpointError(f"{folder}: cannot be written ({e})") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
