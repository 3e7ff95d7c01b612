"""LMs behind an endpoint, here a server in the test: what is sent, retried, kept and never told."""

import gzip
import http.server
import json
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from lm.endpoint import Endpoint
from program import FormatError, InputError, Signature, ToolError

# headers that tell the server below how to send an answer
DROPS = {"Drops": "yes"}
GZIP = {"Content-Encoding": "gzip"}


def chat(text):
    """The body of a completion."""
    return {"choices": [{"message": {"content": text}}]}


def said(text, headers=()):
    """An answer with that completion: status, headers, body."""
    return 200, dict(headers), chat(text)


def content_of(body):
    return body["messages"][0]["content"]


def handler(answer, requests):
    """A handler that notes requests and gives answer(body)."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append((self.path, dict(self.headers), body))
            status, headers, content = answer(body)
            text = content if isinstance(content, str) else json.dumps(content)
            data = text.encode()
            if "Content-Encoding" in headers:
                data = gzip.compress(data)
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(data))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            if "Drops" in headers:
                self.write_in_drops(data)
            else:
                self.wfile.write(data)

        def write_in_drops(self, data):
            for i in range(0, len(data), 8):
                self.wfile.write(data[i : i + 8])
                time.sleep(0.05)

        def log_message(self, *_):
            pass

    return Handler


@pytest.fixture
def serve():
    """serve(answer) -> (address, requests).

    answer(body) is (status, headers, JSON or text), and may take its time.
    """
    servers = []

    def start(answer):
        requests = []
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler(answer, requests))
        # a client that gave up waiting is no error of the server's
        server.handle_error = lambda *_: None
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/v1", requests

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


# ------------------------------------------------------------------------------------ what is asked
def test_a_request_says_model_messages_and_options(serve, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    url, requests = serve(lambda body: said("hello"))

    assert Endpoint(url + "/", "m", max_tokens=7)("hi", stop=["x"]) == "hello"
    ((path, headers, body),) = requests
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer sesame"
    assert body == {
        "model": "m",
        "messages": [{"role": "user", "content": "hi"}],
        "temperature": 0.0,
        "max_tokens": 7,
        "stop": ["x"],
    }

    monkeypatch.delenv("OPENAI_API_KEY")
    messages = [{"role": "system", "content": "s"}]
    Endpoint(url, "m")(messages)
    _, headers, body = requests[1]
    assert "Authorization" not in headers
    assert body["messages"] == messages


def test_predict_renders_a_signature_and_reads_the_fields(serve):
    def answer(body):
        return said("<sure>\ntrue\n</sure>" if "sky" in str(body) else "yes")

    url, requests = serve(answer)
    ask = Endpoint(url, "m")
    signature = Signature("question -> sure: bool")

    assert ask.predict(signature, "Judge.", question="Is the sky blue?").sure is True
    messages = requests[0][2]["messages"]
    assert [m["role"] for m in messages] == ["system", "user"]
    assert "Judge." in messages[0]["content"]
    with pytest.raises(FormatError):
        ask.predict(signature, question="And now?")


# --------------------------------------------------------------------------------------- what fails
FAULTS = [
    (429, {"Retry-After": "0"}, "slow down"),
    (500, {}, ""),
    (503, {}, "<html>"),
    (200, {}, "no json"),
    (200, {}, {"choices": []}),
    (200, {}, [1]),
    said(None),
    said("half \ud83d"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=range(len(FAULTS)))
def test_what_may_pass_is_tried_again_so_many_times(serve, fault):
    answers = [fault, fault, said("at last")]
    url, requests = serve(lambda body: answers.pop(0))
    assert Endpoint(url, "m", wait=0.001)("hi") == "at last"
    assert len(requests) == 3

    url, requests = serve(lambda body: fault)
    reason = r"chat/completions: (status \d+|not a chat completion)"
    with pytest.raises(ToolError, match=reason):
        Endpoint(url, "m", wait=0.001, retries=2)("hi")
    assert len(requests) == 3


@pytest.mark.parametrize("status", [400, 401, 404])
def test_what_cannot_pass_is_not_tried_again_and_the_key_is_not_told(serve, monkeypatch, status):
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    url, requests = serve(lambda body: (status, {}, "no such key: sesame"))
    with pytest.raises(ToolError, match=rf"status {status}: no such key: \*\*\*$"):
        Endpoint(url, "m")("hi")
    assert len(requests) == 1


def test_a_key_that_cannot_be_sent_is_not_told_either(serve, monkeypatch):
    url, requests = serve(lambda body: (401, {}, "x" * 195 + "sk-secret" + body["model"]))

    # as a file may end
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret\n")
    with pytest.raises(ToolError) as error:
        Endpoint(url, "m")("hi")
    assert "sk-s" not in str(error.value)
    assert requests[0][1]["Authorization"] == "Bearer sk-secret"

    for unsendable in ("sk-\nsecret", "sk-sécret"):
        monkeypatch.setenv("OPENAI_API_KEY", unsendable)
        reason = "OPENAI_API_KEY: holds characters that no header can carry"
        with pytest.raises(ToolError, match=reason):
            Endpoint(url, "m")("hi")


def test_a_server_that_hangs_or_is_not_there_is_a_tool_error(serve):
    def late(body):
        time.sleep(5)
        return said("late")

    url, _ = serve(late)
    began = time.monotonic()
    with pytest.raises(ToolError, match="ReadTimeout"):
        Endpoint(url, "m", timeout=0.1, retries=1, wait=0.001)("hi")
    assert time.monotonic() - began < 3
    with pytest.raises(ToolError, match="ConnectError"):
        Endpoint("http://127.0.0.1:9/v1", "m", retries=1, wait=0.001)("hi")


def test_an_answer_that_comes_in_drops_must_be_whole_in_time(serve):
    # for 13 seconds
    url, requests = serve(lambda body: said("x" * 2000, DROPS))
    began = time.monotonic()
    with pytest.raises(ToolError, match=r"ReadTimeout: the answer was not whole in 0.3 s"):
        Endpoint(url, "m", timeout=0.3, retries=1, wait=0.001)("hi")
    assert len(requests) == 2
    assert time.monotonic() - began < 5


def test_a_compressed_answer_is_read(serve):
    url, _ = serve(lambda body: said("packed", GZIP))
    assert Endpoint(url, "m")("hi") == "packed"


@pytest.mark.parametrize("address", ["localhost:8000/v1", "http://[::1 m", "http://a:b/"])
def test_an_address_that_is_none_is_refused(address):
    with pytest.raises(InputError, match=re.escape(repr(address))):
        Endpoint(address, "m")


# ---------------------------------------------------------------------------------------- many asks
def test_no_more_requests_are_under_way_than_allowed(serve):
    lock, under_way, most = threading.Lock(), 0, 0

    def answer(body):
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        time.sleep(0.02)
        with lock:
            under_way -= 1
        return said(content_of(body))

    url, _ = serve(answer)
    ask = Endpoint(url, "m", concurrency=3)
    texts = [str(i) for i in range(24)]
    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(ask, texts)) == texts
    assert most == 3


def test_a_repeated_request_is_answered_from_the_disk(serve, tmp_path):
    kept = tmp_path / "kept"
    url, requests = serve(lambda body: said(f"{content_of(body)} {len(requests)}"))

    def ask(text, **options):
        return Endpoint(url, "m", cache=kept)(text, **options)

    assert ask("a") == "a 1"
    assert ask("b") == "b 2"
    assert ask("a") == "a 1"
    assert ask("a", seed=1) == "a 3"

    for file in kept.iterdir():
        file.write_text("{damaged")
    assert ask("a") == "a 4"
    assert ask("a") == "a 4"

    other, _ = serve(lambda body: said("of another server"))
    assert Endpoint(other, "m", cache=kept)("a") == "of another server"
