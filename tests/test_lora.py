"""LoRA: what is trained and what never moves; off, it is not there; what is saved is what was trained."""
import copy
import dataclasses
import itertools
import json

import pytest
import safetensors.torch
import torch
from conftest import ROOT, make_model
from test_loss import slow_loss
from test_train import CONFIG, TASK, TASK_OF_FACTS

import mmgrpo as G
import model as M
from lm.lora import (
    TARGETS,
    LoRALinear,
    WithoutLoRA,
    add_lora,
    load_adapter,
    lora_layers,
    merged,
    save_adapter,
)
from program import Completion, InputError
from run import cli, loading

LORA = dataclasses.replace(CONFIG, lora_rank=4, lora_alpha=8.0, lr=1e-2, warmup=0)
IDS = torch.arange(3, 33)[None]


def with_lora(seed=0, dtype=torch.float32, moved=True, **changes) -> M.Transformer:
    """A random model with LoRA on it, its B no longer 0."""
    model = make_model(seed, **changes).to(dtype)
    add_lora(model, 4, 8.0)
    if moved:
        torch.manual_seed(seed + 1)
        for m in lora_layers(model).values():
            torch.nn.init.normal_(m.lora_B, 0, 0.1)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_off_or_new_the_logits_are_those_of_the_base_bit_for_bit(dtype):
    base = make_model().to(dtype)
    with torch.no_grad():
        want = base(IDS)
        assert torch.equal(with_lora(dtype=dtype, moved=False)(IDS), want)
        model = with_lora(dtype=dtype)
        assert not torch.equal(model(IDS), want) and torch.equal(WithoutLoRA(model)(IDS), want)
        assert all(m.on for m in lora_layers(model).values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_the_base_never_moves_and_the_adapters_are_fp32(tokenizer, dtype, beta):
    config, model = dataclasses.replace(LORA, dtype=dtype, beta=beta), make_model(vocab_size=tokenizer.size).to(getattr(torch, dtype))
    optimizer, reference = G.prepare(model, config)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    before = [p.clone() for p in M.trainable(model)]
    steps = [G.train_step(model, tokenizer, optimizer, reference, TASK, config, i) for i in range(3)]
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen) and len(frozen) > 10
    assert all(p.dtype == torch.float32 and not torch.equal(p, b) for p, b in zip(M.trainable(model), before))
    assert len(before) == 2 * len(TARGETS) * model.config.layers
    if beta:                                                # the reference is the start, and no second copy of the weights
        assert steps[0]["kl"] == pytest.approx(0, abs=1e-6) and steps[2]["kl"] > 1e-6 and reference.model is model


ROWS = [G.Row("ask", Completion([1, 2, 3], [4, 5], [-3.0, -3.0], "stop"), 1.0, 0.5),
        G.Row("ask", Completion([1, 2, 3], [6], [-2.0], "stop"), -1.0, 0.5), G.Row("note", Completion([1, 7], [8, 0], [-1.0] * 2, "stop"), 0.3, 1.0)]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_the_gradient_equals_a_loop_over_the_sampled_tokens(tied, checkpointing):
    model = with_lora(vocab_size=40, tie_word_embeddings=tied, std=0.15)
    model.checkpointing = checkpointing
    got, _ = G.step_gradient(model, ROWS, G.Config(), 40, fresh=False)
    model.checkpointing = False
    want = torch.autograd.grad(slow_loss(model, ROWS, G.Config()), M.trainable(model))
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-3)


def test_checkpointing_changes_no_gradient_and_keeps_less(model):
    kept = []
    def gradient(on):
        model.checkpointing, size = on, 0
        def pack(t):
            nonlocal size
            size += t.numel()
            return t
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            g, _ = G.step_gradient(model, ROWS, G.Config(), 40, fresh=False)
        kept.append(size)
        return g
    assert all(torch.equal(a, b) for a, b in zip(gradient(False), gradient(True))) and kept[1] < kept[0]


