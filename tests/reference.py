"""mmGRPO in plain Python: groups, advantages, token weights and loss, written from the paper and not from mmgrpo.py.

No torch, no numpy, no cleverness: every rule is a loop over lists of dicts. It makes the conformance vectors:

    python tests/reference.py           # writes tests/conformance/*.json

A vector has `options`, `trajectories` and `expected`. Trajectories are those of the `group` command; a call may carry
`logprobs`, `old_logprobs` and `ref_logprobs`, one number per sampled token, and then `expected` has a loss as well.
"""
import json
import math
import random
from pathlib import Path

FOLDER = Path(__file__).parent / "conformance"
DEFAULTS = {"short_groups": "keep", "group_size": 0, "level": "call", "seed": 0, "baseline": "group", "leave_one_out": False,
            "scale_rewards": "std", "normalize": "sequence", "constant": 1, "clip_low": 0.2, "clip_high": 0.2, "beta": 0.0}


def votes(t: dict) -> bool:
    return t["status"] != "tool_error" and isinstance(t["reward"], (int, float)) and math.isfinite(t["reward"])


def expected(trajectories: list[dict], options: dict) -> dict:
    """What any implementation should print: groups with members, the runs left out, and the loss."""
    o = DEFAULTS | options
    examples = []
    for t in trajectories:
        if votes(t) and t["example"] not in examples:
            examples.append(t["example"])
    groups = []
    for example in examples:
        runs = [t for t in trajectories if t["example"] == example and votes(t)]
        runs.sort(key=lambda t: t["rollout"])
        for group in places(runs, o):
            group["example"] = example
            group["members"] = pick(group["members"], o["group_size"])
            pool = [m["run"]["reward"] for m in group["members"]] if o["baseline"] == "group" else [t["reward"] for t in runs]
            for m in group["members"]:
                m["advantage"] = advantage(m["run"]["reward"], pool, o)
                m["distance"] = advantage(m["run"]["reward"], pool, {"leave_one_out": False, "scale_rewards": "none"})
            groups.append(group)
    if o["scale_rewards"] == "batch":
        scale_by_batch(groups)
    weigh(groups, trajectories, o)
    result = {"groups": [], "excluded": [{"example": t["example"], "rollout": t["rollout"], "reason": "tool_error"}
                                         for t in trajectories if not votes(t)]}
    for g in groups:
        members = []
        for m in g["members"]:
            place = {"calls": m["calls"]} if o["level"] == "trajectory" else {"call": m["calls"][0]}
            members.append({"rollout": m["run"]["rollout"], **place, "advantage": m["advantage"], "weight": m["weight"]})
        result["groups"].append({"example": g["example"], "module": g["module"], "invocation": g["invocation"], "members": members})
    if all("logprobs" in c for t in trajectories for c in t["calls"]):
        result["loss"] = loss(groups, o)
    return result


def places(runs: list[dict], o: dict) -> list[dict]:
    """The groups of one example, without advantages."""
    if o["level"] == "trajectory":
        members = [{"run": t, "calls": list(range(len(t["calls"])))} for t in runs if t["calls"]]
        return [{"module": "", "invocation": 0, "members": members}] if members else []
    result = []
    for module in sorted({c["module"] for t in runs for c in t["calls"]}):
        own = [[i for i, c in enumerate(t["calls"]) if c["module"] == module] for t in runs]
        longest = max(len(calls) for calls in own)
        for k in range(longest):
            members = []
            for t, calls in zip(runs, own):
                if k < len(calls):
                    members.append({"run": t, "calls": [calls[k]]})
                elif calls and o["short_groups"] == "fill":
                    draw = random.Random(repr((o["seed"], t["example"], t["rollout"], module)))
                    padding = [draw.choice(calls) for _ in range(longest - len(calls))]
                    members.append({"run": t, "calls": [padding[k - len(calls)]]})
            if o["short_groups"] != "truncate" or all(k < len(calls) for calls in own):
                result.append({"module": module, "invocation": k, "members": members})
    return result


