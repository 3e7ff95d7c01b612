"""Signatures, prompts, parsing, programs, and the ways a run ends."""

import asyncio
import gc
import http.server
import json
import math
import random
import threading
import time
import urllib.request
from concurrent.futures import CancelledError

import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from strategies import ScriptedSampler

from program import (
    ChainOfThought,
    Completion,
    Field,
    FormatError,
    InputError,
    LengthError,
    LMError,
    Module,
    Prediction,
    Program,
    ProgramError,
    Signature,
    ToolError,
    gather,
    parse,
    render,
    render_outputs,
    run_programs,
    tool,
)
from prompts.files import load_prompts, save_prompts
from run.health import FirstFailures
from run.terminal import kind_of, show, statuses


# ----------------------------------------------------------------------------------- small programs
class Two(Program):
    """Two modules of one signature, the second called `times` times."""

    def __init__(self, times=1):
        self.first = Module("x -> y", "First.")
        self.second = Module("x -> y", "Second.")
        self.times = times

    async def forward(self, x):
        y = (await self.first(x=x)).y
        for _ in range(self.times):
            y = (await self.second(x=y)).y
        return Prediction(y=y)


class WithTool(Two):
    """What its first module answers goes to the tool `fn`."""

    def __init__(self, fn, **options):
        super().__init__()
        self.fn = fn
        self.options = options

    async def forward(self, x):
        y = (await self.first(x=x)).y
        return Prediction(y=await tool(self.fn, y, **self.options))


def answer(text="ok", **replies):
    """A reply that depends on the module."""

    def reply(messages, key):
        return replies.get(key[4], f"<y>{text}</y>")

    return reply


def one(example, prediction):
    return 1.0


def zero(example, prediction):
    return 0.0


def not_a_number(example, prediction):
    return math.nan


def raises(error):
    def fails(*_):
        raise error

    return fails


def last_first(tickets):
    return tickets[::-1]


always_ok = answer()


def run(program, reply=always_ok, metric=one, examples=({"x": "hello"},), **options):
    return run_programs(program, list(examples), metric, ScriptedSampler(reply), **options)


def messages_of(records) -> list[str]:
    return [record.getMessage() for record in records]


# ------------------------------------------------------------------------------ signatures, prompts
CASES = json.loads((ROOT / "tests" / "data" / "xml_adapter.json").read_text(encoding="utf-8"))
CASES = CASES["cases"]


def side_of(types) -> str:
    """One side of a signature; fields with labels have their type elsewhere."""
    fields = [name if isinstance(kind, list) else f"{name}: {kind}" for name, kind in types.items()]
    return ", ".join(fields)


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_prompts_are_byte_for_byte_those_of_dspys_xml_adapter(case):
    types = case["inputs_types"] | case["outputs_types"]
    labels = {name: tuple(kind) for name, kind in types.items() if isinstance(kind, list)}
    fields = f"{side_of(case['inputs_types'])} -> {side_of(case['outputs_types'])}"
    signature = Signature(fields, case["instruction"], case["descriptions"], labels)

    assert render(signature, case["inputs"], demos=case["demos"]) == case["messages"]


def test_instructions_are_cleaned_like_docstrings():
    module = Module(
        "x -> y",
        """Answer.
        In one word.""",
    )
    assert module.instruction == "Answer.\nIn one word."
    assert module.signature.instruction == "Answer.\nIn one word."


@pytest.mark.parametrize(
    "fields, arguments",
    [
        ("a, *, b -> c", {}),
        ("a, /, b -> c", {}),
        ("*a -> c", {}),
        ("a=1 -> c", {}),
        ("a", {}),
        ("a -> b -> c", {}),
        ("a -> b", {"types": {"b": ["x", "y"]}}),
    ],
)
def test_a_signature_with_more_than_names_and_types_is_refused(fields, arguments):
    with pytest.raises(InputError, match="signature"):
        Signature(fields, **arguments)


def test_a_signature_reads_names_types_and_labels():
    s = Signature(
        "question, passages: list[str] -> "
        "n: int, x: float, ok: bool, kind: Literal['a', \"b's\"], text",
        "Do it.",
        {"n": "how many"},
    )
    assert [(f.name, f.type) for f in s.inputs] == [("question", str), ("passages", list)]
    assert s.outputs == (
        Field("n", int, "how many"),
        Field("x", float),
        Field("ok", bool),
        Field("kind", ("a", "b's")),
        Field("text"),
    )
    assert s.instruction == "Do it."

    default = Signature("a, b -> c").instruction
    assert default == "Given the fields `a`, `b`, produce the fields `c`."


