"""LM programs: signatures, modules and coroutines in; trajectories of LM calls out. No torch here.

A program is ordinary Python that awaits modules and tools:

    class Research(Program):
        def __init__(self, search):
            self.ask = ChainOfThought("claim, key_facts: list[str] -> query", "Write a query.")
            self.search = search

        async def forward(self, claim):
            query = (await self.ask(claim=claim, key_facts=[])).query
            return Prediction(found=await tool(self.search, query))

    trajectories = run_programs(Research(search), examples, metric, sampler, rollouts=8)

`await module(...)` suspends the run (an asyncio task) and hands the sampler a prompt. All runs are
live at once and keep the sampler full; each is resumed when its completion is there. The trace is
written here, not by the program: one that catches its own errors still leaves every call recorded.

The file, in the order that a run goes through it: failures; signatures; the XML adapter, which
turns fields into chat messages and text into fields; records of calls and runs; modules, tools and
programs; the driver.
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
from typing import Any, Awaitable, Callable, Iterable, Sequence
from xml.sax.saxutils import unescape

# told of every failure of a tool or a metric, a line each, as it happens
log = logging.getLogger("mmgrpo")


# ----------------------------------------------------------------------------------------- failures
class InputError(ValueError):
    """Something given from outside that cannot be used: a signature, an option, a file.

    The message names it.
    """


class ProgramError(RuntimeError):
    """A bug in the user's program.

    The message names the example and the last call; the cause has the traceback.
    """


class ToolError(RuntimeError):
    """A tool that failed after its retries, a metric whose judge failed, or one that gave NaN."""


class FormatError(ValueError):
    """A completion whose output fields could not all be read. `present` are those that could."""

    def __init__(self, message: str, present: tuple[str, ...] = (), expected: tuple[str, ...] = ()):
        super().__init__(message)
        self.present = present
        self.expected = expected


class LengthError(FormatError):
    """A completion cut by its token limit before its fields were complete.

    So is one that never began, since the prompt did not fit.
    """


class LMError(FormatError):
    """The LM's own mistake, found by a tool, the program or the metric.

    It asked for what is not there. The run ends as `format_error` and votes, with the failure
    score, since all fields could be read. Example: raise LMError(f"no city is called {name!r}")
    """


# Raised by a metric, these are bugs of the program and stop the training; what else it raises, a
# judge that does not answer or a division by zero, excludes the rollout.
BUGS = (TypeError, AttributeError, LookupError, NameError, AssertionError, ImportError)


# --------------------------------------------------------------------------------------- signatures
TYPES = {"str": str, "int": int, "float": float, "bool": bool, "list[str]": list}


def _quoted_label(label: str) -> str:
    if "'" in label and '"' not in label:
        return f'"{label}"'
    escaped = label.replace("'", "\\'")
    return f"'{escaped}'"


@dataclass(frozen=True)
class Field:
    """One input or output of an LM call.

    Example: Field("intent", ("card_lost", "pin_blocked"), "what the customer wants")
    """

    name: str
    # str, int, float, bool, list (of str), or a tuple: the closed set of its labels
    type: Any = str
    description: str = ""

    @property
    def type_name(self) -> str:
        """The type as a prompt spells it. Example: Literal['card_lost', 'pin_blocked']"""
        if isinstance(self.type, tuple):
            return f"Literal[{', '.join(map(_quoted_label, self.type))}]"
        if self.type is list:
            return "list[str]"
        return self.type.__name__


def _arguments(side: str) -> list[ast.arg]:
    """One side of a signature, read by Python's own grammar of arguments.

    Raises SyntaxError, or ValueError where there is more than names and types.
    """
    function = ast.parse(f"def _({side}): 0").body[0]
    assert isinstance(function, ast.FunctionDef)
    listed = function.args
    stars = listed.vararg or listed.kwarg or listed.kwonlyargs
    if stars or listed.posonlyargs or listed.defaults:
        raise ValueError("only names and types are known here")
    return listed.args


def _type(argument: ast.arg, types: dict) -> Any:
    """A Field's type, from `types` or the annotation. Raises SyntaxError or ValueError."""
    kind = types.get(argument.arg)
    if not kind:
        kind = ast.unparse(argument.annotation) if argument.annotation else "str"
    if isinstance(kind, str):
        literal = re.fullmatch(r"Literal\[(.+)\]", kind, re.S)
        kind = ast.literal_eval(f"({literal[1]},)") if literal else TYPES.get(kind)
    is_labels = isinstance(kind, tuple) and all(isinstance(label, str) for label in kind)
    if kind not in TYPES.values() and not is_labels:
        raise ValueError(
            f"the type of {argument.arg!r} is none of str, int, float, bool, list[str] and labels"
        )
    return kind


