"""LM programs: signatures, modules and coroutines in; trajectories of LM calls out. No torch in here.

A program is ordinary Python that awaits modules and tools:

    class Research(Program):
        def __init__(self, search):
            self.ask = ChainOfThought("claim, key_facts: list[str] -> query", "Write a search query.")
            self.search = search
        async def forward(self, claim):
            query = (await self.ask(claim=claim, key_facts=[])).query
            return Prediction(found=await tool(self.search, query))

    trajectories = run_programs(Research(search), examples, metric, sampler, rollouts=8)

`await module(...)` suspends the run and hands the driver a request; the driver holds every live run, keeps the sampler
full across modules, examples and rollouts, and resumes a run when its completions are there. The driver, not the
program, writes the trace: a program that catches its own errors still leaves every call recorded.

Map: Signature, the XML adapter (render, parse), Module, Program, records, run_programs (the driver), show.
"""
from __future__ import annotations

import ast
import concurrent.futures
import copy
import inspect
import json
import math
import random
import re
import textwrap
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Protocol
from xml.sax.saxutils import unescape


class PromptError(ValueError):
    """A signature or a file of prompts that cannot be used; the message names the field or the file."""


class DataError(ValueError):
    """A file of examples that cannot be used; the message names the file and the line or field."""


class ProgramError(RuntimeError):
    """A bug in the user's program: the message names the example and the module, the cause carries the traceback."""


class FormatError(ValueError):
    """A completion whose output fields could not be read. `present` are the fields that could."""
    def __init__(self, message: str, present: tuple[str, ...] = (), expected: tuple[str, ...] = ()):
        super().__init__(message)
        self.present, self.expected = present, expected


class LengthError(FormatError):
    """A completion cut by its token limit before its fields were complete, or a prompt that did not fit."""


class ToolError(RuntimeError):
    """A tool that failed after its retries."""


# ---------------------------------------------------------------------------------------------------- signatures

@dataclass(frozen=True)
class Field:
    """One input or output. `type` is str, int, float, bool, list (of str), or a tuple: the closed set of its labels.

    Example: Field("intent", ("card_lost", "pin_blocked"), "what the customer wants")
    """
    name: str
    type: Any = str
    description: str = ""

    @property
    def type_name(self) -> str:
        if isinstance(self.type, tuple):
            return f"Literal[{', '.join(_quote(label) for label in self.type)}]"
        return "list[str]" if self.type is list else self.type.__name__


def _quote(label: str) -> str:
    return f'"{label}"' if "'" in label and '"' not in label else "'" + label.replace("'", "\\'") + "'"


class Signature:
    """Inputs and outputs of an LM call, an instruction, and what each field means.

    Signature("question, passages: list[str] -> answer, sure: bool", "Answer.", {"answer": "a short phrase"})
    Signature("text -> intent", types={"intent": ("card_lost", "pin_blocked")})

    Types are str (default), int, float, bool, list[str] and Literal['a', 'b'] in the text, or a tuple of labels in
    `types`. Raises PromptError naming the field that cannot be read.
    """
    def __init__(self, fields: str, instruction: str = "", descriptions: dict[str, str] | None = None,
                 types: dict[str, tuple[str, ...]] | None = None):
        descriptions, types = descriptions or {}, types or {}
        sides = fields.split("->")
        if len(sides) != 2:
            raise PromptError(f"signature {fields!r}: expected one '->' between inputs and outputs")
        self.inputs, self.outputs = (tuple(Field(a.arg, _type(a, types), descriptions.get(a.arg, ""))
                                           for a in _arguments(side, fields)) for side in sides)
        names = [f.name for f in self.inputs + self.outputs]
        if not self.outputs or len(names) != len(set(names)):
            raise PromptError(f"signature {fields!r}: needs at least one output, and every name once")
        if unknown := (types.keys() | descriptions.keys()) - set(names):
            raise PromptError(f"signature {fields!r}: no field is called {sorted(unknown)[0]!r}")
        both = (", ".join(f"`{f.name}`" for f in side) for side in (self.inputs, self.outputs))
        self.instruction = inspect.cleandoc(instruction) or "Given the fields {}, produce the fields {}.".format(*both)


