"""A runner that is watched: a JAX trace of some steps, and a table of where the time of each went.

A step's host time is what passes between the end of the call before it and the beginning of its own, while the device
still had a step to do: scheduling, the tokens of the step before it, streams; in a rank also the way from the leader.

The device works on one step after the other, so a step's device time is what passes from its dispatch, or the end of
the one before it if that is later, to its own end. Whoever waits for it sees that end: where the host came late and
had nothing to wait for, the device time is an upper bound, and such steps are counted.
"""

from __future__ import annotations

import json
import logging
import statistics
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import jax

from ryzanstein_jax.engine.runner import Runner
from ryzanstein_jax.errors import ConfigError
from ryzanstein_jax.plan import StepPlan, StepResult

#: Steps that are left out before those that are watched: the first of each program are slower than the others.
SKIPPED = 8

#: Whoever waits less than this, in seconds, came too late to see the end of a step.
_NO_WAIT = 20e-6


@dataclass(frozen=True)
class StepTimes:
    """Where the time of one step went, in seconds.

    Attributes:
        step: its number since the start of the executor.
        decodes, prompt_tokens, rows: what it computed.
        host: before it was handed over; None where the device had nothing to do meanwhile anyway.
        dispatch: packing the plan and handing it over.
        device: computing; where `late`, at most so much.
        fetch: waiting for its tokens and copying them.
        late: it had ended before anybody waited.
    """

    step: int
    decodes: int
    prompt_tokens: int
    rows: int
    host: float | None
    dispatch: float
    device: float
    fetch: float
    late: bool


def profile_folder(folder: str) -> Path:
    """A folder of this process in the one that was asked for.

    Raises:
        ConfigError: it can't be written to.
    """
    own = Path(folder) / f"rank-{jax.process_index()}"
    try:
        own.mkdir(parents=True, exist_ok=True)
        (own / "summary.txt").write_text("No step was watched yet.\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError("profile_dir", folder, f"use a folder that can be written to ({error})") from error
    return own


class ProfiledRunner:
    """Runs steps as its runner does, and watches some of them.

    Args:
        runner: that does the work.
        folder: from `profile_folder`; gets `steps.json`, `summary.txt` and the trace, which XProf, TensorBoard and
            Perfetto read.
        steps: how many to watch, after the first `SKIPPED`.
    """

    def __init__(self, runner: Runner, folder: Path, steps: int):
        self._runner, self._folder, self._wanted = runner, folder, steps
        self.limits = runner.limits
        self._seen = 0
        self._tracing = False
        self._times: list[StepTimes] = []
        #: Plan, host time, begin and end of its dispatch; None for a step that is not watched.
        self._submitted: deque[tuple[StepPlan, float | None, float, float] | None] = deque()
        self._last_call = self._last_end = 0.0

    @property
    def num_in_flight(self) -> int:
        return self._runner.num_in_flight

    def submit(self, plan: StepPlan) -> None:
        if self._seen == SKIPPED and self._wanted:
            jax.profiler.start_trace(str(self._folder))
            self._tracing, self._last_call = True, time.perf_counter()
        self._seen += 1
        if not self._tracing:
            self._runner.submit(plan)
            self._submitted.append(None)
            return
        began = time.perf_counter()
        host = began - self._last_call if self._runner.num_in_flight else None
        with jax.profiler.StepTraceAnnotation("step", step_num=plan.step):
            self._runner.submit(plan)
        self._last_call = time.perf_counter()
        self._submitted.append((plan, host, began, self._last_call))

    def collect(self) -> StepResult:
        began = time.perf_counter()
        result = self._runner.collect()
        end = self._last_call = time.perf_counter()
        watched = self._submitted.popleft()
        if watched is not None and self._tracing:
            plan, host, submitted, dispatched = watched
            device, fetch = end - max(submitted, self._last_end), end - began
            work = plan.num_decodes, plan.num_prefill_tokens, len(plan.rows)
            self._times.append(
                StepTimes(plan.step, *work, host, dispatched - submitted, device, fetch, late=fetch < _NO_WAIT)
            )
            if len(self._times) == self._wanted:
                self._finish()
        self._last_end = end
        return result

    def close(self) -> None:
        if self._tracing:
            self._finish()
        self._runner.close()

    def _finish(self) -> None:
        self._tracing, self._wanted = False, 0
        try:
            jax.profiler.stop_trace()
            steps = [asdict(step) for step in self._times]
            (self._folder / "steps.json").write_text(json.dumps(steps, indent=1), encoding="utf-8")
            (self._folder / "summary.txt").write_text(summary(self._times), encoding="utf-8")
        except (OSError, RuntimeError) as error:  # a full disk is no reason to fail a request
            logging.getLogger(__name__).warning("the profile could not be written to %s: %s", self._folder, error)
        self._last_call = time.perf_counter()


def summary(times: Sequence[StepTimes]) -> str:
    """Steps of the same size as one line of medians, in milliseconds; the sums of all below."""
    kinds: dict[tuple[int, bool], list[StepTimes]] = {}
    for step in times:
        # Prompt chunks are of any length: by powers of two there are few kinds of steps.
        kinds.setdefault((step.prompt_tokens.bit_length(), step.decodes > 0), []).append(step)
    lines = [f"{'steps':>6}{'decodes':>9}{'prompt':>8}{'host':>9}{'dispatch':>10}{'device':>9}{'fetch':>9}{'late':>6}"]

    def row(steps: Sequence[StepTimes]) -> str:
        def median(values: Sequence[float]) -> float:
            return 1e3 * statistics.median(values) if values else 0.0

        host = median([step.host for step in steps if step.host is not None])
        return (
            f"{len(steps):6d}{statistics.median(step.decodes for step in steps):9.0f}"
            f"{statistics.median(step.prompt_tokens for step in steps):8.0f}"
            f"{host:9.3f}{median([step.dispatch for step in steps]):10.3f}"
            f"{median([step.device for step in steps]):9.2f}{median([step.fetch for step in steps]):9.2f}"
            f"{sum(step.late for step in steps):6d}"
        )

    lines += [row(steps) for _, steps in sorted(kinds.items())]
    device = 1e3 * sum(step.device for step in times)
    host = 1e3 * sum((step.host or 0.0) + step.dispatch for step in times)
    lines.append(
        f"Medians in ms; in all {device:.1f} ms on the device and {host:.1f} ms of the host beside it. "
        f"Late: ended before the host asked, so that the device may have been idle."
    )
    return "\n".join(lines) + "\n"
