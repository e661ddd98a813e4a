"""NCCL's settings, and those of XLA that belong to them, as a typed config: the leader checks what ranks will get.

Names, values and what replaced what are NCCL's documentation's ("Environment Variables", NCCL 2.32). It advises to
leave alone whatever it can choose itself; so does this: nothing is set unless asked for, but for `DEFAULTS`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ryzanstein_jax.errors import ConfigError

#: Set where neither the config, the environment nor a file of NCCL's says otherwise: errors are told with their reason.
DEFAULTS = {"NCCL_DEBUG": "WARN"}
#: The same for a process with several GPUs, which may deadlock where two communicators' kernels start in other orders.
SEVERAL_DEFAULTS = DEFAULTS | {"NCCL_LAUNCH_ORDER_IMPLICIT": "1"}

#: How a config's flags for XLA reach a rank, which adds them to its machine's `XLA_FLAGS`.
XLA_VARIABLE = "RYZANSTEIN_XLA_FLAGS"

#: The network interface that Gloo binds to; where it is not set, the address that the host's name resolves to.
GLOO_INTERFACE_VARIABLE = "RYZANSTEIN_GLOO_INTERFACE"

#: What NCCL does not know, or no more, and what to use instead.
OBSOLETE = {
    "NCCL_MIN_NRINGS": "rings are channels now: use min_ctas (NCCL_MIN_CTAS, since NCCL 2.17)",
    "NCCL_MAX_NRINGS": "rings are channels now: use max_ctas (NCCL_MAX_CTAS, since NCCL 2.17)",
    "NCCL_MIN_NCHANNELS": "deprecated in NCCL 2.17: use min_ctas (NCCL_MIN_CTAS)",
    "NCCL_MAX_NCHANNELS": "deprecated in NCCL 2.17: use max_ctas (NCCL_MAX_CTAS)",
    "NCCL_LAUNCH_MODE": "deprecated in NCCL 2.9: kernels start in parallel. For one process with several GPUs use "
    "launch_order_implicit (NCCL_LAUNCH_ORDER_IMPLICIT, since NCCL 2.26)",
    "NCCL_TIMEOUT": "no variable of NCCL's: a step's deadline is step_timeout_sec of OrchestratorConfig, XLA's own is "
    "execution_timeout_sec, and InfiniBand's is ib_timeout (NCCL_IB_TIMEOUT)",
    "NCCL_BLOCKING_WAIT": "of PyTorch, not of NCCL: a step's deadline is step_timeout_sec of OrchestratorConfig",
    "NCCL_ASYNC_ERROR_HANDLING": "of PyTorch, not of NCCL: use terminate_on_error, which XLA has switched on",
    "NCCL_IB_CUDA_SUPPORT": "removed in NCCL 2.4: use net_gdr_level (NCCL_NET_GDR_LEVEL)",
    "NCCL_IB_GDR_LEVEL": "renamed in NCCL 2.4: use net_gdr_level (NCCL_NET_GDR_LEVEL)",
    "NCCL_CHECKS_DISABLE": "deprecated in NCCL 2.2: remove it",
    "NCCL_CHECK_POINTERS": "deprecated in NCCL 2.29.7: use NCCL_CHECK_MODE=DEBUG_LOCAL in the environment",
    "NCCL_SINGLE_RING_THRESHOLD": "removed in NCCL 2.3: remove it",
    "NCCL_LL_THRESHOLD": "removed in NCCL 2.5: remove it; proto (NCCL_PROTO) chooses protocols",
    "NCCL_TREE_THRESHOLD": "removed in NCCL 2.5: remove it; algo (NCCL_ALGO) chooses algorithms",
}

_LEVELS = ("LOC", "NVL", "PIX", "PXB", "PHB", "SYS")
#: A name that goes into an environment: no spaces, quotes or separators of shells.
_WORD = re.compile(r"[A-Za-z0-9_.,:;=^*@+/%-]{1,256}")


def _variable(name: str, *choices: str, low: int | None = None, high: int | None = None, default: Any = None) -> Any:
    return dataclasses.field(default=default, metadata={"variable": name, "choices": choices, "low": low, "high": high})


def _flag(name: str, low: int | None = None, high: int | None = None) -> Any:
    return dataclasses.field(default=None, metadata={"flag": name, "choices": (), "low": low, "high": high})


@dataclass(frozen=True)
class NcclConfig:
    """What NCCL shall do other than by itself. None leaves a setting to the machine's environment, or else to NCCL.

    Attributes:
        debug: what it writes to the rank's log: VERSION, WARN, ATTN (NCCL 2.32), INFO or TRACE.
        debug_subsys: parts that INFO tells of, as "INIT,NET"; "^" before it leaves them out.
        p2p_disable: no direct access between GPUs.
        p2p_level: farthest two GPUs with direct access: LOC (none), NVL, PIX, PXB, PHB, SYS.
        shm_disable: no shared memory between processes of a machine.
        ib_disable: no InfiniBand or RoCE.
        ib_hca: adapters to use, as "=mlx5_0:1"; "^" excludes.
        ib_timeout: 4.096 us times two to the power of it.
        ib_retry_cnt: how often InfiniBand tries again.
        socket_ifname: network interfaces to use, as "=eth0"; "^" excludes.
        socket_family: AF_INET or AF_INET6.
        net_gdr_level: farthest GPU and adapter with direct access, as `p2p_level`.
        cross_nic: whether rings may cross from one adapter to another: 0 never, 1 yes, 2 where it is faster.
        nvls_enable: reductions inside the NVLink switches: 0 never, 1 always, 2 where they can.
        algo, proto: algorithms and protocols to choose from, as "ring,tree" and "LL,Simple".
        min_ctas, max_ctas: CUDA blocks (channels) of a collective.
        nthreads: CUDA threads of a block.
        buffsize: bytes of the buffer between two GPUs.
        cumem_enable, cumem_host_enable: allocate by cuMem, on the device and on the host.
        launch_order_implicit: several communicators' kernels of a process start in the host's order.
        graph_mixing_support: one communicator in several CUDA graphs at once, or inside and outside of one.
        graph_register: register user buffers when a CUDA graph is captured.
        topo_file: XML of the machine's topology.
        terminate_on_error: XLA ends the process at an error of NCCL's (XLA's own default).
        termination_timeout_sec: how long XLA waits for NCCL to notice such an error.
        execution_timeout_sec: XLA ends the process when a program takes longer.

    Raises:
        ConfigError: a value is of the wrong type or out of range.
    """

    debug: str | None = _variable("NCCL_DEBUG", "VERSION", "WARN", "ATTN", "INFO", "TRACE")
    debug_subsys: str | None = _variable("NCCL_DEBUG_SUBSYS")
    p2p_disable: bool | None = _variable("NCCL_P2P_DISABLE")
    p2p_level: str | None = _variable("NCCL_P2P_LEVEL", *_LEVELS)
    shm_disable: bool | None = _variable("NCCL_SHM_DISABLE")
    ib_disable: bool | None = _variable("NCCL_IB_DISABLE")
    ib_hca: str | None = _variable("NCCL_IB_HCA")
    ib_timeout: int | None = _variable("NCCL_IB_TIMEOUT", low=1, high=31)
    ib_retry_cnt: int | None = _variable("NCCL_IB_RETRY_CNT", low=0, high=7)
    socket_ifname: str | None = _variable("NCCL_SOCKET_IFNAME")
    socket_family: str | None = _variable("NCCL_SOCKET_FAMILY", "AF_INET", "AF_INET6")
    net_gdr_level: str | None = _variable("NCCL_NET_GDR_LEVEL", "LOC", "PIX", "PXB", "PHB", "SYS")
    cross_nic: int | None = _variable("NCCL_CROSS_NIC", low=0, high=2)
    nvls_enable: int | None = _variable("NCCL_NVLS_ENABLE", low=0, high=2)
    algo: str | None = _variable("NCCL_ALGO")
    proto: str | None = _variable("NCCL_PROTO")
    min_ctas: int | None = _variable("NCCL_MIN_CTAS", low=1, high=64)
    max_ctas: int | None = _variable("NCCL_MAX_CTAS", low=1, high=64)
    nthreads: int | None = _variable("NCCL_NTHREADS", low=64, high=512)
    buffsize: int | None = _variable("NCCL_BUFFSIZE", low=1024, high=1 << 30)
    cumem_enable: bool | None = _variable("NCCL_CUMEM_ENABLE")
    cumem_host_enable: bool | None = _variable("NCCL_CUMEM_HOST_ENABLE")
    launch_order_implicit: bool | None = _variable("NCCL_LAUNCH_ORDER_IMPLICIT")
    graph_mixing_support: bool | None = _variable("NCCL_GRAPH_MIXING_SUPPORT")
    graph_register: bool | None = _variable("NCCL_GRAPH_REGISTER")
    topo_file: str | None = _variable("NCCL_TOPO_FILE")
    terminate_on_error: bool | None = _flag("xla_gpu_nccl_terminate_on_error")
    termination_timeout_sec: int | None = _flag("xla_gpu_nccl_termination_timeout_seconds", low=1, high=86400)
    execution_timeout_sec: int | None = _flag("xla_gpu_execution_terminate_timeout", low=1, high=86400)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None:
                _check(field, value)
        if self.nthreads is not None and self.nthreads not in (64, 128, 256, 512):
            raise ConfigError("nccl.nthreads", self.nthreads, "use 64, 128, 256 or 512")
        if self.min_ctas is not None and self.max_ctas is not None and self.min_ctas > self.max_ctas:
            raise ConfigError("nccl.min_ctas", self.min_ctas, f"use at most max_ctas={self.max_ctas}")

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> NcclConfig:
        """From names of fields, or NCCL's own names, and values, which may be the text of a command line.

        Raises:
            ConfigError: there is no such setting (for an obsolete one: with what replaced it), or a value is invalid.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        known = {
            str(field.metadata.get("variable", field.metadata.get("flag"))): field.name for field in fields.values()
        }
        values: dict[str, Any] = {}
        for given, value in settings.items():
            instead = OBSOLETE.get(given if given.startswith("NCCL_") else f"NCCL_{given.upper()}")
            name = known.get(given, given)
            if name not in fields:
                remedy = instead or f"there is no such setting; known: {', '.join(sorted(fields))}"
                raise ConfigError(f"nccl.{given}", value, remedy)
            values[name] = _read(fields[name], value) if isinstance(value, str) else value
        return cls(**values)

    def environment(self) -> dict[str, str]:
        """The variables of what is set; flags for XLA together in `XLA_VARIABLE`."""
        variables: dict[str, str] = {}
        flags: list[str] = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None:
                continue
            if "variable" in field.metadata:
                variables[field.metadata["variable"]] = str(int(value) if isinstance(value, bool) else value)
            else:
                flags.append(_flag_text(field.metadata["flag"], value))
        return variables | ({XLA_VARIABLE: " ".join(flags)} if flags else {})