def _fields(arguments: list[ast.arg], descriptions: dict, types: dict) -> tuple[Field, ...]:
    return tuple(Field(a.arg, _type(a, types), descriptions.get(a.arg, "")) for a in arguments)


class Signature:
    """Inputs and outputs of an LM call, an instruction, and what each field means.

        Signature("question, notes: list[str] -> answer, sure: bool", "Answer.",
                  {"answer": "a short phrase"})
        Signature("text -> intent", types={"intent": ("card_lost", "pin_blocked")})

    Types are str (default), int, float, bool, list[str] and Literal['a', 'b'], or a tuple of
    labels in `types`. Raises InputError naming the field that cannot be read.
    """

    def __init__(
        self,
        fields: str,
        instruction: str = "",
        descriptions: dict[str, str] | None = None,
        types: dict[str, tuple[str, ...]] | None = None,
    ):
        descriptions = descriptions or {}
        types = types or {}
        if fields.count("->") != 1:
            raise InputError(
                f"signature {fields!r}: expected inputs and outputs on both sides of one "
                "->, as in 'text -> intent'"
            )
        try:
            inputs, outputs = (_arguments(side) for side in fields.split("->"))
            self.inputs = _fields(inputs, descriptions, types)
            self.outputs = _fields(outputs, descriptions, types)
        except (SyntaxError, ValueError) as e:
            raise InputError(
                f"signature {fields!r}: expected names, with types or without and commas "
                "between, on both sides of one ->, as in 'text, kind: int -> intent' "
                f"({getattr(e, 'msg', e)})"
            ) from None

        names = [f.name for f in self.inputs + self.outputs]
        if not self.outputs or len(names) != len(set(names)):
            raise InputError(
                f"signature {fields!r}: needs at least one output, and every name once"
            )
        unknown = (types.keys() | descriptions.keys()) - set(names)
        if unknown:
            raise InputError(f"signature {fields!r}: no field is called {min(unknown)!r}")
        self.instruction = inspect.cleandoc(instruction) or self._default_instruction()

    def _default_instruction(self) -> str:
        given = ", ".join(f"`{f.name}`" for f in self.inputs)
        wanted = ", ".join(f"`{f.name}`" for f in self.outputs)
        return f"Given the fields {given}, produce the fields {wanted}."


# --------------------------------------------------------- the XML adapter: fields to chat messages
def _escaped(value: Any) -> str:
    """A value as text in which nothing can be taken for a tag."""
    return str(value).replace("&", "&amp;").replace("<", "&lt;")


def _quoted(text: str) -> str:
    """An item of a list as DSPy quotes it: «on one line», or as an indented block."""
    if not re.search("[\n«»]", text):
        return f"«{text}»"
    indented = text.replace("\n", "\n    ")
    return f"«««\n    {indented}\n»»»"


def _numbered(values: Sequence) -> str:
    """A list in an untyped field."""
    quotes = [_quoted(str(value)) for value in values]
    if not quotes:
        return "N/A"
    if len(quotes) == 1:
        return quotes[0]
    return "\n".join(f"[{i}] {quote}" for i, quote in enumerate(quotes, 1))


def _tag(f: Field, value: Any, output: bool = False) -> str:
    """A field with its value.

    Lists and objects are JSON, a list in an untyped field is numbered quotes. Only outputs are
    escaped, for only they are parsed back.
    """
    is_list = isinstance(value, (list, tuple))
    if f.type is list and output and is_list:
        items = "".join(f"<item>{_escaped(item)}</item>" for item in value)
        return f"<{f.name}>{items}</{f.name}>" if items else f"<{f.name} />"
    if f.type is str and is_list:
        text = _numbered(value)
    elif is_list or isinstance(value, dict):
        text = json.dumps(value, ensure_ascii=False)
    else:
        text = str(value)
    if f.type is str and output:
        text = _escaped(text)
    return f"<{f.name}>\n{text}\n</{f.name}>"


# what the system message says of a value, by its type
MUST = {
    str: "",
    bool: "be True or False",
    int: "be a single int value",
    float: "be a single float value",
}


def _placeholder(f: Field) -> str:
    """What stands in the system message for an output and its type."""
    if f.type is list:
        return f"<{f.name}><item>...</item></{f.name}>"
    if isinstance(f.type, tuple):
        must = f"exactly match (no extra characters) one of: {'; '.join(f.type)}"
    else:
        must = MUST[f.type]
    note = f"        # note: the value you produce must {must}" if must else ""
    return _tag(f, f"{{{f.name}}}{note}")