def _arguments(side: str, fields: str) -> list[ast.arg]:
    """'a, b: list[str]' read by Python's own grammar of arguments."""
    try:
        return ast.parse(f"def _({side}): 0").body[0].args.args
    except SyntaxError:
        raise PromptError(f"signature {fields!r}: cannot read {side.strip()!r}") from None


def _type(arg: ast.arg, types: dict) -> Any:
    kind = types.get(arg.arg) or (ast.unparse(arg.annotation) if arg.annotation else "str")
    if isinstance(kind, str) and (labels := re.fullmatch(r"Literal\[(.+)\]", kind, re.S)):
        kind = ast.literal_eval(f"({labels[1]},)")
    if isinstance(kind, str):
        kind = {"str": str, "int": int, "float": float, "bool": bool, "list[str]": list}.get(kind)
    if kind is None or isinstance(kind, tuple) and not all(isinstance(label, str) for label in kind):
        raise PromptError(f"field {arg.arg!r}: its type is none of str, int, float, bool, list[str] and labels")
    return kind


# --------------------------------------------------------- the XML adapter: fields to chat messages, text to fields

def _value(f: Field, value: Any) -> str:
    """An input or output as text: lists and objects as JSON, a list in an untyped field as numbered quotes."""
    if f.type is str and isinstance(value, (list, tuple)):
        quoted = [f"«{v}»" if not re.search("[\n«»]", str(v)) else "«««\n    " + str(v).replace("\n", "\n    ") + "\n»»»"
                  for v in value]
        return "\n".join(f"[{i}] {v}" for i, v in enumerate(quoted, 1)) if len(quoted) > 1 else "".join(quoted) or "N/A"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (list, tuple, dict)) else str(value)


def _tag(f: Field, value: Any, output: bool = False) -> str:
    escape = lambda s: str(s).replace("&", "&amp;").replace("<", "&lt;")
    if output and f.type is list and isinstance(value, (list, tuple)):
        items = "".join(f"<item>{escape(v)}</item>" for v in value)
        return f"<{f.name}>{items}</{f.name}>" if items else f"<{f.name} />"
    text = _value(f, value)
    return f"<{f.name}>\n{escape(text) if output and f.type is str else text}\n</{f.name}>"


def _placeholder(f: Field) -> str:
    if f.type is list:
        return f"<{f.name}><item>...</item></{f.name}>"
    note = {str: "", bool: "must be True or False", int: "must be a single int value",
            float: "must be a single float value"}.get(f.type)
    if note is None:
        note = f"must exactly match (no extra characters) one of: {'; '.join(f.type)}"
    return _tag(f, f"{{{f.name}}}" + (f"        # note: the value you produce {note}" if note else ""))


def render_outputs(signature: Signature, values: dict) -> str:
    """The completion that has these output fields; `parse` reads them back."""
    missing = "Not supplied for this particular example. "
    return "\n\n".join(_tag(f, values.get(f.name, missing), output=True) for f in signature.outputs)


