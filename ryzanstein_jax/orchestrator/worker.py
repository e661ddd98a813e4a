"""What a rank runs: it joins the runtime, loads its shard, then runs the steps that the leader sends.

A rank knows nothing of requests. It has two channels: *control*, read by a thread of its own, so that it answers while
a step runs; and *steps*, which brings plans and, from rank 0, takes results.
"""

from __future__ import annotations

import dataclasses
import os
import queue
import threading
import time
import traceback
from functools import partial
from typing import TYPE_CHECKING, Any

from ryzanstein_jax.config import EngineConfig
from ryzanstein_jax.errors import RyzansteinError
from ryzanstein_jax.orchestrator import runtime
from ryzanstein_jax.orchestrator.devices import DeviceReport, cuda_bus_id
from ryzanstein_jax.orchestrator.faults import FaultPlan, InjectedFault
from ryzanstein_jax.orchestrator.frames import Channel, ChannelClosedError, FrameError, Kind, parse_json
from ryzanstein_jax.orchestrator.status import Heartbeat, Phase, RankSpec
from ryzanstein_jax.plan import StepPlan

if TYPE_CHECKING:
    from ryzanstein_jax.engine.local import LocalExecutor

#: A message and a traceback are cut to this many characters.
_MOST_TEXT = 20_000


