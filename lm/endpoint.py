"""LMs behind an OpenAI-compatible endpoint: an untrusted LM, a judge, an LM that writes prompts.

They are tools, never trained.

    ask = Endpoint("http://localhost:8000/v1", "some-model")
    text = ask("Write a line about rivers.")           # a user message, or a list of messages
    answer = ask.predict(Signature("question -> answer: bool"), question="Is the sky blue?").answer

In a program: `await tool(ask, request)`; what fails there is a tool_error of its run. The key comes
from the environment variable OPENAI_API_KEY and is neither logged nor stored.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import threading
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

import httpx

from program import Completion, InputError, Prediction, Signature, ToolError, parse, render

# statuses worth another try
AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)
# seconds between two tries: those that are ours, and those that a server asks for
LONGEST_WAIT = 30.0
LONGEST_WAIT_ASKED = 60.0
# characters of a server's message that are told on
MOST_TOLD = 200


class Endpoint:
    """Chat completions of one model.

    Safe to call from several threads; at most `concurrency` requests are under way. With `cache`, a
    folder, an answer to a request made before, with the same model and options, is read from there.
    `options` go into every request.

    Raises ToolError, with what the server said, where no answer came after `retries` more tries:
    where a connection fails or is silent for `timeout` seconds, an answer is not whole by then, has
    one of the statuses AGAIN, or is no chat completion. Waits double from `wait` seconds to thirty,
    or are what Retry-After asks for. Raises it at once where another try cannot help.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        timeout: float = 60.0,
        retries: int = 4,
        concurrency: int = 8,
        cache: str | Path | None = None,
        wait: float = 1.0,
        **options,
    ):
        if not url.startswith(("http://", "https://")):
            raise InputError(
                f"endpoint {url!r}: expected an address that begins with http:// or https://"
            )
        try:
            httpx.URL(url)
        except httpx.InvalidURL as e:
            raise InputError(f"endpoint {url!r}: {e}") from None
        self.url = url.rstrip("/") + "/chat/completions"
        self.model = model
        self.timeout = timeout
        self.retries = retries
        self.wait = wait
        self.options = {"temperature": 0.0, "max_tokens": 512} | options
        self.cache = Path(cache) if cache else None
        self.free = threading.BoundedSemaphore(concurrency)
        self.client = httpx.Client(timeout=timeout)

    @classmethod
    def named(cls, variable: str, **options) -> Endpoint | None:
        """The endpoint that an environment variable names ("ADDRESS MODEL").

        Its answers are kept in .cache/. None where the variable is not set. Raises InputError.
        """
        value = os.environ.get(variable)
        if not value:
            return None
        parts = value.split()
        if len(parts) != 2:
            raise InputError(f"{variable}: expected an address and a model, found {value!r}")
        address, model = parts
        return cls(address, model, cache=".cache", **options)

    def __call__(self, messages: str | list[dict], **options) -> str:
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        body = {"model": self.model, "messages": messages} | self.options | options
        stored = self._stored_at(body)
        text = _read_stored(stored)
        if text is None:
            with self.free:
                text = self._ask(body)
            _store(text, stored)
        return text

    def predict(self, signature: Signature, instruction: str | None = None, **inputs) -> Prediction:
        """The output fields of a signature. Raises FormatError where the answer has them not."""
        return Prediction(parse(signature, self(render(signature, inputs, instruction))))

    def _stored_at(self, body: dict) -> Path | None:
        """The file of a request's answer, which follows from the server and all that is sent."""
        if self.cache is None:
            return None
        request = json.dumps([self.url, body], sort_keys=True)
        return self.cache / (hashlib.sha256(request.encode()).hexdigest() + ".json")

    def _ask(self, body: dict) -> str:
        """The text of the server's answer, after as many tries as it takes. Raises ToolError."""
        key = _api_key()
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        for tried in range(self.retries + 1):
            pause = min(self.wait * 2**tried, LONGEST_WAIT)
            try:
                answer = self._post(body, headers)
                if answer.status_code == 200:
                    return _text_of(answer)
                # the key is hidden before the message is cut, or half of it might be told
                said = _hide(" ".join(answer.text.split()), key)[:MOST_TOLD]
                error = f"status {answer.status_code}: {said}"
                if answer.status_code not in AGAIN:
                    break
                asked = answer.headers.get("retry-after", "")
                if asked.isdecimal():
                    pause = min(float(asked), LONGEST_WAIT_ASKED)
            except httpx.HTTPError as e:
                error = f"{type(e).__name__}: {e}"
            except (ValueError, LookupError, TypeError, RecursionError) as e:
                error = f"not a chat completion ({type(e).__name__}: {e})"
            if tried < self.retries:
                time.sleep(pause)
        raise ToolError(f"{self.url}: {_hide(error, key)}")

    def _post(self, body: dict, headers: dict) -> httpx.Response:
        """The whole answer.

        Raises HTTPError, also for one that comes in drops and is not whole in `timeout` seconds.
        """
        began = time.monotonic()
        parts = []
        with self.client.stream("POST", self.url, json=body, headers=headers) as answer:
            for part in answer.iter_raw():
                parts.append(part)
                if time.monotonic() - began > self.timeout:
                    raise httpx.ReadTimeout(f"the answer was not whole in {self.timeout:g} s")
        return httpx.Response(answer.status_code, headers=answer.headers, content=b"".join(parts))


