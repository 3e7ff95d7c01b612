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

`await module(...)` suspends the run (an asyncio task) and hands the sampler a prompt. All runs are live at once and keep
the sampler full; each is resumed when its completion is there. The trace is written here, not by the program: one that
catches its own errors still leaves every call recorded.
"""
from __future__ import annotations

import ast
import asyncio
import contextlib
import contextvars
import copy
import inspect
import json
import logging
import math
import random
import re
import textwrap
import threading
from concurrent.futures import CancelledError, Future, InvalidStateError, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, Callable
from xml.sax.saxutils import unescape

log = logging.getLogger("mmgrpo")       # failures of tools and metrics, a line each, as they happen


class InputError(ValueError):
    """Something given from outside that cannot be used: a signature, an option, a file. The message names it."""

class ProgramError(RuntimeError):
    """A bug in the user's program. The message names the example and the last call; the cause has the traceback."""

class ToolError(RuntimeError):
    """A tool that failed after its retries, a metric whose judge failed, or one that gave NaN."""

class FormatError(ValueError):
    """A completion whose output fields could not all be read. `present` are those that could."""
    def __init__(self, message: str, present: tuple[str, ...] = (), expected: tuple[str, ...] = ()):
        super().__init__(message)
        self.present, self.expected = present, expected

class LengthError(FormatError):
    """A completion cut by its token limit before its fields were complete, or a prompt that did not fit."""

class LMError(FormatError):
    """The LM's own mistake, found by a tool, the program or the metric: it asked for what is not there.

    The run ends as `format_error` and votes, with the failure score, since all fields could be read.
    Example: raise LMError(f"no city is called {name!r}")
    """

# Raised by a metric, these are bugs of the program and stop the run; what else it raises, a judge
# that does not answer or a division by zero, excludes the run.
BUGS = (TypeError, AttributeError, LookupError, NameError, AssertionError, ImportError)


# ---------------------------------------------------------------------------------------------------- signatures
@dataclass(frozen=True)
class Field:
    """One input or output. `type` is str, int, float, bool, list (of str), or a tuple: the closed set of its labels.
    Example: Field("intent", ("card_lost", "pin_blocked"), "what the customer wants")"""
    name: str
    type: Any = str
    description: str = ""

    @property
    def type_name(self) -> str:
        quote = lambda s: f'"{s}"' if "'" in s and '"' not in s else "'" + s.replace("'", "\\'") + "'"
        labels = ", ".join(map(quote, self.type)) if isinstance(self.type, tuple) else ""
        return f"Literal[{labels}]" if labels else "list[str]" if self.type is list else self.type.__name__


class Signature:
    """Inputs and outputs of an LM call, an instruction, and what each field means.
    Signature("question, passages: list[str] -> answer, sure: bool", "Answer.", {"answer": "a short phrase"})
    Signature("text -> intent", types={"intent": ("card_lost", "pin_blocked")})

    Types are str (default), int, float, bool, list[str] and Literal['a', 'b'], or a tuple of labels in `types`. Raises
    InputError naming the field that cannot be read."""
    def __init__(self, fields: str, instruction: str = "", descriptions: dict[str, str] | None = None,
                 types: dict[str, tuple[str, ...]] | None = None):
        descriptions, types = descriptions or {}, types or {}
        if fields.count("->") != 1:
            raise InputError(f"signature {fields!r}: expected inputs and outputs on both sides of one "
                             "->, as in 'text -> intent'")
        try:                                        # each side is read by Python's own grammar of arguments
            sides = [ast.parse(f"def _({side}): 0").body[0].args for side in fields.split("->")]
            if any(a.vararg or a.kwarg or a.kwonlyargs or a.posonlyargs or a.defaults for a in sides):
                raise ValueError("only names and types are known here")
            self.inputs, self.outputs = (tuple(Field(a.arg, _type(a, types), descriptions.get(a.arg, "")) for a in side.args)
                                         for side in sides)
        except (SyntaxError, ValueError) as e:
            raise InputError(f"signature {fields!r}: expected names, with types or without and commas "
                             "between, on both sides of one ->, as in 'text, kind: int -> intent' "
                             f"({getattr(e, 'msg', e)})") from None
        names = [f.name for f in self.inputs + self.outputs]
        if not self.outputs or len(names) != len(set(names)):
            raise InputError(f"signature {fields!r}: needs at least one output, and every name once")
        if unknown := (types.keys() | descriptions.keys()) - set(names):
            raise InputError(f"signature {fields!r}: no field is called {min(unknown)!r}")
        both = (", ".join(f"`{f.name}`" for f in side) for side in (self.inputs, self.outputs))
        self.instruction = inspect.cleandoc(instruction) or "Given the fields {}, produce the fields {}.".format(*both)


