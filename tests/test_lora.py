"""LoRA: what is trained and what never moves; off, it is not there; saved is what was trained."""

import copy
import dataclasses
import itertools
import json
import math

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
TINY = ROOT / "tasks" / "tiny"
ROWS = [
    G.Row("ask", Completion([1, 2, 3], [4, 5], [-3.0, -3.0], "stop"), 1.0, 0.5),
    G.Row("ask", Completion([1, 2, 3], [6], [-2.0], "stop"), -1.0, 0.5),
    G.Row("note", Completion([1, 7], [8, 0], [-1.0] * 2, "stop"), 0.3, 1.0),
]


def move_lora(model) -> None:
    """Let LoRA do something: its B no longer 0."""
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, 0, 0.1)


def with_lora(seed=0, dtype=torch.float32, moved=True, **changes) -> M.Transformer:
    """A random model with LoRA on it."""
    model = make_model(seed, **changes).to(dtype)
    add_lora(model, 4, 8.0)
    if moved:
        torch.manual_seed(seed + 1)
        move_lora(model)
    return model


def lora_gradient(model) -> list:
    """Of the loss of ROWS."""
    gradient, _ = G.step_gradient(model, ROWS, G.Config(), 40, fresh=False)
    return gradient


def all_equal(a, b) -> bool:
    return all(map(torch.equal, a, b))


def save_base(folder, tokenizer, **changes) -> M.Transformer:
    base = make_model(vocab_size=tokenizer.size, **changes)
    M.save_pretrained(base, tokenizer, folder)
    return base


def save_new_adapter(folder, tokenizer, base, named="") -> M.Transformer:
    """LoRA as it begins on the checkpoint `base`, which it calls `named`."""
    model, _ = M.load_pretrained(base)
    add_lora(model, 4, 8.0)
    save_adapter(model, tokenizer, folder, named or str(base))
    return model


# ----------------------------------------------------------------------------------------- training
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_off_or_new_the_logits_are_those_of_the_base_bit_for_bit(dtype):
    base = make_model().to(dtype)
    new = with_lora(dtype=dtype, moved=False)
    model = with_lora(dtype=dtype)

    with torch.no_grad():
        want = base(IDS)
        assert torch.equal(new(IDS), want)
        assert not torch.equal(model(IDS), want)
        assert torch.equal(WithoutLoRA(model)(IDS), want)
    assert all(layer.on for layer in lora_layers(model).values())


def test_in_bf16_no_fp32_copy_of_an_input_waits_for_the_backward_pass():
    """One for each layer would take more memory than LoRA saves."""
    model = with_lora(dtype=torch.bfloat16)
    parameters = {p.data_ptr() for p in model.parameters()}
    kept = []

    def keep(tensor):
        if tensor.dtype == torch.float32 and tensor.data_ptr() not in parameters:
            kept.append(tuple(tensor.shape))
        return tensor

    lora = model.layers[0].mlp.down_proj
    x = torch.randn(1, 7, lora.in_features).bfloat16()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        lora(x).sum()
    assert not [shape for shape in kept if shape[-2:] == x.shape[-2:]]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_the_base_never_moves_and_the_adapters_are_fp32(tokenizer, dtype, beta):
    config = dataclasses.replace(LORA, dtype=dtype, beta=beta)
    model = make_model(vocab_size=tokenizer.size).to(getattr(torch, dtype))
    optimizer, reference = G.prepare(model, config)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    before = [p.clone() for p in M.trainable(model)]

    steps = []
    for i in range(3):
        steps.append(G.train_step(model, tokenizer, optimizer, reference, TASK, config, i))

    now = dict(model.named_parameters())
    assert len(frozen) > 10
    assert all(torch.equal(now[n], p) for n, p in frozen.items())
    assert len(before) == 2 * len(TARGETS) * model.config.layers
    for p, p_before in zip(M.trainable(model), before):
        assert p.dtype == torch.float32
        assert not torch.equal(p, p_before)
    if beta:
        # the reference is the start, and no second copy of the weights
        assert steps[0]["kl"] == pytest.approx(0, abs=1e-6)
        assert steps[2]["kl"] > 1e-6
        assert reference.model is model


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_the_gradient_equals_a_loop_over_the_sampled_tokens(tied, checkpointing):
    model = with_lora(vocab_size=40, tie_word_embeddings=tied, std=0.15)

    model.checkpointing = checkpointing
    got = lora_gradient(model)

    model.checkpointing = False
    want = torch.autograd.grad(slow_loss(model, ROWS, G.Config()), M.trainable(model))
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-3)