@pytest.mark.parametrize(
    "fields, arguments, culprit",
    [
        ("a, b", {}, "a, b"),
        ("a -> b -> c", {}, "a -> b -> c"),
        ("a -> ", {}, "output"),
        ("a -> a", {}, "every name once"),
        ("a -> b: set", {}, "'b'"),
        ("a b -> c", {}, "a b -> c"),
        ("a -> b", {"types": {"x": ("y",)}}, "'x'"),
        ("a -> b", {"descriptions": {"z": "…"}}, "'z'"),
        ("a -> b: Literal[1, 2]", {}, "'b'"),
    ],
)
def test_a_signature_that_cannot_be_read_is_refused_by_name(fields, arguments, culprit):
    with pytest.raises(InputError, match=culprit.replace("|", r"\|")):
        Signature(fields, **arguments)


@pytest.mark.parametrize(
    "fields",
    [
        "text intent",
        "text, intent",
        "a -> b -> c",
        "a b -> c",
        "text -> intent kind",
    ],
)
def test_a_signature_that_cannot_be_read_says_what_one_looks_like(fields):
    expected = f"signature '{fields}': expected .* on both sides of one ->, as in '.* -> intent'"
    with pytest.raises(InputError, match=expected):
        Signature(fields)


# ------------------------------------------------------------------------------------------ parsing
SIGNATURE = Signature(
    "a -> text, items: list[str], n: int, x: float, ok: bool, kind: Literal['red', 'dark blue']"
)
words = st.text(st.characters(codec="utf-8", exclude_characters="\r"), max_size=20).map(str.strip)
outputs = st.fixed_dictionaries(
    {
        "text": words,
        "items": st.lists(words, min_size=0, max_size=3),
        "n": st.integers(),
        "x": st.floats(allow_nan=False, allow_infinity=False),
        "ok": st.booleans(),
        "kind": st.sampled_from(["red", "dark blue"]),
    }
)
names_of_outputs = st.sampled_from(["text", "items", "n", "x", "ok", "kind"])
scraps = st.sampled_from(
    ["<text>", "</text>", "<n>", "</n>", "<item>", "3", "&lt;", "<text />", "\n"]
)


@given(outputs)
def test_what_is_rendered_is_parsed_back(values):
    assert parse(SIGNATURE, render_outputs(SIGNATURE, values)) == values


@given(outputs, st.sets(names_of_outputs, min_size=1))
def test_a_missing_field_is_an_error_that_knows_which_are_present(values, missing):
    rendered = []
    for f in SIGNATURE.outputs:
        if f.name not in missing:
            rendered.append(render_outputs(Signature(f"a -> {f.name}: {f.type_name}"), values))

    with pytest.raises(FormatError) as e:
        parse(SIGNATURE, "\n\n".join(rendered))

    assert set(e.value.present) == set(values) - missing
    assert len(e.value.expected) == 6


@given(st.text(max_size=200) | st.lists(scraps, max_size=30).map("".join))
def test_any_text_is_parsed_or_a_format_error(text):
    try:
        assert set(parse(SIGNATURE, text)) == {f.name for f in SIGNATURE.outputs}
    except FormatError:
        pass


@pytest.mark.parametrize(
    "kind, text, value",
    [
        ("int", "<y> 12 </y>", 12),
        ("bool", "<y>TRUE</y>", True),
        ("list[str]", '<y>\n["a", "b"]\n</y>', ["a", "b"]),
        ("list[str]", "<y />", []),
        ("list[str]", "<y></y>", []),
        ("Literal['a b']", "<y>'a b'</y>", "a b"),
        (
            "str",
            "so <y>\nTom & Jerry <b>1 < 2</b> &lt;3\n</y> and more",
            "Tom & Jerry <b>1 < 2</b> <3",
        ),
        ("str", "<y></y>", ""),
        ("str", "<y>1</y><y>2</y>", "1"),
        ("str", "<x><y>in</y></x>", "in"),
    ],
)
def test_values_are_read(kind, text, value):
    assert parse(Signature(f"x -> y: {kind}"), text) == {"y": value}


@pytest.mark.parametrize(
    "kind, text",
    [
        ("int", "<y>3.5</y>"),
        ("int", "<y></y>"),
        ("float", "<y>nan</y>"),
        ("bool", "<y>yes</y>"),
        ("Literal['a', 'b']", "<y>c</y>"),
        ("list[str]", "<y>a, b</y>"),
        ("str", "<y>open"),
        ("list[str]", "<y>[1]</y>"),
        pytest.param("list[str]", "<y>" + "[" * 100_000 + "</y>", id="list[str]-deep"),
    ],
)
def test_values_of_the_wrong_type_are_format_errors(kind, text):
    with pytest.raises(FormatError) as e:
        parse(Signature(f"x -> y: {kind}"), text)
    assert e.value.present == ()


# ------------------------------------------------------------------------------------------- labels
LABELS = (
    "card_lost",
    "Refund_not_showing_up",
    "lost?",
    "it's",
    'a "b"',
    "Lost",
    "lost",
    "C#",
    "C",
    "-1",
    "A*",
)


def label(text, labels=LABELS):
    """The label that is read from a completion of this text."""
    return parse(Signature("x -> y", types={"y": labels}), f"<y>\n{text}\n</y>")["y"]


