"""Grouping and advantages, as properties over random sets of ragged, interrupted and excluded trajectories."""
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
from program import STATUSES
from run import cli

VOTING = tuple(s for s in STATUSES if s != "tool_error")


def all_calls(trajectories, votes=True):
    return Counter((i, c) for i, t in enumerate(trajectories) for c in range(len(t.calls)) if t.votes or not votes)


def grouped_calls(groups):
    return Counter((m.trajectory, c) for g in groups for m in g.members for c in m.calls)


# ---------------------------------------------------------------------------------------------------------- groups

@given(trajectory_sets())
def test_every_voting_call_is_in_exactly_one_group(ts):
    assert grouped_calls(G.group_calls(ts)) == all_calls(ts)


@given(trajectory_sets())
def test_a_group_holds_the_kth_call_of_its_module_in_runs_of_its_example(ts):
    for g in G.group_calls(ts):
        assert g.members
        for m in g.members:
            t, (c,) = ts[m.trajectory], m.calls
            assert (t.example, t.calls[c].module, t.reward) == (g.example, g.module, m.reward)
            assert sum(call.module == g.module for call in t.calls[:c]) == g.invocation


@given(trajectory_sets(statuses=VOTING), st.data())
def test_truncating_a_run_removes_its_later_calls_and_moves_no_other(ts, data):
    victim = data.draw(st.integers(0, len(ts) - 1))
    keep = data.draw(st.integers(0, len(ts[victim].calls)))
    cut = [dataclasses.replace(t, calls=t.calls[:keep]) if i == victim else t for i, t in enumerate(ts)]
    before = {(g.example, g.module, g.invocation, m.trajectory, m.calls) for g in G.group_calls(ts) for m in g.members}
    after = {(g.example, g.module, g.invocation, m.trajectory, m.calls) for g in G.group_calls(cut) for m in g.members}
    assert after == {x for x in before if not (x[3] == victim and x[4][0] >= keep)}


@given(trajectory_sets(), st.sampled_from(["keep", "truncate", "fill"]), st.data())
def test_the_order_of_runs_and_examples_does_not_matter(ts, short, data):
    shuffled = data.draw(st.permutations(ts))
    assert keyed(G.group_calls(ts, short), ts) == keyed(G.group_calls(shuffled, short), shuffled)


@given(trajectory_sets(statuses=VOTING), st.sampled_from(["keep", "truncate", "fill"]))
def test_the_names_of_modules_do_not_matter(ts, short):
    names = {"ask": "z", "note": "m", "answer": "a"}
    renamed = [dataclasses.replace(t, calls=tuple(dataclasses.replace(c, module=names[c.module]) for c in t.calls)) for t in ts]
    sizes = lambda groups, name: sorted((g.example, name(g.module), g.invocation, len(g.members)) for g in groups)
    assert sizes(G.group_calls(ts, short), names.get) == sizes(G.group_calls(renamed, short), str)


@given(trajectory_sets(modules=("classify",), longest=1, statuses=VOTING))
def test_one_module_called_once_is_plain_grpo(ts):
    groups = G.group_calls(ts)
    for example in {t.example for t in ts}:
        members = [i for i, t in enumerate(ts) if t.example == example and t.calls]
        own = [g for g in groups if g.example == example]
        assert [sorted(m.trajectory for m in g.members) for g in own] == ([members] if members else [])


@given(trajectory_sets())
def test_a_module_that_is_never_called_changes_nothing(ts):
    called = {c.module for t in ts for c in t.calls if t.votes}
    assert {g.module for g in G.group_calls(ts)} == called


@given(trajectory_sets(), st.sampled_from(["keep", "truncate", "fill"]), st.sampled_from(["group", "example"]))
def test_an_excluded_run_is_as_if_it_had_not_been_run(ts, short, baseline):
    without = [t for t in ts if t.votes]
    results = []
    for runs in (ts, without):
        groups = G.group_calls(runs, short)
        values = G.advantages(groups, runs, baseline)
        results.append({(g.example, g.module, g.invocation): sorted(zip([runs[m.trajectory].rollout for m in g.members],
                        [m.calls for m in g.members], v)) for g, v in zip(groups, values)})
    assert results[0] == results[1]


