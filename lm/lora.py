"""LoRA (arXiv 2106.09685): the weights stay as they are, small matrices beside them are trained.

add_lora(model, rank=16, alpha=64, dropout=0.05)
save_adapter(model, tokenizer, "runs/x/last", base="Qwen/Qwen3-0.6B")       # a PEFT adapter
model, tokenizer = load_adapter("runs/x/last")
save_pretrained(merged(model), tokenizer, "whole")                          # an ordinary checkpoint
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lm.tokenizer import CheckpointError, Tokenizer, read_json
from model import Transformer, load_pretrained
from program import InputError

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


# --------------------------------------------------------------------------------------- the layers
class LoRALinear(nn.Linear):
    """y = W x + b + alpha / rank B A x.

    W and b are those of the layer it stands for, and frozen. A is (rank, in), B (out, rank).
    """

    def __init__(self, layer: nn.Linear, rank: int, alpha: float, dropout: float):
        # not nn.Linear's own, which would make a weight
        nn.Module.__init__(self)
        self.in_features = layer.in_features
        self.out_features = layer.out_features
        self.weight = layer.weight.requires_grad_(False)
        self.bias = layer.bias
        device = layer.weight.device
        self.lora_A = nn.Parameter(torch.zeros(rank, self.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, device=device))
        self.scale = alpha / rank
        self.dropout = dropout
        self.on = True

    def draw(self, generator: torch.Generator) -> None:
        """Begin A as PEFT does: Kaiming uniform with a = sqrt(5)."""
        bound = 1 / math.sqrt(self.in_features)
        # on the CPU, where the generator is: all devices begin alike
        start = torch.empty(self.lora_A.shape)  # (rank, in)
        start.uniform_(-bound, bound, generator=generator)
        with torch.no_grad():
            self.lora_A.copy_(start)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)  # (…, out)
        if self.on:
            # where gradients are taken, so in the update, never when sampling
            x = F.dropout(x, self.dropout, training=torch.is_grad_enabled() and self.dropout > 0)
            # A and B are kept in fp32, and multiplied in the dtype of W: else the backward pass
            # would hold fp32 copies of all inputs
            low = F.linear(x, self.lora_A.to(x.dtype))  # (…, rank)
            update = F.linear(low, self.lora_B.to(x.dtype))  # (…, out)
            y = torch.add(y, update, alpha=self.scale)
        return y


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The layers with LoRA, by their names in the model."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def add_lora(
    model: Transformer,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    targets: tuple[str, ...] = TARGETS,
    seed: int = 0,
) -> None:
    """Freeze the model and put LoRA on every linear layer that `targets` names.

    B is 0, so nothing changes yet. Raises InputError naming a target that is none of TARGETS.
    """
    unknown = set(targets) - set(TARGETS)
    if not targets:
        unknown = {"(none)"}
    if unknown:
        raise InputError(f"LoRA target {min(unknown)!r} is none of {', '.join(TARGETS)}")

    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    # a list, for the modules change under way
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if name in targets:
                lora = LoRALinear(layer, rank, alpha, dropout)
                lora.draw(generator)
                setattr(parent, name, lora)


class WithoutLoRA:
    """The same model with LoRA off: the start, for the KL, without a copy of the weights."""

    def __init__(self, model: Transformer):
        self.model = model
        self.head = model.head
        self.config = model.config

    def __call__(self, *args, **kwargs) -> Tensor:
        layers = lora_layers(self.model).values()
        try:
            for layer in layers:
                layer.on = False
            return self.model(*args, **kwargs)
        finally:
            for layer in layers:
                layer.on = True


def merged(model: Transformer) -> Transformer:
    """A copy with LoRA added into the weights, in their dtype."""
    model = copy.deepcopy(model)
    # a list, for the modules change under way
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, LoRALinear):
                setattr(parent, name, _plain(layer))
    return model


def _plain(layer: LoRALinear) -> nn.Linear:
    """An ordinary layer of the weight W + alpha / rank B A."""
    plain = nn.Linear(
        layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta"
    )
    weight = layer.weight.float() + layer.scale * layer.lora_B @ layer.lora_A  # (out, in), fp32
    plain.weight = nn.Parameter(weight.detach().to(layer.weight.dtype))
    plain.bias = layer.bias
    return plain


# --------------------------------------------------------------------------------------- in and out
def peft_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every A and B by the name that PEFT gives it."""
    tensors: dict[str, Tensor] = {}
    for name, layer in lora_layers(model).items():
        tensors[f"base_model.model.model.{name}.lora_A.weight"] = layer.lora_A
        tensors[f"base_model.model.model.{name}.lora_B.weight"] = layer.lora_B
    return tensors


