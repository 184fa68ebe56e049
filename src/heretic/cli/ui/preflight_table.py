"""Preflight report on a terminal: devices, findings, verdict."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from heretic.cli.ui.console import escape_terminal
from heretic.planning.memory_model import GIB, DeviceMemory
from heretic.planning.memory_plan import MemoryPlan
from heretic.planning.preflight import PreflightReport
from heretic.planning.preflight_facts import Finding

MARKS = {"failure": "[red]failure[/red]", "warning": "[yellow]warning[/yellow]", "ok": "[green]ok[/green]"}
VERDICTS = {
    "ready": "[green]Ready.[/green]",
    "risky": "[yellow]Risky:[/yellow] the run can start, but read the warnings first.",
    "fail": "[red]This run would fail.[/red]",
}


def show(report: PreflightReport, console: Console) -> None:
    """Print the report within 80 columns."""
    if report.plan or report.gpus.gpus:
        console.print(_devices(report))
    console.print(_findings(report.findings))
    console.print(VERDICTS[report.verdict], highlight=False)


def _devices(report: PreflightReport) -> Table:
    """Return a row for every visible GPU, and for the CPU if it holds weights."""
    loads = {load.device.name: load for load in report.plan.loads} if report.plan else {}
    names = {gpu.device.name: gpu for gpu in report.gpus.gpus}
    table = Table(title=_title(report.plan), title_justify="left")
    table.add_column("device", overflow="fold")
    for heading in ("free", "weights", "run", "reserve", "needed"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("holds", overflow="fold")
    for name, gpu in names.items():
        label = f"{name} {escape_terminal(gpu.name)}"
        if name in loads:
            table.add_row(label, *_numbers(loads[name]))
        else:
            table.add_row(label, _gib(gpu.free), *[""] * 4, "nothing", style="dim")
    for name, load in loads.items():
        if name not in names:
            table.add_row(name, *_numbers(load))
    return table


def _title(plan: MemoryPlan | None) -> str:
    if plan is None:
        return "Devices (GiB)"
    tokens = f"{plan.prompt_tokens} + {plan.new_tokens} tokens"
    return f"Memory in GiB: {plan.dtype}, batches of {plan.batch_size}, {tokens}"


def _numbers(load: DeviceMemory) -> list[str]:
    """Return free memory, weights, other memory of the run, reserve, the total (GiB), and the model's part."""
    run = load.total - load.weights - load.headroom
    needed = _gib(load.total) if load.fits else f"[red]{_gib(load.total)}[/red]"
    return [_gib(load.device.free), _gib(load.weights), _gib(run), _gib(load.headroom), needed, load.layers]


def _findings(findings: tuple[Finding, ...]) -> Table:
    """Return the findings, the worst first, each with its fix below."""
    table = Table(box=None, show_header=False, pad_edge=False)
    for _ in range(2):
        table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for level, mark in MARKS.items():
        for finding in findings:
            if finding.level == level:
                fix = f"\n[bold]→ {escape_terminal(finding.fix)}[/bold]" if finding.fix else ""
                table.add_row(mark, finding.subject, escape_terminal(finding.text) + fix)
    return table


def _gib(size: int) -> str:
    return f"{size / GIB:.1f}"
