"""The transformer against a slow one, checkpoints, and the tokenizer."""

import json
import math
import re
import shutil

import numpy as np
import pytest
import safetensors.torch
import tokenizers
import torch
from conftest import ROOT, SHAPE, make_model
from hypothesis import given
from hypothesis import strategies as st

import model as M
from lm.tokenizer import _unused_character

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES = {
    "qwen3": {},
    "qwen3_untied_biased": {
        "tie_word_embeddings": False,
        "attention_bias": True,
    },
    "qwen2": {
        "architectures": ["Qwen2ForCausalLM"],
        "head_dim": None,
    },
    "llama": {
        "architectures": ["LlamaForCausalLM"],
        "head_dim": None,
        "tie_word_embeddings": False,
        "attention_bias": True,
        "mlp_bias": True,
        "num_key_value_heads": 4,
    },
    "llama3": {
        "architectures": ["LlamaForCausalLM"],
        "head_dim": 16,
        "max_position_embeddings": 65536,
        "rope_scaling": LLAMA3_ROPE,
        "rope_theta": 500000.0,
    },
}


class SlowTransformer:
    """One sequence in float64, by loops over positions and heads.

    What the fast transformer must equal.
    """

    def __init__(self, model):
        self.config = model.config
        self.weights = {n: t.double().numpy() for n, t in model.state_dict().items()}
        self.head = model.head.detach().double().numpy()
        device = torch.device("cpu")
        self.frequencies = M.inverse_frequencies(model.config, device).double().numpy()

    def norm(self, x, name):
        mean_square = (x * x).mean(-1, keepdims=True)
        return x / np.sqrt(mean_square + self.config.norm_eps) * self.weights[f"{name}.weight"]

    def linear(self, x, name):
        return x @ self.weights[f"{name}.weight"].T + self.weights.get(f"{name}.bias", 0.0)

    def turn(self, x, position):
        """RoPE: the pairs (x_i, x_{i+d/2}) as complex numbers."""
        half = self.config.head_dim // 2
        z = (x[:half] + 1j * x[half:]) * np.exp(1j * position * self.frequencies)
        return np.concatenate([z.real, z.imag])

    def attention(self, h, name, positions):
        """h (T, D) -> (T, D)"""
        c = self.config
        T = len(h)
        q, k, v = (self.linear(h, f"{name}.{n}_proj").reshape(T, -1, c.head_dim) for n in "qkv")
        if c.qk_norm:
            q, k = self.norm(q, f"{name}.q_norm"), self.norm(k, f"{name}.k_norm")
        out = np.zeros_like(q)
        for t in range(T):
            for head in range(c.heads):
                kv = head // (c.heads // c.kv_heads)
                query = self.turn(q[t, head], positions[t])
                keys = [self.turn(k[s, kv], positions[s]) for s in range(t + 1)]
                scores = np.array([query @ key for key in keys])
                weights = np.exp((scores - scores.max()) / math.sqrt(c.head_dim))
                out[t, head] = (weights / weights.sum()) @ v[: t + 1, kv]
        return self.linear(out.reshape(T, -1), f"{name}.o_proj")

    def mlp(self, h, name):
        gate = self.linear(h, f"{name}.gate_proj")
        silu = gate / (1 + np.exp(-gate))
        return self.linear(silu * self.linear(h, f"{name}.up_proj"), f"{name}.down_proj")

    def logits(self, ids, positions):
        x = self.weights["embed_tokens.weight"][ids]
        for i in range(self.config.layers):
            layer = f"layers.{i}"
            h = self.norm(x, f"{layer}.input_layernorm")
            x = x + self.attention(h, f"{layer}.self_attn", positions)
            h = self.norm(x, f"{layer}.post_attention_layernorm")
            x = x + self.mlp(h, f"{layer}.mlp")
        return self.norm(x, "norm") @ self.head.T


# -------------------------------------------------------------------------------------- transformer
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_the_slow_transformer(family):
    model = make_model(vocab_size=50, **FAMILIES[family])
    ids = torch.randint(0, 50, (9,), generator=torch.Generator().manual_seed(1))

    with torch.no_grad():
        fast = model.logits(model(ids[None]))[0]

    slow = SlowTransformer(model).logits(ids.numpy(), range(9))
    np.testing.assert_allclose(fast, slow, atol=1e-4)


