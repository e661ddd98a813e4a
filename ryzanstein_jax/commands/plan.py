"""`ryzanstein plan`."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ryzanstein_jax.commands.options import CacheDtype, Quantize
from ryzanstein_jax.config import SHARDINGS
from ryzanstein_jax.errors import ConfigError

#: A plan is read as a whole: where the output is no terminal its lines are not folded.
_WIDE = 170


def plan(
    model: Annotated[
        str | None, typer.Argument(help="A shape such as llama-3-8b, or what other commands take: no weights are read.")
    ] = None,
    device: Annotated[
        str,
        typer.Option(help='Such as h100, or h100,h200; "this" is calibrated; "auto": the GPU here, or else "this".'),
    ] = "auto",
    tp: Annotated[
        str | None, typer.Option("--tensor-parallel-size", "--tp", "-t", help="Widths; 1,2,4,8, or what was measured.")
    ] = None,
    batch: Annotated[str, typer.Option(help="Sequences that decode together.")] = "1,8,32",
    context: Annotated[int | None, typer.Option(help="Tokens of each sequence; 8192, or the model's most.")] = None,
    prompt: Annotated[int | None, typer.Option(help="Tokens of the prompt; 2048, or less with the context.")] = None,
    dtype: Annotated[str, typer.Option(help="One of auto, bfloat16, float16, float32.")] = "auto",
    quantization: Quantize = None,
    kv_cache_dtype: CacheDtype = "auto",
    sharding: Annotated[str, typer.Option(help=f"One of {', '.join(SHARDINGS)}; see docs/sharding.md.")] = "megatron",
    memory_fraction: Annotated[float | None, typer.Option(help="Share of each device's memory.")] = None,
    max_num_batched_tokens: Annotated[int, typer.Option(help="Prompt tokens in a step.")] = 512,
    ideal: Annotated[
        bool, typer.Option(help="Programs that reach all of the nominal figures: nothing is faster.")
    ] = False,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile for these GPUs too, without having them.")
    ] = False,
    calibrate: Annotated[bool, typer.Option(help="Measure this machine, for --device this.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Write a picture.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Says what a model takes and how fast it would be on devices that are not here, and what limits it."""
    from ryzanstein_jax import planner
    from ryzanstein_jax.model.families import spec_from_config
    from ryzanstein_jax.planner import report
    from ryzanstein_jax.planner.calibration import load_calibration
    from ryzanstein_jax.planner.shapes import config_of

    console = Console() if Console().is_terminal else Console(width=_WIDE)
    if calibrate:
        _calibrate(console if not as_json else Console(stderr=True))
    if model is None:
        if calibrate:
            return
        raise ConfigError("model", None, "name one, such as llama-3-8b")
    here = "this" if calibrate else None  # what was just measured is what it is measured for
    names = [(here or _device_here()) if name == "auto" else name for name in _parts("device", device)]
    if tp is None:
        measured = load_calibration().widths if "this" in names else ()
        tp = ",".join(str(one.width) for one in measured) or "1,2,4,8"
    most = spec_from_config(config_of(model)).max_position_embeddings
    context = context if context is not None else min(8192, most)
    made = planner.plan(
        model, names, _numbers("tp", tp), _numbers("batch", batch), context=context,
        prompt=prompt if prompt is not None else min(2048, context), dtype=dtype, memory_fraction=memory_fraction,
        quantization=quantization, kv_cache_dtype=kv_cache_dtype, sharding=sharding,
        max_num_batched_tokens=max_num_batched_tokens, shares=(1.0, 1.0) if ideal else None,
    )  # fmt: skip
    programs = _compile(made) if compiled else []
    if plot is not None:
        report.save_plot(made, plot)
    if as_json:
        facts = made.as_dict() | {"compiled": [_facts(*pair) for pair in programs]}
        print(json.dumps(facts, indent=2))
        return
    for name in made.devices:
        console.print(report.plan_table(made, name))
        console.print()
    for line in report.assumptions(made):
        console.print(line, style="dim")
    if made.widths != [1]:
        console.print()
        console.print(report.targets_table(made))
    if programs:
        console.print()
        console.print(report.compiled_table(programs))


