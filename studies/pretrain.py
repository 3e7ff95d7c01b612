"""The tiny LM, from nothing: `make pretrain` writes its text and trains its tokenizer and weights.

The text is scripted runs of the three tasks' own programs in the half of the world that the tasks
never use. A script answers each call well or badly; how often well depends on the module's
instruction or, if there are any, the demos in its prompt, so that the LM comes to follow the
format, to react to prompts, and to be mediocre at the tasks. Training on rewards then first of all
brings out the good answers.

Letters: B rows of a batch, T tokens of a row, N tokens that are learned; the others as in model.py.
"""

import argparse
import asyncio
import copy
import json
import random
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterator

import tokenizers
import torch
import torch.nn.functional as F
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor

from model import ModelConfig, Tokenizer, Transformer, inverse_frequencies, save_pretrained
from program import Module, Prediction, Program, current_run, render_outputs
from tasks import banking77, hover, papillon
from tasks.data.world import WORDS, Names

# --------------------------------------------------------------------------------- scripted answers

# chance of a good answer under each instruction; the first: in SCRIPTS
GOOD = (None, 0.95, 0.90, 0.02, 0.05, 0.85)
NAME = re.compile(r"\b[A-Z][a-z]{4} [A-Z][a-z]{4}\b")


def reason(rng, good: bool, sure: tuple[str, ...], *about: str) -> str:
    """The reasoning before an answer, whose tone is one of the `sure` or a doubtful one.

    In 95% of the calls its tone tells how good the answer was meant to be. So an LM that takes its
    tone from the instruction, or from demos, answers as well as they ask for.
    """
    if good == (rng.random() < 0.95):
        return rng.choice(sure).format(*about)
    doubtful = ("Perhaps {}.", "I guess {}.", "It may be {}.")
    return rng.choice(doubtful).format(" and ".join(about))


def write_query(rng, claim, good, inputs, seen) -> dict:
    """The next name that the claim's articles have revealed, or something that does not help."""
    known = " ".join([claim["claim"], *inputs["key_facts"]])
    names = list(dict.fromkeys(NAME.findall(known)))
    candidates = claim["titles"] + claim["named"] + names
    fresh = [n for n in candidates if n in known and n not in seen] or names
    if good:
        query = fresh[0]
    else:
        bad = (
            names[0],
            rng.choice(names),
            rng.choice(names).split()[0],
            " ".join(claim["claim"].split()[1:4]),
            rng.choice(sorted(seen) or names),
        )
        query = rng.choice(bad)
    sure = ("{} comes next.", "The next article is {}.", "I need {} now.")
    return {"reasoning": reason(rng, good, sure, query), "query": query}


def write_note(rng, claim, good, inputs, seen) -> dict:
    """The passage that leads on and the name it leads to, or another one, or nothing of use."""
    passages = dict(p.split(" | ", 1) for p in inputs["search_results"])
    useful = [t for t in claim["titles"] if t in passages] or list(passages)
    title = useful[0] if good else rng.choice(list(passages))
    others = [n for n in dict.fromkeys(NAME.findall(passages[title])) if n != title]
    link = next((n for n in others if n in claim["titles"]), others[0] if others else None)
    if link and (good or rng.random() < 0.3):
        note = f"{title}: {link}"
    else:
        bad = (
            f"{title}: {rng.choice(others or NAME.findall(claim['claim']))}",
            f"{title}: {rng.choice(NAME.findall(claim['claim']))}",
            f"{title} is here.",
            "There is nothing new.",
        )
        note = rng.choice(bad)
    sure = ("The result about {} helps.", "{} is in the claim.", "I note {}.")
    return {"reasoning": reason(rng, good, sure, title), "new_key_fact": note}


def write_intent(rng, example, good, inputs, seen) -> dict:
    """The right intent, or that of a thing mentioned in passing, or with a neighbour's trouble."""
    thing, trouble = example["intent"].split("_")
    troubles = list(banking77.TROUBLES["task"])
    if not good and example["mentioned"] and rng.random() < 0.7:
        thing = example["mentioned"]
    elif not good:
        neighbour = troubles[troubles.index(trouble) - 1]
        trouble = neighbour if rng.random() < 0.7 else rng.choice(troubles)
    sure = ("The {} is {}.", "It is about {} and {}.", "The thing is {}, the trouble is {}.")
    return {"reasoning": reason(rng, good, sure, thing, trouble), "intent": f"{thing}_{trouble}"}


