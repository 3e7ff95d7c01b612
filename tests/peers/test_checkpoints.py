"""Checkpoints, chat templates, adapters and servers against the libraries that people use them with."""
import json
import os
import random
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import peft
import pytest
import torch
import transformers

ROOT = Path(__file__).resolve().parents[2]
from test_model import write_tokenizer
from test_peers import LLAMA3, SHAPE

import model as M
from lm.endpoint import Endpoint
from lm.lora import add_lora, load_adapter, lora_layers, merged, save_adapter
from program import parse, run_programs
from run import cli, loading

TINY = ROOT / "tasks" / "tiny"
small = SHAPE | dict(vocab_size=2048, max_position_embeddings=4096)
FAMILIES = {
    "qwen3": lambda: transformers.Qwen3Config(**small, head_dim=32, tie_word_embeddings=True, eos_token_id=2),
    "qwen2.5": lambda: transformers.Qwen2Config(**small, tie_word_embeddings=False, eos_token_id=2),
    "llama 3.1": lambda: transformers.LlamaConfig(**small, tie_word_embeddings=False, rope_parameters=LLAMA3, eos_token_id=2),
    "llama 3.2": lambda: transformers.LlamaConfig(**small, tie_word_embeddings=True, rope_parameters=LLAMA3, eos_token_id=2),
}


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request, tmp_path_factory):
    """A random checkpoint that transformers wrote, with the tiny LM's tokenizer."""
    folder = tmp_path_factory.mktemp("c") / "checkpoint"
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(FAMILIES[request.param]()).eval()
    for name, p in theirs.named_parameters():
        torch.nn.init.normal_(p, 1.0 if p.dim() == 1 and "norm" in name else 0.0, 0.1)
    theirs.save_pretrained(folder, max_shard_size="300KB")
    transformers.AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 1      # in shards
    return folder


def theirs_of(folder, dtype=torch.float32):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def test_greedy_continuations_are_token_for_token_those_of_transformers(checkpoint):
    import mmgrpo as G
    model, tokenizer = M.load_pretrained(checkpoint)
    theirs, sampler, want = theirs_of(checkpoint), G.Sampler(model, tokenizer, slots=4, max_tokens=24, temperature=0.0), {}
    for text in ("my card is wrong", "Tarel Moro", "a", "my card is wrong", "who was born in the town on the river?"):
        messages = [{"role": "user", "content": text}]
        ids = torch.tensor([tokenizer.encode_chat(messages)])
        with torch.no_grad():
            answer = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, pad_token_id=0)
        want[sampler.submit(messages, (text,))] = answer[0, ids.shape[1]:].tolist()
    got = {}
    while len(got) < len(want):
        got |= dict(sampler.advance())
    assert {t: c.token_ids for t, c in got.items()} == want and len({*map(tuple, want.values())}) > 2


