"""Laws of groups and advantages, over random ragged, interrupted and excluded runs."""

import dataclasses
import io
import json
import math
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import keyed, rewards, trajectory, trajectory_sets

import mmgrpo as G
from program import STATUSES, InputError
from run import cli

VOTING = tuple(status for status in STATUSES if status != "tool_error")
SHORT_GROUPS = st.sampled_from(["keep", "truncate", "fill"])
BASELINES = st.sampled_from(["group", "example"])
SCALES = st.sampled_from(["std", "batch", "none"])
OPTIONS = st.fixed_dictionaries(
    {"baseline": BASELINES, "leave_one_out": st.booleans(), "scale_rewards": SCALES}
)


def voting_calls(trajectories):
    """Every call of a run that votes, once."""
    counts = Counter()
    for i, t in enumerate(trajectories):
        if t.votes:
            counts.update((i, c) for c in range(len(t.calls)))
    return counts


def grouped_calls(groups):
    """How often each call is in a group."""
    counts = Counter()
    for group in groups:
        for member in group.members:
            counts.update((member.trajectory, c) for c in member.calls)
    return counts


def with_change(trajectories, place, **change):
    """The same runs, but for that change in one of them."""
    result = list(trajectories)
    result[place] = dataclasses.replace(result[place], **change)
    return result


def with_rewards(trajectories, change):
    """The same runs, but for their rewards."""
    return [dataclasses.replace(t, reward=change(t.reward)) for t in trajectories]


def advantages_of(trajectories, **options):
    """A list for each group of the runs."""
    return G.advantages(G.group_calls(trajectories), trajectories, **options)


def flat(advantages):
    return [a for of_group in advantages for a in of_group]


def assert_close(some, others):
    """Two sets of advantages are the same to 1e-9, group by group."""
    assert len(some) == len(others)
    for a, b in zip(some, others):
        assert a == pytest.approx(b, abs=1e-9)


# ------------------------------------------------------------------------------------------- groups
@given(trajectory_sets())
def test_every_voting_call_is_in_exactly_one_group(ts):
    assert grouped_calls(G.group_calls(ts)) == voting_calls(ts)


@given(trajectory_sets())
def test_a_group_holds_the_kth_call_of_its_module_in_runs_of_its_example(ts):
    for group in G.group_calls(ts):
        assert group.members
        for member in group.members:
            t = ts[member.trajectory]
            (c,) = member.calls
            assert t.example == group.example
            assert t.reward == member.reward
            assert t.calls[c].module == group.module
            assert sum(call.module == group.module for call in t.calls[:c]) == group.invocation


@given(trajectory_sets(statuses=VOTING), st.data())
def test_truncating_a_run_removes_its_later_calls_and_moves_no_other(ts, data):
    victim = data.draw(st.integers(0, len(ts) - 1))
    keep = data.draw(st.integers(0, len(ts[victim].calls)))
    cut = with_change(ts, victim, calls=ts[victim].calls[:keep])

    def members(runs):
        found = set()
        for g in G.group_calls(runs):
            place = (g.example, g.module, g.invocation)
            found |= {(place, m.trajectory, m.calls) for m in g.members}
        return found

    removed = {
        (place, run, calls)
        for place, run, calls in members(ts)
        if run == victim and calls[0] >= keep
    }
    assert members(cut) == members(ts) - removed


@given(trajectory_sets(), SHORT_GROUPS, st.data())
def test_the_order_of_runs_and_examples_does_not_matter(ts, short, data):
    shuffled = data.draw(st.permutations(ts))
    before = keyed(G.group_calls(ts, short), ts)
    assert before == keyed(G.group_calls(shuffled, short), shuffled)