def render(signature: Signature, inputs: dict, instruction: str | None = None, demos: list[dict] = ()) -> list[dict]:
    """A call as chat messages: byte for byte what DSPy 3.4's XMLAdapter makes of the same signature, inputs and demos.

    Demos become pairs of user and assistant messages, those that lack fields first and marked as such.
    """
    listing = lambda fields: "\n".join(f"{i}. `{f.name}` ({f.type_name}): {f.description}"
                                       for i, f in enumerate(fields, 1)).strip()
    structure = ["\n\n".join(_tag(f, f"{{{f.name}}}") for f in signature.inputs),
                 "\n\n".join(_placeholder(f) for f in signature.outputs)]
    lines = textwrap.dedent(signature.instruction if instruction is None else instruction).splitlines()
    system = (f"Your input fields are:\n{listing(signature.inputs)}\nYour output fields are:\n{listing(signature.outputs)}\n"
              + "\n\n".join(["All interactions will be structured in the following way, with the appropriate values "
                             "filled in.", *structure])
              + "\nIn adhering to this structure, your objective is: " + ("\n" + " " * 8).join(["", *lines]))

    def user(values: dict, prefix: str = "", suffix: str = "") -> dict:
        fields = "\n\n".join(_tag(f, values[f.name]) for f in signature.inputs if f.name in values)
        return {"role": "user", "content": "\n\n".join((prefix, fields, suffix)).strip()}

    def assistant(values: dict) -> dict:
        return {"role": "assistant", "content": render_outputs(signature, values)}

    both = [f.name for f in signature.inputs + signature.outputs]
    whole = [d for d in demos if all(d.get(n) is not None for n in both)]
    partial = [d for d in demos if d not in whole and any(f.name in d for f in signature.inputs)
               and any(f.name in d for f in signature.outputs)]
    messages = [{"role": "system", "content": system}]
    for d in partial:
        messages += [user(d, "This is an example of the task, though some input or output fields are not supplied."),
                     assistant(d)]
    for d in whole:
        messages += [user(d), assistant(d)]
    nested = " ".join(_placeholder(f) for f in signature.outputs if f.type is list)
    request = ("Respond with the corresponding output fields wrapped in XML tags "
               + ", then ".join(f"`<{f.name}>`" for f in signature.outputs) + "."
               + (f" Use this nested XML structure: {nested}" if nested else ""))
    return messages + [user(inputs, suffix=request)]


def _read(f: Field, text: str) -> Any:
    """The value of an output field. Raises ValueError or KeyError where the text is no such value."""
    plain = unescape(text.strip(), {"&quot;": '"', "&apos;": "'"})
    if f.type is list:
        items = re.findall(r"<item>(.*?)</item>", text, re.S)
        value = [_read(Field("item"), i) for i in items] if items else json.loads(plain or "[]")
        if not (isinstance(value, list) and all(isinstance(v, str) for v in value)):
            raise ValueError("not a list of strings")
        return value
    if isinstance(f.type, tuple):
        quoted = plain not in f.type and len(plain) > 1 and plain[0] == plain[-1] and plain[0] in "'\""
        return f.type[f.type.index(plain[1:-1] if quoted else plain)]
    if f.type is bool:
        return {"true": True, "false": False}[plain.lower()]
    value = f.type(plain)
    if f.type is float and not math.isfinite(value):
        raise ValueError("not finite")
    return value


def parse(signature: Signature, text: str) -> dict:
    """A completion -> its output fields, the first of each name. Raises FormatError with the fields that were there.

    Tags are read one after another, so that text around them, `&` and `<` in a value, and tags inside one do no harm.
    """
    names = tuple(f.name for f in signature.outputs)
    tag, at, found = re.compile(f"<({'|'.join(names)})( ?/)?>"), 0, {}
    while m := tag.search(text, at):
        end = m.end() if m[2] else text.find(f"</{m[1]}>", m.end())
        at = max(m.end(), end)
        if end >= 0:
            found.setdefault(m[1], text[m.end():end])
    values, wrong = {}, []
    for f in signature.outputs:
        try:
            values[f.name] = _read(f, found[f.name])
        except (KeyError, ValueError):
            wrong.append(f"{f.name} is no {f.type_name}: {found[f.name].strip()[:60]!r}" if f.name in found else
                         f"{f.name} is missing")
    if wrong:
        raise FormatError("; ".join(wrong), tuple(values), names)
    return values


# ------------------------------------------------------------------------------------------ modules and programs

class Prediction(dict):
    """Named values, read as attributes: what a module call or a whole program returns."""
    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no field {name!r} (there are {', '.join(self) or 'none'})") from None


class _Await:
    """Anything a program may await: it hands itself to the driver, which answers with the value."""
    def __await__(self):
        return (yield self)


@dataclass
class Request(_Await):
    """One LM call that a program asks for."""
    module: "Module"
    inputs: dict


