"""What the original design promised, beside what a plan says of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ryzanstein_jax.planner.estimate import Estimate, Plan


@dataclass(frozen=True)
class Target:
    """A promise of the original design.

    Attributes:
        name: as people say it.
        width: that it is made for; None: for all.
        speedup: least speedup of a decode step over one device.
        communication_share: most of a step that goes to communication.
        token_seconds: most time of a step.
    """

    name: str
    width: int | None = None
    speedup: float | None = None
    communication_share: float | None = None
    token_seconds: float | None = None

    def met(self, row: Estimate) -> bool:
        if self.speedup is not None:
            return row.speedup >= self.speedup
        if self.communication_share is not None:
            return row.step.communication_share < self.communication_share
        assert self.token_seconds is not None
        return row.step.total < self.token_seconds


TARGETS = (
    Target("1.9x on 2 devices", 2, speedup=1.9),
    Target("3.8x to 4.2x on 4", 4, speedup=3.8),
    Target("7.9x on 8", 8, speedup=7.9),
    Target("communication below 10% of a step", communication_share=0.1),
    Target("a token in less than 50 ms", token_seconds=0.05),
)


@dataclass(frozen=True)
class Verdict:
    """One target at one width of a plan.

    Attributes:
        target: what was promised.
        device, width: of the rows looked at.
        met, missed: batches at which the plan says so, of those that fit the device.
        too_large: batches that do not fit.
        best: the row that comes closest; None where none fits.
    """

    target: Target
    device: str
    width: int
    met: tuple[int, ...]
    missed: tuple[int, ...]
    too_large: tuple[int, ...]
    best: Estimate | None

    def __str__(self) -> str:
        if self.best is None:
            return f"nothing fits: batch {_numbers(self.too_large)}"
        if not self.missed:
            said = "yes"
        elif not self.met:
            said = "no"
        else:
            said = f"at batch {_numbers(self.met)}, not at {_numbers(self.missed)}"
        if self.too_large:
            said += f" ({_numbers(self.too_large)} does not fit)"
        return f"{said}; best {self._closest(self.best)}"

    def _closest(self, row: Estimate) -> str:
        if self.target.speedup is not None:
            budget = row.communication_budget(self.target.speedup)
            need = f"may take {1e3 * budget:.2f} ms" if budget > 0 else "would have to be free, and that is not enough"
            return (
                f"{row.speedup:.2f}x at batch {row.batch}, where communication takes {1e3 * row.step.communication:.2f}"
                f" ms of {1e3 * row.step.total:.2f} and {need}"
            )
        if self.target.communication_share is not None:
            return f"{row.step.communication_share:.0%} at batch {row.batch}"
        return f"{1e3 * row.step.total:.2f} ms at batch {row.batch}"


def verdicts(plan: Plan, targets: Sequence[Target] = TARGETS) -> list[Verdict]:
    """Each target at each device and width of the plan that it speaks of."""
    found = []
    for target in targets:
        for device in plan.devices:
            for width in plan.widths:
                if width == 1 and target.token_seconds is None:
                    continue
                if target.width not in (None, width):
                    continue
                rows = [row for row in plan.rows if row.device == device and row.width == width]
                fitting = [row for row in rows if row.memory.fits]
                met = tuple(row.batch for row in fitting if target.met(row))
                missed = tuple(row.batch for row in fitting if not target.met(row))
                large = tuple(row.batch for row in rows if not row.memory.fits)
                best = max(fitting, key=lambda row: _score(target, row), default=None)
                found.append(Verdict(target, device, width, met, missed, large, best))
    return found


def _score(target: Target, row: Estimate) -> float:
    if target.speedup is not None:
        return row.speedup
    return -row.step.communication_share if target.communication_share is not None else -row.step.total


def _numbers(values: Sequence[int]) -> str:
    return ", ".join(str(value) for value in values)