@given(trajectory_sets(statuses=VOTING), SHORT_GROUPS)
def test_the_names_of_modules_do_not_matter(ts, short):
    names = {"ask": "z", "note": "m", "answer": "a"}
    renamed = []
    for t in ts:
        calls = tuple(dataclasses.replace(c, module=names[c.module]) for c in t.calls)
        renamed.append(dataclasses.replace(t, calls=calls))

    before, after = Counter(), Counter()
    for g in G.group_calls(ts, short):
        before[g.example, names[g.module], g.invocation, len(g.members)] += 1
    for g in G.group_calls(renamed, short):
        after[g.example, g.module, g.invocation, len(g.members)] += 1
    assert before == after


@given(trajectory_sets(modules=("classify",), longest=1, statuses=VOTING))
def test_one_module_called_once_is_plain_grpo(ts):
    groups = G.group_calls(ts)
    for example in {t.example for t in ts}:
        callers = [i for i, t in enumerate(ts) if t.example == example and t.calls]
        own = [g for g in groups if g.example == example]
        members = [sorted(m.trajectory for m in g.members) for g in own]
        assert members == ([callers] if callers else [])


@given(trajectory_sets())
def test_a_module_that_is_never_called_changes_nothing(ts):
    called = {c.module for t in ts for c in t.calls if t.votes}
    assert {g.module for g in G.group_calls(ts)} == called


@given(trajectory_sets(), SHORT_GROUPS, BASELINES)
def test_an_excluded_run_is_as_if_it_had_not_been_run(ts, short, baseline):
    def advantages_by_place(runs):
        groups = G.group_calls(runs, short)
        result = {}
        for g, values in zip(groups, G.advantages(groups, runs, baseline)):
            result[g.example, g.module, g.invocation] = sorted(
                (runs[m.trajectory].rollout, m.calls, a) for m, a in zip(g.members, values)
            )
        return result

    without = [t for t in ts if t.votes]
    assert advantages_by_place(ts) == advantages_by_place(without)


@given(
    trajectory_sets(statuses=VOTING),
    st.sampled_from([math.nan, math.inf, -math.inf, None]),
    st.data(),
)
def test_a_reward_that_is_no_number_touches_no_other_run(ts, bad, data):
    victim = data.draw(st.integers(0, len(ts) - 1))
    spoiled = with_change(ts, victim, reward=bad)
    excluded = with_change(ts, victim, status="tool_error")

    assert G.group_calls(spoiled) == G.group_calls(excluded)
    assert advantages_of(spoiled) == advantages_of(excluded)


@given(trajectory_sets(statuses=VOTING))
def test_truncate_keeps_exactly_the_calls_that_every_voting_run_reached(ts):
    runs = Counter(t.example for t in ts)
    reached_by_all = {
        (example, module, invocation): members
        for (example, module, invocation), members in keyed(G.group_calls(ts), ts).items()
        if len(members) == runs[example]
    }
    assert keyed(G.group_calls(ts, "truncate"), ts) == reached_by_all


def calls_of(module, example, trajectories):
    """Of each run of the example that calls the module: where it does."""
    result = {}
    for i, t in enumerate(trajectories):
        calls = [c for c, call in enumerate(t.calls) if call.module == module]
        if t.example == example and calls:
            result[i] = calls
    return result


@given(trajectory_sets(statuses=VOTING), st.integers(0, 5))
def test_fill_pads_each_run_with_its_own_calls_up_to_the_longest(ts, seed):
    groups = G.group_calls(ts, "fill", seed=seed)

    for example, module in {(t.example, c.module) for t in ts for c in t.calls}:
        own_calls = calls_of(module, example, ts)
        own_groups = [g for g in groups if (g.example, g.module) == (example, module)]
        longest = max(map(len, own_calls.values()))
        assert [g.invocation for g in own_groups] == list(range(longest))
        for group in own_groups:
            assert {m.trajectory for m in group.members} == set(own_calls)
            assert all(m.calls[0] in own_calls[m.trajectory] for m in group.members)

    # what was really called stays
    lost = grouped_calls(G.group_calls(ts)) - grouped_calls(groups)
    assert lost == Counter()
    assert groups == G.group_calls(ts, "fill", seed=seed)