def _listing(fields: tuple[Field, ...]) -> str:
    lines = [f"{i}. `{f.name}` ({f.type_name}): {f.description}" for i, f in enumerate(fields, 1)]
    return "\n".join(lines).strip()


def _system_text(signature: Signature, instruction: str) -> str:
    inputs = "\n\n".join(_tag(f, f"{{{f.name}}}") for f in signature.inputs)
    outputs = "\n\n".join(_placeholder(f) for f in signature.outputs)
    objective = "".join(f"\n        {line}" for line in textwrap.dedent(instruction).splitlines())
    return (
        f"Your input fields are:\n{_listing(signature.inputs)}\n"
        f"Your output fields are:\n{_listing(signature.outputs)}\n"
        "All interactions will be structured in the following way, "
        "with the appropriate values filled in.\n\n"
        f"{inputs}\n\n{outputs}\n"
        f"In adhering to this structure, your objective is: {objective}"
    )


def _user_message(*parts: str) -> dict:
    return {"role": "user", "content": "\n\n".join(parts).strip()}


def _inputs_text(signature: Signature, values: dict) -> str:
    return "\n\n".join(_tag(f, values[f.name]) for f in signature.inputs if f.name in values)


def _request_text(signature: Signature) -> str:
    """What the last message asks for, after the inputs."""
    tags = ", then ".join(f"`<{f.name}>`" for f in signature.outputs)
    text = f"Respond with the corresponding output fields wrapped in XML tags {tags}."
    lists = [_placeholder(f) for f in signature.outputs if f.type is list]
    if lists:
        text += f" Use this nested XML structure: {' '.join(lists)}"
    return text


MISSING = "Not supplied for this particular example. "
INCOMPLETE = "This is an example of the task, though some input or output fields are not supplied."


def render_outputs(signature: Signature, values: dict, missing: str = MISSING) -> str:
    """The completion that has these output fields; `parse` reads them back."""
    tags = [_tag(f, values.get(f.name, missing), output=True) for f in signature.outputs]
    return "\n\n".join(tags)


def _demo_messages(signature: Signature, demos: Sequence[dict]) -> list[dict]:
    """A user and an assistant message for each demo, those that lack fields first.

    A demo without any input, or without any output, is left out.
    """
    incomplete: list[dict] = []
    complete: list[dict] = []
    for demo in demos:
        given = _inputs_text(signature, demo)
        reply = {"role": "assistant", "content": render_outputs(signature, demo)}
        has_input = any(f.name in demo for f in signature.inputs)
        has_output = any(f.name in demo for f in signature.outputs)
        if all(demo.get(f.name) is not None for f in signature.inputs + signature.outputs):
            complete += [_user_message(given), reply]
        elif has_input and has_output:
            incomplete += [_user_message(INCOMPLETE, given), reply]
    return incomplete + complete


def render(
    signature: Signature,
    inputs: dict,
    instruction: str | None = None,
    demos: Sequence[dict] = (),
) -> list[dict]:
    """A call as chat messages, [{"role": …, "content": …}, …].

    Byte for byte what DSPy 3.4's XMLAdapter makes of the same signature, inputs and demos.
    """
    if instruction is None:
        instruction = signature.instruction
    system = {"role": "system", "content": _system_text(signature, instruction)}
    question = _user_message(_inputs_text(signature, inputs), _request_text(signature))
    return [system, *_demo_messages(signature, demos), question]


# ------------------------------------------------------------------ the XML adapter: text to fields
# what may stand around a label, and what after it
AROUND = " \t\r\n'\"`“”‘’«»()[]{}*"
AFTER = ".,;:!?"


def _bare(text: str) -> str:
    return text.rstrip(AROUND + AFTER).lstrip(AROUND)


def _bare_folded(text: str) -> str:
    return _bare(text).casefold()


def _label(labels: tuple[str, ...], text: str) -> str:
    """The label that a text names. Raises ValueError where it names none, or more than one.

    Read in turn, and taken where it fits exactly one label:
        as it stands                                                            card_lost
        without the quotes, Literal[…] or str[…] around it, as DSPy reads it    "card_lost"
        without quotes, brackets, blanks and stars around it, or punctuation    **card_lost**.
            after it; those of the label are left out too                       lost (for `lost?`)
        in another case, with these marks and without                           Card_Lost
    Nothing else is read: no part of a label, no other spelling, no blank for an underscore, no
    sign or symbol left out (`-1`, `C#`). Between labels that differ only in case or marks nothing
    is guessed.
    """
    wrapped = re.fullmatch(r"(?:Literal|str)\[(.*)\]", text, re.S)
    inner = wrapped[1] if wrapped else text
    if len(inner) > 1 and inner[0] == inner[-1] and inner[0] in "'\"":
        inner = inner[1:-1]

    # what is said, and the form in which it is compared with the labels
    readings: list[tuple[str, Callable[[str], str]]] = [(text, str), (inner, str)]
    # marks alone name nothing
    if _bare(inner):
        readings += [(inner, _bare), (inner, str.casefold), (inner, _bare_folded)]
    for said, form in readings:
        fitting = [label for label in dict.fromkeys(labels) if form(label) == form(said)]
        if len(fitting) == 1:
            return fitting[0]
    raise ValueError("none of the labels, or several")


