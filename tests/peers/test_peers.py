"""Against the libraries themselves: `make test-peers`. transformers for the model, DSPy for prompts and groups, TRL for the loss."""
import json
import random
from collections import Counter
from pathlib import Path
from typing import Literal

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
import dspy
import dspy_grouping
import reference
import transformers
import trl_loss
from dspy.adapters.utils import parse_value
from dspy.adapters.xml_adapter import XMLAdapter

import model as M
import program as P
from prompts.files import load_prompts, save_dspy

# ---------------------------------------------------------------------------------------------------- transformers

SHAPE = dict(vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=32768)
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}
FAMILIES = {
    "qwen3": lambda: transformers.Qwen3Config(**SHAPE, head_dim=32, tie_word_embeddings=True),
    "qwen2.5 tied": lambda: transformers.Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen2.5 untied": lambda: transformers.Qwen2Config(**SHAPE, tie_word_embeddings=False),
    "llama 3.1": lambda: transformers.LlamaConfig(**SHAPE, tie_word_embeddings=False, rope_parameters=LLAMA3),
    "llama 3.2": lambda: transformers.LlamaConfig(**SHAPE, tie_word_embeddings=True, rope_parameters=LLAMA3),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers_near_and_far(family, tmp_path):
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(FAMILIES[family]()).eval()
    for name, p in theirs.named_parameters():
        torch.nn.init.normal_(p, 1.0 if p.dim() == 1 and "norm" in name else 0.0, 0.1)
    theirs.save_pretrained(tmp_path)
    ours = M.Transformer(M.ModelConfig.from_hf(M.read_json(tmp_path / "config.json")))
    tensors = M.read_tensors(tmp_path)
    ours.load_state_dict({n: tensors[M.disk_name(n)] for n in ours.state_dict()})
    with torch.no_grad():
        for ids in (torch.randint(0, 300, (2, 50)), torch.randint(0, 300, (1, 16400))):
            a, b = theirs(ids).logits[:, -50:], ours.logits(ours(ids)[:, -50:])
            torch.testing.assert_close(b, a, atol=1e-4, rtol=0)


def test_what_we_save_transformers_loads_with_equal_logits(tmp_path):
    model, tokenizer = M.load_pretrained(ROOT / "tasks" / "tiny")
    M.save_pretrained(model, tokenizer, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    messages = [{"role": "system", "content": "Name it."}, {"role": "user", "content": "my card is wrong"}]
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = their_tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    ids = ids if isinstance(ids, list) else ids["input_ids"]
    assert tokenizer.encode_chat(messages) == list(ids)
    with torch.no_grad():
        torch.testing.assert_close(model.logits(model(torch.tensor([ids]))), theirs(torch.tensor([ids])).logits, atol=1e-4, rtol=0)


# ------------------------------------------------------------------------------------------------------------- DSPy

PIECES = ["a", "b<c>", "&", "\n", " ", "é", "«", "»", "<x>", "</answer>", "word", "'", '"', "\\", "  indented", "1"]
TYPES = {"str": str, "int": int, "float": float, "bool": bool, "list[str]": list[str], "Literal": None}


def random_case(rng: random.Random):
    """(DSPy's signature, ours, inputs, demos)"""
    text = lambda: "".join(rng.choice(PIECES) for _ in range(rng.randrange(8)))
    names = [f"f{i}" for i in range(rng.randrange(2, 7))]
    cut, kinds = rng.randrange(1, len(names)), {n: rng.choice(list(TYPES)) for n in names}
    labels = {n: tuple(rng.sample(["a", "b's", 'c"d', "e'f\"g", "x y", "\\q"], 2)) for n in names if kinds[n] == "Literal"}
    described = {n: rng.choice(["", "some desc", " x "]) for n in names}
    instruction = rng.choice(["", "Do it.", "Line one.\n  line two\n\n    three\n", "  lead"])
    annotation = lambda n: Literal[labels[n]] if kinds[n] == "Literal" else TYPES[kinds[n]]
    fields = {n: (annotation(n), (dspy.InputField if i < cut else dspy.OutputField)(**({"desc": described[n]} if described[n] else {})))
              for i, n in enumerate(names)}
    kind = lambda n: {"str": "", "Literal": f": Literal[{', '.join(map(repr, labels.get(n, ())))}]"}.get(kinds[n], f": {kinds[n]}")
    sides = [", ".join(n + kind(n) for n in side) for side in (names[:cut], names[cut:])]
    ours = P.Signature(" -> ".join(sides), instruction, {n: d for n, d in described.items() if d})
    value = lambda n: {"str": lambda: rng.choice([text(), [text() for _ in range(rng.randrange(4))], 5, True]),
                       "int": lambda: rng.randrange(99), "float": rng.random, "bool": lambda: rng.random() < 0.5,
                       "list[str]": lambda: [text() for _ in range(rng.randrange(4))], "Literal": lambda: rng.choice(labels[n])}[kinds[n]]()
    demos = [{n: value(n) for n in names if rng.random() < 0.85} for _ in range(rng.randrange(3))]
    return dspy.Signature(fields, instruction) if instruction else dspy.Signature(fields), ours, {n: value(n) for n in names[:cut]}, demos


def test_prompts_are_byte_for_byte_those_of_dspys_xml_adapter():
    rng, adapter = random.Random(1), XMLAdapter()
    for _ in range(500):
        theirs, ours, inputs, demos = random_case(rng)
        assert P.render(ours, inputs, None, demos) == adapter.format(theirs, demos, inputs)


LABELS = ("card_lost", "Refund_not", "A b", "it's", "x?", 'a "q"', "C#", "-1", "Lost", "lost")
SLIPS = [lambda t: f"'{t}'", lambda t: f'"{t}"', lambda t: f" {t}", lambda t: f"{t}\n", lambda t: f"Literal[{t}]", lambda t: f"str[{t}]",
         lambda t: f"{t}.", lambda t: t[:-1], lambda t: f"{t}, lost", lambda t: f"{{{t}}}", str.upper]


def test_every_label_that_dspy_reads_is_read_as_the_same():
    rng, read, more = random.Random(0), 0, 0
    for _ in range(3000):
        text = rng.choice(LABELS)
        for slip in rng.choices(SLIPS, k=rng.randrange(4)):
            text = slip(text)
        try:
            theirs = parse_value(text, Literal[LABELS])
        except Exception:                                   # theirs raises several classes
            theirs = None
        try:
            ours = P.parse(P.Signature("x -> y", types={"y": LABELS}), f"<y>{text}</y>")["y"]
        except P.FormatError:
            ours = None
        assert theirs in (None, ours), (text, theirs, ours)
        read, more = read + (theirs is not None), more + (ours is not None and theirs is None)
    assert read > 500 and more > 300


class Theirs(dspy.Module):
    """Two random predictors; the list and the dict, whose names are the odd ones."""
    def __init__(self, ask, step):
        super().__init__()
        self.ask, self.steps = dspy.ChainOfThought(ask), [dspy.Predict(step)]
        self.by = {"x": dspy.Predict("a -> b")}


class Ours(P.Program):
    def __init__(self, ask, step):
        self.ask, self.steps, self.by = P.ChainOfThought(ask), [P.Module(step)], {"x": P.Module("a -> b")}


def same_prompts(theirs: Theirs, ours: Ours, ask: dict, step: dict) -> bool:
    pairs = ((theirs.ask.predict, ours.ask, ask), (theirs.steps[0], ours.steps[0], step), (theirs.by["x"], ours.by["x"], {"a": "1"}))
    return all(m.messages(inputs) == XMLAdapter().format(p.signature, [{**d} for d in p.demos], inputs) for p, m, inputs in pairs)


def test_a_saved_state_of_dspy_gives_the_same_prompts_here_and_one_saved_here_the_same_there(tmp_path):
    """Instructions, demos (as examples too, some augmented) and descriptions that an optimiser has set, over random signatures."""
    rng, path = random.Random(2), tmp_path / "state.json"
    for i in range(200):
        a, b = random_case(rng), random_case(rng)
        fresh = lambda: (Theirs(a[0], b[0]), Ours(a[1], b[1]))
        (theirs, ours), ask, step = fresh(), a[2], b[2]
        theirs.ask.predict.demos = [dspy.Example(augmented=True, reasoning=f"r{i}", **d).with_inputs(*ask) for d in a[3]]
        theirs.steps[0].demos = b[3]
        name = rng.choice(list(theirs.ask.predict.signature.fields))
        theirs.ask.predict.signature = theirs.ask.predict.signature.with_updated_fields(name, desc=f"set {i}").with_instructions(f"Do {i}.\n  So.")
        theirs.save(path)
        load_prompts(ours, path)
        assert same_prompts(theirs, ours, ask, step)
        ours.ask.instruction, ours.steps[0].demos = "Otherwise.", ours.steps[0].demos[::-1]
        save_dspy(ours, path)
        (theirs, _), saved = fresh(), json.loads(path.read_text())
        theirs.load(path)
        assert same_prompts(theirs, ours, ask, step)
        theirs.save(path)               # and what DSPy makes of it, it would have written so itself, but for other versions
        again = json.loads(path.read_text())
        assert {k: v for k, v in again.items() if k != "metadata"} == {k: v for k, v in saved.items() if k != "metadata"}
        assert again["metadata"]["dependency_versions"]["dspy"] == saved["metadata"]["dependency_versions"]["dspy"]


def dspys_groups(name: str, mode: str) -> str | set:
    """What DSPy makes of a scenario: its groups, or what it raises."""
    try:
        groups = dspy_grouping.group(reference.SCENARIOS[name], mode)
    except Exception as e:
        return type(e).__name__
    return {(g["example"], g["module"], g["invocation"], frozenset(Counter(m["rollout"] for m in g["members"]).items())) for g in groups}


def our_groups(name: str, short_groups: str) -> set:
    wanted = reference.expected(reference.SCENARIOS[name], {"short_groups": short_groups})["groups"]
    return {(g["example"], g["module"], g["invocation"], frozenset(Counter(m["rollout"] for m in g["members"]).items())) for g in wanted}


def dspy_table() -> list[tuple[str, str, str]]:
    """(scenario, mode, how DSPy's groups compare with the rules of this project)"""
    rows = []
    for name in reference.SCENARIOS:
        for mode, ours in (("ragged", "keep"), ("truncate", "truncate"), ("fill", "fill")):
            theirs, wanted = dspys_groups(name, mode), our_groups(name, ours)
            if isinstance(theirs, str):
                verdict = f"raises {theirs}"
            elif theirs == wanted:
                verdict = "equal"
            else:
                lost, other = {g[:3] for g in wanted} - {g[:3] for g in theirs}, {g[:3] for g in wanted} & {g[:3] for g in theirs}
                changed = [k for k in other if {g for g in theirs if g[:3] == k} != {g for g in wanted if g[:3] == k}]
                verdict = "; ".join([f"{len(lost)} of {len(wanted)} groups lost"] * bool(lost)
                                    + [f"{len(changed)} groups with other members"] * bool(changed)) or "more groups"
            rows.append((name, mode, verdict))
    return rows


def test_dspy_groups_as_we_do_where_runs_are_alike_and_fails_where_they_differ():
    table = {(name, mode): verdict for name, mode, verdict in dspy_table()}
    assert all(table[name, mode] == "equal" for name in ("complete", "plain-grpo") for mode in ("ragged", "truncate", "fill"))
    assert table["ragged", "ragged"] == "raises IndexError"
    assert all("2 of 3 groups lost" == table["a-module-that-some-never-reach", mode] for mode in ("ragged", "fill"))


# -------------------------------------------------------------------------------------------------------------- TRL

def rows_of(vector: dict) -> list[dict]:
    calls = {(t["example"], t["rollout"]): t["calls"] for t in vector["trajectories"]}
    return [calls[g["example"], m["rollout"]][m["call"]] | {"advantage": m["advantage"], "weight": m["weight"]}
            for g in vector["expected"]["groups"] for m in g["members"]]


@pytest.mark.parametrize("name", [n for n, v in reference.vectors().items() if v["options"].get("level") != "trajectory"])
def test_the_loss_is_trls_where_groups_are_full_and_differs_by_the_weight_of_short_groups_elsewhere(name):
    """TRL's `grpo` is the mean over completions, ours over groups and then members: equal where groups have one size. Its `dapo`
    is our `token`. Its `dr_grpo` divides by completions x constant, ours by runs x constant: what a factor tells."""
    vector = json.loads((reference.FOLDER / name).read_text())
    options, rows = reference.DEFAULTS | vector["options"], rows_of(vector)
    if not rows:
        return
    theirs = trl_loss.loss(rows, *(options[k] for k in ("normalize", "constant", "clip_low", "clip_high", "beta")))
    sizes = {len(g["members"]) for g in vector["expected"]["groups"]}
    runs = sum(map(reference.votes, vector["trajectories"]))
    if options["normalize"] == "token" or options["normalize"] == "sequence" and len(sizes) == 1:
        assert theirs == pytest.approx(vector["expected"]["loss"], abs=1e-9)
    elif options["normalize"] == "constant":
        assert theirs * len(rows) / runs == pytest.approx(vector["expected"]["loss"], abs=1e-9)
    else:
        mean = lambda r: sum(r["weight"] for _ in r["logprobs"])            # what the row weighs in our loss; in TRL's, 1 / rows
        assert any(abs(mean(r) - 1 / len(rows)) > 1e-9 for r in rows)


@pytest.mark.parametrize("name", [
    n for n, v in reference.vectors().items()
    if v["options"].keys() <= {"scale_rewards", "short_groups"} and v["options"].get("scale_rewards") != "batch"])
def test_advantages_are_trls_group_by_group(name):
    """TRL's groups are all of one size; its formula on each of ours gives the same, short ones too."""
    vector = json.loads((reference.FOLDER / name).read_text())
    rewards = {(t["example"], t["rollout"]): t["reward"] for t in vector["trajectories"]}
    for g in vector["expected"]["groups"]:
        theirs = trl_loss.advantages([rewards[g["example"], m["rollout"]] for m in g["members"]], vector["options"].get("scale_rewards", "std"))
        assert [m["advantage"] for m in g["members"]] == pytest.approx(theirs, abs=1e-6)      # its Bessel factor is fp32


if __name__ == "__main__":
    print("| runs | DSPy's mode | its groups |\n|---|---|---|")
    for row in dspy_table():
        print("| " + " | ".join(row) + " |")
