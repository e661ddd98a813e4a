"""Costs of collectives, by hand."""

import pytest

from ryzanstein_jax.communication import Collective
from ryzanstein_jax.planner.devices import DEVICES, Link
from ryzanstein_jax.planner.links import all_gather, all_reduce, one_shot, ring, seconds, tree, two_shot

#: Round numbers: 100 bytes a second, 50 in an all-reduce, 10 s to start, 1 s a message, 4 s a kernel.
LINK = Link(bandwidth=100, bus_bandwidth=50, start=10, hop=1, kernel=4)
PCIE = Link(bandwidth=100, bus_bandwidth=50, start=10, hop=1)


def test_by_hand():
    # 6 messages that wait, and 2 * 3/4 * 400 bytes at 50 a second.
    assert ring(400, 4, LINK) == pytest.approx(10 + 6 + 12)
    # Up two levels and down two, all bytes both times.
    assert tree(400, 4, LINK) == pytest.approx(10 + 4 + 16)
    # Three peers' 400 bytes at 100 a second.
    assert one_shot(400, 4, LINK) == pytest.approx(4 + 12)
    assert two_shot(400, 4, LINK) == pytest.approx(8 + 6)
    assert all_gather(400, 4, LINK) == pytest.approx(10 + 3 + 6)


@pytest.mark.parametrize(
    ("size", "width", "chosen"),
    [
        (256 << 10, 8, "one-shot"),
        ((256 << 10) + 1, 8, "two-shot"),
        (2 << 20, 8, "two-shot"),
        ((2 << 20) + 1, 8, "tree"),
        (64 << 20, 8, "ring"),
        (64 << 20, 1, "none"),
    ],
)
def test_the_algorithm_follows_the_size(size, width, chosen):
    assert all_reduce(size, width, DEVICES["h100"].link)[0] == chosen


def test_the_cheaper_of_ring_and_tree():
    for size in (1.0, 400.0, 1e6):
        for width in (2, 3, 8):
            best = min(ring(size, width, PCIE), tree(size, width, PCIE))
            assert all_reduce(size, width, PCIE)[1] == best
    assert all_reduce(1, 16, PCIE)[0] == "tree"  # 8 waits instead of 30
    assert all_reduce(1e6, 16, PCIE)[0] == "ring"
    with pytest.raises(ValueError, match="do not read"):
        one_shot(1, 2, PCIE)


def test_h100_is_as_others_measured_it():
    """NCCL 20-25 us up to 1 MiB on 8 H100s; one-shot kernels 6-8 us at 4-32 KB; 480 GB/s on the bus."""
    link = DEVICES["h100"].link
    assert 20e-6 <= min(ring(32 << 10, 8, link), tree(32 << 10, 8, link)) <= 25e-6
    assert 20e-6 <= min(ring(1 << 20, 8, link), tree(1 << 20, 8, link)) <= 27e-6
    for size in (4 << 10, 32 << 10):
        assert 6e-6 <= all_reduce(size, 8, link)[1] <= 8e-6
    size = 1 << 30
    assert 2 * 7 / 8 * size / all_reduce(size, 8, link)[1] == pytest.approx(480e9, rel=0.02)


def test_each_kind_by_its_law_or_as_it_was_measured():
    assert seconds(Collective("all-reduce", 400, 4, 1), PCIE) == all_reduce(400, 4, PCIE)[1]
    assert seconds(Collective("all-gather", 400, 4, 7), PCIE) == all_gather(400, 4, PCIE)
    # Its result is a part of what goes in.
    assert seconds(Collective("reduce-scatter", 100, 4, 1), PCIE) == all_gather(400, 4, PCIE)
    measured = Link(100, 50, start=10, hop=1, measured={"reduce-scatter": (3.0, 0.5)})
    assert seconds(Collective("reduce-scatter", 100, 4, 1), measured) == 3 + 0.5 * 400
    assert seconds(Collective("all-reduce", 400, 4, 1), measured) == all_reduce(400, 4, measured)[1]
    with pytest.raises(ValueError, match="all-to-all"):
        seconds(Collective("all-to-all", 400, 4, 1), PCIE)
