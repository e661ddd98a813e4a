"""Who may come in: as many completions as were agreed on, and nobody while the server can't serve."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from contextlib import contextmanager

from ryzanstein_jax.errors import OverloadedError

_MOST_RETRY_AFTER = 60
#: Share of the newest request in the mean duration.
_NEWEST = 0.1


class Admission:
    """Counts completions that are under way or wait. For one event loop.

    Args:
        limit: most of them.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.num_sequences = self.num_requests = 0
        self._seconds: float | None = None  # that a request takes, a moving mean
        self._empty = asyncio.Event()
        self._empty.set()

    @contextmanager
    def enter(self, sequences: int) -> Iterator[None]:
        """Holds a place for a request's completions.

        Raises:
            OverloadedError: there is none; says when there may be.
        """
        if self.num_sequences + sequences > self.limit:
            raise OverloadedError(
                f"Too many requests: {self.num_sequences} completions are under way or waiting, and {self.limit} may "
                "be. Please try again later.",
                self._retry_after(),
            )
        loop = asyncio.get_running_loop()
        started = loop.time()
        self.num_sequences += sequences
        self.num_requests += 1
        self._empty.clear()
        try:
            yield
        finally:
            self.num_sequences -= sequences
            self.num_requests -= 1
            if not self.num_requests:
                self._empty.set()
            took = loop.time() - started
            self._seconds = took if self._seconds is None else self._seconds + _NEWEST * (took - self._seconds)

    def _retry_after(self) -> int:
        """Seconds until a place is likely: requests that started at random times end evenly spread over their mean."""
        wait = (self._seconds or 1.0) / max(1, self.num_requests)
        return min(_MOST_RETRY_AFTER, max(1, math.ceil(wait)))

    async def wait_empty(self, timeout: float) -> bool:
        """Waits until no request is left; False where some are after the time."""
        try:
            await asyncio.wait_for(self._empty.wait(), timeout)
        except TimeoutError:
            return False
        return True
