"""Who may talk to whom: both sides prove that they know the secret, and nothing on a socket is ever unpickled."""

import ast
import hmac
import os
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ryzanstein_jax.errors import ConfigError
from ryzanstein_jax.orchestrator.frames import Channel, ChannelClosedError, FrameError, Kind, authenticate
from ryzanstein_jax.plan import MAX_PLAN_BYTES

ORCHESTRATOR = Path(__file__).resolve().parents[2] / "ryzanstein_jax" / "orchestrator"
SECRET = b"open sesame"


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    left, other = Channel.pair()
    right = Channel(other)
    yield left, right
    left.close()
    right.close()


def outcome(call: Callable[[], None]) -> Exception | None:
    try:
        call()
    except (FrameError, ChannelClosedError) as error:
        return error
    return None


def both(ends, secrets=(SECRET, SECRET), leaders=(True, False)) -> list[Exception | None]:
    """How it ended on either side."""
    results: list[Exception | None] = [None, None]

    def run(side: int) -> None:
        call = lambda: authenticate(ends[side], secrets[side], leader=leaders[side], timeout=3.0)  # noqa: E731
        results[side] = outcome(call)

    threads = [threading.Thread(target=run, args=(side,)) for side in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def against(channel: Channel, other: Callable[[], None], timeout: float = 3.0) -> Exception | None:
    """How the leader's side ends when the other one does this."""
    thread = threading.Thread(target=other)
    thread.start()
    error = outcome(lambda: authenticate(channel, SECRET, leader=True, timeout=timeout))
    thread.join()
    return error


def test_both_know_the_secret(ends):
    left, right = ends
    assert both(ends) == [None, None]
    assert left.most == right.most == MAX_PLAN_BYTES
    left.send(Kind.PLAN, b"x" * 1000)
    assert right.receive(1.0) == (Kind.PLAN, b"x" * 1000), "from here on large frames are fine"


@pytest.mark.parametrize("secrets", [(SECRET, b"open barley"), (b"x", SECRET), (SECRET, SECRET + b"!")])
def test_with_another_secret_both_refuse(ends, secrets):
    for error in both(ends, secrets):
        assert isinstance(error, FrameError) and "does not know the secret" in str(error)
        assert not any(secret and secret.decode() in str(error) for secret in secrets)
    assert [end.most for end in ends] == [64, 64], "who failed is not trusted with more"


@pytest.mark.parametrize("leader", [True, False])
def test_two_of_the_same_role_refuse_each_other(ends, leader):
    assert all(isinstance(error, FrameError) for error in both(ends, leaders=(leader, leader)))


def test_the_secret_never_travels_and_each_proof_is_another(ends):
    def record() -> bytes:
        left, right = Channel.pair()
        other = Channel(right)
        seen = bytearray()

        class Spy(Channel):
            def send(self, kind, payload=b"", **more):
                seen.extend(payload)
                super().send(kind, payload, **more)

        left.__class__ = other.__class__ = Spy
        assert both((left, other)) == [None, None]
        left.close()
        other.close()
        return bytes(seen)

    first, second = record(), record()
    assert SECRET not in first and len(first) == 4 * 32
    pieces = {text[begin : begin + 32] for text in (first, second) for begin in range(0, 128, 32)}
    assert len(pieces) == 8


def test_a_reflected_challenge_is_refused(ends):
    left, right = ends

    def echo() -> None:
        for _ in range(2):
            frame = right.receive(1.0)
            if frame is not None:
                right.send(*frame)

    error = against(left, echo)
    assert isinstance(error, FrameError) and "challenge back" in str(error)


def test_a_reflected_proof_is_refused(ends):
    """Its own proof, sent back under another challenge, proves nothing: roles are part of it."""
    left, right = ends

    def mirror() -> None:
        right.receive(1.0)
        right.send(Kind.AUTH, os.urandom(32))
        right.send(*right.receive(1.0))

    error = against(left, mirror)
    assert isinstance(error, FrameError) and "does not know" in str(error)


def test_a_proof_of_another_session_is_refused(ends):
    left, right = ends

    def replay() -> None:
        right.receive(1.0)
        nonce = os.urandom(32)
        right.send(Kind.AUTH, nonce)
        right.send(Kind.AUTH, hmac.digest(SECRET, b"ryzanstein member" + nonce + os.urandom(32), "sha256"))
        right.receive(1.0)

    assert isinstance(against(left, replay), FrameError)


def test_silence_ends_in_time(ends):
    began = time.monotonic()
    assert isinstance(outcome(lambda: authenticate(ends[0], SECRET, leader=True, timeout=0.2)), ChannelClosedError)
    assert time.monotonic() - began < 2.0


def test_one_byte_at_a_time_gets_no_more_time(ends):
    left, right = ends

    def drip() -> None:
        for byte in struct.pack("<4sBxxxI", b"RYZF", Kind.AUTH, 32):
            time.sleep(0.05)
            if outcome(lambda byte=byte: right._socket.send(bytes([byte]))):
                return

    began = time.monotonic()
    assert isinstance(against(left, drip, timeout=0.3), ChannelClosedError)
    assert time.monotonic() - began < 2.0


def test_both_frames_share_one_deadline(ends):
    left, right = ends

    def half() -> None:
        time.sleep(0.8)
        right.send(Kind.AUTH, os.urandom(32))

    began = time.monotonic()
    assert isinstance(against(left, half, timeout=1.0), ChannelClosedError)
    assert time.monotonic() - began < 1.7


def test_who_hangs_up_is_gone(ends):
    left, right = ends
    assert isinstance(against(left, right.close), ChannelClosedError)


@pytest.mark.parametrize(
    "greeting",
    [
        b"GET / HTTP/1.1\r\nHost: leader\r\n\r\n",
        b"\x16\x03\x01" + bytes(200),
        struct.pack("<4sBxxxI", b"RYZF", Kind.AUTH, 31) + bytes(31),
        struct.pack("<4sBxxxI", b"RYZF", Kind.AUTH, 0),
        struct.pack("<4sBxxxI", b"RYZF", Kind.HELLO, 32) + bytes(32),
        struct.pack("<4sBxxxI", b"RYZF", Kind.PLAN, 65),
    ],
    ids=["http", "tls", "short", "empty", "kind", "large"],
)
def test_what_is_no_proof_is_refused_at_once(ends, greeting):
    left, right = ends
    error = against(left, lambda: right._socket.send(greeting))
    assert isinstance(error, FrameError)


def test_before_the_proof_no_frame_may_be_large(ends):
    left, right = ends
    right._socket.send(struct.pack("<4sBxxxI", b"RYZF", Kind.PLAN, MAX_PLAN_BYTES))
    error = outcome(lambda: authenticate(left, SECRET, leader=True, timeout=3.0))
    assert isinstance(error, FrameError) and "over its limit of 64" in str(error)


def test_no_code_path_unpickles():
    files = sorted(ORCHESTRATOR.glob("**/*.py"))
    assert len(files) > 10
    banned = {"pickle", "cPickle", "_pickle", "cloudpickle", "marshal", "shelve", "dill", "joblib", "multiprocessing"}
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
                called = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
                if called in ("__import__", "import_module"):
                    names = [str(getattr(argument, "value", "?")) for argument in node.args[:1]]
                assert called not in ("eval", "exec"), f"{path.name}:{node.lineno} runs what it reads"
            found = {name for name in names if name.split(".")[0] in banned}
            assert not found, f"{path.name}:{node.lineno} imports {found}"


@pytest.mark.parametrize("leader", [True, False])
def test_an_empty_secret_is_refused_before_anything_is_said(ends, leader):
    with pytest.raises(ConfigError, match="empty"):
        authenticate(ends[0], b"", leader=leader)
    assert ends[1].receive(0.05) is None