def _read_list(text: str, plain: str) -> list[str]:
    """A list of <item>…</item>, or JSON. Raises ValueError."""
    items = re.findall(r"<item>(.*?)</item>", text, re.S)
    if items:
        return [_read(Field("item"), item) for item in items]
    values = json.loads(plain or "[]")
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError("not a list of strings")
    return values


def _read(f: Field, text: str) -> Any:
    """The value of an output field. Raises ValueError or KeyError where the text is none."""
    plain = unescape(text.strip(), {"&quot;": '"', "&apos;": "'"})
    if f.type is list:
        return _read_list(text, plain)
    if isinstance(f.type, tuple):
        return _label(f.type, plain)
    if f.type is bool:
        return {"true": True, "false": False}[plain.lower()]
    value = f.type(plain)
    if f.type is float and not math.isfinite(value):
        raise ValueError("not finite")
    return value


def _tagged(names: tuple[str, ...], text: str) -> dict[str, str]:
    """Name -> what stands between the first pair of its tags.

    Tags are read one after another, so that text around them, `&` and `<` in a value, and tags
    inside one do no harm.
    """
    opening = re.compile(f"<({'|'.join(names)})( ?/)?>")
    found: dict[str, str] = {}
    place = 0
    while tag := opening.search(text, place):
        name = tag[1]
        is_empty = tag[2] is not None
        end = tag.end() if is_empty else text.find(f"</{name}>", tag.end())
        # a tag that is never closed (-1) holds nothing: look on behind it
        if end >= 0:
            found.setdefault(name, text[tag.end() : end])
        place = max(tag.end(), end)
    return found


# characters that an error shows of a value that is wrong
SHOWN = 60


def parse(signature: Signature, text: str) -> dict:
    """A completion -> its output fields, the first of each name.

    Raises FormatError with the fields that were there.
    """
    names = tuple(f.name for f in signature.outputs)
    found = _tagged(names, text)
    values = {}
    wrong = []
    for f in signature.outputs:
        if f.name not in found:
            wrong.append(f"{f.name} is missing")
            continue
        try:
            values[f.name] = _read(f, found[f.name])
        except (KeyError, ValueError, RecursionError):
            is_labels = isinstance(f.type, tuple)
            kind = f"label of the {len(f.type)}" if is_labels else f.type_name
            wrong.append(f"{f.name} is no {kind}: {found[f.name].strip()[:SHOWN]!r}")
    if wrong:
        raise FormatError("; ".join(wrong), tuple(values), names)
    return values


# ------------------------------------------------------------------------------------------ records
@dataclass(frozen=True)
class Completion:
    """What the LM was given and what it sampled, untouched until the loss.

    Example: Completion(prompt_ids=[1, 20, 21], token_ids=[30, 2], logprobs=[-0.7, -0.1],
                        finish_reason="stop", text="Yes")
    """

    prompt_ids: list[int]
    # [T], the sampled end token included
    token_ids: list[int]
    # [T], under the distribution sampled
    logprobs: list[float]
    # "stop": an end token was sampled; "length": the limit came first, or nothing fitted
    finish_reason: str
    text: str = ""


@dataclass(frozen=True)
class Call:
    """One LM call.

    Example: Call("ask", 0, {"question": "…"}, Completion(…), {"answer": "Yes"})
    """

    # attribute path in the program
    module: str
    # 0 for the module's first call in its run
    invocation: int
    inputs: dict = field(default_factory=dict)
    completion: Completion | None = None
    outputs: dict | None = None
    # why the completion could not be read
    error: str = ""


@dataclass(frozen=True)
class ToolCall:
    """One use of a tool.

    Example: ToolCall("search", ("who made X?",), ["X was made by Y."], after=1)
    """

    # of the function
    name: str
    arguments: tuple = ()
    result: Any = None
    # why there is no result, of the last try
    error: str = ""
    # LM calls that the run had asked for before
    after: int = 0