@pytest.mark.parametrize(
    "text, meant",
    [
        ("refund_not_showing_up", "Refund_not_showing_up"),
        ("CARD_LOST", "card_lost"),
        ('"card_lost"', "card_lost"),
        ("card_lost.", "card_lost"),
        ("**Card_lost**.", "card_lost"),
        ("“card_lost”", "card_lost"),
        ("`card_lost`,", "card_lost"),
        ("[card_lost]", "card_lost"),
        ("{card_lost}", "card_lost"),
        ("Literal['card_lost']", "card_lost"),
        ("str[card_lost]", "card_lost"),
        ("&quot;card_lost&quot;", "card_lost"),
        ("Lost", "Lost"),
        ("lost", "lost"),
        ("Lost.", "Lost"),
        ("LOST?", "lost?"),
        ("it's", "it's"),
        ("IT'S", "it's"),
        ('a "b"', 'a "b"'),
        ('"a "b""', 'a "b"'),
        ("c#", "C#"),
        ("c", "C"),
        ("C", "C"),
        ("-1", "-1"),
        ("a*", "A*"),
    ],
)
def test_a_label_is_read_whatever_its_case_and_the_marks_around_it(text, meant):
    assert label(text) == meant


@pytest.mark.parametrize(
    "text",
    [
        "card lost",
        "card",
        "card_lost card_lost",
        "card_lost, lost",
        "my card_lost",
        "crad_lost",
        "1",
        "",
        "'",
        "?",
        "LOST",
        "intent: card_lost",
        "card-lost",
        "#",
        "Cc",
    ],
)
def test_a_label_is_not_guessed(text):
    with pytest.raises(FormatError, match="y is no label of the 11: "):
        label(text)


marks = st.text(st.sampled_from(list(" \n\"'`“”[](){}*")), max_size=4)
stops = st.text(st.sampled_from(list(".,;:!?")), max_size=2)
any_label = st.text(st.sampled_from(list("abAB?.-\"' _")), min_size=1, max_size=3)


def letters(text) -> str:
    """What is left of a label without case and marks."""
    return "".join(c for c in text.casefold() if c.isalnum() or c in "-_")


@given(
    st.lists(any_label, min_size=1, max_size=6, unique=True),
    marks,
    marks,
    stops,
    st.sampled_from([str, str.upper, str.title]),
    st.data(),
)
def test_what_is_read_is_the_label_but_for_case_and_marks(labels, before, after, stop, case, data):
    """And never one of two."""
    meant = data.draw(st.sampled_from([x.strip() for x in labels]))
    labels = tuple(dict.fromkeys(x.strip() for x in labels))
    try:
        read = label(before + case(meant) + stop + after, labels)
    except FormatError:
        alike = [x for x in labels if letters(x) == letters(meant)]
        assert len(alike) > 1 or not letters(meant)
    else:
        assert letters(read) == letters(meant)
    assert not meant or label(meant, labels) == meant


# -------------------------------------------------------------------------------- programs and runs
def test_a_run_that_returns_is_completed_and_scored_by_the_metric():
    def lengths(example, prediction):
        return len(example["x"]) + len(prediction.y)

    (t,) = run(Two(2), metric=lengths)

    assert (t.status, t.reward, t.prediction) == ("completed", 7.0, {"y": "ok"})
    assert [(c.module, c.invocation, c.inputs["x"]) for c in t.calls] == [
        ("first", 0, "hello"),
        ("second", 0, "ok"),
        ("second", 1, "ok"),
    ]


def test_two_modules_of_one_signature_are_two_modules():
    (t,) = run(Two())
    assert [c.module for c in t.calls] == ["first", "second"]


@given(st.integers(0, 5), st.integers(1, 4), st.integers().map(random.Random), st.integers(1, 5))
def test_the_order_in_which_requests_finish_changes_nothing(times, rollouts, rng, batch):
    examples = [{"x": str(i)} for i in range(3)]

    def reply(messages, key):
        return f"<y>{random.Random(repr(key)).random()}</y>"

    def shuffle(tickets):
        return rng.sample(tickets, len(tickets))

    def metric(example, prediction):
        return float(prediction.y)

    def play(sampler):
        return run_programs(
            Two(times), examples, metric, sampler, rollouts=rollouts, seed=4, step=2
        )

    in_order = play(ScriptedSampler(reply))
    shuffled = play(ScriptedSampler(reply, shuffle, batch))

    assert in_order == shuffled
    places = [(example, rollout) for example in range(3) for rollout in range(rollouts)]
    assert [(t.example, t.rollout) for t in in_order] == places


def test_every_request_has_its_own_key():
    sampler = ScriptedSampler(always_ok)

    run_programs(Two(3), [{"x": "a"}, {"x": "a"}], zero, sampler, rollouts=3, seed=7, step=5)

    keys = [key for key, _ in sampler.asked]
    # examples x rollouts x calls
    assert len(keys) == 2 * 3 * 4
    assert len(set(keys)) == len(keys)
    assert all(key[:2] == (7, 5) for key in keys)