@given(trajectory_sets(statuses=VOTING), st.sampled_from([math.nan, math.inf, -math.inf, None]), st.data())
def test_a_reward_that_is_no_number_touches_no_other_run(ts, bad, data):
    victim = data.draw(st.integers(0, len(ts) - 1))
    spoiled = [dataclasses.replace(t, reward=bad) if i == victim else t for i, t in enumerate(ts)]
    excluded = [dataclasses.replace(t, status="tool_error") if i == victim else t for i, t in enumerate(ts)]
    a, b = (G.group_calls(x) for x in (spoiled, excluded))
    assert a == b and G.advantages(a, spoiled) == G.advantages(b, excluded)


@given(trajectory_sets(statuses=VOTING))
def test_truncate_keeps_exactly_the_calls_that_every_voting_run_reached(ts):
    kept = keyed(G.group_calls(ts, "truncate"), ts)
    runs = Counter(t.example for t in ts)
    assert kept == {key: members for key, members in keyed(G.group_calls(ts), ts).items() if len(members) == runs[key[0]]}


@given(trajectory_sets(statuses=VOTING), st.integers(0, 5))
def test_fill_pads_each_run_with_its_own_calls_up_to_the_longest(ts, seed):
    groups, kept = G.group_calls(ts, "fill", seed=seed), G.group_calls(ts)
    for example in {t.example for t in ts}:
        for module in {c.module for t in ts if t.example == example for c in t.calls}:
            counts = {i: [c for c, call in enumerate(t.calls) if call.module == module]
                      for i, t in enumerate(ts) if t.example == example}
            callers = {i: own for i, own in counts.items() if own}
            own_groups = [g for g in groups if (g.example, g.module) == (example, module)]
            assert [g.invocation for g in own_groups] == list(range(max(map(len, callers.values()))))
            for g in own_groups:
                assert {m.trajectory for m in g.members} == set(callers)
                assert all(m.calls[0] in callers[m.trajectory] for m in g.members)
    assert grouped_calls(kept) - grouped_calls(groups) == Counter()       # what was really called stays
    assert groups == G.group_calls(ts, "fill", seed=seed)


@given(trajectory_sets(statuses=VOTING), st.integers(1, 4))
def test_group_size_keeps_the_extremes_and_even_steps_between(ts, k):
    for whole, part in zip(G.group_calls(ts), G.group_calls(ts, group_size=k)):
        ranked = sorted(m.reward for m in whole.members)
        assert set(part.members) <= set(whole.members) and len(part.members) == min(k, len(whole.members))
        assert len(set(part.members)) == len(part.members)
        if len(part.members) > 1:
            kept = sorted(m.reward for m in part.members)
            assert kept[0] == ranked[0] and kept[-1] == ranked[-1]


@given(trajectory_sets())
def test_trajectory_level_makes_one_group_an_example_of_whole_runs(ts):
    groups = G.group_calls(ts, level="trajectory")
    assert [g.example for g in groups] == list(dict.fromkeys(g.example for g in groups))
    assert grouped_calls(groups) == all_calls(ts)
    for g in groups:
        assert all(m.calls == tuple(range(len(ts[m.trajectory].calls))) for m in g.members)


def test_two_draws_of_one_example_stay_two():
    ts = [trajectory(slot, 0, ["ask"], slot) for slot in (0, 1)]            # the batch position is the identity
    assert len(G.group_calls(ts)) == 2


def test_ragged_runs_are_absent_from_the_later_groups():
    ts = [trajectory("e", 0, ["ask", "note", "ask"], 1.0), trajectory("e", 1, ["ask"], 0.0, "format_error"),
          trajectory("e", 2, ["ask", "note"], 0.5, "tool_error")]
    assert keyed(G.group_calls(ts), ts) == {("e", "ask", 0): [(0, (0,)), (1, (0,))], ("e", "note", 0): [(0, (1,))],
                                            ("e", "ask", 1): [(0, (2,))]}


# ------------------------------------------------------------------------------------------------------ advantages

options = st.fixed_dictionaries({"baseline": st.sampled_from(["group", "example"]), "leave_one_out": st.booleans(),
                                 "scale_rewards": st.sampled_from(["std", "batch", "none"])})


