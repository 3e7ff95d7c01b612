"""Random damage to every kind of file that is read: each is read, or refused with a sentence that names the file.

No bare traceback, no hang. FUZZ=1000 makes a thousand mutations (`make fuzz`); the default is a tenth of that.
"""
import csv
import json
import os
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import ROOT, make_model
from gguf_files import make

import model as M
from program import InputError
from prompts.files import load_prompts, save_dspy, save_prompts
from run import cli
from tasks import banking77, hover, papillon

COUNT = int(os.environ.get("FUZZ", 100))
KINDS = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "model.safetensors",
         "prompts.json", "dspy.json", "questions.jsonl", "corpus.jsonl", "train.csv", "categories.json", "PUPA_New.csv", "hover_dev.json", "group.json", "model.gguf")
ODD = (None, True, -1, 0, 10**7, 2**40, 1e308, 0.5, "", "x", "<|im_end|>", "\x00é\U0001f642", [], {}, [[]], {"a": 1}, [None], "9" * 400)


def damage_bytes(rng: random.Random, data: bytes) -> bytes:
    at, n = rng.randrange(len(data)), rng.choice((1, 1, 4, 40))
    return rng.choice((
        lambda: data[:at], lambda: data[:at] + data[at + n:], lambda: data[:at] + rng.randbytes(n) + data[at + n:],
        lambda: data[:at] + data[at:at + n] * 2 + data[at + n:], lambda: data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1:]))()


def damage_json(rng: random.Random, value):
    """The value with one node replaced, dropped, renamed or doubled."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice(list(value))
        rest = {k: v for k, v in value.items() if k != key}
        return rng.choice((lambda: rest, lambda: rest | {key + "_": value[key]}, lambda: value | {key: rng.choice(ODD)},
                           *[lambda: value | {key: damage_json(rng, value[key])}] * 4))()
    if isinstance(value, list) and value and rng.random() < 0.8:
        i = rng.randrange(len(value))
        return rng.choice((lambda: value[:i] + value[i + 1:], lambda: value[:i + 1] + value[i:],
                           *[lambda: value[:i] + [damage_json(rng, value[i])] + value[i + 1:]] * 4))()
    return rng.choice(ODD)


def damage(rng: random.Random, path: Path) -> None:
    if path.suffix == ".json" and rng.random() < 0.75:
        path.write_text(json.dumps(damage_json(rng, json.loads(path.read_text(encoding="utf-8")))), encoding="utf-8")
    elif path.suffix == ".jsonl" and rng.random() < 0.5:
        lines = path.read_text().splitlines()
        i = rng.randrange(len(lines))
        lines[i] = json.dumps(damage_json(rng, json.loads(lines[i])))
        path.write_text("\n".join(lines) + "\n")
    elif path.suffix == ".gguf":                            # at what it says of itself, before the weights
        data, head = path.read_bytes(), rng.choice((100, 2000, 20000))
        path.write_bytes(damage_bytes(rng, data[:head]) + data[head:])
    else:
        path.write_bytes(damage_bytes(rng, path.read_bytes()))


@pytest.fixture(scope="module")
def files(tmp_path_factory, tokenizer):
    """A folder with a good file of every kind."""
    folder = tmp_path_factory.mktemp("good")
    M.save_pretrained(make_model(vocab_size=tokenizer.size), tokenizer, folder)
    rows = [{"title": f"T{i}", "text": f"text number {i}"} for i in range(12)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "questions.jsonl").write_text("".join(json.dumps({"question": f"which is {i}?", "titles": [f"T{i}"]}) + "\n" for i in range(12)))
    (folder / "hover_dev.json").write_text(json.dumps([{"claim": f"claim {i}", "supporting_facts": [[f"T{i}", 0]]} for i in range(12)]))
    (folder / "categories.json").write_text('["a", "b"]')
    for name, header, row in (("train.csv", ["text", "category"], lambda i: [f'where, is "card" {i}?', "ab"[i % 2]]),
                              ("PUPA_New.csv", ["user_query", "target_response", "pii_units"], lambda i: [f"write to Ann {i}\n", "Dear", f"Ann||B{i}"])):
        with (folder / name).open("w", newline="") as f:
            csv.writer(f).writerows([header, *map(row, range(12))])
    save_prompts(hover.load().program, folder / "prompts.json")
    save_dspy(hover.load().program, folder / "dspy.json")
    shutil.copy(ROOT / "tests" / "conformance" / "excluded.json", folder / "group.json")
    shutil.copy(make("smollm2", tmp_path_factory.mktemp("gguf"))[1], folder)
    return folder


def read(folder: Path, kind: str) -> None:
    """Read the file as the program does, and use what was read."""
    if kind in (*KINDS[:5], "model.gguf"):
        model, tokenizer = M.load_pretrained(folder / kind if kind == "model.gguf" else folder)
        ids = tokenizer.encode_chat([{"role": "user", "content": "Hello <|im_end|>"}])
        assert tokenizer.decode(ids) is not None
        model.logits(model(torch.tensor([[i % model.config.vocab_size for i in ids[:20]]])))
    elif kind in ("prompts.json", "dspy.json"):
        program = hover.load().program
        load_prompts(program, folder / kind)
        program.generate_query.messages({"claim": "c", "key_facts": []})
    elif kind == "group.json":
        cli.run_group(str(folder / kind), cli.Config())
    elif kind in ("train.csv", "categories.json"):
        banking77.load(str(folder))
    elif kind == "PUPA_New.csv":
        papillon.load(str(folder))
    else:
        if kind == "questions.jsonl":
            (folder / "hover_dev.json").unlink()
        hover.load(str(folder))


def refuse_to_hang(*_):
    raise AssertionError("hangs")


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_read_or_refused_by_name(files, tmp_path, kind):
    outcomes = {"read": 0, "refused": 0}
    before = signal.signal(signal.SIGALRM, refuse_to_hang)
    try:
        for i in range(-(-COUNT // len(KINDS))):
            folder = tmp_path / str(i)
            shutil.copytree(files, folder)
            damage(random.Random(f"{kind} {i}"), folder / kind)
            signal.alarm(20)
            try:
                read(folder, kind)
                outcomes["read"] += 1
            except (InputError, M.CheckpointError) as e:
                outcomes["refused"] += 1
                assert str(folder) in str(e) or "chat template" in str(e), f"{kind} {i}: the message names no file: {e}"
            except BaseException as e:
                raise AssertionError(f"{kind} {i}: {type(e).__name__}: {e}") from e
            finally:
                signal.alarm(0)
            shutil.rmtree(folder)
    finally:
        signal.signal(signal.SIGALRM, before)
    print(kind, outcomes)
    assert sum(outcomes.values()) >= COUNT // len(KINDS)