class Thinker(Program):
    def __init__(self):
        self.ask = ChainOfThought("x -> n: int, y")

    async def forward(self, x):
        return await self.ask(x=x)


@pytest.mark.parametrize(
    "text, share",
    [
        ("nothing", 0),
        ("<reasoning>r</reasoning>", 1 / 3),
        ("<reasoning>r</reasoning><n>1</n>", 2 / 3),
        ("<reasoning>r</reasoning><n>one</n><y>s</y>", 2 / 3),
    ],
)
def test_a_format_error_costs_by_the_share_of_fields_that_are_missing(text, share):
    (t,) = run(Thinker(), answer(ask=text), failure_score=0.0, format_failure_score=-1.0)
    assert t.status == "format_error"
    assert t.reward == pytest.approx(-1 + share)
    assert t.votes

    (t,) = run(Thinker(), answer(ask=text), failure_score=0.5, format_failure_score=0.2)
    assert t.reward == pytest.approx(0.2 + 0.3 * share)


@pytest.mark.parametrize("tokens, text", [([4, 5], "<y>unfinis"), ([], "")])
def test_a_completion_cut_short_ends_in_length(tokens, text):
    """So does a prompt that does not fit."""
    cut = Completion([1], tokens, [-1.0] * len(tokens), "length", text)

    (t,) = run(Two(), answer(second=cut))

    assert (t.status, t.reward, t.votes) == ("length", -1.0, True)
    assert t.calls[1].completion == cut


def test_a_completion_at_its_limit_whose_fields_are_complete_is_no_failure():
    full = Completion([1], [4], [-1.0], "length", "<y>done</y>")
    (t,) = run(Two(), answer(second=full))
    assert t.status == "completed"


class Stubborn(Two):
    """Goes on whatever happens, or tries to."""

    async def forward(self, x):
        for _ in range(6):
            try:
                await self.first(x=x)
            except Exception:
                # a program must not be able to go on past its limit
                pass
        return Prediction()


@pytest.mark.parametrize(
    "allowed, status, made",
    [
        (3, "max_calls", 3),
        (6, "completed", 6),
        (1, "max_calls", 1),
    ],
)
def test_a_run_that_makes_too_many_calls_ends_with_the_failure_score(allowed, status, made):
    (t,) = run(Stubborn(), max_calls=allowed, failure_score=0.25)

    assert (t.status, len(t.calls)) == (status, made)
    assert t.reward == (0.25 if status == "max_calls" else 1.0)


def test_a_program_that_catches_its_own_errors_completes():
    """And every call is recorded."""

    class Careful(Two):
        async def forward(self, x):
            try:
                await self.first(x=x)
            except FormatError:
                return Prediction(y=(await self.second(x="again")).y)

    (t,) = run(Careful(), answer(first="garbage"))

    assert t.status == "completed"
    failed, again = t.calls
    assert failed.error
    assert not again.error
    assert failed.completion.text == "garbage"
    assert failed.inputs == {"x": "hello"}
    assert failed.outputs is None


# --------------------------------------------------------------------------------------- the metric
@pytest.mark.parametrize(
    "metric",
    [
        not_a_number,
        lambda e, p: math.inf,
        lambda e, p: 1 / 0,
        lambda e, p: 10**400,
    ],
    ids=["nan", "inf", "division", "huge"],
)
def test_a_reward_that_is_not_finite_excludes_the_run_and_says_why(metric):
    (t,) = run(Two(), metric=metric)

    assert t.status == "tool_error"
    assert t.reward is None
    assert not t.votes
    assert "metric" in t.error
    assert len(t.calls) == 2


def test_what_a_metric_does_to_its_example_stays_with_it():
    examples = [{"x": "hello", "gold": ["a", "b"]}]

    def consume(example, prediction):
        example["gold"].pop()
        return len(example["gold"])

    for _ in range(2):
        assert [t.reward for t in run(Two(), metric=consume, examples=examples)] == [1]
    assert examples == [{"x": "hello", "gold": ["a", "b"]}]


@pytest.mark.parametrize(
    "error",
    [
        KeyError("label"),
        IndexError("list index"),
        TypeError("no len"),
        AttributeError("no intent"),
        NameError("reward"),
        AssertionError("must be"),
        ImportError("no such module"),
        SystemExit(3),
        asyncio.CancelledError(),
    ],
)
def test_a_bug_in_the_metric_stops_the_run_with_its_traceback(error):
    told = f"the metric failed on example 0, rollout 0: {type(error).__name__}"
    with pytest.raises(ProgramError, match=told) as e:
        run(Two(), metric=raises(error))
    assert e.value.__cause__ is error
    assert error.__traceback__ is not None


