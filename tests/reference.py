"""mmGRPO in plain Python: groups, advantages, token weights and loss.

It is written from the paper and not from mmgrpo.py: no torch, no numpy, no cleverness; every rule
is a loop over lists of dicts. It makes the conformance vectors:

    python tests/reference.py           # writes tests/conformance/*.json

A vector has `options`, `trajectories` and `expected`. Trajectories are those of the `group`
command; a call may carry `logprobs`, `old_logprobs` and `ref_logprobs`, one number per sampled
token, and then `expected` has a loss as well.
"""

import json
import math
import random
from pathlib import Path

FOLDER = Path(__file__).parent / "conformance"
DEFAULTS = {
    "short_groups": "keep",
    "group_size": 0,
    "level": "call",
    "seed": 0,
    "baseline": "group",
    "leave_one_out": False,
    "scale_rewards": "std",
    "normalize": "sequence",
    "constant": 1,
    "clip_low": 0.2,
    "clip_high": 0.2,
    "beta": 0.0,
}


# --------------------------------------------------------------------------------- what is expected
def expected(trajectories: list[dict], options: dict) -> dict:
    """What any implementation should print: groups with members, the runs left out, the loss."""
    o = DEFAULTS | options
    groups = []
    for example in examples_of(trajectories):
        runs = [t for t in trajectories if t["example"] == example and votes(t)]
        runs.sort(key=lambda t: t["rollout"])
        for group in places(runs, o):
            group["example"] = example
            group["members"] = pick(group["members"], o["group_size"])
            compare(group["members"], runs, o)
            groups.append(group)
    if o["scale_rewards"] == "batch":
        scale_by_batch(groups)
    weigh(groups, trajectories, o)

    result = {
        "groups": [as_printed(group, o) for group in groups],
        "excluded": [left_out(t) for t in trajectories if not votes(t)],
    }
    if all("logprobs" in c for t in trajectories for c in t["calls"]):
        result["loss"] = loss(groups, o)
    return result


def votes(t: dict) -> bool:
    if t["status"] == "tool_error":
        return False
    return isinstance(t["reward"], (int, float)) and math.isfinite(t["reward"])


def examples_of(trajectories: list[dict]) -> list:
    """Those of which a run votes, in the order of their first."""
    examples = []
    for t in trajectories:
        if votes(t) and t["example"] not in examples:
            examples.append(t["example"])
    return examples


def left_out(t: dict) -> dict:
    reason = "tool_error" if t["status"] == "tool_error" else "reward"
    return {"example": t["example"], "rollout": t["rollout"], "reason": reason}


def as_printed(group: dict, o: dict) -> dict:
    members = []
    for m in group["members"]:
        member = {"rollout": m["run"]["rollout"]}
        if o["level"] == "trajectory":
            member["calls"] = m["calls"]
        else:
            member["call"] = m["calls"][0]
        member["advantage"] = m["advantage"]
        member["weight"] = m["weight"]
        members.append(member)
    return {
        "example": group["example"],
        "module": group["module"],
        "invocation": group["invocation"],
        "members": members,
    }


# ------------------------------------------------------------------------------------------- groups
def places(runs: list[dict], o: dict) -> list[dict]:
    """The groups of one example, without advantages."""
    if o["level"] == "trajectory":
        members = [{"run": t, "calls": list(range(len(t["calls"])))} for t in runs if t["calls"]]
        return [{"module": "", "invocation": 0, "members": members}] if members else []
    result = []
    for module in sorted({c["module"] for t in runs for c in t["calls"]}):
        own = [calls_of(module, t) for t in runs]
        longest = max(len(calls) for calls in own)
        for k in range(longest):
            members = []
            for t, calls in zip(runs, own):
                if k < len(calls):
                    members.append({"run": t, "calls": [calls[k]]})
                elif calls and o["short_groups"] == "fill":
                    padding = drawn_again(t, module, calls, longest - len(calls), o["seed"])
                    members.append({"run": t, "calls": [padding[k - len(calls)]]})
            reached_by_all = all(k < len(calls) for calls in own)
            if o["short_groups"] != "truncate" or reached_by_all:
                result.append({"module": module, "invocation": k, "members": members})
    return result


def calls_of(module: str, t: dict) -> list[int]:
    """Which of the run's calls are the module's."""
    return [i for i, call in enumerate(t["calls"]) if call["module"] == module]


def drawn_again(t: dict, module: str, calls: list[int], count: int, seed: int) -> list[int]:
    """As many of the run's own calls of the module, at random."""
    draw = random.Random(repr((seed, t["example"], t["rollout"], module)))
    return [draw.choice(calls) for _ in range(count)]


