"""The conformance vectors: they are what the plain reference makes, and `mmgrpo.py group` gives what they expect.

    python tests/test_conformance.py [COMMAND]      # any implementation that reads the `group` format from standard input

COMMAND gets the options as flags (--short-groups fill, …) and one vector's trajectories; default: this repository's.
"""
import json
import math
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))
import reference  # noqa: E402
from strategies import trajectory_sets  # noqa: E402

VECTORS = sorted(reference.FOLDER.glob("*.json"))


def flags(options: dict) -> list[str]:
    """A vector's options as flags of the command line; the constant of Dr. GRPO is the limit of tokens per call."""
    words = []
    for name, value in options.items():
        name = {"constant": "max_tokens"}.get(name, name)
        words += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return words


def differences(got: dict, want: dict, tolerance: float = 1e-9) -> list[str]:
    """What of `want` is not in `got`: groups in any order, members by rollout, numbers to the tolerance."""
    close = lambda a, b: isinstance(a, (int, float)) and math.isclose(a, b, rel_tol=tolerance, abs_tol=tolerance)
    key = lambda g: (str(g["example"]), g["module"], g["invocation"])
    ours, theirs, found = {key(g): g["members"] for g in got["groups"]}, {key(g): g["members"] for g in want["groups"]}, []
    for k in sorted(ours.keys() ^ theirs.keys()):
        found.append(f"group {k} is {'missing' if k in theirs else 'not expected'}")
    for k in sorted(ours.keys() & theirs.keys()):
        a, b = (sorted(members, key=lambda m: m["rollout"]) for members in (ours[k], theirs[k]))
        same = len(a) == len(b) and all(
            x.keys() == y.keys() and all(close(x[f], y[f]) if isinstance(y[f], float) else x[f] == y[f] for f in y) for x, y in zip(a, b))
        if not same:
            found.append(f"group {k}: expected {b}, found {a}")
    excluded = lambda d: sorted((str(e["example"]), e["rollout"], e["reason"]) for e in d["excluded"])
    if excluded(got) != excluded(want):
        found.append(f"excluded: expected {want['excluded']}, found {got['excluded']}")
    if "loss" in want and not close(got.get("loss"), want["loss"]):
        found.append(f"loss: expected {want['loss']}, found {got.get('loss')}")
    return found


@pytest.mark.parametrize("path", VECTORS, ids=lambda p: p.stem)
def test_groups_advantages_weights_and_loss_are_those_of_the_reference(path, tmp_path):
    from run import cli
    vector = json.loads(path.read_text())
    (tmp_path / "in.json").write_text(json.dumps({"trajectories": vector["trajectories"]}))
    _, (_, config) = cli.parse_arguments(["group", "-", *flags(vector["options"])])
    assert not differences(json.loads(cli.run_group(str(tmp_path / "in.json"), config)), vector["expected"])


options = st.fixed_dictionaries({
    "short_groups": st.sampled_from(["keep", "truncate", "fill"]), "group_size": st.integers(0, 4),
    "level": st.sampled_from(["call", "trajectory"]), "seed": st.integers(0, 3), "baseline": st.sampled_from(["group", "example"]),
    "leave_one_out": st.booleans(), "scale_rewards": st.sampled_from(["std", "batch", "none"]), "constant": st.sampled_from([1, 64]),
    "normalize": st.sampled_from(["sequence", "token", "constant"]), "clip_low": st.sampled_from([0.1, 0.2]),
    "clip_high": st.sampled_from([0.2, 0.3]), "beta": st.sampled_from([0.0, 0.04])})


@given(trajectory_sets(), options, st.randoms(use_true_random=False))
def test_random_runs_under_any_options_equal_the_reference(tmp_path_factory, ts, options, rng):
    from run import cli
    number = lambda: -rng.randint(1, 40) / 16
    call = lambda c: {"module": c.module, **{k: [number() for _ in c.completion.token_ids] for k in cli.LOGPROBS}}
    runs = [{"example": t.example, "rollout": t.rollout, "reward": t.reward, "status": t.status, "calls": list(map(call, t.calls))}
            for t in ts]
    path = tmp_path_factory.getbasetemp() / "runs.json"
    path.write_text(json.dumps({"trajectories": runs}))
    _, (_, config) = cli.parse_arguments(["group", "-", *flags({k: v for k, v in options.items() if v is not False})])
    assert not differences(json.loads(cli.run_group(str(path), config)), reference.expected(runs, options))


def test_the_vectors_are_what_the_reference_makes():
    made = reference.vectors()
    assert {p.name for p in VECTORS} == set(made) and len(made) > 80
    for path in VECTORS:
        stored = json.loads(path.read_text())
        assert stored["trajectories"] == made[path.name]["trajectories"] and stored["options"] == made[path.name]["options"]
        assert not differences(made[path.name]["expected"], stored["expected"], 1e-12)


def main(command: list[str]) -> int:
    failed = 0
    for path in VECTORS:
        vector = json.loads(path.read_text())
        done = subprocess.run([*command, *flags(vector["options"])], input=json.dumps({"trajectories": vector["trajectories"]}),
                              capture_output=True, text=True)
        try:
            wrong = differences(json.loads(done.stdout), vector["expected"])
        except (ValueError, LookupError, TypeError) as e:
            wrong = [f"no such output ({type(e).__name__}: {e}): {(done.stderr.strip().splitlines() or [''])[-1]}"]
        failed += bool(wrong)
        print(f"{'differs' if wrong else 'equal  '}  {path.stem}" + "".join(f"\n           {w[:300]}" for w in wrong[:3]), flush=True)
    print(f"{len(VECTORS) - failed} passed, {failed} failed")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(shlex.split(sys.argv[1]) if sys.argv[1:] else [sys.executable, str(ROOT / "mmgrpo.py"), "group", "-"]))
