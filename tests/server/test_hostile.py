"""Requests that mean harm: each is refused with an error of the API, and the server answers on."""

import json
import socket
from collections.abc import Iterator

import pytest

from ryzanstein_jax import AsyncLLM
from ryzanstein_jax.server.app import make_app
from ryzanstein_jax.server.page import FILES
from ryzanstein_jax.server.service import Service
from ryzanstein_jax.server.settings import ServerConfig
from tests.server.serving import MODEL, Served, serving

KEY = "a-key-of-this-test"
ROUTES = [
    ("POST", "/v1/completions"), ("POST", "/v1/chat/completions"), ("GET", "/v1/models"), ("GET", "/v1/models/tiny"),
    ("POST", "/v1/embeddings"),
    ("POST", "/v1/responses"), ("POST", "/tokenize"), ("POST", "/detokenize"), ("GET", "/ready"), ("GET", "/metrics"),
    ("GET", "/version"), ("GET", "/status"),
    ("GET", "/openapi.json"), ("GET", "/nowhere"), ("GET", "//health"), ("GET", "/health/"), ("GET", "/v1/../health"),
]  # fmt: skip


@pytest.fixture(scope="module")
def small(engine: AsyncLLM) -> Iterator[Served]:
    """The tiny model behind tight limits."""
    with serving(engine, max_body_bytes=100_000, max_header_bytes=2048, max_stops=4) as found:
        yield found


@pytest.fixture(autouse=True)
def it_still_answers(small: Served, engine: AsyncLLM) -> Iterator[None]:
    yield
    status, _, body = small.complete("x", max_tokens=2, ignore_eos=True)
    assert status == 200 and body["usage"]["completion_tokens"] == 2
    assert small.service.admission.num_sequences == 0


def refused(answer: tuple[int, dict[str, str], dict], param: str | None = None, status: int = 400) -> str:
    """An error with all fields of the API; returns its message."""
    found, _, body = answer
    assert found == status, body
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert param is None or body["error"]["param"] == param, body
    assert len(body["error"]["message"]) <= 2000
    return body["error"]["message"]


def test_a_huge_header(small):
    refused(small.request("GET", "/version", headers={"X-Long": "x" * 4000}), status=431)
    refused(small.request("GET", "/version?" + "x" * 4000), status=431)
    with socket.create_connection(("127.0.0.1", small.port), timeout=10) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Long: " + b"x" * 9000)
        assert b" 400 " in connection.recv(100), "without waiting for its end"


def test_a_huge_body(small):
    refused(small.complete("x" * 200_000), status=413)
    with socket.create_connection(("127.0.0.1", small.port), timeout=10) as connection:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n")
        for _ in range(7):
            connection.sendall(b"4000\r\n" + b" " * 0x4000 + b"\r\n")
        assert b" 413 " in connection.recv(100), "without a length, and before its end"


def test_a_body_that_says_it_will_be_huge(small):
    with socket.create_connection(("127.0.0.1", small.port), timeout=10) as connection:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(head + b"Content-Length: 10000000000\r\n\r\n")
        assert b" 413 " in connection.recv(100), "before any of it came"


def test_a_path_with_a_slash_too_many_is_not_redirected(small):
    answer = small.post("/v1/completions/", prompt="x")
    refused(answer, status=404)
    assert "location" not in answer[1]