def test_dropout_acts_in_the_update_alone_and_follows_the_seed(tokenizer):
    config = dataclasses.replace(LORA, lora_dropout=0.5)
    def run(config):
        model = make_model(vocab_size=tokenizer.size)
        optimizer, _ = G.prepare(model, config)
        task = dataclasses.replace(TASK, metric=lambda example, prediction, count=itertools.count(): next(count) % 3)
        metrics = [G.train_step(model, tokenizer, optimizer, None, task, config, i) for i in range(2)]
        assert all(0 < m["parity"]["max"] < 1e-3 for m in metrics)          # that of the scores without dropout
        return [m["digest"] for m in metrics], M.trainable(model)
    (a, p), (b, q), (c, r) = run(config), run(config), run(LORA)
    assert a == b and all(map(torch.equal, p, q))           # the same seed, the same masks
    assert a[0] == c[0] and not all(map(torch.equal, p, r))


def test_without_gradients_there_is_no_dropout_and_a_frozen_head_has_no_buffer(monkeypatch):
    model, buffers, head = with_lora(vocab_size=40), [], G.head_gradient
    with torch.no_grad():
        want = model(IDS)
        for m in lora_layers(model).values():
            m.dropout = 0.5
        assert torch.equal(model(IDS), want)                # as when sampling
    assert not torch.equal(model(IDS), want)
    monkeypatch.setattr(G, "head_gradient", lambda *args: buffers.append(args[5]) or head(*args))
    G.step_gradient(model, ROWS, G.Config(), 40, fresh=False)
    assert buffers and not any(b is not None for b in buffers)


@pytest.mark.parametrize("tied", [False, True])
def test_saved_loaded_and_merged_it_is_the_same_function(tokenizer, tmp_path, tied):
    base = make_model(vocab_size=tokenizer.size, tie_word_embeddings=tied)
    M.save_pretrained(base, tokenizer, tmp_path / "base")
    model, _ = M.load_pretrained(tmp_path / "base")
    add_lora(model, 4, 8.0, targets=("q_proj", "down_proj"))
    for m in lora_layers(model).values():
        torch.nn.init.normal_(m.lora_B, 0, 0.1)
    save_adapter(model, tokenizer, tmp_path / "adapter", str(tmp_path / "base"))
    M.save_pretrained(merged(model), tokenizer, tmp_path / "whole")
    with torch.no_grad():
        want = model(IDS)
        assert torch.equal(load_adapter(tmp_path / "adapter")[0](IDS), want)
        whole, _ = M.load_pretrained(tmp_path / "whole")
        assert not lora_layers(whole) and not torch.equal(base(IDS), want)
        torch.testing.assert_close(whole(IDS), want, atol=1e-4, rtol=1e-4)
    assert lora_layers(model)                               # merging left it alone