STATUSES = ("completed", "format_error", "length", "max_calls", "tool_error")


@dataclass(frozen=True)
class Trajectory:
    """One run of the program.

    Example: Trajectory(3, 0, (Call(…), Call(…)), {"found": […]}, 0.5, "completed")
    """

    # which example of the batch: two draws of the same one are two
    example: int | str
    rollout: int
    # in the order they were asked for
    calls: tuple[Call, ...]
    prediction: dict | None
    # None: excluded
    reward: float | None
    # one of STATUSES
    status: str
    error: str = ""
    # what else the metric gave
    measures: dict = field(default_factory=dict)
    # in the order they were begun
    tools: tuple[ToolCall, ...] = ()

    @property
    def votes(self) -> bool:
        """Whether it takes part in its groups.

        A failed tool says nothing about the LM, nor does a reward of NaN.
        """
        if self.status == "tool_error" or self.reward is None:
            return False
        return math.isfinite(self.reward)


# ---------------------------------------------------------------------- modules, tools and programs
class Prediction(dict):
    """Named values, read as attributes: what calls and programs return.

    Values that are named like a method of dict are read as p["items"].
    """

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(f"no field {name!r} (there are {', '.join(self) or 'none'})")


current_run: contextvars.ContextVar = contextvars.ContextVar("the run whose `ask` answers modules")


def _run_at_hand() -> _Run:
    run = current_run.get(None)
    if run is None:
        raise ProgramError(
            "modules and tools are awaited in a run of a program; runs are made by "
            "run_programs(program, examples, metric, sampler)"
        )
    return run


class Module:
    """An LM call with its own prompt: a signature, an instruction and demos.

    The last two are free to be optimised. Example:
        ask = Module("question -> answer", "Answer in one word.")
        answer = (await ask(question="…")).answer
    """

    def __init__(
        self,
        signature: str | Signature,
        instruction: str = "",
        descriptions: dict[str, str] | None = None,
        types: dict[str, tuple[str, ...]] | None = None,
    ):
        if isinstance(signature, str):
            signature = Signature(signature, instruction, descriptions, types)
        self.signature = signature
        self.instruction = inspect.cleandoc(instruction) or signature.instruction
        self.demos: list[dict] = []

    async def __call__(self, **inputs) -> Prediction:
        """The output fields. Raises FormatError where they cannot be read."""
        # shielded: given up by the program, the call still is recorded
        return await asyncio.shield(_run_at_hand().ask(self, inputs))

    def messages(self, inputs: dict) -> list[dict]:
        """The prompt. Raises TypeError naming an input that is missing or unknown."""
        mismatched = {f.name for f in self.signature.inputs} ^ inputs.keys()
        if mismatched:
            name = min(mismatched)
            raise TypeError(f"input {name!r} is {'unknown' if name in inputs else 'missing'}")
        return render(self.signature, inputs, self.instruction, self.demos)