def test_a_bug_that_all_runs_have_is_told_once(caplog):
    with pytest.raises(ProgramError):
        run(Two(), metric=raises(KeyError("label")), rollouts=8)

    # asyncio tells of a failure that nobody looked at
    gc.collect()
    assert not caplog.records


@pytest.mark.parametrize(
    "given",
    [
        None,
        "high",
        "0.5",
        b"1",
        [],
        {},
        {"quality": 1.0},
        {"reward": None},
        {"reward": 1.0, "quality": "good"},
        object(),
    ],
)
def test_a_reward_that_is_no_number_is_a_bug_of_the_metric(given):
    told = "the metric gave .* on example 0, rollout 0: expected a number"
    with pytest.raises(ProgramError, match=told):
        run(Two(), metric=lambda e, p: given)


@pytest.mark.parametrize(
    "error",
    [
        OSError("no route"),
        TimeoutError(),
        ToolError("judge: no route"),
        ValueError("no JSON"),
        ZeroDivisionError(),
        FormatError("the judge said nothing"),
        RuntimeError("status 500"),
    ],
)
def test_a_judge_that_fails_excludes_the_run(error):
    (t,) = run(Two(), metric=raises(error))

    assert t.status == "tool_error"
    assert not t.votes
    assert str(error) in t.error


# -------------------------------------------------------------------------------------------- tools
@pytest.mark.parametrize(
    "retries, status",
    [
        (0, "tool_error"),
        (1, "tool_error"),
        (2, "completed"),
    ],
)
def test_a_tool_is_tried_again_and_then_excludes_the_run(retries, status):
    tries = []

    def flaky(y):
        tries.append(y)
        if len(tries) < 3:
            raise ConnectionError("no route")
        return y + "!"

    (t,) = run(WithTool(flaky, retries=retries))

    assert t.status == status
    assert len(tries) == retries + 1
    if status == "completed":
        assert t.prediction == {"y": "ok!"}
    else:
        assert "no route" in t.error


@pytest.mark.parametrize(
    "error, says",
    [
        (StopIteration("none left"), "RuntimeError: StopIteration: none left"),
        (CancelledError("pool is gone"), "RuntimeError: CancelledError: pool is gone"),
        (ValueError(), "ValueError: "),
        (TimeoutError(), "TimeoutError: "),
    ],
)
def test_whatever_a_tool_raises_is_told_as_it_is_and_at_once(error, says):
    """To asyncio the first two mean something else; only what takes too long gave no answer."""
    (t,) = run(WithTool(raises(error), timeout=5))
    assert (t.status, t.error) == ("tool_error", f"fails: {says}")


@pytest.mark.parametrize("where", ["tool", "metric", "program"])
def test_a_mistake_of_the_lm_found_by_a_tool_votes(where, caplog):
    """With the failure score; so does one that the metric or the program finds."""
    tries = []

    def refuse(*_):
        tries.append(1)
        raise LMError("no city is called Atlantis")

    class Refusing(Two):
        async def forward(self, x):
            y = (await self.first(x=x)).y
            return refuse() if where == "program" else Prediction(y=y)

    program = WithTool(refuse, retries=3) if where == "tool" else Refusing()
    metric = refuse if where == "metric" else one

    (t,) = run(program, metric=metric, failure_score=0.25)

    assert (t.status, t.reward, t.votes) == ("format_error", 0.25, True)
    assert len(tries) == 1
    assert "Atlantis" in t.error
    assert not caplog.records


def test_a_tool_that_ends_its_thread_excludes_the_run():
    (t,) = run(WithTool(raises(SystemExit(3)), timeout=5))

    assert t.status == "tool_error"
    assert "SystemExit: 3" in t.error


class Endpoint(http.server.BaseHTTPRequestHandler):
    """Answers with the codes that its server has left; "garbage" is a 200 without JSON."""

    def do_GET(self):
        code = self.server.left.pop(0)
        self.send_response(code if isinstance(code, int) else 200)
        self.end_headers()
        self.wfile.write(b'{"y": "ok"}' if code == 200 else b"<html>no")

    def log_message(self, *_):
        pass


@pytest.mark.parametrize(
    "answers, status",
    [
        ([429, 500, 200], "completed"),
        ([500, 429, 503], "tool_error"),
        (["garbage"] * 3, "tool_error"),
    ],
)
def test_an_endpoint_that_fails_is_tried_again_and_then_excludes_the_run(answers, status):
    with http.server.HTTPServer(("127.0.0.1", 0), Endpoint) as server:
        server.left = list(answers)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"

        def ask(y):
            return json.load(urllib.request.urlopen(url, timeout=5))["y"]

        (t,) = run(WithTool(ask, retries=2))
        server.shutdown()

    assert t.status == status
    assert not server.left
    if status == "completed":
        assert t.prediction == {"y": "ok"}
    else:
        assert t.reward is None