def test_logits_at_far_positions_equal_those_of_the_slow_transformer():
    model = make_model(vocab_size=50, **FAMILIES["llama3"])
    ids = torch.arange(8)
    positions = torch.tensor([0, 1, 2, 900, 5000, 16000, 16001, 30000])

    with torch.no_grad():
        fast = model.logits(model(ids[None], positions[None]))[0]

    slow = SlowTransformer(model).logits(ids.numpy(), positions.tolist())
    np.testing.assert_allclose(fast, slow, atol=5e-3)


@pytest.mark.parametrize(
    "architecture, biases, norms",
    [
        ("Qwen2ForCausalLM", True, False),
        ("Qwen3ForCausalLM", False, True),
        ("LlamaForCausalLM", False, False),
    ],
)
def test_families_differ_in_biases_and_norms(architecture, biases, norms):
    model = make_model(architectures=[architecture])
    names = set(model.layers[0].self_attn.state_dict())

    want = {"q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"}
    if biases:
        want |= {"q_proj.bias", "k_proj.bias", "v_proj.bias"}
    if norms:
        want |= {"q_norm.weight", "k_norm.weight"}
    assert names == want


# transformers 5.23, LlamaRotaryEmbedding.inv_freq
FREQUENCIES_OF_16 = [
    1.0,
    0.193922758102417,
    0.03760603070259094,
    0.00729266507551074,
    0.0005248460220173001,
    3.428102354519069e-05,
    6.647869668086059e-06,
    1.289173155782919e-06,
]
FREQUENCIES_OF_32 = [
    1.0,
    0.44036662578582764,
    0.193922758102417,
    0.08539710193872452,
    0.03760603070259094,
    0.016560440883040428,
    0.00729266507551074,
    0.0032114461064338684,
    0.000429556705057621,
    1.9461638657958247e-05,
    8.570255886297673e-06,
    3.7740544485131977e-06,
    1.6619674170215148e-06,
    7.318749339901842e-07,
    3.2229328894572973e-07,
    1.4192720243499934e-07,
]


@pytest.mark.parametrize(
    "head_dim, factor, expected",
    [
        (16, 8.0, FREQUENCIES_OF_16),
        (32, 32.0, FREQUENCIES_OF_32),
    ],
)
def test_llama3_frequencies_equal_those_of_transformers(head_dim, factor, expected):
    changes = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 9,
        "head_dim": head_dim,
        "rope_scaling": LLAMA3_ROPE | {"factor": factor, "original_max_position_embeddings": 8192},
        "rope_theta": 500000.0,
    }
    config = M.ModelConfig.from_hf(SHAPE | changes)

    found = M.inverse_frequencies(config, torch.device("cpu"))

    assert found.tolist() == pytest.approx(expected, rel=1e-6)


def test_old_and_new_configurations_of_rope_agree():
    def read(**rope):
        llama = {"vocab_size": 9, "architectures": ["LlamaForCausalLM"]}
        return M.ModelConfig.from_hf(SHAPE | llama | rope)

    renamed = dict(LLAMA3_ROPE)
    renamed["type"] = renamed.pop("rope_type")
    old = read(rope_theta=5e5, rope_scaling=LLAMA3_ROPE)
    older = read(rope_theta=5e5, rope_scaling=renamed)
    new = read(rope_parameters=LLAMA3_ROPE | {"rope_theta": 5e5})
    assert old == older == new
    assert new.rope_theta == 5e5
    assert new.rope_llama3

    default = read(rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    assert default == read(rope_theta=1e6)


def test_rope_is_computed_in_fp32_whatever_the_weights():
    model = make_model(vocab_size=50, max_position_embeddings=65536).bfloat16()

    def first_key(position):
        """The key of token 1 at this position in the first layer."""
        keys = []

        def attend(layer, q, k, v):
            keys.append(k)
            return M.attention(layer, q, k, v)

        model(torch.tensor([[1]]), torch.tensor([[position]]), attend)
        return keys[0]

    # in bf16 both positions would round to 40192
    assert not torch.equal(first_key(40001), first_key(40002))


@given(
    st.lists(st.lists(st.integers(0, 49), min_size=1, max_size=12), min_size=1, max_size=4),
    st.integers(0, 9),
    st.integers(0, 49),
)
def test_padding_changes_nothing(rows, extra, pad):
    model = make_model(vocab_size=50)
    width = max(map(len, rows)) + extra
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])

    with torch.no_grad():
        padded = model(ids)
        alone = [model(torch.tensor([row]))[0] for row in rows]

    for of_batch, want in zip(padded, alone):
        torch.testing.assert_close(of_batch[: len(want)], want, atol=2e-5, rtol=1e-4)