def _type(arg: ast.arg, types: dict) -> Any:
    kind = types.get(arg.arg) or (ast.unparse(arg.annotation) if arg.annotation else "str")
    if isinstance(kind, str) and (labels := re.fullmatch(r"Literal\[(.+)\]", kind, re.S)):
        kind = ast.literal_eval(f"({labels[1]},)")
    if isinstance(kind, str):
        kind = {"str": str, "int": int, "float": float, "bool": bool, "list[str]": list}.get(kind)
    if kind not in (str, int, float, bool, list) and not (isinstance(kind, tuple) and all(isinstance(x, str) for x in kind)):
        raise ValueError(f"the type of {arg.arg!r} is none of str, int, float, bool, list[str] and labels")
    return kind


# --------------------------------------------------------- the XML adapter: fields to chat messages, text to fields
def _tag(f: Field, value: Any, output: bool = False) -> str:
    """A field with its value: lists and objects as JSON, a list in an untyped field as numbered quotes."""
    escape = lambda s: str(s).replace("&", "&amp;").replace("<", "&lt;")
    quote = lambda s: f"«{s}»" if not re.search("[\n«»]", s) else "«««\n    " + s.replace("\n", "\n    ") + "\n»»»"
    if f.type is list and output and isinstance(value, (list, tuple)):
        items = "".join(f"<item>{escape(v)}</item>" for v in value)
        return f"<{f.name}>{items}</{f.name}>" if items else f"<{f.name} />"
    if f.type is str and isinstance(value, (list, tuple)):
        quotes = [quote(str(v)) for v in value] or ["N/A"]
        text = quotes[0] if len(quotes) == 1 else "\n".join(f"[{i}] {q}" for i, q in enumerate(quotes, 1))
    else:
        text = json.dumps(value, ensure_ascii=False) if isinstance(value, (list, tuple, dict)) else str(value)
    return f"<{f.name}>\n{escape(text) if output and f.type is str else text}\n</{f.name}>"


def _placeholder(f: Field) -> str:
    if f.type is list:
        return f"<{f.name}><item>...</item></{f.name}>"
    must = {str: "", bool: "be True or False", int: "be a single int value", float: "be a single float value"}
    must = must[f.type] if f.type in must else f"exactly match (no extra characters) one of: {'; '.join(f.type)}"
    return _tag(f, f"{{{f.name}}}" + (f"        # note: the value you produce must {must}" if must else ""))


def render_outputs(signature: Signature, values: dict, missing: str = "Not supplied for this particular example. ") -> str:
    """The completion that has these output fields; `parse` reads them back."""
    return "\n\n".join(_tag(f, values.get(f.name, missing), output=True) for f in signature.outputs)