class tool(_Await):
    """`await tool(fn, *args)` runs fn in a thread while decoding goes on; raises ToolError after `retries` more tries."""
    def __init__(self, fn: Callable, *args, retries: int = 0):
        self.fn, self.args, self.retries = fn, args, retries


class gather(_Await):
    """`a, b = await gather(self.ask(...), tool(...))` awaits several calls together; the first failure is raised."""
    def __init__(self, *parts: Request | tool):
        if bad := [p for p in parts if not isinstance(p, (Request, tool))]:
            raise TypeError(f"gather takes module calls and tools, not {type(bad[0]).__name__}")
        self.parts = parts


class Module:
    """An LM call with its own prompt: a signature, an instruction and demos, the last two free to be optimised.

    Example: ask = Module("question -> answer", "Answer in one word."); answer = (await ask(question="…")).answer
    """
    def __init__(self, signature: str | Signature, instruction: str = "", descriptions: dict[str, str] | None = None,
                 types: dict[str, tuple[str, ...]] | None = None):
        if isinstance(signature, str):
            signature = Signature(signature, instruction, descriptions, types)
        self.signature, self.instruction, self.demos = signature, instruction or signature.instruction, []

    def __call__(self, **inputs) -> Request:
        if odd := {f.name for f in self.signature.inputs} ^ inputs.keys():
            raise TypeError(f"input {sorted(odd)[0]!r} is {'unknown' if sorted(odd)[0] in inputs else 'missing'}")
        return Request(self, inputs)

    def messages(self, inputs: dict) -> list[dict]:
        return render(self.signature, inputs, self.instruction, self.demos)


class ChainOfThought(Module):
    """A module whose first output is its `reasoning`; the other arguments are Module's."""
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.signature = copy.copy(self.signature)
        self.signature.outputs = (Field("reasoning"), *self.signature.outputs)


