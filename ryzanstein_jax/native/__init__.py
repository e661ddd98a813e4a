"""Kernels of our own for CPUs, compiled for the processor at hand and called by XLA as foreign functions.

What XLA makes of a step on a CPU is good for large products and poor for what an engine does besides: it copies pages
before it can attend to them, and multiplies a row or two by bfloat16 or int8 kernels at a tenth of the speed of memory.
These are written here in the language of LLVM, with `llvmlite`, an optional dependency (extra `cpu`); without it, or
with `RYZANSTEIN_KERNELS=portable`, XLA's own operations do all of it, with the same results but for rounding.

A kernel is a dataclass of what its code depends on, with `add_to(module, name, lanes)`, which writes the code. To
compile one takes a second or so; its machine code is kept beside the programs that call it (`executables`).
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import threading
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple, Protocol

import jax

_LOG = logging.getLogger(__name__)

#: Of the environment: "portable" turns off all kernels of our own, on CPUs and GPUs.
KERNELS_VARIABLE = "RYZANSTEIN_KERNELS"


class Kernel(Protocol):
    """What the code depends on: hashable, and its `repr` tells it from all others."""

    def add_to(self, module: Any, name: str, lanes: int) -> None:
        """Adds a handler of that name (`xla.add_handler`) to an LLVM module."""


class Processor(NamedTuple):
    """What this process runs on, as LLVM knows it.

    Attributes:
        name, features: what it compiles for.
        lanes: float32 numbers of a vector; 0 where kernels cannot be compiled, or would be slow.
        tiles: whether this process may multiply tiles of bfloat16 and int8 (AMX).
    """

    name: str
    features: str
    lanes: int
    tiles: bool = False

    def has(self, feature: str) -> bool:
        """Whether LLVM knows it to have one, such as "avx512f"."""
        return f"+{feature}" in self.features.split(",")


class _Registered(NamedTuple):
    name: str
    machine_code: bytes


#: What a task may take of its thread's stack. XLA gives its threads 8 MiB; a small program runs on the thread that
#: calls it, which has 2 MiB where the shell's limit is none.
MOST_STACK_BYTES = 1 << 20

_TILE_FEATURES = ("amx-tile", "amx-bf16", "amx-int8", "avx512bf16", "avx512vnni")
#: Of Linux on x86-64: `asm/unistd_64.h`, `asm/prctl.h`, and the registers' number among a processor's states.
_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA = 158, 0x1023, 18

_registered: dict[Kernel, _Registered] = {}
_lock = threading.Lock()


def wanted() -> bool:
    """Whether kernels of our own may be used at all."""
    return os.environ.get(KERNELS_VARIABLE) != "portable"


def mesh_device() -> Any:
    """A device of the mesh in use, as far as compilers know it: `platform` and `device_kind`; None where none is."""
    return getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)


def lanes() -> int:
    """float32 numbers in a vector of this processor; 0 where these kernels cannot or shall not be used on the mesh."""
    return processor().lanes if getattr(mesh_device(), "platform", "") == "cpu" and available() else 0


def multiplies_pairs() -> bool:
    """Whether the processor has products of pairs of bfloat16."""
    return processor().lanes == 16 and processor().has("avx512bf16")


def multiplies_tiles() -> bool:
    """Whether the processor has products of tiles."""
    return processor().tiles


def multiplies_bytes() -> bool:
    """Whether the processor has products of four bytes."""
    return processor().has("avx512vnni" if processor().lanes == 16 else "avxvnni")


def sees_what_is_next() -> bool:
    """Whether the processor reads on by itself where several rows of a kernel are read at a time.

    Measured: on a Zen 5 asking for what comes next gains nothing, on a Xeon with AMX a quarter to a half. Others of
    Intel count as the latter, others of ARM, which were not measured, as the former.
    """
    return processor().name.startswith("znver") or platform.machine().lower() not in ("x86_64", "amd64")


def available() -> bool:
    """Whether they are wanted, and can be compiled here."""
    return wanted() and find_spec("llvmlite") is not None and processor().lanes > 0


def versions() -> tuple[object, ...]:
    """What compiled programs depend on here."""
    if not available():
        return ()
    import llvmlite

    return (llvmlite.__version__, *processor())


def called_by(program: jax.stages.Compiled) -> tuple[tuple[Kernel, bytes], ...]:
    """The kernels that a program calls, and the machine code of each.

    Raises:
        ValueError: XLA does not print the program.
    """
    known = tuple(_registered.items())
    if not known:  # as on GPUs, whose programs take long to print
        return ()
    text = program.as_text()
    if text is None:
        raise ValueError("which kernels a program calls is not known")
    return tuple((kernel, found.machine_code) for kernel, found in known if found.name in text)


def register_all(kernels: Iterable[tuple[Kernel, bytes]]) -> None:
    """Makes kernels known that were compiled before, for this very processor: machine code is run as it is."""
    for kernel, machine_code in kernels:
        register(kernel, machine_code)


def register(kernel: Kernel, machine_code: bytes | None = None) -> str:
    """Compiles a kernel, unless its code is given, and makes it known to XLA, unless it is; the name to call it by."""
    with _lock:
        if kernel not in _registered:
            described = repr((kernel, processor().lanes))
            name = f"ryzanstein.{type(kernel).__name__}.{hashlib.sha256(described.encode()).hexdigest()[:16]}"
            machine_code = machine_code or _compiled(kernel, name)
            handler = jax.ffi.pycapsule(ctypes.c_void_p(_loaded(machine_code, name)))
            jax.ffi.register_ffi_target(name, handler, platform="cpu")
            _registered[kernel] = _Registered(name, machine_code)
        return _registered[kernel].name


@cache
def processor() -> Processor:
    """This process's; looked at once. Needs `llvmlite`, and has no lanes if that is out of order."""
    try:
        from llvmlite import binding

        binding.initialize_native_target()
        binding.initialize_native_asmprinter()
        binding.check_jit_execution()
        features = binding.get_host_cpu_features()
        lanes = _lanes(platform.machine(), features)
        tiles = lanes == 16 and all(features.get(one) for one in _TILE_FEATURES) and _may_use_tiles()
        return Processor(binding.get_host_cpu_name(), features.flatten(), lanes, tiles)
    except (ImportError, OSError, RuntimeError) as error:
        _LOG.warning("no kernels for this CPU, only XLA's own: %s", error)
        return Processor("", "", 0)


