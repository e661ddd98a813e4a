"""Which sequences may be the reason that devices were lost, and who must run alone until that is known.

A sequence gets a strike when the devices are lost while it is on them, and loses all strikes once it has got past
where it was then. With two it runs alone: if it is innocent it gets past, if not its fourth strike convicts it, and
nobody else with it. Once alone is not enough: a device that fails three times in a row by itself would convict whoever
was on it, just when the recovery policy leaves it out.
"""

from __future__ import annotations

from collections.abc import Iterable

from ryzanstein_jax.engine.sequence import Sequence
from ryzanstein_jax.errors import PoisonRequestError

_ALONE, _CONVICTED = 2, 4
#: Tokens of a sequence that may have been on the devices, unknown to the scheduler, when they were lost.
_IN_FLIGHT = 2


class Suspects:
    """The strikes of one scheduler's sequences."""

    def __init__(self) -> None:
        self._isolated: list[Sequence] = []  # in order

    def blame(self, sequences: Iterable[Sequence]) -> None:
        """The devices were lost with these on them."""
        for sequence in set(sequences):
            if sequence.finished:
                continue
            sequence.num_strikes += 1
            sequence.innocent_from = len(sequence.token_ids) + _IN_FLIGHT + 1
            if sequence.num_strikes == _ALONE:
                self._isolated.append(sequence)
        self._isolated.sort(key=lambda sequence: sequence.order)

    def take_over(self, sequence: Sequence) -> None:
        """A sequence begins anew, here or from another scheduler, with the strikes that it has."""
        if sequence.num_strikes >= _ALONE:
            self._isolated.append(sequence)
            self._isolated.sort(key=lambda sequence: sequence.order)

    def clear_if_past(self, sequence: Sequence) -> None:
        """Called when a sequence got a token."""
        if sequence.num_strikes and len(sequence.token_ids) >= sequence.innocent_from:
            sequence.num_strikes = 0

    def alone(self) -> Sequence | None:
        """Who must run alone now."""
        while self._isolated and (self._isolated[0].finished or self._isolated[0].num_strikes < _ALONE):
            del self._isolated[0]
        return self._isolated[0] if self._isolated else None


def conviction(sequence: Sequence) -> PoisonRequestError | None:
    """The error that a sequence ends with after too many strikes."""
    if sequence.num_strikes < _CONVICTED:
        return None
    return PoisonRequestError(
        f"request {sequence.request_id!r} was ended: the devices were lost {sequence.num_strikes} times in a row "
        "while it ran, the last two times with nothing beside it"
    )