def test_a_run_with_lora_is_saved_resumed_and_loaded(tokenizer, tmp_path):
    """Interrupted after a step it ends with the adapter of a run left in peace, bit for bit; its folder is a model for eval."""
    config = dataclasses.replace(LORA, model=str(ROOT / "tasks" / "tiny"), steps=2, eval_every=2)
    ends = []
    for name, stops in (("whole", [False, False]), ("halves", [True, False])):
        (tmp_path / name).mkdir()
        for _ in range(2 if name == "halves" else 1):
            model, _ = M.load_pretrained(ROOT / "tasks" / "tiny")
            G.train(TASK_OF_FACTS, model, tokenizer, config, tmp_path / name, stop=lambda: stops.pop(0))
        ends.append(model)
    assert all(map(torch.equal, M.trainable(ends[0]), M.trainable(ends[1])))
    again, _ = loading.load_model(dataclasses.replace(config, model=str(tmp_path / "whole" / "last")))
    with pytest.raises(InputError, match="is a LoRA adapter; merge it first"):      # not trained as if it were a whole model
        G.train(TASK_OF_FACTS, again, tokenizer, CONFIG, tmp_path / "whole")
    assert all(map(torch.equal, M.trainable(ends[0]), M.trainable(again)))
    assert not (tmp_path / "whole" / "last" / "model.safetensors").exists()
    merge = ["merge", str(tmp_path / "whole" / "last"), str(tmp_path / "merged")]
    assert cli.main(merge) == 0 and cli.main(merge) == 2    # the second finds it there already
    whole, _ = M.load_pretrained(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(whole(IDS), again(IDS), atol=1e-4, rtol=1e-4)
    assert cli.main(["merge", str(ROOT / "tasks" / "tiny"), str(tmp_path / "x")]) == 2


def test_what_cannot_be_used_is_refused_by_name(tokenizer, tmp_path):
    for target in ("wq", "lm_head"):
        with pytest.raises(InputError, match=f"LoRA target '{target}'.*down_proj"):
            add_lora(make_model(tie_word_embeddings=False), 4, 8.0, targets=("q_proj", target))
    M.save_pretrained(make_model(vocab_size=tokenizer.size), tokenizer, tmp_path / "base")
    model, _ = M.load_pretrained(tmp_path / "base")
    add_lora(model, 4, 8.0)
    save_adapter(model, tokenizer, tmp_path / "a", str(tmp_path / "base"))
    raw = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    tensors = safetensors.torch.load_file(tmp_path / "a" / "adapter_model.safetensors")
    name = min(tensors)
    for change, culprit in (({"r": "4"}, "r: '4'"), ({"use_dora": True}, "use_dora"), ({"peft_type": "IA3"}, "peft_type"), ({"r": 0}, "r: 0"),
                            ({"target_modules": ["wq"]}, "'wq'"), ({"base_model_name_or_path": "no/where"}, "no/where"), ({"r": 5}, "tensor"),
                            ({"init_lora_weights": "pissa"}, "pissa"), ({"lora_alpha": float("nan")}, "lora_alpha"), ({"lora_dropout": 2}, "lora_dropout"),
                            ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"), ({"something_new": [1]}, "something_new")):
        (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(raw | change))
        with pytest.raises(M.CheckpointError, match=culprit):
            load_adapter(tmp_path / "a")
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(raw))
    for damaged in ({n: t for n, t in tensors.items() if n != name}, tensors | {"other": torch.zeros(1)}, tensors | {name: torch.zeros(2, 2)}):
        safetensors.torch.save_file(damaged, tmp_path / "a" / "adapter_model.safetensors")
        with pytest.raises(M.CheckpointError, match="tensor (other|base_model)"):
            load_adapter(tmp_path / "a")
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes(b"x")
    with pytest.raises(M.CheckpointError):
        load_adapter(tmp_path / "a")


def test_the_base_of_an_adapter_is_found_where_models_are(tokenizer, tmp_path, monkeypatch):
    """A hub name in the adapter is fetched as --model would be; the shipped LM is found from any folder."""
    M.save_pretrained(make_model(vocab_size=tokenizer.size), tokenizer, tmp_path / "base")
    model, _ = M.load_pretrained(tmp_path / "base")
    add_lora(model, 4, 8.0)
    save_adapter(model, tokenizer, tmp_path / "a", "some/lm")
    asked = []
    monkeypatch.setattr(loading.huggingface_hub, "snapshot_download", lambda name, **_: asked.append(name) or str(tmp_path / "base"))
    again, _ = loading.load_model(dataclasses.replace(CONFIG, model=str(tmp_path / "a")))
    assert asked == ["some/lm"] and torch.equal(again(IDS), model(IDS))
    monkeypatch.chdir(tmp_path)
    assert loading.fetch("tasks/tiny") == ROOT / "tasks" / "tiny" and loading.fetch("base").is_dir()
    def offline(name, **_):
        raise OSError("no network")
    monkeypatch.setattr(loading.huggingface_hub, "snapshot_download", offline)
    with pytest.raises(InputError, match="--model some/other: is no folder here, and the hub gave none .OSError: no network.; offline, give"):
        loading.fetch("some/other")


def test_a_deep_copy_is_a_model_of_its_own():
    model = with_lora()
    other = copy.deepcopy(model)
    with torch.no_grad():
        next(iter(lora_layers(other).values())).lora_B.add_(1)
        assert not torch.equal(model(IDS), other(IDS)) and isinstance(other.layers[0].mlp.up_proj, LoRALinear)
