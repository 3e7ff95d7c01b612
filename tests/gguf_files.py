"""Small files of format GGUF, each with the checkpoint that it was made of.

They are written with the library's own writer and its table of names. What `llama.cpp` does to a
checkpoint is done here: rows of q and k permuted, tokens listed by id with their types.
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

TEXT = [
    "hello world, the user and the assistant's 1234 cards; don't wait 10 days\n\n",
    "if  x == 10:\n    return 'café' 2025 times\n",
]

# As SmolLM2's, it puts a system message in front where there is none.
CHATML = (
    "{% for m in messages %}"
    "{% if loop.first and m['role'] != 'system' %}"
    "<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)

# The cuts of text as Hugging Face's own checkpoints have them.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
SPLITS = {
    "smollm": [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ],
    "llama-bpe": [pre_tokenizers.Split(Regex(WORDS.format(r"\p{N}{1,3}")), "isolated"), BYTES],
    "qwen2": [pre_tokenizers.Split(Regex(WORDS.format(r"\p{N}")), "isolated"), BYTES],
}


@dataclass
class Kind:
    """A family of LMs; the first and the last control token are bos and eos."""

    architecture: str
    pre: str
    control: list[str]
    template: str
    shape: dict = field(default_factory=dict)
    # added tokens that are not special
    user_defined: list[str] = field(default_factory=list)
    # rows of the embedding without a token
    unused: int = 0


SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
HEADERS = [
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|end_of_text|>",
    "<|eot_id|>",
]
TURNS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
KINDS = {
    "smollm2": Kind("llama", "smollm", TURNS, CHATML, {"rope_theta": 100000.0}),
    "llama3": Kind(
        "llama",
        "llama-bpe",
        HEADERS,
        LLAMA3,
        {"rope_theta": 500000.0, "tie_word_embeddings": False, "rope_scaling": SCALING},
    ),
    "llama with biases": Kind(
        "llama", "llama-bpe", HEADERS, LLAMA3, {"attention_bias": True, "mlp_bias": True}
    ),
    "qwen2": Kind("qwen2", "qwen2", TURNS, CHATML, {"rope_theta": 1000000.0}, unused=5),
    "qwen3": Kind(
        "qwen3",
        "qwen2",
        TURNS,
        CHATML,
        {"rope_theta": 1000000.0, "head_dim": 128},
        user_defined=["<think>", "</think>"],
    ),
}
CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "head_dim": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-5,
}


def make_tokenizer(kind: Kind) -> tokenizers.Tokenizer:
    """A byte-level tokenizer of that kind, trained on TEXT."""
    bpe = tokenizers.Tokenizer(models.BPE(ignore_merges=kind.pre == "llama-bpe"))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(SPLITS[kind.pre])
    bpe.decoder = decoders.ByteLevel()
    if kind.pre == "qwen2":
        bpe.normalizer = normalizers.NFC()
    # control tokens come first here, in the other kinds last
    first = kind.control if kind.pre == "smollm" else []
    trainer = trainers.BpeTrainer(
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        vocab_size=360,
        special_tokens=first,
        show_progress=False,
    )
    bpe.train_from_iterator(TEXT * 9, trainer)
    bpe.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in kind.control])
    bpe.add_tokens([AddedToken(t, normalized=False, special=False) for t in kind.user_defined])
    return bpe


def make_checkpoint(kind: Kind, folder: Path) -> tuple[M.Transformer, M.Tokenizer]:
    """A random LM of that kind in Hugging Face layout."""
    bpe = make_tokenizer(kind)
    folder.mkdir()
    bpe.save(str(folder / "tokenizer.json"))
    config = {
        "chat_template": kind.template,
        "bos_token": kind.control[0],
        "eos_token": kind.control[-1],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    shape = SHAPE | kind.shape
    shape["architectures"] = [CLASSES[kind.architecture]]
    shape["vocab_size"] = bpe.get_vocab_size() + kind.unused
    model = make_model(std=0.1, **shape)
    tokenizer = M.Tokenizer(folder)
    M.save_pretrained(model, tokenizer, folder)
    return model, tokenizer


def contents(kind: Kind, model: M.Transformer, tokenizer: M.Tokenizer) -> tuple[dict, dict]:
    """What a GGUF file of that checkpoint holds: values by key, arrays by name."""
    c = model.config
    values = {"general.architecture": kind.architecture, "tokenizer.chat_template": kind.template}
    shape = {
        "context_length": c.max_positions,
        "embedding_length": c.hidden_size,
        "block_count": c.layers,
        "feed_forward_length": c.intermediate_size,
        "attention.head_count": c.heads,
        "attention.head_count_kv": c.kv_heads,
        "attention.layer_norm_rms_epsilon": c.norm_eps,
        "rope.freq_base": c.rope_theta,
        "rope.dimension_count": c.head_dim,
    }
    for key, value in shape.items():
        values[f"{kind.architecture}.{key}"] = value
    if c.head_dim != c.hidden_size // c.heads:
        values[f"{kind.architecture}.attention.key_length"] = c.head_dim
        values[f"{kind.architecture}.attention.value_length"] = c.head_dim
    for key, value in tokenizer_values(kind, tokenizer, c.vocab_size).items():
        values[f"tokenizer.ggml.{key}"] = value
    return values, arrays(kind, model)


def tokenizer_values(kind: Kind, tokenizer: M.Tokenizer, size: int) -> dict:
    """What the file says of the tokenizer; `size` counts the rows of the embedding."""
    ids = tokenizer.tokenizer.get_vocab()
    padding, normal, control, user_defined = 5, 1, 3, 4
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [padding] * size
    for token, i in ids.items():
        tokens[i] = token
        if token in kind.control:
            types[i] = control
        elif token in kind.user_defined:
            types[i] = user_defined
        else:
            types[i] = normal
    merges = json.loads(tokenizer.files["tokenizer.json"])["model"]["merges"]
    return {
        "model": "gpt2",
        "pre": kind.pre,
        "tokens": tokens,
        "token_type": types,
        "merges": [" ".join(pair) for pair in merges],
        "bos_token_id": ids[kind.control[0]],
        "eos_token_id": ids[kind.control[-1]],
    }


def arrays(kind: Kind, model: M.Transformer) -> dict[str, np.ndarray]:
    """The weights by their names in the file."""
    c = model.config
    architecture = gguf.MODEL_ARCH[kind.architecture.upper()]
    names = gguf.get_tensor_name_map(architecture, c.layers)
    result = {}
    for name, tensor in model.state_dict().items():
        module, _, parameter = M.disk_name(name).rpartition(".")
        if kind.architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = c.heads if "q_proj" in name else c.kv_heads
            # x_i and x_i+d/2 become neighbours
            halves = tensor.unflatten(0, (heads, 2, -1))  # (H, 2, d/2, …)
            tensor = halves.transpose(1, 2).flatten(0, 2)
        result[f"{names.get_name(module)}.{parameter}"] = tensor.float().numpy()
    if c.rope_llama3:
        result["rope_freqs.weight"] = divisors(c).numpy()
    return result


def divisors(c: M.ModelConfig) -> torch.Tensor:
    """(d/2,) what Llama 3 divides the angular steps by, as `llama.cpp` writes it down."""
    factor, low, high, original = c.rope_llama3
    result = []
    for i in range(0, c.head_dim, 2):
        turns = original * c.rope_theta ** (-i / c.head_dim) / (2 * np.pi)
        smooth = min(max((turns - low) / (high - low), 0), 1)
        result.append(1 / ((1 - smooth) / factor + smooth))
    return torch.tensor(result, dtype=torch.float32)


def write(
    path: Path,
    values: dict,
    tensors: dict[str, np.ndarray],
    quantised: gguf.GGMLQuantizationType | None = None,
    **options,
) -> Path:
    """Write a file; matrices are `quantised` where a type is given; `options` are the writer's."""
    writer = gguf.GGUFWriter(path, values["general.architecture"], **options)
    add = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    for key, value in values.items():
        # the writer adds the architecture itself
        if key != "general.architecture":
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
    values, tensors = contents(KINDS[kind], model, tokenizer)
    return folder / "original", write(folder / "model.gguf", values, tensors, **options)