def render(signature: Signature, inputs: dict, instruction: str | None = None, demos: list[dict] = ()) -> list[dict]:
    """A call as chat messages: byte for byte what DSPy 3.4's XMLAdapter makes of the same signature, inputs and demos.
    Demos become pairs of user and assistant messages, those that lack fields first and marked as such."""
    def message(role: str, *parts: str) -> dict:
        return {"role": role, "content": "\n\n".join(parts).strip()}
    listing = lambda fields: "\n".join(f"{i}. `{f.name}` ({f.type_name}): {f.description}"
                                       for i, f in enumerate(fields, 1)).strip()
    given = lambda values: "\n\n".join(_tag(f, values[f.name]) for f in signature.inputs if f.name in values)
    lines = textwrap.dedent(signature.instruction if instruction is None else instruction).splitlines()
    system = "\n\n".join((
        f"Your input fields are:\n{listing(signature.inputs)}\nYour output fields are:\n{listing(signature.outputs)}\n"
        "All interactions will be structured in the following way, with the appropriate values filled in.",
        "\n\n".join(_tag(f, f"{{{f.name}}}") for f in signature.inputs),
        "\n\n".join(_placeholder(f) for f in signature.outputs)
        + "\nIn adhering to this structure, your objective is: " + ("\n" + " " * 8).join(["", *lines])))
    nested = " ".join(_placeholder(f) for f in signature.outputs if f.type is list)
    request = (f"Respond with the corresponding output fields wrapped in XML tags "
               f"{', then '.join(f'`<{f.name}>`' for f in signature.outputs)}."
               + f" Use this nested XML structure: {nested}" * bool(nested))
    partial, whole = [], []
    for d in demos:
        pair = [message("user", given(d)), {"role": "assistant", "content": render_outputs(signature, d)}]
        if all(d.get(f.name) is not None for f in signature.inputs + signature.outputs):
            whole += pair
        elif all(any(f.name in d for f in side) for side in (signature.inputs, signature.outputs)):
            pair[0] = message("user", "This is an example of the task, though some input or output fields are not "
                                      "supplied.", given(d))
            partial += pair
    return [{"role": "system", "content": system}, *partial, *whole, message("user", given(inputs), request)]


AROUND = " \t\r\n'\"`“”‘’«»()[]{}*"     # what may stand around a label
AFTER = ".,;:!?"                        # and what after it


def _label(labels: tuple[str, ...], text: str) -> str:
    """The label that a text names. Raises ValueError where it names none, or more than one.

    Read in turn, and taken where it fits exactly one label:
        as it stands                                                            card_lost
        without the quotes, Literal[…] or str[…] around it, as DSPy reads it    "card_lost"
        without quotes, brackets, blanks and stars around it, or punctuation    **card_lost**.
            after it; those of the label are left out too                       lost (for `lost?`)
        in another case, with these marks and without                           Card_Lost
    Nothing else is read: no part of a label, no other spelling, no blank for an underscore, no sign or
    symbol left out (`-1`, `C#`). Between labels that differ only in case or marks nothing is guessed.
    """
    inner = re.fullmatch(r"(?:Literal|str)\[(.*)\]", text, re.S)
    inner = inner[1] if inner else text
    if len(inner) > 1 and inner[0] == inner[-1] and inner[0] in "'\"":
        inner = inner[1:-1]
    bare = lambda s: s.rstrip(AROUND + AFTER).lstrip(AROUND)
    folded = lambda s: bare(s).casefold()
    readings = [(text, str), (inner, str)]
    if bare(inner):                                     # marks alone name nothing
        readings += [(bare(inner), bare), (inner.casefold(), str.casefold), (folded(inner), folded)]
    for wanted, form in readings:
        fitting = [label for label in dict.fromkeys(labels) if form(label) == wanted]
        if len(fitting) == 1:
            return fitting[0]
    raise ValueError("none of the labels, or several")


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
        return _label(f.type, plain)
    if f.type is bool:
        return {"true": True, "false": False}[plain.lower()]
    value = f.type(plain)
    if f.type is float and not math.isfinite(value):
        raise ValueError("not finite")
    return value


def parse(signature: Signature, text: str) -> dict:
    """A completion -> its output fields, the first of each name. Raises FormatError with the fields that were there.
    Tags are read one after another, so that text around them, `&` and `<` in a value, and tags inside one do no harm."""
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
        except (KeyError, ValueError, RecursionError):
            kind = f"label of the {len(f.type)}" if isinstance(f.type, tuple) else f.type_name
            wrong.append(f"{f.name} is no {kind}: {found[f.name].strip()[:60]!r}" if f.name in found else
                         f"{f.name} is missing")
    if wrong:
        raise FormatError("; ".join(wrong), tuple(values), names)
    return values


# ------------------------------------------------------------------------------------------ modules and programs
class Prediction(dict):
    """Named values, read as attributes (those named like a method of dict as p["items"]): what calls and programs return."""
    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(f"no field {name!r} (there are {', '.join(self) or 'none'})")


current_run: contextvars.ContextVar = contextvars.ContextVar("the run whose `ask` answers module calls")


def _run_at_hand() -> _Run:
    if run := current_run.get(None):
        return run
    raise ProgramError("modules and tools are awaited in a run of a program; runs are made by "
                       "run_programs(program, examples, metric, sampler)")


