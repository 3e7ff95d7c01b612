"""Shared fixtures. Everything is small, built in process, on the CPU, without a network."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

import model as M

ROOT = Path(__file__).resolve().parent.parent

# the models are so small that threads only wait for each other
torch.set_num_threads(1)

# the same examples at every run; HYPOTHESIS_PROFILE=search looks for new ones
common = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
}
# a counterexample need not be a small one
unshrunk = (Phase.explicit, Phase.generate)
settings.register_profile("ci", derandomize=True, max_examples=60, **common)
settings.register_profile("mutants", derandomize=True, max_examples=60, phases=unshrunk, **common)
settings.register_profile("search", max_examples=1000, **common)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

SHAPE = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


def make_model(seed: int = 0, std: float = 0.3, **changes) -> M.Transformer:
    """A random transformer whose distributions are far from uniform."""
    torch.manual_seed(seed)
    model = M.Transformer(M.ModelConfig.from_hf(SHAPE | {"vocab_size": 2048} | changes))
    for p in model.parameters():
        if p.dim() == 1:
            torch.nn.init.normal_(p, 1.0, 0.2)
        else:
            torch.nn.init.normal_(p, 0.0, std)
    return model


@pytest.fixture(scope="session")
def tokenizer() -> M.Tokenizer:
    return M.Tokenizer(ROOT / "tasks" / "tiny")


@pytest.fixture(scope="session")
def tiny() -> tuple[M.Transformer, M.Tokenizer]:
    """The shipped LM and its tokenizer."""
    return M.load_pretrained(ROOT / "tasks" / "tiny")


@pytest.fixture
def model(tokenizer) -> M.Transformer:
    return make_model(vocab_size=tokenizer.size)
