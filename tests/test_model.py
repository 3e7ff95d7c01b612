"""The transformer against a slow one, its cache, checkpoints and tokenizer."""
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

FAMILIES = {
    "qwen3": {},
    "qwen3_untied_biased": {"tie_word_embeddings": False, "attention_bias": True},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "head_dim": None},
    "llama": {"architectures": ["LlamaForCausalLM"], "head_dim": None, "tie_word_embeddings": False, "attention_bias": True,
              "mlp_bias": True, "num_key_value_heads": 4},
    "llama3": {"architectures": ["LlamaForCausalLM"], "head_dim": 16, "max_position_embeddings": 65536, "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64}, "rope_theta": 500000.0},
}


def slow_logits(model, ids, positions=None):
    """The logits of one sequence, in float64, by loops over positions and heads: what the fast transformer must equal."""
    c, w = model.config, {n: t.double().numpy() for n, t in model.state_dict().items()}
    norm = lambda x, weight: x / np.sqrt((x * x).mean(-1, keepdims=True) + c.norm_eps) * weight
    linear = lambda x, name: x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)
    frequency = M.inverse_frequencies(c, torch.device("cpu")).double().numpy()

    def turn(x, position):                                  # the pairs (x_i, x_{i+d/2}) as complex numbers
        z = (x[:c.head_dim // 2] + 1j * x[c.head_dim // 2:]) * np.exp(1j * position * frequency)
        return np.concatenate([z.real, z.imag])

    x = w["embed_tokens.weight"][ids]
    positions = range(len(ids)) if positions is None else positions
    for i in range(c.layers):
        a, h = f"layers.{i}.self_attn", norm(x, w[f"layers.{i}.input_layernorm.weight"])
        q, k, v = (linear(h, f"{a}.{n}_proj").reshape(len(ids), -1, c.head_dim) for n in "qkv")
        if c.qk_norm:
            q, k = norm(q, w[f"{a}.q_norm.weight"]), norm(k, w[f"{a}.k_norm.weight"])
        out = np.zeros_like(q)
        for t, p in enumerate(positions):
            for head in range(c.heads):
                kv = head // (c.heads // c.kv_heads)
                scores = np.array([turn(q[t, head], p) @ turn(k[s, kv], positions[s]) for s in range(t + 1)])
                weights = np.exp((scores - scores.max()) / math.sqrt(c.head_dim))
                out[t, head] = (weights / weights.sum()) @ v[:t + 1, kv]
        x = x + linear(out.reshape(len(ids), -1), f"{a}.o_proj")
        h = norm(x, w[f"layers.{i}.post_attention_layernorm.weight"])
        gate = linear(h, f"layers.{i}.mlp.gate_proj")
        x = x + linear(gate / (1 + np.exp(-gate)) * linear(h, f"layers.{i}.mlp.up_proj"), f"layers.{i}.mlp.down_proj")
    return norm(x, w["norm.weight"]) @ model.head.detach().double().numpy().T


# ------------------------------------------------------------------------------------------------------ transformer

@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_the_slow_transformer(family):
    model = make_model(vocab_size=50, **FAMILIES[family])
    ids = torch.randint(0, 50, (9,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        fast = model.logits(model(ids[None]))[0]
    np.testing.assert_allclose(fast, slow_logits(model, ids.numpy()), atol=1e-4)


@pytest.mark.parametrize("architecture, biases, norms", [("Qwen2ForCausalLM", True, False), ("Qwen3ForCausalLM", False, True),
                                                         ("LlamaForCausalLM", False, False)])
def test_families_differ_in_biases_and_norms(architecture, biases, norms):
    names = {n.removeprefix("layers.0.self_attn.") for n in make_model(architectures=[architecture]).state_dict() if n.startswith("layers.0.self")}
    weights = {f"{x}_proj.weight" for x in "qkvo"}
    assert names == weights | {f"{x}_proj.bias" for x in "qkv" if biases} | {f"{x}_norm.weight" for x in "qk" if norms}


def test_logits_at_far_positions_equal_those_of_the_slow_transformer():
    model = make_model(vocab_size=50, **FAMILIES["llama3"])
    ids, positions = torch.arange(8), torch.tensor([0, 1, 2, 900, 5000, 16000, 16001, 30000])
    with torch.no_grad():
        fast = model.logits(model(ids[None], positions[None]))[0]
    np.testing.assert_allclose(fast, slow_logits(model, ids.numpy(), positions.tolist()), atol=5e-3)


@pytest.mark.parametrize("head_dim, factor, expected", [    # transformers 5.23, LlamaRotaryEmbedding.inv_freq
    (16, 8.0, [1.0, 0.193922758102417, 0.03760603070259094, 0.00729266507551074, 0.0005248460220173001,
               3.428102354519069e-05, 6.647869668086059e-06, 1.289173155782919e-06]),
    (32, 32.0, [1.0, 0.44036662578582764, 0.193922758102417, 0.08539710193872452, 0.03760603070259094, 0.016560440883040428,
                0.00729266507551074, 0.0032114461064338684, 0.000429556705057621, 1.9461638657958247e-05,
                8.570255886297673e-06, 3.7740544485131977e-06, 1.6619674170215148e-06, 7.318749339901842e-07,
                3.2229328894572973e-07, 1.4192720243499934e-07])])
def test_llama3_frequencies_equal_those_of_transformers(head_dim, factor, expected):
    scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192}
    config = M.ModelConfig.from_hf(SHAPE | {"architectures": ["LlamaForCausalLM"], "vocab_size": 9, "head_dim": head_dim,
                                            "rope_scaling": scaling, "rope_theta": 500000.0})
    assert M.inverse_frequencies(config, torch.device("cpu")).tolist() == pytest.approx(expected, rel=1e-6)


def test_old_and_new_configurations_of_rope_agree():
    base = SHAPE | {"vocab_size": 9, "architectures": ["LlamaForCausalLM"]}
    scaling = FAMILIES["llama3"]["rope_scaling"]
    old = M.ModelConfig.from_hf(base | {"rope_theta": 5e5, "rope_scaling": scaling})
    older = M.ModelConfig.from_hf(base | {"rope_theta": 5e5, "rope_scaling": {"type" if k == "rope_type" else k: v for k, v in scaling.items()}})
    new = M.ModelConfig.from_hf(base | {"rope_parameters": scaling | {"rope_theta": 5e5}})
    assert old == older == new and new.rope_theta == 5e5 and new.rope_llama3
    assert M.ModelConfig.from_hf(base | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}) == \
        M.ModelConfig.from_hf(base | {"rope_theta": 1e6})


def test_rope_is_computed_in_fp32_whatever_the_weights():
    model = make_model(vocab_size=50, max_position_embeddings=65536).bfloat16()
    seen = []
    model(torch.tensor([[1]]), torch.tensor([[40001]]), lambda layer, q, k, v: (seen.append(k), M.attention(layer, q, k, v))[1])
    model(torch.tensor([[1]]), torch.tensor([[40002]]), lambda layer, q, k, v: (seen.append(k), M.attention(layer, q, k, v))[1])
    assert not torch.equal(seen[0], seen[2])                # in bf16 both positions would round to 40192


@given(st.lists(st.lists(st.integers(0, 49), min_size=1, max_size=12), min_size=1, max_size=4), st.integers(0, 9), st.integers(0, 49))
def test_padding_changes_nothing(rows, extra, pad):
    model = make_model(vocab_size=50)
    width = max(map(len, rows)) + extra
    with torch.no_grad():
        padded = model(torch.tensor([r + [pad] * (width - len(r)) for r in rows]))
        for i, row in enumerate(rows):
            torch.testing.assert_close(padded[i, :len(row)], model(torch.tensor([row]))[0], atol=2e-5, rtol=1e-4)


@given(st.integers(0, 49), st.integers(0, 9))
def test_a_sequence_does_not_touch_its_batch_mates(token, place):
    model = make_model(vocab_size=50)
    a = torch.arange(20).reshape(2, 10)
    b = a.clone()
    b[0, place] = token
    def logits_and_gradient(ids):
        logits = model.logits(model(ids))[1]
        return logits.detach(), torch.autograd.grad(logits.square().sum(), list(model.parameters()))
    (x, g), (y, h) = logits_and_gradient(a), logits_and_gradient(b)
    assert torch.equal(x, y) and all(torch.equal(p, q) for p, q in zip(g, h))


def test_the_past_does_not_see_the_future():
    model, ids = make_model(vocab_size=50), torch.arange(10)[None]
    with torch.no_grad():
        changed = ids.clone()
        changed[0, 6] = 40
        a, b = model(ids)[0], model(changed)[0]
    assert torch.equal(a[:6], b[:6]) and not torch.equal(a[6:], b[6:])


def test_training_and_evaluation_are_the_same_function():
    model, ids = make_model(vocab_size=50, attention_dropout=0.5), torch.arange(10)[None]
    assert torch.equal(model.train()(ids), model.eval()(ids)) and torch.equal(model.train()(ids), model(ids))


# ------------------------------------------------------------------------------------------------------ checkpoints

@pytest.fixture
def checkpoint(tmp_path, tokenizer):
    """A folder with a small untied model, and the model."""
    model = make_model(vocab_size=tokenizer.size + 10, tie_word_embeddings=False)
    M.save_pretrained(model, tokenizer, tmp_path / "m")
    return tmp_path / "m", model


def same(a, b):
    ids = torch.arange(10)[None]
    with torch.no_grad():
        return torch.equal(a.logits(a(ids)), b.logits(b(ids)))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_saved_loads_with_equal_logits(tmp_path, tokenizer, tied, dtype):
    model = make_model(vocab_size=tokenizer.size, tie_word_embeddings=tied).to(dtype)
    M.save_pretrained(model, tokenizer, tmp_path)
    loaded, again = M.load_pretrained(tmp_path, dtype=dtype)
    assert same(model, loaded) and loaded.config == model.config and again.end_ids == tokenizer.end_ids
    with safetensors.safe_open(tmp_path / "model.safetensors", "pt") as f:
        assert ("lm_head.weight" in f.keys()) != tied and f.metadata() == {"format": "pt"}
        assert {"model.embed_tokens.weight", "model.layers.0.self_attn.q_norm.weight", "model.norm.weight"} <= set(f.keys())


def rewrite(folder, change):
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, folder / "model.safetensors")


def shard(folder):
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    names, weight_map = sorted(tensors), {}
    for i, part in enumerate((names[::2], names[1::2])):
        safetensors.torch.save_file({n: tensors[n] for n in part}, folder / f"model-{i}.safetensors")
        weight_map |= dict.fromkeys(part, f"model-{i}.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shards_load_as_one_file_does(checkpoint):
    folder, model = checkpoint
    shard(folder)
    assert same(M.load_pretrained(folder)[0], model)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("equal", [False, True])
def test_a_tied_head_that_is_written_out_must_equal_the_embedding(checkpoint, equal, sharded):
    folder, model = checkpoint
    if equal:
        rewrite(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}))
    if sharded:
        shard(folder)
    if equal:
        loaded, _ = M.load_pretrained(folder)
        assert loaded.head is loaded.embed_tokens.weight
    else:
        with pytest.raises(M.CheckpointError, match="lm_head.weight differs"):
            M.load_pretrained(folder)