class Module:
    """An LM call with its own prompt: a signature, an instruction and demos, the last two free to be optimised.
    Example: ask = Module("question -> answer", "Answer in one word."); answer = (await ask(question="…")).answer"""
    def __init__(self, signature: str | Signature, instruction: str = "", descriptions: dict[str, str] | None = None,
                 types: dict[str, tuple[str, ...]] | None = None):
        if isinstance(signature, str):
            signature = Signature(signature, instruction, descriptions, types)
        self.signature, self.instruction, self.demos = signature, inspect.cleandoc(instruction) or signature.instruction, []

    async def __call__(self, **inputs) -> Prediction:
        """The output fields. Raises FormatError where they cannot be read."""
        # shielded: given up by the program, the call still is recorded
        return await asyncio.shield(_run_at_hand().ask(self, inputs))

    def messages(self, inputs: dict) -> list[dict]:
        if odd := {f.name for f in self.signature.inputs} ^ inputs.keys():
            raise TypeError(f"input {min(odd)!r} is {'unknown' if min(odd) in inputs else 'missing'}")
        return render(self.signature, inputs, self.instruction, self.demos)


class ChainOfThought(Module):
    """A module whose first output is its `reasoning`; the arguments are Module's."""
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.signature = copy.copy(self.signature)
        self.signature.outputs = (Field("reasoning"), *self.signature.outputs)


async def tool(fn: Callable, *args, retries: int = 0, timeout: float = 600.0) -> Any:
    """Run fn in a thread while decoding goes on, and put it down in the run's trace.

    Raises ToolError where it still fails, or takes more than `timeout` seconds, after `retries` more
    tries. That excludes the run, for it says nothing about the LM. A mistake of the LM's own, such as
    a name that it invented, a tool tells in one of two ways: it returns a value that says so, and the
    program goes on; or it raises LMError, which is not tried again and ends the run at the LM's cost.
    A run that uses tools more than 100 times its limit of LM calls ends as if it had reached that.
    """
    run = _run_at_hand()
    name = getattr(fn, "__name__", type(fn).__name__)
    note = run.use_tool(name, args)
    for left in range(retries, -1, -1):
        done = Future()
        def work(done=done):
            with contextlib.suppress(InvalidStateError):    # too late: nobody waits any more
                try:
                    done.set_result(fn(*args))
                except (StopIteration, CancelledError) as e:    # which mean something else to asyncio
                    done.set_exception(_renamed(e))
                except Exception as e:
                    done.set_exception(e)
                except BaseException as e:      # SystemExit ends the tool, not the training
                    done.set_exception(_renamed(e))
        threading.Thread(target=work, daemon=True).start()  # one that hangs does not keep the process from ending
        try:
            result = await asyncio.wait_for(asyncio.wrap_future(done), timeout)
        except Exception as e:
            late = done.cancelled()                         # given up, which no failure of its own does
            error = f"{type(e).__name__}: {f'no answer in {timeout:g} s' if late else e}"
            note(error=error)
            if isinstance(e, LMError):
                raise
            if not left:
                failed = ToolError(f"{name}: {error}")
                failed.__cause__ = e
                run.tell(failed)
                raise failed
        else:
            note(result=_copied(result), error="")
            return result


def _renamed(failure: BaseException) -> RuntimeError:
    renamed = RuntimeError(f"{type(failure).__name__}: {failure}")
    renamed.__cause__ = failure
    return renamed


def _copied(value: Any) -> Any:
    """For the trace, so that what is done to it later changes nothing; as text where it has no copy."""
    try:
        return copy.deepcopy(value)
    except Exception:
        return repr(value)


async def gather(*parts) -> list:
    """`a, b = await gather(self.ask(…), tool(…))`: several calls together. All end before the first failure is raised."""
    results = await asyncio.gather(*parts, return_exceptions=True)
    for failed in (r for r in results if isinstance(r, BaseException)):
        raise failed
    return results