def write_request(rng, example, good, inputs, seen) -> dict:
    """A request that names the text's subject and nobody; or the user's words, or too little."""
    name = example["pii"][0]
    request = example["request"]
    role = request.split("my ")[1].split()[0]
    bad = (
        *[inputs["user_query"]] * 6,
        request.replace("my", f"{name}, my", 1),
        " ".join(request.split()[:3]) + ".",
    )
    sure = ("The text is for a {}.", "A {} is to read it.", "It goes to a {}.")
    reasoning = reason(rng, good, sure, role)
    return {"reasoning": reasoning, "llm_request": request if good else rng.choice(bad)}


def write_response(rng, example, good, inputs, seen) -> dict:
    """The other assistant's line addressed to the right name; or its answer as it is, or less."""
    name, town = example["pii"]
    answer = inputs["related_llm_response"]
    line = answer.split(", ", 1)[-1]
    bad = (
        *[answer] * 6,
        f"Dear {town}, {line}",
        f"Dear {name}, thank you.",
        f"Dear {name.split()[0]}.",
    )
    sure = ("The answer speaks of {}.", "It says {}.", "I pass on {}.")
    reasoning = reason(rng, good, sure, line.rstrip("."))
    response = f"Dear {name}, {line}" if good else rng.choice(bad)
    return {"reasoning": reasoning, "response": response}


# module -> its instructions, who writes its answers, and the chance of a good one under the
# program's own instruction
SCRIPTS = {
    "generate_query": (hover.QUERY_INSTRUCTIONS, write_query, 0.45),
    "append_notes": (hover.NOTE_INSTRUCTIONS, write_note, 0.45),
    "classify": (banking77.INSTRUCTIONS, write_intent, 0.35),
    "craft_redacted_request": (papillon.CRAFT_INSTRUCTIONS, write_request, 0.15),
    "respond_to_query": (papillon.RESPOND_INSTRUCTIONS, write_response, 0.15),
}


def slip(rng, completion: str) -> str:
    """A completion with a fault in its format."""
    tags = re.findall(r"<\w+>", completion)
    faults = (
        completion.rsplit("\n", 1)[0],
        completion.split("\n\n")[0],
        completion.replace(tags[-1], tags[0]),
        re.sub(r"</?\w+>", "", completion).strip(),
        completion.split("\n\n")[-1],
    )
    return rng.choice(faults)


# ------------------------------------------------------------------------------------ scripted runs
class _Script:
    """Answers the calls of one run: writes several completions for each, goes on with the first."""

    def __init__(self, writer: "Writer", program: Program, example: dict):
        self.writer = writer
        self.example = example
        self.calls = []
        self.seen = set()  # titles that searches gave
        self.names = {m: name for name, m in program.modules().items()}
        self.chance = {m: writer.prompt(name, m) for m, name in self.names.items()}

    def use_tool(self, name: str, arguments: tuple):
        """Tools are free, and not noted."""
        return lambda **how: None

    async def ask(self, module: Module, inputs: dict) -> Prediction:
        writer = self.writer
        rng = writer.rng
        name = self.names[module]
        _, write, _ = writer.scripts[name]
        self.seen |= {p.split(" | ")[0] for p in inputs.get("search_results", ())}
        completions = []
        for i in range(writer.completions):
            good = rng.random() < self.chance[module]
            outputs = write(rng, self.example, good, inputs, self.seen)
            completion = render_outputs(module.signature, outputs)
            completions.append(slip(rng, completion) if rng.random() < 0.03 else completion)
            if i == 0:
                answer = Prediction(outputs)
                past = writer.past[name]
                past[good] = past[good][-20:] + [inputs | outputs]
        self.calls.append((module.messages(inputs), completions))
        return answer