@given(trajectory_sets(statuses=VOTING), st.integers(1, 4))
def test_group_size_keeps_the_extremes_and_even_steps_between(ts, k):
    for whole, part in zip(G.group_calls(ts), G.group_calls(ts, group_size=k)):
        assert set(part.members) <= set(whole.members)
        assert len(part.members) == min(k, len(whole.members))
        assert len(set(part.members)) == len(part.members)
        if len(part.members) > 1:
            all_rewards = sorted(m.reward for m in whole.members)
            kept = sorted(m.reward for m in part.members)
            assert kept[0] == all_rewards[0]
            assert kept[-1] == all_rewards[-1]


@given(trajectory_sets())
def test_trajectory_level_makes_one_group_an_example_of_whole_runs(ts):
    groups = G.group_calls(ts, level="trajectory")

    examples = [g.example for g in groups]
    assert examples == list(dict.fromkeys(examples))
    assert grouped_calls(groups) == voting_calls(ts)
    for group in groups:
        for member in group.members:
            assert member.calls == tuple(range(len(ts[member.trajectory].calls)))


def test_two_draws_of_one_example_stay_two():
    """The position in the batch is an example's identity."""
    ts = [trajectory(slot, 0, ["ask"], slot) for slot in (0, 1)]
    assert len(G.group_calls(ts)) == 2


def test_ragged_runs_are_absent_from_the_later_groups():
    ts = [
        trajectory("e", 0, ["ask", "note", "ask"], 1.0),
        trajectory("e", 1, ["ask"], 0.0, "format_error"),
        trajectory("e", 2, ["ask", "note"], 0.5, "tool_error"),
    ]
    assert keyed(G.group_calls(ts), ts) == {
        ("e", "ask", 0): [(0, (0,)), (1, (0,))],
        ("e", "note", 0): [(0, (1,))],
        ("e", "ask", 1): [(0, (2,))],
    }


# --------------------------------------------------------------------------------------- advantages
@given(trajectory_sets(statuses=VOTING), SCALES)
def test_advantages_of_a_group_sum_to_zero(ts, scale):
    for values in advantages_of(ts, scale_rewards=scale):
        assert sum(values) == pytest.approx(0, abs=1e-6)


@given(trajectory_sets(statuses=VOTING), OPTIONS, st.sampled_from([0.1, 0.7, -1.0, 1 / 3]))
def test_equal_rewards_give_advantages_of_exactly_zero(ts, options, reward):
    ts = [dataclasses.replace(t, reward=reward) for t in ts]
    assert all(a == 0.0 for a in flat(advantages_of(ts, **options)))


@given(rewards, OPTIONS)
def test_a_lone_member_has_advantage_zero(reward, options):
    ts = [trajectory("e", 0, ["ask"], reward)]
    assert advantages_of(ts, **options) == [[0.0]]


def test_with_the_example_as_baseline_a_lone_member_still_learns():
    ts = [trajectory("e", 0, ["ask", "ask"], 1.0), trajectory("e", 1, ["ask"], 0.0)]
    groups = G.group_calls(ts)
    values = G.advantages(groups, ts, "example", scale_rewards="none")
    assert dict(zip([g.invocation for g in groups], values)) == {0: [0.5, -0.5], 1: [0.5]}


@given(trajectory_sets(statuses=VOTING), BASELINES, st.booleans(), st.integers(-5, 5))
def test_unscaled_advantages_ignore_a_shift_of_the_rewards(ts, baseline, leave_one_out, shift):
    options = {"baseline": baseline, "leave_one_out": leave_one_out, "scale_rewards": "none"}
    moved = with_rewards(ts, lambda reward: reward + shift)
    assert_close(advantages_of(ts, **options), advantages_of(moved, **options))