class ChainOfThought(Module):
    """A module whose first output is its `reasoning`; the arguments are Module's."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.signature = copy.copy(self.signature)
        self.signature.outputs = (Field("reasoning"), *self.signature.outputs)


def _renamed(failure: BaseException) -> RuntimeError:
    renamed = RuntimeError(f"{type(failure).__name__}: {failure}")
    renamed.__cause__ = failure
    return renamed


def _in_thread(fn: Callable, args: tuple) -> Future:
    """Start fn(*args) in a thread, one that does not keep the process from ending if it hangs."""
    done: Future = Future()

    def work() -> None:
        # suppressed: the state of a future that was given up, for nobody waits any more
        with contextlib.suppress(InvalidStateError):
            try:
                done.set_result(fn(*args))
            except (StopIteration, CancelledError) as e:
                # these mean something else to asyncio
                done.set_exception(_renamed(e))
            except Exception as e:
                done.set_exception(e)
            except BaseException as e:
                # SystemExit ends the tool, not the training
                done.set_exception(_renamed(e))

    threading.Thread(target=work, daemon=True).start()
    return done


def _copied(value: Any) -> Any:
    """For the trace: what is done to the value later changes nothing. As text if it has no copy."""
    try:
        return copy.deepcopy(value)
    except Exception:
        return repr(value)


async def tool(fn: Callable, *args, retries: int = 0, timeout: float = 600.0) -> Any:
    """Run fn in a thread while decoding goes on, and put it down in the run's trace.

    Raises ToolError where it still fails, or takes more than `timeout` seconds, after `retries`
    more tries. Not caught, that excludes the run, for it says nothing about the LM. A mistake of
    the LM's own, such as a name that it invented, a tool tells in one of two ways: it returns a
    value that says so, and the program goes on; or it raises LMError, which is not tried again and
    ends the run at the LM's cost. A run that uses tools more than 100 times its limit of LM calls
    ends as if it had reached that.
    """
    run = _run_at_hand()
    name = getattr(fn, "__name__", type(fn).__name__)
    note = run.use_tool(name, args)
    for tries_left in range(retries, -1, -1):
        done = _in_thread(fn, args)
        try:
            result = await asyncio.wait_for(asyncio.wrap_future(done), timeout)
        except Exception as e:
            # cancelled is what was given up; no failure of the tool's own cancels
            error = f"{type(e).__name__}: {e}"
            if done.cancelled():
                error = f"{type(e).__name__}: no answer in {timeout:g} s"
            note(error=error)
            if isinstance(e, LMError):
                raise
            if tries_left == 0:
                failure = ToolError(f"{name}: {error}")
                # set before it is raised: who is told shows the cause's traceback
                failure.__cause__ = e
                run.tell(failure)
                raise failure from e
        else:
            note(result=_copied(result), error="")
            return result


async def gather(*parts) -> list:
    """Several calls together: `a, b = await gather(self.ask(…), tool(…))`.

    All end before the first failure is raised.
    """
    results = await asyncio.gather(*parts, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


class Program:
    """Subclass it: modules are attributes, `async def forward(self, …)` is the control flow.

    `forward` is called with those entries of the example that it has parameters for. One object
    serves all runs at once: a run keeps its state in local variables.
    """

    forward: Callable[..., Awaitable[Any]]

    def __call__(self, *args, **kwargs):
        return self.forward(*args, **kwargs)

    def modules(self) -> dict[str, Module]:
        """Attribute path -> module, nested programs, lists and dicts included.

        The path is the module's identity.
        """
        found: dict[str, Module] = {}

        def visit(value: Any, path: str) -> None:
            if isinstance(value, Module) and value not in found.values():
                found[path] = value
            for key, part in _parts(value):
                visit(part, f"{path}.{key}" if path else str(key))

        visit(self, "")
        return found


def _parts(value: Any) -> Iterable[tuple[Any, Any]]:
    """Pairs of a name or place and what is there: where modules may be found."""
    if isinstance(value, Program):
        return vars(value).items()
    if isinstance(value, dict):
        return value.items()
    if isinstance(value, (list, tuple)):
        return enumerate(value)
    return ()


@dataclass
class Task:
    """What is trained: a program, the metric of its runs, and examples.

    A metric raises LMError where the LM is to blame. Where it gives NaN, or raises an OSError
    since its judge did not answer, the run is excluded. One of BUGS, or a reward that is no
    number, stops it all.
    """

    program: Program
    # (example, prediction) -> the reward of a completed run, or a dict of numbers with "reward";
    # what stands beside it is averaged by evaluations. It may be a coroutine, so that it can await
    # tools.
    metric: Callable[[dict, Any], Any]
    # examples are dicts that forward and metric read
    train: list[dict]
    dev: list[dict]
    test: list[dict]
    # values for fields of the trainer's Config, used where the command line says nothing
    defaults: dict = field(default_factory=dict)
    # module -> what prompt search may choose from
    instructions: dict[str, tuple[str, ...]] = field(default_factory=dict)
    # example -> module -> the calls that it shows, as demos: inputs and outputs in one dict, a
    # short reasoning included. Without it, examples that have fields named like a module's inputs
    # and outputs are its demonstrations.
    demonstrate: Callable[[dict], dict[str, list[dict]]] | None = None


# ------------------------------------------------------------------------------------------- driver
# uses of tools that a run has for each LM call of its limit
TOOLS_PER_CALL = 100


class _OutOfCalls(BaseException):
    """Ends a run at its call limit; no `except Exception` of the program's stops it."""


def _number(value: Any) -> float | None:
    """As a float, infinite where it is larger than any; None where it is no number."""
    # float() would read a text as a number
    if isinstance(value, (str, bytes)):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf
    except Exception:
        return None


@dataclass(frozen=True, eq=False)
class _Shared:
    """What all runs of one `run_programs` have in common."""

    program: Program
    # module -> its attribute path
    names: dict[Module, str]
    metric: Callable[[dict, Any], Any]
    sampler: Any
    failure_score: float
    format_failure_score: float
    # ticket of a prompt that the sampler has -> the call that waits for its completion
    waiting: dict[Any, asyncio.Future] = field(default_factory=dict)


