"""`ryzanstein doctor`."""

from __future__ import annotations

import json
import os
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ryzanstein_jax.commands.options import Orchestrator
from ryzanstein_jax.doctor.examine import Diagnosis, examine
from ryzanstein_jax.doctor.finding import PROBLEM, Section
from ryzanstein_jax.errors import counted
from ryzanstein_jax.start import parse_options

_STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red"}


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, with all facts.")] = False,
    timeout: Annotated[float, typer.Option(help="Most seconds that the use of the devices may take.")] = 90.0,
    port: Annotated[
        list[int] | None, typer.Option(help="That a server shall listen at: 8000. May be repeated.")
    ] = None,
    orchestrator: Orchestrator = None,
) -> None:
    """Looks at this machine: what an engine needs, what is wrong and what to do. Exit status 1: there are problems."""
    console = Console(highlight=False)
    diagnosis = examine(
        parse_options(orchestrator),
        timeout=timeout,
        ports=tuple(port or (8000,)),
        report=(lambda section: None) if as_json else lambda section: _show(console, section),
    )
    if as_json:
        print(json.dumps(diagnosis.to_json(), indent=2))
    else:
        _show_rest(console, diagnosis)
    status = 1 if diagnosis.status == PROBLEM else 0
    if not diagnosis.is_complete:  # a thread that hangs in a driver would hold up the end
        sys.stdout.flush()
        os._exit(status)
    raise typer.Exit(status)


def _show(console: Console, section: Section) -> None:
    for index, finding in enumerate(section.findings):
        # A text may hold brackets, which are no markup.
        line = Text(f"{finding.area if index == 0 else '':<12}")
        line.append(f"{finding.status:<8}", _STYLES[finding.status])
        line.append(finding.text)
        if finding.remedy:
            line.append(f"\n{'':<20}do: {finding.remedy}", "cyan")
        console.print(line, soft_wrap=True)


def _show_rest(console: Console, diagnosis: Diagnosis) -> None:
    topology = next((section.facts["topology"] for section in diagnosis.sections if "topology" in section.facts), None)
    if topology and len(topology["names"]) > 1:
        table = Table("", *map(str, range(len(topology["names"]))), title="ways between GPUs", box=None)
        for index, row in enumerate(topology["matrix"]):
            table.add_row(str(index), *row)
        console.print(table)
    table = Table("setting", "value", "origin", title="how ranks would communicate", title_justify="left", box=None)
    for setting in diagnosis.settings:
        table.add_row(setting.name, Text(setting.value or "-"), setting.origin)
    console.print(table)
    counts = dict.fromkeys(_STYLES, 0)
    for section in diagnosis.sections:
        for finding in section.findings:
            counts[finding.status] += 1
    console.print(
        ", ".join(counted(counts[kind], kind) for kind in ("problem", "warning")), style=_STYLES[diagnosis.status]
    )
