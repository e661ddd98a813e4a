"""Versions that have to go together, and variables that spoil them."""

from __future__ import annotations

import importlib.metadata
import re
import sys
from pathlib import Path

from ryzanstein_jax.doctor.finding import Place, Section
from ryzanstein_jax.errors import counted
from ryzanstein_jax.nccl import OBSOLETE

#: What the tests of this package run with.
PYTHON = ((3, 11), (3, 13))
JAX = ((0, 10), (0, 12))
#: Oldest driver (Linux) of each CUDA: NVIDIA's CUDA release notes, "CUDA Toolkit and Minimum Required Driver Version".
DRIVERS = {12: (525, 60), 13: (580, 0)}
_LIBRARIES = ("cudnn", "nccl", "cublas", "cuda-runtime", "cuda-nvcc", "nvshmem")
_HIDING = re.compile(r"lib(cudnn|nccl|cublas|cublasLt|cudart|cusparse|cusolver|cufft|nvrtc|cupti)\.so")


def check_python(section: Section, version: tuple[int, ...] = tuple(sys.version_info[:3])) -> None:
    """The interpreter."""
    text = "Python " + ".".join(map(str, version))
    section.facts["python"] = text.removeprefix("Python ")
    low, high = PYTHON
    if version[:2] < low:
        section.problem(f"{text} is too old", f"use Python {low[0]}.{low[1]} to {high[0]}.{high[1]}")
    elif version[:2] > high:
        section.warn(f"{text} is newer than what was tested", f"use Python {low[0]}.{low[1]} to {high[0]}.{high[1]}")
    else:
        section.ok(text)


def check_jax(section: Section, place: Place) -> None:
    """JAX, its plugin for CUDA, and NVIDIA's libraries."""
    versions = installed(place)
    jax, jaxlib = versions.get("jax"), versions.get("jaxlib")
    section.facts |= {"jax": jax, "jaxlib": jaxlib}
    if jax is None or jaxlib is None:
        section.problem(f"{'jax' if jax is None else 'jaxlib'} is not installed", "pip install ryzanstein-jax")
        return
    low, high = JAX
    if not low <= numbers(jax)[:2] <= high:
        remedy = f"pip install 'jax>={low[0]}.{low[1]},<{high[0]}.{high[1] + 1}'"
        report = section.problem if numbers(jax)[:2] < low else section.warn
        report(f"jax {jax} is not among the versions that were tested", remedy)
    if numbers(jax)[:3] != numbers(jaxlib)[:3]:
        section.problem(f"jax {jax} and jaxlib {jaxlib} do not belong together", f"pip install 'jaxlib=={jax}'")
    else:
        section.ok(f"jax {jax}, jaxlib {jaxlib}")
    _check_plugin(section, versions, jaxlib)
    cuda = section.facts["cuda"]
    found = {name: versions[wheel] for name in _LIBRARIES for wheel in _wheels(name, cuda) if wheel in versions}
    section.facts["libraries"] = found
    if found:
        section.ok(", ".join(f"{name} {version}" for name, version in found.items()))
    if cuda is None:
        _check_kernels(section, versions.get("llvmlite"), place)


def _check_kernels(section: Section, version: str | None, place: Place) -> None:
    """What CPUs compute with."""
    if place.environ.get("RYZANSTEIN_KERNELS") == "portable":
        section.warn("RYZANSTEIN_KERNELS=portable: CPUs compute with XLA's operations only", "unset RYZANSTEIN_KERNELS")
    elif version is None:
        section.warn("llvmlite is not installed: CPUs compute with XLA's operations only, more slowly",
                     "pip install 'ryzanstein-jax[cpu]'")  # fmt: skip
    else:
        section.ok(f"llvmlite {version}, for the kernels of CPUs")


def _wheels(name: str, cuda: int | None) -> tuple[str, ...]:
    return (f"nvidia-{name}", f"nvidia-{name}-cu{cuda}") if cuda else ()