class Program:
    """Subclass it: modules are attributes, `async def forward(self, …)` is the control flow, called with those entries of
    the example that it has parameters for. One object serves all runs at once: a run keeps its state in local variables."""
    def __call__(self, *args, **kwargs):
        return self.forward(*args, **kwargs)

    def modules(self) -> dict[str, Module]:
        """Attribute path -> module, nested programs, lists and dicts included. The path is the module's identity."""
        found = {}
        def visit(value, path):
            if isinstance(value, Module) and value not in found.values():
                found[path] = value
            value = vars(value) if isinstance(value, Program) else value
            value = dict(enumerate(value)) if isinstance(value, (list, tuple)) else value
            for key, item in value.items() if isinstance(value, dict) else ():
                visit(item, f"{path}.{key}" if path else str(key))
        visit(self, "")
        return found


# ------------------------------------------------------------------------------------------------------- records
@dataclass(frozen=True)
class Completion:
    """What the LM was given and what it sampled, untouched until the loss.

    Example: Completion(prompt_ids=[1, 20, 21], token_ids=[30, 2], logprobs=[-0.7, -0.1], finish_reason="stop", text="Yes")"""
    prompt_ids: list[int]
    token_ids: list[int]        # [T] the sampled end token included
    logprobs: list[float]       # [T] under the distribution sampled
    finish_reason: str          # "stop": an end token was sampled; "length": the limit came first, or nothing fitted
    text: str = ""


@dataclass(frozen=True)
class Call:
    """One LM call. Example: Call("ask", 0, {"question": "…"}, Completion(…), {"answer": "Yes"})"""
    module: str                 # attribute path in the program
    invocation: int             # 0 for the module's first call in its run
    inputs: dict = field(default_factory=dict)
    completion: Completion | None = None
    outputs: dict | None = None
    error: str = ""             # why the completion could not be read


@dataclass(frozen=True)
class ToolCall:
    """One use of a tool. Example: ToolCall("search", ("who made X?",), ["X was made by Y."], after=1)"""
    name: str                   # of the function
    arguments: tuple = ()
    result: Any = None
    error: str = ""             # why there is no result, of the last try
    after: int = 0              # LM calls that the run had asked for before


STATUSES = ("completed", "format_error", "length", "max_calls", "tool_error")


@dataclass(frozen=True)
class Trajectory:
    """One run of the program. Example: Trajectory(3, 0, (Call(…), Call(…)), {"found": […]}, 0.5, "completed")"""
    example: int | str          # which example of the batch: two draws of the same one are two
    rollout: int
    calls: tuple[Call, ...]     # in the order they were asked for
    prediction: dict | None
    reward: float | None        # None: excluded
    status: str                 # one of STATUSES
    error: str = ""
    measures: dict = field(default_factory=dict)        # what else the metric gave
    tools: tuple[ToolCall, ...] = ()                    # in the order they were begun

    @property
    def votes(self) -> bool:
        """Whether it takes part in its groups. A failed tool says nothing about the LM, nor does a reward of NaN."""
        return self.status != "tool_error" and self.reward is not None and math.isfinite(self.reward)


@dataclass
class Task:
    """What is trained: a program, the metric of its runs, and examples as dicts that forward and metric read. `defaults`
    are values for fields of the trainer's Config, used where the command line says nothing. The metric may be a coroutine, so
    that it can await tools; what it gives beside "reward" is averaged by evaluations.

    A metric raises LMError where the LM is to blame. Where it gives NaN, or raises an OSError since its
    judge did not answer, the run is excluded. One of BUGS, or a reward that is no number, stops it all.

    `demonstrate` says what an example shows of the modules' calls, their inputs and outputs in one dict, a
    short reasoning included; without it, examples that have fields named like a module's inputs and outputs
    are its demonstrations."""
    program: Program
    metric: Callable[[dict, Any], Any]      # (example, prediction) -> the reward of a completed run, or a dict of numbers with it
    train: list[dict]
    dev: list[dict]
    test: list[dict]
    defaults: dict = field(default_factory=dict)
    instructions: dict[str, tuple[str, ...]] = field(default_factory=dict)      # module -> what prompt search may choose from
    demonstrate: Callable[[dict], dict[str, list[dict]]] | None = None          # example -> module -> calls that it shows, as demos


