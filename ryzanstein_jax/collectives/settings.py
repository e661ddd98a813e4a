"""What a rank communicates by, and where each setting comes from: config, environment, NCCL's files or default."""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, replace
from pathlib import Path

from ryzanstein_jax.nccl import DEFAULTS, GLOO_INTERFACE_VARIABLE, SEVERAL_DEFAULTS, VARIABLES, XLA_VARIABLE

_MOST_FILE = 1 << 16  # bytes
#: What is a secret is told as set, and no more: NCCL_PSK is the key of its encryption.
_SECRET = re.compile("PSK|KEY|SECRET|TOKEN|PASSW")


@dataclass(frozen=True)
class Setting:
    """One setting in force.

    Attributes:
        name: of the variable, flag or option.
        value: its text; None where nothing is set.
        origin: "config", "environment", "file", "default" (this package's), "code" (fixed here), "absent" (the
            library's own choice).
    """

    name: str
    value: str | None
    origin: str


def nccl_files(environ: Mapping[str, str], root: Path = Path("/")) -> dict[str, str]:
    """What NCCL's configuration files set: `NCCL_CONF_FILE` or `~/.nccl.conf`, and `/etc/nccl.conf`.

    The environment goes before the user's file, and that before the system's.
    """
    own = environ.get("NCCL_CONF_FILE")
    home = environ.get("HOME")
    files = [root / "etc" / "nccl.conf"]
    if own or home:
        files.append(Path(own) if own else Path(str(home)) / ".nccl.conf")
    found: dict[str, str] = {}
    for file in files:
        try:
            if not file.is_file():  # a pipe would be waited for
                continue
            with file.open("rb") as stream:
                text = stream.read(_MOST_FILE).decode(errors="replace")
        except OSError:
            continue
        for line in text.splitlines():
            name, equals, value = line.strip().partition("=")
            if equals and not name.startswith("#"):
                found[name.strip()] = value.strip()
    return found


def apply_nccl(environ: MutableMapping[str, str], *, several: bool, root: Path = Path("/")) -> None:
    """Adds the defaults and the config's flags for XLA to a rank's environment; before anything computes.

    Args:
        environ: of the process, with what the config has set.
        several: whether the process drives several GPUs.
    """
    files = nccl_files(environ, root)
    for name, value in (SEVERAL_DEFAULTS if several else DEFAULTS).items():
        if name not in files:
            environ.setdefault(name, value)
    flags = environ.pop(XLA_VARIABLE, "").split()
    if flags:
        names = {flag.partition("=")[0] for flag in flags}
        others = [flag for flag in environ.get("XLA_FLAGS", "").split() if flag.partition("=")[0] not in names]
        environ["XLA_FLAGS"] = " ".join([*others, *flags])


def settings_in_force(
    environ: Mapping[str, str],
    given: Mapping[str, str],
    *,
    backend: str,
    several: bool = False,
    root: Path = Path("/"),
) -> list[Setting]:
    """What a rank of this environment and config would communicate by.

    Args:
        environ: before `apply_nccl`.
        given: variables of the config: see `NcclConfig.environment`.
        backend: "nccl", "gloo" or "xla" (devices of one process on a CPU).
        several: as in `apply_nccl`.
    """
    if backend != "nccl":
        return _gloo_settings(environ, given) if backend == "gloo" else []
    files = nccl_files(environ, root)
    defaults = SEVERAL_DEFAULTS if several else DEFAULTS
    others = sorted(name for name in {*environ, *files} if name.startswith("NCCL_") and name not in VARIABLES)
    found = []
    for name in (*VARIABLES, *others):
        if name in given:
            found.append(Setting(name, given[name], "config"))
        elif name in environ:
            found.append(Setting(name, environ[name], "environment"))
        elif name in files:
            found.append(Setting(name, files[name], "file"))
        elif name in defaults:
            found.append(Setting(name, defaults[name], "default"))
        else:
            found.append(Setting(name, None, "absent"))
    hidden = [replace(setting, value="***") if _is_secret(setting) else setting for setting in found]
    return hidden + _xla_settings(environ, given)


def _is_secret(setting: Setting) -> bool:
    return setting.value is not None and _SECRET.search(setting.name) is not None


def _gloo_settings(environ: Mapping[str, str], given: Mapping[str, str]) -> list[Setting]:
    interface = given.get(GLOO_INTERFACE_VARIABLE) or environ.get(GLOO_INTERFACE_VARIABLE)
    origin = "config" if GLOO_INTERFACE_VARIABLE in given else "environment" if interface else "absent"
    return [
        Setting("jax_cpu_collectives_implementation", "gloo", "code"),
        Setting(GLOO_INTERFACE_VARIABLE, interface, origin),
        Setting("priority of Gloo's polling thread", "SCHED_IDLE", "code"),
        *_xla_settings(environ, given),
    ]


def _xla_settings(environ: Mapping[str, str], given: Mapping[str, str]) -> list[Setting]:
    ours = {flag.partition("=")[0]: flag.partition("=")[2] for flag in given.get(XLA_VARIABLE, "").split()}
    found = [Setting(name.lstrip("-"), value, "config") for name, value in ours.items()]
    for flag in environ.get("XLA_FLAGS", "").split():
        name, _, value = flag.partition("=")
        if name not in ours:
            found.append(Setting(name.lstrip("-"), value, "environment"))
    return found