def _api_key() -> str:
    """The key, "" where there is none. Raises ToolError where it cannot be sent."""
    # stripped, for a file that it is read from may end in a line break
    key = (os.environ.get("OPENAI_API_KEY") or "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ToolError("OPENAI_API_KEY: holds characters that no header can carry")
    return key


def _hide(text: str, key: str) -> str:
    return text.replace(key, "***") if key else text


def _text_of(answer: httpx.Response) -> str:
    """The content of a chat completion.

    Raises ValueError, LookupError, TypeError or RecursionError where the answer is none.
    """
    text = answer.json()["choices"][0]["message"]["content"]
    if not isinstance(text, str):
        raise ValueError(f"content is {type(text).__name__}")
    # ValueError where half of a character is in it
    text.encode()
    return text


def _read_stored(path: Path | None) -> str | None:
    """A stored answer; None where it was not asked for before, or is damaged."""
    if path is None:
        return None
    try:
        text = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return text if isinstance(text, str) else None


def _store(text: str, path: Path | None) -> None:
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    # written beside and then put in place: it is there whole, or not at all
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        json.dump(text, file)
    os.replace(file.name, path)


class Remote:
    """An endpoint in the place of a sampler, so that any program runs on it.

    `run_programs(program, …, Remote(endpoint))`. It tells no token ids, so nothing of it can be
    trained. `advance` raises ToolError where the endpoint gives no answer.
    """

    def __init__(self, endpoint: Endpoint, threads: int = 8):
        self.endpoint = endpoint
        self.pool = ThreadPoolExecutor(threads)
        # by ticket; None once the answer is handed out
        self.waiting: dict[int, Future | None] = {}

    def submit(self, messages: list[dict], key: tuple) -> int:
        ticket = len(self.waiting)
        self.waiting[ticket] = self.pool.submit(self.endpoint, messages)
        return ticket

    def advance(self) -> list[tuple[int, Completion]]:
        asked = {ticket: future for ticket, future in self.waiting.items() if future}
        ended = wait(asked.values(), return_when=FIRST_COMPLETED).done
        done = [(ticket, future) for ticket, future in asked.items() if future in ended]
        for ticket, _ in done:
            self.waiting[ticket] = None
        try:
            return [(ticket, Completion([], [], [], "stop", f.result())) for ticket, f in done]
        except ToolError:
            self.pool.shutdown(wait=False, cancel_futures=True)
            raise