def pick(members: list[dict], k: int) -> list[dict]:
    """k members evenly spaced in the order of reward.

    Ties are in the order of rollouts; halves go to the even place.
    """
    if k == 0 or k >= len(members):
        return members
    order = sorted(range(len(members)), key=lambda i: (members[i]["run"]["reward"], i))
    steps = max(k - 1, 1)
    chosen = []
    for j in range(k):
        place = round(j * (len(members) - 1) / steps)
        chosen.append(members[order[place]])
    return chosen


# --------------------------------------------------------------------------------------- advantages
def compare(members: list[dict], runs: list[dict], o: dict) -> None:
    """Give each member of a group its advantage, and its plain distance from the mean."""
    compared = [m["run"] for m in members] if o["baseline"] == "group" else runs
    pool = [t["reward"] for t in compared]
    plain = {"leave_one_out": False, "scale_rewards": "none"}
    for m in members:
        m["advantage"] = advantage(m["run"]["reward"], pool, o)
        m["distance"] = advantage(m["run"]["reward"], pool, plain)


def advantage(reward: float, pool: list[float], o: dict) -> float:
    """Of a run with this reward among those of the pool."""
    n = len(pool)
    if n < 2 or all(r == pool[0] for r in pool):
        return 0.0
    mean = sum(pool) / n
    if o["leave_one_out"]:
        a = reward - (sum(pool) - reward) / (n - 1)
    else:
        a = reward - mean
    if o["scale_rewards"] == "std":
        variance = sum((r - mean) ** 2 for r in pool) / (n - 1)
        a /= math.sqrt(variance) + 1e-4
    return a


def scale_by_batch(groups: list[dict]) -> None:
    """Divide by one standard deviation.

    That of all members of all groups, each around the mean of its own group (or example).
    """
    members = [m for g in groups for m in g["members"]]
    variance = sum(m["distance"] ** 2 for m in members) / max(len(members) - 1, 1)
    for m in members:
        m["advantage"] /= math.sqrt(variance) + 1e-4


# --------------------------------------------------------------------------------------------- loss
def tokens(call: dict) -> int:
    """A call without log-probs counts as one token."""
    return len(call["logprobs"]) if "logprobs" in call else 1


def weigh(groups: list[dict], trajectories: list[dict], o: dict) -> None:
    """The weight of each token of each member."""
    everything = sum(length_of(m) for g in groups for m in g["members"])
    voting = sum(votes(t) for t in trajectories)
    for g in groups:
        for m in g["members"]:
            if o["normalize"] == "sequence":
                m["weight"] = 1 / len(groups) / len(g["members"]) / max(length_of(m), 1)
            elif o["normalize"] == "token":
                m["weight"] = 1 / max(everything, 1)
            else:
                m["weight"] = 1 / (voting * o["constant"])


def length_of(member: dict) -> int:
    """Its tokens, over all its calls."""
    return sum(tokens(member["run"]["calls"][c]) for c in member["calls"])


def loss(groups: list[dict], o: dict) -> float:
    total = 0.0
    for g in groups:
        for m in g["members"]:
            for c in m["calls"]:
                call = m["run"]["calls"][c]
                for new, old, ref in zip(
                    call["logprobs"], call["old_logprobs"], call["ref_logprobs"]
                ):
                    gain = clipped_gain(new, old, m["advantage"], o)
                    total -= m["weight"] * (gain - o["beta"] * k3(new, ref))
    return total


def clipped_gain(new: float, old: float, advantage: float, o: dict) -> float:
    ratio = math.exp(new - old)
    clipped = min(max(ratio, 1 - o["clip_low"]), 1 + o["clip_high"])
    return min(ratio * advantage, clipped * advantage)


def k3(new: float, ref: float) -> float:
    """The estimate of the KL from one token."""
    difference = ref - new
    return math.exp(difference) - difference - 1


# -------------------------------------------------------------------------------------- the vectors
def run(example, rollout: int, reward, modules: str, status: str = "completed") -> dict:
    """A run whose calls are given by letters: "aab" calls module a twice, then b.

    Every call has 1 to 4 tokens.
    """
    rng = random.Random(repr((example, rollout)))
    calls = []
    for module in modules:
        old = [-rng.randint(1, 40) / 16 for _ in range(rng.randint(1, 4))]
        calls.append(
            {
                "module": module,
                "logprobs": nearby(old, rng),
                "old_logprobs": old,
                "ref_logprobs": nearby(old, rng),
            }
        )
    return {
        "example": example,
        "rollout": rollout,
        "reward": reward,
        "status": status,
        "calls": calls,
    }


def nearby(logprobs: list[float], rng: random.Random) -> list[float]:
    return [min(x + rng.randint(-8, 8) / 16, 0.0) for x in logprobs]


def group(example, *runs) -> list[dict]:
    """Runs of one example: (reward, modules) or (reward, modules, status)."""
    return [run(example, i, *r) for i, r in enumerate(runs)]