@given(trajectory_sets(statuses=VOTING), BASELINES, st.booleans(), st.sampled_from([0.5, 2.0, 8.0]))
def test_unscaled_advantages_scale_with_the_rewards_and_scaled_ones_do_not(
    ts, baseline, leave_one_out, factor
):
    options = {"baseline": baseline, "leave_one_out": leave_one_out}
    larger = with_rewards(ts, lambda reward: reward * factor)

    unscaled = advantages_of(ts, **options, scale_rewards="none")
    expected = [[a * factor for a in of_group] for of_group in unscaled]
    assert_close(expected, advantages_of(larger, **options, scale_rewards="none"))

    # scaled they are the same but for the 1e-4 that guards the division: A = u / (std + 1e-4)
    before = advantages_of(ts, **options, scale_rewards="std")
    after = advantages_of(larger, **options, scale_rewards="std")
    for u, a, b in zip(flat(unscaled), flat(before), flat(after)):
        if a != 0 or b != 0:
            std = u / a - 1e-4
            assert b == pytest.approx(factor * u / (factor * std + 1e-4), rel=1e-6)


@given(trajectory_sets(statuses=VOTING), BASELINES, st.booleans())
def test_scaled_by_the_batch_advantages_are_divided_by_one_number(ts, baseline, leave_one_out):
    """It makes a step's plainly centred rewards of mean square n / (n - 1), but for the 1e-4."""
    options = {"baseline": baseline, "leave_one_out": leave_one_out}
    scaled = flat(advantages_of(ts, **options, scale_rewards="batch"))
    plain = flat(advantages_of(ts, **options, scale_rewards="none"))
    centred = flat(advantages_of(ts, baseline=baseline, scale_rewards="none"))

    spread = math.sqrt(sum(a * a for a in centred) / max(len(centred) - 1, 1))
    assert np.multiply(scaled, spread + 1e-4) == pytest.approx(plain, abs=1e-9)


@given(trajectory_sets(statuses=VOTING, modules=("ask",), examples=1, longest=1), st.booleans())
def test_of_one_group_the_batch_is_the_group(ts, leave_one_out):
    by_group = advantages_of(ts, leave_one_out=leave_one_out, scale_rewards="std")
    by_batch = advantages_of(ts, leave_one_out=leave_one_out, scale_rewards="batch")
    assert_close(by_group, by_batch)


def test_scaled_by_the_batch_a_tiny_difference_stays_tiny():
    ts = [
        trajectory("tiny", 0, ["ask"], 0.501),
        trajectory("tiny", 1, ["ask"], 0.5),
        trajectory("large", 0, ["ask"], 1.0),
        trajectory("large", 1, ["ask"], 0.0),
    ]

    def tiny_to_large(scale):
        tiny, large = advantages_of(ts, scale_rewards=scale)
        return tiny[0] / large[0]

    assert tiny_to_large("std") > 0.8
    assert tiny_to_large("batch") == pytest.approx(0.001)


@given(trajectory_sets(statuses=VOTING), OPTIONS, st.data())
def test_permuting_runs_permutes_their_advantages(ts, options, data):
    def by_call(runs):
        groups = G.group_calls(runs)
        result = {}
        for g, values in zip(groups, G.advantages(groups, runs, **options)):
            for m, a in zip(g.members, values):
                result[g.example, runs[m.trajectory].rollout, m.calls] = a
        return result

    order = data.draw(st.permutations(range(len(ts))))
    assert by_call(ts) == pytest.approx(by_call([ts[i] for i in order]), abs=1e-9)


def test_a_reward_of_exactly_zero_is_a_reward():
    ts = [trajectory("e", 0, ["ask"], 0.0), trajectory("e", 1, ["ask"], -1.0)]
    assert advantages_of(ts, scale_rewards="none") == [[0.5, -0.5]]


# ------------------------------------------------------------------------------------- command line
@pytest.fixture
def group(monkeypatch, capsys):
    """group(standard input, *flags) -> exit status, output, errors of `mmgrpo.py group -`."""

    def run(data, *flags):
        text = data if isinstance(data, str) else json.dumps(data)
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        status = cli.main(["group", "-", *flags])
        return status, *capsys.readouterr()

    return run


