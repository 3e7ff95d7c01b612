"""Small files of format GGUF, written with the library's own writer and names, each with the checkpoint it was made of.

What `llama.cpp` does to a checkpoint is done here in the other direction than in lm/gguf.py: names from the library's table,
rows of q and k permuted, tokens listed by id with their types.
"""
import json
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np
import tokenizers
import torch
from conftest import make_model
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

import model as M

TEXT = ["hello world, the user and the assistant's 1234 cards; don't wait 10 days\n\n", "if  x == 10:\n    return 'café' 2025 times\n"]

# As SmolLM2's, it puts a system message in front where there is none.
CHATML = ("{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
          "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
LLAMA3 = ("{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}"
          "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}")

# The cuts of text as Hugging Face's own checkpoints have them.
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "llama-bpe": [pre_tokenizers.Split(Regex(WORDS.format(r"\p{N}{1,3}")), "isolated"),
                  pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)],
    "qwen2": [pre_tokenizers.Split(Regex(WORDS.format(r"\p{N}")), "isolated"),
              pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)],
}


@dataclass
class Kind:
    """A family of LMs: its architecture, pre-tokenizer, control tokens (bos, others, eos), template and shape."""
    architecture: str
    pre: str
    control: list[str]
    template: str
    shape: dict = field(default_factory=dict)
    user_defined: list[str] = field(default_factory=list)       # added tokens that are not special
    unused: int = 0                                             # rows of the embedding that no token has


SCALING = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
KINDS = {
    "smollm2": Kind("llama", "smollm", ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], CHATML, {"rope_theta": 100000.0}),
    "llama3": Kind("llama", "llama-bpe", ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>", "<|eot_id|>"],
                   LLAMA3, {"rope_theta": 500000.0, "tie_word_embeddings": False, "rope_scaling": SCALING}),
    "llama with biases": Kind("llama", "llama-bpe", ["<|begin_of_text|>", "<|end_header_id|>", "<|start_header_id|>", "<|eot_id|>"], LLAMA3,
                              {"attention_bias": True, "mlp_bias": True, "rope_theta": 10000.0}),
    "qwen2": Kind("qwen2", "qwen2", ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], CHATML, {"rope_theta": 1000000.0}, unused=5),
    "qwen3": Kind("qwen3", "qwen2", ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], CHATML,
                  {"rope_theta": 1000000.0, "head_dim": 128}, user_defined=["<think>", "</think>"]),
}
CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "head_dim": 16, "max_position_embeddings": 512, "tie_word_embeddings": True, "rms_norm_eps": 1e-5}


def make_tokenizer(kind: Kind) -> tokenizers.Tokenizer:
    """A byte-level tokenizer of that kind, trained on TEXT."""
    bpe = tokenizers.Tokenizer(models.BPE(ignore_merges=kind.pre == "llama-bpe"))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.Sequence(SPLITS[kind.pre]), decoders.ByteLevel()
    if kind.pre == "qwen2":
        bpe.normalizer = normalizers.NFC()
    first = kind.control if kind.pre == "smollm" else []       # SmolLM2 has its control tokens first, the others last
    bpe.train_from_iterator(TEXT * 9, trainers.BpeTrainer(
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), vocab_size=360, special_tokens=first, show_progress=False))
    bpe.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in kind.control])
    bpe.add_tokens([AddedToken(t, normalized=False, special=False) for t in kind.user_defined])
    return bpe


