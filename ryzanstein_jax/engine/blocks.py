"""The pages of the KV cache: who owns which, and which prompt prefixes they already hold.

With a page size of 4, two sequences that share the prompt `A B C D E F`, and one that ended:

    page        0         1         2         3         4         5         6
             +-------+---------+---------+---------+---------+---------+---------+
    holds    |scratch| A B C D | E F g h | E F x . | P Q R S |    .    |    .    |
    owners   |   -   | s1, s2  |   s1    |   s2    |    -    |    -    |    -    |
    count    |   -   |    2    |    1    |    1    |    0    |    0    |    0    |
    findable |   -   |   yes   |   yes   |   no    |   yes   |   no    |   no    |
             +-------+---------+---------+---------+---------+---------+---------+
                     |<---------- used ----------->|<- idle->|<----- free ------>|

Each page but the scratch page is in one of three states: *used* (its reference count is above 0),
*idle* (nobody's, but its content can still be found by its key) or *free*. Free and idle pages are
available; idle ones are taken last, the longest unused first.

Only full pages get a key. A page's key is a hash of its own tokens and of the key of the page before it, so that a key
stands for everything up to the page's end. The hash is keyed with a secret of this pool: nobody can make up
a prompt that collides with another one's pages. Written pages are never written again while they have a key, so
sharing needs no copies.
"""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np

from ryzanstein_jax.errors import ConfigError, RyzansteinError

_KEY_BYTES = 16


class PagePoolError(RyzansteinError):
    """The page accounting contradicts itself: a defect of the engine, never of a request."""


def extend_keys(keys: list[bytes], token_ids: Sequence[int], count: int, page_size: int, secret: bytes) -> None:
    """Appends to the `keys` of a sequence's full pages those of the further ones, until there are `count`."""
    parent = keys[-1] if keys else b""
    for page in range(len(keys), count):
        tokens = np.array(token_ids[page * page_size : (page + 1) * page_size], "<i4").tobytes()
        parent = hashlib.blake2b(parent + tokens, digest_size=_KEY_BYTES, key=secret).digest()
        keys.append(parent)


class PagePool:
    """Hands out page numbers from 1 to `num_pages - 1`, counts their owners and finds them by content."""

    def __init__(self, num_pages: int, page_size: int, *, enable_prefix_caching: bool = True):
        if num_pages < 2:
            raise ConfigError("num_pages", num_pages, "use at least 2: one is scratch and never holds a sequence")
        self.num_pages, self.page_size = num_pages, page_size
        self.enable_prefix_caching = enable_prefix_caching
        self._secret = os.urandom(16)
        self._references = [0] * num_pages
        self._free = list(range(num_pages - 1, 0, -1))  # a stack: low pages first
        self._idle: OrderedDict[int, None] = OrderedDict()  # the longest unused first
        self._page_of_key: dict[bytes, int] = {}
        self._key_of_page: dict[int, bytes] = {}

    @property
    def num_available(self) -> int:
        """Pages that `acquire` can hand out."""
        return len(self._free) + len(self._idle)

    @property
    def num_idle(self) -> int:
        """Pages that nobody owns but whose content can still be found."""
        return len(self._idle)

    @property
    def num_used(self) -> int:
        return self.num_pages - 1 - self.num_available

    def extend_keys(self, keys: list[bytes], token_ids: Sequence[int], count: int) -> None:
        """Appends to a sequence's `keys` those of its further full pages, until there are `count`."""
        extend_keys(keys, token_ids, count, self.page_size, self._secret)

    def match(self, keys: Iterable[bytes]) -> list[int]:
        """The pages that hold the longest known prefix of these keys. They are not taken yet: see `acquire`."""
        pages: list[int] = []
        for key in keys:
            page = self._page_of_key.get(key)
            if page is None:
                break
            pages.append(page)
        return pages

    def acquire(self, count: int, shared: Sequence[int] = (), *, reserve: int = 0) -> list[int] | None:
        """Takes the `shared` pages, found by `match`, and `count` new ones.

        Returns:
            `[*shared, *new]`, each with one more owner; None, with nothing taken, where that would
            leave fewer than `reserve` pages available.
        """
        references = self._references
        idle = sum(references[page] == 0 for page in shared)
        if count + idle + reserve > self.num_available:
            return None
        for page in shared:
            if references[page] == 0:
                del self._idle[page]
            references[page] += 1
        pages = list(shared)
        for _ in range(count):
            if self._free:
                page = self._free.pop()
            else:
                page, _ = self._idle.popitem(last=False)
                del self._page_of_key[self._key_of_page.pop(page)]
            references[page] = 1
            pages.append(page)
        return pages

    def register(self, page: int, key: bytes) -> None:
        """Makes an owned page findable. Its tokens must be computed by a step already handed to the device.

        Two sequences may compute the same content side by side; the first page to be registered keeps the key.
        """
        if self.enable_prefix_caching and key not in self._page_of_key and page not in self._key_of_page:
            self._page_of_key[key] = page
            self._key_of_page[page] = key

    def release(self, pages: Sequence[int]) -> None:
        """Gives up one ownership of each page.

        The last pages become idle first, hence are evicted first: a prefix outlives what follows it, and is
        of no use the other way round.
        """
        for page in reversed(pages):
            self._references[page] -= 1
            if self._references[page] == 0:
                if page in self._key_of_page:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def check(self, owners: Iterable[Sequence[int]]) -> None:
        """Verifies the accounting against the pages of each living sequence.

        Raises:
            PagePoolError: a page is owned other than counted, is in two states or in none, or its key is amiss.
        """
        counted = np.array(self._references, np.int64)
        owned = np.zeros(self.num_pages, np.int64)
        for pages in owners:
            if len(set(pages)) != len(pages):
                raise PagePoolError(f"a sequence owns a page twice: {list(pages)}")
            np.add.at(owned, np.array(pages, np.int64), 1)
        if not np.array_equal(counted, owned):
            page = int(np.flatnonzero(counted != owned)[0])
            raise PagePoolError(f"page {page} has {owned[page]} owners but counts {counted[page]}")
        states = (counted > 0).astype(np.int64)
        states[0] += 1  # scratch
        np.add.at(states, np.array(self._free, np.int64), 1)
        np.add.at(states, np.array(list(self._idle), np.int64), 1)
        if (states != 1).any():
            page = int(np.flatnonzero(states != 1)[0])
            raise PagePoolError(f"page {page} is in {states[page]} of the states scratch, used, idle and free")
        if {page: key for key, page in self._page_of_key.items()} != self._key_of_page:
            raise PagePoolError("the two directions of the prefix cache disagree")
        if any(page not in self._key_of_page for page in self._idle):
            raise PagePoolError("an idle page has no key, so that it can't be found")
        if any(page in self._key_of_page for page in self._free):
            raise PagePoolError("a free page can still be found by its key")