@given(trajectory_sets(statuses=VOTING), st.sampled_from(["std", "batch", "none"]))
def test_advantages_of_a_group_sum_to_zero(ts, scale):
    for values in G.advantages(G.group_calls(ts), ts, scale_rewards=scale):
        assert sum(values) == pytest.approx(0, abs=1e-6)


@given(trajectory_sets(statuses=VOTING), options, st.sampled_from([0.1, 0.7, -1.0, 1 / 3]))
def test_equal_rewards_give_advantages_of_exactly_zero(ts, options, reward):
    ts = [dataclasses.replace(t, reward=reward) for t in ts]
    assert all(a == 0.0 for values in G.advantages(G.group_calls(ts), ts, **options) for a in values)


@given(rewards, options)
def test_a_lone_member_has_advantage_zero(reward, options):
    ts = [trajectory("e", 0, ["ask"], reward)]
    assert G.advantages(G.group_calls(ts), ts, **options) == [[0.0]]


def test_with_the_example_as_baseline_a_lone_member_still_learns():
    ts = [trajectory("e", 0, ["ask", "ask"], 1.0), trajectory("e", 1, ["ask"], 0.0)]
    groups = G.group_calls(ts)
    values = dict(zip([g.invocation for g in groups], G.advantages(groups, ts, "example", scale_rewards="none")))
    assert values == {0: [0.5, -0.5], 1: [0.5]}


@given(trajectory_sets(statuses=VOTING), st.sampled_from(["group", "example"]), st.booleans(), st.integers(-5, 5))
def test_unscaled_advantages_ignore_a_shift_of_the_rewards(ts, baseline, loo, shift):
    moved = [dataclasses.replace(t, reward=t.reward + shift) for t in ts]
    a, b = (G.advantages(G.group_calls(x), x, baseline, loo, "none") for x in (ts, moved))
    assert all(x == pytest.approx(y, abs=1e-9) for x, y in zip(a, b))


@given(trajectory_sets(statuses=VOTING), st.sampled_from(["group", "example"]), st.booleans(), st.sampled_from([0.5, 2.0, 8.0]))
def test_unscaled_advantages_scale_with_the_rewards_and_scaled_ones_do_not(ts, baseline, loo, factor):
    larger = [dataclasses.replace(t, reward=t.reward * factor) for t in ts]
    for scale in ("none", "std"):
        a, b = (G.advantages(G.group_calls(x), x, baseline, loo, scale) for x in (ts, larger))
        for x, y in zip(a, b):
            if scale == "none":
                assert np.multiply(x, factor) == pytest.approx(y, abs=1e-9)
    plain = G.advantages(G.group_calls(ts), ts, baseline, loo, "none")
    for x, y, u in zip(a, b, plain):                        # scaled: the same but for the 1e-4 that guards the division
        for p, q, r in zip(x, y, u):
            assert (p == q == 0) or q == pytest.approx(factor * r / (factor * (r / p - 1e-4) + 1e-4), rel=1e-6)


@given(trajectory_sets(statuses=VOTING), st.sampled_from(["group", "example"]), st.booleans())
def test_scaled_by_the_batch_advantages_are_the_unscaled_ones_over_one_number(ts, baseline, loo):
    """It makes the mean square of a step's plainly centred rewards n / (n - 1), but for the 1e-4 that guards the division."""
    groups = G.group_calls(ts)
    scaled, plain, centred = (sum(G.advantages(groups, ts, baseline, l, s), []) for l, s in
                              ((loo, "batch"), (loo, "none"), (False, "none")))
    spread = math.sqrt(sum(a * a for a in centred) / max(len(centred) - 1, 1))
    assert np.multiply(scaled, spread + 1e-4) == pytest.approx(plain, abs=1e-9)


@given(trajectory_sets(statuses=VOTING, modules=("ask",), examples=1, longest=1), st.booleans())
def test_of_one_group_the_batch_is_the_group(ts, loo):
    groups = G.group_calls(ts)
    std, batch = (G.advantages(groups, ts, leave_one_out=loo, scale_rewards=s) for s in ("std", "batch"))
    assert all(a == pytest.approx(b, abs=1e-9) for a, b in zip(std, batch))