def pick(members: list[dict], k: int) -> list[dict]:
    """k members evenly spaced in the order of reward; ties in the order of rollouts; halves to the even place."""
    if k == 0 or k >= len(members):
        return members
    order = sorted(range(len(members)), key=lambda i: (members[i]["run"]["reward"], i))
    steps = max(k - 1, 1)
    return [members[order[round(j * (len(members) - 1) / steps)]] for j in range(k)]


def advantage(reward: float, pool: list[float], o: dict) -> float:
    n = len(pool)
    if n < 2 or all(r == pool[0] for r in pool):
        return 0.0
    mean = sum(pool) / n
    a = reward - (sum(pool) - reward) / (n - 1) if o["leave_one_out"] else reward - mean
    if o["scale_rewards"] == "std":
        a /= math.sqrt(sum((r - mean) ** 2 for r in pool) / (n - 1)) + 1e-4
    return a


def scale_by_batch(groups: list[dict]) -> None:
    """Divide by one standard deviation: of all members of all groups, each around its own group's (or example's) mean."""
    members = [m for g in groups for m in g["members"]]
    variance = sum(m["distance"] ** 2 for m in members) / max(len(members) - 1, 1)
    for m in members:
        m["advantage"] /= math.sqrt(variance) + 1e-4


def tokens(call: dict) -> int:
    return len(call["logprobs"]) if "logprobs" in call else 1


def weigh(groups: list[dict], trajectories: list[dict], o: dict) -> None:
    """The weight of each token of each member; a call without log-probs counts as one token."""
    lengths = [[sum(tokens(m["run"]["calls"][c]) for c in m["calls"]) for m in g["members"]] for g in groups]
    everything = sum(sum(of_group) for of_group in lengths)
    for g, of_group in zip(groups, lengths):
        for m, length in zip(g["members"], of_group):
            if o["normalize"] == "sequence":
                m["weight"] = 1 / len(groups) / len(g["members"]) / max(length, 1)
            elif o["normalize"] == "token":
                m["weight"] = 1 / max(everything, 1)
            else:
                m["weight"] = 1 / (sum(map(votes, trajectories)) * o["constant"])


def loss(groups: list[dict], o: dict) -> float:
    total = 0.0
    for g in groups:
        for m in g["members"]:
            for c in m["calls"]:
                call = m["run"]["calls"][c]
                for i, new in enumerate(call["logprobs"]):
                    ratio = math.exp(new - call["old_logprobs"][i])
                    clipped = min(max(ratio, 1 - o["clip_low"]), 1 + o["clip_high"])
                    gain = min(ratio * m["advantage"], clipped * m["advantage"])
                    difference = call["ref_logprobs"][i] - new
                    total -= m["weight"] * (gain - o["beta"] * (math.exp(difference) - difference - 1))
    return total


# ------------------------------------------------------------------------------------------------------ the vectors

def run(example, rollout: int, reward, modules: str, status: str = "completed") -> dict:
    """A run whose calls are given by letters: "aab" calls module a twice, then b. Every call has 1 to 4 tokens."""
    rng, calls = random.Random(repr((example, rollout))), []
    for module in modules:
        old = [-rng.randint(1, 40) / 16 for _ in range(rng.randint(1, 4))]
        near = lambda: [min(x + rng.randint(-8, 8) / 16, 0.0) for x in old]
        calls.append({"module": module, "logprobs": near(), "old_logprobs": old, "ref_logprobs": near()})
    return {"example": example, "rollout": rollout, "reward": reward, "status": status, "calls": calls}


def group(example, *runs) -> list[dict]:
    """Runs of one example: (reward, modules) or (reward, modules, status)."""
    return [run(example, i, *r) for i, r in enumerate(runs)]