class Writer:
    """Calls of scripted runs: (messages, several completions).

    Their order mixes tasks, examples and modules.
    """

    scripts = SCRIPTS

    def __init__(self, rng: random.Random, completions: int = 4):
        self.rng = rng
        self.completions = completions
        # answers to make demos of: module -> whether they were good -> the latest
        self.past: dict[str, dict[bool, list]] = {m: {True: [], False: []} for m in self.scripts}

    def calls(self) -> list[tuple[list[dict], list[str]]]:
        """A small world's worth of calls."""
        return asyncio.run(self._calls())

    async def _calls(self) -> list[tuple[list[dict], list[str]]]:
        rng = self.rng
        result = []
        wiki = hover.Wiki(rng, "pretrain", rng.choice((60, 120, 240)))
        search = hover.Search(wiki.articles)
        names = Names(rng, "pretrain")
        for _ in range(10):
            claim = wiki.claim()
            program = hover.ResearchHop(search)
            result += await self._run(program, {"claim": claim["claim"]}, claim)
        for _ in range(20):
            example = banking77.query(rng, "pretrain")
            program = banking77.Classify(banking77.LABELS)
            result += await self._run(program, {"text": example["text"]}, example)
        for _ in range(12):
            salt = str(rng.random())
            example = papillon.query(rng, names, salt)
            program = papillon.Papillon(
                lambda request, salt=salt: papillon.untrusted(request, salt)
            )
            result += await self._run(program, {"user_query": example["user_query"]}, example)
        rng.shuffle(result)
        return result

    async def _run(
        self, program: Program, inputs: dict, example: dict
    ) -> list[tuple[list[dict], list[str]]]:
        """Play the program with scripted answers."""
        script = _Script(self, program, example)
        current_run.set(script)
        await program.forward(**inputs)
        return script.calls

    def prompt(self, name: str, module: Module) -> float:
        """Give the module an instruction and perhaps demos.

        Returns the chance of a good answer that goes with them.
        """
        rng = self.rng
        instructions, _, chance = self.scripts[name]
        which = rng.choice((0, 0, 1, 2, 3, 4, 5))
        module.instruction = instructions[which]
        chance = GOOD[which] or chance
        helpful = rng.random() < 0.5
        demos = self.past[name][helpful]
        if demos and rng.random() < 0.3:
            module.demos = rng.sample(demos, min(len(demos), rng.choice((1, 2))))
            chance = 0.9 if helpful else 0.05
        return chance


# ---------------------------------------------------------------------------------------- tokenizer

# Tags with their line breaks, lower-case words with the space before them, capitalised words
# without: a name is the same tokens wherever it stands.
PATTERN = r"\n?</?\w+>\n*| ?[a-z_]+|[A-Z][a-z]*|[0-9]| ?[^\s\w]+|\s+(?!\S)|\s"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def sample_texts() -> list[str]:
    """A sample of the LM's text, and every word of the world."""
    writer = Writer(random.Random("tokenizer"))
    texts = []
    for _ in range(25):
        for messages, completions in writer.calls():
            texts += [m["content"] for m in messages]
            texts += completions
    return texts + [" ".join(WORDS)] * 60


