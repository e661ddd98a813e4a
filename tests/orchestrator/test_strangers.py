"""The leader's port and strangers: garbage, wrong secrets, too many at a time. None gets in, and nothing breaks."""

import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ryzanstein_jax.config import OrchestratorConfig
from ryzanstein_jax.errors import ConfigError
from ryzanstein_jax.orchestrator import listener
from ryzanstein_jax.orchestrator.dial import Dialer, RefusedError, software
from ryzanstein_jax.orchestrator.events import EventLog
from ryzanstein_jax.orchestrator.frames import Channel, ChannelClosedError, FrameError, Kind, authenticate
from ryzanstein_jax.orchestrator.hosts import Hosts
from ryzanstein_jax.orchestrator.secret import read_secret
from tests.faults.harness import nothing_left_behind
from tests.orchestrator.remote import SECRET, Machines, machines, until

HELLO = {"role": "agent", "name": "a", "devices": 2, "software": software()}


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Machines]:
    with machines(tmp_path) as found:
        yield found


@pytest.fixture
def hosts(made: Machines) -> Iterator[Hosts]:
    with nothing_left_behind():
        found = Hosts(OrchestratorConfig(**made.options()), 2, EventLog())
        yield found
        found.close()


def connect(made: Machines) -> socket.socket:
    host, _, port = made.address.rpartition(":")
    return socket.create_connection((host, int(port)), 10.0)


def dialer(made: Machines, secret: str = SECRET) -> Dialer:
    return Dialer(made.address, secret.encode())


def header(kind: Kind, length: int) -> bytes:
    return struct.pack("<4sBxxxI", b"RYZF", kind, length)


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\nHost: leader\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"\0" * 100_000,
        os.urandom(4096),
        struct.pack("<4sBxxxI", b"RYZF", Kind.AUTH, 1 << 30),
        struct.pack("<4sBxxxI", b"RYZF", Kind.HELLO, 2) + b"{}",
        struct.pack("<4sBxxxI", b"RYZF", Kind.AUTH, 32)
        + bytes(32)
        + struct.pack("<4sBxxxI", b"RYZF", Kind.AUTH, 32)
        + bytes(32),
        b"",
    ],
    ids=["http", "tls", "zeros", "noise", "huge", "hello first", "no proof", "nothing"],
)
def test_garbage_is_refused(made: Machines, hosts: Hosts, garbage: bytes) -> None:
    with connect(made) as stranger:
        stranger.sendall(garbage)
        stranger.shutdown(socket.SHUT_WR)
        stranger.settimeout(10.0)
        answer = b""
        try:
            while data := stranger.recv(4096):
                answer += data
        except ConnectionResetError:
            pass
    # A challenge, and at most the proof that goes with it.
    assert len(answer) <= 2 * (12 + 32)
    until(lambda: hosts.listener.num_refused == 1)
    assert hosts.names() == {}
    dialer(made).dial(HELLO).close()
    assert hosts.names() == {"a": 2}


def test_a_wrong_secret_is_refused(made: Machines, hosts: Hosts) -> None:
    with pytest.raises(FrameError, match="does not know the secret"):
        dialer(made, "another secret of 16 bytes").dial(HELLO)
    until(lambda: hosts.listener.num_refused == 1)
    assert hosts.names() == {}


def test_a_worker_with_a_wrong_secret_ends_and_says_so(made: Machines, hosts: Hosts) -> None:
    agent = made.start("b", environment={"RYZANSTEIN_SECRET": "another secret of 16 bytes"})
    assert agent.wait(60) == 1
    assert "does not know the secret" in made.printed("b")
    assert hosts.names() == {}


