"""TRL's own GRPO loss on a vector's tokens: GRPOTrainer._compute_loss, with the model's forward replaced by the numbers given."""
from collections import defaultdict
from types import SimpleNamespace

import torch
from trl.trainer.grpo_trainer import GRPOTrainer

KIND = {"sequence": "grpo", "token": "dapo", "constant": "dr_grpo"}


def loss(rows: list[dict], normalize: str, constant: int, clip_low: float, clip_high: float, beta: float) -> float:
    """rows of {logprobs, old_logprobs, ref_logprobs, advantage} -> the loss as TRL computes it, in float64."""
    width = max(len(r["logprobs"]) for r in rows)
    pad = lambda key: torch.tensor([r[key] + [0.0] * (width - len(r[key])) for r in rows], dtype=torch.double)
    mask = torch.tensor([[1.0] * len(r["logprobs"]) + [0.0] * (width - len(r["logprobs"])) for r in rows], dtype=torch.double)
    new = pad("logprobs")
    accelerator = SimpleNamespace(num_processes=1, gather=lambda x: x, sync_gradients=True, reduce=lambda x, reduction: x)
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (new, torch.zeros_like(new), None), aux_loss_enabled=False,
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, importance_sampling_level="token", beta=beta,
        loss_type=KIND[normalize], epsilon_low=clip_low, epsilon_high=clip_high, use_vllm=False, _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1, max_completion_length=constant, accelerator=accelerator,
        model=SimpleNamespace(training=False), _metrics={"eval": defaultdict(list), "train": defaultdict(list)},
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1))
    inputs = {"prompt_ids": torch.zeros(len(rows), 1), "prompt_mask": torch.ones(len(rows), 1), "completion_ids": mask,
              "completion_mask": mask, "advantages": torch.tensor([r["advantage"] for r in rows], dtype=torch.double),
              "old_per_token_logps": pad("old_logprobs"), "ref_per_token_logps": pad("ref_logprobs"),
              "num_items_in_batch": mask.sum()}
    return float(GRPOTrainer._compute_loss(trainer, None, inputs))
