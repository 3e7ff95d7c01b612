"""A supervised start: train an LM on labelled demonstrations before any rollout.

Where an LM cannot follow the format, or names one answer whatever it is asked, no rollout tells
right from wrong and the policy gradient has nothing to work on. A few steps on what training
examples show (`Task.demonstrate`) give it both: the format, and answers as varied as the labels.
This is supervised fine-tuning, not mmGRPO; what it leaves is a checkpoint of its own, to be
evaluated, and trained, like any other.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Callable

import torch

from lm.tokenizer import Tokenizer
from mmgrpo import (
    Row,
    batch_logprobs,
    batch_of,
    learning_rate,
    pack,
    prepare,
    step_gradient,
    tokens_per_batch,
)
from model import Transformer, trainable
from program import Completion, FormatError, InputError, Module, Task, parse, render_outputs
from prompts.start import demonstrations, shuffled, without_shown
from run.config import Config


def end_of_turn(tokenizer: Tokenizer) -> int:
    """The end token that the chat template writes behind a turn, where there are several."""
    turn = tokenizer.encode_chat([{"role": "user", "content": ""}])
    written = [i for i in turn if i in tokenizer.end_ids]
    return written[-1] if written else min(tokenizer.end_ids)


def completion_of(module: Module, demo: dict, tokenizer: Tokenizer) -> Completion:
    """A demonstration as if the LM had sampled it; its log-probs are still to be filled in."""
    inputs = {f.name: demo.get(f.name, "") for f in module.signature.inputs}
    prompt = tokenizer.encode_chat(module.messages(inputs))
    text = render_outputs(module.signature, demo)
    tokens = tokenizer.encode(text) + [end_of_turn(tokenizer)]
    return Completion(prompt, tokens, [], "stop", text)


def is_whole(module: Module, demo: dict) -> bool:
    """Whether a demonstration has every output, each in a form that the program could read.

    What fills a gap in a prompt ("Not supplied …") must not become what the LM says.
    """
    if any(demo.get(f.name) is None for f in module.signature.outputs):
        return False
    try:
        parse(module.signature, render_outputs(module.signature, demo))
    except FormatError:
        return False
    return True


def shown_calls(
    task: Task, examples: list[dict], tokenizer: Tokenizer, context: int
) -> list[list[tuple]]:
    """Per example the calls that it shows whole, within the context: (module, completion)."""
    modules = task.program.modules()
    calls = []
    for example in examples:
        shown = demonstrations(task, example)
        of_example = []
        for name, demos in shown.items():
            for demo in demos:
                if not is_whole(modules[name], demo):
                    continue
                completion = completion_of(modules[name], demo, tokenizer)
                if len(completion.prompt_ids) + len(completion.token_ids) <= context:
                    of_example.append((name, completion))
        if of_example:
            calls.append(of_example)
    return calls


def rows_of(
    calls: list[tuple], model: Transformer, tokenizer: Tokenizer, config: Config
) -> list[Row]:
    """The calls as rows of the loss: advantage 1, the mean over calls of the mean over tokens.

    The LM's own log-probs stand in the place of the sampler's, so that every ratio is 1 and the
    gradient of the loss is that of the cross-entropy.
    """
    rows = []
    for module, completion in calls:
        weight = 1 / (len(calls) * len(completion.token_ids))
        rows.append(Row(module, completion, advantage=1.0, weight=weight))
    for tree in pack(rows, tokens_per_batch(model, rows, config)):
        logprobs = batch_logprobs(model, tree, config.temperature, tokenizer.size)  # (N,)
        lengths = [len(row.completion.token_ids) for row in tree.rows]
        for row, of_row in zip(tree.rows, logprobs.split(lengths)):
            row.completion.logprobs[:] = of_row.tolist()
    return rows


def imitate(
    task: Task,
    model: Transformer,
    tokenizer: Tokenizer,
    config: Config,
    watch: Callable[[int, float], None] = lambda step, surprise: None,
) -> tuple[list[float], int]:
    """Train the weights in place on --imitated examples for --imitation-steps steps.

    Each step takes --examples of them, epoch after epoch in an order of the seed. The temperature
    is 1: it is the LM's own distribution that follows the demonstrations.

    Returns the surprise before each step and after the last one, mean -log p of a demonstrated
    token in nats, and how many examples there were. Raises InputError where the training examples
    show no whole calls, and FloatingPointError where the training diverges.
    """
    config = dataclasses.replace(config, temperature=1.0, correction="none", beta=0.0)
    # what the prompts show could be copied
    half = shuffled(without_shown(task), config.seed)[0]
    calls = shown_calls(task, half[: config.imitated], tokenizer, model.config.max_positions)
    if not calls:
        raise InputError(
            f"--task {config.task}: its training examples show no call of its modules with all its "
            "outputs; Task.demonstrate can say what they show"
        )
    optimizer, _ = prepare(model, config)
    [group] = optimizer.param_groups
    surprises = []
    # in the last round the LM is looked at, and not trained any more
    for step in range(config.imitation_steps + 1):
        batch = batch_of(step, config.examples, len(calls), config.seed)
        rows = rows_of([call for i in batch for call in calls[i]], model, tokenizer, config)
        logprobs = [p for row in rows for p in row.completion.logprobs]
        surprises.append(-sum(logprobs) / len(logprobs))
        if not math.isfinite(surprises[-1]):
            raise FloatingPointError(f"diverged after step {step}; try a smaller --lr")
        if step == config.imitation_steps:
            break
        gradient, _ = step_gradient(model, rows, config, tokenizer.size)

        group["lr"] = learning_rate(model, config) * min(1.0, (step + 1) / max(config.warmup, 1))
        for p, g in zip(group["params"], gradient):
            p.grad = g
        torch.nn.utils.clip_grad_norm_(group["params"], config.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_copy_(tuple(trainable(model)), group["params"])

        watch(step, surprises[-1])
    return surprises, len(calls)