def test_a_tool_that_hangs_excludes_its_run_alone():
    """And does not hold up the others."""
    never = threading.Event()

    def reply(messages, key):
        return "<y>hang</y>" if key[3] == 1 else "<y>ok</y>"

    def hangs(y):
        return never.wait() if y == "hang" else y

    began = time.monotonic()
    ts = run(WithTool(hangs, timeout=0.2), reply, rollouts=3)
    seconds = time.monotonic() - began

    assert [t.status for t in ts] == ["completed", "tool_error", "completed"]
    assert seconds < 10
    assert "TimeoutError: no answer in 0.2 s" in ts[1].error
    assert len(ts[1].calls) == 1
    never.set()


def test_a_program_that_calls_tools_without_end_ends_in_max_calls():
    used = []

    class Loop(Two):
        async def forward(self, x):
            await self.first(x=x)
            while True:
                await tool(used.append, x)

    (t,) = run(Loop(), max_calls=3)

    assert t.status == "max_calls"
    assert t.reward == 0.0
    assert len(t.calls) == 1
    assert len(used) == 300


def test_tools_run_beside_each_other_and_beside_decoding():
    # passes only if all eight runs are in their tool at once
    barrier = threading.Barrier(8, timeout=20)

    ts = run(WithTool(lambda y: barrier.wait()), rollouts=8)

    assert all(t.status == "completed" for t in ts)


# ---------------------------------------------------------------------------- what is told of tools
def lookup(name, where):
    return [name]


class Hop(Two):
    """A tool before its calls, one that fails between them, and one after."""

    async def forward(self, x):
        found = await tool(lookup, x, [1])
        y = (await self.first(x=x)).y
        try:
            await tool(raises(KeyError("Atlantis")), y)
        except ToolError:
            found.append("changed later")
        await self.second(x=y)
        return Prediction(found=found, again=await tool(str.upper, y))


def test_tools_are_in_the_trace_with_arguments_and_results():
    (t,) = run(Hop())
    assert [(c.name, c.arguments, c.result, c.error, c.after) for c in t.tools] == [
        ("lookup", ("hello", [1]), ["hello"], "", 0),
        ("fails", ("ok",), None, "KeyError: 'Atlantis'", 1),
        ("upper", ("ok",), "OK", "", 2),
    ]

    lines = [line.strip() for line in show(t, expected={"answer": "Rome"}).splitlines()]
    titles = [line for line in lines if line.startswith(("tool", "1.", "2.", "3."))]
    assert titles == [
        "tool lookup",
        "1. first [0]   3 prompt + 2 sampled tokens, stop",
        "tool fails",
        "2. second [0]   3 prompt + 2 sampled tokens, stop",
        "tool upper",
    ]
    assert "< hello, [1]" in lines
    assert "> failed: KeyError: 'Atlantis'" in lines
    assert "> OK" in lines
    assert "expected answer: Rome" in lines


def test_a_tool_that_the_program_gives_up_on_is_in_the_trace():
    never = threading.Event()

    class Hasty(Two):
        async def forward(self, x):
            await self.first(x=x)
            try:
                await asyncio.wait_for(tool(never.wait), 0.05)
            except asyncio.TimeoutError:
                return Prediction()

    (t,) = run(Hasty())
    never.set()

    assert t.status == "completed"
    assert [(c.name, c.error) for c in t.tools] == [("wait", "had not ended")]


def test_what_cannot_be_copied_into_the_trace_is_put_down_as_text():
    lock = threading.Lock()

    (t,) = run(WithTool(lambda y: lock))

    assert t.status == "completed"
    assert t.prediction["y"] is lock
    assert "lock" in t.tools[0].result


def test_a_failure_is_told_once_however_often_it_is_raised(caplog):
    class Careful(WithTool):
        async def forward(self, x):
            try:
                await super().forward(x)
            except ToolError as e:
                raise e

    run(Careful(raises(OSError("no route")), retries=2))
    told = ["example 0, rollout 0: fails: OSError: no route"]
    assert messages_of(caplog.records) == told

    caplog.clear()
    run(Two(), metric=not_a_number)
    told = ["example 0, rollout 0: the metric gave nan"]
    assert messages_of(caplog.records) == told


def test_the_first_failure_of_each_kind_is_printed_and_kept(tmp_path, capsys):
    """It is kept with its traceback."""

    def lookup(y):
        if y == "odd":
            raise OSError(f"no route, try {y}")
        raise KeyError(y)

    def reply(messages, key):
        rollout = key[3]
        return "<y>odd</y>" if rollout % 2 else f"<y>city {rollout}</y>"

    with FirstFailures(tmp_path / "errors.log"):
        run(WithTool(lookup), reply, rollouts=6)
    # nobody listens any more
    run(WithTool(lookup), reply, rollouts=2)

    told = capsys.readouterr().err
    assert told.count("KeyError: 'city 0'") == 1
    assert told.count("OSError: no route, try odd") == 1
    assert len(told.splitlines()) == 2
    assert "errors.log" in told
    kept = (tmp_path / "errors.log").read_text()
    assert kept.count("Traceback") == 2
    assert kept.count("in lookup") == 2


