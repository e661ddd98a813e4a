"""A server under many streams: what its clients see, and what its leader uses."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count, pairwise

import openai
import psutil

from bench.harness import draw
from bench.protocol import ROOT

#: Prompts are random tokens, so that no two share a prefix; completions differ in length, so that streams begin and end
#: at all times and not in step.
PROMPT, SHORTEST, LENGTHS, LONGEST = 16, 16, 17, 80
_START_SECONDS = 300.0


class Server:
    """`ryzanstein serve` in a process of its own, with its devices in others.

    Args:
        popen: the process; its standard error is its log.
    """

    model = "served"  # what clients call it

    def __init__(self, popen: subprocess.Popen[str]):
        self.popen, self.lines = popen, list[str]()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        self.url = f"http://127.0.0.1:{self._await('listening')['port']}"
        self._await("ready")

    def _read(self) -> None:
        assert self.popen.stderr is not None
        self.lines.extend(self.popen.stderr)

    def _await(self, message: str) -> dict[str, object]:
        deadline, seen = time.monotonic() + _START_SECONDS, 0
        while time.monotonic() < deadline and self.popen.poll() is None:
            for line in self.lines[seen:]:
                seen += 1
                found = json.loads(line) if line.startswith("{") else {}
                if found.get("message") == message:
                    return found
            time.sleep(0.05)
        raise RuntimeError("the server did not start: " + "".join(self.lines[-20:]))

    def metrics(self) -> dict[str, float]:
        """Of this moment, by name and labels."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=60) as response:
            rows = [row.rpartition(" ") for row in response.read().decode().splitlines() if not row.startswith("#")]
        return {name: float(value) for name, _, value in rows}

    def close(self) -> None:
        self.popen.terminate()
        try:
            self.popen.wait(30)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()
        self._reader.join()


@contextmanager
def serving(model: str, *options: str) -> Iterator[Server]:
    """A server of the model, until the end of the block."""
    command = [
        sys.executable, "-m", "ryzanstein_jax.cli", "serve", model, "--port", "0", "--served-model-name", Server.model,
        "--executor", "processes", *options,
    ]  # fmt: skip
    server = Server(subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True))
    try:
        yield server
    finally:
        server.close()


@dataclass
class Load:
    """What clients saw. Times are in seconds.

    Attributes:
        first_tokens: from sending a request to its first token.
        gaps: between two pieces of a stream.
        errors: what streams ended with instead of their end.
        memory: of the leader: seconds since the beginning and bytes.
    """

    first_tokens: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    memory: list[tuple[float, int]] = field(default_factory=list)
    num_tokens: int = 0
    num_requests: int = 0

    def memory_at(self, seconds: float) -> int:
        """The first that was seen from then on."""
        return next((size for at, size in self.memory if at >= seconds), self.memory[-1][1])


def press(server: Server, streams: int, seconds: float, vocab_size: int, first_turn: int = 0) -> Load:
    """Keeps so many streams open for so long, each client asking again when its answer has ended.

    All are greedy: sampling is the devices' work. No answer is cut off: the last ones end after the time. Each turn of
    a client has a prompt of its own; `first_turn` is the number of the first.
    """
    load, leader = Load(), psutil.Process(server.popen.pid)

    async def client(number: int, api: openai.AsyncOpenAI, end: float) -> None:
        for turn in count(first_turn):
            if turn > first_turn and time.monotonic() >= end:
                break
            (prompt,) = draw([PROMPT], vocab_size, seed=number * 10_007 + turn)
            wanted = SHORTEST + (7 * number + 11 * turn) % LENGTHS
            try:
                await one(api, prompt, wanted)
            except Exception as error:  # noqa: BLE001 - any is a finding
                load.errors.append(repr(error)[:300])

    async def one(api: openai.AsyncOpenAI, prompt: list[int], wanted: int) -> None:
        times, tokens = [time.monotonic()], 0
        stream = await api.completions.create(
            model=server.model, prompt=prompt, max_tokens=wanted, temperature=0, stream=True,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )  # fmt: skip
        async for chunk in stream:
            tokens += len(chunk.choices[0].model_extra["token_ids"])
            times.append(time.monotonic())
        if tokens != wanted:
            raise ValueError(f"{tokens} tokens instead of {wanted}")
        load.num_requests += 1
        load.num_tokens += tokens
        load.first_tokens.append(times[1] - times[0])
        load.gaps += [after - before for before, after in pairwise(times[1:])]

    async def watch(begun: float) -> None:
        while True:
            load.memory.append((time.monotonic() - begun, leader.memory_info().rss))
            await asyncio.sleep(min(1.0, seconds / 10))

    async def main() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as api:
            begun = time.monotonic()
            watcher = asyncio.create_task(watch(begun))
            await asyncio.gather(*(client(number, api, begun + seconds) for number in range(streams)))
            watcher.cancel()

    asyncio.run(main())
    return load