RAGGED = group("e0", (1.0, "qnqnq"), (0.5, "qnq"), (0.0, "q"), (0.25, "qnqnqn"))
MIXED = [*RAGGED, *group("e1", (0.0, "qn"), (1.0, "nq"), (None, "qnq", "tool_error"), (-1.0, "q", "format_error"), (0.0, "", "length"))]
SCENARIOS = {
    "complete": group("e0", (1.0, "ab"), (0.0, "ab"), (0.5, "ab"), (0.25, "ab")),
    "plain-grpo": [*group("e0", (1.0, "a"), (0.0, "a"), (0.0, "a")), *group("e1", (0.5, "a"), (1.0, "a"), (0.25, "a"))],
    "ragged": RAGGED,
    "excluded": MIXED,
    **{f"interrupted-at-{n}": group("e0", (1.0, "qnqn"), (0.0, "qnqn"[:n], "max_calls"), (0.75, "qnqn")) for n in range(5)},
    "duplicated-example": [*group("e0", (1.0, "a"), (0.0, "aa")), *group("e0 again", (1.0, "a"), (1.0, "aa"))],
    "singletons": [*group("e0", (1.0, "a")), *group("e1", (0.0, "aab"))],
    "alone-in-the-later-groups": group("e0", (1.0, "aaa"), (0.0, "a"), (0.5, "a")),
    "equal-rewards": [*group("e0", (0.7, "ab"), (0.7, "a"), (0.7, "abb")), *group("e1", (0.1, "a"), (0.2, "ab"), (0.3, "a"))],
    "a-module-that-some-never-reach": group("e0", (1.0, "ab"), (0.0, "a"), (0.5, "a"), (0.0, "ac")),
    "reward-zero": group("e0", (0.0, "a"), (-1.0, "a", "format_error"), (0.0, "ab")),
    "no-calls": [*group("e0", (1.0, ""), (0.0, "a"), (0.5, "a"))],
    "nothing-votes": group("e0", (None, "ab", "tool_error"), (None, "a", "tool_error")),
    "rollouts-out-of-order": RAGGED[::-1],
    "ten-runs": group("e0", *((((7 * i) % 10) / 10, "a" * (1 + i % 3)) for i in range(10))),
}
VARIANTS = {
    "": {}, "truncate": {"short_groups": "truncate"}, "fill": {"short_groups": "fill"}, "fill-seed-7": {"short_groups": "fill", "seed": 7},
    "2-diverse": {"group_size": 2}, "3-diverse": {"group_size": 3}, "trajectory": {"level": "trajectory"},
    "trajectory-token": {"level": "trajectory", "normalize": "token"}, "example-baseline": {"baseline": "example"},
    "leave-one-out": {"leave_one_out": True}, "example-leave-one-out": {"baseline": "example", "leave_one_out": True},
    "unscaled": {"scale_rewards": "none"}, "token": {"normalize": "token"}, "constant": {"normalize": "constant", "constant": 64},
    "clip-higher": {"clip_low": 0.1, "clip_high": 0.3}, "kl": {"beta": 0.04}, "dr-grpo": {"scale_rewards": "none", "normalize": "constant", "constant": 64},
    "fill-2-diverse-kl": {"short_groups": "fill", "group_size": 2, "beta": 0.01}, "batch": {"scale_rewards": "batch"},
    "batch-example-leave-one-out": {"scale_rewards": "batch", "baseline": "example", "leave_one_out": True},
}


def vectors() -> dict[str, dict]:
    """File name -> vector. Every scenario with the defaults and by batch; every variant on the scenarios where runs differ."""
    chosen = [(s, v) for s in SCENARIOS for v in VARIANTS if v in ("", "batch") or s in ("ragged", "excluded", "equal-rewards", "ten-runs")]
    return {f"{s}{'.' * bool(v)}{v}.json": {"options": VARIANTS[v], "trajectories": SCENARIOS[s],
                                            "expected": expected(SCENARIOS[s], VARIANTS[v])} for s, v in chosen}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for old in FOLDER.glob("*.json"):
        old.unlink()
    for name, vector in vectors().items():
        (FOLDER / name).write_text(json.dumps(vector, indent=1) + "\n")
    print(f"{len(vectors())} vectors are in {FOLDER}")