def test_checkpointing_changes_no_gradient_and_keeps_less(model):
    def gradient_and_kept(checkpointing):
        """The gradient, and how many numbers were kept for the backward pass."""
        sizes = []

        def pack(tensor):
            sizes.append(tensor.numel())
            return tensor

        model.checkpointing = checkpointing
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            gradient = lora_gradient(model)
        return gradient, sum(sizes)

    plain, all_kept = gradient_and_kept(False)
    checkpointed, kept = gradient_and_kept(True)

    assert all_equal(plain, checkpointed)
    assert kept < all_kept


def rewards_in_turn():
    """A metric that gives 0, 1, 2, 0, …"""
    count = itertools.count()
    return lambda example, prediction: next(count) % 3


def test_dropout_acts_in_the_update_alone_and_follows_the_seed(tokenizer):
    def run(config):
        """The digests of two steps, and what was trained."""
        model = make_model(vocab_size=tokenizer.size)
        optimizer, _ = G.prepare(model, config)
        task = dataclasses.replace(TASK, metric=rewards_in_turn())
        digests = []
        for i in range(2):
            metrics = G.train_step(model, tokenizer, optimizer, None, task, config, i)
            # that of the scores without dropout
            assert 0 < metrics["parity"]["max"] < 1e-3
            digests.append(metrics["digest"])
        return digests, M.trainable(model)

    config = dataclasses.replace(LORA, lora_dropout=0.5)
    digests, trained = run(config)
    digests_again, trained_again = run(config)
    digests_without, trained_without = run(LORA)

    # the same seed, the same masks
    assert digests == digests_again
    assert all_equal(trained, trained_again)
    assert digests[0] == digests_without[0]
    assert not all_equal(trained, trained_without)


def test_sampling_has_no_dropout_and_a_frozen_head_no_buffer(monkeypatch):
    """There is dropout where gradients are taken alone."""
    model = with_lora(vocab_size=40)
    with torch.no_grad():
        want = model(IDS)
        for layer in lora_layers(model).values():
            layer.dropout = 0.5
        assert torch.equal(model(IDS), want)
    assert not torch.equal(model(IDS), want)

    buffers = []
    plain_head_gradient = G.head_gradient

    def head_gradient(*args):
        buffers.append(args[5])
        return plain_head_gradient(*args)

    monkeypatch.setattr(G, "head_gradient", head_gradient)
    lora_gradient(model)

    assert buffers
    assert all(buffer is None for buffer in buffers)


# --------------------------------------------------------------------------------------- in and out
@pytest.mark.parametrize("tied", [False, True])
def test_saved_loaded_and_merged_it_is_the_same_function(tokenizer, tmp_path, tied):
    base = save_base(tmp_path / "base", tokenizer, tie_word_embeddings=tied)
    model, _ = M.load_pretrained(tmp_path / "base")
    add_lora(model, 4, 8.0, targets=("q_proj", "down_proj"))
    move_lora(model)

    save_adapter(model, tokenizer, tmp_path / "adapter", str(tmp_path / "base"))
    M.save_pretrained(merged(model), tokenizer, tmp_path / "whole")

    loaded, _ = load_adapter(tmp_path / "adapter")
    whole, _ = M.load_pretrained(tmp_path / "whole")
    with torch.no_grad():
        want = model(IDS)
        assert torch.equal(loaded(IDS), want)
        assert not torch.equal(base(IDS), want)
        torch.testing.assert_close(whole(IDS), want, atol=1e-4, rtol=1e-4)
    assert not lora_layers(whole)
    # merging left it alone
    assert lora_layers(model)


def train_tiny(tokenizer, config, out, stop_after_a_step) -> M.Transformer:
    """Train the shipped LM, or go on with the run in `out`."""
    model, _ = M.load_pretrained(TINY)
    G.train(TASK_OF_FACTS, model, tokenizer, config, out, stop=lambda: stop_after_a_step)
    return model


