"""What a collective's time means: bandwidths as nccl-tests defines them, and latency and cost of a byte. No JAX."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ryzanstein_jax.errors import ConfigError

#: The collectives that are measured. "send-recv" is a collective permute: each device sends to the next one.
OPERATIONS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "broadcast", "send-recv")

#: Those that add up, and so grow from one repetition to the next.
REDUCING = ("all-reduce", "reduce-scatter")


def bus_factor(operation: str, devices: int) -> float:
    """Bus bandwidth over algorithm bandwidth, which is bytes over seconds.

    Bytes are those of the larger of a device's two buffers: the result of an all-gather, the input of a
    reduce-scatter. From nccl-tests, doc/PERFORMANCE.md; that of all-to-all and send/recv from src/alltoall.cu
    and src/sendrecv.cu. In-network reduction (NVLS) has another factor there; this one can then exceed the link.

    Raises:
        ConfigError: there is no such collective.
    """
    if operation == "all-reduce":
        return 2 * (devices - 1) / devices
    if operation in ("all-gather", "reduce-scatter", "all-to-all"):
        return (devices - 1) / devices
    if operation in ("broadcast", "send-recv"):
        return 1.0
    raise ConfigError("operation", operation, f"use one of {', '.join(OPERATIONS)}")


@dataclass(frozen=True)
class AlphaBeta:
    """Time of a collective as `alpha + beta * bytes`.

    Attributes:
        alpha: seconds that any size takes.
        beta: seconds a byte.
        error: largest relative error over what it was fitted to: 0.2 is a fifth.
    """

    alpha: float
    beta: float
    error: float

    def seconds(self, size: float) -> float:
        """Predicted time of `size` bytes."""
        return self.alpha + self.beta * size


def fit_alpha_beta(sizes: Sequence[float], seconds: Sequence[float]) -> AlphaBeta:
    """Fits `alpha + beta * bytes` so that the squared *relative* errors are least: 1 KiB counts as much as 1 GiB.

    Neither comes out below 0.

    Args:
        sizes: bytes, at least two different ones.
        seconds: measured times, above 0.

    Raises:
        ConfigError: there are too few, or they are no such numbers.
    """
    x, t = np.asarray(sizes, np.float64), np.asarray(seconds, np.float64)
    if x.shape != t.shape or x.ndim != 1 or len(set(x.tolist())) < 2:
        raise ConfigError("sizes", list(sizes)[:8], "give two different sizes at least, and one time for each")
    if not (np.isfinite(x).all() and np.isfinite(t).all() and (x >= 0).all() and (t > 0).all()):
        raise ConfigError("seconds", list(seconds)[:8], "give finite sizes of 0 or more and times above 0")
    one, slope = 1 / t, x / t
    matrix = np.array([[one @ one, one @ slope], [one @ slope, slope @ slope]])
    scale = np.sqrt(np.diag(matrix))
    right = np.array([one.sum(), slope.sum()])
    alpha, beta = np.linalg.solve(matrix / np.outer(scale, scale), right / scale) / scale
    if alpha < 0:
        alpha, beta = 0.0, slope.sum() / (slope @ slope)
    elif beta < 0:
        alpha, beta = one.sum() / (one @ one), 0.0
    error = float(np.max(np.abs((alpha + beta * x) / t - 1)))
    return AlphaBeta(float(alpha), float(beta), error)


def repeated(operation: str, state: np.ndarray, times: int) -> np.ndarray:
    """What devices hold after a collective was repeated, each on the result of the one before.

    Args:
        operation: of `OPERATIONS`.
        state: `[devices, devices, columns]`: each device's buffer in as many equal parts as there are devices.
        times: repetitions. Repetition i of an all-gather gathers part `i % devices` of all, and that of a
            reduce-scatter puts its result there.

    Returns:
        As `state`.
    """
    count = len(state)
    for i in range(times):
        part = i % count
        if operation == "all-reduce":
            state = np.broadcast_to(state.sum(0), state.shape)
        elif operation == "all-gather":
            state = np.broadcast_to(state[:, part], state.shape)
        elif operation == "reduce-scatter":
            reduced = np.stack([state[:, device].sum(0) for device in range(count)])
            state = state.copy()
            state[:, part] = reduced
        elif operation == "all-to-all":
            state = state.swapaxes(0, 1)
        elif operation == "broadcast":
            state = np.broadcast_to(state[0], state.shape)
        else:
            state = np.roll(state, 1, axis=0)
    return state


def first_values(devices: Sequence[int], parts: int, columns: np.ndarray, width: int) -> np.ndarray:
    """What devices hold before a check: `[devices, parts, columns]` small whole numbers, exact in any type.

    Args:
        devices: of which.
        parts: that each buffer has.
        columns: which columns of a part.
        width: columns that a part has.
    """
    places = np.arange(parts)[:, None] * width + np.asarray(columns)[None, :]
    pattern = (places % 5 + 1).astype(np.float32)
    return np.stack([pattern + device % 8 for device in devices])