def save_adapter(model: Transformer, tokenizer: Tokenizer, path: str | Path, base: str) -> None:
    """Write the adapter as PEFT does, with the tokenizer's files.

    `base` is the checkpoint that it belongs to.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    layers = lora_layers(model)
    # all have the same rank, scale and dropout
    one = next(iter(layers.values()))
    rank = one.lora_A.shape[0]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": one.scale * rank,
        "lora_dropout": one.dropout,
        "target_modules": sorted({name.split(".")[-1] for name in layers}),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name, data in tokenizer.files.items():
        (folder / name).write_bytes(data)

    tensors = {n: t.detach().cpu().contiguous() for n, t in peft_tensors(model).items()}
    # written beside and then put in place: never half a file
    unfinished = folder / "adapter_model.safetensors.new"
    safetensors.torch.save_file(tensors, unfinished, metadata={"format": "pt"})
    unfinished.replace(folder / "adapter_model.safetensors")


# fields of adapter_config.json that change nothing here, whatever they say
IGNORED = (
    "task_type",
    "inference_mode",
    "revision",
    "auto_mapping",
    "peft_version",
    "megatron_core",
    "runtime_config",
    "qalora_group_size",
)
MAX_RANK = 65536


def _is_number(value, low: float, high: float) -> bool:
    # type() because True is an int to Python; NaN is in no interval
    return type(value) in (int, float) and low <= value <= high


def read_adapter_config(path: Path) -> dict:
    """adapter_config.json. Raises CheckpointError naming a field that is not supported."""
    raw = read_json(path)
    rank = raw.get("r")
    dropout = raw.get("lora_dropout")
    supported = {
        "peft_type": raw.get("peft_type") == "LORA",
        "base_model_name_or_path": isinstance(raw.get("base_model_name_or_path"), str),
        "r": type(rank) is int and 0 < rank <= MAX_RANK,
        "lora_alpha": _is_number(raw.get("lora_alpha"), 0, 1e9),
        "lora_dropout": dropout is None or _is_number(dropout, 0, 0.999),
        "target_modules": isinstance(raw.get("target_modules"), list),
        "bias": raw.get("bias") in ("none", None),
        # the other ways to begin change the base as well
        "init_lora_weights": raw.get("init_lora_weights") in (True, False, None, "gaussian"),
    }
    # any further field must be off: what it asks for is not implemented
    for key, value in raw.items():
        if key not in supported and key not in IGNORED:
            supported[key] = not value
    for key in sorted(supported):
        if not supported[key]:
            raise CheckpointError(f"{path}: {key}: {raw.get(key)!r} is not supported")
    return raw


def load_adapter(
    path: str | Path,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    fetch: Callable[[str], Path] = Path,
) -> tuple[Transformer, Tokenizer]:
    """What `save_adapter` or PEFT wrote -> the base model with that LoRA, and its tokenizer.

    `fetch` finds the base's folder. Raises CheckpointError naming the file and the field or tensor
    that cannot be used.
    """
    folder = Path(path)
    raw = read_adapter_config(folder / "adapter_config.json")
    model, tokenizer = load_pretrained(fetch(raw["base_model_name_or_path"]), device, dtype)
    targets = tuple(map(str, raw["target_modules"]))
    file = folder / "adapter_model.safetensors"
    # what a target, a rank or a file that does not fit raises
    unusable = (ValueError, ZeroDivisionError, RuntimeError, OSError, safetensors.SafetensorError)
    try:
        add_lora(model, raw["r"], raw["lora_alpha"], raw.get("lora_dropout") or 0.0, targets)
        found = safetensors.torch.load_file(file)
    except unusable as e:
        raise CheckpointError(f"{folder}: {e}") from None

    wanted = peft_tensors(model)
    for name in sorted(wanted.keys() | found.keys()):
        fits = name in wanted and name in found and found[name].shape == wanted[name].shape
        if not fits:
            raise CheckpointError(f"{file}: tensor {name}: missing, unknown or of a wrong shape")
        with torch.no_grad():
            wanted[name].copy_(found[name])
    return model, tokenizer
