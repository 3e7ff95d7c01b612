"""Are the exercises of the notebooks solved? `make exercises`.

Each check compares an answer with what the project itself says: its functions, or the conformance
vectors. The solutions in tests/solutions.py are not used.

    python tests/exercises_check.py [ANSWERS.py]        # default docs/notebooks/exercises.py
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import itertools
import json
import math
import sys
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from strategies import ScriptedSampler  # noqa: E402

from mmgrpo import (  # noqa: E402
    Row,
    Sampler,
    advantages,
    group_calls,
    pack,
    policy_loss,
    sample_tokens,
    weigh,
)
from model import KVCache, attention, load_pretrained  # noqa: E402
from program import (  # noqa: E402
    Call,
    ChainOfThought,
    Completion,
    Prediction,
    Program,
    Trajectory,
    run_programs,
)
from run.figures import measure  # noqa: E402
from studies import oracle  # noqa: E402

STUBS = ROOT / "docs" / "notebooks" / "exercises.py"


class Wrong(AssertionError):
    """An answer is not what was asked for; the message says where."""


CHECKS: dict[str, Callable[[Callable], None]] = {}


def check(function: Callable[[Callable], None]) -> Callable:
    """Registers the check of the exercise that has the function's name."""
    CHECKS[function.__name__] = function
    return function


def outcome(name: str, answer: Callable | None) -> str:
    """ "right", "unsolved", or "wrong: …"."""
    if answer is None:
        return "unsolved"
    try:
        CHECKS[name](answer)
    except NotImplementedError:
        return "unsolved"
    except Wrong as e:
        return f"wrong: {e}"
    except Exception as e:
        return f"wrong: {type(e).__name__}: {e}"
    return "right"


