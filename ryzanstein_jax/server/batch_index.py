"""Which lines of a batch file there are and which are answered: what makes a batch resumable.

A line is known by its `custom_id`, and one without by its number. All that is kept of a line is a digest of that, its
number and whether it is answered, 25 bytes in all.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ryzanstein_jax.errors import ConfigError

#: Longest `custom_id`, in characters.
MAX_ID = 512
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Line:
    """One line of a batch file.

    Attributes:
        number: counted from 1, blank ones too.
        raw: its bytes; None where there are more than are allowed.
    """

    number: int
    raw: bytes | None


def read_lines(file: BinaryIO, most: int) -> Iterator[Line]:
    """The lines of a file that are not blank; never more than `most` bytes of one are held."""
    number = 0
    while raw := file.readline(most + 1):
        number += 1
        if len(raw) > most and not raw.endswith(b"\n"):
            while (more := file.readline(_CHUNK)) and not more.endswith(b"\n"):
                pass
            yield Line(number, None)
        elif stripped := raw.strip():
            yield Line(number, stripped)


def _object_of(raw: bytes | None) -> dict[str, Any]:
    """A line as JSON; empty where it is no object."""
    try:
        value = json.loads(raw or b"")
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _id_of(value: dict[str, Any]) -> str | None:
    found = value.get("custom_id")
    return found if isinstance(found, str) and 0 < len(found) <= MAX_ID else None


def custom_id_of(raw: bytes | None) -> str | None:
    """The id of a line; None where it has none that can be told."""
    return _id_of(_object_of(raw))


def _digest(custom_id: str | None, number: int) -> bytes:
    named = f"line {number}" if custom_id is None else f"id {custom_id}"
    return hashlib.blake2b(named.encode("utf-8", "surrogatepass"), digest_size=16).digest()


class BatchIndex:
    """The lines of an input file, in memory as digests.

    Args:
        path: the file; it is read once, line by line.
        most: bytes that a line may have; longer ones count as lines without an id.

    Raises:
        ConfigError: the file can't be read, holds no line, or two lines have one `custom_id`.
    """

    def __init__(self, path: Path, most: int):
        self._path, digests, numbers = path, bytearray(), bytearray()
        try:
            with path.open("rb") as file:
                for line in read_lines(file, most):
                    digests += _digest(custom_id_of(line.raw), line.number)
                    numbers += line.number.to_bytes(8, "little")
        except OSError as error:
            raise ConfigError("input", str(path), f"it can't be read: {error.strerror}") from error
        high, low = np.frombuffer(digests, "<u8").reshape(-1, 2).T
        order = np.lexsort((low, high))
        self._high, self._low, self._numbers = high[order], low[order], np.frombuffer(numbers, "<u8")[order]
        self._done = np.zeros(len(order), bool)
        if not len(order):
            raise ConfigError("input", str(path), "it holds no line")
        twice = (self._high[1:] == self._high[:-1]) & (self._low[1:] == self._low[:-1])
        if twice.any():
            one = int(twice.argmax())
            first, second = sorted(map(int, self._numbers[one : one + 2]))
            remedy = f"lines {first} and {second} have the same custom_id: each must have its own"
            raise ConfigError("input", str(path), remedy)

    def __len__(self) -> int:
        return len(self._done)

    @property
    def num_done(self) -> int:
        return int(self._done.sum())

    def _place(self, custom_id: str | None, number: int) -> int | None:
        high, low = np.frombuffer(_digest(custom_id, number), "<u8")
        place = int(np.searchsorted(self._high, high))
        while place < len(self) and self._high[place] == high:
            if self._low[place] == low:
                return place
            place += 1
        return None

    def is_done(self, custom_id: str | None, number: int) -> bool:
        """Whether a line is answered.

        Raises:
            ConfigError: there was no such line when the file was read first.
        """
        place = self._place(custom_id, number)
        if place is None or (custom_id is not None and self._numbers[place] != number):
            raise ConfigError(
                "input", str(self._path), f"line {number} was changed while it was worked on: start again"
            )
        return bool(self._done[place])

    def note_answer(self, raw: bytes | None, number: int, path: Path) -> bool:
        """Takes a line of the output file; returns whether it is an answer, and no error.

        Raises:
            ConfigError: it answers no line of the input, or one that is answered already.
        """
        answer = _object_of(raw)
        custom_id, error = _id_of(answer), answer.get("error")
        of = error.get("line") if custom_id is None and isinstance(error, dict) else 0
        if not {"id", "custom_id", "response", "error"} <= answer.keys() or type(of) is not int:
            remedy = f"line {number} is no answer of a batch: name another file, or remove the line"
            raise ConfigError("output", str(path), remedy)
        place = self._place(custom_id, of)
        if place is None:
            remedy = (
                f"line {number} answers no line of {self._path.name}: name another output, or the input that it is of"
            )
            raise ConfigError("output", str(path), remedy)
        if self._done[place]:
            raise ConfigError("output", str(path), f"line {number} answers what another one has: remove one of them")
        self._done[place] = True
        response = answer.get("response")
        return isinstance(response, dict) and response.get("status_code") == 200
