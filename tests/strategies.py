"""Hypothesis strategies and small doubles that several test files share."""
from hypothesis import strategies as st

from program import STATUSES, Call, Completion, Trajectory

MODULES = ("ask", "note", "answer")
rewards = st.sampled_from([-1.0, 0.0, 0.25, 0.5, 1.0]) | st.floats(-10, 10, allow_nan=False).map(lambda x: round(x, 3))


def trajectory(example, rollout, modules, reward, status="completed", lengths=None) -> Trajectory:
    """A trajectory that calls `modules` in this order; lengths[i] tokens are sampled in call i (default 1)."""
    lengths = lengths or [1] * len(modules)
    calls = tuple(Call(m, modules[:i].count(m), completion=Completion([1, 2], [3] * n, [-1.0] * n, "stop"))
                  for i, (m, n) in enumerate(zip(modules, lengths)))
    return Trajectory(example, rollout, calls, None, None if status == "tool_error" else reward, status)


@st.composite
def trajectory_sets(draw, statuses=STATUSES, modules=MODULES, examples=3, rollouts=5, longest=7):
    """Ragged runs of a few examples: any modules in any order, cut anywhere, ended in any way, in shuffled order."""
    result = []
    for example in range(draw(st.integers(1, examples))):
        for rollout in range(draw(st.integers(1, rollouts))):
            names = draw(st.lists(st.sampled_from(modules), max_size=longest))
            lengths = draw(st.lists(st.integers(0, 4), min_size=len(names), max_size=len(names)))
            result.append(trajectory(f"e{example}", rollout, names, draw(rewards), draw(st.sampled_from(statuses)), lengths))
    return draw(st.permutations(result))


def keyed(groups, trajectories) -> dict:
    """{(example, module, invocation): {(rollout, calls), …}}: groups without regard to the order of anything."""
    return {(g.example, g.module, g.invocation): sorted((trajectories[m.trajectory].rollout, m.calls) for m in g.members)
            for g in groups}


class ScriptedSampler:
    """A sampler without an LM: `reply(messages, key)` is the completion's text, or a Completion.

    Requests are finished `batch` at a time in an order that `shuffle` decides.
    """
    def __init__(self, reply, shuffle=lambda tickets: tickets, batch=3):
        self.reply, self.shuffle, self.batch = reply, shuffle, batch
        self.open, self.asked = {}, []

    def submit(self, messages, key):
        self.asked.append((key, messages))
        self.open[len(self.asked)] = (messages, key)
        return len(self.asked)

    def advance(self):
        done = []
        for ticket in self.shuffle(list(self.open))[:self.batch]:
            answer = self.reply(*self.open.pop(ticket))
            done.append((ticket, answer if isinstance(answer, Completion) else
                         Completion([1, 2, 3], [4, 5], [-0.5, -0.5], "stop", answer)))
        return done
