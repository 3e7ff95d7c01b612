"""Files of format GGUF as transformers reads them (`gguf_file=`): logits, ids and chat prompts.

What transformers 5 leaves out of such a file: the RoPE divisors of Llama 3 and the biases of `llama`
(compared in the converted folder instead); for `smollm`, that digits are cut out of the text first,
which matters where several spaces or line breaks stand before one (the pre-tokenizer that SmolLM2 was
published with is put into the peer); for `qwen2`, Unicode's form C.
A real file is compared too where there is one: GGUF=FILE.gguf, or models/*.gguf; and the folder
models/SmolLM2-135M-Instruct.
"""
import os
import random
import unicodedata
from pathlib import Path

import pytest
import torch
import transformers

ROOT = Path(__file__).resolve().parents[2]
from gguf_files import KINDS, SPLITS, make
from tokenizers import pre_tokenizers

import model as M

REAL = sorted((ROOT / "models").glob("*.gguf"))
if "GGUF" in os.environ:
    REAL = [Path(os.environ["GGUF"])]
FOLDER = ROOT / "models" / "SmolLM2-135M-Instruct"
PIECES = ["a", "word", "hello world", " ", "\n", "é", "«q»", "<b>", "<|", "im_start", "|>", "\t", "1,234",
          "{{x}}", "{% if %}", "'", '"', "中", "  ", "12", "'s", "don't", "'LL", "\n\n", "²", "Ⅳ", "٣",
          "\r\n", "\u00a0", "\u3000", "🙂", "\x00", "\xad", "e\u0301", "__init__", "->"]


@pytest.fixture(scope="module", params=["smollm2", "qwen2", "qwen3", "real"])
def file(request, tmp_path_factory):
    if request.param != "real":
        return make(request.param, tmp_path_factory.mktemp("gguf"))[1]
    if not REAL:
        pytest.skip("no real file: GGUF=FILE.gguf names one")
    return REAL[0]


def texts(count, seed=0):
    rng = random.Random(seed)
    for _ in range(count):
        yield "".join(rng.choice(PIECES) for _ in range(rng.randrange(16)))


def chat(text):
    return [{"role": "system", "content": f"Answer {text}"}, {"role": "user", "content": text}]


def apply(tokenizer, messages):
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, enable_thinking=False)
    return list(ids if isinstance(ids, list) else ids["input_ids"])


def compare_logits(model, tokenizer, theirs):
    ids = torch.tensor([tokenizer.encode_chat(chat("What is the capital of France?"))[:200]])
    with torch.no_grad():
        a, b = model.logits(model(ids)), theirs.eval()(ids).logits
    torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


def compare(ours, theirs, count, same=lambda text: text):
    for text in map(same, texts(count)):
        if any(c in text for c in ours.control):
            continue            # what spells a control token is text to us, a control token to them
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False), text
        assert ours.encode_chat(chat(text)) == apply(theirs, chat(text)), text


def test_logits_are_those_of_transformers(file):
    model, tokenizer = M.load_pretrained(file)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32)
    compare_logits(model, tokenizer, theirs)


def test_ids_are_those_of_transformers(file):
    ours = M.load_pretrained(file)[1]
    theirs = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    backend = theirs.backend_tokenizer
    digits = b'"Digits"' in ours.files["tokenizer.json"]
    form_c = b'"NFC"' in ours.files["tokenizer.json"] and backend.normalizer is None
    if digits:
        assert "Digits" not in str(backend.pre_tokenizer)      # else nothing is left to mend
        backend.pre_tokenizer = pre_tokenizers.Sequence(SPLITS["smollm"])
    compare(ours, theirs, 1000, (lambda text: unicodedata.normalize("NFC", text)) if form_c else str)


@pytest.mark.parametrize("kind", KINDS)
def test_a_converted_folder_is_what_transformers_reads(kind, tmp_path):
    from lm.gguf import convert
    convert(make(kind, tmp_path)[1], tmp_path / "folder", torch.float32)
    read_alike(tmp_path / "folder", 300)


def test_the_folder_of_make_smollm2_is_what_transformers_reads():
    if not FOLDER.is_dir():
        pytest.skip("make smollm2 brings it")
    read_alike(FOLDER, 1000)


def read_alike(folder, count):
    model, tokenizer = M.load_pretrained(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    compare_logits(model, tokenizer, theirs)
    compare(tokenizer, transformers.AutoTokenizer.from_pretrained(folder), count)
