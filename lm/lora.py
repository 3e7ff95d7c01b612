"""LoRA (arXiv 2106.09685): the weights stay as they are, and small matrices beside them are trained.

    add_lora(model, rank=16, alpha=64, dropout=0.05)
    save_adapter(model, tokenizer, "runs/x/last", base="Qwen/Qwen3-0.6B")       # a PEFT adapter
    model, tokenizer = load_adapter("runs/x/last")
    save_pretrained(merged(model), tokenizer, "whole")                          # an ordinary checkpoint
"""
from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Callable

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lm.tokenizer import CheckpointError, Tokenizer, read_json
from model import Transformer, load_pretrained
from program import InputError

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoRALinear(nn.Linear):
    """y = W x + b + alpha / rank B A x.

    W and b are those of the layer it stands for, and frozen. A (rank, in) and B (out, rank) are kept
    in fp32, and multiplied in the dtype of W: else the backward pass would hold fp32 copies of all
    inputs. Dropout acts on x where gradients are taken, so in the update, never when sampling."""
    def __init__(self, layer: nn.Linear, rank: int, alpha: float, dropout: float):
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight.requires_grad_(False), layer.bias
        new = lambda *shape: nn.Parameter(torch.zeros(shape, device=layer.weight.device))
        self.lora_A, self.lora_B = new(rank, self.in_features), new(self.out_features, rank)
        self.scale, self.dropout, self.on = alpha / rank, dropout, True

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        if self.on:
            x = F.dropout(x, self.dropout, training=torch.is_grad_enabled() and self.dropout > 0)
            low = F.linear(x, self.lora_A.to(x.dtype))                          # (…, rank)
            y = torch.add(y, F.linear(low, self.lora_B.to(x.dtype)), alpha=self.scale)
        return y


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def add_lora(model: Transformer, rank: int, alpha: float, dropout: float = 0.0, targets: tuple[str, ...] = TARGETS, seed: int = 0) -> None:
    """Freeze the model and put LoRA on every linear layer that `targets` names; B is 0, so nothing changes yet. Raises InputError
    naming a target that is none of TARGETS."""
    found = [(parent, name, m) for parent in model.modules() for name, m in parent.named_children() if name in TARGETS]
    if odd := set(targets) - set(TARGETS) or (set() if targets else {"(none)"}):
        raise InputError(f"LoRA target {min(odd)!r} is none of {', '.join(TARGETS)}")
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parent, name, layer in found:
        if name in targets:
            setattr(parent, name, lora := LoRALinear(layer, rank, alpha, dropout))
            bound = 1 / math.sqrt(layer.in_features)                            # PEFT's: Kaiming uniform with a = sqrt(5)
            with torch.no_grad():
                lora.lora_A.copy_(torch.empty(lora.lora_A.shape).uniform_(-bound, bound, generator=generator))


class WithoutLoRA:
    """The same model with LoRA off: the start, for the KL, without a copy of the weights."""
    def __init__(self, model: Transformer):
        self.model, self.head, self.config = model, model.head, model.config

    def __call__(self, *args, **kwargs) -> Tensor:
        layers = lora_layers(self.model).values()
        try:
            for m in layers:
                m.on = False
            return self.model(*args, **kwargs)
        finally:
            for m in layers:
                m.on = True


def merged(model: Transformer) -> Transformer:
    """A copy with LoRA added into the weights, in their dtype."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, m in list(parent.named_children()):
            if isinstance(m, LoRALinear):
                plain = nn.Linear(m.in_features, m.out_features, bias=m.bias is not None, device="meta")
                plain.weight = nn.Parameter((m.weight.float() + m.scale * m.lora_B @ m.lora_A).detach().to(m.weight.dtype))
                plain.bias = m.bias
                setattr(parent, name, plain)
    return model


def save_adapter(model: Transformer, tokenizer: Tokenizer, path: str | Path, base: str) -> None:
    """Write the adapter as PEFT does, with the tokenizer's files; `base` is the checkpoint that it belongs to."""
    folder, layers = Path(path), lora_layers(model)
    folder.mkdir(parents=True, exist_ok=True)
    one = next(iter(layers.values()))
    rank = one.lora_A.shape[0]
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": rank, "lora_alpha": one.scale * rank,
              "lora_dropout": one.dropout, "target_modules": sorted({name.split(".")[-1] for name in layers}), "bias": "none",
              "fan_in_fan_out": False, "inference_mode": True}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name, data in tokenizer.files.items():
        (folder / name).write_bytes(data)
    tensors = {f"base_model.model.model.{name}.{k}.weight": getattr(m, k).detach().cpu().contiguous()
               for name, m in layers.items() for k in ("lora_A", "lora_B")}
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors.new", metadata={"format": "pt"})
    (folder / "adapter_model.safetensors.new").replace(folder / "adapter_model.safetensors")


def load_adapter(path: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32,
                 fetch: Callable[[str], Path] = Path) -> tuple[Transformer, Tokenizer]:
    """What `save_adapter` or PEFT wrote -> the base model with that LoRA, and its tokenizer; `fetch` finds the base's folder.
    Raises CheckpointError naming the file and the field or tensor that cannot be used."""
    folder = Path(path)
    where, raw = folder / "adapter_config.json", read_json(folder / "adapter_config.json")
    number = lambda x, low, high: type(x) in (int, float) and low <= x <= high
    good = {"base_model_name_or_path": lambda x: isinstance(x, str), "r": lambda x: type(x) is int and 0 < x <= 65536,
            "lora_alpha": lambda x: number(x, 0, 1e9), "lora_dropout": lambda x: x is None or number(x, 0, 0.999),
            "target_modules": lambda x: isinstance(x, list), "peft_type": lambda x: x == "LORA", "bias": lambda x: x in ("none", None),
            "init_lora_weights": lambda x: x in (True, False, None, "gaussian")}        # others change the base as well
    told = ("task_type", "inference_mode", "revision", "auto_mapping", "peft_version", "megatron_core", "runtime_config",
            "qalora_group_size")                            # change nothing
    for key in good.keys() | raw.keys():
        if not good[key](raw.get(key)) if key in good else raw[key] and key not in told:
            raise CheckpointError(f"{where}: {key}: {raw.get(key)!r} is not supported")
    model, tokenizer = load_pretrained(fetch(raw["base_model_name_or_path"]), device, dtype)
    try:
        add_lora(model, raw["r"], raw["lora_alpha"], raw.get("lora_dropout") or 0.0, tuple(map(str, raw["target_modules"])))
        tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    except (ValueError, ZeroDivisionError, RuntimeError, OSError, safetensors.SafetensorError) as e:
        raise CheckpointError(f"{folder}: {e}") from None
    wanted = {f"base_model.model.model.{n}.{k}.weight": getattr(m, k) for n, m in lora_layers(model).items() for k in ("lora_A", "lora_B")}
    for name in sorted(wanted.keys() | tensors.keys()):
        if name not in wanted or name not in tensors or tensors[name].shape != wanted[name].shape:
            raise CheckpointError(f"{folder / 'adapter_model.safetensors'}: tensor {name}: missing, unknown or of a wrong shape")
        with torch.no_grad():
            wanted[name].copy_(tensors[name])
    return model, tokenizer