@dataclass(eq=False)
class _Run:
    """One run of the program on one example, and its trace so far."""

    shared: _Shared
    example: dict
    # seed, step, number of the example, rollout
    key: tuple[int, int, int, int]
    # LM calls that it may make
    limit: int
    calls: list[Call] = field(default_factory=list)
    tools: list[ToolCall] = field(default_factory=list)
    prediction: Any = None
    measures: dict[str, float] = field(default_factory=dict)
    # failures that the log was told of
    told: list[ToolError] = field(default_factory=list)

    @property
    def where(self) -> str:
        return f"example {self.key[2]}, rollout {self.key[3]}"

    async def play(self) -> Trajectory:
        """Run to the end, however it comes."""
        current_run.set(self)
        status, reward, error = await self.outcome()
        # calls that the program started and left behind
        while not all(call.completion for call in self.calls):
            await asyncio.sleep(0)
        return Trajectory(
            example=self.key[2],
            rollout=self.key[3],
            calls=tuple(self.calls),
            prediction=self.prediction,
            reward=reward,
            status=status,
            error=error,
            measures=self.measures,
            tools=tuple(self.tools),
        )

    async def outcome(self) -> tuple[str, float | None, str]:
        """Run the program: its status, reward, and why it did not complete."""
        program = self.shared.program
        low = self.shared.format_failure_score
        high = self.shared.failure_score
        try:
            self.prediction = await program.forward(**self.arguments())
            return "completed", await self.score(self.prediction), ""
        except _OutOfCalls:
            tools = TOOLS_PER_CALL * self.limit
            return "max_calls", high, f"more than {self.limit} LM calls, or {tools} tool calls"
        except LengthError as e:
            return "length", low, str(e)
        except FormatError as e:
            share = len(e.present) / max(len(e.expected), 1)
            if isinstance(e, LMError):
                share = 1.0
            return "format_error", low + (high - low) * share, str(e)
        except ToolError as e:
            self.tell(e)
            return "tool_error", None, str(e)
        except ProgramError:
            raise
        except Exception as e:
            last = f"after {self.calls[-1].module}" if self.calls else "before any LM call"
            raise ProgramError(
                f"{type(program).__name__}.forward failed on {self.where}, {last}: "
                f"{type(e).__name__}: {e}"
            ) from e

    def arguments(self) -> dict:
        """What forward is called with: copies of those entries of the example that it takes."""
        forward = self.shared.program.forward
        parameters = inspect.signature(forward).parameters
        for name, parameter in parameters.items():
            if parameter.default is parameter.empty and name not in self.example:
                has = ", ".join(map(repr, self.example))
                raise ProgramError(
                    f"{forward.__qualname__} takes {name!r}, which example "
                    f"{self.key[2]} lacks (it has {has})"
                )
        taken = [name for name in parameters if name in self.example]
        return {name: copy.deepcopy(self.example[name]) for name in taken}

    async def ask(self, module: Module, inputs: dict) -> Prediction:
        """One LM call, put down in the trace whatever comes of it."""
        names = self.shared.names
        if module not in names:
            raise TypeError(
                f"called a module that is none of the program's ({', '.join(names.values())})"
            )
        place = len(self.calls)
        if place == self.limit:
            raise _OutOfCalls

        name = names[module]
        invocation = sum(call.module == name for call in self.calls)
        call = Call(name, invocation, copy.deepcopy(inputs))
        key = (*self.key, name, invocation)
        ticket = self.shared.sampler.submit(module.messages(inputs), key)
        answer = asyncio.get_running_loop().create_future()
        self.shared.waiting[ticket] = answer
        self.calls.append(call)

        completion = await answer
        try:
            outputs = Prediction(parse(module.signature, completion.text))
        except FormatError as e:
            self.calls[place] = replace(call, completion=completion, error=str(e))
            kind = LengthError if completion.finish_reason == "length" else FormatError
            raise kind(f"{name}: {e}", e.present, e.expected) from None
        self.calls[place] = replace(call, completion=completion, outputs=outputs)
        return outputs

    def use_tool(self, name: str, arguments: tuple) -> Callable[..., None]:
        """Put the use of a tool down -> what puts down how it ended, note(result=…, error=…)."""
        place = len(self.tools)
        use = ToolCall(name, _copied(arguments), error="had not ended", after=len(self.calls))
        self.tools.append(use)
        # a loop that calls tools alone must end as well
        if place == TOOLS_PER_CALL * self.limit:
            raise _OutOfCalls

        def note(**ending: Any) -> None:
            self.tools[place] = replace(use, **ending)

        return note

    def tell(self, failure: ToolError) -> None:
        """Tell of a failure at once, and once: the program may catch it and raise it again."""
        if failure not in self.told:
            self.told.append(failure)
            log.warning("%s: %s", self.where, failure, extra={"failure": failure})

    async def score(self, prediction: Any) -> float:
        """The metric's reward; what else it gave goes to `measures`.

        Raises ProgramError for a bug of the metric, ToolError for a judge that fails.
        """
        try:
            # a copy: what a metric does to its example must not reach later evaluations
            result = self.shared.metric(copy.deepcopy(self.example), prediction)
            if inspect.isawaitable(result):
                result = await result
        except (LMError, ToolError):
            raise
        except (*BUGS, SystemExit, asyncio.CancelledError) as e:
            task = asyncio.current_task()
            if isinstance(e, asyncio.CancelledError) and task and task.cancelling():
                # not the metric's doing: the whole is being stopped
                raise
            raise ProgramError(f"the metric failed on {self.where}: {type(e).__name__}: {e}") from e
        except Exception as e:
            raise ToolError(f"the metric raised {type(e).__name__}: {e}") from e

        given = result if isinstance(result, dict) else {"reward": result}
        numbers = {}
        for name, value in given.items():
            number = _number(value)
            if number is not None:
                numbers[name] = number
        if numbers.keys() != given.keys() or "reward" not in numbers:
            raise ProgramError(
                f"the metric gave {repr(result)[:200]} on {self.where}: expected a "
                'number, or a dict of numbers, one of them called "reward"'
            )
        reward = numbers.pop("reward")
        self.measures = numbers
        if not math.isfinite(reward):
            raise ToolError(f"the metric gave {reward}")
        return reward