def _compile(made: Any) -> list[tuple[Any, Any]]:
    from ryzanstein_jax.model.quantized_checkpoints import quantization_config
    from ryzanstein_jax.planner.compiled import compile_jobs, engine_jobs, expected
    from ryzanstein_jax.planner.shapes import config_of

    setting = made.setting
    batch = max(row.batch for row in made.rows)
    jobs = [
        job
        for device, width in dict.fromkeys((row.device, row.width) for row in made.rows)
        for job in engine_jobs(
            device, width, batch, context=setting.context, page_size=setting.page_size,
            prefill=setting.prompt_tokens(batch), dtype=made.dtype, sharding=setting.sharding,
            kv_cache_dtype=setting.kv_cache_dtype,
        )
    ]  # fmt: skip
    config = config_of(made.model)
    if setting.quantization is not None:
        config["quantization_config"] = quantization_config(made.spec.quantization)
    return [(found, expected(made.spec, found.job)) for found in compile_jobs(config, jobs)]


def _facts(compiled: Any, expected: Any) -> dict[str, Any]:
    from ryzanstein_jax.planner.report import same_collectives

    facts = dataclasses.asdict(compiled)
    facts |= {"total": compiled.total, "cache_in_place": compiled.cache_in_place, "planned": expected.total}
    return facts | {"collectives_as_planned": same_collectives(compiled, expected)}


def _calibrate(console: Console) -> None:
    from ryzanstein_jax.planner.calibrate import calibrate
    from ryzanstein_jax.planner.calibration import save_calibration

    began = time.monotonic()
    with console.status("measuring this machine") as status:
        found = calibrate(progress=lambda what: status.update(f"measuring this machine, {what}"))
    console.print(f"{found.title}, {found.dtype}; written to {save_calibration(found)}")
    for one in found.widths:
        rows, rate = max(one.rates, key=lambda pair: pair[1])
        line = (
            f"  width {one.width}: {one.bandwidth / 1e9:.1f} GB/s and {rate / 1e9:,.0f} Gflop/s ({rows} rows) a device"
        )
        for kind, (alpha, beta) in one.collectives.items():
            line += f", {kind} {1e6 * alpha:.0f} us + {1e12 * beta:.0f} us a MB"
        console.print(f"{line}, host {1e3 * one.host_seconds:.2f} ms a step")
    console.print(f"measured in {time.monotonic() - began:.0f} s")


def _device_here() -> str:
    """The table's device for the GPU that NVML shows, or else the calibrated machine.

    Raises:
        ConfigError: there is neither.
    """
    from ryzanstein_jax.orchestrator.telemetry import GpuTelemetry
    from ryzanstein_jax.planner.calibration import calibration_path
    from ryzanstein_jax.planner.devices import device_of_card

    telemetry = GpuTelemetry()
    cards = [gpu.name for gpu in telemetry.sample().gpus if gpu.name]
    why = f"the table has no {cards[0]}" if cards else telemetry.reason
    telemetry.close()
    known = [found.name for found in map(device_of_card, cards) if found is not None]
    if known:
        return known[0]
    if calibration_path().is_file():
        return "this"
    raise ConfigError(
        "device", "auto", f"{why}: name one, such as h100, or measure this machine: ryzanstein plan --calibrate"
    )


def _parts(field: str, text: str) -> list[str]:
    parts = [part.strip() for part in text.split(",")]
    if not all(parts) or len(parts) > 64:
        raise ConfigError(field, text[:80], "give names or numbers with commas between them, such as 1,2,4")
    return list(dict.fromkeys(parts))


def _numbers(field: str, text: str) -> list[int]:
    parts = _parts(field, text)
    if not all(part.isascii() and part.isdigit() and len(part) < 10 for part in parts):
        raise ConfigError(field, text[:80], "give whole numbers with commas between them, such as 1,2,4")
    return [int(part) for part in parts]
