"""What goes wrong in the official code (DSPy 3.4.1's GRPO with Arbor 0.2.17), each made a law here.

Every test runs a program against a scripted LM and looks at what would be trained. Its docstring
says what happens there.
"""

import pytest
from strategies import ScriptedSampler, keyed

import mmgrpo as G
from program import FormatError, LengthError, Module, Prediction, Program, run_programs

EXAMPLES = [{"x": "input"}]


class Hops(Program):
    """`first` once, then `second` as often as the example says for this rollout."""

    def __init__(self, second="x -> y, z"):
        self.first = Module("x -> y")
        self.second = Module(second)

    async def forward(self, x):
        y = (await self.first(x=x)).y
        for _ in range(int(y)):
            await self.second(x=y)
        return Prediction(y=y)


class Guarded(Hops):
    """The same, but it catches errors of the LM, as PAPILLON does."""

    async def forward(self, x):
        try:
            return await super().forward(x)
        except FormatError:
            return Prediction(y="0")


def hops(lengths, bad=()):
    """Rollout r calls `second` lengths[r] times; calls in `bad` give less than they should."""

    def reply(messages, key):
        rollout, module, invocation = key[3:]
        if (rollout, module, invocation) in bad:
            return "<y>1</y>" if module == "second" else "nothing"
        return f"<y>{lengths[rollout]}</y><z>0</z>"

    return reply


def always(text):
    return lambda messages, key: text


def value_of_y(example, prediction):
    return float(prediction.y)


def always_one(example, prediction):
    return 1.0


def played(program, reply, rollouts=4, **options):
    """Run one example -> (trajectories, groups, advantages by (rollout, module, invocation))."""
    sampler = ScriptedSampler(reply)
    ts = run_programs(program, EXAMPLES, value_of_y, sampler, rollouts=rollouts)
    groups = G.group_calls(ts, **options)
    trained = {}
    for g, values in zip(groups, G.advantages(groups, ts)):
        for m, a in zip(g.members, values):
            trained[ts[m.trajectory].rollout, g.module, g.invocation] = a
    return ts, groups, trained


def weighed(ts):
    """The rows that would be trained."""
    groups = G.group_calls(ts)
    return G.weigh(groups, G.advantages(groups, ts), ts)


def test_1_runs_with_different_numbers_of_calls_are_grouped():
    """There: `ragged` grouping raises IndexError as soon as the numbers differ."""
    _, groups, _ = played(Hops(), hops([3, 1, 0, 2]))
    assert {(g.module, g.invocation): len(g.members) for g in groups} == {
        ("first", 0): 4,
        ("second", 0): 3,
        ("second", 1): 2,
        ("second", 2): 1,
    }


@pytest.mark.parametrize("short", ["keep", "fill"])
def test_2_a_run_that_never_reaches_a_module_leaves_it_to_the_others(short):
    """There: one such run drops the module for all runs of the example, under every mode."""
    _, _, trained = played(Hops(), hops([2, 1, 0, 2]), short_groups=short)
    second = {key: a for key, a in trained.items() if key[1] == "second"}
    assert {rollout for rollout, _, _ in second} == {0, 1, 3}
    assert any(second.values())


def test_3_a_partly_readable_completion_gets_its_partial_reward():
    """There: a partial parse divides a list by a list; the run vanishes for another's duplicate."""
    ts, groups, _ = played(Hops(), hops([1, 1, 1, 1], bad={(2, "second", 0)}))
    assert ts[2].status == "format_error"
    assert ts[2].reward == pytest.approx(-0.5)
    assert [len(g.members) for g in groups] == [4, 4]
    assert len({m.trajectory for m in groups[1].members}) == 4


def test_4_a_failing_call_is_trained_behind_its_own_prompt():
    """There: one that fails in the second module is stored with the program's inputs as prompt."""
    place = (1, "second", 0)
    sampler = ScriptedSampler(hops([1, 1], bad={place}))
    ts = run_programs(Hops(), EXAMPLES, always_one, sampler, rollouts=2)

    failed = ts[1].calls[1]
    assert failed.module == "second"
    assert failed.inputs == {"x": "1"}
    assert failed.outputs is None
    assert failed.completion.text == "<y>1</y>"
    prompt = next(messages for key, messages in sampler.asked if key[3:] == place)
    assert prompt[-1]["content"].startswith("<x>\n1\n</x>")
    assert (1, (1,)) in keyed(G.group_calls(ts), ts)[0, "second", 0]


def test_5_two_modules_with_one_signature_and_other_instructions_are_two():
    """There: an AssertionError, as modules are known by the hash of their signature."""
    program = Hops(second="x -> y")
    program.second.instruction = program.first.instruction
    _, groups, _ = played(program, always("<y>1</y>"))
    assert [(g.module, len(g.members)) for g in groups] == [("first", 4), ("second", 4)]


def test_6_and_7_the_prompt_trained_is_the_prompt_sampled_demos_included(tiny):
    """There: demos are in the run's prompts, not in training's, whose format may differ too."""
    model, tokenizer = tiny
    program = Hops(second="x -> y")
    program.first.demos = [{"x": "a demo", "y": "its answer"}]
    sampler = G.Sampler(model, tokenizer, max_tokens=4)
    submit, prompts = sampler.submit, []

    def submit_and_note(messages, key):
        prompts.append(tokenizer.encode_chat(messages))
        return submit(messages, key)

    sampler.submit = submit_and_note
    ts = run_programs(program, EXAMPLES, always_one, sampler, rollouts=2)

    assert [row.completion.prompt_ids for row in weighed(ts)] == prompts
    assert "its answer" in tokenizer.decode(prompts[0])


def test_8_what_is_trained_is_what_was_sampled_slips_of_format_included():
    """There: a tidy rendering of its fields replaces the text, so slips are never penalised."""
    text = "chatter <y> 0 </y> more"
    ts, _, _ = played(Hops(), always(text), rollouts=2)
    assert all(t.calls[0].completion.text == text for t in ts)
    for row in weighed(ts):
        assert any(row.completion is t.calls[0].completion for t in ts)


def test_11_a_program_that_catches_errors_still_trains_every_call():
    """There: catching hides the trace; one bad parse in four runs sends no group at all."""
    ts, groups, trained = played(Guarded(), hops([1, 1, 1, 1], bad={(3, "first", 0)}))
    assert [t.status for t in ts] == ["completed"] * 4
    assert ts[3].calls[0].error
    assert ts[3].reward == 0.0
    assert [(g.module, len(g.members)) for g in groups] == [("first", 4), ("second", 3)]
    assert trained[3, "first", 0] < 0 < trained[0, "first", 0]


def test_a_format_reward_of_zero_is_not_taken_for_none():
    """There: `format_reward or failure_score` turns 0.0 into the failure score."""
    scores = {"failure_score": 1.0, "format_failure_score": 0.0}
    sampler = ScriptedSampler(always("nothing"))
    ts = run_programs(Hops(), EXAMPLES, always_one, sampler, **scores)
    assert ts[0].reward == 0.0
    assert ts[0].votes
    assert issubclass(LengthError, FormatError)