def test_bf16_logits_are_those_of_transformers_within_a_few_roundings(checkpoint):
    """Both round after every operation, in orders of their own; measured 0.02 to 0.05 at logits of about 3."""
    model, _ = M.load_pretrained(checkpoint, dtype=torch.bfloat16)
    ids = torch.randint(0, 2000, (1, 300), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = theirs_of(checkpoint)(ids).logits
        a, b = theirs_of(checkpoint, torch.bfloat16)(ids).logits.float(), model.logits(model(ids)).float()
    ours, peers = (b - exact).abs().mean(), (a - exact).abs().mean()
    assert ours < 1.3 * peers and (a - b).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize("lora", [0, 4])
def test_make_train_takes_it_and_what_is_saved_loads_back(checkpoint, tmp_path, lora):
    out = tmp_path / "run"
    flags = ["--steps", "1", "--examples", "2", "--rollouts", "2", "--eval-examples", "2", "--max-tokens", "8", "--lr", "1e-2", "--warmup", "0"]
    task = tmp_path / "anything.py"                         # a random LM cannot follow a format: any text is a completed run
    task.write_text("""
import random
from program import Module, Prediction, Program, Task
class Say(Program):
    def __init__(self): self.say = Module("text -> words", "Say it.")
    async def forward(self, text):
        try: await self.say(text=text)
        except ValueError: pass
        return Prediction(text=text)
load = lambda data: Task(Say(), lambda e, p: random.random(), [{"text": "a"}, {"text": "b"}], [{"text": "c"}] * 2, [])
""")
    arguments = ["train", "--task", str(task), "--model", str(checkpoint), "--out", str(out), *flags, *["--lora-rank", str(lora)] * bool(lora)]
    assert cli.main(arguments) == 0
    model, _ = loading.load_model(cli.Config(model=str(out / "last")))
    theirs = peft.PeftModel.from_pretrained(theirs_of(checkpoint), out / "last").eval() if lora else theirs_of(out / "last")
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        torch.testing.assert_close(model.logits(model(ids)), theirs(ids).logits, atol=1e-4, rtol=0)
        start = M.load_pretrained(checkpoint)[0]
        assert not torch.allclose(start.logits(start(ids)), model.logits(model(ids)), atol=1e-3)


def test_adapters_go_to_peft_and_come_from_it(checkpoint, tmp_path):
    ids = torch.arange(3, 60)[None]
    model, tokenizer = M.load_pretrained(checkpoint)
    add_lora(model, 4, 12.0, targets=("q_proj", "v_proj", "down_proj"))
    for m in lora_layers(model).values():
        torch.nn.init.normal_(m.lora_B, 0, 0.1)
    save_adapter(model, tokenizer, tmp_path / "ours", str(checkpoint))
    M.save_pretrained(merged(model), tokenizer, tmp_path / "whole")
    with torch.no_grad():
        want = model.logits(model(ids))
        for theirs in (peft.PeftModel.from_pretrained(theirs_of(checkpoint), tmp_path / "ours").eval(), theirs_of(tmp_path / "whole")):
            torch.testing.assert_close(theirs(ids).logits, want, atol=1e-4, rtol=0)
        theirs = peft.get_peft_model(theirs_of(checkpoint), peft.LoraConfig(r=3, lora_alpha=6, lora_dropout=0.1, init_lora_weights=False,
                                     target_modules=["k_proj", "o_proj", "up_proj"], task_type="CAUSAL_LM")).eval()
        theirs.save_pretrained(tmp_path / "theirs")
        again, _ = load_adapter(tmp_path / "theirs")
        torch.testing.assert_close(again.logits(again(ids)), theirs(ids).logits, atol=1e-4, rtol=0)


PIECES = ["a", "word", " ", "\n", "é", "«q»", "<b>", "<|", "im_start", "|>", "\t", "1,234", "{{x}}", "{% if %}", "'", '"', "中", "  "]


@pytest.mark.parametrize("style", ["llama", "chatml"])
def test_chat_prompts_are_id_for_id_those_of_transformers(style, tmp_path):
    folder = write_tokenizer(tmp_path / "t", style)
    (folder / "tokenizer_config.json").write_text(json.dumps(json.loads((folder / "tokenizer_config.json").read_text())
                                                             | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    ours, theirs, rng = M.Tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder), random.Random(0)
    for _ in range(300):
        text = lambda: "".join(rng.choice(PIECES) for _ in range(rng.randrange(12)))
        messages = [{"role": "system", "content": text()}] * rng.randrange(2)
        for _ in range(rng.randrange(1, 3)):
            messages += [{"role": "user", "content": text()}, {"role": "assistant", "content": text()}]
        if any(c in m["content"] for m in messages for c in ours.control):
            continue                                        # where content spells a control token the two must differ
        ids = theirs.apply_chat_template(messages[:-1], add_generation_prompt=True, enable_thinking=False)
        assert ours.encode_chat(messages[:-1]) == list(ids if isinstance(ids, list) else ids["input_ids"]), messages


# --------------------------------------------------------------------------------------------- a server that others wrote

@pytest.fixture(scope="module")
def server():
    """`transformers serve` with the tiny LM, on loopback -> its address."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [Path(sys.executable).parent / "transformers", "serve", "--host", "127.0.0.1", "--port", str(port), "--device", "cpu",
               "--dtype", "float32"]
    process = subprocess.Popen(list(map(str, command)), env=os.environ | {"HF_HUB_OFFLINE": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    for _ in range(240):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
            break
        except OSError:
            if process.poll() is not None:
                pytest.fail(process.stderr.read().decode()[-1000:])
            time.sleep(0.5)
    yield f"http://127.0.0.1:{port}/v1"
    process.kill()


def test_an_endpoint_is_asked_and_answers(server):
    from tasks import banking77
    ask, task = Endpoint(server, str(TINY), timeout=120, max_tokens=48), banking77.load()
    (module,) = task.program.modules().values()
    read = 0
    for example in task.dev[:8]:
        text = ask(module.messages({"text": example["text"]}))
        try:
            read += parse(module.signature, text)["intent"] in banking77.LABELS
        except ValueError:
            pass
    assert read >= 4                                        # greedy, the tiny LM follows the format nearly always


def test_papillon_on_real_rows_runs_with_served_lms_and_types_every_failure(server, tmp_path, monkeypatch):
    """Untrusted LM and judge are the tiny LM, which cannot judge: every run ends in one of the five ways all the same."""
    import mmgrpo as G
    from tasks import papillon
    rows = ["user_query,target_response,pii_units"] + [f"Write to Ann {i} in Rome,Dear Ann {i},Ann {i}||Rome" for i in range(9)]
    (tmp_path / "PUPA_New.csv").write_text("\n".join(rows) + "\n")
    monkeypatch.chdir(tmp_path)
    for name in ("MMGRPO_UNTRUSTED", "MMGRPO_JUDGE"):
        monkeypatch.setenv(name, f"{server} {TINY}")
    task = papillon.load(str(tmp_path))
    model, tokenizer = M.load_pretrained(TINY)
    runs = run_programs(task.program, task.train[:1] + task.dev[:1], task.metric, G.Sampler(model, tokenizer, max_tokens=64), rollouts=3)
    assert len(runs) == 6 and all((t.reward is None) == (t.status == "tool_error") for t in runs)
    assert all("endpoint" in t.error or "chat" in t.error or "metric" in t.error or "lambda" in t.error
               for t in runs if t.status == "tool_error")
    assert all({"quality", "leakage_judged", "leakage_string"} == t.measures.keys() for t in runs if t.status == "completed")


def test_a_dspy_program_on_the_served_lm_gets_our_prompts_outputs_and_score(server):
    import dspy
    from dspy.adapters.xml_adapter import XMLAdapter

    import mmgrpo as G
    from tasks import banking77
    task, (model, tokenizer) = banking77.load(), M.load_pretrained(TINY)
    (module,) = task.program.modules().values()
    from typing import Literal
    signature = dspy.Signature({"text": (str, dspy.InputField()), "reasoning": (str, dspy.OutputField()),
                                "intent": (Literal[banking77.LABELS], dspy.OutputField())}, module.instruction)
    theirs, scores, answers = dspy.Predict(signature), [], []
    with dspy.context(lm=dspy.LM(f"openai/{TINY}", api_base=server, api_key="none", temperature=0.0, max_tokens=48, cache=False), adapter=XMLAdapter()):
        for e in task.dev[:12]:
            try:
                answers.append(theirs(text=e["text"]).intent)
            except Exception:                               # its adapter could not read the answer
                answers.append(None)
            scores.append(float(answers[-1] == e["intent"]))
            entry = dspy.settings.lm.history[-1]["messages"] if answers[-1] else None
            assert entry is None or entry == module.messages({"text": e["text"]})
    ours = run_programs(task.program, task.dev[:12], task.metric, G.Sampler(model, tokenizer, temperature=0.0, max_tokens=48))
    assert [t.prediction["intent"] if t.status == "completed" else None for t in ours] == answers
    assert [t.reward if t.status == "completed" else 0.0 for t in ours] == scores
