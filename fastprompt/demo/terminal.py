"""The demo on a terminal: progress bars while it runs, then the table and where the files are."""

from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from fastprompt.demo.protocol import Protocol
from fastprompt.demo.report import ALIGN_LEFT, COLUMNS, QUICK_NOTE, cells, save, summary
from fastprompt.demo.run import Results, run


def show(out: Path, *, seeds: int | None, quick: bool, console: Console | None = None) -> Results:
    """Run the demo, print its table and save its files into the folder `out`."""
    console = console or Console()
    if quick:
        protocol = Protocol.quick(seeds or 1)
        console.print(QUICK_NOTE, style="bold yellow", highlight=False)
    else:
        protocol = Protocol() if seeds is None else Protocol(seeds=seeds)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("updates,"),
        TimeElapsedColumn(),
        console=console,
    ) as bars:
        tasks: dict[str, TaskID] = {}

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done)

        results = run(protocol, progress)
    console.print(_table(results))
    for line in summary(results):
        console.print(line, highlight=False)
    for path in save(results, out):
        console.print(f"wrote {path}", highlight=False)
    return results


def _table(results: Results) -> Table:
    table = Table(title="Prompt tuning on handwritten digits")
    for i, column in enumerate(COLUMNS):
        table.add_column(column, justify="left" if i < ALIGN_LEFT else "right")
    for row in results.rows:
        table.add_row(*cells(row))
    return table