class Program:
    """Subclass it: modules are attributes, `async def forward(self, …)` is the control flow.

    One program object serves all runs at once, so a run keeps its state in local variables. forward is called with
    those entries of the example that it has parameters for.
    """
    async def forward(self, **inputs) -> Prediction:
        raise NotImplementedError

    def __call__(self, *args, **kwargs):
        return self.forward(*args, **kwargs)

    def modules(self) -> dict[str, Module]:
        """Attribute path -> module, nested programs, lists and dicts included. The path is the module's identity."""
        found = {}
        def visit(value, path):
            if isinstance(value, Module):
                if value not in found.values():
                    found[path] = value
            elif isinstance(value, (Program, dict, list, tuple)):
                items = (vars(value).items() if isinstance(value, Program) else
                         value.items() if isinstance(value, dict) else enumerate(value))
                for key, item in items:
                    visit(item, f"{path}.{key}" if path else str(key))
        visit(self, "")
        return found

    def save(self, path: str | Path) -> None:
        """Write every module's instruction and demos as JSON."""
        prompts = {name: {"instruction": m.instruction, "demos": m.demos} for name, m in self.modules().items()}
        Path(path).write_text(json.dumps(prompts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def load(self, path: str | Path) -> None:
        """Read what `save` wrote. Raises PromptError naming file and module, before anything is changed."""
        try:
            prompts = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as e:
            raise PromptError(f"{path}: cannot be read as JSON ({e})") from None
        modules = self.modules()
        if not isinstance(prompts, dict) or prompts.keys() != modules.keys():
            raise PromptError(f"{path}: expected an object with the modules {', '.join(modules)}")
        for name, prompt in prompts.items():
            if not (isinstance(prompt, dict) and isinstance(prompt.get("instruction"), str) and
                    isinstance(prompt.get("demos"), list) and all(isinstance(d, dict) for d in prompt["demos"])):
                raise PromptError(f"{path}: {name}: expected an instruction (text) and demos (a list of objects)")
        for name, prompt in prompts.items():
            modules[name].instruction, modules[name].demos = prompt["instruction"], prompt["demos"]


# ------------------------------------------------------------------------------------------------------- records

@dataclass(frozen=True)
class Completion:
    """What the LM was given and what it sampled, untouched until the loss.

    Example: Completion(prompt_ids=[1, 20, 21], token_ids=[30, 2], logprobs=[-0.7, -0.1], finish_reason="stop", text="Yes")
    """
    prompt_ids: list[int]
    token_ids: list[int]        # [T] the sampled end token included
    logprobs: list[float]       # [T] under the distribution sampled
    finish_reason: str          # "stop": an end token was sampled; "length": the limit came first, or nothing fitted
    text: str = ""


@dataclass(frozen=True)
class Call:
    """One LM call. Example: Call("ask", 0, {"question": "…"}, Completion(…), {"answer": "Yes"})"""
    module: str                 # attribute path in the program
    invocation: int             # the how-manieth call of this module in its run, from 0
    inputs: dict = field(default_factory=dict)
    completion: Completion | None = None
    outputs: dict | None = None
    error: str = ""             # why the completion could not be read


STATUSES = ("completed", "format_error", "length", "max_calls", "tool_error")


@dataclass(frozen=True)
class Trajectory:
    """One run of the program on one example. Example: Trajectory(3, 0, (Call(…), Call(…)), {"found": […]}, 0.5, "completed")"""
    example: int | str          # which example of the batch: two draws of the same one are two
    rollout: int
    calls: tuple[Call, ...]     # in the order they were asked for
    prediction: dict | None
    reward: float | None        # None: excluded
    status: str                 # one of STATUSES
    error: str = ""

    @property
    def votes(self) -> bool:
        """Whether it takes part in its groups. A failed tool says nothing about the LM, nor does a reward of NaN."""
        return self.status != "tool_error" and self.reward is not None and math.isfinite(self.reward)


class SamplerLike(Protocol):
    """What the driver needs of a sampler."""
    def submit(self, messages: list[dict], key: tuple) -> int:
        """Take a prompt; `key` seeds its randomness. Returns a ticket."""
    def advance(self) -> list[tuple[int, Completion]]:
        """Decode a little; return what was finished."""


@dataclass
class Task:
    """What is trained: a program, the metric of its runs, and examples as dicts that its forward and metric read.

    `metric(example, prediction)` gives the reward of a completed run; `defaults` are values for fields of the
    trainer's Config, used where the command line says nothing.
    """
    program: Program
    metric: Callable[[dict, Any], float]
    train: list[dict]
    dev: list[dict]
    test: list[dict]
    defaults: dict = field(default_factory=dict)


# -------------------------------------------------------------------------------------------------------- driver

def run_programs(program: Program, examples: list[dict], metric: Callable[[dict, Any], float], sampler: SamplerLike, *,
                 rollouts: int = 1, seed: int = 0, step: int = 0, max_calls: int = 32, failure_score: float = 0.0,
                 format_failure_score: float = -1.0, interrupt: float = 0.0) -> list[Trajectory]:
    """Run the program `rollouts` times on each example; trajectories come back ordered by (example, rollout).

    How a run ends, and its reward: `completed` (metric(example, prediction)); `format_error` (from
    format_failure_score to failure_score by the share of fields that could be read); `length` (format_failure_score);
    `max_calls` (failure_score); `tool_error` (none: a tool failed, or the metric raised or gave NaN).
    `interrupt` is a fault put in on purpose: that share of the runs is cut short at a random call.
    Every request is keyed by (seed, step, example, rollout, module, invocation), so nothing depends on scheduling.
    Raises ProgramError where the program itself is wrong.
    """
    driver = _Driver(program, examples, metric, sampler, seed, step, failure_score, format_failure_score)
    for e in range(len(examples)):
        for r in range(rollouts):
            cut = random.Random(repr(("interrupt", seed, step, e, r)))
            driver.start(e, r, cut.randrange(1, max_calls) if cut.random() < interrupt else max_calls)
    return driver.run()


@dataclass
class _Run:
    """A live run: its coroutine, its trace, and the answers to what it awaits."""
    example: int
    rollout: int
    coroutine: Any
    limit: int                                      # LM calls allowed
    calls: list[Call] = field(default_factory=list)
    awaits: _Await | None = None
    answers: list = field(default_factory=list)     # value or exception of each part of `awaits`
    open: int = 0                                   # parts not answered yet


class _Driver:
    """Runs are ready (their await is answered), or wait for the sampler (`tickets`) or for tools (`futures`)."""

    def __init__(self, program, examples, metric, sampler, seed, step, failure_score, format_failure_score):
        self.program, self.examples, self.metric, self.sampler = program, examples, metric, sampler
        self.seed, self.step = seed, step
        self.failure_score, self.format_failure_score = failure_score, format_failure_score
        self.title = type(program).__name__
        self.names = {id(m): name for name, m in program.modules().items()}
        if not self.names:
            raise ProgramError(f"{self.title} has no modules: nothing calls the LM")
        self.parameters = inspect.signature(program.forward).parameters
        self.ready: deque[_Run] = deque()
        self.tickets: dict[int, tuple[_Run, int, Module, int]] = {}     # -> run, part of its await, module, place in trace
        self.futures: dict[concurrent.futures.Future, tuple[_Run, int, tool, int]] = {}     # … tool, retries left
        self.done: dict[tuple[int, int], Trajectory] = {}
        self.pool = concurrent.futures.ThreadPoolExecutor()

    def run(self) -> list[Trajectory]:
        while self.ready or self.tickets or self.futures:
            while self.ready:
                self.resume(self.ready.popleft())
            for ticket, completion in self.sampler.advance() if self.tickets else ():
                self.completed(ticket, completion)
            if self.futures:                        # wait for tools only when there is nothing else to do
                patience = 0 if self.tickets or self.ready else None
                for f in concurrent.futures.wait(self.futures, patience, concurrent.futures.FIRST_COMPLETED).done:
                    self.tool_done(f)
        self.pool.shutdown()
        return [self.done[key] for key in sorted(self.done)]

    def start(self, example: int, rollout: int, limit: int):
        values, inputs = self.examples[example], {}
        for name, p in self.parameters.items():
            if name in values:
                inputs[name] = values[name]
            elif p.default is p.empty:
                raise ProgramError(f"example {example} has no {name!r}, which {self.title}.forward asks for")
        self.ready.append(_Run(example, rollout, self.program.forward(**inputs), limit))

    def resume(self, run: _Run):
        """Answer the run's await, and start what it awaits next."""
        failed = next((a for a in run.answers if isinstance(a, Exception)), None)
        value = run.answers if isinstance(run.awaits, gather) else run.answers[0] if run.answers else None
        try:
            run.awaits = run.coroutine.throw(failed) if failed else run.coroutine.send(value)
        except StopIteration as stop:
            return self.score(run, stop.value)
        except LengthError as e:
            return self.finish(run, "length", self.format_failure_score, str(e))
        except FormatError as e:
            share = len(e.present) / max(len(e.expected), 1)
            reward = self.format_failure_score + (self.failure_score - self.format_failure_score) * share
            return self.finish(run, "format_error", reward, str(e))
        except ToolError as e:
            return self.finish(run, "tool_error", None, str(e))
        except Exception as e:
            raise ProgramError(f"{self.title}.forward failed on {self.where(run)}: {type(e).__name__}: {e}") from e
        parts = run.awaits.parts if isinstance(run.awaits, gather) else (run.awaits,)
        if len(run.calls) + sum(isinstance(p, Request) for p in parts) > run.limit:
            return self.finish(run, "max_calls", self.failure_score, f"more than {run.limit} LM calls")
        run.answers, run.open = [None] * len(parts), len(parts)
        for i, part in enumerate(parts):
            self.begin(run, i, part)
        if not parts:
            self.ready.append(run)

    def where(self, run: _Run) -> str:
        last = f"after {run.calls[-1].module}" if run.calls else "before any LM call"
        return f"example {run.example}, rollout {run.rollout}, {last}"

    def begin(self, run: _Run, i: int, part):
        if isinstance(part, tool):
            self.futures[self.pool.submit(part.fn, *part.args)] = (run, i, part, part.retries)
        elif isinstance(part, Request) and id(part.module) in self.names:
            name = self.names[id(part.module)]
            call = Call(name, sum(c.module == name for c in run.calls), part.inputs)
            key = (self.seed, self.step, run.example, run.rollout, name, call.invocation)
            ticket = self.sampler.submit(part.module.messages(part.inputs), key)
            self.tickets[ticket] = (run, i, part.module, len(run.calls))
            run.calls.append(call)
        else:
            raise ProgramError(f"{self.title}.forward awaited {part!r} on {self.where(run)}: neither a tool, nor one of "
                               f"its modules ({', '.join(self.names.values())})")

    def completed(self, ticket: int, completion: Completion):
        run, i, module, at = self.tickets.pop(ticket)
        call, outputs, error = run.calls[at], None, None
        try:
            outputs = Prediction(parse(module.signature, completion.text))
        except FormatError as e:
            kind = LengthError if completion.finish_reason == "length" else FormatError
            error = kind(f"{call.module}: {e}", e.present, e.expected)
        run.calls[at] = Call(call.module, call.invocation, call.inputs, completion, outputs, str(error or ""))
        self.answer(run, i, error or outputs)

    def tool_done(self, future: concurrent.futures.Future):
        run, i, part, retries = self.futures.pop(future)
        error = future.exception()
        if error is not None and retries:
            self.futures[self.pool.submit(part.fn, *part.args)] = (run, i, part, retries - 1)
        elif error is not None:
            self.answer(run, i, ToolError(f"{getattr(part.fn, '__name__', part.fn)}: {type(error).__name__}: {error}"))
        else:
            self.answer(run, i, future.result())

    def answer(self, run: _Run, i: int, value):
        run.answers[i], run.open = value, run.open - 1
        if not run.open:
            self.ready.append(run)

    def score(self, run: _Run, prediction):
        try:
            reward = float(self.metric(self.examples[run.example], prediction))
            error = "" if math.isfinite(reward) else f"the metric gave {reward}"
        except Exception as e:
            error = f"the metric raised {type(e).__name__}: {e}"
        self.finish(run, *(("tool_error", None, error) if error else ("completed", reward, "")), prediction)

    def finish(self, run: _Run, status: str, reward: float | None, error: str, prediction=None):
        run.coroutine.close()
        self.done[run.example, run.rollout] = Trajectory(run.example, run.rollout, tuple(run.calls), prediction, reward,
                                                         status, error)


# ---------------------------------------------------------------------------------------------------------- show

def statuses(trajectories: list[Trajectory]) -> dict[str, int]:
    """How many runs ended in each way."""
    counts = Counter(t.status for t in trajectories)
    return {s: counts[s] for s in STATUSES}


def show(trajectory: Trajectory, width: int = 100) -> str:
    """A readable trace of one run: each call's inputs, outputs and lengths, then how the run ended."""
    lines = []
    def entry(mark: str, name: str, value: Any):
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        lines.extend(textwrap.wrap(f"{name}: {' '.join(text.split())}", width, initial_indent=f"    {mark} ",
                                   subsequent_indent=" " * 8))
    for i, call in enumerate(trajectory.calls, 1):
        c = call.completion
        lines.append(f"{i}. {call.module} [{call.invocation}]" +
                     (f"   {len(c.prompt_ids)} prompt + {len(c.token_ids)} sampled tokens, {c.finish_reason}" if c else ""))
        for name, value in call.inputs.items():
            entry("<", name, value)
        for name, value in (call.outputs or {"not readable": f"{call.error}; sampled: {c.text if c else ''!r}"}).items():
            entry(">", name, value)
    if isinstance(trajectory.prediction, dict):
        for name, value in trajectory.prediction.items():
            entry("=", name, value)
    reward = "no reward" if trajectory.reward is None else f"reward {trajectory.reward:.3f}"
    return "\n".join(lines + [f"{trajectory.status}, {reward}" + (f" ({trajectory.error})" if trajectory.error else "")])
