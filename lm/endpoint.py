"""LMs behind an OpenAI-compatible endpoint: an untrusted LM, a judge, an LM that writes prompts. They are tools, never trained.

    ask = Endpoint("http://localhost:8000/v1", "some-model")
    text = ask("Write a line about rivers.")                    # a user message, or a list of messages
    answer = ask.predict(Signature("question -> answer: bool"), question="Is the sky blue?").answer

In a program: `await tool(ask, request)`; what fails there is a tool_error of its run. The key comes from the environment
variable OPENAI_API_KEY and is neither logged nor stored.
"""
from __future__ import annotations

import hashlib
import json
import os
import tempfile
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

import httpx

from program import Completion, InputError, Prediction, Signature, ToolError, parse, render

AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)       # statuses worth another try


class Endpoint:
    """Chat completions of one model. Safe to call from several threads; at most `concurrency` requests are under way.

    Raises ToolError, with what the server said, where no answer came after `retries` more tries (a connection that fails or is
    silent for `timeout` seconds, an answer that is not whole by then, one of the statuses AGAIN, an answer that is no chat
    completion; waits double from one second to thirty, or are what Retry-After asks for), at once where another try cannot help.
    With `cache`, a folder, an answer to a request made before, with the same model and options, is read from there."""
    def __init__(self, url: str, model: str, *, timeout: float = 60.0, retries: int = 4, concurrency: int = 8,
                 cache: str | Path | None = None, wait: float = 1.0, **options):
        if not url.startswith(("http://", "https://")):
            raise InputError(f"endpoint {url!r}: expected an address that begins with http:// or https://")
        try:
            httpx.URL(url)
        except httpx.InvalidURL as e:
            raise InputError(f"endpoint {url!r}: {e}") from None
        self.url, self.model, self.retries, self.wait = url.rstrip("/") + "/chat/completions", model, retries, wait
        self.options = {"temperature": 0.0, "max_tokens": 512} | options
        self.cache, self.free = cache and Path(cache), threading.BoundedSemaphore(concurrency)
        self.timeout, self.client = timeout, httpx.Client(timeout=timeout)

    def __call__(self, messages: str | list[dict], **options) -> str:
        messages = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        body = {"model": self.model, "messages": messages} | self.options | options
        stored = None
        if self.cache:
            stored = self.cache / (hashlib.sha256(json.dumps([self.url, body], sort_keys=True).encode()).hexdigest() + ".json")
            try:
                if isinstance(text := json.loads(stored.read_text(encoding="utf-8")), str):
                    return text
            except (OSError, ValueError):                   # not asked before, or damaged: ask
                pass
        with self.free:
            text = self._ask(body)
        if stored:
            self.cache.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self.cache, delete=False) as file:
                json.dump(text, file)
            os.replace(file.name, stored)                   # whole, or not there
        return text

    @classmethod
    def named(cls, variable: str, **options) -> "Endpoint | None":
        """The endpoint that an environment variable names ("ADDRESS MODEL"), its answers kept in .cache/; None where it is not
        set. Raises InputError."""
        if not (value := os.environ.get(variable)):
            return None
        if len(parts := value.split()) != 2:
            raise InputError(f"{variable}: expected an address and a model, found {value!r}")
        return cls(*parts, cache=".cache", **options)

    def _post(self, body: dict, headers: dict) -> httpx.Response:
        """The whole answer. Raises HTTPError, also for one that comes in drops and is not whole in `timeout` seconds."""
        began, parts = time.monotonic(), []
        with self.client.stream("POST", self.url, json=body, headers=headers) as answer:
            for part in answer.iter_raw():
                parts.append(part)
                if time.monotonic() - began > self.timeout:
                    raise httpx.ReadTimeout(f"the answer was not whole in {self.timeout:g} s")
        return httpx.Response(answer.status_code, headers=answer.headers, content=b"".join(parts))

    def _ask(self, body: dict) -> str:
        key = (os.environ.get("OPENAI_API_KEY") or "").strip()
        if not (key.isascii() and key.isprintable()):
            raise ToolError("OPENAI_API_KEY: holds characters that no header can carry")
        hide = lambda text: text.replace(key, "***") if key else text
        for left in range(self.retries, -1, -1):
            pause = min(self.wait * 2 ** (self.retries - left), 30.0)
            try:
                answer = self._post(body, {"Authorization": f"Bearer {key}"} if key else {})
                if answer.status_code == 200:
                    text = answer.json()["choices"][0]["message"]["content"]
                    if isinstance(text, str):
                        text.encode()                       # ValueError where half of a character is in it
                        return text
                    raise ValueError(f"content is {type(text).__name__}")
                error = f"status {answer.status_code}: {hide(' '.join(answer.text.split()))[:200]}"
                if answer.status_code not in AGAIN:
                    break
                asked = answer.headers.get("retry-after", "")
                pause = min(float(asked), 60.0) if asked.isdecimal() else pause
            except httpx.HTTPError as e:
                error = f"{type(e).__name__}: {e}"
            except (ValueError, LookupError, TypeError, RecursionError) as e:
                error = f"not a chat completion ({type(e).__name__}: {e})"
            if left:
                time.sleep(pause)
        raise ToolError(f"{self.url}: {hide(error)}")

    def predict(self, signature: Signature, instruction: str | None = None, **inputs) -> Prediction:
        """The output fields of a signature. Raises FormatError where the answer has them not."""
        return Prediction(parse(signature, self(render(signature, inputs, instruction))))


class Remote:
    """An endpoint in the place of a sampler: `run_programs(program, …, Remote(endpoint))` runs any program on it. It tells no token
    ids, so nothing of it can be trained. `advance` raises ToolError where the endpoint gives no answer."""
    def __init__(self, endpoint: Endpoint, threads: int = 8):
        self.endpoint, self.pool, self.waiting = endpoint, ThreadPoolExecutor(threads), {}

    def submit(self, messages: list[dict], key: tuple) -> int:
        self.waiting[ticket := len(self.waiting)] = self.pool.submit(self.endpoint, messages)
        return ticket

    def advance(self) -> list[tuple[int, Completion]]:
        ended = wait([f for f in self.waiting.values() if f], return_when=FIRST_COMPLETED).done
        done = [(ticket, f) for ticket, f in self.waiting.items() if f in ended]
        self.waiting |= {ticket: None for ticket, _ in done}
        try:
            return [(ticket, Completion([], [], [], "stop", f.result())) for ticket, f in done]
        except ToolError:
            self.pool.shutdown(wait=False, cancel_futures=True)
            raise