#: Every variable of NCCL's that `NcclConfig` knows, in order.
VARIABLES = tuple(f.metadata["variable"] for f in dataclasses.fields(NcclConfig) if "variable" in f.metadata)


def _kind(field: dataclasses.Field[Any]) -> type:
    return {"str": str, "int": int, "bool": bool}[str(field.type).partition(" ")[0]]


def _check(field: dataclasses.Field[Any], value: object) -> None:
    name, kind, choices = f"nccl.{field.name}", _kind(field), field.metadata["choices"]
    if type(value) is not kind:
        words = {bool: "use True or False", int: "use a whole number", str: "use a text"}
        raise ConfigError(name, value, words[kind])
    if isinstance(value, str):
        if choices and value not in choices:
            raise ConfigError(name, value, f"use one of {', '.join(choices)}")
        if not _WORD.fullmatch(value):
            raise ConfigError(name, value, "use letters, digits and ,:;=^ without spaces, 256 at most")
    low, high = field.metadata["low"], field.metadata["high"]
    if kind is int and not low <= value <= high:
        raise ConfigError(name, value, f"use a whole number from {low} to {high}")


def _read(field: dataclasses.Field[Any], text: str) -> Any:
    """A value from a command line."""
    kind = _kind(field)
    if text.lower() == "none":
        return None
    if kind is bool:
        words = {"1": True, "true": True, "0": False, "false": False}
        if text.lower() not in words:
            raise ConfigError(f"nccl.{field.name}", text, "use true or false")
        return words[text.lower()]
    if kind is int:
        if not re.fullmatch(r"[0-9]{1,12}", text):
            raise ConfigError(f"nccl.{field.name}", text, "use a whole number")
        return int(text)
    return text


def _flag_text(flag: str, value: object) -> str:
    """A flag as the installed XLA reads it: an unknown name or form ends the process."""
    if flag == "xla_gpu_execution_terminate_timeout" and jaxlib_version() >= (0, 11):
        return f"--{flag}={value}s"  # a duration; 0.10 takes the bare number
    return f"--{flag}={str(value).lower()}"


def jaxlib_version() -> tuple[int, int]:
    """Major and minor of the installed jaxlib; (0, 0) where there is none."""
    try:
        numbers = re.findall(r"\d+", version("jaxlib"))
    except PackageNotFoundError:
        return 0, 0
    return (int(numbers[0]), int(numbers[1])) if len(numbers) > 1 else (0, 0)
