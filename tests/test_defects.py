"""What goes wrong in the official code (DSPy 3.4.1's GRPO with Arbor 0.2.17), each turned into a test of ours.

Every test runs a program against a scripted LM and looks at what would be trained.
"""
import pytest
from strategies import ScriptedSampler, keyed

import mmgrpo as G
from program import FormatError, LengthError, Module, Prediction, Program, run_programs


class Hops(Program):
    """`first` once, then `second` as often as the example says for this rollout."""
    def __init__(self, second="x -> y, z"):
        self.first, self.second = Module("x -> y"), Module(second)

    async def forward(self, x):
        y = (await self.first(x=x)).y
        for _ in range(int(y)):
            await self.second(x=y)
        return Prediction(y=y)


def rows_of(program, reply, rollouts=4, reward=lambda example, prediction: float(prediction.y), **options):
    """Run one example -> (trajectories, groups, {(rollout, module, invocation): advantage} of what would be trained)."""
    ts = run_programs(program, [{"x": "input"}], reward, ScriptedSampler(reply), rollouts=rollouts)
    groups = G.group_calls(ts, **options)
    trained = {(ts[m.trajectory].rollout, g.module, g.invocation): a
               for g, values in zip(groups, G.advantages(groups, ts)) for m, a in zip(g.members, values)}
    return ts, groups, trained


def hops(lengths, bad=()):
    """Rollout r calls `second` lengths[r] times; calls named in `bad` come back with less than they should."""
    def reply(messages, key):
        rollout, module, invocation = key[3:]
        if (rollout, module, invocation) in bad:
            return "<y>1</y>" if module == "second" else "nothing"
        return f"<y>{lengths[rollout]}</y><z>0</z>"
    return reply


def test_1_runs_with_different_numbers_of_calls_are_grouped():
    """There: `ragged` grouping raises IndexError as soon as the numbers differ."""
    ts, groups, _ = rows_of(Hops(), hops([3, 1, 0, 2]))
    assert {(g.module, g.invocation): len(g.members) for g in groups} == {
        ("first", 0): 4, ("second", 0): 3, ("second", 1): 2, ("second", 2): 1}


@pytest.mark.parametrize("short", ["keep", "fill"])
def test_2_one_run_that_never_reaches_a_module_does_not_drop_it_for_the_others(short):
    """There: one such run drops the module for all runs of the example, under every mode."""
    _, groups, trained = rows_of(Hops(), hops([2, 1, 0, 2]), short_groups=short)
    assert {r for r, module, _ in trained if module == "second"} == {0, 1, 3}
    assert any(trained[key] for key in trained if key[1] == "second")


def test_3_a_partly_readable_completion_gets_its_partial_reward():
    """There: a partial parse divides a list by a list; the run vanishes and another's duplicate takes its place."""
    ts, groups, trained = rows_of(Hops(), hops([1, 1, 1, 1], bad={(2, "second", 0)}))
    assert ts[2].status == "format_error" and ts[2].reward == pytest.approx(-0.5)
    assert [len(g.members) for g in groups] == [4, 4] and len({m.trajectory for m in groups[1].members}) == 4


def test_4_a_failing_call_is_trained_behind_its_own_prompt():
    """There: a call that failed in the second module is stored with the program's inputs, a prompt that never existed."""
    sampler = ScriptedSampler(hops([1, 1], bad={(1, "second", 0)}))
    ts = run_programs(Hops(), [{"x": "input"}], lambda e, p: 1.0, sampler, rollouts=2)
    failed = ts[1].calls[1]
    assert (failed.module, failed.inputs, failed.outputs, failed.completion.text) == ("second", {"x": "1"}, None, "<y>1</y>")
    assert [m[-1]["content"] for key, m in sampler.asked if key[3:] == (1, "second", 0)][0].startswith("<x>\n1\n</x>")
    groups = G.group_calls(ts)
    assert (1, (1,)) in keyed(groups, ts)[0, "second", 0]


def test_5_two_modules_with_one_signature_and_other_instructions_are_two():
    """There: an AssertionError, as modules are known by the hash of their signature."""
    program = Hops(second="x -> y")
    program.second.instruction = program.first.instruction
    _, groups, _ = rows_of(program, lambda messages, key: "<y>1</y>")
    assert [(g.module, len(g.members)) for g in groups] == [("first", 4), ("second", 4)]


def test_6_and_7_the_prompt_trained_is_the_prompt_sampled_demos_included(tiny):
    """There: demos stand in the run's prompts and not in training's, and the two may use different formats."""
    model, tokenizer = tiny
    program = Hops(second="x -> y")
    program.first.demos = [{"x": "a demo", "y": "its answer"}]
    sampler, prompts = G.Sampler(model, tokenizer, max_tokens=4), []
    submit = sampler.submit
    sampler.submit = lambda messages, key: (prompts.append(tokenizer.encode_chat(messages)), submit(messages, key))[1]
    ts = run_programs(program, [{"x": "input"}], lambda e, p: 1.0, sampler, rollouts=2)
    groups = G.group_calls(ts)
    rows = G.weigh(groups, G.advantages(groups, ts), ts)
    assert [r.completion.prompt_ids for r in rows] == prompts and "its answer" in tokenizer.decode(prompts[0])


def test_8_what_is_trained_is_what_was_sampled_slips_of_format_included():
    """There: the text sampled is replaced by a tidy rendering of its fields, so slips are never penalised."""
    ts, groups, _ = rows_of(Hops(), lambda messages, key: "chatter <y> 0 </y> more", rollouts=2)
    assert all(t.calls[0].completion.text == "chatter <y> 0 </y> more" for t in ts)
    rows = G.weigh(groups, G.advantages(groups, ts), ts)
    assert all(any(r.completion is t.calls[0].completion for t in ts) for r in rows)


def test_11_a_program_that_catches_errors_still_trains_every_call():
    """There: PAPILLON's own try/except hides the trace; one bad parse in four runs sends no group at all."""
    class Guarded(Hops):
        async def forward(self, x):
            try:
                return await super().forward(x)
            except FormatError:
                return Prediction(y="0")
    ts, groups, trained = rows_of(Guarded(), hops([1, 1, 1, 1], bad={(3, "first", 0)}))
    assert [t.status for t in ts] == ["completed"] * 4 and ts[3].calls[0].error and ts[3].reward == 0.0
    assert [(g.module, len(g.members)) for g in groups] == [("first", 4), ("second", 3)]
    assert trained[3, "first", 0] < 0 < trained[0, "first", 0]


def test_a_format_reward_of_zero_is_not_taken_for_none():
    """There: `format_reward or failure_score` turns 0.0 into the failure score."""
    ts = run_programs(Hops(), [{"x": "input"}], lambda e, p: 1.0, ScriptedSampler(lambda messages, key: "nothing"),
                      failure_score=1.0, format_failure_score=0.0)
    assert ts[0].reward == 0.0 and ts[0].votes and issubclass(LengthError, FormatError)