def _lanes(machine: str, features: Mapping[str, bool]) -> int:
    """Without an instruction for it, multiply-add is a call of a function, many times slower than all of XLA."""
    if machine.lower() in ("arm64", "aarch64"):
        return 4
    if not (features.get("avx2") and features.get("fma")):
        return 0
    return 16 if features.get("avx512f") else 8


def _may_use_tiles() -> bool:
    """Asks Linux for their registers: it gives them to those processes alone that asked."""
    if platform.system() != "Linux":
        return False
    return int(ctypes.CDLL(None).syscall(_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA)) == 0


def _target_machine() -> Any:
    """A new one: whoever compiles with it owns it."""
    from llvmlite import binding

    found = processor()
    target = binding.Target.from_default_triple()
    return target.create_target_machine(cpu=found.name, features=found.features, opt=3, jit=True)


def assembly(kernel: Kernel) -> str:
    """What the compiler makes of a kernel here, to be read: vectors stored to the stack had no room in registers."""
    target, module = _optimized(kernel, "kernel")
    return str(target.emit_assembly(module))


def _compiled(kernel: Kernel, name: str) -> bytes:
    """An object file with the kernel's handler."""
    target, module = _optimized(kernel, name)
    return bytes(target.emit_object(module))


def _optimized(kernel: Kernel, name: str) -> tuple[Any, Any]:
    """A target machine, and the kernel as a module for it."""
    from llvmlite import binding, ir

    target = _target_machine()
    written = ir.Module(name)
    written.triple, written.data_layout = target.triple, str(target.target_data)
    kernel.add_to(written, name, processor().lanes)
    module = binding.parse_assembly(str(written))
    module.verify()
    options = binding.create_pipeline_tuning_options(speed_level=3)
    options.loop_unrolling = False
    passes = binding.create_pass_builder(target, options)
    passes.getModulePassManager().run(module, passes)
    return target, module


def _loaded(machine_code: bytes, name: str) -> int:
    """The address of a handler; the code stays for as long as the process."""
    from llvmlite import binding

    engine = binding.create_mcjit_compiler(binding.parse_assembly(""), _target_machine())
    engine.add_object_file(binding.ObjectFileRef.from_data(machine_code))
    engine.finalize_object()
    address = int(engine.get_function_address(name))
    engine.detach()  # or else the code would go with it
    return address
