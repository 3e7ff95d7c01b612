"""Random damage to every kind of file that is read: each is read, or refused with its name.

No bare traceback, no hang. FUZZ=1000 makes a thousand mutations (`make fuzz`); the default is a
tenth of that.
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
CHECKPOINT = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "model.safetensors",
)
KINDS = (
    *CHECKPOINT,
    "prompts.json",
    "dspy.json",
    "questions.jsonl",
    "corpus.jsonl",
    "train.csv",
    "categories.json",
    "PUPA_New.csv",
    "hover_dev.json",
    "group.json",
    "model.gguf",
)
# what JSON may hold that is not expected
ODD = (
    None,
    True,
    -1,
    0,
    10**7,
    2**40,
    1e308,
    0.5,
    "",
    "x",
    "<|im_end|>",
    "\x00é\U0001f642",
    [],
    {},
    [[]],
    {"a": 1},
    [None],
    "9" * 400,
)


# ------------------------------------------------------------------------------------------- damage
def damage_bytes(rng: random.Random, data: bytes) -> bytes:
    """The bytes cut short, or some at one place removed, replaced or doubled, or a bit flipped."""
    at = rng.randrange(len(data))
    n = rng.choice((1, 1, 4, 40))
    before, here, after = data[:at], data[at : at + n], data[at + n :]
    how = rng.choice(("cut", "remove", "replace", "double", "flip a bit"))
    if how == "cut":
        return before
    if how == "remove":
        return before + after
    if how == "replace":
        return before + rng.randbytes(n) + after
    if how == "double":
        return before + here * 2 + after
    flipped = data[at] ^ 1 << rng.randrange(8)
    return before + bytes([flipped]) + data[at + 1 :]


def damage_dict(rng: random.Random, value: dict) -> dict:
    key = rng.choice(list(value))
    without = {k: v for k, v in value.items() if k != key}
    how = rng.choice(("drop", "rename", "replace", *["go deeper"] * 4))
    if how == "drop":
        return without
    if how == "rename":
        return without | {key + "_": value[key]}
    if how == "replace":
        return value | {key: rng.choice(ODD)}
    return value | {key: damage_json(rng, value[key])}


def damage_list(rng: random.Random, value: list) -> list:
    i = rng.randrange(len(value))
    how = rng.choice(("drop", "double", *["go deeper"] * 4))
    if how == "drop":
        return value[:i] + value[i + 1 :]
    if how == "double":
        return value[: i + 1] + value[i:]
    return value[:i] + [damage_json(rng, value[i])] + value[i + 1 :]


def damage_json(rng: random.Random, value):
    """The value with one node replaced, dropped, renamed or doubled."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        return damage_dict(rng, value)
    if isinstance(value, list) and value and rng.random() < 0.8:
        return damage_list(rng, value)
    return rng.choice(ODD)


def damage(rng: random.Random, path: Path) -> None:
    """Damage a file as bytes, or as JSON where it is some."""
    if path.suffix == ".json" and rng.random() < 0.75:
        value = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps(damage_json(rng, value)), encoding="utf-8")
    elif path.suffix == ".jsonl" and rng.random() < 0.5:
        lines = path.read_text().splitlines()
        i = rng.randrange(len(lines))
        lines[i] = json.dumps(damage_json(rng, json.loads(lines[i])))
        path.write_text("\n".join(lines) + "\n")
    elif path.suffix == ".gguf":
        # at what it says of itself, before the weights
        data = path.read_bytes()
        head = rng.choice((100, 2000, 20000))
        path.write_bytes(damage_bytes(rng, data[:head]) + data[head:])
    else:
        path.write_bytes(damage_bytes(rng, path.read_bytes()))


# -------------------------------------------------------------------------------------------- files
def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_csv(path, header, rows):
    with path.open("w", newline="") as f:
        csv.writer(f).writerows([header, *rows])


