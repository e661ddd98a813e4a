"""What a server may be started with, where keys come from, and what is logged."""

import io
import json
import logging
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ryzanstein_jax.cli import app
from ryzanstein_jax.engine.tokens import Tokenizer
from ryzanstein_jax.errors import ConfigError
from ryzanstein_jax.server.logprobs import token_bytes
from ryzanstein_jax.server.logs import set_up_logs
from ryzanstein_jax.server.run import bind
from ryzanstein_jax.server.settings import KEY_VARIABLE, ServerConfig, read_api_keys
from tests.server.serving import FakeBackend, serving


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"host": "0.0.0.0"}, "host"), ({"host": "::"}, "host"), ({"host": "a host"}, "host"),
        ({"port": 70000}, "port"),
        ({"port": True}, "port"), ({"max_sequences": 0}, "max_sequences"), ({"drain_seconds": -1}, "drain_seconds"),
        ({"request_seconds": float("nan")}, "request_seconds"), ({"api_keys": ("short",)}, "api_keys"),
        ({"api_keys": ("two words here",)}, "api_keys"), ({"max_body_bytes": 1}, "max_body_bytes"),
    ],
)  # fmt: skip
def test_a_bad_setting_is_named(settings, named):
    with pytest.raises(ConfigError, match=named) as raised:
        ServerConfig(**settings)
    assert raised.value.field == named and "two words" not in str(raised.value)


def test_beyond_loopback_takes_a_key_or_a_decision():
    assert ServerConfig().hosts == {"localhost", "127.0.0.1", "::1"}
    assert ServerConfig(host="0.0.0.0", api_keys=("a-long-key",)).hosts is None
    assert ServerConfig(host="0.0.0.0", allow_anonymous=True, allowed_hosts=("LLM.example", "[::2]")).hosts == {
        "llm.example", "::2",
    }  # fmt: skip
    assert "a-long-key" not in repr(ServerConfig(api_keys=("a-long-key",)))


def test_keys_come_from_a_file_and_the_environment(tmp_path: Path):
    file = tmp_path / "keys"
    file.write_text("# of the team\nfirst-key\n\n  second-key  \nfirst-key\n")
    assert read_api_keys(file, {KEY_VARIABLE: "third-key fourth-key"}) == (
        "first-key", "second-key", "third-key", "fourth-key",
    )  # fmt: skip
    assert read_api_keys(None, {}) == ()
    with pytest.raises(ConfigError, match=KEY_VARIABLE):
        read_api_keys(None, {KEY_VARIABLE: " "})
    file.write_text("# nothing\n")
    with pytest.raises(ConfigError, match="holds no key"):
        read_api_keys(file, {})
    with pytest.raises(ConfigError, match="can't be read"):
        read_api_keys(tmp_path / "none", {})


def test_a_port_that_is_taken_is_named():
    with bind(ServerConfig(port=0)) as taken, pytest.raises(ConfigError, match="port"):
        bind(ServerConfig(port=taken.getsockname()[1]))


@pytest.mark.parametrize("arguments", [["--host", "0.0.0.0"], ["--dtype", "float8"], ["--api-key-file", "/nowhere"]])
def test_the_command_refuses_before_anything_listens(arguments, tiny: Path):
    result = CliRunner().invoke(app, ["serve", str(tiny), *arguments])
    assert isinstance(result.exception, ConfigError)


def test_logs_are_json_and_hold_nothing_of_what_was_sent(fake: FakeBackend):
    stream = io.StringIO()
    before = {
        name: (logging.getLogger(name).handlers, logging.getLogger(name).propagate)
        for name in ("ryzanstein_jax", "uvicorn")
    }
    set_up_logs(stream)
    try:
        with serving(fake, api_keys=("the-very-secret-key",)) as served:
            headers = {"X-Request-Id": "mine-1", "X-Other": "header-text"}
            asked = {"model": "tiny", "prompt": "prompt-text", "max_tokens": 3, "user": "user-text"}
            assert served.request("POST", "/v1/completions?query-text", asked, headers)[0] == 200
            served.request("GET", "/path-text", headers={"Authorization": "Bearer another-secret"})
            served.request("PURGE", "/health")
    finally:
        for name, (handlers, propagate) in before.items():
            logging.getLogger(name).handlers, logging.getLogger(name).propagate = handlers, propagate
    text = stream.getvalue()
    for word in ("secret", "prompt-text", "user-text", "header-text", "query-text", "path-text", "PURGE"):
        assert word not in text, word
    lines = [json.loads(line) for line in text.splitlines()]
    (line,) = [line for line in lines if line.get("request_id") == "mine-1"]
    assert (line["route"], line["status"], line["prompt_tokens"], line["completion_tokens"]) == (
        "/v1/completions",
        200,
        11,
        3,
    )
    assert line["finish_reasons"] == ["length"] and line["level"] == "info" and line["time"].endswith("Z")


def test_the_bytes_of_tokens_that_are_parts_of_characters(smollm2_path: Path):
    tokenizer = Tokenizer.from_gguf(smollm2_path)
    for text in ("naïve 🙂 東京", "👩‍👩‍👧"):
        tokens = tokenizer.encode(text)
        parts = [token_bytes(tokenizer, token, tokenizer.decode([token], False)) for token in tokens]
        assert b"".join(parts) == text.encode()
        assert any("\ufffd" in tokenizer.decode([token], False) for token in tokens)