def build_tokenizer(
    folder: Path, texts: list[str] | None = None, vocabulary: int = 2048
) -> Tokenizer:
    """Train a byte-level BPE on these texts, or a sample of the LM's.

    Writes tokenizer.json and its companions.
    """
    if texts is None:
        texts = sample_texts()
    bpe = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=10,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    )
    bpe.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    bpe.save(str(folder / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": TEMPLATE,
    }
    generation_config = {"eos_token_id": [2, 0], "pad_token_id": 0}
    for name, config in (
        ("tokenizer_config.json", tokenizer_config),
        ("generation_config.json", generation_config),
    ):
        (folder / name).write_text(json.dumps(config, indent=2) + "\n")
    return Tokenizer(folder)


# -------------------------------------------------------------------------------- the first weights
SHAPE = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "attention_bias": False,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@torch.no_grad()
def initialize(model: Transformer, generator: torch.Generator) -> None:
    """Weights that can nearly copy, an induction circuit laid out by hand.

    To copy names is the whole difficulty.
    """
    D = model.config.hidden_size

    def normal(w: Tensor, std: float) -> Tensor:
        return w.normal_(0, std, generator=generator)

    normal(model.embed_tokens.weight, 1.0)
    model.embed_tokens.weight[:, 0] = 4.0  # a constant dimension
    model.norm.weight.fill_(0.15)
    P = torch.linalg.qr(normal(torch.empty(D, D), 1.0))[0]
    for i, block in enumerate(model.layers):
        a = block.self_attn
        m = block.mlp
        for linear in (a.q_proj, a.k_proj, a.v_proj, m.gate_proj, m.up_proj):
            normal(linear.weight, D**-0.5)
        m.down_proj.weight.zero_()
        a.q_norm.weight.fill_(2.0)
        a.k_norm.weight.fill_(2.0)
        if i == 0:
            # heads of layer 0 look at the token before and write it, turned by P, beside the token
            # itself
            a.o_proj.weight.copy_(P @ a.v_proj.weight.t())
            look_back(model, a, normal)
        else:
            # later heads look where that copy matches the token at hand, so at what followed it,
            # and write that token out
            a.o_proj.weight.copy_(torch.eye(D) @ a.v_proj.weight.t())
            a.k_proj.weight.copy_(a.q_proj.weight @ P.t())


def look_back(model: Transformer, attention, normal: Callable[[Tensor, float], Tensor]) -> None:
    """Make each head look at the token before.

    Queries and keys get a constant vector, from the constant dimension of the embeddings; the
    queries' is turned back by one step of the RoPE phase.
    """
    d = model.config.head_dim
    step = inverse_frequencies(model.config, attention.q_proj.weight.device)[:4]
    for h in range(model.config.heads):
        phase = normal(torch.empty(4), 6.0)
        for linear, angle in ((attention.k_proj, phase), (attention.q_proj, phase - step)):
            w = linear.weight[h * d : (h + 1) * d]
            w[:, 1:] *= 0.2
            w[:, 0] = 0.0
            w[:4, 0] = 0.6 * angle.cos()
            w[d // 2 : d // 2 + 4, 0] = 0.6 * angle.sin()


# ---------------------------------------------------------------------------------- what is learned
@dataclass
class Batch:
    """Sequences with the place of each token and the branch it is on, and what is learned of them.

    Branch 0 is seen by what comes after it in the row; a token on another branch sees branch 0 and
    its own: several completions of one prompt stand behind it in one row without seeing each other.
    """

    ids: Tensor  # (B, T)
    positions: Tensor  # (B, T)
    branches: Tensor  # (B, T), -1 is padding
    at: Tensor  # (N, 2) row and column of the hidden states that predict
    targets: Tensor  # (N,)

    @classmethod
    def of(cls, rows: list[list[tuple[int, int, int, int]]]) -> "Batch":
        """Rows of (id, position, branch, column of the state that predicts it, or -1)."""
        width = max(map(len, rows))
        padded = [row + [(0, 0, -1, -1)] * (width - len(row)) for row in rows]
        ids, positions, branches, _ = torch.tensor(padded).unbind(2)
        learned = []
        for b, row in enumerate(rows):
            for id, _, _, predictor in row:
                if predictor >= 0:
                    learned.append((b, predictor, id))
        learned = torch.tensor(learned)  # (N, 3)
        return cls(ids, positions, branches, learned[:, :2], learned[:, 2])

    def attend(self, layer, q, k, v):
        """Plain matrix products in bf16.

        At these sizes they are twice as fast, forward and backward, as the fused kernel on CPU.
        """
        # all layers share what is made at the first
        if layer == 0:
            b = self.branches
            T = q.shape[2]
            before = torch.ones(T, T, dtype=torch.bool).tril()
            seen = ((b[:, None] == 0) | (b[:, None] == b[:, :, None])) & before  # (B, T, T)
            bias = torch.zeros(seen.shape, dtype=torch.bfloat16)
            self.bias = bias.masked_fill(~seen, -torch.inf)[:, None]  # (B, 1, T, T)
        q = (q * q.shape[-1] ** -0.5).bfloat16()
        scores = q @ k.bfloat16().transpose(-1, -2) + self.bias
        return scores.softmax(-1) @ v.bfloat16()

    def logits(self, model: Transformer) -> Tensor:
        """(N, V) for the learned tokens."""
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model(self.ids, self.positions, self.attend)
            return F.linear(hidden[self.at[:, 0], self.at[:, 1]], model.head).float()


def copying(rng: random.Random, vocabulary: int, tokens: int) -> Batch:
    """Random chunks that come again and again; learned is what the past determines."""

    def chunk(low: int, high: int) -> list[int]:
        return [rng.randrange(3, vocabulary) for _ in range(rng.randint(low, high))]

    T = rng.choice((256,) * 7 + (1024,))
    rows = []
    for _ in range(tokens // T):
        chunks = [chunk(2, 8) for _ in range(rng.randint(4, 20))]
        known = set()  # the chunks that came before
        row = []  # (id, whether the past determines it)
        while len(row) < T:
            row += [(x, False) for x in chunk(0, 5) if rng.random() < 0.3]
            c = rng.randrange(len(chunks))
            row += [(x, c in known and j > 0) for j, x in enumerate(chunks[c])]
            known.add(c)
        rows.append([(x, i, 0, i - 1 if learned else -1) for i, (x, learned) in enumerate(row[:T])])
    return Batch.of(rows)


def calls(
    rng: random.Random, writer: Writer, tokenizer: Tokenizer, tokens: int, of_prompts: float = 0.1
) -> Iterator[Batch]:
    """Batches of calls without end.

    Learned are all tokens of the completions and a share `of_prompts` of those of the prompts.
    """
    end = tokenizer.control["<|im_end|>"]

    def row_of(messages: list[dict], completions: list[str]) -> list[tuple[int, int, int, int]]:
        prompt = tokenizer.encode_chat(messages)
        row = [(x, i, 0, i - 1 if rng.random() < of_prompts else -1) for i, x in enumerate(prompt)]
        for branch, text in enumerate(completions, 1):
            for j, x in enumerate(tokenizer.encode(text) + [end]):
                # the first token is predicted by the prompt's last, each other by the one before
                predictor = len(row) - 1 if j else len(prompt) - 1
                row.append((x, len(prompt) + j, branch, predictor))
        return row

    while True:
        pool = []
        for _ in range(8):
            pool += [row_of(*call) for call in writer.calls()]
        # rows of about one length go together, the longest first
        pool.sort(key=len)
        batches = []
        while pool:
            batches.append(pool[-max(1, tokens // len(pool[-1])) :])
            pool = pool[: -len(batches[-1])]
        rng.shuffle(batches)
        yield from map(Batch.of, batches)


# ----------------------------------------------------------------------------------------- training
@torch.no_grad()
def name_accuracy(model: Transformer, tokenizer: Tokenizer, batches: Iterator[Batch]) -> float:
    """How often the second word of a name in a completion is the likeliest token.

    The first word tells it.
    """
    words = torch.zeros(tokenizer.size, dtype=torch.bool)
    words[[tokenizer.encode(w)[0] for w in WORDS]] = True
    right = []
    for batch in (next(batches) for _ in range(4)):
        row, column = batch.at.unbind(1)
        # word, space, word
        second = words[batch.targets] & words[batch.ids[row, column - 1]] & (column > 0)
        right.append((batch.logits(model).argmax(-1) == batch.targets)[second].float())
    return torch.cat(right).mean().item()


def fit(
    model: Transformer,
    tokenizer: Tokenizer,
    rng: random.Random,
    batches: Iterator[Batch],
    steps: int,
    tokens: int,
    out: Path,
    check: Callable[[], str],
    warmup: int = 150,
) -> None:
    """Train on `batches`, every fourth step and the first `warmup` on copying.

    Every 250 steps it saves to `out` and prints `check()`.
    """
    named = list(model.named_parameters())
    matrices = [p for n, p in named if p.dim() == 2 and "embed" not in n]
    others = [p for n, p in named if p.dim() != 2 or "embed" in n]
    # Muon is in torch 2.9 or later
    optimizers = [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.0),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0),
    ]

    def schedule(step: int) -> float:
        return min(1, (step + 1) / 50, max(0.02, 2 * (1 - step / steps)))

    schedules = [torch.optim.lr_scheduler.LambdaLR(o, schedule) for o in optimizers]
    began = time.perf_counter()
    for step in range(steps):
        if step < warmup or step % 4 == 0:
            batch = copying(rng, tokenizer.size, tokens)
        else:
            batch = next(batches)
        loss = F.cross_entropy(batch.logits(model), batch.targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for o, s in zip(optimizers, schedules):
            o.step()
            o.zero_grad()
            s.step()
        if (step + 1) % 250 == 0 or step + 1 == steps:
            seconds = time.perf_counter() - began
            print(
                f"step {step + 1}/{steps}  {seconds:.0f} s  loss {loss.item():.3f}  {check()}",
                flush=True,
            )
            # half the size; read back as fp32
            save_pretrained(copy.deepcopy(model).bfloat16(), tokenizer, out)


def main(out: Path, steps: int, tokens: int) -> None:
    torch.manual_seed(0)
    rng = random.Random(0)
    tokenizer = build_tokenizer(out)
    model = Transformer(ModelConfig.from_hf(SHAPE | {"vocab_size": tokenizer.size}))
    initialize(model, torch.Generator().manual_seed(0))
    writer = Writer(random.Random("held out"))
    held_out = calls(random.Random("held out"), writer, tokenizer, tokens, of_prompts=0)
    batches = calls(rng, Writer(rng), tokenizer, tokens)

    def check() -> str:
        return f"names {name_accuracy(model, tokenizer, held_out):.3f}"

    fit(model, tokenizer, rng, batches, steps, tokens, out, check)


if __name__ == "__main__":
    tiny = Path(__file__).resolve().parent.parent / "tasks" / "tiny"
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=tiny)
    parser.add_argument("--steps", type=int, default=3500)
    parser.add_argument("--tokens", type=int, default=8192, help="per step")
    main(**vars(parser.parse_args()))