def _check_plugin(section: Section, versions: dict[str, str], jaxlib: str) -> None:
    plugins = {name: versions[name] for name in versions if re.fullmatch(r"jax-cuda\d+-(plugin|pjrt)", name)}
    section.facts["plugins"] = plugins
    kinds = sorted({int(re.findall(r"\d+", name)[0]) for name in plugins})
    section.facts["cuda"] = kinds[0] if len(kinds) == 1 else None
    for kind in kinds:
        for part in ("plugin", "pjrt"):
            version = plugins.get(f"jax-cuda{kind}-{part}")
            if version is None:
                section.problem(
                    f"of JAX's plugin for CUDA {kind} the half jax-cuda{kind}-{part} is missing",
                    f"pip install 'jax[cuda{kind}]=={jaxlib}'",
                )
            elif numbers(version)[:3] != numbers(jaxlib)[:3]:
                section.problem(
                    f"jax-cuda{kind}-{part} {version} does not belong to jaxlib {jaxlib}: JAX will not see the GPUs",
                    f"pip install 'jax-cuda{kind}-{part}=={jaxlib}'",
                )
    if len(kinds) > 1:
        remove = " ".join(name for name in plugins if f"cuda{kinds[0]}" in name)
        section.problem(f"plugins for CUDA {' and '.join(map(str, kinds))} are in each other's way",
                        f"pip uninstall {remove}")  # fmt: skip


def check_driver(section: Section, gpus: int, driver: str | None, cuda: int | None, place: Place) -> None:
    """Whether driver, GPUs and plugin go together."""
    has_plugin = bool(section.facts.get("plugins"))
    section.facts["driver"] = driver
    if gpus and not has_plugin:
        section.problem(
            f"{gpus} NVIDIA GPUs are here and JAX has no plugin for CUDA: it will compute on the CPU",
            "pip install 'ryzanstein-jax[cuda13]' (cuda12 for drivers before 580)",
        )
    if has_plugin and not gpus:
        section.warn("JAX has a plugin for CUDA and there is no GPU",
                     "set JAX_PLATFORMS=cpu, or give this process or container its GPUs")  # fmt: skip
    if driver is not None and cuda in DRIVERS and numbers(driver)[:2] < DRIVERS[cuda]:
        least = ".".join(map(str, DRIVERS[cuda]))
        older = max((kind for kind, oldest in DRIVERS.items() if numbers(driver)[:2] >= oldest), default=None)
        remedy = f"install driver {least} or newer" + (f", or ryzanstein-jax[cuda{older}]" if older else "")
        section.problem(f"driver {driver} is too old for CUDA {cuda}", remedy)
    elif driver is not None:
        section.ok(f"driver {driver}" + (f", CUDA {cuda}" if cuda else ""))
    if gpus and place.environ.get("JAX_PLATFORMS", "").split(",")[0] == "cpu":
        section.warn(f"JAX_PLATFORMS=cpu hides {counted(gpus, 'GPU')}", "unset JAX_PLATFORMS to use them")
    if gpus and place.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        section.warn(f"CUDA_VISIBLE_DEVICES hides {counted(gpus, 'GPU')}", "unset CUDA_VISIBLE_DEVICES to use them")
    if gpus and "nvidia-ml-py" not in installed(place):
        section.warn("nvidia-ml-py is not installed: the engine is blind to the state of its GPUs",
                     "pip install nvidia-ml-py")  # fmt: skip


def check_variables(section: Section, place: Place) -> None:
    """Variables that hide libraries or do nothing."""
    found = False
    for folder in filter(None, place.environ.get("LD_LIBRARY_PATH", "").split(":")):
        names = place.names(folder.lstrip("/")) if Path(folder).is_absolute() else []
        hiding = sorted({match[0] for name in names if (match := _HIDING.match(name))})
        if hiding:
            found = True
            section.warn(
                f"LD_LIBRARY_PATH has {folder} with {', '.join(hiding[:6])}, which go before those that came with JAX",
                "unset LD_LIBRARY_PATH, or take that folder out of it",
            )
    for name in sorted(set(OBSOLETE) & set(place.environ)):
        found = True
        section.warn(f"{name} is set: {OBSOLETE[name]}", f"unset {name}")
    flags = place.environ.get("XLA_FLAGS", "").split()
    section.facts["xla_flags"] = flags
    for flag in flags:
        if not flag.startswith("--"):
            found = True
            section.problem(f"XLA_FLAGS has {flag!r}, which is no flag: XLA ends the process", "write --NAME=VALUE")
    if not found:
        section.ok("no variable is in the way")


def installed(place: Place) -> dict[str, str]:
    """Version of each installed distribution, by name."""
    if place.versions is not None:
        return dict(place.versions)
    found: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"] if distribution.metadata else None  # a broken one has none
        if name:
            found.setdefault(re.sub(r"[-_.]+", "-", name).lower(), distribution.version or "")
    return found


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version."""
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:4])