def test_the_first_failure_of_a_kind_never_steers_a_terminal(capsys):
    def lookup(y):
        raise OSError("\x1b[2Jgone")

    with FirstFailures():
        run(WithTool(lookup), lambda messages, key: "<y>x</y>")
    told = capsys.readouterr().err
    assert "\\x1b[2Jgone" in told
    assert "\x1b" not in told


@pytest.mark.parametrize(
    "a, b, alike",
    [
        ("search: KeyError: 'Rome'", "search: KeyError: 'Paris'", True),
        ("f: OSError: 3 of 4.5", "f: OSError: 12 of 1", True),
        ("search: KeyError: 'Rome'", "search: OSError: 'Rome'", False),
        ("search: KeyError: 'Rome'", "find: KeyError: 'Rome'", False),
    ],
)
def test_failures_are_of_a_kind_that_differ_in_numbers_and_quotes_alone(a, b, alike):
    assert (kind_of(a) == kind_of(b)) == alike


# -------------------------------------------------------------------------- calls beside each other
class Both(Two):
    async def forward(self, x):
        await gather(self.first(x="1"), self.second(x="2"))


class TwoAtOnce(Two):
    """Two modules and a tool together, then one module twice."""

    async def forward(self, x):
        a, b, c = await gather(self.first(x="1"), self.second(x="2"), tool(str.upper, x))
        d, e = await gather(self.first(x="3"), self.first(x="4"))
        return Prediction(y=f"{a.y} {b.y} {c} {d.y} {e.y}")


def test_calls_awaited_together_are_submitted_together():
    """And keep their order."""

    def reply(messages, key):
        return f"<y>{key[4]}{key[5]}</y>"

    sampler = ScriptedSampler(reply, shuffle=last_first, batch=1)

    (t,) = run_programs(TwoAtOnce(), [{"x": "up"}], zero, sampler)

    assert t.prediction["y"] == "first0 second0 UP first1 first2"
    assert [(c.module, c.invocation, c.inputs["x"]) for c in t.calls] == [
        ("first", 0, "1"),
        ("second", 0, "2"),
        ("first", 1, "3"),
        ("first", 2, "4"),
    ]


def test_when_one_of_several_fails_the_others_are_recorded_too():
    (t,) = run(Both(), answer(first="garbage"))

    assert t.status == "format_error"
    assert [c.completion is not None for c in t.calls] == [True, True]
    assert t.calls[1].outputs


class HastyTimeout(Two):
    """Gives up on a call before it can be answered."""

    async def forward(self, x):
        try:
            await asyncio.wait_for(self.first(x=x), 1e-6)
        except asyncio.TimeoutError:
            pass
        return Prediction(x=x)


class HastyGroup(Two):
    """Gives up on two calls where one fails."""

    async def forward(self, x):
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self.first(x=x))
                group.create_task(self.second(x=x))
        except ExceptionGroup:
            pass
        return Prediction(x=x)


@pytest.mark.parametrize("give_up", ["timeout", "group"])
def test_calls_that_a_program_gives_up_on_are_recorded_too(give_up):
    if give_up == "timeout":
        (t,) = run(HastyTimeout())
    else:
        (t,) = run(HastyGroup(), reply=answer("", first="?", second="?"))

    assert t.status == "completed"
    assert len(t.calls) == (1 if give_up == "timeout" else 2)
    assert all(c.completion for c in t.calls)


def test_calls_that_a_program_leaves_behind_are_recorded():
    class Hasty(Two):
        async def forward(self, x):
            left = asyncio.ensure_future(self.first(x="slow"))
            await self.second(x="fast")
            left.add_done_callback(lambda f: f.exception())
            return Prediction()

    sampler = ScriptedSampler(always_ok, shuffle=last_first, batch=1)

    (t,) = run_programs(Hasty(), [{"x": ""}], zero, sampler)

    assert sorted(c.module for c in t.calls) == ["first", "second"]
    assert all(c.completion for c in t.calls)


# -------------------------------------------------------------------------- bugs, names and prompts
def lacks_a_key(program, x):
    return {}["missing"]


def names_no_input(program, x):
    return program.first(z=x)


def calls_a_module_of_none(program, x):
    return Module("x -> y")(x=x)


def lacks_an_attribute(program, x):
    return asyncio.sleep(0, program.times.nothing)


@pytest.mark.parametrize(
    "bug, says",
    [
        (lacks_a_key, "KeyError: 'missing'"),
        (names_no_input, "input 'x' is missing"),
        (calls_a_module_of_none, "none of the program's (first, second)"),
        (lacks_an_attribute, "AttributeError"),
    ],
)
def test_a_bug_in_the_program_stops_the_run_and_names_its_place(bug, says):
    """The example and the last module, with its traceback."""

    class Buggy(Two):
        async def forward(self, x):
            await self.second(x=x)
            return await bug(self, x)

    with pytest.raises(ProgramError, match="example 0, rollout 0, after second") as e:
        run(Buggy())
    assert says in str(e.value)
    assert e.value.__cause__.__traceback__ is not None


