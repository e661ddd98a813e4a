"""Frozen, validated settings."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ryzanstein_jax.errors import ConfigError
from ryzanstein_jax.nccl import GLOO_INTERFACE_VARIABLE, NcclConfig

DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTIZATIONS = ("int8", "int4", "fp8")
KV_CACHE_DTYPES = ("auto", "int8", "fp8")
CLUSTERS = ("ray",)
#: What an embedding is made of: the hidden state of the last token, or the mean of all.
POOLINGS = ("last", "mean")
SHARDINGS = ("megatron", "output", "sequence")
LOAD_FORMATS = ("auto", "safetensors", "gguf", "snapshot", "dummy")


@dataclass(frozen=True)
class EngineConfig:
    """Everything that an engine is built from. Names follow vLLM's where they mean the same.

    Attributes:
        model: Hugging Face id, folder of one, `.gguf` file, snapshot folder, or `"smollm2"` for
            the embedded default model.
        tokenizer: folder, id or `tokenizer.json`; None takes the model's own.
        revision: branch, tag or commit on the hub.
        load_format: where the weights come from; "auto" looks at the model, "dummy" draws random ones.
        tensor_parallel_size: number of devices the weights and the KV cache are sharded over.
        data_parallel_size: number of replicas of the engine, each on devices of its own; see docs/data_parallel.md.
        sharding: how parameters and activations lie on the devices, and so what these say to each other; see
            `sharding.RULES`.
        dtype: of weights, activations and KV cache. "auto" is the checkpoint's on an accelerator
            and float32 on a CPU, where it is the fastest.
        kv_cache_dtype: of the KV cache: "auto" is that of the activations; "int8" and "fp8" (also "fp8_e4m3") hold
            keys and values in 8 bits, each with a scale of its own, found as it is written.
        quantization: "int8" computes the linear layers with int8 weights (a scale for each output channel) and int8
            activations (one for each token, found as they come); "int4" with 4-bit weights in groups of up to 32
            inputs, "fp8" with float8 weights and, on GPUs, activations. Float weights are quantized while they are
            loaded.
            None computes a checkpoint as it is.
        max_model_len: longest prompt + completion, in tokens; None takes the model's own limit.
        memory_fraction: share of each device's memory that weights, temporaries and KV cache may
            take together. None is 0.9 on an accelerator and 0.25 of the host's on a CPU.
        num_pages: exact number of KV-cache pages instead of what is left of the budget.
        page_size: tokens in a page of KV cache.
        max_num_seqs: most sequences that decode in one step.
        max_num_batched_tokens: most prompt tokens in one step (the chunk of chunked prefill).
        enable_prefix_caching: share the pages of equal prompt prefixes.
        seed: of every request that brings no seed of its own, and of dummy weights.
        max_logprobs: most alternatives per token that a request may ask for.
        max_logit_bias: most biased tokens that a request may name.
        embedding_pooling: what embeddings are made of: "last" or "mean"; None is what the model's folder says.
        compilation_cache_dir: persistent cache of compiled programs; None takes the user's cache
            folder, "" switches it off.
        weights_cache_gib: most disk space, in GiB of the user's cache folder, for copies of quantized weights as they
            are computed with, from which the next start loads faster; 0 keeps none.
        profile_dir: folder for a JAX trace of some steps and a table of where their time went, one of each for each
            process; None watches nothing. See `engine/profiled.py`.
        profile_steps: how many steps are watched, after the first eight.
    """

    model: str
    tokenizer: str | None = None
    revision: str | None = None
    load_format: str = "auto"
    tensor_parallel_size: int = 1
    data_parallel_size: int = 1
    sharding: str = "megatron"
    dtype: str = "auto"
    kv_cache_dtype: str = "auto"
    quantization: str | None = None
    max_model_len: int | None = None
    memory_fraction: float | None = None
    num_pages: int | None = None
    page_size: int = 16
    max_num_seqs: int = 32
    max_num_batched_tokens: int = 512
    enable_prefix_caching: bool = True
    seed: int = 0
    max_logprobs: int = 20
    max_logit_bias: int = 300
    embedding_pooling: str | None = None
    compilation_cache_dir: str | None = None
    weights_cache_gib: float = 16.0
    profile_dir: str | None = None
    profile_steps: int = 32

    def __post_init__(self) -> None:
        if not isinstance(self.model, str | Path) or not str(self.model).strip():
            raise ConfigError("model", self.model, "give a Hugging Face id, a folder or a .gguf file")
        object.__setattr__(self, "model", str(self.model))
        _one_of("load_format", self.load_format, LOAD_FORMATS)
        _one_of("dtype", self.dtype, DTYPES)
        object.__setattr__(self, "kv_cache_dtype", checked_kv_cache_dtype(self.kv_cache_dtype))
        _one_of("sharding", self.sharding, SHARDINGS)
        if self.quantization is not None:
            _one_of("quantization", self.quantization, QUANTIZATIONS)
        _integer("tensor_parallel_size", self.tensor_parallel_size, 1, 4096)
        _integer("data_parallel_size", self.data_parallel_size, 1, 256)
        _integer("max_model_len", self.max_model_len, 2, 1 << 24, optional=True)
        _integer("num_pages", self.num_pages, 2, 1 << 30, optional=True)
        _integer("page_size", self.page_size, 1, 1024)
        if self.page_size & (self.page_size - 1):
            raise ConfigError("page_size", self.page_size, "use a power of two, such as 16")
        _integer("max_num_seqs", self.max_num_seqs, 1, 4096)
        _integer("max_num_batched_tokens", self.max_num_batched_tokens, 16, 1 << 20)
        _integer("seed", self.seed, 0, (1 << 63) - 1)
        _integer("max_logprobs", self.max_logprobs, 0, 1024)
        _integer("max_logit_bias", self.max_logit_bias, 0, 4096)
        _integer("profile_steps", self.profile_steps, 1, 10000)
        if self.embedding_pooling is not None:
            _one_of("embedding_pooling", self.embedding_pooling, POOLINGS)
        room = self.weights_cache_gib
        if not isinstance(room, int | float) or isinstance(room, bool) or not 0 <= room < 1 << 20:
            raise ConfigError("weights_cache_gib", room, "use a number of GiB, or 0 for none")
        fraction = self.memory_fraction
        number = isinstance(fraction, int | float) and not isinstance(fraction, bool)
        if fraction is not None and not (number and 0 < fraction <= 1):
            raise ConfigError("memory_fraction", fraction, "use a number above 0 and at most 1, such as 0.9")

    def replace(self, **changes: object) -> EngineConfig:
        """A copy with some fields changed, validated again."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


