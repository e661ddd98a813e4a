"""Measures this machine for the planner: products by rows, all-reduces by size, the host's share of a step."""

from __future__ import annotations

import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import psutil
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ryzanstein_jax.budget import resolve_dtype
from ryzanstein_jax.collectives import fit_alpha_beta
from ryzanstein_jax.config import EngineConfig
from ryzanstein_jax.engine.engine import Engine
from ryzanstein_jax.engine.local import LocalExecutor
from ryzanstein_jax.engine.open import open_model
from ryzanstein_jax.errors import counted
from ryzanstein_jax.memory import device_bytes
from ryzanstein_jax.model.layers import product
from ryzanstein_jax.planner.calibration import REFERENCE, TIMED, TINY, Calibration, Measured, Timed, fit_costs
from ryzanstein_jax.request import SamplingParams
from ryzanstein_jax.sharding import make_mesh

#: Weights of a pass: far more than a cache holds, and on a GPU so many in each product that its start doesn't count.
_PAIRS = 12
_KERNEL = {"cpu": (1024, 4096), "gpu": (4096, 14336)}
_ROWS = (1, 4, 8, 16, 32, 64, 128, 512)
_SIZES = (4 << 10, 64 << 10, 1 << 20, 8 << 20)
_REPEATS = 10
_HOST = Timed(1, 8, 200)
_SECONDS = 0.5  # about how long each of them is repeated
#: What the whole is made to take. Compiling for the first width is in it, and the one thing that can't be cut short.
SECONDS = 90.0

Progress = Callable[[str], None]


def calibrate(
    widths: Sequence[int] | None = None, progress: Progress = lambda what: None, *, seconds: float = SECONDS
) -> Calibration:
    """Measures the devices of this process, all devices of a width at once.

    Args:
        widths: 1, 2, 4 ... up to the number of GPUs, or on a CPU of its cores, if None.
        progress: called with what is being measured.
        seconds: that it may take. A width for which they would not suffice is left out, but for the first; one for
            whose steps they would not suffice takes the costs of the width before it.

    Raises:
        ConfigError: there are fewer devices than the largest width; CPU devices are made only before JAX starts.
    """
    cores = len(os.sched_getaffinity(0))
    if jax.config.jax_num_cpu_devices < (needed := max(widths or (min(cores, 8),))):
        try:
            jax.config.update("jax_num_cpu_devices", needed)
        except RuntimeError:
            pass  # the devices are made already: make_mesh checks their number
    devices = jax.devices()
    most = min(len(devices), cores) if devices[0].platform == "cpu" else len(devices)
    chosen = list(widths or (width for width in (1, 2, 4, 8, 16, 32) if width <= most))
    kind = "cpu" if devices[0].platform == "cpu" else "gpu"
    dtype = resolve_dtype("auto", "bfloat16", kind)
    title = devices[0].device_kind if kind == "gpu" else f"{counted(cores, 'core')} of {_processor()}"
    made = Calibration(
        title, kind, str(dtype), device_bytes(1, devices[0]), datetime.now(UTC).isoformat(timespec="seconds"),
        {"jax": jax.__version__, "python": platform.python_version()}, (),
    )  # fmt: skip
    clock = _Clock(time.monotonic() + seconds)
    for width in chosen:
        if not clock.suffices("parts"):
            break
        with clock.taking("parts"):
            mesh = make_mesh(width)
            progress(f"width {width}: matrix products")
            bandwidth, rates = products(mesh, dtype)
            progress(f"width {width}: collectives")
            one = Measured(width, bandwidth, rates, _collectives(mesh, dtype), 0.0)
        if clock.suffices("steps"):
            with clock.taking("steps"):
                progress(f"width {width}: the host's share of a step")
                one = replace(one, host_seconds=_host_seconds(width), steps_of=width)
                progress(f"width {width}: steps of a small model")
                device = replace(made, widths=(one,)).device(width)
                one = replace(one, costs=fit_costs(device, width, str(dtype), _step_seconds(width, str(dtype))))
        else:
            before = made.widths[-1]
            one = replace(one, host_seconds=before.host_seconds, costs=before.costs, steps_of=before.steps_of)
        made = replace(made, widths=(*made.widths, one))
    return made


class _Clock:
    """Whether there is time for a further part: as much as one of its kind took before.

    Args:
        end: of the time, as of `time.monotonic`.
    """

    def __init__(self, end: float):
        self._end = end
        self._longest: dict[str, float] = {}

    def suffices(self, kind: str) -> bool:
        """Always, for the first of a kind."""
        return kind not in self._longest or time.monotonic() + self._longest[kind] <= self._end

    @contextmanager
    def taking(self, kind: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self._longest[kind] = max(self._longest.get(kind, 0.0), time.monotonic() - began)


def products(mesh: Mesh, dtype: np.dtype) -> tuple[float, tuple[tuple[int, float], ...]]:
    """Bytes of weights a second with one row, and operations a second by rows, of one device while all work."""
    each = NamedSharding(mesh, P("tp"))
    embed, ffn = _KERNEL["cpu" if mesh.devices.flat[0].platform == "cpu" else "gpu"]
    ups, downs = (
        [_filled(mesh, (mesh.size, *kernel), dtype, 1e-3 * (i + 1)) for i in range(_PAIRS)]
        for kernel in ((ffn, embed), (embed, ffn))
    )

    def run(x: jax.Array, ups: list[jax.Array], downs: list[jax.Array]) -> jax.Array:
        y = x[0]
        for up, down in zip(ups, downs, strict=True):
            y = product(product(y, up[0]), down[0])
        return y[None]

    mapped = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=P("tp"), out_specs=P("tp"), check_vma=False))
    weights = 2 * _PAIRS * embed * ffn
    bandwidth, rates = 0.0, []
    for rows in _ROWS:
        x = jax.device_put(jnp.ones((mesh.size, rows, embed), dtype), each)
        seconds = _median(partial(mapped, x, ups, downs))
        rates.append((rows, 2 * rows * weights / seconds))
        bandwidth = max(bandwidth, weights * dtype.itemsize / seconds)
    return bandwidth, tuple(rates)


