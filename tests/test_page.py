"""The page of a step: what stands where, why nothing is learned, and that text stays text."""

import contextlib
import dataclasses
import json
import os
import random
import re
import shutil
import subprocess
import time
import unicodedata
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import trajectory, trajectory_sets

import mmgrpo as G
from program import Call, Completion, InputError, Module, Prediction, Program, Task, ToolCall
from run import cli, page

HOSTILE = [
    "</script><script>document.title = 'taken'</script>",
    "<!-- <script> ]]> --!> <img src=x onerror=\"document.title='taken'\">",
    "'\"`&lt;&#60;</pre></td></textarea></title></style>",
    "left \u202e thgir \u2066\u2069 \u200b\ufeff \u2028\u2029 end",
    "\x00\x1b[2J\x07\r\x7f\x9b1m",
    "\ud83d half \udc00 \U0001f600 whole \U000e0041",
    "${data} {{7*7}} DATA \\u003c \\",
    "__proto__",
]
CONFIG = G.Config(max_tokens=16)


def spelt(ids):
    """The text of ids, each of which is one character."""
    return "".join(map(chr, ids))


def call(module, invocation, prompt, text, **more):
    ids = [ord(c) for c in text]
    completion = Completion([ord(c) for c in prompt], ids, [-0.5] * len(ids), "stop", text)
    return Call(module, invocation, {}, completion, **more)


def run(rollout, calls, reward=0.0, example="e0", **more):
    made = dataclasses.replace(trajectory(example, rollout, [], reward), calls=tuple(calls))
    return dataclasses.replace(made, **more)


def step_of(trajectories, warm=False, **options):
    return page.compared(trajectories, dataclasses.replace(CONFIG, **options), 0, warm)


def described(trajectories, decode=spelt, **options):
    return page.Description(step_of(trajectories, **options), decode).whole()


def written(told, title="a title"):
    return page.page({"title": title, "figures": [("runs", "2")]} | told)