def test_a_leader_that_does_not_know_the_secret_gets_nothing(made: Machines) -> None:
    """Whoever took the leader's port learns no more than a challenge's proof."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        seen: list[Exception] = []

        def answer() -> None:
            channel = Channel(server.accept()[0])
            try:
                authenticate(channel, b"the secret of somebody else", leader=True)
            except (FrameError, ChannelClosedError) as error:
                seen.append(error)
            channel.close()

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(FrameError):
            Dialer(f"127.0.0.1:{server.getsockname()[1]}", SECRET.encode()).dial(HELLO)
        thread.join(20)
        assert len(seen) == 1


def test_strangers_are_few_and_soon_gone(made: Machines, hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
    strangers = [connect(made) for _ in range(listener.MOST_STRANGERS)]
    until(lambda: len(hosts.listener._strangers) == listener.MOST_STRANGERS)
    with connect(made) as one_more:
        one_more.settimeout(10.0)
        with pytest.raises((ConnectionError, AssertionError)):  # closed at once, without a byte
            assert one_more.recv(1)
    began = time.monotonic()
    until(lambda: not hosts.listener._strangers, 3 * listener.STRANGER_SECONDS)
    assert time.monotonic() - began < 2 * listener.STRANGER_SECONDS
    dialer(made).dial(HELLO).close()
    for stranger in strangers:
        stranger.close()


@pytest.mark.parametrize(
    ("change", "reason", "is_final"),
    [
        ({"software": "ryzanstein-jax 0.0.1"}, "runs ryzanstein-jax 0.0.1", True),
        ({"role": "rank", "ticket": "", "channel": "steps"}, "nobody waits", True),
        ({"role": "rank", "ticket": "0" * 32, "channel": "control"}, "nobody waits", True),
    ],
    ids=["other software", "rank without a ticket", "rank with an invented ticket"],
)
def test_who_knows_the_secret_is_still_asked(
    made: Machines, hosts: Hosts, change: dict[str, str], reason: str, is_final: bool
) -> None:
    with pytest.raises(RefusedError, match=reason) as caught:
        dialer(made).dial(HELLO | change)
    assert caught.value.is_final is is_final
    assert hosts.names() == {}


@pytest.mark.parametrize(
    "change",
    [
        {"role": "guest"},
        {"name": ""},
        {"name": "a\nb"},
        {"name": 3},
        {"devices": 0},
        {"devices": True},
        {"devices": 9999},
    ],
    ids=str,
)
def test_a_greeting_that_makes_no_sense_is_refused(made: Machines, hosts: Hosts, change: dict[str, object]) -> None:
    with pytest.raises(ChannelClosedError):
        dialer(made).dial(HELLO | change)
    assert hosts.names() == {}


def test_a_name_is_taken_until_its_agent_is_gone(made: Machines, hosts: Hosts) -> None:
    first = dialer(made).dial(HELLO)
    with pytest.raises(RefusedError, match="here already") as caught:
        dialer(made).dial(HELLO)
    assert not caught.value.is_final
    first.close()
    second = dialer(made).dial(HELLO)
    assert hosts.names() == {"a": 2}
    second.close()


def test_slots_stay_with_their_machine(made: Machines, hosts: Hosts) -> None:
    def never() -> bool:
        return False

    b = dialer(made).dial(HELLO | {"name": "b", "devices": 1})
    a = dialer(made).dial(HELLO)
    assert hosts.wait(3, time.monotonic() + 10.0, never) == (0, 1, 2)
    assert [hosts.locate(slot)[0].name for slot in range(3)] == ["a", "a", "b"]
    a.close()
    assert hosts.wait(1, time.monotonic() + 10.0, never) == (2,)
    c = dialer(made).dial(HELLO | {"name": "0", "devices": 1})
    assert hosts.wait(1, time.monotonic() + 10.0, never) == (2, 3)
    a = dialer(made).dial(HELLO | {"devices": 3})
    assert hosts.here() == (0, 1, 2, 3, 4)
    assert [hosts.locate(slot)[0].name for slot in range(5)] == ["a", "a", "b", "0", "a"]
    assert hosts.locate(4)[1] == 2
    for channel in (a, b, c):
        channel.close()
    assert hosts.wait(1, time.monotonic() + 0.3, never) == ()


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o666])
def test_a_secret_that_others_may_read_is_refused(made: Machines, mode: int) -> None:
    made.secret_file.chmod(mode)
    with pytest.raises(ConfigError, match="chmod 600"):
        read_secret(str(made.secret_file))
    with pytest.raises(ConfigError, match="chmod 600"):
        Hosts(OrchestratorConfig(**made.options()), 2)


@pytest.mark.parametrize(("content", "reason"), [("short", "openssl rand"), ("", "openssl rand"), ("x" * 5000, "4096")])
def test_a_secret_has_a_length(made: Machines, content: str, reason: str) -> None:
    made.secret_file.write_text(content)
    with pytest.raises(ConfigError, match=reason) as caught:
        read_secret(str(made.secret_file))
    assert "short" not in str(caught.value).replace("shortest", "")


def test_a_secret_is_a_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can be read"):
        read_secret(str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="can be read"):
        read_secret(str(tmp_path))


@pytest.mark.parametrize(
    "options",
    [
        {"listen": "127.0.0.1"},
        {"listen": "127.0.0.1:70000"},
        {"listen": "::1:5"},
        {"listen": "127.0.0.1:0"},  # and no secret
        {"listen": "127.0.0.1:0", "secret_file": "f", "process_per_device": False},
        {"local_devices": 0},
        {"cluster": "other"},
        {"num_hosts": -1},
    ],
    ids=str,
)
def test_settings_that_make_no_sense(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        OrchestratorConfig(**options)


def test_a_port_that_is_taken(made: Machines, hosts: Hosts) -> None:
    with pytest.raises(ConfigError, match="listen"):
        Hosts(OrchestratorConfig(**made.options()), 2)