def recorded(rollout, reward, modules, status="completed"):
    """A run of one example, as the command reads it."""
    calls = [{"module": m} for m in modules]
    return {
        "example": "e0",
        "rollout": rollout,
        "reward": reward,
        "status": status,
        "calls": calls,
    }


def member(rollout, call, advantage):
    return {"rollout": rollout, "call": call, "advantage": advantage}


def test_a_run_without_a_finite_reward_is_left_out_for_that(group):
    runs = [recorded(0, 1.0, ["ask"]), recorded(1, math.nan, ["ask"]), recorded(2, 0, ["ask"])]
    kept = json.loads(group({"trajectories": runs})[1])
    assert kept["excluded"] == [{"example": "e0", "rollout": 1, "reason": "reward"}]


def test_the_group_command_reads_and_prints_json(group):
    runs = [
        recorded(0, 1.0, ["ask", "note", "ask"]),
        recorded(1, 0, ["ask"], "format_error"),
        recorded(2, None, ["ask", "note"], "tool_error"),
        recorded(3, 0.5, ["ask", "note"], "max_calls"),
    ]

    kept = json.loads(group({"trajectories": runs}, "--scale-rewards", "none")[1])
    truncated = json.loads(group({"trajectories": runs}, "--short-groups", "truncate")[1])

    assert kept["excluded"] == [{"example": "e0", "rollout": 2, "reason": "tool_error"}]
    places = {(g["example"], g["module"], g["invocation"]): g["members"] for g in kept["groups"]}
    assert places == {
        ("e0", "ask", 0): [member(0, 0, 0.5), member(1, 0, -0.5), member(3, 0, 0.0)],
        ("e0", "note", 0): [member(0, 1, 0.25), member(3, 1, -0.25)],
        ("e0", "ask", 1): [member(0, 2, 0.0)],
    }
    assert [len(g["members"]) for g in truncated["groups"]] == [3]


GOOD = {
    "example": "e",
    "rollout": 0,
    "reward": 1,
    "status": "completed",
    "calls": [{"module": "m"}],
}


@pytest.mark.parametrize(
    "change, names",
    [
        ({"reward": None}, "trajectories[1].reward"),
        ({"reward": "1"}, "trajectories[1].reward"),
        ({"reward": True}, "trajectories[1].reward"),
        ({"status": "done"}, "trajectories[1].status"),
        ({"calls": [{}]}, "trajectories[1].calls[0].module"),
        ({"calls": None}, "trajectories[1].calls"),
        ({"rollout": 0}, "rollout 0 of example 'e' again"),
        ({"rollout": "0"}, "trajectories[1].rollout"),
        ({"example": None}, "trajectories[1].example"),
    ],
)
def test_a_wrong_field_in_the_group_input_is_named(group, change, names):
    second = GOOD | {"rollout": 1} | change
    status, _, error = group({"trajectories": [GOOD, second]})
    assert status == 2
    assert names in error
    assert error.startswith("error: -: ")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"trajectories": {}}', "[" * 100_000])
def test_group_input_that_is_no_json_object_is_refused(group, text):
    status, _, error = group(text)
    assert status == 2
    assert error.startswith("error: -: ")


def test_a_loss_that_no_number_holds_is_told(tmp_path):
    """JSON has no infinity; exp(800) is none of Python's numbers."""
    runs = []
    for rollout, old in enumerate((0, -800)):
        call = {"module": "ask", "logprobs": [0], "old_logprobs": [old], "ref_logprobs": [0]}
        run = {"example": "e", "rollout": rollout, "reward": 1 - rollout, "status": "completed"}
        runs.append(run | {"calls": [call]})
    path = tmp_path / "far.json"
    path.write_text(json.dumps({"trajectories": runs}))

    with pytest.raises(InputError, match="far.json: the loss is inf: log-probs are too far apart"):
        cli.run_group(str(path), cli.Config())
