"""`Finding`: one thing that was looked at; and how a check is kept from hanging or raising."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OK, WARNING, PROBLEM = "ok", "warning", "problem"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        area: what it belongs to: "software", "devices", ...
        status: `OK`; `WARNING`: it works, with less speed or safety; `PROBLEM`: something will not work.
        text: what was found, with its numbers.
        remedy: what to do; "" where nothing has to be done.
    """

    area: str
    status: str
    text: str
    remedy: str = ""


@dataclass
class Section:
    """What a check brings home.

    Attributes:
        area: of all its findings.
        facts: values of interest to another program, by name.
        findings: in order.
    """

    area: str
    facts: dict[str, Any] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    def ok(self, text: str) -> None:
        self.findings.append(Finding(self.area, OK, text))

    def warn(self, text: str, remedy: str) -> None:
        self.findings.append(Finding(self.area, WARNING, text, remedy))

    def problem(self, text: str, remedy: str) -> None:
        self.findings.append(Finding(self.area, PROBLEM, text, remedy))


@dataclass(frozen=True)
class Place:
    """Where a check looks: this machine, or one that a test has made.

    Attributes:
        environ: variables.
        root: of the file system.
        versions: of installed distributions, by name in lower case with dashes; None asks Python.
    """

    environ: Mapping[str, str]
    root: Path = Path("/")
    versions: Mapping[str, str] | None = None

    def read(self, path: str, most: int = 1 << 16) -> str | None:
        """Text of a file below the root; None where it can't be read."""
        try:
            with (self.root / path).open("rb") as file:
                return file.read(most).decode(errors="replace").strip()
        except OSError:
            return None

    def names(self, path: str) -> list[str]:
        """Names in a folder below the root; none where it can't be read."""
        try:
            return sorted(entry.name for entry in (self.root / path).iterdir())
        except OSError:
            return []


def examined(area: str, check: Callable[[Section], None], seconds: float) -> tuple[Section, bool]:
    """What a check found, and whether it came to its end; that it failed or hangs is a finding too."""
    section = Section(area)

    def run() -> None:
        try:
            check(section)
        except Exception as error:  # noqa: BLE001 - a broken machine must not break its own diagnosis
            section.warn(f"could not be looked at: {type(error).__name__}: {error}"[:500], "report it, with this text")

    thread = threading.Thread(target=run, name=area, daemon=True)
    thread.start()
    thread.join(seconds)
    if not thread.is_alive():
        return section, True
    late = Section(area, dict(section.facts), list(section.findings))  # the thread may still write to its own
    late.problem(f"no answer within {seconds:g} s", "something below hangs: a driver, a file system or a name service")
    return late, False