@pytest.mark.parametrize("change, culprit", [
    (lambda t: t.pop("lm_head.weight"), "lm_head.weight is missing"),
    (lambda t: t.pop("model.layers.1.self_attn.k_norm.weight"), "k_norm.weight is missing"),
    (lambda t: t.update(extra=torch.zeros(1)), "extra is not part"),
    (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}), "q_proj.bias is not part"),
    (lambda t: t.update({"model.norm.weight": torch.zeros(31)}), r"model.norm.weight: expected floats of shape \(32,\)"),
    (lambda t: t.update({"model.norm.weight": torch.zeros(32, dtype=torch.int8)}), "model.norm.weight.*int8")])
def test_a_tensor_that_is_missing_unknown_or_misshapen_is_named(checkpoint, change, culprit):
    rewrite(checkpoint[0], change)
    with pytest.raises(M.CheckpointError, match=culprit):
        M.load_pretrained(checkpoint[0])


def test_a_stored_table_of_rope_is_ignored(checkpoint):
    rewrite(checkpoint[0], lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}))
    assert same(M.load_pretrained(checkpoint[0])[0], checkpoint[1])


@pytest.mark.parametrize("damage, culprit", [
    (lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
    (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-9]), "model.safetensors"),
    (lambda f: (f / "model.safetensors").write_bytes(b"\x80\x04pickle"), "model.safetensors"),
    (lambda f: (f / "config.json").unlink(), "config.json"), (lambda f: (f / "config.json").write_text("{"), "config.json"),
    (lambda f: (f / "config.json").write_text("[]"), "config.json"), (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json"),
    (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer.json"), (lambda f: shutil.rmtree(f), "no such checkpoint"),
    (lambda f: (shard(f), (f / "model-1.safetensors").unlink()), "model-1.safetensors"),
    (lambda f: (shard(f), (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../etc/passwd"}}')), "weight_map")])
def test_a_file_that_is_missing_or_corrupt_is_named(checkpoint, damage, culprit):
    damage(checkpoint[0])
    with pytest.raises(M.CheckpointError, match=culprit):
        M.load_pretrained(checkpoint[0])


@pytest.mark.parametrize("change, culprit", [
    ({"architectures": ["MistralForCausalLM"]}, "architectures"), ({"architectures": None, "model_type": "gemma"}, "architectures"),
    ({"hidden_size": None}, "hidden_size"), ({"hidden_size": "32"}, "hidden_size"), ({"hidden_size": 32.5}, "hidden_size"),
    ({"num_hidden_layers": 0}, "num_hidden_layers"), ({"num_hidden_layers": True}, "num_hidden_layers"),
    ({"num_key_value_heads": 3}, "num_key_value_heads"), ({"head_dim": 7}, "head_dim"), ({"rms_norm_eps": math.nan}, "rms_norm_eps"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"), ({"hidden_act": "gelu"}, "hidden_act"), ({"vocab_size": 1e400}, "vocab_size"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"), ({"use_sliding_window": True}, "use_sliding_window"),
    ({"layer_types": ["sliding_attention"]}, "layer_types"), ({"rope_scaling": {"type": "yarn"}}, "rope_type"),
    ({"rope_scaling": "linear"}, "rope_type"), ({"rope_scaling": {"rope_type": "llama3"}}, "factor"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"), ({"rope_theta": -1}, "rope_theta")])
def test_a_configuration_that_is_wrong_or_not_supported_is_refused_by_field(change, culprit):
    with pytest.raises(M.CheckpointError, match=f"here: .*{culprit}"):
        M.ModelConfig.from_hf(SHAPE | {"vocab_size": 9} | change, "here")


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused(tmp_path, tokenizer):
    M.save_pretrained(make_model(vocab_size=tokenizer.size - 1), tokenizer, tmp_path)
    with pytest.raises(M.CheckpointError, match="vocab_size"):
        M.load_pretrained(tmp_path)


# -------------------------------------------------------------------------------------------------------- tokenizer

LLAMA3 = ("{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}"
          "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}")
CONTROLS = {"llama": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"],
            "chatml": ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>"]}


def write_tokenizer(folder, style, **config):
    """A byte-level tokenizer with a chat template of one of two styles."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.train_from_iterator(["hello world, user and assistant\n\n"] * 9, tokenizers.trainers.BpeTrainer(
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), vocab_size=300, show_progress=False))
    bpe.add_special_tokens(CONTROLS[style])
    if style == "llama":                                    # the library would put another BOS in front
        bpe.post_processor = tokenizers.processors.TemplateProcessing(
            single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", bpe.token_to_id("<|begin_of_text|>"))])
    folder.mkdir(exist_ok=True)
    bpe.save(str(folder / "tokenizer.json"))
    chatml = json.loads((ROOT / "tasks" / "tiny" / "tokenizer_config.json").read_text())["chat_template"]
    settings = {"chat_template": LLAMA3 if style == "llama" else chatml, "bos_token": CONTROLS[style][0], "eos_token": CONTROLS[style][-2]} | config
    (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))
    return folder


@pytest.fixture(scope="module", params=["llama", "chatml"])
def styled(request, tmp_path_factory):
    return request.param, M.Tokenizer(write_tokenizer(tmp_path_factory.mktemp("t"), request.param))


def rendered(style, contents):
    if style == "llama":
        return "<|begin_of_text|>" + "".join(f"<|start_header_id|>user<|end_header_id|>\n\n{c.strip()}<|eot_id|>" for c in contents) + \
            "<|start_header_id|>assistant<|end_header_id|>\n\n"
    return "".join(f"<|im_start|>user\n{c}<|im_end|>\n" for c in contents) + "<|im_start|>assistant\n"


chat = lambda contents: [{"role": "user", "content": c} for c in contents]
benign = st.text(max_size=40).filter(lambda s: "<" not in s and "|" not in s)


@given(st.lists(benign, min_size=1, max_size=3))
def test_prompts_are_tokenized_as_the_tokenizer_file_says(styled, contents):
    style, tokenizer = styled
    whole = tokenizer.tokenizer.encode(rendered(style, contents), add_special_tokens=False).ids
    assert tokenizer.encode_chat(chat(contents)) == whole


@given(st.data())
def test_text_of_users_never_becomes_a_control_token(styled, data):
    style, tokenizer = styled
    pieces = CONTROLS[style] + ["<|", "|>", "<|im_", "start|>", "start_header_id|>", "hello", "<", ">", "\ue000", "\ue001", " "]
    contents = data.draw(st.lists(st.lists(st.sampled_from(pieces), max_size=6).map("".join), min_size=1, max_size=3))
    ids, controls = tokenizer.encode_chat(chat(contents)), set(tokenizer.control.values())
    benign = tokenizer.encode_chat(chat("x" for _ in contents))
    assert [i for i in ids if i in controls] == [i for i in benign if i in controls]
    assert not controls & set(tokenizer.encode("".join(contents)))
    text = tokenizer.tokenizer.decode(ids, skip_special_tokens=False)
    assert text == rendered(style, contents)                # and nothing of it is lost


@given(st.text(max_size=60))
def test_text_survives_encoding_and_decoding(styled, text):
    _, tokenizer = styled
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_prompt_begins_with_exactly_one_bos(tmp_path):
    tokenizer = M.Tokenizer(write_tokenizer(tmp_path / "t", "llama"))
    ids = tokenizer.encode_chat(chat(["hello"]))
    assert ids.count(tokenizer.control["<|begin_of_text|>"]) == 1 and ids[0] == tokenizer.control["<|begin_of_text|>"]


def test_end_tokens_are_all_that_any_file_names(tmp_path):
    folder = write_tokenizer(tmp_path / "t", "llama")
    control = M.Tokenizer(folder).control
    assert M.Tokenizer(folder).end_ids == {control["<|eot_id|>"]}
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [control["<|end_of_text|>"], 5]}))
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 6}))
    assert M.Tokenizer(folder).end_ids == {control["<|eot_id|>"], control["<|end_of_text|>"], 5, 6}


@pytest.mark.parametrize("config, culprit", [
    ({"eos_token": None}, "end tokens"), ({"eos_token": "<|nowhere|>"}, "end tokens"), ({"chat_template": None}, "chat_template.*missing"),
    ({"chat_template": "{% for %}"}, "chat_template"), ({"chat_template": 3}, "chat_template")])
def test_a_tokenizer_without_end_token_or_template_is_refused(tmp_path, config, culprit):
    with pytest.raises(M.CheckpointError, match=culprit):
        M.Tokenizer(write_tokenizer(tmp_path / "t", "chatml", **config))


@pytest.mark.parametrize("ids", [10**6, -1, "2", [2, 99999], [None, "x"]])
def test_an_end_id_outside_the_vocabulary_is_refused(tmp_path, ids):
    folder = write_tokenizer(tmp_path / "t", "chatml")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    with pytest.raises(M.CheckpointError, match="end tokens"):
        M.Tokenizer(folder)


@pytest.mark.parametrize("template", [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.__init__.__globals__ }}", "{{ raise_exception('no') }}",
    "{{ cycler.__init__.__globals__.os.system('true') }}", "{{ 1 / 0 }}", "{% for i in range(999999999) %}{% endfor %}"])
def test_a_hostile_template_cannot_reach_the_interpreter(tmp_path, template):
    tokenizer = M.Tokenizer(write_tokenizer(tmp_path / "t", "chatml", chat_template=template))
    try:
        text = tokenizer.decode(tokenizer.encode_chat(chat(["x"])))
        assert not re.search("class|function|module|built-in", text)
    except M.CheckpointError as e:
        assert "chat template" in str(e)


def test_a_template_has_no_clock_and_thinking_is_off(tmp_path):
    template = "{{ strftime_now is defined }} {{ enable_thinking }} {{ messages[0].content | tojson }}"
    tokenizer = M.Tokenizer(write_tokenizer(tmp_path / "t", "chatml", chat_template=template))
    assert tokenizer.decode(tokenizer.encode_chat(chat(["é"]))) == 'False False "é"'


def test_an_added_token_of_one_character_is_refused(tmp_path, tokenizer):
    raw = json.loads(tokenizer.files["tokenizer.json"])
    raw["added_tokens"].append(raw["added_tokens"][0] | {"id": tokenizer.size, "content": "§"})
    for name, data in tokenizer.files.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(M.CheckpointError, match="'§'.*single character"):
        M.Tokenizer(tmp_path)


def test_added_tokens_that_swallow_spaces_are_refused(tmp_path):
    folder = write_tokenizer(tmp_path / "t", "chatml")
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["added_tokens"][0]["lstrip"] = True
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(M.CheckpointError, match="surroundings"):
        M.Tokenizer(folder)