@pytest.fixture(scope="module")
def files(tmp_path_factory, tokenizer):
    """A folder with a good file of every kind."""
    folder = tmp_path_factory.mktemp("good")
    M.save_pretrained(make_model(vocab_size=tokenizer.size), tokenizer, folder)
    shutil.copy(make("smollm2", tmp_path_factory.mktemp("gguf"))[1], folder)
    save_prompts(hover.load().program, folder / "prompts.json")
    save_dspy(hover.load().program, folder / "dspy.json")
    shutil.copy(ROOT / "tests" / "conformance" / "excluded.json", folder / "group.json")

    n = range(12)
    articles = [{"title": f"T{i}", "text": f"text number {i}"} for i in n]
    questions = [{"question": f"which is {i}?", "titles": [f"T{i}"]} for i in n]
    claims = [{"claim": f"claim {i}", "supporting_facts": [[f"T{i}", 0]]} for i in n]
    write_jsonl(folder / "corpus.jsonl", articles)
    write_jsonl(folder / "questions.jsonl", questions)
    (folder / "hover_dev.json").write_text(json.dumps(claims))

    queries = [[f'where, is "card" {i}?', "ab"[i % 2]] for i in n]
    write_csv(folder / "train.csv", ["text", "category"], queries)
    (folder / "categories.json").write_text('["a", "b"]')
    letters = [[f"write to Ann {i}\n", "Dear", f"Ann||B{i}"] for i in n]
    write_csv(folder / "PUPA_New.csv", ["user_query", "target_response", "pii_units"], letters)
    return folder


def use_checkpoint(path: Path) -> None:
    model, tokenizer = M.load_pretrained(path)
    ids = tokenizer.encode_chat([{"role": "user", "content": "Hello <|im_end|>"}])
    assert tokenizer.decode(ids) is not None
    known = [i % model.config.vocab_size for i in ids[:20]]
    model.logits(model(torch.tensor([known])))


def use_prompts(path: Path) -> None:
    program = hover.load().program
    load_prompts(program, path)
    program.generate_query.messages({"claim": "c", "key_facts": []})


def read(folder: Path, kind: str) -> None:
    """Read the file as the program does, and use what was read."""
    if kind in CHECKPOINT:
        use_checkpoint(folder)
    elif kind == "model.gguf":
        use_checkpoint(folder / kind)
    elif kind in ("prompts.json", "dspy.json"):
        use_prompts(folder / kind)
    elif kind == "group.json":
        cli.run_group(str(folder / kind), cli.Config())
    elif kind in ("train.csv", "categories.json"):
        banking77.load(str(folder))
    elif kind == "PUPA_New.csv":
        papillon.load(str(folder))
    else:
        # where HoVer's file is, the questions are not read
        if kind == "questions.jsonl":
            (folder / "hover_dev.json").unlink()
        hover.load(str(folder))


# --------------------------------------------------------------------------------------------- test
def refuse_to_hang(*_):
    raise AssertionError("hangs")


@pytest.fixture
def alarm():
    """Whatever takes longer than signal.alarm said raises."""
    before = signal.signal(signal.SIGALRM, refuse_to_hang)
    yield
    signal.signal(signal.SIGALRM, before)


def outcome_of(folder: Path, kind: str, case: str) -> str:
    """ "read", or "refused" by name; anything else is an AssertionError."""
    signal.alarm(20)
    try:
        read(folder, kind)
        return "read"
    except (InputError, M.CheckpointError) as e:
        named = str(folder) in str(e) or "chat template" in str(e)
        assert named, f"{case}: the message names no file: {e}"
        return "refused"
    except BaseException as e:
        raise AssertionError(f"{case}: {type(e).__name__}: {e}") from e
    finally:
        signal.alarm(0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_read_or_refused_by_name(files, alarm, tmp_path, kind):
    outcomes = {"read": 0, "refused": 0}
    for i in range(-(-COUNT // len(KINDS))):
        folder = tmp_path / str(i)
        case = f"{kind} {i}"
        shutil.copytree(files, folder)
        damage(random.Random(case), folder / kind)
        outcomes[outcome_of(folder, kind, case)] += 1
        shutil.rmtree(folder)
    print(kind, outcomes)
    assert sum(outcomes.values()) >= COUNT // len(KINDS)