def test_other_bodies_than_json(small):
    raw = json.dumps({"model": MODEL, "prompt": "x"}).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        refused(small.request("POST", "/v1/completions", raw, {"Content-Type": kind}), status=415)
    refused(small.request("POST", "/v1/completions", raw, {"Content-Encoding": "gzip"}), status=415)
    for body in (b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b'{"model": NaN}', b"{}" * 2):
        refused(small.request("POST", "/v1/completions", body))


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("n", [0, -1, 129, 10**9, 10**400, 1.5, "2", True, [1]]),
        ("max_tokens", [-1, 128, 10**9, 10**30, "5", False]),
        ("logprobs", [-1, 21, 10**6, True]),
        ("temperature", [-0.1, 2.1, 1e400, "hot", True]),
        ("top_p", [0, -1, 1.1]),
        ("stop", [["x"] * 5, ["x" * 2000], [""], "", [1], {"x": 1}]),
        ("logit_bias", [{"131": 1}, {"x": 1}, {"-1": 1}, {"1": 101}, {"1" * 50: 1},
                        {"٣": 1}, [1], {"1": None}, {str(token): 1 for token in range(5000)}]),
        ("seed", [1 << 63, -(1 << 64), 0.5, "1"]),
        ("stop_token_ids", [[131], [-1], [1] * 100, ["1"]]),
        ("min_tokens", [-1, 1000]),
        ("presence_penalty", [2.1, -3, "x"]),
        ("priority", [10**6, "high"]),
        ("deadline_seconds", [0, -1, 1e9, "soon"]),
        ("stream", ["yes", 1]),
        ("stream_options", [{"include_usage": 1}, {"more": True}, []]),
        ("user", [1]),
        ("echo", [1, "true"]),
        ("best_of", [2, True]),
        ("suffix", ["end", ""]),
        ("a" * 1000, [1]),
    ],
)  # fmt: skip
def test_values_out_of_bounds_are_refused_by_name(small, field, values):
    for value in values:
        found = small.complete("Hello", **{field: value, "stream": value if field == "stream" else None})
        message = refused(found)
        param = found[2]["error"]["param"] or ""
        assert param.startswith(field[:100]) or (field, param) == ("max_tokens", "prompt"), message


@pytest.mark.parametrize(
    "prompt", ["", [], [""], [[]], [["x"]], [1.5], [True], [[1], "x", []], [-1], [131], [2**70], None, {}, 5, [None]]
)
def test_prompts_that_are_none(small, prompt):
    refused(small.complete(prompt), "prompt")


def test_prompts_that_are_too_long(small):
    for prompt in ("x" * 128, "x" * 50_000, [5] * 128, ["x", "y" * 200]):
        answer = small.complete(prompt, max_tokens=1)
        assert answer[2]["error"]["code"] == "context_length_exceeded"
        refused(answer, "prompt")
    refused(small.complete(["x"] * 65, n=2), "n")
    refused(small.chat("x" * 1000), "messages")


def test_characters_that_are_none(small):
    status, _, body = small.complete("a\0b", max_tokens=1)
    assert status == 200 and body["usage"]["prompt_tokens"] == 3, "NUL is a character like others"
    fields = [
        ("/v1/completions", b'"prompt":"%s"'),
        ("/tokenize", b'"prompt":"%s"'),
        ("/v1/completions", b'"prompt":"x","stop":"%s"'),
        ("/v1/completions", b'"prompt":"x","%s":1'),
        ("/v1/chat/completions", b'"messages":[{"role":"user","content":"%s"}]'),
    ]
    for raw in (b"\\ud800", b"\\udc00x", b"\xed\xa0\x80"):
        for path, field in fields:
            refused(small.request("POST", path, b'{"model":"tiny",' + field % raw + b"}"))
    assert small.complete("🙂漢", max_tokens=1)[0] == 200


def test_json_that_is_deep_or_repeats(small):
    for deep in (b"[" * 40_000, b"[" * 40_000 + b"]" * 40_000, b'{"a":' * 15_000 + b"1" + b"}" * 15_000):
        refused(small.request("POST", "/v1/completions", b'{"model":"tiny","prompt":' + deep + b"}"))
        body = b'{"model":"tiny","messages":[{"role":"user","content":"x"}],"chat_template_kwargs":{"style":%s}}'
        refused(small.request("POST", "/v1/chat/completions", body % deep))
    nested: object = "x"
    for _ in range(60):
        nested = [nested]
    refused(small.chat("x", chat_template_kwargs={"style": nested}), "chat_template_kwargs")
    refused(small.chat(nested))


@pytest.mark.parametrize(
    "variables",
    [
        {"messages": []}, {"tools": [1]}, {"add_generation_prompt": False}, {"self": 1}, {"bos_token": "x"},
        {"__class__": 1}, {"unknown": 1}, {"style": 10**2000}, {"loop": 1}, {"namespace": 1}, {"": 1},
    ],
)  # fmt: skip
def test_hostile_template_variables(small, variables):
    refused(small.chat("x", chat_template_kwargs=variables), "chat_template_kwargs")


