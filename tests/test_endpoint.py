"""LMs behind an endpoint, against a server in the test: what is sent, what is tried again, what is kept, what is never told."""
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

said = lambda text: (200, {}, {"choices": [{"message": {"content": text}}]})


@pytest.fixture
def serve():
    """serve(answer) -> (address, requests); answer(body) is (status, headers, JSON or text), and may take its time."""
    servers = []
    def start(answer):
        requests = []
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                requests.append((self.path, dict(self.headers), body))
                status, headers, content = answer(body)
                data = (content if isinstance(content, str) else json.dumps(content)).encode()
                data = gzip.compress(data) if "Content-Encoding" in headers else data
                self.send_response(status)
                for name, value in ({"Content-Length": str(len(data))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                for i in range(0, len(data), size := 8 if "Drops" in headers else len(data) or 1):
                    self.wfile.write(data[i:i + size])
                    time.sleep(0.05 if "Drops" in headers else 0)
            def log_message(self, *_):
                pass
        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        servers[-1].handle_error = lambda *_: None          # a client that gave up waiting
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}/v1", requests
    yield start
    for s in servers:
        s.shutdown()
        s.server_close()


def test_a_request_says_model_messages_and_options(serve, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    url, requests = serve(lambda body: said("hello"))
    assert Endpoint(url + "/", "m", max_tokens=7)("hi", stop=["x"]) == "hello"
    (path, headers, body), = requests
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer sesame"
    assert body == {"model": "m", "messages": [{"role": "user", "content": "hi"}], "temperature": 0.0, "max_tokens": 7, "stop": ["x"]}
    monkeypatch.delenv("OPENAI_API_KEY")
    Endpoint(url, "m")([{"role": "system", "content": "s"}])
    assert "Authorization" not in requests[1][1] and requests[1][2]["messages"] == [{"role": "system", "content": "s"}]


FAULTS = [(429, {"Retry-After": "0"}, "slow down"), (500, {}, ""), (503, {}, "<html>"), (200, {}, "no json"), (200, {}, {"choices": []}),
          (200, {}, [1]), (200, {}, {"choices": [{"message": {"content": None}}]}), said("half \ud83d")]


@pytest.mark.parametrize("fault", FAULTS, ids=range(len(FAULTS)))
def test_what_may_pass_is_tried_again_so_many_times(serve, fault):
    answers = [fault, fault, said("at last")]
    url, requests = serve(lambda body: answers.pop(0))
    assert Endpoint(url, "m", wait=0.001)("hi") == "at last" and len(requests) == 3
    url, requests = serve(lambda body: fault)
    with pytest.raises(ToolError, match=r"chat/completions: (status \d+|not a chat completion)"):
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
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret\n")     # as a file may end
    with pytest.raises(ToolError) as error:
        Endpoint(url, "m")("hi")
    assert "sk-s" not in str(error.value) and requests[0][1]["Authorization"] == "Bearer sk-secret"
    for odd in ("sk-\nsecret", "sk-sécret"):
        monkeypatch.setenv("OPENAI_API_KEY", odd)
        with pytest.raises(ToolError, match="OPENAI_API_KEY: holds characters that no header can carry"):
            Endpoint(url, "m")("hi")


def test_a_server_that_hangs_or_is_not_there_is_a_tool_error(serve):
    url, _ = serve(lambda body: time.sleep(5) or said("late"))
    began = time.monotonic()
    with pytest.raises(ToolError, match="ReadTimeout"):
        Endpoint(url, "m", timeout=0.1, retries=1, wait=0.001)("hi")
    assert time.monotonic() - began < 3
    with pytest.raises(ToolError, match="ConnectError"):
        Endpoint("http://127.0.0.1:9/v1", "m", retries=1, wait=0.001)("hi")


def test_an_answer_that_comes_in_drops_must_be_whole_in_time(serve):
    url, requests = serve(lambda body: (200, {"Drops": "yes"}, said("x" * 2000)[2]))             # for 13 seconds
    began = time.monotonic()
    with pytest.raises(ToolError, match=r"ReadTimeout: the answer was not whole in 0.3 s"):
        Endpoint(url, "m", timeout=0.3, retries=1, wait=0.001)("hi")
    assert len(requests) == 2 and time.monotonic() - began < 5


def test_a_compressed_answer_is_read(serve):
    url, _ = serve(lambda body: (200, {"Content-Encoding": "gzip"}, said("packed")[2]))
    assert Endpoint(url, "m")("hi") == "packed"


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
        return said(body["messages"][0]["content"])
    ask = Endpoint(serve(answer)[0], "m", concurrency=3)
    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(ask, map(str, range(24)))) == list(map(str, range(24)))
    assert most == 3


def test_a_repeated_request_is_answered_from_the_disk(serve, tmp_path):
    url, requests = serve(lambda body: said(f"{body['messages'][0]['content']} {len(requests)}"))
    ask = lambda text, **options: Endpoint(url, "m", cache=tmp_path / "kept")(text, **options)
    assert [ask("a"), ask("b"), ask("a"), ask("a", seed=1)] == ["a 1", "b 2", "a 1", "a 3"]
    for file in (tmp_path / "kept").iterdir():
        file.write_text("{damaged")
    assert ask("a") == "a 4" and ask("a") == "a 4"
    other, _ = serve(lambda body: said("of another server"))
    assert Endpoint(other, "m", cache=tmp_path / "kept")("a") == "of another server"


def test_predict_renders_a_signature_and_reads_the_fields(serve):
    url, requests = serve(lambda body: said("<sure>\ntrue\n</sure>" if "sky" in str(body) else "yes"))
    ask = Endpoint(url, "m")
    assert ask.predict(Signature("question -> sure: bool"), "Judge.", question="Is the sky blue?").sure is True
    assert [m["role"] for m in requests[0][2]["messages"]] == ["system", "user"] and "Judge." in requests[0][2]["messages"][0]["content"]
    with pytest.raises(FormatError):
        ask.predict(Signature("question -> sure: bool"), question="And now?")


@pytest.mark.parametrize("address", ["localhost:8000/v1", "http://[::1 m", "http://a:b/"])
def test_an_address_that_is_none_is_refused(address):
    with pytest.raises(InputError, match=re.escape(repr(address))):
        Endpoint(address, "m")