def test_an_example_without_an_input_of_forward_is_a_bug():
    """Told in a sentence."""
    told = r"Two.forward takes 'x', which example 0 lacks \(it has 'z'\)"
    with pytest.raises(ProgramError, match=told):
        run(Two(), examples=[{"z": 1}])


def test_a_module_awaited_outside_of_a_run_says_what_makes_runs():
    for alone in (Two().first(x="a"), tool(str.upper, "a")):
        with pytest.raises(ProgramError, match="run_programs"):
            asyncio.run(alone)


def test_a_program_without_modules_is_refused():
    class Empty(Program):
        async def forward(self, x):
            return Prediction()

    with pytest.raises(ProgramError, match="Empty has no modules"):
        run(Empty())


def test_modules_are_named_by_their_path_in_the_program():
    class Outer(Program):
        def __init__(self):
            self.inner = Two()
            self.list = [Module("a -> b")]
            self.named = {"k": Module("a -> b")}
            self.alias = self.inner.first

        async def forward(self, x):
            return await self.inner(x)

    program = Outer()
    assert list(program.modules()) == ["inner.first", "inner.second", "list.0", "named.k"]

    (t,) = run(program)
    assert [c.module for c in t.calls] == ["inner.first", "inner.second"]


def test_demos_and_instructions_are_in_the_prompt_and_survive_saving(tmp_path):
    program = Two()
    program.first.demos = [{"x": "demo in", "y": "demo out"}]
    program.first.instruction = "Better."
    save_prompts(program, tmp_path / "prompts.json")
    other = Two()
    load_prompts(other, tmp_path / "prompts.json")
    sampler = ScriptedSampler(always_ok)

    run_programs(other, [{"x": "a"}], zero, sampler)

    prompts = []
    for _, messages in sampler.asked:
        prompts.append(" ".join(m["content"] for m in messages))
    first, second = prompts
    for part in ("Better.", "demo in", "demo out"):
        assert part in first
    assert "Second." in second
    assert "demo" not in second


PLAIN = '{"instruction": "", "demos": []}'


@pytest.mark.parametrize(
    "text, culprit",
    [
        ("{", "JSON"),
        ("[]", "modules first, second"),
        (f'{{"first": {PLAIN}}}', "second is missing"),
        (f'{{"first": {PLAIN}, "second": {{"instruction": 3, "demos": []}}}}', "second"),
        (f'{{"first": {{"instruction": "", "demos": ["d"]}}, "second": {PLAIN}}}', "first"),
    ],
)
def test_prompts_that_cannot_be_read_are_refused_and_change_nothing(tmp_path, text, culprit):
    (tmp_path / "p.json").write_text(text)
    program = Two()

    with pytest.raises(InputError, match=culprit) as e:
        load_prompts(program, tmp_path / "p.json")

    assert "p.json" in str(e.value)
    assert program.first.instruction == "First."


# --------------------------------------------------------------------------- cut, counted and shown
@given(st.floats(0, 1), st.integers(0, 5))
def test_interrupted_runs_are_cut_short_at_a_random_call_and_vote(share, seed):
    ts = run(Two(4), rollouts=10, interrupt=share, seed=seed, max_calls=5)

    cut = [t for t in ts if t.status == "max_calls"]
    for t in cut:
        assert 1 <= len(t.calls) < 5
        assert t.votes
        assert t.reward == 0.0
    assert all(len(t.calls) == 5 for t in ts if t not in cut)
    if share == 0:
        assert not cut
    if share == 1:
        assert len(cut) == 10


def test_the_statuses_are_counted():
    ts = run(Two(), metric=not_a_number) + run(Two(), answer(first="")) + run(Two())
    assert statuses(ts) == {
        "completed": 1,
        "format_error": 1,
        "length": 0,
        "max_calls": 0,
        "tool_error": 1,
    }


def test_programs_run_inside_a_running_event_loop():
    async def notebook():
        return run(Two())

    (t,) = asyncio.run(notebook())
    assert t.status == "completed"


def test_show_tells_what_happened():
    (good,) = run(Two(), metric=lambda e, p: 0.5)
    shown = show(good)
    assert "1. first [0]   3 prompt + 2 sampled tokens, stop" in shown
    assert "completed, reward 0.500" in shown
    assert "x: hello" in shown
    assert "y: ok" in shown

    (bad,) = run(Two(), answer(second="<z>"))
    shown = show(bad)
    assert "not readable: y is missing; sampled: '<z>'" in shown
    assert "format_error, reward -1.000" in shown


def test_errors_are_told_apart():
    assert issubclass(LengthError, FormatError)
    assert not issubclass(ToolError, FormatError)
    with pytest.raises(AttributeError, match="'z'"):
        _ = Prediction(y=1).z
