"""Every option of a run: a field is a flag of the command line, the comment above it its help."""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
from dataclasses import dataclass

from program import InputError

# What an option may be, where it is one of a few words.
CHOICES = {
    "level": ("call", "trajectory"),
    "short_groups": ("keep", "truncate", "fill"),
    "baseline": ("group", "example"),
    "scale_rewards": ("std", "batch", "none"),
    "normalize": ("sequence", "token", "constant"),
    "correction": ("auto", "none", "tis", "icepop"),
    "dtype": ("auto", "float32", "bfloat16"),
    "split": ("train", "dev", "test"),
    "log": ("none", "tensorboard", "trackio", "wandb"),
}

# What a number must be at least, where that is not 0.
LEAST = {
    "examples": 1,
    "rollouts": 1,
    "max_tokens": 1,
    "max_calls": 1,
    "inner_epochs": 1,
    "eval_every": 1,
    "minibatch": 1,
    "imitated": 1,
    "imitation_steps": 1,
    "full_every": 1,
    "dev_seed": -1,
    "warm_start": -1,
    "labelled_demos": -1,
    "failure_score": -math.inf,
    "format_failure_score": -math.inf,
    "demo_score": -math.inf,
}

# Numbers that are at most 1.
SHARES = ("interrupt", "top_p")


@dataclass(frozen=True)
class Config:
    """The options of a run, which are saved with it; a task may have defaults of its own for some.

    The paper's are: --examples 4 --rollouts 12 --steps 750 --lr 1e-5 --beta 0.01 --clip-norm 0.1
    --temperature 0.6 --short-groups fill --lora-rank 16 --lora-dropout 0.05.
    """

    # hover, banking77, papillon, or a Python file with a function load(data)
    task: str = "hover"
    # checkpoint folder in Hugging Face layout, FILE.gguf, or a name on the hub
    model: str = "tasks/tiny"
    # folder with the task's real data; empty: the miniature edition
    data: str = ""
    # JSON with instructions and demos, as a prompt search leaves it, or a state of DSPy
    prompts: str = ""
    # folder of the run; empty: runs/<task>, then runs/<task>-2, …; of `eval`: a JSON file;
    # of `imitate`: the folder of its checkpoint
    out: str = ""
    # demonstrations per module, of training examples (-1: as many as the LM needs to be readable)
    labelled_demos: int = -1
    # everything random follows from it
    seed: int = 0
    # of evaluations (-1: as seed); a strategy's later rounds train with other seeds
    dev_seed: int = -1
    # cpu or cuda; empty: cuda where there is one
    device: str = ""
    # of the weights that sample and score: float32, bfloat16, or auto: bfloat16 where it is faster
    dtype: str = "auto"

    # ------------------------------------------------------------------------------------- rollouts

    # B, training examples a step
    examples: int = 8
    # R, runs of the program per example
    rollouts: int = 8
    # of sampling, and of the distribution trained
    temperature: float = 1.0
    # sampled tokens per LM call at the most
    max_tokens: int = 128
    # LM calls per run at the most
    max_calls: int = 32
    # sequences that decode together (0: 64, or as many as find room with 1,024 own tokens each)
    slots: int = 0
    # reward of a run that hit max_calls; in evaluation, score of each run that did not complete
    failure_score: float = 0.0
    # reward of a run cut by length or without a readable field; partly readable: between
    format_failure_score: float = -1.0
    # share of training runs given a random limit below max_calls, to see what that does
    interrupt: float = 0.0
    # evaluation only: sample among the k most likely tokens (0: all)
    top_k: int = 0
    # evaluation only: sample among the most likely tokens of this total probability
    top_p: float = 1.0

    # ------------------------------------------------------------------------ groups and advantages

    # call: groups of (example, module, invocation); trajectory: one group an example
    level: str = "call"
    # calls that not every run of an example reached: keep, truncate or fill (PadGroups)
    short_groups: str = "keep"
    # keep this many members a group, evenly spaced by reward (0: all)
    group_size: int = 0
    # mean reward of the group, or of the example's runs
    baseline: str = "group"
    # leave a member's own reward out of its baseline
    leave_one_out: bool = False
    # divide advantages by the standard deviation of the group's rewards,
    # of the step's (batch), or none
    scale_rewards: str = "std"

    # ------------------------------------------------------------------------------ what is trained

    # of LoRA; 0 trains all weights
    lora_rank: int = 0
    # LoRA is scaled by this over the rank
    lora_alpha: float = 64.0
    # on the input of LoRA, in the update
    lora_dropout: float = 0.0
    # layers that get LoRA
    lora_targets: str = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
    # first steps that, while some of their calls can be read but less than a quarter,
    # only train on those that can (-1: 12 where less than half of the first dev runs are readable)
    warm_start: int = -1

    # of `imitate`: training examples whose demonstrations it trains on, at most half of them
    imitated: int = 64
    # of `imitate`: supervised steps, of --examples examples each
    imitation_steps: int = 32

    # ----------------------------------------------------------------------------------------- loss

    # mean over each call's tokens; token: over the step's;
    # constant: sum / (voting runs x max_tokens)
    normalize: str = "sequence"
    # the ratio is clipped to 1 - clip_low …
    clip_low: float = 0.2
    # … and 1 + clip_high
    clip_high: float = 0.2
    # weight of the KL divergence from the starting weights
    beta: float = 0.0
    # of the mismatch between sampled and trained log-probs: none, tis or icepop;
    # auto: tis in bfloat16
    correction: str = "auto"
    # nats per token: the loss has an entropy bonus while sampling is below it (0: never)
    entropy_target: float = 0.0
    # weight of the entropy bonus at entropy 0; it falls in a straight line to 0 at the target
    entropy_coef: float = 0.1

    # -------------------------------------------------------------------------------------- prompts

    # stages in turn, w: train weights, p: search prompts; "p -> w", "(p -> w) x 3", …
    strategy: str = "w"
    # rollouts of the whole strategy, shared evenly by its stages (0: as --steps and --trials say)
    budget: int = 0
    # choices of prompts that a search scores
    trials: int = 30
    # dev examples that a trial is scored on
    minibatch: int = 32
    # trials after which the best so far is scored on all dev examples used
    full_every: int = 5
    # JSON, module -> list of instructions to choose from; empty: the task's
    instructions: str = ""
    # instructions per module to ask an LM for: the endpoint MMGRPO_PROPOSER, else the model
    proposals: int = 0
    # demonstrations per module at the most (0: none are tried)
    demos: int = 2
    # sets of demonstrations per module to choose from
    demo_sets: int = 6
    # reward from which a run is good enough to cut demonstrations from
    demo_score: float = 1.0
    # training examples run for demonstrations
    bootstrap: int = 100

    # ------------------------------------------------------------------------------------ optimizer

    # training steps, each of inner_epochs optimizer steps
    steps: int = 20
    # steps in a row with nothing to learn after which training stops (0: never)
    patience: int = 5
    # updates on the same rollouts
    inner_epochs: int = 1
    # of AdamW (0: 5e-4 up to width 128, then falling with its square; with LoRA ten times that)
    lr: float = 0.0
    # steps of linear warm-up
    warmup: int = 5
    # of AdamW
    weight_decay: float = 0.0
    # the gradient's norm is clipped to this
    clip_norm: float = 1.0
    # distinct tokens per micro-batch
    # (0: four times the longest call and at least 1,536, if that fits in memory)
    batch_tokens: int = 0
    # keep one state per layer and compute the rest again on the way back: less memory, more time
    checkpointing: bool = False
    # stop where a sampled and a trained log-prob are further apart, their 99% quantile than a
    # fourth of it, their median than a fortieth (0: 1e-3; bfloat16: 2)
    parity: float = 0.0

    # ----------------------------------------------------------------------------------- evaluation

    # steps between dev evaluations; before and after are always measured
    eval_every: int = 10
    # dev (or test) examples used (0: all)
    eval_examples: int = 100
    # steps between sampled runs that are printed while training (0: none are)
    show_every: int = 10
    # what draws the figures of a training besides metrics.jsonl, if it is installed
    log: str = "none"
    # go on with the task's last run in runs/
    resume: bool = False
    # of `eval` and `show`: train, dev or test
    split: str = "dev"
    # of `show`: which example
    index: int = 0
    # of `show RUN STEP`: the file for the page of a step
    html: str = ""
    # of `show` and `replay`: with the text of each prompt, as the LM was given it
    show_prompts: bool = False

    def __post_init__(self):
        """Raises InputError naming the flag whose value is out of its range."""
        for field in dataclasses.fields(self):
            check(flag_of(field.name), field, getattr(self, field.name))
        if self.lora_dropout >= 1:
            raise InputError(f"--lora-dropout: {self.lora_dropout} is not below 1")