# -------------------------------------------------------------------------------------------------------- driver
def run_programs(program: Program, examples: list[dict], metric: Callable[[dict, Any], Any], sampler, *,
                 rollouts: int = 1, seed: int = 0, step: int = 0, max_calls: int = 32, failure_score: float = 0.0,
                 format_failure_score: float = -1.0, interrupt: float = 0.0) -> list[Trajectory]:
    """Run the program `rollouts` times on each example; trajectories come back ordered by (example, rollout).

    How a run ends, and its reward: `completed` (metric(example, prediction)); `format_error` (from
    format_failure_score to failure_score by the share of fields that could be read); `length` (format_failure_score);
    `max_calls` (failure_score); `tool_error` (none: a tool failed, or the metric's judge, or it gave NaN; the
    logger "mmgrpo" is told as it happens). `interrupt`, a fault put in on purpose, gives that share of runs a
    random limit below max_calls. Raises ProgramError for a bug of the program or the metric.
    Of the sampler two methods are used: submit(messages, key) -> ticket, and advance() -> [(ticket, Completion)]. The key, (seed,
    step, example, rollout, module, invocation), seeds a request's randomness: scheduling changes nothing, unless parallel
    branches share a module and call it after another await (invocations are numbered in the order they are asked for)."""
    names = {m: name for name, m in program.modules().items()}
    if not names:
        raise ProgramError(f"{type(program).__name__} has no modules: nothing calls the LM")
    shared = SimpleNamespace(program=program, names=names, metric=metric, sampler=sampler, tickets={}, low=format_failure_score,
                             high=failure_score)            # tickets: the prompts that the sampler has, and who waits

    def run(e: int, r: int) -> _Run:
        cut = random.Random(repr(("interrupt", seed, step, e, r)))
        limit = cut.randrange(1, max(max_calls, 2)) if cut.random() < interrupt else max_calls
        return _Run(shared, examples[e], (seed, step, e, r), limit)

    async def drive() -> list[Trajectory]:
        tasks = [asyncio.create_task(run(e, r).play()) for e in range(len(examples)) for r in range(rollouts)]
        try:
            while not all(t.done() and t.result() for t in tasks):                      # a Trajectory, or raises ProgramError
                await asyncio.sleep(0 if shared.tickets else 0.001)                     # let the runs go on
                for ticket, completion in sampler.advance() if shared.tickets else ():
                    shared.tickets.pop(ticket).set_result(completion)
            return [t.result() for t in tasks]
        finally:
            for t in tasks:                                 # where one failed, asyncio need not print the others
                if t.done() and not t.cancelled():
                    t.exception()

    try:
        notebook = bool(asyncio.get_running_loop())         # its event loop is running already
    except RuntimeError:
        notebook = False
    if not notebook:                                # out here, that error is in nobody's traceback
        return asyncio.run(drive())
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, drive()).result()


class _OutOfCalls(BaseException):
    """Ends a run at its call limit; no `except Exception` of the program's stops it."""