class Worker:
    """One rank, from joining to the end.

    Args:
        spec: who it is.
        control, steps: its channels to the leader.
    """

    def __init__(self, spec: RankSpec, control: Channel, steps: Channel):
        self._spec, self._control, self._steps = spec, control, steps
        self._beat = Heartbeat()
        self._orders: queue.SimpleQueue[tuple[Kind, dict[str, Any]]] = queue.SimpleQueue()
        self._collecting: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._fault = FaultPlan.parse(spec.fault, spec.rank, spec.generation)
        self._executor: LocalExecutor | None = None

    def run(self) -> None:
        """Returns when the leader closes the steps' channel or says STOP; what goes wrong is reported, then waits."""
        threading.Thread(target=self._beat_for_ever, name="heartbeat", daemon=True).start()
        try:
            self._join()
            threading.Thread(target=self._listen, name="control", daemon=True).start()
            self._load(*self._orders.get())
            self._serve()
        except ChannelClosedError:
            return
        except BaseException as error:  # noqa: BLE001 - the leader decides what to do about it
            self._report(error)
            # The leader ends the whole group; leaving first would look like another fault.
            threading.Event().wait()

    def _join(self) -> None:
        import jax

        spec = self._spec
        count = 1 if spec.slot >= 0 else spec.width // spec.num_processes
        settings = runtime.prepare(spec.slot, count, spec.local_index, spec.local_count, spec.environment)
        if spec.num_processes > 1:
            runtime.join(spec.address, spec.rank, spec.num_processes, hosted=spec.hosted)
        reports = [report_device(device, index, spec.rank) for index, device in enumerate(jax.local_devices())]
        self._beat.phase = Phase.WAITING
        self._control.send_json(
            Kind.HELLO,
            {
                "rank": spec.rank,
                "generation": spec.generation,
                "pid": os.getpid(),
                "num_devices": len(jax.devices()),
                "devices": [report.to_json() for report in reports],
                "communication": [[setting.name, setting.value, setting.origin] for setting in settings],
            },
        )

    def _load(self, kind: Kind, order: dict[str, Any]) -> None:
        from ryzanstein_jax.checkpoint.files import resolve_model
        from ryzanstein_jax.engine.local import LocalExecutor
        from ryzanstein_jax.model.families import spec_from_config

        self._beat.phase = Phase.LOADING
        began = time.monotonic()
        if self._fault.has("start"):
            raise InjectedFault("an exception while loading, as asked for")
        config = EngineConfig(**order["config"])
        files = resolve_model(config.model, config.revision, config.load_format)
        spec = spec_from_config(files.config, max_model_len=config.max_model_len, quantization=config.quantization)

        def progress(what: str, done: int, total: int) -> None:
            self._control.send_json(Kind.PROGRESS, {"what": what, "done": done, "total": total})

        restarted = self._spec.generation > 1  # whoever ran is replayed: full steps come first
        full = (config.max_num_seqs, config.max_num_batched_tokens)
        first = [full, (full[0], 0)] if restarted else [(0, 1), (1, 0)]
        executor = self._executor = LocalExecutor(
            config,
            files,
            spec,
            progress=progress,
            first=first,
            hurry=restarted,
            pause=partial(self._await_start, order) if kind is Kind.PREPARE else None,
        )
        if self._fault.has("lazy"):
            executor.stop_loading()
        if kind is Kind.START:
            self._prepare_probe()
        self._beat.phase = Phase.SERVING
        self._control.send_json(
            Kind.READY,
            {
                "limits": dataclasses.asdict(executor.limits),
                "report": executor.report.to_json(),
                "seconds": time.monotonic() - began,
                "counters": executor.metrics.snapshot()["counters"],
            },
        )

    def _await_start(self, prepared: dict[str, Any]) -> None:
        """What a standby does between its programs and the weights."""
        self._prepare_probe()
        self._beat.phase = Phase.PREPARED
        self._control.send_json(Kind.PREPARED, {})
        _, order = self._orders.get()
        if order["config"] != prepared["config"]:
            raise FrameError("it is to serve with other settings than it was prepared for")
        self._beat.phase = Phase.LOADING

    def _serve(self) -> None:
        executor = self._executor
        assert executor is not None
        collector = threading.Thread(target=self._collect, args=(executor,), name="collect", daemon=True)
        collector.start()
        try:
            while True:
                frame = self._steps.receive()
                assert frame is not None
                kind, payload = frame
                if kind not in (Kind.PLAN, Kind.HASTY_PLAN):
                    raise FrameError(f"a frame {kind.name} where steps come")
                plan = StepPlan.from_bytes(payload)
                self._beat.received += 1
                self._fault.strike(plan.step, plan.token_ids)
                executor.in_haste(kind is Kind.HASTY_PLAN)
                executor.submit(plan)
                self._beat.dispatched += 1
                self._collecting.put(plan.step)
        except ChannelClosedError:
            self._collecting.put(None)
            collector.join(timeout=10.0)
            executor.close()

    def _collect(self, executor: LocalExecutor) -> None:
        """Waits for each step; rank 0 sends what it sampled, which is the same on all."""
        try:
            while self._collecting.get() is not None:
                result = executor.collect()
                self._beat.done += 1
                if self._spec.rank == 0:
                    self._steps.send(Kind.RESULT, result.to_bytes())
        except ChannelClosedError:
            pass
        except BaseException as error:  # noqa: BLE001 - the leader decides what to do about it
            self._report(error)

    # --- control

    def _listen(self) -> None:
        """Reads the control channel for ever; without a leader there is nothing to live for."""
        try:
            while True:
                frame = self._control.receive()
                assert frame is not None
                self._obey(*frame)
        except ChannelClosedError:
            os._exit(0)
        except BaseException as error:  # noqa: BLE001 - the leader decides what to do about it
            self._report(error)

    def _obey(self, kind: Kind, payload: bytes) -> None:
        if kind in (Kind.START, Kind.PREPARE):
            self._orders.put((kind, parse_json(payload)))
        elif kind is Kind.PING:
            self._control.send(Kind.PONG, payload)
        elif kind is Kind.PROBE:
            self._control.send_json(Kind.PROBED, {"problems": self._probe()})
        elif kind is Kind.INSPECT:
            assert self._executor is not None
            found = {
                name: [dataclasses.asdict(collective) for collective in program]
                for name, program in self._executor.collectives().items()
            }
            self._control.send_json(Kind.INSPECTED, found)
        else:
            raise FrameError(f"a frame {kind.name} is nothing that a rank obeys")

    def _prepare_probe(self) -> None:
        """Compiles the probe, so that the first one takes no longer than the others."""
        import jax

        self._probe_one = jax.jit(lambda x: (x * x).sum())
        self._probe()

    def _probe(self) -> list[str]:
        """A tiny computation on each device of this process; what is wrong with which."""
        import jax
        import numpy as np

        problems = ["fails its probe, as asked for"] if self._fault.has("probe") and self._beat.done else []
        for device in jax.local_devices():
            try:
                value = float(self._probe_one(jax.device_put(np.arange(8, dtype=np.float32), device)))
                if value != 140.0:
                    problems.append(f"{device}: computed {value}, expected 140")
            except Exception as error:  # noqa: BLE001 - whatever it is, the device is not well
                problems.append(f"{device}: {error!r:.500}")
        return problems

    def _beat_for_ever(self) -> None:
        try:
            while True:
                if self._executor is not None:
                    usage = self._executor.usage()
                    self._beat.memory = sum(one.memory_bytes or 0 for one in usage)
                    self._beat.communicated = usage[0].collective_bytes
                    self._beat.has_loaded = self._executor.has_loaded
                self._control.send(Kind.HEARTBEAT, self._beat.to_bytes())
                time.sleep(self._spec.heartbeat_interval_sec)
        except ChannelClosedError:
            pass  # `_listen` ends the process

    def _report(self, error: BaseException) -> None:
        traceback.print_exception(error)
        value = {
            "kind": classify(error),
            "type": type(error).__name__,
            "message": str(error)[:_MOST_TEXT],
            "trace": "".join(traceback.format_exception(error))[-_MOST_TEXT:],
        }
        try:
            self._control.send_json(Kind.ERROR, value)
        except ChannelClosedError:
            os._exit(1)


def classify(error: BaseException) -> str:
    """The kind of fault that an exception of a rank stands for.

    "refused" is what no restart can mend: the user's own settings, model or weights.
    """
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, RyzansteinError) and not isinstance(error, InjectedFault | FrameError | ChannelClosedError):
        return "refused"
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower():
        return "out_of_memory"
    if any(word in text for word in ("Gloo", "gloo", "NCCL", "nccl", "collective", "Connection closed by peer")):
        return "collective"
    if any(word in text for word in ("CUDA_ERROR", "illegal memory access", "device-side", "DATA_LOSS", "ECC")):
        return "device"
    return "exception"


def report_device(device: Any, index: int, rank: int) -> DeviceReport:
    """What the leader needs to know of a device."""
    from ryzanstein_jax.memory import device_bytes

    return DeviceReport(
        index=index,
        platform=str(device.platform),
        kind=str(device.device_kind),
        memory_bytes=device_bytes(1, device),
        host=os.uname().nodename,
        rank=rank,
        pci_bus_id=cuda_bus_id(device.local_hardware_id) if device.platform == "gpu" else "",
    )