@given(st.integers(0, 49), st.integers(0, 9))
def test_a_sequence_does_not_touch_its_batch_mates(token, place):
    model = make_model(vocab_size=50)
    ids = torch.arange(20).reshape(2, 10)
    changed = ids.clone()
    changed[0, place] = token

    def logits_and_gradient(batch):
        """Of the second sequence."""
        logits = model.logits(model(batch))[1]
        gradient = torch.autograd.grad(logits.square().sum(), list(model.parameters()))
        return logits.detach(), gradient

    logits, gradient = logits_and_gradient(ids)
    again, gradient_again = logits_and_gradient(changed)

    assert torch.equal(logits, again)
    assert all(map(torch.equal, gradient, gradient_again))


def test_the_past_does_not_see_the_future():
    model = make_model(vocab_size=50)
    ids = torch.arange(10)[None]
    changed = ids.clone()
    changed[0, 6] = 40

    with torch.no_grad():
        before, after = model(ids)[0], model(changed)[0]

    assert torch.equal(before[:6], after[:6])
    assert not torch.equal(before[6:], after[6:])


def test_training_and_evaluation_are_the_same_function():
    model = make_model(vocab_size=50, attention_dropout=0.5)
    ids = torch.arange(10)[None]
    evaluated = model.eval()(ids)

    assert torch.equal(model.train()(ids), evaluated)
    # and no two passes of training differ
    assert torch.equal(model(ids), model(ids))


# -------------------------------------------------------------------------------------- checkpoints
@pytest.fixture
def checkpoint(tmp_path, tokenizer):
    """A folder with a small untied model, and the model."""
    model = make_model(vocab_size=tokenizer.size + 10, tie_word_embeddings=False)
    M.save_pretrained(model, tokenizer, tmp_path / "m")
    return tmp_path / "m", model


def same(a, b) -> bool:
    """Whether two models have equal logits."""
    ids = torch.arange(10)[None]
    with torch.no_grad():
        return torch.equal(a.logits(a(ids)), b.logits(b(ids)))


def update_json(file, **changes):
    """Write changes into a file of JSON, which need not be there yet."""
    raw = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(raw | changes))


def rewrite(folder, change):
    """Let `change` act on the tensors of a checkpoint."""
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, folder / "model.safetensors")


