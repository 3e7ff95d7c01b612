"""Every option of a run. Each field is a flag of the command line, its comment the help text of that flag."""
from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from program import InputError


@dataclass(frozen=True)
class Config:
    """Saved with the run. A task may come with defaults of its own for some of these. The paper's: --examples 4 --rollouts 12 --steps 750
    --lr 1e-5 --beta 0.01 --clip-norm 0.1 --temperature 0.6 --short-groups fill --lora-rank 16 --lora-dropout 0.05."""
    task: str = "hover"             # hover, banking77, papillon, or a Python file with a function load(data)
    model: str = "tasks/tiny"       # checkpoint folder in Hugging Face layout, FILE.gguf, or a name on the hub
    data: str = ""                  # folder with the task's real data; empty: the miniature edition
    prompts: str = ""               # JSON with instructions and demos, as a prompt search leaves it, or a state of DSPy
    out: str = ""                   # folder of the run; empty: runs/<task>, then runs/<task>-2, …; of `eval`: a JSON file
    labelled_demos: int = -1        # demonstrations per module, of training examples (-1: as many as the LM needs to be readable)
    seed: int = 0                   # everything random follows from it
    dev_seed: int = -1              # of evaluations (-1: as seed); a strategy's later rounds train with other seeds
    device: str = ""                # cpu or cuda; empty: cuda where there is one
    dtype: str = "auto"             # of the weights that sample and score: float32, bfloat16, or auto: bfloat16 where it is faster
    # rollouts
    examples: int = 8               # B, training examples a step
    rollouts: int = 8               # R, runs of the program per example
    temperature: float = 1.0        # of sampling, and of the distribution trained
    max_tokens: int = 128           # sampled tokens per LM call at the most
    max_calls: int = 32             # LM calls per run at the most
    slots: int = 0                  # sequences that decode together (0: 64, or as many as find room with 1,024 own tokens each)
    failure_score: float = 0.0      # reward of a run that hit max_calls; in evaluation, score of each run that did not complete
    format_failure_score: float = -1.0      # reward of a run cut by length or without a readable field; partly readable: between
    interrupt: float = 0.0          # share of training runs given a random limit below max_calls, to see what that does
    top_k: int = 0                  # evaluation only: sample among the k most likely tokens (0: all)
    top_p: float = 1.0              # evaluation only: sample among the most likely tokens of this total probability
    # groups and advantages
    level: str = "call"             # call: groups of (example, module, invocation); trajectory: one group an example
    short_groups: str = "keep"      # calls that not every run of an example reached: keep, truncate or fill (PadGroups)
    group_size: int = 0             # keep this many members a group, evenly spaced by reward (0: all)
    baseline: str = "group"         # mean reward of the group, or of the example's runs
    leave_one_out: bool = False     # leave a member's own reward out of its baseline
    scale_rewards: str = "std"      # divide advantages by the standard deviation of the group's rewards, of the step's (batch), or none
    # what is trained
    lora_rank: int = 0              # of LoRA; 0 trains all weights
    lora_alpha: float = 64.0        # LoRA is scaled by this over the rank
    lora_dropout: float = 0.0       # on the input of LoRA, in the update
    lora_targets: str = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"       # layers that get LoRA
    warm_start: int = -1            # first steps that, while less than a quarter of their calls can be read, only train on those that can (-1: 12 where less than half of the first dev runs are readable)
    # loss
    normalize: str = "sequence"     # mean over each call's tokens; token: over the step's; constant: sum / (voting runs x max_tokens)
    clip_low: float = 0.2           # the ratio is clipped to 1 - clip_low …
    clip_high: float = 0.2          # … and 1 + clip_high
    beta: float = 0.0               # weight of the KL divergence from the starting weights
    correction: str = "auto"        # of the mismatch between sampled and trained log-probs: none, tis or icepop; auto: tis in bfloat16
    entropy_target: float = 0.0     # nats per token: the loss has an entropy bonus while sampling is below it (0: never)
    entropy_coef: float = 0.1       # weight of the entropy bonus at entropy 0; it falls in a straight line to 0 at the target
    # prompts
    strategy: str = "w"             # stages in turn, w: train weights, p: search prompts; "p -> w", "(p -> w) x 3", …
    budget: int = 0                 # rollouts of the whole strategy, shared evenly by its stages (0: as --steps and --trials say)
    trials: int = 30                # choices of prompts that a search scores
    minibatch: int = 32             # dev examples that a trial is scored on
    full_every: int = 5             # trials after which the best so far is scored on all dev examples used
    instructions: str = ""          # JSON, module -> list of instructions to choose from; empty: the task's
    proposals: int = 0              # instructions per module to ask an LM for: the endpoint MMGRPO_PROPOSER, else the model
    demos: int = 2                  # demonstrations per module at the most (0: none are tried)
    demo_sets: int = 6              # sets of demonstrations per module to choose from
    demo_score: float = 1.0         # reward from which a run is good enough to cut demonstrations from
    bootstrap: int = 100            # training examples run for demonstrations
    # optimizer
    steps: int = 20                 # training steps, each of inner_epochs optimizer steps
    patience: int = 5               # steps in a row with nothing to learn after which training stops (0: never)
    inner_epochs: int = 1           # updates on the same rollouts
    lr: float = 0.0                 # of AdamW (0: 5e-4 up to width 128, then falling with its square; with LoRA ten times that)
    warmup: int = 5                 # steps of linear warm-up
    weight_decay: float = 0.0       # of AdamW
    clip_norm: float = 1.0          # the gradient's norm is clipped to this
    batch_tokens: int = 0           # distinct tokens per micro-batch (0: four times the longest call and at least 1,536, if that fits in memory)
    checkpointing: bool = False     # keep one state per layer and compute the rest again on the way back: less memory, more time
    parity: float = 0.0             # stop where a sampled and a trained log-prob are further apart, their 99% quantile than a fourth of it, their median than a fortieth (0: 1e-3; bfloat16: 2)
    # evaluation
    eval_every: int = 10            # steps between dev evaluations; before and after are always measured
    eval_examples: int = 100        # dev (or test) examples used (0: all)
    show_every: int = 10            # steps between sampled runs that are printed while training (0: none are)
    resume: bool = False            # go on with the task's last run in runs/
    split: str = "dev"              # of `eval` and `show`: train, dev or test
    index: int = 0                  # of `show`: which example
    html: str = ""                  # of `show RUN STEP`: the file for the page of a step
    show_prompts: bool = False      # of `show` and `replay`: with the text of each prompt, as the LM was given it

    def __post_init__(self):
        choices = {"level": ("call", "trajectory"), "short_groups": ("keep", "truncate", "fill"), "baseline": ("group", "example"),
                   "scale_rewards": ("std", "batch", "none"), "normalize": ("sequence", "token", "constant"),
                   "correction": ("auto", "none", "tis", "icepop"),
                   "dtype": ("auto", "float32", "bfloat16"), "split": ("train", "dev", "test")}
        positive = ("examples", "rollouts", "max_tokens", "max_calls", "inner_epochs", "eval_every", "minibatch", "full_every")
        for f in dataclasses.fields(self):
            value, flag = getattr(self, f.name), f"--{f.name.replace('_', '-')}"
            if f.name in choices and value not in choices[f.name]:
                raise InputError(f"{flag}: {value!r} is none of {', '.join(choices[f.name])}")
            low = 1 if f.name in positive else -1 if f.name in ("dev_seed", "warm_start", "labelled_demos") else -math.inf if f.name in ("failure_score", "format_failure_score", "demo_score") else 0
            if f.type in ("int", "float") and (not low <= value < 2**63 or value == -math.inf):        # NaN is in no range
                raise InputError(f"{flag}: {value} is not a number of at least {low}" + " and below 2**63" * (value >= 2**63))
            if f.name in ("interrupt", "top_p") and value > 1:
                raise InputError(f"{flag}: {value} is above 1")
        if self.lora_dropout >= 1:
            raise InputError(f"--lora-dropout: {self.lora_dropout} is not below 1")
