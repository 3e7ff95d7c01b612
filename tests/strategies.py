"""Hypothesis strategies and small doubles that several test files share."""

from hypothesis import strategies as st

from program import STATUSES, Call, Completion, Trajectory

MODULES = ("ask", "note", "answer")


def to_thousandths(x: float) -> float:
    return round(x, 3)


few_rewards = st.sampled_from([-1.0, 0.0, 0.25, 0.5, 1.0])
rewards = few_rewards | st.floats(-10, 10, allow_nan=False).map(to_thousandths)


def trajectory(example, rollout, modules, reward, status="completed", lengths=None) -> Trajectory:
    """A trajectory that calls `modules` in this order.

    lengths[i] tokens are sampled in call i (default 1).
    """
    lengths = lengths or [1] * len(modules)
    calls = []
    for i, (module, n) in enumerate(zip(modules, lengths)):
        completion = Completion([1, 2], [3] * n, [-1.0] * n, "stop")
        invocation = modules[:i].count(module)
        calls.append(Call(module, invocation, completion=completion))
    if status == "tool_error":
        reward = None
    return Trajectory(example, rollout, tuple(calls), None, reward, status)


@st.composite
def trajectory_sets(draw, statuses=STATUSES, modules=MODULES, examples=3, rollouts=5, longest=7):
    """Ragged runs of a few examples, in shuffled order.

    They call any modules in any order, are cut anywhere, and end in any way.
    """
    names = st.lists(st.sampled_from(modules), max_size=longest)
    trajectories = []
    for example in range(draw(st.integers(1, examples))):
        for rollout in range(draw(st.integers(1, rollouts))):
            called = draw(names)
            n = len(called)
            lengths = draw(st.lists(st.integers(0, 4), min_size=n, max_size=n))
            reward = draw(rewards)
            status = draw(st.sampled_from(statuses))
            trajectories.append(trajectory(f"e{example}", rollout, called, reward, status, lengths))
    return draw(st.permutations(trajectories))


def keyed(groups, trajectories) -> dict:
    """{(example, module, invocation): [(rollout, calls), …]}, without regard to any order."""
    found = {}
    for g in groups:
        members = [(trajectories[m.trajectory].rollout, m.calls) for m in g.members]
        found[g.example, g.module, g.invocation] = sorted(members)
    return found


def in_order(tickets):
    return tickets


class ScriptedSampler:
    """A sampler without an LM: `reply(messages, key)` is the completion's text, or a Completion.

    Requests are finished `batch` at a time in an order that `shuffle` decides.
    """

    def __init__(self, reply, shuffle=in_order, batch=3):
        self.reply = reply
        self.shuffle = shuffle
        self.batch = batch
        # ticket -> messages, key
        self.open = {}
        # every request, (key, messages)
        self.asked = []

    def submit(self, messages, key):
        self.asked.append((key, messages))
        ticket = len(self.asked)
        self.open[ticket] = (messages, key)
        return ticket

    def advance(self):
        done = []
        for ticket in self.shuffle(list(self.open))[: self.batch]:
            completion = self.reply(*self.open.pop(ticket))
            if not isinstance(completion, Completion):
                completion = Completion([1, 2, 3], [4, 5], [-0.5, -0.5], "stop", completion)
            done.append((ticket, completion))
        return done