def make_checkpoint(kind: Kind, folder: Path) -> tuple[M.Transformer, M.Tokenizer]:
    """A random LM of that kind in Hugging Face layout."""
    bpe = make_tokenizer(kind)
    folder.mkdir()
    bpe.save(str(folder / "tokenizer.json"))
    config = {"chat_template": kind.template, "bos_token": kind.control[0], "eos_token": kind.control[-1],
              "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    model = make_model(std=0.1, architectures=[CLASSES[kind.architecture]], vocab_size=bpe.get_vocab_size() + kind.unused, **SHAPE | kind.shape)
    tokenizer = M.Tokenizer(folder)
    M.save_pretrained(model, tokenizer, folder)
    return model, tokenizer


def contents(kind: Kind, model: M.Transformer, tokenizer: M.Tokenizer) -> tuple[dict, dict[str, np.ndarray]]:
    """What a GGUF file of that checkpoint holds: values by key, tensors by name."""
    c, a, raw = model.config, kind.architecture, json.loads(tokenizer.files["tokenizer.json"])
    ids = tokenizer.tokenizer.get_vocab()
    tokens, types = [f"[PAD{i}]" for i in range(c.vocab_size)], [5] * c.vocab_size
    for token, i in ids.items():
        tokens[i] = token
        types[i] = 3 if token in kind.control else 4 if token in kind.user_defined else 1
    values = {
        "general.architecture": a,
        f"{a}.context_length": c.max_positions, f"{a}.embedding_length": c.hidden_size, f"{a}.block_count": c.layers,
        f"{a}.feed_forward_length": c.intermediate_size, f"{a}.attention.head_count": c.heads,
        f"{a}.attention.head_count_kv": c.kv_heads, f"{a}.attention.layer_norm_rms_epsilon": c.norm_eps,
        f"{a}.rope.freq_base": c.rope_theta, f"{a}.rope.dimension_count": c.head_dim,
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": kind.pre, "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types, "tokenizer.ggml.merges": [" ".join(pair) for pair in raw["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": ids[kind.control[0]], "tokenizer.ggml.eos_token_id": ids[kind.control[-1]],
        "tokenizer.chat_template": kind.template,
    }
    if c.head_dim != c.hidden_size // c.heads:
        values |= {f"{a}.attention.key_length": c.head_dim, f"{a}.attention.value_length": c.head_dim}
    names = gguf.get_tensor_name_map({"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2, "qwen3": gguf.MODEL_ARCH.QWEN3}[a], c.layers)
    tensors = {}
    for name, tensor in model.state_dict().items():
        module, _, parameter = M._disk_name(name).rpartition(".")
        heads = c.heads if "q_proj" in name else c.kv_heads
        if a == "llama" and ("q_proj" in name or "k_proj" in name):
            tensor = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)     # (x_i, x_i+d/2) become neighbours
        tensors[f"{names.get_name(module)}.{parameter}"] = tensor.float().numpy()
    if c.rope_llama3:
        tensors["rope_freqs.weight"] = divisors(c).numpy()
    return values, tensors


def divisors(c: M.ModelConfig) -> torch.Tensor:
    """(d/2,) what Llama 3 divides the angular steps by, as `llama.cpp` writes it down."""
    factor, low, high, original = c.rope_llama3
    result = []
    for i in range(0, c.head_dim, 2):
        turns = original * c.rope_theta ** (-i / c.head_dim) / (2 * np.pi)
        smooth = min(max((turns - low) / (high - low), 0), 1)
        result.append(1 / ((1 - smooth) / factor + smooth))
    return torch.tensor(result, dtype=torch.float32)


def write(path: Path, values: dict, tensors: dict[str, np.ndarray], quantised: gguf.GGMLQuantizationType | None = None, **options) -> Path:
    """Write a file; matrices are `quantised` where a type is given."""
    writer = gguf.GGUFWriter(path, values["general.architecture"], **options)
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
    for key, value in values.items():
        if key != "general.architecture":                      # the writer's own doing
            add[type(value)](key, value)
    for name, array in tensors.items():
        if quantised is None or array.ndim == 1:
            writer.add_tensor(name, np.ascontiguousarray(array))
        else:
            writer.add_tensor(name, gguf.quantize(array, quantised), raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def make(kind: str, folder: Path, **options) -> tuple[Path, Path]:
    """A checkpoint folder of that kind and a GGUF file of the same LM."""
    model, tokenizer = make_checkpoint(KINDS[kind], folder / "original")
    return folder / "original", write(folder / "model.gguf", *contents(KINDS[kind], model, tokenizer), **options)