@dataclass(frozen=True)
class OrchestratorConfig:
    """How worker processes are started, watched and replaced. Times are in seconds.

    Attributes:
        timeout_sec: most that a start may take, from the first process to ready. Loading and compiling count,
            so give large models more.
        health_check_interval_sec: how often each device runs a tiny computation to show that it can.
        probe_timeout_sec: most that this computation may take.
        heartbeat_interval_sec: how often a rank tells that it lives and what it has done.
        heartbeat_timeout_sec: silence after which a rank counts as hung, unless it is busy on its processor.
        step_timeout_sec: least time that a step gets before it counts as hung. Steps known to be slow get more:
            ten times what the slowest of their kind took.
        first_step_timeout_sec: the same while no step has been measured.
        enable_auto_restart: False fails all requests at the first fault.
        max_restart_attempts: faults within `restart_window_sec` that are answered with a restart; one more
            fails all requests.
        restart_window_sec: how long a fault counts.
        healthy_period_sec: after so long without a fault, earlier ones are forgotten.
        restart_backoff_sec: wait before the second restart in a row; it doubles with each further one, to 30.
        max_device_failures: faults of one device after which the group goes on without it.
        min_tensor_parallel_size: narrowest group to go on with.
        restore_after_sec: how long a narrower group serves before a wider one takes its place, once machines that
            were lost are back; the requests that run then are replayed.
        standby: keep a second group of processes that has joined and loaded its programs, to take the place of one that
            fails: recovery is then without most of the start. It holds no weights and no KV cache. In quiet moments
            the programs of the next narrower group are compiled too. "auto" has one on a CPU that has memory for it.
            There is none on GPUs, whose memory a second process would reserve.
        process_per_device: one process for each device; False makes one for all devices of this machine.
        drain_timeout_sec: how long `cleanup` lets processes end by themselves.
        log_dir: folder in which each run keeps its ranks' logs, in a folder of its own that goes with a clean end;
            None is `logs` in the user's cache folder.
        log_bytes: most that the logs of one rank take.
        listen: "host:port" of this machine at which agents of other machines (`ryzanstein worker`) join; None is for
            this machine alone. All that goes over the network after the proof of the secret is as it is: use one
            that you trust.
        secret_file: file of the secret that the agents know; readable by its owner only.
        num_hosts: agents of other machines to wait for before the first start.
        local_devices: devices of this machine that take part. None is all GPUs; on a CPU as many as asked for, or
            none where `listen` is set.
        cluster: "ray" starts an agent on `num_hosts` nodes of a Ray cluster; None waits for those that others start.
        nccl: how the ranks' GPUs communicate; a mapping of `NcclConfig`'s fields will do. What it leaves open, a
            rank takes from its own machine's environment.
        gloo_interface: network interface over which CPU ranks communicate, such as "eth0"; None takes
            `RYZANSTEIN_GLOO_INTERFACE` of the rank's machine, or else the address of its host name.
    """

    timeout_sec: float = 1800.0
    health_check_interval_sec: float = 5.0
    probe_timeout_sec: float = 10.0
    heartbeat_interval_sec: float = 0.1
    heartbeat_timeout_sec: float = 5.0
    step_timeout_sec: float = 8.0
    first_step_timeout_sec: float = 60.0
    enable_auto_restart: bool = True
    max_restart_attempts: int = 8
    restart_window_sec: float = 600.0
    healthy_period_sec: float = 60.0
    restart_backoff_sec: float = 0.5
    max_device_failures: int = 3
    min_tensor_parallel_size: int = 1
    restore_after_sec: float = 10.0
    standby: bool | str = "auto"
    process_per_device: bool = True
    drain_timeout_sec: float = 5.0
    log_dir: str | None = None
    log_bytes: int = 4 << 20
    listen: str | None = None
    secret_file: str | None = None
    num_hosts: int = 1
    local_devices: int | None = None
    cluster: str | None = None
    nccl: NcclConfig = dataclasses.field(default_factory=NcclConfig)
    gloo_interface: str | None = None

    def __post_init__(self) -> None:
        self._check_communication()
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name.endswith("_sec"):
                least = 0.0 if field.name == "restart_backoff_sec" else 0.01
                number = isinstance(value, int | float) and not isinstance(value, bool)
                if not (number and least <= value <= 1e6):
                    raise ConfigError(field.name, value, f"use a number of seconds from {least:g} to 1000000")
        for name in ("enable_auto_restart", "process_per_device"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(name, getattr(self, name), "use True or False")
        if not isinstance(self.standby, bool) and self.standby != "auto":
            raise ConfigError("standby", self.standby, 'use "auto", True or False')
        _integer("max_restart_attempts", self.max_restart_attempts, 0, 1 << 20)
        _integer("max_device_failures", self.max_device_failures, 1, 1 << 20)
        _integer("min_tensor_parallel_size", self.min_tensor_parallel_size, 1, 4096)
        _integer("log_bytes", self.log_bytes, 4096, 1 << 32)
        self._check_hosts()
        if self.heartbeat_timeout_sec < 3 * self.heartbeat_interval_sec:
            remedy = f"use at least three times heartbeat_interval_sec={self.heartbeat_interval_sec:g}"
            raise ConfigError("heartbeat_timeout_sec", self.heartbeat_timeout_sec, remedy)

    def _check_communication(self) -> None:
        if isinstance(self.nccl, Mapping):
            object.__setattr__(self, "nccl", NcclConfig.of(self.nccl))
        if not isinstance(self.nccl, NcclConfig):
            raise ConfigError("nccl", self.nccl, "give an NcclConfig or a mapping of its fields")
        interface = self.gloo_interface
        if interface is not None and not (
            isinstance(interface, str) and re.fullmatch(r"[A-Za-z0-9_.@-]{1,15}", interface)
        ):
            raise ConfigError("gloo_interface", interface, "use the name of a network interface, such as eth0")

    def communication_environment(self) -> dict[str, str]:
        """Variables of a rank's environment that say how it communicates."""
        gloo = {} if self.gloo_interface is None else {GLOO_INTERFACE_VARIABLE: self.gloo_interface}
        return self.nccl.environment() | gloo

    def _check_hosts(self) -> None:
        _integer("num_hosts", self.num_hosts, 0, 1024)
        _integer("local_devices", self.local_devices, 0, 1024, optional=True)
        if self.cluster is not None:
            _one_of("cluster", self.cluster, CLUSTERS)
        if self.listen is not None:
            parse_address("listen", self.listen)
        if self.listen is None and self.cluster is None:
            if self.local_devices == 0:
                raise ConfigError("local_devices", 0, "set listen too, or there are no devices at all")
            return
        if self.cluster is None and not isinstance(self.secret_file, str | Path):
            raise ConfigError(
                "secret_file", self.secret_file, "listen needs the file of a secret; see docs/multi_host.md"
            )
        if not self.process_per_device:
            raise ConfigError("process_per_device", False, "several machines need one process for each device")


def parse_address(field: str, text: object) -> tuple[str, int]:
    """Host and port of "host:port" or "[host]:port".

    Raises:
        ConfigError: it is none.
    """
    host, colon, port = str(text).rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        host = ""
    if not isinstance(text, str) or not colon or not host or not port.isascii() or not port.isdigit():
        raise ConfigError(field, text, "use host:port, such as 10.0.0.1:18476 or [fd00::1]:18476")
    if int(port[:6]) > 65535:
        raise ConfigError(field, text, "use a port up to 65535")
    return host, int(port)


def checked_kv_cache_dtype(value: str) -> str:
    """One of `KV_CACHE_DTYPES`; "fp8_e4m3" is vLLM's other name of fp8.

    Raises:
        ConfigError: it is none.
    """
    value = "fp8" if value == "fp8_e4m3" else value
    _one_of("kv_cache_dtype", value, KV_CACHE_DTYPES)
    return value


def _one_of(field: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(field, value, f"use one of {', '.join(known)}")


def _integer(field: str, value: object, low: int, high: int, *, optional: bool = False) -> None:
    if value is None and optional:
        return
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ConfigError(field, value, f"use a whole number from {low} to {high}")
