"""A small LM from scratch for the real Banking77: demonstrations, from queries that no split has.

    python -m studies.pretrain_banking77 DATA OUT [--steps 600]

A BPE tokenizer and a 1.1M-parameter Qwen3 are made from 4,000 of the queries in DATA/train.csv,
those after the 1,250 of train, dev and test. A demonstration is the prompt of the task's one module
and the answer in its format. The 77 labels stand in every prompt, so a batch is one tree: what all
prompts share is forwarded once.

As a task (--task studies/pretrain_banking77.py --data DATA --model OUT) it trains on the queries
that come after the demonstrations; dev and test are those of the task banking77.
"""

import argparse
import dataclasses
import json
import math
import random
import time
from pathlib import Path

import torch
from torch import Tensor

import mmgrpo as G
from model import ModelConfig, Transformer, save_pretrained
from program import Completion, Task, render_outputs
from studies import pretrain
from tasks import banking77

BATCH = 64
DEMONSTRATIONS = 4000
EVERYTHING = 10**9  # tokens of a micro-batch that holds the whole batch


def parts(folder: Path) -> tuple[list[str], list[dict], list[dict]]:
    """The labels, the queries that demonstrations are made of, and the rest.

    None of them is in a split of the task.
    """
    labels, examples = banking77.read(folder)
    first = sum(banking77.SIZES)
    last = first + DEMONSTRATIONS
    return labels, examples[first:last], examples[last:]


def load(folder: str = "") -> Task:
    """The real Banking77, trained on the rest, each query once; settings were chosen on dev."""
    task = banking77.load(folder or ".")
    _, _, rest = parts(Path(folder))
    settings = {
        "examples": 64,
        "steps": 74,
        "lr": 3e-4,
        "warmup": 10,
        "eval_examples": 0,
        "eval_every": 20,
    }
    return dataclasses.replace(task, train=rest, defaults=task.defaults | settings)


def learning_rate(step: int, steps: int) -> float:
    """Up over 100 steps, then down a cosine to a fiftieth."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return 3e-3 * min(1, (step + 1) / 100) * (0.02 + 0.98 * cosine)


def set_gradients(model: Transformer, tree) -> Tensor:
    """Give each weight its gradient of the mean cross-entropy; return the log-probs (N,)."""
    targets, hidden = G.predicting_states(model, tree)  # (N,), (N, D)

    def loss(logprobs: Tensor, _) -> Tensor:
        return -logprobs.sum() / len(targets)

    # the embeddings are the head too, so that their gradient has two parts
    d_head = torch.zeros_like(model.head)
    logprobs, d_hidden = G.head_gradient(hidden.detach(), model.head, targets, 1.0, loss, d_head)
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(hidden, parameters, d_hidden)
    for p, gradient in zip(parameters, gradients):
        p.grad = gradient + d_head if p is model.head else gradient
    return logprobs


def main(data: Path, out: Path, steps: int, seed: int) -> None:
    labels, demonstrations, _ = parts(data)
    module = banking77.Classify(tuple(labels)).classify

    def answer(intent: str) -> str:
        outputs = {"reasoning": intent.replace("_", " "), "intent": intent}
        return render_outputs(module.signature, outputs)

    # what stands in every prompt or answer weighs more than one query
    often = [answer(label) for label in labels]
    often += [m["content"] for m in module.messages({"text": ""})]
    queries = [e["text"] for e in demonstrations]
    tokenizer = pretrain.build_tokenizer(out, queries + 30 * often)
    torch.manual_seed(seed)
    model = Transformer(ModelConfig.from_hf(pretrain.SHAPE | {"vocab_size": tokenizer.size}))
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, 0, 0.02 if p is model.head else p.shape[1] ** -0.5)
    end = tokenizer.control["<|im_end|>"]
    pairs = []  # prompt and completion
    for e in demonstrations:
        prompt = tokenizer.encode_chat(module.messages({"text": e["text"]}))
        pairs.append((prompt, tokenizer.encode(answer(e["intent"])) + [end]))

    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05, betas=(0.9, 0.98))
    rng = random.Random(seed)
    began = time.time()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        rows = []
        for prompt, completion in rng.sample(pairs, BATCH):
            rows.append(G.Row("classify", Completion(prompt, completion, [], "stop"), 1.0, 1.0))
        (tree,) = G.pack(rows, EVERYTHING)
        logprobs = set_gradients(model, tree)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0:
            print(
                f"step {step + 1}: loss {-logprobs.mean():.4f}, {len(tree.ids)} nodes, "
                f"{time.time() - began:.0f} s",
                flush=True,
            )
    save_pretrained(model.bfloat16(), tokenizer, out)
    made = {
        "steps": steps,
        "seed": seed,
        "demonstrations": len(pairs),
        "seconds": round(time.time() - began),
    }
    (out / "made.json").write_text(json.dumps(made) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    main(**vars(parser.parse_args()))