def _filled(mesh: Mesh, shape: tuple[int, ...], dtype: np.dtype, value: float) -> jax.Array:
    """An array of one value, a part of it on each device."""
    return jax.jit(lambda: jnp.full(shape, value, dtype), out_shardings=NamedSharding(mesh, P("tp")))()


def _collectives(mesh: Mesh, dtype: np.dtype) -> dict[str, tuple[float, float]]:
    """alpha and beta of collectives inside a program; nothing at width 1.

    Bytes are those of the larger of a device's two buffers.
    """
    if mesh.size == 1:
        return {}
    # Each gives what it takes, so that it can be repeated: a gather takes its part of what came before.
    kinds: dict[str, Callable[[jax.Array], jax.Array]] = {
        "all-reduce": lambda y: jax.lax.psum(y, "tp") * 0.5,
        "all-gather": lambda y: jax.lax.all_gather(y[:, : y.shape[1] // mesh.size], "tp", axis=1, tiled=True),
        "reduce-scatter": lambda y: jnp.tile(
            jax.lax.psum_scatter(y, "tp", scatter_dimension=1, tiled=True), (1, mesh.size)
        ) * 0.5,
    }  # fmt: skip
    found = {}
    for kind, collective in kinds.items():

        def run(x: jax.Array, collective: Callable[[jax.Array], jax.Array] = collective) -> jax.Array:
            return jax.lax.fori_loop(0, _REPEATS, lambda i, y: collective(y), x)

        mapped = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=P("tp"), out_specs=P("tp"), check_vma=False))
        times = []
        for size in _SIZES:
            x = _filled(mesh, (mesh.size, size // dtype.itemsize), dtype, 1.0)
            times.append(_median(partial(mapped, x)) / _REPEATS)
        fit = fit_alpha_beta(_SIZES, times)
        found[kind] = (fit.alpha, fit.beta)
    return found


def _host_seconds(width: int) -> float:
    """Seconds of a step of a tiny model, one sequence decoding."""
    with _engine(TINY, width, max_num_seqs=1, max_num_batched_tokens=16) as engine:
        return _decode_seconds(engine, _HOST)


def _step_seconds(width: int, dtype: str) -> list[float]:
    """Seconds of a step of each of `TIMED`."""
    sizes = {
        "max_num_seqs": max(one.decodes for one in TIMED),
        "max_num_batched_tokens": max(16, *(one.prompt for one in TIMED)),
        "max_model_len": max(one.prompt + one.tokens for one in TIMED),
    }
    with _engine(REFERENCE, width, dtype=dtype, **sizes) as engine:
        return [_decode_seconds(engine, one) if one.decodes else _prompt_seconds(engine, one) for one in TIMED]


@contextmanager
def _engine(shape: dict[str, Any], width: int, **settings: Any) -> Iterator[Engine]:
    """An engine with random weights."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(shape))
        config = EngineConfig(
            folder, load_format="dummy", tensor_parallel_size=width, compilation_cache_dir="",
            enable_prefix_caching=False, **settings,
        )  # fmt: skip
        opened = open_model(config)
        executor = LocalExecutor(config, opened.files, opened.spec)
    try:
        yield Engine(executor, eos_token_ids=(), config=config)
    finally:
        executor.close()


def _decode_seconds(engine: Engine, timed: Timed) -> float:
    """Median time of the steps in which all sequences decode."""
    for number in range(timed.decodes):
        prompt = [(number + 1) * (place + 1) % 251 for place in range(timed.prompt)]
        engine.add(str(number), prompt, SamplingParams(temperature=0, max_tokens=timed.tokens, ignore_eos=True))
    times = []
    while engine.has_unfinished():
        began = time.perf_counter()
        found = engine.step()
        if len(found) == timed.decodes:
            times.append(time.perf_counter() - began)
    return float(np.median(times))


def _prompt_seconds(engine: Engine, timed: Timed) -> float:
    """Median time from a prompt to its first token, each prompt a new one."""
    times = []
    for number in range(6):
        began = time.perf_counter()
        prompt = [(number + 1) * (place + 1) % 251 for place in range(timed.prompt)]
        engine.add(str(number), prompt, SamplingParams(temperature=0, max_tokens=1, ignore_eos=True))
        while engine.has_unfinished():
            engine.step()
        times.append(time.perf_counter() - began)
    return float(np.median(times[1:]))


def _median(run: Callable[[], Any], least: int = 5) -> float:
    """Median time of a run, over `_SECONDS` but at least as many runs, after two that are not counted."""
    for _ in range(2):
        jax.block_until_ready(run())
    times: list[float] = []
    while len(times) < least or (sum(times) < _SECONDS and len(times) < 1000):
        began = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - began)
    return float(np.median(times))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine() or f"a machine with {psutil.cpu_count()} processors"