def shard(folder):
    """Split model.safetensors in two."""
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for i, part in enumerate((names[::2], names[1::2])):
        file = f"model-{i}.safetensors"
        safetensors.torch.save_file({n: tensors[n] for n in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors").unlink()
    update_json(folder / "model.safetensors.index.json", weight_map=weight_map)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_saved_loads_with_equal_logits(tmp_path, tokenizer, tied, dtype):
    model = make_model(vocab_size=tokenizer.size, tie_word_embeddings=tied).to(dtype)
    M.save_pretrained(model, tokenizer, tmp_path)

    loaded, again = M.load_pretrained(tmp_path, dtype=dtype)

    assert same(model, loaded)
    assert loaded.config == model.config
    assert again.end_ids == tokenizer.end_ids
    with safetensors.safe_open(tmp_path / "model.safetensors", "pt") as f:
        names = set(f.keys())
        assert f.metadata() == {"format": "pt"}
    assert ("lm_head.weight" in names) != tied
    assert "model.embed_tokens.weight" in names
    assert "model.layers.0.self_attn.q_norm.weight" in names
    assert "model.norm.weight" in names


def test_shards_load_as_one_file_does(checkpoint):
    folder, model = checkpoint
    shard(folder)
    assert same(M.load_pretrained(folder)[0], model)


def copy_embedding_to_head(tensors):
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("equal", [False, True])
def test_a_tied_head_that_is_written_out_must_equal_the_embedding(checkpoint, equal, sharded):
    folder, _ = checkpoint
    if equal:
        rewrite(folder, copy_embedding_to_head)
    update_json(folder / "config.json", tie_word_embeddings=True)
    if sharded:
        shard(folder)

    if equal:
        loaded, _ = M.load_pretrained(folder)
        assert loaded.head is loaded.embed_tokens.weight
    else:
        with pytest.raises(M.CheckpointError, match="lm_head.weight differs"):
            M.load_pretrained(folder)


K_NORM = "model.layers.1.self_attn.k_norm.weight"
Q_BIAS = "model.layers.0.self_attn.q_proj.bias"
NORM = "model.norm.weight"


@pytest.mark.parametrize(
    "change, culprit",
    [
        (lambda t: t.pop("lm_head.weight"), "lm_head.weight is missing"),
        (lambda t: t.pop(K_NORM), "k_norm.weight is missing"),
        (lambda t: t.update(extra=torch.zeros(1)), "extra is not part"),
        (lambda t: t.update({Q_BIAS: torch.zeros(32)}), "q_proj.bias is not part"),
        (
            lambda t: t.update({NORM: torch.zeros(31)}),
            r"model.norm.weight: expected floats of shape \(32,\)",
        ),
        (
            lambda t: t.update({NORM: torch.zeros(32, dtype=torch.int8)}),
            "model.norm.weight.*int8",
        ),
    ],
)
def test_a_tensor_that_is_missing_unknown_or_misshapen_is_named(checkpoint, change, culprit):
    folder, _ = checkpoint
    rewrite(folder, change)
    with pytest.raises(M.CheckpointError, match=culprit):
        M.load_pretrained(folder)


def test_a_stored_table_of_rope_is_ignored(checkpoint):
    folder, model = checkpoint
    table = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    rewrite(folder, lambda tensors: tensors.update(table))
    assert same(M.load_pretrained(folder)[0], model)


def removes(name):
    return lambda folder: (folder / name).unlink()


def writes(name, text):
    return lambda folder: (folder / name).write_text(text)


def cut_tensors(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])


def pickle_tensors(folder):
    (folder / "model.safetensors").write_bytes(b"\x80\x04pickle")


def lose_a_shard(folder):
    shard(folder)
    (folder / "model-1.safetensors").unlink()


def point_outside(folder):
    shard(folder)
    update_json(folder / "model.safetensors.index.json", weight_map={"a": "../../etc/passwd"})


@pytest.mark.parametrize(
    "damage, culprit",
    [
        (removes("model.safetensors"), "model.safetensors"),
        (cut_tensors, "model.safetensors"),
        (pickle_tensors, "model.safetensors"),
        (removes("config.json"), "config.json"),
        (writes("config.json", "{"), "config.json"),
        (writes("config.json", "[]"), "config.json"),
        (removes("tokenizer.json"), "tokenizer.json"),
        (writes("tokenizer.json", "{}"), "tokenizer.json"),
        (shutil.rmtree, "no such checkpoint"),
        (lose_a_shard, "model-1.safetensors"),
        (point_outside, "weight_map"),
    ],
)
def test_a_file_that_is_missing_or_corrupt_is_named(checkpoint, damage, culprit):
    folder, _ = checkpoint
    damage(folder)
    with pytest.raises(M.CheckpointError, match=culprit):
        M.load_pretrained(folder)


@pytest.mark.parametrize(
    "change, culprit",
    [
        ({"architectures": ["MistralForCausalLM"]}, "architectures"),
        ({"architectures": None, "model_type": "gemma"}, "architectures"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": "32"}, "hidden_size"),
        ({"hidden_size": 32.5}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 7}, "head_dim"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"vocab_size": 1e400}, "vocab_size"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"layer_types": ["sliding_attention"]}, "layer_types"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_type"),
        ({"rope_scaling": "linear"}, "rope_type"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "factor"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_theta": -1}, "rope_theta"),
    ],
)
def test_a_configuration_wrong_or_not_supported_is_refused_by_field(change, culprit):
    with pytest.raises(M.CheckpointError, match=f"here: .*{culprit}"):
        M.ModelConfig.from_hf(SHAPE | {"vocab_size": 9} | change, "here")


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused(tmp_path, tokenizer):
    M.save_pretrained(make_model(vocab_size=tokenizer.size - 1), tokenizer, tmp_path)
    with pytest.raises(M.CheckpointError, match="vocab_size"):
        M.load_pretrained(tmp_path)


# ---------------------------------------------------------------------------------------- tokenizer
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
    "{% endif %}"
)
BOS = "<|begin_of_text|>"
# the first is the BOS token, the last but one ends a message
CONTROLS = {
    "llama": [BOS, "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"],
    "chatml": ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>"],
}