def test_scaled_by_the_batch_a_tiny_difference_stays_tiny():
    ts = [trajectory(example, rollout, ["ask"], reward) for example, rewards in (("tiny", (0.501, 0.5)), ("large", (1.0, 0.0)))
          for rollout, reward in enumerate(rewards)]
    of = lambda scale: [values[0] for values in G.advantages(G.group_calls(ts), ts, scale_rewards=scale)]
    assert of("std")[0] / of("std")[1] > 0.8 and of("batch")[0] / of("batch")[1] == pytest.approx(0.001)


@given(trajectory_sets(statuses=VOTING), options, st.data())
def test_permuting_runs_permutes_their_advantages(ts, options, data):
    order = data.draw(st.permutations(range(len(ts))))
    shuffled = [ts[i] for i in order]
    def by_call(runs):
        groups = G.group_calls(runs)
        return {(g.example, runs[m.trajectory].rollout, m.calls): a for g, values in
                zip(groups, G.advantages(groups, runs, **options)) for m, a in zip(g.members, values)}
    a, b = by_call(ts), by_call(shuffled)
    assert a.keys() == b.keys() and all(a[k] == pytest.approx(b[k], abs=1e-9) for k in a)


def test_a_reward_of_exactly_zero_is_a_reward():
    ts = [trajectory("e", r, ["ask"], reward) for r, reward in enumerate((0.0, -1.0))]
    assert G.advantages(G.group_calls(ts), ts, scale_rewards="none") == [[0.5, -0.5]]


# ---------------------------------------------------------------------------------------------------- command line

@pytest.fixture
def group(monkeypatch, capsys):
    def run(data, *flags):
        monkeypatch.setattr(sys, "stdin", io.StringIO(data if isinstance(data, str) else json.dumps(data)))
        code = cli.main(["group", "-", *flags])
        return code, *capsys.readouterr()
    return run


def test_the_group_command_reads_and_prints_json(group):
    run = lambda rollout, reward, modules, status="completed": {
        "example": "e0", "rollout": rollout, "reward": reward, "status": status, "calls": [{"module": m} for m in modules]}
    data = {"trajectories": [run(0, 1.0, ["ask", "note", "ask"]), run(1, 0, ["ask"], "format_error"),
                             run(2, None, ["ask", "note"], "tool_error"), run(3, 0.5, ["ask", "note"], "max_calls")]}
    out = json.loads(group(data, "--scale-rewards", "none")[1])
    member = lambda rollout, call, advantage: {"rollout": rollout, "call": call, "advantage": advantage}
    assert out["excluded"] == [{"example": "e0", "rollout": 2, "reason": "tool_error"}]
    assert {(g["example"], g["module"], g["invocation"]): g["members"] for g in out["groups"]} == {
        ("e0", "ask", 0): [member(0, 0, 0.5), member(1, 0, -0.5), member(3, 0, 0.0)],
        ("e0", "note", 0): [member(0, 1, 0.25), member(3, 1, -0.25)], ("e0", "ask", 1): [member(0, 2, 0.0)]}
    assert [len(g["members"]) for g in json.loads(group(data, "--short-groups", "truncate")[1])["groups"]] == [3]


GOOD = {"example": "e", "rollout": 0, "reward": 1, "status": "completed", "calls": [{"module": "m"}]}


@pytest.mark.parametrize("change, names", [
    ({"reward": None}, "trajectories[1].reward"), ({"reward": "1"}, "trajectories[1].reward"),
    ({"reward": True}, "trajectories[1].reward"), ({"status": "done"}, "trajectories[1].status"),
    ({"calls": [{}]}, "trajectories[1].calls[0].module"), ({"calls": None}, "trajectories[1].calls"),
    ({"rollout": 0}, "rollout 0 of example 'e' again"), ({"rollout": "0"}, "trajectories[1].rollout"),
    ({"example": None}, "trajectories[1].example")])
def test_a_wrong_field_in_the_group_input_is_named(group, change, names):
    code, _, error = group({"trajectories": [GOOD, GOOD | {"rollout": 1} | change]})
    assert code == 2 and names in error and error.startswith("error: -: ")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"trajectories": {}}', "[" * 100_000])
def test_group_input_that_is_no_json_object_is_refused(group, text):
    code, _, error = group(text)
    assert code == 2 and error.startswith("error: -: ")