@dataclass(eq=False)
class _Run:
    """One run of the program on one example, at most `limit` LM calls long, and its trace so far."""
    shared: SimpleNamespace     # of all runs: what run_programs was given
    values: dict                # the example
    key: tuple                  # seed, step, example, rollout
    limit: int
    calls: list[Call] = field(default_factory=list)
    measures: dict = field(default_factory=dict)
    tools: list[ToolCall] = field(default_factory=list)
    told: list[ToolError] = field(default_factory=list)

    def use_tool(self, name: str, arguments: tuple) -> Callable:
        """Put the use of a tool down -> what puts down how it ended, note(result=…, error=…)."""
        at = len(self.tools)
        call = ToolCall(name, _copied(arguments), error="had not ended", after=len(self.calls))
        self.tools.append(call)
        if at == 100 * self.limit:                  # a loop that calls tools alone must end as well
            raise _OutOfCalls
        def note(**how):
            self.tools[at] = replace(call, **how)
        return note

    def tell(self, error: ToolError) -> None:
        """Tell of a failure at once, and once: the program may catch it and raise it again."""
        if error not in self.told:
            self.told.append(error)
            log.warning("%s: %s", self.where, error, extra={"failure": error})

    @property
    def where(self) -> str:
        return f"example {self.key[2]}, rollout {self.key[3]}"

    def arguments(self) -> dict:
        """What forward is called with: copies of those entries of the example that it takes."""
        forward = self.shared.program.forward
        parameters = inspect.signature(forward).parameters
        needed = [n for n, p in parameters.items() if p.default is p.empty]
        if missing := [n for n in needed if n not in self.values]:
            has = ", ".join(map(repr, self.values))
            raise ProgramError(f"{forward.__qualname__} takes {missing[0]!r}, which example "
                               f"{self.key[2]} lacks (it has {has})")
        return {n: copy.deepcopy(self.values[n]) for n in parameters if n in self.values}

    async def ask(self, module: Module, inputs: dict) -> Prediction:
        """One LM call, put down in the trace whatever comes of it."""
        s, at, future = self.shared, len(self.calls), asyncio.get_running_loop().create_future()
        if module not in s.names:
            raise TypeError(f"called a module that is none of the program's ({', '.join(s.names.values())})")
        if at == self.limit:
            raise _OutOfCalls
        name = s.names[module]
        call = Call(name, sum(c.module == name for c in self.calls), copy.deepcopy(inputs))
        s.tickets[s.sampler.submit(module.messages(inputs), (*self.key, name, call.invocation))] = future
        self.calls.append(call)
        completion = await future
        try:
            outputs = Prediction(parse(module.signature, completion.text))
            self.calls[at] = replace(call, completion=completion, outputs=outputs)
            return outputs
        except FormatError as e:
            self.calls[at] = replace(call, completion=completion, error=str(e))
            kind = LengthError if completion.finish_reason == "length" else FormatError
            raise kind(f"{name}: {e}", e.present, e.expected) from None

    async def play(self) -> Trajectory:
        """Run to the end, however it comes."""
        current_run.set(self)
        s, prediction = self.shared, None
        try:
            prediction = await s.program.forward(**self.arguments())
            status, reward, error = "completed", await self.score(prediction), ""
        except _OutOfCalls:
            status, reward, error = "max_calls", s.high, f"more than {self.limit} LM calls, or {100 * self.limit} tool calls"
        except LengthError as e:
            status, reward, error = "length", s.low, str(e)
        except FormatError as e:
            share = 1.0 if isinstance(e, LMError) else len(e.present) / max(len(e.expected), 1)
            status, reward, error = "format_error", s.low + (s.high - s.low) * share, str(e)
        except ToolError as e:
            status, reward, error = "tool_error", None, str(e)
            self.tell(e)
        except ProgramError:
            raise
        except Exception as e:
            last = f"after {self.calls[-1].module}" if self.calls else "before any LM call"
            raise ProgramError(f"{type(s.program).__name__}.forward failed on {self.where}, {last}: "
                               f"{type(e).__name__}: {e}") from e
        while not all(c.completion for c in self.calls):    # calls that the program started and left behind
            await asyncio.sleep(0)
        return Trajectory(*self.key[2:], tuple(self.calls), prediction, reward, status, error,
                          self.measures, tuple(self.tools))

    async def score(self, prediction) -> float:
        """The metric's reward. Raises ProgramError for a bug of it, ToolError for a judge that fails."""
        try:
            result = self.shared.metric(self.values, prediction)
            result = await result if inspect.isawaitable(result) else result
        except (LMError, ToolError):
            raise
        except (*BUGS, SystemExit, asyncio.CancelledError) as e:
            if isinstance(e, asyncio.CancelledError) and asyncio.current_task().cancelling():
                raise                                       # the whole is being stopped
            raise ProgramError(f"the metric failed on {self.where}: {type(e).__name__}: {e}") from e
        except Exception as e:
            raise ToolError(f"the metric raised {type(e).__name__}: {e}") from e
        given = result if isinstance(result, dict) else {"reward": result}
        numbers = {name: _number(value) for name, value in given.items()}
        if None in numbers.values() or "reward" not in numbers:
            raise ProgramError(f"the metric gave {repr(result)[:200]} on {self.where}: expected a "
                               'number, or a dict of numbers, one of them called "reward"')
        reward = numbers.pop("reward")
        self.measures = numbers
        if not math.isfinite(reward):
            raise ToolError(f"the metric gave {reward}")
        return reward


def _number(value: Any) -> float | None:
    """As a float, infinite where it is larger than any; None where it is no number, as a text is not."""
    try:
        return None if isinstance(value, (str, bytes)) else float(value)
    except OverflowError:
        return math.inf
    except Exception:
        return None
