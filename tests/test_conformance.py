"""The vectors are what the plain reference makes, and `mmgrpo.py group` gives what they expect.

    python tests/test_conformance.py [COMMAND]

compares any implementation that reads the `group` format from standard input. COMMAND gets the
options as flags (--short-groups fill, …) and one vector's trajectories; default: this repository's.
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

# as a script it has no pytest that finds these
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))
import reference  # noqa: E402
from strategies import trajectory_sets  # noqa: E402

VECTORS = sorted(reference.FOLDER.glob("*.json"))
OPTIONS = st.fixed_dictionaries(
    {
        "short_groups": st.sampled_from(["keep", "truncate", "fill"]),
        "group_size": st.integers(0, 4),
        "level": st.sampled_from(["call", "trajectory"]),
        "seed": st.integers(0, 3),
        "baseline": st.sampled_from(["group", "example"]),
        "leave_one_out": st.booleans(),
        "scale_rewards": st.sampled_from(["std", "batch", "none"]),
        "constant": st.sampled_from([1, 64]),
        "normalize": st.sampled_from(["sequence", "token", "constant"]),
        "clip_low": st.sampled_from([0.1, 0.2]),
        "clip_high": st.sampled_from([0.2, 0.3]),
        "beta": st.sampled_from([0.0, 0.04]),
    }
)


def flags(options: dict) -> list[str]:
    """A vector's options as flags of the command line.

    The constant of Dr. GRPO is there the limit of tokens per call.
    """
    words = []
    for name, value in options.items():
        name = "max_tokens" if name == "constant" else name
        words.append(f"--{name.replace('_', '-')}")
        if value is not True:
            words.append(str(value))
    return words


# --------------------------------------------------------------------------------- what is compared
def close(a, b, tolerance: float) -> bool:
    if not isinstance(a, (int, float)):
        return False
    return math.isclose(a, b, rel_tol=tolerance, abs_tol=tolerance)


def members_by_place(groups: list[dict]) -> dict[tuple, list[dict]]:
    return {(str(g["example"]), g["module"], g["invocation"]): g["members"] for g in groups}


def same_member(got: dict, want: dict, tolerance: float) -> bool:
    if got.keys() != want.keys():
        return False
    for field, value in want.items():
        if isinstance(value, float):
            same = close(got[field], value, tolerance)
        else:
            same = got[field] == value
        if not same:
            return False
    return True


def excluded_runs(output: dict) -> list[tuple]:
    return sorted((str(e["example"]), e["rollout"], e["reason"]) for e in output["excluded"])


def differences(got: dict, want: dict, tolerance: float = 1e-9) -> list[str]:
    """What of `want` is not in `got`: groups in any order, members by rollout, numbers about."""
    ours, theirs = members_by_place(got["groups"]), members_by_place(want["groups"])
    found = []
    for place in sorted(ours.keys() ^ theirs.keys()):
        found.append(f"group {place} is {'missing' if place in theirs else 'not expected'}")
    for place in sorted(ours.keys() & theirs.keys()):
        a = sorted(ours[place], key=lambda member: member["rollout"])
        b = sorted(theirs[place], key=lambda member: member["rollout"])
        same = len(a) == len(b) and all(same_member(x, y, tolerance) for x, y in zip(a, b))
        if not same:
            found.append(f"group {place}: expected {b}, found {a}")
    if excluded_runs(got) != excluded_runs(want):
        found.append(f"excluded: expected {want['excluded']}, found {got['excluded']}")
    if "loss" in want and not close(got.get("loss"), want["loss"], tolerance):
        found.append(f"loss: expected {want['loss']}, found {got.get('loss')}")
    return found


# -------------------------------------------------------------------------------------------- tests
def our_output(path: Path, trajectories: list[dict], options: dict) -> dict:
    """What this repository's `group` makes of the trajectories; they are written to `path`."""
    # the script compares other implementations without it
    from run import cli

    path.write_text(json.dumps({"trajectories": trajectories}))
    _, (_, config) = cli.parse_arguments(["group", "-", *flags(options)])
    return json.loads(cli.run_group(str(path), config))


@pytest.mark.parametrize("path", VECTORS, ids=lambda p: p.stem)
def test_groups_advantages_weights_and_loss_are_those_of_the_reference(path, tmp_path):
    vector = json.loads(path.read_text())
    output = our_output(tmp_path / "in.json", vector["trajectories"], vector["options"])
    assert not differences(output, vector["expected"])


def with_logprobs(trajectory, rng) -> dict:
    """A trajectory as the command reads it, with random log-probs of every kind."""
    from run.cli import LOGPROBS

    calls = []
    for c in trajectory.calls:
        call = {"module": c.module}
        for kind in LOGPROBS:
            call[kind] = [-rng.randint(1, 40) / 16 for _ in c.completion.token_ids]
        calls.append(call)
    return {
        "example": trajectory.example,
        "rollout": trajectory.rollout,
        "reward": trajectory.reward,
        "status": trajectory.status,
        "calls": calls,
    }


@given(trajectory_sets(), OPTIONS, st.randoms(use_true_random=False))
def test_random_runs_under_any_options_equal_the_reference(tmp_path_factory, ts, options, rng):
    runs = [with_logprobs(t, rng) for t in ts]
    given_options = {name: value for name, value in options.items() if value is not False}
    output = our_output(tmp_path_factory.getbasetemp() / "runs.json", runs, given_options)
    assert not differences(output, reference.expected(runs, options))


def test_the_vectors_are_what_the_reference_makes():
    made = reference.vectors()
    assert {p.name for p in VECTORS} == set(made)
    assert len(made) > 80
    for path in VECTORS:
        stored = json.loads(path.read_text())
        assert stored["trajectories"] == made[path.name]["trajectories"]
        assert stored["options"] == made[path.name]["options"]
        assert not differences(made[path.name]["expected"], stored["expected"], 1e-12)


# -------------------------------------------------------------------------------------- the command
def differences_of(command: list[str], vector: dict) -> list[str]:
    """What a command makes of a vector that is not as expected."""
    done = subprocess.run(
        [*command, *flags(vector["options"])],
        input=json.dumps({"trajectories": vector["trajectories"]}),
        capture_output=True,
        text=True,
    )
    try:
        return differences(json.loads(done.stdout), vector["expected"])
    except (ValueError, LookupError, TypeError) as e:
        last_words = (done.stderr.strip().splitlines() or [""])[-1]
        return [f"no such output ({type(e).__name__}: {e}): {last_words}"]


def main(command: list[str]) -> int:
    failed = 0
    for path in VECTORS:
        wrong = differences_of(command, json.loads(path.read_text()))
        failed += bool(wrong)
        print(f"{'differs' if wrong else 'equal  '}  {path.stem}")
        for difference in wrong[:3]:
            print(f"           {difference[:300]}")
        sys.stdout.flush()
    print(f"{len(VECTORS) - failed} passed, {failed} failed")
    return bool(failed)


if __name__ == "__main__":
    ours = [sys.executable, str(ROOT / "mmgrpo.py"), "group", "-"]
    sys.exit(main(shlex.split(sys.argv[1]) if sys.argv[1:] else ours))
