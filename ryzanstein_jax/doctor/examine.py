"""`examine`: all checks, one after the other; each has a deadline, and none can hurt the others."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ryzanstein_jax.collectives.settings import Setting, settings_in_force
from ryzanstein_jax.config import OrchestratorConfig
from ryzanstein_jax.doctor import devices, gpus, host, software
from ryzanstein_jax.doctor.finding import OK, PROBLEM, WARNING, Place, Section, examined
from ryzanstein_jax.errors import ConfigError

_SECONDS = 20.0  # for a check that only looks


@dataclass(frozen=True)
class Diagnosis:
    """All that was found.

    Attributes:
        sections: in order.
        settings: by which ranks would communicate here.
        is_complete: False where a check still hangs: the process should then end without waiting for its threads.
    """

    sections: tuple[Section, ...]
    settings: tuple[Setting, ...]
    is_complete: bool

    @property
    def status(self) -> str:
        """The worst of all findings."""
        found = {finding.status for section in self.sections for finding in section.findings}
        return PROBLEM if PROBLEM in found else WARNING if WARNING in found else OK

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "status": self.status,
            "findings": [dataclasses.asdict(finding) for section in self.sections for finding in section.findings],
            "facts": {section.area: section.facts for section in self.sections},
            "settings": [dataclasses.asdict(setting) for setting in self.settings],
        }


def examine(
    options: OrchestratorConfig | None = None,
    *,
    timeout: float = 90.0,
    ports: Sequence[int] = (8000,),
    place: Place | None = None,
    nvml: Any | None = None,
    report: Callable[[Section], None] = lambda section: None,
) -> Diagnosis:
    """Looks at this machine; starts one process that uses JAX, and imports none here.

    Args:
        options: whose settings the ranks would get.
        timeout: seconds for the process that uses the devices.
        ports: that a server would listen at, on loopback; the leader's comes from `options`.
        place, nvml: what to look at instead of this machine.
        report: told of each section when it is done.

    Raises:
        ConfigError: an argument is invalid.
    """
    if not 1 <= timeout <= 3600:
        raise ConfigError("timeout", timeout, "use a number of seconds from 1 to 3600")
    options, place = options or OrchestratorConfig(), place or Place(os.environ)
    addresses = [*host.parse_ports(list(ports)), *([options.listen] if options.listen else [])]
    given = options.communication_environment()
    done: list[Section] = []
    complete = True

    def run(area: str, check: Callable[[Section], None], seconds: float = _SECONDS) -> Section:
        nonlocal complete
        section, ended = examined(area, check, seconds)
        complete = complete and ended
        done.append(section)
        report(section)
        return section

    def check_software(section: Section) -> None:
        software.check_python(section)
        software.check_jax(section, place)

    found = run("software", check_software)
    seen = run("gpus", lambda section: gpus.check_gpus(section, place, nvml))
    count, driver = int(seen.facts.get("gpus") or 0), seen.facts.get("driver")

    def check_environment(section: Section) -> None:
        section.facts["plugins"] = found.facts.get("plugins")
        software.check_driver(section, count, driver, found.facts.get("cuda"), place)
        software.check_variables(section, place)

    run("environment", check_environment)
    run("memory", host.check_memory)
    run("limits", lambda section: host.check_limits(section, place, count))
    run("caches", host.check_caches)
    run("ports", lambda section: host.check_ports(section, addresses))
    run("name", host.check_name)
    run("clock", lambda section: host.check_clock(section, place))
    tried = run("devices", lambda section: devices.check_devices(section, timeout, given), timeout + 15)
    backend = "nccl" if tried.facts.get("platform", "gpu" if count else "cpu") != "cpu" else "gloo"
    settings = settings_in_force(
        place.environ, given, backend=backend, several=not options.process_per_device, root=place.root
    )
    return Diagnosis(tuple(done), tuple(settings), complete)
