"""Processors that this machine can stand for: kernels are compiled for vectors of every width that it has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import jax

from ryzanstein_jax import native
from ryzanstein_jax.native import Processor


def processors() -> dict[int, Processor]:
    """By lanes: this one, and those whose instructions are a part of its own."""
    here = native.processor()
    found = {here.lanes: here}
    if here.lanes == 16:
        found[8] = Processor("haswell", "", 8)
    if here.lanes:
        found[4] = here._replace(lanes=4)
    return dict(sorted(found.items()))


PROCESSORS = processors()


@contextmanager
def on(lanes: int) -> Iterator[None]:
    """Kernels are registered inside for a processor with such vectors, beside those for others."""
    # A layer that was traced for another processor would be taken as it is.
    jax.clear_caches()
    with (
        patch.object(native, "processor", lambda: PROCESSORS[lanes]),
        patch.object(native, "_registered", _REGISTERED.setdefault(lanes, {})),
    ):
        yield
    jax.clear_caches()


#: XLA keeps what it was told once, so this is kept too.
_REGISTERED: dict[int, dict] = {native.processor().lanes: native._registered}