def flag_of(name: str) -> str:
    """Example: flag_of("top_k") is "--top-k"."""
    return f"--{name.replace('_', '-')}"


def check(flag: str, field: dataclasses.Field, value) -> None:
    """Raises InputError where a field's value is of another type, none of its choices, or outside
    its range.
    """
    # every whole number is a float
    kinds = ("int", "float") if field.type == "float" else (field.type,)
    if type(value).__name__ not in kinds:
        raise InputError(f"{flag}: {value!r} is not of type {field.type}")
    choices = CHOICES.get(field.name)
    if choices and value not in choices:
        raise InputError(f"{flag}: {value!r} is none of {', '.join(choices)}")

    # NaN is in no range; minus infinity is refused where any number will do
    low = LEAST.get(field.name, 0)
    if field.type in ("int", "float") and (not low <= value < 2**63 or value == -math.inf):
        above = " and below 2**63" if value >= 2**63 else ""
        raise InputError(f"{flag}: {value} is not a number of at least {low}{above}")
    if field.name in SHARES and value > 1:
        raise InputError(f"{flag}: {value} is above 1")


def help_texts() -> dict[str, str]:
    """Field name -> its help text: the lines of comment that stand right above the field."""
    commented = re.findall(r"((?:^    # .*\n)+)    (\w+): ", inspect.getsource(Config), re.M)
    return {name: " ".join(re.findall(r"# (.*)", comment)) for comment, name in commented}
