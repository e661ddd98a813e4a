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
from ryzanstein_jax.memory import device_bytes
from ryzanstein_jax.model.families import spec_from_config
from ryzanstein_jax.model.layers import product
from ryzanstein_jax.planner.calibration import Calibration, Measured
from ryzanstein_jax.planner.devices import Device
from ryzanstein_jax.planner.roofline import Step, predict
from ryzanstein_jax.request import SamplingParams
from ryzanstein_jax.sharding import make_mesh

#: Weights of a pass: far more than a cache holds, and on a GPU so many in each product that its start doesn't count.
_PAIRS = 12
_KERNEL = {"cpu": (1024, 4096), "gpu": (4096, 14336)}
_ROWS = (1, 4, 16, 64, 256, 512)
_SIZES = (4 << 10, 64 << 10, 1 << 20, 8 << 20)
_REPEATS = 10
_SECONDS = 0.5  # about how long each of them is repeated
#: One layer, and so little of everything that a step of it is the host's work.
_TINY = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 256, "hidden_size": 64,
    "num_hidden_layers": 1, "num_attention_heads": 8, "num_key_value_heads": 8, "intermediate_size": 64,
    "max_position_embeddings": 256, "torch_dtype": "float32",
}  # fmt: skip

#: A small model of usual proportions, and the steps of it that are timed: (sequences that decode, prompt tokens).
_REFERENCE = {
    **_TINY, "vocab_size": 16384, "hidden_size": 512, "num_hidden_layers": 8, "num_key_value_heads": 4,
    "intermediate_size": 1536, "max_position_embeddings": 512,
}  # fmt: skip
_PROMPT = 8  # tokens before the decodes
_STEPS = ((1, 0), (8, 0), (0, 480))

Progress = Callable[[str], None]


def calibrate(widths: Sequence[int] | None = None, progress: Progress = lambda what: None) -> Calibration:
    """Measures the devices of this process, all devices of a width at once.

    Args:
        widths: 1, 2, 4 ... up to the number of GPUs, or on a CPU of its cores, if None.
        progress: called with what is being measured.

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
    measured = []
    for width in chosen:
        mesh = make_mesh(width)
        progress(f"width {width}: matrix products")
        bandwidth, rates = _products(mesh, dtype)
        progress(f"width {width}: all-reduces")
        alpha, beta = _all_reduces(mesh, dtype)
        progress(f"width {width}: the host's share of a step")
        measured.append(Measured(width, bandwidth, rates, alpha, beta, _host_seconds(width)))
    title = devices[0].device_kind if kind == "gpu" else f"{cores} cores of {_processor()}"
    found = Calibration(
        title, kind, str(dtype), device_bytes(1, devices[0]), datetime.now(UTC).isoformat(timespec="seconds"),
        {"jax": jax.__version__, "python": platform.python_version()}, tuple(measured),
    )  # fmt: skip
    for place, one in enumerate(measured):
        progress(f"width {one.width}: steps of a small model")
        measured[place] = replace(one, overheads=_overheads(found.device(one.width), one.width, str(dtype)))
    return replace(found, widths=tuple(measured))


def _products(mesh: Mesh, dtype: np.dtype) -> tuple[float, tuple[tuple[int, float], ...]]:
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


def _all_reduces(mesh: Mesh, dtype: np.dtype) -> tuple[float, float]:
    """alpha and beta of an all-reduce inside a program; zeros at width 1."""
    if mesh.size == 1:
        return 0.0, 0.0

    def run(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, _REPEATS, lambda i, y: jax.lax.psum(y, "tp") * 0.5, x)

    mapped = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=P("tp"), out_specs=P("tp"), check_vma=False))
    times = []
    for size in _SIZES:
        x = _filled(mesh, (mesh.size, size // dtype.itemsize), dtype, 1.0)
        times.append(_median(partial(mapped, x)) / _REPEATS)
    fit = fit_alpha_beta(_SIZES, times)
    return fit.alpha, fit.beta


def _host_seconds(width: int) -> float:
    """Seconds of a step of a tiny model, one sequence decoding."""
    with _engine(_TINY, width, max_num_seqs=1, max_num_batched_tokens=16) as engine:
        return _decode_seconds(engine, 1, 200)


def _overheads(device: Device, width: int, dtype: str) -> tuple[tuple[int, float], ...]:
    """(tokens, factor): how many times longer than its products and bytes a step of the small model takes."""
    spec, found = spec_from_config(_REFERENCE), []
    sizes = {
        "max_num_seqs": max(decodes for decodes, _ in _STEPS),
        "max_num_batched_tokens": max(16, *(prompt for _, prompt in _STEPS)),
    }
    with _engine(_REFERENCE, width, dtype=dtype, **sizes) as engine:
        for decodes, prompt in _STEPS:
            if prompt:
                step, seconds = Step(prefill=prompt), _prompt_seconds(engine, prompt)
            else:
                step, seconds = Step(decodes, context=_PROMPT + 32), _decode_seconds(engine, decodes, 64)
            time = predict(spec, device, step, width=width, dtype=dtype)
            working = time.device - time.communication
            found.append((step.tokens, max(1.0, (seconds - time.communication) / working)))
    return tuple(sorted(found))


@contextmanager
def _engine(shape: dict[str, Any], width: int, **settings: Any) -> Iterator[Engine]:
    """An engine with random weights."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(shape))
        config = EngineConfig(
            folder, load_format="dummy", tensor_parallel_size=width, compilation_cache_dir="", **settings
        )
        opened = open_model(config)
        executor = LocalExecutor(config, opened.files, opened.spec)
    try:
        yield Engine(executor, eos_token_ids=(), config=config)
    finally:
        executor.close()


def _decode_seconds(engine: Engine, sequences: int, tokens: int) -> float:
    """Median time of a step in which that many sequences decode, each to so many tokens."""
    for number in range(sequences):
        prompt = [(number + place) % 251 for place in range(_PROMPT)]
        engine.add(str(number), prompt, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True))
    times = []
    while engine.has_unfinished():
        began = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - began)
    return float(np.median(times))


def _prompt_seconds(engine: Engine, length: int) -> float:
    """Median time from a prompt to its first token, each prompt a new one."""
    times = []
    for number in range(6):
        began = time.perf_counter()
        prompt = [(number + 1) * (place + 1) % 251 for place in range(length)]
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