def train_bpe(controls):
    """A byte-level tokenizer of 300 tokens, and these."""
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    trainer = tokenizers.trainers.BpeTrainer(
        initial_alphabet=byte_level.alphabet(), vocab_size=300, show_progress=False
    )
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = byte_level(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.train_from_iterator(["hello world, user and assistant\n\n"] * 9, trainer)
    bpe.add_special_tokens(controls)
    return bpe


def write_tokenizer(folder, style, **config):
    """A byte-level tokenizer with a chat template of one of two styles."""
    controls = CONTROLS[style]
    bpe = train_bpe(controls)
    if style == "llama":
        # the library would put another BOS in front
        bpe.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, bpe.token_to_id(BOS))]
        )
        template = LLAMA3
    else:
        shipped = ROOT / "tasks" / "tiny" / "tokenizer_config.json"
        template = json.loads(shipped.read_text())["chat_template"]

    folder.mkdir(exist_ok=True)
    bpe.save(str(folder / "tokenizer.json"))
    settings = {"chat_template": template, "bos_token": controls[0], "eos_token": controls[-2]}
    settings |= config
    present = {k: v for k, v in settings.items() if v is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(present))
    return folder


@pytest.fixture(scope="module", params=["llama", "chatml"])
def styled(request, tmp_path_factory):
    """A style, and a tokenizer of it."""
    folder = write_tokenizer(tmp_path_factory.mktemp("t"), request.param)
    return request.param, M.Tokenizer(folder)


def rendered(style, contents) -> str:
    """What the style's template makes of these messages of a user."""
    text = BOS if style == "llama" else ""
    for content in contents:
        if style == "llama":
            text += "<|start_header_id|>user<|end_header_id|>\n\n"
            text += f"{content.strip()}<|eot_id|>"
        else:
            text += f"<|im_start|>user\n{content}<|im_end|>\n"
    if style == "llama":
        return text + "<|start_header_id|>assistant<|end_header_id|>\n\n"
    return text + "<|im_start|>assistant\n"


def chat(contents) -> list[dict]:
    return [{"role": "user", "content": content} for content in contents]


benign_texts = st.text(max_size=40).filter(lambda s: "<" not in s and "|" not in s)


@given(st.lists(benign_texts, min_size=1, max_size=3))
def test_prompts_are_tokenized_as_the_tokenizer_file_says(styled, contents):
    style, tokenizer = styled
    whole = tokenizer.tokenizer.encode(rendered(style, contents), add_special_tokens=False)
    assert tokenizer.encode_chat(chat(contents)) == whole.ids


PIECES = [
    "<|",
    "|>",
    "<|im_",
    "start|>",
    "start_header_id|>",
    "hello",
    "<",
    ">",
    "\ue000",
    "\ue001",
    " ",
]


@given(st.data())
def test_text_of_users_never_becomes_a_control_token(styled, data):
    """And nothing of it is lost."""
    style, tokenizer = styled
    pieces = st.sampled_from(CONTROLS[style] + PIECES)
    texts = st.lists(pieces, max_size=6).map("".join)
    contents = data.draw(st.lists(texts, min_size=1, max_size=3))
    controls = set(tokenizer.control.values())

    ids = tokenizer.encode_chat(chat(contents))
    benign = tokenizer.encode_chat(chat("x" for _ in contents))

    assert [i for i in ids if i in controls] == [i for i in benign if i in controls]
    assert not controls & set(tokenizer.encode("".join(contents)))
    text = tokenizer.tokenizer.decode(ids, skip_special_tokens=False)
    assert text == rendered(style, contents)


