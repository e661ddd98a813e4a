"""What a collective costs: messages that wait for each other (alpha) and bytes on the links (beta)."""

from __future__ import annotations

import math

from ryzanstein_jax.communication import Collective
from ryzanstein_jax.planner.devices import Link

#: XLA's kernels that read peers' memory: one pass up to this many bytes, two up to the second; then NCCL.
ONE_SHOT_BYTES = 256 << 10
TWO_SHOT_BYTES = 2 << 20


def ring(size: float, width: int, link: Link) -> float:
    """Seconds of an all-reduce of `size` bytes around a ring: 2 (n - 1) messages, each 1/n of the bytes."""
    return link.start + 2 * (width - 1) * link.hop + 2 * (width - 1) / width * size / link.bus_bandwidth


def tree(size: float, width: int, link: Link) -> float:
    """Seconds up and down a tree: 2 log2(n) messages that wait, and all bytes up and all bytes down."""
    return link.start + 2 * math.ceil(math.log2(width)) * link.hop + 2 * size / link.bus_bandwidth


def one_shot(size: float, width: int, link: Link) -> float:
    """Seconds of one kernel in which each device reads what all others have: one wait, (n - 1) times the bytes.

    Raises:
        ValueError: the link has no such kernel.
    """
    if link.kernel is None:
        raise ValueError("these devices do not read each other's memory")
    return link.kernel + (width - 1) * size / link.bandwidth


def two_shot(size: float, width: int, link: Link) -> float:
    """Seconds of one kernel that reduces a part on each device and then reads all parts: two waits.

    Raises:
        ValueError: as `one_shot`.
    """
    if link.kernel is None:
        raise ValueError("these devices do not read each other's memory")
    return 2 * link.kernel + 2 * (width - 1) / width * size / link.bandwidth


def all_reduce(size: float, width: int, link: Link) -> tuple[str, float]:
    """Algorithm and seconds of an all-reduce of `size` bytes: XLA's choice of kernels, else the faster of NCCL's."""
    if width == 1:
        return "none", 0.0
    if link.kernel is not None and size <= ONE_SHOT_BYTES:
        return "one-shot", one_shot(size, width, link)
    if link.kernel is not None and size <= TWO_SHOT_BYTES:
        return "two-shot", two_shot(size, width, link)
    return min((("ring", ring(size, width, link)), ("tree", tree(size, width, link))), key=lambda found: found[1])


def all_gather(size: float, width: int, link: Link) -> float:
    """Seconds until each device has all `size` bytes, of which each had 1/n: n - 1 messages around a ring."""
    if width == 1:
        return 0.0
    return link.start + (width - 1) * link.hop + (width - 1) / width * size / link.bus_bandwidth


def seconds(found: Collective, link: Link) -> float:
    """Seconds that one such collective takes, as the link was measured or else by the laws above.

    A reduce-scatter is an all-gather the other way round: as many messages and bytes. It is counted by what goes in,
    `group` times its result.

    Raises:
        ValueError: it is neither an all-reduce nor one of those two.
    """
    width = found.group
    size = found.bytes * (width if found.kind == "reduce-scatter" else 1)
    if found.kind in link.measured:
        alpha, beta = link.measured[found.kind]
        return alpha + beta * size
    if found.kind == "all-reduce":
        return all_reduce(size, width, link)[1]
    if found.kind in ("all-gather", "reduce-scatter"):
        return all_gather(size, width, link)
    raise ValueError(f"the planner has no law for {found.kind}")