def interrupted_at(calls: int) -> list[dict]:
    """Three runs alike, the second of which is cut short."""
    return group("e0", (1.0, "qnqn"), (0.0, "qnqn"[:calls], "max_calls"), (0.75, "qnqn"))


RAGGED = group("e0", (1.0, "qnqnq"), (0.5, "qnq"), (0.0, "q"), (0.25, "qnqnqn"))
MIXED = RAGGED + group(
    "e1",
    (0.0, "qn"),
    (1.0, "nq"),
    (None, "qnq", "tool_error"),
    (-1.0, "q", "format_error"),
    (0.0, "", "length"),
)
SCENARIOS = {
    "complete": group("e0", (1.0, "ab"), (0.0, "ab"), (0.5, "ab"), (0.25, "ab")),
    "plain-grpo": [
        *group("e0", (1.0, "a"), (0.0, "a"), (0.0, "a")),
        *group("e1", (0.5, "a"), (1.0, "a"), (0.25, "a")),
    ],
    "ragged": RAGGED,
    "excluded": MIXED,
    **{f"interrupted-at-{n}": interrupted_at(n) for n in range(5)},
    "duplicated-example": [
        *group("e0", (1.0, "a"), (0.0, "aa")),
        *group("e0 again", (1.0, "a"), (1.0, "aa")),
    ],
    "singletons": [*group("e0", (1.0, "a")), *group("e1", (0.0, "aab"))],
    "alone-in-the-later-groups": group("e0", (1.0, "aaa"), (0.0, "a"), (0.5, "a")),
    "equal-rewards": [
        *group("e0", (0.7, "ab"), (0.7, "a"), (0.7, "abb")),
        *group("e1", (0.1, "a"), (0.2, "ab"), (0.3, "a")),
    ],
    "a-module-that-some-never-reach": group("e0", (1.0, "ab"), (0.0, "a"), (0.5, "a"), (0.0, "ac")),
    "reward-zero": group("e0", (0.0, "a"), (-1.0, "a", "format_error"), (0.0, "ab")),
    "no-calls": group("e0", (1.0, ""), (0.0, "a"), (0.5, "a")),
    "nothing-votes": group("e0", (None, "ab", "tool_error"), (None, "a", "tool_error")),
    "rollouts-out-of-order": RAGGED[::-1],
    "ten-runs": group("e0", *((7 * i % 10 / 10, "a" * (1 + i % 3)) for i in range(10))),
}
VARIANTS = {
    "": {},
    "truncate": {"short_groups": "truncate"},
    "fill": {"short_groups": "fill"},
    "fill-seed-7": {"short_groups": "fill", "seed": 7},
    "2-diverse": {"group_size": 2},
    "3-diverse": {"group_size": 3},
    "trajectory": {"level": "trajectory"},
    "trajectory-token": {"level": "trajectory", "normalize": "token"},
    "example-baseline": {"baseline": "example"},
    "leave-one-out": {"leave_one_out": True},
    "example-leave-one-out": {"baseline": "example", "leave_one_out": True},
    "unscaled": {"scale_rewards": "none"},
    "token": {"normalize": "token"},
    "constant": {"normalize": "constant", "constant": 64},
    "clip-higher": {"clip_low": 0.1, "clip_high": 0.3},
    "kl": {"beta": 0.04},
    "dr-grpo": {"scale_rewards": "none", "normalize": "constant", "constant": 64},
    "fill-2-diverse-kl": {"short_groups": "fill", "group_size": 2, "beta": 0.01},
    "batch": {"scale_rewards": "batch"},
    "batch-example-leave-one-out": {
        "scale_rewards": "batch",
        "baseline": "example",
        "leave_one_out": True,
    },
}
# where runs differ: they are under every variant, the other scenarios under these two
UNDER_ALL = ("ragged", "excluded", "equal-rewards", "ten-runs")
FOR_ALL = ("", "batch")


def vectors() -> dict[str, dict]:
    """File name -> vector."""
    result = {}
    for scenario, trajectories in SCENARIOS.items():
        for variant, options in VARIANTS.items():
            if scenario in UNDER_ALL or variant in FOR_ALL:
                name = f"{scenario}.{variant}.json" if variant else f"{scenario}.json"
                result[name] = {
                    "options": options,
                    "trajectories": trajectories,
                    "expected": expected(trajectories, options),
                }
    return result


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for old in FOLDER.glob("*.json"):
        old.unlink()
    made = vectors()
    for name, vector in made.items():
        (FOLDER / name).write_text(json.dumps(vector, indent=1) + "\n")
    print(f"{len(made)} vectors are in {FOLDER}")


if __name__ == "__main__":
    main()