def load(path: Path) -> ModuleType:
    """The answers as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ------------------------------------------------------------------------- comparing


def close(found, wanted, tolerance: float = 1e-6) -> bool:
    """Equal, numbers but for rounding, in lists and dicts as well; NaN equals nothing."""
    if isinstance(wanted, dict):
        return (
            isinstance(found, dict)
            and found.keys() == wanted.keys()
            and all(close(found[key], wanted[key], tolerance) for key in wanted)
        )
    if isinstance(wanted, (list, tuple, np.ndarray)):
        return (
            isinstance(found, (list, tuple, np.ndarray))
            and len(found) == len(wanted)
            and all(close(a, b, tolerance) for a, b in zip(found, wanted))
        )
    if isinstance(wanted, float):
        return math.isclose(found, wanted, rel_tol=tolerance, abs_tol=tolerance)
    return found == wanted


def same(found, wanted, given: str) -> None:
    """Raises Wrong where an answer is not what was wanted."""
    if not close(found, wanted):
        raise Wrong(f"{given}: expected {shortened(wanted)}, found {shortened(found)}")


def shortened(value) -> str:
    text = repr(value)
    return text if len(text) < 160 else f"{text[:160]}…"


# --------------------------------------------------------- 1 from GRPO to mmGRPO


def trajectory(run: dict) -> Trajectory:
    """A run of a conformance vector."""
    calls = []
    for call in run["calls"]:
        logprobs = call["old_logprobs"]
        completion = Completion([1, 2], [3] * len(logprobs), logprobs, "stop")
        made = sum(c.module == call["module"] for c in calls)
        calls.append(Call(call["module"], made, completion=completion))
    return Trajectory(
        run["example"], run["rollout"], tuple(calls), None, run["reward"], run["status"]
    )


def vectors(options: dict) -> dict[str, tuple[list[Trajectory], dict]]:
    """The conformance vectors with these options: name -> trajectories, what is expected."""
    result = {}
    for path in sorted((ROOT / "tests" / "conformance").glob("*.json")):
        vector = json.loads(path.read_text())
        if vector["options"] == options:
            result[path.stem] = (
                [trajectory(run) for run in vector["trajectories"]],
                vector["expected"],
            )
    return result


def modules_of(t: Trajectory) -> list[str]:
    return [call.module for call in t.calls]


@check
def invocations(answer):
    for name, (trajectories, expected) in vectors({}).items():
        run = {(t.example, t.rollout): modules_of(t) for t in trajectories}
        for group in expected["groups"]:
            for member in group["members"]:
                modules = run[group["example"], member["rollout"]]
                found = answer(list(modules))
                given = f"invocations({modules}) on vector {name}"
                same(len(found), len(modules), f"the length of {given}")
                same(found[member["call"]], group["invocation"], f"{given}, call {member['call']}")


@check
def groups_of(answer):
    for trajectories, _ in vectors({}).values():
        for example in {t.example for t in trajectories}:
            runs = [t for t in trajectories if t.example == example and t.votes]
            runs.sort(key=lambda t: t.rollout)
            wanted = {
                (g.module, g.invocation): sorted(m.trajectory for m in g.members)
                for g in group_calls(runs)
            }
            modules = [modules_of(t) for t in runs]
            same(dict(answer(copy.deepcopy(modules))), wanted, f"groups_of({modules})")


@check
def relative_advantages(answer):
    for trajectories, expected in vectors({}).values():
        reward = {(t.example, t.rollout): t.reward for t in trajectories}
        for group in expected["groups"]:
            rewards = [reward[group["example"], m["rollout"]] for m in group["members"]]
            wanted = [m["advantage"] for m in group["members"]]
            same(list(answer(list(rewards))), wanted, f"relative_advantages({rewards})")


@check
def token_weights(answer):
    for trajectories, _ in vectors({}).values():
        groups = group_calls(trajectories)
        rows = iter(weigh(groups, advantages(groups, trajectories), trajectories))
        lengths, wanted = [], []
        for group in groups:
            of_group = [next(rows) for _ in group.members]
            lengths.append([len(row.completion.token_ids) for row in of_group])
            wanted.append([row.weight for row in of_group])
        same(answer(copy.deepcopy(lengths)), wanted, f"token_weights({lengths})")


@check
def runs_that_truncate_ignores(answer):
    runs = answer()
    same({t.status for t in runs}, {"completed"}, "the statuses")
    same(len({t.example for t in runs}), 1, "the number of examples")
    same(len({t.rollout for t in runs}), len(runs), "the number of distinct rollouts")
    left = [(g.module, g.invocation) for g in group_calls(runs, short_groups="truncate")]
    same(left, [], "the groups that truncate leaves")
    kept = advantages(group_calls(runs), runs)
    if not any(any(of_group) for of_group in kept):
        raise Wrong("with keep, too, all advantages are 0")


# --------------------------------------------------------------------- 2 the sampler


@check
def draw(answer):
    cases = [([0.0, 0.25, 0.75], 0.0), ([0.0, 0.5, 0.0, 0.5], 0.75), ([0.5, 0.0, 0.5], 0.5)]
    rng = np.random.default_rng(0)
    for _ in range(200):
        p = rng.dirichlet([0.7] * 6)
        cases.append((p.tolist(), float(rng.random())))
    for p, u in cases:
        logits = torch.tensor([p], dtype=torch.double).log()
        token, _ = sample_tokens(logits, torch.tensor([u]), temperature=1.0)
        edge = min(abs(u - total) for total in np.cumsum(p))
        if edge > 1e-5 or len(p) < 6:  # fp32 decides the others
            same(int(answer(list(p), u)), int(token), f"draw({p}, {u})")


def tiny():
    return load_pretrained(ROOT / "tasks" / "tiny")


def chat(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


@check
def greedy(answer):
    model, tokenizer = tiny()
    for text, most in (("Name the intent of the customer.", 24), ("Who made the film?", 5)):
        sampler = Sampler(model, tokenizer, max_tokens=most, temperature=0.0)
        sampler.submit(chat(text), ("greedy",))
        done: list = []
        while not done:
            done = sampler.advance()
        ((_, completion),) = done
        prompt = list(completion.prompt_ids)
        # a second time with an end token that does occur, so that the answer has to stop at it
        for ends, wanted in (
            (set(tokenizer.end_ids), completion.token_ids),
            ({completion.token_ids[2]}, up_to(completion.token_ids, completion.token_ids[2])),
        ):
            same(answer(model, list(prompt), ends, most), wanted, f"greedy of {text!r}")


def up_to(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end) + 1]


def random_sequences(rng: np.random.Generator) -> list[list[int]]:
    """Sequences over three tokens, so that many begin alike; no one is the beginning of another."""
    count = int(rng.integers(1, 7))
    sequences = [rng.integers(3, 6, rng.integers(1, 8)).tolist() + [6] for _ in range(count)]
    return [list(s) for s in dict.fromkeys(map(tuple, sequences))]


def rows_of(sequences: list[list[int]]) -> list[Row]:
    """Rows of the loss whose forwarded tokens are these sequences."""
    return [Row("m", Completion(s, [1], [-1.0], "stop"), 1.0, 1.0) for s in sequences]


@check
def distinct_tokens(answer):
    rng = np.random.default_rng(0)
    for sequences in [[[7, 8], [7, 9], [7, 8, 9]], *(random_sequences(rng) for _ in range(50))]:
        (tree,) = pack(rows_of(sequences), 10**9)
        same(answer(copy.deepcopy(sequences)), len(tree.ids), f"distinct_tokens({sequences})")


@check
def prefix_tree(answer):
    model, _ = tiny()
    rng = np.random.default_rng(1)
    for _ in range(8):
        sequences = random_sequences(rng)
        ids, positions, mask, last = answer(copy.deepcopy(sequences))
        (tree,) = pack(rows_of(sequences), 10**9)
        same(len(ids), len(tree.ids), f"nodes of the tree of {sequences}")
        sees = torch.tensor(mask, dtype=torch.bool)
        attend = partial(attention, mask=sees)
        with torch.no_grad():
            together = model(torch.tensor([ids]), torch.tensor([positions]), attend)[0, last]
            alone = torch.stack([model(torch.tensor([s]))[0, -1] for s in sequences])
        apart = (together - alone).abs().max().item()
        if not apart < 1e-3:
            raise Wrong(f"the last states of {sequences} are up to {apart:.3g} from those alone")


@check
def cache_bytes(answer):
    config = dataclasses.replace(tiny()[0].config, kv_heads=2)
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        cache = KVCache(config, slots=1, dtype=dtype)
        cache.reserve(10)
        a_token = cache.pool.numel() * cache.pool.element_size() // cache.pool.shape[2]
        same(answer(config, 1000, size), 1000 * a_token, f"1,000 tokens in {dtype}")


# ----------------------------------------------------------------------- 3 the loss

RATIOS = (0.3, 0.79, 0.81, 0.95, 1.0, 1.1, 1.19, 1.29, 1.31, 2.5)
CLIPS = ((0.2, 0.2), (0.2, 0.3), (0.1, 0.3))


def cases() -> list[tuple[float, float, float, float]]:
    return [
        (ratio, advantage, *clip)
        for ratio, advantage, clip in itertools.product(RATIOS, (-1.5, 0.7), CLIPS)
    ]


def one(value: float) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.double)


@check
def gain(answer):
    for ratio, advantage, low, high in cases():
        loss = policy_loss(one(math.log(ratio)), one(0), one(advantage), one(1), low, high)
        given = f"gain({ratio}, {advantage}, {low}, {high})"
        same(answer(ratio, advantage, low, high), -loss.item(), given)


@check
def still_moves(answer):
    for ratio, advantage, low, high in cases():
        logprob = one(math.log(ratio)).requires_grad_()
        policy_loss(logprob, one(0), one(advantage), one(1), low, high).backward()
        given = f"still_moves({ratio}, {advantage}, {low}, {high})"
        same(bool(answer(ratio, advantage, low, high)), logprob.grad.item() != 0, given)


@check
def k3(answer):
    for logprob, reference in itertools.product((-0.1, -1.0, -3.0), repeat=2):
        loss = partial(policy_loss, one(logprob), one(logprob), one(0), one(1))
        with_kl = loss(beta=1.0, ref_logprobs=one(reference)).item()
        same(
            float(answer(logprob, reference)),
            with_kl - loss().item(),
            f"k3({logprob}, {reference})",
        )


@check
def logit_gradient(answer):
    rng = np.random.default_rng(0)
    for advantage, weight in ((1.0, 1.0), (-0.5, 0.25), (2.0, 0.1)):
        logits = torch.tensor(rng.normal(0, 1.5, 5), requires_grad=True)
        token = int(rng.integers(5))
        logprob = logits.log_softmax(0)[[token]]
        policy_loss(logprob, logprob.detach(), one(advantage), one(weight)).backward()
        p = logits.detach().softmax(0).tolist()
        given = f"logit_gradient({[round(x, 3) for x in p]}, {token}, {advantage}, {weight})"
        same(list(answer(p, token, advantage, weight)), logits.grad.tolist(), given)


@check
def predicting_positions(answer):
    for prompt, sampled in ((1, 1), (5, 1), (3, 4), (20, 7)):
        completion = Completion(list(range(prompt)), [1] * sampled, [-1.0] * sampled, "stop")
        (tree,) = pack([Row("m", completion, 1.0, 1.0)], 10**9)
        given = f"predicting_positions({prompt}, {sampled})"
        same(list(answer(prompt, sampled)), [tree.positions[node] for node in tree.at], given)


# -------------------------------------------------------------- 4 bias and variance

PLAIN = {
    "short_groups": "keep",
    "scale_rewards": "none",
    "normalize": "constant",
    "failing": "trained",
}


@check
def exact_gradient(answer):
    for seed in range(3):
        world = oracle.World(seed)
        same(answer(world), world.gradient, f"the gradient of World({seed})")


@check
def company(answer):
    """With the group's leave-one-out baseline a call that is alone has advantage 0, any other an
    unbiased one: what arrives of the exact gradient at the prompt is the probability of company."""
    variant = PLAIN | {"baseline": "group", "leave_one_out": True}
    for seed, runs in ((0, 2), (1, 2), (0, 3)):
        world = oracle.World(seed)
        (row,) = oracle.report(world, *oracle.expectation(world, runs, [variant]))
        for prompt, reached in ((0, 1), (1, 2), (3, 3)):  # calls that a run makes to get there
            p = sum(r.probability for r in world.runs if len(r.calls) >= reached)
            same(float(answer(p, runs)), float(row["by prompt"][prompt]), f"company({p}, {runs})")


@check
def shrink(answer):
    variant = PLAIN | {"baseline": "example", "leave_one_out": False}
    world = oracle.World(1)
    for runs in (2, 3):
        (row,) = oracle.report(world, *oracle.expectation(world, runs, [variant]))
        same(float(answer(runs)), float(row["scale"]), f"shrink({runs})")


def with_baselines(world: oracle.World, runs: tuple[int, ...], baselines: list[float]):
    """REINFORCE with each of some constant baselines, (baselines, P)."""
    (run,) = (world.runs[i] for i in runs)
    return np.array([(run.reward - b) * sum(g for _, _, g in run.calls) for b in baselines])


@check
def best_baseline(answer):
    for seed in (0, 1):
        world = oracle.World(seed)
        found = answer(world)
        baselines = [found, found - 0.01, found + 0.01]
        _, (here, below, above) = oracle.expectation(world, 1, baselines, with_baselines)
        if here > min(below, above):
            way = "lower" if below < above else "higher"
            raise Wrong(
                f"World({seed}): with a {way} baseline than {found:.4f} the variance is less"
            )


# ------------------------------------------------------ 5 your own program, trained

LABELS = ("card_fee", "card_missing", "cash_fee")


def run_with(program, intents: list[str], metric: Callable = lambda e, p: 1.0) -> Trajectory:
    """One run of a program on a text; its k-th call names intents[k]."""

    def reply(messages, key):
        *_, module, invocation = key
        if module != "sort":
            raise Wrong(f"a module is called {module!r}; expected 'sort'")
        if invocation >= len(intents):
            raise Wrong(f"call {invocation + 1} was one too many")
        return f"<reasoning>\nr\n</reasoning>\n\n<intent>\n{intents[invocation]}\n</intent>"

    examples = [{"text": "my card has a fee", "intent": "card_fee"}]
    (run,) = run_programs(program, examples, metric, ScriptedSampler(reply))
    return run


@check
def majority(answer):
    for intents in itertools.product(LABELS, repeat=3):
        run = run_with(answer(LABELS), list(intents))
        counts = [intents.count(intent) for intent in intents]
        wanted = intents[counts.index(max(counts))]
        same(
            [(c.module, c.invocation) for c in run.calls], [("sort", k) for k in range(3)], "calls"
        )
        same(run.status, "completed", f"how the run on {intents} ended")
        same(run.prediction.get("intent"), wanted, f"the prediction where {intents} were named")


@check
def until_two_agree(answer):
    a, b, c = LABELS
    for most, intents, made in (
        (4, [a, a, b, c], 2),
        (4, [a, b, b, c], 3),
        (4, [a, b, a, b], 4),
        (3, [a, b, c], 3),
        (1, [a], 1),
    ):
        run = run_with(answer(LABELS, most), intents)
        given = f"at most {most} calls where {intents} are named"
        same(run.status, "completed", f"how it ended, {given}")
        same(len(run.calls), made, f"calls, {given}")
        same(run.prediction.get("intent"), intents[made - 1], f"the prediction, {given}")


class OneCall(Program):
    """Names the intent that its one call names."""

    def __init__(self):
        self.sort = ChainOfThought("text -> intent")

    async def forward(self, text):
        return Prediction(intent=(await self.sort(text=text)).intent)


@check
def partial_reward(answer):
    answer({"intent": "card_fee"}, Prediction(intent="card_fee"))  # unsolved: it is not caught here
    for intent, wanted in {
        "card_fee": 1.0,
        "card_missing": 0.5,
        "cash_fee": 0.5,
        "cash_missing": 0.0,
    }.items():
        run = run_with(OneCall(), [intent], answer)
        given = f"where {intent} was named, and card_fee is right"
        same(run.status, "completed", f"how the run ended {given}")
        same(run.reward, wanted, f"the reward {given}")


@check
def survival(answer):
    for name, (trajectories, _) in vectors({}).items():
        if not any(t.votes for t in trajectories):
            continue
        groups = group_calls(trajectories)
        figures = measure(trajectories, groups, advantages(groups, trajectories))["modules"]
        for module, of_module in figures.items():
            wanted = [float(share) for share in of_module["survival"]]
            same(list(answer(trajectories, module)), wanted, f"module {module!r} of vector {name}")


# ------------------------------------------------------------------------------------


def main(path: Path) -> int:
    """Print how each exercise stands; 0 where all are right."""
    answers = load(path)
    counts: dict[str, int] = defaultdict(int)
    for name in CHECKS:
        found = outcome(name, getattr(answers, name, None))
        counts[found.split(":")[0]] += 1
        print(f"{name:28}{found}", flush=True)
    print(", ".join(f"{counts[kind]} {kind}" for kind in ("right", "wrong", "unsolved")))
    return counts["right"] < len(CHECKS)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if sys.argv[1:] else STUBS))
