"""Which of several replicas gets a request: the one that has its prefix, or else the least loaded. No JAX here.

A replica keeps the pages of prompts that it served. A request whose prompt begins like one of them is cheaper there, so
it goes there, unless that replica is clearly more loaded: then another one computes the prefix once, and has it too.
How much more depends on the prefix: the few tokens that a chat template begins with are worth no detour.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence

from ryzanstein_jax.engine.blocks import extend_keys

#: Leading pages of a prompt that are looked at: what prompts have in common is at their beginning.
_MOST_PAGES = 64
#: So many tokens found outweigh one sequence more that a replica has.
_TOKENS = 64
#: But a replica may never have so many sequences more than the least loaded one, or more than half as many more.
_EXTRA = 4


class Router:
    """Counts what each replica has to do, and remembers what it did lately. Any thread may call it.

    Attributes:
        loads: sequences that each replica has, running or waiting.

    Args:
        num_replicas: how many there are.
        page_size: tokens of a page.
        num_pages: pages that a replica's cache holds, and so how many are remembered.
    """

    def __init__(self, num_replicas: int, page_size: int, num_pages: int):
        self._page_size, self._num_pages = page_size, num_pages
        self._secret = os.urandom(16)
        self._lock = threading.Lock()  # guards what follows
        self._served: list[OrderedDict[bytes, None]] = [OrderedDict() for _ in range(num_replicas)]
        self._taken = [0] * num_replicas  # when each replica was last chosen
        self._count = 0
        self.loads = [0] * num_replicas

    def keys(self, token_ids: Sequence[int]) -> list[bytes]:
        """Of the leading pages of a prompt; none where it fills none, or is no list of token ids."""
        keys: list[bytes] = []
        try:
            # At least one token of a prompt is always computed, so a page that ends with it is never found.
            extend_keys(keys, token_ids, min(_MOST_PAGES, (len(token_ids) - 1) // self._page_size), self._page_size,
                        self._secret)  # fmt: skip
        except (TypeError, ValueError, OverflowError):
            pass  # the engine says what is wrong with it
        return keys

    def take(self, keys: Sequence[bytes], size: int, candidates: Sequence[int]) -> int:
        """Chooses a replica for a request, and counts it there until `leave`.

        Args:
            keys: of its prompt.
            size: how many sequences it has.
            candidates: replicas to choose from; at least one.
        """
        with self._lock:
            chosen = self._choose(keys, candidates)
            self._count += 1
            self._taken[chosen] = self._count
            self.loads[chosen] += size
            served = self._served[chosen]
            for key in reversed(keys):  # a prefix is forgotten after what follows it, as in the cache
                served[key] = None
                served.move_to_end(key)
            while len(served) > self._num_pages:
                served.popitem(last=False)
            return chosen

    def leave(self, replica: int, size: int) -> None:
        """A request of this size has ended, or goes elsewhere."""
        with self._lock:
            self.loads[replica] -= size

    def forget(self, replica: int) -> None:
        """The replica has lost its cache."""
        with self._lock:
            self._served[replica].clear()

    def _choose(self, keys: Sequence[bytes], candidates: Sequence[int]) -> int:
        def cost(replica: int) -> tuple[int, int]:
            found = self._num_known(keys, replica) * self._page_size
            return self.loads[replica] * _TOKENS - found, self._taken[replica]

        least = min(self.loads[replica] for replica in candidates)
        most = least + max(_EXTRA, least // 2)
        return min((replica for replica in candidates if self.loads[replica] <= most), key=cost)

    def _num_known(self, keys: Sequence[bytes], replica: int) -> int:
        """How many leading pages a replica has served."""
        served = self._served[replica]
        return next((count for count, key in enumerate(keys) if key not in served), len(keys))