def test_a_run_with_lora_is_saved_resumed_and_loaded(tokenizer, tmp_path, capsys):
    """Interrupted after a step it ends with the adapter of one left in peace, bit for bit.

    Its folder is a model for eval, no model for training, and can be merged.
    """
    config = dataclasses.replace(LORA, model=str(TINY), steps=2, eval_every=2)
    (tmp_path / "whole").mkdir()
    (tmp_path / "halves").mkdir()
    last = tmp_path / "whole" / "last"

    in_peace = train_tiny(tokenizer, config, tmp_path / "whole", False)
    train_tiny(tokenizer, config, tmp_path / "halves", True)
    resumed = train_tiny(tokenizer, config, tmp_path / "halves", False)
    assert all_equal(M.trainable(in_peace), M.trainable(resumed))

    again, _ = loading.load_model(dataclasses.replace(config, model=str(last)))
    # not trained as if it were a whole model
    with pytest.raises(InputError, match="is a LoRA adapter; merge it first"):
        G.train(TASK_OF_FACTS, again, tokenizer, CONFIG, tmp_path / "whole")
    assert all_equal(M.trainable(in_peace), M.trainable(again))
    assert not (last / "model.safetensors").exists()

    merge = ["merge", str(last), str(tmp_path / "merged")]
    assert cli.main(merge) == 0
    assert "merged, in float32" in capsys.readouterr().out
    # it is there already
    assert cli.main(merge) == 2
    whole, _ = M.load_pretrained(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(whole(IDS), again(IDS), atol=1e-4, rtol=1e-4)
    # a model without an adapter
    assert cli.main(["merge", str(TINY), str(tmp_path / "x")]) == 2


UNSUPPORTED = [
    ({"r": "4"}, "r: '4'"),
    ({"use_dora": True}, "use_dora"),
    ({"peft_type": "IA3"}, "peft_type"),
    ({"r": 0}, "r: 0"),
    ({"target_modules": ["wq"]}, "'wq'"),
    ({"base_model_name_or_path": "no/where"}, "no/where"),
    ({"r": 5}, "tensor"),
    ({"init_lora_weights": "pissa"}, "pissa"),
    ({"lora_alpha": math.nan}, "lora_alpha"),
    ({"lora_dropout": 2}, "lora_dropout"),
    ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
    ({"something_new": [1]}, "something_new"),
]


def damaged(tensors) -> list[dict]:
    """An adapter's tensors with one missing, one too many, and one of a wrong shape."""
    name = min(tensors)
    without = {n: t for n, t in tensors.items() if n != name}
    return [without, tensors | {"other": torch.zeros(1)}, tensors | {name: torch.zeros(2, 2)}]


def test_what_cannot_be_used_is_refused_by_name(tokenizer, tmp_path):
    """A target, a field of the configuration, a tensor, a file."""
    for target in ("wq", "lm_head"):
        untied = make_model(tie_word_embeddings=False)
        with pytest.raises(InputError, match=f"LoRA target '{target}'.*down_proj"):
            add_lora(untied, 4, 8.0, targets=("q_proj", target))

    save_base(tmp_path / "base", tokenizer)
    save_new_adapter(tmp_path / "a", tokenizer, tmp_path / "base")
    config = tmp_path / "a" / "adapter_config.json"
    weights = tmp_path / "a" / "adapter_model.safetensors"

    raw = json.loads(config.read_text())
    for change, culprit in UNSUPPORTED:
        config.write_text(json.dumps(raw | change))
        with pytest.raises(M.CheckpointError, match=culprit):
            load_adapter(tmp_path / "a")
    config.write_text(json.dumps(raw))

    for tensors in damaged(safetensors.torch.load_file(weights)):
        safetensors.torch.save_file(tensors, weights)
        with pytest.raises(M.CheckpointError, match="tensor (other|base_model)"):
            load_adapter(tmp_path / "a")
    weights.write_bytes(b"x")
    with pytest.raises(M.CheckpointError):
        load_adapter(tmp_path / "a")


def test_the_base_of_an_adapter_is_found_where_models_are(tokenizer, tmp_path, monkeypatch):
    """A hub name in the adapter is fetched as --model would be; the shipped LM from any folder."""
    save_base(tmp_path / "base", tokenizer)
    model = save_new_adapter(tmp_path / "a", tokenizer, tmp_path / "base", named="some/lm")
    asked = []

    def online(name, **_):
        asked.append(name)
        return str(tmp_path / "base")

    monkeypatch.setattr(loading.huggingface_hub, "snapshot_download", online)
    again, _ = loading.load_model(dataclasses.replace(CONFIG, model=str(tmp_path / "a")))
    assert asked == ["some/lm"]
    assert torch.equal(again(IDS), model(IDS))

    monkeypatch.chdir(tmp_path)
    assert loading.fetch("tasks/tiny") == TINY
    assert loading.fetch("base").is_dir()

    def offline(name, **_):
        raise OSError("no network")

    monkeypatch.setattr(loading.huggingface_hub, "snapshot_download", offline)
    told = (
        "--model some/other: is no folder here, and the hub gave none "
        ".OSError: no network.; offline, give"
    )
    with pytest.raises(InputError, match=told):
        loading.fetch("some/other")


def test_a_deep_copy_is_a_model_of_its_own():
    model = with_lora()
    other = copy.deepcopy(model)
    first = next(iter(lora_layers(other).values()))

    with torch.no_grad():
        first.lora_B.add_(1)

        assert not torch.equal(model(IDS), other(IDS))
    assert isinstance(other.layers[0].mlp.up_proj, LoRALinear)