def _limit(key: tuple[int, int, int, int], max_calls: int, interrupt: float) -> int:
    """LM calls that a run may make: `max_calls`, or fewer where it is interrupted."""
    rng = random.Random(repr(("interrupt", *key)))
    if rng.random() < interrupt:
        return rng.randrange(1, max(max_calls, 2))
    return max_calls


async def _drive(runs: list[_Run], shared: _Shared) -> list[Trajectory]:
    """Play all runs together: they ask, the sampler decodes, and each goes on with its answer."""
    tasks = [asyncio.create_task(run.play()) for run in runs]
    try:
        # result() is a Trajectory, or raises ProgramError
        while not all(task.done() and task.result() for task in tasks):
            # let the runs go on; where all wait for tools, do not spin
            await asyncio.sleep(0 if shared.waiting else 0.001)
            if shared.waiting:
                for ticket, completion in shared.sampler.advance():
                    shared.waiting.pop(ticket).set_result(completion)
        return [task.result() for task in tasks]
    finally:
        # looked at: where one failed, asyncio need not print the failures of the others
        for task in tasks:
            if task.done() and not task.cancelled():
                task.exception()


def _in_event_loop() -> bool:
    """Whether this thread's event loop is running already, as a notebook's is."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def run_programs(
    program: Program,
    examples: list[dict],
    metric: Callable[[dict, Any], Any],
    sampler: Any,
    *,
    rollouts: int = 1,
    seed: int = 0,
    step: int = 0,
    max_calls: int = 32,
    failure_score: float = 0.0,
    format_failure_score: float = -1.0,
    interrupt: float = 0.0,
) -> list[Trajectory]:
    """Run the program `rollouts` times on each example.

    Of the sampler two methods are used: submit(messages, key) -> ticket, and advance() ->
    [(ticket, Completion)]. The key, (seed, step, example, rollout, module, invocation), seeds a
    request's randomness: scheduling changes nothing, unless parallel branches share a module and
    call it after another await (invocations are numbered in the order they are asked for).

    How a run ends, and its reward:
        completed       metric(example, prediction)
        format_error    from format_failure_score to failure_score, by the share of fields that
                        could be read
        length          format_failure_score
        max_calls       failure_score
        tool_error      none: a tool failed, or the metric's judge, or it gave NaN; the logger
                        "mmgrpo" is told as it happens
    `interrupt`, a fault put in on purpose, gives that share of runs a random limit below
    max_calls.

    Returns the trajectories, ordered by (example, rollout). Raises ProgramError for a bug of the
    program or the metric.
    """
    names = {module: name for name, module in program.modules().items()}
    if not names:
        raise ProgramError(f"{type(program).__name__} has no modules: nothing calls the LM")
    shared = _Shared(program, names, metric, sampler, failure_score, format_failure_score)
    runs = []
    for number, example in enumerate(examples):
        for rollout in range(rollouts):
            key = (seed, step, number, rollout)
            runs.append(_Run(shared, example, key, _limit(key, max_calls, interrupt)))

    if not _in_event_loop():
        return asyncio.run(_drive(runs, shared))
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, _drive(runs, shared)).result()