def data_in(text):
    """The data of a page, as its script reads them."""
    (block,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    return json.loads(block)


def strings_in(value):
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield name
            yield from strings_in(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings_in(item)


# ------------------------------------------------------------------------------- text stays text


def hostile_runs(text, example=None, rollout=0):
    """Two runs in which everything that can be a text is this one."""
    example = text if example is None else example
    tool = ToolCall(text, (text,), text, after=1)
    failed = ToolCall("search", (text,), error=text, after=0)
    first = call("ask", 0, text, text, error=text)
    second = call(text, 0, text + "\n" + text, text)
    return [
        run(rollout, [first, second], 1.0, example, prediction={text: text}, tools=(failed, tool)),
        run(rollout + 1, [first], 0.0, example, status="format_error", error=text),
    ]


class Elements(HTMLParser):
    """The elements of a page, with their attributes."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, attributes))


USUAL = Elements(written(described(hostile_runs("usual")))).found
anything = st.sampled_from(HOSTILE) | st.text(
    st.characters() | st.sampled_from("<>/!-&'\"\u202e\ud800")
)


@given(anything, anything)
def test_no_text_adds_an_element_or_an_attribute(text, title):
    told = described(hostile_runs(text))
    told["examples"][0]["about"] = [(text, text)]
    made = written(told, title)
    assert Elements(made).found == USUAL
    block = made.split('id="data">')[1].split("</script>")[0]
    assert "<" not in block and block.isascii() and made.encode("utf-8")
    assert data_in(made)["examples"][0]["about"] == [[page.plain(text), page.plain(text)]]


@given(anything)
def test_every_character_of_a_page_can_be_seen(text):
    for found in strings_in(data_in(written(described(hostile_runs(text)), text))):
        hidden = [c for c in found if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")]
        assert set(hidden) <= {"\n", "\t"}


def test_what_cannot_be_seen_is_written_out_and_the_rest_stays():
    seen = "é 漢字 <b>\n\tשלום"
    assert page.plain(seen) == seen
    assert page.plain("\u202ea\x1b\ud800\U000e0041") == r"\u202ea\x1b\ud800\U000e0041"
    assert page.plain({"x": (float("nan"), float("-inf"), 0.5, None, True)}) == {
        "x": ["nan", "-inf", 0.5, None, True]
    }


def test_the_script_makes_no_markup_of_text_and_no_code():
    for way in (
        "innerHTML",
        "outerHTML",
        "insertAdjacent",
        "document.write",
        "eval(",
        "Function(",
        "srcdoc",
        "setAttribute",
        "DOMParser",
        "createContextualFragment",
    ):
        assert way not in page.SCRIPT
    assert "default-src 'none'" in page.TEMPLATE and "http:" not in page.TEMPLATE
    assert "https:" not in page.TEMPLATE and "unsafe" not in page.TEMPLATE


# -------------------------------------------------------------------------------- what stands where

options = st.fixed_dictionaries(
    {
        "short_groups": st.sampled_from(["keep", "truncate", "fill"]),
        "group_size": st.sampled_from([0, 0, 2]),
        "level": st.sampled_from(["call", "call", "trajectory"]),
        "baseline": st.sampled_from(["group", "example"]),
    }
)


@given(trajectory_sets(), options)
def test_a_call_stands_once_in_the_row_of_its_module_and_invocation(trajectories, given_options):
    told = described(trajectories, lambda ids: "x" * len(ids), **given_options)
    runs = {(t.example, t.rollout): t for t in trajectories}
    for example in told["examples"]:
        name = example["name"].removeprefix("example ")
        for column in example["runs"]:
            t = runs.pop((name, int(column["name"].removeprefix("run "))))
            own = [cell for cell in column["cells"] if "padded" not in cell]
            assert sorted(cell["call"] for cell in own) == [*range(len(t.calls))]
            for cell in own:
                made = t.calls[cell["call"]]
                assert example["slots"][cell["slot"]]["name"] == f"{made.module}[{made.invocation}]"
    assert not runs


@given(trajectory_sets(), options)
def test_the_cells_with_an_advantage_are_the_members_of_the_groups(trajectories, given_options):
    step = step_of(trajectories, **given_options)
    told = page.Description(step, lambda ids: "x" * len(ids)).whole()
    wanted, rows = Counter(), iter(step.rows)
    for group, values in zip(step.groups, step.advantages):
        for member, advantage in zip(group.members, values):
            t = step.trajectories[member.trajectory]
            for c in member.calls:
                made = t.calls[c]
                module, k = group.module, group.invocation
                if step.config.level == "trajectory":
                    module, k = made.module, made.invocation
                row = next(rows)
                assert row.completion is made.completion
                wanted[t.example, t.rollout, f"{module}[{k}]", c, advantage, row.weight] += 1
    found = Counter()
    for example in told["examples"]:
        for column in example["runs"]:
            for cell in column["cells"]:
                slot = example["slots"][cell["slot"]]["name"]
                if "advantage" in cell:
                    found[
                        example["name"].removeprefix("example "),
                        int(column["name"][4:]),
                        slot,
                        cell["call"],
                        cell["advantage"],
                        cell["weight"],
                    ] += 1
    assert found == wanted


@given(trajectory_sets(), options)
def test_a_cell_says_why_exactly_where_nothing_is_learned(trajectories, given_options):
    for example in described(trajectories, lambda ids: "x" * len(ids), **given_options)["examples"]:
        for column in example["runs"]:
            for cell in column["cells"]:
                learned = cell.get("advantage", 0) != 0 and column["calls"][cell["call"]]["tokens"]
                assert bool(cell["why"]) == (not learned)


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=8), st.data())
def test_rows_stand_in_the_order_of_the_runs(names, data):
    """Runs that leave out calls at the end of a module's agree on an order, which the rows keep."""
    runs = []
    for rollout in range(data.draw(st.integers(1, 4))):
        most = {name: data.draw(st.integers(0, 8)) for name in "abc"}
        made, calls = Counter(), []
        for name in names:
            if made[name] < most[name]:
                calls.append(call(name, made[name], "p", "t"))
                made[name] += 1
        runs.append(run(rollout, calls))
    slots = page.slots_of(runs)
    for t in runs:
        places = [slots.index((c.module, c.invocation)) for c in t.calls]
        assert places == sorted(places)


def test_a_long_run_does_not_push_a_call_behind_what_follows_it():
    long = run(0, [call(name, 0, "p", "t") for name in "xyzu"])
    short = run(1, [call(name, 0, "p", "t") for name in "uv"])
    assert [module for module, _ in page.slots_of([long, short])] == ["x", "y", "z", "u", "v"]


def test_runs_that_disagree_on_the_order_have_a_page_too():
    runs = [
        run(0, [call("a", 0, "p", "t"), call("b", 0, "p", "t")]),
        run(1, [call("b", 0, "p", "t"), call("a", 0, "p", "t")]),
    ]
    assert sorted(page.slots_of(runs)) == [("a", 0), ("b", 0)]


# ------------------------------------------------------------------------------ why nothing is learned


def pair(first, second, **more):
    """Two runs of one call with these rewards."""
    return [
        run(0, [call("ask", 0, "p", "t")], first),
        run(1, [call("ask", 0, "p", "t")], second, **more),
    ]


def longer(first, second):
    """Two runs; the first makes a further call, which the second does not reach."""
    runs = pair(first, second)
    runs[0] = dataclasses.replace(runs[0], calls=(*runs[0].calls, call("ask", 1, "p", "t")))
    return runs


@pytest.mark.parametrize(
    "runs, given_options, where, says",
    [
        (longer(0.0, 1.0), {}, (0, 1), "the group has one run, and nothing to compare it with"),
        (pair(0.5, 0.5), {}, (0, 0), "all 2 rewards of the group are equal"),
        (pair(0.5, 0.5), {"baseline": "example"}, (0, 0), "all 2 rewards of the example are equal"),
        (pair(0.5, 0.5)[:1], {"baseline": "example"}, (0, 0), "the example has one run"),
        (
            [*pair(0.0, 1.0), run(2, [call("ask", 0, "p", "t")], 0.5)],
            {},
            (2, 0),
            "its reward is the mean of",
        ),
        (pair(0.0, None, status="tool_error"), {}, (1, 0), "excluded: a tool or the metric failed"),
        (pair(0.0, float("nan")), {}, (1, 0), "excluded: the run's reward is nan"),
        (
            longer(0.0, 1.0),
            {"short_groups": "truncate"},
            (0, 1),
            "excluded: not every run made this call",
        ),
        (
            pair(0.0, 1.0),
            {"group_size": 1},
            (1, 0),
            "excluded: not among the 1 members that --group-size",
        ),
        (
            pair(0.0, 1.0),
            {"group_size": 1, "level": "trajectory", "short_groups": "truncate"},
            (1, 0),
            "excluded: not among the 1 members that --group-size",
        ),
        (pair(0.0, 1.0), {"warm": True}, (1, 0), "warm start: it could not be read"),
        (
            [run(0, [call("ask", 0, "p", "")], 1.0), *pair(0.0, 0.0)[1:]],
            {},
            (0, 0),
            "no token was sampled",
        ),
    ],
)
def test_a_zero_advantage_has_its_reason(runs, given_options, where, says):
    column, slot = where
    cells = described(runs, **given_options)["examples"][0]["runs"][column]["cells"]
    (cell,) = [cell for cell in cells if cell["slot"] == slot]
    assert says in cell["why"]


def test_a_padded_cell_names_the_call_that_stands_in():
    cells = described(longer(0.0, 1.0), short_groups="fill")["examples"][0]["runs"][1]["cells"]
    assert [cell.get("padded") for cell in cells] == [None, "padded with its own ask[0]"]


# -------------------------------------------------------------------------- what is folded, and tokens

lines = st.lists(st.sampled_from(["a\n", "bc\n", "d"]), max_size=6).map("".join)


@given(st.lists(st.tuples(lines, lines), min_size=1, max_size=5))
def test_what_is_folded_and_what_is_not_make_up_the_whole(texts):
    runs = [
        run(r, [call("ask", 0, "in\n" + prompt, "t" * 9 + text)])
        for r, (prompt, text) in enumerate(texts)
    ]
    told = described(runs)
    (example,) = told["examples"]
    (slot,) = example["slots"]
    for (prompt, text), column in zip(texts, example["runs"]):
        (made,) = column["calls"]
        assert told["openings"]["ask"] + slot["prompt"] + made["prompt"] == "in\n" + prompt
        assert slot["completion"] == "".join(made["tokens"][: slot["folded"]])
        assert "".join(made["tokens"]) == "t" * 9 + text and len(made["logprobs"]) == len(
            made["tokens"]
        )
    if len(texts) > 1:
        assert slot["folded"] >= 9 and told["openings"]["ask"].startswith("in\n")


def test_prompts_fold_at_the_ends_of_lines_and_short_beginnings_of_completions_not_at_all():
    told = described(
        [run(0, [call("ask", 0, "one\ntwo", "yes")]), run(1, [call("ask", 0, "one\ntwin", "yet")])]
    )
    assert told["openings"]["ask"] == "one\n" and told["examples"][0]["slots"][0]["folded"] == 0


@given(st.text())
def test_the_tokens_of_a_text_are_pieces_of_it(tokenizer, text):
    ids = tokenizer.encode(text)
    decode = lambda ids: tokenizer.tokenizer.decode(ids, skip_special_tokens=False)
    found = page.pieces(ids, decode)
    assert len(found) == len(ids) and "".join(found) == decode(ids)


@given(st.data())
def test_tokens_that_are_no_text_are_pieces_too(tokenizer, data):
    longest = 0

    def decode(ids):
        nonlocal longest
        longest = max(longest, len(ids))
        return tokenizer.tokenizer.decode(ids, skip_special_tokens=False)

    halves = [
        i for i in range(tokenizer.size) if decode([i]) == "\ufffd"
    ]  # bytes that are no character
    ids = data.draw(
        st.lists(st.sampled_from(halves) | st.integers(0, tokenizer.size - 1), max_size=40)
    )
    assert len(page.pieces(ids, decode)) == len(ids)
    assert len(page.pieces(halves[:1] * 40, decode)) == 40
    assert longest <= 6  # else a completion of thousands of tokens would take minutes


# ------------------------------------------------------------------------------------- a large step


def words(ids):
    return "".join(f" w{i:03d}" for i in ids)


def large_step(runs=64, calls=6, tokens=128, prompt=1500, own=300):
    """One example of many runs, whose prompts have a long beginning in common."""
    draw = random.Random(0)
    trajectories = []
    for r in range(runs):
        made = []
        for c in range(calls):
            ids = [draw.randrange(1000) for _ in range(tokens)]
            begins = [7] * prompt + [draw.randrange(1000) for _ in range(own)]
            logprobs = [-draw.random() for _ in ids]
            completion = Completion(begins, ids, logprobs, "stop", words(ids))
            made.append(Call(("ask", "note")[c % 2], c // 2, {}, completion))
        trajectories.append(run(r, made, draw.random()))
    return trajectories


def lines_of(ids):
    """As `words`, a line each."""
    return words(ids).replace(" ", "\n")


def large_page(**sizes):
    step = step_of(large_step(**sizes))
    for t in step.trajectories:
        for made in t.calls:
            step.ratios[id(made.completion)] = [1.01 for _ in made.completion.token_ids]
    return written(page.Description(step, lines_of).whole())


def test_the_page_of_a_large_step_does_not_repeat_what_calls_share():
    assert len(large_page()) < 3_000_000
    assert len(large_page(prompt=3000)) - len(large_page()) < 100_000  # 2.9 MB of prompts more


# -------------------------------------------------------------------------------- a step made again


class Pair(Program):
    """Four calls, whatever comes back: a random LM cannot follow a format."""

    def __init__(self):
        self.first, self.second = Module("x -> y", "First."), Module("x -> y", "Second.")

    async def forward(self, x):
        for module in (self.first, self.second, self.second, self.second):
            try:
                await module(x=x)
            except ValueError:
                pass
        return Prediction(x=x)


def metric(example, prediction):
    return random.Random(repr((example, id(prediction)))).random()


TASK = Task(Pair(), metric, [{"x": str(i)} for i in range(5)], [{"x": "dev"}], [{"x": "test"}])
SMALL = G.Config(
    examples=3, rollouts=4, max_tokens=4, max_calls=4, slots=8, batch_tokens=2000, warmup=0
)


def again(model, tokenizer, config=SMALL, task=TASK):
    optimizer, reference = G.prepare(model, config)
    return page.train_again(model, tokenizer, optimizer, reference, task, config, 1)


@pytest.mark.parametrize(
    "given_options",
    [
        {},
        {"short_groups": "truncate"},
        {"short_groups": "fill"},
        {"group_size": 2},
        {"level": "trajectory"},
        {"normalize": "token"},
        {"normalize": "constant"},
        {"baseline": "example", "leave_one_out": True},
        {"scale_rewards": "batch"},
        {"warm_start": 3},
    ],
)
def test_what_is_shown_is_what_was_trained_on(model, tokenizer, monkeypatch, given_options):
    if "warm_start" in given_options:
        monkeypatch.setattr(G, "readable_share", lambda trajectories: 0.1)
    weigh, trained = G.weigh, []

    def recorded(*arguments):
        trained.append(weigh(*arguments))
        return trained[-1]

    monkeypatch.setattr(G, "weigh", recorded)
    step, metrics = again(
        model, tokenizer, dataclasses.replace(SMALL, interrupt=0.5, **given_options)
    )
    at_training, at_showing = trained
    assert at_training == at_showing == step.rows and at_training
    assert step.warm_start == ("warm_start" in given_options)
    assert ("warm start" in dict(page.figures(step, metrics, ""))) == step.warm_start


def test_ratios_are_of_the_steps_update(model, tokenizer):
    step, metrics = again(model, tokenizer, dataclasses.replace(SMALL, lr=1e-9))
    calls = [made for t in step.trajectories for made in t.calls]
    assert all(len(step.ratios[id(c.completion)]) == len(c.completion.token_ids) for c in calls)
    assert all(abs(r - 1) < 1e-4 for ratios in step.ratios.values() for r in ratios)
    step, _ = again(model, tokenizer, dataclasses.replace(SMALL, lr=1e-2))
    moved = {True: [], False: []}
    for row in step.rows:
        if row.advantage:
            moved[row.advantage > 0] += step.ratios[id(row.completion)]
    mean = lambda ratios: sum(ratios) / len(ratios)
    assert mean(moved[True]) > 1 > mean(moved[False])


def test_a_step_that_cannot_be_trained_again_has_a_page_without_ratios(model, tokenizer):
    def silent(example, prediction):
        raise OSError("no route to the judge")

    step, metrics = again(model, tokenizer, task=dataclasses.replace(TASK, metric=silent))
    assert (
        not step.ratios
        and "no route to the judge" in dict(page.figures(step, metrics, ""))["no update"]
    )
    told = page.Description(step, lambda ids: "x" * len(ids)).whole()
    assert told["examples"][0]["told"] == "4 runs, no rewards"


# --------------------------------------------------------------------------------- the command line


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of two steps of the tiny LM."""
    folder = tmp_path_factory.mktemp("page") / "run"
    few = [
        f"--{k}={v}"
        for k, v in {"steps": 2, "examples": 2, "rollouts": 4, "eval-examples": 2}.items()
    ]
    assert cli.main(["train", "--task", "banking77", *few, "--out", str(folder)]) == 0
    return folder


def test_show_writes_the_page_of_a_step(folder, tmp_path, capsys):
    file = tmp_path / "page.html"
    assert cli.main(["show", str(folder), "2", "--html", str(file)]) == 0
    assert "8 runs, sampled again token for token as in the run" in capsys.readouterr().out
    data = data_in(file.read_text(encoding="utf-8"))
    assert data["title"] == f"step 2 of {folder}" and len(data["examples"]) == 2
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (step,) = [m for m in metrics if m.get("step") == 2 and "reward" in m]
    assert dict(data["figures"])["reward"] == f"{step['reward']:.3f}"
    assert f"gradient {step['grad_norm']:.3g}" in dict(data["figures"])["update"]
    for example in data["examples"]:
        about = dict(example["about"])
        assert about["text"] in example["slots"][0]["prompt"] and about["intent"]


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["show", "RUN", "2"], "show RUN STEP --html FILE"),
        (["show", "--html", "FILE"], "show RUN STEP --html FILE"),
        (["show", "RUN", "--html", "FILE"], "show RUN STEP --html FILE"),
        (["show", "RUN", "two", "--html", "FILE"], "show RUN STEP --html FILE"),
        (["show", "RUN", "2", "--html", ""], "show RUN STEP --html FILE"),
        (["train", "--html", "FILE"], "train takes no --html"),
        (
            ["show", "RUN", "2", "--html", "FOLDER/none/page.html"],
            "FOLDER/none/page.html: expected the name of",
        ),
        (["show", "RUN", "2", "--html", "FOLDER"], "--html FOLDER: expected the name of a file"),
        (["show", "RUN", "2", "--html", "DEVICE"], "--html DEVICE: is there, and no page"),
        (["show", "RUN", "3", "--html", "FILE"], "step 3: the run has steps 1 to 2"),
        (["show", "FOLDER", "1", "--html", "FILE"], "FOLDER: holds no run"),
    ],
)
def test_a_mistaken_use_is_named(folder, tmp_path, capsys, arguments, says):
    (tmp_path / "there").mkdir()
    # by a link: a link is all that a broken check would replace
    device = tmp_path / "device"
    device.symlink_to("/dev/null")
    names = {"RUN": folder, "FILE": tmp_path / "page.html", "FOLDER": tmp_path / "there"}
    names["DEVICE"] = device

    def filled(text):
        return re.sub("RUN|FILE|FOLDER|DEVICE", lambda name: str(names[name[0]]), text)

    try:
        code = cli.main([filled(a) for a in arguments])
    except SystemExit as e:
        code = e.code
    told = capsys.readouterr().err.splitlines()[-1]
    assert code == 2 and (says if "show RUN" in says else filled(says)) in told
    assert not (tmp_path / "page.html").exists()
    assert device.is_symlink()


# -------------------------------------------------------------------------------------- in a browser

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
in_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium was found")


def browse(folder, text, state="", *flags):
    """What a browser makes of a page, as HTML, and the CPU seconds of the process that drew it.

    These, for a machine that does other work says nothing by its clock."""
    file, profile = folder / "page.html", folder / "profile"
    file.write_text(text, encoding="utf-8")
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--window-size=1600,1200",
        f"--user-data-dir={profile}",
        "--virtual-time-budget=3000",
        *flags,
    ]
    with (folder / "dumped").open("w+", encoding="utf-8") as dumped:
        process = subprocess.Popen(
            [*command, f"{file.as_uri()}#{state}"], stdout=dumped, stderr=subprocess.DEVNULL
        )
        seconds, began = 0.0, time.monotonic()
        while process.poll() is None:
            if time.monotonic() - began > 300:
                process.kill()
            seconds = max(seconds, seconds_of_renderer(profile))
            time.sleep(0.05)
        dumped.seek(0)
        assert process.returncode == 0
        return dumped.read(), seconds


def seconds_of_renderer(profile):
    """CPU seconds of the processes that draw for the browser with this profile, the most of one."""
    most = 0.0
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (folder / "cmdline").read_text(errors="replace")
            if "--type=renderer" in command and str(profile) in command:
                figures = (folder / "stat").read_text().rpartition(")")[2].split()
                ticks = int(figures[11]) + int(figures[12])  # in the program, in the kernel
                most = max(most, ticks / os.sysconf("SC_CLK_TCK"))
    return most


def text_in(dumped, element="body"):
    """The text of the elements of a name, entities read."""

    class Reader(HTMLParser):
        def __init__(self):
            super().__init__()
            self.texts, self.open = [], []

        def handle_starttag(self, tag, attributes):
            if tag not in ("meta", "input", "br"):
                self.open.append(tag)

        def handle_endtag(self, tag):
            self.open.pop()

        def handle_data(self, data):
            if element in self.open and "script" not in self.open:
                self.texts.append(data)

    reader = Reader()
    reader.feed(dumped)
    return "".join(reader.texts)


@in_browser
def test_a_browser_shows_hostile_text_as_text(tmp_path):
    runs = []
    for number, text in enumerate(HOSTILE):
        runs += hostile_runs(text, HOSTILE[0], 2 * number)
    told = described(runs)
    told["examples"][0]["about"] = [(text, text) for text in HOSTILE]
    dumped, _ = browse(tmp_path, written(told), "find=e", "--dump-dom")
    assert text_in(dumped, "title") == "a title"
    seen = text_in(dumped)
    for text in HOSTILE:
        for part in (text, f"not readable: {text}", f"failed: {text}"):
            assert page.plain(part) in seen, part
    found = Elements(dumped).found
    tags = Counter(tag for tag, _ in found)
    assert tags["script"] == 2 and tags["img"] == tags["textarea"] == 0
    assert not any(name.startswith("on") for _, attributes in found for name, _ in attributes)
    assert f"example {HOSTILE[0]}" in seen


@in_browser
def test_a_browser_shows_a_step_and_finds_texts(tmp_path):
    runs = [
        run(0, [call("ask", 0, "Q\none", "needle one"), call("note", 0, "N", "noted")], 1.0),
        run(1, [call("ask", 0, "Q\ntwo", "other two")], 0.0, status="max_calls", error="too many"),
        run(0, [call("ask", 0, "Q\nelse", "a Needle")], 0.5, "e1"),
    ]
    told = described(runs)
    dumped, _ = browse(tmp_path, written(told), "find=NEEDLE", "--dump-dom")
    seen = text_in(dumped)
    for part in (
        "run 0 reward 1.000, completed",
        "run 1 reward 0.000, max_calls",
        "too many",
        "ask[0]",
        "advantage +0.7070, weight",
        "advantage -0.7070",
        "group of 2, mean reward 0.500",
        "the group has one run",
        "not reached",
        "2 texts",
        "example e1, run 0, call 1: … a Needle",
    ):
        assert part in seen, part
    assert "example e1: 1 runs" in seen and dumped.count('class="up found"') == 1
    assert re.search(
        r'<span title="token 0: log-prob -0.5" style="background-color: [^"]+">n</span>', dumped
    )
    dumped, _ = browse(tmp_path, written(told), "example=1&find=needle", "--dump-dom")
    assert dumped.count('class="nothing found"') == 1


@in_browser
def test_a_browser_colours_tokens_by_their_ratio(tmp_path):
    step = step_of(
        [run(0, [call("ask", 0, "p", "ab")], 1.0), run(1, [call("ask", 0, "p", "cd")], 0.0)]
    )
    first, second = [t.calls[0].completion for t in step.trajectories]
    step.ratios.update({id(first): [1.5, 1.0], id(second): [1.0, 0.5]})
    dumped, _ = browse(
        tmp_path, written(page.Description(step, spelt).whole()), "shading=ratio", "--dump-dom"
    )
    colours = dict(
        re.findall(r'<span title="[^"]*" style="background-color: ([^"]*);">(\w)</span>', dumped)
    )
    colours = {token: colour for colour, token in colours.items()}
    assert "30, 160, 110" in colours["a"] and "220, 70, 70" in colours["d"]


@in_browser
def test_a_browser_opens_a_step_of_64_runs_of_6_calls_in_a_second(tmp_path):
    dumped, seconds = browse(tmp_path, large_page(), "", "--dump-dom")
    assert dumped.count("<td") == 64 * 6 and 0 < seconds < 1
    # tokens become elements where they are in view: else there would be 49,152 of them
    assert 0 < dumped.count("<span title=") < 10_000


@in_browser
def test_a_browser_draws_the_page(tmp_path):
    browse(tmp_path, large_page(runs=4), "", f"--screenshot={tmp_path / 'page.png'}")
    assert (tmp_path / "page.png").stat().st_size > 20_000


def test_a_page_replaces_a_page_and_no_other_file(tmp_path):
    file = tmp_path / "step.html"
    file.write_text("<!DOCTYPE html>")
    page.check_file(str(file))

    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 0}\n')
    with pytest.raises(InputError, match="is there, and no page"):
        page.check_file(str(metrics))