def test_templates_see_text_and_not_code(small):
    status, _, body = small.chat("{{ 7 * 7 }}{% for x in range(10**9) %}", max_tokens=1)
    assert status == 200 and body["usage"]["prompt_tokens"] == len(
        "user: {{ 7 * 7 }}{% for x in range(10**9) %}\nassistant:"
    )


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest/meta-data"}},
        {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}},
        {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}},
        {"type": "file", "file": {"file_id": "x"}},
        {"type": "text", "text": "x", "image_url": {"url": "http://localhost/"}},
        {"type": "video_url", "video_url": "gopher://x"},
        {"type": ["text"], "text": "x"}, {"text": "x"}, "x", None, 5, {"type": "text"}, {"type": "text", "text": None},
    ],
)  # fmt: skip
def test_parts_that_are_no_text(small, part, monkeypatch):
    real = socket.getaddrinfo

    def resolve(host: str, *rest: object, **more: object) -> object:
        assert host == "127.0.0.1", f"it looks up {host}"
        return real(host, *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    message = refused(small.chat([{"type": "text", "text": "What is this?"}, part]), "messages[0].content")
    assert "text" in message


@pytest.mark.parametrize(
    "message",
    [
        {}, {"role": "user"}, {"role": "user", "content": None}, {"role": "user", "content": 5}, {"content": "x"}, "x",
        {"role": "root", "content": "x"}, {"role": "user", "content": []}, {"role": ["user"], "content": "x"}, None,
        {"role": "user", "content": "x", "name": "y"}, {"role": "user", "content": "x", "weight": 1},
    ],
)  # fmt: skip
def test_messages_that_are_none(small, message):
    found = small.post("/v1/chat/completions", messages=[message])
    refused(found)
    assert found[2]["error"]["param"].startswith("messages[0]")


def test_tokens_that_are_none(small):
    for tokens in ([131], [-1], ["x"], [1.5], None, [2**80]):
        refused(small.post("/detokenize", tokens=tokens))
    refused(small.post("/tokenize"))
    refused(small.post("/tokenize", prompt="x", messages=[]))
    refused(small.post("/tokenize", prompt="x" * 50_000), "prompt")


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "127.0.0.1.nip.io", "", "localhost:80:80", "localhost/x", "[::1",
             "a b", "localhost@evil.example", "0.0.0.0"]
)  # fmt: skip
def test_odd_hosts(small, host):
    for path in ("/health", "/v1/models"):
        refused(small.request("GET", path, headers={"Host": host}), status=421)


def test_hosts_that_are_known(small):
    for host in ("localhost", "LOCALHOST:9", "127.0.0.1", "[::1]:8000"):
        assert small.request("GET", "/health", headers={"Host": host})[0] == 200
    with socket.create_connection(("127.0.0.1", small.port), timeout=10) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n")
        assert b" 400 " in connection.recv(100) or b" 421 " in connection.recv(100)


@pytest.mark.parametrize("given", ["", "abc-123_X.y", "x" * 65, "a b", 'x"}', "é"])
def test_request_ids_are_kept_where_they_are_plain(small, given):
    _, headers, _ = small.request("GET", "/health", headers={"X-Request-Id": given.encode("latin-1")})
    assert (headers["x-request-id"] == given) == (given == "abc-123_X.y")
    assert 0 < len(headers["x-request-id"]) <= 64


def test_no_route_is_left_out_of_these():
    app = make_app(Service(ServerConfig(), MODEL, "1"))
    served = {(method, route.path) for route in app._app.routes for method in route.methods - {"HEAD"}}
    open_to_all = {"/health", *FILES}
    assert {path for _, path in served - set(ROUTES)} - open_to_all == {"/v1/models/{name:path}"}


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_a_key_opens_every_route_and_nothing_else_does(fake, method, path, capfd):
    with serving(fake, api_keys=(KEY, "another-key")) as served:
        served.key = None
        body = {"model": MODEL} if method == "POST" else None
        for header in (
            "",
            "Bearer",
            "Bearer ",
            f"Basic {KEY}",
            KEY,
            f"Bearer {KEY}x",
            f"Bearer {KEY[:-1]}",
            "Bearer x, y",
        ):
            found = served.request(method, path, body, {"Authorization": header})
            refused(found, status=401)
            assert found[1]["www-authenticate"] == "Bearer"
        refused(served.request(method, f"{path}?api_key={KEY}", body), status=401)
        for key in (KEY, "another-key"):
            assert served.request(method, path, body, {"Authorization": f"bearer {key}"})[0] not in (401, 403, 500)
        assert served.request("GET", "/health")[0] == 200
        assert KEY not in repr(served.service.config)
