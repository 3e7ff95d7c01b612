"""TRL's own GRPO loss on a vector's tokens: GRPOTrainer._compute_loss, with the model's forward replaced by the numbers given.
And its own advantages: those lines of its source, found in the method that also generates and scores."""
import inspect
import textwrap
from collections import defaultdict
from types import SimpleNamespace

import torch
from trl.trainer import grpo_trainer
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


def _lines() -> str:
    method = next(m for m in vars(GRPOTrainer).values() if inspect.isfunction(m) and "mean_grouped_rewards =" in inspect.getsource(m))
    lines = inspect.getsource(method).splitlines()
    first = next(i for i, line in enumerate(lines) if line.strip() == 'if self.multi_objective_aggregation == "sum_then_normalize":')
    last = next(i for i, line in enumerate(lines) if line.strip().startswith("elif self.multi_objective_aggregation =="))
    return textwrap.dedent("\n".join(lines[first:last]))


def advantages(rewards: list[float], scale_rewards: str) -> list[float]:
    """One group's advantages as TRL computes them, in float64."""
    names = vars(grpo_trainer) | {
        "self": SimpleNamespace(multi_objective_aggregation="sum_then_normalize", scale_rewards={"std": "group", "none": "none"}[scale_rewards],
                                reward_weights=torch.ones(1, dtype=torch.double)),
        "rewards_per_func": torch.tensor(rewards, dtype=torch.double)[:, None], "device": "cpu", "num_generations": len(rewards),
        "unscorable_mask": torch.zeros(len(rewards), dtype=torch.bool)}
    exec(_lines(), names)
    return names["advantages"].tolist()
