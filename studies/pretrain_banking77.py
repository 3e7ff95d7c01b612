"""A small LM from scratch for the real Banking77: demonstrations of its one module, from queries that no split has.

    python -m studies.pretrain_banking77 DATA OUT [--steps 600]

A BPE tokenizer and a 1.1M-parameter Qwen3 are made from 4,000 of the queries in DATA/train.csv, those after the 1,250 of train, dev
and test. A demonstration is the module's own prompt and the answer in its format. The 77 labels stand in every prompt, so
a batch is one tree: what all prompts share is forwarded once.

As a task (--task studies/pretrain_banking77.py --data DATA --model OUT) it trains on the queries that come after the demonstrations; dev
and test are those of the task banking77.
"""
import argparse
import dataclasses
import json
import math
import random
import time
from pathlib import Path

import torch

import mmgrpo as G
from model import ModelConfig, Transformer, save_pretrained
from program import Completion, Task, render_outputs
from studies import pretrain
from tasks import banking77

BATCH, DEMONSTRATIONS = 64, 4000


def parts(folder: Path) -> tuple[list[str], list[dict], list[dict]]:
    """The labels, the queries that demonstrations are made of, and the rest: those that are in no split either."""
    labels, examples = banking77.read(folder)
    first = sum(banking77.SIZES)
    return labels, examples[first:first + DEMONSTRATIONS], examples[first + DEMONSTRATIONS:]


def load(folder: str = "") -> Task:
    """The real Banking77, trained on the rest, each of its queries once; settings were chosen on dev."""
    task, (_, _, rest) = banking77.load(folder or "."), parts(Path(folder))
    return dataclasses.replace(task, train=rest, defaults=task.defaults | {
        "examples": 64, "steps": 74, "lr": 3e-4, "warmup": 10, "eval_examples": 0, "eval_every": 20})


def main(data: Path, out: Path, steps: int, seed: int) -> None:
    labels, demonstrations, _ = parts(data)
    module = banking77.Classify(tuple(labels)).classify
    answer = lambda intent: render_outputs(module.signature, {"reasoning": intent.replace("_", " "), "intent": intent})
    often = [answer(label) for label in labels] + [m["content"] for m in module.messages({"text": ""})]
    tokenizer = pretrain.build_tokenizer(out, [e["text"] for e in demonstrations] + 30 * often)
    torch.manual_seed(seed)
    model = Transformer(ModelConfig.from_hf(pretrain.SHAPE | {"vocab_size": tokenizer.size}))
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, 0, 0.02 if p is model.head else p.shape[1] ** -0.5)
    end = tokenizer.control["<|im_end|>"]
    ids = [(tokenizer.encode_chat(module.messages({"text": e["text"]})), tokenizer.encode(answer(e["intent"])) + [end]) for e in demonstrations]
    optimizer, rng, began = torch.optim.AdamW(model.parameters(), weight_decay=0.05, betas=(0.9, 0.98)), random.Random(seed), time.time()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        rows = [G.Row("classify", Completion(p, c, [], "stop"), 1.0, 1.0) for p, c in rng.sample(ids, BATCH)]
        tree, = G.pack(rows, 10**9)
        targets, hidden = G.predicting_states(model, tree)
        d_head = torch.zeros_like(model.head)
        logprobs, d_hidden = G.head_gradient(hidden.detach(), model.head, targets, 1.0, lambda x, _: -x.sum() / len(targets), d_head)
        for p, g in zip(model.parameters(), torch.autograd.grad(hidden, list(model.parameters()), d_hidden)):
            p.grad = g + d_head if p is model.head else g
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0:
            print(f"step {step + 1}: loss {-logprobs.mean():.4f}, {len(tree.ids)} nodes, {time.time() - began:.0f} s", flush=True)
    save_pretrained(model.bfloat16(), tokenizer, out)
    (out / "made.json").write_text(json.dumps({"steps": steps, "seed": seed, "demonstrations": len(ids), "seconds": round(time.time() - began)}) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    main(**vars(parser.parse_args()))