@given(st.text(max_size=60))
def test_text_survives_encoding_and_decoding(styled, text):
    _, tokenizer = styled
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_prompt_begins_with_exactly_one_bos(tmp_path):
    tokenizer = M.Tokenizer(write_tokenizer(tmp_path / "t", "llama"))
    bos = tokenizer.control[BOS]

    ids = tokenizer.encode_chat(chat(["hello"]))

    assert ids[0] == bos
    assert ids.count(bos) == 1


def test_end_tokens_are_all_that_any_file_names(tmp_path):
    folder = write_tokenizer(tmp_path / "t", "llama")
    control = M.Tokenizer(folder).control
    eot, end_of_text = control["<|eot_id|>"], control["<|end_of_text|>"]
    assert M.Tokenizer(folder).end_ids == {eot}

    update_json(folder / "generation_config.json", eos_token_id=[end_of_text, 5])
    update_json(folder / "config.json", eos_token_id=6)
    assert M.Tokenizer(folder).end_ids == {eot, end_of_text, 5, 6}


@pytest.mark.parametrize(
    "config, culprit",
    [
        ({"eos_token": None}, "end tokens"),
        ({"eos_token": "<|nowhere|>"}, "end tokens"),
        ({"chat_template": None}, "chat_template.*missing"),
        ({"chat_template": "{% for %}"}, "chat_template"),
        ({"chat_template": 3}, "chat_template"),
    ],
)
def test_a_tokenizer_without_end_token_or_template_is_refused(tmp_path, config, culprit):
    folder = write_tokenizer(tmp_path / "t", "chatml", **config)
    with pytest.raises(M.CheckpointError, match=culprit):
        M.Tokenizer(folder)


@pytest.mark.parametrize("ids", [10**6, -1, "2", [2, 99999], [None, "x"]])
def test_an_end_id_outside_the_vocabulary_is_refused(tmp_path, ids):
    folder = write_tokenizer(tmp_path / "t", "chatml")
    update_json(folder / "generation_config.json", eos_token_id=ids)
    with pytest.raises(M.CheckpointError, match="end tokens"):
        M.Tokenizer(folder)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ raise_exception('no') }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ 1 / 0 }}",
        "{% for i in range(999999999) %}{% endfor %}",
    ],
)
def test_a_hostile_template_cannot_reach_the_interpreter(tmp_path, template):
    folder = write_tokenizer(tmp_path / "t", "chatml", chat_template=template)
    tokenizer = M.Tokenizer(folder)
    try:
        text = tokenizer.decode(tokenizer.encode_chat(chat(["x"])))
        assert not re.search("class|function|module|built-in", text)
    except M.CheckpointError as e:
        assert "chat template" in str(e)


def test_a_template_has_no_clock_and_thinking_is_off(tmp_path):
    template = (
        "{{ strftime_now is defined }} {{ enable_thinking }} {{ messages[0].content | tojson }}"
    )
    folder = write_tokenizer(tmp_path / "t", "chatml", chat_template=template)
    tokenizer = M.Tokenizer(folder)

    ids = tokenizer.encode_chat(chat(["é"]))

    assert tokenizer.decode(ids) == 'False False "é"'


def test_an_added_token_of_one_character_is_refused(tmp_path, tokenizer):
    for name, data in tokenizer.files.items():
        (tmp_path / name).write_bytes(data)
    added = json.loads(tokenizer.files["tokenizer.json"])["added_tokens"]
    added.append(added[0] | {"id": tokenizer.size, "content": "§"})
    update_json(tmp_path / "tokenizer.json", added_tokens=added)

    with pytest.raises(M.CheckpointError, match="'§'.*single character"):
        M.Tokenizer(tmp_path)


def test_added_tokens_that_swallow_spaces_are_refused(tmp_path):
    folder = write_tokenizer(tmp_path / "t", "chatml")
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    added[0]["lstrip"] = True
    update_json(folder / "tokenizer.json", added_tokens=added)

    with pytest.raises(M.CheckpointError, match="surroundings"):
        M.Tokenizer(folder)


def test_a_text_of_all_private_characters_leaves_another_to_mark_with():
    texts = ["".join(map(chr, range(0xE000, 0xF8FF)))]
    assert _unused_character(texts) not in texts[0]
